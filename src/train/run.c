#include "train/run.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

#include "train/checkpoint_dirs.h"
#include "train/device.h"
#include "train/rewrite.h"

enum { SHARD_BYTES_LOG2 = 32 };

/* ---- what model the job means ---- */

static wn_status expect_agreement(int32_t have, int32_t want, const char *key, const char *dir) {
  if (want == 0 || want == have) return NULL;
  return WN_FAIL_HINT(WN_E_CONFIG, "leave the key out: the model's own value is used",
                      "%s is %d, but the model in %s has an indexer with %d", key, want, dir, have);
}

static wn_status resolve_indexer(wn_model_config *config, const wn_recipe *recipe, const wn_job *job, const char *dir) {
  if (config->has_indexer) {
    WN_TRY(expect_agreement(config->index_n_heads, job->dsa.index_n_heads, "dsa.index_n_heads", dir));
    WN_TRY(expect_agreement(config->index_head_dim, job->dsa.index_head_dim, "dsa.index_head_dim", dir));
    if (job->dsa.index_topk) config->index_topk = job->dsa.index_topk;
    return NULL;
  }
  if (!recipe->train_indexer) return NULL;
  if (recipe->stage == WN_STAGE_ADAPT)
    return WN_FAIL_HINT(WN_E_CONFIG, "run `winnow warmup` first and give its checkpoint as init",
                        "adapt needs a trained indexer, and the model in %s has none", dir);
  if (!job->dsa.index_n_heads || !job->dsa.index_head_dim || !job->dsa.index_topk)
    return WN_FAIL(
        WN_E_CONFIG,
        "the model in %s has no indexer, so dsa.index_n_heads, dsa.index_head_dim and dsa.index_topk must be given",
        dir);
  if (job->dsa.index_head_dim < config->qk_rope_head_dim)
    return WN_FAIL(WN_E_CONFIG, "dsa.index_head_dim is %d, less than the model's rope width %d",
                   job->dsa.index_head_dim, config->qk_rope_head_dim);
  if (config->q_lora_rank == 0) config->q_lora_rank = config->hidden_size; /* train/rewrite.h */
  config->has_indexer = true;
  config->index_n_heads = job->dsa.index_n_heads;
  config->index_head_dim = job->dsa.index_head_dim;
  config->index_topk = job->dsa.index_topk;
  return NULL;
}

/* The directory whose config.json is the model. A run that saved something stands on its own: where init has gone
 * away, its newest checkpoint says. */
static wn_status model_dir(char out[WN_PATH_BYTES], const wn_job *job) {
  const char *given = job->init[0] ? job->init : job->model;
  char path[WN_PATH_BYTES], checkpoints[WN_PATH_BYTES];
  int64_t *steps;
  size_t n;
  WN_TRY(wn_path(out, "%s", given));
  WN_TRY(wn_path(path, "%s/config.json", given));
  if (wn_path_exists(path)) return NULL;
  WN_TRY(wn_path(checkpoints, "%s/checkpoints", job->run_dir));
  WN_TRY(wn_steps_list(&steps, &n, checkpoints));
  wn_status status = NULL;
  for (size_t i = 0; !status && i < n; i++) {
    status = wn_path(path, "%s/" WN_STEP_FORMAT "/config.json", checkpoints, (long long)steps[i]);
    if (status || !wn_path_exists(path)) continue;
    status = wn_path(out, "%s/" WN_STEP_FORMAT, checkpoints, (long long)steps[i]);
    break;
  }
  free(steps);
  return status;
}

/* A backward takes all rows of a micro-batch at once, and the rows of experts are numbered in 32 bits. */
static wn_status check_pairs(const wn_model_config *config, const wn_recipe *recipe, const wn_job *job) {
  int64_t pairs = (int64_t)job->training.micro_batch_seqs * job->data.seq_len * config->num_experts_per_tok;
  bool experts = config->first_k_dense_replace < config->num_hidden_layers;
  if (!experts || !recipe->train_base || pairs <= INT32_MAX) return NULL;
  return WN_FAIL_HINT(WN_E_CONFIG, "lower training.micro_batch_seqs or data.seq_len",
                      "training.micro_batch_seqs %d of data.seq_len %d with num_experts_per_tok %d are %lld rows of "
                      "experts at a time; at most %d",
                      job->training.micro_batch_seqs, job->data.seq_len, config->num_experts_per_tok, (long long)pairs,
                      INT32_MAX);
}

