/* The parameter store in a world of one: its layout, what has memory, and that nothing is copied. */
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

#include "dist/store.h"
#include "kernels/cpu/cpu.h"

enum { N_PARAMS = 12, N_LAYERS = 4 };

/* Layers -1 .. 2 with every kind; dimensions are not multiples of anything. Experts come as in a model: consecutive. */
static const wn_param table[N_PARAMS] = {
    {.hf_name = "embed", .layer = -1, .kind = WN_BASE, .rank = 2, .dim = {37, 5}, .expert = -1, .decay = true},
    {.hf_name = "0.norm", .layer = 0, .kind = WN_FROZEN, .rank = 1, .dim = {7}, .expert = -1},
    {.hf_name = "0.index_k", .layer = 0, .kind = WN_INDEXER, .rank = 2, .dim = {13, 5}, .expert = -1},
    {.hf_name = "0.proj", .layer = 0, .kind = WN_FROZEN, .rank = 3, .dim = {3, 11, 5}, .expert = -1},
    {.hf_name = "0.index_bias", .layer = 0, .kind = WN_INDEXER, .rank = 1, .dim = {1}, .expert = -1},
    {.hf_name = "1.norm", .layer = 1, .kind = WN_BASE, .rank = 1, .dim = {64}, .expert = -1},
    {.hf_name = "1.router_bias", .layer = 1, .kind = WN_BUFFER, .rank = 1, .dim = {6}, .expert = -1},
    {.hf_name = "1.expert0", .layer = 1, .kind = WN_BASE, .group = 1, .rank = 2, .dim = {9, 7}, .expert = 0},
    {.hf_name = "1.expert1", .layer = 1, .kind = WN_BASE, .group = 1, .rank = 2, .dim = {9, 7}, .expert = 1},
    {.hf_name = "1.index_k", .layer = 1, .kind = WN_INDEXER, .rank = 2, .dim = {13, 5}, .expert = -1},
    {.hf_name = "1.proj", .layer = 1, .kind = WN_BASE, .rank = 2, .dim = {65, 2}, .expert = -1},
    {.hf_name = "2.head", .layer = 2, .kind = WN_BASE, .rank = 2, .dim = {37, 5}, .expert = -1},
};

typedef struct fixture {
  wn_device *device;
  wn_world *world;
  wn_group *groups[2];
  wn_store *store;
} fixture;

static int set_up(void **state) {
  static fixture f;
  OK(wn_cpu_create_f32(
      &f.device,
      (wn_cpu_settings){.threads = 1, .weights_bytes = 1 << 20, .stash_bytes = 1 << 12, .scratch_bytes = 1 << 20}));
  OK(wn_world_create(&f.world, 10));
  f.groups[0] = wn_world_all(f.world);
  OK(wn_world_split(f.world, &f.groups[1], 1));
  OK(wn_store_create(&f.store, f.device, f.world, f.groups, 2, table, N_PARAMS));
  *state = &f;
  return 0;
}

static int tear_down(void **state) {
  fixture *f = *state;
  wn_store_free(f->store);
  wn_world_free(f->world);
  wn_cpu_free_f32(f->device);
  return 0;
}

static int64_t count_of(const wn_param *p) {
  int64_t n = 1;
  for (int32_t i = 0; i < p->rank; i++) n *= p->dim[i];
  return n;
}

static void world_of_one(void **state) {
  fixture *f = *state;
  assert_int_equal(wn_world_size(f->world), 1);
  assert_int_equal(wn_world_rank(f->world), 0);
  assert_int_equal(wn_group_size(f->groups[0]), 1);
  double x[2] = {0.1, 0.2};
  int64_t n = 7;
  OK(wn_group_sum_f64(f->groups[0], x, 2));
  OK(wn_group_sum_i64(f->groups[0], &n, 1));
  assert_true(x[0] == 0.1 && x[1] == 0.2 && n == 7);
  float piece[3] = {1, 2, 3}, full[3] = {10, 20, 30}, out[3] = {0};
  OK(wn_group_reduce_scatter(f->groups[0], piece, full, 3, sizeof(float), NULL));
  assert_true(piece[0] == 11 && piece[1] == 22 && piece[2] == 33);
  OK(wn_group_gather(f->groups[0], out, piece, sizeof out));
  assert_memory_equal(out, piece, sizeof out);
  wn_request *request;
  OK(wn_group_gather_begin(f->groups[0], &request, out, full, sizeof out));
  OK(wn_request_wait(request));
  assert_memory_equal(out, full, sizeof out);
  OK(wn_world_barrier(f->world));
  OK(wn_group_broadcast(f->groups[0], out, sizeof out, 0));
  OK(wn_world_agree(f->world, NULL));
  REFUSED(wn_world_agree(f->world, WN_FAIL(WN_E_IO, "the disk is full")), WN_E_IO, "the disk is full");
  wn_group *none;
  REFUSED(wn_world_split(f->world, &none, 2), WN_E_CONFIG, "1 ranks cannot be split into 2");
  REFUSED(wn_world_split(f->world, &none, 0), WN_E_CONFIG, "into 0 classes");
  assert_true(wn_world_take_wait_s(f->world) == 0);
}

