// The kernels of knowledge distillation on a CPU: schemas, checks, where rows lie and which thread takes them; the
// formulas and loops are in kd_rows.cpp. Arithmetic is float32, or float64 where one of the logits is. Nothing here
// knows of autograd: an operation around it does.
#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "kd_rows.h"

namespace metadistil {
namespace {

using Flags = c10::List<bool>;

constexpr int64_t GRAIN = 16384;  // classes that are worth a thread: some ten microseconds

// Checks

std::string type_name(at::ScalarType type) { return std::string(c10::getDtypeNames(type).first); }

std::string described(const at::Tensor& tensor) {
  return c10::str(type_name(tensor.scalar_type()), " ", tensor.sizes(), " on ", tensor.device());
}

bool floating(const at::Tensor& tensor) {
  const auto type = tensor.scalar_type();
  return type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf;
}

Element element(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kDouble: return Element::f64;
    case at::kBFloat16: return Element::bf16;
    case at::kHalf: return Element::f16;
    default: return Element::f32;
  }
}

std::string numbered(const char* name, size_t i) { return c10::str(name, "[", i, "]"); }

// The checks of one call, all before anything is computed; `model` [..., C] is the tensor that the others have to fit.
class Check {
 public:
  Check(const char* op, const char* name, const at::Tensor& model) : op_(op), name_(name), model_(model) {
    TORCH_CHECK_VALUE(floating(model) && model.dim() >= 1 && model.size(-1) >= 1, "metadistil::", op, ": ", name,
                      " is ", described(model), "; it must be float32, float64, bfloat16 or float16, with at least ",
                      "one class in its last dimension.");
  }

  int64_t classes() const { return model_.size(-1); }
  at::IntArrayRef leading() const { return model_.sizes().slice(0, model_.dim() - 1); }

  void like(const std::string& name, const at::Tensor& tensor) const {
    TORCH_CHECK_VALUE(floating(tensor) && tensor.sizes() == model_.sizes() && tensor.device() == model_.device(),
                      "metadistil::", op_, ": ", name, " is ", described(tensor),
                      "; it must be float32, float64, bfloat16 or float16 ", model_.sizes(), " on ", model_.device(),
                      ", to fit ", name_, ".");
  }

  void at_least_one(at::TensorList teachers) const {
    TORCH_CHECK_VALUE(!teachers.empty(), "metadistil::", op_, ": teachers is empty; there must be at least one.");
  }

  void labels(const OptionalTensor& labels) const {
    TORCH_CHECK_VALUE(!labels || (labels->scalar_type() == at::kLong && labels->sizes() == leading() &&
                                  labels->device() == model_.device()),
                      "metadistil::", op_, ": labels is ", described(*labels), "; it must be int64 ", leading(), " on ",
                      model_.device(), ", to fit ", name_, ".");
  }

  void weights(const OptionalTensor& weights, at::ArrayRef<double> constants, int64_t count) const {
    if (weights) {
      TORCH_CHECK_VALUE(floating(*weights) && weights->dim() == 1 && weights->size(0) == count &&
                            weights->device() == model_.device(),
                        "metadistil::", op_, ": weights is ", described(*weights),
                        "; it must be float32, float64, bfloat16 or float16 [", count, "] on ", model_.device(),
                        ", one for each teacher.");
    } else {
      TORCH_CHECK_VALUE(static_cast<int64_t>(constants.size()) == count, "metadistil::", op_, ": constants has ",
                        constants.size(), " numbers; it must have ", count, ", one for each teacher.");
    }
  }

  void temperature(double temperature) const {
    TORCH_CHECK_VALUE(temperature > 0, "metadistil::", op_, ": temperature is ", temperature, "; it must be above 0.");
  }

  void hard_scale(const OptionalTensor& scale, at::ScalarType type) const {
    TORCH_CHECK_VALUE(
        !scale || (scale->scalar_type() == type && scale->dim() == 0 && scale->device() == model_.device()),
        "metadistil::", op_, ": hard_scale is ", described(*scale), "; it must be ", type_name(type), " [] on ",
        model_.device(), ".");
  }

