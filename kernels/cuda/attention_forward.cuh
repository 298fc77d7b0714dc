/* Forward of the per-head attention: a block keeps 128 rows of one head, one such unit after another where the widths
 * allow warpgroups' products, and walks the key tiles they see. A warp keeps its rows' sums, running maximum and
 * running sum of weights in registers; a maximum that has grown by much rescales what was summed. Exponentials are
 * base 2. */
#ifndef WN_KERNELS_CUDA_ATTENTION_FORWARD_CUH
#define WN_KERNELS_CUDA_ATTENTION_FORWARD_CUH

#include "kernels/cuda/attention_tile.cuh"

/* The state of the two rows that a lane has of an m16 tile. */
typedef struct wn_softmax_rows {
  float top[2];   /* a product q.k that the weights are relative to, about the largest so far; -inf: none was seen */
  float sum[2];   /* this lane's share of the sum of weights */
  float slack[2]; /* how far products may rise above it, in powers of two of their weights */
} wn_softmax_rows;

/* Unseen products become -inf; `words` of rows lane / 4 and lane / 4 + 8, a word for each 64 keys. */
template <int NT>
__device__ __forceinline__ void wn_mask_logits(float (&s)[NT][4], const uint64_t (&words)[NT / 8][2]) {
  const int col = (threadIdx.x & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int j = 0; j < NT; j++) {
      const uint64_t shifted = words[j / 8][r] >> col;
      const uint32_t half = j & 4 ? (uint32_t)(shifted >> 32) : (uint32_t)shifted;
#pragma unroll
      for (int e = 0; e < 2; e++)
        if (!((half >> (8 * (j & 3) + e)) & 1)) s[j][2 * r + e] = -INFINITY;
    }
}

/* A row's top follows the largest product, but only once that stands above it by more than the slack. BF16 and FP32
 * have exponents to spare for weights above 1 (an idea of FlashAttention 4), but a weight of 1 is exact and one above
 * it is rounded. So a weight above 1 stays below 2^8 and below an eighth of the row's sum, as it was when the top moved
 * last; where that sum is below 8 nothing may rise above the top. Rows that see one key almost alone have that key's
 * values as they are, then, and no gradient. What becomes of a row depends on no other. True: a top of the warp has
 * moved, and what was summed has to be multiplied by `decay`. */
template <int NT>
__device__ __forceinline__ bool wn_follow_top(const float (&s)[NT][4], wn_softmax_rows &rows, float (&decay)[2],
                                              float scale_log2) {
  float even[2], odd[2], top[2];
#pragma unroll
  for (int r = 0; r < 2; r++) even[r] = s[0][2 * r], odd[r] = s[0][2 * r + 1];
#pragma unroll
  for (int j = 1; j < NT; j++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      even[r] = fmaxf(even[r], s[j][2 * r]);
      odd[r] = fmaxf(odd[r], s[j][2 * r + 1]);
    }
#pragma unroll
  for (int r = 0; r < 2; r++) top[r] = fmaxf(fmaxf(even[r], odd[r]), rows.top[r]);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) /* both rows at once, which wn_quad_max one after the other would not */
#pragma unroll
    for (int r = 0; r < 2; r++) top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], lanes));
  bool far[2]; /* nothing seen before: NaN, or infinitely far */
#pragma unroll
  for (int r = 0; r < 2; r++) far[r] = (top[r] - rows.top[r]) * scale_log2 > rows.slack[r];
  if (!__any_sync(~0u, far[0] || far[1])) return false;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    decay[r] = far[r] ? wn_exp2((rows.top[r] - top[r]) * scale_log2) : 1;
    rows.sum[r] *= decay[r];
    const float slack = __log2f(wn_quad_sum(rows.sum[r])) - 3; /* until it moves again: sums grow */
    if (far[r]) rows.slack[r] = fminf(fmaxf(slack, 0), 8);
    if (far[r]) rows.top[r] = top[r];
  }
  return true;
}

/* Products to weights relative to the rows' tops, rounded as the next product's left operand; their sums as they are.
 */
