// What the kernels share. Compiled with -fmad=false: a product is rounded before it is added, as on the CPU.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

namespace metadistil {

constexpr int THREADS = 256;
constexpr int64_t MOST_BLOCKS = 2147483647;  // the x dimension of a grid

inline unsigned blocks(int64_t elements) {
  return static_cast<unsigned>(std::min((elements + THREADS - 1) / THREADS, MOST_BLOCKS));
}

// To nearest, ties to even; float64 rounds twice, as torch's conversion does.
template <typename T>
__device__ inline __nv_bfloat16 to_bf16(T value) {
  return __float2bfloat16_rn(static_cast<float>(value));
}

// s = w;  w = w + alpha g;  b = bf16(w)
template <typename T>
__device__ inline void pilot_update(T* weight, T gradient, T* snapshot, __nv_bfloat16* shadow, T alpha) {
  const T before = *weight, after = before + alpha * gradient;
  if (snapshot) *snapshot = before;
  *weight = after;
  if (shadow) *shadow = to_bf16(after);
}

// w = s;  b = bf16(w). Loads and stores keep the bits of a NaN.
template <typename T>
__device__ inline void rewind(T* weight, T snapshot, __nv_bfloat16* shadow) {
  *weight = snapshot;
  if (shadow) *shadow = to_bf16(snapshot);
}

}  // namespace metadistil
