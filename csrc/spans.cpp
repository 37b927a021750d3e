// The loops, element by element:
//
//     pilot_update   s = w;  w = w + alpha g;  b = bf16(w)
//     rewind         w = s;  b = bf16(w)
//     adamw          g = clip g
//                    m = m + (1 - beta1)(g - m)
//                    v = beta2 v + (1 - beta2) g g
//                    w = (1 - lr decay) w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps);  b = bf16(w)
//
// Source: Loshchilov and Hutter (2019), written as torch.optim.AdamW does. Products are rounded before they are added
// (-ffp-contract=off), so that the bits do not depend on the vector width that a machine has.
#include "spans.h"

#include <algorithm>
#include <cmath>
#include <cstring>

// The library is built for the oldest x86-64, with each loop once more for AVX2; the loader picks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__gnu_linux__)
#define CLONES __attribute__((target_clones("default", "avx2")))
#else
#define CLONES
#endif

namespace metadistil {
namespace {

// A block goes through the steps of an operation while it stays in the first-level cache: memory is passed over once.
constexpr int64_t BLOCK = 1024;

// What torch's own conversion makes of a NaN: its vector code for x86 sets all bits, c10::BFloat16 gives the quiet one.
#if defined(__x86_64__)
constexpr uint32_t NOT_A_NUMBER = 0xFFFF;
#else
constexpr uint32_t NOT_A_NUMBER = 0x7FC0;
#endif

template <typename T>
[[gnu::always_inline]] inline void to_bf16(const T* __restrict source, uint16_t* __restrict target, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const float value = static_cast<float>(source[i]);  // float64 rounds twice, as torch's conversion does
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    target[i] = static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? NOT_A_NUMBER : rounded);
  }
}

template <typename T>
[[gnu::always_inline]] inline void axpy(T* __restrict weights, const T* __restrict gradient, T alpha, int64_t n) {
  for (int64_t i = 0; i < n; i++) weights[i] += alpha * gradient[i];
}

template <typename T>
[[gnu::always_inline]] inline void adamw(T* __restrict weights, const T* __restrict gradient, T* __restrict exp_avg,
                                         T* __restrict exp_avg_sq, AdamwFactors<T> f, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    const T g = f.clip * gradient[i];
    const T m = exp_avg[i] + f.rest1 * (g - exp_avg[i]);
    const T v = f.beta2 * exp_avg_sq[i] + f.rest2 * g * g;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weights[i] = f.decay * weights[i] - f.step_size * m / (std::sqrt(v) / f.correction2 + f.eps);
  }
}

template <typename Step>
[[gnu::always_inline]] inline void by_block(int64_t n, Step step) {
  for (int64_t i = 0; i < n; i += BLOCK) step(i, std::min(BLOCK, n - i));
}

// The attribute takes plain functions only, hence one of each loop by type.
CLONES void round_block(const float* s, uint16_t* t, int64_t n) { to_bf16(s, t, n); }
CLONES void round_block(const double* s, uint16_t* t, int64_t n) { to_bf16(s, t, n); }
CLONES void axpy_block(float* w, const float* g, float alpha, int64_t n) { axpy(w, g, alpha, n); }
CLONES void axpy_block(double* w, const double* g, double alpha, int64_t n) { axpy(w, g, alpha, n); }
CLONES void adamw_block(float* w, const float* g, float* m, float* v, AdamwFactors<float> f, int64_t n) {
  adamw(w, g, m, v, f, n);
}
CLONES void adamw_block(double* w, const double* g, double* m, double* v, AdamwFactors<double> f, int64_t n) {
  adamw(w, g, m, v, f, n);
}

template <typename T>
void pilot_update(T* weights, const T* gradient, T* snapshot, uint16_t* shadow, T alpha, int64_t n) {
  by_block(n, [=](int64_t i, int64_t size) {
    if (snapshot) std::memcpy(snapshot + i, weights + i, size * sizeof(T));
    axpy_block(weights + i, gradient + i, alpha, size);
    if (shadow) round_block(weights + i, shadow + i, size);
  });
}

template <typename T>
void rewind(T* weights, const T* snapshot, uint16_t* shadow, int64_t n) {
  by_block(n, [=](int64_t i, int64_t size) {
    std::memcpy(weights + i, snapshot + i, size * sizeof(T));  // not arithmetic: NaNs keep their bits
    if (shadow) round_block(weights + i, shadow + i, size);
  });
}

template <typename T>
void adamw(T* weights, const T* gradient, T* exp_avg, T* exp_avg_sq, uint16_t* shadow, AdamwFactors<T> f, int64_t n) {
  by_block(n, [=](int64_t i, int64_t size) {
    adamw_block(weights + i, gradient + i, exp_avg + i, exp_avg_sq + i, f, size);
    if (shadow) round_block(weights + i, shadow + i, size);
  });
}

}  // namespace

void pilot_update_span(float* w, const float* g, float* s, uint16_t* b, float alpha, int64_t n) {
  pilot_update(w, g, s, b, alpha, n);
}
void pilot_update_span(double* w, const double* g, double* s, uint16_t* b, double alpha, int64_t n) {
  pilot_update(w, g, s, b, alpha, n);
}
void rewind_span(float* w, const float* s, uint16_t* b, int64_t n) { rewind(w, s, b, n); }
void rewind_span(double* w, const double* s, uint16_t* b, int64_t n) { rewind(w, s, b, n); }
void adamw_span(float* w, const float* g, float* m, float* v, uint16_t* b, AdamwFactors<float> f, int64_t n) {
  adamw(w, g, m, v, b, f, n);
}
void adamw_span(double* w, const double* g, double* m, double* v, uint16_t* b, AdamwFactors<double> f, int64_t n) {
  adamw(w, g, m, v, b, f, n);
}

}  // namespace metadistil
