/* The indexer's scores on wgmma. A block keeps 256 columns, the heads of 4 .. 32 queries, in shared memory and streams
 * the keys that these queries see past them, 128 at a time: two warpgroups take 64 keys each, so that a thread holds
 * 128 products, two keys of a quarter of the columns. It sums weight times ReLU over its own columns and meets the
 * three others that share its keys in three exchanges for four scores. While one warpgroup sums, the other one's
 * products run: they take turns. A third warpgroup drives the copy engine, one warp the keys, one the next block of
 * queries with their weights and ranges. Blocks are persistent; the rows that see most keys go first.
 *
 * Measured on an H200, 64 heads x 128, the last 4096 of 131072 rows (8.7 TFLOP; limit: 989.5 TFLOP/s):
 * - mma.sync, the general form of index_score.cu: 70.7 ms, 122 TFLOP/s, 12%
 * - this: 13.5 to 13.8 ms, 628 to 639 TFLOP/s, 64%, at the card's power cap (690 W, 1755 MHz)
 *
 * With the sums left out it takes 11.0 ms (786 TFLOP/s), with only the stores left out 12.6 ms. What changes nothing:
 * the turn passed on a few steps later, no turns at all, x + |x| for the ReLU, no tests of visibility inside. The turn
 * passed on only after the products: 578 TFLOP/s. */
#include "kernels/cuda/index_score.cuh"
#include "kernels/cuda/index_score_wide.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/mma.cuh"
#include "kernels/cuda/ptx/tile_copy.cuh"
#include "kernels/cuda/ptx/warpgroup.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
  COLUMNS = 256, /* of queries times heads */
  KEYS = 128,    /* of a tile */
  K_STAGES = 3,
  Q_STAGES = 2,
  CONSUMERS = 256, /* threads */
  THREADS = CONSUMERS + 128,
  ROWS_MOST = COLUMNS / 8,
  HALF = 64 /* columns of the width in one swizzled piece */
};

typedef struct wide_job {
  const float *w;
  int64_t w_row;
  const int32_t *first, *last;
  int32_t n_rows, least;
  float scale;
  float *scores;
  int64_t pitch;
  int32_t n_blocks; /* of rows */
} wide_job;

/* What comes with 256 columns of queries. */
typedef struct row_block {
  float weight[COLUMNS];                     /* times scale */
  int32_t first[ROWS_MOST], last[ROWS_MOST]; /* 1, 0 for rows that need nothing */
  int32_t low, high;                         /* keys that some row needs */
} row_block;

template <int HALVES> struct wide_shared {
  wn_bf16 q[Q_STAGES][HALVES][COLUMNS * HALF], k[K_STAGES][HALVES][KEYS * HALF];
  row_block rows[Q_STAGES];
  uint64_t q_full[Q_STAGES], q_empty[Q_STAGES], k_full[K_STAGES], k_empty[K_STAGES];
};

/* A place in a ring of STAGES and the parity of its round. */
template <int STAGES> struct ring { uint32_t stage, parity; };
template <int STAGES> __device__ __forceinline__ void advance(ring<STAGES> *r) {
  if (++r->stage < STAGES) return;
  r->stage = 0;
  r->parity ^= 1;
}

