#include "convert/demo.h"

#include <stdio.h>
#include <string.h>

#include "base/float8.h"
#include "base/name_list.h"
#include "io/files.h"
#include "io/json.h"

/* ---- names ---- */

/* By the part of a name that stands before its last. Parts that are not here keep their names and are not split. */
static const struct {
  const char *theirs, *ours;
  int32_t axis;
} modules[] = {
    {"embed_tokens", "embed", 0},
    {"input_layernorm", "attn_norm", -1},
    {"q_proj", "wq", 0},
    {"post_attention_layernorm", "ffn_norm", -1},
    {"q_a_proj", "wq_a", -1},
    {"q_a_layernorm", "q_norm", -1},
    {"q_b_proj", "wq_b", 0},
    {"kv_a_proj_with_mqa", "wkv_a", -1},
    {"kv_a_layernorm", "kv_norm", -1},
    {"kv_b_proj", "wkv_b", 0},
    {"o_proj", "wo", 1},
    {"gate_proj", "w1", 0},
    {"down_proj", "w2", 1},
    {"up_proj", "w3", 0},
    {"lm_head", "head", 0},
};
enum { MODULES = sizeof modules / sizeof *modules };

typedef struct part {
  const char *text;
  size_t length;
} part;

static bool is(part p, const char *text) {
  return strlen(text) == p.length && memcmp(p.text, text, p.length) == 0;
}

/* The name's parts between dots; returns how many. */
enum { MOST_PARTS = 16 };
static int split(part parts[MOST_PARTS], const char *name) {
  int n = 0;
  for (const char *at = name; n < MOST_PARTS; at += parts[n - 1].length + 1) {
    parts[n++] = (part){at, strcspn(at, ".")};
    if (!at[parts[n - 1].length]) break;
  }
  return n;
}

static int module_of(const char *name) {
  part parts[MOST_PARTS];
  int n = split(parts, name);
  for (int m = 0; n >= 2 && m < MODULES; m++)
    if (is(parts[n - 2], modules[m].theirs)) return m;
  return -1;
}

void wn_demo_name(char *out, const char *name, bool scale) {
  part parts[MOST_PARTS];
  int n = split(parts, name), module = module_of(name);
  size_t used = 0;
  for (int i = is(parts[0], "model") ? 1 : 0; i < n; i++) {
    part p = parts[i];
    const char *text = i == n - 2 && module >= 0                        ? modules[module].ours
                       : i == n - 1 && scale                            ? "scale"
                       : i == n - 1 && is(p, "e_score_correction_bias") ? "bias"
                       : is(p, "self_attn")                             ? "attn"
                       : is(p, "mlp")                                   ? "ffn"
                                                                        : NULL;
    if (text) p = (part){text, strlen(text)};
    if (used) out[used++] = '.';
    memcpy(out + used, p.text, p.length);
    used += p.length;
  }
  out[used] = 0;
}

/* ---- splits ---- */

int32_t wn_demo_axis(const wn_convert_weight *weight) {
  int module = weight->expert >= 0 || weight->indexer ? -1 : module_of(weight->name);
  return module < 0 ? -1 : modules[module].axis;
}

bool wn_demo_has(const wn_model_config *config, const wn_convert_weight *weight, int32_t shard, int32_t of) {
  if (weight->mtp) return false;
  return weight->expert < 0 || weight->expert / (config->n_routed_experts / of) == shard;
}

static bool splits(const wn_convert_weight *w, int32_t axis, int32_t of) {
  if (axis < 0 || of == 1) return true;
  int64_t n = w->dim[axis];
  return n % of == 0 && (!w->from.scale || n / of % WN_F8_BLOCK == 0);
}

/* The first weight that `of` shards cannot hold rightly; NULL: there is none. */
static const wn_convert_weight *unsplittable(const wn_convert_source *s, int32_t of) {
  for (int64_t i = 0; i < s->n; i++)
    if (!s->weights[i].mtp && !splits(&s->weights[i], wn_demo_axis(&s->weights[i]), of)) return &s->weights[i];
  return NULL;
}

