// Tiles of every instruction set against naive sums in double: weigh, pack and accumulate of each estimator, kept or
// scored again, on ragged blocks, shares of several threads by hand. Every array is its own exactly-sized heap block
// and starts as NaN, so that a sanitizer sees an overrun and a comparison sees a read of what nobody wrote.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "dimkern/estimators.h"
#include "tiles.h"

namespace {

using dimkern::Accumulate;
using dimkern::Family;
using dimkern::Isa;
using dimkern::Number;
using dimkern::Pairs;
using dimkern::Source;
using dimkern::Weigh;

using Index = std::int64_t;

constexpr double kInf = std::numeric_limits<double>::infinity();
int failures = 0;

template <class T>
struct Array {
  Index size;
  std::unique_ptr<T[]> data;
  explicit Array(Index n) : size(n), data(new T[n]) {
    for (Index i = 0; i < n; ++i) data[i] = std::numeric_limits<T>::quiet_NaN();
  }
  T& operator[](Index i) { return data[i]; }
  const T& operator[](Index i) const { return data[i]; }
  T* get() const { return data.get(); }
};

struct Bytes {
  Index size;
  std::unique_ptr<char[]> data;
  explicit Bytes(Index n) : size(n), data(new char[n]) { std::memset(data.get(), 0xff, static_cast<std::size_t>(n)); }
  char* get() const { return data.get(); }
};

template <class T>
struct Functions;
template <>
struct Functions<float> {
  static constexpr auto lanes = &Isa::lanes_f32, scratch = &Isa::scratch_f32;
  static constexpr auto pack = &Isa::pack_f32;
  static constexpr auto weigh = &Isa::weigh_f32;
  static constexpr auto accumulate = &Isa::accumulate_f32;
};
template <>
struct Functions<double> {
  static constexpr auto lanes = &Isa::lanes_f64, scratch = &Isa::scratch_f64;
  static constexpr auto pack = &Isa::pack_f64;
  static constexpr auto weigh = &Isa::weigh_f64;
  static constexpr auto accumulate = &Isa::accumulate_f64;
};

struct Shape {
  Index images, P, L, K, row_first, row_images, col_first, col_images, pad;  // pad: ldc - K
};

const Shape kShapes[] = {
    {2, 1, 1, 1, 0, 2, 0, 2, 0},       {2, 1, 1, 3, 1, 1, 0, 1, 0},       // one row, one pair, no own-image pair
    {3, 2, 5, 7, 1, 1, 1, 1, 2},                                          // own-image pairs alone: empty rows
    {5, 3, 49, 33, 0, 5, 0, 5, 0},     {27, 19, 9, 5, 0, 27, 0, 27, 3},   // 513 rows, 243 columns
    {22, 25, 11, 70, 0, 22, 0, 22, 0},                                    // own rows of image 20 straddle row 512
    {9, 60, 54, 17, 0, 9, 2, 7, 1},    {30, 21, 17, 4, 2, 27, 0, 29, 0},  // off-diagonal blocks, 567 rows
    {2, 600, 3, 2, 0, 2, 1, 1, 0},     {481, 1, 1, 2, 0, 481, 0, 481, 0},
};

struct Variant {
  double clip;
  bool keep, add, own;
  Index threads;
  enum { matrix, by_channel, by_location } layout;  // the features: a matrix in place, or staged from (images, K, L)
  Number number;                                    // or from (images, L, K), of any type
};

const Variant kVariants[] = {
    {0, true, false, true, 1, Variant::matrix, {}},
    {0, true, true, false, 3, Variant::by_channel, Number::float32},
    {2.5, true, false, true, 2, Variant::by_location, Number::bfloat16},
    {0, false, false, true, 1, Variant::by_channel, Number::float16},
    {0, false, false, false, 2, Variant::by_location, Number::float64},
    {2.5, false, true, true, 3, Variant::matrix, {}},
    {2.5, false, false, false, 1, Variant::by_channel, Number::bfloat16},
};

// The value of 16 bits with that many of mantissa.
double half_value(std::uint16_t bits, int mantissa) {
  const int exponent = (bits & 0x7fff) >> mantissa, bias = (1 << (14 - mantissa)) - 1;
  const int fraction = (bits & ((1 << mantissa) - 1)) | (exponent ? 1 << mantissa : 0);
  const double value = std::ldexp(fraction, std::max(exponent, 1) - bias - mantissa);
  return bits & 0x8000 ? -value : value;
}

template <class T>
class Check {
 public:
  Check(const Isa& isa, const char* estimator, const Shape& shape, const Variant& variant)
      : isa_(isa),
        name_(estimator),
        shape_(shape),
        v_(variant),
        R(shape.row_images * shape.P),
        M(shape.col_images * shape.L),
        K(shape.K),
        row0(shape.row_first * shape.P),
        col0(shape.col_first * shape.L),
        width((M + variant.threads - 1) / variant.threads),
        shares((M + width - 1) / width),
        panels((width + isa.panel - 1) / isa.panel),
        ld(up(R)),
        g(R * K),
        c((M - 1) * (K + shape.pad) + K),
        by_row(ld * K),
        by_channel(up(K) * R),
        positives(shape.images * shape.P * shape.L),
        alpha(R),
        ref(R),
        own(R * shape.L),
        bytes_of_number(variant.number == Number::float64   ? 8
                        : variant.number == Number::float32 ? 4
                                                            : 2),
        stored(variant.layout == Variant::matrix ? 0 : shape.col_images * image() * bytes_of_number),
        scratch(isa.*Functions<T>::scratch +
                (variant.layout == Variant::matrix ? 0 : isa.panel * K * Index(sizeof(T)))),
        score(R * M) {
    std::mt19937 engine(static_cast<unsigned>(R * 31 + M * 7 + K));
    std::normal_distribution<double> normal;
    for (Index i = 0; i < g.size; ++i) g[i] = static_cast<T>(1.3 * normal(engine) / std::sqrt(double(K)));
    for (Index m = 0; m < M; ++m) {
      for (Index k = 0; k < K; ++k) put(m, k, normal(engine), engine);
    }
    for (Index i = 0; i < alpha.size; ++i) alpha[i] = static_cast<T>(normal(engine));
    for (Index i = 0; i < own.size; ++i) own[i] = static_cast<T>(normal(engine));
    for (Index r = 0; r < R; ++r) {
      for (Index m = 0; m < M; ++m) {
        double s = 0;
        for (Index k = 0; k < K; ++k) s += double(g[r * K + k]) * double(c[m * ldc() + k]);
        score[r * M + m] = v_.clip == 0 ? s : v_.clip * std::tanh(s / v_.clip);
      }
    }
  }

