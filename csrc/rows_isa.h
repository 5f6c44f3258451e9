// The two loops over a tile, for one instruction set. Included by native.cpp with LANES and its
// namespace set, after vector.h.

// What is done to raw logits: nothing; bias, scale and temperature; and softcap as well.
enum Transform { PLAIN, AFFINE, CAPPED };

static inline Transform transform_of(const fastrl_head &h) {
  if (h.softcap != 0.0f) return CAPPED;
  bool plain = h.logit_scale == 1.0f && !h.temperatures && h.temperature == 1.0f && !h.bias;
  return plain ? PLAIN : AFFINE;
}

// Logits z of raw ones of one word; t is the tanh, which the slope of the softcap needs.
template <Transform F>
static inline Vec to_logits(Vec raw, float bias, const fastrl_head &h, Vec temperature, Vec &t) {
  if (F == PLAIN) return raw;
  Vec z = (raw + bias);
  if (F == CAPPED) {
    t = tanh_of(z * (h.logit_scale / h.softcap));
    z = t * h.softcap;
  } else {
    z = z * h.logit_scale;
  }
  return z / temperature;
}

// Statistics of `rows` words x LANES * GROUP tokens, whose logits stay in the innermost cache between the two walks.
struct Part {
  float *top, *count, *rest, *weighted, *squares;
  int32_t *first;
};

constexpr int64_t WORDS = 64;  // of one part

template <Transform F, int OUTPUTS, int GROUP>
static void part_statistics(const fastrl_head &h, const fastrl_tile &tile, int64_t row0, int64_t rows, int64_t column,
                            const Part &out, float *at_target) {
  float scratch[F == PLAIN ? 1 : WORDS * GROUP * LANES];
  const float *z = tile.raw + row0 * tile.stride + column;
  int64_t stride = tile.stride;
  Vec top[GROUP];
  for (int g = 0; g < GROUP; g++) top[g] = all(-__builtin_inff());
  if (F != PLAIN) {
    Vec temperature[GROUP], t;
    for (int g = 0; g < GROUP; g++)
      temperature[g] = h.temperatures ? load(h.temperatures + column + g * LANES) : all(h.temperature);
    for (int64_t v = 0; v < rows; v++)
      for (int g = 0; g < GROUP; g++) {
        Vec raw = load(z + v * stride + g * LANES);
        Vec x = to_logits<F>(raw, h.bias ? h.bias[row0 + v] : 0.0f, h, temperature[g], t);
        store(scratch + (v * GROUP + g) * LANES, x);
        top[g] = larger(x, top[g]);
      }
    z = scratch;
    stride = GROUP * LANES;
  } else {
    for (int64_t v = 0; v < rows; v++)
      for (int g = 0; g < GROUP; g++) top[g] = larger(load(z + v * stride + g * LANES), top[g]);
  }
  Vec rest[GROUP] = {}, weighted[GROUP] = {}, squares[GROUP] = {};
  Int count[GROUP] = {}, first[GROUP];
  for (int g = 0; g < GROUP; g++) first[g] = Int{} + INT32_MAX;
  for (int64_t v = 0; v < rows; v++)
    for (int g = 0; g < GROUP; g++) {
      Vec x = load(z + v * stride + g * LANES);
      // -inf - -inf is NaN where every logit of the part is -inf; there each is a hit, and the hits are left out.
      Vec gap = x - top[g];
      Int hit = x == top[g];
      Vec e = where(hit | (gap < all(LOWEST)), Vec{}, exp_in_range(gap));
      count[g] -= hit;
      rest[g] += e;
      // e is 0 long before gap is -1000: the bound only keeps 0 * -inf from being NaN.
      if (OUTPUTS & FASTRL_ENTROPY) weighted[g] -= e * where(gap < all(-1000.0f), all(-1000.0f), where(hit, Vec{}, gap));
      if (OUTPUTS & FASTRL_EXTRA) {
        squares[g] += e * e;
        Int word = Int{} + static_cast<int32_t>(tile.first_word + row0 + v);
        first[g] = (hit & (word < first[g])) ? word : first[g];
      }
    }
  for (int g = 0; g < GROUP; g++) {
    int64_t c = column + g * LANES;
    store(out.top + c, top[g]);
    store(out.count + c, __builtin_convertvector(count[g], Vec));
    store(out.rest + c, rest[g]);
    if (OUTPUTS & FASTRL_ENTROPY) store(out.weighted + c, weighted[g]);
    if (OUTPUTS & FASTRL_EXTRA) {
      store(out.squares + c, squares[g]);
      *reinterpret_cast<Int *>(out.first + c) = first[g];
    }
  }
  // The target's logit is the very number that entered the sum.
  for (int64_t c = column; c < column + GROUP * LANES && c < tile.columns; c++) {
    int64_t v = tile.targets[c] - tile.first_word - row0;
    if (v >= 0 && v < rows) at_target[c] = z[v * stride + c - column];
  }
}

