/* Attention with keys and values of their own for each head, over the keys of a selection.
 *
 * The idea: below about 16K tokens a dense walk with a mask is cheaper than gathering. The selection becomes a word of
 * 64 bits for each row and key tile, once for all heads (attention_plan.cu); the kernels are the dense ones, which read
 * these words instead of comparing keys, and skip tiles in which none of their rows picks.
 * p, the mean over heads at the picks: a block takes 128 rows and 128 keys and walks the heads, like one product whose
 * inner dimension is all heads' columns, with exp at each head's end; the sum over heads stays in registers and goes
 * straight to the picks' places.
 *
 * Ladder, 192/128, 16 heads, T = 8192, k = 2048 picks spread over all keys; forward with delta, backward without p, p
 * alone:
 *   1  warp-level products, cp.async                             1.65 ms   5.47 ms   1.30 ms
 *   2  warpgroup products (p: 1)                                 1.15      3.04      1.32
 *   3  a third warpgroup starts the copy engine                  0.80      2.47      0.67
 *   4  dS made once, for keys, and multiplied from scratch                 1.76
 * 4 ships; the dense operation takes 0.56 and 1.73 ms there. With the last 2048 keys as picks, so that tiles are
 * skipped, forward and p: 0.41 and 0.40 ms. T = 16384, spread: 2.34, 7.44 and 2.55 ms. p runs at 307 and 323 TFLOP/s;
 * its products at full rate would ask the L2 cache for 64 bytes a clock and multiprocessor, more than it gives. */
#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_forward.cuh"

enum {
  P_STAGES = 6,
  P_DEPTH = 64,                 /* columns of a stage */
  P_CHUNKS = WN_BLOCK_ROWS / 8, /* of eight keys, of a thread's two rows */
  P_STAGE_BYTES = 2 * WN_BLOCK_ROWS * P_DEPTH * 2,
  P_FULL = P_STAGES * P_STAGE_BYTES, /* barriers of stages: come, done with */
  P_EMPTY = P_FULL + 8 * P_STAGES,
  P_BYTES = P_EMPTY + 8 * P_STAGES
};

/* The sums of picked keys to their places. */
__device__ static void put_weights(const wn_view<float> &p, const float (&sum)[P_CHUNKS][4], const wn_attend_job &job,
                                   const wn_view<int32_t> &selection, int row0, int tile0) {
  const int lane = threadIdx.x & 31, col = (lane & 3) * 2;
  const float factor = 1 / (float)job.heads;
  /* a lane looks up one of the warp's 16 rows for one of the two key tiles */
  const int asked = row0 + lane % 16, side = lane / 16;
  const int32_t below =
      asked < job.n ? wn_picks_below(selection.data + asked * selection.row, selection.width, (tile0 + side) * WN_TILE)
                    : 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int half = i >> 1, r = 8 * (i & 1) + (lane >> 2), row = row0 + r;
    const int32_t before = __shfl_sync(~0u, below, 16 * half + r);
    if (row >= job.n || (tile0 + half) * WN_TILE >= job.m) continue;
    const uint64_t word = job.words[(tile0 + half) * job.word_pitch + row];
    float *to = p.data + row * p.row + before;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int bit = 8 * j + col + e;
        if (word >> bit & 1) to[__popcll(word & ((1ull << bit) - 1))] = sum[8 * half + j][2 * (i & 1) + e] * factor;
      }
  }
}

/* Where a block of p stands. */
typedef struct p_block {
  uint32_t base; /* of its shared memory */
  int32_t row0, key0, warp_row, chunks;
} p_block;

