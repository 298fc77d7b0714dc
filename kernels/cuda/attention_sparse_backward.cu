/* Absorbed attention over a selection, backward: one block per row and 64 (or 16) heads, as in the forward. For each
 * tile of 64 picks: four warps make s = q kv^T, four dp = d_o v^T; pairs swap halves, so that all make
 * p = exp(s - lse) and ds = p (dp - delta) scale; dq += ds kv stays in registers; the picks' gradients
 * ds^T q + p^T d_o, summed over the block's heads, leave for dkv while the next tile is gathered.
 *
 * Any row may pick any key, so dkv is summed in 32-bit integers, which no order can change: x is added as
 * round(scale[key] x), two columns in one 64-bit addition, scale[key] a power of two. What makes this exact enough:
 * 1. Pick counts of every key, and a launch over every 64th row that keeps the largest contribution to each key. From
 *    both an estimate of the sum of magnitudes, with headroom, hence scale[key].
 * 2. The launch over all rows. Beside the sums it keeps, per key and warp, the sum of each contribution's largest
 *    magnitude in units, which bounds every partial sum, and the largest contribution.
 * 3. Keys whose bound passed 2^31, or whose contributions were too few units, get the scale that the largest
 *    contribution times the count allows (it cannot overflow), zeroed sums, and a second launch, which skips tiles
 *    without such keys; where there are none its blocks return at once. Nobody asks the host.
 * 4. dkv += sums / scale.
 */
#include <math.h>

#include "kernels/cuda/attention_gather.cuh"
#include "kernels/cuda/operations.cuh"

typedef enum pass {
  ALL_ROWS,     /* dq, p, sums and bounds */
  SAMPLED_ROWS, /* every SAMPLE-th row, largest contributions only */
  AGAIN,        /* sums of the keys marked so */
  ONLY_P
} pass;

enum {
  SAMPLE = 64,
  SUM_BITS = 29,      /* bounds are scaled below 2^30: half of it is left for rounding */
  FEW_UNITS = 256,    /* a mean contribution below this many units is summed again if that helps */
  WORTH_IT = 4,       /* that is, if the scale rises by this factor */
  WELL_SAMPLED = 512, /* picks of a key from which the sample's largest is close to the largest */
  FINISH_THREADS = 256,
  UNSAMPLED_LOG2 = 5 /* headroom over the typical key's largest, for keys that the sample missed */
};

/* What is kept for each key beside its sums. All of it begins as zeros. */
typedef struct key_state {
  int32_t *count;            /* rows that picked it */
  uint32_t *sampled, *most;  /* bits of the largest |contribution|, in the sample and in all rows */
  unsigned long long *bound; /* [m][8 warps]: sum of the largest |contribution| of the warp's columns, in units */
  float *scale;              /* units per 1 */
  uint32_t *again;           /* 1: summed again */
  uint32_t *global;          /* of all keys: see GLOBAL_* */
  int32_t *sums;             /* [m][pitch] */
  int32_t pitch;
} key_state;

enum { GLOBAL_MOST, GLOBAL_EXPONENTS, GLOBAL_SAMPLED, GLOBAL_AGAIN, N_GLOBAL };

typedef struct backward_args {
  wn_view<wn_bf16> q, kv, d_o, dq;
  wn_view<float> lse, delta, p; /* p.data NULL: not wanted. With groups > 1 it is the partial means, below */
  float *p_partial;             /* [groups][n][k] where groups > 1 */
  wn_view<int32_t> selection;
  key_state keys;
  float scale, scale_log2;
  int32_t v_width, groups;
  pass what;
  bool q_aligned, kv_aligned, d_o_aligned, dq_pairs;
} backward_args;

/* Keys that were summed twice since the program began: for tests, which have to see that it happened. */
__device__ static unsigned long long summed_again;

