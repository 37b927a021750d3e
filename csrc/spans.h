// Operations on one contiguous span of memory, without torch, so that the compiler sees nothing but the loops.
#pragma once

#include <cstdint>

namespace metadistil {

// The factors of one AdamW step, see spans.cpp.
template <typename T>
struct AdamwFactors {
  T clip, decay, rest1, beta2, rest2, step_size, correction2, eps;  // rest = 1 - beta, taken in float64
};

// `snapshot` and `shadow` may be null. No two spans overlap.
void pilot_update_span(float* weights, const float* gradient, float* snapshot, uint16_t* shadow, float alpha,
                       int64_t n);
void pilot_update_span(double* weights, const double* gradient, double* snapshot, uint16_t* shadow, double alpha,
                       int64_t n);
void rewind_span(float* weights, const float* snapshot, uint16_t* shadow, int64_t n);
void rewind_span(double* weights, const double* snapshot, uint16_t* shadow, int64_t n);
void adamw_span(float* weights, const float* gradient, float* exp_avg, float* exp_avg_sq, uint16_t* shadow,
                AdamwFactors<float> factors, int64_t n);
void adamw_span(double* weights, const double* gradient, double* exp_avg, double* exp_avg_sq, uint16_t* shadow,
                AdamwFactors<double> factors, int64_t n);

}  // namespace metadistil
