/* A small part of YAML is enough for a job file, and whatever lies outside is refused rather than guessed at. libyaml's
 * event parser gives anchors, tags and styles as written, which a document loader would already have interpreted. */
#include "io/yaml.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "io/files.h"

enum { MOST_YAML_BYTES = 1 << 20, MOST_ENTRIES = 10000 };

typedef struct loader {
  const char *path;
  yaml_parser_t parser;
  wn_yaml *out;
  wn_yaml sections; /* the sections seen, as keys */
} loader;

static int line_of(const yaml_event_t *event) {
  return (int)event->start_mark.line + 1;
}

static wn_status next(loader *in, yaml_event_t *event) {
  if (yaml_parser_parse(&in->parser, event)) return NULL;
  memset(event, 0, sizeof *event);
  const yaml_parser_t *p = &in->parser;
  const char *problem = p->problem ? p->problem : "not readable";
  if (p->error == YAML_READER_ERROR)
    return WN_FAIL(WN_E_CONFIG, "%s: %s (byte %zu)", in->path, problem, p->problem_offset);
  return WN_FAIL(WN_E_CONFIG, "%s:%d: %s%s%s", in->path, (int)p->problem_mark.line + 1, problem, p->context ? ", " : "",
                 p->context ? p->context : "");
}

static wn_status append(const loader *in, wn_yaml *list, const char *key, const char *value, int line) {
  if (list->n >= MOST_ENTRIES) return WN_FAIL(WN_E_CONFIG, "%s:%d: more than %d entries", in->path, line, MOST_ENTRIES);
  wn_yaml_entry *grown = realloc(list->entries, ((size_t)list->n + 1) * sizeof *grown);
  if (!grown) return WN_FAIL(WN_E_MEMORY, "out of memory reading %s", in->path);
  list->entries = grown;
  wn_yaml_entry *entry = &grown[list->n++];
  *entry = (wn_yaml_entry){.key = strdup(key), .value = strdup(value), .line = line};
  return entry->key && entry->value ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory reading %s", in->path);
}

static const wn_yaml_entry *find(const wn_yaml *list, const char *key) {
  for (int32_t i = 0; i < list->n; i++)
    if (!strcmp(list->entries[i].key, key)) return &list->entries[i];
  return NULL;
}

/* A scalar without anchor, tag or NUL. */
static wn_status check_scalar(const loader *in, const yaml_event_t *event, const char *what) {
  int line = line_of(event);
  if (event->type == YAML_ALIAS_EVENT)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: aliases (*name) are not supported", in->path, line);
  if (event->type == YAML_SEQUENCE_START_EVENT)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: a list stands where %s should", in->path, line, what);
  if (event->type != YAML_SCALAR_EVENT)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: a mapping stands where %s should", in->path, line, what);
  if (event->data.scalar.anchor)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: anchors (&%s) are not supported", in->path, line,
                   (const char *)event->data.scalar.anchor);
  if (event->data.scalar.tag)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: tags (%s) are not supported", in->path, line,
                   (const char *)event->data.scalar.tag);
  if (strlen((const char *)event->data.scalar.value) != event->data.scalar.length)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: %s holds a NUL character", in->path, line, what);
  return NULL;
}

static wn_status check_value(const loader *in, const yaml_event_t *event, const char *key) {
  WN_TRY(check_scalar(in, event, "a value"));
  const char *text = (const char *)event->data.scalar.value;
  bool plain = event->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
  if (plain &&
      (text[0] == 0 || !strcmp(text, "~") || !strcmp(text, "null") || !strcmp(text, "Null") || !strcmp(text, "NULL")))
    return WN_FAIL_HINT(WN_E_CONFIG, "leave the key out", "%s:%d: %s has no value", in->path, line_of(event), key);
  return NULL;
}

static wn_status check_mapping(const loader *in, const yaml_event_t *event) {
  if (event->data.mapping_start.anchor)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: anchors (&%s) are not supported", in->path, line_of(event),
                   (const char *)event->data.mapping_start.anchor);
  if (event->data.mapping_start.tag)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: tags (%s) are not supported", in->path, line_of(event),
                   (const char *)event->data.mapping_start.tag);
  return NULL;
}

static wn_status read_mapping(loader *in, const char *section);

