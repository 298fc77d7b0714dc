#include "train/manifest.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "io/json.h"

enum { FORMAT = 1, MOST_BYTES = 64 << 20 };

static int by_name(const void *a, const void *b) {
  return strcmp(((const wn_manifest_entry *)a)->name, ((const wn_manifest_entry *)b)->name);
}

static wn_status read_entry(wn_manifest_entry *out, const char *path, const json_t *item) {
  const char *name = json_string_value(json_object_get(item, "name"));
  const char *hash = json_string_value(json_object_get(item, "hash"));
  const json_t *bytes = json_object_get(item, "bytes");
  if (!name || !hash || !json_is_integer(bytes) || json_integer_value(bytes) < 0)
    return WN_FAIL(WN_E_INPUT, "%s: an entry lacks its name, bytes or hash", path);
  if (name[0] == 0 || strchr(name, '/') || !strcmp(name, ".") || !strcmp(name, "..") ||
      strlen(name) >= WN_FILE_NAME_BYTES)
    return WN_FAIL(WN_E_INPUT, "%s: '%.100s' is not the name of a file in the directory", path, name);
  if (wn_hash_parse(&out->hash, hash))
    return WN_FAIL(WN_E_INPUT, "%s: the hash of %s is not 32 hexadecimal digits", path, name);
  memcpy(out->name, name, strlen(name) + 1);
  out->bytes = (uint64_t)json_integer_value(bytes);
  return NULL;
}

static wn_status read_entries(wn_manifest *out, const char *path, const json_t *root) {
  const json_t *files = json_object_get(root, "files");
  if (json_integer_value(json_object_get(root, "format")) != FORMAT)
    return WN_FAIL(WN_E_INPUT, "%s: its format is not %d, the one that this version reads", path, FORMAT);
  if (!json_is_array(files)) return WN_FAIL(WN_E_INPUT, "%s holds no list of files", path);
  out->entries = calloc(json_array_size(files) + 1, sizeof *out->entries);
  if (!out->entries) return WN_FAIL(WN_E_MEMORY, "out of memory reading %s", path);
  for (size_t i = 0; i < json_array_size(files); i++)
    WN_TRY(read_entry(&out->entries[out->n++], path, json_array_get(files, i)));
  qsort(out->entries, out->n, sizeof *out->entries, by_name);
  for (size_t i = 1; i < out->n; i++)
    if (!by_name(&out->entries[i - 1], &out->entries[i]))
      return WN_FAIL(WN_E_INPUT, "%s lists %s twice", path, out->entries[i].name);
  return NULL;
}

wn_status wn_manifest_load(wn_manifest *out, const char *dir) {
  char path[WN_PATH_BYTES];
  json_t *root;
  *out = (wn_manifest){0};
  WN_TRY(wn_path(path, "%s/" WN_MANIFEST_NAME, dir));
  WN_TRY(wn_json_load(&root, path, MOST_BYTES, WN_E_INPUT));
  wn_status status = read_entries(out, path, root);
  json_decref(root);
  if (status) wn_manifest_free(out);
  return status;
}

void wn_manifest_free(wn_manifest *manifest) {
  free(manifest->entries);
  *manifest = (wn_manifest){0};
}

wn_status wn_manifest_write(wn_manifest *manifest, const char *dir) {
  char path[WN_PATH_BYTES], hash[WN_HASH_TEXT_BYTES];
  WN_TRY(wn_path(path, "%s/" WN_MANIFEST_NAME, dir));
  qsort(manifest->entries, manifest->n, sizeof *manifest->entries, by_name);
  json_t *files = json_array();
  int bad = 0;
  for (size_t i = 0; i < manifest->n; i++) {
    const wn_manifest_entry *entry = &manifest->entries[i];
    wn_hash_text(entry->hash, hash);
    bad |= json_array_append_new(
        files, json_pack("{ss sI ss}", "name", entry->name, "bytes", (json_int_t)entry->bytes, "hash", hash));
  }
  json_t *root = json_pack("{si ss so}", "format", FORMAT, "hash", "XXH3-128 of the XXH3-128 digests of 4 MiB chunks",
                           "files", files);
  wn_status status = wn_json_write(bad ? NULL : root, path, JSON_INDENT(1));
  json_decref(root);
  return status;
}