  void upstream(const OptionalTensor& upstream) const {
    TORCH_CHECK_VALUE(!upstream || (floating(*upstream) && (upstream->dim() == 0 || upstream->sizes() == leading()) &&
                                    upstream->device() == model_.device()),
                      "metadistil::", op_, ": upstream is ", described(*upstream),
                      "; it must be float32, float64, bfloat16 or float16 [] or ", leading(), " on ", model_.device(),
                      ", to fit ", name_, ".");
  }

  void flags(const char* name, const Flags& flags, size_t count) const {
    TORCH_CHECK_VALUE(flags.size() == count, "metadistil::", op_, ": ", name, " has ", flags.size(),
                      " flags; it must have ", count, ", for the student and each teacher.");
  }

 private:
  const char* op_;
  const char* name_;
  const at::Tensor& model_;
};

// Memory

RowStarts starts(const at::Tensor& tensor, int64_t leading) {
  RowStarts result;
  for (int64_t d = leading - 1; d >= 0; d--) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    if (!result.sizes.empty() && stride == result.sizes.back() * result.strides.back()) {
      result.sizes.back() *= size;
    } else {
      result.sizes.push_back(size), result.strides.push_back(stride);
    }
  }
  if (result.sizes.size() > 1) return result;
  return {result.sizes.empty() ? 0 : result.strides[0], {}, {}};
}

Rows rows_of(const at::Tensor& tensor) {  // [..., C]
  const int64_t step = tensor.size(-1) == 1 ? 1 : tensor.stride(-1);
  return {tensor.const_data_ptr(), element(tensor), step, starts(tensor, tensor.dim() - 1)};
}

Target target(const at::Tensor& tensor) { return {tensor.mutable_data_ptr(), element(tensor)}; }

double number(const at::Tensor& tensor, int64_t i = 0) {  // of [] or [K]; item() would cost a microsecond
  if (tensor.dim()) i *= tensor.stride(0);
  switch (tensor.scalar_type()) {
    case at::kDouble: return tensor.const_data_ptr<double>()[i];
    case at::kBFloat16: return tensor.const_data_ptr<at::BFloat16>()[i];
    case at::kHalf: return tensor.const_data_ptr<at::Half>()[i];
    default: return tensor.const_data_ptr<float>()[i];
  }
}

at::ScalarType computed_in(const at::Tensor& first, at::TensorList others) {
  const auto wide = [](const at::Tensor& tensor) { return tensor.scalar_type() == at::kDouble; };
  return wide(first) || std::any_of(others.begin(), others.end(), wide) ? at::kDouble : at::kFloat;
}

std::vector<double> numbers(const OptionalTensor& weights, at::ArrayRef<double> constants) {
  if (!weights) return constants.vec();
  std::vector<double> result;
  for (int64_t k = 0; k < weights->size(0); k++) result.push_back(number(*weights, k));
  return result;
}

// `run(zero, begin, end)` over the rows, with a zero of the type that is computed in.
template <typename Run>
void over_rows(int64_t rows, int64_t classes, at::ScalarType type, Run run) {
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / classes), [&](int64_t begin, int64_t end) {
    type == at::kDouble ? run(double(), begin, end) : run(float(), begin, end);
  });
}

