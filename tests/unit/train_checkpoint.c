/* Saving and loading on one rank: what comes back, what the files are, what is linked, and which checkpoints stand. */
#include "support/checkpoint.h"

#include "base/float8.h"
#include "support/one_world.h"

#include <fcntl.h>
#include <sys/stat.h>

static const wn_param_settings all_f32 = {.train_base = true, .train_indexer = true, .file_dtype = WN_F32};
static const wn_param_settings all_bf16 = {.train_base = true, .train_indexer = true, .file_dtype = WN_BF16};
static const wn_param_settings indexer_f32 = {.train_indexer = true, .file_dtype = WN_F32};
static const wn_param_settings indexer_bf16 = {.train_indexer = true, .file_dtype = WN_BF16};

static const char *run_dir(void **state) {
  static char path[300];
  snprintf(path, sizeof path, "%s", wn_temp(state, "run").text);
  return path;
}

static void step_path(char path[WN_PATH_BYTES], void **state, int64_t step) {
  OK(wn_path(path, "%s/checkpoints/" WN_STEP_FORMAT, run_dir(state), (long long)step));
}

static void save_step(test_rig *rig, int64_t step, uint64_t seed) {
  wn_state at = test_state;
  at.step = step;
  OK(test_values(rig, TEST_FILL, seed, false, false));
  OK(wn_checkpoint_save(&rig->plan, &at));
}

/* ---- round trips ---- */

static void round_trip(void **state, wn_param_settings settings) {
  test_rig rig;
  bool found;
  char path[WN_PATH_BYTES];
  wn_state read = {0};
  OK(test_rig_create(&rig, world, &test_config, settings, WN_STAGE_ADAPT, run_dir(state), ""));
  OK(wn_checkpoint_newest(&rig.plan, path, &found));
  assert_false(found);
  save_step(&rig, test_state.step, 1);
  OK(test_values(&rig, TEST_CLEAR, 0, false, false));
  OK(wn_checkpoint_newest(&rig.plan, path, &found));
  assert_true(found);
  assert_string_equal(strrchr(path, '/'), "/step-000100");
  OK(wn_checkpoint_verify(path));
  OK(wn_checkpoint_load(&rig.plan, path, &read));
  OK(test_values(&rig, TEST_COMPARE, 1, false, false));
  OK(test_same_state(&read, &test_state));
  /* as init: the weights alone, rounded where the model files are */
  OK(test_values(&rig, TEST_CLEAR, 0, false, false));
  OK(wn_init_load(&rig.plan, path, false));
  OK(test_values(&rig, TEST_COMPARE, 1, true, settings.file_dtype == WN_BF16));
  REFUSED(test_values(&rig, TEST_COMPARE, 1, false, settings.file_dtype == WN_BF16), WN_E_CHECK, ".m");
  test_rig_free(&rig);
}

static void round_trip_f32(void **state) {
  round_trip(state, all_f32);
}
static void round_trip_bf16(void **state) {
  round_trip(state, all_bf16);
}

/* A frozen random base has no source to link: it is written, in FP32 even where the job's dtype is BF16. */
static void round_trip_frozen_random(void **state) {
  test_rig rig;
  char path[WN_PATH_BYTES];
  wn_state read;
  OK(test_rig_create(&rig, world, &test_config, indexer_bf16, WN_STAGE_WARMUP, run_dir(state), ""));
  for (int64_t step = 1; step <= 2; step++) {
    save_step(&rig, step, 1);
    OK(test_values(&rig, TEST_CLEAR, 0, false, false));
    step_path(path, state, step);
    OK(wn_checkpoint_load(&rig.plan, path, &read));
    OK(test_values(&rig, TEST_COMPARE, 1, false, false));
  }
  test_rig_free(&rig);
}

/* A warm-up that was saved before its first update has an indexer that adapt must not accept. */
static void the_warm_up_is_part_of_the_state(void **state) {
  test_rig rig;
  char path[WN_PATH_BYTES];
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_WARMUP, run_dir(state), ""));
  for (int64_t step = 1; step <= 2; step++) {
    wn_state at = test_state, read;
    at.step = step;
    at.indexer_trained = step == 2;
    OK(test_values(&rig, TEST_FILL, 1, false, false));
    OK(wn_checkpoint_save(&rig.plan, &at));
    step_path(path, state, step);
    OK(wn_checkpoint_load(&rig.plan, path, &read));
    OK(test_same_state(&read, &at));
  }
  test_rig_free(&rig);
}

