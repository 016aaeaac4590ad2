// Products along the outer dimension of a stored matrix: sums over rows, in float32 whatever is stored.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int OUTER_ROWS = 6, OUTER_VECS = 4;  // 24 sums and 4 vectors of the right factor, of 32 registers
#else
constexpr int OUTER_ROWS = 6, OUTER_VECS = 2;  // of 16
#endif
constexpr index_t PANEL = OUTER_VECS * LANES;  // columns at a time
constexpr index_t OUTER_BLOCK = 96;            // rows at a time: a multiple of OUTER_ROWS
constexpr index_t DEPTH_BLOCK = 128;           // of the sum: a panel of it fits the first cache

// c[OUTER_ROWS][PANEL] += a * b; a[m * row_step + k * depth_step], b[k][PANEL].
inline void outer_tile(const float* a, index_t row_step, index_t depth_step, const float* b, index_t depth,
                       float* c) {
  vec sums[OUTER_ROWS][OUTER_VECS];
#pragma GCC unroll 8
  for (int m = 0; m < OUTER_ROWS; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < OUTER_VECS; ++v) sums[m][v] = load(c + m * PANEL + v * LANES);
  for (index_t k = 0; k < depth; ++k, a += depth_step, b += PANEL) {
    vec right[OUTER_VECS];
#pragma GCC unroll 8
    for (int v = 0; v < OUTER_VECS; ++v) right[v] = load(b + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < OUTER_ROWS; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < OUTER_VECS; ++v) sums[m][v] += right[v] * a[m * row_step];
  }
#pragma GCC unroll 8
  for (int m = 0; m < OUTER_ROWS; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < OUTER_VECS; ++v) memcpy(c + m * PANEL + v * LANES, &sums[m][v], sizeof(vec));
}

// `width` numbers as float32, filled up with zeros to `padded`.
template <class T>
inline void copy_row(const T* from, index_t width, index_t padded, float* to) {
  index_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const vec v = load(from + i);
    memcpy(to + i, &v, sizeof v);
  }
  for (; i < width; ++i) to[i] = to_float(from[i]);
  for (; i < padded; ++i) to[i] = 0;
}

// sums[count][PANEL] = rows [count][depth] times `width` columns of weights [depth][stride]; count up to
// OUTER_BLOCK.
template <class T>
inline void times_columns(const T* const* rows, index_t count, const T* weights, index_t stride, index_t depth,
                          index_t width, float* sums) {
  alignas(64) float left[OUTER_ROWS * DEPTH_BLOCK], right[DEPTH_BLOCK * PANEL];
  std::fill(sums, sums + (count + OUTER_ROWS - 1) / OUTER_ROWS * OUTER_ROWS * PANEL, 0.0f);
  for (index_t k0 = 0; k0 < depth; k0 += DEPTH_BLOCK) {
    const index_t deep = std::min(DEPTH_BLOCK, depth - k0);
    for (index_t k = 0; k < deep; ++k) {
      const T* row = weights + (k0 + k) * stride;
      // Rows lie pages apart, where the processor does not read ahead by itself.
      for (index_t i = 0; i < width; i += 64 / sizeof(T)) __builtin_prefetch(row + 16 * stride + i);
      copy_row(row, width, PANEL, right + k * PANEL);
    }
    for (index_t m0 = 0; m0 < count; m0 += OUTER_ROWS) {
      const index_t some = std::min<index_t>(OUTER_ROWS, count - m0);
      for (index_t m = 0; m < OUTER_ROWS; ++m)
        if (m < some)
          copy_row(rows[m0 + m] + k0, deep, deep, left + m * DEPTH_BLOCK);
        else
          std::fill(left + m * DEPTH_BLOCK, left + (m + 1) * DEPTH_BLOCK, 0.0f);
      outer_tile(left, DEPTH_BLOCK, 1, right, deep, sums + m0 * PANEL);
    }
  }
}

}  // namespace
