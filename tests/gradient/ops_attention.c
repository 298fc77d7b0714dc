/* Gradients of the attention forms and of both KLs against central differences in FP64: each tensor is moved
 * along random directions, and the change of the loss must be the gradient's product with the direction. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "support/test.h"

#include "kernels/cpu/cpu.h"
#include "support/plain_attention.h"

enum { DIRECTIONS = 4 };
static const double limit = 1e-6, step = 1e-5;

typedef double (*loss_of)(void *context);

/* `x` is moved in place, and put back. */
static void check_gradient(const char *what, wn_tensor *x, const wn_tensor *gradient, loss_of loss, void *context) {
  int64_t n = wn_tensor_count(x);
  double *kept = malloc((size_t)n * sizeof *kept);
  for (int64_t i = 0; i < n; i++) kept[i] = wn_test_get(x, i);
  double worst = 0;
  for (uint64_t direction = 0; direction < DIRECTIONS; direction++) {
    double at[2], product = 0, size = 0;
    for (int side = 0; side < 2; side++) {
      for (int64_t i = 0; i < n; i++)
        wn_test_set(x, i, kept[i] + (side ? step : -step) * wn_rng_normal(900 + direction, WN_RNG_TEST, (uint64_t)i));
      at[side] = loss(context);
    }
    for (int64_t i = 0; i < n; i++) {
      double g = wn_test_get(gradient, i), u = wn_rng_normal(900 + direction, WN_RNG_TEST, (uint64_t)i);
      product += g * u;
      size += g * g;
    }
    /* a direction may happen to be level: the error is then measured against the gradient's length */
    double slope = (at[1] - at[0]) / (2 * step), scale = fmax(fabs(product), 0.1 * sqrt(size));
    assert_true(size > 0);
    double error = fabs(slope - product) / scale;
    if (!(error <= limit)) fail_msg("%s: relative error %g, allowed %g", what, error, limit);
    worst = fmax(worst, error);
  }
  for (int64_t i = 0; i < n; i++) wn_test_set(x, i, kept[i]);
  free(kept);
  print_message("%-24s %.1e\n", what, worst);
}

static double sum_of_products(const wn_tensor *a, const wn_tensor *b) {
  double sum = 0;
  for (int64_t i = 0; i < wn_tensor_count(a); i++) sum += wn_test_get(a, i) * wn_test_get(b, i);
  return sum;
}

enum { N = 75, M = 140, H = 3, DQ = 12, DV = 7, K = 20, HI = 4, DI = 10 };

typedef enum form { DENSE, SPARSE, MASKED } form;

typedef struct attention {
  wn_device *device;
  form form;
  wn_rows rows;
  wn_attention_params params;
  wn_tensor q, k, v, d_o, selection, o, lse, delta;
} attention;

static wn_tensor zeros(const wn_device *device, wn_role role, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  return plain_input(device, role, 1, 0, rank, d0, d1, d2);
}

/* The first, the last and evenly spread keys of what each row sees. */
static wn_tensor spread_selection(const wn_device *device, const wn_rows *rows, int64_t k) {
  wn_tensor s;
  OK(wn_device_tensor(device, &s, device->weights, "selection", WN_INDEX, 2, rows->n_rows, k, 0, 0));
  for (int64_t i = 0; i < rows->n_rows; i++) {
    int64_t visible = rows->last_key[i] - rows->first_key[i] + 1, n = 0, picks = visible < k ? visible : k - i % 3;
    for (; n < picks; n++) wn_test_set(&s, i * k + n, (double)(rows->first_key[i] + n * visible / picks));
    for (; n < k; n++) wn_test_set(&s, i * k + n, -1);
  }
  return s;
}

static double attention_loss(void *context) {
  attention *a = context;
  const wn_ops *ops = a->device->ops;
  if (a->form == DENSE)
    OK(ops->attention_dense(a->device, &a->o, &a->lse, &a->delta, &a->d_o, &a->q, &a->k, &a->v, &a->rows, &a->params));
  else if (a->form == SPARSE)
    OK(ops->attention_sparse(a->device, &a->o, &a->lse, &a->delta, &a->d_o, &a->q, &a->k, &a->selection, &a->rows,
                             &a->params));
  else
    OK(ops->attention_masked(a->device, &a->o, &a->lse, &a->delta, &a->d_o, &a->q, &a->k, &a->v, &a->selection,
                             &a->rows, &a->params));
  return sum_of_products(&a->o, &a->d_o);
}

