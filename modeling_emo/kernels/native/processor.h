// What the processor can run, and the operating system under it: of wider registers it must save all.
#pragma once

#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

enum Feature { AVX2 = 1, AVX512 = 2, BF16 = 4, AMX = 8 };

// Linux lets a process use tiles once it has asked.
inline bool ask_for_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
#else
  return false;
#endif
}

inline int processor_features() {
  int found = 0;
#if defined(__x86_64__)
  struct Leaf {
    unsigned a = 0, b = 0, c = 0, d = 0;  // zeros where there is no such leaf
    Leaf(unsigned number, unsigned part) { __get_cpuid_count(number, part, &a, &b, &c, &d); }
  };
  const auto has = [](unsigned word, std::initializer_list<int> bits) {
    for (const int bit : bits)
      if (!(word >> bit & 1)) return false;
    return true;
  };
  const Leaf basic(1, 0), more(7, 0), most(7, 1), amd(0x80000001, 0);
  if (!has(basic.c, {27 /* OSXSAVE */})) return 0;
  uint32_t saved, upper;
  asm volatile("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  const bool saves_ymm = has(saved, {1, 2}), saves_tiles = has(saved, {17, 18});
#if defined(__APPLE__)
  const bool saves_zmm = saves_ymm;  // macOS begins to at their first use
#else
  const bool saves_zmm = saves_ymm && has(saved, {5, 6, 7});
#endif
  // SSE3, SSSE3, FMA, CMPXCHG16B, SSE4.1, SSE4.2, MOVBE, POPCNT, AVX, F16C; BMI, AVX2, BMI2; LAHF, LZCNT
  if (saves_ymm && has(basic.c, {0, 9, 12, 13, 19, 20, 22, 23, 28, 29}) && has(more.b, {3, 5, 8}) &&
      has(amd.c, {0, 5}))
    found |= AVX2;
  // F, DQ, CD, BW, VL
  if (found & AVX2 && saves_zmm && has(more.b, {16, 17, 28, 30, 31})) found |= AVX512;
  if (found & AVX512 && has(more.c, {11 /* VNNI */}) && has(most.a, {5})) found |= BF16;
  // AMX-BF16, AMX-TILE
  if (found & BF16 && saves_tiles && has(more.d, {22, 24}) && ask_for_tiles()) found |= AMX;
#endif
  return found;
}

}  // namespace
