/* Products against plain FP64 loops: odd shapes, strided operands, accumulation, garbage in what is overwritten, and
 * equal bits for any number of threads. Also memory: zero, cast, upload, download. */
#include "support/cpu.h"

enum { MARGIN = 5 };

typedef struct products {
  wn_tensor y, dx, dw, x, w, dy;
  bool accumulate;
} products;

static void run_linear(wn_device *d, void *context) {
  products *c = context;
  const wn_accumulate params = {c->accumulate};
  OK(d->ops->linear(d, &c->y, &c->x, &c->w, &params));
  OK(d->ops->linear_backward_input(d, &c->dx, &c->dy, &c->w, &params));
  OK(d->ops->linear_backward_weight(d, &c->dw, &c->dy, &c->x));
}

/* c[m,n] += a[i*as0 + k*as1] b[k*bs0 + j*bs1] */
static void multiply(double *c, const double *a, int64_t as0, int64_t as1, const double *b, int64_t bs0, int64_t bs1,
                     int64_t m, int64_t n, int64_t k) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t l = 0; l < k; l++)
      for (int64_t j = 0; j < n; j++) c[i * n + j] += a[i * as0 + l * as1] * b[l * bs0 + j * bs1];
}

static double *started(wn_device *d, wn_tensor *t, bool accumulated) {
  wn_test_out out = {t, true};
  double *values = wn_test_before(d, &out);
  for (int64_t i = 0; !accumulated && i < wn_tensor_count(t); i++) values[i] = 0;
  return values;
}

static void check_linear(wn_device *d, int64_t n, int64_t inputs, int64_t outputs, bool accumulate) {
  size_t mark = wn_arena_mark(d->stash);
  products c = {.accumulate = accumulate};
  c.x = wn_test_random(d, WN_F32, 1, 1, MARGIN, 2, n, inputs, 0);
  c.w = wn_test_random(d, WN_F32, 2, 1, MARGIN, 2, outputs, inputs, 0);
  c.dy = wn_test_random(d, WN_F32, 3, 1, MARGIN, 2, n, outputs, 0);
  c.y = wn_test_strided(d, WN_F32, MARGIN, 2, n, outputs, 0);
  c.dx = wn_test_strided(d, WN_F32, MARGIN, 2, n, inputs, 0);
  c.dw = wn_test_strided(d, WN_F32, MARGIN, 2, outputs, inputs, 0);
  double *y = started(d, &c.y, accumulate), *dx = started(d, &c.dx, accumulate), *dw = started(d, &c.dw, true);
  const double *x = wn_test_doubles(d, &c.x), *w = wn_test_doubles(d, &c.w), *dy = wn_test_doubles(d, &c.dy);
  multiply(y, x, inputs, 1, w, 1, inputs, n, outputs, inputs);
  multiply(dx, dy, outputs, 1, w, inputs, 1, n, inputs, outputs);
  multiply(dw, dy, 1, outputs, x, inputs, 1, outputs, inputs, n);
  const wn_test_out outs[] = {{&c.y, accumulate}, {&c.dx, accumulate}, {&c.dw, true}};
  wn_test_repeats(d, run_linear, &c, outs, 3);
  wn_test_close_to("y", &c.y, y, 4e-6 * sqrt((double)inputs), 1e-5);
  wn_test_close_to("dx", &c.dx, dx, 4e-6 * sqrt((double)outputs), 1e-5);
  wn_test_close_to("dw", &c.dw, dw, 4e-6 * sqrt((double)n), 1e-5);
  wn_test_margin_untouched(&c.y, MARGIN);
  wn_test_margin_untouched(&c.dx, MARGIN);
  wn_test_margin_untouched(&c.dw, MARGIN);
  wn_arena_release(d->stash, mark);
}

static void test_linear(void **state) {
  wn_device *d = *state;
  const int64_t shapes[][3] = {{1, 1, 1}, {1, 37, 5}, {129, 1, 67}, {67, 131, 257}, {513, 64, 130}, {300, 48, 1100}};
  for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
    check_linear(d, shapes[i][0], shapes[i][1], shapes[i][2], false);
    check_linear(d, shapes[i][0], shapes[i][1], shapes[i][2], true);
  }
}

