/* The lightning indexer on the CPU: scores, selection and both KLs against plain T x T FP64 forms. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "support/test.h"

#include "support/bench.h"
#include "support/plain_attention.h"

typedef struct shape {
  int32_t n, m, heads, width, k; /* of the indexer */
  int32_t n_heads, dq;           /* of the attention */
  bool shared_keys;
  plain_rows_kind rows;
  double scores; /* deviation of q.k, and so of the scores, roughly */
} shape;

static const shape shapes[] = {
    {1, 1, 1, 1, 1, 1, 1, false, PLAIN_CAUSAL, 1},        {7, 7, 3, 5, 2, 2, 3, false, PLAIN_CAUSAL, 1},
    {16, 16, 4, 8, 16, 2, 8, true, PLAIN_CAUSAL, 1},      {17, 17, 2, 8, 16, 2, 8, false, PLAIN_CAUSAL, 1},
    {131, 131, 4, 32, 17, 3, 24, false, PLAIN_CAUSAL, 1}, {129, 129, 5, 16, 8, 2, 16, true, PLAIN_DOCUMENTS, 1},
    {70, 301, 6, 13, 33, 2, 17, false, PLAIN_CAUSAL, 3},  {67, 463, 2, 9, 16, 3, 8, false, PLAIN_DOCUMENTS, 1},
    {97, 101, 3, 8, 5, 2, 8, false, PLAIN_HOLES, 1},      {33, 33, 1, 8, 4, 2, 8, false, PLAIN_ONE_KEY, 1},
    {1, 200, 4, 16, 32, 2, 12, true, PLAIN_CAUSAL, 1},    {150, 150, 4, 16, 9, 2, 8, false, PLAIN_DOCUMENTS, 300},
    {600, 603, 2, 4, 6, 1, 3, false, PLAIN_CAUSAL, 1}, /* more blocks of rows than groups that sum dk */
};

static wn_tensor output(const bench *b, wn_role role, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  wn_tensor t;
  OK(wn_device_tensor(b->device, &t, b->device->weights, "output", role, rank, d0, d1, d2, 0));
  wn_test_fill(&t, 99, 50, 0);
  return t;
}

typedef struct scene {
  wn_rows rows;
  wn_tensor q, k, w, qa, ka, lse;
  wn_indexer_params params;
  uint8_t *seen;
  plain_attention dense;
} scene;

static scene make_scene(const bench *b, const shape *c) {
  wn_device *d = b->device;
  double deviation = sqrt(c->scores);
  scene s = {.rows = plain_rows(d->weights, c->n, c->m, c->rows),
             .q = plain_input(d, WN_ACT, 11, deviation, 3, c->n, c->heads, c->width),
             .k = plain_input(d, WN_ACT, 12, deviation, 2, c->m, c->width, 0),
             .w = plain_input(d, WN_STAT, 13, 1, 2, c->n, c->heads, 0),
             .qa = plain_input(d, WN_ACT, 14, 1, 3, c->n, c->n_heads, c->dq),
             .ka = plain_input(d, WN_ACT, 15, 1, 3, c->m, c->shared_keys ? 1 : c->n_heads, c->dq),
             .params = {.scale = 1 / sqrt(c->width), .attention_scale = 1.3 / sqrt(c->dq), .coeff = 0.7}};
  s.seen = plain_seen(d->weights, &s.rows, NULL);
  s.dense = plain_attend(d->weights, &s.qa, &s.ka, &s.ka, &s.qa, s.seen, s.params.attention_scale);
  s.lse = plain_input(d, WN_STAT, 16, 1, 2, c->n, c->n_heads, 0);
  for (int64_t i = 0; i < c->n * c->n_heads; i++) wn_test_set(&s.lse, i, wn_test_get(&s.dense.lse, i));
  return s;
}

static void all_shapes(void (*check)(const bench *, const shape *)) {
  for (int wide = 0; wide < 2; wide++)
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
      bench b = make_bench(wide, 2);
      print_message("%s shape %zu\n", wide ? "F64" : "F32", i);
      check(&b, &shapes[i]);
      free_bench(&b);
    }
}

