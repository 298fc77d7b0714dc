/* A world of which there is one rank: collectives answer as if all had given the same, and bytes are counted. */
#include "dist/comm.h"
#include "kernels/cpu/cpu.h"
#include "support/test.h"

enum { RANKS = 5 };

static wn_world *dry_world(void) {
  wn_world *world;
  OK(wn_world_create_dry(&world, RANKS));
  return world;
}

static void collectives_answer_at_once(void **state) {
  (void)state;
  wn_world *world = dry_world();
  wn_group *all = wn_world_all(world), *experts;
  assert_int_equal(wn_world_size(world), RANKS);
  assert_int_equal(wn_world_rank(world), 0);
  int32_t own = 17, gathered[RANKS] = {0};
  OK(wn_group_gather(all, gathered, &own, sizeof own));
  for (int r = 0; r < RANKS; r++) assert_int_equal(gathered[r], 17);
  double x[2] = {1.5, -2};
  int64_t n = 7;
  OK(wn_group_sum_f64(all, x, 2));
  OK(wn_group_sum_i64(all, &n, 1));
  assert_true(x[0] == 7.5 && x[1] == -10 && n == 35);
  OK(wn_group_broadcast(all, &n, sizeof n, 0));
  assert_int_equal(n, 35);
  OK(wn_world_barrier(world));
  OK(wn_world_agree(world, NULL));
  REFUSED(wn_world_agree(world, WN_FAIL(WN_E_IO, "the disk is full")), WN_E_IO, "the disk is full");
  OK(wn_world_split(world, &experts, RANKS));
  assert_int_equal(wn_group_size(experts), 1);
  wn_world_free(world);
}

static void bytes_are_counted_and_nothing_moves(void **state) {
  (void)state;
  enum { PIECE = 1000 };
  wn_world *world = dry_world();
  wn_group *all = wn_world_all(world);
  wn_device *device;
  wn_comm *comm;
  wn_transfer *transfer;
  wn_tensor piece, whole;
  OK(wn_cpu_create_f32(&device, (wn_cpu_settings){.threads = 1, .dry = true}));
  OK(wn_comm_create(&comm, device, world, &all, 1, RANKS * PIECE));
  OK(wn_tensor_alloc(&piece, device->weights, "piece", WN_F32, 1, PIECE, 0, 0, 0));
  OK(wn_tensor_alloc(&whole, device->weights, "whole", WN_F32, 1, RANKS * PIECE, 0, 0, 0));
  OK(wn_comm_gather(comm, all, &transfer, &whole, &piece));
  OK(wn_comm_finish(comm, transfer));
  OK(wn_comm_reduce_scatter(comm, all, &transfer, &piece, &whole));
  OK(wn_comm_finish(comm, transfer));
  assert_int_equal(wn_comm_traffic(comm).gathered_bytes, (RANKS - 1) * PIECE * 4);
  assert_int_equal(wn_comm_traffic(comm).summed_bytes, (RANKS - 1) * PIECE * 4);
  /* on a CPU the contributions of the other ranks arrive in scratch */
  assert_true(wn_arena_peak_bytes(device->scratch) >= RANKS * PIECE * 4);
  assert_int_equal(wn_arena_used_bytes(device->scratch), 0);
  wn_comm_free(comm);
  wn_cpu_free_f32(device);
  wn_world_free(world);
}

int main(void) {
  const struct CMUnitTest tests[] = {cmocka_unit_test(collectives_answer_at_once),
                                     cmocka_unit_test(bytes_are_counted_and_nothing_moves)};
  return cmocka_run_group_tests(tests, NULL, NULL);
}
