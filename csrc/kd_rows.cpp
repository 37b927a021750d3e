// Per row of C classes, with s the student's logits, z_k those of teachers, m = sum_k w_k z_k, temperature T, label y,
// u the upstream gradient, c = soft_scale alpha and g = hard_scale (1 - alpha), 0 where there is no label to learn:
//
//     p = softmax(m/T), q = softmax(s/T), q1 = softmax(s), h = log p - log q, KL = <p, h>
//     loss    c T^2 KL + g CE(s, y)
//     to s    u (c T (q - p) + g (q1 - onehot y))
//     to z_k  u w_k c T p (h - KL)
//
// and with cotangents S on the gradient to s and A_k on those to z_k, A = sum_k w_k A_k, a = A - <p, A>,
// V = <p, a (h - KL)>:
//
//     to u    c T (<q, S> - <p, S> + V) + g (<q1, S> - S_y)
//     to s    u c (q (S - <q, S>) - p a) + u g q1 (S - <q1, S>)
//     to z_k  u w_k c p (<p, S> - S + a (1 + h - KL) - V)
//
// The cotangent of a tangent v: to z_k, w_k factor p (v - <p, v>).
// Source: Hinton, Vinyals and Dean (2015) over averaged logits, and its derivatives.
//
// All is shifted by the maxima of s and m: with e = exp((m - max m)/T), E its sum, the same for the student, and
// d = ((m - max m) - (s - max s))/T, KL = <e, d>/E + log(E_student/E) and h - KL = d - <e, d>/E. A class with e = 0
// takes no part in sums over p, so a class at -inf for all carries nothing. A row with a NaN, a +inf or nothing above
// -inf becomes NaN as a whole.
//
// A row is gathered into scratch block by block, unless it can be read in place (a quarter less time at 32000 float32
// classes); exponentials stay there for every result. Sums run in lanes within a block, in double from block to block.
// Rows of few classes go to kd_few.cpp.
#include "kd_rows.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "kd_blocks.h"

namespace metadistil {
namespace {

BLOCKS(float)
BLOCKS(double)

constexpr int64_t BLOCK = 1024;  // 4 KiB of float: the few arrays of a step stay in the first-level cache
constexpr std::align_val_t LINE{64};
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

// One row at a time, in scratch that serves all rows of a thread.
template <typename T>
class Row {
 public:
  Row(const KdCall& call, bool keep_d, bool second)
      : call_(call), n_(call.classes), sharp_(call.labels && call.temperature != 1), keep_d_(keep_d) {
    const int64_t width = padded(n_), rows = 2 + sharp_ + keep_d_ + 2 * second;
    memory_.reset(static_cast<T*>(::operator new((rows * width + 2 * BLOCK) * sizeof(T), LINE)));
    T* next = memory_.get();
    for (T*& spare : spare_) spare = std::exchange(next, next + BLOCK);
    const auto take = [&](bool used) { return used ? std::exchange(next, next + width) : nullptr; };
    s = take(true), m = take(true), e1 = take(sharp_), d = take(keep_d_), S = take(second), A = take(second);
  }

  // Both logits of a row; false for one that becomes NaN.
  bool load(int64_t row) {
    label = call_.labels ? call_.labels[call_.label_starts(row)] : 0;
    counted = call_.labels && label != call_.ignore_index;
    own_s_ = in_place<T>(call_.student, row);
    Peak<T> top;
    by_block([&](int64_t i, int64_t n) {
      if (!stays(own_s_, n)) copy(call_.student, row, s, i, n, -INF);
      top.join(peak_block(logits(own_s_, s, i, n), padded(n)));
    });
    top_s_ = top.value();
    logit_ = counted ? static_cast<double>(*read(call_.student, row, label, spare_[0], 1)) - top_s_ : 0;
    return load_mean(row) && top.sound();
  }