template <int MT> struct backward_layout {
  uint32_t q, d_o, kv, p, ds, bytes;
  float *lse, *delta; /* [HEADS], lse in log2 units */
  float *p_sum;       /* [WM][64 keys] */
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
  at += S::WM * WN_SPARSE_KEYS * 4;
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
  wn_pair_sync(1 + block, 64);
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
  wn_pair_sync(1 + block, 64); /* both have read: p and ds may be written there */
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

__device__ __forceinline__ static uint32_t magnitude_bits(float x) {
  return __float_as_uint(x) & 0x7fffffffu;
}

/* Both columns in one addition: the sum of such words is the sum of the low columns plus 2^32 times that of the high
 * ones, and comes apart again exactly while each fits 32 bits. */
__device__ __forceinline__ static void add_pair(int32_t *at, int32_t low, int32_t high) {
  const unsigned long long both = ((unsigned long long)(uint32_t)high << 32) + (unsigned long long)(long long)low;
  atomicAdd((unsigned long long *)at, both);
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
            most[mi][e] = max(most[mi][e], max(magnitude_bits(x), magnitude_bits(y)));
            if (a.what == SAMPLED_ROWS || scale[mi][e] == 0) continue;
            add_pair(a.keys.sums + (int64_t)key[mi][e] * a.keys.pitch + column, __float2int_rn(x * scale[mi][e]),
                     __float2int_rn(y * scale[mi][e]));
          }
    }
#pragma unroll
    for (int mi = 0; mi < 2; mi++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        uint32_t top = most[mi][e];
        top = max(top, __shfl_xor_sync(0xffffffffu, top, 1));
        top = max(top, __shfl_xor_sync(0xffffffffu, top, 2));
        if ((lane & 3) != 0 || top == 0 || key[mi][e] < 0 || a.what == AGAIN) continue;
        if (a.what == SAMPLED_ROWS) {
          atomicMax(a.keys.sampled + key[mi][e], top);
          atomicMax(a.keys.global + GLOBAL_MOST, top);
          continue;
        }
        atomicMax(a.keys.most + key[mi][e], top);
        atomicAdd(a.keys.bound + (int64_t)key[mi][e] * WN_SPARSE_WARPS + warp,
                  (unsigned long long)__float2uint_ru(__uint_as_float(top) * scale[mi][e]));
      }
  }
}

/* The head means of this tile's p, of all heads or of this group's. */
template <int MT>
__device__ static void store_p(const backward_args &a, const backward_layout<MT> &l, int64_t row, int group, int t) {
  const int j = t * WN_SPARSE_KEYS + threadIdx.x;
  if (threadIdx.x >= WN_SPARSE_KEYS || j >= a.selection.width) return;
  float sum = 0;
  for (int wm = 0; wm < wn_split<MT>::WM; wm++) sum += l.p_sum[wm * WN_SPARSE_KEYS + threadIdx.x];
  if (a.groups > 1)
    a.p_partial[((int64_t)group * a.selection.n + row) * a.selection.width + j] = sum;
  else
    a.p.data[row * a.p.row + j] = sum / (float)a.q.heads;
}

template <int MT> __device__ static void clear_p(const backward_args &a, int64_t row, int group, int from) {
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
  l.lse[threadIdx.x] = there ? a.lse.data[row * a.lse.row + head] * 1.44269504088896340736f : INFINITY;
  l.delta[threadIdx.x] = there && a.what != ONLY_P ? a.delta.data[row * a.delta.row + head] : 0;
}

/* This tile's keys and scales to shared memory, by the threads that gather its rows; in a launch AGAIN, whether any of
 * its keys is marked. */
template <int MT>
__device__ static bool publish_keys(const backward_args &a, const backward_layout<MT> &l, const int32_t key[2]) {
  bool wanted = a.what != AGAIN;
  if ((threadIdx.x & 7) == 0)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int j = (threadIdx.x >> 3) + 32 * r;
      float scale = 0;
      if (key[r] >= 0 && (a.what == ALL_ROWS || (a.what == AGAIN && a.keys.again[key[r]]))) {
        scale = a.keys.scale[key[r]];
        wanted = true;
      }
      l.key[j] = key[r];
      l.scale[j] = scale;
    }
  return wanted;
}

