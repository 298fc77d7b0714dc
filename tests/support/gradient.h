/* Directional central differences in FP64. For a random direction d (independent normal elements) the slope
 *   (8 (L(x + h d) - L(x - h d)) - (L(x + 2h d) - L(x - 2h d))) / 12h
 * is compared with <gradient, d>. One direction sees every element at once, so a few wrong ones show as clearly as
 * many; the cost is four evaluations of the loss, whatever the size of x. */
#ifndef WN_TEST_GRADIENT_H
#define WN_TEST_GRADIENT_H

#include "support/test.h"

/* The loss at what the tensors hold now. Everything discrete in it (experts, selections) must be held fixed. */
typedef double (*wn_test_loss)(void *context);

typedef struct wn_test_gradient_settings {
  int32_t directions;
  double step;      /* h: each element moves by about this much */
  double tolerance; /* on |slope - <gradient, d>| / max(||gradient||, |slope|) */
  uint64_t seed;
} wn_test_gradient_settings;

/* What most operations take: 3 directions, step 1e-3, tolerance 1e-6. */
wn_test_gradient_settings wn_test_gradient_defaults(void);

/* Fails, naming `name`, when a direction misses the tolerance. x is F64 and is put back bit for bit; gradient has its
 * shape. Gives the worst relative error seen. */
double wn_test_gradient(const char *name, wn_tensor *x, const wn_tensor *gradient, wn_test_loss loss, void *context,
                        wn_test_gradient_settings settings);

/* sum of a * b over all elements: the loss whose gradient with respect to a is b. */
double wn_test_dot(const wn_tensor *a, const wn_tensor *b);

#endif
