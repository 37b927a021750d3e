// Distillation over few classes, by the formulas of kd_rows.cpp. Row by row, as there, 2 classes take as long as 32:
// some 130 ns. Here 32 rows make a tile, each a lane, and sums over classes are sums of vectors: 8 ns a row of 2
// classes, 53 of 32 (loss and student's gradient in float32 with labels, AVX-512).
//
// A lane depends on no other, so a row that becomes NaN leaves its neighbours alone, and it changes no bit where a tile
// begins. The last tile is filled up with zeros, which are not written.
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kd_tiles.h"

namespace metadistil {
namespace {

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

template <typename T>
class Few {
 public:
  explicit Few(const KdCall& call) : call_(call) {
    t.classes = call.classes;
    t.temperature = call.temperature, t.inverse = static_cast<T>(1 / call.temperature);
    t.soft = call.soft, t.hard = call.hard;
    t.labelled = call.labels, t.sharp = t.labelled && call.temperature != 1;
    t.bent = std::any_of(call.cotangents.begin() + 1, call.cotangents.end(), [](auto& c) { return c.data; });
  }

  template <typename Body>
  void by_tile(int64_t begin, int64_t end, const Body& body) {
    for (row_ = begin; row_ < end; row_ += LANES) {
      n_ = std::min(LANES, end - row_);
      std::fill_n(t.broken, LANES, 0);
      body();
    }
  }

  void load() {
    gather(call_.student, t.s);
    load_mean();
    const auto label = [&](int64_t l) { return call_.labels[call_.label_starts(row_ + l)]; };
    for (int64_t l = 0; t.labelled && l < LANES; l++) {
      t.label[l] = l < n_ && label(l) != call_.ignore_index ? static_cast<Bits<T>>(label(l)) : -1;
    }
    const RowStarts& starts = call_.upstream.starts;
    if (!call_.upstream.data || (starts.sizes.empty() && starts.stride == 0)) {
      std::fill_n(t.u, LANES, scalar(call_.upstream, 0));
    } else {
      for (int64_t l = 0; l < LANES; l++) t.u[l] = l < n_ ? scalar(call_.upstream, row_ + l) : 0;
    }
  }

  void load_mean() { mix(call_.teachers.data(), t.m, true); }

  void load_cotangents() {
    gather(call_.cotangents[0], t.S);
    finite_tile(t, t.S);
    if (!t.bent) return;
    mix(call_.cotangents.data() + 1, t.A, false);
    finite_tile(t, t.A);
  }

  void write(const Target& target, double weight = 1) {
    if (!target.data) return;
    by_element(target.data, target.element, [&](auto* data) {
      constexpr bool direct = std::is_same_v<decltype(data), T*>;
      const int64_t count = n_ * t.classes;
      auto* out = data + row_ * t.classes;
      T* rows = t.flat;
      if constexpr (direct) rows = n_ == LANES ? out : rows;
      to_rows_tile(t.part[0], static_cast<T>(weight), rows, t.classes);
      for (int64_t l = 0; l < n_; l++) {
        if (t.broken[l]) std::fill_n(rows + l * t.classes, t.classes, static_cast<T>(NOT_A_NUMBER));
      }
      if constexpr (!direct) {
        narrow_block(rows, out, count);
      } else if (rows != out) {
        std::memcpy(out, rows, count * sizeof(T));
      }
    });
  }

  void write_weighted(const Target* targets) {
    for (size_t k = 0; k < call_.weights.size(); k++) write(targets[k], call_.weights[k]);
  }

  void write_rows() const {
    T* out = static_cast<T*>(call_.rows) + row_;
    for (int64_t l = 0; l < n_; l++) out[l] = t.broken[l] ? static_cast<T>(NOT_A_NUMBER) : t.value[l];
  }

  Tile<T> t;

 private:
  void gather(const Rows& rows, Lanes<T>* out) {
    const int64_t classes = t.classes, count = n_ * classes;
    if (!rows.data) {
      std::fill_n(out[0], classes * LANES, T());
      return;
    }
    by_element(rows.data, rows.element, [&](const auto* data) {
      if (rows.step != 1 || !rows.starts.sizes.empty() || rows.starts.stride != classes) {
        for (int64_t l = 0; l < LANES; l++) {
          const auto* x = data + (l < n_ ? rows.starts(row_ + l) : 0);
          for (int64_t c = 0; c < classes; c++) out[c][l] = l < n_ ? static_cast<T>(number(x[c * rows.step])) : 0;
        }
        return;
      }
      const auto* x = data + row_ * classes;
      const T* from = t.flat;
      if constexpr (!std::is_same_v<decltype(x), const T*>) {
        widen_block(x, t.flat, count);
      } else if (n_ == LANES) {
        from = x;
      } else {
        std::memcpy(t.flat, x, count * sizeof(T));
      }
      std::fill(t.flat + count, t.flat + LANES * classes, T());
      to_lanes_tile(from, out[0], classes);
    });
  }

  // sum_k w_k x_k over those there are
  void mix(const Rows* rows, Lanes<T>* out, bool guarded) {
    bool first = true;
    for (size_t k = 0; k < call_.weights.size(); k++) {
      if (!rows[k].data) continue;
      gather(rows[k], t.part);
      mix_tile(t, out, static_cast<T>(call_.weights[k]), std::exchange(first, false), guarded);
    }
  }

  const KdCall& call_;
  int64_t row_ = 0, n_ = 0;
};

}  // namespace

template <typename T>
void kd_first_few(const KdCall& call, int64_t begin, int64_t end) {
  Few<T> x(call);
  const auto wanted = [](const Target& target) { return target.data; };
  const bool teachers = std::any_of(call.gradients.begin() + 1, call.gradients.end(), wanted);
  x.by_tile(begin, end, [&] {
    x.load();
    soften_tile(x.t);
    if (call.rows) losses_tile(x.t), x.write_rows();
    factors_tile(x.t, call.temperature);
    if (call.gradients[0].data) first_to_student_tile(x.t), x.write(call.gradients[0]);
    if (teachers) first_to_teachers_tile(x.t), x.write_weighted(call.gradients.data() + 1);
  });
}

template <typename T>
void kd_second_few(const KdCall& call, int64_t begin, int64_t end) {
  Few<T> x(call);
  x.by_tile(begin, end, [&] {
    x.load();
    x.load_cotangents();
    soften_tile(x.t);
    second_tile(x.t);
    x.write_rows();
    factors_tile(x.t, 1);
    second_to_student_tile(x.t);
    x.write(call.gradients[0]);
    second_to_teachers_tile(x.t);
    x.write_weighted(call.gradients.data() + 1);
  });
}

template <typename T>
void kd_cotangent_few(const KdCall& call, int64_t begin, int64_t end) {
  Few<T> x(call);
  x.by_tile(begin, end, [&] {
    x.load_mean();
    x.load_cotangents();
    cotangent_tile(x.t);
    x.write_weighted(call.gradients.data());
  });
}

template void kd_first_few<float>(const KdCall&, int64_t, int64_t);
template void kd_first_few<double>(const KdCall&, int64_t, int64_t);
template void kd_second_few<float>(const KdCall&, int64_t, int64_t);
template void kd_second_few<double>(const KdCall&, int64_t, int64_t);
template void kd_cotangent_few<float>(const KdCall&, int64_t, int64_t);
template void kd_cotangent_few<double>(const KdCall&, int64_t, int64_t);

}  // namespace metadistil