static wn_status resolve_model(wn_model_config *config, const wn_recipe *recipe, const wn_job *job) {
  char dir[WN_PATH_BYTES];
  WN_TRY(model_dir(dir, job));
  WN_TRY(wn_model_config_load(config, dir));
  WN_TRY(resolve_indexer(config, recipe, job, dir));
  if (job->data.seq_len > config->max_position_embeddings)
    return WN_FAIL(WN_E_CONFIG, "data.seq_len is %d, but the model in %s has max_position_embeddings %d",
                   job->data.seq_len, dir, config->max_position_embeddings);
  return check_pairs(config, recipe, job);
}

static wn_status check_stage(const wn_recipe *recipe, const wn_job *job, bool *indexer_trained) {
  wn_state state = {0};
  wn_stage stage = WN_STAGE_PRETRAIN;
  bool found = false;
  if (job->init[0]) WN_TRY(wn_checkpoint_read_state(job->init, &state, &stage, &found));
  *indexer_trained =
      found ? state.indexer_trained : true; /* a plain directory with an indexer is a finished V3.2 model */
  if (recipe->stage == WN_STAGE_ADAPT && !*indexer_trained)
    return WN_FAIL_HINT(WN_E_CONFIG, "run `winnow warmup` from it first",
                        "adapt needs a trained indexer, and the one in %s has not been through a warm-up", job->init);
  return NULL;
}

static wn_status check_world(const wn_job *job, wn_world *world) {
  int32_t ranks = wn_world_size(world), per_round = job->training.micro_batch_seqs * ranks;
  if (job->training.global_batch_seqs % per_round != 0)
    return WN_FAIL_HINT(
        WN_E_CONFIG, "change training.global_batch_seqs, training.micro_batch_seqs or the number of ranks",
        "training.global_batch_seqs %d is not a multiple of %d ranks times training.micro_batch_seqs %d",
        job->training.global_batch_seqs, ranks, job->training.micro_batch_seqs);
  return NULL;
}

static wn_status open_data(wn_dataset **out, const char *prefix, const char *key, const wn_model_config *config,
                           int32_t seq_len) {
  wn_dataset *dataset = NULL;
  wn_status status = NULL;
  WN_TRY_GOTO(status, fail, wn_dataset_open(&dataset, prefix));
  WN_TRY_GOTO(status, fail, wn_dataset_check_vocab(dataset, config->vocab_size));
  if (wn_dataset_windows(dataset, seq_len) < 1) {
    status = WN_FAIL(WN_E_INPUT, "%s %s holds %lld tokens, too few for one window of data.seq_len %d", key, prefix,
                     (long long)wn_dataset_tokens(dataset), seq_len);
    goto fail;
  }
  *out = dataset;
  return NULL;
fail:
  wn_dataset_close(dataset);
  return status;
}

static wn_param_settings param_settings(const wn_recipe *recipe, const wn_job *job) {
  return (wn_param_settings){
      .train_base = recipe->train_base,
      .train_indexer = recipe->train_indexer,
      .file_dtype = job->checkpoint.dtype == WN_FILE_BF16 ? WN_BF16 : WN_F32,
      .most_gathered = job->parallelism.most_gathered,
  };
}

/* ---- creation ---- */

wn_checkpoint_plan wn_run_checkpoint_plan(const wn_run *run) {
  return (wn_checkpoint_plan){
      .model = run->model,
      .store = run->store,
      .world = run->world,
      .log = run->log,
      .stage = run->recipe.stage,
      .seed = run->job.training.seed,
      .attention_init_gain = run->job.training.attention_init_gain,
      .run_dir = run->job.run_dir,
      .init_dir = run->job.init,
      .shard_bytes = (int64_t)1 << SHARD_BYTES_LOG2,
      .keep = run->job.checkpoint.keep,
  };
}

