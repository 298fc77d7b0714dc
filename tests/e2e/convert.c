/* `winnow convert` as a user runs it: from FP8 through training to every form and back, killed anywhere, on a full
 * disk, in bounded memory, and told wrong things. */
#include "support/conversion.h"
#include "support/tiny.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>

enum { STEPS = 4 };

/* base16/: a dense model of widths beyond a block, with an MTP layer; base8/: the same as the release would store it.
 */
static wn_model_config base_config(void) {
  wn_model_config config = tiny_config();
  config.hidden_size = 160;
  config.intermediate_size = 144;
  config.moe_intermediate_size = 136;
  config.q_lora_rank = 132;
  return config;
}

static void make_base(void **state) {
  wn_model_config config = base_config(), deeper = config;
  wn_param_table table;
  model_list t = {0};
  const conv_dir how = {.stored = CONV_F32};
  deeper.num_hidden_layers += 1;
  table = tiny_table(&deeper);
  for (int32_t i = 0; i < table.n; i++) {
    wn_param *p = &table.params[i];
    conv_weight(&t, &how, p->hf_name, p->rank, p->dim[0], p->dim[1]);
    float *values = tiny_values(p, (uint64_t)(1000 + i)); /* such that the model runs */
    memcpy(t.data[t.n - 1], values, (size_t)tiny_count(p) * sizeof *values);
    free(values);
  }
  conv_mtp(&t, &how, &config, config.num_hidden_layers);
  model_list_write(&t, wn_temp(state, "base32").text, 3);
  OK(wn_model_config_save(&config, wn_temp(state, "base32").text, NULL, "float32"));
  model_set_mtp_layers(wn_temp(state, "base32").text, 1);
  model_list_free(&t);
  wn_param_table_free(&table);
}

static int setup(void **state) {
  if (tiny_setup(state)) return -1;
  make_base(state);
  const char *dir = *state;
  wn_winnow_ends(0, 1, "convert %s/base32 %s/base8 --to fp8", dir, dir);
  return 0;
}

/* ---- the round trip ---- */

static wn_hf_dir *open_dir(void **state, const char *name) {
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, wn_temp(state, name).text));
  return dir;
}

static float value_of(const wn_hf_dir *dir, const char *name, int64_t i) {
  wn_hf_weight weight;
  float x;
  OK(wn_hf_weight_find(&weight, dir, name));
  OK(wn_hf_read(&x, WN_F32, &weight, i, 1));
  return x;
}

/* Off by at most half of what E4M3 codes lie apart there, in units of the block's scale; plus BF16's own rounding,
 * which is none, since codes have fewer bits. */
static void expect_half_a_step(const wn_hf_dir *was, const wn_hf_dir *is, const wn_hf_dir *fp8, const char *name) {
  wn_hf_weight a, b, codes;
  OK(wn_hf_weight_find(&a, was, name));
  OK(wn_hf_weight_find(&b, is, name));
  OK(wn_hf_weight_find(&codes, fp8, name));
  int64_t cols = a.entry->dim[1], n = a.entry->dim[0] * cols, across = codes.scale->dim[1], off = 0;
  float *x = calloc((size_t)n, sizeof *x), *y = calloc((size_t)n, sizeof *y);
  assert_true(x && y);
  OK(wn_hf_read(x, WN_F32, &a, 0, n));
  OK(wn_hf_read(y, WN_F32, &b, 0, n));
  for (int64_t i = 0; i < n; i++) {
    float scale;
    int exponent;
    memcpy(&scale, (const char *)codes.scale->data + 4 * (i / cols / 128 * across + i % cols / 128), 4);
    frexp((double)x[i] / (double)scale, &exponent);
    double step = (double)scale * ldexp(1, exponent - 4 > -9 ? exponent - 4 : -9);
    if (!(fabs((double)x[i] - (double)y[i]) <= step / 2))
      fail_msg("%s[%lld]: %a came back as %a", name, (long long)i, x[i], y[i]);
    off += x[i] != y[i];
  }
  assert_true(off > n / 4); /* numbers that FP8 cannot hold: else nothing was tested */
  free(x);
  free(y);
}

