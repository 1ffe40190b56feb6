// What closes the rows of a block that holds all pairs of a batch (MATHS.md §3), from their statistics. With
// finish.inc.h it does what the driver of dimkern/streaming.py does with torch for any blocks, whose handful of small
// ops cost more than the pairs below a thousand pairs a row.
#pragma once

#include <cmath>
#include <cstdint>

#include "dimkern/estimators.h"
#include "tiles.h"

namespace dimkern {

inline double log_add_exp(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return std::isinf(high) && high == low ? high : high + std::log1p(std::exp(low - high));
}

// Each row's negative term of a log-sum-exp family from (ref, sum of psi).
template <class E, class T>
void log_sums(const Batch& b, const T* ref, const double* sum, double* negatives) {
  const std::int64_t R = b.rows();
  for (std::int64_t r = 0; r < R; ++r) {
    negatives[r] = double(ref[r]) + std::log(sum[r]);
    if (E::family == Family::row_lse && b.kappa > 0) negatives[r] = log_add_exp(negatives[r], std::log(b.kappa));
  }
  if constexpr (E::family == Family::global_lse) {
    double highest = negatives[0], total = 0;
    for (std::int64_t r = 1; r < R; ++r) highest = negatives[r] > highest ? negatives[r] : highest;
    const double to = std::isfinite(highest) ? highest : 0.0;
    for (std::int64_t r = 0; r < R; ++r) total += std::exp(negatives[r] - to);
    const double all = to + std::log(total) - std::log(double(R) * b.negatives());
    for (std::int64_t r = 0; r < R; ++r) negatives[r] = all;
  }
}

}  // namespace dimkern
