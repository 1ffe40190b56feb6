// finish: what closes a row (MATHS.md §3), for one block that holds all pairs of a batch. The driver of
// dimkern/streaming.py does the same with torch for any blocks; below a thousand pairs a row its handful of small ops
// cost more than the pairs.
#pragma once

#include <cmath>
#include <cstdint>

#include "dimkern/estimators.h"

namespace dimkern {

// The sizes of a batch: R = N * P rows, L positives and (N - 1) * L negatives each.
struct Batch {
  std::int64_t N, P, L;
  double kappa;
  std::int64_t rows() const { return N * P; }
  double negatives() const { return double(N - 1) * double(L); }
  double each() const { return 1.0 / (double(rows()) * double(L)); }  // weight of a positive in the mean loss
};

inline double log_add_exp(double a, double b) {
  const double high = a > b ? a : b, low = a > b ? b : a;
  return std::isinf(high) && high == low ? high : high + std::log1p(std::exp(low - high));
}

// Any finite reference serves an empty row.
inline double not_empty(double log_sum) { return log_sum == -INFINITY ? 0.0 : log_sum; }

// Turns (ref, sum of psi) of a log-sum-exp family into each row's negative term, and into the weights of the mean
// loss: alpha relative to ref, and own (R, L) of the own-image pairs with scores `positives`.
template <class E, class T>
void finish(const Batch& b, const T* ref, const double* sum, const T* positives, double* negatives, T* alpha, T* own) {
  const std::int64_t R = b.rows(), L = b.L;
  const double each = b.each();
  for (std::int64_t r = 0; r < R; ++r) negatives[r] = double(ref[r]) + std::log(sum[r]);
  if constexpr (E::family == Family::global_lse) {
    double highest = negatives[0], total = 0;
    for (std::int64_t r = 1; r < R; ++r) highest = negatives[r] > highest ? negatives[r] : highest;
    const double to = std::isfinite(highest) ? highest : 0.0;
    for (std::int64_t r = 0; r < R; ++r) total += std::exp(negatives[r] - to);
    const double all = to + std::log(total);
    for (std::int64_t r = 0; r < R; ++r) {
      alpha[r] = sum[r] == 0 ? T(0) : T(std::exp(double(ref[r]) - not_empty(all)));
      negatives[r] = all - std::log(double(R) * b.negatives());
      for (std::int64_t l = 0; l < L; ++l) own[r * L + l] = T(-each * E::df(double(positives[r * L + l])));
    }
  } else {
    for (std::int64_t r = 0; r < R; ++r) {
      if (b.kappa > 0) negatives[r] = log_add_exp(negatives[r], std::log(b.kappa));
      double q_sum = 0;
      for (std::int64_t l = 0; l < L; ++l) {
        const double q = each * sigmoid(negatives[r] - double(positives[r * L + l]));
        own[r * L + l] = T(-q);
        q_sum += q;
      }
      alpha[r] = sum[r] == 0 ? T(0) : T(q_sum * std::exp(double(ref[r]) - not_empty(negatives[r])));
    }
  }
}

}  // namespace dimkern
