// Matrix products for one instruction set. Included by native.cpp with LANES and its namespace set, after vector.h.
//
// The blocking is that of Goto and van de Geijn (2008): HEIGHT x WIDTH elements of c at a time stay in registers over
// DEPTH terms; for them b lies in panels of WIDTH columns that are read in order. Memory that comes next is asked for
// while the registers are busy. There are two ways to share the work:
//
//   rows of a lie along k     they are read where they are; b is copied by all threads together, a slab or more at once
//   they do not               every thread has a part of c to itself and waits for none. Its part of a is copied into
//                             strips of HEIGHT rows; the first strip reads b where it lies, and leaves a panel of it
//                             to the others

constexpr int HEIGHT = 6, WIDTH = 2 * LANES;  // 12 accumulators, 2 vectors of b and one broadcast: 15 registers of 16
constexpr int64_t DEPTH = 256;                // a panel of b is 16 KiB at 8 lanes: half of the innermost cache
constexpr int64_t BLOCK = 96;                 // rows of a that one thread takes at a time
constexpr int64_t COLUMNS = 1024;             // of b that are copied at a time
constexpr int64_t COPIED = 1 << 17;           // floats of b that are copied at a time, if that is a slab or more
constexpr int64_t STRIPS = 40;                // that a thread copies at a time: 240 KiB, half of the second cache
constexpr int64_t GROUP_ROWS = 8;             // that are copied together
constexpr int64_t PAD = 16;                   // floats between panels, so that they do not fall on the same cache sets
constexpr int64_t ITEMS = 8;                  // pieces of work for each thread

// c [rows, columns] (+)= a b over k; rows <= HEIGHT, columns <= WIDTH. Where there are fewer of them, the arithmetic is
// that of a whole tile, whose surplus is dropped. COPY: b is also written to `panel`.
template <bool ADD, bool COPY>
static inline __attribute__((always_inline)) void micro_tile(int64_t k, const float *a, int64_t a_row, int64_t a_column,
                                                             const float *b, int64_t b_row, float *panel, float *c,
                                                             int64_t stride, int64_t rows, int64_t columns) {
  Vec sum[HEIGHT][2] = {};
  const float *at[HEIGHT];
  for (int i = 0; i < HEIGHT; i++) at[i] = a + (i < rows ? i : rows - 1) * a_row;
#pragma GCC unroll 4
  for (int64_t p = 0; p < k; p++) {
    Vec left = load(b + p * b_row), right = load(b + p * b_row + LANES);
    if (COPY) {
      __builtin_prefetch(b + (p + 2 * GROUP_ROWS) * b_row);
      store(panel + p * WIDTH, left);
      store(panel + p * WIDTH + LANES, right);
    }
#pragma GCC unroll 6
    for (int i = 0; i < HEIGHT; i++) {
      float x = at[i][p * a_column];
      sum[i][0] += x * left;
      sum[i][1] += x * right;
    }
  }
  if (rows == HEIGHT && columns == WIDTH) {
#pragma GCC unroll 6
    for (int i = 0; i < HEIGHT; i++) {
      float *to = c + i * stride;
      store(to, ADD ? load(to) + sum[i][0] : sum[i][0]);
      store(to + LANES, ADD ? load(to + LANES) + sum[i][1] : sum[i][1]);
    }
    return;
  }
  float whole[HEIGHT][WIDTH];
  for (int i = 0; i < HEIGHT; i++) {
    store(whole[i], sum[i][0]);
    store(whole[i] + LANES, sum[i][1]);
  }
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < columns; j++) c[i * stride + j] = ADD ? c[i * stride + j] + whole[i][j] : whole[i][j];
}

