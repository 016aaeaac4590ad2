// Products by AMX tiles, where the machine has them.
//
// Tiles multiply bfloat16 and sum in float32. A float32 is the sum of three bfloat16 (8 bits of its 24 each),
// and a product of two the sum of nine products, of which three are below its rounding: six remain, which
// is faster than float32 vectors from some 10 rows an expert on. (Henry, Tang, Heinecke: Leveraging the
// bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations,
// https://arxiv.org/abs/1904.06376.) Infinities come out as NaN.
#pragma once

#include <algorithm>

#include "processor.h"
#include "vectors.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define EMO_AMX 1
#endif

namespace {

bool amx_allowed() {
#if defined(EMO_AMX)
  static const bool allowed = ask_for_tiles();
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

// How many bfloat16 stand for a number.
template <class T>
constexpr int PARTS = sizeof(T) == 4 ? 3 : 1;
// The nearest number of 8 bits, and the rest.
inline __m512i cut_bits(__m512* x) {
  const __m512i cut = _mm512_and_si512(_mm512_add_epi32((__m512i)*x, _mm512_set1_epi32(0x8000)),
                                       _mm512_set1_epi32(0xffff0000));
  *x = _mm512_sub_ps(*x, (__m512)cut);
  return cut;
}
// 32 numbers, in order, to their parts.
inline void split(__m512 a, __m512 b, __m512i (&parts)[1]) { parts[0] = (__m512i)_mm512_cvtne2ps_pbh(b, a); }
inline void split(__m512 a, __m512 b, __m512i (&parts)[3]) {
  alignas(64) static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i order = _mm512_load_si512(upper);
  for (int p = 0; p < 2; ++p) {
    const __m512i first = cut_bits(&a), second = cut_bits(&b);
    parts[p] = _mm512_permutex2var_epi16(first, order, second);
  }
  parts[2] = _mm512_permutex2var_epi16((__m512i)a, order, (__m512i)b);  // 8 bits are left: exact
}
inline void load_parts(const bf16* from, __m512i (&parts)[1]) { parts[0] = _mm512_loadu_si512(from); }
inline void load_parts(const float* from, __m512i (&parts)[3]) {
  split(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), parts);
}

// Numbers as bfloat16, in parts `gap` numbers apart.
struct Numbers {
  const bf16* p;
  index_t gap;

  Numbers operator+(index_t i) const { return {p + i, gap}; }
  template <int N>
  void load(__m512i (&parts)[N]) const {
    for (int i = 0; i < N; ++i) parts[i] = p ? _mm512_loadu_si512(p + i * gap) : _mm512_setzero_si512();
  }
};
struct Room {  // the same, to be written
  bf16* p;
  index_t gap;

  operator Numbers() const { return {p, gap}; }
  Room operator+(index_t i) const { return {p + i, gap}; }
  template <int N>
  void store(index_t at, const __m512i (&parts)[N]) const {
    for (int i = 0; i < N; ++i) _mm512_storeu_si512(p + i * gap + at, parts[i]);
  }
};

// `count` numbers, a multiple of 32, to their parts, each 32 of them `step` after those before: 32 for a row,
// 512 for a row of a strip (below).
inline void split_row(const float* from, index_t count, Room to, index_t step) {
  for (index_t i = 0; i < count; i += 32, to = to + step) {
    __m512i parts[3];
    load_parts(from + i, parts);
    to.store(0, parts);
  }
}

// A strip of packed rows: tiles of 16 rows of 32 numbers one after the other, along the numbers, and the next
// 16 rows after them. Widths are mostly powers of two, and so many bytes apart strips would push each other
// out of the caches: rows count as somewhat longer.
inline index_t padded(index_t width) { return width + 64; }
// Where 32 numbers of a row lie:
inline index_t in_strips(index_t row, index_t width, index_t column) {
  return row / TILE * TILE * padded(width) + column / 32 * 512 + row % TILE * 32;
}

// Rows into tiles [row tile][in / 32][16 pairs along in][16 rows]; missing rows are zeros.
template <int N>
void pack_rows(const Numbers* x, index_t rows, index_t in, Room to) {
  for (index_t m = 0; m < rows; m += TILE, to = to + TILE * (padded(in) - in))
    for (index_t k = 0; k < in; k += 32, to = to + 512)
      for (int p = 0; p < N; ++p) {
        __m512i lines[16], turned[16];
        for (index_t i = 0; i < 16; ++i)
          lines[i] =
              m + i < rows ? _mm512_loadu_si512(x[m + i].p + p * x[m + i].gap + k) : _mm512_setzero_si512();
        transpose(lines, turned);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to.p + p * to.gap + 32 * i, turned[i]);
      }
}

