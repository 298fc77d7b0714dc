/* The sigmoid router with grouped choice, and its sequence-wise balance loss. Source: DeepSeek-V3 report
 * (arXiv 2412.19437), eqs. 12 to 20.
 *
 * Logits are one cuBLAS product: BF16 operands are exact in FP32, sums are FP32, and so is what is written. Then a warp
 * takes a row: scores by lane, biased scores as integers whose order is theirs in shared memory, and K rounds of two
 * warp-wide integer reductions (largest value, then lowest expert that has it), so that ties cannot depend on timing.
 * Counts of choices are integer atomics; the balance loss sums a number per row in a fixed order.
 *
 * The backward makes dz[n,E] a row a warp in FP32 and leaves the rest to tensor cores: dz goes there as the sum of two
 * BF16 numbers side by side, dz to 2^-17 of itself, so that dw is as exact as FP32 sums are and dx is rounded once.
 *
 * Ladder, on an H200, rows of 7168, 256 experts in 8 groups, 8 choices:
 *
 *   version   rows     router, with and without balance   of it the product   backward
 *   1         131072   1.34 ms, 1.25 ms                    0.685 ms            2.67 ms
 *   1         4096     0.075 ms, 0.067 ms                  0.035 ms            0.105 ms
 *
 * Version 1's backward rounded dz to one BF16 (dw off by 5e-4 to 2e-3, now by 5e-6 at most); version 2, which ships,
 * differs in that alone: 131072 rows 3.60 ms; 65536 rows of 32 experts 1.40 ms where version 1 took 1.11.
 *
 * Left: the choice itself, 0.57 ms of 131072 rows, walks shared memory where registers would do. */
#include <assert.h>
#include <math.h>

#include "kernels/cuda/gemm.cuh"
#include "kernels/cuda/operations.cuh"

enum { WARP = 32, WARPS = 8, SUM_THREADS = 1024 };
#define FULL_WARP 0xffffffffu

/* Keeps the weights finite where every chosen score underflowed; the CPU's and HF's too. */
#define TINY_SUM 1e-20f

typedef struct constants {
  int64_t n, rows_per_sequence;
  int32_t n_experts, n_choices, n_group, topk_group;
  float scale;
  bool norm_topk, forced;
} constants;

static constants constants_of(int64_t n, int64_t n_experts, int64_t n_choices, const wn_router_params *params) {
  const int64_t n_group = params->n_group;
  WN_ASSERT(n_group > 0 && n_experts % n_group == 0 && params->topk_group > 0 && params->topk_group <= n_group &&
                n_choices <= n_experts / n_group * params->topk_group,
            "%lld of %lld experts from %d of %d groups", (long long)n_choices, (long long)n_experts, params->topk_group,
            params->n_group);
  WN_ASSERT(n < INT32_MAX, "%lld rows", (long long)n);
  constants c = {n,
                 params->rows_per_sequence,
                 (int32_t)n_experts,
                 (int32_t)n_choices,
                 params->n_group,
                 params->topk_group,
                 (float)params->scale,
                 params->norm_topk,
                 params->forced};
  return c;
}

static void expect_whole_sequences(int64_t n, int64_t rows) {
  WN_ASSERT(rows > 0 && n % rows == 0, "%lld rows in sequences of %lld", (long long)n, (long long)rows);
}

/* Words of shared memory a warp: experts, one word of padding every 32 (so that lanes may walk whole groups without
 * meeting in a bank), then groups. */
__host__ __device__ static inline int32_t padded(int32_t i) {
  return i + i / WARP;
}
__host__ __device__ static inline int32_t warp_words(int32_t n_experts, int32_t n_group) {
  return padded(n_experts) + padded(n_group) + 2;
}

