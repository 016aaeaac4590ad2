// Linear layers of a few rows.
#pragma once

#include <vector>

#include "dot_products.h"
#include "memory.h"
#include "tiles.h"

namespace {

template <class T>
struct Linear {
  const T *x, *weight, *bias;  // (rows, in), (outs, in), (outs) or null
  T* out;                      // (rows, outs)
  index_t rows, in, outs;

  static constexpr index_t OUTS = 16 * TILE_OUTS;  // at a time

  // Outputs from `from` on, as many as are computed at a time.
  void part(index_t from) const {
    const T* lines[ROW_BLOCK];
    for (index_t m0 = 0; m0 < rows; m0 += ROW_BLOCK) {
      const index_t count = std::min(ROW_BLOCK, rows - m0);
      for (index_t m = 0; m < count; ++m) lines[m] = x + (m0 + m) * in;
      dot_outputs(
          lines, count, in, std::min(OUTS, outs - from), [&](index_t n) { return weight + (from + n) * in; },
          [&](index_t m, index_t n, float sum) {
            store(out + (m0 + m) * outs + from + n, sum + (bias ? to_float(bias[from + n]) : 0));
          });
    }
  }

  // Outputs from `begin` on.
  void dots(index_t begin, int threads) const {
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (index_t from = begin; from < outs; from += OUTS) part(from);
  }

#if defined(EMO_AMX)
  // bfloat16, with inputs a multiple of 32.
  void tiles(int threads) const {
    constexpr index_t OUTS = 64;  // at a time
    const index_t strips = (rows + TILE - 1) / TILE, whole = outs / 32 * 32;
    Buffer<bf16> packed(strips * TILE * padded(in));
    std::vector<Numbers> lines(rows);
    for (index_t m = 0; m < rows; ++m) lines[m] = {x + m * in, 0};
    pack_rows<1>(lines.data(), rows, in, {packed.p, 0});
#pragma omp parallel num_threads(threads)
    {
      alignas(64) float sums[1024];
      const Tiles configured;
#pragma omp for schedule(dynamic)
      for (index_t from = 0; from < whole; from += OUTS)
        for (index_t n = from; n < std::min(whole, from + OUTS); n += 32)
          for (index_t m = 0; m < rows; m += 32) {
            const bf16* w = weight + n * in;
            tile_products<1>(true, m + TILE < rows, {w, w + TILE * in, 2 * in, 32, 0},
                             packed_strips({packed.p + m * padded(in), 0}, TILE * padded(in)), in, sums);
            for (index_t quarter = 0; quarter < 4; ++quarter) {
              const index_t first = m + quarter % 2 * TILE, column = n + quarter / 2 * TILE;
              if (first >= rows) continue;
              __m512i found[16];
              turn(sums + quarter * 256, found);
              const vec more = bias ? load(bias + column) : vec{};
              for (index_t i = 0; i < std::min(TILE, rows - first); ++i)
                put(out + (first + i) * outs + column, (vec)found[i] + more);
            }
          }
    }
    dots(whole, threads);
  }
#endif
};

}  // namespace
