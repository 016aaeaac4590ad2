// Runs a library of compiled kernels without Python: for processors that an emulator stands in for.
//
//     native_driver LIBRARY
//
// The cases are those of `test_native_library.py` and `test_packed_products.py`; expected numbers are computed here, in double. Prints what is
// wrong, and how many cases there were; ends with 1 if anything is.

#include <dlfcn.h>
#include <omp.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

namespace {

using index_t = int64_t;
using doubles = std::vector<double>;
using floats = std::vector<float>;

struct Library {
  int (*experts)(int, const void*, const void*, const void*, const float*, const int64_t*, void*, void*, int64_t,
                 int64_t, int64_t, int64_t, int64_t, int, int);
  int (*linear)(int, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int);
  void (*rms_norm)(int, const void*, const void*, void*, int64_t, int64_t, float, int);
  void (*rotate)(int, const void*, const float*, const float*, void*, int64_t, int64_t, int64_t, int64_t, int);
  int (*packed_linear)(int, const void*, const void*, const void*, const void*, const void*, void*, int64_t, int64_t,
                       int64_t, int64_t, int, int, int, int);
  int (*packed_experts)(int, const void*, const void*, const void*, const void*, const void*, const void*,
                        const void*, const float*, const int64_t*, void*, int64_t, int64_t, int64_t, int64_t,
                        int64_t, int64_t, int64_t, int, int, int, int);
  void (*unpack)(int, const void*, const void*, const void*, void*, int64_t, int64_t, int64_t, int, int, int);
  int (*has_bytes)(int);
  const char* (*fingerprint)();
  int (*processor_features)();

  explicit Library(const char* path) {
    void* handle = dlopen(path, RTLD_NOW);
    if (!handle) {
      fprintf(stderr, "%s\n", dlerror());
      exit(2);
    }
    find(handle, "emo_experts", &experts), find(handle, "emo_linear", &linear);
    find(handle, "emo_rms_norm", &rms_norm), find(handle, "emo_rotate", &rotate);
    find(handle, "emo_packed_linear", &packed_linear), find(handle, "emo_packed_experts", &packed_experts);
    find(handle, "emo_unpack", &unpack), find(handle, "emo_has_bytes", &has_bytes);
    find(handle, "emo_fingerprint", &fingerprint);
    find(handle, "emo_processor_features", &processor_features);
  }
  template <class F>
  static void find(void* handle, const char* name, F* function) {
    *function = (F)dlsym(handle, name);
    if (!*function) {
      fprintf(stderr, "The library has no %s.\n", name);
      exit(2);
    }
  }
};

// ---- numbers of either type -----------------------------------------------------------------------------

uint16_t to_bf16(float x) {  // to the nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return x == x ? uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : uint16_t(0x7fc0);
}
float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Numbers as the library takes them, and as what they then are.
struct Numbers {
  bool is_bf16;
  floats wide;
  std::vector<uint16_t> narrow;

  Numbers(bool is_bf16, floats values) : is_bf16(is_bf16), wide(std::move(values)) {
    if (!is_bf16) return;
    for (float& x : wide) narrow.push_back(to_bf16(x)), x = from_bf16(narrow.back());
  }
  Numbers(bool is_bf16, size_t count) : Numbers(is_bf16, floats(count)) {}
  void* data() { return is_bf16 ? (void*)narrow.data() : (void*)wide.data(); }
  size_t bytes() const { return wide.size() * (is_bf16 ? 2 : 4); }
  const floats& values() {  // after the library wrote them
    for (size_t i = 0; i < narrow.size(); ++i) wide[i] = from_bf16(narrow[i]);
    return wide;
  }
};

std::mt19937 generator;
floats random(size_t count, float scale = 1) {
  std::normal_distribution<float> normal(0, scale);
  floats found(count);
  for (float& x : found) x = normal(generator);
  return found;
}
index_t any(index_t from, index_t to) { return std::uniform_int_distribution<index_t>(from, to)(generator); }
index_t one_of(const std::vector<index_t>& values) { return values[any(0, index_t(values.size()) - 1)]; }

// ---- what is checked --------------------------------------------------------------------------------------

int cases = 0, wrong = 0;

void expect(bool is_so, const std::string& what) {
  ++cases;
  if (is_so) return;
  ++wrong;
  printf("wrong: %s\n", what.c_str());
}

// Of the largest number, or of the longest vector of terms, whose sum may be small by chance.
void expect_near(const floats& found, const doubles& expected, const doubles& squares, bool is_bf16,
                 const std::string& what) {
  const double tolerance = is_bf16 ? 1.2e-2 : 4e-6;
  double scale = 1e-3, off = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    scale = std::max({scale, std::abs(expected[i]), std::sqrt(squares[i])});
    const double difference = std::abs(found[i] - expected[i]);
    off = difference == difference ? std::max(off, difference) : INFINITY;
  }
  expect(off <= tolerance * scale, what + ": off by " + std::to_string(off / scale) + " of the largest");
}

