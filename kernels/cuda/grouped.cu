/* Products of many weights at once, each over its own rows (the experts' linear layers), in one launch, so that small
 * groups fill the GPU together.
 *
 * Tiles of 128 x 256 of all groups are numbered through and dealt out to one block a multiprocessor. In a block one
 * thread fetches slices of 64 of the inner dimension with the copy engine into a ring of stages, and two warpgroups
 * multiply them, each 64 x 256 of the tile in its registers; the fetches run ahead into the next tile while the sums of
 * the last one leave. Rows past a group's end read as zeros and are not written.
 *
 * Sums leave without passing through shared memory: four lanes exchange theirs so that each writes 16 bytes of a row.
 * Weight gradients are added to memory by fire-and-forget reductions. That is not the float atomic this folder forbids:
 * an element belongs to one tile, so one addition a launch reaches it, and nothing depends on timing.
 *
 * Ladder, in TFLOP/s on one H200, random data: forward / backward_input / backward_weight (FP32 +=). In the same runs a
 * cuBLAS product of 8192^3 makes 722 to 788; the larger shapes run at what the card's power allows.
 *
 *   experts x rows, inputs -> outputs     32 x 512, 7168 -> 2048   32 x 4096, 7168 -> 2048   16 x 4096, 1024 -> 512
 *   cublasGemmGroupedBatchedEx            262 / 257 / none         298 / 279 / none          256 / 231 / none
 *   cublasGemmEx, one after another       594 / 485-592 / 250      657-802 / 588-639 / 560   408 / 383 / 374
 *   the same on two queues                562 / 643 / 315          654 / 645 / 599           439 / 416 / 343
 *   1: this, BF16 sums added word by word 737 / 632 / 261          684-710 / 558-645 / 595   573 / 534 / 560
 *      ... accumulating backward_input    395                      431                       190
 *   2: 16 bytes of what is there at once  736 / 672-711 / 262      670-679 / 601-635 / 585   568 / 528 / 561   ships
 *      ... accumulating backward_input    610                      543                       400
 *   3: 2, and pairs of blocks share A's   702 / 639 / 290          678-722 / 620-648 / 540   547 / 506 / 486
 *      slices, c prefetched: accumulating 467                      428                       263
 *      (in that run, one after another    580 / 483 / 243          694 / 630 / 588           326 / 345 / 285)
 *
 * Version 3 was to relieve the second-level cache. Sharing changed little either way, and prefetching c costs the
 * accumulating forms more than it hides.
 *
 * 512 rows of backward_weight move 7.8 bytes of FP32 sums per 1000 FLOP: 0.9 ms of the 1.84 at the copy rate. */
#include "kernels/cuda/grouped.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/mma.cuh"
#include "kernels/cuda/ptx/tile_copy.cuh"
#include "kernels/cuda/ptx/warpgroup.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
  ROWS = 128,
  COLUMNS = 256,
  SLICE = 64,
  STAGES = 4,
  BAND = 16, /* tiles of rows that share columns in the cache */
  BLOCK_BYTES = 64 * SLICE * 2,
  A_BYTES = ROWS * SLICE * 2,
  STAGE_BYTES = (ROWS + COLUMNS) * SLICE * 2,
  SHARED_BYTES = STAGES * STAGE_BYTES + 1024,
  WARPGROUP = 128,
  CONSUMERS = 2 * WARPGROUP,
  THREADS = 3 * WARPGROUP
};
enum { MOST_GROUPS = 96 }; /* of a launch: kernel parameters are limited to 32764 bytes */

/* c[m,n] of one group */
typedef struct group {
  void *c;
  int64_t c_stride;
  int32_t m, n, k;
  int32_t end_tile; /* of all tiles: the groups' before it and its own */
} group;

typedef struct group_list {
  CUtensorMap a[MOST_GROUPS], b[MOST_GROUPS];
  group each[MOST_GROUPS];
  int32_t n_groups, n_tiles;
} group_list;

/* The walk of a block over its tiles; all its threads take the same. */
typedef struct walk {
  int32_t tile, g, first_tile; /* first_tile of group g */
  int32_t row, column;         /* the tile's first */
} walk;

__device__ static bool walk_to(walk &w, const group_list &list, int32_t tile) {
  w.tile = tile;
  if (tile >= list.n_tiles) return false;
  while (tile >= list.each[w.g].end_tile) w.first_tile = list.each[w.g++].end_tile;
  const group &own = list.each[w.g];
  const int32_t high = (own.m + ROWS - 1) / ROWS, wide = (own.n + COLUMNS - 1) / COLUMNS;
  const int32_t u = tile - w.first_tile, band = u / (BAND * wide), in_band = u - band * BAND * wide;
  const int32_t height = min((int32_t)BAND, high - band * BAND);
  w.row = (band * BAND + in_band % height) * ROWS;
  w.column = in_band / height * COLUMNS;
  return true;
}

