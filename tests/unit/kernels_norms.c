/* Norms, rope and the elementwise operations against plain FP64 loops; backwards are checked against the closed form
 * here and against finite differences in tests/gradient. */
#include "support/cpu.h"

enum { MARGIN = 3 };

typedef struct norms {
  wn_tensor y, stat, dx, dw, db, x, w, b, dy;
  wn_norm_params params;
} norms;

static void run_rms(wn_device *d, void *context) {
  norms *c = context;
  OK(d->ops->rms_norm(d, &c->y, &c->stat, &c->x, &c->w, &c->params));
  OK(d->ops->rms_norm_backward(d, &c->dx, &c->dw, &c->dy, &c->x, &c->stat, &c->w, &c->params));
}

static void run_layer(wn_device *d, void *context) {
  norms *c = context;
  OK(d->ops->layer_norm(d, &c->y, &c->stat, &c->x, &c->w, &c->b, &c->params));
  OK(d->ops->layer_norm_backward(d, &c->dx, &c->dw, &c->db, &c->dy, &c->x, &c->stat, &c->w, &c->params));
}

static norms operands(wn_device *d, int64_t n, int64_t width, bool accumulate) {
  norms c = {.params = {.eps = 1e-3, .accumulate = accumulate}};
  c.x = wn_test_random(d, WN_F32, 1, 1.5, MARGIN, 2, n, width, 0);
  for (int64_t i = 0; i < wn_tensor_count(&c.x); i++) wn_test_set(&c.x, i, wn_test_get(&c.x, i) + 0.7);
  c.w = wn_test_random(d, WN_F32, 2, 1, 0, 1, width, 0, 0);
  c.b = wn_test_random(d, WN_F32, 3, 1, 0, 1, width, 0, 0);
  c.dy = wn_test_random(d, WN_F32, 4, 1, MARGIN, 2, n, width, 0);
  c.y = wn_test_strided(d, WN_F32, MARGIN, 2, n, width, 0);
  c.dx = wn_test_strided(d, WN_F32, MARGIN, 2, n, width, 0);
  c.dw = wn_test_tensor(d, WN_F32, 1, width, 0, 0);
  c.db = wn_test_tensor(d, WN_F32, 1, width, 0, 0);
  return c;
}

static double *before(wn_device *d, wn_tensor *t, bool accumulated) {
  double *values = wn_test_before(d, &(wn_test_out){t, true});
  for (int64_t i = 0; !accumulated && i < wn_tensor_count(t); i++) values[i] = 0;
  return values;
}

static void check_rms(wn_device *d, int64_t n, int64_t width, bool accumulate) {
  size_t mark = wn_arena_mark(d->stash);
  norms c = operands(d, n, width, accumulate);
  c.stat = wn_test_tensor(d, WN_F32, 1, n, 0, 0);
  double *y = before(d, &c.y, false), *r = before(d, &c.stat, false), *dx = before(d, &c.dx, accumulate),
         *dw = before(d, &c.dw, true);
  const double *x = wn_test_doubles(d, &c.x), *w = wn_test_doubles(d, &c.w), *dy = wn_test_doubles(d, &c.dy);
  for (int64_t i = 0; i < n; i++) {
    const double *xi = x + i * width, *gi = dy + i * width;
    double squares = 0, dot = 0;
    for (int64_t j = 0; j < width; j++) squares += xi[j] * xi[j] / (double)width;
    r[i] = 1 / sqrt(squares + 1e-3);
    for (int64_t j = 0; j < width; j++) {
      y[i * width + j] = xi[j] * r[i] * w[j];
      dw[j] += gi[j] * xi[j] * r[i];
      dot += gi[j] * w[j] * xi[j] / (double)width;
    }
    for (int64_t j = 0; j < width; j++) dx[i * width + j] += r[i] * (w[j] * gi[j] - xi[j] * r[i] * r[i] * dot);
  }
  const wn_test_out outs[] = {{&c.y, false}, {&c.stat, false}, {&c.dx, accumulate}, {&c.dw, true}};
  wn_test_repeats(d, run_rms, &c, outs, 4);
  wn_test_close_to("y", &c.y, y, 1e-6, 1e-6);
  wn_test_close_to("r", &c.stat, r, 0, 1e-6);
  wn_test_close_to("dx", &c.dx, dx, 3e-6, 1e-5);
  wn_test_close_to("dw", &c.dw, dw, 1e-5, 1e-5);
  wn_test_margin_untouched(&c.y, MARGIN);
  wn_test_margin_untouched(&c.dx, MARGIN);
  /* without dw: the same dx */
  wn_tensor again = wn_test_tensor(d, WN_F32, 2, n, width, 0);
  wn_test_prepare(&(wn_test_out){&again, accumulate});
  OK(d->ops->rms_norm_backward(d, &again, NULL, &c.dy, &c.x, &c.stat, &c.w, &c.params));
  wn_test_close("dx without dw", &again, &c.dx, 0, 0);
  wn_arena_release(d->stash, mark);
}

