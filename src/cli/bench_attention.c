/* `winnow bench`: attention in its three forms, the indexer, selections. Work as src/model/flops.h counts it: a causal
 * row's visible pairs only, a selection's picks only; one multiply-add is two FLOP. The masked form reads every tile
 * that a row sees, so it counts visible pairs too. */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "base/rng.h"
#include "cli/bench.h"

#define MAKE_IN(...) WN_TRY(wn_bench_in(b, __VA_ARGS__))
#define MAKE_OUT(...) WN_TRY(wn_bench_out_of(b, __VA_ARGS__))

static void counted(wn_bench *b, double flops) {
  b->work = flops;
  b->flops = true;
}

static double key_width(const wn_bench *b) {
  return (double)(b->s.nope + b->s.rope);
}

static wn_attention_params attention_params(const wn_bench *b) {
  return (wn_attention_params){.scale = 1 / sqrt(key_width(b)), .v_width = (int32_t)b->s.latent};
}

/* ---- selections ---- */

/* Row i's picks: all that it sees, the last k, or one key at random out of each k-th part of what it sees. */
static void fill_picks(const wn_bench *b, int32_t *picks, int64_t i) {
  int64_t first = wn_bench_first(b, i), visible = wn_bench_visible(b, i), k = b->s.topk;
  for (int64_t j = 0; j < k; j++) {
    if (visible <= k) {
      picks[j] = j < visible ? (int32_t)(first + j) : -1;
    } else if (b->recent) {
      picks[j] = (int32_t)(first + visible - k + j);
    } else {
      int64_t from = j * visible / k, to = (j + 1) * visible / k;
      double part = wn_rng_uniform((uint64_t)i, WN_RNG_TEST, (uint64_t)j);
      picks[j] = (int32_t)(first + from + (int64_t)(part * (double)(to - from)));
    }
  }
}

/* selection[n,k] as an input. */
static wn_status picks(wn_bench *b) {
  int64_t n = b->s.rows, k = b->s.topk;
  int32_t *host;
  WN_TRY(wn_bench_host(b, (void **)&host, n * k * 4));
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < n; i++) fill_picks(b, host + i * k, i);
  return wn_bench_ints(b, host, 2, n, k);
}

/* ---- a head's own keys ---- */

/* in: q, k, v, d_o; with `selected` the selection before d_o. */
static wn_status per_head_operands(wn_bench *b, bool selected, bool d_o) {
  const wn_bench_sizes *s = &b->s;
  WN_TRY(wn_bench_causal(b));
  MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->nope + s->rope);
  MAKE_IN(WN_ACT, 1, 3, s->seq, s->heads, s->nope + s->rope);
  MAKE_IN(WN_ACT, 1, 3, s->seq, s->heads, s->v);
  if (selected) WN_TRY(picks(b));
  if (d_o) MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->v);
  return NULL;
}

static wn_status per_head_outputs(wn_bench *b) {
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 3, b->s.rows, b->s.heads, b->s.v);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, b->s.rows, b->s.heads, 0);
  return NULL;
}

/* Room for what the forward before a backward makes: lse and delta, two more of in, and o. */
static wn_status per_head_results(wn_bench *b, wn_tensor *o) {
  const wn_bench_sizes *s = &b->s;
  for (int i = 0; i < 2; i++) MAKE_IN(WN_STAT, 0, 2, s->rows, s->heads, 0);
  return wn_device_tensor(b->device, o, b->device->stash, "bench o", WN_ACT, 3, s->rows, s->heads, s->v, 0);
}

/* out: dq, dk, dv. */
static wn_status per_head_gradients(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 3, s->rows, s->heads, s->nope + s->rope);
  MAKE_OUT(WN_ACT, WN_BENCH_ADD, 3, s->seq, s->heads, s->nope + s->rope);
  MAKE_OUT(WN_ACT, WN_BENCH_ADD, 3, s->seq, s->heads, s->v);
  return NULL;
}

