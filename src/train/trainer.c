#include "train/trainer.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#include "base/range.h"
#include "base/time.h"
#include "kernels/cuda/cuda.h"
#include "model/flops.h"
#include "train/device.h"
#include "train/metrics.h"
#include "train/optimizer.h"
#include "train/schedule.h"
#include "train/step.h"

/* What a skipped step has that is not finite. */
#define UNTAKEN "loss, gradient or gradient's square"

/* The only mutable global: a signal handler can reach nothing else. */
static volatile sig_atomic_t stop_requested;
static void request_stop(int signal_number) {
  (void)signal_number;
  stop_requested = 1;
}

typedef struct trainer {
  wn_run *run;
  wn_metrics *metrics; /* rank 0 */
  wn_step_sums sums;
  double peak_flops; /* what mfu_pct is a share of, all ranks */
  double started_s;
  int64_t started_step, last_saved;
  bool evaluated;
} trainer;

/* ---- measurements ---- */

/* What mfu_pct is a share of on a CPU; on a GPU, whose share is of the published rate, it stands beside it in the log.
 */
static wn_status measure_peak(trainer *t) {
  enum { CPU_N = 512, GPU_N = 4096 }; /* small, so that it is never what a run holds most of */
  const wn_run *run = t->run;
  bool gpu = run->device->kind == WN_CUDA;
  double rate;
  WN_TRY(wn_device_product_rate(run->device, gpu ? GPU_N : CPU_N, &rate));
  WN_TRY(wn_group_sum_f64(wn_world_all(run->world), &rate, 1));
  t->peak_flops = gpu ? WN_HOPPER_BF16_FLOPS * wn_world_size(run->world) : rate;
  if (gpu)
    wn_info(run->log, "matrix products here: %.1f TFLOP/s in BF16, all ranks together; mfu_pct is of %.1f",
            rate * 1e-12, t->peak_flops * 1e-12);
  else
    wn_info(run->log, "matrix products here: %.1f GFLOP/s in FP32, all ranks together", rate * 1e-9);
  return NULL;
}

static double step_flops(const trainer *t) {
  const wn_run *run = t->run;
  const wn_model_config *config = &run->model->config;
  wn_flops_work work = {
      .rows = (double)t->sums.rows,
      .visible_pairs = (double)t->sums.pairs,
      .selected_pairs = (double)t->sums.selected,
      .backward_base = run->recipe.train_base,
      .indexer = run->recipe.train_indexer,
      .head = run->recipe.train_base,
  };
  return wn_flops(config, &work);
}

/* ---- one step ---- */

static void losses(const trainer *t, wn_train_row *row) {
  const wn_run *run = t->run;
  const wn_step_sums *s = &t->sums;
  int32_t layers = run->model->config.num_hidden_layers;
  double kl = 0;
  row->lm_loss = row->indexer_kl = NAN;
  row->loss = 0;
  if (run->recipe.train_base) {
    row->lm_loss = s->neg_logp / (double)s->predicted;
    row->loss += row->lm_loss + run->job.moe.balance_loss_coeff * s->balance / (double)s->sequences;
  }
  if (run->recipe.train_indexer) {
    for (int32_t l = 0; l < layers; l++) kl += s->kl[l] / (double)(s->kl_rows ? s->kl_rows : 1);
    row->indexer_kl = kl / layers;
    row->loss += run->job.dsa.loss_coeff * kl;
  }
}

