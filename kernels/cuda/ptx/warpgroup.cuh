/* More products of a warpgroup, beside wgmma.cuh (four warps, the first of index 0 modulo 4) from tiles in shared
 * memory. PTX ISA 9.0, section "wgmma.mma_async".
 *
 * Tiles have the 128-byte swizzle: column blocks of 64 16-bit elements, each of them rows of 128 bytes, the 16-byte
 * chunks of a row exchanged by its three low bits; tiles begin at multiples of 1024 bytes. Sums of [64, 8 NT]: warp w
 * of the group holds rows 16 w .. 16 w + 15 as wn_mma_bf16 does. */
#ifndef WN_KERNELS_CUDA_PTX_WARPGROUP_CUH
#define WN_KERNELS_CUDA_PTX_WARPGROUP_CUH

#include "kernels/cuda/ptx/wgmma.cuh"

/* Descriptor of a tile at `address`: `leading` is the distance of column blocks in bytes (only where the tile is read
 * across its rows); eight rows lie 1024 bytes apart. */
__device__ __forceinline__ uint64_t wn_tile_descriptor(uint32_t address, uint32_t leading) {
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(leading >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

/* Keeps the compiler from moving uses of sums across a wait. */
template <int NT> __device__ __forceinline__ void wn_pin(float (&x)[NT][4]) {
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(x[j][e])::"memory");
}

/* clang-format off */
#define WN_SUMS_4(x) "+f"((x)[0]), "+f"((x)[1]), "+f"((x)[2]), "+f"((x)[3])
#define WN_SUMS_32(x) WN_SUMS_4((x)[0]), WN_SUMS_4((x)[1]), WN_SUMS_4((x)[2]), WN_SUMS_4((x)[3]), \
                      WN_SUMS_4((x)[4]), WN_SUMS_4((x)[5]), WN_SUMS_4((x)[6]), WN_SUMS_4((x)[7])
#define WN_SUMS_64(x) WN_SUMS_32(x), WN_SUMS_32((x) + 8)
#define WN_NAMES_32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define WN_NAMES_64 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
                    "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, " \
                    "%41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, " \
                    "%61, %62, %63}"
/* clang-format on */

/* acc[64, 64] (+)= A[64, 16] B[64, 16]^T, both along their rows; add false: what was there does not matter */
__device__ __forceinline__ void wn_warpgroup_shared(float (&acc)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WN_NAMES_32 ", %32, %33, p, 1, 1, 0, 0;}"
               : WN_SUMS_32(acc)
               : "l"(a), "l"(b), "r"((int)add));
}
/* acc[64, 64] += A[64, 16] B[16, 64], A in registers (as for wn_mma_bf16), B across its rows */
__device__ __forceinline__ void wn_warpgroup_registers(float (&acc)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WN_NAMES_32
               ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : WN_SUMS_32(acc)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* acc[64, 128] (+)= A[64, 16] B[128, 16]^T, both along their rows; add false: what was there does not matter */
__device__ __forceinline__ void wn_warpgroup_shared(float (&acc)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " WN_NAMES_64 ", %64, %65, p, 1, 1, 0, 0;}"
               : WN_SUMS_64(acc)
               : "l"(a), "l"(b), "r"((int)add));
}
/* acc[64, 128] += A[64, 16] B[16, 128], A in registers (as for wn_mma_bf16), B across its rows */
__device__ __forceinline__ void wn_warpgroup_registers(float (&acc)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " WN_NAMES_64
               ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
               : WN_SUMS_64(acc)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif
