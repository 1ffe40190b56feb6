// Local features as a product reads them, for one instruction set; included by tiles.inc.h inside its namespace.
// Numbers of any type, with any strides, are copied to a matrix of X a panel of columns at a time, in the cache.

// What a number of the source is in T.
template <class T>
DK_FN T widened(double x) {
  return static_cast<T>(x);
}
template <class T>
DK_FN T widened(float x) {
  return static_cast<T>(x);
}
template <class T>
DK_FN T widened(BFloat16 x) {
  return static_cast<T>(detail::bits_as<float>(static_cast<std::uint32_t>(x.bits) << 16));
}
template <class T>
DK_FN T widened(Float16 x) {
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fff) << 13;
  const float finite = detail::bits_as<float>(magnitude) * 0x1p112f;  // moves the exponent's bias, subnormals too
  const std::uint32_t special = magnitude | 0x7f800000u;              // inf or NaN
  const std::uint32_t bits = magnitude < (0x7c00u << 13) ? detail::bits_as<std::uint32_t>(finite) : special;
  return static_cast<T>(detail::bits_as<float>(bits | static_cast<std::uint32_t>(x.bits & 0x8000) << 16));
}

#if defined(DK_BF16)
template <>
DK_FN BFloat16 widened<BFloat16>(BFloat16 x) {
  return x;
}
#endif

// To the nearest, of two to the even one.
DK_FN BFloat16 rounded(float x) {
  const std::uint32_t bits = detail::bits_as<std::uint32_t>(x), nearest = bits + 0x7fff + (bits >> 16 & 1);
  return {static_cast<std::uint16_t>((x == x ? nearest : 0x7fc00000u) >> 16)};
}

#if DK_VECTOR_BYTES == 64
// A matrix of 16 by 16 pairs, transposed: squares of 1, 2, 4 and 8 a side change places across the diagonal.
DK_FN void transpose(__m512i (&x)[16]) {
  const __m512i at = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
  for (int step = 0; step < 4; ++step) {
    const int side = 1 << step;
    const __m512i across = _mm512_set1_epi32(side), other = _mm512_set1_epi32(16);
    const __mmask16 right = _mm512_test_epi32_mask(at, across);
    const __m512i upper = _mm512_mask_add_epi32(at, right, at, _mm512_sub_epi32(other, across));
    const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(at, across), right, at, other);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (i & side) continue;
      const __m512i a = x[i], b = x[i + side];
      x[i] = _mm512_permutex2var_epi32(a, upper, b);
      x[i + side] = _mm512_permutex2var_epi32(a, lower, b);
    }
  }
}

// One line of a transposition: 16 neighbouring locations of a channel, or of two side by side, where there is a second.
DK_FN __m512i locations_of(const float* from, std::int64_t, bool, __mmask16 locations) {
  return _mm512_maskz_loadu_epi32(locations, from);
}
DK_FN __m512i locations_of(const BFloat16* from, std::int64_t channel, bool both, __mmask16 locations) {
  const __m256i x = _mm256_maskz_loadu_epi16(locations, from);
  const __m256i y = both ? _mm256_maskz_loadu_epi16(locations, from + channel) : _mm256_setzero_si256();
  return _mm512_permutex2var_epi16(_mm512_castsi256_si512(x), side_by_side(), _mm512_castsi256_si512(y));
}

// `count` locations that lie side by side as a matrix (count, ld), padded with zeros from channel K on.
template <class X>
void stage_transposed(const X* from, std::int64_t channel, std::int64_t count, std::int64_t K, X* to, std::int64_t ld) {
  constexpr std::int64_t side = 16, term = 4 / sizeof(X), line = side * term;
  const auto first = [](std::int64_t n) { return static_cast<__mmask16>((1u << least(n, side)) - 1); };
  for (std::int64_t k = 0; k < ld; k += line) {
    for (std::int64_t l = 0; l < count; l += side) {
      for (std::int64_t next = k + line; next < least(K, k + 2 * line); ++next) {  // beyond what a processor foresees
        _mm_prefetch(from + next * channel + l, _MM_HINT_T1);
      }
      __m512i x[side];
#pragma GCC unroll 16
      for (int i = 0; i < side; ++i) {
        const std::int64_t at = k + i * term;
        x[i] = at < K ? locations_of(from + at * channel + l, channel, at + 1 < K, first(count - l))
                      : _mm512_setzero_si512();
      }
      transpose(x);
#pragma GCC unroll 16
      for (int i = 0; i < side; ++i) {
        if (l + i < count) _mm512_mask_storeu_epi32(to + (l + i) * ld + k, first((ld - k) / term), x[i]);
      }
    }
  }
}
#endif

// Channels of a row as a product reads it.
template <class T, class X>
DK_FN std::int64_t padded_channels(const Pairs<T, X>& p) {
  return padded(p.K, kInner<T, X>);
}

// Columns [col, col + cols) of the source as a matrix (cols, padded K).
template <class From, class T, class X>
void stage(const Pairs<T, X>& p, std::int64_t col, std::int64_t cols, X* __restrict panel) {
  const Source& source = *p.source;
  const std::int64_t ld = padded_channels(p);
  constexpr std::int64_t line = 16;  // channels written at a time, while neighbouring locations are read
  for (std::int64_t begin = 0, count; begin < cols; begin += count) {
    const std::int64_t location = (col + begin) % p.L;
    count = least(cols - begin, p.L - location);  // of one image
    const From* __restrict from =
        static_cast<const From*>(source.data) + (col + begin) / p.L * source.image + location * source.location;
    X* __restrict to = panel + begin * ld;
#if DK_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<From, X> && !std::is_same_v<X, double>) {
      if (source.location == 1) {
        stage_transposed(from, source.channel, count, p.K, to, ld);
        continue;
      }
    }
#endif
    for (std::int64_t l = 0; ld > p.K && l < count; ++l) {
      for (std::int64_t k = p.K; k < ld; ++k) to[l * ld + k] = X{};
    }
    if (source.channel == 1) {
      for (std::int64_t l = 0; l < count; ++l) {
        for (std::int64_t k = 0; k < p.K; ++k) to[l * ld + k] = widened<X>(from[l * source.location + k]);
      }
      continue;
    }
    std::int64_t k = 0;
    for (; k + line <= p.K; k += line) {
      for (std::int64_t l = 0; l < count; ++l) {
        const From* x = from + l * source.location + k * source.channel;
        for (std::int64_t i = 0; i < line; ++i) to[l * ld + k + i] = widened<X>(x[i * source.channel]);
      }
    }
    for (std::int64_t l = 0; l < count; ++l) {
      for (std::int64_t i = k; i < p.K; ++i)
        to[l * ld + i] = widened<X>(from[l * source.location + i * source.channel]);
    }
  }
}

// A panel's columns as a matrix, in place or staged.
template <class X>
struct Panel {
  const X* c;
  std::int64_t ld;
};

template <class T, class X>
Panel<X> panel_at(const Pairs<T, X>& p, std::int64_t col, std::int64_t cols, X* staging) {
  if (!p.source) return {p.c + col * p.ldc, p.ldc};
  if constexpr (std::is_same_v<T, X>) {
    switch (p.source->number) {
      case Number::float64:
        stage<double>(p, col, cols, staging);
        break;
      case Number::float32:
        stage<float>(p, col, cols, staging);
        break;
      case Number::bfloat16:
        stage<BFloat16>(p, col, cols, staging);
        break;
      case Number::float16:
        stage<Float16>(p, col, cols, staging);
        break;
    }
  } else {
    stage<X>(p, col, cols, staging);
  }
  return {staging, padded_channels(p)};
}
