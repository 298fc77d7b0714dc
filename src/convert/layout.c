#include "convert/layout.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/float8.h"
#include "convert/demo.h"

bool wn_output_is_scale(const wn_output *output) {
  return output->making >= WN_MAKE_SCALES;
}

int64_t wn_output_bytes(const wn_output *output) {
  int64_t bytes = wn_dtype_bytes(output->dtype);
  for (int32_t d = 0; d < output->rank; d++) bytes *= output->dim[d];
  return bytes;
}

void wn_output_name(char out[WN_OUTPUT_NAME_BYTES], const wn_output_list *list, const wn_output *output) {
  const char *name = output->weight->name;
  bool scale = wn_output_is_scale(output);
  if (list->demo)
    wn_demo_name(out, name, scale);
  else
    snprintf(out, WN_OUTPUT_NAME_BYTES, "%s%s", name, scale ? WN_HF_SCALE_SUFFIX : "");
}

/* ---- Hugging Face's forms ---- */

static wn_output whole(const wn_convert_weight *w, wn_making making, wn_dtype dtype) {
  return (wn_output){.weight = w, .making = making, .dtype = dtype, .rank = w->rank, .dim = {w->dim[0], w->dim[1]}};
}

static wn_output scales_of(const wn_convert_weight *w, wn_making making, wn_dtype dtype) {
  wn_output output = whole(w, making, dtype);
  for (int32_t d = 0; d < 2; d++) output.dim[d] = wn_f8_blocks(w->dim[d]);
  return output;
}

/* The weight, and its scales where it has some. */
static void add_weight(wn_output_list *list, const wn_convert_weight *w, bool fp8) {
  wn_output *next = &list->outputs[list->n];
  if (!fp8 || w->released != WN_RELEASED_FP8) {
    next[0] = whole(w, WN_MAKE_NUMBERS, w->released == WN_RELEASED_F32 ? WN_F32 : WN_BF16);
    list->n += 1;
    return;
  }
  next[0] = whole(w, w->from.scale ? WN_MAKE_COPY : WN_MAKE_BLOCKS, WN_F8_E4M3);
  next[1] = scales_of(w, w->from.scale ? WN_CONVERT_SCALES : WN_MAKE_SCALES, WN_F32);
  list->n += 2;
}

static void close_file(wn_output_list *list, int64_t from, int64_t to, int64_t bytes) {
  list->files[list->n_files++] = (wn_output_file){.from = from, .to = to, .bytes = bytes};
}

/* A weight and its scales stay together. */
static void list_model(wn_output_list *list, const wn_convert_source *s, const wn_convert_job *job) {
  int64_t begin = 0, bytes = 0;
  for (int64_t i = 0; i < s->n; i++) {
    if (job->form == WN_TO_V3 && s->weights[i].indexer) continue;
    int64_t first = list->n, more = 0;
    add_weight(list, &s->weights[i], job->form == WN_TO_FP8);
    for (int64_t o = first; o < list->n; o++) more += wn_output_bytes(&list->outputs[o]);
    if (first > begin && bytes + more > job->shard_bytes) {
      close_file(list, begin, first, bytes);
      begin = first;
      bytes = 0;
    }
    bytes += more;
  }
  close_file(list, begin, list->n, bytes);
  for (int64_t f = 0; f < list->n_files; f++) /* as the release numbers them */
    snprintf(list->files[f].name, sizeof list->files[f].name, "model-%05lld-of-%06lld.safetensors", (long long)f + 1,
             (long long)list->n_files);
}

/* ---- the demo's ---- */

static wn_output window(const wn_convert_weight *w, wn_making making, const wn_st_entry *entry, int32_t axis,
                        int32_t shard, int32_t of) {
  wn_output output = {.weight = w, .making = making, .dtype = entry->dtype, .rank = entry->rank};
  for (int32_t d = 0; d < output.rank; d++) output.dim[d] = entry->dim[d];
  if (axis >= 0) {
    output.dim[axis] /= of;
    output.first[axis] = shard * output.dim[axis];
  }
  return output;
}

