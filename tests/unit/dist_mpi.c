/* Several ranks. Started by hand this program is a cmocka test that starts itself under mpirun, once a case; a rank
 * runs the scenario named by its argument and ends like the program's main would: with the error's sentence and code.
 */
#include "support/test.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/float8.h"
#include "base/time.h"
#include "dist/store.h"
#include "kernels/cpu/cpu.h"

#define CHECK(condition)                                                                                               \
  do {                                                                                                                 \
    if (!(condition)) return WN_FAIL(WN_E_CHECK, "does not hold: %s", #condition);                                     \
  } while (0)

/* ---- what a rank does: collectives ----------------------------------------------------------------------------- */

enum { LONG_BYTES = 2 * (16 << 20) + 5 }; /* three messages, the last short */

static double value(int32_t rank, uint64_t a, uint64_t b) {
  return wn_rng_normal(1 + (uint64_t)rank, WN_RNG_TEST, a << 40 | b);
}

static void fill_bytes(uint8_t *at, int32_t rank, size_t n) {
  for (size_t i = 0; i < n; i++) at[i] = (uint8_t)(i * 7 + i / 251 + 31 * (size_t)rank);
}

static wn_status expect_bytes(const uint8_t *at, int32_t rank, size_t n) {
  for (size_t i = 0; i < n; i++)
    if (at[i] != (uint8_t)(i * 7 + i / 251 + 31 * (size_t)rank))
      return WN_FAIL(WN_E_CHECK, "byte %zu of rank %d's piece is wrong", i, rank);
  return NULL;
}

static wn_status check_gather(wn_group *group, size_t bytes) {
  int32_t size = wn_group_size(group), rank = wn_group_rank(group);
  uint8_t *all = calloc((size_t)size, bytes), *second = calloc((size_t)size, bytes), *piece = malloc(bytes);
  CHECK(all && second && piece);
  fill_bytes(piece, rank, bytes);
  WN_TRY(wn_group_gather(group, all, piece, bytes));
  for (int32_t r = 0; r < size; r++) WN_TRY(expect_bytes(all + (size_t)r * bytes, r, bytes));
  /* two under way, the second with its piece in place, other collectives between, waited for in the other order */
  wn_request *first_request, *second_request;
  memset(all, 0, (size_t)size * bytes);
  fill_bytes(second + (size_t)rank * bytes, rank + 3, bytes);
  WN_TRY(wn_group_gather_begin(group, &first_request, all, piece, bytes));
  WN_TRY(wn_group_gather_begin(group, &second_request, second, second + (size_t)rank * bytes, bytes));
  int64_t ones = 1;
  WN_TRY(wn_group_sum_i64(group, &ones, 1));
  CHECK(ones == size);
  WN_TRY(wn_request_wait(second_request));
  WN_TRY(wn_request_wait(first_request));
  for (int32_t r = 0; r < size; r++) {
    WN_TRY(expect_bytes(all + (size_t)r * bytes, r, bytes));
    WN_TRY(expect_bytes(second + (size_t)r * bytes, r + 3, bytes));
  }
  free(all);
  free(second);
  free(piece);
  return NULL;
}

static wn_status check_broadcast(wn_group *group, size_t bytes) {
  uint8_t *data = malloc(bytes);
  CHECK(data);
  for (int32_t root = 0; root < wn_group_size(group); root++) {
    memset(data, 0, bytes);
    if (wn_group_rank(group) == root) fill_bytes(data, root, bytes);
    WN_TRY(wn_group_broadcast(group, data, bytes, root));
    WN_TRY(expect_bytes(data, root, bytes));
  }
  free(data);
  return NULL;
}

/* Terms whose sum depends on the order: the result must be the rank-order one, to the bit, on every rank. */
static wn_status check_sums(wn_group *group) {
  enum { N = 101 };
  double x[N], expected[N] = {0};
  int64_t count[2] = {wn_group_rank(group), 1LL << 60}, ranks = wn_group_size(group);
  for (uint64_t i = 0; i < N; i++) {
    x[i] = value(wn_group_rank(group), 1, i) * (i % 3 ? 1 : 1e16);
    for (int32_t r = 0; r < ranks; r++) {
      double term = value(r, 1, i) * (i % 3 ? 1 : 1e16);
      expected[i] = r == 0 ? term : expected[i] + term;
    }
  }
  WN_TRY(wn_group_sum_f64(group, x, N));
  WN_TRY(wn_group_sum_i64(group, count, 2));
  CHECK(memcmp(x, expected, sizeof x) == 0);
  CHECK(count[0] == ranks * (ranks - 1) / 2 && count[1] == ranks << 60);
  return NULL;
}

/* Independent of the code under test: halves split at the largest power of two below the count. */
static double pairwise(const double *terms, int32_t n, bool single) {
  if (n == 1) return terms[0];
  int32_t half = 1;
  while (half * 2 < n) half *= 2;
  double a = pairwise(terms, half, single), b = pairwise(terms + half, n - half, single);
  return single ? (double)((float)a + (float)b) : a + b;
}

static wn_status check_reduce_scatter(wn_group *group, size_t n, wn_dtype dtype) {
  int32_t size = wn_group_size(group), rank = wn_group_rank(group), bytes = (int32_t)wn_dtype_bytes(dtype);
  bool single = dtype == WN_F32;
  int64_t total = (int64_t)n * size;
  void *memory = malloc((size_t)(2 * total + (int64_t)n) * (size_t)bytes);
  CHECK(memory);
  wn_tensor full = wn_tensor_of(memory, dtype, 1, total, 0, 0, 0);
  wn_tensor scratch = wn_tensor_of((char *)memory + total * bytes, dtype, 1, total, 0, 0, 0);
  wn_tensor piece = wn_tensor_of((char *)memory + 2 * total * bytes, dtype, 1, (int64_t)n, 0, 0, 0);
  for (int64_t i = 0; i < total; i++) wn_test_set(&full, i, value(rank, 2, (uint64_t)i));
  for (size_t i = 0; i < n; i++) wn_test_set(&piece, (int64_t)i, value(99, 3, i));
  WN_TRY(wn_group_reduce_scatter(group, piece.data, full.data, n, bytes, scratch.data));
  for (size_t i = 0; i < n; i++) {
    double terms[8], before = single ? (double)(float)value(99, 3, i) : value(99, 3, i);
    for (int32_t r = 0; r < size; r++) {
      terms[r] = value(r, 2, (uint64_t)rank * n + i);
      if (single) terms[r] = (double)(float)terms[r];
    }
    double sum = pairwise(terms, size, single), expected = single ? (double)((float)before + (float)sum) : before + sum;
    CHECK(wn_test_get(&piece, (int64_t)i) == expected);
  }
  free(memory);
  return NULL;
}

static wn_status check_agreement(wn_world *world) {
  int32_t rank = wn_world_rank(world);
  char sentence[64];
  WN_TRY(wn_world_agree(world, NULL));
  wn_status mine = rank == 1 ? WN_FAIL_HINT(WN_E_IO, "free some", "no room on rank 1") : NULL;
  wn_status agreed = wn_world_agree(world, mine);
  CHECK(wn_status_code(agreed) == WN_E_IO);
  CHECK(strcmp(wn_status_text(agreed), rank == 1 ? "no room on rank 1" : "rank 1 failed: no room on rank 1") == 0);
  CHECK(strcmp(wn_status_hint(agreed), "free some") == 0);
  wn_status_free(agreed);
  /* several fail: each keeps its own, the others hear of the lowest */
  mine = rank > 0 ? WN_FAIL(rank == 1 ? WN_E_INPUT : WN_E_MEMORY, "bad file %d", rank) : NULL;
  agreed = wn_world_agree(world, mine);
  CHECK(wn_status_code(agreed) == (rank <= 1 ? WN_E_INPUT : WN_E_MEMORY));
  snprintf(sentence, sizeof sentence, rank == 0 ? "rank 1 failed: bad file 1" : "bad file %d", rank);
  CHECK(strcmp(wn_status_text(agreed), sentence) == 0);
  CHECK(*wn_status_hint(agreed) == 0);
  wn_status_free(agreed);
  return wn_world_agree(world, NULL);
}

static wn_status check_wait_seconds(wn_world *world) {
  WN_TRY(wn_world_barrier(world));
  wn_world_take_wait_s(world);
  if (wn_world_rank(world) == 1) usleep(300000);
  WN_TRY(wn_world_barrier(world));
  double waited_s = wn_world_take_wait_s(world);
  if (wn_world_rank(world) == 0) CHECK(waited_s > 0.2 && waited_s < 5);
  CHECK(wn_world_take_wait_s(world) == 0);
  return NULL;
}

static wn_status collectives(wn_world *world, int32_t classes) {
  wn_group *groups[2] = {wn_world_all(world), NULL}, *none;
  WN_TRY(wn_world_split(world, &groups[1], classes));
  CHECK(wn_group_size(groups[1]) * classes == wn_world_size(world));
  CHECK(wn_group_rank(groups[1]) == wn_world_rank(world) / classes);
  wn_status refused = wn_world_split(world, &none, wn_world_size(world) + 1);
  CHECK(wn_status_code(refused) == WN_E_CONFIG);
  wn_status_free(refused);
  for (int32_t g = 0; g < 2; g++) {
    const size_t sizes[] = {1, 7, 4096, 70001, LONG_BYTES};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
      if (sizes[i] == LONG_BYTES && (g == 1 || wn_world_size(world) != 3)) continue; /* once is enough, for time */
      WN_TRY(check_gather(groups[g], sizes[i]));
      WN_TRY(check_broadcast(groups[g], sizes[i]));
    }
    WN_TRY(check_sums(groups[g]));
    const size_t counts[] = {1, 7, 2048, 5003};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
      WN_TRY(check_reduce_scatter(groups[g], counts[i], WN_F32));
      WN_TRY(check_reduce_scatter(groups[g], counts[i], WN_F64));
    }
  }
  WN_TRY(check_agreement(world));
  return check_wait_seconds(world);
}

