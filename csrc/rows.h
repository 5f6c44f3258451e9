// The row work of the LM head on the CPU: plain C interface, no torch headers.
//
// Logits lie transposed: a tile [rows = words, columns = tokens] of raw logits h.W + b, fp32, unit stride over the tokens.
// One SIMD lane is one token, so nothing is ever reduced across lanes and a token's bits depend on its own column alone.
#pragma once
#include <cstdint>

extern "C" {

// z = softcap * tanh(logit_scale * (raw + bias) / softcap) / temperature; softcap = 0 means none.
struct fastrl_head {
  float logit_scale;
  float softcap;
  float temperature;        // of all tokens, where `temperatures` is null
  const float *temperatures;  // [columns] or null
  const float *bias;          // [rows] of this tile, or null
};

struct fastrl_tile {
  const float *raw;  // [rows, columns], row stride `stride` floats; readable up to the next multiple of 16 columns
  int64_t rows, columns, stride;
  int64_t first_word;      // the tile's first row is this word of the vocabulary
  const int64_t *targets;  // [columns]
};

// The running softmax statistics of each token, relative to `top`, the largest logit so far; each [columns]:
//   count    how many logits equal top          rest     sum of exp(z - top) over all others
//   weighted sum of exp(z - top) (top - z)      squares  sum of exp(z - top)^2 over the others
//   first    the lowest word that holds top     at_target  the target's logit
struct fastrl_state {
  float *top, *count, *rest, *weighted, *squares, *at_target;
  int32_t *first;
};

// dL/d(raw) = exp(z - top) (rise - fall (z - top)) off the target and at_target on it, times the slope of the softcap.
struct fastrl_law {
  const float *top, *rise, *fall, *at_target;  // [columns of out]; fall may be null
  const int64_t *keep;                         // [columns of out] column of `raw` of each, ascending, or null: all
  int64_t columns;
};

enum { FASTRL_ENTROPY = 1, FASTRL_EXTRA = 2 };  // weighted; squares and first

// Folds one tile into the state. Tiles come in ascending order of first_word. 0, or -1 if memory ran out.
int fastrl_fold(const fastrl_head *, const fastrl_tile *, fastrl_state *, int outputs, int threads);

// Writes dL/d(raw) of a tile to out [rows, law->columns], row stride `stride_out`; without `keep`, out may be raw.
// 0, or -1 if memory ran out.
int fastrl_dlogits(const fastrl_head *, const fastrl_tile *, const fastrl_law *, float *out, int64_t stride_out,
                   int threads);

// "avx512", "avx2" or "baseline": the instruction set that the calls above use on this machine.
const char *fastrl_isa();
// Uses another one (for tests): 0, or -1 where this machine lacks it.
int fastrl_use_isa(const char *name);
int fastrl_abi();
}
