/* Absorbed attention over a selection, backward: one block per row and 64 (or 16) heads, as in the forward. For each
 * tile of 64 picks: four warps make s = q kv^T, four dp = d_o v^T; pairs swap halves, so that all make
 * p = exp(s - lse) and ds = p (dp - delta) scale; dq += ds kv stays in registers; the picks' gradients
 * ds^T q + p^T d_o, summed over the block's heads, leave for dkv while the next tile is gathered. dkv is summed in
 * integers, in several launches: attention_sparse_sums.cuh.
 *
 * Ladder, 4096 rows, 8192 keys, 128 heads of 512 + 64, k 2048 (5.91 TFLOP), random picks, with p, all launches counted,
 * on an H200:
 *   1  mma.sync, gather with a test in front of every copy    43.5 ms, 136 TFLOP/s, 17% of cuBLAS's 780
 *   2  wgmma, for values of 512 columns, more than 16 heads   21.1 ms, 280 TFLOP/s, 36%
 * (local picks 21.0 ms; 32768 keys 22.4 and 21.1 ms; p alone 7.7 ms). 16 heads, 16384 keys, k 1024 (0.369 TFLOP):
 * 5.87 ms at first, 6.2 ms now, 60 TFLOP/s.
 *
 * What did not help: the next tile's s and dp among the additions to dkv, and those products one part ahead, in
 * 32-column parts: 22.8 ms. Two kernels a chunk of rows, which came to 20.2 ms (131072 keys: 26.0 where version 2 takes
 * 27.9) and 1 GiB of scratch: this one without dkv, its p and ds through global memory, 9.5 ms; and dkv by blocks of a
 * row and half of its columns, which fold both groups of heads in registers, so that half as many bytes are added, and
 * send them by the copy engine, 256 bytes a key: 10.7 ms, and still 7.9 with the additions left out. There it is not
 * the additions that take the time but what makes them ready: products, maxima and conversions one after the other. */
#include <math.h>

#include "kernels/cuda/attention_gather.cuh"
#include "kernels/cuda/attention_sparse_sums.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/picks.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"

typedef enum pass {
  ALL_ROWS,     /* dq, p, sums and bounds */
  SAMPLED_ROWS, /* every WN_SPARSE_SAMPLE-th row, largest contributions only */
  AGAIN,        /* sums of the keys marked so */
  ONLY_P
} pass;

typedef struct backward_args {
  wn_view<wn_bf16> q, kv, d_o, dq;
  wn_view<float> lse, delta, p; /* p.data NULL: not wanted. With groups > 1 it is the partial means, below */
  float *p_partial;             /* [groups][n][k] where groups > 1 */
  wn_view<int32_t> selection;
  wn_sparse_sums keys;
  float scale, scale_log2;
  int32_t v_width, groups;
  pass what;
  bool q_aligned, kv_aligned, d_o_aligned, dq_pairs;
} backward_args;

template <int MT> struct backward_layout {
  uint32_t q, d_o, kv, p, ds, bytes;
  float *lse, *delta; /* [HEADS], lse in log2 units */
  float *p_sum;       /* [up to 4 parts of the heads][64 keys] */
  float *scale;       /* [64 keys]; 0: no sum wanted */
  int32_t *key;       /* [64], -1 past the end */
  int *count;
};

template <int MT>
__host__ __device__ static backward_layout<MT> lay_out(char *memory, uint32_t base, int width, int v_width) {
  typedef wn_split<MT> S;
  backward_layout<MT> l;
  uint32_t at = 0;
  l.q = base + at;
  at += (uint32_t)wn_tile_bytes(S::HEADS, width);
  l.d_o = base + at;
  at += (uint32_t)wn_tile_bytes(S::HEADS, v_width);
  l.kv = base + at;
  at += (uint32_t)wn_tile_bytes(WN_SPARSE_KEYS, width);
  l.p = base + at;
  at += S::HEADS * WN_SPARSE_KEYS * 2;
  l.ds = base + at;
  at += S::HEADS * WN_SPARSE_KEYS * 2;
  l.lse = (float *)(memory + at);
  at += S::HEADS * 4;
  l.delta = (float *)(memory + at);
  at += S::HEADS * 4;
  l.p_sum = (float *)(memory + at);
  at += 4 * WN_SPARSE_KEYS * 4;
  l.scale = (float *)(memory + at);
  at += WN_SPARSE_KEYS * 4;
  l.key = (int32_t *)(memory + at);
  at += WN_SPARSE_KEYS * 4;
  l.count = (int *)(memory + at);
  l.bytes = at + 16;
  return l;
}

/* Side 0 of a pair has s of the block, side 1 dp. Each keeps its half of the n-tiles and swaps the other half through
 * the block's bytes of p and of ds; then both have s and dp of OWN n-tiles. */
