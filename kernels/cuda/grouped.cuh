/* Products of many weights at once, each over its own rows: what gemm.cuh does, group by group, in one launch. */
#ifndef WN_KERNELS_CUDA_GROUPED_CUH
#define WN_KERNELS_CUDA_GROUPED_CUH

#include "kernels/cuda/gemm.cuh"

/* Whether wn_cuda_products takes a product: one of a linear layer's forms (a b^T or a b into BF16, += a^T b in F32),
 * not batched, pointers at multiples of 16 bytes, row strides and c's width multiples of 16 bytes. */
extern "C" bool wn_cuda_products_fit(const wn_product *product);

/* Enqueues all products on the compute queue. Every one fits, transposes, accumulate and c's dtype are those of the
 * first, no two c overlap. A product with nothing to add is fine. */
extern "C" WN_MUST_USE wn_status wn_cuda_products(wn_device *device, const wn_product *product, int32_t n);

#endif
