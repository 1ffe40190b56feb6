// The CPU library: ops on tensors over the tiles of the best instruction set, threads from torch's own pool.
//
// Against LibTorch's stable ABI (2.10 and later), without Python.h: loaded by torch.ops.load_library. Columns are
// split evenly among the threads, so that the result depends on their number alone.

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "finish.h"
#include "tiles.h"

namespace {

using dimkern::Accumulate;
using dimkern::Isa;
using dimkern::Number;
using dimkern::Pairs;
using dimkern::Weigh;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kWorkWorthAThread = 2e6;  // multiply-adds; waking a thread costs about 10 microseconds

const Isa& isa() {
  static const Isa& chosen = [&]() -> const Isa& {
    const char* wanted = std::getenv("DIMKERN_CPU_ISA");
    const auto may = [&](const char* name) { return !wanted || std::strcmp(wanted, name) == 0; };
#if defined(__x86_64__)
    if (dimkern::isa_avx512() && may("avx512") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      return *dimkern::isa_avx512();
    }
    if (dimkern::isa_avx2() && may("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      return *dimkern::isa_avx2();
    }
#endif
    return *dimkern::isa_generic();
  }();
  return chosen;
}

// The function table of a scalar type.
template <class T>
struct Functions {
  static constexpr bool single = std::is_same_v<T, float>;
  static std::int64_t lanes() { return single ? isa().lanes_f32 : isa().lanes_f64; }
  static std::int64_t scratch() { return single ? isa().scratch_f32 : isa().scratch_f64; }
  static auto pack() {
    if constexpr (single)
      return isa().pack_f32;
    else
      return isa().pack_f64;
  }
  static auto weigh() {
    if constexpr (single)
      return isa().weigh_f32;
    else
      return isa().weigh_f64;
  }
  static auto accumulate() {
    if constexpr (single)
      return isa().accumulate_f32;
    else
      return isa().accumulate_f64;
  }
};

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& x) {
  return x.has_value() ? data<T>(*x) : nullptr;
}

template <class T>
Tensor like(const Tensor& x, std::vector<std::int64_t> shape) {
  return torch::stable::new_empty(x, shape, std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double);
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The columns of one thread's share: whole panels but for the last, the first panel's index known in advance.
struct Share {
  std::int64_t begin, end, panel0;
};

struct Shares {
  std::int64_t columns, count, width;

  Shares(std::int64_t R, std::int64_t M, std::int64_t K) : columns(M) {
    const std::int64_t worth = static_cast<std::int64_t>(double(R) * double(M) * double(K) / kWorkWorthAThread);
    const std::int64_t threads =
        std::max<std::int64_t>(1, std::min<std::int64_t>(torch::stable::get_num_threads(), worth));
    width = ceil_div(M, threads);
    count = ceil_div(M, width);
  }
  std::int64_t panels() const { return ceil_div(width, isa().panel); }
  Share operator[](std::int64_t i) const { return {i * width, std::min(columns, (i + 1) * width), i * panels()}; }

  template <class F>
  void parallel(const F& f) const {
    torch::stable::parallel_for(0, count, 1, [&](std::int64_t first, std::int64_t last) {
      for (std::int64_t i = first; i < last; ++i) f(i, (*this)[i]);
    });
  }
};

// Local features (images, L, K), and how the kernels read them.
template <class T>
struct Columns {
  std::int64_t M, K;
  dimkern::Source source;
  bool matrix;  // read in place

  explicit Columns(const Tensor& c) {
    STD_TORCH_CHECK(c.dim() == 3, "c (images, L, K) expected");
    const std::int64_t images = c.size(0), L = c.size(1);
    M = images * L, K = c.size(2);
    source = {c.data_ptr(), number(c), c.stride(0), c.stride(1), c.stride(2)};
    const bool rows_merge = images == 1 || L == 1 || source.image == L * source.location;
    const bool same = source.number == (std::is_same_v<T, float> ? Number::float32 : Number::float64);
    matrix = same && rows_merge && (K == 1 || source.channel == 1);
  }
  std::int64_t row_stride(std::int64_t L) const { return L == 1 ? source.image : source.location; }
  // Bytes a thread needs beside the tiles' own.
  std::int64_t staging() const { return matrix ? 0 : isa().panel * K * std::int64_t(sizeof(T)); }

 private:
  static Number number(const Tensor& c) {
    switch (c.scalar_type()) {
      case ScalarType::Double:
        return Number::float64;
      case ScalarType::Float:
        return Number::float32;
      case ScalarType::BFloat16:
        return Number::bfloat16;
      default:
        STD_TORCH_CHECK(c.scalar_type() == ScalarType::Half, "a floating dtype expected");
        return Number::float16;
    }
  }
};

template <class T>
Pairs<T> pairs_of(const std::string& estimator, const Tensor& g, const Columns<T>& c, const Tensor& by_row,
                  const std::optional<Tensor>& by_channel, double clip, std::int64_t row0, std::int64_t col0,
                  std::int64_t P, std::int64_t L) {
  STD_TORCH_CHECK(g.dim() == 2 && g.size(1) == c.K && g.is_contiguous(), "contiguous g (R, K) expected");
  return {estimator.c_str(),
          g.size(0),
          c.M,
          c.K,
          data<T>(g),
          static_cast<const T*>(c.source.data),
          c.row_stride(L),
          row0,
          col0,
          P,
          L,
          static_cast<T>(clip),
          data<T>(by_row),
          data<T>(by_channel),
          c.matrix ? nullptr : &c.source};
}

template <class F>
auto by_type(const Tensor& x, F f) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                  "float32 or float64 expected");
  return x.scalar_type() == ScalarType::Float ? f(float{}) : f(double{});
}

