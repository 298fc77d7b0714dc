/* `winnow bench`: products, norms, rope, elementwise work, embedding and head, experts, optimizer. */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "base/float8.h"
#include "base/rng.h"
#include "cli/bench.h"

#define MAKE_IN(...) WN_TRY(wn_bench_in(b, __VA_ARGS__))
#define MAKE_OUT(...) WN_TRY(wn_bench_out_of(b, __VA_ARGS__))

static void counted(wn_bench *b, double flops) {
  b->work = flops;
  b->flops = true;
}

/* Row `row` of a matrix, or element range of a vector, as doubles. */
static wn_status row_of(wn_bench *b, double **out, const wn_tensor *t, int64_t row) {
  return wn_bench_values(b, out, wn_tensor_slice(*t, 0, row, 1));
}

/* ---- memory ---- */

static wn_status cast_make(wn_bench *b) {
  MAKE_IN(WN_STAT, 1, 2, b->s.rows, b->s.hidden, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, b->s.rows, b->s.hidden, 0);
  return NULL;
}
static wn_status cast_run(wn_bench *b) {
  return b->ops->cast(b->device, &b->out[0], &b->in[0]);
}

/* ---- products: the query's down projection, and W_UK ---- */

static wn_status linear_make(wn_bench *b) {
  int64_t n = b->s.rows, D = b->s.hidden, O = b->s.heads * (b->s.nope + b->s.rope) / 2;
  MAKE_IN(WN_ACT, 1, 2, n, D, 0);
  MAKE_IN(WN_ACT, 1 / sqrt((double)D), 2, O, D, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, n, O, 0);
  counted(b, 2.0 * (double)n * (double)D * (double)O);
  return NULL;
}
static wn_status linear_run(wn_bench *b) {
  return b->ops->linear(b->device, &b->out[0], &b->in[0], &b->in[1], &(wn_accumulate){0});
}
static wn_status linear_check(wn_bench *b) {
  double *x, *y, *w, *expected;
  int64_t D = b->in[0].dim[1], O = b->out[0].dim[1], some = O < 64 ? O : 64, row = b->s.rows / 2;
  WN_TRY(row_of(b, &x, &b->in[0], row));
  WN_TRY(row_of(b, &y, &b->out[0], row));
  WN_TRY(wn_bench_values(b, &w, wn_tensor_slice(b->in[1], 0, O - some, some)));
  WN_TRY(wn_bench_host(b, (void **)&expected, some * 8));
  for (int64_t o = 0; o < some; o++) {
    expected[o] = 0;
    for (int64_t i = 0; i < D; i++) expected[o] += x[i] * w[o * D + i];
  }
  return wn_bench_close(b, "y", y + O - some, expected, some);
}

static wn_status linear_backward_input_make(wn_bench *b) {
  WN_TRY(linear_make(b)); /* y takes dy's place */
  double work = b->work;
  WN_TRY(wn_bench_fill(b, &b->out[0], 1));
  b->in[0] = b->out[0];
  b->n_out = 0;
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, b->s.rows, b->s.hidden, 0);
  counted(b, work);
  return NULL;
}
static wn_status linear_backward_input_run(wn_bench *b) {
  return b->ops->linear_backward_input(b->device, &b->out[0], &b->in[0], &b->in[1], &(wn_accumulate){0});
}

static wn_status linear_backward_weight_make(wn_bench *b) {
  int64_t n = b->s.rows, D = b->s.hidden, O = b->s.heads * (b->s.nope + b->s.rope) / 2;
  MAKE_IN(WN_ACT, 1, 2, n, O, 0);
  MAKE_IN(WN_ACT, 1, 2, n, D, 0);
  MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 2, O, D, 0);
  counted(b, 2.0 * (double)n * (double)D * (double)O);
  return NULL;
}
static wn_status linear_backward_weight_run(wn_bench *b) {
  return b->ops->linear_backward_weight(b->device, &b->out[0], &b->in[0], &b->in[1]);
}

static wn_status per_head_linear_make(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->nope);
  MAKE_IN(WN_ACT, 1 / sqrt((double)s->nope), 3, s->heads, s->nope, s->latent);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 3, s->rows, s->heads, s->latent);
  counted(b, 2.0 * (double)(s->rows * s->heads) * (double)(s->nope * s->latent));
  return NULL;
}
static wn_status per_head_linear_run(wn_bench *b) {
  return b->ops->per_head_linear(b->device, &b->out[0], &b->in[0], &b->in[1], &(wn_per_head_params){0});
}

