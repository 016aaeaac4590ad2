// Products with weights [out, in] along `in`: dot products, for float32 and bfloat16 on any machine.
#pragma once

#include <algorithm>
#include <vector>

#include "few_rows.h"
#include "vectors.h"

namespace {

// How many bytes ahead weights are asked for, and into which cache: as measured for several rows on an AMD
// EPYC, where a core waits for fewer lines of the first cache than memory needs, and else on an Intel Xeon.
#if defined(__AVX512BF16__) && !defined(__AMX_TILE__)
constexpr int ask_ahead(int rows) { return rows > 1 ? 4096 : 2048; }
constexpr int ask_where(int rows) { return rows > 1 ? 2 : 3; }
#else
constexpr int ask_ahead(int) { return 2048; }
constexpr int ask_where(int) { return 3; }
#endif

// Adds the products of ROWS rows with OUTS rows of weights, over [begin, end) of `in`, to sums[row][out]: the
// same ones, bit by bit, wherever the weights lie. ASK for weights somewhat ahead where no cache has them.
// Not inlined: as parts of larger functions GCC kept the sums of many rows in memory, at half the speed.
template <int ROWS, int OUTS, bool ASK, class X, class T>
__attribute__((noinline)) void dot_tile(const X* const* x, const T* const* w, index_t begin, index_t end,
                                        float* sums) {
  constexpr int SIZE = Step<T>::size, AHEAD = ask_ahead(ROWS) / sizeof(T), WHERE = ask_where(ROWS);
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
    for (int m = 0; m < ROWS; ++m) row[m] = Step<X>::get(x[m] + k);
#pragma GCC unroll 8
    for (int n = 0; n < OUTS; ++n) {
      const reg weight = Step<T>::get(w[n] + k);
      if (ASK) __builtin_prefetch(w[n] + k + AHEAD, 0, WHERE);
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
  index_t m = 0;
  for (; m + ROWS <= rows; m += ROWS)
    if (m == 0)
      dot_tile<ROWS, OUTS, true>(x, w, begin, end, sums);
    else
      dot_tile<ROWS, OUTS, false>(x + m, w, begin, end, sums + m * TILE_OUTS);
  if constexpr (ROWS > 1)
    if (m < rows) dot_rows<ROWS - 1, OUTS>(x + m, rows - m, w, begin, end, sums + m * TILE_OUTS);
}
// For ROWS or fewer at once.
template <int ROWS, int OUTS, class X, class T>
inline void dot_few_rows(const X* const* x, index_t rows, const T* const* w, index_t begin, index_t end,
                         float* sums) {
  if (rows == ROWS) return dot_tile<ROWS, OUTS, true>(x, w, begin, end, sums);
  if constexpr (ROWS > 1) dot_few_rows<ROWS - 1, OUTS>(x, rows, w, begin, end, sums);
}

constexpr index_t ROW_BLOCK = 64;  // rows whose sums are kept at a time

// Sums of all of `in`, cut so that a tile's weights stay in the first cache while all rows pass.
template <class T, class Add>
inline void sum_blocks(index_t rows, index_t in, float* sums, Add add) {
  constexpr index_t BLOCK = 4096 / sizeof(T);
  std::fill(sums, sums + rows * TILE_OUTS, 0.0f);
  for (index_t k = 0; k < in; k += BLOCK) add(k, std::min(in, k + BLOCK));
}

// Few rows take no longer than reading the weights. Memory is read fastest as two streams, each strictly in
// order: the first and the second half of the outputs.
template <class T, class X, class Weights, class Use>
inline void dot_streams(const X* const* x, index_t rows, index_t in, index_t outs, Weights weights_of,
                        Use use) {
  float sums[STREAM_ROWS * TILE_OUTS];
  const index_t half = (outs + 1) / 2;
  for (index_t n = 0; n < half; ++n) {
    const bool both = n + half < outs;
    const T* w[2] = {weights_of(n), both ? weights_of(n + half) : nullptr};
    sum_blocks<T>(rows, in, sums, [&](index_t k, index_t end) {
      both ? dot_few_rows<STREAM_ROWS, 2>(x, rows, w, k, end, sums)
           : dot_few_rows<STREAM_ROWS, 1>(x, rows, w, k, end, sums);
    });
    for (index_t m = 0; m < rows; ++m)
      for (int j = 0; j <= both; ++j) use(m, n + j * half, sums[m * TILE_OUTS + j]);
  }
}

// Hands use(row, out, sum) the products of up to ROW_BLOCK rows with `outs` rows of weights, which
// weights_of(out) points to. Many rows are read again for every tile of outputs, which is large then.
template <class T, class Weights, class Use>
inline void dot_outputs(const T* const* x, index_t rows, index_t in, index_t outs, Weights weights_of,
                        Use use) {
  if (rows <= STREAM_ROWS) {
    const auto multiply = [&](auto lines) {
#if defined(EMO_FEW_ROWS)
      if (fits_packed<T>(rows, in)) return packed_outputs<T>(lines, rows, in, outs, weights_of, use);
#endif
      dot_streams<T>(lines, rows, in, outs, weights_of, use);
    };
    if constexpr (sizeof(T) == 2 && Step<T>::PAIRED == 1) {  // one conversion for all outputs
      static thread_local std::vector<float> numbers;
      const float* lines[STREAM_ROWS];
      if (index_t(numbers.size()) < rows * in) numbers.resize(rows * in);
      for (index_t m = 0; m < rows; ++m) {
        lines[m] = numbers.data() + m * in;
        for (index_t k = 0; k < in; ++k) numbers[m * in + k] = to_float(x[m][k]);
      }
      return multiply((const float* const*)lines);
    } else {
      return multiply(x);
    }
  }
  float sums[ROW_BLOCK * TILE_OUTS];
  const T* w[TILE_OUTS];
  for (index_t n = 0; n < outs; n += TILE_OUTS) {
    const int count = std::min<index_t>(TILE_OUTS, outs - n);
    for (int j = 0; j < count; ++j) w[j] = weights_of(n + j);
    sum_blocks<T>(rows, in, sums, [&](index_t k, index_t end) {
      if (count == TILE_OUTS) return dot_rows<TILE_ROWS, TILE_OUTS>(x, rows, w, k, end, sums);
      int j = 0;
      for (; j + 2 <= count; j += 2) dot_rows<TILE_ROWS, 2>(x, rows, w + j, k, end, sums + j);
      if (j < count) dot_rows<TILE_ROWS, 1>(x, rows, w + j, k, end, sums + j);
    });
    for (index_t m = 0; m < rows; ++m)
      for (int j = 0; j < count; ++j) use(m, n + j, sums[m * TILE_OUTS + j]);
  }
}

}  // namespace
