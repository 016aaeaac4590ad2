// EMO's experts and linear layers on a CPU: SwiGLU of each token's experts, weighted and summed.
//
// Compiled when the package is installed, once for each of several instruction sets (`instruction_sets.py`);
// plain C functions, so that one build serves every version of Python and torch. Weights are read as they are
// stored, [out, in] with `in` contiguous: nothing is repacked, and nothing held twice. There are three kinds
// of inner loop:
//
//   * dot products along `in` with vectors of whatever width the machine has, for float32 and bfloat16;
//   * for many rows, panels of tokens whose numbers lie side by side, with vectors of AVX-512;
//   * AMX tiles where the machine has them. A tile of weights is 16 stored rows as they are; the
//     other factor, the few tokens, is what is brought into the pairwise order that AMX wants. So a product
//     comes out transposed, 16 outputs by 16 tokens, and SiLU(gate) * up leaves it in just the order that the
//     next product wants.
//
// Work is dealt out to threads in parts of outputs, never of sums: each number is summed in an order that the
// routing alone decides, so that results are the same bits from run to run and for any number of threads.
//
// T tokens, K picks each, P = T * K picks, E experts, D hidden size, F expert width. Picks are kept by
// expert.
//
// `vectors.h`, `dot_products.h`, `few_rows.h`, `panels.h` and `tiles.h` are the inner loops; `routing.h` sorts
// the picks; `experts.h`, `gradients.h`, `linear.h`, `elementwise.h` and `decoding.h` are the operations;
// `processor.h` says what runs here.

#include "decoding.h"
#include "elementwise.h"
#include "experts.h"
#include "gradients.h"
#include "linear.h"
#include "packed_products.h"
#include "processor.h"

#if !defined(EMO_FINGERPRINT)
#define EMO_FINGERPRINT ""
#endif

namespace {

// Waking threads takes longer than a small product does.
int useful_threads(index_t work, int threads) { return work < (1 << 18) ? 1 : threads; }

bool fits_tiles(const Shape& s) { return s.D % 32 == 0 && s.F % 32 == 0 && amx_allowed(); }

template <class T>
void experts(const void* x, const void* gate_up, const void* down, const float* weights, const index_t* index,
             void* out, void* saved, const Shape& s, int threads, int use_tiles) {
  const Routing routing(index, s);
  const Experts<T> job{s,       (const T*)x, (const T*)gate_up, (const T*)down,
                       weights, (T*)out,     (T*)saved,         routing};
  threads = useful_threads(routing.pick.size() * s.D * s.F, threads);
#if defined(EMO_AMX)
  // A few rows an expert are a stream of weights, which dot products read better; float32 has to be split,
  // too.
  const size_t few = sizeof(T) == 4 ? 10 : 4;
  if (use_tiles && fits_tiles(s) && routing.pick.size() > few * routing.experts.size())
    return job.run_tiles(threads);
#endif
  // More rows than a stream of weights has registers for: it pays to bring the tokens into order.
  if constexpr (HAS_PANELS)
    if (routing.pick.size() > STREAM_ROWS * routing.experts.size() && fits_units<T>(s.D) && fits_units<T>(s.F))
      return job.run_panels(threads);
  job.run(threads);
}

template <class T>
void gradients(const void* grad, const void* x, const void* gate_up, const void* down, const float* weights,
               const index_t* index, const void* saved, void* grad_x, void* grad_gate_up, void* grad_down,
               float* grad_weights, const Shape& s, int threads) {
  const Routing routing(index, s);
  const Gradients<T> job{s,
                         (const T*)grad,
                         (const T*)x,
                         (const T*)gate_up,
                         (const T*)down,
                         weights,
                         (const T*)saved,
                         (T*)grad_x,
                         (T*)grad_gate_up,
                         (T*)grad_down,
                         grad_weights,
                         routing};
  threads = useful_threads(std::max<index_t>(routing.pick.size(), s.E) * s.D * s.F, threads);
#if defined(EMO_AMX)
  if (fits_tiles(s)) return job.run(threads);
#endif
  job.run_panels(threads);
}

// A layer of experts from its attention on.
template <class T>
void decode(const EmoAttention& a, const EmoDecoding& d, int threads) {
  const index_t heads = a.H * a.W, size = a.B * d.D;
  Buffer<T> attended(a.B * heads), hidden(size), normed(size), logits(a.B * d.E), found(size);
  if (!d.attended) attend(a, attended.p, useful_threads(2 * a.B * a.H * a.N * a.W, threads));
  const T* rows = d.attended ? (const T*)d.attended : attended.p;
  linears<T>({{rows, (const T*)d.output, (const T*)d.output_bias, found.p, a.B, heads, d.D}},
             useful_threads(size * heads, threads));
  add((const T*)d.hidden, found.p, size, hidden.p);
  rms_norm(hidden.p, (const T*)d.norm, normed.p, a.B, d.D, d.epsilon, 1);
  linears<T>({{normed.p, (const T*)d.router, nullptr, logits.p, a.B, d.D, d.E}},
             useful_threads(size * d.E, threads));
  std::vector<float> weights(a.B * d.top_k);
  std::vector<index_t> index(a.B * d.top_k);
  for (index_t b = 0; b < a.B; ++b)
    route(d, logits.p + b * d.E, d.allowed ? d.allowed + b * d.allowed_stride : nullptr,
          &weights[b * d.top_k], &index[b * d.top_k]);
  experts<T>(normed.p, d.gate_up, d.down, weights.data(), index.data(), found.p, nullptr,
             {a.B, d.top_k, d.E, d.D, d.F}, threads, 1);
  add(hidden.p, found.p, size, (T*)d.out);
}

}  // namespace

