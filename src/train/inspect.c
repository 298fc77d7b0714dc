#include "train/inspect.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "data/dataset.h"
#include "io/hf_dir.h"
#include "io/yaml.h"
#include "model/counts.h"
#include "train/checkpoint_dirs.h"
#include "train/checkpoint_parts.h"

/* An object under construction; `bad` once anything could not be added. */
typedef struct facts {
  json_t *root;
  bool bad;
} facts;

static void put(facts *f, const char *key, json_t *value) {
  if (json_object_set_new(f->root, key, value) != 0) f->bad = true;
}
static void put_int(facts *f, const char *key, int64_t value) {
  put(f, key, json_integer(value));
}
/* JSON holds UTF-8; file names need not be that, nor what was cut in the middle. */
static void put_text(facts *f, const char *key, const char *value) {
  json_t *text = json_string(value);
  char *plain = text ? NULL : strdup(value);
  for (char *at = plain; at && *at; at++)
    if (*at & 0x80) *at = '?';
  put(f, key, plain ? json_string(plain) : text);
  free(plain);
}
static void put_facts(facts *f, const char *key, facts *inner) {
  if (inner->bad) f->bad = true;
  put(f, key, inner->root);
}
static facts new_facts(void) {
  facts f = {.root = json_object()};
  f.bad = !f.root;
  return f;
}

/* ---- the model, from config.json ---- */

static wn_status describe_model(facts *f, const wn_model_config *config, const char *dir) {
  wn_model_counts counts;
  int32_t mtp_layers = config->num_nextn_predict_layers;
  char type[WN_CONFIG_TEXT_BYTES];
  WN_TRY(wn_model_config_text(type, dir, NULL, "model_type"));
  WN_TRY(wn_model_count(&counts, config, mtp_layers));
  facts model = new_facts(), parts = new_facts();
  put_text(&model, "model_type", type);
  put_int(&model, "layers", config->num_hidden_layers);
  put_int(&model, "hidden_size", config->hidden_size);
  put_int(&model, "attention_heads", config->num_attention_heads);
  put_int(&model, "routed_experts", config->n_routed_experts);
  put_int(&model, "experts_per_token", config->num_experts_per_tok);
  put_int(&model, "vocab_size", config->vocab_size);
  put_int(&model, "max_position_embeddings", config->max_position_embeddings);
  if (config->has_indexer) {
    put_int(&model, "index_heads", config->index_n_heads);
    put_int(&model, "index_head_dim", config->index_head_dim);
    put_int(&model, "index_topk", config->index_topk);
  }
  put_int(&model, "parameters", counts.total);
  put_int(&model, "main", counts.main);
  put_int(&model, "active_per_token", counts.active);
  for (wn_model_part p = 0; p < WN_N_PARTS; p++)
    if (counts.part[p]) put_int(&parts, wn_model_part_name(p), counts.part[p]);
  put_facts(&model, "parts", &parts);
  put_int(&model, "mtp_layers", mtp_layers);
  put_int(&model, "mtp_own", counts.mtp_own);
  put_int(&model, "mtp_copies", counts.mtp_copies);
  put_facts(f, "model", &model);
  return NULL;
}

/* ---- tensors of files ---- */

typedef struct tally {
  int64_t tensors, parameters, bytes;
} tally;

typedef struct weights {
  tally by_dtype[WN_N_DTYPES], all;
  int64_t scales; /* elements of block scales: not parameters */
} weights;

static void count_tensor(weights *w, const wn_st_entry *entry) {
  char weight[WN_NAME_BYTES];
  int64_t elements = (int64_t)entry->bytes / wn_dtype_bytes(entry->dtype);
  tally *t = &w->by_dtype[entry->dtype];
  bool scale = wn_scaled_name(weight, entry->name);
  t->tensors++;
  t->bytes += (int64_t)entry->bytes;
  w->all.tensors++;
  w->all.bytes += (int64_t)entry->bytes;
  if (scale) {
    w->scales += elements;
    return;
  }
  t->parameters += elements;
  w->all.parameters += elements;
}

