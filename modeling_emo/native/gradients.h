#ifndef STREAM
#define STREAM _mm512_storeu_si512
#endif
// Gradients of the experts: dense, each number written once, those of experts that no token took as zeros.
//
//   g = d loss / d out, of a pick's token; w its weight; a, u its gate and up, h = SiLU(a) * u
//   d h = W_down^T g;  d w = <d h, h>;  d W_down = g (w h)^T
//   d u = w d h SiLU(a);  d a = w d h u SiLU'(a);  d W_gate_up = [d a, d u] x^T;  d x = W_gate_up^T [d a, d u]
//
// Both products with weights run along the weights' outer dimension, both gradients of weights along tokens.
#pragma once

#include <omp.h>

#include <cmath>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "outer_products.h"
#include "routing.h"
#include "tiles.h"

namespace {

// Fresh memory comes in pages that the system clears one by one; of large ones it needs 500 times fewer.
inline void ask_for_large_pages(void* p, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const size_t page = size_t(1) << 21, from = (size_t(p) + page - 1) / page * page, to = (size_t(p) + bytes) / page * page;
  if (to > from) madvise((void*)from, to - from, MADV_HUGEPAGE);
#endif
}

template <class T>
struct Gradients {
  Shape s;
  const T *grad, *x, *gate_up, *down;
  const float* weights;  // by pick
  const T* saved;        // (P, 2F) gate and up by place
  T *grad_x, *grad_gate_up, *grad_down;
  float* grad_weights;  // by pick; of these four, those not wanted are null
  const Routing& routing;

  static constexpr index_t TILE_COLUMNS = 512;  // of weights at a time: their rows are read in pieces of 1 KB
  static constexpr index_t TILE_OUTS = 256;     // rows of a weight's gradient at a time

  // What the first products leave to the others, rows by place, or with tiles as strips of packed rows.
  struct Between {
    T *grad_gate_up, *activations;  // d a above d u, (rows, 2F); w h, (rows, F)
    float* dots;                    // (places, blocks): parts of <d h, h>
    index_t blocks;
  };

  // One row of `width` (d a, d u, w h) from d h, and its part of <d h, h>.
  float activate(const float* grad_act, index_t place, index_t f, index_t width, T* to_gate, T* to_up, T* to_act) const {
    const T *gate = saved + place * 2 * s.F + f, *up = gate + s.F;
    const float weight = weights[routing.pick[place]];
    vec dots = {};
    index_t j = 0;
    for (; j + LANES <= width; j += LANES) {
      const vec a = load(gate + j), u = load(up + j), g = load(grad_act + j);
      const vec sigmoid = 1.0f / (1.0f + exponential(-a)), activated = a * sigmoid, h = activated * u;
      dots += g * h;
      const vec weighted = g * weight;
      put(to_gate + j, weighted * u * (sigmoid + activated * (1.0f - sigmoid)));
      put(to_up + j, weighted * activated);
      put(to_act + j, h * weight);
    }
    float dot = sum<LANES>(dots);
    for (; j < width; ++j) {
      const float a = to_float(gate[j]), u = to_float(up[j]), g = grad_act[j];
      const float sigmoid = 1.0f / (1.0f + std::exp(-a)), activated = a * sigmoid, h = activated * u;
      dot += g * h;
      store(to_gate + j, g * weight * u * (sigmoid + activated * (1.0f - sigmoid)));
      store(to_up + j, g * weight * activated);
      store(to_act + j, h * weight);
    }
    return dot;
  }

  // ---- on any machine -----------------------------------------------------------------------------------

