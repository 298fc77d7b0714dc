/* NCCL's side of the collectives. Pieces travel; sums are our own, in rank order, so that results do not depend on the
 * library's algorithm. Communicators are made non-blocking, and every wait of the host for the device looks after them,
 * because a collective that a rank never joins would otherwise hold the GPU for ever. */
#include "dist/nccl.h"

#include <cuda_runtime_api.h>
#include <nccl.h>
#include <stdlib.h>
#include <time.h>

#include "base/time.h"
#include "dist/internal.h"
#include "kernels/cuda/cuda.h"

static const double leave_grace_s = 2;

struct wn_transfer {
  cudaEvent_t done;
  cudaEvent_t before, after; /* of the compute queue's wait for it: on that queue, with times */
  const char *operation;
  int64_t number;    /* from 1, in the order they began */
  bool finished;     /* the compute queue waits for it, or has: nobody asks for it again */
  wn_transfer *next; /* among those under way, oldest first; or among the spare ones */
};

struct wn_nccl {
  wn_device *device;
  wn_world *world;
  cudaStream_t compute, comm;
  int32_t n_groups;
  wn_group *groups[WN_MAX_GROUPS];
  ncclComm_t comms[WN_MAX_GROUPS]; /* NULL: a group of one */
  float *received;                 /* contributions of every rank to the piece being summed */
  cudaEvent_t begun;
  wn_transfer *under_way, **last, *spare; /* under way: not finished, or not seen to be waited for */
  int64_t n_begun, stuck;                 /* stuck: the number of the transfer that the host last waited for */
  double stuck_since_s, left_since_s;
  double waited_ms; /* of transfers that are no longer under way, since the last take */
};

/* ---- failures ---- */

static wn_status cuda_ok(cudaError_t error, const char *what) {
  if (error == cudaSuccess) return NULL;
  return WN_FAIL(WN_E_DEVICE, "the GPU failed in %s: %s", what, cudaGetErrorString(error));
}

static wn_status break_world(wn_nccl *n, wn_status why) {
  n->world->broken = true;
  for (int32_t g = 0; g < n->n_groups; g++) {
    if (n->comms[g]) ncclCommAbort(n->comms[g]);
    n->comms[g] = NULL;
  }
  return why;
}

static wn_status nccl_failed(wn_nccl *n, const char *operation, ncclResult_t result) {
  return break_world(n, WN_FAIL_HINT(WN_E_WORLD, "see the other ranks' messages: usually one of them failed first",
                                     "rank %d: %s failed in NCCL: %s", n->world->rank, operation,
                                     ncclGetErrorString(result)));
}

/* Whether a wait for the other ranks has to end: an error of NCCL's, a rank that has ended, the timeout. */
static wn_status look(wn_nccl *n, const char *operation, double waited_s) {
  int32_t who;
  for (int32_t g = 0; g < n->n_groups; g++) {
    ncclResult_t result = ncclSuccess;
    if (!n->comms[g]) continue;
    ncclResult_t asked = ncclCommGetAsyncError(n->comms[g], &result);
    if (asked != ncclSuccess || (result != ncclSuccess && result != ncclInProgress))
      return nccl_failed(n, operation, asked != ncclSuccess ? asked : result);
  }
  if (wn_world_rank_left(n->world, &who)) {
    if (n->left_since_s == 0) n->left_since_s = wn_time_s();
    if (wn_time_s() - n->left_since_s > leave_grace_s)
      return break_world(
          n, WN_FAIL(WN_E_WORLD, "rank %d was left alone in %s: rank %d has ended", n->world->rank, operation, who));
  }
  if (waited_s > n->world->timeout_s)
    return break_world(
        n, WN_FAIL_HINT(WN_E_WORLD, "look at the other ranks' messages; raise the timeout if they are slow",
                        "rank %d waited %.0f s in %s: not all ranks have come", n->world->rank, waited_s, operation));
  return NULL;
}

/* A non-blocking call goes on in the background: waits until it has been taken up. */
static wn_status taken_up(wn_nccl *n, ncclComm_t comm, const char *operation, ncclResult_t result) {
  double start = wn_time_s();
  while (result == ncclInProgress) {
    ncclResult_t asked = ncclCommGetAsyncError(comm, &result);
    if (asked != ncclSuccess) return nccl_failed(n, operation, asked);
    if (result != ncclInProgress) break;
    WN_TRY(look(n, operation, wn_time_s() - start));
    nanosleep(&(struct timespec){.tv_nsec = 50000}, NULL);
  }
  return result == ncclSuccess ? NULL : nccl_failed(n, operation, result);
}