template <int MT>
__device__ static void swap_sides(float s[wn_split<MT>::MI][wn_split<MT>::OWN][4],
                                  float dp[wn_split<MT>::MI][wn_split<MT>::OWN][4],
                                  const float acc[wn_split<MT>::MI][wn_split<MT>::NI][4], float4 *p_room,
                                  float4 *ds_room, int side, int block) {
  typedef wn_split<MT> S;
  const int lane = threadIdx.x & 31;
  float4 *give_room = side ? ds_room : p_room, *get_room = side ? p_room : ds_room;
#pragma unroll
  for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
    for (int t = 0; t < S::OWN; t++) {
      float give[4];
#pragma unroll
      for (int x = 0; x < 4; x++) give[x] = side ? acc[mi][t][x] : acc[mi][t + S::OWN][x];
      give_room[(mi * S::OWN + t) * 32 + lane] = make_float4(give[0], give[1], give[2], give[3]);
    }
  wn_named_sync(1 + block, 64);
#pragma unroll
  for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
    for (int t = 0; t < S::OWN; t++) {
      const float4 got4 = get_room[(mi * S::OWN + t) * 32 + lane];
      const float got[4] = {got4.x, got4.y, got4.z, got4.w};
#pragma unroll
      for (int x = 0; x < 4; x++) {
        const float kept = side ? acc[mi][t + S::OWN][x] : acc[mi][t][x];
        s[mi][t][x] = side ? got[x] : kept;
        dp[mi][t][x] = side ? kept : got[x];
      }
    }
  wn_named_sync(1 + block, 64); /* both have read: p and ds may be written there */
}

__device__ __forceinline__ static float sum_of_heads(float x) { /* over the eight lanes that hold one column */
  x += __shfl_xor_sync(0xffffffffu, x, 4);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return x + __shfl_xor_sync(0xffffffffu, x, 16);
}

/* p and ds of this warp's OWN n-tiles to shared memory, and p's sums over the warp's heads. `left`: picks from this
 * tile's first on. */
template <int MT>
__device__ static void make_p_ds(float s[wn_split<MT>::MI][wn_split<MT>::OWN][4],
                                 float dp[wn_split<MT>::MI][wn_split<MT>::OWN][4], const backward_layout<MT> &l,
                                 float scale, float scale_log2, int left, int wm, int wn, int side) {
  typedef wn_split<MT> S;
  const int lane = threadIdx.x & 31, first = wn * S::NI * 8 + side * S::OWN * 8 + 2 * (lane & 3);
  float sums[S::OWN][2] = {};
#pragma unroll
  for (int mi = 0; mi < S::MI; mi++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int head = (wm * S::MI + mi) * 16 + (lane >> 2) + 8 * e;
      const float lse = l.lse[head], delta = l.delta[head];
#pragma unroll
      for (int t = 0; t < S::OWN; t++) {
        float p[2], ds[2];
#pragma unroll
        for (int x = 0; x < 2; x++) {
          const float here = wn_exp2(s[mi][t][2 * e + x] * scale_log2 - lse);
          p[x] = first + 8 * t + x < left ? here : 0;
          ds[x] = p[x] * (dp[mi][t][2 * e + x] - delta) * scale;
          sums[t][x] += p[x];
        }
        const uint32_t at = wn_block_at<MT>(head, wn, side * S::OWN + t) + 4 * (lane & 3);
        wn_store_shared_4(l.p + at, wn_pack_bf16(p[0], p[1]));
        wn_store_shared_4(l.ds + at, wn_pack_bf16(ds[0], ds[1]));
      }
    }
#pragma unroll
  for (int t = 0; t < S::OWN; t++)
#pragma unroll
    for (int x = 0; x < 2; x++) {
      const float sum = sum_of_heads(sums[t][x]);
      if (lane < 4) l.p_sum[wm * WN_SPARSE_KEYS + first + 8 * t + x] = sum;
    }
}

/* acc[2][NB][4] = contributions to 32 picks from 32 * part, columns from n-tile `tile` on: over this block's heads,
 * weights^T x, where weights is p or ds in blocks and x a tile of heads. n-tiles from `columns` on are left out. */
template <int MT, int NB>
__device__ __forceinline__ static void multiply_heads(float acc[2][NB][4], uint32_t weights, uint32_t x, int part,
                                                      int tile, int columns) {
  typedef wn_split<MT> S;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 0; step < MT; step++) {
    uint32_t fw[2][4];
#pragma unroll
    for (int mi = 0; mi < 2; mi++) {
      const int group = (part * 2 + mi) * 2, head = step * 16 + (lane >> 4) * 8 + (lane & 7);
      wn_ldmatrix_x4_trans(fw[mi], weights + wn_block_at<MT>(head, group / S::NI, group % S::NI + ((lane >> 3) & 1)));
    }
#pragma unroll
    for (int ni = 0; ni < NB; ni += 2) {
      uint32_t fx[4];
      if ((tile + ni) * 8 >= columns) continue;
      const bool two = ni + 1 < NB && (tile + ni + 1) * 8 < columns;
      const int row = step * 16 + (lane & 15);
      if (two)
        wn_ldmatrix_x4_trans(fx, x + wn_tile_at(S::HEADS, row, tile + ni + (lane >> 4)));
      else
        wn_ldmatrix_x2_trans(fx, x + wn_tile_at(S::HEADS, row, tile + ni));
#pragma unroll
      for (int mi = 0; mi < 2; mi++) {
        wn_mma_bf16(acc[mi][ni], fw[mi], fx);
        if (ni + 1 < NB && two) wn_mma_bf16(acc[mi][ni + 1], fw[mi], fx + 2);
      }
    }
  }
}

