/* Zeroing, conversion between dtypes, and copies between dense host memory and tensors. */
#include <string.h>

#include "kernels/cuda/operations.cuh"

enum { THREADS = 256, VECTOR_BYTES = 16 };

/* A tensor of any dtype as rows of elements: up to three free dimensions and a dense last one. */
typedef struct rows_view {
  char *data;
  int64_t dim[3], stride[3]; /* elements; the three outer dimensions, 1 where absent */
  int64_t width;
} rows_view;

static rows_view rows_view_of(const wn_tensor *t) {
  rows_view v = {(char *)t->data, {1, 1, 1}, {0, 0, 0}, 1};
  WN_ASSERT(t->rank >= 1 && t->rank <= 4, "rank %d", t->rank);
  int32_t last = t->rank - 1;
  if (t->rank == 1 && t->stride[0] != 1 && t->dim[0] > 1) { /* a strided vector: rows of one element */
    v.dim[2] = t->dim[0];
    v.stride[2] = t->stride[0];
    return v;
  }
  WN_ASSERT(t->dim[last] <= 1 || t->stride[last] == 1, "last stride %lld", (long long)t->stride[last]);
  v.width = t->dim[last];
  for (int32_t i = 0; i < last; i++) {
    v.dim[3 - last + i] = t->dim[i];
    v.stride[3 - last + i] = t->stride[i];
  }
  return v;
}

/* Place: int64_t, or uint32_t where all places fit, since divisions cost more than the memory does. */
template <typename Place> __device__ static int64_t row_offset(const rows_view &v, Place row) {
  const Place dim1 = (Place)v.dim[1], dim2 = (Place)v.dim[2], rest = row / dim2, first = rest / dim1;
  return (int64_t)(row - rest * dim2) * v.stride[2] + (int64_t)(rest - first * dim1) * v.stride[1] +
         (int64_t)first * v.stride[0];
}

template <typename T> struct element {
  __device__ static double wide(T x) { return (double)x; }
  __device__ static T narrow(double x) { return (T)x; }
};
template <> struct element<wn_bf16> {
  __device__ static double wide(wn_bf16 x) { return (double)__bfloat162float(x); }
  __device__ static wn_bf16 narrow(double x) { return __double2bfloat16(x); }
};

template <typename To, typename From> __device__ static To convert(From x) {
  return element<To>::narrow(element<From>::wide(x));
}
template <> __device__ wn_bf16 convert<wn_bf16, float>(float x) {
  return __float2bfloat16_rn(x);
}
template <> __device__ float convert<float, wn_bf16>(wn_bf16 x) {
  return __bfloat162float(x);
}
template <> __device__ float convert<float, float>(float x) {
  return x;
}
template <> __device__ wn_bf16 convert<wn_bf16, wn_bf16>(wn_bf16 x) {
  return x;
}
template <> __device__ uint8_t convert<uint8_t, uint8_t>(uint8_t x) {
  return x;
}
template <> __device__ int64_t convert<int64_t, int64_t>(int64_t x) {
  return x;
}

/* PACK elements a thread; PACK * sizeof(narrower) is 16 bytes or PACK is 1. */
template <typename To, typename From, int PACK, typename Place>
__global__ static void cast_kernel(rows_view dst, rows_view src, Place all, Place packs) {
  const Place step = (Place)gridDim.x * blockDim.x;
  for (Place i = (Place)blockIdx.x * blockDim.x + threadIdx.x; i < all; i += step) {
    const Place row = i / packs;
    const int64_t at = (int64_t)(i - row * packs) * PACK;
    const From *from = (const From *)src.data + row_offset(src, row) + at;
    To *to = (To *)dst.data + row_offset(dst, row) + at;
    From x[PACK];
    To y[PACK];
    if (PACK == 1) {
      x[0] = from[0];
    } else {
#pragma unroll
      for (int v = 0; v < (int)(PACK * sizeof(From) / VECTOR_BYTES); v++) ((uint4 *)x)[v] = ((const uint4 *)from)[v];
    }
#pragma unroll
    for (int e = 0; e < PACK; e++) y[e] = convert<To, From>(x[e]);
    if (PACK == 1) {
      to[0] = y[0];
    } else {
#pragma unroll
      for (int v = 0; v < (int)(PACK * sizeof(To) / VECTOR_BYTES); v++) ((uint4 *)to)[v] = ((const uint4 *)y)[v];
    }
  }
}

