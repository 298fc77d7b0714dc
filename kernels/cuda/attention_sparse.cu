/* Absorbed attention over a selection, forward: one block per row and 64 (or 16) heads. The heads are the rows of its
 * products, so that a key that was gathered once serves them all: s = q kv^T over the whole width, o += p v over the
 * first v_width columns of the same tile.
 *
 * Picks come in tiles of 64 by 16-byte asynchronous copies, one tile ahead. Eight warps make s in pairs that share the
 * width's steps and then the columns of their block; each warp owns a slice of o's columns for all heads, in
 * registers. Running maxima and sums are FP32, o is divided once at the end, delta comes from that FP32 o.
 *
 * Keys that were not picked are never named in a load; picks past the end are zeros with p = 0.
 *
 * Ladder, 4096 rows, 8192 keys, 128 heads of 512 + 64, k 2048 (2.34 TFLOP), random picks, on an H200:
 *   1  mma.sync, gather with a test in front of every copy                      13.0 ms, 179 TFLOP/s, 23% of 780
 *   2  wgmma, a warpgroup per half of a tile's keys, then per half of o's columns; the gather's tests outside its
 *      loops                                                                     6.2 ms, 375 TFLOP/s, 48%
 *   3  the next tile's copies between the products of s, everything unrolled     4.9 ms, 472 TFLOP/s, 61%
 *   4  attention_sparse_wide.cu: a warpgroup a tile, a third one gathers         4.0 ms, 580 TFLOP/s, 74%
 * Version 4 ships for 512 + 64 columns and more than 16 heads (131072 keys: 4.6 ms, 509), else version 1. 16 heads,
 * 16384 keys, k 1024 (0.146 TFLOP), version 1: 1.61, with the better gather 1.26 ms, 116 TFLOP/s. */
#include "kernels/cuda/attention_gather.cuh"
#include "kernels/cuda/attention_sparse.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/picks.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/reduce.cuh"

#include <math.h>

/* Where things lie in shared memory. */
template <int MT> struct forward_layout {
  typedef wn_split<MT> S;
  static constexpr int PARTS = 2 * S::WN; /* warps that hold a part of one head's keys */
  uint32_t q, kv, p, bytes;
  float *part, *alpha; /* [HEADS][PARTS], or [8 warps][HEADS] at the end; [HEADS] */
  int *count;
};

template <int MT>
__host__ __device__ static forward_layout<MT> lay_out(char *memory, uint32_t base, int width, int stages) {
  typedef wn_split<MT> S;
  forward_layout<MT> l;
  uint32_t at = 0;
  l.q = base + at;
  at += (uint32_t)wn_tile_bytes(S::HEADS, width);
  l.kv = base + at;
  at += (uint32_t)(wn_tile_bytes(WN_SPARSE_KEYS, width) * stages);
  l.p = base + at;
  at += S::HEADS * WN_SPARSE_KEYS * 2;
  l.part = (float *)(memory + at);
  at += S::HEADS * WN_SPARSE_WARPS * 4;
  l.alpha = (float *)(memory + at);
  at += S::HEADS * 4;
  l.count = (int *)(memory + at);
  l.bytes = at + 16;
  return l;
}

/* The two warps of a block have summed half of the width each. Each keeps half of the block's n-tiles, gets the
 * other's sums for it and gives its own for the other half, through the block's bytes of p, one after the other. */
template <int MT>
__device__ static void fold_halves(float own[wn_split<MT>::MI][wn_split<MT>::OWN][4],
                                   const float acc[wn_split<MT>::MI][wn_split<MT>::NI][4], float4 *room, int side,
                                   int block) {
  typedef wn_split<MT> S;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int turn = 1; turn >= 0; turn--) {
#pragma unroll
    for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
      for (int t = 0; t < S::OWN; t++) {
        if (side != turn) continue;
        const float *give = side ? acc[mi][t] : acc[mi][t + S::OWN];
        room[(mi * S::OWN + t) * 32 + lane] = make_float4(give[0], give[1], give[2], give[3]);
      }
    wn_named_sync(1 + block, 64);
#pragma unroll
    for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
      for (int t = 0; t < S::OWN; t++) {
        if (side == turn) continue;
        const float4 got = room[(mi * S::OWN + t) * 32 + lane];
        own[mi][t][0] = (side ? acc[mi][t + S::OWN][0] : acc[mi][t][0]) + got.x;
        own[mi][t][1] = (side ? acc[mi][t + S::OWN][1] : acc[mi][t][1]) + got.y;
        own[mi][t][2] = (side ? acc[mi][t + S::OWN][2] : acc[mi][t][2]) + got.z;
        own[mi][t][3] = (side ? acc[mi][t + S::OWN][3] : acc[mi][t][3]) + got.w;
      }
  }
}