static wn_status per_head_linear_backward_weight_make(wn_bench *b) {
  const wn_bench_sizes *s = &b->s;
  MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->nope);
  MAKE_IN(WN_ACT, 1, 3, s->rows, s->heads, s->latent);
  MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 3, s->heads, s->nope, s->latent);
  counted(b, 2.0 * (double)(s->rows * s->heads) * (double)(s->nope * s->latent));
  return NULL;
}
static wn_status per_head_linear_backward_weight_run(wn_bench *b) {
  return b->ops->per_head_linear_backward_weight(b->device, &b->out[0], &b->in[0], &b->in[1]);
}

/* The experts' matrices, one after another. */
static wn_status dequantise_make(wn_bench *b) {
  int64_t E = b->s.experts, F = b->s.expert_width, D = b->s.hidden, words = (E * F * D + 3) / 4;
  int32_t *codes;
  WN_TRY(wn_bench_host(b, (void **)&codes, words * (int64_t)sizeof *codes));
  for (int64_t i = 0; i < words; i++) codes[i] = (int32_t)((uint32_t)i * 2654435761u & 0x77777777u); /* no NaN */
  WN_TRY(wn_bench_ints(b, codes, 1, words, 0));
  b->in[0] = wn_tensor_of(b->in[0].data, WN_F8_E4M3, 3, E, F, D, 0);
  MAKE_IN(WN_STAT, 0.1, 3, E, wn_f8_blocks(F), wn_f8_blocks(D));
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 3, E, F, D);
  return NULL;
}

static wn_tensor matrix_of(wn_tensor t, int64_t e) {
  return wn_tensor_view(wn_tensor_slice(t, 0, e, 1), 2, t.dim[1], t.dim[2], 0, 0);
}
static wn_status dequantise_run(wn_bench *b) {
  for (int64_t e = 0; e < b->s.experts; e++) {
    wn_tensor w = matrix_of(b->out[0], e), codes = matrix_of(b->in[0], e), scale = matrix_of(b->in[1], e);
    WN_TRY(b->ops->dequantise(b->device, &w, &codes, &scale));
  }
  return NULL;
}

/* ---- norms ---- */

static const wn_norm_params norm_params = {.eps = 1e-6};

static wn_status rms_norm_make(wn_bench *b) {
  MAKE_IN(WN_ACT, 1, 2, b->s.rows, b->s.hidden, 0);
  MAKE_IN(WN_ACT, 1, 1, b->s.hidden, 0, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, b->s.rows, b->s.hidden, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 1, b->s.rows, 0, 0);
  return NULL;
}
static wn_status rms_norm_run(wn_bench *b) {
  return b->ops->rms_norm(b->device, &b->out[0], &b->out[1], &b->in[0], &b->in[1], &norm_params);
}
/* One row of either norm: y = (x - mean) r w + bias. */
static wn_status check_norm(wn_bench *b, bool layer) {
  double *x, *w, *bias = NULL, *y, *expected, mean = 0, squares = 0;
  int64_t D = b->in[0].dim[1], row = b->s.rows - 1;
  WN_TRY(row_of(b, &x, &b->in[0], row));
  WN_TRY(row_of(b, &y, &b->out[0], row));
  WN_TRY(wn_bench_values(b, &w, b->in[1]));
  if (layer) WN_TRY(wn_bench_values(b, &bias, b->in[2]));
  WN_TRY(wn_bench_host(b, (void **)&expected, D * 8));
  for (int64_t i = 0; layer && i < D; i++) mean += x[i] / (double)D;
  for (int64_t i = 0; i < D; i++) squares += (x[i] - mean) * (x[i] - mean) / (double)D;
  for (int64_t i = 0; i < D; i++)
    expected[i] = (x[i] - mean) / sqrt(squares + norm_params.eps) * w[i] + (layer ? bias[i] : 0);
  return wn_bench_close(b, "y", y, expected, D);
}
static wn_status rms_norm_check(wn_bench *b) {
  return check_norm(b, false);
}

