// Products of bfloat16 by AMX tiles, where the machine has them.
#pragma once

#include <algorithm>

#include "vectors.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define EMO_AMX 1
#endif

namespace {

constexpr index_t TOKEN_BLOCK = 256;  // tokens packed at a time: with 2048 inputs, half of the second cache

bool amx_allowed() {
#if defined(EMO_AMX)
  static const bool allowed =
      syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
  return allowed;
#else
  return false;
#endif
}

#if defined(EMO_AMX)
constexpr index_t TILE = 16;  // rows of a tile; its columns are 16 floats, or 16 pairs of bfloat16

// Tiles 0 to 3 are sums, 4 and 5 weights, 6 and 7 tokens; all full.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t columns[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.columns[t] = 64, config.rows[t] = 16;
    asm volatile("" ::"r"(&config) : "memory");  // all of it is read, which the intrinsic does not say
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

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

// Rows of x into tiles [row tile][in / 32][16 pairs along in][16 rows]; missing rows are zeros.
void pack_rows(const bf16* const* x, index_t rows, index_t in, bf16* to) {
  for (index_t m = 0; m < rows; m += TILE)
    for (index_t k = 0; k < in; k += 32, to += 512) {
      __m512i lines[16], turned[16];
      for (index_t i = 0; i < 16; ++i)
        lines[i] = m + i < rows ? _mm512_loadu_si512(x[m + i] + k) : _mm512_setzero_si512();
      transpose(lines, turned);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 32 * i, turned[i]);
    }
}

// A factor of a product: two strips of tiles, and how to go along them.
struct Strips {
  const bf16 *first, *second;
  index_t stride;  // bytes from a tile's row to its next
  index_t step;    // numbers from a tile to the next along the sum
};
// Strips that `pack_*` made.
inline Strips packed_strips(const bf16* first, index_t length) { return {first, first + length, 64, 512}; }

