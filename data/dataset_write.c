/* The lengths stand at a fixed place in the .idx, so they are written there as documents end; the offsets that follow
 * them are made from the lengths, read back in pieces, when the writer closes. Nothing grows with the corpus. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "data/dataset.h"
#include "data/dataset_format.h"
#include "io/files.h"

enum { PIECE = 1 << 14 };

typedef struct spool {
  FILE *file;
  char path[WN_PATH_BYTES], final_path[WN_PATH_BYTES];
} spool;

struct wn_dataset_writer {
  char prefix[WN_PATH_BYTES];
  spool bin, idx, scored; /* scored.file NULL: no marks */
  int32_t vocab_size;
  wn_token_code code;
  int64_t token_bytes, tokens, documents, document_tokens;
};

static wn_status spool_open(spool *s, const char *prefix, const char *suffix) {
  WN_TRY(wn_path(s->final_path, "%s.%s", prefix, suffix));
  WN_TRY(wn_path(s->path, "%s.%s.partial", prefix, suffix));
  s->file = fopen(s->path, "w+b");
  if (!s->file) return WN_FAIL(WN_E_IO, "cannot create %s: %s", s->path, strerror(errno));
  return NULL;
}

static wn_status put(spool *s, const void *data, size_t bytes) {
  if (fwrite(data, 1, bytes, s->file) != bytes)
    return WN_FAIL(WN_E_IO, "cannot write %s: %s", s->path, strerror(errno));
  return NULL;
}

static wn_status put_u64(spool *s, uint64_t value) {
  return put(s, &value, sizeof value);
}

static wn_status seek(spool *s, int64_t at) {
  if (fseeko(s->file, at, SEEK_SET) != 0) return WN_FAIL(WN_E_IO, "cannot seek in %s: %s", s->path, strerror(errno));
  return NULL;
}

static wn_status spool_finish(spool *s) {
  int failed = fflush(s->file) != 0 ? errno : 0;
  if (fclose(s->file) != 0 && !failed) failed = errno;
  s->file = NULL;
  if (failed) return WN_FAIL(WN_E_IO, "cannot write %s: %s", s->path, strerror(failed));
  return wn_sync_file(s->path);
}

static void spool_discard(spool *s) {
  if (s->file) fclose(s->file);
  s->file = NULL;
  if (s->path[0]) unlink(s->path);
}

wn_status wn_dataset_writer_create(wn_dataset_writer **out, const char *prefix, int32_t vocab_size, bool with_scored) {
  WN_ASSERT(vocab_size >= 1, "vocab_size is %d", vocab_size);
  wn_status status = NULL;
  wn_dataset_writer *w = calloc(1, sizeof *w);
  if (!w) return WN_FAIL(WN_E_MEMORY, "out of memory writing dataset %s", prefix);
  w->vocab_size = vocab_size;
  w->code = vocab_size <= 65536 ? WN_TOKEN_U16 : WN_TOKEN_I32;
  w->token_bytes = vocab_size <= 65536 ? 2 : 4;
  static const uint8_t room[WN_IDX_HEADER_BYTES] = {0}; /* headers hold counts: written when they are known */
  WN_TRY_GOTO(status, failed, wn_path(w->prefix, "%s", prefix));
  WN_TRY_GOTO(status, failed, spool_open(&w->bin, prefix, "bin"));
  WN_TRY_GOTO(status, failed, spool_open(&w->idx, prefix, "idx"));
  WN_TRY_GOTO(status, failed, put(&w->idx, room, WN_IDX_HEADER_BYTES));
  if (with_scored) {
    WN_TRY_GOTO(status, failed, spool_open(&w->scored, prefix, "scored"));
    WN_TRY_GOTO(status, failed, put(&w->scored, room, WN_SCORED_HEADER_BYTES));
  }
  *out = w;
  return NULL;
failed:
  return wn_status_first(status, wn_dataset_writer_close(w, false));
}

static wn_status put_tokens(wn_dataset_writer *w, const int32_t *tokens, int64_t n) {
  uint16_t narrow[PIECE];
  for (int64_t from = 0; from < n; from += PIECE) {
    int64_t count = n - from < PIECE ? n - from : PIECE;
    for (int64_t i = 0; i < count; i++) {
      int32_t id = tokens[from + i];
      if (id < 0 || id >= w->vocab_size)
        return WN_FAIL(WN_E_INPUT, "%s: token %" PRId64 " of document %" PRId64 " has id %d, the vocabulary has %d",
                       w->bin.final_path, w->document_tokens + from + i, w->documents, id, w->vocab_size);
      narrow[i] = (uint16_t)id;
    }
    const void *data = w->code == WN_TOKEN_U16 ? (const void *)narrow : (const void *)(tokens + from);
    WN_TRY(put(&w->bin, data, (size_t)(count * w->token_bytes)));
  }
  return NULL;
}