static wn_status rms_norm_backward_make(wn_bench *b) {
  int64_t n = b->s.rows, D = b->s.hidden;
  for (int i = 0; i < 2; i++) MAKE_IN(WN_ACT, 1, 2, n, D, 0);
  MAKE_IN(WN_STAT, 1, 1, n, 0, 0);
  MAKE_IN(WN_ACT, 1, 1, D, 0, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, n, D, 0);
  MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 1, D, 0, 0);
  return NULL;
}
static wn_status rms_norm_backward_run(wn_bench *b) {
  return b->ops->rms_norm_backward(b->device, &b->out[0], &b->out[1], &b->in[0], &b->in[1], &b->in[2], &b->in[3],
                                   &norm_params);
}

static wn_status layer_norm_make(wn_bench *b) {
  int64_t n = b->s.rows, D = b->s.index_width;
  MAKE_IN(WN_ACT, 1, 2, n, D, 0);
  for (int i = 0; i < 2; i++) MAKE_IN(WN_ACT, 1, 1, D, 0, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, n, D, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, n, 2, 0);
  return NULL;
}
static wn_status layer_norm_run(wn_bench *b) {
  return b->ops->layer_norm(b->device, &b->out[0], &b->out[1], &b->in[0], &b->in[1], &b->in[2], &norm_params);
}
static wn_status layer_norm_check(wn_bench *b) {
  return check_norm(b, true);
}

static wn_status layer_norm_backward_make(wn_bench *b) {
  int64_t n = b->s.rows, D = b->s.index_width;
  MAKE_IN(WN_WGRAD, 1, 2, n, D, 0);
  MAKE_IN(WN_ACT, 1, 2, n, D, 0);
  MAKE_IN(WN_STAT, 1, 2, n, 2, 0);
  MAKE_IN(WN_ACT, 1, 1, D, 0, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, n, D, 0);
  for (int i = 0; i < 2; i++) MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 1, D, 0, 0);
  return NULL;
}
static wn_status layer_norm_backward_run(wn_bench *b) {
  return b->ops->layer_norm_backward(b->device, &b->out[0], &b->out[1], &b->out[2], &b->in[0], &b->in[1], &b->in[2],
                                     &b->in[3], &norm_params);
}

/* ---- rope and heads: the rope columns of every query's heads ---- */

static wn_tensor rope_part(const wn_bench *b, wn_tensor q) {
  return wn_tensor_slice(q, 2, b->s.nope, b->s.rope);
}

static wn_status rope_make(wn_bench *b) {
  WN_TRY(wn_bench_causal(b));
  MAKE_OUT(WN_ACT, WN_BENCH_KEEP, 3, b->s.rows, b->s.heads, b->s.nope + b->s.rope);
  b->work *= (double)b->s.rope / (double)(b->s.nope + b->s.rope);
  return NULL;
}
static void rope_angles(const wn_bench *b, float *inv_freq) {
  for (int64_t j = 0; j < b->s.rope / 2; j++) inv_freq[j] = (float)pow(10000.0, -(double)(2 * j) / (double)b->s.rope);
}
static wn_status rope_run(wn_bench *b) {
  float inv_freq[256];
  WN_ASSERT(b->s.rope <= 512, "rope width %lld", (long long)b->s.rope);
  rope_angles(b, inv_freq);
  wn_tensor x = rope_part(b, b->out[0]);
  return b->ops->rope(b->device, &x, b->rows.position, &(wn_rope_params){.inv_freq = inv_freq, .interleaved = true});
}
/* One more turn of the last row. */
static wn_status rope_check(wn_bench *b) {
  float inv_freq[256];
  double *before, *after;
  wn_tensor last = wn_tensor_slice(rope_part(b, b->out[0]), 0, b->s.rows - 1, 1);
  WN_TRY(wn_bench_values(b, &before, last));
  WN_TRY(rope_run(b));
  WN_TRY(wn_bench_values(b, &after, last));
  rope_angles(b, inv_freq);
  for (int64_t i = 0; i < wn_tensor_count(&last); i += 2) {
    double angle = (double)((float)(b->s.seq - 1) * inv_freq[i % b->s.rope / 2]), c = cos(angle), s = sin(angle);
    double x = before[i], y = before[i + 1];
    before[i] = x * c - y * s;
    before[i + 1] = x * s + y * c;
  }
  return wn_bench_close(b, "the rotated row", after, before, wn_tensor_count(&last));
}

