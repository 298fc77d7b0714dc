#include "train/plan.h"

#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "kernels/cpu/cpu.h"
#include "kernels/cuda/cuda.h"
#include "model/flops.h"
#include "train/device.h"
#include "train/rewrite.h"

static const double bytes_a_kib = 1024, bytes_a_gib = 1024.0 * 1024 * 1024;

/* ---- machines ---- */

/* What CUDA, cuBLAS and the kernels' code take of a GPU: on an H200, the same in runs of 0.3 to 12 GB
 * (docs/performance.md). */
static const double cuda_bytes = 722e6;
/* What NCCL takes beside it: on two H200 of a host, the same on both and in all jobs (tests/cuda/plan two_gpus). It has
 * buffers for every rank that it talks to, so more ranks may take more. */
static const double nccl_bytes = 1275e6;

/* Hopper's data sheets, but an H200's memory as its driver counts it. */
typedef struct known {
  wn_machine machine;
  const char *card; /* what the driver calls it; up to a *, any that begins so. Others of the family are slower */
} known;
static const known machines[] = {
    {{.name = "h200", .gpu = true, .multiprocessors = 132, .memory_bytes = 150.1e9, .ranks_a_host = 8}, "NVIDIA H200"},
    {{.name = "h100", .gpu = true, .multiprocessors = 132, .memory_bytes = 80e9, .ranks_a_host = 8},
     "NVIDIA H100 80GB HBM3"},
    {{.name = "gh200", .gpu = true, .multiprocessors = 132, .memory_bytes = 96e9, .ranks_a_host = 1}, "NVIDIA GH200*"},
};
enum { N_MACHINES = sizeof machines / sizeof *machines };

/* link: NCCL between two H200 of a host, measured (docs/performance.md); fabric: 400 Gbit/s a GPU, the usual build. */
static void add_rates(wn_machine *machine) {
  machine->flops = WN_HOPPER_BF16_FLOPS;
  machine->link_bytes_s = 213 * bytes_a_gib;
  machine->fabric_bytes_s = 50e9;
}

static void add_own_bytes(wn_machine *machine) {
  machine->own_bytes = cuda_bytes;
  machine->nccl_bytes = nccl_bytes;
}

static wn_status this_cpu(wn_machine *out, int32_t threads) {
  enum { PROBE = 512 };
  wn_device *device;
  *out = (wn_machine){.name = "cpu"};
  WN_TRY(wn_cpu_create_f32(&device, (wn_cpu_settings){.threads = threads}));
  wn_status status = wn_device_product_rate(device, PROBE, &out->flops);
  wn_close_device(device);
  return status;
}

wn_status wn_machine_named(wn_machine *out, const char *name, int32_t threads) {
  if (strcmp(name, "cpu") == 0) return this_cpu(out, threads);
  for (size_t i = 0; i < N_MACHINES; i++) {
    if (strcmp(name, machines[i].machine.name) != 0) continue;
    *out = machines[i].machine;
    add_rates(out);
    add_own_bytes(out);
    return NULL;
  }
  return WN_FAIL_HINT(WN_E_USAGE, "for another Hopper GPU: --device h200 with --memory-gb, --tflops, --bandwidth",
                      "no machine '%.40s' is known; h200, h100, gh200 and cpu are", name);
}

static bool is_card(const char *pattern, const char *name) {
  size_t n = strcspn(pattern, "*");
  return strncmp(pattern, name, n) == 0 && (pattern[n] || !name[n]);
}

void wn_machine_of_card(wn_machine *out, const wn_cuda_card *card) {
  *out = (wn_machine){.gpu = true};
  for (size_t i = 0; i < N_MACHINES; i++) {
    if (!is_card(machines[i].card, card->name)) continue;
    *out = machines[i].machine;
    add_rates(out);
  }
  snprintf(out->name, sizeof out->name, "%.*s", (int)sizeof out->name - 1, card->name);
  out->multiprocessors = card->multiprocessors;
  out->memory_bytes = (double)card->memory_bytes;
  add_own_bytes(out);
}

wn_status wn_machine_here(wn_machine *out, const wn_job *job) {
  wn_cuda_card card;
  *out = (wn_machine){.name = "cpu"};
  if (!wn_chooses_gpu(job->device)) return NULL;
  if (wn_cuda_count(NULL) == 0) return wn_machine_named(out, "h200", 0);
  WN_TRY(wn_cuda_card_of(&card, 0));
  wn_machine_of_card(out, &card);
  return NULL;
}

/* Shares of the machine's rate that whole layers or steps reached: docs/performance.md. */
typedef struct measured {
  wn_stage stage;
  bool gpu;
  int32_t seq_len;
  double share;
} measured;
static const measured shares[] = {
    {WN_STAGE_WARMUP, true, 8192, 0.57},   {WN_STAGE_WARMUP, true, 131072, 0.55},  {WN_STAGE_ADAPT, true, 8192, 0.39},
    {WN_STAGE_ADAPT, true, 131072, 0.35},  {WN_STAGE_PRETRAIN, true, 16384, 0.41}, {WN_STAGE_WARMUP, false, 512, 0.71},
    {WN_STAGE_PRETRAIN, false, 512, 0.63}, {WN_STAGE_ADAPT, false, 512, 0.57},
};

