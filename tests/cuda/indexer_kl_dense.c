/* The dense KL on the GPU against the CPU in FP64: its value to 1e-4, its gradients to 1e-2 (2e-2 at V3.1 width). */
#include "support/twin.h"

typedef struct shape {
  int32_t n, heads, width; /* rows; the attention's heads and their width */
  int32_t n_index, index_width;
  int32_t document;
  bool shared_keys, holes;
  int32_t margin;
  double deviation, w_deviation, coeff;
} shape;

typedef struct scene {
  twin q, k, w, qa, ka, lse, kl, dq, dk, dw;
  twin_rows rows;
  wn_indexer_params params;
} scene;

/* Normal values on a grid of an eighth of the deviation. Products q.k of such values are exact in FP32, so that both
 * devices agree on which of them are above 0, where the gradient jumps. deviation: a power of two. */
static twin on_a_grid(twin_bench *b, uint64_t seed, double deviation, int64_t margin, int32_t rank, int64_t d0,
                      int64_t d1, int64_t d2) {
  twin t = twin_random(b, WN_ACT, seed, deviation, margin, rank, d0, d1, d2);
  int64_t n = wn_tensor_count(&t.cpu);
  double *x = malloc((size_t)n * sizeof *x + 8);
  for (int64_t i = 0; i < n; i++) x[i] = rint(wn_test_get(&t.cpu, i) / deviation * 8) / 8 * deviation;
  twin_set(b, &t, x);
  free(x);
  return t;
}

/* Millions of values, drawn from a pool of normal ones: quicker than twin_fill. Dense tensors. */
static void fill_from_pool(twin_bench *b, twin *t, uint32_t seed) {
  enum { POOL = 1 << 14 };
  uint16_t *pool = malloc(POOL * sizeof *pool), *host = malloc((size_t)wn_tensor_count(&t->cpu) * sizeof *host);
  double *wide = malloc(POOL * sizeof *wide), *cpu = t->cpu.data;
  for (uint64_t i = 0; i < POOL; i++) {
    pool[i] = wn_bf16_from_f32((float)wn_rng_normal(seed, WN_RNG_TEST, i));
    wide[i] = (double)wn_f32_from_bf16(pool[i]);
  }
  for (int64_t i = 0; i < wn_tensor_count(&t->cpu); i++) {
    seed = seed * 1664525u + 1013904223u;
    host[i] = pool[seed >> 18];
    cpu[i] = wide[seed >> 18];
  }
  OK(b->cuda->ops->upload(b->cuda, &t->cuda, host));
  free(pool);
  free(wide);
  free(host);
}

/* lse[n,H] of the attention, from the CPU, rounded to FP32. */
static void find_lse(twin_bench *b, scene *s) {
  int64_t n = s->qa.cpu.dim[0], heads = s->qa.cpu.dim[1];
  wn_tensor keys = s->ka.cpu, o;
  keys.stride[1] = keys.dim[1] == 1 ? 0 : keys.stride[1];
  keys.dim[1] = heads;
  wn_tensor values = wn_tensor_slice(keys, 2, 0, 1);
  s->lse = twin_tensor(b, WN_STAT, 2, n, heads, 0);
  OK(wn_device_tensor(b->cpu, &o, b->cpu->stash, "test", WN_ACT, 3, n, heads, 1, 0));
  wn_attention_params params = {.scale = s->params.attention_scale};
  OK(b->cpu->ops->attention_dense(b->cpu, &o, &s->lse.cpu, NULL, NULL, &s->qa.cpu, &keys, &values, &s->rows.cpu,
                                  &params));
  double *values_of_lse = malloc((size_t)(n * heads) * sizeof *values_of_lse + 8);
  memcpy(values_of_lse, s->lse.cpu.data, (size_t)(n * heads) * sizeof *values_of_lse);
  twin_set(b, &s->lse, values_of_lse);
  free(values_of_lse);
}