static void check_scores(const bench *b, const shape *c) {
  scene s = make_scene(b, c);
  wn_tensor scores = output(b, WN_STAT, 2, c->n, c->m, 0);
  wn_tensor want = plain_index(b->device->weights, &s.q, &s.k, &s.w, s.seen, s.params.scale);
  OK(b->device->ops->indexer_scores(b->device, &scores, &s.q, &s.k, &s.w, &s.rows, &s.params));
  wn_test_close("scores", &scores, &want, b->tolerance * c->scores, b->tolerance);
}

/* The selection must be exactly the plain top-k of the scores that the operation itself makes. */
static void check_selection(const char *what, const bench *b, const scene *s, int64_t k) {
  int64_t n = s->rows.n_rows, m = s->rows.n_keys;
  wn_tensor scores = output(b, WN_STAT, 2, n, m, 0), picks = output(b, WN_INDEX, 2, n, k, 0);
  OK(b->device->ops->indexer_scores(b->device, &scores, &s->q, &s->k, &s->w, &s->rows, &s->params));
  OK(b->device->ops->indexer_select(b->device, &picks, &s->q, &s->k, &s->w, &s->rows, &s->params));
  double *row = malloc((size_t)m * sizeof *row);
  int32_t *want = malloc((size_t)k * sizeof *want);
  for (int64_t i = 0; i < n; i++) {
    for (int64_t j = 0; j < m; j++) row[j] = wn_test_get(&scores, i * m + j);
    plain_top_k(want, k, row, s->seen + i * m, m);
    for (int64_t j = 0; j < k; j++)
      if ((int32_t)wn_test_get(&picks, i * k + j) != want[j])
        fail_msg("%s: row %lld place %lld: %d, expected %d", what, (long long)i, (long long)j,
                 (int)wn_test_get(&picks, i * k + j), want[j]);
  }
  free(row);
  free(want);
}

static void check_select(const bench *b, const shape *c) {
  scene s = make_scene(b, c);
  check_selection("random", b, &s, c->k);
  check_selection("one pick", b, &s, 1);
  if (c->m < 200) check_selection("more picks than keys", b, &s, c->m + 3); /* the plain form is cubic */
}

static void scores_match_plain(void **state) {
  (void)state;
  all_shapes(check_scores);
}
static void selections_match_plain(void **state) {
  (void)state;
  all_shapes(check_select);
}

static void ties_and_broken_scores(void **state) {
  (void)state;
  for (int wide = 0; wide < 2; wide++) {
    bench b = make_bench(wide, 2);
    const shape c = {140, 140, 4, 16, 20, 2, 8, false, PLAIN_DOCUMENTS, 1};
    scene s = make_scene(&b, &c);
    int64_t n_q = wn_tensor_count(&s.q), n_k = wn_tensor_count(&s.k);
    for (int64_t i = 0; i < n_k; i++) wn_test_set(&s.k, i, fabs(wn_test_get(&s.k, i)));
    for (int64_t i = 0; i < n_q; i++) {
      double x = fabs(wn_test_get(&s.q, i));
      wn_test_set(&s.q, i, i / 64 % 2 ? x : -x); /* every other row's ReLUs are all dead */
    }
    check_selection("dead ReLUs", &b, &s, c.k);
    for (int64_t i = 0; i < n_k; i++) wn_test_set(&s.k, i, wn_test_get(&s.k, i % 16));
    check_selection("equal keys", &b, &s, c.k);
    scene t = make_scene(&b, &c);
    for (int64_t i = 0; i < n_k; i += 16 * 3) wn_test_set(&t.k, i, i % 96 ? NAN : INFINITY);
    check_selection("NaN and infinite keys", &b, &t, c.k);
    wn_tensor scores = output(&b, WN_STAT, 2, c.n, c.m, 0);
    wn_tensor want = plain_index(b.device->weights, &t.q, &t.k, &t.w, t.seen, t.params.scale);
    OK(b.device->ops->indexer_scores(b.device, &scores, &t.q, &t.k, &t.w, &t.rows, &t.params));
    for (int64_t i = 0; i < wn_tensor_count(&want); i++) /* NaN is not taken for a dead ReLU */
      assert_int_equal(isnan(wn_test_get(&scores, i)), isnan(wn_test_get(&want, i)));
    for (int64_t i = 0; i < n_k; i++) wn_test_set(&t.k, i, NAN);
    check_selection("all NaN", &b, &t, c.k);
    free_bench(&b);
  }
}