std::tuple<Tensor, Tensor> pack(const Tensor& g, bool by_channel) {
  return by_type(g, [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = decltype(type);
    const std::int64_t R = g.size(0), K = g.size(1), lanes = Functions<T>::lanes();
    Tensor rows = like<T>(g, {ceil_div(R, lanes) * lanes * K});
    Tensor channels = like<T>(g, {by_channel ? ceil_div(K, lanes) * lanes * R : 0});
    Pairs<T> p{};
    p.R = R, p.K = K, p.g = data<T>(g);
    Functions<T>::pack()(p, data<T>(rows), by_channel ? data<T>(channels) : nullptr);
    return {rows, channels};
  });
}

// Elements that `weigh` keeps: (weights, panel references).
std::tuple<std::int64_t, std::int64_t> kept_sizes(const Tensor& g, std::int64_t M) {
  const std::int64_t lanes = g.scalar_type() == ScalarType::Float ? isa().lanes_f32 : isa().lanes_f64;
  const std::int64_t ld = ceil_div(g.size(0), lanes) * lanes;
  const Shares shares(g.size(0), M, g.size(1));
  return {M * ld, shares.count * shares.panels() * ld};
}

std::tuple<Tensor, Tensor> weigh(const Tensor& g, const Tensor& c, const Tensor& by_row, std::string estimator,
                                 double clip, std::int64_t row0, std::int64_t col0, std::int64_t P, std::int64_t L,
                                 const Tensor& positives, std::optional<Tensor> keep, std::optional<Tensor> panel_ref) {
  return by_type(g, [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = decltype(type);
    const Columns<T> columns(c);
    const Pairs<T> p = pairs_of<T>(estimator, g, columns, by_row, std::nullopt, clip, row0, col0, P, L);
    const Shares shares(p.R, p.M, p.K);
    Tensor refs = like<T>(g, {shares.count, p.R}), sums = like<double>(g, {shares.count, p.R});
    const std::int64_t bytes = Functions<T>::scratch() + columns.staging();  // of a thread
    Tensor scratch = like<T>(g, {shares.count * bytes / std::int64_t(sizeof(T))});
    T* ref = data<T>(refs);
    double* sum = data<double>(sums);
    shares.parallel([&](std::int64_t i, Share share) {
      const Weigh<T> w{data<T>(keep), data<T>(panel_ref), ref + i * p.R, sum + i * p.R, data<T>(positives)};
      Functions<T>::weigh()(p, w, share.begin, share.end, share.panel0, data<char>(scratch) + i * bytes);
    });
    Tensor ref_all = like<T>(g, {p.R}), sum_all = like<double>(g, {p.R});
    for (std::int64_t r = 0; r < p.R; ++r) {
      T highest = ref[r];
      for (std::int64_t i = 1; i < shares.count; ++i) highest = std::max(highest, ref[i * p.R + r]);
      const T to = std::isfinite(highest) ? highest : T(0);
      double total = 0;
      for (std::int64_t i = 0; i < shares.count; ++i) {
        const T from = ref[i * p.R + r];
        total +=
            sum[i * p.R + r] *
            (std::isinf(from) && from < 0 ? 1.0 : std::exp(double(std::isfinite(from) ? from : T(0)) - double(to)));
      }
      data<T>(ref_all)[r] = to;
      data<double>(sum_all)[r] = total;
    }
    return {ref_all, sum_all};
  });
}

Tensor accumulate(const Tensor& g, const Tensor& c, const Tensor& by_row, const Tensor& by_channel,
                  std::string estimator, double clip, std::int64_t row0, std::int64_t col0, std::int64_t P,
                  std::int64_t L, std::optional<Tensor> keep, std::optional<Tensor> panel_ref,
                  std::optional<Tensor> ref, const Tensor& alpha, std::optional<Tensor> own,
                  std::optional<Tensor> positives, std::optional<Tensor> grad_h, std::optional<Tensor> grad_c,
                  bool add_h, bool add_c, double own_each) {
  return by_type(g, [&](auto type) -> Tensor {
    using T = decltype(type);
    const Columns<T> columns(c);
    const Pairs<T> p = pairs_of<T>(estimator, g, columns, by_row, by_channel, clip, row0, col0, P, L);
    const Shares shares(p.R, p.M, p.K);
    Tensor sums = like<double>(g, {shares.count, p.R});
    const std::int64_t bytes = Functions<T>::scratch() + columns.staging();  // of a thread
    Tensor scratch = like<T>(g, {shares.count * bytes / std::int64_t(sizeof(T))});
    const std::int64_t size = p.R * p.K;
    Tensor partial = like<T>(g, {grad_h.has_value() ? (shares.count - 1) * size : 0});
    T* whole = data<T>(grad_h);
    shares.parallel([&](std::int64_t i, Share share) {
      Accumulate<T> a{data<T>(keep),
                      data<T>(panel_ref),
                      data<T>(ref),
                      data<T>(alpha),
                      data<T>(own),
                      data<T>(positives),
                      whole,
                      data<T>(grad_c),
                      i == 0 && add_h,
                      add_c,
                      static_cast<T>(own_each),
                      data<double>(sums) + i * p.R};
      if (whole && i > 0) a.grad_h = data<T>(partial) + (i - 1) * size;
      Functions<T>::accumulate()(p, a, share.begin, share.end, share.panel0, data<char>(scratch) + i * bytes);
    });
    if (whole && shares.count > 1) {
      torch::stable::parallel_for(0, size, 1 << 14, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = 1; i < shares.count; ++i) {
          const T* from = data<T>(partial) + (i - 1) * size;
          for (std::int64_t k = begin; k < end; ++k) whole[k] += from[k];
        }
      });
    }
    Tensor sum = like<double>(g, {p.R});
    for (std::int64_t r = 0; r < p.R; ++r) {
      double total = 0;
      for (std::int64_t i = 0; i < shares.count; ++i) total += data<double>(sums)[i * p.R + r];
      data<double>(sum)[r] = total;
    }
    return sum;
  });
}

