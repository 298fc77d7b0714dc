/* One update of a whole model against AdamW written out in FP64, element by element: what base and indexer have of
 * their own (divisor, norm, clip, learning rate, clock), what decays, what stays. */
#include "support/checkpoint.h"
#include "support/one_world.h"
#include "train/optimizer.h"

#include <math.h>

enum { GRADIENT = WN_N_FIELDS }; /* a field of test_value's own */

static float gradient_of(int32_t param, int64_t element) {
  return 3 * test_value(1, param, (wn_field)GRADIENT, element);
}

static test_rig open_rig(bool train_base) {
  test_rig rig;
  wn_param_settings settings = {.train_base = train_base, .train_indexer = true, .file_dtype = WN_F32};
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, "", ""));
  OK(test_values(&rig, TEST_FILL, 1, false, false));
  for (int32_t i = 0; i < wn_store_pieces(rig.store); i++) {
    wn_piece *piece = wn_store_piece(rig.store, i);
    for (int32_t s = 0; s < piece->n_segments && piece->grad.data; s++) {
      wn_segment at = piece->segments[s];
      float *grad = (float *)piece->grad.data + at.offset;
      for (int64_t e = 0; e < at.count; e++) grad[e] = gradient_of(at.param, at.first + e);
    }
  }
  return rig;
}

static double norm_of(const test_rig *rig, wn_kind kind) {
  double squares = 0;
  for (int32_t p = 0; p < rig->model->table.n; p++) {
    const wn_param *param = &rig->model->table.params[p];
    for (int64_t e = 0; param->kind == kind && e < wn_param_elements(param); e++)
      squares += (double)gradient_of(p, e) * (double)gradient_of(p, e);
  }
  return sqrt(squares);
}

/* `absolute`: what rounding leaves of a difference of two larger numbers. */
static void expect_close(const wn_param *p, const char *what, int64_t element, double got, double want,
                         double absolute) {
  if (!(fabs(got - want) <= 4e-7 * fabs(want) + absolute))
    fail_msg("%s, %s[%lld]: %.9g instead of %.9g", p->hf_name, what, (long long)element, got, want);
}

/* decoupled decay, then the step: model-spec's and PyTorch's order */
static void expect_updated(const test_rig *rig, const wn_job *job, const wn_update *u, double base_clip,
                           double indexer_clip) {
  double beta1 = job->optimizer.beta1, beta2 = job->optimizer.beta2;
  for (int32_t i = 0; i < wn_store_pieces(rig->store); i++) {
    const wn_piece *piece = wn_store_piece(rig->store, i);
    for (int32_t s = 0; s < piece->n_segments; s++) {
      wn_segment at = piece->segments[s];
      const wn_param *p = &rig->model->table.params[at.param];
      bool indexer = p->kind == WN_INDEXER;
      double lr = indexer ? u->indexer_lr : u->lr, t = (double)(indexer ? u->adam_indexer : u->adam_base);
      double factor = indexer ? indexer_clip / u->indexer_divisor : base_clip / u->base_divisor;
      for (int64_t e = 0; e < at.count; e++) {
        int64_t element = at.first + e, place = at.offset + e;
        double w = (double)test_value(1, at.param, WN_FIELD_WEIGHT, element);
        double got = (double)((const float *)piece->master.data)[place];
        if (!piece->grad.data) {
          if (got != w) fail_msg("%s[%lld] has changed, and does not train", p->hf_name, (long long)element);
          continue;
        }
        double g = (double)gradient_of(at.param, element) * factor;
        double m = beta1 * (double)test_value(1, at.param, WN_FIELD_M, element) + (1 - beta1) * g;
        double v = beta2 * (double)test_value(1, at.param, WN_FIELD_V, element) + (1 - beta2) * g * g;
        if (p->rank > 1) w -= lr * job->optimizer.weight_decay * w;
        w -= lr * (m / (1 - pow(beta1, t))) / (sqrt(v / (1 - pow(beta2, t))) + job->optimizer.eps);
        expect_close(p, "m", element, (double)((const float *)piece->m.data)[place], m, 2e-7);
        expect_close(p, "v", element, (double)((const float *)piece->v.data)[place], v, 0);
        expect_close(p, "weight", element, got, w, 4e-7);
      }
    }
  }
}

/* `clip` of the base's norm and of the indexer's, which the divisors make very different. */
static void one_update(double clip, bool train_base, bool clips_base, bool clips_indexer) {
  test_rig rig = open_rig(train_base);
  wn_job job = {.optimizer = {.beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip_grad = clip}};
  wn_update u = {
      .lr = 1e-2, .indexer_lr = 3e-2, .base_divisor = 400, .indexer_divisor = 50, .adam_base = 7, .adam_indexer = 3};
  double base = norm_of(&rig, WN_BASE) / u.base_divisor, indexer = norm_of(&rig, WN_INDEXER) / u.indexer_divisor;
  OK(wn_optimizer_norms(&u.norms, rig.device, world, rig.store, u.base_divisor, u.indexer_divisor));
  assert_int_equal(u.norms.non_finite, 0);
  assert_true(fabs(u.norms.base - base) <= 1e-6 * base && fabs(u.norms.indexer - indexer) <= 1e-6 * indexer);
  assert_true(clip == 0 || ((base > clip) == clips_base && (indexer > clip) == clips_indexer));
  OK(wn_optimizer_update(rig.device, rig.store, &job, &u));
  expect_updated(&rig, &job, &u, clips_base ? clip / base : 1, clips_indexer ? clip / indexer : 1);
  test_rig_free(&rig);
}

