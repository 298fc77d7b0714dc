/* Absorbed sparse attention of 512 + 64 columns and many heads, forward: attention_sparse.cu's by warpgroups. A block
 * has one row and 64 heads.
 *
 * Tiles of 64 picks go in pairs. A third warpgroup gathers them, each tile as soon as its shared memory is free.
 * Warpgroup 0 makes the logits of a pair's first tile, warpgroup 1 those of its second: 64 x 64 products, whose
 * operands shared memory can just about deliver. Both own half of o's columns for all heads, so each multiplies both
 * tiles' p: its own from registers, the other's from shared memory. The running maximum goes from warpgroup 0 to
 * warpgroup 1 and back, so that one takes exponentials while the other multiplies.
 *
 * The last 64 columns of q stay in registers, and their place in shared memory takes the first tile's p. */
#include "kernels/cuda/attention_gather.cuh"
#include "kernels/cuda/attention_sparse.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/reduce.cuh"

#include <math.h>

enum {
  GROUPS = 2, /* warpgroups that multiply */
  THREADS = (GROUPS + 1) * 128,
  PRODUCER_REGISTERS = 40,
  CONSUMER_REGISTERS = 232,
  VALUE_PANELS = WN_WIDE_VALUES / WN_PANEL_COLUMNS,
  PANELS = WN_WIDE_WIDTH / WN_PANEL_COLUMNS,
  TILE_BYTES = PANELS * WN_WIDE_PANEL_BYTES,
  ROW_STEP = 16 * WN_PANEL_ROW_BYTES,
  NT = 32,       /* n-tiles of o that a warpgroup owns */
  CONSUMERS = 1, /* the named barrier of those that multiply */
  CONSUMER_WARPS = 8,
  GROUP_WARPS = 4
};

typedef struct layout {
  uint32_t q, kv, p, barriers;
  float *top;  /* [2][64 heads]: the running maximum after a pair's first, and second, tile */
  float *part; /* [2][64 heads] */
  int *count;
  uint32_t bytes;
} layout;

__host__ __device__ static layout lay_out(char *memory, uint32_t base) {
  layout l;
  uint32_t at = 0;
  l.q = base + at;
  at += TILE_BYTES;
  l.kv = base + at;
  at += 2 * TILE_BYTES;
  l.p = base + at;
  at += WN_WIDE_PANEL_BYTES;
  l.barriers = base + at;
  at += 2 * 4 * 8;
  l.top = (float *)(memory + at);
  at += 2 * WN_WIDE_HEADS * 4;
  l.part = (float *)(memory + at);
  at += 2 * WN_WIDE_HEADS * 4;
  l.count = (int *)(memory + at);
  l.bytes = at + 16;
  return l;
}

/* Of tile i of a pair: its keys, its p (the first one's where q's last panel was), its barriers. */
__device__ __forceinline__ static uint32_t keys_of(const layout &l, int i) {
  return l.kv + (uint32_t)(i * TILE_BYTES);
}
__device__ __forceinline__ static uint32_t p_of(const layout &l, int i) {
  return i ? l.p : l.q + VALUE_PANELS * WN_WIDE_PANEL_BYTES;
}
enum { KV_FULL, KV_FREE, P_FULL, P_FREE };
__device__ __forceinline__ static uint32_t barrier_of(const layout &l, int what, int i) {
  return l.barriers + (uint32_t)(i * 32 + what * 8);
}

/* ---- gathering ---- */

/* This thread's four rows of a tile are threadIdx.x / 8 and 16, 32, 48 more, of the warpgroup's 128 threads. */
typedef struct own_picks {
  int32_t key[4];
} own_picks;

__device__ __forceinline__ static own_picks read_picks(const int32_t *pick, int t, int count) {
  own_picks own;
#pragma unroll
  for (int r = 0; r < 4; r++) {
    const int j = t * WN_SPARSE_KEYS + (((int)threadIdx.x & 127) >> 3) + 16 * r;
    own.key[r] = j < count ? pick[j] : -1;
  }
  return own;
}

