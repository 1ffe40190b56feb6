// Tiles for one instruction set: score -> map -> accumulate while the tile is in cache.
//
// Included by tiles_*.cpp, each with its own DK_ISA (the namespace), DK_VECTOR_BYTES and DK_ROWS, and compiled
// with its own flags. Everything here is in that namespace: a function shared between differently compiled
// files would be merged by the linker into whichever it likes.

#include <cmath>
#include <cstdint>
#include <type_traits>

#if DK_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

#include "dimkern/estimators.h"
#include "tiles.h"

namespace dimkern {
namespace DK_ISA {

template <int n>
struct Count {
  static constexpr int value = n;
};

inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t padded(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }

// What a product needs of the thread beside memory.
template <class T, class X>
struct Registers {};

#include "gemm.inc.h"
#if defined(DK_AMX)
#include "gemm_amx.inc.h"
#endif

#include "finish.inc.h"
#include "stage.inc.h"

#if !defined(DK_PANEL)
#define DK_PANEL (20 * DK_ROWS)
#endif
constexpr std::int64_t kPanel = DK_PANEL;  // columns; with kRowBlock a tile fills about half of a core's L2
template <class T, class X>
constexpr std::int64_t kRowBlock = std::is_same_v<T, X> ? 512 : 256;  // a tile of T and two of X
struct Pointwise {};
struct LogSumExp {};
template <bool pointwise>
using FamilyOf = std::conditional_t<pointwise, Pointwise, LogSumExp>;

constexpr int kSumGroup = 16;  // float sums longer than this are made in two levels

template <class T, class X>
struct Scratch {
  static constexpr std::int64_t size = kPanel * kRowBlock<T, X>, sums = kRowBlock<T, X>, narrow = !std::is_same_v<T, X>;
  T *tile, *ref, *gain, *group, *total;
  X *strip, *by_row, *by_column, *staging;
  explicit Scratch(void* memory) {
    tile = static_cast<T*>(memory);
    ref = tile + size;
    gain = ref + sums;
    group = gain + sums;
    total = group + sums;
    strip = reinterpret_cast<X*>(total + sums);
    by_row = strip + kPanel * kLanes<T>;  // the tile's weights as the products read them; the tile itself where X is T
    by_column = by_row + narrow * size;
    staging = by_column + narrow * size;  // (kPanel, K) where there is a source
  }
  static constexpr std::int64_t bytes =
      (size + 4 * sums) * sizeof(T) + (kPanel * kLanes<T> + 2 * narrow * size) * sizeof(X);
};

// Columns [col, col + cols) of the block against its rows [row, row + rows).
struct Tile {
  std::int64_t col, cols, row, rows, lanes;  // lanes: rows padded to whole vectors and steps of a product
};

template <class T, class X>
Tile tile_at(const Pairs<T, X>& p, std::int64_t col, std::int64_t end, std::int64_t row) {
  const std::int64_t rows = least(kRowBlock<T, X>, p.R - row);
  constexpr std::int64_t width = Vector<T>::width, inner = kInner<T, X>;
  return {col, least(kPanel, end - col), row, rows, padded(rows, width > inner ? width : inner)};
}

// The rows of a tile that are own-image partners of its column c: `count` from `first` on, some perhaps outside.
struct Own {
  int first, count;
  std::int64_t index;  // of the first one's pair in (image, P, L)
  DK_FN bool has(int r) const { return static_cast<unsigned>(r - first) < static_cast<unsigned>(count); }
};

template <class T, class X>
DK_FN Own own_rows(const Pairs<T, X>& p, const Tile& t, std::int64_t c) {
  const std::int64_t column = p.col0 + t.col + c, image = column / p.L;
  const std::int64_t first = image * p.P - p.row0 - t.row;
  if (first >= t.rows || first + p.P <= 0) return {0, 0, 0};
  return {static_cast<int>(first), static_cast<int>(p.P), image * p.P * p.L + column % p.L};
}

// Calls visit(entry of the tile, index into (image, P, L)) for every own-image pair of column c.
template <class T, class X, class Visit>
DK_FN void each_own(const Pairs<T, X>& p, const Tile& t, std::int64_t c, T* column, Visit visit) {
  const Own own = own_rows(p, t, c);
  for (int q = own.first < 0 ? -own.first : 0; q < own.count && own.first + q < t.rows; ++q) {
    visit(column[own.first + q], own.index + q * p.L);
  }
}

// tanh(x) = x / (1 + x^2 / (3 + x^2 / (5 + ...))) where 1 - 2 / (e^2x + 1) would cancel.
template <class T>
DK_FN T tanh(T x) {
  constexpr int depth = sizeof(T) == 4 ? 5 : 9;
  const T x2 = x * x;
  T numerator = T(1), denominator = T(2 * depth + 1);
  for (int k = depth - 1; k >= 0; --k) {
    const T next = denominator * T(2 * k + 1) + x2 * numerator;
    numerator = denominator;
    denominator = next;
  }
  const T far = T(1) - T(2) / (exp(T(2) * x) + T(1));
  return x2 < T(0.5) ? x * numerator / denominator : far;
}

// Derivative of the soft clip at a score that is clipped already; 1 without a clip.
template <class T>
DK_FN T slope(T clipped, T clip) {
  const T ratio = clip == T(0) ? T(0) : clipped / clip;
  return T(1) - ratio * ratio;
}

template <class T, class X>
void score(const Pairs<T, X>& p, const Tile& t, const Panel<X>& panel, T* tile) {
  const std::int64_t K = padded_channels(p);
  for (std::int64_t r = 0; r < t.rows; r += kLanes<T>) {
    product<false>(t.cols, least(kLanes<T>, t.lanes - r), K / kTerm<T, X>, panel.c, panel.ld,
                   p.g_by_row + (t.row + r) * K, tile + r, kRowBlock<T, X>, false);
  }
  if (!std::is_same_v<T, X> && p.scale != T(1)) {
    for (std::int64_t c = 0; c < t.cols; ++c) {
      for (std::int64_t r = 0; r < t.lanes; ++r) tile[c * kRowBlock<T, X> + r] *= p.scale;
    }
  }
  if (p.clip == T(0)) return;
  for (std::int64_t c = 0; c < t.cols; ++c) {
    T* x = tile + c * kRowBlock<T, X>;
    for (std::int64_t r = 0; r < t.lanes; ++r) x[r] = p.clip * tanh(x[r] / p.clip);
  }
}

// Any finite reference serves an empty (-inf) or overflown (inf) row; inf - inf would make NaN of its scores.
template <class T>
DK_FN T finite(T ref) {
  return ref - ref == T(0) ? ref : T(0);
}

// The largest score of each row, raw in `raw` and finite in `ref`; own-image pairs hold -inf by now.
template <class X, class T>
void reference(const Tile& t, const T* tile, T* __restrict raw, T* __restrict ref) {
  for (std::int64_t r = 0; r < t.lanes; ++r) raw[r] = tile[r];
  for (std::int64_t c = 1; c < t.cols; ++c) {
    const T* x = tile + c * kRowBlock<T, X>;
    for (std::int64_t r = 0; r < t.lanes; ++r) raw[r] = x[r] > raw[r] ? x[r] : raw[r];
  }
  for (std::int64_t r = 0; r < t.lanes; ++r) ref[r] = finite(raw[r]);
}

// s.total[r] = the sum over the tile's columns of what column(c, sum) adds to sum[r], in two levels of few terms.
template <class T, class X, class Column>
DK_FN void sum_columns(const Tile& t, const Scratch<T, X>& s, Column column) {
  for (std::int64_t r = 0; r < t.lanes; ++r) s.total[r] = T(0);
  for (std::int64_t start = 0; start < t.cols; start += kSumGroup) {
    for (std::int64_t r = 0; r < t.lanes; ++r) s.group[r] = T(0);
    for (std::int64_t c = start; c < least(start + kSumGroup, t.cols); ++c) column(c, s.group);
    for (std::int64_t r = 0; r < t.lanes; ++r) s.total[r] += s.group[r];
  }
}

// Pointwise estimators: sums of psi.
template <class E, class T, class X>
void weigh_tile(const Pairs<T, X>& p, const Weigh<T>& w, const Tile& t, const Scratch<T, X>& s, std::int64_t,
                Pointwise) {
  sum_columns(t, s, [&](std::int64_t c, T* __restrict sum) {
    const T* __restrict x = s.tile + c * kRowBlock<T, X>;
    const Own own = own_rows(p, t, c);
    for (int r = 0; r < t.lanes; ++r) sum[r] += own.has(r) ? T(0) : E::psi(x[r], T(0));
  });
  for (std::int64_t r = 0; r < t.rows; ++r) w.sum[t.row + r] += double(s.total[r]);
}

// Log-sum-exp estimators: weights relative to the panel's largest score, and their sums.
template <class E, class T, class X>
void weigh_tile(const Pairs<T, X>& p, const Weigh<T>& w, const Tile& t, const Scratch<T, X>& s, std::int64_t panel,
                LogSumExp) {
  static_assert(E::shares_map, "the kept weight is also what is summed");
  const std::int64_t ld = padded(p.R, kLanes<T>);
  for (std::int64_t c = 0; c < t.cols; ++c) {
    each_own(p, t, c, s.tile + c * kRowBlock<T, X>, [](T& x, std::int64_t) { x = T(-__builtin_inf()); });
  }
  T* raw = w.keep ? w.panel_ref + panel * ld + t.row : s.gain;
  reference<X>(t, s.tile, raw, s.ref);
  sum_columns(t, s, [&](std::int64_t c, T* __restrict sum) {
    T* __restrict x = s.tile + c * kRowBlock<T, X>;
    const T* __restrict ref = s.ref;
    if (!w.keep) {
      for (int r = 0; r < t.lanes; ++r) sum[r] += E::psi(x[r], ref[r]);
      return;
    }
    T* __restrict kept = w.keep + (t.col + c) * ld + t.row;
    if (p.clip == T(0)) {
      for (int r = 0; r < t.lanes; ++r) sum[r] += kept[r] = E::phi(x[r], ref[r]);
      return;
    }
    for (int r = 0; r < t.lanes; ++r) {
      const T e = E::phi(x[r], ref[r]);
      sum[r] += e;
      kept[r] = e == T(0) ? T(0) : e * slope(x[r], p.clip);  // the slope of an own pair's -inf is -inf
    }
  });
  for (std::int64_t r = 0; r < t.rows; ++r) {
    const T before = w.ref[t.row + r], now = raw[r] > before ? raw[r] : before;
    const double to = double(finite(now));
    // a panel of own pairs alone adds nothing: its 0 * e^(0 - to) would be 0 * inf
    const double added = s.total[r] == T(0) ? 0.0 : double(s.total[r]) * exp(double(s.ref[r]) - to);
    w.sum[t.row + r] = w.sum[t.row + r] * exp(double(before) - to) + added;
    w.ref[t.row + r] = now;
  }
}

template <class T, class X>
void weigh(const Pairs<T, X>& p, const Weigh<T>& w, std::int64_t begin, std::int64_t end, std::int64_t panel,
           void* memory) {
  const Scratch<T, X> s(memory);
  [[maybe_unused]] const Registers<T, X> registers{};
  for (std::int64_t r = 0; r < p.R; ++r) w.ref[r] = T(-__builtin_inf()), w.sum[r] = 0;
  for (std::int64_t col = begin; col < end; col += kPanel, ++panel) {
    const Panel<X> columns = panel_at(p, col, least(kPanel, end - col), s.staging);
    for (std::int64_t row = 0; row < p.R; row += kRowBlock<T, X>) {
      const Tile t = tile_at(p, col, end, row);
      score(p, t, columns, s.tile);
      for (std::int64_t c = 0; c < t.cols; ++c) {
        each_own(p, t, c, s.tile + c * kRowBlock<T, X>, [&](T& x, std::int64_t own) { w.positives[own] = x; });
      }
      with_estimator(p.estimator, [&](auto estimator) {
        using E = decltype(estimator);
        weigh_tile<E>(p, w, t, s, panel, FamilyOf<E::family == Family::pointwise>{});
      });
    }
  }
}

// The final weights of a tile whose unscaled ones were kept.
template <class T, class X>
void take_kept(const Pairs<T, X>& p, const Accumulate<T>& a, const Tile& t, const Scratch<T, X>& s,
               std::int64_t panel) {
  const std::int64_t ld = padded(p.R, kLanes<T>);
  const T* panel_ref = a.panel_ref + panel * ld + t.row;
  for (std::int64_t r = 0; r < t.lanes; ++r) {
    s.gain[r] = r < t.rows ? a.alpha[t.row + r] * exp(panel_ref[r] - a.ref[t.row + r]) : T(0);
  }
  for (std::int64_t c = 0; c < t.cols; ++c) {
    const T* __restrict kept = a.keep + (t.col + c) * ld + t.row;
    const T* __restrict gain = s.gain;
    T* __restrict x = s.tile + c * kRowBlock<T, X>;
    for (std::int64_t r = 0; r < t.lanes; ++r) x[r] = kept[r] * gain[r];
    each_own(p, t, c, x, [&](T& entry, std::int64_t own) {
      entry = a.own ? a.own[own - p.row0 * p.L] * slope(a.positives[own], p.clip) : T(0);
    });
  }
}

// The final weights of a tile, scored again or for the first time, with alpha known; sums of psi on the way.
template <class E, class T, class X>
void map_known(const Pairs<T, X>& p, const Accumulate<T>& a, const Tile& t, const Scratch<T, X>& s) {
  for (std::int64_t r = 0; r < t.lanes; ++r) {
    s.gain[r] = r < t.rows ? a.alpha[t.row + r] : T(0);
    s.ref[r] = a.ref && r < t.rows ? a.ref[t.row + r] : T(0);
  }
  sum_columns(t, s, [&](std::int64_t c, T* __restrict sum) {
    T* __restrict x = s.tile + c * kRowBlock<T, X>;
    const T* __restrict ref = s.ref;
    const T* __restrict gain = s.gain;
    const Own own = own_rows(p, t, c);
    if (p.clip == T(0)) {
      for (int r = 0; r < t.lanes; ++r) {
        const T score = x[r];
        sum[r] += own.has(r) ? T(0) : E::psi(score, ref[r]);
        x[r] = own.has(r) ? score : E::phi(score, ref[r]) * gain[r];
      }
    } else {
      for (int r = 0; r < t.lanes; ++r) {
        const T score = x[r];
        sum[r] += own.has(r) ? T(0) : E::psi(score, ref[r]);
        x[r] = own.has(r) ? score : E::phi(score, ref[r]) * gain[r] * slope(score, p.clip);
      }
    }
    each_own(p, t, c, x, [&](T& entry, std::int64_t pair) {
      const T weight = a.own ? a.own[pair - p.row0 * p.L] : -a.own_each * E::df(entry);
      if (a.own_each > T(0)) a.positives[pair] = entry;
      entry = weight * slope(entry, p.clip);
    });
  });
  for (std::int64_t r = 0; r < t.rows; ++r) a.sum[t.row + r] += double(s.total[r]);
}

// The weights as the products read them: terms along the rows, and along the columns.
template <class T, class X>
struct Weights {
  const X *by_row, *by_column;
  std::int64_t ld_by_row, ld_by_column;
};

template <class T>
Weights<T, T> weights(const Tile&, const Scratch<T, T>& s) {
  return {s.tile, s.tile, kRowBlock<T, T>, kRowBlock<T, T>};
}

#if defined(DK_BF16)
// Columns c and c + 1 in bfloat16 for 16 rows from r on, by row; returns them as pairs. It has float32's exponents, so
// a small weight is rounded but never lost.
DK_FN __m512i rounded_pairs(const Tile& t, const Scratch<float, BFloat16>& s, std::int64_t c, std::int64_t r) {
  constexpr std::int64_t ld = kRowBlock<float, BFloat16>;
  const __m512i interleaved = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  if (c >= t.cols) return _mm512_setzero_si512();
  const bool both = c + 1 < t.cols;
  const __m512 x = _mm512_loadu_ps(s.tile + c * ld + r);
  const __m512 y = both ? _mm512_loadu_ps(s.tile + (c + 1) * ld + r) : _mm512_setzero_ps();
  const __m256bh x_rounded = _mm512_cvtneps_pbh(x), y_rounded = _mm512_cvtneps_pbh(y);
  __builtin_memcpy(s.by_row + c * ld + r, &x_rounded, sizeof x_rounded);
  if (both) __builtin_memcpy(s.by_row + (c + 1) * ld + r, &y_rounded, sizeof y_rounded);
  return _mm512_permutexvar_epi16(interleaved, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(y, x)));
}

#if defined(DK_AMX)
// AMX reads a left operand by rows: here the rows of a tile, whose columns are the inner index, padded with zeros.
inline Weights<float, BFloat16> weights(const Tile& t, const Scratch<float, BFloat16>& s) {
  for (std::int64_t c = 0; c < t.cols; c += kInner<float, BFloat16>) {
    for (std::int64_t r = 0; r < t.lanes; r += 16) {
      __m512i pairs[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) pairs[i] = rounded_pairs(t, s, c + 2 * i, r);
      transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(s.by_column + (r + i) * kPanel + c, pairs[i]);
    }
  }
  return {s.by_row, s.by_column, kRowBlock<float, BFloat16>, kPanel};
}
#else
inline Weights<float, BFloat16> weights(const Tile& t, const Scratch<float, BFloat16>& s) {
  constexpr std::int64_t ld = kRowBlock<float, BFloat16>;
  for (std::int64_t c = 0; c < t.cols; c += 2) {
    for (std::int64_t r = 0; r < t.lanes; r += 16) {
      _mm512_storeu_si512(s.by_column + c * ld + 2 * r, rounded_pairs(t, s, c, r));
    }
  }
  return {s.by_row, s.by_column, ld, 2 * ld};
}
#endif
#endif

// A strip (rows, lanes) of float sums as `columns` columns of a matrix of bfloat16 numbers.
inline void round_strip(std::int64_t rows, std::int64_t columns, const float* __restrict from, BFloat16* __restrict to,
                        std::int64_t ld) {
  constexpr std::int64_t lanes = kLanes<float>;
  for (std::int64_t i = 0; i < rows; ++i, from += lanes, to += ld) {
    if (columns == lanes) {
#if defined(DK_BF16)
      const auto pairs = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
      _mm512_storeu_si512(to, reinterpret_cast<__m512i>(pairs));
#else
      for (std::int64_t j = 0; j < lanes; ++j) to[j] = rounded(from[j]);
#endif
    } else {
      for (std::int64_t j = 0; j < columns; ++j) to[j] = rounded(from[j]);
    }
  }
}

// The tile's part of the gradient of c.
template <class T, class X>
void accumulate_c(const Pairs<T, X>& p, const Accumulate<T>& a, const Tile& t, const Weights<T, X>& w) {
  constexpr std::int64_t inner = kInner<T, X>, term = kTerm<T, X>, lanes = kLanes<T>;
  for (std::int64_t k = 0; k < p.K; k += lanes) {
    const std::int64_t channels = least(lanes, p.K - k);
    const X* strip = p.g_by_channel + k * padded(p.R, inner) + t.row * lanes;
    const auto multiply = [&](std::int64_t columns, T* out, std::int64_t ld) {
      product<false>(t.cols, columns, padded(t.rows, inner) / term, w.by_row, w.ld_by_row, strip, out, ld,
                     a.add_c || t.row > 0);
    };
    if (!a.rounded_c) {
      multiply(channels, a.grad_c + t.col * p.K + k, p.K);
      continue;
    }
    if constexpr (std::is_same_v<T, float>) {
      float* sums = a.panel_c + (p.R > kRowBlock<T, X> ? k * kPanel : 0);
      multiply(lanes, sums, lanes);
      if (t.row + t.rows == p.R) round_strip(t.cols, channels, sums, a.rounded_c + t.col * p.K + k, p.K);
    }
  }
}

template <class T, class X>
void accumulate(const Pairs<T, X>& p, const Accumulate<T>& a, std::int64_t begin, std::int64_t end, std::int64_t panel,
                void* memory) {
  constexpr std::int64_t inner = kInner<T, X>, term = kTerm<T, X>, lanes = kLanes<T>;
  const Scratch<T, X> s(memory);
  [[maybe_unused]] const Registers<T, X> registers{};
  for (std::int64_t r = 0; a.sum && r < p.R; ++r) a.sum[r] = 0;
  for (std::int64_t col = begin; col < end; col += kPanel, ++panel) {
    const bool reads = !a.keep || a.grad_h;
    const Panel<X> columns = reads ? panel_at(p, col, least(kPanel, end - col), s.staging) : Panel<X>{};
    for (std::int64_t row = 0; row < p.R; row += kRowBlock<T, X>) {
      const Tile t = tile_at(p, col, end, row);
      if (a.keep) {
        take_kept(p, a, t, s, panel);
      } else {
        score(p, t, columns, s.tile);
        with_estimator(p.estimator, [&](auto estimator) { map_known<decltype(estimator)>(p, a, t, s); });
      }
      const Weights<T, X> w = weights(t, s);
      if (a.grad_c || a.rounded_c) accumulate_c(p, a, t, w);
      for (std::int64_t k = 0; a.grad_h && k < p.K; k += lanes) {
        const std::int64_t channels = least(lanes, p.K - k);
        pack_strip<T>(columns.c + k, columns.ld, t.cols, channels, s.strip);
        product<true>(t.rows, channels, padded(t.cols, inner) / term, w.by_column, w.ld_by_column, s.strip,
                      a.grad_h + row * p.K + k, p.K, a.add_h || col > begin);
      }
    }
  }
}

template <class T>
DK_FN T scaled(T x, T scale) {
  return x * scale;
}
DK_FN BFloat16 scaled(BFloat16 x, float scale) { return rounded(widened<float>(x) * scale); }

// For the score bfloat16 numbers are packed as they are, and the scores are scaled: no score is rounded.
template <class T, class X>
void pack(const Pairs<T, X>& p, X* by_row, X* by_channel) {
  constexpr std::int64_t lanes = kLanes<T>, inner = kInner<T, X>, term = kTerm<T, X>;
  const std::int64_t K = padded_channels(p);
  for (std::int64_t row = 0; by_row && row < p.R; row += lanes) {
    for (std::int64_t k = 0; k < K; ++k) {
      X* to = by_row + row * K + k / term * term * lanes + k % term;
      for (std::int64_t r = 0; r < lanes; ++r) {
        const X x = row + r < p.R && k < p.K ? p.g[(row + r) * p.K + k] : X{};
        to[r * term] = std::is_same_v<T, X> ? scaled(x, p.scale) : x;
      }
    }
  }
  for (std::int64_t k = 0; by_channel && k < p.K; k += lanes) {
    X* strip = by_channel + k * padded(p.R, inner);
    pack_strip<T>(p.g + k, p.K, p.R, least(lanes, p.K - k), strip);
    for (std::int64_t i = 0; i < padded(p.R, inner) * lanes; ++i) strip[i] = scaled(strip[i], p.scale);
  }
}

template <class T, class X>
constexpr Kernels<T, X> kernels = {kLanes<T>,   kInner<T, X>,     kRowBlock<T, X>, Scratch<T, X>::bytes, pack<T, X>,
                                   weigh<T, X>, accumulate<T, X>, row_losses<T>,   row_weights<T>};

inline constexpr Isa isa = {
    DK_ISA_NAME,
    kPanel,
    kernels<double, double>,
    kernels<float, float>,
#if defined(DK_BF16)
    kernels<float, BFloat16>,
#else
    {},
#endif
};

}  // namespace DK_ISA
}  // namespace dimkern