static void describe_weights(facts *f, const weights *w, int32_t files, const char *fits) {
  facts out = new_facts();
  json_t *dtypes = json_array();
  put_int(&out, "files", files);
  put_int(&out, "tensors", w->all.tensors);
  put_int(&out, "bytes", w->all.bytes);
  put_int(&out, "parameters", w->all.parameters);
  put_int(&out, "scales", w->scales);
  for (wn_dtype d = 0; d < WN_N_DTYPES; d++) {
    const tally *t = &w->by_dtype[d];
    if (!t->tensors) continue;
    json_t *one = json_pack("{ss sI sI sI}", "dtype", wn_dtype_name(d), "tensors", (json_int_t)t->tensors, "parameters",
                            (json_int_t)t->parameters, "bytes", (json_int_t)t->bytes);
    if (json_array_append_new(dtypes, one) != 0) out.bad = true;
  }
  put(&out, "dtypes", dtypes);
  if (fits) put_text(&out, "fits_config", fits);
  put_facts(f, "weights", &out);
}

/* "yes", or what about the tensors is not as config.json says. */
static wn_status compare_with_config(char out[512], const wn_hf_dir *dir, const wn_model_config *config) {
  wn_param_table table;
  wn_names names = {0};
  bool indexer_absent;
  int64_t passed_over;
  WN_TRY(wn_param_table_create(&table, config, (wn_param_settings){.file_dtype = WN_F32}));
  wn_status status = wn_names_create(&names, table.params, table.n);
  snprintf(out, 512, "yes");
  if (!status) {
    wn_dir_rules rules = {.n_layers = config->num_hidden_layers};
    status = wn_dir_check(dir, &names, rules, &indexer_absent, &passed_over);
    if (wn_status_code(status) == WN_E_INPUT) {
      snprintf(out, 512, "no: %s", wn_status_text(status));
      wn_status_free(status);
      status = NULL;
    }
  }
  wn_names_free(&names);
  wn_param_table_free(&table);
  return status;
}

static wn_status describe_tensors(facts *f, const char *path, const wn_model_config *config) {
  wn_hf_dir *dir;
  weights w = {0};
  char fits[512];
  WN_TRY(wn_hf_dir_open(&dir, path));
  for (int64_t i = 0; i < wn_hf_dir_count(dir); i++) count_tensor(&w, wn_hf_dir_at(dir, i, NULL));
  wn_status status = config ? compare_with_config(fits, dir, config) : NULL;
  describe_weights(f, &w, wn_hf_dir_shards(dir), config ? fits : NULL);
  wn_hf_dir_close(dir);
  return status;
}

static wn_status describe_file(facts *f, const char *path) {
  wn_safetensors *file;
  weights w = {0};
  WN_TRY(wn_safetensors_open(&file, path));
  for (int64_t i = 0; i < wn_safetensors_count(file); i++) count_tensor(&w, wn_safetensors_at(file, i));
  wn_safetensors_close(file);
  put_text(f, "kind", "safetensors file");
  describe_weights(f, &w, 1, NULL);
  return NULL;
}

/* ---- directories ---- */

static wn_status has(const char *dir, const char *name, bool *out) {
  char path[WN_PATH_BYTES];
  *out = false;
  WN_TRY(wn_path(path, "%s/%s", dir, name));
  *out = wn_path_exists(path);
  return NULL;
}

/* Names and lengths of the files against the manifest; the bytes are not read. */
static wn_status verify_lengths(const char *dir) {
  char path[WN_PATH_BYTES];
  wn_manifest manifest;
  struct stat info;
  WN_TRY(wn_manifest_load(&manifest, dir));
  wn_status status = wn_manifest_check_names(&manifest, dir);
  for (size_t i = 0; !status && i < manifest.n; i++) {
    const wn_manifest_entry *entry = &manifest.entries[i];
    status = wn_path(path, "%s/%s", dir, entry->name);
    if (!status && (stat(path, &info) != 0 || (uint64_t)info.st_size != entry->bytes))
      status = WN_FAIL(WN_E_INPUT, "%s is not as long as " WN_MANIFEST_NAME " lists", path);
  }
  wn_manifest_free(&manifest);
  return status;
}

