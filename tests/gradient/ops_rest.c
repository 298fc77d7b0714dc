/* Backwards of every operation but attention and indexer, in FP64, against directional central differences. Each test
 * takes the loss <y, probe> with a random probe, so that the probe is y's gradient, and checks every input in turn. */
#include "support/cpu.h"
#include "support/gradient.h"

/* One forward and the tensors it may hold; an operation uses what it needs. */
typedef struct scene {
  wn_device *d;
  wn_tensor x, w, b, y, stat, probe, dx, dw, db;
  wn_tensor index, bias, slot, xp, yp, scores, weight, load, balance, target;
  wn_tensor experts[3], d_experts[3];
  int64_t offset[4];
  wn_per_head_params heads;
  wn_norm_params norm;
  wn_rope_params rope;
  wn_router_params router;
  int32_t position[8];
} scene;

static wn_tensor normal(scene *s, uint64_t seed, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  return wn_test_random(s->d, WN_F64, seed, 1, 0, rank, d0, d1, d2);
}

static wn_tensor zeros(scene *s, const wn_tensor *like) {
  wn_tensor t = wn_test_tensor(s->d, WN_F64, like->rank, like->dim[0], like->dim[1], like->dim[2]);
  OK(s->d->ops->zero(s->d, &t));
  return t;
}

static void check(const char *name, wn_tensor *x, const wn_tensor *gradient, wn_test_loss loss, scene *s) {
  double error = wn_test_gradient(name, x, gradient, loss, s, wn_test_gradient_defaults());
  print_message("%-32s relative error %.1e\n", name, error);
}

static const wn_accumulate overwrite = {false};

static double linear_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->linear(s->d, &s->y, &s->x, &s->w, &overwrite));
  return wn_test_dot(&s->y, &s->probe);
}

static void test_linear(void **state) {
  scene s = {.d = *state};
  s.x = normal(&s, 1, 2, 13, 7, 0);
  s.w = normal(&s, 2, 2, 5, 7, 0);
  s.probe = normal(&s, 3, 2, 13, 5, 0);
  s.y = zeros(&s, &s.probe);
  s.dx = zeros(&s, &s.x);
  s.dw = zeros(&s, &s.w);
  OK(s.d->ops->linear_backward_input(s.d, &s.dx, &s.probe, &s.w, &overwrite));
  OK(s.d->ops->linear_backward_weight(s.d, &s.dw, &s.probe, &s.x));
  check("linear x", &s.x, &s.dx, linear_loss, &s);
  check("linear w", &s.w, &s.dw, linear_loss, &s);
}

static double per_head_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->per_head_linear(s->d, &s->y, &s->x, &s->w, &s->heads));
  return wn_test_dot(&s->y, &s->probe);
}

static void test_per_head(void **state) {
  for (int transpose = 0; transpose < 2; transpose++) {
    scene s = {.d = *state, .heads = {.transpose = transpose}};
    const wn_per_head_params back = {.transpose = !transpose};
    s.w = normal(&s, 2, 3, 3, 5, 4);
    s.x = normal(&s, 1, 3, 11, 3, transpose ? 4 : 5);
    s.probe = normal(&s, 3, 3, 11, 3, transpose ? 5 : 4);
    s.y = zeros(&s, &s.probe);
    s.dx = zeros(&s, &s.x);
    s.dw = zeros(&s, &s.w);
    OK(s.d->ops->per_head_linear(s.d, &s.dx, &s.probe, &s.w, &back));
    OK(s.d->ops->per_head_linear_backward_weight(s.d, &s.dw, transpose ? &s.probe : &s.x, transpose ? &s.x : &s.probe));
    check(transpose ? "per_head_linear^T x" : "per_head_linear x", &s.x, &s.dx, per_head_loss, &s);
    check(transpose ? "per_head_linear^T w" : "per_head_linear w", &s.w, &s.dw, per_head_loss, &s);
  }
}

static double rms_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->rms_norm(s->d, &s->y, &s->stat, &s->x, &s->w, &s->norm));
  return wn_test_dot(&s->y, &s->probe);
}

static double layer_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->layer_norm(s->d, &s->y, &s->stat, &s->x, &s->w, &s->b, &s->norm));
  return wn_test_dot(&s->y, &s->probe);
}

