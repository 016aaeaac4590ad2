// Products of five to eight rows with weights [out, in] along `in`, with vectors of AVX-512.
//
// Eight rows of 2048 bfloat16 fill the first cache, and plain dot products read them from the second one for
// every two outputs. Here the rows are copied so that the numbers of one step stand side by side, and a block
// of them stays in the first cache while all weights pass.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// Machines with AMX multiply so many rows by tiles.
#if defined(__AVX512F__) && !defined(__AMX_TILE__)
#define EMO_FEW_ROWS

// Adds the numbers of each of 16 vectors, in the order of `sum`: that of vector i at 4 * (i % 4) + i / 4.
inline vec sums_of_16(const vec (&v)[16]) {
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const auto quarters = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const auto pairs = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  };
  __m512 four[4];
  for (int i = 0; i < 4; ++i)
    four[i] = quarters(halves((__m512)v[4 * i], (__m512)v[4 * i + 1]),
                       halves((__m512)v[4 * i + 2], (__m512)v[4 * i + 3]));
  return (vec)pairs(pairs(four[0], four[1]), pairs(four[2], four[3]));
}
inline index_t place_of_16(index_t i) { return i / 16 * 16 + 4 * (i % 4) + i % 16 / 4; }

// Whether there are so many rows, and all rows of weights begin at the same place of a line of the cache.
template <class T>
inline bool fits_packed(index_t rows, index_t in) {
  return 5 <= rows && rows <= STREAM_ROWS && in % (64 / sizeof(T)) == 0 && in % Step<T>::size == 0;
}

constexpr int PACKED_OUTS = 3;  // rows of weights at a time: their sums fit the registers
constexpr int packed_sums(int rows) { return (rows * PACKED_OUTS + 15) / 16; }

// sums += the products of ROWS packed rows with rows of weights, over `count` numbers, of which the first
// `late` are the rest of a line. The weights of the next tile are asked for meanwhile.
template <int ROWS, class X, class T>
__attribute__((noinline)) void packed_tile(const X* x, const T* const* weights, const T* const* next,
                                           index_t late, index_t count, float* sums) {
  constexpr int SIZE = Step<T>::size, OUTS = PACKED_OUTS, SUMS = packed_sums(ROWS);
  using reg = typename Step<T>::reg;
  vec acc[SUMS * 16] = {};
  const T *w[OUTS], *ahead[OUTS];
#pragma GCC unroll 8
  for (int n = 0; n < OUTS; ++n) w[n] = weights[n], ahead[n] = next[n];
  const auto add = [&](const reg(&line)[OUTS]) {
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) {
      const reg row = Step<X>::get(x + m * SIZE);
#pragma GCC unroll 8
      for (int n = 0; n < OUTS; ++n) acc[n * ROWS + m] = Step<T>::add(acc[n * ROWS + m], row, line[n]);
    }
    x += ROWS * SIZE;
  };
  const auto some = [&](index_t k, index_t first, index_t numbers) {
    reg line[OUTS];
    for (int n = 0; n < OUTS; ++n) line[n] = get_some(w[n] + k, first, numbers);
    add(line);
  };
  if (late) some(0, SIZE - late, late);
  index_t k = late;
  for (; k + SIZE <= count; k += SIZE) {
    reg line[OUTS];
#pragma GCC unroll 8
    for (int n = 0; n < OUTS; ++n) {
      line[n] = Step<T>::get(w[n] + k);
      __builtin_prefetch(ahead[n] + k, 0, 2);
    }
    add(line);
  }
  if (k < count) some(k, 0, count - k);
  if (late)
    for (int i = 0; i < ROWS * OUTS; ++i)
      acc[i] = (vec)_mm512_permutexvar_ps(turned(late / Step<T>::PAIRED), (__m512)acc[i]);
  for (int i = 0; i < SUMS; ++i)
    put(sums + 16 * i, load(sums + 16 * i) + sums_of_16((const vec(&)[16])acc[16 * i]));
}

// As `dot_outputs`, for what `fits_packed`.
template <class T, class X, class Weights, class Use>
inline void packed_outputs(const X* const* x, index_t rows, index_t in, index_t outs, Weights weights_of,
                           Use use) {
  using Tile = void (*)(const X*, const T* const*, const T* const*, index_t, index_t, float*);
  static constexpr Tile TILES[] = {packed_tile<5, X, T>, packed_tile<6, X, T>, packed_tile<7, X, T>,
                                   packed_tile<8, X, T>};
  constexpr index_t SIZE = Step<T>::size, BLOCK = 2048 / sizeof(X);
  const Tile tile = TILES[rows - 5];
  const index_t width = 16 * packed_sums(rows);
  const index_t part = (outs + PACKED_OUTS - 1) / PACKED_OUTS;  // read as so many streams, each in order
  static thread_local std::vector<X> packed;
  static thread_local std::vector<float> sums;
  packed.resize(std::max<size_t>(packed.size(), rows * (BLOCK + SIZE)));
  sums.assign(part * width, 0.0f);
  for (index_t begin = 0; begin < in; begin += BLOCK) {
    const index_t count = std::min(BLOCK, in - begin), late = before_line(weights_of(0) + begin);
    const index_t lead = late ? SIZE - late : 0, steps = (lead + count + SIZE - 1) / SIZE;
    for (index_t m = 0; m < rows; ++m)
      for (index_t step = 0; step < steps; ++step) {
        X* to = packed.data() + (step * rows + m) * SIZE;
        const index_t first = step * SIZE - lead, from = std::max<index_t>(0, first);
        const index_t numbers = std::min(first + SIZE, count) - from;
        if (numbers < SIZE) std::fill(to, to + SIZE, X{});
        memcpy(to + (from - first), x[m] + begin + from, numbers * sizeof(X));
      }
    for (index_t n = 0; n < part; ++n) {
      const T *w[PACKED_OUTS], *next[PACKED_OUTS];
      const bool last = n + 1 == part;
      const index_t after = last ? std::min(begin + BLOCK, in - 1) : begin;
      for (index_t j = 0; j < PACKED_OUTS; ++j) {
        const index_t out = j * part + n;
        w[j] = weights_of(std::min(out, outs - 1)) + begin;
        next[j] = weights_of(std::min(last ? j * part : out + 1, outs - 1)) + after;
      }
      tile(packed.data(), w, next, late, count, sums.data() + n * width);
    }
  }
  for (index_t n = 0; n < part; ++n)
    for (index_t j = 0; j < PACKED_OUTS && j * part + n < outs; ++j)
      for (index_t m = 0; m < rows; ++m) use(m, j * part + n, sums[n * width + place_of_16(j * rows + m)]);
}

#endif

}  // namespace
