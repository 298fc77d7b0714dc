/* attention_dense, attention_sparse, attention_masked on the CPU against plain T x T FP64 forms. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "support/test.h"

#include "support/bench.h"
#include "support/plain_attention.h"

typedef struct shape {
  int32_t n, m, n_heads, dq, dv, k;
  plain_rows_kind rows;
  double logits; /* deviation of a logit */
} shape;

static const shape shapes[] = {
    {1, 1, 1, 1, 1, 1, PLAIN_CAUSAL, 1},          {7, 7, 3, 5, 3, 2, PLAIN_CAUSAL, 1},
    {64, 64, 2, 16, 8, 16, PLAIN_CAUSAL, 1},      {131, 131, 2, 24, 16, 17, PLAIN_CAUSAL, 2},
    {129, 129, 4, 16, 13, 8, PLAIN_DOCUMENTS, 1}, {70, 301, 3, 17, 11, 33, PLAIN_CAUSAL, 3},
    {67, 263, 2, 9, 7, 16, PLAIN_DOCUMENTS, 1},   {97, 101, 2, 8, 6, 5, PLAIN_HOLES, 1},
    {33, 33, 2, 8, 6, 4, PLAIN_ONE_KEY, 1},       {1, 200, 2, 12, 8, 32, PLAIN_CAUSAL, 1},
    {65, 65, 1, 8, 4, 64, PLAIN_CAUSAL, 1000},    {150, 150, 2, 12, 8, 9, PLAIN_DOCUMENTS, 1000},
};

/* FP32 logits of size L are off by about L eps, and the probabilities by as much. */
static double tolerance_at(const bench *b, double logits) {
  return b->tolerance * (logits > 30 ? logits / 6 : 1);
}

static wn_tensor output(const bench *b, wn_role role, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  wn_tensor t;
  OK(wn_device_tensor(b->device, &t, b->device->weights, "output", role, rank, d0, d1, d2, 0));
  if (role != WN_INDEX) wn_test_fill(&t, 99, 50, 0); /* whatever it held */
  return t;
}

static void set_all(wn_tensor *t, double value) {
  for (int64_t i = 0; i < wn_tensor_count(t); i++) wn_test_set(t, i, value);
}

/* A row's picks: a random subset of what it sees, at most k, of a size that differs from row to row; row 3 of
 * every 11 picks nothing. All rows like key `low` of theirs, so that picks coincide across rows. */
static wn_tensor random_selection(const bench *b, const wn_rows *rows, int64_t k, uint64_t seed) {
  wn_tensor s = output(b, WN_INDEX, 2, rows->n_rows, k, 0);
  for (int64_t i = 0; i < rows->n_rows; i++) {
    int64_t visible = rows->last_key[i] - rows->first_key[i] + 1, n = 0;
    if (visible < 0) visible = 0;
    int64_t want = i % 11 == 3 ? 0 : i % 3 ? k : (k + 1) / 2;
    if (want > visible) want = visible;
    for (int64_t j = 0; j < visible && n < want; j++) {
      bool must = visible - j == want - n || j == 0;
      if (must || wn_rng_below(seed, WN_RNG_TEST, (uint64_t)(i * 1000 + j), (uint64_t)visible) < (uint64_t)want)
        wn_test_set(&s, i * k + n++, rows->first_key[i] + (double)j);
    }
    for (; n < k; n++) wn_test_set(&s, i * k + n, -1);
  }
  return s;
}

/* o and delta as attention_delta makes them, from the same o before rounding: every bit. */
static void check_delta(const bench *b, const wn_tensor *o, const wn_tensor *delta, const wn_tensor *d_o) {
  wn_tensor own_o = plain_input(b->device, WN_ACT, 9, 9, 3, o->dim[0], o->dim[1], o->dim[2]);
  wn_tensor own_delta = output(b, WN_STAT, 2, o->dim[0], o->dim[1], 0);
  OK(b->device->ops->attention_delta(b->device, &own_delta, &own_o, o, d_o));
  for (int64_t i = 0; i < wn_tensor_count(o); i++)
    if (wn_test_get(&own_o, i) != wn_test_get(o, i)) fail_msg("o differs at %lld", (long long)i);
  for (int64_t i = 0; i < wn_tensor_count(delta); i++)
    if (wn_test_get(&own_delta, i) != wn_test_get(delta, i)) fail_msg("delta differs at %lld", (long long)i);
}

