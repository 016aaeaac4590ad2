// Linear layers and experts of weights in 8 and 4 bits.
#pragma once

#include <type_traits>
#include <vector>

#include "packed_bytes.h"
#include "routing.h"
#include "threads.h"

namespace {

// ---- weights as other numbers -----------------------------------------------------------------------------

// Numbers [begin, end) of a row, whole groups of 32, as float32.
template <class Matrix>
inline void unpack_row(const Matrix& weights, index_t n, index_t begin, index_t end, float* to) {
  const uint8_t *row = weights.row(n), *zeros = weights.zeros_of(n);
  const auto* scales = weights.scales_of(n);
  for (index_t k = begin; k < end; k += SMALLEST, to += SMALLEST) {
    const index_t g = k / weights.group;
    const int zero = zeros ? zeros[g] : Matrix::MIDDLE;
    const float scale = to_float(scales[g]);
    if (Matrix::BITS == 8)
      for (int i = 0; i < SMALLEST; ++i) to[i] = float(int(row[k + i]) - zero) * scale;
    else
      for (int i = 0; i < SMALLEST / 2; ++i) {
        const int both = row[k / 2 + i];
        to[2 * i] = float((both & 15) - zero) * scale;
        to[2 * i + 1] = float((both >> 4) - zero) * scale;
      }
  }
}

template <class T, class Matrix>
void unpack(const Matrix& weights, index_t outs, T* to, int threads) {
  constexpr index_t BLOCK = 512;
#pragma omp parallel for num_threads(threads)
  for (index_t n = 0; n < outs; ++n)
    for (index_t k = 0; k < weights.in; k += BLOCK) {
      const index_t end = std::min(weights.in, k + BLOCK);
      if constexpr (sizeof(T) == 4) {
        unpack_row(weights, n, k, end, to + n * weights.in + k);
      } else {
        float some[BLOCK];
        unpack_row(weights, n, k, end, some);
        copy_back(some, end - k, to + n * weights.in + k);
      }
    }
}

// ---- many rows --------------------------------------------------------------------------------------------

// sums[row][out] of float32.
template <int ROWS, int OUTS>
__attribute__((noinline)) void float_tile(const float* const* x, const float* w, index_t in, float* sums) {
  vec acc[ROWS][OUTS] = {};
  for (index_t k = 0; k < in; k += LANES) {
    vec row[ROWS];
#pragma GCC unroll 8
    for (int m = 0; m < ROWS; ++m) row[m] = load(x[m] + k);
#pragma GCC unroll 8
    for (int n = 0; n < OUTS; ++n) {
      const vec weight = load(w + n * in + k);
#pragma GCC unroll 8
      for (int m = 0; m < ROWS; ++m) acc[m][n] += row[m] * weight;
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < OUTS; ++n) sums[m * TILE_OUTS + n] = sum<LANES>(acc[m][n]);
}

// use(row, out, sum): weights are unpacked once for all rows.
template <class Row, class Matrix, class Use>
inline void many_products(Row row_of, index_t rows, const Matrix& weights, index_t outs, Use use) {
  static thread_local std::vector<float> unpacked;
  const index_t in = weights.in;
  if (index_t(unpacked.size()) < TILE_OUTS * in) unpacked.resize(TILE_OUTS * in);
  for (index_t n = 0; n < outs; n += TILE_OUTS) {
    const index_t count = std::min<index_t>(TILE_OUTS, outs - n);
    for (index_t i = 0; i < TILE_OUTS; ++i)
      unpack_row(weights, n + std::min(i, count - 1), 0, in, unpacked.data() + i * in);
    for (index_t m = 0; m < rows; m += TILE_ROWS) {
      const float* lines[TILE_ROWS];
      float sums[TILE_ROWS * TILE_OUTS];
      for (index_t i = 0; i < TILE_ROWS; ++i) lines[i] = row_of(std::min(m + i, rows - 1));
      float_tile<TILE_ROWS, TILE_OUTS>(lines, unpacked.data(), in, sums);
      for (index_t i = 0; i < std::min<index_t>(TILE_ROWS, rows - m); ++i)
        for (index_t j = 0; j < count; ++j) use(m + i, n + j, sums[i * TILE_OUTS + j]);
    }
  }
}

// Rows as float32.
template <class X>
struct Floats {
  index_t in;
  Buffer<float> numbers;

  Floats(index_t rows, index_t in, index_t) : in(in), numbers(rows * in) {}
  void prepare(index_t row, const X* x) {
    for (index_t k = 0; k < in; k += LANES) put(numbers.p + row * in + k, load(x + k));
  }
  template <class Rows, class Matrix, class Use>
  void products(Rows row_of, index_t rows, const Matrix& weights, index_t outs, Use use) const {
    many_products([&](index_t m) { return numbers.p + row_of(m) * in; }, rows, weights, outs, use);
  }
};
template <class Form>
struct Few : ReadyRows<Form> {
  using ReadyRows<Form>::ReadyRows;
  template <class Rows, class Matrix, class Use>
  void products(Rows row_of, index_t rows, const Matrix& weights, index_t outs, Use use) const {
    ReadyRow some[FEW_ROWS];
    for (index_t m = 0; m < rows; m += FEW_ROWS) {
      const index_t count = std::min(FEW_ROWS, rows - m);
      for (index_t i = 0; i < count; ++i) some[i] = (*this)[row_of(m + i)];
      few_products<Form>(some, count, weights, outs,
                         [&](index_t i, index_t n, float sum) { use(m + i, n, sum); });
    }
  }
};
#if defined(EMO_PACKED_PANELS)
// Bytes, in panels from so many rows on.
template <int BITS>
struct FewOrMany : Few<Bytes<BITS>> {
  using Few<Bytes<BITS>>::Few;
  template <class Rows, class Matrix, class Use>
  void products(Rows row_of, index_t rows, const Matrix& weights, index_t outs, Use use) const {
    if (rows < PANEL_FROM + !weights.zeros)
      return Few<Bytes<BITS>>::products(row_of, rows, weights, outs, use);
    static thread_local std::vector<ReadyRow> all;
    all.resize(rows);
    for (index_t m = 0; m < rows; ++m) all[m] = (*this)[row_of(m)];
    panel_products(all.data(), rows, weights, outs, use);
  }
};
#else
template <int BITS>
using FewOrMany = Few<Bytes<BITS>>;
#endif

// ---- operations -------------------------------------------------------------------------------------------

template <class Ready, class X, class Matrix>
void packed_linear(const X* x, const Matrix& weights, const X* bias, X* out, index_t rows, index_t outs,
                   int threads) {
  // At a time: long streams, but something for every thread.
  const index_t block = std::clamp<index_t>((outs / (4 * threads) + 31) / 32 * 32, 32, 256);
  Ready ready(rows, weights.in, weights.group);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (index_t m = 0; m < rows; ++m) ready.prepare(m, x + m * weights.in);
#pragma omp for schedule(dynamic)
    for (index_t from = 0; from < outs; from += block)
      ready.products([](index_t m) { return m; }, rows, weights.from(from), std::min(block, outs - from),
                     [&](index_t m, index_t n, float sum) {
                       store(out + m * outs + from + n, sum + (bias ? to_float(bias[from + n]) : 0));
                     });
  }
}

template <class Ready, class X, class Matrix>
struct PackedExperts {
  Shape s;
  const X* x;
  Matrix gate_up, down;  // (E * 2F, D), (E * D, F)
  const float* weights;
  X* out;
  const Routing& routing;

