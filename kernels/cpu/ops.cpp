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
#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "finish.h"
#include "isas.h"

namespace {

using dimkern::Accumulate;
using dimkern::BFloat16;
using dimkern::Isa;
using dimkern::Number;
using dimkern::Pairs;
using dimkern::Weigh;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kWorkWorthAThread = 2e6;  // multiply-adds; waking a thread costs about 10 microseconds

// The candidate that DIMKERN_CPU_ISA names, or null.
const dimkern::Candidate* asked_for() {
  const char* wanted = std::getenv("DIMKERN_CPU_ISA");
  for (const auto& candidate : dimkern::candidates()) {
    if (wanted && std::strcmp(wanted, candidate.name) == 0) return &candidate;
  }
  return nullptr;
}

bool usable(const dimkern::Candidate& candidate) { return candidate.isa && !candidate.why_not; }

const Isa& isa() {
  static const Isa& chosen = []() -> const Isa& {
    const auto& all = dimkern::candidates();
    const dimkern::Candidate* asked = asked_for();
    return *(asked && usable(*asked) ? *asked : *std::find_if(all.begin(), all.end(), usable)).isa;
  }();
  return chosen;
}

template <class T, class X>
const dimkern::Kernels<T, X>& kernels() {
  return isa().*dimkern::kernels_of<T, X>;
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& x) {
  return x.has_value() ? data<T>(*x) : nullptr;
}

template <class T>
constexpr ScalarType kType = std::is_same_v<T, float>    ? ScalarType::Float
                             : std::is_same_v<T, double> ? ScalarType::Double
                                                         : ScalarType::BFloat16;

// A fresh contiguous tensor. Straight from the allocator: through the dispatcher, where it is found by its name, it
// would take four times as long, and a small batch needs a dozen.
template <class T>
Tensor fresh(std::initializer_list<std::int64_t> shape) {
  static const std::int32_t type = kType<T> == ScalarType::Float    ? aoti_torch_dtype_float32()
                                   : kType<T> == ScalarType::Double ? aoti_torch_dtype_float64()
                                                                    : aoti_torch_dtype_bfloat16();
  std::array<std::int64_t, 3> strides{};
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) strides[i] = stride, stride *= shape.begin()[i];
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.begin(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  Tensor x(made);
  // torch's fill_uninitialized_memory does not reach here: our tests ask for it by the environment
  static const bool poisoned = std::getenv("DIMKERN_POISON");
  if (poisoned) std::memset(x.data_ptr(), 0xff, stride * sizeof(T));  // NaN
  return x;
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

// Local features (images, L, K), and how the kernels read them as numbers of X.
template <class X>
struct Columns {
  std::int64_t M, L, K;
  dimkern::Source source;
  bool matrix;           // read in place
  std::int64_t staging;  // bytes that a thread needs beside the tiles' own

  Columns(const Tensor& c, std::int64_t inner) {
    STD_TORCH_CHECK(c.dim() == 3, "c (images, L, K) expected");
    STD_TORCH_CHECK(c.scalar_type() == ScalarType::BFloat16 || (!std::is_same_v<X, BFloat16>),
                    "c in bfloat16 expected, as g is");
    const std::int64_t images = c.size(0);
    L = c.size(1), M = images * L, K = c.size(2);
    source = {c.data_ptr(), number(c), c.stride(0), c.stride(1), c.stride(2)};
    const bool rows_merge = images == 1 || L == 1 || source.image == L * source.location;
    matrix = c.scalar_type() == kType<X> && rows_merge && (K == 1 || source.channel == 1) && K % inner == 0;
    staging = matrix ? 0 : isa().panel * (ceil_div(K, inner) * inner) * std::int64_t(sizeof(X));
  }
  std::int64_t row_stride() const { return L == 1 ? source.image : source.location; }

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

// R of summaries (images, P, K).
std::int64_t rows_of(const Tensor& g) { return g.size(0) * g.size(1); }

// What is scored, and where it lies in the batch.
template <class T, class X>
Pairs<T, X> pairs_of(const std::string& estimator, const Tensor& g, const Columns<X>& c, const Tensor& by_row,
                     const std::optional<Tensor>& by_channel, double scale, double clip, std::int64_t row0,
                     std::int64_t col0) {
  STD_TORCH_CHECK(g.dim() == 3 && g.size(2) == c.K && g.is_contiguous(), "contiguous g (images, P, K) expected");
  return {estimator.c_str(),
          rows_of(g),
          c.M,
          c.K,
          data<X>(g),
          static_cast<const X*>(c.source.data),
          c.row_stride(),
          row0,
          col0,
          g.size(1),
          c.L,
          static_cast<T>(clip),
          static_cast<T>(scale),
          data<X>(by_row),
          data<X>(by_channel),
          c.matrix ? nullptr : &c.source};
}

// f(T, X) for what scores are made in and what the products read, which is what the summaries come as.
template <class F>
auto by_type(const Tensor& g, F f) {
  if (g.scalar_type() == ScalarType::Double) return f(double{}, double{});
  if (g.scalar_type() == ScalarType::Float) return f(float{}, float{});
  STD_TORCH_CHECK(g.scalar_type() == ScalarType::BFloat16 && isa().bf16.pack,
                  "summaries in float32 or float64 expected, or in bfloat16 where the processor multiplies it");
  return f(float{}, BFloat16{});
}

std::tuple<Tensor, Tensor> pack(const Tensor& g, double scale, bool by_channel) {
  return by_type(g, [&](auto score, auto product) -> std::tuple<Tensor, Tensor> {
    using T = decltype(score);
    using X = decltype(product);
    const auto& use = kernels<T, X>();
    const auto terms = [&](std::int64_t n) { return ceil_div(n, use.inner) * use.inner; };
    const std::int64_t R = rows_of(g), K = g.size(2);
    Tensor rows = fresh<X>({ceil_div(R, use.lanes) * use.lanes * terms(K)});
    Tensor channels = fresh<X>({by_channel ? ceil_div(K, use.lanes) * use.lanes * terms(R) : 0});
    Pairs<T, X> p{};
    p.R = R, p.K = K, p.g = data<X>(g), p.scale = static_cast<T>(scale);
    use.pack(p, data<X>(rows), by_channel ? data<X>(channels) : nullptr);
    return {rows, channels};
  });
}

// Numbers that `weigh` keeps: (weights, panel references).
std::tuple<std::int64_t, std::int64_t> kept_sizes(const Tensor& g, std::int64_t M) {
  return by_type(g, [&](auto score, auto product) -> std::tuple<std::int64_t, std::int64_t> {
    const std::int64_t lanes = kernels<decltype(score), decltype(product)>().lanes;
    const std::int64_t R = rows_of(g), ld = ceil_div(R, lanes) * lanes;
    const Shares shares(R, M, g.size(2));
    return {M * ld, shares.count * shares.panels() * ld};
  });
}

// Ask for huge pages under a large fresh tensor, whose first touch is mostly page faults otherwise: 8 to 25 % of a
// whole loss from N=64, L=64, K=512 on. A small one shares its pages with others and gains nothing.
void advise([[maybe_unused]] const std::optional<Tensor>& x) {
#if defined(MADV_HUGEPAGE)
  if (!x.has_value()) return;
  constexpr std::uintptr_t page = 2 << 20, worth = 4 * page;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(x->data_ptr());
  const std::uintptr_t end = begin + x->numel() * x->element_size();
  const std::uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (end - begin >= worth) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

std::tuple<Tensor, Tensor> weigh(const Tensor& g, const Tensor& c, const Tensor& by_row, std::string estimator,
                                 double scale, double clip, std::int64_t row0, std::int64_t col0,
                                 const Tensor& positives, std::optional<Tensor> keep, std::optional<Tensor> panel_ref) {
  return by_type(g, [&](auto score, auto product) -> std::tuple<Tensor, Tensor> {
    using T = decltype(score);
    using X = decltype(product);
    const auto& use = kernels<T, X>();
    const Columns<X> columns(c, use.inner);
    const Pairs<T, X> p = pairs_of<T>(estimator, g, columns, by_row, std::nullopt, scale, clip, row0, col0);
    const Shares shares(p.R, p.M, p.K);
    std::vector<T> refs(shares.count * p.R);
    std::vector<double> sums(shares.count * p.R);
    const std::int64_t bytes = use.scratch + columns.staging;  // of a thread
    advise(keep);
    Tensor scratch = fresh<T>({shares.count * bytes / std::int64_t(sizeof(T))});
    T* ref = refs.data();
    double* sum = sums.data();
    shares.parallel([&](std::int64_t i, Share share) {
      const Weigh<T> w{data<T>(keep), data<T>(panel_ref), ref + i * p.R, sum + i * p.R, data<T>(positives)};
      use.weigh(p, w, share.begin, share.end, share.panel0, data<char>(scratch) + i * bytes);
    });
    Tensor ref_all = fresh<T>({p.R}), sum_all = fresh<double>({p.R});
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
                  std::string estimator, double scale, double clip, std::int64_t row0, std::int64_t col0,
                  std::optional<Tensor> keep, std::optional<Tensor> panel_ref, std::optional<Tensor> ref,
                  const Tensor& alpha, std::optional<Tensor> own, std::optional<Tensor> positives,
                  std::optional<Tensor> grad_h, std::optional<Tensor> grad_c, bool add_h, bool add_c, double own_each) {
  return by_type(g, [&](auto score, auto product) -> Tensor {
    using T = decltype(score);
    using X = decltype(product);
    const auto& use = kernels<T, X>();
    const Columns<X> columns(c, use.inner);
    const Pairs<T, X> p = pairs_of<T>(estimator, g, columns, by_row, by_channel, scale, clip, row0, col0);
    const Shares shares(p.R, p.M, p.K);
    std::vector<double> sums(shares.count * p.R);
    const std::int64_t bytes = use.scratch + columns.staging;  // of a thread
    if (!add_h) advise(grad_h);
    if (!add_c) advise(grad_c);
    Tensor scratch = fresh<T>({shares.count * bytes / std::int64_t(sizeof(T))});
    const std::int64_t size = p.R * p.K;
    std::optional<Tensor> partial;
    if (grad_h.has_value() && shares.count > 1) partial = fresh<T>({(shares.count - 1) * size});
    const bool rounds = grad_c.has_value() && grad_c->scalar_type() != kType<T>;
    STD_TORCH_CHECK(!rounds || (std::is_same_v<T, float> && grad_c->scalar_type() == ScalarType::BFloat16 && !add_c),
                    "a gradient of c in the scores' dtype expected, or all of it in bfloat16");
    const std::int64_t summed =
        rounds ? isa().panel * (p.R > use.rows ? ceil_div(p.K, use.lanes) * use.lanes : use.lanes) : 0;
    Tensor panels = fresh<T>({shares.count * summed});
    T* whole = data<T>(grad_h);
    shares.parallel([&](std::int64_t i, Share share) {
      Accumulate<T> a{data<T>(keep),
                      data<T>(panel_ref),
                      data<T>(ref),
                      data<T>(alpha),
                      data<T>(own),
                      data<T>(positives),
                      whole,
                      rounds ? nullptr : data<T>(grad_c),
                      i == 0 && add_h,
                      add_c,
                      static_cast<T>(own_each),
                      sums.data() + i * p.R,
                      rounds ? data<BFloat16>(grad_c) : nullptr,
                      data<T>(panels) + i * summed};
      if (whole && i > 0) a.grad_h = data<T>(partial) + (i - 1) * size;
      use.accumulate(p, a, share.begin, share.end, share.panel0, data<char>(scratch) + i * bytes);
    });
    if (whole && shares.count > 1) {
      torch::stable::parallel_for(0, size, 1 << 14, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = 1; i < shares.count; ++i) {
          const T* from = data<T>(partial) + (i - 1) * size;
          for (std::int64_t k = begin; k < end; ++k) whole[k] += from[k];
        }
      });
    }
    Tensor sum = fresh<double>({p.R});
    for (std::int64_t r = 0; r < p.R; ++r) {
      double total = 0;
      for (std::int64_t i = 0; i < shares.count; ++i) total += sums[i * p.R + r];
      data<double>(sum)[r] = total;
    }
    return sum;
  });
}

constexpr std::int64_t kPositivesWorthAThread = 4096;

// The whole of a batch in one call: statistics, finish and the gradients of the mean loss for which there is room.
// Returns the loss, the own-image scores (N, P, L) and each row's negative term (N, P).
std::tuple<Tensor, Tensor, Tensor> mean_loss(const Tensor& g, const Tensor& c, std::string estimator, double scale,
                                             double clip, double kappa, std::optional<Tensor> grad_h,
                                             std::optional<Tensor> grad_c) {
  return by_type(g, [&](auto score, auto product) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(score);
    const auto& use = kernels<T, decltype(product)>();
    const char* name = estimator.c_str();
    const dimkern::Batch batch{g.size(0), g.size(1), c.size(1), kappa};
    const std::int64_t R = batch.rows();
    const bool differentiated = grad_h.has_value() || grad_c.has_value();
    const auto [by_row, by_channel] = pack(g, scale, grad_c.has_value());
    const Tensor &rows = by_row, &channels = by_channel;
    Tensor positives = fresh<T>({batch.N, batch.P, batch.L}), negatives = fresh<T>({batch.N, batch.P}),
           loss = fresh<T>({});
    std::vector<double> negative(R), losses(R);
    const auto for_rows = [&](const auto& f) {
      torch::stable::parallel_for(0, R, std::max<std::int64_t>(1, kPositivesWorthAThread / batch.L), f);
    };
    const bool known = dimkern::with_estimator(name, [&](auto row) {
      using E = decltype(row);
      if constexpr (E::family == dimkern::Family::pointwise) {
        Tensor sums;
        if (differentiated) {
          Tensor alpha = fresh<T>({R});
          std::fill_n(data<T>(alpha), R, T(1.0 / (double(R) * batch.negatives())));
          sums = accumulate(g, c, rows, channels, estimator, scale, clip, 0, 0, std::nullopt, std::nullopt,
                            std::nullopt, alpha, std::nullopt, positives, grad_h, grad_c, false, false, batch.each());
        } else {
          sums = std::get<1>(weigh(g, c, rows, estimator, scale, clip, 0, 0, positives, std::nullopt, std::nullopt));
        }
        for (std::int64_t r = 0; r < R; ++r) negative[r] = data<double>(sums)[r] / batch.negatives();
      } else {
        std::optional<Tensor> keep, panel_ref;
        if (differentiated) {
          const auto [kept, panels] = kept_sizes(g, batch.N * batch.L);
          keep = fresh<T>({kept}), panel_ref = fresh<T>({panels});
        }
        const auto [ref, sums] = weigh(g, c, rows, estimator, scale, clip, 0, 0, positives, keep, panel_ref);
        dimkern::log_sums<E>(batch, data<T>(ref), data<double>(sums), negative.data());
        if (differentiated) {
          Tensor alpha = fresh<T>({R}), own = fresh<T>({batch.N, batch.P, batch.L});
          const T* from = data<T>(ref);
          const double* sum = data<double>(sums);
          for_rows([&](std::int64_t begin, std::int64_t end) {
            use.row_weights(name, batch, begin, end, from, sum, data<T>(positives), negative.data(), data<T>(alpha),
                            data<T>(own));
          });
          accumulate(g, c, rows, channels, estimator, scale, clip, 0, 0, keep, panel_ref, ref, alpha, own, positives,
                     grad_h, grad_c, false, false, 0.0);
        }
      }
      for_rows([&](std::int64_t begin, std::int64_t end) {
        use.row_losses(name, batch, begin, end, data<T>(positives), negative.data(), losses.data());
      });
    });
    STD_TORCH_CHECK(known, "unknown estimator");
    std::copy(negative.begin(), negative.end(), data<T>(negatives));
    *data<T>(loss) = static_cast<T>(std::accumulate(losses.begin(), losses.end(), 0.0));
    return {loss, positives, negatives};
  });
}

// What was built, what runs here and what was chosen, and why: "name: what became of it", one a line, the fastest
// first.
std::string isas() {
  const char* wanted = std::getenv("DIMKERN_CPU_ISA");
  const dimkern::Candidate* asked = asked_for();
  std::string lines;
  for (const auto& candidate : dimkern::candidates()) {
    std::string fate = !candidate.isa      ? "not built, the compiler does not know it"
                       : candidate.why_not ? std::string("built; ") + candidate.why_not
                                           : "built, and runs here";
    if (candidate.isa == &isa())
      fate = asked == &candidate ? "chosen by DIMKERN_CPU_ISA" : "chosen, the fastest that runs here";
    lines += candidate.name + (": " + fate) + "\n";
  }
  if (wanted && *wanted && !(asked && usable(*asked)))
    lines += std::string("DIMKERN_CPU_ISA: ") + wanted + " is none that runs here\n";
  return lines;
}

// Channels in bfloat16 that are multiplied at a time, as they are: rows of a multiple are read in place. 0: no product.
std::int64_t bf16_inner() { return isa().bf16.pack ? isa().bf16.inner : 0; }

}  // namespace

STABLE_TORCH_LIBRARY(dimkern_cpu, m) {
  m.def("pack(Tensor g, float scale, bool by_channel) -> (Tensor, Tensor)");
  m.def("kept_sizes(Tensor g, int M) -> (int, int)");
  m.def(
      "weigh(Tensor g, Tensor c, Tensor by_row, str estimator, float scale, float clip, int row0, int col0,"
      " Tensor(a!) positives, Tensor(b!)? keep, Tensor(c!)? panel_ref) -> (Tensor, Tensor)");
  m.def(
      "accumulate(Tensor g, Tensor c, Tensor by_row, Tensor by_channel, str estimator, float scale, float clip,"
      " int row0, int col0, Tensor? keep, Tensor? panel_ref, Tensor? ref, Tensor alpha, Tensor? own,"
      " Tensor? positives, Tensor(a!)? grad_h, Tensor(b!)? grad_c, bool add_h, bool add_c, float own_each=0.)"
      " -> Tensor");
  m.def(
      "mean_loss(Tensor g, Tensor c, str estimator, float scale, float clip, float kappa,"
      " Tensor(a!)? grad_h, Tensor(b!)? grad_c) -> (Tensor, Tensor, Tensor)");
  m.def("isas() -> str");
  m.def("bf16_inner() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dimkern_cpu, CompositeExplicitAutograd, m) {
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("kept_sizes", TORCH_BOX(&kept_sizes));
  m.impl("weigh", TORCH_BOX(&weigh));
  m.impl("accumulate", TORCH_BOX(&accumulate));
  m.impl("mean_loss", TORCH_BOX(&mean_loss));
  m.impl("isas", TORCH_BOX(&isas));
  m.impl("bf16_inner", TORCH_BOX(&bf16_inner));
}
