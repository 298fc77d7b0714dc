/* winnow data: text to tokens and back, and a look into datasets. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cli/commands.h"
#include "cli/flags.h"
#include "data/pack.h"
#include "io/files.h"

#define N_FLAGS(flags) ((int32_t)(sizeof(flags) / sizeof *(flags)))

static wn_status open_tokenizer(wn_tokenizer **out, const char *path) {
  return path ? wn_tokenizer_load(out, path) : wn_tokenizer_bytes(out);
}

static wn_status read_error(const char *path) {
  return WN_FAIL(WN_E_IO, "cannot read %s: %s", path, strerror(errno));
}

static wn_status finish_output(void) {
  if (fflush(stdout) != 0 || ferror(stdout))
    return WN_FAIL(WN_E_IO, "cannot write to standard output: %s", strerror(errno));
  return NULL;
}

/* ---- lists of files */

typedef struct file_list {
  char *text;         /* of --files-from */
  const char **files; /* into text and argv */
  int32_t n;
} file_list;

/* The files of the command line, then those of `list`, one a line. */
static wn_status gather_files(file_list *out, char **argv, int32_t n, const char *list) {
  size_t bytes = 0, lines = 0;
  *out = (file_list){0};
  if (list) WN_TRY(wn_read_stream(&out->text, &bytes, list, (size_t)1 << 30));
  for (size_t i = 0; i < bytes; i++) lines += out->text[i] == '\n';
  out->files = malloc(((size_t)n + lines + 1) * sizeof *out->files);
  if (!out->files) return WN_FAIL(WN_E_MEMORY, "out of memory for %zu file names", (size_t)n + lines);
  for (int32_t i = 0; i < n; i++) out->files[out->n++] = argv[i];
  char *rest = out->text;
  for (char *line; rest && (line = strsep(&rest, "\n"));)
    if (*line) out->files[out->n++] = line;
  if (out->n == 0) return WN_FAIL(WN_E_USAGE, "no text files were given");
  return NULL;
}

static void free_files(file_list *list) {
  free(list->text);
  free(list->files);
}

/* ---- pack, train-tokenizer */

