/* The CPU device's arenas: what the machine cannot hold is refused, what it can is not. */
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

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(refuses_more_than_the_machine_has),
      cmocka_unit_test(takes_what_it_is_given),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
