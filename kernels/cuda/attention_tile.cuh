/* What the per-head attention kernels share (attention_dense, attention_masked): the job, tiles in shared memory, warp
 * products, visibility of keys.
 *
 * A tile of R rows lies in shared memory as column blocks of 64 elements, each R rows of 128 bytes, the 16-byte chunks
 * of a row exchanged by the row's three low bits: eight rows of one chunk fall into different banks (the 128-byte
 * swizzle of the tensor cores' own loads). Widths below the tile's are padded with zeros.
 *
 * Which of 64 keys a row sees is a 64-bit word, bit j for key 64 * tile + j. Dense: it follows from the row's first and
 * last key. Masked: it is read from the words that attention_plan.cu makes of the selection, once for all heads. */
#ifndef WN_KERNELS_CUDA_ATTENTION_TILE_CUH
#define WN_KERNELS_CUDA_ATTENTION_TILE_CUH

#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/ptx/mbarrier.cuh"
#include "kernels/cuda/ptx/mma.cuh"
#include "kernels/cuda/ptx/tile_copy.cuh"
#include "kernels/cuda/ptx/warpgroup.cuh"
#include "kernels/cuda/ptx/wgmma.cuh"
#include "kernels/cuda/reduce.cuh"

enum {
  WN_TILE = 64,                      /* rows or keys */
  WN_BLOCK_ROWS = 128,               /* rows, or keys, that a block keeps */
  WN_MAKERS = 256,                   /* threads that multiply: eight warps of 16 rows, or two warpgroups of 64 */
  WN_GROUP_THREADS = WN_MAKERS + 128 /* with the warpgroup that starts copies */
};

/* Over 64 rows. Rows that see nothing (or lie past the end) do not count in the first two and make the last two such
 * that no tile passes for wholly visible. */
typedef struct wn_tile_bounds {
  int32_t lowest_first, highest_last; /* INT32_MAX, -1: nothing is visible */
  int32_t highest_first, lowest_last;
} wn_tile_bounds;

/* One call, or with a selection one run of its rows. All of q, k, v, d_o allow 16-byte accesses. */
typedef struct wn_attend_job {
  wn_view<wn_bf16> q, k, v, d_o; /* d_o.data may be NULL in the forward */
  wn_view<wn_bf16> o, dq, dk, dv;
  wn_view<float> unrounded;  /* [n,H,dv], in place of o where its data is there */
  wn_view<float> lse, delta; /* [n,H]; delta.data may be NULL in the forward */
  const int32_t *first, *last;
  const wn_tile_bounds *bounds; /* [tiles of 64 rows] */
  const uint64_t *words;        /* [key tiles][word_pitch], a word for each row; masked only */
  const uint32_t *active;       /* [row tiles][active_pitch], bit t: some row of the tile picks in key tile t */
  int64_t word_pitch;
  int32_t active_pitch;
  int32_t n, m, heads;
  int32_t group; /* heads that run together: their keys and values fit the L2 cache */
  float scale;
} wn_attend_job;

/* The same operands for the copy engine, as boxes of 64 columns of one head and a number of rows. */
typedef struct wn_attend_maps {
  CUtensorMap q, k, v, d_o;
} wn_attend_maps;

/* ---- attention_plan.cu: what is made once for all heads, in scratch ---- */

WN_MUST_USE wn_status wn_attend_plan_bounds(wn_device *device, wn_attend_job *job);
/* words, active and their pitches, for the job's rows and keys, which begin at key0, a multiple of 64, of n_keys;
 * selection [n,k] */
WN_MUST_USE wn_status wn_attend_plan_words(wn_device *device, wn_attend_job *job, const wn_view<int32_t> &selection,
                                           int32_t key0, int32_t n_keys);
/* Boxes of `rows` rows of q and d_o (where there), and of `keys` rows of k and v; 0 stands outside */
WN_MUST_USE wn_status wn_attend_describe(wn_attend_maps *maps, const wn_attend_job *job, uint32_t rows, uint32_t keys);
/* All operands of one call into *job, as kernels.h has them, shapes checked; those that do not allow 16-byte accesses
 * as copies in scratch that do. delta and d_o, or dq, dk, dv, d_o and delta, may be NULL together. */
WN_MUST_USE wn_status wn_attend_begin_forward(wn_device *device, wn_attend_job *job, wn_tensor *o, wn_tensor *lse,
                                              wn_tensor *delta, const wn_tensor *d_o, const wn_tensor *q,
                                              const wn_tensor *k, const wn_tensor *v, const wn_rows *rows,
                                              const wn_attention_params *params);
