/* What model code knows of the machine it runs on: which dtype plays which role, the operation table, and its
 * arenas. An operation enqueues its work and returns; operations run in the order they were asked for. On the CPU an
 * operation has finished when it returns. Only download, and the few operations that say so, wait for the device. */
#ifndef WN_BASE_DEVICE_H
#define WN_BASE_DEVICE_H

#include "base/arena.h"
#include "base/tensor.h"

typedef enum wn_role {
  WN_ACT,    /* activations and gathered weights */
  WN_STAT,   /* log-sum-exp, probabilities, norms, router, losses */
  WN_WGRAD,  /* weight gradients */
  WN_MASTER, /* optimizer state: masters */
  WN_MOMENT, /* optimizer state: AdamW's moments; MASTER's dtype, or BF16 where whoever made the device says so */
  WN_INDEX,  /* selections, expert choices: always I32 */
  WN_N_ROLES
} wn_role;

typedef enum wn_device_kind { WN_CPU, WN_CUDA } wn_device_kind;

typedef struct wn_ops wn_ops; /* kernels/kernels.h */

typedef struct wn_device {
  wn_device_kind kind;
  const wn_ops *ops;
  wn_dtype dtype_of[WN_N_ROLES]; /* CPU: F32 (or F64) all; CUDA: ACT is BF16, the others F32; before the store is made,
                                    MOMENT may be set to BF16 */
  wn_arena *weights;             /* parameters and optimizer state: lives as long as the run */
  wn_arena *stash;               /* what outlives a layer within a step: hidden states, replay */
  wn_arena *scratch;             /* stack of temporaries: mark on entry, release on exit */
  wn_arena *host;                /* a stack too, but of this process's memory on every device: tables, copies */
  int32_t chunk_rows;            /* rows whose widest temporaries (absorbed queries, logits) exist at once */
  int32_t head_tile;             /* heads that absorbed attention computes at least, however few the model has */
  int32_t threads;               /* CPU threads; no result depends on it */
  bool dry; /* operations allocate and do nothing else; all arenas but host's only count (train/plan.h) */
} wn_device;

/* A tensor of the role's dtype from an arena of the device. Not zeroed. */
WN_MUST_USE wn_status wn_device_tensor(const wn_device *device, wn_tensor *out, wn_arena *arena, const char *name,
                                       wn_role role, int32_t rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3);

#endif