/* A warp's place in the products, and its running statistics: of head row 16 (MI wm + mi) + lane / 4 + 8 e. */
template <int MT> struct softmax_state {
  float top[wn_split<MT>::MI][2]; /* log2 units */
  /* of this thread's keys only: of p, for lse; of p as BF16, for o. With one sum for both, rows where two keys compete
   * would have a delta whose error does not vanish with the difference of the keys. */
  float sum[wn_split<MT>::MI][2], sum_bf16[wn_split<MT>::MI][2];
};

/* What the four lanes of a head have found over their keys, to part[head][PARTS]. */
template <int MT>
__device__ __forceinline__ void store_part(const forward_layout<MT> &l, float x, int mi, int e, int wm, int wn,
                                           int side) {
  const int lane = threadIdx.x & 31, head = (wm * wn_split<MT>::MI + mi) * 16 + (lane >> 2) + 8 * e;
  if ((lane & 3) == 0) l.part[head * forward_layout<MT>::PARTS + wn * 2 + side] = x;
}

/* From a tile's logits: p in shared memory, alpha = what earlier sums are multiplied by. `left`: picks from this tile's
 * first on. Two barriers inside; after the last, p and alpha are there for all. */
template <int MT>
__device__ static void softmax_tile(softmax_state<MT> &state, float s[wn_split<MT>::MI][wn_split<MT>::OWN][4],
                                    const forward_layout<MT> &l, float scale_log2, int left, int wm, int wn, int side) {
  typedef wn_split<MT> S;
  constexpr int PARTS = forward_layout<MT>::PARTS;
  const int lane = threadIdx.x & 31, first = wn * S::NI * 8 + side * S::OWN * 8 + 2 * (lane & 3);
#pragma unroll
  for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float top = -INFINITY;
#pragma unroll
      for (int t = 0; t < S::OWN; t++)
#pragma unroll
        for (int x = 0; x < 2; x++) {
          float &logit = s[mi][t][2 * e + x];
          logit = first + 8 * t + x < left ? logit * scale_log2 : -INFINITY;
          top = fmaxf(top, logit);
        }
      store_part<MT>(l, wn_quad_max(top), mi, e, wm, wn, side);
    }
  __syncthreads();
#pragma unroll
  for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int head = (wm * S::MI + mi) * 16 + (lane >> 2) + 8 * e;
      float top = state.top[mi][e], sum = 0, sum_bf16 = 0;
#pragma unroll
      for (int i = 0; i < PARTS; i += 4) {
        const float4 part = *(const float4 *)&l.part[head * PARTS + i];
        top = fmaxf(top, fmaxf(fmaxf(part.x, part.y), fmaxf(part.z, part.w)));
      }
      const float alpha = wn_exp2(state.top[mi][e] - top);
#pragma unroll
      for (int t = 0; t < S::OWN; t++) {
        const float x = wn_exp2(s[mi][t][2 * e] - top), y = wn_exp2(s[mi][t][2 * e + 1] - top);
        const uint32_t xy = wn_pack_bf16(x, y);
        sum += x + y;
        sum_bf16 += __uint_as_float(xy << 16) + __uint_as_float(xy & 0xffff0000u);
        wn_store_shared_4(l.p + wn_block_at<MT>(head, wn, side * S::OWN + t) + 4 * (lane & 3), xy);
      }
      state.top[mi][e] = top;
      state.sum[mi][e] = state.sum[mi][e] * alpha + sum;
      state.sum_bf16[mi][e] = state.sum_bf16[mi][e] * alpha + sum_bf16;
      if (wn == 0 && side == 0 && (lane & 3) == 0) l.alpha[head] = alpha;
    }
  __syncthreads();
}

