#include "cli/environment.h"

#include <stdlib.h>
#include <unistd.h>

/* Long enough for a region's threads to meet on a quiet machine (some tens of microseconds). */
static const char spin_count[] = "1000";

void wn_environment_prepare(char **argv) {
  if (getenv("GOMP_SPINCOUNT") || getenv("OMP_WAIT_POLICY")) return;
  if (setenv("GOMP_SPINCOUNT", spin_count, 1) == 0)
    execv("/proc/self/exe", argv); /* failing that, the long spin serves */
}