static bool possible(const wn_convert_source *s, int32_t of) {
  return s->config.num_attention_heads % of == 0 && s->config.n_routed_experts % of == 0 && !unsplittable(s, of);
}

enum { POSSIBLE_BYTES = 256 };
static void list_possible(char out[POSSIBLE_BYTES], const wn_convert_source *s) {
  size_t used = 0;
  for (int32_t of = 1; of <= s->config.num_attention_heads && used + 16 < POSSIBLE_BYTES; of++)
    if (possible(s, of)) used += (size_t)snprintf(out + used, POSSIBLE_BYTES - used, used ? ", %d" : "%d", of);
}

static wn_status check_split(const wn_convert_source *s, int32_t of) {
  char numbers[POSSIBLE_BYTES], shape[WN_SHAPE_TEXT_BYTES];
  if (possible(s, of)) return NULL;
  list_possible(numbers, s);
  const struct {
    const char *what;
    int32_t n;
  } counts[] = {{"num_attention_heads", s->config.num_attention_heads},
                {"n_routed_experts", s->config.n_routed_experts}};
  for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
    if (counts[i].n % of != 0)
      return WN_FAIL(WN_E_CONFIG, "%s %d is not a multiple of --model-parallel %d; possible are %s", counts[i].what,
                     counts[i].n, of, numbers);
  const wn_convert_weight *w = unsplittable(s, of);
  int32_t axis = wn_demo_axis(w);
  wn_shape_text(shape, w->rank, w->dim);
  if (w->dim[axis] % of != 0)
    return WN_FAIL(WN_E_CONFIG, "tensor %s %s: its %s do not divide by --model-parallel %d; possible are %s", w->name,
                   shape, axis ? "columns" : "rows", of, numbers);
  return WN_FAIL(WN_E_CONFIG,
                 "tensor %s %s: --model-parallel %d cuts its %s every %lld, inside blocks of %d that share a scale; "
                 "possible are %s",
                 w->name, shape, of, axis ? "columns" : "rows", (long long)(w->dim[axis] / of), WN_F8_BLOCK, numbers);
}

/* The demo's dtype is one for the whole model. */
static wn_status check_mixture(const wn_convert_source *s) {
  for (int64_t i = 0; s->fp8 && i < s->n; i++) {
    const wn_convert_weight *w = &s->weights[i];
    if (w->mtp || (w->released == WN_RELEASED_FP8) == (w->from.scale != NULL)) continue;
    return WN_FAIL_HINT(WN_E_INPUT, "run `winnow convert --to fp8` first, and make the demo's shards of that",
                        "%s: tensor %s is %s, while others are FP8; the demo wants exactly the released ones in FP8",
                        wn_hf_dir_path(s->dir), w->name, wn_dtype_name(w->from.entry->dtype));
  }
  return NULL;
}

wn_status wn_demo_check(const wn_convert_source *source, int32_t of) {
  WN_TRY(check_mixture(source));
  return check_split(source, of);
}

/* ---- the configuration ---- */

void wn_demo_warn(const wn_convert_source *source, wn_log *log) {
  const wn_model_config *c = &source->config;
  if (c->hidden_size != 7168 && c->first_k_dense_replace < c->num_hidden_layers)
    wn_warn(
        log,
        "the demo's model.py gives the router a bias only where dim is 7168 (here %d), and will not load the one in "
        "these shards",
        c->hidden_size);
  if (!c->norm_topk_prob) wn_warn(log, "the demo's model.py normalises the router's weights; norm_topk_prob is false");
  if (c->rms_norm_eps != 1e-6)
    wn_warn(log, "the demo's model.py has 1e-6 in its norms; rms_norm_eps is %g", c->rms_norm_eps);
}

static json_t *short_number(double x) {
  return x == (double)(json_int_t)x ? json_integer((json_int_t)x) : json_real(x);
}

