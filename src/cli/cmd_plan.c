/* What a job would take on so many ranks of a machine: a table for people, or JSON. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/name_list.h"
#include "cli/commands.h"
#include "cli/flags.h"
#include "io/json.h"
#include "io/yaml.h"
#include "stages/stages.h"
#include "train/device.h"
#include "train/plan.h"

static const double giga = 1e9;

/* ---- what is asked ---- */

/* --stage, else the job file's own `stage:`, else its name: warmup.yaml is a warm-up. */
static wn_status find_stage(wn_stage *out, const char *given, const char *path) {
  wn_yaml yaml;
  char name[32] = "";
  const char *file = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
  WN_TRY(wn_yaml_load(&yaml, path));
  snprintf(name, sizeof name, "%.*s", (int)strcspn(file, "."), file);
  for (int32_t i = 0; i < yaml.n; i++)
    if (strcmp(yaml.entries[i].key, "stage") == 0) snprintf(name, sizeof name, "%s", yaml.entries[i].value);
  wn_yaml_free(&yaml);
  if (given) snprintf(name, sizeof name, "%s", given);
  for (wn_stage stage = WN_STAGE_PRETRAIN; stage < WN_N_STAGES; stage++) {
    if (strcmp(name, wn_stage_name(stage)) != 0) continue;
    *out = stage;
    return NULL;
  }
  if (given) return WN_FAIL(WN_E_USAGE, "--stage is %s; allowed are pretrain, warmup and adapt", given);
  return WN_FAIL_HINT(WN_E_USAGE, "give --stage pretrain, warmup or adapt", "%s does not say which stage it is for",
                      path);
}

typedef struct request {
  const char *stage, *device;
  int64_t ranks;
  double memory_gb, tflops, bandwidth, share;
  bool as_json;
} request;

/* The GPU that is here may be one that this build does not run on: a plan can be for another. */
static wn_status find_here(wn_machine *out, const wn_job *job) {
  wn_status status = wn_machine_here(out, job);
  if (wn_status_code(status) != WN_E_DEVICE) return status;
  wn_status told = WN_FAIL_HINT(WN_E_DEVICE, "--device h200, h100, gh200 or cpu says what else to plan for", "%s",
                                wn_status_text(status));
  wn_status_free(status);
  return told;
}

/* The job's own choice where --device gives none. */
static wn_status find_machine(wn_machine *out, const request *r, const wn_job *job) {
  bool here = !r->device && wn_chooses_gpu(job->device);
  WN_TRY(here ? find_here(out, job) : wn_machine_named(out, r->device ? r->device : "cpu", job->threads));
  if (r->memory_gb > 0) out->memory_bytes = r->memory_gb * giga;
  if (r->tflops > 0) out->flops = r->tflops * 1e12;
  if (r->bandwidth > 0) out->link_bytes_s = out->fabric_bytes_s = r->bandwidth * giga;
  return NULL;
}

/* ---- the answer, as JSON ---- */

/* What is in use of an arena, and what the largest tensor of each name is. */
static json_t *uses_of(const wn_arena *arena) {
  json_t *list = json_array();
  for (int32_t i = 0; i < wn_arena_uses(arena); i++) {
    wn_arena_use use = wn_arena_use_at(arena, i);
    json_t *shape = json_array(), *one;
    for (int32_t d = 0; d < use.rank; d++) json_array_append_new(shape, json_integer(use.dim[d]));
    one = json_pack("{ss sI sI ss? so}", "name", use.name, "peak_bytes", (json_int_t)use.peak_bytes, "at_peak_bytes",
                    (json_int_t)use.at_peak_bytes, "dtype", use.rank ? wn_dtype_name((wn_dtype)use.dtype) : NULL,
                    "largest", shape);
    json_array_append_new(list, one);
  }
  return list;
}