static wn_status sum_heads_make(wn_bench *b) {
  MAKE_IN(WN_ACT, 1, 3, b->s.rows, b->s.heads, b->s.nope + b->s.rope);
  b->work *= (double)b->s.rope / (double)(b->s.nope + b->s.rope);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, b->s.rows, b->s.rope, 0);
  return NULL;
}
static wn_status sum_heads_run(wn_bench *b) {
  wn_tensor x = rope_part(b, b->in[0]);
  return b->ops->sum_heads(b->device, &b->out[0], &x, &(wn_accumulate){0});
}

static wn_status broadcast_heads_make(wn_bench *b) {
  MAKE_OUT(WN_ACT, WN_BENCH_KEEP, 3, b->s.rows, b->s.heads, b->s.nope + b->s.rope);
  b->work *= 0.5 * (double)b->s.rope / (double)(b->s.nope + b->s.rope);
  MAKE_IN(WN_ACT, 1, 2, b->s.rows, b->s.rope, 0);
  return NULL;
}
static wn_status broadcast_heads_run(wn_bench *b) {
  wn_tensor y = rope_part(b, b->out[0]);
  return b->ops->broadcast_heads(b->device, &y, &b->in[0]);
}

/* ---- elementwise ---- */

static wn_status add_make(wn_bench *b) {
  for (int i = 0; i < 2; i++) MAKE_IN(WN_ACT, 1, 2, b->s.rows, b->s.hidden, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, b->s.rows, b->s.hidden, 0);
  return NULL;
}
static wn_status add_run(wn_bench *b) {
  return b->ops->add(b->device, &b->out[0], &b->in[0], &b->in[1]);
}

static wn_status scale_make(wn_bench *b) {
  MAKE_IN(WN_STAT, 1, 2, b->s.rows, b->s.index_heads, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, b->s.rows, b->s.index_heads, 0);
  return NULL;
}
static wn_status scale_run(wn_bench *b) {
  return b->ops->scale(b->device, &b->out[0], &b->in[0], 0.125);
}

static int64_t expert_rows(const wn_bench *b) {
  return b->s.rows * b->s.experts_a_token;
}

static wn_status swiglu_make(wn_bench *b) {
  for (int i = 0; i < 2; i++) MAKE_IN(WN_ACT, 1, 2, expert_rows(b), b->s.expert_width, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, expert_rows(b), b->s.expert_width, 0);
  return NULL;
}
static wn_status swiglu_run(wn_bench *b) {
  return b->ops->swiglu(b->device, &b->out[0], &b->in[0], &b->in[1]);
}
static wn_status swiglu_check(wn_bench *b) {
  double *gate, *up, *y;
  int64_t row = expert_rows(b) - 1;
  WN_TRY(row_of(b, &gate, &b->in[0], row));
  WN_TRY(row_of(b, &up, &b->in[1], row));
  WN_TRY(row_of(b, &y, &b->out[0], row));
  for (int64_t i = 0; i < b->s.expert_width; i++) up[i] *= gate[i] / (1 + exp(-gate[i]));
  return wn_bench_close(b, "y", y, up, b->s.expert_width);
}

static wn_status swiglu_backward_make(wn_bench *b) {
  for (int i = 0; i < 3; i++) MAKE_IN(WN_ACT, 1, 2, expert_rows(b), b->s.expert_width, 0);
  for (int i = 0; i < 2; i++) MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, expert_rows(b), b->s.expert_width, 0);
  return NULL;
}
static wn_status swiglu_backward_run(wn_bench *b) {
  return b->ops->swiglu_backward(b->device, &b->out[0], &b->out[1], &b->in[0], &b->in[1], &b->in[2]);
}

/* ---- embedding and head ---- */

static wn_status tokens(wn_bench *b) {
  int32_t *host;
  WN_TRY(wn_bench_host(b, (void **)&host, b->s.rows * 4));
  for (int64_t i = 0; i < b->s.rows; i++)
    host[i] = (int32_t)wn_rng_below(1, WN_RNG_TEST, (uint64_t)i, (uint64_t)b->s.vocab);
  return wn_bench_ints(b, host, 1, b->s.rows, 0);
}

