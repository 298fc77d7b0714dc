/* Megatron's indexed dataset, read and written: PREFIX.bin holds token ids, PREFIX.idx where each sequence begins.
 * .idx: "MMIDIDX\0\0", u64 version 1, u8 dtype code, u64 sequences, u64 documents + 1, i32 lengths, i64 byte offsets,
 * i64 document index (first sequence of each document, then the number of sequences). Winnow writes one sequence a
 * document, with the end-of-document token included, as u16 where the vocabulary allows it, else i32.
 * Optional PREFIX.scored: one byte a token, 1 where the token is scored apart (loss_scored). docs/formats.md. */
#ifndef WN_DATA_DATASET_H
#define WN_DATA_DATASET_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct wn_dataset wn_dataset;

/* Maps the files and checks all of them that can be checked without reading every token: magic, version, dtype, sizes
 * of both files against the counts, sequences one after another without holes, order of the document index, header of
 * the marks. WN_E_INPUT naming file and place; WN_E_IO. The files must not change while they are open. */
WN_MUST_USE wn_status wn_dataset_open(wn_dataset **out, const char *prefix);
/* One document of so many tokens (at least 2), all of id 0, without files: for planning. */
WN_MUST_USE wn_status wn_dataset_create_blank(wn_dataset **out, int64_t tokens);
void wn_dataset_close(wn_dataset *dataset); /* NULL is fine */
const char *wn_dataset_prefix(const wn_dataset *dataset);
const char *wn_dataset_dtype(const wn_dataset *dataset); /* "uint16" */
int64_t wn_dataset_documents(const wn_dataset *dataset);
int64_t wn_dataset_tokens(const wn_dataset *dataset); /* at least 1 */
bool wn_dataset_has_scored(const wn_dataset *dataset);
/* Reads every token; WN_E_INPUT naming document and place of the first id outside 0 .. vocab_size - 1, and of the first
 * mark that is neither 0 nor 1. Whoever feeds ids to a model calls this first. */
WN_MUST_USE wn_status wn_dataset_check_vocab(const wn_dataset *dataset, int32_t vocab_size);

/* First token of document d (0 .. documents; documents itself gives the number of tokens). */
int64_t wn_dataset_document_start(const wn_dataset *dataset, int64_t d);
/* The document that token t belongs to. Binary search. */
int64_t wn_dataset_document_of(const wn_dataset *dataset, int64_t t);
/* Copies tokens first .. first + n - 1 and their marks (scored NULL: not wanted; all 0 without marks). An id that no
 * int32_t holds comes out as -1. */
void wn_dataset_copy(const wn_dataset *dataset, int64_t first, int64_t n, int32_t *tokens, uint8_t *scored);

/* A window: tokens [seq_len + 1] of the documents laid end to end (the window's last token is only a target).
 * Windows do not overlap but for that one token; the tail that fills no window is left out. */
typedef struct wn_window {
  int32_t *tokens;         /* [seq_len + 1] */
  int32_t *document_start; /* [seq_len]: first row of the row's document within this window (0 when it began before) */
  uint8_t *predicted; /* [seq_len]: 1 where row i predicts tokens[i+1]; 0 where that token begins another document */
  uint8_t *scored;    /* [seq_len]: 1 where row i predicts a marked token (all 0 without marks) */
} wn_window;
int64_t wn_dataset_windows(const wn_dataset *dataset, int32_t seq_len);
void wn_dataset_read(const wn_dataset *dataset, int64_t window, int32_t seq_len, wn_window *out);

/* Writer; its memory does not grow with what is written. Files carry temporary names and are renamed, .idx last, when
 * all is well; files of an earlier dataset of the same name are replaced. */
typedef struct wn_dataset_writer wn_dataset_writer;
WN_MUST_USE wn_status wn_dataset_writer_create(wn_dataset_writer **out, const char *prefix, int32_t vocab_size,
                                               bool with_scored);
/* Adds to the current document; `scored` NULL: nothing is marked. WN_E_INPUT for an id outside the vocabulary or a
 * document of more than 2^31 - 1 tokens, WN_E_IO. */
WN_MUST_USE wn_status wn_dataset_writer_append(wn_dataset_writer *writer, const int32_t *tokens, const uint8_t *scored,
                                               int64_t n);
WN_MUST_USE wn_status wn_dataset_writer_end_document(wn_dataset_writer *writer);
/* Both in one: a whole document. */
WN_MUST_USE wn_status wn_dataset_writer_add(wn_dataset_writer *writer, const int32_t *tokens, const uint8_t *scored,
                                            int64_t n);
/* Finishes (commit true; the last document must have been ended) or removes what was written. Frees the writer in any
 * case. WN_E_INPUT when there is not one token. */
WN_MUST_USE wn_status wn_dataset_writer_close(wn_dataset_writer *writer, bool commit);

/* Which window sequence `index` (0 .. global_batch - 1) of `step` (from 0) is. Sequences are counted through all steps;
 * each n_windows of them, an epoch, are a permutation of all windows keyed by (seed, epoch). A pure function. */
int64_t wn_sampler_window(uint64_t seed, int64_t n_windows, int64_t step, int64_t global_batch, int64_t index);

#endif