static wn_status describe_checkpoint(facts *f, const char *dir, bool quick) {
  wn_state state;
  wn_stage stage;
  bool found, listed;
  WN_TRY(wn_checkpoint_read_state(dir, &state, &stage, &found));
  WN_TRY(has(dir, WN_MANIFEST_NAME, &listed));
  facts out = new_facts();
  if (found) {
    put_text(&out, "stage", wn_stage_name(stage));
    put_int(&out, "step", state.step);
    put_int(&out, "tokens", state.tokens);
    put(&out, "indexer_trained", json_boolean(state.indexer_trained));
  }
  wn_status status = NULL;
  if (listed) status = quick ? verify_lengths(dir) : wn_checkpoint_verify(dir);
  const char *answer = quick ? "by names and lengths" : "yes";
  char text[512];
  snprintf(text, sizeof text, "%s%s", status ? "no: " : "", status ? wn_status_text(status) : answer);
  put_text(&out, "verifies", listed ? text : "no: " WN_MANIFEST_NAME " is absent");
  put_facts(f, "checkpoint", &out);
  if (wn_status_code(status) != WN_E_INPUT) return status;
  wn_status_free(status);
  return NULL;
}

/* The directory of a run's checkpoints is neither the run nor one of them. */
static wn_status refuse_checkpoints(const char *dir) {
  int64_t *steps;
  size_t n;
  WN_TRY(wn_steps_list(&steps, &n, dir));
  int64_t newest = n > 0 ? steps[0] : -1;
  free(steps);
  if (newest < 0) return NULL;
  return WN_FAIL_HINT(WN_E_INPUT, "inspect the run directory above it, or one checkpoint",
                      "%s holds the checkpoints of a run, %zu, the newest " WN_STEP_FORMAT, dir, n, (long long)newest);
}

static wn_status describe_directory(facts *f, const char *dir, bool quick) {
  wn_model_config config;
  bool configured, state, manifest, weighted = wn_hf_dir_has_weights(dir);
  WN_TRY(has(dir, "config.json", &configured));
  WN_TRY(has(dir, WN_STATE_NAME, &state));
  WN_TRY(has(dir, WN_MANIFEST_NAME, &manifest));
  if (!configured && !weighted) WN_TRY(refuse_checkpoints(dir));
  if (!configured && !weighted)
    return WN_FAIL_HINT(WN_E_INPUT,
                        "a model directory has a config.json, a run directory a config.resolved.yaml or checkpoints",
                        "%s holds no model and no run", dir);
  put_text(f, "kind", state || manifest ? "checkpoint" : weighted ? "model directory" : "model configuration");
  if (configured) {
    WN_TRY(wn_model_config_load(&config, dir));
    WN_TRY(describe_model(f, &config, dir));
  }
  if (weighted) WN_TRY(describe_tensors(f, dir, configured ? &config : NULL));
  return state || manifest ? describe_checkpoint(f, dir, quick) : NULL;
}

static wn_status tree_bytes(int64_t *out, const char *dir) {
  char **names, path[WN_PATH_BYTES];
  size_t n;
  struct stat info;
  wn_status status = NULL;
  *out = 0;
  WN_TRY(wn_list_dir(&names, &n, dir));
  for (size_t i = 0; !status && i < n; i++) {
    status = wn_path(path, "%s/%s", dir, names[i]);
    if (!status && stat(path, &info) == 0) *out += info.st_size;
  }
  wn_list_free(names, n);
  return status;
}

/* The values of a resolved job that say what the run is. */
static wn_status describe_job(facts *f, const char *dir) {
  static const char *const wanted[] = {"stage",        "init",           "model",
                                       "device",       "data.train",     "data.valid",
                                       "data.seq_len", "training.steps", "training.global_batch_seqs"};
  char path[WN_PATH_BYTES];
  wn_yaml yaml;
  bool there;
  WN_TRY(has(dir, "config.resolved.yaml", &there));
  if (!there) return NULL;
  WN_TRY(wn_path(path, "%s/config.resolved.yaml", dir));
  WN_TRY(wn_yaml_load(&yaml, path));
  facts job = new_facts();
  for (int32_t i = 0; i < yaml.n; i++)
    for (size_t w = 0; w < sizeof wanted / sizeof *wanted; w++)
      if (strcmp(yaml.entries[i].key, wanted[w]) == 0 && *yaml.entries[i].value)
        put_text(&job, wanted[w], yaml.entries[i].value);
  wn_yaml_free(&yaml);
  put_facts(f, "job", &job);
  return NULL;
}

