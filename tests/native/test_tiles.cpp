// Tiles of every instruction set against naive sums in double: weigh, pack and accumulate of each estimator, kept or
// scored again, on ragged blocks, shares of several threads by hand; of bfloat16 numbers with the weights rounded to
// it. Every array is its own exactly-sized heap block and starts as NaN, so that a sanitizer sees an overrun and a
// comparison sees a read of what nobody wrote.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "amx_emulator.h"
#include "dimkern/estimators.h"
#include "isas.h"
#include "tiles.h"

namespace {

using dimkern::Accumulate;
using dimkern::BFloat16;
using dimkern::Family;
using dimkern::Isa;
using dimkern::Kernels;
using dimkern::Number;
using dimkern::Pairs;
using dimkern::Source;
using dimkern::Weigh;

using Index = std::int64_t;

constexpr double kInf = std::numeric_limits<double>::infinity();
int failures = 0;

// The value of 16 bits with that many of mantissa.
double half_value(std::uint16_t bits, int mantissa) {
  const int exponent = (bits & 0x7fff) >> mantissa, bias = (1 << (14 - mantissa)) - 1;
  const int fraction = (bits & ((1 << mantissa) - 1)) | (exponent ? 1 << mantissa : 0);
  const double value = std::ldexp(fraction, std::max(exponent, 1) - bias - mantissa);
  return bits & 0x8000 ? -value : value;
}

// What the products read, and its value.
template <class X>
struct Product {
  static X nan() { return std::numeric_limits<X>::quiet_NaN(); }
  static X from(double x) { return static_cast<X>(x); }
  static double value(X x) { return x; }
};
template <>
struct Product<BFloat16> {
  static BFloat16 nan() { return {0x7fc0}; }
  static double value(BFloat16 x) { return half_value(x.bits, 7); }
  static BFloat16 from(double x) {  // the nearest, of two the even one
    if (x == 0) return {0};
    int exponent;
    std::frexp(x, &exponent);
    const float nearest = static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(x, 8 - exponent)), exponent - 8));
    std::uint32_t bits;
    std::memcpy(&bits, &nearest, sizeof bits);
    return {static_cast<std::uint16_t>(bits >> 16)};
  }
};
template <class X>
double rounded(double x) {
  return Product<X>::value(Product<X>::from(x));
}

template <class T>
struct Array {
  Index size;
  std::unique_ptr<T[]> data;
  explicit Array(Index n) : size(n), data(new T[n]) {
    for (Index i = 0; i < n; ++i) data[i] = Product<T>::nan();
  }
  T& operator[](Index i) { return data[i]; }
  const T& operator[](Index i) const { return data[i]; }
  T* get() const { return data.get(); }
};

