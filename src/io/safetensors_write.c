#include "io/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "io/files.h"

enum { LENGTH_BYTES = 8 };

struct wn_st_layout {
  char *header; /* length word, JSON, spaces up to a multiple of 8 */
  uint64_t header_bytes;
  uint64_t *offset; /* [n + 1], absolute; the last is the file's length */
  int64_t n;
};

static wn_status add_tensor(json_t *header, const wn_st_spec *spec, uint64_t begin, uint64_t *end) {
  WN_ASSERT(spec->rank >= 0 && spec->rank <= WN_MAX_RANK, "%s: rank %d", spec->name, (int)spec->rank);
  if (json_object_get(header, spec->name))
    return WN_FAIL(WN_E_INPUT, "tensor %s would stand twice in one file", spec->name);
  json_t *shape = json_array();
  uint64_t bytes = (uint64_t)wn_dtype_bytes(spec->dtype);
  int bad = 0;
  for (int32_t axis = 0; axis < spec->rank; axis++) {
    WN_ASSERT(spec->dim[axis] >= 0, "%s: dimension %lld", spec->name, (long long)spec->dim[axis]);
    WN_ASSERT(!__builtin_mul_overflow(bytes, (uint64_t)spec->dim[axis], &bytes), "%s: size overflows", spec->name);
    bad |= json_array_append_new(shape, json_integer(spec->dim[axis]));
  }
  *end = begin + bytes;
  json_t *offsets = json_array(), *info = json_object();
  bad |= json_array_append_new(offsets, json_integer((json_int_t)begin));
  bad |= json_array_append_new(offsets, json_integer((json_int_t)*end));
  bad |= json_object_set_new(info, "dtype", json_string(wn_dtype_name(spec->dtype)));
  bad |= json_object_set_new(info, "shape", shape);
  bad |= json_object_set_new(info, "data_offsets", offsets);
  bad |= json_object_set_new(header, spec->name, info);
  if (bad)
    return WN_FAIL(WN_E_MEMORY, "cannot describe tensor %s: out of memory, or its name is not UTF-8", spec->name);
  return NULL;
}

static wn_status write_header(wn_st_layout *layout, const json_t *header) {
  char *text = json_dumps(header, JSON_COMPACT);
  if (!text) return WN_FAIL(WN_E_MEMORY, "out of memory laying out a safetensors file");
  uint64_t json_bytes = strlen(text), padded = (json_bytes + 7) / 8 * 8;
  layout->header_bytes = LENGTH_BYTES + padded;
  layout->header = malloc(layout->header_bytes);
  if (layout->header) {
    for (int i = 0; i < LENGTH_BYTES; i++) layout->header[i] = (char)(padded >> (8 * i) & 255);
    memcpy(layout->header + LENGTH_BYTES, text, json_bytes);
    memset(layout->header + LENGTH_BYTES + json_bytes, ' ', padded - json_bytes);
  }
  free(text);
  return layout->header ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory laying out a safetensors file");
}

wn_status wn_st_layout_create(wn_st_layout **out, const wn_st_spec *specs, int64_t n) {
  wn_status status = NULL;
  *out = NULL;
  json_t *header = json_object();
  wn_st_layout *layout = calloc(1, sizeof *layout);
  if (layout) layout->offset = calloc((size_t)n + 1, sizeof *layout->offset);
  if (!header || !layout || !layout->offset ||
      json_object_set_new(header, "__metadata__", json_pack("{ss}", "format", "pt")) != 0) {
    status = WN_FAIL(WN_E_MEMORY, "out of memory laying out a safetensors file");
    goto fail;
  }
  layout->n = n;
  for (int64_t i = 0; i < n; i++)
    WN_TRY_GOTO(status, fail, add_tensor(header, &specs[i], layout->offset[i], &layout->offset[i + 1]));
  WN_TRY_GOTO(status, fail, write_header(layout, header));
  for (int64_t i = 0; i <= n; i++) layout->offset[i] += layout->header_bytes;
  json_decref(header);
  *out = layout;
  return NULL;
fail:
  json_decref(header);
  wn_st_layout_free(layout);
  return status;
}

void wn_st_layout_free(wn_st_layout *layout) {
  if (!layout) return;
  free(layout->header);
  free(layout->offset);
  free(layout);
}

uint64_t wn_st_layout_file_bytes(const wn_st_layout *layout) {
  return layout->offset[layout->n];
}

uint64_t wn_st_layout_offset(const wn_st_layout *layout, int64_t i) {
  WN_ASSERT(i >= 0 && i < layout->n, "tensor %lld of %lld", (long long)i, (long long)layout->n);
  return layout->offset[i];
}

const void *wn_st_layout_header(const wn_st_layout *layout, uint64_t *bytes) {
  *bytes = layout->header_bytes;
  return layout->header;
}

static wn_status write_all(int fd, const char *path, const wn_st_layout *layout, const void *const *data) {
  WN_TRY(wn_write_at(fd, path, layout->header, layout->header_bytes, 0));
  for (int64_t i = 0; i < layout->n; i++)
    WN_TRY(wn_write_at(fd, path, data[i], layout->offset[i + 1] - layout->offset[i], layout->offset[i]));
  if (fsync(fd) != 0) return WN_FAIL(WN_E_IO, "cannot sync %s: %s", path, strerror(errno));
  return NULL;
}

wn_status wn_safetensors_write(const char *path, const wn_st_spec *specs, const void *const *data, int64_t n) {
  wn_status status = NULL;
  wn_st_layout *layout = NULL;
  char beside[WN_PATH_BYTES];
  WN_TRY(wn_path(beside, "%s.tmp.%ld", path, (long)getpid()));
  WN_TRY(wn_st_layout_create(&layout, specs, n));
  int fd = open(beside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) {
    status = WN_FAIL(WN_E_IO, "cannot create %s: %s", beside, strerror(errno));
    goto done;
  }
  status = write_all(fd, beside, layout, data);
  if (close(fd) != 0) WN_KEEP_FIRST(status, WN_FAIL(WN_E_IO, "cannot close %s: %s", beside, strerror(errno)));
  if (!status) status = wn_rename_sync(beside, path);
  if (status) unlink(beside);
done:
  wn_st_layout_free(layout);
  return status;
}