  void run() {
    const bool staged = v_.layout != Variant::matrix;
    const Source source{stored.get(), v_.number, image(), location(), channel()};
    Pairs<T> p{name_,
               R,
               M,
               K,
               g.get(),
               staged ? nullptr : c.get(),
               staged ? 0 : ldc(),
               row0,
               col0,
               shape_.P,
               shape_.L,
               T(v_.clip),
               by_row.get(),
               by_channel.get(),
               staged ? &source : nullptr};
    (isa_.*Functions<T>::pack)(p, by_row.get(), by_channel.get());
    bool known = dimkern::with_estimator(name_, [&](auto estimator) {
      using E = decltype(estimator);
      constexpr bool pointwise = E::family == Family::pointwise;
      if (pointwise && v_.keep) return;  // their weights are known at once: never kept
      Array<T> keep(v_.keep ? M * ld : 0), panel_ref(v_.keep ? shares * panels * ld : 0);
      weigh<E>(p, v_.keep ? &keep : nullptr, panel_ref);
      for (Index r = 0; r < R; ++r) ref[r] = pointwise ? T(0) : static_cast<T>(finite(log_sum(r)));
      accumulate<E>(p, v_.keep ? &keep : nullptr, panel_ref);
    });
    if (!known) fail("no such estimator", 0, 0, 0);
  }

 private:
  Index up(Index n) const {
    const Index lanes = isa_.*Functions<T>::lanes;
    return (n + lanes - 1) / lanes * lanes;
  }
  Index ldc() const { return K + shape_.pad; }

  // Strides of the source, in numbers.
  Index location() const { return v_.layout == Variant::by_channel ? 1 : K + shape_.pad; }
  Index channel() const { return v_.layout == Variant::by_channel ? shape_.L : 1; }
  Index image() const { return v_.layout == Variant::by_channel ? K * shape_.L : (K + shape_.pad) * shape_.L; }

  // Stores a feature, and in c what it reads as.
  void put(Index m, Index k, double x, std::mt19937& engine) {
    T& value = c[m * ldc() + k];
    value = static_cast<T>(x);
    if (v_.layout == Variant::matrix) return;
    char* to = stored.get() + (m / shape_.L * image() + m % shape_.L * location() + k * channel()) * bytes_of_number;
    const auto store = [&](auto number) { std::memcpy(to, &number, sizeof(number)); };
    if (v_.number == Number::float64) {
      store(double(value));
    } else if (v_.number == Number::float32) {
      store(float(value));
      value = static_cast<T>(float(value));
    } else {
      // of all sizes to 2 and, of float16, subnormals; of both signs
      const int mantissa = v_.number == Number::float16 ? 10 : 7;
      const int bias = (1 << (14 - mantissa)) - 1, exponents = v_.number == Number::float16 ? bias + 1 : 12;
      const unsigned exponent = bias - static_cast<unsigned>(engine() % unsigned(exponents));
      const auto bits =
          static_cast<std::uint16_t>((engine() & 0x8000) | exponent << mantissa | (engine() & ((1u << mantissa) - 1)));
      store(bits);
      value = static_cast<T>(half_value(bits, mantissa));
    }
  }
  bool is_own(Index r, Index m) const { return (row0 + r) / shape_.P == (col0 + m) / shape_.L; }
  static double finite(double x) { return std::isfinite(x) ? x : 0.0; }
  void* fresh_scratch() {
    std::memset(scratch.get(), 0xff, static_cast<std::size_t>(scratch.size));
    return scratch.get();
  }

