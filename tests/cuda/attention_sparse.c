/* Absorbed sparse attention on the GPU, forward and backward, against the FP64 CPU. */
#include "support/twin.h"

typedef enum rows_kind { CAUSAL, DOCUMENTS, HOLES } rows_kind;
typedef enum picks_kind { RANDOM, SAME_FIRST, NONE } picks_kind;

typedef struct shape {
  int32_t n, m, n_heads, c, r, k;
  rows_kind rows;
  picks_kind picks;
  int64_t margin;
  double deviation; /* of q and kv: a logit's is its square */
} shape;

typedef struct problem {
  shape s;
  twin q, kv, d_o, selection;
  twin o, lse, delta, dq, dkv, p;
  twin_rows rows;
  wn_attention_params params;
} problem;

/* Row i is query m - n + i: it sees all keys up to itself, or those of its document. */
static twin_rows make_rows(twin_bench *b, const shape *s) {
  return twin_causal_end(b, s->n, s->m, s->rows == DOCUMENTS ? s->m / 3 + 1 : 0, s->rows == HOLES);
}

/* Distinct visible keys, ascending, of a number that differs from row to row; some rows pick nothing. SAME_FIRST: all
 * rows pick their first keys. */
static twin make_picks(twin_bench *b, const shape *s, const twin_rows *rows) {
  int32_t *x = malloc((size_t)s->n * (size_t)s->k * sizeof *x);
  assert_non_null(x);
  for (int32_t i = 0; i < s->n; i++) {
    int32_t first = rows->cpu.first_key[i], visible = rows->cpu.last_key[i] - first + 1, n = 0;
    int32_t want = s->picks == NONE || (s->picks == RANDOM && i % 11 == 3) ? 0 : i % 3 == 1 ? (s->k + 1) / 2 : s->k;
    if (want > visible) want = visible > 0 ? visible : 0;
    for (int32_t j = 0; j < visible && n < want; j++) {
      bool must = visible - j == want - n || s->picks == SAME_FIRST;
      if (must || wn_rng_below(5, WN_RNG_TEST, (uint64_t)i * 100000 + (uint64_t)j, (uint64_t)visible) < (uint64_t)want)
        x[i * s->k + n++] = first + j;
    }
    for (; n < s->k; n++) x[i * s->k + n] = -1;
  }
  twin t = twin_ints(b, x, 2, s->n, s->k);
  free(x);
  return t;
}

/* Keys that nobody picked hold NaN: they are never read. */
static void fill_kv(twin_bench *b, problem *x, double deviation, double mean) {
  int64_t width = x->s.c + x->s.r, m = x->s.m, n = (int64_t)x->s.n * x->s.k;
  double *values = malloc((size_t)(m * width) * sizeof *values);
  char *picked = calloc((size_t)m, 1);
  assert_true(values && picked);
  wn_tensor t = wn_tensor_of(values, WN_F64, 1, m * width, 0, 0, 0);
  wn_test_fill(&t, 2, deviation, mean);
  const int32_t *pick = x->selection.cpu.data;
  for (int64_t i = 0; i < n; i++)
    if (pick[i] >= 0) picked[pick[i]] = 1;
  for (int64_t i = 0; i < m * width; i++)
    if (!picked[i / width]) values[i] = NAN;
  twin_set(b, &x->kv, values);
  free(values);
  free(picked);
}

