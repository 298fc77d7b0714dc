/* Bad input of every kind: one sentence that names it, the documented exit code, and nothing of what was there is lost.
 */
#include "kernels/cuda/cuda.h"
#include "support/fp8_model.h"

#include <unistd.h>

/* base/ and train as in tiny.h; warm/: a run of stage 1; untrained/: a model whose indexer never learned. base-before/
 * and warm-before/ are copies to compare with at the end. */
static void copy_tree(const char *from, const char *to) {
  char **names, x[WN_PATH_BYTES], y[WN_PATH_BYTES];
  size_t n;
  OK(wn_make_dirs(to));
  OK(wn_list_dir(&names, &n, from));
  for (size_t i = 0; i < n; i++) {
    OK(wn_path(x, "%s/%s", from, names[i]));
    OK(wn_path(y, "%s/%s", to, names[i]));
    if (wn_path_is_dir(x))
      copy_tree(x, y);
    else
      OK(wn_copy_file(x, y));
  }
  wn_list_free(names, n);
}

static void expect_untouched(const char *now, const char *before) {
  char **names, x[WN_PATH_BYTES], y[WN_PATH_BYTES];
  size_t n, others;
  OK(wn_list_dir(&names, &others, before));
  wn_list_free(names, others);
  OK(wn_list_dir(&names, &n, now));
  if (n != others) fail_msg("%s holds %zu files, and held %zu", now, n, others);
  for (size_t i = 0; i < n; i++) {
    OK(wn_path(x, "%s/%s", now, names[i]));
    OK(wn_path(y, "%s/%s", before, names[i]));
    if (wn_path_is_dir(x))
      expect_untouched(x, y);
    else
      tiny_expect_same_file(x, y);
  }
  wn_list_free(names, n);
}

static int setup(void **state) {
  if (tiny_setup(state)) return -1;
  const char *dir = *state;
  wn_model_config config = tiny_sparse_config();
  OK(wn_make_dirs(wn_temp(state, "random").text));
  OK(wn_model_config_save(&config, wn_temp(state, "random").text, NULL, "float32"));
  wn_winnow_ends(0, 1, "warmup %s/job.yaml init=%s/base run_dir=%s/warm training.steps=4 checkpoint.interval=2", dir,
                 dir, dir);
  wn_winnow_ends(0, 1, "pretrain %s/job.yaml model=%s/random run_dir=%s/untrained training.steps=1", dir, dir, dir);
  copy_tree(wn_temp(state, "base").text, wn_temp(state, "base-before").text);
  copy_tree(wn_temp(state, "warm").text, wn_temp(state, "warm-before").text);
  return 0;
}

/* A copy of base/ (or of another model) to do harm to; returns the path of `file` in it. */
static wn_temp_path broken(void **state, const char *model, const char *file) {
  char name[64];
  wn_temp_path dir = wn_temp(state, "broken");
  OK(wn_remove_tree(dir.text));
  copy_tree(wn_temp(state, model).text, dir.text);
  snprintf(name, sizeof name, "broken/%s", file);
  return wn_temp(state, name);
}

static void overwrite(const char *path, size_t at, const void *data, size_t bytes) {
  FILE *file = fopen(path, "r+b");
  assert_non_null(file);
  assert_int_equal(fseek(file, (long)at, SEEK_SET), 0);
  assert_int_equal(fwrite(data, 1, bytes, file), bytes);
  assert_int_equal(fclose(file), 0);
}

/* Every (or the first) `old` in the file becomes `new`, of the same length. */
static void replace(const char *path, const char *old, const char *new, bool every) {
  tiny_file file = tiny_read(path);
  size_t n = strlen(old), found = 0;
  assert_int_equal(n, strlen(new));
  for (size_t i = 0; i + n <= file.bytes && (every || !found); i++)
    if (memcmp(file.text + i, old, n) == 0) {
      memcpy(file.text + i, new, n);
      found++;
    }
  assert_true(found > 0);
  wn_temp_write(path, file.text, file.bytes);
  free(file.text);
}