template <int NT>
__device__ __forceinline__ void wn_make_weights(uint32_t (&p)[NT / 2][4], const float (&s)[NT][4],
                                                wn_softmax_rows &rows, float scale_log2) {
  float base[2], even[2] = {0, 0}, odd[2] = {0, 0};
#pragma unroll
  for (int r = 0; r < 2; r++) base[r] = rows.top[r] == -INFINITY ? 0 : rows.top[r] * scale_log2;
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float a = wn_exp2(s[j][2 * r] * scale_log2 - base[r]), b = wn_exp2(s[j][2 * r + 1] * scale_log2 - base[r]);
      even[r] += a;
      odd[r] += b;
      p[j / 2][(j & 1) * 2 + r] = wn_pack_bf16(a, b);
    }
#pragma unroll
  for (int r = 0; r < 2; r++) rows.sum[r] += even[r] + odd[r];
}

template <int NO> __device__ __forceinline__ void wn_rescale(float (&o)[NO][4], const float (&decay)[2]) {
#pragma unroll
  for (int j = 0; j < NO; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) o[j][e] *= decay[e >> 1];
}

/* A warp's outputs, rounded, to rows row0 .. of y through WN_WARP_LINES bytes of its own. */
template <int NO>
__device__ __forceinline__ void wn_put_outputs(const wn_view<wn_bf16> &y, int row0, int rows, int head,
                                               const float (&o)[NO][4], char *lines) {
  if (!wn_view_vectors(y)) {
    wn_put_rows<false>(y, row0, rows, 0, head, o, 1);
    return;
  }
#pragma unroll
  for (int c = 0; c < NO; c += 8) wn_put_lines(y, row0, rows, 8 * c, head, *(const float(*)[8][4]) & o[c], lines);
}

/* o, lse and delta of a warp's 16 rows; lines: for wn_put_outputs. gradient(r, col): d_o of row lane / 4 + 8 r, columns
 * col and col + 1, 0 past the end and the width. */
template <int NO, typename Gradient>
__device__ __forceinline__ void wn_finish_rows(const wn_attend_job &job, int head, int row0, float (&o)[NO][4],
                                               const wn_softmax_rows &rows, char *lines, Gradient gradient) {
  const int lane = threadIdx.x & 31, col = (lane & 3) * 2;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int row = row0 + (lane >> 2) + 8 * r;
    const float sum = wn_quad_sum(rows.sum[r]), inverse = sum == 0 ? 0 : 1 / sum; /* a NaN stays one */
    float delta = 0;
#pragma unroll
    for (int j = 0; j < NO; j++) {
      o[j][2 * r] *= inverse;
      o[j][2 * r + 1] *= inverse;
    }
    if (job.delta.data)
#pragma unroll
      for (int j = 0; j < NO; j++) {
        const float2 grad = gradient(r, 8 * j + col);
        delta = wn_delta_step(delta, make_float2(o[j][2 * r], o[j][2 * r + 1]), grad);
      }
    delta = wn_quad_sum(delta);
    if ((lane & 3) != 0 || row >= job.n) continue;
    job.lse.data[row * job.lse.row + head] = sum == 0 ? -INFINITY : rows.top[r] * job.scale + logf(sum);
    if (job.delta.data) job.delta.data[row * job.delta.row + head] = delta;
  }
  if (job.unrounded.data)
    wn_put_unrounded(job.unrounded, row0, job.n, head, o);
  else
    wn_put_outputs(job.o, row0, job.n, head, o, lines);
}

/* ---- any width: warp-level products ---- */