/* The demo applies YaRN where max_seq_len is above original_seq_len, so the two say whether the model has it. */
static int add_lengths(json_t *root, const wn_model_config *c) {
  enum { USUAL = 16384 };
  int32_t longest = c->max_position_embeddings, original = c->original_max_position_embeddings;
  int32_t length = longest < USUAL ? longest : USUAL;
  if (c->yarn && length <= original) length = longest > original ? longest : original + 1;
  int bad = json_object_set_new(root, "max_seq_len", json_integer(length));
  bad |= json_object_set_new(root, "original_seq_len", json_integer(c->yarn ? original : length));
  bad |= json_object_set_new(root, "rope_theta", json_real(c->rope_theta));
  if (!c->yarn) return bad;
  bad |= json_object_set_new(root, "rope_factor", json_real(c->rope_factor));
  bad |= json_object_set_new(root, "beta_fast", short_number(c->beta_fast));
  bad |= json_object_set_new(root, "beta_slow", short_number(c->beta_slow));
  return bad | json_object_set_new(root, "mscale", json_real(c->mscale_all_dim));
}

static json_t *make_config(const wn_convert_source *s) {
  const wn_model_config *c = &s->config;
  const struct {
    const char *key;
    int32_t value;
  } first[] = {{"vocab_size", c->vocab_size},
               {"dim", c->hidden_size},
               {"inter_dim", c->intermediate_size},
               {"moe_inter_dim", c->moe_intermediate_size},
               {"n_layers", c->num_hidden_layers},
               {"n_dense_layers", c->first_k_dense_replace},
               {"n_heads", c->num_attention_heads},
               {"n_routed_experts", c->n_routed_experts},
               {"n_shared_experts", c->n_shared_experts},
               {"n_activated_experts", c->num_experts_per_tok},
               {"n_expert_groups", c->n_group},
               {"n_limited_groups", c->topk_group}},
    second[] = {{"q_lora_rank", c->q_lora_rank},
                {"kv_lora_rank", c->kv_lora_rank},
                {"qk_nope_head_dim", c->qk_nope_head_dim},
                {"qk_rope_head_dim", c->qk_rope_head_dim},
                {"v_head_dim", c->v_head_dim}},
    index[] = {
        {"index_n_heads", c->index_n_heads}, {"index_head_dim", c->index_head_dim}, {"index_topk", c->index_topk}};
  json_t *root = json_object();
  int bad = root ? 0 : -1;
  for (size_t i = 0; i < sizeof first / sizeof *first; i++)
    bad |= json_object_set_new(root, first[i].key, json_integer(first[i].value));
  bad |= json_object_set_new(root, "route_scale", json_real(c->routed_scaling_factor));
  bad |= json_object_set_new(root, "score_func", json_string("sigmoid"));
  for (size_t i = 0; i < sizeof second / sizeof *second; i++)
    bad |= json_object_set_new(root, second[i].key, json_integer(second[i].value));
  bad |= json_object_set_new(root, "dtype", json_string(s->fp8 ? "fp8" : "bf16"));
  bad |= json_object_set_new(root, "scale_fmt", s->fp8 && !s->scale_ue8m0 ? json_null() : json_string("ue8m0"));
  for (size_t i = 0; c->has_indexer && i < sizeof index / sizeof *index; i++)
    bad |= json_object_set_new(root, index[i].key, json_integer(index[i].value));
  bad |= add_lengths(root, c);
  if (!bad) return root;
  json_decref(root);
  return NULL;
}

wn_status wn_demo_write_config(const wn_convert_source *source, const char *dir) {
  char path[WN_PATH_BYTES];
  WN_TRY(wn_path(path, "%s/" WN_DEMO_CONFIG_NAME, dir));
  json_t *root = make_config(source);
  wn_status status = wn_json_write(root, path, JSON_INDENT(4) | JSON_REAL_PRECISION(15));
  json_decref(root);
  return status;
}