static void refuse_model(void **state, int code, const char *part) {
  const char *dir = *state;
  wn_winnow_refuses(code, part, "warmup %s/job.yaml init=%s/broken run_dir=%s/never", dir, dir, dir);
  wn_winnow_refuses(code, part, "eval %s/broken --data %s/valid --seq-len 32 --selection dense", dir, dir);
}

/* ---- weights ---- */

static const char shard[] = "model-00002-of-00004.safetensors";

static void truncated_safetensors(void **state) {
  wn_temp_path path = broken(state, "base", shard);
  struct stat info;
  assert_int_equal(stat(path.text, &info), 0);
  assert_int_equal(truncate(path.text, info.st_size / 2), 0);
  refuse_model(state, WN_E_INPUT, shard);
  assert_int_equal(truncate(path.text, 5), 0);
  refuse_model(state, WN_E_INPUT, "5 bytes are too few");
  assert_int_equal(truncate(path.text, 0), 0);
  refuse_model(state, WN_E_INPUT, "0 bytes are too few");
}

static void lying_safetensors(void **state) {
  wn_temp_path path = broken(state, "base", shard);
  overwrite(path.text, 0, "\xff\xff\xff\xff\xff\xff\xff\x7f", 8);
  refuse_model(state, WN_E_INPUT, "header length");
  path = broken(state, "base", shard);
  overwrite(path.text, 8, "x", 1);
  refuse_model(state, WN_E_INPUT, "does not begin with '{'");
  path = broken(state, "base", shard);
  replace(path.text, "\"F32\"", "\"F16\"", false);
  refuse_model(state, WN_E_INPUT, "its shape and dtype make");
  path = broken(state, "base", shard);
  replace(path.text, "\"F32\"", "\"I32\"", true);
  refuse_model(state, WN_E_INPUT, "of a type that cannot be read");
}

/* Where the bytes of a tensor begin in a safetensors file. */
static size_t data_of(const char *path, const char *name) {
  tiny_file file = tiny_read(path);
  char key[256];
  uint64_t header_bytes;
  memcpy(&header_bytes, file.text, sizeof header_bytes);
  snprintf(key, sizeof key, "\"%s\":", name);
  char *at = memmem(file.text, file.bytes, key, strlen(key));
  at = at ? strstr(at, "\"data_offsets\":[") : NULL;
  assert_non_null(at);
  size_t offset = strtoull(strchr(at, '[') + 1, NULL, 10);
  free(file.text);
  return 8 + header_bytes + offset;
}

#define UP_PROJ "model.layers.0.mlp.up_proj.weight"

static void fp8_weights(void **state) {
  static const char whole[] = "model-00001-of-000001.safetensors", up_proj[] = UP_PROJ, scale[] = UP_PROJ "_scale_inv";
  wn_model_config config = tiny_config();
  fp8_model(wn_temp(state, "fp8").text, &config, 4, 1, true, false);
  static const struct {
    uint32_t value;
    const char *sentence;
  } scales[] = {{0x7fc00000, "tensor " UP_PROJ "_scale_inv: scale [0, 0] is nan"},
                {0x7f800000, "scale [0, 0] is inf"},
                {0, "scale [0, 0] is 0"},
                {0xbf800000, "scale [0, 0] is -1"}};
  for (size_t i = 0; i < sizeof scales / sizeof *scales; i++) {
    wn_temp_path path = broken(state, "fp8", whole);
    overwrite(path.text, data_of(path.text, scale), &scales[i].value, 4);
    refuse_model(state, WN_E_INPUT, scales[i].sentence);
  }
  wn_temp_path path = broken(state, "fp8", whole);
  overwrite(path.text, data_of(path.text, up_proj) + 77, "\xff", 1);
  refuse_model(state, WN_E_INPUT, "tensor " UP_PROJ " holds NaN");
  path = broken(state, "fp8", whole);
  replace(path.text, scale, UP_PROJ "_scale_inw", true);
  replace(wn_temp(state, "broken/model.safetensors.index.json").text, scale, UP_PROJ "_scale_inw", true);
  refuse_model(state, WN_E_INPUT, "1 tensor missing: " UP_PROJ "_scale_inv");
  path = broken(state, "fp8", whole);
  replace(path.text, "F8_E4M3", "F8_E8M0", true);
  refuse_model(state, WN_E_INPUT, "model.layers.0.self_attn.q_a_proj.weight (F8_E8M0)");
  path = broken(state, "fp8", whole);
  replace(path.text, "F8_E4M3", "F8_E5M2", true);
  refuse_model(state, WN_E_INPUT, "dtype F8_E5M2 is not supported");
}