static void check_layer(wn_device *d, int64_t n, int64_t width, bool accumulate) {
  size_t mark = wn_arena_mark(d->stash);
  norms c = operands(d, n, width, accumulate);
  c.stat = wn_test_tensor(d, WN_F32, 2, n, 2, 0);
  double *y = before(d, &c.y, false), *stat = before(d, &c.stat, false), *dx = before(d, &c.dx, accumulate),
         *dw = before(d, &c.dw, true), *db = before(d, &c.db, true);
  const double *x = wn_test_doubles(d, &c.x), *w = wn_test_doubles(d, &c.w), *b = wn_test_doubles(d, &c.b),
               *dy = wn_test_doubles(d, &c.dy);
  for (int64_t i = 0; i < n; i++) {
    const double *xi = x + i * width, *gi = dy + i * width;
    double mean = 0, variance = 0, g_mean = 0, g_dot = 0;
    for (int64_t j = 0; j < width; j++) mean += xi[j] / (double)width;
    for (int64_t j = 0; j < width; j++) variance += (xi[j] - mean) * (xi[j] - mean) / (double)width;
    double r = 1 / sqrt(variance + 1e-3);
    stat[2 * i] = mean;
    stat[2 * i + 1] = r;
    for (int64_t j = 0; j < width; j++) {
      double hat = (xi[j] - mean) * r, g = gi[j] * w[j];
      y[i * width + j] = hat * w[j] + b[j];
      dw[j] += gi[j] * hat;
      db[j] += gi[j];
      g_mean += g / (double)width;
      g_dot += g * hat / (double)width;
    }
    for (int64_t j = 0; j < width; j++) dx[i * width + j] += r * (gi[j] * w[j] - g_mean - (xi[j] - mean) * r * g_dot);
  }
  const wn_test_out outs[] = {{&c.y, false}, {&c.stat, false}, {&c.dx, accumulate}, {&c.dw, true}, {&c.db, true}};
  wn_test_repeats(d, run_layer, &c, outs, 5);
  wn_test_close_to("y", &c.y, y, 3e-5, 1e-6);
  wn_test_close_to("stat", &c.stat, stat, 1e-6, 1e-6);
  wn_test_close_to("dx", &c.dx, dx, 1e-4, 1e-5);
  wn_test_close_to("dw", &c.dw, dw, 3e-5, 1e-5);
  wn_test_close_to("db", &c.db, db, 1e-5, 1e-5);
  wn_test_margin_untouched(&c.dx, MARGIN);
  wn_tensor dw_kept = wn_test_tensor(d, WN_F32, 1, width, 0, 0);
  wn_test_prepare(&(wn_test_out){&dw_kept, true});
  wn_test_prepare(&(wn_test_out){&c.db, true});
  OK(d->ops->layer_norm_backward(d, NULL, &dw_kept, &c.db, &c.dy, &c.x, &c.stat, &c.w, &c.params));
  wn_test_close("dw without dx", &dw_kept, &c.dw, 0, 0);
  wn_arena_release(d->stash, mark);
}

static void test_norms(void **state) {
  const int64_t shapes[][2] = {{1, 1}, {1, 67}, {131, 1}, {197, 129}, {64, 256}};
  for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++)
    for (int accumulate = 0; accumulate < 2; accumulate++) {
      check_rms(*state, shapes[i][0], shapes[i][1], accumulate);
      check_layer(*state, shapes[i][0], shapes[i][1], accumulate);
    }
}

static void check_rope(wn_device *d, int64_t heads, int64_t width, bool interleaved) {
  enum { N = 7 };
  static const int32_t position[N] = {0, 1, 2, 17, 4095, 99991, 131071};
  size_t mark = wn_arena_mark(d->stash);
  float inv_freq[128];
  int64_t half = width / 2;
  for (int64_t j = 0; j < half; j++) inv_freq[j] = (float)pow(10000.0, -(double)(2 * j) / (double)width);
  wn_tensor x = wn_test_random(d, WN_F32, 1, 1, MARGIN, 3, N, heads, width);
  double *from = wn_test_doubles(d, &x), *to = wn_test_doubles(d, &x);
  for (int64_t i = 0; i < N; i++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t j = 0; j < half; j++) {
        float angle = (float)position[i] * inv_freq[j];
        int64_t row = (i * heads + h) * width, low = interleaved ? 2 * j : j, high = interleaved ? 2 * j + 1 : j + half;
        double c = cos((double)angle), s = sin((double)angle), a = from[row + low], b = from[row + high];
        to[row + low] = a * c - b * s;
        to[row + high] = a * s + b * c;
      }
  wn_rope_params params = {.inv_freq = inv_freq, .interleaved = interleaved};
  OK(d->ops->rope(d, &x, position, &params));
  wn_test_close_to("rope", &x, to, 1e-6, 1e-6);
  wn_test_margin_untouched(&x, MARGIN);
  params.inverse = true;
  OK(d->ops->rope(d, &x, position, &params));
  wn_test_close_to("rope and back", &x, from, 1e-6, 1e-6);
  wn_arena_release(d->stash, mark);
}