static void check_attention(form which, plain_rows_kind kind) {
  attention a = {.form = which, .params = {.scale = 0.5, .v_width = DV}};
  OK(wn_cpu_create_f64(&a.device, (wn_cpu_settings){.threads = 2}));
  wn_device *d = a.device;
  bool sparse = which == SPARSE;
  a.rows = plain_rows(d->weights, N, M, kind);
  a.q = plain_input(d, WN_ACT, 1, 1, 3, N, H, DQ);
  a.k = sparse ? plain_input(d, WN_ACT, 2, 1, 2, M, DQ, 0) : plain_input(d, WN_ACT, 2, 1, 3, M, H, DQ);
  a.v = plain_input(d, WN_ACT, 3, 1, 3, M, H, DV);
  a.d_o = plain_input(d, WN_ACT, 4, 1, 3, N, H, DV);
  a.selection = spread_selection(d, &a.rows, K);
  a.o = zeros(d, WN_ACT, 3, N, H, DV);
  a.lse = zeros(d, WN_STAT, 2, N, H, 0);
  a.delta = zeros(d, WN_STAT, 2, N, H, 0);
  wn_tensor dq = zeros(d, WN_ACT, 3, N, H, DQ), dv = zeros(d, WN_ACT, 3, M, H, DV);
  wn_tensor dk = sparse ? zeros(d, WN_ACT, 2, M, DQ, 0) : zeros(d, WN_ACT, 3, M, H, DQ);
  (void)attention_loss(&a);
  if (which == DENSE)
    OK(d->ops->attention_dense_backward(d, &dq, &dk, &dv, &a.d_o, &a.q, &a.k, &a.v, &a.lse, &a.delta, &a.rows,
                                        &a.params));
  else if (sparse)
    OK(d->ops->attention_sparse_backward(d, &dq, &dk, NULL, &a.d_o, &a.q, &a.k, &a.selection, &a.lse, &a.delta, &a.rows,
                                         &a.params));
  else
    OK(d->ops->attention_masked_backward(d, &dq, &dk, &dv, NULL, &a.d_o, &a.q, &a.k, &a.v, &a.selection, &a.lse,
                                         &a.delta, &a.rows, &a.params));
  check_gradient("dq", &a.q, &dq, attention_loss, &a);
  check_gradient(sparse ? "dkv" : "dk", &a.k, &dk, attention_loss, &a);
  if (!sparse) check_gradient("dv", &a.v, &dv, attention_loss, &a);
  wn_cpu_free_f64(d);
}

static void dense(void **state) {
  (void)state;
  check_attention(DENSE, PLAIN_CAUSAL);
  check_attention(DENSE, PLAIN_DOCUMENTS);
  check_attention(DENSE, PLAIN_HOLES);
}
static void sparse(void **state) {
  (void)state;
  check_attention(SPARSE, PLAIN_CAUSAL);
  check_attention(SPARSE, PLAIN_HOLES);
}
static void masked(void **state) {
  (void)state;
  check_attention(MASKED, PLAIN_CAUSAL);
  check_attention(MASKED, PLAIN_HOLES);
}

/* ---- the KLs ---- */

typedef struct divergence {
  wn_device *device;
  bool sparse;
  wn_rows rows;
  wn_indexer_params params;
  wn_tensor q, k, w, qa, ka, lse, selection, p, kl;
} divergence;

static double divergence_loss(void *context) {
  divergence *c = context;
  const wn_ops *ops = c->device->ops;
  if (c->sparse)
    OK(ops->indexer_kl_sparse(c->device, &c->kl, NULL, NULL, NULL, &c->q, &c->k, &c->w, &c->selection, &c->p, &c->rows,
                              &c->params));
  else
    OK(ops->indexer_kl_dense(c->device, &c->kl, NULL, NULL, NULL, &c->q, &c->k, &c->w, &c->qa, &c->ka, &c->lse,
                             &c->rows, &c->params));
  double sum = 0;
  for (int64_t i = 0; i < wn_tensor_count(&c->kl); i++) sum += wn_test_get(&c->kl, i);
  return c->params.coeff * sum;
}

/* The indexer becomes the teacher but for noise: head h's query is attention head 0's, and the first column
 * lifts every product above 0, so that I = sum_h w_h (q.k + constant), with the weights summing to 1. */
static void approach_teacher(divergence *c, double noise) {
  for (int64_t i = 0; i < N * HI * DI; i++) {
    int64_t column = i % DI, row = i / (HI * DI);
    double own = noise * wn_rng_normal(31, WN_RNG_TEST, (uint64_t)i);
    wn_test_set(&c->q, i, column ? wn_test_get(&c->qa, row * H * DQ + column) + own : 8);
  }
  for (int64_t i = 0; i < M * DI; i++)
    wn_test_set(&c->k, i, i % DI ? wn_test_get(&c->ka, i / DI * H * DQ + i % DI) : 8);
  for (int64_t i = 0; i < N * HI; i++) wn_test_set(&c->w, i, 1.0 / HI);
  for (int64_t i = 0; i < N * H * DQ; i++) { /* all attention heads alike, and no longer than the indexer's */
    int64_t column = i % DQ;
    wn_test_set(&c->qa, i, column && column < DI ? wn_test_get(&c->qa, i / (H * DQ) * H * DQ + column) : 0);
  }
  for (int64_t i = 0; i < M * H * DQ; i++) wn_test_set(&c->ka, i, wn_test_get(&c->ka, i / (H * DQ) * H * DQ + i % DQ));
  c->params.scale = c->params.attention_scale;
}

