// A layer of experts for one token of each sequence: what comes before its keys and values are kept in a
// cache, and what comes after. Each step rounds to the type of the numbers where PyTorch's layers do.
#pragma once

#include <cmath>
#include <limits>

#include "elementwise.h"
#include "experts.h"
#include "linear.h"

namespace {

// Several products of the same rows, dealt out together: threads wait for each other once.
template <class T>
void linears(const std::vector<Linear<T>>& jobs, int threads) {
#if defined(EMO_AMX)
  if constexpr (sizeof(T) == 2)
    if (jobs[0].rows > 5 && jobs[0].in % 32 == 0 && amx_allowed()) {
      for (const auto& job : jobs) job.tiles(threads);
      return;
    }
#endif
  std::vector<std::pair<const Linear<T>*, index_t>> parts;
  for (const auto& job : jobs)
    for (index_t from = 0; from < job.outs; from += Linear<T>::OUTS) parts.push_back({&job, from});
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (size_t i = 0; i < parts.size(); ++i) parts[i].first->part(parts[i].second);
}

}  // namespace

extern "C" {

// One query of each sequence over its keys and values, whose numbers of a head lie side by side. Strides
// count numbers.
struct EmoAttention {
  const void *query, *keys, *values;  // (B, H, W), (B, G, N, W)
  const uint8_t* mask;                // (B, N), 0 where it does not look; or null
  int64_t B, H, G, N, W;
  int64_t key_strides[3], value_strides[3], mask_strides[2];
  float scaling;
};

struct EmoDecoding {
  const void *hidden, *norm, *output, *output_bias;  // (B, D), (D), (D, H W), (D) or null
  const void *attended;                              // (B, H W), or null: computed here
  const void *router, *gate_up, *down;               // (E, D), (E, 2F, D), (E, D, F)
  const uint8_t* allowed;                            // (B, E), 0 for experts not to take; or null
  void* out;                                         // (B, D)
  int64_t allowed_stride, E, D, F, shared, top_k;
  int32_t normalise;  // whether the weights of a token's experts add up to 1
  float epsilon;
};
}