/* The largest magnitude of one contribution in a slice of columns, which four lanes hold. */
__device__ __forceinline__ static void record_most(const backward_args &a, int32_t key, int slice, uint32_t most,
                                                   float scale) {
  most = max(most, __shfl_xor_sync(0xffffffffu, most, 1));
  most = max(most, __shfl_xor_sync(0xffffffffu, most, 2));
  if ((threadIdx.x & 3) != 0 || key < 0) return;
  if (a.what == SAMPLED_ROWS) wn_add_sampled(a.keys, key, most);
  if (a.what == ALL_ROWS) wn_add_bound(a.keys, key, slice, most, scale);
}

/* The tile's contributions to dkv, this warp's columns: into the sums, or (in the sample) only their largest. */
template <int MT, int NT>
__device__ static void scatter(const backward_args &a, const backward_layout<MT> &l, int warp) {
  constexpr int NB = NT <= 2 ? NT : 3;
  const int lane = threadIdx.x & 31;
  for (int part = 0; part < 2; part++) {
    uint32_t most[2][2] = {};
    float scale[2][2];
    int32_t key[2][2];
#pragma unroll
    for (int mi = 0; mi < 2; mi++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int j = part * 32 + mi * 16 + (lane >> 2) + 8 * e;
        key[mi][e] = l.key[j];
        scale[mi][e] = l.scale[j];
      }
    for (int group = 0; group < NT; group += NB) {
      const int tile = warp * NT + group;
      if (tile * 8 >= a.kv.width) break;
      float acc[2][NB][4] = {};
      multiply_heads<MT, NB>(acc, l.ds, l.q, part, tile, a.kv.width);
      multiply_heads<MT, NB>(acc, l.p, l.d_o, part, tile, a.v_width);
#pragma unroll
      for (int mi = 0; mi < 2; mi++)
#pragma unroll
        for (int e = 0; e < 2; e++)
#pragma unroll
          for (int ni = 0; ni < NB; ni++) {
            const float x = acc[mi][ni][2 * e], y = acc[mi][ni][2 * e + 1];
            const int column = (tile + ni) * 8 + 2 * (lane & 3);
            if (column >= a.kv.width) continue;
            most[mi][e] = max(most[mi][e], max(wn_magnitude_bits(x), wn_magnitude_bits(y)));
            if (a.what == SAMPLED_ROWS || scale[mi][e] == 0) continue;
            wn_add_pair(a.keys.sums + (int64_t)key[mi][e] * a.keys.pitch + column, x, y, scale[mi][e]);
          }
    }
#pragma unroll
    for (int mi = 0; mi < 2; mi++)
#pragma unroll
      for (int e = 0; e < 2; e++) record_most(a, key[mi][e], warp, most[mi][e], scale[mi][e]);
  }
}

/* The head means of this tile's p, of all heads or of this group's. */
__device__ static void store_p(const backward_args &a, const float *p_sum, int parts, int64_t row, int group, int t) {
  const int j = t * WN_SPARSE_KEYS + threadIdx.x;
  if (threadIdx.x >= WN_SPARSE_KEYS || j >= a.selection.width) return;
  float sum = 0;
  for (int i = 0; i < parts; i++) sum += p_sum[i * WN_SPARSE_KEYS + threadIdx.x];
  if (a.groups > 1)
    a.p_partial[((int64_t)group * a.selection.n + row) * a.selection.width + j] = sum;
  else
    a.p.data[row * a.p.row + j] = sum / (float)a.q.heads;
}

__device__ static void clear_p(const backward_args &a, int64_t row, int group, int from) {
  for (int j = from + threadIdx.x; j < a.selection.width; j += WN_SPARSE_THREADS)
    if (a.groups > 1)
      a.p_partial[((int64_t)group * a.selection.n + row) * a.selection.width + j] = 0;
    else
      a.p.data[row * a.p.row + j] = 0;
}

template <int MT, int NT>
__device__ static void store_dq(const backward_args &a, const float dq[MT][NT][4], int64_t row, int first_head,
                                int warp) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int mi = 0; mi < MT; mi++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int head = first_head + mi * 16 + (lane >> 2) + 8 * e;
      if (head >= a.q.heads) continue;
      wn_bf16 *out = a.dq.data + row * a.dq.row + head * a.dq.head;
#pragma unroll
      for (int ni = 0; ni < NT; ni++)
        wn_store_pair(out, (warp * NT + ni) * 8 + 2 * (lane & 3), a.q.width, dq[mi][ni][2 * e], dq[mi][ni][2 * e + 1],
                      a.dq_pairs);
    }
}

/* What of a row is the same for all its tiles. Heads that do not exist get p = 0. */
template <int MT>
__device__ static void load_row(const backward_args &a, const backward_layout<MT> &l, int64_t row, int first_head) {
  constexpr int HEADS = wn_split<MT>::HEADS;
  wn_load_heads<HEADS>(l.q, a.q, row, first_head, a.q_aligned);
  if (a.what != ONLY_P) wn_load_heads<HEADS>(l.d_o, a.d_o, row, first_head, a.d_o_aligned);
  if (threadIdx.x >= HEADS) return;
  const int head = first_head + threadIdx.x;
  const bool there = head < a.q.heads;
  l.lse[threadIdx.x] = there ? a.lse.data[row * a.lse.row + head] * WN_LOG2E : INFINITY;
  l.delta[threadIdx.x] = there && a.what != ONLY_P ? a.delta.data[row * a.delta.row + head] : 0;
}