WN_MUST_USE wn_status wn_attend_begin_backward(wn_device *device, wn_attend_job *job, wn_tensor *dq, wn_tensor *dk,
                                               wn_tensor *dv, const wn_tensor *d_o, const wn_tensor *q,
                                               const wn_tensor *k, const wn_tensor *v, const wn_tensor *lse,
                                               const wn_tensor *delta, const wn_rows *rows,
                                               const wn_attention_params *params);

/* [n,heads,width] of BF16, or [n,heads] of FP32, asserted */
wn_view<wn_bf16> wn_attend_heads(const wn_tensor *t, int64_t n, int64_t heads, int64_t width);
wn_view<float> wn_attend_stat(const wn_tensor *t, int64_t n, int64_t heads);

/* A run of rows, or of keys, of a job. */
template <typename T> static inline void wn_skip_rows(wn_view<T> *x, int64_t rows) {
  if (x->data) x->data += rows * x->row;
}
static inline void wn_take_rows(wn_attend_job *run, int64_t from, int64_t rows) {
  wn_skip_rows(&run->q, from);
  wn_skip_rows(&run->o, from);
  wn_skip_rows(&run->unrounded, from);
  wn_skip_rows(&run->d_o, from);
  wn_skip_rows(&run->dq, from);
  wn_skip_rows(&run->lse, from);
  wn_skip_rows(&run->delta, from);
  run->first += from;
  run->last += from;
  run->n = (int32_t)rows;
}
static inline void wn_take_keys(wn_attend_job *run, int64_t from, int64_t keys) {
  wn_skip_rows(&run->k, from);
  wn_skip_rows(&run->v, from);
  wn_skip_rows(&run->dk, from);
  wn_skip_rows(&run->dv, from);
  run->m = (int32_t)keys;
}

/* Heads head .. of a backward. */
static inline wn_attend_job wn_take_heads(const wn_attend_job *job, int32_t head, int32_t heads) {
  wn_attend_job some = *job;
  wn_view<wn_bf16> *const views[] = {&some.q, &some.k, &some.v, &some.d_o, &some.dq, &some.dk, &some.dv};
  for (size_t i = 0; i < sizeof views / sizeof *views; i++) views[i]->data += head * views[i]->head;
  some.lse.data += head;
  some.delta.data += head;
  some.heads = heads;
  if (some.group > heads) some.group = heads;
  return some;
}