static void test_norms(void **state) {
  scene s = {.d = *state, .norm = {.eps = 0.02}};
  s.x = normal(&s, 1, 2, 131, 9, 0); /* several blocks of rows */
  s.w = normal(&s, 2, 1, 9, 0, 0);
  s.b = normal(&s, 3, 1, 9, 0, 0);
  s.probe = normal(&s, 4, 2, 131, 9, 0);
  s.y = zeros(&s, &s.probe);
  s.dx = zeros(&s, &s.x);
  s.dw = zeros(&s, &s.w);
  s.db = zeros(&s, &s.b);
  s.stat = wn_test_tensor(s.d, WN_F64, 1, 131, 0, 0);
  rms_loss(&s);
  OK(s.d->ops->rms_norm_backward(s.d, &s.dx, &s.dw, &s.probe, &s.x, &s.stat, &s.w, &s.norm));
  check("rms_norm x", &s.x, &s.dx, rms_loss, &s);
  check("rms_norm w", &s.w, &s.dw, rms_loss, &s);
  s.stat = wn_test_tensor(s.d, WN_F64, 2, 131, 2, 0);
  OK(s.d->ops->zero(s.d, &s.dw));
  layer_loss(&s);
  OK(s.d->ops->layer_norm_backward(s.d, &s.dx, &s.dw, &s.db, &s.probe, &s.x, &s.stat, &s.w, &s.norm));
  check("layer_norm x", &s.x, &s.dx, layer_loss, &s);
  check("layer_norm w", &s.w, &s.dw, layer_loss, &s);
  check("layer_norm b", &s.b, &s.db, layer_loss, &s);
}

static double rope_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->cast(s->d, &s->y, &s->x));
  OK(s->d->ops->rope(s->d, &s->y, s->position, &s->rope));
  return wn_test_dot(&s->y, &s->probe);
}

static void test_rope(void **state) {
  static const float inv_freq[3] = {1, 0.1f, 0.003f};
  for (int interleaved = 0; interleaved < 2; interleaved++) {
    scene s = {.d = *state, .position = {0, 1, 5, 77, 4096, 99999, 131071}};
    s.rope = (wn_rope_params){.inv_freq = inv_freq, .interleaved = interleaved};
    s.x = normal(&s, 1, 3, 7, 2, 6);
    s.probe = normal(&s, 2, 3, 7, 2, 6);
    s.y = zeros(&s, &s.x);
    s.dx = normal(&s, 2, 3, 7, 2, 6); /* the probe, rotated back in place */
    wn_rope_params back = s.rope;
    back.inverse = true;
    OK(s.d->ops->rope(s.d, &s.dx, s.position, &back));
    check(interleaved ? "rope interleaved" : "rope half-split", &s.x, &s.dx, rope_loss, &s);
  }
}

static double swiglu_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->swiglu(s->d, &s->y, &s->x, &s->w));
  return wn_test_dot(&s->y, &s->probe);
}

static void test_swiglu(void **state) {
  scene s = {.d = *state};
  s.x = wn_test_random(s.d, WN_F64, 1, 2, 0, 2, 17, 11, 0);
  s.w = normal(&s, 2, 2, 17, 11, 0);
  s.probe = normal(&s, 3, 2, 17, 11, 0);
  s.y = zeros(&s, &s.x);
  s.dx = zeros(&s, &s.x);
  s.dw = zeros(&s, &s.w);
  OK(s.d->ops->swiglu_backward(s.d, &s.dx, &s.dw, &s.probe, &s.x, &s.w));
  check("swiglu gate", &s.x, &s.dx, swiglu_loss, &s);
  check("swiglu up", &s.w, &s.dw, swiglu_loss, &s);
}

static double heads_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->broadcast_heads(s->d, &s->y, &s->x));
  return wn_test_dot(&s->y, &s->probe);
}

static void test_broadcast_heads(void **state) {
  scene s = {.d = *state};
  s.x = normal(&s, 1, 2, 7, 5, 0);
  s.probe = normal(&s, 2, 3, 7, 3, 5);
  s.y = zeros(&s, &s.probe);
  s.dx = zeros(&s, &s.x);
  OK(s.d->ops->sum_heads(s.d, &s.dx, &s.probe, &overwrite));
  check("broadcast_heads, sum_heads", &s.x, &s.dx, heads_loss, &s);
}

