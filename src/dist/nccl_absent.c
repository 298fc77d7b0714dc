/* A build without NCCL: several GPUs are refused by name. */
#include "dist/nccl.h"

wn_status wn_nccl_create(wn_nccl **out, wn_device *device, wn_world *world, wn_group *const *groups, int32_t n_groups,
                         float *received) {
  (void)out, (void)device, (void)groups, (void)n_groups, (void)received;
  return WN_FAIL_HINT(WN_E_WORLD, "install NCCL and build again, or run on one GPU",
                      "%d GPUs are asked for, but this build has no NCCL", wn_world_size(world));
}

void wn_nccl_free(wn_nccl *nccl) {
  WN_ASSERT(!nccl, "NCCL in a build without it");
}

wn_status wn_nccl_gather(wn_nccl *nccl, wn_group *group, wn_transfer **out, void *all, const void *piece,
                         size_t bytes) {
  (void)group, (void)out, (void)all, (void)piece, (void)bytes;
  WN_ASSERT(!nccl, "NCCL in a build without it");
  return NULL;
}

wn_status wn_nccl_reduce_scatter(wn_nccl *nccl, wn_group *group, wn_transfer **out, wn_tensor *piece, wn_tensor *full) {
  (void)group, (void)out, (void)piece, (void)full;
  WN_ASSERT(!nccl, "NCCL in a build without it");
  return NULL;
}

wn_status wn_nccl_finish(wn_nccl *nccl, wn_transfer *transfer) {
  (void)transfer;
  WN_ASSERT(!nccl, "NCCL in a build without it");
  return NULL;
}

wn_status wn_nccl_take_wait_s(wn_nccl *nccl, double *seconds) {
  (void)seconds;
  WN_ASSERT(!nccl, "NCCL in a build without it");
  return NULL;
}
