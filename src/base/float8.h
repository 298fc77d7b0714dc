/* FP8 weights as DeepSeek-V3 checkpoints hold them: E4M3 codes (4 exponent bits of bias 7, 3 mantissa bits, no
 * infinity, NaN 0x7f and 0xff, largest 448) with one scale for each 128 x 128 block. Subnormals are kept throughout.
 * Everything here is bit for bit what torch.float8_e4m3fn, weight_dequant and per_block_cast_to_fp8 give. */
#ifndef WN_BASE_FLOAT8_H
#define WN_BASE_FLOAT8_H

#include <stdint.h>

enum { WN_F8_BLOCK = 128 }; /* rows and columns that share a scale; at an edge fewer */

float wn_f32_from_e4m3(uint8_t code);
/* To nearest, ties to even; beyond +-448 (infinities too) to +-448; NaN to 0x7f with its sign. */
uint8_t wn_e4m3_from_f32(float x);
float wn_f32_from_e8m0(uint8_t code); /* 2^(code - 127); 0xff is NaN */

/* The power of two next above or equal to max(amax, 1e-4) / 448 (FP32): by its bits, since a logarithm in FP32 errs
 * just above 448 * 2^k. amax: the largest magnitude of a block, finite. */
float wn_f8_scale(float amax);

/* Blocks along a dimension of n. */
static inline int64_t wn_f8_blocks(int64_t n) {
  return (n + WN_F8_BLOCK - 1) / WN_F8_BLOCK;
}

/* out[i] = FP32(code * scale) for flat elements first .. first + count - 1 of a dense [rows, n_cols] matrix: `codes`
 * begins with that of element `first`, `scales` [ceil(rows/128), ceil(n_cols/128)] with the matrix's own first.
 * weight_dequant rounds this on to BF16; the caller does. */
void wn_f8_dequantise(float *out, const uint8_t *codes, const float *scales, int64_t n_cols, int64_t first,
                      int64_t count);

/* One block of rows x cols, each at most 128, with row strides in elements: its scale by wn_f8_scale, its codes
 * E4M3(x / scale). x finite. */
void wn_f8_quantise_block(uint8_t *codes, float *scale, const float *x, int64_t rows, int64_t cols, int64_t stride_out,
                          int64_t stride_in);

#endif
