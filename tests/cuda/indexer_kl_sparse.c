/* The sparse KL on the GPU: values and gradients at odd shapes, near convergence, and where many rows meet in one key.
 */
#include "support/twin.h"

typedef struct shape {
  int32_t n, m, document; /* rows are the last n of m causal ones; rows of a document see it alone */
  bool holes;
  int64_t heads, width, k, margin;
  bool sink; /* every row picks key 0 */
} shape;

typedef struct scene {
  twin q, k, w, selection, p, kl, dq, dk, dw;
  twin_rows rows;
  wn_indexer_params params;
  bool value_only;
} scene;

static uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

/* Distinct keys, ascending, from all over what the row sees; -1 at the end. */
static twin selection_of(twin_bench *b, const shape *s, const twin_rows *rows) {
  double *pick = malloc((size_t)(s->n * s->k) * sizeof *pick);
  assert_non_null(pick);
  for (int64_t i = 0; i < s->n; i++) {
    int64_t first = rows->cpu.first_key[i], sees = rows->cpu.last_key[i] - first + 1, n = sees < s->k ? sees : s->k;
    if (n > 3 && i % 11 == 5) n -= 3;
    for (int64_t j = 0; j < s->k; j++) {
      int64_t low = n > 0 ? j * sees / n : 0, high = n > 0 ? (j + 1) * sees / n : 0;
      int64_t at = j < n ? low + mix((uint32_t)(i * s->k + j)) % (high - low) : -1;
      pick[i * s->k + j] = j >= n ? -1 : j == 0 && s->sink ? (double)first : (double)(first + at);
    }
  }
  twin t = twin_strided(b, WN_INDEX, s->margin, 2, s->n, s->k, 0);
  twin_set(b, &t, pick);
  free(pick);
  return t;
}

/* p sums to one over a row's picks; some are zero. */
static void set_p(twin_bench *b, scene *c, double (*log_weight)(const scene *, int64_t i, int64_t j)) {
  int64_t n = c->selection.cpu.dim[0], k = c->selection.cpu.dim[1];
  double *p = calloc((size_t)(n * k), sizeof *p);
  assert_non_null(p);
  for (int64_t i = 0; i < n; i++) {
    double sum = 0;
    for (int64_t j = 0; j < k; j++) {
      if (wn_test_get(&c->selection.cpu, i * k + j) < 0) break;
      p[i * k + j] = exp(log_weight(c, i, j));
      sum += p[i * k + j];
    }
    for (int64_t j = 0; j < k; j++) p[i * k + j] = sum > 0 ? p[i * k + j] / sum : 0;
  }
  twin_set(b, &c->p, p);
  free(p);
}

static double anything(const scene *c, int64_t i, int64_t j) {
  uint32_t x = mix((uint32_t)(i * c->selection.cpu.dim[1] + j) ^ 0x5bd1e995u);
  return x % 16 == 0 ? -(double)INFINITY : 4.0 * x / 4294967296.0;
}

static scene make_scene(twin_bench *b, const shape *s) {
  scene c = {.params = {.scale = 1 / sqrt((double)s->width), .coeff = 0.7}};
  c.rows = twin_causal_end(b, s->n, s->m, s->document, s->holes);
  c.selection = selection_of(b, s, &c.rows);
  c.q = twin_random(b, WN_ACT, 1, 1, s->margin, 3, s->n, s->heads, s->width);
  c.k = twin_random(b, WN_ACT, 2, 1, s->margin, 2, s->m, s->width, 0);
  c.w = twin_random(b, WN_STAT, 3, 1 / sqrt((double)s->heads), s->margin, 2, s->n, s->heads, 0);
  c.p = twin_strided(b, WN_STAT, s->margin, 2, s->n, s->k, 0);
  set_p(b, &c, anything);
  c.kl = twin_tensor(b, WN_STAT, 1, s->n, 0, 0);
  c.dq = twin_strided(b, WN_ACT, s->margin, 3, s->n, s->heads, s->width);
  c.dk = twin_random(b, WN_WGRAD, 4, 0.01, s->margin, 2, s->m, s->width, 0);
  c.dw = twin_strided(b, WN_STAT, s->margin, 2, s->n, s->heads, 0);
  twin_poison(b, &c.kl);
  twin_poison(b, &c.dq);
  twin_poison(b, &c.dw);
  return c;
}

static void run(wn_device *d, void *context) {
  scene *c = context;
  bool v = c->value_only;
  OK(d->ops->indexer_kl_sparse(d, &c->kl.cuda, v ? NULL : &c->dq.cuda, v ? NULL : &c->dk.cuda, v ? NULL : &c->dw.cuda,
                               &c->q.cuda, &c->k.cuda, &c->w.cuda, &c->selection.cuda, &c->p.cuda, &c->rows.cuda,
                               &c->params));
}

