/* Moving rows to their experts and back. Products over the sorted rows are grouped_linear's (products.cu).
 *
 * moe_permute is a stable counting sort of the pairs (row, choice) by expert. A warp owns PAIRS neighbouring pairs: it
 * counts their experts, a block per expert turns those counts into running sums over the warps, one block sums over the
 * experts (the offsets, which travel to the host while the rest runs), and each warp then deals out the places of its
 * pairs in order: 32 at a time, equal experts found by a match across the warp. Nothing depends on timing.
 * Rows are copied and summed a block each in 16-byte pieces, sums in FP32 in choice order, rounded once.
 *
 * Ladder, on an H200: T = 16384 rows of 7168 to 8 of 256 experts each, ms and share of the rate of a copy (4.24 TB/s).
 *
 *   version                              permute       its backward  combine       its backward
 *   a row by 128 threads                 0.617  81%    0.907  61%    0.923  60%    1.250  75%
 *   the same, few registers, more rows   0.624  80%    0.911  61%    0.926  60%    1.247  76%
 *   448 threads: 7 KB of a row at once   0.608  82%    0.543 102%    0.543 102%    1.004  94%   ships
 *   ships, T = 131072                    4.573  87%    4.266 104%    4.259 104%    7.962  95%
 *
 * 448 threads idle on a narrow row, so a row has no more than it can use (row_threads): the widths above are as they
 * were.
 *
 * What reading scattered rows wants is not more of them at once but longer stretches of each. The sort (with rows of 8
 * columns) takes 0.05 ms at T = 16384, 0.13 ms at T = 131072. */
#include <assert.h>
#include <string.h>

#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/pack.cuh"

enum {
  WARP = 32,
  WARPS = 4,
  PAIRS = 512,
  SCAN_THREADS = 256,
  ROW_THREADS = 448,
  AT_ONCE = 8,
  MAX_EXPERTS = 2048,
  MAX_CHOICES = 2048
};
#define FULL_WARP 0xffffffffu

/* ---- sorting ---- */

typedef struct sorting {
  wn_view<int32_t> index;
  int64_t pairs, warps; /* a warp per PAIRS pairs */
  int32_t n_choices, n_experts;
  int32_t *before; /* [E][warps]: counts, then how many pairs of the expert stand before the warp's */
  int32_t *total;  /* [E] */
  int64_t *offset; /* [E + 1] */
} sorting;

/* A number outside, a programmer's error, would write outside. */
__device__ static int32_t expert_of(const sorting &s, int64_t pair) {
  const int32_t e = s.index.data[pair / s.n_choices * s.index.row + pair % s.n_choices];
  assert(e >= 0 && e < s.n_experts);
  return e;
}

__global__ static void count_kernel(sorting s) {
  extern __shared__ int32_t counts[];
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  const int64_t at = (int64_t)blockIdx.x * WARPS + warp;
  int32_t *count = counts + warp * s.n_experts;
  if (at >= s.warps) return;
  for (int32_t e = lane; e < s.n_experts; e += WARP) count[e] = 0;
  __syncwarp();
  for (int64_t pair = at * PAIRS + lane; pair < min(s.pairs, (at + 1) * PAIRS); pair += WARP)
    atomicAdd(count + expert_of(s, pair), 1);
  __syncwarp();
  for (int32_t e = lane; e < s.n_experts; e += WARP) s.before[e * s.warps + at] = count[e];
}

/* Inclusive sums over a block of SCAN_THREADS; `shared` holds one word a warp. */
template <typename T> __device__ static T block_scan(T x, T *shared) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  for (int32_t step = 1; step < WARP; step *= 2) {
    const T other = __shfl_up_sync(FULL_WARP, x, step);
    if (lane >= step) x += other;
  }
  __syncthreads(); /* the last round's sums have been read */
  if (lane == WARP - 1) shared[warp] = x;
  __syncthreads();
  for (int32_t w = 0; w < warp; w++) x += shared[w];
  return x;
}

/* One expert a block: counts of the warps become sums of those before. */
__global__ static void scan_warps_kernel(sorting s) {
  __shared__ int32_t shared[SCAN_THREADS / WARP], carried;
  int32_t *before = s.before + blockIdx.x * s.warps, carry = 0;
  for (int64_t from = 0; from < s.warps; from += SCAN_THREADS) {
    const int64_t i = from + threadIdx.x;
    const int32_t own = i < s.warps ? before[i] : 0, sum = block_scan(own, shared);
    if (i < s.warps) before[i] = carry + sum - own;
    if (threadIdx.x == SCAN_THREADS - 1) carried = sum;
    __syncthreads();
    carry += carried;
  }
  if (threadIdx.x == 0) s.total[blockIdx.x] = carry;
}

