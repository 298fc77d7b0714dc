#include "convert/convert.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/meter.h"
#include "convert/demo.h"
#include "convert/layout.h"
#include "convert/place.h"
#include "convert/write.h"
#include "io/hf_write.h"

const char *const wn_convert_form_names[WN_N_CONVERT_FORMS] = {"v32", "v3", "bf16", "fp8", "demo"};

typedef struct conversion {
  const wn_convert_job *job;
  wn_log *log;
  wn_convert_source source;
  wn_output_list list;
  wn_output_place *place;
  wn_tile_rooms *rooms;
  wn_meter meter;
  int64_t total_bytes;
  int64_t found_files; /* of an earlier start */
} conversion;

/* ---- shards ---- */

static wn_status write_tensors(conversion *c, int64_t file, const wn_st_layout *layout, int fd, const char *path) {
  const wn_output_file *f = &c->list.files[file];
  const wn_output *outputs = c->list.outputs;
  uint64_t header_bytes;
  const void *header = wn_st_layout_header(layout, &header_bytes);
  WN_TRY(wn_write_at(fd, path, header, header_bytes, 0));
  for (int64_t i = f->from; i < f->to; i++) {
    uint64_t scales = outputs[i].making == WN_MAKE_BLOCKS ? wn_st_layout_offset(layout, outputs[i + 1].place) : 0;
    if (outputs[i].making != WN_MAKE_SCALES)
      WN_TRY(wn_output_write(&outputs[i], fd, path, wn_st_layout_offset(layout, outputs[i].place), scales, c->rooms));
    wn_meter_add(&c->meter, wn_output_bytes(&outputs[i]));
  }
  if (fsync(fd) != 0) return WN_FAIL(WN_E_IO, "cannot sync %s: %s", path, strerror(errno));
  return NULL;
}