static double per_head_forward(const wn_bench *b) {
  return 2 * (double)b->s.heads * b->pairs * (key_width(b) + (double)b->s.v);
}
static double per_head_backward(const wn_bench *b) {
  return 2 * (double)b->s.heads * b->pairs * (3 * key_width(b) + 2 * (double)b->s.v);
}

static wn_status attention_dense_make(wn_bench *b) {
  WN_TRY(per_head_operands(b, false, false));
  WN_TRY(per_head_outputs(b));
  counted(b, per_head_forward(b));
  return NULL;
}
static wn_status attention_dense_run(wn_bench *b) {
  const wn_attention_params params = attention_params(b);
  return b->ops->attention_dense(b->device, &b->out[0], &b->out[1], NULL, NULL, &b->in[0], &b->in[1], &b->in[2],
                                 &b->rows, &params);
}

/* One row of one head of a tensor [n,H,D]. */
static wn_status head_of(wn_bench *b, double **out, const wn_tensor *t, int64_t row, int64_t head) {
  return wn_bench_values(b, out, wn_tensor_slice(wn_tensor_slice(*t, 0, row, 1), 1, head, 1));
}

/* o of one row from scores[n] over keys whose values are rows of `v` (v_row doubles apart). */
static void weighted_values(double *o, double *scores, int64_t n, const double *v, int64_t v_row, int64_t width) {
  double most = -INFINITY, sum = 0;
  for (int64_t j = 0; j < n; j++) most = fmax(most, scores[j]);
  for (int64_t j = 0; j < n; j++) sum += scores[j] = exp(scores[j] - most);
  for (int64_t i = 0; i < width; i++) o[i] = 0;
  for (int64_t j = 0; j < n; j++)
    for (int64_t i = 0; i < width; i++) o[i] += scores[j] / sum * v[j * v_row + i];
}

static double dot(const double *a, const double *b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
  return sum;
}

/* A row in the middle, its last head; `selection` NULL: every visible key. */
static wn_status check_per_head(wn_bench *b, const wn_tensor *selection) {
  const wn_bench_sizes *s = &b->s;
  int64_t row = s->rows / 2, head = s->heads - 1, width = s->nope + s->rope;
  int64_t first = wn_bench_first(b, row), visible = wn_bench_visible(b, row), n = 0;
  double *q, *k, *v, *o, *expected, *scores, *picked = NULL;
  WN_TRY(head_of(b, &q, &b->in[0], row, head));
  WN_TRY(head_of(b, &o, &b->out[0], row, head));
  WN_TRY(wn_bench_values(b, &k, wn_tensor_slice(wn_tensor_slice(b->in[1], 0, first, visible), 1, head, 1)));
  WN_TRY(wn_bench_values(b, &v, wn_tensor_slice(wn_tensor_slice(b->in[2], 0, first, visible), 1, head, 1)));
  WN_TRY(wn_bench_host(b, (void **)&scores, visible * 8));
  WN_TRY(wn_bench_host(b, (void **)&expected, s->v * 8));
  if (selection) WN_TRY(wn_bench_values(b, &picked, wn_tensor_slice(*selection, 0, row, 1)));
  for (int64_t j = 0; j < (selection ? s->topk : visible); j++) {
    if (selection && picked[j] < 0) break;
    int64_t key = selection ? (int64_t)picked[j] - first : j;
    memmove(v + n * s->v, v + key * s->v, (size_t)s->v * sizeof *v); /* keys ascend: nothing is overwritten early */
    scores[n++] = attention_params(b).scale * dot(q, k + key * width, width);
  }
  weighted_values(expected, scores, n, v, s->v, s->v);
  return wn_bench_close(b, "o", o, expected, s->v);
}

static wn_status attention_dense_check(wn_bench *b) {
  return check_per_head(b, NULL);
}

