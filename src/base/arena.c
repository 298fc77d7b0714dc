#include "base/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { MAX_NAMES = 512, FIRST_LIVES = 256, NOWHERE_LOG2 = 55 };

typedef struct tag {
  wn_arena_use use;
  size_t live_bytes, described_bytes; /* of the allocation that the use describes */
} tag;

typedef struct live {
  size_t offset;
  int32_t tag;
} live;

struct wn_arena {
  const char *name;
  char *base;
  size_t capacity, used, peak;
  size_t committed;          /* bytes from the front that can be used; only with pages of another kind */
  wn_memory memory;          /* reserve NULL: this process's own */
  size_t counted_page_bytes; /* not 0: nothing is behind the addresses */
  uintptr_t advised;         /* up to here huge pages have been asked for */
  int32_t n_tags, n_live, lives_room;
  tag tags[MAX_NAMES];
  live *lives; /* what is allocated now, in order of offset */
};

static wn_status reserve_own(void **base, const char *name, size_t bytes) {
  *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*base != MAP_FAILED) return NULL;
  return WN_FAIL(WN_E_MEMORY, "cannot reserve %zu bytes of address space for the %s arena", bytes, name);
}

static wn_status make(wn_arena **out, const char *name, size_t capacity_bytes) {
  wn_arena *arena = calloc(1, sizeof *arena);
  if (!arena) return WN_FAIL(WN_E_MEMORY, "out of memory for the %s arena's table", name);
  arena->name = name;
  arena->capacity = capacity_bytes;
  *out = arena;
  return NULL;
}

static wn_status create(wn_arena **out, const char *name, size_t capacity_bytes, const wn_memory *memory) {
  wn_arena *arena = NULL;
  size_t unit = memory ? memory->page_bytes : WN_ARENA_ALIGN;
  capacity_bytes = (capacity_bytes + unit - 1) / unit * unit;
  if (capacity_bytes == 0) capacity_bytes = unit;
  WN_TRY(make(&arena, name, capacity_bytes));
  if (memory) arena->memory = *memory;
  void *base = NULL;
  wn_status status =
      memory ? memory->reserve(memory->context, &base, capacity_bytes) : reserve_own(&base, name, capacity_bytes);
  if (status) {
    free(arena);
    return status;
  }
  arena->base = base;
  *out = arena;
  return NULL;
}

wn_status wn_arena_create(wn_arena **out, const char *name, size_t capacity_bytes) {
  return create(out, name, capacity_bytes, NULL);
}

/* Addresses that no processor of today maps for a program (x86-64 and 64-bit ARM take 48 or 57 bits of which the upper
 * ones are equal), so nothing has to be reserved, and whatever reads or writes there ends at once. */
wn_status wn_arena_create_counting(wn_arena **out, const char *name, size_t page_bytes) {
  const size_t nowhere = (size_t)1 << NOWHERE_LOG2;
  WN_TRY(make(out, name, nowhere));
  (*out)->base = (char *)nowhere;
  (*out)->counted_page_bytes = page_bytes ? page_bytes : 1;
  return NULL;
}

wn_status wn_arena_create_in(wn_arena **out, const char *name, size_t capacity_bytes, const wn_memory *memory) {
  WN_ASSERT(memory->page_bytes % WN_ARENA_ALIGN == 0 && memory->page_bytes > 0, "pages of %zu bytes",
            memory->page_bytes);
  return create(out, name, capacity_bytes, memory);
}

void wn_arena_free(wn_arena *arena) {
  if (!arena) return;
  if (arena->memory.reserve)
    arena->memory.release(arena->memory.context, arena->base, arena->capacity, arena->committed);
  else if (!arena->counted_page_bytes)
    munmap(arena->base, arena->capacity);
  free(arena->lives);
  free(arena);
}

/* Pages of another kind are made usable as the arena grows into them, and stay. */
static wn_status commit(wn_arena *arena, size_t bytes) {
  size_t page = arena->memory.page_bytes;
  if (!arena->memory.reserve || bytes <= arena->committed) return NULL;
  size_t to = (bytes + page - 1) / page * page;
  WN_TRY(arena->memory.commit(arena->memory.context, arena->name, arena->base, arena->committed, to));
  arena->committed = to;
  return NULL;
}

/* Huge pages for a large allocation of the process's own memory, where the system leaves that to programs: else its
 * first use is a fault every 4 KiB, which takes longer than reading weights into it. Only whole pages inside it, so
 * that memory is not held for nothing; a refusal is no error. */
static void prefer_huge_pages(wn_arena *arena, const char *at, size_t bytes) {
  const uintptr_t huge = (uintptr_t)2 << 20, from = ((uintptr_t)at + huge - 1) / huge * huge,
                  to = ((uintptr_t)at + bytes) / huge * huge;
  if (arena->memory.reserve || arena->counted_page_bytes || bytes < 8 * huge || to <= arena->advised) return;
  madvise((void *)from, to - from, MADV_HUGEPAGE);
  arena->advised = to;
}