static void check_dense(const bench *b, const shape *c) {
  wn_arena *arena = b->device->weights;
  const wn_ops *ops = b->device->ops;
  wn_rows rows = plain_rows(arena, c->n, c->m, c->rows);
  double deviation = sqrt(c->logits), scale = 1 / sqrt(c->dq);
  wn_tensor q = plain_input(b->device, WN_ACT, 1, deviation, 3, c->n, c->n_heads, c->dq);
  wn_tensor k = plain_input(b->device, WN_ACT, 2, deviation, 3, c->m, c->n_heads, c->dq);
  wn_tensor v = plain_input(b->device, WN_ACT, 3, 1, 3, c->m, c->n_heads, c->dv);
  wn_tensor d_o = plain_input(b->device, WN_ACT, 4, 1, 3, c->n, c->n_heads, c->dv);
  plain_attention want = plain_attend(arena, &q, &k, &v, &d_o, plain_seen(arena, &rows, NULL), scale);
  wn_tensor o = plain_input(b->device, WN_ACT, 5, 9, 3, c->n, c->n_heads, c->dv);
  wn_tensor lse = output(b, WN_STAT, 2, c->n, c->n_heads, 0), delta = output(b, WN_STAT, 2, c->n, c->n_heads, 0);
  wn_attention_params params = {.scale = scale};
  double tolerance = tolerance_at(b, c->logits);
  OK(ops->attention_dense(b->device, &o, &lse, NULL, NULL, &q, &k, &v, &rows, &params));
  wn_test_close("o without d_o", &o, &want.o, tolerance, tolerance);
  OK(ops->attention_dense(b->device, &o, &lse, &delta, &d_o, &q, &k, &v, &rows, &params));
  wn_test_close("o", &o, &want.o, tolerance, tolerance);
  wn_test_close("lse", &lse, &want.lse, b->tolerance, b->tolerance);
  wn_test_close("delta", &delta, &want.delta, 4 * tolerance, tolerance);
  check_delta(b, &o, &delta, &d_o);
  wn_tensor dq = plain_input(b->device, WN_ACT, 6, 9, 3, c->n, c->n_heads, c->dq);
  wn_tensor dk = plain_input(b->device, WN_ACT, 7, 0, 3, c->m, c->n_heads, c->dq);
  wn_tensor dv = plain_input(b->device, WN_ACT, 8, 0, 3, c->m, c->n_heads, c->dv);
  /* in two row ranges: dk and dv add up */
  for (int32_t from = 0, half = c->n / 2; from < c->n; from += half ? half : c->n, half = c->n) {
    int32_t end = half && from == 0 && c->n > 1 ? c->n / 2 : c->n;
    wn_rows part = {.n_rows = end - from,
                    .n_keys = c->m,
                    .first_key = rows.first_key + from,
                    .last_key = rows.last_key + from,
                    .position = rows.position + from};
    wn_tensor part_dq = wn_tensor_slice(dq, 0, from, end - from), part_do = wn_tensor_slice(d_o, 0, from, end - from),
              part_q = wn_tensor_slice(q, 0, from, end - from), part_lse = wn_tensor_slice(lse, 0, from, end - from),
              part_delta = wn_tensor_slice(delta, 0, from, end - from);
    OK(ops->attention_dense_backward(b->device, &part_dq, &dk, &dv, &part_do, &part_q, &k, &v, &part_lse, &part_delta,
                                     &part, &params));
    if (end == c->n) break;
  }
  double size = deviation * 8 * tolerance;
  wn_test_close("dq", &dq, &want.dq, size, tolerance);
  wn_test_close("dk", &dk, &want.dk, size, tolerance);
  wn_test_close("dv", &dv, &want.dv, 8 * tolerance, tolerance);
}

