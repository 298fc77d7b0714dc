#include "base/rng.h"

#include <math.h>

#include "base/status.h"

__extension__ typedef unsigned __int128 wn_wide;

static void philox(uint32_t counter[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++) {
    uint64_t a = (uint64_t)0xD2511F53u * counter[0], b = (uint64_t)0xCD9E8D57u * counter[2];
    uint32_t next[4] = {(uint32_t)(b >> 32) ^ counter[1] ^ key0, (uint32_t)b, (uint32_t)(a >> 32) ^ counter[3] ^ key1,
                        (uint32_t)a};
    for (int i = 0; i < 4; i++) counter[i] = next[i];
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

static void draw(uint64_t seed, wn_purpose purpose, uint64_t index, uint64_t out[2]) {
  uint32_t counter[4] = {(uint32_t)index, (uint32_t)(index >> 32), (uint32_t)purpose, 0};
  philox(counter, (uint32_t)seed, (uint32_t)(seed >> 32));
  out[0] = (uint64_t)counter[1] << 32 | counter[0];
  out[1] = (uint64_t)counter[3] << 32 | counter[2];
}

uint64_t wn_rng_u64(uint64_t seed, wn_purpose purpose, uint64_t index) {
  uint64_t words[2];
  draw(seed, purpose, index, words);
  return words[0];
}

double wn_rng_uniform(uint64_t seed, wn_purpose purpose, uint64_t index) {
  return (double)(wn_rng_u64(seed, purpose, index) >> 11) * 0x1p-53;
}

double wn_rng_normal(uint64_t seed, wn_purpose purpose, uint64_t index) {
  uint64_t words[2];
  draw(seed, purpose, index, words);
  double u = ((double)(words[0] >> 11) + 0.5) * 0x1p-53, v = (double)(words[1] >> 11) * 0x1p-53;
  return sqrt(-2.0 * log(u)) * cos(6.283185307179586476925 * v);
}

uint64_t wn_rng_below(uint64_t seed, wn_purpose purpose, uint64_t index, uint64_t n) {
  WN_ASSERT(n >= 1, "n is %llu", (unsigned long long)n);
  /* the high half of a 64 x 64 product; the bias is below n / 2^64 */
  return (uint64_t)(((wn_wide)wn_rng_u64(seed, purpose, index) * n) >> 64);
}

uint64_t wn_rng_permute(uint64_t seed, wn_purpose purpose, uint64_t n, uint64_t index) {
  WN_ASSERT(index < n, "index %llu of %llu", (unsigned long long)index, (unsigned long long)n);
  int half_bits = 1;
  while (half_bits < 32 && ((uint64_t)1 << (2 * half_bits)) < n) half_bits++;
  uint64_t mask = ((uint64_t)1 << half_bits) - 1, value = index;
  do { /* at most 4 expected rounds: the domain is under four times n */
    uint64_t left = value >> half_bits, right = value & mask;
    for (uint64_t round = 0; round < 6; round++) {
      uint64_t next = left ^ (wn_rng_u64(seed, purpose, (round + 1) << 56 | right) & mask);
      left = right;
      right = next;
    }
    value = left << half_bits | right;
  } while (value >= n);
  return value;
}