static wn_status write_file(conversion *c, int64_t file, const wn_st_layout *layout, const char *place) {
  char beside[WN_PATH_BYTES];
  WN_TRY(wn_path(beside, "%s/" WN_OUTPUT_TEMPORARY "%s", c->job->out, c->list.files[file].name));
  WN_TRY(wn_create_sized(beside, wn_st_layout_file_bytes(layout)));
  int fd = open(beside, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return WN_FAIL(WN_E_IO, "cannot open %s: %s", beside, strerror(errno));
  wn_status status = write_tensors(c, file, layout, fd, beside);
  if (close(fd) != 0) WN_KEEP_FIRST(status, WN_FAIL(WN_E_IO, "cannot close %s: %s", beside, strerror(errno)));
  if (!status) status = wn_rename_sync(beside, place);
  if (status) unlink(beside); /* on a full disk the finished shards want the room */
  return status;
}

static wn_status make_file(conversion *c, int64_t file) {
  char path[WN_PATH_BYTES];
  wn_st_layout *layout;
  bool stands = false;
  WN_TRY(wn_path(path, "%s/%s", c->job->out, c->list.files[file].name));
  WN_TRY(wn_output_layout(&layout, &c->list, file));
  wn_status status = wn_output_place_has(path, layout, &stands);
  if (!status && stands) {
    c->found_files++;
    c->meter.total_bytes -= c->list.files[file].bytes; /* of what is left */
  } else if (!status) {
    status = write_file(c, file, layout, path);
  }
  wn_st_layout_free(layout);
  return status;
}

/* ---- small files ---- */

static wn_status write_index(const conversion *c) {
  char name[WN_OUTPUT_NAME_BYTES];
  wn_hf_index *index;
  wn_status status = NULL;
  WN_TRY(wn_hf_index_create(&index));
  for (int64_t f = 0; f < c->list.n_files; f++)
    for (int64_t i = c->list.files[f].from; !status && i < c->list.files[f].to; i++) {
      wn_output_name(name, &c->list, &c->list.outputs[i]);
      status = wn_hf_index_add(index, name, wn_output_bytes(&c->list.outputs[i]), c->list.files[f].name);
    }
  if (!status) status = wn_hf_index_write(index, c->job->out);
  wn_hf_index_free(index);
  return status;
}

/* A source without one gets what transformers derives from a model's configuration. */
static wn_status write_generation_config(const conversion *c) {
  const wn_model_config *config = &c->source.config;
  char path[WN_PATH_BYTES], bos[64] = "", eos[64] = "", text[256];
  WN_TRY(wn_path(path, "%s/generation_config.json", c->job->in));
  if (wn_path_exists(path)) return NULL;
  WN_TRY(wn_path(path, "%s/generation_config.json", c->job->out));
  if (config->bos_token_id >= 0) snprintf(bos, sizeof bos, ",\n  \"bos_token_id\": %d", config->bos_token_id);
  if (config->eos_token_id >= 0) snprintf(eos, sizeof eos, ",\n  \"eos_token_id\": %d", config->eos_token_id);
  snprintf(text, sizeof text, "{\n  \"_from_model_config\": true%s%s\n}\n", bos, eos);
  return wn_write_file_atomic(path, text, strlen(text));
}

static wn_status write_model_files(const conversion *c) {
  const wn_convert_job *job = c->job;
  const wn_convert_source *s = &c->source;
  wn_model_config config = s->config;
  if (job->form == WN_TO_V3) config.has_indexer = false;
  config.num_nextn_predict_layers = s->mtp_layers;
  WN_TRY(wn_hf_copy_companions(job->in, job->out, false, c->log));
  WN_TRY(write_generation_config(c));
  if (job->form == WN_TO_FP8)
    WN_TRY(wn_model_config_save_fp8(&config, job->out, job->in, s->fp8 && !s->scale_ue8m0 ? NULL : "ue8m0"));
  else
    WN_TRY(wn_model_config_save(&config, job->out, job->in, "bfloat16"));
  return write_index(c);
}

static wn_status write_demo_files(const conversion *c) {
  WN_TRY(wn_hf_copy_companions(c->job->in, c->job->out, true, c->log));
  return wn_demo_write_config(&c->source, c->job->out);
}

/* ---- the whole ---- */

static wn_status check_form(const conversion *c) {
  const wn_model_config *config = &c->source.config;
  if (c->job->form == WN_TO_FP8 && config->q_lora_rank == config->hidden_size)
    wn_warn(c->log,
            "%s: q_lora_rank is hidden_size, as where whole queries were rewritten: then q_a_proj is a diagonal, "
            "which FP8 rounds by up to 1 in 16; BF16 holds it",
            c->job->in);
  if (c->job->form == WN_TO_V32 && !c->source.config.has_indexer)
    return WN_FAIL_HINT(WN_E_CONFIG, "`winnow warmup` and `winnow adapt` make one of it; --to v3 writes it as it is",
                        "%s: a V3.2 model has an indexer in every layer, and this model has none", c->job->in);
  return c->job->form == WN_TO_DEMO ? wn_demo_check(&c->source, c->job->model_parallel) : NULL;
}

static wn_status run(conversion *c) {
  const wn_convert_job *job = c->job;
  WN_TRY(wn_convert_source_open(&c->source, job->in, c->log));
  WN_TRY(check_form(c));
  WN_TRY(wn_output_list_create(&c->list, &c->source, job));
  WN_TRY(wn_tile_rooms_create(&c->rooms, job->threads));
  WN_TRY(wn_output_place_open(&c->place, job, c->source.dir, c->log));
  for (int64_t f = 0; f < c->list.n_files; f++) c->total_bytes += c->list.files[f].bytes;
  wn_meter_start(&c->meter, c->log, "writing weights", c->total_bytes);
  for (int64_t f = 0; f < c->list.n_files; f++) WN_TRY(make_file(c, f));
  wn_meter_end(&c->meter);
  WN_TRY(job->form == WN_TO_DEMO ? write_demo_files(c) : write_model_files(c));
  WN_TRY(wn_output_place_finish(c->place));
  if (job->form == WN_TO_DEMO) wn_demo_warn(&c->source, c->log);
  wn_info(c->log, "%s: %lld files, %.1f MB%s", job->out, (long long)c->list.n_files, (double)c->total_bytes * 1e-6,
          c->found_files ? " (some stood there from before)" : "");
  return NULL;
}

wn_status wn_convert(const wn_convert_job *job, wn_log *log) {
  WN_ASSERT(job->threads > 0 && job->shard_bytes > 0 && job->model_parallel > 0, "threads %d, model_parallel %d",
            job->threads, job->model_parallel);
  conversion c = {.job = job, .log = log};
  wn_status status = run(&c);
  wn_output_place_close(c.place);
  wn_tile_rooms_free(c.rooms);
  wn_output_list_free(&c.list);
  wn_convert_source_close(&c.source);
  return status;
}
