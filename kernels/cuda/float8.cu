/* FP8 weights to BF16: one pass over memory, 16 codes a thread where a row's length allows it (16 divides a block's 128
 * columns, so they share a scale).
 *
 * Ladder, one H200, best of ten rounds of 20 matrices each, against a copy's 4.24 TB/s:
 *                                              2048 x 7168            32768 x 7168
 *   16 codes a thread                          14.8 us  2.98 TB/s     179 us  3.93 TB/s, 93%    ships
 *   the same, 32-bit divisions                 15.8 us  2.79 TB/s     189 us  3.73 TB/s
 *   ... and 2 such units a thread              18.2 us  2.42 TB/s     210 us  3.35 TB/s
 *   ... and 4                                  20.9 us  2.11 TB/s
 * A small matrix is short of a copy by its launch and its tail; more work a thread makes the tail longer. */
#include <cuda_fp8.h>

extern "C" {
#include "base/float8.h"
}
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/pack.cuh"

enum { THREADS = 256, CODES = 16 };

__device__ __forceinline__ float decode(uint8_t code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3))); /* every code is a half, exactly */
}

typedef struct fp8_weights {
  wn_bf16 *w; /* [rows, cols] */
  const uint8_t *codes;
  const float *scale; /* [blocks of rows, blocks] */
  int64_t cols, blocks, units;
} fp8_weights;

/* N neighbours of a row a thread. */
template <int N> __global__ void __launch_bounds__(THREADS) dequantise_kernel(fp8_weights p) {
  const int64_t unit = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (unit >= p.units) return;
  const int64_t at = unit * N, row = at / p.cols, col = at - row * p.cols;
  const float scale = p.scale[row / WN_F8_BLOCK * p.blocks + col / WN_F8_BLOCK];
  float x[N];
  if constexpr (N == CODES) {
    const uint4 raw = *(const uint4 *)(p.codes + at);
    const uint32_t four[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = decode((uint8_t)(four[i / 4] >> i % 4 * 8)) * scale;
  } else {
    x[0] = decode(p.codes[at]) * scale;
  }
  wn_write<wn_bf16, N>(p.w + at, x);
}

wn_status wn_cuda_dequantise(wn_device *device, wn_tensor *w, const wn_tensor *codes, const wn_tensor *scale) {
  const int64_t rows = codes->dim[0], cols = codes->dim[1], blocks = wn_f8_blocks(cols);
  WN_CUDA_EXPECT(w, WN_BF16, 2, rows, cols, 0);
  WN_CUDA_EXPECT(codes, WN_F8_E4M3, 2, rows, cols, 0);
  WN_CUDA_EXPECT(scale, WN_F32, 2, wn_f8_blocks(rows), blocks, 0);
  WN_ASSERT(wn_tensor_dense(w) && wn_tensor_dense(codes) && wn_tensor_dense(scale), "strided FP8 weights");
  fp8_weights p = {(wn_bf16 *)w->data, (const uint8_t *)codes->data, (const float *)scale->data, cols, blocks, 0};
  if (rows * cols == 0) return NULL;
  const bool packs = (uintptr_t)w->data % 16 == 0 && (uintptr_t)codes->data % 16 == 0 && cols % CODES == 0;
  p.units = rows * cols / (packs ? CODES : 1);
  const unsigned grid = (unsigned)wn_ceil_div(p.units, THREADS);
  if (packs)
    dequantise_kernel<CODES><<<grid, THREADS, 0, wn_cuda_stream(device)>>>(p);
  else
    dequantise_kernel<1><<<grid, THREADS, 0, wn_cuda_stream(device)>>>(p);
  WN_CUDA_LAUNCHED("dequantise");
  return NULL;
}
