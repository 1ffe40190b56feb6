// The kernels of kernels/cuda on the emulation, without torch: for the sanitizers, on buffers of exactly their sizes.
//
// Prints the largest errors of the loss and of the weights against sums in double.
#include <cstdio>
#include <random>

#include "finish.cuh"

namespace {

using namespace dimkern;
using namespace dimkern::gpu;

constexpr std::int64_t N = 11, P = 6, L = 12, K = 72, R = N * P, M = N * L, keep_row = (M + 7) / 8 * 8;

template <class T>
std::vector<T> numbers(std::int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<T> x(count);
  for (T& number : x) from_float(number, normal(random));
  return x;
}

// e^(s - D) of a negative, -q of a positive: what the weights of InfoNCE are, times R; and for JSD, sigmoid and its
// like.
template <class E>
double expected(const std::vector<double>& s, std::int64_t r, std::int64_t c, double D) {
  const bool own = c / L == r / P;
  const double score = s[r * M + c];
  if constexpr (E::family == Family::row_lse) {
    double q = 0;
    for (std::int64_t l = 0; l < L; ++l) q += 1 / (1 + std::exp(s[r * M + r / P * L + l] - D)) / double(L);
    return own ? -1 / (1 + std::exp(score - D)) / double(L) : q * std::exp(score - D);
  } else {
    return own ? -E::df(score) / double(L) : E::phi(score, 0.0) / double(M - L);
  }
}

template <class T, class E>
bool check(double allowed) {
  const auto g = numbers<T>(R * K, 1), c = numbers<T>(M * K, 2);
  const float scale = 0.08f, nan = __builtin_nanf("");
  const std::int64_t panels = (M + kCols - 1) / kCols, blocks = (R + kRows - 1) / kRows * panels;
  std::vector<T> keep(R * keep_row), weighted(R * K);
  std::vector<float> ref(R * panels, nan), sum(R * panels, nan), positives(R * L, nan), alpha(R, nan), losses(R, nan);
  std::vector<float> negatives(R, nan), grad(R * K, 1.0f);
  float loss = nan;
  launch(&weigh<T, E>, blocks, kThreads, kShared, Stream{},
         Weigh{g.data(), c.data(), &scale, keep.data(), ref.data(), sum.data(), positives.data(), K, K, keep_row, R, M,
               P, L, 0, 0, K * std::int64_t(sizeof(T)), 0.0f, float(N - 1)});
  launch(&finish<T, E>, R, kThreads, kWarps * 4, Stream{},
         Finish{ref.data(), sum.data(), positives.data(), g.data(), &scale, keep.data(), weighted.data(), alpha.data(),
                losses.data(), negatives.data(), keep_row, K, R, M, P, L, K, 0.0f, 0.0f});
  launch(&settle<>, 2, kThreads, kWarps * 4, Stream{},
         Settle{alpha.data(), losses.data(), &scale, grad.data(), nullptr, &loss, R, K, 0});

  std::vector<double> s(R * M);
  for (std::int64_t r = 0; r < R; ++r)
    for (std::int64_t j = 0; j < M; ++j)
      for (std::int64_t k = 0; k < K; ++k)
        s[r * M + j] += double(scale) * to_float(g[r * K + k]) * to_float(c[j * K + k]);
  double worst = 0, largest = 0;
  for (std::int64_t r = 0; r < R; ++r) {
    double total = 0;
    for (std::int64_t j = 0; j < M; ++j)
      if (j / L != r / P) total += std::exp(s[r * M + j]);
    for (std::int64_t j = 0; j < M; ++j) {
      const double wanted = expected<E>(s, r, j, std::log(total));
      const double got = double(to_float(keep[r * keep_row + j])) * alpha[r] * double(R);
      largest = std::max(largest, std::fabs(wanted));
      worst = std::max(worst, std::fabs(got - wanted) + (got == got ? 0 : 1e9));
    }
  }
  std::printf("%s: error of a weight %.2e of %.2e, loss %.4f\n", E::name, worst, largest, double(loss));
  return worst <= allowed * largest && loss == loss;
}

}  // namespace

// Of the estimator that is named, or of three.
int main(int count, char** names) {
  const auto wanted = [&](const char* name) { return count < 2 || same_text(name, names[1]); };
  bool ok = true;
  if (wanted("infonce")) ok &= check<Bf16, INFONCE>(8e-3);
  if (wanted("jsd")) ok &= check<F16, JSD>(2e-3);
  if (wanted("h2")) ok &= check<Tf32, H2>(4e-3);
  return ok ? 0 : 1;
}