static wn_status embedding_make(wn_bench *b) {
  WN_TRY(tokens(b));
  MAKE_IN(WN_ACT, 1, 2, b->s.vocab, b->s.hidden, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, b->s.rows, b->s.hidden, 0);
  b->work = 2 * (double)wn_tensor_bytes(&b->out[0]);
  return NULL;
}
static wn_status embedding_run(wn_bench *b) {
  return b->ops->embedding(b->device, &b->out[0], &b->in[0], &b->in[1]);
}

static wn_status embedding_backward_make(wn_bench *b) {
  WN_TRY(tokens(b));
  MAKE_IN(WN_ACT, 1, 2, b->s.rows, b->s.hidden, 0);
  MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 2, b->s.vocab, b->s.hidden, 0);
  b->work = (double)wn_tensor_bytes(&b->in[1]) + 8.0 * (double)(b->s.rows * b->s.hidden);
  return NULL;
}
static wn_status embedding_backward_run(wn_bench *b) {
  return b->ops->embedding_backward(b->device, &b->out[0], &b->in[1], &b->in[0]);
}

static wn_status head_loss_make(wn_bench *b) {
  int64_t n = b->s.rows, D = b->s.hidden, V = b->s.vocab;
  WN_TRY(tokens(b));
  MAKE_IN(WN_ACT, 1, 2, n, D, 0);
  MAKE_IN(WN_ACT, 1 / sqrt((double)D), 2, V, D, 0);
  MAKE_IN(WN_STAT, 1, 1, n, 0, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 1, n, 0, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, n, D, 0);
  MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 2, V, D, 0);
  counted(b, 6.0 * (double)n * (double)D * (double)V);
  return NULL;
}
static wn_status head_loss_run(wn_bench *b) {
  return b->ops->head_loss(b->device, &b->out[0], &b->out[1], &b->out[2], &b->in[1], &b->in[2], &b->in[0], &b->in[3],
                           &(wn_head_params){.chunk_rows = b->device->chunk_rows});
}

/* ---- mixture of experts ---- */

static wn_router_params router_params(const wn_bench *b) {
  int32_t groups = b->s.experts % 8 == 0 ? 8 : 1;
  return (wn_router_params){.n_group = groups,
                            .topk_group = groups > 1 ? groups / 2 : 1,
                            .norm_topk = true,
                            .scale = 2.5,
                            .rows_per_sequence = (int32_t)b->s.rows,
                            .balance_coeff = 1e-4};
}

static wn_status router_make(wn_bench *b) {
  int64_t n = b->s.rows, D = b->s.hidden, E = b->s.experts, K = b->s.experts_a_token;
  MAKE_IN(WN_ACT, 1, 2, n, D, 0);
  MAKE_IN(WN_ACT, 1 / sqrt((double)D), 2, E, D, 0);
  MAKE_IN(WN_STAT, 0.01, 1, E, 0, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, n, E, 0);
  MAKE_OUT(WN_INDEX, WN_BENCH_COUNT, 2, n, K, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, n, K, 0);
  MAKE_OUT(WN_INDEX, WN_BENCH_COUNT, 1, E, 0, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_ADD, 1, 1, 0, 0);
  return NULL;
}
static wn_status router_run(wn_bench *b) {
  const wn_router_params params = router_params(b);
  return b->ops->router(b->device, &b->out[0], &b->out[1], &b->out[2], &b->out[3], &b->out[4], &b->in[0], &b->in[1],
                        &b->in[2], &params);
}

/* Distinct experts of a row: neighbours from a random one on. Fills offset, and slot (may be NULL) as moe_permute. */
static wn_status choose_experts(wn_bench *b, int32_t **index, int32_t *slot) {
  int64_t n = b->s.rows, K = b->s.experts_a_token, E = b->s.experts;
  WN_TRY(wn_bench_host(b, (void **)index, n * K * 4));
  WN_TRY(wn_bench_host(b, (void **)&b->offset, (E + 1) * 8));
  memset(b->offset, 0, (size_t)(E + 1) * 8);
  for (int64_t i = 0; i < n; i++) {
    uint64_t first = wn_rng_below(2, WN_RNG_TEST, (uint64_t)i, (uint64_t)E);
    for (int64_t j = 0; j < K; j++) {
      (*index)[i * K + j] = (int32_t)((first + (uint64_t)j) % (uint64_t)E);
      b->offset[(*index)[i * K + j] + 1]++;
    }
  }
  for (int64_t e = 0; e < E; e++) b->offset[e + 1] += b->offset[e];
  if (!slot) return NULL;
  int64_t *next;
  WN_TRY(wn_bench_host(b, (void **)&next, E * 8));
  memcpy(next, b->offset, (size_t)E * 8);
  for (int64_t i = 0; i < n * K; i++) slot[i] = (int32_t)next[(*index)[i]]++;
  return NULL;
}

