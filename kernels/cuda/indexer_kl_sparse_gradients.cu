/* The gradients of the sparse KL, from the sign bits and g (indexer_kl_sparse.cu has the whole idea): two kinds of
 * blocks in one launch, and the scatter's scales, sums and end. */
#include <math.h>

#include "kernels/cuda/indexer_kl_sparse.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/tile_copy.cuh"
#include "kernels/cuda/reduce.cuh"

enum {
  WARP = 32,
  WARPS = WN_SPARSE_KL_WARPS,
  THREADS = WARPS * WARP,
  FLAT_THREADS = 256, /* of the kernels without rows */
  HEADS = WN_SPARSE_KL_HEADS,
  WIDTH = WN_SPARSE_KL_WIDTH,
  TILE = WN_SPARSE_KL_TILE,
  SLICE = WIDTH / WARPS, /* columns of a warp */
  SLICE_BYTES = TILE * SLICE * 2,
  QUERY_STAGES = 6,
  QUERY_STAGE_BYTES = SLICE_BYTES + WARP * 4 + TILE * 4 + 64,
  QUERY_BYTES = WARPS * QUERY_STAGES * QUERY_STAGE_BYTES,
  SUM_KEYS = 2 * TILE,       /* of a step of the scatter */
  SUM_ROW = (WIDTH + 8) * 4, /* bytes; the padding keeps rows apart in the banks */
  SUM_BYTES = SUM_KEYS * SUM_ROW,
  RING = 4, /* steps that are known of at a time */
  SHARED_BYTES = QUERY_BYTES > 2 * SUM_BYTES ? QUERY_BYTES : 2 * SUM_BYTES,
  SUM_BITS = 30 /* of the magnitudes at a key's scale */
};
static_assert((int)SHARED_BYTES >= (int)WN_SPARSE_KL_Q_BYTES, "weighted queries pass through here too");
#define FULL_WARP 0xffffffffu

typedef wn_sparse_kl job;

/* The scale of each key's integers. Sums of magnitudes stay below 2^30 plus a half a contribution. */
__global__ static void scale_kernel(job j) {
  const int64_t key = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (key >= j.n_keys) return;
  const uint64_t bound = j.bound[key];
  const int32_t bits = 64 - __clzll((long long)bound); /* bound < 2^bits units */
  const int32_t exponent = SUM_BITS - bits + wn_sparse_unit_exponent(j.largest);
  j.key_scale[key] = bound >> 63 ? NAN : bound ? ldexpf(1, min(max(exponent, -126), 126)) : 1.0f;
}

/* ---- gradients ---- */

/* Pair i of a lane's bits as two BF16, 2 where set: 2 is a single bit. */
__device__ __forceinline__ uint32_t twos(uint32_t bits, int i) {
  return (i < 15 ? bits << (14 - i) : bits >> 1) & 0x40004000u;
}
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

/* Where chunk c of a slice's row of 64 bytes lies. */
__device__ __forceinline__ uint32_t slice_place(int32_t row, int32_t chunk) {
  return (uint32_t)(row * SLICE * 2 + ((chunk ^ (row >> 1 & 3)) << 4));
}

/* Of tile t, if the row has it: a warp's columns of its keys (`picks`: those of rows lane / 4 and 8 more), its turned
 * bits, its g. */
