#include "train/checkpoint_layout.h"

#include "train/rewrite.h"

#include <stdlib.h>
#include <string.h>

/* ---- parameters by name ---- */

static int by_name(const void *a, const void *b) {
  return strcmp((*(const wn_param *const *)a)->hf_name, (*(const wn_param *const *)b)->hf_name);
}

wn_status wn_names_create(wn_names *out, const wn_param *params, int32_t n) {
  *out = (wn_names){.params = params, .n = n};
  out->sorted = calloc((size_t)n + 1, sizeof(const wn_param *));
  if (!out->sorted) return WN_FAIL(WN_E_MEMORY, "out of memory for the names of %d parameters", n);
  for (int32_t i = 0; i < n; i++) {
    out->sorted[i] = &params[i];
    out->fp8 = out->fp8 || params[i].fp8;
  }
  qsort(out->sorted, (size_t)n, sizeof(const wn_param *), by_name);
  return NULL;
}

void wn_names_free(wn_names *names) {
  free(names->sorted);
  names->sorted = NULL;
}

static int name_against(const void *name, const void *at) {
  return strcmp(name, (*(const wn_param *const *)at)->hf_name);
}

int32_t wn_names_find(const wn_names *names, const char *hf_name) {
  const wn_param **found = bsearch(hf_name, names->sorted, (size_t)names->n, sizeof(const wn_param *), name_against);
  return found ? (int32_t)(*found - names->params) : -1;
}

bool wn_scaled_name(char weight[WN_NAME_BYTES], const char *name) {
  static const char suffix[] = WN_HF_SCALE_SUFFIX;
  size_t length = strlen(name), tail = sizeof suffix - 1;
  if (length <= tail || length - tail >= WN_NAME_BYTES || strcmp(name + length - tail, suffix) != 0) return false;
  memcpy(weight, name, length - tail);
  weight[length - tail] = 0;
  return true;
}

const char *wn_field_suffix(wn_field field) {
  static const char *const suffixes[WN_N_FIELDS] = {"", ".master", ".m", ".v"};
  return suffixes[field];
}

void wn_field_name(char out[WN_FIELD_NAME_BYTES], const wn_param *p, wn_field field) {
  snprintf(out, WN_FIELD_NAME_BYTES, "%.*s%s", WN_NAME_BYTES, p->hf_name, wn_field_suffix(field));
}

wn_tensor *wn_field_of(wn_piece *piece, wn_field field) {
  if (field == WN_FIELD_M) return &piece->m;
  return field == WN_FIELD_V ? &piece->v : &piece->master;
}

/* ---- lists of tensors, cut into files ---- */

static bool is_fp8(const wn_st_entry *entry) {
  return entry && entry->dtype == WN_F8_E4M3;
}

wn_fate wn_source_fate(const wn_names *names, const wn_hf_dir *source, const wn_st_entry *entry) {
  char weight[WN_NAME_BYTES];
  bool scale = wn_scaled_name(weight, entry->name);
  int32_t p = wn_names_find(names, scale ? weight : entry->name);
  if (p >= 0 && names->params[p].kind != WN_FROZEN) return WN_LEFT;
  if (names->fp8) return WN_CARRIED;
  if (is_fp8(entry)) return WN_WIDENED;
  return scale && is_fp8(wn_hf_dir_find(source, weight, NULL)) ? WN_LEFT : WN_CARRIED;
}

static void add_param(wn_checkpoint_layout *layout, int64_t *n, const wn_param *params, int32_t p, wn_field field,
                      wn_dtype dtype) {
  wn_file_tensor *t = &layout->tensors[(*n)++];
  *t = (wn_file_tensor){.dtype = dtype, .rank = params[p].rank, .param = p, .field = field};
  for (int32_t d = 0; d < t->rank; d++) t->dim[d] = params[p].dim[d];
  wn_field_name(t->name, &params[p], field);
}

