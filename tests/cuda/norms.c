/* RMSNorm and LayerNorm on the GPU against the CPU: every width class of the kernels (several rows a warp, a row a
 * block, too wide, odd), strided rows, accumulation, absent outputs. */
#include "support/twin.h"

typedef struct norm_case {
  int64_t n, width, margin;
  bool accumulate;
  wn_role dy_role;
  double deviation, mean, eps;
} norm_case;

typedef struct norms {
  twin y, stat, dx, dw, db, x, w, b, dy;
  wn_norm_params params;
} norms;

/* Sums in FP32 of BF16 operands, unrounded. */
static const double sums_bar = 5e-5;

static norms operands(twin_bench *b, const norm_case *c, bool layer) {
  norms o = {.params = {.eps = c->eps, .accumulate = c->accumulate}};
  o.x = twin_strided(b, WN_ACT, c->margin, 2, c->n, c->width, 0);
  twin_fill(b, &o.x, 1, c->deviation, c->mean);
  o.w = twin_tensor(b, WN_ACT, 1, c->width, 0, 0);
  twin_fill(b, &o.w, 2, 0.5, 1);
  o.b = twin_random(b, WN_ACT, 3, 1, 0, 1, c->width, 0, 0);
  o.dy = twin_random(b, c->dy_role, 4, 1, c->margin, 2, c->n, c->width, 0);
  o.y = twin_strided(b, WN_ACT, c->margin, 2, c->n, c->width, 0);
  o.stat = layer ? twin_tensor(b, WN_STAT, 2, c->n, 2, 0) : twin_tensor(b, WN_STAT, 1, c->n, 0, 0);
  o.dx = twin_random(b, WN_ACT, 5, 2, c->margin, 2, c->n, c->width, 0);
  o.dw = twin_random(b, WN_WGRAD, 6, 1, 0, 1, c->width, 0, 0);
  o.db = twin_random(b, WN_WGRAD, 7, 1, 0, 1, c->width, 0, 0);
  twin_poison(b, &o.y);
  twin_poison(b, &o.stat);
  if (!c->accumulate) twin_poison(b, &o.dx);
  return o;
}

static void rms(wn_device *d, norms *o, bool cuda, bool with_dw) {
#define OF(t) (cuda ? &(t).cuda : &(t).cpu)
  OK(d->ops->rms_norm(d, OF(o->y), OF(o->stat), OF(o->x), OF(o->w), &o->params));
  OK(d->ops->rms_norm_backward(d, OF(o->dx), with_dw ? OF(o->dw) : NULL, OF(o->dy), OF(o->x), OF(o->stat), OF(o->w),
                               &o->params));
}

static void layer(wn_device *d, norms *o, bool cuda, bool with_dx) {
  OK(d->ops->layer_norm(d, OF(o->y), OF(o->stat), OF(o->x), OF(o->w), OF(o->b), &o->params));
  OK(d->ops->layer_norm_backward(d, with_dx ? OF(o->dx) : NULL, OF(o->dw), OF(o->db), OF(o->dy), OF(o->x), OF(o->stat),
                                 OF(o->w), &o->params));
#undef OF
}

static void check(twin_bench *b, const norm_case *c, bool is_layer) {
  print_message("%s [%lld,%lld] margin %lld%s\n", is_layer ? "layer_norm" : "rms_norm", (long long)c->n,
                (long long)c->width, (long long)c->margin, c->accumulate ? ", accumulating" : "");
  norms o = operands(b, c, is_layer);
  for (int cuda = 0; cuda < 2; cuda++) {
    wn_device *d = cuda ? b->cuda : b->cpu;
    if (is_layer)
      layer(d, &o, cuda, true);
    else
      rms(d, &o, cuda, true);
  }
  twin_close(b, "y", &o.y, twin_bf16);
  twin_close(b, "stat", &o.stat, twin_f32);
  twin_close(b, "dx", &o.dx, twin_bf16);
  twin_close(b, "dw", &o.dw, sums_bar);
  if (is_layer) twin_close(b, "db", &o.db, sums_bar);
  twin_end(b);
}

