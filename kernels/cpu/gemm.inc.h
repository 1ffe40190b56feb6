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

// out[i][j] (+)= sum_p a(i, p) * strip[p][j] for i < rows, j < lanes.
template <class T, int rows, bool a_by_columns>
DK_FN void micro(std::int64_t inner, const T* a, std::int64_t lda, const T* strip, T* out, std::int64_t ldo, bool add) {
  using V = typename Vector<T>::type;
  constexpr int width = Vector<T>::width;
  V sum[rows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = V{};
  }
  for (std::int64_t p = 0; p < inner; ++p) {
    V b[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) b[v] = *reinterpret_cast<const V*>(strip + p * kLanes<T> + v * width);
#pragma GCC unroll 16
    for (int i = 0; i < rows; ++i) {
      const T x = a_by_columns ? a[p * lda + i] : a[i * lda + p];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] += x * b[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      V* to = reinterpret_cast<V*>(out + i * ldo + v * width);
      *to = add ? *to + sum[i][v] : sum[i][v];
    }
  }
}

// The same for any number of rows and for a strip of which only `columns` are real.
template <class T, bool a_by_columns>
void product(std::int64_t rows, std::int64_t columns, std::int64_t inner, const T* a, std::int64_t lda, const T* strip,
             T* out, std::int64_t ldo, bool add) {
  T edge[DK_ROWS * kLanes<T>];
  std::int64_t i = 0;
  const auto step = [&](auto count) {
    constexpr int n = decltype(count)::value;
    for (; i + n <= rows; i += n) {
      const T* from = a + (a_by_columns ? i : i * lda);
      if (columns == kLanes<T>) {
        micro<T, n, a_by_columns>(inner, from, lda, strip, out + i * ldo, ldo, add);
        continue;
      }
      micro<T, n, a_by_columns>(inner, from, lda, strip, edge, kLanes<T>, false);
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

// Columns [first, first + columns) of a row-major matrix as a strip, padded with zeros.
template <class T>
void pack_strip(const T* from, std::int64_t ld, std::int64_t rows, std::int64_t columns, T* strip) {
  for (std::int64_t i = 0; i < rows; ++i) {
    T* to = strip + i * kLanes<T>;
    if (columns == kLanes<T>) {
      __builtin_memcpy(to, from + i * ld, sizeof(T) * kLanes<T>);
    } else {
      for (int j = 0; j < kLanes<T>; ++j) to[j] = j < columns ? from[i * ld + j] : T(0);
    }
  }
}
