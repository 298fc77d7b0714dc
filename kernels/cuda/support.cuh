/* What the files of kernels/cuda share: the device behind wn_device, checked calls, views of tensors for kernels.
 *
 * House rules of this folder:
 * - Every operation is `extern "C" wn_status wn_cuda_NAME(...)`, declared in operations.cuh from the table itself.
 * - Everything runs on the compute queue; scratch may be reused as soon as the host releases it, because what comes
 *   after runs after. Nothing synchronises unless its contract says so.
 * - No float atomics (but where one addition reaches each element, grouped.cu): sums run in an order of the shapes
 * only. Integer atomics are fine (order-free).
 * - No T x T buffer. 64-bit offsets wherever rows times width can pass 2^31. */
#ifndef WN_KERNELS_CUDA_SUPPORT_CUH
#define WN_KERNELS_CUDA_SUPPORT_CUH

#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

extern "C" {
#include "kernels/cuda/cuda.h"
}

typedef __nv_bfloat16 wn_bf16;

typedef struct wn_cuda {
  wn_device device; /* first: a wn_device * of kind WN_CUDA is a wn_cuda * */
  int32_t ordinal, n_sms;
  size_t total_bytes, committed_bytes; /* the GPU's memory; what the arenas hold of it */
  size_t block_shared_bytes;           /* most dynamic shared memory a block may ask for */
  cudaStream_t compute, comm;
  cublasHandle_t blas; /* on the compute queue, with its workspace inside the weights arena */
  void *pinned[2];     /* staging for upload and download, WN_PINNED_BYTES each */
  cudaEvent_t staged[2];
  int32_t next_pinned;
  wn_status (*watch)(void *context, double waited_s); /* NULL: none */
  void *watch_context;
  char name[320];
} wn_cuda;

enum { WN_PINNED_BYTES = 16 << 20 };

static inline wn_cuda *wn_cuda_of(wn_device *device) {
  WN_ASSERT(device->kind == WN_CUDA, "a CUDA operation on device kind %d", (int)device->kind);
  return (wn_cuda *)device;
}
static inline cudaStream_t wn_cuda_stream(wn_device *device) {
  return wn_cuda_of(device)->compute;
}

/* What a dry device has for a queue (dry.cu). */
extern "C" cudaStream_t wn_cuda_dry_queue(void);
/* Whether this process has a GPU open. Where it has not, only a dry device's operations run. */
extern "C" bool wn_cuda_opened(void);

/* NULL, or WN_E_DEVICE (WN_E_MEMORY where that is what CUDA says): "the GPU failed: CALL: <CUDA's own words>". */
extern "C" WN_MUST_USE wn_status wn_cuda_check(cudaError_t error, const char *call, const char *file, int line);
extern "C" WN_MUST_USE wn_status wn_cublas_check(cublasStatus_t error, const char *call, const char *file, int line);
#define WN_CUDA_TRY(call) WN_TRY(wn_cuda_check((call), #call, __FILE__, __LINE__))
#define WN_CUBLAS_TRY(call) WN_TRY(wn_cublas_check((call), #call, __FILE__, __LINE__))
/* After a <<<>>> launch: `operation` (a literal) is named in the error. */
#define WN_CUDA_LAUNCHED(operation)                                                                                    \
  WN_TRY(wn_cuda_check(cudaGetLastError(), "launching " operation, __FILE__, __LINE__))

/* A function of the driver, by name, since the program starts without one; WN_E_DEVICE where it has no such. */
extern "C" WN_MUST_USE wn_status wn_cuda_entry_point(const char *name, void **out);

/* The one way for the host to wait: until `event` has happened, with the device's watch looked after. */
extern "C" WN_MUST_USE wn_status wn_cuda_await(wn_device *device, cudaEvent_t event);

/* Temporaries: mark on entry, release before returning success. On an error nobody goes on, so nothing is released. */
static inline wn_status wn_cuda_scratch(wn_device *device, void **out, const char *name, int64_t bytes) {
  return wn_arena_alloc(device->scratch, out, name, (size_t)bytes);
}

static inline int64_t wn_ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

/* Asserts dtype, rank, dimensions (d2 is ignored at rank 2, d1 and d2 at rank 1) and a dense last dimension. */
extern "C" void wn_cuda_expect(const char *name, const wn_tensor *t, wn_dtype dtype, int32_t rank, int64_t d0,
                               int64_t d1, int64_t d2);
#define WN_CUDA_EXPECT(t, dtype, rank, d0, d1, d2) wn_cuda_expect(#t, (t), (dtype), (rank), (d0), (d1), (d2))

/* A tensor as kernels take it: [n, heads, width] with free strides and a dense last dimension. Tensors of rank 2 have
 * one head, of rank 1 one head of width 1 (element i is data[i * row]). T is the element type, asserted against the
 * tensor's dtype. */
template <typename T> struct wn_view {
  T *data;
  int64_t row, head; /* strides in elements */
  int64_t n;
  int32_t heads, width;
};

template <typename T> struct wn_type_of;
template <> struct wn_type_of<wn_bf16> { static constexpr wn_dtype dtype = WN_BF16; };
template <> struct wn_type_of<float> { static constexpr wn_dtype dtype = WN_F32; };
template <> struct wn_type_of<int32_t> { static constexpr wn_dtype dtype = WN_I32; };

template <typename T> static inline wn_view<T> wn_view_of(const wn_tensor *t) {
  WN_ASSERT(t->dtype == wn_type_of<T>::dtype, "a %s tensor where %s is wanted", wn_dtype_name(t->dtype),
            wn_dtype_name(wn_type_of<T>::dtype));
  WN_ASSERT(t->rank >= 1 && t->rank <= 3, "rank %d", t->rank);
  wn_view<T> v = {(T *)t->data, t->stride[0], 0, t->dim[0], 1, 1};
  if (t->rank == 1) return v;
  int32_t last = t->rank - 1;
  WN_ASSERT(t->dim[last] <= 1 || t->stride[last] == 1, "last stride %lld", (long long)t->stride[last]);
  v.width = (int32_t)t->dim[last];
  if (t->rank == 2) return v;
  v.heads = (int32_t)t->dim[1];
  v.head = t->stride[1];
  return v;
}

/* Every row of a head begins at a multiple of so many bytes. */
template <typename T> __host__ __device__ static inline bool wn_view_aligned(const wn_view<T> &v, int64_t bytes) {
  const int64_t k = bytes / (int64_t)sizeof(T);
  return (uintptr_t)v.data % (size_t)bytes == 0 && v.row % k == 0 && v.head % k == 0;
}
/* True when 16-byte accesses are fine: the width is whole such pieces as well. */
template <typename T> __host__ __device__ static inline bool wn_view_vectors(const wn_view<T> &v) {
  return wn_view_aligned(v, 16) && v.width % (16 / (int64_t)sizeof(T)) == 0;
}

#endif