/* The one measured at the nearest length. */
static double measured_share(wn_stage stage, bool gpu, int32_t seq_len) {
  double best = 0, distance = INFINITY;
  for (size_t i = 0; i < sizeof shares / sizeof *shares; i++) {
    double away = fabs(log2((double)shares[i].seq_len / seq_len));
    if (shares[i].stage != stage || shares[i].gpu != gpu || away >= distance) continue;
    distance = away;
    best = shares[i].share;
  }
  return best;
}

/* ---- memory ---- */

static wn_status open_dry(wn_device **out, const wn_machine *machine, int32_t threads) {
  if (machine->gpu) return wn_cuda_create_dry(out, machine->multiprocessors, threads ? threads : omp_get_num_procs());
  return wn_cpu_create_f32(out, (wn_cpu_settings){.threads = threads, .dry = true});
}

/* What a process of this program holds beside its arenas: code, libraries, tables of parameters. This one has the same
 * when its run is made and nothing has been asked of it. */
static double process_bytes(void) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return (double)usage.ru_maxrss * bytes_a_kib;
}

static void count_memory(wn_plan *plan) {
  const wn_device *device = plan->run->device;
  const wn_machine *machine = &plan->machine;
  plan->arena_bytes = (double)wn_arena_held_bytes(device->weights) + (double)wn_arena_held_bytes(device->stash) +
                      (double)wn_arena_held_bytes(device->scratch);
  if (machine->gpu) {
    plan->own_bytes = machine->own_bytes + (plan->ranks > 1 ? machine->nccl_bytes : 0);
  } else {
    plan->arena_bytes += (double)wn_arena_held_bytes(device->host);
  }
  plan->total_bytes = plan->arena_bytes + plan->own_bytes;
  plan->fits = machine->memory_bytes <= 0 || plan->total_bytes <= machine->memory_bytes;
}

/* ---- time ---- */

static void count_time(wn_plan *plan, double share) {
  const wn_run *run = plan->run;
  const wn_machine *machine = &plan->machine;
  bool one_host = plan->ranks <= machine->ranks_a_host;
  double bandwidth = one_host ? machine->link_bytes_s : machine->fabric_bytes_s;
  plan->share = share > 0 ? share : measured_share(run->recipe.stage, machine->gpu, run->job.data.seq_len);
  if (machine->flops > 0) plan->compute_s = plan->flops / (machine->flops * plan->share * plan->ranks);
  if (bandwidth > 0) plan->transfer_s = (double)(plan->traffic.gathered_bytes + plan->traffic.summed_bytes) / bandwidth;
  plan->step_s = plan->compute_s > plan->transfer_s ? plan->compute_s : plan->transfer_s;
  plan->hours = plan->step_s * (double)run->job.training.steps / 3600;
  plan->rank_hours = plan->hours * plan->ranks;
}

/* ---- disk ---- */

/* Where init has weights the real layout says what is written and what is linked; else what trains is written and the
 * frozen parameters are linked, in the dtype that checkpoints have. */
static wn_status lay_out_checkpoint(wn_plan *plan, const wn_param *params, int32_t n, const wn_hf_dir *source) {
  wn_checkpoint_layout *layout;
  wn_checkpoint_plan saved = wn_run_checkpoint_plan(plan->run);
  wn_dtype moments = plan->run->device->dtype_of[WN_MOMENT];
  WN_TRY(wn_checkpoint_layout_create(&layout, params, n, source, moments, saved.shard_bytes));
  for (int32_t f = 0; f < layout->n_files; f++) {
    const wn_checkpoint_file *file = &layout->files[f];
    if (file->source_shard < 0) plan->written_bytes += (double)wn_st_layout_file_bytes(file->layout);
  }
  wn_checkpoint_layout_free(layout);
  return NULL;
}

static wn_status count_disk_by_shapes(wn_plan *plan) {
  const wn_param_table *table = &plan->run->model->table;
  wn_param *written = calloc((size_t)table->n, sizeof *written);
  int32_t n = 0;
  if (!written) return WN_FAIL(WN_E_MEMORY, "out of memory for the checkpoint's layout");
  for (int32_t i = 0; i < table->n; i++) {
    const wn_param *p = &table->params[i];
    if (p->kind != WN_FROZEN)
      written[n++] = *p;
    else
      plan->linked_bytes += (double)wn_param_elements(p) * (p->fp8 ? 1 : (double)wn_dtype_bytes(p->file_dtype));
  }
  wn_status status = lay_out_checkpoint(plan, written, n, NULL);
  free(written);
  return status;
}