// Sums of one or two strips of `a` with one or two of `b`, each a tile of 16 x 16: [a0 b0, a0 b1, a1 b0, a1 b1].
// The tiles of a have 16 rows of 32 numbers along the sum, those of b 16 rows of pairs along it.
// With ADD they are added to what is there.
template <bool PAIR_A, bool PAIR_B, bool ADD>
inline void tile_products(Strips a, Strips b, index_t depth, float* sums) {
  // Tile loads do not tell the compiler what they read: it shall be written by now.
  asm volatile("" ::: "memory");
  if (ADD) {
    _tile_loadd(0, sums, 64);
    if (PAIR_B) _tile_loadd(1, sums + 256, 64);
    if (PAIR_A) _tile_loadd(2, sums + 512, 64);
    if (PAIR_A && PAIR_B) _tile_loadd(3, sums + 768, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (index_t k = 0; k < depth; k += 32) {
    _tile_loadd(4, a.first, a.stride);
    _tile_loadd(6, b.first, b.stride);
    if (PAIR_A) _tile_loadd(5, a.second, a.stride);
    _tile_dpbf16ps(0, 4, 6);
    if (PAIR_A) _tile_dpbf16ps(2, 5, 6);
    if (PAIR_B) {
      _tile_loadd(7, b.second, b.stride);
      _tile_dpbf16ps(1, 4, 7);
      if (PAIR_A) _tile_dpbf16ps(3, 5, 7);
    }
    a.first += a.step, a.second += a.step, b.first += b.step, b.second += b.step;
  }
  _tile_stored(0, sums, 64);
  if (PAIR_B) _tile_stored(1, sums + 256, 64);
  if (PAIR_A) _tile_stored(2, sums + 512, 64);
  if (PAIR_A && PAIR_B) _tile_stored(3, sums + 768, 64);
}

template <bool ADD = false>
inline void tile_products(bool pair_a, bool pair_b, Strips a, Strips b, index_t depth, float* sums) {
  if (pair_a)
    (pair_b ? tile_products<true, true, ADD> : tile_products<true, false, ADD>)(a, b, depth, sums);
  else
    (pair_b ? tile_products<false, true, ADD> : tile_products<false, false, ADD>)(a, b, depth, sums);
}

// sums[16 outputs][16 tokens] to lines of 16 outputs, one a token.
inline void turn(const float* sums, __m512i (&lines)[16]) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(sums + 16 * i);
  transpose(rows, lines);
}

// Two rows of 32 to pairs of each column: the first 16 columns, and the others.
inline void interleave(__m512i a, __m512i b, __m512i* low, __m512i* high) {
  alignas(64) static const uint16_t columns[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  *low = _mm512_permutex2var_epi16(a, _mm512_load_si512(columns), b);
  *high = _mm512_permutex2var_epi16(a, _mm512_load_si512(columns + 32), b);
}

inline __m512i load_or_zero(const bf16* p) { return p ? _mm512_loadu_si512(p) : _mm512_setzero_si512(); }

// Two strips for the right factor of a sum of length `depth`, of 32 columns, from k = `begin` to `end`: row(k)
// points to those of row k, or is null for zeros.
template <class Row>
inline void pack_pairs(index_t begin, index_t end, index_t depth, Row row, bf16* strips) {
  for (index_t k = begin; k < end; k += 32) {
    bf16 *to = strips + 16 * k, *more = to + 16 * depth;
    for (index_t i = 0; i < 16; ++i) {
      __m512i low, high;
      interleave(load_or_zero(row(k + 2 * i)), load_or_zero(row(k + 2 * i + 1)), &low, &high);
      _mm512_storeu_si512(to + 32 * i, low);
      _mm512_storeu_si512(more + 32 * i, high);
    }
  }
}

// The same for the left factor: columns become rows.
template <class Row>
inline void pack_columns(index_t depth, Row row, bf16* strips) {
  for (index_t k = 0; k < depth; k += 32) {
    bf16 *to = strips + 16 * k, *more = to + 16 * depth;
    __m512i low[16], high[16], turned[16];
    for (index_t i = 0; i < 16; ++i)
      interleave(load_or_zero(row(k + 2 * i)), load_or_zero(row(k + 2 * i + 1)), &low[i], &high[i]);
    transpose(low, turned);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 32 * i, turned[i]);
    transpose(high, turned);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(more + 32 * i, turned[i]);
  }
}

// sums = rows, packed as strips of `depth`, times `columns` columns of weights [depth][stride]: blocks of 32 by 32
// as `tile_products` leaves them, those of 32 rows one after the other. Weights are read along their rows, a
// block of the depth at a time, for which there is room in `packed`.
constexpr index_t TILE_DEPTH = 128;
void times_columns(const bf16* rows, index_t count, const bf16* weights, index_t stride, index_t depth,
                   index_t columns, bf16* packed, float* sums) {
  for (index_t k0 = 0; k0 < depth; k0 += TILE_DEPTH) {
    const index_t deep = std::min(TILE_DEPTH, depth - k0);
    for (index_t k = 0; k < deep; k += 32)
      for (index_t c = 0; c < columns; c += 32)
        pack_pairs(k, k + 32, deep, [&](index_t r) { return weights + (k0 + r) * stride + c; }, packed + c * deep);
    for (index_t m = 0; m < count; m += 2 * TILE)
      for (index_t c = 0; c < columns; c += 32) {
        const Strips left{rows + m * depth + 16 * k0, rows + (m + TILE) * depth + 16 * k0, 64, 512};
        const Strips right = packed_strips(packed + c * deep, TILE * deep);
        float* block = sums + m * columns + c * 32;
        if (k0)
          tile_products<true>(m + TILE < count, true, left, right, deep, block);
        else
          tile_products(m + TILE < count, true, left, right, deep, block);
      }
  }
}

// SiLU(gate) * up of 16 outputs and 16 tokens, as half a packed tile: pairs along the outputs.
inline void activate_tile(const float* gate, const float* up, bf16* to) {
  alignas(64) static const uint16_t pairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(pairs);
  for (int i = 0; i < 16; i += 2) {
    const vec even = silu(load(gate + 16 * i)) * load(up + 16 * i);
    const vec odd = silu(load(gate + 16 * i + 16)) * load(up + 16 * i + 16);
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_storeu_si512(to + 16 * i, _mm512_permutexvar_epi16(order, (__m512i)both));
  }
}
#endif

}  // namespace
