// The loops of kd_few.cpp over a tile, which has 32 rows as lanes; for that file alone. They compute into the tile, the
// numbers of a gradient into `part`.
#pragma once

#include <cmath>

#include "kd_blocks.h"

namespace metadistil {
namespace {

template <typename T>
using Lanes = T[LANES];

template <typename T>
struct alignas(64) Tile {
  Lanes<T> s[FEW], m[FEW], e1[FEW], d[FEW], S[FEW], A[FEW];  // as in Row
  Lanes<T> part[FEW];                                        // of a teacher or of a gradient
  T flat[FEW * LANES];                                       // the same as [32, C]
  Lanes<T> top_s, top_m, logit, sum_s, sum_m, sum_1, mean_d;
  Lanes<T> a, b, minus_b, c, at_label;  // factors of a gradient
  Lanes<T> q_S, q1_S, p_S, p_A, S_y, v;
  Lanes<T> value;         // of `rows`
  Lanes<double> u;        // the upstream gradient
  Lanes<Bits<T>> label;   // -1 where none is to be learned
  Lanes<Bits<T>> broken;  // all bits where the row becomes NaN
  T inverse;
  double temperature, soft, hard;
  int64_t classes;
  bool labelled, sharp, bent;
};

// log x for a normal x > 0, for float to 3e-9: x = 2^k y with y from 0.7 to 1.4, log y = 2 artanh((y - 1)/(y + 1)).
template <typename T>
INLINE double logarithm(double x) {
  if constexpr (sizeof(T) == 8) return std::log(x);
  constexpr uint64_t LOW = 0x3FE6A09E00000000, ONE = 0x3FF0000000000000, FRACTION = (1ull << 52) - 1;
  const uint64_t shifted = as<uint64_t>(x) + (ONE - LOW);
  const double k = as<double>((shifted >> 52) | 0x4330000000000000) - (0x1p52 + 1023);
  const double y = as<double>((shifted & FRACTION) + LOW), f = (y - 1) / (y + 1), g = f * f;
  const double tail = g * (1.0 / 3 + g * (1.0 / 5 + g * (1.0 / 7 + g * (1.0 / 9))));
  return k * 0x1.62e42fefa39efp-1 + 2 * (f + f * tail);
}

// [32, C] to [C, 32] and back, times w. With a constant C these loops are shuffles of vectors.
template <int64_t C, typename T>
INLINE void turn(const T* __restrict x, T* __restrict y) {
  for (int64_t l = 0; l < LANES; l++) {
    for (int64_t c = 0; c < C; c++) y[c * LANES + l] = x[l * C + c];
  }
}
template <typename T>
INLINE void to_lanes(const T* __restrict x, T* __restrict y, int64_t classes) {
  switch (classes) {
    case 1: return turn<1>(x, y);
    case 2: return turn<2>(x, y);
    case 3: return turn<3>(x, y);
    case 4: return turn<4>(x, y);
  }
  for (int64_t l = 0; l < LANES; l++) {
    for (int64_t c = 0; c < classes; c++) y[c * LANES + l] = x[l * classes + c];
  }
}

template <int64_t C, typename T>
INLINE void turn_back(const T* __restrict x, T w, T* __restrict y) {
  for (int64_t l = 0; l < LANES; l++) {
    for (int64_t c = 0; c < C; c++) y[l * C + c] = w * x[c * LANES + l];
  }
}
template <typename T>
INLINE void to_rows(const T* __restrict x, T w, T* __restrict y, int64_t classes) {
  switch (classes) {
    case 1: return turn_back<1>(x, w, y);
    case 2: return turn_back<2>(x, w, y);
    case 3: return turn_back<3>(x, w, y);
    case 4: return turn_back<4>(x, w, y);
  }
  for (int64_t l = 0; l < LANES; l++) {
    for (int64_t c = 0; c < classes; c++) y[l * classes + c] = w * x[c * LANES + l];
  }
}

// The maximum over classes, and where there is none to go by.
template <typename T>
INLINE void tops(const Lanes<T>* x, Tile<T>& t, Lanes<T>& result) {
  Lanes<T> top;
  Lanes<Bits<T>> broken;
  for (int64_t l = 0; l < LANES; l++) top[l] = static_cast<T>(-INF), broken[l] = t.broken[l];
  for (int64_t c = 0; c < t.classes; c++) {
    for (int64_t l = 0; l < LANES; l++) {
      top[l] = x[c][l] > top[l] ? x[c][l] : top[l];
      broken[l] |= x[c][l] < static_cast<T>(INF) ? 0 : -1;
    }
  }
  for (int64_t l = 0; l < LANES; l++) {
    result[l] = top[l];
    t.broken[l] = broken[l] | (top[l] > static_cast<T>(-INF) ? 0 : -1);
  }
}

// A teacher's part of m or A. What is +inf breaks its row, whatever its weight makes of it.
template <typename T>
INLINE void mix(Tile<T>& t, Lanes<T>* sum, T w, bool first, bool guarded) {
  for (int64_t c = 0; c < t.classes; c++) {
    weigh(t.part[c], w, first, sum[c], LANES);
    if (!guarded) continue;
    for (int64_t l = 0; l < LANES; l++) t.broken[l] |= t.part[c][l] < static_cast<T>(INF) ? 0 : -1;
  }
}

// Cotangents: what is not finite breaks its row, also where it meets a probability of zero.
template <typename T>
INLINE void finite(Tile<T>& t, const Lanes<T>* x) {
  for (int64_t c = 0; c < t.classes; c++) {
    for (int64_t l = 0; l < LANES; l++) t.broken[l] |= std::abs(x[c][l]) < static_cast<T>(INF) ? 0 : -1;
  }
}

// sum_c term(c, lane)
template <typename T, typename Term>
INLINE void sum_classes(int64_t classes, Lanes<T>& result, Term term) {
  Lanes<T> sum = {};
  for (int64_t c = 0; c < classes; c++) {
    for (int64_t l = 0; l < LANES; l++) sum[l] += term(c, l);
  }
  for (int64_t l = 0; l < LANES; l++) result[l] = sum[l];
}

template <typename T>
INLINE const Lanes<T>* unsoftened(const Tile<T>& t) {
  return t.sharp ? t.e1 : t.s;
}

template <typename T>
INLINE void soften(Tile<T>& t) {
  tops(t.s, t, t.top_s), tops(t.m, t, t.top_m);
  if (t.labelled) {
    const auto picked = [&](int64_t c, int64_t l) { return t.label[l] == c ? t.s[c][l] - t.top_s[l] : 0; };
    sum_classes<T>(t.classes, t.logit, picked);
  }
  for (int64_t c = 0; c < t.classes; c++) {
    if (t.sharp) exponentials<T, const T*>(t.s[c], t.e1[c], 1, t.top_s, LANES);
    soften<T, const T*>(t.s[c], t.m[c], t.s[c], t.m[c], t.d[c], t.inverse, t.top_s, t.top_m, LANES);
  }
  sum_classes<T>(t.classes, t.sum_s, [&](int64_t c, int64_t l) { return t.s[c][l]; });
  sum_classes<T>(t.classes, t.sum_m, [&](int64_t c, int64_t l) { return t.m[c][l]; });
  sum_classes<T>(t.classes, t.mean_d, [&](int64_t c, int64_t l) { return t.m[c][l] * t.d[c][l]; });
  for (int64_t l = 0; l < LANES; l++) t.mean_d[l] /= t.sum_m[l];
  const Lanes<T>* e1 = unsoftened(t);
  if (t.labelled) sum_classes<T>(t.classes, t.sum_1, [&](int64_t c, int64_t l) { return e1[c][l]; });
}

template <typename T>
INLINE void losses(Tile<T>& t) {
  const double factor = t.soft * t.temperature * t.temperature;
  Lanes<double> value;
  for (int64_t l = 0; l < LANES; l++) {
    const double ratio = static_cast<double>(t.sum_s[l]) / static_cast<double>(t.sum_m[l]);
    value[l] = factor * (t.mean_d[l] + logarithm<T>(ratio));
  }
  if (t.labelled) {
    for (int64_t l = 0; l < LANES; l++) {
      const double hard = t.hard * (logarithm<T>(t.sum_1[l]) - t.logit[l]);
      value[l] += t.label[l] >= 0 ? hard : 0;
    }
  }
  for (int64_t l = 0; l < LANES; l++) t.value[l] = static_cast<T>(value[l]);
}

template <typename T>
INLINE void factors(Tile<T>& t, double scale) {
  for (int64_t l = 0; l < LANES; l++) {
    const double uc = t.u[l] * t.soft * scale;
    t.a[l] = static_cast<T>(uc / t.sum_s[l]);
    t.minus_b[l] = static_cast<T>(uc / t.sum_m[l]);
    t.b[l] = -t.minus_b[l];
  }
  if (!t.labelled) return;
  for (int64_t l = 0; l < LANES; l++) {
    const double ug = t.u[l] * t.hard;
    t.at_label[l] = t.label[l] >= 0 ? static_cast<T>(ug) : 0;
    t.c[l] = t.label[l] >= 0 ? static_cast<T>(ug / t.sum_1[l]) : 0;
  }
}

template <typename T>
INLINE void first_to_student(Tile<T>& t) {
  const Lanes<T>* e1 = unsoftened(t);
  for (int64_t c = 0; c < t.classes; c++) {
    combine<T, const T*>(t.s[c], t.a, t.m[c], t.b, t.labelled ? e1[c] : nullptr, t.c, t.part[c], LANES);
    if (!t.labelled) continue;
    for (int64_t l = 0; l < LANES; l++) t.part[c][l] -= t.label[l] == c ? t.at_label[l] : 0;
  }
}

template <typename T>
INLINE void first_to_teachers(Tile<T>& t) {
  for (int64_t c = 0; c < t.classes; c++) {
    centred<T, const T*>(t.m[c], t.minus_b, t.d[c], t.mean_d, false, t.part[c], LANES);
  }
}

template <typename T>
INLINE void mean(const Tile<T>& t, const Lanes<T>* x, const Lanes<T>& sum, const Lanes<T>* y, Lanes<T>& result) {
  sum_classes<T>(t.classes, result, [&](int64_t c, int64_t l) { return x[c][l] > 0 ? x[c][l] * y[c][l] : 0; });
  for (int64_t l = 0; l < LANES; l++) result[l] /= sum[l];
}

// What the second order takes from sums over classes, and what goes to the upstream.
template <typename T>
INLINE void second(Tile<T>& t) {
  mean(t, t.s, t.sum_s, t.S, t.q_S), mean(t, t.m, t.sum_m, t.S, t.p_S);
  if (t.bent) {
    mean(t, t.m, t.sum_m, t.A, t.p_A);
    sum_classes<T>(t.classes, t.v, [&](int64_t c, int64_t l) {
      return t.m[c][l] > 0 ? t.m[c][l] * (t.A[c][l] - t.p_A[l]) * (t.d[c][l] - t.mean_d[l]) : 0;
    });
    for (int64_t l = 0; l < LANES; l++) t.v[l] /= t.sum_m[l];
  } else {
    for (int64_t l = 0; l < LANES; l++) t.v[l] = 0;
  }
  const double factor = t.soft * t.temperature;
  Lanes<double> value;
  for (int64_t l = 0; l < LANES; l++) value[l] = factor * (static_cast<double>(t.q_S[l]) - t.p_S[l] + t.v[l]);
  if (t.labelled) {
    mean(t, unsoftened(t), t.sum_1, t.S, t.q1_S);
    sum_classes<T>(t.classes, t.S_y, [&](int64_t c, int64_t l) { return t.label[l] == c ? t.S[c][l] : 0; });
    for (int64_t l = 0; l < LANES; l++) {
      const double hard = t.hard * (static_cast<double>(t.q1_S[l]) - t.S_y[l]);
      value[l] += t.label[l] >= 0 ? hard : 0;
    }
  }
  for (int64_t l = 0; l < LANES; l++) t.value[l] = static_cast<T>(value[l]);
}

template <typename T>
INLINE void second_to_student(Tile<T>& t) {
  const Lanes<T>* e1 = unsoftened(t);
  for (int64_t c = 0; c < t.classes; c++) {
    centred<T, const T*>(t.s[c], t.a, t.S[c], t.q_S, false, t.part[c], LANES);
    if (t.bent) centred<T, const T*>(t.m[c], t.b, t.A[c], t.p_A, true, t.part[c], LANES);
    if (t.labelled) centred<T, const T*>(e1[c], t.c, t.S[c], t.q1_S, true, t.part[c], LANES);
  }
}

template <typename T>
INLINE void second_to_teachers(Tile<T>& t) {
  for (int64_t c = 0; c < t.classes; c++) {
    centred<T, const T*>(t.m[c], t.b, t.S[c], t.p_S, false, t.part[c], LANES);
    if (t.bent) {
      curved<T, const T*>(t.m[c], t.minus_b, t.A[c], t.p_A, t.d[c], t.mean_d, t.v, t.part[c], LANES);
    }
  }
}

template <typename T>
INLINE void cotangent(Tile<T>& t) {
  tops(t.m, t, t.top_m);
  for (int64_t c = 0; c < t.classes; c++) {
    exponentials<T, const T*>(t.m[c], t.s[c], t.inverse, t.top_m, LANES);
  }
  sum_classes<T>(t.classes, t.sum_s, [&](int64_t c, int64_t l) { return t.s[c][l]; });
  mean(t, t.s, t.sum_s, t.S, t.q_S);
  for (int64_t l = 0; l < LANES; l++) t.a[l] = static_cast<T>(t.soft / t.sum_s[l]);
  for (int64_t c = 0; c < t.classes; c++) {
    centred<T, const T*>(t.s[c], t.a, t.S[c], t.q_S, false, t.part[c], LANES);
  }
}

#define TILES(T)                                                                                                       \
  CLONES void to_lanes_tile(const T* x, T* y, int64_t classes) { to_lanes(x, y, classes); }                            \
  CLONES void to_rows_tile(const T* x, T w, T* y, int64_t classes) { to_rows(x, w, y, classes); }                      \
  CLONES void mix_tile(Tile<T>& t, Lanes<T>* sum, T w, bool first, bool guarded) { mix(t, sum, w, first, guarded); }   \
  CLONES void finite_tile(Tile<T>& t, const Lanes<T>* x) { finite(t, x); }                                             \
  CLONES void soften_tile(Tile<T>& t) { soften(t); }                                                                   \
  CLONES void losses_tile(Tile<T>& t) { losses(t); }                                                                   \
  CLONES void factors_tile(Tile<T>& t, double scale) { factors(t, scale); }                                            \
  CLONES void first_to_student_tile(Tile<T>& t) { first_to_student(t); }                                               \
  CLONES void first_to_teachers_tile(Tile<T>& t) { first_to_teachers(t); }                                             \
  CLONES void second_tile(Tile<T>& t) { second(t); }                                                                   \
  CLONES void second_to_student_tile(Tile<T>& t) { second_to_student(t); }                                             \
  CLONES void second_to_teachers_tile(Tile<T>& t) { second_to_teachers(t); }                                           \
  CLONES void cotangent_tile(Tile<T>& t) { cotangent(t); }
TILES(float)
TILES(double)

}  // namespace
}  // namespace metadistil
