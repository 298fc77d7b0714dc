/* The exp and log that the kernels inline, against the library's. */
#include <math.h>

#include "support/test.h"

#include "kernels/cpu/expo.h"

/* The largest relative error yet; fails where it is 2e-7 or more, or no number. */
static double checked(double worst, const char *name, float x, float got, double want) {
  double error = fabs((double)got / want - 1);
  if (!(error < 2e-7)) fail_msg("%s(%.9g) is %.9g, expected %.9g", name, (double)x, (double)got, want);
  return fmax(worst, error);
}

/* The test builds the FP32 forms; FP64's are the library's own with the ends cut off. */
static void exp_is_accurate(void **state) {
  (void)state;
  double worst = 0;
  for (float x = -87; x <= 88; x += 0.00137f) worst = checked(worst, "exp", x, wn_exp(x), exp((double)x));
  print_message("worst relative error %.2e\n", worst);
  assert_true(wn_exp(0) == 1);
  assert_true(wn_exp(-87.5f) == 0 && wn_exp(-1e30f) == 0 && wn_exp(-INFINITY) == 0);
  assert_true(isinf(wn_exp(89)) && isinf(wn_exp(INFINITY)));
  assert_true(isnan(wn_exp(NAN)));
}

static void log_is_accurate(void **state) {
  (void)state;
  double worst = 0;
  for (float x = 0x1p-126f; x < 1e38f; x *= 1.00003f)
    if (x != 1) worst = checked(worst, "log", x, wn_log(x), log((double)x));
  for (float x = 0.99f; x < 1.01f; x = nextafterf(x, 2))
    if (x != 1) worst = checked(worst, "log", x, wn_log(x), log((double)x));
  print_message("worst relative error %.2e\n", worst);
  assert_true(wn_log(1) == 0);
  assert_true(fabsf(wn_log(0) - logf(0x1p-126f)) < 1e-5f); /* finite: it is multiplied by p = 0 */
  assert_true(isnan(wn_log(NAN)));
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(exp_is_accurate), cmocka_unit_test(log_is_accurate)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