const wn_manifest_entry *wn_manifest_find(const wn_manifest *manifest, const char *name) {
  for (size_t low = 0, high = manifest->n; low < high;) {
    size_t middle = low + (high - low) / 2;
    int order = strcmp(name, manifest->entries[middle].name);
    if (order == 0) return &manifest->entries[middle];
    if (order < 0)
      high = middle;
    else
      low = middle + 1;
  }
  return NULL;
}

wn_status wn_manifest_check_names(const wn_manifest *manifest, const char *dir) {
  char path[WN_PATH_BYTES], **names;
  size_t n;
  wn_status status = NULL;
  WN_TRY(wn_list_dir(&names, &n, dir));
  for (size_t i = 0; !status && i < n; i++)
    if (strcmp(names[i], WN_MANIFEST_NAME) != 0 && !wn_manifest_find(manifest, names[i]))
      status = WN_FAIL(WN_E_INPUT, "%s/%s is not listed in " WN_MANIFEST_NAME, dir, names[i]);
  wn_list_free(names, n);
  for (size_t i = 0; !status && i < manifest->n; i++) {
    status = wn_path(path, "%s/%s", dir, manifest->entries[i].name);
    if (!status && !wn_path_exists(path))
      status = WN_FAIL(WN_E_INPUT, "%s is missing, though " WN_MANIFEST_NAME " lists it", path);
  }
  return status;
}

wn_status wn_manifest_check_file(const wn_manifest_entry *entry, const char *dir) {
  char path[WN_PATH_BYTES];
  struct stat info;
  wn_hash hash;
  uint64_t bytes;
  WN_TRY(wn_path(path, "%s/%s", dir, entry->name));
  /* the length first: a cut file is told from a changed one, and costs no reading */
  if (stat(path, &info) == 0 && (uint64_t)info.st_size != entry->bytes)
    return WN_FAIL(WN_E_INPUT, "%s is %lld bytes long; " WN_MANIFEST_NAME " lists %" PRIu64, path,
                   (long long)info.st_size, entry->bytes);
  WN_TRY(wn_hash_file(&hash, &bytes, path));
  if (bytes != entry->bytes || !wn_hash_equal(hash, entry->hash))
    return WN_FAIL(WN_E_INPUT, "%s differs from its digest in " WN_MANIFEST_NAME, path);
  return NULL;
}

wn_status wn_manifest_check_listed(const wn_manifest *manifest, const char *name, const char *dir) {
  const wn_manifest_entry *entry = wn_manifest_find(manifest, name);
  if (!entry) return WN_FAIL(WN_E_INPUT, "%s/%s is not listed in " WN_MANIFEST_NAME, dir, name);
  return wn_manifest_check_file(entry, dir);
}

void wn_manifest_known(const char *dir, const char *name, wn_manifest_entry *out, bool *known) {
  char path[WN_PATH_BYTES];
  struct stat file, listed;
  wn_manifest manifest;
  *known = false;
  wn_status status = wn_path(path, "%s/" WN_MANIFEST_NAME, dir);
  if (status || stat(path, &listed) != 0) goto done;
  WN_KEEP_FIRST(status, wn_path(path, "%s/%s", dir, name));
  if (status || stat(path, &file) != 0) goto done;
  WN_KEEP_FIRST(status, wn_manifest_load(&manifest, dir));
  if (status) goto done;
  const wn_manifest_entry *entry = wn_manifest_find(&manifest, name);
  bool older = file.st_mtim.tv_sec < listed.st_mtim.tv_sec ||
               (file.st_mtim.tv_sec == listed.st_mtim.tv_sec && file.st_mtim.tv_nsec <= listed.st_mtim.tv_nsec);
  if (entry && older && (uint64_t)file.st_size == entry->bytes) {
    *out = *entry;
    *known = true;
  }
  wn_manifest_free(&manifest);
done:
  wn_status_free(status);
}