/* ---- the files ---- */

static void dtypes_and_names(void **state) {
  test_rig rig;
  char path[WN_PATH_BYTES];
  wn_hf_dir *dir;
  wn_optimizer_files optimizer;
  OK(test_rig_create(&rig, world, &test_config, all_bf16, WN_STAGE_ADAPT, run_dir(state), ""));
  save_step(&rig, 7, 3);
  step_path(path, state, 7);
  OK(wn_hf_dir_open(&dir, path));
  OK(wn_optimizer_open(&optimizer, path));
  assert_true(wn_hf_dir_shards(dir) > 1 && optimizer.n > 1);
  assert_int_equal(wn_hf_dir_count(dir), rig.model->table.n);
  int64_t n_optimizer = 0, expected = 0;
  for (size_t i = 0; i < optimizer.n; i++) n_optimizer += wn_safetensors_count(optimizer.files[i]);
  for (int32_t i = 0; i < rig.model->table.n; i++) {
    const wn_param *p = &rig.model->table.params[i];
    bool wide = p->slot == WN_P_ROUTER_BIAS || p->slot == WN_P_INDEX_K_NORM || p->slot == WN_P_INDEX_K_NORM_BIAS;
    const wn_st_entry *entry = wn_hf_dir_find(dir, p->hf_name, NULL);
    assert_non_null(entry);
    assert_int_equal(entry->dtype, wide ? WN_F32 : WN_BF16);
    assert_int_equal((uintptr_t)entry->data % (uintptr_t)wn_dtype_bytes(entry->dtype), 0);
    bool trained = p->slot != WN_P_ROUTER_BIAS;
    assert_int_equal(wn_optimizer_find(&optimizer, p, WN_FIELD_MASTER) != NULL, trained && !wide);
    assert_int_equal(wn_optimizer_find(&optimizer, p, WN_FIELD_M) != NULL, trained);
    assert_int_equal(wn_optimizer_find(&optimizer, p, WN_FIELD_V) != NULL, trained);
    expected += trained ? (wide ? 2 : 3) : 0;
  }
  assert_int_equal(n_optimizer, expected);
  wn_optimizer_close(&optimizer);
  wn_hf_dir_close(dir);
  test_rig_free(&rig);
}

static bool same_inode(const char *a, const char *b) {
  struct stat x, y;
  assert_int_equal(stat(a, &x), 0);
  assert_int_equal(stat(b, &y), 0);
  return x.st_ino == y.st_ino && x.st_dev == y.st_dev;
}

static void expect_linked(const char *from_dir, const char *from, const char *to_dir, const char *to) {
  char a[WN_PATH_BYTES], b[WN_PATH_BYTES];
  OK(wn_path(a, "%s/%s", from_dir, from));
  OK(wn_path(b, "%s/%s", to_dir, to));
  if (!same_inode(a, b)) fail_msg("%s is not %s", b, a);
}

/* Every tensor of `init` that is not trained stands in `path`, bit for bit. */
static void expect_base_unchanged(const test_rig *rig, const char *init, const char *path) {
  wn_hf_dir *before, *after;
  wn_names names;
  OK(wn_hf_dir_open(&before, init));
  OK(wn_hf_dir_open(&after, path));
  OK(wn_names_create(&names, rig->model->table.params, rig->model->table.n));
  for (int64_t i = 0; i < wn_hf_dir_count(before); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(before, i, NULL);
    int32_t p = wn_names_find(&names, entry->name);
    if (p >= 0 && names.params[p].kind != WN_FROZEN) continue;
    if (!test_same_bytes(entry, wn_hf_dir_find(after, entry->name, NULL))) fail_msg("%s changed", entry->name);
  }
  wn_names_free(&names);
  wn_hf_dir_close(before);
  wn_hf_dir_close(after);
}

