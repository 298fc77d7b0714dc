/* Router, permutation and combination against plain loops: ties, groups, replay, balance loss, loads. */
#include "support/cpu.h"

enum { MARGIN = 3 };

typedef struct routing {
  wn_tensor scores, index, weight, load, balance, x, w, bias, dweight, dx, dw;
  wn_router_params params;
} routing;

static routing operands(wn_device *d, int64_t n, int64_t width, int64_t n_experts, int64_t n_choices) {
  routing c = {.params = {.n_group = 1, .topk_group = 1, .scale = 1, .rows_per_sequence = (int32_t)n}};
  c.x = wn_test_random(d, WN_F32, 1, 1, MARGIN, 2, n, width, 0);
  c.w = wn_test_random(d, WN_F32, 2, 0.5, MARGIN, 2, n_experts, width, 0);
  c.bias = wn_test_random(d, WN_F32, 3, 0.3, 0, 1, n_experts, 0, 0);
  c.dweight = wn_test_random(d, WN_F32, 4, 1, MARGIN, 2, n, n_choices, 0);
  c.scores = wn_test_strided(d, WN_F32, MARGIN, 2, n, n_experts, 0);
  c.index = wn_test_strided(d, WN_I32, MARGIN, 2, n, n_choices, 0);
  c.weight = wn_test_strided(d, WN_F32, MARGIN, 2, n, n_choices, 0);
  c.load = wn_test_tensor(d, WN_I32, 1, n_experts, 0, 0);
  c.balance = wn_test_tensor(d, WN_F32, 1, 1, 0, 0);
  c.dx = wn_test_strided(d, WN_F32, MARGIN, 2, n, width, 0);
  c.dw = wn_test_strided(d, WN_F32, MARGIN, 2, n_experts, width, 0);
  return c;
}

static void run_router(wn_device *d, void *context) {
  routing *c = context;
  OK(d->ops->router(d, &c->scores, &c->index, &c->weight, &c->load, &c->balance, &c->x, &c->w, &c->bias, &c->params));
  OK(d->ops->router_backward(d, &c->dx, &c->dw, &c->dweight, &c->scores, &c->index, &c->x, &c->w, &c->params));
}

/* The choice by definition: rank everything, larger first, lower number on ties. */
static bool before_in_order(const double *value, int64_t a, int64_t b) {
  return value[a] > value[b] || (value[a] == value[b] && a < b);
}

static void choose(int64_t *picks, int64_t n_choices, const double *biased, int64_t n_experts, int64_t n_group,
                   int64_t topk_group) {
  double group[64], value[64];
  int64_t per_group = n_experts / n_group;
  for (int64_t g = 0; g < n_group; g++) {
    group[g] = per_group > 1 ? -1e300 : biased[g];
    for (int64_t a = 0; a < per_group; a++)
      for (int64_t b = 0; b < a; b++) group[g] = fmax(group[g], biased[g * per_group + a] + biased[g * per_group + b]);
  }
  for (int64_t e = 0; e < n_experts; e++) {
    int64_t rank = 0;
    for (int64_t g = 0; g < n_group; g++) rank += before_in_order(group, g, e / per_group);
    value[e] = rank < topk_group ? biased[e] : -1e300;
  }
  for (int64_t e = 0; e < n_experts; e++) {
    int64_t rank = 0;
    for (int64_t other = 0; other < n_experts; other++) rank += before_in_order(value, other, e);
    if (rank < n_choices) picks[rank] = e;
  }
}

