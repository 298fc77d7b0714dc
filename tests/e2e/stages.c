/* What the stages promise of whole runs: what moves, what stays to the bit, and what does not mix. */
#include "support/tiny.h"

#include "kernels/cpu/cpu.h"
#include "train/checkpoint.h"
#include "train/evaluate.h"
#include "train/inference.h"

enum { N_TOKENS = 40 };

static void train(void **state, const char *stage, const char *init, const char *run, const char *more) {
  const char *dir = *state;
  wn_winnow_ends(0, 1, "%s %s/job.yaml init=%s run_dir=%s/%s %s", stage, dir, init, dir, run, more);
}

static wn_hf_dir *open_model(const char *path) {
  wn_hf_dir *dir;
  OK(wn_hf_dir_open(&dir, path));
  return dir;
}

/* ---- stage 1 leaves the model alone ---- */

static void base_tensors_are_linked_and_unchanged(void **state) {
  wn_temp_path base = wn_temp(state, "base"), after = tiny_step(state, "warm", 6);
  train(state, "warmup", base.text, "warm", "");
  wn_hf_dir *a = open_model(base.text), *b = open_model(after.text);
  int64_t indexers = 0;
  for (int64_t i = 0; i < wn_hf_dir_count(b); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(b, i, NULL), *before = wn_hf_dir_find(a, entry->name, NULL);
    if (tiny_is_indexer(entry->name))
      indexers++;
    else if (!before || tiny_bits_differ(entry, before))
      fail_msg("%s is not what it was", entry->name);
  }
  assert_int_equal(wn_hf_dir_count(b), wn_hf_dir_count(a) + indexers);
  assert_int_equal(indexers, 3 * 5);
  assert_int_equal(wn_hf_dir_shards(a), 4);
  for (int32_t s = 0; s < wn_hf_dir_shards(a); s++) {
    struct stat theirs, ours;
    bool found = false;
    assert_int_equal(stat(wn_hf_dir_shard_path(a, s), &theirs), 0);
    for (int32_t t = 0; t < wn_hf_dir_shards(b); t++) {
      assert_int_equal(stat(wn_hf_dir_shard_path(b, t), &ours), 0);
      found = found || (theirs.st_ino == ours.st_ino && theirs.st_dev == ours.st_dev);
    }
    if (!found) fail_msg("%s was not linked", wn_hf_dir_shard_path(a, s));
  }
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
}

static void token_list(char *out, size_t bytes) {
  size_t used = 0;
  for (int i = 0; i < N_TOKENS; i++)
    used += (size_t)snprintf(out + used, bytes - used, "%s%d", i ? "," : "", (i * 29 + i * i * 7) % TINY_VOCAB);
}

static wn_safetensors *forward(void **state, const char *model, const char *name) {
  char tokens[N_TOKENS * 4];
  wn_temp_path dump = wn_temp(state, name);
  wn_safetensors *file;
  token_list(tokens, sizeof tokens);
  wn_winnow_ends(0, 1, "forward %s --tokens %s --documents 0,17 --threads 1 --dump %s", model, tokens, dump.text);
  OK(wn_safetensors_open(&file, dump.text));
  return file;
}

/* Every tensor that does not come from the indexer. */
static void hidden_states_equal_the_base(void **state) {
  wn_safetensors *base = forward(state, wn_temp(state, "base").text, "base.safetensors");
  wn_safetensors *warm = forward(state, tiny_step(state, "warm", 6).text, "warm.safetensors");
  assert_int_equal(wn_safetensors_count(base), 3 + 3 + 2); /* hidden.0 .. 3, attn.0 .. 2, logits */
  for (int64_t i = 0; i < wn_safetensors_count(base); i++) {
    const wn_st_entry *a = wn_safetensors_at(base, i), *b = wn_safetensors_find(warm, a->name);
    if (!b || tiny_bits_differ(a, b)) fail_msg("%s differs from the base's", a->name);
  }
  assert_non_null(wn_safetensors_find(warm, "index_scores.2"));
  wn_safetensors_close(base);
  wn_safetensors_close(warm);
}