/* lse and delta of a backward come from its forward. */
static wn_status absent(const char *name) {
  return WN_FAIL(WN_E_DEVICE, "its operands come from %s, which this device does not have", name);
}

static wn_status attention_dense_backward_make(wn_bench *b) {
  const wn_attention_params params = attention_params(b);
  if (!b->ops->attention_dense) return absent("attention_dense");
  WN_TRY(per_head_operands(b, false, true));
  wn_tensor o;
  WN_TRY(per_head_results(b, &o));
  WN_TRY(b->ops->attention_dense(b->device, &o, &b->in[4], &b->in[5], &b->in[3], &b->in[0], &b->in[1], &b->in[2],
                                 &b->rows, &params));
  WN_TRY(per_head_gradients(b));
  counted(b, per_head_backward(b));
  return NULL;
}
static wn_status attention_dense_backward_run(wn_bench *b) {
  const wn_attention_params params = attention_params(b);
  return b->ops->attention_dense_backward(b->device, &b->out[0], &b->out[1], &b->out[2], &b->in[3], &b->in[0],
                                          &b->in[1], &b->in[2], &b->in[4], &b->in[5], &b->rows, &params);
}

static wn_status attention_masked_make(wn_bench *b) {
  WN_TRY(per_head_operands(b, true, false));
  WN_TRY(per_head_outputs(b));
  counted(b, per_head_forward(b));
  return NULL;
}
static wn_status attention_masked_run(wn_bench *b) {
  const wn_attention_params params = attention_params(b);
  return b->ops->attention_masked(b->device, &b->out[0], &b->out[1], NULL, NULL, &b->in[0], &b->in[1], &b->in[2],
                                  &b->in[3], &b->rows, &params);
}
static wn_status attention_masked_check(wn_bench *b) {
  return check_per_head(b, &b->in[3]);
}

static wn_status attention_masked_backward_make(wn_bench *b) {
  const wn_attention_params params = attention_params(b);
  if (!b->ops->attention_masked) return absent("attention_masked");
  WN_TRY(per_head_operands(b, true, true));
  wn_tensor o;
  WN_TRY(per_head_results(b, &o));
  WN_TRY(b->ops->attention_masked(b->device, &o, &b->in[5], &b->in[6], &b->in[4], &b->in[0], &b->in[1], &b->in[2],
                                  &b->in[3], &b->rows, &params));
  WN_TRY(per_head_gradients(b));
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, b->s.rows, b->s.topk, 0);
  counted(b, per_head_backward(b));
  return NULL;
}
static wn_status attention_masked_backward_run(wn_bench *b) {
  const wn_attention_params params = attention_params(b);
  return b->ops->attention_masked_backward(b->device, &b->out[0], &b->out[1], &b->out[2], &b->out[3], &b->in[4],
                                           &b->in[0], &b->in[1], &b->in[2], &b->in[3], &b->in[5], &b->in[6], &b->rows,
                                           &params);
}

/* ---- absorbed ---- */

/* in: q', kv, selection, and d_o'. */
static wn_status absorbed_operands(wn_bench *b, bool d_o) {
  const wn_bench_sizes *s = &b->s;
  WN_TRY(wn_bench_causal(b));
  MAKE_IN(WN_ACT, 0.5, 3, s->rows, s->heads, s->latent + s->rope);
  MAKE_IN(WN_ACT, 1, 2, s->seq, s->latent + s->rope, 0);
  WN_TRY(picks(b));
  if (d_o) MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->latent);
  return NULL;
}