  void activations(const Part& part, const Between& to) const {
    const T* rows[OUTER_BLOCK];
    alignas(64) float sums[OUTER_BLOCK * PANEL];
    const index_t width = part.to - part.from;
    for (index_t m0 = 0; m0 < part.rows; m0 += OUTER_BLOCK) {
      const index_t count = std::min(OUTER_BLOCK, part.rows - m0), place = part.expert->begin + m0;
      for (index_t m = 0; m < count; ++m) rows[m] = grad + routing.token[place + m] * s.D;
      times_columns(rows, count, down + part.expert->id * s.D * s.F + part.from, s.F, s.D, width, sums);
      for (index_t m = 0; m < count; ++m) {
        T* gate = to.grad_gate_up + (place + m) * 2 * s.F + part.from;
        to.dots[(place + m) * to.blocks + part.from / PANEL] =
            activate(sums + m * PANEL, place + m, part.from, width, gate, gate + s.F,
                     to.activations + (place + m) * s.F + part.from);
      }
    }
  }

  // out[m][n], m in [from, to), = the sum over `count` rows of left(t)[m] * right(t)[n].
  template <class Left, class Right>
  static void outer(index_t count, Left left, Right right, index_t from, index_t to, index_t columns, T* out, float* room) {
    constexpr index_t DEEP = 512;  // rows packed at a time
    float *a = room, *b = a + DEEP * OUTER_BLOCK, *sums = b + DEEP * PANEL;
    for (index_t n0 = 0; n0 < columns; n0 += PANEL) {
      const index_t width = std::min(PANEL, columns - n0);
      std::fill(sums, sums + OUTER_BLOCK * PANEL, 0.0f);
      for (index_t t0 = 0; t0 < count; t0 += DEEP) {
        const index_t deep = std::min(DEEP, count - t0);
        for (index_t t = 0; t < deep; ++t) {
          if (n0 == 0 || count > DEEP) copy_row(left(t0 + t) + from, to - from, OUTER_BLOCK, a + t * OUTER_BLOCK);
          copy_row(right(t0 + t) + n0, width, PANEL, b + t * PANEL);
        }
        for (index_t m = 0; m < to - from; m += OUTER_ROWS)
          outer_tile(a + m, 1, OUTER_BLOCK, b, deep, sums + m * PANEL);
      }
      for (index_t m = from; m < to; ++m) stream_row(sums + (m - from) * PANEL, width, out + m * columns + n0);
    }
  }
  static constexpr index_t ROOM = 512 * OUTER_BLOCK + 512 * PANEL + OUTER_BLOCK * PANEL;

  void down_gradient(const Part& part, const Between& found, float* room) const {
    const index_t begin = part.expert->begin;
    outer(
        part.rows, [&](index_t t) { return grad + routing.token[begin + t] * s.D; },
        [&](index_t t) { return found.activations + (begin + t) * s.F; }, part.from, part.to, s.F,
        grad_down + part.expert->id * s.D * s.F, room);
  }

  void gate_up_gradient(const Part& part, const Between& found, float* room) const {
    const index_t begin = part.expert->begin;
    outer(
        part.rows, [&](index_t t) { return found.grad_gate_up + (begin + t) * 2 * s.F; },
        [&](index_t t) { return x + routing.token[begin + t] * s.D; }, part.from, part.to, s.D,
        grad_gate_up + part.expert->id * 2 * s.F * s.D, room);
  }

  // Adds the columns [from, to) of d x, to - from <= PANEL, to sums[token][to - from].
  void x_gradient(index_t from, index_t to, const Between& found, float* sums) const {
    const T* rows[OUTER_BLOCK];
    alignas(64) float products[OUTER_BLOCK * PANEL];
    for (const auto& expert : routing.experts)
      for (index_t place = expert.begin; place < expert.end; place += OUTER_BLOCK) {
        const index_t count = std::min(OUTER_BLOCK, expert.end - place);
        for (index_t m = 0; m < count; ++m) rows[m] = found.grad_gate_up + (place + m) * 2 * s.F;
        times_columns(rows, count, gate_up + expert.id * 2 * s.F * s.D + from, s.D, 2 * s.F, to - from, products);
        for (index_t m = 0; m < count; ++m) {
          float* line = sums + routing.token[place + m] * (to - from);
          for (index_t d = 0; d < to - from; ++d) line[d] += products[m * PANEL + d];
        }
      }
  }

#if defined(EMO_AMX)
  // ---- by tiles -----------------------------------------------------------------------------------------