__device__ static void produce(const wn_sparse_forward &a, const layout &l, const int32_t *pick, int tiles, int count) {
  const int eighth = threadIdx.x & 7, first = ((int)threadIdx.x & 127) >> 3;
  own_picks own = read_picks(pick, 0, count);
  for (int t = 0; t < tiles; t++) {
    const int stage = t & 1;
    const own_picks now = own;
    own = read_picks(pick, t + 1, count);
    wn_mbarrier_wait(barrier_of(l, KV_FREE, stage), (uint32_t)(~(t >> 1) & 1));
#pragma unroll
    for (int r = 0; r < 4; r++) {
      const bool there = now.key[r] >= 0;
      const wn_bf16 *from = a.kv.data + (there ? now.key[r] * a.kv.row : 0) + eighth * WN_PIECE_COLUMNS;
      const uint32_t to = keys_of(l, stage) + wn_tile_at(WN_SPARSE_KEYS, first + 16 * r, eighth);
#pragma unroll
      for (int panel = 0; panel < PANELS; panel++)
        wn_cp_async_16(to + panel * WN_WIDE_PANEL_BYTES, from + panel * WN_PANEL_COLUMNS, there ? 16 : 0);
    }
    wn_mbarrier_arrive_after_copies(barrier_of(l, KV_FULL, stage));
  }
  wn_cp_async_commit();
  wn_cp_async_wait<0>();
}

/* ---- multiplying ---- */

/* A thread's two heads are, of its warp's 16, lane / 4 and that plus 8. */
typedef struct running {
  float top[2]; /* log2 units */
  /* of this warpgroup's tiles only: of p, for lse; of p as BF16, for o */
  float sum[2], sum_bf16[2];
} running;

/* A warp's lane, once all have come here: for what products of the warp have read. */
__device__ __forceinline__ static void arrive_once(uint32_t barrier) {
  __syncwarp();
  if ((threadIdx.x & 31) == 0) wn_mbarrier_arrive(barrier);
}

__device__ __forceinline__ static void load_rope(uint32_t (&rope)[4][4], uint32_t q, int warp) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int i = 0; i < 4; i++)
    wn_ldmatrix_x4(rope[i],
                   q + wn_tile_at(WN_WIDE_HEADS, warp * 16 + (lane & 15), VALUE_PANELS * 8 + 2 * i + (lane >> 4)));
}

/* s = q kv^T of one tile. */
__device__ __forceinline__ static void logits(float (&s)[8][4], const uint32_t (&rope)[4][4], uint32_t q, uint32_t kv) {
  wn_wgmma_settle(s);
  wn_wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4 * VALUE_PANELS; step++) {
    const uint32_t at = (uint32_t)((step >> 2) * WN_WIDE_PANEL_BYTES + (step & 3) * 32);
    wn_wgmma<WN_ALONG, WN_ALONG>(s, wn_wgmma_operand_anew(q + at, 0), wn_wgmma_operand_anew(kv + at, 0), step > 0);
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
    wn_wgmma_registers_along(s, rope[i],
                             wn_wgmma_operand_anew(kv + VALUE_PANELS * WN_WIDE_PANEL_BYTES + (uint32_t)(i * 32), 0));
  wn_wgmma_commit();
  wn_wgmma_wait<0>();
  wn_wgmma_settle(s);
}

/* Logits become p in BF16, packed as the first operand of four products; the maximum is that of `before` and the tile.
 * `left`: picks from the tile's first on. */
__device__ __forceinline__ static void exponentials(running &r, uint32_t (&p)[4][4], float (&s)[8][4],
                                                    const float before[2], float scale_log2, int left) {
  const int lane = threadIdx.x & 31, first = 2 * (lane & 3);
#pragma unroll
  for (int e = 0; e < 2; e++) {
    float top = -INFINITY;
#pragma unroll
    for (int t = 0; t < 8; t++)
#pragma unroll
      for (int x = 0; x < 2; x++) {
        float &logit = s[t][2 * e + x];
        logit = first + 8 * t + x < left ? logit * scale_log2 : -INFINITY;
        top = fmaxf(top, logit);
      }
    top = fmaxf(before[e], wn_quad_max(top));
    const float alpha = wn_exp2(r.top[e] - top);
    float sum = 0, sum_bf16 = 0;
#pragma unroll
    for (int t = 0; t < 8; t++) {
      const float x = wn_exp2(s[t][2 * e] - top), y = wn_exp2(s[t][2 * e + 1] - top);
      const uint32_t xy = wn_pack_bf16(x, y);
      sum += x + y;
      sum_bf16 += __uint_as_float(xy << 16) + __uint_as_float(xy & 0xffff0000u);
      p[t / 2][t % 2 * 2 + e] = xy;
    }
    r.sum[e] = r.sum[e] * alpha + sum;
    r.sum_bf16[e] = r.sum_bf16[e] * alpha + sum_bf16;
    r.top[e] = top;
  }
}

