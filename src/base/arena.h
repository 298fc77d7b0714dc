/* An arena is one reservation of address space handed out front to back; pages cost memory only once
 * touched. Every allocation is recorded by name, so the table of what uses how much is the allocator's own. */
#ifndef WN_BASE_ARENA_H
#define WN_BASE_ARENA_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/status.h"

typedef struct wn_arena wn_arena;

enum { WN_ARENA_ALIGN = 256 };

/* Where an arena's pages come from, when not from this process's own memory. */
typedef struct wn_memory {
  void *context;
  size_t page_bytes; /* what is committed grows by multiples of it */
  wn_status (*reserve)(void *context, void **base, size_t bytes);
  /* Makes bytes from .. to (multiples of page_bytes) of the reservation usable; `name` is the arena's. */
  wn_status (*commit)(void *context, const char *name, void *base, size_t from, size_t to);
  void (*release)(void *context, void *base, size_t reserved, size_t committed);
} wn_memory;

/* `name` must outlive the arena (a string literal). */
WN_MUST_USE wn_status wn_arena_create(wn_arena **out, const char *name, size_t capacity_bytes);
/* The same in memory of another kind; `memory` is copied, its context must outlive the arena. */
WN_MUST_USE wn_status wn_arena_create_in(wn_arena **out, const char *name, size_t capacity_bytes,
                                         const wn_memory *memory);
/* One that only counts: its addresses lead nowhere (touching one ends the process), so it may be larger than any
 * machine. Pages of page_bytes are counted as wn_arena_create_in would commit them; 0: bytes. */
WN_MUST_USE wn_status wn_arena_create_counting(wn_arena **out, const char *name, size_t page_bytes);
void wn_arena_free(wn_arena *arena); /* NULL is fine */

/* WN_ARENA_ALIGN-aligned, not zeroed. `name` (a string literal) tags the bytes in the table.
 * Fails with WN_E_MEMORY, naming arena, allocation and what is left. Not thread-safe. */
WN_MUST_USE wn_status wn_arena_alloc(wn_arena *arena, void **out, const char *name, size_t bytes);

/* Stack discipline for scratch: everything allocated after the mark goes at once. */
size_t wn_arena_mark(const wn_arena *arena);
void wn_arena_release(wn_arena *arena, size_t mark);

size_t wn_arena_used_bytes(const wn_arena *arena);
size_t wn_arena_peak_bytes(const wn_arena *arena);
void wn_arena_reset_peak(wn_arena *arena); /* the peak becomes what is in use now */
/* What the arena holds of the machine's memory: whole pages, where they are of another kind; else the peak. */
size_t wn_arena_held_bytes(const wn_arena *arena);
const char *wn_arena_name(const wn_arena *arena);

/* What is known of the allocations of one name. */
typedef struct wn_arena_use {
  const char *name;
  size_t peak_bytes;    /* most in use at once under this name */
  size_t at_peak_bytes; /* in use when the arena was at its peak: these add up to the peak */
  int32_t dtype, rank;  /* of the largest allocation, where it was a tensor (rank 0: it was not) */
  int64_t dim[4];
} wn_arena_use;
int32_t wn_arena_uses(const wn_arena *arena); /* in the order of first use */
wn_arena_use wn_arena_use_at(const wn_arena *arena, int32_t i);
/* What the newest allocation is: for the table. `dtype` is a wn_dtype. */
void wn_arena_describe(wn_arena *arena, int32_t dtype, int32_t rank, const int64_t *dim);
/* One line per name: name, most bytes in use at once under that name; then the arena's peak. */
void wn_arena_print(const wn_arena *arena, FILE *out);

#endif
