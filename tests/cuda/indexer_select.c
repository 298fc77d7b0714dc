/* The indexer's scores against the CPU's, and its selection against a plain sort of those very scores: ordinary shapes,
 * plateaus, broken numbers, rows made so that a sample of them lies, rows longer and shorter than every buffer. */
#include "support/twin.h"

typedef struct shape {
  int32_t n, m, heads, width, document; /* document 0: causal, with the last row at the last key */
  bool holes;
} shape;

static const shape shapes[] = {
    {1, 1, 1, 1, 0, false},       {7, 7, 3, 5, 0, false},        {131, 131, 4, 32, 0, true},
    {129, 129, 5, 16, 40, true},  {70, 301, 6, 13, 0, false},    {150, 150, 2, 12, 0, false},
    {259, 259, 64, 128, 0, true}, {203, 1019, 16, 128, 0, true}, {97, 211, 8, 64, 0, false},
    {64, 333, 130, 24, 0, false}, {37, 170, 9, 136, 0, true},    {190, 190, 64, 128, 61, true},
    {129, 641, 32, 64, 0, false}, {130, 403, 16, 64, 0, true},   {140, 300, 32, 128, 0, true},
    {61, 259, 8, 128, 0, true},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

typedef struct scene {
  twin_rows rows;
  twin q, k, w;
  wn_indexer_params params;
} scene;

static scene make_scene(twin_bench *b, const shape *c, int64_t margin, double deviation) {
  return (scene){.rows = twin_causal_end(b, c->n, c->m, c->document, c->holes),
                 .q = twin_random(b, WN_ACT, 11, deviation, margin, 3, c->n, c->heads, c->width),
                 .k = twin_random(b, WN_ACT, 12, 1, margin, 2, c->m, c->width, 0),
                 .w = twin_random(b, WN_STAT, 13, 1, margin, 2, c->n, c->heads, 0),
                 .params = {.scale = 1 / sqrt(c->width)}};
}

static void gpu_scores(twin_bench *b, const scene *s, wn_tensor *scores) {
  OK(b->cuda->ops->indexer_scores(b->cuda, scores, &s->q.cuda, &s->k.cuda, &s->w.cuda, &s->rows.cuda, &s->params));
}

static void gpu_select(twin_bench *b, const scene *s, wn_tensor *picks) {
  OK(b->cuda->ops->indexer_select(b->cuda, picks, &s->q.cuda, &s->k.cuda, &s->w.cuda, &s->rows.cuda, &s->params));
}

/* ---- the plain form: sort all, take k, sort those ---- */

static void plain_top_k(int32_t *pick, int64_t k, const float *score, int32_t first, int32_t last) {
  int32_t visible = last >= first ? last - first + 1 : 0;
  twin_ranked *all = malloc((size_t)visible * sizeof *all + 8);
  assert_non_null(all);
  for (int32_t i = 0; i < visible; i++) {
    float x = score[first + i];
    all[i] = (twin_ranked){isnan(x) ? -INFINITY : x, first + i};
  }
  qsort(all, (size_t)visible, sizeof *all, twin_by_score);
  for (int64_t i = 0; i < k; i++) pick[i] = i < visible ? all[i].key : -1;
  qsort(pick, (size_t)(k < visible ? k : visible), sizeof *pick, twin_by_number);
  free(all);
}

/* The selection must be the plain top-k of the scores that the GPU itself makes, bit for bit the same. */
static void check_selection(twin_bench *b, const char *what, const scene *s, int64_t k, int64_t margin) {
  int64_t n = s->rows.cpu.n_rows, m = s->rows.cpu.n_keys;
  twin scores = {.role = WN_STAT}, picks = {.role = WN_INDEX};
  OK(wn_device_tensor(b->cuda, &scores.cuda, b->cuda->stash, "scores", WN_STAT, 2, n, m + margin, 0, 0));
  OK(wn_device_tensor(b->cuda, &picks.cuda, b->cuda->stash, "picks", WN_INDEX, 2, n, k + margin, 0, 0));
  scores.cuda = wn_tensor_slice(scores.cuda, 1, 0, m);
  picks.cuda = wn_tensor_slice(picks.cuda, 1, 0, k);
  size_t bytes = (size_t)wn_tensor_bytes(&picks.cuda);
  int32_t *want = malloc((size_t)k * sizeof *want), *poison = malloc(bytes);
  assert_true(want && poison);
  for (int64_t i = 0; i < n * k; i++) poison[i] = -7;
  OK(b->cuda->ops->upload(b->cuda, &picks.cuda, poison));
  gpu_scores(b, s, &scores.cuda);
  gpu_select(b, s, &picks.cuda);
  wn_tensor score = twin_download(b, &scores.cuda), pick = twin_download(b, &picks.cuda);
  for (int64_t i = 0; i < n; i++) {
    const int32_t *got = (const int32_t *)pick.data + i * k;
    plain_top_k(want, k, (const float *)score.data + i * m, s->rows.cpu.first_key[i], s->rows.cpu.last_key[i]);
    for (int64_t j = 0; j < k; j++)
      if (got[j] != want[j])
        fail_msg("%s: row %lld place %lld of %lld: %d, expected %d", what, (long long)i, (long long)j, (long long)k,
                 got[j], want[j]);
  }
  free(score.data);
  free(pick.data);
  free(want);
  free(poison);
}

/* ---- ordinary scenes ---- */

static void scores_match_the_cpu(void **state) {
  twin_bench *b = twin_begin(state);
  for (int i = 0; i < N_SHAPES; i++)
    for (int large = 0; large < 2; large++) {
      scene s = make_scene(b, &shapes[i], i % 3 * 8, large ? 1000 : 1);
      twin scores = twin_strided(b, WN_STAT, i % 2 * 3, 2, shapes[i].n, shapes[i].m, 0);
      char what[64];
      snprintf(what, sizeof what, "scores, shape %d%s", i, large ? ", large" : "");
      twin_poison(b, &scores);
      OK(b->cpu->ops->indexer_scores(b->cpu, &scores.cpu, &s.q.cpu, &s.k.cpu, &s.w.cpu, &s.rows.cpu, &s.params));
      gpu_scores(b, &s, &scores.cuda);
      twin_close(b, what, &scores, twin_f32);
      wn_arena_release(b->cuda->stash, 0);
      wn_arena_release(b->cpu->stash, 0);
    }
  twin_end(b);
}

static void selections_are_the_top_of_the_scores(void **state) {
  twin_bench *b = twin_begin(state);
  for (int i = 0; i < N_SHAPES; i++) {
    const int64_t k[] = {1, 16, 17, 64, shapes[i].m, shapes[i].m + 3};
    scene s = make_scene(b, &shapes[i], i % 3 * 8, 1);
    for (size_t j = 0; j < sizeof k / sizeof *k; j++) check_selection(b, "random", &s, k[j], j % 2 * 5);
    wn_arena_release(b->cuda->stash, 0);
    wn_arena_release(b->cpu->stash, 0);
  }
  twin_end(b);
}

/* Where the GPU picks other keys than the CPU, both keys' exact scores are the threshold but for rounding. */
static void picks_differ_from_the_cpu_by_rounding_only(void **state) {
  twin_bench *b = twin_begin(state);
  int64_t differ = 0, all = 0;
  for (int i = 0; i < N_SHAPES; i++) {
    enum { K = 24 };
    const shape *c = &shapes[i];
    scene s = make_scene(b, c, 0, 1);
    twin scores = twin_tensor(b, WN_STAT, 2, c->n, c->m, 0), picks = twin_tensor(b, WN_INDEX, 2, c->n, K, 0);
    twin_poison(b, &picks);
    OK(b->cpu->ops->indexer_scores(b->cpu, &scores.cpu, &s.q.cpu, &s.k.cpu, &s.w.cpu, &s.rows.cpu, &s.params));
    OK(b->cpu->ops->indexer_select(b->cpu, &picks.cpu, &s.q.cpu, &s.k.cpu, &s.w.cpu, &s.rows.cpu, &s.params));
    gpu_select(b, &s, &picks.cuda);
    wn_tensor got = twin_download(b, &picks.cuda);
    for (int32_t r = 0; r < c->n; r++) {
      const int32_t *x = (const int32_t *)got.data + r * K, *y = (const int32_t *)picks.cpu.data + r * K;
      double lowest = INFINITY, largest = 0; /* among the CPU's picks */
      for (int j = 0; j < K; j++) {
        assert_true((x[j] < 0) == (y[j] < 0) && x[j] < c->m);
        if (y[j] < 0) continue;
        double score = wn_test_get(&scores.cpu, (int64_t)r * c->m + y[j]);
        lowest = fmin(lowest, score);
        largest = fmax(largest, fabs(score));
      }
      for (int j = 0; j < K; j++) {
        if (x[j] < 0) continue;
        double score = wn_test_get(&scores.cpu, (int64_t)r * c->m + x[j]);
        assert_true(isfinite(score));
        if (!(score >= lowest - 1e-5 * (1 + largest)))
          fail_msg("shape %d row %d: key %d with score %g is picked, the threshold is %g", i, r, x[j], score, lowest);
        differ += score < lowest;
        all++;
      }
    }
    free(got.data);
    wn_arena_release(b->cuda->stash, 0);
    wn_arena_release(b->cpu->stash, 0);
  }
  print_message("  %lld of %lld picks are below the CPU's threshold\n", (long long)differ, (long long)all);
  assert_true(differ * 1000 < all);
  twin_end(b);
}

/* ---- plateaus and broken numbers ---- */

static void set_keys(twin_bench *b, scene *s, double (*value)(int64_t key, int64_t column, double old)) {
  int64_t n = wn_tensor_count(&s->k.cpu), width = s->k.cpu.dim[1];
  double *x = malloc((size_t)n * sizeof *x);
  assert_non_null(x);
  for (int64_t i = 0; i < n; i++) x[i] = value(i / width, i % width, wn_test_get(&s->k.cpu, i));
  twin_set(b, &s->k, x);
  free(x);
}

static double positive(int64_t key, int64_t column, double old) {
  return (void)key, (void)column, fabs(old);
}
static double sixteen_kinds(int64_t key, int64_t column, double old) {
  return (void)old, 0.25 + (double)((key % 16 * 7 + column * 5) % 11);
}
static double all_equal(int64_t key, int64_t column, double old) {
  return (void)key, (void)column, (void)old, 1;
}
static double broken(int64_t key, int64_t column, double old) {
  return column || key % 3 ? old : key % 2 ? NAN : key % 4 ? INFINITY : -INFINITY;
}
static double all_nan(int64_t key, int64_t column, double old) {
  return (void)key, (void)column, (void)old, NAN;
}

static void ties_and_broken_scores(void **state) {
  twin_bench *b = twin_begin(state);
  const shape all[] = {{140, 140, 4, 16, 50, true}, {150, 2900, 16, 128, 0, false}, {66, 700, 64, 128, 0, false}};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    scene s = make_scene(b, &all[i], 0, 1);
    int64_t n = wn_tensor_count(&s.q.cpu), row = (int64_t)all[i].heads * all[i].width;
    double *x = malloc((size_t)n * sizeof *x);
    assert_non_null(x);
    for (int64_t j = 0; j < n; j++) { /* of every other row all ReLUs are dead */
      double old = fabs(wn_test_get(&s.q.cpu, j));
      x[j] = j / row % 2 ? old : -old;
    }
    twin_set(b, &s.q, x);
    free(x);
    set_keys(b, &s, positive);
    check_selection(b, "dead ReLUs", &s, 20, 0);
    set_keys(b, &s, sixteen_kinds);
    check_selection(b, "sixteen kinds of keys", &s, 20, 0);
    set_keys(b, &s, all_equal);
    check_selection(b, "equal keys", &s, 20, 0);
    set_keys(b, &s, all_nan);
    check_selection(b, "NaN", &s, 20, 0);
    scene t = make_scene(b, &all[i], 0, 1);
    set_keys(b, &t, broken);
    check_selection(b, "broken keys", &t, 20, 0);
    twin scores = twin_tensor(b, WN_STAT, 2, all[i].n, all[i].m, 0);
    OK(b->cpu->ops->indexer_scores(b->cpu, &scores.cpu, &t.q.cpu, &t.k.cpu, &t.w.cpu, &t.rows.cpu, &t.params));
    gpu_scores(b, &t, &scores.cuda);
    twin_close(b, "broken keys", &scores, twin_f32); /* NaN and infinities in the same places */
  }
  twin_end(b);
}