/* p[n,k] at the picks of a [n,m] matrix, 0 at -1 */
static wn_tensor at_picks(wn_arena *arena, const wn_tensor *full, const wn_tensor *selection) {
  int64_t n = selection->dim[0], k = selection->dim[1];
  wn_tensor p = plain_zeros(arena, 2, n, k, 0);
  for (int64_t i = 0; i < n * k; i++) {
    int64_t key = (int64_t)wn_test_get(selection, i);
    if (key >= 0) wn_test_set(&p, i, wn_test_get(full, i / k * full->dim[1] + key));
  }
  return p;
}

/* Keys that nobody picked hold NaN: they are never read. */
static void poison_unpicked(wn_tensor *keys, const wn_tensor *selection) {
  int64_t m = keys->dim[0], width = wn_tensor_count(keys) / m, n = wn_tensor_count(selection);
  for (int64_t s = 0; s < m; s++) {
    bool picked = false;
    for (int64_t i = 0; i < n; i++) picked |= (int64_t)wn_test_get(selection, i) == s;
    for (int64_t c = 0; !picked && c < width; c++) wn_test_set(keys, s * width + c, NAN);
  }
}

static void check_masked(const bench *b, const shape *c) {
  wn_arena *arena = b->device->weights;
  const wn_ops *ops = b->device->ops;
  wn_rows rows = plain_rows(arena, c->n, c->m, c->rows);
  double deviation = sqrt(c->logits), scale = 1 / sqrt(c->dq), tolerance = tolerance_at(b, c->logits);
  wn_tensor selection = random_selection(b, &rows, c->k, 5);
  wn_tensor q = plain_input(b->device, WN_ACT, 1, deviation, 3, c->n, c->n_heads, c->dq);
  wn_tensor k = plain_input(b->device, WN_ACT, 2, deviation, 3, c->m, c->n_heads, c->dq);
  wn_tensor v = plain_input(b->device, WN_ACT, 3, 1, 3, c->m, c->n_heads, c->dv);
  wn_tensor d_o = plain_input(b->device, WN_ACT, 4, 1, 3, c->n, c->n_heads, c->dv);
  plain_attention want = plain_attend(arena, &q, &k, &v, &d_o, plain_seen(arena, &rows, &selection), scale);
  poison_unpicked(&k, &selection);
  poison_unpicked(&v, &selection);
  wn_tensor o = plain_input(b->device, WN_ACT, 5, 9, 3, c->n, c->n_heads, c->dv);
  wn_tensor lse = output(b, WN_STAT, 2, c->n, c->n_heads, 0), delta = output(b, WN_STAT, 2, c->n, c->n_heads, 0);
  wn_attention_params params = {.scale = scale};
  OK(ops->attention_masked(b->device, &o, &lse, &delta, &d_o, &q, &k, &v, &selection, &rows, &params));
  wn_test_close("o", &o, &want.o, tolerance, tolerance);
  wn_test_close("lse", &lse, &want.lse, b->tolerance, b->tolerance);
  wn_test_close("delta", &delta, &want.delta, 4 * tolerance, tolerance);
  wn_tensor dq = plain_input(b->device, WN_ACT, 6, 9, 3, c->n, c->n_heads, c->dq);
  wn_tensor dk = plain_input(b->device, WN_ACT, 7, 0, 3, c->m, c->n_heads, c->dq);
  wn_tensor dv = plain_input(b->device, WN_ACT, 8, 0, 3, c->m, c->n_heads, c->dv);
  wn_tensor p = plain_input(b->device, WN_STAT, 9, 9, 2, c->n, c->k, 0),
            p_want = at_picks(arena, &want.p_mean, &selection);
  OK(ops->attention_masked_backward(b->device, &dq, &dk, &dv, &p, &d_o, &q, &k, &v, &selection, &lse, &delta, &rows,
                                    &params));
  double size = deviation * 8 * tolerance;
  wn_test_close("dq", &dq, &want.dq, size, tolerance);
  wn_test_close("dk", &dk, &want.dk, size, tolerance);
  wn_test_close("dv", &dv, &want.dv, 8 * tolerance, tolerance);
  wn_test_close("p", &p, &p_want, tolerance, tolerance);
  set_all(&p, 7);
  OK(ops->attention_masked_backward(b->device, NULL, NULL, NULL, &p, NULL, &q, &k, &v, &selection, &lse, NULL, &rows,
                                    &params));
  wn_test_close("p alone", &p, &p_want, tolerance, tolerance);
}

