/* What importing costs a rank: it reads the slices it owns and takes the memory they take. Started by hand this is a
 * cmocka test that starts itself under mpirun; a rank imports, and counts the bytes that its read calls returned and
 * its anonymous pages. */
#include "support/checkpoint.h"
#include "support/fp8_model.h"
#include "support/rank_exit.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>

static wn_model_config shape(void) {
  wn_model_config config = tiny_config();
  config.vocab_size = 2048;
  config.hidden_size = 512;
  config.intermediate_size = 3000;
  config.moe_intermediate_size = 600;
  config.n_routed_experts = 8;
  config.num_hidden_layers = 4;
  config.q_lora_rank = 192;
  return config;
}

/* ---- what a rank does ---- */

static int64_t number_in(const char *path, const char *key) {
  char line[256];
  long long value = -1;
  FILE *file = fopen(path, "r");
  while (file && fgets(line, sizeof line, file))
    if (strncmp(line, key, strlen(key)) == 0) value = strtoll(line + strlen(key), NULL, 10);
  if (file) fclose(file);
  return value;
}

static int64_t anonymous_bytes(void) {
  return number_in("/proc/self/status", "RssAnon:") * 1024;
}

typedef struct sampler {
  atomic_bool stop;
  int64_t most;
} sampler;

static void *sample(void *at) {
  sampler *s = at;
  while (!s->stop) {
    int64_t now = anonymous_bytes();
    if (now > s->most) s->most = now;
    usleep(500);
  }
  return NULL;
}

/* Bytes in the files of what this rank holds, and of the largest tensor once it is FP32. */
static int64_t own_bytes(const test_rig *rig, const wn_hf_dir *dir, const wn_part *parts, int64_t *largest) {
  int64_t own = 0;
  *largest = 0;
  for (int32_t p = 0; p < rig->model->table.n; p++) {
    const wn_param *param = &rig->model->table.params[p];
    wn_hf_weight weight;
    OK(wn_hf_weight_find(&weight, dir, param->hf_name));
    if (!weight.entry) continue;
    if (parts[p].piece) own += parts[p].count * wn_dtype_bytes(weight.entry->dtype);
    if (param->fp8) own += (int64_t)weight.scale->bytes;
    if (wn_param_elements(param) * 4 > *largest) *largest = wn_param_elements(param) * 4;
  }
  return own;
}

/* What the rank's pieces take; the places where gathered layers go are not touched by an import. */
static int64_t piece_bytes(const test_rig *rig) {
  int64_t bytes = 0;
  for (int32_t i = 0; i < wn_store_pieces(rig->store); i++) {
    const wn_piece *piece = wn_store_piece(rig->store, i);
    const wn_tensor *const held[] = {&piece->master, &piece->m, &piece->v, &piece->grad, &piece->scale};
    for (size_t t = 0; t < sizeof held / sizeof *held; t++)
      if (held[t]->data) bytes += wn_tensor_bytes(held[t]);
  }
  return bytes;
}

static wn_status import(wn_world *world, const char *init) {
  test_rig rig = {.world = world, .all = wn_world_all(world)};
  const wn_model_config config = shape();
  sampler s = {0};
  pthread_t thread;
  wn_part *parts;
  wn_hf_dir *dir;
  int64_t largest, before = anonymous_bytes();
  if (pthread_create(&thread, NULL, sample, &s) != 0) return WN_FAIL(WN_E_CHECK, "no thread");
  WN_TRY(wn_cpu_create_f32(&rig.device, (wn_cpu_settings){.threads = 2, .weights_bytes = 1 << 30}));
  WN_TRY(wn_model_create(&rig.model, rig.device, &config, (wn_param_settings){.file_dtype = WN_F32}));
  WN_TRY(wn_hf_dir_open(&dir, init));
  wn_params_keep_fp8(rig.model->table.params, rig.model->table.n, dir);
  WN_TRY(wn_store_create(&rig.store, rig.device, world, &rig.all, 1, rig.model->table.params, rig.model->table.n));
  WN_TRY(wn_parts_create(&parts, rig.store, rig.model->table.n));
  int64_t own = own_bytes(&rig, dir, parts, &largest);
  wn_hf_dir_close(dir);
  rig.plan =
      (wn_checkpoint_plan){.model = rig.model, .store = rig.store, .world = world, .run_dir = "", .init_dir = init};
  int64_t read = number_in("/proc/self/io", "rchar:");
  WN_TRY(wn_init_load(&rig.plan, init, false));
  read = number_in("/proc/self/io", "rchar:") - read;
  s.stop = true;
  pthread_join(thread, NULL);
  int64_t memory = s.most - before, share = piece_bytes(&rig);
  int64_t most_read = own + own / 50 + (1 << 20), most_memory = share + largest;
  fprintf(stderr,
          "rank %d of %d: read %.2f MB of its %.2f, held %.2f MB with a share of %.2f and a largest tensor of %.2f\n",
          wn_world_rank(world), wn_world_size(world), (double)read * 1e-6, (double)own * 1e-6, (double)memory * 1e-6,
          (double)share * 1e-6, (double)largest * 1e-6);
  free(parts);
  test_rig_free(&rig);
  if (read < own || read > most_read) return WN_FAIL(WN_E_CHECK, "read %lld bytes", (long long)read);
  if (memory > most_memory) return WN_FAIL(WN_E_CHECK, "held %lld bytes", (long long)memory);
  return NULL;
}

static int rank_main(const char *init) {
  wn_world *world = NULL;
  wn_status status = wn_world_create(&world, 30);
  if (!status) status = import(world, init);
  return wn_rank_exit(world, status);
}

/* ---- what the test does ---- */

static const char *self;

static void must_hold(int32_t ranks, const char *init) {
  char command[1024], text[4096];
  snprintf(command, sizeof command, "timeout 100 mpirun --allow-run-as-root --oversubscribe -np %d '%s' '%s' 2>&1",
           ranks, self, init);
  FILE *pipe = popen(command, "r");
  assert_non_null(pipe);
  size_t got = fread(text, 1, sizeof text - 1, pipe);
  text[got] = 0;
  int ended = pclose(pipe);
  if (!WIFEXITED(ended) || WEXITSTATUS(ended) != 0) fail_msg("%d ranks: %s", ranks, text);
  print_message("%s", text);
}

static void a_rank_reads_and_holds_its_share(void **state) {
  const wn_model_config config = shape();
  fp8_model(wn_temp(state, "fp8").text, &config, 4, 3, true, false);
  fp8_model(wn_temp(state, "bf16").text, &config, 4, 3, false, false);
  for (int32_t ranks = 1; ranks <= 3; ranks++) must_hold(ranks, wn_temp(state, "fp8").text);
  must_hold(3, wn_temp(state, "bf16").text);
}

int main(int argc, char **argv) {
  const struct CMUnitTest tests[] = {TEMP_TEST(a_rank_reads_and_holds_its_share)};
  if (argc > 1) return rank_main(argv[1]);
  self = argv[0];
  return cmocka_run_group_tests(tests, NULL, NULL);
}
