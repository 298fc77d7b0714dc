/* The dense KL's gradients for a chunk of rows, from g = softmax(I) - p:
 *   dq[t,h] = factor w[t,h] sum_s g[t,s] 1[q.k > 0] k[s],   dw[t,h] = factor sum_s g[t,s] relu(q.k),
 *   dk[s] += factor sum_t,h g[t,s] w[t,h] 1[q.k > 0] q[t,h],   factor = coeff * scale.
 *
 * Both kernels have the shape of attention without a softmax: a block keeps a tile of X in registers, streams tiles of
 * 64 rows of Y through shared memory, makes Z = X Y^T, weighs it to P (0 where Z <= 0) and adds P Y. The query kernel
 * has X = (row, head) pairs and Y = keys; the key kernel has X = keys and Y = (row, head) pairs. All heads share the
 * keys, so pairs of several heads of one row stand side by side and g is read once, not once a head.
 *
 * The key kernel's blocks own (128 keys, a fixed range of the chunk's rows); their shares are added in order. */
#include "kernels/cuda/indexer_kl_dense.cuh"
#include "kernels/cuda/reduce.cuh"

enum { THREADS = 128, WARPS = 4, STREAMED = 64, STAGES = 3, ALIGN_BYTES = 1024, MAX_WIDTH = 256 };
/* rows of g in shared memory are padded by 8 floats: eight of them read side by side fall into different banks */
enum { QUERY_G_STRIDE = 64 + 8, KEY_G_STRIDE = 128 + 8, SUM_KEYS = 32, SUM_THREADS = 256 };

/* WIDTH: dI padded; M_TILES: 16-row tiles of X that a warp keeps. */
template <int WIDTH, int M_TILES> struct shape {
  static constexpr int steps = WIDTH / 16, row_bytes = WIDTH * 2, tile_bytes = STREAMED * row_bytes, parts = WIDTH / 8,
                       block_rows = WARPS * M_TILES * 16, slots = M_TILES * 2;
};

typedef struct gradient_params {
  wn_dense_kl_gradient in;
  int32_t heads, head_groups; /* of a tile of pairs: min(HI, tile); how many such tiles make HI */
  int32_t group;              /* rows of a tile of pairs: a power of two */
  uint32_t g_bytes;           /* of a stage */
  bool q_vectors, k_vectors, dq_pairs;
} gradient_params;

/* ---- products ---- */

/* A fragments of X; row[slot] points at a row's element 0, or is NULL for zeros. */
template <int WIDTH, int M_TILES>
__device__ static void load_x(uint32_t x[M_TILES][WIDTH / 16][4], const wn_bf16 *const row[M_TILES * 2], int32_t width,
                              bool vectors) {
  const int32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int s = 0; s < WIDTH / 16; s++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const unsigned short *from = (const unsigned short *)row[m * 2 + e % 2];
        const int32_t column = s * 16 + e / 2 * 8 + lane % 4 * 2;
        uint32_t pair = 0;
        if (from && vectors && column < width) pair = *(const uint32_t *)(from + column);
        if (from && !vectors && column < width) pair = from[column];
        if (from && !vectors && column + 1 < width) pair |= (uint32_t)from[column + 1] << 16;
        x[m][s][e] = pair;
      }
}

/* z = X Y_j^T for rows j * 16 .. j * 16 + 15 of the streamed tile */
template <int WIDTH, int M_TILES>
__device__ static void products(float z[M_TILES][2][4], const uint32_t x[M_TILES][WIDTH / 16][4], uint32_t tile,
                                int j) {
  const int32_t lane = threadIdx.x % 32;
  const uint32_t at = tile + (j * 16 + lane % 8 + lane / 16 * 8) * (WIDTH * 2) + (((lane / 8 % 2) ^ (lane % 8)) << 4);
#pragma unroll
  for (int m = 0; m < M_TILES; m++)
#pragma unroll
    for (int e = 0; e < 8; e++) z[m][e / 4][e % 4] = 0;
#pragma unroll
  for (int s = 0; s < WIDTH / 16; s++) {
    uint32_t b[4];
    wn_ldmatrix_x4(b, at ^ (s << 5));
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
      wn_mma_bf16(z[m][0], x[m][s], b);
      wn_mma_bf16(z[m][1], x[m][s], b + 2);
    }
  }
}

