/* How far the host runs ahead of the GPU. The driver holds about a thousand launches; one more blocks inside it, where
 * no watch looks after a rank that has stopped, so that a wait of the queue for that rank would never end. */
#ifndef WN_KERNELS_CUDA_PACE_CUH
#define WN_KERNELS_CUDA_PACE_CUH

#include "kernels/cuda/support.cuh"

/* Before every operation: waits, watched, until the GPU is at most some hundred operations behind. */
extern "C" WN_MUST_USE wn_status wn_cuda_keep_pace(wn_device *device);

#endif