/* Outputs begin as NaN, but for dk, which begins at zero. */
static void make_outputs(twin_bench *b, scene *s, int32_t margin) {
  int64_t n = s->q.cpu.dim[0], m = s->k.cpu.dim[0], heads = s->q.cpu.dim[1], width = s->q.cpu.dim[2];
  s->kl = twin_tensor(b, WN_STAT, 1, n, 0, 0);
  s->dq = twin_strided(b, WN_ACT, margin, 3, n, heads, width);
  s->dk = twin_strided(b, WN_WGRAD, margin, 2, m, width, 0);
  s->dw = twin_strided(b, WN_STAT, margin, 2, n, heads, 0);
  twin_poison(b, &s->kl);
  twin_poison(b, &s->dq);
  twin_poison(b, &s->dw);
  twin_constant(b, &s->dk, 0);
}

static scene make_scene(twin_bench *b, const shape *c, twin_rows rows) {
  scene s = {.rows = rows};
  int64_t n = rows.cpu.n_rows, m = rows.cpu.n_keys;
  double deviation = c->deviation != 0 ? c->deviation : 1;
  s.params = (wn_indexer_params){.scale = 1 / sqrt((double)c->index_width),
                                 .attention_scale = 1 / sqrt((double)c->width),
                                 .coeff = c->coeff != 0 ? c->coeff : 1};
  s.q = on_a_grid(b, 1, deviation, c->margin, 3, n, c->n_index, c->index_width);
  s.k = on_a_grid(b, 2, deviation, c->margin, 2, m, c->index_width, 0);
  s.w = twin_random(b, WN_STAT, 3, c->w_deviation, c->margin, 2, n, c->n_index, 0);
  s.qa = twin_random(b, WN_ACT, 4, deviation, c->margin, 3, n, c->heads, c->width);
  s.ka = twin_strided(b, WN_ACT, c->margin, 3, m, c->shared_keys ? 1 : c->heads, c->width);
  if (wn_tensor_count(&s.ka.cpu) > 1 << 24)
    fill_from_pool(b, &s.ka, 5);
  else
    twin_fill(b, &s.ka, 5, deviation, 0);
  find_lse(b, &s);
  make_outputs(b, &s, c->margin);
  return s;
}

static void run_cuda(wn_device *d, void *context) {
  scene *s = context;
  OK(d->ops->indexer_kl_dense(d, &s->kl.cuda, &s->dq.cuda, &s->dk.cuda, &s->dw.cuda, &s->q.cuda, &s->k.cuda, &s->w.cuda,
                              &s->qa.cuda, &s->ka.cuda, &s->lse.cuda, &s->rows.cuda, &s->params));
}

static void run_cpu(wn_device *d, scene *s) {
  OK(d->ops->indexer_kl_dense(d, &s->kl.cpu, &s->dq.cpu, &s->dk.cpu, &s->dw.cpu, &s->q.cpu, &s->k.cpu, &s->w.cpu,
                              &s->qa.cpu, &s->ka.cpu, &s->lse.cpu, &s->rows.cpu, &s->params));
}

/* Every row's value: |gpu - cpu| <= relative |cpu| + absolute. Returns the mean value. */
static double check_value(twin_bench *b, const scene *s, double relative, double absolute) {
  wn_tensor host = twin_download(b, &s->kl.cuda);
  int64_t n = wn_tensor_count(&host);
  double worst = 0, off = 0, total = 0;
  for (int64_t i = 0; i < n; i++) {
    double x = wn_test_get(&host, i), y = wn_test_get(&s->kl.cpu, i), gap = fabs(x - y);
    if (!(gap <= relative * fabs(y) + absolute)) fail_msg("row %lld: kl %.9g, the CPU has %.9g", (long long)i, x, y);
    if (s->rows.cpu.last_key[i] <= s->rows.cpu.first_key[i]) assert_true(x == 0);
    worst = fmax(worst, gap);
    off = fmax(off, y > 1e-3 ? gap / y : 0);
    total += y;
  }
  free(host.data);
  print_message("  kl: mean %.3e, off by at most %.1e, relatively %.1e\n", total / (double)n, worst, off);
  return total / (double)n;
}

