/* `winnow plan` against what runs take: the allocator's own table after a step and an evaluation, on 1, 2 and 4 ranks,
 * and the checkpoints that they write. */
#include "support/fp8_model.h"
#include "support/plan.h"

/* New bytes of a checkpoint: its files that are not links of the base (nor index, state and the like). */
static double weights_written(void **state, const char *run, int64_t step) {
  wn_temp_path dir = tiny_step(state, run, step);
  char **names, path[WN_PATH_BYTES];
  size_t n;
  struct stat info;
  double bytes = 0;
  OK(wn_list_dir(&names, &n, dir.text));
  for (size_t i = 0; i < n; i++) {
    OK(wn_path(path, "%s/%s", dir.text, names[i]));
    assert_int_equal(stat(path, &info), 0);
    if (strstr(names[i], ".safetensors") && !strstr(names[i], ".json") && info.st_nlink == 1)
      bytes += (double)info.st_size;
  }
  wn_list_free(names, n);
  return bytes;
}

static void compare(void **state, const char *stage, const char *init, const char *more, int32_t ranks) {
  char line[1024], words[1200], run[64];
  const char *dir = *state;
  static int32_t runs;
  snprintf(run, sizeof run, "%s-%d-%d", stage, ranks, runs++);
  snprintf(line, sizeof line, "%s/job.yaml init=%s/%s run_dir=%s/%s training.steps=1 training.micro_batch_seqs=%d %s",
           dir, dir, init, dir, run, ranks == 4 ? 1 : 2, more);
  snprintf(words, sizeof words, "%s --stage %s --ranks %d", line, stage, ranks);
  json_t *plan = plan_of(words);
  wn_winnow_ends(0, ranks, "%s %s", stage, line);
  expect_planned_arenas(state, plan, run);
  expect_planned("a checkpoint", plan_number(plan, "checkpoint_written_bytes"), weights_written(state, run, 1));
  json_decref(plan);
}

static void memory_is_as_planned(void **state) {
  static const int32_t worlds[] = {1, 2, 4};
  for (int w = 0; w < 3; w++) {
    compare(state, "warmup", "base", "", worlds[w]);
    compare(state, "pretrain", "base", "", worlds[w]);
    compare(state, "adapt", "sparse", "", worlds[w]);
  }
}

static void options_change_it(void **state) {
  compare(state, "adapt", "sparse", "dsa.index_topk=24", 1); /* the masked form */
  compare(state, "adapt", "sparse", "dsa.index_topk=24 training.keep=inputs", 2);
  compare(state, "pretrain", "base", "training.keep=all", 2);
  compare(state, "adapt", "sparse", "data.seq_len=200 data.document_mask=false metrics.sample_rows=5", 2);
  compare(state, "warmup", "base", "metrics.layers_every=0 data.valid= metrics.eval_every=0 checkpoint.dtype=bf16", 2);
  compare(state, "pretrain", "base", "metrics.eval_every=0 threads=3 optimizer.moments=bf16", 1);
}

/* A base that stays FP8, its experts whole and in parts. */
static void fp8_bases_are_as_planned(void **state) {
  wn_model_config config = tiny_config();
  config.hidden_size = 136;
  fp8_model(wn_temp(state, "fp8").text, &config, 5, 2, true, true);
  for (int32_t ranks = 1; ranks <= 2; ranks++) {
    compare(state, "warmup", "fp8", "optimizer.moments=bf16", ranks);
    compare(state, "warmup", "fp8", "parallelism.most_gathered=1", ranks);
    compare(state, "warmup", "base", "parallelism.most_gathered=2000", ranks);
  }
}

