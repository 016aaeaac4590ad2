// Weights of 8 and 4 bits: how they lie in memory, the activations they are multiplied with, few of them.
//
// A row has its numbers one after the other, stored unsigned, the first in the lowest bits; each `group` of
// them shares a scale and perhaps a zero point: weight = (stored - zero) * scale. A vector of them is taken
// apart by shifts and masks: part i has the numbers i, i + PARTS, i + 2 * PARTS ... of it. Activations
// are brought into that order once, and each part is multiplied with its own. Weights are never written back.
//
// Every 16 bytes of a vector are of one group, since groups are multiples of 32. So sums of a vector are kept
// by 16 bytes, and multiplied with the scales of these. What is stored is larger than what it stands for by
// its zero, and by what else a format adds; this is taken off at the end, as the scales times the sums of
// activations of each group.
#pragma once

#include <algorithm>
#include <cmath>

#include "memory.h"
#include "vectors.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

constexpr int VECTOR = 4 * LANES;    // bytes
constexpr index_t SMALLEST = 32;     // groups are multiples of it
constexpr index_t FEW_ROWS = 4;      // rows at a time, where weights are unpacked in registers

typedef uint16_t words __attribute__((vector_size(VECTOR)));
typedef int16_t shorts __attribute__((vector_size(VECTOR)));

template <int BITS_, class S>
struct PackedMatrix {
  static constexpr int BITS = BITS_, PARTS = 16 / BITS;   // numbers in 16 bits
  static constexpr index_t CHUNK = 8 * VECTOR / BITS;     // numbers in a vector
  static constexpr int MIDDLE = 1 << (BITS - 1);          // the zero where none are given
  using Scale = S;

  const uint8_t* numbers;  // (outs, in)
  const S* scales;         // (outs, in / group)
  const uint8_t* zeros;    // the same, or null
  index_t in, group;

  index_t groups() const { return in / group; }
  const uint8_t* row(index_t n) const { return numbers + n * (in * BITS / 8); }
  const S* scales_of(index_t n) const { return scales + n * groups(); }
  const uint8_t* zeros_of(index_t n) const { return zeros ? zeros + n * groups() : nullptr; }
  PackedMatrix from(index_t n) const {
    return {row(n), scales_of(n), zeros_of(n), in, group};
  }
};

// ---- activations ------------------------------------------------------------------------------------------

// Where number k of a row is in the order of the parts.
template <int BITS>
inline index_t in_parts(index_t k) {
  constexpr index_t PARTS = 16 / BITS, CHUNK = 8 * VECTOR / BITS;
  return k / CHUNK * CHUNK + k % PARTS * (CHUNK / PARTS) + k % CHUNK / PARTS;
}

struct ReadyRow {
  const int16_t* numbers;  // in the order of parts, zeros up to a whole vector; perhaps another such row
  const float* beside;     // what a form keeps for each vector, as vectors
  const float* sums;       // of each group
};

// The activations that are multiplied with 16 bytes of weights.
template <int BITS>
constexpr index_t LANE = 128 / BITS;

// Any machine: whole numbers of 16 bits, times a scale for each 32. They are off by 2^-16 of the largest
// among these: bfloat16 is off by 2^-9 of each. A float32 takes two, and is off by 2^-31.
template <int BITS, class X>
struct WholeNumbers {
  static constexpr int PLANES = sizeof(X) == 4 ? 2 : 1, BESIDE = 1 + PLANES;  // scales; the sums' beginnings
  static constexpr index_t CHUNK = 8 * VECTOR / BITS;
  static constexpr float REST = 0x1p-15f;

  static index_t numbers_of(index_t in) { return PLANES * ((in + CHUNK - 1) / CHUNK * CHUNK); }

