/* Stage 1's loss and its gradient, in one pass over key tiles for each block of rows, after a first pass that
 * finds the log-sum-exp of the row's scores. P comes from the attention's saved log-sum-exp, so it needs no
 * first pass of its own. Blocks of rows are dealt to a fixed number of groups; each sums its share of dk, and
 * the shares are added in order. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/index_score.h"
#include "kernels/cpu/indexer.h"

enum { ROWS = 32, MAX_GROUPS = 16 };

typedef struct inputs {
  const wn_tensor *q, *k, *w, *qa, *ka, *lse;
  const wn_rows *rows;
  const wn_indexer_params *params;
  wn_index_keys keys;
  wn_tensor *kl, *dq, *dw;
} inputs;

typedef struct workspace {
  wn_real *score;                        /* [keys]: one row, first pass */
  wn_real *q, *dq;                       /* [ROWS * HI][dI] */
  wn_real *p, *logit, *index, *z, *gain; /* [ROWS or 1][tile]: p, one head's logits, I; [HI][tile]: z; g for a row */
  wn_real *g_z;                          /* [ROWS * HI][tile]: gradients of q.k */
  double *dw;                            /* [ROWS * HI] */
  double kl[ROWS];
  wn_real top[ROWS], log_sum[ROWS]; /* log-sum-exp of I in two parts: their rounded sum would cost digits of q - p */
  int32_t first[ROWS], end[ROWS];   /* rows that have no loss: 0, 0 */
} workspace;

static void lay_out(workspace *w, wn_carver *carver, const inputs *in) {
  int64_t n_heads = in->q->dim[1], width = in->q->dim[2];
  w->score = wn_take_reals(carver, in->keys.n_panels * WN_PANEL);
  w->q = wn_take_reals(carver, ROWS * n_heads * width);
  w->dq = wn_take_reals(carver, ROWS * n_heads * width);
  w->p = wn_take_reals(carver, ROWS * WN_K_TILE);
  w->logit = wn_take_reals(carver, ROWS * WN_K_TILE);
  w->index = wn_take_reals(carver, WN_K_TILE);
  w->z = wn_take_reals(carver, n_heads * WN_K_TILE);
  w->gain = wn_take_reals(carver, WN_K_TILE);
  w->g_z = wn_take_reals(carver, ROWS * n_heads * WN_K_TILE);
  w->dw = WN_CPU(take)(carver, (size_t)(ROWS * n_heads) * sizeof(double));
}

/* log-sum-exp of score[0 .. count-1] is top + log_sum */
static void log_sum_exp(const wn_real *score, int32_t count, wn_real *top_out, wn_real *log_sum) {
  wn_real top = score[0];
#pragma omp simd reduction(max : top)
  for (int32_t j = 0; j < count; j++) top = score[j] > top ? score[j] : top;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int32_t j = 0; j < count; j++) sum += (double)wn_exp(score[j] - top);
  *top_out = top;
  *log_sum = (wn_real)log(sum);
}

static void begin_block(workspace *w, const inputs *in, int64_t row0, int32_t n_rows) {
  int64_t n_heads = in->q->dim[1], width = in->q->dim[2];
  for (int32_t r = 0; r < n_rows; r++) {
    int64_t i = row0 + r;
    int32_t first = in->rows->first_key[i], last = in->rows->last_key[i];
    w->kl[r] = 0;
    for (int64_t h = 0; h < n_heads; h++) {
      w->dw[r * n_heads + h] = 0;
      memcpy(w->q + (r * n_heads + h) * width, wn_head_row(in->q, i, h), (size_t)width * sizeof(wn_real));
    }
    w->first[r] = w->end[r] = 0;
    if (last - first < 1) continue;
    w->first[r] = first;
    w->end[r] = last + 1;
    wn_index_row row = wn_index_row_of(in->q, in->w, i, in->params);
    int32_t origin = wn_panel_floor(&in->keys, first);
    wn_index_score(w->score, NULL, 0, &row, &in->keys, origin, first, last + 1);
    log_sum_exp(w->score + (first - origin), last + 1 - first, &w->top[r], &w->log_sum[r]);
  }
  memset(w->dq, 0, (size_t)(ROWS * n_heads * width) * sizeof(wn_real));
}

