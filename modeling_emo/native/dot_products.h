// Products with weights [out, in] along `in`: dot products, for float32 and bfloat16 on any machine.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

// Adds the products of ROWS rows with OUTS rows of weights, over [begin, end) of `in`, to sums[row][out].
// With AHEAD, what is read of the weights after these, `ahead` numbers on, is asked for meanwhile.
template <int ROWS, int OUTS, bool AHEAD, class T>
inline void dot_tile(const T* const* x, const T* const* w, index_t begin, index_t end, index_t ahead,
                     float* sums, int stride) {
  vec acc[ROWS][OUTS] = {};
  index_t k = begin;
  for (; k + Step<T>::size <= end; k += Step<T>::size) {
    typename Step<T>::reg row[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) row[m] = Step<T>::get(x[m] + k);
#pragma GCC unroll 8
    for (int n = 0; n < OUTS; ++n) {
      const typename Step<T>::reg weight = Step<T>::get(w[n] + k);
      if (AHEAD) __builtin_prefetch(w[n] + k + ahead);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) acc[m][n] = Step<T>::add(acc[m][n], row[m], weight);
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < OUTS; ++n) {
      float total = sum<LANES>(acc[m][n]);
      for (index_t rest = k; rest < end; ++rest) total += to_float(x[m][rest]) * to_float(w[n][rest]);
      sums[m * stride + n] += total;
    }
}

template <int OUTS, class T>
inline void dot_rows(const T* const* x, index_t rows, const T* const* w, index_t begin, index_t end,
                     index_t ahead, float* sums, int stride) {
  index_t m = 0;
  if (rows >= TILE_ROWS) {  // the first rows alone meet weights that no cache has
    dot_tile<TILE_ROWS, OUTS, true>(x, w, begin, end, ahead, sums, stride);
    for (m = TILE_ROWS; m + TILE_ROWS <= rows; m += TILE_ROWS)
      dot_tile<TILE_ROWS, OUTS, false>(x + m, w, begin, end, ahead, sums + m * stride, stride);
  }
  for (; m + 2 <= rows; m += 2)
    dot_tile<2, OUTS, true>(x + m, w, begin, end, ahead, sums + m * stride, stride);
  if (m < rows) dot_tile<1, OUTS, true>(x + m, w, begin, end, ahead, sums + m * stride, stride);
}

constexpr index_t ROW_BLOCK = 64;  // rows whose sums are kept at a time

// sums[row][out] for up to ROW_BLOCK rows and `outs` <= TILE_OUTS rows of weights. `in` is cut so that the
// tile's rows of weights stay in the first cache while all rows of x pass.
template <class T>
inline void dot_panel(const T* const* x, index_t rows, const T* const* w, int outs, index_t in, index_t ahead,
                      float* sums) {
  const index_t block = 4096 / sizeof(T);
  std::fill(sums, sums + rows * TILE_OUTS, 0.0f);
  for (index_t k = 0; k < in; k += block) {
    const index_t end = std::min(in, k + block);
    if (outs == TILE_OUTS) {
      dot_rows<TILE_OUTS>(x, rows, w, k, end, ahead, sums, TILE_OUTS);
    } else {
      int n = 0;
      for (; n + 2 <= outs; n += 2) dot_rows<2>(x, rows, w + n, k, end, ahead, sums + n, TILE_OUTS);
      if (n < outs) dot_rows<1>(x, rows, w + n, k, end, ahead, sums + n, TILE_OUTS);
    }
  }
}

}  // namespace
