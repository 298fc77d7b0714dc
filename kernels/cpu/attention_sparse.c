/* Absorbed attention over a selection: one row's picks are gathered once and serve all heads, so that a row
 * is a handful of products with the heads as their rows. Keys that were not picked are never read. dkv is
 * summed by groups of rows (tile.h, partials): any key may be picked by any row. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/tile.h"

enum { ROWS = 16, MAX_GROUPS = 8, GROUP_ROWS = 32 };

typedef struct inputs {
  const wn_tensor *q, *kv, *selection, *d_o, *lse, *delta;
  const wn_rows *rows;
  wn_tensor *o, *lse_out, *delta_out, *dq, *p_mean;
  int64_t n_heads, width, v_width, pitch; /* pitch: k padded, the row stride of p and dp */
  wn_real scale;
} inputs;

typedef struct workspace {
  wn_real *kv, *dkv; /* [k][c+r]: the row's picks and their gradients */
  wn_real *p, *dp;   /* [H][pitch] */
  wn_real *q, *d_o;  /* [H][c+r], [H][c]: the row's, dense */
  wn_real *o;        /* [H][c] */
} workspace;

static void lay_out(workspace *w, wn_carver *carver, const inputs *in) {
  int64_t k = in->selection->dim[1];
  w->kv = wn_take_reals(carver, k * in->width);
  w->dkv = wn_take_reals(carver, k * in->width);
  w->p = wn_take_reals(carver, in->n_heads * in->pitch);
  w->dp = wn_take_reals(carver, in->n_heads * in->pitch);
  w->q = wn_take_reals(carver, in->n_heads * in->width);
  w->d_o = wn_take_reals(carver, in->n_heads * in->v_width);
  w->o = wn_take_reals(carver, in->n_heads * in->v_width);
}

static void copy_heads(wn_real *out, const wn_tensor *from, int64_t i) {
  int64_t width = from->dim[2];
  for (int64_t h = 0; h < from->dim[1]; h++)
    memcpy(out + h * width, wn_head_row(from, i, h), (size_t)width * sizeof(wn_real));
}

/* Gathers row i's picks; logits[H][picks] go to p, padded with masked ones. Returns the number of picks. */
static int32_t row_logits(workspace *w, const inputs *in, int64_t i) {
  const int32_t *pick = wn_row_i32(in->selection, i);
  int32_t k = (int32_t)in->selection->dim[1], n = 0;
  for (; n < k && pick[n] >= 0; n++) {
    WN_ASSERT(pick[n] >= in->rows->first_key[i] && pick[n] <= in->rows->last_key[i],
              "row %lld picks key %d, sees %d .. %d", (long long)i, pick[n], in->rows->first_key[i],
              in->rows->last_key[i]);
    memcpy(w->kv + n * in->width, wn_row(in->kv, pick[n]), (size_t)in->width * sizeof(wn_real));
  }
  if (n == 0) return 0;
  copy_heads(w->q, in->q, i);
  wn_product(false, true, in->n_heads, n, in->width, in->scale, w->q, in->width, w->kv, in->width, 0, w->p, in->pitch);
  for (int64_t h = 0; h < in->n_heads; h++)
    for (int64_t j = n; j < wn_pad_lanes(n); j++) w->p[h * in->pitch + j] = WN_MASKED_LOGIT;
  return n;
}

/* exp(logit - shift) in place; returns the sum. The padding becomes 0. */
static wn_real exponentials(wn_real *restrict p, int32_t n, wn_real shift) {
  int32_t padded = (int32_t)wn_pad_lanes(n);
  wn_real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int32_t j = 0; j < padded; j++) {
    p[j] = wn_exp(p[j] - shift);
    sum += p[j];
  }
  return sum;
}

