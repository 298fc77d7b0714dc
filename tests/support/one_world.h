/* The one-rank world of a test program: pass make_world and free_world to cmocka_run_group_tests. */
#ifndef WN_TEST_ONE_WORLD_H
#define WN_TEST_ONE_WORLD_H

#include "dist/world.h"
#include "support/test.h"

static wn_world *world;

static int make_world(void **state) {
  (void)state;
  wn_status status = wn_world_create(&world, 60);
  wn_status_free(status);
  return status != NULL;
}

static int free_world(void **state) {
  (void)state;
  wn_world_free(world);
  return 0;
}

#endif
