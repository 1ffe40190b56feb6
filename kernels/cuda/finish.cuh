// finish (MATHS.md §3): what closes a row once all its panels have been seen, and what is left after the two gradient
// products. One block a row; the gradient products between `finish` and `settle` are cuBLAS's.
//
// After `finish` the weight of a pair is alpha_r * keep[r, c], own-image pairs included: their weights are put in their
// place among the kept ones, so that positives cost no product of their own.
#pragma once

#include "weigh.cuh"

namespace dimkern::gpu {

struct Finish {
  const float* ref;  // (S, panels), as `weigh` left them
  const float* sum;
  const float* positives;  // (R, L)
  const void* g;           // (R, K)
  const float* scale;      // 0-d
  void* keep;              // (R, keep_row), or null: no gradient is wanted
  void* weighted_g;        // (R, K) alpha * scale * g, or null where not needed
  float* alpha;            // (R,)
  float* losses;           // (R,) the row's loss: their mean is the loss
  float* negatives;        // (R,) the row's negative term
  std::int64_t keep_row, g_row, R, M, P, L, K;
  float clip, kappa;
};

// How a row's kept weights turn into those that its alpha multiplies.
struct Closing {
  float ref;    // the row's reference, or the batch's
  float boost;  // of weights relative to it
  float own;    // of the own-image pairs' -f' or -q
  float alpha;
};

// float16 holds weights of 2^-24 to 2^16: there alpha goes into them, and out comes one factor for the whole batch.
inline constexpr float kNarrowTop = 32768.0f;

template <class Op, class Get>
DK_DEVICE float reduce_over(std::int64_t count, Op op, float start, float* shared, Get get) {
  float x = start;
  for (std::int64_t i = thread(); i < count; i += kThreads) x = op(get(i), x);
  return reduce_block(x, op, shared);
}

// Row log-sum-exp: D from the row's sum and kappa, alpha from D and the positives.
template <class E, bool is_narrow>
DK_DEVICE Closing close_row_lse(const Finish& f, std::int64_t row, std::int64_t panels, float* shared) {
  const float low = -__builtin_huge_valf();
  const float* ref = f.ref + row * panels;
  const float* sum = f.sum + row * panels;
  const float* positive = f.positives + row * f.L;
  float to = reduce_over(panels, Max{}, f.kappa > 0.0f ? coarse(logf(f.kappa)) : low, shared,
                         [&](std::int64_t p) { return ref[p]; });
  to = to == low ? 0.0f : to;
  float total = reduce_over(panels, Sum{}, 0.0f, shared, [&](std::int64_t p) { return sum[p] * expf(ref[p] - to); });
  if (f.kappa > 0.0f) total += expf(logf(f.kappa) - to);
  const float D = to + logf(total);
  const float q = reduce_over(f.L, Sum{}, 0.0f, shared, [&](std::int64_t l) { return sigmoid(D - positive[l]); });
  const float loss = reduce_over(f.L, Sum{}, 0.0f, shared, [&](std::int64_t l) { return softplus(D - positive[l]); });
  if (thread() == 0) {
    f.negatives[row] = D;
    f.losses[row] = loss / float(f.L);
  }
  const float mean_q = q / float(f.L);
  if (q == 0.0f) return {to, is_narrow ? 0.0f : 1.0f, 0.0f, is_narrow ? 1.0f / kNarrowTop / float(f.R) : 0.0f};
  if (is_narrow) return {to, mean_q / total * kNarrowTop, kNarrowTop / float(f.L), 1.0f / kNarrowTop / float(f.R)};
  return {to, 1.0f, total / q, mean_q / total / float(f.R)};
}

// Global log-sum-exp: every block makes the one sum from the tiles' sums.
template <class E, bool is_narrow>
DK_DEVICE Closing close_global_lse(const Finish& f, std::int64_t row, std::int64_t panels, float* shared) {
  const float low = -__builtin_huge_valf();
  const std::int64_t tiles = (f.R + kRows - 1) / kRows * panels;
  float to = reduce_over(tiles, Max{}, low, shared, [&](std::int64_t t) { return f.ref[t]; });
  to = to == low ? 0.0f : to;
  const float total =
      reduce_over(tiles, Sum{}, 0.0f, shared, [&](std::int64_t t) { return f.sum[t] * expf(f.ref[t] - to); });
  const float pairs = float(f.R) * float(f.M - f.L), D = to + logf(total) - logf(pairs);
  const float positive =
      reduce_over(f.L, Sum{}, 0.0f, shared, [&](std::int64_t l) { return E::f(f.positives[row * f.L + l]); });
  if (thread() == 0) {
    f.negatives[row] = D;
    f.losses[row] = D - positive / float(f.L);
  }
  const float each = 1.0f / (float(f.R) * float(f.L));
  if (is_narrow) return {to, kNarrowTop / total, kNarrowTop * each, 1.0f / kNarrowTop};
  return {to, 1.0f, total * each, 1.0f / total};
}

// Pointwise: alpha is known from the start, and own-image weights are in place already.
template <class E, bool is_narrow>
DK_DEVICE Closing close_pointwise(const Finish& f, std::int64_t row, std::int64_t panels, float* shared) {
  const float low = -__builtin_huge_valf();
  float to = 0.0f;
  if (is_narrow && f.keep) {  // the rows of a tile have one reference: the first one's
    const std::int64_t tiles = (f.R + kRows - 1) / kRows * panels;
    to = reduce_over(tiles, Max{}, low, shared,
                     [&](std::int64_t t) { return f.ref[t / panels * kRows * panels + t % panels]; });
    to = to == low ? 0.0f : to;
  }
  const float count = float(f.M - f.L);
  const float total = reduce_over(panels, Sum{}, 0.0f, shared, [&](std::int64_t p) { return f.sum[row * panels + p]; });
  const float positive =
      reduce_over(f.L, Sum{}, 0.0f, shared, [&](std::int64_t l) { return E::f(f.positives[row * f.L + l]); });
  if (thread() == 0) {
    f.negatives[row] = total / count;
    f.losses[row] = total / count - positive / float(f.L);
  }
  return {to, 1.0f, 0.0f, expf(to) / (float(f.R) * count)};
}

template <class T, class E>
DK_KERNEL(kThreads, 4)
finish(const Finish f) {
  DK_SHARED(bytes);
  float* shared = reinterpret_cast<float*>(bytes);
  const std::int64_t row = block(), panels = (f.M + kCols - 1) / kCols;
  Closing closing;
  if constexpr (E::family == Family::row_lse)
    closing = close_row_lse<E, narrow<T>>(f, row, panels, shared);
  else if constexpr (E::family == Family::global_lse)
    closing = close_global_lse<E, narrow<T>>(f, row, panels, shared);
  else
    closing = close_pointwise<E, narrow<T>>(f, row, panels, shared);
  if (!f.keep) return;
  if (thread() == 0) f.alpha[row] = closing.alpha;

  // panels whose reference is not the row's: nothing to do for most of a row, for most rows
  T* keep = static_cast<T*>(f.keep) + row * f.keep_row;
  const std::int64_t statistic = (E::family == Family::global_lse ? row / kRows : row) * panels;
  for (std::int64_t panel = thread() / 32; panel < panels; panel += kWarps) {
    const float ref = f.ref[statistic + panel];
    const float gain = ref == closing.ref ? closing.boost : expf(ref - closing.ref) * closing.boost;
    const std::int64_t end = (panel + 1) * kCols < f.keep_row ? (panel + 1) * kCols : f.keep_row;
    if (gain != 1.0f)
      for (std::int64_t col = panel * kCols + thread() % 32 * 2; col < end; col += 64)
        store_pair(keep + col, to_float(keep[col]) * gain, to_float(keep[col + 1]) * gain);
  }
  if constexpr (E::family != Family::pointwise) {
    sync_block();
    T* own = keep + row / f.P * f.L;
    for (std::int64_t l = thread(); l < f.L; l += kThreads) {
      const float s = f.positives[row * f.L + l];
      const float weight = E::family == Family::row_lse ? sigmoid(f.negatives[row] - s) : E::df(s);
      from_float(own[l], -weight * closing.own * slope(s, f.clip));
    }
  }
  if (f.weighted_g) {
    const T* g = static_cast<const T*>(f.g) + row * f.g_row;
    T* weighted = static_cast<T*>(f.weighted_g) + row * f.K;
    const float factor = closing.alpha * *f.scale;
    for (std::int64_t k = thread(); k < f.K; k += kThreads) from_float(weighted[k], to_float(g[k]) * factor);
  }
}

// The products of the kept weights become gradients; block 0 takes the mean of the rows' losses.
struct Settle {
  const float* alpha;   // (R,)
  const float* losses;  // (R,)
  const float* scale;   // 0-d
  float* grad_h;        // (R, K) keep * C, times alpha from here on; or null
  float* grad_c;        // (size_c,) keep^T * G, times alpha[0] * scale from here on; or null: alpha was in the product
  float* loss;          // 0-d
  std::int64_t R, K, size_c;
};

// A template over nothing: its name is then a weak symbol, as the other kernels' are.
template <class = void>
DK_KERNEL(kThreads, 8)
settle(const Settle c) {
  DK_SHARED(bytes);
  const std::int64_t first = block() * kThreads + thread(), step = blocks() * kThreads;
  if (c.grad_h)
    for (std::int64_t i = first; i < c.R * c.K; i += step) c.grad_h[i] *= c.alpha[i / c.K];
  if (c.grad_c) {
    const float factor = c.alpha[0] * *c.scale;
    for (std::int64_t i = first; i < c.size_c; i += step) c.grad_c[i] *= factor;
  }
  if (block() == 0) {
    const float sum =
        reduce_over(c.R, Sum{}, 0.0f, reinterpret_cast<float*>(bytes), [&](std::int64_t r) { return c.losses[r]; });
    if (thread() == 0) *c.loss = sum / float(c.R);
  }
}

// Backward: saved gradients times the upstream factor, and that of scale * g times scale, in their inputs' dtypes.
struct Chain {
  const float* grad_c;    // (size_c,)
  const float* grad_h;    // (size_g,)
  const float* upstream;  // 0-d
  const float* scale;     // 0-d
  void* d_c;
  void* d_g;
  std::int64_t size_c, size_g;
};

template <class T>
DK_DEVICE void scaled_copy(void* to, const float* from, std::int64_t size, float factor) {
  for (std::int64_t i = block() * kThreads + thread(); i < size; i += blocks() * kThreads)
    from_float(static_cast<T*>(to)[i], from[i] * factor);
}

template <class T>
DK_KERNEL(kThreads, 8)
chain(const Chain c) {
  scaled_copy<T>(c.d_c, c.grad_c, c.size_c, *c.upstream);
  scaled_copy<T>(c.d_g, c.grad_h, c.size_g, *c.upstream * *c.scale);
}

}  // namespace dimkern::gpu