static wn_status add_source(wn_checkpoint_layout *layout, int64_t *n, const wn_st_entry *entry, wn_fate fate) {
  wn_file_tensor *t = &layout->tensors[(*n)++];
  if (strlen(entry->name) >= sizeof t->name)
    return WN_FAIL(WN_E_INPUT, "the name of tensor %s is longer than %zu bytes", entry->name, sizeof t->name - 1);
  wn_dtype dtype = fate == WN_WIDENED ? WN_BF16 : entry->dtype;
  *t = (wn_file_tensor){.dtype = dtype, .rank = entry->rank, .param = -1, .source = entry};
  for (int32_t d = 0; d < t->rank; d++) t->dim[d] = entry->dim[d];
  memcpy(t->name, entry->name, strlen(entry->name) + 1);
  return NULL;
}

static int64_t tensor_bytes(const wn_file_tensor *t) {
  int64_t bytes = wn_dtype_bytes(t->dtype);
  for (int32_t d = 0; d < t->rank; d++) bytes *= t->dim[d];
  return bytes;
}

/* Stable: within a width the order stays. Widest first keeps every tensor aligned. */
static wn_status widest_first(wn_file_tensor *tensors, int64_t n) {
  wn_file_tensor *sorted = calloc((size_t)n, sizeof *sorted);
  if (!sorted) return WN_FAIL(WN_E_MEMORY, "out of memory laying out a checkpoint");
  int64_t used = 0;
  for (int64_t width = 8; width >= 1; width /= 2)
    for (int64_t i = 0; i < n; i++)
      if (wn_dtype_bytes(tensors[i].dtype) == width) sorted[used++] = tensors[i];
  WN_ASSERT(used == n, "a dtype is none of 8, 4, 2 and 1 bytes wide");
  memcpy(tensors, sorted, (size_t)n * sizeof *sorted);
  free(sorted);
  return NULL;
}

static wn_status close_file(wn_checkpoint_layout *layout, wn_file_tensor *tensors, int64_t n) {
  wn_checkpoint_file *file = &layout->files[layout->n_files++];
  *file = (wn_checkpoint_file){.source_shard = -1, .tensors = tensors, .n = n};
  WN_TRY(widest_first(tensors, n));
  wn_st_spec *specs = calloc((size_t)n, sizeof *specs);
  if (!specs) return WN_FAIL(WN_E_MEMORY, "out of memory laying out a checkpoint");
  for (int64_t i = 0; i < n; i++) {
    specs[i] = (wn_st_spec){.name = tensors[i].name, .dtype = tensors[i].dtype, .rank = tensors[i].rank};
    memcpy(specs[i].dim, tensors[i].dim, sizeof specs[i].dim);
  }
  wn_status status = wn_st_layout_create(&file->layout, specs, n);
  free(specs);
  return status;
}

/* Tensors from .. to - 1 into files of at most shard_bytes each, but for a file of one larger tensor. */
static wn_status cut(wn_checkpoint_layout *layout, int64_t from, int64_t to, int64_t shard_bytes) {
  int64_t first = from, bytes = 0;
  for (int64_t i = from; i < to; i++) {
    int64_t more = tensor_bytes(&layout->tensors[i]);
    if (i > first && bytes + more > shard_bytes) {
      WN_TRY(close_file(layout, &layout->tensors[first], i - first));
      first = i;
      bytes = 0;
    }
    bytes += more;
  }
  return to > first ? close_file(layout, &layout->tensors[first], to - first) : NULL;
}

/* ---- the three parts of the model, then the optimizer ---- */

/* Shards of nothing but tensors that are carried become linked files; linked[shard] says which. */
static void link_shards(wn_checkpoint_layout *layout, bool *linked, const wn_names *names, const wn_hf_dir *source) {
  int32_t shard, n_shards = wn_hf_dir_shards(source);
  for (int64_t i = 0; i < wn_hf_dir_count(source); i++) {
    wn_hf_dir_at(source, i, &shard);
    linked[shard] = true; /* an empty shard is left out */
  }
  for (int64_t i = 0; i < wn_hf_dir_count(source); i++)
    if (wn_source_fate(names, source, wn_hf_dir_at(source, i, &shard)) != WN_CARRIED) linked[shard] = false;
  for (int32_t s = 0; s < n_shards; s++)
    if (wn_hf_dir_renamed(source, s)) linked[s] = false;
  for (int32_t s = 0; s < n_shards; s++)
    if (linked[s]) layout->files[layout->n_files++] = (wn_checkpoint_file){.source_shard = s};
}