/* ---- the store over two groups at once ------------------------------------------------------------------------- */

enum { MAX_PARAMS = 96, TEST_LAYERS = 4, EXPERTS = 4, MICRO_BATCHES = 3, PARTS = 2 };

typedef struct model {
  wn_param params[MAX_PARAMS];
  int32_t n, id[MAX_PARAMS]; /* id: the same on every rank that has the parameter */
} model;

static void add_param(model *m, int32_t id, int32_t layer, wn_kind kind, int32_t group, int64_t rows, int64_t columns) {
  wn_param *p = &m->params[m->n];
  *p = (wn_param){.layer = layer,
                  .kind = kind,
                  .role = kind == WN_BUFFER ? WN_STAT : WN_ACT,
                  .group = group,
                  .expert = -1,
                  .rank = columns ? 2 : 1,
                  .dim = {rows, columns}};
  snprintf(p->hf_name, sizeof p->hf_name, "layers.%d.%d", layer, id);
  m->id[m->n++] = id;
}

/* Frozen FP8 with its layer, over more than a block each way; and frozen experts in parts, FP8 and not. */
static void add_stored(model *m, int32_t layer, int32_t class, int32_t classes) {
  int32_t id = layer * 100 + 50;
  for (int32_t k = 0; k < 2; k++) {
    add_param(m, id++, layer, WN_FROZEN, 0, k ? 5 : 131, k ? 300 : 9);
    m->params[m->n - 1].fp8 = true;
  }
  for (int32_t e = 0; e < PARTS * EXPERTS; e++, id++) {
    if (e % classes != class) continue;
    add_param(m, id, layer, WN_FROZEN, 1, 3 + e, 133);
    m->params[m->n - 1].fp8 = layer == 3;
    m->params[m->n - 1].part = 1 + e / EXPERTS;
  }
}

