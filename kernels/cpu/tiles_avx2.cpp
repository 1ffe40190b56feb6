// Compiled with -mavx2 -mfma where the compiler knows them (CMakeLists.txt).
#include "tiles.h"

#if defined(__AVX2__)
#define DK_ISA avx2
#define DK_ISA_NAME "avx2"
#define DK_VECTOR_BYTES 32
#define DK_ROWS 6  // 12 accumulators
#include "tiles.inc.h"

const dimkern::Isa* dimkern::isa_avx2() { return &avx2::isa; }
#else
const dimkern::Isa* dimkern::isa_avx2() { return nullptr; }
#endif
