#include "train/checkpoint_parts.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/float8.h"
#include "io/hf_faults.h"
#include "kernels/kernels.h"
#include "train/checkpoint_dirs.h"
#include "train/rewrite.h"

wn_status wn_parts_create(wn_part **out, wn_store *store, int32_t n_params) {
  wn_part *parts = calloc((size_t)n_params + 1, sizeof *parts);
  if (!parts) return WN_FAIL(WN_E_MEMORY, "out of memory for the places of %d parameters", n_params);
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    wn_piece *piece = wn_store_piece(store, i);
    WN_ASSERT(piece->master.dtype == WN_F32 || piece->kind == WN_FROZEN, "masters are %s; checkpoints hold FP32",
              wn_dtype_name(piece->master.dtype));
    for (int32_t s = 0; s < piece->n_segments; s++) {
      wn_segment at = piece->segments[s];
      WN_ASSERT(!parts[at.param].piece, "parameter %d lies in two pieces of one rank", at.param);
      parts[at.param] = (wn_part){piece, at.first, at.offset, at.count};
    }
  }
  *out = parts;
  return NULL;
}

wn_status wn_floats_upload(wn_device *device, wn_tensor *place, float *values) {
  if (place->dtype != WN_BF16) return device->ops->upload(device, place, values);
  uint16_t *narrow = (uint16_t *)(void *)values;
  for (int64_t i = 0; i < wn_tensor_count(place); i++) {
    float value;
    memcpy(&value, values + i, sizeof value);
    uint16_t rounded = wn_bf16_from_f32(value);
    memcpy(narrow + i, &rounded, sizeof rounded);
  }
  return device->ops->upload(device, place, narrow);
}

wn_status wn_floats_download(wn_device *device, void *values, const wn_tensor *place) {
  WN_TRY(device->ops->download(device, values, place));
  if (place->dtype != WN_BF16) return NULL;
  for (int64_t i = wn_tensor_count(place) - 1; i >= 0; i--) { /* from the end: the floats take twice the room */
    uint16_t narrow;
    memcpy(&narrow, (const char *)values + (size_t)i * sizeof narrow, sizeof narrow);
    float wide = wn_f32_from_bf16(narrow);
    memcpy((char *)values + (size_t)i * sizeof wide, &wide, sizeof wide);
  }
  return NULL;
}

static int64_t chunk_at(const wn_part *part, int64_t done) {
  int64_t left = part->count - done;
  return left < WN_COPY_ELEMENTS ? left : WN_COPY_ELEMENTS;
}

wn_status wn_part_write(wn_device *device, const wn_part *part, wn_field field, wn_dtype dtype, int fd,
                        const char *path, uint64_t tensor_offset, float *buffer, uint16_t *scratch) {
  WN_ASSERT(dtype == WN_F32 || dtype == WN_BF16, "file dtype %s", wn_dtype_name(dtype));
  const wn_tensor *flat = wn_field_of(part->piece, field);
  int64_t width = wn_dtype_bytes(dtype);
  for (int64_t done = 0, n; done < part->count; done += n) {
    n = chunk_at(part, done);
    wn_tensor from = wn_tensor_slice(*flat, 0, part->offset + done, n);
    WN_TRY(wn_floats_download(device, buffer, &from));
    if (dtype == WN_BF16)
      for (int64_t i = 0; i < n; i++) scratch[i] = wn_bf16_from_f32(buffer[i]);
    WN_TRY(wn_write_at(fd, path, dtype == WN_BF16 ? (const void *)scratch : buffer, (size_t)(n * width),
                       tensor_offset + (uint64_t)((part->first + done) * width)));
  }
  return NULL;
}

/* ---- checks of a directory against the parameter table ---- */

static bool readable(const wn_st_entry *entry) {
  return entry->dtype == WN_F32 || entry->dtype == WN_F16 || entry->dtype == WN_BF16 ||
         (entry->dtype == WN_F8_E4M3 && entry->rank == 2);
}