template <bool VECTORS>
__device__ __forceinline__ void gather_slice(const job &j, uint32_t stage, int64_t row, int32_t t,
                                             const int32_t picks[2]) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, column = (int32_t)threadIdx.x / WARP * SLICE + lane % 4 * 8;
  const int32_t first = __shfl_sync(FULL_WARP, picks[0], 0);
  if (first < 0) return;
  const bool there = column < j.k.width;
  const char *from = (const char *)(j.k.data + (there ? column : 0));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const uint32_t to = stage + slice_place(lane / 4 + 8 * i, lane % 4);
    const int32_t key = min(picks[i] < 0 ? first : picks[i], (int32_t)j.n_keys - 1);
    if (VECTORS)
      wn_cp_async_16(to, from + (int64_t)key * j.k_row_bytes, there ? 16 : 0);
    else
      wn_sparse_stage(to, j.k.data + key * j.k.row, column, j.k.width, false);
  }
  const uint32_t *bits = j.turned + (row * (j.pitch / TILE) + t) * WARP;
  const float *g = j.index + row * j.pitch + t * TILE;
  if (lane < 8) wn_cp_async_16(stage + SLICE_BYTES + lane * 16, bits + lane * 4, 16);
  if (lane >= 8 && lane < 12) wn_cp_async_16(stage + SLICE_BYTES + WARP * 4 + (lane - 8) * 16, g + (lane - 8) * 4, 16);
}

__device__ __forceinline__ void slice_picks(const job &j, int64_t row, int32_t t, int32_t n, int32_t picks[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int32_t at = t * TILE + (int32_t)threadIdx.x % WARP / 4 + 8 * i;
    picks[i] = at < n ? j.selection.data[row * j.selection.row + at] : -1;
  }
}

/* u[64 heads, the warp's 32 columns] += (g m)[64, 16 keys] k[16, 32]. g as two BF16: g sums to nothing over a row, so
 * what one would drop is a larger share of dw than of g. */
__device__ __forceinline__ void add_slice(float u[4][4][4], uint32_t stage) {
  const int32_t lane = (int32_t)threadIdx.x % WARP;
  uint32_t bits, b[2][4], g[2], rest[2];
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(bits) : "r"(stage + SLICE_BYTES + lane * 4));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    float x, y;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(x), "=f"(y)
                 : "r"(stage + SLICE_BYTES + WARP * 4 + lane % 4 * 8 + i * 32));
    g[i] = wn_pack_bf16(0.5f * x, 0.5f * y);
    rest[i] = wn_pack_bf16(0.5f * x - __uint_as_float(g[i] << 16), 0.5f * y - __uint_as_float(g[i] & 0xffff0000u));
    wn_ldmatrix_x4_trans(b[i], stage + slice_place(lane % 16, 2 * i + lane / 16));
  }
#pragma unroll
  for (int h = 0; h < 4; h++) {
    uint32_t mask[4], a[4];
#pragma unroll
    for (int r = 0; r < 4; r++) mask[r] = twos(bits, 4 * h + r % 2 * 2 + r / 2);
#pragma unroll
    for (int part = 0; part < 2; part++) {
#pragma unroll
      for (int r = 0; r < 4; r++) a[r] = multiply_pairs(mask[r], part ? rest[r / 2] : g[r / 2]);
#pragma unroll
      for (int c = 0; c < 4; c++) wn_mma_bf16(u[h][c], a, b[c / 2] + c % 2 * 2);
    }
  }
}

/* dq of the warp's slice, and its share of f q.u by head. */
__device__ static void finish_queries(const job &j, const float u[4][4][4], int64_t row, float *dots) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, slice = (int32_t)threadIdx.x / WARP * SLICE;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int32_t h = i * 8 + lane / 4;
    const bool there = h < j.heads;
    const int64_t head = j.head0 + (there ? h : 0);
    const wn_bf16 *q = j.q.data + row * j.q.row + head * j.q.head;
    wn_bf16 *dq = j.dq.data + row * j.dq.row + head * j.dq.head;
    const float by = j.factor * j.w.data[row * j.w.row + head];
    float dot = 0;
#pragma unroll
    for (int e = 0; e < 8; e++) {
      const int32_t column = slice + e / 2 * 8 + lane % 4 * 2 + e % 2;
      const float x = u[i / 2][e / 2][i % 2 * 2 + e % 2];
      if (!there || column >= j.q.width) continue;
      dot = fmaf(__bfloat162float(q[column]), x, dot);
      dq[column] = __float2bfloat16_rn(by * x);
    }
    dot = wn_quad_sum(dot);
    if (lane % 4 == 0) dots[h] = dot;
  }
}

