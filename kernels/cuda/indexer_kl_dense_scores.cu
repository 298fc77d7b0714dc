/* The dense KL's two matrices for a chunk of rows: the target p[t,s] = mean over heads of exp(scale qa.ka - lse) and
 * the scores I[t,s] = sum over heads of w relu(scale q.k).
 *
 * Both are sums over heads of a function of a product, so both are one kernel: a block owns 128 rows x 128 keys, keeps
 * the sum over heads in registers and walks through (head, slice of 64 columns) with a ring of shared-memory stages. No
 * head's logits ever leave the registers. All blocks are at about the same head at the same time, so that what they
 * read is in the second-level cache. */
#include <math.h>

#include "kernels/cuda/indexer_kl_dense.cuh"

enum { THREADS = 256, SLICE = 64, STAGES = 5, M_TILES = 4, N_BLOCKS = 4 };
enum { ROW_BYTES = 128, TILE_BYTES = 128 * ROW_BYTES, STAGE_BYTES = 2 * TILE_BYTES + 1024, ALIGN_BYTES = 1024 };
static_assert(ROW_BYTES == SLICE * 2 && TILE_BYTES == (int)WN_DENSE_KL_TILE * ROW_BYTES,
              "a stage holds a slice of two tiles");

/* What a thread copies of every slice: 16 bytes of each fourth part of the tile's rows. */
typedef struct loader {
  int64_t x, y; /* offsets of its first rows */
  uint32_t at;  /* within a tile */
  int32_t column;
  uint32_t x_exists, y_exists; /* a bit a part */
} loader;

__device__ static loader loader_of(const wn_dense_kl_sum &a, int32_t row0, int32_t key0) {
  const int32_t row = threadIdx.x / 8, part = threadIdx.x % 8;
  loader l = {(row0 + row) * a.x.row,
              (key0 + row) * a.y.row,
              (uint32_t)(row * 128 + ((part ^ (row % 8)) << 4)),
              part * 8,
              0,
              0};
  for (int i = 0; i < 4; i++) {
    if (row0 + row + i * 32 < a.chunk.n_rows) l.x_exists |= 1u << i;
    if (key0 + row + i * 32 < a.chunk.n_keys) l.y_exists |= 1u << i;
  }
  return l;
}

__device__ static void load_slice(const wn_dense_kl_sum &a, const loader &l, uint32_t stage, int32_t row0, int32_t head,
                                  int32_t slice, bool last) {
  const int64_t x = l.x + head * a.x.head, y = l.y + head * a.y.head;
  const int32_t column = slice * SLICE + l.column;
#pragma unroll
  for (int i = 0; i < 4; i++)
    wn_dense_kl_copy_8(stage + l.at + i * 4096, a.x, x + i * 32 * a.x.row, column, l.x_exists >> i & 1, a.x_vectors);
#pragma unroll
  for (int i = 0; i < 4; i++)
    wn_dense_kl_copy_8(stage + TILE_BYTES + l.at + i * 4096, a.y, y + i * 32 * a.y.row, column, l.y_exists >> i & 1,
                       a.y_vectors);
  if (last && threadIdx.x < WN_DENSE_KL_TILE) {
    const bool exists = row0 + (int32_t)threadIdx.x < a.chunk.n_rows;
    const float *term = exists ? a.term + (row0 + threadIdx.x) * a.term_row + head : a.term;
    wn_cp_async_4(stage + 2 * TILE_BYTES + threadIdx.x * 4, term, exists);
  }
}

/* s += the slice's product, for a warp's 64 rows and 32 keys */
__device__ static void multiply(float s[M_TILES][N_BLOCKS][4], uint32_t x, uint32_t y, int32_t steps) {
#pragma unroll
  for (int k = 0; k < SLICE / 16; k++) {
    if (k >= steps) break;
    uint32_t b[2][4];
#pragma unroll
    for (int n = 0; n < 2; n++) wn_ldmatrix_x4(b[n], (y ^ (k << 5)) + n * 2048);
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
      uint32_t at[4];
      wn_ldmatrix_x4(at, (x ^ (k << 5)) + m * 2048);
#pragma unroll
      for (int n = 0; n < N_BLOCKS; n++) wn_mma_bf16(s[m][n], at, b[n / 2] + n % 2 * 2);
    }
  }
}

/* One head's products into the sum; s becomes 0. */
template <bool TARGET>
__device__ static void fold_head(float sum[M_TILES][N_BLOCKS][4], float s[M_TILES][N_BLOCKS][4], const float *term,
                                 float scale) {
#pragma unroll
  for (int m = 0; m < M_TILES; m++) {
    const float t[2] = {wn_dense_kl_term<TARGET>(term[m * 16], scale),
                        wn_dense_kl_term<TARGET>(term[m * 16 + 8], scale)};
#pragma unroll
    for (int n = 0; n < N_BLOCKS; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        sum[m][n][e] = wn_dense_kl_folded<TARGET>(sum[m][n][e], s[m][n][e], t[e / 2], scale);
        s[m][n][e] = 0;
      }
  }
}