double silu(double x) { return x / (1 + std::exp(-x)); }

struct Call {
  index_t T, K, E, D, F;
  bool is_bf16;

  std::string name() const {
    return std::string(is_bf16 ? "bfloat16" : "float32") + " experts of " + std::to_string(T) + " tokens, " +
           std::to_string(K) + " of " + std::to_string(E) + ", sizes " + std::to_string(D) + " and " +
           std::to_string(F);
  }
};

void check_experts(const Library& library, const Call& c) {
  const index_t T = c.T, K = c.K, E = c.E, D = c.D, F = c.F;
  const bool is_bf16 = c.is_bf16;
  Numbers x(is_bf16, random(T * D)), gate_up(is_bf16, random(E * 2 * F * D, 1 / std::sqrt(float(D))));
  Numbers down(is_bf16, random(E * D * F, 1 / std::sqrt(float(F))));
  std::vector<int64_t> index, ids;
  floats weights;
  for (index_t e = -1; e <= E; ++e) ids.push_back(e);  // the first and the last are no experts: of other ranks
  for (index_t t = 0; t < T; ++t) {
    std::shuffle(ids.begin(), ids.end(), generator);
    for (index_t k = 0; k < K; ++k) index.push_back(ids[k]), weights.push_back(any(0, 1000) / 1000.0f);
  }
  doubles out(T * D), squares(T * D), saved, saved_squares;
  for (index_t e = 0; e < E; ++e)
    for (index_t p = 0; p < T * K; ++p) {
      if (index[p] != e) continue;
      const float* token = &x.wide[p / K * D];
      const size_t first = saved.size();
      for (index_t f = 0; f < 2 * F; ++f) {
        double sum = 0, square = 0;
        for (index_t d = 0; d < D; ++d) {
          const double term = double(token[d]) * gate_up.wide[(e * 2 * F + f) * D + d];
          sum += term, square += term * term;
        }
        saved.push_back(sum), saved_squares.push_back(square);
      }
      for (index_t d = 0; d < D; ++d) {
        double sum = 0, square = 0;
        for (index_t f = 0; f < F; ++f) {
          const double term = silu(saved[first + f]) * saved[first + F + f] * down.wide[(e * D + d) * F + f];
          sum += term, square += term * term;
        }
        out[p / K * D + d] += weights[p] * sum;
        squares[p / K * D + d] += weights[p] * weights[p] * square;
      }
    }
  Numbers found(is_bf16, T * D), kept(is_bf16, T * K * 2 * F), again(is_bf16, T * D);
  const auto run = [&](Numbers& to, void* keep, int threads) {
    return library.experts(is_bf16, x.data(), gate_up.data(), down.data(), weights.data(), index.data(), to.data(),
                           keep, T, K, E, D, F, threads, 1);
  };
  expect(run(found, kept.data(), 2) == 0, c.name() + ": no memory");
  expect_near(found.values(), out, squares, is_bf16, c.name());
  expect_near(kept.values(), saved, saved_squares, is_bf16, c.name() + ", gate and up");
  for (const int threads : {1, 2, 3}) {
    run(again, nullptr, threads);
    expect(!memcmp(again.data(), found.data(), found.bytes()), c.name() + ": other bits with other threads");
  }
}

