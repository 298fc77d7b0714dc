/* AdamW and the sum of squares on the GPU against the CPU: pieces at any offset of a flat buffer, what is not finite.
 */
#include "support/twin.h"

typedef struct adam {
  twin w, m, v, weight, grad;
  bool with_weight;
  wn_adamw_params params;
} adam;

static void step(wn_device *d, adam *a, bool cuda) {
#define OF(t) (cuda ? &(t).cuda : &(t).cpu)
  OK(d->ops->adamw(d, OF(a->w), OF(a->m), OF(a->v), a->with_weight ? OF(a->weight) : NULL, OF(a->grad), &a->params));
#undef OF
}

/* Pieces [from, from + n) of flat buffers; the weight's begins `weight_from` elements in. */
static void check_adam(twin_bench *b, int64_t n, int64_t from, int64_t weight_from, bool with_weight, double decay) {
  const int64_t all = n + 20;
  twin w = twin_random(b, WN_MASTER, 1, 1, 0, 1, all, 0, 0), m = twin_random(b, WN_MASTER, 2, 0.1, 0, 1, all, 0, 0),
       v = twin_tensor(b, WN_MASTER, 1, all, 0, 0), grad = twin_random(b, WN_WGRAD, 4, 1, 0, 1, all, 0, 0),
       weight = twin_random(b, WN_ACT, 5, 1, 0, 1, all, 0, 0);
  double *squares = malloc((size_t)all * sizeof *squares);
  for (int64_t i = 0; i < all; i++) squares[i] = i % 11 ? 0.01 * (double)(i % 97) : 0; /* zeros: a fresh state */
  twin_set(b, &v, squares);
  free(squares);
  adam a = {twin_slice(w, 0, from, n),
            twin_slice(m, 0, from, n),
            twin_slice(v, 0, from, n),
            twin_slice(weight, 0, weight_from, n),
            twin_slice(grad, 0, from, n),
            with_weight,
            {.lr = 0.02, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = decay, .grad_scale = 0.25}};
  for (a.params.step = 1; a.params.step <= 3; a.params.step++) {
    step(b->cpu, &a, false);
    step(b->cuda, &a, true);
  }
  print_message("%lld elements from %lld\n", (long long)n, (long long)from);
  twin_close(b, "master and its neighbours", &w, twin_f32);
  twin_close(b, "m", &m, twin_f32);
  twin_close(b, "v", &v, twin_f32);
  twin_close(b, "weight", &weight, twin_bf16);
  for (int i = 0; i < 2; i++) { /* what lies outside of the piece stays */
    twin outside = i == 0 ? twin_slice(w, 0, 0, from) : twin_slice(w, 0, from + n, all - from - n);
    if (wn_tensor_count(&outside.cpu)) twin_close(b, "outside", &outside, 0);
  }
  twin_end(b);
}

static void adamw_agrees(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t sizes[] = {1, 2, 3, 4, 5, 7, 64, 1023, 40009, 300000};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (int64_t from = 0; from < 4; from++) {
      check_adam(b, sizes[i], from, from, from % 2 == 0, from ? 0.1 : 0);
      if (i % 3 == 0) check_adam(b, sizes[i], from, 0, true, 0.1); /* the weight stands otherwise within 16 bytes */
    }
}

/* Moments in BF16 on both devices (the CPU's in FP64 otherwise): a value at the middle between two neighbours may fall
 * to either side, now and then; nothing else may differ. */
static void check_narrow(twin_bench *b, int64_t n, int64_t from, int64_t moments_from, bool with_weight) {
  enum { MORE = 20, STEPS = 3 };
  const int64_t all = n + MORE;
  twin w = twin_random(b, WN_MASTER, 1, 1, 0, 1, all, 0, 0), grad = twin_random(b, WN_WGRAD, 4, 1, 0, 1, all, 0, 0),
       weight = twin_random(b, WN_ACT, 5, 1, 0, 1, all, 0, 0), moment[2];
  uint16_t *values = malloc((size_t)all * sizeof *values);
  assert_non_null(values);
  for (int k = 0; k < 2; k++) {
    OK(wn_tensor_alloc(&moment[k].cpu, b->cpu->stash, "test", WN_BF16, 1, all, 0, 0, 0));
    OK(wn_tensor_alloc(&moment[k].cuda, b->cuda->stash, "test", WN_BF16, 1, all, 0, 0, 0));
    for (int64_t i = 0; i < all; i++) values[i] = wn_bf16_from_f32(k ? (float)(1 + i % 97) : (float)(i % 11) - 5);
    OK(b->cpu->ops->upload(b->cpu, &moment[k].cpu, values));
    OK(b->cuda->ops->upload(b->cuda, &moment[k].cuda, values));
  }
  adam a = {.w = twin_slice(w, 0, from, n),
            .m = twin_slice(moment[0], 0, moments_from, n),
            .v = twin_slice(moment[1], 0, moments_from, n),
            .weight = twin_slice(weight, 0, from, n),
            .grad = twin_slice(grad, 0, from, n),
            .with_weight = with_weight};
  a.params = (wn_adamw_params){.lr = 0.02, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .grad_scale = 0.25};
  for (a.params.step = 1; a.params.step <= STEPS; a.params.step++) {
    step(b->cpu, &a, false);
    step(b->cuda, &a, true);
    if (a.params.step == 1) twin_close(b, "master", &w, twin_f32); /* no moment has been rounded yet */
  }
  for (int k = 0; k < 2; k++) {
    int64_t other = 0;
    OK(b->cuda->ops->download(b->cuda, values, &moment[k].cuda));
    for (int64_t i = 0; i < all; i++) {
      double want = wn_test_get(&moment[k].cpu, i), got = (double)wn_f32_from_bf16(values[i]);
      assert_true(fabs(got - want) <= 1e-6 + 0x1p-7 * fabs(want));
      other += got != want;
      if (i < moments_from || i >= moments_from + n) assert_true(got == want);
    }
    assert_true(other <= 2 + n / 500);
  }
  free(values);
  twin_end(b);
}