/* Choices from the operation's own FP32 scores (so that rounding cannot flip a near tie); everything else in FP64. */
static void check_router(wn_device *d, routing c, bool norm_topk, double scale, int64_t n_sequences) {
  size_t mark = wn_arena_mark(d->stash);
  int64_t n = c.x.dim[0], width = c.x.dim[1], n_experts = c.w.dim[0], n_choices = c.index.dim[1],
          rows = n / n_sequences;
  c.params.norm_topk = norm_topk;
  c.params.scale = scale;
  c.params.rows_per_sequence = (int32_t)rows;
  c.params.balance_coeff = 0.3;
  const wn_test_out outs[] = {{&c.scores, false}, {&c.index, false}, {&c.weight, false}, {&c.load, true},
                              {&c.balance, true}, {&c.dx, true},     {&c.dw, true}};
  double *s = wn_test_doubles(d, &c.scores), *weight = wn_test_doubles(d, &c.weight);
  double *balance = wn_test_before(d, &outs[4]), *dx = wn_test_before(d, &outs[5]), *dw = wn_test_before(d, &outs[6]);
  wn_test_repeats(d, run_router, &c, outs, 7);
  const double *x = wn_test_doubles(d, &c.x), *w = wn_test_doubles(d, &c.w), *bias = wn_test_doubles(d, &c.bias);
  const double *dweight = wn_test_doubles(d, &c.dweight);
  double load[64] = {0}, count[64];
  for (int64_t i = 0; i < n; i++) {
    double biased[64], chosen_sum = 0;
    int64_t picks[16];
    for (int64_t e = 0; e < n_experts; e++) {
      double z = 0;
      for (int64_t j = 0; j < width; j++) z += x[i * width + j] * w[e * width + j];
      s[i * n_experts + e] = 1 / (1 + exp(-z));
      biased[e] = (double)((float)wn_test_get(&c.scores, i * n_experts + e) + (float)bias[e]);
    }
    choose(picks, n_choices, biased, n_experts, c.params.n_group, c.params.topk_group);
    for (int64_t k = 0; k < n_choices; k++) {
      assert_int_equal(wn_test_get(&c.index, i * n_choices + k), picks[k]);
      chosen_sum += s[i * n_experts + picks[k]];
      load[picks[k]]++;
    }
    for (int64_t k = 0; k < n_choices; k++)
      weight[i * n_choices + k] = s[i * n_experts + picks[k]] / (norm_topk ? chosen_sum : 1) * scale;
  }
  for (int64_t i = 0; i < n; i++) { /* gradients, with f of the row's sequence */
    double ds[64], total = 0, mean = 0, chosen_sum = 0, pull = 0;
    for (int64_t e = 0; e < n_experts; e++) count[e] = 0;
    for (int64_t p = i / rows * rows * n_choices; p < (i / rows + 1) * rows * n_choices; p++)
      count[(int64_t)wn_test_get(&c.index, p)] += (double)n_experts / (double)(n_choices * rows);
    for (int64_t e = 0; e < n_experts; e++) total += s[i * n_experts + e];
    for (int64_t e = 0; e < n_experts; e++) mean += count[e] * s[i * n_experts + e] / total;
    balance[0] += mean / (double)rows;
    for (int64_t e = 0; e < n_experts; e++) ds[e] = 0.3 * (count[e] - mean) / total / (double)rows;
    for (int64_t k = 0; k < n_choices; k++) {
      int64_t e = (int64_t)wn_test_get(&c.index, i * n_choices + k);
      chosen_sum += s[i * n_experts + e];
      pull += dweight[i * n_choices + k] * s[i * n_experts + e];
    }
    for (int64_t k = 0; k < n_choices; k++) {
      int64_t e = (int64_t)wn_test_get(&c.index, i * n_choices + k);
      double g = dweight[i * n_choices + k];
      ds[e] += scale * (norm_topk ? g / chosen_sum - pull / chosen_sum / chosen_sum : g);
    }
    for (int64_t e = 0; e < n_experts; e++) {
      double dz = ds[e] * s[i * n_experts + e] * (1 - s[i * n_experts + e]);
      for (int64_t j = 0; j < width; j++) {
        dx[i * width + j] += dz * w[e * width + j];
        dw[e * width + j] += dz * x[i * width + j];
      }
    }
  }
  wn_test_close_to("scores", &c.scores, s, 2e-6, 0);
  wn_test_close_to("weight", &c.weight, weight, 1e-5, 1e-5);
  wn_test_close_to("load", &c.load, load, 0, 0);
  wn_test_close_to("balance", &c.balance, balance, 1e-5, 1e-5);
  wn_test_close_to("dx", &c.dx, dx, 2e-5, 1e-5);
  wn_test_close_to("dw", &c.dw, dw, 2e-5, 1e-5);
  wn_test_margin_untouched(&c.index, MARGIN);
  wn_test_margin_untouched(&c.weight, MARGIN);
  wn_test_margin_untouched(&c.dx, MARGIN);
  wn_arena_release(d->stash, mark);
}

static void test_router(void **state) {
  wn_device *d = *state;
  check_router(d, operands(d, 1, 1, 1, 1), false, 1, 1);
  check_router(d, operands(d, 134, 31, 7, 3), true, 2.5, 2);
  check_router(d, operands(d, 134, 31, 7, 3), false, 2.5, 2);
  routing c = operands(d, 201, 19, 24, 4);
  c.params.n_group = 8;
  c.params.topk_group = 3;
  check_router(d, c, true, 1.8, 3);
  c.params.n_group = 24; /* groups of one expert */
  c.params.topk_group = 5;
  check_router(d, c, true, 1, 1);
}

