#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/flags.h"
#include "train/inference.h"

enum { MOST_TOKENS = 4096 };

typedef struct int_list {
  int32_t values[MOST_TOKENS];
  int32_t n;
} int_list;

static int word_bytes(const char *text) {
  size_t bytes = strcspn(text, ", \t\r\n");
  return bytes < 16 ? (int)bytes : 16;
}

/* Numbers separated by commas or white space. */
static wn_status parse_ints(int_list *out, const char *text, const char *what) {
  out->n = 0;
  for (const char *at = text;;) {
    while (*at == ',' || isspace((unsigned char)*at)) at++;
    if (!*at) break;
    char *end;
    long value = strtol(at, &end, 10);
    if (end == at || value < 0 || value > INT32_MAX || (*end && *end != ',' && !isspace((unsigned char)*end)))
      return WN_FAIL(WN_E_USAGE, "%s: number %d is not one: '%.*s'", what, out->n + 1, word_bytes(at), at);
    if (out->n == MOST_TOKENS)
      return WN_FAIL(WN_E_USAGE, "%s: more than %d numbers; a dump holds T x T tensors", what, MOST_TOKENS);
    out->values[out->n++] = (int32_t)value;
    at = end;
  }
  if (out->n == 0) return WN_FAIL(WN_E_USAGE, "%s: no numbers", what);
  return NULL;
}

/* The flag's text is the list itself, or the name of a file that holds it. */
static wn_status read_tokens(int_list *out, const char *text) {
  if (text[strspn(text, "0123456789, ")] == '\0') return parse_ints(out, text, "--tokens");
  char *content;
  size_t bytes;
  WN_TRY(wn_read_stream(&content, &bytes, text, (size_t)MOST_TOKENS * 32));
  wn_status status = parse_ints(out, content, text);
  free(content);
  return status;
}

static wn_status check_documents(const int_list *documents, int32_t n_tokens) {
  if (documents->values[0] != 0)
    return WN_FAIL(WN_E_USAGE, "--documents begins with %d, but the first document's first row is 0",
                   documents->values[0]);
  for (int32_t i = 0; i < documents->n; i++)
    if (documents->values[i] >= n_tokens || (i > 0 && documents->values[i] <= documents->values[i - 1]))
      return WN_FAIL(WN_E_USAGE, "--documents: %d is out of order or not below the number of tokens, %d",
                     documents->values[i], n_tokens);
  return NULL;
}

static wn_status run(const char *dir, const wn_forward_settings *settings, const char *out, wn_job_device device,
                     int32_t threads, wn_world *world, wn_log *log) {
  wn_inference in = {0};
  wn_status status = NULL;
  WN_TRY(wn_inference_open(&in, dir, device, threads, settings->base_grads || settings->indexer_grads, world, log));
  const wn_model_config *config = &in.model->config;
  for (int32_t i = 0; i < settings->n && !status; i++)
    if (settings->tokens[i] >= config->vocab_size)
      status = WN_FAIL(WN_E_INPUT, "token %d is %d, but the model's vocabulary has %d", i, settings->tokens[i],
                       config->vocab_size);
  if (!status && (settings->sparse || settings->indexer_grads) && !config->has_indexer)
    status = WN_FAIL(WN_E_CONFIG, "the model in %s has no indexer", dir);
  if (!status) status = wn_forward_dump(&in, settings, out);
  wn_inference_close(&in);
  return status;
}

wn_status wn_cmd_forward(int argc, char **argv, wn_world *world, wn_log *log) {
  const char *tokens = NULL, *out = NULL, *attention = "dense", *grads = NULL, *documents = "0", *device_name = "auto";
  int64_t threads = 0;
  const wn_flag flags[] = {
      {.name = "--tokens",
       .kind = WN_FLAG_TEXT,
       .value = &tokens,
       .argument = "IDS|FILE",
       .help = "token ids separated by commas or white space, or a file of them"},
      {.name = "--dump",
       .kind = WN_FLAG_TEXT,
       .value = &out,
       .argument = "OUT.safetensors",
       .help = "where the tensors go"},
      {.name = "--attention",
       .kind = WN_FLAG_TEXT,
       .value = &attention,
       .argument = "dense|sparse",
       .help = "sparse: each row attends to its indexer's top-k keys"},
      {.name = "--grads",
       .kind = WN_FLAG_TEXT,
       .value = &grads,
       .argument = "base|indexer",
       .help = "also gradients: of the mean token loss, or of the summed KL"},
      {.name = "--documents",
       .kind = WN_FLAG_TEXT,
       .value = &documents,
       .argument = "ROWS",
       .help = "first row of each packed document (default 0)"},
      WN_FLAG_DEVICE(&device_name),
      WN_FLAG_THREADS(&threads, "CPU threads (default: all cores)"),
  };
  const wn_command_help help = {"winnow forward MODEL_DIR --tokens IDS|FILE --dump OUT.safetensors [flags]",
                                "Runs one sequence and writes hidden states, attention outputs, index scores, "
                                "selections, KL, logits and gradients in FP32."};
  int32_t n;
  bool helped;
  WN_TRY(wn_flags_parse(argc, argv, flags, (int32_t)(sizeof flags / sizeof *flags), &help, &n, &helped));
  if (helped) return NULL;
  if (n != 1 || !tokens || !out)
    return WN_FAIL_HINT(WN_E_USAGE, help.usage, "forward wants one model directory, --tokens and --dump");
  if (wn_world_size(world) != 1) return WN_FAIL(WN_E_USAGE, "forward runs on one rank, not %d", wn_world_size(world));
  bool sparse = strcmp(attention, "sparse") == 0;
  if (!sparse && strcmp(attention, "dense") != 0)
    return WN_FAIL(WN_E_USAGE, "--attention is dense or sparse, not '%s'", attention);
  bool base = grads && strcmp(grads, "base") == 0, indexer = grads && strcmp(grads, "indexer") == 0;
  if (grads && !base && !indexer) return WN_FAIL(WN_E_USAGE, "--grads is base or indexer, not '%s'", grads);
  wn_job_device device;
  WN_TRY(wn_flag_device(&device, device_name));
  int_list *ids = malloc(2 * sizeof *ids);
  if (!ids) return WN_FAIL(WN_E_MEMORY, "out of memory for the tokens");
  wn_status status = read_tokens(&ids[0], tokens);
  if (!status) status = parse_ints(&ids[1], documents, "--documents");
  if (!status) status = check_documents(&ids[1], ids[0].n);
  if (!status) {
    wn_forward_settings settings = {ids[0].values, ids[0].n, ids[1].values, ids[1].n, sparse, base, indexer};
    status = run(argv[1], &settings, out, device, (int32_t)threads, world, log);
  }
  free(ids);
  return status;
}
