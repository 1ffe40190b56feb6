// AVX-512 with its products of bfloat16 pairs.
#include "tiles.h"

#if defined(__AVX512BF16__)
#define DK_ISA avx512_bf16
#define DK_ISA_NAME "avx512_bf16"
#define DK_VECTOR_BYTES 64
#define DK_ROWS 12  // 24 accumulators
#define DK_BF16
#include "tiles.inc.h"

const dimkern::Isa* dimkern::isa_avx512_bf16() { return &avx512_bf16::isa; }
#else
const dimkern::Isa* dimkern::isa_avx512_bf16() { return nullptr; }
#endif