/* A warm-up from a base without an indexer; the base's dtype is not the job's, and stays what it is. */
static void warm_up_taking(wn_dtype act, void **state, test_dir how, wn_param_settings settings,
                           int32_t linked_from_init, int32_t model_files) {
  test_rig rig;
  char init[300], first[WN_PATH_BYTES], second[WN_PATH_BYTES], name[64];
  wn_model_config base = test_config;
  wn_state read;
  base.has_indexer = how.without == NULL || strcmp(how.without, "indexer") != 0;
  snprintf(init, sizeof init, "%s", wn_temp(state, "init").text);
  test_dir_write(init, &base, how, 5);
  OK(test_rig_create_taking(act, &rig, world, &test_config, settings, WN_STAGE_WARMUP, run_dir(state), init));
  OK(wn_init_load(&rig.plan, init, true));
  wn_state at = test_state;
  at.step = 1;
  OK(wn_checkpoint_save(&rig.plan, &at));
  step_path(first, state, 1);
  OK(wn_checkpoint_verify(first));
  expect_base_unchanged(&rig, init, first);
  OK(wn_path(second, "%s/model.safetensors", first));
  assert_false(wn_path_exists(second)); /* transformers would prefer it to the index */
  for (int32_t i = 0; i < linked_from_init; i++) {
    char from[64];
    if (how.shards == 1)
      snprintf(from, sizeof from, "model.safetensors");
    else
      snprintf(from, sizeof from, "model-%05d-of-%05d.safetensors", i + 1, how.shards);
    snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", i + 1, model_files);
    expect_linked(init, from, first, name);
  }
  /* init goes away: the run's own checkpoint has all of it, and the next one has the same files */
  OK(wn_remove_tree(init));
  at.step = 2;
  OK(wn_checkpoint_save(&rig.plan, &at));
  step_path(second, state, 2);
  OK(wn_checkpoint_verify(second));
  expect_base_unchanged(&rig, first, second);
  for (int32_t i = 0; i < model_files - 1; i++) {
    snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", i + 1, model_files);
    expect_linked(first, name, second, name);
  }
  OK(wn_checkpoint_load(&rig.plan, second, &read));
  OK(test_same_state(&read, &at));
  test_rig_free(&rig);
}

static void warm_up(void **state, test_dir how, wn_param_settings settings, int32_t linked_from_init,
                    int32_t model_files) {
  warm_up_taking(WN_F32, state, how, settings, linked_from_init, model_files);
}

static void links_a_single_file(void **state) {
  warm_up(state, (test_dir){.dtype = WN_BF16, .shards = 1, .without = "indexer"}, indexer_f32, 1, 2);
}

static void links_shards_and_mtp(void **state) {
  warm_up(state, (test_dir){.dtype = WN_F16, .shards = 3, .mtp = true, .without = "indexer"}, indexer_bf16, 3, 4);
}

/* A V3.2 model warmed up again: its shards mix what is frozen with what trains, so the frozen is copied, as it is. */
static void copies_out_of_mixed_shards(void **state) {
  warm_up(state, (test_dir){.dtype = WN_BF16, .shards = 1, .mtp = true}, indexer_f32, 0, 2);
}

/* Some shards can be linked, some hold a trained tensor: the linked ones come first, whatever stood between them. */
static void links_what_it_can(void **state) {
  warm_up(state, (test_dir){.dtype = WN_F32, .shards = 12, .mtp = true}, indexer_f32, 1, 9);
}

/* A GPU holds the frozen base in BF16: its files keep what BF16 cannot, and an exchanged base is still seen. */
static void a_base_held_in_bf16(void **state) {
  warm_up_taking(WN_BF16, state, (test_dir){.dtype = WN_F32, .shards = 12, .mtp = true}, indexer_f32, 1, 9);
}

/* A base on another file system cannot be hard-linked: a symbolic link leads to the file itself, from every later
 * checkpoint too. */
static void links_across_file_systems(void **state) {
  test_rig rig;
  char init[] = "/dev/shm/wn-test-XXXXXX", first[WN_PATH_BYTES], path[WN_PATH_BYTES], target[WN_PATH_BYTES];
  struct stat there, here;
  wn_model_config base = test_config;
  wn_state read, at = test_state;
  base.has_indexer = false;
  if (!mkdtemp(init) || stat(init, &there) != 0 || stat(*state, &here) != 0 || there.st_dev == here.st_dev) {
    print_message("skipped: no second file system at /dev/shm\n");
    skip();
  }
  test_dir_write(init, &base, (test_dir){.dtype = WN_F32, .shards = 1}, 5);
  OK(test_rig_create(&rig, world, &test_config, indexer_f32, WN_STAGE_WARMUP, run_dir(state), init));
  OK(wn_init_load(&rig.plan, init, true));
  for (at.step = 1; at.step <= 2; at.step++) {
    OK(wn_checkpoint_save(&rig.plan, &at));
    step_path(first, state, at.step);
    OK(wn_checkpoint_verify(first));
    OK(wn_path(path, "%s/model-00001-of-00002.safetensors", first));
    ssize_t length = readlink(path, target, sizeof target - 1);
    assert_true(length > 0);
    target[length] = 0;
    assert_memory_equal(target, init, strlen(init));
    OK(wn_checkpoint_load(&rig.plan, first, &read));
  }
  OK(wn_remove_tree(init));
  REFUSED(wn_checkpoint_verify(first), WN_E_INPUT, "model-00001-of-00002.safetensors is missing");
  test_rig_free(&rig);
}

