/* Saving. Rank 0 makes a temporary directory with every file at its full length; each rank writes the byte ranges it
 * holds; the files are dealt out and hashed; rank 0 writes the manifest and renames. Ranks agree after each of these,
 * so whatever fails anywhere fails everywhere, the temporary directory goes, and what stood before still stands. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/time.h"
#include "io/hf_write.h"
#include "train/checkpoint_dirs.h"
#include "train/rewrite.h"

/* What rank 0 decides and tells the others. */
typedef struct places {
  char source[WN_PATH_BYTES], temporary[WN_PATH_BYTES];
} places;

typedef struct save {
  const wn_checkpoint_plan *plan;
  const wn_state *state;
  const wn_param *params;
  int32_t n_params;
  char checkpoints[WN_PATH_BYTES];
  places at;
  bool made;         /* the temporary directory exists (rank 0) */
  wn_hf_dir *source; /* NULL: none */
  wn_checkpoint_layout *layout;
  wn_part *parts;
  wn_manifest_entry *digests;           /* [n_files], of this rank's deal; of all after gathering (rank 0) */
  uint64_t linked_bytes, written_bytes; /* rank 0 */
} save;

/* ---- rank 0 prepares ---- */

static wn_status prepare(save *s) {
  WN_TRY(wn_make_dirs(s->checkpoints));
  WN_TRY(wn_sync_dir(s->plan->run_dir));
  wn_steps_clean(s->checkpoints, s->plan->log);
  WN_TRY(wn_checkpoint_source(s->at.source, s->checkpoints, s->state->step, s->plan->init_dir));
  WN_TRY(wn_path(s->at.temporary, "%s/.tmp-" WN_STEP_FORMAT "-%ld", s->checkpoints, (long long)s->state->step,
                 (long)getpid()));
  if (mkdir(s->at.temporary, 0777) != 0)
    return WN_FAIL(WN_E_IO, "cannot create directory %s: %s", s->at.temporary, strerror(errno));
  s->made = true;
  return NULL;
}

/* ---- every rank lays out ---- */

/* A run's frozen weights were read when it started: a source that has changed since would make a checkpoint of two
 * models. Compared are the first elements of every frozen part, as they are held, not all, since all would be the whole
 * base at every save. */
static wn_status check_source_unchanged(const save *s) {
  enum { COMPARED = 256 };
  float theirs[COMPARED], ours[COMPARED];
  wn_device *device = s->plan->model->device;
  for (int32_t p = 0; p < s->n_params; p++) {
    const wn_part *part = &s->parts[p];
    wn_hf_weight weight = {0};
    if (s->params[p].kind != WN_FROZEN || !part->piece || !s->source) continue;
    WN_TRY(wn_hf_weight_find(&weight, s->source, s->params[p].hf_name));
    if (!weight.entry) continue;
    int64_t n = part->count < COMPARED ? part->count : COMPARED;
    wn_tensor own = wn_tensor_slice(part->piece->master, 0, part->offset, n);
    bool same = own.dtype != WN_F8_E4M3 || weight.scale;
    if (same) {
      WN_TRY(wn_hf_read(theirs, own.dtype, &weight, part->first, n));
      WN_TRY(device->ops->download(device, ours, &own));
      same = memcmp(theirs, ours, (size_t)wn_tensor_bytes(&own)) == 0;
    }
    if (!same)
      return WN_FAIL_HINT(WN_E_INPUT, "put the model back that the run started from",
                          "%s: tensor %s is not what it was when this run started", s->at.source, s->params[p].hf_name);
  }
  return NULL;
}

static wn_status lay_out(save *s) {
  if (s->at.source[0]) WN_TRY(wn_source_open(&s->source, s->at.source, &s->plan->model->config));
  bool narrow = s->plan->model->device->dtype_of[WN_MOMENT] == WN_BF16;
  WN_TRY(wn_checkpoint_layout_create(&s->layout, s->params, s->n_params, s->source, narrow ? WN_BF16 : WN_F32,
                                     s->plan->shard_bytes));
  WN_TRY(wn_parts_create(&s->parts, s->plan->store, s->n_params));
  s->digests = calloc((size_t)s->layout->n_files + 1, sizeof *s->digests);
  if (!s->digests) return WN_FAIL(WN_E_MEMORY, "out of memory for the digests of %d files", s->layout->n_files);
  return check_source_unchanged(s);
}