  static constexpr index_t OUTS = 128;  // of a part

  void gate_up_part(const Part& part, const Ready& ready, X* activations) const {
    const index_t first = part.expert->begin, width = part.to - part.from;
    const index_t padded = (width + LANES - 1) / LANES * LANES;
    std::vector<float> found(2 * part.rows * padded);
    for (int half = 0; half < 2; ++half) {
      float* to = found.data() + half * part.rows * padded;
      ready.products([&](index_t m) { return routing.token[first + m]; }, part.rows,
                     gate_up.from((2 * part.expert->id + half) * s.F + part.from), width,
                     [&](index_t m, index_t n, float sum) { to[m * padded + n] = sum; });
    }
    for (index_t m = 0; m < part.rows; ++m) {
      float* gate = found.data() + m * padded;
      const float* up = gate + part.rows * padded;
      for (index_t j = 0; j < padded; j += LANES) put(gate + j, silu(load(gate + j)) * load(up + j));
      copy_back(gate, width, activations + (first + m) * s.F + part.from);
    }
  }

  void down_part(index_t from, index_t to, const Ready& ready, float* sums) const {
    for (const auto& expert : routing.experts)
      ready.products([&](index_t m) { return expert.begin + m; }, expert.end - expert.begin,
                     down.from(expert.id * s.D + from), to - from, [&](index_t m, index_t n, float sum) {
                       const index_t place = expert.begin + m;
                       sums[routing.token[place] * (to - from) + n] += weights[routing.pick[place]] * sum;
                     });
  }

