#include "train/checkpoint_dirs.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TEMPORARY ".tmp-"
#define REPLACED ".old-"

/* -1: not the name of a checkpoint. Only the one spelling counts: step-7 and step-0000100 are someone else's. */
static int64_t step_of(const char *name) {
  char again[64], *end;
  if (strncmp(name, "step-", 5) != 0 || name[5] < '0' || name[5] > '9') return -1;
  long long step = strtoll(name + 5, &end, 10);
  snprintf(again, sizeof again, WN_STEP_FORMAT, step);
  return strcmp(again, name) == 0 ? (int64_t)step : -1;
}

static int newest_first(const void *a, const void *b) {
  int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
  return (x < y) - (x > y);
}

wn_status wn_steps_list(int64_t **steps, size_t *n, const char *checkpoints) {
  char path[WN_PATH_BYTES], **names;
  size_t n_names;
  wn_status status = NULL;
  *steps = NULL;
  *n = 0;
  if (!wn_path_exists(checkpoints)) return NULL;
  WN_TRY(wn_list_dir(&names, &n_names, checkpoints));
  int64_t *found = calloc(n_names + 1, sizeof *found);
  if (!found) status = WN_FAIL(WN_E_MEMORY, "out of memory listing %s", checkpoints);
  for (size_t i = 0; !status && i < n_names; i++) {
    int64_t step = step_of(names[i]);
    status = wn_path(path, "%s/%s", checkpoints, names[i]);
    if (!status && step >= 0 && wn_path_is_dir(path)) found[(*n)++] = step;
  }
  wn_list_free(names, n_names);
  if (status) {
    free(found);
    return status;
  }
  qsort(found, *n, sizeof *found, newest_first);
  *steps = found;
  return NULL;
}

static wn_status put_back(const char *checkpoints, const char *name) {
  char old[WN_PATH_BYTES], place[WN_PATH_BYTES];
  WN_TRY(wn_path(old, "%s/%s", checkpoints, name));
  WN_TRY(wn_path(place, "%s/%s", checkpoints, name + strlen(REPLACED)));
  if (wn_path_exists(place)) return wn_remove_tree(old);
  return wn_rename_sync(old, place);
}

static wn_status clean_one(const char *checkpoints, const char *name) {
  char path[WN_PATH_BYTES];
  if (strncmp(name, REPLACED, strlen(REPLACED)) == 0 && step_of(name + strlen(REPLACED)) >= 0)
    return put_back(checkpoints, name);
  if (strncmp(name, TEMPORARY, strlen(TEMPORARY)) != 0) return NULL;
  WN_TRY(wn_path(path, "%s/%s", checkpoints, name));
  return wn_remove_tree(path);
}

static void warn_and_free(wn_log *log, wn_status status) {
  if (status) wn_warn(log, "%s", wn_status_text(status));
  wn_status_free(status);
}

void wn_steps_clean(const char *checkpoints, wn_log *log) {
  char **names;
  size_t n;
  if (!wn_path_exists(checkpoints)) return;
  wn_status status = wn_list_dir(&names, &n, checkpoints);
  if (!status) {
    for (size_t i = 0; i < n; i++) warn_and_free(log, clean_one(checkpoints, names[i]));
    wn_list_free(names, n);
  }
  warn_and_free(log, status);
}

wn_status wn_steps_install(const char *checkpoints, const char *temporary, int64_t step) {
  char place[WN_PATH_BYTES], old[WN_PATH_BYTES];
  WN_TRY(wn_path(place, "%s/" WN_STEP_FORMAT, checkpoints, (long long)step));
  WN_TRY(wn_path(old, "%s/" REPLACED WN_STEP_FORMAT, checkpoints, (long long)step));
  if (!wn_path_exists(place)) return wn_rename_sync(temporary, place);
  /* a directory cannot be renamed over another; a kill between the two renames is undone by wn_steps_clean */
  WN_TRY(wn_rename_sync(place, old));
  wn_status status = wn_rename_sync(temporary, place);
  if (status && !wn_path_exists(place)) WN_KEEP_FIRST(status, wn_rename_sync(old, place));
  return status ? status : wn_remove_tree(old);
}

/* Out of sight first, so that a kill in the middle leaves garbage and not half a checkpoint. */
static wn_status remove_step(const char *checkpoints, int64_t step) {
  char place[WN_PATH_BYTES], away[WN_PATH_BYTES];
  WN_TRY(wn_path(place, "%s/" WN_STEP_FORMAT, checkpoints, (long long)step));
  WN_TRY(wn_path(away, "%s/" TEMPORARY "removed-" WN_STEP_FORMAT "-%ld", checkpoints, (long long)step, (long)getpid()));
  WN_TRY(wn_rename_sync(place, away));
  return wn_remove_tree(away);
}

void wn_steps_retain(const char *checkpoints, int64_t step, int32_t keep, wn_log *log) {
  int64_t *steps;
  size_t n;
  int32_t seen = 0;
  if (keep <= 0) return;
  wn_status status = wn_steps_list(&steps, &n, checkpoints);
  if (!status)
    for (size_t i = 0; i < n; i++)
      if (steps[i] <= step && ++seen > keep) warn_and_free(log, remove_step(checkpoints, steps[i]));
  if (!status) free(steps);
  warn_and_free(log, status);
}
