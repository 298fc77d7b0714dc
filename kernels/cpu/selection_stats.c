/* How good the indexer's picks are, exactly, on sampled rows. */
#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/dense_target.h"
#include "kernels/cpu/index_score.h"
#include "kernels/cpu/indexer.h"
#include "kernels/cpu/topk.h"

enum { SINK_KEYS = 4, LOCAL_TOKENS = 128 };

typedef struct inputs {
  const wn_tensor *sample, *picks_prev, *q, *w;
  const wn_rows *rows;
  const wn_indexer_params *params;
  wn_index_keys keys;
  wn_target target;
  wn_tensor *stats, *picks;
  int64_t k;
} inputs;

typedef struct workspace {
  wn_target_work target;
  wn_real *score;
  wn_score_key *key;
  int32_t *best; /* [k] */
} workspace;

static void lay_out(workspace *w, wn_carver *carver, const inputs *in) {
  wn_target_take(&w->target, carver, &in->target);
  int64_t width = (int64_t)in->keys.n_panels * WN_PANEL;
  w->score = wn_take_reals(carver, width);
  w->key = WN_CPU(take)(carver, (size_t)wn_cpu_min(width, in->rows->n_keys) * sizeof(wn_score_key));
  w->best = wn_take_ints(carver, in->k);
}

/* Size of the intersection of two ascending lists, each ended by -1 or by k. */
static int64_t common_picks(const int32_t *a, const int32_t *b, int64_t k) {
  int64_t common = 0, i = 0, j = 0;
  while (i < k && j < k && a[i] >= 0 && b[j] >= 0) {
    if (a[i] == b[j]) common++;
    int32_t x = a[i], y = b[j];
    i += x <= y;
    j += y <= x;
  }
  return common;
}

static int64_t count_picks(const int32_t *pick, int64_t k) {
  int64_t n = 0;
  while (n < k && pick[n] >= 0) n++;
  return n;
}

static double mass(const wn_real *p, const int32_t *pick, int64_t k, int32_t first) {
  double sum = 0;
  for (int64_t j = 0; j < k; j++) sum += (double)p[pick[j] - first];
  return sum;
}

static double mass_of_range(const wn_real *p, int64_t from, int64_t end) {
  double sum = 0;
  for (int64_t j = from; j < end; j++) sum += (double)p[j];
  return sum;
}

/* Columns that compare the distributions p and softmax(I) over the visible keys. */
static void distribution_columns(double *column, const wn_real *p, const wn_real *index, int32_t visible) {
  double top = (double)index[0], sum = 0;
  for (int32_t j = 1; j < visible; j++) top = (double)index[j] > top ? (double)index[j] : top;
  for (int32_t j = 0; j < visible; j++) sum += exp((double)index[j] - top);
  double lse = top + log(sum), kl = 0, entropy_p = 0, entropy_index = 0;
  for (int32_t j = 0; j < visible; j++) {
    double target = (double)p[j], log_index = (double)index[j] - lse;
    double share = exp(log_index);
    if (share > 0) entropy_index -= share * log_index;
    if (target == 0) continue;
    entropy_p -= target * log(target);
    kl += target * (log(target) - log_index);
  }
  column[WN_STAT_KL_DENSE] = kl;
  column[WN_STAT_KL_UNIFORM] = log((double)visible) - entropy_p;
  column[WN_STAT_ENTROPY_TARGET] = entropy_p;
  column[WN_STAT_ENTROPY_INDEX] = entropy_index;
}

/* Columns about the picks; the row sees more than k keys, so there are exactly k. */
static void pick_columns(double *column, workspace *w, const inputs *in, const wn_real *p, const int32_t *pick,
                         int32_t first, int32_t visible) {
  int64_t k = in->k, sink = wn_cpu_min(SINK_KEYS, k);
  wn_top_k(w->best, k, p, w->key, visible, first);
  int32_t top1 = 0;
  for (int32_t j = 1; j < visible; j++) top1 = p[j] > p[top1] ? j : top1;
  double distance = 0, local = 0, hit = 0;
  for (int64_t j = 0; j < k; j++) {
    int32_t gap = first + visible - 1 - pick[j];
    distance += gap;
    local += gap < LOCAL_TOKENS;
    hit += pick[j] == first + top1;
  }
  column[WN_STAT_MASS_AT_K] = mass(p, pick, k, first);
  column[WN_STAT_MASS_BEST] = mass(p, w->best, k, first);
  column[WN_STAT_MASS_RECENT] = mass_of_range(p, visible - k, visible);
  column[WN_STAT_MASS_SINK] = mass_of_range(p, 0, sink) + mass_of_range(p, visible - (k - sink), visible);
  column[WN_STAT_MASS_RANDOM] = (double)k / visible;
  column[WN_STAT_RECALL_AT_K] = (double)common_picks(pick, w->best, k) / (double)k;
  column[WN_STAT_TOP1_HIT] = hit;
  column[WN_STAT_SELECT_DIST] = distance / (double)k;
  column[WN_STAT_SELECT_LOCAL] = local / (double)k;
  column[WN_STAT_DENSITY] = (double)k / visible;
}