static void list_demo(wn_output_list *list, const wn_convert_source *s, int32_t of) {
  for (int32_t shard = 0; shard < of; shard++) {
    int64_t begin = list->n, bytes = 0;
    for (int64_t i = 0; i < s->n; i++) {
      const wn_convert_weight *w = &s->weights[i];
      if (!wn_demo_has(&s->config, w, shard, of)) continue;
      int32_t axis = wn_demo_axis(w);
      list->outputs[list->n++] = window(w, WN_MAKE_COPY, w->from.entry, axis, shard, of);
      if (w->from.scale) list->outputs[list->n++] = window(w, WN_COPY_SCALES, w->from.scale, axis, shard, of);
    }
    for (int64_t o = begin; o < list->n; o++) bytes += wn_output_bytes(&list->outputs[o]);
    close_file(list, begin, list->n, bytes);
    snprintf(list->files[shard].name, sizeof list->files[shard].name, "model%d-mp%d.safetensors", shard, of);
  }
}

/* ---- places ---- */

/* Widest first keeps every tensor aligned; within a width the order stays. */
static void place(wn_output *outputs, int64_t n) {
  int64_t used = 0;
  for (int64_t width = 8; width >= 1; width /= 2)
    for (int64_t i = 0; i < n; i++)
      if (wn_dtype_bytes(outputs[i].dtype) == width) outputs[i].place = used++;
  WN_ASSERT(used == n, "a dtype is none of 8, 4, 2 and 1 bytes wide");
}

wn_status wn_output_list_create(wn_output_list *out, const wn_convert_source *source, const wn_convert_job *job) {
  *out = (wn_output_list){.demo = job->form == WN_TO_DEMO};
  size_t n = 0;
  for (int64_t i = 0; i < source->n; i++) /* an expert lies in one of the demo's shards, all else in each */
    n += out->demo && source->weights[i].expert < 0 ? 2 * (size_t)job->model_parallel : 2;
  out->outputs = calloc(n + 1, sizeof *out->outputs);
  out->files = calloc((out->demo ? (size_t)job->model_parallel : (size_t)source->n) + 1, sizeof *out->files);
  if (!out->outputs || !out->files) {
    wn_output_list_free(out);
    return WN_FAIL(WN_E_MEMORY, "out of memory for a list of %zu tensors", n);
  }
  if (out->demo)
    list_demo(out, source, job->model_parallel);
  else
    list_model(out, source, job);
  for (int64_t f = 0; f < out->n_files; f++)
    place(out->outputs + out->files[f].from, out->files[f].to - out->files[f].from);
  return NULL;
}

void wn_output_list_free(wn_output_list *list) {
  free(list->outputs);
  free(list->files);
  *list = (wn_output_list){0};
}

wn_status wn_output_layout(wn_st_layout **out, const wn_output_list *list, int64_t file) {
  const wn_output_file *f = &list->files[file];
  size_t n = (size_t)(f->to - f->from);
  wn_st_spec *specs = calloc(n + 1, sizeof *specs);
  char(*names)[WN_OUTPUT_NAME_BYTES] = calloc(n + 1, sizeof *names);
  wn_status status = specs && names ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory laying out %s", f->name);
  for (int64_t i = f->from; !status && i < f->to; i++) {
    const wn_output *output = &list->outputs[i];
    wn_output_name(names[output->place], list, output);
    specs[output->place] = (wn_st_spec){.name = names[output->place],
                                        .dtype = output->dtype,
                                        .rank = output->rank,
                                        .dim = {output->dim[0], output->dim[1]}};
  }
  if (!status) status = wn_st_layout_create(out, specs, (int64_t)n);
  free(specs);
  free(names);
  return status;
}