/* A row a block, 32 columns a warp: dq and dw. */
template <bool VECTORS> __device__ static void query_row(const job &j, int64_t row, uint4 *memory) {
  __shared__ float dots[WARPS][HEADS];
  const int32_t warp = (int32_t)threadIdx.x / WARP, n = j.count[row];
  const int32_t tiles = warp * SLICE < j.q.width ? (n + TILE - 1) / TILE : 0;
  const uint32_t stages = wn_shared_address(memory) + (uint32_t)(warp * QUERY_STAGES * QUERY_STAGE_BYTES);
  float u[4][4][4] = {};
  int32_t picks[2], stage = 0;
  slice_picks(j, row, 0, n, picks);
  for (int32_t t = 0; t < QUERY_STAGES - 1; t++) {
    gather_slice<VECTORS>(j, stages + (uint32_t)(t * QUERY_STAGE_BYTES), row, t, picks);
    wn_cp_async_commit();
    slice_picks(j, row, t + 1, n, picks);
  }
  for (int32_t t = 0; t < tiles; t++) {
    wn_cp_async_wait<QUERY_STAGES - 2>();
    __syncwarp();
    const int32_t next = t + QUERY_STAGES - 1, free_stage = (stage + QUERY_STAGES - 1) % QUERY_STAGES;
    gather_slice<VECTORS>(j, stages + (uint32_t)(free_stage * QUERY_STAGE_BYTES), row, next, picks);
    wn_cp_async_commit();
    slice_picks(j, row, next + 1, n, picks);
    add_slice(u, stages + (uint32_t)(stage * QUERY_STAGE_BYTES));
    stage = (stage + 1) % QUERY_STAGES;
  }
  wn_cp_async_wait<0>();
  finish_queries(j, u, row, dots[warp]);
  __syncthreads();
  const int32_t h = (int32_t)threadIdx.x;
  if (h < j.heads) {
    float dot = 0;
    for (int32_t i = 0; i < WARPS; i++) dot += dots[i][h];
    j.dw.data[row * j.dw.row + j.head0 + h] = j.factor * dot;
  }
}

/* f w_h q_h, halved (the bits are twos), as B fragments of the warp's columns: [16 heads][8 columns]. `shared` holds
 * Q_BYTES and is free again afterwards. */
__device__ static void weighted_queries(uint32_t b[4][4][2], const job &j, int64_t row, uint4 *shared) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, slice = (int32_t)threadIdx.x / WARP * SLICE;
  for (int32_t i = (int32_t)threadIdx.x; i < HEADS * WIDTH / 2; i += THREADS) {
    const int32_t h = i / (WIDTH / 2), column = i % (WIDTH / 2) * 2;
    float x[2] = {0, 0};
    if (h < j.heads) {
      const wn_bf16 *q = j.q.data + row * j.q.row + (j.head0 + h) * j.q.head;
      const float by = 0.5f * j.factor * j.w.data[row * j.w.row + j.head0 + h];
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (column + e < j.q.width) x[e] = by * __bfloat162float(q[column + e]);
    }
    *(uint32_t *)((char *)shared + wn_sparse_place(h, column / 8) + column % 8 * 2) = wn_pack_bf16(x[0], x[1]);
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < 4; s++)
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      uint32_t r[4];
      wn_ldmatrix_x4_trans(r,
                           wn_shared_address(shared) + wn_sparse_place(s * 16 + lane % 16, slice / 8 + c + lane / 16));
      b[s][c][0] = r[0];
      b[s][c][1] = r[1];
      b[s][c + 1][0] = r[2];
      b[s][c + 1][1] = r[3];
    }
  __syncthreads();
}

/* What a step needs to know of its 32 keys. Where there is no pick the scale is 0. */
typedef struct step_keys {
  uint32_t bits[2][WARP];
  int32_t key[SUM_KEYS];
  float g[SUM_KEYS], scale[SUM_KEYS];
} step_keys;