/* One block: offsets of the experts. */
__global__ static void scan_experts_kernel(sorting s) {
  __shared__ int64_t shared[SCAN_THREADS / WARP], carried;
  int64_t carry = 0;
  for (int32_t from = 0; from < s.n_experts; from += SCAN_THREADS) {
    const int32_t e = from + (int32_t)threadIdx.x;
    const int64_t own = e < s.n_experts ? s.total[e] : 0, sum = block_scan(own, shared);
    if (e < s.n_experts) s.offset[e] = carry + sum - own;
    if (threadIdx.x == SCAN_THREADS - 1) carried = sum;
    __syncthreads();
    carry += carried;
  }
  if (threadIdx.x == 0) s.offset[s.n_experts] = carry;
}

__global__ static void place_kernel(wn_view<int32_t> slot, sorting s) {
  extern __shared__ int32_t places[];
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  const int64_t at = (int64_t)blockIdx.x * WARPS + warp;
  int32_t *next = places + warp * s.n_experts;
  if (at >= s.warps) return;
  for (int32_t e = lane; e < s.n_experts; e += WARP) next[e] = (int32_t)s.offset[e] + s.before[e * s.warps + at];
  __syncwarp();
  for (int64_t from = at * PAIRS; from < min(s.pairs, (at + 1) * PAIRS); from += WARP) {
    const int64_t pair = from + lane;
    const bool there = pair < s.pairs;
    const int32_t e = there ? expert_of(s, pair) : -1;
    const uint32_t same = __match_any_sync(FULL_WARP, e);
    const int32_t rank = __popc(same & ((1u << lane) - 1));
    if (there) slot.data[pair * slot.row] = next[e] + rank;
    __syncwarp();
    if (there && rank == 0) next[e] += __popc(same);
    __syncwarp();
  }
}

/* ---- rows ---- */

/* PACK neighbours as they are in memory, so that many may be under way in few registers. */
template <int PACK> struct piece;
template <> struct piece<8> {
  wn_pack<wn_bf16, 8> raw;
  __device__ void fetch(const wn_bf16 *from) { raw = wn_pack_load<wn_bf16, 8>(from); }
  __device__ void put(wn_bf16 *to) const { *(uint4 *)to = raw.raw[0]; }
  __device__ void widen(float x[8]) const { wn_unpack<8>(x, raw); }
};
template <> struct piece<1> {
  wn_bf16 raw;
  __device__ void fetch(const wn_bf16 *from) { raw = from[0]; }
  __device__ void put(wn_bf16 *to) const { to[0] = raw; }
  __device__ void widen(float x[1]) const { x[0] = wn_wide(raw); }
};

/* Where the row's choices lie, and their weights, to shared memory: each thread needs them for every piece. */
typedef struct places {
  int64_t at;
  float by;
} places;
__device__ __forceinline__ const places *row_places(const wn_view<int32_t> &slot, const wn_view<float> &weight,
                                                    int32_t n_choices) {
  extern __shared__ uint4 memory[];
  places *place = (places *)memory;
  const int64_t row = blockIdx.x;
  for (int32_t k = (int32_t)threadIdx.x; k < n_choices; k += (int32_t)blockDim.x)
    place[k] = places{slot.data[(row * n_choices + k) * slot.row], weight.data ? weight.data[row * weight.row + k] : 1};
  __syncthreads();
  return place;
}

/* A row a block: its copies, in every place the row goes to. */
template <int PACK>
__global__ static void __launch_bounds__(ROW_THREADS)
    copy_kernel(wn_view<wn_bf16> xp, wn_view<wn_bf16> x, wn_view<int32_t> slot, int32_t n_choices) {
  const places *place = row_places(slot, wn_view<float>{}, n_choices);
  const int64_t row = blockIdx.x;
  for (int32_t at = (int32_t)threadIdx.x * PACK; at < x.width; at += (int32_t)blockDim.x * PACK) {
    piece<PACK> own;
    own.fetch(x.data + row * x.row + at);
    for (int32_t k = 0; k < n_choices; k++) own.put(xp.data + place[k].at * xp.row + at);
  }
}

/* A row a block: y += sum over choices of weight * yp[slot] (weight 1 where there is none), one choice after another.
 */
