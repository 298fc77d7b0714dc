/* The reader. A header is believed only after it has been checked as a whole: sorted by offset, the tensors must tile
 * the data exactly, which excludes overlap, holes, reversal and trailing bytes at once. */
#include "io/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/json.h"

enum { LENGTH_BYTES = 8, MOST_HEADER_BYTES = 100000000 };

struct wn_safetensors {
  char *path;
  int fd;
  const unsigned char *map;
  uint64_t map_bytes;
  json_t *metadata; /* NULL: none */
  char *names;      /* of all entries, one after another */
  wn_st_entry *entries;
  wn_st_entry **by_name; /* sorted */
  int64_t n;
};

static bool product(int64_t *out, int64_t a, int64_t b) {
  return !__builtin_mul_overflow(a, b, out);
}

static wn_status read_dtype(wn_st_entry *entry, const char *path, const json_t *info) {
  const char *text = json_string_value(json_object_get(info, "dtype"));
  if (!text) return WN_FAIL(WN_E_INPUT, "%s: tensor %s: dtype is not a string", path, entry->name);
  for (int32_t dtype = 0; dtype < WN_N_DTYPES; dtype++) {
    if (strcmp(text, wn_dtype_name((wn_dtype)dtype)) != 0) continue;
    entry->dtype = (wn_dtype)dtype;
    return NULL;
  }
  return WN_FAIL_HINT(WN_E_INPUT, "known are F64, F32, F16, BF16, F8_E4M3, F8_E8M0, I64, I32 and U8",
                      "%s: tensor %s: dtype %.40s is not supported", path, entry->name, text);
}

static wn_status read_shape(wn_st_entry *entry, int64_t *bytes, const char *path, const json_t *info) {
  const json_t *shape = json_object_get(info, "shape");
  if (!json_is_array(shape)) return WN_FAIL(WN_E_INPUT, "%s: tensor %s: shape is not a list", path, entry->name);
  size_t rank = json_array_size(shape);
  if (rank > WN_MAX_RANK)
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s: rank %zu; at most %d is supported", path, entry->name, rank,
                   WN_MAX_RANK);
  entry->rank = (int32_t)rank;
  *bytes = 1;
  bool fits = true;
  for (size_t axis = 0; axis < rank; axis++) {
    const json_t *dim = json_array_get(shape, axis);
    if (!json_is_integer(dim) || json_integer_value(dim) < 0)
      return WN_FAIL(WN_E_INPUT, "%s: tensor %s: dimension %zu is not a whole number of 0 or more", path, entry->name,
                     axis);
    entry->dim[axis] = json_integer_value(dim);
    fits = fits && product(bytes, *bytes, entry->dim[axis]);
  }
  if (!fits || !product(bytes, *bytes, wn_dtype_bytes(entry->dtype)))
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s: the size of its shape overflows", path, entry->name);
  return NULL;
}

/* Leaves the offset of the first byte in the data section, not yet checked against the other tensors', in `begin`. */
static wn_status read_entry(wn_st_entry *entry, uint64_t *begin, const char *path, const char *name,
                            const json_t *info) {
  *entry = (wn_st_entry){.name = name};
  if (!json_is_object(info)) return WN_FAIL(WN_E_INPUT, "%s: tensor %s: not an object", path, name);
  int64_t bytes = 0;
  WN_TRY(read_dtype(entry, path, info));
  WN_TRY(read_shape(entry, &bytes, path, info));
  const json_t *offsets = json_object_get(info, "data_offsets");
  const json_t *from = json_array_get(offsets, 0), *to = json_array_get(offsets, 1);
  if (json_array_size(offsets) != 2 || !json_is_integer(from) || !json_is_integer(to) || json_integer_value(from) < 0)
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s: data_offsets is not a pair of byte positions", path, name);
  int64_t first = json_integer_value(from), end = json_integer_value(to);
  if (end < first)
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s: data_offsets [%" PRId64 ", %" PRId64 "] run backwards", path, name,
                   first, end);
  if (end - first != bytes)
    return WN_FAIL(WN_E_INPUT, "%s: tensor %s: holds %" PRId64 " bytes, its shape and dtype make %" PRId64, path, name,
                   end - first, bytes);
  entry->bytes = (uint64_t)bytes;
  *begin = (uint64_t)first;
  return NULL;
}

typedef struct placed {
  wn_st_entry entry;
  uint64_t begin;
} placed;

static int by_begin(const void *a, const void *b) {
  const placed *x = a, *y = b;
  if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
  if (x->entry.bytes != y->entry.bytes) return x->entry.bytes < y->entry.bytes ? -1 : 1;
  return strcmp(x->entry.name, y->entry.name);
}

static int by_name(const void *a, const void *b) {
  return strcmp((*(wn_st_entry *const *)a)->name, (*(wn_st_entry *const *)b)->name);
}

