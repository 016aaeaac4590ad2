// Linear layers of a few rows.
#pragma once

#include <omp.h>

#include "dot_products.h"

namespace {

template <class T>
void linear(const T* x, const T* weight, const T* bias, T* out, index_t rows, index_t in, index_t outs,
            int threads) {
  constexpr index_t OUTS = 64;  // at a time
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (index_t from = 0; from < outs; from += OUTS) {
    const T* lines[ROW_BLOCK];
    for (index_t m0 = 0; m0 < rows; m0 += ROW_BLOCK) {
      const index_t count = std::min(ROW_BLOCK, rows - m0);
      for (index_t m = 0; m < count; ++m) lines[m] = x + (m0 + m) * in;
      dot_outputs(
          lines, count, in, std::min(OUTS, outs - from), [&](index_t n) { return weight + (from + n) * in; },
          [&](index_t m, index_t n, float sum) {
            store(out + (m0 + m) * outs + from + n, sum + (bias ? to_float(bias[from + n]) : 0));
          });
    }
  }
}

}  // namespace
