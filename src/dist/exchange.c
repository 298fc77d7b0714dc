/* Messages among ranks, and waiting for them. Everything is posted at once and then polled, never blocked on, so that
 * a peer that died, hangs or took another path ends this rank with a sentence. Polling sleeps more and more: ranks may
 * share cores. After the first failure the world is broken: requests that MPI still owns are left to it, and the
 * process is expected to exit, which makes the launcher stop the others. */
#include <mpi.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/time.h"
#include "dist/internal.h"

enum {
  CHUNK_BYTES = 16 << 20, /* MPI counts are ints; also bounds what one message pins down */
  TAGS_PER_GROUP = 2048,  /* WN_MAX_GROUPS times this stays below WN_EXIT_TAG */
  LEAVE_GRACE_S = 1,      /* data of a rank that left may still be in flight */
  YIELDS = 64,
  MAX_SLEEP_US = 500
};
_Static_assert(WN_MAX_GROUPS *TAGS_PER_GROUP < WN_EXIT_TAG, "tags of groups reach the exit tag");

typedef struct message {
  int32_t peer; /* world rank */
  int32_t bytes;
  bool receive;
} message;

struct wn_request {
  wn_group *group;
  const char *operation;
  int32_t tag;
  int32_t n, capacity;
  MPI_Request *handles;
  MPI_Status *statuses;
  message *messages;
};

static size_t chunks_of(size_t bytes) {
  return bytes == 0 ? 1 : (bytes + CHUNK_BYTES - 1) / CHUNK_BYTES;
}

static void free_request(wn_request *request) {
  free(request->handles);
  free(request->statuses);
  free(request->messages);
  free(request);
}

wn_status wn_exchange_begin_tag(wn_request **out, wn_group *group, const char *operation, size_t messages, size_t bytes,
                                int32_t tag) {
  wn_world *world = group->world;
  if (world->broken)
    return WN_FAIL(WN_E_WORLD, "rank %d cannot do %s: an earlier collective failed", world->rank, operation);
  size_t capacity = messages * chunks_of(bytes);
  WN_ASSERT(capacity > 0 && capacity <= INT32_MAX, "%zu messages in %s", capacity, operation);
  wn_request *request = calloc(1, sizeof *request);
  if (!request) return WN_FAIL(WN_E_MEMORY, "out of memory for %s", operation);
  *request = (wn_request){.group = group, .operation = operation, .tag = tag, .capacity = (int32_t)capacity};
  request->handles = malloc(capacity * sizeof *request->handles);
  request->statuses = malloc(capacity * sizeof *request->statuses);
  request->messages = malloc(capacity * sizeof *request->messages);
  if (!request->handles || !request->statuses || !request->messages) {
    free_request(request);
    return WN_FAIL(WN_E_MEMORY, "out of memory for %zu messages of %s", capacity, operation);
  }
  *out = request;
  return NULL;
}

wn_status wn_exchange_begin(wn_request **out, wn_group *group, const char *operation, size_t messages, size_t bytes) {
  int32_t tag = group->index * TAGS_PER_GROUP + (int32_t)(group->sequence % TAGS_PER_GROUP);
  WN_TRY(wn_exchange_begin_tag(out, group, operation, messages, bytes, tag));
  group->sequence++;
  return NULL;
}

/* Breaks the world. The request's memory is leaked on purpose: MPI may still write statuses and data. */
static wn_status break_world(wn_request *request, wn_status why) {
  request->group->world->broken = true;
  return why;
}

static wn_status mpi_failed(const wn_request *request, int32_t peer, int code) {
  char text[MPI_MAX_ERROR_STRING] = "";
  int length = 0, class = MPI_SUCCESS;
  MPI_Error_class(code, &class);
  if (class == MPI_ERR_TRUNCATE)
    return WN_FAIL(WN_E_WORLD,
                   "rank %d in %s got more bytes from rank %d than expected: the ranks are not at the same point",
                   request->group->world->rank, request->operation, peer);
  MPI_Error_string(code, text, &length);
  return WN_FAIL_HINT(WN_E_WORLD, "see the other ranks' messages: usually one of them failed first",
                      "rank %d: %s with rank %d failed: %s", request->group->world->rank, request->operation, peer,
                      text);
}

static wn_status post(wn_request *request, int32_t place, void *data, size_t bytes, bool receive) {
  int32_t peer = wn_group_world_rank(request->group, place);
  size_t chunks = chunks_of(bytes);
  for (size_t c = 0; c < chunks; c++) {
    size_t at = c * CHUNK_BYTES, left = bytes - at;
    int count = (int)(left < CHUNK_BYTES ? left : CHUNK_BYTES);
    void *from = bytes == 0 ? NULL : (char *)data + at;
    WN_ASSERT(request->n < request->capacity, "%s posts more than %d messages", request->operation, request->capacity);
    MPI_Request *handle = &request->handles[request->n];
    int code = receive ? MPI_Irecv(from, count, MPI_BYTE, peer, request->tag, MPI_COMM_WORLD, handle)
                       : MPI_Isend(from, count, MPI_BYTE, peer, request->tag, MPI_COMM_WORLD, handle);
    if (code != MPI_SUCCESS) return break_world(request, mpi_failed(request, peer, code));
    request->messages[request->n++] = (message){.peer = peer, .bytes = count, .receive = receive};
  }
  return NULL;
}

wn_status wn_exchange_send(wn_request *request, int32_t place, const void *data, size_t bytes) {
  return post(request, place, (void *)(uintptr_t)data, bytes, false);
}

