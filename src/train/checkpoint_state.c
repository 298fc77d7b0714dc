#include <inttypes.h>
#include <string.h>

#include "base/version.h"
#include "io/json.h"
#include "train/checkpoint_parts.h"

enum { FORMAT = 1, MOST_BYTES = 1 << 20 };

/* One table for writing and reading: a counter that is added to wn_state is added here, and nowhere else. */
typedef struct counter {
  const char *key;
  size_t offset;
} counter;
static const counter counters[] = {
    {"step", offsetof(wn_state, step)},
    {"tokens", offsetof(wn_state, tokens)},
    {"adam_base", offsetof(wn_state, adam_base)},
    {"adam_indexer", offsetof(wn_state, adam_indexer)},
    {"router_bias_updates", offsetof(wn_state, router_bias_updates)},
    {"skipped", offsetof(wn_state, skipped)},
    {"skipped_in_a_row", offsetof(wn_state, skipped_in_a_row)},
};
enum { N_COUNTERS = sizeof counters / sizeof *counters };

wn_status wn_state_write(const wn_checkpoint_plan *plan, const wn_state *state, const char *dir) {
  char path[WN_PATH_BYTES], seed[24];
  WN_TRY(wn_path(path, "%s/" WN_STATE_NAME, dir));
  snprintf(seed, sizeof seed, "%" PRIu64, plan->seed); /* text: JSON's integers end at 2^63 */
  json_t *root = json_pack("{si ss}", "format", FORMAT, "stage", wn_stage_name(plan->stage));
  int bad = root ? 0 : -1;
  for (size_t i = 0; !bad && i < N_COUNTERS; i++) {
    int64_t value;
    memcpy(&value, (const char *)state + counters[i].offset, sizeof value);
    bad = json_object_set_new(root, counters[i].key, json_integer(value));
  }
  if (!bad)
    bad = json_object_set_new(root, "indexer_trained", json_boolean(state->indexer_trained)) ||
          json_object_set_new(root, "seed", json_string(seed)) ||
          json_object_set_new(root, "code_version", json_string(WN_VERSION)) ||
          json_object_set_new(root, "written_by_ranks", json_integer(wn_world_size(plan->world)));
  wn_status status = wn_json_write(bad ? NULL : root, path, JSON_INDENT(2));
  json_decref(root);
  return status;
}

static wn_status read_stage(wn_stage *out, const char *path, const json_t *root) {
  const char *name = json_string_value(json_object_get(root, "stage"));
  for (wn_stage stage = WN_STAGE_PRETRAIN; name && stage < WN_N_STAGES; stage++) {
    if (strcmp(name, wn_stage_name(stage)) != 0) continue;
    *out = stage;
    return NULL;
  }
  return WN_FAIL(WN_E_INPUT, "%s: stage is not pretrain, warmup or adapt", path);
}

static wn_status read_values(wn_state *state, wn_stage *stage, const char *path, const json_t *root) {
  const json_t *format = json_object_get(root, "format"), *trained = json_object_get(root, "indexer_trained");
  if (!json_is_integer(format)) return WN_FAIL(WN_E_INPUT, "%s is not the state of a Winnow checkpoint", path);
  if (json_integer_value(format) != FORMAT)
    return WN_FAIL(WN_E_INPUT, "%s: its format is %lld; this version reads %d", path,
                   (long long)json_integer_value(format), FORMAT);
  WN_TRY(read_stage(stage, path, root));
  for (size_t i = 0; i < N_COUNTERS; i++) {
    const json_t *item = json_object_get(root, counters[i].key);
    int64_t value = json_integer_value(item);
    if (!json_is_integer(item) || value < 0)
      return WN_FAIL(WN_E_INPUT, "%s: %s is not a whole number of 0 or more", path, counters[i].key);
    memcpy((char *)state + counters[i].offset, &value, sizeof value);
  }
  if (!json_is_boolean(trained)) return WN_FAIL(WN_E_INPUT, "%s: indexer_trained is not true or false", path);
  state->indexer_trained = json_is_true(trained);
  return NULL;
}

wn_status wn_checkpoint_read_state(const char *dir, wn_state *state, wn_stage *stage, bool *found) {
  char path[WN_PATH_BYTES];
  json_t *root;
  WN_TRY(wn_path(path, "%s/" WN_STATE_NAME, dir));
  *found = wn_path_exists(path);
  if (!*found) return NULL;
  WN_TRY(wn_json_load(&root, path, MOST_BYTES, WN_E_INPUT));
  wn_state read = {0};
  wn_status status = read_values(&read, stage, path, root);
  json_decref(root);
  if (!status) *state = read;
  return status;
}
