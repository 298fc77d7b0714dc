/* Stretches of work with names, for profilers: NVTX ranges where the program was built with the CUDA Toolkit, nothing
 * elsewhere. Main thread; they nest. */
#ifndef WN_BASE_RANGE_H
#define WN_BASE_RANGE_H

#include <stdint.h>

void wn_range_begin(const char *name, int64_t number); /* "layer 7"; a number below 0 is left out */
void wn_range_end(void);

#endif