/* An integer above 0 whose order is the value's; -0 equals 0. */
__device__ static uint32_t order_of(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* The place of the largest of n values, the lowest of equal ones, which is then marked as taken (0). All lanes get it.
 */
__device__ static int32_t take_best(uint32_t *value, int32_t n) {
  const int32_t lane = (int32_t)threadIdx.x % WARP;
  uint32_t best = 0;
  int32_t at = INT32_MAX;
  for (int32_t i = lane; i < n; i += WARP) {
    const uint32_t v = value[padded(i)];
    if (v > best) {
      best = v;
      at = i;
    }
  }
  const uint32_t largest = __reduce_max_sync(FULL_WARP, best);
  at = __reduce_min_sync(FULL_WARP, best == largest ? at : INT32_MAX);
  if (at % WARP == lane) value[padded(at)] = 0; /* by the lane that reads it */
  return at;
}

/* Sum of the two largest of n biased scores, or the one. */
__device__ static float group_score(const float *biased, int32_t from, int32_t n) {
  float first = -INFINITY, second = -INFINITY;
  for (int32_t i = from; i < from + n; i++) {
    const float b = biased[padded(i)];
    if (b > first) {
      second = first;
      first = b;
    } else if (b > second) {
      second = b;
    }
  }
  return n > 1 ? first + second : first;
}

/* Turns biased scores [E] in shared memory into orders, 0 for experts outside the kept groups. */
__device__ static void keep_groups(uint32_t *words, const constants &c) {
  const int32_t lane = (int32_t)threadIdx.x % WARP, per_group = c.n_experts / c.n_group;
  uint32_t *group = words + padded(c.n_experts) + 1;
  const bool all = c.topk_group == c.n_group;
  if (!all) {
    for (int32_t g = lane; g < c.n_group; g += WARP)
      group[padded(g)] = order_of(group_score((const float *)words, g * per_group, per_group));
    __syncwarp();
    for (int32_t i = 0; i < c.topk_group; i++) take_best(group, c.n_group);
    __syncwarp();
  }
  for (int32_t e = lane; e < c.n_experts; e += WARP) {
    const bool kept = all || group[padded(e / per_group)] == 0;
    words[padded(e)] = kept ? order_of(__uint_as_float(words[padded(e)])) : 0;
  }
  __syncwarp();
}

/* A choice, which may have been given: one that names no expert is a programmer's error, as on the CPU, and would be an
 * address. */
__device__ __forceinline__ int32_t expert_at(const int32_t *chosen, int64_t k, const constants &c) {
  const int32_t expert = chosen[k];
  assert(expert >= 0 && expert < c.n_experts);
  return expert;
}

/* A row a warp. counts [sequences, E] may be null. */
__global__ static void choose_kernel(wn_view<float> scores, wn_view<int32_t> index, wn_view<float> weight,
                                     wn_view<int32_t> load, int32_t *counts, wn_view<float> bias, constants c) {
  extern __shared__ uint32_t shared[];
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  uint32_t *words = shared + warp * warp_words(c.n_experts, c.n_group);
  for (int64_t row = (int64_t)blockIdx.x * WARPS + warp; row < c.n; row += (int64_t)gridDim.x * WARPS) {
    float *s = scores.data + row * scores.row, *w = weight.data + row * weight.row;
    int32_t *chosen = index.data + row * index.row;
    for (int32_t e = lane; e < c.n_experts; e += WARP) {
      const float score = 1.0f / (1.0f + expf(-s[e]));
      s[e] = score;
      if (c.forced) continue;
      const float b = score + bias.data[e * bias.row];
      words[padded(e)] = __float_as_uint(b == b ? b : -INFINITY);
    }
    __syncwarp();
    if (!c.forced) {
      keep_groups(words, c);
      for (int32_t k = 0; k < c.n_choices; k++) {
        const int32_t e = take_best(words, c.n_experts);
        if (lane == 0) chosen[k] = e;
      }
      __syncwarp();
    }
    float sum = TINY_SUM;
    if (c.norm_topk)
      for (int32_t k = 0; k < c.n_choices; k++) sum += s[expert_at(chosen, k, c)];
    const float factor = c.norm_topk ? c.scale / sum : c.scale;
    for (int32_t k = lane; k < c.n_choices; k += WARP) {
      const int32_t e = expert_at(chosen, k, c);
      w[k] = s[e] * factor;
      atomicAdd(load.data + e * load.row, 1);
      if (counts) atomicAdd(counts + row / c.rows_per_sequence * c.n_experts + e, 1);
    }
    __syncwarp(); /* the next row writes where this one is still read */
  }
}

__device__ static float warp_sum(float x) {
  for (int32_t step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(FULL_WARP, x, step);
  return x;
}

/* f[e] of a row's sequence: E / (K T) times how often its rows chose e. */
__device__ static float frequency(const int32_t *counts, int64_t row, int32_t e, const constants &c) {
  const float unit = (float)c.n_experts / ((float)c.n_choices * (float)c.rows_per_sequence);
  return (float)counts[row / c.rows_per_sequence * c.n_experts + e] * unit;
}

/* part[row] = sum_e f_e s_e / sum_j s_j / T */
__global__ static void balance_kernel(float *part, wn_view<float> scores, const int32_t *counts, constants c) {
  const int32_t lane = (int32_t)threadIdx.x % WARP;
  const int64_t row = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP;
  if (row >= c.n) return;
  const float *s = scores.data + row * scores.row;
  float sum = 0, pull = 0;
  for (int32_t e = lane; e < c.n_experts; e += WARP) {
    sum += s[e];
    pull += frequency(counts, row, e, c) * s[e];
  }
  sum = warp_sum(sum) + TINY_SUM;
  pull = warp_sum(pull);
  if (lane == 0) part[row] = pull / sum / (float)c.rows_per_sequence;
}

/* One block: *out += sum of part[n], each thread every SUM_THREADS-th, then a tree. */
__global__ static void add_parts_kernel(float *out, const float *part, int64_t n) {
  __shared__ double sums[SUM_THREADS];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += SUM_THREADS) sum += (double)part[i];
  sums[threadIdx.x] = sum;
  for (uint32_t half = SUM_THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *out += (float)sums[0];
}

static wn_status zeroed_counts(wn_device *device, int32_t **counts, const constants *c) {
  const int64_t bytes = c->n / c->rows_per_sequence * c->n_experts * (int64_t)sizeof(int32_t);
  void *memory;
  WN_TRY(wn_cuda_scratch(device, &memory, "router counts", bytes));
  WN_CUDA_TRY(cudaMemsetAsync(memory, 0, (size_t)bytes, wn_cuda_stream(device)));
  *counts = (int32_t *)memory;
  return NULL;
}

static wn_status add_balance(wn_device *device, wn_tensor *balance, wn_view<float> scores, const int32_t *counts,
                             const constants *c) {
  cudaStream_t stream = wn_cuda_stream(device);
  void *part;
  WN_TRY(wn_cuda_scratch(device, &part, "balance loss", c->n * (int64_t)sizeof(float)));
  balance_kernel<<<(unsigned)wn_ceil_div(c->n, WARPS), WARP * WARPS, 0, stream>>>((float *)part, scores, counts, *c);
  add_parts_kernel<<<1, SUM_THREADS, 0, stream>>>(wn_view_of<float>(balance).data, (const float *)part, c->n);
  WN_CUDA_LAUNCHED("router's balance loss");
  return NULL;
}

static unsigned row_blocks(wn_device *device, int64_t n) {
  const int64_t blocks = wn_ceil_div(n, WARPS), most = (int64_t)wn_cuda_of(device)->n_sms * 16;
  return (unsigned)(blocks < most ? blocks : most);
}

/* Dynamic shared memory of a kernel whose warps own `words` each. */
static wn_status ask_shared(wn_device *device, const void *kernel, int64_t words, size_t *bytes) {
  *bytes = (size_t)(WARPS * words) * sizeof(uint32_t);
  WN_ASSERT(*bytes <= wn_cuda_of(device)->block_shared_bytes, "%lld words of experts a row", (long long)words);
  WN_CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)*bytes));
  return NULL;
}