static wn_status count_disk(wn_plan *plan) {
  const wn_run *run = plan->run;
  wn_hf_dir *source;
  double all = 0;
  if (!*run->job.init || !wn_hf_dir_has_weights(run->job.init)) return count_disk_by_shapes(plan);
  WN_TRY(wn_source_open(&source, run->job.init, &run->model->config));
  for (int64_t i = 0; i < wn_hf_dir_count(source); i++) all += (double)wn_hf_dir_at(source, i, NULL)->bytes;
  wn_status status = lay_out_checkpoint(plan, run->model->table.params, run->model->table.n, source);
  if (!run->recipe.train_base) plan->linked_bytes = all;
  wn_hf_dir_close(source);
  return status;
}

/* ---- the plan ---- */

wn_status wn_plan_create(wn_plan **out, wn_recipe recipe, const wn_job *job, int32_t ranks, const wn_machine *machine,
                         double share) {
  wn_status status = NULL;
  wn_device *device;
  wn_plan *plan = calloc(1, sizeof *plan);
  if (!plan) return WN_FAIL(WN_E_MEMORY, "out of memory for the plan");
  *plan = (wn_plan){.machine = *machine, .ranks = ranks};
  WN_TRY_GOTO(status, fail, wn_world_create_dry(&plan->world, ranks));
  WN_TRY_GOTO(status, fail, open_dry(&device, machine, job->threads));
  WN_TRY_GOTO(status, fail, wn_run_create_dry(&plan->run, recipe, job, plan->world, device));
  if (!machine->gpu) plan->own_bytes = process_bytes();
  WN_TRY_GOTO(status, fail, wn_train_rehearse(plan->run, &plan->flops, &plan->traffic));
  WN_TRY_GOTO(status, fail, count_disk(plan));
  count_memory(plan);
  count_time(plan, share);
  *out = plan;
  return NULL;
fail:
  wn_plan_free(plan);
  return status;
}

void wn_plan_free(wn_plan *plan) {
  if (!plan) return;
  wn_run_free(plan->run);
  wn_world_free(plan->world);
  free(plan);
}

/* ---- what to change ---- */

typedef struct trial {
  wn_job job;
  int32_t ranks;
  char change[96];
} trial;

/* Change number i of a job; false: it has no such change. Ranks grow as far as the batch allows. */
static bool change(trial *t, const wn_plan *plan, int32_t i) {
  enum { OPTIONS = 3, MORE_RANKS = 4, SHORTER = 3 };
  _Static_assert(OPTIONS + MORE_RANKS + SHORTER == WN_MOST_REMEDIES, "changes are not counted right");
  const wn_job *job = &plan->run->job;
  *t = (trial){.job = *job, .ranks = plan->ranks};
  if (i == 0) {
    t->job.training.micro_batch_seqs = 1;
    snprintf(t->change, sizeof t->change, "training.micro_batch_seqs=1");
    return job->training.micro_batch_seqs > 1;
  }
  if (i == 1) {
    t->job.optimizer.moments = WN_MOMENTS_BF16;
    snprintf(t->change, sizeof t->change, "optimizer.moments=bf16");
    return job->optimizer.moments != WN_MOMENTS_BF16;
  }
  if (i == 2) {
    t->job.training.keep = WN_KEEP_INPUTS;
    snprintf(t->change, sizeof t->change, "training.keep=inputs");
    return job->training.keep != WN_KEEP_INPUTS;
  }
  i -= OPTIONS;
  if (i < MORE_RANKS) {
    t->ranks = plan->ranks << (i + 1);
    snprintf(t->change, sizeof t->change, "--ranks %d", t->ranks);
    return t->ranks <= 65536 && job->training.global_batch_seqs % (t->ranks * job->training.micro_batch_seqs) == 0;
  }
  t->job.data.seq_len = job->data.seq_len >> (i - MORE_RANKS + 1);
  snprintf(t->change, sizeof t->change, "data.seq_len=%d", t->job.data.seq_len);
  return t->job.data.seq_len >= 2; /* the least that a job may have */
}

wn_status wn_plan_remedies(wn_remedy out[WN_MOST_REMEDIES], int32_t *n, const wn_plan *plan) {
  trial *t = malloc(sizeof *t);
  wn_status status = t ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for another plan");
  *n = 0;
  for (int32_t i = 0; !status && i < WN_MOST_REMEDIES; i++) {
    wn_plan *other;
    if (!change(t, plan, i)) continue;
    status = wn_plan_create(&other, plan->run->recipe, &t->job, t->ranks, &plan->machine, plan->share);
    if (status) break;
    /* a process's own size only grows: that of the first plan stands for all */
    double total = other->arena_bytes + (plan->machine.gpu ? other->own_bytes : plan->own_bytes);
    if (total < plan->total_bytes) {
      wn_remedy *r = &out[(*n)++];
      snprintf(r->change, sizeof r->change, "%s", t->change);
      r->total_bytes = total;
      r->fits = total <= plan->machine.memory_bytes;
    }
    wn_plan_free(other);
  }
  free(t);
  return status;
}