// What the losses and their derivatives share.
struct Call {
  Call(const char* op, const at::Tensor& student, at::TensorList teachers, const OptionalTensor& labels,
       const OptionalTensor& weights, at::ArrayRef<double> constants, double temperature, double alpha,
       int64_t ignore_index, double soft_scale, const OptionalTensor& hard_scale, const OptionalTensor& upstream)
      : check(op, "student", student), type(computed_in(student, teachers)) {
    check.at_least_one(teachers);
    for (size_t k = 0; k < teachers.size(); k++) check.like(numbered("teachers", k), teachers[k]);
    check.labels(labels);
    check.weights(weights, constants, teachers.size());
    check.temperature(temperature);
    check.hard_scale(hard_scale, type);
    check.upstream(upstream);
    const int64_t leading = student.dim() - 1;
    count = c10::multiply_integers(check.leading());
    kd.classes = check.classes();
    kd.temperature = temperature;
    kd.soft = soft_scale * alpha;
    kd.hard = (hard_scale ? number(*hard_scale) : 1) * (1 - alpha);
    kd.student = rows_of(student);
    for (const auto& teacher : teachers) kd.teachers.push_back(rows_of(teacher));
    kd.weights = numbers(weights, constants);
    if (upstream) {
      const int64_t dims = upstream->dim();
      kd.upstream = {upstream->const_data_ptr(), element(*upstream), 1, starts(*upstream, dims)};
    }
    kd.cotangents.resize(1 + teachers.size());
    kd.gradients.resize(1 + teachers.size());
    if (!labels) return;
    kd.labels = labels->const_data_ptr<int64_t>();
    kd.label_starts = starts(*labels, leading);
    kd.ignore_index = ignore_index;
    for (int64_t row = 0; row < count; row++) {
      const int64_t label = kd.labels[kd.label_starts(row)];
      TORCH_CHECK_INDEX(label == ignore_index || (label >= 0 && label < kd.classes), "metadistil::", op,
                        ": the label of row ", row, " is ", label, "; it must be 0 to ", kd.classes - 1,
                        ", or ignore_index ", ignore_index, ".");
    }
  }

  at::Tensor per_row(const at::Tensor& student) {
    at::Tensor result = at::empty(check.leading(), student.options().dtype(type));
    kd.rows = result.mutable_data_ptr();
    return result;
  }

  void allocate(const at::Tensor& student, at::TensorList teachers, const Flags& wanted,
                std::vector<at::Tensor>& results) {
    for (size_t i = 0; i < wanted.size(); i++) {
      if (!wanted.get(i)) continue;
      const at::Tensor& model = i ? teachers[i - 1] : student;
      results.push_back(at::empty(model.sizes(), model.options()));
      kd.gradients[i] = target(results.back());
    }
  }

  template <typename Run>
  void run(Run run) const {
    over_rows(count, kd.classes, type, run);
  }

  Check check;
  at::ScalarType type;
  int64_t count;  // rows
  KdCall kd;
};

std::vector<at::Tensor> kd_first(const at::Tensor& student, at::TensorList teachers, const OptionalTensor& labels,
                                 const OptionalTensor& weights, at::ArrayRef<double> constants, double temperature,
                                 double alpha, int64_t ignore_index, double soft_scale,
                                 const OptionalTensor& hard_scale, const OptionalTensor& upstream, bool rows,
                                 const Flags& wanted) {
  Call call("kd_first", student, teachers, labels, weights, constants, temperature, alpha, ignore_index, soft_scale,
            hard_scale, upstream);
  call.check.flags("wanted", wanted, 1 + teachers.size());
  std::vector<at::Tensor> results;
  if (rows) results.push_back(call.per_row(student));
  call.allocate(student, teachers, wanted, results);
  call.run([&](auto zero, int64_t begin, int64_t end) { kd_first_rows<decltype(zero)>(call.kd, begin, end); });
  return results;
}

at::Tensor kd_rows_(const at::Tensor& student, at::TensorList teachers, const OptionalTensor& labels,
                    const OptionalTensor& weights, at::ArrayRef<double> constants, double temperature, double alpha,
                    int64_t ignore_index, double soft_scale, const OptionalTensor& hard_scale) {
  Call call("kd_rows_", student, teachers, labels, weights, constants, temperature, alpha, ignore_index, soft_scale,
            hard_scale, std::nullopt);
  TORCH_CHECK_VALUE(student.is_contiguous(), "metadistil::kd_rows_: student is not contiguous; it is overwritten with ",
                    "its gradient and must be.");
  for (const auto& teacher : teachers) check_disjoint("kd_rows_", {student}, {teacher});
  call.kd.gradients[0] = target(student);
  at::Tensor rows = call.per_row(student);
  call.run([&](auto zero, int64_t begin, int64_t end) { kd_first_rows<decltype(zero)>(call.kd, begin, end); });
  return rows;
}