static void incomplete_directories(void **state) {
  wn_temp_path path = broken(state, "base", shard);
  assert_int_equal(unlink(path.text), 0);
  refuse_model(state, WN_E_INPUT, "names 1 file that is absent: model-00002-of-00004.safetensors");
  path = broken(state, "base", "model.safetensors.index.json");
  tiny_write(path.text, "{\"weight_map\": {");
  refuse_model(state, WN_E_INPUT, "bad JSON");
  path = broken(state, "random", "config.json");
  refuse_model(state, WN_E_INPUT, "holds no weights");
  assert_int_equal(unlink(path.text), 0);
  refuse_model(state, WN_E_CONFIG, "config.json is absent");
  OK(wn_remove_tree(wn_temp(state, "broken").text));
  refuse_model(state, WN_E_CONFIG, "broken/config.json is absent");
}

/* Weights of one model under the config.json of another. */
static void other_models_weights(void **state) {
  wn_model_config ours = tiny_config(), theirs = ours;
  wn_temp_path place = wn_temp(state, "broken");
  theirs.intermediate_size = 44;
  OK(wn_remove_tree(place.text));
  tiny_model(place.text, &theirs, 1, 2, NULL);
  OK(wn_model_config_save(&ours, place.text, NULL, "float32"));
  refuse_model(state, WN_E_INPUT, "misshapen: model.layers.0.mlp.gate_proj.weight [44, 32] instead of [40, 32]");
  theirs = ours;
  theirs.num_hidden_layers = 2;
  OK(wn_remove_tree(place.text));
  tiny_model(place.text, &theirs, 1, 2, NULL);
  OK(wn_model_config_save(&ours, place.text, NULL, "float32"));
  refuse_model(state, WN_E_INPUT, "tensors missing: model.layers.2.input_layernorm.weight");
  OK(wn_remove_tree(place.text));
  theirs = tiny_sparse_config();
  tiny_model(place.text, &theirs, 1, 2, NULL);
  OK(wn_model_config_save(&ours, place.text, NULL, "float32"));
  wn_winnow_refuses(WN_E_INPUT, "15 tensors that this model does not have: model.layers.0.self_attn.indexer",
                    "eval %s --data %s --seq-len 32 --selection dense", place.text, wn_temp(state, "valid").text);
}

static void bad_config_json(void **state) {
  wn_temp_path path = broken(state, "base", "config.json");
  tiny_write(path.text, "{\"hidden_size\": 32,");
  refuse_model(state, WN_E_CONFIG, "config.json");
  path = broken(state, "base", "config.json");
  replace(path.text, "\"hidden_size\"", "\"hidden_sive\"", false);
  refuse_model(state, WN_E_CONFIG, "hidden_size");
  path = broken(state, "base", "config.json");
  replace(path.text, "\"kv_lora_rank\": 16", "\"kv_lora_rank\": -6", false);
  refuse_model(state, WN_E_CONFIG, "kv_lora_rank");
}

/* ---- the job ---- */

