/* A matrix product cut into fixed tiles of the output, each one single-threaded BLAS call. The cut is a function of
 * the shape alone, so a result depends neither on the number of threads nor on which thread computed what. */
#ifndef WN_KERNELS_CPU_GEMM_H
#define WN_KERNELS_CPU_GEMM_H

#include "kernels/cpu/real.h"

/* c[m,n] = op(a) op(b) (+ c when accumulate). op(a) is [m,k]: a itself, or with transpose_a the transpose of the stored
 * a[k,m]; op(b) is [k,n]: b, or the transpose of the stored b[n,k]. Row strides in elements. */
typedef struct wn_cpu_gemm {
  wn_real *c;
  const wn_real *a, *b;
  int64_t m, n, k, c_stride, a_stride, b_stride;
  bool transpose_a, transpose_b, accumulate;
} wn_cpu_gemm;

/* Called by every thread of a parallel region; shares the tiles out and does not wait at the end, so several products
 * with different outputs may follow each other. */
void WN_CPU(gemm_tiles)(const wn_cpu_gemm *g);
/* One product, in a parallel region of its own. */
void WN_CPU(gemm)(const wn_cpu_gemm *g);

#endif
