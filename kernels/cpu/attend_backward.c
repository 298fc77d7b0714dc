/* One task per head, which walks the query blocks in order: dk and dv are summed in that order whatever the
 * number of threads. P is made again from the saved log-sum-exp. Tiles are transposed as in attend_forward.c.
 */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/attend.h"

typedef struct workspace {
  wn_key_walk walk;
  wn_real *q_t, *do_t;      /* [dq][lanes], [dv][lanes] */
  wn_real *p, *dp;          /* [keys][lanes] */
  wn_real *dq;              /* [lanes][dq] */
  wn_real *k, *v, *dk, *dv; /* a tile's gathered keys, values and their gradients, with a selection */
  wn_real *lse, *delta;     /* [lanes] */
} workspace;

typedef struct gradients {
  wn_tensor *dq, *dk, *dv;
  wn_real *p_of_head; /* [H][n][k]; NULL: not wanted */
  const wn_tensor *d_o, *lse, *delta;
} gradients;

static void lay_out(workspace *w, wn_carver *carver, const wn_attend *a) {
  int64_t dq = a->q->dim[2], dv = a->v->dim[2], gathered = a->selection ? WN_K_TILE : 0;
  wn_walk_take(&w->walk, carver, a->selection, a->rows->n_keys);
  w->q_t = wn_take_reals(carver, dq * WN_Q_BLOCK);
  w->do_t = wn_take_reals(carver, dv * WN_Q_BLOCK);
  w->p = wn_take_reals(carver, WN_K_TILE * WN_Q_BLOCK);
  w->dp = wn_take_reals(carver, WN_K_TILE * WN_Q_BLOCK);
  w->dq = wn_take_reals(carver, WN_Q_BLOCK * dq);
  w->k = wn_take_reals(carver, gathered * dq);
  w->v = wn_take_reals(carver, gathered * dv);
  w->dk = wn_take_reals(carver, gathered * dq);
  w->dv = wn_take_reals(carver, gathered * dv);
  w->lse = wn_take_reals(carver, WN_Q_BLOCK);
  w->delta = wn_take_reals(carver, WN_Q_BLOCK);
}

static void tile_probabilities(wn_real *restrict s, const wn_real *restrict mask, int32_t n_keys, int32_t lanes,
                               const wn_real *restrict lse) {
  for (int32_t j = 0; j < n_keys; j++) {
    wn_real *restrict row = s + j * lanes;
#pragma omp simd
    for (int32_t i = 0; i < lanes; i++) row[i] = wn_exp(row[i] - lse[i]);
    if (!mask) continue;
    const wn_real *restrict seen = mask + j * lanes;
#pragma omp simd
    for (int32_t i = 0; i < lanes; i++) row[i] = seen[i] != 0 ? row[i] : 0;
  }
}

/* dp becomes the gradient of the unscaled products; a masked pair's stays exactly 0 */
static void tile_logit_gradients(wn_real *restrict dp, const wn_real *restrict p, int32_t n_keys, int32_t lanes,
                                 const wn_real *restrict delta, wn_real scale) {
  for (int32_t j = 0; j < n_keys; j++) {
    wn_real *restrict d = dp + j * lanes;
    const wn_real *restrict weight = p + j * lanes;
#pragma omp simd
    for (int32_t i = 0; i < lanes; i++) d[i] = weight[i] != 0 ? weight[i] * (d[i] - delta[i]) * scale : 0;
  }
}

static void scatter_add(wn_tensor *to, int64_t h, const wn_key_walk *walk, const wn_real *from) {
  int64_t width = to->dim[2];
  for (int32_t j = 0; j < walk->n_keys; j++) {
    wn_real *out = wn_head_row(to, walk->keys[j], h);
    for (int64_t c = 0; c < width; c++) out[c] += from[j * width + c];
  }
}

static void keep_probabilities(const workspace *w, const wn_attend *a, int64_t h, const gradients *g) {
  const wn_key_walk *walk = &w->walk;
  int64_t n = a->rows->n_rows, k = a->selection->dim[1];
  for (int32_t i = 0; i < walk->n_rows; i++) {
    const int32_t *pick = wn_row_i32(a->selection, walk->row0 + i);
    wn_real *out = g->p_of_head + (h * n + walk->row0 + i) * k;
    for (int32_t s = walk->slot[i]; s < walk->slot_end[i]; s++) {
      int32_t j = walk->place[pick[s] - walk->low] - walk->key0;
      out[s] = w->p[j * walk->lanes + i];
    }
  }
}

