// What each operation accepts, on every device: raised before anything is written, and by the fake implementations too.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>

namespace metadistil {

using OptionalTensor = std::optional<at::Tensor>;

void check_pilot_update(const at::Tensor& weights, const at::Tensor& gradient, const at::Tensor& snapshot,
                        const at::Tensor& alpha, const OptionalTensor& shadow);
void check_rewind(const at::Tensor& weights, const at::Tensor& snapshot, const OptionalTensor& shadow);
void check_adamw(const at::Tensor& weights, const at::Tensor& gradient, const at::Tensor& exp_avg,
                 const at::Tensor& exp_avg_sq, const at::Tensor& step, const at::Tensor& lr,
                 const OptionalTensor& clip, const OptionalTensor& found_inf, const OptionalTensor& shadow);
void check_row_axpy(const at::Tensor& table, const at::Tensor& rows, const at::Tensor& values, const at::Tensor& alpha,
                    const OptionalTensor& snapshot, const OptionalTensor& shadow);
void check_row_rewind(const at::Tensor& table, const at::Tensor& rows, const at::Tensor& snapshot,
                      const OptionalTensor& shadow);

// The written tensors share no memory with each other or with those that are read. Asks for addresses, so fake tensors
// have no part in it.
void check_disjoint(const char* op, std::initializer_list<OptionalTensor> written,
                    std::initializer_list<OptionalTensor> read);

}  // namespace metadistil
