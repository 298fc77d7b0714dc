/* One build of the CPU device with the tolerance its results are held to, for tests that run in both. */
#ifndef WN_TEST_BENCH_H
#define WN_TEST_BENCH_H

#include "kernels/cpu/cpu.h"
#include "support/test.h"

typedef struct bench {
  wn_device *device;
  bool wide; /* FP64 */
  double tolerance;
} bench;

static inline bench make_bench(bool wide, int32_t threads) {
  bench b = {.wide = wide, .tolerance = wide ? 1e-11 : 2e-5};
  wn_cpu_settings settings = {.threads = threads};
  OK(wide ? wn_cpu_create_f64(&b.device, settings) : wn_cpu_create_f32(&b.device, settings));
  return b;
}

static inline void free_bench(bench *b) {
  assert_int_equal(wn_arena_used_bytes(b->device->scratch), 0);
  if (b->wide)
    wn_cpu_free_f64(b->device);
  else
    wn_cpu_free_f32(b->device);
}

#endif
