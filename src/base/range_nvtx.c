#include <nvtx3/nvToolsExt.h>
#include <stdio.h>

#include "base/range.h"

void wn_range_begin(const char *name, int64_t number) {
  char text[64];
  if (number >= 0) {
    snprintf(text, sizeof text, "%s %lld", name, (long long)number);
    name = text;
  }
  nvtxRangePushA(name);
}

void wn_range_end(void) {
  nvtxRangePop();
}