/* How many of a row's picks lie below `key`. */
__device__ __forceinline__ int32_t wn_picks_below(const int32_t *picks, int32_t k, int32_t key) {
  int32_t low = 0, high = k;
  while (low < high) {
    const int32_t middle = (low + high) / 2, pick = picks[middle];
    if (pick >= 0 && pick < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

/* ---- tiles in shared memory ---- */

/* Address of a 16-byte chunk of a tile of ROWS rows. */
template <int ROWS> __device__ __forceinline__ uint32_t wn_tile_at(uint32_t tile, int row, int chunk) {
  return tile + (uint32_t)((chunk >> 3) * (ROWS * 128) + row * 128 + (((chunk & 7) ^ (row & 7)) << 4));
}

/* Starts copying rows row0 .. row0 + ROWS - 1 of one head into a tile of COLS columns; rows from `rows` on and columns
 * from the view's width on become zeros. */
template <int ROWS, int COLS, int THREADS>
__device__ __forceinline__ void wn_tile_load(uint32_t tile, const wn_view<wn_bf16> &x, int head, int row0, int rows) {
  static_assert(THREADS % 64 == 0 && ROWS % (THREADS / 8) == 0, "eight threads a row, the swizzle fixed for a thread");
  const int chunk = threadIdx.x & 7, mine = threadIdx.x >> 3;
  const wn_bf16 *base = x.data + (int64_t)head * x.head;
  const uint32_t to = tile + (uint32_t)(mine * 128 + ((chunk ^ (mine & 7)) << 4));
#pragma unroll
  for (int r = 0; r < ROWS; r += THREADS / 8) {
    const int row = row0 + mine + r;
    const wn_bf16 *from = base + (int64_t)min(row, rows - 1) * x.row + chunk * 8;
#pragma unroll
    for (int c = 0; c < COLS; c += 64) {
      const int left = row < rows ? min(max(x.width - c - chunk * 8, 0), 8) : 0;
      wn_cp_async_16(to + (uint32_t)(c * 2 * ROWS + r * 128), left ? from + c : base, (uint32_t)left * 2);
    }
  }
}

/* One thread: starts the copy engine on one head's rows row0 .. into a tile of ROWS rows and COLS columns, announced at
 * `barrier`. */
template <int ROWS, int COLS>
__device__ __forceinline__ void wn_tile_fetch(uint32_t tile, const CUtensorMap *map, int head, int row0,
                                              uint32_t barrier) {
#pragma unroll
  for (int c = 0; c < COLS; c += 64) wn_copy_tile_3d(tile + (uint32_t)(c * 2 * ROWS), map, c, head, row0, barrier);
}

/* Where a walk stands in a ring of stages. */
typedef struct wn_walk_place {
  uint32_t stage, parity;
} wn_walk_place;
__device__ __forceinline__ void wn_walk_on(wn_walk_place &at, uint32_t stages) {
  if (++at.stage == stages) at = {0, at.parity ^ 1};
}

/* ---- products of a warp ---- */

/* acc[16, 8 NT] += A[rows a_row.., 16 KS] B[rows b_row.., 16 KS]^T, both tiles in shared memory */
template <int NT, int KS, int A_ROWS, int B_ROWS>
__device__ __forceinline__ void wn_product_shared(float (&acc)[NT][4], uint32_t a, int a_row, uint32_t b, int b_row) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int ks = 0; ks < KS; ks++) {
    uint32_t left[4];
    wn_ldmatrix_x4(left, wn_tile_at<A_ROWS>(a, a_row + (lane & 15), 2 * ks + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      uint32_t right[4];
      wn_ldmatrix_x4(
          right, wn_tile_at<B_ROWS>(b, b_row + 8 * j + (lane & 7) + ((lane >> 4) << 3), 2 * ks + ((lane >> 3) & 1)));
      wn_mma_bf16(acc[j], left, right);
      wn_mma_bf16(acc[j + 1], left, right + 2);
    }
  }
}

/* acc[16, 8 NT] += A[16, 16 KS] B[rows b_row.., 8 NT], A in registers as rounded by wn_fragments */
template <int NT, int KS, int B_ROWS>
__device__ __forceinline__ void wn_product_registers(float (&acc)[NT][4], const uint32_t (&a)[KS][4], uint32_t b,
                                                     int b_row) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int ks = 0; ks < KS; ks++)
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      uint32_t right[4];
      wn_ldmatrix_x4_trans(
          right, wn_tile_at<B_ROWS>(b, b_row + 16 * ks + (lane & 7) + (((lane >> 3) & 1) << 3), j + (lane >> 4)));
      wn_mma_bf16(acc[j], a[ks], right);
      wn_mma_bf16(acc[j + 1], a[ks], right + 2);
    }
}

/* Sums of a product, rounded to BF16, as the left operand of the next. */
template <int NT> __device__ __forceinline__ void wn_fragments(uint32_t (&a)[NT / 2][4], const float (&x)[NT][4]) {
#pragma unroll
  for (int j = 0; j < NT; j++) {
    a[j / 2][(j & 1) * 2] = wn_pack_bf16(x[j][0], x[j][1]);
    a[j / 2][(j & 1) * 2 + 1] = wn_pack_bf16(x[j][2], x[j][3]);
  }
}

template <int NT> __device__ __forceinline__ void wn_clear(float (&acc)[NT][4]) {
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) acc[j][e] = 0;
}

/* ---- products of a warpgroup, under way until wn_wgmma_wait ---- */

/* s = A[rows a_row.., WIDTH] B[8 NT rows, WIDTH]^T */
template <int NT, int WIDTH, int A_ROWS>
__device__ __forceinline__ void wn_group_product(float (&s)[NT][4], uint32_t a, int a_row, uint32_t b) {
  const uint64_t left = wn_wgmma_operand(a + a_row * 128, 0), right = wn_wgmma_operand(b, 0);
#pragma unroll
  for (int ks = 0; ks < WIDTH / 16; ks++)
    wn_wgmma<WN_ALONG, WN_ALONG>(s, left + (uint64_t)((ks / 4 * (A_ROWS * 128) + ks % 4 * 32) >> 4),
                                 right + (uint64_t)((ks / 4 * (8 * NT * 128) + ks % 4 * 32) >> 4), ks > 0);
}

