/* Bisection on the integer image of the scores: each step counts, in one vector sweep, how many keys reach a
 * value. Nothing depends on how the scores are distributed, there are no buckets to overflow, and a row of
 * equal scores costs no more than another. It stops as soon as a value parts exactly k keys from the rest. */
#include "kernels/cpu/topk.h"

#include <string.h>

/* -0 maps to the image of 0, NaN to that of -inf */
static void order_keys(wn_score_key *restrict key, const wn_real *restrict score, int32_t count) {
  const wn_score_key magnitude = (wn_score_key)(((uint64_t)1 << (8 * sizeof(wn_score_key) - 1)) - 1);
  const int sign_shift = 8 * (int)sizeof(wn_score_key) - 1;
  for (int32_t i = 0; i < count; i++) {
    wn_real x = score[i] == score[i] ? score[i] : -(wn_real)__builtin_inf();
    x += 0; /* -0 + 0 is 0 */
    wn_score_key bits;
    memcpy(&bits, &x, sizeof bits);
    key[i] = bits ^ ((bits >> sign_shift) & magnitude);
  }
}

static int32_t count_reaching(const wn_score_key *key, int32_t count, wn_score_key value) {
  wn_score_key reached = 0;
  for (int32_t i = 0; i < count; i++) reached += key[i] >= value;
  return (int32_t)reached;
}

void wn_top_k(int32_t *pick, int64_t k, const wn_real *score, wn_score_key *key, int32_t count, int32_t base) {
  if (count <= k) {
    for (int32_t i = 0; i < count; i++) pick[i] = base + i;
    for (int64_t i = count; i < k; i++) pick[i] = -1;
    return;
  }
  order_keys(key, score, count);
  wn_score_key low = key[0], high = key[0];
  for (int32_t i = 1; i < count; i++) {
    low = key[i] < low ? key[i] : low;
    high = key[i] > high ? key[i] : high;
  }
  /* at least k keys reach low; fewer than k reach anything above high */
  int32_t reaching = count;
  while (low < high && reaching != k) {
    uint64_t gap = (uint64_t)high - (uint64_t)low;
    wn_score_key middle = (wn_score_key)((uint64_t)low + gap / 2 + gap % 2);
    int32_t reached = count_reaching(key, count, middle);
    if (reached >= k) {
      low = middle;
      reaching = reached;
    } else {
      high = middle - 1;
    }
  }
  /* keys that reach low are too many by `spare`: then low is the k-th largest, and its last bearers go */
  int32_t ties = (int32_t)k;
  if (reaching > k) {
    int32_t above = 0;
    for (int32_t i = 0; i < count; i++) above += key[i] > low;
    ties = (int32_t)k - above;
  }
  int64_t n = 0;
  for (int32_t i = 0; i < count && n < k; i++) {
    bool equal = reaching > k && key[i] == low;
    pick[n] = base + i;
    n += equal ? ties > 0 : key[i] >= low;
    ties -= equal;
  }
}