wn_status wn_cuda_router(wn_device *device, wn_tensor *scores, wn_tensor *index, wn_tensor *weight, wn_tensor *load,
                         wn_tensor *balance, const wn_tensor *x, const wn_tensor *w, const wn_tensor *bias,
                         const wn_router_params *params) {
  const int64_t n = x->dim[0], width = x->dim[1], n_experts = w->dim[0], n_choices = index->dim[1];
  wn_cuda_expect("scores", scores, WN_F32, 2, n, n_experts, 0);
  wn_cuda_expect("index", index, WN_I32, 2, n, n_choices, 0);
  wn_cuda_expect("weight", weight, WN_F32, 2, n, n_choices, 0);
  wn_cuda_expect("load", load, WN_I32, 1, n_experts, 0, 0);
  wn_cuda_expect("x", x, WN_BF16, 2, n, width, 0);
  wn_cuda_expect("w", w, WN_BF16, 2, n_experts, width, 0);
  wn_cuda_expect("bias", bias, WN_F32, 1, n_experts, 0, 0);
  if (balance) wn_cuda_expect("balance", balance, WN_F32, 1, 1, 0, 0);
  const constants c = constants_of(n, n_experts, n_choices, params);
  if (balance) expect_whole_sequences(n, c.rows_per_sequence);
  if (n == 0) return NULL;
  const wn_view<float> sv = wn_view_of<float>(scores);
  wn_product logits = wn_product_of(scores, x, w);
  logits.transpose_b = true;
  WN_TRY(wn_cuda_product(device, &logits));
  const size_t mark = wn_arena_mark(device->scratch);
  int32_t *counts = NULL;
  if (balance) WN_TRY(zeroed_counts(device, &counts, &c));
  size_t bytes;
  WN_TRY(ask_shared(device, (const void *)choose_kernel, warp_words(c.n_experts, c.n_group), &bytes));
  choose_kernel<<<row_blocks(device, n), WARP * WARPS, bytes, wn_cuda_stream(device)>>>(
      sv, wn_view_of<int32_t>(index), wn_view_of<float>(weight), wn_view_of<int32_t>(load), counts,
      wn_view_of<float>(bias), c);
  WN_CUDA_LAUNCHED("router");
  if (balance) WN_TRY(add_balance(device, balance, sv, counts, &c));
  wn_arena_release(device->scratch, mark);
  return NULL;
}

