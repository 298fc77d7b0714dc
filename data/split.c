#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/split.h"

#include <pcre2.h>
#include <stdint.h>
#include <stdlib.h>

/* White_Space spelled out: PCRE2's own \s has U+180E besides */
#define SPACE "\\t-\\r\\x{85}\\p{Z}"
static const char pattern[] = "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^" SPACE "\\p{L}\\p{N}]+"
                              "|[" SPACE "]+(?![^" SPACE "])|[" SPACE "]+";

struct wn_split {
  pcre2_code *code;
  pcre2_match_data *match;
};

static wn_status regex_error(const char *what, int error) {
  char text[160];
  pcre2_get_error_message(error, (PCRE2_UCHAR *)text, sizeof text);
  return WN_FAIL(WN_E_INPUT, "splitting text into words, %s: %s", what, text);
}

wn_status wn_split_create(wn_split **out) {
  int error = 0;
  size_t at;
  wn_split *split = calloc(1, sizeof *split);
  if (!split) return WN_FAIL(WN_E_MEMORY, "out of memory for the word pattern");
  split->code = pcre2_compile((PCRE2_SPTR)pattern, PCRE2_ZERO_TERMINATED, PCRE2_UTF, &error, &at, NULL);
  WN_ASSERT(split->code, "the word pattern does not compile: error %d at %zu", error, at);
  /* without JIT support matching goes on, slower */
  (void)pcre2_jit_compile(split->code, PCRE2_JIT_COMPLETE);
  split->match = pcre2_match_data_create(1, NULL);
  if (!split->match) {
    wn_split_free(split);
    return WN_FAIL(WN_E_MEMORY, "out of memory for the word pattern");
  }
  *out = split;
  return NULL;
}

void wn_split_free(wn_split *split) {
  if (!split) return;
  pcre2_match_data_free(split->match);
  pcre2_code_free(split->code);
  free(split);
}

/* Bytes of the UTF-8 character at text[0 .. n), n >= 1; 0 where there is none (RFC 3629: shortest form, no surrogates,
 * up to U+10FFFF: exactly what PCRE2 accepts, since it is told not to check again). */
static size_t character_bytes(const unsigned char *text, size_t n) {
  unsigned char lead = text[0];
  if (lead < 0x80) return 1;
  size_t bytes = lead >= 0xC2 && lead <= 0xDF ? 2 : (lead & 0xF0) == 0xE0 ? 3 : lead >= 0xF0 && lead <= 0xF4 ? 4 : 0;
  if (bytes == 0 || bytes > n) return 0;
  for (size_t i = 1; i < bytes; i++)
    if ((text[i] & 0xC0) != 0x80) return 0;
  if (lead == 0xE0 && text[1] < 0xA0) return 0;
  if (lead == 0xED && text[1] > 0x9F) return 0;
  if (lead == 0xF0 && text[1] < 0x90) return 0;
  if (lead == 0xF4 && text[1] > 0x8F) return 0;
  return bytes;
}

wn_status wn_split_next(wn_split *split, wn_split_cursor *c, const char **word, size_t *word_bytes) {
  const unsigned char *text = (const unsigned char *)c->text;
  *word = c->text + c->at;
  *word_bytes = 0;
  if (c->at == c->bytes) return NULL;
  if (c->at == c->valid_end) {
    size_t end = c->at, step;
    while (end < c->bytes && (step = character_bytes(text + end, c->bytes - end)) > 0) end += step;
    if (end == c->at) {
      while (end < c->bytes && character_bytes(text + end, c->bytes - end) == 0) end++;
      *word_bytes = end - c->at;
      c->at = c->valid_end = end;
      return NULL;
    }
    c->valid_end = end;
  }
  /* a run begins where the last one ended: nothing before it matters to the pattern */
  int found = pcre2_match(split->code, (PCRE2_SPTR)*word, c->valid_end - c->at, 0, PCRE2_ANCHORED | PCRE2_NO_UTF_CHECK,
                          split->match, NULL);
  if (found < 0) return regex_error("PCRE2", found);
  *word_bytes = pcre2_get_ovector_pointer(split->match)[1];
  WN_ASSERT(*word_bytes > 0, "an empty word at byte %zu", c->at);
  c->at += *word_bytes;
  return NULL;
}
