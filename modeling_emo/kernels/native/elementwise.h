// What lies between the products of a layer: the norm, and rotary position embeddings. One pass over memory
// each.
#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

// out[row] = weight * x[row] / sqrt(mean(x[row]^2) + epsilon)
template <class T>
void rms_norm(const T* x, const T* weight, T* out, index_t rows, index_t width, float epsilon, int threads) {
#pragma omp parallel for num_threads(threads)
  for (index_t r = 0; r < rows; ++r) {
    const T* from = x + r * width;
    T* to = out + r * width;
    vec squares = {};
    index_t i = 0;
    for (; i + LANES <= width; i += LANES) squares += load(from + i) * load(from + i);
    float total = sum<LANES>(squares);
    for (; i < width; ++i) total += to_float(from[i]) * to_float(from[i]);
    const float scale = 1.0f / std::sqrt(total / width + epsilon);
    for (i = 0; i + LANES <= width; i += LANES) put(to + i, load(weight + i) * (load(from + i) * scale));
    for (; i < width; ++i) store(to + i, to_float(weight[i]) * (to_float(from[i]) * scale));
  }
}

// The halves (a, b) of each head become (a cos - b sin, b cos + a sin), with the cosines and sines of its
// position: x (rows, heads, width), cosines and sines (positions, width), of row r those of r % positions.
template <class T>
void rotate(const T* x, const float* cosines, const float* sines, T* out, index_t rows, index_t heads,
            index_t width, index_t positions, int threads) {
  const index_t half = width / 2;
#pragma omp parallel for num_threads(threads)
  for (index_t r = 0; r < rows; ++r) {
    const float *cosine = cosines + r % positions * width, *sine = sines + r % positions * width;
    for (index_t h = 0; h < heads; ++h) {
      const T *a = x + (r * heads + h) * width, *b = a + half;
      T* to = out + (r * heads + h) * width;
      index_t i = 0;
      for (; i + LANES <= half; i += LANES) {
        const vec first = load(a + i), second = load(b + i);
        put(to + i, first * load(cosine + i) - second * load(sine + i));
        put(to + half + i, second * load(cosine + half + i) + first * load(sine + half + i));
      }
      for (; i < half; ++i) {
        const float first = to_float(a[i]), second = to_float(b[i]);
        store(to + i, first * cosine[i] - second * sine[i]);
        store(to + half + i, second * cosine[half + i] + first * sine[half + i]);
      }
    }
  }
}

}  // namespace