/* Sums of log-probabilities of every held-out window, as they leave the model. */
static wn_eval_result dense_eval(void **state, const char *model, int32_t topk) {
  wn_world *world;
  wn_inference in;
  wn_dataset *dataset;
  wn_eval_result result;
  OK(wn_world_create(&world, 10));
  OK(wn_inference_open(&in, model, WN_JOB_CPU, 1, false, world, NULL));
  OK(wn_dataset_open(&dataset, wn_temp(state, "valid").text));
  wn_eval_settings settings = {.world = world,
                               .device = in.device,
                               .model = in.model,
                               .store = in.store,
                               .dataset = dataset,
                               .seq_len = TINY_SEQ_LEN,
                               .document_mask = true,
                               .topk = topk,
                               .sample_rows = 8,
                               .seed = 1};
  OK(wn_evaluate(&result, &settings, WN_SELECT_DENSE));
  wn_dataset_close(dataset);
  wn_inference_close(&in);
  wn_world_free(world);
  return result;
}

static void expect_same_eval(wn_eval_result a, wn_eval_result b, const char *what) {
  assert_true(a.n_seqs > 10 && a.n_seqs == b.n_seqs);
  for (int64_t i = 0; i < a.n_seqs; i++)
    if (a.sequences[i].loss_sum != b.sequences[i].loss_sum || a.sequences[i].tokens != b.sequences[i].tokens)
      fail_msg("%s: window %lld has %.17g, not %.17g", what, (long long)i, b.sequences[i].loss_sum,
               a.sequences[i].loss_sum);
  wn_eval_result_free(&b);
}

static void dense_loss_does_not_know_the_indexer(void **state) {
  wn_temp_path warm = tiny_step(state, "warm", 6), seeded = tiny_step(state, "seeded", 6),
               one = tiny_step(state, "one", 6);
  train(state, "warmup", wn_temp(state, "base").text, "seeded", "training.seed=77");
  train(state, "warmup", wn_temp(state, "base").text, "one", "dsa.index_topk=1");
  wn_hf_dir *a = open_model(warm.text), *b = open_model(seeded.text);
  const char *name = "model.layers.1.self_attn.indexer.wk.weight";
  assert_true(tiny_bits_differ(wn_hf_dir_find(a, name, NULL), wn_hf_dir_find(b, name, NULL)));
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
  wn_eval_result base = dense_eval(state, wn_temp(state, "base").text, TINY_TOPK);
  expect_same_eval(base, dense_eval(state, warm.text, TINY_TOPK), "warmed up");
  expect_same_eval(base, dense_eval(state, seeded.text, TINY_TOPK), "another indexer");
  expect_same_eval(base, dense_eval(state, one.text, TINY_TOPK), "warmed up with index_topk 1");
  expect_same_eval(base, dense_eval(state, one.text, 1), "one key a row");
  wn_eval_result_free(&base);
  const char *dir = *state;
  const char *const models[] = {seeded.text, one.text};
  for (size_t i = 0; i < 2; i++)
    wn_winnow_ends(
        0, 1,
        "eval %s --device cpu --data %s/valid --selection dense --topk %d --seq-len 32 --threads 1 --csv %s/%zu.csv "
        "--sequences %s/%zu-s.csv",
        models[i], dir, i ? 1 : 6, dir, i, dir, i);
  tiny_expect_same_file(wn_temp(state, "0-s.csv").text, wn_temp(state, "1-s.csv").text);
}

/* In the training itself: neither the number of picks nor the indexer's weights reach a teacher. */
static void another_indexer(const wn_param_table *table, float **values) {
  for (int32_t i = 0; i < table->n; i++)
    for (int64_t e = 0; tiny_is_indexer(table->params[i].hf_name) && e < tiny_count(&table->params[i]); e++)
      values[i][e] = 0.4f - values[i][e];
}

