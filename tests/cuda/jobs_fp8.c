/* Jobs whose base is in FP8, on one GPU and, where there are two, on two: tests/support/fp8_jobs.h says what is tested.
 */
#include "kernels/cuda/cuda.h"

#define FP8_DEVICE "cuda"
#define FP8_ACT_BYTES 2
#define FP8_RANKS wn_cuda_count(NULL)
#include "support/fp8_jobs.h"

static void no_gpu(void **state) {
  (void)state;
  skip();
}

int main(void) {
  const char *why;
  const struct CMUnitTest skipped[] = {cmocka_unit_test(no_gpu)};
  if (wn_cuda_count(&why) > 0) return fp8_main();
  print_message("every test here is skipped: %s\n", why);
  return cmocka_run_group_tests(skipped, NULL, NULL);
}
