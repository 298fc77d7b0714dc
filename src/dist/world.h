/* The ranks of a run, and collectives among groups of them. One rank needs no MPI at all; under mpirun or srun MPI is
 * initialised. On the CPU the collectives are MPI's; sums are made in rank order on the receiving side, so results do
 * not depend on the library's algorithm. */
#ifndef WN_DIST_WORLD_H
#define WN_DIST_WORLD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/log.h"

typedef struct wn_world wn_world;
typedef struct wn_group wn_group;     /* ranks that hold something in common */
typedef struct wn_request wn_request; /* a collective under way */

/* Initialises MPI when a launcher (mpirun, srun) started more than one process; else a world of one, which never
 * touches MPI. Collectives are called from the main thread, by every rank of the group, in the same order. They fail
 * with WN_E_WORLD and a sentence naming rank and operation: after timeout_s without an answer, when a rank they wait
 * for has ended, when the ranks are not at the same point. The world is then broken: every later collective fails at
 * once, and buffers of the failed one must not be reused (MPI may still own them). What is left to do is to report and
 * to exit with a code other than 0. */
WN_MUST_USE wn_status wn_world_create(wn_world **out, int32_t timeout_s);
/* A world of `size` of which this process is rank 0 and the other ranks do not exist: every collective answers at once,
 * as if they had given what this one gives. For planning. */
WN_MUST_USE wn_status wn_world_create_dry(wn_world **out, int32_t size);
/* Waits for all ranks and finalises MPI, unless the world is broken. Ranks still inside a collective learn that this
 * one has ended. */
void wn_world_free(wn_world *world);
int32_t wn_world_rank(const wn_world *world);
int32_t wn_world_size(const wn_world *world);
/* This process's place among those of its host, as the launcher says; its rank where the launcher does not. */
int32_t wn_world_local_rank(const wn_world *world);
void wn_world_set_timeout(wn_world *world, int32_t timeout_s);

/* All ranks; or, for expert groups, the ranks with rank mod n_classes equal to this rank's (WN_E_CONFIG when n_classes
 * does not divide the world). Every rank makes the same groups in the same order; nothing is sent. Owned by the world.
 */
wn_group *wn_world_all(wn_world *world);
WN_MUST_USE wn_status wn_world_split(wn_world *world, wn_group **out, int32_t n_classes);
int32_t wn_group_rank(const wn_group *group);
int32_t wn_group_size(const wn_group *group);

/* Every rank calls with its own local outcome at a fixed point; all get an error if any had one (a rank that was fine
 * gets "rank R failed: <its sentence>", with its code). Takes ownership of `local`. */
WN_MUST_USE wn_status wn_world_agree(wn_world *world, wn_status local);
WN_MUST_USE wn_status wn_world_barrier(wn_world *world);
WN_MUST_USE wn_status wn_group_broadcast(wn_group *group, void *data, size_t bytes, int32_t root);
/* x[n] = sum over ranks, added in rank order: the same bits on every rank. */
WN_MUST_USE wn_status wn_group_sum_f64(wn_group *group, double *x, size_t n);
WN_MUST_USE wn_status wn_group_sum_i64(wn_group *group, int64_t *x, size_t n);
/* out[size * bytes] = every rank's piece in rank order (ranks give equal sizes). out may hold the own piece already. */
WN_MUST_USE wn_status wn_group_gather(wn_group *group, void *out, const void *piece, size_t bytes);

/* Begins an all-gather of pieces of `bytes` each into out; wait finishes and frees it (NULL, as in a group of one, is
 * fine). piece and out stay untouched until then. Progress is made by other calls into the world. */
WN_MUST_USE wn_status wn_group_gather_begin(wn_group *group, wn_request **out_request, void *out, const void *piece,
                                            size_t bytes);
WN_MUST_USE wn_status wn_request_wait(wn_request *request);
/* piece[n] += (sum over ranks r of rank r's full[own_rank * n .. + n]), a fixed pairwise sum in rank order,
 * ((0+1)+(2+3))+...; FP32 or FP64 (element_bytes 4 or 8). scratch: size * n elements, overwritten (NULL in a group of
 * one). */
WN_MUST_USE wn_status wn_group_reduce_scatter(wn_group *group, void *piece, const void *full, size_t n,
                                              int32_t element_bytes, void *scratch);
/* Seconds this rank has spent waiting in collectives since the last call (speed.csv). */
double wn_world_take_wait_s(wn_world *world);

#endif