static void teachers_do_not_know_the_indexer(void **state) {
  static const char *const columns[] = {"kl_uniform", "mass_best",      "mass_recent",
                                        "mass_sink",  "entropy_target", "expert_load_max"};
  wn_model_config config = tiny_sparse_config();
  char warm[WN_PATH_BYTES], one[WN_PATH_BYTES];
  OK(wn_path(warm, "%s/optimizer-00001-of-00001.safetensors", tiny_step(state, "warm", 6).text));
  OK(wn_path(one, "%s/optimizer-00001-of-00001.safetensors", tiny_step(state, "one", 6).text));
  tiny_expect_same_file(warm, one); /* of six picks and of one */
  tiny_expect_same_file(wn_temp(state, "warm/metrics/train.csv").text, wn_temp(state, "one/metrics/train.csv").text);
  tiny_model(wn_temp(state, "first").text, &config, 1, 2, NULL);
  tiny_model(wn_temp(state, "second").text, &config, 1, 2, another_indexer);
  train(state, "warmup", wn_temp(state, "first").text, "taught-first", "");
  train(state, "warmup", wn_temp(state, "second").text, "taught-second", "");
  int64_t rows, different = 0;
  tiny_cell(state, "taught-first", "layers", 0, "step", &rows);
  assert_int_equal(rows, 3 * 4); /* steps 1, 2, 4 and 6 */
  for (int64_t row = 0; row < rows; row++) {
    for (size_t c = 0; c < sizeof columns / sizeof *columns; c++) {
      double a = tiny_cell(state, "taught-first", "layers", row, columns[c], NULL),
             b = tiny_cell(state, "taught-second", "layers", row, columns[c], NULL);
      if (a != b && !(isnan(a) && isnan(b)))
        fail_msg("row %lld: %s is %.9g and %.9g", (long long)row, columns[c], a, b);
    }
    different += tiny_cell(state, "taught-first", "layers", row, "kl", NULL) !=
                 tiny_cell(state, "taught-second", "layers", row, "kl", NULL);
  }
  assert_int_equal(different, rows);
}

/* ---- stage 2: two gradients that never mix ---- */

/* Compares weights and both moments of two checkpoints, tensor by tensor: of the indexer, or of all else. */
static int64_t differing(void **state, const char *run, const char *other, bool indexer) {
  wn_temp_path x = tiny_step(state, run, 1), y = tiny_step(state, other, 1);
  wn_hf_dir *a = open_model(x.text), *b = open_model(y.text);
  wn_safetensors *m = tiny_optimizer(x.text), *n = tiny_optimizer(y.text);
  int64_t differ = 0, compared = 0;
  for (int64_t i = 0; i < wn_hf_dir_count(a); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(a, i, NULL);
    if (tiny_is_indexer(entry->name) != indexer) continue;
    compared++;
    differ += tiny_bits_differ(entry, wn_hf_dir_find(b, entry->name, NULL));
  }
  for (int64_t i = 0; i < wn_safetensors_count(m); i++) {
    const wn_st_entry *entry = wn_safetensors_at(m, i);
    if (tiny_is_indexer(entry->name) != indexer) continue;
    compared++;
    differ += tiny_bits_differ(entry, wn_safetensors_find(n, entry->name));
  }
  assert_true(compared >= 45);
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
  wn_safetensors_close(m);
  wn_safetensors_close(n);
  return differ;
}

static void adapt_once(void **state, const char *run, const char *more) {
  char options[256];
  snprintf(options, sizeof options, "training.steps=1 %s", more);
  train(state, "adapt", tiny_step(state, "warm", 6).text, run, options);
}

static void the_kl_does_not_reach_the_base(void **state) {
  adapt_once(state, "kl1", "optimizer.clip_grad=0");
  adapt_once(state, "kl10", "optimizer.clip_grad=0 dsa.loss_coeff=10");
  assert_int_equal(differing(state, "kl1", "kl10", false), 0);
  assert_true(differing(state, "kl1", "kl10", true) >= 30);
  /* and not through a common norm either: both are clipped hard here */
  adapt_once(state, "clip1", "optimizer.clip_grad=0.01");
  adapt_once(state, "clip10", "optimizer.clip_grad=0.01 dsa.loss_coeff=10");
  assert_int_equal(differing(state, "clip1", "clip10", false), 0);
  assert_true(differing(state, "kl1", "clip1", false) >= 60);
  assert_true(tiny_cell(state, "kl1", "train", 0, "grad_norm", NULL) > 0.01);
  assert_true(tiny_cell(state, "kl10", "train", 0, "indexer_grad_norm", NULL) >
              9 * tiny_cell(state, "kl1", "train", 0, "indexer_grad_norm", NULL));
}

static void the_token_loss_does_not_reach_the_indexer(void **state) {
  adapt_once(state, "plain", "");
  adapt_once(state, "balance", "moe.balance_loss_coeff=1");
  adapt_once(state, "faster", "optimizer.lr=0.1");
  assert_int_equal(differing(state, "plain", "balance", true), 0);
  assert_int_equal(differing(state, "plain", "faster", true), 0);
  assert_true(differing(state, "plain", "balance", false) > 0);
  assert_true(differing(state, "plain", "faster", false) > 0);
}

