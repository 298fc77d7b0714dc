/* The sequences of one step that are this rank's, as micro-batches on the device; and the counts over the global batch
 * that the losses are divided by, known before the step's work begins. */
#ifndef WN_TRAIN_BATCH_H
#define WN_TRAIN_BATCH_H

#include "data/dataset.h"
#include "dist/world.h"
#include "kernels/kernels.h"

typedef struct wn_batch {
  int32_t n_seqs, seq_len, n_rows; /* n_rows = n_seqs * seq_len */
  wn_tensor tokens, target;        /* [n] INDEX; target -1 where nothing is predicted */
  wn_tensor weight;                /* [n] STAT: 1, or 0 where nothing is predicted */
  wn_rows rows;
  const uint8_t *scored; /* [n] host: 1 where the predicted token is scored apart */
  int64_t predicted, scored_count;
  int64_t kl_rows;         /* rows that see two keys or more */
  int64_t pairs, selected; /* (row, key) pairs: visible; and picked, at most topk a row */
} wn_batch;

typedef struct wn_batch_settings {
  int32_t seq_len;
  bool document_mask;
  int32_t topk; /* for the count of selected pairs; 0: none are */
} wn_batch_settings;

/* Loads `windows[n_seqs]` as one micro-batch; memory from device->stash and device->host. */
WN_MUST_USE wn_status wn_batch_load(wn_batch *out, wn_device *device, const wn_dataset *dataset,
                                    wn_batch_settings settings, const int64_t *windows, int32_t n_seqs);
/* The same for tokens given by hand: one sequence of n tokens whose documents begin at document_first[0 ..
 * n_documents-1] (ascending, the first 0); each row predicts the next token, the last none. */
WN_MUST_USE wn_status wn_batch_from_tokens(wn_batch *out, wn_device *device, const int32_t *tokens, int32_t n,
                                           const int32_t *document_first, int32_t n_documents);

#endif
