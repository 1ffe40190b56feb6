// The CUDA library: ops on tensors over the kernels of this folder.
//
// Against LibTorch's stable ABI (2.10 and later), without Python.h. Built against any torch, a CPU one too: all it
// needs of a CUDA build, the current stream, is looked up when an op first runs.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "finish.cuh"
#include "weigh.cuh"

namespace {

using namespace dimkern;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(DK_HOST)
struct Current {
  explicit Current(const Tensor&) {}
  gpu::Stream stream;
};
void check_launch(const char*) {}
std::string why_not() { return ""; }
#define DK_KEY CPU
#else
using CurrentStream = int (*)(int, void**);

CurrentStream current_stream() {
  static const auto found = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return torch_cuda ? reinterpret_cast<CurrentStream>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"))
                      : nullptr;
  }();
  return found;
}

// A tensor's device for as long as this lives, and its current stream.
struct Current {
  torch::stable::accelerator::DeviceGuard device;
  gpu::Stream stream = nullptr;
  explicit Current(const Tensor& x) : device(x.get_device_index()) {
    void* found = nullptr;
    STD_TORCH_CHECK(current_stream() && current_stream()(x.get_device_index(), &found) == 0, "no current CUDA stream");
    stream = static_cast<gpu::Stream>(found);
  }
};

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "dimkern_cuda::", kernel, ": ", cudaGetErrorString(error));
}

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

// Why these ops cannot run here; "" if they can.
std::string why_not() {
  if (!current_stream()) return "this build of torch has no CUDA";
  int built = 0, driver = 0;
  cudaRuntimeGetVersion(&built);
  cudaDriverGetVersion(&driver);
  if (driver / 1000 < built / 1000)
    return "the CUDA library was built with CUDA " + version(built) + ", the driver has " + version(driver);
  return "";
}
#define DK_KEY CUDA
#endif

template <class T = float>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

void* data(const std::optional<Tensor>& x) { return x.has_value() ? x->data_ptr() : nullptr; }

Tensor floats(const Tensor& like, std::vector<std::int64_t> shape) {
  return torch::stable::new_empty(like, shape, ScalarType::Float);
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Blocks of an elementwise kernel: eight elements a thread, where that fills the chip.
std::int64_t grid_of(std::int64_t elements) {
  return std::max<std::int64_t>(1, std::min<std::int64_t>(ceil_div(elements, 8 * gpu::kThreads), 2048));
}

// Calls visit(T{}) for a dtype.
template <class Visit>
void dispatch(ScalarType dtype, const Visit& visit) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return visit(gpu::Bf16{});
    case ScalarType::Half:
      return visit(gpu::F16{});
    case ScalarType::Float:
      return visit(gpu::Tf32{});
    default:
      STD_TORCH_CHECK(false, "tensors are to be bfloat16, float16 or float32");
  }
}

// Calls visit(T{}, Estimator{}) for the dtype of x and an estimator's name.
template <class Visit>
void dispatch(const Tensor& x, const std::string& estimator, const Visit& visit) {
  const bool known =
      with_estimator(estimator.c_str(), [&](auto e) { dispatch(x.scalar_type(), [&](auto t) { visit(t, e); }); });
  STD_TORCH_CHECK(known, "no estimator is called ", estimator);
}

// Rows that cp.async can read: 16 bytes at a time.
void check_rows(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 2 && x.stride(1) == 1, name, " is to be a matrix of contiguous rows");
  const auto unaligned = (x.size(1) | x.stride(0)) * static_cast<std::int64_t>(x.element_size()) |
                         static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(x.data_ptr()));
  STD_TORCH_CHECK(unaligned % 16 == 0, name, "'s rows are to begin and end at multiples of 16 bytes");
}

void check_floats(const char* name, const Tensor& x, std::int64_t count) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == count, name, " is to be ",
                  count, " contiguous floats");
}

void check_keep(const Tensor& keep, const Tensor& g, std::int64_t M) {
  check_rows("keep", keep);
  STD_TORCH_CHECK(keep.scalar_type() == g.scalar_type() && keep.size(0) == g.size(0) && keep.size(1) >= M &&
                      keep.stride(0) == keep.size(1),
                  "keep is to have g's dtype and rows, and as many columns as c has rows");
}