static problem make_problem(twin_bench *b, shape s) {
  problem x = {.s = s};
  int64_t width = s.c + s.r, g = s.margin;
  x.params = (wn_attention_params){.scale = 1 / sqrt((double)width), .v_width = s.c};
  x.rows = make_rows(b, &s);
  x.selection = make_picks(b, &s, &x.rows);
  x.q = twin_random(b, WN_ACT, 1, s.deviation, g, 3, s.n, s.n_heads, width);
  x.kv = twin_strided(b, WN_ACT, g, 2, s.m, width, 0);
  fill_kv(b, &x, s.deviation, 0);
  x.d_o = twin_random(b, WN_ACT, 3, 1, g, 3, s.n, s.n_heads, s.c);
  x.o = twin_strided(b, WN_ACT, g, 3, s.n, s.n_heads, s.c);
  x.lse = twin_strided(b, WN_STAT, g, 2, s.n, s.n_heads, 0);
  x.delta = twin_strided(b, WN_STAT, g, 2, s.n, s.n_heads, 0);
  x.dq = twin_strided(b, WN_ACT, g, 3, s.n, s.n_heads, width);
  x.dkv = twin_strided(b, WN_WGRAD, g, 2, s.m, width, 0);
  x.p = twin_strided(b, WN_STAT, g, 2, s.n, s.k, 0);
  twin *outs[] = {&x.o, &x.lse, &x.delta, &x.dq, &x.p};
  for (size_t i = 0; i < sizeof outs / sizeof *outs; i++) twin_poison(b, outs[i]);
  twin_constant(b, &x.dkv, 0);
  return x;
}

static void forward(twin_bench *b, problem *x, bool with_delta) {
  OK(b->cpu->ops->attention_sparse(b->cpu, &x->o.cpu, &x->lse.cpu, with_delta ? &x->delta.cpu : NULL,
                                   with_delta ? &x->d_o.cpu : NULL, &x->q.cpu, &x->kv.cpu, &x->selection.cpu,
                                   &x->rows.cpu, &x->params));
  OK(b->cuda->ops->attention_sparse(b->cuda, &x->o.cuda, &x->lse.cuda, with_delta ? &x->delta.cuda : NULL,
                                    with_delta ? &x->d_o.cuda : NULL, &x->q.cuda, &x->kv.cuda, &x->selection.cuda,
                                    &x->rows.cuda, &x->params));
}

static void backward_cuda(wn_device *device, void *context) {
  problem *x = context;
  OK(device->ops->attention_sparse_backward(device, &x->dq.cuda, &x->dkv.cuda, &x->p.cuda, &x->d_o.cuda, &x->q.cuda,
                                            &x->kv.cuda, &x->selection.cuda, &x->lse.cuda, &x->delta.cuda,
                                            &x->rows.cuda, &x->params));
}

static void backward(twin_bench *b, problem *x) {
  OK(b->cpu->ops->attention_sparse_backward(b->cpu, &x->dq.cpu, &x->dkv.cpu, &x->p.cpu, &x->d_o.cpu, &x->q.cpu,
                                            &x->kv.cpu, &x->selection.cpu, &x->lse.cpu, &x->delta.cpu, &x->rows.cpu,
                                            &x->params));
  backward_cuda(b->cuda, x);
}

static void check_forward(twin_bench *b, problem *x) {
  twin_close(b, "o", &x->o, twin_bf16);
  twin_close(b, "lse", &x->lse, twin_f32);
}

/* delta is one dot product: its error is measured by the sizes of what is dotted, |d_o| |o| / sqrt(c). */
static void check_delta(twin_bench *b, problem *x) {
  wn_tensor host = twin_download(b, &x->delta.cuda);
  double worst = 0;
  for (int64_t i = 0; i < wn_tensor_count(&host); i++) {
    double d_o = 0, o = 0, got = wn_test_get(&host, i), want = wn_test_get(&x->delta.cpu, i);
    for (int64_t c = i * x->s.c; c < (i + 1) * x->s.c; c++) {
      d_o += pow(wn_test_get(&x->d_o.cpu, c), 2);
      o += pow(wn_test_get(&x->o.cpu, c), 2);
    }
    if (isnan(want) && isnan(got)) continue;
    double e = fabs(got - want), size = sqrt(d_o * o / x->s.c);
    if (!(e <= twin_bf16 * size)) fail_msg("delta %lld is %g, the CPU has %g", (long long)i, got, want);
    if (size > 0 && e / size > worst) worst = e / size;
  }
  print_message("  %-40s worst %.2e\n", "delta", worst);
  free(host.data);
}