/* One warp: queries, weights and ranges, a block of rows ahead of the products. */
template <int HEADS, int HALVES>
__device__ static void produce_rows(wide_shared<HALVES> *s, const CUtensorMap *q_map, const wide_job &j) {
  constexpr int ROWS = COLUMNS / HEADS;
  const int32_t lane = (int32_t)threadIdx.x % 32;
  ring<Q_STAGES> at = {0, 0};
  for (int32_t block = j.n_blocks - 1 - (int32_t)blockIdx.x; block >= 0; block -= (int32_t)gridDim.x) {
    const int32_t row0 = block * ROWS, row = row0 + lane;
    const uint32_t full = wn_shared_address(&s->q_full[at.stage]);
    row_block *r = &s->rows[at.stage];
    int32_t first = 1, last = 0;
    if (lane < ROWS && row < j.n_rows) {
      const int32_t f = j.first[row], l = j.last[row];
      if (l - f + 1 > j.least) first = f, last = l;
    }
    float weight[COLUMNS / 32];
#pragma unroll
    for (int i = 0; i < COLUMNS / 32; i++) {
      const int32_t column = i * 32 + lane, of = row0 + column / HEADS;
      weight[i] = of < j.n_rows ? j.scale * __ldg(j.w + of * j.w_row + column % HEADS) : 0.0f;
    }
    const int32_t low = __reduce_min_sync(~0u, first <= last ? first : INT32_MAX);
    const int32_t high = __reduce_max_sync(~0u, first <= last ? last : -1);
    wn_mbarrier_wait(wn_shared_address(&s->q_empty[at.stage]), at.parity ^ 1);
#pragma unroll
    for (int i = 0; i < COLUMNS / 32; i++) r->weight[i * 32 + lane] = weight[i];
    if (lane < ROWS) {
      r->first[lane] = first;
      r->last[lane] = last;
    }
    if (lane == 0) {
      r->low = low & ~7; /* whole sectors are stored */
      r->high = high;
    }
    if (lane != 0) { /* each lane for what it wrote itself */
      wn_mbarrier_arrive(full);
    } else {
      wn_mbarrier_expect(full, HALVES * COLUMNS * HALF * 2);
#pragma unroll
      for (int h = 0; h < HALVES; h++)
        wn_copy_tile_3d(wn_shared_address(s->q[at.stage][h]), q_map, h * HALF, 0, row0, full);
    }
    advance(&at);
  }
}

/* One warp: the keys that each block of rows needs. */
template <int HALVES>
__device__ static void produce_keys(wide_shared<HALVES> *s, const CUtensorMap *k_map, const wide_job &j) {
  const bool leader = threadIdx.x % 32 == 0;
  ring<Q_STAGES> q = {0, 0};
  ring<K_STAGES> at = {0, 0};
  for (int32_t block = j.n_blocks - 1 - (int32_t)blockIdx.x; block >= 0; block -= (int32_t)gridDim.x) {
    wn_mbarrier_wait(wn_shared_address(&s->q_full[q.stage]), q.parity);
    const int32_t low = s->rows[q.stage].low, high = s->rows[q.stage].high;
    wn_mbarrier_arrive(wn_shared_address(&s->q_empty[q.stage]));
    advance(&q);
    for (int32_t key0 = low; key0 <= high; key0 += KEYS) {
      const uint32_t full = wn_shared_address(&s->k_full[at.stage]);
      wn_mbarrier_wait(wn_shared_address(&s->k_empty[at.stage]), at.parity ^ 1);
      if (leader) {
        wn_mbarrier_expect(full, HALVES * KEYS * HALF * 2);
#pragma unroll
        for (int h = 0; h < HALVES; h++)
          wn_copy_tile_2d(wn_shared_address(s->k[at.stage][h]), k_map, h * HALF, key0, full);
      }
      advance(&at);
    }
  }
}