  void run(int threads) const {
    const auto parts = cut(routing, s.F, OUTS, 1);
    const index_t picks = routing.pick.size(), block = 128;
    Buffer<X> activations(picks * s.F);
    Buffer<float> sums(threads * s.T * block);
    Ready tokens(s.T, s.D, gate_up.group), middle(picks, s.F, down.group);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
      for (index_t t = 0; t < s.T; ++t) tokens.prepare(t, x + t * s.D);
#pragma omp for schedule(dynamic)
      for (size_t i = 0; i < parts.size(); ++i) gate_up_part(parts[i], tokens, activations.p);
#pragma omp for
      for (index_t p = 0; p < picks; ++p) middle.prepare(p, activations.p + p * s.F);
#pragma omp for schedule(dynamic)
      for (index_t from = 0; from < s.D; from += block)
        add_columns(s, from, std::min(s.D, from + block), sums.p + omp_get_thread_num() * s.T * block, out,
                    [&](index_t to, float* into) { down_part(from, to, middle, into); });
    }
  }
};

// ---- the types of a call ----------------------------------------------------------------------------------

// What Python hands over of a stack of weights.
struct PackedWeight {
  const void *numbers, *scales, *zeros;
  index_t in, group;
  int bits, bf16_scales;
};

// use(matrix) of the type that the weight has.
template <class Use>
void with_matrix(const PackedWeight& w, Use use) {
  const auto numbers = (const uint8_t*)w.numbers, zeros = (const uint8_t*)w.zeros;
  if (w.bits == 4 && w.bf16_scales)
    use(PackedMatrix<4, bf16>{numbers, (const bf16*)w.scales, zeros, w.in, w.group});
  else if (w.bits == 4)
    use(PackedMatrix<4, float>{numbers, (const float*)w.scales, zeros, w.in, w.group});
  else if (w.bf16_scales)
    use(PackedMatrix<8, bf16>{numbers, (const bf16*)w.scales, zeros, w.in, w.group});
  else
    use(PackedMatrix<8, float>{numbers, (const float*)w.scales, zeros, w.in, w.group});
}

// Rows for each matrix, up to which weights are unpacked for a few rows at a time.
constexpr index_t MANY_ROWS = 2 * FEW_ROWS;

// How activations are made ready where so many rows meet each matrix, and may be rounded or not: run(Ready*).
template <int BITS, class X, class Run>
void with_ready(bool many, bool may_round, Run run) {
  if constexpr (sizeof(X) == 2) {
    if constexpr (HAS_BYTES<BITS>)
      if (may_round) return run((FewOrMany<BITS>*)nullptr);
#if defined(EMO_PACKED_BF16)
    return run((Few<Halves<BITS>>*)nullptr);
#endif
  }
  many ? run((Floats<X>*)nullptr) : run((Few<WholeNumbers<BITS, X>>*)nullptr);
}

template <class X>
void packed_linear_of(const void* x, const PackedWeight& weight, const void* bias, void* out, index_t rows,
                      index_t outs, bool may_round, int threads) {
  with_matrix(weight, [&](auto matrix) {
    with_ready<decltype(matrix)::BITS, X>(rows > MANY_ROWS, may_round, [&](auto* kind) {
      packed_linear<std::remove_pointer_t<decltype(kind)>>((const X*)x, matrix, (const X*)bias, (X*)out, rows,
                                                           outs, threads);
    });
  });
}

template <class X>
void packed_experts_of(const void* x, const PackedWeight& gate_up, const PackedWeight& down,
                       const float* weights, const index_t* index, void* out, const Shape& s, bool may_round,
                       int threads) {
  const Routing routing(index, s);
  const bool many = routing.pick.size() > MANY_ROWS * routing.experts.size();
  with_matrix(gate_up, [&](auto first) {
    using Matrix = decltype(first);
    const Matrix second{(const uint8_t*)down.numbers, (const typename Matrix::Scale*)down.scales,
                        (const uint8_t*)down.zeros, down.in, down.group};
    with_ready<Matrix::BITS, X>(many, may_round, [&](auto* kind) {
      PackedExperts<std::remove_pointer_t<decltype(kind)>, X, Matrix>{s,       (const X*)x, first,  second,
                                                                      weights, (X*)out,     routing}
          .run(threads);
    });
  });
}

}  // namespace
