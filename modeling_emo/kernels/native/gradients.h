// Gradients of the experts: dense, each number written once, those of experts that no token took as zeros.
//
//   g = d loss / d out, of a pick's token; w its weight; a, u its gate and up, h = SiLU(a) * u
//   d h = W_down^T g;  d w = <d h, h>;  d W_down = g (w h)^T
//   d u = w d h SiLU(a);  d a = w d h u SiLU'(a);  d W_gate_up = [d a, d u] x^T;  d x = W_gate_up^T [d a, d
//   u]
//
// Both products with weights run along the weights' outer dimension, both gradients of weights along tokens.
// By tiles, or by panels (`panels.h`) of columns: of weights, or of what the tokens have. Sizes are multiples
// of 32.
#pragma once

#include "memory.h"
#include "panels.h"
#include "routing.h"
#include "threads.h"
#include "tiles.h"

namespace {

template <class T>
struct Gradients {
  Shape s;
  const T *grad, *x, *gate_up, *down;
  const float* weights;  // by pick
  const T* saved;        // (P, 2F) gate and up by place
  T *grad_x, *grad_gate_up, *grad_down;
  float* grad_weights;  // by pick; of these four, those not wanted are null
  const Routing& routing;

  // 32 numbers of a row from d h: d a, d u and w h. Returns their part of <d h, h>.
  template <class To>
  float activate(const float* grad_act, index_t place, index_t f, To* to_gate, To* to_up, To* to_act) const {
    const T *gate = saved + place * 2 * s.F + f, *up = gate + s.F;
    const float weight = weights[routing.pick[place]];
    vec dots = {};
    for (index_t j = 0; j < 32; j += LANES) {
      const vec a = load(gate + j), u = load(up + j), g = load(grad_act + j);
      const vec sigmoid = 1.0f / (1.0f + exponential(-a)), activated = a * sigmoid, h = activated * u;
      dots += g * h;
      const vec weighted = g * weight;
      put(to_gate + j, weighted * u * (sigmoid + activated * (1.0f - sigmoid)));
      put(to_up + j, weighted * activated);
      put(to_act + j, h * weight);
    }
    return sum<LANES>(dots);
  }

  // Sums a pick's parts of <d h, h>, (places, blocks); to be called by all threads.
  void weight_gradients(const float* dots, index_t blocks) const {
#pragma omp for
    for (index_t p = 0; p < s.T * s.K; ++p) grad_weights[p] = 0;
#pragma omp for
    for (size_t place = 0; place < routing.pick.size(); ++place) {
      float dot = 0;
      for (index_t b = 0; b < blocks; ++b) dot += dots[place * blocks + b];
      grad_weights[routing.pick[place]] = dot;
    }
  }

  // To be called by all threads.
  void clear_what_no_token_took() const {
#pragma omp for schedule(dynamic)
    for (index_t e = 0; e < s.E; ++e)
      if (!routing.is_hit(e)) {
        if (grad_gate_up) memset(grad_gate_up + e * 2 * s.F * s.D, 0, 2 * s.F * s.D * sizeof(T));
        if (grad_down) memset(grad_down + e * s.D * s.F, 0, s.D * s.F * sizeof(T));
      }
  }

  // ---- by panels ------------------------------------------------------------------------------------------

  // What is multiplied, in rows: as stored, or as float32 where bfloat16 cannot be.
  using Stored = typename std::conditional<Unit<T>::numbers == 2, T, float>::type;
  static constexpr index_t SOME = 64;                // columns of a panel
  static constexpr index_t READ = 256 / sizeof(T);   // columns of weights read at a time
  static constexpr index_t LEFT = 64 * PANEL_ROWS;   // rows of a weight's gradient at a time
  struct Rows {
    const Stored* p;
    index_t width;
    const unit<T>* operator()(index_t row) const { return (const unit<T>*)(p + row * width); }
  };
  struct Found {
    Stored *both, *acts;  // by place: (P, 2F) and (P, F)
    float* dots;
    index_t blocks;
  };

  static void widen(const T* from, index_t count, Stored* to) {
    for (index_t i = 0; i < count; i += LANES) put(to + i, load(from + i));
  }

