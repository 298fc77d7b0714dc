/* Rope, sums and copies over heads, SwiGLU, add and scale on the GPU against the CPU. */
#include "support/twin.h"

#define ON(t, cuda_) ((cuda_) ? &(t).cuda : &(t).cpu)

static double bar_of(wn_role role) {
  return role == WN_ACT ? twin_bf16 : twin_f32;
}

/* ---- rope ---- */

static void inverse_frequencies(float *inv_freq, int64_t width) {
  for (int64_t j = 0; j < width / 2; j++) inv_freq[j] = (float)pow(10000.0, -(double)(2 * j) / (double)width);
}

static void rope_both(twin_bench *b, twin *x, const twin_rows *rows, const wn_rope_params *params) {
  OK(b->cpu->ops->rope(b->cpu, &x->cpu, rows->cpu.position, params));
  OK(b->cuda->ops->rope(b->cuda, &x->cuda, rows->cuda.position, params));
}

/* A slice of wider heads, as the model has them: [n, heads, before + width + after]. */
static void check_rope(twin_bench *b, wn_role role, int64_t n, int64_t heads, int64_t before, int64_t width,
                       int64_t after, bool interleaved) {
  float inv_freq[256];
  int32_t *position = malloc((size_t)n * 3 * sizeof *position);
  static const int32_t far[] = {0, 131071, 105616, 99991, 1, 4095, 130003, 17};
  for (int64_t i = 0; i < n; i++) {
    position[i] = i < 8 ? far[i] : (int32_t)((i * 7919) % 131072);
    position[n + i] = 0;
    position[2 * n + i] = (int32_t)i;
  }
  inverse_frequencies(inv_freq, width);
  twin_rows rows = twin_rows_of(b, (int32_t)n, position + n, position + 2 * n, position, (int32_t)n);
  free(position);
  twin whole = twin_random(b, role, 3, 1, 0, 3, n, heads, before + width + after);
  twin x = twin_slice(whole, 2, before, width);
  wn_rope_params params = {.inv_freq = inv_freq, .interleaved = interleaved};
  print_message("%s [%lld,%lld,%lld] at %lld of %lld, %s\n", role == WN_ACT ? "BF16" : "F32", (long long)n,
                (long long)heads, (long long)width, (long long)before, (long long)(before + width + after),
                interleaved ? "interleaved" : "halves");
  rope_both(b, &x, &rows, &params);
  twin_close(b, "rotated", &whole, bar_of(role));
  params.inverse = true;
  rope_both(b, &x, &rows, &params);
  twin_close(b, "and back", &whole, bar_of(role));
  if (before) {
    twin left = twin_slice(whole, 2, 0, before);
    twin_close(b, "before it", &left, 0);
  }
  if (after) {
    twin right = twin_slice(whole, 2, before + width, after);
    twin_close(b, "after it", &right, 0);
  }
  twin_end(b);
}

static void rope_agrees(void **state) {
  twin_bench *b = twin_begin(state);
  for (int interleaved = 0; interleaved < 2; interleaved++)
    for (int role = WN_ACT; role <= WN_WGRAD; role += WN_WGRAD - WN_ACT) {
      check_rope(b, (wn_role)role, 1, 1, 0, 2, 0, interleaved);
      check_rope(b, (wn_role)role, 9, 3, 0, 8, 0, interleaved);
      check_rope(b, (wn_role)role, 67, 5, 128, 64, 0, interleaved);  /* attention: the last columns */
      check_rope(b, (wn_role)role, 67, 7, 0, 64, 64, interleaved);   /* indexer: the first */
      check_rope(b, (wn_role)role, 301, 1, 512, 64, 0, interleaved); /* k_pe: one head, several rows a block */
      check_rope(b, (wn_role)role, 5, 128, 128, 64, 0, interleaved); /* a row fills a block */
      check_rope(b, (wn_role)role, 3, 300, 0, 64, 0, interleaved);   /* and more than one round of it */
      check_rope(b, (wn_role)role, 13, 2, 3, 202, 1, interleaved);   /* nothing aligned */
      check_rope(b, (wn_role)role, 6, 2, 8, 24, 0, interleaved);     /* halves of 12: no pack of 8 */
      check_rope(b, (wn_role)role, 700, 1, 0, 512, 0, interleaved);  /* the widest */
    }
}

/* Rope keeps lengths: a half-precision angle at position 131071 would not show in norms of y, but in its angle. */
static void rope_turns_by_the_angle(void **state) {
  twin_bench *b = twin_begin(state);
  static const double x[] = {1, 0};
  static const int32_t zero = 0, position = 131071;
  const float one = 1;
  twin_rows rows = twin_rows_of(b, 1, &zero, &zero, &position, 1);
  for (int inverse = 0; inverse < 2; inverse++) {
    twin t = twin_tensor(b, WN_STAT, 3, 1, 1, 2);
    twin_set(b, &t, x);
    wn_rope_params params = {.inv_freq = &one, .interleaved = true, .inverse = inverse == 1};
    OK(b->cuda->ops->rope(b->cuda, &t.cuda, rows.cuda.position, &params));
    wn_tensor host = twin_download(b, &t.cuda);
    assert_true(fabs(wn_test_get(&host, 0) - cos(131071.0)) < 1e-6);
    assert_true(fabs(wn_test_get(&host, 1) - (inverse ? -sin(131071.0) : sin(131071.0))) < 1e-6);
    free(host.data);
  }
  twin_end(b);
}

