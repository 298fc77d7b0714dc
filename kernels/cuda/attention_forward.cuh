/* Forward of the per-head attention: a block keeps 128 rows of one head and walks the key tiles they see. A warp keeps
 * its rows' sums, running maximum and running sum of weights in registers; a new maximum rescales what was summed.
 * Exponentials are base 2. Keys of the next tile load during softmax and values, values during the logits. */
#ifndef WN_KERNELS_CUDA_ATTENTION_FORWARD_CUH
#define WN_KERNELS_CUDA_ATTENTION_FORWARD_CUH

#include "kernels/cuda/attention_tile.cuh"

/* One row's state in each of the two rows of an m16 tile. */
typedef struct wn_softmax_rows {
  float top[2], sum[2]; /* largest product q.k so far; this lane's share of the sum of weights */
} wn_softmax_rows;

/* Unseen products become -inf; `words` of rows lane / 4 and lane / 4 + 8. */
__device__ __forceinline__ void wn_mask_logits(float (&s)[8][4], const uint64_t words[2]) {
  const int col = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const uint64_t shifted = words[r] >> col;
    const uint32_t half[2] = {(uint32_t)shifted, (uint32_t)(shifted >> 32)};
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (!((half[j >> 2] >> (8 * (j & 3) + e)) & 1)) s[j][2 * r + e] = -INFINITY;
  }
}

/* Products to weights relative to the new maximum; o is rescaled to it. */
template <int NO>
__device__ __forceinline__ void wn_online_softmax(float (&s)[8][4], wn_softmax_rows &rows, float (&o)[NO][4],
                                                  float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float top = rows.top[r];
#pragma unroll
    for (int j = 0; j < 8; j++) top = fmaxf(top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    top = wn_quad_max(top);
    const float base = top == -INFINITY ? 0 : top * scale_log2; /* nothing seen yet: all weights are exp2(-inf) */
    const float decay = wn_exp2(rows.top[r] * scale_log2 - base);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; e++) {
        s[j][e] = wn_exp2(s[j][e] * scale_log2 - base);
        sum += s[j][e];
      }
    rows.top[r] = top;
    rows.sum[r] = rows.sum[r] * decay + sum;
#pragma unroll
    for (int j = 0; j < NO; j++) {
      o[j][2 * r] *= decay;
      o[j][2 * r + 1] *= decay;
    }
  }
}

/* o, lse and delta of a warp's 16 rows. */
template <int NO>
__device__ __forceinline__ void wn_finish_rows(const wn_attend_job &job, int head, int row0, float (&o)[NO][4],
                                               const wn_softmax_rows &rows) {
  const int lane = threadIdx.x & 31, col = (lane & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = row0 + (lane >> 2) + 8 * r;
    const float sum = wn_quad_sum(rows.sum[r]), inverse = sum > 0 ? 1 / sum : 0;
    float delta = 0;
#pragma unroll
    for (int j = 0; j < NO; j++) {
      o[j][2 * r] *= inverse;
      o[j][2 * r + 1] *= inverse;
      if (!job.delta.data || row >= job.n) continue;
      const wn_bf16 *grad = job.d_o.data + row * job.d_o.row + head * job.d_o.head + 8 * j + col;
      if (8 * j + col < job.o.width) delta += o[j][2 * r] * __bfloat162float(grad[0]);
      if (8 * j + col + 1 < job.o.width) delta += o[j][2 * r + 1] * __bfloat162float(grad[1]);
    }
    delta = wn_quad_sum(delta);
    if ((lane & 3) != 0 || row >= job.n) continue;
    job.lse.data[row * job.lse.row + head] = sum > 0 ? rows.top[r] * job.scale + logf(sum) : -INFINITY;
    if (job.delta.data) job.delta.data[row * job.delta.row + head] = delta;
  }
  wn_put_rows<false>(job.o, row0, job.n, head, o, 1);
}

