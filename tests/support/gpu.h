/* Tests that need a GPU, or several. */
#ifndef WN_TEST_GPU_H
#define WN_TEST_GPU_H

#include "kernels/cuda/cuda.h"
#include "support/test.h"

/* First line of such a test: where there are fewer, it is skipped, aloud. */
static inline void wn_needs_gpus(int32_t n) {
  static const char *why;
  const int32_t found = wn_cuda_count(&why);
  if (found >= n) return;
  if (found > 0)
    print_message("skipped: %d GPUs are needed, %d are there\n", n, found);
  else
    print_message("skipped: %s\n", why);
  skip();
}

#endif