static void check_gradients(twin_bench *b, const scene *s, double bar) {
  twin_close(b, "dq", &s->dq, bar);
  twin_close(b, "dk", &s->dk, bar);
  twin_close(b, "dw", &s->dw, bar);
}

static void check_scene(twin_bench *b, scene *s) {
  run_cuda(b->cuda, s);
  run_cpu(b->cpu, s);
  check_value(b, s, 1e-4, 1e-6);
  check_gradients(b, s, twin_bf16);
}

static void agrees_on(void **state, const shape *shapes, size_t count) {
  twin_bench *b = twin_begin(state);
  for (size_t i = 0; i < count; i++) {
    const shape *c = &shapes[i];
    print_message(" n %d, H %d x %d, HI %d x %d, documents %d%s%s, margin %d\n", c->n, c->heads, c->width, c->n_index,
                  c->index_width, c->document, c->shared_keys ? ", shared keys" : "", c->holes ? ", holes" : "",
                  c->margin);
    scene s = make_scene(b, c, twin_causal(b, c->n, c->document, c->holes));
    check_scene(b, &s);
    twin_end(b);
  }
}

static void agrees_on_odd_shapes(void **state) {
  static const shape shapes[] = {
      {.n = 1, .heads = 2, .width = 16, .n_index = 2, .index_width = 16, .w_deviation = 1},
      {.n = 2, .heads = 1, .width = 8, .n_index = 1, .index_width = 8, .w_deviation = 1},
      {.n = 3, .heads = 4, .width = 18, .n_index = 2, .index_width = 12, .w_deviation = 1},
      {.n = 131, .heads = 4, .width = 18, .n_index = 2, .index_width = 16, .w_deviation = 1},
      {.n = 133, .heads = 2, .width = 16, .n_index = 3, .index_width = 12, .w_deviation = 1},
      {.n = 127, .heads = 4, .width = 24, .n_index = 2, .index_width = 24, .w_deviation = 1},
      {.n = 129, .heads = 3, .width = 40, .n_index = 5, .index_width = 32, .w_deviation = 1, .coeff = 0.25},
      {.n = 257, .heads = 5, .width = 33, .n_index = 3, .index_width = 17, .w_deviation = 1, .holes = true},
      {.n = 300, .heads = 16, .width = 192, .n_index = 16, .index_width = 128, .w_deviation = 0.5, .document = 77},
      {.n = 211, .heads = 8, .width = 64, .n_index = 1, .index_width = 64, .w_deviation = 1, .margin = 8},
      {.n = 150, .heads = 2, .width = 64, .n_index = 64, .index_width = 128, .w_deviation = 0.2, .margin = 3},
      {.n = 140, .heads = 2, .width = 576, .n_index = 8, .index_width = 64, .w_deviation = 0.5, .shared_keys = true},
  };
  agrees_on(state, shapes, sizeof shapes / sizeof *shapes);
}

/* More heads than a tile of (row, head) pairs, a width past 128, head counts that leave tiles part empty. */
static void agrees_on_many_heads_and_wide_ones(void **state) {
  static const shape shapes[] = {
      {.n = 70, .heads = 2, .width = 32, .n_index = 65, .index_width = 64, .w_deviation = 0.2, .document = 50},
      {.n = 70, .heads = 2, .width = 32, .n_index = 150, .index_width = 64, .w_deviation = 0.2, .holes = true},
      {.n = 150, .heads = 2, .width = 32, .n_index = 3, .index_width = 200, .w_deviation = 1},
      {.n = 150, .heads = 2, .width = 32, .n_index = 70, .index_width = 256, .w_deviation = 0.2, .document = 64},
      {.n = 150, .heads = 2, .width = 32, .n_index = 32, .index_width = 128, .w_deviation = 0.2, .document = 13},
      {.n = 331,
       .heads = 2,
       .width = 32,
       .n_index = 8,
       .index_width = 128,
       .w_deviation = 0.4,
       .holes = true,
       .margin = 8},
      {.n = 200, .heads = 2, .width = 32, .n_index = 128, .index_width = 128, .w_deviation = 0.1, .document = 90},
      {.n = 1, .heads = 2, .width = 32, .n_index = 64, .index_width = 128, .w_deviation = 0.2},
      {.n = 131, .heads = 2, .width = 32, .n_index = 5, .index_width = 128, .w_deviation = 0.4},
  };
  agrees_on(state, shapes, sizeof shapes / sizeof *shapes);
}