/* Only a run that saved something can be resumed: the configuration of one that never did is no promise. */
static wn_status check_resume(wn_run *run, const char *checkpoints) {
  char path[WN_PATH_BYTES];
  int64_t *steps;
  size_t n;
  wn_steps_clean(checkpoints, run->log);
  WN_TRY(wn_steps_list(&steps, &n, checkpoints));
  free(steps);
  WN_TRY(wn_path(path, "%s/config.resolved.yaml", run->job.run_dir));
  return n > 0 && wn_path_exists(path) ? wn_job_check_resume(&run->job, path) : NULL;
}

/* One process at a time writes to a run directory. The kernel lets go of the lock when the process ends, however it
 * ends. */
static wn_status lock_run_dir(wn_run *run) {
  char path[WN_PATH_BYTES];
  WN_TRY(wn_path(path, "%s/lock", run->job.run_dir));
  run->lock_fd = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0666);
  if (run->lock_fd < 0) return WN_FAIL(WN_E_IO, "cannot open %s: %s", path, strerror(errno));
  if (flock(run->lock_fd, LOCK_EX | LOCK_NB) == 0) return NULL;
  if (errno == ENOSYS || errno == EOPNOTSUPP || errno == ENOLCK) { /* a file system without locks */
    wn_warn(run->log, "%s cannot be locked here (%s): see to it that one process at a time uses it", run->job.run_dir,
            strerror(errno));
    return NULL;
  }
  if (errno != EWOULDBLOCK) return WN_FAIL(WN_E_IO, "cannot lock %s: %s", path, strerror(errno));
  return WN_FAIL_HINT(WN_E_CONFIG, "wait for it, or give another run_dir",
                      "%s is in use: another process is running a job in it", run->job.run_dir);
}

static wn_status prepare_run_dir(wn_run *run) {
  char path[WN_PATH_BYTES];
  WN_TRY(wn_path(path, "%s/metrics", run->job.run_dir));
  WN_TRY(wn_make_dirs(path));
  WN_TRY(wn_path(path, "%s/checkpoints", run->job.run_dir));
  WN_TRY(wn_make_dirs(path));
  WN_TRY(lock_run_dir(run));
  return check_resume(run, path);
}

/* Once the weights are there: a start that was refused leaves no configuration behind. */
static wn_status save_resolved(const wn_run *run) {
  char path[WN_PATH_BYTES];
  WN_TRY(wn_path(path, "%s/config.resolved.yaml", run->job.run_dir));
  return wn_job_save(&run->job, run->source, path);
}

static wn_status load_weights(wn_run *run, bool init_indexer_trained) {
  wn_checkpoint_plan plan = wn_run_checkpoint_plan(run);
  char path[WN_PATH_BYTES];
  WN_TRY(wn_checkpoint_newest(&plan, path, &run->resumed));
  if (run->resumed) {
    WN_TRY(wn_checkpoint_load(&plan, path, &run->state));
    wn_info(run->log, "resumed from %s (step %lld)", path, (long long)run->state.step);
    return NULL;
  }
  if (!run->job.init[0]) return wn_init_random(&plan);
  WN_TRY(wn_init_load(&plan, run->job.init, run->recipe.stage == WN_STAGE_WARMUP));
  run->state.indexer_trained = run->model->config.has_indexer && init_indexer_trained;
  if (run->recipe.stage == WN_STAGE_ADAPT && run->job.optimizer.carry_indexer) {
    bool carried;
    WN_TRY(wn_init_carry_indexer(&plan, run->job.init, &run->state, &carried));
    wn_info(run->log,
            carried ? "carried the indexer's moments over (Adam step %lld)"
                    : "init has no indexer moments to carry (Adam step %lld)",
            (long long)run->state.adam_indexer);
  }
  return NULL;
}

/* Of weights that are not there yet config.json says what they are stored as. */
static wn_status keep_fp8_as_configured(wn_param_table *table, const char *dir) {
  char method[WN_CONFIG_TEXT_BYTES];
  WN_TRY(wn_model_config_text(method, dir, "quantization_config", "quant_method"));
  bool fp8 = strcmp(method, "fp8") == 0;
  for (int32_t i = 0; fp8 && i < table->n; i++)
    table->params[i].fp8 = table->params[i].kind == WN_FROZEN && wn_slot_released_fp8((wn_slot)table->params[i].slot);
  return NULL;
}