static void run_cpu(twin_bench *b, scene *c) {
  bool v = c->value_only;
  OK(b->cpu->ops->indexer_kl_sparse(b->cpu, &c->kl.cpu, v ? NULL : &c->dq.cpu, v ? NULL : &c->dk.cpu,
                                    v ? NULL : &c->dw.cpu, &c->q.cpu, &c->k.cpu, &c->w.cpu, &c->selection.cpu,
                                    &c->p.cpu, &c->rows.cpu, &c->params));
}

static void compare(twin_bench *b, scene *c) {
  twin_close(b, "kl", &c->kl, 1e-4);
  twin_close(b, "dq", &c->dq, twin_bf16);
  twin_close(b, "dk", &c->dk, twin_bf16);
  twin_close(b, "dw", &c->dw, twin_bf16);
}

static const shape shapes[] = {
    {1, 1, 0, false, 64, 128, 16, 0, false},      {2, 2, 0, false, 1, 8, 3, 0, false},
    {5, 40, 0, false, 4, 32, 8, 8, false},        {97, 97, 0, false, 64, 128, 64, 0, false},
    {33, 50, 0, false, 3, 17, 9, 3, false},       {40, 300, 0, false, 64, 128, 256, 8, false},
    {20, 100, 0, false, 70, 96, 48, 0, false},    {130, 130, 37, true, 16, 64, 20, 0, false},
    {17, 90, 0, true, 130, 100, 33, 1, false},    {9, 700, 0, false, 64, 128, 600, 0, true},
    {64, 2100, 0, false, 64, 128, 2048, 0, true}, {60, 70000, 0, true, 4, 128, 64, 0, true},
    {75, 200, 0, false, 24, 128, 40, 0, false},   {41, 33000, 0, false, 16, 128, 300, 0, true},
};

static void agrees_with_the_cpu(void **state) {
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    twin_bench *b = twin_begin(state);
    scene c = make_scene(b, &shapes[i]);
    run(b->cuda, &c);
    run_cpu(b, &c);
    compare(b, &c);
    twin_end(b);
  }
}

static void values_alone(void **state) {
  for (size_t i = 2; i < sizeof shapes / sizeof *shapes; i += 3) {
    twin_bench *b = twin_begin(state);
    scene c = make_scene(b, &shapes[i]);
    run(b->cuda, &c);
    wn_tensor kl = twin_download(b, &c.kl.cuda);
    c.value_only = true;
    twin_poison(b, &c.kl);
    run(b->cuda, &c);
    wn_tensor again = twin_download(b, &c.kl.cuda);
    assert_memory_equal(kl.data, again.data, (size_t)wn_tensor_bytes(&kl));
    run_cpu(b, &c);
    twin_close(b, "kl alone", &c.kl, 1e-4);
    free(kl.data);
    free(again.data);
    twin_end(b);
  }
}

/* log p = I + a little: the student has nearly learnt it. */
static double nearly_learnt(const scene *c, int64_t i, int64_t j) {
  int64_t k = c->selection.cpu.dim[1], heads = c->q.cpu.dim[1], width = c->q.cpu.dim[2];
  int64_t key = (int64_t)wn_test_get(&c->selection.cpu, i * k + j);
  double index = 0;
  for (int64_t h = 0; h < heads; h++) {
    double z = 0;
    for (int64_t d = 0; d < width; d++)
      z += wn_test_get(&c->q.cpu, (i * heads + h) * width + d) * wn_test_get(&c->k.cpu, key * width + d);
    index += wn_test_get(&c->w.cpu, i * heads + h) * fmax(z * c->params.scale, 0);
  }
  return index + 0.03 * (mix((uint32_t)(i * k + j)) / 4294967296.0 - 0.5);
}

/* The value is here 1e-5 of the terms whose sum it is: it is right only if they are small before they are added. */
static void near_convergence(void **state) {
  twin_bench *b = twin_begin(state);
  scene c = make_scene(b, &(shape){60, 200, 0, false, 64, 128, 96, 0, true});
  set_p(b, &c, nearly_learnt);
  twin_constant(b, &c.dk, 0);
  run(b->cuda, &c);
  run_cpu(b, &c);
  for (int64_t i = 0; i < 60; i++) assert_true(wn_test_get(&c.kl.cpu, i) < 1e-4 && wn_test_get(&c.kl.cpu, i) > 1e-5);
  twin_close(b, "kl", &c.kl, 1e-3);
  twin_close(b, "dq", &c.dq, twin_bf16);
  twin_close(b, "dk", &c.dk, twin_bf16);
  twin_close(b, "dw", &c.dw, twin_bf16);
  twin_end(b);
}