static void agrees_on_a_longer_sequence(void **state) {
  static const shape shapes[] = {
      {.n = 1024, .heads = 8, .width = 96, .n_index = 8, .index_width = 64, .w_deviation = 0.5},
      {.n = 700,
       .heads = 4,
       .width = 64,
       .n_index = 4,
       .index_width = 64,
       .w_deviation = 1,
       .document = 333,
       .holes = true,
       .shared_keys = true},
  };
  agrees_on(state, shapes, sizeof shapes / sizeof *shapes);
}

/* n rows over m keys: row i sees `window` keys that end at key i * step (a first key below 0 is cut off). */
static twin_rows windows(twin_bench *b, int32_t n, int32_t m, int32_t step, int32_t window) {
  int32_t *x = malloc((size_t)n * 3 * sizeof *x);
  for (int32_t i = 0; i < n; i++) {
    int64_t last = (int64_t)i * step < m ? i * step : m - 1;
    x[n + i] = x[2 * n + i] = (int32_t)last;
    x[i] = last + 1 > window ? (int32_t)last + 1 - window : 0;
  }
  twin_rows rows = twin_rows_of(b, m, x, x + n, x + 2 * n, n);
  free(x);
  return rows;
}

static void chunks_of_rows_add_up(void **state) {
  twin_bench *b = twin_begin(state);
  shape c = {.heads = 2, .width = 16, .n_index = 2, .index_width = 16, .w_deviation = 1};
  scene s = make_scene(b, &c, windows(b, 4400, 300, 1, 250));
  check_scene(b, &s);
  twin_end(b);
}

/* So many keys that a share of dk is made by several tiles of rows, and that most tiles are never touched; by warps and
 * by warpgroups. */
static void few_keys_of_many(void **state) {
  twin_bench *b = twin_begin(state);
  static const int32_t index[][2] = {{4, 72}, {8, 128}};
  for (int i = 0; i < 2; i++) {
    shape c = {.heads = 2, .width = 16, .n_index = index[i][0], .index_width = index[i][1], .w_deviation = 1};
    scene s = make_scene(b, &c, windows(b, 1100, 131072, 119, 200));
    check_scene(b, &s);
    twin_end(b);
  }
}

static void empty_rows_give_nothing(void **state) {
  twin_bench *b = twin_begin(state);
  shape c = {.heads = 2, .width = 16, .n_index = 4, .index_width = 16, .w_deviation = 1};
  scene s = make_scene(b, &c, windows(b, 150, 40, 1, 0)); /* none sees a key */
  check_scene(b, &s);
  twin_end(b);
  s = make_scene(b, &c, windows(b, 150, 150, 1, 1)); /* each sees one: no loss */
  check_scene(b, &s);
  twin_end(b);
}

