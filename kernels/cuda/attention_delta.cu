/* delta and the rounded o, from an o that the forward of attention_dense or attention_masked left unrounded: one pass
 * over memory. Four lanes have a row of a head, and add in the order of wn_finish_rows (attention_forward.cuh). */
#include "kernels/cuda/attention_tile.cuh"

enum { THREADS = 256, LANES = 4, CHUNKS = 4 }; /* CHUNKS of 8 columns are under way at once */

/* Columns col and col + 1 of d_o; 0 past the width. */
__device__ __forceinline__ static float2 gradient_pair(const wn_bf16 *row, int col, int width, bool pairs) {
  if (pairs) return col < width ? __bfloat1622float2(*(const __nv_bfloat162 *)(row + col)) : make_float2(0, 0);
  return make_float2(col < width ? __bfloat162float(row[col]) : 0,
                     col + 1 < width ? __bfloat162float(row[col + 1]) : 0);
}

__device__ __forceinline__ static float2 output_pair(const float *row, int col, int width, bool pairs) {
  if (pairs) return col < width ? *(const float2 *)(row + col) : make_float2(0, 0);
  return make_float2(col < width ? row[col] : 0, col + 1 < width ? row[col + 1] : 0);
}

__device__ __forceinline__ static void put_pair(wn_bf16 *row, int col, int width, bool pairs, float2 x) {
  if (pairs) {
    if (col < width) *(__nv_bfloat162 *)(row + col) = __floats2bfloat162_rn(x.x, x.y);
    return;
  }
  if (col < width) row[col] = __float2bfloat16_rn(x.x);
  if (col + 1 < width) row[col + 1] = __float2bfloat16_rn(x.y);
}

__global__ static void __launch_bounds__(THREADS)
    delta_kernel(wn_view<float> delta, wn_view<wn_bf16> o, wn_view<float> unrounded, wn_view<wn_bf16> d_o, bool pairs) {
  const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / LANES, all = unrounded.n * unrounded.heads;
  const int64_t at = i < all ? i : all - 1; /* all lanes of a warp take part in the sums */
  const int64_t row = at / unrounded.heads;
  const int head = (int)(at % unrounded.heads), width = unrounded.width, first = (int)(threadIdx.x % LANES) * 2;
  const float *from = unrounded.data + row * unrounded.row + head * unrounded.head;
  const wn_bf16 *grad = d_o.data + row * d_o.row + head * d_o.head;
  wn_bf16 *to = o.data + row * o.row + head * o.head;
  float sum = 0;
  for (int col = first; col < width; col += 8 * CHUNKS) {
    float2 x[CHUNKS], g[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      x[c] = output_pair(from, col + 8 * c, width, pairs);
      g[c] = gradient_pair(grad, col + 8 * c, width, pairs);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      sum = wn_delta_step(sum, x[c], g[c]);
      if (i < all) put_pair(to, col + 8 * c, width, pairs, x[c]);
    }
  }
  sum = wn_quad_sum(sum);
  if (i < all && threadIdx.x % LANES == 0) delta.data[row * delta.row + head] = sum;
}

/* Two columns at a time: all widths and strides even, all addresses on pairs. */
template <typename T> static bool pairs_of(const wn_view<T> &x) {
  return wn_view_aligned(x, 2 * sizeof(T)) && x.width % 2 == 0;
}

wn_status wn_cuda_attention_delta(wn_device *device, wn_tensor *delta, wn_tensor *o, const wn_tensor *unrounded,
                                  const wn_tensor *d_o) {
  const int64_t n = unrounded->dim[0], heads = unrounded->dim[1], width = unrounded->dim[2];
  WN_CUDA_EXPECT(unrounded, WN_F32, 3, n, heads, width);
  const wn_view<float> from = wn_view_of<float>(unrounded), sums = wn_attend_stat(delta, n, heads);
  const wn_view<wn_bf16> to = wn_attend_heads(o, n, heads, width), grad = wn_attend_heads(d_o, n, heads, width);
  const int64_t blocks = wn_ceil_div(n * heads * LANES, THREADS);
  if (blocks == 0) return NULL;
  WN_ASSERT(blocks <= INT32_MAX, "%lld rows of %lld heads", (long long)n, (long long)heads);
  const bool pairs = pairs_of(from) && pairs_of(to) && pairs_of(grad);
  delta_kernel<<<(unsigned)blocks, THREADS, 0, wn_cuda_stream(device)>>>(sums, to, from, grad, pairs);
  WN_CUDA_LAUNCHED("attention_delta");
  return NULL;
}