  // use(row, first sum) of `count` rows times panels of `columns` columns that lie one after the other.
  template <class Row, class Use>
  static void rows_times_panels(index_t count, Row row, index_t steps, const unit<T>* panels, index_t columns,
                                Use use) {
    alignas(64) float sums[PANEL_ROWS * SOME];
    for (index_t c = 0; c < columns; c += SOME, panels += SOME * steps) {
      const index_t some = std::min(SOME, columns - c), vectors = some / LANES;
      for (index_t m = 0; m < count; m += PANEL_ROWS) {
        const unit<T>* rows[PANEL_ROWS];
        const int together = std::min<index_t>(PANEL_ROWS, count - m);
        for (int r = 0; r < together; ++r) rows[r] = row(m + r);
        panel_some_rows<T>(rows, together, panels, vectors, steps, 0, sums, some);
        for (int r = 0; r < together; ++r) use(m + r, c, some, sums + r * some);
      }
    }
  }

  void panel_activations(const Part& part, const Rows& grads, const Found& to, unit<T>* panels) const {
    const T* weight = down + part.expert->id * s.D * s.F + part.from;
    const index_t width = part.to - part.from, steps = s.D / Unit<T>::numbers, first = part.expert->begin;
    fill_columns<T>(s.D, [&](index_t d) { return weight + d * s.F; }, width, SOME, panels);
    rows_times_panels(
        part.rows, [&](index_t m) { return grads(routing.token[first + m]); }, steps, panels, width,
        [&](index_t m, index_t c, index_t some, const float* sums) {
          Stored *both = to.both + (first + m) * 2 * s.F, *acts = to.acts + (first + m) * s.F;
          for (index_t i = 0; i < some; i += 32) {
            const index_t f = part.from + c + i;
            to.dots[(first + m) * to.blocks + f / 32] =
                activate(sums + i, first + m, f, both + f, both + s.F + f, acts + f);
          }
        });
  }

  // As `outer`: rows are turned to run along the tokens.
  template <class Left, class Right>
  static void panel_outer(const Part& part, Left left, Right right, index_t columns, T* out, unit<T>* turned,
                          unit<T>* panel) {
    const index_t steps = (part.rows + Unit<T>::numbers - 1) / Unit<T>::numbers;
    const index_t wide = turned_width(part.rows);
    fill_turned<T>(part.rows, left, part.from, part.to, wide, turned);
    for (index_t c = 0; c < columns; c += SOME) {
      const index_t width = std::min(SOME, columns - c);
      fill_columns<T>(part.rows, [&](index_t t) { return right(t) + c; }, width, SOME, panel);
      rows_times_panels(
          part.to - part.from, [&](index_t m) { return turned + m * wide; }, steps, panel, width,
          [&](index_t m, index_t, index_t some, const float* sums) {
            T* to = out + (part.from + m) * columns + c;
            for (index_t i = 0; i < some; i += 32) put_32(sums + i, to + i);
          });
    }
  }
  static index_t turned_width(index_t rows) { return (rows / Unit<T>::numbers + 16) / 16 * 16 + 16; }
  static void put_32(const float* from, T* to) {
#if defined(__AVX512BF16__)
    stream_32(_mm512_loadu_ps(from), _mm512_loadu_ps(from + 16), to);
#else
    for (index_t i = 0; i < 32; i += LANES) put(to + i, load(from + i));
#endif
  }

  void panel_x_gradient(index_t from, index_t to, const Found& found, float* sums, unit<T>* panels) const {
    const index_t width = to - from, steps = 2 * s.F / Unit<T>::numbers;
    const Rows both{found.both, 2 * s.F};
    for (const auto& expert : routing.experts) {
      const T* weight = gate_up + expert.id * 2 * s.F * s.D + from;
      fill_columns<T>(2 * s.F, [&](index_t f) { return weight + f * s.D; }, width, SOME, panels);
      rows_times_panels(
          expert.end - expert.begin, [&](index_t m) { return both(expert.begin + m); }, steps, panels, width,
          [&](index_t m, index_t c, index_t some, const float* add) {
            float* line = sums + routing.token[expert.begin + m] * width + c;
            for (index_t i = 0; i < some; i += LANES) put(line + i, load(line + i) + load(add + i));
          });
    }
  }

