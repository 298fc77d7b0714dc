/* What the per-head attention kernels need once for all heads: bounds of each 64 rows' visible keys; of a selection, a
 * 64-bit word for every row and key tile and which key tiles 64 rows pick in; operands that allow 16-byte accesses.
 * Words are no larger than the selection itself: attention_masked.cu cuts rows, or keys, where they would be. */
#include <assert.h>

#include "kernels/cuda/attention_tile.cuh"
#include "kernels/cuda/tensor_map.cuh"

enum {
  WORD_ROWS = 8,       /* rows of a block of words_kernel, a warp each */
  SEGMENT_TILES = 256, /* key tiles whose words it holds at a time */
  L2_BYTES = 20 << 20, /* of keys and values of heads that run together */
  FEW_ROUNDS = 12      /* of 128 rows of a head for all multiprocessors */
};

__global__ static void bounds_kernel(wn_tile_bounds *bounds, const int32_t *first, const int32_t *last, int32_t n) {
  const int lane = threadIdx.x, tile = blockIdx.x;
  wn_tile_bounds b = {INT32_MAX, -1, -1, INT32_MAX};
  for (int row = tile * WN_TILE + lane; row < (tile + 1) * WN_TILE; row += 32) {
    const int f = row < n ? first[row] : 0, l = row < n ? last[row] : -1;
    if (f <= l)
      b = {min(b.lowest_first, f), max(b.highest_last, l), max(b.highest_first, f), min(b.lowest_last, l)};
    else
      b = {b.lowest_first, b.highest_last, INT32_MAX, -1};
  }
  b.lowest_first = __reduce_min_sync(~0u, b.lowest_first);
  b.highest_last = __reduce_max_sync(~0u, b.highest_last);
  b.highest_first = __reduce_max_sync(~0u, b.highest_first);
  b.lowest_last = __reduce_min_sync(~0u, b.lowest_last);
  if (lane == 0) bounds[tile] = b;
}

wn_status wn_attend_plan_bounds(wn_device *device, wn_attend_job *job) {
  const int64_t tiles = wn_ceil_div(job->n, WN_TILE);
  void *memory;
  WN_TRY(wn_cuda_scratch(device, &memory, "bounds of row tiles", tiles * (int64_t)sizeof(wn_tile_bounds)));
  job->bounds = (const wn_tile_bounds *)memory;
  if (tiles == 0) return NULL;
  bounds_kernel<<<(unsigned)tiles, 32, 0, wn_cuda_stream(device)>>>((wn_tile_bounds *)memory, job->first, job->last,
                                                                    job->n);
  WN_CUDA_LAUNCHED("attention bounds");
  return NULL;
}

/* Sets the bits of one row's picks below key `end`, from place *cursor of its list on; whole warp. Lists ascend. The
 * largest pick that the lane has met goes to *most. */
__device__ static void set_bits(uint32_t *bits, const int32_t *picks, int32_t k, int64_t begin, int64_t end,
                                int32_t *cursor, int32_t *most) {
  for (;;) {
    const int at = *cursor + (int)threadIdx.x % 32;
    const int32_t pick = at < k ? picks[at] : -1;
    *most = max(*most, pick);
    const bool inside = pick >= 0 && pick < end;
    if (inside) atomicOr(&bits[(pick - begin) >> 5], 1u << (pick & 31));
    const int taken = __popc(__ballot_sync(~0u, inside));
    *cursor += taken;
    if (taken < 32) return;
  }
}