static void test_no_rows(void **state) {
  wn_device *d = *state;
  products c = {.accumulate = false};
  c.x = wn_test_tensor(d, WN_F32, 2, 0, 7, 0);
  c.w = wn_test_random(d, WN_F32, 2, 1, 0, 2, 3, 7, 0);
  c.dy = wn_test_tensor(d, WN_F32, 2, 0, 3, 0);
  c.y = c.dy;
  c.dx = c.x;
  c.dw = wn_test_random(d, WN_F32, 4, 1, 0, 2, 3, 7, 0);
  double *before = wn_test_doubles(d, &c.dw);
  run_linear(d, &c);
  wn_test_close_to("dw of no rows", &c.dw, before, 0, 1e-7);
}

/* One product a head, against the same loops; heads interleave with a margin between them. */
static void run_heads(wn_device *d, void *context) {
  products *c = context;
  const wn_per_head_params plain = {.transpose = false, .accumulate = c->accumulate};
  const wn_per_head_params transposed = {.transpose = true, .accumulate = c->accumulate};
  OK(d->ops->per_head_linear(d, &c->y, &c->x, &c->w, &plain));
  OK(d->ops->per_head_linear(d, &c->dx, &c->dy, &c->w, &transposed));
  OK(d->ops->per_head_linear_backward_weight(d, &c->dw, &c->x, &c->dy));
}

static void check_heads(wn_device *d, int64_t n, int64_t heads, int64_t rows, int64_t cols, bool accumulate) {
  size_t mark = wn_arena_mark(d->stash);
  products c = {.accumulate = accumulate};
  c.x = wn_test_random(d, WN_F32, 1, 1, MARGIN, 3, n, heads, rows);
  c.w = wn_test_random(d, WN_F32, 2, 1, MARGIN, 3, heads, rows, cols);
  c.dy = wn_test_random(d, WN_F32, 3, 1, MARGIN, 3, n, heads, cols);
  c.y = wn_test_strided(d, WN_F32, MARGIN, 3, n, heads, cols);
  c.dx = wn_test_strided(d, WN_F32, MARGIN, 3, n, heads, rows);
  c.dw = wn_test_strided(d, WN_F32, MARGIN, 3, heads, rows, cols);
  double *y = started(d, &c.y, accumulate), *dx = started(d, &c.dx, accumulate), *dw = started(d, &c.dw, true);
  const double *x = wn_test_doubles(d, &c.x), *w = wn_test_doubles(d, &c.w), *dy = wn_test_doubles(d, &c.dy);
  for (int64_t i = 0; i < n; i++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t r = 0; r < rows; r++)
        for (int64_t l = 0; l < cols; l++) {
          double wv = w[(h * rows + r) * cols + l], xv = x[(i * heads + h) * rows + r],
                 dv = dy[(i * heads + h) * cols + l];
          y[(i * heads + h) * cols + l] += xv * wv;
          dx[(i * heads + h) * rows + r] += dv * wv;
          dw[(h * rows + r) * cols + l] += xv * dv;
        }
  const wn_test_out outs[] = {{&c.y, accumulate}, {&c.dx, accumulate}, {&c.dw, true}};
  wn_test_repeats(d, run_heads, &c, outs, 3);
  wn_test_close_to("y", &c.y, y, 5e-5, 1e-5);
  wn_test_close_to("dx", &c.dx, dx, 5e-5, 1e-5);
  wn_test_close_to("dw", &c.dw, dw, 5e-5, 1e-5);
  wn_test_margin_untouched(&c.y, MARGIN);
  wn_test_margin_untouched(&c.dx, MARGIN);
  wn_test_margin_untouched(&c.dw, MARGIN);
  wn_arena_release(d->stash, mark);
}

static void test_per_head(void **state) {
  wn_device *d = *state;
  for (int accumulate = 0; accumulate < 2; accumulate++) {
    check_heads(d, 1, 1, 1, 1, accumulate);
    check_heads(d, 131, 3, 17, 29, accumulate);
    check_heads(d, 70, 2, 129, 31, accumulate);
  }
}

typedef struct experts {
  wn_tensor y, dx, x, dy, w[4], dw[4];
  int64_t offset[5];
  bool accumulate;
} experts;