  double log_sum(Index r) const {
    double highest = -kInf, sum = 0;
    for (Index m = 0; m < M; ++m) highest = is_own(r, m) ? highest : std::fmax(highest, score[r * M + m]);
    for (Index m = 0; m < M; ++m) sum += is_own(r, m) ? 0.0 : std::exp(score[r * M + m] - finite(highest));
    return finite(highest) + std::log(sum);
  }

  template <class E>
  double psi_sum(Index r, double* size) const {
    double sum = *size = 0;
    for (Index m = 0; m < M; ++m) {
      const double psi = is_own(r, m) ? 0.0 : E::psi(score[r * M + m], double(ref[r]));
      sum += psi, *size += std::fabs(psi);
    }
    return sum;
  }

  template <class E>
  void weigh(const Pairs<T>& p, Array<T>* keep, Array<T>& panel_ref) {
    std::vector<double> total(R, 0.0), log_total(R, -kInf), size(R);
    for (Index i = 0; i < shares; ++i) {
      Array<T> share_ref(R);
      Array<double> share_sum(R);
      const Weigh<T> w{keep ? keep->get() : nullptr, keep ? panel_ref.get() : nullptr, share_ref.get(), share_sum.get(),
                       positives.get()};
      (isa_.*Functions<T>::weigh)(p, w, i * width, std::min(M, (i + 1) * width), i * panels, fresh_scratch());
      for (Index r = 0; r < R; ++r) {
        total[r] += share_sum[r];
        const double part = share_sum[r] == 0 ? -kInf : finite(share_ref[r]) + std::log(share_sum[r]);
        const double high = std::fmax(log_total[r], part), low = std::fmin(log_total[r], part);
        log_total[r] = low == -kInf ? high : high + std::log1p(std::exp(low - high));
      }
    }
    for (Index r = 0; r < R; ++r) {
      if (E::family == Family::pointwise) {
        ref[r] = T(0);
        const double want = psi_sum<E>(r, &size[r]);
        near("sum of psi", r, total[r], want, 1 + size[r]);
      } else if (const double want = log_sum(r); want == -kInf || log_total[r] == -kInf) {
        if (want != log_total[r]) fail("logarithm of an empty sum", r, log_total[r], want);
      } else {
        near("log-sum-exp", r, log_total[r], want, 1 + std::fabs(want));
      }
    }
    near_positives();
  }

  void near_positives() {
    for (Index r = 0; r < R; ++r) {
      for (Index m = 0; m < M; ++m) {
        if (!is_own(r, m)) continue;
        const Index image = (row0 + r) / shape_.P, q = (row0 + r) % shape_.P, l = (col0 + m) % shape_.L;
        const double got = positives[(image * shape_.P + q) * shape_.L + l], want = score[r * M + m];
        near("positive", r, got, want, 1 + std::fabs(want));
      }
    }
  }