static void build_model(model *m, int32_t class, int32_t classes) {
  m->n = 0;
  for (int32_t layer = 0; layer < TEST_LAYERS; layer++) {
    int32_t id = layer * 100;
    add_param(m, id++, layer, WN_BASE, 0, 5 + layer, 0);
    add_param(m, id++, layer, WN_FROZEN, 0, 17, 9);
    add_param(m, id++, layer, WN_INDEXER, 0, 13, 7);
    add_param(m, id++, layer, WN_BASE, 0, 31, 11 + layer * 20);
    if (layer == 2) continue; /* a layer without experts */
    add_param(m, id++, layer, WN_BUFFER, 0, EXPERTS, 0);
    for (int32_t e = 0; e < EXPERTS; e++, id++)
      if (e % classes == class) add_param(m, id, layer, WN_BASE, 1, 19, 6);
    if (layer % 2) add_stored(m, layer, class, classes);
  }
}

static int64_t elements_of(const wn_param *p) {
  return p->dim[0] * (p->rank > 1 ? p->dim[1] : 1);
}
static float weight(const model *m, int32_t param, int64_t i) {
  return (float)value(7, (uint64_t)m->id[param], (uint64_t)i);
}
static uint8_t code(const model *m, int32_t param, int64_t i) {
  return (uint8_t)((i * 41 + m->id[param] * 7) & 0xf7); /* never NaN */
}
static float block_scale(const model *m, int32_t param, int64_t block) {
  return 0.01f * (float)(1 + m->id[param] % 13 + 3 * block);
}
/* What an FP8 parameter is to operations: kernels/ has the proof of this arithmetic, here it only has to arrive. */
static float stored_weight(const model *m, int32_t param, int64_t i) {
  int64_t cols = m->params[param].dim[1], block = i / cols / 128 * ((cols + 127) / 128) + i % cols / 128;
  float product = wn_f32_from_e4m3(code(m, param, i)) * block_scale(m, param, block);
  return wn_f32_from_bf16(wn_bf16_from_f32(product));
}
static float gradient(const model *m, int32_t world_rank, int32_t micro, int32_t param, int64_t i) {
  return (float)value(10 + world_rank, (uint64_t)(m->id[param] + 1000 * micro), (uint64_t)i);
}

