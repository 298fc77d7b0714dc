/* An arena is one reservation of address space handed out front to back; pages cost memory only once
 * touched. Every allocation is recorded by name, so the table of what uses how much is the allocator's own. */
#ifndef WN_BASE_ARENA_H
#define WN_BASE_ARENA_H

#include <stddef.h>
#include <stdio.h>

#include "base/status.h"

typedef struct wn_arena wn_arena;

enum { WN_ARENA_ALIGN = 256 };

/* `name` must outlive the arena (a string literal). */
WN_MUST_USE wn_status wn_arena_create(wn_arena **out, const char *name, size_t capacity_bytes);
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
/* One line per name: name, most bytes in use at once under that name; then the arena's peak. */
void wn_arena_print(const wn_arena *arena, FILE *out);

#endif