static void check_sparse(const bench *b, const shape *c) {
  wn_arena *arena = b->device->weights;
  const wn_ops *ops = b->device->ops;
  wn_rows rows = plain_rows(arena, c->n, c->m, c->rows);
  double deviation = sqrt(c->logits), scale = 1 / sqrt(c->dq), tolerance = tolerance_at(b, c->logits);
  int32_t v_width = c->dq > c->dv ? c->dv : c->dq;
  wn_tensor selection = random_selection(b, &rows, c->k, 6);
  wn_tensor q = plain_input(b->device, WN_ACT, 1, deviation, 3, c->n, c->n_heads, c->dq);
  wn_tensor kv = plain_input(b->device, WN_ACT, 2, deviation, 2, c->m, c->dq, 0);
  wn_tensor d_o = plain_input(b->device, WN_ACT, 4, 1, 3, c->n, c->n_heads, v_width);
  wn_tensor k3 = wn_tensor_split_last(kv, 1, c->dq), v3 = wn_tensor_slice(k3, 2, 0, v_width);
  plain_attention want = plain_attend(arena, &q, &k3, &v3, &d_o, plain_seen(arena, &rows, &selection), scale);
  wn_tensor dkv_want = plain_zeros(arena, 2, c->m, c->dq, 0);
  for (int64_t i = 0; i < c->m * c->dq; i++) {
    int64_t s = i / c->dq, column = i % c->dq;
    double value = wn_test_get(&want.dk, i) + (column < v_width ? wn_test_get(&want.dv, s * v_width + column) : 0);
    wn_test_set(&dkv_want, i, value);
  }
  poison_unpicked(&kv, &selection);
  wn_tensor o = plain_input(b->device, WN_ACT, 5, 9, 3, c->n, c->n_heads, v_width);
  wn_tensor lse = output(b, WN_STAT, 2, c->n, c->n_heads, 0), delta = output(b, WN_STAT, 2, c->n, c->n_heads, 0);
  wn_attention_params params = {.scale = scale, .v_width = v_width};
  double size = deviation * 8 * tolerance;
  OK(ops->attention_sparse(b->device, &o, &lse, &delta, &d_o, &q, &kv, &selection, &rows, &params));
  wn_test_close("o", &o, &want.o, deviation * tolerance, tolerance);
  wn_test_close("lse", &lse, &want.lse, b->tolerance, b->tolerance);
  wn_test_close("delta", &delta, &want.delta, size, tolerance);
  wn_tensor dq = plain_input(b->device, WN_ACT, 6, 9, 3, c->n, c->n_heads, c->dq);
  wn_tensor dkv = plain_input(b->device, WN_ACT, 7, 0, 2, c->m, c->dq, 0);
  wn_tensor p = plain_input(b->device, WN_STAT, 9, 9, 2, c->n, c->k, 0),
            p_want = at_picks(arena, &want.p_mean, &selection);
  OK(ops->attention_sparse_backward(b->device, &dq, &dkv, &p, &d_o, &q, &kv, &selection, &lse, &delta, &rows, &params));
  wn_test_close("dq", &dq, &want.dq, deviation * size, tolerance);
  wn_test_close("dkv", &dkv, &dkv_want, deviation * size, tolerance);
  wn_test_close("p", &p, &p_want, tolerance, tolerance);
  set_all(&p, 7);
  OK(ops->attention_sparse_backward(b->device, NULL, NULL, &p, NULL, &q, &kv, &selection, &lse, NULL, &rows, &params));
  wn_test_close("p alone", &p, &p_want, tolerance, tolerance);
}

static void all_shapes(void (*check)(const bench *, const shape *)) {
  for (int wide = 0; wide < 2; wide++)
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
      bench b = make_bench(wide, 2);
      print_message("%s n %d m %d heads %d\n", wide ? "F64" : "F32", shapes[i].n, shapes[i].m, shapes[i].n_heads);
      check(&b, &shapes[i]);
      free_bench(&b);
    }
}