/* Fills pieces through their segments, and checks that the members' segments make up each parameter. */
static wn_status fill_pieces(wn_store *store, const model *m) {
  int64_t count[MAX_PARAMS] = {0};
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    wn_piece *piece = wn_store_piece(store, i);
    int64_t ranks = wn_group_size(wn_store_group(store, piece->group)), sizes[2] = {wn_tensor_count(&piece->master), 0};
    for (int32_t s = 0; s < piece->n_segments; s++) {
      wn_segment at = piece->segments[s];
      CHECK(at.count > 0 && at.first >= 0 && at.first + at.count <= elements_of(&m->params[at.param]));
      CHECK(at.offset >= sizes[1] && at.offset + at.count <= sizes[0]);
      sizes[1] = at.offset + at.count;
      count[at.param] += at.count;
      for (int64_t e = 0; e < at.count; e++)
        if (piece->fp8)
          ((uint8_t *)piece->master.data)[at.offset + e] = code(m, at.param, at.first + e);
        else
          wn_test_set(&piece->master, at.offset + e, weight(m, at.param, at.first + e));
    }
    CHECK(sizes[0] * ranks < 128 * 100);
    bool trains = piece->kind == WN_BASE || piece->kind == WN_INDEXER;
    CHECK((piece->grad.data != NULL) == trains && (piece->m.data != NULL) == trains &&
          (piece->v.data != NULL) == trains);
  }
  for (int32_t i = 0; i < m->n; i++) {
    if (!m->params[i].fp8) continue;
    wn_tensor scales = wn_store_scales(store, i);
    for (int64_t e = 0; e < wn_tensor_count(&scales); e++) wn_test_set(&scales, e, (double)block_scale(m, i, e));
  }
  for (int32_t group = 0; group < 2; group++) {
    int64_t of_group[MAX_PARAMS] = {0};
    for (int32_t i = 0; i < m->n; i++) of_group[i] = m->params[i].group == group ? count[i] : 0;
    WN_TRY(wn_group_sum_i64(wn_store_group(store, group), of_group, MAX_PARAMS));
    for (int32_t i = 0; i < m->n; i++)
      if (m->params[i].group == group) CHECK(of_group[i] == elements_of(&m->params[i]));
  }
  return NULL;
}