static wn_status cmd_pack(int argc, char **argv, wn_log *log) {
  const char *out = NULL, *tokenizer_path = NULL, *separator = NULL, *list = NULL;
  double share = 0;
  int64_t document = 512, passage[2] = {24, 64}, distance[2] = {0, 0}, skip = 4, seed = 1;
  const double most = INT32_MAX;
  const wn_flag flags[] = {
      {"--out", WN_FLAG_TEXT, &out, 0, 0, "PREFIX", "writes PREFIX.bin, PREFIX.idx (and PREFIX.scored with --copies)"},
      {"--tokenizer", WN_FLAG_TEXT, &tokenizer_path, 0, 0, "FILE", "tokenizer.json; without it a token is a byte"},
      {"--separator", WN_FLAG_TEXT, &separator, 0, 0, "LINE", "a line equal to it ends a document; else a file is one"},
      {"--files-from", WN_FLAG_TEXT, &list, 0, 0, "LIST", "further files to pack, one a line"},
      {"--copies", WN_FLAG_REAL, &share, 0, 1, "SHARE",
       "share of tokens in copy documents (default 0); 1: nothing else"},
      {"--copy-tokens", WN_FLAG_INT, &document, 4, most, "N", "length of a copy document (default 512)"},
      {"--copy-passage", WN_FLAG_RANGE, passage, 1, most, "MIN:MAX",
       "tokens of the passage that is repeated (default 24:64)"},
      {"--copy-distance", WN_FLAG_RANGE, distance, 0, most, "MIN:MAX",
       "from the first copy's start to the second's (default: any)"},
      {"--copy-skip", WN_FLAG_INT, &skip, 0, most, "N", "tokens of the second copy left unmarked (default 4)"},
      {"--seed", WN_FLAG_INT, &seed, 0, 0, "N", "of the copy documents (default 1)"}};
  const wn_command_help help = {"winnow data pack --out PREFIX [FLAGS] FILE...",
                                "Packs text files into an indexed dataset."};
  int32_t n = 0;
  bool helped;
  WN_TRY(wn_flags_parse(argc, argv, flags, N_FLAGS(flags), &help, &n, &helped));
  if (helped) return NULL;
  if (!out) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "--out is missing");
  file_list files;
  wn_tokenizer *tokenizer = NULL;
  wn_pack_result packed;
  wn_status status = NULL;
  WN_TRY_GOTO(status, done, gather_files(&files, argv + 1, n, list));
  WN_TRY_GOTO(status, done, open_tokenizer(&tokenizer, tokenizer_path));
  WN_TRY_GOTO(status, done,
              wn_pack(&packed, tokenizer,
                      &(wn_pack_settings){.prefix = out,
                                          .files = files.files,
                                          .n_files = files.n,
                                          .document_separator = separator,
                                          .copy_share = share,
                                          .copy_document_tokens = (int32_t)document,
                                          .copy_min_passage = (int32_t)passage[0],
                                          .copy_max_passage = (int32_t)passage[1],
                                          .copy_skip = (int32_t)skip,
                                          .copy_min_distance = (int32_t)distance[0],
                                          .copy_max_distance = (int32_t)distance[1],
                                          .seed = (uint64_t)seed},
                      log));
  wn_info(log, "%s: %" PRId64 " documents, %" PRId64 " tokens from %" PRId64 " bytes of text", out, packed.documents,
          packed.tokens, packed.bytes);
  if (packed.copy_documents)
    wn_info(log, "%s: %" PRId64 " copy documents of %" PRId64 " tokens, %" PRId64 " tokens marked", out,
            packed.copy_documents, document, packed.scored_tokens);
done:
  wn_tokenizer_free(tokenizer);
  free_files(&files);
  return status;
}

static wn_status cmd_train_tokenizer(int argc, char **argv, wn_log *log) {
  const char *out = NULL, *list = NULL;
  int64_t vocab = 0;
  const wn_flag flags[] = {
      {"--vocab", WN_FLAG_INT, &vocab, 257, 1000000, "N", "entries: 256 bytes, N - 257 merges, end of document"},
      {"--out", WN_FLAG_TEXT, &out, 0, 0, "FILE", "tokenizer.json to write"},
      {"--files-from", WN_FLAG_TEXT, &list, 0, 0, "LIST", "further files to train on, one a line"}};
  const wn_command_help help = {"winnow data train-tokenizer --vocab N --out tokenizer.json FILE...",
                                "Learns byte-pair merges from text; Hugging Face's tokenizers read the result."};
  int32_t n = 0;
  bool helped;
  WN_TRY(wn_flags_parse(argc, argv, flags, N_FLAGS(flags), &help, &n, &helped));
  if (helped) return NULL;
  if (!out || !vocab) return WN_FAIL_HINT(WN_E_USAGE, help.usage, "%s is missing", out ? "--vocab" : "--out");
  file_list files;
  wn_status status = gather_files(&files, argv + 1, n, list);
  if (!status) status = wn_tokenizer_train(files.files, files.n, (int32_t)vocab, out, log);
  if (!status) wn_info(log, "%s: a vocabulary of %" PRId64 " from %d files", out, vocab, files.n);
  free_files(&files);
  return status;
}

/* ---- verify, inspect */

static wn_status one_operand(int32_t n, const wn_command_help *help, const char *what) {
  if (n == 1) return NULL;
  return WN_FAIL_HINT(WN_E_USAGE, help->usage, "%d %ss given, one is wanted", n, what);
}