/* The demo's own jobs, and the size of the whole process. */
static void the_demo_is_as_planned(void **state) {
  static const char *const stages[] = {"warmup", "adapt", "pretrain"};
  char words[1400], line[1200], run[64];
  const char *dir = *state;
  wn_program p;
  for (int s = 0; s < 3; s++) {
    snprintf(run, sizeof run, "demo-%s", stages[s]);
    snprintf(line, sizeof line,
             "configs/jobs/demo/%s.yaml device=cpu threads=2 metrics.eval_every=0 data.train=%s/train data.valid= "
             "run_dir=%s/%s training.steps=1",
             s == 2 ? "control" : stages[s], dir, dir, run);
    if (s == 1) snprintf(line + strlen(line), 200, " init=%s/demo-warmup/checkpoints/step-000001", dir);
    snprintf(words, sizeof words, "%s --stage %s --ranks 1", line, stages[s]);
    json_t *plan = plan_of(words);
    wn_winnow(&p, 1, "%s %s", stages[s], line);
    if (p.code != 0) fail_msg("%s %s ended with %d: %s", stages[s], line, p.code, p.err);
    expect_planned_arenas(state, plan, run);
    double planned = plan_number(plan, "total_bytes"), taken = (double)p.peak_kib * 1024;
    print_message("%s: planned %.1f MB, resident %.1f\n", run, planned * 1e-6, taken * 1e-6);
    assert_true(fabs(planned - taken) < 0.15 * taken); /* files that are mapped come and go */
    json_decref(plan);
  }
}

/* Traffic by arithmetic: a rank gathers what the others hold of all weights, twice in a step with a backward, and
 * sends all but its own share of the gradients. */
static void traffic_is_counted(void **state) {
  char words[512];
  const char *dir = *state;
  snprintf(words, sizeof words,
           "%s/job.yaml run_dir=unused --stage warmup --ranks 4 init=%s/base training.micro_batch_seqs=1", dir, dir);
  json_t *four = plan_of(words);
  snprintf(words, sizeof words, "%s/job.yaml run_dir=unused --stage warmup --ranks 1 init=%s/base", dir, dir);
  json_t *one = plan_of(words);
  assert_true(plan_number(one, "gathered_bytes") == 0 && plan_number(one, "summed_bytes") == 0);
  double gathered = plan_number(four, "gathered_bytes"), summed = plan_number(four, "summed_bytes");
  wn_model_config config = tiny_sparse_config();
  wn_param_table table = tiny_table(&config);
  double weights = 0, indexer = 0;
  for (int32_t i = 0; i < table.n; i++) {
    const wn_param *p = &table.params[i];
    double bytes = 4 * (double)tiny_count(p);
    if (p->layer < config.num_hidden_layers) weights += bytes; /* no head in a warm-up */
    if (p->kind == WN_INDEXER) indexer += bytes;
  }
  wn_param_table_free(&table);
  /* tensors stand at multiples of 256 bytes, which counts in a model this small */
  assert_true(gathered > 0.75 * weights && gathered < 0.75 * weights * 1.5);
  assert_true(summed > 0.75 * indexer && summed < 0.75 * indexer * 1.5);
  json_decref(one);
  json_decref(four);
}

static void what_does_not_fit_gets_remedies(void **state) {
  char words[512];
  const char *dir = *state;
  snprintf(words, sizeof words,
           "%s/job.yaml run_dir=unused --stage adapt --ranks 1 init=%s/sparse --memory-gb 0.000001", dir, dir);
  json_t *plan = plan_of(words);
  assert_true(json_is_false(json_object_get(plan, "fits")));
  const json_t *remedies = json_object_get(plan, "remedies");
  assert_true(json_array_size(remedies) >= 2);
  assert_string_equal(json_string_value(json_object_get(json_array_get(remedies, 0), "change")),
                      "training.micro_batch_seqs=1");
  assert_true(plan_number(json_array_get(remedies, 0), "total_bytes") < plan_number(plan, "total_bytes"));
  json_decref(plan);
}

/* A sequence of one token is none: of the shorter ones it is not offered. */
static void remedies_are_jobs(void **state) {
  char words[512];
  const char *dir = *state;
  size_t i;
  json_t *one;
  snprintf(words, sizeof words,
           "%s/job.yaml run_dir=unused --stage adapt --ranks 1 init=%s/sparse data.seq_len=4 --memory-gb 0.000001", dir,
           dir);
  json_t *plan = plan_of(words);
  bool shorter = false;
  json_array_foreach(json_object_get(plan, "remedies"), i, one) {
    const char *change = json_string_value(json_object_get(one, "change"));
    assert_string_not_equal(change, "data.seq_len=1");
    shorter = shorter || strcmp(change, "data.seq_len=2") == 0;
  }
  assert_true(shorter);
  json_decref(plan);
}