/* A frozen base that lies in FP8 is kept in FP8. Its newest checkpoint says, which rank 0 names, else init. */
static wn_status keep_fp8(wn_run *run) {
  char checkpoints[WN_PATH_BYTES], dir[WN_PATH_BYTES] = "";
  wn_hf_dir *weights;
  wn_status status = NULL;
  if (run->recipe.train_base) return NULL;
  if (wn_world_rank(run->world) == 0) {
    status = wn_path(checkpoints, "%s/checkpoints", run->job.run_dir);
    if (!status) status = wn_checkpoint_source(dir, checkpoints, INT64_MAX, run->job.init);
  }
  WN_TRY(wn_world_agree(run->world, status));
  WN_TRY(wn_group_broadcast(wn_world_all(run->world), dir, sizeof dir, 0));
  if (!dir[0]) return NULL;
  if (run->device->dry && !wn_hf_dir_has_weights(dir)) return keep_fp8_as_configured(&run->model->table, dir);
  status = wn_source_open(&weights, dir, &run->model->config);
  if (!status) {
    wn_params_keep_fp8(run->model->table.params, run->model->table.n, weights);
    wn_hf_dir_close(weights);
  }
  return wn_world_agree(run->world, status);
}

/* Tiles of 128 rows are counted in a dimension of a grid, of which CUDA has 65535. */
static wn_status check_gpu_rows(const wn_job *job) {
  enum { MOST_ROWS = 65535 * 128 };
  int64_t rows = (int64_t)job->training.micro_batch_seqs * job->data.seq_len;
  if (rows <= MOST_ROWS) return NULL;
  return WN_FAIL_HINT(WN_E_CONFIG, "lower training.micro_batch_seqs or data.seq_len",
                      "training.micro_batch_seqs %d of data.seq_len %d are %lld tokens at a time; on a GPU at most %d",
                      job->training.micro_batch_seqs, job->data.seq_len, (long long)rows, MOST_ROWS);
}

static wn_status make_model(wn_run *run, const wn_model_config *config) {
  if (run->device->kind == WN_CUDA) WN_TRY(check_gpu_rows(&run->job));
  if (run->job.optimizer.moments == WN_MOMENTS_BF16) run->device->dtype_of[WN_MOMENT] = WN_BF16;
  WN_TRY(wn_model_create(&run->model, run->device, config, param_settings(&run->recipe, &run->job)));
  size_t n = (size_t)run->model->table.n;
  run->by_param = calloc(n, sizeof *run->by_param);
  run->grads_by_param = calloc(n, sizeof *run->grads_by_param);
  return run->by_param && run->grads_by_param ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for the run's tables");
}

/* Model and store, on the device that is there. */
static wn_status hold(wn_run *run, const wn_model_config *config) {
  wn_group *all = wn_world_all(run->world);
  WN_TRY(wn_world_agree(run->world, make_model(run, config)));
  WN_TRY(keep_fp8(run));
  const wn_param_table *table = &run->model->table;
  return wn_store_create(&run->store, run->device, run->world, &all, 1, table->params, table->n);
}

wn_status wn_run_create_dry(wn_run **out, wn_recipe recipe, const wn_job *job, wn_world *world, wn_device *device) {
  wn_status status = NULL;
  bool indexer_trained;
  wn_model_config config;
  wn_run *run = calloc(1, sizeof *run);
  if (!run) {
    wn_close_device(device);
    return WN_FAIL(WN_E_MEMORY, "out of memory for the run");
  }
  *run = (wn_run){.world = world, .recipe = recipe, .job = *job, .device = device, .lock_fd = -1};
  WN_ASSERT(device->dry, "a run without weights on a device that is not dry");
  WN_TRY_GOTO(status, fail, check_world(job, world));
  WN_TRY_GOTO(status, fail, resolve_model(&config, &recipe, job));
  WN_TRY_GOTO(status, fail, check_stage(&recipe, job, &indexer_trained));
  WN_TRY_GOTO(status, fail, wn_dataset_create_blank(&run->train, (int64_t)job->data.seq_len + 1));
  if (job->data.valid[0])
    WN_TRY_GOTO(status, fail, wn_dataset_create_blank(&run->valid, (int64_t)job->data.seq_len + 1));
  WN_TRY_GOTO(status, fail, hold(run, &config));
  *out = run;
  return NULL;
fail:
  wn_run_free(run);
  return status;
}

