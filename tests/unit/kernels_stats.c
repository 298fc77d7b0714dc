/* selection_stats, select_best and select_pattern on the CPU, column by column against the formulas of
 * layers.csv. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "support/test.h"

#include "kernels/cpu/cpu.h"
#include "support/plain_attention.h"

enum { N = 110, M = 190, H = 3, DQ = 12, HI = 4, DI = 8, K = 16, S = 37 };

typedef struct scene {
  wn_device *device;
  bool wide;
  wn_rows rows;
  wn_tensor q, k, w, qa, ka;
  wn_indexer_params params;
  wn_tensor p, index; /* plain, [N,M] */
  uint8_t *seen;
} scene;

static scene make_scene(bool wide, int32_t threads, bool shared_keys, plain_rows_kind kind) {
  scene s = {.wide = wide, .params = {.scale = 0.4, .attention_scale = 0.5}};
  wn_cpu_settings settings = {.threads = threads};
  OK(wide ? wn_cpu_create_f64(&s.device, settings) : wn_cpu_create_f32(&s.device, settings));
  wn_device *d = s.device;
  s.rows = plain_rows(d->weights, N, M, kind);
  s.q = plain_input(d, WN_ACT, 1, 1, 3, N, HI, DI);
  s.k = plain_input(d, WN_ACT, 2, 1, 2, M, DI, 0);
  s.w = plain_input(d, WN_STAT, 3, 1, 2, N, HI, 0);
  s.qa = plain_input(d, WN_ACT, 4, 1, 3, N, H, DQ);
  s.ka = plain_input(d, WN_ACT, 5, 1, 3, M, shared_keys ? 1 : H, DQ);
  s.seen = plain_seen(d->weights, &s.rows, NULL);
  s.p = plain_attend(d->weights, &s.qa, &s.ka, &s.ka, &s.qa, s.seen, s.params.attention_scale).p_mean;
  s.index = plain_index(d->weights, &s.q, &s.k, &s.w, s.seen, s.params.scale);
  return s;
}

static void free_scene(scene *s) {
  assert_int_equal(wn_arena_used_bytes(s->device->scratch), 0);
  if (s->wide)
    wn_cpu_free_f64(s->device);
  else
    wn_cpu_free_f32(s->device);
}

static wn_tensor integers(const scene *s, int32_t rank, int64_t d0, int64_t d1) {
  wn_tensor t;
  OK(wn_device_tensor(s->device, &t, s->device->weights, "integers", WN_INDEX, rank, d0, d1, 0, 0));
  return t;
}

static bool holds(const int32_t *pick, int64_t key) {
  for (int j = 0; j < K; j++)
    if (pick[j] == key) return true;
  return false;
}

/* The formulas, each by its own loop over all keys. */
static void plain_columns(double *c, const scene *s, int64_t i, const int32_t *pick, const int32_t *previous) {
  const double *p = (double *)s->p.data + i * M, *index = (double *)s->index.data + i * M;
  const uint8_t *seen = s->seen + i * M;
  int64_t first = s->rows.first_key[i], last = s->rows.last_key[i], visible = last - first + 1, top1 = first;
  memset(c, 0, WN_N_STATS * sizeof *c);
  if (visible <= K) return;
  int32_t best[K];
  plain_top_k(best, K, p, seen, M);
  double sum = 0;
  for (int64_t j = first; j <= last; j++) sum += exp(index[j]);
  c[WN_STAT_COUNTED] = 1;
  c[WN_STAT_MASS_RANDOM] = c[WN_STAT_DENSITY] = (double)K / (double)visible;
  double both = 0, n_previous = 0;
  for (int64_t j = first; j <= last; j++) {
    double q = exp(index[j]) / sum;
    bool in = holds(pick, j);
    c[WN_STAT_KL_DENSE] += p[j] * log(p[j] / q);
    c[WN_STAT_KL_UNIFORM] += p[j] * log(p[j] * (double)visible);
    c[WN_STAT_ENTROPY_TARGET] -= p[j] * log(p[j]);
    c[WN_STAT_ENTROPY_INDEX] -= q * log(q);
    if (in) c[WN_STAT_MASS_AT_K] += p[j];
    if (holds(best, j)) c[WN_STAT_MASS_BEST] += p[j];
    if (j > last - K) c[WN_STAT_MASS_RECENT] += p[j];
    if (j < first + 4 || j > last - (K - 4)) c[WN_STAT_MASS_SINK] += p[j];
    if (in && holds(best, j)) c[WN_STAT_RECALL_AT_K] += 1.0 / K;
    if (p[j] > p[top1]) top1 = j;
    if (in) c[WN_STAT_SELECT_DIST] += (double)(last - j) / K;
    if (in && last - j < 128) c[WN_STAT_SELECT_LOCAL] += 1.0 / K;
    both += previous && in && holds(previous, j);
  }
  c[WN_STAT_TOP1_HIT] = holds(pick, top1);
  for (int j = 0; previous && j < K; j++) n_previous += previous[j] >= 0;
  c[WN_STAT_IOU_PREV] = previous ? both / (K + n_previous - both) : (double)NAN;
}