/* Training everything carries a multi-token-prediction layer through, from init and then from checkpoint to checkpoint.
 */
static void carries_mtp_through(void **state) {
  test_rig rig;
  char init[300], path[WN_PATH_BYTES];
  snprintf(init, sizeof init, "%s", wn_temp(state, "init").text);
  test_dir_write(init, &test_config, (test_dir){.dtype = WN_F32, .shards = 2, .mtp = true}, 5);
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_ADAPT, run_dir(state), init));
  OK(wn_init_load(&rig.plan, init, false));
  OK(test_values(&rig, TEST_COMPARE, 5, true, false));
  for (int64_t step = 1; step <= 3; step++) {
    save_step(&rig, step, (uint64_t)step);
    step_path(path, state, step);
    wn_hf_dir *before, *after;
    OK(wn_hf_dir_open(&before, init));
    OK(wn_hf_dir_open(&after, path));
    assert_int_equal(wn_hf_dir_count(after), rig.model->table.n + 2);
    static const char *const carried[] = {"model.layers.3.eh_proj.weight", "model.layers.3.enorm.weight"};
    for (int32_t i = 0; i < 2; i++)
      assert_true(test_same_bytes(wn_hf_dir_find(before, carried[i], NULL), wn_hf_dir_find(after, carried[i], NULL)));
    wn_hf_dir_close(before);
    wn_hf_dir_close(after);
  }
  test_rig_free(&rig);
}

static void expect_widened(const wn_st_entry *codes, const wn_st_entry *scale, const wn_st_entry *there) {
  float by;
  assert_true(there->dtype == WN_BF16 && there->bytes == 2 * codes->bytes);
  memcpy(&by, scale->data, sizeof by); /* of all: one block */
  for (uint64_t i = 0; i < codes->bytes; i++) {
    uint16_t want = wn_bf16_from_f32(wn_f32_from_e4m3(((const uint8_t *)codes->data)[i]) * by);
    assert_memory_equal((const char *)there->data + 2 * i, &want, 2);
  }
}

/* An FP8 base that is frozen stays FP8, bit for bit and with its scales; one that trains is written as floats, and no
 * scale of it is left. The layer behind the last goes with it: as it is, or as the BF16 that it stands for. */
static void fp8_bases(void **state) {
  for (int32_t train = 0; train < 2; train++) {
    test_rig rig;
    char init[300], run[300], path[WN_PATH_BYTES];
    snprintf(init, sizeof init, "%s/init-%d", (const char *)*state, train);
    snprintf(run, sizeof run, "%s/run-%d", (const char *)*state, train);
    test_dir_write(init, &test_config, (test_dir){.dtype = WN_BF16, .shards = 3, .mtp = true, .fp8 = "mlp."}, 5);
    wn_param_settings settings = train ? all_bf16 : (wn_param_settings){.train_indexer = true, .file_dtype = WN_BF16};
    OK(test_rig_create(&rig, world, &test_config, settings, train ? WN_STAGE_ADAPT : WN_STAGE_WARMUP, run, init));
    OK(wn_init_load(&rig.plan, init, false));
    for (int64_t step = 1; step <= 2; step++) {
      wn_state at = test_state, read;
      at.step = step;
      OK(wn_checkpoint_save(&rig.plan, &at));
      OK(wn_path(path, "%s/checkpoints/step-%06d", run, (int)step));
      OK(wn_checkpoint_load(&rig.plan, path, &read));
      if (!train) expect_base_unchanged(&rig, init, path);
      wn_hf_dir *before, *after;
      OK(wn_hf_dir_open(&before, init));
      OK(wn_hf_dir_open(&after, path));
      for (int64_t i = 0; i < wn_hf_dir_count(before); i++) {
        const wn_st_entry *entry = wn_hf_dir_at(before, i, NULL), *there = wn_hf_dir_find(after, entry->name, NULL);
        bool scale = test_named(entry->name, WN_HF_SCALE_SUFFIX), mtp = test_named(entry->name, "layers.3.");
        assert_int_equal(there != NULL, !(train && scale));
        if (mtp && train && entry->dtype == WN_F8_E4M3)
          expect_widened(entry, wn_hf_scale_entry(before, entry->name), there);
        else if (mtp && there)
          assert_true(test_same_bytes(entry, there));
        if (there && train) assert_true(there->dtype == WN_BF16 || there->dtype == WN_F32);
      }
      wn_hf_dir_close(before);
      wn_hf_dir_close(after);
    }
    test_rig_free(&rig);
  }
}

