// Vectors of LANES floats and the functions of them that the rows need. Included once per instruction set, inside a
// namespace and under the target pragma of that set; GCC's and Clang's vector extensions do the rest.

typedef float Vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Int __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline Vec load(const float *p) { return *reinterpret_cast<const Vec *>(p); }
static inline void store(float *p, Vec x) { *reinterpret_cast<Vec *>(p) = x; }
static inline Vec all(float x) { return x - Vec{}; }
static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec where(Int mask, Vec a, Vec b) { return mask ? a : b; }

constexpr float LOWEST = -87.3f;

// e^x for LOWEST <= x <= 0, and anything below it; within 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2,
// e^r = 1 + r + r^2 p(r), p by least squares on Chebyshev nodes (5e-9). NaN stays NaN.
static inline Vec exp_in_range(Vec x) {
  const Vec magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  Vec shifted = x * 1.44269504f + magic;
  Vec n = shifted - magic;
  Vec r = x - n * 0.693359375f;  // the first part of ln 2 has 9 bits: n times it is exact
  r = r + n * 2.12194440e-4f;
  Vec p = all(0.0013946091165293016f);
  p = p * r + 0.008369079721703447f;
  p = p * r + 0.041666269575580756f;
  p = p * r + 0.16666516784011334f;
  p = p * r + 0.5000000078087234f;
  Vec e = (r * r) * p + r + 1.0f;
  Int scale = (reinterpret_cast<Int &>(shifted) - (0x4B400000 - 127)) << 23;  // 2^n
  return e * reinterpret_cast<Vec &>(scale);
}

// e^x for x <= 0. Below LOWEST the result would be denormal: it is 0.
static inline Vec exp_nonpositive(Vec x) {
  return where(x < all(LOWEST), Vec{}, exp_in_range(x));  // NaN compares false and stays
}

// tanh within 3 ulp: an odd polynomial below 0.55, (1 - e) / (1 + e) with e = exp(-2 |x|) above.
static inline Vec tanh_of(Vec x) {
  Vec a = x < Vec{} ? -x : x, t = x * x;
  Vec p = all(-0.00608550850301981f);
  p = p * t + 0.020943637937307358f;
  p = p * t - 0.0538233257830143f;
  p = p * t + 0.13332343101501465f;
  p = p * t - 0.3333331346511841f;
  Vec near = x + x * t * p;
  Vec e = exp_nonpositive(-2.0f * a);
  Vec far = 1.0f - 2.0f * e / (1.0f + e);
  far = x < Vec{} ? -far : far;
  return where(a < all(0.55f), near, far);
}