static json_t *arena_of(const wn_arena *arena) {
  return json_pack("{ss sI sI so}", "arena", wn_arena_name(arena), "peak_bytes", (json_int_t)wn_arena_peak_bytes(arena),
                   "held_bytes", (json_int_t)wn_arena_held_bytes(arena), "uses", uses_of(arena));
}

static json_t *remedies_of(const wn_remedy *remedies, int32_t n) {
  json_t *list = json_array();
  for (int32_t i = 0; i < n; i++)
    json_array_append_new(list, json_pack("{ss sf sb}", "change", remedies[i].change, "total_bytes",
                                          remedies[i].total_bytes, "fits", (int)remedies[i].fits));
  return list;
}

static wn_status print_json(const wn_plan *p, const wn_remedy *remedies, int32_t n_remedies) {
  const wn_device *d = p->run->device;
  json_t *root =
      json_pack("{ss si ss s[o,o,o,o] sf sf sf sf sf sb}", "stage", wn_stage_name(p->run->recipe.stage), "ranks",
                (int)p->ranks, "machine", p->machine.name, "arenas", arena_of(d->weights), arena_of(d->stash),
                arena_of(d->scratch), arena_of(d->host), "arena_bytes", p->arena_bytes, "own_bytes", p->own_bytes,
                "nccl_bytes", p->machine.gpu && p->ranks > 1 ? p->machine.nccl_bytes : 0.0, "total_bytes",
                p->total_bytes, "memory_bytes", p->machine.memory_bytes, "fits", (int)p->fits);
  json_t *more = json_pack("{sf sf sf sf sf sf sI sI sf sf so}", "step_flops", p->flops, "share", p->share, "compute_s",
                           p->compute_s, "transfer_s", p->transfer_s, "hours", p->hours, "rank_hours", p->rank_hours,
                           "gathered_bytes", (json_int_t)p->traffic.gathered_bytes, "summed_bytes",
                           (json_int_t)p->traffic.summed_bytes, "checkpoint_written_bytes", p->written_bytes,
                           "checkpoint_linked_bytes", p->linked_bytes, "remedies", remedies_of(remedies, n_remedies));
  bool bad = !root || !more || json_object_update(root, more) != 0;
  if (!bad) {
    json_dumpf(root, stdout, JSON_INDENT(2));
    putchar('\n');
  }
  json_decref(more);
  json_decref(root);
  return bad ? WN_FAIL(WN_E_MEMORY, "out of memory printing the plan") : NULL;
}

/* ---- as text ---- */

/* "132.540 GB", "3.141 MB": ten characters and the unit. */
static const char *size_text(char out[32], double bytes) {
  static const struct {
    double unit;
    const char *name;
  } units[] = {{1e12, "TB"}, {1e9, "GB"}, {1e6, "MB"}};
  size_t i = 0;
  while (i < 2 && bytes < units[i].unit) i++;
  snprintf(out, 32, "%10.3f %s", bytes / units[i].unit, units[i].name);
  return out;
}

static void print_shape(const wn_arena_use *use) {
  char shape[WN_SHAPE_TEXT_BYTES];
  if (use->rank == 0) {
    putchar('\n');
    return;
  }
  wn_shape_text(shape, use->rank, use->dim);
  printf("  %s %s\n", wn_dtype_name((wn_dtype)use->dtype), shape);
}

/* Names that hold a hundredth of the arena or more, then the rest in one line. */
static void print_arena(const wn_arena *arena, const char *life) {
  char text[32];
  double peak = (double)wn_arena_peak_bytes(arena), shown = 0;
  printf("%-8s %-34s %s\n", wn_arena_name(arena), life, size_text(text, (double)wn_arena_held_bytes(arena)));
  for (int32_t i = 0; i < wn_arena_uses(arena); i++) {
    wn_arena_use use = wn_arena_use_at(arena, i);
    if ((double)use.at_peak_bytes < peak / 100) continue;
    printf("         %-34s %s", use.name, size_text(text, (double)use.at_peak_bytes));
    print_shape(&use);
    shown += (double)use.at_peak_bytes;
  }
  if (peak - shown >= peak / 1000) printf("         %-34s %s\n", "others", size_text(text, peak - shown));
}