static void test_rope(void **state) {
  for (int interleaved = 0; interleaved < 2; interleaved++) {
    check_rope(*state, 1, 2, interleaved);
    check_rope(*state, 3, 64, interleaved);
    check_rope(*state, 2, 202, interleaved); /* more angles than one block of the implementation */
  }
}

typedef struct elementwise {
  wn_tensor a, b, dy, sum, scaled, y, da, db, heads, folded, wide;
  bool accumulate;
} elementwise;

static void run_elementwise(wn_device *d, void *context) {
  elementwise *c = context;
  OK(d->ops->add(d, &c->sum, &c->a, &c->b));
  OK(d->ops->scale(d, &c->scaled, &c->a, -1.75));
  OK(d->ops->swiglu(d, &c->y, &c->a, &c->b));
  OK(d->ops->swiglu_backward(d, &c->da, &c->db, &c->dy, &c->a, &c->b));
  OK(d->ops->sum_heads(d, &c->folded, &c->heads, &(wn_accumulate){c->accumulate}));
  OK(d->ops->broadcast_heads(d, &c->wide, &c->a));
}

static void check_elementwise(wn_device *d, int64_t n, int64_t heads, int64_t width, bool accumulate) {
  size_t mark = wn_arena_mark(d->stash);
  elementwise c = {.accumulate = accumulate};
  wn_tensor *flat[] = {&c.sum, &c.scaled, &c.y, &c.da, &c.db, &c.folded};
  c.a = wn_test_random(d, WN_F32, 1, 3, MARGIN, 2, n, width, 0);
  c.b = wn_test_random(d, WN_F32, 2, 1, MARGIN, 2, n, width, 0);
  c.dy = wn_test_random(d, WN_F32, 3, 1, MARGIN, 2, n, width, 0);
  c.heads = wn_test_random(d, WN_F32, 4, 1, MARGIN, 3, n, heads, width);
  for (int i = 0; i < 6; i++) *flat[i] = wn_test_strided(d, WN_F32, MARGIN, 2, n, width, 0);
  c.wide = wn_test_strided(d, WN_F32, MARGIN, 3, n, heads, width);
  wn_test_set(&c.a, 0, 120); /* exp overflows in FP32 for the gate's opposite */
  if (wn_tensor_count(&c.a) > 1) wn_test_set(&c.a, 1, -120);
  double *expected[6], *wide = wn_test_doubles(d, &c.wide), *folded = before(d, &c.folded, accumulate);
  for (int i = 0; i < 5; i++) expected[i] = wn_test_doubles(d, flat[i]);
  expected[5] = folded;
  for (int64_t i = 0; i < n * width; i++) {
    double a = wn_test_get(&c.a, i), b = wn_test_get(&c.b, i), dy = wn_test_get(&c.dy, i), s = 1 / (1 + exp(-a));
    expected[0][i] = a + b;
    expected[1][i] = -1.75 * a;
    expected[2][i] = a * s * b;
    expected[3][i] = dy * b * (s + a * s * (1 - s));
    expected[4][i] = dy * a * s;
    for (int64_t h = 0; h < heads; h++) {
      int64_t at = (i / width * heads + h) * width + i % width;
      folded[i] += wn_test_get(&c.heads, at);
      wide[at] = a;
    }
  }
  wn_test_out outs[7] = {{&c.wide, false}};
  for (int i = 0; i < 6; i++) outs[1 + i] = (wn_test_out){flat[i], i == 5 && accumulate};
  wn_test_repeats(d, run_elementwise, &c, outs, 7);
  const char *names[] = {"add", "scale", "swiglu", "dgate", "dup", "sum_heads"};
  for (int i = 0; i < 6; i++) wn_test_close_to(names[i], flat[i], expected[i], 2e-6, 2e-6);
  wn_test_close_to("broadcast_heads", &c.wide, wide, 0, 0);
  for (int i = 0; i < 6; i++) wn_test_margin_untouched(flat[i], MARGIN);
  /* results on top of operands */
  OK(d->ops->add(d, &c.sum, &c.sum, &c.b));
  for (int64_t i = 0; i < n * width; i++) expected[0][i] += wn_test_get(&c.b, i);
  wn_test_close_to("add in place", &c.sum, expected[0], 2e-6, 2e-6);
  OK(d->ops->swiglu_backward(d, &c.a, &c.b, &c.dy, &c.a, &c.b));
  wn_test_close("dgate in place", &c.a, &c.da, 0, 0);
  wn_test_close("dup in place", &c.b, &c.db, 0, 0);
  wn_arena_release(d->stash, mark);
}

static void test_elementwise(void **state) {
  check_elementwise(*state, 1, 1, 1, false);
  check_elementwise(*state, 67, 3, 13, true);
  check_elementwise(*state, 3, 2, 33001, false); /* rows longer than one piece of work */
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
      cmocka_unit_test(test_norms),
      cmocka_unit_test(test_rope),
      cmocka_unit_test(test_elementwise),
  };
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
