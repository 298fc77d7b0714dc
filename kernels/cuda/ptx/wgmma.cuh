/* Products of a warpgroup: four warps, the first of index 0 modulo 4, all of whose threads call everything here. PTX
 * ISA 9.0, section "wgmma.mma_async".
 *
 * d[64, 8 NT] (+)= a[64, 16] b[16, 8 NT], bf16 operands, FP32 sums in registers: warp w of the group holds rows 16 w ..
 * 16 w + 15, and d[j] are its columns 8 j .. 8 j + 7 as wn_mma_bf16's c. Products run on after the call:
 *
 *   wn_wgmma_fence, products, wn_wgmma_commit, (other work), wn_wgmma_wait, wn_wgmma_settle(d), uses of d.
 *
 * Operands in shared memory are tiles as the copy engine leaves them with the 128-byte swizzle: blocks of 64 columns,
 * each of them rows of 128 bytes, the 16-byte chunks of a row exchanged by its three low bits. A product reads them
 * along the rows (16 columns of 64 or 8 NT rows) or across (16 rows of 64 or 8 NT columns). */
#ifndef WN_KERNELS_CUDA_PTX_WGMMA_CUH
#define WN_KERNELS_CUDA_PTX_WGMMA_CUH

#include <stdint.h>

/* ---- operands ---- */

enum { WN_ALONG = 0, WN_ACROSS = 1 };

/* The operand at `shared` in a tile that begins at a multiple of 1024 bytes. Across the rows, blocks of 64 columns lie
 * `block_bytes` apart; along them block_bytes means nothing. In a block, columns 16 k and on are at + 2 k, rows 8 k and
 * on at + 64 k: sixteenths of their bytes. Any thread; the "matrix descriptor" of wgmma */
__device__ __forceinline__ uint64_t wn_wgmma_operand(uint32_t shared, uint32_t block_bytes = 16) {
  return (uint64_t)((shared & 0x3ffff) >> 4) | (uint64_t)(block_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 |
         (uint64_t)1 << 62;
}
/* The same, made anew at each use: kept over a loop, operands would fill the registers. */
__device__ __forceinline__ uint64_t wn_wgmma_operand_anew(uint32_t shared, uint32_t block_bytes) {
  asm volatile("" : "+r"(shared));
  return wn_wgmma_operand(shared, block_bytes);
}

/* x of a warp's first lane in all its lanes, which all call: the compiler may know that it is the same, and products in
 * a branch on anything else are serialised. shfl.sync */
__device__ __forceinline__ int wn_uniform(int x) {
  return __shfl_sync(0xffffffffu, x, 0);
}

/* ---- order ---- */

/* Before the first product, and before the first after registers of sums or operands were written. wgmma.fence */
__device__ __forceinline__ void wn_wgmma_fence(void) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
/* The products since the last commit become a group. wgmma.commit_group */
__device__ __forceinline__ void wn_wgmma_commit(void) {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/* Waits until at most LEFT of the warpgroup's groups are under way. wgmma.wait_group */
template <int LEFT> __device__ __forceinline__ void wn_wgmma_wait(void) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
/* The compiler moves no use of these sums across this line: after a wait, and before a fence where what the sums held
 * has been used. No instruction. */
template <int NT> __device__ __forceinline__ void wn_wgmma_settle(float (&d)[NT][4]) {
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(d[j][e])::"memory");
}

/* ---- products ---- */

/* clang-format off */
#define WN_SUMS_1(d, j) "+f"((d)[j][0]), "+f"((d)[j][1]), "+f"((d)[j][2]), "+f"((d)[j][3])
#define WN_SUMS_4(d, j) WN_SUMS_1(d, j), WN_SUMS_1(d, j + 1), WN_SUMS_1(d, j + 2), WN_SUMS_1(d, j + 3)
#define WN_SUMS_8(d, j) WN_SUMS_4(d, j), WN_SUMS_4(d, j + 4)
#define WN_SUMS_16(d, j) WN_SUMS_8(d, j), WN_SUMS_8(d, j + 8)

/* their names, 4 NT of them */
#define WN_NAMES_4 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WN_NAMES_8 WN_NAMES_4 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WN_NAMES_16 WN_NAMES_8 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WN_NAMES_24 WN_NAMES_16 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WN_NAMES_32 WN_NAMES_24 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
/* clang-format on */

/* Both operands in shared memory; A, B: how a and b are read. add false: d is overwritten. NT: 4, 8, 16, 24, 32.
 * wgmma.mma_async.m64n{8 NT}k16 */
template <int A, int B> __device__ __forceinline__ void wn_wgmma(float (&d)[4][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %18, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" WN_NAMES_4 "}, %16, %17, keep, 1, 1, %19, %20;}"
               : WN_SUMS_4(d, 0)
               : "l"(a), "l"(b), "r"((int32_t)add), "n"(A), "n"(B));
}
template <int A, int B> __device__ __forceinline__ void wn_wgmma(float (&d)[8][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WN_NAMES_8 "}, %32, %33, keep, 1, 1, %35, %36;}"
               : WN_SUMS_8(d, 0)
               : "l"(a), "l"(b), "r"((int32_t)add), "n"(A), "n"(B));
}
template <int A, int B> __device__ __forceinline__ void wn_wgmma(float (&d)[16][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WN_NAMES_16
               "}, %64, %65, keep, 1, 1, %67, %68;}"
               : WN_SUMS_16(d, 0)
               : "l"(a), "l"(b), "r"((int32_t)add), "n"(A), "n"(B));
}
template <int A, int B> __device__ __forceinline__ void wn_wgmma(float (&d)[24][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %98, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" WN_NAMES_24
               "}, %96, %97, keep, 1, 1, %99, %100;}"
               : WN_SUMS_16(d, 0), WN_SUMS_8(d, 16)
               : "l"(a), "l"(b), "r"((int32_t)add), "n"(A), "n"(B));
}
template <int A, int B> __device__ __forceinline__ void wn_wgmma(float (&d)[32][4], uint64_t a, uint64_t b, bool add) {
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %130, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" WN_NAMES_32
               "}, %128, %129, keep, 1, 1, %131, %132;}"
               : WN_SUMS_16(d, 0), WN_SUMS_16(d, 16)
               : "l"(a), "l"(b), "r"((int32_t)add), "n"(A), "n"(B));
}

/* d += a b, a in registers as for wn_mma_bf16 (its rows as d's), b across its rows. NT: 8, 16.
 * wgmma.mma_async.m64n{8 NT}k16 */
__device__ __forceinline__ void wn_wgmma_registers(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WN_NAMES_8 "}, "
               "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : WN_SUMS_8(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wn_wgmma_registers(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WN_NAMES_16 "}, "
               "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
               : WN_SUMS_16(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* The same with NT 32, and with b along its rows; add false: d is overwritten. */
__device__ __forceinline__ void wn_wgmma_registers(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" WN_NAMES_32 "}, "
               "{%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
               : WN_SUMS_16(d, 0), WN_SUMS_16(d, 16)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wn_wgmma_registers_along(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WN_NAMES_8 "}, "
               "{%32, %33, %34, %35}, %36, 1, 1, 1, 0;"
               : WN_SUMS_8(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void wn_wgmma_registers_along(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                                         bool add) {
  asm volatile("{.reg .pred keep; setp.ne.b32 keep, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WN_NAMES_16 "}, "
               "{%64, %65, %66, %67}, %68, keep, 1, 1, 0;}"
               : WN_SUMS_16(d, 0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int32_t)add));
}

#endif
