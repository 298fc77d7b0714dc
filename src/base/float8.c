/* Conversions by bits, free of branches, so that their loops become vector code. */
#include "base/float8.h"

#include <math.h>

#include "base/bits.h"
#include "base/status.h"

enum { MANTISSA_SHIFT = 23 - 3, EXPONENT_SHIFT = 23, BIAS_GAP = 127 - 7, CODE_NAN = 0x7f, CODE_LARGEST = 0x7e };

static inline float decode(uint8_t code) {
  uint32_t magnitude = code & 0x7fu, sign = (uint32_t)(code & 0x80u) << 24;
  uint32_t normal = (magnitude << MANTISSA_SHIFT) + ((uint32_t)BIAS_GAP << EXPONENT_SHIFT);
  uint32_t subnormal = wn_bits_of((float)(int32_t)magnitude * 0x1p-9f);
  uint32_t bits = magnitude < 8 ? subnormal : normal;
  return wn_float_of(sign | (magnitude == CODE_NAN ? 0x7fc00000u : bits));
}

static inline uint8_t encode(float x) {
  uint32_t bits = wn_bits_of(x), magnitude = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  /* adding half of what is cut off, less one where the kept part is even, carries exactly where rounding goes up */
  uint32_t half = (1u << (MANTISSA_SHIFT - 1)) - 1 + (magnitude >> MANTISSA_SHIFT & 1);
  uint32_t normal = ((magnitude + half) >> MANTISSA_SHIFT) - ((uint32_t)BIAS_GAP << 3);
  /* floats from 2^14 on lie 2^-9 apart, as subnormal codes do: the addition itself rounds */
  uint32_t subnormal = wn_bits_of(wn_float_of(magnitude) + 0x1p14f) - wn_bits_of(0x1p14f);
  uint32_t code = magnitude < wn_bits_of(0x1p-6f) ? subnormal : normal;
  code = magnitude > wn_bits_of(448.0f) ? CODE_LARGEST : code;
  code = magnitude > 0x7f800000u ? CODE_NAN : code;
  return (uint8_t)(sign | code);
}

float wn_f32_from_e4m3(uint8_t code) {
  return decode(code);
}

uint8_t wn_e4m3_from_f32(float x) {
  return encode(x);
}

float wn_f32_from_e8m0(uint8_t code) {
  if (code == 0xff) return NAN;
  return wn_float_of(code ? (uint32_t)code << EXPONENT_SHIFT : 1u << (EXPONENT_SHIFT - 1)); /* 2^-127 is subnormal */
}

float wn_f8_scale(float amax) {
  uint32_t bits = wn_bits_of(fmaxf(amax, 1e-4f) / 448.0f);
  uint32_t exponent = (bits >> EXPONENT_SHIFT) + ((bits & 0x7fffffu) != 0);
  return wn_float_of(exponent << EXPONENT_SHIFT);
}

void wn_f8_dequantise(float *out, const uint8_t *codes, const float *scales, int64_t n_cols, int64_t first,
                      int64_t count) {
  const int64_t blocks = wn_f8_blocks(n_cols);
  for (int64_t done = 0, n; done < count; done += n) { /* n: what is left of a block's row */
    int64_t row = (first + done) / n_cols, col = (first + done) % n_cols, left = n_cols - col;
    n = WN_F8_BLOCK - col % WN_F8_BLOCK;
    n = n < left ? n : left;
    n = n < count - done ? n : count - done;
    const float scale = scales[row / WN_F8_BLOCK * blocks + col / WN_F8_BLOCK];
    const uint8_t *from = codes + done;
    float *to = out + done;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) to[i] = decode(from[i]) * scale;
  }
}

void wn_f8_quantise_block(uint8_t *codes, float *scale, const float *x, int64_t rows, int64_t cols, int64_t stride_out,
                          int64_t stride_in) {
  WN_ASSERT(rows <= WN_F8_BLOCK && cols <= WN_F8_BLOCK, "a block of %lld x %lld", (long long)rows, (long long)cols);
  uint32_t largest = 0; /* magnitudes order as their bits do */
  for (int64_t r = 0; r < rows; r++) {
    const float *from = x + r * stride_in;
#pragma omp simd reduction(max : largest)
    for (int64_t c = 0; c < cols; c++) {
      uint32_t magnitude = wn_bits_of(from[c]) & 0x7fffffffu;
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  *scale = wn_f8_scale(wn_float_of(largest));
  const float inverse = 1.0f / *scale; /* both powers of two: exact, as the products are but for underflow to 0 */
  for (int64_t r = 0; r < rows; r++) {
    const float *from = x + r * stride_in;
    uint8_t *to = codes + r * stride_out;
#pragma omp simd
    for (int64_t c = 0; c < cols; c++) to[c] = encode(from[c] * inverse);
  }
}
