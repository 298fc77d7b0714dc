#include "support/test.h"

#include <stdlib.h>
#include <string.h>

#include "config/job.h"
#include "config/options.h"

static char root[WN_PATH_BYTES], path[WN_PATH_BYTES], resolved[WN_PATH_BYTES];

static int set_up(void **state) {
  (void)state;
  snprintf(root, sizeof root, "/tmp/winnow-job-XXXXXX");
  if (!mkdtemp(root)) return -1;
  OK(wn_path(path, "%s/job.yaml", root));
  OK(wn_path(resolved, "%s/config.resolved.yaml", root));
  return 0;
}

static int tear_down(void **state) {
  (void)state;
  OK(wn_remove_tree(root));
  return 0;
}

#define BASE                                                                                                           \
  "init: base\nrun_dir: run\ndata: {train: d}\ntraining: {steps: 10}\noptimizer: {lr: 1.0e-3}\n" /* five lines */

static wn_status load(wn_job *job, wn_job_source **source, wn_stage stage, const char *text, const char *override) {
  const char *const overrides[] = {override};
  OK(wn_write_file_atomic(path, text, strlen(text)));
  return wn_job_load(job, source, stage, path, overrides, override ? 1 : 0);
}

static void refuse(wn_stage stage, const char *text, const char *override, const char *part) {
  wn_job job;
  wn_job_source *source = NULL;
  wn_status status = load(&job, &source, stage, text, override);
  if (!status) print_error("accepted: %s / %s\n", text, override ? override : "");
  assert_null(source);
  REFUSED(status, WN_E_CONFIG, part);
}

static void defaults(void **state) {
  (void)state;
  wn_job job;
  wn_job_source *source;
  OK(load(&job, &source, WN_STAGE_WARMUP, BASE, NULL));
  wn_job_source_free(source);
  assert_int_equal(job.stage, WN_STAGE_WARMUP);
  assert_string_equal(job.init, "base");
  assert_string_equal(job.model, "");
  assert_string_equal(job.data.train, "d");
  assert_int_equal(job.device, WN_JOB_AUTO);
  assert_int_equal(job.data.seq_len, 4096);
  assert_true(job.data.document_mask);
  assert_int_equal(job.training.steps, 10);
  assert_int_equal(job.training.seed, 1);
  assert_int_equal(job.training.micro_batch_seqs, 1);
  assert_true(job.optimizer.lr == 1e-3 && job.optimizer.indexer_lr == 1e-3);
  assert_true(job.optimizer.beta1 == 0.9 && job.optimizer.beta2 == 0.95 && job.optimizer.eps == 1e-8);
  assert_true(job.optimizer.carry_indexer);
  assert_int_equal(job.lr_schedule.type, WN_SCHEDULE_CONSTANT);
  assert_int_equal(job.dsa.index_topk, 0);
  assert_true(job.moe.balance_loss_coeff == 1e-4 && job.dsa.loss_coeff == 1);
  assert_int_equal(job.checkpoint.dtype, WN_FILE_BF16);
  assert_int_equal(job.checkpoint.interval, 100);
}

static void every_default_is_allowed(void **state) {
  (void)state;
  static wn_job job;
  char value[WN_PATH_BYTES], allowed[WN_PATH_BYTES];
  for (int32_t i = 0; i < wn_option_count(); i++) {
    const wn_option *option = wn_option_at(i);
    assert_int_equal(wn_option_index(option->key), i); /* keys are distinct */
    assert_true(option->help && strlen(option->help) > 10);
    wn_option_allowed(option, allowed);
    assert_true(strlen(allowed) > 2);
    assert_true(option->offset < sizeof job);
    assert_true(option->low <= option->high && option->high <= 9007199254740992.0);
    assert_true((option->type == WN_CHOICE) == (option->choices != NULL));
    if (!option->fallback) continue;
    if (option->same_as) {
      assert_true(wn_option_index(option->fallback) >= 0);
      continue;
    }
    OK(wn_option_parse(option, option->fallback, &job));
    wn_option_value(option, &job, value);
    assert_string_equal(value, option->fallback); /* and is written as it is printed */
  }
  for (int32_t i = 1; i < wn_option_count(); i++) { /* a section is one piece: save and docs rely on it */
    const char *key = wn_option_at(i)->key, *dot = strchr(key, '.');
    for (int32_t j = 0; dot && j + 1 < i; j++) {
      size_t n = (size_t)(dot - key) + 1;
      if (!strncmp(wn_option_at(j)->key, key, n)) assert_int_equal(strncmp(wn_option_at(i - 1)->key, key, n), 0);
    }
  }
}

