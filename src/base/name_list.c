#include "base/name_list.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void wn_name_list_add(wn_name_list *list, const char *format, ...) {
  enum { MOST_NAMED = 5 };
  size_t used = strlen(list->text);
  va_list args;
  va_start(args, format);
  if (list->n < MOST_NAMED) {
    if (list->n > 0) used += (size_t)snprintf(list->text + used, sizeof list->text - used, ", ");
    if (used < sizeof list->text) vsnprintf(list->text + used, sizeof list->text - used, format, args);
  } else if (list->n == MOST_NAMED && used + 6 < sizeof list->text) {
    memcpy(list->text + used, ", ...", 6);
  }
  va_end(args);
  list->n++;
}

void wn_shape_text(char out[WN_SHAPE_TEXT_BYTES], int32_t rank, const int64_t *dim) {
  size_t used = 1;
  memcpy(out, "[", 2);
  for (int32_t d = 0; d < rank; d++)
    used += (size_t)snprintf(out + used, WN_SHAPE_TEXT_BYTES - used, d ? ", %lld" : "%lld", (long long)dim[d]);
  snprintf(out + used, WN_SHAPE_TEXT_BYTES - used, "]");
}
