#include "base/hash.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
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

/* Reads bytes first .. first + bytes - 1; 0, or errno, or -1 where the file ends before. */
static int read_chunk(int fd, char *out, size_t bytes, uint64_t first) {
  for (size_t done = 0; done < bytes;) {
    ssize_t n = pread(fd, out + done, bytes - done, (off_t)(first + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return n < 0 ? errno : -1;
    done += (size_t)n;
  }
  return 0;
}

/* The digests of all chunks, by all threads. */
static wn_status hash_chunks(wn_hash *digests, int64_t n, uint64_t bytes, int fd, const char *path) {
  int failed = 0, no_memory = 0;
#pragma omp parallel if (n > 1)
  {
    char *chunk = malloc(WN_HASH_CHUNK_BYTES);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < n; i++) {
      uint64_t first = (uint64_t)i * WN_HASH_CHUNK_BYTES, left = bytes - first;
      size_t length = left < WN_HASH_CHUNK_BYTES ? (size_t)left : WN_HASH_CHUNK_BYTES;
      int error = chunk ? read_chunk(fd, chunk, length, first) : 0;
      if (chunk && !error) digests[i] = wn_hash_bytes(chunk, length);
#pragma omp critical(wn_hash)
      {
        if (!chunk) no_memory = 1;
        if (error) failed = error;
      }
    }
    free(chunk);
  }
  if (no_memory) return WN_FAIL(WN_E_MEMORY, "out of memory hashing %s", path);
  if (failed)
    return WN_FAIL(WN_E_IO, "cannot read %s: %s", path, failed > 0 ? strerror(failed) : "it became shorter meanwhile");
  return NULL;
}

wn_status wn_hash_file(wn_hash *out, uint64_t *bytes, const char *path) {
  struct stat info;
  wn_status status = NULL;
  wn_hash *digests = NULL;
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe is refused below, and not waited for */
  *bytes = 0;
  if (fd < 0) return WN_FAIL(WN_E_IO, "cannot open %s: %s", path, strerror(errno));
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    status = WN_FAIL(WN_E_IO, "cannot read %s: it is not a regular file", path);
    goto done;
  }
  int64_t n = ((int64_t)info.st_size + WN_HASH_CHUNK_BYTES - 1) / WN_HASH_CHUNK_BYTES;
  digests = malloc((size_t)(n + 1) * sizeof *digests);
  status = digests ? hash_chunks(digests, n, (uint64_t)info.st_size, fd, path)
                   : WN_FAIL(WN_E_MEMORY, "out of memory hashing %s", path);
  if (status) goto done;
  *bytes = (uint64_t)info.st_size;
  *out = wn_hash_fold(digests, (size_t)n);
done:
  close(fd);
  free(digests);
  return status;
}
