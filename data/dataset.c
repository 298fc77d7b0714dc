#include "data/dataset.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/dataset_format.h"
#include "io/files.h"

typedef struct mapped {
  const uint8_t *data;
  int64_t bytes;
  bool present;
} mapped;

struct wn_dataset {
  char prefix[WN_PATH_BYTES];
  mapped bin, idx, scored;
  wn_token_code code;
  int64_t token_bytes, sequences, documents, tokens;
  const uint8_t *lengths, *offsets, *document_index; /* into idx */
};

static wn_status map_file(mapped *out, const char *path, bool optional) {
  *out = (mapped){0};
  struct stat info;
  wn_status status = NULL;
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe is refused below, and not waited for */
  if (fd < 0) {
    if (optional && errno == ENOENT) return NULL;
    return WN_FAIL_HINT(WN_E_IO,
                        "a dataset is named by its prefix: PREFIX.bin and PREFIX.idx; `winnow data pack` makes one",
                        "cannot open %s: %s", path, strerror(errno));
  }
  if (fstat(fd, &info) != 0)
    status = WN_FAIL(WN_E_IO, "cannot read %s: %s", path, strerror(errno));
  else if (!S_ISREG(info.st_mode))
    status = WN_FAIL(WN_E_INPUT, "%s is not a regular file", path);
  else {
    out->present = true;
    out->bytes = info.st_size;
    if (out->bytes > 0) {
      void *data = mmap(NULL, (size_t)out->bytes, PROT_READ, MAP_SHARED, fd, 0);
      if (data == MAP_FAILED)
        status = WN_FAIL(WN_E_IO, "cannot map %s: %s", path, strerror(errno));
      else
        out->data = data;
    }
  }
  close(fd);
  return status;
}

static void unmap_file(mapped *file) {
  if (file->data) munmap((void *)(size_t)file->data, (size_t)file->bytes);
}

static const char *code_name(wn_token_code code, int64_t *bytes) {
  switch (code) {
  case WN_TOKEN_U8: return *bytes = 1, "uint8";
  case WN_TOKEN_I8: return *bytes = 1, "int8";
  case WN_TOKEN_I16: return *bytes = 2, "int16";
  case WN_TOKEN_I32: return *bytes = 4, "int32";
  case WN_TOKEN_I64: return *bytes = 8, "int64";
  case WN_TOKEN_U16: return *bytes = 2, "uint16";
  }
  return NULL;
}

static wn_status check_header(wn_dataset *d) {
  const uint8_t *idx = d->idx.data;
  if (d->idx.bytes < WN_IDX_HEADER_BYTES)
    return WN_FAIL(WN_E_INPUT, "%s.idx has %" PRId64 " bytes, its header alone needs %d", d->prefix, d->idx.bytes,
                   WN_IDX_HEADER_BYTES);
  if (memcmp(idx, WN_IDX_MAGIC, WN_IDX_MAGIC_BYTES) != 0)
    return WN_FAIL(WN_E_INPUT, "%s.idx does not begin with MMIDIDX: it is no index of a Megatron dataset", d->prefix);
  uint64_t version = wn_load_u64(idx + WN_IDX_VERSION_AT);
  if (version != 1) return WN_FAIL(WN_E_INPUT, "%s.idx has version %" PRIu64 ", only 1 is known", d->prefix, version);
  uint8_t code = idx[WN_IDX_DTYPE_AT];
  d->code = (wn_token_code)code;
  if (code == 6 || code == 7)
    return WN_FAIL(WN_E_INPUT, "%s.idx has dtype code %d, floating point: these are no token ids", d->prefix, code);
  if (!code_name(d->code, &d->token_bytes))
    return WN_FAIL(WN_E_INPUT, "%s.idx has dtype code %d, known are 1 to 5 and 8", d->prefix, code);
  /* counts come from the file: compare before multiplying */
  uint64_t sequences = wn_load_u64(idx + WN_IDX_SEQUENCES_AT), boundaries = wn_load_u64(idx + WN_IDX_DOCUMENTS_AT);
  uint64_t room = (uint64_t)(d->idx.bytes - WN_IDX_HEADER_BYTES);
  if (sequences > room / 12 || boundaries > (room - 12 * sequences) / 8)
    return WN_FAIL(WN_E_INPUT,
                   "%s.idx is truncated: %" PRIu64 " sequences and %" PRIu64
                   " document boundaries do not fit in %" PRId64 " bytes",
                   d->prefix, sequences, boundaries, d->idx.bytes);
  uint64_t extra = room - 12 * sequences - 8 * boundaries;
  if (extra)
    return WN_FAIL_HINT(WN_E_INPUT, "multimodal datasets, with a mode for each sequence, are not read",
                        "%s.idx has %" PRIu64 " bytes after its document index", d->prefix, extra);
  if (boundaries < 2 || sequences < 1) return WN_FAIL(WN_E_INPUT, "%s.idx holds no documents", d->prefix);
  d->sequences = (int64_t)sequences;
  d->documents = (int64_t)boundaries - 1;
  d->lengths = idx + WN_IDX_HEADER_BYTES;
  d->offsets = d->lengths + 4 * d->sequences;
  d->document_index = d->offsets + 8 * d->sequences;
  return NULL;
}