template <int MT, int NT> __device__ static void rescale(float o[MT][NT][4], const float *alpha) {
  const int lane = threadIdx.x & 31;
  float a[MT][2];
  bool all_one = true;
#pragma unroll
  for (int mi = 0; mi < MT; mi++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      a[mi][e] = alpha[mi * 16 + (lane >> 2) + 8 * e];
      all_one = all_one && a[mi][e] == 1;
    }
  if (__all_sync(0xffffffffu, all_one)) return;
#pragma unroll
  for (int mi = 0; mi < MT; mi++)
#pragma unroll
    for (int ni = 0; ni < NT; ni++)
#pragma unroll
      for (int x = 0; x < 4; x++) o[mi][ni][x] *= a[mi][x >> 1];
}

/* `mine` summed over all keys of head threadIdx.x: through part[head][PARTS]. */
template <int MT>
__device__ static float sum_of_keys(const float mine[wn_split<MT>::MI][2], const forward_layout<MT> &l, int wm, int wn,
                                    int side) {
  typedef wn_split<MT> S;
  constexpr int PARTS = forward_layout<MT>::PARTS;
  __syncthreads();
#pragma unroll
  for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
    for (int e = 0; e < 2; e++) store_part<MT>(l, wn_quad_sum(mine[mi][e]), mi, e, wm, wn, side);
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < PARTS && threadIdx.x < S::HEADS; i++) sum += l.part[threadIdx.x * PARTS + i];
  return sum;
}

/* lse is written; alpha becomes what o is multiplied by at the end. Ends with a barrier. */
template <int MT>
__device__ static void finish_sums(const wn_sparse_forward &a, const softmax_state<MT> &state,
                                   const forward_layout<MT> &l, int64_t row, int first_head, int wm, int wn, int side) {
  typedef wn_split<MT> S;
  const int lane = threadIdx.x & 31;
  const float sum_bf16 = sum_of_keys<MT>(state.sum_bf16, l, wm, wn, side);
#pragma unroll
  for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
    for (int e = 0; e < 2; e++)
      if (wn == 0 && side == 0 && (lane & 3) == 0)
        l.alpha[(wm * S::MI + mi) * 16 + (lane >> 2) + 8 * e] = state.top[mi][e];
  const float sum = sum_of_keys<MT>(state.sum, l, wm, wn, side);
  if (threadIdx.x < S::HEADS) {
    const int head = first_head + threadIdx.x;
    const float lse = sum > 0 ? (l.alpha[threadIdx.x] + log2f(sum)) * 0.693147180559945309f : sum + -INFINITY;
    if (head < a.q.heads) a.lse.data[row * a.lse.row + head] = lse;
    l.alpha[threadIdx.x] = sum_bf16 != 0 ? 1 / sum_bf16 : 0;
  }
  __syncthreads();
}

/* o and, with d_o, delta: dots of each warp's columns, then over the warps in their order. */
template <int MT, int NT>
__device__ static void store_rows(const wn_sparse_forward &a, float o[MT][NT][4], const forward_layout<MT> &l,
                                  int64_t row, int first_head, int warp) {
  constexpr int HEADS = wn_split<MT>::HEADS;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int mi = 0; mi < MT; mi++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int local = mi * 16 + (lane >> 2) + 8 * e, head = first_head + local;
      const float inverse = l.alpha[local];
      const bool there = head < a.q.heads;
      wn_bf16 *out = a.o.data + row * a.o.row + head * a.o.head;
      const wn_bf16 *grad = a.d_o.data ? a.d_o.data + row * a.d_o.row + head * a.d_o.head : NULL;
      float dot = 0;
#pragma unroll
      for (int ni = 0; ni < NT; ni++) {
        const int column = (warp * NT + ni) * 8 + 2 * (lane & 3);
        const float x = o[mi][ni][2 * e] * inverse, y = o[mi][ni][2 * e + 1] * inverse;
        if (!there) continue;
        wn_store_pair(out, column, a.v_width, x, y, a.o_pairs);
        if (!grad) continue;
        if (column < a.v_width) dot += x * __bfloat162float(grad[column]);
        if (column + 1 < a.v_width) dot += y * __bfloat162float(grad[column + 1]);
      }
      dot = wn_quad_sum(dot);
      if ((lane & 3) == 0) l.part[warp * HEADS + local] = dot;
    }
  __syncthreads();
  const int head = first_head + threadIdx.x;
  if (!a.d_o.data || threadIdx.x >= HEADS || head >= a.q.heads) return;
  float delta = 0;
  for (int w = 0; w < WN_SPARSE_WARPS; w++) delta += l.part[w * HEADS + threadIdx.x];
  a.delta.data[row * a.delta.row + head] = delta;
}

