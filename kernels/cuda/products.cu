/* Linear layers: plain, one weight a head, one weight an expert. The first two are cuBLAS products (gemm.cuh), the last
 * one launch for all experts (grouped.cuh) where the layout allows it. BF16 operands, FP32 sums; outputs are BF16 or,
 * for weight gradients and statistics, FP32.
 *
 * A gradient that arrives in FP32 (the indexer's weights projection, [n,HI]) is cut into three BF16 terms, high, middle
 * and low, that add up to it exactly; the three products keep the sum at FP32 precision. It is the narrow operand, so
 * they cost little.
 *
 * Measured on one H200, random data, forward / backward_input / backward_weight in TFLOP/s:
 *   8192^3                                    788 / 767 / 751
 *   16384 rows, 7168 -> 1536                  796 / 737 / 711
 *   16384 rows, 1536 -> 24576                 775 / 815 / 746
 *   16384 rows, 7168 -> 576                   671 / 529 / 603
 *   16384 rows, 16384 -> 7168                 733 / 661 / 668
 *   16384 rows, 7168 -> 18432                 690 / 682 / 680
 *   16384 rows, 1024 -> 4096                  548 / 610 / 632
 *   a weight a head, 16384 x 128, 128 -> 512  320 / 383 / 426, that is 3.1 / 3.7 / 4.2 TB/s of 4.2
 *   16384 rows, 7168 -> 64, gradient in FP32  0.21 ms, in BF16 0.08 ms
 * Experts: grouped.cu. */
#include "kernels/cuda/grouped.cuh"
#include "kernels/cuda/operations.cuh"

enum { THREADS = 256, TERMS = 3 };

static wn_dtype output_dtype(const wn_tensor *t) {
  return t->dtype == WN_F32 ? WN_F32 : WN_BF16;
}

/* y = x w^T */
static wn_product forward_of(const wn_tensor *y, const wn_tensor *x, const wn_tensor *w, bool accumulate) {
  const int64_t n = x->dim[0], inputs = w->dim[1], outputs = w->dim[0];
  WN_CUDA_EXPECT(y, output_dtype(y), 2, n, outputs, 0);
  WN_CUDA_EXPECT(x, WN_BF16, 2, n, inputs, 0);
  WN_CUDA_EXPECT(w, WN_BF16, 2, outputs, inputs, 0);
  wn_product p = wn_product_of(y, x, w);
  p.transpose_b = true;
  p.accumulate = accumulate;
  return p;
}

/* dx = dy w */
static wn_product backward_input_of(const wn_tensor *dx, const wn_tensor *dy, const wn_tensor *w, bool accumulate) {
  const int64_t n = dy->dim[0], inputs = w->dim[1], outputs = w->dim[0];
  WN_CUDA_EXPECT(dx, output_dtype(dx), 2, n, inputs, 0);
  WN_CUDA_EXPECT(dy, WN_BF16, 2, n, outputs, 0);
  WN_CUDA_EXPECT(w, WN_BF16, 2, outputs, inputs, 0);
  wn_product p = wn_product_of(dx, dy, w);
  p.accumulate = accumulate;
  return p;
}

/* dw += dy^T x */
static wn_product backward_weight_of(const wn_tensor *dw, const wn_tensor *dy, const wn_tensor *x) {
  const int64_t n = dy->dim[0], inputs = x->dim[1], outputs = dy->dim[1];
  WN_CUDA_EXPECT(dw, WN_F32, 2, outputs, inputs, 0);
  WN_CUDA_EXPECT(dy, WN_BF16, 2, n, outputs, 0);
  WN_CUDA_EXPECT(x, WN_BF16, 2, n, inputs, 0);
  wn_product p = wn_product_of(dw, dy, x);
  p.k = n; /* over the rows */
  p.transpose_a = true;
  p.accumulate = true;
  return p;
}

wn_status wn_cuda_linear(wn_device *device, wn_tensor *y, const wn_tensor *x, const wn_tensor *w,
                         const wn_accumulate *params) {
  const wn_product p = forward_of(y, x, w, params->accumulate);
  return wn_cuda_product(device, &p);
}

wn_status wn_cuda_linear_backward_input(wn_device *device, wn_tensor *dx, const wn_tensor *dy, const wn_tensor *w,
                                        const wn_accumulate *params) {
  const wn_product p = backward_input_of(dx, dy, w, params->accumulate);
  return wn_cuda_product(device, &p);
}