static wn_status update(trainer *t, int64_t step, wn_train_row *row) {
  wn_run *run = t->run;
  const wn_job *job = &run->job;
  wn_state *state = &run->state;
  double factor = wn_schedule_factor(job, step);
  wn_update u = {
      .lr = job->optimizer.lr * factor,
      .indexer_lr = job->optimizer.indexer_lr * factor,
      .base_divisor = (double)(t->sums.predicted ? t->sums.predicted : 1),
      .indexer_divisor = (double)(t->sums.kl_rows ? t->sums.kl_rows : 1),
      .adam_base = state->adam_base + 1,
      .adam_indexer = state->adam_indexer + 1,
  };
  WN_TRY(wn_optimizer_norms(&u.norms, run->device, run->world, run->store, u.base_divisor, u.indexer_divisor));
  row->lr = run->recipe.train_base ? u.lr : NAN;
  row->indexer_lr = run->recipe.train_indexer ? u.indexer_lr : NAN;
  row->grad_norm = run->recipe.train_base ? u.norms.base : NAN;
  row->indexer_grad_norm = run->recipe.train_indexer ? u.norms.indexer : NAN;
  row->skipped = !isfinite(row->loss) || !wn_optimizer_takes(&u.norms, job->optimizer.clip_grad);
  if (row->skipped) {
    state->skipped++;
    state->skipped_in_a_row++;
  } else {
    state->skipped_in_a_row = 0;
    WN_TRY(wn_optimizer_update(run->device, run->store, job, &u));
    if (run->recipe.train_base) {
      state->adam_base++;
      state->router_bias_updates++;
      WN_TRY(wn_optimizer_router_bias(run->device, run->store, job->moe.bias_update_speed, t->sums.load,
                                      run->model->config.n_routed_experts));
    }
    if (run->recipe.train_indexer) {
      state->adam_indexer++;
      state->indexer_trained = true;
    }
  }
  WN_TRY(wn_optimizer_zero_grads(run->device, run->store));
  state->step = step + 1;
  state->tokens += t->sums.rows;
  row->step = state->step;
  row->tokens = state->tokens;
  return NULL;
}

static bool due(int64_t every, int64_t step) {
  return every > 0 && step % every == 0;
}

static void show_progress(const trainer *t, const wn_train_row *row, double step_s) {
  const wn_run *run = t->run;
  int64_t done = row->step - t->started_step, left = run->job.training.steps - row->step;
  double eta = done > 0 ? (wn_time_s() - t->started_s) / (double)done * (double)left : 0;
  char loss[80] = "";
  if (run->recipe.train_base) snprintf(loss, sizeof loss, "  lm_loss %.4f", row->lm_loss);
  if (run->recipe.train_indexer)
    snprintf(loss + strlen(loss), sizeof loss - strlen(loss), "  kl %.4f", row->indexer_kl);
  wn_progress(run->log, "%s step %lld/%lld%s  %.0f tokens/s  ETA %d:%02d%s", wn_stage_name(run->recipe.stage),
              (long long)row->step, (long long)run->job.training.steps, loss, (double)t->sums.rows / step_s,
              (int)(eta / 60), (int)eta % 60, row->skipped ? "  (skipped: non-finite)" : "");
}

static wn_status write_rows(trainer *t, const wn_train_row *row, bool with_stats, double step_s, double wait_s) {
  const wn_run *run = t->run;
  const wn_job *job = &run->job;
  bool last = row->step == job->training.steps;
  if (due(job->metrics.log_every, row->step) || last) {
    double flops = step_flops(t), peak_gib;
    WN_TRY(wn_device_peak_gib(run->device, &peak_gib));
    wn_speed_row speed = {
        .step = row->step,
        .step_ms = step_s * 1e3,
        .data_ms = t->sums.data_s * 1e3,
        .comm_wait_ms = wait_s * 1e3,
        .tokens_per_s = (double)t->sums.rows / step_s,
        .tflops = flops / step_s * 1e-12,
        .mfu_pct = 100 * flops / step_s / t->peak_flops,
        .mem_peak_gib = peak_gib,
    };
    WN_TRY(wn_metrics_train(t->metrics, row));
    WN_TRY(wn_metrics_speed(t->metrics, &speed));
    show_progress(t, row, step_s);
  }
  if (with_stats)
    WN_TRY(wn_metrics_layers(t->metrics, row->step, &run->model->config, &t->sums, run->recipe.train_indexer,
                             run->model->config.has_indexer));
  if (row->skipped) {
    wn_warn(run->log, "step %lld skipped: its " UNTAKEN " is not finite (%lld in a row)", (long long)row->step,
            (long long)run->state.skipped_in_a_row);
    WN_TRY(wn_metrics_event(t->metrics, row->step, 0, "skipped", UNTAKEN " not finite"));
  }
  return NULL;
}