static void check_backward(twin_bench *b, problem *x) {
  check_delta(b, x);
  twin_close(b, "dq", &x->dq, twin_bf16);
  twin_close(b, "dkv", &x->dkv, twin_bf16);
  twin_close(b, "p", &x->p, x->s.deviation < 10 ? twin_f32 : twin_bf16);
}

static const shape shapes[] = {
    /* n, m, H, c, r, k */
    {1, 1, 1, 16, 8, 1, CAUSAL, SAME_FIRST, 0, 1},
    {1, 1, 128, 512, 64, 6, CAUSAL, SAME_FIRST, 0, 1},
    {5, 5, 3, 16, 8, 64, CAUSAL, RANDOM, 0, 1},
    {5, 300, 16, 64, 16, 100, CAUSAL, RANDOM, 0, 1},
    {67, 101, 3, 24, 8, 100, DOCUMENTS, RANDOM, 0, 1},
    {67, 67, 16, 24, 8, 6, HOLES, RANDOM, 0, 1},
    {67, 131, 64, 16, 8, 64, DOCUMENTS, RANDOM, 0, 1},
    {67, 200, 128, 64, 16, 100, CAUSAL, RANDOM, 0, 1},
    {5, 65, 1, 512, 64, 64, CAUSAL, RANDOM, 0, 1},
    {67, 300, 16, 512, 64, 129, CAUSAL, RANDOM, 0, 1},
    {67, 140, 64, 512, 64, 64, HOLES, RANDOM, 0, 1},
    {67, 101, 128, 512, 64, 100, CAUSAL, RANDOM, 0, 1},
    {5, 3000, 128, 512, 64, 2048, CAUSAL, RANDOM, 0, 1},
    {5, 2049, 17, 64, 16, 2048, CAUSAL, RANDOM, 0, 1},
    {67, 80, 20, 200, 24, 33, CAUSAL, RANDOM, 0, 1},
    {9, 150, 5, 640, 64, 70, CAUSAL, RANDOM, 0, 1},
    /* heads that are no whole number of groups */
    {67, 400, 200, 512, 64, 300, CAUSAL, RANDOM, 0, 1},
    {9, 300, 130, 512, 64, 190, DOCUMENTS, RANDOM, 0, 1},
};

static void every_shape(void **state) {
  twin_bench *b = twin_begin(state);
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    const shape *s = &shapes[i];
    print_message("n %d, m %d, H %d, c %d, r %d, k %d\n", s->n, s->m, s->n_heads, s->c, s->r, s->k);
    problem x = make_problem(b, *s);
    forward(b, &x, false);
    check_forward(b, &x);
    twin_poison(b, &x.o);
    twin_poison(b, &x.lse);
    forward(b, &x, true);
    check_forward(b, &x);
    backward(b, &x);
    check_backward(b, &x);
    twin_end(b);
  }
}

/* Margins that leave rows aligned, and that do not; widths that are odd; values that are all of a key. */
static void views_and_odd_widths(void **state) {
  twin_bench *b = twin_begin(state);
  static const shape odd[] = {
      {19, 50, 3, 24, 8, 20, CAUSAL, RANDOM, 8, 1},     {19, 50, 3, 24, 8, 20, CAUSAL, RANDOM, 3, 1},
      {19, 90, 20, 13, 6, 70, DOCUMENTS, RANDOM, 0, 1}, {19, 90, 3, 15, 0, 70, CAUSAL, RANDOM, 1, 1},
      {19, 90, 18, 32, 0, 70, CAUSAL, RANDOM, 2, 1},    {11, 90, 70, 500, 61, 70, CAUSAL, RANDOM, 1, 1},
      {11, 90, 30, 520, 40, 70, CAUSAL, RANDOM, 0, 1},  {11, 90, 70, 512, 64, 70, CAUSAL, RANDOM, 8, 1},
      {11, 90, 70, 512, 64, 70, CAUSAL, RANDOM, 2, 1},
  };
  for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
    problem x = make_problem(b, odd[i]);
    forward(b, &x, true);
    check_forward(b, &x);
    backward(b, &x);
    check_backward(b, &x);
    twin_end(b);
  }
}

