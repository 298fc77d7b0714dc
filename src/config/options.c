#include "config/options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/real_text.h"

#define MOST_STEPS 1e12
#define AT(field) offsetof(wn_job, field)

static const char *const stages[] = {"pretrain", "warmup", "adapt", NULL};
const char *const wn_job_device_names[] = {[WN_JOB_AUTO] = "auto", [WN_JOB_CPU] = "cpu", [WN_JOB_CUDA] = "cuda", NULL};
static const char *const schedules[] = {"constant", "linear", "cosine", NULL};
static const char *const moments[] = {"f32", "bf16", NULL};
static const char *const keeps[] = {"inputs", "attention", "all", NULL};
static const char *const file_dtypes[] = {"f32", "bf16", NULL};

static const wn_option options[] = {
    {"stage", WN_CHOICE, AT(stage), .fallback = NULL, .choices = stages,
     .help = "the stage this job is for; taken from the command, and refused when it says otherwise"},
    {"init", WN_PATH, AT(init), .fallback = "",
     .help = "where the weights come from: a Hugging Face directory or a checkpoint; its config.json is the model"},
    {"model", WN_PATH, AT(model), .fallback = "",
     .help = "instead of init, for pretrain only: a directory with config.json; random weights from training.seed"},
    {"run_dir", WN_PATH, AT(run_dir), .may_change = true,
     .help = "directory of the run: resolved configuration, metrics, checkpoints; a run found there is resumed"},
    {"device", WN_CHOICE, AT(device), .fallback = "auto", .may_change = true, .choices = wn_job_device_names,
     .help = "what computes; auto takes a GPU where there is one that this build can use"},
    {"threads", WN_INT32, AT(threads), 0, 4096, .fallback = "0", .may_change = true,
     .help = "CPU threads of a rank; 0: as many as the cores it may use; no result depends on it"},

    {"data.train", WN_PATH, AT(data.train), .help = "dataset to train on: the prefix of a .bin and .idx pair"},
    {"data.valid", WN_PATH, AT(data.valid), .fallback = "", .help = "dataset to evaluate on, likewise"},
    {"data.seq_len", WN_INT32, AT(data.seq_len), 2, 1 << 24, .fallback = "4096", .unit = "tokens",
     .help = "length of a training sequence"},
    {"data.document_mask", WN_BOOL, AT(data.document_mask), .fallback = "true",
     .help = "tokens see only their own document, though several are packed into a sequence"},

    {"training.steps", WN_INT64, AT(training.steps), 1, MOST_STEPS, .may_change = true, .unit = "steps",
     .help = "updates of the whole run, those before a resume included"},
    {"training.global_batch_seqs", WN_INT32, AT(training.global_batch_seqs), 1, 1 << 20, .fallback = "16",
     .unit = "sequences", .help = "sequences of an update, over all ranks"},
    {"training.micro_batch_seqs", WN_INT32, AT(training.micro_batch_seqs), 1, 256, .fallback = "1", .unit = "sequences",
     .help = "sequences a rank computes at a time; divides global_batch_seqs"},
    {"training.seed", WN_UINT64, AT(training.seed), 0, 9007199254740992.0, .fallback = "1",
     .help = "of initial weights, data order and samples"},
    {"training.deterministic", WN_BOOL, AT(training.deterministic), .fallback = "true",
     .help = "results repeat bit for bit; false allows faster sums on GPUs (CPU runs always repeat)"},
    {"training.max_skipped_in_a_row", WN_INT32, AT(training.max_skipped_in_a_row), 0, 1 << 20, .fallback = "10",
     .unit = "steps",
     .help = "updates skipped one after another, for gradients that are not finite, before the run gives up"},
    {"training.attention_init_gain", WN_REAL, AT(training.attention_init_gain), 0.01, 100, .fallback = "1.0",
     .help = "factor on the random initial weights of q_a, q_b, kv_a, kv_b and o_proj; small models learn to copy "
             "sooner with 3"},
    {"training.keep", WN_CHOICE, AT(training.keep), .fallback = "attention", .may_change = true, .choices = keeps,
     .help =
         "what a layer's backward takes from its forward, the rest being computed again, to the same bits: its inputs "
         "and choices alone; attention's output too, unrounded, 4 * heads * (v_head_dim + 1) bytes a token and layer "
         "(none in the absorbed form); or all, the fastest and largest"},

    {"optimizer.lr", WN_REAL, AT(optimizer.lr), 0, 10, .help = "peak learning rate of the base"},
    {"optimizer.indexer_lr", WN_REAL, AT(optimizer.indexer_lr), 0, 10, .fallback = "optimizer.lr", .same_as = true,
     .help = "peak learning rate of the indexer"},
    {"optimizer.beta1", WN_REAL, AT(optimizer.beta1), 0, 1, .below_high = true, .fallback = "0.9",
     .help = "AdamW: decay of the first moment"},
    {"optimizer.beta2", WN_REAL, AT(optimizer.beta2), 0, 1, .below_high = true, .fallback = "0.95",
     .help = "AdamW: decay of the second moment"},
    {"optimizer.eps", WN_REAL, AT(optimizer.eps), 0, 1, .above_low = true, .fallback = "1e-08",
     .help = "AdamW: added to the root of the second moment"},
    {"optimizer.weight_decay", WN_REAL, AT(optimizer.weight_decay), 0, 10, .fallback = "0.1",
     .help = "AdamW: decoupled decay of matrices; norms, biases and frozen weights have none"},
    {"optimizer.clip_grad", WN_REAL, AT(optimizer.clip_grad), 0, 1e9, .fallback = "1.0",
     .help = "largest gradient norm, of base and indexer each; 0: gradients are not clipped"},
    {"optimizer.moments", WN_CHOICE, AT(optimizer.moments), .fallback = "f32", .choices = moments,
     .help =
         "number format of AdamW's moments; bf16 halves their memory and files, and wants beta1 and beta2 of at most "
         "0.99"},
    {"optimizer.carry_indexer", WN_BOOL, AT(optimizer.carry_indexer), .fallback = "true",
     .help = "adapt from a warm-up goes on with the indexer's moments and Adam clock"},

    {"lr_schedule.type", WN_CHOICE, AT(lr_schedule.type), .fallback = "constant", .choices = schedules,
     .help = "course of both learning rates after their warm-up"},
    {"lr_schedule.warmup_steps", WN_INT64, AT(lr_schedule.warmup_steps), 0, MOST_STEPS, .fallback = "0",
     .unit = "steps", .help = "linear rise to the peak"},
    {"lr_schedule.decay_steps", WN_INT64, AT(lr_schedule.decay_steps), 0, MOST_STEPS, .fallback = "0", .unit = "steps",
     .help = "length of the linear or cosine decay; 0: to the end of training.steps"},
    {"lr_schedule.min_lr", WN_REAL, AT(lr_schedule.min_lr), 0, 1, .fallback = "0.0",
     .help = "where the decay ends, as a fraction of the peak"},

    {"dsa.index_n_heads", WN_INT32, AT(dsa.index_n_heads), 0, 4096, .fallback = "0",
     .help = "indexer heads, where init has no indexer; 0: not given"},
    {"dsa.index_head_dim", WN_INT32, AT(dsa.index_head_dim), 0, 4096, .fallback = "0",
     .help = "width of an indexer head, where init has no indexer; 0: not given"},
    {"dsa.index_topk", WN_INT32, AT(dsa.index_topk), 0, 1 << 30, .fallback = "0", .unit = "tokens",
     .help = "keys a query selects; 0: as init has it"},
    {"dsa.loss_coeff", WN_REAL, AT(dsa.loss_coeff), 0, 1e6, .above_low = true, .fallback = "1.0",
     .help = "factor of the indexer's KL, summed over layers"},

    {"moe.bias_update_speed", WN_REAL, AT(moe.bias_update_speed), 0, 1, .fallback = "0.001",
     .help = "step of the router's load-balancing bias (gamma); 0: it stays; warmup never moves it"},
    {"moe.balance_loss_coeff", WN_REAL, AT(moe.balance_loss_coeff), 0, 1, .fallback = "0.0001",
     .help = "factor of the sequence-wise balance loss (alpha); warmup has none"},

    {"parallelism.context", WN_INT32, AT(parallelism.context), 1, 1024, .fallback = "1", .may_change = true,
     .unit = "ranks", .help = "ranks that share each sequence"},
    {"parallelism.expert", WN_INT32, AT(parallelism.expert), 1, 1 << 16, .fallback = "1", .may_change = true,
     .unit = "ranks", .help = "ranks that share the experts of a layer"},
    {"parallelism.timeout_s", WN_INT32, AT(parallelism.timeout_s), 1, 1 << 20, .fallback = "600", .may_change = true,
     .unit = "s", .help = "how long a rank waits for the others before the run fails"},
    {"parallelism.most_gathered", WN_INT64, AT(parallelism.most_gathered), 1, 1e15, .fallback = "1073741824",
     .may_change = true, .unit = "weights",
     .help =
         "frozen experts of a layer beyond so many weights are gathered in parts, one ahead; no result depends on it"},

    {"checkpoint.interval", WN_INT64, AT(checkpoint.interval), 0, MOST_STEPS, .fallback = "100", .may_change = true,
     .unit = "steps", .help = "between checkpoints; 0: only at the end"},
    {"checkpoint.keep", WN_INT32, AT(checkpoint.keep), 0, 1 << 20, .fallback = "2", .may_change = true,
     .unit = "checkpoints", .help = "newest ones kept; 0: all"},
    {"checkpoint.dtype", WN_CHOICE, AT(checkpoint.dtype), .fallback = "bf16", .may_change = true,
     .choices = file_dtypes,
     .help = "number format of the trained weights in model files; resuming is exact with either"},

    {"metrics.log_every", WN_INT64, AT(metrics.log_every), 0, MOST_STEPS, .fallback = "1", .may_change = true,
     .unit = "steps",
     .help = "between rows of train.csv and speed.csv (the last step has one always); 0: only the last"},
    {"metrics.layers_every", WN_INT64, AT(metrics.layers_every), 0, MOST_STEPS, .fallback = "10", .may_change = true,
     .unit = "steps", .help = "between measurements of layers.csv; 0: never"},
    {"metrics.sample_rows", WN_INT32, AT(metrics.sample_rows), 1, 1 << 20, .fallback = "256", .may_change = true,
     .unit = "rows", .help = "rows of a sequence that layers.csv measures exactly"},
    {"metrics.eval_every", WN_INT64, AT(metrics.eval_every), 0, MOST_STEPS, .fallback = "0", .may_change = true,
     .unit = "steps", .help = "between evaluations on data.valid; 0: never"},
    {"metrics.eval_seqs", WN_INT32, AT(metrics.eval_seqs), 1, 1 << 20, .fallback = "16", .may_change = true,
     .unit = "sequences", .help = "sequences of an evaluation"},
};