  bool load_mean(int64_t row) {
    row_ = row;
    own_m_ = call_.weights.size() == 1 && call_.weights[0] == 1 ? in_place<T>(call_.teachers[0], row) : nullptr;
    Peak<T> top;
    bool below_inf = true;
    by_block([&](int64_t i, int64_t n) {
      if (!stays(own_m_, n)) {
        below_inf &= mix(call_.teachers.data(), m, i, n);
        pad(m + i, n, -INF);
      }
      top.join(peak_block(logits(own_m_, m, i, n), padded(n)));
    });
    top_m_ = top.value();
    return below_inf && top.sound();
  }

  // False for a row that becomes NaN: a cotangent that is not finite may meet a probability of zero.
  bool load_cotangents() {
    Peak<T> top;
    by_block([&](int64_t i, int64_t n) {
      call_.cotangents[0].data ? copy(call_.cotangents[0], row_, S, i, n, 0) : fill(S + i, padded(n), 0);
      mix(call_.cotangents.data() + 1, A, i, n);
      pad(A + i, n, 0);
      top.join(peak_block(S + i, padded(n)));
      top.join(peak_block(A + i, padded(n)));
    });
    return top.finite();
  }

  // From logits to exponentials and their sums.
  void soften() {
    const T inverse = static_cast<T>(1 / call_.temperature);
    double sum_e1 = 0, sum_d = 0;
    sum_s = sum_m = 0;
    by_block([&](int64_t i, int64_t n) {
      const int64_t wide = padded(n);
      T* differences = keep_d_ ? d + i : spare_[0];
      const T* student = logits(own_s_, s, i, n);
      if (sharp_ && counted) {
        exponentials_block(student, e1 + i, 1, top_s_, wide);
        sum_e1 += total_block(e1 + i, wide);
      }
      soften_block(student, logits(own_m_, m, i, n), s + i, m + i, differences, inverse, top_s_, top_m_, wide);
      sum_s += total_block(s + i, wide);
      sum_m += total_block(m + i, wide);
      sum_d += product_block(m + i, differences, wide);
    });
    sum_1 = sharp_ ? sum_e1 : sum_s;
    mean_d = sum_d / sum_m;
  }

  void soften_mean() {
    sum_m = 0;
    by_block([&](int64_t i, int64_t n) {
      exponentials_block(logits(own_m_, m, i, n), s + i, static_cast<T>(1 / call_.temperature), top_m_, padded(n));
      sum_m += total_block(s + i, padded(n));
    });
    std::swap(s, m);
  }

  const T* unsoftened() const { return sharp_ ? e1 : s; }  // at temperature 1, of a counted row

  double loss() const {
    const double divergence = mean_d + std::log(sum_s / sum_m);
    const double soft = call_.soft * call_.temperature * call_.temperature * divergence;
    return counted ? soft + call_.hard * (std::log(sum_1) - logit_) : soft;
  }

  template <typename Term>
  double sum_up(const Term& term) const {
    double sum = 0;
    by_block([&](int64_t i, int64_t n) { sum += term(i, padded(n)); });
    return sum;
  }

  // What `compute(out, i, n)` makes of each block, into the row of a gradient.
  template <typename Compute>
  void write(const Target& target, const Compute& compute) {
    if (!target.data) return;
    by_element(target.data, target.element, [&](auto* data) {
      by_block([&](int64_t i, int64_t n) {
        auto* out = data + row_ * n_ + i;
        if constexpr (std::is_same_v<decltype(out), T*>) {
          compute(out, i, n);
        } else {
          compute(spare_[0], i, n);
          narrow_block(spare_[0], out, n);
        }
      });
    });
  }

  // The same for all teachers, times their weights.
  template <typename Compute>
  void write_weighted(const Target* targets, const Compute& compute) {
    for (size_t k = 0; k < call_.weights.size(); k++) {
      write(targets[k], [&](T* out, int64_t i, int64_t n) {
        compute(spare_[1], i, n);
        weigh_block(spare_[1], static_cast<T>(call_.weights[k]), true, out, n);
      });
    }
  }

