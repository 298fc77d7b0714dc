/* What the fuzz targets share: files in memory, and mutations of inputs that consist of parts.
 *
 * The readers take paths. Below FUZZ_ROOT a few wrapped system calls (ld --wrap) serve files from memory, so that an
 * input costs no system call; a mapping is a block of exactly the file's length, so that AddressSanitizer sees the
 * first byte read beyond its end, which a real mapping would hide up to the end of the page. */
#ifndef WN_TESTS_FUZZ_H
#define WN_TESTS_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

#define FUZZ_ROOT "/fuzz"

/* The file at `path` (a string literal below FUZZ_ROOT, which is the one directory) holds a copy of `data`; NULL: it is
 * absent. */
void fuzz_file(const char *path, const void *data, size_t bytes);

/* A refusal: one sentence, with one of the codes that bad input may have. Frees it. */
void fuzz_refused(wn_status status, wn_code allowed);
/* Ends the process as a finding when a property does not hold. */
#define FUZZ_CHECK(condition) WN_ASSERT(condition, "a property of what was accepted does not hold")
/* Reads every byte, so that a sanitizer sees those that are not there. */
void fuzz_touch(const void *data, size_t bytes);

/* libFuzzer's own */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);

/* An input of parts laid end to end: mutates part `which` in place, moves those behind it, and gives the new size; the
 * lengths of the other parts stay. `part` holds the parts' lengths and is changed. */
size_t fuzz_mutate_part(uint8_t *data, size_t most, size_t *part, int n_parts, int which);
unsigned fuzz_random(unsigned *seed); /* a number from a seed of the mutator, and the next seed */

#endif
