/* Checkpoints: Hugging Face directories that are whole or absent (contract: checkpoint without gathering).
 *
 * RUN_DIR/checkpoints/step-000100/ holds config.json, model-*.safetensors with model.safetensors.index.json, optimizer-*.safetensors
 * (names "<parameter>.m", ".v", and ".master" where the model's file dtype is not F32), state.json and, written last, MANIFEST.json (size and
 * hash of every file). Every rank computes the same layout from shapes and writes its own byte ranges. */
#ifndef WN_TRAIN_CHECKPOINT_H
#define WN_TRAIN_CHECKPOINT_H

#include "config/job.h"
#include "model/model.h"
#include "train/state.h"

typedef struct wn_checkpoint_plan {
  const wn_model *model;
  wn_store *store;
  wn_world *world;
  wn_log *log;
  wn_stage stage;
  uint64_t seed;
  const char *run_dir;
  const char *init_dir;     /* where frozen tensors came from ("" when random): its shards are linked while they hold only frozen tensors */
  int64_t shard_bytes;      /* most bytes of a model or optimizer file (one tensor may exceed it) */
  int32_t keep;             /* newest checkpoints kept; older ones removed once the new one stands; 0: all */
} wn_checkpoint_plan;

/* Saves `state.step`. Collective; on any rank's failure all fail, the temporary directory is removed and older checkpoints stay. Leftover temporary
 * directories of killed runs are removed at the next save. */
WN_MUST_USE wn_status wn_checkpoint_save(const wn_checkpoint_plan *plan, const wn_state *state);
/* The newest checkpoint of RUN_DIR whose manifest verifies, every byte read and hashed (ranks share the files); a damaged one is warned about and passed over. *found false:
 * there is none. `path` is its directory. Collective. */
WN_MUST_USE wn_status wn_checkpoint_newest(const wn_checkpoint_plan *plan, char path[WN_PATH_BYTES], bool *found);
/* Loads weights, moments and state of a checkpoint of the same stage and shapes. */
WN_MUST_USE wn_status wn_checkpoint_load(const wn_checkpoint_plan *plan, const char *path, wn_state *state);
/* Weights from any Hugging Face directory or checkpoint. Parameters that are absent there: indexer parameters are initialised from the seed when
 * allow_new_indexer, anything else (and any misshapen or surplus tensor) is WN_E_INPUT by name. MTP layers (>= num_hidden_layers) are passed over with a note. */
WN_MUST_USE wn_status wn_init_load(const wn_checkpoint_plan *plan, const char *dir, bool allow_new_indexer);
/* Random weights from the seed. */
WN_MUST_USE wn_status wn_init_random(const wn_checkpoint_plan *plan);
/* Carries the indexer's moments and Adam clock over from a warm-up's checkpoint; *carried false when `dir` has none (then the clock stays 0). */
WN_MUST_USE wn_status wn_init_carry_indexer(const wn_checkpoint_plan *plan, const char *dir, wn_state *state, bool *carried);
/* Reads DIR/state.json when there is one: the stage that wrote it, whether its indexer is trained. *found false: a plain directory. */
WN_MUST_USE wn_status wn_checkpoint_read_state(const char *dir, wn_state *state, wn_stage *stage, bool *found);
/* Every file of the directory against its MANIFEST.json; a sentence naming the first that differs, is missing or is not listed. */
WN_MUST_USE wn_status wn_checkpoint_verify(const char *dir);

#endif
