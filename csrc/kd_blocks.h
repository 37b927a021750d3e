// The loops of kd_rows.cpp over one block of a row, those of kd_few.cpp over one class of 32 rows, and how numbers are
// read; for these files alone.
//
// Sums run in lanes of their own, and no product is fused with a sum (-ffp-contract=off), so that the bits do not
// depend on the vector width that a machine has.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kd_rows.h"

// The library is built for the oldest x86-64, with each loop once more for wider vectors; the loader picks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define CLONES
#endif
#define INLINE __attribute__((always_inline)) inline

namespace metadistil {
namespace {

constexpr int64_t LANES = 32;  // scratch is padded to this many, so that no sum over it has a tail
constexpr double INF = std::numeric_limits<double>::infinity();

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

template <typename To, typename From>
INLINE To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The 16-bit formats, to nearest and ties to even as torch rounds them. Choices, not branches: the loops vectorise.

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

INLINE float number(float x) { return x; }
INLINE double number(double x) { return x; }
INLINE float number(BF16 x) { return as<float>(static_cast<uint32_t>(x.bits) << 16); }
INLINE float number(F16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu, wide = rest << 13;
  const uint32_t tiny = as<uint32_t>(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);
  const uint32_t bias = rest >= 0x7C00 ? 224u << 23 : 112u << 23;  // infinity and NaN keep the exponent of all ones
  return as<float>(sign | (rest < 0x400 ? tiny : wide + bias));
}

INLINE void round_to(float x, float& y) { y = x; }
INLINE void round_to(double x, float& y) { y = static_cast<float>(x); }
INLINE void round_to(float x, double& y) { y = x; }
INLINE void round_to(double x, double& y) { y = x; }
INLINE void round_to(float x, BF16& y) {
  const uint32_t bits = as<uint32_t>(x), rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  y.bits = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}
INLINE void round_to(float x, F16& y) {
  const uint32_t bits = as<uint32_t>(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7FFFFFFF;
  const uint32_t tiny = as<uint32_t>(as<float>(size) + 0.5f) - as<uint32_t>(0.5f);  // multiples of 2^-24
  const uint32_t rounded = (size + 0xFFF + ((size >> 13) & 1) - (112u << 23)) >> 13;
  const uint32_t finite = size < 113u << 23 ? tiny : rounded;
  const uint32_t large = size > 0x7F800000 ? 0x7E00 : 0x7C00;
  y.bits = static_cast<uint16_t>(sign | (size >= 0x477FF000 ? large : finite));  // from 65520 on
}
INLINE void round_to(double x, BF16& y) { round_to(static_cast<float>(x), y); }  // rounds twice, as torch's does
INLINE void round_to(double x, F16& y) { round_to(static_cast<float>(x), y); }

template <typename X, typename T>
INLINE void widen(const X* __restrict x, T* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = static_cast<T>(number(x[i]));
}
template <typename T, typename Y>
INLINE void narrow(const T* __restrict x, Y* __restrict y, int64_t n) {
  for (int64_t i = 0; i < n; i++) round_to(x[i], y[i]);
}

// exp(x) for x <= 0 by x = n log 2 + r; the polynomial is a minimax fit on |r| <= log(2)/2, to 3e-9 relative (8e-8 when
// rounded). log 2 stands in two parts, of which n times the first is exact. Below the smallest normal number: 0.
INLINE float exponential(float x) {
  constexpr float MAGIC = 0x1.8p23f;  // a sum with it has the nearest integer in its last bits
  const float shifted = x * 1.44269504f + MAGIC, n = shifted - MAGIC;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float high = 0.0416683942f + r * (0.00836878041f + r * 0.00138144669f);
  const float tail = 0.499999934f + r * (0.166665201f + r * high);
  const float power = as<float>((as<uint32_t>(shifted) << 23) + 0x3F800000u);  // 2^n
  const float y = (1.0f + (r + r * r * tail)) * power;
  return x < -87.336f ? 0.0f : y;
}
INLINE double exponential(double x) { return std::exp(x); }

// sum_i term(i): each lane on its own, then by halves. 32 of them, since with 16 additions wait for each other: 20 ns
// for 1024 floats instead of 13 with AVX-512, 150 instead of 33 with AVX2.
template <typename T, typename Term>
INLINE T sum(int64_t n, Term term) {
  T lanes[LANES] = {};
  for (int64_t i = 0; i < n; i += LANES) {
    for (int64_t l = 0; l < LANES; l++) lanes[l] += term(i + l);
  }
  for (int64_t half = LANES / 2; half; half /= 2) {
    for (int64_t l = 0; l < half; l++) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// The maximum over integers of the same order as the numbers, hence in any order of comparison; a NaN shows as a size
// above infinity's.
template <typename T>
struct Peak {
  Bits<T> key = std::numeric_limits<Bits<T>>::min(), size = 0;

  static INLINE Bits<T> mirrored(Bits<T> bits) {
    return bits ^ ((bits >> (8 * sizeof(T) - 1)) & std::numeric_limits<Bits<T>>::max());
  }
  void join(Peak other) { key = std::max(key, other.key), size = std::max(size, other.size); }
  T value() const { return as<T>(mirrored(key)); }
  bool below_inf() const { return size <= as<Bits<T>>(static_cast<T>(INF)) && value() < static_cast<T>(INF); }
  bool finite() const { return size < as<Bits<T>>(static_cast<T>(INF)); }
  bool sound() const { return below_inf() && value() > static_cast<T>(-INF); }
};

template <typename T>
INLINE Peak<T> peak(const T* __restrict x, int64_t n) {
  Bits<T> key = Peak<T>().key, size = 0;
  for (int64_t i = 0; i < n; i++) {
    const Bits<T> bits = as<Bits<T>>(x[i]), mine = Peak<T>::mirrored(bits);
    const Bits<T> without_sign = bits & std::numeric_limits<Bits<T>>::max();
    key = mine > key ? mine : key;
    size = without_sign > size ? without_sign : size;
  }
  return {key, size};
}

template <typename T>
INLINE void weigh(const T* __restrict x, T w, bool first, T* __restrict y, int64_t n) {
  if (first) {
    for (int64_t i = 0; i < n; i++) y[i] = w * x[i];
  } else {
    for (int64_t i = 0; i < n; i++) y[i] += w * x[i];
  }
}

// From here on V is T, the number of a row, or const T*, a number for each i where each is of another row.
INLINE float at(float x, int64_t) { return x; }
INLINE double at(double x, int64_t) { return x; }
template <typename T>
INLINE T at(const T* x, int64_t i) {
  return x[i];
}

// Logits to exponentials, and d, 0 where it takes no part. Inputs may be the outputs.
template <typename T, typename V>
INLINE void soften(const T* z_s, const T* z_m, T* s, T* m, T* d, T inverse, V top_s, V top_m, int64_t n) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; i++) {
    const T x = z_s[i] - at(top_s, i), y = z_m[i] - at(top_m, i);
    const T e = exponential(y * inverse), difference = (y - x) * inverse;
    s[i] = exponential(x * inverse);
    m[i] = e;
    d[i] = e > 0 ? difference : 0;
  }
}

template <typename T, typename V>
INLINE void exponentials(const T* __restrict x, T* __restrict y, T inverse, V top, int64_t n) {
  for (int64_t i = 0; i < n; i++) y[i] = exponential((x[i] - at(top, i)) * inverse);
}

template <typename T, typename V>
INLINE void combine(const T* __restrict x, V a, const T* __restrict y, V b, const T* __restrict z, V c,
                    T* __restrict out, int64_t n) {
  if (z) {
    for (int64_t i = 0; i < n; i++) out[i] = at(a, i) * x[i] + at(b, i) * y[i] + at(c, i) * z[i];
  } else {
    for (int64_t i = 0; i < n; i++) out[i] = at(a, i) * x[i] + at(b, i) * y[i];
  }
}

template <typename T>
INLINE T total(const T* __restrict x, int64_t n) {
  return sum<T>(n, [=](int64_t i) { return x[i]; });
}

template <typename T>
INLINE T product(const T* __restrict x, const T* __restrict y, int64_t n) {
  return sum<T>(n, [=](int64_t i) { return x[i] * y[i]; });
}

// The same where y counts for nothing, whatever it is, when its weight x is 0; this takes three times as long.
template <typename T>
INLINE T dot(const T* __restrict x, const T* __restrict y, int64_t n) {
  return sum<T>(n, [=](int64_t i) { return x[i] > 0 ? x[i] * y[i] : 0; });
}
template <typename T>
INLINE T covariance(const T* __restrict x, const T* __restrict y, T mean_y, const T* __restrict d, T mean_d,
                    int64_t n) {
  return sum<T>(n, [=](int64_t i) { return x[i] > 0 ? x[i] * (y[i] - mean_y) * (d[i] - mean_d) : 0; });
}

// out (+)= a x (y - mean)
template <typename T, typename V>
INLINE void centred(const T* __restrict x, V a, const T* __restrict y, V mean, bool add, T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const T value = x[i] > 0 ? at(a, i) * x[i] * (y[i] - at(mean, i)) : 0;
    out[i] = add ? out[i] + value : value;
  }
}

// out += a x ((y - mean_y)(1 + d - mean_d) - v)
template <typename T, typename V>
INLINE void curved(const T* __restrict x, V a, const T* __restrict y, V mean_y, const T* __restrict d, V mean_d, V v,
                   T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const T bent = (y[i] - at(mean_y, i)) * (1 + d[i] - at(mean_d, i)) - at(v, i);
    out[i] += x[i] > 0 ? at(a, i) * x[i] * bent : 0;
  }
}

// The attribute takes plain functions only, hence one of each loop by type, where they are used.
#define BLOCKS(T)                                                                                                      \
  CLONES Peak<T> peak_block(const T* x, int64_t n) { return peak(x, n); }                                              \
  CLONES T total_block(const T* x, int64_t n) { return total(x, n); }                                                  \
  CLONES T product_block(const T* x, const T* y, int64_t n) { return product(x, y, n); }                               \
  CLONES T dot_block(const T* x, const T* y, int64_t n) { return dot(x, y, n); }                                       \
  CLONES T covariance_block(const T* x, const T* y, T mean_y, const T* d, T mean_d, int64_t n) {                       \
    return covariance(x, y, mean_y, d, mean_d, n);                                                                     \
  }                                                                                                                    \
  CLONES void weigh_block(const T* x, T w, bool first, T* y, int64_t n) { weigh(x, w, first, y, n); }                  \
  CLONES void soften_block(const T* z_s, const T* z_m, T* s, T* m, T* d, T inverse, T top_s, T top_m, int64_t n) {     \
    soften(z_s, z_m, s, m, d, inverse, top_s, top_m, n);                                                               \
  }                                                                                                                    \
  CLONES void exponentials_block(const T* x, T* y, T inverse, T top, int64_t n) {                                      \
    exponentials(x, y, inverse, top, n);                                                                               \
  }                                                                                                                    \
  CLONES void combine_block(const T* x, T a, const T* y, T b, const T* z, T c, T* out, int64_t n) {                    \
    combine(x, a, y, b, z, c, out, n);                                                                                 \
  }                                                                                                                    \
  CLONES void centred_block(const T* x, T a, const T* y, T mean, bool add, T* out, int64_t n) {                        \
    centred(x, a, y, mean, add, out, n);                                                                               \
  }                                                                                                                    \
  CLONES void curved_block(const T* x, T a, const T* y, T mean_y, const T* d, T mean_d, T v, T* out, int64_t n) {      \
    curved(x, a, y, mean_y, d, mean_d, v, out, n);                                                                     \
  }
CLONES void widen_block(const BF16* x, float* y, int64_t n) { widen(x, y, n); }
CLONES void widen_block(const F16* x, float* y, int64_t n) { widen(x, y, n); }
CLONES void narrow_block(const float* x, BF16* y, int64_t n) { narrow(x, y, n); }
CLONES void narrow_block(const float* x, F16* y, int64_t n) { narrow(x, y, n); }
// What is rare goes without clones.
template <typename X, typename T>
void widen_block(const X* x, T* y, int64_t n) {
  widen(x, y, n);
}
template <typename T, typename Y>
void narrow_block(const T* x, Y* y, int64_t n) {
  narrow(x, y, n);
}

// `body` with a pointer of the element's type.
template <typename Void, typename Body>
void by_element(Void* data, Element element, const Body& body) {
  const auto call = [&](auto zero) {
    using X = decltype(zero);
    body(static_cast<std::conditional_t<std::is_const_v<Void>, const X, X>*>(data));
  };
  switch (element) {
    case Element::f32: return call(float());
    case Element::f64: return call(double());
    case Element::bf16: return call(BF16());
    case Element::f16: return call(F16());
  }
}

// n numbers of a row from class i on: where they lie, or else gathered into `spare`.
template <typename T>
const T* read(const Rows& rows, int64_t row, int64_t i, T* spare, int64_t n) {
  const T* found = spare;
  by_element(rows.data, rows.element, [&](const auto* data) {
    const auto* x = data + rows.starts(row) + i * rows.step;
    if (rows.step != 1) {
      for (int64_t j = 0; j < n; j++) spare[j] = static_cast<T>(number(x[j * rows.step]));
    } else if constexpr (std::is_same_v<decltype(x), const T*>) {
      found = x;
    } else {
      widen_block(x, spare, n);
    }
  });
  return found;
}

// The row itself where it can be computed with as it lies, else null.
template <typename T>
const T* in_place(const Rows& rows, int64_t row) {
  const T* found = nullptr;
  by_element(rows.data, rows.element, [&](const auto* data) {
    if constexpr (std::is_same_v<decltype(data), const T*>) found = rows.step == 1 ? data + rows.starts(row) : nullptr;
  });
  return found;
}

double scalar(const Rows& rows, int64_t row) {
  double value = 1;
  if (rows.data) by_element(rows.data, rows.element, [&](const auto* x) { value = number(x[rows.starts(row)]); });
  return value;
}

}  // namespace
}  // namespace metadistil