// Bytes that end where a page begins that can be neither read nor written: a sanitizer does not see masked vectors.
class Bytes {
 public:
  explicit Bytes(Index n) : size(n), whole_(static_cast<std::size_t>((n + kPage - 1) / kPage * kPage)) {
    void* pages = mmap(nullptr, whole_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    pages_ = static_cast<char*>(pages);
    if (mprotect(pages_ + whole_, kPage, PROT_NONE)) std::abort();
    std::memset(pages_, 0xff, whole_);
  }
  Bytes(const Bytes&) = delete;
  ~Bytes() { munmap(pages_, whole_ + kPage); }
  char* get() const { return pages_ + whole_ - size; }
  const Index size;

 private:
  static constexpr Index kPage = 1 << 16;  // a multiple of every system's
  std::size_t whole_;
  char* pages_;
};

struct Shape {
  Index images, P, L, K, row_first, row_images, col_first, col_images, pad;  // pad: ldc - K
};

const Shape kShapes[] = {
    {2, 1, 1, 1, 0, 2, 0, 2, 0},       {2, 1, 1, 3, 1, 1, 0, 1, 0},       // one row, one pair, no own-image pair
    {3, 2, 5, 7, 1, 1, 1, 1, 2},                                          // own-image pairs alone: empty rows
    {5, 3, 49, 33, 0, 5, 0, 5, 0},     {27, 19, 9, 5, 0, 27, 0, 27, 3},   // 513 rows, 243 columns
    {22, 25, 11, 70, 0, 22, 0, 22, 3},                                    // own rows of image 20 straddle row 512
    {9, 60, 54, 17, 0, 9, 2, 7, 1},    {30, 21, 17, 4, 2, 27, 0, 29, 0},  // off-diagonal blocks, 567 rows
    {2, 600, 3, 2, 0, 2, 1, 1, 0},     {481, 1, 1, 2, 0, 481, 0, 481, 0},
    {11, 3, 30, 64, 0, 11, 0, 11, 2},                                     // whole steps of AMX: features in place
    {9, 2, 32, 31, 0, 9, 0, 9, 0},     {17, 1, 15, 34, 0, 17, 0, 17, 0},  // around 16 locations by 16 or 32 channels,
    {6, 1, 47, 47, 0, 6, 0, 6, 0},     {18, 1, 16, 65, 0, 18, 0, 18, 0},  // which are transposed at a time
};

struct Variant {
  double scale, clip;
  bool keep, add, own, rounded;  // rounded: the gradient of c in bfloat16, where scores are float
  Index threads;
  enum { matrix, by_channel, by_location } layout;  // the features: a matrix in place, or staged from (images, K, L)
  Number number;                                    // or from (images, L, K), of any type
};

const Variant kVariants[] = {
    {1, 0, true, false, true, false, 1, Variant::matrix, {}},
    {1, 0, true, false, true, true, 2, Variant::matrix, {}},
    {-0.7, 0, true, true, false, false, 3, Variant::by_channel, Number::float32},
    {1.3, 2.5, true, false, true, false, 2, Variant::by_location, Number::bfloat16},
    {0.6, 0, false, false, true, false, 1, Variant::by_channel, Number::float16},
    {1, 0, false, false, false, false, 2, Variant::by_location, Number::float64},
    {1.1, 2.5, false, true, true, false, 3, Variant::matrix, {}},
    {0, 2.5, false, false, false, true, 1, Variant::by_channel, Number::bfloat16},
};

template <class T, class X>
class Check {
 public:
  Check(const Isa& isa, const char* estimator, const Shape& shape, const Variant& variant)
      : isa_(isa),
        use_(isa.*dimkern::kernels_of<T, X>),
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
        by_row(ld * terms(K)),
        by_channel(up(K) * terms(R)),
        positives(shape.images * shape.P * shape.L),
        alpha(R),
        ref(R),
        own(R * shape.L),
        number(bf16 ? Number::bfloat16 : variant.number),
        bytes_of_number(number == Number::float64   ? 8
                        : number == Number::float32 ? 4
                                                    : 2),
        staged(variant.layout != Variant::matrix || K % use_.inner),
        stored(staged ? shape.col_images * image() * bytes_of_number : 0),
        scratch(use_.scratch + (staged ? isa.panel * terms(K) * Index(sizeof(X)) : 0)),
        score(R * M) {
    std::mt19937 engine(static_cast<unsigned>(R * 31 + M * 7 + K));
    std::normal_distribution<double> normal;
    for (Index i = 0; i < g.size; ++i) g[i] = Product<X>::from(1.3 * normal(engine) / std::sqrt(double(K)));
    for (Index m = 0; m < M; ++m) {
      for (Index k = 0; k < K; ++k) put(m, k, normal(engine), engine);
    }
    for (Index i = 0; i < alpha.size; ++i) alpha[i] = static_cast<T>(normal(engine));
    for (Index i = 0; i < own.size; ++i) own[i] = static_cast<T>(normal(engine));
    for (Index r = 0; r < R; ++r) {
      for (Index m = 0; m < M; ++m) {
        double s = 0;
        for (Index k = 0; k < K; ++k) s += g_at(r, k) * c_at(m, k);
        s *= v_.scale;
        score[r * M + m] = v_.clip == 0 ? s : v_.clip * std::tanh(s / v_.clip);
      }
    }
  }

  void run() {
    run_estimator();
    if (emulated_tiles_live()) fail("AMX's registers are live still", 0, 1, 0);
  }