static wn_status attention_sparse_make(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  WN_TRY(absorbed_operands(b, false));
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 3, s->rows, s->heads, s->latent);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, s->rows, s->heads, 0);
  counted(b, 2 * (double)s->heads * b->picked * (double)(2 * s->latent + s->rope));
  return NULL;
}
static wn_status attention_sparse_run(wn_bench *b) {
  const wn_attention_params params = attention_params(b);
  return b->ops->attention_sparse(b->device, &b->out[0], &b->out[1], NULL, NULL, &b->in[0], &b->in[1], &b->in[2],
                                  &b->rows, &params);
}
static wn_status attention_sparse_check(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  int64_t row = s->rows - 1, head = s->heads / 2, width = s->latent + s->rope, n = 0;
  double *q, *o, *kv, *picked, *scores, *expected;
  WN_TRY(head_of(b, &q, &b->in[0], row, head));
  WN_TRY(head_of(b, &o, &b->out[0], row, head));
  WN_TRY(wn_bench_values(b, &kv, b->in[1]));
  WN_TRY(wn_bench_values(b, &picked, wn_tensor_slice(b->in[2], 0, row, 1)));
  WN_TRY(wn_bench_host(b, (void **)&scores, s->topk * 8));
  WN_TRY(wn_bench_host(b, (void **)&expected, s->latent * 8));
  for (; n < s->topk && picked[n] >= 0; n++) {
    memmove(kv + n * width, kv + (int64_t)picked[n] * width, (size_t)width * sizeof *kv);
    scores[n] = attention_params(b).scale * dot(q, kv + n * width, width);
  }
  weighted_values(expected, scores, n, kv, width, s->latent);
  return wn_bench_close(b, "o", o, expected, s->latent);
}

static wn_status attention_sparse_backward_make(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  const wn_attention_params params = attention_params(b);
  if (!b->ops->attention_sparse) return absent("attention_sparse");
  WN_TRY(absorbed_operands(b, true));
  for (int i = 0; i < 2; i++) MAKE_IN(WN_STAT, 0, 2, s->rows, s->heads, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 3, s->rows, s->heads, s->latent + s->rope);
  MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 2, s->seq, s->latent + s->rope, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, s->rows, s->topk, 0);
  /* o goes where dq will be: it is not looked at, and smaller */
  wn_tensor o = wn_tensor_of(b->out[0].data, b->out[0].dtype, 3, s->rows, s->heads, s->latent, 0);
  WN_TRY(b->ops->attention_sparse(b->device, &o, &b->in[4], &b->in[5], &b->in[3], &b->in[0], &b->in[1], &b->in[2],
                                  &b->rows, &params));
  WN_TRY(wn_bench_poison(b, &b->out[0]));
  counted(b, 2 * (double)s->heads * b->picked * (double)(5 * s->latent + 3 * s->rope));
  return NULL;
}
static wn_status attention_sparse_backward_run(wn_bench *b) {
  const wn_attention_params params = attention_params(b);
  return b->ops->attention_sparse_backward(b->device, &b->out[0], &b->out[1], &b->out[2], &b->in[3], &b->in[0],
                                           &b->in[1], &b->in[2], &b->in[4], &b->in[5], &b->rows, &params);
}

/* ---- indexer ---- */

static wn_indexer_params indexer_params(const wn_bench *b) {
  return (wn_indexer_params){.scale = 1 / sqrt((double)b->s.index_width),
                             .attention_scale = attention_params(b).scale,
                             .coeff = 1 / (double)b->s.rows};
}

/* in: q, k, w */
static wn_status index_operands(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  WN_TRY(wn_bench_causal(b));
  MAKE_IN(WN_ACT, 1, 3, s->rows, s->index_heads, s->index_width);
  MAKE_IN(WN_ACT, 1, 2, s->seq, s->index_width, 0);
  MAKE_IN(WN_STAT, 1 / sqrt((double)s->index_heads), 2, s->rows, s->index_heads, 0);
  return NULL;
}

static double index_flops(const wn_bench *b, double pairs) {
  return 2 * (double)(b->s.index_heads * b->s.index_width) * pairs;
}

