/* The router on the GPU: scores, choices (from its own scores, exactly), weights, loads, the balance loss, gradients.
 */
#include "support/twin.h"

typedef struct shape {
  int64_t n, width, n_experts, n_choices;
  int32_t n_group, topk_group;
  int64_t n_sequences;
  bool norm_topk, balanced;
  int64_t margin; /* elements after every row on the GPU */
} shape;

typedef struct scene {
  twin x, w, bias, scores, index, weight, load, balance, dweight, dx, dw;
  wn_router_params params;
  bool balanced;
} scene;

static scene make_scene(twin_bench *b, const shape *s) {
  scene c = {.balanced = s->balanced};
  c.params = (wn_router_params){.n_group = s->n_group,
                                .topk_group = s->topk_group,
                                .norm_topk = s->norm_topk,
                                .scale = 2.5,
                                .rows_per_sequence = (int32_t)(s->n / s->n_sequences),
                                .balance_coeff = s->balanced ? 0.3 : 0};
  c.x = twin_random(b, WN_ACT, 1, 1, s->margin, 2, s->n, s->width, 0);
  c.w = twin_random(b, WN_ACT, 2, 2 / sqrt((double)s->width), s->margin, 2, s->n_experts, s->width, 0);
  c.bias = twin_random(b, WN_STAT, 3, 0.2, 0, 1, s->n_experts, 0, 0);
  c.scores = twin_strided(b, WN_STAT, s->margin, 2, s->n, s->n_experts, 0);
  c.index = twin_strided(b, WN_INDEX, s->margin, 2, s->n, s->n_choices, 0);
  c.weight = twin_strided(b, WN_STAT, s->margin, 2, s->n, s->n_choices, 0);
  c.load = twin_tensor(b, WN_INDEX, 1, s->n_experts, 0, 0);
  c.balance = twin_tensor(b, WN_STAT, 1, 1, 0, 0);
  c.dweight = twin_random(b, WN_STAT, 4, 1, s->margin, 2, s->n, s->n_choices, 0);
  c.dx = twin_random(b, WN_ACT, 5, 0.3, s->margin, 2, s->n, s->width, 0);
  c.dw = twin_random(b, WN_WGRAD, 6, 0.3, s->margin, 2, s->n_experts, s->width, 0);
  twin_poison(b, &c.scores);
  twin_poison(b, &c.index);
  twin_poison(b, &c.weight);
  twin_constant(b, &c.load, 5);
  twin_constant(b, &c.balance, 0.5);
  return c;
}

static void forward(wn_device *d, void *context) {
  scene *c = context;
  OK(d->ops->router(d, &c->scores.cuda, &c->index.cuda, &c->weight.cuda, &c->load.cuda,
                    c->balanced ? &c->balance.cuda : NULL, &c->x.cuda, &c->w.cuda, &c->bias.cuda, &c->params));
}

static void backward(wn_device *d, void *context) {
  scene *c = context;
  OK(d->ops->router_backward(d, &c->dx.cuda, &c->dw.cuda, &c->dweight.cuda, &c->scores.cuda, &c->index.cuda, &c->x.cuda,
                             &c->w.cuda, &c->params));
}

static bool before_in_order(const float *value, int64_t a, int64_t b) {
  return value[a] > value[b] || (value[a] == value[b] && a < b);
}

/* The choice by definition: rank everything, larger first, lower number on ties. */
static void choose(int32_t *picks, int64_t n_choices, const float *biased, int64_t n_experts, int64_t n_group,
                   int64_t topk_group) {
  float group[1024], value[1024];
  int64_t per_group = n_experts / n_group;
  for (int64_t g = 0; g < n_group; g++) {
    float first = -INFINITY, second = -INFINITY;
    for (int64_t e = g * per_group; e < (g + 1) * per_group; e++) {
      if (biased[e] > first) {
        second = first;
        first = biased[e];
      } else {
        second = fmaxf(second, biased[e]);
      }
    }
    group[g] = per_group > 1 ? first + second : first;
  }
  for (int64_t e = 0; e < n_experts; e++) {
    int64_t rank = 0;
    for (int64_t g = 0; g < n_group; g++) rank += before_in_order(group, g, e / per_group);
    value[e] = rank < topk_group ? biased[e] : -INFINITY;
  }
  for (int64_t e = 0; e < n_experts; e++) {
    int64_t rank = 0;
    for (int64_t other = 0; other < n_experts; other++) rank += before_in_order(value, other, e);
    if (rank < n_choices) picks[rank] = (int32_t)e;
  }
}

