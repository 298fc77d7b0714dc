#include "config/job.h"

#include <stdlib.h>
#include <string.h>

#include "config/job_source.h"
#include "config/options.h"
#include "io/yaml.h"

static wn_status out_of_memory(void) {
  return WN_FAIL(WN_E_MEMORY, "out of memory reading a job");
}

const char *wn_stage_name(wn_stage stage) {
  WN_ASSERT(stage < WN_N_STAGES, "stage %d", (int)stage);
  return wn_option_at(wn_option_index("stage"))->choices[stage];
}

static wn_status set_place(wn_job_source *source, int32_t i, const char *place) {
  free(source->place[i]);
  source->place[i] = strdup(place);
  return source->place[i] ? NULL : out_of_memory();
}

static const char *place_of(const wn_job_source *source, const char *key) {
  return source->place[wn_option_index(key)];
}

static wn_status set_option(wn_job *job, wn_job_source *source, const char *key, const char *value, const char *place) {
  int32_t i = wn_option_index(key);
  if (i < 0)
    return WN_FAIL_HINT(WN_E_CONFIG, "`winnow options` lists all keys", "%s: unknown key %.100s; did you mean %s?",
                        place, key, wn_option_nearest(key));
  wn_status status = wn_option_parse(wn_option_at(i), value, job);
  if (status) return wn_status_trail(wn_status_prefix(status, "%s", place), __FILE__, __LINE__);
  return set_place(source, i, place);
}

static wn_status read_file(wn_job *job, wn_job_source *source, const char *path) {
  wn_yaml yaml;
  char place[WN_PATH_BYTES + 16];
  WN_TRY(wn_yaml_load(&yaml, path));
  wn_status status = NULL;
  for (int32_t i = 0; i < yaml.n && !status; i++) {
    snprintf(place, sizeof place, "%s:%d", path, (int)yaml.entries[i].line);
    status = set_option(job, source, yaml.entries[i].key, yaml.entries[i].value, place);
  }
  wn_yaml_free(&yaml);
  return wn_status_trail(status, __FILE__, __LINE__);
}

static wn_status read_overrides(wn_job *job, wn_job_source *source, const char *const *overrides, int32_t n) {
  for (int32_t i = 0; i < n; i++) {
    const char *equals = strchr(overrides[i], '=');
    if (!equals || equals == overrides[i])
      return WN_FAIL_HINT(WN_E_CONFIG, "as in training.steps=100", "command line: '%.100s' is not key=value",
                          overrides[i]);
    size_t key_bytes = (size_t)(equals - overrides[i]);
    for (int32_t j = 0; j < i; j++)
      if (!strncmp(overrides[j], overrides[i], key_bytes + 1))
        return WN_FAIL(WN_E_CONFIG, "command line: %.*s is given twice", (int)key_bytes, overrides[i]);
    char *key = strndup(overrides[i], key_bytes);
    if (!key) return out_of_memory();
    wn_status status = set_option(job, source, key, equals + 1, "command line");
    free(key);
    WN_TRY(status);
  }
  return NULL;
}

/* What was not given takes its default; those that are "as another option" come after all others. */
static wn_status fill_defaults(wn_job *job, wn_job_source *source, const char *path) {
  char value[WN_PATH_BYTES];
  for (int pass = 0; pass < 2; pass++) {
    for (int32_t i = 0; i < wn_option_count(); i++) {
      const wn_option *option = wn_option_at(i);
      if (source->place[i] || option->same_as != (pass == 1)) continue;
      if (!option->fallback) return WN_FAIL_HINT(WN_E_CONFIG, option->help, "%s: %s is missing", path, option->key);
      if (option->same_as)
        wn_option_value(wn_option_at(wn_option_index(option->fallback)), job, value);
      else
        snprintf(value, sizeof value, "%s", option->fallback);
      WN_TRY(wn_option_parse(option, value, job));
      WN_TRY(set_place(source, i, option->same_as ? option->fallback : "default"));
    }
  }
  return NULL;
}