/* A dead ReLU is exactly zero, of two equal scores the lower key goes in: what comes out is known without any sort. */
static void dead_rows_take_the_lowest_keys(void **state) {
  twin_bench *b = twin_begin(state);
  const shape c = {3, 9000, 64, 128, 0, false};
  scene s = make_scene(b, &c, 0, 1);
  twin_constant(b, &s.q, -1);
  twin_constant(b, &s.k, 1);
  twin picks = twin_tensor(b, WN_INDEX, 2, c.n, 2048, 0);
  twin_poison(b, &picks);
  gpu_select(b, &s, &picks.cuda);
  for (int64_t i = 0; i < c.n * 2048; i++) ((int32_t *)picks.cpu.data)[i] = (int32_t)(i % 2048);
  twin_same_ints(b, "dead rows", &picks);
  twin_end(b);
}

/* ---- rows of any scores: a key of three BF16 parts and the same negated, against heads that read one or the other
 * ---- */

typedef enum crafted {
  NORMAL,
  ASCENDING,
  DESCENDING,
  EQUAL,
  PLATEAU,
  NEIGHBOURS,
  HIDDEN,
  EXPOSED,
  WIDE,
  INFINITE,
  FEW_LARGE,
  N_CRAFTED
} crafted;

static float crafted_score(crafted kind, int64_t key, int64_t m) {
  const double z = wn_rng_normal(77, WN_RNG_TEST, (uint64_t)key), u = wn_rng_uniform(78, WN_RNG_TEST, (uint64_t)key);
  switch (kind) {
  case NORMAL: return (float)z;
  case ASCENDING: return (float)(key - m / 2);
  case DESCENDING: return (float)(m / 2 - key);
  case EQUAL: return -3.5f;
  case PLATEAU: return u < 0.99 ? 0.0f : (float)z; /* fewer than k above the plateau, in longer rows more */
  case NEIGHBOURS: return 1.0f + (float)(int32_t)(u * 4000) * 0x1p-23f;
  case HIDDEN: return key / 8 % 4 ? 5.0f + (float)u : (float)u;  /* where a regular sample looks, most is small */
  case EXPOSED: return key / 8 % 4 ? (float)u : 5.0f + (float)u; /* large */
  case WIDE: return (float)(z * exp2(floor(u * 200) - 100));
  case INFINITE: return u < 0.7 ? -INFINITY : u < 0.8 ? NAN : u < 0.8005 ? INFINITY : (float)z;
  case FEW_LARGE: return key % 1000 == 7 ? 1e30f : (float)z * 1e-20f;
  default: return 0;
  }
}