static wn_status evaluate(trainer *t) {
  wn_run *run = t->run;
  const wn_model_config *config = &run->model->config;
  wn_eval_settings settings = {
      .world = run->world,
      .device = run->device,
      .model = run->model,
      .store = run->store,
      .dataset = run->valid,
      .seq_len = run->job.data.seq_len,
      .document_mask = run->job.data.document_mask,
      .n_seqs = run->job.metrics.eval_seqs,
      .topk = config->index_topk,
      .seed = run->job.training.seed,
  };
  /* while the base is frozen its dense loss cannot move: what moves is the loss under the indexer's selection */
  wn_selection selection = run->recipe.train_indexer ? WN_SELECT_INDEXER : WN_SELECT_DENSE;
  wn_eval_result result;
  WN_TRY(wn_evaluate(&result, &settings, selection));
  wn_info(run->log, "step %lld  valid loss %.4f (%s)", (long long)run->state.step, result.loss,
          wn_selection_name(selection));
  wn_status status = wn_metrics_eval(t->metrics, run->state.step, "valid", wn_selection_name(selection), &result);
  wn_eval_result_free(&result);
  return wn_world_agree(run->world, status);
}

static wn_status save(trainer *t) {
  wn_run *run = t->run;
  if (t->last_saved == run->state.step) return NULL;
  double start = wn_time_s();
  wn_checkpoint_plan plan = wn_run_checkpoint_plan(run);
  WN_TRY(wn_checkpoint_save(&plan, &run->state));
  t->last_saved = run->state.step;
  char detail[64];
  snprintf(detail, sizeof detail, "%.3f s", wn_time_s() - start);
  return wn_world_agree(run->world, wn_metrics_event(t->metrics, run->state.step, 0, "checkpoint", detail));
}

/* Of a GPU: what the arenas hold, and what its driver counts in all. */
typedef struct gpu_bytes {
  size_t arenas, used;
} gpu_bytes;

static wn_status gather_gpu_bytes(const wn_run *run, gpu_bytes *all) {
  gpu_bytes mine = {0};
  size_t other;
  wn_status status = wn_cuda_memory(run->device, &mine.used, &mine.arenas, &other);
  WN_TRY(wn_world_agree(run->world, status));
  return wn_group_gather(wn_world_all(run->world), all, &mine, sizeof mine);
}

/* RUN_DIR/memory.txt: rank 0's tables, as they stand after the first step, and again after the first evaluation: pieces
 * of parameters, then what each arena holds under which name; on GPUs, of every rank what lies beside its arenas. */
static wn_status write_tables(const wn_run *run, const gpu_bytes *gpus) {
  char path[WN_PATH_BYTES];
  WN_TRY(wn_path(path, "%s/memory.txt", run->job.run_dir));
  FILE *out = fopen(path, "w");
  if (!out) return WN_FAIL(WN_E_IO, "cannot write %s: %s", path, strerror(errno));
  wn_store_print(run->store, out);
  fputc('\n', out);
  wn_arena_print(run->device->weights, out);
  wn_arena_print(run->device->stash, out);
  wn_arena_print(run->device->scratch, out);
  wn_arena_print(run->device->host, out);
  for (int32_t r = 0; gpus && r < wn_world_size(run->world); r++)
    fprintf(out, "GPU of rank %d: %zu bytes in use, of which %zu in arenas\n", r, gpus[r].used, gpus[r].arenas);
  if (fclose(out) != 0) return WN_FAIL(WN_E_IO, "cannot write %s: %s", path, strerror(errno));
  return NULL;
}

