/* A base in FP8, as V3.1's is: stage 1 keeps it in FP8 and computes what it would with the same base dequantised, to
 * the bit; its checkpoints hold the base as it was; stage 2 trains from the dequantised values and writes floats. The
 * same tests run on either device: whoever includes this defines FP8_DEVICE ("cpu", "cuda"), FP8_ACT_BYTES (of a value
 * that operations take) and FP8_RANKS, how many there can be. */
#ifndef WN_TEST_FP8_JOBS_H
#define WN_TEST_FP8_JOBS_H

#include "support/fp8_model.h"

/* Widths of more than a block, none of them a multiple of one. */
static inline wn_model_config config_of_blocks(void) {
  wn_model_config config = tiny_config();
  config.hidden_size = 160;
  config.intermediate_size = 144;
  config.moe_intermediate_size = 136;
  config.q_lora_rank = 132;
  return config;
}

static inline int fp8_setup(void **state) {
  if (tiny_setup(state)) return -1;
  wn_model_config config = config_of_blocks();
  fp8_model(wn_temp(state, "base-fp8").text, &config, 5, 1, true, false);
  fp8_model(wn_temp(state, "base-wide").text, &config, 5, 1, false, false);
  return 0;
}

static inline void train_with(void **state, int32_t ranks, const char *stage, const char *init, const char *run,
                              int64_t steps, const char *more) {
  const char *dir = *state;
  wn_winnow_ends(0, ranks,
                 "%s %s/job.yaml init=%s/%s run_dir=%s/%s training.steps=%lld checkpoint.interval=4 "
                 "checkpoint.dtype=bf16 metrics.eval_every=2 device=" FP8_DEVICE " %s",
                 stage, dir, dir, init, dir, run, (long long)steps, more);
}

static inline void train(void **state, int32_t ranks, const char *stage, const char *init, const char *run,
                         int64_t steps) {
  train_with(state, ranks, stage, init, run, steps, "");
}

static inline wn_hf_dir *open_step(void **state, const char *run, int64_t step) {
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, tiny_step(state, run, step).text));
  return dir;
}

/* What both hold and what trained is the same to the bit. */
static inline void expect_same_indexers(void **state, const char *run, const char *other, int64_t step) {
  wn_hf_dir *a = open_step(state, run, step), *b = open_step(state, other, step);
  int32_t compared = 0;
  for (int64_t i = 0; i < wn_hf_dir_count(a); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(a, i, NULL), *there = wn_hf_dir_find(b, entry->name, NULL);
    if (!tiny_is_indexer(entry->name)) continue;
    if (!there || tiny_bits_differ(entry, there)) fail_msg("%s differs between %s and %s", entry->name, run, other);
    compared++;
  }
  assert_int_equal(compared, 3 * 5);
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
}

static inline bool config_speaks_of_fp8(const char *dir) {
  char path[WN_PATH_BYTES];
  OK(wn_path(path, "%s/config.json", dir));
  tiny_file file = tiny_read(path);
  bool found = strstr(file.text, "quantization_config") && strstr(file.text, "\"self_attn.indexer.wq_b\"");
  free(file.text);
  return found;
}

/* ---- stage 1 ---- */

static inline void warmup_computes_with_the_dequantised_weights(void **state) {
  train(state, 1, "warmup", "base-fp8", "warm-fp8", 6);
  train(state, 1, "warmup", "base-wide", "warm-wide", 6);
  tiny_expect_same_tables(state, "warm-fp8", "warm-wide");
  expect_same_indexers(state, "warm-fp8", "warm-wide", 6);
}

static inline void and_so_do_two_ranks(void **state) {
  if (FP8_RANKS < 2) skip();
  train(state, 2, "warmup", "base-fp8", "warm2-fp8", 5);
  train(state, 2, "warmup", "base-wide", "warm2-wide", 5);
  tiny_expect_same_tables(state, "warm2-fp8", "warm2-wide");
  expect_same_indexers(state, "warm2-fp8", "warm2-wide", 5);
}