/* The integers of the keys, the warp's columns, to shared memory. */
__device__ __forceinline__ void step_sums(char *to, const step_keys &keys, const uint32_t b[4][4][2]) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, slice = (int32_t)threadIdx.x / WARP * SLICE;
#pragma unroll
  for (int m = 0; m < 2; m++) {
    const uint32_t bits = keys.bits[m][lane];
    float acc[4][4] = {};
#pragma unroll
    for (int s = 0; s < 4; s++) {
      uint32_t a[4];
#pragma unroll
      for (int r = 0; r < 4; r++) a[r] = twos(bits, 4 * s + r);
#pragma unroll
      for (int c = 0; c < 4; c++) wn_mma_bf16(acc[c], a, b[s][c]);
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int32_t key = m * TILE + half * 8 + lane / 4;
      const float by = keys.g[key] * keys.scale[key];
#pragma unroll
      for (int c = 0; c < 4; c++)
        *(int2 *)(to + key * SUM_ROW + (slice + c * 8 + lane % 4 * 2) * 4) =
            make_int2(__float2int_rn(acc[c][2 * half] * by), __float2int_rn(acc[c][2 * half + 1] * by));
    }
  }
}

/* A key outside would be added to outside. */
__device__ __forceinline__ bool key_exists(const job &j, int32_t key) {
  return (uint32_t)key < (uint32_t)j.n_keys;
}

/* Warp 0 sends for what is known of the step that begins at pick `from`; a row has n. Copies that a memory fence does
 * not wait for, as it would for loads. */
__device__ __forceinline__ void fetch_step(step_keys *to, const job &j, int64_t row, int32_t from, int32_t n) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, tile = lane / 8 - 1;
  if (from >= n) return;
  wn_cp_async_4(wn_shared_address(to->key + lane), j.selection.data + row * j.selection.row + min(from + lane, n - 1),
                from + lane < n);
  if (lane < 8) wn_cp_async_16(wn_shared_address(to->g + lane * 4), j.index + row * j.pitch + from + lane * 4, 16);
  if (tile == 0 || tile == 1) /* a padded row has whole steps */
    wn_cp_async_16(wn_shared_address(to->bits[tile] + lane % 8 * 4),
                   j.bits + (row * (j.pitch / TILE) + from / TILE + tile) * WARP + lane % 8 * 4,
                   from + tile * TILE < n ? 16 : 0);
}
/* Likewise the scales of its keys, once they are there. */
__device__ __forceinline__ void fetch_scales(step_keys *to, const job &j, int32_t from, int32_t n) {
  const int32_t lane = (int32_t)threadIdx.x % WARP;
  if (from >= n) return;
  const int32_t key = to->key[lane];
  const bool there = from + lane < n && key_exists(j, key);
  wn_cp_async_4(wn_shared_address(to->scale + lane), j.key_scale + (there ? key : 0), there);
}

/* A row a block, 32 columns a warp: each pick's contribution to dk, as integers, added to its key's by the copy engine.
 * Two buffers: while one is read, the other is written; a barrier a step. Of every step the first 8 lanes of a warp
 * look after 8 keys. */
