/* exp and log, written so that a loop over them becomes vector code without a call: the library's vector exp
 * falls back to one scalar call per lane as soon as a lane underflows, and masked logits do. */
#ifndef WN_KERNELS_CPU_EXPO_H
#define WN_KERNELS_CPU_EXPO_H

#include <math.h>
#include <string.h>

#include "kernels/cpu/real.h"

#ifdef WN_REAL64
/* Below -708 exp is under the smallest normal number: 0. */
static inline double wn_exp(double x) {
  double y = exp(x < -708.0 ? -708.0 : x);
  return x < -708.0 ? 0.0 : y;
}
#else
/* Relative error under 2e-7; 0 below -87 (where exp leaves the normal numbers); inf above 88; NaN stays NaN.
 * exp(x) = 2^n exp(r), |r| <= ln 2 / 2, with Cephes' polynomial for exp(r). */
static inline float wn_exp(float x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, held in the low bits */
  float clamped = x < -87.0f ? -87.0f : x;
  clamped = clamped > 88.0f ? 88.0f : clamped;
  float shifted = clamped * 1.44269504f + magic, n = shifted - magic;
  float r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  y *= power;
  y = x < -87.0f ? 0.0f : y;
  return x > 88.0f ? INFINITY : y;
}
#endif

/* log for arguments at or above 0; 0 and what is under the normal numbers give the smallest one's. */
#ifdef WN_REAL64
static inline double wn_log(double x) {
  return log(x < 0x1p-1022 ? 0x1p-1022 : x);
}
#else
/* Relative error under 2e-7. x = 2^n m with m in sqrt(1/2) .. sqrt(2), and Cephes' polynomial for log(m). */
static inline float wn_log(float x) {
  float normal = x < 0x1p-126f ? 0x1p-126f : x;
  uint32_t bits;
  memcpy(&bits, &normal, sizeof bits);
  uint32_t above = bits - 0x3f3504f3u; /* bits of sqrt(1/2) */
  int32_t n = (int32_t)above >> 23;
  bits = (above & 0x007fffffu) + 0x3f3504f3u;
  float m;
  memcpy(&m, &bits, sizeof m);
  m -= 1.0f;
  float y = 7.0376836292e-2f;
  y = y * m - 1.1514610310e-1f;
  y = y * m + 1.1676998740e-1f;
  y = y * m - 1.2420140846e-1f;
  y = y * m + 1.4249322787e-1f;
  y = y * m - 1.6668057665e-1f;
  y = y * m + 2.0000714765e-1f;
  y = y * m - 2.4999993993e-1f;
  y = y * m + 3.3333331174e-1f;
  float square = m * m, exponent = (float)n;
  y = y * m * square + exponent * -2.12194440e-4f - 0.5f * square;
  y = m + y + exponent * 0.693359375f;
  return x == x ? y : x;
}
#endif

#endif