static void segments_cover_everything_once(void **state) {
  fixture *f = *state;
  int64_t seen[N_PARAMS] = {0};
  assert_int_equal(wn_store_pieces(f->store), 8);
  for (int32_t i = 0; i < wn_store_pieces(f->store); i++) {
    const wn_piece *piece = wn_store_piece(f->store, i);
    int64_t end = 0;
    if (i > 0) assert_true(piece[-1].layer <= piece->layer);
    for (int32_t s = 0; s < piece->n_segments; s++) {
      wn_segment at = piece->segments[s];
      const wn_param *p = &table[at.param];
      assert_true(p->layer == piece->layer && p->group == piece->group && p->kind == piece->kind);
      assert_true(at.offset >= end && at.offset * 4 % 256 == 0);
      assert_true(at.first == seen[at.param]);
      seen[at.param] += at.count;
      end = at.offset + at.count;
    }
    assert_true(end <= wn_tensor_count(&piece->master));
  }
  for (int32_t i = 0; i < N_PARAMS; i++) assert_int_equal(seen[i], count_of(&table[i]));
}

static void only_what_trains_has_optimizer_memory(void **state) {
  fixture *f = *state;
  for (int32_t i = 0; i < wn_store_pieces(f->store); i++) {
    const wn_piece *piece = wn_store_piece(f->store, i);
    bool trains = piece->kind == WN_BASE || piece->kind == WN_INDEXER;
    const wn_tensor *parts[] = {&piece->m, &piece->v, &piece->grad};
    for (int32_t k = 0; k < 3; k++) {
      assert_true((parts[k]->data != NULL) == trains);
      if (trains) assert_true(wn_tensor_same_shape(parts[k], &piece->master));
    }
    for (int64_t e = 0; e < wn_tensor_count(&piece->master); e++) assert_true(wn_test_get(&piece->master, e) == 0);
  }
}

/* Nothing is copied: what is written into a piece is read through the layer's weights, and gradients land in the piece.
 */
static void views_are_the_pieces(void **state) {
  fixture *f = *state;
  for (int32_t i = 0; i < wn_store_pieces(f->store); i++) {
    wn_piece *piece = wn_store_piece(f->store, i);
    for (int32_t s = 0; s < piece->n_segments; s++)
      for (int64_t e = 0; e < piece->segments[s].count; e++)
        wn_test_set(&piece->master, piece->segments[s].offset + e,
                    1000.0 * piece->segments[s].param + (double)(piece->segments[s].first + e));
  }
  for (int32_t layer = -1; layer <= 2; layer++) {
    wn_tensor weights[N_PARAMS] = {0}, grads[N_PARAMS] = {0};
    OK(wn_store_acquire(f->store, layer, weights));
    OK(wn_store_grads(f->store, layer, grads));
    for (int32_t i = 0; i < N_PARAMS; i++) {
      if (table[i].layer != layer) {
        assert_null(weights[i].data);
        continue;
      }
      bool trains = table[i].kind == WN_BASE || table[i].kind == WN_INDEXER;
      assert_int_equal(weights[i].rank, table[i].rank);
      assert_int_equal((uintptr_t)weights[i].data % 256, 0);
      for (int64_t e = 0; e < count_of(&table[i]); e++)
        assert_true(wn_test_get(&weights[i], e) == 1000.0 * i + (double)e);
      assert_true((grads[i].data != NULL) == trains);
      if (trains) assert_true(wn_tensor_same_shape(&grads[i], &weights[i]));
      if (trains) wn_test_set(&grads[i], 0, wn_test_get(&grads[i], 0) + 5 + i);
    }
    OK(wn_store_reduce(f->store, layer));
    OK(wn_store_release(f->store, layer));
  }
  for (int32_t i = 0; i < wn_store_pieces(f->store); i++) {
    wn_piece *piece = wn_store_piece(f->store, i);
    for (int32_t s = 0; s < piece->n_segments && piece->grad.data; s++) {
      assert_true(wn_test_get(&piece->grad, piece->segments[s].offset) == 5 + piece->segments[s].param);
      wn_test_set(&piece->grad, piece->segments[s].offset, 0);
    }
  }
  assert_int_equal(wn_arena_used_bytes(f->device->scratch), 0);
}

