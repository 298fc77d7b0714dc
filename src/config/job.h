/* A job: every option of a job file, its value and where the value came from. One table (config/options.c) holds name,
 * type, range, default, help and unit; validation, --help, docs/options.md and config.resolved.yaml all come from it.
 */
#ifndef WN_CONFIG_JOB_H
#define WN_CONFIG_JOB_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "io/files.h"

typedef enum wn_stage { WN_STAGE_PRETRAIN, WN_STAGE_WARMUP, WN_STAGE_ADAPT, WN_N_STAGES } wn_stage;
const char *wn_stage_name(wn_stage stage);

typedef enum wn_schedule { WN_SCHEDULE_CONSTANT, WN_SCHEDULE_LINEAR, WN_SCHEDULE_COSINE } wn_schedule;
typedef enum wn_job_device { WN_JOB_AUTO, WN_JOB_CPU, WN_JOB_CUDA } wn_job_device;
extern const char *const wn_job_device_names[]; /* by wn_job_device, then NULL */
typedef enum wn_file_dtype { WN_FILE_F32, WN_FILE_BF16 } wn_file_dtype;
typedef enum wn_keep { WN_KEEP_INPUTS, WN_KEEP_ATTENTION, WN_KEEP_ALL } wn_keep;
typedef enum wn_moments { WN_MOMENTS_F32, WN_MOMENTS_BF16 } wn_moments;

typedef struct wn_job {
  wn_stage stage;
  char init[WN_PATH_BYTES], model[WN_PATH_BYTES], run_dir[WN_PATH_BYTES]; /* "" where absent */
  wn_job_device device;
  int32_t threads; /* CPU threads a rank; 0: the cores this process may use */
  struct {
    char train[WN_PATH_BYTES], valid[WN_PATH_BYTES];
    int32_t seq_len;
    bool document_mask;
  } data;
  struct {
    int64_t steps;
    int32_t global_batch_seqs, micro_batch_seqs;
    uint64_t seed;
    bool deterministic;
    int32_t max_skipped_in_a_row;
    double attention_init_gain;
    wn_keep keep;
  } training;
  struct {
    double lr, indexer_lr, beta1, beta2, eps, weight_decay,
        clip_grad; /* indexer_lr: lr, where not given; clip_grad 0: none */
    wn_moments moments;
    bool carry_indexer;
  } optimizer;
  /* decay_steps 0: to the end of training.steps; min_lr is a fraction of lr */
  struct {
    wn_schedule type;
    int64_t warmup_steps, decay_steps;
    double min_lr;
  } lr_schedule;
  struct {
    int32_t index_n_heads, index_head_dim, index_topk;
    double loss_coeff;
  } dsa; /* 0: not given */
  struct {
    double bias_update_speed, balance_loss_coeff;
  } moe;
  struct {
    int32_t context, expert, timeout_s;
    int64_t most_gathered;
  } parallelism;
  struct {
    int64_t interval;
    int32_t keep;
    wn_file_dtype dtype;
  } checkpoint; /* interval 0: only at the end */
  struct {
    int64_t log_every, layers_every, eval_every;
    int32_t sample_rows, eval_seqs;
  } metrics; /* 0: never */
} wn_job;

typedef struct wn_job_source wn_job_source; /* provenance of each value */

/* Reads `path`, applies `overrides` ("key=value"), checks types, ranges, and what the stage needs. WN_E_CONFIG naming
 * file, line (or the command line) and, for unknown keys, the nearest known one. Relative paths stay relative to the
 * working directory. A `stage:` key is optional and must agree, so that a resolved file is a job file too. Whether the
 * indexer, the device, the data and the ranks allow the job is the caller's to check. */
WN_MUST_USE wn_status wn_job_load(wn_job *out, wn_job_source **source, wn_stage stage, const char *path,
                                  const char *const *overrides, int32_t n_overrides);
void wn_job_source_free(wn_job_source *source); /* NULL is fine */
/* config.resolved.yaml: every option, its value, and a comment that says where it came from. Atomic. */
WN_MUST_USE wn_status wn_job_save(const wn_job *job, const wn_job_source *source, const char *path);
/* Compares with a resolved file of the same run. WN_E_CONFIG, by name, for a difference in anything but training.steps,
 * checkpoint.*, metrics.*, parallelism.*, device, threads and run_dir (which may have been moved: the file lies in it).
 */
WN_MUST_USE wn_status wn_job_check_resume(const wn_job *job, const char *resolved_path);
/* All options: key, what is allowed, default, unit, meaning. For --help, or as docs/options.md. */
WN_MUST_USE wn_status wn_job_print_options(FILE *out, bool markdown);

#endif