/* ---- an FP32 gradient as three BF16 terms ---- */

/* What is left of x after a term; nothing after an infinity, or the terms would add up to NaN. */
__device__ static float rest(float x, wn_bf16 term) {
  return isinf(__bfloat162float(term)) ? 0.0f : x - __bfloat162float(term);
}

/* terms[t][row * width + j], lowest term first. */
__global__ static void split_kernel(wn_bf16 *terms, wn_view<float> x) {
  const int64_t all = x.n * x.width, step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    float left = x.data[i / x.width * x.row + i % x.width];
#pragma unroll
    for (int t = TERMS - 1; t >= 0; t--) {
      const wn_bf16 term = __float2bfloat16_rn(left);
      terms[t * all + i] = term;
      left = rest(left, term);
    }
  }
}

static wn_status split(wn_device *device, wn_tensor terms[TERMS], const wn_tensor *x) {
  const wn_view<float> view = wn_view_of<float>(x);
  const int64_t n = x->dim[0], width = x->dim[1], all = n * width;
  void *data;
  WN_TRY(wn_cuda_scratch(device, &data, "FP32 operand in BF16 terms", TERMS * all * (int64_t)sizeof(wn_bf16)));
  for (int t = 0; t < TERMS; t++) terms[t] = wn_tensor_of((wn_bf16 *)data + t * all, WN_BF16, 2, n, width, 0, 0);
  const int64_t blocks = wn_ceil_div(all, THREADS), most = (int64_t)wn_cuda_of(device)->n_sms * 16;
  split_kernel<<<(unsigned)(blocks < most ? blocks : most), THREADS, 0, wn_cuda_stream(device)>>>((wn_bf16 *)data,
                                                                                                  view);
  WN_CUDA_LAUNCHED("linear_backward_weight");
  return NULL;
}

wn_status wn_cuda_linear_backward_weight(wn_device *device, wn_tensor *dw, const wn_tensor *dy, const wn_tensor *x) {
  if (dy->dtype == WN_BF16) {
    const wn_product p = backward_weight_of(dw, dy, x);
    return wn_cuda_product(device, &p);
  }
  WN_CUDA_EXPECT(dy, WN_F32, 2, x->dim[0], dw->dim[0], 0);
  if (wn_tensor_count(dy) == 0) return NULL;
  const size_t mark = wn_arena_mark(device->scratch);
  wn_tensor terms[TERMS];
  WN_TRY(split(device, terms, dy));
  for (int t = 0; t < TERMS; t++) {
    const wn_product p = backward_weight_of(dw, &terms[t], x);
    WN_TRY(wn_cuda_product(device, &p));
  }
  wn_arena_release(device->scratch, mark);
  return NULL;
}

/* ---- one weight a head ---- */

wn_status wn_cuda_per_head_linear(wn_device *device, wn_tensor *y, const wn_tensor *x, const wn_tensor *w,
                                  const wn_per_head_params *params) {
  const int64_t n = x->dim[0], heads = w->dim[0], rows = w->dim[1], cols = w->dim[2];
  const int64_t inputs = params->transpose ? cols : rows, outputs = params->transpose ? rows : cols;
  WN_CUDA_EXPECT(y, output_dtype(y), 3, n, heads, outputs);
  WN_CUDA_EXPECT(x, WN_BF16, 3, n, heads, inputs);
  WN_CUDA_EXPECT(w, WN_BF16, 3, heads, rows, cols);
  if (heads == 0) return NULL;
  wn_product p = {};
  p.c = y->data, p.a = x->data, p.b = w->data;
  p.c_dtype = y->dtype;
  p.m = n, p.n = outputs, p.k = inputs;
  p.c_stride = y->stride[0], p.a_stride = x->stride[0], p.b_stride = w->stride[1];
  p.transpose_b = params->transpose;
  p.accumulate = params->accumulate;
  p.batch = heads, p.c_step = y->stride[1], p.a_step = x->stride[1], p.b_step = w->stride[0];
  return wn_cuda_product(device, &p);
}