static void dense_matches_plain(void **state) {
  (void)state;
  all_shapes(check_dense);
}
static void masked_matches_plain(void **state) {
  (void)state;
  all_shapes(check_masked);
}
static void sparse_matches_plain(void **state) {
  (void)state;
  all_shapes(check_sparse);
}

/* Every row picks every key it sees: then the masked form is the dense one. */
static void a_full_selection_is_dense(void **state) {
  (void)state;
  bench b = make_bench(false, 2);
  enum { N = 100, H = 2, DQ = 12, DV = 8 };
  wn_rows rows = plain_rows(b.device->weights, N, N, PLAIN_DOCUMENTS);
  wn_tensor selection = output(&b, WN_INDEX, 2, N, N, 0);
  for (int32_t i = 0; i < N; i++)
    for (int32_t j = 0; j < N; j++) {
      int32_t key = rows.first_key[i] + j;
      wn_test_set(&selection, i * N + j, key <= rows.last_key[i] ? key : -1);
    }
  wn_tensor q = plain_input(b.device, WN_ACT, 1, 1, 3, N, H, DQ), k = plain_input(b.device, WN_ACT, 2, 1, 3, N, H, DQ),
            v = plain_input(b.device, WN_ACT, 3, 1, 3, N, H, DV);
  wn_tensor o[2], lse[2];
  wn_attention_params params = {.scale = 0.3};
  for (int i = 0; i < 2; i++) {
    o[i] = output(&b, WN_ACT, 3, N, H, DV);
    lse[i] = output(&b, WN_STAT, 2, N, H, 0);
  }
  OK(b.device->ops->attention_dense(b.device, &o[0], &lse[0], NULL, NULL, &q, &k, &v, &rows, &params));
  OK(b.device->ops->attention_masked(b.device, &o[1], &lse[1], NULL, NULL, &q, &k, &v, &selection, &rows, &params));
  wn_test_close("o", &o[1], &o[0], 1e-6, 1e-5);
  wn_test_close("lse", &lse[1], &lse[0], 1e-6, 1e-6);
  free_bench(&b);
}

