#include "kernels/cpu/dense_target.h"

#include <math.h>
#include <string.h>

void wn_target_take(wn_target_work *work, wn_carver *carver, const wn_target *target) {
  WN_EXPECT(target->qa, WN_REAL_DTYPE, 3, target->rows->n_rows, target->qa->dim[1], target->qa->dim[2]);
  WN_EXPECT(target->ka, WN_REAL_DTYPE, 3, target->rows->n_keys, target->ka->dim[1], target->qa->dim[2]);
  WN_ASSERT(target->ka->dim[1] == target->qa->dim[1] || target->ka->dim[1] == 1, "%lld heads of keys",
            (long long)target->ka->dim[1]);
  work->pitch = wn_pad_lanes(target->rows->n_keys);
  work->p = wn_take_reals(carver, WN_TARGET_ROWS * work->pitch);
  work->logit = wn_take_reals(carver, WN_TARGET_ROWS * work->pitch);
  work->q = wn_take_reals(carver, WN_TARGET_ROWS * target->qa->dim[2]);
}

/* p += softmax(logit) */
static void add_softmax(wn_real *restrict p, wn_real *restrict logit, int32_t count) {
  wn_real top = logit[0];
#pragma omp simd reduction(max : top)
  for (int32_t j = 0; j < count; j++) top = logit[j] > top ? logit[j] : top;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int32_t j = 0; j < count; j++) {
    logit[j] = wn_exp(logit[j] - top);
    sum += (double)logit[j];
  }
  const wn_real inverse = (wn_real)(1 / sum);
  for (int32_t j = 0; j < count; j++) p[j] += logit[j] * inverse;
}

void wn_target_rows(wn_target_work *work, const wn_target *target, const int32_t *row, int32_t n_rows) {
  const wn_tensor *qa = target->qa, *ka = target->ka;
  int64_t width = qa->dim[2], n_heads = qa->dim[1];
  int32_t low = INT32_MAX, high = -1, first[WN_TARGET_ROWS], count[WN_TARGET_ROWS];
  for (int32_t r = 0; r < n_rows; r++) {
    first[r] = target->rows->first_key[row[r]];
    count[r] = target->rows->last_key[row[r]] - first[r] + 1;
    if (count[r] <= 0) continue;
    low = wn_min_i32(low, first[r]);
    high = wn_max_i32(high, first[r] + count[r] - 1);
    memset(work->p + r * work->pitch, 0, (size_t)count[r] * sizeof(wn_real));
  }
  if (high < 0) return;
  WN_ASSERT(low >= 0 && high < target->rows->n_keys, "rows see keys %d .. %d", low, high);
  for (int64_t h = 0; h < n_heads; h++) {
    for (int32_t r = 0; r < n_rows; r++)
      memcpy(work->q + r * width, wn_head_row(qa, row[r], h), (size_t)width * sizeof(wn_real));
    wn_product(false, true, n_rows, high - low + 1, width, target->scale, work->q, width,
               wn_head_row(ka, low, wn_key_head(ka, h)), ka->stride[0], 0, work->logit, work->pitch);
    for (int32_t r = 0; r < n_rows; r++)
      if (count[r] > 0)
        add_softmax(work->p + r * work->pitch, work->logit + r * work->pitch + (first[r] - low), count[r]);
  }
  for (int32_t r = 0; r < n_rows; r++)
    for (int32_t j = 0; j < count[r]; j++) work->p[r * work->pitch + j] /= (wn_real)n_heads;
}
