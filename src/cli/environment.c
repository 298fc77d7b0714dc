#include "cli/environment.h"

#include <cblas.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Long enough for a region's threads to meet on a quiet machine (some tens of microseconds). */
static const char spin_count[] = "1000";

static bool blas_fell_back(void) {
#if defined(__x86_64__)
  return strcmp(openblas_get_corename(), "Haswell") == 0 && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

void wn_environment_prepare(char **argv) {
  bool changed = false;
  if (!getenv("OPENBLAS_CORETYPE") && blas_fell_back()) changed = setenv("OPENBLAS_CORETYPE", "SkylakeX", 1) == 0;
  if (!getenv("GOMP_SPINCOUNT") && !getenv("OMP_WAIT_POLICY"))
    changed = setenv("GOMP_SPINCOUNT", spin_count, 1) == 0 || changed;
  if (changed) execv("/proc/self/exe", argv); /* where this fails the slower choices serve */
}
