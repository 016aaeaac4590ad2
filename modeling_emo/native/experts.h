// SwiGLU experts of each token, weighted and summed.
#pragma once

#include <omp.h>

#include <optional>

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
          tile_products(true, pair, {gate, gate + s.F * s.D, 2 * s.D, 32},
                        packed_strips(packed + m * s.D, TILE * s.D), s.D, sums);
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
            tile_products(true, pair, {w, w + TILE * s.F, 2 * s.F, 32},
                          packed_strips(activations + m * s.F, TILE * s.F), s.F, products);
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

}  // namespace