/* All scores equal, then ties made by the bias: always the lowest experts and the lowest groups. */
static void test_ties(void **state) {
  wn_device *d = *state;
  routing c = operands(d, 70, 5, 12, 4);
  wn_test_fill(&c.w, 1, 0, 0);
  wn_test_fill(&c.bias, 1, 0, 0);
  check_router(d, c, true, 1, 1);
  for (int64_t k = 0; k < 4; k++) assert_int_equal(wn_test_get(&c.index, k), k);
  c.params.n_group = 4;
  c.params.topk_group = 2;
  check_router(d, c, true, 1, 1);
  for (int64_t e = 0; e < 12; e++)
    wn_test_set(&c.bias, e, e % 3 == 1 ? 1 : -5); /* negative choices within kept groups */
  check_router(d, c, true, 1, 1);
  assert_int_equal(wn_test_get(&c.index, 0), 1);
  assert_int_equal(wn_test_get(&c.index, 1), 4);
  assert_int_equal(wn_test_get(&c.index, 2), 0);
  assert_int_equal(wn_test_get(&c.index, 3), 2);
}

/* NaN scores still give distinct experts that exist: nothing downstream may read beyond its arrays. */
static void test_nan_scores(void **state) {
  wn_device *d = *state;
  routing c = operands(d, 3, 5, 8, 4);
  wn_test_set(&c.x, 5, (double)NAN);
  c.params.n_group = 4;
  c.params.topk_group = 2;
  for (int64_t e = 0; e < 8; e++) wn_test_set(&c.load, e, 0);
  OK(d->ops->router(d, &c.scores, &c.index, &c.weight, &c.load, NULL, &c.x, &c.w, &c.bias, &c.params));
  for (int64_t k = 0; k < 4; k++) assert_int_equal(wn_test_get(&c.index, 4 + k), k);
  /* one NaN alone comes last: it must not block the experts behind it */
  c.params.n_group = c.params.topk_group = 1;
  wn_test_set(&c.bias, 0, (double)NAN);
  wn_test_fill(&c.x, 8, 1, 0);
  OK(d->ops->router(d, &c.scores, &c.index, &c.weight, &c.load, NULL, &c.x, &c.w, &c.bias, &c.params));
  for (int64_t i = 0; i < 12; i++) assert_true(wn_test_get(&c.index, i) > 0);
}

static void test_forced(void **state) {
  wn_device *d = *state;
  routing c = operands(d, 2, 5, 8, 2);
  const int32_t chosen[4] = {7, 0, 3, 5};
  c.params.forced = true;
  c.params.norm_topk = true;
  c.params.scale = 2;
  OK(d->ops->upload(d, &c.index, chosen));
  for (int64_t e = 0; e < 8; e++) wn_test_set(&c.load, e, 10);
  OK(d->ops->router(d, &c.scores, &c.index, &c.weight, &c.load, NULL, &c.x, &c.w, &c.bias, &c.params));
  for (int64_t i = 0; i < 4; i++) {
    assert_int_equal(wn_test_get(&c.index, i), chosen[i]);
    double own = wn_test_get(&c.scores, i / 2 * 8 + chosen[i]),
           other = wn_test_get(&c.scores, i / 2 * 8 + chosen[i ^ 1]);
    wn_test_near("weight", wn_test_get(&c.weight, i), 2 * own / (own + other), 1e-6);
  }
  for (int64_t e = 0; e < 8; e++)
    assert_int_equal(wn_test_get(&c.load, e), e == 7 || e == 0 || e == 3 || e == 5 ? 11 : 10);
}

typedef struct moving {
  wn_tensor xp, slot, dx, y, dyp, dweight, x, index, weight, yp, dxp, dy;
  int64_t offset[8];
  int32_t n_experts;
} moving;

static void run_moving(wn_device *d, void *context) {
  moving *c = context;
  OK(d->ops->moe_permute(d, &c->xp, &c->slot, c->offset, &c->x, &c->index, c->n_experts));
  OK(d->ops->moe_permute_backward(d, &c->dx, &c->dxp, &c->slot));
  OK(d->ops->moe_combine(d, &c->y, &c->yp, &c->slot, &c->weight));
  OK(d->ops->moe_combine_backward(d, &c->dyp, &c->dweight, &c->dy, &c->yp, &c->slot, &c->weight));
}