/* slot[n*K] as an input, and the weights [n,K]. */
static wn_status slots(wn_bench *b) {
  int32_t *index, *slot;
  WN_TRY(wn_bench_host(b, (void **)&slot, expert_rows(b) * 4));
  WN_TRY(choose_experts(b, &index, slot));
  return wn_bench_ints(b, slot, 1, expert_rows(b), 0);
}

static wn_status router_backward_make(wn_bench *b) {
  int64_t n = b->s.rows, D = b->s.hidden, E = b->s.experts, K = b->s.experts_a_token;
  int32_t *index;
  WN_TRY(choose_experts(b, &index, NULL));
  WN_TRY(wn_bench_ints(b, index, 2, n, K));
  MAKE_IN(WN_STAT, 1, 2, n, K, 0);
  MAKE_IN(WN_ACT, 1, 2, n, D, 0);
  MAKE_IN(WN_ACT, 1 / sqrt((double)D), 2, E, D, 0);
  MAKE_IN(WN_STAT, 0, 2, n, E, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_ADD, 2, n, D, 0);
  MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 2, E, D, 0);
  float *scores; /* sigmoids */
  WN_TRY(wn_bench_host(b, (void **)&scores, n * E * 4));
  for (int64_t i = 0; i < n * E; i++) scores[i] = (float)wn_rng_uniform(3, WN_RNG_TEST, (uint64_t)i % 65537);
  return b->ops->upload(b->device, &b->in[4], scores);
}
static wn_status router_backward_run(wn_bench *b) {
  const wn_router_params params = router_params(b);
  return b->ops->router_backward(b->device, &b->out[0], &b->out[1], &b->in[1], &b->in[4], &b->in[0], &b->in[2],
                                 &b->in[3], &params);
}

static wn_status moe_permute_make(wn_bench *b) {
  int32_t *index;
  WN_TRY(choose_experts(b, &index, NULL));
  WN_TRY(wn_bench_ints(b, index, 2, b->s.rows, b->s.experts_a_token));
  MAKE_IN(WN_ACT, 1, 2, b->s.rows, b->s.hidden, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, expert_rows(b), b->s.hidden, 0);
  MAKE_OUT(WN_INDEX, WN_BENCH_COUNT, 1, expert_rows(b), 0, 0);
  return NULL;
}
static wn_status moe_permute_run(wn_bench *b) {
  return b->ops->moe_permute(b->device, &b->out[0], &b->out[1], b->offset, &b->in[1], &b->in[0], (int32_t)b->s.experts);
}

static wn_status moe_permute_backward_make(wn_bench *b) {
  WN_TRY(slots(b));
  MAKE_IN(WN_ACT, 1, 2, expert_rows(b), b->s.hidden, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_ADD, 2, b->s.rows, b->s.hidden, 0);
  return NULL;
}
static wn_status moe_permute_backward_run(wn_bench *b) {
  return b->ops->moe_permute_backward(b->device, &b->out[0], &b->in[1], &b->in[0]);
}

static wn_status moe_combine_make(wn_bench *b) {
  WN_TRY(moe_permute_backward_make(b));
  MAKE_IN(WN_STAT, 0.3, 2, b->s.rows, b->s.experts_a_token, 0);
  return NULL;
}
static wn_status moe_combine_run(wn_bench *b) {
  return b->ops->moe_combine(b->device, &b->out[0], &b->in[1], &b->in[0], &b->in[2]);
}