// ---- what Python calls: 0, or 1 if memory ran out ---------------------------------------------------------

extern "C" {

// Of these sources and what the compiler was told: another one is another library.
const char* emo_fingerprint() { return EMO_FINGERPRINT; }

// Of the machine, not of this library, whose instructions it may not have: to be asked of the portable one.
int emo_processor_features() { return processor_features(); }

int emo_has_tiles() { return amx_allowed(); }

int emo_has_panels() { return HAS_PANELS; }

// Whether activations that may be rounded are multiplied as bytes with weights of so many bits.
int emo_has_bytes(int bits) { return bits == 4 ? HAS_BYTES<4> : HAS_BYTES<8>; }

int emo_experts(int is_bf16, const void* x, const void* gate_up, const void* down, const float* weights,
                const int64_t* index, void* out, void* saved, int64_t T, int64_t K, int64_t E, int64_t D,
                int64_t F, int threads, int use_tiles) try {
  (is_bf16 ? experts<bf16> : experts<float>)(x, gate_up, down, weights, index, out, saved, {T, K, E, D, F},
                                             threads, use_tiles);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// Only for sizes that are multiples of 32. Gradients not wanted are null.
int emo_experts_backward(int is_bf16, const void* grad, const void* x, const void* gate_up, const void* down,
                         const float* weights, const int64_t* index, const void* saved, void* grad_x,
                         void* grad_gate_up, void* grad_down, float* grad_weights, int64_t T, int64_t K,
                         int64_t E, int64_t D, int64_t F, int threads) try {
  (is_bf16 ? gradients<bf16> : gradients<float>)(grad, x, gate_up, down, weights, index, saved, grad_x,
                                                 grad_gate_up, grad_down, grad_weights, {T, K, E, D, F},
                                                 threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

int emo_linear(int is_bf16, const void* x, const void* weight, const void* bias, void* out, int64_t rows,
               int64_t in, int64_t outs, int threads) try {
  threads = useful_threads(rows * in * outs, threads);
  if (!is_bf16) {
    Linear<float>{(const float*)x, (const float*)weight, (const float*)bias, (float*)out, rows, in, outs}
        .dots(0, threads);
    return 0;
  }
  const Linear<bf16> job{(const bf16*)x, (const bf16*)weight, (const bf16*)bias, (bf16*)out, rows, in, outs};
#if defined(EMO_AMX)
  // A tile has 16 rows, however few are used: up to five are faster as dot products.
  if (rows > 5 && in % 32 == 0 && amx_allowed()) {
    job.tiles(threads);
    return 0;
  }
#endif
  job.dots(0, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// Weights in `bits` each, with a scale for every `group` of them and zero points or null; the scales of all
// are of one type. Activations in bfloat16 may be rounded to 8 bits where `may_round`.
int emo_packed_linear(int is_bf16, const void* x, const void* numbers, const void* scales, const void* zeros,
                      const void* bias, void* out, int64_t rows, int64_t in, int64_t outs, int64_t group,
                      int bits, int bf16_scales, int may_round, int threads) try {
  (is_bf16 ? packed_linear_of<bf16> : packed_linear_of<float>)(
      x, {numbers, scales, zeros, in, group, bits, bf16_scales}, bias, out, rows, outs, may_round,
      useful_threads(rows * in * outs, threads));
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

int emo_packed_experts(int is_bf16, const void* x, const void* gate_up, const void* gate_up_scales,
                       const void* gate_up_zeros, const void* down, const void* down_scales,
                       const void* down_zeros, const float* weights, const int64_t* index, void* out,
                       int64_t T, int64_t K, int64_t E, int64_t D, int64_t F, int64_t gate_up_group,
                       int64_t down_group, int bits, int bf16_scales, int may_round, int threads) try {
  (is_bf16 ? packed_experts_of<bf16> : packed_experts_of<float>)(
      x, {gate_up, gate_up_scales, gate_up_zeros, D, gate_up_group, bits, bf16_scales},
      {down, down_scales, down_zeros, F, down_group, bits, bf16_scales}, weights, index, out, {T, K, E, D, F},
      may_round, useful_threads(T * K * D * F, threads));
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

void emo_unpack(int is_bf16, const void* numbers, const void* scales, const void* zeros, void* out,
                int64_t outs, int64_t in, int64_t group, int bits, int bf16_scales, int threads) {
  threads = useful_threads(outs * in, threads);
  with_matrix({numbers, scales, zeros, in, group, bits, bf16_scales}, [&](auto matrix) {
    is_bf16 ? unpack(matrix, outs, (bf16*)out, threads) : unpack(matrix, outs, (float*)out, threads);
  });
}

// Queries, keys and values of one token of B sequences; the weights, biases (or null), results and numbers of
// heads of all three.
int emo_decode_heads(int is_bf16, const void* hidden, const void* norm, float epsilon,
                     const void* const* weights, const void* const* biases, const float* cosines,
                     const float* sines, int64_t positions, void* const* out, int64_t B, int64_t D,
                     const int64_t* heads, int64_t W, int threads) try {
  threads = useful_threads(B * D * (heads[0] + 2 * heads[1]) * W, threads);
  if (is_bf16)
    decode_heads((const bf16*)hidden, (const bf16*)norm, epsilon, (const bf16* const*)weights,
                 (const bf16* const*)biases, cosines, sines, positions, (bf16* const*)out, B, D, heads, W,
                 threads);
  else
    decode_heads((const float*)hidden, (const float*)norm, epsilon, (const float* const*)weights,
                 (const float* const*)biases, cosines, sines, positions, (float* const*)out, B, D, heads, W,
                 threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// The rest of the layer.
int emo_decode(int is_bf16, const EmoAttention* attention, const EmoDecoding* decoding, int threads) try {
  (is_bf16 ? decode<bf16> : decode<float>)(*attention, *decoding, threads);
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

void emo_rms_norm(int is_bf16, const void* x, const void* weight, void* out, int64_t rows, int64_t width,
                  float epsilon, int threads) {
  threads = useful_threads(rows * width, threads);
  if (is_bf16)
    rms_norm((const bf16*)x, (const bf16*)weight, (bf16*)out, rows, width, epsilon, threads);
  else
    rms_norm((const float*)x, (const float*)weight, (float*)out, rows, width, epsilon, threads);
}

void emo_rotate(int is_bf16, const void* x, const float* cosines, const float* sines, void* out, int64_t rows,
                int64_t heads, int64_t width, int64_t positions, int threads) {
  threads = useful_threads(rows * heads * width, threads);
  if (is_bf16)
    rotate((const bf16*)x, cosines, sines, (bf16*)out, rows, heads, width, positions, threads);
  else
    rotate((const float*)x, cosines, sines, (float*)out, rows, heads, width, positions, threads);
}
}