static scene crafted_scene(twin_bench *b, crafted kind, int32_t m) {
  enum { N = 5, PARTS = 3 };
  const int32_t first[N] = {0, 1, m / 3 + 2, 0, 5}, last[N] = {m - 1, m - 2, m - 3, m / 2, 4};
  const int32_t position[N] = {0, 1, 2, 3, 4};
  const double q[2 * PARTS] = {1, 1, 1, -1, -1, -1};
  scene s = {.rows = twin_rows_of(b, m, first, last, position, N),
             .q = twin_tensor(b, WN_ACT, 3, N, 2, PARTS),
             .k = twin_tensor(b, WN_ACT, 2, m, PARTS, 0),
             .w = twin_tensor(b, WN_STAT, 2, N, 2, 0),
             .params = {.scale = 1}};
  double *queries = malloc(N * sizeof q), *keys = malloc((size_t)m * PARTS * sizeof *keys), weights[N * 2];
  assert_true(queries && keys);
  for (int i = 0; i < N; i++) {
    memcpy(queries + i * 2 * PARTS, q, sizeof q);
    weights[2 * i] = 1;
    weights[2 * i + 1] = -1;
  }
  for (int64_t key = 0; key < m; key++) {
    float left = crafted_score(kind, key, m);
    for (int p = 0; p < PARTS; p++) {
      float part = wn_f32_from_bf16(wn_bf16_from_f32(left));
      keys[key * PARTS + p] = part;
      left = isfinite(part) ? left - part : 0;
    }
  }
  twin_set(b, &s.q, queries);
  twin_set(b, &s.k, keys);
  twin_set(b, &s.w, weights);
  free(queries);
  free(keys);
  return s;
}