/* ---- what the optimizer may touch ---- */

static void a_frozen_base_has_no_optimizer_state(void **state) {
  wn_safetensors *file = tiny_optimizer(tiny_step(state, "warm", 6).text);
  assert_int_equal(wn_safetensors_count(file), 3 * 5 * 2);
  for (int64_t i = 0; i < wn_safetensors_count(file); i++)
    assert_true(tiny_is_indexer(wn_safetensors_at(file, i)->name));
  wn_safetensors_close(file);
  wn_state s = {0};
  wn_stage stage;
  bool found;
  OK(wn_checkpoint_read_state(tiny_step(state, "warm", 6).text, &s, &stage, &found));
  assert_true(found && stage == WN_STAGE_WARMUP && s.indexer_trained);
  assert_int_equal(s.adam_indexer, 6);
  assert_int_equal(s.adam_base, 0);
  assert_int_equal(s.router_bias_updates, 0);
}

static void nor_memory_for_it(void **state) {
  wn_model_config config = tiny_sparse_config();
  (void)state;
  wn_world *world;
  wn_device *device;
  wn_model *model;
  wn_store *store;
  OK(wn_world_create(&world, 10));
  OK(wn_cpu_create_f32(&device, (wn_cpu_settings){.threads = 1}));
  OK(wn_model_create(&model, device, &config, (wn_param_settings){.train_indexer = true, .file_dtype = WN_F32}));
  wn_group *all = wn_world_all(world);
  size_t before = wn_arena_used_bytes(device->weights);
  OK(wn_store_create(&store, device, world, &all, 1, model->table.params, model->table.n));
  int64_t elements[2] = {0, 0};
  for (int32_t i = 0; i < wn_store_pieces(store); i++) {
    const wn_piece *piece = wn_store_piece(store, i);
    elements[piece->kind == WN_INDEXER] += piece->master.dim[0];
    assert_true(piece->kind == WN_FROZEN || piece->kind == WN_INDEXER);
    bool has = piece->m.data || piece->v.data || piece->grad.data;
    assert_true(has == (piece->kind == WN_INDEXER));
  }
  size_t used = wn_arena_used_bytes(device->weights) - before,
         wanted = (size_t)elements[0] * 4 + (size_t)elements[1] * 16;
  if (used < wanted || used > wanted + wanted / 20 + 16384) fail_msg("%zu bytes for a state of %zu", used, wanted);
  wn_store_free(store);
  wn_model_free(model);
  wn_cpu_free_f32(device);
  wn_world_free(world);
}

static bool is_vector(const char *name) {
  return strstr(name, "norm") || strstr(name, ".bias");
}

static void norms_and_biases_do_not_decay(void **state) {
  const char *const runs[] = {"still", "decayed"};
  adapt_once(state, "still", "optimizer.weight_decay=0");
  adapt_once(state, "decayed", "optimizer.weight_decay=5");
  wn_hf_dir *a = open_model(tiny_step(state, runs[0], 1).text), *b = open_model(tiny_step(state, runs[1], 1).text);
  int64_t vectors = 0;
  for (int64_t i = 0; i < wn_hf_dir_count(a); i++) {
    const wn_st_entry *entry = wn_hf_dir_at(a, i, NULL);
    bool same = !tiny_bits_differ(entry, wn_hf_dir_find(b, entry->name, NULL)),
         vector = is_vector(entry->name) || strstr(entry->name, "correction_bias");
    vectors += vector;
    if (same != vector) fail_msg("%s %s", entry->name, same ? "did not decay" : "decayed");
  }
  assert_int_equal(vectors,
                   3 * 4 + 1 + 2 + 3 * 2); /* norms of the layers, the last norm, router biases, k_norm's pair */
  wn_hf_dir_close(a);
  wn_hf_dir_close(b);
}

/* By how many experts the bias went up and down, after one step at `speed`; every one must have moved by exactly that
 * or not at all. */