static wn_status check_weights(const wn_job *job, const wn_job_source *source, const char *path) {
  const char *stage = wn_stage_name(job->stage);
  if (job->model[0] && job->stage != WN_STAGE_PRETRAIN)
    return WN_FAIL_HINT(WN_E_CONFIG, "give the checkpoint to start from as init",
                        "%s: model starts from random weights, which is for pretrain only, not %s",
                        place_of(source, "model"), stage);
  if (job->init[0] && job->model[0])
    return WN_FAIL(WN_E_CONFIG, "%s: model and init (%s) exclude each other", place_of(source, "model"),
                   place_of(source, "init"));
  if (job->init[0] || job->model[0]) return NULL;
  if (job->stage == WN_STAGE_PRETRAIN)
    return WN_FAIL_HINT(WN_E_CONFIG, "init: weights to go on from; model: a config.json for random ones",
                        "%s: pretrain needs init or model", path);
  return WN_FAIL_HINT(WN_E_CONFIG,
                      job->stage == WN_STAGE_WARMUP
                          ? "the dense base: a Hugging Face directory or a checkpoint"
                          : "the model with its trained indexer: usually a checkpoint of a warm-up",
                      "%s: %s needs init", path, stage);
}

static wn_status check_together(const wn_job *job, const wn_job_source *source) {
  if (job->training.global_batch_seqs % job->training.micro_batch_seqs != 0)
    return WN_FAIL(WN_E_CONFIG, "%s: training.micro_batch_seqs %d does not divide training.global_batch_seqs %d (%s)",
                   place_of(source, "training.micro_batch_seqs"), (int)job->training.micro_batch_seqs,
                   (int)job->training.global_batch_seqs, place_of(source, "training.global_batch_seqs"));
  int64_t rows = (int64_t)job->training.micro_batch_seqs * job->data.seq_len; /* row numbers are 32 bits wide */
  if (rows > INT32_MAX)
    return WN_FAIL(WN_E_CONFIG,
                   "%s: training.micro_batch_seqs %d of data.seq_len %d are %lld tokens at a time; at most %d",
                   place_of(source, "training.micro_batch_seqs"), (int)job->training.micro_batch_seqs,
                   (int)job->data.seq_len, (long long)rows, INT32_MAX);
  if (job->lr_schedule.type == WN_SCHEDULE_CONSTANT && job->lr_schedule.decay_steps > 0)
    return WN_FAIL(WN_E_CONFIG, "%s: lr_schedule.decay_steps is given, but lr_schedule.type constant never decays",
                   place_of(source, "lr_schedule.decay_steps"));
  if (job->lr_schedule.type == WN_SCHEDULE_CONSTANT && job->lr_schedule.min_lr > 0)
    return WN_FAIL(WN_E_CONFIG, "%s: lr_schedule.min_lr is given, but lr_schedule.type constant never decays",
                   place_of(source, "lr_schedule.min_lr"));
  /* a step changes a moment by a share of 1 - beta; BF16 rounds to a share of 2^-8 at most, and keeps what moves less
   */
  static const double most_beta_in_bf16 = 0.99;
  bool slow = job->optimizer.beta1 > most_beta_in_bf16;
  if (job->optimizer.moments == WN_MOMENTS_BF16 && (slow || job->optimizer.beta2 > most_beta_in_bf16))
    return WN_FAIL_HINT(WN_E_CONFIG, "take optimizer.moments f32, or a smaller beta",
                        "%s: optimizer.%s is %g, but with optimizer.moments bf16 at most %g: what a step adds to a "
                        "moment would be rounded away",
                        place_of(source, slow ? "optimizer.beta1" : "optimizer.beta2"), slow ? "beta1" : "beta2",
                        slow ? job->optimizer.beta1 : job->optimizer.beta2, most_beta_in_bf16);
  if (job->metrics.eval_every > 0 && !job->data.valid[0])
    return WN_FAIL(WN_E_CONFIG, "%s: metrics.eval_every is %lld, but there is no data.valid to evaluate on",
                   place_of(source, "metrics.eval_every"), (long long)job->metrics.eval_every);
  if (job->parallelism.context != 1)
    return WN_FAIL(WN_E_CONFIG, "%s: parallelism.context is %d; splitting a sequence over ranks is not in this version",
                   place_of(source, "parallelism.context"), (int)job->parallelism.context);
  if (job->parallelism.expert != 1)
    return WN_FAIL(WN_E_CONFIG, "%s: parallelism.expert is %d; splitting experts over ranks is not in this version",
                   place_of(source, "parallelism.expert"), (int)job->parallelism.expert);
  return NULL;
}