static void refuse_job(void **state, int code, const char *part, const char *text) {
  const char *dir = *state;
  tiny_write(wn_temp(state, "bad.yaml").text, text);
  wn_winnow_refuses(
      code, part,
      "warmup %s/bad.yaml init=%s/base run_dir=%s/never data.train=%s/train optimizer.lr=1e-3 training.steps=2", dir,
      dir, dir, dir);
}

static void bad_job_files(void **state) {
  const char *dir = *state;
  refuse_job(state, WN_E_CONFIG, "bad.yaml:3: did not find", "threads: 1\ndata: {seq_len: 32\n");
  refuse_job(state, WN_E_CONFIG, "bad.yaml:1: unknown key data.seq_length; did you mean data.seq_len?",
             "data: {seq_length: 32}\n");
  refuse_job(state, WN_E_CONFIG, "bad.yaml:2", "threads: 1\nthreads: 1\n");
  refuse_job(state, WN_E_CONFIG, "bad.yaml:1", "threads: many\n");
  refuse_job(state, WN_E_CONFIG, "bad.yaml:1", "threads: -1\n");
  refuse_job(state, WN_E_CONFIG, "bad.yaml:1", "optimizer: {beta1: 1.0}\n");
  refuse_job(state, WN_E_CONFIG, "stage is adapt, but the command is warmup", "stage: adapt\n");
  refuse_job(state, WN_E_CONFIG, "bad.yaml", "- a\n- list\n");
  refuse_job(state, WN_E_CONFIG, "bad.yaml:1", "data: 5\n");
  refuse_job(state, WN_E_CONFIG, "training.micro_batch_seqs 3 does not divide", "training: {micro_batch_seqs: 3}\n");
  refuse_job(state, WN_E_CONFIG, "no data.valid", "metrics: {eval_every: 2}\n");
  wn_winnow_refuses(WN_E_CONFIG, "absent.yaml is absent", "warmup %s/absent.yaml", dir);
  wn_winnow_refuses(WN_E_CONFIG, "is not key=value", "warmup %s/job.yaml init=%s/base run_dir=%s/never steps", dir, dir,
                    dir);
  wn_winnow_refuses(WN_E_CONFIG, "did you mean training.steps?",
                    "warmup %s/job.yaml init=%s/base run_dir=%s/never training.step=3", dir, dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "warmup needs init", "warmup %s/job.yaml run_dir=%s/never", dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "run_dir is missing", "warmup %s/job.yaml init=%s/base", dir, dir);
  if (wn_cuda_count(NULL) == 0)
    wn_winnow_refuses(WN_E_DEVICE, "device is cuda", "warmup %s/job.yaml init=%s/base run_dir=%s/never device=cuda",
                      dir, dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "max_position_embeddings 16384",
                    "warmup %s/job.yaml init=%s/base run_dir=%s/never data.seq_len=20000", dir, dir, dir);
}

static void bad_command_lines(void **state) {
  const char *dir = *state;
  wn_winnow_refuses(WN_E_USAGE, "unknown command 'warm'", "warm %s/job.yaml", dir);
  wn_winnow_refuses(WN_E_USAGE, "no job file given", "warmup");
  wn_winnow_refuses(WN_E_USAGE, "unknown flag --chek; did you mean --check?", "warmup %s/job.yaml --chek", dir);
  wn_winnow_refuses(WN_E_USAGE, "unknown selection 'bset'",
                    "eval %s/base --data %s/valid --seq-len 32 --topk 4 --selection dense,bset", dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "no indexer to select with",
                    "eval %s/base --data %s/valid --seq-len 32 --topk 4 --selection indexer", dir, dir);
  wn_winnow_refuses(WN_E_USAGE, "needs a number of keys", "eval %s/base --data %s/valid --seq-len 32 --selection best",
                    dir, dir);
  wn_winnow_refuses(WN_E_USAGE, "--seq-len wants a whole number", "eval %s/base --data %s/valid --seq-len 3x", dir,
                    dir);
  wn_winnow_refuses(WN_E_INPUT, "too few tokens for one window of 4096",
                    "eval %s/base --data %s/valid --seq-len 4096 --selection dense", dir, dir);
  wn_winnow_refuses(WN_E_INPUT, "token 1 is 64, but the model's vocabulary has 64",
                    "forward %s/base --tokens 1,64 --dump %s/never.safetensors", dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "has no indexer",
                    "forward %s/base --tokens 1,2 --attention sparse --dump %s/never.safetensors", dir, dir);
  tiny_write(wn_temp(state, "tokens").text, "1 x 3\n");
  wn_winnow_refuses(WN_E_USAGE, "tokens: number 2 is not one: 'x'",
                    "forward %s/base --tokens %s/tokens --dump %s/never.safetensors", dir, dir, dir);
  wn_winnow_refuses(WN_E_IO, "absent/out", "forward %s/base --tokens 1,2 --dump %s/absent/out.safetensors", dir, dir);
  assert_false(wn_path_exists(wn_temp(state, "never.safetensors").text));
}

