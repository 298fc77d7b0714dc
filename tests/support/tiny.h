/* What whole-program tests run on: a model of a few thousand weights, all of them random (norms and biases too), in
 * several shards; datasets; a job file for all stages. Laid out once a test program, in a temporary directory: base/,
 * train, valid, job.yaml. */
#ifndef WN_TEST_TINY_H
#define WN_TEST_TINY_H

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "data/dataset.h"
#include "io/hf_dir.h"
#include "model/params.h"
#include "support/program.h"
#include "support/temp.h"

enum { TINY_VOCAB = 64, TINY_TOPK = 6, TINY_SEQ_LEN = 32 };

static inline wn_model_config tiny_config(void) {
  return (wn_model_config){.vocab_size = TINY_VOCAB,
                           .hidden_size = 32,
                           .intermediate_size = 40,
                           .moe_intermediate_size = 12,
                           .num_hidden_layers = 3,
                           .first_k_dense_replace = 1,
                           .num_attention_heads = 3,
                           .n_routed_experts = 4,
                           .n_shared_experts = 1,
                           .num_experts_per_tok = 2,
                           .n_group = 2,
                           .topk_group = 1,
                           .norm_topk_prob = true,
                           .routed_scaling_factor = 1.5,
                           .q_lora_rank = 20,
                           .kv_lora_rank = 16,
                           .qk_nope_head_dim = 10,
                           .qk_rope_head_dim = 8,
                           .v_head_dim = 12,
                           .rms_norm_eps = 1e-6,
                           .rope_theta = 10000,
                           .initializer_range = 0.05,
                           .max_position_embeddings = 16384,
                           .bos_token_id = -1,
                           .eos_token_id = 0};
}

/* The same with an indexer: that of tiny_job. */
static inline wn_model_config tiny_sparse_config(void) {
  wn_model_config config = tiny_config();
  config.has_indexer = true;
  config.index_n_heads = 2;
  config.index_head_dim = 12;
  config.index_topk = TINY_TOPK;
  return config;
}

static inline wn_param_table tiny_table(const wn_model_config *config) {
  wn_param_table table;
  OK(wn_param_table_create(&table, config,
                           (wn_param_settings){.train_base = true, .train_indexer = true, .file_dtype = WN_F32}));
  return table;
}

static inline int64_t tiny_count(const wn_param *p) {
  int64_t n = 1;
  for (int32_t d = 0; d < p->rank; d++) n *= p->dim[d];
  return n;
}

static inline float *tiny_values(const wn_param *p, uint64_t seed) {
  int64_t n = tiny_count(p);
  float *values = malloc((size_t)n * sizeof *values);
  assert_non_null(values);
  wn_tensor t = wn_tensor_of(values, WN_F32, 1, n, 0, 0, 0);
  bool bias = p->slot == WN_P_ROUTER_BIAS || p->slot == WN_P_INDEX_K_NORM_BIAS;
  if (p->rank == 1)
    wn_test_fill(&t, seed, bias ? 0.1 : 0.3, bias ? 0 : 1);
  else
    wn_test_fill(&t, seed, p->slot == WN_P_EMBED ? 1 : 1.5 / sqrt((double)p->dim[1]), 0);
  return values;
}

/* One safetensors file of table entries from .. to - 1. */
static inline void tiny_shard(const char *path, const wn_param *params, float *const *values, int32_t n) {
  wn_st_spec *specs = calloc((size_t)n, sizeof *specs);
  assert_non_null(specs);
  for (int32_t i = 0; i < n; i++) {
    specs[i] = (wn_st_spec){.name = params[i].hf_name, .dtype = WN_F32, .rank = params[i].rank};
    memcpy(specs[i].dim, params[i].dim, sizeof params[i].dim);
  }
  OK(wn_safetensors_write(path, specs, (const void *const *)values, n));
  free(specs);
}

static inline void tiny_index(const char *dir, const wn_param_table *table, int32_t shards) {
  char path[WN_PATH_BYTES];
  OK(wn_path(path, "%s/model.safetensors.index.json", dir));
  FILE *file = fopen(path, "w");
  assert_non_null(file);
  fprintf(file, "{\"metadata\": {}, \"weight_map\": {");
  for (int32_t i = 0; i < table->n; i++)
    fprintf(file, "%s\"%s\": \"model-%05d-of-%05d.safetensors\"", i ? ", " : "", table->params[i].hf_name,
            (int)((int64_t)i * shards / table->n) + 1, shards);
  fprintf(file, "}}\n");
  assert_int_equal(fclose(file), 0);
}

