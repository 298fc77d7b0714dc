#include "cli/blas.h"

#include <cblas.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void wn_blas_choose_kernels(char **argv) {
#if defined(__x86_64__)
  const char *variable = "OPENBLAS_CORETYPE";
  if (getenv(variable) || strcmp(openblas_get_corename(), "Haswell") != 0) return;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return;
  if (setenv(variable, "SkylakeX", 1) != 0) return;
  execv("/proc/self/exe", argv); /* where this fails the slower kernels serve */
#else
  (void)argv;
#endif
}