static void check_scale(wn_hf_faults *found, const wn_hf_dir *dir, const wn_st_entry *entry) {
  if (entry->dtype != WN_F8_E4M3 || entry->rank != 2) return;
  const wn_st_entry *scale = wn_hf_scale_entry(dir, entry->name);
  const int64_t blocks[2] = {wn_f8_blocks(entry->dim[0]), wn_f8_blocks(entry->dim[1])};
  if (!scale)
    wn_name_list_add(&found->missing, "%s" WN_HF_SCALE_SUFFIX, entry->name);
  else if (!wn_hf_scale_readable(scale))
    wn_hf_mistyped(found, scale);
  else if (!wn_hf_scale_fits(scale, entry))
    wn_hf_misshapen(found, scale, 2, blocks);
}

static void check_param(wn_hf_faults *found, const wn_hf_dir *dir, const wn_param *p, const wn_st_entry *entry) {
  if (!wn_st_shaped(entry, p->rank, p->dim)) wn_hf_misshapen(found, entry, p->rank, p->dim);
  if (!readable(entry)) wn_hf_mistyped(found, entry);
  check_scale(found, dir, entry);
}

/* Whether the tensor is a parameter, or the scales of one that is FP8. */
static bool belongs(const wn_hf_dir *dir, const wn_names *names, const char *name) {
  char weight[WN_NAME_BYTES];
  if (wn_names_find(names, name) >= 0) return true;
  if (!wn_scaled_name(weight, name) || wn_names_find(names, weight) < 0) return false;
  const wn_st_entry *entry = wn_hf_dir_find(dir, weight, NULL);
  return entry && entry->dtype == WN_F8_E4M3;
}

wn_status wn_dir_check(const wn_hf_dir *dir, const wn_names *names, wn_dir_rules rules, bool *indexer_absent,
                       int64_t *passed_over) {
  wn_hf_faults found = {0};
  int64_t indexer_found = 0, indexer_wanted = 0;
  *passed_over = 0;
  for (int32_t i = 0; i < names->n; i++) {
    if (!wn_slot_of_indexer(names->params[i].slot)) continue;
    indexer_wanted++;
    indexer_found += wn_hf_dir_find(dir, names->params[i].hf_name, NULL) != NULL;
  }
  *indexer_absent = rules.new_indexer_allowed && indexer_wanted > 0 && indexer_found == 0;
  for (int32_t i = 0; i < names->n; i++) {
    const wn_param *p = &names->params[i];
    const wn_st_entry *entry = wn_hf_dir_find(dir, p->hf_name, NULL);
    if (entry)
      check_param(&found, dir, p, entry);
    else if (!(*indexer_absent && wn_slot_of_indexer(p->slot)) && !wn_rewrite_makes(dir, p))
      wn_name_list_add(&found.missing, "%s", p->hf_name);
  }
  for (int64_t i = 0; i < wn_hf_dir_count(dir); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(dir, i, NULL);
    if (wn_name_layer(entry->name) >= rules.n_layers) {
      (*passed_over)++;
      if (strlen(entry->name) >= WN_FIELD_NAME_BYTES) /* or the first save would refuse it */
        return WN_FAIL(WN_E_INPUT, "%s: the name of tensor %.100s... is longer than %d bytes", wn_hf_dir_path(dir),
                       entry->name, WN_FIELD_NAME_BYTES - 1);
      if (entry->dtype == WN_F8_E4M3 && entry->rank != 2) wn_hf_mistyped(&found, entry);
      check_scale(&found, dir, entry);
    } else if (!belongs(dir, names, entry->name)) {
      wn_name_list_add(&found.surplus, "%s", entry->name);
    }
  }
  return wn_hf_refuse(&found, dir);
}

wn_status wn_check_widened(const wn_hf_dir *dir, const wn_names *names, int32_t rank, int32_t size) {
  wn_status status = NULL;
  uint16_t *scratch = malloc(WN_COPY_ELEMENTS * sizeof *scratch);
  if (!scratch) return WN_FAIL(WN_E_MEMORY, "out of memory for a buffer");
  for (int64_t i = rank; !status && i < wn_hf_dir_count(dir); i += size) {
    const wn_st_entry *entry = wn_hf_dir_at(dir, i, NULL);
    wn_hf_weight weight = {entry, wn_hf_scale_entry(dir, entry->name)};
    int64_t count = (int64_t)entry->bytes; /* codes, where it matters */
    if (wn_source_fate(names, dir, entry) != WN_WIDENED) continue;
    for (int64_t done = 0, n; !status && done < count; done += n) {
      n = count - done < WN_COPY_ELEMENTS ? count - done : WN_COPY_ELEMENTS;
      status = wn_hf_read(scratch, WN_BF16, &weight, done, n);
    }
  }
  free(scratch);
  return status;
}

