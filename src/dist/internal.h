/* What the files of src/dist share: the world's and groups' insides, and the exchange that every collective is made of.
 */
#ifndef WN_DIST_INTERNAL_H
#define WN_DIST_INTERNAL_H

#include "dist/world.h"

enum { WN_MAX_GROUPS = 15, WN_EXIT_TAG = 32767 /* the largest tag that MPI promises */ };

struct wn_group {
  wn_world *world;
  int32_t index;       /* which group of the world, the same on every rank: keeps the tags of groups apart */
  int32_t size, rank;  /* rank: this process's place in the group */
  int32_t first, step; /* the world rank of place i is first + i * step */
  uint32_t sequence;   /* collectives begun: the same on every member at the same point */
};

struct wn_world {
  int32_t rank, size, timeout_s;
  bool mpi;       /* initialised by us, to be finalised by us */
  bool dry;       /* the other ranks do not exist */
  bool broken;    /* a collective failed or timed out: no other can be trusted, and MPI cannot be finalised */
  int32_t *codes; /* [size]: the ranks' outcomes, while they agree */
  double wait_s;
  int32_t n_groups;
  wn_group groups[WN_MAX_GROUPS];
};

/* True when another rank is shutting down, and says so. */
bool wn_world_rank_left(wn_world *world, int32_t *who);

int32_t wn_group_world_rank(const wn_group *group, int32_t place);

/* A set of messages among a group. `operation` (a literal) is named in errors. Messages longer than a chunk travel as
 * several; every byte count, 0 too, sends at least one, so that a 0-byte exchange is a barrier. Made with room for
 * `messages` messages of at most `bytes` bytes each. wn_request_wait completes and frees it. */
WN_MUST_USE wn_status wn_exchange_begin(wn_request **out, wn_group *group, const char *operation, size_t messages,
                                        size_t bytes);
/* As above, with a tag of the caller's that no collective uses. */
WN_MUST_USE wn_status wn_exchange_begin_tag(wn_request **out, wn_group *group, const char *operation, size_t messages,
                                            size_t bytes, int32_t tag);
/* On an error the request is gone and the world broken. */
WN_MUST_USE wn_status wn_exchange_send(wn_request *request, int32_t place, const void *data, size_t bytes);
WN_MUST_USE wn_status wn_exchange_receive(wn_request *request, int32_t place, void *data, size_t bytes);

#endif