static wn_status cmd_verify(int argc, char **argv, wn_log *log) {
  int64_t vocab = INT32_MAX;
  const wn_flag flags[] = {
      {"--vocab", WN_FLAG_INT, &vocab, 1, INT32_MAX, "N", "every token must be below it (default 2147483647)"}};
  const wn_command_help help = {"winnow data verify PREFIX [--vocab N]",
                                "Checks a dataset: index, every token, every mark."};
  int32_t n = 0;
  bool helped;
  WN_TRY(wn_flags_parse(argc, argv, flags, N_FLAGS(flags), &help, &n, &helped));
  if (helped) return NULL;
  WN_TRY(one_operand(n, &help, "dataset"));
  wn_dataset *dataset = NULL;
  wn_status status = wn_dataset_open(&dataset, argv[1]);
  if (!status) status = wn_dataset_check_vocab(dataset, (int32_t)vocab);
  if (!status)
    wn_info(log, "%s: well formed, %" PRId64 " documents, %" PRId64 " tokens", argv[1], wn_dataset_documents(dataset),
            wn_dataset_tokens(dataset));
  wn_dataset_close(dataset);
  return wn_check_answer(status);
}

static void print_summary(const wn_dataset *d) {
  int64_t documents = wn_dataset_documents(d), shortest = INT64_MAX, longest = 0, marked = 0;
  int32_t tokens[4096], greatest = 0;
  uint8_t scored[4096];
  for (int64_t i = 0; i < documents; i++) {
    int64_t length = wn_dataset_document_start(d, i + 1) - wn_dataset_document_start(d, i);
    if (length < shortest) shortest = length;
    if (length > longest) longest = length;
  }
  for (int64_t at = 0, n; at < wn_dataset_tokens(d); at += n) {
    n = wn_dataset_tokens(d) - at < 4096 ? wn_dataset_tokens(d) - at : 4096;
    wn_dataset_copy(d, at, n, tokens, scored);
    for (int64_t i = 0; i < n; i++) {
      if (tokens[i] > greatest) greatest = tokens[i];
      marked += scored[i];
    }
  }
  printf("dataset    %s\ndtype      %s\ndocuments  %" PRId64 "\ntokens     %" PRId64 "\n", wn_dataset_prefix(d),
         wn_dataset_dtype(d), documents, wn_dataset_tokens(d));
  printf("lengths    %" PRId64 " to %" PRId64 " tokens\ngreatest   id %d\n", shortest, longest, greatest);
  if (wn_dataset_has_scored(d)) printf("marked     %" PRId64 " tokens\n", marked);
}

/* Ids, a marked one as [id]; or text, where there is a tokenizer. */
static wn_status print_document(const wn_dataset *d, int64_t document, const wn_tokenizer *tokenizer) {
  int64_t end = wn_dataset_document_start(d, document + 1);
  for (int64_t at = wn_dataset_document_start(d, document); at < end; at++) {
    int32_t id;
    uint8_t scored;
    wn_dataset_copy(d, at, 1, &id, &scored);
    if (!tokenizer) {
      printf(scored ? "[%d]%c" : "%d%c", id, at + 1 < end ? ' ' : '\n');
      continue;
    }
    if (id < 0 || id >= wn_tokenizer_vocab_size(tokenizer))
      return WN_FAIL(WN_E_INPUT, "document %" PRId64 " has id %d, the tokenizer has %d", document, id,
                     wn_tokenizer_vocab_size(tokenizer));
    size_t bytes;
    const char *text = wn_tokenizer_bytes_of(tokenizer, id, &bytes);
    fwrite(text, 1, bytes, stdout);
  }
  return NULL;
}