 private:
  void run_estimator() {
    const Source source{stored.get(), number, image(), location(), channel()};
    Pairs<T, X> p{name_,
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
                  T(v_.scale),
                  by_row.get(),
                  by_channel.get(),
                  staged ? &source : nullptr};
    use_.pack(p, by_row.get(), by_channel.get());
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

  static constexpr bool bf16 = std::is_same_v<X, BFloat16>;
  bool rounds() const { return v_.rounded && std::is_same_v<T, float>; }

  Index up(Index n) const { return (n + use_.lanes - 1) / use_.lanes * use_.lanes; }
  Index terms(Index n) const { return (n + use_.inner - 1) / use_.inner * use_.inner; }
  double g_at(Index r, Index k) const { return Product<X>::value(g[r * K + k]); }
  double c_at(Index m, Index k) const { return Product<X>::value(c[m * ldc() + k]); }
  Index ldc() const { return K + shape_.pad; }

  // Strides of the source, in numbers.
  Index location() const { return v_.layout == Variant::by_channel ? 1 : K + shape_.pad; }
  Index channel() const { return v_.layout == Variant::by_channel ? shape_.L : 1; }
  Index image() const { return v_.layout == Variant::by_channel ? K * shape_.L : (K + shape_.pad) * shape_.L; }

  // Stores a feature, and in c what it reads as.
  void put(Index m, Index k, double x, std::mt19937& engine) {
    X& value = c[m * ldc() + k];
    value = Product<X>::from(x);
    if (!staged) return;
    char* to = stored.get() + (m / shape_.L * image() + m % shape_.L * location() + k * channel()) * bytes_of_number;
    const auto store = [&](auto stored_number) { std::memcpy(to, &stored_number, sizeof(stored_number)); };
    if (number == Number::float64) {
      store(Product<X>::value(value));
    } else if (number == Number::float32) {
      const float single = static_cast<float>(Product<X>::value(value));
      store(single);
      value = Product<X>::from(single);
    } else {
      // of all sizes to 2 and, of float16, subnormals; of both signs
      const int mantissa = number == Number::float16 ? 10 : 7;
      const int bias = (1 << (14 - mantissa)) - 1, exponents = number == Number::float16 ? bias + 1 : 12;
      const unsigned exponent = bias - static_cast<unsigned>(engine() % unsigned(exponents));
      const auto bits =
          static_cast<std::uint16_t>((engine() & 0x8000) | exponent << mantissa | (engine() & ((1u << mantissa) - 1)));
      store(bits);
      value = Product<X>::from(half_value(bits, mantissa));
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
  void weigh(const Pairs<T, X>& p, Array<T>* keep, Array<T>& panel_ref) {
    std::vector<double> total(R, 0.0), log_total(R, -kInf), size(R);
    for (Index i = 0; i < shares; ++i) {
      Array<T> share_ref(R);
      Array<double> share_sum(R);
      const Weigh<T> w{keep ? keep->get() : nullptr, keep ? panel_ref.get() : nullptr, share_ref.get(), share_sum.get(),
                       positives.get()};
      use_.weigh(p, w, i * width, std::min(M, (i + 1) * width), i * panels, fresh_scratch());
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
  void accumulate(const Pairs<T, X>& p, const Array<T>* keep, const Array<T>& panel_ref) {
    constexpr bool pointwise = E::family == Family::pointwise;
    const double own_each = keep || v_.own ? 0.0 : 0.01;
    if (own_each > 0) std::fill_n(positives.get(), positives.size, T(NAN));
    Array<T> grad_c(M * K), grad_h(R * K);
    Array<BFloat16> rounded_c(rounds() ? M * K : 0);
    const Index strips = R > use_.rows ? up(K) / use_.lanes : 1;
    std::vector<double> h(R * K, 0.0), h_size(R * K, 1e-3), d(M * K, 0.0), d_size(M * K, 1e-3), sums(R, 0.0);
    std::vector<double> h_most(R * K, 0.0), d_most(M * K, 0.0);
    if (v_.add) {
      for (Index i = 0; i < M * K; ++i) d[i] = grad_c[i] = T(0.25), d_size[i] = 1;
      for (Index i = 0; i < R * K; ++i) h[i] = grad_h[i] = T(-0.5), h_size[i] = 1;
    }
    std::vector<double> got_h(R * K, 0.0);
    for (Index i = 0; i < shares; ++i) {
      Array<T> part(R * K);
      Array<double> share_sum(R);
      Array<T> panel_c(rounds() ? strips * isa_.panel * use_.lanes : 0);
      Accumulate<T> a{keep ? keep->get() : nullptr,
                      keep ? panel_ref.get() : nullptr,
                      pointwise ? nullptr : ref.get(),
                      alpha.get(),
                      v_.own ? own.get() : nullptr,
                      positives.get(),
                      i == 0 ? grad_h.get() : part.get(),
                      rounds() ? nullptr : grad_c.get(),
                      i == 0 && v_.add,
                      v_.add,
                      T(own_each),
                      share_sum.get(),
                      rounds() ? rounded_c.get() : nullptr,
                      panel_c.get()};
      use_.accumulate(p, a, i * width, std::min(M, (i + 1) * width), i * panels, fresh_scratch());
      for (Index k = 0; k < R * K; ++k) got_h[k] += double(a.grad_h[k]);
      for (Index r = 0; r < R; ++r) sums[r] += share_sum[r];
    }
    for (Index r = 0; r < R; ++r) {
      for (Index m = 0; m < M; ++m) {
        const double s = score[r * M + m], ratio = v_.clip == 0 ? 0.0 : s / v_.clip;
        const double weight = !is_own(r, m) ? double(alpha[r]) * E::phi(s, double(ref[r]))
                              : v_.own      ? double(own[r * shape_.L + (col0 + m) % shape_.L])
                                            : -own_each * E::df(s);
        const double w = rounded<X>(weight * (1 - ratio * ratio));
        for (Index k = 0; k < K; ++k) {
          const double c_k = c_at(m, k), g_k = rounded<X>(v_.scale * g_at(r, k));
          const double by_h = std::fabs(weight * c_k), by_c = std::fabs(weight * g_k);
          h[r * K + k] += w * c_k, h_size[r * K + k] += by_h;
          d[m * K + k] += w * g_k, d_size[m * K + k] += by_c;
          h_most[r * K + k] = std::fmax(h_most[r * K + k], by_h);
          d_most[m * K + k] = std::fmax(d_most[m * K + k], by_c);
        }
      }
      double size;
      const double want = psi_sum<E>(r, &size);
      if (!keep) near("sum of psi, scored again", r, sums[r], want, 1 + size);
    }
    // of weights near the middle of two neighbours in bfloat16, a few round otherwise here than there
    const double few = bf16 ? 0x1p-6 : 0.0;
    for (Index i = 0; i < R * K; ++i) near("gradient of h", i, got_h[i], h[i], h_size[i], few * h_most[i]);
    for (Index i = 0; i < M * K; ++i) {
      const double got = rounds() ? Product<BFloat16>::value(rounded_c[i]) : double(grad_c[i]);
      near("gradient of c", i, got, d[i], d_size[i], few * d_most[i] + (rounds() ? 0x1p-8 * std::fabs(d[i]) : 0));
    }
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
    if (keep) use_.accumulate(p, nothing, 0, std::min(M, width), 0, fresh_scratch());
  }

  void near(const char* what, Index at, double got, double want, double size, double beside = 0) {
    const double allowed = 100 * double(std::numeric_limits<T>::epsilon()) * size + beside;
    if (!(std::fabs(got - want) <= allowed)) fail(what, at, got, want);
  }

  void fail(const char* what, Index at, double got, double want) {
    if (++failures > 20) return;
    std::printf("%s %s %s, %d rows %d columns K=%d scale=%g clip=%g keep=%d threads=%d: %s [%d] is %.9g, not %.9g\n",
                isa_.name,
                bf16             ? "bfloat16"
                : sizeof(T) == 4 ? "float"
                                 : "double",
                name_, int(R), int(M), int(K), v_.scale, v_.clip, v_.keep, int(v_.threads), what, int(at), got, want);
  }

  const Isa& isa_;
  const Kernels<T, X>& use_;
  const char* name_;
  const Shape& shape_;
  const Variant& v_;
  Index R, M, K, row0, col0, width, shares, panels, ld;
  Array<X> g, c, by_row, by_channel;
  Array<T> positives, alpha, ref, own;
  Number number;
  Index bytes_of_number;
  bool staged;
  Bytes stored, scratch;
  Array<double> score;
};

bool runs(const char* name) {
  for (const auto& candidate : dimkern::candidates()) {
    if (std::strcmp(candidate.name, name) == 0) return candidate.isa && !candidate.why_not;
  }
  return false;
}

}  // namespace

int main() {
  const char* estimators[] = {"infonce", "dv", "jsd", "gan", "kl", "rkl", "h2", "x2", "w1"};
  const bool emulates = runs("avx512_bf16");
  for (const auto& [isa_name, isa, why_not] : dimkern::candidates()) {
    const bool emulated = isa && why_not && emulates && std::strcmp(isa_name, "amx_bf16") == 0;
    if (!isa || (why_not && !emulated)) {
      std::printf("%s: %s\n", isa_name, isa ? why_not : "not built");
      continue;
    }
    if (emulated) emulate_amx();
    int checks = 0;
    for (const Shape& shape : kShapes) {
      for (const Variant& variant : kVariants) {
        // all estimators on the small shapes, one of each family on the large ones
        for (const char* name : estimators) {
          const bool large = shape.row_images * shape.P * shape.col_images * shape.L * shape.K > 200'000;
          if (large && std::strcmp(name, "infonce") != 0 && std::strcmp(name, "jsd") != 0) continue;
          Check<float, float>(*isa, name, shape, variant).run();
          Check<double, double>(*isa, name, shape, variant).run();
          if (isa->bf16.pack) Check<float, BFloat16>(*isa, name, shape, variant).run();
          checks += isa->bf16.pack ? 3 : 2;
        }
      }
    }
    std::printf("%s: %d checks", isa->name, checks);
    emulated ? std::printf(", %lld products emulated\n", static_cast<long long>(emulated_products())) : std::puts("");
  }
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