static void tile_gradients(workspace *w, const wn_attend *a, int64_t h, const gradients *g) {
  const wn_key_walk *walk = &w->walk;
  int64_t dq = a->q->dim[2], dv = a->v->dim[2], lanes = walk->lanes, n_rows = walk->n_rows, n_keys = walk->n_keys;
  bool gathered = walk->keys != NULL;
  if (gathered) WN_CPU(gather_keys)(w->v, a->v, h, walk);
  const wn_real *v = gathered ? w->v : wn_head_row(a->v, walk->key0, h);
  const wn_real *k = gathered ? w->k : wn_head_row(a->k, walk->key0, h);
  wn_product(false, false, n_keys, lanes, dv, 1, v, gathered ? dv : a->v->stride[0], w->do_t, lanes, 0, w->dp, lanes);
  tile_logit_gradients(w->dp, w->p, walk->n_keys, walk->lanes, w->delta, a->scale);
  wn_product(false, false, n_keys, dv, n_rows, 1, w->p, lanes, wn_head_row(g->d_o, walk->row0, h), g->d_o->stride[0],
             gathered ? 0 : 1, gathered ? w->dv : wn_head_row(g->dv, walk->key0, h), gathered ? dv : g->dv->stride[0]);
  wn_product(false, false, n_keys, dq, n_rows, 1, w->dp, lanes, wn_head_row(a->q, walk->row0, h), a->q->stride[0],
             gathered ? 0 : 1, gathered ? w->dk : wn_head_row(g->dk, walk->key0, h), gathered ? dq : g->dk->stride[0]);
  wn_product(true, false, n_rows, dq, n_keys, 1, w->dp, lanes, k, gathered ? dq : a->k->stride[0], 1, w->dq, dq);
  if (!gathered) return;
  scatter_add(g->dv, h, walk, w->dv);
  scatter_add(g->dk, h, walk, w->dk);
}

static void block_gradients(workspace *w, const wn_attend *a, int64_t h, int64_t row0, int32_t n_rows,
                            const gradients *g) {
  wn_key_walk *walk = &w->walk;
  wn_walk_begin(walk, a->rows, row0, n_rows);
  int64_t dq = a->q->dim[2], dv = a->v->dim[2], lanes = walk->lanes;
  wn_transpose(w->q_t, lanes, wn_head_row(a->q, row0, h), a->q->stride[0], n_rows, dq);
  if (g->dq) {
    wn_transpose(w->do_t, lanes, wn_head_row(g->d_o, row0, h), g->d_o->stride[0], n_rows, dv);
    memset(w->dq, 0, (size_t)(lanes * dq) * sizeof(wn_real));
  }
  for (int32_t i = 0; i < walk->lanes; i++) {
    w->lse[i] = i < n_rows ? wn_row(g->lse, row0 + i)[h] : 0;
    w->delta[i] = g->dq && i < n_rows ? wn_row(g->delta, row0 + i)[h] : 0;
  }
  while (wn_walk_next(walk)) {
    if (walk->keys) WN_CPU(gather_keys)(w->k, a->k, h, walk);
    const wn_real *k = walk->keys ? w->k : wn_head_row(a->k, walk->key0, h);
    wn_product(false, false, walk->n_keys, lanes, dq, a->scale, k, walk->keys ? dq : a->k->stride[0], w->q_t, lanes, 0,
               w->p, lanes);
    tile_probabilities(w->p, walk->partial ? walk->mask : NULL, walk->n_keys, walk->lanes, w->lse);
    if (g->p_of_head) keep_probabilities(w, a, h, g);
    if (g->dq) tile_gradients(w, a, h, g);
  }
  for (int32_t i = 0; g->dq && i < n_rows; i++)
    memcpy(wn_head_row(g->dq, row0 + i, h), w->dq + i * dq, (size_t)dq * sizeof(wn_real));
}

/* p = mean over heads, summed in head order */
static void average_heads(wn_device *device, wn_tensor *p, const wn_real *p_of_head, const wn_attend *a) {
  int64_t n = a->rows->n_rows, k = p->dim[1], n_heads = a->q->dim[1];
#pragma omp parallel for num_threads(device->threads) schedule(static)
  for (int64_t i = 0; i < n; i++) {
    const int32_t *pick = wn_row_i32(a->selection, i);
    wn_real *out = wn_row(p, i);
    for (int64_t s = 0; s < k; s++) {
      wn_real sum = 0;
      for (int64_t h = 0; pick[s] >= 0 && h < n_heads; h++) sum += p_of_head[(h * n + i) * k + s];
      out[s] = sum / (wn_real)n_heads;
    }
  }
}

wn_status WN_CPU(attend_backward)(wn_device *device, const wn_attend *attend, wn_tensor *dq, wn_tensor *dk,
                                  wn_tensor *dv, wn_tensor *p, const wn_tensor *d_o, const wn_tensor *lse,
                                  const wn_tensor *delta) {
  int64_t n = attend->rows->n_rows, n_heads = attend->q->dim[1];
  gradients g = {.dq = dq, .dk = dk, .dv = dv, .d_o = d_o, .lse = lse, .delta = delta};
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  wn_carver count = {0};
  workspace counted;
  lay_out(&counted, &count, attend);
  void *memory, *p_of_head = NULL;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &memory, "attention tiles", count.used * (size_t)device->threads));
  if (p)
    WN_TRY_GOTO(status, done,
                wn_arena_alloc(device->scratch, &p_of_head, "attention probabilities",
                               (size_t)(n_heads * n * p->dim[1]) * sizeof(wn_real)));
  g.p_of_head = p_of_head;
  if (device->dry) goto done;
#pragma omp parallel num_threads(device->threads)
  {
    workspace w;
    wn_carver carver = {.base = (char *)memory + count.used * (size_t)omp_get_thread_num()};
    lay_out(&w, &carver, attend);
#pragma omp for schedule(dynamic, 1)
    for (int64_t h = 0; h < n_heads; h++)
      for (int64_t row0 = 0; row0 < n; row0 += WN_Q_BLOCK)
        block_gradients(&w, attend, h, row0, (int32_t)wn_cpu_min(WN_Q_BLOCK, n - row0), &g);
  }
  if (p) average_heads(device, p, g.p_of_head, attend);
done:
  wn_arena_release(device->scratch, mark);
  return status;
}