static void bias_moves(void **state, const char *run, float speed, int moved[3]) {
  wn_hf_dir *before = open_model(wn_temp(state, "base").text), *after = open_model(tiny_step(state, run, 1).text);
  for (int layer = 1; layer < 3; layer++) {
    char name[96];
    snprintf(name, sizeof name, "model.layers.%d.mlp.gate.e_score_correction_bias", layer);
    const wn_st_entry *a = wn_hf_dir_find(before, name, NULL), *b = wn_hf_dir_find(after, name, NULL);
    assert_true(a && b && b->dtype == WN_F32 && b->dim[0] == 4);
    for (int e = 0; e < 4; e++) {
      float was, is;
      memcpy(&was, (const float *)a->data + e, sizeof was);
      memcpy(&is, (const float *)b->data + e, sizeof is);
      if (is == was)
        moved[1]++;
      else if (is == was + speed)
        moved[2]++;
      else if (is == was - speed)
        moved[0]++;
      else
        fail_msg("%s of expert %d went from %.9g to %.9g at speed %g", name, e, (double)was, (double)is, (double)speed);
    }
  }
  wn_hf_dir_close(before);
  wn_hf_dir_close(after);
}

static void the_router_bias_moves_by_exactly_its_speed(void **state) {
  int fast[3] = {0}, halted[3] = {0}, adapted[3] = {0};
  train(state, "pretrain", wn_temp(state, "base").text, "bias", "training.steps=1 moe.bias_update_speed=0.01");
  bias_moves(state, "bias", 0.01f, fast);
  assert_true(fast[0] > 0 && fast[2] > 0);
  train(state, "pretrain", wn_temp(state, "base").text, "halted", "training.steps=1 moe.bias_update_speed=0");
  bias_moves(state, "halted", 0.01f, halted);
  assert_int_equal(halted[1], 8);
  adapt_once(state, "biased", "moe.bias_update_speed=0.001");
  bias_moves(state, "biased", 0.001f, adapted);
  assert_true(adapted[0] > 0 && adapted[2] > 0);
}

/* ---- the hand-over ---- */

/* Of the arena's table in memory.txt. */
static int64_t stash_bytes(void **state, const char *run, const char *name) {
  char path[WN_PATH_BYTES];
  OK(wn_path(path, "%s/%s/memory.txt", (const char *)*state, run));
  tiny_file file = tiny_read(path);
  int64_t bytes = 0;
  for (char *line = strtok(file.text, "\n"); line; line = strtok(NULL, "\n")) {
    const char *at = strncmp(line, "stash", 5) == 0 ? strstr(line, name) : NULL;
    if (at) bytes = strtoll(at + strlen(name), NULL, 10);
  }
  free(file.text);
  return bytes;
}

/* A backward that takes attention's output, or all, from the forward makes the bits of one that computes it again; and
 * it was kept indeed, but attention's output not in the absorbed form. */
static void what_is_kept_changes_nothing(void **state) {
  wn_temp_path base = wn_temp(state, "base"), warm = tiny_step(state, "warm", 6);
  const struct {
    const char *stage, *init, *options;
    bool keeps;
  } jobs[] = {{"pretrain", base.text, "", true},
              {"adapt", warm.text, "data.seq_len=14", true}, /* short: masked */
              {"adapt", warm.text, "", false}};
  wn_model_config config = tiny_config();
  assert_int_equal(wn_model_attention_form(&config, 1, 14, TINY_TOPK), WN_FORM_MASKED);
  assert_int_equal(wn_model_attention_form(&config, 1, TINY_SEQ_LEN, TINY_TOPK), WN_FORM_ABSORBED);
  for (size_t j = 0; j < sizeof jobs / sizeof *jobs; j++) {
    static const char *const keep[] = {"inputs", "attention", "all"};
    char run[3][32], with[160];
    for (int kept = 0; kept < 3; kept++) {
      snprintf(run[kept], sizeof run[kept], "kept-%zu-%d", j, kept);
      snprintf(with, sizeof with, "%s training.keep=%s", jobs[j].options, keep[kept]);
      train(state, jobs[j].stage, jobs[j].init, run[kept], with);
      assert_int_equal(stash_bytes(state, run[kept], "attention outputs") > 0, kept > 0 && jobs[j].keeps);
      assert_int_equal(stash_bytes(state, run[kept], "expert rows ") > 0, kept == 2);
      if (kept == 0) continue;
      tiny_expect_same_tree(tiny_step(state, run[0], 6).text, tiny_step(state, run[kept], 6).text);
      tiny_expect_same_tables(state, run[0], run[kept]);
    }
  }
}

