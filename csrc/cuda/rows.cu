// Operations on rows of a table [V, H], one block a row; `rows` [n] are unique, so no two blocks write one place:
//
//     row_axpy     s_r = w[rows_r];  w[rows_r] = w[rows_r] + alpha g_r;  b[rows_r] = bf16(w[rows_r])
//     row_rewind   w[rows_r] = s_r;  b[rows_r] = bf16(w[rows_r])
//
// A row outside the table is a device assert: the host learns of it at its next synchronisation.
#undef NDEBUG
#include <cassert>

#include "common.cuh"
#include "launch.h"

namespace metadistil {
namespace {

template <typename T>
__global__ void row_axpy_kernel(T* table,               // [V, H]
                                const int64_t* rows,    // [n]
                                const T* values,        // [n, H]
                                T* snapshot,            // [n, H] or null
                                __nv_bfloat16* shadow,  // [V, H] or null
                                const T* alpha,         // []
                                int64_t length, int64_t width, int64_t n) {
  const T factor = *alpha;
  for (int64_t r = blockIdx.x; r < n; r += gridDim.x) {
    const int64_t row = rows[r];
    assert(row >= 0 && row < length && "metadistil::row_axpy: a row is outside the table");
    for (int64_t h = threadIdx.x; h < width; h += THREADS) {
      const int64_t there = row * width + h, here = r * width + h;
      pilot_update(table + there, values[here], snapshot ? snapshot + here : nullptr,
                   shadow ? shadow + there : nullptr, factor);
    }
  }
}

template <typename T>
__global__ void row_rewind_kernel(T* table,               // [V, H]
                                  const int64_t* rows,    // [n]
                                  const T* snapshot,      // [n, H]
                                  __nv_bfloat16* shadow,  // [V, H] or null
                                  int64_t length, int64_t width, int64_t n) {
  for (int64_t r = blockIdx.x; r < n; r += gridDim.x) {
    const int64_t row = rows[r];
    assert(row >= 0 && row < length && "metadistil::row_rewind: a row is outside the table");
    for (int64_t h = threadIdx.x; h < width; h += THREADS) {
      const int64_t there = row * width + h;
      rewind(table + there, snapshot[r * width + h], shadow ? shadow + there : nullptr);
    }
  }
}

}  // namespace

template <typename T>
cudaError_t launch_row_axpy(T* table, const int64_t* rows, const T* values, T* snapshot, void* shadow, const T* alpha,
                            int64_t length, int64_t width, int64_t n, cudaStream_t stream) {
  if (n == 0 || width == 0) return cudaSuccess;  // a grid of no blocks is an error
  const auto grid = static_cast<unsigned>(std::min(n, MOST_BLOCKS));
  row_axpy_kernel<<<grid, THREADS, 0, stream>>>(table, rows, values, snapshot, static_cast<__nv_bfloat16*>(shadow),
                                                alpha, length, width, n);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_row_rewind(T* table, const int64_t* rows, const T* snapshot, void* shadow, int64_t length,
                              int64_t width, int64_t n, cudaStream_t stream) {
  if (n == 0 || width == 0) return cudaSuccess;
  const auto grid = static_cast<unsigned>(std::min(n, MOST_BLOCKS));
  row_rewind_kernel<<<grid, THREADS, 0, stream>>>(table, rows, snapshot, static_cast<__nv_bfloat16*>(shadow), length,
                                                  width, n);
  return cudaGetLastError();
}

#define INSTANTIATE(T)                                                                                           \
  template cudaError_t launch_row_axpy<T>(T*, const int64_t*, const T*, T*, void*, const T*, int64_t, int64_t,   \
                                          int64_t, cudaStream_t);                                                \
  template cudaError_t launch_row_rewind<T>(T*, const int64_t*, const T*, void*, int64_t, int64_t, int64_t,      \
                                            cudaStream_t);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace metadistil