static wn_status write_memory(const trainer *t) {
  const wn_run *run = t->run;
  gpu_bytes *gpus = NULL;
  wn_status status = NULL;
  if (run->device->kind == WN_CUDA) {
    gpus = calloc((size_t)wn_world_size(run->world), sizeof *gpus);
    status = gpus ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for what %d GPUs hold", wn_world_size(run->world));
    WN_TRY_GOTO(status, done, wn_world_agree(run->world, status));
    WN_TRY_GOTO(status, done, gather_gpu_bytes(run, gpus));
  }
  status = wn_world_agree(run->world, wn_world_rank(run->world) == 0 ? write_tables(run, gpus) : NULL);
done:
  free(gpus);
  return status;
}

static wn_status one_step(trainer *t, bool *stop) {
  wn_run *run = t->run;
  int64_t step = run->state.step;
  const wn_job *job = &run->job;
  bool last = step + 1 == job->training.steps;
  bool with_stats = due(job->metrics.layers_every, step + 1) || (job->metrics.layers_every > 0 && (last || step == 0));
  double start = wn_time_s();
  wn_train_row row = {0};
  double gpu_wait_s;
  wn_world_take_wait_s(run->world); /* what evaluations, saves and unlogged steps waited is not this step's */
  WN_TRY(wn_store_take_wait_s(run->store, &gpu_wait_s));
  wn_range_begin("step", step + 1);
  WN_TRY(wn_step_run(run, step, with_stats, &t->sums));
  losses(t, &row);
  wn_range_begin("update", -1);
  WN_TRY(update(t, step, &row));
  wn_range_end();
  wn_range_end();
  double step_s = wn_time_s() - start, wait_s = wn_world_take_wait_s(run->world);
  WN_TRY(wn_store_take_wait_s(run->store, &gpu_wait_s));
  wait_s += gpu_wait_s;
  if (step == t->started_step) WN_TRY(measure_peak(t)); /* by now the threads have found their cores */
  wn_status written = write_rows(t, &row, with_stats, step_s, wait_s);
  if (step == t->started_step) WN_KEEP_FIRST(written, write_memory(t));
  WN_TRY(wn_world_agree(run->world, written));
  if (run->state.skipped_in_a_row > job->training.max_skipped_in_a_row)
    return WN_FAIL_HINT(
        WN_E_TRAINING, "start another run_dir with the last good checkpoint as init and a lower learning rate",
        "%lld steps in a row had a " UNTAKEN " that is not finite (training.max_skipped_in_a_row is %d)",
        (long long)run->state.skipped_in_a_row, job->training.max_skipped_in_a_row);
  if (run->valid && (due(job->metrics.eval_every, step + 1) || (job->metrics.eval_every > 0 && last))) {
    WN_TRY(evaluate(t));
    if (!t->evaluated) WN_TRY(write_memory(t));
    t->evaluated = true;
  }
  int64_t wants_stop = stop_requested;
  WN_TRY(wn_group_sum_i64(wn_world_all(run->world), &wants_stop, 1));
  *stop = wants_stop != 0;
  if (due(job->checkpoint.interval, step + 1) || last || *stop) WN_TRY(save(t));
  return NULL;
}

/* ---- the loop ---- */