static void adapt_carries_the_indexers_moments(void **state) {
  wn_state s = {0};
  wn_stage stage;
  bool found;
  OK(wn_checkpoint_read_state(tiny_step(state, "plain", 1).text, &s, &stage, &found));
  assert_true(found && stage == WN_STAGE_ADAPT && s.indexer_trained);
  assert_int_equal(s.adam_indexer, 7);
  assert_int_equal(s.adam_base, 1);
  assert_int_equal(s.step, 1);
  assert_int_equal(s.tokens, 4 * TINY_SEQ_LEN);
  adapt_once(state, "afresh", "optimizer.carry_indexer=false");
  OK(wn_checkpoint_read_state(tiny_step(state, "afresh", 1).text, &s, &stage, &found));
  assert_int_equal(s.adam_indexer, 1);
  assert_true(differing(state, "plain", "afresh", true) >= 30);
  assert_int_equal(differing(state, "plain", "afresh", false), 0);
}

/* A learning rate of 0 and no decay: one step leaves the weights and shows the moments m = beta1 m + (1 - beta1) g as
 * carried. */
static void moments_arrive_to_the_bit(void **state) {
  adapt_once(state, "kept",
             "optimizer.lr=0 optimizer.indexer_lr=0 optimizer.beta1=0.9 optimizer.beta2=0.95 dsa.loss_coeff=1e-30");
  wn_safetensors *before = tiny_optimizer(tiny_step(state, "warm", 6).text),
                 *after = tiny_optimizer(tiny_step(state, "kept", 1).text);
  for (int64_t i = 0; i < wn_safetensors_count(before); i++) {
    const wn_st_entry *a = wn_safetensors_at(before, i), *b = wn_safetensors_find(after, a->name);
    assert_non_null(b);
    float beta = a->name[strlen(a->name) - 1] == 'm' ? 0.9f : 0.95f;
    for (size_t e = 0; e < a->bytes / sizeof(float); e++) {
      float was, is;
      memcpy(&was, (const float *)a->data + e, sizeof was);
      memcpy(&is, (const float *)b->data + e, sizeof is);
      if (!(fabsf(is - beta * was) <= 1e-6f * fabsf(was) + 1e-30f))
        fail_msg("%s[%zu] went from %g to %g", a->name, e, (double)was, (double)is);
    }
  }
  wn_safetensors_close(before);
  wn_safetensors_close(after);
}

/* ---- eval ---- */

static double loss_of(const char *out, const char *selection) {
  char line[64];
  snprintf(line, sizeof line, "\n%s ", selection);
  const char *at = strstr(out, line);
  long long tokens;
  double loss;
  assert_non_null(at);
  assert_int_equal(sscanf(at + strlen(line), " %lld %lf", &tokens, &loss), 2);
  assert_true(tokens > 300);
  return loss;
}

static void eval_runs_all_selections(void **state) {
  static const char *const names[] = {"dense", "indexer", "best", "recent", "sink", "random"};
  const char *dir = *state;
  wn_temp_path model = tiny_step(state, "warm", 6);
  wn_program p, all;
  wn_winnow(&p, 1, "eval %s --device cpu --data %s/valid --topk 4 --seq-len 32 --threads 1", model.text, dir);
  assert_int_equal(p.code, 0);
  for (size_t i = 0; i < 6; i++) assert_true(loss_of(p.out, names[i]) > 1 && loss_of(p.out, names[i]) < 20);
  for (size_t i = 1; i < 6; i++) assert_true(loss_of(p.out, names[i]) != loss_of(p.out, "dense"));
  /* with as many keys as there are, every selection is dense attention */
  wn_winnow(&all, 1, "eval %s --device cpu --data %s/valid --topk 64 --seq-len 32 --threads 1", model.text, dir);
  assert_int_equal(all.code, 0);
  for (size_t i = 1; i < 6; i++) assert_true(fabs(loss_of(all.out, names[i]) - loss_of(all.out, "dense")) < 2e-4);
  assert_true(loss_of(all.out, "dense") == loss_of(p.out, "dense"));
}