static wn_status expect_weights(const model *m, int32_t layer, int32_t part, const wn_tensor *by_param, float scale) {
  for (int32_t i = 0; i < m->n; i++) {
    const wn_tensor *t = &by_param[i];
    if (m->params[i].layer != layer || m->params[i].part != part) continue;
    CHECK(t->data && (uintptr_t)t->data % 256 == 0 && t->rank == m->params[i].rank);
    CHECK(t->dim[0] == m->params[i].dim[0] && wn_tensor_count(t) == elements_of(&m->params[i]));
    for (int64_t e = 0; e < wn_tensor_count(t); e++) {
      float expected = m->params[i].fp8 ? stored_weight(m, i, e) : scale * weight(m, i, e);
      if (t->dtype == WN_BF16) expected = wn_f32_from_bf16(wn_bf16_from_f32(expected));
      CHECK((float)wn_test_get(t, e) == expected);
    }
  }
  return NULL;
}

/* Twice through the parts of a layer's experts, one ahead, while the layer is held and the next is on its way. */
static wn_status check_parts(wn_store *store, const model *m, float scale) {
  wn_tensor held[MAX_PARAMS];
  for (int32_t layer = 1; layer < TEST_LAYERS; layer += 2) {
    WN_TRY(wn_store_acquire(store, layer, held));
    WN_TRY(wn_store_prefetch(store, layer - 1));
    WN_TRY(wn_store_prefetch_part(store, layer, 1));
    for (int32_t turn = 0; turn < 2 * PARTS; turn++) {
      int32_t part = 1 + turn % PARTS, next = 1 + (turn + 1) % PARTS;
      WN_TRY(wn_store_acquire_part(store, layer, part, held));
      if (turn + 1 < 2 * PARTS) WN_TRY(wn_store_prefetch_part(store, layer, next));
      WN_TRY(expect_weights(m, layer, part, held, scale));
      WN_TRY(wn_store_release_part(store, layer, part));
    }
    WN_TRY(expect_weights(m, layer, 0, held, scale));
    WN_TRY(wn_store_release(store, layer));
    WN_TRY(wn_store_release(store, layer - 1));
  }
  return NULL;
}

/* Forward order with one layer ahead, two held at once, then backward order; slots are reused all the time. */
static wn_status check_weights(wn_store *store, const model *m, float scale) {
  wn_tensor held[2][MAX_PARAMS];
  WN_TRY(wn_store_prefetch(store, 0));
  for (int32_t layer = 0; layer < TEST_LAYERS; layer++) {
    WN_TRY(wn_store_acquire(store, layer, held[layer % 2]));
    if (layer + 1 < TEST_LAYERS) WN_TRY(wn_store_prefetch(store, layer + 1));
    WN_TRY(expect_weights(m, layer, 0, held[layer % 2], scale));
    WN_TRY(wn_store_release(store, layer));
  }
  for (int32_t layer = TEST_LAYERS - 1; layer > 0; layer--) {
    WN_TRY(wn_store_acquire(store, layer, held[0]));
    WN_TRY(wn_store_acquire(store, layer - 1, held[1]));
    WN_TRY(expect_weights(m, layer - 1, 0, held[1], scale));
    WN_TRY(expect_weights(m, layer, 0, held[0], scale));
    WN_TRY(wn_store_release(store, layer));
    WN_TRY(wn_store_release(store, layer - 1));
  }
  WN_TRY(wn_store_prefetch(store, 3));
  return wn_store_release(store, 3); /* prefetched, never used */
}

