/* Forward of the per-head attention: a block keeps 128 rows of one head and walks the key tiles they see. A warp keeps
 * its rows' sums, running maximum and running sum of weights in registers; a new maximum rescales what was summed.
 * Exponentials are base 2. */
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

/* o, lse and delta of a warp's 16 rows. gradient(r, col): d_o of row lane / 4 + 8 r, columns col and col + 1, 0 past
 * the end and the width. */
template <int NO, typename Gradient>
__device__ __forceinline__ void wn_finish_rows(const wn_attend_job &job, int head, int row0, float (&o)[NO][4],
                                               const wn_softmax_rows &rows, Gradient gradient) {
  const int lane = threadIdx.x & 31, col = (lane & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = row0 + (lane >> 2) + 8 * r;
    const float sum = wn_quad_sum(rows.sum[r]), inverse = sum == 0 ? 0 : 1 / sum; /* a NaN stays one */
    float delta = 0;
#pragma unroll
    for (int j = 0; j < NO; j++) {
      o[j][2 * r] *= inverse;
      o[j][2 * r + 1] *= inverse;
    }
    if (job.delta.data)
#pragma unroll
      for (int j = 0; j < NO; j++) {
        const float2 grad = gradient(r, 8 * j + col);
        delta = wn_delta_step(delta, make_float2(o[j][2 * r], o[j][2 * r + 1]), grad);
      }
    delta = wn_quad_sum(delta);
    if ((lane & 3) != 0 || row >= job.n) continue;
    job.lse.data[row * job.lse.row + head] = sum == 0 ? -INFINITY : rows.top[r] * job.scale + logf(sum);
    if (job.delta.data) job.delta.data[row * job.delta.row + head] = delta;
  }
  if (job.unrounded.data)
    wn_put_unrounded(job.unrounded, row0, job.n, head, o);
  else
    wn_put_rows<false>(job.o, row0, job.n, 0, head, o, 1);
}

/* ---- any width: warp-level products ---- */