/* The scales of a tile's keys, by the threads that publish them; 0: no sum is wanted. */
__device__ __forceinline__ static void read_scales(const backward_args &a, float scale[2], const int32_t key[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    scale[r] = 0;
    if ((threadIdx.x & 7) != 0 || key[r] < 0) continue;
    if (a.what == ALL_ROWS || (a.what == AGAIN && a.keys.again[key[r]])) scale[r] = a.keys.scale[key[r]];
  }
}

/* This tile's keys and scales to shared memory, by the threads that gather its rows; whether there is something to do
 * for any of them. */
template <int MT>
__device__ static bool publish_keys(const backward_args &a, const backward_layout<MT> &l, const int32_t key[2],
                                    const float scale[2]) {
  if ((threadIdx.x & 7) == 0)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      l.key[(threadIdx.x >> 3) + 32 * r] = key[r];
      l.scale[(threadIdx.x >> 3) + 32 * r] = scale[r];
    }
  return a.what != AGAIN || scale[0] != 0 || scale[1] != 0;
}

template <int MT, int NT>
__global__ __launch_bounds__(WN_SPARSE_THREADS, 1) static void backward_kernel(const backward_args a) {
  typedef wn_split<MT> S;
  extern __shared__ __align__(1024) char memory[];
  if (a.what == AGAIN && a.keys.global[WN_SPARSE_AGAIN] == 0) return;
  const backward_layout<MT> l = lay_out<MT>(memory, wn_shared_address(memory), a.kv.width, a.v_width);
  const int64_t row = (int64_t)(blockIdx.x / a.groups) * (a.what == SAMPLED_ROWS ? WN_SPARSE_SAMPLE : 1);
  const int group = (int)(blockIdx.x % a.groups), first_head = group * S::HEADS;
  const int warp = threadIdx.x >> 5, side = warp >> 2, block = warp & 3, wm = block % S::WM, wn = block / S::WM;
  const int32_t *pick = a.selection.data + row * a.selection.row;
  const int room = wn * (S::WM * S::BLOCK_BYTES) + wm * S::BLOCK_BYTES;
  float4 *p_room = (float4 *)(memory + (l.p - l.q) + room), *ds_room = (float4 *)(memory + (l.ds - l.q) + room);

  if (threadIdx.x == 0) *l.count = 0;
  __syncthreads();
  const int count = wn_count_picks(l.count, pick, a.selection.width);
  const int tiles = (count + WN_SPARSE_KEYS - 1) / WN_SPARSE_KEYS;
  int32_t key[2];
  wn_read_picks(key, pick, 0, count);
  if (tiles) load_row<MT>(a, l, row, first_head);
  if (tiles) wn_gather(l.kv, a.kv, key, a.kv_aligned);
  wn_cp_async_commit();

  float dq[MT][NT][4] = {};
  const int steps = ((side ? a.v_width : a.kv.width) + 15) / 16;
  for (int t = 0; t < tiles; t++) {
    wn_cp_async_wait<0>();
    float scale[2];
    read_scales(a, scale, key);
    const bool mine = publish_keys<MT>(a, l, key, scale);
    const bool wanted = __syncthreads_or(mine);
    wn_read_picks(key, pick, t + 1, count);
    if (wanted) {
      float s[S::MI][S::OWN][4], dp[S::MI][S::OWN][4];
      {
        float acc[S::MI][S::NI][4] = {};
        if (side == 0 || a.what != ONLY_P) wn_multiply_keys<MT>(acc, side ? l.d_o : l.q, l.kv, wm, wn, 0, steps);
        swap_sides<MT>(s, dp, acc, p_room, ds_room, side, block);
      }
      make_p_ds<MT>(s, dp, l, a.scale, a.scale_log2, count - t * WN_SPARSE_KEYS, wm, wn, side);
      __syncthreads();
      if (a.p.data && (a.what == ALL_ROWS || a.what == ONLY_P)) store_p(a, l.p_sum, S::WM, row, group, t);
      if (a.what == ALL_ROWS) wn_multiply_columns<MT, NT>(dq, l.ds, l.kv, warp, a.kv.width);
    }
    __syncthreads(); /* the tile has served */
    if (t + 1 < tiles) wn_gather(l.kv, a.kv, key, a.kv_aligned);
    wn_cp_async_commit();
    if (wanted && a.what != ONLY_P) scatter<MT, NT>(a, l, warp);
    __syncthreads(); /* p, ds and the keys have served */
  }
  if (a.p.data && (a.what == ALL_ROWS || a.what == ONLY_P)) clear_p(a, row, group, tiles * WN_SPARSE_KEYS);
  if (a.what == ALL_ROWS) store_dq<MT, NT>(a, dq, row, first_head, warp);
}

/* ---- 512 + 64 columns, many heads: the same by two warpgroups ---- */

enum {
  WIDE_MAIN = 32, /* n-tiles of dq that a group owns: 256 columns */
  WIDE_REST = 4,  /* and half of the panel past the values */
  ROW_STEP = 16 * WN_PANEL_ROW_BYTES,
  REST_PANEL = WN_WIDE_VALUES / WN_PANEL_COLUMNS
};