/* p[r][key - tile] summed over heads; what no row sees is made of padding or not read again */
static void tile_target(workspace *w, const inputs *in, int64_t row0, int32_t n_rows, int32_t tile, int32_t low,
                        int32_t end) {
  int64_t n_keys = end - low, width = in->qa->dim[2];
  memset(w->p, 0, (size_t)n_rows * WN_K_TILE * sizeof(wn_real));
  for (int64_t h = 0; h < in->qa->dim[1]; h++) {
    wn_product(false, true, n_rows, n_keys, width, (wn_real)in->params->attention_scale, wn_head_row(in->qa, row0, h),
               in->qa->stride[0], wn_head_row(in->ka, low, wn_key_head(in->ka, h)), in->ka->stride[0], 0,
               w->logit + (low - tile), WN_K_TILE);
    for (int32_t r = 0; r < n_rows; r++) {
      int32_t from = wn_max_i32(w->first[r], tile) - tile, to = wn_min_i32(w->end[r], end) - tile;
      if (from >= to) continue;
      wn_real *restrict p = w->p + r * WN_K_TILE;
      const wn_real *restrict logit = w->logit + r * WN_K_TILE;
      const wn_real lse = wn_row(in->lse, row0 + r)[h];
      int32_t to_lanes = (int32_t)wn_pad_lanes(to);
#pragma omp simd
      for (int32_t j = from / WN_LANES * WN_LANES; j < to_lanes; j++) p[j] += wn_exp(logit[j] - lse);
    }
  }
}

/* One row of a tile: its share of kl, and gain = softmax(I) - p, 0 where the row does not see the key.
 * kl is summed as p log(p / q) - p + q: over the whole row that is the same, but each term is small where q
 * is near p, and the rounding of either log-sum-exp, which moves all of p or all of q, cancels to first
 * order. */
static void row_loss(workspace *w, const inputs *in, int32_t r, int32_t from, int32_t to) {
  const wn_real share = 1 / (wn_real)in->qa->dim[1], top = w->top[r], log_sum = w->log_sum[r];
  wn_real *restrict p = w->p + r * WN_K_TILE, *restrict gain = w->gain;
  const wn_real *restrict index = w->index;
  double kl = 0;
#pragma omp simd reduction(+ : kl)
  for (int32_t j = from; j < to; j++) {
    wn_real target = p[j] * share, log_q = index[j] - top - log_sum;
    gain[j] = wn_exp(log_q) - target;
    wn_real term = target > 0 ? target * (wn_log(target) - log_q) : 0;
    kl += (double)term + (double)gain[j];
  }
  w->kl[r] += kl;
  memset(gain, 0, (size_t)from * sizeof(wn_real));
  memset(gain + to, 0, (size_t)(WN_K_TILE - to) * sizeof(wn_real));
}

/* dw's share, and g_z = coeff gain w 1[z > 0] scale */
static void row_gradient(workspace *w, const inputs *in, int64_t i, int32_t r) {
  int64_t n_heads = in->q->dim[1];
  const wn_real *restrict gain = w->gain;
  for (int64_t h = 0; h < n_heads; h++) {
    const wn_real *restrict z = w->z + h * WN_K_TILE;
    wn_real *restrict g_z = w->g_z + (r * n_heads + h) * WN_K_TILE;
    const wn_real factor = (wn_real)(in->params->coeff * in->params->scale) * wn_row(in->w, i)[h];
    wn_real sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int32_t j = 0; j < WN_K_TILE; j++) {
      bool counts = (z[j] > 0) & (gain[j] != 0); /* z of a key that is not seen has no meaning */
      sum += counts ? gain[j] * z[j] : 0;
      g_z[j] = counts ? gain[j] * factor : 0;
    }
    w->dw[r * n_heads + h] += (double)sum;
  }
}

/* Keys low .. end - 1 of the tile that begins at key `tile`. */
static void tile_loss(workspace *w, const inputs *in, int64_t row0, int32_t n_rows, int32_t tile, int32_t low,
                      int32_t end, wn_real *dk) {
  int64_t n_heads = in->q->dim[1], width = in->q->dim[2], n_keys = end - low;
  tile_target(w, in, row0, n_rows, tile, low, end);
  for (int32_t r = 0; r < n_rows; r++) {
    int32_t from = wn_max_i32(w->first[r], tile), to = wn_min_i32(w->end[r], end);
    if (from >= to) {
      memset(w->g_z + r * n_heads * WN_K_TILE, 0, (size_t)n_heads * WN_K_TILE * sizeof(wn_real));
      continue;
    }
    wn_index_row row = wn_index_row_of(in->q, in->w, row0 + r, in->params);
    wn_index_score(w->index, in->dq ? w->z : NULL, WN_K_TILE, &row, &in->keys, tile, from, to);
    row_loss(w, in, r, from - tile, to - tile);
    if (in->dq) row_gradient(w, in, row0 + r, r);
  }
  if (!in->dq) return;
  wn_product(false, false, n_rows * n_heads, width, n_keys, 1, w->g_z + (low - tile), WN_K_TILE, wn_row(in->k, low),
             in->k->stride[0], 1, w->dq, width);
  wn_product(true, false, n_keys, width, n_rows * n_heads, 1, w->g_z + (low - tile), WN_K_TILE, w->q, width, 1,
             dk + low * width, width);
}