/* p and its maximum for the other warpgroup. */
__device__ __forceinline__ static void give(const running &r, const uint32_t (&p)[4][4], uint32_t to, float *top,
                                            int warp) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int head = warp * 16 + (lane >> 2) + 8 * e;
#pragma unroll
    for (int t = 0; t < 8; t++)
      wn_store_shared_4(to + wn_tile_at(WN_WIDE_HEADS, head, t) + 4 * (lane & 3), p[t / 2][t % 2 * 2 + e]);
    if ((lane & 3) == 0) top[head] = r.top[e];
  }
  wn_publish_shared();
}

__device__ __forceinline__ static void read_tops(float top[2], const float *from, int warp) {
  const int head = warp * 16 + ((threadIdx.x & 31) >> 2);
  top[0] = from[head];
  top[1] = from[head + 8];
}

/* o from one maximum to a later one. */
__device__ __forceinline__ static void rescale(float (&o)[NT][4], const float from[2], const float to[2]) {
  const float alpha[2] = {wn_exp2(from[0] - to[0]), wn_exp2(from[1] - to[1])};
  if (__all_sync(0xffffffffu, alpha[0] == 1 && alpha[1] == 1)) return;
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int x = 0; x < 4; x++) o[j][x] *= alpha[x >> 1];
}

/* The sums of a warpgroup's earlier tiles, to a later maximum. */
__device__ __forceinline__ static void follow(running &r, const float top[2]) {
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const float alpha = wn_exp2(r.top[e] - top[e]);
    r.sum[e] *= alpha;
    r.sum_bf16[e] *= alpha;
    r.top[e] = top[e];
  }
}

/* o += p v of the group's 256 columns; p in registers, or in shared memory. The products go on after the call. */
__device__ __forceinline__ static void add_values(float (&o)[NT][4], const uint32_t (&p)[4][4], uint32_t v) {
  wn_wgmma_settle(o);
  wn_wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++)
    wn_wgmma_registers(o, p[step], wn_wgmma_operand_anew(v + step * ROW_STEP, WN_WIDE_PANEL_BYTES));
  wn_wgmma_commit();
}
__device__ __forceinline__ static void add_values(float (&o)[NT][4], uint32_t p, uint32_t v) {
  wn_wgmma_settle(o);
  wn_wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; step++)
    wn_wgmma<WN_ALONG, WN_ACROSS>(o, wn_wgmma_operand_anew(p + step * 32, 0),
                                  wn_wgmma_operand_anew(v + step * ROW_STEP, WN_WIDE_PANEL_BYTES), true);
  wn_wgmma_commit();
}

/* Warpgroup 0: the first tile of each pair. */
__device__ static void first_tiles(const wn_sparse_forward &a, const layout &l, float (&o)[NT][4], running &r,
                                   const uint32_t (&rope)[4][4], int tiles, int count, int warp) {
  for (int pair = 0; pair < tiles / 2; pair++) {
    const uint32_t parity = (uint32_t)(pair & 1);
    const float before[2] = {r.top[0], r.top[1]};
    float s[8][4], later[2];
    uint32_t p[4][4];
    wn_mbarrier_wait(barrier_of(l, KV_FULL, 0), parity);
    wn_publish_shared();
    logits(s, rope, l.q, keys_of(l, 0));
    exponentials(r, p, s, before, a.scale_log2, count - 2 * pair * WN_SPARSE_KEYS);
    wn_mbarrier_wait(barrier_of(l, P_FREE, 0), parity ^ 1);
    give(r, p, p_of(l, 0), l.top, warp);
    wn_mbarrier_arrive(barrier_of(l, P_FULL, 0));
    rescale(o, before, r.top);
    add_values(o, p, keys_of(l, 0));
    wn_wgmma_wait<0>();
    wn_wgmma_settle(o);
    arrive_once(barrier_of(l, KV_FREE, 0));
    wn_mbarrier_wait(barrier_of(l, P_FULL, 1), parity);
    read_tops(later, l.top + WN_WIDE_HEADS, warp);
    rescale(o, r.top, later);
    follow(r, later);
    add_values(o, p_of(l, 1), keys_of(l, 1));
    wn_wgmma_wait<0>();
    wn_wgmma_settle(o);
    arrive_once(barrier_of(l, KV_FREE, 1));
    wn_mbarrier_arrive(barrier_of(l, P_FREE, 1));
  }
}

