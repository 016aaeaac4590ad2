// EMO's experts and linear layers on a CPU: SwiGLU of each token's experts, weighted and summed.
//
// Compiled on the user's machine for that machine (`-march=native`), by `native_library.py`; plain C
// functions, so that one build serves every version of torch. Weights are read as they are stored, [out, in]
// with `in` contiguous: nothing is repacked, and nothing held twice. There are two kinds of inner loop:
//
//   * dot products along `in` with vectors of whatever width the machine has, for float32 and bfloat16;
//   * AMX tiles for bfloat16 where the machine has them. A tile of weights is 16 stored rows as they are; the
//     other factor, the few tokens, is what is brought into the pairwise order that AMX wants. So a product
//     comes out transposed, 16 outputs by 16 tokens, and SiLU(gate) * up leaves it in just the order that the
//     next product wants.
//
// Work is dealt out to threads in parts of outputs, never of sums: each number is summed in an order that the
// routing alone decides, so that results are the same bits from run to run and for any number of threads.
//
// T tokens, K picks each, P = T * K picks, E experts, D hidden size, F expert width. Picks are kept by
// expert.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define EMO_AMX 1
#endif

namespace {

using index_t = int64_t;

// ---- numbers and vectors ----------------------------------------------------------------------------------

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

#if defined(__AVX512F__)
constexpr int LANES = 16, TILE_ROWS = 4, TILE_OUTS = 6;  // 24 sums, 4 rows and 1 weight fill 32 registers
#elif defined(__AVX2__)
constexpr int LANES = 8, TILE_ROWS = 2, TILE_OUTS = 4;
#elif defined(__aarch64__)
constexpr int LANES = 4, TILE_ROWS = 4, TILE_OUTS = 6;
#else
constexpr int LANES = 4, TILE_ROWS = 2, TILE_OUTS = 4;
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

// What one step along `in` takes: so many numbers of each factor, and their products added to a vector of
// sums.
template <class T>
struct Step {
  static constexpr int size = LANES;
  using reg = vec;
  static reg get(const T* p) { return load(p); }
  static vec add(vec sums, reg a, reg b) { return sums + a * b; }
};
#if defined(__AVX512BF16__)
template <>
struct Step<bf16> {
  static constexpr int size = 32;
  using reg = __m512bh;
  static reg get(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static vec add(vec sums, reg a, reg b) { return (vec)_mm512_dpbf16_ps((__m512)sums, a, b); }
};
#endif

// exp to about 2 units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
inline vec exponential(vec x) {
  const vec low = x * 0 - 87.0f, high = x * 0 + 88.0f;
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

// ---- memory -----------------------------------------------------------------------------------------------

template <class T>
struct Buffer {
  T* p;
  explicit Buffer(size_t count) {
    void* found = nullptr;
    if (posix_memalign(&found, 64, count * sizeof(T) + 64)) throw std::bad_alloc();
    p = (T*)found;
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(p); }
};

// ---- dot products -----------------------------------------------------------------------------------------

// Adds the products of ROWS rows with OUTS rows of weights, over [begin, end) of `in`, to sums[row][out].
// With AHEAD, what is read of the weights after these, `ahead` numbers on, is asked for meanwhile.
template <int ROWS, int OUTS, bool AHEAD, class T>
inline void dot_tile(const T* const* x, const T* const* w, index_t begin, index_t end, index_t ahead,
                     float* sums, int stride) {
  vec acc[ROWS][OUTS] = {};
  index_t k = begin;
  for (; k + Step<T>::size <= end; k += Step<T>::size) {
    typename Step<T>::reg row[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) row[m] = Step<T>::get(x[m] + k);
#pragma GCC unroll 8
    for (int n = 0; n < OUTS; ++n) {
      const typename Step<T>::reg weight = Step<T>::get(w[n] + k);
      if (AHEAD) __builtin_prefetch(w[n] + k + ahead);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) acc[m][n] = Step<T>::add(acc[m][n], row[m], weight);
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < OUTS; ++n) {
      float total = sum<LANES>(acc[m][n]);
      for (index_t rest = k; rest < end; ++rest) total += to_float(x[m][rest]) * to_float(w[n][rest]);
      sums[m * stride + n] += total;
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

// ---- AMX --------------------------------------------------------------------------------------------------

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

// Two times 16 rows of weights with 16 or 32 packed tokens: sums[weights][tokens] as four tiles of 16 x 16,
// [w0 t0, w0 t1, w1 t0, w1 t1].
template <bool PAIR>
inline void tile_products(const bf16* w0, const bf16* w1, index_t in, const bf16* tokens, float* sums) {
  const bf16* more = tokens + 16 * in;
  asm volatile(
      "" ::
          : "memory");  // tile loads do not tell the compiler what they read: it shall be written by now
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (index_t k = 0; k < in; k += 32, tokens += 512, more += 512) {
    _tile_loadd(4, w0 + k, 2 * in);
    _tile_loadd(6, tokens, 64);
    _tile_loadd(5, w1 + k, 2 * in);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
    if (PAIR) {
      _tile_loadd(7, more, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  _tile_stored(2, sums + 512, 64);
  if (PAIR) {
    _tile_stored(1, sums + 256, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

inline void tile_products(bool pair, const bf16* w0, const bf16* w1, index_t in, const bf16* tokens,
                          float* sums) {
  (pair ? tile_products<true> : tile_products<false>)(w0, w1, in, tokens, sums);
}

// sums[16 outputs][16 tokens] to lines of 16 outputs, one a token.
inline void turn(const float* sums, __m512i (&lines)[16]) {
  __m512i rows[16];
  for (int i = 0; i < 16; ++i) rows[i] = _mm512_loadu_si512(sums + 16 * i);
  transpose(rows, lines);
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

// ---- experts ----------------------------------------------------------------------------------------------

struct Shape {
  index_t T, K, E, D, F;
};

// Which picks are whose: sorted by expert, in the order of tokens within one.
struct Routing {
  struct Expert {
    index_t id, begin, end;
  };
  std::vector<Expert> experts;       // those hit
  std::vector<index_t> pick, token;  // of each place in the order of experts
  index_t padded = 0;                // rows if every expert's were filled up to whole tiles

  Routing(const index_t* index, const Shape& s) {
    std::vector<index_t> place(s.E + 1, 0);
    const index_t picks = s.T * s.K;
    for (index_t p = 0; p < picks; ++p)
      if (here(index[p], s)) ++place[index[p] + 1];
    for (index_t e = 0; e < s.E; ++e) {
      if (place[e + 1]) experts.push_back({e, place[e], place[e] + place[e + 1]});
      padded += (place[e + 1] + 15) / 16 * 16;
      place[e + 1] += place[e];
    }
    pick.resize(place[s.E]), token.resize(place[s.E]);
    for (index_t p = 0; p < picks; ++p)
      if (here(index[p], s)) {
        const index_t to = place[index[p]]++;
        pick[to] = p, token[to] = p / s.K;
      }
  }
  // Under expert parallelism the id E stands for experts elsewhere.
  static bool here(index_t e, const Shape& s) { return 0 <= e && e < s.E; }
};

struct Part {
  const Routing::Expert* expert;
  index_t rows, first_row, from, to;  // first_row: in the buffer of activations
};

// The outputs of every expert hit, cut into parts of `block`; the experts' rows are filled up to `fill`.
std::vector<Part> cut(const Routing& routing, index_t outs, index_t block, index_t fill) {
  std::vector<Part> parts;
  index_t row = 0;
  for (const auto& expert : routing.experts) {
    const index_t rows = expert.end - expert.begin;
    for (index_t from = 0; from < outs; from += block)
      parts.push_back({&expert, rows, row, from, std::min(outs, from + block)});
    row += (rows + fill - 1) / fill * fill;
  }
  return parts;
}

template <class T>
struct Experts {
  Shape s;
  const T *x, *gate_up, *down;
  const float* weights;  // by pick
  T* out;                // (T, D)
  T* saved;              // (P, 2F) gate above up by place, for the backward; or null
  const Routing& routing;

  // activations[place][F] = SiLU(gate) * up, for outputs [from, to) of one expert.
  void dot_gate_up(const Part& part, T* activations) const {
    const T* base = gate_up + part.expert->id * 2 * s.F * s.D;
    const T *rows[ROW_BLOCK], *w[TILE_OUTS];
    float sums[ROW_BLOCK * TILE_OUTS];
    const index_t width = part.to - part.from, padded = (width + LANES - 1) / LANES * LANES;
    float gates[ROW_BLOCK * ROW_BLOCK], ups[ROW_BLOCK * ROW_BLOCK];  // parts are not wider than that here
    for (index_t m0 = 0; m0 < part.rows; m0 += ROW_BLOCK) {
      const index_t count = std::min(ROW_BLOCK, part.rows - m0), place = part.expert->begin + m0;
      for (index_t m = 0; m < count; ++m) rows[m] = x + routing.token[place + m] * s.D;
      for (index_t f = part.from; f < part.to; f += TILE_OUTS / 2) {
        const index_t outs = std::min<index_t>(TILE_OUTS / 2, part.to - f);
        for (index_t j = 0; j < outs; ++j)
          w[2 * j] = base + (f + j) * s.D, w[2 * j + 1] = w[2 * j] + s.F * s.D;
        dot_panel(rows, count, w, 2 * outs, s.D, TILE_OUTS / 2 * s.D, sums);
        for (index_t m = 0; m < count; ++m)
          for (index_t j = 0; j < outs; ++j) {
            gates[m * padded + f - part.from + j] = sums[m * TILE_OUTS + 2 * j];
            ups[m * padded + f - part.from + j] = sums[m * TILE_OUTS + 2 * j + 1];
          }
      }
      for (index_t m = 0; m < count; ++m) {
        float *gate = &gates[m * padded], *up = &ups[m * padded];
        if (saved) {
          T* to = saved + (place + m) * 2 * s.F + part.from;
          for (index_t j = 0; j < width; ++j) store(to + j, gate[j]), store(to + s.F + j, up[j]);
        }
        for (index_t j = 0; j < padded; j += LANES) {
          const vec h = silu(load(gate + j)) * load(up + j);
          memcpy(gate + j, &h, sizeof h);
        }
        T* to = activations + (place + m) * s.F + part.from;
        for (index_t j = 0; j < width; ++j) store(to + j, gate[j]);
      }
    }
  }

  // Adds the experts' outputs [from, to) to sums[token][to - from].
  void dot_down(index_t from, index_t to, const T* activations, float* sums) const {
    const T *rows[ROW_BLOCK], *w[TILE_OUTS];
    float products[ROW_BLOCK * TILE_OUTS];
    for (const auto& expert : routing.experts) {
      const T* base = down + expert.id * s.D * s.F;
      for (index_t place = expert.begin; place < expert.end; place += ROW_BLOCK) {
        const index_t count = std::min(ROW_BLOCK, expert.end - place);
        for (index_t m = 0; m < count; ++m) rows[m] = activations + (place + m) * s.F;
        for (index_t d = from; d < to; d += TILE_OUTS) {
          const index_t outs = std::min<index_t>(TILE_OUTS, to - d);
          for (index_t j = 0; j < outs; ++j) w[j] = base + (d + j) * s.F;
          dot_panel(rows, count, w, outs, s.F, TILE_OUTS * s.F, products);
          for (index_t m = 0; m < count; ++m) {
            const float weight = weights[routing.pick[place + m]];
            float* line = sums + routing.token[place + m] * (to - from) + d - from;
            for (index_t j = 0; j < outs; ++j) line[j] += weight * products[m * TILE_OUTS + j];
          }
        }
      }
    }
  }

#if defined(EMO_AMX)
  // The same, with activations packed as `pack_rows` does, every expert's rows filled up to whole tiles.
  void tile_gate_up(const Part& part, bf16* activations, bf16* packed) const {
    const bf16* base = (const bf16*)gate_up + part.expert->id * 2 * s.F * s.D;
    const bf16* rows[TOKEN_BLOCK];
    alignas(64) float sums[1024];
    for (index_t m0 = 0; m0 < part.rows; m0 += TOKEN_BLOCK) {
      const index_t count = std::min(TOKEN_BLOCK, part.rows - m0), place = part.expert->begin + m0;
      for (index_t m = 0; m < count; ++m) rows[m] = (const bf16*)x + routing.token[place + m] * s.D;
      pack_rows(rows, count, s.D, packed);
      for (index_t f = part.from; f < part.to; f += TILE)
        for (index_t m = 0; m < count; m += 2 * TILE) {
          const bool pair = m + TILE < count;
          const bf16* gate = base + f * s.D;
          tile_products(pair, gate, gate + s.F * s.D, s.D, packed + m * s.D, sums);
          for (index_t t = 0; t < (pair ? 2 : 1); ++t) {
            bf16* tile = activations + (part.first_row + m0 + m + t * TILE) * s.F + f / 32 * 512;
            activate_tile(sums + 256 * t, sums + 512 + 256 * t, tile + f % 32 * 16);
            if (saved) save_tile(sums + 256 * t, place + m + t * TILE, count - m - t * TILE, f);
          }
        }
    }
  }

  void save_tile(const float* sums, index_t place, index_t count, index_t f) const {
    __m512i lines[16];
    for (int part = 0; part < 2; ++part, sums += 512, f += s.F) {
      turn(sums, lines);
      for (index_t m = 0; m < std::min(TILE, count); ++m)
        _mm256_storeu_si256((__m256i*)(saved + (place + m) * 2 * s.F + f),
                            (__m256i)_mm512_cvtneps_pbh((__m512)lines[m]));
    }
  }

  void tile_down(index_t from, index_t to, const bf16* activations, float* sums) const {
    alignas(64) float products[1024];
    for (const auto& expert : routing.experts) {
      const bf16* base = (const bf16*)down + expert.id * s.D * s.F;
      const index_t rows = expert.end - expert.begin;
      for (index_t m0 = 0; m0 < rows; m0 += TOKEN_BLOCK)
        for (index_t d = from; d < to; d += 2 * TILE)
          for (index_t m = m0; m < std::min(rows, m0 + TOKEN_BLOCK); m += 2 * TILE) {
            const bf16* w = base + d * s.F;
            const bool pair = m + TILE < std::min(rows, m0 + TOKEN_BLOCK);
            tile_products(pair, w, w + TILE * s.F, s.F, activations + m * s.F, products);
            for (index_t t = 0; t < (pair ? 4 : 3); ++t) {  // tiles w0 t0, w0 t1, w1 t0, w1 t1
              if (!pair && t == 1) continue;
              const index_t first = m + t % 2 * TILE;
              __m512i lines[16];
              turn(products + 256 * t, lines);
              for (index_t i = 0; i < std::min(TILE, rows - first); ++i) {
                const index_t place = expert.begin + first + i;
                float* line = sums + routing.token[place] * (to - from) + d - from + t / 2 * TILE;
                const __m512 weight = _mm512_set1_ps(weights[routing.pick[place]]);
                _mm512_storeu_ps(line, _mm512_fmadd_ps(weight, (__m512)lines[i], _mm512_loadu_ps(line)));
              }
            }
          }
      activations += (rows + TILE - 1) / TILE * TILE * s.F;
    }
  }
#endif

  void run(bool tiles, int threads) const {
    const index_t places = routing.pick.size(), fill = tiles ? 16 : 1;
    const index_t rows_each = routing.experts.empty() ? 0 : places / routing.experts.size();
    // Tiles pack the tokens anew for every part: large parts where there are many.
    const auto parts = cut(routing, s.F, tiles && rows_each > 64 ? 256 : 64, fill);
    // A part of the second product reads all activations: large parts where there are many of them.
    const index_t share = (s.D / (4 * threads) + 31) / 32 * 32;
    const index_t block = std::clamp<index_t>(share, 32, s.T <= 64 ? 64 : tiles ? 256 : 128);
    Buffer<T> activations((tiles ? routing.padded : places) * s.F);
    Buffer<float> sums(threads * s.T * block);
    Buffer<T> packed(tiles ? threads * TOKEN_BLOCK * s.D : 0);
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      float* mine = sums.p + me * s.T * block;
#if defined(EMO_AMX)
      std::optional<Tiles> configured;
      if (tiles) configured.emplace();
#endif
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < parts.size(); ++i) {
#if defined(EMO_AMX)
        if (tiles)
          tile_gate_up(parts[i], (bf16*)activations.p, (bf16*)packed.p + me * TOKEN_BLOCK * s.D);
        else
#endif
          dot_gate_up(parts[i], activations.p);
      }
#pragma omp for schedule(dynamic)
      for (index_t from = 0; from < s.D; from += block) {
        const index_t to = std::min(s.D, from + block), width = to - from;
        std::fill(mine, mine + s.T * width, 0.0f);
#if defined(EMO_AMX)
        if (tiles)
          tile_down(from, to, (const bf16*)activations.p, mine);
        else
#endif
          dot_down(from, to, activations.p, mine);
        for (index_t t = 0; t < s.T; ++t)
          for (index_t d = 0; d < width; ++d) store(out + t * s.D + from + d, mine[t * width + d]);
      }
    }
  }
};

// ---- linear -----------------------------------------------------------------------------------------------

template <class T>
void linear(const T* x, const T* weight, const T* bias, T* out, index_t rows, index_t in, index_t outs,
            int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (index_t from = 0; from < outs; from += 16 * TILE_OUTS) {
    const T *lines[ROW_BLOCK], *w[TILE_OUTS];
    float sums[ROW_BLOCK * TILE_OUTS];
    for (index_t m0 = 0; m0 < rows; m0 += ROW_BLOCK) {
      const index_t count = std::min(ROW_BLOCK, rows - m0);
      for (index_t m = 0; m < count; ++m) lines[m] = x + (m0 + m) * in;
      for (index_t n = from; n < std::min(outs, from + 16 * TILE_OUTS); n += TILE_OUTS) {
        const index_t some = std::min<index_t>(TILE_OUTS, outs - n);
        for (index_t j = 0; j < some; ++j) w[j] = weight + (n + j) * in;
        dot_panel(lines, count, w, some, in, TILE_OUTS * in, sums);
        for (index_t m = 0; m < count; ++m)
          for (index_t j = 0; j < some; ++j)
            store(out + (m0 + m) * outs + n + j,
                  sums[m * TILE_OUTS + j] + (bias ? to_float(bias[n + j]) : 0));
      }
    }
  }
}

// Waking threads takes longer than a small product does.
int useful_threads(index_t work, int threads) { return work < (1 << 18) ? 1 : threads; }

template <class T>
void experts(const void* x, const void* gate_up, const void* down, const float* weights, const index_t* index,
             void* out, void* saved, const Shape& s, int threads, int use_tiles) {
  const Routing routing(index, s);
  // A row or two an expert are a stream of weights, which dot products read better.
  const bool tiles = use_tiles && sizeof(T) == 2 && s.D % 32 == 0 && s.F % 32 == 0 && amx_allowed() &&
                     routing.pick.size() > 2 * routing.experts.size();
  const Experts<T> job{s,       (const T*)x, (const T*)gate_up, (const T*)down,
                       weights, (T*)out,     (T*)saved,         routing};
  job.run(tiles, useful_threads(routing.pick.size() * s.D * s.F, threads));
}

}  // namespace

// ---- what Python calls: 0, or 1 if memory ran out ---------------------------------------------------------

extern "C" {

int emo_has_tiles() { return amx_allowed(); }

int emo_experts(int is_bf16, const void* x, const void* gate_up, const void* down, const float* weights,
                const int64_t* index, void* out, void* saved, int64_t T, int64_t K, int64_t E, int64_t D,
                int64_t F, int threads, int use_tiles) try {
  (is_bf16 ? experts<bf16> : experts<float>)(x, gate_up, down, weights, index, out, saved, {T, K, E, D, F},
                                             threads, use_tiles);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

int emo_linear(int is_bf16, const void* x, const void* weight, const void* bias, void* out, int64_t rows,
               int64_t in, int64_t outs, int threads) try {
  threads = useful_threads(rows * in * outs, threads);
  if (is_bf16)
    linear((const bf16*)x, (const bf16*)weight, (const bf16*)bias, (bf16*)out, rows, in, outs, threads);
  else
    linear((const float*)x, (const float*)weight, (const float*)bias, (float*)out, rows, in, outs, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
}
