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
// same ones, bit by bit, wherever the weights lie. With AHEAD, what is read of the weights after these,
// `ahead` numbers on, is asked for meanwhile.
template <int ROWS, int OUTS, bool AHEAD, class T>
inline void dot_tile(const T* const* x, const T* const* w, index_t begin, index_t end, index_t ahead,
                     float* sums, int stride) {
  constexpr int SIZE = Step<T>::size;
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
      if (AHEAD) __builtin_prefetch(w[n] + k + ahead);
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
      sums[m * stride + n] += sum<LANES>(found);
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
