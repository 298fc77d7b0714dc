/* Moving rows to their experts and back. Products over the sorted rows are grouped_linear's (products.c). */
#include <string.h>

#include "kernels/cpu/operations.h"
#include "kernels/cpu/view.h"

static int32_t *slot_at(const wn_tensor *slot, int64_t pair) {
  return (int32_t *)slot->data + pair * slot->stride[0];
}

wn_status WN_CPU(moe_permute)(wn_device *device, wn_tensor *xp, wn_tensor *slot, int64_t *offset, const wn_tensor *x,
                              const wn_tensor *index, int32_t n_experts) {
  int64_t n = index->dim[0], choices = index->dim[1], width = x->dim[1];
  WN_EXPECT(xp, WN_REAL_DTYPE, 2, n * choices, width);
  WN_EXPECT(slot, WN_I32, 1, n * choices);
  WN_EXPECT(x, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(index, WN_I32, 2, n, choices);
  WN_ASSERT(n * choices <= INT32_MAX, "%lld pairs do not fit a slot number", (long long)(n * choices));
  if (device->dry) {
    wn_even_offsets(offset, n * choices, n_experts);
    return NULL;
  }
  memset(offset, 0, ((size_t)n_experts + 1) * sizeof *offset);
  for (int64_t i = 0; i < n; i++)
    for (int64_t k = 0; k < choices; k++) {
      int32_t e = wn_cpu_index_row(index, i)[k];
      WN_ASSERT(e >= 0 && e < n_experts, "expert %d of %d", e, n_experts);
      offset[e + 1]++;
    }
  for (int32_t e = 0; e < n_experts; e++) offset[e + 1] += offset[e];
  /* offset[e] serves as expert e's next free place, and has become the start of e + 1 when all are placed */
  for (int64_t i = 0; i < n; i++)
    for (int64_t k = 0; k < choices; k++)
      *slot_at(slot, i * choices + k) = (int32_t)offset[wn_cpu_index_row(index, i)[k]]++;
  memmove(offset + 1, offset, (size_t)n_experts * sizeof *offset);
  offset[0] = 0;
#pragma omp parallel for schedule(static)
  for (int64_t pair = 0; pair < n * choices; pair++)
    memcpy(wn_cpu_row(xp, *slot_at(slot, pair)), wn_cpu_row(x, pair / choices), (size_t)width * sizeof(wn_real));
  return NULL;
}

wn_status WN_CPU(moe_permute_backward)(wn_device *device, wn_tensor *dx, const wn_tensor *dxp, const wn_tensor *slot) {
  int64_t n = dx->dim[0], width = dx->dim[1], choices = n ? slot->dim[0] / n : 0;
  WN_EXPECT(dx, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(dxp, WN_REAL_DTYPE, 2, n * choices, width);
  WN_EXPECT(slot, WN_I32, 1, n * choices);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    wn_real *sum = wn_cpu_row(dx, i);
    for (int64_t k = 0; k < choices; k++) {
      const wn_real *d = wn_cpu_row(dxp, *slot_at(slot, i * choices + k));
#pragma omp simd
      for (int64_t j = 0; j < width; j++) sum[j] += d[j];
    }
  }
  return NULL;
}

wn_status WN_CPU(moe_combine)(wn_device *device, wn_tensor *y, const wn_tensor *yp, const wn_tensor *slot,
                              const wn_tensor *weight) {
  int64_t n = y->dim[0], width = y->dim[1], choices = weight->dim[1];
  WN_EXPECT(y, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(yp, WN_REAL_DTYPE, 2, n * choices, width);
  WN_EXPECT(slot, WN_I32, 1, n * choices);
  WN_EXPECT(weight, WN_REAL_DTYPE, 2, n, choices);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    wn_real *sum = wn_cpu_row(y, i);
    for (int64_t k = 0; k < choices; k++) {
      const wn_real *from = wn_cpu_row(yp, *slot_at(slot, i * choices + k));
      wn_real by = wn_cpu_row(weight, i)[k];
#pragma omp simd
      for (int64_t j = 0; j < width; j++) sum[j] += by * from[j];
    }
  }
  return NULL;
}

wn_status WN_CPU(moe_combine_backward)(wn_device *device, wn_tensor *dyp, wn_tensor *dweight, const wn_tensor *dy,
                                       const wn_tensor *yp, const wn_tensor *slot, const wn_tensor *weight) {
  int64_t n = dy->dim[0], width = dy->dim[1], choices = weight->dim[1];
  WN_EXPECT(dyp, WN_REAL_DTYPE, 2, n * choices, width);
  WN_EXPECT(dweight, WN_REAL_DTYPE, 2, n, choices);
  WN_EXPECT(dy, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(yp, WN_REAL_DTYPE, 2, n * choices, width);
  WN_EXPECT(slot, WN_I32, 1, n * choices);
  WN_EXPECT(weight, WN_REAL_DTYPE, 2, n, choices);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const wn_real *d = wn_cpu_row(dy, i);
    for (int64_t k = 0; k < choices; k++) {
      int32_t place = *slot_at(slot, i * choices + k);
      const wn_real *out = wn_cpu_row(yp, place);
      wn_real *to = wn_cpu_row(dyp, place), by = wn_cpu_row(weight, i)[k];
      double dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t j = 0; j < width; j++) {
        dot += (double)d[j] * (double)out[j];
        to[j] = by * d[j];
      }
      wn_cpu_row(dweight, i)[k] = (wn_real)dot;
    }
  }
  return NULL;
}