/* ---- rank 0 creates ---- */

static wn_status create_file(save *s, const wn_checkpoint_file *file, const char *path) {
  uint64_t header_bytes, bytes = wn_st_layout_file_bytes(file->layout);
  const void *header = wn_st_layout_header(file->layout, &header_bytes);
  WN_TRY(wn_create_sized(path, bytes));
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return WN_FAIL(WN_E_IO, "cannot open %s: %s", path, strerror(errno));
  wn_status status = wn_write_at(fd, path, header, header_bytes, 0);
  if (close(fd) != 0) WN_KEEP_FIRST(status, WN_FAIL(WN_E_IO, "cannot close %s: %s", path, strerror(errno)));
  s->written_bytes += bytes;
  return status;
}

static wn_status link_file(save *s, const wn_checkpoint_file *file, const char *path) {
  const char *from = wn_hf_dir_shard_path(s->source, file->source_shard), *how;
  struct stat info;
  WN_TRY(wn_link_or_copy(from, path, &how));
  if (!strcmp(how, "copied"))
    wn_warn(s->plan->log, "%s could not be linked and was copied: every checkpoint holds the whole base", from);
  if (stat(path, &info) == 0) s->linked_bytes += (uint64_t)info.st_size;
  return NULL;
}

/* What the embedding is stored as: the job's dtype where the base trains, the source's where it is frozen. */
static const char *stored_dtype(const save *s) {
  for (int32_t p = 0; p < s->n_params; p++) {
    if (s->params[p].slot != WN_P_EMBED) continue;
    const wn_st_entry *entry = s->source ? wn_hf_dir_find(s->source, s->params[p].hf_name, NULL) : NULL;
    wn_dtype dtype = s->params[p].kind != WN_FROZEN ? s->params[p].file_dtype : entry ? entry->dtype : WN_F32;
    return dtype == WN_BF16 || dtype == WN_F8_E4M3 ? "bfloat16" : "float32";
  }
  return "float32";
}

static wn_status create_files(save *s) {
  char path[WN_PATH_BYTES];
  for (int32_t i = 0; i < s->layout->n_files; i++) {
    const wn_checkpoint_file *file = &s->layout->files[i];
    WN_TRY(wn_path(path, "%s/%s", s->at.temporary, file->name));
    WN_TRY(file->layout ? create_file(s, file, path) : link_file(s, file, path));
  }
  if (s->source) WN_TRY(wn_hf_copy_companions(s->at.source, s->at.temporary, false, s->plan->log));
  WN_TRY(wn_checkpoint_write_index(s->layout, s->source, s->at.temporary));
  bool fp8 = false;
  for (int32_t p = 0; p < s->n_params; p++) fp8 = fp8 || s->params[p].fp8;
  wn_model_config config = s->plan->model->config;
  int32_t *mtp_layers = &config.num_nextn_predict_layers; /* what is there, whatever init's configuration says */
  if (s->source)
    WN_TRY(wn_mtp_layers_there(mtp_layers, s->source, &config));
  else
    *mtp_layers = 0;
  if (fp8) /* kept, so there is a source */
    WN_TRY(wn_model_config_save_kept(&config, s->at.temporary, s->at.source));
  else
    WN_TRY(wn_model_config_save(&config, s->at.temporary, s->source ? s->at.source : NULL, stored_dtype(s)));
  return wn_state_write(s->plan, s->state, s->at.temporary);
}

/* ---- every rank writes ---- */