/* q' = q_nope W_UK, o = o' W_UV^T: the absorbed form and the per-head form are one thing. */
static void masked_and_sparse_agree(void **state) {
  (void)state;
  enum { N = 90, H = 3, NOPE = 10, ROPE = 4, LATENT = 6, V = 5, K = 16 };
  bench b = make_bench(true, 2);
  wn_device *d = b.device;
  wn_rows rows = plain_rows(d->weights, N, N, PLAIN_DOCUMENTS);
  wn_tensor selection = random_selection(&b, &rows, K, 8);
  wn_tensor q = plain_input(d, WN_ACT, 1, 1, 3, N, H, NOPE + ROPE),
            kv = plain_input(d, WN_ACT, 2, 1, 2, N, LATENT + ROPE, 0);
  wn_tensor w_uk = plain_input(d, WN_ACT, 3, 0.5, 3, H, NOPE, LATENT),
            w_uv = plain_input(d, WN_ACT, 4, 0.5, 3, H, V, LATENT);
  wn_tensor absorbed = output(&b, WN_ACT, 3, N, H, LATENT + ROPE), k = output(&b, WN_ACT, 3, N, H, NOPE + ROPE),
            v = output(&b, WN_ACT, 3, N, H, V);
  for (int64_t i = 0; i < N; i++)
    for (int64_t h = 0; h < H; h++) {
      for (int64_t c = 0; c < LATENT + ROPE; c++) {
        double sum = 0;
        for (int64_t a = 0; a < NOPE && c < LATENT; a++)
          sum += wn_test_get(&q, (i * H + h) * (NOPE + ROPE) + a) * wn_test_get(&w_uk, (h * NOPE + a) * LATENT + c);
        if (c >= LATENT) sum = wn_test_get(&q, (i * H + h) * (NOPE + ROPE) + NOPE + c - LATENT);
        wn_test_set(&absorbed, (i * H + h) * (LATENT + ROPE) + c, sum);
      }
      for (int64_t a = 0; a < NOPE + ROPE + V; a++) {
        double sum = a >= NOPE && a < NOPE + ROPE ? wn_test_get(&kv, i * (LATENT + ROPE) + LATENT + a - NOPE) : 0;
        for (int64_t c = 0; c < LATENT; c++) {
          double latent = wn_test_get(&kv, i * (LATENT + ROPE) + c);
          if (a < NOPE) sum += latent * wn_test_get(&w_uk, (h * NOPE + a) * LATENT + c);
          if (a >= NOPE + ROPE) sum += latent * wn_test_get(&w_uv, (h * V + a - NOPE - ROPE) * LATENT + c);
        }
        if (a < NOPE + ROPE)
          wn_test_set(&k, (i * H + h) * (NOPE + ROPE) + a, sum);
        else
          wn_test_set(&v, (i * H + h) * V + a - NOPE - ROPE, sum);
      }
    }
  wn_tensor o = output(&b, WN_ACT, 3, N, H, V), o_latent = output(&b, WN_ACT, 3, N, H, LATENT),
            unabsorbed = output(&b, WN_ACT, 3, N, H, V);
  wn_tensor lse[2], p[2];
  for (int i = 0; i < 2; i++) {
    lse[i] = output(&b, WN_STAT, 2, N, H, 0);
    p[i] = output(&b, WN_STAT, 2, N, K, 0);
  }
  wn_attention_params params = {.scale = 0.4, .v_width = LATENT};
  OK(d->ops->attention_masked(d, &o, &lse[0], NULL, NULL, &q, &k, &v, &selection, &rows, &params));
  OK(d->ops->attention_sparse(d, &o_latent, &lse[1], NULL, NULL, &absorbed, &kv, &selection, &rows, &params));
  OK(d->ops->attention_masked_backward(d, NULL, NULL, NULL, &p[0], NULL, &q, &k, &v, &selection, &lse[0], NULL, &rows,
                                       &params));
  OK(d->ops->attention_sparse_backward(d, NULL, NULL, &p[1], NULL, &absorbed, &kv, &selection, &lse[1], NULL, &rows,
                                       &params));
  for (int64_t i = 0; i < N * H * V; i++) {
    double sum = 0;
    for (int64_t c = 0; c < LATENT; c++)
      sum += wn_test_get(&o_latent, i / V * LATENT + c) * wn_test_get(&w_uv, i % (H * V) * LATENT + c);
    wn_test_set(&unabsorbed, i, sum);
  }
  wn_test_close("o", &unabsorbed, &o, 1e-12, 1e-12);
  wn_test_close("lse", &lse[1], &lse[0], 1e-12, 1e-12);
  wn_test_close("p", &p[1], &p[0], 1e-13, 1e-12);
  free_bench(&b);
}

/* A block of rows that sees two far documents: the keys between them, and outside, are nobody's and hold NaN.
 */
static void strangers_are_not_read(void **state) {
  (void)state;
  enum { N = 40, M = 620, H = 2, DQ = 8, DV = 5 };
  bench b = make_bench(false, 2);
  wn_device *d = b.device;
  int32_t first[N], last[N], position[N];
  for (int32_t i = 0; i < N; i++) {
    first[i] = i % 2 ? 520 : 70;
    last[i] = i % 2 ? 560 : 110;
    position[i] = last[i];
  }
  wn_rows rows = {.n_rows = N, .n_keys = M, .first_key = first, .last_key = last, .position = position};
  wn_tensor q = plain_input(d, WN_ACT, 1, 1, 3, N, H, DQ), k = plain_input(d, WN_ACT, 2, 1, 3, M, H, DQ),
            v = plain_input(d, WN_ACT, 3, 1, 3, M, H, DV), d_o = plain_input(d, WN_ACT, 4, 1, 3, N, H, DV);
  plain_attention want = plain_attend(d->weights, &q, &k, &v, &d_o, plain_seen(d->weights, &rows, NULL), 0.4);
  for (int64_t key = 0; key < M; key++) {
    if (key >= 70 && key <= 560 && !(key >= 128 && key < 512)) continue;
    for (int64_t i = 0; i < H * DQ; i++) wn_test_set(&k, key * H * DQ + i, NAN);
    for (int64_t i = 0; i < H * DV; i++) wn_test_set(&v, key * H * DV + i, NAN);
  }
  wn_tensor o = output(&b, WN_ACT, 3, N, H, DV), lse = output(&b, WN_STAT, 2, N, H, 0),
            delta = output(&b, WN_STAT, 2, N, H, 0);
  wn_tensor dq = output(&b, WN_ACT, 3, N, H, DQ), dk = plain_input(d, WN_ACT, 7, 0, 3, M, H, DQ),
            dv = plain_input(d, WN_ACT, 8, 0, 3, M, H, DV);
  wn_attention_params params = {.scale = 0.4};
  OK(d->ops->attention_dense(d, &o, &lse, &delta, &d_o, &q, &k, &v, &rows, &params));
  OK(d->ops->attention_dense_backward(d, &dq, &dk, &dv, &d_o, &q, &k, &v, &lse, &delta, &rows, &params));
  wn_test_close("o", &o, &want.o, 1e-5, 1e-5);
  wn_test_close("dq", &dq, &want.dq, 1e-4, 1e-5);
  wn_test_close("dk", &dk, &want.dk, 1e-4, 1e-5);
  wn_test_close("dv", &dv, &want.dv, 1e-4, 1e-5);
  free_bench(&b);
}