static void forward_row(workspace *w, const inputs *in, int64_t i) {
  int32_t n = row_logits(w, in, i);
  int64_t c_v = in->v_width;
  for (int64_t h = 0; h < in->n_heads; h++) {
    wn_real *restrict p = w->p + h * in->pitch;
    wn_real top = n ? p[0] : 0;
#pragma omp simd reduction(max : top)
    for (int32_t j = 0; j < n; j++) top = p[j] > top ? p[j] : top;
    wn_real sum = n ? exponentials(p, n, top) : 0;
    for (int32_t j = 0; j < n; j++) p[j] /= sum;
    wn_row(in->lse_out, i)[h] = n ? top + wn_real_log(sum) : -(wn_real)INFINITY;
  }
  if (n)
    wn_product(false, false, in->n_heads, c_v, n, 1, w->p, in->pitch, w->kv, in->width, 0, w->o, c_v);
  else
    memset(w->o, 0, (size_t)(in->n_heads * c_v) * sizeof(wn_real));
  for (int64_t h = 0; h < in->n_heads; h++) {
    const wn_real *o = w->o + h * c_v;
    memcpy(wn_head_row(in->o, i, h), o, (size_t)c_v * sizeof(wn_real));
    if (!in->d_o) continue;
    const wn_real *grad = wn_head_row(in->d_o, i, h);
    wn_real dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t c = 0; c < c_v; c++) dot += grad[c] * o[c];
    wn_row(in->delta_out, i)[h] = dot;
  }
}

static void row_probabilities(workspace *w, const inputs *in, int64_t i, int32_t n) {
  for (int64_t h = 0; h < in->n_heads && n; h++) (void)exponentials(w->p + h * in->pitch, n, wn_row(in->lse, i)[h]);
  if (!in->p_mean) return;
  wn_real *restrict mean = wn_row(in->p_mean, i);
  memset(mean, 0, (size_t)in->selection->dim[1] * sizeof(wn_real));
  for (int64_t h = 0; h < in->n_heads; h++)
    for (int32_t j = 0; j < n; j++) mean[j] += w->p[h * in->pitch + j];
  for (int32_t j = 0; j < n; j++) mean[j] /= (wn_real)in->n_heads;
}

static void backward_row(workspace *w, const inputs *in, int64_t i, wn_real *dkv) {
  int64_t n_heads = in->n_heads, width = in->width, c_v = in->v_width, pitch = in->pitch;
  int32_t n = row_logits(w, in, i);
  row_probabilities(w, in, i, n);
  if (!in->dq) return;
  if (n == 0) {
    for (int64_t h = 0; h < n_heads; h++) memset(wn_head_row(in->dq, i, h), 0, (size_t)width * sizeof(wn_real));
    return;
  }
  copy_heads(w->d_o, in->d_o, i);
  wn_product(false, true, n_heads, n, c_v, 1, w->d_o, c_v, w->kv, width, 0, w->dp, pitch);
  for (int64_t h = 0; h < n_heads; h++) {
    const wn_real delta = wn_row(in->delta, i)[h];
    const wn_real *restrict p = w->p + h * pitch;
    wn_real *restrict dp = w->dp + h * pitch;
    for (int32_t j = 0; j < n; j++) dp[j] = p[j] * (dp[j] - delta) * in->scale;
  }
  wn_product(true, false, n, width, n_heads, 1, w->dp, pitch, w->q, width, 0, w->dkv, width);
  wn_product(true, false, n, c_v, n_heads, 1, w->p, pitch, w->d_o, c_v, 1, w->dkv, width);
  /* q's copy has served: its room takes dq */
  wn_product(false, false, n_heads, width, n, 1, w->dp, pitch, w->kv, width, 0, w->q, width);
  for (int64_t h = 0; h < n_heads; h++)
    memcpy(wn_head_row(in->dq, i, h), w->q + h * width, (size_t)width * sizeof(wn_real));
  const int32_t *pick = wn_row_i32(in->selection, i);
  for (int32_t j = 0; j < n; j++) {
    wn_real *restrict out = dkv + pick[j] * width;
    const wn_real *restrict from = w->dkv + j * width;
    for (int64_t c = 0; c < width; c++) out[c] += from[c];
  }
}

static inputs checked(const wn_tensor *q, const wn_tensor *kv, const wn_tensor *selection, const wn_rows *rows,
                      const wn_attention_params *params) {
  WN_EXPECT(q, WN_REAL_DTYPE, 3, rows->n_rows, q->dim[1], q->dim[2]);
  WN_EXPECT(kv, WN_REAL_DTYPE, 2, rows->n_keys, q->dim[2]);
  WN_EXPECT(selection, WN_I32, 2, rows->n_rows, selection->dim[1]);
  WN_ASSERT(params->v_width >= 1 && params->v_width <= q->dim[2], "v_width %d of %lld", params->v_width,
            (long long)q->dim[2]);
  return (inputs){.q = q,
                  .kv = kv,
                  .selection = selection,
                  .rows = rows,
                  .n_heads = q->dim[1],
                  .width = q->dim[2],
                  .v_width = params->v_width,
                  .pitch = wn_pad_lanes(selection->dim[1]),
                  .scale = (wn_real)params->scale};
}

