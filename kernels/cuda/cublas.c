/* cuBLAS, loaded when a GPU is opened and not when the program starts: linked in the usual way it would cost every run
 * on a CPU a tenth of a second and 200 MB (its relocations). The functions that the operations call are defined here
 * and hand over to the library's own. */
#include <cublas_api.h>
#include <dlfcn.h>
#include <string.h>

#define LIBRARY "libcublas.so.13"

/* Sets *function to the library's function of that name, once; NULL where it is not to be had. Written through the
 * address, since C has no conversion from object to function pointers. */
static void find(void *function, const char *name) {
  void *library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL); /* counted: loaded once */
  void *found = library ? dlsym(library, name) : NULL;
  memcpy(function, &found, sizeof found);
}

#define HAND_OVER(name, ...)                                                                                           \
  static __typeof__(name) *function;                                                                                   \
  if (!function) find(&function, #name);                                                                               \
  return function ? function(__VA_ARGS__) : CUBLAS_STATUS_NOT_INITIALIZED

const char *cublasGetStatusString(cublasStatus_t status) {
  static __typeof__(cublasGetStatusString) *function;
  if (!function) find(&function, "cublasGetStatusString");
  return function ? function(status) : "the library " LIBRARY " could not be loaded";
}

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
  HAND_OVER(cublasCreate_v2, handle);
}

cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  HAND_OVER(cublasDestroy_v2, handle);
}

cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t streamId) {
  HAND_OVER(cublasSetStream_v2, handle, streamId);
}

cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t workspaceSizeInBytes) {
  HAND_OVER(cublasSetWorkspace_v2, handle, workspace, workspaceSizeInBytes);
}

cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  HAND_OVER(cublasSetMathMode, handle, mode);
}

cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb, int m, int n,
                            int k, const void *alpha, const void *A, cudaDataType Atype, int lda, const void *B,
                            cudaDataType Btype, int ldb, const void *beta, void *C, cudaDataType Ctype, int ldc,
                            cublasComputeType_t computeType, cublasGemmAlgo_t algo) {
  HAND_OVER(cublasGemmEx, handle, transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc,
            computeType, algo);
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t transa, cublasOperation_t transb,
                                          int m, int n, int k, const void *alpha, const void *A, cudaDataType Atype,
                                          int lda, long long int strideA, const void *B, cudaDataType Btype, int ldb,
                                          long long int strideB, const void *beta, void *C, cudaDataType Ctype, int ldc,
                                          long long int strideC, int batchCount, cublasComputeType_t computeType,
                                          cublasGemmAlgo_t algo) {
  HAND_OVER(cublasGemmStridedBatchedEx, handle, transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb,
            strideB, beta, C, Ctype, ldc, strideC, batchCount, computeType, algo);
}
