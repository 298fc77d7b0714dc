/* Arenas: the table of what uses how much, and arenas that only count. */
#include <string.h>

#include "base/arena.h"
#include "base/tensor.h"
#include "support/test.h"

static void *alloc(wn_arena *arena, const char *name, size_t bytes) {
  void *memory;
  OK(wn_arena_alloc(arena, &memory, name, bytes));
  return memory;
}

static wn_arena_use use_of(const wn_arena *arena, const char *name) {
  for (int32_t i = 0; i < wn_arena_uses(arena); i++)
    if (strcmp(wn_arena_use_at(arena, i).name, name) == 0) return wn_arena_use_at(arena, i);
  fail_msg("no use of %s", name);
  return (wn_arena_use){0};
}

/* Of each name the most at once, and what was in use when the whole was fullest. */
static void what_is_in_use_at_the_peak(void **state) {
  (void)state;
  wn_arena *arena;
  OK(wn_arena_create(&arena, "test", 1 << 20));
  alloc(arena, "kept", 1000);
  size_t mark = wn_arena_mark(arena);
  alloc(arena, "early", 8192);
  wn_arena_release(arena, mark);
  alloc(arena, "early", 256);
  alloc(arena, "late", 16384);
  wn_arena_release(arena, mark);
  alloc(arena, "late", 256);
  assert_int_equal(use_of(arena, "kept").at_peak_bytes, 1024);
  assert_int_equal(use_of(arena, "early").peak_bytes, 8192);
  assert_int_equal(use_of(arena, "early").at_peak_bytes, 256);
  assert_int_equal(use_of(arena, "late").at_peak_bytes, 16384);
  size_t sum = 0;
  for (int32_t i = 0; i < wn_arena_uses(arena); i++) sum += wn_arena_use_at(arena, i).at_peak_bytes;
  assert_int_equal(sum, wn_arena_peak_bytes(arena));
  wn_arena_reset_peak(arena);
  assert_int_equal(use_of(arena, "early").peak_bytes, 0);
  assert_int_equal(use_of(arena, "late").at_peak_bytes, 256);
  assert_int_equal(wn_arena_held_bytes(arena), wn_arena_peak_bytes(arena));
  wn_arena_free(arena);
}

static void the_largest_tensor_of_a_name(void **state) {
  (void)state;
  wn_arena *arena;
  wn_tensor t;
  OK(wn_arena_create(&arena, "test", 1 << 20));
  alloc(arena, "bytes", 64);
  OK(wn_tensor_alloc(&t, arena, "rows", WN_F32, 2, 3, 50, 0, 0));
  OK(wn_tensor_alloc(&t, arena, "rows", WN_BF16, 3, 7, 11, 13, 0));
  OK(wn_tensor_alloc(&t, arena, "rows", WN_F64, 1, 5, 0, 0, 0));
  assert_int_equal(use_of(arena, "bytes").rank, 0);
  wn_arena_use rows = use_of(arena, "rows");
  assert_int_equal(rows.dtype, WN_BF16);
  assert_int_equal(rows.rank, 3);
  assert_true(rows.dim[0] == 7 && rows.dim[1] == 11 && rows.dim[2] == 13);
  wn_arena_free(arena);
}

/* Far more than a machine has, at addresses that are apart and aligned as real ones are. */
static void an_arena_that_only_counts(void **state) {
  (void)state;
  wn_arena *arena;
  const size_t terabyte = (size_t)1 << 40, page = (size_t)32 << 20;
  OK(wn_arena_create_counting(&arena, "test", page));
  char *first = alloc(arena, "first", terabyte + 1), *second = alloc(arena, "second", 3 * terabyte);
  assert_int_equal(second - first, (int64_t)(terabyte + WN_ARENA_ALIGN));
  assert_true((uintptr_t)first % WN_ARENA_ALIGN == 0);
  assert_int_equal(wn_arena_peak_bytes(arena), 4 * terabyte + WN_ARENA_ALIGN);
  assert_int_equal(wn_arena_held_bytes(arena), 4 * terabyte + page);
  alloc(arena, "third", 2000 * terabyte);
  assert_int_equal(wn_arena_peak_bytes(arena), 2004 * terabyte + WN_ARENA_ALIGN);
  REFUSED(wn_arena_alloc(arena, &(void *){NULL}, "fourth", 40000 * terabyte), WN_E_MEMORY, "has no room for fourth");
  wn_arena_free(arena);
}

/* As many as a step of many sequences has: each is found again when it is released. */
static void many_allocations(void **state) {
  (void)state;
  enum { MANY = 200000 };
  wn_arena *arena;
  OK(wn_arena_create_counting(&arena, "test", 0));
  size_t half = 0;
  for (int i = 0; i < MANY; i++) {
    if (i == MANY / 2) half = wn_arena_mark(arena);
    alloc(arena, i % 2 ? "odd" : "even", 1);
  }
  assert_int_equal(wn_arena_used_bytes(arena), MANY * WN_ARENA_ALIGN);
  wn_arena_release(arena, half);
  wn_arena_reset_peak(arena);
  assert_int_equal(use_of(arena, "odd").peak_bytes, MANY / 4 * WN_ARENA_ALIGN);
  assert_int_equal(use_of(arena, "even").at_peak_bytes, MANY / 4 * WN_ARENA_ALIGN);
  wn_arena_free(arena);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(what_is_in_use_at_the_peak),
                                     cmocka_unit_test(the_largest_tensor_of_a_name),
                                     cmocka_unit_test(an_arena_that_only_counts), cmocka_unit_test(many_allocations)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