static void no_picks_at_all(void **state) {
  twin_bench *b = twin_begin(state);
  problem x = make_problem(b, (shape){7, 40, 20, 64, 16, 12, CAUSAL, NONE, 0, 1});
  forward(b, &x, true);
  backward(b, &x);
  twin *outs[] = {&x.o, &x.lse, &x.delta, &x.dq, &x.dkv, &x.p};
  for (size_t i = 0; i < sizeof outs / sizeof *outs; i++) twin_close(b, "of nothing", outs[i], 0);
  twin_end(b);
}

static void logits_of_a_thousand(void **state) {
  twin_bench *b = twin_begin(state);
  static const shape large[] = {{33, 90, 20, 64, 16, 40, CAUSAL, RANDOM, 0, 31.6},
                                {33, 90, 3, 64, 16, 70, DOCUMENTS, RANDOM, 0, 31.6},
                                {9, 90, 128, 512, 64, 70, CAUSAL, RANDOM, 0, 31.6}};
  for (size_t i = 0; i < sizeof large / sizeof *large; i++) {
    problem x = make_problem(b, large[i]);
    forward(b, &x, true);
    check_forward(b, &x);
    backward(b, &x);
    check_backward(b, &x);
    twin_end(b);
  }
}

/* Values near 100 and gradients that sum to 0: what BF16 leaves of o says nothing about delta. */
static void delta_is_of_the_unrounded_o(void **state) {
  twin_bench *b = twin_begin(state);
  problem x = make_problem(b, (shape){33, 80, 20, 64, 16, 64, CAUSAL, SAME_FIRST, 0, 0.1});
  fill_kv(b, &x, 1, 100);
  int64_t n = wn_tensor_count(&x.d_o.cpu);
  double *values = malloc((size_t)n * sizeof *values);
  for (int64_t i = 0; i < n; i++) values[i] = wn_test_get(&x.d_o.cpu, i - i % 2) * (i % 2 ? -1 : 1);
  twin_set(b, &x.d_o, values);
  free(values);
  x.params.scale = 1e-3;
  forward(b, &x, true);
  check_forward(b, &x);
  twin_close(b, "delta", &x.delta, twin_bf16);
  twin_end(b);
}

