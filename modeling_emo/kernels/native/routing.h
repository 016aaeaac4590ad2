// Which picks are whose, and how work is cut into parts.
#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

struct Shape {
  index_t T, K, E, D, F;
};

// Which picks are whose: sorted by expert, in the order of tokens within one.
struct Routing {
  struct Expert {
    index_t id, begin, end;
  };
  std::vector<Expert> experts;       // those hit
  std::vector<index_t> pick, token;  // of each place in the order of experts
  index_t padded = 0;                // rows if every expert's were filled up to whole tiles

  Routing(const index_t* index, const Shape& s) {
    std::vector<index_t> place(s.E + 1, 0);
    const index_t picks = s.T * s.K;
    for (index_t p = 0; p < picks; ++p)
      if (here(index[p], s)) ++place[index[p] + 1];
    for (index_t e = 0; e < s.E; ++e) {
      if (place[e + 1]) experts.push_back({e, place[e], place[e] + place[e + 1]});
      padded += (place[e + 1] + 15) / 16 * 16;
      place[e + 1] += place[e];
    }
    pick.resize(place[s.E]), token.resize(place[s.E]);
    for (index_t p = 0; p < picks; ++p)
      if (here(index[p], s)) {
        const index_t to = place[index[p]]++;
        pick[to] = p, token[to] = p / s.K;
      }
  }
  bool is_hit(index_t e) const {
    const auto at = std::lower_bound(experts.begin(), experts.end(), e,
                                     [](const Expert& expert, index_t id) { return expert.id < id; });
    return at != experts.end() && at->id == e;
  }
  // Under expert parallelism the id E stands for experts elsewhere.
  static bool here(index_t e, const Shape& s) { return 0 <= e && e < s.E; }
};

struct Part {
  const Routing::Expert* expert;
  index_t rows, first_row, from, to;  // first_row: in the buffer of activations
};

// The outputs of every expert hit, cut into parts of `block`; the experts' rows are filled up to `fill`.
std::vector<Part> cut(const Routing& routing, index_t outs, index_t block, index_t fill) {
  std::vector<Part> parts;
  index_t row = 0;
  for (const auto& expert : routing.experts) {
    const index_t rows = expert.end - expert.begin;
    for (index_t from = 0; from < outs; from += block)
      parts.push_back({&expert, rows, row, from, std::min(outs, from + block)});
    row += (rows + fill - 1) / fill * fill;
  }
  return parts;
}

// Columns [from, to) of a result (tokens, stride), which `add(to, sums)` adds to sums[token][to - from].
template <class T, class Add>
void add_columns(const Shape& s, index_t from, index_t to, float* sums, T* result, Add add) {
  const index_t width = to - from;
  std::fill(sums, sums + s.T * width, 0.0f);
  add(to, sums);
  for (index_t t = 0; t < s.T; ++t) copy_back(sums + t * width, width, result + t * s.D + from);
}

}  // namespace