template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_MAKERS, 1) wn_attend_forward_kernel(const __grid_constant__ wn_attend_job job) {
  extern __shared__ __align__(1024) char shared[];
  const uint32_t q = wn_shared_address(shared), k = q + WN_BLOCK_ROWS * DQ * 2, v = k + WN_TILE * DQ * 2;
  const int blocks = (job.n + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, warp_row = (int)(threadIdx.x >> 5) * 16;
  int head, block;
  wn_block_place(job, blocks, &head, &block);
  block = blocks - 1 - block; /* the last rows see most keys: they go first */
  const int row0 = block * WN_BLOCK_ROWS + warp_row, mine = row0 + (int)(threadIdx.x & 31) / 4;
  float o[DV / 8][4];
  wn_softmax_rows rows = {{-INFINITY, -INFINITY}, {0, 0}};
  wn_clear(o);
  wn_key_walk walk;
  int t = wn_begin_walk<MASKED>(job, block, &walk);
  if (t < walk.end) {
    wn_tile_load<WN_BLOCK_ROWS, DQ, WN_MAKERS>(q, job.q, head, block * WN_BLOCK_ROWS, job.n);
    wn_tile_load<WN_TILE, DQ, WN_MAKERS>(k, job.k, head, t * WN_TILE, job.m);
    wn_cp_async_commit();
  }
  for (int next; t < walk.end; t = next) {
    wn_cp_async_wait<0>();
    __syncthreads(); /* keys have come; the values before are done with */
    wn_tile_load<WN_TILE, DV, WN_MAKERS>(v, job.v, head, t * WN_TILE, job.m);
    wn_cp_async_commit();
    const bool full = !MASKED && t >= walk.full_low && t < walk.full_end;
    uint64_t words[1][2];
    if (!full)
#pragma unroll
      for (int r = 0; r < 2; r++) words[0][r] = wn_row_word<MASKED>(job, mine + 8 * r, t);
    float s[8][4], decay[2];
    uint32_t p[4][4];
    wn_clear(s);
    wn_product_shared<8, DQ / 16, WN_BLOCK_ROWS, WN_TILE>(s, q, warp_row, k, 0);
    next = wn_next_tile<MASKED>(job, walk, block, t + 1);
    wn_cp_async_wait<0>();
    __syncthreads(); /* values have come; the keys are done with */
    if (next < walk.end) wn_tile_load<WN_TILE, DQ, WN_MAKERS>(k, job.k, head, next * WN_TILE, job.m);
    wn_cp_async_commit();
    if (!full) wn_mask_logits<8>(s, words);
    wn_online_softmax<8>(s, rows, decay, job.scale * WN_LOG2E);
    wn_rescale(o, decay);
    wn_fragments<8>(p, s);
    wn_product_registers<DV / 8, 4, WN_TILE>(o, p, v, 0);
  }
  wn_finish_rows(job, head, row0, o, rows, [&](int r, int col) {
    return mine + 8 * r < job.n ? wn_get_pair(job.d_o, mine + 8 * r, head, col) : float2{0, 0};
  });
}

/* ---- widths up to 192/128: the products of warpgroups ---- */

enum { WN_GROUP_KEYS = 128 /* keys of a tile */ };

/* o += P V, under way */
template <int DV>
__device__ __forceinline__ void wn_group_values(float (&o)[DV / 8][4], const uint32_t (&p)[WN_GROUP_KEYS / 16][4],
                                                uint32_t v) {
  const uint64_t b = wn_wgmma_operand(v, WN_GROUP_KEYS * 128);
#pragma unroll
  for (int ks = 0; ks < WN_GROUP_KEYS / 16; ks++) wn_wgmma_registers(o, p[ks], b + (uint64_t)(ks * 2048 >> 4));
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

/* Shared memory of the kernel below: Q, two stages of keys, two of values, barriers. */
template <int DQ, int DV> struct wn_forward_layout {
  static constexpr int k_bytes = WN_GROUP_KEYS * DQ * 2, v_bytes = WN_GROUP_KEYS * DV * 2;
  static constexpr int keys = WN_BLOCK_ROWS * DQ * 2, values = keys + 2 * k_bytes, barriers = values + 2 * v_bytes;
  static constexpr int bytes = barriers + 9 * 8;
};

/* Barriers: for each stage of keys and of values, come and done with; and of Q, come. */
enum { WN_K_FULL = 0, WN_K_EMPTY = 16, WN_V_FULL = 32, WN_V_EMPTY = 48, WN_Q_FULL = 64 };

/* The thread that starts all copies; the last is d_o, for delta, in the place of the next keys. */
template <int DQ, int DV, bool MASKED>
__device__ __forceinline__ void wn_forward_produce(uint32_t shared, const wn_attend_job &job,
                                                   const wn_attend_maps &maps, int head, int block) {
  typedef wn_forward_layout<DQ, DV> layout;
  const uint32_t barriers = shared + layout::barriers;
  wn_key_walk walk;
  int pair = wn_begin_walk<MASKED>(job, block, &walk) / 2;
  uint32_t i = 0;
  if (2 * pair < walk.end) {
    wn_mbarrier_expect(barriers + WN_Q_FULL, WN_BLOCK_ROWS * DQ * 2);
    wn_tile_fetch<WN_BLOCK_ROWS, DQ>(shared, &maps.q, head, block * WN_BLOCK_ROWS, barriers + WN_Q_FULL);
  }
  for (; 2 * pair < walk.end; i++) {
    const uint32_t stage = i & 1, at = barriers + 8 * stage, before = (i >> 1) - 1;
    if (i > 1) wn_mbarrier_wait(at + WN_K_EMPTY, before & 1);
    wn_mbarrier_expect(at + WN_K_FULL, layout::k_bytes);
    wn_tile_fetch<WN_GROUP_KEYS, DQ>(shared + layout::keys + stage * layout::k_bytes, &maps.k, head,
                                     pair * WN_GROUP_KEYS, at + WN_K_FULL);
    if (i > 1) wn_mbarrier_wait(at + WN_V_EMPTY, before & 1);
    wn_mbarrier_expect(at + WN_V_FULL, layout::v_bytes);
    wn_tile_fetch<WN_GROUP_KEYS, DV>(shared + layout::values + stage * layout::v_bytes, &maps.v, head,
                                     pair * WN_GROUP_KEYS, at + WN_V_FULL);
    pair = wn_next_tile<MASKED>(job, walk, block, 2 * pair + 2) / 2;
  }
  if (!job.delta.data) return;
  const uint32_t stage = i & 1, at = barriers + 8 * stage;
  if (i > 1) wn_mbarrier_wait(at + WN_K_EMPTY, ((i >> 1) - 1) & 1);
  wn_mbarrier_expect(at + WN_K_FULL, WN_BLOCK_ROWS * DV * 2);
  wn_tile_fetch<WN_BLOCK_ROWS, DV>(shared + layout::keys + stage * layout::k_bytes, &maps.d_o, head,
                                   block * WN_BLOCK_ROWS, at + WN_K_FULL);
}

/* A warpgroup's 64 rows: the products of the next logits and of these weights run while the next softmax is made. */
template <int DQ, int DV, bool MASKED>
__device__ __forceinline__ void wn_forward_consume(const char *shared, const wn_attend_job &job, int head, int block) {
  typedef wn_forward_layout<DQ, DV> layout;
  constexpr int KEYS = WN_GROUP_KEYS;
  const uint32_t base = wn_shared_address(shared), barriers = base + layout::barriers;
  const int warp_row = (int)(threadIdx.x >> 5) * 16, lane = threadIdx.x & 31;
  const int row0 = block * WN_BLOCK_ROWS + warp_row, mine = row0 + lane / 4;
  float o[DV / 8][4], decay[2];
  wn_softmax_rows rows = {{-INFINITY, -INFINITY}, {0, 0}};
  wn_clear(o);
  wn_key_walk walk;
  int pair = wn_begin_walk<MASKED>(job, block, &walk) / 2;
  uint32_t i = 0; /* tiles whose logits are made */
  if (2 * pair < walk.end) {
    float s[KEYS / 8][4];
    uint32_t p[KEYS / 16][4];
    uint64_t words[2][2];
    wn_mbarrier_wait(barriers + WN_Q_FULL, 0);
    wn_mbarrier_wait(barriers + WN_K_FULL, 0);
    wn_wgmma_fence();
    wn_group_product<KEYS / 8, DQ, WN_BLOCK_ROWS>(s, base, warp_row / 64 * 64, base + layout::keys);
    wn_wgmma_commit();
    bool partial = wn_pair_words<MASKED>(words, job, walk, mine, pair);
    wn_wgmma_wait<0>();
    wn_wgmma_settle(s);
    if (lane == 0) wn_mbarrier_arrive(barriers + WN_K_EMPTY);
    if (partial) wn_mask_logits(s, words);
    wn_online_softmax(s, rows, decay, job.scale * WN_LOG2E);
    wn_fragments<KEYS / 8>(p, s);
    pair = wn_next_tile<MASKED>(job, walk, block, 2 * pair + 2) / 2;
    for (i = 1; 2 * pair < walk.end; i++) {
      const uint32_t next = i & 1, here = next ^ 1;
      wn_mbarrier_wait(barriers + WN_K_FULL + 8 * next, i >> 1 & 1);
      wn_wgmma_fence();
      wn_group_product<KEYS / 8, DQ, WN_BLOCK_ROWS>(s, base, warp_row / 64 * 64,
                                                    base + layout::keys + next * layout::k_bytes);
      wn_wgmma_commit();
      wn_mbarrier_wait(barriers + WN_V_FULL + 8 * here, (i - 1) >> 1 & 1);
      wn_wgmma_fence();
      wn_group_values<DV>(o, p, base + layout::values + here * layout::v_bytes);
      wn_wgmma_commit();
      partial = wn_pair_words<MASKED>(words, job, walk, mine, pair);
      wn_wgmma_wait<1>();
      wn_wgmma_settle(s);
      if (lane == 0) wn_mbarrier_arrive(barriers + WN_K_EMPTY + 8 * next);
      if (partial) wn_mask_logits(s, words);
      wn_online_softmax(s, rows, decay, job.scale * WN_LOG2E);
      wn_wgmma_wait<0>();
      wn_wgmma_settle(o);
      if (lane == 0) wn_mbarrier_arrive(barriers + WN_V_EMPTY + 8 * here);
      wn_rescale(o, decay);
      wn_fragments<KEYS / 8>(p, s);
      pair = wn_next_tile<MASKED>(job, walk, block, 2 * pair + 2) / 2;
    }
    wn_mbarrier_wait(barriers + WN_V_FULL + 8 * ((i - 1) & 1), (i - 1) >> 1 & 1);
    wn_wgmma_fence();
    wn_group_values<DV>(o, p, base + layout::values + ((i - 1) & 1) * layout::v_bytes);
    wn_wgmma_commit();
    wn_wgmma_wait<0>();
    wn_wgmma_settle(o);
  }
  const char *d_o = shared + layout::keys + (i & 1) * layout::k_bytes;
  if (job.delta.data) wn_mbarrier_wait(barriers + WN_K_FULL + 8 * (i & 1), i >> 1 & 1);
  wn_finish_rows(job, head, row0, o, rows, [&](int r, int col) {
    const uint32_t at = wn_tile_at<WN_BLOCK_ROWS>(0, warp_row + lane / 4 + 8 * r, col >> 3) + (uint32_t)(col & 7) * 2;
    return __bfloat1622float2(*(const __nv_bfloat162 *)(d_o + at));
  });
}

/* Two warpgroups of 64 rows each, and one whose first thread starts the copies, two tiles of 128 keys ahead. */
template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_GROUP_THREADS, 1)
    wn_attend_forward_group_kernel(const __grid_constant__ wn_attend_job job,
                                   const __grid_constant__ wn_attend_maps maps) {
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = wn_shared_address(shared), barriers = base + wn_forward_layout<DQ, DV>::barriers;
  const int blocks = (job.n + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS;
  int head, block;
  wn_block_place(job, blocks, &head, &block);
  block = blocks - 1 - block; /* the last rows see most keys: they go first */
  if (threadIdx.x == 0) {
    for (uint32_t stage = 0; stage < 16; stage += 8) {
      wn_mbarrier_init(barriers + WN_K_FULL + stage, 1);
      wn_mbarrier_init(barriers + WN_V_FULL + stage, 1);
      wn_mbarrier_init(barriers + WN_K_EMPTY + stage, WN_MAKERS / 32);
      wn_mbarrier_init(barriers + WN_V_EMPTY + stage, WN_MAKERS / 32);
    }
    wn_mbarrier_init(barriers + WN_Q_FULL, 1);
    wn_mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= WN_MAKERS) {
    wn_registers_shrink<24>();
    if (threadIdx.x == WN_MAKERS) wn_forward_produce<DQ, DV, MASKED>(base, job, maps, head, block);
  } else {
    wn_registers_grow<240>();
    wn_forward_consume<DQ, DV, MASKED>(shared, job, head, block);
  }
}

template <bool MASKED> struct wn_attend_forward_launch {
  wn_device *device;
  const wn_attend_job *job;

  template <int DQ, int DV> wn_status run() const {
    const int64_t blocks = wn_ceil_div(job->n, WN_BLOCK_ROWS) * job->heads;
    if constexpr (DV <= 128) {
      wn_attend_maps maps;
      WN_TRY(wn_attend_describe(&maps, job, WN_BLOCK_ROWS, WN_GROUP_KEYS));
      return wn_attend_launch(device, wn_attend_forward_group_kernel<DQ, DV, MASKED>, blocks, WN_GROUP_THREADS,
                              wn_forward_layout<DQ, DV>::bytes, *job, maps);
    } else {
      return wn_attend_launch(device, wn_attend_forward_kernel<DQ, DV, MASKED>, blocks, WN_MAKERS,
                              (WN_BLOCK_ROWS * DQ + WN_TILE * (DQ + DV)) * 2, *job);
    }
  }
};

#endif
