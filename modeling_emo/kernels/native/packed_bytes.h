// Activations as whole numbers of 8 bits, for processors that multiply bytes fastest.
//
// Each 32 numbers of a row share a scale, as in llama.cpp's Q8_0, so a number is off by 1/254 of the largest
// among them. Products of whole numbers are exact, and so are their sums over the 32.
#pragma once

#include <type_traits>
#include <vector>

#include "packed_rows.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define EMO_PACKED_PANELS 1
#endif

namespace {

// Whether bytes are what is fastest with weights of so many bits. Without VNNI there are only products of
// pairs, added in 16 bits, which those of 8 bits do not fit; with AVX-512 they gain nothing.
template <int BITS>
#if defined(EMO_PACKED_PANELS)
constexpr bool HAS_BYTES = true;
#elif defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool HAS_BYTES = BITS == 4;
#else
constexpr bool HAS_BYTES = false;
#endif

typedef uint8_t bytes __attribute__((vector_size(VECTOR)));

template <int BITS>
struct Bytes {
  static constexpr int BESIDE = 2, PARTS = 8 / BITS;  // scales, and the beginnings of sums
  static constexpr index_t CHUNK = 8 * VECTOR / BITS, LANE = 128 / BITS;
  static constexpr int MIDDLE = 1 << (BITS - 1);
  static constexpr float ROUND = 0x1.8p23f;  // added to a small number, it rounds to a whole one

  static index_t numbers_of(index_t in) { return (in + CHUNK - 1) / CHUNK * CHUNK / 2; }  // of 16 bits

  // Part i of a vector of weights has the numbers i, i + PARTS ... of it; activations have the same order.
  static void prepare(const bf16* x, index_t in, index_t group, int16_t* room, float* beside, float* sums) {
    constexpr int VECS = 16 / LANES;
    int8_t* numbers = (int8_t*)room;
    if (in % CHUNK) {
      const index_t last = in / CHUNK;
      memset(numbers + last * CHUNK, 0, CHUNK);
      memset(beside + last * BESIDE * LANES, 0, BESIDE * sizeof(vec));
    }
    std::fill(sums, sums + in / group, 0.0f);
    for (index_t k = 0; k < in; k += SMALLEST) {
      vec values[2][VECS], most = {}, odd = {};
      for (int i = 0; i < VECS; ++i) {
        if (PARTS == 2) {
          uvec pairs;
          memcpy(&pairs, x + k + i * 2 * LANES, sizeof pairs);
          values[0][i] = (vec)(pairs << 16), values[1][i] = (vec)(pairs & 0xffff0000);
        } else {
          values[0][i] = load(x + k + i * LANES), values[1][i] = load(x + k + 16 + i * LANES);
        }
        for (int half = 0; half < 2; ++half) {
          const vec size = (vec)((uvec)values[half][i] & 0x7fffffff);
          most = size > most ? size : most;
          odd += values[half][i] - values[half][i];
        }
      }
      // What is not finite spoils all sums it is part of, as it should.
      const bool finite = sum<LANES>(odd) == 0;
      const float unit = finite ? std::max(largest(most), 0x1p-110f) / 127 : NAN;
      const float inverse = finite ? 1 / unit : 0;
      ivec totals = {};
      for (int half = 0; half < 2; ++half) {
        int8_t* to = numbers + k / CHUNK * CHUNK;
        to += PARTS == 2 ? half * VECTOR + k % CHUNK / LANE * 16 : k % CHUNK + half * 16;
        for (int i = 0; i < VECS; ++i) {
          const vec moved = finite ? values[half][i] * inverse + ROUND : vec{} + ROUND;
          const ivec whole = (ivec)moved - (ivec)(vec{} + ROUND);
          totals += whole;
          put_bytes(whole, to + i * LANES);
        }
      }
      int total = 0;
      for (int i = 0; i < LANES; ++i) total += totals[i];
      sums[k / group] += unit * float(total);
      const int32_t start = -MIDDLE * total;
      float* lanes = beside + k / CHUNK * BESIDE * LANES + k % CHUNK / LANE * 4;
      for (int i = 0; i < SMALLEST * BITS / 32; ++i) lanes[i] = unit, lanes[LANES + i] = 0;
      memcpy(lanes + LANES, &start, sizeof start);
    }
  }

  struct Weights {
    bytes parts[PARTS];