/* MT tiles of 16 rows a warp. */
template <int DQ, int DV, int MT, bool MASKED>
__global__ void __launch_bounds__(WN_BLOCK_ROWS / MT * 2, MT)
    wn_attend_forward_kernel(const __grid_constant__ wn_attend_job job) {
  constexpr int THREADS = WN_BLOCK_ROWS / MT * 2;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t q = wn_shared_address(shared), k = q + WN_BLOCK_ROWS * DQ * 2, v = k + WN_TILE * DQ * 2;
  const int blocks = (job.n + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, warp_row = (int)(threadIdx.x >> 5) * 16 * MT;
  int head, block;
  wn_block_place(job, blocks, &head, &block);
  block = blocks - 1 - block; /* the last rows see most keys: they go first */
  const int row0 = block * WN_BLOCK_ROWS + warp_row;
  float o[MT][DV / 8][4];
  wn_softmax_rows rows[MT];
  wn_clear(o);
#pragma unroll
  for (int i = 0; i < MT; i++) rows[i] = {{-INFINITY, -INFINITY}, {0, 0}};
  wn_key_walk walk;
  int t = wn_begin_walk<MASKED>(job, block, &walk);
  if (t < walk.end) {
    wn_tile_load<WN_BLOCK_ROWS, DQ, THREADS>(q, job.q, head, block * WN_BLOCK_ROWS, job.n);
    wn_tile_load<WN_TILE, DQ, THREADS>(k, job.k, head, t * WN_TILE, job.m);
    wn_cp_async_commit();
  }
  for (int next; t < walk.end; t = next) {
    wn_cp_async_wait<0>();
    __syncthreads(); /* keys have come; the values before are done with */
    wn_tile_load<WN_TILE, DV, THREADS>(v, job.v, head, t * WN_TILE, job.m);
    wn_cp_async_commit();
    const bool full = !MASKED && t >= walk.full_low && t < walk.full_end;
    uint64_t words[MT][2];
    if (!full)
#pragma unroll
      for (int i = 0; i < 2 * MT; i++)
        words[i >> 1][i & 1] = wn_row_word<MASKED>(job, row0 + (int)(threadIdx.x & 31) / 4 + 8 * i, t);
    float s[MT][8][4];
    wn_clear(s);
    wn_product_shared<MT, 8, DQ / 16, WN_BLOCK_ROWS, WN_TILE>(s, q, warp_row, k, 0);
    next = wn_next_tile<MASKED>(job, walk, block, t + 1);
    wn_cp_async_wait<0>();
    __syncthreads(); /* values have come; the keys are done with */
    if (next < walk.end) wn_tile_load<WN_TILE, DQ, THREADS>(k, job.k, head, next * WN_TILE, job.m);
    wn_cp_async_commit();
    uint32_t p[MT][4][4];
#pragma unroll
    for (int i = 0; i < MT; i++) {
      if (!full) wn_mask_logits(s[i], words[i]);
      wn_online_softmax(s[i], rows[i], o[i], job.scale * WN_LOG2E);
      wn_fragments<8>(p[i], s[i]);
    }
    wn_product_registers<MT, DV / 8, 4, WN_TILE>(o, p, v, 0);
  }
#pragma unroll
  for (int i = 0; i < MT; i++) wn_finish_rows(job, head, row0 + 16 * i, o[i], rows[i]);
}

template <bool MASKED> struct wn_attend_forward_launch {
  wn_device *device;
  const wn_attend_job *job;

  template <int DQ, int DV> wn_status run() const {
    constexpr int MT = DV > 128 ? 1 : 2, bytes = (WN_BLOCK_ROWS * DQ + WN_TILE * (DQ + DV)) * 2;
    const int64_t blocks = wn_ceil_div(job->n, WN_BLOCK_ROWS) * job->heads;
    return wn_attend_launch(device, wn_attend_forward_kernel<DQ, DV, MT, MASKED>, blocks, WN_BLOCK_ROWS / MT * 2, bytes,
                            *job);
  }
};

#endif