/* ---- data ---- */

static void refuse_data(void **state, int code, const char *part) {
  const char *dir = *state;
  wn_winnow_refuses(code, part, "warmup %s/job.yaml init=%s/base run_dir=%s/never data.train=%s/hurt", dir, dir, dir,
                    dir);
  if (code == WN_E_INPUT)
    wn_winnow_refuses(code, part, "warmup %s/job.yaml init=%s/base run_dir=%s/never data.train=%s/hurt --check", dir,
                      dir, dir, dir);
  wn_winnow_refuses(code, part, "eval %s/base --data %s/hurt --seq-len 32 --selection dense", dir, dir);
}

static void fresh_data(void **state) {
  for (int i = 0; i < 2; i++) {
    const char *end = i ? "idx" : "bin";
    char from[64], to[64];
    snprintf(from, sizeof from, "train.%s", end);
    snprintf(to, sizeof to, "hurt.%s", end);
    OK(wn_remove_tree(wn_temp(state, to).text));
    OK(wn_copy_file(wn_temp(state, from).text, wn_temp(state, to).text));
  }
}

static void bad_datasets(void **state) {
  const char *dir = *state;
  wn_temp_path bin = wn_temp(state, "hurt.bin"), idx = wn_temp(state, "hurt.idx");
  refuse_data(state, WN_E_IO, "hurt");
  fresh_data(state);
  assert_int_equal(truncate(idx.text, 40), 0);
  refuse_data(state, WN_E_INPUT, "hurt.idx is truncated");
  assert_int_equal(truncate(idx.text, 0), 0);
  refuse_data(state, WN_E_INPUT, "hurt.idx has 0 bytes");
  fresh_data(state);
  overwrite(idx.text, 0, "NOTANIDX", 8);
  refuse_data(state, WN_E_INPUT, "does not begin with MMIDIDX");
  fresh_data(state);
  assert_int_equal(truncate(bin.text, 1000), 0);
  refuse_data(state, WN_E_INPUT, "hurt.bin");
  fresh_data(state);
  overwrite(bin.text, 2 * 1234, "\x40\x00", 2); /* id 64 */
  refuse_data(state, WN_E_INPUT, "64");
  wn_winnow_refuses(WN_E_CHECK, "64", "data verify %s/hurt --vocab 64", dir);
  fresh_data(state);
  wn_winnow_refuses(WN_E_INPUT, "too few for one window of data.seq_len 8000",
                    "warmup %s/job.yaml init=%s/base run_dir=%s/never data.seq_len=8000", dir, dir, dir);
}

static void an_empty_corpus(void **state) {
  const char *dir = *state;
  tiny_write(wn_temp(state, "empty.txt").text, "");
  wn_winnow_refuses(WN_E_INPUT, "empty", "data pack --out %s/packed %s/empty.txt", dir, dir);
  assert_false(wn_path_exists(wn_temp(state, "packed.bin").text) || wn_path_exists(wn_temp(state, "packed.idx").text));
}

