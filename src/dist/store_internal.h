/* What the files of the store share: its tables. Private to src/dist. */
#ifndef WN_DIST_STORE_INTERNAL_H
#define WN_DIST_STORE_INTERNAL_H

#include "dist/store.h"

enum { N_SLOTS = 2, MAX_GROUPS = 4, NONE = -1 };

/* Layers and parts of their experts are held at the same time: each class has its own slots. */
typedef enum slot_class { OF_LAYERS, OF_EXPERTS, N_CLASSES } slot_class;

/* What the store knows of piece i beyond the piece itself. */
typedef struct unit {
  int64_t elements, piece_elements;        /* elements = group size * piece_elements */
  int64_t slot_bytes_at, wide_at, grad_at; /* in a slot: bytes; in the widened weights and in gradients: elements */
  int64_t n_scales;                        /* FP8: of all its parameters */
  bool trains, shared;                     /* shared: its group has more than one rank */
  wn_transfer *gathering;
} unit;

/* What is acquired and released together: a layer, or a part of its experts. */
typedef struct holding {
  int32_t layer, part;
  int32_t first_param, n_params; /* the layer's, of which this holding has those of its part */
  int32_t first_unit, n_units;
  int32_t weight_slot, grad_slot; /* NONE: not held, not open */
  bool acquired, trains, fp8;     /* fp8: has units that are widened when they are acquired */
} holding;

/* Gradients of a slot that are on their way: it can be used again when they have arrived. */
typedef struct reducing {
  wn_transfer **transfers; /* [n_params]: more than a layer has units */
  int32_t n;
} reducing;

struct wn_store {
  wn_device *device;
  wn_comm *comm;
  wn_group *groups[MAX_GROUPS];
  int32_t group_size[MAX_GROUPS], group_rank[MAX_GROUPS];
  int32_t n_groups;
  wn_dtype dtype_of[WN_N_ROLES]; /* the device's */
  const wn_param *params;
  int32_t n_params;
  int32_t *unit_of;      /* [n_params] */
  int64_t *param_offset; /* [n_params] first element inside its unit */
  int64_t *scale_offset; /* [n_params] first scale inside its unit's */
  int32_t n_units, n_holdings, n_segments;
  unit *units;
  wn_piece *pieces; /* parallel to units */
  holding *holdings;
  wn_segment *segments;
  int64_t slot_bytes[N_CLASSES], wide_elements[N_CLASSES];
  int64_t grad_slot_elements, largest_reduced; /* elements of the largest unit that is summed */
  wn_tensor weight_slots[N_CLASSES][N_SLOTS], wide[N_CLASSES], grad_slots[N_SLOTS];
  bool weight_slot_taken[N_CLASSES][N_SLOTS], wide_taken[N_CLASSES], grad_slot_taken[N_SLOTS];
  reducing reducing[N_SLOTS];
};

/* store_layout.c: units, holdings, segments and the sizes of slots, from params, group sizes and dtypes alone. */
WN_MUST_USE wn_status wn_store_lay_out(wn_store *store);

static inline slot_class wn_class_of(int32_t part) {
  return part > 0 ? OF_EXPERTS : OF_LAYERS;
}

/* What a piece is gathered as. */
static inline wn_dtype wn_stored_dtype(const wn_store *store, const wn_piece *piece) {
  return piece->fp8 ? WN_F8_E4M3 : store->dtype_of[piece->role];
}

#endif