int32_t wn_option_count(void) {
  return (int32_t)(sizeof options / sizeof *options);
}

const wn_option *wn_option_at(int32_t i) {
  WN_ASSERT(i >= 0 && i < wn_option_count(), "option %d", (int)i);
  return &options[i];
}

int32_t wn_option_index(const char *key) {
  for (int32_t i = 0; i < wn_option_count(); i++)
    if (!strcmp(options[i].key, key)) return i;
  return -1;
}

enum { MOST_KEY_BYTES = 64 };

/* Levenshtein's distance; keys longer than any known one are compared by their beginning. */
static int edit_distance(const char *a, const char *b) {
  int row[MOST_KEY_BYTES + 1], n = (int)strnlen(b, MOST_KEY_BYTES), m = (int)strnlen(a, MOST_KEY_BYTES);
  for (int j = 0; j <= n; j++) row[j] = j;
  for (int i = 1; i <= m; i++) {
    int diagonal = row[0];
    row[0] = i;
    for (int j = 1; j <= n; j++) {
      int best = diagonal + (a[i - 1] != b[j - 1]);
      if (row[j] + 1 < best) best = row[j] + 1;
      if (row[j - 1] + 1 < best) best = row[j - 1] + 1;
      diagonal = row[j];
      row[j] = best;
    }
  }
  return row[n];
}