/* mean kl over mean kl of the uniform student, which is log(count) - entropy */
static double share_of_uniform(const divergence *c, const wn_tensor *p, const uint8_t *seen) {
  double kl = 0, uniform = 0;
  for (int64_t i = 0; i < N; i++) {
    double count = 0, row = 0;
    for (int64_t j = 0; j < M; j++) count += seen[i * M + j];
    for (int64_t j = 0; j < M; j++) {
      double x = wn_test_get(p, i * M + j);
      if (x > 0) row += x * log(x * count);
    }
    uniform += row;
    kl += wn_test_get(&c->kl, i);
  }
  return kl / uniform;
}

static void check_divergence(bool is_sparse, bool near, plain_rows_kind kind) {
  divergence c = {.sparse = is_sparse, .params = {.scale = 0.4, .attention_scale = 0.3, .coeff = 0.7}};
  OK(wn_cpu_create_f64(&c.device, (wn_cpu_settings){.threads = 2}));
  wn_device *d = c.device;
  c.rows = plain_rows(d->weights, N, M, kind);
  c.q = plain_input(d, WN_ACT, 1, 1, 3, N, HI, DI);
  c.k = plain_input(d, WN_ACT, 2, 1, 2, M, DI, 0);
  c.w = plain_input(d, WN_STAT, 3, 1, 2, N, HI, 0);
  c.qa = plain_input(d, WN_ACT, 4, 1, 3, N, H, DQ);
  c.ka = plain_input(d, WN_ACT, 5, 1, 3, M, H, DQ);
  if (near) approach_teacher(&c, 0.1);
  c.lse = zeros(d, WN_STAT, 2, N, H, 0);
  OK(wn_device_tensor(d, &c.kl, d->weights, "kl", WN_STAT, 1, N, 0, 0, 0));
  c.p = zeros(d, WN_STAT, 2, N, K, 0);
  c.selection = spread_selection(d, &c.rows, K);
  uint8_t *seen = plain_seen(d->weights, &c.rows, is_sparse ? &c.selection : NULL);
  plain_attention teacher = plain_attend(d->weights, &c.qa, &c.ka, &c.ka, &c.qa, seen, c.params.attention_scale);
  for (int64_t i = 0; i < N * H; i++) wn_test_set(&c.lse, i, wn_test_get(&teacher.lse, i));
  for (int64_t i = 0; i < N * K; i++) {
    int64_t key = (int64_t)wn_test_get(&c.selection, i);
    wn_test_set(&c.p, i, key < 0 ? 0 : wn_test_get(&teacher.p_mean, i / K * M + key));
  }
  wn_tensor dq = zeros(d, WN_ACT, 3, N, HI, DI), dk = zeros(d, WN_WGRAD, 2, M, DI, 0),
            dw = zeros(d, WN_STAT, 2, N, HI, 0);
  if (is_sparse)
    OK(d->ops->indexer_kl_sparse(d, &c.kl, &dq, &dk, &dw, &c.q, &c.k, &c.w, &c.selection, &c.p, &c.rows, &c.params));
  else
    OK(d->ops->indexer_kl_dense(d, &c.kl, &dq, &dk, &dw, &c.q, &c.k, &c.w, &c.qa, &c.ka, &c.lse, &c.rows, &c.params));
  double share = share_of_uniform(&c, &teacher.p_mean, seen);
  print_message("kl is %.2f %% of kl_uniform\n", 100 * share);
  assert_true(near == (share < 0.05));
  plain_kl plain =
      plain_indexer_kl(d->weights, &c.q, &c.k, &c.w, &teacher.p_mean, seen, c.params.scale, c.params.coeff);
  assert_true(wn_test_relative_norm(&dq, &plain.dq) < 1e-11);
  assert_true(wn_test_relative_norm(&dk, &plain.dk) < 1e-11);
  assert_true(wn_test_relative_norm(&dw, &plain.dw) < 1e-11);
  check_gradient("indexer dq", &c.q, &dq, divergence_loss, &c);
  check_gradient("indexer dk", &c.k, &dk, divergence_loss, &c);
  check_gradient("indexer dw", &c.w, &dw, divergence_loss, &c);
  wn_cpu_free_f64(d);
}

static void kl_dense(void **state) {
  (void)state;
  check_divergence(false, false, PLAIN_CAUSAL);
  check_divergence(false, false, PLAIN_DOCUMENTS);
  check_divergence(false, true, PLAIN_DOCUMENTS);
  check_divergence(false, true, PLAIN_CAUSAL);
}
static void kl_sparse(void **state) {
  (void)state;
  check_divergence(true, false, PLAIN_CAUSAL);
  check_divergence(true, true, PLAIN_DOCUMENTS);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(dense),    cmocka_unit_test(sparse),    cmocka_unit_test(masked),
      cmocka_unit_test(kl_dense), cmocka_unit_test(kl_sparse),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
