/* tokenizer.json of Hugging Face's `tokenizers`: only the byte-level BPE that split.h and bpe.h implement is read. */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "data/tokenizer_parts.h"
#include "io/files.h"
#include "io/json.h"

enum { MOST_JSON_BYTES = 1 << 28, MOST_IDS = 1 << 24, FIRST_STAND_IN = 256 };

/* ---- the alphabet */

static int stands_for_itself(int byte) {
  return (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
}

size_t wn_byte_symbol(uint8_t byte, char out[2]) {
  int code = byte;
  if (!stands_for_itself(byte)) {
    code = FIRST_STAND_IN;
    for (int b = 0; b < byte; b++) code += !stands_for_itself(b);
  }
  if (code < 0x80) return out[0] = (char)code, 1;
  out[0] = (char)(0xC0 | code >> 6);
  out[1] = (char)(0x80 | (code & 0x3F));
  return 2;
}

int32_t wn_byte_of_symbol(const char *text, size_t n, size_t *bytes) {
  unsigned char lead = n ? (unsigned char)text[0] : 0;
  *bytes = lead < 0x80 ? 1 : 2;
  if (n < *bytes || lead == 0) return -1;
  int code = *bytes == 1 ? lead : (lead & 0x1F) << 6 | ((unsigned char)text[1] & 0x3F);
  if (*bytes == 2 && ((lead & 0xE0) != 0xC0 || ((unsigned char)text[1] & 0xC0) != 0x80)) return -1;
  if (code < FIRST_STAND_IN) return stands_for_itself(code) ? code : -1;
  for (int b = 0, at = FIRST_STAND_IN; b < 256; b++)
    if (!stands_for_itself(b) && at++ == code) return b;
  return -1;
}

/* ---- reading */

typedef struct reader {
  const char *path;
  json_t *root, *model, *vocab, *merges, *added;
  const char **symbol; /* [n_ids]: the vocabulary's text; NULL for special tokens */
  int32_t n_ids;
} reader;

static bool absent(const json_t *value) {
  return !value || json_is_null(value);
}

static bool is_text(const json_t *value, const char *text) {
  return json_is_string(value) && strcmp(json_string_value(value), text) == 0;
}

#define REFUSE(r, ...) wn_status_prefix(WN_FAIL(WN_E_INPUT, __VA_ARGS__), "%s", (r)->path)

/* Whatever changes the ids of a text and is not done here. */
static wn_status check_pipeline(const reader *r) {
  static const char *const unused[] = {"normalizer", "truncation", "padding"};
  for (size_t i = 0; i < 3; i++)
    if (!absent(json_object_get(r->root, unused[i]))) return REFUSE(r, "a %s is not supported", unused[i]);
  const json_t *pre = json_object_get(r->root, "pre_tokenizer"), *post = json_object_get(r->root, "post_processor");
  const json_t *regex = json_object_get(pre, "use_regex");
  if (!is_text(json_object_get(pre, "type"), "ByteLevel") || json_is_true(json_object_get(pre, "add_prefix_space")) ||
      (regex && !json_is_true(regex)))
    return REFUSE(r, "pre_tokenizer must be ByteLevel with its own pattern and without add_prefix_space");
  if (!absent(post) && !is_text(json_object_get(post, "type"), "ByteLevel"))
    return REFUSE(r, "a post_processor that adds tokens is not supported");
  const json_t *type = json_object_get(r->model, "type");
  if (!is_text(type, "BPE")) return REFUSE(r, "model.type must be BPE");
  static const char *const off[] = {"byte_fallback", "ignore_merges"};
  for (size_t i = 0; i < 2; i++)
    if (json_is_true(json_object_get(r->model, off[i]))) return REFUSE(r, "model.%s is not supported", off[i]);
  static const char *const empty[] = {"continuing_subword_prefix", "end_of_word_suffix"};
  for (size_t i = 0; i < 2; i++) {
    const json_t *value = json_object_get(r->model, empty[i]);
    if (!absent(value) && !is_text(value, "")) return REFUSE(r, "model.%s is not supported", empty[i]);
  }
  const json_t *dropout = json_object_get(r->model, "dropout");
  if (!absent(dropout) && !(json_is_number(dropout) && json_number_value(dropout) == 0.0))
    return REFUSE(r, "model.dropout is not supported");
  return NULL;
}

static wn_status check_id(const reader *r, const char *token, const json_t *id) {
  if (json_is_integer(id) && json_integer_value(id) >= 0 && json_integer_value(id) < MOST_IDS) return NULL;
  return REFUSE(r, "token \"%.60s\" has no id from 0 to %d", token, MOST_IDS - 1);
}

/* Collects symbol[id] from the vocabulary, then takes out the special tokens; every id must be taken once. */
static wn_status read_ids(reader *r, int32_t *end_of_document) {
  const char *token;
  json_t *id, *entry;
  size_t i, n = json_object_size(r->vocab) + json_array_size(r->added);
  *end_of_document = -1;
  r->symbol = calloc(n ? n : 1, sizeof *r->symbol);
  bool *special = calloc(n ? n : 1, sizeof *special);
  wn_status status = r->symbol && special ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for %zu tokens", n);
  if (status) goto done;
  json_object_foreach(r->vocab, token, id) {
    WN_TRY_GOTO(status, done, check_id(r, token, id));
    size_t at = (size_t)json_integer_value(id);
    if (at >= n)
      status = REFUSE(r, "token \"%.60s\" has id %zu, but there are only %zu tokens", token, at, n);
    else if (r->symbol[at])
      status = REFUSE(r, "tokens \"%.60s\" and \"%.60s\" have the same id %zu", r->symbol[at], token, at);
    if (status) goto done;
    r->symbol[at] = token;
    if ((int32_t)at >= r->n_ids) r->n_ids = (int32_t)at + 1;
  }
  json_array_foreach(r->added, i, entry) {
    const char *content = json_string_value(json_object_get(entry, "content"));
    id = json_object_get(entry, "id");
    if (!content)
      status = REFUSE(r, "added token %zu has no content", i);
    else if (!json_is_true(json_object_get(entry, "special")))
      status = REFUSE(r, "added token \"%.60s\" is not special: it would be looked for in text", content);
    if (status) goto done;
    WN_TRY_GOTO(status, done, check_id(r, content, id));
    size_t at = (size_t)json_integer_value(id);
    if (at >= n || special[at] || (r->symbol[at] && strcmp(r->symbol[at], content) != 0)) {
      status = REFUSE(r, "added token \"%.60s\" has id %zu, which is another's or too large", content, at);
      goto done;
    }
    special[at] = true;
    r->symbol[at] = NULL;
    if ((int32_t)at >= r->n_ids) r->n_ids = (int32_t)at + 1;
    if (strcmp(content, WN_END_OF_DOCUMENT) == 0) *end_of_document = (int32_t)at;
  }
  for (int32_t k = 0; k < r->n_ids && !status; k++)
    if (!r->symbol[k] && !special[k]) status = REFUSE(r, "no token has id %d", k);
  if (!status && *end_of_document < 0)
    status = REFUSE(r, "there is no special token " WN_END_OF_DOCUMENT " to end documents with");
done:
  free(special);
  return status;
}

/* The bytes behind every id; the ids of the 256 single bytes. */
static wn_status read_bytes(const reader *r, wn_tokenizer *t) {
  size_t room = 0, at = 0, step;
  for (int32_t id = 0; id < r->n_ids; id++) room += r->symbol[id] ? strlen(r->symbol[id]) : 0;
  t->bytes = malloc(room ? room : 1);
  t->bytes_end = malloc((size_t)r->n_ids * sizeof *t->bytes_end);
  if (!t->bytes || !t->bytes_end) return WN_FAIL(WN_E_MEMORY, "out of memory for %zu bytes of tokens", room);
  for (int i = 0; i < 256; i++) t->byte_id[i] = -1;
  for (int32_t id = 0; id < r->n_ids; id++) {
    size_t begin = at;
    const char *text = r->symbol[id] ? r->symbol[id] : "";
    for (size_t n = strlen(text); n > 0; text += step, n -= step) {
      int32_t byte = wn_byte_of_symbol(text, n, &step);
      if (byte < 0) return REFUSE(r, "token %d, \"%.60s\", is not in the byte-level alphabet", id, r->symbol[id]);
      t->bytes[at++] = (char)byte;
    }
    t->bytes_end[id] = at;
    if (at - begin == 1) t->byte_id[(unsigned char)t->bytes[begin]] = id;
  }
  for (int i = 0; i < 256; i++)
    if (t->byte_id[i] < 0) return REFUSE(r, "byte %d has no token of its own", i);
  return NULL;
}

static wn_status id_of(const reader *r, const char *symbol, size_t n, size_t merge, int32_t *id) {
  const json_t *found = json_object_getn(r->vocab, symbol, n);
  if (!found)
    return REFUSE(r, "merge %zu has \"%.*s\", which is not in the vocabulary", merge, (int)(n < 60 ? n : 60), symbol);
  *id = (int32_t)json_integer_value(found);
  return NULL;
}

/* "a b", or since tokenizers 0.20 ["a", "b"]. */
static wn_status read_merge(const reader *r, size_t i, const json_t *entry, wn_tokenizer *t) {
  const char *left = json_string_value(entry), *right = NULL;
  size_t left_bytes = 0;
  if (left) {
    right = strchr(left, ' ');
    left_bytes = right ? (size_t)(right++ - left) : 0;
  } else if (json_is_array(entry) && json_array_size(entry) == 2) {
    left = json_string_value(json_array_get(entry, 0));
    right = json_string_value(json_array_get(entry, 1));
    left_bytes = left ? strlen(left) : 0;
  }
  if (!left || !right || left_bytes == 0 || !*right || strchr(right, ' '))
    return REFUSE(r, "merge %zu is not two tokens", i);
  wn_merge merge = {.rank = (int32_t)i};
  size_t right_bytes = strlen(right);
  WN_TRY(id_of(r, left, left_bytes, i, &merge.left));
  WN_TRY(id_of(r, right, right_bytes, i, &merge.right));
  char *joined = malloc(left_bytes + right_bytes);
  if (!joined) return WN_FAIL(WN_E_MEMORY, "out of memory reading merges");
  memcpy(joined, left, left_bytes);
  memcpy(joined + left_bytes, right, right_bytes);
  wn_status status = id_of(r, joined, left_bytes + right_bytes, i, &merge.id);
  free(joined);
  WN_TRY(status);
  return wn_status_prefix(wn_merges_add(&t->merges, merge), "%s: merge %zu", r->path, i);
}

static wn_status read_all(reader *r, wn_tokenizer *t) {
  if (!json_is_object(r->root)) return REFUSE(r, "is not a JSON object");
  r->model = json_object_get(r->root, "model");
  r->vocab = json_object_get(r->model, "vocab");
  r->merges = json_object_get(r->model, "merges");
  r->added = json_object_get(r->root, "added_tokens");
  if (!json_is_object(r->vocab) || !json_is_array(r->merges) || !json_is_array(r->added))
    return REFUSE(r, "a tokenizer.json has model.vocab, model.merges and added_tokens");
  if (json_object_size(r->vocab) > MOST_IDS || json_array_size(r->added) > MOST_IDS ||
      json_array_size(r->merges) > MOST_IDS)
    return REFUSE(r, "more than %d tokens", MOST_IDS);
  WN_TRY(check_pipeline(r));
  WN_TRY(read_ids(r, &t->end_of_document));
  t->vocab_size = r->n_ids;
  WN_TRY(read_bytes(r, t));
  size_t i;
  json_t *entry;
  json_array_foreach(r->merges, i, entry) WN_TRY(read_merge(r, i, entry, t));
  return wn_split_create(&t->split);
}

wn_status wn_tokenizer_load(wn_tokenizer **out, const char *path) {
  reader r = {.path = path};
  WN_TRY(wn_json_load(&r.root, path, MOST_JSON_BYTES, WN_E_INPUT));
  wn_tokenizer *t = calloc(1, sizeof *t);
  wn_status status = t ? read_all(&r, t) : WN_FAIL(WN_E_MEMORY, "out of memory reading %s", path);
  free(r.symbol);
  json_decref(r.root);
  if (status)
    wn_tokenizer_free(t);
  else
    *out = t;
  return status;
}

/* ---- writing */

static json_t *vocabulary(const char *const *symbol, int32_t n) {
  json_t *vocab = json_object();
  for (int32_t id = 0; id < n; id++)
    if (json_object_set_new(vocab, symbol[id], json_integer(id)) != 0) return json_decref(vocab), NULL;
  return vocab;
}

static json_t *merge_list(const char *const *symbol, const int32_t (*pair)[2], int32_t n) {
  json_t *merges = json_array();
  for (int32_t i = 0; i < n; i++)
    if (json_array_append_new(merges, json_sprintf("%s %s", symbol[pair[i][0]], symbol[pair[i][1]])) != 0)
      return json_decref(merges), NULL;
  return merges;
}

static json_t *byte_level(void) {
  return json_pack("{s:s, s:b, s:b, s:b}", "type", "ByteLevel", "add_prefix_space", 0, "trim_offsets", 1, "use_regex",
                   1);
}

static wn_status write_json(const char *path, const char *const *symbol, const int32_t (*pair)[2], int32_t n_merges) {
  int32_t end = 256 + n_merges;
  json_t *added = json_pack("{s:i, s:s, s:b, s:b, s:b, s:b, s:b}", "id", (int)end, "content", WN_END_OF_DOCUMENT,
                            "single_word", 0, "lstrip", 0, "rstrip", 0, "normalized", 0, "special", 1);
  json_t *model =
      json_pack("{s:s, s:n, s:n, s:n, s:n, s:b, s:b, s:b, s:o, s:o}", "type", "BPE", "dropout", "unk_token",
                "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", 0, "byte_fallback", 0, "ignore_merges",
                0, "vocab", vocabulary(symbol, end + 1), "merges", merge_list(symbol, pair, n_merges));
  json_t *root = json_pack("{s:s, s:n, s:n, s:[o], s:n, s:o, s:n, s:o, s:o}", "version", "1.0", "truncation", "padding",
                           "added_tokens", added, "normalizer", "pre_tokenizer", byte_level(), "post_processor",
                           "decoder", byte_level(), "model", model);
  char *text = root ? json_dumps(root, JSON_INDENT(1)) : NULL;
  wn_status status =
      text ? wn_write_file_atomic(path, text, strlen(text)) : WN_FAIL(WN_E_MEMORY, "out of memory writing %s", path);
  free(text);
  json_decref(root);
  return status;
}

wn_status wn_tokenizer_write(const char *path, const int32_t (*pair)[2], int32_t n_merges) {
  int32_t n = 256 + n_merges;
  wn_status status = NULL;
  char **symbol = calloc((size_t)n + 1, sizeof *symbol);
  if (!symbol) return WN_FAIL(WN_E_MEMORY, "out of memory writing %s", path);
  for (int32_t id = 0; id < n && !status; id++) {
    char byte[2];
    int bytes = id < 256 ? (int)wn_byte_symbol((uint8_t)id, byte) : 0;
    int made = id < 256 ? asprintf(&symbol[id], "%.*s", bytes, byte)
                        : asprintf(&symbol[id], "%s%s", symbol[pair[id - 256][0]], symbol[pair[id - 256][1]]);
    if (made < 0) symbol[id] = NULL, status = WN_FAIL(WN_E_MEMORY, "out of memory writing %s", path);
  }
  if (!status) {
    symbol[n] = strdup(WN_END_OF_DOCUMENT);
    status = symbol[n] ? write_json(path, (const char *const *)symbol, pair, n_merges)
                       : WN_FAIL(WN_E_MEMORY, "out of memory writing %s", path);
  }
  for (int32_t id = 0; id <= n; id++) free(symbol[id]);
  free(symbol);
  return status;
}