template <int PACK>
__global__ static void __launch_bounds__(ROW_THREADS, 2)
    gather_kernel(wn_view<wn_bf16> y, wn_view<wn_bf16> yp, wn_view<int32_t> slot, wn_view<float> weight,
                  int32_t n_choices) {
  const places *place = row_places(slot, weight, n_choices);
  wn_bf16 *own = y.data + blockIdx.x * y.row;
  for (int32_t at = (int32_t)threadIdx.x * PACK; at < y.width; at += (int32_t)blockDim.x * PACK) {
    float sum[PACK];
    wn_read<wn_bf16, PACK>(sum, own + at);
    for (int32_t from = 0; from < n_choices; from += AT_ONCE) {
      piece<PACK> part[AT_ONCE];
#pragma unroll
      for (int32_t j = 0; j < AT_ONCE; j++)
        if (from + j < n_choices) part[j].fetch(yp.data + place[from + j].at * yp.row + at);
#pragma unroll
      for (int32_t j = 0; j < AT_ONCE; j++) {
        if (from + j >= n_choices) break;
        float x[PACK];
        part[j].widen(x);
#pragma unroll
        for (int i = 0; i < PACK; i++) sum[i] = fmaf(place[from + j].by, x[i], sum[i]);
      }
    }
    wn_write<wn_bf16, PACK>(own + at, sum);
  }
}

/* A row a block: dyp[slot] = weight * dy, dweight = dy . yp[slot]. */
template <int PACK>
__global__ static void __launch_bounds__(ROW_THREADS, 2)
    combine_backward_kernel(wn_view<wn_bf16> dyp, wn_view<float> dweight, wn_view<wn_bf16> dy, wn_view<wn_bf16> yp,
                            wn_view<int32_t> slot, wn_view<float> weight, int32_t n_choices) {
  __shared__ float sums[ROW_THREADS / WARP][AT_ONCE];
  const places *place = row_places(slot, weight, n_choices);
  const int64_t row = blockIdx.x;
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  for (int32_t from = 0; from < n_choices; from += AT_ONCE) {
    float dot[AT_ONCE] = {0};
    for (int32_t at = (int32_t)threadIdx.x * PACK; at < dy.width; at += (int32_t)blockDim.x * PACK) {
      float d[PACK];
      piece<PACK> out[AT_ONCE];
#pragma unroll
      for (int32_t j = 0; j < AT_ONCE; j++)
        if (from + j < n_choices) out[j].fetch(yp.data + place[from + j].at * yp.row + at);
      wn_read<wn_bf16, PACK>(d, dy.data + row * dy.row + at);
#pragma unroll
      for (int32_t j = 0; j < AT_ONCE; j++) {
        if (from + j >= n_choices) break;
        float x[PACK], scaled[PACK];
        out[j].widen(x);
#pragma unroll
        for (int i = 0; i < PACK; i++) {
          dot[j] = fmaf(d[i], x[i], dot[j]);
          scaled[i] = place[from + j].by * d[i];
        }
        wn_write<wn_bf16, PACK>(dyp.data + place[from + j].at * dyp.row + at, scaled);
      }
    }
#pragma unroll
    for (int32_t j = 0; j < AT_ONCE; j++) {
      for (int32_t step = WARP / 2; step; step /= 2) dot[j] += __shfl_xor_sync(FULL_WARP, dot[j], step);
      if (lane == 0) sums[warp][j] = dot[j];
    }
    __syncthreads();
    if (threadIdx.x < AT_ONCE && from + (int32_t)threadIdx.x < n_choices) {
      float sum = 0;
      for (int32_t w = 0; w < (int32_t)blockDim.x / WARP; w++) sum += sums[w][threadIdx.x];
      dweight.data[row * dweight.row + from + threadIdx.x] = sum;
    }
    __syncthreads();
  }
}

/* ---- operations ---- */

/* Threads of a row: as few as take it in as many turns as ROW_THREADS would, so that narrow rows leave room for more
 * blocks. */
static unsigned row_threads(int64_t width, int64_t pack) {
  const int64_t pieces = wn_ceil_div(width, pack), turns = wn_ceil_div(pieces, ROW_THREADS);
  return (unsigned)(turns ? wn_ceil_div(wn_ceil_div(pieces, turns), WARP) * WARP : (int64_t)WARP);
}

static size_t places_bytes(int64_t n_choices) {
  WN_ASSERT(n_choices <= MAX_CHOICES, "%lld experts a row", (long long)n_choices);
  return (size_t)n_choices * sizeof(places);
}