/* ---- elementwise ---- */

typedef struct maps {
  twin a, b, dy, sum, scaled, y, dgate, dup;
} maps;

static maps map_operands(twin_bench *b, wn_role role, int64_t margin, int32_t rank, int64_t d0, int64_t d1,
                         int64_t d2) {
  maps m;
  m.a = twin_random(b, role, 1, 3, margin, rank, d0, d1, d2);
  m.b = twin_random(b, role, 2, 1, margin, rank, d0, d1, d2);
  m.dy = twin_random(b, role, 3, 1, margin, rank, d0, d1, d2);
  twin *outs[] = {&m.sum, &m.scaled, &m.y, &m.dgate, &m.dup};
  for (int i = 0; i < 5; i++) {
    *outs[i] = twin_strided(b, role, margin, rank, d0, d1, d2);
    twin_poison(b, outs[i]);
  }
  return m;
}

static void run_maps(wn_device *d, maps *m, bool cuda) {
  OK(d->ops->add(d, ON(m->sum, cuda), ON(m->a, cuda), ON(m->b, cuda)));
  OK(d->ops->scale(d, ON(m->scaled, cuda), ON(m->a, cuda), -1.75));
  OK(d->ops->swiglu(d, ON(m->y, cuda), ON(m->a, cuda), ON(m->b, cuda)));
  OK(d->ops->swiglu_backward(d, ON(m->dgate, cuda), ON(m->dup, cuda), ON(m->dy, cuda), ON(m->a, cuda), ON(m->b, cuda)));
}

static void close_maps(twin_bench *b, const maps *m, double bar) {
  twin_close(b, "add", &m->sum, bar);
  twin_close(b, "scale", &m->scaled, bar);
  twin_close(b, "swiglu", &m->y, bar);
  twin_close(b, "swiglu dgate", &m->dgate, bar);
  twin_close(b, "swiglu dup", &m->dup, bar);
}

static void elementwise_agrees(void **state) {
  twin_bench *b = twin_begin(state);
  static const struct {
    int32_t rank;
    int64_t dim[3], margin;
  } shapes[] = {{1, {1}, 0},        {1, {1027}, 0},     {2, {1, 1}, 0},      {2, {3, 7}, 0},        {2, {67, 64}, 0},
                {2, {67, 64}, 8},   {2, {131, 129}, 3}, {2, {1, 20000}, 0},  {2, {5, 9000}, 8},     {3, {5, 3, 64}, 16},
                {3, {5, 3, 33}, 1}, {2, {70001, 8}, 8}, {2, {613, 2048}, 0}, {3, {7, 128, 64}, 128}};
  for (int role = WN_ACT; role <= WN_STAT; role++)
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
      print_message("rank %d [%lld,%lld,%lld] margin %lld\n", shapes[i].rank, (long long)shapes[i].dim[0],
                    (long long)shapes[i].dim[1], (long long)shapes[i].dim[2], (long long)shapes[i].margin);
      maps m = map_operands(b, (wn_role)role, shapes[i].margin, shapes[i].rank, shapes[i].dim[0], shapes[i].dim[1],
                            shapes[i].dim[2]);
      run_maps(b->cpu, &m, false);
      run_maps(b->cuda, &m, true);
      close_maps(b, &m, bar_of((wn_role)role));
      twin_end(b);
    }
}

/* Gates far out: exp of the opposite overflows FP32 on one side and vanishes on the other. */
static void swiglu_of_large_gates(void **state) {
  twin_bench *b = twin_begin(state);
  static const double gates[] = {120, -120, 1000, -1000, 88.5, -88.5, 3e38, -3e38, 0, -0.0, 20, -20};
  enum { N = sizeof gates / sizeof *gates };
  for (int role = WN_ACT; role <= WN_STAT; role++) {
    maps m = map_operands(b, (wn_role)role, 0, 1, N, 0, 0);
    double ones[N];
    for (int i = 0; i < N; i++) ones[i] = 1;
    twin_set(b, &m.a, gates);
    twin_set(b, &m.b, ones);
    twin_set(b, &m.dy, ones);
    run_maps(b->cpu, &m, false);
    run_maps(b->cuda, &m, true);
    wn_tensor y = twin_download(b, &m.y.cuda), dg = twin_download(b, &m.dgate.cuda), du = twin_download(b, &m.dup.cuda);
    for (int i = 0; i < N; i++) {
      const wn_tensor *got[] = {&y, &dg, &du}, *expected[] = {&m.y.cpu, &m.dgate.cpu, &m.dup.cpu};
      for (int k = 0; k < 3; k++) {
        double x = wn_test_get(got[k], i), e = wn_test_get(expected[k], i);
        if (!(fabs(x - e) <= 1e-30 + 1e-2 * fabs(e)))
          fail_msg("gate %g, output %d: %g, the CPU has %g", gates[i], k, x, e);
      }
    }
    free(y.data);
    free(dg.data);
    free(du.data);
    twin_end(b);
  }
}

