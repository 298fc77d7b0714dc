/* AdamW, and the sum of squares that the gradient norm comes from.
 *
 * adamw: one pass, four elements a thread and 16-byte accesses wherever all operands stand at the same place within 16
 * bytes (pieces of one flat buffer do); what comes before and after is done by single threads of the first block, so
 * that a small piece is one small launch.
 * sum_squares: double sums of fixed chunks, then one block adds the chunks in order.
 *
 * One H200, 500 million elements: adamw 3.31 ms, 4.24 TB/s, as fast as a copy; sum_squares 0.47 ms, 4.24 TB/s, the
 * host's read included. Ten calls of adamw on 16384 elements take 0.04 to 0.05 ms, what their launches cost. */
#include <math.h>

#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/pack.cuh"

enum { THREADS = 256, FOUR = 4 };

/* ---- AdamW ---- */

typedef struct adamw_constants {
  float beta1, rest1, beta2, rest2, step_size, unbias, eps, keep, grad_scale;
} adamw_constants;

/* M: float or wn_bf16 */
template <typename M> struct adamw_state {
  float *master;
  M *m, *v;
  wn_bf16 *weight; /* NULL: none */
  const float *grad;
};

/* The CPU's formula in the CPU's order (kernels/cpu/optimizer.c). */
__device__ __forceinline__ void adamw_one(float *w, float *m, float *v, float gradient, const adamw_constants &c) {
  const float g = gradient * c.grad_scale;
  *m = c.beta1 * *m + c.rest1 * g;
  *v = c.beta2 * *v + c.rest2 * (g * g);
  *w = *w * c.keep - c.step_size * *m / (sqrtf(*v) * c.unbias + c.eps);
}

/* Elements one by one, from `first`, `step` apart, below `end`. */
template <typename M>
__device__ __forceinline__ void adamw_singles(const adamw_state<M> &s, int64_t first, int64_t end, int64_t step,
                                              const adamw_constants &c) {
  for (int64_t i = first; i < end; i += step) {
    float w = s.master[i], m = wn_wide(s.m[i]), v = wn_wide(s.v[i]);
    adamw_one(&w, &m, &v, s.grad[i], c);
    s.master[i] = w;
    s.m[i] = wn_narrow<M>(m);
    s.v[i] = wn_narrow<M>(v);
    if (s.weight) s.weight[i] = __float2bfloat16_rn(w);
  }
}

__device__ __forceinline__ void read_four(float x[FOUR], const float *from) {
  wn_read<float, FOUR>(x, from);
}
__device__ __forceinline__ void read_four(float x[FOUR], const wn_bf16 *from) {
  const uint2 raw = *(const uint2 *)from;
  const float2 low = __bfloat1622float2(*(const __nv_bfloat162 *)&raw.x);
  const float2 high = __bfloat1622float2(*(const __nv_bfloat162 *)&raw.y);
  x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}
__device__ __forceinline__ void write_four(float *to, const float x[FOUR]) {
  wn_write<float, FOUR>(to, x);
}
__device__ __forceinline__ void write_four(wn_bf16 *to, const float x[FOUR]) {
  *(uint2 *)to = make_uint2(wn_pack_bf16(x[0], x[1]), wn_pack_bf16(x[2], x[3]));
}

/* Elements head .. head + 4 fours - 1 in fours, the others singly. */
template <typename M>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(adamw_state<M> s, int64_t n, int64_t head, int64_t fours, adamw_constants c) {
  const int64_t thread = (int64_t)blockIdx.x * THREADS + threadIdx.x, threads = (int64_t)gridDim.x * THREADS;
  for (int64_t i = thread; i < fours; i += threads) {
    const int64_t at = head + i * FOUR;
    float w[FOUR], m[FOUR], v[FOUR], g[FOUR];
    read_four(w, s.master + at);
    read_four(m, s.m + at);
    read_four(v, s.v + at);
    read_four(g, s.grad + at);
#pragma unroll
    for (int j = 0; j < FOUR; j++) adamw_one(&w[j], &m[j], &v[j], g[j], c);
    write_four(s.master + at, w);
    write_four(s.m + at, m);
    write_four(s.v + at, v);
    if (s.weight) write_four(s.weight + at, w);
  }
  if (fours == 0) {
    adamw_singles(s, thread, n, threads, c);
  } else if (blockIdx.x == 0) {
    adamw_singles(s, threadIdx.x, head, THREADS, c);
    adamw_singles(s, head + fours * FOUR + threadIdx.x, n, THREADS, c);
  }
}

