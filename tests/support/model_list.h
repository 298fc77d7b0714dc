/* Tensors of a model directory that a test makes up, and the directory's files. */
#ifndef WN_TEST_MODEL_LIST_H
#define WN_TEST_MODEL_LIST_H

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "io/hf_write.h"
#include "io/safetensors.h"
#include "support/test.h"

/* Begins as {0}. Owns names and data. */
typedef struct model_list {
  wn_st_spec *spec;
  void **data;
  int64_t n, room;
} model_list;

/* The tensor's data, zeroed, to be filled in. d1: 0 where rank is 1. */
static inline void *model_list_add(model_list *list, const char *name, wn_dtype dtype, int32_t rank, int64_t d0,
                                   int64_t d1) {
  if (list->n == list->room) {
    list->room = list->room ? 2 * list->room : 64;
    list->spec = realloc(list->spec, (size_t)list->room * sizeof *list->spec);
    list->data = realloc(list->data, (size_t)list->room * sizeof *list->data);
    assert_true(list->spec && list->data);
  }
  int64_t i = list->n++;
  list->spec[i] = (wn_st_spec){.name = strdup(name), .dtype = dtype, .rank = rank, .dim = {d0, d1}};
  list->data[i] = calloc((size_t)(rank == 2 ? d0 * d1 : d0) + 1, (size_t)wn_dtype_bytes(dtype));
  assert_true(list->spec[i].name && list->data[i]);
  return list->data[i];
}

static inline void model_list_free(model_list *list) {
  for (int64_t i = 0; i < list->n; i++) {
    free((char *)(uintptr_t)list->spec[i].name);
    free(list->data[i]);
  }
  free(list->spec);
  free(list->data);
  *list = (model_list){0};
}

/* Shards and their index: tensors dealt out in runs of equal counts, so that a weight and its scales may lie in two. */
static inline void model_list_write(const model_list *list, const char *dir, int32_t shards) {
  char file[WN_PATH_BYTES], name[64];
  wn_hf_index *index;
  OK(wn_make_dirs(dir));
  OK(wn_hf_index_create(&index));
  for (int32_t s = 0; s < shards; s++) {
    int64_t from = list->n * s / shards, to = list->n * (s + 1) / shards;
    snprintf(name, sizeof name, "model-%05d-of-%06d.safetensors", s + 1, shards);
    OK(wn_path(file, "%s/%s", dir, name));
    OK(wn_safetensors_write(file, list->spec + from, (const void *const *)list->data + from, to - from));
    for (int64_t i = from; i < to; i++) OK(wn_hf_index_add(index, list->spec[i].name, 1, name));
  }
  OK(wn_hf_index_write(index, dir));
  wn_hf_index_free(index);
}

/* How many layers of multi-token prediction DIR/config.json says that there are. */
static inline void model_set_mtp_layers(const char *dir, int32_t n) {
  char path[WN_PATH_BYTES];
  OK(wn_path(path, "%s/config.json", dir));
  json_t *root = json_load_file(path, 0, NULL);
  assert_non_null(root);
  assert_int_equal(json_object_set_new(root, "num_nextn_predict_layers", json_integer(n)), 0);
  assert_int_equal(json_dump_file(root, path, JSON_INDENT(2)), 0);
  json_decref(root);
}

#endif