  static void prepare(const X* x, index_t in, index_t group, int16_t* numbers, float* beside, float* sums) {
    const index_t length = numbers_of(in) / PLANES;
    std::fill(numbers, numbers + PLANES * length, int16_t(0));
    std::fill(beside, beside + length / CHUNK * BESIDE * LANES, 0.0f);
    std::fill(sums, sums + in / group, 0.0f);
    for (index_t k = 0; k < in; k += SMALLEST) {
      float values[SMALLEST], most = 0, odd = 0;
      for (index_t i = 0; i < SMALLEST; ++i) {
        values[i] = to_float(x[k + i]);
        odd += values[i] - values[i];
        most = std::max(most, std::fabs(values[i]));
      }
      // What is not finite spoils all sums it is part of, as it should.
      const bool finite = odd == 0;
      const float unit = finite ? std::max(most, 0x1p-110f) / 32767 : NAN, inverse = finite ? 1 / unit : 0;
      for (index_t i = 0; i < SMALLEST; i += LANE<BITS>) {
        float* lane = beside + (k + i) / CHUNK * BESIDE * LANES + (k + i) % CHUNK / LANE<BITS> * 4;
        std::fill(lane, lane + 4, unit);
        int32_t totals[2] = {};
        for (index_t j = i; j < i + LANE<BITS>; ++j) {
          const float scaled = finite ? values[j] * inverse : 0, whole = std::rint(scaled);
          const index_t to = in_parts<BITS>(k + j);
          numbers[to] = int16_t(whole), totals[0] += int32_t(whole);
          if (PLANES == 2) {
            const float rest = std::rint((scaled - whole) * (1 / REST));
            numbers[length + to] = int16_t(rest), totals[1] += int32_t(rest);
          }
        }
        sums[k / group] += unit * (float(totals[0]) + float(totals[1]) * REST);
        for (int plane = 0; plane < PLANES; ++plane) {
          const int32_t start = -totals[plane] * (1 << (BITS - 1));
          memcpy(lane + (1 + plane) * LANES, &start, 4);
        }
      }
    }
  }