template <int DQ, int DV, bool MASKED>
__global__ void __launch_bounds__(WN_MAKERS, 1) wn_attend_forward_kernel(const __grid_constant__ wn_attend_job job) {
  extern __shared__ __align__(1024) char shared[];
  const uint32_t q = wn_shared_address(shared), k = q + WN_BLOCK_ROWS * DQ * 2, v = k + WN_TILE * DQ * 2;
  const int blocks = (job.n + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS, warp_row = (int)(threadIdx.x >> 5) * 16;
  int head, block;
  wn_block_place_last_first(job, blockIdx.x, blocks, &head, &block);
  const int row0 = block * WN_BLOCK_ROWS + warp_row, mine = row0 + (int)(threadIdx.x & 31) / 4;
  float o[DV / 8][4];
  wn_softmax_rows rows = {{-INFINITY, -INFINITY}, {0, 0}, {0, 0}};
  wn_clear(o);
  wn_key_walk walk;
  int t = wn_begin_walk<MASKED, 2>(job, block, &walk);
  if (t < walk.end) {
    wn_tile_load<WN_BLOCK_ROWS, DQ, WN_MAKERS>(q, job.q, head, block * WN_BLOCK_ROWS, job.n);
    wn_tile_load<WN_TILE, DQ, WN_MAKERS>(k, job.k, head, t * WN_TILE, job.m);
    wn_cp_async_commit();
  }
  for (int next; t < walk.end; t = next) {
    wn_cp_async_wait<0>();
    __syncthreads(); /* keys have come; the values before are done with */
    wn_tile_load<WN_TILE, DV, WN_MAKERS>(v, job.v, head, t * WN_TILE, job.m);
    wn_cp_async_commit();
    const bool full = !MASKED && t >= walk.full_low && t < walk.full_end;
    uint64_t words[1][2];
    if (!full)
#pragma unroll
      for (int r = 0; r < 2; r++) words[0][r] = wn_row_word<MASKED>(job, mine + 8 * r, t);
    float s[8][4], decay[2];
    uint32_t p[4][4];
    wn_clear(s);
    wn_product_shared<8, DQ / 16, WN_BLOCK_ROWS, WN_TILE>(s, q, warp_row, k, 0);
    next = wn_next_tile<MASKED, 2>(job, walk, block, t + 1);
    wn_cp_async_wait<0>();
    __syncthreads(); /* values have come; the keys are done with */
    if (next < walk.end) wn_tile_load<WN_TILE, DQ, WN_MAKERS>(k, job.k, head, next * WN_TILE, job.m);
    wn_cp_async_commit();
    if (!full) wn_mask_logits<8>(s, words);
    if (wn_follow_top(s, rows, decay, job.scale * WN_LOG2E)) wn_rescale(o, decay);
    wn_make_weights(p, s, rows, job.scale * WN_LOG2E);
    wn_product_registers<DV / 8, 4, WN_TILE>(o, p, v, 0);
  }
  wn_finish_rows(job, head, row0, o, rows, shared + warp_row * 128, [&](int r, int col) {
    return mine + 8 * r < job.n ? wn_get_pair(job.d_o, mine + 8 * r, head, col) : float2{0, 0};
  });
}

/* ---- widths up to 192/128: the products of warpgroups ---- */

enum { WN_GROUP_KEYS = 128 /* keys of a tile */ };

/* o += P V, under way */
template <int DV>
__device__ __forceinline__ void wn_group_values(float (&o)[DV / 8][4], const uint32_t (&p)[WN_GROUP_KEYS / 16][4],
                                                uint32_t v) {
  const uint64_t b = wn_wgmma_operand(v, WN_GROUP_KEYS * 128);
#pragma unroll
  for (int ks = 0; ks < WN_GROUP_KEYS / 16; ks++) wn_wgmma_registers(o, p[ks], b + (uint64_t)(ks * 2048 >> 4));
}

/* s = Q K^T, under way; q: a warp's rows as wn_mma_bf16's left operands */
template <int DQ>
__device__ __forceinline__ void wn_group_logits(float (&s)[WN_GROUP_KEYS / 8][4], const uint32_t (&q)[DQ / 16][4],
                                                uint32_t k) {
  const uint64_t right = wn_wgmma_operand(k, 0);
#pragma unroll
  for (int ks = 0; ks < DQ / 16; ks++)
    wn_wgmma_registers_along(s, q[ks], right + (uint64_t)((ks / 4 * (WN_GROUP_KEYS * 128) + ks % 4 * 32) >> 4), ks > 0);
}

/* Whether the rows of a walk see all of a pair of key tiles. */
template <bool MASKED> __device__ __forceinline__ bool wn_pair_is_full(const wn_key_walk &walk, int pair) {
  return !MASKED && 2 * pair >= walk.full_low && 2 * pair + 1 < walk.full_end;
}

/* What a lane's two rows see of a pair of key tiles. */
template <bool MASKED>
__device__ __forceinline__ void wn_pair_words(uint64_t (&words)[2][2], const wn_attend_job &job,
                                              const wn_key_walk &walk, int row, int pair) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int tile = 2 * pair + (i >> 1);
    words[i >> 1][i & 1] = tile < walk.end ? wn_row_word<MASKED>(job, row + 8 * (i & 1), tile) : 0;
  }
}

/* Shared memory of the kernel below: Q, two stages of keys, two of values, the warps' lines on their way out, barriers,
 * the number of the unit whose Q has come (below 0: none is left). */