static wn_status accumulate(wn_store *store, const model *m, int32_t world_rank, int32_t micro) {
  wn_tensor grads[MAX_PARAMS];
  for (int32_t layer = TEST_LAYERS - 1; layer >= 0; layer--) {
    WN_TRY(wn_store_grads(store, layer, grads));
    for (int32_t i = 0; i < m->n; i++) {
      const wn_param *p = &m->params[i];
      if (p->layer != layer) continue;
      bool trains = p->kind == WN_BASE || p->kind == WN_INDEXER;
      bool shared = wn_group_size(wn_store_group(store, p->group)) > 1;
      CHECK((grads[i].data != NULL) == trains);
      for (int64_t e = 0; trains && e < elements_of(p); e++) {
        float *g = (float *)grads[i].data + e;
        CHECK(!shared || *g == 0);
        *g += gradient(m, world_rank, micro, i, e);
      }
    }
    WN_TRY(wn_store_reduce(store, layer));
  }
  return NULL;
}

static wn_status expect_grads(wn_store *store, const model *m, int32_t world_rank, int32_t classes) {
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    const wn_piece *piece = wn_store_piece(store, i);
    int32_t size = wn_group_size(wn_store_group(store, piece->group));
    int32_t first = piece->group ? world_rank % classes : 0, step = piece->group ? classes : 1;
    for (int32_t s = 0; s < piece->n_segments && piece->grad.data; s++) {
      wn_segment at = piece->segments[s];
      for (int64_t e = 0; e < at.count; e++) {
        float expected = 0;
        for (int32_t micro = 0; micro < MICRO_BATCHES; micro++) {
          double terms[8];
          for (int32_t r = 0; r < size; r++)
            terms[r] = (double)gradient(m, first + r * step, micro, at.param, at.first + e);
          expected += (float)pairwise(terms, size, true);
        }
        CHECK((float)wn_test_get(&piece->grad, at.offset + e) == expected);
      }
    }
  }
  return NULL;
}

static wn_status store_step(wn_world *world, wn_device *device, int32_t classes) {
  int32_t rank = wn_world_rank(world);
  model m;
  wn_group *groups[2] = {wn_world_all(world), NULL};
  wn_store *store;
  WN_TRY(wn_world_split(world, &groups[1], classes));
  build_model(&m, rank % classes, classes);
  WN_TRY(wn_store_create(&store, device, world, groups, 2, m.params, m.n));
  WN_TRY(fill_pieces(store, &m));
  WN_TRY(wn_store_publish(store));
  WN_TRY(check_weights(store, &m, 1));
  WN_TRY(check_parts(store, &m, 1));
  for (int32_t micro = 0; micro < MICRO_BATCHES; micro++) WN_TRY(accumulate(store, &m, rank, micro));
  WN_TRY(expect_grads(store, &m, rank, classes));
  for (int32_t i = 0; i < wn_store_pieces(store); i++) { /* an update of the pieces is seen by the next gather */
    wn_piece *piece = wn_store_piece(store, i);
    for (int64_t e = 0; e < wn_tensor_count(&piece->master) && !piece->fp8; e++)
      wn_test_set(&piece->master, e, 2 * wn_test_get(&piece->master, e));
  }
  WN_TRY(wn_store_publish(store));
  WN_TRY(check_weights(store, &m, 2));
  WN_TRY(check_parts(store, &m, 2));
  CHECK(wn_arena_used_bytes(device->scratch) == 0);
  /* a rank with another table is found by all of its group */
  if (rank == 1) m.params[2].dim[0]++;
  wn_store *other;
  wn_status refused = wn_store_create(&other, device, world, groups, 2, m.params, m.n);
  CHECK(wn_status_code(refused) == WN_E_WORLD &&
        strstr(wn_status_text(refused), "of group 0 lay out different parameters"));
  wn_status_free(refused);
  wn_store_free(store);
  return NULL;
}

/* Weights as this device takes them, and in BF16, as a GPU does: a slot then holds units of both widths. */
static wn_status stores(wn_world *world, int32_t classes) {
  static const wn_dtype acts[] = {WN_F32, WN_BF16};
  for (size_t i = 0; i < sizeof acts / sizeof *acts; i++) {
    wn_device *device;
    WN_TRY(wn_cpu_create_f32(
        &device,
        (wn_cpu_settings){.threads = 1, .weights_bytes = 8 << 20, .stash_bytes = 1 << 12, .scratch_bytes = 1 << 20}));
    device->dtype_of[WN_ACT] = acts[i];
    WN_TRY(store_step(world, device, classes));
    wn_cpu_free_f32(device);
  }
  return NULL;
}

