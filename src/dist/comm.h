/* Collectives on a device's memory: MPI's where the device is the CPU, NCCL's where it is a GPU; the same sums in the
 * same order. On a GPU they run on the communication queue, beside the operations: each begins when what was asked of
 * the device before it is done, and wn_comm_finish makes what is asked afterwards wait for it, not the host. */
#ifndef WN_DIST_COMM_H
#define WN_DIST_COMM_H

#include "base/device.h"
#include "dist/world.h"

/* On a dry device nothing travels, but memory is taken and bytes are counted. */
typedef struct wn_comm wn_comm;
typedef struct wn_transfer wn_transfer; /* a collective under way */

/* For groups of which this rank is a member. largest_reduced: elements of the largest tensor that will be summed.
 * Collective. WN_E_WORLD: a GPU without NCCL in this build, or ranks that do not answer. */
WN_MUST_USE wn_status wn_comm_create(wn_comm **out, wn_device *device, wn_world *world, wn_group *const *groups,
                                     int32_t n_groups, int64_t largest_reduced);
void wn_comm_free(wn_comm *comm); /* NULL is fine */

/* all[size * n] = every rank's piece[n], in rank order. *out is NULL where nothing needs to be waited for. */
WN_MUST_USE wn_status wn_comm_gather(wn_comm *comm, wn_group *group, wn_transfer **out, wn_tensor *all,
                                     const wn_tensor *piece);
/* piece[n] += the fixed pairwise sum over ranks r of rank r's full[own rank * n ..] (dist/world.h); full is zero then.
 */
WN_MUST_USE wn_status wn_comm_reduce_scatter(wn_comm *comm, wn_group *group, wn_transfer **out, wn_tensor *piece,
                                             wn_tensor *full);
/* Bytes so far: weights that came from other ranks, contributions to sums that went to them. */
typedef struct wn_traffic {
  int64_t gathered_bytes, summed_bytes;
} wn_traffic;
wn_traffic wn_comm_traffic(const wn_comm *comm);
WN_MUST_USE wn_status wn_comm_finish(wn_comm *comm, wn_transfer *transfer); /* frees it; NULL is fine */

/* Seconds that a GPU's operations waited for transfers since the last call; all work so far must be done (a download
 * has returned since the last finish). On the CPU 0: there the host waits, and the world counts it. */
WN_MUST_USE wn_status wn_comm_take_wait_s(wn_comm *comm, double *seconds);

#endif