/* A row's scores, and so its picks, are the same bits in whatever row range they are computed. */
static void selection_does_not_depend_on_the_range(void **state) {
  (void)state;
  bench b = make_bench(false, 2);
  const shape c = {190, 333, 5, 24, 20, 2, 8, false, PLAIN_CAUSAL, 1};
  scene s = make_scene(&b, &c);
  wn_tensor whole = output(&b, WN_STAT, 2, c.n, c.m, 0);
  OK(b.device->ops->indexer_scores(b.device, &whole, &s.q, &s.k, &s.w, &s.rows, &s.params));
  for (int32_t from = 0, step = 1; from < c.n; from += step, step += 13) {
    int32_t count = from + step > c.n ? c.n - from : step;
    wn_rows part = {.n_rows = count,
                    .n_keys = c.m,
                    .first_key = s.rows.first_key + from,
                    .last_key = s.rows.last_key + from,
                    .position = s.rows.position + from};
    wn_tensor q = wn_tensor_slice(s.q, 0, from, count), w = wn_tensor_slice(s.w, 0, from, count);
    wn_tensor scores = output(&b, WN_STAT, 2, count, c.m, 0);
    OK(b.device->ops->indexer_scores(b.device, &scores, &q, &s.k, &w, &part, &s.params));
    assert_memory_equal(scores.data, (float *)whole.data + (int64_t)from * c.m, (size_t)wn_tensor_bytes(&scores));
  }
  free_bench(&b);
}

static void compare_kl(const char *what, const bench *b, const plain_kl *want, const wn_tensor *kl, const wn_tensor *dq,
                       const wn_tensor *dk, const wn_tensor *dw, double size) {
  double t = b->tolerance;
  print_message("  %s: gradients off by %.1e %.1e %.1e\n", what, wn_test_relative_norm(dq, &want->dq),
                wn_test_relative_norm(dk, &want->dk), wn_test_relative_norm(dw, &want->dw));
  wn_test_close("kl", kl, &want->kl, t * (1 + size / 8), t);
  wn_test_close("dq", dq, &want->dq, t * size, 8 * t);
  wn_test_close("dk", dk, &want->dk, 2 * t * size, 8 * t);
  wn_test_close("dw", dw, &want->dw, t * size, 8 * t);
}

static void check_kl_dense(const bench *b, const shape *c) {
  const wn_ops *ops = b->device->ops;
  wn_device *d = b->device;
  scene s = make_scene(b, c);
  plain_kl want =
      plain_indexer_kl(d->weights, &s.q, &s.k, &s.w, &s.dense.p_mean, s.seen, s.params.scale, s.params.coeff);
  wn_tensor kl = output(b, WN_STAT, 1, c->n, 0, 0), dw = plain_input(d, WN_STAT, 17, 9, 2, c->n, c->heads, 0);
  wn_tensor dq = plain_input(d, WN_ACT, 18, 9, 3, c->n, c->heads, c->width);
  wn_tensor dk = plain_input(d, WN_WGRAD, 19, 0, 2, c->m, c->width, 0);
  OK(ops->indexer_kl_dense(d, &kl, &dq, &dk, &dw, &s.q, &s.k, &s.w, &s.qa, &s.ka, &s.lse, &s.rows, &s.params));
  compare_kl("dense", b, &want, &kl, &dq, &dk, &dw, c->scores);
  wn_tensor alone = output(b, WN_STAT, 1, c->n, 0, 0);
  OK(ops->indexer_kl_dense(d, &alone, NULL, NULL, NULL, &s.q, &s.k, &s.w, &s.qa, &s.ka, &s.lse, &s.rows, &s.params));
  wn_test_close("kl alone", &alone, &kl, 0, 0);
  for (int64_t i = 0; i < c->n; i++) {
    if (s.rows.last_key[i] - s.rows.first_key[i] >= 1) continue;
    assert_true(wn_test_get(&kl, i) == 0);
    for (int64_t j = 0; j < c->heads; j++) assert_true(wn_test_get(&dw, i * c->heads + j) == 0);
    for (int64_t j = 0; j < c->heads * c->width; j++) assert_true(wn_test_get(&dq, i * c->heads * c->width + j) == 0);
  }
  /* dk adds up over calls; the rest does not */
  OK(ops->indexer_kl_dense(d, &kl, &dq, &dk, &dw, &s.q, &s.k, &s.w, &s.qa, &s.ka, &s.lse, &s.rows, &s.params));
  for (int64_t i = 0; i < wn_tensor_count(&dk); i++) wn_test_set(&dk, i, wn_test_get(&dk, i) / 2);
  compare_kl("twice", b, &want, &kl, &dq, &dk, &dw, c->scores);
}