static void adamw_with_moments_in_bf16(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t sizes[] = {1, 3, 4, 7, 64, 1023, 40009};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
    for (int64_t from = 0; from < 5; from++) {
      check_narrow(b, sizes[i], from, from, from % 2 == 0);
      check_narrow(b, sizes[i], 0, from, true);
    }
}

/* Pieces of different places within 16 bytes: no common access is wide. */
static void adamw_of_scattered_pieces(void **state) {
  twin_bench *b = twin_begin(state);
  twin flat[4];
  for (int i = 0; i < 4; i++) {
    flat[i] = twin_tensor(b, WN_MASTER, 1, 1100, 0, 0);
    twin_fill(b, &flat[i], 10 + (uint64_t)i, 0.1, 1);
    flat[i] = twin_slice(flat[i], 0, i, 1031);
  }
  adam a = {.w = flat[0], .m = flat[1], .v = flat[2], .grad = flat[3]};
  a.params = (wn_adamw_params){.lr = 0.01, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .grad_scale = 1, .step = 7};
  step(b->cpu, &a, false);
  step(b->cuda, &a, true);
  twin_close(b, "master", &a.w, twin_f32);
  twin_close(b, "m", &a.m, twin_f32);
  twin_close(b, "v", &a.v, twin_f32);
  twin_end(b);
}

/* The first step of a fresh state is lr in the gradient's direction, whatever its size: the bias correction. */
static void first_step(void **state) {
  twin_bench *b = twin_begin(state);
  static const double ones[] = {1, 1, 1}, grads[] = {1e-3, -50, 1e-18}, zeros[] = {0, 0, 0};
  twin w = twin_tensor(b, WN_MASTER, 1, 3, 0, 0), m = twin_tensor(b, WN_MASTER, 1, 3, 0, 0),
       v = twin_tensor(b, WN_MASTER, 1, 3, 0, 0), g = twin_tensor(b, WN_WGRAD, 1, 3, 0, 0);
  twin_set(b, &w, ones);
  twin_set(b, &m, zeros);
  twin_set(b, &v, zeros);
  twin_set(b, &g, grads);
  adam a = {.w = w, .m = m, .v = v, .grad = g};
  a.params = (wn_adamw_params){.lr = 0.5, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-12, .grad_scale = 1, .step = 1};
  step(b->cuda, &a, true);
  wn_tensor host = twin_download(b, &w.cuda);
  assert_true(fabs(wn_test_get(&host, 0) - 0.5) < 1e-5);
  assert_true(fabs(wn_test_get(&host, 1) - 1.5) < 1e-5);
  assert_true(fabs(wn_test_get(&host, 2) - 1.0) < 1e-5); /* eps decides */
  free(host.data);
  twin_end(b);
}

static void again_adam(wn_device *d, void *context) {
  step(d, context, true);
}

static void adamw_repeats(void **state) {
  twin_bench *b = twin_begin(state);
  adam a = {.w = twin_tensor(b, WN_MASTER, 1, 100003, 0, 0),
            .m = twin_tensor(b, WN_MASTER, 1, 100003, 0, 0),
            .v = twin_tensor(b, WN_MASTER, 1, 100003, 0, 0),
            .weight = twin_tensor(b, WN_ACT, 1, 100003, 0, 0),
            .grad = twin_random(b, WN_WGRAD, 4, 1, 0, 1, 100003, 0, 0),
            .with_weight = true,
            .params = {.lr = 0.02, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .grad_scale = 1, .step = 1}};
  const twin_out outs[] = {{&a.w, true}, {&a.m, true}, {&a.v, true}, {&a.weight, false}};
  twin_repeats(b, again_adam, &a, outs, 4);
  twin_end(b);
}

