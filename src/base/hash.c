#include "base/hash.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

wn_hash wn_hash_bytes(const void *data, size_t bytes) {
  XXH128_hash_t h = XXH3_128bits(data, bytes);
  return (wn_hash){h.low64, h.high64};
}

wn_hash wn_hash_fold(const wn_hash *chunks, size_t n_chunks) {
  return wn_hash_bytes(n_chunks ? (const void *)chunks : "", n_chunks * sizeof *chunks);
}

int wn_hash_equal(wn_hash a, wn_hash b) {
  return a.low == b.low && a.high == b.high;
}

void wn_hash_text(wn_hash hash, char text[WN_HASH_TEXT_BYTES]) {
  snprintf(text, WN_HASH_TEXT_BYTES, "%016" PRIx64 "%016" PRIx64, hash.high, hash.low);
}

static int parse_half(uint64_t *out, const char *text) {
  uint64_t value = 0;
  for (int i = 0; i < 16; i++) {
    const char *digits = "0123456789abcdef", *at = text[i] ? strchr(digits, text[i]) : NULL;
    if (!at) return -1;
    value = value << 4 | (uint64_t)(at - digits);
  }
  *out = value;
  return 0;
}

int wn_hash_parse(wn_hash *out, const char *text) {
  if (strlen(text) != 32) return -1;
  return parse_half(&out->high, text) || parse_half(&out->low, text + 16) ? -1 : 0;
}

wn_status wn_hash_file(wn_hash *out, uint64_t *bytes, const char *path) {
  wn_status status = NULL;
  wn_hash *digests = NULL;
  size_t n = 0, room = 0, got;
  char *chunk = malloc(WN_HASH_CHUNK_BYTES);
  FILE *file = fopen(path, "rb");
  *bytes = 0;
  if (!file) {
    status = WN_FAIL(WN_E_IO, "cannot open %s: %s", path, strerror(errno));
    goto done;
  }
  if (!chunk) {
    status = WN_FAIL(WN_E_MEMORY, "out of memory hashing %s", path);
    goto done;
  }
  while ((got = fread(chunk, 1, WN_HASH_CHUNK_BYTES, file)) > 0) {
    if (n == room) {
      room = room ? 2 * room : 16;
      wn_hash *more = realloc(digests, room * sizeof *more);
      if (!more) {
        status = WN_FAIL(WN_E_MEMORY, "out of memory hashing %s", path);
        goto done;
      }
      digests = more;
    }
    digests[n++] = wn_hash_bytes(chunk, got);
    *bytes += got;
  }
  if (ferror(file))
    status = WN_FAIL(WN_E_IO, "cannot read %s: %s", path, strerror(errno));
  else
    *out = wn_hash_fold(digests, n);
done:
  if (file) fclose(file);
  free(chunk);
  free(digests);
  return status;
}