wn_status WN_CPU(attention_sparse)(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                   const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *kv,
                                   const wn_tensor *selection, const wn_rows *rows, const wn_attention_params *params) {
  inputs in = checked(q, kv, selection, rows, params);
  int64_t n = rows->n_rows;
  WN_EXPECT(o, WN_REAL_DTYPE, 3, n, in.n_heads, in.v_width);
  WN_EXPECT(lse, WN_REAL_DTYPE, 2, n, in.n_heads);
  WN_ASSERT(!delta == !d_o, "delta and d_o come together");
  if (delta) {
    WN_EXPECT(delta, WN_REAL_DTYPE, 2, n, in.n_heads);
    WN_EXPECT(d_o, WN_REAL_DTYPE, 3, n, in.n_heads, in.v_width);
  }
  in.o = o;
  in.lse_out = lse;
  in.delta_out = delta;
  in.d_o = d_o;
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  wn_carver count = {0};
  workspace counted;
  lay_out(&counted, &count, &in);
  void *memory;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &memory, "sparse attention rows", count.used * (size_t)device->threads));
  if (device->dry) goto done;
#pragma omp parallel num_threads(device->threads)
  {
    workspace w;
    wn_carver carver = {.base = (char *)memory + count.used * (size_t)omp_get_thread_num()};
    lay_out(&w, &carver, &in);
#pragma omp for schedule(dynamic, ROWS)
    for (int64_t i = 0; i < n; i++) forward_row(&w, &in, i);
  }
done:
  wn_arena_release(device->scratch, mark);
  return status;
}

wn_status WN_CPU(attention_sparse_backward)(wn_device *device, wn_tensor *dq, wn_tensor *dkv, wn_tensor *p,
                                            const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *kv,
                                            const wn_tensor *selection, const wn_tensor *lse, const wn_tensor *delta,
                                            const wn_rows *rows, const wn_attention_params *params) {
  inputs in = checked(q, kv, selection, rows, params);
  int64_t n = rows->n_rows;
  WN_EXPECT(lse, WN_REAL_DTYPE, 2, n, in.n_heads);
  WN_ASSERT(!dq == !dkv && !dq == !d_o && !dq == !delta, "dq, dkv, d_o and delta come together");
  if (dq) {
    WN_EXPECT(dq, WN_REAL_DTYPE, 3, n, in.n_heads, in.width);
    WN_EXPECT(dkv, WN_REAL_DTYPE, 2, rows->n_keys, in.width);
    WN_EXPECT(d_o, WN_REAL_DTYPE, 3, n, in.n_heads, in.v_width);
    WN_EXPECT(delta, WN_REAL_DTYPE, 2, n, in.n_heads);
  }
  if (p) WN_EXPECT(p, WN_REAL_DTYPE, 2, n, selection->dim[1]);
  in.lse = lse;
  in.delta = delta;
  in.d_o = d_o;
  in.dq = dq;
  in.p_mean = p;
  int64_t n_groups = wn_cpu_min(wn_cpu_blocks(n, GROUP_ROWS), MAX_GROUPS);
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  wn_carver count = {0};
  workspace counted;
  lay_out(&counted, &count, &in);
  void *memory;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &memory, "sparse attention rows", count.used * (size_t)device->threads));
  wn_partials partials = {0};
  if (dq) WN_TRY_GOTO(status, done, wn_partials_create(device, &partials, n_groups, rows->n_keys, in.width));
  if (device->dry) goto done;
#pragma omp parallel num_threads(device->threads)
  {
    workspace w;
    wn_carver carver = {.base = (char *)memory + count.used * (size_t)omp_get_thread_num()};
    lay_out(&w, &carver, &in);
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < n_groups; group++) {
      wn_real *share = dq ? wn_partials_begin(&partials, group) : NULL;
      for (int64_t i = n * group / n_groups; i < n * (group + 1) / n_groups; i++) backward_row(&w, &in, i, share);
    }
  }
  if (dq) wn_partials_add(device, &partials, dkv);
done:
  wn_arena_release(device->scratch, mark);
  return status;
}