// Rows [p0, p1) of b into panels of WIDTH columns, `pitch` floats apart; missing columns are 0.
static void copy_panels(const fastrl_matrix &b, int64_t p0, int64_t p1, int64_t columns, float *out, int64_t pitch) {
  for (int64_t j = 0; j < columns; j += WIDTH, out += pitch) {
    const float *from = b.at + j * b.column;
    int64_t most = columns - j < WIDTH ? columns - j : WIDTH;
    if (b.column == 1 && most == WIDTH) {
      for (int64_t p = p0; p < p1; p++) {
        __builtin_prefetch(from + (p + GROUP_ROWS) * b.row);
        __builtin_prefetch(out + 2 * pitch + p * WIDTH, 1);
        store(out + p * WIDTH, load(from + p * b.row));
        store(out + p * WIDTH + LANES, load(from + p * b.row + LANES));
      }
    } else {
      for (int64_t p = p0; p < p1; p++)
        for (int64_t q = 0; q < WIDTH; q++) out[p * WIDTH + q] = q < most ? from[p * b.row + q * b.column] : 0.0f;
    }
  }
}

// Columns [p0, p1) of a into strips of HEIGHT rows, `pitch` floats apart; missing rows repeat the last one.
static void copy_strips(const fastrl_matrix &a, int64_t p0, int64_t p1, int64_t rows, float *out, int64_t pitch) {
  for (int64_t i = 0; i < rows; i += HEIGHT, out += pitch) {
    const float *from = a.at + i * a.row;
    int64_t most = rows - i < HEIGHT ? rows - i : HEIGHT, p = p0;
    if (LANES >= HEIGHT && a.row == 1 && i + LANES <= rows)  // whole vectors, whose ends the next ones overwrite
      for (; p + 1 < p1; p++) {
        __builtin_prefetch(from + (p + GROUP_ROWS) * a.column);
        store(out + p * HEIGHT, load(from + p * a.column));
      }
    for (; p < p1; p++)
      for (int64_t r = 0; r < HEIGHT; r++) out[p * HEIGHT + r] = from[(r < most ? r : most - 1) * a.row + p * a.column];
  }
}

// Rows of memory that are wanted soon, asked for a few lines of 64 bytes at a time, into the second cache.
struct Ahead {
  const float *at, *line, *end;  // the row, the next line in it, where the row ends
  int64_t row, rows, each;       // floats from row to row; rows left, this one among them; lines at a time