    explicit Weights(const uint8_t* from) {
      words w;
      memcpy(&w, from, sizeof w);
      parts[0] = bytes(PARTS == 2 ? w & uint16_t(0x0f0f) : w);
      if constexpr (PARTS == 2) parts[1] = bytes(w >> 4 & uint16_t(0x0f0f));
    }
  };

  static vec dot(const ReadyRow& x, index_t, index_t chunk, const Weights& weights) {
    const float* beside = x.beside + chunk * BESIDE * LANES;
    const uint8_t* from = (const uint8_t*)x.numbers + chunk * CHUNK;
    const ivec sums = add_products((ivec)load(beside + LANES), weights.parts, from);
    return __builtin_convertvector(sums, vec) * load(beside);
  }

 private:
  static float largest(vec x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float found = 0;
    for (int i = 0; i < LANES; ++i) found = std::max(found, float(x[i]));
    return found;
#endif
  }

  static void put_bytes(ivec x, int8_t* to) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)x));
#else
    for (int i = 0; i < LANES; ++i) to[i] = int8_t(x[i]);
#endif
  }

  // One load each: GCC copies an array of vectors by halves, which the next load has to wait for.
  static bytes part_of(const uint8_t* x, int part) {
    bytes found;
    memcpy(&found, x + part * VECTOR, sizeof found);
    return found;
  }

  // Products with the signed bytes `x`, four neighbours to each sum.
  static ivec add_products(ivec sums, const bytes (&w)[PARTS], const uint8_t* x) {
#if defined(EMO_PACKED_PANELS)
    for (int i = 0; i < PARTS; ++i)
      sums = (ivec)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)w[i], (__m512i)part_of(x, i));
#elif defined(__AVX2__)
    const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)w[0], (__m256i)part_of(x, 0)),
                                           _mm256_maddubs_epi16((__m256i)w[1], (__m256i)part_of(x, 1)));
    sums += (ivec)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
    return sums;
  }
};

#if defined(EMO_PACKED_PANELS)
// ---- panels -----------------------------------------------------------------------------------------------

// Several rows. A panel is 32 outputs' weights, turned once for all rows: a vector has the same 32 bits of 16
// outputs. Each of its parts is multiplied with four activations of a row. So nothing has to be summed over a
// vector. The products leave time to take the parts out anew for every few rows.
constexpr index_t PANEL_FROM = 4;    // rows, from which panels are faster; without zero points one more
constexpr index_t PANEL = 32;        // outputs
constexpr int HELD_ROWS = 6;         // as many as the registers hold
constexpr index_t PANEL_CHUNKS = 4;  // vectors of a row at a time, which stay in the first cache

template <class Matrix>
struct Panels {
  using Form = Bytes<Matrix::BITS>;
  static constexpr index_t CHUNK = Matrix::CHUNK, UNITS = CHUNK / SMALLEST;

  const Matrix& weights;
  index_t outs;
  // For each group and output.
  std::vector<float> scales;
  std::vector<int32_t> zeros;
  alignas(64) __m512i numbers[PANEL_CHUNKS][16][2];

  Panels(const Matrix& weights, index_t outs) : weights(weights), outs(outs) {
    scales.resize(weights.groups() * PANEL);
    if (weights.zeros) zeros.resize(weights.groups() * PANEL);
  }

  index_t row(index_t n, index_t i) const { return std::min(n + i, outs - 1); }

  // use(group, half, numbers of 16 outputs, which part of them is the group's) of all groups. Those of the
  // next panel are asked for: they are too few of a row for the processor to see a stream.
  template <class T, class Use>
  void for_groups(index_t n, const T* numbers, Use use) const {
    constexpr index_t EACH = 4 / sizeof(T), LINE = 16 * EACH;
    const index_t groups = weights.groups();
    for (index_t half = 0; half < 2; ++half)
      for (index_t g = 0; g < groups; g += LINE) {
        const index_t count = std::min(LINE, groups - g);
        const uint64_t mask = ~uint64_t(0) >> (64 - count);
        __m512i lines[16];
        for (index_t i = 0; i < 16; ++i) {
          const T* from = numbers + row(n, half * 16 + i) * groups + g;
          _mm_prefetch((const char*)(from + PANEL * groups), _MM_HINT_T1);
          lines[i] = sizeof(T) == 4   ? _mm512_maskz_loadu_epi32(__mmask16(mask), from)
                     : sizeof(T) == 2 ? _mm512_maskz_loadu_epi16(__mmask32(mask), from)
                                      : _mm512_maskz_loadu_epi8(mask, from);
        }
        transpose(lines, lines);
        for (index_t i = 0; i < count; ++i) use(g + i, half, lines[i / EACH], i % EACH);
      }
  }

