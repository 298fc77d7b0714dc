/* Names for one sentence: how many there are, and the first five. */
#ifndef WN_BASE_NAME_LIST_H
#define WN_BASE_NAME_LIST_H

#include <stdint.h>

#include "base/status.h"

enum { WN_NAME_LIST_BYTES = 1024, WN_SHAPE_TEXT_BYTES = 128 };

/* "a, b, c, d", or "a, b, c, d, e, ..." where there are more than five. Zeroed: empty. */
typedef struct wn_name_list {
  int64_t n;
  char text[WN_NAME_LIST_BYTES];
} wn_name_list;
void wn_name_list_add(wn_name_list *list, const char *format, ...) WN_PRINTF(2, 3);

/* "[3, 4]" */
void wn_shape_text(char out[WN_SHAPE_TEXT_BYTES], int32_t rank, const int64_t *dim);

#endif