/* The thread that starts all copies. */
__device__ static void produce(const wn_attend_job &job, const wn_attend_maps &maps, const p_block &b) {
  wn_walk_place at = {0, 0};
  for (int head = 0; head < job.heads; head++)
    for (int chunk = 0; chunk < b.chunks; chunk++) {
      const uint32_t q = b.base + at.stage * P_STAGE_BYTES, full = b.base + P_FULL + 8 * at.stage;
      wn_mbarrier_wait(b.base + P_EMPTY + 8 * at.stage, at.parity ^ 1); /* passes at once the first time round */
      wn_mbarrier_expect(full, P_STAGE_BYTES);
      wn_copy_tile_3d(q, &maps.q, chunk * P_DEPTH, head, b.row0, full);
      wn_copy_tile_3d(q + P_STAGE_BYTES / 2, &maps.k, chunk * P_DEPTH, head, b.key0, full);
      wn_walk_on(at, P_STAGES);
    }
}

/* The weights of one head from its products; head -1: nothing. */
__device__ __forceinline__ static void add_head(float (&sum)[P_CHUNKS][4], const float (&s)[P_CHUNKS][4],
                                                const wn_attend_job &job, const p_block &b, int head) {
  const int row = b.row0 + b.warp_row + (int)(threadIdx.x & 31) / 4;
  float base[2] = {INFINITY, INFINITY};
#pragma unroll
  for (int r = 0; r < 2; r++)
    if (head >= 0 && row + 8 * r < job.n) base[r] = job.lse.data[(row + 8 * r) * job.lse.row + head] * WN_LOG2E;
#pragma unroll
  for (int j = 0; j < P_CHUNKS; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) sum[j][e] += wn_exp2(s[j][e] * (job.scale * WN_LOG2E) - base[e >> 1]);
}

/* One head's products into s, while the weights of the head before, whose products are in `old`, are added to sum. */
__device__ __forceinline__ static void walk_head(float (&sum)[P_CHUNKS][4], float (&s)[P_CHUNKS][4],
                                                 const float (&old)[P_CHUNKS][4], const wn_attend_job &job,
                                                 const p_block &b, int head, wn_walk_place &at) {
  wn_walk_place release = at;
  for (int chunk = 0; chunk < b.chunks; chunk++) {
    const uint32_t q = b.base + at.stage * P_STAGE_BYTES, k = q + P_STAGE_BYTES / 2;
    const uint64_t left = wn_wgmma_operand(q + b.warp_row / 64 * 64 * 128, 0), right = wn_wgmma_operand(k, 0);
    wn_mbarrier_wait(b.base + P_FULL + 8 * at.stage, at.parity);
    wn_wgmma_fence();
#pragma unroll
    for (int ks = 0; ks < P_DEPTH / 16; ks++)
      wn_wgmma<WN_ALONG, WN_ALONG>(s, left + (uint64_t)(ks * 32 >> 4), right + (uint64_t)(ks * 32 >> 4),
                                   chunk + ks > 0);
    wn_wgmma_commit();
    wn_walk_on(at, P_STAGES);
  }
  add_head(sum, old, job, b, head - 1);
  wn_wgmma_wait<0>();
  wn_wgmma_settle(s);
  for (int chunk = 0; chunk < b.chunks; chunk++) {
    if (threadIdx.x % 32 == 0) wn_mbarrier_arrive(b.base + P_EMPTY + 8 * release.stage);
    wn_walk_on(release, P_STAGES);
  }
}

__device__ static void make_weights(const wn_attend_job &job, const p_block &b, const wn_view<float> &p,
                                    const wn_view<int32_t> &selection) {
  float sum[P_CHUNKS][4], s[2][P_CHUNKS][4];
  wn_walk_place at = {0, 0};
  int head = 0;
  wn_clear(sum);
  wn_clear(s[0]);
  wn_clear(s[1]);
  for (; head + 1 < job.heads; head += 2) {
    walk_head(sum, s[0], s[1], job, b, head, at);
    walk_head(sum, s[1], s[0], job, b, head + 1, at);
  }
  if (head < job.heads) {
    walk_head(sum, s[0], s[1], job, b, head, at);
    add_head(sum, s[0], job, b, head);
  } else {
    add_head(sum, s[1], job, b, head - 1);
  }
  put_weights(p, sum, job, selection, b.row0 + b.warp_row, b.key0 / WN_TILE);
}