static void p_alone_and_no_p(void **state) {
  twin_bench *b = twin_begin(state);
  static const int32_t heads[] = {3, 40, 128, 128}, latent[] = {64, 64, 64, 512}, rope[] = {16, 16, 16, 64};
  for (int i = 0; i < 4; i++) {
    problem x = make_problem(b, (shape){23, 90, heads[i], latent[i], rope[i], 70, HOLES, RANDOM, 0, 1.5});
    forward(b, &x, true);
    backward(b, &x);
    check_backward(b, &x);
    twin_poison(b, &x.p);
    OK(b->cpu->ops->attention_sparse_backward(b->cpu, NULL, NULL, &x.p.cpu, NULL, &x.q.cpu, &x.kv.cpu, &x.selection.cpu,
                                              &x.lse.cpu, NULL, &x.rows.cpu, &x.params));
    OK(b->cuda->ops->attention_sparse_backward(b->cuda, NULL, NULL, &x.p.cuda, NULL, &x.q.cuda, &x.kv.cuda,
                                               &x.selection.cuda, &x.lse.cuda, NULL, &x.rows.cuda, &x.params));
    twin_close(b, "p alone", &x.p, twin_bf16);
    twin dq = x.dq; /* holds the whole backward's, on both */
    x.dq = twin_tensor(b, WN_ACT, 3, 23, heads[i], latent[i] + rope[i]);
    twin_poison(b, &x.dq);
    twin_constant(b, &x.dkv, 0.5);
    OK(b->cpu->ops->attention_sparse_backward(b->cpu, &x.dq.cpu, &x.dkv.cpu, NULL, &x.d_o.cpu, &x.q.cpu, &x.kv.cpu,
                                              &x.selection.cpu, &x.lse.cpu, &x.delta.cpu, &x.rows.cpu, &x.params));
    OK(b->cuda->ops->attention_sparse_backward(b->cuda, &x.dq.cuda, &x.dkv.cuda, NULL, &x.d_o.cuda, &x.q.cuda,
                                               &x.kv.cuda, &x.selection.cuda, &x.lse.cuda, &x.delta.cuda, &x.rows.cuda,
                                               &x.params));
    twin_close(b, "dq without p", &x.dq, twin_bf16);
    twin_close(b, "dkv onto 0.5", &x.dkv, twin_bf16);
    wn_tensor with = twin_download(b, &dq.cuda), without = twin_download(b, &x.dq.cuda);
    assert_int_equal(memcmp(with.data, without.data, (size_t)wn_tensor_bytes(&with)), 0);
    free(with.data);
    free(without.data);
    twin_end(b);
  }
}

/* Chunks of rows add up in dkv. */
static void row_chunks_add_up(void **state) {
  twin_bench *b = twin_begin(state);
  problem x = make_problem(b, (shape){67, 90, 20, 64, 16, 40, DOCUMENTS, RANDOM, 0, 1});
  forward(b, &x, true);
  backward(b, &x);
  twin_constant(b, &x.dkv, 0);
  for (int32_t from = 0; from < 67; from += 30) {
    int32_t n = 67 - from < 30 ? 67 - from : 30;
    twin *whole[] = {&x.dq, &x.p, &x.d_o, &x.q, &x.selection, &x.lse, &x.delta}, part[7];
    for (int i = 0; i < 7; i++) part[i] = twin_slice(*whole[i], 0, from, n);
    const twin_rows rows = {twin_run(x.rows.cpu, from, n), twin_run(x.rows.cuda, from, n)};
    OK(b->cpu->ops->attention_sparse_backward(b->cpu, &part[0].cpu, &x.dkv.cpu, &part[1].cpu, &part[2].cpu,
                                              &part[3].cpu, &x.kv.cpu, &part[4].cpu, &part[5].cpu, &part[6].cpu,
                                              &rows.cpu, &x.params));
    OK(b->cuda->ops->attention_sparse_backward(b->cuda, &part[0].cuda, &x.dkv.cuda, &part[1].cuda, &part[2].cuda,
                                               &part[3].cuda, &x.kv.cuda, &part[4].cuda, &part[5].cuda, &part[6].cuda,
                                               &rows.cuda, &x.params));
  }
  check_backward(b, &x);
  twin_end(b);
}

/* ---- sums of integers ---- */

/* Every row of dkv against its own norm, however small. */
static void check_every_key(twin_bench *b, const char *what, const twin *dkv, double bar) {
  wn_tensor host = twin_download(b, &dkv->cuda);
  int64_t width = host.dim[1];
  double worst = 0;
  for (int64_t key = 0; key < host.dim[0]; key++) {
    double own = 0, off = 0;
    for (int64_t i = key * width; i < (key + 1) * width; i++) {
      double x = wn_test_get(&host, i), y = wn_test_get(&dkv->cpu, i);
      assert_true(isfinite(x));
      own += y * y;
      off += (x - y) * (x - y);
    }
    double e = own > 0 ? sqrt(off / own) : sqrt(off);
    worst = e > worst ? e : worst;
    if (!(e <= bar)) fail_msg("%s: key %lld is off by %.3e of its norm %.3e", what, (long long)key, e, sqrt(own));
  }
  print_message("  %-40s worst key %.2e\n", what, worst);
  free(host.data);
}

