/* The sum of a reduce-scatter: the ranks' contributions to one piece, added in a fixed order, so that a sum has the
 * same bits whatever carried the bytes.
 *
 * The order is that of src/dist/collective.c: pairs of neighbours, then pairs of pairs, ((0+1)+(2+3))+((4+5)+6). A
 * thread owns elements: it adds up eight ranks at a time as a tree in registers, and the trees of eight meet in a stack
 * that works like a binary counter: tree number g joins the trees of the levels whose bits are set at the bottom of g.
 *
 * Ladder, n = 32 Mi on one H200, TB/s for 2, 4, 8 and 16 ranks (copy rate 4.2):
 *   1: the stack for every size           2.65, 3.36, 4.12, 4.21
 *   2: no stack for up to eight ranks     3.74, 4.04, 4.24, 4.23   ships */
#include "kernels/cuda/operations.cuh"

enum { THREADS = 256, GROUP = 8, DEPTH = 10, MOST_RANKS = GROUP << DEPTH };

/* The tree over the first `count` of eight, into x[0]. */
template <int WIDTH> __device__ static void add_group(float x[GROUP][WIDTH], int count) {
#pragma unroll
  for (int step = 1; step < GROUP; step *= 2)
#pragma unroll
    for (int r = 0; r + step < GROUP; r += 2 * step)
      if (r + step < count)
#pragma unroll
        for (int v = 0; v < WIDTH; v++) x[r][v] += x[r + step][v];
}

template <int WIDTH> __device__ static void load(float x[WIDTH], const float *from) {
  if (WIDTH == 4)
    *(float4 *)x = *(const float4 *)from;
  else
    x[0] = from[0];
}

/* `packs` of WIDTH elements; n = packs * WIDTH is the distance between ranks. LEVELS: of the stack, 0 for one group. */
template <int WIDTH, int LEVELS>
__global__ static void sum_pieces_kernel(float *piece, const float *received, int size, int64_t packs) {
  const int64_t n = packs * WIDTH, stride = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < packs; i += stride) {
    float x[GROUP][WIDTH], stack[LEVELS + 1][WIDTH];
    const int groups = (size + GROUP - 1) / GROUP;
    for (int g = 0; g < groups; g++) {
      const int count = min(GROUP, size - g * GROUP);
#pragma unroll
      for (int r = 0; r < GROUP; r++)
        if (r < count) load<WIDTH>(x[r], received + (g * GROUP + r) * n + i * WIDTH);
      add_group<WIDTH>(x, count);
      bool open = true; /* until the first clear bit of g, where this tree waits for its right neighbour */
#pragma unroll
      for (int level = 0; level < LEVELS; level++) {
        const bool full = (g >> level & 1) != 0;
#pragma unroll
        for (int v = 0; v < WIDTH; v++) {
          if (open && full) x[0][v] = stack[level][v] + x[0][v];
          if (open && !full) stack[level][v] = x[0][v];
        }
        open = open && full;
      }
    }
    bool any = LEVELS == 0; /* what waits, from the right: the lowest level is the latest tree */
#pragma unroll
    for (int level = 0; level < LEVELS; level++) {
      if ((groups >> level & 1) == 0) continue;
#pragma unroll
      for (int v = 0; v < WIDTH; v++) x[0][v] = any ? stack[level][v] + x[0][v] : stack[level][v];
      any = true;
    }
    float sum[WIDTH];
    load<WIDTH>(sum, piece + i * WIDTH);
#pragma unroll
    for (int v = 0; v < WIDTH; v++) sum[v] += x[0][v];
    if (WIDTH == 4)
      *(float4 *)(piece + i * WIDTH) = *(float4 *)sum;
    else
      piece[i] = sum[0];
  }
}

template <int WIDTH>
static wn_status sum_packs(wn_device *device, cudaStream_t queue, float *piece, const float *received, int32_t size,
                           int64_t packs) {
  const int64_t blocks = wn_ceil_div(packs, THREADS), most = (int64_t)wn_cuda_of(device)->n_sms * 16;
  const unsigned grid = (unsigned)(blocks < most ? blocks : most);
  if (size <= GROUP)
    sum_pieces_kernel<WIDTH, 0><<<grid, THREADS, 0, queue>>>(piece, received, size, packs);
  else
    sum_pieces_kernel<WIDTH, DEPTH><<<grid, THREADS, 0, queue>>>(piece, received, size, packs);
  WN_CUDA_LAUNCHED("sum_pieces");
  return NULL;
}

extern "C" wn_status wn_cuda_sum_pieces(wn_device *device, void *queue, float *piece, const float *received,
                                        int32_t size, int64_t n) {
  WN_ASSERT(size >= 1 && size < MOST_RANKS, "a sum over %d ranks", size);
  WN_ASSERT(n >= 0, "%lld elements", (long long)n);
  if (n == 0) return NULL;
  if (n % 4 == 0 && (uintptr_t)piece % 16 == 0 && (uintptr_t)received % 16 == 0)
    return sum_packs<4>(device, (cudaStream_t)queue, piece, received, size, n / 4);
  return sum_packs<1>(device, (cudaStream_t)queue, piece, received, size, n);
}