  static Ahead of(const float *at, int64_t row, int64_t floats, int64_t rows, int64_t calls) {
    return {at, at, at + floats, row, rows, ((floats + 15) / 16 * rows) / (calls > 0 ? calls : 1) + 1};
  }
  inline void some() {
    for (int64_t i = 0; i < each && rows > 0; i++) {
      __builtin_prefetch(line, 0, 2);
      line += 16;
      if (line >= end) {
        rows--;
        at += row;
        end += row;
        line = at;
      }
    }
  }
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t upper(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Asks for a tile of c that is written next.
static inline void expect_tile(const float *c, int64_t stride) {
  for (int i = 0; i < HEIGHT; i++) __builtin_prefetch(c + i * stride, 1);
}

// As fastrl_gemm, for n <= COLUMNS and rows of a that lie along k. `panels` has room for `together` slabs.
static void gemm_of_rows(int64_t m, int64_t n, int64_t k, const fastrl_matrix &a, const fastrl_matrix &b, float *c,
                         int64_t stride, bool add, int threads, int64_t together, float *panels) {
  int64_t across = upper(n, WIDTH), down = upper(m, HEIGHT), slabs = upper(k, DEPTH);
  int64_t deepest = upper(k, slabs), panel = deepest * WIDTH + PAD;
  int64_t blocks = upper(m, BLOCK), tall = upper(down, blocks);
  int64_t cuts = least(across, blocks >= ITEMS * threads ? 1 : upper(ITEMS * threads, blocks));
  auto start = [&](int64_t slab) { return slab * k / slabs; };
#pragma omp parallel num_threads(threads)
  {
    int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t low = 0; low < slabs; low += together) {
      int64_t high = least(low + together, slabs);
      for (int64_t slab = low; slab < high; slab++) {
        int64_t first = start(slab), depth = start(slab + 1) - first;
        int64_t begin = depth * thread / team, end = depth * (thread + 1) / team;
        float *to = panels + (slab - low) * across * panel;
        for (int64_t p = begin; p < end; p += GROUP_ROWS)
          copy_panels({b.at + first * b.row, b.row, b.column}, p, least(p + GROUP_ROWS, end), n, to, panel);
      }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < blocks * cuts; item++) {
        int64_t i0 = item / cuts * tall, i1 = least(i0 + tall, down), cut = item % cuts;
        int64_t j0 = cut * across / cuts, j1 = (cut + 1) * across / cuts;
        Ahead rows_of_a = {};
        int64_t later = i0 + tall * team;  // this thread's next block, if all are equally fast
        if (cuts == 1 && later < down) {
          int64_t rows = least(later * HEIGHT + tall * HEIGHT, m) - later * HEIGHT, floats = start(high) - start(low);
          const float *from = a.at + later * HEIGHT * a.row + start(low);
          rows_of_a = Ahead::of(from, a.row, floats, rows, (high - low) * (j1 - j0) * (i1 - i0));
        }
        for (int64_t slab = low; slab < high; slab++) {
          int64_t first = start(slab), depth = start(slab + 1) - first;
          for (int64_t i = i0; i < i1; i++)  // along the rows of a and c, which may be far away; b is in cache
            for (int64_t j = j0; j < j1; j++) {
              rows_of_a.some();
              float *to = c + i * HEIGHT * stride + j * WIDTH;
              expect_tile(j + 1 < j1 ? to + WIDTH : c + (i + 1) * HEIGHT * stride + j0 * WIDTH, stride);
              int64_t rows = least(m - i * HEIGHT, HEIGHT), columns = least(n - j * WIDTH, WIDTH);
              const float *left = a.at + i * HEIGHT * a.row + first;
              const float *right = panels + ((slab - low) * across + j) * panel;
              if (add || slab)
                micro_tile<true, false>(depth, left, a.row, 1, right, WIDTH, nullptr, to, stride, rows, columns);
              else
                micro_tile<false, false>(depth, left, a.row, 1, right, WIDTH, nullptr, to, stride, rows, columns);
            }
        }
      }
    }
  }
}

// How many of the threads stand below one another in the grid that shares out c, down x across tiles: the others stand
// beside them. In units of a quarter of a tile's time, a strip's copy takes about 1 and a panel's first use 3 more.
static int64_t grid_rows(int64_t down, int64_t across, int64_t threads) {
  int64_t best = 1, lowest = INT64_MAX;
  for (int64_t rows = 1; rows <= threads; rows++) {
    if (threads % rows) continue;
    int64_t tall = upper(down, rows), wide = upper(across, threads / rows), cost = 4 * tall * wide + tall + 3 * wide;
    if (cost < lowest) best = rows, lowest = cost;
  }
  return best;
}

