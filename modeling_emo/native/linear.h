// Linear layers of a few rows.
#pragma once

#include <omp.h>

#include "dot_products.h"

namespace {

template <class T>
void linear(const T* x, const T* weight, const T* bias, T* out, index_t rows, index_t in, index_t outs,
            int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (index_t from = 0; from < outs; from += 16 * TILE_OUTS) {
    const T *lines[ROW_BLOCK], *w[TILE_OUTS];
    float sums[ROW_BLOCK * TILE_OUTS];
    for (index_t m0 = 0; m0 < rows; m0 += ROW_BLOCK) {
      const index_t count = std::min(ROW_BLOCK, rows - m0);
      for (index_t m = 0; m < count; ++m) lines[m] = x + (m0 + m) * in;
      for (index_t n = from; n < std::min(outs, from + 16 * TILE_OUTS); n += TILE_OUTS) {
        const index_t some = std::min<index_t>(TILE_OUTS, outs - n);
        for (index_t j = 0; j < some; ++j) w[j] = weight + (n + j) * in;
        dot_panel(lines, count, w, some, in, TILE_OUTS * in, sums);
        for (index_t m = 0; m < count; ++m)
          for (index_t j = 0; j < some; ++j)
            store(out + (m0 + m) * outs + n + j,
                  sums[m * TILE_OUTS + j] + (bias ? to_float(bias[n + j]) : 0));
      }
    }
  }
}

}  // namespace