/* ---- backward ---- */

/* Choices of each sequence. */
__global__ static void count_kernel(int32_t *counts, wn_view<int32_t> index, constants c) {
  const int64_t pairs = c.n * c.n_choices, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < pairs; i += step) {
    const int64_t row = i / c.n_choices;
    const int32_t e = expert_at(index.data + row * index.row, i % c.n_choices, c);
    atomicAdd(counts + row / c.rows_per_sequence * c.n_experts + e, 1);
  }
}

/* dz[row] through the weights and, with counts, through the balance loss, as the sum of dz[row, e] and dz[row, E + e].
 * A row a warp. */
__global__ static void logits_gradient_kernel(wn_view<wn_bf16> dz, wn_view<float> dweight, wn_view<float> scores,
                                              wn_view<int32_t> index, const int32_t *counts, float coeff, constants c) {
  extern __shared__ float gradients[];
  const int32_t lane = (int32_t)threadIdx.x % WARP, warp = (int32_t)threadIdx.x / WARP;
  float *d = gradients + warp * c.n_experts;
  for (int64_t row = (int64_t)blockIdx.x * WARPS + warp; row < c.n; row += (int64_t)gridDim.x * WARPS) {
    const float *s = scores.data + row * scores.row, *dw = dweight.data + row * dweight.row;
    const int32_t *chosen = index.data + row * index.row;
    float share = 0, mean = 0;
    if (counts) {
      float sum = 0;
      for (int32_t e = lane; e < c.n_experts; e += WARP) {
        sum += s[e];
        mean += frequency(counts, row, e, c) * s[e];
      }
      sum = warp_sum(sum) + TINY_SUM;
      mean = warp_sum(mean) / sum;
      share = coeff / ((float)c.rows_per_sequence * sum);
    }
    for (int32_t e = lane; e < c.n_experts; e += WARP)
      d[e] = counts ? share * (frequency(counts, row, e, c) - mean) : 0;
    float factor = c.scale, pull = 0;
    if (c.norm_topk) {
      float sum = TINY_SUM;
      for (int32_t k = 0; k < c.n_choices; k++) sum += s[expert_at(chosen, k, c)];
      for (int32_t k = 0; k < c.n_choices; k++) pull += dw[k] * (s[chosen[k]] / sum);
      factor /= sum;
    }
    __syncwarp();
    if (lane == 0) /* one after another: a forced choice may name an expert twice */
      for (int32_t k = 0; k < c.n_choices; k++) d[expert_at(chosen, k, c)] += factor * (dw[k] - pull);
    __syncwarp();
    for (int32_t e = lane; e < c.n_experts; e += WARP) {
      const float z = d[e] * s[e] * (1 - s[e]);
      const wn_bf16 near = __float2bfloat16_rn(z);
      dz.data[row * dz.row + e] = near;
      dz.data[row * dz.row + c.n_experts + e] = __float2bfloat16_rn(z - __bfloat162float(near));
    }
    __syncwarp();
  }
}