static void check_stats(bool wide, bool shared_keys, plain_rows_kind kind) {
  scene s = make_scene(wide, 2, shared_keys, kind);
  wn_device *d = s.device;
  wn_tensor sample = integers(&s, 1, S, 0), previous = integers(&s, 2, S, K), picks = integers(&s, 2, S, K),
            all_picks = integers(&s, 2, N, K), stats;
  OK(wn_device_tensor(d, &stats, d->weights, "stats", WN_STAT, 2, S, WN_N_STATS, 0, 0));
  for (int64_t r = 0; r < S; r++) {
    int64_t i = r == 0 ? 0 : (r * 41 + 5) % N;
    wn_test_set(&sample, r, (double)i);
    for (int64_t j = 0; j < K; j++) { /* the last keys that are left by a step of two, some rows short of K */
      int64_t key = s.rows.last_key[i] - 2 * (K - 1 - j);
      bool there = key >= s.rows.first_key[i] && !(r % 5 == 0 && j == K - 1);
      wn_test_set(&previous, r * K + j, there ? (double)key : -1);
    }
    int32_t *row = (int32_t *)previous.data + r * K, n = 0; /* -1 only at the end */
    for (int64_t j = 0; j < K; j++)
      if (row[j] >= 0) row[n++] = row[j];
    while (n < K) row[n++] = -1;
  }
  OK(d->ops->indexer_select(d, &all_picks, &s.q, &s.k, &s.w, &s.rows, &s.params));
  for (int with_previous = 0; with_previous < 2; with_previous++) {
    OK(d->ops->selection_stats(d, &stats, &picks, &sample, with_previous ? &previous : NULL, &s.q, &s.k, &s.w, &s.qa,
                               &s.ka, &s.rows, &s.params));
    int64_t counted = 0;
    for (int64_t r = 0; r < S; r++) {
      int64_t i = (int64_t)wn_test_get(&sample, r);
      const int32_t *pick = (int32_t *)picks.data + r * K;
      assert_memory_equal(pick, (int32_t *)all_picks.data + i * K, K * sizeof *pick);
      double want[WN_N_STATS];
      plain_columns(want, &s, i, pick, with_previous ? (int32_t *)previous.data + r * K : NULL);
      counted += want[WN_STAT_COUNTED] > 0;
      for (int c = 0; c < WN_N_STATS; c++) {
        double got = wn_test_get(&stats, r * WN_N_STATS + c), limit = wide ? 1e-12 : 3e-6;
        if (isnan(want[c]) && isnan(got)) continue;
        if (!(fabs(got - want[c]) <= limit * (1 + fabs(want[c]))))
          fail_msg("row %lld column %d: %.9g, expected %.9g", (long long)i, c, got, want[c]);
      }
    }
    assert_true(counted > 0);
  }
  free_scene(&s);
}

static void stats_match_the_formulas(void **state) {
  (void)state;
  for (int wide = 0; wide < 2; wide++) {
    check_stats(wide, false, PLAIN_CAUSAL);
    check_stats(wide, true, PLAIN_DOCUMENTS);
    check_stats(wide, false, PLAIN_HOLES);
  }
}

static void best_is_the_top_of_p(void **state) {
  (void)state;
  for (int kind = PLAIN_CAUSAL; kind <= PLAIN_ONE_KEY; kind++) {
    scene s = make_scene(true, 2, kind == PLAIN_DOCUMENTS, (plain_rows_kind)kind);
    wn_tensor picks = integers(&s, 2, N, K);
    wn_attention_params params = {.scale = s.params.attention_scale};
    OK(s.device->ops->select_best(s.device, &picks, &s.qa, &s.ka, &s.rows, &params));
    for (int64_t i = 0; i < N; i++) {
      int32_t want[K];
      plain_top_k(want, K, (double *)s.p.data + i * M, s.seen + i * M, M);
      assert_memory_equal((int32_t *)picks.data + i * K, want, sizeof want);
    }
    /* all keys alike: the lowest are taken */
    for (int64_t i = 0; i < wn_tensor_count(&s.qa); i++) wn_test_set(&s.qa, i, 0);
    OK(s.device->ops->select_best(s.device, &picks, &s.qa, &s.ka, &s.rows, &params));
    for (int64_t i = 0; i < N; i++)
      for (int32_t j = 0; j < K; j++) {
        int32_t key = s.rows.first_key[i] + j;
        assert_int_equal(((int32_t *)picks.data)[i * K + j], key <= s.rows.last_key[i] ? key : -1);
      }
    free_scene(&s);
  }
}

static void check_well_formed(const scene *s, const wn_tensor *picks, int64_t k) {
  for (int64_t i = 0; i < N; i++) {
    const int32_t *pick = (int32_t *)picks->data + i * k;
    int64_t visible = s->rows.last_key[i] - s->rows.first_key[i] + 1;
    if (visible < 0) visible = 0;
    for (int64_t j = 0; j < k; j++) {
      if (j >= visible) {
        assert_int_equal(pick[j], -1);
        continue;
      }
      assert_in_range(pick[j], s->rows.first_key[i], s->rows.last_key[i]);
      if (j) assert_true(pick[j] > pick[j - 1]);
    }
  }
}