wn_status wn_exchange_receive(wn_request *request, int32_t place, void *data, size_t bytes) {
  return post(request, place, data, bytes, true);
}

/* The peers with unfinished messages, in rank order as posted: "1, 2, 5 and 3 more". */
static void name_missing(const wn_request *request, char *text, size_t text_bytes) {
  int32_t last = -1, more = 0;
  size_t used = 0;
  text[0] = 0;
  for (int32_t world_rank = 0; world_rank < request->group->world->size; world_rank++) {
    for (int32_t i = 0; i < request->n && last != world_rank; i++) {
      int done = 0;
      if (request->messages[i].peer != world_rank) continue;
      if (MPI_Request_get_status(request->handles[i], &done, MPI_STATUS_IGNORE) == MPI_SUCCESS && done) continue;
      last = world_rank;
      int wrote = snprintf(text + used, text_bytes - used, "%s%d", used ? ", " : "", world_rank);
      if (wrote < 0 || used + (size_t)wrote >= text_bytes - 16) {
        text[used] = 0;
        more++;
      } else {
        used += (size_t)wrote;
      }
    }
  }
  if (more) snprintf(text + used, text_bytes - used, " and %d more", more);
}

static wn_status timed_out(const wn_request *request, double waited_s) {
  char missing[160];
  name_missing(request, missing, sizeof missing);
  return WN_FAIL_HINT(WN_E_WORLD, "look at that rank's own messages; raise the timeout if it is only slow",
                      "rank %d waited %.0f s in %s: no answer from rank %s", request->group->world->rank, waited_s,
                      request->operation, missing);
}

/* A rank that is shutting down sends its exit message to all. True when one that still owes us something has. */
static bool peer_left(const wn_request *request, int32_t *who) {
  if (request->tag == WN_EXIT_TAG) return false;
  for (int32_t i = 0; i < request->n; i++) {
    int done = 0, left = 0;
    if (MPI_Request_get_status(request->handles[i], &done, MPI_STATUS_IGNORE) != MPI_SUCCESS || done) continue;
    *who = request->messages[i].peer;
    if (MPI_Iprobe(*who, WN_EXIT_TAG, MPI_COMM_WORLD, &left, MPI_STATUS_IGNORE) == MPI_SUCCESS && left) return true;
  }
  return false;
}

bool wn_world_rank_left(wn_world *world, int32_t *who) {
  for (*who = 0; world->mpi && *who < world->size; ++*who) {
    int left = 0;
    if (*who == world->rank) continue;
    if (MPI_Iprobe(*who, WN_EXIT_TAG, MPI_COMM_WORLD, &left, MPI_STATUS_IGNORE) == MPI_SUCCESS && left) return true;
  }
  return false;
}

static void idle(int64_t polls) {
  if (polls < YIELDS) {
    sched_yield();
    return;
  }
  int64_t us = polls - YIELDS + 1;
  if (us > MAX_SLEEP_US) us = MAX_SLEEP_US;
  nanosleep(&(struct timespec){.tv_nsec = (long)us * 1000}, NULL);
}

/* Counts of receives: a peer that is at another point of the program shows up as a message of the wrong length. */
static wn_status check_counts(wn_request *request) {
  for (int32_t i = 0; i < request->n; i++) {
    const message *m = &request->messages[i];
    int count = 0;
    if (!m->receive) continue;
    MPI_Get_count(&request->statuses[i], MPI_BYTE, &count);
    if (count == m->bytes) continue;
    return WN_FAIL(WN_E_WORLD,
                   "rank %d in %s expected %d bytes from rank %d and got %d: the ranks are not at the same point",
                   request->group->world->rank, request->operation, m->bytes, m->peer, count);
  }
  return NULL;
}

static wn_status test_failed(const wn_request *request, int code) {
  if (code == MPI_ERR_IN_STATUS)
    for (int32_t i = 0; i < request->n; i++) {
      int error = request->statuses[i].MPI_ERROR;
      if (error != MPI_SUCCESS && error != MPI_ERR_PENDING)
        return mpi_failed(request, request->messages[i].peer, error);
    }
  return mpi_failed(request, request->group->world->rank, code);
}

static wn_status poll_until_done(wn_request *request, double *waited_s) {
  wn_world *world = request->group->world;
  double start = wn_time_s(), left_since = 0;
  int32_t who = -1;
  for (int64_t polls = 0;; polls++) {
    int done = 0;
    for (int32_t i = 0; i < request->n; i++) request->statuses[i].MPI_ERROR = MPI_SUCCESS;
    int code = MPI_Testall(request->n, request->handles, &done, request->statuses);
    double now = wn_time_s();
    *waited_s = now - start;
    if (code != MPI_SUCCESS) return test_failed(request, code);
    if (done) return check_counts(request);
    if (*waited_s > world->timeout_s) return timed_out(request, *waited_s);
    if (polls > YIELDS && polls % 16 == 0 && peer_left(request, &who)) {
      if (left_since == 0) left_since = now;
      if (now - left_since > LEAVE_GRACE_S)
        return WN_FAIL(WN_E_WORLD, "rank %d was left alone in %s: rank %d has ended", world->rank, request->operation,
                       who);
    }
    idle(polls);
  }
}

wn_status wn_request_wait(wn_request *request) {
  if (!request) return NULL;
  double waited_s = 0;
  wn_status status = poll_until_done(request, &waited_s);
  request->group->world->wait_s += waited_s;
  if (status) return break_world(request, status);
  free_request(request);
  return NULL;
}