static void each_kind_on_its_own(void **state) {
  (void)state;
  test_rig rig = open_rig(true);
  double base = norm_of(&rig, WN_BASE) / 400, indexer = norm_of(&rig, WN_INDEXER) / 50;
  test_rig_free(&rig);
  assert_true(indexer > 1.2 * base);
  one_update(0, true, false, false);
  one_update(2 * indexer, true, false, false);
  one_update(sqrt(base * indexer), true, false, true);
  one_update(base / 2, true, true, true);
}

static void a_frozen_base_stays(void **state) {
  (void)state;
  test_rig rig = open_rig(false);
  for (int32_t i = 0; i < wn_store_pieces(rig.store); i++) {
    const wn_piece *piece = wn_store_piece(rig.store, i);
    bool indexer = piece->kind == WN_INDEXER;
    assert_true((piece->m.data != NULL) == indexer && (piece->v.data != NULL) == indexer);
    assert_true((piece->grad.data != NULL) == indexer);
  }
  test_rig_free(&rig);
  one_update(0, false, false, false);
}

/* One NaN, one infinity: counted, and kept out of the norms. */
static void what_is_not_finite_is_counted(void **state) {
  (void)state;
  test_rig rig = open_rig(true);
  wn_gradient_norms clean, norms;
  OK(wn_optimizer_norms(&clean, rig.device, world, rig.store, 1, 1));
  for (int32_t i = 0, seen[2] = {0}; i < wn_store_pieces(rig.store); i++) {
    wn_piece *piece = wn_store_piece(rig.store, i);
    if (!piece->grad.data || seen[piece->kind == WN_INDEXER]++) continue;
    ((float *)piece->grad.data)[piece->segments[0].offset] = piece->kind == WN_INDEXER ? NAN : -INFINITY;
  }
  OK(wn_optimizer_norms(&norms, rig.device, world, rig.store, 1, 1));
  assert_int_equal(norms.non_finite, 2);
  assert_true(isfinite(norms.base) && norms.base <= clean.base && norms.base > 0.9 * clean.base);
  assert_true(isfinite(norms.indexer) && norms.indexer <= clean.indexer && norms.indexer > 0.5 * clean.indexer);
  test_rig_free(&rig);
}

static void gradients_are_zeroed(void **state) {
  (void)state;
  test_rig rig = open_rig(true);
  wn_gradient_norms norms;
  OK(wn_optimizer_zero_grads(rig.device, rig.store));
  OK(wn_optimizer_norms(&norms, rig.device, world, rig.store, 1, 1));
  assert_true(norms.base == 0 && norms.indexer == 0 && norms.non_finite == 0);
  test_rig_free(&rig);
}

/* Experts above their layer's mean load become less likely, those below more; at the mean nothing moves. */
static void the_router_bias_follows_the_load(void **state) {
  (void)state;
  enum { E = 4 };
  static const int64_t load[3 * E] = {0, 0, 0, 0, 10, 2, 5, 3, 6, 6, 6, 6};
  static const double moves[3 * E] = {0, 0, 0, 0, -1, 1, 0, 1, 0, 0, 0, 0};
  const double speed = 0.125;
  test_rig rig = open_rig(true);
  int32_t biases = 0;
  OK(wn_optimizer_router_bias(rig.device, rig.store, speed, load, E));
  for (int32_t i = 0; i < wn_store_pieces(rig.store); i++) {
    const wn_piece *piece = wn_store_piece(rig.store, i);
    for (int32_t s = 0; s < piece->n_segments; s++) {
      wn_segment at = piece->segments[s];
      const wn_param *p = &rig.model->table.params[at.param];
      for (int64_t e = 0; e < at.count; e++) {
        float was = test_value(1, at.param, WN_FIELD_WEIGHT, at.first + e);
        if (p->kind == WN_BUFFER) was += (float)(speed * moves[p->layer * E + at.first + e]);
        if (((const float *)piece->master.data)[at.offset + e] != was)
          fail_msg("%s[%lld]", p->hf_name, (long long)(at.first + e));
        biases += p->kind == WN_BUFFER;
      }
    }
  }
  assert_int_equal(biases, 2 * E);
  test_rig_free(&rig);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(each_kind_on_its_own),
      cmocka_unit_test(a_frozen_base_stays),
      cmocka_unit_test(what_is_not_finite_is_counted),
      cmocka_unit_test(gradients_are_zeroed),
      cmocka_unit_test(the_router_bias_follows_the_load),
  };
  return cmocka_run_group_tests(tests, make_world, free_world);
}