  // A thread's room, and whose rows lie in it: parts of one expert often follow each other.
  struct Room {
    bf16 *left, *right;
    float* sums;
    const Routing::Expert* expert = nullptr;
  };

  // 32 columns of a row in strips of packed rows.
  static const bf16* in_strips(const bf16* strips, index_t row, index_t width, index_t column) {
    return strips + (row / TILE * TILE) * width + column / 32 * 512 + row % TILE * 32;
  }

  // A row of numbers into strips of packed rows.
  static void copy_strip(const bf16* from, index_t width, index_t row, bf16* strips) {
    bf16* to = (bf16*)in_strips(strips, row, width, 0);
    for (index_t k = 0; k < width; k += 32, to += 512) _mm512_storeu_si512(to, _mm512_loadu_si512(from + k));
  }

  // Columns c and c + 16 of a row in the blocks of `times_columns`.
  static const float* in_blocks(const float* sums, index_t row, index_t columns, index_t c) {
    return sums + row / 32 * 32 * columns + c * 32 + row % 32 / 16 * 512 + row % 16 * 16;
  }

  void tile_activations(const Part& part, const Between& to, Room& room) const {
    alignas(64) float line[32];
    const index_t width = part.to - part.from;
    const bf16* weight = (const bf16*)down + part.expert->id * s.D * s.F + part.from;
    for (index_t m0 = 0; m0 < part.rows; m0 += TOKEN_BLOCK) {
      const index_t count = std::min(TOKEN_BLOCK, part.rows - m0), place = part.expert->begin + m0;
      if (part.rows > TOKEN_BLOCK || room.expert != part.expert) {
        for (index_t m = 0; m < count; ++m)
          copy_strip((const bf16*)grad + routing.token[place + m] * s.D, s.D, m, room.left);
        room.expert = part.expert;
      }
      ::times_columns(room.left, count, weight, s.F, s.D, width, room.right, room.sums);
      for (index_t m = 0; m < count; ++m)
        for (index_t c = 0; c < width; c += 32) {
          const float* found = in_blocks(room.sums, m, width, c);
          memcpy(line, found, 64);
          memcpy(line + 16, found + 256, 64);
          const index_t row = part.first_row + m0 + m, column = part.from + c;
          bf16* gate = (bf16*)in_strips((const bf16*)to.grad_gate_up, row, 2 * s.F, column);
          to.dots[(place + m) * to.blocks + column / 32] =
              activate(line, place + m, column, 32, (T*)gate, (T*)gate + s.F * TILE,
                       (T*)in_strips((const bf16*)to.activations, row, s.F, column));
        }
    }
  }

  // As `outer`; [from, to) and columns are multiples of 32. What is found is gathered to long pieces of rows.
  template <class Left, class Right>
  static void tile_outer(index_t count, Left left, Right right, index_t from, index_t to, index_t columns,
                         bf16* out, Room& room, const Routing::Expert* expert) {
    alignas(64) float sums[1024];
    bf16* found = (bf16*)room.sums;
    const index_t depth = (count + 31) / 32 * 32;
    for (index_t m = from; m < to; m += 32)
      pack_columns(depth, [&](index_t t) { return t < count ? left(t, m) : nullptr; }, room.left + (m - from) * depth);
    const index_t fits = std::max<index_t>(32, (index_t(1) << 18) / depth / 32 * 32), block = std::min(fits, columns);
    for (index_t n0 = 0; n0 < columns; n0 += block) {
      const index_t end = std::min(columns, n0 + block), width = end - n0;
      if (block < columns || room.expert != expert)
        for (index_t n = n0; n < end; n += 32)
          pack_pairs(0, depth, depth, [&](index_t t) { return t < count ? right(t, n) : nullptr; },
                     room.right + (n - n0) * depth);
      room.expert = expert;
      for (index_t m = from; m < to; m += 32) {
        for (index_t n = 0; n < width; n += 32) {
          tile_products(true, true, packed_strips(room.left + (m - from) * depth, TILE * depth),
                        packed_strips(room.right + n * depth, TILE * depth), depth, sums);
          for (index_t i = 0; i < 32; ++i) {
            const float* tile = sums + i / TILE * 512 + i % TILE * 16;
            const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_load_ps(tile + 256), _mm512_load_ps(tile));
            _mm512_storeu_si512(found + i * width + n, (__m512i)both);
          }
        }
        for (index_t i = 0; i < 32; ++i) {
          bf16* line = out + (m + i) * columns + n0;
          for (index_t n = 0; n < width; n += 32)
            STREAM((__m512i*)(line + n), _mm512_loadu_si512(found + i * width + n));
        }
      }
    }
  }

