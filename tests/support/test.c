#include "support/test.h"

#include <math.h>
#include <string.h>

#include "base/float8.h"

void wn_test_ok(wn_status status, const char *file, int line) {
  if (!status) return;
  print_error("%s [%s] (%s)\n", wn_status_text(status), wn_status_hint(status), wn_status_trace(status));
  wn_status_free(status);
  _fail(file, line);
}

void wn_test_error(wn_status status, wn_code code, const char *part, const char *file, int line) {
  if (!status) {
    print_error("no error; expected code %d about '%s'\n", (int)code, part);
    _fail(file, line);
    return;
  }
  if (wn_status_code(status) != code || !strstr(wn_status_text(status), part)) {
    print_error("error %d '%s'; expected code %d about '%s'\n", (int)wn_status_code(status), wn_status_text(status),
                (int)code, part);
    _fail(file, line);
  }
  wn_status_free(status);
}

static char *address(const wn_tensor *t, int64_t i) {
  int64_t offset = 0;
  for (int32_t axis = t->rank - 1; axis >= 0; axis--) {
    offset += i % t->dim[axis] * t->stride[axis];
    i /= t->dim[axis];
  }
  return (char *)t->data + offset * wn_dtype_bytes(t->dtype);
}

double wn_test_get(const wn_tensor *t, int64_t i) {
  const void *at = address(t, i);
  switch (t->dtype) {
  case WN_F32: return (double)*(const float *)at;
  case WN_F64: return *(const double *)at;
  case WN_BF16: return (double)wn_f32_from_bf16(*(const uint16_t *)at);
  case WN_F16: return (double)wn_f32_from_f16(*(const uint16_t *)at);
  case WN_I32: return *(const int32_t *)at;
  case WN_I64: return (double)*(const int64_t *)at;
  case WN_U8: return *(const uint8_t *)at;
  case WN_F8_E4M3: return (double)wn_f32_from_e4m3(*(const uint8_t *)at);
  case WN_F8_E8M0: return (double)wn_f32_from_e8m0(*(const uint8_t *)at);
  case WN_N_DTYPES: break;
  }
  fail_msg("no element of dtype %s", wn_dtype_name(t->dtype));
  return 0;
}

void wn_test_set(wn_tensor *t, int64_t i, double value) {
  void *at = address(t, i);
  switch (t->dtype) {
  case WN_F32: *(float *)at = (float)value; return;
  case WN_F64: *(double *)at = value; return;
  case WN_BF16: *(uint16_t *)at = wn_bf16_from_f32((float)value); return;
  case WN_I32: *(int32_t *)at = (int32_t)value; return;
  case WN_I64: *(int64_t *)at = (int64_t)value; return;
  case WN_U8: *(uint8_t *)at = (uint8_t)value; return;
  case WN_F8_E4M3: *(uint8_t *)at = wn_e4m3_from_f32((float)value); return;
  case WN_F16:
  case WN_F8_E8M0:
  case WN_N_DTYPES: break;
  }
  fail_msg("cannot set dtype %s", wn_dtype_name(t->dtype));
}

void wn_test_fill(wn_tensor *t, uint64_t seed, double deviation, double mean) {
  int64_t n = wn_tensor_count(t);
  for (int64_t i = 0; i < n; i++) wn_test_set(t, i, mean + deviation * wn_rng_normal(seed, WN_RNG_TEST, (uint64_t)i));
}

void wn_test_close(const char *what, const wn_tensor *a, const wn_tensor *b, double absolute, double relative) {
  assert_true(wn_tensor_same_shape(a, b));
  int64_t n = wn_tensor_count(a), bad = 0, first = -1;
  double worst = 0;
  for (int64_t i = 0; i < n; i++) {
    double x = wn_test_get(a, i), y = wn_test_get(b, i), gap = fabs(x - y);
    if (x == y) continue;
    if (gap <= absolute + relative * fabs(y)) continue; /* NaN falls through: it never compares */
    if (bad++ == 0) first = i;
    if (!(gap <= worst)) worst = gap;
  }
  if (!bad) return;
  int64_t rest = first, at[WN_MAX_RANK] = {0};
  for (int32_t axis = a->rank - 1; axis >= 0; axis--) {
    at[axis] = rest % a->dim[axis];
    rest /= a->dim[axis];
  }
  fail_msg("%s: %lld of %lld differ, worst by %g; first at [%lld,%lld,%lld,%lld]: %.9g, expected %.9g", what,
           (long long)bad, (long long)n, worst, (long long)at[0], (long long)at[1], (long long)at[2], (long long)at[3],
           wn_test_get(a, first), wn_test_get(b, first));
}

double wn_test_relative_norm(const wn_tensor *a, const wn_tensor *b) {
  assert_true(wn_tensor_same_shape(a, b));
  double gap = 0, size = 0;
  int64_t n = wn_tensor_count(a);
  for (int64_t i = 0; i < n; i++) {
    double x = wn_test_get(a, i), y = wn_test_get(b, i);
    gap += (x - y) * (x - y);
    size += y * y;
  }
  if (gap == 0) return 0;
  return size > 0 ? sqrt(gap / size) : INFINITY;
}
