/* Attention with keys and values of their own for each head, over the keys of a selection.
 *
 * The idea: below about 16K tokens a dense walk with a mask is cheaper than gathering. The selection becomes a word of
 * 64 bits for each row and key tile, once for all heads (attention_plan.cu); the kernels are the dense ones, which read
 * these words instead of comparing keys, and skip tiles in which none of their rows picks.
 * p, the mean over heads at the picks: a block takes 128 rows and 128 keys and walks the heads, like one product whose
 * inner dimension is all heads' columns, with exp at each head's end; the sum over heads stays in registers and goes
 * straight to the picks' places. */
#include "kernels/cuda/attention_backward.cuh"
#include "kernels/cuda/attention_forward.cuh"

enum { P_THREADS = 256, P_STAGES = 4, P_DEPTH = 64 /* columns of a stage */ };
enum { P_STAGE_BYTES = 2 * WN_BLOCK_ROWS * P_DEPTH * 2, P_BYTES = P_STAGES * P_STAGE_BYTES };

/* How many of a row's picks lie below `key`. */
__device__ static int32_t picks_below(const int32_t *picks, int32_t k, int32_t key) {
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

/* Starts copying column chunk `chunk` of one head of the block's rows and keys. */
__device__ static void load_chunk(uint32_t stage, const wn_attend_job &job, int head, int chunk, int row0, int key0) {
  wn_view<wn_bf16> q = job.q, k = job.k;
  q.data += chunk * P_DEPTH;
  k.data += chunk * P_DEPTH;
  q.width = k.width = q.width - chunk * P_DEPTH;
  wn_tile_load<WN_BLOCK_ROWS, P_DEPTH, P_THREADS>(stage, q, head, row0, job.n);
  wn_tile_load<WN_BLOCK_ROWS, P_DEPTH, P_THREADS>(stage + P_STAGE_BYTES / 2, k, head, key0, job.m);
}

/* sum += exp(s scale - lse) of the warp's [32 rows, 64 keys]; s restarts at 0. Unseen keys get what they get. */
__device__ static void add_weights(float (&sum)[2][8][4], float (&s)[2][8][4], const wn_attend_job &job, int head,
                                   int row0) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = row0 + 8 * i;
    const float lse = row < job.n ? job.lse.data[row * job.lse.row + head] : INFINITY;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 2 * (i & 1); e < 2 * (i & 1) + 2; e++) {
        sum[i >> 1][j][e] += wn_exp2((s[i >> 1][j][e] * job.scale - lse) * WN_LOG2E);
        s[i >> 1][j][e] = 0;
      }
  }
}

/* The sums of picked keys to their places; `before`: picks of each of the block's rows below the warp's keys. */
__device__ static void put_weights(const wn_view<float> &p, const float (&sum)[2][8][4], const wn_attend_job &job,
                                   int block_row, int warp_row, int tile, const int32_t *before) {
  const int lane = threadIdx.x & 31, col = (lane & 3) * 2;
  const float factor = 1 / (float)job.heads;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int r = warp_row + 8 * i + (lane >> 2), row = block_row + r;
    if (row >= job.n) continue;
    const uint64_t word = job.words[tile * job.word_pitch + row];
    float *to = p.data + row * p.row + before[r];
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int bit = 8 * j + col + e;
        if (word >> bit & 1) to[__popcll(word & ((1ull << bit) - 1))] = sum[i >> 1][j][2 * (i & 1) + e] * factor;
      }
  }
}

