/* Byte-pair encoding of one word (Sennrich et al., 2016): the pair of neighbours with the lowest rank is merged, the
 * leftmost of equal ones first, until no pair has a rank. */
#ifndef WN_DATA_BPE_H
#define WN_DATA_BPE_H

#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

/* (left, right) -> rank and the id that the two become. */
typedef struct wn_merge {
  int32_t left, right, rank, id;
} wn_merge;
typedef struct wn_merges {
  wn_merge *slot; /* [slots]: rank -1 where free */
  size_t n, slots;
} wn_merges; /* all zero: empty */

/* WN_E_MEMORY; WN_E_INPUT when the pair has a rank already. */
WN_MUST_USE wn_status wn_merges_add(wn_merges *merges, wn_merge merge);
const wn_merge *wn_merges_find(const wn_merges *merges, int32_t left, int32_t right); /* NULL: none */
void wn_merges_free(wn_merges *merges);

/* Scratch of the encoder, grown as needed. All zero at first. */
typedef struct wn_bpe_work {
  struct wn_bpe_node *nodes;
  struct wn_bpe_pair *heap;
  size_t node_room, heap_room, heap_n;
} wn_bpe_work;
void wn_bpe_work_free(wn_bpe_work *work);

/* Encodes in place: ids[0 .. n) are the word's first ids, the return puts *n_out <= n of them there. O(n log n). */
WN_MUST_USE wn_status wn_bpe_encode(const wn_merges *merges, wn_bpe_work *work, int32_t *ids, size_t n, size_t *n_out);

#endif