static void crafted_rows(void **state) {
  twin_bench *b = twin_begin(state);
  static const int32_t lengths[] = {100, 2051, 8191, 9001, 40000, 140003};
  static const int64_t picks[] = {1, 31, 512, 2048, 5000};
  for (int kind = 0; kind < N_CRAFTED; kind++)
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++) {
      scene s = crafted_scene(b, (crafted)kind, lengths[l]);
      char what[64];
      snprintf(what, sizeof what, "crafted %d of %d", kind, lengths[l]);
      for (size_t i = 0; i < sizeof picks / sizeof *picks; i++)
        if (l < 4 || ((size_t)kind + l + i) % 2 == 0) check_selection(b, what, &s, picks[i], 0);
      wn_arena_release(b->cuda->stash, 0);
      wn_arena_release(b->cpu->stash, 0);
    }
  twin_end(b);
}

/* The two signed heads give back the crafted number itself: else the rows above would not be what they are named. */
static void crafted_scores_are_exact(void **state) {
  twin_bench *b = twin_begin(state);
  enum { M = 3000 };
  for (int kind = 0; kind < N_CRAFTED; kind++) {
    scene s = crafted_scene(b, (crafted)kind, M);
    wn_tensor scores;
    OK(wn_device_tensor(b->cuda, &scores, b->cuda->stash, "scores", WN_STAT, 2, s.rows.cpu.n_rows, M, 0, 0));
    gpu_scores(b, &s, &scores);
    wn_tensor host = twin_download(b, &scores);
    for (int64_t key = 0; key < M; key++) {
      float want = crafted_score((crafted)kind, key, M), got = ((float *)host.data)[key];
      if (isfinite(want) && !(fabsf(got - want) <= 2e-7f * fabsf(want)))
        fail_msg("kind %d key %lld: %.9g, expected %.9g", kind, (long long)key, got, want);
    }
    free(host.data);
  }
  twin_end(b);
}