template <int DQ, int DV> struct wn_forward_layout {
  static constexpr int k_bytes = WN_GROUP_KEYS * DQ * 2, v_bytes = WN_GROUP_KEYS * DV * 2;
  static constexpr int keys = WN_BLOCK_ROWS * DQ * 2, values = keys + 2 * k_bytes, lines = values + 2 * v_bytes;
  static constexpr int barriers = lines + WN_MAKERS / 32 * WN_WARP_LINES, unit = barriers + 11 * 8, bytes = unit + 8;
  static_assert(bytes <= 227 << 10, "more shared memory than a block can have");
};

/* Barriers: for each stage of keys and of values, come and done with; the same of Q and the unit's number; and the
 * number has come from the other block. */
enum { WN_K_FULL = 0, WN_K_EMPTY = 16, WN_V_FULL = 32, WN_V_EMPTY = 48, WN_Q_FULL = 64, WN_Q_EMPTY = 72, WN_TOLD = 80 };

/* What the kernel's blocks share: SHARING is 1, or 2 where two blocks of a cluster have rows of one head that follow
 * each other, and each fetches half of a tile's keys and values for both: half the traffic with the L2 cache, which is
 * power that products can have. A unit is the rows of SHARING blocks; a number names a unit of a head. */

/* The row tile of a warpgroup. Of two blocks the outer and the inner tiles, so that the last keys, which only the last
 * rows see, are as much work for both. */
template <int SHARING> __device__ __forceinline__ int wn_row_tile(int unit, int rank, int group) {
  return SHARING == 1 ? 2 * unit + group : 4 * unit + (rank == 0 ? 3 * group : 1 + group);
}

/* A block's rows of Q or d_o [128, COLS]. */
template <int COLS, int SHARING>
__device__ __forceinline__ void wn_forward_rows(uint32_t to, const CUtensorMap *map, int head, int unit, int rank,
                                                uint32_t barrier) {
#pragma unroll
  for (int c = 0; c < COLS; c += 64)
#pragma unroll
    for (int g = 0; g < 2; g++)
      wn_copy_tile_3d(to + (uint32_t)(c * 2 * WN_BLOCK_ROWS + g * WN_TILE * 128), map, c, head,
                      wn_row_tile<SHARING>(unit, rank, g) * WN_TILE, barrier);
}

/* A tile of keys or values [128, COLS], or this block's half of it to both. */
template <int COLS, int SHARING>
__device__ __forceinline__ void wn_forward_keys(uint32_t to, const CUtensorMap *map, int head, int key, int rank,
                                                uint32_t barrier) {
  if (SHARING == 1) {
    wn_tile_fetch<WN_GROUP_KEYS, COLS>(to, map, head, key, barrier);
  } else {
    constexpr int HALF = WN_GROUP_KEYS / 2;
#pragma unroll
    for (int c = 0; c < COLS; c += 64)
      wn_copy_tile_3d_to_blocks(to + (uint32_t)(c * 2 * WN_GROUP_KEYS + rank * HALF * 128), map, c, head,
                                key + rank * HALF, barrier, 3);
  }
}

/* A warp: its block, or both, may fetch the next to where this stood. */
template <int SHARING> __device__ __forceinline__ void wn_place_done(uint32_t barrier) {
  const uint32_t lane = threadIdx.x & 31;
  if (SHARING == 1) {
    if (lane == 0) wn_mbarrier_arrive(barrier);
  } else {
    if (lane < 2) wn_mbarrier_arrive_at(barrier, lane);
  }
}

/* The number of the unit to make next, once the one before is done with in Q's place; below 0: none is left. Of blocks
 * that share the first takes it and tells the other. The first unit comes from the counter too: a block that could not
 * begin with the others, since another kernel runs or no two places are free, finds the shortest units left, or none.
 */
