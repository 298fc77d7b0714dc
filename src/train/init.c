/* Weights for a fresh run: from a Hugging Face directory or checkpoint, or random. */
#include <stdlib.h>
#include <string.h>

#include "kernels/kernels.h"
#include "train/reads.h"
#include "train/rewrite.h"

typedef struct init {
  const wn_checkpoint_plan *plan;
  const wn_param *params;
  int32_t n_params;
  wn_names names;
  wn_part *parts;
  wn_hf_dir *dir;
  float *buffer;
} init;

static wn_status init_open(init *in, const wn_checkpoint_plan *plan) {
  *in = (init){.plan = plan};
  in->params = wn_store_params(plan->store, &in->n_params);
  WN_TRY(wn_names_create(&in->names, in->params, in->n_params));
  WN_TRY(wn_parts_create(&in->parts, plan->store, in->n_params));
  in->buffer = malloc(WN_COPY_ELEMENTS * sizeof *in->buffer);
  return in->buffer ? NULL : WN_FAIL(WN_E_MEMORY, "out of memory for a buffer");
}

static void init_close(init *in) {
  wn_hf_dir_close(in->dir);
  wn_names_free(&in->names);
  free(in->parts);
  free(in->buffer);
}

/* Every element is a pure function of seed and name, so ranks and threads may draw in any order. */
static wn_status draw(const init *in, int32_t p) {
  wn_device *device = in->plan->model->device;
  const wn_part *part = &in->parts[p];
  const wn_param *param = &in->params[p];
  const wn_model_config *config = &in->plan->model->config;
  uint64_t seed = in->plan->seed;
  float *buffer = in->buffer;
  bool attention = param->slot == WN_P_Q || param->slot == WN_P_Q_A || param->slot == WN_P_Q_B ||
                   param->slot == WN_P_KV_A || param->slot == WN_P_KV_B || param->slot == WN_P_O;
  double gain = attention && in->plan->attention_init_gain > 0 ? in->plan->attention_init_gain : 1.0;
  if (!part->piece) return NULL;
  for (int64_t done = 0, n; done < part->count; done += n) {
    n = part->count - done < WN_COPY_ELEMENTS ? part->count - done : WN_COPY_ELEMENTS;
    int64_t first = part->first + done;
#pragma omp parallel for num_threads(device->threads) schedule(static)
    for (int64_t i = 0; i < n; i++) buffer[i] = (float)(gain * wn_param_initial(param, config, seed, first + i));
    wn_tensor place = wn_tensor_slice(part->piece->master, 0, part->offset + done, n);
    WN_TRY(wn_floats_upload(device, &place, buffer));
  }
  return NULL;
}

/* Where the directory is a checkpoint, the bytes of its weights are compared with its manifest (this rank's share of
 * the files). Its other files may have been edited by hand, as a config.json may be. */
static wn_status verify_weights(const wn_hf_dir *dir, int32_t rank, int32_t size) {
  char path[WN_PATH_BYTES];
  wn_manifest manifest;
  WN_TRY(wn_path(path, "%s/" WN_MANIFEST_NAME, wn_hf_dir_path(dir)));
  if (!wn_path_exists(path)) return NULL;
  WN_TRY(wn_manifest_load(&manifest, wn_hf_dir_path(dir)));
  wn_status status = NULL;
  for (int32_t i = rank; !status && i < wn_hf_dir_shards(dir); i += size)
    status = wn_manifest_check_listed(&manifest, strrchr(wn_hf_dir_shard_path(dir, i), '/') + 1, wn_hf_dir_path(dir));
  wn_manifest_free(&manifest);
  return status;
}