static void eval_on_two_ranks_says_the_same(void **state) {
  const char *dir = *state;
  wn_temp_path model = tiny_step(state, "warm", 6);
  for (int32_t ranks = 1; ranks <= 2; ranks++)
    wn_winnow_ends(
        0, ranks,
        "eval %s --device cpu --data %s/valid --selection indexer,random --topk 4 --seq-len 32 --threads 1 --sequences "
        "%s/ranks%d.csv",
        model.text, dir, dir, ranks);
  tiny_expect_same_file(wn_temp(state, "ranks1.csv").text, wn_temp(state, "ranks2.csv").text);
}

/* ---- jobs that come with the program ---- */

/* One job file, without weights: where it starts from a checkpoint that is yet to be made, a config.json alone stands
 * in for it. The data are named anew: whether a job's own are there, and packed for another model, is not the question.
 */
static void check_job(const char *folder, const char *path, const char *name) {
  static const char data[] = "data.train=absent/train data.valid=absent/valid";
  char dense[WN_PATH_BYTES];
  OK(wn_path(dense, "configs/models/%s", folder));
  tiny_file file = tiny_read(path);
  bool from_init = strncmp(file.text, "init:", 5) == 0 || strstr(file.text, "\ninit:");
  free(file.text);
  if (strncmp(name, "adapt", 5) == 0)
    wn_winnow_ends(0, 1,
                   "adapt %s init=configs/models/deepseek-v3.2 dsa.index_n_heads=0 dsa.index_head_dim=0 %s --check",
                   path, data);
  else if (strncmp(name, "warmup", 6) == 0)
    wn_winnow_ends(0, 1, "warmup %s init=%s %s --check", path, dense, data);
  else
    wn_winnow_ends(0, 1, "pretrain %s %s%s %s --check", path, from_init ? "init=" : "", from_init ? dense : "", data);
}

static void the_jobs_that_come_along_check(void **state) {
  char **folders, **names, path[WN_PATH_BYTES];
  size_t n_folders, n, checked = 0;
  (void)state;
  OK(wn_list_dir(&folders, &n_folders, "configs/jobs"));
  for (size_t f = 0; f < n_folders; f++) {
    OK(wn_path(path, "configs/jobs/%s", folders[f]));
    OK(wn_list_dir(&names, &n, path));
    for (size_t i = 0; i < n; i++) {
      size_t length = strlen(names[i]);
      if (length < 5 || strcmp(names[i] + length - 5, ".yaml") != 0) continue;
      OK(wn_path(path, "configs/jobs/%s/%s", folders[f], names[i]));
      check_job(folders[f], path, names[i]);
      checked++;
    }
    wn_list_free(names, n);
  }
  wn_list_free(folders, n_folders);
  assert_true(checked >= 5);
}

/* The paper's two, without a word of change but where the model is. */
static void the_papers_recipes_check(void **state) {
  (void)state;
  wn_winnow_ends(0, 1, "warmup configs/jobs/deepseek-v3.1/warmup.yaml init=configs/models/deepseek-v3.1 --check");
  wn_winnow_ends(0, 1, "adapt configs/jobs/deepseek-v3.1/adapt.yaml init=configs/models/deepseek-v3.2 --check");
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(base_tensors_are_linked_and_unchanged),
      cmocka_unit_test(hidden_states_equal_the_base),
      cmocka_unit_test(dense_loss_does_not_know_the_indexer),
      cmocka_unit_test(teachers_do_not_know_the_indexer),
      cmocka_unit_test(the_kl_does_not_reach_the_base),
      cmocka_unit_test(the_token_loss_does_not_reach_the_indexer),
      cmocka_unit_test(a_frozen_base_has_no_optimizer_state),
      cmocka_unit_test(nor_memory_for_it),
      cmocka_unit_test(norms_and_biases_do_not_decay),
      cmocka_unit_test(the_router_bias_moves_by_exactly_its_speed),
      cmocka_unit_test(what_is_kept_changes_nothing),
      cmocka_unit_test(adapt_carries_the_indexers_moments),
      cmocka_unit_test(moments_arrive_to_the_bit),
      cmocka_unit_test(eval_runs_all_selections),
      cmocka_unit_test(eval_on_two_ranks_says_the_same),
      cmocka_unit_test(the_jobs_that_come_along_check),
      cmocka_unit_test(the_papers_recipes_check),
  };
  return cmocka_run_group_tests(tests, tiny_setup, wn_temp_teardown);
}