static const char *last_part(const char *key) {
  const char *dot = strrchr(key, '.');
  return dot ? dot + 1 : key;
}

const char *wn_option_nearest(const char *key) {
  const char *best = NULL;
  int least = 0;
  for (int32_t i = 0; i < wn_option_count(); i++) {
    int whole = edit_distance(key, options[i].key);
    int part = edit_distance(last_part(key), last_part(options[i].key)) + 1; /* the right name in the wrong section */
    int distance = whole < part ? whole : part;
    if (best && distance >= least) continue;
    best = options[i].key;
    least = distance;
  }
  return best;
}

static void *field(const wn_option *option, wn_job *job) {
  return (char *)job + option->offset;
}

static wn_status refuse(const wn_option *option, const char *text) {
  char allowed[WN_PATH_BYTES];
  wn_option_allowed(option, allowed);
  return WN_FAIL(WN_E_CONFIG, "%s is '%.100s'; allowed: %s", option->key, text, allowed);
}

static bool in_range(const wn_option *option, double value) {
  return (option->above_low ? value > option->low : value >= option->low) &&
         (option->below_high ? value < option->high : value <= option->high);
}

static bool parse_whole(const wn_option *option, const char *text, int64_t *out) {
  char *end;
  const char *digits = text[0] == '-' ? text + 1 : text;
  if (digits[0] < '0' || digits[0] > '9') return false;
  errno = 0;
  long long value = strtoll(text, &end, 10);
  *out = value;
  return *end == 0 && errno == 0 && in_range(option, (double)value);
}

