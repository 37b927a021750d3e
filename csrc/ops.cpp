// Schemas of the operations, and what runs them on a CPU and for fake tensors; spans.cpp holds the formulas. Mutation
// stands in the schema. Nothing here bumps version counters: a graph recorded before an excursion stays valid after it.
//
// Every element is computed from its own inputs alone, so the bits do not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "spans.h"

namespace metadistil {
namespace {

constexpr int64_t GRAIN = 32768;  // elements that are worth a thread: 128 KiB of float32

uint16_t* bits(const OptionalTensor& shadow) {
  return shadow ? static_cast<uint16_t*>(shadow->mutable_data_ptr()) : nullptr;
}

template <typename T>
T* data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* read(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

double value(const at::Tensor& scalar) {
  return scalar.scalar_type() == at::kDouble ? *read<double>(scalar) : *read<float>(scalar);
}

// `body` with a value of the tensor's element type.
template <typename Body>
void by_type(const at::Tensor& tensor, Body body) {
  tensor.scalar_type() == at::kDouble ? body(double()) : body(float());
}

template <typename T>
T* at_offset(T* pointer, int64_t offset) {
  return pointer ? pointer + offset : nullptr;
}

void pilot_update(at::Tensor weights, const at::Tensor& gradient, at::Tensor snapshot, const at::Tensor& alpha,
                  OptionalTensor shadow) {
  check_pilot_update(weights, gradient, snapshot, alpha, shadow);
  check_disjoint("pilot_update", {weights, snapshot, shadow}, {gradient, alpha});
  by_type(weights, [&](auto zero) {
    using T = decltype(zero);
    T *w = data<T>(weights), *s = data<T>(snapshot);
    const T *g = read<T>(gradient), factor = *read<T>(alpha);
    uint16_t* b = bits(shadow);
    at::parallel_for(0, weights.numel(), GRAIN, [&](int64_t i, int64_t end) {
      pilot_update_span(w + i, g + i, s + i, at_offset(b, i), factor, end - i);
    });
  });
}

void rewind(at::Tensor weights, const at::Tensor& snapshot, OptionalTensor shadow) {
  check_rewind(weights, snapshot, shadow);
  check_disjoint("rewind", {weights, shadow}, {snapshot});
  by_type(weights, [&](auto zero) {
    using T = decltype(zero);
    T* w = data<T>(weights);
    const T* s = read<T>(snapshot);
    uint16_t* b = bits(shadow);
    at::parallel_for(0, weights.numel(), GRAIN,
                     [&](int64_t i, int64_t end) { rewind_span(w + i, s + i, at_offset(b, i), end - i); });
  });
}

void adamw(at::Tensor weights, const at::Tensor& gradient, at::Tensor exp_avg, at::Tensor exp_avg_sq,
           const at::Tensor& step, const at::Tensor& lr, double beta1, double beta2, double eps, double weight_decay,
           const OptionalTensor& clip, const OptionalTensor& found_inf, OptionalTensor shadow) {
  check_adamw(weights, gradient, exp_avg, exp_avg_sq, step, lr, clip, found_inf, shadow);
  check_disjoint("adamw", {weights, exp_avg, exp_avg_sq, shadow}, {gradient, step, lr, clip, found_inf});
  if (found_inf && value(*found_inf) != 0) return;
  const double rate = value(lr), t = value(step);
  by_type(weights, [&](auto zero) {
    using T = decltype(zero);
    const AdamwFactors<T> factors{static_cast<T>(clip ? value(*clip) : 1.0),
                                  static_cast<T>(1 - rate * weight_decay),
                                  static_cast<T>(1 - beta1),
                                  static_cast<T>(beta2),
                                  static_cast<T>(1 - beta2),
                                  static_cast<T>(rate / (1 - std::pow(beta1, t))),
                                  static_cast<T>(std::sqrt(1 - std::pow(beta2, t))),
                                  static_cast<T>(eps)};
    T *w = data<T>(weights), *m = data<T>(exp_avg), *v = data<T>(exp_avg_sq);
    const T* g = read<T>(gradient);
    uint16_t* b = bits(shadow);
    at::parallel_for(0, weights.numel(), GRAIN, [&](int64_t i, int64_t end) {
      adamw_span(w + i, g + i, m + i, v + i, at_offset(b, i), factors, end - i);
    });
  });
}

// Row by row in parallel; `body(r, row)` gets the place in `rows` and what stands there. All rows are looked at first,
// so that a bad one leaves the table as it was.
template <typename Body>
void over_rows(const char* op, const at::Tensor& table, const at::Tensor& rows, Body body) {
  const int64_t* row = read<int64_t>(rows);
  const int64_t length = table.size(0), width = table.size(1);
  for (int64_t r = 0; r < rows.numel(); r++) {
    TORCH_CHECK_INDEX(row[r] >= 0 && row[r] < length, "metadistil::", op, ": rows[", r, "] is ", row[r],
                      "; the table has rows 0 to ", length - 1, ".");
  }
  if (width == 0) return;
  at::parallel_for(0, rows.numel(), std::max<int64_t>(1, GRAIN / width), [&](int64_t r, int64_t end) {
    for (; r < end; r++) body(r, row[r]);
  });
}

void row_axpy(at::Tensor table, const at::Tensor& rows, const at::Tensor& values, const at::Tensor& alpha,
              OptionalTensor snapshot, OptionalTensor shadow) {
  check_row_axpy(table, rows, values, alpha, snapshot, shadow);
  check_disjoint("row_axpy", {table, snapshot, shadow}, {rows, values, alpha});
  by_type(table, [&](auto zero) {
    using T = decltype(zero);
    T *w = data<T>(table), *s = snapshot ? data<T>(*snapshot) : nullptr;
    const T *g = read<T>(values), factor = *read<T>(alpha);
    uint16_t* b = bits(shadow);
    const int64_t width = table.size(1);
    over_rows("row_axpy", table, rows, [&](int64_t r, int64_t row) {
      pilot_update_span(w + row * width, g + r * width, at_offset(s, r * width), at_offset(b, row * width), factor,
                        width);
    });
  });
}

void row_rewind(at::Tensor table, const at::Tensor& rows, const at::Tensor& snapshot, OptionalTensor shadow) {
  check_row_rewind(table, rows, snapshot, shadow);
  check_disjoint("row_rewind", {table, shadow}, {rows, snapshot});
  by_type(table, [&](auto zero) {
    using T = decltype(zero);
    T* w = data<T>(table);
    const T* s = read<T>(snapshot);
    uint16_t* b = bits(shadow);
    const int64_t width = table.size(1);
    over_rows("row_rewind", table, rows, [&](int64_t r, int64_t row) {
      rewind_span(w + row * width, s + r * width, at_offset(b, row * width), width);
    });
  });
}

// Fake tensors: the checks are all there is to do, since nothing is returned.

void fake_pilot_update(at::Tensor weights, const at::Tensor& gradient, at::Tensor snapshot, const at::Tensor& alpha,
                       OptionalTensor shadow) {
  check_pilot_update(weights, gradient, snapshot, alpha, shadow);
}

void fake_rewind(at::Tensor weights, const at::Tensor& snapshot, OptionalTensor shadow) {
  check_rewind(weights, snapshot, shadow);
}

void fake_adamw(at::Tensor weights, const at::Tensor& gradient, at::Tensor exp_avg, at::Tensor exp_avg_sq,
                const at::Tensor& step, const at::Tensor& lr, double, double, double, double,
                const OptionalTensor& clip, const OptionalTensor& found_inf, OptionalTensor shadow) {
  check_adamw(weights, gradient, exp_avg, exp_avg_sq, step, lr, clip, found_inf, shadow);
}

void fake_row_axpy(at::Tensor table, const at::Tensor& rows, const at::Tensor& values, const at::Tensor& alpha,
                   OptionalTensor snapshot, OptionalTensor shadow) {
  check_row_axpy(table, rows, values, alpha, snapshot, shadow);
}

void fake_row_rewind(at::Tensor table, const at::Tensor& rows, const at::Tensor& snapshot, OptionalTensor shadow) {
  check_row_rewind(table, rows, snapshot, shadow);
}

}  // namespace
}  // namespace metadistil

TORCH_LIBRARY(metadistil, library) {
  library.def(
      "pilot_update(Tensor(a!) weights, Tensor gradient, Tensor(b!) snapshot, Tensor alpha, Tensor(c!)? shadow=None)"
      " -> ()");
  library.def("rewind(Tensor(a!) weights, Tensor snapshot, Tensor(b!)? shadow=None) -> ()");
  library.def(
      "adamw(Tensor(a!) weights, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor step, Tensor lr,"
      " float beta1, float beta2, float eps, float weight_decay, Tensor? clip=None, Tensor? found_inf=None,"
      " Tensor(d!)? shadow=None) -> ()");
  library.def(
      "row_axpy(Tensor(a!) table, Tensor rows, Tensor values, Tensor alpha, Tensor(b!)? snapshot=None,"
      " Tensor(c!)? shadow=None) -> ()");
  library.def("row_rewind(Tensor(a!) table, Tensor rows, Tensor snapshot, Tensor(b!)? shadow=None) -> ()");
}

TORCH_LIBRARY_IMPL(metadistil, CPU, library) {
  library.impl("pilot_update", &metadistil::pilot_update);
  library.impl("rewind", &metadistil::rewind);
  library.impl("adamw", &metadistil::adamw);
  library.impl("row_axpy", &metadistil::row_axpy);
  library.impl("row_rewind", &metadistil::row_rewind);
}

TORCH_LIBRARY_IMPL(metadistil, Meta, library) {
  library.impl("pilot_update", &metadistil::fake_pilot_update);
  library.impl("rewind", &metadistil::fake_rewind);
  library.impl("adamw", &metadistil::fake_adamw);
  library.impl("row_axpy", &metadistil::fake_row_axpy);
  library.impl("row_rewind", &metadistil::fake_row_rewind);
}
