// SwiGLU experts of each token, weighted and summed.
#pragma once

#include "dot_products.h"
#include "memory.h"
#include "panels.h"
#include "routing.h"
#include "threads.h"
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
    const T* rows[ROW_BLOCK];
    const index_t width = part.to - part.from, padded = (width + LANES - 1) / LANES * LANES;
    float found[2][ROW_BLOCK * ROW_BLOCK];  // gate and up; parts are not wider than that here
    for (index_t m0 = 0; m0 < part.rows; m0 += ROW_BLOCK) {
      const index_t count = std::min(ROW_BLOCK, part.rows - m0), place = part.expert->begin + m0;
      for (index_t m = 0; m < count; ++m) rows[m] = x + routing.token[place + m] * s.D;
      dot_outputs(
          rows, count, s.D, 2 * width,
          [&](index_t n) { return base + (part.from + n + (n < width ? 0 : s.F - width)) * s.D; },
          [&](index_t m, index_t n, float sum) {
            (n < width ? found[0] + n : found[1] + (n - width))[m * padded] = sum;
          });
      for (index_t m = 0; m < count; ++m) {
        float *gate = &found[0][m * padded], *up = &found[1][m * padded];
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
    const T* rows[ROW_BLOCK];
    for (const auto& expert : routing.experts) {
      const T* base = down + (expert.id * s.D + from) * s.F;
      for (index_t place = expert.begin; place < expert.end; place += ROW_BLOCK) {
        const index_t count = std::min(ROW_BLOCK, expert.end - place);
        for (index_t m = 0; m < count; ++m) rows[m] = activations + (place + m) * s.F;
        dot_outputs(
            rows, count, s.F, to - from, [&](index_t n) { return base + n * s.F; },
            [&](index_t m, index_t n, float sum) {
              sums[routing.token[place + m] * (to - from) + n] += weights[routing.pick[place + m]] * sum;
            });
      }
    }
  }

#if defined(EMO_AMX)
  // The same, with activations packed as `pack_rows` does, every expert's rows filled up to whole tiles.
  static constexpr int N = PARTS<T>;
  // Tokens packed at a time: with 2048 inputs they stay in a second cache of 2 MB.
  static constexpr index_t BLOCK = N == 1 ? 256 : 160;

  // sums[block of 32 tokens] = 16 rows of weights and 16 others times packed tokens, as `tile_products`
  // leaves them. The weights read after these begin `next` numbers later.
  static void times_rows(const bf16* first, const bf16* second, index_t, index_t in, Numbers tokens,
                         index_t count, float* sums) {
    for (index_t m = 0; m < count; m += 2 * TILE)
      tile_products<1>(true, m + TILE < count, {first, second, 2 * in, 32, 0},
                       packed_strips(tokens + m * padded(in), TILE * padded(in)), in, sums + m * 32);
  }
  // Weights are split a block at a time, the next one during the products of this one, and the lines of that
  // after it are asked for meanwhile. Blocks follow each other along the rows, where the processor reads
  // ahead.
  static void times_rows(const float* first, const float* second, index_t next, index_t in, Numbers tokens,
                         index_t count, float* sums) {
    constexpr index_t DEEP = 64, ROWS = 2 * TILE;
    alignas(64) bf16 rooms[2][3 * ROWS * DEEP];
    const auto room = [&](index_t k0) { return Room{rooms[k0 / DEEP % 2], ROWS * DEEP}; };
    const auto split_of_block = [&](index_t k0, index_t r) {
      const index_t deep = std::min(DEEP, in - k0), after = k0 + deep < in ? deep : next - k0;
      const float* from = (r < TILE ? first + r * in : second + (r - TILE) * in) + k0;
      for (index_t k = 0; k < deep; k += 16) _mm_prefetch((const char*)(from + after + k), _MM_HINT_T1);
      split_row(from, deep, room(k0) + (r / TILE * TILE * deep + r % TILE * 32), 512);
    };
    for (index_t r = 0; r < ROWS; ++r) split_of_block(0, r);
    for (index_t k0 = 0; k0 < in; k0 += DEEP) {
      const index_t deep = std::min(DEEP, in - k0);
      const index_t steps = (count + 2 * TILE - 1) / (2 * TILE) * (deep / 32) * CALLS<3>;
      const index_t rows = k0 + deep < in ? ROWS : 0;
      index_t step = 0, row = 0;
      const auto meanwhile = [&] {
        for (++step; row * steps < rows * step; ++row) split_of_block(k0 + DEEP, row);
      };
      const Strips left = packed_strips(room(k0), TILE * deep);
      for (index_t m = 0; m < count; m += 2 * TILE) {
        const Strips right = packed_strips(tokens + (m * padded(in) + 16 * k0), TILE * padded(in));
        if (k0)
          tile_products<3, true>(true, m + TILE < count, left, right, deep, sums + m * 32, meanwhile);
        else
          tile_products<3>(true, m + TILE < count, left, right, deep, sums + m * 32, meanwhile);
      }
    }
  }
  void tile_gate_up(const Part& part, Numbers tokens, Room activations, Room packed) const {
    const T* base = gate_up + part.expert->id * 2 * s.F * s.D;
    Numbers rows[BLOCK];
    Buffer<float> all_sums(BLOCK * 2 * TILE);
    for (index_t m0 = 0; m0 < part.rows; m0 += BLOCK) {
      const index_t count = std::min(BLOCK, part.rows - m0), place = part.expert->begin + m0;
      for (index_t m = 0; m < count; ++m) rows[m] = tokens + routing.token[place + m] * s.D;
      pack_rows<N>(rows, count, s.D, packed);
      for (index_t f = part.from; f < part.to; f += TILE) {
        const T* gate = base + f * s.D;
        times_rows(gate, gate + s.F * s.D, TILE * s.D, s.D, packed, count, all_sums.p);
        for (index_t m = 0; m < count; m += TILE) {
          const float* sums = &all_sums.p[m / 32 * 1024 + m % 32 * 16];
          const index_t row = part.first_row + m0 + m;
          activate_tile<N>(sums, sums + 512, activations + (row * padded(s.F) + f / 32 * 512 + f % 32 * 16));
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
    Buffer<float> all_sums(BLOCK * 2 * TILE);
    for (const auto& expert : routing.experts) {
      const T* base = down + expert.id * s.D * s.F;
      const index_t rows = expert.end - expert.begin;
      for (index_t m0 = 0; m0 < rows; m0 += BLOCK)
        for (index_t d = from; d < to; d += 2 * TILE) {
          const T* w = base + d * s.F;
          const index_t count = std::min(BLOCK, rows - m0);
          times_rows(w, w + TILE * s.F, 2 * TILE * s.F, s.F, activations + m0 * padded(s.F), count,
                     all_sums.p);
          for (index_t m = 0; m < count; m += TILE)
            for (index_t half = 0; half < 2; ++half) {
              __m512i lines[16];
              turn(&all_sums.p[m / 32 * 1024 + m % 32 * 16 + half * 512], lines);
              for (index_t i = 0; i < std::min(TILE, count - m); ++i) {
                const index_t place = expert.begin + m0 + m + i;
                float* line = sums + routing.token[place] * (to - from) + d - from + half * TILE;
                const __m512 weight = _mm512_set1_ps(weights[routing.pick[place]]);
                _mm512_storeu_ps(line, _mm512_fmadd_ps(weight, (__m512)lines[i], _mm512_loadu_ps(line)));
              }
            }
        }
      activations = activations + (rows + TILE - 1) / TILE * TILE * padded(s.F);
    }
  }

  void run_tiles(int threads) const {
    const index_t rows_each = routing.experts.empty() ? 0 : routing.pick.size() / routing.experts.size();
    // Tokens are packed anew for every part: large parts where there are many.
    const auto parts = cut(routing, s.F, rows_each > 16 ? 256 : 64, TILE);
    const index_t block = down_block(threads, s.T <= 64 ? 64 : 256), rows = routing.padded;
    Buffer<bf16> act(N * rows * padded(s.F)), packed(threads * N * BLOCK * padded(s.D));
    Buffer<bf16> halves(N == 1 ? 0 : N * s.T * s.D);
    Buffer<float> sums(threads * s.T * block);
    const Numbers tokens = N == 1 ? Numbers{(const bf16*)x, 0} : Numbers{halves.p, s.T * s.D};
    const Room activations{act.p, rows * padded(s.F)};
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      const Room mine_packed{packed.p + me * N * BLOCK * padded(s.D), BLOCK * padded(s.D)};
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

  // Tokens of an expert that lie in one panel.
  struct Block {
    const Routing::Expert* expert;
    index_t place, count, vectors, first;  // first: vectors of the blocks before
  };
  std::vector<Block> panel_blocks() const {
    std::vector<Block> blocks;
    index_t first = 0;
    for (const auto& expert : routing.experts) {
      const index_t rows = expert.end - expert.begin, vectors = (rows + LANES - 1) / LANES;
      const index_t most = PANEL_TOKENS / LANES, count = (vectors + most - 1) / most;
      for (index_t i = 0, done = 0; i < count; ++i) {  // as equal as can be: few vectors are slower
        const index_t some = (vectors - done + count - i - 1) / (count - i);
        const index_t place = expert.begin + done * LANES;
        blocks.push_back({&expert, place, std::min(some * LANES, expert.end - place), some, first});
        first += some, done += some;
      }
    }
    return blocks;
  }

  // As `dot_gate_up`, from panels of tokens to panels of activations.
  void panel_gate_up(const Block& block, index_t from, index_t to, unit<T>* panel,
                     unit<T>* activations) const {
    constexpr int TOGETHER = Unit<T>::numbers;
    const T* base = gate_up + block.expert->id * 2 * s.F * s.D;
    const T* rows[PANEL_TOKENS];
    const index_t width = block.vectors * LANES, steps = s.F / TOGETHER;
    alignas(64) float gate[PANEL_OUTPUTS * PANEL_TOKENS], up[PANEL_OUTPUTS * PANEL_TOKENS];
    for (index_t m = 0; m < block.count; ++m) rows[m] = x + routing.token[block.place + m] * s.D;
    fill_panel(rows, block.count, s.D, panel);
    activations += block.first * LANES * steps;
    for (index_t f = from; f < to; f += PANEL_OUTPUTS) {
      const index_t outs = std::min(PANEL_OUTPUTS, to - f);
      times_panel(base + f * s.D, s.D, outs, s.D, panel, block.vectors, gate);
      times_panel(base + (s.F + f) * s.D, s.D, outs, s.D, panel, block.vectors, up);
      if (saved)
        for (index_t part = 0; part < 2; ++part)
          use_lines(part ? up : gate, outs, block, [&](index_t place, index_t n, vec line, index_t count) {
            put_some(line, count, saved + place * 2 * s.F + part * s.F + f + n);
          });
      for (index_t v = 0; v < block.vectors; ++v) {
        const PanelPlace place = in_panel(v, block.vectors, steps);
        for (index_t n = 0; n < outs; n += TOGETHER) {
          vec h[TOGETHER];
          for (int i = 0; i < TOGETHER; ++i) {
            const index_t at = (n + i) * width + v * LANES;
            h[i] = silu(load(gate + at)) * load(up + at);
          }
          put_unit(h, activations + place.begin + (f + n) / TOGETHER * place.width);
        }
      }
    }
  }

  // Hands use(place, out, line, count) each token's outputs, up to a vector of them at a time.
  template <class Use>
  static void use_lines(const float* sums, index_t outs, const Block& block, Use use) {
    vec lines[LANES];
    const index_t width = block.vectors * LANES;
    for (index_t m = 0; m < block.count; m += LANES)
      for (index_t n = 0; n < outs; n += LANES) {
        const index_t count = std::min<index_t>(LANES, outs - n);
        turn_square(sums + n * width + m, width, count, lines);
        for (index_t i = 0; i < std::min<index_t>(LANES, block.count - m); ++i)
          use(block.place + m + i, n, lines[i], count);
      }
  }
  static void put_some(vec line, index_t count, T* to) {
    if (count == LANES) return put(to, line);
    for (index_t i = 0; i < count; ++i) store(to + i, line[i]);
  }

  void panel_down(index_t from, index_t to, const std::vector<Block>& blocks, const unit<T>* activations,
                  float* sums) const {
    alignas(64) float found[PANEL_OUTPUTS * PANEL_TOKENS];
    for (const Block& block : blocks) {
      const T* base = down + block.expert->id * s.D * s.F;
      const unit<T>* panel = activations + block.first * LANES * (s.F / Unit<T>::numbers);
      for (index_t d = from; d < to; d += PANEL_OUTPUTS) {
        const index_t outs = std::min(PANEL_OUTPUTS, to - d);
        times_panel(base + d * s.F, s.F, outs, s.F, panel, block.vectors, found);
        use_lines(found, outs, block, [&](index_t place, index_t n, vec line, index_t count) {
          float* sum = sums + routing.token[place] * (to - from) + d - from + n;
          const float weight = weights[routing.pick[place]];
          if (count == LANES) return put(sum, load(sum) + line * weight);
          for (index_t i = 0; i < count; ++i) sum[i] += line[i] * weight;
        });
      }
    }
  }

  void run_panels(int threads) const {
    const auto blocks = panel_blocks();
    const index_t vectors = blocks.empty() ? 0 : blocks.back().first + blocks.back().vectors;
    const index_t units = (PANEL_TOKENS + LANES) * s.D / Unit<T>::numbers;
    // Few blocks are cut along their outputs, and their tokens brought into order for each part.
    const index_t cuts = std::clamp<index_t>(8 * threads / std::max<index_t>(1, blocks.size()), 1,
                                             std::max<index_t>(1, s.F / (2 * PANEL_OUTPUTS)));
    const index_t part = ((s.F + cuts - 1) / cuts + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS * PANEL_OUTPUTS;
    const index_t parts = (s.F + part - 1) / part;
    const index_t share = (s.D / (4 * threads) + 15) / 16 * 16, wide = std::clamp<index_t>(share, 64, 256);
    Buffer<unit<T>> activations(vectors * LANES * s.F / Unit<T>::numbers), panels(threads * units);
    Buffer<float> sums(threads * s.T * wide);
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < blocks.size() * parts; ++i) {
        const index_t from = i % parts * part;
        panel_gate_up(blocks[i / parts], from, std::min(s.F, from + part), panels.p + me * units,
                      activations.p);
      }
#pragma omp for schedule(dynamic)
      for (index_t from = 0; from < s.D; from += wide)
        add_columns(s, from, std::min(s.D, from + wide), sums.p + me * s.T * wide, out,
                    [&](index_t to, float* into) { panel_down(from, to, blocks, activations.p, into); });
    }
  }

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