// A factor of a product: two strips of tiles, and how to go along them.
struct Strips {
  const bf16 *first, *second;
  index_t stride;  // bytes from a tile's row to its next
  index_t step;    // numbers from a tile to the next along the sum
  index_t gap;     // numbers from a part to the next
};
// Strips of packed tiles, each of `length` numbers.
inline Strips packed_strips(Numbers first, index_t length) {
  return {first.p, first.p + length, 64, 512, first.gap};
}

// Sums of one or two strips of `a` with one or two of `b`, each a tile of 16 x 16: [a0 b0, a0 b1, a1 b0, a1
// b1]. The tiles of a have 16 rows of 32 numbers along the sum, those of b 16 rows of pairs along it. With
// ADD they are added to what is there. `meanwhile()` is called between products, which take place beside
// other instructions: for each 32 numbers along the sum, so often:
template <int N>
constexpr index_t CALLS = N == 1 ? 1 : 6;

template <int N, bool PAIR_A, bool PAIR_B, bool ADD, class Meanwhile>
inline void tile_products(Strips a, Strips b, index_t depth, float* sums, Meanwhile meanwhile) {
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
  const auto load_a = [&](int part) {
    _tile_loadd(4, a.first + part * a.gap, a.stride);
    if (PAIR_A) _tile_loadd(5, a.second + part * a.gap, a.stride);
  };
  const auto load_b = [&](int part) {
    _tile_loadd(6, b.first + part * b.gap, b.stride);
    if (PAIR_B) _tile_loadd(7, b.second + part * b.gap, b.stride);
  };
  const auto multiply = [&] {
    _tile_dpbf16ps(0, 4, 6);
    if (PAIR_B) _tile_dpbf16ps(1, 4, 7);
    if (PAIR_A) _tile_dpbf16ps(2, 5, 6);
    if (PAIR_A && PAIR_B) _tile_dpbf16ps(3, 5, 7);
    meanwhile();
  };
  for (index_t k = 0; k < depth; k += 32) {
    if (N == 1) {
      load_a(0), load_b(0), multiply();
    } else {  // an order in which each product loads one factor
      load_a(2), load_b(0), multiply();
      load_a(1), multiply();
      load_b(1), multiply();
      load_a(0), multiply();
      load_b(2), multiply();
      load_b(0), multiply();
    }
    a.first += a.step, a.second += a.step, b.first += b.step, b.second += b.step;
  }
  _tile_stored(0, sums, 64);
  if (PAIR_B) _tile_stored(1, sums + 256, 64);
  if (PAIR_A) _tile_stored(2, sums + 512, 64);
  if (PAIR_A && PAIR_B) _tile_stored(3, sums + 768, 64);
}

struct Nothing {
  void operator()() const {}
};

template <int N, bool ADD = false, class Meanwhile = Nothing>
inline void tile_products(bool pair_a, bool pair_b, Strips a, Strips b, index_t depth, float* sums,
                          Meanwhile m = {}) {
  if (pair_a && pair_b)
    tile_products<N, true, true, ADD>(a, b, depth, sums, m);
  else if (pair_a)
    tile_products<N, true, false, ADD>(a, b, depth, sums, m);
  else if (pair_b)
    tile_products<N, false, true, ADD>(a, b, depth, sums, m);
  else
    tile_products<N, false, false, ADD>(a, b, depth, sums, m);
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

// Two rows of 32 columns as a line of each of two strips, `next` numbers apart, for the right factor of a
// sum.
inline void pack_pair(const bf16* even, const bf16* odd, Room to, index_t next) {
  __m512i low[1], high[1];
  interleave(_mm512_loadu_si512(even), _mm512_loadu_si512(odd), low, high);
  to.store(0, low);
  to.store(next, high);
}
inline void pack_pair(const float* even, const float* odd, Room to, index_t next) {
  const __m512i upper = _mm512_set1_epi32(0xffff0000);
  for (int half = 0; half < 2; ++half) {
    __m512 a = _mm512_loadu_ps(even + 16 * half), b = _mm512_loadu_ps(odd + 16 * half);
    __m512i pairs[3];
    for (int p = 0; p < 3; ++p) {
      const __m512i first = p < 2 ? cut_bits(&a) : (__m512i)a, second = p < 2 ? cut_bits(&b) : (__m512i)b;
      pairs[p] = _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_and_si512(second, upper));
    }
    to.store(half * next, pairs);
  }
}

// Two strips for a sum of length `depth`: row(k) gives 32 numbers of row k.
template <int N, class Row>
inline void pack_pairs(index_t depth, Row row, Room strips) {
  for (index_t k = 0; k < depth; k += 2) {
    __m512i even[N], odd[N], low[N], high[N];
    row(k).load(even);
    row(k + 1).load(odd);
    for (int p = 0; p < N; ++p) interleave(even[p], odd[p], &low[p], &high[p]);
    strips.store(16 * k, low);
    strips.store(16 * (k + depth), high);
  }
}