/* Enqueues the sort; the offsets are on their way into pinned[staged], which its event tells. */
static wn_status sort_pairs(wn_device *device, wn_view<int32_t> slot, sorting *s, int32_t staged) {
  wn_cuda *c = wn_cuda_of(device);
  const int64_t words = s->n_experts * (s->warps + 1);
  void *memory;
  WN_TRY(wn_cuda_scratch(device, &memory, "expert counts", words * (int64_t)sizeof(int32_t)));
  s->before = (int32_t *)memory;
  s->total = s->before + s->n_experts * s->warps;
  const size_t offset_bytes = ((size_t)s->n_experts + 1) * sizeof(int64_t);
  WN_TRY(wn_cuda_scratch(device, &memory, "expert offsets", (int64_t)offset_bytes));
  s->offset = (int64_t *)memory;
  const unsigned blocks = (unsigned)wn_ceil_div(s->warps, WARPS);
  const size_t bytes = (size_t)(WARPS * s->n_experts) * sizeof(int32_t);
  if (blocks) count_kernel<<<blocks, WARP * WARPS, bytes, c->compute>>>(*s);
  scan_warps_kernel<<<(unsigned)s->n_experts, SCAN_THREADS, 0, c->compute>>>(*s);
  scan_experts_kernel<<<1, SCAN_THREADS, 0, c->compute>>>(*s);
  WN_CUDA_LAUNCHED("moe_permute");
  WN_TRY(wn_cuda_await(device, c->staged[staged])); /* what was staged here before has left */
  WN_CUDA_TRY(cudaMemcpyAsync(c->pinned[staged], s->offset, offset_bytes, cudaMemcpyDeviceToHost, c->compute));
  WN_CUDA_TRY(cudaEventRecord(c->staged[staged], c->compute));
  if (blocks) place_kernel<<<blocks, WARP * WARPS, bytes, c->compute>>>(slot, *s);
  WN_CUDA_LAUNCHED("moe_permute");
  return NULL;
}

wn_status wn_cuda_moe_permute(wn_device *device, wn_tensor *xp, wn_tensor *slot, int64_t *offset, const wn_tensor *x,
                              const wn_tensor *index, int32_t n_experts) {
  const int64_t n = index->dim[0], n_choices = index->dim[1], pairs = n * n_choices;
  wn_cuda_expect("xp", xp, WN_BF16, 2, pairs, x->dim[1], 0);
  wn_cuda_expect("slot", slot, WN_I32, 1, pairs, 0, 0);
  wn_cuda_expect("x", x, WN_BF16, 2, n, x->dim[1], 0);
  wn_cuda_expect("index", index, WN_I32, 2, n, n_choices, 0);
  WN_ASSERT(pairs <= INT32_MAX, "%lld pairs do not fit a slot number", (long long)pairs);
  WN_ASSERT(n_experts > 0 && n_experts <= MAX_EXPERTS, "%d experts", n_experts);
  wn_cuda *c = wn_cuda_of(device);
  const wn_view<wn_bf16> to = wn_view_of<wn_bf16>(xp), from = wn_view_of<wn_bf16>(x);
  const wn_view<int32_t> at = wn_view_of<int32_t>(slot);
  const size_t mark = wn_arena_mark(device->scratch);
  sorting s = {
      wn_view_of<int32_t>(index), pairs, wn_ceil_div(pairs, PAIRS), (int32_t)n_choices, n_experts, NULL, NULL, NULL};
  const int32_t staged = c->next_pinned;
  c->next_pinned = 1 - staged;
  WN_TRY(sort_pairs(device, at, &s, staged));
  if (n > 0 && wn_view_vectors(to) && wn_view_vectors(from))
    copy_kernel<8><<<(unsigned)n, row_threads(to.width, 8), places_bytes(n_choices), c->compute>>>(to, from, at,
                                                                                                   (int32_t)n_choices);
  else if (n > 0)
    copy_kernel<1><<<(unsigned)n, row_threads(to.width, 1), places_bytes(n_choices), c->compute>>>(to, from, at,
                                                                                                   (int32_t)n_choices);
  WN_CUDA_LAUNCHED("moe_permute");
  WN_TRY(wn_cuda_await(device, c->staged[staged])); /* the offsets only; places and copies go on */
  if (device->dry)
    wn_even_offsets(offset, pairs, n_experts);
  else
    memcpy(offset, c->pinned[staged], ((size_t)n_experts + 1) * sizeof *offset);
  wn_arena_release(device->scratch, mark);
  return NULL;
}