template <int DQ, int DV, int SHARING>
__device__ __forceinline__ int wn_forward_take(char *memory, const wn_attend_job &job, int32_t *counter, int units,
                                               int rank, uint32_t turn) {
  typedef wn_forward_layout<DQ, DV> layout;
  const uint32_t shared = wn_shared_address(memory), barriers = shared + layout::barriers;
  volatile int32_t *const here = (volatile int32_t *)(memory + layout::unit);
  const int taken = rank == 0 ? atomicAdd(counter, 1) : 0, at = taken < units * job.heads ? taken : -1;
  wn_mbarrier_wait(barriers + WN_Q_EMPTY, (turn & 1) ^ 1); /* passes at once the first time, as those for keys */
  if (rank == 0) {
    *here = at;
    if (SHARING > 1) wn_cluster_send(shared + layout::unit, at, barriers + WN_TOLD, 1);
    return at;
  }
  wn_mbarrier_expect(barriers + WN_TOLD, sizeof *here);
  wn_mbarrier_wait_cluster(barriers + WN_TOLD, turn & 1);
  return *here;
}

/* The thread that starts all copies. Of a unit the last is d_o, for delta, in the place of the next keys. The next unit
 * is taken when all copies are under way, not before, lest a block with much to do holds one that another could begin.
 */
template <int DQ, int DV, bool MASKED, int SHARING>
__device__ __forceinline__ void wn_forward_produce(char *memory, const wn_attend_job &job, const wn_attend_maps &maps,
                                                   int32_t *counter, int units, int rank) {
  typedef wn_forward_layout<DQ, DV> layout;
  const uint32_t shared = wn_shared_address(memory), barriers = shared + layout::barriers;
  uint32_t keys = 0, values = 0; /* tiles fetched */
  /* the barrier at which so many bytes are to come, once the tile two before is done with */
  auto expect = [&](uint32_t full, uint32_t empty, uint32_t tiles, int bytes) {
    const uint32_t stage = 8 * (tiles & 1);
    wn_mbarrier_wait(barriers + empty + stage, (tiles >> 1 & 1) ^ 1);
    wn_mbarrier_expect(barriers + full + stage, (uint32_t)bytes);
    return barriers + full + stage;
  };
  for (uint32_t turn = 0;; turn++) {
    int head, unit;
    const int at = wn_forward_take<DQ, DV, SHARING>(memory, job, counter, units, rank, turn);
    if (at < 0) {
      wn_mbarrier_arrive(barriers + WN_Q_FULL);
      return;
    }
    wn_block_place_last_first(job, (uint32_t)at, units, &head, &unit);
    wn_key_walk walk;
    int pair = wn_begin_walk<MASKED, 2 * SHARING>(job, unit, &walk) / 2;
    if (2 * pair < walk.end) {
      wn_mbarrier_expect(barriers + WN_Q_FULL, WN_BLOCK_ROWS * DQ * 2);
      wn_forward_rows<DQ, SHARING>(shared, &maps.q, head, unit, rank, barriers + WN_Q_FULL);
    } else {
      wn_mbarrier_arrive(barriers + WN_Q_FULL);
    }
    for (; 2 * pair < walk.end; keys++, values++) {
      const uint32_t k = expect(WN_K_FULL, WN_K_EMPTY, keys, layout::k_bytes);
      wn_forward_keys<DQ, SHARING>(shared + layout::keys + (keys & 1) * layout::k_bytes, &maps.k, head,
                                   pair * WN_GROUP_KEYS, rank, k);
      const uint32_t v = expect(WN_V_FULL, WN_V_EMPTY, values, layout::v_bytes);
      wn_forward_keys<DV, SHARING>(shared + layout::values + (values & 1) * layout::v_bytes, &maps.v, head,
                                   pair * WN_GROUP_KEYS, rank, v);
      pair = wn_next_tile<MASKED, 2 * SHARING>(job, walk, unit, 2 * pair + 2) / 2;
    }
    if (job.delta.data) {
      const uint32_t k = expect(WN_K_FULL, WN_K_EMPTY, keys, WN_BLOCK_ROWS * DV * 2);
      wn_forward_rows<DV, SHARING>(shared + layout::keys + (keys & 1) * layout::k_bytes, &maps.d_o, head, unit, rank,
                                   k);
      keys++;
    }
  }
}

/* Takes the next keys and values, which only other rows see, and gives them back. */
template <int SHARING>
__device__ __forceinline__ void wn_forward_pass_over(uint32_t barriers, uint32_t &keys, uint32_t &values) {
  const uint32_t k = 8 * (keys & 1), v = 8 * (values & 1);
  wn_mbarrier_wait(barriers + WN_K_FULL + k, keys++ >> 1 & 1);
  __syncwarp();
  wn_place_done<SHARING>(barriers + WN_K_EMPTY + k);
  wn_mbarrier_wait(barriers + WN_V_FULL + v, values++ >> 1 & 1);
  __syncwarp();
  wn_place_done<SHARING>(barriers + WN_V_EMPTY + v);
}