template <int MT, int NT>
__global__ __launch_bounds__(WN_SPARSE_THREADS, 1) static void backward_kernel(const backward_args a) {
  typedef wn_split<MT> S;
  extern __shared__ __align__(1024) char memory[];
  if (a.what == AGAIN && a.keys.global[GLOBAL_AGAIN] == 0) return;
  const backward_layout<MT> l = lay_out<MT>(memory, wn_shared_address(memory), a.kv.width, a.v_width);
  const int64_t row = (int64_t)(blockIdx.x / a.groups) * (a.what == SAMPLED_ROWS ? SAMPLE : 1);
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
    const bool mine = publish_keys<MT>(a, l, key);
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
      if (a.p.data && (a.what == ALL_ROWS || a.what == ONLY_P)) store_p<MT>(a, l, row, group, t);
      if (a.what == ALL_ROWS) wn_multiply_columns<MT, NT>(dq, l.ds, l.kv, warp, a.kv.width);
    }
    __syncthreads(); /* the tile has served */
    if (t + 1 < tiles) wn_gather(l.kv, a.kv, key, a.kv_aligned);
    wn_cp_async_commit();
    if (wanted && a.what != ONLY_P) scatter<MT, NT>(a, l, warp);
    __syncthreads(); /* p, ds and the keys have served */
  }
  if (a.p.data && (a.what == ALL_ROWS || a.what == ONLY_P)) clear_p<MT>(a, row, group, tiles * WN_SPARSE_KEYS);
  if (a.what == ALL_ROWS) store_dq<MT, NT>(a, dq, row, first_head, warp);
}

/* ---- scales ---- */

__global__ static void count_kernel(wn_view<int32_t> selection, int32_t *count) {
  const int64_t all = selection.n * selection.width, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const int32_t key = selection.data[i / selection.width * selection.row + i % selection.width];
    if (key >= 0) atomicAdd(count + key, 1);
  }
}

__device__ static bool finite_bits(uint32_t magnitude) {
  return magnitude < 0x7f800000u;
}

/* The largest power of two that keeps a sum of magnitudes below 2^(SUM_BITS + 1) units. */
__device__ static float scale_for(double sum) {
  const int most = 120; /* the scale and its inverse stay normal numbers */
  if (!(sum > 0)) return 1;
  const int e = isfinite(sum) ? SUM_BITS - ilogb(sum) : -most;
  return (float)ldexp(1.0, min(max(e, -most), most));
}

/* Sum of the exponents of what the sample saw, over keys: which order they come in does not matter. */
enum { EXPONENT_OFFSET = 256 };
__global__ static void exponents_kernel(key_state keys, int64_t m) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t bits = i < m ? keys.sampled[i] : 0;
  const bool counts = bits != 0 && finite_bits(bits);
  const unsigned exponent = counts ? (unsigned)(ilogbf(__uint_as_float(bits)) + EXPONENT_OFFSET) : 0;
  const unsigned sum = __reduce_add_sync(0xffffffffu, exponent), n = __reduce_add_sync(0xffffffffu, counts);
  if ((threadIdx.x & 31) != 0 || n == 0) return;
  atomicAdd(keys.global + GLOBAL_EXPONENTS, sum);
  atomicAdd(keys.global + GLOBAL_SAMPLED, n);
}

/* The first scale: twice what the contributions would sum to, were each the largest that may be expected. */
__global__ static void scale_kernel(key_state keys, int64_t m, int groups) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= m) return;
  const double most = __uint_as_float(keys.global[GLOBAL_MOST]), own = __uint_as_float(keys.sampled[i]);
  const int sampled = (int)keys.global[GLOBAL_SAMPLED];
  double each = own * (keys.count[i] >= WELL_SAMPLED ? 4 : 16);
  if (own == 0 && sampled)
    each = ldexp(1.0, (int)(keys.global[GLOBAL_EXPONENTS] / sampled) - EXPONENT_OFFSET + UNSAMPLED_LOG2);
  keys.scale[i] = scale_for(2.0 * keys.count[i] * groups * fmin(each, most));
}