/* Of a stage's checkpoint: its v32/, the fp8/ of that, and that in bf16/ again. */
static void convert_all(void **state, const char *checkpoint, const char *stage) {
  const char *dir = *state;
  wn_winnow_ends(0, 1, "convert %s %s/%s-v32 --to v32", checkpoint, dir, stage);
  wn_winnow_ends(0, 1, "convert %s/%s-v32 %s/%s-fp8 --to fp8", dir, stage, dir, stage);
  wn_winnow_ends(0, 1, "convert %s/%s-fp8 %s/%s-bf16 --to bf16", dir, stage, dir, stage);
}

static void expect_round_trip(void **state, const char *checkpoint, const char *stage, bool base_is_frozen) {
  char name[64];
  wn_hf_dir *source, *v32, *fp8, *bf16, *base = open_dir(state, "base8");
  OK(wn_hf_dir_open(&source, checkpoint));
  snprintf(name, sizeof name, "%s-v32", stage);
  v32 = open_dir(state, name);
  snprintf(name, sizeof name, "%s-fp8", stage);
  fp8 = open_dir(state, name);
  snprintf(name, sizeof name, "%s-bf16", stage);
  bf16 = open_dir(state, name);
  assert_int_equal(wn_hf_dir_count(v32), wn_hf_dir_count(bf16));
  for (int64_t i = 0; i < wn_hf_dir_count(v32); i++) {
    const wn_st_entry *at = wn_hf_dir_at(v32, i, NULL), *back = wn_hf_dir_find(bf16, at->name, NULL);
    bool mtp = strstr(at->name, "layers.3.") != NULL, frozen = mtp || (base_is_frozen && !tiny_is_indexer(at->name));
    assert_non_null(back);
    assert_int_equal(at->dtype, conv_f32(at->name) ? WN_F32 : WN_BF16);
    if (!conv_fp8(at->name) || frozen) {
      if (tiny_bits_differ(at, back)) fail_msg("%s of %s did not survive FP8", at->name, stage);
    } else {
      expect_half_a_step(v32, bf16, fp8, at->name);
    }
    int64_t n = (int64_t)at->bytes / wn_dtype_bytes(at->dtype);
    for (int64_t e = 0; e < n; e += 1 + n / 50) { /* what was trained, or the base as it was, rounded to BF16 */
      float want = value_of(frozen ? base : source, at->name, e), have = value_of(v32, at->name, e);
      if (at->dtype == WN_BF16) want = wn_f32_from_bf16(wn_bf16_from_f32(want));
      if (memcmp(&want, &have, 4) != 0)
        fail_msg("%s[%lld] of %s is %a, not %a", at->name, (long long)e, stage, have, want);
    }
    const wn_st_entry *codes = wn_hf_dir_find(fp8, at->name, NULL);
    assert_int_equal(codes->dtype, conv_fp8(at->name) ? WN_F8_E4M3 : at->dtype);
  }
  wn_hf_dir_close(source);
  wn_hf_dir_close(v32);
  wn_hf_dir_close(fp8);
  wn_hf_dir_close(bf16);
  wn_hf_dir_close(base);
}

static void from_fp8_through_training_and_back(void **state) {
  const char *dir = *state;
  wn_temp_path warm = tiny_step(state, "warm", STEPS), adapted = tiny_step(state, "adapted", STEPS);
  wn_winnow_ends(0, 1, "warmup %s/job.yaml init=%s/base8 run_dir=%s/warm training.steps=%d", dir, dir, dir, STEPS);
  convert_all(state, warm.text, "warm");
  expect_round_trip(state, warm.text, "warm", true);
  wn_winnow_ends(0, 1, "adapt %s/job.yaml init=%s run_dir=%s/adapted training.steps=%d", dir, warm.text, dir, STEPS);
  convert_all(state, adapted.text, "adapted");
  expect_round_trip(state, adapted.text, "adapted", false);
  /* what comes out is a model again: of every form, and of V3 without an indexer */
  wn_winnow_ends(0, 1, "convert %s/adapted-fp8 %s/adapted-v3 --to v3", dir, dir);
  const char *const forms[] = {"v32", "fp8", "bf16"};
  for (size_t i = 0; i < sizeof forms / sizeof *forms; i++)
    wn_winnow_ends(0, 1, "eval %s/adapted-%s --data %s/valid --seq-len 32 --selection dense,indexer", dir, forms[i],
                   dir);
  wn_winnow_ends(0, 1, "eval %s/adapted-v3 --data %s/valid --seq-len 32 --selection dense", dir, dir);
  wn_winnow_ends(0, 1, "adapt %s/job.yaml init=%s/adapted-fp8 run_dir=%s/on training.steps=1", dir, dir, dir);
}