// The same for the left factor: columns become rows. row(k) gives numbers of row k.
template <int N, class Row>
inline void pack_columns(index_t depth, Row row, Room strips) {
  for (index_t k = 0; k < depth; k += 32)
    for (int p = 0; p < N; ++p) {
      __m512i low[16], high[16], turned[16];
      for (index_t i = 0; i < 16; ++i) {
        const Numbers even = row(k + 2 * i), odd = row(k + 2 * i + 1);
        __m512i a[1], b[1];
        (even + (even.p ? p * even.gap : 0)).load(a);
        (odd + (odd.p ? p * odd.gap : 0)).load(b);
        interleave(a[0], b[0], &low[i], &high[i]);
      }
      bf16* to = strips.p + p * strips.gap + 16 * k;
      transpose(low, turned);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 32 * i, turned[i]);
      transpose(high, turned);
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + 16 * depth + 32 * i, turned[i]);
    }
}

// sums = rows, packed as strips of `depth`, times `columns` columns of weights [depth][stride]: blocks of 32
// by 32 as `tile_products` leaves them, those of 32 rows one after the other. Weights are packed 32 columns
// of a block of the depth at a time, during the products with those before. What comes a block later is asked
// for meanwhile, in the order of memory: the processor does not read ahead by itself where rows lie pages
// apart.
template <class T>
void tile_times_columns(Numbers rows, index_t count, const T* weights, index_t stride, index_t depth,
                        index_t columns, float* sums) {
  constexpr int N = PARTS<T>;
  constexpr index_t DEEPEST = N == 1 ? 64 : 128, LINE = 64 / sizeof(T);
  const index_t block_depth = N > 1 && count <= 32 ? 32 : DEEPEST;  // each block adds to the sums of all rows
  alignas(64) bf16 rooms[2][N * DEEPEST * 32];
  struct Piece {
    index_t k, column, deep;
    Room packed;
  };
  const T* asked = weights + std::min(block_depth, depth) * stride;
  index_t asked_column = 0;
  const auto pack = [&](const Piece& piece, index_t k) {
    const T* even = weights + (piece.k + k) * stride + piece.column;
    pack_pair(even, even + stride, piece.packed + 16 * k, 16 * piece.deep);
    for (index_t line = 0; line < 64 / LINE; ++line) {  // as many as have just been packed
      _mm_prefetch((const char*)(asked + asked_column), _MM_HINT_T1);
      if ((asked_column += LINE) >= columns) asked_column = 0, asked += stride;
    }
  };
  const auto piece_at = [&](index_t k, index_t column, int room) {
    return Piece{k, column, std::min(block_depth, depth - k), {rooms[room], DEEPEST * 32}};
  };
  Piece piece = piece_at(0, 0, 0);
  for (index_t k = 0; k < piece.deep; k += 2) pack(piece, k);
  for (int turn = 1; piece.k < depth; turn ^= 1) {
    const Piece next = piece.column + 32 < columns ? piece_at(piece.k, piece.column + 32, turn)
                                                   : piece_at(piece.k + piece.deep, 0, turn);
    const index_t pairs = next.k < depth ? next.deep / 2 : 0;
    const index_t steps = (count + 2 * TILE - 1) / (2 * TILE) * (piece.deep / 32) * CALLS<N>;
    index_t step = 0, pair = 0;
    const Strips right = packed_strips(piece.packed, TILE * piece.deep);
    const auto meanwhile = [&] {
      for (++step; pair * steps < pairs * step; ++pair) pack(next, 2 * pair);
    };
    for (index_t m = 0; m < count; m += 2 * TILE) {
      const Strips left = packed_strips(rows + (m * padded(depth) + 16 * piece.k), TILE * padded(depth));
      float* found = sums + m * columns + piece.column * 32;
      if (piece.k)
        tile_products<N, true>(m + TILE < count, true, left, right, piece.deep, found, meanwhile);
      else
        tile_products<N>(m + TILE < count, true, left, right, piece.deep, found, meanwhile);
    }
    piece = next;
  }
}

// SiLU(gate) * up of 16 outputs and 16 tokens, as half a packed tile: pairs along the outputs.
template <int N>
inline void activate_tile(const float* gate, const float* up, Room to) {
  alignas(64) static const uint16_t pairs[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                 21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i order = _mm512_load_si512(pairs);
  for (int i = 0; i < 16; i += 2) {
    const vec even = silu(load(gate + 16 * i)) * load(up + 16 * i);
    const vec odd = silu(load(gate + 16 * i + 16)) * load(up + 16 * i + 16);
    __m512i both[N];
    split((__m512)even, (__m512)odd, both);
    for (int p = 0; p < N; ++p) both[p] = _mm512_permutexvar_epi16(order, both[p]);
    to.store(16 * i, both);
  }
}
#endif

}  // namespace