/* What the first save would refuse is refused at the start: codes of the layer behind the last that are no numbers, or
 * have no scales. Where they are carried, their values are the reader's business. */
static void fp8_behind_the_last_layer(void **state) {
  char init[300], path[WN_PATH_BYTES];
  test_rig rig;
  wn_hf_dir *dir;
  snprintf(init, sizeof init, "%s", wn_temp(state, "init").text);
  test_dir_write(init, &test_config, (test_dir){.dtype = WN_BF16, .shards = 1, .mtp = true, .fp8 = "mlp."}, 5);
  OK(wn_path(path, "%s/model.safetensors", init));
  OK(wn_hf_dir_open(&dir, init));
  const wn_st_entry *codes = wn_hf_dir_find(dir, "model.layers.3.mlp.down_proj.weight", NULL),
                    *end = wn_hf_dir_at(dir, wn_hf_dir_count(dir) - 1, NULL);
  long from_end = (long)((const char *)end->data + end->bytes - (const char *)codes->data);
  wn_hf_dir_close(dir);
  FILE *file = fopen(path, "r+b");
  assert_non_null(file);
  assert_int_equal(fseek(file, 14 - from_end, SEEK_END), 0);
  fputc(0xff, file);
  assert_int_equal(fclose(file), 0);
  OK(test_rig_create(&rig, world, &test_config, all_bf16, WN_STAGE_ADAPT, run_dir(state), init));
  REFUSED(wn_init_load(&rig.plan, init, false), WN_E_INPUT,
          "tensor model.layers.3.mlp.down_proj.weight holds NaN at [2, 4]");
  test_rig_free(&rig);
  wn_param_settings frozen = {.train_indexer = true, .file_dtype = WN_BF16};
  OK(test_rig_create(&rig, world, &test_config, frozen, WN_STAGE_WARMUP, run_dir(state), init));
  OK(wn_init_load(&rig.plan, init, false));
  test_rig_free(&rig);
  test_dir_write(init, &test_config,
                 (test_dir){.dtype = WN_BF16, .shards = 1, .mtp = true, .fp8 = "mlp.", .unscaled = "layers.3."}, 5);
  OK(test_rig_create(&rig, world, &test_config, frozen, WN_STAGE_WARMUP, run_dir(state), init));
  REFUSED(wn_init_load(&rig.plan, init, false), WN_E_INPUT,
          "1 tensor missing: model.layers.3.mlp.down_proj.weight_scale_inv");
  test_rig_free(&rig);
}

/* Codes are of no use to a checkpoint without the file that they came from: of a base that stays FP8 nothing is written
 * anew. It is refused by name when it has lost a tensor, or has become floats. */
static void an_fp8_base_that_has_changed(void **state) {
  static const struct {
    test_dir after;
    const char *part;
  } cases[] = {{{.dtype = WN_BF16, .shards = 3, .fp8 = "mlp.", .without = "layers.1.mlp.experts.2.up"},
                "lacks tensor model.layers.1.mlp.experts.2.up_proj.weight"},
               {{.dtype = WN_BF16, .shards = 3}, "mlp.gate_proj.weight is not what it was when this run started"}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    test_rig rig;
    char init[300], run[300];
    snprintf(init, sizeof init, "%s/init-%zu", (const char *)*state, i);
    snprintf(run, sizeof run, "%s/run-%zu", (const char *)*state, i);
    test_dir_write(init, &test_config, (test_dir){.dtype = WN_BF16, .shards = 3, .fp8 = "mlp."}, 5);
    OK(test_rig_create(&rig, world, &test_config, (wn_param_settings){.train_indexer = true, .file_dtype = WN_BF16},
                       WN_STAGE_WARMUP, run, init));
    OK(wn_init_load(&rig.plan, init, false));
    OK(wn_remove_tree(init));
    test_dir_write(init, &test_config, cases[i].after, 5);
    REFUSED(wn_checkpoint_save(&rig.plan, &test_state), WN_E_INPUT, cases[i].part);
    test_rig_free(&rig);
  }
}

