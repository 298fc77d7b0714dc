/* One safetensors file, and as the only one of a model directory: the input is the file. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "fuzz.h"
#include "io/hf_dir.h"

#define PATH FUZZ_ROOT "/model.safetensors"

enum { LENGTH_BYTES = 8 };

/* What an importer does with a tensor: every element, in two pieces, into memory of exactly its size. */
static void read_elements(const wn_hf_weight *weight) {
  const wn_st_entry *entry = weight->entry;
  int64_t n = (int64_t)entry->bytes / wn_dtype_bytes(entry->dtype), first = n / 3;
  float *out = malloc((size_t)n * sizeof *out + 1);
  WN_ASSERT(out, "no memory for %lld elements", (long long)n);
  wn_status status = wn_hf_read(out, WN_F32, weight, 0, first);
  if (!status) status = wn_hf_read(out + first, WN_F32, weight, first, n - first);
  for (int64_t i = 0; !status && i < n; i++) FUZZ_CHECK(isfinite(out[i]));
  if (status) fuzz_refused(status, WN_E_INPUT);
  free(out);
}

static void import(void) {
  wn_hf_dir *dir;
  wn_hf_weight weight;
  wn_status status = wn_hf_dir_open(&dir, FUZZ_ROOT);
  WN_ASSERT(!status, "a file is accepted, its directory is not: %s", wn_status_text(status));
  for (int64_t i = 0; i < wn_hf_dir_count(dir); i++) {
    status = wn_hf_weight_find(&weight, dir, wn_hf_dir_at(dir, i, NULL)->name);
    if (status)
      fuzz_refused(status, WN_E_INPUT);
    else
      read_elements(&weight);
  }
  wn_hf_dir_close(dir);
}

static void use(const wn_safetensors *file) {
  for (int64_t i = 0; i < wn_safetensors_count(file); i++) {
    const wn_st_entry *entry = wn_safetensors_at(file, i);
    int64_t elements = 1;
    for (int32_t axis = 0; axis < entry->rank; axis++) elements *= entry->dim[axis];
    FUZZ_CHECK((uint64_t)(elements * wn_dtype_bytes(entry->dtype)) == entry->bytes);
    FUZZ_CHECK(wn_safetensors_find(file, entry->name) == entry);
    fuzz_touch(entry->data, entry->bytes);
  }
  const char *format = wn_safetensors_metadata(file, "format");
  if (format) fuzz_touch(format, strlen(format));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  wn_safetensors *file;
  fuzz_file(PATH, data, size);
  wn_status status = wn_safetensors_open(&file, PATH);
  if (status) return fuzz_refused(status, WN_E_INPUT), 0;
  use(file);
  wn_safetensors_close(file);
  import();
  return 0;
}

/* The largest end of a tensor that the header claims. */
static size_t claimed_bytes(const uint8_t *header, size_t bytes) {
  static const char key[] = "\"data_offsets\":[";
  size_t most = 0, width = sizeof key - 1;
  for (size_t i = 0; i + width < bytes; i++) {
    if (memcmp(header + i, key, width) != 0) continue;
    size_t number = 0;
    for (i += width; i < bytes && header[i] != ']'; i++) {
      if (header[i] >= '0' && header[i] <= '9' && number < 1 << 20)
        number = 10 * number + (header[i] - (size_t)'0');
      else
        number = 0;
      if (number > most) most = number;
    }
  }
  return most;
}

/* Mostly the length word is kept true and the data as long as the header claims, else most inputs would end there. */
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
  if (size < LENGTH_BYTES + 2 || most < 64 || fuzz_random(&seed) % 8 == 0) return LLVMFuzzerMutate(data, size, most);
  uint64_t header = 0;
  memcpy(&header, data, LENGTH_BYTES);
  if (header > size - LENGTH_BYTES) header = size - LENGTH_BYTES;
  size_t part[] = {LENGTH_BYTES, (size_t)header, size - LENGTH_BYTES - (size_t)header};
  size = fuzz_mutate_part(data, most, part, 3, fuzz_random(&seed) % 8 ? 1 : 2);
  header = part[1];
  memcpy(data, &header, LENGTH_BYTES);
  size_t wanted = claimed_bytes(data + LENGTH_BYTES, part[1]);
  if (fuzz_random(&seed) % 4 == 0 || LENGTH_BYTES + part[1] + wanted > most) return size;
  if (wanted > part[2]) memset(data + size, 0x3c, wanted - part[2]);
  return LENGTH_BYTES + part[1] + wanted;
}
