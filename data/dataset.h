/* Megatron's indexed dataset, read and written: PREFIX.bin holds token ids, PREFIX.idx where each sequence begins.
 * .idx: "MMIDIDX\0\0", u64 version 1, u8 dtype code, u64 sequences, u64 documents + 1, i32 lengths, i64 byte offsets, i64 document
 * index. Winnow writes one sequence a document, with the end-of-document token included.
 * Optional PREFIX.scored: one byte a token, 1 where the token is scored apart (loss_scored); header in docs/formats.md. */
#ifndef WN_DATA_DATASET_H
#define WN_DATA_DATASET_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct wn_dataset wn_dataset;

/* Maps the files and checks all of them that can be checked without reading every token (lengths, offsets, order, document index). WN_E_INPUT. */
WN_MUST_USE wn_status wn_dataset_open(wn_dataset **out, const char *prefix);
void wn_dataset_close(wn_dataset *dataset);
const char *wn_dataset_prefix(const wn_dataset *dataset);
int64_t wn_dataset_documents(const wn_dataset *dataset);
int64_t wn_dataset_tokens(const wn_dataset *dataset);
bool wn_dataset_has_scored(const wn_dataset *dataset);
/* Reads every token; WN_E_INPUT naming document and place of the first id >= vocab_size. */
WN_MUST_USE wn_status wn_dataset_check_vocab(const wn_dataset *dataset, int32_t vocab_size);

/* A window: tokens [seq_len + 1] of the documents laid end to end (the window's last token is only a target).
 * Windows do not overlap but for that one token; the tail that fills no window is left out. */
typedef struct wn_window {
  int32_t *tokens;         /* [seq_len + 1] */
  int32_t *document_start; /* [seq_len]: first row of the row's document within this window (0 when it began before) */
  uint8_t *predicted;      /* [seq_len]: 1 where row i predicts tokens[i+1]; 0 where that token begins another document */
  uint8_t *scored;         /* [seq_len]: 1 where the token predicted by row i is marked (all 0 without marks) */
} wn_window;
int64_t wn_dataset_windows(const wn_dataset *dataset, int32_t seq_len);
void wn_dataset_read(const wn_dataset *dataset, int64_t window, int32_t seq_len, wn_window *out);

/* Writer with bounded memory: temporary names, renamed when closed without error. */
typedef struct wn_dataset_writer wn_dataset_writer;
WN_MUST_USE wn_status wn_dataset_writer_create(wn_dataset_writer **out, const char *prefix, int32_t vocab_size, bool with_scored);
/* scored may be NULL when the writer has no marks. */
WN_MUST_USE wn_status wn_dataset_writer_add(wn_dataset_writer *writer, const int32_t *tokens, const uint8_t *scored, int64_t n);
/* Finishes (commit true) or removes what was written. Frees. */
WN_MUST_USE wn_status wn_dataset_writer_close(wn_dataset_writer *writer, bool commit);

/* Sampler: which window the sequence `index` (0 .. global_batch-1) of `step` (from 0) is: a keyed permutation of all windows per epoch, a
 * pure function. */
int64_t wn_sampler_window(uint64_t seed, int64_t n_windows, int64_t step, int64_t global_batch, int64_t index);

#endif