// Statistics of every panel of 64 columns: (S, panels) references and sums; positives, and weights where kept.
std::tuple<Tensor, Tensor> weigh(const Tensor& g, const Tensor& c, const Tensor& scale, const std::string& estimator,
                                 double clip, std::int64_t P, std::int64_t L, std::int64_t row0, std::int64_t col0,
                                 std::int64_t images, const Tensor& positives, const std::optional<Tensor>& keep) {
  check_rows("g", g);
  check_rows("c", c);
  const std::int64_t R = g.size(0), M = c.size(0);
  STD_TORCH_CHECK(g.scalar_type() == c.scalar_type() && g.size(1) == c.size(1), "g and c disagree on dtype or K");
  STD_TORCH_CHECK(R > 0 && M > 0 && P > 0 && L > 0 && L < (1 << 30), "there are no pairs, or too many a row");
  check_floats("scale", scale, 1);
  check_floats("positives", positives, R * L);
  if (keep) check_keep(*keep, g, M);
  const std::int64_t row_tiles = ceil_div(R, gpu::kRows), panels = ceil_div(M, gpu::kCols);
  std::tuple<Tensor, Tensor> result;
  dispatch(g, estimator, [&](auto t, auto e) {
    using T = decltype(t);
    using E = decltype(e);
    const std::int64_t S = E::family == Family::global_lse ? row_tiles : R;
    result = {floats(g, {S, panels}), floats(g, {S, panels})};
    const gpu::Weigh w{g.data_ptr(),
                       c.data_ptr(),
                       data(scale),
                       data(keep),
                       data(std::get<0>(result)),
                       data(std::get<1>(result)),
                       data(positives),
                       g.stride(0),
                       c.stride(0),
                       keep ? keep->size(1) : 0,
                       R,
                       M,
                       P,
                       L,
                       row0,
                       col0,
                       static_cast<int>(g.size(1) * sizeof(T)),
                       static_cast<float>(clip),
                       static_cast<float>(images - 1)};
    gpu::launch(&gpu::weigh<T, E>, row_tiles * panels, gpu::kThreads, gpu::kShared, Current(g).stream, w);
  });
  check_launch("weigh");
  return result;
}

// (losses, negatives, alpha), (R,) each; keep becomes what alpha multiplies, weighted_g alpha * scale * g.
std::tuple<Tensor, Tensor, Tensor> finish(const Tensor& ref, const Tensor& sum, const Tensor& positives,
                                          const Tensor& g, const Tensor& scale, const std::string& estimator,
                                          double clip, double kappa, std::int64_t P, std::int64_t L,
                                          const std::optional<Tensor>& keep, const std::optional<Tensor>& weighted_g) {
  check_rows("g", g);
  const std::int64_t R = g.size(0), K = g.size(1), M = R / P * L;
  check_floats("scale", scale, 1);
  check_floats("positives", positives, R * L);
  if (keep) check_keep(*keep, g, M);
  STD_TORCH_CHECK(!weighted_g || (weighted_g->is_contiguous() && weighted_g->numel() == R * K &&
                                  weighted_g->scalar_type() == g.scalar_type()),
                  "weighted_g is to be like g, contiguous");
  const Tensor losses = floats(g, {R}), negatives = floats(g, {R}), alpha = floats(g, {R});
  dispatch(g, estimator, [&](auto t, auto e) {
    using T = decltype(t);
    using E = decltype(e);
    const std::int64_t S = E::family == Family::global_lse ? ceil_div(R, gpu::kRows) : R;
    check_floats("ref", ref, S * ceil_div(M, gpu::kCols));
    check_floats("sum", sum, S * ceil_div(M, gpu::kCols));
    const gpu::Finish f{data(ref),
                        data(sum),
                        data(positives),
                        g.data_ptr(),
                        data(scale),
                        data(keep),
                        data(weighted_g),
                        data(alpha),
                        data(losses),
                        data(negatives),
                        keep ? keep->size(1) : 0,
                        g.stride(0),
                        R,
                        M,
                        P,
                        L,
                        K,
                        static_cast<float>(clip),
                        static_cast<float>(kappa)};
    gpu::launch(&gpu::finish<T, E>, R, gpu::kThreads, gpu::kWarps * 4, Current(g).stream, f);
  });
  check_launch("finish");
  return {losses, negatives, alpha};
}