static wn_status check_metadata(const char *path, json_t *metadata) {
  const char *key;
  json_t *value;
  if (!metadata || json_is_null(metadata)) return NULL;
  if (!json_is_object(metadata)) return WN_FAIL(WN_E_INPUT, "%s: __metadata__ is not an object", path);
  json_object_foreach(metadata, key, value) {
    if (!json_is_string(value)) return WN_FAIL(WN_E_INPUT, "%s: __metadata__.%s is not a string", path, key);
  }
  return NULL;
}

/* The parsed header takes many times the memory of what it says, so nothing may point into it when it goes. */
static wn_status keep_names(wn_safetensors *file, json_t *header) {
  const char *name;
  json_t *info;
  size_t bytes = 1, used = 0;
  json_object_foreach(header, name, info) bytes += strlen(name) + 1;
  file->names = malloc(bytes);
  if (!file->names) return WN_FAIL(WN_E_MEMORY, "out of memory reading the header of %s", file->path);
  for (int64_t i = 0; i < file->n; i++) {
    size_t length = strlen(file->entries[i].name) + 1;
    memcpy(file->names + used, file->entries[i].name, length);
    file->entries[i].name = file->names + used;
    used += length;
  }
  return NULL;
}

static wn_status read_entries(wn_safetensors *file, json_t *header, uint64_t data_begin) {
  wn_status status = NULL;
  const char *name;
  json_t *info, *metadata = json_object_get(header, "__metadata__");
  WN_TRY(check_metadata(file->path, metadata));
  file->metadata = json_incref(metadata);
  size_t n = json_object_size(header) - (metadata ? 1 : 0);
  placed *found = calloc(n + 1, sizeof *found);
  file->entries = calloc(n + 1, sizeof *file->entries);
  file->by_name = calloc(n + 1, sizeof(wn_st_entry *));
  if (!found || !file->entries || !file->by_name) {
    status = WN_FAIL(WN_E_MEMORY, "out of memory reading the header of %s", file->path);
    goto done;
  }
  json_object_foreach(header, name, info) {
    if (!strcmp(name, "__metadata__")) continue; /* by name: a null is the same object wherever it stands */
    WN_TRY_GOTO(status, done, read_entry(&found[file->n].entry, &found[file->n].begin, file->path, name, info));
    file->n++;
  }
  qsort(found, n, sizeof *found, by_begin);
  uint64_t at = 0, data_bytes = file->map_bytes - data_begin;
  for (size_t i = 0; i < n; i++) {
    wn_st_entry *entry = &found[i].entry;
    if (found[i].begin != at) {
      status =
          WN_FAIL(WN_E_INPUT, "%s: tensor %s begins at byte %" PRIu64 " of the data, %s at %" PRIu64, file->path,
                  entry->name, found[i].begin,
                  found[i].begin < at ? "overlapping one that ends" : "leaving a hole after the one that ends", at);
      goto done;
    }
    if (entry->bytes > data_bytes - at) {
      status = WN_FAIL_HINT(WN_E_INPUT, "the file may be an incomplete download",
                            "%s: tensor %s ends at byte %" PRIu64 " of the data, of which there are %" PRIu64,
                            file->path, entry->name, at + entry->bytes, data_bytes);
      goto done;
    }
    entry->data = file->map + data_begin + at;
    entry->file = file;
    at += entry->bytes;
    file->entries[i] = *entry;
    file->by_name[i] = &file->entries[i];
  }
  if (at != data_bytes) {
    status =
        WN_FAIL(WN_E_INPUT, "%s: %" PRIu64 " bytes after the last tensor belong to none", file->path, data_bytes - at);
    goto done;
  }
  WN_TRY_GOTO(status, done, keep_names(file, header));
  qsort(file->by_name, n, sizeof(wn_st_entry *), by_name);
done:
  free(found);
  return status;
}

static wn_status map_file(wn_safetensors *file) {
  struct stat info;
  file->fd = open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe is refused below, and not waited for */
  if (file->fd < 0) return WN_FAIL(WN_E_IO, "cannot open %s: %s", file->path, strerror(errno));
  if (fstat(file->fd, &info) != 0) return WN_FAIL(WN_E_IO, "cannot read %s: %s", file->path, strerror(errno));
  if (!S_ISREG(info.st_mode)) return WN_FAIL(WN_E_INPUT, "%s is not a regular file", file->path);
  if (info.st_size < LENGTH_BYTES)
    return WN_FAIL(WN_E_INPUT, "%s: %lld bytes are too few for a safetensors file", file->path,
                   (long long)info.st_size);
  void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, file->fd, 0);
  if (map == MAP_FAILED) return WN_FAIL(WN_E_IO, "cannot map %s: %s", file->path, strerror(errno));
  file->map = map;
  file->map_bytes = (uint64_t)info.st_size;
  return NULL;
}