/* ---- sum of squares ---- */

static void check_squares(twin_bench *b, const twin *x, const char *what) {
  double cpu, cuda, again;
  int64_t bad_cpu, bad_cuda;
  OK(b->cpu->ops->sum_squares(b->cpu, &cpu, &bad_cpu, &x->cpu, 1));
  OK(b->cuda->ops->sum_squares(b->cuda, &cuda, &bad_cuda, &x->cuda, 1));
  print_message("  %-40s %.17g, CPU %.17g\n", what, cuda, cpu);
  assert_true(fabs(cuda - cpu) <= 1e-12 * cpu);
  assert_int_equal(bad_cuda, bad_cpu);
  for (int i = 0; i < TWIN_REPEATS; i++) {
    OK(b->cuda->ops->sum_squares(b->cuda, &again, &bad_cuda, &x->cuda, 1));
    assert_memory_equal(&again, &cuda, sizeof again);
  }
}

static void sum_squares_agrees(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t sizes[] = {1, 3, 4, 1023, 32768, 32769, 100003, 5000001};
  for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
    twin x = twin_random(b, WN_WGRAD, i, 3, 0, 1, sizes[i], 0, 0), off = twin_slice(x, 0, 1, sizes[i] - 1);
    check_squares(b, &x, "flat");
    check_squares(b, &off, "from its second element");
    twin_end(b);
  }
  twin strided = twin_random(b, WN_WGRAD, 9, 3, 5, 2, 301, 67, 0),
       heads = twin_random(b, WN_WGRAD, 10, 3, 3, 3, 31, 5, 9);
  check_squares(b, &strided, "strided rows");
  check_squares(b, &heads, "strided heads");
  twin_end(b);
}

/* Counted and left out, wherever they stand; squares beyond FP32's range are fine. */
static void sum_squares_of_what_is_not_finite(void **state) {
  twin_bench *b = twin_begin(state);
  enum { N = 100003 };
  static double values[N];
  for (int i = 0; i < N; i++) values[i] = (double)(i % 7) - 3;
  values[0] = values[40000] = (double)NAN;
  values[50001] = (double)INFINITY;
  values[N - 1] = -(double)INFINITY;
  values[77] = 3e38;
  twin x = twin_tensor(b, WN_WGRAD, 1, N, 0, 0);
  twin_set(b, &x, values);
  double sum;
  int64_t bad;
  OK(b->cuda->ops->sum_squares(b->cuda, &sum, &bad, &x.cuda, 1));
  assert_int_equal(bad, 4);
  check_squares(b, &x, "with four that are not finite");
  twin_end(b);
}

/* Several at once, each as alone. */
static void sum_squares_of_several(void **state) {
  twin_bench *b = twin_begin(state);
  twin x = twin_random(b, WN_WGRAD, 1, 3, 0, 1, 100003, 0, 0), y = twin_random(b, WN_WGRAD, 2, 3, 5, 2, 301, 67, 0),
       nothing = twin_tensor(b, WN_WGRAD, 1, 0, 0, 0);
  const wn_tensor several[] = {x.cuda, nothing.cuda, y.cuda};
  double alone, sums[3] = {7, 7, 7};
  int64_t bad_alone, bad[3] = {7, 7, 7};
  OK(b->cuda->ops->sum_squares(b->cuda, sums, bad, several, 3));
  for (int i = 0; i < 3; i++) {
    OK(b->cuda->ops->sum_squares(b->cuda, &alone, &bad_alone, &several[i], 1));
    assert_true(sums[i] == alone && bad[i] == bad_alone);
  }
  assert_true(sums[0] > 0 && sums[1] == 0 && sums[2] > 0);
  twin_end(b);
}

static void sum_squares_of_nothing(void **state) {
  twin_bench *b = twin_begin(state);
  twin x = twin_tensor(b, WN_WGRAD, 1, 0, 0, 0);
  double sum = 7;
  int64_t bad = 7;
  OK(b->cuda->ops->sum_squares(b->cuda, &sum, &bad, &x.cuda, 1));
  assert_true(sum == 0 && bad == 0);
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(adamw_agrees),
      cmocka_unit_test(adamw_with_moments_in_bf16),
      cmocka_unit_test(adamw_of_scattered_pieces),
      cmocka_unit_test(first_step),
      cmocka_unit_test(adamw_repeats),
      cmocka_unit_test(sum_squares_agrees),
      cmocka_unit_test(sum_squares_of_what_is_not_finite),
      cmocka_unit_test(sum_squares_of_nothing),
      cmocka_unit_test(sum_squares_of_several),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