/* Rows of a T x T table: the last ones only. */
static wn_status indexer_scores_make(wn_bench *b) {
  if (b->s.rows > 2048) b->s.rows = 2048;
  WN_TRY(index_operands(b));
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, b->s.rows, b->s.seq, 0);
  b->not_finite[0] = b->s.rows * b->s.seq - (int64_t)b->pairs; /* -inf where a row does not see */
  counted(b, index_flops(b, b->pairs));
  return NULL;
}
static wn_status indexer_scores_run(wn_bench *b) {
  const wn_indexer_params params = indexer_params(b);
  return b->ops->indexer_scores(b->device, &b->out[0], &b->in[0], &b->in[1], &b->in[2], &b->rows, &params);
}

/* The scores of the keys that the row sees, in FP64. */
static wn_status score_row(wn_bench *b, double **scores, int64_t row) {
  const wn_bench_sizes *s = &b->s;
  int64_t first = wn_bench_first(b, row), visible = wn_bench_visible(b, row);
  double *q, *k, *w;
  WN_TRY(wn_bench_values(b, &q, wn_tensor_slice(b->in[0], 0, row, 1)));
  WN_TRY(wn_bench_values(b, &k, wn_tensor_slice(b->in[1], 0, first, visible)));
  WN_TRY(wn_bench_values(b, &w, wn_tensor_slice(b->in[2], 0, row, 1)));
  WN_TRY(wn_bench_host(b, (void **)scores, visible * 8));
  for (int64_t j = 0; j < visible; j++) {
    (*scores)[j] = 0;
    for (int64_t h = 0; h < s->index_heads; h++)
      (*scores)[j] +=
          w[h] * fmax(0, indexer_params(b).scale * dot(q + h * s->index_width, k + j * s->index_width, s->index_width));
  }
  return NULL;
}

static wn_status indexer_scores_check(wn_bench *b) {
  int64_t row = b->s.rows - 1;
  double *expected, *got;
  WN_TRY(score_row(b, &expected, row));
  WN_TRY(wn_bench_values(b, &got, wn_tensor_slice(b->out[0], 0, row, 1)));
  return wn_bench_close(b, "a row of scores", got + wn_bench_first(b, row), expected, wn_bench_visible(b, row));
}

static wn_status indexer_select_make(wn_bench *b) {
  WN_TRY(index_operands(b));
  MAKE_OUT(WN_INDEX, WN_BENCH_PICKS, 2, b->s.rows, b->s.topk, 0);
  counted(b, index_flops(b, b->pairs));
  return NULL;
}
static wn_status indexer_select_run(wn_bench *b) {
  const wn_indexer_params params = indexer_params(b);
  return b->ops->indexer_select(b->device, &b->out[0], &b->in[0], &b->in[1], &b->in[2], &b->rows, &params);
}
/* In the last row nothing that was left out may lie above what was picked by more than rounding. */
static wn_status indexer_select_check(wn_bench *b) {
  int64_t row = b->s.rows - 1, first = wn_bench_first(b, row), visible = wn_bench_visible(b, row), at = 0;
  double *scores, *picked, lowest = INFINITY, highest = -INFINITY, most = 0;
  WN_TRY(score_row(b, &scores, row));
  WN_TRY(wn_bench_values(b, &picked, wn_tensor_slice(b->out[0], 0, row, 1)));
  for (int64_t j = 0; j < visible; j++) {
    most = fmax(most, fabs(scores[j]));
    if (at < b->s.topk && picked[at] == (double)(first + j)) {
      lowest = fmin(lowest, scores[j]);
      at++;
    } else {
      highest = fmax(highest, scores[j]);
    }
  }
  if (highest <= lowest + 1e-5 * most) return NULL;
  return WN_FAIL(WN_E_CHECK, "a key of score %.9g is left out, one of %.9g picked", highest, lowest);
}