static void run_experts(wn_device *d, void *context) {
  experts *c = context;
  const wn_accumulate params = {c->accumulate};
  OK(d->ops->grouped_linear(d, &c->y, &c->x, c->w, 4, c->offset, &params));
  OK(d->ops->grouped_linear_backward_input(d, &c->dx, &c->dy, c->w, 4, c->offset, &params));
  OK(d->ops->grouped_linear_backward_weight(d, c->dw, &c->dy, &c->x, 4, c->offset));
}

/* Experts with 0, 1 and many rows; expert 2 gets none and its gradient must keep what it held. */
static void check_grouped(wn_device *d, bool accumulate) {
  enum { INPUTS = 23, OUTPUTS = 37, ROWS = 211 };
  experts c = {.offset = {0, 70, 71, 71, ROWS}, .accumulate = accumulate};
  size_t mark = wn_arena_mark(d->stash);
  c.x = wn_test_random(d, WN_F32, 1, 1, MARGIN, 2, ROWS, INPUTS, 0);
  c.dy = wn_test_random(d, WN_F32, 3, 1, MARGIN, 2, ROWS, OUTPUTS, 0);
  c.y = wn_test_strided(d, WN_F32, MARGIN, 2, ROWS, OUTPUTS, 0);
  c.dx = wn_test_strided(d, WN_F32, MARGIN, 2, ROWS, INPUTS, 0);
  wn_test_out outs[6] = {{&c.y, accumulate}, {&c.dx, accumulate}};
  double *y = started(d, &c.y, accumulate), *dx = started(d, &c.dx, accumulate), *dw[4];
  const double *x = wn_test_doubles(d, &c.x), *dy = wn_test_doubles(d, &c.dy);
  for (int e = 0; e < 4; e++) {
    c.w[e] = wn_test_random(d, WN_F32, 10 + (uint64_t)e, 1, MARGIN, 2, OUTPUTS, INPUTS, 0);
    c.dw[e] = wn_test_strided(d, WN_F32, MARGIN, 2, OUTPUTS, INPUTS, 0);
    outs[2 + e] = (wn_test_out){&c.dw[e], true};
    dw[e] = started(d, &c.dw[e], true);
    const double *w = wn_test_doubles(d, &c.w[e]);
    int64_t from = c.offset[e], rows = c.offset[e + 1] - from;
    multiply(y + from * OUTPUTS, x + from * INPUTS, INPUTS, 1, w, 1, INPUTS, rows, OUTPUTS, INPUTS);
    multiply(dx + from * INPUTS, dy + from * OUTPUTS, OUTPUTS, 1, w, INPUTS, 1, rows, INPUTS, OUTPUTS);
    multiply(dw[e], dy + from * OUTPUTS, 1, OUTPUTS, x + from * INPUTS, INPUTS, 1, OUTPUTS, INPUTS, rows);
  }
  wn_test_repeats(d, run_experts, &c, outs, 6);
  wn_test_close_to("y", &c.y, y, 1e-4, 1e-5);
  wn_test_close_to("dx", &c.dx, dx, 1e-4, 1e-5);
  for (int e = 0; e < 4; e++) wn_test_close_to("dw", &c.dw[e], dw[e], 1e-4, 1e-5);
  wn_arena_release(d->stash, mark);
}

static void test_grouped(void **state) {
  check_grouped(*state, false);
  check_grouped(*state, true);
}

static void test_cast(void **state) {
  wn_device *d = *state;
  /* to BF16: ties go to the even neighbour; from FP64 a bit far below FP32's last must still break a tie */
  const struct {
    double from;
    uint16_t bits;
  } cases[] = {
      {1.0, 0x3f80},
      {1.00390625, 0x3f80}, /* half way between 1 and 1 + 2^-7 */
      {1.01171875, 0x3f82},
      {1.00390625 + 0x1p-40, 0x3f81},
      {1.01171875 - 0x1p-40, 0x3f81},
      {-1.00390625, 0xbf80},
      {1e300, 0x7f80},
      {-1e300, 0xff80},
      {0x1p-133, 0x0001},
      {0x1p-135, 0x0000},
      {-0.0, 0x8000},
      {(double)INFINITY, 0x7f80},
  };
  enum { N = sizeof cases / sizeof cases[0] };
  wn_tensor wide = wn_test_tensor(d, WN_F64, 1, N, 0, 0), narrow = wn_test_tensor(d, WN_BF16, 1, N, 0, 0);
  for (int i = 0; i < N; i++) wn_test_set(&wide, i, cases[i].from);
  OK(d->ops->cast(d, &narrow, &wide));
  for (int i = 0; i < N; i++)
    if (((const uint16_t *)narrow.data)[i] != cases[i].bits)
      fail_msg("%.17g became %04x, expected %04x", cases[i].from, ((const uint16_t *)narrow.data)[i], cases[i].bits);
  wn_test_set(&wide, 0, (double)NAN);
  OK(d->ops->cast(d, &narrow, &wide));
  assert_true(isnan(wn_test_get(&narrow, 0)));
}

