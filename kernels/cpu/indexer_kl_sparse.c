/* Stage 2's loss on the selected set, row by row: p is given, the picks' keys are gathered once a row, and dk
 * is summed by groups of rows (tile.h, partials). */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/indexer.h"
#include "kernels/cpu/index_score.h"

enum { MAX_GROUPS = 8, GROUP_ROWS = 32 };

typedef struct inputs {
  const wn_tensor *q, *k, *w, *selection, *p;
  const wn_rows *rows;
  const wn_indexer_params *params;
  wn_tensor *kl, *dq, *dw;
  int64_t n_heads, width, pitch; /* pitch: k padded, the row stride of z */
} inputs;

typedef struct workspace {
  wn_real *q;             /* [HI][dI]; then dq */
  wn_real *keys, *d_keys; /* [k][dI] */
  wn_real *z;             /* [HI][pitch]; then the gradients of q.k */
  wn_real *index, *gain;  /* [pitch]: I and softmax(I) - p */
} workspace;

static void lay_out(workspace *w, wn_carver *carver, const inputs *in) {
  int64_t k = in->selection->dim[1];
  w->q = wn_take_reals(carver, in->n_heads * in->width);
  w->keys = wn_take_reals(carver, k * in->width);
  w->d_keys = wn_take_reals(carver, k * in->width);
  w->z = wn_take_reals(carver, in->n_heads * in->pitch);
  w->index = wn_take_reals(carver, in->pitch);
  w->gain = wn_take_reals(carver, in->pitch);
}

/* Number of picks of row i, whose keys, z and I are made when there are at least two. */
static int32_t row_scores(workspace *w, const inputs *in, int64_t i) {
  const int32_t *pick = wn_row_i32(in->selection, i);
  int32_t k = (int32_t)in->selection->dim[1], n = 0;
  for (; n < k && pick[n] >= 0; n++) {
    WN_ASSERT(pick[n] >= in->rows->first_key[i] && pick[n] <= in->rows->last_key[i],
              "row %lld picks key %d, sees %d .. %d", (long long)i, pick[n], in->rows->first_key[i],
              in->rows->last_key[i]);
    memcpy(w->keys + n * in->width, wn_row(in->k, pick[n]), (size_t)in->width * sizeof(wn_real));
  }
  if (n < 2) return n;
  for (int64_t h = 0; h < in->n_heads; h++)
    memcpy(w->q + h * in->width, wn_head_row(in->q, i, h), (size_t)in->width * sizeof(wn_real));
  wn_product(false, true, in->n_heads, n, in->width, (wn_real)in->params->scale, w->q, in->width, w->keys, in->width, 0,
             w->z, in->pitch);
  memset(w->index, 0, (size_t)in->pitch * sizeof(wn_real));
  for (int64_t h = 0; h < in->n_heads; h++) {
    const wn_real *restrict z = w->z + h * in->pitch;
    wn_real *restrict index = w->index;
    const wn_real weight = wn_row(in->w, i)[h];
    for (int32_t j = 0; j < n; j++) index[j] += weight * (z[j] <= 0 ? 0 : z[j]);
  }
  for (int64_t j = n; j < wn_pad_lanes(n); j++) w->index[j] = WN_MASKED_LOGIT;
  return n;
}

/* kl of the row; gain = softmax(I) - p */
static double row_loss(workspace *w, const inputs *in, int64_t i, int32_t n) {
  const wn_real *restrict p = wn_row(in->p, i), *restrict index = w->index;
  wn_real *restrict gain = w->gain;
  int32_t padded = (int32_t)wn_pad_lanes(n);
  wn_real top = index[0];
#pragma omp simd reduction(max : top)
  for (int32_t j = 0; j < n; j++) top = index[j] > top ? index[j] : top;
  double sum = 0, kl = 0;
#pragma omp simd reduction(+ : sum)
  for (int32_t j = 0; j < padded; j++) {
    gain[j] = wn_exp(index[j] - top);
    sum += (double)gain[j];
  }
  const wn_real inverse = (wn_real)(1 / sum);
  double p_sum = 0;
#pragma omp simd reduction(+ : kl, p_sum)
  for (int32_t j = 0; j < n; j++) {
    wn_real term = p[j] > 0 ? p[j] * (wn_log(p[j]) - (index[j] - top)) : 0;
    kl += (double)term;
    p_sum += (double)p[j];
    gain[j] = gain[j] * inverse - p[j];
  }
  return kl + log(sum) * p_sum;
}