/* A warp's rows of Q as left operands, after which the next unit's may come. Where a unit sees no key no Q has come:
 * these are then whatever stood there, and not used. */
template <int DQ, int SHARING>
__device__ __forceinline__ void wn_forward_queries(uint32_t (&q)[DQ / 16][4], uint32_t from, int warp_row,
                                                   uint32_t empty) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int ks = 0; ks < DQ / 16; ks++)
    wn_ldmatrix_x4(q[ks], wn_tile_at<WN_BLOCK_ROWS>(from, warp_row + (lane & 15), 2 * ks + (lane >> 4)));
  __syncwarp();
  wn_place_done<SHARING>(empty);
}

/* A warp's results; d_o, for delta, comes as the keys after the last. */
template <int DQ, int DV, int SHARING>
__device__ __forceinline__ void wn_forward_finish(char *shared, const wn_attend_job &job, int head, int row0,
                                                  float (&o)[DV / 8][4], const wn_softmax_rows &rows, int warp_row,
                                                  uint32_t &keys) {
  typedef wn_forward_layout<DQ, DV> layout;
  const uint32_t barriers = wn_shared_address(shared) + layout::barriers, k = keys & 1;
  const int lane = threadIdx.x & 31;
  const char *d_o = shared + layout::keys + k * layout::k_bytes;
  if (job.delta.data) wn_mbarrier_wait(barriers + WN_K_FULL + 8 * k, keys >> 1 & 1);
  wn_finish_rows(job, head, row0, o, rows, shared + layout::lines + warp_row / 16 * WN_WARP_LINES, [&](int r, int col) {
    const uint32_t to = wn_tile_at<WN_BLOCK_ROWS>(0, warp_row + lane / 4 + 8 * r, col >> 3) + (uint32_t)(col & 7) * 2;
    return __bfloat1622float2(*(const __nv_bfloat162 *)(d_o + to));
  });
  if (!job.delta.data) return;
  __syncwarp();
  wn_place_done<SHARING>(barriers + WN_K_EMPTY + 8 * k);
  keys++;
}

/* A warpgroup's 64 rows of a unit whose Q has come; keys, values: tiles done with so far. Q goes to registers, since
 * its reads from shared memory would be a quarter of all that products read there. The next logits and these weights'
 * products run together, and the softmax is made mostly while the other warpgroup's do, so its length counts: tiles
 * that are seen whole have a loop of their own without the mask's code, weights are packed as they come, and the branch
 * on whether tops move keeps the assembler from making the maxima after the wait for P V. No wait stands in that
 * branch: those of a warpgroup's four warps go in step. */
