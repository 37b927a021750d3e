// The operations for CUDA tensors: flat.cu and rows.cu hold the formulas. Compiled only where torch is a CUDA build.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../checks.h"
#include "launch.h"

namespace metadistil {
namespace {

void* bits(const OptionalTensor& shadow) { return shadow ? shadow->mutable_data_ptr() : nullptr; }

template <typename T>
T* data(const OptionalTensor& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

template <typename T>
const T* read(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

Scalar scalar(const OptionalTensor& tensor) {
  if (!tensor) return {nullptr, false};
  return {tensor->const_data_ptr(), tensor->scalar_type() == at::kDouble};
}

// `body` with a value of the tensor's element type and the current stream of its device.
template <typename Body>
void launch(const at::Tensor& tensor, Body body) {
  const c10::cuda::CUDAGuard guard(tensor.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  C10_CUDA_CHECK(tensor.scalar_type() == at::kDouble ? body(double(), stream) : body(float(), stream));
}

void pilot_update(at::Tensor weights, const at::Tensor& gradient, at::Tensor snapshot, const at::Tensor& alpha,
                  OptionalTensor shadow) {
  check_pilot_update(weights, gradient, snapshot, alpha, shadow);
  check_disjoint("pilot_update", {weights, snapshot, shadow}, {gradient, alpha});
  launch(weights, [&](auto zero, cudaStream_t stream) {
    using T = decltype(zero);
    return launch_pilot_update(data<T>(weights), read<T>(gradient), data<T>(snapshot), bits(shadow), read<T>(alpha),
                               weights.numel(), stream);
  });
}

void rewind(at::Tensor weights, const at::Tensor& snapshot, OptionalTensor shadow) {
  check_rewind(weights, snapshot, shadow);
  check_disjoint("rewind", {weights, shadow}, {snapshot});
  launch(weights, [&](auto zero, cudaStream_t stream) {
    using T = decltype(zero);
    return launch_rewind(data<T>(weights), read<T>(snapshot), bits(shadow), weights.numel(), stream);
  });
}

void adamw(at::Tensor weights, const at::Tensor& gradient, at::Tensor exp_avg, at::Tensor exp_avg_sq,
           const at::Tensor& step, const at::Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
           const OptionalTensor& clip, const OptionalTensor& found_inf, OptionalTensor shadow) {
  check_adamw(weights, gradient, exp_avg, exp_avg_sq, step, lr, clip, found_inf, shadow);
  check_disjoint("adamw", {weights, exp_avg, exp_avg_sq, shadow}, {gradient, step, lr, clip, found_inf});
  launch(weights, [&](auto zero, cudaStream_t stream) {
    using T = decltype(zero);
    return launch_adamw(data<T>(weights), read<T>(gradient), data<T>(exp_avg), data<T>(exp_avg_sq), bits(shadow),
                        scalar(step), scalar(lr), scalar(clip), scalar(found_inf), beta1, beta2, eps, weight_decay,
                        weights.numel(), stream);
  });
}

void row_axpy(at::Tensor table, const at::Tensor& rows, const at::Tensor& values, const at::Tensor& alpha,
              OptionalTensor snapshot, OptionalTensor shadow) {
  check_row_axpy(table, rows, values, alpha, snapshot, shadow);
  check_disjoint("row_axpy", {table, snapshot, shadow}, {rows, values, alpha});
  launch(table, [&](auto zero, cudaStream_t stream) {
    using T = decltype(zero);
    return launch_row_axpy(data<T>(table), read<int64_t>(rows), read<T>(values), data<T>(snapshot), bits(shadow),
                           read<T>(alpha), table.size(0), table.size(1), rows.numel(), stream);
  });
}

void row_rewind(at::Tensor table, const at::Tensor& rows, const at::Tensor& snapshot, OptionalTensor shadow) {
  check_row_rewind(table, rows, snapshot, shadow);
  check_disjoint("row_rewind", {table, shadow}, {rows, snapshot});
  launch(table, [&](auto zero, cudaStream_t stream) {
    using T = decltype(zero);
    return launch_row_rewind(data<T>(table), read<int64_t>(rows), read<T>(snapshot), bits(shadow), table.size(0),
                             table.size(1), rows.numel(), stream);
  });
}

}  // namespace
}  // namespace metadistil

TORCH_LIBRARY_IMPL(metadistil, CUDA, library) {
  library.impl("pilot_update", &metadistil::pilot_update);
  library.impl("rewind", &metadistil::rewind);
  library.impl("adamw", &metadistil::adamw);
  library.impl("row_axpy", &metadistil::row_axpy);
  library.impl("row_rewind", &metadistil::row_rewind);
}
