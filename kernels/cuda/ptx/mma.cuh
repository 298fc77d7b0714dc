/* Small named helpers for the warp-level tensor-core path: shared-memory matrix loads, bf16 products, asynchronous
 * copies. PTX ISA 9.0, sections "mma.sync.aligned.m16n8k16", "ldmatrix", "stmatrix", "movmatrix", "st", "cp.async",
 * "cvt", "ex2". All lanes of a warp call what loads, transposes or multiplies matrices; any thread calls the rest. */
#ifndef WN_KERNELS_CUDA_PTX_MMA_CUH
#define WN_KERNELS_CUDA_PTX_MMA_CUH

#include <cuda_bf16.h>
#include <stdint.h>

/* The address that PTX knows a place in shared memory by. cvta.to.shared */
__device__ __forceinline__ uint32_t wn_shared_address(const void *p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}

/* Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 (16-byte aligned).
 * Lane l receives of each matrix the elements (row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1). ldmatrix.x4 */
__device__ __forceinline__ void wn_ldmatrix_x4(uint32_t r[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
/* The same, each matrix transposed. ldmatrix.x4.trans */
__device__ __forceinline__ void wn_ldmatrix_x4_trans(uint32_t r[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
/* Two matrices, transposed; lanes 0 .. 15 give the addresses. ldmatrix.x2.trans */
__device__ __forceinline__ void wn_ldmatrix_x2_trans(uint32_t r[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

/* wn_ldmatrix_x4 the other way. stmatrix.x4 */
__device__ __forceinline__ void wn_stmatrix_x4(uint32_t address, const uint32_t r[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

/* c[16,8] += a[16,16] b[16,8], bf16 operands, FP32 sums. Lane l holds, with g = l / 4 and t = 2 (l % 4):
 * a[0] = (g, t..t+1), a[1] = (g + 8, t..), a[2] = (g, t + 8..), a[3] = (g + 8, t + 8..);
 * b[0] = (t..t+1, g), b[1] = (t + 8.., g); c[0..1] = (g, t..t+1), c[2..3] = (g + 8, t..t+1). mma.sync.m16n8k16 */
__device__ __forceinline__ void wn_mma_bf16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* An 8 x 8 matrix of 16-bit elements, two a lane as ldmatrix deals them out, transposed across the warp. movmatrix */
__device__ __forceinline__ uint32_t wn_transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

/* Two floats as bf16, lo in the lower half. cvt.rn.bf16x2 */
__device__ __forceinline__ uint32_t wn_pack_bf16(float lo, float hi) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
  return out;
}

/* 16 bytes to shared memory, or 4. st.shared */
__device__ __forceinline__ void wn_store_shared_16(uint32_t at, uint4 x) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}
__device__ __forceinline__ void wn_store_shared_4(uint32_t at, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}

/* 16 bytes from global to shared memory, asynchronously; of them `bytes` (0 .. 16) are read, the rest become zeros. A
 * source that must not be read still has to be a valid address. cp.async.cg */
__device__ __forceinline__ void wn_cp_async_16(uint32_t shared, const void *global, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
}
/* 8 bytes likewise, or 4; zeros unless `read`. cp.async.ca */
__device__ __forceinline__ void wn_cp_async_8(uint32_t shared, const void *global, bool read) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(global), "r"(read ? 8 : 0) : "memory");
}
__device__ __forceinline__ void wn_cp_async_4(uint32_t shared, const void *global, bool read) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global), "r"(read ? 4 : 0) : "memory");
}
/* This thread's copies so far become a group. cp.async.commit_group */
__device__ __forceinline__ void wn_cp_async_commit(void) {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/* Waits until at most `LEFT` of this thread's groups are under way. cp.async.wait_group */
template <int LEFT> __device__ __forceinline__ void wn_cp_async_wait(void) {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/* log2(e): wn_exp2(x * WN_LOG2E) is exp(x). */
#define WN_LOG2E 1.4426950408889634f

/* 2^x, the special-function unit's (2 ulp; 0 for -inf). ex2.approx */
__device__ __forceinline__ float wn_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif
