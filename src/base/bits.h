/* A float's bits as a number, and back. */
#ifndef WN_BASE_BITS_H
#define WN_BASE_BITS_H

#include <stdint.h>
#include <string.h>

static inline uint32_t wn_bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float wn_float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

#endif
