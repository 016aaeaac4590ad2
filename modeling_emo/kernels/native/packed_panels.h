// Several rows times weights of 8 and 4 bits, where the processor multiplies bfloat16.
//
// A panel is 32 outputs' weights, turned once for all rows: a vector has the same 32 bits of 16 outputs. Each of
// its parts is multiplied with two activations of a row. Nothing has to be summed over a vector, and scales are
// multiplied with sums of a group. The products leave time to take the parts out anew for every few rows.
#pragma once

#include <type_traits>
#include <vector>

#include "packed_rows.h"

#if defined(EMO_PACKED_BF16)
namespace {

constexpr index_t PANEL_FROM = 4;    // rows, from which panels are faster
constexpr index_t PANEL = 32;        // outputs
constexpr int HELD_ROWS = 6;         // as many as the registers hold
constexpr index_t PANEL_CHUNKS = 4;  // vectors of a row at a time, which stay in the first cache

template <class Matrix>
struct Panels {
  using Form = Halves<Matrix::BITS>;
  static constexpr index_t CHUNK = Matrix::CHUNK, LANE = CHUNK / 4;

  const Matrix& weights;
  index_t outs;
  // For each group and output: scales, and what is taken off for its zero point.
  std::vector<float> scales, less;
  alignas(64) __m512i numbers[PANEL_CHUNKS][16][2];

  Panels(const Matrix& weights, index_t outs) : weights(weights), outs(outs) {
    scales.resize(weights.groups() * PANEL);
    if (weights.zeros) less.resize(weights.groups() * PANEL);
  }

  index_t row(index_t n, index_t i) const { return std::min(n + i, outs - 1); }

  void take_scales(index_t n) {
    const index_t groups = weights.groups();
    for (index_t half = 0; half < 2; ++half)
      for (index_t g = 0; g < groups; g += 16) {
        const index_t count = std::min<index_t>(16, groups - g);
        const __mmask16 mask = __mmask16((1u << count) - 1);
        __m512i lines[16], zeros[16];
        for (index_t i = 0; i < 16; ++i) {
          const auto* from = weights.scales_of(row(n, half * 16 + i)) + g;
          _mm_prefetch((const char*)(from + PANEL * groups), _MM_HINT_T1);  // of the next panel
          if constexpr (sizeof(*from) == 2)
            lines[i] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16);
          else
            lines[i] = _mm512_maskz_loadu_epi32(mask, from);
        }
        transpose(lines, lines);
        for (index_t i = 0; i < count; ++i)
          _mm512_storeu_si512(&scales[(g + i) * PANEL + half * 16], lines[i]);
        if (!weights.zeros) continue;
        for (index_t i = 0; i < 16; ++i)
          zeros[i] = _mm512_cvtepu8_epi32(
              _mm_maskz_loadu_epi8(mask, weights.zeros_of(row(n, half * 16 + i)) + g));
        transpose(zeros, zeros);
        for (index_t i = 0; i < count; ++i) {
          const __m512 above = _mm512_cvtepi32_ps(_mm512_sub_epi32(zeros[i], _mm512_set1_epi32(Matrix::MIDDLE)));
          _mm512_storeu_ps(&less[(g + i) * PANEL + half * 16], _mm512_mul_ps(above, (__m512)lines[i]));
        }
      }
  }

  // Vectors [first, first + count) of the rows, the last perhaps in part. Those of the next panel are asked for.
  void turn(index_t n, index_t first, index_t count) {
    for (index_t c = 0; c < count; ++c)
      for (index_t half = 0; half < 2; ++half) {
        const index_t left = (weights.in - (first + c) * CHUNK) * Matrix::BITS / 32;
        const __mmask16 mask = left >= 16 ? 0xffff : __mmask16((1u << left) - 1);
        __m512i lines[16];
        for (index_t i = 0; i < 16; ++i) {
          const uint8_t* from = weights.row(row(n, half * 16 + i)) + (first + c) * VECTOR;
          lines[i] = _mm512_maskz_loadu_epi32(mask, from);
          _mm_prefetch((const char*)from + PANEL * weights.in * Matrix::BITS / 8, _MM_HINT_T1);
        }
        transpose(lines, lines);
        for (index_t j = 0; j < 16; ++j) numbers[c][j][half] = lines[j];
      }
  }