static void check_kl_sparse(const bench *b, const shape *c) {
  const wn_ops *ops = b->device->ops;
  wn_device *d = b->device;
  scene s = make_scene(b, c);
  wn_tensor selection = output(b, WN_INDEX, 2, c->n, c->k, 0);
  OK(ops->indexer_select(d, &selection, &s.q, &s.k, &s.w, &s.rows, &s.params));
  for (int64_t i = 0; i < c->n; i++) /* rows of fewer picks than they could have */
    for (int64_t j = c->k - i % 4 > 0 ? c->k - i % 4 : 0; i % 2 && j < c->k; j++)
      wn_test_set(&selection, i * c->k + j, -1);
  uint8_t *seen = plain_seen(d->weights, &s.rows, &selection);
  plain_attention picked = plain_attend(d->weights, &s.qa, &s.ka, &s.ka, &s.qa, seen, s.params.attention_scale);
  plain_kl want = plain_indexer_kl(d->weights, &s.q, &s.k, &s.w, &picked.p_mean, seen, s.params.scale, s.params.coeff);
  wn_tensor p = plain_input(d, WN_STAT, 20, 9, 2, c->n, c->k, 0);
  for (int64_t i = 0; i < c->n * c->k; i++) {
    int64_t key = (int64_t)wn_test_get(&selection, i);
    wn_test_set(&p, i, key < 0 ? 0 : wn_test_get(&picked.p_mean, i / c->k * c->m + key));
  }
  wn_tensor kl = output(b, WN_STAT, 1, c->n, 0, 0), dw = plain_input(d, WN_STAT, 17, 9, 2, c->n, c->heads, 0);
  wn_tensor dq = plain_input(d, WN_ACT, 18, 9, 3, c->n, c->heads, c->width);
  wn_tensor dk = plain_input(d, WN_WGRAD, 19, 0, 2, c->m, c->width, 0);
  OK(ops->indexer_kl_sparse(d, &kl, &dq, &dk, &dw, &s.q, &s.k, &s.w, &selection, &p, &s.rows, &s.params));
  compare_kl("sparse", b, &want, &kl, &dq, &dk, &dw, c->scores);
  wn_tensor alone = output(b, WN_STAT, 1, c->n, 0, 0);
  OK(ops->indexer_kl_sparse(d, &alone, NULL, NULL, NULL, &s.q, &s.k, &s.w, &selection, &p, &s.rows, &s.params));
  wn_test_close("kl alone", &alone, &kl, 0, 0);
}

static void kl_dense_matches_plain(void **state) {
  (void)state;
  all_shapes(check_kl_dense);
}
static void kl_sparse_matches_plain(void **state) {
  (void)state;
  all_shapes(check_kl_sparse);
}

