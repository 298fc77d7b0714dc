/* Selection statistics on the GPU: the indexer's own picks, and every column against the CPU. */
#include "support/twin.h"

typedef struct shape {
  int32_t n, document; /* causal rows over as many keys */
  bool holes;
  int64_t index_heads, index_width, heads, width, k, samples, margin;
  bool shared_keys, with_previous;
} shape;

typedef struct scene {
  twin q, k, w, qa, ka, sample, previous, stats, picks, all_picks;
  twin_rows rows;
  wn_indexer_params params;
  bool with_previous;
} scene;

/* Earlier picks: every second of the last keys, some rows short of k. */
static void set_previous(twin_bench *b, scene *c) {
  int64_t s = c->picks.cpu.dim[0], k = c->picks.cpu.dim[1];
  double *x = malloc((size_t)(s * k) * sizeof *x);
  assert_non_null(x);
  for (int64_t r = 0; r < s; r++) {
    int32_t row = ((int32_t *)c->sample.cpu.data)[r];
    int64_t n = 0;
    for (int64_t j = r % 5 == 0; j < k; j++) {
      int64_t key = c->rows.cpu.last_key[row] - 2 * (k - 1 - j);
      if (key >= c->rows.cpu.first_key[row]) x[r * k + n++] = (double)key;
    }
    for (; n < k; n++) x[r * k + n] = -1;
  }
  twin_set(b, &c->previous, x);
  free(x);
}

static scene make_scene(twin_bench *b, const shape *s) {
  scene c = {.params = {.scale = 1 / sqrt((double)s->index_width), .attention_scale = 1 / sqrt((double)s->width)}};
  int64_t n = s->n, m = s->margin;
  c.with_previous = s->with_previous;
  c.rows = twin_causal(b, s->n, s->document, s->holes);
  c.q = twin_random(b, WN_ACT, 1, 1, m, 3, n, s->index_heads, s->index_width);
  c.k = twin_random(b, WN_ACT, 2, 1, m, 2, n, s->index_width, 0);
  c.w = twin_random(b, WN_STAT, 3, 1, m, 2, n, s->index_heads, 0);
  c.qa = twin_random(b, WN_ACT, 4, 1.5, m, 3, n, s->heads, s->width);
  c.ka = twin_random(b, WN_ACT, 5, 1, m, 3, n, s->shared_keys ? 1 : s->heads, s->width);
  int32_t *sample = malloc((size_t)s->samples * sizeof *sample);
  assert_non_null(sample);
  for (int64_t i = 0; i < s->samples; i++) sample[i] = i == 0 ? 0 : i == 1 ? s->n - 1 : (int32_t)((i * 7919 + 5) % n);
  c.sample = twin_ints(b, sample, 1, s->samples, 0);
  free(sample);
  c.stats = twin_strided(b, WN_STAT, m, 2, s->samples, WN_N_STATS, 0);
  c.picks = twin_strided(b, WN_INDEX, m, 2, s->samples, s->k, 0);
  c.previous = twin_strided(b, WN_INDEX, m, 2, s->samples, s->k, 0);
  c.all_picks = twin_tensor(b, WN_INDEX, 2, n, s->k, 0);
  set_previous(b, &c);
  twin_poison(b, &c.stats);
  twin_poison(b, &c.picks);
  return c;
}

static void run(wn_device *d, void *context) {
  scene *c = context;
  OK(d->ops->selection_stats(d, &c->stats.cuda, &c->picks.cuda, &c->sample.cuda,
                             c->with_previous ? &c->previous.cuda : NULL, &c->q.cuda, &c->k.cuda, &c->w.cuda,
                             &c->qa.cuda, &c->ka.cuda, &c->rows.cuda, &c->params));
}

static void run_cpu(twin_bench *b, scene *c) {
  OK(b->cpu->ops->selection_stats(b->cpu, &c->stats.cpu, &c->picks.cpu, &c->sample.cpu,
                                  c->with_previous ? &c->previous.cpu : NULL, &c->q.cpu, &c->k.cpu, &c->w.cpu,
                                  &c->qa.cpu, &c->ka.cpu, &c->rows.cpu, &c->params));
}