static bool packs_of(const rows_view *v, int64_t element, int64_t pack) {
  bool fine = (uintptr_t)v->data % VECTOR_BYTES == 0 && v->width % pack == 0;
  for (int i = 0; i < 3; i++) fine = fine && v->stride[i] * element % VECTOR_BYTES == 0;
  return fine;
}

template <typename To, typename From>
static wn_status cast_rows(wn_device *device, const rows_view *dst, const rows_view *src) {
  constexpr int narrower = sizeof(To) < sizeof(From) ? sizeof(To) : sizeof(From);
  constexpr int pack = VECTOR_BYTES / narrower;
  const int64_t rows = dst->dim[0] * dst->dim[1] * dst->dim[2];
  if (rows == 0 || dst->width == 0) return NULL;
  const bool packed = packs_of(dst, sizeof(To), pack) && packs_of(src, sizeof(From), pack);
  const int64_t packs = packed ? dst->width / pack : dst->width;
  int64_t blocks = wn_ceil_div(rows * packs, THREADS), most = (int64_t)wn_cuda_of(device)->n_sms * 16;
  const unsigned grid = (unsigned)(blocks < most ? blocks : most);
  const int64_t all = rows * packs;
  cudaStream_t stream = wn_cuda_stream(device);
  if (packed && all <= INT32_MAX)
    cast_kernel<To, From, pack><<<grid, THREADS, 0, stream>>>(*dst, *src, (uint32_t)all, (uint32_t)packs);
  else if (packed)
    cast_kernel<To, From, pack><<<grid, THREADS, 0, stream>>>(*dst, *src, all, packs);
  else
    cast_kernel<To, From, 1><<<grid, THREADS, 0, stream>>>(*dst, *src, all, packs);
  WN_CUDA_LAUNCHED("cast");
  return NULL;
}

template <typename From>
static wn_status cast_from(wn_device *device, wn_dtype to, const rows_view *dst, const rows_view *src) {
  switch (to) {
  case WN_F32: return cast_rows<float, From>(device, dst, src);
  case WN_F64: return cast_rows<double, From>(device, dst, src);
  case WN_BF16: return cast_rows<wn_bf16, From>(device, dst, src);
  default: WN_ASSERT(false, "no conversion to %s", wn_dtype_name(to));
  }
}

static wn_status copy_rows(wn_device *device, int64_t element_bytes, const rows_view *dst, const rows_view *src) {
  switch (element_bytes) {
  case 1: return cast_rows<uint8_t, uint8_t>(device, dst, src);
  case 2: return cast_rows<wn_bf16, wn_bf16>(device, dst, src);
  case 4: return cast_rows<float, float>(device, dst, src);
  default: return cast_rows<int64_t, int64_t>(device, dst, src);
  }
}

wn_status wn_cuda_cast(wn_device *device, wn_tensor *dst, const wn_tensor *src) {
  WN_ASSERT(wn_tensor_same_shape(dst, src), "cast between different shapes");
  rows_view to = rows_view_of(dst), from = rows_view_of(src);
  if (dst->dtype == src->dtype) {
    if (wn_tensor_dense(dst) && wn_tensor_dense(src)) {
      if (wn_tensor_bytes(dst) == 0) return NULL;
      WN_CUDA_TRY(cudaMemcpyAsync(dst->data, src->data, (size_t)wn_tensor_bytes(dst), cudaMemcpyDeviceToDevice,
                                  wn_cuda_stream(device)));
      return NULL;
    }
    return copy_rows(device, wn_dtype_bytes(dst->dtype), &to, &from);
  }
  switch (src->dtype) {
  case WN_F32: return cast_from<float>(device, dst->dtype, &to, &from);
  case WN_F64: return cast_from<double>(device, dst->dtype, &to, &from);
  case WN_BF16: return cast_from<wn_bf16>(device, dst->dtype, &to, &from);
  default: WN_ASSERT(false, "no conversion from %s", wn_dtype_name(src->dtype));
  }
}

wn_status wn_cuda_zero(wn_device *device, wn_tensor *x) {
  cudaStream_t stream = wn_cuda_stream(device);
  if (wn_tensor_bytes(x) == 0) return NULL;
  if (wn_tensor_dense(x)) {
    WN_CUDA_TRY(cudaMemsetAsync(x->data, 0, (size_t)wn_tensor_bytes(x), stream));
    return NULL;
  }
  rows_view v = rows_view_of(x);
  const size_t element = (size_t)wn_dtype_bytes(x->dtype);
  WN_ASSERT(v.dim[0] == 1, "zero of a strided tensor of rank %d", x->rank);
  for (int64_t i = 0; i < v.dim[1]; i++) /* one call where only the last two dimensions exist */
    WN_CUDA_TRY(cudaMemset2DAsync(v.data + (size_t)(i * v.stride[1]) * element, (size_t)v.stride[2] * element, 0,
                                  (size_t)v.width * element, (size_t)v.dim[2], stream));
  return NULL;
}