static void scale_rows(twin_bench *b, twin *t, double (*factor)(int64_t row)) {
  int64_t n = wn_tensor_count(&t->cpu), width = n / t->cpu.dim[0];
  double *values = malloc((size_t)n * sizeof *values);
  assert_non_null(values);
  for (int64_t i = 0; i < n; i++) values[i] = wn_test_get(&t->cpu, i) * factor(i / width);
  twin_set(b, t, values);
  free(values);
}

static double spike(int64_t row) {
  return row == 37 ? 1e4 : 1;
}
static double tiny(int64_t row) {
  (void)row;
  return 1e-7;
}
static double falling(int64_t row) {
  return pow(10, -(double)(row / 10));
}

/* Ordinary gradients, also where all rows pick one key. */
static void every_key_is_right(void **state) {
  twin_bench *b = twin_begin(state);
  for (int same = 0; same < 2; same++) {
    problem x = make_problem(b, (shape){200, 300, 20, 64, 16, 32, CAUSAL, same ? SAME_FIRST : RANDOM, 0, 1});
    forward(b, &x, true);
    backward(b, &x);
    check_backward(b, &x);
    check_every_key(b, same ? "keys that all pick" : "random keys", &x.dkv, twin_bf16);
    twin_end(b);
  }
}

/* A row that the sample does not hold: its keys pass their bounds, and are wrong unless they are summed again. */
static void a_spike_is_summed_again(void **state) {
  twin_bench *b = twin_begin(state);
  static const shape some[] = {{90, 90, 20, 64, 16, 12, CAUSAL, RANDOM, 0, 1},
                               {90, 90, 20, 64, 16, 12, CAUSAL, SAME_FIRST, 0, 1},
                               {90, 400, 128, 512, 64, 150, CAUSAL, RANDOM, 0, 1},
                               {90, 90, 70, 512, 64, 12, CAUSAL, SAME_FIRST, 0, 1}};
  for (int in_q = 0; in_q < 2; in_q++)
    for (size_t i = 0; i < sizeof some / sizeof *some; i++) {
      problem x = make_problem(b, some[i]);
      scale_rows(b, in_q ? &x.q : &x.d_o, spike);
      if (in_q) x.params.scale = 1e-5;
      forward(b, &x, true);
      backward(b, &x);
      check_backward(b, &x);
      check_every_key(b, in_q ? "a spike in q" : "a spike in d_o", &x.dkv, twin_bf16);
      twin_end(b);
    }
}

/* The sampled rows pick nothing and the gradients are small: the first sums are too coarse, and are made again. */
static void gradients_that_no_sample_saw(void **state) {
  twin_bench *b = twin_begin(state);
  for (int wide = 0; wide < 2; wide++) {
    problem x = make_problem(b, wide ? (shape){60, 90, 70, 512, 64, 30, CAUSAL, RANDOM, 0, 1}
                                     : (shape){60, 90, 3, 64, 16, 30, CAUSAL, RANDOM, 0, 1});
    wn_tensor picks = twin_download(b, &x.selection.cuda);
    for (int j = 0; j < 30; j++) ((int32_t *)picks.data)[j] = ((int32_t *)x.selection.cpu.data)[j] = -1;
    OK(b->cuda->ops->upload(b->cuda, &x.selection.cuda, picks.data));
    free(picks.data);
    fill_kv(b, &x, 1, 0);
    scale_rows(b, &x.d_o, tiny);
    forward(b, &x, true);
    backward(b, &x);
    check_backward(b, &x);
    check_every_key(b, "1e-7", &x.dkv, twin_bf16);
    twin_end(b);
  }
}

