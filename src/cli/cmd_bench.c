/* `winnow bench`: times operations of the device's table, and whole layers. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/bench.h"
#include "cli/commands.h"
#include "cli/flags.h"
#include "model/flops.h"
#include "train/device.h"

/* V3.1's widths; for a CPU everything small. */
static const wn_bench_sizes gpu_sizes = {.seq = 8192,
                                         .hidden = 7168,
                                         .heads = 128,
                                         .nope = 128,
                                         .rope = 64,
                                         .v = 128,
                                         .latent = 512,
                                         .q_latent = 1536,
                                         .index_heads = 64,
                                         .index_width = 128,
                                         .topk = 2048,
                                         .sampled = 256,
                                         .experts = 32,
                                         .experts_a_token = 8,
                                         .expert_width = 2048,
                                         .vocab = 129280,
                                         .elements = 1 << 28};
static const wn_bench_sizes cpu_sizes = {.seq = 256,
                                         .hidden = 256,
                                         .heads = 4,
                                         .nope = 32,
                                         .rope = 16,
                                         .v = 32,
                                         .latent = 64,
                                         .q_latent = 96,
                                         .index_heads = 4,
                                         .index_width = 32,
                                         .topk = 64,
                                         .sampled = 16,
                                         .experts = 8,
                                         .experts_a_token = 2,
                                         .expert_width = 64,
                                         .vocab = 1024,
                                         .elements = 1 << 20};
enum { N_SIZES = sizeof(wn_bench_sizes) / sizeof(int64_t) };

/* What was not given is the device's default. */
static wn_status complete(wn_bench_sizes *s, bool gpu) {
  const wn_bench_sizes *defaults = gpu ? &gpu_sizes : &cpu_sizes;
  int64_t given[N_SIZES], filled[N_SIZES];
  memcpy(given, s, sizeof given);
  memcpy(filled, defaults, sizeof filled);
  for (int i = 0; i < N_SIZES; i++)
    if (given[i]) filled[i] = given[i];
  memcpy(s, filled, sizeof filled);
  if (!s->rows) s->rows = s->seq;
  if (!s->document) s->document = s->seq;
  if (s->topk > s->seq) s->topk = s->seq;
  if (s->rows > s->seq)
    return WN_FAIL(WN_E_USAGE, "--rows is %lld, but --seq only %lld", (long long)s->rows, (long long)s->seq);
  if (s->experts_a_token > s->experts)
    return WN_FAIL(WN_E_USAGE, "--experts is %lld, but a token takes %lld", (long long)s->experts,
                   (long long)s->experts_a_token);
  return NULL;
}

/* ---- one operation ---- */

static bool present(const wn_bench *b, const wn_bench_case *c) {
  void (*entry)(void);
  memcpy(&entry, (const char *)b->ops + c->entry, sizeof entry);
  return entry != NULL;
}

/* Every row ascends, holds distinct keys that the row sees, as many as there are up to k, and -1 after them. */
static wn_status check_picks(wn_bench *b, const wn_tensor *t) {
  int64_t n = t->dim[0], k = t->dim[1];
  int32_t *host;
  WN_TRY(wn_bench_host(b, (void **)&host, n * k * 4));
  WN_TRY(b->ops->download(b->device, host, t));
  for (int64_t i = 0; i < n; i++) {
    int64_t first = wn_bench_first(b, i), visible = wn_bench_visible(b, i), expected = visible < k ? visible : k;
    for (int64_t j = 0; j < k; j++) {
      int32_t pick = host[i * k + j], before = j ? host[i * k + j - 1] : (int32_t)first - 1;
      if (j < expected ? pick <= before || pick >= first + visible : pick != -1)
        return WN_FAIL(WN_E_CHECK, "row %lld's pick %lld is %d after %d; the row sees %lld keys from %lld on",
                       (long long)i, (long long)j, pick, before, (long long)visible, (long long)first);
    }
  }
  return NULL;
}

static wn_status check_outputs(wn_bench *b, const wn_bench_case *c) {
  for (int32_t i = 0; i < b->n_out; i++) {
    if (b->kind[i] == WN_BENCH_COUNT) continue;
    if (b->kind[i] == WN_BENCH_PICKS) {
      WN_TRY(check_picks(b, &b->out[i]));
      continue;
    }
    int64_t bad;
    WN_TRY(wn_bench_not_finite(b, &bad, &b->out[i]));
    if (bad != b->not_finite[i])
      return WN_FAIL(WN_E_CHECK, "%lld elements of output %d were not written or are not finite, expected %lld",
                     (long long)bad, i, (long long)b->not_finite[i]);
  }
  return c->check ? c->check(b) : NULL;
}

static wn_status run_case(wn_bench *b, void *context) {
  return ((const wn_bench_case *)context)->run(b);
}

