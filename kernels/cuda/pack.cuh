/* N neighbouring elements as 16-byte accesses, kept as they are in memory until used; and reading and writing any N as
 * FP32. For the operations whose time is their bytes. */
#ifndef WN_KERNELS_CUDA_PACK_CUH
#define WN_KERNELS_CUDA_PACK_CUH

#include "kernels/cuda/ptx/mma.cuh"
#include "kernels/cuda/support.cuh"

__device__ __forceinline__ float wn_wide(float x) {
  return x;
}
__device__ __forceinline__ float wn_wide(wn_bf16 x) {
  return __bfloat162float(x);
}
template <typename T> __device__ __forceinline__ T wn_narrow(float x);
template <> __device__ __forceinline__ float wn_narrow<float>(float x) {
  return x;
}
template <> __device__ __forceinline__ wn_bf16 wn_narrow<wn_bf16>(float x) {
  return __float2bfloat16_rn(x);
}

/* N * sizeof(T) is a multiple of 16, and so is the address. */
template <typename T, int N> struct wn_pack { uint4 raw[N * sizeof(T) / 16]; };

template <typename T, int N> __device__ __forceinline__ wn_pack<T, N> wn_pack_load(const T *from) {
  wn_pack<T, N> p;
#pragma unroll
  for (int i = 0; i < (int)(N * sizeof(T) / 16); i++) p.raw[i] = ((const uint4 *)from)[i];
  return p;
}

template <typename T, int N> __device__ __forceinline__ wn_pack<T, N> wn_pack_zero(void) {
  wn_pack<T, N> p;
#pragma unroll
  for (int i = 0; i < (int)(N * sizeof(T) / 16); i++) p.raw[i] = make_uint4(0, 0, 0, 0);
  return p;
}

template <int N> __device__ __forceinline__ void wn_unpack(float x[N], const wn_pack<wn_bf16, N> &p) {
  const uint32_t *two = (const uint32_t *)p.raw; /* the lower half is the first */
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    x[2 * i] = __uint_as_float(two[i] << 16);
    x[2 * i + 1] = __uint_as_float(two[i] & 0xffff0000u);
  }
}
template <int N> __device__ __forceinline__ void wn_unpack(float x[N], const wn_pack<float, N> &p) {
  const float *values = (const float *)p.raw;
#pragma unroll
  for (int i = 0; i < N; i++) x[i] = values[i];
}

/* What is unpacked after this is unpacked anew: the compiler would keep the FP32 values of an earlier use, twice the
 * registers. */
template <typename T, int N> __device__ __forceinline__ void wn_pack_forget(wn_pack<T, N> &p) {
#pragma unroll
  for (int i = 0; i < (int)(N * sizeof(T) / 16); i++)
    asm volatile("" : "+r"(p.raw[i].x), "+r"(p.raw[i].y), "+r"(p.raw[i].z), "+r"(p.raw[i].w));
}

template <int N> __device__ __forceinline__ void wn_pack_store(wn_bf16 *to, const float x[N]) {
#pragma unroll
  for (int i = 0; i < N / 8; i++)
    ((uint4 *)to)[i] = make_uint4(wn_pack_bf16(x[8 * i], x[8 * i + 1]), wn_pack_bf16(x[8 * i + 2], x[8 * i + 3]),
                                  wn_pack_bf16(x[8 * i + 4], x[8 * i + 5]), wn_pack_bf16(x[8 * i + 6], x[8 * i + 7]));
}
template <int N> __device__ __forceinline__ void wn_pack_store(float *to, const float x[N]) {
#pragma unroll
  for (int i = 0; i < N / 4; i++) ((float4 *)to)[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
}

/* Any N: as packs where N elements fill 16 bytes, else one by one. wn_kept: as they are in memory until widened. */
template <typename T, int N> static constexpr bool wn_packs = N * sizeof(T) % 16 == 0;
template <typename T, int N, bool PACKS = wn_packs<T, N>> struct wn_kept { wn_pack<T, N> raw; };
template <typename T, int N> struct wn_kept<T, N, false> { T raw[N]; };

template <typename T, int N> __device__ __forceinline__ wn_kept<T, N> wn_keep(const T *from) {
  wn_kept<T, N> x;
  if constexpr (wn_packs<T, N>) {
    x.raw = wn_pack_load<T, N>(from);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x.raw[i] = from[i];
  }
  return x;
}
template <typename T, int N> __device__ __forceinline__ void wn_widen(float x[N], const wn_kept<T, N> &kept) {
  if constexpr (wn_packs<T, N>) {
    wn_unpack<N>(x, kept.raw);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x[i] = wn_wide(kept.raw[i]);
  }
}
template <typename T, int N> __device__ __forceinline__ void wn_read(float x[N], const T *from) {
  wn_widen<T, N>(x, wn_keep<T, N>(from));
}
template <typename T, int N> __device__ __forceinline__ void wn_write(T *to, const float x[N]) {
  if constexpr (wn_packs<T, N>) {
    wn_pack_store<N>(to, x);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = wn_narrow<T>(x[i]);
  }
}

#endif
