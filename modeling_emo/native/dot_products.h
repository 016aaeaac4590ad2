// Products with weights [out, in] along `in`: dot products, for float32 and bfloat16 on any machine.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

// How many numbers there are before the next place where vectors lie in one line of the cache: a vector that
// is part of two takes twice as long to read, and weights that are pages of a file may begin anywhere.
// Narrower vectors rarely are.
template <class T>
inline index_t before_line(const T* p) {
#if defined(__AVX512F__)
  const index_t numbers = (64 - size_t(p) % 64) % 64 / sizeof(T) % Step<T>::size;
  if (size_t(p) % sizeof(T) == 0 && numbers % Step<T>::PAIRED == 0) return numbers;
#endif
  return 0;
}

#if defined(__AVX512F__)
// Where each sum of a vector is that took its first number `by` places late.
inline __m512i turned(index_t by) {
  const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_and_si512(_mm512_sub_epi32(places, _mm512_set1_epi32(int(by))), _mm512_set1_epi32(15));
}
#endif

// Adds the products of ROWS rows with OUTS rows of weights, over [begin, end) of `in`, to sums[row][out]: the
// same ones, bit by bit, wherever the weights lie. Weights are asked for AHEAD of their products.
template <int ROWS, int OUTS, class T>
inline void dot_tile(const T* const* x, const T* const* w, index_t begin, index_t end, float* sums) {
  constexpr int SIZE = Step<T>::size, AHEAD = 2048 / sizeof(T);
  using reg = typename Step<T>::reg;
  vec acc[ROWS][OUTS] = {};
  const auto some = [&](index_t k, index_t first, index_t count) {
    reg row[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) row[m] = get_some(x[m] + k, first, count);
#pragma GCC unroll 8
    for (int n = 0; n < OUTS; ++n) {
      const reg weight = get_some(w[n] + k, first, count);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) acc[m][n] = Step<T>::add(acc[m][n], row[m], weight);
    }
  };
  const index_t late = before_line(w[0] + begin), head = std::min(late, end - begin);
  if (head) some(begin, SIZE - late, head);
  index_t k = begin + head;
  for (; k + SIZE <= end; k += SIZE) {
    reg row[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) row[m] = Step<T>::get(x[m] + k);
#pragma GCC unroll 8
    for (int n = 0; n < OUTS; ++n) {
      const reg weight = Step<T>::get(w[n] + k);
      __builtin_prefetch(w[n] + k + AHEAD);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) acc[m][n] = Step<T>::add(acc[m][n], row[m], weight);
    }
  }
  if (k < end) some(k, 0, end - k);
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < OUTS; ++n) {
      vec found = acc[m][n];
#if defined(__AVX512F__)
      if (late) found = (vec)_mm512_permutexvar_ps(turned(late / Step<T>::PAIRED), (__m512)found);
#endif
      sums[m * TILE_OUTS + n] += sum<LANES>(found);
    }
}

// The same for as many rows as there are, ROWS or fewer at a time.
template <int ROWS, int OUTS, class T>
inline void dot_rows(const T* const* x, index_t rows, const T* const* w, index_t begin, index_t end,
                     float* sums) {
  for (; rows >= ROWS; rows -= ROWS, x += ROWS, sums += ROWS * TILE_OUTS)
    dot_tile<ROWS, OUTS>(x, w, begin, end, sums);
  if constexpr (ROWS > 1)
    if (rows) dot_rows<ROWS - 1, OUTS>(x, rows, w, begin, end, sums);
}

constexpr index_t ROW_BLOCK = 64;  // rows whose sums are kept at a time

// Hands use(row, out, sum) the products of up to ROW_BLOCK rows with `outs` rows of weights, which
// weights_of(out) points to.
//
// Few rows take no longer than reading the weights. Memory is read fastest as two streams, each strictly in
// order: the first and the second half of the outputs. Many rows are read again for every tile of
// outputs, which is large then. `in` is cut so that a tile's weights stay in the first cache while all rows
// pass.
template <class T, class Weights, class Use>
inline void dot_outputs(const T* const* x, index_t rows, index_t in, index_t outs, Weights weights_of,
                        Use use) {
  constexpr index_t BLOCK = 4096 / sizeof(T);
  const T* w[TILE_OUTS];
  float sums[ROW_BLOCK * TILE_OUTS];
  const bool few = rows <= 2 * STREAM_ROWS;
  const index_t apart = few ? (outs + 1) / 2 : 1, step = few ? 1 : TILE_OUTS;
  for (index_t n = 0; n < (few ? apart : outs); n += step) {
    const int count = few ? 1 + (n + apart < outs) : std::min<index_t>(TILE_OUTS, outs - n);
    for (int j = 0; j < count; ++j) w[j] = weights_of(n + j * apart);
    std::fill(sums, sums + rows * TILE_OUTS, 0.0f);
    for (index_t k = 0; k < in; k += BLOCK) {
      const index_t end = std::min(in, k + BLOCK);
      if (few && count == 2)
        dot_rows<STREAM_ROWS, 2>(x, rows, w, k, end, sums);
      else if (count == TILE_OUTS)
        dot_rows<TILE_ROWS, TILE_OUTS>(x, rows, w, k, end, sums);
      else
        for (int j = 0; j < count; ++j) dot_rows<TILE_ROWS, 1>(x, rows, w + j, k, end, sums + j);
    }
    for (index_t m = 0; m < rows; ++m)
      for (int j = 0; j < count; ++j) use(m, n + j * apart, sums[m * TILE_OUTS + j]);
  }
}

}  // namespace
