/* Matrix products through cuBLAS, as row-major code wants them. */
#ifndef WN_KERNELS_CUDA_GEMM_CUH
#define WN_KERNELS_CUDA_GEMM_CUH

#include "kernels/cuda/support.cuh"

/* c[m,n] = a[m,k] b[k,n] (+= with `accumulate`) for each of `batch` products, all row-major: BF16 operands, FP32 sums,
 * c in BF16 or F32. transpose_a: a is stored as [k,m]; transpose_b: b is stored as [n,k]. Strides count elements, from
 * row to row as stored, and from product to product. */
typedef struct wn_product {
  void *c;
  const void *a, *b;
  wn_dtype c_dtype;
  int64_t m, n, k, c_stride, a_stride, b_stride;
  bool transpose_a, transpose_b, accumulate;
  int64_t batch, c_step, a_step, b_step; /* batch 0: one product */
} wn_product;

/* c = a b, of matrices as they are stored. Whoever has a transposed says so, and that k is its rows. */
static inline wn_product wn_product_of(const wn_tensor *c, const wn_tensor *a, const wn_tensor *b) {
  wn_product p = {};
  p.c = c->data, p.a = a->data, p.b = b->data;
  p.c_dtype = c->dtype;
  p.m = c->dim[0], p.n = c->dim[1], p.k = a->dim[1];
  p.c_stride = c->stride[0], p.a_stride = a->stride[0], p.b_stride = b->stride[0];
  return p;
}

/* Enqueued on the compute queue. The algorithm is a function of shapes, strides and alignment alone, and cuBLAS has one
 * queue and our workspace: the same bits each time. Nothing to add (m, n or batch 0; k 0 with accumulate) is fine. */
extern "C" WN_MUST_USE wn_status wn_cuda_product(wn_device *device, const wn_product *product);

#endif