__global__ static void __launch_bounds__(P_THREADS, 1)
    p_kernel(const __grid_constant__ wn_attend_job job, wn_view<float> p, wn_view<int32_t> selection) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ int32_t before[2][WN_BLOCK_ROWS];
  const uint32_t stages = wn_shared_address(shared);
  const int key_blocks = (job.m + WN_BLOCK_ROWS - 1) / WN_BLOCK_ROWS;
  const int key_block = blockIdx.x % key_blocks, row_block = blockIdx.x / key_blocks;
  const int row0 = row_block * WN_BLOCK_ROWS, key0 = key_block * WN_BLOCK_ROWS;
  const int warp = threadIdx.x >> 5, warp_row = warp / 2 * 32, warp_key = warp % 2 * WN_TILE;
  if (!wn_row_tile_active<true>(job, 2 * row_block, key_block) &&
      !wn_row_tile_active<true>(job, 2 * row_block + 1, key_block))
    return;
  const int chunks = (job.q.width + P_DEPTH - 1) / P_DEPTH, steps = chunks * job.heads;
  auto load = [&](int step) {
    if (step < steps)
      load_chunk(stages + step % P_STAGES * P_STAGE_BYTES, job, step / chunks, step % chunks, row0, key0);
    wn_cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < P_STAGES - 1; i++) load(i);
  const int side = threadIdx.x / WN_BLOCK_ROWS, mine = threadIdx.x % WN_BLOCK_ROWS;
  if (row0 + mine < job.n)
    before[side][mine] =
        picks_below(selection.data + (row0 + mine) * selection.row, selection.width, key0 + side * WN_TILE);
  float sum[2][8][4], s[2][8][4];
  wn_clear(sum);
  wn_clear(s);
  for (int step = 0; step < steps; step++) {
    const uint32_t q = stages + step % P_STAGES * P_STAGE_BYTES, k = q + P_STAGE_BYTES / 2;
    wn_cp_async_wait<P_STAGES - 2>();
    __syncthreads(); /* this stage has come; the one before it is done with */
    load(step + P_STAGES - 1);
    wn_product_shared<2, 8, P_DEPTH / 16, WN_BLOCK_ROWS, WN_BLOCK_ROWS>(s, q, warp_row, k, warp_key);
    if (step % chunks == chunks - 1)
      add_weights(sum, s, job, step / chunks, row0 + warp_row + (int)(threadIdx.x & 31) / 4);
  }
  __syncthreads(); /* `before` is there, even without a head */
  if (key0 + warp_key < job.m)
    put_weights(p, sum, job, row0, warp_row, key0 / WN_TILE + warp_key / WN_TILE, before[warp % 2]);
}

static wn_status mean_probabilities(wn_device *device, const wn_attend_job *job, const wn_view<float> &p,
                                    const wn_view<int32_t> &selection) {
  const int64_t blocks = wn_ceil_div(job->n, WN_BLOCK_ROWS) * wn_ceil_div(job->m, WN_BLOCK_ROWS);
  if (blocks == 0) return NULL;
  WN_ASSERT(blocks <= INT32_MAX, "%lld blocks of rows and keys", (long long)blocks);
  WN_CUDA_TRY(cudaFuncSetAttribute(p_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P_BYTES));
  p_kernel<<<(unsigned)blocks, P_THREADS, P_BYTES, wn_cuda_stream(device)>>>(*job, p, selection);
  WN_CUDA_LAUNCHED("attention probabilities");
  return NULL;
}

/* ---- runs of rows ---- */

template <typename T> static void skip_rows(wn_view<T> *x, int64_t rows) {
  if (x->data) x->data += rows * x->row;
}

/* Rows of a run, so that its words take no more than the whole selection (or 256 rows' words). */
static int64_t run_rows(int64_t n, int64_t m, int64_t k) {
  const int64_t fits = m > 0 ? n * k * 32 / m : n;
  return wn_ceil_div(fits < 256 ? 256 : fits, WN_BLOCK_ROWS) * WN_BLOCK_ROWS;
}