/* ---- ranks that go wrong --------------------------------------------------------------------------------------- */

static wn_status some_collectives(wn_world *world) {
  wn_group *all = wn_world_all(world);
  double x[64] = {0};
  for (int32_t i = 0; i < 3; i++) WN_TRY(wn_group_sum_f64(all, x, 64));
  return NULL;
}

/* Rank 1 does `scenario`, the others go on. */
static wn_status go_wrong(wn_world *world, const char *scenario) {
  bool culprit = wn_world_rank(world) == 1;
  WN_TRY(some_collectives(world));
  if (culprit && strcmp(scenario, "exit") == 0) exit(0);
  if (culprit && strcmp(scenario, "abort") == 0) abort();
  if (culprit && strcmp(scenario, "return") == 0) return NULL;
  if (culprit && strcmp(scenario, "fail") == 0) return WN_FAIL(WN_E_INPUT, "rank 1 cannot read its file");
  if (strcmp(scenario, "hang") == 0 || strcmp(scenario, "kill") == 0) wn_world_set_timeout(world, 2);
  if (culprit && strcmp(scenario, "hang") == 0) sleep(50);
  if (culprit && strcmp(scenario, "kill") == 0) raise(SIGKILL);
  if (strcmp(scenario, "astray") == 0) {
    int64_t y[3] = {0};
    WN_TRY(wn_group_sum_i64(wn_world_all(world), y, culprit ? 3 : 2));
    return WN_FAIL(WN_E_CHECK, "ranks at different points went on");
  }
  wn_status status = some_collectives(world);
  /* broken: everything after it fails at once, agreement too, so that the way out is short */
  double start = wn_time_s();
  for (int32_t i = 0; status && i < 3; i++) {
    wn_status again = wn_world_barrier(world), agreed = wn_world_agree(world, NULL);
    CHECK(wn_status_code(again) == WN_E_WORLD && wn_status_code(agreed) == WN_E_WORLD);
    wn_status_free(again);
    wn_status_free(agreed);
  }
  CHECK(wn_time_s() - start < 1);
  return status;
}

static int rank_main(const char *scenario, int32_t classes) {
  wn_world *world;
  wn_status status = wn_world_create(&world, 30);
  if (!status) {
    if (strcmp(scenario, "collectives") == 0)
      status = collectives(world, classes);
    else if (strcmp(scenario, "stores") == 0)
      status = stores(world, classes);
    else
      status = go_wrong(world, scenario);
    if (status)
      fprintf(stderr, "(%d) %s (%s)\n", wn_world_rank(world), wn_status_text(status), wn_status_trace(status));
    wn_world_free(world);
  } else {
    fprintf(stderr, "%s\n", wn_status_text(status));
  }
  int code = (int)wn_status_code(status);
  wn_status_free(status);
  return code;
}

/* ---- the test that starts the ranks ---------------------------------------------------------------------------- */

typedef struct outcome {
  int code;
  double seconds;
  char text[16384];
} outcome;

static void launch(void **state, outcome *out, const char *options, int32_t ranks, const char *scenario,
                   int32_t classes) {
  char command[4096];
  const char *self = *state;
  snprintf(command, sizeof command,
           "OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1 timeout 60 mpirun --allow-run-as-root --oversubscribe %s "
           "-np %d '%s' %s %d 2>&1",
           options, ranks, self, scenario, classes);
  double start = wn_time_s();
  FILE *pipe = popen(command, "r");
  assert_non_null(pipe);
  size_t used = fread(out->text, 1, sizeof out->text - 1, pipe);
  out->text[used] = 0;
  while (fgetc(pipe) != EOF) continue;
  int ended = pclose(pipe);
  out->code = WIFEXITED(ended) ? WEXITSTATUS(ended) : -1;
  out->seconds = wn_time_s() - start;
  if (getenv("WINNOW_TEST_VERBOSE"))
    print_message("%s, %d ranks: %.1f s, code %d\n%s", scenario, ranks, out->seconds, out->code, out->text);
}