/* Sequences stand one after another, so that the .bin is one array of tokens and a window is a plain range of it. */
static wn_status check_sequences(wn_dataset *d) {
  int64_t at = 0;
  for (int64_t i = 0; i < d->sequences; i++) {
    int64_t length = wn_load_i32(d->lengths + 4 * i), offset = wn_load_i64(d->offsets + 8 * i);
    if (length < 0)
      return WN_FAIL(WN_E_INPUT, "%s.idx: sequence %" PRId64 " has length %" PRId64, d->prefix, i, length);
    if (offset != at)
      return WN_FAIL(WN_E_INPUT,
                     "%s.idx: sequence %" PRId64 " begins at byte %" PRId64 ", the ones before it end at %" PRId64,
                     d->prefix, i, offset, at);
    if (length > (d->bin.bytes - at) / d->token_bytes)
      return WN_FAIL(WN_E_INPUT,
                     "%s.idx: sequence %" PRId64 " (%" PRId64 " tokens from byte %" PRId64 ") ends beyond the %" PRId64
                     " bytes of %s.bin",
                     d->prefix, i, length, offset, d->bin.bytes, d->prefix);
    at += length * d->token_bytes;
  }
  if (at != d->bin.bytes)
    return WN_FAIL(WN_E_INPUT, "%s.bin has %" PRId64 " bytes, its index describes %" PRId64, d->prefix, d->bin.bytes,
                   at);
  d->tokens = at / d->token_bytes;
  if (d->tokens == 0) return WN_FAIL(WN_E_INPUT, "%s.bin holds no tokens", d->prefix);
  return NULL;
}

static wn_status check_documents(const wn_dataset *d) {
  int64_t before = 0;
  for (int64_t i = 0; i <= d->documents; i++) {
    int64_t sequence = wn_load_i64(d->document_index + 8 * i);
    bool in_order = i == 0 ? sequence == 0 : sequence >= before;
    if (!in_order || sequence > d->sequences || (i == d->documents && sequence != d->sequences))
      return WN_FAIL(WN_E_INPUT,
                     "%s.idx: entry %" PRId64 " of the document index is %" PRId64
                     "; it must rise from 0 to the %" PRId64 " sequences",
                     d->prefix, i, sequence, d->sequences);
    before = sequence;
  }
  return NULL;
}

static wn_status check_scored(const wn_dataset *d) {
  if (!d->scored.present) return NULL;
  if (d->scored.bytes < WN_SCORED_HEADER_BYTES || memcmp(d->scored.data, WN_SCORED_MAGIC, WN_SCORED_MAGIC_BYTES) != 0)
    return WN_FAIL(WN_E_INPUT, "%s.scored does not begin with " WN_SCORED_MAGIC, d->prefix);
  uint64_t n = wn_load_u64(d->scored.data + WN_SCORED_MAGIC_BYTES);
  if (n != (uint64_t)d->tokens || d->scored.bytes - WN_SCORED_HEADER_BYTES != d->tokens)
    return WN_FAIL(WN_E_INPUT,
                   "%s.scored marks %" PRIu64 " tokens in %" PRId64 " bytes, the dataset has %" PRId64 " tokens",
                   d->prefix, n, d->scored.bytes, d->tokens);
  return NULL;
}

