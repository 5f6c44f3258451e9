// Matrix products for one instruction set. Included by native.cpp with LANES and its namespace set, after vector.h.
//
// The blocking is that of Goto and van de Geijn (2008): b is copied, DEPTH of its rows at a time, into panels of WIDTH
// columns that are read in order; HEIGHT x WIDTH elements of c at a time stay in registers over those rows. Rows of a
// that lie along k are read where they are; others are copied into strips of HEIGHT. Memory that comes next is asked
// for while the registers are busy: the next rows of a, the next rows of b, and the c that is about to be written.

constexpr int HEIGHT = 6, WIDTH = 2 * LANES;  // 12 accumulators, 2 vectors of b and one broadcast: 15 registers of 16
constexpr int64_t DEPTH = 256;                // a panel of b is 16 KiB at 8 lanes: half of the innermost cache
constexpr int64_t BLOCK = 96;                 // rows of a that one thread takes at a time
constexpr int64_t COLUMNS = 1024;             // of b that are copied at a time
constexpr int64_t COPIED = 1 << 17;           // floats of b that are copied at a time, if that is a slab or more
constexpr int64_t GROUP_ROWS = 8;             // of b that are copied together
constexpr int64_t PAD = 16;                   // floats between panels, so that they do not fall on the same cache sets
constexpr int64_t ITEMS = 8;                  // pieces of work for each thread

// c [rows, columns] (+)= a b over k; rows <= HEIGHT, columns <= WIDTH. Where there are fewer of them, the arithmetic is
// that of a whole tile, whose surplus is dropped.
template <bool ADD>
static inline __attribute__((always_inline)) void micro_tile(int64_t k, const float *a, int64_t a_row, int64_t a_column,
                                                             const float *b, float *c, int64_t stride, int64_t rows,
                                                             int64_t columns) {
  Vec sum[HEIGHT][2] = {};
  const float *at[HEIGHT];
  for (int i = 0; i < HEIGHT; i++) at[i] = a + (i < rows ? i : rows - 1) * a_row;
#pragma GCC unroll 4
  for (int64_t p = 0; p < k; p++) {
    Vec left = load(b + p * WIDTH), right = load(b + p * WIDTH + LANES);
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

// Rows of memory that are wanted soon, asked for a few lines of 64 bytes at a time.
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

// As fastrl_gemm, for n <= COLUMNS. `panels` and `strips` have room for the copies of `together` slabs.
static void gemm_columns(int64_t m, int64_t n, int64_t k, const fastrl_matrix &a, const fastrl_matrix &b, float *c,
                         int64_t stride, bool add, int threads, int64_t together, float *panels, float *strips) {
  int64_t across = upper(n, WIDTH), down = upper(m, HEIGHT), slabs = upper(k, DEPTH);
  int64_t deepest = upper(k, slabs), panel = deepest * WIDTH + PAD, strip = deepest * HEIGHT + PAD;
  bool in_place = a.column == 1;
  int64_t blocks = upper(m, BLOCK), tall = upper(down, blocks);
  int64_t cuts = least(across, blocks >= ITEMS * threads ? 1 : upper(ITEMS * threads, blocks));
  auto start = [&](int64_t slab) { return slab * k / slabs; };
#pragma omp parallel num_threads(threads)
  {
    int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t low = 0; low < slabs; low += together) {
      int64_t high = least(low + together, slabs);
      for (int64_t slab = low; slab < high; slab++) {
        int64_t first = start(slab), depth = start(slab + 1) - first, place = slab - low;
        int64_t begin = depth * thread / team, end = depth * (thread + 1) / team;
        for (int64_t p = begin; p < end; p += GROUP_ROWS) {
          int64_t stop = least(p + GROUP_ROWS, end);
          copy_panels({b.at + first * b.row, b.row, b.column}, p, stop, n, panels + place * across * panel, panel);
          if (in_place) continue;
          copy_strips({a.at + first * a.column, a.row, a.column}, p, stop, m, strips + place * down * strip, strip);
        }
      }
#pragma omp barrier
      // Each thread asks for what it will copy.
      Ahead rows_of_b = {}, columns_of_a = {};
      if (high < slabs) {
        int64_t second = start(high), more = start(least(high + together, slabs)) - second;
        int64_t from = second + more * thread / team, count = second + more * (thread + 1) / team - from;
        int64_t calls = (high - low) * across * down / team;
        if (b.column == 1) rows_of_b = Ahead::of(b.at + from * b.row, b.row, n, count, calls);
        if (!in_place && a.row == 1) columns_of_a = Ahead::of(a.at + from * a.column, a.column, m, count, calls);
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t item = 0; item < blocks * cuts; item++) {
        int64_t i0 = item / cuts * tall, i1 = least(i0 + tall, down), cut = item % cuts;
        int64_t j0 = cut * across / cuts, j1 = (cut + 1) * across / cuts;
        Ahead rows_of_a = {};
        int64_t later = i0 + tall * team;  // this thread's next block, if all are equally fast
        if (in_place && cuts == 1 && later < down) {
          int64_t rows = least(later * HEIGHT + tall * HEIGHT, m) - later * HEIGHT, floats = start(high) - start(low);
          const float *from = a.at + later * HEIGHT * a.row + start(low);
          rows_of_a = Ahead::of(from, a.row, floats, rows, (high - low) * (j1 - j0) * (i1 - i0));
        }
        for (int64_t slab = low; slab < high; slab++) {
          int64_t first = start(slab), depth = start(slab + 1) - first, place = slab - low;
          for (int64_t j = j0; j < j1; j++)
            for (int64_t i = i0; i < i1; i++) {
              rows_of_a.some();
              rows_of_b.some();
              columns_of_a.some();
              int64_t rows = least(m - i * HEIGHT, HEIGHT), columns = least(n - j * WIDTH, WIDTH);
              float *to = c + i * HEIGHT * stride + j * WIDTH;
              for (int64_t r = 0; r < rows; r++) __builtin_prefetch(to + r * stride, 1);
              const float *left = in_place ? a.at + i * HEIGHT * a.row + first : strips + (place * down + i) * strip;
              const float *right = panels + (place * across + j) * panel;
              if (in_place && (add || slab)) {
                micro_tile<true>(depth, left, a.row, 1, right, to, stride, rows, columns);
              } else if (in_place) {
                micro_tile<false>(depth, left, a.row, 1, right, to, stride, rows, columns);
              } else if (add || slab) {
                micro_tile<true>(depth, left, 1, HEIGHT, right, to, stride, rows, columns);
              } else {
                micro_tile<false>(depth, left, 1, HEIGHT, right, to, stride, rows, columns);
              }
            }
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
  int64_t panels = upper(least(n, COLUMNS), WIDTH) * (deepest * WIDTH + PAD);
  int64_t together = least(slabs, COPIED / panels > 1 ? COPIED / panels : 1);
  int64_t strips = a->column == 1 ? 0 : upper(m, HEIGHT) * (deepest * HEIGHT + PAD);
  float *room = room_of(sizeof(float) * (together * (panels + strips) + LANES));
  if (!room) return -1;
  for (int64_t j = 0; j < n; j += COLUMNS)
    gemm_columns(m, least(n - j, COLUMNS), k, *a, {b->at + j * b->column, b->row, b->column}, c + j, stride, add != 0,
                 threads, together, room, room + together * panels);
  return 0;
}
