#include "train/inference.h"

#include "train/checkpoint_parts.h"
#include "train/device.h"

static wn_status keep_fp8(wn_model *model, const char *dir) {
  wn_hf_dir *weights;
  WN_TRY(wn_hf_dir_open(&weights, dir));
  wn_params_keep_fp8(model->table.params, model->table.n, weights);
  wn_hf_dir_close(weights);
  return NULL;
}

wn_status wn_inference_open(wn_inference *out, const char *dir, wn_job_device device, int32_t threads, bool with_grads,
                            wn_world *world, wn_log *log) {
  wn_inference inference = {.world = world};
  wn_status status = NULL;
  wn_model_config config;
  wn_group *all = wn_world_all(world);
  WN_TRY_GOTO(status, fail, wn_world_agree(world, wn_model_config_load(&config, dir)));
  WN_TRY_GOTO(status, fail, wn_open_device(&inference.device, device, threads, world, log));
  wn_param_settings settings = {.train_base = with_grads, .train_indexer = with_grads, .file_dtype = WN_F32};
  WN_TRY_GOTO(status, fail,
              wn_world_agree(world, wn_model_create(&inference.model, inference.device, &config, settings)));
  if (!with_grads) WN_TRY_GOTO(status, fail, wn_world_agree(world, keep_fp8(inference.model, dir)));
  WN_TRY_GOTO(status, fail,
              wn_store_create(&inference.store, inference.device, world, &all, 1, inference.model->table.params,
                              inference.model->table.n));
  wn_checkpoint_plan plan = {
      .model = inference.model, .store = inference.store, .world = world, .log = log, .run_dir = "", .init_dir = dir};
  WN_TRY_GOTO(status, fail, wn_world_agree(world, wn_init_load(&plan, dir, false)));
  *out = inference;
  return NULL;
fail:
  wn_inference_close(&inference);
  return status;
}

void wn_inference_close(wn_inference *inference) {
  wn_store_free(inference->store);
  wn_model_free(inference->model);
  wn_close_device(inference->device);
  *inference = (wn_inference){0};
}