static double embedding_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->embedding(s->d, &s->y, &s->target, &s->w));
  return wn_test_dot(&s->y, &s->probe);
}

static wn_tensor tokens(scene *s, int64_t n, int64_t vocabulary) {
  wn_tensor t = wn_test_tensor(s->d, WN_I32, 1, n, 0, 0);
  for (int64_t i = 0; i < n; i++)
    wn_test_set(&t, i, (double)wn_rng_below(3, WN_RNG_TEST, (uint64_t)i, (uint64_t)vocabulary));
  return t;
}

static void test_embedding(void **state) {
  scene s = {.d = *state};
  s.w = normal(&s, 1, 2, 11, 5, 0);
  s.target = tokens(&s, 29, 11);
  s.probe = normal(&s, 2, 2, 29, 5, 0);
  s.y = zeros(&s, &s.probe);
  s.dw = zeros(&s, &s.w);
  OK(s.d->ops->embedding_backward(s.d, &s.dw, &s.probe, &s.target));
  check("embedding w", &s.w, &s.dw, embedding_loss, &s);
}

/* -sum weight logp, from the values alone */
static double head_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->head_loss(s->d, &s->y, NULL, NULL, &s->x, &s->w, &s->target, NULL, &(wn_head_params){7}));
  return -wn_test_dot(&s->y, &s->weight);
}

static void test_head(void **state) {
  scene s = {.d = *state};
  s.x = normal(&s, 1, 2, 23, 6, 0);
  s.w = normal(&s, 2, 2, 19, 6, 0);
  s.target = tokens(&s, 23, 19);
  for (int64_t i = 0; i < 23; i += 6) wn_test_set(&s.target, i, -1);
  s.weight = normal(&s, 3, 1, 23, 0, 0);
  s.y = zeros(&s, &s.weight);
  s.dx = zeros(&s, &s.x);
  s.dw = zeros(&s, &s.w);
  OK(s.d->ops->head_loss(s.d, &s.y, &s.dx, &s.dw, &s.x, &s.w, &s.target, &s.weight, &(wn_head_params){7}));
  for (int64_t j = 0; j < 6; j++) assert_true(wn_test_get(&s.dx, j) == 0); /* row 0 has no target */
  check("head_loss h", &s.x, &s.dx, head_loss, &s);
  check("head_loss w", &s.w, &s.dw, head_loss, &s);
}

/* <weight, probe> + coefficient * balance, at fixed choices */
static double router_loss(void *context) {
  scene *s = context;
  OK(s->d->ops->zero(s->d, &s->balance));
  OK(s->d->ops->router(s->d, &s->scores, &s->index, &s->weight, &s->load, &s->balance, &s->x, &s->w, &s->bias,
                       &s->router));
  return wn_test_dot(&s->weight, &s->probe) + s->router.balance_coeff * wn_test_get(&s->balance, 0);
}

static void check_router(wn_device *d, bool norm_topk, double balance_coeff) {
  scene s = {.d = d};
  s.router = (wn_router_params){.n_group = 4,
                                .topk_group = 2,
                                .norm_topk = norm_topk,
                                .scale = 2.5,
                                .rows_per_sequence = 17,
                                .balance_coeff = balance_coeff};
  s.x = normal(&s, 1, 2, 34, 6, 0);
  s.w = wn_test_random(d, WN_F64, 2, 0.5, 0, 2, 8, 6, 0);
  s.bias = wn_test_random(d, WN_F64, 3, 0.2, 0, 1, 8, 0, 0);
  s.probe = normal(&s, 4, 2, 34, 3, 0);
  s.scores = wn_test_tensor(d, WN_F64, 2, 34, 8, 0);
  s.index = wn_test_tensor(d, WN_I32, 2, 34, 3, 0);
  s.weight = wn_test_tensor(d, WN_F64, 2, 34, 3, 0);
  s.load = wn_test_tensor(d, WN_I32, 1, 8, 0, 0);
  s.balance = wn_test_tensor(d, WN_F64, 1, 1, 0, 0);
  OK(d->ops->zero(d, &s.load));
  router_loss(&s); /* chooses; from here on the choices stay */
  s.router.forced = true;
  s.dx = zeros(&s, &s.x);
  s.dw = zeros(&s, &s.w);
  OK(d->ops->router_backward(d, &s.dx, &s.dw, &s.probe, &s.scores, &s.index, &s.x, &s.w, &s.router));
  check(norm_topk ? "router x, normalised" : "router x", &s.x, &s.dx, router_loss, &s);
  check(norm_topk ? "router w, normalised" : "router w", &s.w, &s.dw, router_loss, &s);
}

