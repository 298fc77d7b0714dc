/* How a test's own program ends that mpirun starts as a rank. */
#ifndef WN_TEST_RANK_EXIT_H
#define WN_TEST_RANK_EXIT_H

#include <stdio.h>

#include "dist/world.h"

/* Says what went wrong, if anything did, frees both (NULL is fine), and returns the exit code. */
static inline int wn_rank_exit(wn_world *world, wn_status status) {
  if (status) fprintf(stderr, "rank says: %s (%s)\n", wn_status_text(status), wn_status_trace(status));
  int code = (int)wn_status_code(status);
  wn_status_free(status);
  wn_world_free(world);
  return code;
}

#endif
