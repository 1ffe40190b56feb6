// The scalar functions that estimators are written in, for host and device, float and double.
//
// On the host they are branch-free polynomials in plain C++, so that a loop over them vectorises for
// whatever instruction set its file is compiled for. Errors against the exact result, in units of the
// last place: exp 1.5, sigmoid 3, softplus 3 (tests/test_emitted.py holds them to it). exp underflows
// to 0 below twice the smallest normal number and overflows to inf; NaN stays NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DK_FN __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define DK_FN inline __attribute__((always_inline))
#else
#define DK_FN inline
#endif

namespace dimkern {

constexpr bool same_text(const char* a, const char* b) {
  while (*a && *a == *b) ++a, ++b;
  return *a == *b;
}

namespace detail {

template <class To, class From>
DK_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <class T>
struct Ieee;

template <>
struct Ieee<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa = 23;
  static constexpr float round_magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  static constexpr float lowest = -86.643397f, highest = 89.0f;  // exp is 0 below, inf above
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};

template <>
struct Ieee<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa = 52;
  static constexpr double round_magic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double lowest = -707.7032713652975, highest = 710.0;
  static constexpr double ln2_high = 6.93145751953125e-1, ln2_low = 1.42860682030941723212e-6;
};

// e^r on |r| <= ln(2)/2.
DK_FN float exp_kernel(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r + 1.0f;
}

DK_FN double exp_kernel(double r) {
  // Taylor to r^13: the remainder is below 5e-18 there
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  return p * r * r + r + 1.0;
}

// log(1 + u) for 0 <= u <= 1 as 2 atanh(t), t = u / (2 + u) <= 1/3: its relative error does not grow as u -> 0.
template <class T, int terms>
DK_FN T log1p_unit(T u) {
  const T t = u / (T(2) + u), t2 = t * t;
  T p = T(1) / T(2 * terms + 1);
  for (int k = terms - 1; k >= 1; --k) p = p * t2 + T(1) / T(2 * k + 1);
  return T(2) * (t + t * t2 * p);
}

}  // namespace detail

template <class T>
DK_FN T exp(T x) {
#if defined(__CUDA_ARCH__)
  return ::exp(x);
#else
  using I = detail::Ieee<T>;
  using Bits = typename I::Bits;
  // written so that a NaN fails both comparisons and stays
  T clamped = x < I::lowest ? I::lowest : x;
  clamped = clamped > I::highest ? I::highest : clamped;
  const T shifted = clamped * T(1.4426950408889634) + I::round_magic;
  const T n = shifted - I::round_magic;
  const T r = (clamped - n * I::ln2_high) - n * I::ln2_low;
  // 2^n as 2^(n - 1) * 2, so that n = mantissa range + 1 overflows to inf rather than into the sign
  const Bits exponent = detail::bits_as<Bits>(shifted) - detail::bits_as<Bits>(I::round_magic) - 1;
  const T power = detail::bits_as<T>((exponent << I::mantissa) + detail::bits_as<Bits>(T(1)));
  const T y = detail::exp_kernel(r) * power * T(2);
  return x < I::lowest ? T(0) : y;
#endif
}

// e^-|x|: of one score softplus and sigmoid need the same, and a compiler makes it once.
template <class T>
DK_FN T exp_minus_magnitude(T x) {
  return exp(x < T(0) ? x : -x);
}

template <class T>
DK_FN T sigmoid(T x) {
#if defined(__CUDA_ARCH__)
  return T(1) / (T(1) + exp(-x));
#else
  const T e = exp_minus_magnitude(x);
  return (x < T(0) ? e : T(1)) / (T(1) + e);
#endif
}

template <class T>
DK_FN T softplus(T x) {
  const T positive = x < T(0) ? T(0) : x, e = exp_minus_magnitude(x);
#if defined(__CUDA_ARCH__)
  return positive + ::log1p(e);
#else
  return positive + detail::log1p_unit<T, sizeof(T) == 4 ? 6 : 16>(e);
#endif
}

}  // namespace dimkern