/* acc[64, 64 BLOCKS] += A[64, 16 KS] B[16 KS rows, 64 BLOCKS], A in registers */
template <int BLOCKS, int KS>
__device__ __forceinline__ void wn_group_accumulate(float (&acc)[BLOCKS][8][4], const uint32_t (&a)[KS][4],
                                                    uint32_t b) {
  const uint64_t right = wn_wgmma_operand(b, KS * 16 * 128);
#pragma unroll
  for (int ks = 0; ks < KS; ks++)
#pragma unroll
    for (int c = 0; c < BLOCKS; c++)
      wn_wgmma_registers(acc[c], a[ks], right + (uint64_t)((c * (KS * 16 * 128) + ks * 2048) >> 4));
}

template <int BLOCKS> __device__ __forceinline__ void wn_clear_blocks(float (&x)[BLOCKS][8][4]) {
#pragma unroll
  for (int c = 0; c < BLOCKS; c++) wn_clear(x[c]);
}
template <int BLOCKS> __device__ __forceinline__ void wn_pin_blocks(float (&x)[BLOCKS][8][4]) {
#pragma unroll
  for (int c = 0; c < BLOCKS; c++) wn_wgmma_settle(x[c]);
}

/* ---- visibility ---- */

/* Keys of tile `t` that a row sees, as bits. Rows past the end see none. */
template <bool MASKED> __device__ __forceinline__ uint64_t wn_row_word(const wn_attend_job &job, int row, int t) {
  if (row >= job.n) return 0;
  if (MASKED) return job.words[t * job.word_pitch + row];
  const int low = max(job.first[row] - t * WN_TILE, 0), high = min(job.last[row] - t * WN_TILE, WN_TILE - 1);
  return low > high ? 0 : (~0ull << low) & (~0ull >> (WN_TILE - 1 - high));
}

/* Key tiles that some rows have to look at. */
typedef struct wn_key_walk {
  int32_t end;                /* one past the last tile; 0: none */
  int32_t full_low, full_end; /* dense: tiles in between are visible to every row */
} wn_key_walk;

/* The first tile from `t` on that is not dark to all of the rows ROW_TILES * rows .., ROW_TILES tiles of 64; none:
 * walk.end or more, and so for the pair that it is in. */
template <bool MASKED, int ROW_TILES>
__device__ __forceinline__ int wn_next_tile(const wn_attend_job &job, const wn_key_walk &walk, int rows, int t) {
  if (!MASKED) return t;
  const uint32_t *active = job.active + (int64_t)ROW_TILES * rows * job.active_pitch;
  for (int w = t >> 5; w < job.active_pitch; w++) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++) bits |= active[i * job.active_pitch + w];
    if (w == t >> 5) bits &= ~0u << (t & 31);
    if (bits) return w * 32 + __ffs((int)bits) - 1;
  }
  return walk.end + 1;
}

/* Fills *walk for the same rows, which may lie past the end, and returns the first tile. */
template <bool MASKED, int ROW_TILES>
__device__ __forceinline__ int wn_begin_walk(const wn_attend_job &job, int rows, wn_key_walk *walk) {
  if (MASKED) {
    *walk = {(job.m + WN_TILE - 1) / WN_TILE, 0, 0};
    return wn_next_tile<MASKED, ROW_TILES>(job, *walk, rows, 0);
  }
  wn_tile_bounds a = {INT32_MAX, -1, -1, INT32_MAX};
#pragma unroll
  for (int i = 0; i < ROW_TILES; i++)
    if ((ROW_TILES * rows + i) * WN_TILE < job.n) {
      const wn_tile_bounds b = job.bounds[ROW_TILES * rows + i];
      a = {min(a.lowest_first, b.lowest_first), max(a.highest_last, b.highest_last),
           max(a.highest_first, b.highest_first), min(a.lowest_last, b.lowest_last)};
    }
  *walk = {0, 0, 0};
  if (a.highest_last < 0) return 0;
  *walk = {a.highest_last / WN_TILE + 1, a.highest_first / WN_TILE + (a.highest_first % WN_TILE != 0),
           (a.lowest_last + 1) / WN_TILE};
  return a.lowest_first / WN_TILE;
}

/* Where unit `at` of heads x tiles stands: a group of heads at a time, in a group all heads of one tile before the next
 * tile. */
