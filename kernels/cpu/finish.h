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

// The weights that rows [begin, end) have in the mean loss: alpha relative to ref, and own (R, L) of the own-image
// pairs with scores `positives`.
template <class E, class T>
void finish(const Batch& b, std::int64_t begin, std::int64_t end, const T* ref, const double* sum, const T* positives,
            const double* negatives, T* alpha, T* own) {
  const std::int64_t L = b.L;
  const double each = b.each(), log_pairs = std::log(double(b.rows()) * b.negatives());
  for (std::int64_t r = begin; r < end; ++r) {
    double to = negatives[r], weight = 1;
    if constexpr (E::family == Family::global_lse) {
      to += log_pairs;
      for (std::int64_t l = 0; l < L; ++l) own[r * L + l] = T(-each * E::df(double(positives[r * L + l])));
    } else {
      weight = 0;
      for (std::int64_t l = 0; l < L; ++l) {
        const double q = each * sigmoid(to - double(positives[r * L + l]));
        own[r * L + l] = T(-q);
        weight += q;
      }
    }
    alpha[r] = sum[r] == 0 ? T(0) : T(weight * std::exp(double(ref[r]) - not_empty(to)));
  }
}

// What row r adds to the mean loss.
template <class E, class T>
double row_loss(const Batch& b, std::int64_t r, const T* positives, double negative) {
  double sum = 0;
  for (std::int64_t l = 0; l < b.L; ++l) {
    const double s = double(positives[r * b.L + l]);
    sum += E::family == Family::row_lse ? softplus(negative - s) : negative - E::f(s);
  }
  return sum * b.each();
}

}  // namespace dimkern