__global__ static void __launch_bounds__(WORD_ROWS * 32)
    words_kernel(uint64_t *words, int64_t word_pitch, uint32_t *active, int32_t active_pitch,
                 wn_view<int32_t> selection, int32_t n, int32_t key0, int32_t m, int32_t n_keys) {
  __shared__ uint64_t held[WORD_ROWS][SEGMENT_TILES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = blockIdx.x * WORD_ROWS, row = row0 + warp;
  const int tiles = (m + WN_TILE - 1) / WN_TILE;
  int32_t cursor =
      row < n && key0 > 0 ? wn_picks_below(selection.data + row * selection.row, selection.width, key0) : 0;
  int32_t most = -1;
  for (int tile0 = 0; tile0 < tiles; tile0 += SEGMENT_TILES) {
    for (int i = lane; i < SEGMENT_TILES; i += 32) held[warp][i] = 0;
    __syncwarp();
    if (row < n)
      set_bits((uint32_t *)held[warp], selection.data + row * selection.row, selection.width,
               key0 + (int64_t)tile0 * WN_TILE, key0 + (int64_t)(tile0 + SEGMENT_TILES) * WN_TILE, &cursor, &most);
    __syncthreads();
    for (int i = threadIdx.x; i < SEGMENT_TILES * WORD_ROWS; i += WORD_ROWS * 32) {
      const int tile = tile0 + i / WORD_ROWS, r = i % WORD_ROWS;
      const uint64_t word = held[r][i / WORD_ROWS];
      const uint32_t some = __ballot_sync(~0u, word != 0) >> (lane & ~(WORD_ROWS - 1)) & 0xff;
      if (tile >= tiles) continue;
      words[tile * word_pitch + row0 + r] = word;
      if (r == 0 && some) atomicOr(&active[(int64_t)(row0 / WN_TILE) * active_pitch + (tile >> 5)], 1u << (tile & 31));
    }
    __syncthreads();
  }
  assert(most <
         n_keys); /* a programmer's error, after which nothing runs here: kernels of wgmma cannot look themselves */
}

wn_status wn_attend_plan_words(wn_device *device, wn_attend_job *job, const wn_view<int32_t> &selection, int32_t key0,
                               int32_t n_keys) {
  const int64_t rows = wn_ceil_div(job->n, WN_BLOCK_ROWS) * WN_BLOCK_ROWS, tiles = wn_ceil_div(job->m, WN_TILE);
  void *words, *active;
  job->word_pitch = rows;
  job->active_pitch = (int32_t)wn_ceil_div(tiles, 32);
  const int64_t active_bytes = rows / WN_TILE * job->active_pitch * 4;
  WN_TRY(wn_cuda_scratch(device, &words, "selection words", rows * tiles * 8));
  WN_TRY(wn_cuda_scratch(device, &active, "selection tiles", active_bytes));
  job->words = (const uint64_t *)words;
  job->active = (const uint32_t *)active;
  if (rows == 0 || tiles == 0) return NULL;
  WN_CUDA_TRY(cudaMemsetAsync(active, 0, (size_t)active_bytes, wn_cuda_stream(device)));
  words_kernel<<<(unsigned)(rows / WORD_ROWS), WORD_ROWS * 32, 0, wn_cuda_stream(device)>>>(
      (uint64_t *)words, job->word_pitch, (uint32_t *)active, job->active_pitch, selection, job->n, key0, job->m,
      n_keys);
  WN_CUDA_LAUNCHED("selection words");
  return NULL;
}

static wn_status operand(wn_device *device, wn_view<wn_bf16> *view, const wn_tensor *t) {
  *view = wn_view_of<wn_bf16>(t);
  if (wn_view_aligned(*view, 16)) return NULL;
  wn_tensor copy;
  WN_TRY(wn_tensor_alloc(&copy, device->scratch, "aligned operand", WN_BF16, 3, t->dim[0], t->dim[1],
                         wn_ceil_div(t->dim[2], 8) * 8, 0));
  copy = wn_tensor_slice(copy, 2, 0, t->dim[2]);
  WN_TRY(wn_cuda_cast(device, &copy, t));
  *view = wn_view_of<wn_bf16>(&copy);
  return NULL;
}

static wn_status describe(CUtensorMap *map, const wn_view<wn_bf16> &x, uint32_t rows) {
  return wn_cuda_view_map(map, x, x.n, 64, 1, (int32_t)rows);
}

wn_status wn_attend_describe(wn_attend_maps *maps, const wn_attend_job *job, uint32_t rows, uint32_t keys) {
  wn_view<wn_bf16> q = job->q, d_o = job->d_o, k = job->k, v = job->v;
  q.n = d_o.n = job->n; /* a run of rows, or of keys, may be shorter than its tensor */
  k.n = v.n = job->m;
  WN_TRY(describe(&maps->q, q, rows));
  maps->k = maps->v = maps->q; /* without a key nothing is fetched */
  if (job->m > 0) {
    WN_TRY(describe(&maps->k, k, keys));
    WN_TRY(describe(&maps->v, v, keys));
  }
  if (d_o.data) WN_TRY(describe(&maps->d_o, d_o, rows));
  return NULL;
}

wn_view<wn_bf16> wn_attend_heads(const wn_tensor *t, int64_t n, int64_t heads, int64_t width) {
  WN_ASSERT(t->rank == 3 && t->dim[0] == n && t->dim[1] == heads && t->dim[2] == width,
            "[%lld, %lld, %lld] where [%lld, %lld, %lld] is wanted", (long long)t->dim[0], (long long)t->dim[1],
            (long long)t->dim[2], (long long)n, (long long)heads, (long long)width);
  return wn_view_of<wn_bf16>(t);
}

/* o of a forward: rounded, or as it is where its dtype is FP32. */
static void take_output(wn_attend_job *job, const wn_tensor *o, int64_t width) {
  if (o->dtype != WN_F32) {
    job->o = wn_attend_heads(o, job->n, job->heads, width);
    return;
  }
  WN_CUDA_EXPECT(o, WN_F32, 3, job->n, job->heads, width);
  job->unrounded = wn_view_of<float>(o);
}

wn_view<float> wn_attend_stat(const wn_tensor *t, int64_t n, int64_t heads) {
  WN_ASSERT(t->rank == 2 && t->dim[0] == n && t->dim[1] == heads, "[%lld, %lld] where [%lld, %lld] is wanted",
            (long long)t->dim[0], (long long)t->dim[1], (long long)n, (long long)heads);
  return wn_view_of<float>(t);
}

/* Heads whose rows run together, longest first: so many that keys and values fit the L2 cache. A launch of few blocks'
 * rows would end with a few heads' long ones on a mostly idle GPU, so it takes enough heads for two rounds of them. All
 * groups are alike, for the same reason. */
static int32_t heads_together(wn_device *device, const wn_attend_job *job, int64_t width) {
  const int64_t sms = wn_cuda_of(device)->n_sms, blocks = wn_ceil_div(job->n > job->m ? job->n : job->m, WN_BLOCK_ROWS);
  int64_t group = L2_BYTES / (((int64_t)job->m + 1) * width * 2);
  if (blocks * job->heads < FEW_ROUNDS * sms && group * blocks < 2 * sms) group = wn_ceil_div(2 * sms, blocks + 1);
  if (group < 1) group = 1;
  while (group < job->heads && job->heads % group != 0) group++;
  return (int32_t)(group < job->heads ? group : job->heads);
}

static wn_status begin(wn_device *device, wn_attend_job *job, const wn_tensor *q, const wn_tensor *k,
                       const wn_tensor *v, const wn_rows *rows, const wn_attention_params *params) {
  const int64_t heads = q->dim[1], dq = q->dim[2], dv = v->dim[2];
  wn_attend_heads(q, rows->n_rows, heads, dq);
  wn_attend_heads(k, rows->n_keys, heads, dq);
  wn_attend_heads(v, rows->n_keys, heads, dv);
  WN_ASSERT(dq >= 1 && dq <= 256 && dv >= 1 && dv <= 256, "head widths %lld and %lld, up to 256", (long long)dq,
            (long long)dv);
  WN_ASSERT(params->scale > 0, "softmax scale %g", params->scale);
  *job = (wn_attend_job){};
  WN_TRY(operand(device, &job->q, q));
  WN_TRY(operand(device, &job->k, k));
  WN_TRY(operand(device, &job->v, v));
  job->first = rows->first_key;
  job->last = rows->last_key;
  job->n = rows->n_rows;
  job->m = rows->n_keys;
  job->heads = (int32_t)heads;
  job->group = heads_together(device, job, dq + dv);
  job->scale = (float)params->scale;
  return NULL;
}

wn_status wn_attend_begin_forward(wn_device *device, wn_attend_job *job, wn_tensor *o, wn_tensor *lse, wn_tensor *delta,
                                  const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k, const wn_tensor *v,
                                  const wn_rows *rows, const wn_attention_params *params) {
  WN_ASSERT(!delta == !d_o, "delta and d_o come together");
  WN_TRY(begin(device, job, q, k, v, rows, params));
  take_output(job, o, v->dim[2]);
  job->lse = wn_attend_stat(lse, job->n, job->heads);
  if (!delta) return NULL;
  wn_attend_heads(d_o, job->n, job->heads, v->dim[2]);
  job->delta = wn_attend_stat(delta, job->n, job->heads);
  return operand(device, &job->d_o, d_o);
}

wn_status wn_attend_begin_backward(wn_device *device, wn_attend_job *job, wn_tensor *dq, wn_tensor *dk, wn_tensor *dv,
                                   const wn_tensor *d_o, const wn_tensor *q, const wn_tensor *k, const wn_tensor *v,
                                   const wn_tensor *lse, const wn_tensor *delta, const wn_rows *rows,
                                   const wn_attention_params *params) {
  WN_ASSERT(!dq == !dk && !dq == !dv && !dq == !d_o && !dq == !delta, "dq, dk, dv, d_o and delta come together");
  WN_TRY(begin(device, job, q, k, v, rows, params));
  job->lse = wn_attend_stat(lse, job->n, job->heads);
  if (!dq) return NULL;
  job->dq = wn_attend_heads(dq, job->n, job->heads, q->dim[2]);
  job->dk = wn_attend_heads(dk, job->m, job->heads, q->dim[2]);
  job->dv = wn_attend_heads(dv, job->m, job->heads, v->dim[2]);
  wn_attend_heads(d_o, job->n, job->heads, v->dim[2]);
  job->delta = wn_attend_stat(delta, job->n, job->heads);
  return operand(device, &job->d_o, d_o);
}
