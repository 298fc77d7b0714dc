/* The CPU device's arenas: what the machine cannot hold is refused, what it can is not. And arenas in memory of another
 * kind, as a GPU's are: pages are asked for as they are needed. */
#include <stdlib.h>
#include <unistd.h>

#include "kernels/cpu/cpu.h"
#include "support/test.h"

static void refuses_more_than_the_machine_has(void **state) {
  (void)state;
  wn_device *device;
  void *place;
  size_t machine = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGE_SIZE);
  OK(wn_cpu_create_f32(&device, (wn_cpu_settings){.threads = 1}));
  wn_arena *const arenas[] = {device->weights, device->stash, device->scratch};
  for (int i = 0; i < 3; i++) {
    OK(wn_arena_alloc(arenas[i], &place, "most of it", machine / 4 * 3));
    REFUSED(wn_arena_alloc(arenas[i], &place, "too much", machine / 2), WN_E_MEMORY, "no room for too much");
  }
  wn_cpu_free_f32(device);
}

static void takes_what_it_is_given(void **state) {
  (void)state;
  wn_device *device;
  void *place;
  wn_cpu_settings settings = {.threads = 1, .weights_bytes = 512, .stash_bytes = 1024, .scratch_bytes = 2048};
  OK(wn_cpu_create_f64(&device, settings));
  OK(wn_arena_alloc(device->stash, &place, "all", 1024));
  REFUSED(wn_arena_alloc(device->stash, &place, "more", 1), WN_E_MEMORY, "the stash arena has no room for more");
  REFUSED(wn_arena_alloc(device->weights, &place, "more", 513), WN_E_MEMORY, "the weights arena");
  OK(wn_arena_alloc(device->scratch, &place, "all", 2048));
  wn_cpu_free_f64(device);
}

/* Pages of a kilobyte, of which there are `left`. */
typedef struct paged {
  char *base;
  size_t left, committed, calls, released;
} paged;
enum { PAGE = 1024 };

static wn_status reserve_paged(void *context, void **base, size_t bytes) {
  paged *p = context;
  *base = p->base = aligned_alloc(WN_ARENA_ALIGN, bytes);
  return p->base ? NULL : WN_FAIL(WN_E_MEMORY, "no memory for %zu bytes", bytes);
}

static wn_status commit_paged(void *context, const char *name, void *base, size_t from, size_t to) {
  paged *p = context;
  assert_ptr_equal(base, p->base);
  assert_int_equal(from, p->committed);
  assert_true(to > from && to % PAGE == 0);
  if (to > p->left) return WN_FAIL(WN_E_MEMORY, "no page left for %s", name);
  p->committed = to;
  p->calls++;
  return NULL;
}

static void release_paged(void *context, void *base, size_t reserved, size_t committed) {
  paged *p = context;
  assert_int_equal(reserved, 4 * PAGE); /* 3.5 pages were asked for */
  assert_int_equal(committed, p->committed);
  p->released++;
  free(base);
}

static void pages_come_as_they_are_needed(void **state) {
  (void)state;
  paged p = {.left = 3 * PAGE};
  const wn_memory memory = {&p, PAGE, reserve_paged, commit_paged, release_paged};
  wn_arena *arena;
  void *place, *again;
  OK(wn_arena_create_in(&arena, "paged", 3 * PAGE + PAGE / 2, &memory));
  assert_int_equal(p.committed, 0);
  OK(wn_arena_alloc(arena, &place, "little", 1));
  assert_int_equal(p.committed, PAGE);
  size_t mark = wn_arena_mark(arena);
  OK(wn_arena_alloc(arena, &place, "much", 2 * PAGE));
  assert_int_equal(p.committed, 3 * PAGE);
  wn_arena_release(arena, mark);
  OK(wn_arena_alloc(arena, &again, "as much", 2 * PAGE)); /* what is there stays */
  assert_true(again == place && p.calls == 2);
  wn_arena_release(arena, mark);
  REFUSED(wn_arena_alloc(arena, &place, "too much", 3 * PAGE), WN_E_MEMORY, "no page left for paged");
  assert_int_equal(wn_arena_used_bytes(arena), mark);
  REFUSED(wn_arena_alloc(arena, &place, "far too much", 4 * PAGE), WN_E_MEMORY, "no room for far too much");
  wn_arena_free(arena);
  assert_int_equal(p.released, 1);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(refuses_more_than_the_machine_has),
      cmocka_unit_test(takes_what_it_is_given),
      cmocka_unit_test(pages_come_as_they_are_needed),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