  void tile_down_gradient(const Part& part, const Between& found, Room& room) const {
    const index_t begin = part.expert->begin;
    tile_outer(
        part.rows, [&](index_t t, index_t d) { return (const bf16*)grad + routing.token[begin + t] * s.D + d; },
        [&](index_t t, index_t f) { return in_strips((const bf16*)found.activations, part.first_row + t, s.F, f); },
        part.from, part.to, s.F, (bf16*)grad_down + part.expert->id * s.D * s.F, room, part.expert);
  }

  void tile_gate_up_gradient(const Part& part, const Between& found, Room& room) const {
    const index_t begin = part.expert->begin;
    tile_outer(
        part.rows, [&](index_t t, index_t f) { return in_strips((const bf16*)found.grad_gate_up, part.first_row + t, 2 * s.F, f); },
        [&](index_t t, index_t d) { return (const bf16*)x + routing.token[begin + t] * s.D + d; }, part.from,
        part.to, s.D, (bf16*)grad_gate_up + part.expert->id * 2 * s.F * s.D, room, part.expert);
  }

  void tile_x_gradient(index_t from, index_t to, const Between& found, float* sums, Room& room) const {
    index_t first_row = 0;
    const index_t width = to - from;
    for (const auto& expert : routing.experts) {
      const index_t rows = expert.end - expert.begin;
      const bf16* weight = (const bf16*)gate_up + expert.id * 2 * s.F * s.D + from;
      for (index_t m0 = 0; m0 < rows; m0 += TOKEN_BLOCK) {
        const index_t count = std::min(TOKEN_BLOCK, rows - m0);
        const bf16* left = (const bf16*)found.grad_gate_up + (first_row + m0) * 2 * s.F;
        ::times_columns(left, count, weight, s.D, 2 * s.F, width, room.right, room.sums);
        for (index_t m = 0; m < count; ++m) {
          float* line = sums + routing.token[expert.begin + m0 + m] * width;
          for (index_t c = 0; c < width; c += 32) {
            const float* add = in_blocks(room.sums, m, width, c);
            put(line + c, load(line + c) + load(add));
            put(line + c + 16, load(line + c + 16) + load(add + 256));
          }
        }
      }
      first_row += (rows + TILE - 1) / TILE * TILE;
    }
  }
#endif

