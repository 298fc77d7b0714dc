/* Rope, sums and copies over heads, SwiGLU: one pass over memory each. */
#include <math.h>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/view.h"

enum { ANGLE_BLOCK = 64 };

/* Rotates pairs from .. from + count - 1 of one head. */
static void rotate(wn_real *x, const wn_real *cosine, const wn_real *sine, int64_t from, int64_t count, int64_t half,
                   bool interleaved) {
  if (interleaved) {
    wn_real *pair = x + 2 * from;
    for (int64_t j = 0; j < count; j++) {
      wn_real a = pair[2 * j], b = pair[2 * j + 1];
      pair[2 * j] = a * cosine[j] - b * sine[j];
      pair[2 * j + 1] = a * sine[j] + b * cosine[j];
    }
  } else {
    wn_real *low = x + from, *high = x + half + from;
    for (int64_t j = 0; j < count; j++) {
      wn_real a = low[j], b = high[j];
      low[j] = a * cosine[j] - b * sine[j];
      high[j] = a * sine[j] + b * cosine[j];
    }
  }
}

wn_status WN_CPU(rope)(wn_device *device, wn_tensor *x, const int32_t *position, const wn_rope_params *params) {
  int64_t n = x->dim[0], heads = x->dim[1], half = x->dim[2] / 2;
  WN_EXPECT(x, WN_REAL_DTYPE, 3, n, heads, 2 * half);
  double sign = params->inverse ? -1 : 1;
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    wn_real cosine[ANGLE_BLOCK], sine[ANGLE_BLOCK];
    for (int64_t from = 0; from < half; from += ANGLE_BLOCK) {
      int64_t count = wn_cpu_min(ANGLE_BLOCK, half - from);
      /* two loops: together they would become a scalar sincos */
#pragma omp simd
      for (int64_t j = 0; j < count; j++)
        cosine[j] = (wn_real)cos((double)((float)position[i] * params->inv_freq[from + j]));
#pragma omp simd
      for (int64_t j = 0; j < count; j++)
        sine[j] = (wn_real)(sign * sin((double)((float)position[i] * params->inv_freq[from + j])));
      for (int64_t h = 0; h < heads; h++)
        rotate((wn_real *)x->data + i * x->stride[0] + h * x->stride[1], cosine, sine, from, count, half,
               params->interleaved);
    }
  }
  return NULL;
}

/* y and x of one shape, any strides but a dense last dimension. */
static void expect_like(const wn_tensor *y, const wn_tensor *x) {
  WN_ASSERT(wn_tensor_same_shape(y, x), "operands of different shapes");
  WN_EXPECT(y, WN_REAL_DTYPE, y->rank, y->dim[0], y->dim[1], y->dim[2], y->dim[3]);
  WN_EXPECT(x, WN_REAL_DTYPE, x->rank, x->dim[0], x->dim[1], x->dim[2], x->dim[3]);
}

wn_status WN_CPU(add)(wn_device *device, wn_tensor *y, const wn_tensor *a, const wn_tensor *b) {
  expect_like(y, a);
  expect_like(y, b);
  wn_cpu_pieces pieces = wn_cpu_pieces_of(y);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < pieces.count; i++) {
    wn_cpu_piece p = wn_cpu_piece_at(&pieces, i);
    wn_real *to = wn_cpu_row(y, p.row) + p.from;
    const wn_real *left = wn_cpu_row(a, p.row) + p.from, *right = wn_cpu_row(b, p.row) + p.from;
#pragma omp simd
    for (int64_t j = 0; j < p.count; j++) to[j] = left[j] + right[j];
  }
  return NULL;
}

