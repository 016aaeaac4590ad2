// SwiGLU experts of each token, weighted and summed.
#pragma once

#include <omp.h>

#include "dot_products.h"
#include "routing.h"
#include "tiles.h"

namespace {

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
  static constexpr int N = PARTS<T>;
  static constexpr index_t BLOCK = TOKEN_BLOCK;

  // How many pairs of strips of weights meet the tokens at a time: where weights have to be split, tokens are
  // read a few times less.
  static constexpr index_t PAIRS = N == 1 ? 1 : 8;
  static constexpr index_t SUMS = BLOCK * 32;

  // sums[pair][block of 32 tokens] = 16 rows of weights and 16 others times packed tokens, as `tile_products`
  // leaves them. The rows of the next pair come `next` rows after these.
  static void times_rows(const bf16* first, const bf16* second, index_t, index_t, index_t in, Numbers tokens,
                         index_t count, float* sums) {
    for (index_t m = 0; m < count; m += 2 * TILE)
      tile_products<1>(true, m + TILE < count, {first, second, 2 * in, 32, 0},
                       packed_strips(tokens + m * in, TILE * in), in, sums + m * 32);
  }
  static void times_rows(const float* first, const float* second, index_t next, index_t pairs, index_t in,
                         Numbers tokens, index_t count, float* sums) {
    constexpr index_t DEEP = 128;  // split at a time
    alignas(64) bf16 room[3 * 2 * TILE * DEEP];
    const Room rows{room, 2 * TILE * DEEP};
    for (index_t k0 = 0; k0 < in; k0 += DEEP)
      for (index_t p = 0; p < pairs; ++p) {
        const index_t deep = std::min(DEEP, in - k0), at = p * next * in + k0;
        for (index_t r = 0; r < TILE; ++r) {
          split_row(first + r * in + at, deep, rows + r * 32, 512);
          split_row(second + r * in + at, deep, rows + (TILE * deep + r * 32), 512);
        }
        const Strips left = packed_strips(rows, TILE * deep);
        for (index_t m = 0; m < count; m += 2 * TILE) {
          const Strips right = packed_strips(tokens + (m * in + 16 * k0), TILE * in);
          float* found = sums + p * SUMS + m * 32;
          if (k0)
            tile_products<3, true>(true, m + TILE < count, left, right, deep, found);
          else
            tile_products<3>(true, m + TILE < count, left, right, deep, found);
        }
      }
  }
  void tile_gate_up(const Part& part, Numbers tokens, Room activations, Room packed) const {
    const T* base = gate_up + part.expert->id * 2 * s.F * s.D;
    Numbers rows[BLOCK];
    Buffer<float> all_sums(PAIRS * SUMS);
    for (index_t m0 = 0; m0 < part.rows; m0 += BLOCK) {
      const index_t count = std::min(BLOCK, part.rows - m0), place = part.expert->begin + m0;
      for (index_t m = 0; m < count; ++m) rows[m] = tokens + routing.token[place + m] * s.D;
      pack_rows<N>(rows, count, s.D, packed);
      for (index_t f0 = part.from; f0 < part.to; f0 += PAIRS * TILE) {
        const T* gate = base + f0 * s.D;
        const index_t pairs = std::min(PAIRS, (part.to - f0) / TILE);
        times_rows(gate, gate + s.F * s.D, TILE, pairs, s.D, packed, count, all_sums.p);
        for (index_t p = 0; p < pairs; ++p)
          for (index_t m = 0; m < count; m += TILE) {
            const float* sums = &all_sums.p[p * SUMS + m / 32 * 1024 + m % 32 * 16];
            const index_t f = f0 + p * TILE, row = part.first_row + m0 + m;
            activate_tile<N>(sums, sums + 512, activations + (row * s.F + f / 32 * 512 + f % 32 * 16));
            if (saved) save_tile(sums, place + m, count - m, f);
          }
      }
    }
  }

  void save_tile(const float* sums, index_t place, index_t count, index_t f) const {
    __m512i lines[16];
    for (int part = 0; part < 2; ++part, sums += 512, f += s.F) {
      turn(sums, lines);
      for (index_t m = 0; m < std::min(TILE, count); ++m)
        put(saved + (place + m) * 2 * s.F + f, (vec)lines[m]);
    }
  }