static void outputs_may_be_inputs(void **state) {
  twin_bench *b = twin_begin(state);
  for (int margin = 0; margin <= 8; margin += 4) {
    maps m = map_operands(b, WN_ACT, margin, 2, 301, 264, 0);
    for (int cuda = 0; cuda < 2; cuda++) {
      wn_device *d = cuda ? b->cuda : b->cpu;
      OK(d->ops->add(d, ON(m.dy, cuda), ON(m.dy, cuda), ON(m.a, cuda)));
      OK(d->ops->add(d, ON(m.dy, cuda), ON(m.b, cuda), ON(m.dy, cuda)));
      OK(d->ops->scale(d, ON(m.dy, cuda), ON(m.dy, cuda), 0.5));
      OK(d->ops->swiglu_backward(d, ON(m.a, cuda), ON(m.b, cuda), ON(m.dy, cuda), ON(m.a, cuda), ON(m.b, cuda)));
    }
    twin_close(b, "add and scale in place", &m.dy, twin_bf16);
    twin_close(b, "dgate on gate", &m.a, 2 * twin_bf16); /* dy was rounded three times */
    twin_close(b, "dup on up", &m.b, 2 * twin_bf16);
    twin_end(b);
  }
}

/* ---- over heads ---- */

typedef struct heads {
  twin wide, narrow, sum;
  bool accumulate;
} heads;

static void run_heads(wn_device *d, heads *h, bool cuda) {
  OK(d->ops->sum_heads(d, ON(h->sum, cuda), ON(h->wide, cuda), &(wn_accumulate){h->accumulate}));
  OK(d->ops->broadcast_heads(d, ON(h->wide, cuda), ON(h->narrow, cuda)));
}

static void heads_agree(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t shapes[][4] = {/* n, heads, width, columns before it in the wider tensors */
                                      {1, 1, 1, 0},   {7, 3, 5, 0},     {67, 5, 64, 128}, {131, 128, 64, 128},
                                      {33, 7, 24, 3}, {301, 1, 64, 0},  {5, 300, 8, 8},   {3, 2, 2056, 0},
                                      {3, 2, 300, 1}, {1, 1000, 64, 0}, {4099, 16, 64, 0}};
  for (int role = WN_ACT; role <= WN_STAT; role++)
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
      for (int accumulate = 0; accumulate < 2; accumulate++) {
        const int64_t n = shapes[i][0], width = shapes[i][2], before = shapes[i][3];
        twin wide = twin_random(b, (wn_role)role, 1, 1, 0, 3, n, shapes[i][1], before + width);
        twin narrow = twin_random(b, (wn_role)role, 2, 1, 0, 2, n, before + width, 0);
        twin sum = twin_random(b, (wn_role)role, 3, 1, 0, 2, n, before + width, 0);
        heads h = {twin_slice(wide, 2, before, width), twin_slice(narrow, 1, before, width),
                   twin_slice(sum, 1, before, width), accumulate == 1};
        if (!accumulate) twin_poison(b, &h.sum);
        print_message("[%lld,%lld,%lld]\n", (long long)n, (long long)shapes[i][1], (long long)width);
        run_heads(b->cpu, &h, false);
        run_heads(b->cuda, &h, true);
        twin_close(b, "sum", &sum, bar_of((wn_role)role));
        twin_close(b, "broadcast", &wide, 0);
        twin_end(b);
      }
}

/* ---- repeats ---- */

static void again_heads(wn_device *d, void *context) {
  heads *h = context;
  OK(d->ops->sum_heads(d, &h->sum.cuda, &h->wide.cuda, &(wn_accumulate){h->accumulate}));
}
static void again_maps(wn_device *d, void *context) {
  run_maps(d, context, true);
}

static void repeats_bit_for_bit(void **state) {
  twin_bench *b = twin_begin(state);
  heads h = {.wide = twin_random(b, WN_ACT, 1, 1, 128, 3, 257, 128, 64), .sum = twin_tensor(b, WN_ACT, 2, 257, 64, 0)};
  twin_repeats(b, again_heads, &h, &(twin_out){&h.sum, false}, 1);
  h.accumulate = true;
  twin_repeats(b, again_heads, &h, &(twin_out){&h.sum, true}, 1);
  twin_end(b);
  maps m = map_operands(b, WN_ACT, 0, 2, 513, 264, 0);
  const twin_out outs[] = {{&m.sum, false}, {&m.scaled, false}, {&m.y, false}, {&m.dgate, false}, {&m.dup, false}};
  twin_repeats(b, again_maps, &m, outs, 5);
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(rope_agrees),           cmocka_unit_test(rope_turns_by_the_angle),
      cmocka_unit_test(elementwise_agrees),    cmocka_unit_test(swiglu_of_large_gates),
      cmocka_unit_test(outputs_may_be_inputs), cmocka_unit_test(heads_agree),
      cmocka_unit_test(repeats_bit_for_bit),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