static wn_status moe_combine_backward_make(wn_bench *b) {
  WN_TRY(slots(b));
  MAKE_IN(WN_ACT, 1, 2, expert_rows(b), b->s.hidden, 0);
  MAKE_IN(WN_STAT, 0.3, 2, b->s.rows, b->s.experts_a_token, 0);
  MAKE_IN(WN_ACT, 1, 2, b->s.rows, b->s.hidden, 0);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, expert_rows(b), b->s.hidden, 0);
  MAKE_OUT(WN_STAT, WN_BENCH_SET, 2, b->s.rows, b->s.experts_a_token, 0);
  return NULL;
}
static wn_status moe_combine_backward_run(wn_bench *b) {
  return b->ops->moe_combine_backward(b->device, &b->out[0], &b->out[1], &b->in[3], &b->in[1], &b->in[0], &b->in[2]);
}

/* x[rows of all experts, I] and the experts' weights [E][O,I], as one tensor and as an array of views. */
static wn_status experts_of(wn_bench *b, wn_role role, wn_tensor *whole) {
  WN_TRY(wn_bench_host(b, (void **)&b->expert, b->s.experts * (int64_t)sizeof *b->expert));
  int64_t each = whole->dim[1] * whole->dim[2];
  WN_ASSERT(whole->dtype == b->device->dtype_of[role], "experts of dtype %s", wn_dtype_name(whole->dtype));
  for (int64_t e = 0; e < b->s.experts; e++)
    b->expert[e] = wn_tensor_of((char *)whole->data + e * each * wn_dtype_bytes(whole->dtype), whole->dtype, 2,
                                whole->dim[1], whole->dim[2], 0, 0);
  return NULL;
}

static void grouped_work(wn_bench *b) {
  counted(b, 2.0 * (double)expert_rows(b) * (double)b->s.hidden * (double)b->s.expert_width);
}

/* Rows of width `from` and the experts' weights [E][F,D]; out, rows of width `to`. */
static wn_status grouped_product(wn_bench *b, int64_t from, int64_t to) {
  int64_t D = b->s.hidden, F = b->s.expert_width;
  int32_t *index;
  WN_TRY(choose_experts(b, &index, NULL));
  MAKE_IN(WN_ACT, 1, 2, expert_rows(b), from, 0);
  MAKE_IN(WN_ACT, 1 / sqrt((double)D), 3, b->s.experts, F, D);
  MAKE_OUT(WN_ACT, WN_BENCH_SET, 2, expert_rows(b), to, 0);
  grouped_work(b);
  return experts_of(b, WN_ACT, &b->in[1]);
}

static wn_status grouped_linear_make(wn_bench *b) {
  return grouped_product(b, b->s.hidden, b->s.expert_width);
}
static wn_status grouped_linear_run(wn_bench *b) {
  return b->ops->grouped_linear(b->device, &b->out[0], &b->in[0], b->expert, (int32_t)b->s.experts, b->offset,
                                &(wn_accumulate){0});
}

static wn_status grouped_linear_backward_input_make(wn_bench *b) {
  return grouped_product(b, b->s.expert_width, b->s.hidden);
}
static wn_status grouped_linear_backward_input_run(wn_bench *b) {
  return b->ops->grouped_linear_backward_input(b->device, &b->out[0], &b->in[0], b->expert, (int32_t)b->s.experts,
                                               b->offset, &(wn_accumulate){0});
}

static wn_status grouped_linear_backward_weight_make(wn_bench *b) {
  int64_t D = b->s.hidden, F = b->s.expert_width;
  int32_t *index;
  WN_TRY(choose_experts(b, &index, NULL));
  MAKE_IN(WN_ACT, 1, 2, expert_rows(b), F, 0);
  MAKE_IN(WN_ACT, 1, 2, expert_rows(b), D, 0);
  MAKE_OUT(WN_WGRAD, WN_BENCH_ADD, 3, b->s.experts, F, D);
  grouped_work(b);
  return experts_of(b, WN_WGRAD, &b->out[0]);
}
static wn_status grouped_linear_backward_weight_run(wn_bench *b) {
  return b->ops->grouped_linear_backward_weight(b->device, b->expert, &b->in[0], &b->in[1], (int32_t)b->s.experts,
                                                b->offset);
}

/* ---- optimizer ---- */

static const wn_adamw_params adamw_params = {
    .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .grad_scale = 1, .step = 10};