/* The target is over all visible keys: mass that the indexer's own picks miss must count. And it sums to 1:
 * with a flat student (w = 0) the KL is log(visible) minus p's entropy, and the gradient's sum over keys is
 * 0. */
static void the_target_is_the_whole_row(void **state) {
  (void)state;
  bench b = make_bench(false, 2);
  const shape c = {300, 300, 4, 16, 8, 3, 16, false, PLAIN_CAUSAL, 1};
  scene s = make_scene(&b, &c);
  for (int64_t i = 0; i < wn_tensor_count(&s.w); i++) wn_test_set(&s.w, i, 0);
  wn_tensor kl = output(&b, WN_STAT, 1, c.n, 0, 0), want = plain_zeros(b.device->weights, 1, c.n, 0, 0);
  OK(b.device->ops->indexer_kl_dense(b.device, &kl, NULL, NULL, NULL, &s.q, &s.k, &s.w, &s.qa, &s.ka, &s.lse, &s.rows,
                                     &s.params));
  for (int64_t i = 1; i < c.n; i++) {
    double value = log((double)i + 1), sum = 0;
    for (int64_t j = 0; j <= i; j++) {
      double p = wn_test_get(&s.dense.p_mean, i * c.m + j);
      value += p * log(p);
      sum += p;
    }
    assert_true(fabs(sum - 1) < 1e-12);
    wn_test_set(&want, i, value);
  }
  wn_test_close("kl", &kl, &want, 2e-6, 1e-5);
  free_bench(&b);
}

/* One row of keys whose student is the teacher but for a little: the value is a small difference of large
 * terms. */
static void kl_near_convergence_in_f32(void **state) {
  (void)state;
  enum { N = 200, D = 24 };
  bench b = make_bench(false, 2);
  wn_device *d = b.device;
  wn_rows rows = plain_rows(d->weights, N, N, PLAIN_DOCUMENTS);
  /* one head, one weight of 1, and keys so far up the first axis that no ReLU is dead: I = q.k + a constant,
   * nearly qa.ka */
  wn_tensor q = plain_input(d, WN_ACT, 1, 1, 3, N, 1, D), k = plain_input(d, WN_ACT, 2, 1, 2, N, D, 0);
  wn_tensor w = plain_input(d, WN_STAT, 3, 0, 2, N, 1, 0), qa = plain_input(d, WN_ACT, 4, 1, 3, N, 1, D),
            ka = plain_input(d, WN_ACT, 5, 1, 3, N, 1, D);
  for (int64_t i = 0; i < N * D; i++) {
    wn_test_set(&qa, i, i % D ? wn_test_get(&q, i) : 0);
    wn_test_set(&ka, i, i % D ? wn_test_get(&k, i) : 0);
    wn_test_set(&q, i, i % D ? wn_test_get(&q, i) + 0.02 * wn_rng_normal(6, WN_RNG_TEST, (uint64_t)i) : 4);
    wn_test_set(&k, i, i % D ? wn_test_get(&k, i) : 16);
  }
  for (int64_t i = 0; i < N; i++) wn_test_set(&w, i, 1);
  uint8_t *seen = plain_seen(d->weights, &rows, NULL);
  wn_indexer_params params = {.scale = 0.2, .attention_scale = 0.2, .coeff = 1};
  plain_attention dense = plain_attend(d->weights, &qa, &ka, &ka, &qa, seen, params.attention_scale);
  wn_tensor lse = output(&b, WN_STAT, 2, N, 1, 0);
  for (int64_t i = 0; i < N; i++) wn_test_set(&lse, i, wn_test_get(&dense.lse, i));
  plain_kl want = plain_indexer_kl(d->weights, &q, &k, &w, &dense.p_mean, seen, params.scale, 1);
  wn_tensor kl = output(&b, WN_STAT, 1, N, 0, 0), dq = output(&b, WN_ACT, 3, N, 1, D),
            dk = output(&b, WN_WGRAD, 2, N, D, 0), dw = output(&b, WN_STAT, 2, N, 1, 0);
  for (int64_t i = 0; i < N * D; i++) wn_test_set(&dk, i, 0);
  OK(d->ops->indexer_kl_dense(d, &kl, &dq, &dk, &dw, &q, &k, &w, &qa, &ka, &lse, &rows, &params));
  double total = 0, uniform = 0, worst = 0;
  for (int64_t i = 0; i < N; i++) {
    double expected = wn_test_get(&want.kl, i), gap = fabs(wn_test_get(&kl, i) - expected);
    if (!(gap < 2e-7)) fail_msg("row %lld: kl %.9g, expected %.9g", (long long)i, wn_test_get(&kl, i), expected);
    worst = fmax(worst, gap);
    total += expected;
    for (int64_t j = 0; j < N; j++) {
      double p = wn_test_get(&dense.p_mean, i * N + j);
      if (p > 0) uniform += p * log(p * (rows.last_key[i] - rows.first_key[i] + 1));
    }
  }
  print_message("mean kl %.2e, uniform %.2e, worst row off by %.1e; gradients off by %.1e %.1e %.1e\n", total / N,
                uniform / N, worst, wn_test_relative_norm(&dq, &want.dq), wn_test_relative_norm(&dk, &want.dk),
                wn_test_relative_norm(&dw, &want.dw));
  assert_true(total < 0.05 * uniform);
  assert_true(wn_test_relative_norm(&dq, &want.dq) < 3e-4);
  assert_true(wn_test_relative_norm(&dk, &want.dk) < 3e-4);
  free_bench(&b);
}