__device__ __forceinline__ void wn_block_place(const wn_attend_job &job, uint32_t at, int tiles, int *head, int *tile) {
  const int64_t all = (int64_t)job.group * tiles, g = at / all;
  const int r = (int)(at - g * all), first = (int)g * job.group, heads = min(job.group, job.heads - first);
  *head = first + r % heads;
  *tile = r / heads;
}
/* The same with the last tile first: its rows see most keys. */
__device__ __forceinline__ void wn_block_place_last_first(const wn_attend_job &job, uint32_t at, int tiles, int *head,
                                                          int *tile) {
  wn_block_place(job, at, tiles, head, tile);
  *tile = tiles - 1 - *tile;
}

/* ---- results ---- */

/* Whether neighbouring columns, from an even one on, may be accessed together. */
__device__ __forceinline__ bool wn_pairs(const wn_view<wn_bf16> &y) {
  return (((uintptr_t)y.data | (uintptr_t)(y.row * 2) | (uintptr_t)(y.head * 2)) & 3) == 0;
}

/* Two neighbouring columns from an even one on; 0 past the width. */
__device__ __forceinline__ float2 wn_get_pair(const wn_view<wn_bf16> &x, int row, int head, int col) {
  const wn_bf16 *from = x.data + row * x.row + head * x.head + col;
  if (wn_pairs(x) && col + 1 < x.width) return __bfloat1622float2(*(const __nv_bfloat162 *)from);
  return {col < x.width ? __bfloat162float(from[0]) : 0, col + 1 < x.width ? __bfloat162float(from[1]) : 0};
}

/* Two neighbouring columns from an even one on, cut at the width; (+)= factor a, factor b */
template <bool ADD>
__device__ __forceinline__ void wn_put_pair(const wn_view<wn_bf16> &y, int row, int head, int col, float a, float b,
                                            float factor) {
  if (col >= y.width) return;
  wn_bf16 *to = y.data + row * y.row + head * y.head + col;
  if (wn_pairs(y) && col + 1 < y.width) {
    const float2 old = ADD ? __bfloat1622float2(*(const __nv_bfloat162 *)to) : float2{0, 0};
    *(uint32_t *)to =
        ADD ? wn_pack_bf16(fmaf(a, factor, old.x), fmaf(b, factor, old.y)) : wn_pack_bf16(a * factor, b * factor);
    return;
  }
  to[0] = __float2bfloat16_rn(ADD ? fmaf(a, factor, __bfloat162float(to[0])) : a * factor);
  if (col + 1 < y.width) to[1] = __float2bfloat16_rn(ADD ? fmaf(b, factor, __bfloat162float(to[1])) : b * factor);
}

/* A warp's sums [16, 8 NT], times `factor`, to rows row0 .. and columns col0 .. of y. */
template <bool ADD, int NT>
__device__ __forceinline__ void wn_put_rows(const wn_view<wn_bf16> &y, int row0, int rows, int col0, int head,
                                            const float (&acc)[NT][4], float factor) {
  const int lane = threadIdx.x & 31, row = row0 + (lane >> 2), col = col0 + (lane & 3) * 2;
#pragma unroll
  for (int j = 0; j < NT; j++) {
    if (row < rows) wn_put_pair<ADD>(y, row, head, 8 * j + col, acc[j][0], acc[j][1], factor);
    if (row + 8 < rows) wn_put_pair<ADD>(y, row + 8, head, 8 * j + col, acc[j][2], acc[j][3], factor);
  }
}

/* Sums of a warp's 16 rows go out as whole lines of 64 columns, through WN_WARP_LINES bytes of shared memory of the
 * warp's own, for a y that allows 16-byte accesses (wn_view_vectors). Row by row as the lanes have them, an addition
 * would wait for memory at every pair of columns. All lanes of the warp. */
enum { WN_WARP_LINES = 16 * 128 };

