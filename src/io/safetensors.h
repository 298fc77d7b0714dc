/* One safetensors file: 8-byte little-endian header length, JSON header, data. As strict as the reference
 * implementation: every lie in the header is refused by name. The file stays mapped while it is open. */
#ifndef WN_IO_SAFETENSORS_H
#define WN_IO_SAFETENSORS_H

#include "base/hash.h"
#include "base/tensor.h"

typedef struct wn_safetensors wn_safetensors;

typedef struct wn_st_entry {
  const char *name; /* owned by the file */
  wn_dtype dtype;
  int32_t rank;
  int64_t dim[WN_MAX_RANK]; /* a scalar has rank 0 */
  const void *data;         /* mapped, little-endian, dense; may be unaligned (wn_hf_read copes) */
  uint64_t bytes;
  const wn_safetensors *file;
} wn_st_entry;

/* WN_E_IO, or WN_E_INPUT naming file and what lies: header length beyond the file or above 100 MB, bad JSON, unknown
 * dtype, rank above WN_MAX_RANK, offsets reversed, overlapping, with holes or past the end, size not matching the
 * shape, duplicate names, trailing bytes. Source: huggingface/safetensors, safetensors/src/tensor.rs. */
WN_MUST_USE wn_status wn_safetensors_open(wn_safetensors **out, const char *path);
void wn_safetensors_close(wn_safetensors *file);
const char *wn_safetensors_path(const wn_safetensors *file);
int64_t wn_safetensors_count(const wn_safetensors *file);
const wn_st_entry *wn_safetensors_at(const wn_safetensors *file, int64_t i);          /* in file order */
const wn_st_entry *wn_safetensors_find(const wn_safetensors *file, const char *name); /* NULL: absent */
bool wn_st_shaped(const wn_st_entry *entry, int32_t rank, const int64_t *dim);
/* Copies bytes first .. first + count - 1 of the tensor, by read calls: several times as fast as having the kernel map
 * the pages in, and nothing stays mapped. WN_E_IO, also where the file has become shorter since it was opened. */
WN_MUST_USE wn_status wn_st_read(void *out, const wn_st_entry *entry, uint64_t first, uint64_t count);
const char *wn_safetensors_metadata(const wn_safetensors *file, const char *key); /* NULL: absent */

/* Layout of a file to be written, from shapes alone: every rank computes the same one, so pieces can be written in
 * place by whoever owns them. Offsets are absolute. Tensors stand in the order given (widest dtype first keeps them
 * aligned), the header is padded to 8, and its metadata is {"format": "pt"}, which transformers wants to see. */
typedef struct wn_st_layout wn_st_layout;
typedef struct wn_st_spec {
  const char *name;
  wn_dtype dtype;
  int32_t rank;
  int64_t dim[WN_MAX_RANK];
} wn_st_spec;
/* WN_E_INPUT when a name stands twice. `specs` are not kept. */
WN_MUST_USE wn_status wn_st_layout_create(wn_st_layout **out, const wn_st_spec *specs, int64_t n);
void wn_st_layout_free(wn_st_layout *layout);
uint64_t wn_st_layout_file_bytes(const wn_st_layout *layout);
uint64_t wn_st_layout_offset(const wn_st_layout *layout, int64_t i);          /* of tensor i's first byte in the file */
const void *wn_st_layout_header(const wn_st_layout *layout, uint64_t *bytes); /* length word + JSON + padding */

/* Writes a whole file at once, atomically (for dumps and small files): tensors dense in host memory. */
WN_MUST_USE wn_status wn_safetensors_write(const char *path, const wn_st_spec *specs, const void *const *data,
                                           int64_t n);

#endif
