#include "io/hf_dir.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "base/name_list.h"
#include "io/files.h"
#include "io/json.h"

#define SINGLE_NAME "model.safetensors"

enum { MOST_INDEX_BYTES = 256 << 20, MOST_SHARDS = 100000, MOST_NAME_BYTES = 255 /* as a file system takes */ };

typedef struct place {
  const wn_st_entry *entry;
  int32_t shard;
} place;

struct wn_hf_dir {
  char *path;
  wn_safetensors **shards; /* by file name */
  int32_t n_shards;
  place *places;  /* shard by shard, in file order */
  place *by_name; /* sorted */
  int64_t n;
  wn_st_entry *renamed; /* tensors under another name than their file has: NULL, or [n_renamed], names owned */
  int64_t n_renamed;
};

/* A shard's name from the index is a plain name: whatever could lead out of the directory is refused. */
static wn_status check_shard_name(const char *index_path, const char *tensor, const json_t *value) {
  const char *name = json_string_value(value);
  if (!name) return WN_FAIL(WN_E_INPUT, "%s: the file of tensor %s is not a string", index_path, tensor);
  if (strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, "..") || name[0] == 0 || strlen(name) > MOST_NAME_BYTES)
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s lies in '%.200s', which is not the name of a file in the directory",
                   index_path, tensor, name);
  return NULL;
}

static int by_text(const void *a, const void *b) {
  return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* The distinct file names of the map, sorted; they stay owned by the map. */
static wn_status shard_names(const char ***out, int32_t *n, const char *index_path, json_t *map) {
  const char *tensor;
  json_t *value;
  size_t used = 0, distinct = 0;
  const char **names = calloc(json_object_size(map) + 1, sizeof *names);
  if (!names) return WN_FAIL(WN_E_MEMORY, "out of memory reading %s", index_path);
  *out = names;
  json_object_foreach(map, tensor, value) {
    WN_TRY(check_shard_name(index_path, tensor, value));
    names[used++] = json_string_value(value);
  }
  qsort(names, used, sizeof *names, by_text);
  for (size_t i = 0; i < used; i++)
    if (i == 0 || strcmp(names[i], names[i - 1]) != 0) names[distinct++] = names[i];
  if (distinct > MOST_SHARDS)
    return WN_FAIL(WN_E_INPUT, "%s names %zu files; at most %d", index_path, distinct, MOST_SHARDS);
  *n = (int32_t)distinct;
  return NULL;
}

static wn_status load_index(json_t **out, const char *index_path) {
  WN_TRY(wn_json_load(out, index_path, MOST_INDEX_BYTES, WN_E_INPUT));
  if (!json_is_object(json_object_get(*out, "weight_map")))
    return WN_FAIL(WN_E_INPUT, "%s holds no weight_map", index_path);
  return NULL;
}

/* Shards stay open, and thousands may be more than a process gets without asking. That the system says no shows as an
 * error of opening. */
static void allow_open_files(int32_t n) {
  struct rlimit limit;
  rlim_t wanted = (rlim_t)n + 256;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= wanted) return;
  limit.rlim_cur = limit.rlim_max < wanted ? limit.rlim_max : wanted;
  (void)setrlimit(RLIMIT_NOFILE, &limit);
}

static const char *plural(const wn_name_list *list) {
  return list->n == 1 ? "" : "s";
}

static const char *file_name(const char *path) {
  return strrchr(path, '/') + 1;
}

static wn_status open_shards(wn_hf_dir *dir, const char *const *names, int32_t n) {
  char path[WN_PATH_BYTES];
  wn_name_list absent = {0};
  dir->shards = calloc((size_t)n + 1, sizeof(wn_safetensors *));
  if (!dir->shards) return WN_FAIL(WN_E_MEMORY, "out of memory opening %s", dir->path);
  for (int32_t i = 0; i < n; i++) {
    WN_TRY(wn_path(path, "%s/%s", dir->path, names[i]));
    if (!wn_path_exists(path)) wn_name_list_add(&absent, "%s", names[i]);
  }
  if (absent.n)
    return WN_FAIL_HINT(WN_E_INPUT, "the directory may be an incomplete download",
                        "%s: " WN_INDEX_NAME " names %lld file%s that %s absent: %s", dir->path, (long long)absent.n,
                        plural(&absent), absent.n == 1 ? "is" : "are", absent.text);
  allow_open_files(n);
  for (int32_t i = 0; i < n; i++) {
    WN_TRY(wn_path(path, "%s/%s", dir->path, names[i]));
    WN_TRY(wn_safetensors_open(&dir->shards[dir->n_shards], path));
    dir->n_shards++;
  }
  return NULL;
}

static int by_name(const void *a, const void *b) {
  const place *x = a, *y = b;
  int order = strcmp(x->entry->name, y->entry->name);
  return order ? order : (x->shard > y->shard) - (x->shard < y->shard);
}