static wn_status adamw_make(wn_bench *b) {
  MAKE_IN(WN_WGRAD, 0.1, 1, b->s.elements, 0, 0);
  MAKE_OUT(WN_MASTER, WN_BENCH_KEEP, 1, b->s.elements, 0, 0);
  for (int i = 0; i < 2; i++) MAKE_OUT(WN_MASTER, WN_BENCH_ADD, 1, b->s.elements, 0, 0);
  return NULL;
}
static wn_status adamw_run(wn_bench *b) {
  return b->ops->adamw(b->device, &b->out[0], &b->out[1], &b->out[2], NULL, &b->in[0], &adamw_params);
}
/* One more step of the last elements. */
static wn_status adamw_check(wn_bench *b) {
  const wn_adamw_params *p = &adamw_params;
  int64_t some = b->s.elements < 100 ? b->s.elements : 100, from = b->s.elements - some;
  double *state[3], *after, *grad;
  for (int i = 0; i < 3; i++) WN_TRY(wn_bench_values(b, &state[i], wn_tensor_slice(b->out[i], 0, from, some)));
  WN_TRY(wn_bench_values(b, &grad, wn_tensor_slice(b->in[0], 0, from, some)));
  WN_TRY(adamw_run(b));
  WN_TRY(wn_bench_values(b, &after, wn_tensor_slice(b->out[0], 0, from, some)));
  for (int64_t i = 0; i < some; i++) {
    double g = grad[i], m = p->beta1 * state[1][i] + (1 - p->beta1) * g,
           v = p->beta2 * state[2][i] + (1 - p->beta2) * g * g;
    m /= 1 - pow(p->beta1, (double)p->step);
    v /= 1 - pow(p->beta2, (double)p->step);
    state[0][i] -= p->lr * (p->weight_decay * state[0][i] + m / (sqrt(v) + p->eps));
  }
  return wn_bench_close(b, "the master", after, state[0], some);
}

static wn_status sum_squares_make(wn_bench *b) {
  MAKE_IN(WN_WGRAD, 1, 1, b->s.elements, 0, 0);
  return NULL;
}
static wn_status sum_squares_run(wn_bench *b) {
  double sum;
  int64_t bad;
  return b->ops->sum_squares(b->device, &sum, &bad, &b->in[0], 1);
}

const wn_bench_case wn_bench_dense[] = {
    WN_BENCH_CASE(cast, NULL),
    WN_BENCH_CASE(dequantise, NULL),
    WN_BENCH_CASE(linear, linear_check),
    WN_BENCH_CASE(linear_backward_input, NULL),
    WN_BENCH_CASE(linear_backward_weight, NULL),
    WN_BENCH_CASE(per_head_linear, NULL),
    WN_BENCH_CASE(per_head_linear_backward_weight, NULL),
    WN_BENCH_CASE(grouped_linear, NULL),
    WN_BENCH_CASE(grouped_linear_backward_input, NULL),
    WN_BENCH_CASE(grouped_linear_backward_weight, NULL),
    WN_BENCH_CASE(rms_norm, rms_norm_check),
    WN_BENCH_CASE(rms_norm_backward, NULL),
    WN_BENCH_CASE(layer_norm, layer_norm_check),
    WN_BENCH_CASE(layer_norm_backward, NULL),
    WN_BENCH_CASE(rope, rope_check),
    WN_BENCH_CASE(add, NULL),
    WN_BENCH_CASE(scale, NULL),
    WN_BENCH_CASE(sum_heads, NULL),
    WN_BENCH_CASE(broadcast_heads, NULL),
    WN_BENCH_CASE(swiglu, swiglu_check),
    WN_BENCH_CASE(swiglu_backward, NULL),
    WN_BENCH_CASE(embedding, NULL),
    WN_BENCH_CASE(embedding_backward, NULL),
    WN_BENCH_CASE(head_loss, NULL),
    WN_BENCH_CASE(router, NULL),
    WN_BENCH_CASE(router_backward, NULL),
    WN_BENCH_CASE(moe_permute, NULL),
    WN_BENCH_CASE(moe_permute_backward, NULL),
    WN_BENCH_CASE(moe_combine, NULL),
    WN_BENCH_CASE(moe_combine_backward, NULL),
    WN_BENCH_CASE(adamw, adamw_check),
    WN_BENCH_CASE(sum_squares, NULL),
    {0},
};