template <int DQ, int DV, bool MASKED, int SHARING>
__device__ __forceinline__ void wn_forward_unit(char *shared, const wn_attend_job &job, int head, int unit, int rank,
                                                uint32_t &keys, uint32_t &values) {
  typedef wn_forward_layout<DQ, DV> layout;
  constexpr int KEYS = WN_GROUP_KEYS;
  const uint32_t base = wn_shared_address(shared), barriers = base + layout::barriers;
  const int warp_row = (int)(threadIdx.x >> 5) * 16, lane = threadIdx.x & 31;
  const int row_tile = wn_row_tile<SHARING>(unit, rank, wn_uniform((int)threadIdx.x / 128));
  const int row0 = row_tile * WN_TILE + warp_row % WN_TILE, mine = row0 + lane / 4;
  const float scale_log2 = job.scale * WN_LOG2E;
  float o[DV / 8][4], decay[2];
  wn_softmax_rows rows = {{-INFINITY, -INFINITY}, {0, 0}, {0, 0}};
  wn_clear(o);
  wn_key_walk walk; /* of the unit; all warps go along */
  int pair = wn_begin_walk<MASKED, 2 * SHARING>(job, unit, &walk) / 2;
  wn_key_walk own = walk; /* of these rows */
  const int first = MASKED ? pair : wn_begin_walk<MASKED, 1>(job, row_tile, &own) / 2;
  float s[KEYS / 8][4];
  uint32_t p[KEYS / 16][4], q[DQ / 16][4];
  uint64_t words[2][2];
  wn_forward_queries<DQ, SHARING>(q, base, warp_row, barriers + WN_Q_EMPTY);
  if (2 * pair < own.end) {
    for (; pair < first; pair++) wn_forward_pass_over<SHARING>(barriers, keys, values);
    /* the stage of the next keys or values, which have come; products may begin */
    auto come = [&](uint32_t full, uint32_t tiles) {
      wn_mbarrier_wait(barriers + full + 8 * (tiles & 1), tiles >> 1 & 1);
      wn_wgmma_fence();
      return tiles & 1;
    };
    /* s = Q K^T of the next keys, under way */
    auto start_logits = [&]() {
      wn_group_logits<DQ>(s, q, base + layout::keys + come(WN_K_FULL, keys) * layout::k_bytes);
      wn_wgmma_commit();
    };
    /* once they have come: the keys are done with; what rows do not see is masked */
    auto end_logits = [&](bool full) {
      wn_wgmma_settle(s);
      wn_place_done<SHARING>(barriers + WN_K_EMPTY + 8 * (keys & 1));
      keys++;
      if (!full) wn_mask_logits(s, words);
    };
    /* o += P V, under way */
    auto add_values = [&]() {
      wn_group_values<DV>(o, p, base + layout::values + come(WN_V_FULL, values) * layout::v_bytes);
      wn_wgmma_commit();
    };
    auto end_values = [&]() {
      wn_wgmma_wait<0>();
      wn_wgmma_settle(o);
      wn_place_done<SHARING>(barriers + WN_V_EMPTY + 8 * (values & 1));
      values++;
    };
    /* the tile's weights; on to the next tile */
    auto make_weights = [&]() {
      wn_make_weights(p, s, rows, scale_log2);
      pair = wn_next_tile<MASKED, 2 * SHARING>(job, walk, unit, 2 * pair + 2) / 2;
    };
    /* one tile; FULL: seen whole */
    auto tile = [&]<bool FULL>() {
      start_logits();
      add_values();
      if (!FULL) wn_pair_words<MASKED>(words, job, own, mine, pair);
      wn_wgmma_wait<1>();
      end_logits(FULL);
      const bool moved = wn_follow_top(s, rows, decay, scale_log2);
      end_values();
      if (moved) wn_rescale(o, decay);
      make_weights();
    };
    start_logits();
    const bool full = wn_pair_is_full<MASKED>(own, pair);
    if (!full) wn_pair_words<MASKED>(words, job, own, mine, pair);
    wn_wgmma_wait<0>();
    end_logits(full);
    wn_follow_top(s, rows, decay, scale_log2);
    make_weights();
    while (2 * pair < own.end) {
      while (wn_pair_is_full<MASKED>(own, pair)) tile.template operator()<true>();
      if (2 * pair < own.end) tile.template operator()<false>();
    }
    add_values();
    end_values();
  }
  for (; 2 * pair < walk.end; pair = wn_next_tile<MASKED, 2 * SHARING>(job, walk, unit, 2 * pair + 2) / 2)
    wn_forward_pass_over<SHARING>(barriers, keys, values);
  wn_forward_finish<DQ, DV, SHARING>(shared, job, head, row0, o, rows, warp_row, keys);
}

/* Two warpgroups of 64 rows each, and one whose first thread starts the copies, two tiles of 128 keys ahead. Units are
 * made until none is left: the next one's first tiles are fetched while this one's rows go out. counter: units that
 * blocks have asked for, 0 at the start. */
