/* Descriptions of tensors for the GPU's copy engine. */
#ifndef WN_KERNELS_CUDA_TENSOR_MAP_CUH
#define WN_KERNELS_CUDA_TENSOR_MAP_CUH

#include <cuda.h>

#include "kernels/cuda/support.cuh"

/* data[dim[rank-1], ..., dim[0]], innermost first as the copy engine counts; stride: [rank - 1] elements, of dim[1] and
 * on; box: [rank] elements of one copy. BF16 lands swizzled by 128 bytes, F32 as it is; what lies outside becomes 0.
 * Addresses and strides are multiples of 16 bytes. WN_E_DEVICE where the driver refuses. */
WN_MUST_USE wn_status wn_cuda_tensor_map(CUtensorMap *map, wn_dtype dtype, const void *data, int32_t rank,
                                         const int64_t *dim, const int64_t *stride, const uint32_t *box);

/* The first n_rows rows of a view as [n_rows, heads, width], boxes of [rows, heads, columns]. */
template <typename T>
static inline wn_status wn_cuda_view_map(CUtensorMap *map, const wn_view<T> &v, int64_t n_rows, int32_t columns,
                                         int32_t heads, int32_t rows) {
  WN_ASSERT(v.heads <= 1 || v.head != 0, "the copy engine knows no heads that have the same rows");
  const int64_t dim[3] = {v.width, v.heads, n_rows}, stride[2] = {v.head ? v.head : v.row, v.row};
  const uint32_t box[3] = {(uint32_t)columns, (uint32_t)heads, (uint32_t)rows};
  return wn_cuda_tensor_map(map, wn_type_of<T>::dtype, v.data, 3, dim, stride, box);
}

#endif