  void run_panels(int threads) const {
    const index_t places = routing.pick.size(), blocks = s.F / 32;
    const auto inner = cut(routing, s.F, READ, 1);
    const auto down_parts = cut(routing, grad_down ? s.D : 0, LEFT, 1);
    const auto gate_up_parts = cut(routing, grad_gate_up ? 2 * s.F : 0, LEFT, 1);
    index_t most = 0;
    for (const auto& expert : routing.experts) most = std::max(most, expert.end - expert.begin);
    const index_t turned = LEFT * turned_width(most);
    const index_t room = std::max(READ * std::max(s.D, 2 * s.F), turned + SOME * (most + 2));
    const bool widens = sizeof(Stored) != sizeof(T);
    Buffer<Stored> both(places * 2 * s.F), acts(places * s.F), wide(widens ? 2 * s.T * s.D : 0);
    Buffer<unit<T>> rooms(threads * room);
    Buffer<float> dots(places * blocks), sums(grad_x ? threads * s.T * READ : 0);
    const Rows grads{widens ? wide.p : (const Stored*)grad, s.D};
    const Found found{both.p, acts.p, dots.p, blocks};
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      unit<T>* mine = rooms.p + me * room;
      if (widens)
#pragma omp for
        for (index_t t = 0; t < s.T; ++t) widen(grad + t * s.D, s.D, wide.p + t * s.D);
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < inner.size(); ++i) panel_activations(inner[i], grads, found, mine);
      if (grad_weights) weight_gradients(dots.p, blocks);
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < down_parts.size(); ++i) {
        const Part& part = down_parts[i];
        const index_t first = part.expert->begin;
        panel_outer(
            part, [&](index_t t) { return grad + routing.token[first + t] * s.D; },
            [&](index_t t) { return acts.p + (first + t) * s.F; }, s.F,
            grad_down + part.expert->id * s.D * s.F, mine, mine + turned);
      }
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < gate_up_parts.size(); ++i) {
        const Part& part = gate_up_parts[i];
        const index_t first = part.expert->begin;
        panel_outer(
            part, [&](index_t t) { return both.p + (first + t) * 2 * s.F; },
            [&](index_t t) { return x + routing.token[first + t] * s.D; }, s.D,
            grad_gate_up + part.expert->id * 2 * s.F * s.D, mine, mine + turned);
      }
      if (grad_x)
#pragma omp for schedule(dynamic)
        for (index_t from = 0; from < s.D; from += READ)
          add_columns(s, from, std::min(s.D, from + READ), sums.p + me * s.T * READ, grad_x,
                      [&](index_t to, float* into) { panel_x_gradient(from, to, found, into, mine); });
      clear_what_no_token_took();
      finish_streams();
    }
  }