static wn_status check_frozen(const wn_param *p, const wn_st_entry *entry, const wn_hf_dir *source) {
  if (wn_st_shaped(entry, p->rank, p->dim)) return NULL;
  return WN_FAIL(WN_E_INPUT, "%s: tensor %s has another shape than when this run started", wn_hf_dir_path(source),
                 p->hf_name);
}

static wn_status lay_out_model(wn_checkpoint_layout *layout, int64_t *n, const wn_names *names, const wn_hf_dir *source,
                               bool *linked, int64_t shard_bytes) {
  const wn_param *params = names->params;
  if (source) link_shards(layout, linked, names, source);
  for (int64_t i = 0; source && i < wn_hf_dir_count(source); i++) {
    int32_t shard;
    const wn_st_entry *entry = wn_hf_dir_at(source, i, &shard);
    wn_fate fate = wn_source_fate(names, source, entry);
    if (!linked[shard] && fate != WN_LEFT) WN_TRY(add_source(layout, n, entry, fate));
  }
  for (int32_t p = 0; p < names->n; p++) {
    if (params[p].kind != WN_FROZEN) continue;
    const wn_st_entry *entry = source ? wn_hf_dir_find(source, params[p].hf_name, NULL) : NULL;
    if (entry)
      WN_TRY(check_frozen(&params[p], entry, source));
    else if (params[p].fp8)
      return WN_FAIL(WN_E_INPUT, "%s lacks tensor %s, which was there when this run started",
                     source ? wn_hf_dir_path(source) : "init", params[p].hf_name);
    else /* never rounded: it has no master to come back from; what the rewriting makes is BF16 to begin with */
      add_param(layout, n, params, p, WN_FIELD_WEIGHT,
                source && wn_rewrite_makes(source, &params[p]) ? WN_BF16 : WN_F32);
  }
  WN_TRY(cut(layout, 0, *n, shard_bytes));
  int64_t trained = *n;
  for (int32_t p = 0; p < names->n; p++)
    if (params[p].kind != WN_FROZEN)
      add_param(layout, n, params, p, WN_FIELD_WEIGHT, params[p].kind == WN_BUFFER ? WN_F32 : params[p].file_dtype);
  return cut(layout, trained, *n, shard_bytes);
}

static wn_status lay_out_optimizer(wn_checkpoint_layout *layout, int64_t *n, const wn_param *params, int32_t n_params,
                                   wn_dtype moments, int64_t shard_bytes) {
  int64_t first = *n;
  for (int32_t p = 0; p < n_params; p++) {
    if (!wn_kind_trains(params[p].kind)) continue;
    if (params[p].file_dtype != WN_F32) add_param(layout, n, params, p, WN_FIELD_MASTER, WN_F32);
    add_param(layout, n, params, p, WN_FIELD_M, moments);
    add_param(layout, n, params, p, WN_FIELD_V, moments);
  }
  return cut(layout, first, *n, shard_bytes);
}

static void name_files(wn_checkpoint_layout *layout) {
  for (int32_t i = 0; i < layout->n_files; i++) {
    bool model = i < layout->n_model;
    int32_t place = model ? i : i - layout->n_model, of = model ? layout->n_model : layout->n_files - layout->n_model;
    snprintf(layout->files[i].name, sizeof layout->files[i].name, "%s-%05d-of-%05d.safetensors",
             model ? "model" : "optimizer", place + 1, of);
  }
}

