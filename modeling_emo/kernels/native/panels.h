// Products of many rows with weights [out, in], by vectors alone: where there are no tiles.
//
// A panel holds some tokens so that the numbers of one place along `in` lie side by side. Each number of a
// row of weights is then multiplied with all of them at once, and a sum of each output and token stays in a
// register along the whole of `in`. Weights are read as they are stored; the tokens are what is brought into
// order. So a product comes out transposed, as rows of outputs of the panel's tokens.
//
// A step along `in` takes a unit: a pair of bfloat16 where the processor multiplies these, else one float32.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vectors.h"

namespace {

// What fits the registers: sums of PANEL_ROWS outputs by PANEL_VECTORS vectors of tokens.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int PANEL_VECTORS = 4;
#else
constexpr int PANEL_VECTORS = 2;
#endif
constexpr int PANEL_ROWS = 6;
// Where they were measured faster than PyTorch's own products, forward and backward.
#if defined(__AVX512F__)
constexpr bool HAS_PANELS = true;
#else
constexpr bool HAS_PANELS = false;
#endif
// Tokens of a panel: with 2048 inputs they fit a second cache of 1 MB, in float32 too.
constexpr index_t PANEL_TOKENS = 64;
constexpr index_t PANEL_OUTPUTS = 48;  // whose sums are kept at a time: whole PANEL_ROWS and vectors

template <class T>
struct Unit {
  static constexpr int numbers = 1;
  using type = float;
  using reg = vec;
  static reg get(const float* p) { return load(p); }
  static reg repeat(const float* p) { return *p - vec{}; }
  static vec add(vec sums, reg a, reg b) { return sums + a * b; }
};
#if defined(__AVX512BF16__)
template <>
struct Unit<bf16> {
  static constexpr int numbers = 2;
  using type = uint32_t;
  using reg = __m512bh;
  static reg get(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static reg repeat(const uint32_t* p) {
    uint32_t pair;
    memcpy(&pair, p, 4);
    return (__m512bh)_mm512_set1_epi32(int(pair));
  }
  static vec add(vec sums, reg a, reg b) { return (vec)_mm512_dpbf16_ps((__m512)sums, a, b); }
};
#endif
template <class T>
using unit = typename Unit<T>::type;

// Whether rows of so many numbers are whole units.
template <class T>
inline bool fits_units(index_t numbers) {
  return numbers % Unit<T>::numbers == 0;
}

// Lines of a square of sums become its columns.
inline void turn_square(const float* from, index_t stride, index_t rows, vec (&to)[LANES]) {
#if defined(__AVX512F__)
  __m512i lines[16], turned[16];
  for (index_t i = 0; i < 16; ++i)
    lines[i] = i < rows ? _mm512_loadu_si512(from + i * stride) : _mm512_setzero_si512();
  transpose(lines, turned);
  for (int i = 0; i < 16; ++i) to[i] = (vec)turned[i];
#else
  float square[LANES][LANES] = {};
  for (index_t i = 0; i < rows; ++i)
    for (int j = 0; j < LANES; ++j) square[j][i] = from[i * stride + j];
  for (int j = 0; j < LANES; ++j) to[j] = load(square[j]);
#endif
}

// sums[row][stride] = units of ROWS rows times a panel of VECTORS. The rows read after these begin `next`
// units later: they are asked for meanwhile, as the processor does not read ahead by itself from one page to
// the next.
template <class T, int ROWS, int VECTORS>
__attribute__((noinline)) void panel_tile(const unit<T>* const* rows, const unit<T>* panel, index_t steps,
                                          index_t next, float* sums, index_t stride) {
  constexpr index_t LINE = 64 / sizeof(unit<T>);
  using U = Unit<T>;
  vec acc[ROWS][VECTORS] = {};
  const unit<T>* a[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) a[r] = rows[r];
  const auto step = [&](index_t k) {
    typename U::reg tokens[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) tokens[v] = U::get(panel + v * LANES);
    panel += VECTORS * LANES;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const typename U::reg weight = U::repeat(a[r] + k);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) acc[r][v] = U::add(acc[r][v], weight, tokens[v]);
    }
  };
  index_t k = 0;
  for (; k + LINE <= steps; k += LINE) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) __builtin_prefetch(a[r] + k + next, 0, 2);
#pragma GCC unroll 2
    for (index_t i = 0; i < LINE; ++i) step(k + i);
  }
  for (; k < steps; ++k) step(k);
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) put(sums + r * stride + v * LANES, acc[r][v]);
}

