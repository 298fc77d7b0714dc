/* Collectives on host memory, and the choice between them and the GPU's. */
#include "dist/comm.h"

#include <stdlib.h>

#include "dist/nccl.h"
#include "kernels/kernels.h"

struct wn_comm {
  wn_device *device;
  wn_nccl *nccl; /* NULL: host memory, or a dry device */
  wn_traffic traffic;
};

/* Where the contributions to a sum arrive on a GPU. */
static wn_status create_nccl(wn_comm *comm, wn_device *device, wn_world *world, wn_group *const *groups,
                             int32_t n_groups, int64_t largest_reduced) {
  void *received = NULL;
  WN_TRY(wn_world_agree(world, wn_arena_alloc(device->weights, &received, "gradients of other ranks",
                                              (size_t)largest_reduced * sizeof(float))));
  return device->dry ? NULL : wn_nccl_create(&comm->nccl, device, world, groups, n_groups, received);
}

wn_status wn_comm_create(wn_comm **out, wn_device *device, wn_world *world, wn_group *const *groups, int32_t n_groups,
                         int64_t largest_reduced) {
  bool shared = false;
  for (int32_t g = 0; g < n_groups; g++) shared = shared || wn_group_size(groups[g]) > 1;
  wn_comm *comm = calloc(1, sizeof *comm);
  wn_status status = wn_world_agree(world, comm ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for the collectives"));
  if (!status && shared && device->kind == WN_CUDA)
    status = create_nccl(comm, device, world, groups, n_groups, largest_reduced);
  if (status) {
    free(comm);
    return status;
  }
  comm->device = device;
  *out = comm;
  return NULL;
}

void wn_comm_free(wn_comm *comm) {
  if (!comm) return;
  wn_nccl_free(comm->nccl);
  free(comm);
}

wn_status wn_comm_gather(wn_comm *comm, wn_group *group, wn_transfer **out, wn_tensor *all, const wn_tensor *piece) {
  WN_ASSERT(wn_tensor_count(all) == wn_tensor_count(piece) * wn_group_size(group) && all->dtype == piece->dtype,
            "gather of %lld elements into %lld", (long long)wn_tensor_count(piece), (long long)wn_tensor_count(all));
  size_t bytes = (size_t)wn_tensor_bytes(piece);
  comm->traffic.gathered_bytes += (int64_t)bytes * (wn_group_size(group) - 1);
  *out = NULL;
  if (comm->device->dry) return NULL;
  if (comm->nccl) return wn_nccl_gather(comm->nccl, group, out, all->data, piece->data, bytes);
  wn_request *request;
  WN_TRY(wn_group_gather_begin(group, &request, all->data, piece->data, bytes));
  *out = (wn_transfer *)(void *)request;
  return NULL;
}

static wn_status reduce_on_host(wn_comm *comm, wn_group *group, wn_tensor *piece, wn_tensor *full) {
  wn_device *device = comm->device;
  size_t mark = wn_arena_mark(device->scratch);
  wn_tensor received;
  WN_TRY(wn_tensor_alloc(&received, device->scratch, "gradients of other ranks", full->dtype, 1, wn_tensor_count(full),
                         0, 0, 0));
  if (!device->dry)
    WN_TRY(wn_group_reduce_scatter(group, piece->data, full->data, (size_t)wn_tensor_count(piece),
                                   (int32_t)wn_dtype_bytes(full->dtype), received.data));
  wn_arena_release(device->scratch, mark);
  return device->ops->zero(device, full);
}

wn_status wn_comm_reduce_scatter(wn_comm *comm, wn_group *group, wn_transfer **out, wn_tensor *piece, wn_tensor *full) {
  WN_ASSERT(wn_tensor_count(full) == wn_tensor_count(piece) * wn_group_size(group) && full->dtype == piece->dtype,
            "sum of %lld elements into %lld", (long long)wn_tensor_count(full), (long long)wn_tensor_count(piece));
  comm->traffic.summed_bytes += wn_tensor_bytes(full) - wn_tensor_bytes(piece);
  *out = NULL;
  if (comm->nccl) return wn_nccl_reduce_scatter(comm->nccl, group, out, piece, full);
  if (comm->device->kind == WN_CUDA) return NULL; /* a dry one */
  return reduce_on_host(comm, group, piece, full);
}

wn_traffic wn_comm_traffic(const wn_comm *comm) {
  return comm->traffic;
}

wn_status wn_comm_finish(wn_comm *comm, wn_transfer *transfer) {
  if (!transfer) return NULL;
  if (comm->nccl) return wn_nccl_finish(comm->nccl, transfer);
  return wn_request_wait((wn_request *)(void *)transfer);
}

wn_status wn_comm_take_wait_s(wn_comm *comm, double *seconds) {
  if (comm->nccl) return wn_nccl_take_wait_s(comm->nccl, seconds);
  *seconds = 0;
  return NULL;
}