static void a_micro_batch_adds_to_the_last(void **state) {
  fixture *f = *state;
  for (int32_t pass = 1; pass <= 3; pass++) {
    wn_tensor grads[N_PARAMS];
    OK(wn_store_grads(f->store, 1, grads));
    wn_test_set(&grads[10], 129, wn_test_get(&grads[10], 129) + 1);
    OK(wn_store_reduce(f->store, 1));
  }
  wn_tensor grads[N_PARAMS];
  OK(wn_store_grads(f->store, 1, grads));
  assert_true(wn_test_get(&grads[10], 129) == 3);
  wn_test_set(&grads[10], 129, 0);
  OK(wn_store_reduce(f->store, 1));
}

static void two_layers_at_once(void **state) {
  fixture *f = *state;
  wn_tensor weights[N_PARAMS];
  OK(wn_store_prefetch(f->store, 0));
  OK(wn_store_prefetch(f->store, 1));
  OK(wn_store_prefetch(f->store, 0)); /* asked for already */
  OK(wn_store_acquire(f->store, 0, weights));
  OK(wn_store_acquire(f->store, 1, weights));
  OK(wn_store_release(f->store, 0));
  OK(wn_store_prefetch(f->store, 2));
  OK(wn_store_release(f->store, 2)); /* prefetched, never used */
  OK(wn_store_release(f->store, 1));
}

/* Frozen FP8 in a world of one: codes and scales are all there is, and what is acquired is their product. Layer 1 has
 * one matrix more that is not FP8, and a part of experts. */
static void fp8_is_stored_as_fp8(void **state) {
  fixture *f = *state;
  enum { N = 5, ROWS = 130, COLS = 70 };
  static const wn_param stored[N] = {
      {.hf_name = "0.q", .layer = 0, .kind = WN_FROZEN, .rank = 2, .dim = {ROWS, COLS}, .expert = -1, .fp8 = true},
      {.hf_name = "0.o", .layer = 0, .kind = WN_FROZEN, .rank = 2, .dim = {3, 200}, .expert = -1, .fp8 = true},
      {.hf_name = "1.q", .layer = 1, .kind = WN_FROZEN, .rank = 2, .dim = {ROWS, COLS}, .expert = -1, .fp8 = true},
      {.hf_name = "1.r", .layer = 1, .kind = WN_FROZEN, .rank = 2, .dim = {5, 7}, .expert = -1},
      {.hf_name = "1.e", .layer = 1, .kind = WN_FROZEN, .rank = 2, .dim = {9, 11}, .expert = 0, .part = 1, .fp8 = true},
  };
  wn_store *store;
  wn_tensor weights[N] = {0};
  OK(wn_store_create(&store, f->device, f->world, f->groups, 2, stored, N));
  assert_int_equal(wn_store_pieces(store), 4);
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    wn_piece *piece = wn_store_piece(store, i);
    assert_int_equal(piece->master.dtype, piece->fp8 ? WN_F8_E4M3 : WN_F32);
    for (int32_t s = 0; s < piece->n_segments; s++)
      for (int64_t e = 0; e < piece->segments[s].count; e++)
        if (piece->fp8)
          ((uint8_t *)piece->master.data)[piece->segments[s].offset + e] = (uint8_t)(0x38 + (e + i) % 8); /* 1 + n/8 */
  }
  for (int32_t i = 0; i < N; i++) {
    if (!stored[i].fp8) continue;
    wn_tensor scales = wn_store_scales(store, i);
    assert_int_equal(wn_tensor_count(&scales), i % 2 ? 2 : i == 4 ? 1 : 2);
    for (int64_t e = 0; e < wn_tensor_count(&scales); e++) wn_test_set(&scales, e, (double)(i + 1 + 4 * e));
  }
  OK(wn_store_prefetch(store, 0));
  for (int32_t layer = 0; layer < 2; layer++) {
    OK(wn_store_acquire(store, layer, weights));
    if (layer == 0) OK(wn_store_prefetch(store, 1));
    if (layer == 1) OK(wn_store_acquire_part(store, 1, 1, weights));
    for (int32_t i = 0; i < N; i++) {
      if (stored[i].layer != layer || !stored[i].fp8) continue;
      int32_t piece = i < 2 ? 0 : i == 2 ? 2 : 3; /* 1.r has a piece of its own, before 1.q's */
      assert_int_equal((uintptr_t)weights[i].data % 256, 0);
      for (int64_t e = 0; e < count_of(&stored[i]); e++) {
        int64_t block = e / stored[i].dim[1] / 128 * ((stored[i].dim[1] + 127) / 128) + e % stored[i].dim[1] / 128;
        double want = (1 + (double)((e + piece) % 8) / 8) * (double)(i + 1 + 4 * block);
        assert_true(wn_test_get(&weights[i], e) == want);
      }
    }
    if (layer == 1) OK(wn_store_release_part(store, 1, 1));
    OK(wn_store_release(store, layer));
  }
  wn_store_free(store);
}

