#include "kernels/cuda/tensor_map.cuh"

/* Looked up once a process, not once a launch. */
static wn_status find_encoder(decltype(&cuTensorMapEncodeTiled) *out) {
  static void *encode;
  void *found = encode;
  if (!found) WN_TRY(wn_cuda_entry_point("cuTensorMapEncodeTiled", &found));
  encode = found;
  *out = (decltype(&cuTensorMapEncodeTiled))found;
  return NULL;
}

wn_status wn_cuda_tensor_map(CUtensorMap *map, wn_dtype dtype, const void *data, int32_t rank, const int64_t *dim,
                             const int64_t *stride, const uint32_t *box) {
  WN_ASSERT(rank == 2 || rank == 3, "a tensor map of rank %d", rank);
  WN_ASSERT(dtype == WN_BF16 || dtype == WN_F32, "a tensor map of %s", wn_dtype_name(dtype));
  decltype(&cuTensorMapEncodeTiled) encode = NULL;
  if (!wn_cuda_opened()) return NULL; /* a dry device's: nobody reads it */
  WN_TRY(find_encoder(&encode));
  const bool bf16 = dtype == WN_BF16;
  cuuint64_t sizes[3], bytes[2];
  const cuuint32_t steps[3] = {1, 1, 1};
  for (int32_t i = 0; i < rank; i++) sizes[i] = (cuuint64_t)dim[i];
  for (int32_t i = 0; i + 1 < rank; i++) bytes[i] = (cuuint64_t)(stride[i] * wn_dtype_bytes(dtype));
  const CUresult result =
      encode(map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, (cuuint32_t)rank,
             (void *)data, sizes, bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             bf16 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return NULL;
  return WN_FAIL(WN_E_DEVICE, "describing a tensor of rank %d to the GPU's copy engine failed (error %d)", rank,
                 (int)result);
}