static bool parse_real(const wn_option *option, const char *text, double *out) {
  char *end;
  if (text[0] == 0 || strspn(text, "0123456789+-.eE") != strlen(text))
    return false; /* no inf, nan, hexadecimals or blanks */
  *out = strtod(text, &end);
  return *end == 0 && in_range(option, *out);
}

wn_status wn_option_parse(const wn_option *option, const char *text, wn_job *job) {
  void *out = field(option, job);
  int64_t whole = 0;
  switch (option->type) {
  case WN_PATH:
    if (strlen(text) >= WN_PATH_BYTES)
      return WN_FAIL(WN_E_CONFIG, "%s is longer than %d bytes", option->key, WN_PATH_BYTES - 1);
    memset(out, 0, WN_PATH_BYTES);
    memcpy(out, text, strlen(text));
    return NULL;
  case WN_INT32:
    if (!parse_whole(option, text, &whole)) return refuse(option, text);
    *(int32_t *)out = (int32_t)whole;
    return NULL;
  case WN_INT64: return parse_whole(option, text, out) ? NULL : refuse(option, text);
  case WN_UINT64:
    if (!parse_whole(option, text, &whole)) return refuse(option, text);
    *(uint64_t *)out = (uint64_t)whole;
    return NULL;
  case WN_REAL: return parse_real(option, text, out) ? NULL : refuse(option, text);
  case WN_BOOL:
    if (strcmp(text, "true") != 0 && strcmp(text, "false") != 0) return refuse(option, text);
    *(bool *)out = text[0] == 't';
    return NULL;
  case WN_CHOICE:
    for (uint32_t i = 0; option->choices[i]; i++) {
      if (strcmp(option->choices[i], text) != 0) continue;
      memcpy(out, &i, sizeof i);
      return NULL;
    }
    return refuse(option, text);
  }
  return refuse(option, text);
}

void wn_option_value(const wn_option *option, const wn_job *job, char out[WN_PATH_BYTES]) {
  const void *in = (const char *)job + option->offset;
  uint32_t choice;
  switch (option->type) {
  case WN_PATH: snprintf(out, WN_PATH_BYTES, "%s", (const char *)in); return;
  case WN_INT32: snprintf(out, WN_PATH_BYTES, "%d", (int)*(const int32_t *)in); return;
  case WN_INT64: snprintf(out, WN_PATH_BYTES, "%lld", (long long)*(const int64_t *)in); return;
  case WN_UINT64: snprintf(out, WN_PATH_BYTES, "%llu", (unsigned long long)*(const uint64_t *)in); return;
  case WN_REAL: wn_real_text(out, *(const double *)in); return;
  case WN_BOOL: snprintf(out, WN_PATH_BYTES, "%s", *(const bool *)in ? "true" : "false"); return;
  case WN_CHOICE:
    memcpy(&choice, in, sizeof choice);
    snprintf(out, WN_PATH_BYTES, "%s", option->choices[choice]);
    return;
  }
}

void wn_option_allowed(const wn_option *option, char out[WN_PATH_BYTES]) {
  size_t used = 0;
  char low[WN_REAL_TEXT_BYTES], high[WN_REAL_TEXT_BYTES];
  switch (option->type) {
  case WN_PATH: snprintf(out, WN_PATH_BYTES, "path"); return;
  case WN_BOOL: snprintf(out, WN_PATH_BYTES, "true or false"); return;
  case WN_INT32:
  case WN_INT64:
  case WN_UINT64:
    snprintf(out, WN_PATH_BYTES, "whole number, %lld to %lld", (long long)option->low, (long long)option->high);
    return;
  case WN_REAL:
    snprintf(low, sizeof low, "%.9g", option->low);
    snprintf(high, sizeof high, "%.9g", option->high);
    snprintf(out, WN_PATH_BYTES, "number, %s%s %s %s", option->above_low ? "above " : "from ", low,
             option->below_high ? "below" : "up to", high);
    return;
  case WN_CHOICE:
    out[0] = 0;
    for (int i = 0; option->choices[i]; i++)
      used += (size_t)snprintf(out + used, WN_PATH_BYTES - used, "%s%s",
                               i == 0                   ? ""
                               : option->choices[i + 1] ? ", "
                                                        : " or ",
                               option->choices[i]);
    return;
  }
}