wn_status wn_cuda_per_head_linear_backward_weight(wn_device *device, wn_tensor *dw, const wn_tensor *a,
                                                  const wn_tensor *b) {
  const int64_t n = a->dim[0], heads = a->dim[1], rows = a->dim[2], cols = b->dim[2];
  WN_CUDA_EXPECT(dw, WN_F32, 3, heads, rows, cols);
  WN_CUDA_EXPECT(a, WN_BF16, 3, n, heads, rows);
  WN_CUDA_EXPECT(b, WN_BF16, 3, n, heads, cols);
  if (heads == 0) return NULL;
  wn_product p = {};
  p.c = dw->data, p.a = a->data, p.b = b->data;
  p.c_dtype = WN_F32;
  p.m = rows, p.n = cols, p.k = n;
  p.c_stride = dw->stride[1], p.a_stride = a->stride[0], p.b_stride = b->stride[0];
  p.transpose_a = true;
  p.accumulate = true;
  p.batch = heads, p.c_step = dw->stride[0], p.a_step = a->stride[1], p.b_step = b->stride[1];
  return wn_cuda_product(device, &p);
}

/* ---- one weight an expert ---- */

/* Rows of expert e. */
static wn_tensor expert_rows(const wn_tensor *t, const int64_t *offset, int32_t e) {
  WN_ASSERT(offset[e] >= 0 && offset[e] <= offset[e + 1] && offset[e + 1] <= t->dim[0],
            "expert %d owns rows %lld .. %lld of %lld", e, (long long)offset[e], (long long)offset[e + 1],
            (long long)t->dim[0]);
  return wn_tensor_slice(*t, 0, offset[e], offset[e + 1] - offset[e]);
}

/* In one launch where all of them fit it, else one after another. */
static wn_status multiply_all(wn_device *device, const wn_product *product, int32_t n) {
  bool fit = true;
  for (int32_t e = 0; e < n; e++) fit = fit && wn_cuda_products_fit(&product[e]);
  if (fit) return wn_cuda_products(device, product, n);
  for (int32_t e = 0; e < n; e++) WN_TRY(wn_cuda_product(device, &product[e]));
  return NULL;
}

typedef wn_product product_of(const wn_tensor *, const wn_tensor *, const wn_tensor *, bool);

/* c and a by rows, a weight each. */
static wn_status multiply_rows(wn_device *device, product_of form, const wn_tensor *c, const wn_tensor *a,
                               const wn_tensor *w, int32_t n_experts, const int64_t *offset, bool accumulate) {
  const size_t mark = wn_arena_mark(device->host);
  void *products;
  WN_TRY(wn_arena_alloc(device->host, &products, "expert products", (size_t)n_experts * sizeof(wn_product)));
  wn_product *product = (wn_product *)products;
  for (int32_t e = 0; e < n_experts; e++) {
    const wn_tensor ce = expert_rows(c, offset, e), ae = expert_rows(a, offset, e);
    product[e] = form(&ce, &ae, &w[e], accumulate);
  }
  WN_TRY(multiply_all(device, product, n_experts));
  wn_arena_release(device->host, mark);
  return NULL;
}

wn_status wn_cuda_grouped_linear(wn_device *device, wn_tensor *y, const wn_tensor *x, const wn_tensor *w,
                                 int32_t n_experts, const int64_t *offset, const wn_accumulate *params) {
  return multiply_rows(device, forward_of, y, x, w, n_experts, offset, params->accumulate);
}

wn_status wn_cuda_grouped_linear_backward_input(wn_device *device, wn_tensor *dx, const wn_tensor *dy,
                                                const wn_tensor *w, int32_t n_experts, const int64_t *offset,
                                                const wn_accumulate *params) {
  return multiply_rows(device, backward_input_of, dx, dy, w, n_experts, offset, params->accumulate);
}

wn_status wn_cuda_grouped_linear_backward_weight(wn_device *device, wn_tensor *dw, const wn_tensor *dy,
                                                 const wn_tensor *x, int32_t n_experts, const int64_t *offset) {
  const size_t mark = wn_arena_mark(device->host);
  void *products;
  WN_TRY(wn_arena_alloc(device->host, &products, "expert products", (size_t)n_experts * sizeof(wn_product)));
  wn_product *product = (wn_product *)products;
  for (int32_t e = 0; e < n_experts; e++) {
    const wn_tensor dye = expert_rows(dy, offset, e), xe = expert_rows(x, offset, e);
    product[e] = backward_weight_of(&dw[e], &dye, &xe);
  }
  WN_TRY(multiply_all(device, product, n_experts));
  wn_arena_release(device->host, mark);
  return NULL;
}