/* Records `key` with its value, or as a section and then what the section holds. `value` has been read. */
static wn_status add_pair(loader *in, const char *section, const char *key, int line, const yaml_event_t *value) {
  const wn_yaml_entry *before = find(in->out, key) ? find(in->out, key) : find(&in->sections, key);
  if (before)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: %s stands already in line %d", in->path, line, key, (int)before->line);
  if (value->type != YAML_MAPPING_START_EVENT) {
    WN_TRY(check_value(in, value, key));
    return append(in, in->out, key, (const char *)value->data.scalar.value, line);
  }
  if (section)
    return WN_FAIL(WN_E_CONFIG, "%s:%d: %s is a mapping; only two levels are supported", in->path, line, key);
  WN_TRY(check_mapping(in, value));
  WN_TRY(append(in, &in->sections, key, "", line));
  int32_t n = in->out->n;
  WN_TRY(read_mapping(in, key));
  if (in->out->n == n) return WN_FAIL(WN_E_CONFIG, "%s:%d: section %s is empty", in->path, line, key);
  return NULL;
}

static wn_status read_pair(loader *in, const char *section, const yaml_event_t *key_event) {
  const char *name = (const char *)key_event->data.scalar.value;
  yaml_event_t value;
  char *key = NULL;
  wn_status status = next(in, &value);
  if (!status && asprintf(&key, "%s%s%s", section ? section : "", section ? "." : "", name) < 0) {
    key = NULL;
    status = WN_FAIL(WN_E_MEMORY, "out of memory reading %s", in->path);
  }
  if (!status) status = add_pair(in, section, key, line_of(key_event), &value);
  free(key);
  yaml_event_delete(&value);
  return wn_status_trail(status, __FILE__, __LINE__);
}

/* The rest of a mapping whose start has been read. */
static wn_status read_mapping(loader *in, const char *section) {
  for (;;) {
    yaml_event_t event;
    wn_status status = next(in, &event);
    bool end = !status && event.type == YAML_MAPPING_END_EVENT;
    if (!status && !end) status = check_scalar(in, &event, "a key");
    if (!status && !end && event.data.scalar.length == 0)
      status = WN_FAIL(WN_E_CONFIG, "%s:%d: a key is empty", in->path, line_of(&event));
    if (!status && !end) status = read_pair(in, section, &event);
    yaml_event_delete(&event);
    if (status || end) return status;
  }
}

static wn_status read_document(loader *in) {
  bool seen = false;
  for (;;) {
    yaml_event_t event;
    wn_status status = next(in, &event);
    if (!status && event.type == YAML_DOCUMENT_START_EVENT && seen)
      status = WN_FAIL(WN_E_CONFIG, "%s:%d: a second document begins here; only one is supported", in->path,
                       line_of(&event));
    else if (!status && event.type == YAML_DOCUMENT_START_EVENT)
      seen = true;
    else if (!status && event.type == YAML_MAPPING_START_EVENT) {
      status = check_mapping(in, &event);
      if (!status) status = read_mapping(in, NULL);
    } else if (!status && (event.type == YAML_SCALAR_EVENT || event.type == YAML_SEQUENCE_START_EVENT ||
                           event.type == YAML_ALIAS_EVENT))
      status = WN_FAIL(WN_E_CONFIG, "%s:%d: not a mapping of keys to values", in->path, line_of(&event));
    bool end = !status && event.type == YAML_STREAM_END_EVENT;
    yaml_event_delete(&event);
    if (status || end) return status;
  }
}

wn_status wn_yaml_load(wn_yaml *out, const char *path) {
  wn_status status = NULL;
  char *text = NULL;
  size_t bytes = 0;
  *out = (wn_yaml){0};
  if (!wn_path_exists(path)) return WN_FAIL(WN_E_CONFIG, "%s is absent", path);
  WN_TRY(wn_read_file(&text, &bytes, path, MOST_YAML_BYTES));
  loader in = {.path = path, .out = out};
  if (!yaml_parser_initialize(&in.parser)) {
    free(text);
    return WN_FAIL(WN_E_MEMORY, "out of memory reading %s", path);
  }
  yaml_parser_set_input_string(&in.parser, (const unsigned char *)text, bytes);
  status = read_document(&in);
  yaml_parser_delete(&in.parser);
  wn_yaml_free(&in.sections);
  free(text);
  if (status) wn_yaml_free(out);
  return wn_status_trail(status, __FILE__, __LINE__);
}

void wn_yaml_free(wn_yaml *yaml) {
  for (int32_t i = 0; i < yaml->n; i++) {
    free(yaml->entries[i].key);
    free(yaml->entries[i].value);
  }
  free(yaml->entries);
  *yaml = (wn_yaml){0};
}
