/* The selections that eval compares with: patterns number for number the CPU's; the best possible against the CPU's and
 * against probabilities computed here in FP64. */
#include "support/twin.h"

/* ---- patterns ---- */

static void check_pattern(twin_bench *b, const char *what, const twin_rows *rows, int64_t k, int64_t margin,
                          const wn_pattern_params *params) {
  twin picks = twin_strided(b, WN_INDEX, margin, 2, rows->cpu.n_rows, k, 0);
  twin_poison(b, &picks);
  OK(b->cuda->ops->select_pattern(b->cuda, &picks.cuda, &rows->cuda, params));
  OK(b->cpu->ops->select_pattern(b->cpu, &picks.cpu, &rows->cpu, params));
  twin_same_ints(b, what, &picks);
}

static void patterns_are_the_cpus(void **state) {
  twin_bench *b = twin_begin(state);
  const struct {
    int32_t n, document;
    bool holes;
  } all[] = {{1, 0, false}, {130, 0, true}, {301, 47, true}, {1031, 0, false}, {513, 1, false}};
  const int64_t k[] = {1, 3, 4, 5, 16, 64, 700, 1040};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    twin_rows rows = twin_causal(b, all[i].n, all[i].document, all[i].holes);
    for (size_t j = 0; j < sizeof k / sizeof *k; j++)
      for (int pattern = WN_PATTERN_RECENT; pattern <= WN_PATTERN_RANDOM; pattern++) {
        wn_pattern_params params = {(wn_pattern)pattern, 0x123456789abcdef0u + j, (int32_t)i * 7};
        char what[64];
        snprintf(what, sizeof what, "pattern %d of %d keys, k %d", pattern, all[i].n, (int)k[j]);
        check_pattern(b, what, &rows, k[j], j % 2 * 3, &params);
      }
  }
  twin_end(b);
}

/* Longer than the map of picks, positions that are not row numbers. */
static void random_picks_of_a_long_context(void **state) {
  twin_bench *b = twin_begin(state);
  const int32_t m = 1100003, first[] = {0, 17, 3, 0, 524288, 9}, last[] = {m - 1, m - 2, 524290, 524287, m - 1, 8};
  const int32_t position[] = {2000000000, 5, 5, 0, 77, 1};
  twin_rows rows = twin_rows_of(b, m, first, last, position, 6);
  for (int32_t layer = 0; layer < 3; layer++) {
    wn_pattern_params params = {WN_PATTERN_RANDOM, 42, layer};
    check_pattern(b, "random, k 100", &rows, 100, 0, &params);
    check_pattern(b, "random, k 70001", &rows, 70001, 0, &params);
  }
  twin_end(b);
}

/* ---- the best ---- */

typedef struct shape {
  int32_t n, m, heads, width, document;
  bool holes, shared;
  double logits; /* deviation, roughly */
} shape;