/* wn_mbarrier_wait as a loop of C, around which the compiler schedules this kernel otherwise: the figures above are of
 * this form. */
__device__ static void wait_for(uint32_t barrier, uint32_t parity) {
  while (!wn_mbarrier_try(barrier, parity)) {
  }
}

/* Rounds go to and fro over the blocks, so that the one with the longest tile of a round has the shortest of the next:
 * groups come by falling inner dimension. */
__device__ static int32_t tile_of(int32_t round) {
  return round * (int32_t)gridDim.x + (int32_t)(round & 1 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
}

/* ---- fetching ---- */

/* An operand's slice: along its rows one box of `blocks` times 64 rows; across them a box each 64 columns. */
template <int ACROSS>
__device__ static void fetch(uint32_t shared, const CUtensorMap *map, int32_t first, int32_t k, int blocks,
                             uint32_t barrier) {
  if (ACROSS)
    for (int i = 0; i < blocks; i++) wn_copy_tile_2d(shared + i * BLOCK_BYTES, map, first + i * 64, k, barrier);
  else
    wn_copy_tile_2d(shared, map, k, first, barrier);
}

template <int A_ACROSS, int B_ACROSS>
__device__ static void produce(const group_list &list, uint32_t stages, uint32_t full, uint32_t empty) {
  walk w = {};
  uint32_t step = 0;
  for (int32_t round = 0; walk_to(w, list, tile_of(round)); round++) {
    const group &own = list.each[w.g];
    for (int32_t k = 0; k < own.k; k += SLICE, step++) {
      const uint32_t stage = step % STAGES, turn = step / STAGES, at = stages + stage * STAGE_BYTES;
      wait_for(empty + stage * 8, (turn & 1) ^ 1); /* passes at once in the first turn */
      wn_mbarrier_expect(full + stage * 8, STAGE_BYTES);
      fetch<A_ACROSS>(at, &list.a[w.g], w.row, k, ROWS / 64, full + stage * 8);
      fetch<B_ACROSS>(at + A_BYTES, &list.b[w.g], w.column, k, COLUMNS / 64, full + stage * 8);
    }
  }
}

/* ---- sums to memory ---- */

/* Word w of lane q and word q of lane w (of four neighbours) change places. */
__device__ static void exchange(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, odd ? x[j] : x[j + 1], 1);
    if (odd)
      x[j] = got;
    else
      x[j + 1] = got;
  }
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const uint32_t got = __shfl_xor_sync(~0u, high ? x[j] : x[j + 2], 2);
    if (high)
      x[j] = got;
    else
      x[j + 2] = got;
  }
}

/* What becomes of the sums: BF16 written, BF16 added to what is there and rounded once, FP32 added by reductions. */
typedef enum outcome { WRITE, ADD, SEND } outcome;

/* Rows row, row + 8 and columns column .. column + 255 of this lane's four; widths are multiples of 8, so a block of 8
 * columns is there or is not. */
