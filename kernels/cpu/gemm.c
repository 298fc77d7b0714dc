#include "kernels/cpu/gemm.h"

#include "kernels/cpu/view.h"

/* Large tiles waste least on packing; a small output is cut finer, down to 64 x 128, to give many cores work. Measured
 * on 2 cores at 4096 x 192 x 768: 256 x 768 tiles run at 95% of one large call, 64 x 128 at 60%. */
enum { TILE_ROWS = 256, TILE_COLS = 1024, TILE_ROWS_MIN = 64, TILE_COLS_MIN = 128, TILES_WANTED = 16 };

typedef struct tiling {
  int64_t rows, cols, down, across;
} tiling;

static tiling cut(int64_t m, int64_t n) {
  tiling t = {.rows = TILE_ROWS, .cols = TILE_COLS};
  for (;;) {
    t.down = wn_cpu_blocks(m, t.rows);
    t.across = wn_cpu_blocks(n, t.cols);
    if (t.down * t.across >= TILES_WANTED) return t;
    if (t.rows > TILE_ROWS / 2)
      t.rows /= 2;
    else if (t.cols > 2 * TILE_COLS_MIN)
      t.cols /= 2;
    else if (t.rows > TILE_ROWS_MIN)
      t.rows /= 2;
    else if (t.cols > TILE_COLS_MIN)
      t.cols /= 2;
    else
      return t;
  }
}

/* BLAS wants a leading dimension of at least the row's width even where there is one row. */
static blasint leading(int64_t stride, int64_t rows, int64_t width) {
  WN_ASSERT(rows <= 1 || stride >= width, "row stride %lld of rows of %lld", (long long)stride, (long long)width);
  int64_t least = width > 1 ? width : 1;
  return (blasint)(stride > least ? stride : least);
}

static void run_tile(const wn_cpu_gemm *g, const tiling *t, int64_t i) {
  int64_t row = i / t->across * t->rows, col = i % t->across * t->cols;
  int64_t rows = wn_cpu_min(t->rows, g->m - row), cols = wn_cpu_min(t->cols, g->n - col);
  const wn_real *a = g->a + (g->transpose_a ? row : row * g->a_stride);
  const wn_real *b = g->b + (g->transpose_b ? col * g->b_stride : col);
  blasint lda = g->transpose_a ? leading(g->a_stride, g->k, g->m) : leading(g->a_stride, g->m, g->k);
  blasint ldb = g->transpose_b ? leading(g->b_stride, g->n, g->k) : leading(g->b_stride, g->k, g->n);
  blasint ldc = leading(g->c_stride, g->m, g->n);
  wn_gemm(CblasRowMajor, g->transpose_a ? CblasTrans : CblasNoTrans, g->transpose_b ? CblasTrans : CblasNoTrans,
          (blasint)rows, (blasint)cols, (blasint)g->k, 1, a, lda, b, ldb, g->accumulate ? 1 : 0,
          g->c + row * g->c_stride + col, ldc);
}

void WN_CPU(gemm_tiles)(const wn_cpu_gemm *g) {
  if (g->m == 0 || g->n == 0) return;
  tiling t = cut(g->m, g->n);
#pragma omp for schedule(dynamic) nowait
  for (int64_t i = 0; i < t.down * t.across; i++) run_tile(g, &t, i);
}

void WN_CPU(gemm)(const wn_cpu_gemm *g) {
#pragma omp parallel
  WN_CPU(gemm_tiles)(g);
}