/* ---- repeats and threads ---- */

enum { R_N = 200, R_M = 330, R_H = 3, R_DQ = 20, R_DV = 12, R_K = 24, R_OUTPUTS = 12 };

/* Everything the three operations give, one after the other. */
static void run_all(const bench *b, wn_tensor out[R_OUTPUTS]) {
  wn_device *d = b->device;
  wn_rows rows = plain_rows(d->weights, R_N, R_M, PLAIN_DOCUMENTS);
  wn_tensor selection = random_selection(b, &rows, R_K, 12);
  wn_tensor q = plain_input(d, WN_ACT, 1, 1, 3, R_N, R_H, R_DQ), k = plain_input(d, WN_ACT, 2, 1, 3, R_M, R_H, R_DQ),
            v = plain_input(d, WN_ACT, 3, 1, 3, R_M, R_H, R_DV), d_o = plain_input(d, WN_ACT, 4, 1, 3, R_N, R_H, R_DV),
            kv = plain_input(d, WN_ACT, 5, 1, 2, R_M, R_DQ, 0);
  wn_tensor lse = output(b, WN_STAT, 2, R_N, R_H, 0), delta = output(b, WN_STAT, 2, R_N, R_H, 0);
  wn_attention_params params = {.scale = 0.2, .v_width = R_DV};
  for (int i = 0; i < 3; i++) {
    wn_tensor *o = &out[4 * i], *dq = o + 1, *dk = o + 2, *dv = o + 3;
    *o = output(b, WN_ACT, 3, R_N, R_H, R_DV);
    *dq = output(b, WN_ACT, 3, R_N, R_H, R_DQ);
    *dk = i == 1 ? output(b, WN_ACT, 2, R_M, R_DQ, 0) : output(b, WN_ACT, 3, R_M, R_H, R_DQ);
    *dv = i == 1 ? output(b, WN_STAT, 2, R_N, R_K, 0) : output(b, WN_ACT, 3, R_M, R_H, R_DV);
    if (i == 0) {
      OK(d->ops->attention_dense(d, o, &lse, &delta, &d_o, &q, &k, &v, &rows, &params));
      OK(d->ops->attention_dense_backward(d, dq, dk, dv, &d_o, &q, &k, &v, &lse, &delta, &rows, &params));
    } else if (i == 1) {
      OK(d->ops->attention_sparse(d, o, &lse, &delta, &d_o, &q, &kv, &selection, &rows, &params));
      OK(d->ops->attention_sparse_backward(d, dq, dk, dv, &d_o, &q, &kv, &selection, &lse, &delta, &rows, &params));
    } else {
      OK(d->ops->attention_masked(d, o, &lse, &delta, &d_o, &q, &k, &v, &selection, &rows, &params));
      OK(d->ops->attention_masked_backward(d, dq, dk, dv, NULL, &d_o, &q, &k, &v, &selection, &lse, &delta, &rows,
                                           &params));
    }
  }
}