static void the_value_alone_is_the_same_value(void **state) {
  twin_bench *b = twin_begin(state);
  shape c = {.heads = 4, .width = 48, .n_index = 4, .index_width = 32, .w_deviation = 1};
  scene s = make_scene(b, &c, twin_causal(b, 290, 130, true));
  check_scene(b, &s);
  twin alone = twin_tensor(b, WN_STAT, 1, 290, 0, 0);
  twin_poison(b, &alone);
  OK(b->cuda->ops->indexer_kl_dense(b->cuda, &alone.cuda, NULL, NULL, NULL, &s.q.cuda, &s.k.cuda, &s.w.cuda, &s.qa.cuda,
                                    &s.ka.cuda, &s.lse.cuda, &s.rows.cuda, &s.params));
  wn_tensor a = twin_download(b, &alone.cuda), with = twin_download(b, &s.kl.cuda);
  wn_test_close("kl alone", &a, &with, 0, 0);
  free(a.data);
  free(with.data);
  twin_end(b);
}

static void key_gradients_accumulate(void **state) {
  twin_bench *b = twin_begin(state);
  shape c = {.heads = 4, .width = 48, .n_index = 4, .index_width = 32, .w_deviation = 1, .coeff = 3, .margin = 8};
  scene s = make_scene(b, &c, twin_causal(b, 200, 0, false));
  twin_fill(b, &s.dk, 9, 0.5, 0.1);
  check_scene(b, &s);
  check_scene(b, &s); /* and once more on top */
  twin_end(b);
}

/* A key that is not finite is in the values of the rows that see it, and in no others', also where tiles of rows see
 * the key's tile. (Gradients of the tile's rows may show it: kernels.h.) */
static void a_nan_stays_in_the_values_that_see_it(void **state) {
  twin_bench *b = twin_begin(state);
  enum { N = 400, DOCUMENT = 90, KEY = 200 };
  for (int wide = 0; wide < 2; wide++) {
    shape c = {.heads = 4, .width = 64, .n_index = 8, .index_width = wide ? 128 : 40, .w_deviation = 0.5};
    scene s = make_scene(b, &c, twin_causal(b, N, DOCUMENT, false));
    run_cuda(b->cuda, &s);
    wn_tensor clean = twin_download(b, &s.kl.cuda);
    twin one = twin_slice(s.k, 0, KEY, 1), its = twin_slice(s.ka, 0, KEY, 1);
    twin_constant(b, &one, (double)NAN);
    twin_constant(b, &its, (double)INFINITY);
    run_cuda(b->cuda, &s);
    wn_tensor kl = twin_download(b, &s.kl.cuda);
    for (int64_t i = 0; i < N; i++) {
      double x = wn_test_get(&kl, i), before = wn_test_get(&clean, i);
      bool sees = i >= KEY && i / DOCUMENT == KEY / DOCUMENT;
      if (sees ? !isnan(x) : x != before) fail_msg("row %lld: kl %g, was %g", (long long)i, x, before);
    }
    free(clean.data);
    free(kl.data);
    twin_end(b);
  }
}

/* With no weight at all every key is the student's equal: only dw has a gradient. */
static void a_flat_student(void **state) {
  twin_bench *b = twin_begin(state);
  shape c = {.heads = 4, .width = 48, .n_index = 4, .index_width = 32, .w_deviation = 0};
  scene s = make_scene(b, &c, twin_causal(b, 260, 0, false));
  check_scene(b, &s);
  twin_end(b);
}

/* The teacher looks at one early key that the student gives the least: a KL over the student's own picks would be
 * blind to it. */
static void mass_that_the_student_does_not_pick_counts(void **state) {
  twin_bench *b = twin_begin(state);
  enum { N = 200, D = 16 };
  shape c = {.heads = 2, .width = D, .n_index = 1, .index_width = D, .w_deviation = 1};
  scene s = make_scene(b, &c, twin_causal(b, N, 0, false));
  double *x = calloc((size_t)N * 2 * D, sizeof *x);
  for (int i = 0; i < N * 2; i++) x[i * D] = 8;
  twin_set(b, &s.qa, x);
  for (int i = 0; i < N * 2; i++) x[i * D] = i / 2 == 0 ? 5 : 0; /* key 0 alone: 5 * 8 / sqrt(16) = 10 nats up */
  twin_set(b, &s.ka, x);
  for (int i = 0; i < N; i++) x[i * D] = 4;
  twin_set(b, &s.q, x);
  for (int i = 0; i < N; i++) x[i * D] = i == 0 ? 0 : 4 + 0.01 * i;
  twin_set(b, &s.k, x);
  twin_constant(b, &s.w, 1);
  free(x);
  find_lse(b, &s);
  run_cuda(b->cuda, &s);
  run_cpu(b->cpu, &s);
  assert_true(check_value(b, &s, 1e-4, 1e-6) > 4);
  check_gradients(b, &s, twin_bf16);
  twin_end(b);
}