// The mean loss; the products in grad_h (R, K) and grad_c (M, K) times alpha and, of grad_c, scale.
Tensor settle(const Tensor& losses, const Tensor& alpha, const Tensor& scale, const std::optional<Tensor>& grad_h,
              const std::optional<Tensor>& grad_c) {
  const std::int64_t R = losses.numel();
  STD_TORCH_CHECK(R > 0, "there are no rows");
  check_floats("losses", losses, R);
  check_floats("alpha", alpha, R);
  check_floats("scale", scale, 1);
  for (const auto* grad : {&grad_h, &grad_c})
    if (*grad) check_floats("a gradient", **grad, (*grad)->numel());
  const std::int64_t h = grad_h ? grad_h->numel() : 0, c = grad_c ? grad_c->numel() : 0;
  const Tensor loss = floats(losses, {});
  const gpu::Settle settle{data(alpha),
                           data(losses),
                           data(scale),
                           static_cast<float*>(data(grad_h)),
                           static_cast<float*>(data(grad_c)),
                           data(loss),
                           R,
                           h / R,
                           c};
  gpu::launch(&gpu::settle<>, grid_of(std::max(h, c)), gpu::kThreads, gpu::kWarps * 4, Current(losses).stream, settle);
  check_launch("settle");
  return loss;
}

// Gradients by c and g from the saved ones by c and scale * g; an empty one gives an empty one.
std::tuple<Tensor, Tensor> chain(const Tensor& grad_c, const Tensor& grad_h, const Tensor& upstream,
                                 const Tensor& scale, ScalarType dtype) {
  check_floats("grad_c", grad_c, grad_c.numel());
  check_floats("grad_h", grad_h, grad_h.numel());
  check_floats("upstream", upstream, 1);
  check_floats("scale", scale, 1);
  const Tensor d_c = torch::stable::new_empty(grad_c, grad_c.sizes(), dtype);
  const Tensor d_g = torch::stable::new_empty(grad_h, grad_h.sizes(), dtype);
  const gpu::Chain c{data(grad_c),   data(grad_h),   data(upstream), data(scale),
                     d_c.data_ptr(), d_g.data_ptr(), grad_c.numel(), grad_h.numel()};
  const auto go = [&](auto t) {
    gpu::launch(&gpu::chain<decltype(t)>, grid_of(std::max(c.size_c, c.size_g)), gpu::kThreads, 16,
                Current(grad_c).stream, c);
  };
  dispatch(dtype, go);
  check_launch("chain");
  return {d_c, d_g};
}

}  // namespace

#if !defined(DK_SCHEMAS_LOADED)  // by another build of this file
STABLE_TORCH_LIBRARY(dimkern_cuda, m) {
  m.def(
      "weigh(Tensor g, Tensor c, Tensor scale, str estimator, float clip, int P, int L, int row0, int col0, int images,"
      " Tensor(a!) positives, Tensor(b!)? keep) -> (Tensor ref, Tensor sum)");
  m.def(
      "finish(Tensor ref, Tensor sum, Tensor positives, Tensor g, Tensor scale, str estimator, float clip, float kappa,"
      " int P, int L, Tensor(a!)? keep, Tensor(b!)? weighted_g) -> (Tensor losses, Tensor negatives, Tensor alpha)");
  m.def("settle(Tensor losses, Tensor alpha, Tensor scale, Tensor(a!)? grad_h, Tensor(b!)? grad_c) -> Tensor loss");
  m.def("chain(Tensor grad_c, Tensor grad_h, Tensor upstream, Tensor scale, ScalarType dtype) -> (Tensor, Tensor)");
  m.def("why_not() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dimkern_cuda, CompositeExplicitAutograd, m) { m.impl("why_not", TORCH_BOX(&why_not)); }
#endif

STABLE_TORCH_LIBRARY_IMPL(dimkern_cuda, DK_KEY, m) {
  m.impl("weigh", TORCH_BOX(&weigh));
  m.impl("finish", TORCH_BOX(&finish));
  m.impl("settle", TORCH_BOX(&settle));
  m.impl("chain", TORCH_BOX(&chain));
}
