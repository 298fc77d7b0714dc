/* Jobs whose base is in FP8, on the CPU: tests/support/fp8_jobs.h says what is tested. */
#define FP8_DEVICE "cpu"
#define FP8_ACT_BYTES 4
#define FP8_RANKS 2
#include "support/fp8_jobs.h"

int main(void) {
  return fp8_main();
}
