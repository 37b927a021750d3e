// Launchers of the kernels: raw device pointers and a stream, without torch, so that nvcc alone compiles them. Each
// returns what the launch itself answered; nothing waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace metadistil {

// A float32 or float64 number in device memory; a null pointer is an argument that was not given.
struct Scalar {
  const void* data;
  bool is_double;
};

// Each for T = float and T = double. `snapshot` and `shadow` (bfloat16) may be null.
template <typename T>
cudaError_t launch_pilot_update(T* weights, const T* gradient, T* snapshot, void* shadow, const T* alpha, int64_t n,
                                cudaStream_t stream);
template <typename T>
cudaError_t launch_rewind(T* weights, const T* snapshot, void* shadow, int64_t n, cudaStream_t stream);
template <typename T>
cudaError_t launch_adamw(T* weights, const T* gradient, T* exp_avg, T* exp_avg_sq, void* shadow, Scalar step, Scalar lr,
                         Scalar clip, Scalar found_inf, double beta1, double beta2, double eps, double weight_decay,
                         int64_t n, cudaStream_t stream);
template <typename T>
cudaError_t launch_row_axpy(T* table, const int64_t* rows, const T* values, T* snapshot, void* shadow, const T* alpha,
                            int64_t length, int64_t width, int64_t n, cudaStream_t stream);
template <typename T>
cudaError_t launch_row_rewind(T* table, const int64_t* rows, const T* snapshot, void* shadow, int64_t length,
                              int64_t width, int64_t n, cudaStream_t stream);

}  // namespace metadistil
