#include "base/stream.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "base/bits.h"

static uint32_t copy(float *out, const float *from, int64_t n) {
  uint32_t most = 0;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; i++) {
    uint32_t magnitude = wn_bits_of(from[i]) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
    out[i] = from[i];
  }
  return most;
}

static uint32_t larger(uint32_t a, uint32_t b) {
  return a > b ? a : b;
}

#ifdef __AVX2__
/* n a multiple of 8, out on a multiple of 32 bytes. A whole line at a time is overwritten without being fetched. */
static uint32_t stream(float *out, const float *from, int64_t n) {
  const __m256i unsigned_part = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  uint32_t lane[8], largest = 0;
  for (int64_t i = 0; i < n; i += 8) {
    __m256i x = _mm256_loadu_si256((const void *)(from + i));
    most = _mm256_max_epu32(most, _mm256_and_si256(x, unsigned_part));
    _mm256_stream_si256((void *)(out + i), x);
  }
  _mm_sfence();
  _mm256_storeu_si256((void *)lane, most);
  for (int i = 0; i < 8; i++) largest = larger(largest, lane[i]);
  return largest;
}
#else
static uint32_t stream(float *out, const float *from, int64_t n) {
  return copy(out, from, n);
}
#endif

uint32_t wn_f32s_stream(float *out, const float *from, int64_t n) {
  int64_t before = wn_f32s_before_line(out, n), past = (n - before) / 8 * 8, after = before + past;
  uint32_t most = copy(out, from, before);
  most = larger(most, stream(out + before, from + before, past));
  return larger(most, copy(out + after, from + after, n - after));
}