/* Widths: one element; odd; two threads a row; a warp holds several rows; a row over several warps, with holes in the
 * last packs; the whole block; the widest packed and one more. Rows: fewer and more than the blocks there are. */
static const norm_case shapes[] = {
    {1, 1, 0, false, WN_ACT, 1.5, 0.7, 1e-3},       {3, 7, 0, true, WN_ACT, 1.5, 0.7, 1e-3},
    {5, 8, 0, false, WN_ACT, 1.5, 0.7, 1e-6},       {7, 64, 8, true, WN_ACT, 1.5, 0.7, 1e-6},
    {131, 129, 3, true, WN_ACT, 1.5, 0.7, 1e-6},    {197, 128, 5, false, WN_ACT, 1.5, 0.7, 1e-6},
    {40009, 128, 0, false, WN_ACT, 1.5, 0.7, 1e-6}, {67, 512, 64, true, WN_ACT, 1.5, 0.7, 1e-6},
    {2311, 512, 64, false, WN_ACT, 1.5, 0.7, 1e-6}, {37, 1000, 8, true, WN_ACT, 1.5, 0.7, 1e-6},
    {1201, 1536, 0, true, WN_ACT, 1.5, 0.7, 1e-6},  {601, 7168, 0, true, WN_ACT, 1.5, 0.7, 1e-6},
    {2, 7168, 8, false, WN_ACT, 1.5, 0.7, 1e-6},    {9, 8192, 0, false, WN_ACT, 1.5, 0.7, 1e-6},
    {133, 8200, 0, true, WN_ACT, 1.5, 0.7, 1e-6},
};
enum { N_SHAPES = sizeof shapes / sizeof *shapes };

static void rms_norm_agrees(void **state) {
  twin_bench *b = twin_begin(state);
  for (int i = 0; i < N_SHAPES; i++) check(b, &shapes[i], false);
}

static void layer_norm_agrees(void **state) {
  twin_bench *b = twin_begin(state);
  for (int i = 0; i < N_SHAPES; i++) check(b, &shapes[i], true);
}

/* The gradient of the indexer's keys arrives in FP32. */
static void layer_norm_takes_wide_gradients(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t sizes[][3] = {{1, 1, 0}, {131, 67, 1}, {1009, 128, 0}, {301, 2048, 4}, {17, 8192, 0}};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (int accumulate = 0; accumulate < 2; accumulate++)
      check(
          b,
          &(norm_case){sizes[i][0], sizes[i][1], sizes[i][2], accumulate == 1, WN_WGRAD, .deviation = 1.5, .eps = 1e-6},
          true);
}

/* Rows whose squares would leave BF16, rows that eps decides, a mean far from zero. */
static void extreme_rows(void **state) {
  twin_bench *b = twin_begin(state);
  const norm_case large = {67, 512, 0, false, WN_ACT, 1e6, 0, 1e-6}, tiny = {67, 512, 0, false, WN_ACT, 1e-4, 0, 1e-6},
                  shifted = {67, 512, 0, false, WN_ACT, 1, 100, 1e-6};
  for (int is_layer = 0; is_layer < 2; is_layer++) {
    check(b, &large, is_layer);
    check(b, &tiny, is_layer);
    check(b, &shifted, is_layer);
  }
}

/* A row of zeros has no direction: y 0 (or the bias), and a gradient of dy w / sqrt(eps). */
static void zero_rows(void **state) {
  twin_bench *b = twin_begin(state);
  for (int is_layer = 0; is_layer < 2; is_layer++)
    check(b, &(norm_case){5, 128, 0, false, WN_ACT, .deviation = 0, .eps = 1e-6}, is_layer);
}