/* What comes from the source: its bytes, or its codes as the BF16 that they stand for. */
static wn_status write_source(const save *s, const wn_file_tensor *t, int fd, const char *path, uint64_t offset,
                              uint16_t *scratch) {
  wn_hf_weight weight;
  if (t->dtype == t->source->dtype) return wn_write_at(fd, path, t->source->data, t->source->bytes, offset);
  WN_TRY(wn_hf_weight_find(&weight, s->source, t->name));
  int64_t count = (int64_t)t->source->bytes, width = wn_dtype_bytes(t->dtype);
  for (int64_t done = 0, n; done < count; done += n) {
    n = count - done < WN_COPY_ELEMENTS ? count - done : WN_COPY_ELEMENTS;
    WN_TRY(wn_hf_read(scratch, t->dtype, &weight, done, n));
    WN_TRY(wn_write_at(fd, path, scratch, (size_t)(n * width), offset + (uint64_t)(done * width)));
  }
  return NULL;
}

static wn_status write_file(const save *s, const wn_checkpoint_file *file, float *buffer, uint16_t *scratch) {
  char path[WN_PATH_BYTES];
  int32_t rank = wn_world_rank(s->plan->world), size = wn_world_size(s->plan->world);
  WN_TRY(wn_path(path, "%s/%s", s->at.temporary, file->name));
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return WN_FAIL(WN_E_IO, "cannot open %s: %s", path, strerror(errno));
  wn_status status = NULL;
  bool wrote = rank == 0; /* the header */
  for (int64_t i = 0; !status && i < file->n; i++) {
    const wn_file_tensor *t = &file->tensors[i];
    uint64_t offset = wn_st_layout_offset(file->layout, i);
    bool mine = t->source ? i % size == rank : s->parts[t->param].piece != NULL;
    if (!mine) continue;
    status = t->source ? write_source(s, t, fd, path, offset, scratch)
                       : wn_part_write(s->plan->model->device, &s->parts[t->param], t->field, t->dtype, fd, path,
                                       offset, buffer, scratch);
    wrote = true;
  }
  if (!status && wrote && fsync(fd) != 0) status = WN_FAIL(WN_E_IO, "cannot sync %s: %s", path, strerror(errno));
  if (close(fd) != 0) WN_KEEP_FIRST(status, WN_FAIL(WN_E_IO, "cannot close %s: %s", path, strerror(errno)));
  return status;
}

static wn_status write_parts(const save *s) {
  float *buffer = malloc(WN_COPY_ELEMENTS * sizeof *buffer);
  uint16_t *scratch = malloc(WN_COPY_ELEMENTS * sizeof *scratch);
  wn_status status = buffer && scratch ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory saving a checkpoint");
  for (int32_t i = 0; !status && i < s->layout->n_files; i++)
    if (s->layout->files[i].layout) status = write_file(s, &s->layout->files[i], buffer, scratch);
  free(buffer);
  free(scratch);
  return status;
}

/* ---- every rank hashes its deal ---- */

static wn_status hash_file(const save *s, const wn_checkpoint_file *file, wn_manifest_entry *out) {
  char path[WN_PATH_BYTES];
  if (file->source_shard >= 0) { /* its content is not new: a digest that its own directory knows is taken over */
    const char *from = strrchr(wn_hf_dir_shard_path(s->source, file->source_shard), '/') + 1;
    bool known;
    wn_manifest_known(s->at.source, from, out, &known);
    if (known) return NULL;
  }
  WN_TRY(wn_path(path, "%s/%s", s->at.temporary, file->name));
  return wn_hash_file(&out->hash, &out->bytes, path);
}

static wn_status hash_deal(save *s) {
  int32_t rank = wn_world_rank(s->plan->world), size = wn_world_size(s->plan->world);
  for (int32_t i = rank; i < s->layout->n_files; i += size) WN_TRY(hash_file(s, &s->layout->files[i], &s->digests[i]));
  return NULL;
}

static wn_status gather_digests(save *s) {
  int32_t size = wn_world_size(s->plan->world), n = s->layout->n_files;
  size_t bytes = (size_t)n * sizeof *s->digests;
  if (size == 1) return NULL;
  wn_manifest_entry *all = calloc((size_t)size, bytes);
  wn_status status = all ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for the digests of %d files", n);
  status = wn_world_agree(s->plan->world, status);
  if (!status) status = wn_group_gather(wn_world_all(s->plan->world), all, s->digests, bytes);
  for (int32_t i = 0; !status && i < n; i++) s->digests[i] = all[(size_t)(i % size) * (size_t)n + (size_t)i];
  free(all);
  return status;
}

