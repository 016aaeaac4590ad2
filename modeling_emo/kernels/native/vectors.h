// Numbers, and vectors of whatever width the machine has.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using index_t = int64_t;

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline void store(float* to, float x) { *to = x; }
inline void store(bf16* to, float x) {  // to the nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  to->bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}

// What fits the registers: STREAM_ROWS rows by 2 outputs, or TILE_ROWS by TILE_OUTS.
#if defined(__AVX512F__)
constexpr int LANES = 16, STREAM_ROWS = 8, TILE_ROWS = 4, TILE_OUTS = 6;
#elif defined(__AVX2__)
constexpr int LANES = 8, STREAM_ROWS = 4, TILE_ROWS = 2, TILE_OUTS = 4;
#elif defined(__aarch64__)
constexpr int LANES = 4, STREAM_ROWS = 8, TILE_ROWS = 4, TILE_OUTS = 6;
#else
constexpr int LANES = 4, STREAM_ROWS = 4, TILE_ROWS = 2, TILE_OUTS = 4;
#endif

// Vectors by the compilers' own extension: one source for every machine.
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));
typedef uint16_t hvec __attribute__((vector_size(2 * LANES)));

inline vec load(const float* p) {
  vec v;
  memcpy(&v, p, sizeof v);
  return v;
}
inline vec load(const bf16* p) {
  hvec h;
  memcpy(&h, p, sizeof h);
  return (vec)(__builtin_convertvector(h, uvec) << 16);
}
inline void put(float* to, vec x) { memcpy(to, &x, sizeof x); }
inline void put(bf16* to, vec x) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  memcpy(to, &rounded, sizeof rounded);
#else
  for (int i = 0; i < LANES; ++i) store(to + i, x[i]);
#endif
}

template <class T>
inline void copy_back(const float* from, index_t count, T* to) {
  index_t i = 0;
  for (; i + LANES <= count; i += LANES) put(to + i, load(from + i));
  for (; i < count; ++i) store(to + i, from[i]);
}

#if defined(__AVX512BF16__)
// Stores 32 numbers that nobody reads soon: past the caches, where the place is aligned.
inline void stream_32(__m512 first, __m512 second, float* to) {
  if (size_t(to) % 64) {
    _mm512_storeu_ps(to, first), _mm512_storeu_ps(to + 16, second);
  } else {
    _mm512_stream_ps(to, first), _mm512_stream_ps(to + 16, second);
  }
}
inline void stream_32(__m512 first, __m512 second, bf16* to) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
  if (size_t(to) % 64)
    _mm512_storeu_si512(to, both);
  else
    _mm512_stream_si512((__m512i*)to, both);
}
#endif
// Before others may read what was streamed.
inline void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

template <int N>
inline float sum(float __attribute__((vector_size(4 * N))) v) {
  if constexpr (N == 4) {
    return (v[0] + v[1]) + (v[2] + v[3]);
  } else {
    float __attribute__((vector_size(2 * N))) low, high;
    memcpy(&low, &v, 2 * N);
    memcpy(&high, (const char*)&v + 2 * N, 2 * N);
    return sum<N / 2>(low + high);
  }
}

#if defined(__AVX512F__)
// Lines of 16 become columns.
inline void transpose(const __m512i (&a)[16], __m512i (&out)[16]) {
  __m512i b[16], c[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i lo0 = _mm512_unpacklo_epi32(a[i], a[i + 1]), hi0 = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    const __m512i lo1 = _mm512_unpacklo_epi32(a[i + 2], a[i + 3]),
                  hi1 = _mm512_unpackhi_epi32(a[i + 2], a[i + 3]);
    b[i] = _mm512_unpacklo_epi64(lo0, lo1), b[i + 1] = _mm512_unpackhi_epi64(lo0, lo1);
    b[i + 2] = _mm512_unpacklo_epi64(hi0, hi1), b[i + 3] = _mm512_unpackhi_epi64(hi0, hi1);
  }
  for (int i = 0; i < 4; ++i) {  // b[4g + i] has column 4j + i of rows 4g..4g+3 in its j-th quarter
    c[i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88), c[4 + i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    c[8 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    c[12 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
    out[i] = _mm512_shuffle_i32x4(c[i], c[8 + i], 0x88),
    out[8 + i] = _mm512_shuffle_i32x4(c[i], c[8 + i], 0xdd);
    out[4 + i] = _mm512_shuffle_i32x4(c[4 + i], c[12 + i], 0x88);
    out[12 + i] = _mm512_shuffle_i32x4(c[4 + i], c[12 + i], 0xdd);
  }
}
#endif

// What one step along `in` takes: so many numbers of each factor, and their products added to a vector of
// sums, of which each takes PAIRED numbers.
template <class T>
struct Step {
  static constexpr int size = LANES, PAIRED = 1;
  using reg = vec;
  static reg get(const T* p) { return load(p); }
  static vec add(vec sums, reg a, reg b) { return sums + a * b; }
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  static constexpr int size = 32, PAIRED = 2;
  using reg = __m512bh;
  static reg get(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static vec add(vec sums, reg a, reg b) { return (vec)_mm512_dpbf16_ps((__m512)sums, a, b); }
};
#endif
// Fewer numbers than a step takes, from its place `first` on, among zeros.
template <class T>
inline typename Step<T>::reg get_some(const T* p, index_t first, index_t count) {
#if defined(__AVX512F__)
  const uint32_t mask = ((uint64_t(1) << count) - 1) << first;
  if constexpr (sizeof(T) == 4) return (vec)_mm512_maskz_loadu_ps(mask, p - first);
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  if constexpr (sizeof(T) == 2) return (__m512bh)_mm512_maskz_loadu_epi16(mask, p - first);
#endif
#endif
  T numbers[Step<T>::size] = {};
  memcpy(numbers + first, p, count * sizeof(T));
  return Step<T>::get(numbers);
}

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

// exp to about 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. From 88.4 on
// infinite, so that SiLU of a huge negative number is zero.
inline vec exponential(vec x) {
  const vec low = x * 0 - 87.0f, high = x * 0 + 89.0f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vec shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
  const vec n = shifted - 12582912.0f;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ivec exponent = __builtin_convertvector(n, ivec) + 127;
  return p * (vec)(exponent << 23);
}
inline vec silu(vec x) { return x / (1.0f + exponential(-x)); }

}  // namespace