typedef struct kl_outputs {
  wn_tensor kl, dq, dk, dw;
} kl_outputs;

static kl_outputs run_kl_dense(const bench *b, const shape *c, const scene *s) {
  wn_device *d = b->device;
  kl_outputs out = {.kl = output(b, WN_STAT, 1, c->n, 0, 0),
                    .dw = plain_input(d, WN_STAT, 17, 9, 2, c->n, c->heads, 0),
                    .dq = plain_input(d, WN_ACT, 18, 9, 3, c->n, c->heads, c->width),
                    .dk = plain_input(d, WN_WGRAD, 19, 0, 2, c->m, c->width, 0)};
  OK(d->ops->indexer_kl_dense(d, &out.kl, &out.dq, &out.dk, &out.dw, &s->q, &s->k, &s->w, &s->qa, &s->ka, &s->lse,
                              &s->rows, &s->params));
  return out;
}

/* Keys that no row sees hold NaN; a row of one document overflows. Nothing of it may reach the rest. */
static void strangers_do_not_leak(void **state) {
  (void)state;
  const shape c = {120, 620, 2, 8, 5, 2, 8, false, PLAIN_CAUSAL, 1};
  for (int poison = 0; poison < 3; poison++) {
    bench b = make_bench(false, 2);
    scene s = make_scene(&b, &c);
    int32_t first[120], last[120];
    for (int32_t i = 0; i < c.n; i++) { /* rows see 70 .. 110, 520 .. 560 or 580 .. 610 */
      first[i] = i % 2 == 0 ? 70 : i % 4 == 1 ? 520 : 580;
      last[i] = i % 2 == 0 ? 110 : i % 4 == 1 ? 560 : 610;
    }
    s.rows.first_key = first;
    s.rows.last_key = last;
    kl_outputs want = run_kl_dense(&b, &c, &s);
    for (int64_t key = 0; poison < 2 && key < c.m; key++) {
      bool stranger = poison ? key >= 128 && key < 512 : key < 70 || key > 610;
      for (int64_t i = 0; stranger && i < c.width; i++) wn_test_set(&s.k, key * c.width + i, NAN);
      for (int64_t i = 0; stranger && i < c.n_heads * c.dq; i++) wn_test_set(&s.ka, key * c.n_heads * c.dq + i, NAN);
    }
    for (int64_t i = 0; poison == 2 && i < c.heads * c.width; i++) wn_test_set(&s.q, 41 * c.heads * c.width + i, 3e38);
    kl_outputs got = run_kl_dense(&b, &c, &s);
    for (int64_t i = 0; i < c.n; i++) {
      if (poison == 2 && i == 41) continue;
      assert_true(wn_test_get(&got.kl, i) == wn_test_get(&want.kl, i));
      for (int64_t j = 0; j < c.heads; j++)
        assert_true(wn_test_get(&got.dw, i * c.heads + j) == wn_test_get(&want.dw, i * c.heads + j));
      for (int64_t j = 0; j < c.heads * c.width; j++)
        assert_true(wn_test_get(&got.dq, i * c.heads * c.width + j) ==
                    wn_test_get(&want.dq, i * c.heads * c.width + j));
    }
    for (int64_t i = 0; i < (poison == 2 ? 511 : c.m) * c.width; i++)
      assert_true(wn_test_get(&got.dk, i) == wn_test_get(&want.dk, i));
    free_bench(&b);
  }
}

