// Reductions whose order is fixed by the shape alone: the same inputs give the same bits. No atomics.
#pragma once

#include "port.h"

namespace dimkern::gpu {

inline constexpr int kThreads = 128, kWarps = kThreads / 32;

struct Sum {
  DK_DEVICE float operator()(float a, float b) const { return a + b; }
};
struct Max {
  DK_DEVICE float operator()(float a, float b) const { return a > b ? a : b; }  // passes over a NaN in a
};

// Of each group of `lanes` neighbouring lanes; all of them get it.
template <int lanes, class Op>
DK_DEVICE float reduce_lanes(float x, Op op) {
#pragma unroll
  for (int mask = lanes / 2; mask; mask /= 2) x = op(x, shuffle_xor(x, mask));
  return x;
}

// Of the whole block; all threads get it. `shared` holds kWarps floats.
template <class Op>
DK_DEVICE float reduce_block(float x, Op op, float* shared) {
  x = reduce_lanes<32>(x, op);
  if (thread() % 32 == 0) shared[thread() / 32] = x;
  sync_block();
  x = op(op(shared[0], shared[1]), op(shared[2], shared[3]));
  sync_block();  // the next reduction writes there
  return x;
}

}  // namespace dimkern::gpu