static wn_status describe_run(facts *f, const char *dir, bool quick) {
  char checkpoints[WN_PATH_BYTES], path[WN_PATH_BYTES];
  int64_t *steps, bytes;
  size_t n;
  put_text(f, "kind", "run directory");
  WN_TRY(describe_job(f, dir));
  WN_TRY(wn_path(checkpoints, "%s/checkpoints", dir));
  WN_TRY(wn_steps_list(&steps, &n, checkpoints));
  json_t *list = json_array();
  wn_status status = NULL;
  for (size_t i = 0; !status && i < n; i++) {
    status = wn_path(path, "%s/" WN_STEP_FORMAT, checkpoints, (long long)steps[i]);
    if (!status) status = tree_bytes(&bytes, path);
    if (!status && json_array_append_new(
                       list, json_pack("{sI sI}", "step", (json_int_t)steps[i], "bytes", (json_int_t)bytes)) != 0)
      f->bad = true;
  }
  put(f, "checkpoints", list);
  if (!status && n > 0) {
    status = wn_path(path, "%s/" WN_STEP_FORMAT, checkpoints, (long long)steps[0]);
    if (!status) status = describe_checkpoint(f, path, quick);
  }
  free(steps);
  return status;
}

/* ---- datasets ---- */

static wn_status describe_dataset(facts *f, const char *prefix) {
  wn_dataset *dataset;
  WN_TRY(wn_dataset_open(&dataset, prefix));
  int64_t longest = 0, documents = wn_dataset_documents(dataset);
  for (int64_t d = 0; d < documents; d++) {
    int64_t length = wn_dataset_document_start(dataset, d + 1) - wn_dataset_document_start(dataset, d);
    if (length > longest) longest = length;
  }
  facts out = new_facts();
  put_text(&out, "dtype", wn_dataset_dtype(dataset));
  put_int(&out, "documents", documents);
  put_int(&out, "tokens", wn_dataset_tokens(dataset));
  put_int(&out, "longest_document", longest);
  put(&out, "marked", json_boolean(wn_dataset_has_scored(dataset)));
  wn_dataset_close(dataset);
  put_text(f, "kind", "dataset");
  put_facts(f, "dataset", &out);
  return NULL;
}

/* PREFIX, PREFIX.bin or PREFIX.idx, where there is a PREFIX.idx. */
static wn_status dataset_prefix(char out[WN_PATH_BYTES], const char *path, bool *found) {
  char index[WN_PATH_BYTES];
  size_t n = strlen(path);
  *found = false;
  bool suffix = n > 4 && (strcmp(path + n - 4, ".bin") == 0 || strcmp(path + n - 4, ".idx") == 0);
  WN_TRY(wn_path(out, "%.*s", (int)(suffix ? n - 4 : n), path));
  WN_TRY(wn_path(index, "%s.idx", out));
  *found = wn_path_exists(index);
  return NULL;
}

static wn_status describe(facts *f, const char *path, bool quick) {
  char prefix[WN_PATH_BYTES];
  bool dataset, checkpoints, resolved;
  put_text(f, "path", path);
  if (wn_path_is_dir(path)) {
    WN_TRY(has(path, "checkpoints", &checkpoints));
    WN_TRY(has(path, "config.resolved.yaml", &resolved));
    return checkpoints || resolved ? describe_run(f, path, quick) : describe_directory(f, path, quick);
  }
  WN_TRY(dataset_prefix(prefix, path, &dataset));
  if (dataset) return describe_dataset(f, prefix);
  if (!wn_path_exists(path)) return WN_FAIL(WN_E_INPUT, "%s is absent", path);
  return describe_file(f, path);
}

wn_status wn_inspect(json_t **out, const char *path, bool quick) {
  facts f = new_facts();
  wn_status status = describe(&f, path, quick);
  if (!status && f.bad) status = WN_FAIL(WN_E_MEMORY, "out of memory describing %s", path);
  if (status)
    json_decref(f.root);
  else
    *out = f.root;
  return status;
}
