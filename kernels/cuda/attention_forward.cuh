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

/* Unseen products become -inf; `words` of rows lane / 4 and lane / 4 + 8, a word for each 64 keys. */
template <int NT>
__device__ __forceinline__ void wn_mask_logits(float (&s)[NT][4], const uint64_t (&words)[NT / 8][2]) {
  const int col = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int j = 0; j < NT; j++) {
      const uint64_t shifted = words[j / 8][r] >> col;
      const uint32_t half = j & 4 ? (uint32_t)(shifted >> 32) : (uint32_t)shifted;
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (!((half >> (8 * (j & 3) + e)) & 1)) s[j][2 * r + e] = -INFINITY;
    }
}

/* Products to weights relative to the new maximum; what was summed before has to be multiplied by `decay`. */
template <int NT>
__device__ __forceinline__ void wn_online_softmax(float (&s)[NT][4], wn_softmax_rows &rows, float (&decay)[2],
                                                  float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float top = rows.top[r];
#pragma unroll
    for (int j = 0; j < NT; j++) top = fmaxf(top, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
    top = wn_quad_max(top);
    const float high = top == -INFINITY ? 0 : top; /* nothing seen yet: all weights are exp2(-inf) */
    const float base = high * scale_log2;
    decay[r] = wn_exp2((rows.top[r] - high) * scale_log2); /* exactly 1 where the maximum stays */
    float sum = 0;
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; e++) {
        s[j][e] = wn_exp2(s[j][e] * scale_log2 - base);
        sum += s[j][e];
      }
    rows.top[r] = top;
    rows.sum[r] = rows.sum[r] * decay[r] + sum;
  }
}

template <int NO> __device__ __forceinline__ void wn_rescale(float (&o)[NO][4], const float (&decay)[2]) {
#pragma unroll
  for (int j = 0; j < NO; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) o[j][e] *= decay[e >> 1];
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
      const float2 grad = wn_get_pair(job.d_o, row, head, 8 * j + col);
      delta += o[j][2 * r] * grad.x + o[j][2 * r + 1] * grad.y;
    }
    delta = wn_quad_sum(delta);
    if ((lane & 3) != 0 || row >= job.n) continue;
    job.lse.data[row * job.lse.row + head] = sum > 0 ? rows.top[r] * job.scale + logf(sum) : -INFINITY;
    if (job.delta.data) job.delta.data[row * job.delta.row + head] = delta;
  }
  wn_put_rows<false>(job.o, row0, job.n, 0, head, o, 1);
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
    uint64_t words[MT][1][2];
    if (!full)
#pragma unroll
      for (int i = 0; i < 2 * MT; i++)
        words[i >> 1][0][i & 1] = wn_row_word<MASKED>(job, row0 + (int)(threadIdx.x & 31) / 4 + 8 * i, t);
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
      float decay[2];
      if (!full) wn_mask_logits<8>(s[i], words[i]);
      wn_online_softmax<8>(s[i], rows[i], decay, job.scale * WN_LOG2E);
      wn_rescale(o[i], decay);
      wn_fragments<8>(p[i], s[i]);
    }
    wn_product_registers<MT, DV / 8, 4, WN_TILE>(o, p, v, 0);
  }
#pragma unroll
  for (int i = 0; i < MT; i++) wn_finish_rows(job, head, row0 + 16 * i, o[i], rows[i]);
}

/* ---- widths up to 192/128: the products of warpgroups ---- */

enum { WN_GROUP_THREADS = 256, WN_GROUP_KEYS = 128 /* keys of a tile */ };

/* o += P V, under way */
template <int DV>
__device__ __forceinline__ void wn_group_values(float (&o)[DV / 8][4], const uint32_t (&p)[WN_GROUP_KEYS / 16][4],
                                                uint32_t v) {
  const uint64_t b = wn_tile_descriptor(v, WN_GROUP_KEYS * 128);
#pragma unroll
  for (int ks = 0; ks < WN_GROUP_KEYS / 16; ks++) wn_warpgroup_registers(o, p[ks], b + (uint64_t)(ks * 2048 >> 4));
}

/* What a lane's two rows see of a pair of key tiles; false: everything, and the words are not set. */
template <bool MASKED>
__device__ __forceinline__ bool wn_pair_words(uint64_t (&words)[2][2], const wn_attend_job &job,
                                              const wn_key_walk &walk, int row, int pair) {
  if (!MASKED && 2 * pair >= walk.full_low && 2 * pair + 1 < walk.full_end) return false;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int tile = 2 * pair + (i >> 1);
    words[i >> 1][i & 1] = tile < walk.end ? wn_row_word<MASKED>(job, row + 8 * (i & 1), tile) : 0;
  }
  return true;
}

/* Two warpgroups of 64 rows each. The products of the next logits and of these weights run while the next softmax is
 * made; two stages of keys and of values. */
