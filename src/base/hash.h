/* File and memory digests. Content is hashed in fixed chunks and the chunk digests are folded in order, so
 * that several ranks can hash one file and agree with one rank hashing it alone. */
#ifndef WN_BASE_HASH_H
#define WN_BASE_HASH_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum { WN_HASH_CHUNK_BYTES = 4 << 20, WN_HASH_TEXT_BYTES = 33 };

typedef struct wn_hash {
  uint64_t low, high;
} wn_hash;

wn_hash wn_hash_bytes(const void *data, size_t bytes);        /* XXH3 of 128 bits */
wn_hash wn_hash_fold(const wn_hash *chunks, size_t n_chunks); /* XXH3 of the chunk digests; n = 0 is fine */
int wn_hash_equal(wn_hash a, wn_hash b);
void wn_hash_text(wn_hash hash, char text[WN_HASH_TEXT_BYTES]); /* 32 hex digits */
int wn_hash_parse(wn_hash *out, const char *text);              /* 0 when it is 32 hex digits */
/* Chunked and folded digest of a whole file, and its length, by all threads with a chunk each. WN_E_IO when it is no
 * regular file or cannot be read. */
WN_MUST_USE wn_status wn_hash_file(wn_hash *out, uint64_t *bytes, const char *path);

#endif