static void patterns(void **state) {
  (void)state;
  static const int64_t ks[] = {1, 3, 4, 5, K, 64};
  for (int kind = PLAIN_CAUSAL; kind <= PLAIN_ONE_KEY; kind++) {
    scene s = make_scene(false, 2, false, (plain_rows_kind)kind);
    for (size_t x = 0; x < sizeof ks / sizeof ks[0]; x++) {
      int64_t k = ks[x], sink = k < 4 ? k : 4;
      wn_tensor picks = integers(&s, 2, N, k);
      for (int pattern = WN_PATTERN_RECENT; pattern <= WN_PATTERN_RANDOM; pattern++) {
        wn_pattern_params params = {.pattern = (wn_pattern)pattern, .seed = 4, .layer = 2};
        OK(s.device->ops->select_pattern(s.device, &picks, &s.rows, &params));
        check_well_formed(&s, &picks, k);
        for (int64_t i = 0; i < N && pattern != WN_PATTERN_RANDOM; i++) {
          int32_t first = s.rows.first_key[i], last = s.rows.last_key[i];
          for (int64_t j = 0; j < k && last - first + 1 > k; j++) {
            int64_t recent = last - (k - 1 - j);
            assert_int_equal(((int32_t *)picks.data)[i * k + j],
                             pattern == WN_PATTERN_SINK && j < sink ? first + j : recent);
          }
        }
      }
    }
    free_scene(&s);
  }
}

/* A row's random picks depend on seed, layer and position alone: not on the row range, and not on each other.
 */
static void random_picks_are_a_pure_function(void **state) {
  (void)state;
  scene s = make_scene(false, 2, false, PLAIN_CAUSAL);
  wn_device *d = s.device;
  wn_tensor all = integers(&s, 2, N, K), other = integers(&s, 2, N, K), part = integers(&s, 2, 30, K);
  wn_pattern_params params = {.pattern = WN_PATTERN_RANDOM, .seed = 4, .layer = 2};
  OK(d->ops->select_pattern(d, &all, &s.rows, &params));
  wn_rows range = {.n_rows = 30,
                   .n_keys = M,
                   .first_key = s.rows.first_key + 50,
                   .last_key = s.rows.last_key + 50,
                   .position = s.rows.position + 50};
  OK(d->ops->select_pattern(d, &part, &range, &params));
  assert_memory_equal(part.data, (int32_t *)all.data + 50 * K, 30 * K * sizeof(int32_t));
  for (int change = 0; change < 2; change++) {
    params = (wn_pattern_params){.pattern = WN_PATTERN_RANDOM, .seed = change ? 5 : 4, .layer = change ? 2 : 3};
    OK(d->ops->select_pattern(d, &other, &s.rows, &params));
    int same = 0;
    for (int64_t i = 0; i < N; i++)
      same += memcmp((int32_t *)other.data + i * K, (int32_t *)all.data + i * K, K * sizeof(int32_t)) == 0;
    assert_int_equal(same, 0);
  }
  /* every key's share of the picks is k / visible: 110 rows, 16 picks of about 135 */
  double low = 0;
  for (int64_t i = 0; i < N * K; i++) low += ((int32_t *)all.data)[i] < M / 3;
  print_message("share of picks in the first third of the keys: %.3f\n", low / (N * K));
  assert_true(fabs(low / (N * K) - 0.47) < 0.06);
  free_scene(&s);
}

static void threads_agree_bit_for_bit(void **state) {
  (void)state;
  wn_tensor stats[2];
  scene scenes[2];
  for (int i = 0; i < 2; i++) {
    scene *s = &scenes[i];
    *s = make_scene(false, i + 1, false, PLAIN_CAUSAL);
    wn_device *d = s->device;
    wn_tensor sample = integers(s, 1, S, 0), picks = integers(s, 2, S, K);
    for (int64_t r = 0; r < S; r++) wn_test_set(&sample, r, (double)(r * 2));
    OK(wn_device_tensor(d, &stats[i], d->weights, "stats", WN_STAT, 2, S, WN_N_STATS, 0, 0));
    OK(d->ops->selection_stats(d, &stats[i], &picks, &sample, NULL, &s->q, &s->k, &s->w, &s->qa, &s->ka, &s->rows,
                               &s->params));
  }
  assert_memory_equal(stats[0].data, stats[1].data, (size_t)wn_tensor_bytes(&stats[0]));
  for (int i = 0; i < 2; i++) free_scene(&scenes[i]);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(stats_match_the_formulas),
      cmocka_unit_test(best_is_the_top_of_p),
      cmocka_unit_test(patterns),
      cmocka_unit_test(random_picks_are_a_pure_function),
      cmocka_unit_test(threads_agree_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
