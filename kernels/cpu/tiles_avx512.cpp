// Compiled with -mavx512f and its companions where the compiler knows them (CMakeLists.txt).
#include "tiles.h"

#if defined(__AVX512F__)
#define DK_ISA avx512
#define DK_ISA_NAME "avx512"
#define DK_VECTOR_BYTES 64
#define DK_ROWS 12  // 24 accumulators
#include "tiles.inc.h"

const dimkern::Isa* dimkern::isa_avx512() { return &avx512::isa; }
#else
const dimkern::Isa* dimkern::isa_avx512() { return nullptr; }
#endif