/* Group 0: s = q kv^T; group 1: dp = d_o v^T; 64 heads, 64 keys, so many panels of columns. Then they swap halves as in
 * swap_sides: s and dp of the group's 32 keys; a thread's heads are 16 warp + lane / 4 and that plus 8. */
__device__ static void wide_logits(float (&s)[4][4], float (&dp)[4][4], const backward_layout<4> &l, float4 *p_room,
                                   float4 *ds_room, int panels, int group, int warp) {
  const int lane = threadIdx.x & 31;
  const uint32_t rows = group ? l.d_o : l.q;
  float acc[8][4] = {};
#pragma unroll 1
  for (int panel = 0; panel < panels; panel++) {
    wn_wgmma_settle(acc);
    wn_wgmma_fence(); /* in the loop: else the compiler puts its own there, and products one after the other */
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t at = (uint32_t)(panel * WN_WIDE_PANEL_BYTES + i * 32);
      wn_wgmma<WN_ALONG, WN_ALONG>(acc, wn_wgmma_operand_anew(rows + at, 0), wn_wgmma_operand_anew(l.kv + at, 0), true);
    }
  }
  wn_wgmma_fence();
  wn_wgmma_commit();
  wn_wgmma_wait<0>();
  wn_wgmma_settle(acc);
  float4 *give = (group ? ds_room : p_room) + lane, *get = (group ? p_room : ds_room) + lane;
#pragma unroll
  for (int t = 0; t < 4; t++)
    give[t * 32] = group ? make_float4(acc[t][0], acc[t][1], acc[t][2], acc[t][3])
                         : make_float4(acc[t + 4][0], acc[t + 4][1], acc[t + 4][2], acc[t + 4][3]);
  wn_named_sync(1 + warp, 64);
#pragma unroll
  for (int t = 0; t < 4; t++) {
    const float4 got4 = get[t * 32];
    const float got[4] = {got4.x, got4.y, got4.z, got4.w};
#pragma unroll
    for (int x = 0; x < 4; x++) {
      s[t][x] = group ? got[x] : acc[t][x];
      dp[t][x] = group ? acc[t + 4][x] : got[x];
    }
  }
  wn_named_sync(1 + warp, 64); /* both have read: p and ds may be written there */
}

/* As make_p_ds; p and ds are tiles [64 heads][64 keys]. */
__device__ static void wide_p_ds(float (&s)[4][4], float (&dp)[4][4], const backward_layout<4> &l, float scale,
                                 float scale_log2, int left, int group, int warp) {
  const int lane = threadIdx.x & 31, first = group * 32 + 2 * (lane & 3);
  float sums[4][2] = {};
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int head = warp * 16 + (lane >> 2) + 8 * e;
    const float lse = l.lse[head], delta = l.delta[head];
#pragma unroll
    for (int t = 0; t < 4; t++) {
      float p[2], ds[2];
#pragma unroll
      for (int x = 0; x < 2; x++) {
        const float here = wn_exp2(s[t][2 * e + x] * scale_log2 - lse);
        p[x] = first + 8 * t + x < left ? here : 0;
        ds[x] = p[x] * (dp[t][2 * e + x] - delta) * scale;
        sums[t][x] += p[x];
      }
      const uint32_t at = wn_tile_at(WN_WIDE_HEADS, head, group * 4 + t) + 4 * (lane & 3);
      wn_store_shared_4(l.p + at, wn_pack_bf16(p[0], p[1]));
      wn_store_shared_4(l.ds + at, wn_pack_bf16(ds[0], ds[1]));
    }
  }
#pragma unroll
  for (int t = 0; t < 4; t++)
#pragma unroll
    for (int x = 0; x < 2; x++) {
      const float sum = sum_of_heads(sums[t][x]);
      if (lane < 4) l.p_sum[warp * WN_SPARSE_KEYS + first + 8 * t + x] = sum;
    }
}

/* dq += ds kv: the group's 256 columns and its 32 past the values. */
__device__ static void wide_dq(float (&main)[WIDE_MAIN][4], float (&rest)[WIDE_REST][4], const backward_layout<4> &l,
                               int group) {
  wn_wgmma_settle(main);
  wn_wgmma_settle(rest);
  wn_wgmma_fence();
#pragma unroll
  for (int step = 0; step < WN_SPARSE_KEYS / 16; step++) {
    const uint64_t ds = wn_wgmma_operand_anew(l.ds + step * 32, 0);
    wn_wgmma<WN_ALONG, WN_ACROSS>(
        main, ds, wn_wgmma_operand_anew(l.kv + group * 4 * WN_WIDE_PANEL_BYTES + step * ROW_STEP, WN_WIDE_PANEL_BYTES),
        true);
    wn_wgmma<WN_ALONG, WN_ACROSS>(
        rest, ds,
        wn_wgmma_operand_anew(l.kv + REST_PANEL * WN_WIDE_PANEL_BYTES + group * 64 + step * ROW_STEP,
                              WN_WIDE_PANEL_BYTES),
        true);
  }
  wn_wgmma_commit();
  wn_wgmma_wait<0>();
  wn_wgmma_settle(main);
  wn_wgmma_settle(rest);
}