static wn_status sort_names(wn_hf_dir *dir) {
  size_t n = (size_t)dir->n;
  wn_name_list twice = {0};
  memcpy(dir->by_name, dir->places, n * sizeof *dir->by_name);
  qsort(dir->by_name, n, sizeof *dir->by_name, by_name);
  for (size_t i = 1; i < n; i++) {
    const place *a = &dir->by_name[i - 1], *b = &dir->by_name[i];
    if (strcmp(a->entry->name, b->entry->name) == 0)
      wn_name_list_add(&twice, "%s (%s and %s)", a->entry->name, file_name(wn_safetensors_path(dir->shards[a->shard])),
                       file_name(wn_safetensors_path(dir->shards[b->shard])));
  }
  if (twice.n == 0) return NULL;
  return WN_FAIL(WN_E_INPUT, "%s: %lld tensor%s in two shards: %s", dir->path, (long long)twice.n,
                 twice.n == 1 ? " stands" : "s stand", twice.text);
}

static wn_status gather(wn_hf_dir *dir) {
  size_t n = 0;
  for (int32_t s = 0; s < dir->n_shards; s++) n += (size_t)wn_safetensors_count(dir->shards[s]);
  dir->places = calloc(n + 1, sizeof *dir->places);
  dir->by_name = calloc(n + 1, sizeof *dir->by_name);
  if (!dir->places || !dir->by_name) return WN_FAIL(WN_E_MEMORY, "out of memory opening %s", dir->path);
  for (int32_t s = 0; s < dir->n_shards; s++)
    for (int64_t i = 0; i < wn_safetensors_count(dir->shards[s]); i++)
      dir->places[dir->n++] = (place){wn_safetensors_at(dir->shards[s], i), s};
  return sort_names(dir);
}

/* Index and shards must tell the same story, in both directions. */
static wn_status compare_with_index(const wn_hf_dir *dir, json_t *map) {
  const char *tensor;
  json_t *value;
  wn_name_list elsewhere = {0}, unlisted = {0};
  json_object_foreach(map, tensor, value) {
    const char *claimed = json_string_value(value);
    int32_t shard = -1;
    const wn_st_entry *entry = wn_hf_dir_find(dir, tensor, &shard);
    const char *found = entry ? file_name(wn_safetensors_path(dir->shards[shard])) : "no file";
    if (strcmp(found, claimed) != 0) wn_name_list_add(&elsewhere, "%s (%s, but it lies in %s)", tensor, claimed, found);
  }
  if (elsewhere.n)
    return WN_FAIL(WN_E_INPUT, "%s: " WN_INDEX_NAME " places %lld tensor%s wrongly: %s", dir->path,
                   (long long)elsewhere.n, plural(&elsewhere), elsewhere.text);
  for (int64_t i = 0; i < dir->n; i++) {
    const char *name = dir->places[i].entry->name;
    if (!json_object_get(map, name))
      wn_name_list_add(&unlisted, "%s (in %s)", name,
                       file_name(wn_safetensors_path(dir->shards[dir->places[i].shard])));
  }
  if (unlisted.n == 0) return NULL;
  return WN_FAIL(WN_E_INPUT, "%s: the shards hold %lld tensor%s that " WN_INDEX_NAME " does not list: %s", dir->path,
                 (long long)unlisted.n, plural(&unlisted), unlisted.text);
}

static wn_status open_indexed(wn_hf_dir *dir, const char *index_path) {
  wn_status status = NULL;
  json_t *index = NULL;
  const char **names = NULL;
  int32_t n = 0;
  WN_TRY_GOTO(status, done, load_index(&index, index_path));
  json_t *map = json_object_get(index, "weight_map");
  WN_TRY_GOTO(status, done, shard_names(&names, &n, index_path, map));
  WN_TRY_GOTO(status, done, open_shards(dir, names, n));
  WN_TRY_GOTO(status, done, gather(dir));
  WN_TRY_GOTO(status, done, compare_with_index(dir, map));
done:
  free(names);
  json_decref(index);
  return status;
}

static wn_status open_dir(wn_hf_dir *dir) {
  char single[WN_PATH_BYTES], index[WN_PATH_BYTES];
  if (!wn_path_exists(dir->path)) return WN_FAIL(WN_E_INPUT, "model directory %s is absent", dir->path);
  if (!wn_path_is_dir(dir->path)) return WN_FAIL(WN_E_INPUT, "%s is not a directory", dir->path);
  WN_TRY(wn_path(single, "%s/" SINGLE_NAME, dir->path));
  WN_TRY(wn_path(index, "%s/" WN_INDEX_NAME, dir->path));
  bool has_single = wn_path_exists(single), has_index = wn_path_exists(index);
  if (has_single && has_index)
    return WN_FAIL_HINT(WN_E_INPUT, "keep the one that is meant", "%s holds both " SINGLE_NAME " and " WN_INDEX_NAME,
                        dir->path);
  if (!has_single && !has_index)
    return WN_FAIL_HINT(WN_E_INPUT, "a Hugging Face directory holds " SINGLE_NAME ", or shards and " WN_INDEX_NAME,
                        "%s holds no weights", dir->path);
  if (has_index) return open_indexed(dir, index);
  const char *const names[] = {SINGLE_NAME};
  WN_TRY(open_shards(dir, names, 1));
  return gather(dir);
}