template <class T, int ROWS, int VECTORS = PANEL_VECTORS>
inline void panel_vectors(const unit<T>* const* rows, const unit<T>* panel, index_t vectors, index_t steps,
                          index_t next, float* sums, index_t stride) {
  if (vectors == VECTORS) return panel_tile<T, ROWS, VECTORS>(rows, panel, steps, next, sums, stride);
  if constexpr (VECTORS > 1)
    panel_vectors<T, ROWS, VECTORS - 1>(rows, panel, vectors, steps, next, sums, stride);
}

// For all vectors of a panel, which has so many at a time one after the other.
template <class T, int ROWS>
inline void panel_rows(const unit<T>* const* rows, const unit<T>* panel, index_t vectors, index_t steps,
                       index_t next, float* sums, index_t stride) {
  for (index_t v = 0; v < vectors; v += PANEL_VECTORS)
    panel_vectors<T, ROWS>(rows, panel + v * LANES * steps, std::min<index_t>(PANEL_VECTORS, vectors - v),
                           steps, next, sums + v * LANES, stride);
}

// Up to PANEL_ROWS of them.
template <class T>
inline void panel_some_rows(const unit<T>* const* rows, int count, const unit<T>* panel, index_t vectors,
                            index_t steps, index_t next, float* sums, index_t stride) {
  if (count == PANEL_ROWS) return panel_rows<T, PANEL_ROWS>(rows, panel, vectors, steps, next, sums, stride);
  int r = 0;
  if (count >= 4) panel_rows<T, 4>(rows, panel, vectors, steps, next, sums, stride), r = 4;
  if (r + 2 <= count)
    panel_rows<T, 2>(rows + r, panel, vectors, steps, next, sums + r * stride, stride), r += 2;
  if (r < count) panel_rows<T, 1>(rows + r, panel, vectors, steps, next, sums + r * stride, stride);
}

// sums[out][vectors of tokens] = rows of weights, `gap` numbers apart, times a panel.
template <class T>
void times_panel(const T* weights, index_t gap, index_t outs, index_t in, const unit<T>* panel,
                 index_t vectors, float* sums) {
  constexpr bool as_stored = sizeof(unit<T>) == sizeof(T) * Unit<T>::numbers;
  const index_t steps = in / Unit<T>::numbers, stride = vectors * LANES;
  static thread_local std::vector<float> numbers;  // where weights are multiplied as float32, but are not
  const index_t wide = steps + LANES;              // rows a power of two apart push each other out
  if (!as_stored && index_t(numbers.size()) < PANEL_ROWS * wide) numbers.resize(PANEL_ROWS * wide);
  for (index_t n = 0; n < outs; n += PANEL_ROWS, weights += PANEL_ROWS * gap, sums += PANEL_ROWS * stride) {
    const int count = std::min<index_t>(PANEL_ROWS, outs - n);
    const unit<T>* rows[PANEL_ROWS];
    index_t next = PANEL_ROWS * gap / Unit<T>::numbers;
    for (int r = 0; r < count; ++r) {
      if constexpr (as_stored) {
        rows[r] = (const unit<T>*)(weights + r * gap);
      } else {
        float* line = numbers.data() + r * wide;
        const T* from = weights + r * gap;
        index_t k = 0;
        for (; k + LANES <= in; k += LANES) put(line + k, load(from + k));
        for (; k < in; ++k) line[k] = to_float(from[k]);
        rows[r] = line, next = 0;
      }
    }
    panel_some_rows<T>(rows, count, panel, vectors, steps, next, sums, stride);
  }
}

// Where the units of vector `v` and of those beside it begin, and how many numbers a step has there.
struct PanelPlace {
  index_t begin, width;
};
inline PanelPlace in_panel(index_t v, index_t vectors, index_t steps) {
  const index_t group = v / PANEL_VECTORS * PANEL_VECTORS;
  return {group * LANES * steps + (v - group) * LANES,
          std::min<index_t>(PANEL_VECTORS, vectors - group) * LANES};
}

template <class T>
inline unit<T> unit_at(const T* p) {
  if constexpr (Unit<T>::numbers == 2) {
    unit<T> pair;
    memcpy(&pair, p, sizeof pair);
    return pair;
  } else {
    return to_float(*p);
  }
}