/* The sum of v[i] over the four lanes of a quad, in its lane i: (0 + 1) + (2 + 3), as the general form sums. */
__device__ __forceinline__ float quad_sums(const float v[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  float a = odd ? v[1] : v[0], b = odd ? v[3] : v[2];
  a += __shfl_xor_sync(~0u, odd ? v[0] : v[1], 1);
  b += __shfl_xor_sync(~0u, odd ? v[2] : v[3], 1);
  const float sent = upper ? a : b;
  return (upper ? b : a) + __shfl_xor_sync(~0u, sent, 2);
}

/* Scores of this thread's share: keys key and key + 8, every query of the block. */
template <int HEADS>
__device__ __forceinline__ void sum_heads(const float (&d)[COLUMNS / 8][4], const float weight[64], const row_block *r,
                                          float *scores, int64_t pitch, int32_t key) {
  constexpr int TILES = HEADS / 8, ROWS = COLUMNS / HEADS;
#pragma unroll
  for (int g = 0; g < ROWS; g += 4) {
    float part[2][4];
#pragma unroll
    for (int q = 0; q < 4; q++) {
      part[0][q] = part[1][q] = 0.0f;
#pragma unroll
      for (int c = 0; c < TILES; c++) {
        const int at = (g + q) * TILES + c;
#pragma unroll
        for (int e = 0; e < 2; e++) {
          part[0][q] += weight[2 * at + e] * wn_relu(d[at][e]);
          part[1][q] += weight[2 * at + e] * wn_relu(d[at][2 + e]);
        }
      }
    }
    const float score[2] = {quad_sums(part[0]), quad_sums(part[1])};
    const int32_t row = g + (int32_t)threadIdx.x % 4, first = r->first[row], last = r->last[row];
    float *to = scores + row * pitch + key;
    if (key >= first && key <= last) to[0] = score[0];
    if (key + 8 >= first && key + 8 <= last) to[8] = score[1];
  }
}

template <int HEADS, int HALVES> __device__ static void consume(wide_shared<HALVES> *s, const wide_job &j) {
  constexpr int ROWS = COLUMNS / HEADS;
  const uint32_t group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const int32_t own_key = (int32_t)(threadIdx.x / 32 * 16 + lane / 4);
  ring<Q_STAGES> q = {0, 0};
  ring<K_STAGES> at = {0, 0};
  if (group == 1) wn_turn_give(group ^ 1); /* the first turn is group 0's */
  for (int32_t block = j.n_blocks - 1 - (int32_t)blockIdx.x; block >= 0; block -= (int32_t)gridDim.x) {
    wn_mbarrier_wait(wn_shared_address(&s->q_full[q.stage]), q.parity);
    const row_block *r = &s->rows[q.stage];
    const int32_t low = r->low, high = r->high;
    float weight[64], d[COLUMNS / 8][4];
#pragma unroll
    for (int i = 0; i < 32; i++) {
      weight[2 * i] = r->weight[8 * i + 2 * (lane % 4)];
      weight[2 * i + 1] = r->weight[8 * i + 2 * (lane % 4) + 1];
    }
    for (int32_t key0 = low; key0 <= high; key0 += KEYS) {
      wn_mbarrier_wait(wn_shared_address(&s->k_full[at.stage]), at.parity);
      wn_turn_wait(group);
      wn_wgmma_settle(d);
      wn_wgmma_fence();
#pragma unroll
      for (int step = 0; step < HALVES * HALF / 16; step++) {
        const int h = step / 4, x = step % 4;
        const uint64_t a = wn_wgmma_operand(wn_shared_address(s->k[at.stage][h] + group * 64 * HALF)) + 2 * x;
        const uint64_t b = wn_wgmma_operand(wn_shared_address(s->q[q.stage][h])) + 2 * x;
        wn_wgmma<WN_ALONG, WN_ALONG>(d, a, b, step > 0);
      }
      wn_wgmma_commit();
      wn_turn_give(group ^ 1);
      wn_wgmma_wait<0>();
      if (lane == 0) wn_mbarrier_arrive(wn_shared_address(&s->k_empty[at.stage])); /* before the sums, not after them */
      wn_wgmma_settle(d);
      advance(&at);
      sum_heads<HEADS>(d, weight, r, j.scores + (int64_t)block * ROWS * j.pitch, j.pitch, key0 + own_key);
    }
    wn_mbarrier_arrive(wn_shared_address(&s->q_empty[q.stage]));
    advance(&q);
  }
  if (group == 0) wn_turn_wait(group); /* group 1's last pass of the turn */
}

template <int HEADS, int HALVES>
__global__ static void __launch_bounds__(THREADS, 1)
    wide_kernel(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, wide_job j) {
  extern __shared__ __align__(1024) char memory[];
  wide_shared<HALVES> *s = (wide_shared<HALVES> *)memory;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Q_STAGES; i++) {
      wn_mbarrier_init(wn_shared_address(&s->q_full[i]), 32);
      wn_mbarrier_init(wn_shared_address(&s->q_empty[i]), CONSUMERS + 32); /* and the keys' producer */
    }
    for (int i = 0; i < K_STAGES; i++) {
      wn_mbarrier_init(wn_shared_address(&s->k_full[i]), 1);
      wn_mbarrier_init(wn_shared_address(&s->k_empty[i]), CONSUMERS / 32);
    }
    wn_mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < CONSUMERS) {
    wn_registers_grow<224>(); /* 256 x 224 + 128 x 56 is what 384 threads began with */
    consume<HEADS, HALVES>(s, j);
  } else {
    wn_registers_shrink<56>();
    if (threadIdx.x / 32 == CONSUMERS / 32) produce_keys<HALVES>(s, &k_map, j);
    if (threadIdx.x / 32 == CONSUMERS / 32 + 1) produce_rows<HEADS, HALVES>(s, &q_map, j);
  }
}

