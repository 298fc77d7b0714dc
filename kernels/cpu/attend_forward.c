/* Tiles are held transposed, [key][query row]: a tile's products are then K Q^T with Q^T laid out once per
 * block, and P^T^T V, both in the orders BLAS is fast at; and the softmax runs down the keys with one query
 * row per vector lane, without a single horizontal sum. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/attend.h"

typedef struct workspace {
  wn_key_walk walk;
  wn_real *q_t;               /* [dq][lanes] */
  wn_real *s;                 /* [keys][lanes]: logits, then probabilities */
  wn_real *o;                 /* [lanes][dv], not yet divided by the sum */
  wn_real *k, *v;             /* gathered keys and values of a tile, with a selection */
  wn_real *top, *sum, *decay; /* [lanes]: running maximum and sum; factor on what was summed before */
} workspace;

static void lay_out(workspace *w, wn_carver *carver, const wn_attend *a) {
  int64_t dq = a->q->dim[2], dv = a->v->dim[2];
  wn_walk_take(&w->walk, carver, a->selection, a->rows->n_keys);
  w->q_t = wn_take_reals(carver, dq * WN_Q_BLOCK);
  w->s = wn_take_reals(carver, WN_K_TILE * WN_Q_BLOCK);
  w->o = wn_take_reals(carver, WN_Q_BLOCK * dv);
  w->k = a->selection ? wn_take_reals(carver, WN_K_TILE * dq) : NULL;
  w->v = a->selection ? wn_take_reals(carver, WN_K_TILE * dv) : NULL;
  w->top = wn_take_reals(carver, WN_Q_BLOCK);
  w->sum = wn_take_reals(carver, WN_Q_BLOCK);
  w->decay = wn_take_reals(carver, WN_Q_BLOCK);
}

/* Logits of a tile to probabilities relative to the running maximum; top, sum and decay advance. */
static void tile_softmax(wn_real *restrict s, const wn_real *restrict mask, int32_t n_keys, int32_t lanes,
                         wn_real *restrict top, wn_real *restrict sum, wn_real *restrict decay) {
  wn_real high[WN_Q_BLOCK], tile_sum[WN_Q_BLOCK];
  memcpy(high, top, sizeof high);
  memset(tile_sum, 0, sizeof tile_sum);
  for (int32_t j = 0; j < n_keys; j++) {
    wn_real *restrict row = s + j * lanes;
    if (mask) {
      const wn_real *restrict seen = mask + j * lanes;
#pragma omp simd
      for (int32_t i = 0; i < lanes; i++) row[i] = seen[i] != 0 ? row[i] : WN_MASKED_LOGIT;
    }
#pragma omp simd
    for (int32_t i = 0; i < lanes; i++) high[i] = row[i] > high[i] ? row[i] : high[i];
  }
#pragma omp simd
  for (int32_t i = 0; i < lanes; i++) decay[i] = wn_exp(top[i] - high[i]);
  for (int32_t j = 0; j < n_keys; j++) {
    wn_real *restrict row = s + j * lanes;
#pragma omp simd
    for (int32_t i = 0; i < lanes; i++) row[i] = wn_exp(row[i] - high[i]);
    if (mask) {
      const wn_real *restrict seen = mask + j * lanes;
#pragma omp simd
      for (int32_t i = 0; i < lanes; i++) row[i] = seen[i] != 0 ? row[i] : 0;
    }
#pragma omp simd
    for (int32_t i = 0; i < lanes; i++) tile_sum[i] += row[i];
  }
#pragma omp simd
  for (int32_t i = 0; i < lanes; i++) {
    sum[i] = sum[i] * decay[i] + tile_sum[i];
    top[i] = high[i];
  }
}

void WN_CPU(gather_keys)(wn_real *out, const wn_tensor *from, int64_t h, const wn_key_walk *walk) {
  int64_t width = from->dim[2];
  for (int32_t j = 0; j < walk->n_keys; j++)
    memcpy(out + j * width, wn_head_row(from, walk->keys[j], h), (size_t)width * sizeof(wn_real));
}

/* The order of this sum is that of the compiler's vectors: one function, so that there is one order. */
__attribute__((noinline)) static wn_real row_delta(const wn_real *o, const wn_real *d_o, int64_t n) {
  wn_real dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t c = 0; c < n; c++) dot += d_o[c] * o[c];
  return dot;
}

static void finish_rows(const workspace *w, int64_t h, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                        const wn_tensor *d_o) {
  int64_t dv = o->dim[2];
  for (int32_t i = 0; i < w->walk.n_rows; i++) {
    int64_t row = w->walk.row0 + i;
    wn_real *out = wn_head_row(o, row, h);
    const wn_real *raw = w->o + i * dv;
    bool empty = w->walk.first[i] > w->walk.last[i] || w->top[i] == WN_MASKED_LOGIT;
    wn_real inverse = empty ? 0 : 1 / w->sum[i];
    for (int64_t c = 0; c < dv; c++) out[c] = raw[c] * inverse;
    wn_row(lse, row)[h] = empty ? -(wn_real)INFINITY : w->top[i] + wn_real_log(w->sum[i]);
    if (!delta) continue;
    wn_row(delta, row)[h] = row_delta(out, wn_head_row(d_o, row, h), dv);
  }
}