static void outputs_may_be_absent(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t widths[] = {129, 256};
  for (int i = 0; i < 2; i++) {
    const norm_case c = {.n = 71, .width = widths[i], .deviation = 1, .eps = 1e-6, .accumulate = true};
    norms o = operands(b, &c, false);
    rms(b->cpu, &o, false, false);
    rms(b->cuda, &o, true, false);
    twin_close(b, "dx without dw", &o.dx, twin_bf16);
    twin_close(b, "dw as it was", &o.dw, 0);
    twin_end(b);
    o = operands(b, &c, true);
    layer(b->cpu, &o, false, false);
    layer(b->cuda, &o, true, false);
    twin_close(b, "dx as it was", &o.dx, 0);
    twin_close(b, "dw without dx", &o.dw, sums_bar);
    twin_close(b, "db without dx", &o.db, sums_bar);
    twin_end(b);
  }
}

static void no_rows_change_nothing(void **state) {
  twin_bench *b = twin_begin(state);
  const norm_case c = {.n = 0, .width = 64, .deviation = 1, .eps = 1e-6, .accumulate = true};
  norms o = operands(b, &c, false);
  rms(b->cpu, &o, false, true);
  rms(b->cuda, &o, true, true);
  twin_close(b, "dw", &o.dw, 0);
  twin_end(b);
  o = operands(b, &c, true);
  layer(b->cpu, &o, false, true);
  layer(b->cuda, &o, true, true);
  twin_close(b, "dw", &o.dw, 0);
  twin_close(b, "db", &o.db, 0);
  twin_end(b);
}

/* What stands between the rows stays. */
static void margins_stay(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t widths[] = {61, 64, 1536};
  for (int i = 0; i < 3; i++) {
    const norm_case c = {.n = 33, .width = widths[i], .deviation = 1, .eps = 1e-6};
    norms o = operands(b, &c, false);
    twin y = twin_random(b, WN_ACT, 11, 1, 0, 2, 33, widths[i] + 16, 0),
         dx = twin_random(b, WN_ACT, 12, 1, 0, 2, 33, widths[i] + 16, 0);
    o.y = twin_slice(y, 1, 8, widths[i]);
    o.dx = twin_slice(dx, 1, 8, widths[i]);
    rms(b->cpu, &o, false, true);
    rms(b->cuda, &o, true, true);
    twin_close(b, "y and what surrounds it", &y, twin_bf16);
    twin_close(b, "dx and what surrounds it", &dx, twin_bf16);
    twin y_left = twin_slice(y, 1, 0, 8), y_right = twin_slice(y, 1, widths[i] + 8, 8);
    twin dx_left = twin_slice(dx, 1, 0, 8), dx_right = twin_slice(dx, 1, widths[i] + 8, 8);
    twin_close(b, "left of y", &y_left, 0);
    twin_close(b, "right of y", &y_right, 0);
    twin_close(b, "left of dx", &dx_left, 0);
    twin_close(b, "right of dx", &dx_right, 0);
    twin_end(b);
  }
}

static void run_rms(wn_device *d, void *context) {
  rms(d, context, true, true);
}
static void run_layer(wn_device *d, void *context) {
  layer(d, context, true, true);
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t sizes[][2] = {{5003, 128}, {701, 1536}, {301, 7168}, {301, 129}};
  for (int i = 0; i < 4; i++)
    for (int is_layer = 0; is_layer < 2; is_layer++) {
      const norm_case c = {.n = sizes[i][0], .width = sizes[i][1], .deviation = 1, .eps = 1e-6};
      norms o = operands(b, &c, is_layer);
      const twin_out outs[] = {{&o.y, false}, {&o.stat, false}, {&o.dx, false}, {&o.dw, true}, {&o.db, true}};
      twin_repeats(b, is_layer ? run_layer : run_rms, &o, outs, 5);
      twin_end(b);
    }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(rms_norm_agrees),
      cmocka_unit_test(layer_norm_agrees),
      cmocka_unit_test(layer_norm_takes_wide_gradients),
      cmocka_unit_test(extreme_rows),
      cmocka_unit_test(zero_rows),
      cmocka_unit_test(outputs_may_be_absent),
      cmocka_unit_test(no_rows_change_nothing),
      cmocka_unit_test(margins_stay),
      cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
