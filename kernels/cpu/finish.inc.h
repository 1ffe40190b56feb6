// What rows of a whole batch add to the mean loss and weigh in its gradient, for one instruction set; included by
// tiles.inc.h inside its namespace.

constexpr int kAtOnce = 8;  // positives of a row that are mapped at once: vectors of double

// The sum of term(l) over the positives l of a row.
template <class Term>
DK_FN double sum_positives(std::int64_t L, Term term) {
  double sums[kAtOnce] = {}, total = 0;
  std::int64_t l = 0;
  for (; l + kAtOnce <= L; l += kAtOnce) {
    for (int i = 0; i < kAtOnce; ++i) sums[i] += term(l + i);
  }
  for (; l < L; ++l) total += term(l);
  for (int i = 0; i < kAtOnce; ++i) total += sums[i];
  return total;
}

// What rows [begin, end) add to the mean loss, (R,).
template <class T>
void row_losses(const char* estimator, const Batch& b, std::int64_t begin, std::int64_t end, const T* positives,
                const double* negatives, double* losses) {
  with_estimator(estimator, [&](auto row) {
    using E = decltype(row);
    for (std::int64_t r = begin; r < end; ++r) {
      const T* __restrict s = positives + r * b.L;
      const double negative = negatives[r];
      losses[r] =
          b.each() * sum_positives(b.L, [&](std::int64_t l) {
            return E::family == Family::row_lse ? softplus(negative - double(s[l])) : negative - E::f(double(s[l]));
          });
    }
  });
}

// The weights that rows [begin, end) have in the mean loss of a log-sum-exp family: alpha relative to ref, and own
// (R, L) of the own-image pairs with scores `positives`.
template <class T>
void row_weights(const char* estimator, const Batch& b, std::int64_t begin, std::int64_t end, const T* ref,
                 const double* sum, const T* positives, const double* negatives, T* alpha, T* own) {
  const double each = b.each(), log_pairs = std::log(double(b.rows()) * b.negatives());
  with_estimator(estimator, [&](auto row) {
    using E = decltype(row);
    for (std::int64_t r = begin; r < end; ++r) {
      const T* __restrict s = positives + r * b.L;
      T* __restrict weights = own + r * b.L;
      double to = negatives[r], weight = 1;
      if constexpr (E::family == Family::global_lse) {
        to += log_pairs;
        for (std::int64_t l = 0; l < b.L; ++l) weights[l] = T(-each * E::df(double(s[l])));
      } else {
        weight = sum_positives(b.L, [&](std::int64_t l) {
          const double q = each * sigmoid(to - double(s[l]));
          weights[l] = T(-q);
          return q;
        });
      }
      if (to == -INFINITY) to = 0;  // any finite reference serves an empty row
      alpha[r] = sum[r] == 0 ? T(0) : T(weight * std::exp(double(ref[r]) - to));
    }
  });
}
