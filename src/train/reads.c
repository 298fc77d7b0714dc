/* The work is cut into slices of at most 256 Ki elements. On a CPU, whose pieces are this process's memory, threads
 * take slices as they come free: a model of 90 thousand small tensors and one of a few large ones are the same to them,
 * and nobody waits for anybody before the end. On a GPU the slices of a chunk are converted side by side into a buffer,
 * which one thread hands to the device. */
#include "train/reads.h"

#include <stdlib.h>
#include <string.h>

#include "base/meter.h"
#include "kernels/kernels.h"

enum { SLICE_ELEMENTS = 1 << 18, STAGED_SLICE_ELEMENTS = 1 << 15, STAGED_BYTES = 1 << 20 };

/* Elements first .. first + count - 1 of the rank's part; the first slice of an FP8 parameter brings its scales. */
typedef struct slice {
  int64_t read, first, count;
} slice;

typedef struct work {
  wn_device *device;
  wn_store *store;
  const wn_param *params;
  const wn_part *parts;
  const wn_read *reads;
  wn_meter meter;
  wn_status status; /* the error of the slice nearest the beginning */
  int64_t failed;   /* that slice; INT64_MAX: none */
} work;

wn_status wn_reads_add(wn_reads *reads, wn_read read) {
  if (reads->n == reads->room) {
    int64_t room = reads->room ? 2 * reads->room : 64;
    wn_read *more = realloc(reads->read, (size_t)room * sizeof *more);
    if (!more) return WN_FAIL(WN_E_MEMORY, "out of memory for a list of %lld tensors", (long long)room);
    reads->read = more;
    reads->room = room;
  }
  reads->read[reads->n++] = read;
  return NULL;
}

void wn_reads_free(wn_reads *reads) {
  free(reads->read);
  *reads = (wn_reads){0};
}

/* ---- one slice ---- */

static wn_status read_scales(const work *w, const wn_read *read) {
  wn_tensor scales = wn_store_scales(w->store, read->param);
  int64_t n = wn_tensor_count(&scales);
  float *host = malloc((size_t)n * sizeof *host);
  if (!host) return WN_FAIL(WN_E_MEMORY, "out of memory for the scales of %s", read->from.entry->name);
  wn_status status = wn_hf_read_scales(host, &read->from, 0, n);
  if (!status) status = w->device->ops->upload(w->device, &scales, host);
  free(host);
  return status;
}

static bool brings_scales(const work *w, const slice *s) {
  const wn_read *read = &w->reads[s->read];
  return w->params[read->param].fp8 && read->field == WN_FIELD_WEIGHT && s->first == 0;
}

static wn_tensor place_of(const work *w, const slice *s) {
  const wn_read *read = &w->reads[s->read];
  const wn_part *part = &w->parts[read->param];
  return wn_tensor_slice(*wn_field_of(part->piece, read->field), 0, part->offset + s->first, s->count);
}

static wn_status read_slice(const work *w, const slice *s) {
  const wn_read *read = &w->reads[s->read];
  if (brings_scales(w, s)) WN_TRY(read_scales(w, read));
  if (s->count == 0) return NULL;
  wn_tensor place = place_of(w, s);
  return wn_hf_read(place.data, place.dtype, &read->from, w->parts[read->param].first + s->first, s->count);
}

static int64_t slice_bytes(const work *w, const slice *s) {
  const wn_hf_weight *from = &w->reads[s->read].from;
  return s->count * wn_dtype_bytes(from->entry->dtype) + (brings_scales(w, s) ? (int64_t)from->scale->bytes : 0);
}

/* ---- all of them ---- */

static void keep_error(work *w, int64_t i, wn_status status) {
  bool first = i < w->failed;
  wn_status_free(first ? w->status : status);
  if (!first) return;
  w->status = status;
#pragma omp atomic write
  w->failed = i;
}

/* Behind an error nothing more is read: threads take slices in order, so whatever comes before it is being read. */
static void run_here(work *w, const slice *slices, int64_t n) {
  w->failed = INT64_MAX;
#pragma omp parallel for num_threads(w->device->threads) schedule(dynamic)
  for (int64_t i = 0; i < n; i++) {
    int64_t failed;
#pragma omp atomic read
    failed = w->failed;
    if (i > failed) continue;
    wn_status status = read_slice(w, &slices[i]);
#pragma omp critical(wn_reads)
    {
      if (status) keep_error(w, i, status);
      wn_meter_add(&w->meter, slice_bytes(w, &slices[i]));
    }
  }
}

