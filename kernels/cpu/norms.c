/* RMSNorm and LayerNorm. Row sums are in FP64; weight gradients are summed over blocks of rows first, then over the
 * blocks in order. */
#include <math.h>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/view.h"

enum { ROW_BLOCK = 64 };

wn_status WN_CPU(rms_norm)(wn_device *device, wn_tensor *y, wn_tensor *r, const wn_tensor *x, const wn_tensor *w,
                           const wn_norm_params *params) {
  int64_t n = x->dim[0], width = x->dim[1];
  WN_EXPECT(y, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(r, WN_REAL_DTYPE, 1, n);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(w, WN_REAL_DTYPE, 1, width);
  const wn_real *weight = w->data;
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const wn_real *xi = wn_cpu_row(x, i);
    wn_real *yi = wn_cpu_row(y, i);
    double squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < width; j++) squares += (double)xi[j] * (double)xi[j];
    wn_real ri = (wn_real)(1.0 / sqrt(squares / (double)width + params->eps));
    *wn_cpu_at(r, i) = ri;
    for (int64_t j = 0; j < width; j++) yi[j] = xi[j] * ri * weight[j];
  }
  return NULL;
}

/* dw[j] += sum over blocks of partial[block][j] */
static void fold_blocks(wn_tensor *dw, const wn_real *partial, int64_t blocks, int64_t width) {
  wn_real *sum = dw->data;
#pragma omp parallel for schedule(static)
  for (int64_t j = 0; j < width; j++) {
    double total = 0;
    for (int64_t b = 0; b < blocks; b++) total += (double)partial[b * width + j];
    sum[j] += (wn_real)total;
  }
}

/* dx (+)= r (g - x r^2 mean(g x)), g = w dy */
static void rms_input_row(wn_real *dx, const wn_real *dy, const wn_real *x, const wn_real *w, wn_real r, int64_t width,
                          bool accumulate) {
  double dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t j = 0; j < width; j++) dot += (double)(w[j] * dy[j]) * (double)x[j];
  wn_real pull = (wn_real)(dot / (double)width * (double)r * (double)r);
  if (accumulate)
    for (int64_t j = 0; j < width; j++) dx[j] += r * (w[j] * dy[j] - x[j] * pull);
  else
    for (int64_t j = 0; j < width; j++) dx[j] = r * (w[j] * dy[j] - x[j] * pull);
}

wn_status WN_CPU(rms_norm_backward)(wn_device *device, wn_tensor *dx, wn_tensor *dw, const wn_tensor *dy,
                                    const wn_tensor *x, const wn_tensor *r, const wn_tensor *w,
                                    const wn_norm_params *params) {
  int64_t n = x->dim[0], width = x->dim[1], blocks = wn_cpu_blocks(n, ROW_BLOCK);
  WN_EXPECT(dx, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(dy, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(r, WN_REAL_DTYPE, 1, n);
  WN_EXPECT(w, WN_REAL_DTYPE, 1, width);
  size_t mark = wn_arena_mark(device->scratch);
  void *memory = NULL;
  if (dw) {
    WN_EXPECT(dw, WN_REAL_DTYPE, 1, width);
    WN_TRY(
        wn_arena_alloc(device->scratch, &memory, "norm weight gradient", (size_t)(blocks * width) * sizeof(wn_real)));
  }
  wn_real *partial = memory;
  const wn_real *weight = w->data;
  if (device->dry) return wn_cpu_release(device, mark);
#pragma omp parallel for schedule(static)
  for (int64_t b = 0; b < blocks; b++) {
    wn_real *sum = partial ? partial + b * width : NULL;
    for (int64_t j = 0; sum && j < width; j++) sum[j] = 0;
    for (int64_t i = b * ROW_BLOCK; i < wn_cpu_min(n, (b + 1) * ROW_BLOCK); i++) {
      const wn_real *dyi = wn_cpu_row(dy, i), *xi = wn_cpu_row(x, i);
      wn_real ri = *wn_cpu_at(r, i);
      for (int64_t j = 0; sum && j < width; j++) sum[j] += dyi[j] * (xi[j] * ri);
      rms_input_row(wn_cpu_row(dx, i), dyi, xi, weight, ri, width, params->accumulate);
    }
  }
  if (dw) fold_blocks(dw, partial, blocks, width);
  wn_arena_release(device->scratch, mark);
  return NULL;
}

wn_status WN_CPU(layer_norm)(wn_device *device, wn_tensor *y, wn_tensor *stat, const wn_tensor *x, const wn_tensor *w,
                             const wn_tensor *b, const wn_norm_params *params) {
  int64_t n = x->dim[0], width = x->dim[1];
  WN_EXPECT(y, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(stat, WN_REAL_DTYPE, 2, n, 2);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(w, WN_REAL_DTYPE, 1, width);
  WN_EXPECT(b, WN_REAL_DTYPE, 1, width);
  const wn_real *weight = w->data, *bias = b->data;
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const wn_real *xi = wn_cpu_row(x, i);
    wn_real *yi = wn_cpu_row(y, i), *si = wn_cpu_row(stat, i);
    double sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < width; j++) sum += (double)xi[j];
    double mean = sum / (double)width;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < width; j++) squares += ((double)xi[j] - mean) * ((double)xi[j] - mean);
    si[0] = (wn_real)mean;
    si[1] = (wn_real)(1.0 / sqrt(squares / (double)width + params->eps));
    for (int64_t j = 0; j < width; j++) yi[j] = (xi[j] - si[0]) * si[1] * weight[j] + bias[j];
  }
  return NULL;
}