/* ---- repeats, threads, memory ---- */

enum { R_OUTPUTS = 9 };

static void run_all(const bench *b, int32_t n, int32_t m, wn_tensor out[R_OUTPUTS]) {
  wn_device *d = b->device;
  const shape c = {n, m, 4, 16, 24, 3, 16, false, PLAIN_DOCUMENTS, 1};
  wn_rows rows = plain_rows(d->weights, n, m, c.rows);
  wn_indexer_params params = {.scale = 0.25, .attention_scale = 0.25, .coeff = 1};
  wn_attention_params attention = {.scale = 0.25};
  wn_tensor q = plain_input(d, WN_ACT, 11, 1, 3, n, c.heads, c.width),
            k = plain_input(d, WN_ACT, 12, 1, 2, m, c.width, 0), w = plain_input(d, WN_STAT, 13, 1, 2, n, c.heads, 0),
            qa = plain_input(d, WN_ACT, 14, 1, 3, n, c.n_heads, c.dq),
            ka = plain_input(d, WN_ACT, 15, 1, 3, m, c.n_heads, c.dq);
  wn_tensor o = output(b, WN_ACT, 3, n, c.n_heads, c.dq), lse = output(b, WN_STAT, 2, n, c.n_heads, 0);
  wn_tensor p = plain_input(d, WN_STAT, 16, 0, 2, n, c.k, 0);
  for (int64_t i = 0; i < n * c.k; i++) wn_test_set(&p, i, 1.0 / (double)c.k);
  out[0] = output(b, WN_INDEX, 2, n, c.k, 0);
  for (int i = 0; i < 2; i++) {
    out[1 + 4 * i] = output(b, WN_STAT, 1, n, 0, 0);
    out[2 + 4 * i] = output(b, WN_ACT, 3, n, c.heads, c.width);
    out[3 + 4 * i] = output(b, WN_WGRAD, 2, m, c.width, 0);
    out[4 + 4 * i] = output(b, WN_STAT, 2, n, c.heads, 0);
  }
  OK(d->ops->attention_dense(d, &o, &lse, NULL, NULL, &qa, &ka, &ka, &rows, &attention));
  wn_arena_reset_peak(d->scratch);
  OK(d->ops->indexer_select(d, &out[0], &q, &k, &w, &rows, &params));
  OK(d->ops->indexer_kl_dense(d, &out[1], &out[2], &out[3], &out[4], &q, &k, &w, &qa, &ka, &lse, &rows, &params));
  OK(d->ops->indexer_kl_sparse(d, &out[5], &out[6], &out[7], &out[8], &q, &k, &w, &out[0], &p, &rows, &params));
}

static void repeats_and_threads_agree_bit_for_bit(void **state) {
  (void)state;
  bench reference = make_bench(false, 1);
  wn_tensor want[R_OUTPUTS], got[R_OUTPUTS];
  run_all(&reference, 301, 333, want);
  for (int repeat = 0; repeat < 20; repeat++) {
    bench b = make_bench(false, 1 + repeat % 3);
    run_all(&b, 301, 333, got);
    for (int i = 0; i < R_OUTPUTS; i++)
      if (memcmp(got[i].data, want[i].data, (size_t)wn_tensor_bytes(&want[i])) != 0)
        fail_msg("output %d differs at repeat %d with %d threads", i, repeat, 1 + repeat % 3);
    free_bench(&b);
  }
  free_bench(&reference);
}