static void check_moving(wn_device *d, int64_t n, int64_t choices, int32_t n_experts, int64_t width) {
  size_t mark = wn_arena_mark(d->stash);
  int64_t pairs = n * choices;
  moving c = {.n_experts = n_experts};
  c.x = wn_test_random(d, WN_F32, 1, 1, MARGIN, 2, n, width, 0);
  c.yp = wn_test_random(d, WN_F32, 2, 1, MARGIN, 2, pairs, width, 0);
  c.dxp = wn_test_random(d, WN_F32, 3, 1, MARGIN, 2, pairs, width, 0);
  c.dy = wn_test_random(d, WN_F32, 4, 1, MARGIN, 2, n, width, 0);
  c.weight = wn_test_random(d, WN_F32, 5, 1, MARGIN, 2, n, choices, 0);
  c.index = wn_test_strided(d, WN_I32, MARGIN, 2, n, choices, 0);
  for (int64_t i = 0; i < pairs; i++) /* distinct within a row; the last expert gets nothing unless it must */
    wn_test_set(&c.index, i, (double)((i % choices + i / choices * i) % (n_experts > 1 ? n_experts - 1 : 1)));
  c.xp = wn_test_strided(d, WN_F32, MARGIN, 2, pairs, width, 0);
  c.dyp = wn_test_strided(d, WN_F32, MARGIN, 2, pairs, width, 0);
  c.slot = wn_test_tensor(d, WN_I32, 1, pairs, 0, 0);
  c.dx = wn_test_strided(d, WN_F32, MARGIN, 2, n, width, 0);
  c.y = wn_test_strided(d, WN_F32, MARGIN, 2, n, width, 0);
  c.dweight = wn_test_strided(d, WN_F32, MARGIN, 2, n, choices, 0);
  const wn_test_out outs[] = {{&c.xp, false}, {&c.slot, false}, {&c.dx, true},
                              {&c.y, true},   {&c.dyp, false},  {&c.dweight, false}};
  double *xp = wn_test_doubles(d, &c.xp), *slot = wn_test_doubles(d, &c.slot), *dx = wn_test_before(d, &outs[2]),
         *y = wn_test_before(d, &outs[3]), *dyp = wn_test_doubles(d, &c.dyp), *dweight = wn_test_doubles(d, &c.dweight);
  wn_test_repeats(d, run_moving, &c, outs, 6);
  int64_t place = 0;
  for (int32_t e = 0; e < n_experts; e++) {
    assert_int_equal(c.offset[e], place);
    for (int64_t i = 0; i < pairs; i++) {
      if ((int32_t)wn_test_get(&c.index, i) != e) continue;
      slot[i] = (double)place;
      dweight[i] = 0;
      for (int64_t j = 0; j < width; j++) {
        int64_t from = i / choices * width + j, to = place * width + j;
        double by = wn_test_get(&c.weight, i);
        xp[to] = wn_test_get(&c.x, from);
        dx[from] += wn_test_get(&c.dxp, to);
        y[from] += by * wn_test_get(&c.yp, to);
        dyp[to] = by * wn_test_get(&c.dy, from);
        dweight[i] += wn_test_get(&c.dy, from) * wn_test_get(&c.yp, to);
      }
      place++;
    }
  }
  assert_int_equal(c.offset[n_experts], pairs);
  wn_test_close_to("slot", &c.slot, slot, 0, 0);
  wn_test_close_to("xp", &c.xp, xp, 0, 0);
  wn_test_close_to("dx", &c.dx, dx, 2e-6, 1e-6);
  wn_test_close_to("y", &c.y, y, 2e-6, 1e-6);
  wn_test_close_to("dyp", &c.dyp, dyp, 1e-6, 1e-6);
  wn_test_close_to("dweight", &c.dweight, dweight, 1e-5, 1e-5);
  wn_test_margin_untouched(&c.xp, MARGIN);
  wn_arena_release(d->stash, mark);
}

static void test_moving(void **state) {
  check_moving(*state, 1, 1, 1, 1);
  check_moving(*state, 67, 3, 7, 13);
  check_moving(*state, 5, 2, 4, 130);
}

static int set_up(void **state) {
  *state = wn_test_cpu_f32();
  return 0;
}

static int tear_down(void **state) {
  wn_cpu_free_f32(*state);
  return 0;
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_router), cmocka_unit_test(test_ties),   cmocka_unit_test(test_nan_scores),
      cmocka_unit_test(test_forced), cmocka_unit_test(test_moving),
  };
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
