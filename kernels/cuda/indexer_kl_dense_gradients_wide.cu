/* indexer_kl_dense_gradients.cu's two kernels by warpgroups, for dI = 128 and a power of two of heads (V3.2's indexer).
 *
 * A tile of pairs is 128 (row, head) pairs, a tile of keys 128 keys; a block keeps one (X, in shared memory) and
 * streams the others (Y) past it with the bulk copy engine. Each of two warpgroups has 64 rows of X: Z = X Y^T into
 * registers, weighed there to P, which is the first operand of P Y as it stands: the same stage of Y serves both
 * products. The product P Y of one tile and Z of the next are under way together. Both kernels are one launch, so that
 * the queries' blocks fill what the last of the keys' leave idle. indexer_kl_dense.cu has the ladder. */
#include "kernels/cuda/indexer_kl_dense.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/tile_copy.cuh"
#include "kernels/cuda/ptx/warpgroup.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/reduce.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum { TILE = 128, WIDTH = 128, SLICE = 64, STAGES = 4, GROUPS = 2, THREADS = (GROUPS + 1) * 128 };
enum { SLICE_BYTES = TILE * SLICE * 2, TILE_BYTES = SLICE_BYTES * WIDTH / SLICE, ALIGN_BYTES = 1024 };
enum { PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232, LEAST_HEADS = 8 };

typedef struct wide_params {
  wn_dense_kl_gradient in;
  CUtensorMap pairs, keys, g; /* boxes: a slice of a tile of pairs; of a tile of keys; g of the two tiles */
  int32_t group, log_heads;   /* rows of a tile of pairs: TILE >> log_heads */
  int32_t stage_bytes; /* of a stage: Y, then g [group, TILE], then w [TILE] of the pairs when they are streamed */
  int32_t key_blocks, query_blocks;
} wide_params;

/* What a block does. */
typedef struct task {
  int32_t t0, key0;   /* X: the first row of its pairs, or its first key */
  int32_t tiles;      /* of Y */
  int32_t first_tile; /* queries: the first key of Y */
  int32_t split;      /* keys: of the chunk's row tiles */
} task;

typedef struct ring {
  uint32_t data, x, full, empty, x_full; /* addresses: stages, X; a barrier a stage each, one of X */
  const char *stages;                    /* data again */
  int32_t stage;
  uint32_t parity;
} ring;

__device__ static void advance(ring *r) {
  if (++r->stage == STAGES) {
    r->stage = 0;
    r->parity ^= 1;
  }
}

/* First row of the pairs of tile i of Y. visible: row tiles that see the block's keys. */
__device__ static int32_t row_of_tile(const wide_params &a, const int32_t *visible, int32_t i) {
  return visible[i >> a.log_heads] * WN_DENSE_KL_TILE + (i & ((1 << a.log_heads) - 1)) * a.group;
}

/* ---- feeding ---- */

__device__ static void copy_rows(uint32_t shared, const CUtensorMap *map, int32_t row, uint32_t barrier) {
#pragma unroll
  for (int s = 0; s < WIDTH / SLICE; s++) wn_copy_tile_3d(shared + s * SLICE_BYTES, map, s * SLICE, 0, row, barrier);
}

/* One thread: X, then Y and g tile by tile. */
template <bool KEYS>
__device__ static void produce(const wide_params &a, const task &job, const int32_t *visible, ring r) {
  const CUtensorMap *x = KEYS ? &a.keys : &a.pairs, *y = KEYS ? &a.pairs : &a.keys;
  wn_mbarrier_expect(r.x_full, TILE_BYTES);
  copy_rows(r.x, x, KEYS ? job.key0 : job.t0, r.x_full);
  for (int32_t i = 0; i < job.tiles; i++) {
    const uint32_t at = r.data + r.stage * a.stage_bytes, full = r.full + r.stage * 8;
    const int32_t t = KEYS ? row_of_tile(a, visible, i) : job.t0, key = KEYS ? job.key0 : job.first_tile + i * TILE;
    wn_mbarrier_wait(r.empty + r.stage * 8, r.parity ^ 1);
    wn_mbarrier_expect(full, TILE_BYTES + a.group * TILE * 4);
    copy_rows(at, y, KEYS ? t : key, full);
    wn_copy_tile_3d(at + TILE_BYTES, &a.g, key, 0, t, full);
    advance(&r);
  }
}