/* A slice into `buffer`, in the dtype of its place, by all threads; then it goes up. */
static wn_status stage(const work *w, const slice *s, char *buffer) {
  const wn_read *read = &w->reads[s->read];
  if (brings_scales(w, s)) WN_TRY(read_scales(w, read));
  if (s->count == 0) return NULL;
  wn_tensor place = place_of(w, s);
  int64_t first = w->parts[read->param].first + s->first, width = wn_dtype_bytes(place.dtype);
  wn_status status = NULL;
#pragma omp parallel for num_threads(w->device->threads) schedule(static)
  for (int64_t at = 0; at < s->count; at += STAGED_SLICE_ELEMENTS) {
    int64_t left = s->count - at, n = left < STAGED_SLICE_ELEMENTS ? left : STAGED_SLICE_ELEMENTS;
    wn_status mine = wn_hf_read(buffer + at * width, place.dtype, &read->from, first + at, n);
#pragma omp critical(wn_reads)
    status = wn_status_first(status, mine);
  }
  return status ? status : w->device->ops->upload(w->device, &place, buffer);
}

static wn_status run_staged(work *w, const slice *slices, int64_t n) {
  char *buffer = malloc(STAGED_BYTES);
  wn_status status = buffer ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for a buffer");
  for (int64_t i = 0; !status && i < n; i++) {
    status = stage(w, &slices[i], buffer);
    wn_meter_add(&w->meter, slice_bytes(w, &slices[i]));
  }
  free(buffer);
  return status;
}

/* ---- the list ---- */

static int in_file_order(const void *a, const void *b) {
  const wn_st_entry *x = ((const wn_read *)a)->from.entry, *y = ((const wn_read *)b)->from.entry;
  int order = x->file == y->file ? 0 : strcmp(wn_safetensors_path(x->file), wn_safetensors_path(y->file));
  return order ? order : ((uintptr_t)x->data > (uintptr_t)y->data) - ((uintptr_t)x->data < (uintptr_t)y->data);
}

static int64_t slices_of(const wn_part *part) {
  int64_t n = part->piece ? (part->count + SLICE_ELEMENTS - 1) / SLICE_ELEMENTS : 0;
  return n > 0 ? n : 1; /* scales may be wanted where no element is */
}

static wn_status cut(slice **out, int64_t *n, const work *w, int64_t n_reads) {
  *n = 0;
  for (int64_t i = 0; i < n_reads; i++) *n += slices_of(&w->parts[w->reads[i].param]);
  slice *slices = malloc((size_t)(*n + 1) * sizeof *slices);
  if (!slices) return WN_FAIL(WN_E_MEMORY, "out of memory for %lld places in files", (long long)*n);
  *out = slices;
  for (int64_t i = 0; i < n_reads; i++) {
    const wn_part *part = &w->parts[w->reads[i].param];
    int64_t count = part->piece ? part->count : 0;
    for (int64_t s = 0; s < slices_of(part); s++) {
      int64_t left = count - s * SLICE_ELEMENTS;
      *slices++ = (slice){i, s * SLICE_ELEMENTS, left < SLICE_ELEMENTS ? left : SLICE_ELEMENTS};
    }
  }
  return NULL;
}

static wn_status check_fp8(const work *w, int64_t n_reads) {
  for (int64_t i = 0; i < n_reads; i++) {
    const wn_st_entry *entry = w->reads[i].from.entry;
    if (w->params[w->reads[i].param].fp8 && !w->reads[i].from.scale)
      return WN_FAIL(WN_E_INPUT, "%s: tensor %s is %s, and was FP8 when this run started",
                     wn_safetensors_path(entry->file), entry->name, wn_dtype_name(entry->dtype));
  }
  return NULL;
}

wn_status wn_reads_run(wn_reads *reads, wn_device *device, wn_store *store, const wn_part *parts, wn_log *log,
                       const char *what) {
  int32_t n_params;
  int64_t n, bytes = 0;
  slice *slices = NULL;
  if (reads->n) qsort(reads->read, (size_t)reads->n, sizeof *reads->read, in_file_order);
  work w = {.device = device, .store = store, .parts = parts, .reads = reads->read};
  w.params = wn_store_params(store, &n_params);
  WN_TRY(check_fp8(&w, reads->n));
  WN_TRY(cut(&slices, &n, &w, reads->n));
  for (int64_t i = 0; i < n; i++) bytes += slice_bytes(&w, &slices[i]);
  wn_meter_start(&w.meter, log, what, bytes);
  if (device->kind == WN_CPU)
    run_here(&w, slices, n);
  else
    w.status = run_staged(&w, slices, n);
  if (!w.status) wn_meter_end(&w.meter);
  free(slices);
  return w.status;
}