/* ---- kills ---- */

/* Without the mark, but with an index, it must be whole. */
static bool died_whole(void **state) {
  return !wn_path_exists(wn_temp(state, "dying/.convert.json").text) &&
         wn_path_exists(wn_temp(state, "dying/model.safetensors.index.json").text);
}

static void killed_anywhere(void **state) {
  const char *dir = *state;
  char line[1024];
  int64_t changes, died = 0;
  snprintf(line, sizeof line, "convert %s/base32 %s/dying --to fp8 --shard-bytes 700000 --threads 1", dir, dir);
  wn_winnow_ends(0, 1, "convert %s/base32 %s/undying --to fp8 --shard-bytes 700000 --threads 1", dir, dir);
  wn_temp_write(wn_temp(state, "base32/tokenizer.json").text, "{}", 2);
  wn_temp_write(wn_temp(state, "undying/tokenizer.json").text, "{}", 2);
  assert_false(wn_winnow_killed_at(INT64_MAX, &changes, "%s", line));
  tiny_expect_same_tree(wn_temp(state, "dying").text, wn_temp(state, "undying").text);
  assert_true(changes > 40);
  for (int64_t nth = 0; nth < changes; nth += nth < 12 || nth > changes - 30 ? 1 : 11) {
    OK(wn_remove_tree(wn_temp(state, "dying").text));
    died += wn_winnow_killed_at(nth, NULL, "%s", line);
    bool whole = died_whole(state);
    if (!whole) wn_winnow_killed_at(nth / 2, NULL, "%s", line); /* and again, on the way */
    if (!whole && !died_whole(state)) wn_winnow_ends(0, 1, "%s", line);
    tiny_expect_same_tree(wn_temp(state, "dying").text, wn_temp(state, "undying").text);
  }
  assert_true(died > 40);
}

static void a_full_disk(void **state) {
  const struct rlimit none = {RLIM_INFINITY, RLIM_INFINITY}, little = {200 << 10, RLIM_INFINITY};
  const char *dir = *state;
  signal(SIGXFSZ, SIG_IGN); /* inherited: writes then fail, as they do on a full disk */
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &little), 0);
  wn_winnow_refuses(WN_E_IO, "File too large", "convert %s/base32 %s/full --to bf16", dir, dir);
  assert_int_equal(setrlimit(RLIMIT_FSIZE, &none), 0);
  signal(SIGXFSZ, SIG_DFL);
  wn_winnow_ends(0, 1, "convert %s/base32 %s/full --to bf16", dir, dir);
  wn_winnow_ends(0, 1, "convert %s/base32 %s/room --to bf16", dir, dir);
  tiny_expect_same_tree(wn_temp(state, "full").text, wn_temp(state, "room").text);
}

/* ---- memory ---- */

/* In a process of its own: a child begins with the resident size of the one that it came from. */
static void write_sized(void **state, const char *name, int64_t hidden, int64_t wide) {
  wn_model_config config = base_config();
  config.hidden_size = (int32_t)hidden;
  config.intermediate_size = (int32_t)wide;
  config.num_hidden_layers = 1;
  pid_t child = fork();
  assert_true(child >= 0);
  if (child == 0) {
    conv_write_dir(wn_temp(state, name).text, &config, (conv_dir){.stored = CONV_F32, .shards = 1});
    _exit(0);
  }
  int status;
  assert_int_equal(waitpid(child, &status, 0), child);
  assert_int_equal(status, 0);
}