static void block_loss(workspace *w, const inputs *in, int64_t row0, int32_t n_rows, wn_real *dk) {
  int64_t n_heads = in->q->dim[1], width = in->q->dim[2];
  begin_block(w, in, row0, n_rows);
  int32_t low = INT32_MAX, high = 0;
  for (int32_t r = 0; r < n_rows; r++) {
    if (w->end[r] == 0) continue;
    low = wn_min_i32(low, w->first[r]);
    high = wn_max_i32(high, w->end[r]);
  }
  for (int32_t tile = low / WN_K_TILE * WN_K_TILE; tile < high; tile += WN_K_TILE) {
    int32_t end = wn_min_i32(tile + WN_K_TILE, high);
    bool seen = false;
    for (int32_t r = 0; r < n_rows; r++) seen |= w->first[r] < end && w->end[r] > tile;
    if (seen) tile_loss(w, in, row0, n_rows, tile, wn_max_i32(tile, low), end, dk);
  }
  for (int32_t r = 0; r < n_rows; r++) {
    int64_t i = row0 + r;
    *wn_row(in->kl, i) = (wn_real)w->kl[r];
    for (int64_t h = 0; in->dq && h < n_heads; h++) {
      wn_row(in->dw, i)[h] = (wn_real)(in->params->coeff * w->dw[r * n_heads + h]);
      memcpy(wn_head_row(in->dq, i, h), w->dq + (r * n_heads + h) * width, (size_t)width * sizeof(wn_real));
    }
  }
}

static void check(const inputs *in, const wn_tensor *dk) {
  int64_t n = in->rows->n_rows, m = in->rows->n_keys, n_heads = in->q->dim[1], width = in->q->dim[2];
  WN_CPU(expect_indexer)(in->q, in->k, in->w, in->rows);
  WN_EXPECT(in->kl, WN_REAL_DTYPE, 1, n);
  WN_EXPECT(in->qa, WN_REAL_DTYPE, 3, n, in->qa->dim[1], in->qa->dim[2]);
  WN_EXPECT(in->ka, WN_REAL_DTYPE, 3, m, in->ka->dim[1], in->qa->dim[2]);
  WN_ASSERT(in->ka->dim[1] == in->qa->dim[1] || in->ka->dim[1] == 1, "%lld heads of keys", (long long)in->ka->dim[1]);
  WN_EXPECT(in->lse, WN_REAL_DTYPE, 2, n, in->qa->dim[1]);
  WN_ASSERT(!in->dq == !dk && !in->dq == !in->dw, "dq, dk and dw come together");
  if (!in->dq) return;
  WN_EXPECT(in->dq, WN_REAL_DTYPE, 3, n, n_heads, width);
  WN_EXPECT(dk, WN_REAL_DTYPE, 2, m, width);
  WN_EXPECT(in->dw, WN_REAL_DTYPE, 2, n, n_heads);
}

wn_status WN_CPU(indexer_kl_dense)(wn_device *device, wn_tensor *kl, wn_tensor *dq, wn_tensor *dk, wn_tensor *dw,
                                   const wn_tensor *q, const wn_tensor *k, const wn_tensor *w, const wn_tensor *qa,
                                   const wn_tensor *ka, const wn_tensor *lse, const wn_rows *rows,
                                   const wn_indexer_params *params) {
  inputs in = {.q = q,
               .k = k,
               .w = w,
               .qa = qa,
               .ka = ka,
               .lse = lse,
               .rows = rows,
               .params = params,
               .kl = kl,
               .dq = dq,
               .dw = dw};
  check(&in, dk);
  int64_t n = rows->n_rows, n_blocks = wn_cpu_blocks(n, ROWS), n_groups = wn_cpu_min(n_blocks, MAX_GROUPS);
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  WN_TRY_GOTO(status, done, wn_index_keys_pack(device, &in.keys, k, rows));
  wn_carver count = {0};
  workspace counted;
  lay_out(&counted, &count, &in);
  void *memory;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &memory, "indexer tiles", count.used * (size_t)device->threads));
  wn_partials partials = {0};
  if (dq) WN_TRY_GOTO(status, done, wn_partials_create(device, &partials, n_groups, rows->n_keys, q->dim[2]));
  if (device->dry) goto done;
#pragma omp parallel num_threads(device->threads)
  {
    workspace work;
    wn_carver carver = {.base = (char *)memory + count.used * (size_t)omp_get_thread_num()};
    lay_out(&work, &carver, &in);
    memset(carver.base, 0, carver.used); /* vector loops run over padding: it holds numbers, never stray NaN */
#pragma omp for schedule(dynamic, 1)
    for (int64_t group = 0; group < n_groups; group++) {
      wn_real *share = dq ? wn_partials_begin(&partials, group) : NULL;
      for (int64_t block = group; block < n_blocks; block += n_groups)
        block_loss(&work, &in, block * ROWS, (int32_t)wn_cpu_min(ROWS, n - block * ROWS), share);
    }
  }
  if (dq) wn_partials_add(device, &partials, dk);
done:
  wn_arena_release(device->scratch, mark);
  return status;
}