std::vector<at::Tensor> kd_second(const at::Tensor& upstream, const at::Tensor& student, at::TensorList teachers,
                                  const OptionalTensor& labels, const OptionalTensor& weights,
                                  at::ArrayRef<double> constants, double temperature, double alpha,
                                  int64_t ignore_index, double soft_scale, const OptionalTensor& hard_scale,
                                  at::TensorList cotangents, const Flags& given, const Flags& wanted) {
  Call call("kd_second", student, teachers, labels, weights, constants, temperature, alpha, ignore_index, soft_scale,
            hard_scale, upstream);
  call.check.flags("given", given, 1 + teachers.size());
  call.check.flags("wanted", wanted, 1 + teachers.size());
  const size_t count = std::count(given.begin(), given.end(), true);
  TORCH_CHECK_VALUE(cotangents.size() == count, "metadistil::kd_second: there are ", cotangents.size(),
                    " cotangents; given names ", count, ".");
  for (size_t i = 0, next = 0; i < given.size(); i++) {
    if (!given.get(i)) continue;
    call.check.like(numbered("cotangents", next), cotangents[next]);
    call.kd.cotangents[i] = rows_of(cotangents[next++]);
  }
  std::vector<at::Tensor> results{call.per_row(student)};
  call.allocate(student, teachers, wanted, results);
  call.run([&](auto zero, int64_t begin, int64_t end) { kd_second_rows<decltype(zero)>(call.kd, begin, end); });
  return results;
}

std::vector<at::Tensor> kd_cotangent(at::TensorList teachers, const at::Tensor& tangent, const OptionalTensor& weights,
                                     at::ArrayRef<double> constants, double temperature, double factor) {
  const Check check("kd_cotangent", "tangent", tangent);
  check.at_least_one(teachers);
  check.weights(weights, constants, teachers.size());
  check.temperature(temperature);
  const at::ScalarType type = computed_in(tangent, teachers);
  std::vector<at::Tensor> results;
  KdCall kd;
  kd.classes = check.classes();
  kd.temperature = temperature;
  kd.soft = factor;
  kd.weights = numbers(weights, constants);
  kd.cotangents.resize(1 + teachers.size());
  kd.cotangents[0] = rows_of(tangent);
  for (size_t k = 0; k < teachers.size(); k++) {
    check.like(numbered("teachers", k), teachers[k]);
    kd.teachers.push_back(rows_of(teachers[k]));
    results.push_back(at::empty(tangent.sizes(), tangent.options().dtype(type)));
    kd.gradients.push_back(target(results.back()));
  }
  over_rows(c10::multiply_integers(check.leading()), kd.classes, type, [&](auto zero, int64_t begin, int64_t end) {
    kd_cotangent_rows<decltype(zero)>(kd, begin, end);
  });
  return results;
}

}  // namespace
}  // namespace metadistil

// What every loss has: logits, labels, weights (a tensor or else the constants) and the settings.
#define LOSS                                                                                            \
  "Tensor[] teachers, Tensor? labels, Tensor? weights, float[] constants, float temperature, float alpha," \
  " int ignore_index, float soft_scale, Tensor? hard_scale"

TORCH_LIBRARY_FRAGMENT(metadistil, library) {
  library.def("kd_first(Tensor student, " LOSS ", Tensor? upstream, bool rows, bool[] wanted) -> Tensor[]");
  library.def("kd_rows_(Tensor(a!) student, " LOSS ") -> Tensor");
  library.def("kd_second(Tensor upstream, Tensor student, " LOSS
              ", Tensor[] cotangents, bool[] given, bool[] wanted) -> Tensor[]");
  library.def(
      "kd_cotangent(Tensor[] teachers, Tensor tangent, Tensor? weights, float[] constants, float temperature,"
      " float factor) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(metadistil, CPU, library) {
  library.impl("kd_first", &metadistil::kd_first);
  library.impl("kd_rows_", &metadistil::kd_rows_);
  library.impl("kd_second", &metadistil::kd_second);
  library.impl("kd_cotangent", &metadistil::kd_cotangent);
}