static int32_t tag_of(wn_arena *arena, const char *name) {
  for (int32_t i = 0; i < arena->n_tags; i++)
    if (arena->tags[i].use.name == name || strcmp(arena->tags[i].use.name, name) == 0) return i;
  WN_ASSERT(arena->n_tags < MAX_NAMES, "more than %d names in the %s arena", MAX_NAMES, arena->name);
  arena->tags[arena->n_tags].use.name = name;
  return arena->n_tags++;
}

static void note_peak(wn_arena *arena) {
  arena->peak = arena->used;
  for (int32_t i = 0; i < arena->n_tags; i++) arena->tags[i].use.at_peak_bytes = arena->tags[i].live_bytes;
}

/* A job may have a million sequences a step, each with tensors of its own. */
static wn_status make_room_for_one(wn_arena *arena) {
  if (arena->n_live < arena->lives_room) return NULL;
  WN_ASSERT(arena->lives_room <= INT32_MAX / 2, "allocations in the %s arena without end", arena->name);
  int32_t room = arena->lives_room ? 2 * arena->lives_room : FIRST_LIVES;
  live *grown = realloc(arena->lives, (size_t)room * sizeof *grown);
  if (!grown) return WN_FAIL(WN_E_MEMORY, "out of memory for the %s arena's table", arena->name);
  arena->lives = grown;
  arena->lives_room = room;
  return NULL;
}

wn_status wn_arena_alloc(wn_arena *arena, void **out, const char *name, size_t bytes) {
  if (bytes > arena->capacity - arena->used)
    return WN_FAIL_HINT(WN_E_MEMORY, "lower data.seq_len or training.micro_batch_seqs, or use more ranks",
                        "the %s arena has no room for %s: %zu bytes wanted, %zu of %zu left", arena->name, name, bytes,
                        arena->capacity - arena->used, arena->capacity);
  WN_TRY(make_room_for_one(arena));
  size_t padded = (bytes + WN_ARENA_ALIGN - 1) / WN_ARENA_ALIGN * WN_ARENA_ALIGN;
  WN_TRY(commit(arena, arena->used + padded));
  int32_t index = tag_of(arena, name);
  arena->lives[arena->n_live++] = (live){arena->used, index};
  *out = arena->base + arena->used;
  prefer_huge_pages(arena, *out, padded);
  arena->used += padded;
  tag *t = &arena->tags[index];
  t->live_bytes += padded;
  if (t->live_bytes > t->use.peak_bytes) t->use.peak_bytes = t->live_bytes;
  if (arena->used > arena->peak) note_peak(arena);
  return NULL;
}

void wn_arena_describe(wn_arena *arena, int32_t dtype, int32_t rank, const int64_t *dim) {
  WN_ASSERT(arena->n_live > 0 && rank > 0 && rank <= 4, "rank %d in the %s arena", rank, arena->name);
  const live *l = &arena->lives[arena->n_live - 1];
  tag *t = &arena->tags[l->tag];
  size_t bytes = arena->used - l->offset;
  if (bytes <= t->described_bytes) return;
  t->described_bytes = bytes;
  t->use.dtype = dtype;
  t->use.rank = rank;
  memcpy(t->use.dim, dim, (size_t)rank * sizeof *dim);
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

size_t wn_arena_held_bytes(const wn_arena *arena) {
  size_t page = arena->counted_page_bytes;
  if (page) return (arena->peak + page - 1) / page * page;
  return arena->memory.reserve ? arena->committed : arena->peak;
}

const char *wn_arena_name(const wn_arena *arena) {
  return arena->name;
}

int32_t wn_arena_uses(const wn_arena *arena) {
  return arena->n_tags;
}

wn_arena_use wn_arena_use_at(const wn_arena *arena, int32_t i) {
  WN_ASSERT(i >= 0 && i < arena->n_tags, "name %d of %d in the %s arena", i, arena->n_tags, arena->name);
  return arena->tags[i].use;
}

void wn_arena_reset_peak(wn_arena *arena) {
  for (int32_t i = 0; i < arena->n_tags; i++) arena->tags[i].use.peak_bytes = arena->tags[i].live_bytes;
  note_peak(arena);
}

void wn_arena_print(const wn_arena *arena, FILE *out) {
  for (int32_t i = 0; i < arena->n_tags; i++)
    fprintf(out, "%-10s %-28s %14zu bytes\n", arena->name, arena->tags[i].use.name, arena->tags[i].use.peak_bytes);
  fprintf(out, "%-10s %-28s %14zu bytes\n", arena->name, "(peak)", arena->peak);
}
