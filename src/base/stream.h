/* Copies of whole weights, which are next used when others have taken the cache. */
#ifndef WN_BASE_STREAM_H
#define WN_BASE_STREAM_H

#include <stdint.h>

/* out[n] = from[n], written past the cache where the processor can. Returned is the largest without its sign, as bits
 * (0 of none): from WN_F32_INFINITY on, some are infinite or NaN. */
#define WN_F32_INFINITY 0x7f800000u
uint32_t wn_f32s_stream(float *out, const float *from, int64_t n);

/* Of n floats, how many lie before the first multiple of 32 bytes, from which on whole lines can be written. */
static inline int64_t wn_f32s_before_line(const float *out, int64_t n) {
  int64_t before = (int64_t)(-(uintptr_t)out / sizeof *out % 8);
  return before < n ? before : n;
}

#endif