static wn_status cmd_inspect(int argc, char **argv) {
  const char *tokenizer_path = NULL;
  int64_t document = -1;
  const wn_flag flags[] = {{"--document", WN_FLAG_INT, &document, 0, 0x1p62, "N",
                            "prints the ids of document N (from 0), marked ones in brackets"},
                           {"--tokenizer", WN_FLAG_TEXT, &tokenizer_path, 0, 0, "FILE",
                            "with --document: prints text instead (FILE: tokenizer.json, or bytes)"}};
  const wn_command_help help = {"winnow data inspect PREFIX [--document N [--tokenizer FILE]]",
                                "Says what a dataset holds."};
  int32_t n = 0;
  bool helped;
  WN_TRY(wn_flags_parse(argc, argv, flags, N_FLAGS(flags), &help, &n, &helped));
  if (helped) return NULL;
  WN_TRY(one_operand(n, &help, "dataset"));
  wn_dataset *dataset = NULL;
  wn_tokenizer *tokenizer = NULL;
  wn_status status = NULL;
  WN_TRY_GOTO(status, done, wn_dataset_open(&dataset, argv[1]));
  if (document < 0)
    print_summary(dataset);
  else if (document >= wn_dataset_documents(dataset)) {
    status = WN_FAIL(WN_E_USAGE, "%s has %" PRId64 " documents, numbered from 0; there is no %" PRId64, argv[1],
                     wn_dataset_documents(dataset), document);
  } else {
    bool bytes = tokenizer_path && strcmp(tokenizer_path, "bytes") == 0;
    if (tokenizer_path) WN_TRY_GOTO(status, done, open_tokenizer(&tokenizer, bytes ? NULL : tokenizer_path));
    status = print_document(dataset, document, tokenizer);
  }
  WN_KEEP_FIRST(status, finish_output());
done:
  wn_tokenizer_free(tokenizer);
  wn_dataset_close(dataset);
  return status;
}

/* ---- tokenize, detokenize */

/* A file in pieces, or standard input: none given, or "-". */
static wn_status open_input(FILE **out, const char **name, char **argv, int32_t n, const wn_command_help *help) {
  if (n > 1) return one_operand(n, help, "file");
  bool standard = n == 0 || strcmp(argv[1], "-") == 0;
  *name = standard ? "standard input" : argv[1];
  *out = standard ? stdin : fopen(argv[1], "rb");
  return *out ? NULL : WN_FAIL(WN_E_IO, "cannot open %s: %s", *name, strerror(errno));
}

static void close_input(FILE *file) {
  if (file && file != stdin) fclose(file);
}

static wn_status cmd_tokenize(int argc, char **argv) {
  enum { MOST_BYTES = 1 << 30 };
  const char *tokenizer_path = NULL, *name;
  const wn_flag flags[] = {
      {"--tokenizer", WN_FLAG_TEXT, &tokenizer_path, 0, 0, "FILE", "tokenizer.json; without it a token is a byte"}};
  const wn_command_help help = {"winnow data tokenize [--tokenizer FILE] [TEXT_FILE]",
                                "Prints the ids of a text, or of standard input."};
  int32_t count = 0, *ids = NULL;
  bool helped;
  WN_TRY(wn_flags_parse(argc, argv, flags, N_FLAGS(flags), &help, &count, &helped));
  if (helped) return NULL;
  wn_tokenizer *tokenizer = NULL;
  FILE *in = NULL;
  char *text = NULL;
  size_t n = 0, room = 0, bytes = 0, got;
  wn_status status = NULL;
  WN_TRY_GOTO(status, done, open_tokenizer(&tokenizer, tokenizer_path));
  WN_TRY_GOTO(status, done, open_input(&in, &name, argv, count, &help));
  for (size_t size = 1 << 16;; size *= 2) {
    char *more = size <= MOST_BYTES ? realloc(text, size) : NULL;
    if (!more) {
      status = WN_FAIL_HINT(WN_E_MEMORY, "`winnow data pack` takes text of any length",
                            "%s is too long to tokenize at once", name);
      goto done;
    }
    text = more;
    while (bytes < size && (got = fread(text + bytes, 1, size - bytes, in)) > 0) bytes += got;
    if (bytes < size) break;
  }
  if (ferror(in)) WN_TRY_GOTO(status, done, read_error(name));
  WN_TRY_GOTO(status, done, wn_tokenizer_encode(tokenizer, text, bytes, &ids, &n, &room));
  for (size_t i = 0; i < n; i++) printf("%d%c", ids[i], i + 1 < n ? ' ' : '\n');
  status = finish_output();
done:
  close_input(in);
  wn_tokenizer_free(tokenizer);
  free(text);
  free(ids);
  return status;
}