/* The tile's contributions to columns from `column` on: acc[64 keys][8 NT] = ds^T q (+ p^T d_o); q and d_o are given at
 * the column. */
template <int NT>
__device__ static void wide_contributions(float (&acc)[NT][4], uint32_t ds, uint32_t q, uint32_t p, uint32_t d_o,
                                          bool values) {
  wn_wgmma_settle(acc);
  wn_wgmma_fence();
#pragma unroll
  for (int step = 0; step < WN_WIDE_HEADS / 16; step++)
    wn_wgmma<WN_ACROSS, WN_ACROSS>(acc, wn_wgmma_operand_anew(ds + step * ROW_STEP, WN_WIDE_PANEL_BYTES),
                                   wn_wgmma_operand_anew(q + step * ROW_STEP, WN_WIDE_PANEL_BYTES), step > 0);
  if (values)
#pragma unroll
    for (int step = 0; step < WN_WIDE_HEADS / 16; step++)
      wn_wgmma<WN_ACROSS, WN_ACROSS>(acc, wn_wgmma_operand_anew(p + step * ROW_STEP, WN_WIDE_PANEL_BYTES),
                                     wn_wgmma_operand_anew(d_o + step * ROW_STEP, WN_WIDE_PANEL_BYTES), true);
  wn_wgmma_commit();
}

/* A thread's two keys of the tile in the contributions: 16 warp + lane / 4 and that plus 8. */
typedef struct wide_keys {
  int32_t key[2];
  float scale[2];
  uint32_t most[2];
} wide_keys;

template <int NT>
__device__ static void wide_add(const backward_args &a, wide_keys &keys, const float (&acc)[NT][4], int column) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    int32_t *sums = a.keys.sums + (int64_t)keys.key[e] * a.keys.pitch + column + 2 * (threadIdx.x & 3);
    const bool add = keys.scale[e] != 0 && a.what != SAMPLED_ROWS;
#pragma unroll
    for (int j = 0; j < NT; j++) {
      if (column + 8 * j >= a.kv.width) continue;
      const float x = acc[j][2 * e], y = acc[j][2 * e + 1];
      keys.most[e] = max(keys.most[e], max(wn_magnitude_bits(x), wn_magnitude_bits(y)));
      if (add) wn_add_pair(sums + 8 * j, x, y, keys.scale[e]);
    }
  }
}

__device__ static void wide_scatter(const backward_args &a, const backward_layout<4> &l, int group, int warp) {
  const int lane = threadIdx.x & 31;
  wide_keys keys = {};
#pragma unroll
  for (int e = 0; e < 2; e++) {
    keys.key[e] = l.key[warp * 16 + (lane >> 2) + 8 * e];
    keys.scale[e] = l.scale[warp * 16 + (lane >> 2) + 8 * e];
  }
  for (int panel = group * 4; panel < group * 4 + 4; panel++) {
    float acc[8][4];
    const uint32_t at = (uint32_t)(panel * WN_WIDE_PANEL_BYTES);
    wide_contributions(acc, l.ds, l.q + at, l.p, l.d_o + at, true);
    wn_wgmma_wait<0>();
    wn_wgmma_settle(acc);
    wide_add(a, keys, acc, panel * WN_PANEL_COLUMNS);
  }
  {
    float acc[WIDE_REST][4];
    wide_contributions(acc, l.ds, l.q + REST_PANEL * WN_WIDE_PANEL_BYTES + group * 64, l.p, l.d_o, false);
    wn_wgmma_wait<0>();
    wn_wgmma_settle(acc);
    wide_add(a, keys, acc, WN_WIDE_VALUES + group * 32);
  }
#pragma unroll
  for (int e = 0; e < 2; e++) record_most(a, keys.key[e], group, keys.most[e], keys.scale[e]);
}

template <int NT>
__device__ static void wide_store(const backward_args &a, const float (&dq)[NT][4], int64_t row, int first_head,
                                  int column, int warp) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int head = first_head + warp * 16 + (lane >> 2) + 8 * e;
    if (head >= a.q.heads) continue;
    wn_bf16 *out = a.dq.data + row * a.dq.row + head * a.dq.head;
#pragma unroll
    for (int j = 0; j < NT; j++)
      wn_store_pair(out, column + 8 * j + 2 * (lane & 3), a.q.width, dq[j][2 * e], dq[j][2 * e + 1], a.dq_pairs);
  }
}

