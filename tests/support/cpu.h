/* What tests of CPU operations share: a device, tensors with a guarded margin, FP64 copies for plain reference loops,
 * and the check that an operation's result depends neither on the number of threads nor on the run. In a header because
 * the support objects link into tests of modules that have no kernels below them. */
#ifndef WN_TEST_CPU_H
#define WN_TEST_CPU_H

#include <math.h>
#include <omp.h>
#include <string.h>

#include "kernels/cpu/cpu.h"
#include "support/test.h"

static const double wn_test_guard = -768; /* exact in every dtype */

static inline wn_device *wn_test_cpu_f32(void) {
  wn_device *device = NULL;
  OK(wn_cpu_create_f32(&device, (wn_cpu_settings){.threads = 2}));
  return device;
}

static inline wn_device *wn_test_cpu_f64(void) {
  wn_device *device = NULL;
  OK(wn_cpu_create_f64(&device, (wn_cpu_settings){.threads = 2}));
  return device;
}

/* A tensor in the stash whose innermost rows lie `margin` elements apart; the margin holds the guard value. */
static inline wn_tensor wn_test_strided(wn_device *d, wn_dtype dtype, int64_t margin, int32_t rank, int64_t d0,
                                        int64_t d1, int64_t d2) {
  int64_t dim[3] = {d0, d1, d2};
  int64_t width = dim[rank - 1];
  dim[rank - 1] += margin;
  wn_tensor t;
  OK(wn_tensor_alloc(&t, d->stash, "test", dtype, rank, dim[0], dim[1], dim[2], 0));
  for (int64_t i = 0; i < wn_tensor_count(&t); i++) wn_test_set(&t, i, wn_test_guard);
  return wn_tensor_slice(t, rank - 1, 0, width);
}

static inline wn_tensor wn_test_tensor(wn_device *d, wn_dtype dtype, int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  return wn_test_strided(d, dtype, 0, rank, d0, d1, d2);
}

/* The same, filled with normal values of this deviation. */
static inline wn_tensor wn_test_random(wn_device *d, wn_dtype dtype, uint64_t seed, double deviation, int64_t margin,
                                       int32_t rank, int64_t d0, int64_t d1, int64_t d2) {
  wn_tensor t = wn_test_strided(d, dtype, margin, rank, d0, d1, d2);
  wn_test_fill(&t, seed, deviation, 0);
  return t;
}

/* Fails when anything was written to the margin of wn_test_strided. */
static inline void wn_test_margin_untouched(const wn_tensor *t, int64_t margin) {
  wn_tensor all = *t;
  int64_t width = t->dim[t->rank - 1];
  all.dim[t->rank - 1] += margin;
  for (int64_t i = 0; i < wn_tensor_count(&all); i++)
    if (i % (width + margin) >= width && wn_test_get(&all, i) != wn_test_guard)
      fail_msg("element %lld of the margin was overwritten", (long long)i);
}

/* A dense FP64 copy in the stash, in row-major order. */
static inline double *wn_test_doubles(wn_device *d, const wn_tensor *t) {
  void *copy;
  int64_t n = wn_tensor_count(t);
  OK(wn_arena_alloc(d->stash, &copy, "test", (size_t)n * sizeof(double)));
  for (int64_t i = 0; i < n; i++) ((double *)copy)[i] = wn_test_get(t, i);
  return copy;
}

/* `expected` holds the elements of `got` in row-major order. */
static inline void wn_test_close_to(const char *what, const wn_tensor *got, double *expected, double absolute,
                                    double relative) {
  wn_tensor reference = wn_tensor_of(expected, WN_F64, got->rank, got->dim[0], got->dim[1], got->dim[2], got->dim[3]);
  wn_test_close(what, got, &reference, absolute, relative);
}

static inline void wn_test_near(const char *what, double got, double expected, double tolerance) {
  if (!(fabs(got - expected) <= tolerance)) fail_msg("%s is %.9g, expected %.9g", what, got, expected);
}

/* An output of the operation under test, and what it holds beforehand. */
typedef struct wn_test_out {
  wn_tensor *t;
  bool accumulated; /* true: normal values from seed 999 (wn_test_before); else NaN, or -7 for integers */
} wn_test_out;

static inline void wn_test_prepare(const wn_test_out *out) {
  bool integer = out->t->dtype == WN_I32;
  for (int64_t i = 0; !out->accumulated && i < wn_tensor_count(out->t); i++)
    wn_test_set(out->t, i, integer ? -7 : (double)NAN);
  if (out->accumulated && !integer) wn_test_fill(out->t, 999, 1, 0);
  for (int64_t i = 0; out->accumulated && integer && i < wn_tensor_count(out->t); i++) wn_test_set(out->t, i, 0);
}

/* What an accumulated output held: an FP64 copy. */
static inline double *wn_test_before(wn_device *d, const wn_test_out *out) {
  wn_test_prepare(out);
  return wn_test_doubles(d, out->t);
}

/* Runs the operation with 2 threads, 1 thread and 2 threads again from equal beginnings; every bit must agree. */
static inline void wn_test_repeats(wn_device *d, void (*run)(wn_device *, void *), void *context,
                                   const wn_test_out *outs, int32_t n_outs) {
  static const int threads[3] = {2, 1, 2};
  void *first[8] = {NULL};
  size_t mark = wn_arena_mark(d->stash), scratch = wn_arena_used_bytes(d->scratch);
  assert_true(n_outs <= 8);
  for (int trial = 0; trial < 3; trial++) {
    for (int32_t i = 0; i < n_outs; i++) wn_test_prepare(&outs[i]);
    omp_set_num_threads(threads[trial]);
    run(d, context);
    for (int32_t i = 0; i < n_outs; i++) {
      size_t bytes = (size_t)wn_tensor_bytes(outs[i].t);
      void *copy;
      OK(wn_arena_alloc(d->stash, &copy, "test", bytes));
      OK(d->ops->download(d, copy, outs[i].t));
      if (trial == 0) first[i] = copy;
      if (bytes && memcmp(first[i], copy, bytes) != 0)
        fail_msg("output %d differs between %d threads and %d threads", i, threads[0], threads[trial]);
    }
  }
  assert_int_equal(wn_arena_used_bytes(d->scratch), scratch);
  wn_arena_release(d->stash, mark);
}

#endif