wn_status wn_checkpoint_layout_create(wn_checkpoint_layout **out, const wn_param *params, int32_t n_params,
                                      const wn_hf_dir *source, wn_dtype moments, int64_t shard_bytes) {
  wn_status status = NULL;
  wn_names names = {0};
  int64_t n = 0, n_source = source ? wn_hf_dir_count(source) : 0;
  int32_t n_shards = source ? wn_hf_dir_shards(source) : 0;
  size_t most = (size_t)n_source + WN_N_FIELDS * (size_t)n_params;
  WN_ASSERT(shard_bytes > 0, "shard_bytes %lld", (long long)shard_bytes);
  bool *linked = calloc((size_t)n_shards + 1, sizeof *linked);
  wn_checkpoint_layout *layout = calloc(1, sizeof *layout);
  if (layout) layout->tensors = calloc(most, sizeof *layout->tensors);
  if (layout) layout->files = calloc(most + (size_t)n_shards, sizeof *layout->files);
  if (!linked || !layout || !layout->tensors || !layout->files) {
    status = WN_FAIL(WN_E_MEMORY, "out of memory laying out a checkpoint");
    goto fail;
  }
  WN_TRY_GOTO(status, fail, wn_names_create(&names, params, n_params));
  WN_TRY_GOTO(status, fail, lay_out_model(layout, &n, &names, source, linked, shard_bytes));
  layout->n_model = layout->n_files;
  WN_TRY_GOTO(status, fail, lay_out_optimizer(layout, &n, params, n_params, moments, shard_bytes));
  name_files(layout);
  wn_names_free(&names);
  free(linked);
  *out = layout;
  return NULL;
fail:
  wn_names_free(&names);
  free(linked);
  wn_checkpoint_layout_free(layout);
  return status;
}

void wn_checkpoint_layout_free(wn_checkpoint_layout *layout) {
  if (!layout) return;
  for (int32_t i = 0; layout->files && i < layout->n_files; i++) wn_st_layout_free(layout->files[i].layout);
  free(layout->files);
  free(layout->tensors);
  free(layout);
}

/* ---- the index ---- */

static wn_status add_written(wn_hf_index *index, const wn_checkpoint_file *file) {
  for (int64_t t = 0; t < file->n; t++)
    WN_TRY(wn_hf_index_add(index, file->tensors[t].name, tensor_bytes(&file->tensors[t]), file->name));
  return NULL;
}

/* linked[shard]: the file that is a link to it, or NULL. */
static wn_status add_linked(wn_hf_index *index, const wn_checkpoint_file *const *linked, const wn_hf_dir *source) {
  for (int64_t t = 0; t < wn_hf_dir_count(source); t++) {
    int32_t shard;
    const wn_st_entry *entry = wn_hf_dir_at(source, t, &shard);
    if (linked[shard]) WN_TRY(wn_hf_index_add(index, entry->name, (int64_t)entry->bytes, linked[shard]->name));
  }
  return NULL;
}

static wn_status add_all(wn_hf_index *index, const wn_checkpoint_layout *layout, const wn_hf_dir *source) {
  size_t n_shards = source ? (size_t)wn_hf_dir_shards(source) : 0;
  const wn_checkpoint_file **linked = calloc(n_shards + 1, sizeof(const wn_checkpoint_file *));
  wn_status status = linked ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for the index of %zu shards", n_shards);
  for (int32_t i = 0; !status && i < layout->n_model; i++) {
    const wn_checkpoint_file *file = &layout->files[i];
    if (file->source_shard >= 0) linked[file->source_shard] = file;
    status = add_written(index, file);
  }
  if (!status && source) status = add_linked(index, linked, source);
  free(linked);
  return status;
}

wn_status wn_checkpoint_write_index(const wn_checkpoint_layout *layout, const wn_hf_dir *source, const char *dir) {
  wn_hf_index *index;
  WN_TRY(wn_hf_index_create(&index));
  wn_status status = add_all(index, layout, source);
  if (!status) status = wn_hf_index_write(index, dir);
  wn_hf_index_free(index);
  return status;
}