#if defined(EMO_AMX)
  // ---- by tiles -------------------------------------------------------------------------------------------

  static constexpr int N = PARTS<T>;
  static constexpr index_t BLOCK = 512;                 // tokens at a time
  static constexpr index_t COLUMNS = 4096 / sizeof(T);  // of weights: rows are read a page at a time
  static constexpr index_t OUTS = 1024;                 // rows of a weight's gradient
  static constexpr index_t WIDE = 1 << 18;              // numbers of its right factor

  // A thread's room, and whose rows lie in it: parts of one expert often follow each other.
  struct Workplace {
    Room left, right;
    float* sums;
    const Routing::Expert* expert = nullptr;
  };
  struct Between {  // what the first products leave to the others: packed rows, every expert's filled up
    Room grad_gate_up, activations;
    float* dots;
    index_t blocks;
  };

  // Columns c and c + 16 of a row in the blocks of `tile_times_columns`.
  static const float* in_blocks(const float* sums, index_t row, index_t columns, index_t c) {
    return sums + row / 32 * 32 * columns + c * 32 + row % 32 / 16 * 512 + row % 16 * 16;
  }

  static void store_strip(const float* from, Room to, index_t at) {
    __m512i parts[N];
    split(_mm512_load_ps(from), _mm512_load_ps(from + 16), parts);
    to.store(at, parts);
  }

  void activations(const Part& part, Numbers grads, const Between& to, Workplace& room) const {
    alignas(64) float line[32], a[32], u[32], h[32];
    const index_t width = part.to - part.from;
    const T* weight = down + part.expert->id * s.D * s.F + part.from;
    for (index_t m0 = 0; m0 < part.rows; m0 += BLOCK) {
      const index_t count = std::min(BLOCK, part.rows - m0), place = part.expert->begin + m0;
      if (part.rows > BLOCK || room.expert != part.expert) {
        for (index_t m = 0; m < count; ++m)
          for (index_t k = 0; k < s.D; k += 32) {
            __m512i parts[N];
            (grads + (routing.token[place + m] * s.D + k)).load(parts);
            room.left.store(in_strips(m, s.D, k), parts);
          }
        room.expert = part.expert;
      }
      tile_times_columns(room.left, count, weight, s.F, s.D, width, room.sums);
      for (index_t m = 0; m < count; ++m)
        for (index_t c = 0; c < width; c += 32) {
          const float* found = in_blocks(room.sums, m, width, c);
          memcpy(line, found, 64);
          memcpy(line + 16, found + 256, 64);
          const index_t row = part.first_row + m0 + m, column = part.from + c;
          to.dots[(place + m) * to.blocks + column / 32] = activate(line, place + m, column, a, u, h);
          store_strip(a, to.grad_gate_up, in_strips(row, 2 * s.F, column));
          store_strip(u, to.grad_gate_up, in_strips(row, 2 * s.F, column + s.F));
          store_strip(h, to.activations, in_strips(row, s.F, column));
        }
    }
  }

  // out[m][n] of a part's rows m and all `columns` n = the sum over its expert's tokens of left(t, m) *
  // right(t, n). What is found goes past the caches to memory during the products that follow.
  template <class Left, class Right>
  static void outer(const Part& part, Left left, Right right, index_t columns, T* out, Workplace& room) {
    alignas(64) float sums[2][1024];
    const index_t count = part.rows, depth = (count + 31) / 32 * 32, steps = depth / 32 * CALLS<N>;
    const auto row = [&](auto& of, index_t t, index_t c) {
      return t < count ? of(t, c) : Numbers{nullptr, 0};
    };
    for (index_t m = part.from; m < part.to; m += 32)
      pack_columns<N>(depth, [&](index_t t) { return row(left, t, m); }, room.left + (m - part.from) * depth);
    const index_t block = std::clamp<index_t>(WIDE / depth / 32 * 32, 32, std::min<index_t>(columns, 2048));
    T* found_for = nullptr;  // where 32 by 32 sums belong that were found last
    int turn = 0;            // they are in the other half
    const auto put_row = [&](index_t i) {
      const float* tile = sums[turn ^ 1] + i / TILE * 512 + i % TILE * 16;
      stream_32(_mm512_load_ps(tile), _mm512_load_ps(tile + 256), found_for + i * columns);
    };
    for (index_t n0 = 0; n0 < columns; n0 += block) {
      const index_t end = std::min(columns, n0 + block);
      if (block < columns || room.expert != part.expert)
        for (index_t n = n0; n < end; n += 32)
          pack_pairs<N>(depth, [&](index_t t) { return row(right, t, n); }, room.right + (n - n0) * depth);
      room.expert = part.expert;
      for (index_t m = part.from; m < part.to; m += 32) {
        const Strips rows = packed_strips(room.left + (m - part.from) * depth, TILE * depth);
        for (index_t n = n0; n < end; n += 32, turn ^= 1) {
          const index_t last = found_for ? 32 : 0;
          index_t step = 0, i = 0;
          const auto meanwhile = [&] {
            for (++step; i * steps < last * step; ++i) put_row(i);
          };
          const Strips right = packed_strips(room.right + (n - n0) * depth, TILE * depth);
          tile_products<N>(true, true, rows, right, depth, sums[turn], meanwhile);
          found_for = out + m * columns + n;
        }
      }
    }
    for (index_t i = 0; i < 32; ++i) put_row(i);
  }

  void x_gradient(index_t from, index_t to, const Between& found, float* sums, Workplace& room) const {
    index_t first_row = 0;
    const index_t width = to - from;
    for (const auto& expert : routing.experts) {
      const index_t rows = expert.end - expert.begin;
      const T* weight = gate_up + expert.id * 2 * s.F * s.D + from;
      for (index_t m0 = 0; m0 < rows; m0 += BLOCK) {
        const index_t count = std::min(BLOCK, rows - m0);
        const Numbers left = found.grad_gate_up + (first_row + m0) * padded(2 * s.F);
        tile_times_columns(left, count, weight, s.D, 2 * s.F, width, room.sums);
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

  void run(int threads) const {
    const index_t places = routing.pick.size(), rows = routing.padded, blocks = s.F / 32;
    const auto inner = cut(routing, s.F, COLUMNS, TILE);
    const auto down_parts = cut(routing, grad_down ? s.D : 0, OUTS, TILE);
    const auto gate_up_parts = cut(routing, grad_gate_up ? 2 * s.F : 0, OUTS, TILE);
    index_t most = 0;  // rows of an expert, filled up to what a sum along them takes
    for (const auto& expert : routing.experts)
      most = std::max(most, (expert.end - expert.begin + 31) / 32 * 32);
    // The left factor: an expert's tokens, or columns of them; the right one: weights, or tokens.
    const index_t left = std::max(BLOCK * padded(s.D), OUTS * most);
    const index_t right = std::max(WIDE, 32 * most);
    constexpr index_t sizes = BLOCK * COLUMNS;  // of the sums of `tile_times_columns`
    const index_t share = (s.D / (2 * threads) + 31) / 32 * 32,
                  wide = std::clamp<index_t>(share, 32, COLUMNS);
    Buffer<bf16> both(N * rows * padded(2 * s.F)), act(N * rows * padded(s.F)),
        packed(threads * N * (left + right));
    Buffer<bf16> halves(N == 1 ? 0 : 2 * N * s.T * s.D);
    Buffer<float> dots(places * blocks), found(threads * sizes), sums(grad_x ? threads * s.T * wide : 0);
    const index_t gap = s.T * s.D;
    const Room grad_halves{halves.p, gap}, x_halves{halves.p + N * gap, gap};
    const Numbers grads = N == 1 ? Numbers{(const bf16*)grad, 0} : Numbers(grad_halves);
    const Numbers tokens = N == 1 ? Numbers{(const bf16*)x, 0} : Numbers(x_halves);
    const Between between{{both.p, rows * padded(2 * s.F)}, {act.p, rows * padded(s.F)}, dots.p, blocks};
    const Numbers grad_both = between.grad_gate_up, acts = between.activations;
#pragma omp parallel num_threads(threads)
    {
      const int me = omp_get_thread_num();
      bf16* mine = packed.p + me * N * (left + right);
      Workplace room{{mine, left}, {mine + N * left, right}, found.p + me * sizes};
      const Tiles configured;
      if constexpr (N > 1)
#pragma omp for
        for (index_t t = 0; t < s.T; ++t) {
          split_row(grad + t * s.D, s.D, grad_halves + t * s.D, 32);
          split_row(x + t * s.D, s.D, x_halves + t * s.D, 32);
        }
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < inner.size(); ++i) activations(inner[i], grads, between, room);
      if (grad_weights) weight_gradients(dots.p, blocks);
      room.expert = nullptr;
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < down_parts.size(); ++i) {
        const Part& part = down_parts[i];
        outer(
            part,
            [&](index_t t, index_t d) { return grads + (routing.token[part.expert->begin + t] * s.D + d); },
            [&](index_t t, index_t f) { return acts + in_strips(part.first_row + t, s.F, f); }, s.F,
            grad_down + part.expert->id * s.D * s.F, room);
      }
      room.expert = nullptr;
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < gate_up_parts.size(); ++i) {
        const Part& part = gate_up_parts[i];
        outer(
            part, [&](index_t t, index_t f) { return grad_both + in_strips(part.first_row + t, 2 * s.F, f); },
            [&](index_t t, index_t d) { return tokens + (routing.token[part.expert->begin + t] * s.D + d); },
            s.D, grad_gate_up + part.expert->id * 2 * s.F * s.D, room);
      }
      if (grad_x)
#pragma omp for schedule(dynamic)
        for (index_t from = 0; from < s.D; from += wide)
          add_columns(s, from, std::min(s.D, from + wide), sums.p + me * s.T * wide, grad_x,
                      [&](index_t to, float* into) { x_gradient(from, to, between, into, room); });
      clear_what_no_token_took();
      finish_streams();
    }
  }
#endif
};

}  // namespace