/* ---- the run directory ---- */

static void run_directories_that_cannot_be(void **state) {
  const char *dir = *state;
  tiny_write(wn_temp(state, "file").text, "in the way\n");
  wn_winnow_refuses(WN_E_IO, "/file", "warmup %s/job.yaml init=%s/base run_dir=%s/file", dir, dir, dir);
  wn_winnow_refuses(WN_E_IO, "/file", "warmup %s/job.yaml init=%s/base run_dir=%s/file/under", dir, dir, dir);
  wn_winnow_refuses(WN_E_IO, "/proc/winnow", "warmup %s/job.yaml init=%s/base run_dir=/proc/winnow", dir, dir);
  OK(wn_make_dirs(wn_temp(state, "half").text));
  tiny_write(wn_temp(state, "half/checkpoints").text, "in the way\n");
  wn_winnow_refuses(WN_E_IO, "half/checkpoints", "warmup %s/job.yaml init=%s/base run_dir=%s/half", dir, dir, dir);
  OK(wn_make_dirs(wn_temp(state, "csv/metrics/train.csv").text));
  wn_winnow_refuses(WN_E_INPUT, "train.csv is not a regular file", "warmup %s/job.yaml init=%s/base run_dir=%s/csv",
                    dir, dir, dir);
  OK(wn_make_dirs(wn_temp(state, "table/metrics").text));
  tiny_write(wn_temp(state, "table/metrics/layers.csv").text, "step,other\n");
  wn_winnow_refuses(WN_E_INPUT, "layers.csv", "warmup %s/job.yaml init=%s/base run_dir=%s/table", dir, dir, dir);
  tiny_file file = tiny_read(wn_temp(state, "file").text);
  assert_string_equal(file.text, "in the way\n");
  free(file.text);
}

static void refuse_resume(void **state, int code, const char *part, const char *more) {
  const char *dir = *state;
  wn_winnow_refuses(code, part, "warmup %s/job.yaml init=%s/base run_dir=%s/warm checkpoint.interval=2 %s", dir, dir,
                    dir, more);
}

static void resumes_with_other_options(void **state) {
  const char *dir = *state;
  refuse_resume(state, WN_E_CONFIG, "optimizer.lr is", "optimizer.lr=0.5");
  refuse_resume(state, WN_E_CONFIG, "training.seed is 4", "training.seed=4");
  refuse_resume(state, WN_E_CONFIG, "data.seq_len is 16", "data.seq_len=16");
  refuse_resume(state, WN_E_CONFIG, "training.global_batch_seqs is 8", "training.global_batch_seqs=8");
  refuse_resume(state, WN_E_CONFIG, "dsa.index_topk is 5", "dsa.index_topk=5");
  wn_winnow_refuses(WN_E_CONFIG, "init is", "warmup %s/job.yaml init=%s/base-before run_dir=%s/warm", dir, dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "stage is pretrain", "pretrain %s/job.yaml init=%s/base run_dir=%s/warm", dir, dir,
                    dir);
}

static void a_run_without_a_whole_checkpoint(void **state) {
  const char *dir = *state;
  copy_tree(wn_temp(state, "warm").text, wn_temp(state, "ruin").text);
  for (int64_t step = 2; step <= 4; step += 2) {
    char path[WN_PATH_BYTES];
    OK(wn_path(path, "%s/state.json", tiny_step(state, "ruin", step).text));
    assert_int_equal(truncate(path, 10), 0);
  }
  wn_winnow_refuses(WN_E_INPUT, "holds no whole checkpoint",
                    "warmup %s/job.yaml init=%s/base run_dir=%s/ruin training.steps=8", dir, dir, dir);
  wn_winnow_refuses(WN_E_CHECK, "state.json", "verify %s", tiny_step(state, "ruin", 4).text);
  wn_winnow_ends(0, 1, "verify %s", tiny_step(state, "warm", 4).text);
}