static void sampled_row(workspace *w, const inputs *in, int64_t s, int32_t i, const wn_real *p) {
  int32_t first = in->rows->first_key[i], visible = wn_max_i32(in->rows->last_key[i] - first + 1, 0);
  int32_t *pick = wn_row_i32(in->picks, s);
  wn_real *out = wn_row(in->stats, s);
  const wn_real *index = w->score + (visible ? first - in->keys.first : 0);
  if (visible > in->k) {
    wn_index_row row = wn_index_row_of(in->q, in->w, i, in->params);
    wn_index_score(w->score, NULL, 0, &row, &in->keys, in->keys.first, first, first + visible);
  }
  wn_top_k(pick, in->k, index, w->key, visible, first);
  double column[WN_N_STATS] = {0};
  if (visible > in->k) {
    column[WN_STAT_COUNTED] = 1;
    distribution_columns(column, p, index, visible);
    pick_columns(column, w, in, p, pick, first, visible);
    column[WN_STAT_IOU_PREV] = (double)NAN;
    if (in->picks_prev) {
      const int32_t *previous = wn_row_i32(in->picks_prev, s);
      double common = (double)common_picks(pick, previous, in->k);
      column[WN_STAT_IOU_PREV] = common / ((double)(in->k + count_picks(previous, in->k)) - common);
    }
  }
  for (int32_t c = 0; c < WN_N_STATS; c++) out[c] = (wn_real)column[c];
}

wn_status WN_CPU(selection_stats)(wn_device *device, wn_tensor *stats, wn_tensor *picks, const wn_tensor *sample,
                                  const wn_tensor *picks_prev, const wn_tensor *q, const wn_tensor *k,
                                  const wn_tensor *w, const wn_tensor *qa, const wn_tensor *ka, const wn_rows *rows,
                                  const wn_indexer_params *params) {
  int64_t n = sample->dim[0];
  inputs in = {.sample = sample,
               .picks_prev = picks_prev,
               .q = q,
               .w = w,
               .rows = rows,
               .params = params,
               .target = {.qa = qa, .ka = ka, .rows = rows, .scale = (wn_real)params->attention_scale},
               .stats = stats,
               .picks = picks,
               .k = picks->dim[1]};
  WN_CPU(expect_indexer)(q, k, w, rows);
  WN_EXPECT(sample, WN_I32, 1, n);
  WN_EXPECT(stats, WN_REAL_DTYPE, 2, n, WN_N_STATS);
  WN_EXPECT(picks, WN_I32, 2, n, in.k);
  if (picks_prev) WN_EXPECT(picks_prev, WN_I32, 2, n, in.k);
  const int32_t *number = sample->data;
  for (int64_t s = 0; s < n && !device->dry; s++)
    WN_ASSERT(number[s] >= 0 && number[s] < rows->n_rows, "sample %d of %d rows", number[s], rows->n_rows);
  size_t mark = wn_arena_mark(device->scratch);
  wn_status status = NULL;
  WN_TRY_GOTO(status, done, wn_index_keys_pack(device, &in.keys, k, rows));
  wn_carver count = {0};
  workspace counted;
  lay_out(&counted, &count, &in);
  void *memory;
  WN_TRY_GOTO(status, done,
              wn_arena_alloc(device->scratch, &memory, "sampled rows", count.used * (size_t)device->threads));
  if (device->dry) goto done;
#pragma omp parallel num_threads(device->threads)
  {
    workspace work;
    wn_carver carver = {.base = (char *)memory + count.used * (size_t)omp_get_thread_num()};
    lay_out(&work, &carver, &in);
#pragma omp for schedule(dynamic, 1)
    for (int64_t s0 = 0; s0 < n; s0 += WN_TARGET_ROWS) {
      int32_t n_rows = (int32_t)wn_cpu_min(WN_TARGET_ROWS, n - s0);
      wn_target_rows(&work.target, &in.target, number + s0, n_rows);
      for (int32_t r = 0; r < n_rows; r++)
        sampled_row(&work, &in, s0 + r, number[s0 + r], work.target.p + r * work.target.pitch);
    }
  }
done:
  wn_arena_release(device->scratch, mark);
  return status;
}
