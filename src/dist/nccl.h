/* Collectives among GPUs, one process each; NCCL, bootstrapped over the world's MPI. Only comm.c calls these. In a
 * build without NCCL nccl_absent.c stands behind this header. */
#ifndef WN_DIST_NCCL_H
#define WN_DIST_NCCL_H

#include "dist/comm.h"

typedef struct wn_nccl wn_nccl;

/* As wn_comm_create; received: memory of the device for the contributions of all ranks to the largest sum. While the
 * host waits for the device, it also watches NCCL: after the world's timeout, after an error of NCCL's, or when a rank
 * that is waited for has ended, the wait ends with WN_E_WORLD naming rank and operation. */
WN_MUST_USE wn_status wn_nccl_create(wn_nccl **out, wn_device *device, wn_world *world, wn_group *const *groups,
                                     int32_t n_groups, float *received);
void wn_nccl_free(wn_nccl *nccl); /* NULL is fine */
WN_MUST_USE wn_status wn_nccl_gather(wn_nccl *nccl, wn_group *group, wn_transfer **out, void *all, const void *piece,
                                     size_t bytes);
WN_MUST_USE wn_status wn_nccl_reduce_scatter(wn_nccl *nccl, wn_group *group, wn_transfer **out, wn_tensor *piece,
                                             wn_tensor *full);
WN_MUST_USE wn_status wn_nccl_finish(wn_nccl *nccl, wn_transfer *transfer);
WN_MUST_USE wn_status wn_nccl_take_wait_s(wn_nccl *nccl, double *seconds);

#endif