/* dx += dz w, one product over both parts of dz, so that dx is rounded once: w stands there twice. */
static wn_status backward_input(wn_device *device, wn_tensor *dx, const wn_tensor *dz, const wn_tensor *w) {
  const int64_t n_experts = w->dim[0], width = w->dim[1];
  const size_t row_bytes = (size_t)width * sizeof(wn_bf16);
  wn_tensor twice;
  WN_TRY(wn_tensor_alloc(&twice, device->scratch, "router weights", WN_BF16, 2, 2 * n_experts, width, 0, 0));
  for (int64_t part = 0; part < 2; part++)
    WN_CUDA_TRY(cudaMemcpy2DAsync((wn_bf16 *)twice.data + part * n_experts * width, row_bytes, w->data,
                                  (size_t)w->stride[0] * sizeof(wn_bf16), row_bytes, (size_t)n_experts,
                                  cudaMemcpyDeviceToDevice, wn_cuda_stream(device)));
  const wn_tensor both = wn_tensor_slice(*dz, 1, 0, 2 * n_experts);
  wn_product input = wn_product_of(dx, &both, &twice);
  input.accumulate = true;
  return wn_cuda_product(device, &input);
}

/* dw += dz^T x, part by part */
static wn_status backward_weight(wn_device *device, wn_tensor *dw, const wn_tensor *dz, const wn_tensor *x) {
  for (int64_t part = 0; part < 2; part++) {
    const wn_tensor own = wn_tensor_slice(*dz, 1, part * dw->dim[0], dw->dim[0]);
    wn_product matrix = wn_product_of(dw, &own, x);
    matrix.k = x->dim[0];
    matrix.transpose_a = matrix.accumulate = true;
    WN_TRY(wn_cuda_product(device, &matrix));
  }
  return NULL;
}

wn_status wn_cuda_router_backward(wn_device *device, wn_tensor *dx, wn_tensor *dw, const wn_tensor *dweight,
                                  const wn_tensor *scores, const wn_tensor *index, const wn_tensor *x,
                                  const wn_tensor *w, const wn_router_params *params) {
  const int64_t n = x->dim[0], width = x->dim[1], n_experts = w->dim[0], n_choices = index->dim[1];
  wn_cuda_expect("dx", dx, WN_BF16, 2, n, width, 0);
  wn_cuda_expect("dw", dw, WN_F32, 2, n_experts, width, 0);
  wn_cuda_expect("dweight", dweight, WN_F32, 2, n, n_choices, 0);
  wn_cuda_expect("scores", scores, WN_F32, 2, n, n_experts, 0);
  wn_cuda_expect("index", index, WN_I32, 2, n, n_choices, 0);
  wn_cuda_expect("x", x, WN_BF16, 2, n, width, 0);
  wn_cuda_expect("w", w, WN_BF16, 2, n_experts, width, 0);
  const constants c = constants_of(n, n_experts, n_choices, params);
  const bool balanced = params->balance_coeff != 0;
  if (balanced) expect_whole_sequences(n, c.rows_per_sequence);
  if (n == 0) return NULL;
  const size_t mark = wn_arena_mark(device->scratch);
  cudaStream_t stream = wn_cuda_stream(device);
  const unsigned blocks = row_blocks(device, n);
  int32_t *counts = NULL;
  if (balanced) {
    WN_TRY(zeroed_counts(device, &counts, &c));
    count_kernel<<<blocks, WARP * WARPS, 0, stream>>>(counts, wn_view_of<int32_t>(index), c);
  }
  wn_tensor dz; /* rows padded, so that the products may load vectors */
  WN_TRY(
      wn_tensor_alloc(&dz, device->scratch, "router gradient", WN_BF16, 2, n, wn_ceil_div(2 * n_experts, 8) * 8, 0, 0));
  size_t bytes;
  WN_TRY(ask_shared(device, (const void *)logits_gradient_kernel, n_experts, &bytes));
  logits_gradient_kernel<<<blocks, WARP * WARPS, bytes, stream>>>(wn_view_of<wn_bf16>(&dz), wn_view_of<float>(dweight),
                                                                  wn_view_of<float>(scores), wn_view_of<int32_t>(index),
                                                                  counts, (float)params->balance_coeff, c);
  WN_CUDA_LAUNCHED("router_backward");
  WN_TRY(backward_input(device, dx, &dz, w));
  WN_TRY(backward_weight(device, dw, &dz, x));
  wn_arena_release(device->scratch, mark);
  return NULL;
}