// As fastrl_gemm, for any a. `room` has `each` floats for every thread: STRIPS strips, or all if they are fewer, and a
// panel.
static void gemm_of_columns(int64_t m, int64_t n, int64_t k, const fastrl_matrix &a, const fastrl_matrix &b, float *c,
                            int64_t stride, bool add, int threads, int64_t each, float *room) {
  int64_t across = upper(n, WIDTH), down = upper(m, HEIGHT), slabs = upper(k, DEPTH);
  int64_t strip = upper(k, slabs) * HEIGHT + PAD;
  auto start = [&](int64_t slab) { return slab * k / slabs; };
#pragma omp parallel num_threads(threads)
  {
    int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    int64_t grid = grid_rows(down, across, team), beside = team / grid;
    int64_t top = down * (thread / beside) / grid, bottom = down * (thread / beside + 1) / grid;
    int64_t j0 = across * (thread % beside) / beside, j1 = across * (thread % beside + 1) / beside;
    int64_t blocks = j0 < j1 ? upper(bottom - top, STRIPS) : 0;
    float *strips = room + thread * each, *panel = strips + least(down, STRIPS) * strip;
    for (int64_t turn = 0; turn < slabs * blocks; turn++) {
      auto rows_from = [&](int64_t t) { return top + (bottom - top) * (t % blocks) / blocks; };
      int64_t slab = turn / blocks, first = start(slab), depth = start(slab + 1) - first;
      int64_t i0 = rows_from(turn), i1 = turn % blocks + 1 < blocks ? rows_from(turn + 1) : bottom;
      for (int64_t p = 0; p < depth; p += GROUP_ROWS)
        copy_strips({a.at + i0 * HEIGHT * a.row + first * a.column, a.row, a.column}, p, least(p + GROUP_ROWS, depth),
                    least(i1 * HEIGHT, m) - i0 * HEIGHT, strips, strip);
      for (int64_t j = j0; j < j1; j++) {
        const float *right = b.at + first * b.row + j * WIDTH * b.column;
        int64_t columns = least(n - j * WIDTH, WIDTH);
        bool direct = b.column == 1 && columns == WIDTH;
        if (!direct) copy_panels({right, b.row, b.column}, 0, depth, columns, panel, 0);
        Ahead next = {};
        if (b.column == 1 && j + 1 < j1) next = Ahead::of(right + WIDTH, b.row, WIDTH, depth, i1 - i0);
        for (int64_t i = i0; i < i1; i++) {
          next.some();
          float *to = c + i * HEIGHT * stride + j * WIDTH;
          expect_tile(i + 1 < i1 ? to + HEIGHT * stride : c + i0 * HEIGHT * stride + (j + 1) * WIDTH, stride);
          int64_t rows = least(m - i * HEIGHT, HEIGHT);
          const float *left = strips + (i - i0) * strip;
          bool copy = direct && i == i0;
          if (copy && (add || slab))
            micro_tile<true, true>(depth, left, 1, HEIGHT, right, b.row, panel, to, stride, rows, columns);
          else if (copy)
            micro_tile<false, true>(depth, left, 1, HEIGHT, right, b.row, panel, to, stride, rows, columns);
          else if (add || slab)
            micro_tile<true, false>(depth, left, 1, HEIGHT, panel, WIDTH, nullptr, to, stride, rows, columns);
          else
            micro_tile<false, false>(depth, left, 1, HEIGHT, panel, WIDTH, nullptr, to, stride, rows, columns);
        }
      }
    }
  }
}

static int gemm_any(int64_t m, int64_t n, int64_t k, const fastrl_matrix *a, const fastrl_matrix *b, float *c,
                    int64_t stride, int add, int threads) {
  if (m <= 0 || n <= 0) return 0;
  if (k <= 0) {
    for (int64_t i = 0; i < m && !add; i++) memset(c + i * stride, 0, sizeof(float) * n);
    return 0;
  }
  int64_t slabs = upper(k, DEPTH), deepest = upper(k, slabs);
  if (a->column != 1) {
    int64_t each = least(upper(m, HEIGHT), STRIPS) * (deepest * HEIGHT + PAD) + deepest * WIDTH + PAD;
    float *room = room_of(sizeof(float) * (each * threads + LANES));
    if (!room) return -1;
    gemm_of_columns(m, n, k, *a, *b, c, stride, add != 0, threads, each, room);
    return 0;
  }
  int64_t panels = upper(least(n, COLUMNS), WIDTH) * (deepest * WIDTH + PAD);
  int64_t together = least(slabs, COPIED / panels > 1 ? COPIED / panels : 1);
  float *room = room_of(sizeof(float) * (together * panels + LANES));
  if (!room) return -1;
  for (int64_t j = 0; j < n; j += COLUMNS)
    gemm_of_rows(m, least(n - j, COLUMNS), k, *a, {b->at + j * b->column, b->row, b->column}, c + j, stride, add != 0,
                 threads, together, room);
  return 0;
}