/* Bytes of a name in the arenas' table of RUN/memory.txt. */
static inline int64_t memory_of(void **state, const char *run, const char *name) {
  char path[WN_PATH_BYTES], line[64];
  long long bytes = 0;
  OK(wn_path(path, "%s/%s/memory.txt", (const char *)*state, run));
  tiny_file file = tiny_read(path);
  snprintf(line, sizeof line, "weights    %s ", name);
  const char *found = strstr(file.text, line);
  if (found) assert_int_equal(sscanf(found + strlen(line), "%lld", &bytes), 1);
  free(file.text);
  return bytes;
}

/* Experts that are gathered in parts, one or three at a time, are the same experts, and take less memory at once. */
static inline void experts_in_parts_are_the_same(void **state) {
  static const char *const fp8[] = {"warm-fp8", "warm2-fp8"}, *const wide[] = {"warm-wide", "warm2-wide"};
  const int64_t expert = 3 * 160 * 136;
  char run[32], more[64];
  for (int32_t ranks = 1; ranks <= 2 && ranks <= FP8_RANKS; ranks++)
    for (int32_t k = 0; k < 3; k++) { /* four experts by threes are two and two */
      snprintf(more, sizeof more, "parallelism.most_gathered=%lld", (long long)(k == 1 ? 3 * expert : 1));
      snprintf(run, sizeof run, "parts-%d-%d", ranks, k);
      train_with(state, ranks, "warmup", k == 2 ? "base-wide" : "base-fp8", run, ranks == 1 ? 6 : 5, more);
      tiny_expect_same_tables(state, run, k == 2 ? wide[ranks - 1] : fp8[ranks - 1]);
      tiny_expect_same_tree(tiny_step(state, run, ranks == 1 ? 6 : 5).text,
                            tiny_step(state, k == 2 ? wide[ranks - 1] : fp8[ranks - 1], ranks == 1 ? 6 : 5).text);
      int64_t at_once = (k == 1 ? 2 : 1) * expert, slots = memory_of(state, run, "expert slots");
      int64_t widened = memory_of(state, run, "dequantised experts"), padding = 3 * 1024;
      int64_t bytes = k == 2 ? FP8_ACT_BYTES : 1; /* floats, or codes */
      if (ranks == 1) assert_int_equal(slots, 0);
      if (ranks == 2) assert_true(slots >= 2 * bytes * at_once && slots <= 2 * bytes * (at_once + padding));
      if (k == 2) assert_int_equal(widened, 0);
      if (k != 2) assert_true(widened >= FP8_ACT_BYTES * at_once && widened <= FP8_ACT_BYTES * (at_once + padding));
    }
}

/* The store's own table: codes take a byte, on a rank its share. */
static inline void the_base_takes_a_byte_a_weight(void **state) {
  wn_model_config config = config_of_blocks();
  wn_param_table table = tiny_table(&config);
  int64_t want = 0;
  for (int32_t i = 0; i < table.n; i++)
    if (fp8_is_quantised(&table.params[i]) && !tiny_is_indexer(table.params[i].hf_name))
      want += tiny_count(&table.params[i]);
  wn_param_table_free(&table);
  static const char *const runs[] = {"warm-fp8", "warm2-fp8"};
  for (int32_t ranks = 1; ranks <= 2 && ranks <= FP8_RANKS; ranks++) {
    char path[WN_PATH_BYTES];
    long long bytes = 0;
    OK(wn_path(path, "%s/%s/memory.txt", (const char *)*state, runs[ranks - 1]));
    tiny_file file = tiny_read(path);
    for (char *line = file.text, *next; line && *line; line = next) {
      long long own;
      next = strchr(line, '\n');
      next = next ? next + 1 : NULL;
      if (sscanf(line, "%*d %*d fp8 %*d %lld", &own) == 1) bytes += own;
    }
    free(file.text);
    /* padding and scales beside the codes */
    if (bytes * ranks < want || bytes * ranks > want + want / 20 + 200000)
      fail_msg("%lld bytes on each of %d ranks for %lld weights", bytes, ranks, (long long)want);
  }
}