static void print_memory(const wn_plan *p) {
  char text[32];
  const wn_device *d = p->run->device;
  const wn_machine *m = &p->machine;
  puts("memory of a rank, each arena where it is fullest; beside a name its largest tensor");
  print_arena(d->weights, "as long as the run");
  print_arena(d->stash, "as long as a step");
  print_arena(d->scratch, "as long as an operation or a layer");
  if (!m->gpu) print_arena(d->host, "tables and copies");
  const char *own = !m->gpu        ? "program, libraries, tables of parameters"
                    : p->ranks > 1 ? "CUDA, cuBLAS, NCCL and the kernels' code"
                                   : "CUDA, cuBLAS and the kernels' code";
  if (p->own_bytes > 0) printf("%-43s %s\n", own, size_text(text, p->own_bytes));
  printf("%-43s %s", "in all", size_text(text, p->total_bytes));
  if (m->memory_bytes > 0) printf(" of %.1f GB: %s", m->memory_bytes / giga, p->fits ? "fits" : "does not fit");
  putchar('\n');
  if (m->gpu)
    printf("%-43s %s\n", "beside it, of the host's memory", size_text(text, (double)wn_arena_peak_bytes(d->host)));
}

static void print_time(const wn_plan *p, bool share_given) {
  char weights[32], gradients[32];
  const wn_job *job = &p->run->job;
  printf("\na step      %.4g FLOP on %d rank%s", p->flops, p->ranks, p->ranks == 1 ? "" : "s");
  if (p->machine.flops > 0)
    printf(" at %.0f%% (%s) of %.4g TFLOP/s each: %.4g s\n", 100 * p->share, share_given ? "given" : "measured",
           p->machine.flops * 1e-12, p->compute_s);
  else
    printf("; the peak of %s is not known here: --tflops says it\n", p->machine.name);
  size_text(weights, (double)p->traffic.gathered_bytes);
  size_text(gradients, (double)p->traffic.summed_bytes);
  printf("traffic     %s of weights to a rank, %s of gradients from it", weights + strspn(weights, " "),
         gradients + strspn(gradients, " "));
  if (p->transfer_s > 0) printf(": %.4g s beside the work", p->transfer_s);
  putchar('\n');
  if (p->machine.flops > 0)
    printf("the job     %lld steps of %.4g s: %.4g h, %.4g %s-hours\n", (long long)job->training.steps, p->step_s,
           p->hours, p->rank_hours, p->machine.gpu ? "GPU" : "rank");
}

static void print_disk(const wn_plan *p) {
  char text[32];
  int32_t keep = p->run->job.checkpoint.keep;
  size_text(text, p->written_bytes);
  printf("checkpoints %s each", text + strspn(text, " "));
  size_text(text, p->linked_bytes);
  if (p->linked_bytes > 0) printf(", and links to %s of the unchanged base", text + strspn(text, " "));
  size_text(text, (keep + 1) * p->written_bytes);
  if (keep > 0)
    printf("; %d kept and one being written: %s\n", keep, text + strspn(text, " "));
  else
    puts("; all are kept");
}

static void print_remedies(const wn_remedy *remedies, int32_t n) {
  char text[32];
  puts(n ? "\nwhat would lower it"
         : "\nno change of micro-batch, moments, what is kept, ranks or length alone lowers it");
  for (int32_t i = 0; i < n; i++)
    printf("  %-41s %s%s\n", remedies[i].change, size_text(text, remedies[i].total_bytes),
           remedies[i].fits ? ": fits" : "");
}