/* MAIN: the launch over all rows; it alone has dq's registers, and no branch around its products. */
template <bool MAIN> __global__ __launch_bounds__(WN_SPARSE_THREADS, 1) static void wide_kernel(const backward_args a) {
  extern __shared__ __align__(1024) char memory[];
  if (a.what == AGAIN && a.keys.global[WN_SPARSE_AGAIN] == 0) return;
  const backward_layout<4> l = lay_out<4>(memory, wn_shared_address(memory), a.kv.width, a.v_width);
  const int64_t row = (int64_t)(blockIdx.x / a.groups) * (a.what == SAMPLED_ROWS ? WN_SPARSE_SAMPLE : 1);
  const int head_group = (int)(blockIdx.x % a.groups), first_head = head_group * WN_WIDE_HEADS;
  const int of_block = wn_uniform(threadIdx.x >> 5), group = of_block >> 2, warp = of_block & 3;
  const int32_t *pick = a.selection.data + row * a.selection.row;
  float4 *p_room = (float4 *)(memory + (l.p - l.q) + warp * ROW_STEP);
  float4 *ds_room = (float4 *)(memory + (l.ds - l.q) + warp * ROW_STEP);

  if (threadIdx.x == 0) *l.count = 0;
  __syncthreads();
  const int count = wn_count_picks(l.count, pick, a.selection.width);
  const int tiles = wn_uniform((count + WN_SPARSE_KEYS - 1) / WN_SPARSE_KEYS);
  int32_t key[2];
  float scale[2];
  wn_read_picks(key, pick, 0, count);
  if (tiles) {
    load_row<4>(a, l, row, first_head);
    wn_gather(l.kv, a.kv, key, a.kv_aligned);
  }
  wn_cp_async_commit();
  read_scales(a, scale, key);

  float main[WIDE_MAIN][4] = {}, rest[WIDE_REST][4] = {};
  const int panels = group == 0 ? REST_PANEL + 1 : !MAIN && a.what == ONLY_P ? 0 : REST_PANEL;
  for (int t = 0; t < tiles; t++) {
    wn_cp_async_wait<0>();
    wn_publish_shared();
    const bool mine = publish_keys<4>(a, l, key, scale);
    const bool wanted = wn_uniform(__syncthreads_or(mine)) || MAIN;
    wn_read_picks(key, pick, t + 1, count);
    if (wanted) {
      float s[4][4], dp[4][4];
      wide_logits(s, dp, l, p_room, ds_room, panels, group, warp);
      wide_p_ds(s, dp, l, a.scale, a.scale_log2, count - t * WN_SPARSE_KEYS, group, warp);
      wn_publish_shared();
      __syncthreads();
      if (a.p.data && (MAIN || a.what == ONLY_P)) store_p(a, l.p_sum, 4, row, head_group, t);
      if (MAIN) wide_dq(main, rest, l, group);
    }
    read_scales(a, scale, key);
    __syncthreads(); /* the tile has served */
    if (t + 1 < tiles) wn_gather(l.kv, a.kv, key, a.kv_aligned);
    wn_cp_async_commit();
    if (MAIN || (wanted && a.what != ONLY_P)) wide_scatter(a, l, group, warp);
    __syncthreads(); /* p, ds and the keys have served */
  }
  if (a.p.data && (MAIN || a.what == ONLY_P)) clear_p(a, row, head_group, tiles * WN_SPARSE_KEYS);
  if (!MAIN) return;
  wide_store(a, main, row, first_head, group * (WN_WIDE_VALUES / 2), warp);
  wide_store(a, rest, row, first_head, WN_WIDE_VALUES + group * 32, warp);
}

/* ---- host ---- */

__global__ static void fold_p_kernel(wn_view<float> p, const float *partial, int groups, float heads) {
  const int64_t all = p.n * p.width, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    float sum = 0;
    for (int g = 0; g < groups; g++) sum += partial[g * all + i];
    p.data[i / p.width * p.row + i % p.width] = sum / heads;
  }
}

typedef wn_status launcher(wn_device *device, backward_args *a, pass what);

