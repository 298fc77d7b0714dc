/* Finding, verifying and loading checkpoints. Each rank reads the byte ranges of its own parts. */
#include <stdlib.h>
#include <string.h>

#include "train/checkpoint_dirs.h"
#include "train/reads.h"

/* ---- whole or not ---- */

/* This rank's share of the files; rank 0 also compares the names. */
static wn_status verify_share(const char *dir, int32_t rank, int32_t size) {
  wn_manifest manifest;
  WN_TRY(wn_manifest_load(&manifest, dir));
  wn_status status = rank == 0 ? wn_manifest_check_names(&manifest, dir) : NULL;
  for (size_t i = (size_t)rank; !status && i < manifest.n; i += (size_t)size)
    status = wn_manifest_check_file(&manifest.entries[i], dir);
  wn_manifest_free(&manifest);
  return status;
}

wn_status wn_checkpoint_verify(const char *dir) {
  return verify_share(dir, 0, 1);
}

/* Rank 0 lists, all have the list. */
static wn_status share_steps(wn_world *world, const char *checkpoints, int64_t **steps, int64_t *n) {
  size_t listed = 0;
  wn_status status = NULL;
  *steps = NULL;
  if (wn_world_rank(world) == 0) status = wn_steps_list(steps, &listed, checkpoints);
  *n = (int64_t)listed;
  WN_TRY_GOTO(status, fail, wn_world_agree(world, status));
  WN_TRY_GOTO(status, fail, wn_group_broadcast(wn_world_all(world), n, sizeof *n, 0));
  if (!*steps) *steps = calloc((size_t)*n + 1, sizeof **steps);
  WN_TRY_GOTO(status, fail,
              wn_world_agree(world, *steps ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory listing %s", checkpoints)));
  if (*n > 0)
    WN_TRY_GOTO(status, fail, wn_group_broadcast(wn_world_all(world), *steps, (size_t)*n * sizeof **steps, 0));
  return NULL;
fail:
  free(*steps);
  return status;
}

wn_status wn_checkpoint_newest(const wn_checkpoint_plan *plan, char path[WN_PATH_BYTES], bool *found) {
  char checkpoints[WN_PATH_BYTES];
  int64_t *steps, n;
  int32_t rank = wn_world_rank(plan->world), size = wn_world_size(plan->world);
  wn_status status = NULL, newest_damage = NULL;
  *found = false;
  WN_TRY(wn_path(checkpoints, "%s/checkpoints", plan->run_dir));
  if (rank == 0) wn_steps_clean(checkpoints, plan->log);
  WN_TRY(share_steps(plan->world, checkpoints, &steps, &n));
  for (int64_t i = 0; !status && !*found && i < n; i++) {
    status = wn_path(path, "%s/" WN_STEP_FORMAT, checkpoints, (long long)steps[i]);
    if (!status) status = wn_world_agree(plan->world, verify_share(path, rank, size));
    *found = !status;
    if (!status || wn_status_code(status) == WN_E_WORLD) continue;
    if (rank == 0) wn_warn(plan->log, "passing over a damaged checkpoint: %s", wn_status_text(status));
    newest_damage = wn_status_first(newest_damage, status);
    status = NULL;
  }
  free(steps);
  /* starting anew beside the remains of a run would throw it away in silence */
  if (!status && !*found && newest_damage)
    status = WN_FAIL_HINT(WN_E_INPUT, "repair it, or move the directory away to start anew",
                          "%s holds no whole checkpoint; the newest: %s", checkpoints, wn_status_text(newest_damage));
  wn_status_free(newest_damage);
  return status;
}

/* ---- loading ---- */

typedef struct load {
  const wn_checkpoint_plan *plan;
  const wn_param *params;
  int32_t n_params;
  wn_names names;
  wn_part *parts;
  wn_hf_dir *dir;
  wn_optimizer_files optimizer;
  wn_reads reads;
} load;

static wn_status open_all(load *l, const wn_checkpoint_plan *plan, const char *path) {
  *l = (load){.plan = plan};
  l->params = wn_store_params(plan->store, &l->n_params);
  WN_TRY(wn_names_create(&l->names, l->params, l->n_params));
  WN_TRY(wn_parts_create(&l->parts, plan->store, l->n_params));
  WN_TRY(wn_hf_dir_open(&l->dir, path));
  return wn_optimizer_open(&l->optimizer, path);
}

static void close_all(load *l) {
  wn_optimizer_close(&l->optimizer);
  wn_hf_dir_close(l->dir);
  wn_names_free(&l->names);
  free(l->parts);
  wn_reads_free(&l->reads);
}

static wn_status want_field(load *l, int32_t p, wn_field field) {
  wn_read read = {.param = p, .field = field, .from.entry = wn_optimizer_find(&l->optimizer, &l->params[p], field)};
  WN_TRY(wn_optimizer_check(read.from.entry, &l->params[p], field, wn_hf_dir_path(l->dir)));
  return wn_reads_add(&l->reads, read);
}

/* What trains continues from its FP32 master: its own where the model file is rounded, else the model file. */
static wn_status want_param(load *l, int32_t p) {
  const wn_param *param = &l->params[p];
  wn_read weight = {.param = p, .field = WN_FIELD_WEIGHT};
  WN_TRY(wn_hf_weight_find(&weight.from, l->dir, param->hf_name));
  if (!wn_kind_trains(param->kind)) return wn_reads_add(&l->reads, weight);
  WN_TRY(want_field(l, p, WN_FIELD_M));
  WN_TRY(want_field(l, p, WN_FIELD_V));
  return weight.from.entry->dtype != WN_F32 ? want_field(l, p, WN_FIELD_MASTER) : wn_reads_add(&l->reads, weight);
}

static wn_status read_wanted(load *l, const char *what) {
  return wn_reads_run(&l->reads, l->plan->model->device, l->plan->store, l->parts, l->plan->log, what);
}

static wn_status load_local(load *l, const wn_checkpoint_plan *plan, const char *path, wn_state *state) {
  wn_stage stage = WN_STAGE_PRETRAIN;
  bool found, indexer_absent;
  int64_t passed_over;
  wn_state read = {0};
  wn_dir_rules rules = {.n_layers = plan->model->config.num_hidden_layers};
  WN_TRY(open_all(l, plan, path));
  WN_TRY(wn_checkpoint_read_state(path, &read, &stage, &found));
  if (!found) return WN_FAIL(WN_E_INPUT, "%s has no " WN_STATE_NAME ": it is not a checkpoint", path);
  if (stage != plan->stage)
    return WN_FAIL_HINT(WN_E_CONFIG, "give it as init of a run with another run_dir",
                        "%s was written by %s; it cannot be continued by %s", path, wn_stage_name(stage),
                        wn_stage_name(plan->stage));
  WN_TRY(wn_dir_check(l->dir, &l->names, rules, &indexer_absent, &passed_over));
  WN_TRY(wn_check_widened(l->dir, &l->names, wn_world_rank(plan->world), wn_world_size(plan->world)));
  for (int32_t p = 0; p < l->n_params; p++) WN_TRY(want_param(l, p));
  WN_TRY(read_wanted(l, "reading the checkpoint"));
  *state = read;
  return NULL;
}

wn_status wn_checkpoint_load(const wn_checkpoint_plan *plan, const char *path, wn_state *state) {
  load l;
  wn_status status = load_local(&l, plan, path, state);
  if (!status) status = wn_store_publish(plan->store);
  close_all(&l);
  return wn_world_agree(plan->world, status);
}

/* ---- the indexer's moments ---- */

/* Every byte of the optimizer files, before a moment is believed; this rank's share of them. */
static wn_status verify_optimizer(const load *l, const char *dir) {
  char path[WN_PATH_BYTES];
  wn_manifest manifest;
  size_t size = (size_t)wn_world_size(l->plan->world);
  WN_TRY(wn_path(path, "%s/" WN_MANIFEST_NAME, dir));
  if (!wn_path_exists(path)) return NULL;
  WN_TRY(wn_manifest_load(&manifest, dir));
  wn_status status = NULL;
  for (size_t i = (size_t)wn_world_rank(l->plan->world); !status && i < l->optimizer.n; i += size) {
    const char *file = wn_safetensors_path(l->optimizer.files[i]);
    status = wn_manifest_check_listed(&manifest, strrchr(file, '/') + 1, dir);
  }
  wn_manifest_free(&manifest);
  return status;
}

static wn_status carry_local(load *l, const wn_checkpoint_plan *plan, const char *dir, wn_state *state, bool *carried) {
  wn_state theirs;
  wn_stage stage;
  bool found;
  *l = (load){0};
  WN_TRY(wn_checkpoint_read_state(dir, &theirs, &stage, &found));
  if (!found || stage != WN_STAGE_WARMUP) return NULL;
  WN_TRY(open_all(l, plan, dir));
  WN_TRY(verify_optimizer(l, dir));
  for (int32_t p = 0; p < l->n_params; p++) {
    if (l->params[p].kind != WN_INDEXER) continue;
    WN_TRY(want_field(l, p, WN_FIELD_M));
    WN_TRY(want_field(l, p, WN_FIELD_V));
    *carried = true;
  }
  if (*carried) WN_TRY(read_wanted(l, "reading the indexer's moments"));
  if (*carried) state->adam_indexer = theirs.adam_indexer;
  return NULL;
}

wn_status wn_init_carry_indexer(const wn_checkpoint_plan *plan, const char *dir, wn_state *state, bool *carried) {
  load l;
  *carried = false;
  wn_status status = carry_local(&l, plan, dir, state, carried);
  close_all(&l);
  return wn_world_agree(plan->world, status);
}
