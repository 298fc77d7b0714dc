#include "data/bpe.h"

#include <stdlib.h>
#include <string.h>

#include "data/words.h"

/* ---- merges */

static size_t slot_of(const wn_merges *m, int32_t left, int32_t right) {
  uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
  key *= 0x9E3779B97F4A7C15u; /* golden ratio: the high bits are well mixed */
  size_t at = (size_t)(key >> 32) & (m->slots - 1);
  while (m->slot[at].rank >= 0 && (m->slot[at].left != left || m->slot[at].right != right))
    at = (at + 1) & (m->slots - 1);
  return at;
}

const wn_merge *wn_merges_find(const wn_merges *m, int32_t left, int32_t right) {
  if (!m->slots) return NULL;
  const wn_merge *found = &m->slot[slot_of(m, left, right)];
  return found->rank >= 0 ? found : NULL;
}

wn_status wn_merges_add(wn_merges *m, wn_merge merge) {
  if (wn_merges_find(m, merge.left, merge.right))
    return WN_FAIL(WN_E_INPUT, "the pair of ids %d and %d is merged twice", merge.left, merge.right);
  if (2 * (m->n + 1) > m->slots) {
    wn_merges larger = {.n = m->n, .slots = m->slots ? 2 * m->slots : 1024};
    larger.slot = malloc(larger.slots * sizeof *larger.slot);
    if (!larger.slot) return WN_FAIL(WN_E_MEMORY, "out of memory for %zu merges", larger.slots);
    for (size_t i = 0; i < larger.slots; i++) larger.slot[i].rank = -1;
    for (size_t i = 0; i < m->slots; i++)
      if (m->slot[i].rank >= 0) larger.slot[slot_of(&larger, m->slot[i].left, m->slot[i].right)] = m->slot[i];
    free(m->slot);
    *m = larger;
  }
  m->slot[slot_of(m, merge.left, merge.right)] = merge;
  m->n++;
  return NULL;
}

void wn_merges_free(wn_merges *m) {
  free(m->slot);
  *m = (wn_merges){0};
}

/* ---- one word: a linked list of ids and a heap of the pairs that have a rank */

typedef struct wn_bpe_node {
  int32_t id; /* -1: merged into the one before */
  uint32_t before, after;
} node;

typedef struct wn_bpe_pair {
  int32_t rank, left, right, id; /* left and right: the ids it was entered for; others now mean it is out of date */
  uint32_t at;                   /* node of the left one */
} pair;

#define NONE UINT32_MAX /* no node */

static int sooner(const pair *a, const pair *b) {
  return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static wn_status push(wn_bpe_work *w, const wn_merges *merges, uint32_t at) {
  const node *nodes = w->nodes;
  if (at == NONE || nodes[at].after == NONE) return NULL;
  int32_t left = nodes[at].id, right = nodes[nodes[at].after].id;
  const wn_merge *merge = wn_merges_find(merges, left, right);
  if (!merge) return NULL;
  WN_TRY(wn_grow(&w->heap, &w->heap_room, w->heap_n + 1, sizeof *w->heap));
  pair entry = {merge->rank, left, right, merge->id, at};
  size_t i = w->heap_n++;
  for (size_t parent; i > 0 && sooner(&entry, &w->heap[parent = (i - 1) / 2]); i = parent) w->heap[i] = w->heap[parent];
  w->heap[i] = entry;
  return NULL;
}

static pair pop(wn_bpe_work *w) {
  pair top = w->heap[0], last = w->heap[--w->heap_n];
  size_t i = 0;
  for (size_t child; (child = 2 * i + 1) < w->heap_n; i = child) {
    if (child + 1 < w->heap_n && sooner(&w->heap[child + 1], &w->heap[child])) child++;
    if (!sooner(&w->heap[child], &last)) break;
    w->heap[i] = w->heap[child];
  }
  w->heap[i] = last;
  return top;
}

wn_status wn_bpe_encode(const wn_merges *merges, wn_bpe_work *w, int32_t *ids, size_t n, size_t *n_out) {
  *n_out = n;
  if (n < 2) return NULL;
  WN_ASSERT(n < NONE, "a word of %zu bytes", n);
  WN_TRY(wn_grow(&w->nodes, &w->node_room, n, sizeof *w->nodes));
  for (size_t i = 0; i < n; i++)
    w->nodes[i] = (node){ids[i], i ? (uint32_t)i - 1 : NONE, i + 1 < n ? (uint32_t)i + 1 : NONE};
  w->heap_n = 0;
  for (size_t i = 0; i + 1 < n; i++) WN_TRY(push(w, merges, (uint32_t)i));
  while (w->heap_n > 0) {
    pair best = pop(w);
    node *left = &w->nodes[best.at];
    if (left->id != best.left || left->after == NONE || w->nodes[left->after].id != best.right) continue;
    node *right = &w->nodes[left->after];
    left->id = best.id;
    right->id = -1;
    left->after = right->after;
    if (left->after != NONE) w->nodes[left->after].before = best.at;
    WN_TRY(push(w, merges, left->before));
    WN_TRY(push(w, merges, best.at));
  }
  size_t kept = 0;
  for (uint32_t at = 0; at != NONE; at = w->nodes[at].after) ids[kept++] = w->nodes[at].id;
  *n_out = kept;
  return NULL;
}

void wn_bpe_work_free(wn_bpe_work *work) {
  free(work->nodes);
  free(work->heap);
  *work = (wn_bpe_work){0};
}