/* "8192x128x192 8192x128x128 documents of 512": the operands, outputs where there are no inputs. */
static void describe(const wn_bench *b, char text[160]) {
  const wn_tensor *t = b->n_in ? b->in : b->out;
  size_t used = 0;
  text[0] = 0;
  for (int32_t i = 0; i < (b->n_in ? b->n_in : b->n_out); i++)
    for (int32_t d = 0; d < t[i].rank && used < 120; d++)
      used += (size_t)snprintf(text + used, 160 - used, "%s%lld", d ? "x" : i ? " " : "", (long long)t[i].dim[d]);
  if (b->pairs > 0 && b->s.document < b->s.seq)
    snprintf(text + used, 160 - used, " documents of %lld", (long long)b->s.document);
}

static wn_status report(wn_bench *b, const wn_bench_case *c, const double *times, int32_t n, bool first,
                        const char *csv) {
  char shape[160];
  describe(b, shape);
  double median = n % 2 ? times[n / 2] : (times[n / 2 - 1] + times[n / 2]) / 2, rate = b->work / median;
  double limit = b->flops ? (b->device->kind == WN_CUDA ? WN_HOPPER_BF16_FLOPS : b->product_rate) : b->copy_rate;
  const wn_bench_cell cells[] = {{"operation", c->name, 0},
                                 {"shape", shape, 0},
                                 {"repeats", NULL, n},
                                 {"median_ms", NULL, median * 1e3},
                                 {"min_ms", NULL, times[0] * 1e3},
                                 {"max_ms", NULL, times[n - 1] * 1e3},
                                 {"work", NULL, b->work},
                                 {"rate", NULL, rate * 1e-12},
                                 {"unit", b->flops ? "TFLOP/s" : "TB/s", 0},
                                 {"limit_pct", NULL, 100 * rate / limit},
                                 {"cublas_tflops", NULL, b->product_rate * 1e-12}};
  return wn_bench_row(cells, (int32_t)(sizeof cells / sizeof *cells), first, csv);
}

static wn_status measure(wn_bench *b, const wn_bench_case *c, bool *first, const char *csv) {
  double *times;
  int32_t n;
  WN_TRY(c->make(b));
  WN_TRY(c->run(b));
  WN_TRY(check_outputs(b, c));
  WN_TRY(wn_bench_time(b, run_case, (void *)(uintptr_t)c, &times, &n));
  wn_status status = report(b, c, times, n, *first, csv);
  *first = false;
  return status;
}

/* The operation, with everything of it gone afterwards. */
static wn_status one(wn_bench *b, const wn_bench_case *c, bool *first, const char *csv) {
  const wn_bench_sizes sizes = b->s;
  size_t stash = wn_arena_mark(b->device->stash), scratch = wn_arena_mark(b->device->scratch),
         host = wn_arena_mark(b->device->host);
  b->n_in = b->n_out = 0;
  b->work = b->pairs = b->picked = 0;
  b->flops = false;
  memset(b->not_finite, 0, sizeof b->not_finite);
  wn_status status = measure(b, c, first, csv);
  wn_arena_release(b->device->stash, stash);
  wn_arena_release(b->device->scratch, scratch);
  wn_arena_release(b->device->host, host);
  b->s = sizes;
  return status ? wn_status_prefix(status, "%s", c->name) : NULL;
}

/* Whether `status` ends the run: not where one of many does not fit or has nothing to begin with, nor where a check
 * does not hold, which is kept for the end. */
static wn_status go_on(wn_status status, wn_status *kept, wn_log *log) {
  wn_code code = wn_status_code(status);
  if (code == WN_E_CHECK) {
    wn_warn(log, "%s", wn_status_text(status));
    WN_KEEP_FIRST(*kept, status);
    return NULL;
  }
  if (code != WN_E_MEMORY) return status;
  wn_warn(log, "%s", wn_status_text(status));
  wn_status_free(status);
  return NULL;
}

/* `name` NULL: all. */
static wn_status operations(wn_bench *b, const char *name, const char *csv, wn_log *log) {
  const wn_bench_case *const tables[] = {wn_bench_dense, wn_bench_attention};
  bool first = true, found = false;
  wn_status kept = NULL, status = NULL;
  for (int t = 0; t < 2; t++)
    for (const wn_bench_case *c = tables[t]; c->name; c++) {
      if (name && strcmp(name, c->name) != 0) continue;
      found = true;
      if (!present(b, c)) {
        wn_warn(log, "%s: the device '%s' has no such operation", c->name, b->ops->name);
        continue;
      }
      status = one(b, c, &first, csv);
      if (!name) status = go_on(status, &kept, log);
      if (status) return wn_status_first(kept, status);
    }
  if (!found) return WN_FAIL_HINT(WN_E_USAGE, "winnow bench --list names them", "there is no operation '%s'", name);
  return kept;
}

static void list(void) {
  const wn_bench_case *const tables[] = {wn_bench_dense, wn_bench_attention};
  for (int t = 0; t < 2; t++)
    for (const wn_bench_case *c = tables[t]; c->name; c++) puts(c->name);
}

/* ---- the command ---- */

typedef struct bench_flags {
  wn_bench_sizes s;
  const char *device, *csv, *picks;
  int64_t threads, repeats, stage;
  double seconds;
  bool list, memory;
} bench_flags;