template <typename T> static T *flat(const wn_tensor *t, int64_t n) {
  WN_ASSERT(t->rank == 1 && t->dim[0] == n && (n <= 1 || t->stride[0] == 1), "rank %d [%lld] stride %lld", t->rank,
            (long long)t->dim[0], (long long)t->stride[0]);
  return wn_view_of<T>(t).data;
}

/* How many elements stand before the first 16-byte address of the FP32 tensors, where BF16 stands at 8 bytes; -1 where
 * no such place is common to all. */
template <typename M> static int64_t common_head(const adamw_state<M> *s, int64_t n) {
  const uintptr_t off = (uintptr_t)s->master % 16;
  const int64_t head = (int64_t)((16 - off) % 16 / sizeof(float));
  bool common = (uintptr_t)s->grad % 16 == off && off % sizeof(float) == 0 && head <= n;
  common = common && (uintptr_t)(s->m + head) % (FOUR * sizeof(M)) == 0;
  common = common && (uintptr_t)(s->v + head) % (FOUR * sizeof(M)) == 0;
  if (s->weight) common = common && (uintptr_t)(s->weight + head) % 8 == 0;
  return common ? head : -1;
}

template <typename M>
static wn_status launch_adamw(wn_device *device, wn_tensor *master, wn_tensor *m, wn_tensor *v, wn_tensor *weight,
                              const wn_tensor *grad, const adamw_constants &c) {
  const int64_t n = master->dim[0];
  const adamw_state<M> s = {flat<float>(master, n), flat<M>(m, n), flat<M>(v, n),
                            weight ? flat<wn_bf16>(weight, n) : NULL, flat<float>(grad, n)};
  if (n == 0) return NULL;
  int64_t head = common_head(&s, n);
  const int64_t fours = head < 0 ? 0 : (n - head) / FOUR;
  if (fours == 0) head = 0;
  const int64_t blocks = wn_ceil_div(fours ? fours : n, THREADS), most = (int64_t)1 << 30;
  adamw_kernel<<<(unsigned)(blocks < most ? blocks : most), THREADS, 0, wn_cuda_stream(device)>>>(s, n, head, fours, c);
  WN_CUDA_LAUNCHED("adamw");
  return NULL;
}

wn_status wn_cuda_adamw(wn_device *device, wn_tensor *master, wn_tensor *m, wn_tensor *v, wn_tensor *weight,
                        const wn_tensor *grad, const wn_adamw_params *p) {
  WN_ASSERT(p->step >= 1, "step %lld", (long long)p->step);
  const adamw_constants c = {
      .beta1 = (float)p->beta1,
      .rest1 = (float)(1 - p->beta1),
      .beta2 = (float)p->beta2,
      .rest2 = (float)(1 - p->beta2),
      .step_size = (float)(p->lr / (1 - pow(p->beta1, (double)p->step))),
      .unbias = (float)(1 / sqrt(1 - pow(p->beta2, (double)p->step))),
      .eps = (float)p->eps,
      .keep = (float)(1 - p->lr * p->weight_decay),
      .grad_scale = (float)p->grad_scale,
  };
  if (m->dtype == WN_BF16) return launch_adamw<wn_bf16>(device, master, m, v, weight, grad, c);
  return launch_adamw<float>(device, master, m, v, weight, grad, c);
}

/* ---- sum of squares ---- */

enum { LEAST_CHUNK = 32768, MOST_CHUNKS = 4096, SQUARES_UNROLL = 8 };

typedef struct squares_part {
  double sum;
  int64_t non_finite;
} squares_part;

__device__ static squares_part block_squares(squares_part mine) {
  __shared__ squares_part parts[THREADS];
  parts[threadIdx.x] = mine;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x >= half) continue;
    parts[threadIdx.x].sum += parts[threadIdx.x + half].sum;
    parts[threadIdx.x].non_finite += parts[threadIdx.x + half].non_finite;
  }
  __syncthreads();
  return parts[0];
}

/* Non-finite elements are counted and left out of the sum. */
__device__ __forceinline__ void add_square(squares_part *part, float x) {
  const bool finite = isfinite(x);
  const double value = finite ? (double)x : 0.0;
  part->sum += value * value;
  part->non_finite += !finite;
}

/* Chunk blockIdx.x of the elements of x, in row-major order; N elements an access where x is dense (heads 1, width the
 * whole), else singly. */
template <int N>
__global__ void __launch_bounds__(THREADS)
    squares_kernel(squares_part *out, wn_view<float> x, int64_t count, int64_t chunk) {
  const int64_t from = blockIdx.x * chunk, end = from + chunk < count ? from + chunk : count;
  squares_part mine = {0, 0};
  if (N > 1) {
    const int64_t whole = from + (end - from) / N * N;
#pragma unroll SQUARES_UNROLL
    for (int64_t i = from + (int64_t)threadIdx.x * N; i < whole; i += THREADS * N) {
      float e[N];
      wn_read<float, N>(e, x.data + i);
#pragma unroll
      for (int j = 0; j < N; j++) add_square(&mine, e[j]);
    }
    for (int64_t i = whole + threadIdx.x; i < end; i += THREADS) add_square(&mine, x.data[i]);
  } else {
    for (int64_t i = from + threadIdx.x; i < end; i += THREADS) {
      const int64_t pair = i / x.width;
      add_square(&mine, x.data[pair / x.heads * x.row + pair % x.heads * x.head + i % x.width]);
    }
  }
  mine = block_squares(mine);
  if (threadIdx.x == 0) out[blockIdx.x] = mine;
}

__global__ void __launch_bounds__(THREADS)
    squares_total_kernel(squares_part *total, const squares_part *part, int32_t n) {
  squares_part mine = {0, 0};
  for (int32_t i = (int32_t)threadIdx.x; i < n; i += THREADS) {
    mine.sum += part[i].sum;
    mine.non_finite += part[i].non_finite;
  }
  mine = block_squares(mine);
  if (threadIdx.x == 0) *total = mine;
}

/* *total, on the device, from x; parts [MOST_CHUNKS] is working memory. */
static wn_status ask_squares(wn_device *device, squares_part *total, squares_part *parts, const wn_tensor *x) {
  const int64_t count = wn_tensor_count(x);
  const bool dense = wn_tensor_dense(x);
  wn_tensor whole = dense ? wn_tensor_view(*x, 1, count, 0, 0, 0) : *x;
  const wn_view<float> v = wn_view_of<float>(&whole);
  int64_t chunk = wn_ceil_div(wn_ceil_div(count, MOST_CHUNKS), THREADS * FOUR) * THREADS * FOUR;
  if (chunk < LEAST_CHUNK) chunk = LEAST_CHUNK;
  const int64_t chunks = wn_ceil_div(count, chunk);
  cudaStream_t stream = wn_cuda_stream(device);
  if (chunks > 0) {
    if (dense && (uintptr_t)v.data % 16 == 0)
      squares_kernel<FOUR><<<(unsigned)chunks, THREADS, 0, stream>>>(parts, v, count, chunk);
    else
      squares_kernel<1><<<(unsigned)chunks, THREADS, 0, stream>>>(parts, v, count, chunk);
    WN_CUDA_LAUNCHED("sum of squares");
  }
  squares_total_kernel<<<1, THREADS, 0, stream>>>(total, parts, (int32_t)chunks);
  WN_CUDA_LAUNCHED("sum of squares");
  return NULL;
}

wn_status wn_cuda_sum_squares(wn_device *device, double *sum, int64_t *non_finite, const wn_tensor *x, int32_t n) {
  const size_t mark = wn_arena_mark(device->scratch), host_mark = wn_arena_mark(device->host);
  const size_t bytes = (size_t)n * sizeof(squares_part);
  void *memory, *copy;
  if (n == 0) return NULL;
  WN_TRY(wn_cuda_scratch(device, &memory, "sums of squares", (n + MOST_CHUNKS) * (int64_t)sizeof(squares_part)));
  WN_TRY(wn_arena_alloc(device->host, &copy, "sums of squares", bytes));
  squares_part *total = (squares_part *)memory, *answer = (squares_part *)copy;
  for (int32_t i = 0; i < n; i++) WN_TRY(ask_squares(device, &total[i], total + n, &x[i]));
  wn_tensor all = wn_tensor_of(total, WN_U8, 1, (int64_t)bytes, 0, 0, 0);
  WN_TRY(wn_cuda_download(device, answer, &all));
  for (int32_t i = 0; i < n; i++) {
    sum[i] = answer[i].sum;
    non_finite[i] = answer[i].non_finite;
  }
  wn_arena_release(device->host, host_mark);
  wn_arena_release(device->scratch, mark);
  return NULL;
}