/* One warp: w of the streamed pairs, 0 past the last row. */
__device__ static void produce_weights(const wide_params &a, const task &job, const int32_t *visible, ring r) {
  const int32_t lane = threadIdx.x % 32;
  for (int32_t i = 0; i < job.tiles; i++) {
    const uint32_t to = r.data + r.stage * a.stage_bytes + TILE_BYTES + a.group * TILE * 4;
    const int32_t t0 = row_of_tile(a, visible, i);
    wn_mbarrier_wait(r.empty + r.stage * 8, r.parity ^ 1);
    for (int32_t pair = lane; pair < TILE; pair += 32) {
      const int32_t t = t0 + (pair >> a.log_heads), h = pair & ((1 << a.log_heads) - 1);
      const bool exists = t < a.in.chunk.n_rows;
      wn_cp_async_4(to + pair * 4, exists ? a.in.w.data + t * a.in.w.row + h : a.in.w.data, exists);
    }
    wn_mbarrier_arrive_after_copies(r.full + r.stage * 8);
    advance(&r);
  }
}

/* ---- weighing: Z to P, 0 where Z <= 0 ---- */

/* X are pairs. g: [group, TILE] from the thread's first column on; row: of g, of the thread's two pairs. */
__device__ static void weigh_keys(uint32_t p[TILE / 16][4], float dw[2], const float (&z)[TILE / 8][4], const float *g,
                                  const int32_t row[2]) {
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) {
    const float2 g0 = *(const float2 *)(g + row[0] * TILE + n * 8);
    const float2 g1 = row[0] == row[1] ? g0 : *(const float2 *)(g + row[1] * TILE + n * 8);
    const float *y = z[n];
    const float gated[4] = {g0.x * wn_dense_kl_gate(y[0]), g0.y * wn_dense_kl_gate(y[1]), g1.x * wn_dense_kl_gate(y[2]),
                            g1.y * wn_dense_kl_gate(y[3])};
    dw[0] = fmaf(gated[1], y[1], fmaf(gated[0], y[0], dw[0]));
    dw[1] = fmaf(gated[3], y[3], fmaf(gated[2], y[2], dw[1]));
    p[n / 2][n % 2 * 2] = wn_pack_bf16(gated[0], gated[1]);
    p[n / 2][n % 2 * 2 + 1] = wn_pack_bf16(gated[2], gated[3]);
  }
}

/* X are keys. g: [group, TILE] from the thread's first key on; w: from its first column on. */
__device__ static void weigh_pairs(uint32_t p[TILE / 16][4], const float (&z)[TILE / 8][4], const float *g,
                                   const float *w, int32_t log_heads) {
  float g0 = 0, g1 = 0;
#pragma unroll
  for (int n = 0; n < TILE / 8; n++) {
    if (((n * 8) & ((1 << log_heads) - 1)) == 0) { /* the next row's pairs begin */
      g0 = g[(n * 8 >> log_heads) * TILE];
      g1 = g[(n * 8 >> log_heads) * TILE + 8];
    }
    const float2 v = *(const float2 *)(w + n * 8);
    const float *y = z[n];
    p[n / 2][n % 2 * 2] = wn_pack_bf16(g0 * wn_dense_kl_gate(y[0]) * v.x, g0 * wn_dense_kl_gate(y[1]) * v.y);
    p[n / 2][n % 2 * 2 + 1] = wn_pack_bf16(g1 * wn_dense_kl_gate(y[2]) * v.x, g1 * wn_dense_kl_gate(y[3]) * v.y);
  }
}

/* ---- multiplying ---- */