/* Linked as it was, scales and all; the configuration says so, and what is not FP8 in it. */
static inline void checkpoints_hold_the_base_as_it_was(void **state) {
  wn_temp_path base = wn_temp(state, "base-fp8"), after = tiny_step(state, "warm-fp8", 6);
  wn_hf_dir *a, *b = open_step(state, "warm-fp8", 6);
  OK(wn_hf_dir_open(&a, base.text));
  int64_t indexers = 0;
  for (int64_t i = 0; i < wn_hf_dir_count(b); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(b, i, NULL), *before = wn_hf_dir_find(a, entry->name, NULL);
    if (tiny_is_indexer(entry->name))
      indexers++;
    else if (!before || before->dtype != entry->dtype || tiny_bits_differ(entry, before))
      fail_msg("%s is not what it was", entry->name);
  }
  assert_int_equal(wn_hf_dir_count(b), wn_hf_dir_count(a) + indexers);
  struct stat theirs, ours;
  assert_int_equal(stat(wn_hf_dir_shard_path(a, 0), &theirs), 0);
  assert_int_equal(stat(wn_hf_dir_shard_path(b, 0), &ours), 0);
  assert_true(theirs.st_ino == ours.st_ino);
  assert_true(config_speaks_of_fp8(after.text));
  assert_false(config_speaks_of_fp8(tiny_step(state, "warm-wide", 6).text));
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
}

/* From its own checkpoint, with the init gone. */
static inline void a_resumed_warmup_is_the_same(void **state) {
  wn_temp_path base = wn_temp(state, "base-fp8"), away = wn_temp(state, "base-away");
  train(state, 1, "warmup", "base-fp8", "warm-again", 4);
  assert_int_equal(rename(base.text, away.text), 0);
  train(state, 1, "warmup", "base-fp8", "warm-again", 6);
  assert_int_equal(rename(away.text, base.text), 0);
  tiny_expect_same_tables(state, "warm-again", "warm-fp8");
  tiny_expect_same_tree(tiny_step(state, "warm-again", 6).text, tiny_step(state, "warm-fp8", 6).text);
}

/* ---- stage 2 ---- */

static inline void adapt_trains_from_the_dequantised_weights(void **state) {
  train(state, 1, "adapt", "warm-fp8/checkpoints/step-000006", "adapt-fp8", 3);
  train(state, 1, "adapt", "warm-wide/checkpoints/step-000006", "adapt-wide", 3);
  tiny_expect_same_tables(state, "adapt-fp8", "adapt-wide");
  wn_hf_dir *a = open_step(state, "adapt-fp8", 3), *b = open_step(state, "adapt-wide", 3);
  assert_int_equal(wn_hf_dir_count(a), wn_hf_dir_count(b));
  for (int64_t i = 0; i < wn_hf_dir_count(a); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(a, i, NULL), *there = wn_hf_dir_find(b, entry->name, NULL);
    assert_true(entry->dtype == WN_BF16 || entry->dtype == WN_F32);
    if (!there || tiny_bits_differ(entry, there)) fail_msg("%s differs", entry->name);
  }
  assert_false(config_speaks_of_fp8(tiny_step(state, "adapt-fp8", 3).text));
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
}

static inline int fp8_main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(warmup_computes_with_the_dequantised_weights),
      cmocka_unit_test(and_so_do_two_ranks),
      cmocka_unit_test(experts_in_parts_are_the_same),
      cmocka_unit_test(the_base_takes_a_byte_a_weight),
      cmocka_unit_test(checkpoints_hold_the_base_as_it_was),
      cmocka_unit_test(a_resumed_warmup_is_the_same),
      cmocka_unit_test(adapt_trains_from_the_dequantised_weights),
  };
  return cmocka_run_group_tests(tests, fp8_setup, wn_temp_teardown);
}

#endif