static void expect_choices(twin_bench *b, const scene *c) {
  wn_tensor scores = twin_download(b, &c->scores.cuda), index = twin_download(b, &c->index.cuda);
  int64_t n = index.dim[0], n_choices = index.dim[1], n_experts = scores.dim[1];
  int32_t picks[64];
  float biased[1024];
  for (int64_t i = 0; i < n; i++) {
    for (int64_t e = 0; e < n_experts; e++) {
      biased[e] = ((float *)scores.data)[i * n_experts + e] + (float)wn_test_get(&c->bias.cpu, e);
      if (isnan(biased[e])) biased[e] = -INFINITY;
    }
    choose(picks, n_choices, biased, n_experts, c->params.n_group, c->params.topk_group);
    for (int64_t k = 0; k < n_choices; k++)
      if (((int32_t *)index.data)[i * n_choices + k] != picks[k])
        fail_msg("row %lld choice %lld is expert %d, expected %d", (long long)i, (long long)k,
                 ((int32_t *)index.data)[i * n_choices + k], picks[k]);
  }
  free(scores.data);
  free(index.data);
}

/* Values of the GPU's tensor to both, as they are. */
static void share(twin_bench *b, twin *t) {
  wn_tensor host = twin_download(b, &t->cuda);
  for (int64_t i = 0; i < wn_tensor_count(&host); i++) wn_test_set(&t->cpu, i, wn_test_get(&host, i));
  free(host.data);
}

/* The CPU given the GPU's choices: near ties may fall otherwise in other precision. */
static void forward_cpu_forced(twin_bench *b, scene *c) {
  wn_router_params params = c->params;
  params.forced = true;
  share(b, &c->index);
  OK(b->cpu->ops->router(b->cpu, &c->scores.cpu, &c->index.cpu, &c->weight.cpu, &c->load.cpu,
                         c->balanced ? &c->balance.cpu : NULL, &c->x.cpu, &c->w.cpu, &c->bias.cpu, &params));
}

/* Sums of products in FP32 on tensor cores: a little above everything-in-FP32. */
static const double bar_scores = 3e-5;

static void check_forward(twin_bench *b, scene *c) {
  forward(b->cuda, c);
  expect_choices(b, c);
  forward_cpu_forced(b, c);
  twin_close(b, "scores", &c->scores, bar_scores);
  twin_close(b, "weight", &c->weight, bar_scores);
  twin_same_ints(b, "load", &c->load);
  twin_close(b, "balance", &c->balance, bar_scores);
}

static void check_backward(twin_bench *b, scene *c) {
  share(b, &c->scores);
  backward(b->cuda, c);
  OK(b->cpu->ops->router_backward(b->cpu, &c->dx.cpu, &c->dw.cpu, &c->dweight.cpu, &c->scores.cpu, &c->index.cpu,
                                  &c->x.cpu, &c->w.cpu, &c->params));
  twin_close(b, "dx", &c->dx, twin_bf16);
  twin_close(b, "dw", &c->dw, twin_f32);
}

/* dx is BF16, but everything before it is FP32: it is what the exact sum rounds to, but for sums close to the middle of
 * two BF16 numbers. */
static void dx_is_rounded_once(void **state) {
  twin_bench *b = twin_begin(state);
  shape s = {300, 96, 40, 6, 1, 1, 2, true, true, 0};
  scene c = make_scene(b, &s);
  check_forward(b, &c);
  twin_constant(b, &c.dx, 0);
  check_backward(b, &c);
  wn_tensor dx = twin_download(b, &c.dx.cuda);
  int64_t n = wn_tensor_count(&dx), other = 0;
  for (int64_t i = 0; i < n; i++)
    other += wn_test_get(&dx, i) != (double)wn_f32_from_bf16(wn_bf16_from_f32((float)wn_test_get(&c.dx.cpu, i)));
  print_message("  %lld of %lld are not the nearest number\n", (long long)other, (long long)n);
  assert_true(other <= n / 100);
  free(dx.data);
  twin_end(b);
}

static const shape shapes[] = {
    {1, 8, 4, 2, 1, 1, 1, true, true, 0},         {7, 33, 6, 3, 3, 2, 7, true, true, 3},
    {64, 64, 16, 4, 4, 2, 2, false, true, 8},     {63, 100, 24, 16, 1, 1, 3, true, false, 0},
    {130, 72, 20, 5, 20, 7, 2, false, false, 16}, {512, 256, 256, 8, 8, 4, 4, true, true, 0},
    {33, 40, 1024, 8, 8, 4, 1, true, true, 8},    {97, 48, 256, 1, 1, 1, 97, true, true, 0},
};