template <int DQ, int DV, bool MASKED, int SHARING>
__global__ void __cluster_dims__(SHARING, 1, 1) __launch_bounds__(WN_GROUP_THREADS, 1)
    wn_attend_forward_group_kernel(const __grid_constant__ wn_attend_job job,
                                   const __grid_constant__ wn_attend_maps maps, int32_t *counter) {
  extern __shared__ __align__(1024) char shared[];
  typedef wn_forward_layout<DQ, DV> layout;
  const uint32_t barriers = wn_shared_address(shared) + layout::barriers;
  const int units = (job.n + SHARING * WN_BLOCK_ROWS - 1) / (SHARING * WN_BLOCK_ROWS);
  const int rank = (int)blockIdx.x % SHARING; /* wn_cluster_rank, but known to be the same in all threads */
  if (threadIdx.x == 0) {
    for (uint32_t stage = 0; stage < 16; stage += 8) {
      wn_mbarrier_init(barriers + WN_K_FULL + stage, 1);
      wn_mbarrier_init(barriers + WN_V_FULL + stage, 1);
      wn_mbarrier_init(barriers + WN_K_EMPTY + stage, SHARING * WN_MAKERS / 32);
      wn_mbarrier_init(barriers + WN_V_EMPTY + stage, SHARING * WN_MAKERS / 32);
    }
    wn_mbarrier_init(barriers + WN_Q_FULL, 1);
    wn_mbarrier_init(barriers + WN_Q_EMPTY, SHARING * WN_MAKERS / 32);
    wn_mbarrier_init(barriers + WN_TOLD, 1);
    wn_mbarrier_init_fence();
  }
  if (SHARING == 1)
    __syncthreads();
  else
    wn_cluster_sync();
  if (threadIdx.x >= WN_MAKERS) {
    wn_registers_shrink<24>();
    if (threadIdx.x == WN_MAKERS) wn_forward_produce<DQ, DV, MASKED, SHARING>(shared, job, maps, counter, units, rank);
  } else {
    wn_registers_grow<240>();
    uint32_t keys = 0, values = 0;
    for (uint32_t turn = 0;; turn++) {
      wn_mbarrier_wait(barriers + WN_Q_FULL, turn & 1);
      /* lane 0, since its arrival at Q_EMPTY is what lets the next number come, in both blocks */
      const int at = wn_uniform((threadIdx.x & 31) == 0 ? *(const volatile int32_t *)(shared + layout::unit) : 0);
      if (at < 0) break;
      int head, unit;
      wn_block_place_last_first(job, (uint32_t)at, units, &head, &unit);
      wn_forward_unit<DQ, DV, MASKED, SHARING>(shared, job, head, unit, rank, keys, values);
    }
  }
  if (SHARING == 1) return;
  __syncwarp();
  wn_cluster_sync(); /* the other block arrives at this one's barriers */
}

template <bool MASKED> struct wn_attend_forward_launch {
  wn_device *device;
  const wn_attend_job *job;

  template <int DQ, int DV, int SHARING> wn_status run_groups() const {
    const size_t mark = wn_arena_mark(device->scratch);
    wn_attend_maps maps;
    void *counter;
    WN_TRY(wn_attend_describe(&maps, job, WN_TILE, WN_GROUP_KEYS / SHARING));
    WN_TRY(wn_cuda_scratch(device, &counter, "units taken", sizeof(int32_t)));
    WN_CUDA_TRY(cudaMemsetAsync(counter, 0, sizeof(int32_t), wn_cuda_stream(device)));
    const int64_t all_units = wn_ceil_div(job->n, SHARING * WN_BLOCK_ROWS) * job->heads;
    const int64_t at_once = wn_cuda_of(device)->n_sms / SHARING;
    WN_ASSERT(all_units <= INT32_MAX / 2, "attention over %d rows of %d heads", job->n, job->heads);
    WN_TRY(wn_attend_launch(device, wn_attend_forward_group_kernel<DQ, DV, MASKED, SHARING>,
                            SHARING * (all_units < at_once ? all_units : at_once), WN_GROUP_THREADS,
                            wn_forward_layout<DQ, DV>::bytes, *job, maps, (int32_t *)counter));
    wn_arena_release(device->scratch, mark);
    return NULL;
  }

  template <int DQ, int DV> wn_status run() const {
    if constexpr (DV > 128) {
      return wn_attend_launch(device, wn_attend_forward_kernel<DQ, DV, MASKED>,
                              wn_ceil_div(job->n, WN_BLOCK_ROWS) * job->heads, WN_MAKERS,
                              (WN_BLOCK_ROWS * DQ + WN_TILE * (DQ + DV)) * 2, *job);
    } else {
      /* Blocks that share keys wait for each other, some 3%, and gain more only where launches are long enough, or many
       * enough, for the GPU to come to its power limit (tests/cuda/attention_dense.c knows the number). */
      const int64_t products = (int64_t)job->n * job->m * job->heads;
      if constexpr (!MASKED)
        if (products >= (int64_t)1 << 32 && job->n >= 8 * WN_BLOCK_ROWS) return run_groups<DQ, DV, 2>();
      return run_groups<DQ, DV, 1>();
    }
  }
};

#endif