template <outcome OUTCOME>
__device__ static void write_bf16(const group &own, const float (&d)[COLUMNS / 8][4], int32_t row, int32_t column) {
  enum { QUARTERS = COLUMNS / 32 };
  const int32_t first = column + threadIdx.x % 4 * 8; /* of the blocks that this lane writes */
#pragma unroll
  for (int side = 0; side < 2; side++) {
    const bool there = row + side * 8 < own.m;
    wn_bf16 *const line = (wn_bf16 *)own.c + (row + side * 8) * own.c_stride;
    uint4 old[QUARTERS];
#pragma unroll
    for (int j = 0; j < QUARTERS; j++) {
      old[j] = make_uint4(0, 0, 0, 0);
      if (OUTCOME == ADD && there && first + j * 32 < own.n) old[j] = *(const uint4 *)(line + first + j * 32);
    }
#pragma unroll
    for (int j = 0; j < QUARTERS; j++) {
      uint32_t words[4], before[4] = {old[j].x, old[j].y, old[j].z, old[j].w};
      if (OUTCOME == ADD) exchange(before);
#pragma unroll
      for (int w = 0; w < 4; w++) {
        const float *x = &d[j * 4 + w][side * 2];
        const float2 y = __bfloat1622float2(*(const __nv_bfloat162 *)&before[w]);
        words[w] = OUTCOME == ADD ? wn_pack_bf16(x[0] + y.x, x[1] + y.y) : wn_pack_bf16(x[0], x[1]);
      }
      exchange(words);
      if (there && first + j * 32 < own.n)
        *(uint4 *)(line + first + j * 32) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

/* The same for FP32: two neighbours exchange halves of two blocks of 8 columns, then each adds 16 bytes. */
__device__ static void send_f32(const group &own, const float (&d)[COLUMNS / 8][4], int32_t row, int32_t column) {
  const int32_t q = threadIdx.x % 4;
  const bool odd = q & 1;
  float *const c = (float *)own.c;
#pragma unroll
  for (int side = 0; side < 2; side++) {
    const bool there = row + side * 8 < own.m;
    float *const line = c + (row + side * 8) * own.c_stride;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 2) {
      const float x0 = d[j][side * 2], x1 = d[j][side * 2 + 1];
      const float y0 = d[j + 1][side * 2], y1 = d[j + 1][side * 2 + 1];
      const float g0 = __shfl_xor_sync(~0u, odd ? x0 : y0, 1), g1 = __shfl_xor_sync(~0u, odd ? x1 : y1, 1);
      const int32_t at = column + (j + odd) * 8 + q / 2 * 4;
      if (!there || at >= own.n) continue;
      if (odd)
        wn_send_sum(line + at, g0, g1, y0, y1);
      else
        wn_send_sum(line + at, x0, x1, g0, g1);
    }
  }
}

/* ---- multiplying ---- */

/* d = this warpgroup's 64 rows of the tile */
template <int A_ACROSS, int B_ACROSS>
__device__ static uint32_t multiply(float (&d)[COLUMNS / 8][4], uint32_t step, int32_t k, uint32_t stages,
                                    uint32_t full, uint32_t empty) {
  const uint32_t mine = stages + threadIdx.x / WARPGROUP * BLOCK_BYTES; /* of A's tile, stored either way */
  const bool speaks = threadIdx.x % 32 == 0;
  for (int32_t at = 0; at < k; at += SLICE, step++) {
    const uint32_t stage = step % STAGES;
    const uint64_t a = wn_wgmma_operand(mine + stage * STAGE_BYTES, BLOCK_BYTES);
    const uint64_t b = wn_wgmma_operand(stages + stage * STAGE_BYTES + A_BYTES, BLOCK_BYTES);
    wait_for(full + stage * 8, step / STAGES & 1);
    wn_wgmma_fence();
#pragma unroll
    for (int i = 0; i < SLICE / 16; i++)
      wn_wgmma<A_ACROSS, B_ACROSS>(d, a + i * (A_ACROSS ? 128 : 2), b + i * (B_ACROSS ? 128 : 2), at > 0 || i > 0);
    wn_wgmma_commit();
    wn_wgmma_wait<1>();
    if (at > 0 && speaks) wn_mbarrier_arrive(empty + (step - 1) % STAGES * 8);
  }
  wn_wgmma_wait<0>();
  wn_wgmma_settle(d);
  if (speaks) wn_mbarrier_arrive(empty + (step - 1) % STAGES * 8);
  return step;
}

template <int A_ACROSS, int B_ACROSS, outcome OUTCOME>
__global__ static void __launch_bounds__(THREADS, 1) products_kernel(const __grid_constant__ group_list list) {
  extern __shared__ char memory[];
  __shared__ uint64_t barriers[2 * STAGES];
  const uint32_t stages = (wn_shared_address(memory) + 1023) & ~1023u;
  const uint32_t full = wn_shared_address(barriers), empty = full + STAGES * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      wn_mbarrier_init(full + i * 8, 1);
      wn_mbarrier_init(empty + i * 8, CONSUMERS / 32);
    }
    wn_mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= CONSUMERS) {
    wn_registers_shrink<40>();
    if (threadIdx.x == CONSUMERS) produce<A_ACROSS, B_ACROSS>(list, stages, full, empty);
  } else {
    wn_registers_grow<232>();
    walk w = {};
    uint32_t step = 0;
    for (int32_t round = 0; walk_to(w, list, tile_of(round)); round++) {
      const group &own = list.each[w.g];
      const int32_t row = w.row + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
      float d[COLUMNS / 8][4];
      step = multiply<A_ACROSS, B_ACROSS>(d, step, own.k, stages, full, empty);
      if (OUTCOME == SEND)
        send_f32(own, d, row, w.column);
      else
        write_bf16<OUTCOME>(own, d, row, w.column);
    }
  }
}

/* ---- host ---- */

/* Boxes of 64 columns and `box_rows` rows of data[rows, columns]. */
static wn_status make_map(CUtensorMap *map, const void *data, int64_t rows, int64_t columns, int64_t stride,
                          uint32_t box_rows) {
  const int64_t dim[2] = {columns, rows};
  const uint32_t box[2] = {64, box_rows};
  return wn_cuda_tensor_map(map, WN_BF16, data, 2, dim, &stride, box);
}

