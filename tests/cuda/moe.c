/* Moving rows to their experts and back on the GPU: places, offsets and copies exactly, sums within rounding. */
#include "support/twin.h"

typedef struct shape {
  int64_t n, n_choices, width, margin;
  int32_t n_experts, kind; /* kind: how rows choose */
} shape;
enum { SPREAD, ONE_EXPERT, HALF_UNUSED, SORTED };

typedef struct scene {
  twin x, index, xp, slot, y, yp, weight, dx, dxp, dy, dyp, dweight;
  int64_t offset[1025], offset_cpu[1025];
  int32_t n_experts;
} scene;

/* Distinct experts of a row, but where there is only one. */
static int32_t expert_of(const shape *s, int64_t row, int64_t choice) {
  int64_t e = s->n_experts, spread = (row * 131 + row / 7 * 17) % e;
  if (s->kind == ONE_EXPERT) return (int32_t)(e - 1);
  if (s->kind == SORTED) return (int32_t)((row * e / s->n + choice) % e);
  int64_t pick = (spread + choice * (e / s->n_choices > 0 ? e / s->n_choices : 1)) % e;
  return (int32_t)(s->kind == HALF_UNUSED ? pick / 2 * 2 : pick);
}

static scene make_scene(twin_bench *b, const shape *s) {
  scene c = {.n_experts = s->n_experts};
  int64_t n = s->n, pairs = n * s->n_choices, width = s->width, m = s->margin;
  double *index = malloc((size_t)pairs * sizeof *index);
  assert_non_null(index);
  for (int64_t i = 0; i < pairs; i++) index[i] = expert_of(s, i / s->n_choices, i % s->n_choices);
  c.index = twin_strided(b, WN_INDEX, m, 2, n, s->n_choices, 0);
  twin_set(b, &c.index, index);
  free(index);
  c.x = twin_random(b, WN_ACT, 1, 1, m, 2, n, width, 0);
  c.xp = twin_strided(b, WN_ACT, m, 2, pairs, width, 0);
  c.slot = twin_tensor(b, WN_INDEX, 1, pairs, 0, 0);
  c.y = twin_random(b, WN_ACT, 2, 1, m, 2, n, width, 0);
  c.yp = twin_random(b, WN_ACT, 3, 1, m, 2, pairs, width, 0);
  c.weight = twin_random(b, WN_STAT, 4, 0.5, m, 2, n, s->n_choices, 0);
  c.dx = twin_random(b, WN_ACT, 5, 1, m, 2, n, width, 0);
  c.dxp = twin_random(b, WN_ACT, 6, 1, m, 2, pairs, width, 0);
  c.dy = twin_random(b, WN_ACT, 7, 1, m, 2, n, width, 0);
  c.dyp = twin_strided(b, WN_ACT, m, 2, pairs, width, 0);
  c.dweight = twin_strided(b, WN_STAT, m, 2, n, s->n_choices, 0);
  twin_poison(b, &c.xp);
  twin_poison(b, &c.slot);
  twin_poison(b, &c.dyp);
  twin_poison(b, &c.dweight);
  memset(c.offset, 0xff, sizeof c.offset);
  return c;
}

static void run(wn_device *d, void *context) {
  scene *c = context;
  OK(d->ops->moe_permute(d, &c->xp.cuda, &c->slot.cuda, c->offset, &c->x.cuda, &c->index.cuda, c->n_experts));
  OK(d->ops->moe_permute_backward(d, &c->dx.cuda, &c->dxp.cuda, &c->slot.cuda));
  OK(d->ops->moe_combine(d, &c->y.cuda, &c->yp.cuda, &c->slot.cuda, &c->weight.cuda));
  OK(d->ops->moe_combine_backward(d, &c->dyp.cuda, &c->dweight.cuda, &c->dy.cuda, &c->yp.cuda, &c->slot.cuda,
                                  &c->weight.cuda));
}

static void check(twin_bench *b, const shape *s) {
  scene c = make_scene(b, s);
  wn_device *d = b->cpu;
  run(b->cuda, &c);
  OK(d->ops->moe_permute(d, &c.xp.cpu, &c.slot.cpu, c.offset_cpu, &c.x.cpu, &c.index.cpu, c.n_experts));
  OK(d->ops->moe_permute_backward(d, &c.dx.cpu, &c.dxp.cpu, &c.slot.cpu));
  OK(d->ops->moe_combine(d, &c.y.cpu, &c.yp.cpu, &c.slot.cpu, &c.weight.cpu));
  OK(d->ops->moe_combine_backward(d, &c.dyp.cpu, &c.dweight.cpu, &c.dy.cpu, &c.yp.cpu, &c.slot.cpu, &c.weight.cpu));
  for (int32_t e = 0; e <= c.n_experts; e++)
    if (c.offset[e] != c.offset_cpu[e])
      fail_msg("offset %d is %lld, the CPU has %lld", e, (long long)c.offset[e], (long long)c.offset_cpu[e]);
  twin_same_ints(b, "slot", &c.slot);
  twin_close(b, "permuted rows", &c.xp, 0);
  twin_close(b, "dx", &c.dx, twin_bf16);
  twin_close(b, "combined", &c.y, twin_bf16);
  twin_close(b, "dyp", &c.dyp, twin_bf16);
  twin_close(b, "dweight", &c.dweight, twin_f32);
}

static const shape shapes[] = {
    {1, 1, 8, 0, 1, SPREAD},        {1, 8, 7168, 0, 256, SPREAD},    {5, 2, 7, 3, 3, SPREAD},
    {300, 8, 64, 0, 256, SPREAD},   {257, 4, 40, 8, 16, SPREAD},     {1000, 1, 24, 0, 1024, SPREAD},
    {333, 16, 9, 1, 31, SPREAD},    {129, 11, 136, 0, 64, SORTED},   {700, 1, 16, 8, 12, ONE_EXPERT},
    {211, 3, 72, 4, 9, ONE_EXPERT}, {640, 4, 32, 0, 8, HALF_UNUSED}, {97, 9, 1032, 8, 300, SPREAD},
};

static void moves_as_the_cpu_does(void **state) {
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
    twin_bench *b = twin_begin(state);
    check(b, &shapes[i]);
    twin_end(b);
  }
}

/* More warps of pairs than one round of a scan holds. */
static void sorts_many_pairs(void **state) {
  twin_bench *b = twin_begin(state);
  check(b, &(shape){40009, 8, 8, 0, 256, SPREAD});
  twin_end(b);
  b = twin_begin(state);
  check(b, &(shape){40009, 8, 8, 0, 700, SORTED});
  twin_end(b);
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  shape s = {900, 8, 256, 0, 256, SPREAD};
  scene c = make_scene(b, &s);
  const twin_out outs[] = {{&c.xp, false}, {&c.slot, false}, {&c.dx, true},
                           {&c.y, true},   {&c.dyp, false},  {&c.dweight, false}};
  twin_repeats(b, run, &c, outs, 6);
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(moves_as_the_cpu_does),
      cmocka_unit_test(sorts_many_pairs),
      cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