static bool has_use(const json_t *plan, const char *arena, const char *name) {
  size_t i;
  json_t *one;
  json_array_foreach(json_object_get(planned_arena(plan, arena), "uses"), i, one) {
    if (strcmp(json_string_value(json_object_get(one, "name")), name) == 0) return true;
  }
  return false;
}

/* The GPU's own operations decide, where the program has them: every stage and both forms of attention. What they say
 * is compared with runs in tests/cuda/plan.c. */
static void a_gpu_is_planned_without_one(void **state) {
  static const char *const stages[] = {"warmup", "pretrain", "adapt"};
  const char *dir = *state;
  wn_program p;
  for (int i = 0; i < 2 * 3; i++) {
    char words[512];
    const char *stage = stages[i / 2];
    snprintf(words, sizeof words,
             "%s/job.yaml run_dir=unused --stage %s --ranks 2 --device h200 init=%s/%s training.micro_batch_seqs=1 %s",
             dir, stage, dir, i / 2 == 2 ? "sparse" : "base", i % 2 ? "data.seq_len=448" : "");
    wn_winnow(&p, 1, "plan %s", words);
    if (p.code == WN_E_DEVICE && strstr(p.err, "has no CUDA half")) {
      print_message("skipped: the program was built without nvcc\n");
      skip();
    }
    json_t *plan = plan_of(words);
    assert_true(has_use(plan, "weights", "cuBLAS workspace") && has_use(plan, "weights", "gradients of other ranks"));
    assert_true(plan_number(plan, "total_bytes") > plan_number(planned_arena(plan, "scratch"), "peak_bytes"));
    if (i / 2 == 2) assert_int_equal(has_use(plan, "scratch", "selection words"), i % 2 == 0); /* the masked form's */
    json_decref(plan);
  }
}

/* Widths that the GPU's operations are not built for are a sentence; the widest they are built for are planned. */
static void widths_that_no_gpu_takes(void **state) {
  static const char *const names[] = {"qk_nope_head_dim + qk_rope_head_dim", "v_head_dim", "n_routed_experts",
                                      "index_head_dim", "kv_lora_rank"};
  enum { N = sizeof names / sizeof *names };
  const char *dir = *state;
  wn_temp_path model = wn_temp(state, "wide");
  wn_program p;
  OK(wn_make_dirs(model.text));
  for (int i = 0; i < 2 * N; i++) {
    int32_t wider = i % 2;
    wn_model_config config = tiny_config();
    config.has_indexer = true;
    config.index_n_heads = 2;
    config.index_head_dim = i / 2 == 3 ? 128 + wider : 128;
    config.index_topk = 16;
    if (i / 2 == 0) config.qk_nope_head_dim = 256 - config.qk_rope_head_dim + wider;
    if (i / 2 == 1) config.v_head_dim = 256 + wider;
    if (i / 2 == 2) config.n_routed_experts = 2048 + wider * config.n_group;
    if (i / 2 == 4) {
      config.kv_lora_rank = 1024 + wider;
      config.qk_rope_head_dim = 128;
    }
    OK(wn_model_config_save(&config, model.text, NULL, "float32"));
    wn_winnow(&p, 1,
              "plan %s/job.yaml run_dir=unused --stage adapt --ranks 1 --device h200 init=%s data.seq_len=448 "
              "dsa.index_head_dim=%d",
              dir, model.text, config.index_head_dim);
    if (p.code == WN_E_DEVICE && strstr(p.err, "has no CUDA half")) skip();
    if (p.code != (wider ? WN_E_CONFIG : 0) || (wider && !strstr(p.err, names[i / 2])))
      fail_msg("%s, %s: code %d, %s", names[i / 2], wider ? "wider" : "widest", p.code, p.err);
  }
}

static wn_temp_path long_model(void **state) {
  wn_model_config config = tiny_sparse_config();
  wn_temp_path model = wn_temp(state, "long");
  config.max_position_embeddings = 1 << 24;
  config.hidden_size = 1 << 17;
  OK(wn_make_dirs(model.text));
  OK(wn_model_config_save(&config, model.text, NULL, "float32"));
  return model;
}