/* sum[slot 0: row, slot 1: row + 8 of X], as an accumulator lies */
template <bool KEYS>
__device__ static void multiply(const wide_params &a, int32_t tiles, ring r, float (&sum)[WIDTH / 8][4], float dw[2]) {
  const int32_t lane = threadIdx.x % 32, group = threadIdx.x / 128 - 1;
  const int32_t own = group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4, column = lane % 4 * 2;
  const int32_t row[2] = {own >> a.log_heads, (own + 8) >> a.log_heads};
  const uint64_t x = wn_wgmma_operand(r.x + group * (SLICE_BYTES / GROUPS));
  float z[TILE / 8][4];
  uint32_t used = 0; /* the barrier of the stage before */
  wn_mbarrier_wait(r.x_full, 0);
  if (group == 1 && tiles > 0) wn_turn_give(1 - group);
  if (tiles > 0) wn_turn_wait(group);
  for (int32_t i = 0; i < tiles; i++) {
    const uint32_t at = r.data + r.stage * a.stage_bytes;
    const float *g = (const float *)(r.stages + r.stage * a.stage_bytes + TILE_BYTES);
    wn_mbarrier_wait(r.full + r.stage * 8, r.parity);
    const uint64_t y = wn_wgmma_operand(at), y_rows = wn_wgmma_operand(at, SLICE_BYTES);
    wn_wgmma_fence();
#pragma unroll
    for (int k = 0; k < WIDTH / 16; k++) {
      const int step = k / 4 * (SLICE_BYTES >> 4) + k % 4 * 2;
      wn_wgmma<WN_ALONG, WN_ALONG>(z, x + step, y + step, k > 0);
    }
    wn_wgmma_commit();
    wn_turn_give(1 - group);
    wn_wgmma_wait<0>(); /* this Z, and the P Y of the tile before */
    wn_wgmma_settle(z);
    __syncwarp(); /* every lane has read g and w */
    if (i > 0 && lane == 0) wn_mbarrier_arrive(used);
    uint32_t p[TILE / 16][4];
    if (KEYS)
      weigh_pairs(p, z, g + own, g + a.group * TILE + column, a.log_heads);
    else
      weigh_keys(p, dw, z, g + column, row);
    wn_turn_wait(group);
    wn_wgmma_fence();
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) wn_wgmma_registers(sum, p[k], y_rows + k * 128);
    wn_wgmma_commit();
    used = r.empty + r.stage * 8;
    advance(&r);
  }
  if (group == 0 && tiles > 0) wn_turn_give(1 - group);
  wn_wgmma_wait<0>();
  wn_wgmma_settle(sum);
}

__device__ static void write_queries(const wide_params &a, const task &job, const float (&sum)[WIDTH / 8][4],
                                     const float dw[2], int32_t own) {
  const int32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int slot = 0; slot < 2; slot++) {
    const float whole = wn_quad_sum(dw[slot]);
    const int32_t pair = own + slot * 8, t = job.t0 + (pair >> a.log_heads), h = pair & ((1 << a.log_heads) - 1);
    if (t >= a.in.chunk.n_rows) continue;
    const float factor = a.in.factor * a.in.w.data[t * a.in.w.row + h];
    wn_bf16 *to = a.in.dq.data + t * a.in.dq.row + h * a.in.dq.head + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++)
      *(uint32_t *)(to + n * 8) = wn_pack_bf16(sum[n][slot * 2] * factor, sum[n][slot * 2 + 1] * factor);
    if (lane % 4 == 0) a.in.dw.data[t * a.in.dw.row + h] = whole * a.in.factor;
  }
}

__device__ static void write_share(const wide_params &a, const float (&sum)[WIDTH / 8][4], int32_t split, int32_t key) {
  float *to = a.in.shares.data + ((int64_t)split * a.in.chunk.columns + key) * WIDTH + threadIdx.x % 4 * 2;
#pragma unroll
  for (int slot = 0; slot < 2; slot++)
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++)
      *(float2 *)(to + slot * 8 * WIDTH + n * 8) = make_float2(sum[n][slot * 2], sum[n][slot * 2 + 1]);
}

/* ---- blocks ---- */

/* A block owns a tile of pairs; long rows begin first. */
__device__ static task query_task(const wide_params &a, int32_t block) {
  task job = {(a.query_blocks - 1 - block) * a.group, 0, 0, 0, 0};
  int32_t low = INT32_MAX, high = 0;
  for (int32_t t = job.t0; t < job.t0 + a.group && t < a.in.chunk.n_rows; t++) {
    const int32_t first = a.in.chunk.first_key[t], last = a.in.chunk.last_key[t];
    if (last <= first) continue;
    low = min(low, first);
    high = max(high, last + 1);
  }
  if (high == 0) return job;
  job.first_tile = low / TILE * TILE;
  job.tiles = (high - job.first_tile + TILE - 1) / TILE;
  return job;
}

/* A block owns a tile of keys and a split of the chunk's row tiles. */
__device__ static task key_task(const wide_params &a, int32_t block, int32_t *visible) {
  const int32_t key_tiles = a.in.chunk.columns / TILE;
  task job = {0, block % key_tiles * TILE, 0, 0, block / key_tiles};
  const int32_t from = job.split * a.in.shares.tiles_per_split;
  for (int32_t i = from; i < from + a.in.shares.tiles_per_split && i < a.in.chunk.n_row_tiles; i++)
    if (wn_dense_kl_sees(a.in.chunk, i, job.key0)) {
      if (threadIdx.x == 0) visible[job.tiles] = i;
      job.tiles++;
    }
  job.tiles <<= a.log_heads; /* tiles of pairs in a tile of rows: WN_DENSE_KL_TILE / group = heads */
  return job;
}