/* One warp per key: is its sum sound? */
__global__ static void review_kernel(key_state keys, int64_t m, int groups) {
  const int64_t i = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (i >= m || keys.most[i] == 0 || !finite_bits(keys.most[i])) return;
  unsigned long long bound = lane < WN_SPARSE_WARPS ? keys.bound[i * WN_SPARSE_WARPS + lane] : 0;
  for (int d = WN_SPARSE_WARPS / 2; d > 0; d /= 2) bound = max(bound, __shfl_xor_sync(0xffffffffu, bound, d));
  bound = __shfl_sync(0xffffffffu, bound, 0);
  const unsigned long long contributions = (unsigned long long)keys.count[i] * groups;
  const float better = scale_for((double)contributions * __uint_as_float(keys.most[i]));
  const bool over = bound >> 31 != 0, coarse = bound < contributions * FEW_UNITS;
  if (!over && !(coarse && better >= WORTH_IT * keys.scale[i])) return;
  for (int c = lane; c < keys.pitch; c += 32) keys.sums[i * keys.pitch + c] = 0;
  __syncwarp();
  if (lane != 0) return;
  keys.scale[i] = better;
  keys.again[i] = 1;
  atomicMax(keys.global + GLOBAL_AGAIN, 1u);
  atomicAdd(&summed_again, 1ull);
}

/* dkv += sums / scale, two columns a thread. What was not finite becomes NaN. */
__global__ static void finish_kernel(wn_view<float> dkv, key_state keys) {
  const int pairs = keys.pitch / 2;
  const int64_t all = dkv.n * pairs, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const int64_t key = i / pairs;
    const int column = (int)(i % pairs) * 2;
    const uint32_t most = keys.most[key];
    if (most == 0 || column >= dkv.width) continue;
    const unsigned long long both = *(const unsigned long long *)(keys.sums + key * keys.pitch + column);
    const int32_t low = (int32_t)(uint32_t)both;
    const int32_t high = (int32_t)(uint32_t)((both - (unsigned long long)(long long)low) >> 32);
    const float unit = finite_bits(most) ? 1 / keys.scale[key] : NAN;
    float *out = dkv.data + key * dkv.row + column;
    out[0] += (float)low * unit;
    if (column + 1 < dkv.width) out[1] += (float)high * unit;
  }
}

__global__ static void fold_p_kernel(wn_view<float> p, const float *partial, int groups, float heads) {
  const int64_t all = p.n * p.width, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    float sum = 0;
    for (int g = 0; g < groups; g++) sum += partial[g * all + i];
    p.data[i / p.width * p.row + i % p.width] = sum / heads;
  }
}

/* ---- host ---- */

static unsigned blocks_for(int64_t items, int64_t most) {
  const int64_t blocks = wn_ceil_div(items, FINISH_THREADS);
  return (unsigned)(blocks < 1 ? 1 : blocks < most ? blocks : most);
}

static wn_status make_keys(wn_device *device, key_state *keys, int64_t m, int32_t width) {
  keys->pitch = (int32_t)wn_ceil_div(width, 16) * 16;
  const int64_t sums = m * keys->pitch * 4, bound = m * WN_SPARSE_WARPS * 8;
  const int64_t zeroed = sums + bound + 4 * m * 4 + N_GLOBAL * 4;
  void *memory;
  WN_TRY(wn_cuda_scratch(device, &memory, "dkv sums", zeroed + m * 4));
  WN_CUDA_TRY(cudaMemsetAsync(memory, 0, (size_t)zeroed, wn_cuda_stream(device)));
  char *at = (char *)memory;
  keys->sums = (int32_t *)at;
  keys->bound = (unsigned long long *)(at += sums);
  keys->count = (int32_t *)(at += bound);
  keys->sampled = (uint32_t *)(at += m * 4);
  keys->most = (uint32_t *)(at += m * 4);
  keys->again = (uint32_t *)(at += m * 4);
  keys->global = (uint32_t *)(at += m * 4);
  keys->scale = (float *)(at += N_GLOBAL * 4);
  return NULL;
}