  void run(bool tiles, int threads) const {
    const index_t places = routing.pick.size(), fill = tiles ? 16 : 1, rows = tiles ? routing.padded : places;
    const index_t columns = tiles ? TILE_COLUMNS : PANEL, outs = tiles ? TILE_OUTS : OUTER_BLOCK;
    const index_t dot_width = tiles ? 32 : PANEL, blocks = (s.F + dot_width - 1) / dot_width;
    const auto inner = cut(routing, s.F, columns, fill);
    const auto down_parts = cut(routing, grad_down ? s.D : 0, outs, fill);
    const auto gate_up_parts = cut(routing, grad_gate_up ? 2 * s.F : 0, outs, fill);
    Buffer<T> both(rows * 2 * s.F), act(rows * s.F);
    Buffer<float> dots(places * blocks), sums(grad_x ? threads * s.T * columns : 0);
    const Between between{both.p, act.p, dots.p, blocks};
    index_t most = 0;  // rows of an expert, filled up to what a sum along them takes
    for (const auto& expert : routing.experts) most = std::max(most, (expert.end - expert.begin + 31) / 32 * 32);
    // The left factor: an expert's tokens, or columns of them; the right one: weights, or tokens.
    const index_t left = std::max(TOKEN_BLOCK * s.D, TILE_OUTS * most);
    const index_t right = std::max({TILE_COLUMNS * TILE_DEPTH, index_t(1) << 18, 32 * most});
    const index_t room_sums = std::max(TOKEN_BLOCK * TILE_COLUMNS, 16 * std::max(s.D, s.F));
    Buffer<bf16> packed(tiles ? threads * (left + right) : 0);
    Buffer<float> panels(threads * (tiles ? room_sums : ROOM));
    if (grad_gate_up) ask_for_large_pages(grad_gate_up, s.E * 2 * s.F * s.D * sizeof(T));
    if (grad_down) ask_for_large_pages(grad_down, s.E * s.D * s.F * sizeof(T));
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      float* room = panels.p + me * (tiles ? room_sums : ROOM);
#if defined(EMO_AMX)
      std::optional<Tiles> configured;
      if (tiles) configured.emplace();
      Room tile_room{packed.p + me * (left + right), packed.p + me * (left + right) + left, room};
#endif
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < inner.size(); ++i) {
#if defined(EMO_AMX)
        if (tiles)
          tile_activations(inner[i], between, tile_room);
        else
#endif
          activations(inner[i], between);
      }
      if (grad_weights)
#pragma omp for schedule(static)
        for (index_t p = 0; p < s.T * s.K; ++p) grad_weights[p] = 0;
      if (grad_weights)
#pragma omp for schedule(static)
        for (index_t place = 0; place < places; ++place) {
          float dot = 0;
          for (index_t b = 0; b < blocks; ++b) dot += dots.p[place * blocks + b];
          grad_weights[routing.pick[place]] = dot;
        }
#if defined(EMO_AMX)
      tile_room.expert = nullptr;
#endif
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < down_parts.size(); ++i) {
#if defined(EMO_AMX)
        if (tiles)
          tile_down_gradient(down_parts[i], between, tile_room);
        else
#endif
          down_gradient(down_parts[i], between, room);
      }
#if defined(EMO_AMX)
      tile_room.expert = nullptr;
#endif
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < gate_up_parts.size(); ++i) {
#if defined(EMO_AMX)
        if (tiles)
          tile_gate_up_gradient(gate_up_parts[i], between, tile_room);
        else
#endif
          gate_up_gradient(gate_up_parts[i], between, room);
      }
      if (grad_x)
#pragma omp for schedule(dynamic)
        for (index_t from = 0; from < s.D; from += columns) {
          const index_t to = std::min(s.D, from + columns), width = to - from;
          float* mine = sums.p + me * s.T * columns;
          std::fill(mine, mine + s.T * width, 0.0f);
#if defined(EMO_AMX)
          if (tiles)
            tile_x_gradient(from, to, between, mine, tile_room);
          else
#endif
            x_gradient(from, to, between, mine);
          for (index_t t = 0; t < s.T; ++t)
            for (index_t d = 0; d < width; ++d) store(grad_x + t * s.D + from + d, mine[t * width + d]);
        }
#pragma omp for schedule(dynamic)
      for (index_t e = 0; e < s.E; ++e)
        if (!routing.is_hit(e)) {
          if (grad_gate_up) memset(grad_gate_up + e * 2 * s.F * s.D, 0, 2 * s.F * s.D * sizeof(T));
          if (grad_down) memset(grad_down + e * s.D * s.F, 0, s.D * s.F * sizeof(T));
        }
      finish_streams();
    }
  }
};

}  // namespace
