// Distillation over rows, without torch, so that the compiler sees nothing but loops; kd_rows.cpp has the formulas.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace metadistil {

enum class Element { f32, f64, bf16, f16 };

// Where the rows of a tensor begin, in elements: any view of any number of dimensions is read where it lies.
struct RowStarts {
  int64_t stride = 0;                   // between rows, where one number says it
  std::vector<int64_t> sizes, strides;  // else those of the leading dimensions, the last one first

  int64_t operator()(int64_t row) const {
    if (sizes.empty()) return row * stride;
    int64_t start = 0;
    for (size_t d = 0; d < sizes.size(); row /= sizes[d++]) start += row % sizes[d] * strides[d];
    return start;
  }
};

struct Rows {
  const void* data = nullptr;  // null for a tensor that is absent
  Element element = Element::f32;
  int64_t step = 1;  // between classes
  RowStarts starts;
};

struct Target {  // contiguous
  void* data = nullptr;
  Element element = Element::f32;
};

// What one call computes with. Every number of a row comes from this row alone, so threads may share the rows out.
struct KdCall {
  int64_t classes = 0;
  double temperature = 1, soft = 1, hard = 0;  // soft_scale alpha and hard_scale (1 - alpha)
  Rows student;
  std::vector<Rows> teachers;
  std::vector<double> weights;
  const int64_t* labels = nullptr;  // all of them in 0 ... classes - 1 or ignored
  RowStarts label_starts;
  int64_t ignore_index = -100;
  Rows upstream;                  // without classes; 1 where absent
  std::vector<Rows> cotangents;   // of the student, then of the teachers
  std::vector<Target> gradients;  // to the student, then to the teachers
  void* rows = nullptr;           // T: the losses, or what goes to the upstream
};

// T is what is computed in, float or double. Rows `begin` to `end`, with scratch for this call alone.
template <typename T>
void kd_first_rows(const KdCall& call, int64_t begin, int64_t end);
template <typename T>
void kd_second_rows(const KdCall& call, int64_t begin, int64_t end);
// `cotangents[0]` is the tangent, `soft` the factor and `gradients` the teachers'.
template <typename T>
void kd_cotangent_rows(const KdCall& call, int64_t begin, int64_t end);

// The same for up to so many classes, to which those above hand over. At 32 they fill their vectors and still take 1.1
// (double) to 1.8 times as long, at 17 two to five times.
constexpr int64_t FEW = 32;
template <typename T>
void kd_first_few(const KdCall& call, int64_t begin, int64_t end);
template <typename T>
void kd_second_few(const KdCall& call, int64_t begin, int64_t end);
template <typename T>
void kd_cotangent_few(const KdCall& call, int64_t begin, int64_t end);

}  // namespace metadistil