static wn_status bench(const bench_flags *f, const char *what, wn_world *world, wn_log *log) {
  wn_job_device choice;
  wn_device *device = NULL;
  wn_status status = NULL;
  WN_TRY(wn_flag_device(&choice, f->device));
  WN_TRY(wn_open_device(&device, choice, (int32_t)f->threads, world, log));
  wn_bench b = {.device = device,
                .ops = device->ops,
                .s = f->s,
                .repeats = (int32_t)f->repeats,
                .seconds = f->seconds,
                .recent = strcmp(f->picks, "recent") == 0};
  bool layer = what && strcmp(what, "layer") == 0;
  WN_TRY_GOTO(status, done, complete(&b.s, device->kind == WN_CUDA));
  WN_TRY_GOTO(status, done, wn_bench_noise(&b));
  WN_TRY_GOTO(status, done, wn_bench_limits(&b));
  wn_info(log, "copies here: %.3g TB/s; products: %.4g TFLOP/s", b.copy_rate * 1e-12, b.product_rate * 1e-12);
  if (layer)
    WN_TRY_GOTO(status, done, wn_bench_layer(&b, (int32_t)f->stage, f->csv, f->memory));
  else
    WN_TRY_GOTO(status, done, operations(&b, what, f->csv, log));
done:
  wn_close_device(device);
  return status;
}

#define SIZE(flag, field, text)                                                                                        \
  { (flag), WN_FLAG_INT, &f.s.field, 1, 1 << 30, "N", (text) }

wn_status wn_cmd_bench(int argc, char **argv, wn_world *world, wn_log *log) {
  bench_flags f = {.device = "auto", .picks = "random", .repeats = 15, .stage = 1, .seconds = 3};
  const wn_flag flags[] = {
      {"--list", WN_FLAG_SWITCH, &f.list, 0, 0, NULL, "names of the operations"},
      WN_FLAG_DEVICE(&f.device),
      SIZE("--seq", seq, "keys (default 8192; on a CPU every size is small by default)"),
      SIZE("--rows", rows, "queries, the last of them (default: all)"),
      SIZE("--document", document, "keys of a document, which only its own rows see (default: all)"),
      SIZE("--hidden", hidden, "hidden width (7168)"),
      SIZE("--heads", heads, "attention heads (128)"),
      SIZE("--nope", nope, "key width without rope (128)"),
      SIZE("--rope", rope, "rope width (64)"),
      SIZE("--value", v, "value width (128)"),
      SIZE("--latent", latent, "latent width of keys (512)"),
      SIZE("--q-latent", q_latent, "latent width of queries (1536)"),
      SIZE("--index-heads", index_heads, "indexer heads (64)"),
      SIZE("--index-width", index_width, "indexer head width (128)"),
      SIZE("--topk", topk, "picks a row (2048)"),
      SIZE("--sampled", sampled, "rows of selection_stats (256)"),
      SIZE("--experts", experts, "experts that are there (32)"),
      SIZE("--experts-a-token", experts_a_token, "experts a token (8)"),
      SIZE("--expert-width", expert_width, "intermediate width of an expert (2048)"),
      SIZE("--vocab", vocab, "vocabulary (129280)"),
      SIZE("--elements", elements, "of flat pieces, for adamw and sum_squares (2^28)"),
      {"--picks", WN_FLAG_TEXT, &f.picks, 0, 0, "random|recent", "which keys sparse attention gets (default random)"},
      {"--stage", WN_FLAG_INT, &f.stage, 1, 2, "1|2", "of `bench layer` (default 1)"},
      {"--memory", WN_FLAG_SWITCH, &f.memory, 0, 0, NULL,
       "of `bench layer`: what it needs scratch for, on standard error"},
      {"--repeats", WN_FLAG_INT, &f.repeats, 3, 100000, "N", "timed runs at most (default 15)"},
      {"--seconds", WN_FLAG_REAL, &f.seconds, 0, 1e6, "S", "no more runs after so long, but three (default 3)"},
      WN_FLAG_THREADS(&f.threads, "CPU threads (default: all cores)"),
      {"--csv", WN_FLAG_TEXT, &f.csv, 0, 0, "FILE", "append the rows there too"},
  };
  const wn_command_help help = {
      "winnow bench [OPERATION | layer] [flags]",
      "Times an operation of the device's table (all without a name), or one MoE layer whole: median and spread in\n"
      "milliseconds, TFLOP/s or TB/s and the share of what the device can do, as CSV rows on standard output. "
      "Operands\n"
      "are random, outputs are checked."};
  int32_t n;
  bool helped;
  WN_TRY(wn_flags_parse(argc, argv, flags, (int32_t)(sizeof flags / sizeof *flags), &help, &n, &helped));
  if (helped) return NULL;
  if (f.list) {
    list();
    return NULL;
  }
  if (n > 1) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "bench wants one operation, or none for all");
  if (strcmp(f.picks, "random") != 0 && strcmp(f.picks, "recent") != 0)
    return WN_FAIL(WN_E_USAGE, "--picks is random or recent, not '%s'", f.picks);
  if (wn_world_size(world) != 1) return WN_FAIL(WN_E_USAGE, "bench runs on one rank, not %d", wn_world_size(world));
  return bench(&f, n == 1 ? argv[1] : NULL, world, log);
}