static void repeats_and_threads_agree_bit_for_bit(void **state) {
  (void)state;
  bench reference = make_bench(false, 1);
  wn_tensor want[R_OUTPUTS], got[R_OUTPUTS];
  run_all(&reference, want);
  for (int repeat = 0; repeat < 20; repeat++) {
    bench b = make_bench(false, 1 + repeat % 3);
    run_all(&b, got);
    for (int i = 0; i < R_OUTPUTS; i++)
      if (memcmp(got[i].data, want[i].data, (size_t)wn_tensor_bytes(&want[i])) != 0)
        fail_msg("output %d differs at repeat %d with %d threads", i, repeat, 1 + repeat % 3);
    free_bench(&b);
  }
  free_bench(&reference);
}

/* ---- memory ---- */

static double scratch_at(int32_t n, int which) {
  bench b = make_bench(false, 2);
  wn_device *d = b.device;
  enum { H = 2, DQ = 16, DV = 8, K = 16 };
  wn_rows rows = plain_rows(d->weights, n, n, PLAIN_CAUSAL);
  wn_tensor selection = random_selection(&b, &rows, K, 3);
  wn_tensor q = plain_input(d, WN_ACT, 1, 1, 3, n, H, DQ), k = plain_input(d, WN_ACT, 2, 1, 3, n, H, DQ),
            v = plain_input(d, WN_ACT, 3, 1, 3, n, H, DV), d_o = plain_input(d, WN_ACT, 4, 1, 3, n, H, DV),
            kv = plain_input(d, WN_ACT, 5, 1, 2, n, DQ, 0);
  wn_tensor o = output(&b, WN_ACT, 3, n, H, DV), lse = output(&b, WN_STAT, 2, n, H, 0),
            delta = output(&b, WN_STAT, 2, n, H, 0), dq = output(&b, WN_ACT, 3, n, H, DQ),
            dk = output(&b, WN_ACT, 3, n, H, DQ), dv = output(&b, WN_ACT, 3, n, H, DV),
            dkv = output(&b, WN_ACT, 2, n, DQ, 0), p = output(&b, WN_STAT, 2, n, K, 0);
  wn_attention_params params = {.scale = 0.2, .v_width = DV};
  if (which == 0) {
    OK(d->ops->attention_dense(d, &o, &lse, &delta, &d_o, &q, &k, &v, &rows, &params));
    OK(d->ops->attention_dense_backward(d, &dq, &dk, &dv, &d_o, &q, &k, &v, &lse, &delta, &rows, &params));
  } else if (which == 1) {
    OK(d->ops->attention_sparse(d, &o, &lse, &delta, &d_o, &q, &kv, &selection, &rows, &params));
    OK(d->ops->attention_sparse_backward(d, &dq, &dkv, &p, &d_o, &q, &kv, &selection, &lse, &delta, &rows, &params));
  } else {
    OK(d->ops->attention_masked(d, &o, &lse, &delta, &d_o, &q, &k, &v, &selection, &rows, &params));
    OK(d->ops->attention_masked_backward(d, &dq, &dk, &dv, &p, &d_o, &q, &k, &v, &selection, &lse, &delta, &rows,
                                         &params));
  }
  double peak = (double)wn_arena_peak_bytes(d->scratch);
  free_bench(&b);
  return peak;
}

static void scratch_grows_linearly(void **state) {
  (void)state;
  for (int which = 0; which < 3; which++) {
    double at[4];
    for (int i = 0; i < 4; i++) at[i] = scratch_at(256 << i, which);
    /* what a row adds is the same at 512, 1024 and 2048 rows */
    double slope = (at[1] - at[0]) / 256;
    print_message("scratch of form %d: %.0f bytes at 256 rows, %.1f bytes more a row\n", which, at[0], slope);
    for (int i = 1; i < 3; i++) assert_true(fabs((at[i + 1] - at[i]) / (256 << i) - slope) <= 0.02 * slope + 4);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(dense_matches_plain),
      cmocka_unit_test(sparse_matches_plain),
      cmocka_unit_test(masked_matches_plain),
      cmocka_unit_test(a_full_selection_is_dense),
      cmocka_unit_test(masked_and_sparse_agree),
      cmocka_unit_test(strangers_are_not_read),
      cmocka_unit_test(repeats_and_threads_agree_bit_for_bit),
      cmocka_unit_test(scratch_grows_linearly),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
