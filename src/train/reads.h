/* Tensors out of files into the parts of the store that this rank holds: first a list of what is wanted, then all of it
 * by all threads. */
#ifndef WN_TRAIN_READS_H
#define WN_TRAIN_READS_H

#include "train/checkpoint_parts.h"

typedef struct wn_read {
  int32_t param;
  wn_field field;
  wn_hf_weight from; /* of the parameter's shape */
} wn_read;

typedef struct wn_reads {
  wn_read *read;
  int64_t n, room;
} wn_reads;

WN_MUST_USE wn_status wn_reads_add(wn_reads *reads, wn_read read);
void wn_reads_free(wn_reads *reads);

/* Reads of each tensor the elements that the rank's part has and nothing else; of a parameter that the store keeps as
 * FP8, whose scales every rank has, those too. The order is that of the files; beside what it fills it takes at most
 * half a MiB of stack a thread (on a GPU, 1 MiB more). `what` ("reading weights") names it in the log, where it shows
 * how far it is. WN_E_INPUT and WN_E_IO as wn_hf_read; of several errors the one first in the list. */
WN_MUST_USE wn_status wn_reads_run(wn_reads *reads, wn_device *device, wn_store *store, const wn_part *parts,
                                   wn_log *log, const char *what);

#endif
