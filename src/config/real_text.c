#include "config/real_text.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void wn_real_text(char out[WN_REAL_TEXT_BYTES], double value) {
  char digits[WN_REAL_TEXT_BYTES];
  int precision = 0; /* digits behind the first */
  do snprintf(digits, sizeof digits, "%.*e", precision, value);
  while (strtod(digits, NULL) != value && !isnan(value) && ++precision < 17);
  const char *e = strchr(digits, 'e');
  int exponent = e ? atoi(e + 1) : 0;
  if (!isfinite(value) || exponent < -4 || exponent >= 16) {
    snprintf(out, WN_REAL_TEXT_BYTES, "%s", digits);
    return;
  }
  int decimals = precision - exponent;
  snprintf(out, WN_REAL_TEXT_BYTES, "%.*f", decimals > 1 ? decimals : 1, value);
}
