/* What every test includes: cmocka in the order it wants, and comparisons that name the first bad coordinate. */
#ifndef WN_TEST_H
#define WN_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <cmocka.h>

#include "base/rng.h"
#include "base/tensor.h"

/* Fails the test with the error's sentence when `status` is one. */
void wn_test_ok(wn_status status, const char *file, int line);
#define OK(expression) wn_test_ok((expression), __FILE__, __LINE__)
/* Fails unless `status` is an error of `code` whose sentence holds `part`; frees it. */
void wn_test_error(wn_status status, wn_code code, const char *part, const char *file, int line);
#define REFUSED(expression, code, part) wn_test_error((expression), (code), (part), __FILE__, __LINE__)

/* Element i (row-major order over the shape, strides honoured) of a float, double, bf16 or integer tensor. */
double wn_test_get(const wn_tensor *t, int64_t i);
void wn_test_set(wn_tensor *t, int64_t i, double value);
/* Normal values times `deviation`, plus `mean`, from (seed, element). */
void wn_test_fill(wn_tensor *t, uint64_t seed, double deviation, double mean);
/* |a - b| <= absolute + relative * |b| everywhere (equal infinities agree, NaN never does); else fails, naming `what`
 * and the first bad coordinate. */
void wn_test_close(const char *what, const wn_tensor *a, const wn_tensor *b, double absolute, double relative);
/* ||a - b|| / ||b|| (0 when both are 0). */
double wn_test_relative_norm(const wn_tensor *a, const wn_tensor *b);

#endif