static void row_gradients(workspace *w, const inputs *in, int64_t i, int32_t n, wn_real *dk) {
  int64_t width = in->width;
  const wn_real *restrict gain = w->gain;
  for (int64_t h = 0; h < in->n_heads; h++) {
    wn_real *restrict z = w->z + h * in->pitch;
    const wn_real factor = (wn_real)(in->params->coeff * in->params->scale) * wn_row(in->w, i)[h];
    wn_real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int32_t j = 0; j < n; j++) {
      sum += z[j] > 0 ? gain[j] * z[j] : 0;
      z[j] = z[j] > 0 ? gain[j] * factor : 0;
    }
    wn_row(in->dw, i)[h] = (wn_real)in->params->coeff * sum;
  }
  wn_product(true, false, n, width, in->n_heads, 1, w->z, in->pitch, w->q, width, 0, w->d_keys, width);
  wn_product(false, false, in->n_heads, width, n, 1, w->z, in->pitch, w->keys, width, 0, w->q, width);
  for (int64_t h = 0; h < in->n_heads; h++)
    memcpy(wn_head_row(in->dq, i, h), w->q + h * width, (size_t)width * sizeof(wn_real));
  const int32_t *pick = wn_row_i32(in->selection, i);
  for (int32_t j = 0; j < n; j++) {
    wn_real *restrict out = dk + pick[j] * width;
    const wn_real *restrict from = w->d_keys + j * width;
    for (int64_t c = 0; c < width; c++) out[c] += from[c];
  }
}

static void row_kl(workspace *w, const inputs *in, int64_t i, wn_real *dk) {
  int32_t n = row_scores(w, in, i);
  if (n < 2) {
    *wn_row(in->kl, i) = 0;
    for (int64_t h = 0; in->dq && h < in->n_heads; h++) {
      memset(wn_head_row(in->dq, i, h), 0, (size_t)in->width * sizeof(wn_real));
      wn_row(in->dw, i)[h] = 0;
    }
    return;
  }
  *wn_row(in->kl, i) = (wn_real)row_loss(w, in, i, n);
  if (in->dq) row_gradients(w, in, i, n, dk);
}

static void check(const inputs *in, const wn_tensor *dk) {
  int64_t n = in->rows->n_rows;
  WN_CPU(expect_indexer)(in->q, in->k, in->w, in->rows);
  WN_EXPECT(in->kl, WN_REAL_DTYPE, 1, n);
  WN_EXPECT(in->selection, WN_I32, 2, n, in->selection->dim[1]);
  WN_EXPECT(in->p, WN_REAL_DTYPE, 2, n, in->selection->dim[1]);
  WN_ASSERT(!in->dq == !dk && !in->dq == !in->dw, "dq, dk and dw come together");
  if (!in->dq) return;
  WN_EXPECT(in->dq, WN_REAL_DTYPE, 3, n, in->n_heads, in->width);
  WN_EXPECT(dk, WN_REAL_DTYPE, 2, in->rows->n_keys, in->width);
  WN_EXPECT(in->dw, WN_REAL_DTYPE, 2, n, in->n_heads);
}

wn_status WN_CPU(indexer_kl_sparse)(wn_device *device, wn_tensor *kl, wn_tensor *dq, wn_tensor *dk, wn_tensor *dw,
                                    const wn_tensor *q, const wn_tensor *k, const wn_tensor *w,
                                    const wn_tensor *selection, const wn_tensor *p, const wn_rows *rows,
                                    const wn_indexer_params *params) {
  inputs in = {.q = q,
               .k = k,
               .w = w,
               .selection = selection,
               .p = p,
               .rows = rows,
               .params = params,
               .kl = kl,
               .dq = dq,
               .dw = dw,
               .n_heads = q->dim[1],
               .width = q->dim[2],
               .pitch = wn_pad_lanes(selection->dim[1])};
  check(&in, dk);
  int64_t n = rows->n_rows, n_groups = wn_cpu_min(wn_cpu_blocks(n, GROUP_ROWS), MAX_GROUPS);
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  wn_carver count = {0};
  workspace counted;
  lay_out(&counted, &count, &in);
  void *memory;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &memory, "indexer rows", count.used * (size_t)device->threads));
  wn_partials partials = {0};
  if (dq) WN_TRY_GOTO(status, done, wn_partials_create(device, &partials, n_groups, rows->n_keys, in.width));
  if (device->dry) goto done;
#pragma omp parallel num_threads(device->threads)
  {
    workspace work;
    wn_carver carver = {.base = (char *)memory + count.used * (size_t)omp_get_thread_num()};
    lay_out(&work, &carver, &in);
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < n_groups; group++) {
      wn_real *share = dq ? wn_partials_begin(&partials, group) : NULL;
      for (int64_t i = n * group / n_groups; i < n * (group + 1) / n_groups; i++) row_kl(&work, &in, i, share);
    }
  }
  if (dq) wn_partials_add(device, &partials, dk);
done:
  wn_arena_release(device->scratch, mark);
  return status;
}
