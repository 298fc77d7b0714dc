/* indexer_kl_dense_scores.cu's sums over heads, by warpgroups: for operands whose rows are multiples of 16 bytes.
 *
 * A block owns 128 rows x 192 keys: two warpgroups of 64 rows multiply and keep the sum over heads in registers (96 for
 * a head's product, 96 for the sum), one thread of a third feeds them through a ring of slices of 64 columns with the
 * bulk copy engine. The two take turns: one takes exponentials while the other multiplies. Keys that all heads share
 * and that are at most 128 wide, the indexer's, are fetched once and stay.
 *
 * A block alone reads 128 + 192 rows a head from the second-level cache. Two blocks with the same keys make a cluster:
 * each fetches half of the keys, and the copy engine gives them to both. That takes 30% off the reads and gained 3% of
 * the time: reads are not what limits it. Both sums are one launch, so that tiles of the second, which are done sooner,
 * fill what the last of the first leave idle. indexer_kl_dense.cu has the ladder. */
#include "kernels/cuda/indexer_kl_dense.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/tile_copy.cuh"
#include "kernels/cuda/ptx/warpgroup.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum { ROWS = 128, KEYS = 192, SLICE = 64, STAGES = 5, GROUPS = 2, THREADS = (GROUPS + 1) * 128, PAIR = 2 };
enum { X_BYTES = ROWS * SLICE * 2, Y_BYTES = KEYS * SLICE * 2, STAGE_BYTES = X_BYTES + Y_BYTES, ALIGN_BYTES = 1024 };
enum { SLICES_THAT_STAY = 2 };
static_assert(SLICES_THAT_STAY * Y_BYTES + STAGES * X_BYTES <= STAGES * STAGE_BYTES, "a ring beside keys that stay");
enum { SHARED_BYTES = STAGES * STAGE_BYTES + ALIGN_BYTES, PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240 };

typedef struct wide_params {
  wn_dense_kl_sum sum;
  CUtensorMap x, y; /* [rows, heads, width], boxes of a tile's rows (y: of half a tile's), one head, a slice */
  bool target;
} wide_params;

typedef struct wide_sums {
  wide_params of[2]; /* in the order of the grid's last dimension */
} wide_sums;

typedef struct ring {
  uint32_t data, full, empty; /* addresses: stages; a barrier a stage each */
  int32_t stage;
  uint32_t parity;
  uint32_t rank;        /* of the block in its pair */
  uint32_t y, y_full;   /* keys that stay: their slices, their barrier */
  uint32_t stage_bytes; /* x, and y where it does not stay */
  bool stays;
} ring;

__device__ static void advance(ring *r) {
  if (++r->stage == STAGES) {
    r->stage = 0;
    r->parity ^= 1;
  }
}

/* This block's half of a slice of the keys to both blocks of the pair. */
__device__ static void fetch_keys(const wide_params &a, const ring &r, uint32_t to, int32_t slice, int32_t head,
                                  int32_t key0, uint32_t barrier) {
  wn_copy_tile_3d_to_blocks(to + r.rank * (Y_BYTES / PAIR), &a.y, slice * SLICE, a.sum.y.head ? head : 0,
                            key0 + (int32_t)r.rank * (KEYS / PAIR), barrier, (1 << PAIR) - 1);
}

__device__ static void produce(const wide_params &a, ring r, int32_t row0, int32_t key0, int32_t slices) {
  if (r.stays) {
    wn_mbarrier_expect(r.y_full, slices * Y_BYTES);
    for (int32_t slice = 0; slice < slices; slice++) fetch_keys(a, r, r.y + slice * Y_BYTES, slice, 0, key0, r.y_full);
  }
  for (int32_t head = 0; head < a.sum.x.heads; head++)
    for (int32_t slice = 0; slice < slices; slice++) {
      const uint32_t at = r.data + r.stage * r.stage_bytes, full = r.full + r.stage * 8;
      wn_mbarrier_wait(r.empty + r.stage * 8, r.parity ^ 1);
      wn_mbarrier_expect(full, r.stage_bytes);
      wn_copy_tile_3d(at, &a.x, slice * SLICE, head, row0, full);
      if (!r.stays) fetch_keys(a, r, at + X_BYTES, slice, head, key0, full);
      advance(&r);
    }
}

/* The stage is done with: both blocks of the pair write to it. */
__device__ static void release(uint32_t empty) {
  if (threadIdx.x % 32 < PAIR) wn_mbarrier_arrive_at(empty, threadIdx.x % 32);
}