static void attend_block(workspace *w, const wn_attend *a, int64_t h, int64_t row0, int32_t n_rows, wn_tensor *o,
                         wn_tensor *lse, wn_tensor *delta, const wn_tensor *d_o) {
  wn_key_walk *walk = &w->walk;
  wn_walk_begin(walk, a->rows, row0, n_rows);
  int64_t dq = a->q->dim[2], dv = a->v->dim[2], lanes = walk->lanes;
  wn_transpose(w->q_t, lanes, wn_head_row(a->q, row0, h), a->q->stride[0], n_rows, dq);
  memset(w->o, 0, (size_t)(lanes * dv) * sizeof(wn_real));
  for (int64_t i = 0; i < WN_Q_BLOCK; i++) {
    w->top[i] = WN_MASKED_LOGIT;
    w->sum[i] = 0;
  }
  while (wn_walk_next(walk)) {
    if (walk->keys) {
      WN_CPU(gather_keys)(w->k, a->k, h, walk);
      WN_CPU(gather_keys)(w->v, a->v, h, walk);
    }
    const wn_real *k = walk->keys ? w->k : wn_head_row(a->k, walk->key0, h);
    const wn_real *v = walk->keys ? w->v : wn_head_row(a->v, walk->key0, h);
    wn_product(false, false, walk->n_keys, lanes, dq, a->scale, k, walk->keys ? dq : a->k->stride[0], w->q_t, lanes, 0,
               w->s, lanes);
    tile_softmax(w->s, walk->partial ? walk->mask : NULL, walk->n_keys, walk->lanes, w->top, w->sum, w->decay);
    for (int64_t i = 0; i < n_rows; i++) {
      if (w->decay[i] == 1) continue;
      for (int64_t c = 0; c < dv; c++) w->o[i * dv + c] *= w->decay[i];
    }
    wn_product(true, false, n_rows, dv, walk->n_keys, 1, w->s, lanes, v, walk->keys ? dv : a->v->stride[0], 1, w->o,
               dv);
  }
  finish_rows(w, h, o, lse, delta, d_o);
}

wn_status WN_CPU(attend)(wn_device *device, const wn_attend *attend, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                         const wn_tensor *d_o) {
  int64_t n = attend->rows->n_rows, n_heads = attend->q->dim[1], n_blocks = wn_cpu_blocks(n, WN_Q_BLOCK);
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  wn_carver count = {0};
  workspace counted;
  lay_out(&counted, &count, attend);
  void *memory;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &memory, "attention tiles", count.used * (size_t)device->threads));
  if (device->dry) goto done;
#pragma omp parallel num_threads(device->threads)
  {
    workspace w;
    wn_carver carver = {.base = (char *)memory + count.used * (size_t)omp_get_thread_num()};
    lay_out(&w, &carver, attend);
    /* the last blocks see most keys: they go first, so that no thread is left with a long one */
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < n_blocks * n_heads; task++) {
      int64_t row0 = (n_blocks - 1 - task / n_heads) * WN_Q_BLOCK;
      attend_block(&w, attend, task % n_heads, row0, (int32_t)wn_cpu_min(WN_Q_BLOCK, n - row0), o, lse, delta, d_o);
    }
  }
done:
  wn_arena_release(device->scratch, mark);
  return status;
}

wn_status WN_CPU(attention_delta)(wn_device *device, wn_tensor *delta, wn_tensor *o, const wn_tensor *unrounded,
                                  const wn_tensor *d_o) {
  int64_t n = unrounded->dim[0], heads = unrounded->dim[1], width = unrounded->dim[2];
  WN_EXPECT(delta, WN_REAL_DTYPE, 2, n, heads);
  WN_EXPECT(o, WN_REAL_DTYPE, 3, n, heads, width);
  WN_EXPECT(unrounded, WN_REAL_DTYPE, 3, n, heads, width);
  WN_EXPECT(d_o, WN_REAL_DTYPE, 3, n, heads, width);
  if (device->dry) return NULL;
#pragma omp parallel for num_threads(device->threads) schedule(static)
  for (int64_t row = 0; row < n; row++)
    for (int64_t h = 0; h < heads; h++) {
      const wn_real *from = wn_head_row(unrounded, row, h);
      memcpy(wn_head_row(o, row, h), from, (size_t)width * sizeof *from);
      wn_row(delta, row)[h] = row_delta(from, wn_head_row(d_o, row, h), width);
    }
  return NULL;
}