__global__ static void __launch_bounds__(WN_GROUP_THREADS, 1)
    p_kernel(const __grid_constant__ wn_attend_job job, const __grid_constant__ wn_attend_maps maps, wn_view<float> p,
             wn_view<int32_t> selection) {
  extern __shared__ __align__(1024) char shared[];
  const int key_blocks = (job.m + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS;
  const int key_block = blockIdx.x % key_blocks, row_block = blockIdx.x / key_blocks;
  if (!wn_row_tile_active<true>(job, 2 * row_block, key_block) &&
      !wn_row_tile_active<true>(job, 2 * row_block + 1, key_block))
    return;
  const p_block b = {wn_shared_address(shared), row_block * WN_BLOCK_ROWS, key_block * WN_BLOCK_ROWS,
                     (int)(threadIdx.x >> 5) * 16, (job.q.width + P_DEPTH - 1) / P_DEPTH};
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < 8 * P_STAGES; i += 8) {
      wn_mbarrier_init(b.base + P_FULL + i, 1);
      wn_mbarrier_init(b.base + P_EMPTY + i, WN_MAKERS / 32);
    }
    wn_mbarrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x >= WN_MAKERS) {
    wn_registers_shrink<24>();
    if (threadIdx.x == WN_MAKERS) produce(job, maps, b);
  } else {
    wn_registers_grow<240>();
    make_weights(job, b, p, selection);
  }
}

static wn_status mean_probabilities(wn_device *device, const wn_attend_job *job, const wn_view<float> &p,
                                    const wn_view<int32_t> &selection) {
  const int64_t blocks = wn_ceil_div(job->n, WN_BLOCK_ROWS) * wn_ceil_div(job->m, WN_BLOCK_ROWS);
  if (blocks == 0) return NULL;
  WN_ASSERT(blocks <= INT32_MAX, "%lld blocks of rows and keys", (long long)blocks);
  wn_attend_maps maps;
  WN_TRY(wn_attend_describe(&maps, job, WN_BLOCK_ROWS, WN_BLOCK_ROWS));
  WN_CUDA_TRY(cudaFuncSetAttribute(p_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P_BYTES));
  p_kernel<<<(unsigned)blocks, WN_GROUP_THREADS, P_BYTES, wn_cuda_stream(device)>>>(*job, maps, p, selection);
  WN_CUDA_LAUNCHED("attention probabilities");
  return NULL;
}

/* ---- runs of rows, or of keys ---- */

/* Rows of a run over all keys, so that its words take no more than the whole selection (or 256 rows' words). */
static int64_t run_rows(int64_t n, int64_t m, int64_t k) {
  const int64_t fits = m > 0 ? n * k * 32 / m : n;
  return wn_ceil_div(fits < 256 ? 256 : fits, WN_BLOCK_ROWS) * WN_BLOCK_ROWS;
}

/* Keys of a run over all rows, likewise (or 128 keys' words). */
static int64_t run_keys(int64_t k) {
  return wn_ceil_div(k < 1 ? 1 : 32 * k, WN_BLOCK_ROWS) * WN_BLOCK_ROWS;
}

/* Rows at .. at + step - 1 of a job and its selection, with their words in scratch where the job has none. */
static wn_status begin_run(wn_device *device, wn_attend_job *run, wn_view<int32_t> *picks, int64_t at, int64_t step) {
  wn_take_rows(run, at, run->n - at < step ? run->n - at : step);
  wn_skip_rows(picks, at);
  return run->words ? NULL : wn_attend_plan_words(device, run, *picks, 0, run->m);
}