template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_GROUP_THREADS, 1)
    wn_attend_forward_group_kernel(const __grid_constant__ wn_attend_job job) {
  constexpr int THREADS = WN_GROUP_THREADS, KEYS = WN_GROUP_KEYS, K_BYTES = KEYS * DQ * 2, V_BYTES = KEYS * DV * 2;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t q = wn_shared_address(shared), keys = q + WN_BLOCK_ROWS * DQ * 2, values = keys + 2 * K_BYTES;
  const int blocks = (job.n + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, warp_row = (int)(threadIdx.x >> 5) * 16;
  int head, block, stage = 0;
  wn_block_place(job, blocks, &head, &block);
  block = blocks - 1 - block; /* the last rows see most keys: they go first */
  const int row0 = block * WN_BLOCK_ROWS + warp_row, mine = row0 + (int)(threadIdx.x & 31) / 4;
  float o[1][DV / 8][4], decay[2];
  wn_softmax_rows rows = {{-INFINITY, -INFINITY}, {0, 0}};
  wn_clear(o);
  wn_key_walk walk;
  int pair = wn_begin_walk<MASKED>(job, block, &walk) / 2;
  if (2 * pair < walk.end) {
    float s[KEYS / 8][4];
    uint32_t p[KEYS / 16][4];
    uint64_t words[2][2];
    int next = wn_next_tile<MASKED>(job, walk, block, 2 * pair + 2) / 2;
    wn_tile_load<WN_BLOCK_ROWS, DQ, THREADS>(q, job.q, head, block * WN_BLOCK_ROWS, job.n);
    wn_tile_load<KEYS, DQ, THREADS>(keys, job.k, head, pair * KEYS, job.m);
    wn_cp_async_commit();
    if (2 * next < walk.end) wn_tile_load<KEYS, DQ, THREADS>(keys + K_BYTES, job.k, head, next * KEYS, job.m);
    wn_tile_load<KEYS, DV, THREADS>(values, job.v, head, pair * KEYS, job.m);
    wn_cp_async_commit();
    wn_cp_async_wait<1>();
    wn_fence_shared_for_products();
    __syncthreads();
    wn_wgmma_begin();
    wn_group_product<KEYS / 8, DQ, WN_BLOCK_ROWS>(s, q, warp_row / 64 * 64, keys);
    wn_wgmma_commit();
    bool partial = wn_pair_words<MASKED>(words, job, walk, mine, pair);
    wn_wgmma_wait<0>();
    wn_pin(s);
    if (partial) wn_mask_logits(s, words);
    wn_online_softmax(s, rows, decay, job.scale * WN_LOG2E);
    wn_fragments<KEYS / 8>(p, s);
    while (2 * next < walk.end) {
      const int after = wn_next_tile<MASKED>(job, walk, block, 2 * next + 2) / 2;
      wn_cp_async_wait<0>();
      wn_fence_shared_for_products();
      __syncthreads(); /* the next keys and these values have come; what stood in the other stages is done with */
      if (2 * after < walk.end)
        wn_tile_load<KEYS, DQ, THREADS>(keys + stage * K_BYTES, job.k, head, after * KEYS, job.m);
      wn_tile_load<KEYS, DV, THREADS>(values + (stage ^ 1) * V_BYTES, job.v, head, next * KEYS, job.m);
      wn_cp_async_commit();
      wn_wgmma_begin();
      wn_group_product<KEYS / 8, DQ, WN_BLOCK_ROWS>(s, q, warp_row / 64 * 64, keys + (stage ^ 1) * K_BYTES);
      wn_wgmma_commit();
      wn_group_values<DV>(o[0], p, values + stage * V_BYTES);
      wn_wgmma_commit();
      partial = wn_pair_words<MASKED>(words, job, walk, mine, next);
      wn_wgmma_wait<1>();
      wn_pin(s);
      if (partial) wn_mask_logits(s, words);
      wn_online_softmax(s, rows, decay, job.scale * WN_LOG2E);
      wn_wgmma_wait<0>();
      wn_pin(o[0]);
      wn_rescale(o[0], decay);
      wn_fragments<KEYS / 8>(p, s);
      stage ^= 1;
      next = after;
    }
    wn_cp_async_wait<0>();
    wn_fence_shared_for_products();
    __syncthreads();
    wn_wgmma_begin();
    wn_group_values<DV>(o[0], p, values + stage * V_BYTES);
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
    wn_pin(o[0]);
  }
  wn_finish_rows(job, head, row0, o[0], rows);
}

template <bool MASKED> struct wn_attend_forward_launch {
  wn_device *device;
  const wn_attend_job *job;

  template <int DQ, int DV> wn_status run() const {
    const int64_t blocks = wn_ceil_div(job->n, WN_BLOCK_ROWS) * job->heads;
    if constexpr (DQ <= 192 && DV == 128) {
      constexpr int bytes = (WN_BLOCK_ROWS * DQ + 2 * WN_GROUP_KEYS * (DQ + DV)) * 2;
      return wn_attend_launch(device, wn_attend_forward_group_kernel<DQ, DV, MASKED>, blocks, WN_GROUP_THREADS, bytes,
                              *job);
    } else {
      constexpr int MT = DV > 128 ? 1 : 2, bytes = (WN_BLOCK_ROWS * DQ + WN_TILE * (DQ + DV)) * 2;
      return wn_attend_launch(device, wn_attend_forward_kernel<DQ, DV, MT, MASKED>, blocks, WN_BLOCK_ROWS / MT * 2,
                              bytes, *job);
    }
  }
};

#endif