// The whole of a batch in one call: statistics, finish and both gradients of the mean loss. Returns the own-image
// scores (N, P, L) and each row's negative term (N, P).
std::tuple<Tensor, Tensor> mean_loss(const Tensor& g, const Tensor& c, std::string estimator, double clip,
                                     std::int64_t P, std::int64_t L, double kappa, std::optional<Tensor> keep,
                                     std::optional<Tensor> panel_ref, std::optional<Tensor> grad_h,
                                     std::optional<Tensor> grad_c) {
  return by_type(g, [&](auto type) -> std::tuple<Tensor, Tensor> {
    using T = decltype(type);
    const dimkern::Batch batch{g.size(0) / P, P, L, kappa};
    const std::int64_t R = batch.rows();
    const auto [by_row, by_channel] = pack(g, true);
    Tensor positives = like<T>(g, {batch.N, P, L}), negatives = like<double>(g, {batch.N, P});
    Tensor alpha = like<T>(g, {R});
    double* negative = data<double>(negatives);
    const Tensor &rows = by_row, &channels = by_channel;
    const bool known = dimkern::with_estimator(estimator.c_str(), [&](auto row) {
      using E = decltype(row);
      if constexpr (E::family == dimkern::Family::pointwise) {
        std::fill_n(data<T>(alpha), R, T(1.0 / (double(R) * batch.negatives())));
        const Tensor sums =
            accumulate(g, c, rows, channels, estimator, clip, 0, 0, P, L, std::nullopt, std::nullopt, std::nullopt,
                       alpha, std::nullopt, positives, grad_h, grad_c, false, false, batch.each());
        for (std::int64_t r = 0; r < R; ++r) negative[r] = data<double>(sums)[r] / batch.negatives();
      } else {
        const auto [ref, sums] = weigh(g, c, rows, estimator, clip, 0, 0, P, L, positives, keep, panel_ref);
        Tensor own = like<T>(g, {batch.N, P, L});
        dimkern::finish<E>(batch, data<T>(ref), data<double>(sums), data<T>(positives), negative, data<T>(alpha),
                           data<T>(own));
        accumulate(g, c, rows, channels, estimator, clip, 0, 0, P, L, keep, panel_ref, ref, alpha, own, positives,
                   grad_h, grad_c, false, false, 0.0);
      }
    });
    STD_TORCH_CHECK(known, "unknown estimator");
    return {positives, negatives};
  });
}

// Ask for huge pages under a large fresh tensor, whose first touch is mostly page faults otherwise: 8 to 25 % of a
// whole loss from N=64, L=64, K=512 on. A small one shares its pages with others and gains nothing.
void advise(const Tensor& x) {
#if defined(MADV_HUGEPAGE)
  constexpr std::uintptr_t page = 2 << 20, worth = 4 * page;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(x.data_ptr());
  const std::uintptr_t end = begin + x.numel() * (x.scalar_type() == ScalarType::Double ? 8 : 4);
  const std::uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (end - begin >= worth) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// What was built, and what was chosen.
std::string isas() {
  std::string built = "generic";
  if (dimkern::isa_avx2()) built += " avx2";
  if (dimkern::isa_avx512()) built += " avx512";
  return built + "; " + isa().name;
}

}  // namespace

STABLE_TORCH_LIBRARY(dimkern_cpu, m) {
  m.def("pack(Tensor g, bool by_channel) -> (Tensor, Tensor)");
  m.def("kept_sizes(Tensor g, int M) -> (int, int)");
  m.def(
      "weigh(Tensor g, Tensor c, Tensor by_row, str estimator, float clip, int row0, int col0, int P, int L,"
      " Tensor(a!) positives, Tensor(b!)? keep, Tensor(c!)? panel_ref) -> (Tensor, Tensor)");
  m.def(
      "accumulate(Tensor g, Tensor c, Tensor by_row, Tensor by_channel, str estimator, float clip, int row0, int col0,"
      " int P, int L, Tensor? keep, Tensor? panel_ref, Tensor? ref, Tensor alpha, Tensor? own, Tensor? positives,"
      " Tensor(a!)? grad_h, Tensor(b!)? grad_c, bool add_h, bool add_c, float own_each=0.) -> Tensor");
  m.def(
      "mean_loss(Tensor g, Tensor c, str estimator, float clip, int P, int L, float kappa, Tensor(a!)? keep,"
      " Tensor(b!)? panel_ref, Tensor(c!)? grad_h, Tensor(d!)? grad_c) -> (Tensor, Tensor)");
  m.def("advise(Tensor(a!) x) -> ()");
  m.def("isas() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dimkern_cpu, CompositeExplicitAutograd, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("kept_sizes", TORCH_BOX(&kept_sizes));
  m.impl("weigh", TORCH_BOX(&weigh));
  m.impl("accumulate", TORCH_BOX(&accumulate));
  m.impl("mean_loss", TORCH_BOX(&mean_loss));
  m.impl("advise", TORCH_BOX(&advise));
  m.impl("isas", TORCH_BOX(&isas));
}