/* Rows from..from + rows - 1 of a job and its selection, with their words in scratch. */
static wn_status begin_run(wn_device *device, wn_attend_job *run, wn_view<int32_t> *picks, int64_t from, int64_t rows) {
  skip_rows(&run->q, from);
  skip_rows(&run->o, from);
  skip_rows(&run->d_o, from);
  skip_rows(&run->dq, from);
  skip_rows(&run->lse, from);
  skip_rows(&run->delta, from);
  skip_rows(picks, from);
  run->first += from;
  run->last += from;
  run->n = (int32_t)rows;
  return wn_attend_plan_words(device, run, *picks);
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
  const int64_t n = rows->n_rows, heads = q->dim[1], dv = v->dim[2];
  const int64_t step = run_rows(n, rows->n_keys, selection->dim[1]);
  const wn_view<int32_t> picks = picks_of(selection, n);
  wn_attend_job job;
  WN_ASSERT(!delta == !d_o, "delta and d_o come together");
  WN_TRY(wn_attend_begin(device, &job, q, k, v, rows, params));
  job.o = wn_attend_heads(o, n, heads, dv);
  job.lse = wn_attend_stat(lse, n, heads);
  if (delta) {
    job.d_o = wn_attend_heads(d_o, n, heads, dv);
    job.delta = wn_attend_stat(delta, n, heads);
  }
  for (int64_t at = 0; at < n && heads > 0; at += step) {
    const size_t run_mark = wn_arena_mark(device->scratch);
    wn_attend_job run = job;
    wn_view<int32_t> run_picks = picks;
    WN_TRY(begin_run(device, &run, &run_picks, at, n - at < step ? n - at : step));
    WN_TRY(wn_with_widths((int32_t)q->dim[2], (int32_t)dv, wn_attend_forward_launch<true>{device, &run}));
    wn_arena_release(device->scratch, run_mark);
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}

/* dq, dk, dv, d_o and delta into *job. */
static wn_status backward_operands(wn_device *device, wn_attend_job *job, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                   const wn_tensor *d_o, const wn_tensor *delta) {
  job->dq = wn_attend_heads(dq, job->n, job->heads, job->q.width);
  job->dk = wn_attend_heads(dk, job->m, job->heads, job->q.width);
  job->dv = wn_attend_heads(dv, job->m, job->heads, job->v.width);
  wn_attend_heads(d_o, job->n, job->heads, job->v.width);
  job->delta = wn_attend_stat(delta, job->n, job->heads);
  return wn_attend_operand(device, &job->d_o, d_o);
}

wn_status wn_cuda_attention_masked_backward(wn_device *device, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                            wn_tensor *p, const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k,
                                            const wn_tensor *v, const wn_tensor *selection, const wn_tensor *lse,
                                            const wn_tensor *delta, const wn_rows *rows,
                                            const wn_attention_params *params) {
  const size_t mark = wn_arena_mark(device->scratch);
  const int64_t n = rows->n_rows, heads = q->dim[1], step = run_rows(n, rows->n_keys, selection->dim[1]);
  const wn_view<int32_t> picks = picks_of(selection, n);
  wn_view<float> places = {};
  wn_attend_job job;
  WN_ASSERT(!dq == !dk && !dq == !dv && !dq == !d_o && !dq == !delta, "dq, dk, dv, d_o and delta come together");
  WN_TRY(wn_attend_begin(device, &job, q, k, v, rows, params));
  job.lse = wn_attend_stat(lse, n, heads);
  if (dq) WN_TRY(backward_operands(device, &job, dq, dk, dv, d_o, delta));
  if (p) {
    places = wn_attend_stat(p, n, selection->dim[1]);
    WN_TRY(wn_cuda_zero(device, p)); /* places without a pick */
  }
  for (int64_t at = 0; at < n && heads > 0; at += step) {
    const size_t run_mark = wn_arena_mark(device->scratch);
    wn_attend_job run = job;
    wn_view<int32_t> run_picks = picks;
    WN_TRY(begin_run(device, &run, &run_picks, at, n - at < step ? n - at : step));
    if (dq)
      WN_TRY(wn_with_widths((int32_t)q->dim[2], (int32_t)v->dim[2], wn_attend_backward_launch<true>{device, &run}));
    if (p) {
      wn_view<float> run_places = places;
      skip_rows(&run_places, at);
      WN_TRY(mean_probabilities(device, &run, run_places, run_picks));
    }
    wn_arena_release(device->scratch, run_mark);
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}