static double *values_of(const twin *t) {
  double *x = malloc((size_t)wn_tensor_count(&t->cpu) * sizeof *x + 8);
  assert_non_null(x);
  for (int64_t i = 0; i < wn_tensor_count(&t->cpu); i++) x[i] = wn_test_get(&t->cpu, i);
  return x;
}

/* Every row picks key 0, and one row's queries are 1e4 times the others'. */
static void a_sink_and_a_spike(void **state) {
  for (int spiked = 0; spiked < 2; spiked++) {
    twin_bench *b = twin_begin(state);
    scene c = make_scene(b, &(shape){3000, 3000, 0, false, 8, 64, 24, 0, true});
    twin_constant(b, &c.dk, 0);
    int64_t one = 8 * 64, spike = 1500;
    if (spiked) {
      double *q = values_of(&c.q), *pick = values_of(&c.selection);
      for (int64_t i = 0; i < one; i++) q[spike * one + i] *= 1e4;
      for (int64_t j = 0; j < 24; j++) pick[spike * 24 + j] = (double)j;
      twin_set(b, &c.q, q);
      twin_set(b, &c.selection, pick);
      free(q);
      free(pick);
    }
    run(b->cuda, &c);
    run_cpu(b, &c);
    compare(b, &c);
    twin others = twin_slice(c.dk, 0, 24, 3000 - 24); /* measured apart: the spike would drown them */
    twin_close(b, "dk of keys without the spike", &others, twin_bf16);
    twin_end(b);
  }
}

static void large_logits(void **state) {
  twin_bench *b = twin_begin(state);
  scene c = make_scene(b, &(shape){50, 80, 0, false, 64, 128, 40, 0, false});
  twin_fill(b, &c.q, 9, 1000, 0);
  twin_constant(b, &c.dk, 0);
  run(b->cuda, &c);
  run_cpu(b, &c);
  compare(b, &c);
  twin_end(b);
}

/* More picks than exist at a time: several chunks of rows add to dk. */
static void many_chunks(void **state) {
  twin_bench *b = twin_begin(state);
  scene c = make_scene(b, &(shape){70000, 70000, 0, false, 2, 8, 200, 0, false});
  run(b->cuda, &c);
  run_cpu(b, &c);
  compare(b, &c);
  twin_end(b);
}

/* A NaN stays in its row, and its row's keys show it. */
static void a_nan_shows(void **state) {
  twin_bench *b = twin_begin(state);
  enum { N = 40, K = 12, WIDTH = 32, ROW = 33 };
  scene c = make_scene(b, &(shape){N, N, 0, false, 4, WIDTH, K, 0, false});
  double *w = values_of(&c.w);
  w[ROW * 4 + 1] = (double)NAN;
  twin_set(b, &c.w, w);
  free(w);
  run(b->cuda, &c);
  wn_tensor kl = twin_download(b, &c.kl.cuda), dk = twin_download(b, &c.dk.cuda), dq = twin_download(b, &c.dq.cuda);
  for (int64_t i = 0; i < N; i++) {
    assert_int_equal(isnan(wn_test_get(&kl, i)) != 0, i == ROW);
    assert_int_equal(isnan(wn_test_get(&dq, i * 4 * WIDTH)) != 0, i == ROW);
    bool picked = false;
    for (int64_t j = 0; j < K; j++) picked = picked || wn_test_get(&c.selection.cpu, ROW * K + j) == (double)i;
    assert_int_equal(isnan(wn_test_get(&dk, i * WIDTH)) != 0, picked);
  }
  free(kl.data);
  free(dk.data);
  free(dq.data);
  twin_end(b);
}

static void repeats_bit_for_bit(void **state) {
  const int64_t heads[] = {64, 16};
  for (int i = 0; i < 2; i++) {
    twin_bench *b = twin_begin(state);
    scene c = make_scene(b, &(shape){500, 700, 0, false, heads[i], 128, 256, 0, true});
    const twin_out outs[] = {{&c.kl, false}, {&c.dq, false}, {&c.dk, true}, {&c.dw, false}};
    twin_repeats(b, run, &c, outs, 4);
    twin_end(b);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(agrees_with_the_cpu), cmocka_unit_test(values_alone),        cmocka_unit_test(near_convergence),
      cmocka_unit_test(a_sink_and_a_spike),  cmocka_unit_test(large_logits),        cmocka_unit_test(many_chunks),
      cmocka_unit_test(a_nan_shows),         cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