static void test_cast_pairs(void **state) {
  wn_device *d = *state;
  const wn_dtype floats[] = {WN_F32, WN_F64, WN_BF16};
  for (int a = 0; a < 3; a++)
    for (int b = 0; b < 3; b++) {
      wn_tensor from = wn_test_random(d, floats[a], 5, 1, 3, 3, 7, 3, 11),
                to = wn_test_strided(d, floats[b], 2, 3, 7, 3, 11);
      OK(d->ops->cast(d, &to, &from));
      wn_test_close("cast", &to, &from, 0, floats[b] == WN_BF16 && a != b ? 0x1p-8 : 0x1p-24);
      wn_test_margin_untouched(&to, 2);
      if (a == b) wn_test_close("copy", &to, &from, 0, 0);
    }
  /* all BF16 values survive the way through FP32 */
  wn_tensor all = wn_test_tensor(d, WN_BF16, 1, 65536, 0, 0), up = wn_test_tensor(d, WN_F32, 1, 65536, 0, 0),
            back = wn_test_tensor(d, WN_BF16, 1, 65536, 0, 0);
  for (int i = 0; i < 65536; i++) ((uint16_t *)all.data)[i] = (uint16_t)i;
  OK(d->ops->cast(d, &up, &all));
  OK(d->ops->cast(d, &back, &up));
  for (int i = 0; i < 65536; i++)
    if ((i & 0x7fff) <= 0x7f80) assert_int_equal(((const uint16_t *)back.data)[i], i);
}

static void test_upload_download(void **state) {
  wn_device *d = *state;
  int32_t host[5 * 7], back[5 * 7];
  for (int i = 0; i < 35; i++) host[i] = 1000 + i;
  wn_tensor t = wn_test_strided(d, WN_I32, 4, 2, 5, 7, 0);
  OK(d->ops->upload(d, &t, host));
  OK(d->ops->download(d, back, &t));
  assert_memory_equal(host, back, sizeof host);
  assert_int_equal(wn_test_get(&t, 8), 1008);
  wn_test_margin_untouched(&t, 4);
  OK(d->ops->zero(d, &t));
  for (int i = 0; i < 35; i++) assert_int_equal(wn_test_get(&t, i), 0);
  wn_test_margin_untouched(&t, 4);
}

/* No entry of the table may be missing. Every member but the name is a function pointer. */
static void test_table(void **state) {
  wn_device *d = *state;
  assert_string_equal(d->ops->name, "cpu");
  const unsigned char *bytes = (const unsigned char *)d->ops;
  for (size_t at = offsetof(wn_ops, zero); at < sizeof *d->ops; at += sizeof(void *)) {
    void *entry;
    memcpy(&entry, bytes + at, sizeof entry);
    if (!entry) fail_msg("entry %zu of the operation table is missing", (at - offsetof(wn_ops, zero)) / sizeof entry);
  }
  assert_int_equal(d->dtype_of[WN_INDEX], WN_I32);
  assert_int_equal(d->dtype_of[WN_STAT], WN_F32);
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
      cmocka_unit_test(test_linear),          cmocka_unit_test(test_no_rows), cmocka_unit_test(test_per_head),
      cmocka_unit_test(test_grouped),         cmocka_unit_test(test_cast),    cmocka_unit_test(test_cast_pairs),
      cmocka_unit_test(test_upload_download), cmocka_unit_test(test_table),
  };
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