template <int MT, int NT>
__global__ __launch_bounds__(WN_SPARSE_THREADS, MT == 1 ? 2 : 1) static void forward_kernel(const wn_sparse_forward a) {
  typedef wn_split<MT> S;
  extern __shared__ __align__(1024) char memory[];
  const forward_layout<MT> l = lay_out<MT>(memory, wn_shared_address(memory), a.kv.width, a.stages);
  const int64_t row = blockIdx.x / a.groups;
  const int first_head = (int)(blockIdx.x % a.groups) * S::HEADS;
  const int warp = threadIdx.x >> 5, side = warp >> 2, block = warp & 3, wm = block % S::WM, wn = block / S::WM;
  const int32_t *pick = a.selection.data + row * a.selection.row;
  const uint32_t stage_bytes = (uint32_t)wn_tile_bytes(WN_SPARSE_KEYS, a.kv.width);
  float4 *room = (float4 *)(memory + (l.p - l.q) + wn * (S::WM * S::BLOCK_BYTES) + wm * S::BLOCK_BYTES);

  if (threadIdx.x == 0) *l.count = 0;
  __syncthreads();
  const int count = wn_count_picks(l.count, pick, a.selection.width);
  const int tiles = (count + WN_SPARSE_KEYS - 1) / WN_SPARSE_KEYS;
  int32_t key[2];
  wn_read_picks(key, pick, 0, count);
  if (tiles) wn_load_heads<S::HEADS>(l.q, a.q, row, first_head, a.q_aligned);
  if (tiles && a.stages == 2) wn_gather(l.kv, a.kv, key, a.kv_aligned);
  wn_cp_async_commit();
  if (a.stages == 2) wn_read_picks(key, pick, 1, count);

  float o[MT][NT][4] = {};
  softmax_state<MT> state;
  for (int mi = 0; mi < S::MI; mi++)
    for (int e = 0; e < 2; e++) {
      state.top[mi][e] = -INFINITY;
      state.sum[mi][e] = state.sum_bf16[mi][e] = 0;
    }
  const int steps = (a.kv.width + 15) / 16, middle = (steps + 1) / 2;
  for (int t = 0; t < tiles; t++) {
    const uint32_t kv = l.kv + (a.stages == 2 ? (t & 1) * stage_bytes : 0);
    if (a.stages == 1) {
      __syncthreads(); /* everyone has done with the tile before */
      wn_gather(kv, a.kv, key, a.kv_aligned);
      wn_cp_async_commit();
      wn_read_picks(key, pick, t + 1, count);
    }
    wn_cp_async_wait<0>();
    __syncthreads();
    if (a.stages == 2 && t + 1 < tiles) {
      wn_gather(l.kv + (~t & 1) * stage_bytes, a.kv, key, a.kv_aligned);
      wn_cp_async_commit();
      wn_read_picks(key, pick, t + 2, count);
    }
    float s[S::MI][S::OWN][4];
    {
      float acc[S::MI][S::NI][4] = {};
      wn_multiply_keys<MT>(acc, l.q, kv, wm, wn, side ? middle : 0, side ? steps : middle);
      fold_halves<MT>(s, acc, room, side, block);
    }
    softmax_tile<MT>(state, s, l, a.scale_log2, count - t * WN_SPARSE_KEYS, wm, wn, side);
    rescale<MT, NT>(o, l.alpha);
    wn_multiply_columns<MT, NT>(o, l.p, kv, warp, a.v_width);
  }
  finish_sums<MT>(a, state, l, row, first_head, wm, wn, side);
  store_rows<MT, NT>(a, o, l, row, first_head, warp);
}

/* ---- host ---- */