  void write_scalar(double value) const {
    if (call_.rows) static_cast<T*>(call_.rows)[row_] = static_cast<T>(value);
  }

  void spoil() {
    write_scalar(NOT_A_NUMBER);
    for (const Target& target : call_.gradients) {
      write(target, [](T* out, int64_t, int64_t n) { fill(out, n, NOT_A_NUMBER); });
    }
  }

  T *s, *m, *e1, *d, *S, *A;  // s and m hold logits, as far as they are not read in place, then exponentials
  double sum_s, sum_m, sum_1, mean_d;
  int64_t label;
  bool counted;

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, LINE); }
  };

  template <typename Body>
  void by_block(const Body& body) const {
    for (int64_t i = 0; i < n_; i += BLOCK) body(i, std::min(BLOCK, n_ - i));
  }

  // Blocks of a row in place are not gathered, except one with a tail: it has to be padded.
  static bool stays(const T* own, int64_t n) { return own && n % LANES == 0; }
  static const T* logits(const T* own, const T* gathered, int64_t i, int64_t n) {
    return (stays(own, n) ? own : gathered) + i;
  }

  static void fill(T* x, int64_t n, double value) { std::fill_n(x, n, static_cast<T>(value)); }
  static void pad(T* x, int64_t n, double value) { fill(x + n, padded(n) - n, value); }

  static void copy(const Rows& rows, int64_t row, T* out, int64_t i, int64_t n, double padding) {
    const T* x = read(rows, row, i, out + i, n);
    if (x != out + i) std::memcpy(out + i, x, n * sizeof(T));
    pad(out + i, n, padding);
  }

  // sum_k w_k x_k over those there are. False where one has a +inf that its weight turns into something else.
  bool mix(const Rows* rows, T* out, int64_t i, int64_t n) {
    bool first = true, below_inf = true;
    for (size_t k = 0; k < call_.weights.size(); k++) {
      if (!rows[k].data) continue;
      const T *x = read(rows[k], row_, i, spare_[0], n), weight = static_cast<T>(call_.weights[k]);
      if (weight < 0) below_inf &= peak_block(x, n).below_inf();
      weigh_block(x, weight, std::exchange(first, false), out + i, n);
    }
    if (first) fill(out + i, n, 0);
    return below_inf;
  }

  const KdCall& call_;
  const int64_t n_;
  const bool sharp_, keep_d_;
  int64_t row_ = 0;
  const T *own_s_, *own_m_;
  T top_s_, top_m_;
  double logit_;
  T* spare_[2];  // a block each
  std::unique_ptr<T, Free> memory_;
};

bool any(const KdCall& call) {
  return std::any_of(call.gradients.begin() + 1, call.gradients.end(), [](const Target& t) { return t.data; });
}

}  // namespace

template <typename T>
void kd_first_rows(const KdCall& call, int64_t begin, int64_t end) {
  if (call.classes <= FEW) return kd_first_few<T>(call, begin, end);
  Row<T> x(call, any(call), false);
  for (int64_t row = begin; row < end; row++) {
    if (!x.load(row)) {
      x.spoil();
      continue;
    }
    x.soften();
    if (call.rows) x.write_scalar(x.loss());
    const double u = scalar(call.upstream, row), uc = u * call.soft * call.temperature, ug = u * call.hard;
    const T a = uc / x.sum_s, b = -uc / x.sum_m, c = x.counted ? ug / x.sum_1 : 0;  // sum_1 is of counted rows alone
    x.write(call.gradients[0], [&](T* out, int64_t i, int64_t n) {
      combine_block(x.s + i, a, x.m + i, b, x.counted ? x.unsoftened() + i : nullptr, c, out, n);
      if (x.counted && x.label >= i && x.label < i + n) out[x.label - i] -= static_cast<T>(ug);
    });
    x.write_weighted(call.gradients.data() + 1, [&](T* out, int64_t i, int64_t n) {
      centred_block(x.m + i, -b, x.d + i, x.mean_d, false, out, n);
    });
  }
}