wn_status wn_dataset_open(wn_dataset **out, const char *prefix) {
  char path[WN_PATH_BYTES];
  wn_status status = NULL;
  wn_dataset *d = calloc(1, sizeof *d);
  if (!d) return WN_FAIL(WN_E_MEMORY, "out of memory opening dataset %s", prefix);
  WN_TRY_GOTO(status, failed, wn_path(d->prefix, "%s", prefix));
  WN_TRY_GOTO(status, failed, wn_path(path, "%s.idx", prefix));
  WN_TRY_GOTO(status, failed, map_file(&d->idx, path, false));
  WN_TRY_GOTO(status, failed, wn_path(path, "%s.bin", prefix));
  WN_TRY_GOTO(status, failed, map_file(&d->bin, path, false));
  WN_TRY_GOTO(status, failed, wn_path(path, "%s.scored", prefix));
  WN_TRY_GOTO(status, failed, map_file(&d->scored, path, true));
  WN_TRY_GOTO(status, failed, check_header(d));
  WN_TRY_GOTO(status, failed, check_sequences(d));
  WN_TRY_GOTO(status, failed, check_documents(d));
  WN_TRY_GOTO(status, failed, check_scored(d));
  *out = d;
  return NULL;
failed:
  wn_dataset_close(d);
  return status;
}

static wn_status map_blank(mapped *out, int64_t bytes) {
  void *data = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) return WN_FAIL(WN_E_MEMORY, "out of memory for a blank dataset of %" PRId64 " bytes", bytes);
  *out = (mapped){.data = data, .bytes = bytes, .present = true};
  return NULL;
}

wn_status wn_dataset_create_blank(wn_dataset **out, int64_t tokens) {
  enum { OFFSETS_BYTES = 8, DOCUMENT_INDEX_BYTES = 16 };
  wn_status status = NULL;
  wn_dataset *d = calloc(1, sizeof *d);
  WN_ASSERT(tokens > 1, "a dataset of %" PRId64 " tokens", tokens);
  if (!d) return WN_FAIL(WN_E_MEMORY, "out of memory for a blank dataset");
  d->code = WN_TOKEN_U8;
  d->token_bytes = d->sequences = d->documents = 1;
  d->tokens = tokens;
  WN_TRY_GOTO(status, failed, map_blank(&d->bin, tokens));
  WN_TRY_GOTO(status, failed, map_blank(&d->idx, OFFSETS_BYTES + DOCUMENT_INDEX_BYTES));
  d->offsets = d->idx.data; /* the one sequence begins at byte 0 */
  d->document_index = d->offsets + OFFSETS_BYTES;
  ((uint8_t *)(size_t)d->document_index)[8] = 1; /* {0, 1} */
  *out = d;
  return NULL;
failed:
  wn_dataset_close(d);
  return status;
}

void wn_dataset_close(wn_dataset *d) {
  if (!d) return;
  unmap_file(&d->idx);
  unmap_file(&d->bin);
  unmap_file(&d->scored);
  free(d);
}

const char *wn_dataset_prefix(const wn_dataset *d) {
  return d->prefix;
}
int64_t wn_dataset_documents(const wn_dataset *d) {
  return d->documents;
}
int64_t wn_dataset_tokens(const wn_dataset *d) {
  return d->tokens;
}
bool wn_dataset_has_scored(const wn_dataset *d) {
  return d->scored.present;
}

const char *wn_dataset_dtype(const wn_dataset *d) {
  int64_t bytes;
  return code_name(d->code, &bytes);
}

static int64_t token_at(const wn_dataset *d, int64_t t) {
  const uint8_t *at = d->bin.data + t * d->token_bytes;
  switch (d->code) {
  case WN_TOKEN_U8: return *at;
  case WN_TOKEN_I8: return (int8_t)*at;
  case WN_TOKEN_I16: return (int16_t)(uint16_t)(at[0] | at[1] << 8);
  case WN_TOKEN_U16: return at[0] | at[1] << 8;
  case WN_TOKEN_I32: return wn_load_i32(at);
  case WN_TOKEN_I64: return wn_load_i64(at);
  }
  return -1;
}