/* ---- host and device ---- */

static wn_status upload_dense(wn_cuda *c, char *to, const char *from, size_t bytes) {
  if (c->device.dry) return NULL;
  for (size_t at = 0, n; at < bytes; at += n) {
    n = bytes - at < WN_PINNED_BYTES ? bytes - at : (size_t)WN_PINNED_BYTES;
    int32_t p = c->next_pinned;
    c->next_pinned = 1 - p;
    WN_TRY(wn_cuda_await(&c->device, c->staged[p])); /* what was staged here before has left */
    memcpy(c->pinned[p], from + at, n);
    WN_CUDA_TRY(cudaMemcpyAsync(to + at, c->pinned[p], n, cudaMemcpyHostToDevice, c->compute));
    WN_CUDA_TRY(cudaEventRecord(c->staged[p], c->compute));
  }
  return NULL;
}

/* One piece travels while the one before is copied out. */
static wn_status download_dense(wn_cuda *c, char *to, const char *from, size_t bytes) {
  const size_t pieces = (bytes + WN_PINNED_BYTES - 1) / WN_PINNED_BYTES;
  if (c->device.dry) {
    memset(to, 0, bytes);
    return NULL;
  }
  for (int p = 0; p < 2; p++) WN_TRY(wn_cuda_await(&c->device, c->staged[p])); /* uploads that are under way */
  for (size_t i = 0; i <= pieces; i++) {
    if (i < pieces) {
      const size_t at = i * WN_PINNED_BYTES, n = bytes - at < WN_PINNED_BYTES ? bytes - at : (size_t)WN_PINNED_BYTES;
      WN_CUDA_TRY(cudaMemcpyAsync(c->pinned[i & 1], from + at, n, cudaMemcpyDeviceToHost, c->compute));
      WN_CUDA_TRY(cudaEventRecord(c->staged[i & 1], c->compute));
    }
    if (i == 0) continue;
    const size_t at = (i - 1) * WN_PINNED_BYTES,
                 n = bytes - at < WN_PINNED_BYTES ? bytes - at : (size_t)WN_PINNED_BYTES;
    WN_TRY(wn_cuda_await(&c->device, c->staged[(i - 1) & 1]));
    memcpy(to + at, c->pinned[(i - 1) & 1], n);
  }
  return NULL;
}

wn_status wn_cuda_upload(wn_device *device, wn_tensor *dst, const void *host) {
  if (wn_tensor_bytes(dst) == 0) return NULL;
  if (wn_tensor_dense(dst))
    return upload_dense(wn_cuda_of(device), (char *)dst->data, (const char *)host, (size_t)wn_tensor_bytes(dst));
  size_t mark = wn_arena_mark(device->scratch);
  wn_tensor dense;
  WN_TRY(wn_tensor_alloc(&dense, device->scratch, "staging", dst->dtype, dst->rank, dst->dim[0], dst->dim[1],
                         dst->dim[2], dst->dim[3]));
  WN_TRY(upload_dense(wn_cuda_of(device), (char *)dense.data, (const char *)host, (size_t)wn_tensor_bytes(dst)));
  WN_TRY(wn_cuda_cast(device, dst, &dense));
  wn_arena_release(device->scratch, mark);
  return NULL;
}

wn_status wn_cuda_download(wn_device *device, void *host, const wn_tensor *src) {
  if (wn_tensor_bytes(src) == 0) return NULL;
  if (wn_tensor_dense(src))
    return download_dense(wn_cuda_of(device), (char *)host, (const char *)src->data, (size_t)wn_tensor_bytes(src));
  size_t mark = wn_arena_mark(device->scratch);
  wn_tensor dense;
  WN_TRY(wn_tensor_alloc(&dense, device->scratch, "staging", src->dtype, src->rank, src->dim[0], src->dim[1],
                         src->dim[2], src->dim[3]));
  WN_TRY(wn_cuda_cast(device, &dense, src));
  WN_TRY(download_dense(wn_cuda_of(device), (char *)host, (const char *)dense.data, (size_t)wn_tensor_bytes(src)));
  wn_arena_release(device->scratch, mark);
  return NULL;
}
