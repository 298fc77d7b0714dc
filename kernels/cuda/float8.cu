/* FP8 weights to BF16: one pass over memory, 16 codes a thread where a row's length allows it (16 divides a block's 128
 * columns, so they share a scale). */
#include <cuda_fp8.h>

extern "C" {
#include "base/float8.h"
}
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/pack.cuh"

enum { THREADS = 256, CODES = 16, UNROLL = 2 };

__device__ __forceinline__ float decode(uint8_t code) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(code, __NV_E4M3))); /* every code is a half, exactly */
}

typedef struct fp8_weights {
  wn_bf16 *w; /* [rows, cols] */
  const uint8_t *codes;
  const float *scale;            /* [blocks of rows, blocks] */
  int64_t cols, blocks, per_row; /* units of N codes a row */
  int64_t units;
} fp8_weights;

/* UNITS units of N neighbours of a row a thread, all of them under way at once. INDEX holds the number of a unit. */
template <int N, int UNITS, typename INDEX>
__global__ void __launch_bounds__(THREADS) dequantise_kernel(fp8_weights p) {
  const INDEX first = (INDEX)blockIdx.x * (THREADS * UNITS) + threadIdx.x;
  wn_pack<uint8_t, CODES> raw[UNITS];
  float scale[UNITS];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const INDEX unit = first + u * THREADS;
    if (unit >= (INDEX)p.units) break;
    const INDEX row = unit / (INDEX)p.per_row, col = (unit - row * (INDEX)p.per_row) * N;
    scale[u] = p.scale[(int64_t)(row / WN_F8_BLOCK) * p.blocks + col / WN_F8_BLOCK];
    if constexpr (N == CODES)
      raw[u] = wn_pack_load<uint8_t, CODES>(p.codes + (int64_t)unit * N);
    else
      raw[u].raw[0].x = p.codes[unit];
  }
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const INDEX unit = first + u * THREADS;
    if (unit >= (INDEX)p.units) break;
    const uint32_t four[4] = {raw[u].raw[0].x, raw[u].raw[0].y, raw[u].raw[0].z, raw[u].raw[0].w};
    float x[N];
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = decode((uint8_t)(four[i / 4] >> i % 4 * 8)) * scale[u];
    wn_write<wn_bf16, N>(p.w + (int64_t)unit * N, x);
  }
}

wn_status wn_cuda_dequantise(wn_device *device, wn_tensor *w, const wn_tensor *codes, const wn_tensor *scale) {
  const int64_t rows = codes->dim[0], cols = codes->dim[1], blocks = wn_f8_blocks(cols);
  WN_CUDA_EXPECT(w, WN_BF16, 2, rows, cols, 0);
  WN_CUDA_EXPECT(codes, WN_F8_E4M3, 2, rows, cols, 0);
  WN_CUDA_EXPECT(scale, WN_F32, 2, wn_f8_blocks(rows), blocks, 0);
  WN_ASSERT(wn_tensor_dense(w) && wn_tensor_dense(codes) && wn_tensor_dense(scale), "strided FP8 weights");
  fp8_weights p = {(wn_bf16 *)w->data, (const uint8_t *)codes->data, (const float *)scale->data, cols, blocks, cols, 0};
  if (rows * cols == 0) return NULL;
  cudaStream_t stream = wn_cuda_stream(device);
  const bool packs = (uintptr_t)w->data % 16 == 0 && (uintptr_t)codes->data % 16 == 0 && cols % CODES == 0;
  if (packs && rows * cols / CODES < INT32_MAX) { /* 32-bit divisions */
    p.per_row = cols / CODES;
    p.units = rows * p.per_row;
    dequantise_kernel<CODES, UNROLL, uint32_t>
        <<<(unsigned)wn_ceil_div(p.units, THREADS * UNROLL), THREADS, 0, stream>>>(p);
  } else {
    p.units = rows * cols;
    dequantise_kernel<1, 1, int64_t><<<(unsigned)wn_ceil_div(p.units, THREADS), THREADS, 0, stream>>>(p);
  }
  WN_CUDA_LAUNCHED("dequantise");
  return NULL;
}
