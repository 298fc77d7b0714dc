/* Both ends of the vocabulary: embedding, and the output head fused with the loss so that logits exist for one chunk
 * of rows only. */
#include <math.h>
#include <string.h>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/operations.h"
#include "kernels/cpu/view.h"

static int32_t token_at(const wn_tensor *tokens, int64_t i) {
  return ((const int32_t *)tokens->data)[i * tokens->stride[0]];
}

static void expect_in_vocabulary(int32_t token, int64_t vocabulary) {
  WN_ASSERT(token >= 0 && token < vocabulary, "token %d of a vocabulary of %lld", token, (long long)vocabulary);
}

wn_status WN_CPU(embedding)(wn_device *device, wn_tensor *h, const wn_tensor *tokens, const wn_tensor *w) {
  int64_t n = tokens->dim[0], vocabulary = w->dim[0], width = w->dim[1];
  WN_EXPECT(h, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(tokens, WN_I32, 1, n);
  WN_EXPECT(w, WN_REAL_DTYPE, 2, vocabulary, width);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) {
    int32_t token = token_at(tokens, i);
    expect_in_vocabulary(token, vocabulary);
    memcpy(wn_cpu_row(h, i), wn_cpu_row(w, token), (size_t)width * sizeof(wn_real));
  }
  return NULL;
}

/* A token's row belongs to one share, which adds its occurrences in row order. */
wn_status WN_CPU(embedding_backward)(wn_device *device, wn_tensor *dw, const wn_tensor *dh, const wn_tensor *tokens) {
  enum { SHARES = 64 };
  int64_t n = tokens->dim[0], vocabulary = dw->dim[0], width = dw->dim[1];
  WN_EXPECT(dw, WN_REAL_DTYPE, 2, vocabulary, width);
  WN_EXPECT(dh, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(tokens, WN_I32, 1, n);
  if (device->dry) return NULL;
#pragma omp parallel for schedule(dynamic)
  for (int32_t share = 0; share < SHARES; share++) {
    for (int64_t i = 0; i < n; i++) {
      int32_t token = token_at(tokens, i);
      expect_in_vocabulary(token, vocabulary);
      if (token % SHARES != share) continue;
      wn_real *sum = wn_cpu_row(dw, token);
      const wn_real *d = wn_cpu_row(dh, i);
#pragma omp simd
      for (int64_t j = 0; j < width; j++) sum[j] += d[j];
    }
  }
  return NULL;
}

/* Turns a row of logits into exp(logit - max) and returns log softmax at the target; *total is the row's sum. */
static double softmax_row(wn_real *logits, int64_t vocabulary, int32_t target, double *total) {
  wn_real top = logits[0];
#pragma omp simd reduction(max : top)
  for (int64_t j = 0; j < vocabulary; j++) top = logits[j] > top ? logits[j] : top;
  double at_target = (double)logits[target] - (double)top, sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < vocabulary; j++) {
    wn_real e = wn_real_exp(logits[j] - top);
    logits[j] = e;
    sum += (double)e;
  }
  *total = sum;
  return at_target - log(sum);
}

/* One row: its log-probability, and with `weight` its gradient in place of the logits (weight (softmax - one-hot)). */
static wn_real loss_row(wn_real *logits, int64_t vocabulary, int32_t target, const wn_real *weight) {
  if (target < 0) {
    if (weight) memset(logits, 0, (size_t)vocabulary * sizeof(wn_real));
    return 0;
  }
  double total;
  wn_real logp = (wn_real)softmax_row(logits, vocabulary, target, &total);
  if (weight) {
    wn_real factor = (wn_real)((double)*weight / total);
#pragma omp simd
    for (int64_t j = 0; j < vocabulary; j++) logits[j] *= factor;
    logits[target] -= *weight;
  }
  return logp;
}

/* Rows from .. from + rows - 1. */
static void loss_chunk(wn_real *logits, int64_t from, int64_t rows, wn_tensor *logp, wn_tensor *dh, wn_tensor *dw,
                       const wn_tensor *h, const wn_tensor *w, const wn_tensor *target, const wn_tensor *weight) {
  int64_t vocabulary = w->dim[0], width = w->dim[1];
  wn_cpu_gemm forward = {.c = logits,
                         .a = wn_cpu_row(h, from),
                         .b = w->data,
                         .m = rows,
                         .n = vocabulary,
                         .k = width,
                         .c_stride = vocabulary,
                         .a_stride = h->stride[0],
                         .b_stride = w->stride[0],
                         .transpose_b = true};
#pragma omp parallel
  {
    WN_CPU(gemm_tiles)(&forward);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; i++)
      *wn_cpu_at(logp, from + i) = loss_row(logits + i * vocabulary, vocabulary, token_at(target, from + i),
                                            weight ? wn_cpu_at(weight, from + i) : NULL);
    if (weight) {
      wn_cpu_gemm input = {.c = wn_cpu_row(dh, from),
                           .a = logits,
                           .b = w->data,
                           .m = rows,
                           .n = width,
                           .k = vocabulary,
                           .c_stride = dh->stride[0],
                           .a_stride = vocabulary,
                           .b_stride = w->stride[0]};
      wn_cpu_gemm matrix = {.c = dw->data,
                            .a = logits,
                            .b = wn_cpu_row(h, from),
                            .m = vocabulary,
                            .n = width,
                            .k = rows,
                            .c_stride = dw->stride[0],
                            .a_stride = vocabulary,
                            .b_stride = h->stride[0],
                            .transpose_a = true,
                            .accumulate = true};
      WN_CPU(gemm_tiles)(&input);
      WN_CPU(gemm_tiles)(&matrix);
    }
  }
}

wn_status WN_CPU(head_loss)(wn_device *device, wn_tensor *logp, wn_tensor *dh, wn_tensor *dw, const wn_tensor *h,
                            const wn_tensor *w, const wn_tensor *target, const wn_tensor *weight,
                            const wn_head_params *params) {
  int64_t n = h->dim[0], vocabulary = w->dim[0], width = w->dim[1];
  WN_EXPECT(logp, WN_REAL_DTYPE, 1, n);
  WN_EXPECT(h, WN_REAL_DTYPE, 2, n, width);
  WN_EXPECT(w, WN_REAL_DTYPE, 2, vocabulary, width);
  WN_EXPECT(target, WN_I32, 1, n);
  WN_ASSERT((dh == NULL) == (dw == NULL) && (dh == NULL) == (weight == NULL), "dh, dw, weight come together");
  WN_ASSERT(params->chunk_rows > 0, "chunk_rows %d", params->chunk_rows);
  if (dh) {
    WN_EXPECT(dh, WN_REAL_DTYPE, 2, n, width);
    WN_EXPECT(dw, WN_REAL_DTYPE, 2, vocabulary, width);
    WN_EXPECT(weight, WN_REAL_DTYPE, 1, n);
  }
  for (int64_t i = 0; i < n && !device->dry; i++) {
    int32_t token = token_at(target, i);
    if (token != -1) expect_in_vocabulary(token, vocabulary);
  }
  int64_t chunk = wn_cpu_min(params->chunk_rows, n);
  size_t mark = wn_arena_mark(device->scratch);
  void *logits;
  WN_TRY(wn_arena_alloc(device->scratch, &logits, "logits", (size_t)(chunk * vocabulary) * sizeof(wn_real)));
  if (device->dry) return wn_cpu_release(device, mark);
  for (int64_t from = 0; from < n; from += chunk)
    loss_chunk(logits, from, wn_cpu_min(chunk, n - from), logp, dh, dw, h, w, target, weight);
  wn_arena_release(device->scratch, mark);
  return NULL;
}