/* What each rank reads of the job's files. */
static wn_status read_inputs(wn_run *run, wn_model_config *config, bool *indexer_trained) {
  const wn_job *job = &run->job;
  WN_TRY(check_world(job, run->world));
  WN_TRY(resolve_model(config, &run->recipe, job));
  WN_TRY(check_stage(&run->recipe, job, indexer_trained));
  WN_TRY(open_data(&run->train, job->data.train, "data.train", config, job->data.seq_len));
  if (!job->data.valid[0]) return NULL;
  return open_data(&run->valid, job->data.valid, "data.valid", config, job->data.seq_len);
}

wn_status wn_run_create(wn_run **out, wn_recipe recipe, const wn_job *job, wn_job_source *source, wn_world *world,
                        wn_log *log) {
  bool indexer_trained = false;
  wn_model_config config;
  wn_run *run = calloc(1, sizeof *run);
  wn_status status = wn_world_agree(world, run ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for the run"));
  if (status) {
    free(run);
    return status;
  }
  *run = (wn_run){.log = log, .world = world, .recipe = recipe, .job = *job, .source = source, .lock_fd = -1};
  WN_TRY_GOTO(status, fail, wn_world_agree(world, read_inputs(run, &config, &indexer_trained)));
  WN_TRY_GOTO(status, fail, wn_world_agree(world, wn_world_rank(world) == 0 ? prepare_run_dir(run) : NULL));
  WN_TRY_GOTO(status, fail, wn_open_device(&run->device, job->device, job->threads, world, log));
  WN_TRY_GOTO(status, fail, hold(run, &config));
  WN_TRY_GOTO(status, fail, wn_world_agree(world, load_weights(run, indexer_trained)));
  WN_TRY_GOTO(status, fail, wn_world_agree(world, wn_world_rank(world) == 0 ? save_resolved(run) : NULL));
  *out = run;
  return NULL;
fail:
  wn_run_free(run);
  return status;
}

void wn_run_free(wn_run *run) {
  if (!run) return;
  wn_dataset_close(run->train);
  wn_dataset_close(run->valid);
  wn_store_free(run->store);
  wn_model_free(run->model);
  wn_close_device(run->device);
  free(run->by_param);
  free(run->grads_by_param);
  if (run->lock_fd >= 0) close(run->lock_fd);
  free(run);
}

/* A dataset may be made after the job that names it: one that is absent is said, not refused. */
static wn_status check_data(const char *prefix, const char *key, const wn_model_config *config, int32_t seq_len,
                            wn_log *log) {
  char path[WN_PATH_BYTES];
  wn_dataset *dataset = NULL;
  if (!prefix[0]) return NULL;
  WN_TRY(wn_path(path, "%s.idx", prefix));
  if (!wn_path_exists(path)) {
    wn_warn(log, "%s %s is not there yet", key, prefix);
    return NULL;
  }
  WN_TRY(open_data(&dataset, prefix, key, config, seq_len));
  wn_dataset_close(dataset);
  return NULL;
}

wn_status wn_run_check(wn_recipe recipe, const wn_job *job, wn_world *world, wn_log *log) {
  wn_model_config config;
  bool indexer_trained;
  WN_TRY(check_world(job, world));
  WN_TRY(resolve_model(&config, &recipe, job));
  if (job->init[0]) WN_TRY(check_stage(&recipe, job, &indexer_trained));
  WN_TRY(check_data(job->data.train, "data.train", &config, job->data.seq_len, log));
  return check_data(job->data.valid, "data.valid", &config, job->data.seq_len, log);
}