static bool opens(const char *path) {
  wn_hf_dir *dir = NULL;
  wn_status status = wn_hf_dir_open(&dir, path);
  bool opened = !status;
  wn_status_free(status);
  wn_hf_dir_close(dir);
  return opened;
}

wn_status wn_checkpoint_source(char out[WN_PATH_BYTES], const char *checkpoints, int64_t step, const char *init_dir) {
  int64_t *steps;
  size_t n;
  bool found = false;
  WN_TRY(wn_steps_list(&steps, &n, checkpoints));
  wn_status status = NULL;
  for (size_t i = 0; !status && i < n && !found; i++) {
    if (steps[i] >= step) continue;
    status = wn_path(out, "%s/" WN_STEP_FORMAT, checkpoints, (long long)steps[i]);
    found = !status && opens(out);
  }
  free(steps);
  return status || found ? status : wn_path(out, "%s", init_dir);
}

void wn_params_keep_fp8(wn_param *params, int32_t n, const wn_hf_dir *dir) {
  for (int32_t i = 0; i < n; i++) {
    wn_param *p = &params[i];
    bool of_a_layer = p->slot != WN_P_EMBED && p->slot != WN_P_HEAD;
    if (p->kind != WN_FROZEN || p->role != WN_ACT || p->rank != 2 || !of_a_layer) continue;
    const wn_st_entry *entry = wn_hf_dir_find(dir, p->hf_name, NULL);
    p->fp8 = entry && entry->dtype == WN_F8_E4M3;
  }
}

/* ---- optimizer files ---- */

wn_status wn_optimizer_open(wn_optimizer_files *out, const char *dir) {
  static const char prefix[] = "optimizer-", suffix[] = ".safetensors";
  char path[WN_PATH_BYTES], **names;
  size_t n;
  wn_status status = NULL;
  *out = (wn_optimizer_files){0};
  WN_TRY(wn_list_dir(&names, &n, dir));
  out->files = calloc(n + 1, sizeof(wn_safetensors *));
  if (!out->files) status = WN_FAIL(WN_E_MEMORY, "out of memory opening %s", dir);
  for (size_t i = 0; !status && i < n; i++) {
    size_t length = strlen(names[i]);
    if (strncmp(names[i], prefix, sizeof prefix - 1) != 0 || length < sizeof prefix + sizeof suffix) continue;
    if (strcmp(names[i] + length - (sizeof suffix - 1), suffix) != 0) continue;
    status = wn_path(path, "%s/%s", dir, names[i]);
    if (!status) status = wn_safetensors_open(&out->files[out->n], path);
    if (!status) out->n++;
  }
  wn_list_free(names, n);
  if (status) wn_optimizer_close(out);
  return status;
}

void wn_optimizer_close(wn_optimizer_files *files) {
  for (size_t i = 0; i < files->n; i++) wn_safetensors_close(files->files[i]);
  free(files->files);
  *files = (wn_optimizer_files){0};
}

const wn_st_entry *wn_optimizer_find(wn_optimizer_files *files, const wn_param *p, wn_field field) {
  char name[WN_FIELD_NAME_BYTES];
  wn_field_name(name, p, field);
  for (size_t tried = 0; tried < files->n; tried++) { /* tensors stand in table order: mostly where the last one was */
    size_t i = (files->last + tried) % files->n;
    const wn_st_entry *entry = wn_safetensors_find(files->files[i], name);
    if (!entry) continue;
    files->last = i;
    return entry;
  }
  return NULL;
}

wn_status wn_optimizer_check(const wn_st_entry *entry, const wn_param *p, wn_field field, const char *dir) {
  char name[WN_FIELD_NAME_BYTES];
  wn_field_name(name, p, field);
  if (!entry) return WN_FAIL(WN_E_INPUT, "%s: the optimizer files lack tensor %s", dir, name);
  if (!wn_st_shaped(entry, p->rank, p->dim))
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s has another shape than its parameter", dir, name);
  bool narrow = entry->dtype == WN_BF16 && (field == WN_FIELD_M || field == WN_FIELD_V);
  if (entry->dtype != WN_F32 && !narrow)
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s is %s instead of F32", dir, name, wn_dtype_name(entry->dtype));
  return NULL;
}