static wn_status launch_kernel(wn_device *device, void (*kernel)(backward_args), size_t bytes, backward_args *a,
                               pass what) {
  const size_t most = wn_cuda_of(device)->block_shared_bytes;
  WN_ASSERT(bytes <= most, "sparse attention of width %d takes %zu bytes of shared memory, a block has %zu",
            a->kv.width, bytes, most);
  const int64_t rows = what == SAMPLED_ROWS ? wn_ceil_div(a->q.n, WN_SPARSE_SAMPLE) : a->q.n;
  a->what = what;
  WN_CUDA_TRY(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  kernel<<<(unsigned)(rows * a->groups), WN_SPARSE_THREADS, bytes, wn_cuda_stream(device)>>>(*a);
  WN_CUDA_LAUNCHED("attention_sparse_backward");
  return NULL;
}

template <int MT, int NT> static wn_status launch(wn_device *device, backward_args *a, pass what) {
  return launch_kernel(device, backward_kernel<MT, NT>, lay_out<MT>(NULL, 0, a->kv.width, a->v_width).bytes, a, what);
}
static wn_status launch_wide(wn_device *device, backward_args *a, pass what) {
  return launch_kernel(device, what == ALL_ROWS ? wide_kernel<true> : wide_kernel<false>,
                       lay_out<4>(NULL, 0, a->kv.width, a->v_width).bytes, a, what);
}

/* All launches of one call; a block takes `heads` heads. */
static wn_status run(wn_device *device, launcher *one, int heads, backward_args *a, wn_view<float> dkv) {
  const int64_t m = a->kv.n;
  a->groups = (int32_t)wn_ceil_div(a->q.heads, heads);
  if (a->groups > 1 && a->p.data)
    WN_TRY(wn_cuda_scratch(device, (void **)&a->p_partial, "p of head groups",
                           a->selection.n * a->selection.width * a->groups * 4));
  if (!dkv.data) {
    WN_TRY(one(device, a, ONLY_P));
  } else {
    WN_TRY(wn_sparse_sums_create(device, &a->keys, m, a->kv.width, a->groups, a->selection));
    WN_TRY(one(device, a, SAMPLED_ROWS));
    WN_TRY(wn_sparse_sums_estimate(device, a->keys, m));
    WN_TRY(one(device, a, ALL_ROWS));
    WN_TRY(wn_sparse_sums_review(device, a->keys, m));
    WN_TRY(one(device, a, AGAIN));
    WN_TRY(wn_sparse_sums_finish(device, a->keys, dkv));
  }
  if (a->groups == 1 || !a->p.data) return NULL;
  const int64_t blocks = wn_ceil_div(a->p.n * a->p.width, 256), most = (int64_t)wn_cuda_of(device)->n_sms * 16;
  fold_p_kernel<<<(unsigned)(blocks < most ? blocks : most), 256, 0, wn_cuda_stream(device)>>>(
      a->p, a->p_partial, a->groups, (float)a->q.heads);
  WN_CUDA_LAUNCHED("attention_sparse_backward's p");
  return NULL;
}

static backward_args checked(const wn_tensor *q, const wn_tensor *kv, const wn_tensor *selection, const wn_tensor *lse,
                             const wn_rows *rows, const wn_attention_params *params) {
  backward_args a = {};
  a.q = wn_view_of<wn_bf16>(q);
  a.kv = wn_view_of<wn_bf16>(kv);
  a.selection = wn_view_of<int32_t>(selection);
  a.lse = wn_view_of<float>(lse);
  WN_ASSERT(q->rank == 3 && kv->rank == 2 && selection->rank == 2 && lse->rank == 2, "ranks");
  WN_ASSERT(a.q.n == rows->n_rows && a.lse.n == a.q.n && a.selection.n == a.q.n, "rows");
  WN_ASSERT(a.kv.n == rows->n_keys && a.kv.width == a.q.width, "kv is [%lld, %d]", (long long)a.kv.n, a.kv.width);
  WN_ASSERT(a.lse.width == a.q.heads, "lse has %d heads", a.lse.width);
  WN_ASSERT(params->v_width >= 1 && params->v_width <= a.q.width, "v_width %d of %d", params->v_width, a.q.width);
  WN_ASSERT(a.q.width <= 1152, "width %d; 1152 fit", a.q.width);
  a.scale = (float)params->scale;
  a.scale_log2 = (float)(params->scale * M_LOG2E);
  a.v_width = params->v_width;
  a.q_aligned = wn_gather_aligned(a.q);
  a.kv_aligned = wn_gather_aligned(a.kv);
  return a;
}

wn_status wn_cuda_attention_sparse_backward(wn_device *device, wn_tensor *dq, wn_tensor *dkv, wn_tensor *p,
                                            const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *kv,
                                            const wn_tensor *selection, const wn_tensor *lse, const wn_tensor *delta,
                                            const wn_rows *rows, const wn_attention_params *params) {
  backward_args a = checked(q, kv, selection, lse, rows, params);
  wn_view<float> sums = {};
  WN_ASSERT(!dq == !dkv && !dq == !d_o && !dq == !delta, "dq, dkv, d_o and delta come together");
  if (dq) {
    a.dq = wn_view_of<wn_bf16>(dq);
    a.d_o = wn_view_of<wn_bf16>(d_o);
    a.delta = wn_view_of<float>(delta);
    sums = wn_view_of<float>(dkv);
    WN_ASSERT(wn_tensor_same_shape(dq, q), "dq's shape");
    WN_ASSERT(d_o->rank == 3 && a.d_o.n == a.q.n && a.d_o.heads == a.q.heads && a.d_o.width == a.v_width, "d_o");
    WN_ASSERT(delta->rank == 2 && a.delta.n == a.q.n && a.delta.width == a.q.heads, "delta");
    WN_ASSERT(wn_tensor_same_shape(dkv, kv), "dkv's shape");
    a.d_o_aligned = wn_gather_aligned(a.d_o);
    a.dq_pairs = wn_pairs_aligned(a.dq);
  }
  if (p) {
    a.p = wn_view_of<float>(p);
    WN_ASSERT(wn_tensor_same_shape(p, selection), "p's shape");
  }
  if (a.q.n == 0 || a.q.heads == 0 || (!dq && !p)) return NULL;
  WN_TRY(wn_cuda_expect_picks(device, a.selection, a.kv.n));
  const size_t mark = wn_arena_mark(device->scratch);
  const size_t most = wn_cuda_of(device)->block_shared_bytes;
  const bool tall = a.q.heads > 16 && a.q.width <= 576 && lay_out<4>(NULL, 0, a.q.width, a.v_width).bytes <= most;
  launcher *one = launch<1, 18>;
  if (tall && a.v_width == WN_WIDE_VALUES && a.q.width == WN_WIDE_WIDTH)
    one = launch_wide;
  else if (tall)
    one = a.q.width <= 128 ? launch<4, 2> : launch<4, 9>;
  else if (a.q.width <= 576)
    one = a.q.width <= 128 ? launch<1, 2> : launch<1, 9>;
  WN_TRY(run(device, one, tall ? 64 : 16, &a, sums));
  wn_arena_release(device->scratch, mark);
  return NULL;
}
