// fp32 matrix products on the CPU: plain C interface.
//
// Every element of c is one sum over k, term after term (with fused multiply-adds where the machine has them), cut at
// places that k alone decides: its bits do not depend on m, on n, on where it stands or on the number of threads.
#pragma once
#include <cstdint>

extern "C" {

// Element (i, j) is at[i * row + j * column].
struct fastrl_matrix {
  const float *at;
  int64_t row, column;
};

// c [m, n], row stride `stride`, = a [m, k] b [k, n], or += with `add`. c overlaps neither. 0, or -1 if memory ran out.
int fastrl_gemm(int64_t m, int64_t n, int64_t k, const fastrl_matrix *a, const fastrl_matrix *b, float *c,
                int64_t stride, int add, int threads);

// "AuthenticAMD", "GenuineIntel", ... or "" where it is not known.
const char *fastrl_vendor();
}