/* ---- host ---- */

template <int HEADS, int HALVES>
static wn_status launch(wn_device *device, const CUtensorMap *q_map, const CUtensorMap *k_map, const wide_job *j) {
  const int32_t n_sms = wn_cuda_of(device)->n_sms;
  const unsigned grid = (unsigned)(j->n_blocks < n_sms ? j->n_blocks : n_sms);
  const size_t bytes = sizeof(wide_shared<HALVES>);
  WN_CUDA_TRY(
      cudaFuncSetAttribute(wide_kernel<HEADS, HALVES>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  wide_kernel<HEADS, HALVES><<<grid, THREADS, bytes, wn_cuda_stream(device)>>>(*q_map, *k_map, *j);
  WN_CUDA_LAUNCHED("indexer_scores");
  return NULL;
}

template <int HEADS>
static wn_status launch_width(wn_device *device, int32_t width, const CUtensorMap *q_map, const CUtensorMap *k_map,
                              const wide_job *j) {
  return width == 2 * HALF ? launch<HEADS, 2>(device, q_map, k_map, j) : launch<HEADS, 1>(device, q_map, k_map, j);
}

bool wn_cuda_index_scores_wide_fits(const wn_view<wn_bf16> &q, const wn_view<wn_bf16> &k) {
  const bool heads = q.heads == 8 || q.heads == 16 || q.heads == 32 || q.heads == 64;
  return heads && (q.width == HALF || q.width == 2 * HALF) && wn_view_vectors(q) && wn_view_vectors(k);
}

wn_status wn_cuda_index_scores_wide(wn_device *device, float *scores, int64_t pitch, const wn_view<wn_bf16> &q,
                                    const wn_view<wn_bf16> &k, const wn_view<float> &w, const int32_t *first,
                                    const int32_t *last, int32_t least, float scale) {
  const int32_t rows = COLUMNS / q.heads;
  const int64_t k_dim[2] = {k.width, k.n};
  const uint32_t k_box[2] = {HALF, KEYS};
  CUtensorMap q_map, k_map;
  WN_TRY(wn_cuda_view_map(&q_map, q, q.n, HALF, q.heads, rows));
  WN_TRY(wn_cuda_tensor_map(&k_map, WN_BF16, k.data, 2, k_dim, &k.row, k_box));
  const wide_job j = {.w = w.data,
                      .w_row = w.row,
                      .first = first,
                      .last = last,
                      .n_rows = (int32_t)q.n,
                      .least = least,
                      .scale = scale,
                      .scores = scores,
                      .pitch = pitch,
                      .n_blocks = (int32_t)wn_ceil_div(q.n, rows)};
  switch (q.heads) {
  case 8: return launch_width<8>(device, q.width, &q_map, &k_map, &j);
  case 16: return launch_width<16>(device, q.width, &q_map, &k_map, &j);
  case 32: return launch_width<32>(device, q.width, &q_map, &k_map, &j);
  default: return launch_width<64>(device, q.width, &q_map, &k_map, &j);
  }
}
