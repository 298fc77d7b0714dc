/* The CUDA device and its memory operations: conversions, strided copies, arenas, what a GPU that cannot serve says. */
#include <cuda_runtime_api.h>
#include <stdatomic.h>
#include <time.h>

#include "base/time.h"
#include "support/twin.h"

static void converts_as_the_cpu_does(void **state) {
  twin_bench *b = twin_begin(state);
  static const int64_t widths[] = {1, 7, 8, 64, 129};
  for (size_t w = 0; w < sizeof widths / sizeof *widths; w++)
    for (int64_t margin = 0; margin <= 8; margin += 8) {
      twin act = twin_random(b, WN_ACT, 1 + w, 3, margin, 3, 5, 3, widths[w]);
      twin wide = twin_strided(b, WN_STAT, margin, 3, 5, 3, widths[w]);
      twin back = twin_strided(b, WN_ACT, 0, 3, 5, 3, widths[w]);
      OK(b->cuda->ops->cast(b->cuda, &wide.cuda, &act.cuda));
      OK(b->cpu->ops->cast(b->cpu, &wide.cpu, &act.cpu));
      OK(b->cuda->ops->cast(b->cuda, &back.cuda, &wide.cuda));
      OK(b->cpu->ops->cast(b->cpu, &back.cpu, &wide.cpu));
      twin_close(b, "BF16 to F32", &wide, 0);
      twin_close(b, "and back", &back, 0);
    }
  twin_end(b);
}

static void rounds_to_nearest_even(void **state) {
  twin_bench *b = twin_begin(state);
  static const double values[] = {1,     1.00390625, 1.01171875, -1.00390625, 3.0e38,
                                  1e-40, INFINITY,   -INFINITY,  0.0,         -0.0};
  enum { N = sizeof values / sizeof *values };
  twin x = twin_tensor(b, WN_STAT, 1, N, 0, 0), y = twin_tensor(b, WN_ACT, 1, N, 0, 0);
  twin_set(b, &x, values);
  OK(b->cuda->ops->cast(b->cuda, &y.cuda, &x.cuda));
  wn_tensor host = twin_download(b, &y.cuda);
  for (int i = 0; i < N; i++) assert_int_equal(((uint16_t *)host.data)[i], wn_bf16_from_f32((float)values[i]));
  free(host.data);
  twin_end(b);
}

static void zeroes_only_its_rows(void **state) {
  twin_bench *b = twin_begin(state);
  for (int rank = 2; rank <= 3; rank++) {
    twin whole = twin_random(b, WN_STAT, 5, 1, 0, rank, 6, rank == 3 ? 4 : 12, rank == 3 ? 10 : 0);
    twin part = twin_slice(whole, rank - 1, 2, 5);
    OK(b->cuda->ops->zero(b->cuda, &part.cuda));
    OK(b->cpu->ops->zero(b->cpu, &part.cpu));
    twin_close(b, "zeroed in part", &whole, 0);
  }
  twin_end(b);
}

/* Longer than the staging buffers, so that both are used again. */
static void travels_there_and_back(void **state) {
  twin_bench *b = twin_begin(state);
  int64_t n = ((int64_t)40 << 20) + 13;
  wn_tensor t;
  int32_t *out = malloc((size_t)n * 4), *in = calloc((size_t)n, 4);
  for (int64_t i = 0; i < n; i++) out[i] = (int32_t)(i * 2654435761u);
  OK(wn_device_tensor(b->cuda, &t, b->cuda->stash, "test", WN_INDEX, 1, n, 0, 0, 0));
  OK(b->cuda->ops->upload(b->cuda, &t, out));
  OK(b->cuda->ops->download(b->cuda, in, &t));
  assert_int_equal(memcmp(out, in, (size_t)n * 4), 0);
  free(out);
  free(in);
  twin_end(b);
}

/* Holds the queue up, as a collective does that a rank never joins; for ten seconds at most. */
static void hold_up(void *held) {
  for (int i = 0; i < 1000 && atomic_load((atomic_bool *)held); i++)
    nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
}

static wn_status lose_patience(void *context, double waited_s) {
  (void)context;
  return waited_s > 0.2 ? WN_FAIL(WN_E_WORLD, "waited %.1f s", waited_s) : NULL;
}

/* However much is asked for without a read, the host comes to a watched wait; it does not block inside the driver. */
static void runs_ahead_within_bounds(void **state) {
  twin_bench *b = twin_begin(state);
  twin x = twin_tensor(b, WN_STAT, 1, 64, 0, 0);
  atomic_bool held = true;
  wn_status status = NULL;
  int64_t asked = 0;
  OK(b->cuda->ops->scale(b->cuda, &x.cuda, &x.cuda, 1)); /* the first launch of a kernel loads it, and waits */
  OK(wn_cuda_synchronize(b->cuda));
  wn_cuda_set_watch(b->cuda, lose_patience, NULL);
  assert_int_equal(cudaLaunchHostFunc(wn_cuda_compute_queue(b->cuda), hold_up, &held), cudaSuccess);
  double start = wn_time_s();
  for (; asked < 4000 && !status; asked++) status = b->cuda->ops->scale(b->cuda, &x.cuda, &x.cuda, 1);
  double seconds = wn_time_s() - start;
  atomic_store(&held, false);
  wn_cuda_set_watch(b->cuda, NULL, NULL);
  print_message("  %lld operations asked for in %.2f s\n", (long long)asked, seconds);
  REFUSED(status, WN_E_WORLD, "waited");
  assert_true(seconds < 5 && asked > 64);
  OK(wn_cuda_synchronize(b->cuda));
  twin_end(b);
}

static void a_full_gpu_is_a_sentence(void **state) {
  twin_bench *b = twin_begin(state);
  wn_tensor t[3];
  wn_status status = NULL;
  size_t used, arenas, other;
  OK(wn_cuda_memory(b->cuda, &used, &arenas, &other));
  for (int i = 0; i < 3 && !status; i++) /* each fits its arena's address space; together they exceed the memory */
    status = wn_device_tensor(b->cuda, &t[i], b->cuda->stash, "test", WN_STAT, 1, (int64_t)15 << 30, 0, 0, 0);
  REFUSED(status, WN_E_MEMORY, "arena");
  twin_end(b);
}

static void a_gpu_that_is_not_there_is_a_sentence(void **state) {
  twin_begin(state);
  wn_device *device;
  REFUSED(wn_cuda_create(&device, (wn_cuda_settings){.ordinal = 99}), WN_E_DEVICE, "GPU 99");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(converts_as_the_cpu_does),
      cmocka_unit_test(rounds_to_nearest_even),
      cmocka_unit_test(zeroes_only_its_rows),
      cmocka_unit_test(travels_there_and_back),
      cmocka_unit_test(runs_ahead_within_bounds),
      cmocka_unit_test(a_full_gpu_is_a_sentence),
      cmocka_unit_test(a_gpu_that_is_not_there_is_a_sentence),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
