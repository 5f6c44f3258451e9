// Everything for each instruction set, and the choice among them at run time.

#include "gemm.h"
#include "rows.h"

#include <cstdlib>
#include <cstring>
#if defined(_OPENMP)
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// Memory that the thread keeps from call to call, in huge pages where the system has them.
struct Room {
  void *at = nullptr;
  size_t bytes = 0;
  ~Room() { free(at); }
};

void use_huge_pages(void *memory, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
}

// 64-byte aligned; null if there is none. The same memory at every call from one thread.
float *room_of(size_t bytes) {
  static thread_local Room room;
  if (room.bytes < bytes) {
    const size_t huge = 2 << 20;
    free(room.at);
    room.bytes = (bytes + huge - 1) / huge * huge;
    if (posix_memalign(&room.at, huge, room.bytes)) room.at = nullptr, room.bytes = 0;
    if (room.at) use_huge_pages(room.at, room.bytes);
  }
  return static_cast<float *>(room.at);
}

}  // namespace

namespace baseline {
#define LANES 4
#include "vector.h"
#include "rows_isa.h"
#include "gemm_isa.h"
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
#include "vector.h"
#include "rows_isa.h"
#include "gemm_isa.h"
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
#include "vector.h"
#include "rows_isa.h"
#include "gemm_isa.h"
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
  int (*gemm)(int64_t, int64_t, int64_t, const fastrl_matrix *, const fastrl_matrix *, float *, int64_t, int, int);
};

const Isa BASELINE = {"baseline", baseline::fold_any, baseline::dlogits_any, baseline::gemm_any};
#if defined(FASTRL_X86)
const Isa AVX2 = {"avx2", avx2::fold_any, avx2::dlogits_any, avx2::gemm_any};
const Isa AVX512 = {"avx512", avx512::fold_any, avx512::dlogits_any, avx512::gemm_any};
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

int fastrl_gemm(int64_t m, int64_t n, int64_t k, const fastrl_matrix *a, const fastrl_matrix *b, float *c,
                int64_t stride, int add, int threads) {
  return current->gemm(m, n, k, a, b, c, stride, add, threads);
}

const char *fastrl_vendor() {
  static char name[13] = "";
#if defined(__x86_64__)
  unsigned int highest, words[3];
  if (__get_cpuid(0, &highest, &words[0], &words[2], &words[1])) memcpy(name, words, 12);
#endif
  return name;
}

const char *fastrl_isa() { return current->name; }

int fastrl_use_isa(const char *name) {
  const Isa *isa = find(name);
  if (!isa) return -1;
  current = isa;
  return 0;
}

int fastrl_abi() { return 2; }
}