  void take_scales(index_t n) {
    for_groups(n, weights.scales, [&](index_t g, index_t half, __m512i line, index_t part) {
      if constexpr (sizeof(typename Matrix::Scale) == 2)
        line = part ? _mm512_and_si512(line, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(line, 16);
      _mm512_storeu_si512(&scales[g * PANEL + half * 16], line);
    });
    if (!weights.zeros) return;
    for_groups(n, weights.zeros, [&](index_t g, index_t half, __m512i line, index_t part) {
      line = _mm512_and_si512(_mm512_srlv_epi32(line, _mm512_set1_epi32(8 * part)), _mm512_set1_epi32(0xff));
      _mm512_storeu_si512(&zeros[g * PANEL + half * 16], line);
    });
  }

  // Vectors [first, first + count) of the rows, the last perhaps in part. The next panel's are asked for.
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
  template <int ROWS, bool ZEROS>
  __attribute__((noinline)) void multiply(const ReadyRow* x, index_t first, index_t count,
                                          float* sums) const {
    __m512 acc[ROWS][2];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < 2; ++v) acc[m][v] = _mm512_loadu_ps(sums + m * PANEL + v * 16);
    for (index_t c = 0; c < count; ++c) {
      const index_t k = (first + c) * CHUNK, units = std::min<index_t>(UNITS, (weights.in - k) / SMALLEST);
      for (index_t unit = 0; unit < units; ++unit) {
        const index_t group = (k + unit * SMALLEST) / weights.group * PANEL;
        const index_t lane = (first + c) * Form::BESIDE * LANES + unit * Matrix::BITS;
        const __m512i(*from)[2] = numbers[c] + unit * Matrix::BITS;
        __m512i found[ROWS][2];
#pragma GCC unroll 6
        for (int m = 0; m < ROWS; ++m) {
          const __m512i start = _mm512_castps_si512(_mm512_set1_ps(x[m].beside[lane + LANES]));
          if constexpr (ZEROS) {  // the activations' sum times the zero point
            const __m512i total = _mm512_srai_epi32(start, Matrix::BITS - 1);
            found[m][0] = _mm512_madd_epi16(_mm512_loadu_si512(&zeros[group]), total);
            found[m][1] = _mm512_madd_epi16(_mm512_loadu_si512(&zeros[group + 16]), total);
          } else {
            found[m][0] = found[m][1] = start;
          }
        }
#pragma GCC unroll 8
        for (int j = 0; j < Matrix::BITS; ++j) {
          const typename Form::Weights a((const uint8_t*)&from[j][0]), b((const uint8_t*)&from[j][1]);
#pragma GCC unroll 2
          for (int part = 0; part < Form::PARTS; ++part)
#pragma GCC unroll 6
            for (int m = 0; m < ROWS; ++m) {
              const char* at = (const char*)x[m].numbers + k + part * VECTOR + (unit * Matrix::BITS + j) * 4;
              int32_t four;
              memcpy(&four, at, sizeof four);
              const __m512i spread = _mm512_set1_epi32(four);
              found[m][0] = _mm512_dpbusd_epi32(found[m][0], (__m512i)a.parts[part], spread);
              found[m][1] = _mm512_dpbusd_epi32(found[m][1], (__m512i)b.parts[part], spread);
            }
        }
        const __m512 low = _mm512_loadu_ps(&scales[group]), high = _mm512_loadu_ps(&scales[group + 16]);
#pragma GCC unroll 6
        for (int m = 0; m < ROWS; ++m) {
          const __m512 unit_of = _mm512_set1_ps(x[m].beside[lane]);
          const __m512 first_half = _mm512_mul_ps(_mm512_cvtepi32_ps(found[m][0]), unit_of);
          const __m512 second_half = _mm512_mul_ps(_mm512_cvtepi32_ps(found[m][1]), unit_of);
          acc[m][0] = _mm512_fmadd_ps(first_half, low, acc[m][0]);
          acc[m][1] = _mm512_fmadd_ps(second_half, high, acc[m][1]);
        }
      }
    }
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m)
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(sums + m * PANEL + v * 16, acc[m][v]);
  }
  template <int ROWS = HELD_ROWS>
  void multiply(const ReadyRow* x, int rows, index_t first, index_t count, float* sums) const {
    if (rows == ROWS)
      return weights.zeros ? multiply<ROWS, true>(x, first, count, sums)
                           : multiply<ROWS, false>(x, first, count, sums);
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
#endif

}  // namespace