/* Two options on one field would overwrite each other. */
static void fields_are_distinct(void **state) {
  (void)state;
  for (int32_t i = 0; i < wn_option_count(); i++)
    for (int32_t j = 0; j < i; j++) assert_true(wn_option_at(i)->offset != wn_option_at(j)->offset);
}

static void bad_values(void **state) {
  (void)state;
  static const struct {
    const char *line, *part;
  } cases[] = {
      {"training: {steps: 1, steps: 2}", "job.yaml:1: training.steps stands already in line 1"},
      {"dataa: {train: x}", "job.yaml:1: unknown key dataa.train; did you mean data.train?"},
      {"data: {seqlen: 5}", "job.yaml:1: unknown key data.seqlen; did you mean data.seq_len?"},
      {"lr: 1", "unknown key lr; did you mean optimizer.lr?"},
      {"training: {index_topk: 5}", "unknown key training.index_topk; did you mean dsa.index_topk?"},
      {"data: 3", "unknown key data; did you mean "},
      {"data: {seq_len: 1}", "job.yaml:1: data.seq_len is '1'; allowed: whole number, 2 to 16777216"},
      {"data: {seq_len: 16777217}", "data.seq_len is '16777217'"},
      {"data: {seq_len: 99999999999999999999}", "data.seq_len is '99999999999999999999'"},
      {"data: {seq_len: 4294967808}", "data.seq_len is '4294967808'"}, /* 512 in 32 bits */
      {"data: {seq_len: 1e3}", "data.seq_len is '1e3'"},
      {"data: {seq_len: 5x}", "data.seq_len is '5x'"},
      {"data: {seq_len: \"\"}", "data.seq_len is ''"},
      {"data: {seq_len: \" 5\"}", "data.seq_len is ' 5'"},
      {"data: {seq_len: -5}", "data.seq_len is '-5'"},
      {"training: {seed: -1}", "training.seed is '-1'"},
      {"data: {document_mask: yes}", "data.document_mask is 'yes'; allowed: true or false"},
      {"device: gpu", "device is 'gpu'; allowed: auto, cpu or cuda"},
      {"lr_schedule: {type: cos}", "allowed: constant, linear or cosine"},
      {"optimizer: {moments: f16}", "optimizer.moments is 'f16'; allowed: f32 or bf16"},
      {"optimizer: {lr: nan}", "optimizer.lr is 'nan'; allowed: number, from 0 up to 10"},
      {"optimizer: {lr: inf}", "optimizer.lr is 'inf'"},
      {"optimizer: {lr: 0x1p-3}", "optimizer.lr is '0x1p-3'"},
      {"optimizer: {lr: -1.0}", "optimizer.lr is '-1.0'"},
      {"optimizer: {lr: 1e}", "optimizer.lr is '1e'"},
      {"optimizer: {beta1: 1}", "optimizer.beta1 is '1'; allowed: number, from 0 below 1"},
      {"optimizer: {eps: 0}", "optimizer.eps is '0'; allowed: number, above 0 up to 1"},
      {"stage: train", "stage is 'train'; allowed: pretrain, warmup or adapt"},
      {"stage: adapt", "job.yaml:1: stage is adapt, but the command is warmup"},
      {"data: [1]", "job.yaml:1: a list"},
  };
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) refuse(WN_STAGE_WARMUP, cases[i].line, NULL, cases[i].part);
  wn_job job;
  wn_job_source *source;
  REFUSED(wn_job_load(&job, &source, WN_STAGE_WARMUP, "/absent.yaml", NULL, 0), WN_E_CONFIG, "/absent.yaml is absent");
}