static wn_status read_header(wn_safetensors *file) {
  uint64_t header_bytes = 0;
  for (int i = LENGTH_BYTES - 1; i >= 0; i--) header_bytes = header_bytes << 8 | file->map[i];
  if (header_bytes > MOST_HEADER_BYTES)
    return WN_FAIL(WN_E_INPUT, "%s: header length %" PRIu64 " is above %d; is this a safetensors file?", file->path,
                   header_bytes, MOST_HEADER_BYTES);
  if (header_bytes > file->map_bytes - LENGTH_BYTES)
    return WN_FAIL_HINT(WN_E_INPUT, "the file may be an incomplete download",
                        "%s: header length %" PRIu64 " goes beyond the file's %" PRIu64 " bytes", file->path,
                        header_bytes, file->map_bytes);
  const char *text = (const char *)file->map + LENGTH_BYTES;
  if (header_bytes == 0 || text[0] != '{')
    return WN_FAIL(WN_E_INPUT, "%s: the header does not begin with '{'", file->path);
  if (!wn_json_modest(text, header_bytes))
    return WN_FAIL(WN_E_INPUT, "%s: the header's %" PRIu64 " bytes hold more than %d values", file->path, header_bytes,
                   WN_JSON_MOST_VALUES);
  json_error_t error;
  json_t *header = json_loadb(text, header_bytes, JSON_REJECT_DUPLICATES, &error);
  if (!header)
    return WN_FAIL(WN_E_INPUT, "%s: bad JSON at byte %d of the header: %s", file->path, error.position, error.text);
  wn_status status = read_entries(file, header, LENGTH_BYTES + header_bytes);
  json_decref(header);
  /* advice, not needed for truth: the headers of a large model are megabytes that nobody looks at again */
  (void)madvise((void *)(uintptr_t)file->map, file->map_bytes, MADV_DONTNEED);
  return status;
}

wn_status wn_safetensors_open(wn_safetensors **out, const char *path) {
  wn_status status = NULL;
  *out = NULL;
  wn_safetensors *file = calloc(1, sizeof *file);
  if (file) *file = (wn_safetensors){.path = strdup(path), .fd = -1};
  if (!file || !file->path) {
    status = WN_FAIL(WN_E_MEMORY, "out of memory opening %s", path);
    goto fail;
  }
  WN_TRY_GOTO(status, fail, map_file(file));
  WN_TRY_GOTO(status, fail, read_header(file));
  *out = file;
  return NULL;
fail:
  wn_safetensors_close(file);
  return status;
}

void wn_safetensors_close(wn_safetensors *file) {
  if (!file) return;
  if (file->map) munmap((void *)(uintptr_t)file->map, file->map_bytes);
  if (file->fd >= 0) close(file->fd);
  json_decref(file->metadata);
  free(file->names);
  free(file->entries);
  free(file->by_name);
  free(file->path);
  free(file);
}

const char *wn_safetensors_path(const wn_safetensors *file) {
  return file->path;
}
int64_t wn_safetensors_count(const wn_safetensors *file) {
  return file->n;
}

const wn_st_entry *wn_safetensors_at(const wn_safetensors *file, int64_t i) {
  WN_ASSERT(i >= 0 && i < file->n, "%s has %lld tensors, asked for %lld", file->path, (long long)file->n, (long long)i);
  return &file->entries[i];
}

static int name_against(const void *name, const void *entry) {
  return strcmp(name, (*(wn_st_entry *const *)entry)->name);
}

const wn_st_entry *wn_safetensors_find(const wn_safetensors *file, const char *name) {
  wn_st_entry **found = bsearch(name, file->by_name, (size_t)file->n, sizeof *found, name_against);
  return found ? *found : NULL;
}

bool wn_st_shaped(const wn_st_entry *entry, int32_t rank, const int64_t *dim) {
  return entry->rank == rank && memcmp(entry->dim, dim, (size_t)rank * sizeof *dim) == 0;
}

wn_status wn_st_read(void *out, const wn_st_entry *entry, uint64_t first, uint64_t count) {
  const wn_safetensors *file = entry->file;
  uint64_t begin = (uint64_t)((const unsigned char *)entry->data - file->map) + first;
  WN_ASSERT(first <= entry->bytes && count <= entry->bytes - first, "%s: bytes %" PRIu64 " + %" PRIu64 " of %" PRIu64,
            entry->name, first, count, entry->bytes);
  for (uint64_t done = 0; done < count;) {
    ssize_t n = pread(file->fd, (char *)out + done, count - done, (off_t)(begin + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return WN_FAIL(WN_E_IO, "%s: cannot read tensor %s: %s", file->path, entry->name, strerror(errno));
    if (n == 0)
      return WN_FAIL(WN_E_IO, "%s: became shorter while it was read; tensor %s is cut off", file->path, entry->name);
    done += (uint64_t)n;
  }
  return NULL;
}

const char *wn_safetensors_metadata(const wn_safetensors *file, const char *key) {
  return json_string_value(json_object_get(file->metadata, key));
}
