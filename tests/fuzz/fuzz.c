#include "fuzz.h"

#include <string.h>

void fuzz_refused(wn_status status, wn_code allowed) {
  wn_code code = wn_status_code(status);
  const char *text = wn_status_text(status);
  WN_ASSERT(code == allowed || code == WN_E_MEMORY, "refused with code %d: %s", (int)code, text);
  WN_ASSERT(text[0], "refused without a sentence");
  for (; *text; text++) WN_ASSERT((unsigned char)*text >= 0x20 && *text != 0x7f, "a control character in a sentence");
  wn_status_free(status);
}

void fuzz_touch(const void *data, size_t bytes) {
  const unsigned char *at = data;
  unsigned char all = 0;
  for (size_t i = 0; i < bytes; i++) all ^= at[i];
  __asm__ volatile("" ::"r"(all)); /* so that the reads are not left out */
}

unsigned fuzz_random(unsigned *seed) {
  *seed = *seed * 1664525u + 1013904223u;
  return *seed >> 8;
}

size_t fuzz_mutate_part(uint8_t *data, size_t most, size_t *part, int n_parts, int which) {
  size_t before = 0, after = 0;
  for (int i = 0; i < which; i++) before += part[i];
  for (int i = which + 1; i < n_parts; i++) after += part[i];
  WN_ASSERT(before + part[which] + after <= most, "parts of more than %zu bytes", most);
  /* the parts behind stand aside at the end while this one grows or shrinks */
  memmove(data + most - after, data + before + part[which], after);
  size_t room = most - before - after;
  part[which] = room ? LLVMFuzzerMutate(data + before, part[which], room) : 0;
  memmove(data + before + part[which], data + most - after, after);
  return before + part[which] + after;
}