/* ---- long rows, chunks, ranges, repeats ---- */

static void long_rows(void **state) {
  twin_bench *b = twin_begin(state);
  const shape c = {33, 40001, 16, 128, 0, false}, d = {19, 12289, 64, 128, 0, false};
  scene s = make_scene(b, &c, 0, 1), t = make_scene(b, &d, 0, 1);
  check_selection(b, "16 heads", &s, 1024, 0);
  check_selection(b, "64 heads", &t, 2048, 0);
  twin_end(b);
}

/* More rows than 2 GiB of scores hold: rows on both sides of the cut are what they are alone. */
static void chunks_of_rows_join(void **state) {
  twin_bench *b = twin_begin(state);
  const shape c = {4225, 131072, 2, 8, 0, false};
  enum { FROM = 4080, COUNT = 32, K = 33 };
  scene s = make_scene(b, &c, 0, 1);
  twin picks = twin_tensor(b, WN_INDEX, 2, c.n, K, 0);
  twin_poison(b, &picks);
  gpu_select(b, &s, &picks.cuda);
  wn_tensor whole = twin_download(b, &picks.cuda);
  scene part = s;
  part.q = twin_slice(s.q, 0, FROM, COUNT);
  part.w = twin_slice(s.w, 0, FROM, COUNT);
  part.rows = (twin_rows){twin_run(s.rows.cpu, FROM, COUNT), twin_run(s.rows.cuda, FROM, COUNT)};
  check_selection(b, "rows at the cut", &part, K, 0);
  wn_tensor alone;
  OK(wn_device_tensor(b->cuda, &alone, b->cuda->stash, "picks", WN_INDEX, 2, COUNT, K, 0, 0));
  gpu_select(b, &part, &alone);
  wn_tensor host = twin_download(b, &alone);
  assert_memory_equal(host.data, (int32_t *)whole.data + FROM * K, COUNT * K * sizeof(int32_t));
  for (int64_t i = 0; i < c.n; i++) assert_in_range(((int32_t *)whole.data)[i * K + K - 1], K - 1, c.m - c.n + i);
  free(whole.data);
  free(host.data);
  twin_end(b);
}