/* Resident memory does not follow the model's size. */
static void bounded_memory(void **state) {
  const char *dir = *state;
  const char *const forms[] = {"bf16", "fp8", "demo"};
  wn_program p;
  int64_t peak[2][3];
  write_sized(state, "sized0", 64, 4096);
  write_sized(state, "sized1", 512, 32768); /* 201 MB, in matrices wider than a tile, and higher */
  for (int i = 0; i < 2; i++)
    for (int f = 0; f < 3; f++) {
      wn_winnow(&p, 1, "convert %s/sized%d %s/out%d-%s --to %s --threads 2", dir, i, dir, i, forms[f], forms[f]);
      if (p.code != 0) fail_msg("convert ended with %d: %s", p.code, p.err);
      peak[i][f] = p.peak_kib;
    }
  for (int f = 0; f < 3; f++) {
    print_message("%s: %lld KiB; %lld KiB of a model 64 times as large\n", forms[f], (long long)peak[0][f],
                  (long long)peak[1][f]);
    assert_true(peak[1][f] - peak[0][f] < 24 << 10); /* two tiles */
  }
}

/* ---- words ---- */

static void what_is_left_behind_is_said(void **state) {
  const char *dir = *state;
  wn_temp_path link = wn_temp(state, "base32/tokenizer_config.json");
  wn_program p;
  assert_int_equal(symlink("nowhere", link.text), 0);
  wn_winnow(&p, 1, "convert %s/base32 %s/without --to bf16", dir, dir);
  assert_int_equal(p.code, 0);
  if (!strstr(p.err, "base32/tokenizer_config.json is no file of at most 64 MiB")) fail_msg("%s", p.err);
  assert_int_equal(unlink(link.text), 0);
}

static void wrong_words(void **state) {
  const char *dir = *state;
  wn_winnow_refuses(WN_E_USAGE, "the one to write, and --to", "convert %s/base32 %s/never", dir, dir);
  wn_winnow_refuses(WN_E_USAGE, "the one to write, and --to", "convert %s/base32 --to fp8", dir);
  wn_winnow_refuses(WN_E_USAGE, "--to is v32, v3, bf16, fp8 or demo, not 'gguf'",
                    "convert %s/base32 %s/never --to gguf", dir, dir);
  wn_winnow_refuses(WN_E_USAGE, "--model-parallel goes with --to demo, not fp8",
                    "convert %s/base32 %s/never --to fp8 --model-parallel 2", dir, dir);
  wn_winnow_refuses(WN_E_USAGE, "--shard-bytes does not go with --to demo",
                    "convert %s/base32 %s/never --to demo --shard-bytes 5", dir, dir);
  wn_winnow_refuses(WN_E_USAGE, "--model-parallel is 0", "convert %s/base32 %s/never --to demo --model-parallel 0", dir,
                    dir);
  wn_winnow_refuses(WN_E_CONFIG, "a V3.2 model has an indexer in every layer", "convert %s/base32 %s/never --to v32",
                    dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "num_attention_heads 3 is not a multiple of --model-parallel 2; possible are 1",
                    "convert %s/base32 %s/never --to demo --model-parallel 2", dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "nowhere/config.json is absent", "convert %s/nowhere %s/never --to fp8", dir, dir);
  wn_winnow_refuses(WN_E_USAGE, "already; nothing was written", "convert %s/base32 %s/base8 --to bf16", dir, dir);
  wn_program p;
  wn_winnow(&p, 2, "convert %s/base32 %s/never --to fp8", dir, dir);
  assert_int_equal(p.code, WN_E_USAGE);
  assert_false(wn_path_exists(wn_temp(state, "never").text));
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(from_fp8_through_training_and_back),
      cmocka_unit_test(killed_anywhere),
      cmocka_unit_test(a_full_disk),
      cmocka_unit_test(bounded_memory),
      cmocka_unit_test(what_is_left_behind_is_said),
      cmocka_unit_test(wrong_words),
  };
  return cmocka_run_group_tests(tests, setup, wn_temp_teardown);
}