wn_status wn_hf_dir_open(wn_hf_dir **out, const char *path) {
  *out = NULL;
  wn_hf_dir *dir = calloc(1, sizeof *dir);
  if (dir) dir->path = strdup(path);
  wn_status status = dir && dir->path ? open_dir(dir) : WN_FAIL(WN_E_MEMORY, "out of memory opening %s", path);
  if (status) {
    wn_hf_dir_close(dir);
    return wn_status_trail(status, __FILE__, __LINE__);
  }
  *out = dir;
  return NULL;
}

void wn_hf_dir_close(wn_hf_dir *dir) {
  if (!dir) return;
  for (int32_t s = 0; s < dir->n_shards; s++) wn_safetensors_close(dir->shards[s]);
  free(dir->shards);
  free(dir->places);
  free(dir->by_name);
  for (int64_t i = 0; i < dir->n_renamed; i++) free((void *)(uintptr_t)dir->renamed[i].name);
  free(dir->renamed);
  free(dir->path);
  free(dir);
}

bool wn_hf_dir_has_weights(const char *path) {
  static const char *const names[] = {SINGLE_NAME, WN_INDEX_NAME};
  char file[WN_PATH_BYTES];
  for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
    int length = snprintf(file, sizeof file, "%s/%s", path, names[i]);
    if (length > 0 && length < (int)sizeof file && wn_path_exists(file)) return true;
  }
  return false;
}

const char *wn_hf_dir_path(const wn_hf_dir *dir) {
  return dir->path;
}
int64_t wn_hf_dir_count(const wn_hf_dir *dir) {
  return dir->n;
}
int32_t wn_hf_dir_shards(const wn_hf_dir *dir) {
  return dir->n_shards;
}

const wn_st_entry *wn_hf_dir_at(const wn_hf_dir *dir, int64_t i, int32_t *shard) {
  WN_ASSERT(i >= 0 && i < dir->n, "%s has %lld tensors, asked for %lld", dir->path, (long long)dir->n, (long long)i);
  if (shard) *shard = dir->places[i].shard;
  return dir->places[i].entry;
}

static int name_against(const void *name, const void *at) {
  return strcmp(name, ((const place *)at)->entry->name);
}

const wn_st_entry *wn_hf_dir_find(const wn_hf_dir *dir, const char *name, int32_t *shard) {
  const place *found = bsearch(name, dir->by_name, (size_t)dir->n, sizeof *found, name_against);
  if (!found) return NULL;
  if (shard) *shard = found->shard;
  return found->entry;
}

const char *wn_hf_dir_shard_path(const wn_hf_dir *dir, int32_t shard) {
  WN_ASSERT(shard >= 0 && shard < dir->n_shards, "%s has %d shards, asked for %d", dir->path, (int)dir->n_shards,
            (int)shard);
  return wn_safetensors_path(dir->shards[shard]);
}

wn_status wn_hf_dir_rename(wn_hf_dir *dir, const char *part, const char *other, int64_t *n) {
  WN_ASSERT(!dir->renamed, "%s is renamed twice", dir->path);
  dir->renamed = calloc((size_t)dir->n + 1, sizeof *dir->renamed);
  if (!dir->renamed) return WN_FAIL(WN_E_MEMORY, "out of memory for the names of %s", dir->path);
  for (int64_t i = 0; i < dir->n; i++) {
    const wn_st_entry *entry = dir->places[i].entry;
    const char *at = strstr(entry->name, part);
    char *name;
    if (!at) continue;
    if (asprintf(&name, "%.*s%s%s", (int)(at - entry->name), entry->name, other, at + strlen(part)) < 0)
      return WN_FAIL(WN_E_MEMORY, "out of memory for the names of %s", dir->path);
    wn_st_entry *own = &dir->renamed[dir->n_renamed++];
    *own = *entry;
    own->name = name;
    dir->places[i].entry = own;
  }
  *n = dir->n_renamed;
  return sort_names(dir);
}

bool wn_hf_dir_renamed(const wn_hf_dir *dir, int32_t shard) {
  for (int64_t i = 0; dir->n_renamed > 0 && i < dir->n; i++) {
    const wn_st_entry *entry = dir->places[i].entry;
    if (dir->places[i].shard == shard && entry >= dir->renamed && entry < dir->renamed + dir->n_renamed) return true;
  }
  return false;
}