static void logits_of_a_thousand(void **state) {
  twin_bench *b = twin_begin(state);
  for (int document = 0; document <= 64; document += 64) {
    shape c = {.heads = 4, .width = 64, .n_index = 4, .index_width = 64, .w_deviation = 1, .deviation = 16};
    scene s = make_scene(b, &c, twin_causal(b, 250, document, false));
    run_cuda(b->cuda, &s);
    run_cpu(b->cpu, &s);
    check_value(b, &s, 1e-3, 1e-6); /* FP32 logits of 1000 are off by 1e-4 themselves */
    check_gradients(b, &s, twin_bf16);
    twin_end(b);
  }
}

/* The student is the teacher but for a little: every attention head the same, one index head of weight 1 whose keys lie
 * so far up the first axis that its ReLU is never dead, and so I = q.k + a constant, nearly qa.ka. Others weigh little.
 */
static scene make_converged(twin_bench *b, twin_rows rows, int32_t heads, int32_t width, int32_t n_index,
                            int32_t index_width, double deviation, double noise) {
  int64_t n = rows.cpu.n_rows, m = rows.cpu.n_keys, d = index_width < width ? index_width : width;
  shape c = {.heads = heads,
             .width = width,
             .n_index = n_index,
             .index_width = index_width,
             .shared_keys = true,
             .w_deviation = 1e-3};
  scene s = make_scene(b, &c, rows);
  s.params.scale = s.params.attention_scale = 0.2;
  double *q = calloc((size_t)(n * n_index * index_width), 8), *k = calloc((size_t)(m * index_width), 8),
         *qa = calloc((size_t)(n * heads * width), 8), *ka = calloc((size_t)(m * width), 8),
         *w = calloc((size_t)(n * n_index), 8);
  for (int64_t i = 0; i < n * n_index * index_width; i++) q[i] = wn_test_get(&s.q.cpu, i);
  for (int64_t i = 0; i < n * n_index; i++) w[i] = i % n_index ? wn_test_get(&s.w.cpu, i) : 1;
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < d; j++) {
      double x = deviation * wn_rng_normal(21, WN_RNG_TEST, (uint64_t)(i * d + j));
      for (int64_t h = 0; h < heads; h++) qa[(i * heads + h) * width + j] = j ? x : 0;
      q[i * n_index * index_width + j] =
          j ? x + deviation * noise * wn_rng_normal(22, WN_RNG_TEST, (uint64_t)(i * d + j)) : 8;
    }
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < d; j++) {
      double x = rint(16 * deviation * wn_rng_normal(23, WN_RNG_TEST, (uint64_t)(i * d + j))) / 16; /* exact q.k */
      ka[i * width + j] = j ? x : 0;
      k[i * index_width + j] = j ? x : 4;
    }
  twin_set(b, &s.q, q);
  twin_set(b, &s.k, k);
  twin_set(b, &s.qa, qa);
  twin_set(b, &s.ka, ka);
  twin_set(b, &s.w, w);
  free(q);
  free(k);
  free(qa);
  free(ka);
  free(w);
  find_lse(b, &s);
  return s;
}

