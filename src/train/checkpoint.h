/* Checkpoints: Hugging Face directories that are whole or absent.
 *
 * RUN_DIR/checkpoints/step-000100/ holds config.json, model-*.safetensors with model.safetensors.index.json,
 * optimizer-*.safetensors (names "<parameter>.m", ".v", and ".master" where the model's file dtype is not F32),
 * state.json and, written last, MANIFEST.json (size and hash of every file). Every rank computes the same layout from
 * shapes and writes its own byte ranges. */
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
  double attention_init_gain; /* factor on random attention projections; 0: 1 */
  const char *run_dir;
  const char *init_dir; /* where frozen tensors came from ("" when random): its shards are linked while they hold only
                           frozen tensors */
  int64_t shard_bytes;  /* most bytes of a model or optimizer file (one tensor may exceed it) */
  int32_t keep;         /* newest checkpoints kept; older ones removed once the new one stands; 0: all */
} wn_checkpoint_plan;

/* Saves `state.step`, in the place of a checkpoint of that step if one stands there. Collective; on any rank's failure
 * all fail, the temporary directory is removed and older checkpoints stay; a kill at any point leaves what stood
 * before. What killed runs left is removed at the next save or wn_checkpoint_newest. Tensors that do not change (frozen
 * ones, and MTP layers) come from the newest earlier checkpoint of the run, else from init_dir: shards that hold
 * nothing else are linked under a numbered name, the rest is copied byte for byte. So init may go away after the first
 * save. WN_E_INPUT when the source's frozen weights are not those that the run holds; WN_E_IO. Tokenizer files travel
 * along. */
WN_MUST_USE wn_status wn_checkpoint_save(const wn_checkpoint_plan *plan, const wn_state *state);
/* The newest checkpoint of RUN_DIR whose manifest verifies, every byte read and hashed (ranks share the files); a
 * damaged one is warned about and passed over. *found false: there are none. WN_E_INPUT when there are some and none is
 * whole: starting anew would throw the run away in silence. `path` is its directory. Collective. */
WN_MUST_USE wn_status wn_checkpoint_newest(const wn_checkpoint_plan *plan, char path[WN_PATH_BYTES], bool *found);
/* Loads weights, moments and state of a checkpoint of the same stage and shapes, in the bits that were saved.
 * WN_E_CONFIG for another stage, WN_E_INPUT by tensor name. Does not verify the manifest. Collective, as are the
 * wn_init_* below. */
WN_MUST_USE wn_status wn_checkpoint_load(const wn_checkpoint_plan *plan, const char *path, wn_state *state);
/* Weights (F32, F16, BF16) from any Hugging Face directory, or from a checkpoint, whose weight files are then verified.
 * Where the whole indexer is absent it is drawn from the seed when allow_new_indexer; anything else that is missing,
 * misshapen, surplus or of another type is WN_E_INPUT with names and count. MTP layers (>= num_hidden_layers) are
 * passed over with a note. */
WN_MUST_USE wn_status wn_init_load(const wn_checkpoint_plan *plan, const char *dir, bool allow_new_indexer);
/* Random weights from the seed. */
WN_MUST_USE wn_status wn_init_random(const wn_checkpoint_plan *plan);
/* Carries the indexer's moments and Adam clock over from a warm-up's checkpoint, whose optimizer files are verified;
 * *carried false when `dir` is none (then nothing changes). */
WN_MUST_USE wn_status wn_init_carry_indexer(const wn_checkpoint_plan *plan, const char *dir, wn_state *state,
                                            bool *carried);
/* Reads DIR/state.json when there is one: the stage that wrote it, whether its indexer is trained. *found false: a
 * plain directory. */
WN_MUST_USE wn_status wn_checkpoint_read_state(const char *dir, wn_state *state, wn_stage *stage, bool *found);
/* Every file of the directory against its MANIFEST.json; a sentence naming the first that differs, is missing or is not
 * listed. */
WN_MUST_USE wn_status wn_checkpoint_verify(const char *dir);

#endif