// A panel of `count` tokens; those missing to whole vectors are zeros.
template <class T>
void fill_panel(const T* const* tokens, index_t count, index_t in, unit<T>* panel) {
  const index_t vectors = (count + LANES - 1) / LANES, steps = in / Unit<T>::numbers;
  for (index_t v = 0; v < vectors; ++v) {
    const PanelPlace place = in_panel(v, vectors, steps);
    const T* const* lines = tokens + v * LANES;
    const index_t there = std::min<index_t>(LANES, count - v * LANES);
    unit<T>* to = panel + place.begin;
    index_t k = 0;
#if defined(__AVX512F__)
    for (; k + LANES <= steps; k += LANES) {
      __m512i found[16], turned[16];
      for (index_t m = 0; m < 16; ++m) {
        if (m >= there)
          found[m] = _mm512_setzero_si512();
        else if constexpr (Unit<T>::numbers == 2)
          found[m] = _mm512_loadu_si512(lines[m] + 2 * k);
        else
          found[m] = (__m512i)load(lines[m] + k);
      }
      transpose(found, turned);
      for (index_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + (k + i) * place.width, turned[i]);
    }
#endif
    for (; k < steps; ++k)
      for (index_t m = 0; m < LANES; ++m)
        to[k * place.width + m] = m < there ? unit_at(lines[m] + k * Unit<T>::numbers) : unit<T>();
  }
}

// Numbers of a vector of tokens, for the outputs of a unit, as that unit.
#if defined(__AVX512BF16__)
inline void put_unit(const vec (&numbers)[2], uint32_t* to) {
  const __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)numbers[0]));
  const __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)numbers[1]));
  _mm512_storeu_si512(to, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
}
#endif
inline void put_unit(const vec (&numbers)[1], float* to) { put(to, numbers[0]); }

// Units of two rows of numbers, or of one: a vector of columns. The second row may be missing.
#if defined(__AVX512BF16__)
inline __m512i units_of(const bf16* even, const bf16* odd) {
  const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)even));
  if (!odd) return low;
  const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif
template <class T>
inline vec units_of(const T* row, const void*) {
  return load(row);
}

// Panels of columns, `together` in each, one panel after the other: row(k) gives numbers of one place along
// the sum. Rows of weights lie pages apart, so they are asked for.
template <class T, class Row>
void fill_columns(index_t depth, Row row, index_t columns, index_t together, unit<T>* panels) {
  constexpr int NUMBERS = Unit<T>::numbers;
  constexpr index_t AHEAD = 24;
  const index_t steps = (depth + NUMBERS - 1) / NUMBERS;
  for (index_t k = 0; k < steps; ++k) {
    const auto* even = row(k * NUMBERS);
    const auto* odd = NUMBERS == 2 && 2 * k + 1 < depth ? row(2 * k + 1) : nullptr;
    for (index_t i = 0; i < NUMBERS && (k + AHEAD) * NUMBERS + i < depth; ++i) {
      const char* later = (const char*)row((k + AHEAD) * NUMBERS + i);
      for (index_t byte = 0; byte < columns * index_t(sizeof *even); byte += 64)
        __builtin_prefetch(later + byte, 0, 2);
    }
    for (index_t c = 0; c < columns; c += LANES) {
      const index_t panel = c / together * together, some = std::min(together, columns - panel);
      const PanelPlace place = in_panel((c - panel) / LANES, some / LANES, steps);
      const auto found = units_of(even + c, odd ? odd + c : nullptr);
      memcpy(panels + panel * steps + place.begin + k * place.width, &found, sizeof found);
    }
  }
}

// Columns [from, to) as rows of units along the sum, `stride` units apart: row(k) as above.
template <class T, class Row>
void fill_turned(index_t depth, Row row, index_t from, index_t to, index_t stride, unit<T>* out) {
  constexpr int NUMBERS = Unit<T>::numbers;
  const index_t steps = (depth + NUMBERS - 1) / NUMBERS;
  for (index_t k0 = 0; k0 < steps; k0 += LANES)
    for (index_t c = from; c < to; c += LANES) {
      alignas(64) float lines[LANES * LANES];
      const index_t some = std::min<index_t>(LANES, steps - k0);
      for (index_t i = 0; i < some; ++i) {
        const index_t k = (k0 + i) * NUMBERS;
        const auto* odd = NUMBERS == 2 && k + 1 < depth ? row(k + 1) + c : nullptr;
        const auto found = units_of(row(k) + c, odd);
        memcpy(lines + i * LANES, &found, sizeof found);
      }
      vec turned[LANES];
      turn_square(lines, LANES, some, turned);
      for (index_t i = 0; i < LANES; ++i) memcpy(out + (c - from + i) * stride + k0, &turned[i], sizeof(vec));
    }
}

}  // namespace