static void copies_companions(void **state) {
  static const char *const names[] = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                                      "generation_config.json"};
  test_rig rig;
  char init[300], path[WN_PATH_BYTES], file[WN_PATH_BYTES + 64], *text;
  snprintf(init, sizeof init, "%s", wn_temp(state, "init").text);
  test_dir_write(init, &test_config, (test_dir){.dtype = WN_F32, .shards = 1}, 5);
  for (int32_t i = 0; i < 4; i++) {
    snprintf(file, sizeof file, "%s/%s", init, names[i]);
    wn_temp_write(file, names[i], strlen(names[i]));
  }
  snprintf(file, sizeof file, "%s/README.md", init);
  wn_temp_write(file, "x", 1);
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_ADAPT, run_dir(state), init));
  save_step(&rig, 1, 1);
  save_step(&rig, 2, 1);
  step_path(path, state, 2);
  for (int32_t i = 0; i < 4; i++) {
    snprintf(file, sizeof file, "%s/%s", path, names[i]);
    OK(wn_read_file(&text, NULL, file, 100));
    assert_string_equal(text, names[i]);
    free(text);
  }
  snprintf(file, sizeof file, "%s/README.md", path);
  assert_false(wn_path_exists(file));
  test_rig_free(&rig);
}

/* A base that was exchanged while the run went on would make a checkpoint of two models. */
static void refuses_an_exchanged_base(void **state) {
  char init[300];
  wn_model_config base = test_config;
  base.has_indexer = false;
  snprintf(init, sizeof init, "%s", wn_temp(state, "init").text);
  for (int32_t bf16 = 0; bf16 < 2; bf16++) {
    test_rig rig;
    test_dir_write(init, &base, (test_dir){.dtype = WN_F32, .shards = 1}, 5);
    OK(test_rig_create_taking(bf16 ? WN_BF16 : WN_F32, &rig, world, &test_config, indexer_f32, WN_STAGE_WARMUP,
                              run_dir(state), init));
    OK(wn_init_load(&rig.plan, init, true));
    test_dir_write(init, &base, (test_dir){.dtype = WN_F32, .shards = 1}, 6);
    REFUSED(wn_checkpoint_save(&rig.plan, &test_state), WN_E_INPUT, "is not what it was when this run started");
    test_rig_free(&rig);
  }
}

/* A linked file's digest is taken over from its manifest, but not when it was touched since, or is of another length.
 */
static void digests_that_are_known(void **state) {
  test_rig rig;
  char dir[WN_PATH_BYTES], path[WN_PATH_BYTES];
  static const char name[] = "config.json";
  wn_manifest_entry entry;
  struct stat info;
  bool known;
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_PRETRAIN, run_dir(state), ""));
  save_step(&rig, 1, 1);
  step_path(dir, state, 1);
  OK(wn_path(path, "%s/%s", dir, name));
  assert_int_equal(stat(path, &info), 0);
  wn_manifest_known(dir, name, &entry, &known);
  assert_true(known && entry.bytes == (uint64_t)info.st_size);
  const struct timespec later[2] = {{.tv_sec = info.st_mtim.tv_sec + 100}, {.tv_sec = info.st_mtim.tv_sec + 100}};
  assert_int_equal(utimensat(AT_FDCWD, path, later, 0), 0);
  wn_manifest_known(dir, name, &entry, &known);
  assert_false(known);
  const struct timespec as_before[2] = {info.st_mtim, info.st_mtim};
  assert_int_equal(truncate(path, info.st_size - 1), 0);
  assert_int_equal(utimensat(AT_FDCWD, path, as_before, 0), 0);
  wn_manifest_known(dir, name, &entry, &known);
  assert_false(known);
  wn_manifest_known(dir, "no such file", &entry, &known);
  assert_false(known);
  wn_manifest_known(*state, name, &entry, &known);
  assert_false(known);
  test_rig_free(&rig);
}

/* ---- which checkpoints stand ---- */

static void expect_steps(void **state, const int64_t *steps, size_t n) {
  char path[WN_PATH_BYTES], **names;
  size_t found;
  OK(wn_path(path, "%s/checkpoints", run_dir(state)));
  OK(wn_list_dir(&names, &found, path));
  for (size_t i = 0; i < found && i < n; i++) {
    char want[32];
    snprintf(want, sizeof want, WN_STEP_FORMAT, (long long)steps[i]);
    assert_string_equal(names[i], want);
  }
  assert_int_equal(found, n);
  wn_list_free(names, found);
}

