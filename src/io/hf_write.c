#include "io/hf_write.h"

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "io/hf_dir.h"
#include "io/json.h"

/* ---- the index ---- */

struct wn_hf_index {
  json_t *map;
  json_int_t total;
};

wn_status wn_hf_index_create(wn_hf_index **out) {
  wn_hf_index *index = calloc(1, sizeof *index);
  if (index) index->map = json_object();
  *out = index;
  if (index && index->map) return NULL;
  wn_hf_index_free(index);
  *out = NULL;
  return WN_FAIL(WN_E_MEMORY, "out of memory for the index of a model");
}

void wn_hf_index_free(wn_hf_index *index) {
  if (!index) return;
  json_decref(index->map);
  free(index);
}

wn_status wn_hf_index_add(wn_hf_index *index, const char *tensor, int64_t bytes, const char *file) {
  index->total += bytes;
  if (json_object_set_new(index->map, tensor, json_string(file)) == 0) return NULL;
  return WN_FAIL(WN_E_MEMORY, "out of memory for the index of a model");
}

wn_status wn_hf_index_write(const wn_hf_index *index, const char *dir) {
  char path[WN_PATH_BYTES];
  WN_TRY(wn_path(path, "%s/" WN_INDEX_NAME, dir));
  json_t *root = json_pack("{s{sI}sO}", "metadata", "total_size", index->total, "weight_map", index->map);
  wn_status status = wn_json_write(root, path, JSON_INDENT(2) | JSON_SORT_KEYS);
  json_decref(root);
  return status;
}

/* ---- what travels along ---- */

static bool travels(const char *name, bool only_tokens) {
  static const char *const others[] = {"generation_config.json", "chat_template.jinja", "chat_template.json",
                                       "vocab.json", "merges.txt"};
  if (strstr(name, ".safetensors")) return false;
  for (size_t i = 0; !only_tokens && i < sizeof others / sizeof *others; i++)
    if (!strcmp(name, others[i])) return true;
  return strstr(name, "token") != NULL;
}

static wn_status copy_one(const char *from_dir, const char *to_dir, const char *name, wn_log *log) {
  enum { MOST_MIB = 64 };
  char from[WN_PATH_BYTES], beside[WN_PATH_BYTES], to[WN_PATH_BYTES];
  struct stat info;
  WN_TRY(wn_path(from, "%s/%s", from_dir, name));
  WN_TRY(wn_path(beside, "%s/.tmp-%s", to_dir, name));
  WN_TRY(wn_path(to, "%s/%s", to_dir, name));
  if (stat(from, &info) != 0 || !S_ISREG(info.st_mode) || info.st_size > (off_t)MOST_MIB << 20) {
    wn_warn(log, "%s is no file of at most %d MiB, and is left behind", from, MOST_MIB);
    return NULL;
  }
  WN_TRY(wn_remove_tree(beside));
  WN_TRY(wn_copy_file(from, beside));
  return wn_rename_sync(beside, to);
}

wn_status wn_hf_copy_companions(const char *from_dir, const char *to_dir, bool only_tokens, wn_log *log) {
  char **names;
  size_t n;
  wn_status status = NULL;
  WN_TRY(wn_list_dir(&names, &n, from_dir));
  for (size_t i = 0; !status && i < n; i++)
    if (travels(names[i], only_tokens)) status = copy_one(from_dir, to_dir, names[i], log);
  wn_list_free(names, n);
  return status;
}