doubles linear_in_double(const Numbers& x, const Numbers& weight, const Numbers* bias, index_t rows, index_t in,
                         index_t outs, doubles* squares) {
  doubles expected;
  for (index_t m = 0; m < rows; ++m)
    for (index_t n = 0; n < outs; ++n) {
      double sum = bias ? bias->wide[n] : 0, square = 0;
      for (index_t k = 0; k < in; ++k) {
        const double term = double(x.wide[m * in + k]) * weight.wide[n * in + k];
        sum += term, square += term * term;
      }
      expected.push_back(sum), squares->push_back(square);
    }
  return expected;
}

void check_linear(const Library& library, bool is_bf16, index_t rows, index_t in, index_t outs, bool has_bias) {
  Numbers x(is_bf16, random(rows * in)), weight(is_bf16, random(outs * in)), bias(is_bf16, random(outs));
  Numbers found(is_bf16, rows * outs);
  doubles squares;
  const doubles expected = linear_in_double(x, weight, has_bias ? &bias : nullptr, rows, in, outs, &squares);
  const std::string name = std::string(is_bf16 ? "bfloat16" : "float32") + " linear, " + std::to_string(rows) +
                           " rows, " + std::to_string(in) + " to " + std::to_string(outs) +
                           (has_bias ? " with bias" : "");
  const int failed = library.linear(is_bf16, x.data(), weight.data(), has_bias ? bias.data() : nullptr,
                                    found.data(), rows, in, outs, 2);
  expect(failed == 0, name + ": no memory");
  expect_near(found.values(), expected, squares, is_bf16, name);
}

// ---- weights in few bits ------------------------------------------------------------------------------------

enum Zeros { NONE, ANY, LEAST, MOST };

// How a product with weights in few bits is called.
struct Kind {
  int bits;
  index_t group;
  Zeros zeros;
  bool is_bf16, bf16_scales, may_round;

  std::string name() const {
    const char* zero_points[] = {"no zero points", "zero points", "least zero points", "most zero points"};
    return std::to_string(bits) + " bits by " + std::to_string(group) + ", " + zero_points[zeros] +
           (is_bf16 ? ", bfloat16" : ", float32") + (bf16_scales ? ", scales in bfloat16" : "") +
           (may_round ? ", rounded" : "");
  }
};

struct Packed {
  Kind kind;
  index_t outs, in;
  std::vector<uint8_t> numbers, zeros;
  Numbers scales;
  doubles values;

  Packed(const Kind& kind, index_t outs, index_t in, float scale)
      : kind(kind), outs(outs), in(in), scales(kind.bf16_scales, floats()) {
    const int most = (1 << kind.bits) - 1;
    const index_t groups = in / kind.group;
    for (index_t i = 0; i < outs * in * kind.bits / 8; ++i) numbers.push_back(uint8_t(any(0, 255)));
    floats some;
    for (index_t i = 0; i < outs * groups; ++i) {
      some.push_back(scale * std::exp2(any(-100, 100) / 100.0f));
      zeros.push_back(uint8_t(kind.zeros == LEAST ? 0 : kind.zeros == MOST ? most : any(0, most)));
    }
    scales = Numbers(kind.bf16_scales, some);
    for (index_t n = 0; n < outs; ++n)
      for (index_t k = 0; k < in; ++k) {
        const index_t at = n * in + k, g = n * groups + k / kind.group;
        const int number = kind.bits == 8 ? numbers[at] : numbers[at / 2] >> at % 2 * 4 & 15;
        values.push_back(double(number - (kind.zeros == NONE ? most / 2 + 1 : zeros[g])) * scales.wide[g]);
      }
  }
  const void* zero_points() const { return kind.zeros == NONE ? nullptr : zeros.data(); }
};

// What is multiplied: activations as they are, or each 32 as whole numbers of 8 bits and a scale.
doubles multiplied(const Library& library, const Kind& kind, const floats& x) {
  doubles found(x.begin(), x.end());
  if (!kind.is_bf16 || !kind.may_round || !library.has_bytes(kind.bits)) return found;
  for (size_t first = 0; first < x.size(); first += 32) {
    float most = 0;
    for (size_t i = first; i < first + 32; ++i) most = std::max(most, std::abs(x[i]));
    const float unit = std::max(most, 0x1p-110f) / 127, inverse = 1 / unit;
    for (size_t i = first; i < first + 32; ++i) found[i] = std::nearbyint(double(x[i]) * inverse) * unit;
  }
  return found;
}

