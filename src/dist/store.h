/* The parameter store: who holds which piece of which parameter.
 *
 * A unit is (layer, part, group, kind, role, stored dtype): one flat buffer with its tensors at 256-byte offsets,
 * padded to a multiple of the group's size; rank r of the group holds piece r, contiguous. A piece that trains (BASE,
 * INDEXER) has the FP32 master, two moments and an FP32 gradient, and a copy in the dtype that operations want where
 * that is not the master's; a frozen one is stored in that dtype alone, or as FP8: codes in the piece, and beside it
 * the block scales of the whole unit, the same on every rank. A layer's weights are gathered when it needs them, a
 * layer ahead; FP8 travels as FP8 and is widened on arrival. Gradients are summed over the group and cut as soon as a
 * layer is done. In a world of one the gathered weights and gradients ARE the pieces, FP8 excepted: nothing is copied.
 *
 * Frozen experts may be divided into parts, which are acquired one after another while their layer is held: the whole
 * of a large layer never lies on one rank. */
#ifndef WN_DIST_STORE_H
#define WN_DIST_STORE_H

#include "base/device.h"
#include "dist/comm.h"

typedef enum wn_kind {
  WN_BASE,    /* trained by the token loss */
  WN_INDEXER, /* trained by the KL */
  WN_FROZEN,  /* never changes: no optimizer memory at all */
  WN_BUFFER,  /* changed by a rule, not by a gradient: the router's selection bias */
  WN_N_KINDS
} wn_kind;

enum { WN_NAME_BYTES = 160 };

typedef struct wn_param {
  char hf_name[WN_NAME_BYTES]; /* "model.layers.3.mlp.experts.17.up_proj.weight" */
  int32_t layer;               /* -1 embedding; 0 .. L-1; L: final norm and head */
  int32_t slot, expert;        /* which weight of the layer (model/params.h); expert -1: not one */
  wn_kind kind;
  wn_role role;  /* what operations take it as: WN_ACT, or WN_STAT where precision is wanted (the router's bias) */
  int32_t group; /* index into the store's groups: 0 all ranks, 1 expert group */
  int32_t part;  /* 0: comes and goes with its layer; 1, 2 ..: a part of the layer's experts (FROZEN only) */
  int32_t rank;
  int64_t dim[3];
  bool decay;          /* weight decay: matrices only */
  bool fp8;            /* FROZEN matrices that operations take as ACT: stored as E4M3 codes and block scales */
  wn_dtype file_dtype; /* in checkpoints: F32 or BF16 */
} wn_param;

int64_t wn_param_elements(const wn_param *p);
bool wn_kind_trains(wn_kind kind); /* by gradients: has moments */

/* A run of one parameter's elements inside this rank's piece. */
typedef struct wn_segment {
  int32_t param;
  int64_t first, offset, count;
} wn_segment; /* parameter element, piece element, elements */

typedef struct wn_piece {
  int32_t layer, part, group;
  wn_kind kind;
  wn_role role;
  bool fp8;
  wn_tensor master, m, v, grad; /* flat [piece elements]; m, v, grad absent (data NULL) for FROZEN and BUFFER */
  wn_tensor weight;             /* what is gathered: the role's dtype (codes for FP8); often the master itself */
  wn_tensor scale;              /* FP8: F32 block scales of all the unit's parameters; wn_store_scales has one's own */
  const wn_segment *segments;
  int32_t n_segments;
} wn_piece;

typedef struct wn_store wn_store;

/* params must be sorted by layer and outlive the store, as must the groups; groups[0] is all ranks. A group's members
 * pass the same parameters of it, in the same order (else WN_E_WORLD on all of them); the parameters of other groups
 * may differ from rank to rank. Zeroed masters, moments, gradients. All memory from device->weights, but a layer's
 * worth of scratch during reduce on the CPU. A master is MASTER; that of a FROZEN piece is of the role's dtype, or
 * F8_E4M3: it is all there is. Collective. */
WN_MUST_USE wn_status wn_store_create(wn_store **out, wn_device *device, wn_world *world, wn_group *const *groups,
                                      int32_t n_groups, const wn_param *params, int32_t n_params);
void wn_store_free(wn_store *store);

/* Rounds the masters into the weights, where these are copies: after masters were written by anything but adamw. */
WN_MUST_USE wn_status wn_store_publish(wn_store *store);
/* After the last reduce of a step, before the pieces' gradients are used. */
WN_MUST_USE wn_status wn_store_settle(wn_store *store);
/* As wn_comm_traffic. */
wn_traffic wn_store_traffic(const wn_store *store);
/* As wn_comm_take_wait_s. */
WN_MUST_USE wn_status wn_store_take_wait_s(wn_store *store, double *seconds);

/* Starts gathering a layer's weights; acquire without it is fine, and waits. At most two layers are held (prefetched or
 * acquired) at once, and of those with FP8 weights one is acquired, asserted. Pieces are not written while a layer is
 * held; all ranks ask in the same order. */
WN_MUST_USE wn_status wn_store_prefetch(wn_store *store, int32_t layer);
/* by_param[n_params]: fills the entries of this layer's parameters (those of part 0) with ACT tensors of their full
 * shapes. Valid until release. */
WN_MUST_USE wn_status wn_store_acquire(wn_store *store, int32_t layer, wn_tensor *by_param);
WN_MUST_USE wn_status wn_store_release(wn_store *store, int32_t layer);
/* The same for one part of a layer's experts; of these, likewise, two at once beside the layers. */
WN_MUST_USE wn_status wn_store_prefetch_part(wn_store *store, int32_t layer, int32_t part);
WN_MUST_USE wn_status wn_store_acquire_part(wn_store *store, int32_t layer, int32_t part, wn_tensor *by_param);
WN_MUST_USE wn_status wn_store_release_part(wn_store *store, int32_t layer, int32_t part);
/* Full-shape WGRAD tensors to add gradients into (absent for FROZEN and BUFFER); zeroed, or holding this step's sum so
 * far where the group is one rank. At most two layers at once. */
WN_MUST_USE wn_status wn_store_grads(wn_store *store, int32_t layer, wn_tensor *by_param);
/* Sums over the group and adds into the pieces' grad; ends what wn_store_grads began. The pieces' grad is zeroed by
 * whoever updates, once a step. */
WN_MUST_USE wn_status wn_store_reduce(wn_store *store, int32_t layer);

int32_t wn_store_pieces(const wn_store *store);
wn_piece *wn_store_piece(wn_store *store, int32_t i);
const wn_param *wn_store_params(const wn_store *store, int32_t *n);
wn_group *wn_store_group(const wn_store *store, int32_t group);
/* The block scales [ceil(rows/128), ceil(cols/128)] of an FP8 parameter, whole on every rank: a view to be written
 * once. */
wn_tensor wn_store_scales(const wn_store *store, int32_t param);
/* The unit table, as the planner prints it: layer, group, kind (fp8: frozen, stored so), elements, bytes a rank. */
void wn_store_print(const wn_store *store, FILE *out);

#endif