/* sum += P_j Y_j */
template <int WIDTH, int M_TILES>
__device__ static void accumulate(float sum[M_TILES][WIDTH / 8][4], const uint32_t p[M_TILES][4], uint32_t tile,
                                  int j) {
  const int32_t lane = threadIdx.x % 32;
  const uint32_t at = tile + (j * 16 + lane % 16) * (WIDTH * 2) + (((lane / 16) ^ (lane % 8)) << 4);
#pragma unroll
  for (int s = 0; s < WIDTH / 16; s++) {
    uint32_t b[4];
    wn_ldmatrix_x4_trans(b, at ^ (s << 5));
#pragma unroll
    for (int m = 0; m < M_TILES; m++) {
      wn_mma_bf16(sum[m][s * 2], p[m], b);
      wn_mma_bf16(sum[m][s * 2 + 1], p[m], b + 2);
    }
  }
}

/* `rows` x `floats` of g (floats a multiple of 4) to shared memory, rows `stride` floats apart */
__device__ static void load_g(uint32_t shared, const float *g, int64_t columns, int32_t rows, int32_t floats,
                              int32_t stride) {
  const int32_t parts = floats / 4;
  for (int32_t i = threadIdx.x; i < rows * parts; i += THREADS) {
    const int32_t row = i / parts, part = i % parts;
    wn_cp_async_16(shared + (row * stride + part * 4) * 4, g + row * columns + part * 4, 16);
  }
}

/* ---- dq and dw ---- */

/* Keys that the block's rows see: x .. y - 1 (0, 0: none) */
__device__ static int2 keys_of_rows(const gradient_params &a, int32_t t0) {
  int2 keys = make_int2(INT32_MAX, 0);
  for (int32_t t = t0; t < t0 + a.group && t < a.in.chunk.n_rows; t++) {
    const int32_t first = a.in.chunk.first_key[t], last = a.in.chunk.last_key[t];
    if (last <= first) continue;
    keys.x = min(keys.x, first);
    keys.y = max(keys.y, last + 1);
  }
  return keys.y ? keys : make_int2(0, 0);
}

template <int WIDTH, int M_TILES>
__device__ static void load_keys(const gradient_params &a, uint32_t stage, int32_t t0, int32_t key0) {
  typedef shape<WIDTH, M_TILES> S;
#pragma unroll
  for (int i = 0; i < STREAMED * S::parts / THREADS; i++) {
    const int32_t row = (threadIdx.x + i * THREADS) / S::parts, part = (threadIdx.x + i * THREADS) % S::parts;
    wn_dense_kl_copy_8(stage + row * S::row_bytes + ((part ^ (row % 8)) << 4), a.in.k, (key0 + row) * a.in.k.row,
                       part * 8, key0 + row < a.in.chunk.n_keys, a.k_vectors);
  }
  load_g(stage + S::tile_bytes, a.in.chunk.p + (int64_t)t0 * a.in.chunk.columns + key0, a.in.chunk.columns, a.group,
         STREAMED, QUERY_G_STRIDE);
}

/* P of 16 keys, and what they add to dw. g_at[slot]: offsets of the slots' rows of g; together: all slots are of one
 * row. */
template <int M_TILES>
__device__ static void weigh_keys(uint32_t p[M_TILES][4], float dw[M_TILES * 2], const float z[M_TILES][2][4],
                                  const float *g, const int32_t g_at[M_TILES * 2], bool together) {
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const float2 shared_g = *(const float2 *)(g + g_at[0] + n * 8);
#pragma unroll
    for (int slot = 0; slot < M_TILES * 2; slot++) {
      const float2 own = together ? shared_g : *(const float2 *)(g + g_at[slot] + n * 8);
      const float z0 = z[slot / 2][n][slot % 2 * 2], z1 = z[slot / 2][n][slot % 2 * 2 + 1];
      const float p0 = own.x * wn_dense_kl_gate(z0), p1 = own.y * wn_dense_kl_gate(z1);
      dw[slot] = fmaf(p1, z1, fmaf(p0, z0, dw[slot]));
      p[slot / 2][slot % 2 + n * 2] = wn_pack_bf16(p0, p1);
    }
  }
}

