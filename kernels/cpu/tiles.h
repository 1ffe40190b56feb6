// What the ops (ops.cpp) ask of the code that is compiled once for each instruction set (tiles_*.cpp).
//
// Letters as in MATHS.md: R rows (summaries), M columns (locations), K channels. A tile of weights is
// held transposed, E[column][row], so that a vector holds neighbouring rows: row statistics are then
// sums of vectors, the reference and alpha are vector loads, and all three products read it in place.
#pragma once

#include <cstdint>

#include "dimkern/math.h"

namespace dimkern {

enum class Number { float64, float32, bfloat16, float16 };

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// Local features (images, L, K) with any strides, of any type: panels of columns are staged from them.
struct Source {
  const void* data;
  Number number;
  std::int64_t image, location, channel;  // strides, in numbers
};

// A block of rows against a block of columns: T is what scores and sums are made in, X what the products read. Where X
// is BFloat16 a product multiplies pairs of neighbouring inner indices, and packed strips hold such pairs.
template <class T, class X = T>
struct Pairs {
  const char* estimator;
  std::int64_t R, M, K;
  const X* g;  // (R, K) summaries
  const X* c;  // (M, K) local features, row stride ldc; unused where there is a source
  std::int64_t ldc;
  std::int64_t row0, col0;  // index of the first row and column in the batch
  std::int64_t P, L;        // summaries and locations of one image: row r and column c are own if r / P == c / L
  T clip;                   // the soft clip's t, or 0
  T scale;                  // of the scores
  const X* g_by_row;        // g packed for the score: strips of `lanes` rows, (K, lanes) each
  const X* g_by_channel;    // scale * g packed for the gradient of c: strips of `lanes` channels, (R, lanes) each
  const Source* source = nullptr;  // where c is no matrix of X
};

// score + map for the statistics of columns [begin, end), kept where `keep` is given.
template <class T>
struct Weigh {
  T* keep;       // (M, padded R) weights relative to the panel's reference, or null
  T* panel_ref;  // (panels, padded R) the reference of each panel of kept weights
  T* ref;        // (R,) this thread's: the largest score, or 0
  double* sum;   // (R,) this thread's sum of psi relative to ref
  T* positives;  // (images, P, L) of the batch: own-image scores are written here
};

// The gradient products of columns [begin, end).
template <class T>
struct Accumulate {
  const T* keep;  // weights of Weigh, or null: score and map again with `ref`
  const T* panel_ref;
  const T* ref;       // (R,) or null for pointwise estimators
  const T* alpha;     // (R,)
  const T* own;       // (images of the rows, P, L) weights of the own-image pairs; null: 0
  T* positives;       // own-image scores: as Weigh wrote them where weights were kept, else written where own_each > 0
  T* grad_h;          // (R, K) this thread's partial sum, or null
  T* grad_c;          // (M, K) or null
  bool add_h, add_c;  // the gradient holds a sum already
  T own_each;         // > 0 and no `own`: an own-image pair weighs -own_each * f'(score), the mean loss's weight
  double* sum;        // (R,) this thread's sum of psi, where the tiles are scored again
  // (M, K) in place of grad_c, where T is float and every row is here: sums of a panel, rounded once.
  BFloat16* rounded_c = nullptr;
  T* panel_c = nullptr;  // those sums, (K / lanes strips, panel, lanes); one strip where R fits a tile
};

// The sizes of a batch: R = N * P rows, L positives and (N - 1) * L negatives each.
struct Batch {
  std::int64_t N, P, L;
  double kappa;
  DK_FN std::int64_t rows() const { return N * P; }
  DK_FN double negatives() const { return double(N - 1) * double(L); }
  DK_FN double each() const { return 1.0 / (double(rows()) * double(L)); }  // weight of a positive in the mean loss
};

// The code for one instruction set. begin and end are columns of the block; panel0 is the index that the panel at
// `begin` has in panel_ref.
template <class T, class X = T>
struct Kernels {
  std::int64_t lanes;    // width of a packed strip; padded R is a multiple of it
  std::int64_t inner;    // the inner size of a packed strip is padded to a multiple of it, and so are staged channels
  std::int64_t rows;     // of a tile
  std::int64_t scratch;  // bytes that one thread needs
  void (*pack)(const Pairs<T, X>&, X* by_row, X* by_channel) = nullptr;
  void (*weigh)(const Pairs<T, X>&, const Weigh<T>&, std::int64_t begin, std::int64_t end, std::int64_t panel0,
                void* scratch) = nullptr;
  void (*accumulate)(const Pairs<T, X>&, const Accumulate<T>&, std::int64_t begin, std::int64_t end,
                     std::int64_t panel0, void* scratch) = nullptr;
  void (*row_losses)(const char* estimator, const Batch&, std::int64_t begin, std::int64_t end, const T* positives,
                     const double* negatives, double* losses) = nullptr;
  void (*row_weights)(const char* estimator, const Batch&, std::int64_t begin, std::int64_t end, const T* ref,
                      const double* sum, const T* positives, const double* negatives, T* alpha, T* own) = nullptr;
};

struct Isa {
  const char* name;
  std::int64_t panel;  // columns of a panel
  Kernels<double> f64;
  Kernels<float> f32;
  Kernels<float, BFloat16> bf16;  // without functions where there is no instruction for it
};

template <class T, class X>
constexpr auto kernels_of = &Isa::f64;
template <>
inline constexpr auto kernels_of<float, float> = &Isa::f32;
template <>
inline constexpr auto kernels_of<float, BFloat16> = &Isa::bf16;

// Null where it was not built.
const Isa* isa_generic();
const Isa* isa_avx2();
const Isa* isa_avx512();
const Isa* isa_avx512_bf16();
const Isa* isa_amx_bf16();

}  // namespace dimkern