template <typename T>
void kd_second_rows(const KdCall& call, int64_t begin, int64_t end) {
  if (call.classes <= FEW) return kd_second_few<T>(call, begin, end);
  Row<T> x(call, true, true);
  const bool bent = std::any_of(call.cotangents.begin() + 1, call.cotangents.end(), [](auto& t) { return t.data; });
  for (int64_t row = begin; row < end; row++) {
    if (!x.load(row) || !x.load_cotangents()) {
      x.spoil();
      continue;
    }
    x.soften();
    const T* e1 = x.unsoftened();
    const auto mean = [&](const T* weights, double sum, const T* values) {
      return x.sum_up([&](int64_t i, int64_t n) { return dot_block(weights + i, values + i, n); }) / sum;
    };
    const double q_S = mean(x.s, x.sum_s, x.S), p_S = mean(x.m, x.sum_m, x.S), p_A = bent ? mean(x.m, x.sum_m, x.A) : 0;
    const double q1_S = x.counted ? mean(e1, x.sum_1, x.S) : 0;
    const auto covariance = [&](int64_t i, int64_t n) {
      return covariance_block(x.m + i, x.A + i, p_A, x.d + i, x.mean_d, n);
    };
    const double v = bent ? x.sum_up(covariance) / x.sum_m : 0;
    double to_u = call.soft * call.temperature * (q_S - p_S + v);
    if (x.counted) to_u += call.hard * (q1_S - x.S[x.label]);
    x.write_scalar(to_u);

    const double u = scalar(call.upstream, row), uc = u * call.soft;
    const T a = uc / x.sum_s, b = -uc / x.sum_m, c = x.counted ? u * call.hard / x.sum_1 : 0;
    x.write(call.gradients[0], [&](T* out, int64_t i, int64_t n) {
      centred_block(x.s + i, a, x.S + i, q_S, false, out, n);
      if (bent) centred_block(x.m + i, b, x.A + i, p_A, true, out, n);
      if (x.counted) centred_block(e1 + i, c, x.S + i, q1_S, true, out, n);
    });
    x.write_weighted(call.gradients.data() + 1, [&](T* out, int64_t i, int64_t n) {
      centred_block(x.m + i, b, x.S + i, p_S, false, out, n);
      if (bent) curved_block(x.m + i, -b, x.A + i, p_A, x.d + i, x.mean_d, v, out, n);
    });
  }
}

template <typename T>
void kd_cotangent_rows(const KdCall& call, int64_t begin, int64_t end) {
  if (call.classes <= FEW) return kd_cotangent_few<T>(call, begin, end);
  Row<T> x(call, false, true);
  for (int64_t row = begin; row < end; row++) {
    if (!x.load_mean(row) || !x.load_cotangents()) {
      x.spoil();
      continue;
    }
    x.soften_mean();
    const auto term = [&](int64_t i, int64_t n) { return dot_block(x.m + i, x.S + i, n); };
    const double mean = x.sum_up(term) / x.sum_m;
    x.write_weighted(call.gradients.data(), [&](T* out, int64_t i, int64_t n) {
      centred_block(x.m + i, call.soft / x.sum_m, x.S + i, mean, false, out, n);
    });
  }
}

template void kd_first_rows<float>(const KdCall&, int64_t, int64_t);
template void kd_first_rows<double>(const KdCall&, int64_t, int64_t);
template void kd_second_rows<float>(const KdCall&, int64_t, int64_t);
template void kd_second_rows<double>(const KdCall&, int64_t, int64_t);
template void kd_cotangent_rows<float>(const KdCall&, int64_t, int64_t);
template void kd_cotangent_rows<double>(const KdCall&, int64_t, int64_t);

}  // namespace metadistil