/* What the directory has is read; the rest is made from it, or drawn. */
static wn_status read_weights(init *in, wn_reads *reads, bool *rewritten) {
  wn_device *device = in->plan->model->device;
  for (int32_t p = 0; p < in->n_params; p++) {
    wn_read read = {.param = p, .field = WN_FIELD_WEIGHT};
    WN_TRY(wn_hf_weight_find(&read.from, in->dir, in->params[p].hf_name));
    if (read.from.entry) {
      WN_TRY(wn_reads_add(reads, read));
    } else if (wn_rewrite_makes(in->dir, &in->params[p])) {
      WN_TRY(wn_rewrite_make(device, &in->parts[p], &in->params[p], in->dir, in->buffer));
      *rewritten = true;
    } else {
      WN_TRY(draw(in, p));
    }
  }
  return wn_reads_run(reads, device, in->plan->store, in->parts, in->plan->log, "reading weights");
}

/* Tensors behind the model's last layer are its prediction layers, or the rest of a model that config.json has less of.
 */
static void tell_of_passed_over(const init *in, int64_t passed_over, int32_t there) {
  const char *dir = wn_hf_dir_path(in->dir);
  wn_log *log = in->plan->log;
  int32_t n_layers = in->plan->model->config.num_hidden_layers;
  int32_t named = in->plan->model->config.num_nextn_predict_layers;
  int64_t unknown = 0;
  if (there < named)
    wn_warn(log,
            "%s: of the %d layers for multi-token prediction that config.json names %d are absent; checkpoints will "
            "name those that are there",
            dir, named, named - there);
  if (!passed_over) return;
  wn_info(log,
          "%s: %lld tensors of layers from %d on (multi-token prediction) are not trained; checkpoints carry them "
          "through",
          dir, (long long)passed_over, n_layers);
  for (int64_t i = 0; i < wn_hf_dir_count(in->dir); i++)
    unknown += wn_name_layer(wn_hf_dir_at(in->dir, i, NULL)->name) >= n_layers + named;
  if (unknown)
    wn_warn(log,
            "%s: %lld of them are of layers that config.json does not name (num_hidden_layers %d, "
            "num_nextn_predict_layers %d)",
            dir, (long long)unknown, n_layers, named);
}

static wn_status load_local(init *in, const wn_checkpoint_plan *plan, const char *dir, bool allow_new_indexer) {
  bool indexer_absent, rewritten = false;
  int64_t passed_over;
  int32_t mtp_layers, rank = wn_world_rank(plan->world), size = wn_world_size(plan->world);
  wn_dir_rules rules = {.new_indexer_allowed = allow_new_indexer, .n_layers = plan->model->config.num_hidden_layers};
  WN_TRY(init_open(in, plan));
  WN_TRY(wn_source_open(&in->dir, dir, &plan->model->config));
  WN_TRY(wn_dir_check(in->dir, &in->names, rules, &indexer_absent, &passed_over));
  WN_TRY(wn_mtp_layers_there(&mtp_layers, in->dir, &plan->model->config));
  WN_TRY(verify_weights(in->dir, rank, size));
  WN_TRY(wn_check_widened(in->dir, &in->names, rank, size));
  wn_reads reads = {0};
  wn_status status = read_weights(in, &reads, &rewritten);
  wn_reads_free(&reads);
  WN_TRY(status);
  if (rank != 0) return NULL;
  tell_of_passed_over(in, passed_over, mtp_layers);
  if (rewritten)
    wn_info(plan->log,
            "%s has queries without a low rank: rewritten with q_lora_rank = hidden_size = %d, which an indexer needs",
            dir, plan->model->config.hidden_size);
  if (indexer_absent) wn_info(plan->log, "%s has no indexer: a new one is drawn from the seed", dir);
  return NULL;
}

wn_status wn_init_load(const wn_checkpoint_plan *plan, const char *dir, bool allow_new_indexer) {
  init in;
  wn_status status = load_local(&in, plan, dir, allow_new_indexer);
  if (!status) status = wn_store_publish(plan->store);
  init_close(&in);
  return wn_world_agree(plan->world, status);
}

wn_status wn_init_random(const wn_checkpoint_plan *plan) {
  init in;
  wn_status status = init_open(&in, plan);
  for (int32_t p = 0; !status && p < in.n_params; p++) status = draw(&in, p);
  if (!status) status = wn_store_publish(plan->store);
  init_close(&in);
  return wn_world_agree(plan->world, status);
}