static void routes_as_the_cpu_does(void **state) {
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    twin_bench *b = twin_begin(state);
    scene c = make_scene(b, &shapes[i]);
    check_forward(b, &c);
    check_backward(b, &c);
    twin_end(b);
  }
}

static void routes_the_real_width(void **state) {
  twin_bench *b = twin_begin(state);
  shape s = {384, 7168, 256, 8, 8, 4, 2, true, true, 0};
  scene c = make_scene(b, &s);
  check_forward(b, &c);
  check_backward(b, &c);
  twin_end(b);
}

/* The gradient of the balance loss alone, which is small beside that of the weights. */
static void balance_has_its_gradient(void **state) {
  twin_bench *b = twin_begin(state);
  shape s = {192, 64, 32, 4, 4, 2, 3, true, true, 0};
  scene c = make_scene(b, &s);
  check_forward(b, &c);
  twin_constant(b, &c.dweight, 0);
  twin_constant(b, &c.dx, 0);
  twin_constant(b, &c.dw, 0);
  check_backward(b, &c);
  assert_true(fabs(wn_test_get(&c.dw.cpu, 0)) > 0);
  twin_end(b);
}

static void ties_go_to_the_lowest_expert(void **state) {
  twin_bench *b = twin_begin(state);
  shape s = {40, 32, 64, 6, 8, 3, 1, true, true, 0};
  scene c = make_scene(b, &s);
  twin_constant(b, &c.x, 0); /* every score is one half */
  twin_constant(b, &c.bias, 0);
  forward(b->cuda, &c);
  wn_tensor index = twin_download(b, &c.index.cuda);
  for (int64_t i = 0; i < 40 * 6; i++) assert_int_equal(((int32_t *)index.data)[i], i % 6);
  free(index.data);
  double bias[64]; /* three levels, NaN, and an expert that no one should take */
  for (int e = 0; e < 64; e++) bias[e] = e % 9 == 4 ? (double)NAN : e % 11 == 3 ? -(double)INFINITY : e % 3;
  twin_set(b, &c.bias, bias);
  forward(b->cuda, &c);
  expect_choices(b, &c);
  twin_end(b);
}

static void replays_given_choices(void **state) {
  twin_bench *b = twin_begin(state);
  shape s = {50, 40, 16, 4, 4, 2, 2, true, true, 8};
  scene c = make_scene(b, &s);
  double choice[50 * 4];
  for (int i = 0; i < 200; i++) choice[i] = (i * 7 + i / 4) % 16;
  choice[4] = choice[5]; /* an expert named twice */
  twin_set(b, &c.index, choice);
  c.params.forced = true;
  forward(b->cuda, &c);
  twin_same_ints(b, "forced experts stay", &c.index);
  forward_cpu_forced(b, &c);
  twin_close(b, "weight", &c.weight, bar_scores);
  twin_same_ints(b, "load", &c.load);
  twin_close(b, "balance", &c.balance, bar_scores);
  check_backward(b, &c);
  twin_end(b);
}

static void large_logits_stay_finite(void **state) {
  twin_bench *b = twin_begin(state);
  shape s = {64, 64, 32, 4, 1, 1, 1, true, true, 0};
  scene c = make_scene(b, &s);
  twin_fill(b, &c.x, 7, 300, 0);
  check_forward(b, &c);
  check_backward(b, &c);
  twin_constant(b, &c.x, 1);
  twin_constant(b, &c.w, -20); /* every chosen score underflows: weights 0, not NaN */
  forward(b->cuda, &c);
  wn_tensor weight = twin_download(b, &c.weight.cuda);
  for (int64_t i = 0; i < 64 * 4; i++) assert_true(((float *)weight.data)[i] == 0);
  free(weight.data);
  twin_end(b);
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  shape s = {700, 128, 256, 8, 8, 4, 2, true, true, 0};
  scene c = make_scene(b, &s);
  const twin_out outs[] = {
      {&c.scores, false}, {&c.index, false}, {&c.weight, false}, {&c.load, true}, {&c.balance, true}};
  twin_repeats(b, forward, &c, outs, 5);
  const twin_out gradients[] = {{&c.dx, true}, {&c.dw, true}};
  twin_repeats(b, backward, &c, gradients, 2);
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(routes_as_the_cpu_does),       cmocka_unit_test(routes_the_real_width),
      cmocka_unit_test(dx_is_rounded_once),           cmocka_unit_test(balance_has_its_gradient),
      cmocka_unit_test(ties_go_to_the_lowest_expert), cmocka_unit_test(replays_given_choices),
      cmocka_unit_test(large_logits_stay_finite),     cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