template <int WIDTH>
__device__ static void write_dq(const gradient_params &a, const float sum[WIDTH / 8][4], int side, int32_t t,
                                int32_t head) {
  const int32_t lane = threadIdx.x % 32;
  const float factor = a.in.factor * a.in.w.data[t * a.in.w.row + head];
  wn_bf16 *to = a.in.dq.data + t * a.in.dq.row + head * a.in.dq.head;
#pragma unroll
  for (int n = 0; n < WIDTH / 8; n++) {
    const int32_t column = n * 8 + lane % 4 * 2;
    const float x = sum[n][side * 2] * factor, y = sum[n][side * 2 + 1] * factor;
    if (a.dq_pairs) {
      if (column < a.in.dq.width) *(uint32_t *)(to + column) = wn_pack_bf16(x, y);
    } else {
      if (column < a.in.dq.width) to[column] = __float2bfloat16_rn(x);
      if (column + 1 < a.in.dq.width) to[column + 1] = __float2bfloat16_rn(y);
    }
  }
}

template <int WIDTH, int M_TILES>
__global__ static void __launch_bounds__(THREADS, 2) query_kernel(const gradient_params a) {
  typedef shape<WIDTH, M_TILES> S;
  extern __shared__ char memory[];
  const uint32_t unaligned = wn_shared_address(memory), base = (unaligned + ALIGN_BYTES - 1) & ~(ALIGN_BYTES - 1u);
  const char *generic = memory + (base - unaligned);
  const uint32_t stage_bytes = S::tile_bytes + a.g_bytes;
  const int32_t lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * M_TILES * 16 + lane / 4;
  const int32_t t0 = (gridDim.x - 1 - blockIdx.x) * a.group, h0 = blockIdx.y * a.heads; /* long rows begin first */
  const bool together = a.heads % (M_TILES * 16) == 0;
  int32_t g_at[S::slots];
  const wn_bf16 *row[S::slots];
#pragma unroll
  for (int slot = 0; slot < S::slots; slot++) {
    const int32_t pair = warp_row + slot * 8, t = pair / a.heads, h = h0 + pair % a.heads;
    const bool exists = t < a.group && t0 + t < a.in.chunk.n_rows && h < a.in.q.heads;
    row[slot] = exists ? a.in.q.data + (t0 + t) * a.in.q.row + h * a.in.q.head : NULL;
    g_at[slot] = (t < a.group ? t : 0) * QUERY_G_STRIDE + lane % 4 * 2;
  }
  uint32_t x[M_TILES][S::steps][4];
  load_x<WIDTH, M_TILES>(x, row, a.in.q.width, a.q_vectors);
  float sum[M_TILES][WIDTH / 8][4] = {}, dw[S::slots] = {};
  const int2 keys = keys_of_rows(a, t0);
  const int32_t begin = keys.x / STREAMED * STREAMED, tiles = (keys.y - begin + STREAMED - 1) / STREAMED;
  int32_t stage = 0, load_stage = 0;
  for (int32_t i = -(STAGES - 1); i < tiles; i++) {
    if (i >= 0) {
      wn_cp_async_wait<STAGES - 2>();
      __syncthreads(); /* stage i is there, and everybody is done with stage i - 1 */
    }
    const int32_t ahead = i + STAGES - 1;
    if (ahead < tiles) load_keys<WIDTH, M_TILES>(a, base + load_stage * stage_bytes, t0, begin + ahead * STREAMED);
    load_stage = load_stage == STAGES - 1 ? 0 : load_stage + 1;
    wn_cp_async_commit();
    if (i < 0) continue;
    const uint32_t tile = base + stage * stage_bytes;
    const float *g = (const float *)(generic + stage * stage_bytes + S::tile_bytes);
#pragma unroll
    for (int j = 0; j < STREAMED / 16; j++) {
      float z[M_TILES][2][4];
      uint32_t p[M_TILES][4];
      products<WIDTH, M_TILES>(z, x, tile, j);
      weigh_keys<M_TILES>(p, dw, z, g + j * 16, g_at, together);
      accumulate<WIDTH, M_TILES>(sum, p, tile, j);
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
#pragma unroll
  for (int slot = 0; slot < S::slots; slot++) {
    dw[slot] = wn_quad_sum(dw[slot]);
    const int32_t pair = warp_row + slot * 8, t = pair / a.heads, h = h0 + pair % a.heads;
    if (t >= a.group || t0 + t >= a.in.chunk.n_rows || h >= a.in.q.heads) continue;
    write_dq<WIDTH>(a, sum[slot / 2], slot % 2, t0 + t, h);
    if (lane % 4 == 0) a.in.dw.data[(t0 + t) * a.in.dw.row + h] = dw[slot] * a.in.factor;
  }
}

/* ---- dk ---- */

/* Where a tile of pairs finds its rows; the same for every tile. */
typedef struct pair_table {
  int64_t offset[STREAMED]; /* of q, from the tile's first row and head */
  int32_t row[STREAMED], head[STREAMED];
  int32_t visible[WN_DENSE_KL_MAX_TILES]; /* row tiles of the block's split that see its keys, in order */
  int32_t n_visible;
} pair_table;

__device__ static void fill_table(pair_table *table, const gradient_params &a, int32_t key0) {
  if (threadIdx.x < STREAMED) {
    const int32_t row = threadIdx.x / a.heads, head = threadIdx.x % a.heads;
    const bool used = row < a.group;
    table->row[threadIdx.x] = used ? row : 0;
    table->head[threadIdx.x] = used ? head : INT32_MAX / 2; /* past every head: weight 0 */
    table->offset[threadIdx.x] = used ? row * a.in.q.row + head * a.in.q.head : 0;
  }
  if (threadIdx.x == 0) {
    const int32_t from = blockIdx.y * a.in.shares.tiles_per_split;
    table->n_visible = 0;
    for (int32_t i = from; i < from + a.in.shares.tiles_per_split && i < a.in.chunk.n_row_tiles; i++)
      if (wn_dense_kl_sees(a.in.chunk, i, key0)) table->visible[table->n_visible++] = i;
  }
  __syncthreads();
}

/* Stage: the pairs of rows t0 .. t0 + group - 1 and heads h0 .. h0 + heads - 1, their g over the block's keys, their w
 */
template <int WIDTH, int M_TILES>
__device__ static void load_pairs(const gradient_params &a, const pair_table *table, uint32_t stage, int32_t t0,
                                  int32_t h0, int32_t key0) {
  typedef shape<WIDTH, M_TILES> S;
  const int64_t origin = t0 * a.in.q.row + h0 * a.in.q.head;
#pragma unroll
  for (int i = 0; i < STREAMED * S::parts / THREADS; i++) {
    const int32_t pair = (threadIdx.x + i * THREADS) / S::parts, part = (threadIdx.x + i * THREADS) % S::parts;
    const bool exists = t0 + table->row[pair] < a.in.chunk.n_rows && h0 + table->head[pair] < a.in.q.heads;
    wn_dense_kl_copy_8(stage + pair * S::row_bytes + ((part ^ (pair % 8)) << 4), a.in.q, origin + table->offset[pair],
                       part * 8, exists, a.q_vectors);
  }
  const uint32_t w = stage + S::tile_bytes, g = w + STREAMED * 4;
  if (threadIdx.x < STREAMED) {
    const int32_t t = t0 + table->row[threadIdx.x], h = h0 + table->head[threadIdx.x];
    const bool exists = t < a.in.chunk.n_rows && h < a.in.q.heads;
    wn_cp_async_4(w + threadIdx.x * 4, exists ? a.in.w.data + t * a.in.w.row + h : a.in.w.data, exists);
  }
  load_g(g, a.in.chunk.p + (int64_t)t0 * a.in.chunk.columns + key0, a.in.chunk.columns, a.group, S::block_rows,
         KEY_G_STRIDE);
}

/* P of 16 pairs from pair `at` on (the thread's first). g: the thread's first key. */
template <int M_TILES>
__device__ static void weigh_pairs(uint32_t p[M_TILES][4], const float z[M_TILES][2][4], const float *w, const float *g,
                                   const float g_row[M_TILES * 2], const int32_t *row, bool one_row) {
#pragma unroll
  for (int n = 0; n < 2; n++) {
    const float2 pair_w = *(const float2 *)(w + n * 8);
    const int2 pair_row = one_row ? make_int2(0, 0) : *(const int2 *)(row + n * 8);
#pragma unroll
    for (int slot = 0; slot < M_TILES * 2; slot++) {
      float g0 = g_row[slot], g1 = g0;
      if (!one_row) {
        g0 = g[pair_row.x * KEY_G_STRIDE + slot * 8];
        g1 = g[pair_row.y * KEY_G_STRIDE + slot * 8];
      }
      const float z0 = z[slot / 2][n][slot % 2 * 2], z1 = z[slot / 2][n][slot % 2 * 2 + 1];
      p[slot / 2][slot % 2 + n * 2] =
          wn_pack_bf16(g0 * wn_dense_kl_gate(z0) * pair_w.x, g1 * wn_dense_kl_gate(z1) * pair_w.y);
    }
  }
}

template <int WIDTH, int M_TILES>
__device__ static void write_share(const gradient_params &a, const float sum[M_TILES][WIDTH / 8][4], int32_t key) {
  const int32_t lane = threadIdx.x % 32;
  float *to = a.in.shares.data + ((int64_t)blockIdx.y * a.in.chunk.columns + key) * WIDTH + lane % 4 * 2;
#pragma unroll
  for (int slot = 0; slot < M_TILES * 2; slot++)
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++)
      *(float2 *)(to + slot * 8 * WIDTH + n * 8) =
          make_float2(sum[slot / 2][n][slot % 2 * 2], sum[slot / 2][n][slot % 2 * 2 + 1]);
}

template <int WIDTH, int M_TILES>
__global__ static void __launch_bounds__(THREADS, 2) key_kernel(const gradient_params a) {
  typedef shape<WIDTH, M_TILES> S;
  extern __shared__ char memory[];
  __shared__ pair_table table;
  const uint32_t unaligned = wn_shared_address(memory), base = (unaligned + ALIGN_BYTES - 1) & ~(ALIGN_BYTES - 1u);
  const char *generic = memory + (base - unaligned);
  const uint32_t stage_bytes = S::tile_bytes + a.g_bytes;
  const int32_t lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * M_TILES * 16 + lane / 4;
  const int32_t key0 = blockIdx.x * S::block_rows;
  fill_table(&table, a, key0);
  if (table.n_visible == 0) return;
  const wn_bf16 *row[S::slots];
#pragma unroll
  for (int slot = 0; slot < S::slots; slot++) {
    const int32_t key = key0 + warp_row + slot * 8;
    row[slot] = key < a.in.chunk.n_keys ? a.in.k.data + key * a.in.k.row : NULL;
  }
  uint32_t x[M_TILES][S::steps][4];
  load_x<WIDTH, M_TILES>(x, row, a.in.k.width, a.k_vectors);
  float sum[M_TILES][WIDTH / 8][4] = {};
  const bool one_row = a.group == 1;
  const int32_t units = WN_DENSE_KL_TILE / a.group * a.head_groups, tiles = table.n_visible * units;
  int32_t stage = 0, load_stage = 0, load_tile = 0, load_unit = 0;
  for (int32_t i = -(STAGES - 1); i < tiles; i++) {
    if (i >= 0) {
      wn_cp_async_wait<STAGES - 2>();
      __syncthreads(); /* stage i is there, and everybody is done with stage i - 1 */
    }
    if (load_tile < table.n_visible) {
      const int32_t t0 = table.visible[load_tile] * WN_DENSE_KL_TILE + load_unit / a.head_groups * a.group;
      load_pairs<WIDTH, M_TILES>(a, &table, base + load_stage * stage_bytes, t0, load_unit % a.head_groups * a.heads,
                                 key0);
      load_stage = load_stage == STAGES - 1 ? 0 : load_stage + 1;
      if (++load_unit == units) {
        load_unit = 0;
        load_tile++;
      }
    }
    wn_cp_async_commit();
    if (i < 0) continue;
    const uint32_t tile = base + stage * stage_bytes;
    const float *w = (const float *)(generic + stage * stage_bytes + S::tile_bytes), *g = w + STREAMED + warp_row;
    float g_row[S::slots];
#pragma unroll
    for (int slot = 0; slot < S::slots; slot++) g_row[slot] = g[slot * 8];
#pragma unroll
    for (int j = 0; j < STREAMED / 16; j++) {
      float z[M_TILES][2][4];
      uint32_t p[M_TILES][4];
      const int32_t pair = j * 16 + lane % 4 * 2;
      products<WIDTH, M_TILES>(z, x, tile, j);
      weigh_pairs<M_TILES>(p, z, w + pair, g, g_row, table.row + pair, one_row);
      accumulate<WIDTH, M_TILES>(sum, p, tile, j);
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }
  write_share<WIDTH, M_TILES>(a, sum, key0 + warp_row);
}

/* dk += factor * the shares of those splits that have one, in order. A block owns SUM_KEYS keys, a thread some fours of
 * their columns, which it reads side by side. */
template <int WIDTH>
__global__ static void __launch_bounds__(SUM_THREADS) add_shares_kernel(const wn_dense_kl_gradient a) {
  constexpr int FOURS = SUM_KEYS * WIDTH / 4 / SUM_THREADS;
  __shared__ bool has[WN_DENSE_KL_MAX_TILES];
  const int32_t key0 = blockIdx.x * SUM_KEYS;
  bool any = false;
  if ((int32_t)threadIdx.x < a.shares.n_splits) {
    const int32_t from = threadIdx.x * a.shares.tiles_per_split;
    for (int32_t i = from; i < from + a.shares.tiles_per_split && i < a.chunk.n_row_tiles; i++)
      any |= wn_dense_kl_sees(a.chunk, i, key0);
    has[threadIdx.x] = any;
  }
  if (!__syncthreads_or(any)) return;
  float4 sum[FOURS] = {};
  for (int32_t s = 0; s < a.shares.n_splits; s++) {
    if (!has[s]) continue;
    const float4 *share = (const float4 *)(a.shares.data + ((int64_t)s * a.chunk.columns + key0) * WIDTH);
#pragma unroll
    for (int f = 0; f < FOURS; f++) {
      const float4 x = share[f * SUM_THREADS + threadIdx.x];
      sum[f] = make_float4(sum[f].x + x.x, sum[f].y + x.y, sum[f].z + x.z, sum[f].w + x.w);
    }
  }
  /* where a four of sums goes, and how many of it are there */
  auto place = [&](int f, int32_t *here) {
    const int32_t at = 4 * (f * SUM_THREADS + (int32_t)threadIdx.x), key = key0 + at / WIDTH, column = at % WIDTH;
    *here = key < a.chunk.n_keys ? min(a.dk.width - column, 4) : 0;
    return a.dk.data + key * a.dk.row + column;
  };
  float old[FOURS][4]; /* all are read before any is written */
  int32_t here;
#pragma unroll
  for (int f = 0; f < FOURS; f++) {
    const float *from = place(f, &here);
#pragma unroll
    for (int e = 0; e < 4; e++) old[f][e] = e < here ? from[e] : 0;
  }
#pragma unroll
  for (int f = 0; f < FOURS; f++) {
    float *to = place(f, &here);
    const float own[4] = {sum[f].x, sum[f].y, sum[f].z, sum[f].w};
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (e < here) to[e] = fmaf(a.factor, own[e], old[f][e]);
  }
}

template <int WIDTH> static wn_status add_shares(wn_device *device, const wn_dense_kl_gradient *a) {
  add_shares_kernel<WIDTH><<<(unsigned)(a->chunk.columns / SUM_KEYS), SUM_THREADS, 0, wn_cuda_stream(device)>>>(*a);
  WN_CUDA_LAUNCHED("indexer_kl_dense's sum of shares");
  return NULL;
}

/* ---- launching ---- */

static int32_t power_of_two_within(int32_t x) {
  int32_t p = 1;
  while (p * 2 <= x) p *= 2;
  return p;
}

/* Tiles of `pairs` (row, head) pairs; g_floats: floats of g that one row of the tile needs in a stage. */
static void tile_pairs(gradient_params *a, int32_t pairs, int32_t g_floats, int32_t other_floats) {
  const int32_t n_heads = a->in.q.heads;
  a->heads = n_heads < pairs ? n_heads : pairs;
  a->head_groups = (n_heads + a->heads - 1) / a->heads;
  a->group = power_of_two_within(pairs / a->heads);
  a->g_bytes = (uint32_t)wn_ceil_div((a->group * g_floats + other_floats) * 4, ALIGN_BYTES) * ALIGN_BYTES;
}

template <int WIDTH, int M_TILES> static wn_status launch(wn_device *device, gradient_params a) {
  typedef shape<WIDTH, M_TILES> S;
  cudaStream_t stream = wn_cuda_stream(device);
  tile_pairs(&a, S::block_rows, QUERY_G_STRIDE, 0);
  int bytes = STAGES * (S::tile_bytes + (int)a.g_bytes) + ALIGN_BYTES;
  WN_CUDA_TRY(cudaFuncSetAttribute(query_kernel<WIDTH, M_TILES>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const dim3 queries((unsigned)wn_ceil_div(a.in.chunk.n_rows, a.group), (unsigned)a.head_groups);
  query_kernel<WIDTH, M_TILES><<<queries, THREADS, bytes, stream>>>(a);
  WN_CUDA_LAUNCHED("indexer_kl_dense's query gradient");
  tile_pairs(&a, STREAMED, KEY_G_STRIDE, STREAMED);
  bytes = STAGES * (S::tile_bytes + (int)a.g_bytes) + ALIGN_BYTES;
  WN_CUDA_TRY(cudaFuncSetAttribute(key_kernel<WIDTH, M_TILES>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  const dim3 keys((unsigned)(a.in.chunk.columns / S::block_rows), (unsigned)a.in.shares.n_splits);
  key_kernel<WIDTH, M_TILES><<<keys, THREADS, bytes, stream>>>(a);
  WN_CUDA_LAUNCHED("indexer_kl_dense's key gradient");
  return NULL;
}

int32_t wn_dense_kl_padded_width(int32_t width) {
  WN_ASSERT(width >= 1 && width <= MAX_WIDTH, "indexer width %d: 1 to %d are handled", width, (int)MAX_WIDTH);
  return width <= 64 ? 64 : width <= 128 ? 128 : 256;
}

static wn_status by_warps(wn_device *device, const wn_dense_kl_gradient *g) {
  gradient_params a = {};
  a.in = *g;
  a.q_vectors = wn_view_vectors(a.in.q);
  a.k_vectors = wn_view_vectors(a.in.k);
  a.dq_pairs = wn_view_vectors(a.in.dq);
  switch (a.in.shares.width) {
  case 64: return launch<64, 2>(device, a);
  case 128: return launch<128, 2>(device, a);
  default: return launch<256, 1>(device, a);
  }
}

wn_status wn_dense_kl_gradients(wn_device *device, const wn_dense_kl_gradient *a) {
  WN_TRY(wn_dense_kl_gradients_fit(a) ? wn_dense_kl_gradients_wide(device, a) : by_warps(device, a));
  switch (a->shares.width) {
  case 64: return add_shares<64>(device, a);
  case 128: return add_shares<128>(device, a);
  default: return add_shares<256>(device, a);
  }
}