static void test_router(void **state) {
  check_router(*state, false, 0);
  check_router(*state, true, 0);
  check_router(*state, false, 30); /* large enough that the balance loss cannot hide behind the weights */
  check_router(*state, true, 30);
}

/* y = combine(grouped_linear(permute(x)), weight) */
static double experts_loss(void *context) {
  scene *s = context;
  const wn_ops *ops = s->d->ops;
  OK(ops->moe_permute(s->d, &s->xp, &s->slot, s->offset, &s->x, &s->index, 3));
  OK(ops->grouped_linear(s->d, &s->yp, &s->xp, s->experts, 3, s->offset, &overwrite));
  OK(ops->zero(s->d, &s->y));
  OK(ops->moe_combine(s->d, &s->y, &s->yp, &s->slot, &s->weight));
  return wn_test_dot(&s->y, &s->probe);
}

static void test_experts(void **state) {
  scene s = {.d = *state};
  const wn_ops *ops = s.d->ops;
  s.x = normal(&s, 1, 2, 19, 5, 0);
  s.weight = normal(&s, 2, 2, 19, 2, 0);
  s.probe = normal(&s, 3, 2, 19, 4, 0);
  s.y = zeros(&s, &s.probe);
  s.index = wn_test_tensor(s.d, WN_I32, 2, 19, 2, 0);
  for (int64_t i = 0; i < 38; i++) wn_test_set(&s.index, i, (double)((i % 2 + i / 2 * 2) % 3));
  s.slot = wn_test_tensor(s.d, WN_I32, 1, 38, 0, 0);
  s.xp = wn_test_tensor(s.d, WN_F64, 2, 38, 5, 0);
  s.yp = wn_test_tensor(s.d, WN_F64, 2, 38, 4, 0);
  for (uint64_t e = 0; e < 3; e++) {
    s.experts[e] = normal(&s, 10 + e, 2, 4, 5, 0);
    s.d_experts[e] = zeros(&s, &s.experts[e]);
  }
  experts_loss(&s);
  wn_tensor dyp = zeros(&s, &s.yp), dxp = zeros(&s, &s.xp), dweight = zeros(&s, &s.weight);
  s.dx = zeros(&s, &s.x);
  OK(ops->moe_combine_backward(s.d, &dyp, &dweight, &s.probe, &s.yp, &s.slot, &s.weight));
  OK(ops->grouped_linear_backward_weight(s.d, s.d_experts, &dyp, &s.xp, 3, s.offset));
  OK(ops->grouped_linear_backward_input(s.d, &dxp, &dyp, s.experts, 3, s.offset, &overwrite));
  OK(ops->moe_permute_backward(s.d, &s.dx, &dxp, &s.slot));
  check("experts x", &s.x, &s.dx, experts_loss, &s);
  check("experts weight", &s.weight, &dweight, experts_loss, &s);
  for (int e = 0; e < 3; e++) check("experts w", &s.experts[e], &s.d_experts[e], experts_loss, &s);
}

static int set_up(void **state) {
  *state = wn_test_cpu_f64();
  return 0;
}

static int tear_down(void **state) {
  wn_cpu_free_f64(*state);
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_linear),    cmocka_unit_test(test_per_head), cmocka_unit_test(test_norms),
      cmocka_unit_test(test_rope),      cmocka_unit_test(test_swiglu),   cmocka_unit_test(test_broadcast_heads),
      cmocka_unit_test(test_embedding), cmocka_unit_test(test_head),     cmocka_unit_test(test_router),
      cmocka_unit_test(test_experts),
  };
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