// Adds a product of a row with rows [first, first + outs) of weights, and its squared terms.
void add_product(const double* x, const Packed& weight, index_t first, index_t outs, double* sums, double* squares) {
  for (index_t n = 0; n < outs; ++n)
    for (index_t k = 0; k < weight.in; ++k) {
      const double term = x[k] * weight.values[(first + n) * weight.in + k];
      sums[n] += term, squares[n] += term * term;
    }
}

void check_packed_linear(const Library& library, const Kind& kind, index_t rows, index_t in, index_t outs,
                         bool has_bias) {
  Numbers x(kind.is_bf16, random(rows * in)), bias(kind.is_bf16, random(outs));
  const Packed weight(kind, outs, in, 1 / std::sqrt(float(in)) / (1 << (kind.bits - 2)));
  Numbers scales = weight.scales, found(kind.is_bf16, rows * outs), again(kind.is_bf16, rows * outs);
  const std::string name = kind.name() + ", linear, " + std::to_string(rows) + " rows, " + std::to_string(in) +
                           " to " + std::to_string(outs);
  const doubles used = multiplied(library, kind, x.wide);
  doubles expected(rows * outs), squares(rows * outs);
  for (index_t m = 0; m < rows; ++m) {
    for (index_t n = 0; n < outs; ++n) expected[m * outs + n] = has_bias ? bias.wide[n] : 0;
    add_product(&used[m * in], weight, 0, outs, &expected[m * outs], &squares[m * outs]);
  }
  for (const int threads : {2, 1, 3}) {
    Numbers& to = threads == 2 ? found : again;
    const int failed = library.packed_linear(
        kind.is_bf16, x.data(), weight.numbers.data(), scales.data(), weight.zero_points(),
        has_bias ? bias.data() : nullptr, to.data(), rows, in, outs, kind.group, kind.bits, kind.bf16_scales,
        kind.may_round, threads);
    expect(failed == 0, name + ": no memory");
    expect(threads == 2 || !memcmp(to.data(), found.data(), found.bytes()), name + ": other bits with other threads");
  }
  expect_near(found.values(), expected, squares, kind.is_bf16, name);

  Numbers numbers(kind.is_bf16, outs * in);
  library.unpack(kind.is_bf16, weight.numbers.data(), scales.data(), weight.zero_points(), numbers.data(), outs, in,
                 kind.group, kind.bits, kind.bf16_scales, 2);
  const Numbers rounded(kind.is_bf16, floats(weight.values.begin(), weight.values.end()));
  expect(numbers.values() == rounded.wide, name + ": unpacked to other numbers");
}

void check_packed_experts(const Library& library, const Kind& kind, index_t T, index_t K, index_t E, index_t D,
                          index_t F) {
  Numbers x(kind.is_bf16, random(T * D)), found(kind.is_bf16, T * D);
  const int most = 1 << (kind.bits - 2);
  const Packed gate_up(kind, E * 2 * F, D, 1 / std::sqrt(float(D)) / most), down(kind, E * D, F, 1 / std::sqrt(float(F)) / most);
  Numbers first_scales = gate_up.scales, second_scales = down.scales;
  std::vector<int64_t> index, ids;
  floats weights;
  for (index_t e = 0; e <= E; ++e) ids.push_back(e);  // the last is no expert: of another rank
  for (index_t t = 0; t < T; ++t) {
    std::shuffle(ids.begin(), ids.end(), generator);
    for (index_t k = 0; k < K; ++k) index.push_back(ids[k]), weights.push_back(any(0, 1000) / 1000.0f);
  }
  const doubles used = multiplied(library, kind, x.wide);
  doubles out(T * D), squares(T * D);
  for (index_t p = 0; p < T * K; ++p) {
    if (index[p] == E) continue;
    const index_t e = index[p], t = p / K;
    doubles both(2 * F), ignored(2 * F), sums(D), terms(D);
    add_product(&used[t * D], gate_up, e * 2 * F, 2 * F, both.data(), ignored.data());
    floats act(F);
    for (index_t f = 0; f < F; ++f) act[f] = float(silu(both[f]) * both[F + f]);
    const Numbers kept(kind.is_bf16, act);
    add_product(multiplied(library, kind, kept.wide).data(), down, e * D, D, sums.data(), terms.data());
    for (index_t d = 0; d < D; ++d) {
      out[t * D + d] += weights[p] * sums[d];
      // An activation near the middle of two whole numbers may become the other one.
      squares[t * D + d] += weights[p] * weights[p] * terms[d] * (kind.may_round ? 4 : 1);
    }
  }
  const int failed = library.packed_experts(
      kind.is_bf16, x.data(), gate_up.numbers.data(), first_scales.data(), gate_up.zero_points(), down.numbers.data(),
      second_scales.data(), down.zero_points(), weights.data(), index.data(), found.data(), T, K, E, D, F, kind.group,
      kind.group, kind.bits, kind.bf16_scales, kind.may_round, 2);
  const std::string name = kind.name() + ", experts of " + std::to_string(T) + " tokens, " + std::to_string(K) +
                           " of " + std::to_string(E) + ", sizes " + std::to_string(D) + " and " + std::to_string(F);
  expect(failed == 0, name + ": no memory");
  expect_near(found.values(), out, squares, kind.is_bf16, name);
}