template <int MT, int NT> static wn_status launch(wn_device *device, backward_args *a, pass what) {
  const size_t bytes = lay_out<MT>(NULL, 0, a->kv.width, a->v_width).bytes,
               most = wn_cuda_of(device)->block_shared_bytes;
  WN_ASSERT(bytes <= most, "sparse attention of width %d takes %zu bytes of shared memory, a block has %zu",
            a->kv.width, bytes, most);
  const int64_t rows = what == SAMPLED_ROWS ? wn_ceil_div(a->q.n, SAMPLE) : a->q.n;
  a->what = what;
  WN_CUDA_TRY(cudaFuncSetAttribute(backward_kernel<MT, NT>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  backward_kernel<MT, NT><<<(unsigned)(rows * a->groups), WN_SPARSE_THREADS, bytes, wn_cuda_stream(device)>>>(*a);
  WN_CUDA_LAUNCHED("attention_sparse_backward");
  return NULL;
}

/* All launches of one call, heads taken 16 MT at a time. */
template <int MT, int NT> static wn_status run(wn_device *device, backward_args *a, wn_view<float> dkv) {
  cudaStream_t stream = wn_cuda_stream(device);
  const int64_t m = a->kv.n, many = (int64_t)wn_cuda_of(device)->n_sms * 16;
  a->groups = (int32_t)wn_ceil_div(a->q.heads, wn_split<MT>::HEADS);
  if (a->groups > 1 && a->p.data)
    WN_TRY(wn_cuda_scratch(device, (void **)&a->p_partial, "p of head groups",
                           a->selection.n * a->selection.width * a->groups * 4));
  if (!dkv.data) {
    WN_TRY((launch<MT, NT>(device, a, ONLY_P)));
  } else {
    key_state *keys = &a->keys;
    WN_TRY(make_keys(device, keys, m, a->kv.width));
    count_kernel<<<blocks_for(a->selection.n * a->selection.width, many), FINISH_THREADS, 0, stream>>>(a->selection,
                                                                                                       keys->count);
    WN_CUDA_LAUNCHED("attention_sparse_backward's counts");
    WN_TRY((launch<MT, NT>(device, a, SAMPLED_ROWS)));
    exponents_kernel<<<blocks_for(m, INT32_MAX), FINISH_THREADS, 0, stream>>>(*keys, m);
    scale_kernel<<<blocks_for(m, INT32_MAX), FINISH_THREADS, 0, stream>>>(*keys, m, a->groups);
    WN_CUDA_LAUNCHED("attention_sparse_backward's scales");
    WN_TRY((launch<MT, NT>(device, a, ALL_ROWS)));
    review_kernel<<<blocks_for(m * 32, INT32_MAX), FINISH_THREADS, 0, stream>>>(*keys, m, a->groups);
    WN_CUDA_LAUNCHED("attention_sparse_backward's review");
    WN_TRY((launch<MT, NT>(device, a, AGAIN)));
    finish_kernel<<<blocks_for(m * keys->pitch / 2, many), FINISH_THREADS, 0, stream>>>(dkv, *keys);
    WN_CUDA_LAUNCHED("attention_sparse_backward's sums");
  }
  if (a->groups == 1 || !a->p.data) return NULL;
  fold_p_kernel<<<blocks_for(a->p.n * a->p.width, many), FINISH_THREADS, 0, stream>>>(a->p, a->p_partial, a->groups,
                                                                                      (float)a->q.heads);
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
  const size_t mark = wn_arena_mark(device->scratch);
  const size_t most = wn_cuda_of(device)->block_shared_bytes;
  const bool tall = a.q.heads > 16 && a.q.width <= 576 && lay_out<4>(NULL, 0, a.q.width, a.v_width).bytes <= most;
  if (tall && a.q.width <= 128)
    WN_TRY((run<4, 2>(device, &a, sums)));
  else if (tall)
    WN_TRY((run<4, 9>(device, &a, sums)));
  else if (a.q.width <= 128)
    WN_TRY((run<1, 2>(device, &a, sums)));
  else if (a.q.width <= 576)
    WN_TRY((run<1, 9>(device, &a, sums)));
  else
    WN_TRY((run<1, 18>(device, &a, sums)));
  wn_arena_release(device->scratch, mark);
  return NULL;
}

extern "C" int64_t wn_cuda_sparse_summed_again(wn_device *device) {
  unsigned long long n = 0;
  cudaStream_t stream = wn_cuda_stream(device);
  if (cudaMemcpyFromSymbolAsync(&n, summed_again, sizeof n, 0, cudaMemcpyDeviceToHost, stream) != cudaSuccess)
    return -1;
  return cudaStreamSynchronize(stream) == cudaSuccess ? (int64_t)n : -1;
}
