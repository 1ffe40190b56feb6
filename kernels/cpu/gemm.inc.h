// The matrix products of a tile, for one instruction set; included by tiles.inc.h inside its namespace.
//
// One register-blocked kernel serves all three products. Its left operand is read in place, by rows or by
// columns; its right one comes packed in strips of `lanes` columns that are contiguous along the inner index.

template <class T>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(DK_VECTOR_BYTES), aligned(4), may_alias));
  static constexpr int width = DK_VECTOR_BYTES / 4;
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(DK_VECTOR_BYTES), aligned(8), may_alias));
  static constexpr int width = DK_VECTOR_BYTES / 8;
};

constexpr int kVectors = 2;  // vectors of a strip: kVectors * DK_ROWS accumulators live in registers
template <class T>
constexpr int kLanes = kVectors * Vector<T>::width;

// What is multiplied at once: one number, or a pair of neighbouring inner indices that one instruction sums.
template <class T, class X>
struct Term {
  using V = typename Vector<T>::type;
  static constexpr int inner = 1;
  static DK_FN T left(const X* a) { return *a; }
  static DK_FN V right(const X* strip) { return *reinterpret_cast<const V*>(strip); }
  static DK_FN V add(V sum, T a, V b) { return sum + a * b; }
};
#if defined(DK_BF16)
template <>
struct Term<float, BFloat16> {
  using V = Vector<float>::type;
  static constexpr int inner = 2;
  static DK_FN __m512bh left(const BFloat16* a) {
    std::int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
  }
  static DK_FN __m512bh right(const BFloat16* strip) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(strip)); }
  static DK_FN V add(V sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
};
#endif
template <class T, class X>
constexpr std::int64_t kTerm = Term<T, X>::inner;
#if defined(DK_AMX)
template <class T, class X>
constexpr std::int64_t kInner = std::is_same_v<X, BFloat16> ? 32 : kTerm<T, X>;
#else
template <class T, class X>
constexpr std::int64_t kInner = kTerm<T, X>;  // the inner size of a product is padded to a multiple
#endif

// out[i][j] (+)= sum_p a(i, p) * strip[p][j] for i < rows and j within the first `vectors` of the strip; `inner` counts
// terms, lda numbers. By columns, the numbers of one term lie side by side.
template <class T, class X, int rows, int vectors, bool a_by_columns>
DK_FN void micro(std::int64_t inner, const X* a, std::int64_t lda, const X* strip, T* out, std::int64_t ldo, bool add) {
  using V = typename Vector<T>::type;
  using Multiply = Term<T, X>;
  constexpr int width = Vector<T>::width, n = Multiply::inner;
  V sum[rows][vectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[i][v] = V{};
  }
  for (std::int64_t p = 0; p < inner; ++p) {
    decltype(Multiply::right(strip)) b[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) b[v] = Multiply::right(strip + (p * kLanes<T> + v * width) * n);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const auto x = Multiply::left(a_by_columns ? a + p * lda + i * n : a + i * lda + p * n);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[i][v] = Multiply::add(sum[i][v], x, b[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      V* to = reinterpret_cast<V*>(out + i * ldo + v * width);
      *to = add ? *to + sum[i][v] : sum[i][v];
    }
  }
}

// The same for any number of rows and for a strip of which only `columns` are real: a whole vector takes half the time.
template <bool a_by_columns, class T, class X>
void product(std::int64_t rows, std::int64_t columns, std::int64_t inner, const X* a, std::int64_t lda, const X* strip,
             T* out, std::int64_t ldo, bool add) {
  T edge[DK_ROWS * kLanes<T>];
  std::int64_t i = 0;
  const auto step = [&](auto count) {
    constexpr int n = decltype(count)::value;
    for (; i + n <= rows; i += n) {
      const X* from = a + (a_by_columns ? i * kTerm<T, X> : i * lda);
      if (columns == kLanes<T>) {
        micro<T, X, n, kVectors, a_by_columns>(inner, from, lda, strip, out + i * ldo, ldo, add);
        continue;
      }
      if (columns == Vector<T>::width) {
        micro<T, X, n, 1, a_by_columns>(inner, from, lda, strip, out + i * ldo, ldo, add);
        continue;
      }
      micro<T, X, n, kVectors, a_by_columns>(inner, from, lda, strip, edge, kLanes<T>, false);
      for (int k = 0; k < n; ++k) {
        T* to = out + (i + k) * ldo;
        for (std::int64_t j = 0; j < columns; ++j) to[j] = (add ? to[j] : T(0)) + edge[k * kLanes<T> + j];
      }
    }
  };
  step(Count<DK_ROWS>{});
  step(Count<4>{});
  step(Count<2>{});
  step(Count<1>{});
}

#if DK_VECTOR_BYTES == 64
// The choice of two vectors' first 16 numbers of 16 bits that has them side by side.
DK_FN __m512i side_by_side() {
  return _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a, 0x00290009,
                          0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004, 0x00230003, 0x00220002,
                          0x00210001, 0x00200000);
}
#endif

// `term` rows of a matrix, their numbers of one column side by side.
template <int term, std::int64_t lanes, class X>
DK_FN void side_by_side(const X* from, std::int64_t ld, X* __restrict to) {
  for (int j = 0; j < lanes; ++j) {
    for (int k = 0; k < term; ++k) to[j * term + k] = from[k * ld + j];
  }
}
#if defined(DK_BF16)
template <>
DK_FN void side_by_side<2, 32, BFloat16>(const BFloat16* from, std::int64_t ld, BFloat16* __restrict to) {
  const __m512i x = _mm512_loadu_si512(from), y = _mm512_loadu_si512(from + ld);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, side_by_side(), y));
  _mm512_storeu_si512(to + 32,
                      _mm512_permutex2var_epi16(x, _mm512_add_epi16(side_by_side(), _mm512_set1_epi16(16)), y));
}
#endif

// A row-major matrix (rows, columns) as a strip: terms of neighbouring rows, padded with zeros.
template <class T, class X>
DK_FN void pack_strip(const X* from, std::int64_t ld, std::int64_t rows, std::int64_t columns, X* strip) {
  constexpr std::int64_t term = kTerm<T, X>, lanes = kLanes<T>;
  for (std::int64_t i = 0; i < padded(rows, kInner<T, X>); i += term) {
    X* __restrict to = strip + i * lanes;
    if (columns == lanes && i + term <= rows) {
      side_by_side<term, lanes>(from + i * ld, ld, to);
    } else {
      for (int j = 0; j < lanes; ++j) {
        for (int k = 0; k < term; ++k) {
          to[j * term + k] = j < columns && i + k < rows ? from[(i + k) * ld + j] : X{};
        }
      }
    }
  }
}