static void bad_overrides(void **state) {
  (void)state;
  refuse(WN_STAGE_WARMUP, BASE, "training.steps", "command line: 'training.steps' is not key=value");
  refuse(WN_STAGE_WARMUP, BASE, "=3", "is not key=value");
  refuse(WN_STAGE_WARMUP, BASE, "training.step=3",
         "command line: unknown key training.step; did you mean training.steps?");
  refuse(WN_STAGE_WARMUP, BASE, "training.steps=0", "command line: training.steps is '0'");
  refuse(WN_STAGE_WARMUP, BASE, "init=", "job.yaml: warmup needs init");
  wn_job job;
  wn_job_source *source;
  const char *const twice[] = {"training.steps=3", "training.seed=4", "training.steps=3"};
  OK(wn_write_file_atomic(path, BASE, strlen(BASE)));
  REFUSED(wn_job_load(&job, &source, WN_STAGE_WARMUP, path, twice, 3), WN_E_CONFIG, "training.steps is given twice");
  OK(wn_job_load(&job, &source, WN_STAGE_WARMUP, path, twice, 2));
  assert_int_equal(job.training.steps, 3);
  assert_int_equal(job.training.seed, 4);
  wn_job_source_free(source);
  OK(load(&job, &source, WN_STAGE_WARMUP, BASE, "data.valid=a=b"));
  assert_string_equal(job.data.valid, "a=b");
  wn_job_source_free(source);
}

static void what_a_stage_needs(void **state) {
  (void)state;
  static const char rest[] = "run_dir: run\ndata: {train: d}\ntraining: {steps: 10}\noptimizer: {lr: 1.0e-3}\n";
  char text[1000];
  wn_job job;
  wn_job_source *source;
  refuse(WN_STAGE_PRETRAIN, rest, NULL, "job.yaml: pretrain needs init or model");
  refuse(WN_STAGE_WARMUP, rest, NULL, "job.yaml: warmup needs init");
  refuse(WN_STAGE_ADAPT, rest, NULL, "job.yaml: adapt needs init");
  snprintf(text, sizeof text, "model: m\n%s", rest);
  refuse(WN_STAGE_WARMUP, text, NULL,
         "job.yaml:1: model starts from random weights, which is for pretrain only, not warmup");
  refuse(WN_STAGE_ADAPT, text, NULL, "for pretrain only, not adapt");
  OK(load(&job, &source, WN_STAGE_PRETRAIN, text, NULL));
  wn_job_source_free(source);
  refuse(WN_STAGE_PRETRAIN, text, "init=x", "job.yaml:1: model and init (command line) exclude each other");
  OK(load(&job, &source, WN_STAGE_PRETRAIN, BASE, NULL));
  wn_job_source_free(source);

  refuse(WN_STAGE_WARMUP, "init: x\n", NULL, "job.yaml: run_dir is missing");
  refuse(WN_STAGE_WARMUP, "init: x\nrun_dir: r\n", NULL, "job.yaml: data.train is missing");
  refuse(WN_STAGE_WARMUP, "init: x\nrun_dir: r\ndata: {train: d}\n", NULL, "job.yaml: training.steps is missing");
  refuse(WN_STAGE_WARMUP, "init: x\nrun_dir: r\ndata: {train: d}\ntraining: {steps: 1}\n", NULL,
         "optimizer.lr is missing");
  refuse(WN_STAGE_WARMUP, BASE, "run_dir=", "command line: run_dir is empty");
  refuse(WN_STAGE_WARMUP, BASE, "data.train=", "command line: data.train is empty");
}