/* Warpgroup 1: the second tile, while the first one's values are added. */
__device__ static void second_tiles(const wn_sparse_forward &a, const layout &l, float (&o)[NT][4], running &r,
                                    const uint32_t (&rope)[4][4], int tiles, int count, int warp) {
  const uint32_t half = 4 * WN_WIDE_PANEL_BYTES; /* this group's columns */
  for (int pair = 0; pair < tiles / 2; pair++) {
    const uint32_t parity = (uint32_t)(pair & 1);
    float s[8][4], before[2];
    uint32_t p[4][4];
    wn_mbarrier_wait(barrier_of(l, KV_FULL, 1), parity);
    wn_publish_shared();
    logits(s, rope, l.q, keys_of(l, 1));
    wn_mbarrier_wait(barrier_of(l, P_FULL, 0), parity);
    read_tops(before, l.top, warp);
    rescale(o, r.top, before);
    wn_mbarrier_wait(barrier_of(l, KV_FULL, 0), parity);
    wn_publish_shared();
    add_values(o, p_of(l, 0), keys_of(l, 0) + half);
    exponentials(r, p, s, before, a.scale_log2, count - (2 * pair + 1) * WN_SPARSE_KEYS);
    wn_mbarrier_wait(barrier_of(l, P_FREE, 1), parity ^ 1);
    give(r, p, p_of(l, 1), l.top + WN_WIDE_HEADS, warp);
    wn_mbarrier_arrive(barrier_of(l, P_FULL, 1));
    wn_wgmma_wait<0>();
    wn_wgmma_settle(o);
    arrive_once(barrier_of(l, KV_FREE, 0));
    wn_mbarrier_arrive(barrier_of(l, P_FREE, 0));
    rescale(o, before, r.top);
    add_values(o, p, keys_of(l, 1) + half);
    wn_wgmma_wait<0>();
    wn_wgmma_settle(o);
    arrive_once(barrier_of(l, KV_FREE, 1));
  }
}

/* Both groups' part of a sum of each head to all: through part[2][64]. Begins and ends so that part may be written. */
__device__ static void sum_groups(float x[2], float *part, int group, int warp) {
  const int lane = threadIdx.x & 31, head = warp * 16 + (lane >> 2);
  wn_named_sync(CONSUMERS, GROUPS * 128);
#pragma unroll
  for (int e = 0; e < 2; e++) {
    x[e] = wn_quad_sum(x[e]);
    if ((lane & 3) == 0) part[group * WN_WIDE_HEADS + head + 8 * e] = x[e];
  }
  wn_named_sync(CONSUMERS, GROUPS * 128);
#pragma unroll
  for (int e = 0; e < 2; e++) x[e] = part[head + 8 * e] + part[WN_WIDE_HEADS + head + 8 * e];
}

__device__ static void store(const wn_sparse_forward &a, const float (&o)[NT][4], running &r, float *part, int64_t row,
                             int first_head, int group, int warp) {
  const int lane = threadIdx.x & 31;
  float dot[2] = {};
  sum_groups(r.sum, part, group, warp);
  sum_groups(r.sum_bf16, part, group, warp);
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int head = first_head + warp * 16 + (lane >> 2) + 8 * e;
    if (head >= a.q.heads) continue;
    const float sum = r.sum[e], inverse = r.sum_bf16[e] != 0 ? 1 / r.sum_bf16[e] : 0;
    if (group == 0 && (lane & 3) == 0)
      a.lse.data[row * a.lse.row + head] = sum > 0 ? (r.top[e] + log2f(sum)) * 0.693147180559945309f : sum + -INFINITY;
    wn_bf16 *out = a.o.data + row * a.o.row + head * a.o.head;
    const wn_bf16 *grad = a.d_o.data ? a.d_o.data + row * a.d_o.row + head * a.d_o.head : NULL;
#pragma unroll
    for (int j = 0; j < NT; j++) {
      const int column = group * (WN_WIDE_VALUES / 2) + j * 8 + 2 * (lane & 3);
      const float x = o[j][2 * e] * inverse, y = o[j][2 * e + 1] * inverse;
      wn_store_pair(out, column, WN_WIDE_VALUES, x, y, a.o_pairs);
      if (!grad) continue;
      const wn_two two = wn_load_pair(grad, column, a.d_o_pairs);
      dot[e] += x * two.x + y * two.y;
    }
  }
  if (!a.d_o.data) return;
  sum_groups(dot, part, group, warp);