static void retention(void **state) {
  test_rig rig;
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_PRETRAIN, run_dir(state), ""));
  for (int64_t step = 10; step <= 40; step += 10) save_step(&rig, step, 1);
  expect_steps(state, (int64_t[]){10, 20, 30, 40}, 4);
  rig.plan.keep = 2;
  save_step(&rig, 1000000, 1);
  expect_steps(state, (int64_t[]){40, 1000000}, 2); /* sorted by byte */
  test_rig_free(&rig);
}

/* The run went back behind a damaged checkpoint: that one takes no place from the older whole ones. */
static void retention_behind_a_later_step(void **state) {
  test_rig rig;
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_PRETRAIN, run_dir(state), ""));
  save_step(&rig, 10, 1);
  save_step(&rig, 30, 1);
  rig.plan.keep = 1;
  save_step(&rig, 20, 1);
  expect_steps(state, (int64_t[]){20, 30}, 2);
  test_rig_free(&rig);
}

static void replaces_the_same_step(void **state) {
  test_rig rig;
  char path[WN_PATH_BYTES];
  wn_state read;
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_PRETRAIN, run_dir(state), ""));
  save_step(&rig, 10, 1);
  save_step(&rig, 10, 2);
  expect_steps(state, (int64_t[]){10}, 1);
  step_path(path, state, 10);
  OK(wn_checkpoint_load(&rig.plan, path, &read));
  OK(test_values(&rig, TEST_COMPARE, 2, false, false));
  test_rig_free(&rig);
}

/* The new one cannot be moved in: the old one stands again. */
static void a_replacement_that_fails_keeps_the_old(void **state) {
  test_rig rig;
  char path[WN_PATH_BYTES], checkpoints[WN_PATH_BYTES];
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_PRETRAIN, run_dir(state), ""));
  save_step(&rig, 10, 1);
  OK(wn_path(checkpoints, "%s/checkpoints", run_dir(state)));
  OK(wn_path(path, "%s/.tmp-absent", checkpoints));
  REFUSED(wn_steps_install(checkpoints, path, 10), WN_E_IO, "cannot rename");
  step_path(path, state, 10);
  OK(wn_checkpoint_verify(path));
  expect_steps(state, (int64_t[]){10}, 1);
  test_rig_free(&rig);
}

static void leftovers(void **state) {
  test_rig rig;
  char path[WN_PATH_BYTES], name[WN_PATH_BYTES + 64];
  bool found;
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_PRETRAIN, run_dir(state), ""));
  save_step(&rig, 10, 1);
  save_step(&rig, 20, 2);
  /* killed between the two renames of a replacement: the old one goes back */
  char place[WN_PATH_BYTES], checkpoints[WN_PATH_BYTES];
  OK(wn_path(checkpoints, "%s/checkpoints", run_dir(state)));
  step_path(place, state, 20);
  snprintf(name, sizeof name, "%s/.old-step-000020", checkpoints);
  assert_int_equal(rename(place, name), 0);
  snprintf(name, sizeof name, "%s/.tmp-step-000020-1/deep", checkpoints);
  OK(wn_make_dirs(name));
  OK(wn_checkpoint_newest(&rig.plan, path, &found));
  assert_true(found);
  assert_string_equal(path, place);
  expect_steps(state, (int64_t[]){10, 20}, 2);
  /* killed after them: the new one stands, the old one goes */
  snprintf(name, sizeof name, "%s/.old-step-000020", checkpoints);
  OK(wn_make_dirs(name));
  save_step(&rig, 30, 1);
  expect_steps(state, (int64_t[]){10, 20, 30}, 3);
  /* not ours */
  snprintf(name, sizeof name, "%s/step-7", checkpoints);
  OK(wn_make_dirs(name));
  int64_t *steps;
  size_t n_steps;
  OK(wn_steps_list(&steps, &n_steps, checkpoints));
  assert_true(n_steps == 3 && steps[0] == 30 && steps[1] == 20 && steps[2] == 10);
  free(steps);
  test_rig_free(&rig);
}

/* ---- the indexer's moments ---- */