// state <- state joined with the part to its right; all terms are sums of non-negative numbers.
template <int OUTPUTS>
static void merge_part(fastrl_state &s, const Part &p, int64_t c) {
  Vec top = load(s.top + c), other = load(p.top + c);
  Vec joined = larger(other, top);
  const Vec none = all(-__builtin_inff());
  Vec base = where(joined == none, Vec{}, joined);  // nothing but -inf so far: any finite base gives exp = 0
  Int keep = top == joined, take = other == joined;
  Vec gap = base - top, gap_other = base - other;
  Vec a = where(keep, all(1.0f), exp_nonpositive(-gap)), b = where(take, all(1.0f), exp_nonpositive(-gap_other));
  Vec count = load(s.count + c), count_other = load(p.count + c);
  Vec rest = load(s.rest + c), rest_other = load(p.rest + c);
  const Vec far = all(1000.0f);
  if (OUTPUTS & FASTRL_ENTROPY) {
    gap = where(gap > far, far, gap);
    gap_other = where(gap_other > far, far, gap_other);
    Vec w = load(s.weighted + c), w_other = load(p.weighted + c);
    w = a * (w + where(keep, Vec{}, gap * (count + rest)));
    w_other = b * (w_other + where(take, Vec{}, gap_other * (count_other + rest_other)));
    store(s.weighted + c, w + w_other);
  }
  if (OUTPUTS & FASTRL_EXTRA) {
    Vec q = load(s.squares + c), q_other = load(p.squares + c);
    q = a * a * (q + where(keep, Vec{}, count)) + b * b * (q_other + where(take, Vec{}, count_other));
    store(s.squares + c, q);
    Int first = *reinterpret_cast<Int *>(s.first + c), first_other = *reinterpret_cast<Int *>(p.first + c);
    *reinterpret_cast<Int *>(s.first + c) = keep ? first : first_other;
  }
  store(s.rest + c, a * (rest + where(keep, Vec{}, count)) + b * (rest_other + where(take, Vec{}, count_other)));
  store(s.count + c, where(keep, count, Vec{}) + where(take, count_other, Vec{}));
  store(s.top + c, joined);
}

template <Transform F, int OUTPUTS>
static int fold(const fastrl_head &h, const fastrl_tile &tile, fastrl_state &state, int threads) {
  constexpr int GROUP = 2;
  int64_t lanes = (tile.columns + LANES - 1) / LANES, width = lanes * LANES;
  int64_t parts = (tile.rows + WORDS - 1) / WORDS, groups = (lanes + GROUP - 1) / GROUP;
  int64_t plane = parts * width;
  float *memory = static_cast<float *>(malloc(sizeof(float) * 6 * plane));
  if (!memory) return -1;
  auto part_at = [&](int64_t i) {
    float *p = memory + i * width;
    return Part{p, p + plane, p + 2 * plane, p + 3 * plane, p + 4 * plane, reinterpret_cast<int32_t *>(p + 5 * plane)};
  };
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t i = 0; i < parts; i++)
    for (int64_t g = 0; g < groups; g++) {
      int64_t row0 = i * WORDS, rows = tile.rows - row0 < WORDS ? tile.rows - row0 : WORDS, c = g * GROUP * LANES;
      Part out = part_at(i);
      if (c + GROUP * LANES <= width) {
        part_statistics<F, OUTPUTS, GROUP>(h, tile, row0, rows, c, out, state.at_target);
      } else {
        for (; c < width; c += LANES) part_statistics<F, OUTPUTS, 1>(h, tile, row0, rows, c, out, state.at_target);
      }
    }
  // In ascending order of words, whatever the number of threads.
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < width; c += LANES)
    for (int64_t i = 0; i < parts; i++) merge_part<OUTPUTS>(state, part_at(i), c);
  free(memory);
  return 0;
}

