#define DK_ISA generic
#define DK_ISA_NAME "generic"
#define DK_VECTOR_BYTES 16
#define DK_ROWS 6  // 12 accumulators
#include "tiles.inc.h"

const dimkern::Isa* dimkern::isa_generic() { return &generic::isa; }