namespace {

template <class T>
void attend(const EmoAttention& a, T* out, int threads) {
  constexpr index_t BLOCK = 8 * LANES;  // sums kept in registers
  const index_t each = a.H / a.G;
  Buffer<float> all_scores(threads * a.N);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (index_t i = 0; i < a.B * a.H; ++i) {
    const index_t b = i / a.H, group = i % a.H / each;
    const T* query = (const T*)a.query + i * a.W;
    const T* keys = (const T*)a.keys + b * a.key_strides[0] + group * a.key_strides[1];
    const T* values = (const T*)a.values + b * a.value_strides[0] + group * a.value_strides[1];
    const uint8_t* mask = a.mask ? a.mask + b * a.mask_strides[0] : nullptr;
    float* scores = all_scores.p + omp_get_thread_num() * a.N;
    float largest = -std::numeric_limits<float>::infinity();
    for (index_t n = 0; n < a.N; ++n) {
      if (mask && !mask[n * a.mask_strides[1]]) {
        scores[n] = -std::numeric_limits<float>::infinity();
        continue;
      }
      const T* key = keys + n * a.key_strides[2];
      vec products = {};
      index_t w = 0;
      for (; w + LANES <= a.W; w += LANES) products += load(query + w) * load(key + w);
      float score = sum<LANES>(products);
      for (; w < a.W; ++w) score += to_float(query[w]) * to_float(key[w]);
      scores[n] = score * a.scaling;
      largest = std::max(largest, scores[n]);
    }
    float total = 0;
    for (index_t n = 0; n < a.N; ++n) {
      const bool is_seen = !mask || mask[n * a.mask_strides[1]];
      total += scores[n] = is_seen ? std::exp(scores[n] - largest) : 0.0f;
    }
    const float scale = total == 0 ? 0.0f : 1 / total;  // a query that sees nothing gets nothing
    T* to = out + i * a.W;
    for (index_t w = 0; w < a.W; w += BLOCK) {
      const index_t count = std::min(BLOCK, a.W - w), whole = count / LANES;
      vec sums[8] = {};
      float rest[LANES] = {};
      for (index_t n = 0; n < a.N; ++n) {
        if (scores[n] == 0) continue;
        const T* value = values + n * a.value_strides[2] + w;
        for (index_t v = 0; v < whole; ++v) sums[v] += load(value + v * LANES) * scores[n];
        for (index_t v = whole * LANES; v < count; ++v)
          rest[v - whole * LANES] += to_float(value[v]) * scores[n];
      }
      for (index_t v = 0; v < whole; ++v) put(to + w + v * LANES, sums[v] * scale);
      for (index_t v = whole * LANES; v < count; ++v) store(to + w + v, rest[v - whole * LANES] * scale);
    }
  }
}

// PyTorch's order of a choice: numbers that are none are the largest.
inline bool is_larger(float a, float b) { return a > b || (a != a && b == b); }

// The routed experts with the largest probabilities, and all shared ones with theirs.
template <class T>
void route(const EmoDecoding& d, const T* logits, const uint8_t* allowed, float* weights, index_t* index) {
  const index_t routed = d.E - d.shared;
  std::vector<float> probabilities(d.E);
  const auto softmax = [&](index_t from, index_t to) {
    float largest = -std::numeric_limits<float>::infinity(), total = 0;
    for (index_t e = from; e < to; ++e) {
      const bool takes = !allowed || allowed[e];
      probabilities[e] = takes ? to_float(logits[e]) : -std::numeric_limits<float>::infinity();
      if (is_larger(probabilities[e], largest)) largest = probabilities[e];
    }
    for (index_t e = from; e < to; ++e) total += probabilities[e] = std::exp(probabilities[e] - largest);
    for (index_t e = from; e < to; ++e) probabilities[e] /= total;
  };
  softmax(0, routed), softmax(routed, d.E);
  std::vector<char> taken(d.E);
  float total = 0;
  for (index_t k = 0; k < d.top_k; ++k) {
    index_t best = routed + k - (d.top_k - d.shared);  // a shared one
    if (k < d.top_k - d.shared) {
      best = -1;
      for (index_t e = 0; e < routed; ++e)
        if (!taken[e] && (best < 0 || is_larger(probabilities[e], probabilities[best]))) best = e;
    }
    taken[best] = 1;
    index[k] = best, weights[k] = probabilities[best];
    total += weights[k];
  }
  for (index_t k = 0; k < d.top_k; ++k) {
    T rounded;
    store(&rounded, d.normalise ? weights[k] / total : weights[k]);
    weights[k] = to_float(rounded);
  }
}

// sums = first + second, each rounded; sums may be one of them.
template <class T>
void add(const T* first, const T* second, index_t count, T* sums) {
  index_t i = 0;
  for (; i + LANES <= count; i += LANES) put(sums + i, load(first + i) + load(second + i));
  for (; i < count; ++i) store(sums + i, to_float(first[i]) + to_float(second[i]));
}

// The norm of the hidden states (B, D), and queries, keys and values of it, the first two rotated.
template <class T>
void decode_heads(const T* hidden, const T* norm, float epsilon, const T* const* weights,
                  const T* const* biases, const float* cosines, const float* sines, index_t positions,
                  T* const* out, index_t B, index_t D, const index_t* heads, index_t W, int threads) {
  Buffer<T> normed(B * D), straight[2] = {Buffer<T>(B * heads[0] * W), Buffer<T>(B * heads[1] * W)};
  rms_norm(hidden, norm, normed.p, B, D, epsilon, 1);
  std::vector<Linear<T>> jobs;
  for (int i = 0; i < 3; ++i)
    jobs.push_back({normed.p, weights[i], biases[i], i < 2 ? straight[i].p : out[i], B, D, heads[i] * W});
  linears(jobs, threads);
  for (int i = 0; i < 2; ++i)
    rotate(straight[i].p, cosines, sines, out[i], B, heads[i], W, positions, 1);
}

}  // namespace
