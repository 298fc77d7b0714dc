/* Barriers in shared memory that threads and copies meet at, what makes memory visible to copies and products, clusters
 * of blocks. PTX ISA 9.0, sections "mbarrier", "fence.proxy", "barrier.cluster".
 *
 * A barrier is 8 bytes at a multiple of 8, named by its address in shared memory. A phase ends when all its arrivals
 * and the bytes it expects have come; then the next begins. Phases have parity 0, 1, 0, ... */
#ifndef WN_KERNELS_CUDA_PTX_MBARRIER_CUH
#define WN_KERNELS_CUDA_PTX_MBARRIER_CUH

#include <stdint.h>

/* ---- barriers ---- */

/* One thread makes the barrier; every phase of it waits for so many arrivals. mbarrier.init */
__device__ __forceinline__ void wn_mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/* The thread that made barriers, after the last: the copy engine and other blocks see them. Threads need a barrier of
 * the block (or cluster) besides. fence.mbarrier_init */
__device__ __forceinline__ void wn_mbarrier_init_fence(void) {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/* A thread: one arrival. mbarrier.arrive */
__device__ __forceinline__ void wn_mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/* A thread: one arrival at the barrier that stands at this address in block `rank` of the cluster. mapa,
 * mbarrier.arrive
 */
__device__ __forceinline__ void wn_mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile("{.reg .b32 there;\n"
               "mapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];}" ::"r"(barrier),
               "r"(rank)
               : "memory");
}
/* A thread: one arrival, and the phase also waits for so many bytes of copies. mbarrier.arrive.expect_tx */
__device__ __forceinline__ void wn_mbarrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
/* A thread: one arrival, of those that the barrier was made for, once its cp.async so far have landed.
 * cp.async.mbarrier.arrive.noinc */
__device__ __forceinline__ void wn_mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

/* ORDER: ".sem.scope" of mbarrier.try_wait.parity, "" for .acquire.cta */
#define WN_MBARRIER_WAIT(ORDER, barrier, parity)                                                                       \
  asm volatile("{.reg .pred done;\n"                                                                                   \
               "again:\n"                                                                                              \
               "mbarrier.try_wait.parity" ORDER ".shared::cta.b64 done, [%0], %1;\n"                                   \
               "@!done bra again;}" ::"r"(barrier),                                                                    \
               "r"(parity)                                                                                             \
               : "memory")
/* Every thread that needs it: until the phase of this parity is over. A new barrier counts as past a phase of parity 1.
 * mbarrier.try_wait.parity */
__device__ __forceinline__ void wn_mbarrier_wait(uint32_t barrier, uint32_t parity) {
  WN_MBARRIER_WAIT("", barrier, parity);
}
/* The same where something is read after that a thread of another block of the cluster wrote; arrivals from there that
 * only give a place back need no more than wn_mbarrier_wait. Empties the multiprocessor's first-level cache.
 * mbarrier.try_wait.parity.acquire.cluster */
__device__ __forceinline__ void wn_mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  WN_MBARRIER_WAIT(".acquire.cluster", barrier, parity);
}
#undef WN_MBARRIER_WAIT
/* wn_mbarrier_wait once, for a while: whether the phase is over. mbarrier.try_wait.parity */
__device__ __forceinline__ bool wn_mbarrier_try(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile("{.reg .pred over;\n"
               "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
               "selp.b32 %0, 1, 0, over;}"
               : "=r"(done)
               : "r"(barrier), "r"(parity)
               : "memory");
  return done;
}

/* ---- what the copy engine and products see ---- */

/* Every thread that wrote to shared memory, itself or by cp.async that it has waited for: after the next barrier the
 * copy engine and warpgroups' products may read it. fence.proxy.async */
__device__ __forceinline__ void wn_publish_shared(void) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- clusters ---- */

/* A thread: its block's number in the cluster. %cluster_ctarank */
__device__ __forceinline__ uint32_t wn_cluster_rank(void) {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
/* A thread: x to this address in block `rank` of the cluster; its 4 bytes come to the barrier that stands at this
 * address in that block. mapa, st.async */
__device__ __forceinline__ void wn_cluster_send(uint32_t to, int32_t x, uint32_t barrier, uint32_t rank) {
  asm volatile("{.reg .b32 there, barrier;\n"
               "mapa.shared::cluster.u32 there, %0, %3;\n"
               "mapa.shared::cluster.u32 barrier, %2, %3;\n"
               "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [barrier];}" ::"r"(to),
               "r"(x), "r"(barrier), "r"(rank)
               : "memory");
}
/* All threads of all blocks of the cluster; what they wrote before is seen after. barrier.cluster */
__device__ __forceinline__ void wn_cluster_sync(void) {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

#endif