  static ivec multiply(shorts a, shorts b) {  // and add neighbours, of the same 16 bytes
#if defined(__AVX512BW__)
    return (ivec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (ivec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (ivec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    typedef int16_t half __attribute__((vector_size(VECTOR / 2)));
    half parts[4];
    memcpy(parts, &a, sizeof a), memcpy(parts + 2, &b, sizeof b);
    return __builtin_convertvector(parts[0], ivec) * __builtin_convertvector(parts[2], ivec) +
           __builtin_convertvector(parts[1], ivec) * __builtin_convertvector(parts[3], ivec);
#endif
  }

  struct Weights {
    shorts parts[16 / BITS];

    explicit Weights(const uint8_t* from) {
      words w;
      memcpy(&w, from, sizeof w);
#pragma GCC unroll 4
      for (int i = 0; i < 16 / BITS; ++i) parts[i] = (shorts)(w >> (i * BITS) & uint16_t((1 << BITS) - 1));
    }
  };

  static vec dot(const int16_t* x, const float* start, const Weights& weights) {
    ivec sums = (ivec)load(start);
#pragma GCC unroll 4
    for (int i = 0; i < 16 / BITS; ++i) {
      shorts part;
      memcpy(&part, x + i * 2 * LANES, sizeof part);
      sums += multiply(part, weights.parts[i]);
    }
    return __builtin_convertvector(sums, vec);
  }
  static vec dot(const ReadyRow& x, index_t length, index_t chunk, const Weights& weights) {
    const float* beside = x.beside + chunk * BESIDE * LANES;
    const int16_t* numbers = x.numbers + chunk * CHUNK;
    vec sums = dot(numbers, beside + LANES, weights);
    if constexpr (PLANES == 2) sums += dot(numbers + length / 2, beside + 2 * LANES, weights) * REST;
    return sums * load(beside);
  }
};

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define EMO_PACKED_BF16 1
// bfloat16 as they are. Four bits n become the bfloat16 16 + n by a shift and a mask: they are the upper bits
// of its fraction. The upper four of eight become 16 * (16 + n), and meet the same activations. The
// lowest four of 16 become 128 + n, without a shift. All this is taken off where sums begin.
template <int BITS>
struct Halves {
  static constexpr int BESIDE = 1;  // the sums' beginnings
  static constexpr index_t CHUNK = 8 * VECTOR / BITS;

  static index_t numbers_of(index_t in) { return (in + CHUNK - 1) / CHUNK * CHUNK; }

  static void prepare(const bf16* x, index_t in, index_t group, int16_t* numbers, float* beside,
                      float* sums) {
    constexpr index_t PARTS = 16 / BITS, EACH = CHUNK / PARTS;
    const index_t whole = in / CHUNK * CHUNK;
    for (index_t k = 0; k < whole; k += CHUNK)
      for (index_t i = 0; i < PARTS; ++i)
        for (index_t j = 0; j < EACH; ++j) numbers[k + i * EACH + j] = int16_t(x[k + j * PARTS + i].bits);
    std::fill(numbers + whole, numbers + numbers_of(in), int16_t(0));
    for (index_t k = whole; k < in; ++k) numbers[in_parts<BITS>(k)] = int16_t(x[k].bits);
    std::fill(sums, sums + in / group, 0.0f);
    for (index_t k = 0; k < in; k += CHUNK)
      put(beside + k / CHUNK * LANES, start(numbers + k));
    for (index_t k = 0; k < in; k += SMALLEST)
      sums[k / group] += sum<LANES>(load(x + k) + load(x + k + LANES));
  }

  static vec start(const int16_t* numbers) {  // of the sums of a vector
    vec found = {};
    for (int i = 0; i < 4; ++i) {
      const bool upper = BITS == 8 && i % 2;
      const float more = -(i == 0 ? 128.0f : upper ? 256.0f : 16.0f) - (upper ? 128 : BITS == 4 ? 8 : 0);
      const __m512i part = _mm512_loadu_si512(numbers + i * 4 / BITS * 32);
      const vec low = (vec)_mm512_slli_epi32(part, 16);
      const vec high = (vec)_mm512_and_si512(part, _mm512_set1_epi32(0xffff0000));
      found += (low + high) * more;
    }
    found += (vec)_mm512_permute_ps((__m512)found, 0x4e);  // the first of each 16 bytes has their sum
    found += (vec)_mm512_permute_ps((__m512)found, 0xb1);
    return (vec)_mm512_maskz_mov_ps(0x1111, (__m512)found);
  }

  struct Weights {
    __m512i parts[4];

    template <int PART>
    static __m512i part(__m512i w) {  // bits 4 * PART ... of each 16, where the fraction wants them
      if (PART == 0)
        return _mm512_ternarylogic_epi32(w, _mm512_set1_epi16(0xf), _mm512_set1_epi16(0x4300), 0xea);
      const __m512i moved = _mm512_srli_epi32(w, 4 * PART - 3);
      const uint16_t one = BITS == 8 && PART % 2 ? 0x4380 : 0x4180;  // 256 and 16
      return _mm512_ternarylogic_epi32(moved, _mm512_set1_epi16(0x78), _mm512_set1_epi16(one), 0xea);
    }
    explicit Weights(__m512i w) : parts{part<0>(w), part<1>(w), part<2>(w), part<3>(w)} {}
    explicit Weights(const uint8_t* from) : Weights(once(from)) {}
    static __m512i once(const uint8_t* from) {
      __m512i w = _mm512_loadu_si512(from);
      asm("" : "+v"(w));  // one load, not one for each part
      return w;
    }
  };

  static vec dot(const ReadyRow& x, index_t, index_t chunk, const Weights& weights) {
    const int16_t* from = x.numbers + chunk * CHUNK;
    __m512 sums = (__m512)load(x.beside + chunk * LANES);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i part = _mm512_loadu_si512(from + i * 4 / BITS * 32);
      sums = _mm512_dpbf16_ps(sums, (__m512bh)part, (__m512bh)weights.parts[i]);
    }
    return (vec)sums;
  }
};
#endif

// The rows of one factor, made ready once for all products with it.
template <class Form>
struct ReadyRows {
  index_t in, group, length, beside_length;
  Buffer<int16_t> numbers;
  Buffer<float> beside, sums;

  ReadyRows(index_t rows, index_t in, index_t group)
      : in(in),
        group(group),
        length(Form::numbers_of(in)),
        beside_length((in + Form::CHUNK - 1) / Form::CHUNK * Form::BESIDE * LANES),
        numbers(rows * length),
        beside(rows * beside_length),
        sums(rows * (in / group)) {}

  template <class X>
  void prepare(index_t row, const X* x) {
    Form::prepare(x, in, group, numbers.p + row * length, beside.p + row * beside_length,
                  sums.p + row * (in / group));
  }
  ReadyRow operator[](index_t row) const {
    return {numbers.p + row * length, beside.p + row * beside_length, sums.p + row * (in / group)};
  }
};

// ---- few rows ---------------------------------------------------------------------------------------------

// SPAN scales, each for as many 16 bytes of a vector.
template <int SPAN, class S>
inline vec spread(const S* scales) {
  constexpr int EACH = LANES / 4 / SPAN;  // lanes of 16 bytes
  if constexpr (SPAN == 1) return vec{} + to_float(*scales);
#if defined(__AVX512BW__)
  const auto place = [](int lane) { return lane / EACH << (sizeof(S) == 2 ? 16 : 0); };
  const __m512i places = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm256_set_m128i(_mm_set1_epi32(place(1)), _mm_set1_epi32(place(0)))),
      _mm256_set_m128i(_mm_set1_epi32(place(3)), _mm_set1_epi32(place(2))), 1);
  __m128i few;
  if constexpr (SPAN * sizeof(S) == 16) {
    few = _mm_loadu_si128((const __m128i*)scales);
  } else if constexpr (SPAN * sizeof(S) == 8) {
    few = _mm_loadl_epi64((const __m128i*)scales);
  } else {
    int32_t both;
    memcpy(&both, scales, sizeof both);
    few = _mm_cvtsi32_si128(both);
  }
  const __m512i all = _mm512_castsi128_si512(few);
  if constexpr (sizeof(S) == 4) return (vec)_mm512_permutexvar_ps(places, (__m512)all);
  return (vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, all);  // the upper halves of float32
#elif defined(__AVX2__)
  return (vec)_mm256_set_m128(_mm_set1_ps(to_float(scales[1])), _mm_set1_ps(to_float(scales[0])));
#endif
}

// Adds the products of `chunks` vectors of weights, from place `first` on, to sums[row][out]. A scale is of
// `each` vectors. What lies AHEAD in each stream is asked for meanwhile.
template <class Form, int ROWS, int OUTS, int SPAN, class S>
__attribute__((noinline)) void packed_tile(const ReadyRow* x, index_t length, index_t first,
                                           const uint8_t* const* w, const S* const* scales, index_t chunks,
                                           index_t each, float (&sums)[ROWS][OUTS]) {
  constexpr index_t AHEAD = 2048;
  vec acc[ROWS][OUTS] = {};
  for (index_t chunk = 0, s = 0; chunk < chunks; s += SPAN) {
    const index_t end = SPAN > 1 ? chunk + 1 : chunk + each;  // several scales are of one vector
    vec factors[OUTS];
#pragma GCC unroll 4
    for (int o = 0; o < OUTS; ++o) factors[o] = spread<SPAN>(scales[o] + s);
    do {
#pragma GCC unroll 4
      for (int o = 0; o < OUTS; ++o) {
        const uint8_t* from = w[o] + chunk * VECTOR;
        __builtin_prefetch(from + AHEAD);
        const typename Form::Weights parts(from);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m)
          acc[m][o] += Form::dot(x[m], length, first + chunk, parts) * factors[o];
      }
      ++chunk;
    } while (SPAN == 1 && chunk < end);
  }
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m)
#pragma GCC unroll 4
    for (int o = 0; o < OUTS; ++o) {
      const vec found = acc[m][o] + vec{};  // a copy: GCC keeps in memory what is taken apart
      sums[m][o] += sum<LANES>(found);
    }
}

// LANES bytes as float32. (GCC takes a `__builtin_convertvector` of bytes apart.)
inline vec floats_of(const uint8_t* from) {
#if defined(__AVX512BW__)
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
  return (vec)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  typedef uint8_t bytes __attribute__((vector_size(LANES)));
  bytes some;
  memcpy(&some, from, sizeof some);
  return __builtin_convertvector(some, vec);
#endif
}

// Takes off what zero points other than the middle stand for.
template <class Matrix>
__attribute__((noinline)) float of_zeros(const Matrix& weights, index_t n, const float* sums) {
  const uint8_t* zeros = weights.zeros_of(n);
  const auto* scales = weights.scales_of(n);
  vec total = {};
  index_t g = 0;
  for (; g + LANES <= weights.groups(); g += LANES)
    total += (floats_of(zeros + g) - float(Matrix::MIDDLE)) * load(scales + g) * load(sums + g);
  float found = sum<LANES>(total);
  for (; g < weights.groups(); ++g) found += float(zeros[g] - Matrix::MIDDLE) * to_float(scales[g]) * sums[g];
  return found;
}

// Asks for the scales or zero points of a row some rows ahead: too few of them are read for the processor to
// see a stream.
template <class S>
inline void ask_ahead(const S* row, index_t groups) {
  constexpr index_t ROWS_AHEAD = 4, LINE = 64 / sizeof(S);
  for (index_t g = 0; g < groups; g += LINE) __builtin_prefetch(row + ROWS_AHEAD * groups + g);
}

