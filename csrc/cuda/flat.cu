// Operations on flat weights [n], one thread an element:
//
//     pilot_update   s = w;  w = w + alpha g;  b = bf16(w)
//     rewind         w = s;  b = bf16(w)
//     adamw          g = clip g
//                    m = m + (1 - beta1)(g - m)
//                    v = beta2 v + (1 - beta2) g g
//                    w = (1 - lr decay) w - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps);  b = bf16(w)
//
// Source: Loshchilov and Hutter (2019), written as torch.optim.AdamW does. Scalars are read on the
// device: no host sync.
#include "common.cuh"
#include "launch.h"

namespace metadistil {
namespace {

template <typename T>
__global__ void pilot_update_kernel(T* weights,             // [n]
                                    const T* gradient,      // [n]
                                    T* snapshot,            // [n]
                                    __nv_bfloat16* shadow,  // [n] or null
                                    const T* alpha,         // []
                                    int64_t n) {
  const T factor = *alpha;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < n; i += stride)
    pilot_update(weights + i, gradient[i], snapshot + i, shadow ? shadow + i : nullptr, factor);
}

template <typename T>
__global__ void rewind_kernel(T* weights,             // [n]
                              const T* snapshot,      // [n]
                              __nv_bfloat16* shadow,  // [n] or null
                              int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < n; i += stride)
    rewind(weights + i, snapshot[i], shadow ? shadow + i : nullptr);
}

__device__ inline double value(Scalar scalar) {
  return scalar.is_double ? *static_cast<const double*>(scalar.data) : *static_cast<const float*>(scalar.data);
}

template <typename T>
__global__ void adamw_kernel(T* weights,             // [n]
                             const T* gradient,      // [n]
                             T* exp_avg,             // [n]
                             T* exp_avg_sq,          // [n]
                             __nv_bfloat16* shadow,  // [n] or null
                             Scalar step, Scalar lr, Scalar clip, Scalar found_inf, double beta1, double beta2,
                             double eps, double weight_decay, int64_t n) {
  if (found_inf.data && value(found_inf) != 0) return;
  __shared__ T clip_, decay, step_size, correction2;  // powers in float64 are dear: one thread a block takes them
  if (threadIdx.x == 0) {
    const double rate = value(lr), t = value(step);
    clip_ = static_cast<T>(clip.data ? value(clip) : 1.0);
    decay = static_cast<T>(1 - rate * weight_decay);
    step_size = static_cast<T>(rate / (1 - pow(beta1, t)));
    correction2 = static_cast<T>(sqrt(1 - pow(beta2, t)));
  }
  __syncthreads();
  const T rest1 = static_cast<T>(1 - beta1), rest2 = static_cast<T>(1 - beta2);
  const T keep2 = static_cast<T>(beta2), epsilon = static_cast<T>(eps);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < n; i += stride) {
    const T g = clip_ * gradient[i];
    const T m = exp_avg[i] + rest1 * (g - exp_avg[i]);
    const T v = keep2 * exp_avg_sq[i] + rest2 * g * g;
    const T w = decay * weights[i] - step_size * m / (sqrt(v) / correction2 + epsilon);
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weights[i] = w;
    if (shadow) shadow[i] = to_bf16(w);
  }
}

}  // namespace

template <typename T>
cudaError_t launch_pilot_update(T* weights, const T* gradient, T* snapshot, void* shadow, const T* alpha, int64_t n,
                                cudaStream_t stream) {
  if (n == 0) return cudaSuccess;  // a grid of no blocks is an error
  pilot_update_kernel<<<blocks(n), THREADS, 0, stream>>>(weights, gradient, snapshot,
                                                         static_cast<__nv_bfloat16*>(shadow), alpha, n);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_rewind(T* weights, const T* snapshot, void* shadow, int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  rewind_kernel<<<blocks(n), THREADS, 0, stream>>>(weights, snapshot, static_cast<__nv_bfloat16*>(shadow), n);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_adamw(T* weights, const T* gradient, T* exp_avg, T* exp_avg_sq, void* shadow, Scalar step, Scalar lr,
                         Scalar clip, Scalar found_inf, double beta1, double beta2, double eps, double weight_decay,
                         int64_t n, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  adamw_kernel<<<blocks((n + 3) / 4), THREADS, 0, stream>>>(  // 4 elements a thread share the powers of its block
      weights, gradient, exp_avg, exp_avg_sq, static_cast<__nv_bfloat16*>(shadow), step, lr, clip, found_inf, beta1,
      beta2, eps, weight_decay, n);
  return cudaGetLastError();
}

#define INSTANTIATE(T)                                                                                              \
  template cudaError_t launch_pilot_update<T>(T*, const T*, T*, void*, const T*, int64_t, cudaStream_t);            \
  template cudaError_t launch_rewind<T>(T*, const T*, void*, int64_t, cudaStream_t);                                \
  template cudaError_t launch_adamw<T>(T*, const T*, T*, T*, void*, Scalar, Scalar, Scalar, Scalar, double, double, \
                                       double, double, int64_t, cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace metadistil