/* `change` (may be NULL) may alter the values [table.n] before they are written. */
typedef void (*tiny_change)(const wn_param_table *table, float **values);
static inline void tiny_model(const char *dir, const wn_model_config *config, uint64_t seed, int32_t shards,
                              tiny_change change) {
  char path[WN_PATH_BYTES];
  wn_param_table table = tiny_table(config);
  float **values = calloc((size_t)table.n, sizeof *values);
  assert_non_null(values);
  OK(wn_make_dirs(dir));
  for (int32_t i = 0; i < table.n; i++) values[i] = tiny_values(&table.params[i], seed * 100000 + (uint64_t)i);
  if (change) change(&table, values);
  for (int32_t s = 0, from = 0; s < shards; s++) {
    int32_t to = from;
    while (to < table.n && (int64_t)to * shards / table.n == s) to++;
    OK(wn_path(path, "%s/model-%05d-of-%05d.safetensors", dir, s + 1, shards));
    tiny_shard(path, table.params + from, values + from, to - from);
    from = to;
  }
  tiny_index(dir, &table, shards);
  OK(wn_model_config_save(config, dir, NULL, "float32"));
  for (int32_t i = 0; i < table.n; i++) free(values[i]);
  free(values);
  wn_param_table_free(&table);
}

/* Documents of 5 to 60 tokens below `vocab` with some order in them: half of the tokens follow from the one before. */
static inline void tiny_data(const char *prefix, int32_t vocab, int64_t tokens, uint64_t seed) {
  wn_dataset_writer *writer;
  int32_t document[64];
  int64_t written = 0;
  OK(wn_dataset_writer_create(&writer, prefix, TINY_VOCAB, false));
  for (uint64_t d = 0; written < tokens; d++) {
    int32_t n = 5 + (int32_t)wn_rng_below(seed, WN_RNG_TEST, d << 20, 56);
    for (int32_t i = 0; i < n; i++) {
      uint64_t at = d << 20 | (uint64_t)(2 * i + 1);
      bool follows = i > 0 && wn_rng_below(seed, WN_RNG_TEST, at + 1, 2) == 0;
      document[i] =
          follows ? (document[i - 1] * 5 + 3) % vocab : (int32_t)wn_rng_below(seed, WN_RNG_TEST, at, (uint64_t)vocab);
    }
    OK(wn_dataset_writer_add(writer, document, NULL, n));
    written += n;
  }
  OK(wn_dataset_writer_close(writer, true));
}

static inline void tiny_write(const char *path, const char *text) {
  wn_temp_write(path, text, strlen(text));
}

/* DIR/job.yaml: init and run_dir are given on the command line. */
static inline void tiny_job(const char *dir) {
  char path[WN_PATH_BYTES], text[4096];
  OK(wn_path(path, "%s/job.yaml", dir));
  snprintf(text, sizeof text,
           "device: cpu\nthreads: 1\n"
           "data: {train: %s/train, valid: %s/valid, seq_len: %d}\n"
           "training: {steps: 6, global_batch_seqs: 4, micro_batch_seqs: 2, seed: 3, max_skipped_in_a_row: 3}\n"
           "optimizer: {lr: 2.0e-3, indexer_lr: 3.0e-3}\n"
           "dsa: {index_n_heads: 2, index_head_dim: 12, index_topk: %d}\n"
           "moe: {balance_loss_coeff: 0.01}\n"
           "checkpoint: {interval: 0, keep: 0, dtype: f32}\n"
           "metrics: {layers_every: 2, sample_rows: 12, eval_every: 3, eval_seqs: 2}\n",
           dir, dir, TINY_SEQ_LEN, TINY_TOPK);
  tiny_write(path, text);
}

/* Group setup and teardown: *state is the directory. */
static inline int tiny_setup(void **state) {
  if (wn_temp_setup(state)) return -1;
  wn_model_config config = tiny_config();
  tiny_model(wn_temp(state, "base").text, &config, 1, 4, NULL);
  tiny_data(wn_temp(state, "train").text, TINY_VOCAB, 3000, 1);
  tiny_data(wn_temp(state, "valid").text, TINY_VOCAB, 500, 2);
  tiny_job(*state);
  return 0;
}

/* ---- looking at what came out ---- */