  // Adds the products of ROWS rows with the turned vectors to sums[row][32].
  template <int ROWS>
  __attribute__((noinline)) void multiply(const ReadyRow* x, index_t first, index_t count, float* sums) const {
    __m512 acc[ROWS][2];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < 2; ++v) acc[m][v] = _mm512_loadu_ps(sums + m * PANEL + v * 16);
    for (index_t c = 0; c < count; ++c) {
      const index_t k = (first + c) * CHUNK, lanes = std::min<index_t>(4, (weights.in - k) / LANE);
      for (index_t lane = 0; lane < lanes; ++lane) {
        const float* scale = &scales[(k + lane * LANE) / weights.group * PANEL];
        const __m512i(*from)[2] = numbers[c] + lane * 4;
        const index_t place = k + lane * 8;  // of 16 bits
        __m512 sums_of[ROWS][2];
#pragma GCC unroll 6
        for (int m = 0; m < ROWS; ++m)
          sums_of[m][0] = sums_of[m][1] = _mm512_set1_ps(x[m].beside[(first + c) * LANES + lane * 4]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const auto step = [&](auto number) {
            constexpr int PART = decltype(number)::value;
            const __m512bh a = (__m512bh)Form::Weights::template part<PART>(from[j][0]);
            const __m512bh b = (__m512bh)Form::Weights::template part<PART>(from[j][1]);
#pragma GCC unroll 6
            for (int m = 0; m < ROWS; ++m) {
              int32_t two;
              memcpy(&two, x[m].numbers + place + PART * 4 / Matrix::BITS * 32 + j * 2, sizeof two);
              const __m512bh both = (__m512bh)_mm512_set1_epi32(two);
              sums_of[m][0] = _mm512_dpbf16_ps(sums_of[m][0], both, a);
              sums_of[m][1] = _mm512_dpbf16_ps(sums_of[m][1], both, b);
            }
          };
          step(std::integral_constant<int, 0>()), step(std::integral_constant<int, 1>());
          step(std::integral_constant<int, 2>()), step(std::integral_constant<int, 3>());
        }
        const __m512 low = _mm512_loadu_ps(scale), high = _mm512_loadu_ps(scale + 16);
#pragma GCC unroll 6
        for (int m = 0; m < ROWS; ++m) {
          acc[m][0] = _mm512_fmadd_ps(sums_of[m][0], low, acc[m][0]);
          acc[m][1] = _mm512_fmadd_ps(sums_of[m][1], high, acc[m][1]);
        }
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(sums + m * PANEL + v * 16, acc[m][v]);
  }
  template <int ROWS = HELD_ROWS>
  void multiply(const ReadyRow* x, int rows, index_t first, index_t count, float* sums) const {
    if (rows == ROWS) return multiply<ROWS>(x, first, count, sums);
    if constexpr (ROWS > 1) multiply<ROWS - 1>(x, rows, first, count, sums);
  }

  // sums[row][32] of all rows with outputs from n on.
  void products(const ReadyRow* x, index_t rows, index_t n, float* sums) {
    const index_t chunks = (weights.in + CHUNK - 1) / CHUNK, blocks = (rows + HELD_ROWS - 1) / HELD_ROWS;
    std::fill(sums, sums + rows * PANEL, 0.0f);
    take_scales(n);
    for (index_t c = 0; c < chunks; c += PANEL_CHUNKS) {
      const index_t count = std::min(PANEL_CHUNKS, chunks - c);
      turn(n, c, count);
      for (index_t b = 0; b < blocks; ++b) {  // of the same size, as far as possible
        const index_t begin = rows * b / blocks, end = rows * (b + 1) / blocks;
        multiply(x + begin, int(end - begin), c, count, sums + begin * PANEL);
      }
    }
    if (weights.zeros)
      for (index_t m = 0; m < rows; ++m)
        for (index_t g = 0; g < weights.groups(); ++g)
          for (index_t i = 0; i < PANEL; i += LANES)
            put(sums + m * PANEL + i, load(sums + m * PANEL + i) - load(&less[g * PANEL + i]) * x[m].sums[g]);
  }
};

// use(row, out, sum) of rows x with `outs` rows of weights.
template <class Matrix, class Use>
inline void panel_products(const ReadyRow* x, index_t rows, const Matrix& weights, index_t outs, Use use) {
  static thread_local std::vector<float> sums;
  if (index_t(sums.size()) < rows * PANEL) sums.resize(rows * PANEL);
  Panels<Matrix> panels(weights, outs);
  for (index_t n = 0; n < outs; n += PANEL) {
    panels.products(x, rows, n, sums.data());
    for (index_t m = 0; m < rows; ++m)
      for (index_t i = 0; i < std::min(PANEL, outs - n); ++i) use(m, n + i, sums[m * PANEL + i]);
  }
}

}  // namespace
#endif
