#include "base/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { MAX_NAMES = 512, MAX_LIVE = 65536 };

typedef struct tag {
  const char *name;
  size_t live_bytes, peak_bytes;
} tag;

typedef struct live {
  size_t offset;
  int32_t tag;
} live;

struct wn_arena {
  const char *name;
  char *base;
  size_t capacity, used, peak;
  int32_t n_tags, n_live;
  tag tags[MAX_NAMES];
  live lives[MAX_LIVE]; /* what is allocated now, in order of offset */
};

wn_status wn_arena_create(wn_arena **out, const char *name, size_t capacity_bytes) {
  wn_arena *arena = calloc(1, sizeof *arena);
  if (!arena) return WN_FAIL(WN_E_MEMORY, "out of memory for the %s arena's table", name);
  capacity_bytes = (capacity_bytes + WN_ARENA_ALIGN - 1) / WN_ARENA_ALIGN * WN_ARENA_ALIGN;
  if (capacity_bytes == 0) capacity_bytes = WN_ARENA_ALIGN;
  arena->name = name;
  arena->capacity = capacity_bytes;
  arena->base = mmap(NULL, capacity_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena->base == MAP_FAILED) {
    free(arena);
    return WN_FAIL(WN_E_MEMORY, "cannot reserve %zu bytes of address space for the %s arena", capacity_bytes, name);
  }
  *out = arena;
  return NULL;
}

void wn_arena_free(wn_arena *arena) {
  if (!arena) return;
  munmap(arena->base, arena->capacity);
  free(arena);
}

static int32_t tag_of(wn_arena *arena, const char *name) {
  for (int32_t i = 0; i < arena->n_tags; i++)
    if (arena->tags[i].name == name || strcmp(arena->tags[i].name, name) == 0) return i;
  WN_ASSERT(arena->n_tags < MAX_NAMES, "more than %d names in the %s arena", MAX_NAMES, arena->name);
  arena->tags[arena->n_tags].name = name;
  return arena->n_tags++;
}

wn_status wn_arena_alloc(wn_arena *arena, void **out, const char *name, size_t bytes) {
  if (bytes > arena->capacity - arena->used)
    return WN_FAIL_HINT(WN_E_MEMORY, "lower data.seq_len or training.micro_batch_seqs, or use more ranks",
                        "the %s arena has no room for %s: %zu bytes wanted, %zu of %zu left", arena->name, name, bytes,
                        arena->capacity - arena->used, arena->capacity);
  WN_ASSERT(arena->n_live < MAX_LIVE, "more than %d allocations in the %s arena", MAX_LIVE, arena->name);
  size_t padded = (bytes + WN_ARENA_ALIGN - 1) / WN_ARENA_ALIGN * WN_ARENA_ALIGN;
  int32_t index = tag_of(arena, name);
  arena->lives[arena->n_live++] = (live){arena->used, index};
  *out = arena->base + arena->used;
  arena->used += padded;
  if (arena->used > arena->peak) arena->peak = arena->used;
  tag *t = &arena->tags[index];
  t->live_bytes += padded;
  if (t->live_bytes > t->peak_bytes) t->peak_bytes = t->live_bytes;
  return NULL;
}

size_t wn_arena_mark(const wn_arena *arena) {
  return arena->used;
}

void wn_arena_release(wn_arena *arena, size_t mark) {
  WN_ASSERT(mark <= arena->used, "release to %zu of %zu in the %s arena", mark, arena->used, arena->name);
  while (arena->n_live > 0 && arena->lives[arena->n_live - 1].offset >= mark) {
    live l = arena->lives[--arena->n_live];
    arena->tags[l.tag].live_bytes -= arena->used - l.offset;
    arena->used = l.offset;
  }
  WN_ASSERT(arena->used == mark, "mark %zu is inside an allocation of the %s arena", mark, arena->name);
}

size_t wn_arena_used_bytes(const wn_arena *arena) {
  return arena->used;
}
size_t wn_arena_peak_bytes(const wn_arena *arena) {
  return arena->peak;
}

void wn_arena_reset_peak(wn_arena *arena) {
  arena->peak = arena->used;
  for (int32_t i = 0; i < arena->n_tags; i++) arena->tags[i].peak_bytes = arena->tags[i].live_bytes;
}

void wn_arena_print(const wn_arena *arena, FILE *out) {
  for (int32_t i = 0; i < arena->n_tags; i++)
    fprintf(out, "%-10s %-28s %14zu bytes\n", arena->name, arena->tags[i].name, arena->tags[i].peak_bytes);
  fprintf(out, "%-10s %-28s %14zu bytes\n", arena->name, "(peak)", arena->peak);
}