static wn_status gather(wn_device *device, const wn_tensor *y, const wn_tensor *yp, const wn_tensor *slot,
                        const wn_view<float> &weight, int64_t n_choices) {
  const wn_view<wn_bf16> to = wn_view_of<wn_bf16>(y), from = wn_view_of<wn_bf16>(yp);
  const wn_view<int32_t> at = wn_view_of<int32_t>(slot);
  const size_t bytes = places_bytes(n_choices);
  const unsigned rows = (unsigned)to.n;
  cudaStream_t stream = wn_cuda_stream(device);
  if (rows == 0) return NULL;
  if (wn_view_vectors(to) && wn_view_vectors(from))
    gather_kernel<8><<<rows, row_threads(to.width, 8), bytes, stream>>>(to, from, at, weight, (int32_t)n_choices);
  else
    gather_kernel<1><<<rows, row_threads(to.width, 1), bytes, stream>>>(to, from, at, weight, (int32_t)n_choices);
  WN_CUDA_LAUNCHED("gathering expert rows");
  return NULL;
}

wn_status wn_cuda_moe_permute_backward(wn_device *device, wn_tensor *dx, const wn_tensor *dxp, const wn_tensor *slot) {
  const int64_t n = dx->dim[0], n_choices = n ? slot->dim[0] / n : 0;
  wn_cuda_expect("dx", dx, WN_BF16, 2, n, dx->dim[1], 0);
  wn_cuda_expect("dxp", dxp, WN_BF16, 2, n * n_choices, dx->dim[1], 0);
  wn_cuda_expect("slot", slot, WN_I32, 1, n * n_choices, 0, 0);
  return gather(device, dx, dxp, slot, wn_view<float>{}, n_choices);
}

wn_status wn_cuda_moe_combine(wn_device *device, wn_tensor *y, const wn_tensor *yp, const wn_tensor *slot,
                              const wn_tensor *weight) {
  const int64_t n = y->dim[0], n_choices = weight->dim[1];
  wn_cuda_expect("y", y, WN_BF16, 2, n, y->dim[1], 0);
  wn_cuda_expect("yp", yp, WN_BF16, 2, n * n_choices, y->dim[1], 0);
  wn_cuda_expect("slot", slot, WN_I32, 1, n * n_choices, 0, 0);
  wn_cuda_expect("weight", weight, WN_F32, 2, n, n_choices, 0);
  return gather(device, y, yp, slot, wn_view_of<float>(weight), n_choices);
}

wn_status wn_cuda_moe_combine_backward(wn_device *device, wn_tensor *dyp, wn_tensor *dweight, const wn_tensor *dy,
                                       const wn_tensor *yp, const wn_tensor *slot, const wn_tensor *weight) {
  const int64_t n = dy->dim[0], n_choices = weight->dim[1];
  wn_cuda_expect("dyp", dyp, WN_BF16, 2, n * n_choices, dy->dim[1], 0);
  wn_cuda_expect("dweight", dweight, WN_F32, 2, n, n_choices, 0);
  wn_cuda_expect("dy", dy, WN_BF16, 2, n, dy->dim[1], 0);
  wn_cuda_expect("yp", yp, WN_BF16, 2, n * n_choices, dy->dim[1], 0);
  wn_cuda_expect("slot", slot, WN_I32, 1, n * n_choices, 0, 0);
  wn_cuda_expect("weight", weight, WN_F32, 2, n, n_choices, 0);
  const wn_view<wn_bf16> to = wn_view_of<wn_bf16>(dyp), d = wn_view_of<wn_bf16>(dy), out = wn_view_of<wn_bf16>(yp);
  const wn_view<float> dw = wn_view_of<float>(dweight), by = wn_view_of<float>(weight);
  const wn_view<int32_t> at = wn_view_of<int32_t>(slot);
  cudaStream_t stream = wn_cuda_stream(device);
  if (n == 0) return NULL;
  if (wn_view_vectors(to) && wn_view_vectors(d) && wn_view_vectors(out))
    combine_backward_kernel<8><<<(unsigned)n, row_threads(d.width, 8), places_bytes(n_choices), stream>>>(
        to, dw, d, out, at, by, (int32_t)n_choices);
  else
    combine_backward_kernel<1><<<(unsigned)n, row_threads(d.width, 1), places_bytes(n_choices), stream>>>(
        to, dw, d, out, at, by, (int32_t)n_choices);
  WN_CUDA_LAUNCHED("moe_combine_backward");
  return NULL;
}