/* ---- stages in the wrong order ---- */

static void stages_that_cannot_follow(void **state) {
  const char *dir = *state;
  wn_temp_path warm = tiny_step(state, "warm", 4), untrained = tiny_step(state, "untrained", 1);
  wn_winnow_refuses(WN_E_CONFIG, "adapt needs a trained indexer, and the model in",
                    "adapt %s/job.yaml init=%s/base run_dir=%s/never", dir, dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "has not been through a warm-up", "adapt %s/job.yaml init=%s run_dir=%s/never", dir,
                    untrained.text, dir);
  wn_winnow_refuses(WN_E_CONFIG, "has not been through a warm-up", "adapt %s/job.yaml init=%s run_dir=%s/never --check",
                    dir, untrained.text, dir);
  wn_winnow_refuses(WN_E_CONFIG, "which is for pretrain only", "adapt %s/job.yaml model=%s/random run_dir=%s/never",
                    dir, dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "dsa.index_n_heads is 3, but the model in",
                    "adapt %s/job.yaml init=%s run_dir=%s/never dsa.index_n_heads=3", dir, warm.text, dir);
  wn_winnow_refuses(WN_E_CONFIG, "must be given", "warmup %s/job.yaml init=%s/base run_dir=%s/never dsa.index_topk=0",
                    dir, dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "dsa.index_head_dim is 6, less than the model's rope width 8",
                    "warmup %s/job.yaml init=%s/base run_dir=%s/never dsa.index_head_dim=6", dir, dir, dir);
  assert_false(wn_path_exists(wn_temp(state, "never/checkpoints/step-000006").text));
}

/* A checkpoint whose weights changed behind its manifest is no init either. */
static void a_changed_checkpoint_is_no_init(void **state) {
  const char *dir = *state;
  copy_tree(tiny_step(state, "warm", 4).text, wn_temp(state, "changed").text);
  wn_temp_path trained = wn_temp(state, "changed/model-00005-of-00005.safetensors"); /* after the base's four */
  struct stat info;
  assert_int_equal(stat(trained.text, &info), 0);
  overwrite(trained.text, (size_t)info.st_size - 3, "!", 1);
  wn_winnow_refuses(WN_E_INPUT, "differs from its digest", "adapt %s/job.yaml init=%s/changed run_dir=%s/never", dir,
                    dir, dir);
}

/* What was refused above went to one run directory, with other stages, models and data each time; it is as good as new.
 */
static void a_refused_start_binds_nothing(void **state) {
  const char *dir = *state;
  wn_winnow_ends(0, 1, "pretrain %s/job.yaml init=%s/base run_dir=%s/never training.steps=1", dir, dir, dir);
}

static void nothing_was_lost(void **state) {
  expect_untouched(wn_temp(state, "base").text, wn_temp(state, "base-before").text);
  expect_untouched(wn_temp(state, "warm").text, wn_temp(state, "warm-before").text);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(truncated_safetensors),
      cmocka_unit_test(lying_safetensors),
      cmocka_unit_test(fp8_weights),
      cmocka_unit_test(incomplete_directories),
      cmocka_unit_test(other_models_weights),
      cmocka_unit_test(bad_config_json),
      cmocka_unit_test(bad_job_files),
      cmocka_unit_test(bad_command_lines),
      cmocka_unit_test(bad_datasets),
      cmocka_unit_test(an_empty_corpus),
      cmocka_unit_test(run_directories_that_cannot_be),
      cmocka_unit_test(resumes_with_other_options),
      cmocka_unit_test(a_run_without_a_whole_checkpoint),
      cmocka_unit_test(stages_that_cannot_follow),
      cmocka_unit_test(a_changed_checkpoint_is_no_init),
      cmocka_unit_test(a_refused_start_binds_nothing),
      cmocka_unit_test(nothing_was_lost),
  };
  return cmocka_run_group_tests(tests, setup, wn_temp_teardown);
}
