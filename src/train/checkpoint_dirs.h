/* The directory RUN_DIR/checkpoints: which steps stand in it, how a new one takes its place, which are removed.
 *
 * Names: step-000100 is a checkpoint, whole as far as the writer can tell. .tmp-* is garbage of a killed process.
 * .old-step-000100 is a checkpoint that was being replaced when the process died: it goes back to its name unless the
 * new one stands there. */
#ifndef WN_TRAIN_CHECKPOINT_DIRS_H
#define WN_TRAIN_CHECKPOINT_DIRS_H

#include "base/log.h"
#include "io/files.h"

#define WN_STEP_FORMAT "step-%06lld"

/* Steps of the directory, newest first; malloc'ed, n 0 when it is absent. */
WN_MUST_USE wn_status wn_steps_list(int64_t **steps, size_t *n, const char *checkpoints);
/* Undoes what a killed process left: .old-* goes back or away, .tmp-* away. What cannot be removed is warned about. */
void wn_steps_clean(const char *checkpoints, wn_log *log);
/* `temporary` becomes checkpoint `step`, in the place of one that stands there. */
WN_MUST_USE wn_status wn_steps_install(const char *checkpoints, const char *temporary, int64_t step);
/* Removes all but the `keep` newest of the checkpoints up to `step` (0: none is removed; later ones are not counted:
 * the run went back behind them). What cannot be removed is warned about. */
void wn_steps_retain(const char *checkpoints, int64_t step, int32_t keep, wn_log *log);

#endif