static bool aligned(const void *data, int64_t stride, int64_t element_bytes) {
  return (uintptr_t)data % 16 == 0 && stride * element_bytes % 16 == 0;
}

extern "C" bool wn_cuda_products_fit(const wn_product *p) {
  const int64_t c_bytes = wn_dtype_bytes(p->c_dtype);
  const bool form = p->c_dtype == WN_F32 ? p->transpose_a && !p->transpose_b && p->accumulate : !p->transpose_a;
  return form && p->batch == 0 && aligned(p->a, p->a_stride, 2) && aligned(p->b, p->b_stride, 2) &&
         aligned(p->c, p->c_stride, c_bytes) && p->n * c_bytes % 16 == 0;
}

/* By falling k: experts have as many rows as chose them, and a weight gradient's tile sums over all of them. */
static wn_status add_group(group_list *list, const wn_product *p) {
  int32_t at = list->n_groups++;
  for (; at > 0 && list->each[at - 1].k < p->k; at--) {
    list->a[at] = list->a[at - 1];
    list->b[at] = list->b[at - 1];
    list->each[at] = list->each[at - 1];
  }
  CUtensorMap *a = &list->a[at], *b = &list->b[at];
  group *g = &list->each[at];
  WN_ASSERT(p->m < INT32_MAX && p->n < INT32_MAX && p->k < INT32_MAX, "a group of %lld x %lld x %lld", (long long)p->m,
            (long long)p->n, (long long)p->k);
  WN_TRY(p->transpose_a ? make_map(a, p->a, p->k, p->m, p->a_stride, SLICE)
                        : make_map(a, p->a, p->m, p->k, p->a_stride, ROWS));
  WN_TRY(p->transpose_b ? make_map(b, p->b, p->n, p->k, p->b_stride, COLUMNS)
                        : make_map(b, p->b, p->k, p->n, p->b_stride, SLICE));
  g->c = p->c;
  g->c_stride = p->c_stride;
  g->m = (int32_t)p->m, g->n = (int32_t)p->n, g->k = (int32_t)p->k;
  return NULL;
}

static void number_tiles(group_list *list) {
  int64_t tiles = 0;
  for (int32_t i = 0; i < list->n_groups; i++) {
    group *g = &list->each[i];
    tiles += wn_ceil_div(g->m, ROWS) * wn_ceil_div(g->n, COLUMNS);
    WN_ASSERT(tiles < INT32_MAX / 2, "%lld tiles", (long long)tiles);
    g->end_tile = (int32_t)tiles;
  }
  list->n_tiles = (int32_t)tiles;
}

template <int A_ACROSS, int B_ACROSS, outcome OUTCOME>
static wn_status launch(wn_device *device, const group_list *list) {
  const int32_t n_sms = wn_cuda_of(device)->n_sms, grid = list->n_tiles < n_sms ? list->n_tiles : n_sms;
  WN_CUDA_TRY(cudaFuncSetAttribute(products_kernel<A_ACROSS, B_ACROSS, OUTCOME>,
                                   cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES));
  products_kernel<A_ACROSS, B_ACROSS, OUTCOME>
      <<<(unsigned)grid, THREADS, SHARED_BYTES, wn_cuda_stream(device)>>>(*list);
  WN_CUDA_LAUNCHED("grouped products");
  return NULL;
}

static wn_status launch_form(wn_device *device, const group_list *list, const wn_product *form) {
  if (form->c_dtype == WN_F32) return launch<1, 1, SEND>(device, list);
  if (form->transpose_b) return form->accumulate ? launch<0, 0, ADD>(device, list) : launch<0, 0, WRITE>(device, list);
  return form->accumulate ? launch<0, 1, ADD>(device, list) : launch<0, 1, WRITE>(device, list);
}

extern "C" wn_status wn_cuda_products(wn_device *device, const wn_product *product, int32_t n) {
  group_list list;
  for (int32_t from = 0; from < n;) {
    list.n_groups = 0;
    for (; from < n && list.n_groups < MOST_GROUPS; from++) {
      const wn_product *p = &product[from];
      if (p->m == 0 || p->n == 0 || (p->k == 0 && p->accumulate)) continue;
      WN_ASSERT(p->k > 0 && wn_cuda_products_fit(p), "a product that does not fit, or over no elements");
      WN_ASSERT(p->transpose_b == product->transpose_b && p->accumulate == product->accumulate &&
                    p->c_dtype == product->c_dtype,
                "grouped products of several forms");
      WN_TRY(add_group(&list, p));
    }
    if (list.n_groups == 0) continue;
    number_tiles(&list);
    WN_TRY(launch_form(device, &list, product));
  }
  return NULL;
}