/* dx (+)= r (g - mean(g) - xhat mean(g xhat)), g = w dy, xhat = (x - mean) r */
static void layer_input_row(wn_real *dx, const wn_real *dy, const wn_real *x, const wn_real *w, const wn_real stat[2],
                            int64_t width, bool accumulate) {
  wn_real mean = stat[0], r = stat[1];
  double sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
  for (int64_t j = 0; j < width; j++) {
    double g = (double)(w[j] * dy[j]);
    sum += g;
    dot += g * (double)((x[j] - mean) * r);
  }
  wn_real shift = (wn_real)(sum / (double)width), pull = (wn_real)(dot / (double)width);
  for (int64_t j = 0; j < width; j++) {
    wn_real d = r * (w[j] * dy[j] - shift - (x[j] - mean) * r * pull);
    dx[j] = accumulate ? dx[j] + d : d;
  }
}

wn_status WN_CPU(layer_norm_backward)(wn_device *device, wn_tensor *dx, wn_tensor *dw, wn_tensor *db,
                                      const wn_tensor *dy, const wn_tensor *x, const wn_tensor *stat,
                                      const wn_tensor *w, const wn_norm_params *params) {
  int64_t n = x->dim[0], width = x->dim[1], blocks = wn_cpu_blocks(n, ROW_BLOCK);
  if (dx) WN_EXPECT(dx, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(dw, WN_REAL_DTYPE, 1, width);
  WN_EXPECT(db, WN_REAL_DTYPE, 1, width);
  WN_EXPECT(dy, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(stat, WN_REAL_DTYPE, 2, n, 2);
  WN_EXPECT(w, WN_REAL_DTYPE, 1, width);
  size_t mark = wn_arena_mark(device->scratch);
  void *memory = NULL;
  WN_TRY(
      wn_arena_alloc(device->scratch, &memory, "norm weight gradient", (size_t)(2 * blocks * width) * sizeof(wn_real)));
  wn_real *partial_w = memory, *partial_b = partial_w + blocks * width;
  const wn_real *weight = w->data;
  if (device->dry) return wn_cpu_release(device, mark);
#pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < blocks; k++) {
    wn_real *sum_w = partial_w + k * width, *sum_b = partial_b + k * width;
    for (int64_t j = 0; j < width; j++) sum_w[j] = sum_b[j] = 0;
    for (int64_t i = k * ROW_BLOCK; i < wn_cpu_min(n, (k + 1) * ROW_BLOCK); i++) {
      const wn_real *dyi = wn_cpu_row(dy, i), *xi = wn_cpu_row(x, i), *si = wn_cpu_row(stat, i);
      for (int64_t j = 0; j < width; j++) {
        sum_w[j] += dyi[j] * ((xi[j] - si[0]) * si[1]);
        sum_b[j] += dyi[j];
      }
      if (dx) layer_input_row(wn_cpu_row(dx, i), dyi, xi, weight, si, width, params->accumulate);
    }
  }
  fold_blocks(dw, partial_w, blocks, width);
  fold_blocks(db, partial_b, blocks, width);
  wn_arena_release(device->scratch, mark);
  return NULL;
}