wn_status WN_CPU(scale)(wn_device *device, wn_tensor *y, const wn_tensor *x, double factor) {
  expect_like(y, x);
  wn_cpu_pieces pieces = wn_cpu_pieces_of(y);
  wn_real by = (wn_real)factor;
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < pieces.count; i++) {
    wn_cpu_piece p = wn_cpu_piece_at(&pieces, i);
    wn_real *to = wn_cpu_row(y, p.row) + p.from;
    const wn_real *from = wn_cpu_row(x, p.row) + p.from;
#pragma omp simd
    for (int64_t j = 0; j < p.count; j++) to[j] = from[j] * by;
  }
  return NULL;
}

wn_status WN_CPU(sum_heads)(wn_device *device, wn_tensor *y, const wn_tensor *x, const wn_accumulate *params) {
  int64_t n = x->dim[0], heads = x->dim[1], width = x->dim[2];
  WN_EXPECT(y, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(x, WN_REAL_DTYPE, 3, n, heads, width);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    wn_real *yi = wn_cpu_row(y, i);
    for (int64_t j = 0; !params->accumulate && j < width; j++) yi[j] = 0;
    for (int64_t h = 0; h < heads; h++) {
      const wn_real *xh = (const wn_real *)x->data + i * x->stride[0] + h * x->stride[1];
#pragma omp simd
      for (int64_t j = 0; j < width; j++) yi[j] += xh[j];
    }
  }
  return NULL;
}

wn_status WN_CPU(broadcast_heads)(wn_device *device, wn_tensor *y, const wn_tensor *x) {
  int64_t n = y->dim[0], heads = y->dim[1], width = y->dim[2];
  WN_EXPECT(y, WN_REAL_DTYPE, 3, n, heads, width);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, width);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const wn_real *xi = wn_cpu_row(x, i);
    for (int64_t h = 0; h < heads; h++) {
      wn_real *yh = (wn_real *)y->data + i * y->stride[0] + h * y->stride[1];
#pragma omp simd
      for (int64_t j = 0; j < width; j++) yh[j] = xi[j];
    }
  }
  return NULL;
}

wn_status WN_CPU(swiglu)(wn_device *device, wn_tensor *y, const wn_tensor *gate, const wn_tensor *up) {
  expect_like(y, gate);
  expect_like(y, up);
  wn_cpu_pieces pieces = wn_cpu_pieces_of(y);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < pieces.count; i++) {
    wn_cpu_piece p = wn_cpu_piece_at(&pieces, i);
    wn_real *yi = wn_cpu_row(y, p.row) + p.from;
    const wn_real *g = wn_cpu_row(gate, p.row) + p.from, *u = wn_cpu_row(up, p.row) + p.from;
#pragma omp simd
    for (int64_t j = 0; j < p.count; j++) yi[j] = g[j] / (1 + wn_real_exp(-g[j])) * u[j];
  }
  return NULL;
}

wn_status WN_CPU(swiglu_backward)(wn_device *device, wn_tensor *dgate, wn_tensor *dup, const wn_tensor *dy,
                                  const wn_tensor *gate, const wn_tensor *up) {
  expect_like(dgate, dy);
  expect_like(dup, dy);
  expect_like(gate, dy);
  expect_like(up, dy);
  wn_cpu_pieces pieces = wn_cpu_pieces_of(dy);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < pieces.count; i++) {
    wn_cpu_piece p = wn_cpu_piece_at(&pieces, i);
    wn_real *dg = wn_cpu_row(dgate, p.row) + p.from, *du = wn_cpu_row(dup, p.row) + p.from;
    const wn_real *d = wn_cpu_row(dy, p.row) + p.from;
    const wn_real *g = wn_cpu_row(gate, p.row) + p.from, *u = wn_cpu_row(up, p.row) + p.from;
    /* dg may be g and du may be u: each element is read before it is written, and no other element depends on it */
#pragma omp simd
    for (int64_t j = 0; j < p.count; j++) {
      wn_real gj = g[j], uj = u[j], dj = d[j], s = 1 / (1 + wn_real_exp(-gj));
      dg[j] = dj * uj * s * (1 + gj * (1 - s));
      du[j] = dj * gj * s;
    }
  }
  return NULL;
}