static wn_status select_best_make(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  WN_TRY(wn_bench_causal(b));
  MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->nope + s->rope);
  MAKE_IN(WN_ACT, 1, 3, s->seq, s->heads, s->nope + s->rope);
  MAKE_OUT(WN_INDEX, WN_BENCH_PICKS, 2, s->rows, s->topk, 0);
  counted(b, 4 * (double)s->heads * key_width(b) * b->pairs); /* once for the log-sum, once for p */
  return NULL;
}
static wn_status select_best_run(wn_bench *b) {
  const wn_attention_params params = attention_params(b);
  return b->ops->select_best(b->device, &b->out[0], &b->in[0], &b->in[1], &b->rows, &params);
}

static wn_status select_pattern_make(wn_bench *b) {
  WN_TRY(wn_bench_causal(b));
  MAKE_OUT(WN_INDEX, WN_BENCH_PICKS, 2, b->s.rows, b->s.topk, 0);
  return NULL;
}
static wn_status select_pattern_run(wn_bench *b) {
  const wn_pattern_params params = {.pattern = WN_PATTERN_RANDOM, .seed = 1};
  return b->ops->select_pattern(b->device, &b->out[0], &b->rows, &params);
}

/* out: kl, dq, dk, dw */
static wn_status kl_outputs(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 1, s->rows, 0, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 3, s->rows, s->index_heads, s->index_width);
  MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 2, s->seq, s->index_width, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, s->rows, s->index_heads, 0);
  return NULL;
}

static wn_status indexer_kl_dense_make(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  const wn_attention_params params = attention_params(b);
  if (!b->ops->attention_dense) return absent("attention_dense");
  WN_TRY(index_operands(b));
  MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->nope + s->rope);
  MAKE_IN(WN_ACT, 1, 3, s->seq, s->heads, s->nope + s->rope);
  MAKE_IN(WN_STAT, 0, 2, s->rows, s->heads, 0);
  WN_TRY(kl_outputs(b));
  size_t mark = wn_arena_mark(b->device->stash);
  wn_tensor v, o; /* only lse is wanted */
  WN_TRY(wn_device_tensor(b->device, &v, b->device->stash, "bench v", WN_ACT, 3, s->seq, s->heads, s->v, 0));
  WN_TRY(wn_device_tensor(b->device, &o, b->device->stash, "bench o", WN_ACT, 3, s->rows, s->heads, s->v, 0));
  WN_TRY(b->ops->zero(b->device, &v));
  WN_TRY(b->ops->attention_dense(b->device, &o, &b->in[5], NULL, NULL, &b->in[3], &b->in[4], &v, &b->rows, &params));
  wn_arena_release(b->device->stash, mark);
  counted(b, 2 * (double)s->heads * key_width(b) * b->pairs + 4 * index_flops(b, b->pairs));
  return NULL;
}
static wn_status indexer_kl_dense_run(wn_bench *b) {
  const wn_indexer_params params = indexer_params(b);
  return b->ops->indexer_kl_dense(b->device, &b->out[0], &b->out[1], &b->out[2], &b->out[3], &b->in[0], &b->in[1],
                                  &b->in[2], &b->in[3], &b->in[4], &b->in[5], &b->rows, &params);
}

/* in: q, k, w, selection, p */
static wn_status indexer_kl_sparse_make(wn_bench *b) {
  int64_t n = b->s.rows, k = b->s.topk;
  WN_TRY(index_operands(b));
  WN_TRY(picks(b));
  MAKE_IN(WN_STAT, 0, 2, n, k, 0);
  WN_TRY(kl_outputs(b));
  float *p; /* sums to 1 over a row's picks */
  WN_TRY(wn_bench_host(b, (void **)&p, n * k * 4));
  for (int64_t i = 0; i < n; i++) {
    int64_t seen = wn_bench_visible(b, i), of = seen < k ? seen : k;
    for (int64_t j = 0; j < k; j++) /* falls linearly */
      p[i * k + j] = j < of ? 2 * (float)(of - j) / ((float)of * (float)(of + 1)) : 0;
  }
  WN_TRY(b->ops->upload(b->device, &b->in[4], p));
  counted(b, 3 * index_flops(b, b->picked));
  return NULL;
}
static wn_status indexer_kl_sparse_run(wn_bench *b) {
  const wn_indexer_params params = indexer_params(b);
  return b->ops->indexer_kl_sparse(b->device, &b->out[0], &b->out[1], &b->out[2], &b->out[3], &b->in[0], &b->in[1],
                                   &b->in[2], &b->in[3], &b->in[4], &b->rows, &params);
}