static void options_that_contradict(void **state) {
  (void)state;
  refuse(WN_STAGE_WARMUP, BASE, "training.micro_batch_seqs=3",
         "command line: training.micro_batch_seqs 3 does not divide training.global_batch_seqs 16 (default)");
  refuse(WN_STAGE_WARMUP,
         "init: base\nrun_dir: run\ndata: {train: d, seq_len: 16777216}\noptimizer: {lr: 1.0e-3}\n"
         "training: {steps: 10, global_batch_seqs: 256, micro_batch_seqs: 128}\n",
         NULL, ":5: training.micro_batch_seqs 128 of data.seq_len 16777216 are 2147483648 tokens at a time");
  refuse(WN_STAGE_WARMUP, BASE, "lr_schedule.decay_steps=3", "lr_schedule.decay_steps is given, but");
  refuse(WN_STAGE_WARMUP, BASE, "lr_schedule.min_lr=0.1", "lr_schedule.min_lr is given, but");
  static const char narrow[] =
      "init: base\nrun_dir: run\ndata: {train: d}\ntraining: {steps: 10}\noptimizer: {lr: 1.0e-3, moments: bf16}\n";
  refuse(WN_STAGE_WARMUP, narrow, "optimizer.beta2=0.999",
         "command line: optimizer.beta2 is 0.999, but with optimizer.moments bf16 at most 0.99");
  refuse(WN_STAGE_WARMUP, narrow, "optimizer.beta1=0.995", "optimizer.beta1 is 0.995, but");
  refuse(WN_STAGE_WARMUP, BASE, "metrics.eval_every=5", "there is no data.valid");
  refuse(WN_STAGE_WARMUP, BASE, "parallelism.context=2",
         "parallelism.context is 2; splitting a sequence over ranks is not in this version");
  refuse(WN_STAGE_WARMUP, BASE, "parallelism.expert=2",
         "parallelism.expert is 2; splitting experts over ranks is not in this version");
  wn_job job;
  wn_job_source *source;
  OK(load(&job, &source, WN_STAGE_WARMUP, BASE, "device=cuda")); /* whether there is one is seen where it is made */
  wn_job_source_free(source);
}

static void expect_line(const char *text, const char *line) {
  char with_ends[3 * WN_PATH_BYTES];
  snprintf(with_ends, sizeof with_ends, "\n%s\n", line);
  if (!strstr(text, with_ends)) fail_msg("no line '%s' in\n%s", line, text);
}

static void provenance(void **state) {
  (void)state;
  wn_job job, again;
  wn_job_source *source;
  char *text, line[2 * WN_PATH_BYTES];
  OK(load(&job, &source, WN_STAGE_ADAPT, BASE "lr_schedule: {type: cosine,\n  min_lr: 0.1}\nmodel: \"\"\n",
          "run_dir=a \"b\\c\n"));
  OK(wn_job_save(&job, source, resolved));
  wn_job_source_free(source);
  OK(wn_read_file(&text, NULL, resolved, 100000));
  expect_line(text, "stage: adapt  # the command");
  snprintf(line, sizeof line, "init: \"base\"  # %s:1", path);
  expect_line(text, line);
  expect_line(text, "run_dir: \"a \\\"b\\\\c\\x0A\"  # command line");
  expect_line(text, "device: auto  # default");
  expect_line(text, "  valid: \"\"  # default");
  expect_line(text, "  indexer_lr: 0.001  # optimizer.lr");
  expect_line(text, "  beta1: 0.9  # default");
  snprintf(line, sizeof line, "  min_lr: 0.1  # %s:7", path);
  expect_line(text, line);
  expect_line(text, "data:");
  free(text);
  /* a resolved file is a job file, of the same values */
  OK(wn_job_load(&again, &source, WN_STAGE_ADAPT, resolved, NULL, 0));
  assert_memory_equal(&again, &job, sizeof job);
  OK(wn_job_save(&again, source, resolved));
  wn_job_source_free(source);
  REFUSED(wn_job_load(&again, &source, WN_STAGE_WARMUP, resolved, NULL, 0), WN_E_CONFIG, "stage is adapt, but");
}