/* The picks are those of indexer_select, whatever the precision of its scores. */
static void expect_own_picks(twin_bench *b, scene *c) {
  OK(b->cuda->ops->indexer_select(b->cuda, &c->all_picks.cuda, &c->q.cuda, &c->k.cuda, &c->w.cuda, &c->rows.cuda,
                                  &c->params));
  wn_tensor all = twin_download(b, &c->all_picks.cuda), some = twin_download(b, &c->picks.cuda);
  int64_t k = some.dim[1];
  for (int64_t s = 0; s < some.dim[0]; s++) {
    int64_t row = ((int32_t *)c->sample.cpu.data)[s];
    if (memcmp((int32_t *)all.data + row * k, (int32_t *)some.data + s * k, (size_t)k * sizeof(int32_t)) != 0)
      fail_msg("sample %lld picks other keys than row %lld", (long long)s, (long long)row);
  }
  free(all.data);
  free(some.data);
}

/* Scores that differ by less than FP32 shows may part otherwise on the CPU: such rows are few, and are passed over. The
 * k largest of p may differ by one key likewise. */
static void compare(twin_bench *b, scene *c) {
  wn_tensor stats = twin_download(b, &c->stats.cuda), picks = twin_download(b, &c->picks.cuda);
  int64_t n = stats.dim[0], k = picks.dim[1], counted = 0, other = 0;
  double worst = 0;
  for (int64_t s = 0; s < n; s++) {
    counted += wn_test_get(&stats, s * WN_N_STATS + WN_STAT_COUNTED) > 0;
    if (memcmp((int32_t *)picks.data + s * k, (int32_t *)c->picks.cpu.data + s * k, (size_t)k * 4) != 0) {
      other++;
      continue;
    }
    for (int column = 0; column < WN_N_STATS; column++) {
      double got = wn_test_get(&stats, s * WN_N_STATS + column);
      double want = wn_test_get(&c->stats.cpu, s * WN_N_STATS + column);
      if (isnan(got) && isnan(want)) continue;
      double off = fabs(got - want) / (1 + fabs(want)), bar = column == WN_STAT_RECALL_AT_K ? 1.01 / (double)k : 1e-4;
      if (!(off <= bar)) fail_msg("sample %lld column %d: %.9g, the CPU has %.9g", (long long)s, column, got, want);
      if (column != WN_STAT_RECALL_AT_K) worst = fmax(worst, off);
    }
  }
  print_message("  %lld rows, %lld counted, %lld part otherwise, worst column off by %.1e\n", (long long)n,
                (long long)counted, (long long)other, worst);
  assert_true(other <= n / 10 && counted > 0);
  free(stats.data);
  free(picks.data);
}

static const shape shapes[] = {
    {40, 0, false, 4, 16, 3, 24, 8, 40, 0, false, true},
    {130, 0, false, 64, 128, 2, 192, 16, 33, 8, false, true},
    {257, 100, true, 8, 64, 5, 20, 16, 90, 0, true, true},
    {199, 0, true, 3, 17, 2, 19, 5, 31, 3, false, false},
    {300, 0, false, 16, 32, 4, 576, 64, 50, 0, true, false},
    {2100, 0, false, 64, 128, 4, 64, 512, 12, 0, false, true},
    {700, 333, false, 32, 128, 16, 72, 2, 300, 8, false, true},
    {64, 0, false, 4, 64, 1, 8, 1, 64, 0, false, true},
};

static void columns_as_the_cpu_has_them(void **state) {
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    twin_bench *b = twin_begin(state);
    scene c = make_scene(b, &shapes[i]);
    run(b->cuda, &c);
    expect_own_picks(b, &c);
    run_cpu(b, &c);
    compare(b, &c);
    twin_end(b);
  }
}

/* The keys of a head's log-sum-exp are cut into pieces. */
static void many_keys(void **state) {
  twin_bench *b = twin_begin(state);
  scene c = make_scene(b, &(shape){17000, 0, false, 4, 64, 3, 48, 256, 9, 0, false, true});
  run(b->cuda, &c);
  run_cpu(b, &c);
  compare(b, &c);
  twin_end(b);
}