// One word of `out`. `raw` holds the kept columns side by side, readable up to a multiple of LANES.
template <Transform F, bool ENTROPY>
static inline void dlogits_of_word(const fastrl_head &h, const fastrl_law &law, const float *raw, float bias,
                                   const float *temperatures, float *out) {
  Vec t = {};
  int64_t c = 0;
  auto gradient = [&](const float *raw, const float *top, const float *rise, const float *fall, Vec temperature) {
    Vec z = to_logits<F>(load(raw), bias, h, temperature, t);
    Vec gap = z - load(top);
    Vec d = exp_nonpositive(gap);
    Vec bracket = load(rise);
    if (ENTROPY) bracket = bracket - load(fall) * where(gap < all(-1000.0f), all(-1000.0f), gap);
    d = d * bracket;
    return F == CAPPED ? d * (1.0f - t * t) : d;
  };
  for (; c + LANES <= law.columns; c += LANES) {
    Vec temperature = F != PLAIN && temperatures ? load(temperatures + c) : all(h.temperature);
    store(out + c, gradient(raw + c, law.top + c, law.rise + c, ENTROPY ? law.fall + c : nullptr, temperature));
  }
  if (c == law.columns) return;
  float padded[6][LANES] = {};
  for (int64_t i = c; i < law.columns; i++) {
    padded[0][i - c] = raw[i];
    padded[1][i - c] = law.top[i];
    padded[2][i - c] = law.rise[i];
    if (ENTROPY) padded[3][i - c] = law.fall[i];
    padded[4][i - c] = F != PLAIN && temperatures ? temperatures[i] : h.temperature;
  }
  for (int64_t i = law.columns - c; i < LANES; i++) padded[4][i] = 1.0f;
  store(padded[5], gradient(padded[0], padded[1], padded[2], padded[3], load(padded[4])));
  for (int64_t i = c; i < law.columns; i++) out[i] = padded[5][i - c];
}

template <Transform F, bool ENTROPY>
static int dlogits(const fastrl_head &h, const fastrl_tile &tile, const fastrl_law &law, float *out, int64_t stride_out,
                    int threads) {
  int64_t n = law.columns;
  // `out` may lie over `raw`: the slopes at the targets are read before anything is written.
  float *slopes = F == CAPPED ? static_cast<float *>(malloc(sizeof(float) * (n + 1))) : nullptr;
  if (F == CAPPED && !slopes) return -1;
  for (int64_t c = 0; F == CAPPED && c < n; c++) {
    int64_t v = tile.targets[c] - tile.first_word;
    if (v < 0 || v >= tile.rows) continue;
    float z = tile.raw[v * tile.stride + (law.keep ? law.keep[c] : c)] + (h.bias ? h.bias[v] : 0.0f);
    float t = tanh_of(all(z * (h.logit_scale / h.softcap)))[0];
    slopes[c] = 1.0f - t * t;
  }
  float *gathered = law.keep ? static_cast<float *>(malloc(sizeof(float) * (n + LANES) * threads)) : nullptr;
  if (law.keep && !gathered) {
    free(slopes);
    return -1;
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t part = 0; part < threads; part++) {
    float *kept = law.keep ? gathered + part * (n + LANES) : nullptr;
    for (int64_t v = part * tile.rows / threads; v < (part + 1) * tile.rows / threads; v++) {
      const float *raw = tile.raw + v * tile.stride;
      if (law.keep) {
        for (int64_t c = 0; c < n; c++) kept[c] = raw[law.keep[c]];
        raw = kept;
      }
      float bias = h.bias ? h.bias[v] : 0.0f;
      dlogits_of_word<F, ENTROPY>(h, law, raw, bias, h.temperatures, out + v * stride_out);
    }
  }
  for (int64_t c = 0; c < n; c++) {
    int64_t v = tile.targets[c] - tile.first_word;
    if (v >= 0 && v < tile.rows) out[v * stride_out + c] = law.at_target[c] * (F == CAPPED ? slopes[c] : 1.0f);
  }
  free(gathered);
  free(slopes);
  return 0;
}

static int fold_any(const fastrl_head *h, const fastrl_tile *tile, fastrl_state *state, int outputs, int threads) {
  typedef int (*Fold)(const fastrl_head &, const fastrl_tile &, fastrl_state &, int);
  static const Fold table[3][4] = {
      {fold<PLAIN, 0>, fold<PLAIN, 1>, fold<PLAIN, 2>, fold<PLAIN, 3>},
      {fold<AFFINE, 0>, fold<AFFINE, 1>, fold<AFFINE, 2>, fold<AFFINE, 3>},
      {fold<CAPPED, 0>, fold<CAPPED, 1>, fold<CAPPED, 2>, fold<CAPPED, 3>},
  };
  return table[transform_of(*h)][outputs & 3](*h, *tile, *state, threads);
}

static int dlogits_any(const fastrl_head *h, const fastrl_tile *tile, const fastrl_law *law, float *out,
                        int64_t stride_out, int threads) {
  typedef int (*Dlogits)(const fastrl_head &, const fastrl_tile &, const fastrl_law &, float *, int64_t, int);
  static const Dlogits table[3][2] = {
      {dlogits<PLAIN, false>, dlogits<PLAIN, true>},
      {dlogits<AFFINE, false>, dlogits<AFFINE, true>},
      {dlogits<CAPPED, false>, dlogits<CAPPED, true>},
  };
  return table[transform_of(*h)][law->fall ? 1 : 0](*h, *tile, *law, out, stride_out, threads);
}