static inline wn_temp_path tiny_step(void **state, const char *run, int64_t step) {
  wn_temp_path path;
  snprintf(path.text, sizeof path.text, "%s/%s/checkpoints/step-%06lld", (const char *)*state, run, (long long)step);
  return path;
}

typedef struct tiny_file {
  char *text;
  size_t bytes;
} tiny_file;
static inline tiny_file tiny_read(const char *path) {
  tiny_file file;
  OK(wn_read_file(&file.text, &file.bytes, path, (size_t)1 << 30));
  return file;
}

static inline bool tiny_same_file(const char *a, const char *b) {
  tiny_file x = tiny_read(a), y = tiny_read(b);
  bool same = x.bytes == y.bytes && memcmp(x.text, y.text, x.bytes) == 0;
  free(x.text);
  free(y.text);
  return same;
}

static inline void tiny_expect_same_file(const char *a, const char *b) {
  if (!tiny_same_file(a, b)) fail_msg("%s and %s differ", a, b);
}

/* Every file of both directories, byte for byte. */
static inline void tiny_expect_same_tree(const char *a, const char *b) {
  char **names, **others, x[WN_PATH_BYTES], y[WN_PATH_BYTES];
  size_t n, n_others;
  OK(wn_list_dir(&names, &n, a));
  OK(wn_list_dir(&others, &n_others, b));
  if (n != n_others) fail_msg("%s holds %zu files, %s %zu", a, n, b, n_others);
  for (size_t i = 0; i < n; i++) {
    assert_string_equal(names[i], others[i]);
    OK(wn_path(x, "%s/%s", a, names[i]));
    OK(wn_path(y, "%s/%s", b, names[i]));
    tiny_expect_same_file(x, y);
  }
  wn_list_free(names, n);
  wn_list_free(others, n_others);
}

/* The deterministic tables of two runs. */
static inline void tiny_expect_same_tables(void **state, const char *run, const char *other) {
  static const char *const tables[] = {"train", "layers", "eval"};
  char x[WN_PATH_BYTES], y[WN_PATH_BYTES];
  for (size_t i = 0; i < sizeof tables / sizeof *tables; i++) {
    OK(wn_path(x, "%s/%s/metrics/%s.csv", (const char *)*state, run, tables[i]));
    OK(wn_path(y, "%s/%s/metrics/%s.csv", (const char *)*state, other, tables[i]));
    tiny_expect_same_file(x, y);
  }
}

/* Cell of RUN/metrics/TABLE.csv by row (from 0) and column name; NaN where it is empty, and *rows (may be NULL) how
 * many there are. */
static inline double tiny_cell(void **state, const char *run, const char *table, int64_t row, const char *column,
                               int64_t *rows) {
  char path[WN_PATH_BYTES];
  OK(wn_path(path, "%s/%s/metrics/%s.csv", (const char *)*state, run, table));
  tiny_file file = tiny_read(path);
  char *rest = file.text, *line = strsep(&rest, "\n");
  int64_t at = -1, count = 0;
  double value = NAN;
  for (char *name; (name = strsep(&line, ","));) {
    if (strcmp(name, column) == 0) at = count;
    count++;
  }
  if (at < 0) fail_msg("%s has no column %s", path, column);
  count = 0;
  while ((line = strsep(&rest, "\n")) && *line) {
    if (count++ != row) continue;
    for (int64_t i = 0; i < at; i++) strsep(&line, ",");
    char *cell = strsep(&line, ",");
    value = cell && *cell ? strtod(cell, NULL) : NAN;
  }
  free(file.text);
  if (rows)
    *rows = count;
  else if (row >= count)
    fail_msg("%s has %lld rows; wanted row %lld", path, (long long)count, (long long)row);
  return value;
}

static inline bool tiny_bits_differ(const wn_st_entry *a, const wn_st_entry *b) {
  return a->bytes != b->bytes || memcmp(a->data, b->data, a->bytes) != 0;
}

static inline bool tiny_is_indexer(const char *name) {
  return strstr(name, ".indexer.") != NULL;
}

/* All of the optimizer's tensors of a checkpoint, as far as one file holds them. */
static inline wn_safetensors *tiny_optimizer(const char *checkpoint) {
  char path[WN_PATH_BYTES];
  wn_safetensors *file;
  OK(wn_path(path, "%s/optimizer-00001-of-00001.safetensors", checkpoint));
  OK(wn_safetensors_open(&file, path));
  return file;
}

#endif