/* Mean over rows of KL(p || uniform), all heads being equal to the first. */
static double uniform_kl(const scene *s) {
  double total = 0;
  const wn_tensor *qa = &s->qa.cpu, *ka = &s->ka.cpu;
  for (int64_t i = 0; i < s->rows.cpu.n_rows; i++) {
    int32_t first = s->rows.cpu.first_key[i], last = s->rows.cpu.last_key[i];
    for (int64_t j = first; j <= last; j++) {
      double z = 0;
      const double *x = (const double *)qa->data + i * qa->stride[0], *y = (const double *)ka->data + j * ka->stride[0];
      for (int64_t e = 0; e < qa->dim[2]; e++) z += x[e] * y[e];
      double log_p = z * s->params.attention_scale - wn_test_get(&s->lse.cpu, i * qa->dim[1]);
      total += exp(log_p) * (log_p + log((double)(last - first + 1)));
    }
  }
  return total / (double)s->rows.cpu.n_rows;
}

static void check_converged(twin_bench *b, scene *s, double bar) {
  run_cuda(b->cuda, s);
  run_cpu(b->cpu, s);
  double mean = check_value(b, s, 1e-4, 2e-7), uniform = uniform_kl(s);
  print_message("  mean kl %.3e, uniform %.3e\n", mean, uniform);
  assert_true(mean < 0.05 * uniform);
  check_gradients(b, s, bar);
}

static void near_convergence(void **state) {
  twin_bench *b = twin_begin(state);
  scene s = make_converged(b, twin_causal(b, 200, 90, false), 1, 24, 1, 24, 1, 0.02);
  check_converged(b, &s, twin_bf16);
  twin_end(b);
  s = make_converged(b, twin_causal(b, 300, 0, false), 4, 40, 3, 32, 1, 0.05);
  check_converged(b, &s, twin_bf16);
  twin_end(b);
}

/* Rows spread over T keys, so that the CPU can follow. */
static twin_rows sampled_rows(twin_bench *b, int32_t n, int32_t t) {
  return windows(b, n, t, (t - 1) / (n - 1), t);
}

static void v31_width_at_8192_keys(void **state) {
  twin_bench *b = twin_begin(state);
  shape c = {.heads = 128, .width = 192, .n_index = 64, .index_width = 128, .w_deviation = 0.125};
  scene s = make_scene(b, &c, sampled_rows(b, 64, 8192));
  run_cuda(b->cuda, &s);
  run_cpu(b->cpu, &s);
  check_value(b, &s, 1e-4, 1e-6);
  check_gradients(b, &s, 2e-2);
  twin_end(b);
}

static void v31_width_near_convergence(void **state) {
  twin_bench *b = twin_begin(state);
  scene s = make_converged(b, sampled_rows(b, 40, 8192), 128, 192, 64, 128, 0.7, 0.05);
  check_converged(b, &s, 2e-2);
  twin_end(b);
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  shape c = {.heads = 8, .width = 192, .n_index = 64, .index_width = 128, .w_deviation = 0.125};
  scene s = make_scene(b, &c, twin_causal(b, 520, 300, true));
  const twin_out outs[] = {{&s.kl, false}, {&s.dq, false}, {&s.dk, true}, {&s.dw, false}};
  twin_repeats(b, run_cuda, &s, outs, 4);
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(agrees_on_odd_shapes),
      cmocka_unit_test(agrees_on_many_heads_and_wide_ones),
      cmocka_unit_test(agrees_on_a_longer_sequence),
      cmocka_unit_test(chunks_of_rows_add_up),
      cmocka_unit_test(few_keys_of_many),
      cmocka_unit_test(empty_rows_give_nothing),
      cmocka_unit_test(the_value_alone_is_the_same_value),
      cmocka_unit_test(key_gradients_accumulate),
      cmocka_unit_test(a_nan_stays_in_the_values_that_see_it),
      cmocka_unit_test(a_flat_student),
      cmocka_unit_test(mass_that_the_student_does_not_pick_counts),
      cmocka_unit_test(logits_of_a_thousand),
      cmocka_unit_test(near_convergence),
      cmocka_unit_test(v31_width_at_8192_keys),
      cmocka_unit_test(v31_width_near_convergence),
      cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
