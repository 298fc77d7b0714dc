/* The bytes of an indexed dataset, for its reader and its writer. All numbers are little-endian; nothing is aligned. */
#ifndef WN_DATA_DATASET_FORMAT_H
#define WN_DATA_DATASET_FORMAT_H

#include <stdint.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the file formats are little-endian");

#define WN_IDX_MAGIC "MMIDIDX\0" /* with the terminating NUL: 9 bytes */
#define WN_SCORED_MAGIC "WNSCORE1"

enum {
  WN_IDX_MAGIC_BYTES = 9,
  WN_IDX_VERSION_AT = 9,
  WN_IDX_DTYPE_AT = 17,
  WN_IDX_SEQUENCES_AT = 18,
  WN_IDX_DOCUMENTS_AT = 26, /* documents + 1 */
  WN_IDX_HEADER_BYTES = 34,
  WN_SCORED_MAGIC_BYTES = 8,
  WN_SCORED_HEADER_BYTES = 16 /* magic, u64 tokens */
};

/* Megatron's dtype codes; 6 and 7 are its float64 and float32, which hold no token ids. */
typedef enum wn_token_code {
  WN_TOKEN_U8 = 1,
  WN_TOKEN_I8 = 2,
  WN_TOKEN_I16 = 3,
  WN_TOKEN_I32 = 4,
  WN_TOKEN_I64 = 5,
  WN_TOKEN_U16 = 8
} wn_token_code;

static inline uint64_t wn_load_u64(const uint8_t *at) {
  uint64_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

static inline int64_t wn_load_i64(const uint8_t *at) {
  return (int64_t)wn_load_u64(at);
}

static inline int32_t wn_load_i32(const uint8_t *at) {
  int32_t value;
  memcpy(&value, at, sizeof value);
  return value;
}

#endif