static void resume(void **state) {
  (void)state;
  static const struct {
    const char *override, *part;
  } cases[] = {
      /* NULL: may change */
      {"training.steps=20", NULL},
      {"checkpoint.interval=7", NULL},
      {"checkpoint.keep=1", NULL},
      {"checkpoint.dtype=f32", NULL},
      {"metrics.log_every=2", NULL},
      {"metrics.sample_rows=7", NULL},
      {"metrics.eval_seqs=7", NULL},
      {"parallelism.timeout_s=7", NULL},
      {"device=cpu", NULL},
      {"threads=2", NULL},
      {"run_dir=elsewhere", NULL},
      {"optimizer.lr=0.001", NULL},
      {"optimizer.indexer_lr=1e-3", NULL},
      {"training.seed=1", NULL},
      {"training.seed=2", "training.seed is 2, but the run that would be resumed has 1 ("},
      {"optimizer.lr=0.0010000000000000002",
       "optimizer.lr is 0.0010000000000000002, but the run that would be resumed has 0.001"},
      {"optimizer.indexer_lr=0.002", "optimizer.indexer_lr is 0.002"},
      {"init=other", "init is other, but"},
      {"data.train=e", "data.train is e, but"},
      {"data.valid=e", "data.valid is e, but the run that would be resumed has none"},
      {"data.seq_len=8", "data.seq_len is 8, but the run that would be resumed has 4096"},
      {"data.document_mask=false", "data.document_mask is false"},
      {"training.global_batch_seqs=32", "training.global_batch_seqs is 32"},
      {"training.micro_batch_seqs=2", "training.micro_batch_seqs is 2"},
      {"training.deterministic=false", "training.deterministic is false"},
      {"lr_schedule.type=cosine", "lr_schedule.type is cosine"},
      {"lr_schedule.warmup_steps=3", "lr_schedule.warmup_steps is 3"},
      {"dsa.index_topk=3", "dsa.index_topk is 3"},
      {"optimizer.moments=bf16", "optimizer.moments is bf16, but the run that would be resumed has f32"},
      {"dsa.loss_coeff=3", "dsa.loss_coeff is 3.0"},
      {"moe.bias_update_speed=0", "moe.bias_update_speed is 0.0"},
  };
  wn_job job;
  wn_job_source *source;
  OK(load(&job, &source, WN_STAGE_WARMUP, BASE, NULL));
  OK(wn_job_save(&job, source, resolved));
  wn_job_source_free(source);
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    OK(load(&job, &source, WN_STAGE_WARMUP, BASE, cases[i].override));
    wn_job_source_free(source);
    wn_status status = wn_job_check_resume(&job, resolved);
    if (!!status != !!cases[i].part) print_error("%s\n", cases[i].override);
    if (cases[i].part)
      REFUSED(status, WN_E_CONFIG, cases[i].part);
    else
      OK(status);
  }
  OK(load(&job, &source, WN_STAGE_ADAPT, BASE, NULL));
  wn_job_source_free(source);
  REFUSED(wn_job_check_resume(&job, resolved), WN_E_CONFIG,
          "stage is adapt, but the run that would be resumed has warmup");
}

static void resuming_from_other_files(void **state) {
  (void)state;
  wn_job job;
  wn_job_source *source;
  static const char younger[] =
      "stage: warmup\n" BASE; /* written before most options existed: they had their defaults */
  OK(load(&job, &source, WN_STAGE_WARMUP, BASE, NULL));
  wn_job_source_free(source);
  OK(wn_write_file_atomic(resolved, younger, strlen(younger)));
  OK(wn_job_check_resume(&job, resolved));
  OK(wn_write_file_atomic(resolved, "stage: warmup\nmagic: 3\n", 23));
  REFUSED(wn_job_check_resume(&job, resolved), WN_E_CONFIG, "config.resolved.yaml:2: unknown key magic");
  OK(wn_write_file_atomic(resolved, "", 0));
  REFUSED(wn_job_check_resume(&job, resolved), WN_E_CONFIG, "config.resolved.yaml: stage is missing");
}

static void lists_of_options(void **state) {
  (void)state;
  for (int markdown = 0; markdown < 2; markdown++) {
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    assert_non_null(out);
    OK(wn_job_print_options(out, markdown == 1));
    fclose(out);
    for (int32_t i = 0; i < wn_option_count(); i++) {
      char key[100];
      snprintf(key, sizeof key, markdown ? "| `%s`" : "  %s ", wn_option_at(i)->key);
      assert_non_null(strstr(text, key));
      assert_non_null(strstr(text, wn_option_at(i)->help));
    }
    if (markdown) {
      expect_line(text, "## top level");
      expect_line(text, "## data");
      expect_line(text,
                  "| `data.seq_len` | whole number, 2 to 16777216 | tokens | 4096 | length of a training sequence |");
      expect_line(text, "| `optimizer.indexer_lr` | number, from 0 up to 10 |  | that of optimizer.lr | peak "
                        "learning rate of the indexer |");
    }
    free(text);
  }
  FILE *full = fopen("/dev/full", "w");
  if (!full) return;
  setvbuf(full, NULL, _IONBF, 0);
  REFUSED(wn_job_print_options(full, false), WN_E_IO, "cannot write");
  fclose(full);
}

/* The jobs that come with the program, and the figures of the paper in them. */
static void jobs_that_ship(void **state) {
  (void)state;
  static const struct {
    const char *file;
    wn_stage stage;
  } jobs[] = {{"configs/jobs/tiny/pretrain.yaml", WN_STAGE_PRETRAIN},
              {"configs/jobs/tiny/warmup.yaml", WN_STAGE_WARMUP},
              {"configs/jobs/tiny/adapt.yaml", WN_STAGE_ADAPT},
              {"configs/jobs/deepseek-v3.1/warmup.yaml", WN_STAGE_WARMUP},
              {"configs/jobs/deepseek-v3.1/adapt.yaml", WN_STAGE_ADAPT}};
  wn_job job[5];
  for (int i = 0; i < 5; i++) {
    wn_job_source *source;
    OK(wn_job_load(&job[i], &source, jobs[i].stage, jobs[i].file, NULL, 0));
    wn_job_source_free(source);
  }
  const wn_job *warmup = &job[3], *adapt = &job[4];
  assert_int_equal(warmup->training.steps * warmup->training.global_batch_seqs * warmup->data.seq_len, 2097152000);
  assert_true(warmup->optimizer.lr == 1e-3 && warmup->optimizer.indexer_lr == 1e-3);
  assert_int_equal(warmup->dsa.index_n_heads, 64);
  assert_int_equal(warmup->dsa.index_head_dim, 128);
  assert_int_equal(adapt->training.steps * adapt->training.global_batch_seqs * adapt->data.seq_len, 943718400000);
  assert_true(adapt->optimizer.lr == 7.3e-6 && adapt->optimizer.indexer_lr == 7.3e-6);
  assert_int_equal(adapt->dsa.index_topk, 2048);
}

int main(void) {
#define TEST(name) cmocka_unit_test_setup_teardown(name, set_up, tear_down)
  const struct CMUnitTest tests[] = {
      TEST(defaults),      TEST(every_default_is_allowed),  TEST(fields_are_distinct),     TEST(bad_values),
      TEST(bad_overrides), TEST(what_a_stage_needs),        TEST(options_that_contradict), TEST(provenance),
      TEST(resume),        TEST(resuming_from_other_files), TEST(lists_of_options),        TEST(jobs_that_ship),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