static wn_status print_plan(const wn_plan *p, const request *r, const char *path) {
  wn_remedy remedies[WN_MOST_REMEDIES];
  int32_t n = 0;
  if (!p->fits) WN_TRY(wn_plan_remedies(remedies, &n, p));
  if (r->as_json) return print_json(p, remedies, n);
  printf("%s: %s on %d rank%s of %s, sequences of %d tokens, %d a micro-batch\n\n", path,
         wn_stage_name(p->run->recipe.stage), p->ranks, p->ranks == 1 ? "" : "s", p->machine.name,
         p->run->job.data.seq_len, p->run->job.training.micro_batch_seqs);
  print_memory(p);
  print_time(p, r->share > 0);
  print_disk(p);
  if (!p->fits) print_remedies(remedies, n);
  return NULL;
}

static wn_status plan(const request *r, const char *path, const char *const *overrides, int32_t n_overrides) {
  wn_stage stage = WN_STAGE_PRETRAIN;
  wn_job_source *source = NULL;
  wn_machine machine;
  wn_plan *p = NULL;
  wn_status status = NULL;
  wn_job *job = malloc(sizeof *job);
  if (!job) return WN_FAIL(WN_E_MEMORY, "out of memory for the job");
  WN_TRY_GOTO(status, done, find_stage(&stage, r->stage, path));
  WN_TRY_GOTO(status, done, wn_job_load(job, &source, stage, path, overrides, n_overrides));
  WN_TRY_GOTO(status, done, find_machine(&machine, r, job));
  WN_TRY_GOTO(status, done, wn_plan_create(&p, wn_recipe_of(stage), job, (int32_t)r->ranks, &machine, r->share / 100));
  WN_TRY_GOTO(status, done, print_plan(p, r, path));
  if (fflush(stdout) != 0 || ferror(stdout)) status = WN_FAIL(WN_E_IO, "cannot write to standard output");
done:
  wn_plan_free(p);
  wn_job_source_free(source);
  free(job);
  return status;
}

wn_status wn_cmd_plan(int argc, char **argv) {
  request r = {.ranks = 0};
  bool helped;
  int32_t n;
  const wn_flag flags[] = {
      {"--ranks", WN_FLAG_INT, &r.ranks, 1, 65536, "N", "processes, one a GPU"},
      {"--stage", WN_FLAG_TEXT, &r.stage, 0, 0, "STAGE",
       "pretrain, warmup or adapt (default: the job file's `stage:`, else its name)"},
      {"--device", WN_FLAG_TEXT, &r.device, 0, 0, "NAME",
       "h200, h100, gh200 or cpu (default: as the job says, on the GPU that is here, else an H200)"},
      {"--memory-gb", WN_FLAG_REAL, &r.memory_gb, 0, 1e6, "GB", "memory of a rank, instead of the device's"},
      {"--tflops", WN_FLAG_REAL, &r.tflops, 0, 1e6, "N", "dense BF16 peak of a rank, instead of the device's"},
      {"--bandwidth", WN_FLAG_REAL, &r.bandwidth, 0, 1e6, "GB/s",
       "between ranks, each way (default: NVLink's within 8 ranks, 50 beyond)"},
      {"--share", WN_FLAG_REAL, &r.share, 0, 100, "PCT",
       "of the peak that a step reaches (default: as measured, docs/performance.md)"},
      {.name = "--json", .kind = WN_FLAG_SWITCH, .value = &r.as_json, .help = "the plan as JSON"}};
  const wn_command_help help = {
      "winnow plan JOB.yaml --ranks N [key=value ...] [--device NAME] [--json]",
      "Memory, time, traffic and disk that a job would take: the trainer's own code runs one step that allocates and "
      "computes nothing. Needs no GPU, no data, and of the model only its config.json."};
  WN_TRY(wn_flags_parse(argc, argv, flags, sizeof flags / sizeof *flags, &help, &n, &helped));
  if (helped) return NULL;
  if (n < 1) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "no job file given");
  if (r.ranks == 0) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "--ranks is missing");
  return plan(&r, argv[1], (const char *const *)(argv + 2), n - 1);
}
