// AVX-512 with bfloat16 conversions; products of bfloat16 on AMX's tile registers.
#include "tiles.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define DK_ISA amx_bf16
#define DK_ISA_NAME "amx_bf16"
#define DK_VECTOR_BYTES 64
#define DK_ROWS 12  // 24 accumulators
#define DK_BF16
#define DK_AMX
#define DK_PANEL 288  // whole blocks of DK_ROWS and of AMX's 32
#include "tiles.inc.h"

const dimkern::Isa* dimkern::isa_amx_bf16() { return &amx_bf16::isa; }
#else
const dimkern::Isa* dimkern::isa_amx_bf16() { return nullptr; }
#endif
