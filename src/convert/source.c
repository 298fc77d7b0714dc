#include "convert/source.h"

#include <stdlib.h>
#include <string.h>

#include "io/hf_faults.h"

/* ---- MTP layers ---- */

/* What an MTP layer has besides those of a layer with experts. */
static const struct {
  const char *name;
  bool vocabulary, wide, optional; /* [vocab, hidden]; [hidden, 2 hidden]; else [hidden] */
} mtp_weights[] = {
    {"enorm.weight", false, false, false},
    {"hnorm.weight", false, false, false},
    {"eh_proj.weight", false, true, false},
    {"embed_tokens.weight", true, false, true},
    {"shared_head.norm.weight", false, false, false},
    {"shared_head.head.weight", true, false, true},
};
enum { MTP_WEIGHTS = sizeof mtp_weights / sizeof *mtp_weights };

/* ---- the list ---- */

typedef struct gathering {
  wn_convert_source *s;
  wn_hf_faults found;
  const wn_st_entry **claimed;
  int64_t n_claimed;
} gathering;

static wn_released released_of(const wn_param *p) {
  if (p->file_dtype == WN_F32) return WN_RELEASED_F32;
  return wn_slot_released_fp8((wn_slot)p->slot) ? WN_RELEASED_FP8 : WN_RELEASED_BF16;
}

static bool readable(wn_dtype dtype) {
  return dtype == WN_F32 || dtype == WN_F16 || dtype == WN_BF16 || dtype == WN_F8_E4M3;
}

/* Adds the weight to the list where it is there and sound. */
static wn_status gather_one(gathering *g, wn_convert_weight w, bool optional) {
  const wn_st_entry *entry = wn_hf_dir_find(g->s->dir, w.name, NULL);
  if (!entry) {
    if (!optional) wn_name_list_add(&g->found.missing, "%s", w.name);
    return NULL;
  }
  if (!wn_st_shaped(entry, w.rank, w.dim)) {
    wn_hf_misshapen(&g->found, entry, w.rank, w.dim);
    return NULL;
  }
  if (!readable(entry->dtype)) {
    wn_hf_mistyped(&g->found, entry);
    return NULL;
  }
  WN_TRY(wn_hf_weight_find(&w.from, g->s->dir, w.name));
  g->claimed[g->n_claimed++] = w.from.entry;
  if (w.from.scale) g->claimed[g->n_claimed++] = w.from.scale;
  if (w.from.scale) g->s->fp8 = true;
  g->s->weights[g->s->n++] = w;
  return NULL;
}

static wn_status gather_params(gathering *g, int32_t from, int32_t to, bool mtp, bool without_indexer) {
  for (int32_t i = from; i < to; i++) {
    const wn_param *p = &g->s->table.params[i];
    if (without_indexer && wn_slot_of_indexer(p->slot)) continue;
    wn_convert_weight w = {.name = p->hf_name,
                           .expert = p->expert,
                           .indexer = wn_slot_of_indexer(p->slot),
                           .mtp = mtp,
                           .released = released_of(p),
                           .rank = p->rank,
                           .dim = {p->dim[0], p->dim[1]}};
    WN_TRY(gather_one(g, w, false));
  }
  return NULL;
}

static bool has_any_indexer(const wn_convert_source *s, int32_t from, int32_t to) {
  for (int32_t i = from; i < to; i++)
    if (wn_slot_of_indexer(s->table.params[i].slot) && wn_hf_dir_find(s->dir, s->table.params[i].hf_name, NULL))
      return true;
  return false;
}

static wn_status gather_mtp(gathering *g, int32_t layer, wn_log *log) {
  wn_convert_source *s = g->s;
  int32_t from = s->table.first[layer + 1], to = s->table.first[layer + 2];
  bool indexer = has_any_indexer(s, from, to);
  if (s->config.has_indexer && !indexer)
    wn_warn(log, "%s: MTP layer %d has no indexer; programs that predict with it may refuse a V3.2 model without",
            wn_hf_dir_path(s->dir), layer);
  WN_TRY(gather_params(g, from, to, true, !indexer));
  for (int32_t i = 0; i < MTP_WEIGHTS; i++) {
    char *name = s->mtp_names[s->mtp_layers * MTP_WEIGHTS + i];
    snprintf(name, WN_NAME_BYTES, "model.layers.%d.%s", layer, mtp_weights[i].name);
    wn_convert_weight w = {.name = name, .expert = -1, .mtp = true, .released = WN_RELEASED_BF16, .rank = 1};
    w.dim[0] = mtp_weights[i].vocabulary ? s->config.vocab_size : s->config.hidden_size;
    if (mtp_weights[i].vocabulary || mtp_weights[i].wide) w.rank = 2;
    if (w.rank == 2) w.dim[1] = (int64_t)(mtp_weights[i].wide ? 2 : 1) * s->config.hidden_size;
    WN_TRY(gather_one(g, w, mtp_weights[i].optional));
  }
  s->mtp_layers++;
  return NULL;
}