/* dq, dk and dv, a run of keys at a time: each is rounded once, however many runs there are. */
static wn_status gradients(wn_device *device, const wn_attend_job *job, const wn_view<int32_t> &picks) {
  const int64_t step = run_keys(picks.width);
  void *sum = NULL;
  if (job->m > step) WN_TRY(wn_cuda_scratch(device, &sum, "query gradients", (int64_t)job->n * job->heads * 256 * 4));
  int64_t at = 0;
  do {
    const size_t mark = wn_arena_mark(device->scratch);
    wn_attend_job run = *job;
    wn_take_keys(&run, at, job->m - at < step ? job->m - at : step);
    if (!run.words) WN_TRY(wn_attend_plan_words(device, &run, picks, (int32_t)at, job->m));
    WN_TRY(wn_with_widths(run.q.width, run.v.width,
                          wn_attend_backward_launch<true>{device, &run, (float *)sum, at == 0, at + step >= job->m}));
    wn_arena_release(device->scratch, mark);
    at += step;
  } while (at < job->m);
  return NULL;
}

/* p, a run of rows at a time */
static wn_status probabilities(wn_device *device, const wn_attend_job *job, const wn_view<int32_t> &picks,
                               const wn_view<float> &p) {
  const int64_t step = run_rows(job->n, job->m, picks.width);
  for (int64_t at = 0; at < job->n; at += step) {
    const size_t mark = wn_arena_mark(device->scratch);
    wn_attend_job run = *job;
    wn_view<int32_t> run_picks = picks;
    wn_view<float> places = p;
    WN_TRY(begin_run(device, &run, &run_picks, at, step));
    wn_skip_rows(&places, at);
    WN_TRY(mean_probabilities(device, &run, places, run_picks));
    wn_arena_release(device->scratch, mark);
  }
  return NULL;
}

static wn_view<int32_t> picks_of(const wn_tensor *selection, int64_t n) {
  WN_ASSERT(selection->rank == 2 && selection->dim[0] == n, "a selection of [%lld, ...], %lld rows wanted",
            (long long)selection->dim[0], (long long)n);
  return wn_view_of<int32_t>(selection);
}

wn_status wn_cuda_attention_masked(wn_device *device, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                   const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k, const wn_tensor *v,
                                   const wn_tensor *selection, const wn_rows *rows, const wn_attention_params *params) {
  const size_t mark = wn_arena_mark(device->scratch);
  const wn_view<int32_t> picks = picks_of(selection, rows->n_rows);
  wn_attend_job job;
  WN_TRY(wn_attend_begin_forward(device, &job, o, lse, delta, d_o, q, k, v, rows, params));
  const int64_t step = run_rows(job.n, job.m, picks.width);
  for (int64_t at = 0; at < job.n && job.heads > 0; at += step) {
    const size_t run_mark = wn_arena_mark(device->scratch);
    wn_attend_job run = job;
    wn_view<int32_t> run_picks = picks;
    WN_TRY(begin_run(device, &run, &run_picks, at, step));
    WN_TRY(wn_with_widths(run.q.width, run.v.width, wn_attend_forward_launch<true>{device, &run}));
    wn_arena_release(device->scratch, run_mark);
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}

wn_status wn_cuda_attention_masked_backward(wn_device *device, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                            wn_tensor *p, const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                            const wn_tensor *v, const wn_tensor *selection, const wn_tensor *lse,
                                            const wn_tensor *delta, const wn_rows *rows,
                                            const wn_attention_params *params) {
  const size_t mark = wn_arena_mark(device->scratch);
  const wn_view<int32_t> picks = picks_of(selection, rows->n_rows);
  wn_attend_job job;
  WN_TRY(wn_attend_begin_backward(device, &job, dq, dk, dv, d_o, q, k, v, lse, delta, rows, params));
  if (p) {
    WN_CUDA_EXPECT(p, WN_F32, 2, job.n, picks.width, 0);
    WN_TRY(wn_cuda_zero(device, p)); /* places without a pick */
  }
  if (job.n > 0 && job.heads > 0) {
    if (run_rows(job.n, job.m, picks.width) >= job.n && run_keys(picks.width) >= job.m)
      WN_TRY(wn_attend_plan_words(device, &job, picks, 0, job.m)); /* one run of either kind: the same words */
    if (dq) WN_TRY(gradients(device, &job, picks));
    if (p) WN_TRY(probabilities(device, &job, picks, wn_view_of<float>(p)));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