  template <class E>
  void accumulate(const Pairs<T>& p, const Array<T>* keep, const Array<T>& panel_ref) {
    constexpr bool pointwise = E::family == Family::pointwise;
    const double own_each = keep || v_.own ? 0.0 : 0.01;
    if (own_each > 0) std::fill_n(positives.get(), positives.size, T(NAN));
    Array<T> grad_c(M * K), grad_h(R * K);
    std::vector<double> h(R * K, 0.0), h_size(R * K, 1e-3), d(M * K, 0.0), d_size(M * K, 1e-3), sums(R, 0.0);
    if (v_.add) {
      for (Index i = 0; i < M * K; ++i) d[i] = grad_c[i] = T(0.25), d_size[i] = 1;
      for (Index i = 0; i < R * K; ++i) h[i] = grad_h[i] = T(-0.5), h_size[i] = 1;
    }
    std::vector<double> got_h(R * K, 0.0);
    for (Index i = 0; i < shares; ++i) {
      Array<T> part(R * K);
      Array<double> share_sum(R);
      Accumulate<T> a{keep ? keep->get() : nullptr,
                      keep ? panel_ref.get() : nullptr,
                      pointwise ? nullptr : ref.get(),
                      alpha.get(),
                      v_.own ? own.get() : nullptr,
                      positives.get(),
                      i == 0 ? grad_h.get() : part.get(),
                      grad_c.get(),
                      i == 0 && v_.add,
                      v_.add,
                      T(own_each),
                      share_sum.get()};
      (isa_.*Functions<T>::accumulate)(p, a, i * width, std::min(M, (i + 1) * width), i * panels, fresh_scratch());
      for (Index k = 0; k < R * K; ++k) got_h[k] += double(a.grad_h[k]);
      for (Index r = 0; r < R; ++r) sums[r] += share_sum[r];
    }
    for (Index r = 0; r < R; ++r) {
      for (Index m = 0; m < M; ++m) {
        const double s = score[r * M + m], ratio = v_.clip == 0 ? 0.0 : s / v_.clip;
        const double weight = !is_own(r, m) ? double(alpha[r]) * E::phi(s, double(ref[r]))
                              : v_.own      ? double(own[r * shape_.L + (col0 + m) % shape_.L])
                                            : -own_each * E::df(s);
        const double w = weight * (1 - ratio * ratio);
        for (Index k = 0; k < K; ++k) {
          const double c_k = double(c[m * ldc() + k]), g_k = double(g[r * K + k]);
          h[r * K + k] += w * c_k, h_size[r * K + k] += std::fabs(weight * c_k);
          d[m * K + k] += w * g_k, d_size[m * K + k] += std::fabs(weight * g_k);
        }
      }
      double size;
      const double want = psi_sum<E>(r, &size);
      if (!keep) near("sum of psi, scored again", r, sums[r], want, 1 + size);
    }
    for (Index i = 0; i < R * K; ++i) near("gradient of h", i, got_h[i], h[i], h_size[i]);
    for (Index i = 0; i < M * K; ++i) near("gradient of c", i, double(grad_c[i]), d[i], d_size[i]);
    if (own_each > 0) near_positives();
    Accumulate<T> nothing{keep ? keep->get() : nullptr,
                          panel_ref.get(),
                          pointwise ? nullptr : ref.get(),
                          alpha.get(),
                          own.get(),
                          positives.get(),
                          nullptr,
                          nullptr,
                          false,
                          false,
                          T(0),
                          nullptr};
    if (keep) (isa_.*Functions<T>::accumulate)(p, nothing, 0, std::min(M, width), 0, fresh_scratch());
  }

  void near(const char* what, Index at, double got, double want, double size) {
    if (!(std::fabs(got - want) <= 100 * double(std::numeric_limits<T>::epsilon()) * size)) fail(what, at, got, want);
  }

  void fail(const char* what, Index at, double got, double want) {
    if (++failures > 20) return;
    std::printf("%s %s %s, %d rows %d columns K=%d clip=%g keep=%d threads=%d: %s [%d] is %.9g, not %.9g\n", isa_.name,
                sizeof(T) == 4 ? "float" : "double", name_, int(R), int(M), int(K), v_.clip, v_.keep, int(v_.threads),
                what, int(at), got, want);
  }

  const Isa& isa_;
  const char* name_;
  const Shape& shape_;
  const Variant& v_;
  Index R, M, K, row0, col0, width, shares, panels, ld;
  Array<T> g, c, by_row, by_channel, positives, alpha, ref, own;
  Index bytes_of_number;
  Bytes stored, scratch;
  Array<double> score;
};

bool runs_here([[maybe_unused]] const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return true;
}

}  // namespace

int main() {
  const char* estimators[] = {"infonce", "dv", "jsd", "gan", "kl", "rkl", "h2", "x2", "w1"};
  for (const Isa* isa : {dimkern::isa_generic(), dimkern::isa_avx2(), dimkern::isa_avx512()}) {
    if (!isa) continue;
    if (!runs_here(isa->name)) {
      std::printf("%s: built, not supported by this processor\n", isa->name);
      continue;
    }
    int checks = 0;
    for (const Shape& shape : kShapes) {
      for (const Variant& variant : kVariants) {
        // all estimators on the small shapes, one of each family on the large ones
        for (const char* name : estimators) {
          const bool large = shape.row_images * shape.P * shape.col_images * shape.L * shape.K > 200'000;
          if (large && std::strcmp(name, "infonce") != 0 && std::strcmp(name, "jsd") != 0) continue;
          Check<float>(*isa, name, shape, variant).run();
          Check<double>(*isa, name, shape, variant).run();
          checks += 2;
        }
      }
    }
    std::printf("%s: %d checks\n", isa->name, checks);
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