template <bool TARGET>
__device__ static void consume(const wide_params &a, ring r, int32_t row0, int32_t key0, int32_t slices) {
  const int32_t lane = threadIdx.x % 32, group = threadIdx.x / 128 - 1;
  const int32_t row = row0 + group * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const float scale = a.sum.scale, share = TARGET ? 1.0f / (float)a.sum.x.heads : 1.0f;
  const bool exists[2] = {row < a.sum.chunk.n_rows, row + 8 < a.sum.chunk.n_rows};
  const float *term[2] = {a.sum.term + row * a.sum.term_row, a.sum.term + (row + 8) * a.sum.term_row};
  float s[KEYS / 8][4], sum[KEYS / 8][4];
#pragma unroll
  for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) sum[j][e] = 0;
  /* a turn is a head: all its slices have to fit into the ring, or the other's never come free */
  const bool turns = slices < STAGES;
  if (r.stays) wn_mbarrier_wait(r.y_full, 0);
  if (turns && group == 1) wn_turn_give(1 - group);
  for (int32_t head = 0; head < a.sum.x.heads; head++) {
    const float t[2] = {exists[0] ? wn_dense_kl_term<TARGET>(term[0][head], scale) : 0,
                        exists[1] ? wn_dense_kl_term<TARGET>(term[1][head], scale) : 0};
    uint32_t used = 0; /* the barrier of the stage that the group before reads */
    if (turns) wn_turn_wait(group);
    for (int32_t slice = 0; slice < slices; slice++) {
      const uint32_t at = r.data + r.stage * r.stage_bytes;
      wn_mbarrier_wait(r.full + r.stage * 8, r.parity);
      const uint64_t x = wn_wgmma_operand(at + group * (X_BYTES / GROUPS)),
                     y = wn_wgmma_operand(r.stays ? r.y + slice * Y_BYTES : at + X_BYTES);
      wn_wgmma_fence();
#pragma unroll
      for (int k = 0; k < SLICE / 16; k++) wn_wgmma<WN_ALONG, WN_ALONG>(s, x + k * 2, y + k * 2, slice + k > 0);
      wn_wgmma_commit();
      if (slice > 0) {
        wn_wgmma_wait<1>();
        release(used);
      }
      used = r.empty + r.stage * 8;
      advance(&r);
    }
    if (turns && (group == 0 || head + 1 < a.sum.x.heads)) wn_turn_give(1 - group);
    wn_wgmma_wait<0>();
    wn_wgmma_settle(s);
    release(used);
#pragma unroll
    for (int j = 0; j < KEYS / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[j][e] = wn_dense_kl_folded<TARGET>(sum[j][e], s[j][e], t[e / 2], scale);
  }
  if (row0 >= a.sum.chunk.n_row_tiles * ROWS) return;
  float *out = a.sum.out + (int64_t)row * a.sum.chunk.columns + key0 + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < KEYS / 2; i += 2)
    if (key0 + i / 4 * 8 < a.sum.chunk.columns)
      *(float2 *)(out + (int64_t)(i / 2 % 2 * 8) * a.sum.chunk.columns + i / 4 * 8) =
          make_float2(sum[i / 4][i % 4] * share, sum[i / 4][i % 4 + 1] * share);
}

__global__ static void __cluster_dims__(PAIR, 1, 1) __launch_bounds__(THREADS, 1)
    wide_kernel(const __grid_constant__ wide_sums sums) {
  extern __shared__ char memory[];
  __shared__ uint64_t barriers[2 * STAGES + 1];
  const wide_params &a = sums.of[blockIdx.z];
  const int32_t row0 = blockIdx.x * ROWS, key0 = blockIdx.y * KEYS;
  const int32_t slices = (a.sum.x.width + SLICE - 1) / SLICE;
  bool seen = false; /* by a row of either block: they go together */
  for (int32_t i = blockIdx.x / PAIR * PAIR; i < a.sum.chunk.n_row_tiles && i <= ((int32_t)blockIdx.x | (PAIR - 1));
       i++)
    seen |= key0 + KEYS > a.sum.chunk.seen[i].x && key0 < a.sum.chunk.seen[i].y;
  if (!seen) return;
  ring r = {};
  r.y = r.data = (wn_shared_address(memory) + ALIGN_BYTES - 1) & ~(ALIGN_BYTES - 1u);
  r.full = wn_shared_address(barriers);
  r.empty = r.full + STAGES * 8;
  r.y_full = r.empty + STAGES * 8;
  r.rank = wn_cluster_rank();
  r.stays = a.sum.y.head == 0 && slices <= SLICES_THAT_STAY;
  r.stage_bytes = r.stays ? X_BYTES : STAGE_BYTES;
  if (r.stays) r.data += SLICES_THAT_STAY * Y_BYTES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      wn_mbarrier_init(r.full + i * 8, 1);
      wn_mbarrier_init(r.empty + i * 8, PAIR * GROUPS * 4); /* each multiplying warp of both blocks */
    }
    wn_mbarrier_init(r.y_full, 1);
    wn_mbarrier_init_fence();
  }
  wn_cluster_sync();
  if (threadIdx.x < 128) {
    wn_registers_shrink<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce(a, r, row0, key0, slices);
  } else {
    wn_registers_grow<CONSUMER_REGISTERS>();
    if (a.target)
      consume<true>(a, r, row0, key0, slices);
    else
      consume<false>(a, r, row0, key0, slices);
  }
  wn_cluster_sync(); /* a block's memory stays while the other may still write or arrive there */
}

static wn_status describe(wide_params *a, const wn_dense_kl_sum *sum, bool target) {
  a->sum = *sum;
  a->target = target;
  WN_TRY(wn_cuda_view_map(&a->x, sum->x, sum->chunk.n_rows, SLICE, 1, ROWS));
  return wn_cuda_view_map(&a->y, sum->y, sum->chunk.n_keys, SLICE, 1, KEYS / PAIR);
}

wn_status wn_dense_kl_sums_wide(wn_device *device, const wn_dense_kl_sum *target, const wn_dense_kl_sum *index) {
  WN_ASSERT(target || index, "neither sum is wanted");
  const wn_dense_kl_chunk *c = target ? &target->chunk : &index->chunk;
  wide_sums sums = {};
  unsigned n = 0;
  if (target) WN_TRY(describe(&sums.of[n++], target, true));
  if (index) WN_TRY(describe(&sums.of[n++], index, false));
  WN_CUDA_TRY(cudaFuncSetAttribute(wide_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
  const dim3 grid((unsigned)wn_ceil_div(c->n_row_tiles, PAIR) * PAIR, (unsigned)wn_ceil_div(c->columns, KEYS), n);
  wide_kernel<<<grid, THREADS, SHARED_BYTES, wn_cuda_stream(device)>>>(sums);
  WN_CUDA_LAUNCHED("indexer_kl_dense's head sums");
  return NULL;
}
