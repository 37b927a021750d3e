// Every message names the operation and the argument, says what it is and what it must be. Sizes are compared as
// symbols, so that the same functions serve torch.compile's fake tensors.
#include "checks.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <string>
#include <utility>
#include <vector>

namespace metadistil {
namespace {

std::string dtype(const at::Tensor& tensor) { return std::string(c10::getDtypeNames(tensor.scalar_type()).first); }

std::string described(const at::Tensor& tensor) {
  return c10::str(dtype(tensor), " ", tensor.sym_sizes(), tensor.is_contiguous() ? "" : " (not contiguous)", " on ",
                  tensor.device());
}

bool floating(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kDouble;
}

// The checks of one call; `model` is the tensor that the others have to fit.
class Check {
 public:
  Check(const char* op, const char* name, const at::Tensor& model, int64_t dim) : op_(op), name_(name), model_(model) {
    TORCH_CHECK_VALUE(floating(model) && model.dim() == dim && model.is_contiguous(), "metadistil::", op, ": ", name,
                      " is ", described(model), "; it must be float32 or float64, contiguous, with ", dim,
                      dim == 1 ? " dimension." : " dimensions.");
    without_gradient(name, model);
  }

  void like(const char* name, const at::Tensor& tensor) const {
    sized(name, tensor, model_.scalar_type(), model_.sym_sizes());
  }

  void sized(const char* name, const at::Tensor& tensor, at::ScalarType type, c10::SymIntArrayRef sizes) const {
    TORCH_CHECK_VALUE(tensor.scalar_type() == type && tensor.sym_sizes().equals(sizes) && tensor.is_contiguous() &&
                          tensor.device() == model_.device(),
                      "metadistil::", op_, ": ", name, " is ", described(tensor), "; it must be ",
                      c10::getDtypeNames(type).first, " ", sizes, ", contiguous, on ", model_.device(), ", to fit ",
                      name_, " ", described(model_), ".");
    without_gradient(name, tensor);
  }

  // [] of one type, or of float32 or float64
  void scalar(const char* name, const at::Tensor& tensor, std::optional<at::ScalarType> type = std::nullopt) const {
    TORCH_CHECK_VALUE((type ? tensor.scalar_type() == *type : floating(tensor)) && tensor.dim() == 0 &&
                          tensor.device() == model_.device(),
                      "metadistil::", op_, ": ", name, " is ", described(tensor), "; it must be ",
                      type ? std::string(c10::getDtypeNames(*type).first) : "float32 or float64", " [] on ",
                      model_.device(), ".");
    without_gradient(name, tensor);
  }

 private:
  void without_gradient(const char* name, const at::Tensor& tensor) const {
    TORCH_CHECK_VALUE(!(tensor.requires_grad() && at::GradMode::is_enabled()), "metadistil::", op_, ": ", name,
                      " requires grad, but the operation has no derivative; call it under torch.no_grad().");
  }

  const char* op_;
  const char* name_;
  const at::Tensor& model_;
};

// [V, H] table, [n] int64 rows -> the sizes [n, H] of what belongs to these rows
std::vector<c10::SymInt> check_rows(const char* op, const at::Tensor& table, const at::Tensor& rows) {
  TORCH_CHECK_VALUE(rows.scalar_type() == at::kLong && rows.dim() == 1 && rows.is_contiguous() &&
                        rows.device() == table.device(),
                    "metadistil::", op, ": rows is ", described(rows), "; it must be int64, contiguous, with 1 ",
                    "dimension, on ", table.device(), ".");
  return {rows.sym_size(0), table.sym_size(1)};
}

}  // namespace

void check_pilot_update(const at::Tensor& weights, const at::Tensor& gradient, const at::Tensor& snapshot,
                        const at::Tensor& alpha, const OptionalTensor& shadow) {
  const Check check("pilot_update", "weights", weights, 1);
  check.like("gradient", gradient);
  check.like("snapshot", snapshot);
  check.scalar("alpha", alpha, weights.scalar_type());
  if (shadow) check.sized("shadow", *shadow, at::kBFloat16, weights.sym_sizes());
}

void check_rewind(const at::Tensor& weights, const at::Tensor& snapshot, const OptionalTensor& shadow) {
  const Check check("rewind", "weights", weights, 1);
  check.like("snapshot", snapshot);
  if (shadow) check.sized("shadow", *shadow, at::kBFloat16, weights.sym_sizes());
}

void check_adamw(const at::Tensor& weights, const at::Tensor& gradient, const at::Tensor& exp_avg,
                 const at::Tensor& exp_avg_sq, const at::Tensor& step, const at::Tensor& lr,
                 const OptionalTensor& clip, const OptionalTensor& found_inf, const OptionalTensor& shadow) {
  const Check check("adamw", "weights", weights, 1);
  check.like("gradient", gradient);
  check.like("exp_avg", exp_avg);
  check.like("exp_avg_sq", exp_avg_sq);
  check.scalar("step", step);
  check.scalar("lr", lr);
  if (clip) check.scalar("clip", *clip);
  if (found_inf) check.scalar("found_inf", *found_inf);
  if (shadow) check.sized("shadow", *shadow, at::kBFloat16, weights.sym_sizes());
}

void check_row_axpy(const at::Tensor& table, const at::Tensor& rows, const at::Tensor& values, const at::Tensor& alpha,
                    const OptionalTensor& snapshot, const OptionalTensor& shadow) {
  const Check check("row_axpy", "table", table, 2);
  const auto sizes = check_rows("row_axpy", table, rows);
  check.sized("values", values, table.scalar_type(), sizes);
  check.scalar("alpha", alpha, table.scalar_type());
  if (snapshot) check.sized("snapshot", *snapshot, table.scalar_type(), sizes);
  if (shadow) check.sized("shadow", *shadow, at::kBFloat16, table.sym_sizes());
}

void check_row_rewind(const at::Tensor& table, const at::Tensor& rows, const at::Tensor& snapshot,
                      const OptionalTensor& shadow) {
  const Check check("row_rewind", "table", table, 2);
  const auto sizes = check_rows("row_rewind", table, rows);
  check.sized("snapshot", snapshot, table.scalar_type(), sizes);
  if (shadow) check.sized("shadow", *shadow, at::kBFloat16, table.sym_sizes());
}

void check_disjoint(const char* op, std::initializer_list<OptionalTensor> written,
                    std::initializer_list<OptionalTensor> read) {
  std::vector<std::pair<const char*, const char*>> spans;  // the written ones first
  for (const auto& list : {written, read}) {
    for (const auto& tensor : list) {
      if (!tensor || tensor->numel() == 0) {
        spans.emplace_back(nullptr, nullptr);
        continue;
      }
      const char* begin = static_cast<const char*>(tensor->const_data_ptr());
      spans.emplace_back(begin, begin + tensor->nbytes());
    }
  }
  for (size_t i = 0; i < written.size(); i++) {
    for (size_t j = i + 1; j < spans.size(); j++) {
      TORCH_CHECK_VALUE(spans[i].first >= spans[j].second || spans[j].first >= spans[i].second, "metadistil::", op,
                        ": argument tensors share memory, and one of them is written; each needs memory of its own.");
    }
  }
}

}  // namespace metadistil