/* A row's scores are the same bits in whatever range of rows they are computed. */
static void scores_do_not_depend_on_the_range(void **state) {
  twin_bench *b = twin_begin(state);
  const shape all[] = {{190, 333, 5, 24, 0, false}, {190, 433, 64, 128, 0, false}, {161, 300, 16, 128, 0, false}};
  for (size_t a = 0; a < sizeof all / sizeof *all; a++) {
    const shape c = all[a];
    scene s = make_scene(b, &c, 0, 1);
    wn_tensor scores;
    OK(wn_device_tensor(b->cuda, &scores, b->cuda->stash, "scores", WN_STAT, 2, c.n, c.m, 0, 0));
    gpu_scores(b, &s, &scores);
    wn_tensor whole = twin_download(b, &scores);
    for (int32_t from = 0, step = 1; from < c.n; from += step, step += 13) {
      int32_t count = from + step > c.n ? c.n - from : step;
      scene part = s;
      part.q = twin_slice(s.q, 0, from, count);
      part.w = twin_slice(s.w, 0, from, count);
      part.rows.cuda =
          (wn_rows){count, c.m, s.rows.cuda.first_key + from, s.rows.cuda.last_key + from, s.rows.cuda.position + from};
      wn_tensor slice = wn_tensor_slice(scores, 0, from, count);
      OK(b->cuda->ops->zero(b->cuda, &slice));
      gpu_scores(b, &part, &slice);
      wn_tensor host = twin_download(b, &slice);
      assert_memory_equal(host.data, (float *)whole.data + (int64_t)from * c.m, (size_t)wn_tensor_bytes(&host));
      free(host.data);
    }
    free(whole.data);
  }
  twin_end(b);
}

/* Tensors that are not 16-byte aligned take the general form: the same scores, bit for bit. */
static void both_forms_agree_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  const shape all[] = {{150, 400, 64, 128, 0, false}, {90, 300, 16, 64, 0, false}, {70, 300, 8, 128, 0, false}};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    scene aligned = make_scene(b, &all[i], 0, 1), odd = make_scene(b, &all[i], 3, 1);
    twin x = twin_tensor(b, WN_STAT, 2, all[i].n, all[i].m, 0), y = twin_tensor(b, WN_STAT, 2, all[i].n, all[i].m, 0);
    twin_poison(b, &x);
    twin_poison(b, &y);
    gpu_scores(b, &aligned, &x.cuda);
    gpu_scores(b, &odd, &y.cuda);
    wn_tensor one = twin_download(b, &x.cuda), other = twin_download(b, &y.cuda);
    assert_memory_equal(one.data, other.data, (size_t)wn_tensor_bytes(&one));
    free(one.data);
    free(other.data);
  }
  twin_end(b);
}

typedef struct repeated {
  twin_bench *b;
  const scene *s;
  twin *scores, *picks;
} repeated;

static void run_both(wn_device *device, void *context) {
  repeated *r = context;
  (void)device;
  gpu_scores(r->b, r->s, &r->scores->cuda);
  gpu_select(r->b, r->s, &r->picks->cuda);
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  const shape all[] = {{300, 4300, 64, 128, 0, true}, {131, 5200, 5, 24, 0, true}};
  for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
    scene s = make_scene(b, &all[i], 0, 1);
    twin scores = twin_tensor(b, WN_STAT, 2, all[i].n, all[i].m, 0);
    twin picks = twin_tensor(b, WN_INDEX, 2, all[i].n, 257, 0);
    repeated context = {b, &s, &scores, &picks};
    twin_repeats(b, run_both, &context, (twin_out[]){{&scores, false}, {&picks, false}}, 2);
  }
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(scores_match_the_cpu),
      cmocka_unit_test(selections_are_the_top_of_the_scores),
      cmocka_unit_test(picks_differ_from_the_cpu_by_rounding_only),
      cmocka_unit_test(ties_and_broken_scores),
      cmocka_unit_test(dead_rows_take_the_lowest_keys),
      cmocka_unit_test(crafted_scores_are_exact),
      cmocka_unit_test(crafted_rows),
      cmocka_unit_test(long_rows),
      cmocka_unit_test(chunks_of_rows_join),
      cmocka_unit_test(scores_do_not_depend_on_the_range),
      cmocka_unit_test(both_forms_agree_bit_for_bit),
      cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
