#include "support/gradient.h"

#include <math.h>
#include <stdlib.h>

wn_test_gradient_settings wn_test_gradient_defaults(void) {
  return (wn_test_gradient_settings){.directions = 3, .step = 1e-3, .tolerance = 1e-6, .seed = 1};
}

double wn_test_dot(const wn_tensor *a, const wn_tensor *b) {
  assert_true(wn_tensor_same_shape(a, b));
  double sum = 0;
  for (int64_t i = 0; i < wn_tensor_count(a); i++) sum += wn_test_get(a, i) * wn_test_get(b, i);
  return sum;
}

/* Element i of a direction: a pure function of (seed, direction, i), so that it need not be stored. */
static double direction_at(const wn_test_gradient_settings *s, int32_t direction, int64_t i) {
  return wn_rng_normal(s->seed * 1000 + (uint64_t)direction, WN_RNG_TEST, (uint64_t)i);
}

static double loss_at(wn_tensor *x, const double *start, double distance, int32_t direction, wn_test_loss loss,
                      void *context, const wn_test_gradient_settings *s) {
  for (int64_t i = 0; i < wn_tensor_count(x); i++)
    wn_test_set(x, i, start[i] + distance * direction_at(s, direction, i));
  return loss(context);
}

double wn_test_gradient(const char *name, wn_tensor *x, const wn_tensor *gradient, wn_test_loss loss, void *context,
                        wn_test_gradient_settings settings) {
  assert_int_equal(x->dtype, WN_F64);
  assert_true(wn_tensor_same_shape(x, gradient));
  int64_t n = wn_tensor_count(x);
  double *start = malloc((size_t)n * sizeof *start), h = settings.step, worst = 0;
  assert_non_null(start);
  for (int64_t i = 0; i < n; i++) start[i] = wn_test_get(x, i);
  double size = sqrt(wn_test_dot(gradient, gradient));
  for (int32_t d = 0; d < settings.directions; d++) {
    double near =
        loss_at(x, start, h, d, loss, context, &settings) - loss_at(x, start, -h, d, loss, context, &settings);
    double far =
        loss_at(x, start, 2 * h, d, loss, context, &settings) - loss_at(x, start, -2 * h, d, loss, context, &settings);
    double slope = (8 * near - far) / (12 * h), expected = 0;
    for (int64_t i = 0; i < n; i++) expected += wn_test_get(gradient, i) * direction_at(&settings, d, i);
    double error = fabs(slope - expected), scale = fmax(size, fabs(slope));
    if (error > 0) error /= scale;
    if (!(error <= settings.tolerance)) {
      free(start);
      fail_msg("%s, direction %d: slope %.12g, gradient says %.12g, relative error %.3g (norm %.3g)", name, d, slope,
               expected, error, size);
    }
    worst = fmax(worst, error);
  }
  for (int64_t i = 0; i < n; i++) wn_test_set(x, i, start[i]);
  free(start);
  return worst;
}