template <bool TARGET> __global__ static void __launch_bounds__(THREADS, 1) head_sum_kernel(const wn_dense_kl_sum a) {
  extern __shared__ char memory[];
  const int32_t row0 = blockIdx.x * WN_DENSE_KL_TILE, key0 = blockIdx.y * WN_DENSE_KL_TILE;
  const int2 seen = a.chunk.seen[blockIdx.x];
  if (key0 < seen.x || key0 >= seen.y) return;
  const uint32_t unaligned = wn_shared_address(memory), base = (unaligned + ALIGN_BYTES - 1) & ~(ALIGN_BYTES - 1u);
  const char *generic = memory + (base - unaligned);
  const int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_row = warp % 2 * 64, warp_key = warp / 2 * 32;
  const uint32_t x = (warp_row + lane % 16) * 128 + (((lane / 16) ^ (lane % 8)) << 4);
  const uint32_t y = TILE_BYTES + (warp_key + lane % 8 + lane / 16 * 8) * 128 + (((lane / 8 % 2) ^ (lane % 8)) << 4);
  const int32_t width = a.x.width, slices = (width + SLICE - 1) / SLICE, all = slices * a.x.heads;
  const int32_t last_steps = (width - (slices - 1) * SLICE + 15) / 16;
  const loader l = loader_of(a, row0, key0);
  float s[M_TILES][N_BLOCKS][4] = {}, sum[M_TILES][N_BLOCKS][4] = {};
  int32_t load_head = 0, load = 0, slice = 0, stage = 0, load_stage = 0;
  for (int32_t i = -(STAGES - 1); i < all; i++) {
    if (i >= 0) {
      wn_cp_async_wait<STAGES - 2>();
      __syncthreads(); /* stage i is there, and everybody is done with stage i - 1 */
    }
    if (load_head < a.x.heads) {
      load_slice(a, l, base + load_stage * STAGE_BYTES, row0, load_head, load, load == slices - 1);
      load_stage = load_stage == STAGES - 1 ? 0 : load_stage + 1;
      if (++load == slices) {
        load = 0;
        load_head++;
      }
    }
    wn_cp_async_commit();
    if (i < 0) continue;
    const uint32_t at = base + stage * STAGE_BYTES;
    const bool last = ++slice == slices;
    multiply(s, at + x, at + y, last ? last_steps : SLICE / 16);
    if (last) {
      const float *term = (const float *)(generic + stage * STAGE_BYTES + 2 * TILE_BYTES) + warp_row + lane / 4;
      fold_head<TARGET>(sum, s, term, a.scale);
      slice = 0;
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  const float share = TARGET ? 1.0f / (float)a.x.heads : 1.0f;
  float *out = a.out + (int64_t)(row0 + warp_row + lane / 4) * a.chunk.columns + key0 + warp_key + lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int n = 0; n < N_BLOCKS; n++)
#pragma unroll
      for (int side = 0; side < 2; side++)
        *(float2 *)(out + (int64_t)(m * 16 + side * 8) * a.chunk.columns + n * 8) =
            make_float2(sum[m][n][side * 2] * share, sum[m][n][side * 2 + 1] * share);
}

template <bool TARGET> static wn_status head_sum(wn_device *device, const wn_dense_kl_sum *a) {
  const size_t shared_bytes = (size_t)STAGES * STAGE_BYTES + ALIGN_BYTES;
  WN_CUDA_TRY(
      cudaFuncSetAttribute(head_sum_kernel<TARGET>, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes));
  const dim3 grid((unsigned)a->chunk.n_row_tiles, (unsigned)(a->chunk.columns / WN_DENSE_KL_TILE));
  head_sum_kernel<TARGET><<<grid, THREADS, shared_bytes, wn_cuda_stream(device)>>>(*a);
  WN_CUDA_LAUNCHED("indexer_kl_dense's head sums");
  return NULL;
}

wn_status wn_dense_kl_scores(wn_device *device, const wn_dense_kl_chunk *chunk, const wn_view<wn_bf16> &q,
                             const wn_view<wn_bf16> &k, const wn_view<float> &w, const wn_view<wn_bf16> &qa,
                             const wn_view<wn_bf16> &ka, const wn_view<float> &lse, double scale,
                             double attention_scale) {
  if (chunk->n_keys == 0) return NULL;
  wn_dense_kl_sum target = {*chunk,
                            qa,
                            ka,
                            lse.data,
                            lse.row,
                            chunk->p,
                            (float)(attention_scale * M_LOG2E),
                            wn_view_vectors(qa),
                            wn_view_vectors(ka)};
  if (ka.heads == 1) target.y.head = 0;
  const wn_dense_kl_sum index = {
      *chunk, q, k, w.data, w.row, chunk->index, (float)scale, wn_view_vectors(q), wn_view_vectors(k)};
  const bool wide[2] = {target.x_vectors && target.y_vectors, index.x_vectors && index.y_vectors};
  if (!wide[0]) WN_TRY(head_sum<true>(device, &target));
  if (!wide[1]) WN_TRY(head_sum<false>(device, &index));
  if (!wide[0] && !wide[1]) return NULL;
  return wn_dense_kl_sums_wide(device, wide[0] ? &target : NULL, wide[1] ? &index : NULL);
}
