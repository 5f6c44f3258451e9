// The rows for each instruction set, and the choice among them at run time.

#include "rows.h"

#include <cstdlib>
#include <cstring>


namespace baseline {
#define LANES 4
#include "rows_isa.h"
#undef LANES
}  // namespace baseline

#if defined(__x86_64__) && !defined(FASTRL_BASELINE_ONLY)
#define FASTRL_X86 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
namespace avx2 {
#define LANES 8
#include "rows_isa.h"
#undef LANES
}  // namespace avx2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#endif
namespace avx512 {
#define LANES 16
#include "rows_isa.h"
#undef LANES
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace {

struct Isa {
  const char *name;
  int (*fold)(const fastrl_head *, const fastrl_tile *, fastrl_state *, int, int);
  int (*dlogits)(const fastrl_head *, const fastrl_tile *, const fastrl_law *, float *, int64_t, int);
};

const Isa BASELINE = {"baseline", baseline::fold_any, baseline::dlogits_any};
#if defined(FASTRL_X86)
const Isa AVX2 = {"avx2", avx2::fold_any, avx2::dlogits_any};
const Isa AVX512 = {"avx512", avx512::fold_any, avx512::dlogits_any};
#endif

const Isa *find(const char *name) {
#if defined(FASTRL_X86)
  __builtin_cpu_init();
  bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (!name || !strcmp(name, "avx512"))) return &AVX512;
  if (has_avx2 && (!name || !strcmp(name, "avx2"))) return &AVX2;
#endif
  return !name || !strcmp(name, "baseline") ? &BASELINE : nullptr;
}

const Isa *current = find(nullptr);

}  // namespace

extern "C" {

int fastrl_fold(const fastrl_head *head, const fastrl_tile *tile, fastrl_state *state, int outputs, int threads) {
  return current->fold(head, tile, state, outputs, threads);
}

int fastrl_dlogits(const fastrl_head *head, const fastrl_tile *tile, const fastrl_law *law, float *out,
                    int64_t stride_out, int threads) {
  return current->dlogits(head, tile, law, out, stride_out, threads);
}

const char *fastrl_isa() { return current->name; }

int fastrl_use_isa(const char *name) {
  const Isa *isa = find(name);
  if (!isa) return -1;
  current = isa;
  return 0;
}

int fastrl_abi() { return 1; }
}