#pragma unroll
  for (int e = 0; e < 2; e++) {
    const int head = first_head + warp * 16 + (lane >> 2) + 8 * e;
    if (group == 0 && (lane & 3) == 0 && head < a.q.heads) a.delta.data[row * a.delta.row + head] = dot[e];
  }
}

template <int GROUP>
__device__ static void consume(const wn_sparse_forward &a, const layout &l, int64_t row, int first_head, int tiles,
                               int count, int warp) {
  float o[NT][4] = {};
  running r = {{-INFINITY, -INFINITY}, {0, 0}, {0, 0}};
  uint32_t rope[4][4];
  if (tiles) {
    load_rope(rope, l.q, warp);
    wn_named_sync(CONSUMERS, GROUPS * 128); /* q's last panel has served */
    if (GROUP == 0)
      first_tiles(a, l, o, r, rope, tiles, count, warp);
    else
      second_tiles(a, l, o, r, rope, tiles, count, warp);
  }
  store(a, o, r, l.part, row, first_head, GROUP, warp);
}

__global__ __launch_bounds__(THREADS, 1) static void forward_kernel(const wn_sparse_forward a) {
  extern __shared__ __align__(1024) char memory[];
  const layout l = lay_out(memory, wn_shared_address(memory));
  const int64_t row = blockIdx.x / a.groups;
  const int first_head = (int)(blockIdx.x % a.groups) * WN_WIDE_HEADS;
  const int of_block = wn_uniform(threadIdx.x >> 5), group = of_block >> 2, warp = of_block & 3;
  const int32_t *pick = a.selection.data + row * a.selection.row;
  if (threadIdx.x == 0) {
    *l.count = 0;
    for (int i = 0; i < 2; i++) {
      wn_mbarrier_init(barrier_of(l, KV_FULL, i), 128);
      wn_mbarrier_init(barrier_of(l, KV_FREE, i), CONSUMER_WARPS);
      wn_mbarrier_init(barrier_of(l, P_FULL, i), GROUP_WARPS * 32); /* each lane, for what it wrote or read */
      wn_mbarrier_init(barrier_of(l, P_FREE, i), GROUP_WARPS * 32);
    }
    wn_mbarrier_init_fence();
  }
  __syncthreads();
  const int count = wn_count_picks(l.count, pick, a.selection.width);
  /* whole pairs: a tile without picks is zeros */
  const int tiles = wn_uniform((count + 2 * WN_SPARSE_KEYS - 1) / (2 * WN_SPARSE_KEYS) * 2);
  if (tiles && threadIdx.x < WN_SPARSE_THREADS) {
    wn_load_heads<WN_WIDE_HEADS>(l.q, a.q, row, first_head, a.q_aligned);
    wn_cp_async_commit();
    wn_cp_async_wait<0>();
    wn_publish_shared();
  }
  if (group == GROUPS) {
    wn_registers_shrink<PRODUCER_REGISTERS>();
    produce(a, l, pick, tiles, count);
  } else {
    wn_registers_grow<CONSUMER_REGISTERS>();
    wn_named_sync(CONSUMERS, GROUPS * 128); /* q is there */
    if (group == 0)
      consume<0>(a, l, row, first_head, tiles, count, warp);
    else
      consume<1>(a, l, row, first_head, tiles, count, warp);
  }
}

wn_status wn_sparse_forward_wide(wn_device *device, wn_sparse_forward a) {
  const size_t bytes = lay_out(NULL, 0).bytes;
  WN_ASSERT(bytes <= wn_cuda_of(device)->block_shared_bytes, "%zu bytes of shared memory", bytes);
  a.groups = (int32_t)wn_ceil_div(a.q.heads, WN_WIDE_HEADS);
  WN_CUDA_TRY(cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  forward_kernel<<<(unsigned)(a.q.n * a.groups), THREADS, bytes, wn_cuda_stream(device)>>>(a);
  WN_CUDA_LAUNCHED("attention_sparse");
  return NULL;
}