static wn_status cmd_detokenize(int argc, char **argv) {
  const char *tokenizer_path = NULL, *name;
  const wn_flag flags[] = {
      {"--tokenizer", WN_FLAG_TEXT, &tokenizer_path, 0, 0, "FILE", "tokenizer.json; without it a token is a byte"}};
  const wn_command_help help = {
      "winnow data detokenize [--tokenizer FILE] [ID_FILE]",
      "Prints the text of ids (apart by white space or commas) from a file or standard input."};
  int32_t count = 0;
  bool helped;
  WN_TRY(wn_flags_parse(argc, argv, flags, N_FLAGS(flags), &help, &count, &helped));
  if (helped) return NULL;
  wn_tokenizer *tokenizer = NULL;
  FILE *in = NULL;
  char word[24];
  wn_status status = NULL;
  WN_TRY_GOTO(status, done, open_tokenizer(&tokenizer, tokenizer_path));
  WN_TRY_GOTO(status, done, open_input(&in, &name, argv, count, &help));
  while (fscanf(in, " %23[^, \t\r\n]%*[, \t\r\n]", word) == 1) {
    char *end;
    long id = strtol(word, &end, 10);
    if (end == word || *end || id < 0 || id >= wn_tokenizer_vocab_size(tokenizer)) {
      status =
          WN_FAIL(WN_E_INPUT, "%s: \"%s\" is no id from 0 to %d", name, word, wn_tokenizer_vocab_size(tokenizer) - 1);
      goto done;
    }
    size_t bytes;
    const char *text = wn_tokenizer_bytes_of(tokenizer, (int32_t)id, &bytes);
    fwrite(text, 1, bytes, stdout);
  }
  if (ferror(in)) WN_TRY_GOTO(status, done, read_error(name));
  if (!feof(in)) status = WN_FAIL(WN_E_INPUT, "%s: ids must be apart by commas or white space", name);
  WN_KEEP_FIRST(status, finish_output());
done:
  close_input(in);
  wn_tokenizer_free(tokenizer);
  return status;
}

static const char usage[] = "usage: winnow data COMMAND ...\n"
                            "\n"
                            "  pack             text files into an indexed dataset\n"
                            "  train-tokenizer  byte-pair merges from text files into a tokenizer.json\n"
                            "  verify           checks a dataset: index, every token, every mark\n"
                            "  inspect          says what a dataset holds; prints a document\n"
                            "  tokenize         text to ids\n"
                            "  detokenize       ids to text\n"
                            "\n"
                            "Every command answers --help.\n";

wn_status wn_cmd_data(int argc, char **argv, wn_log *log) {
  const char *name = argc > 1 ? argv[1] : "";
  argc--;
  argv++;
  if (strcmp(name, "pack") == 0) return cmd_pack(argc, argv, log);
  if (strcmp(name, "train-tokenizer") == 0) return cmd_train_tokenizer(argc, argv, log);
  if (strcmp(name, "verify") == 0) return cmd_verify(argc, argv, log);
  if (strcmp(name, "inspect") == 0) return cmd_inspect(argc, argv);
  if (strcmp(name, "tokenize") == 0) return cmd_tokenize(argc, argv);
  if (strcmp(name, "detokenize") == 0) return cmd_detokenize(argc, argv);
  if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
    fputs(usage, stdout);
    return NULL;
  }
  if (!*name)
    return WN_FAIL_HINT(WN_E_USAGE, "run `winnow data --help` for the commands", "winnow data wants a command");
  return WN_FAIL_HINT(WN_E_USAGE, "run `winnow data --help` for the commands", "unknown command 'data %s'", name);
}