/* Moments take half of the bytes in BF16, and nothing else changes. */
static void moments_may_be_bf16(void **state) {
  fixture *f = *state;
  wn_store *store;
  f->device->dtype_of[WN_MOMENT] = WN_BF16;
  OK(wn_store_create(&store, f->device, f->world, f->groups, 2, table, N_PARAMS));
  f->device->dtype_of[WN_MOMENT] = WN_F32;
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    const wn_piece *piece = wn_store_piece(store, i);
    if (!piece->m.data) continue;
    assert_int_equal(piece->m.dtype, WN_BF16);
    assert_int_equal(2 * wn_tensor_bytes(&piece->m), wn_tensor_bytes(&piece->master));
    assert_int_equal(2 * wn_tensor_bytes(&piece->v), wn_tensor_bytes(&piece->master));
  }
  wn_store_free(store);
}

static void table_is_printed(void **state) {
  fixture *f = *state;
  char text[4096] = "";
  FILE *out = fmemopen(text, sizeof text, "w");
  assert_non_null(out);
  wn_store_print(f->store, out);
  fclose(out);
  /* layer 1, group 0, base: 64 -> 64 and 130 -> 192 elements; master, two moments and a gradient of 4 bytes each */
  assert_non_null(strstr(text, "    1     0 base                256               4096\n"));
  assert_non_null(strstr(text, "    1     0 buffer               64                256\n"));
  assert_non_null(strstr(text, "    1     1 base                128               2048\n"));
}

/* A launcher that started several processes for another MPI must not give several worlds of one that overwrite each
 * other; only counts above one start MPI at all. Run last: this process cannot start MPI again. */
static void foreign_launcher_is_refused(void **state) {
  (void)state;
  wn_world *world;
  setenv("OMPI_COMM_WORLD_SIZE", "1", 1);
  OK(wn_world_create(&world, 10));
  wn_world_free(world);
  setenv("PMI_SIZE", "2", 1);
  unsetenv("OMPI_COMM_WORLD_SIZE");
  REFUSED(wn_world_create(&world, 10), WN_E_WORLD, "the launcher started 2 processes, but MPI sees a world of 1");
  unsetenv("PMI_SIZE");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(world_of_one),
      cmocka_unit_test(segments_cover_everything_once),
      cmocka_unit_test(only_what_trains_has_optimizer_memory),
      cmocka_unit_test(views_are_the_pieces),
      cmocka_unit_test(a_micro_batch_adds_to_the_last),
      cmocka_unit_test(two_layers_at_once),
      cmocka_unit_test(fp8_is_stored_as_fp8),
      cmocka_unit_test(moments_may_be_bf16),
      cmocka_unit_test(table_is_printed),
      cmocka_unit_test(foreign_launcher_is_refused),
  };
  return cmocka_run_group_tests(tests, set_up, tear_down);
}