/* ---- rank 0 finishes ---- */

/* The files that are not dealt out: all that are small. */
static wn_status hash_rest(const save *s, wn_manifest *manifest) {
  char path[WN_PATH_BYTES], **names;
  size_t n;
  wn_status status = NULL;
  WN_TRY(wn_list_dir(&names, &n, s->at.temporary));
  manifest->entries = calloc(n + 1, sizeof *manifest->entries);
  if (!manifest->entries) status = WN_FAIL(WN_E_MEMORY, "out of memory for a manifest of %zu files", n);
  for (size_t i = 0; !status && i < n; i++) {
    wn_manifest_entry *entry = &manifest->entries[manifest->n++];
    int32_t f = 0;
    while (f < s->layout->n_files && strcmp(s->layout->files[f].name, names[i]) != 0) f++;
    if (f < s->layout->n_files) *entry = s->digests[f];
    WN_ASSERT(strlen(names[i]) < sizeof entry->name, "a file name of %zu bytes", strlen(names[i]));
    memcpy(entry->name, names[i], strlen(names[i]) + 1);
    if (f < s->layout->n_files) continue;
    status = wn_path(path, "%s/%s", s->at.temporary, names[i]);
    if (!status) status = wn_hash_file(&entry->hash, &entry->bytes, path);
  }
  wn_list_free(names, n);
  return status;
}

static wn_status finish(save *s) {
  wn_manifest manifest = {0};
  wn_status status = hash_rest(s, &manifest);
  if (!status) status = wn_manifest_write(&manifest, s->at.temporary);
  wn_manifest_free(&manifest);
  if (!status) status = wn_sync_dir(s->at.temporary);
  return status ? status : wn_steps_install(s->checkpoints, s->at.temporary, s->state->step);
}

static wn_status save_all(save *s) {
  wn_world *world = s->plan->world;
  bool first = wn_world_rank(world) == 0;
  WN_TRY(wn_path(s->checkpoints, "%s/checkpoints", s->plan->run_dir));
  WN_TRY(wn_world_agree(world, first ? prepare(s) : NULL));
  WN_TRY(wn_group_broadcast(wn_world_all(world), &s->at, sizeof s->at, 0));
  WN_TRY(wn_world_agree(world, lay_out(s)));
  WN_TRY(wn_world_agree(world, first ? create_files(s) : NULL));
  WN_TRY(wn_world_agree(world, write_parts(s)));
  WN_TRY(wn_world_agree(world, hash_deal(s)));
  WN_TRY(gather_digests(s));
  return wn_world_agree(world, first ? finish(s) : NULL);
}

wn_status wn_checkpoint_save(const wn_checkpoint_plan *plan, const wn_state *state) {
  double start_s = wn_time_s();
  save *s = calloc(1, sizeof *s); /* several paths: too large for a stack that may be a thread's */
  wn_status status = wn_world_agree(plan->world, s ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory saving a checkpoint"));
  if (status) {
    free(s);
    return status;
  }
  s->plan = plan;
  s->state = state;
  s->params = wn_store_params(plan->store, &s->n_params);
  status = save_all(s);
  if (status && s->made) { /* the first error is the one that matters; a next save tries the removal again */
    wn_status_free(wn_remove_tree(s->at.temporary));
  } else if (!status && wn_world_rank(plan->world) == 0) {
    wn_steps_retain(s->checkpoints, state->step, plan->keep, plan->log);
    wn_info(plan->log, "saved %s/" WN_STEP_FORMAT ": %.1f MB written, %.1f MB linked, %.2f s", s->checkpoints,
            (long long)state->step, (double)s->written_bytes * 1e-6, (double)s->linked_bytes * 1e-6,
            wn_time_s() - start_s);
  }
  wn_checkpoint_layout_free(s->layout);
  wn_hf_dir_close(s->source);
  free(s->parts);
  free(s->digests);
  free(s);
  return status;
}
