/* Warpgroup products of absorbed sparse attention: 64 rows, operands in shared memory in panels of 64 columns with the
 * 128-byte swizzle (attention_gather.cuh), each read along its rows or across them. PTX ISA 9.0, section "wgmma".
 *
 * d[64][8 NT]: warp w of the group holds rows 16 w .. 16 w + 15, as wn_mma_bf16 holds c: d[j] are columns 8 j .. */
#ifndef WN_KERNELS_CUDA_PTX_PANELS_CUH
#define WN_KERNELS_CUDA_PTX_PANELS_CUH

#include <stdint.h>

/* What a product reads at `address`: 16 columns of rows (ALONG), or 16 rows of columns (ACROSS), where panels lie
 * `panel_bytes` apart. Panels begin at multiples of 1024 bytes; columns 16 k and on are at + 32 k within a panel, rows
 * 8 k and on at + 1024 k. */
__device__ __forceinline__ uint64_t wn_panel_operand(uint32_t address, uint32_t panel_bytes) {
  asm volatile("" : "+r"(address)); /* made anew at each use: kept over a loop, operands would fill the registers */
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(panel_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}

/* The same in all lanes of a warp, and the compiler may know it: products in a branch on anything else are serialised.
 */
__device__ __forceinline__ int wn_uniform(int x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

enum { WN_ALONG = 0, WN_ACROSS = 1 };

__device__ __forceinline__ void wn_group_fence(void) { /* registers and barriers before, products after */
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wn_group_commit(void) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT> __device__ __forceinline__ void wn_group_wait(void) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
/* What this thread stored, or had copied by cp.async, may be read by products after the next barrier. */
__device__ __forceinline__ void wn_group_publish(void) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
/* Uses of d stay after the wait before this. */
template <int NT> __device__ __forceinline__ void wn_group_settle(float (&d)[NT][4]) {
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(d[j][e])::"memory");
}

/* clang-format off */
#define WN_D4(d, j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define WN_D16(d, j) WN_D4(d, j), WN_D4(d, j + 1), WN_D4(d, j + 2), WN_D4(d, j + 3)
#define WN_D32(d, j) WN_D16(d, j), WN_D16(d, j + 4)
#define WN_D128(d) WN_D32(d, 0), WN_D32(d, 8), WN_D32(d, 16), WN_D32(d, 24)

/* d[64][8 NT] += a b, K = 16, NT the first dimension of d; add false: d is overwritten. A: how a is read (ALONG: its
 * rows are d's), B: how b is read (ALONG: its rows are d's columns). */
template <int A, int B>
__device__ __forceinline__ void wn_group_multiply(float (&d)[4][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %18, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
               "%16, %17, keep, 1, 1, %19, %20;}"
               : WN_D16(d, 0)
               : "l"(a), "l"(b), "r"((int)add), "n"(A), "n"(B));
}
template <int A, int B>
__device__ __forceinline__ void wn_group_multiply(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
               "%32, %33, keep, 1, 1, %35, %36;}"
               : WN_D32(d, 0)
               : "l"(a), "l"(b), "r"((int)add), "n"(A), "n"(B));
}
template <int A, int B>
__device__ __forceinline__ void wn_group_multiply(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %130, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 "
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
               "%128, %129, keep, 1, 1, %131, %132;}"
               : WN_D128(d)
               : "l"(a), "l"(b), "r"((int)add), "n"(A), "n"(B));
}
/* clang-format on */

#endif