static wn_status load(wn_job *out, wn_job_source *source, wn_stage stage, const char *path,
                      const char *const *overrides, int32_t n_overrides) {
  int32_t stage_index = wn_option_index("stage");
  *out = (wn_job){.stage = stage};
  WN_TRY(set_place(source, stage_index, "the command"));
  WN_TRY(read_file(out, source, path));
  WN_TRY(read_overrides(out, source, overrides, n_overrides));
  if (out->stage != stage)
    return WN_FAIL(WN_E_CONFIG, "%s: stage is %s, but the command is %s", source->place[stage_index],
                   wn_stage_name(out->stage), wn_stage_name(stage));
  WN_TRY(fill_defaults(out, source, path));
  const char *const needed[] = {"run_dir", "data.train"}; /* "" parses as a path but is none */
  for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
    char value[WN_PATH_BYTES];
    wn_option_value(wn_option_at(wn_option_index(needed[i])), out, value);
    if (!value[0]) return WN_FAIL(WN_E_CONFIG, "%s: %s is empty", place_of(source, needed[i]), needed[i]);
  }
  WN_TRY(check_weights(out, source, path));
  return check_together(out, source);
}

wn_status wn_job_load(wn_job *out, wn_job_source **source, wn_stage stage, const char *path,
                      const char *const *overrides, int32_t n_overrides) {
  *source = NULL;
  wn_job_source *made = calloc(1, sizeof *made);
  if (made) made->place = calloc((size_t)wn_option_count(), sizeof *made->place);
  wn_status status = made && made->place ? load(out, made, stage, path, overrides, n_overrides) : out_of_memory();
  if (status) {
    wn_job_source_free(made);
    return wn_status_trail(status, __FILE__, __LINE__);
  }
  *source = made;
  return NULL;
}

void wn_job_source_free(wn_job_source *source) {
  if (!source) return;
  for (int32_t i = 0; source->place && i < wn_option_count(); i++) free(source->place[i]);
  free(source->place);
  free(source);
}

wn_status wn_job_check_resume(const wn_job *job, const char *resolved_path) {
  wn_job before;
  wn_job_source source = {.place = calloc((size_t)wn_option_count(), sizeof *source.place)};
  if (!source.place) return out_of_memory();
  memset(&before, 0, sizeof before);
  wn_status status = read_file(&before, &source, resolved_path);
  if (!status) status = fill_defaults(&before, &source, resolved_path); /* options that are younger than the file */
  for (int32_t i = 0; i < wn_option_count() && !status; i++) {
    const wn_option *option = wn_option_at(i);
    char was[WN_PATH_BYTES], is[WN_PATH_BYTES];
    if (option->may_change) continue;
    wn_option_value(option, &before, was);
    wn_option_value(option, job, is);
    if (strcmp(was, is) != 0)
      status = WN_FAIL_HINT(WN_E_CONFIG,
                            "a run may change its steps, checkpoints, metrics, ranks and device; for anything else "
                            "start another run_dir",
                            "%s is %.200s, but the run that would be resumed has %.200s (%s)", option->key,
                            is[0] ? is : "absent", was[0] ? was : "none", source.place[i]);
  }
  for (int32_t i = 0; i < wn_option_count(); i++) free(source.place[i]);
  free(source.place);
  return wn_status_trail(status, __FILE__, __LINE__);
}