void check_packed(const Library& library, int seed) {
  generator.seed(seed);
  const Kind kind{seed % 2 ? 4 : 8, one_of({32, 64, 128}), Zeros(seed / 2 % 4), seed / 8 % 2 == 1, any(0, 1) == 1,
                  any(0, 1) == 1};
  const index_t in = kind.group * one_of({1, 2, 3, 5, 9}), width = kind.group * any(1, 3);
  check_packed_linear(library, kind, one_of({0, 1, 2, 3, 4, 5, 7, 13, 33}), in, any(1, 80), seed % 3 == 0);
  const index_t E = any(1, 5);
  check_packed_experts(library, kind, one_of({0, 1, 2, 7, 20, 50}), any(1, E), E, kind.group * any(1, 3), width);
}

// Weights after a forbidden page, or somewhat later, or before one: the same bits, and nothing else is read.
void check_places(const Library& library, bool is_bf16, index_t rows, index_t in) {
  const index_t outs = 37;
  Numbers x(is_bf16, random(rows * in)), weight(is_bf16, random(outs * in));
  Numbers expected(is_bf16, rows * outs), found(is_bf16, rows * outs);
  library.linear(is_bf16, x.data(), weight.data(), nullptr, expected.data(), rows, in, outs, 1);
  const size_t page = sysconf(_SC_PAGESIZE), size = weight.bytes();
  const size_t middle = (size + 64 + page - 1) / page * page;
  char* block = (char*)mmap(nullptr, middle + 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(block, page, PROT_NONE), mprotect(block + page + middle, page, PROT_NONE);
  std::vector<size_t> starts = {page + middle - size};
  for (size_t start = page; start < page + 64; start += is_bf16 ? 2 : 4) starts.push_back(start);
  for (const size_t start : starts) {
    memcpy(block + start, weight.data(), size);
    library.linear(is_bf16, x.data(), block + start, nullptr, found.data(), rows, in, outs, 1);
    expect(!memcmp(found.data(), expected.data(), found.bytes()),
           "linear of " + std::to_string(in) + " inputs: other bits with weights at " + std::to_string(start));
  }
  munmap(block, middle + 2 * page);
}

void check_between_products(const Library& library, bool is_bf16, index_t rows, index_t heads, index_t half,
                            index_t positions) {
  const index_t head = 2 * half, width = heads * head;
  Numbers x(is_bf16, random(rows * width, 3)), weight(is_bf16, random(width)), found(is_bf16, rows * width);
  doubles expected(rows * width);
  for (index_t m = 0; m < rows; ++m) {
    double total = 0;
    for (index_t i = 0; i < width; ++i) total += double(x.wide[m * width + i]) * x.wide[m * width + i];
    const double scale = 1 / std::sqrt(total / width + 1e-6);
    for (index_t i = 0; i < width; ++i) expected[m * width + i] = weight.wide[i] * (x.wide[m * width + i] * scale);
  }
  const std::string sizes = ", " + std::to_string(rows) + " rows of " + std::to_string(heads) + " heads of " +
                            std::to_string(head) + (is_bf16 ? ", bfloat16" : ", float32");
  library.rms_norm(is_bf16, x.data(), weight.data(), found.data(), rows, width, 1e-6f, 2);
  expect_near(found.values(), expected, doubles(expected.size()), is_bf16, "norm" + sizes);

  const floats cosines = random(positions * head), sines = random(positions * head);
  for (index_t m = 0; m < rows; ++m)
    for (index_t h = 0; h < heads; ++h)
      for (index_t i = 0; i < head; ++i) {
        const index_t at = (m * heads + h) * head, angle = m % positions * head + i;
        const double other = i < half ? -x.wide[at + half + i] : x.wide[at + i - half];
        expected[at + i] = double(x.wide[at + i]) * cosines[angle] + other * sines[angle];
      }
  library.rotate(is_bf16, x.data(), cosines.data(), sines.data(), found.data(), rows, heads, head, positions, 2);
  expect_near(found.values(), expected, doubles(expected.size()), is_bf16, "rotation" + sizes);
}

float one_expert(const Library& library, float gate) {
  const float x = 1, gate_up[2] = {gate, 1}, down = 1, weight = 1;
  const int64_t index = 0;
  float out;
  library.experts(0, &x, gate_up, &down, &weight, &index, &out, nullptr, 1, 1, 1, 1, 1, 1, 1);
  return out;
}

void check_extremes(const Library& library) {
  for (const float gate : {-1e30f, -200.0f, -88.0f, 0.0f, 88.0f, 200.0f, 1e30f}) {
    const double found = one_expert(library, gate), expected = silu(gate);
    expect(std::abs(found - expected) <= 1e-6 + 1e-6 * std::abs(expected), "a gate of " + std::to_string(gate));
  }
  const float least = one_expert(library, -INFINITY);
  expect(least == 0 || least != least, "a gate of minus infinity");
  for (const bool is_bf16 : {false, true}) {
    Numbers x(is_bf16, floats(64, NAN)), gate_up(is_bf16, floats(64 * 64, 1)), down(is_bf16, floats(64 * 32, 1));
    Numbers out(is_bf16, 64);
    const float weight = 1;
    const int64_t index = 0;
    library.experts(is_bf16, x.data(), gate_up.data(), down.data(), &weight, &index, out.data(), nullptr, 1, 1, 1, 64,
                    32, 1, 1);
    for (const float value : out.values()) expect(value != value, "what is not a number stays so");
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 2) {
    fprintf(stderr, "usage: native_driver LIBRARY\n");
    return 2;
  }
  const Library library(words[1]);
  expect(strlen(library.fingerprint()) == 32, "the library does not say which sources it is of");
  const auto width = [] { return any(0, 1) ? any(1, 70) : one_of({32, 64, 96, 160}); };
  for (const bool is_bf16 : {false, true}) {
    for (int seed = 0; seed < 24; ++seed) {  // sizes on both sides of every width: of vectors, tiles and blocks
      generator.seed(seed);
      const index_t E = any(1, 6), T = any(0, 1) ? any(0, 12) : one_of({31, 64, 65, 300});
      const index_t D = T < 32 && !any(0, 2) ? one_of({1024, 1056, 2049}) : width();  // an emulator is slow
      check_experts(library, {T, any(1, E), E, D, width(), is_bf16});
      check_linear(library, is_bf16, one_of({0, 1, 2, 3, 7, 17, 33, 65}),
                   any(0, 1) ? any(1, 80) : one_of({32, 64, 96, 1024, 2049}), any(0, 3) ? any(1, 80) : 200,
                   seed % 2);
      check_between_products(library, is_bf16, any(0, 9), any(1, 4), any(1, 70), any(1, 9));
    }
    check_experts(library, {0, 1, 1, 8, 8, is_bf16});
    check_experts(library, {65, 1, 1, 96, 64, is_bf16});
    for (const auto& [rows, in] : {std::pair<index_t, index_t>{5, 1000}, {5, 993}, {5, 40}, {5, 7}, {11, 993}, {11, 96}})
      check_places(library, is_bf16, rows, in);
  }
  for (int seed = 0; seed < 96; ++seed) check_packed(library, seed);
  check_extremes(library);
  // That OpenMP is asked here lets the library find it in this program.
  printf("%d cases, %d wrong; features of the machine: %d; threads: %d\n", cases, wrong,
         library.processor_features(), omp_get_max_threads());
  return wrong != 0;
}