__device__ static void key_row(const job &j, int64_t row, uint4 *memory) {
  __shared__ __align__(16) step_keys ring[RING];
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  const int32_t own = warp * 8 + lane % 8;
  const int32_t n = j.count[row];
  const bool keeper = lane < 8;
  if (n == 0) return;
  if (warp == 0) {
    for (int32_t i = 0; i < RING - 1; i++) fetch_step(ring + i, j, row, i * SUM_KEYS, n);
    wn_cp_async_commit();
    wn_cp_async_wait<0>();
    __syncwarp();
    for (int32_t i = 0; i < RING - 2; i++) fetch_scales(ring + i, j, i * SUM_KEYS, n);
    wn_cp_async_commit();
    wn_cp_async_wait<0>();
  }
  uint32_t b[4][4][2];
  weighted_queries(b, j, row, memory); /* with a barrier at its end */
  for (int32_t from = 0, step = 0; from < n; from += SUM_KEYS, step++) {
    char *sums = (char *)memory + step % 2 * SUM_BYTES;
    const step_keys &now = ring[step % RING];
    if (warp == 0) {
      wn_cp_async_wait<0>(); /* sent for a step ago */
      __syncwarp();
      fetch_scales(ring + (step + 2) % RING, j, from + 2 * SUM_KEYS, n);
      fetch_step(ring + (step + 3) % RING, j, row, from + 3 * SUM_KEYS, n);
      wn_cp_async_commit();
    }
    step_sums(sums, now, b);
    const int32_t key = from + own < n ? now.key[own] : -1;
    if (keeper) wn_bulk_wait_read(); /* of the other buffer, before the barrier that lets it be written again */
    wn_publish_shared();
    __syncthreads();
    if (keeper && key_exists(j, key)) {
      wn_bulk_add_s32(j.sums + (int64_t)key * j.sum_row, wn_shared_address(sums + own * SUM_ROW),
                      (uint32_t)j.sum_row * 4);
      wn_bulk_commit();
    }
  }
  if (keeper) wn_bulk_wait_read();
}

/* Even blocks make the gradients of a row's queries, which is arithmetic, odd ones those of its keys, which is traffic:
 * side by side on every multiprocessor each hides behind the other. */
template <bool VECTORS> __global__ static void __launch_bounds__(THREADS, 4) gradients_kernel(job j) {
  extern __shared__ uint4 memory[];
  if (blockIdx.x % 2 == 0)
    query_row<VECTORS>(j, blockIdx.x / 2, memory);
  else
    key_row(j, blockIdx.x / 2, memory);
}

/* dk += sums / scale */
__global__ static void finish_kernel(job j) {
  const int64_t all = j.n_keys * j.dk.width, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const int64_t key = i / j.dk.width, column = i % j.dk.width;
    const int32_t sum = j.sums[key * j.sum_row + column];
    const float scale = j.key_scale[key];
    if (sum != 0 || scale != scale) j.dk.data[key * j.dk.row + column] += (float)sum / scale;
  }
}

wn_status wn_sparse_kl_gradients(wn_device *device, const job *j) {
  cudaStream_t stream = wn_cuda_stream(device);
  const int64_t blocks = wn_ceil_div(j->n_keys * j->dk.width, FLAT_THREADS);
  const int64_t most = (int64_t)wn_cuda_of(device)->n_sms * 16;
  if (j->n_keys > 0) {
    scale_kernel<<<(unsigned)wn_ceil_div(j->n_keys, FLAT_THREADS), FLAT_THREADS, 0, stream>>>(*j);
    WN_CUDA_TRY(cudaMemsetAsync(j->sums, 0, (size_t)(j->n_keys * j->sum_row * 4), stream));
  }
  WN_CUDA_TRY(cudaFuncSetAttribute(gradients_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
  WN_CUDA_TRY(cudaFuncSetAttribute(gradients_kernel<false>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
  for (int32_t head0 = 0; head0 < j->q.heads; head0 += HEADS) {
    const job g = wn_sparse_group(j, head0);
    const unsigned rows = (unsigned)j->n;
    if (j->k_vectors)
      gradients_kernel<true><<<2 * rows, THREADS, SHARED_BYTES, stream>>>(g);
    else
      gradients_kernel<false><<<2 * rows, THREADS, SHARED_BYTES, stream>>>(g);
  }
  if (j->n_keys > 0) finish_kernel<<<(unsigned)(blocks < most ? blocks : most), FLAT_THREADS, 0, stream>>>(*j);
  WN_CUDA_LAUNCHED("indexer_kl_sparse's gradients");
  return NULL;
}