/* What the compute queue has waited for can be used anew; how long it waited is kept. */
static wn_status reclaim(wn_nccl *n) {
  wn_transfer **at = &n->under_way;
  n->last = at;
  while (*at) {
    wn_transfer *t = *at;
    if (!t->finished || cudaEventQuery(t->after) != cudaSuccess) {
      at = n->last = &t->next;
      continue;
    }
    float ms;
    WN_TRY(cuda_ok(cudaEventElapsedTime(&ms, t->before, t->after), "timing the collectives"));
    n->waited_ms += (double)ms;
    *at = t->next;
    t->next = n->spare;
    n->spare = t;
  }
  return NULL;
}

static const wn_transfer *oldest_not_done(const wn_nccl *n) {
  for (const wn_transfer *t = n->under_way; t; t = t->next)
    if (cudaEventQuery(t->done) == cudaErrorNotReady) return t;
  return NULL;
}

/* Looked at about every millisecond while the host waits for the device. The time counts from when this transfer came
 * to be the oldest: the wait as a whole may be long, and no rank late. */
static wn_status watch(void *context, double waited_s) {
  wn_nccl *n = context;
  const wn_transfer *t = oldest_not_done(n);
  double now = wn_time_s();
  if (!t) return NULL; /* what is waited for is this GPU's own work */
  if (t->number != n->stuck) {
    n->stuck = t->number;
    n->stuck_since_s = now;
  }
  double stuck_s = now - n->stuck_since_s;
  return look(n, t->operation, stuck_s < waited_s ? stuck_s : waited_s);
}

/* ---- creation ---- */

static wn_status join(wn_nccl *n, int32_t g) {
  wn_group *group = n->groups[g];
  ncclUniqueId id;
  wn_status local = NULL;
  if (wn_group_size(group) == 1) return NULL;
  if (wn_group_rank(group) == 0 && ncclGetUniqueId(&id) != ncclSuccess)
    local = WN_FAIL(WN_E_WORLD, "NCCL did not start: %s", ncclGetLastError(NULL));
  WN_TRY(wn_world_agree(n->world, local));
  WN_TRY(wn_group_broadcast(group, &id, sizeof id, 0));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclResult_t result = ncclCommInitRankConfig(&n->comms[g], wn_group_size(group), id, wn_group_rank(group), &config);
  return taken_up(n, n->comms[g], "joining the GPUs", result);
}