static int by_address(const void *a, const void *b) {
  const wn_st_entry *x = *(const wn_st_entry *const *)a, *y = *(const wn_st_entry *const *)b;
  return (x > y) - (x < y);
}

static void find_surplus(gathering *g) {
  qsort(g->claimed, (size_t)g->n_claimed, sizeof *g->claimed, by_address);
  for (int64_t i = 0; i < wn_hf_dir_count(g->s->dir); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(g->s->dir, i, NULL);
    if (!bsearch(&entry, g->claimed, (size_t)g->n_claimed, sizeof *g->claimed, by_address))
      wn_name_list_add(&g->found.surplus, "%s", entry->name);
  }
}

static wn_status gather(gathering *g, wn_log *log) {
  wn_convert_source *s = g->s;
  int32_t layers = s->config.num_hidden_layers, named = s->config.num_nextn_predict_layers, there;
  WN_TRY(wn_mtp_layers_there(&there, s->dir, &s->config));
  WN_TRY(gather_params(g, 0, s->table.first[layers + 1], false, false));
  for (int32_t i = 0; i < there; i++) WN_TRY(gather_mtp(g, layers + i, log));
  WN_TRY(gather_params(g, s->table.first[layers + named + 1], s->table.n, false, false));
  find_surplus(g);
  WN_TRY(wn_hf_refuse(&g->found, s->dir));
  if (there < named)
    wn_warn(log, "%s: of the %d MTP layers that config.json names, %d are absent", wn_hf_dir_path(s->dir), named,
            named - there);
  return NULL;
}

static wn_status open_source(wn_convert_source *s, const char *path, wn_log *log) {
  char scale_format[WN_CONFIG_TEXT_BYTES];
  WN_TRY(wn_model_config_load(&s->config, path));
  int32_t named_mtp = s->config.num_nextn_predict_layers;
  WN_TRY(wn_model_config_text(scale_format, path, "quantization_config", "scale_fmt"));
  s->scale_ue8m0 = strcmp(scale_format, "ue8m0") == 0;
  WN_TRY(wn_hf_dir_open(&s->dir, path));
  wn_model_config deeper = s->config; /* MTP layers have the weights of a further layer with experts */
  deeper.num_hidden_layers += named_mtp;
  WN_TRY(wn_param_table_create(&s->table, &deeper, (wn_param_settings){.file_dtype = WN_BF16}));
  size_t most = (size_t)s->table.n + (size_t)named_mtp * MTP_WEIGHTS;
  gathering *g = calloc(1, sizeof *g);
  s->weights = calloc(most, sizeof *s->weights);
  s->mtp_names = calloc((size_t)named_mtp * MTP_WEIGHTS + 1, sizeof *s->mtp_names);
  if (g) g->claimed = calloc(2 * most, sizeof *g->claimed);
  if (g) g->s = s;
  wn_status status = g && g->claimed && s->weights && s->mtp_names
                         ? gather(g, log)
                         : WN_FAIL(WN_E_MEMORY, "out of memory for the weights of %s", path);
  if (g) free(g->claimed);
  free(g);
  return status;
}

wn_status wn_convert_source_open(wn_convert_source *out, const char *path, wn_log *log) {
  *out = (wn_convert_source){0};
  wn_status status = open_source(out, path, log);
  if (status) wn_convert_source_close(out);
  return status;
}

void wn_convert_source_close(wn_convert_source *source) {
  free(source->weights);
  free(source->mtp_names);
  wn_param_table_free(&source->table);
  wn_hf_dir_close(source->dir);
  *source = (wn_convert_source){0};
}