static void must_hold(void **state, int32_t ranks, const char *scenario, int32_t classes) {
  outcome out;
  launch(state, &out, "", ranks, scenario, classes);
  if (out.code != 0) fail_msg("%s on %d ranks ended with %d: %s", scenario, ranks, out.code, out.text);
}

static void collectives_of_2(void **state) {
  must_hold(state, 2, "collectives", 1);
}
static void collectives_of_3(void **state) {
  must_hold(state, 3, "collectives", 3);
}
static void collectives_of_4(void **state) {
  must_hold(state, 4, "collectives", 2);
}
static void stores_of_2(void **state) {
  must_hold(state, 2, "stores", 2); /* expert groups of one rank: not gathered */
}
static void stores_of_3(void **state) {
  must_hold(state, 3, "stores", 1);
}
static void stores_of_4(void **state) {
  must_hold(state, 4, "stores", 2);
}

/* However a rank goes wrong, the run ends soon, with a code that is not 0, and, where a rank could still speak, with
 * a sentence. `code` -1: any but 0. */
static void must_end(void **state, const char *scenario, int32_t ranks, int code, double within_s,
                     const char *sentence) {
  outcome out;
  launch(state, &out, "", ranks, scenario, 1);
  if (out.code == 0 || (code >= 0 && out.code != code) || out.seconds > within_s || !strstr(out.text, sentence))
    fail_msg("%s ended with %d after %.1f s: %s", scenario, out.code, out.seconds, out.text);
}

static void a_rank_that_exits(void **state) {
  must_end(state, "exit", 3, -1, 20, "rank 1");
}
static void a_rank_that_aborts(void **state) {
  must_end(state, "abort", 3, -1, 20, "");
}
static void a_rank_that_returns_early(void **state) {
  must_end(state, "return", 2, WN_E_WORLD, 20, "rank 0 was left alone in sum: rank 1 has ended");
}
static void a_rank_that_fails_alone(void **state) {
  must_end(state, "fail", 3, WN_E_WORLD, 20, "rank 1 cannot read its file");
}
static void a_rank_that_hangs(void **state) {
  must_end(state, "hang", 2, WN_E_WORLD, 20, "rank 0 waited 2 s in sum: no answer from rank 1");
}
static void a_rank_at_another_point(void **state) {
  must_end(state, "astray", 2, WN_E_WORLD, 20, "the ranks are not at the same point");
}

/* A launcher that leaves the others alone when one dies: they must end by themselves, and say why. */
static void a_rank_that_vanishes(void **state) {
  outcome out;
  launch(state, &out, "--enable-recovery", 3, "kill", 1);
  if (out.seconds > 20 || !strstr(out.text, "rank 0 waited 2 s in sum: no answer from rank 1") ||
      !strstr(out.text, "rank 2 waited 2 s in sum: no answer from rank 1"))
    fail_msg("ended with %d after %.1f s: %s", out.code, out.seconds, out.text);
}

int main(int argc, char **argv) {
  if (argc == 3) return rank_main(argv[1], (int32_t)strtol(argv[2], NULL, 10));
  const struct CMUnitTest tests[] = {
      cmocka_unit_test_prestate(collectives_of_2, argv[0]),
      cmocka_unit_test_prestate(collectives_of_3, argv[0]),
      cmocka_unit_test_prestate(collectives_of_4, argv[0]),
      cmocka_unit_test_prestate(stores_of_2, argv[0]),
      cmocka_unit_test_prestate(stores_of_3, argv[0]),
      cmocka_unit_test_prestate(stores_of_4, argv[0]),
      cmocka_unit_test_prestate(a_rank_that_exits, argv[0]),
      cmocka_unit_test_prestate(a_rank_that_aborts, argv[0]),
      cmocka_unit_test_prestate(a_rank_that_vanishes, argv[0]),
      cmocka_unit_test_prestate(a_rank_that_returns_early, argv[0]),
      cmocka_unit_test_prestate(a_rank_that_fails_alone, argv[0]),
      cmocka_unit_test_prestate(a_rank_that_hangs, argv[0]),
      cmocka_unit_test_prestate(a_rank_at_another_point, argv[0]),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