static wn_status begin(trainer *t) {
  wn_run *run = t->run;
  char path[WN_PATH_BYTES];
  wn_status local = NULL;
  if (wn_world_rank(run->world) == 0) {
    local = wn_path(path, "%s/log.txt", run->job.run_dir);
    if (!local) local = wn_log_open_file(run->log, path);
    if (!local) local = wn_metrics_create(&t->metrics, run->job.run_dir, run->state.step);
    if (!local)
      local = wn_metrics_event(t->metrics, run->state.step, 0, run->resumed ? "resume" : "start",
                               wn_stage_name(run->recipe.stage));
  }
  if (!local) local = wn_step_sums_create(&t->sums, &run->model->config);
  WN_TRY(wn_world_agree(run->world, local));
  if (run->recipe.selection != WN_SELECT_DENSE) {
    int32_t keys = run->job.data.seq_len;
    const wn_model_config *config = &run->model->config;
    bool masked = wn_model_attention_form(config, run->device->head_tile, keys, config->index_topk) == WN_FORM_MASKED;
    wn_info(run->log, "sparse attention in the %s form", masked ? "masked per-head" : "absorbed latent");
  }
  t->last_saved = run->resumed ? run->state.step : -1;
  t->started_s = wn_time_s();
  t->started_step = run->state.step;
  return NULL;
}

/* A dry step moves the bytes of one micro-batch where these are the outer loop. */
static wn_traffic step_traffic(const wn_run *run) {
  const wn_job *job = &run->job;
  wn_traffic traffic = wn_store_traffic(run->store);
  int64_t times = job->training.global_batch_seqs / wn_world_size(run->world) / job->training.micro_batch_seqs;
  if (run->recipe.layer_major) times = 1;
  return (wn_traffic){traffic.gathered_bytes * times, traffic.summed_bytes * times};
}

wn_status wn_train_rehearse(wn_run *run, double *flops, wn_traffic *traffic) {
  trainer t = {.run = run};
  wn_train_row row = {0};
  WN_ASSERT(run->device->dry, "a rehearsal that would move weights");
  WN_TRY(wn_step_sums_create(&t.sums, &run->model->config));
  wn_status status = wn_step_run(run, 0, run->job.metrics.layers_every > 0, &t.sums);
  *traffic = step_traffic(run);
  *flops = step_flops(&t);
  if (!status) status = update(&t, 0, &row);
  if (!status) status = measure_peak(&t);
  if (!status && run->valid && run->job.metrics.eval_every > 0) status = evaluate(&t);
  wn_step_sums_free(&t.sums);
  return status;
}

wn_status wn_train(wn_recipe recipe, const wn_job *job, wn_job_source *source, wn_world *world, wn_log *log) {
  trainer t = {0};
  wn_status status = NULL;
  bool stop = false;
  struct sigaction action = {.sa_handler = request_stop}, old_int, old_term;
  stop_requested = 0;
  sigaction(SIGINT, &action, &old_int);
  sigaction(SIGTERM, &action, &old_term);
  WN_TRY_GOTO(status, done, wn_run_create(&t.run, recipe, job, source, world, log));
  WN_TRY_GOTO(status, done, begin(&t));
  if (t.run->state.step >= job->training.steps)
    wn_info(log, "nothing to do: step %lld of %lld is done", (long long)t.run->state.step,
            (long long)job->training.steps);
  while (t.run->state.step < job->training.steps && !stop) WN_TRY_GOTO(status, done, one_step(&t, &stop));
  if (stop && t.run->state.step < job->training.steps)
    status = WN_FAIL_HINT(WN_E_INTERRUPTED, "run the same command again to go on",
                          "stopped by a signal after step %lld; the state is saved", (long long)t.run->state.step);
  else
    WN_TRY_GOTO(status, done, wn_metrics_event(t.metrics, t.run->state.step, 0, "end", wn_stage_name(recipe.stage)));
done:
  if (status && t.metrics)
    WN_KEEP_FIRST(
        status, wn_metrics_event(t.metrics, t.run->state.step, wn_world_rank(world), "error", wn_status_text(status)));
  WN_KEEP_FIRST(status, wn_metrics_close(t.metrics));
  wn_step_sums_free(&t.sums);
  wn_run_free(t.run);
  sigaction(SIGINT, &old_int, NULL);
  sigaction(SIGTERM, &old_term, NULL);
  return status;
}