template <int MT, int NT> static wn_status launch(wn_device *device, wn_sparse_forward a) {
  const size_t most = wn_cuda_of(device)->block_shared_bytes;
  a.groups = (int32_t)wn_ceil_div(a.q.heads, wn_split<MT>::HEADS);
  a.stages = 2;
  size_t bytes = lay_out<MT>(NULL, 0, a.kv.width, 2).bytes;
  /* few heads: two blocks of one stage hide each other's loads better than one block of two */
  const size_t single = lay_out<MT>(NULL, 0, a.kv.width, 1).bytes;
  if (bytes > most || (MT == 1 && bytes > most / 2 && single + 1024 <= most / 2)) {
    a.stages = 1;
    bytes = single;
  }
  WN_ASSERT(bytes <= most, "sparse attention of width %d takes %zu bytes of shared memory, a block has %zu", a.kv.width,
            bytes, most);
  WN_CUDA_TRY(cudaFuncSetAttribute(forward_kernel<MT, NT>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  forward_kernel<MT, NT><<<(unsigned)(a.q.n * a.groups), WN_SPARSE_THREADS, bytes, wn_cuda_stream(device)>>>(a);
  WN_CUDA_LAUNCHED("attention_sparse");
  return NULL;
}

wn_status wn_cuda_attention_sparse(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                   const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *kv,
                                   const wn_tensor *selection, const wn_rows *rows, const wn_attention_params *params) {
  wn_sparse_forward a = {};
  a.q = wn_view_of<wn_bf16>(q);
  a.kv = wn_view_of<wn_bf16>(kv);
  a.o = wn_view_of<wn_bf16>(o);
  a.lse = wn_view_of<float>(lse);
  a.selection = wn_view_of<int32_t>(selection);
  WN_ASSERT(!delta == !d_o, "delta and d_o come together");
  WN_ASSERT(q->rank == 3 && kv->rank == 2 && o->rank == 3 && lse->rank == 2 && selection->rank == 2, "ranks");
  WN_ASSERT(a.q.n == rows->n_rows && a.o.n == a.q.n && a.lse.n == a.q.n && a.selection.n == a.q.n, "rows");
  WN_ASSERT(a.kv.n == rows->n_keys && a.kv.width == a.q.width, "kv is [%lld, %d]", (long long)a.kv.n, a.kv.width);
  WN_ASSERT(params->v_width >= 1 && params->v_width <= a.q.width, "v_width %d of %d", params->v_width, a.q.width);
  WN_ASSERT(a.o.heads == a.q.heads && a.o.width == params->v_width && a.lse.width == a.q.heads, "o, lse");
  if (d_o) {
    a.d_o = wn_view_of<wn_bf16>(d_o);
    a.delta = wn_view_of<float>(delta);
    a.d_o_pairs = wn_pairs_aligned(a.d_o);
    WN_ASSERT(d_o->rank == 3 && a.d_o.n == a.q.n && a.d_o.heads == a.q.heads && a.d_o.width == a.o.width, "d_o");
    WN_ASSERT(delta->rank == 2 && a.delta.n == a.q.n && a.delta.width == a.q.heads, "delta");
  }
  a.scale_log2 = (float)(params->scale * M_LOG2E);
  a.v_width = params->v_width;
  a.q_aligned = wn_gather_aligned(a.q);
  a.kv_aligned = wn_gather_aligned(a.kv);
  a.o_pairs = wn_pairs_aligned(a.o);
  if (a.q.n == 0 || a.q.heads == 0) return NULL;
  WN_TRY(wn_cuda_expect_picks(device, a.selection, a.kv.n));
  if (a.q.heads > 16 && a.v_width == WN_WIDE_VALUES && a.q.width == WN_WIDE_WIDTH && a.kv_aligned)
    return wn_sparse_forward_wide(device, a);
  if (a.q.heads > 16 && a.v_width <= 128) return launch<4, 2>(device, a);
  if (a.q.heads > 16 && a.v_width <= 512 && a.q.width <= 576) return launch<4, 8>(device, a);
  if (a.v_width <= 128) return launch<1, 2>(device, a);
  if (a.v_width <= 512) return launch<1, 8>(device, a);
  WN_ASSERT(a.v_width <= 1024, "values of %d columns; 1024 fit", a.v_width);
  return launch<1, 16>(device, a);
}