wn_status wn_dataset_check_vocab(const wn_dataset *d, int32_t vocab_size) {
  for (int64_t t = 0; t < d->tokens; t++) {
    int64_t id = token_at(d, t);
    if (id >= 0 && id < vocab_size) continue;
    int64_t document = wn_dataset_document_of(d, t);
    return WN_FAIL_HINT(WN_E_INPUT, "was the dataset packed with another tokenizer?",
                        "%s.bin: token %" PRId64 " of document %" PRId64 " has id %" PRId64 ", the vocabulary has %d",
                        d->prefix, t - wn_dataset_document_start(d, document), document, id, vocab_size);
  }
  for (int64_t t = 0; d->scored.present && t < d->tokens; t++)
    if (d->scored.data[WN_SCORED_HEADER_BYTES + t] > 1)
      return WN_FAIL(WN_E_INPUT, "%s.scored: the mark of token %" PRId64 " is %d, allowed are 0 and 1", d->prefix, t,
                     d->scored.data[WN_SCORED_HEADER_BYTES + t]);
  return NULL;
}

int64_t wn_dataset_document_start(const wn_dataset *d, int64_t document) {
  WN_ASSERT(document >= 0 && document <= d->documents, "document %" PRId64 " of %" PRId64, document, d->documents);
  int64_t sequence = wn_load_i64(d->document_index + 8 * document);
  return sequence == d->sequences ? d->tokens : wn_load_i64(d->offsets + 8 * sequence) / d->token_bytes;
}

int64_t wn_dataset_document_of(const wn_dataset *d, int64_t t) {
  WN_ASSERT(t >= 0 && t < d->tokens, "token %" PRId64 " of %" PRId64, t, d->tokens);
  int64_t low = 0, high = d->documents; /* start(low) <= t < start(high): the last such document is not an empty one */
  while (high - low > 1) {
    int64_t middle = low + (high - low) / 2;
    if (wn_dataset_document_start(d, middle) <= t)
      low = middle;
    else
      high = middle;
  }
  return low;
}

void wn_dataset_copy(const wn_dataset *d, int64_t first, int64_t n, int32_t *tokens, uint8_t *scored) {
  WN_ASSERT(first >= 0 && n >= 0 && n <= d->tokens - first, "tokens %" PRId64 " + %" PRId64 " of %" PRId64, first, n,
            d->tokens);
  for (int64_t i = 0; i < n; i++) {
    int64_t id = token_at(d, first + i);
    tokens[i] = id >= 0 && id <= INT32_MAX ? (int32_t)id : -1;
  }
  if (!scored) return;
  for (int64_t i = 0; i < n; i++)
    scored[i] = d->scored.present && d->scored.data[WN_SCORED_HEADER_BYTES + first + i] != 0;
}

int64_t wn_dataset_windows(const wn_dataset *d, int32_t seq_len) {
  WN_ASSERT(seq_len >= 1, "seq_len is %d", seq_len);
  return (d->tokens - 1) / seq_len;
}

void wn_dataset_read(const wn_dataset *d, int64_t window, int32_t seq_len, wn_window *out) {
  WN_ASSERT(window >= 0 && window < wn_dataset_windows(d, seq_len), "window %" PRId64 " of %" PRId64, window,
            wn_dataset_windows(d, seq_len));
  int64_t first = window * seq_len;
  wn_dataset_copy(d, first, (int64_t)seq_len + 1, out->tokens, NULL);
  int64_t document = wn_dataset_document_of(d, first);
  int64_t start = wn_dataset_document_start(d, document), end = wn_dataset_document_start(d, document + 1);
  for (int32_t i = 0; i < seq_len; i++) {
    out->document_start[i] = start > first ? (int32_t)(start - first) : 0;
    bool last = first + i + 1 == end;
    out->predicted[i] = !last;
    out->scored[i] = !last && d->scored.present && d->scored.data[WN_SCORED_HEADER_BYTES + first + i + 1] != 0;
    if (!last) continue;
    start = end;
    /* of several documents that start here all but the last are empty */
    document = wn_dataset_document_of(d, start);
    end = wn_dataset_document_start(d, document + 1);
  }
}