/* Larger than any machine is a plan like another: it does not fit, and says by how much. */
static void beyond_every_machine(void **state) {
  char words[1024];
  const char *dir = *state;
  wn_temp_path model = long_model(state);
  snprintf(words, sizeof words,
           "%s/job.yaml run_dir=unused --stage pretrain --ranks 1 --device cpu --memory-gb 1000 model=%s "
           "data.seq_len=16777216 training.global_batch_seqs=1 training.micro_batch_seqs=1 metrics.eval_every=0",
           dir, model.text);
  json_t *plan = plan_of(words);
  double stash = plan_number(planned_arena(plan, "stash"), "peak_bytes"), rows = 16777216;
  assert_true(stash > 3 * rows * (1 << 17) * 4 && stash > 17.6e12); /* at least the inputs of three layers */
  assert_true(plan_number(plan, "total_bytes") > stash && json_is_false(json_object_get(plan, "fits")));
  json_decref(plan);
}

/* Rows of experts are numbered in 32 bits, tiles of rows on a GPU in 16. */
static void rows_without_end(void **state) {
  const char *dir = *state;
  wn_temp_path model = long_model(state);
  static const char words[] = "run_dir=unused data.seq_len=16777216 metrics.eval_every=0";
  static const char *const commands[] = {"plan %s/job.yaml --stage pretrain --ranks 1 --device cpu model=%s %s %s",
                                         "pretrain %s/job.yaml --check device=cpu model=%s %s %s"};
  wn_program p;
  for (size_t i = 0; i < 2; i++) { /* two experts a row */
    wn_winnow(&p, 1, commands[i], dir, model.text, words, "training.global_batch_seqs=64 training.micro_batch_seqs=64");
    if (p.code != WN_E_CONFIG || !strstr(p.err, "are 2147483648 rows of experts at a time; at most 2147483647"))
      fail_msg("code %d: %s", p.code, p.err);
  }
  wn_winnow(&p, 1,
            "plan %s/job.yaml --stage pretrain --ranks 1 --device h200 model=%s %s training.global_batch_seqs=1 "
            "training.micro_batch_seqs=1",
            dir, model.text, words);
  if (p.code == WN_E_DEVICE && strstr(p.err, "has no CUDA half")) skip();
  if (p.code != WN_E_CONFIG || !strstr(p.err, "on a GPU at most 8388480")) fail_msg("code %d: %s", p.code, p.err);
}

static void refusals(void **state) {
  const char *dir = *state;
  wn_winnow_refuses(WN_E_USAGE, "--ranks is missing", "plan %s/job.yaml", dir);
  wn_winnow_refuses(WN_E_USAGE, "does not say which stage", "plan %s/job.yaml --ranks 1", dir);
  wn_winnow_refuses(WN_E_USAGE, "no machine 'abacus'",
                    "plan %s/job.yaml run_dir=unused init=%s/base --ranks 1 --stage warmup --device abacus", dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "is not a multiple of 3 ranks",
                    "plan %s/job.yaml run_dir=unused --ranks 3 --stage warmup init=%s/base", dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "adapt needs a trained indexer",
                    "plan %s/job.yaml run_dir=unused --ranks 1 --stage adapt init=%s/base", dir, dir);
  wn_winnow_refuses(WN_E_CONFIG, "config.json is absent",
                    "plan %s/job.yaml run_dir=unused --ranks 1 --stage warmup init=%s/nothing", dir, dir);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(memory_is_as_planned),     cmocka_unit_test(options_change_it),
      cmocka_unit_test(fp8_bases_are_as_planned), cmocka_unit_test(the_demo_is_as_planned),
      cmocka_unit_test(traffic_is_counted),       cmocka_unit_test(what_does_not_fit_gets_remedies),
      cmocka_unit_test(remedies_are_jobs),        cmocka_unit_test(a_gpu_is_planned_without_one),
      cmocka_unit_test(widths_that_no_gpu_takes), cmocka_unit_test(beyond_every_machine),
      cmocka_unit_test(rows_without_end),         cmocka_unit_test(refusals),
  };
  return cmocka_run_group_tests(tests, plan_setup, wn_temp_teardown);
}