/* All scores equal: the lowest keys, p uniform, every figure known. */
static void equal_scores(void **state) {
  twin_bench *b = twin_begin(state);
  scene c = make_scene(b, &(shape){200, 0, false, 8, 64, 2, 64, 16, 40, 0, false, false});
  twin_constant(b, &c.q, 0);
  twin_constant(b, &c.qa, 0);
  run(b->cuda, &c);
  wn_tensor stats = twin_download(b, &c.stats.cuda), picks = twin_download(b, &c.picks.cuda);
  for (int64_t s = 0; s < 40; s++) {
    int32_t row = ((int32_t *)c.sample.cpu.data)[s], sees = row + 1;
    const float *x = (float *)stats.data + s * WN_N_STATS;
    for (int32_t j = 0; j < 16; j++) assert_int_equal(((int32_t *)picks.data)[s * 16 + j], j < sees ? j : -1);
    assert_true(x[WN_STAT_COUNTED] == (sees > 16));
    if (sees <= 16) continue;
    assert_true(x[WN_STAT_RECALL_AT_K] == 1 && x[WN_STAT_TOP1_HIT] == 1);
    assert_true(fabsf(x[WN_STAT_KL_DENSE]) < 1e-5f && fabsf(x[WN_STAT_KL_UNIFORM]) < 1e-5f);
    assert_true(fabsf(x[WN_STAT_MASS_AT_K] - 16.0f / (float)sees) < 1e-5f);
    assert_true(isnan(x[WN_STAT_IOU_PREV]));
  }
  free(stats.data);
  free(picks.data);
  twin_end(b);
}

/* p and softmax(I) are both nearly uniform: the column is 1e-5 of the terms whose sum it is. */
static void kl_near_convergence(void **state) {
  twin_bench *b = twin_begin(state);
  scene c = make_scene(b, &(shape){400, 0, false, 8, 64, 2, 64, 16, 50, 0, false, false});
  c.params.scale = c.params.attention_scale = 5e-4;
  run(b->cuda, &c);
  run_cpu(b, &c);
  wn_tensor stats = twin_download(b, &c.stats.cuda);
  double worst = 0, total = 0;
  for (int64_t s = 0; s < 50; s++) {
    double got = wn_test_get(&stats, s * WN_N_STATS + WN_STAT_KL_DENSE);
    double want = wn_test_get(&c.stats.cpu, s * WN_N_STATS + WN_STAT_KL_DENSE);
    double off = want > 0 ? fabs(got - want) / want : fabs(got);
    if (!(off < 2e-3)) fail_msg("sample %lld: kl %.9g, the CPU has %.9g", (long long)s, got, want);
    total += want;
    worst = fmax(worst, off);
  }
  print_message("  kl %.3e on average, off by at most %.1e of itself\n", total / 50, worst);
  assert_true(total > 0 && total / 50 < 1e-4);
  free(stats.data);
  twin_end(b);
}

static void large_logits(void **state) {
  twin_bench *b = twin_begin(state);
  scene c = make_scene(b, &(shape){300, 0, false, 16, 64, 1, 64, 16, 60, 0, false, true});
  twin_fill(b, &c.qa, 9, 600, 0);
  twin_fill(b, &c.q, 10, 600, 0);
  run(b->cuda, &c);
  run_cpu(b, &c);
  wn_tensor stats = twin_download(b, &c.stats.cuda); /* p is nearly one-hot, so most of its order is underflow's */
  static const int columns[] = {WN_STAT_KL_UNIFORM,  WN_STAT_MASS_BEST,    WN_STAT_TOP1_HIT,
                                WN_STAT_SELECT_DIST, WN_STAT_SELECT_LOCAL, WN_STAT_DENSITY};
  for (int64_t s = 0; s < 60; s++) {
    for (int i = 0; i < WN_N_STATS; i++) assert_true(isfinite(wn_test_get(&stats, s * WN_N_STATS + i)));
    for (size_t i = 0; i < sizeof columns / sizeof *columns; i++) {
      double got = wn_test_get(&stats, s * WN_N_STATS + columns[i]);
      double want = wn_test_get(&c.stats.cpu, s * WN_N_STATS + columns[i]);
      if (!(fabs(got - want) <= 1e-2 * (1 + fabs(want))))
        fail_msg("sample %lld column %d: %g, the CPU has %g", (long long)s, columns[i], got, want);
    }
  }
  free(stats.data);
  twin_end(b);
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  scene c = make_scene(b, &(shape){900, 0, false, 64, 128, 8, 192, 64, 270, 0, false, true});
  const twin_out outs[] = {{&c.stats, false}, {&c.picks, false}};
  twin_repeats(b, run, &c, outs, 2);
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(columns_as_the_cpu_has_them),
      cmocka_unit_test(many_keys),
      cmocka_unit_test(equal_scores),
      cmocka_unit_test(kl_near_convergence),
      cmocka_unit_test(large_logits),
      cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
