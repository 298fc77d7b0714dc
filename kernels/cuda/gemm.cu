/* Row-major products on a column-major library: c = a b is asked for as c^T = b^T a^T, so the operands change places
 * and nothing is copied. Ladder: products.cu. */
#include <limits.h>

#include "kernels/cuda/gemm.cuh"

static int small(int64_t x) {
  WN_ASSERT(x >= 0 && x <= INT_MAX, "a product with a dimension of %lld", (long long)x);
  return (int)x;
}

/* The stride of rows of `width`; where there is one row at most it means nothing, but cuBLAS still checks it. */
static int leading(int64_t stride, int64_t rows, int64_t width) {
  if (rows <= 1) return small(width > 0 ? width : 1);
  WN_ASSERT(stride >= width, "rows of %lld elements every %lld", (long long)width, (long long)stride);
  return small(stride);
}

extern "C" wn_status wn_cuda_product(wn_device *device, const wn_product *p) {
  const float alpha = 1.0f, beta = p->accumulate ? 1.0f : 0.0f;
  const int m = small(p->m), n = small(p->n), k = small(p->k);
  if (m == 0 || n == 0 || (k == 0 && p->accumulate)) return NULL;
  WN_ASSERT(k > 0, "a product over no elements");
  WN_ASSERT(p->c_dtype == WN_BF16 || p->c_dtype == WN_F32, "a product in %s", wn_dtype_name(p->c_dtype));
  const cudaDataType_t c_type = p->c_dtype == WN_BF16 ? CUDA_R_16BF : CUDA_R_32F;
  const cublasOperation_t op_a = p->transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t op_b = p->transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  const int lda = p->transpose_a ? leading(p->a_stride, k, m) : leading(p->a_stride, m, k);
  const int ldb = p->transpose_b ? leading(p->b_stride, n, k) : leading(p->b_stride, k, n);
  const int ldc = leading(p->c_stride, m, n);
  cublasHandle_t blas = wn_cuda_of(device)->blas;
  if (device->dry) return NULL;
  if (p->batch == 0)
    WN_CUBLAS_TRY(cublasGemmEx(blas, op_b, op_a, n, m, k, &alpha, p->b, CUDA_R_16BF, ldb, p->a, CUDA_R_16BF, lda, &beta,
                               p->c, c_type, ldc, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  else
    WN_CUBLAS_TRY(cublasGemmStridedBatchedEx(blas, op_b, op_a, n, m, k, &alpha, p->b, CUDA_R_16BF, ldb, p->b_step, p->a,
                                             CUDA_R_16BF, lda, p->a_step, &beta, p->c, c_type, ldc, p->c_step,
                                             small(p->batch), CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
  return NULL;
}