// sums[row][out] of ROWS rows with OUTS rows of weights, `gap` apart.
template <class Form, int ROWS, int OUTS, int SPAN, class Matrix>
inline void packed_sums(const ReadyRow* x, index_t length, const Matrix& weights, index_t n, index_t gap,
                        float (&sums)[ROWS][OUTS]) {
  using S = typename Matrix::Scale;
  constexpr index_t CHUNK = Matrix::CHUNK;
  const index_t in = weights.in, group = weights.group, whole = in / CHUNK;
  const uint8_t* w[OUTS];
  const S* scales[OUTS];
  for (int o = 0; o < OUTS; ++o) {
    w[o] = weights.row(n + o * gap), scales[o] = weights.scales_of(n + o * gap);
    ask_ahead(scales[o], weights.groups());
    if (weights.zeros) ask_ahead(weights.zeros_of(n + o * gap), weights.groups());
  }
  for (int m = 0; m < ROWS; ++m)
    for (int o = 0; o < OUTS; ++o) sums[m][o] = 0;
  packed_tile<Form, ROWS, OUTS, SPAN>(x, length, 0, w, scales, whole, group / CHUNK, sums);
  if (in % CHUNK) {  // what does not fill a vector, among zeros
    uint8_t numbers[OUTS][VECTOR] = {};
    S some[OUTS][SPAN] = {};
    for (int o = 0; o < OUTS; ++o) {
      const index_t first = whole * CHUNK / group;
      memcpy(numbers[o], w[o] + whole * VECTOR, in % CHUNK * Matrix::BITS / 8);
      memcpy(some[o], scales[o] + first, (in / group - first) * sizeof(S));
      w[o] = numbers[o], scales[o] = some[o];
    }
    packed_tile<Form, ROWS, OUTS, SPAN>(x, length, whole, w, scales, 1, 1, sums);
  }
  if (weights.zeros)
    for (int m = 0; m < ROWS; ++m)
      for (int o = 0; o < OUTS; ++o) sums[m][o] -= of_zeros(weights, n + o * gap, x[m].sums);
}

// use(row, out, sum) of ROWS rows with `outs` rows of weights. Memory is read fastest as two streams, each
// strictly in order: the first and the second half of the outputs.
template <class Form, int ROWS, int SPAN, class Matrix, class Use>
inline void packed_rows(const ReadyRow* x, const Matrix& weights, index_t outs, Use use) {
  const index_t length = Form::numbers_of(weights.in), half = outs / 2;
  for (index_t n = 0; n < half; ++n) {
    float sums[ROWS][2];
    packed_sums<Form, ROWS, 2, SPAN>(x, length, weights, n, half, sums);
    for (int m = 0; m < ROWS; ++m) use(m, n, sums[m][0]), use(m, n + half, sums[m][1]);
  }
  if (outs % 2) {
    float sums[ROWS][1];
    packed_sums<Form, ROWS, 1, SPAN>(x, length, weights, outs - 1, 0, sums);
    for (int m = 0; m < ROWS; ++m) use(m, outs - 1, sums[m][0]);
  }
}

// The same for `rows` rows, FEW_ROWS at a time.
template <class Form, int SPAN, int ROWS = FEW_ROWS, class Matrix, class Use>
inline void packed_row_blocks(const ReadyRow* x, index_t rows, const Matrix& weights, index_t outs, Use use) {
  index_t m = 0;
  for (; m + ROWS <= rows; m += ROWS)
    packed_rows<Form, ROWS, SPAN>(x + m, weights, outs,
                                  [&](index_t row, index_t n, float sum) { use(m + row, n, sum); });
  if constexpr (ROWS > 1)
    if (m < rows)
      packed_row_blocks<Form, SPAN, ROWS - 1>(
          x + m, rows - m, weights, outs, [&](index_t row, index_t n, float sum) { use(m + row, n, sum); });
}
template <class Form, class Matrix, class Use>
inline void few_products(const ReadyRow* x, index_t rows, const Matrix& weights, index_t outs, Use use) {
  const index_t span = Matrix::CHUNK / weights.group;
  if constexpr (Matrix::CHUNK >= 4 * SMALLEST)
    if (span == 4) return packed_row_blocks<Form, 4>(x, rows, weights, outs, use);
  if constexpr (Matrix::CHUNK >= 2 * SMALLEST)
    if (span == 2) return packed_row_blocks<Form, 2>(x, rows, weights, outs, use);
  packed_row_blocks<Form, 1>(x, rows, weights, outs, use);
}

}  // namespace