/* Rows row0 .., columns col0 .. + 63 of y into the lines, zeros past the ends; there after wn_lines_come. */
__device__ __forceinline__ void wn_bring_lines(const wn_view<wn_bf16> &y, int row0, int rows, int col0, int head,
                                               char *lines) {
  const int lane = threadIdx.x & 31, chunk = lane & 7;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = 4 * i + lane / 8;
    const bool there = row0 + row < rows && col0 + 8 * chunk < y.width;
    const wn_bf16 *from = y.data + (row0 + row) * y.row + head * y.head + col0 + 8 * chunk;
    wn_cp_async_16(wn_tile_at<16>(wn_shared_address(lines), row, chunk), there ? from : y.data, there ? 16 : 0);
  }
}
/* All lines that this warp brings have come. */
__device__ __forceinline__ void wn_lines_come(void) {
  wn_cp_async_commit();
  wn_cp_async_wait<0>();
  __syncwarp();
}
/* x[16, 64] = factor x + lines */
__device__ __forceinline__ void wn_add_lines(float (&x)[8][4], float factor, const char *lines) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < 8; j++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const char *from = lines + wn_tile_at<16>(0, lane / 4 + 8 * r, j) + (lane & 3) * 4;
      const float2 old = __bfloat1622float2(*(const __nv_bfloat162 *)from);
      x[j][2 * r] = fmaf(x[j][2 * r], factor, old.x);
      x[j][2 * r + 1] = fmaf(x[j][2 * r + 1], factor, old.y);
    }
}
/* x[16, 64], rounded, to rows row0 .., columns col0 .. of y */
__device__ __forceinline__ void wn_put_lines(const wn_view<wn_bf16> &y, int row0, int rows, int col0, int head,
                                             const float (&x)[8][4], char *lines) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int j = 0; j < 8; j += 2) {
    const uint32_t four[4] = {wn_pack_bf16(x[j][0], x[j][1]), wn_pack_bf16(x[j][2], x[j][3]),
                              wn_pack_bf16(x[j + 1][0], x[j + 1][1]), wn_pack_bf16(x[j + 1][2], x[j + 1][3])};
    wn_stmatrix_x4(wn_tile_at<16>(wn_shared_address(lines), lane & 15, j + (lane >> 4)), four);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = 4 * i + lane / 8, chunk = lane & 7;
    const uint4 eight = *(const uint4 *)(lines + wn_tile_at<16>(0, row, chunk));
    if (row0 + row < rows && col0 + 8 * chunk < y.width)
      *(uint4 *)(y.data + (row0 + row) * y.row + head * y.head + col0 + 8 * chunk) = eight;
  }
  __syncwarp();
}

/* A warp's outputs [16, 8 NT] as they are to rows row0 .. of y. */
template <int NT>
__device__ __forceinline__ void wn_put_unrounded(const wn_view<float> &y, int row0, int rows, int head,
                                                 const float (&o)[NT][4]) {
  const int lane = threadIdx.x & 31;
  const bool pairs = ((uintptr_t)y.data & 7) == 0 && (y.row & 1) == 0 && (y.head & 1) == 0;
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = row0 + (lane >> 2) + 8 * r, col = 8 * j + (lane & 3) * 2;
      if (row >= rows || col >= y.width) continue;
      float *to = y.data + row * y.row + head * y.head + col;
      if (pairs && col + 1 < y.width) {
        *(float2 *)to = make_float2(o[j][2 * r], o[j][2 * r + 1]);
      } else {
        to[0] = o[j][2 * r];
        if (col + 1 < y.width) to[1] = o[j][2 * r + 1];
      }
    }
}

/* One step of delta's sum. Of each 8 columns a lane of four has two, from the first on; then the lanes are added
 * (wn_quad_sum). attention_delta.cu sums in this order too. */
__device__ __forceinline__ float wn_delta_step(float delta, float2 o, float2 d_o) {
  return fmaf(o.y, d_o.y, fmaf(o.x, d_o.x, delta));
}

/* ---- launching ---- */

/* Calls launch.run<DQ, DV>() with the smallest padded widths that hold dq and dv. */
template <typename Launch> static inline wn_status wn_with_widths(int32_t dq, int32_t dv, Launch launch) {
  WN_ASSERT(dq <= 256 && dv <= 256, "head widths %d and %d", dq, dv);
  if (dq <= 64 && dv <= 64) return launch.template run<64, 64>();
  if (dq <= 128 && dv <= 128) return launch.template run<128, 128>();
  if (dq <= 192 && dv <= 128) return launch.template run<192, 128>();
  return launch.template run<256, 256>();
}

/* operands: the job, and what else the kernel takes */
template <typename Kernel, typename... Operands>
static inline wn_status wn_attend_launch(wn_device *device, Kernel kernel, int64_t blocks, int threads, int bytes,
                                         const Operands &...operands) {
  if (blocks == 0) return NULL;
  WN_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<(unsigned)blocks, threads, bytes, wn_cuda_stream(device)>>>(operands...);
  WN_CUDA_LAUNCHED("attention");
  return NULL;
}

#endif