wn_status wn_dataset_writer_append(wn_dataset_writer *w, const int32_t *tokens, const uint8_t *scored, int64_t n) {
  WN_ASSERT(!scored || w->scored.file, "marks given to a writer without marks");
  if (n > INT32_MAX - w->document_tokens)
    return WN_FAIL_HINT(WN_E_INPUT, "split it with --separator",
                        "%s: document %" PRId64 " has more than 2147483647 tokens, the most that the format can hold",
                        w->bin.final_path, w->documents);
  WN_TRY(put_tokens(w, tokens, n));
  static const uint8_t unmarked[PIECE] = {0};
  for (int64_t from = 0; w->scored.file && from < n; from += PIECE) {
    size_t count = (size_t)(n - from < PIECE ? n - from : PIECE);
    WN_TRY(put(&w->scored, scored ? scored + from : unmarked, count));
  }
  w->document_tokens += n;
  w->tokens += n;
  return NULL;
}

wn_status wn_dataset_writer_end_document(wn_dataset_writer *w) {
  int32_t length = (int32_t)w->document_tokens;
  WN_TRY(put(&w->idx, &length, sizeof length));
  w->document_tokens = 0;
  w->documents++;
  return NULL;
}

wn_status wn_dataset_writer_add(wn_dataset_writer *w, const int32_t *tokens, const uint8_t *scored, int64_t n) {
  WN_TRY(wn_dataset_writer_append(w, tokens, scored, n));
  return wn_dataset_writer_end_document(w);
}

/* After the lengths: offsets, document index (one sequence each); then the header at the front. */
static wn_status finish_index(wn_dataset_writer *w) {
  int32_t lengths[PIECE];
  uint64_t offset = 0;
  for (int64_t from = 0; from < w->documents; from += PIECE) {
    size_t count = (size_t)(w->documents - from < PIECE ? w->documents - from : PIECE);
    WN_TRY(seek(&w->idx, WN_IDX_HEADER_BYTES + 4 * from));
    if (fread(lengths, sizeof *lengths, count, w->idx.file) != count)
      return WN_FAIL(WN_E_IO, "cannot read back %s: %s", w->idx.path, strerror(errno));
    WN_TRY(seek(&w->idx, WN_IDX_HEADER_BYTES + 4 * w->documents + 8 * from));
    for (size_t i = 0; i < count; i++) {
      WN_TRY(put_u64(&w->idx, offset));
      offset += (uint64_t)lengths[i] * (uint64_t)w->token_bytes;
    }
  }
  WN_TRY(seek(&w->idx, WN_IDX_HEADER_BYTES + 12 * w->documents));
  for (int64_t i = 0; i <= w->documents; i++) WN_TRY(put_u64(&w->idx, (uint64_t)i));
  WN_TRY(seek(&w->idx, 0));
  WN_TRY(put(&w->idx, WN_IDX_MAGIC, WN_IDX_MAGIC_BYTES));
  WN_TRY(put_u64(&w->idx, 1));
  uint8_t code = (uint8_t)w->code;
  WN_TRY(put(&w->idx, &code, 1));
  WN_TRY(put_u64(&w->idx, (uint64_t)w->documents));
  return put_u64(&w->idx, (uint64_t)w->documents + 1);
}

static wn_status commit_files(wn_dataset_writer *w) {
  if (w->tokens == 0) return WN_FAIL(WN_E_INPUT, "%s would hold no tokens", w->bin.final_path);
  WN_TRY(finish_index(w));
  bool scored = w->scored.file;
  if (scored) {
    WN_TRY(seek(&w->scored, 0));
    WN_TRY(put(&w->scored, WN_SCORED_MAGIC, WN_SCORED_MAGIC_BYTES));
    WN_TRY(put_u64(&w->scored, (uint64_t)w->tokens));
    WN_TRY(spool_finish(&w->scored));
  }
  WN_TRY(spool_finish(&w->bin));
  WN_TRY(spool_finish(&w->idx));
  /* without its index a dataset is absent: the old index goes first, the new one comes last */
  char old_marks[WN_PATH_BYTES];
  WN_TRY(wn_path(old_marks, "%s.scored", w->prefix));
  if (unlink(w->idx.final_path) != 0 && errno != ENOENT)
    return WN_FAIL(WN_E_IO, "cannot replace %s: %s", w->idx.final_path, strerror(errno));
  if (unlink(old_marks) != 0 && errno != ENOENT)
    return WN_FAIL(WN_E_IO, "cannot replace %s: %s", old_marks, strerror(errno));
  WN_TRY(wn_rename_sync(w->bin.path, w->bin.final_path));
  if (scored) WN_TRY(wn_rename_sync(w->scored.path, w->scored.final_path));
  return wn_rename_sync(w->idx.path, w->idx.final_path);
}

wn_status wn_dataset_writer_close(wn_dataset_writer *w, bool commit) {
  WN_ASSERT(!commit || w->document_tokens == 0, "the last document was not ended");
  wn_status status = commit ? commit_files(w) : NULL;
  spool_discard(&w->bin); /* after a commit the temporary names are gone and this does nothing */
  spool_discard(&w->idx);
  spool_discard(&w->scored);
  free(w);
  return status;
}