wn_status wn_nccl_create(wn_nccl **out, wn_device *device, wn_world *world, wn_group *const *groups, int32_t n_groups,
                         float *received) {
  WN_ASSERT(n_groups <= WN_MAX_GROUPS, "%d groups", n_groups);
  wn_nccl *n = calloc(1, sizeof *n);
  wn_status status = wn_world_agree(world, n ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for the collectives"));
  if (status) {
    free(n);
    return status;
  }
  n->device = device;
  n->world = world;
  n->compute = wn_cuda_compute_queue(device);
  n->comm = wn_cuda_comm_queue(device);
  n->n_groups = n_groups;
  n->last = &n->under_way;
  n->received = received;
  for (int32_t g = 0; g < n_groups; g++) n->groups[g] = groups[g];
  status =
      wn_world_agree(world, cuda_ok(cudaEventCreateWithFlags(&n->begun, cudaEventDisableTiming), "making an event"));
  for (int32_t g = 0; g < n_groups && !status; g++) status = join(n, g);
  if (status) {
    wn_nccl_free(n);
    return status;
  }
  wn_cuda_set_watch(device, watch, n);
  *out = n;
  return NULL;
}

static void free_transfers(wn_transfer *t) {
  while (t) {
    wn_transfer *next = t->next;
    if (t->done) cudaEventDestroy(t->done);
    if (t->before) cudaEventDestroy(t->before);
    if (t->after) cudaEventDestroy(t->after);
    free(t);
    t = next;
  }
}

void wn_nccl_free(wn_nccl *n) {
  if (!n) return;
  wn_cuda_set_watch(n->device, NULL, NULL);
  for (int32_t g = 0; g < n->n_groups; g++)
    if (n->comms[g]) ncclCommAbort(n->comms[g]); /* not Destroy: that waits for the other ranks without a limit */
  free_transfers(n->under_way);
  free_transfers(n->spare);
  if (n->begun) cudaEventDestroy(n->begun);
  free(n);
}

/* ---- transfers ---- */

static int32_t group_index(const wn_nccl *n, const wn_group *group) {
  for (int32_t g = 0; g < n->n_groups; g++)
    if (n->groups[g] == group) return g;
  WN_ASSERT(false, "a group that the collectives were not made for");
}

/* The communication queue goes on when what was asked of the compute queue so far is done. */
static wn_status begin(wn_nccl *n, const char *operation) {
  if (n->world->broken)
    return WN_FAIL(WN_E_WORLD, "rank %d cannot do %s: an earlier collective failed", n->world->rank, operation);
  WN_TRY(cuda_ok(cudaEventRecord(n->begun, n->compute), operation));
  return cuda_ok(cudaStreamWaitEvent(n->comm, n->begun, 0), operation);
}

static wn_status make_transfer(wn_transfer **out) {
  *out = calloc(1, sizeof **out);
  if (!*out) return WN_FAIL(WN_E_MEMORY, "out of memory for the collectives");
  WN_TRY(cuda_ok(cudaEventCreateWithFlags(&(*out)->done, cudaEventDisableTiming), "making an event"));
  WN_TRY(cuda_ok(cudaEventCreate(&(*out)->before), "making an event"));
  return cuda_ok(cudaEventCreate(&(*out)->after), "making an event");
}

static wn_status end(wn_nccl *n, wn_transfer **out, const char *operation) {
  WN_TRY(reclaim(n));
  if (!n->spare) WN_TRY(make_transfer(&n->spare));
  wn_transfer *t = n->spare;
  WN_TRY(cuda_ok(cudaEventRecord(t->done, n->comm), operation));
  n->spare = t->next;
  t->operation = operation;
  t->number = ++n->n_begun;
  t->finished = false;
  t->next = NULL;
  *n->last = t;
  n->last = &t->next;
  *out = t;
  return NULL;
}

wn_status wn_nccl_gather(wn_nccl *n, wn_group *group, wn_transfer **out, void *all, const void *piece, size_t bytes) {
  static const char operation[] = "gathering weights";
  int32_t g = group_index(n, group);
  WN_TRY(begin(n, operation));
  ncclResult_t result = ncclAllGather(piece, all, bytes, ncclUint8, n->comms[g], n->comm);
  WN_TRY(taken_up(n, n->comms[g], operation, result));
  return end(n, out, operation);
}

static wn_status exchange(wn_nccl *n, int32_t g, const char *operation, const float *full, size_t count) {
  int32_t size = wn_group_size(n->groups[g]), own = wn_group_rank(n->groups[g]);
  ncclComm_t comm = n->comms[g];
  ncclResult_t result = ncclGroupStart();
  for (int32_t k = 1; k < size && result == ncclSuccess; k++) {
    int32_t to = (own + k) % size, from = (own + size - k) % size;
    result = ncclSend(full + (size_t)to * count, count, ncclFloat32, to, comm, n->comm);
    if (result == ncclSuccess || result == ncclInProgress)
      result = ncclRecv(n->received + (size_t)from * count, count, ncclFloat32, from, comm, n->comm);
    if (result == ncclInProgress) result = ncclSuccess; /* queued within the group */
  }
  ncclResult_t ended = ncclGroupEnd(); /* after an error too: within a group an abort would only be queued */
  if (result != ncclSuccess) return nccl_failed(n, operation, result);
  return taken_up(n, comm, operation, ended);
}

wn_status wn_nccl_reduce_scatter(wn_nccl *n, wn_group *group, wn_transfer **out, wn_tensor *piece, wn_tensor *full) {
  static const char operation[] = "summing gradients";
  int32_t g = group_index(n, group), size = wn_group_size(group), own = wn_group_rank(group);
  WN_ASSERT(full->dtype == WN_F32, "sums of %s on a GPU", wn_dtype_name(full->dtype));
  size_t count = (size_t)wn_tensor_count(piece), bytes = count * sizeof(float);
  WN_TRY(begin(n, operation));
  WN_TRY(exchange(n, g, operation, full->data, count));
  WN_TRY(cuda_ok(cudaMemcpyAsync(n->received + (size_t)own * count, (float *)full->data + (size_t)own * count, bytes,
                                 cudaMemcpyDeviceToDevice, n->comm),
                 operation));
  WN_TRY(wn_cuda_sum_pieces(n->device, n->comm, piece->data, n->received, size, (int64_t)count));
  WN_TRY(cuda_ok(cudaMemsetAsync(full->data, 0, bytes * (size_t)size, n->comm), operation));
  return end(n, out, operation);
}

/* The compute queue waits; the host goes on. The transfer stays in the list until it has, so that a later wait of the
 * host knows what the compute queue waits for. */
wn_status wn_nccl_finish(wn_nccl *n, wn_transfer *t) {
  WN_ASSERT(!t->finished, "%s is finished already", t->operation);
  WN_TRY(cuda_ok(cudaEventRecord(t->before, n->compute), t->operation));
  WN_TRY(cuda_ok(cudaStreamWaitEvent(n->compute, t->done, 0), t->operation));
  WN_TRY(cuda_ok(cudaEventRecord(t->after, n->compute), t->operation));
  t->finished = true;
  return NULL;
}

wn_status wn_nccl_take_wait_s(wn_nccl *n, double *seconds) {
  WN_TRY(reclaim(n));
  *seconds = n->waited_ms * 1e-3;
  n->waited_ms = 0;
  return NULL;
}