/* Neighbours pick few keys of their own, with gradients of 1 to 1e-9: each key's sum is right for itself. */
static void small_sums_beside_large_ones(void **state) {
  twin_bench *b = twin_begin(state);
  problem x = make_problem(b, (shape){100, 100, 20, 64, 16, 4, CAUSAL, RANDOM, 0, 1});
  int32_t *pick = x.selection.cpu.data;
  for (int32_t i = 0; i < 100; i++)
    for (int32_t j = 0; j < 4; j++) pick[i * 4 + j] = j <= i % 10 ? i - (i % 10 < 3 ? i % 10 : 3) + j : -1;
  OK(b->cuda->ops->upload(b->cuda, &x.selection.cuda, pick));
  fill_kv(b, &x, 1, 0);
  scale_rows(b, &x.d_o, falling);
  forward(b, &x, true);
  backward(b, &x);
  check_backward(b, &x);
  check_every_key(b, "from 1 to 1e-9", &x.dkv, twin_bf16);
  twin_end(b);
}

/* A NaN reaches the keys that its row picked, and no others. */
static void a_nan_shows(void **state) {
  twin_bench *b = twin_begin(state);
  for (int wide = 0; wide < 2; wide++) {
    problem x = make_problem(b, wide ? (shape){20, 60, 70, 512, 64, 8, CAUSAL, RANDOM, 0, 1}
                                     : (shape){20, 60, 3, 64, 16, 8, CAUSAL, RANDOM, 0, 1});
    int64_t n = wn_tensor_count(&x.d_o.cpu), at = 5 * x.s.n_heads * x.s.c + 70;
    double *values = malloc((size_t)n * sizeof *values);
    for (int64_t i = 0; i < n; i++) values[i] = i == at ? (double)NAN : wn_test_get(&x.d_o.cpu, i);
    twin_set(b, &x.d_o, values);
    free(values);
    forward(b, &x, true);
    backward(b, &x);
    check_backward(b, &x);
    twin_end(b);
  }
}

static void forward_again(wn_device *device, void *context) {
  problem *x = context;
  OK(device->ops->attention_sparse(device, &x->o.cuda, &x->lse.cuda, &x->delta.cuda, &x->d_o.cuda, &x->q.cuda,
                                   &x->kv.cuda, &x->selection.cuda, &x->rows.cuda, &x->params));
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  static const shape some[] = {{67, 400, 128, 512, 64, 150, CAUSAL, RANDOM, 0, 1},
                               {67, 400, 16, 512, 64, 150, CAUSAL, SAME_FIRST, 0, 1},
                               {67, 90, 3, 24, 8, 33, DOCUMENTS, RANDOM, 0, 1}};
  for (size_t i = 0; i < sizeof some / sizeof *some; i++) {
    problem x = make_problem(b, some[i]);
    scale_rows(b, &x.d_o, spike);
    twin_out forward_outs[] = {{&x.o, false}, {&x.lse, false}, {&x.delta, false}};
    twin_repeats(b, forward_again, &x, forward_outs, 3);
    twin_out backward_outs[] = {{&x.dq, false}, {&x.dkv, true}, {&x.p, false}};
    twin_repeats(b, backward_cuda, &x, backward_outs, 3);
    twin_end(b);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(every_shape),
      cmocka_unit_test(views_and_odd_widths),
      cmocka_unit_test(no_picks_at_all),
      cmocka_unit_test(logits_of_a_thousand),
      cmocka_unit_test(delta_is_of_the_unrounded_o),
      cmocka_unit_test(p_alone_and_no_p),
      cmocka_unit_test(row_chunks_add_up),
      cmocka_unit_test(every_key_is_right),
      cmocka_unit_test(a_spike_is_summed_again),
      cmocka_unit_test(gradients_that_no_sample_saw),
      cmocka_unit_test(small_sums_beside_large_ones),
      cmocka_unit_test(a_nan_shows),
      cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