  void tile_down(index_t from, index_t to, Numbers activations, float* sums) const {
    Buffer<float> all_sums(PAIRS * SUMS);
    for (const auto& expert : routing.experts) {
      const T* base = down + expert.id * s.D * s.F;
      const index_t rows = expert.end - expert.begin;
      for (index_t m0 = 0; m0 < rows; m0 += BLOCK)
        for (index_t d0 = from; d0 < to; d0 += PAIRS * 2 * TILE) {
          const T* w = base + d0 * s.F;
          const index_t count = std::min(BLOCK, rows - m0), pairs = std::min(PAIRS, (to - d0) / (2 * TILE));
          times_rows(w, w + TILE * s.F, 2 * TILE, pairs, s.F, activations + m0 * s.F, count, all_sums.p);
          for (index_t p = 0; p < pairs; ++p)
            for (index_t m = 0; m < count; m += TILE)
              for (index_t half = 0; half < 2; ++half) {
                __m512i lines[16];
                turn(&all_sums.p[p * SUMS + m / 32 * 1024 + m % 32 * 16 + half * 512], lines);
                const index_t d = d0 - from + p * 2 * TILE + half * TILE;
                for (index_t i = 0; i < std::min(TILE, count - m); ++i) {
                  const index_t place = expert.begin + m0 + m + i;
                  float* line = sums + routing.token[place] * (to - from) + d;
                  const __m512 weight = _mm512_set1_ps(weights[routing.pick[place]]);
                  _mm512_storeu_ps(line, _mm512_fmadd_ps(weight, (__m512)lines[i], _mm512_loadu_ps(line)));
                }
              }
        }
      activations = activations + (rows + TILE - 1) / TILE * TILE * s.F;
    }
  }

  void run_tiles(int threads) const {
    const index_t rows_each = routing.experts.empty() ? 0 : routing.pick.size() / routing.experts.size();
    // Tokens are packed anew for every part: large parts where there are many.
    const auto parts = cut(routing, s.F, rows_each > 64 ? 256 : 64, TILE);
    const index_t block = down_block(threads, s.T <= 64 ? 64 : 256), rows = routing.padded;
    Buffer<bf16> act(N * rows * s.F), packed(threads * N * BLOCK * s.D);
    Buffer<bf16> halves(N == 1 ? 0 : N * s.T * s.D);
    Buffer<float> sums(threads * s.T * block);
    const Numbers tokens = N == 1 ? Numbers{(const bf16*)x, 0} : Numbers{halves.p, s.T * s.D};
    const Room activations{act.p, rows * s.F};
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      const Room mine_packed{packed.p + me * N * BLOCK * s.D, BLOCK * s.D};
      const Tiles configured;
      if constexpr (N > 1)
#pragma omp for
        for (index_t t = 0; t < s.T; ++t)
          split_row(x + t * s.D, s.D, Room{halves.p, tokens.gap} + t * s.D, 32);
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < parts.size(); ++i) tile_gate_up(parts[i], tokens, activations, mine_packed);
#pragma omp for schedule(dynamic)
      for (index_t from = 0; from < s.D; from += block)
        add_columns(s, from, std::min(s.D, from + block), sums.p + me * s.T * block, out,
                    [&](index_t to, float* into) { tile_down(from, to, activations, into); });
    }
  }
#endif

  // Columns of outputs at a time. Each reads all activations: many where there are many of those.
  index_t down_block(int threads, index_t most) const {
    const index_t share = (s.D / (4 * threads) + 31) / 32 * 32;
    return std::clamp<index_t>(share, 32, most);
  }

  void run(int threads) const {
    const auto parts = cut(routing, s.F, 64, 1);
    const index_t block = down_block(threads, s.T <= 64 ? 64 : 128);
    Buffer<T> activations(routing.pick.size() * s.F);
    Buffer<float> sums(threads * s.T * block);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < parts.size(); ++i) dot_gate_up(parts[i], activations.p);
#pragma omp for schedule(dynamic)
      for (index_t from = 0; from < s.D; from += block)
        add_columns(s, from, std::min(s.D, from + block), sums.p + omp_get_thread_num() * s.T * block, out,
                    [&](index_t to, float* into) { dot_down(from, to, activations.p, into); });
    }
  }
};

}  // namespace