template <bool KEYS>
__device__ static void run(const wide_params &a, const task &job, const int32_t *visible, char *memory,
                           uint64_t *barriers) {
  const uint32_t unaligned = wn_shared_address(memory), x = (unaligned + ALIGN_BYTES - 1) & ~(ALIGN_BYTES - 1u);
  ring r = {x + TILE_BYTES, x, wn_shared_address(barriers), 0, 0, memory + (x - unaligned) + TILE_BYTES, 0, 0};
  r.empty = r.full + STAGES * 8;
  r.x_full = r.empty + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      wn_mbarrier_init(r.full + i * 8, KEYS ? 1 + 32 : 1); /* the copying thread, the warp of weights */
      wn_mbarrier_init(r.empty + i * 8, GROUPS * 4);       /* a lane of each multiplying warp */
    }
    wn_mbarrier_init(r.x_full, 1);
    wn_mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    wn_registers_shrink<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce<KEYS>(a, job, visible, r);
    if (KEYS && threadIdx.x / 32 == 1) produce_weights(a, job, visible, r);
  } else {
    wn_registers_grow<CONSUMER_REGISTERS>();
    const int32_t own = threadIdx.x - 128, row = own / 128 * 64 + own % 128 / 32 * 16 + own % 32 / 4;
    float sum[WIDTH / 8][4] = {}, dw[2] = {};
    multiply<KEYS>(a, job.tiles, r, sum, dw);
    if (KEYS)
      write_share(a, sum, job.split, job.key0 + row);
    else
      write_queries(a, job, sum, dw, row);
  }
}

__global__ static void __launch_bounds__(THREADS, 1) wide_kernel(const __grid_constant__ wide_params a) {
  extern __shared__ char memory[];
  __shared__ uint64_t barriers[2 * STAGES + 1];
  __shared__ int32_t visible[WN_DENSE_KL_MAX_TILES];
  const int32_t block = (int32_t)blockIdx.x;
  if (block < a.key_blocks) {
    const task job = key_task(a, block, visible);
    if (job.tiles > 0) run<true>(a, job, visible, memory, barriers);
  } else {
    run<false>(a, query_task(a, block - a.key_blocks), visible, memory, barriers);
  }
}

bool wn_dense_kl_gradients_fit(const wn_dense_kl_gradient *a) {
  const int32_t heads = a->q.heads;
  return a->q.width == WIDTH && heads >= LEAST_HEADS && heads <= TILE && (heads & (heads - 1)) == 0 &&
         a->chunk.n_keys > 0 && wn_view_vectors(a->q) && wn_view_vectors(a->k) && wn_view_vectors(a->dq);
}

wn_status wn_dense_kl_gradients_wide(wn_device *device, const wn_dense_kl_gradient *in) {
  wide_params a = {};
  a.in = *in;
  while (1 << a.log_heads < in->q.heads) a.log_heads++;
  a.group = TILE >> a.log_heads;
  a.stage_bytes = TILE_BYTES + (int32_t)wn_ceil_div((a.group + 1) * TILE * 4, ALIGN_BYTES) * ALIGN_BYTES;
  const wn_dense_kl_chunk *c = &in->chunk;
  const wn_view<float> g = {c->p, c->columns, 0, (int64_t)c->n_row_tiles * WN_DENSE_KL_TILE, 1, c->columns};
  WN_TRY(wn_cuda_view_map(&a.pairs, in->q, c->n_rows, SLICE, in->q.heads, a.group));
  WN_TRY(wn_cuda_view_map(&a.keys, in->k, c->n_keys, SLICE, 1, TILE));
  WN_TRY(wn_cuda_view_map(&a.g, g, g.n, TILE, 1, a.group));
  a.key_blocks = c->columns / TILE * in->shares.n_splits;
  a.query_blocks = (int32_t)wn_ceil_div(c->n_rows, a.group);
  const int bytes = STAGES * a.stage_bytes + TILE_BYTES + ALIGN_BYTES;
  WN_CUDA_TRY(cudaFuncSetAttribute(wide_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  wide_kernel<<<(unsigned)(a.key_blocks + a.query_blocks), THREADS, bytes, wn_cuda_stream(device)>>>(a);
  WN_CUDA_LAUNCHED("indexer_kl_dense's gradients");
  return NULL;
}