static const shape shapes[] = {
    {1, 1, 1, 1, 0, false, false, 1},        {7, 7, 3, 5, 0, false, false, 1},
    {131, 131, 4, 32, 0, true, false, 1},    {129, 129, 2, 16, 40, true, true, 3},
    {70, 301, 6, 13, 0, false, false, 3},    {260, 260, 16, 192, 0, true, false, 2},
    {133, 700, 8, 576, 0, false, true, 2},   {190, 190, 4, 40, 61, true, false, 3},
    {150, 150, 3, 24, 0, false, false, 500},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

typedef struct scene {
  twin_rows rows;
  twin q, k;
  wn_attention_params params;
} scene;

static scene make_scene(twin_bench *b, const shape *c, int64_t margin) {
  return (scene){.rows = twin_causal_end(b, c->n, c->m, c->document, c->holes),
                 .q = twin_random(b, WN_ACT, 21, c->logits, margin, 3, c->n, c->heads, c->width),
                 .k = twin_random(b, WN_ACT, 22, 1, margin, 3, c->m, c->shared ? 1 : c->heads, c->width),
                 .params = {.scale = 1 / sqrt(c->width)}};
}

/* p[0 .. last - first] of row r, FP64. */
static void plain_target(double *p, const scene *s, int32_t r) {
  const int64_t heads = s->q.cpu.dim[1], width = s->q.cpu.dim[2], key_heads = s->k.cpu.dim[1];
  int32_t first = s->rows.cpu.first_key[r], visible = s->rows.cpu.last_key[r] - first + 1;
  double *logit = malloc((size_t)(visible > 0 ? visible : 1) * sizeof *logit);
  assert_non_null(logit);
  for (int32_t i = 0; i < visible; i++) p[i] = 0;
  for (int64_t h = 0; h < heads; h++) {
    const double *q = (const double *)s->q.cpu.data + (r * heads + h) * width;
    double top = -INFINITY, sum = 0;
    for (int32_t i = 0; i < visible; i++) {
      const double *k = (const double *)s->k.cpu.data + ((first + i) * key_heads + (key_heads == 1 ? 0 : h)) * width;
      logit[i] = 0;
      for (int64_t d = 0; d < width; d++) logit[i] += q[d] * k[d];
      logit[i] *= s->params.scale;
      top = fmax(top, logit[i]);
    }
    for (int32_t i = 0; i < visible; i++) sum += exp(logit[i] - top);
    for (int32_t i = 0; i < visible; i++) p[i] += exp(logit[i] - top) / sum / (double)heads;
  }
  free(logit);
}

/* Every key that the GPU picks and the CPU does not has the threshold's probability, but for rounding. */
static void compare_best(const scene *s, const shape *c, int shape_number, int64_t k, const int32_t *got,
                         const int32_t *want, int64_t counts[2]) {
  const double tolerance = c->logits > 100 ? 1e-2 : 1e-4;
  double *p = malloc((size_t)c->m * sizeof *p);
  assert_non_null(p);
  for (int32_t r = 0; r < c->n; r++) {
    const int32_t *x = got + r * k, *y = want + r * k, first = s->rows.cpu.first_key[r];
    double lowest = INFINITY;
    size_t n_picks = 0;
    plain_target(p, s, r);
    for (; n_picks < (size_t)k && y[n_picks] >= 0; n_picks++) lowest = fmin(lowest, p[y[n_picks] - first]);
    for (int64_t j = 0; j < k; j++) {
      if ((x[j] < 0) != (y[j] < 0) || (j > 0 && x[j] >= 0 && x[j] <= x[j - 1]))
        fail_msg("shape %d row %d place %lld: %d, the CPU has %d", shape_number, r, (long long)j, x[j], y[j]);
      if (x[j] < 0) continue;
      assert_in_range(x[j], first, s->rows.cpu.last_key[r]);
      counts[1]++;
      if (bsearch(&x[j], y, n_picks, sizeof *y, twin_by_number)) continue;
      counts[0]++;
      if (!(p[x[j] - first] >= lowest * (1 - tolerance) - 1e-37)) /* below that FP32 has no numbers left */
        fail_msg("shape %d row %d: key %d with p %g is picked, the threshold is %g", shape_number, r, x[j],
                 p[x[j] - first], lowest);
    }
  }
  free(p);
}

static void the_best_is_the_cpus_but_for_rounding(void **state) {
  twin_bench *b = twin_begin(state);
  for (int i = 0; i < N_SHAPES; i++) {
    const shape *c = &shapes[i];
    const int64_t k[] = {1, 17, 64, c->m + 2};
    int64_t counts[2] = {0};
    scene s = make_scene(b, c, i % 3 * 8);
    for (size_t j = 0; j < sizeof k / sizeof *k; j++) {
      twin picks = twin_strided(b, WN_INDEX, (int64_t)j, 2, c->n, k[j], 0);
      twin_poison(b, &picks);
      OK(b->cuda->ops->select_best(b->cuda, &picks.cuda, &s.q.cuda, &s.k.cuda, &s.rows.cuda, &s.params));
      OK(b->cpu->ops->select_best(b->cpu, &picks.cpu, &s.q.cpu, &s.k.cpu, &s.rows.cpu, &s.params));
      wn_tensor got = twin_download(b, &picks.cuda);
      /* at +-500 most probabilities are zeros of FP32 and ties there: only the picks of weight can agree */
      if (c->logits <= 100 || k[j] == 1) compare_best(&s, c, i, k[j], got.data, picks.cpu.data, counts);
      free(got.data);
    }
    print_message("  shape %d: %lld of %lld picks differ\n", i, (long long)counts[0], (long long)counts[1]);
    assert_true(c->logits > 100 || counts[0] * 200 <= counts[1]); /* there p is 1 / heads again and again */
  }
  twin_end(b);
}

/* Keys of 16 kinds: of equal probabilities the lowest keys go in. (The CPU's products of equal keys differ in the last
 * bit where its vectors end, so the plain form is the judge.) */
static void ties_take_the_lowest_key(void **state) {
  twin_bench *b = twin_begin(state);
  const shape c = {150, 400, 4, 32, 0, false, false, 1};
  scene s = make_scene(b, &c, 0);
  int64_t n = wn_tensor_count(&s.k.cpu), row = c.heads * c.width;
  double *x = malloc((size_t)n * sizeof *x), *p = malloc((size_t)c.m * sizeof *p);
  twin_ranked *all = malloc((size_t)c.m * sizeof *all);
  assert_true(x && p && all);
  for (int64_t i = 0; i < n; i++) x[i] = wn_test_get(&s.k.cpu, i / row % 16 * row + i % row);
  twin_set(b, &s.k, x);
  for (int64_t k = 1; k < 200; k += 33) {
    twin picks = twin_tensor(b, WN_INDEX, 2, c.n, k, 0);
    twin_poison(b, &picks);
    OK(b->cuda->ops->select_best(b->cuda, &picks.cuda, &s.q.cuda, &s.k.cuda, &s.rows.cuda, &s.params));
    for (int32_t r = 0; r < c.n; r++) {
      int32_t *pick = (int32_t *)picks.cpu.data + r * k, visible = s.rows.cpu.last_key[r] + 1;
      plain_target(p, &s, r);
      for (int32_t i = 0; i < visible; i++) all[i] = (twin_ranked){p[i], i};
      qsort(all, (size_t)visible, sizeof *all, twin_by_score);
      for (int64_t i = 0; i < k; i++) pick[i] = all[i].key;
      qsort(pick, (size_t)k, sizeof *pick, twin_by_number);
    }
    twin_same_ints(b, "sixteen kinds of keys", &picks);
  }
  free(x);
  free(p);
  free(all);
  twin_end(b);
}

typedef struct repeated {
  const scene *s;
  const twin_rows *rows;
  twin *best, *random;
} repeated;

static void run_both(wn_device *device, void *context) {
  repeated *r = context;
  wn_pattern_params params = {WN_PATTERN_RANDOM, 3, 1};
  OK(device->ops->select_best(device, &r->best->cuda, &r->s->q.cuda, &r->s->k.cuda, &r->s->rows.cuda, &r->s->params));
  OK(device->ops->select_pattern(device, &r->random->cuda, &r->s->rows.cuda, &params));
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  const shape c = {260, 3000, 5, 72, 0, true, false, 2};
  scene s = make_scene(b, &c, 0);
  twin best = twin_tensor(b, WN_INDEX, 2, c.n, 120, 0), random = twin_tensor(b, WN_INDEX, 2, c.n, 120, 0);
  repeated context = {&s, &s.rows, &best, &random};
  twin_repeats(b, run_both, &context, (twin_out[]){{&best, false}, {&random, false}}, 2);
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(patterns_are_the_cpus),
      cmocka_unit_test(random_picks_of_a_long_context),
      cmocka_unit_test(the_best_is_the_cpus_but_for_rounding),
      cmocka_unit_test(ties_take_the_lowest_key),
      cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