static void scratch_grows_linearly(void **state) {
  (void)state;
  double at[4];
  for (int i = 0; i < 4; i++) {
    bench b = make_bench(false, 2);
    wn_tensor out[R_OUTPUTS];
    run_all(&b, 512 << i, 512 << i, out);
    at[i] = (double)wn_arena_peak_bytes(b.device->scratch);
    free_bench(&b);
  }
  double slope = (at[1] - at[0]) / 512;
  print_message("scratch: %.0f bytes at 512 rows, %.1f bytes more a row\n", at[0], slope);
  for (int i = 1; i < 3; i++) assert_true(fabs((at[i + 1] - at[i]) / (512 << i) - slope) <= 0.02 * slope);
}

/* However early scratch runs out, the operation says so and gives back what it took. */
static void too_little_scratch_is_an_error(void **state) {
  (void)state;
  const shape c = {90, 90, 2, 8, 5, 2, 8, false, PLAIN_CAUSAL, 1};
  int refusals[4] = {0};
  for (size_t bytes = 256; bytes < 1 << 20; bytes *= 2) {
    bench b = {0};
    OK(wn_cpu_create_f32(&b.device, (wn_cpu_settings){.threads = 2, .scratch_bytes = bytes}));
    wn_device *d = b.device;
    scene s = make_scene(&b, &c);
    wn_tensor kl = output(&b, WN_STAT, 1, c.n, 0, 0), dq = output(&b, WN_ACT, 3, c.n, c.heads, c.width),
              dk = output(&b, WN_WGRAD, 2, c.m, c.width, 0), dw = output(&b, WN_STAT, 2, c.n, c.heads, 0),
              p = plain_input(d, WN_STAT, 20, 0, 2, c.n, c.k, 0), selection = output(&b, WN_INDEX, 2, c.n, c.k, 0);
    for (int64_t i = 0; i < c.n * c.k; i++) wn_test_set(&selection, i, i % c.k ? -1 : 0);
    wn_attention_params attention = {.scale = 0.1};
    wn_status status[4] = {
        d->ops->indexer_kl_dense(d, &kl, &dq, &dk, &dw, &s.q, &s.k, &s.w, &s.qa, &s.ka, &s.lse, &s.rows, &s.params),
        d->ops->indexer_kl_sparse(d, &kl, &dq, &dk, &dw, &s.q, &s.k, &s.w, &selection, &p, &s.rows, &s.params),
        d->ops->attention_masked_backward(d, NULL, NULL, NULL, &p, NULL, &s.qa, &s.ka, &s.ka, &selection, &s.lse, NULL,
                                          &s.rows, &attention),
        d->ops->indexer_select(d, &selection, &s.q, &s.k, &s.w, &s.rows, &s.params)};
    for (int i = 0; i < 4; i++) {
      if (!status[i]) continue;
      refusals[i]++;
      REFUSED(status[i], WN_E_MEMORY, "scratch");
    }
    assert_int_equal(wn_arena_used_bytes(d->scratch), 0);
    wn_cpu_free_f32(d);
  }
  for (int i = 0; i < 4; i++) assert_in_range(refusals[i], 1, 10);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(scores_match_plain),          cmocka_unit_test(selections_match_plain),
      cmocka_unit_test(ties_and_broken_scores),      cmocka_unit_test(selection_does_not_depend_on_the_range),
      cmocka_unit_test(kl_dense_matches_plain),      cmocka_unit_test(kl_sparse_matches_plain),
      cmocka_unit_test(the_target_is_the_whole_row), cmocka_unit_test(kl_near_convergence_in_f32),
      cmocka_unit_test(strangers_do_not_leak),       cmocka_unit_test(repeats_and_threads_agree_bit_for_bit),
      cmocka_unit_test(scratch_grows_linearly),      cmocka_unit_test(too_little_scratch_is_an_error),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