static wn_status selection_stats_make(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  int64_t count = s->sampled < s->rows ? s->sampled : s->rows;
  int32_t *sample;
  double pairs = 0;
  WN_TRY(index_operands(b));
  MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->nope + s->rope);
  MAKE_IN(WN_ACT, 1, 3, s->seq, s->heads, s->nope + s->rope);
  WN_TRY(wn_bench_host(b, (void **)&sample, count * 4));
  for (int64_t i = 0; i < count; i++) {
    sample[i] = (int32_t)((i + 1) * s->rows / count - 1);
    int64_t visible = wn_bench_visible(b, sample[i]);
    pairs += (double)visible;
    if (visible > s->topk) b->not_finite[0]++; /* no picks of a previous layer */
  }
  WN_TRY(wn_bench_ints(b, sample, 1, count, 0));
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, count, WN_N_STATS, 0);
  MAKE_OUT(WN_INDEX, WN_BENCH_COUNT, 2, count, s->topk, 0);
  counted(b, (2 * (double)s->heads * key_width(b)) * pairs + index_flops(b, pairs));
  return NULL;
}
static wn_status selection_stats_run(wn_bench *b) {
  const wn_indexer_params params = indexer_params(b);
  return b->ops->selection_stats(b->device, &b->out[0], &b->out[1], &b->in[5], NULL, &b->in[0], &b->in[1], &b->in[2],
                                 &b->in[3], &b->in[4], &b->rows, &params);
}

static wn_status attention_delta_make(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  MAKE_IN(WN_STAT, 1, 3, s->rows, s->heads, s->v);
  MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->v);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, s->rows, s->heads, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 3, s->rows, s->heads, s->v);
  return NULL;
}
static wn_status attention_delta_run(wn_bench *b) {
  return b->ops->attention_delta(b->device, &b->out[0], &b->out[1], &b->in[0], &b->in[1]);
}
static wn_status attention_delta_check(wn_bench *b) {
  double *o, *d_o, *delta, expected;
  int64_t row = b->s.rows / 2, head = b->s.heads - 1;
  WN_TRY(head_of(b, &o, &b->in[0], row, head));
  WN_TRY(head_of(b, &d_o, &b->in[1], row, head));
  WN_TRY(wn_bench_values(b, &delta, wn_tensor_slice(wn_tensor_slice(b->out[0], 0, row, 1), 1, head, 1)));
  expected = dot(o, d_o, b->s.v);
  return wn_bench_close(b, "delta", delta, &expected, 1);
}

const wn_bench_case wn_bench_attention[] = {
    WN_BENCH_CASE(attention_dense, attention_dense_check),
    WN_BENCH_CASE(attention_dense_backward, NULL),
    WN_BENCH_CASE(attention_masked, attention_masked_check),
    WN_BENCH_CASE(attention_masked_backward, NULL),
    WN_BENCH_CASE(attention_delta, attention_delta_check),
    WN_BENCH_CASE(attention_sparse, attention_sparse_check),
    WN_BENCH_CASE(attention_sparse_backward, NULL),
    WN_BENCH_CASE(indexer_scores, indexer_scores_check),
    WN_BENCH_CASE(indexer_select, indexer_select_check),
    WN_BENCH_CASE(indexer_kl_dense, NULL),
    WN_BENCH_CASE(indexer_kl_sparse, NULL),
    WN_BENCH_CASE(selection_stats, NULL),
    WN_BENCH_CASE(select_best, NULL),
    WN_BENCH_CASE(select_pattern, NULL),
    {0},
};