static void carries_the_indexer(void **state) {
  test_rig warm, adapt;
  char path[WN_PATH_BYTES];
  wn_state read = {0};
  bool carried;
  OK(test_rig_create(&warm, world, &test_config, indexer_f32, WN_STAGE_WARMUP, run_dir(state), ""));
  save_step(&warm, 9, 4);
  step_path(path, state, 9);
  OK(test_rig_create(&adapt, world, &test_config, all_f32, WN_STAGE_ADAPT, run_dir(state), path));
  OK(wn_init_load(&adapt.plan, path, false));
  OK(wn_init_carry_indexer(&adapt.plan, path, &read, &carried));
  assert_true(carried);
  assert_int_equal(read.adam_indexer, test_state.adam_indexer);
  assert_int_equal(read.adam_base + read.step + read.tokens, 0);
  /* exactly the indexer's moments came: set them to what they must be, and all others to 0 as they were */
  for (int32_t i = 0; i < wn_store_pieces(adapt.store); i++) {
    wn_piece *piece = wn_store_piece(adapt.store, i);
    for (int32_t s = 0; s < piece->n_segments; s++)
      for (int64_t e = 0; piece->m.data && e < piece->segments[s].count; e++) {
        wn_segment at = piece->segments[s];
        bool indexer = piece->kind == WN_INDEXER;
        float m = ((float *)piece->m.data)[at.offset + e], v = ((float *)piece->v.data)[at.offset + e];
        assert_true(m == (indexer ? test_value(4, at.param, WN_FIELD_M, at.first + e) : 0.0f));
        assert_true(v == (indexer ? test_value(4, at.param, WN_FIELD_V, at.first + e) : 0.0f));
      }
  }
  /* a moment that changed behind the manifest is refused */
  char optimizer[WN_PATH_BYTES];
  OK(wn_path(optimizer, "%s/optimizer-00001-of-00001.safetensors", path));
  wn_temp_flip(optimizer, 1, 1);
  REFUSED(wn_init_carry_indexer(&adapt.plan, path, &read, &carried), WN_E_INPUT, "differs from its digest");
  /* an adapt checkpoint as init carries weights only */
  adapt.plan.run_dir = run_dir(state);
  save_step(&adapt, 10, 4);
  step_path(path, state, 10);
  OK(wn_init_carry_indexer(&adapt.plan, path, &read, &carried));
  assert_false(carried);
  test_rig_free(&warm);
  test_rig_free(&adapt);
}

static void refuses_another_stage(void **state) {
  test_rig rig;
  char path[WN_PATH_BYTES];
  wn_state read;
  wn_stage stage;
  bool found;
  OK(test_rig_create(&rig, world, &test_config, all_f32, WN_STAGE_ADAPT, run_dir(state), ""));
  save_step(&rig, 9, 4);
  step_path(path, state, 9);
  OK(wn_checkpoint_read_state(path, &read, &stage, &found));
  assert_true(found && stage == WN_STAGE_ADAPT && read.step == 9 && read.indexer_trained);
  OK(wn_checkpoint_read_state(run_dir(state), &read, &stage, &found));
  assert_false(found);
  rig.plan.stage = WN_STAGE_PRETRAIN;
  REFUSED(wn_checkpoint_load(&rig.plan, path, &read), WN_E_CONFIG,
          "was written by adapt; it cannot be continued by pretrain");
  test_rig_free(&rig);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      TEMP_TEST(round_trip_f32),
      TEMP_TEST(round_trip_bf16),
      TEMP_TEST(round_trip_frozen_random),
      TEMP_TEST(the_warm_up_is_part_of_the_state),
      TEMP_TEST(dtypes_and_names),
      TEMP_TEST(links_a_single_file),
      TEMP_TEST(links_shards_and_mtp),
      TEMP_TEST(copies_out_of_mixed_shards),
      TEMP_TEST(links_what_it_can),
      TEMP_TEST(a_base_held_in_bf16),
      TEMP_TEST(links_across_file_systems),
      TEMP_TEST(carries_mtp_through),
      TEMP_TEST(fp8_bases),
      TEMP_TEST(fp8_behind_the_last_layer),
      TEMP_TEST(copies_companions),
      TEMP_TEST(an_fp8_base_that_has_changed),
      TEMP_TEST(refuses_an_exchanged_base),
      TEMP_TEST(digests_that_are_known),
      TEMP_TEST(retention),
      TEMP_TEST(retention_behind_a_later_step),
      TEMP_TEST(replaces_the_same_step),
      TEMP_TEST(a_replacement_that_fails_keeps_the_old),
      TEMP_TEST(leftovers),
      TEMP_TEST(carries_the_indexer),
      TEMP_TEST(refuses_another_stage),
  };
  return cmocka_run_group_tests(tests, make_world, free_world);
}
