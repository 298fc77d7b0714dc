/* Linear layers on the GPU against the CPU in FP64: every form, output dtype and flag, odd shapes and strides, empty
 * experts, more than 2^31 elements; and the sum of a reduce-scatter, bit for bit. */
#include "support/twin.h"

/* Sums of 16-bit products in FP32 differ from FP64 by rounding alone. */
static double bar_of(const twin *t) {
  return t->role == WN_ACT ? twin_bf16 : twin_f32;
}

/* Before an operation: something to add to, or poison. */
static void begin_output(twin_bench *b, twin *t, bool accumulate, uint64_t seed) {
  if (accumulate)
    twin_fill(b, t, seed, 2, 0);
  else
    twin_poison(b, t);
}

static const struct linear_shape {
  int64_t n, inputs, outputs;
} linear_shapes[] = {{1, 1, 1},    {1, 64, 40},   {7, 13, 5},      {64, 64, 64},   {129, 96, 200},
                     {33, 514, 7}, {300, 257, 1}, {128, 512, 768}, {1000, 24, 131}};
enum { N_LINEAR_SHAPES = sizeof linear_shapes / sizeof *linear_shapes };

static void linear_matches(void **state) {
  twin_bench *b = twin_begin(state);
  for (int i = 0; i < N_LINEAR_SHAPES; i++)
    for (int m = 0; m < 3; m++)
      for (int form = 0; form < 4; form++) {
        struct linear_shape s = linear_shapes[i];
        const int64_t margin = (const int64_t[]){0, 3, 8}[m];
        wn_accumulate params = {.accumulate = form & 1};
        wn_role role = form & 2 ? WN_STAT : WN_ACT;
        twin x = twin_random(b, WN_ACT, 1, 1, margin, 2, s.n, s.inputs, 0);
        twin w = twin_random(b, WN_ACT, 2, 0.5, margin, 2, s.outputs, s.inputs, 0);
        twin y = twin_strided(b, role, margin, 2, s.n, s.outputs, 0);
        begin_output(b, &y, params.accumulate, 3);
        OK(b->cuda->ops->linear(b->cuda, &y.cuda, &x.cuda, &w.cuda, &params));
        OK(b->cpu->ops->linear(b->cpu, &y.cpu, &x.cpu, &w.cpu, &params));
        twin_close(b, "linear", &y, bar_of(&y));
        twin dx = twin_strided(b, role, margin, 2, s.n, s.inputs, 0);
        twin dy = twin_random(b, WN_ACT, 4, 1, margin, 2, s.n, s.outputs, 0);
        begin_output(b, &dx, params.accumulate, 5);
        OK(b->cuda->ops->linear_backward_input(b->cuda, &dx.cuda, &dy.cuda, &w.cuda, &params));
        OK(b->cpu->ops->linear_backward_input(b->cpu, &dx.cpu, &dy.cpu, &w.cpu, &params));
        twin_close(b, "linear_backward_input", &dx, bar_of(&dx));
      }
  twin_end(b);
}

/* dy in BF16, and in FP32 (of very unequal sizes): FP32 precision either way. */
static void weight_gradients_match(void **state) {
  twin_bench *b = twin_begin(state);
  for (int i = 0; i < N_LINEAR_SHAPES; i++)
    for (int64_t margin = 0; margin <= 3; margin += 3)
      for (int form = 0; form < 2; form++) {
        struct linear_shape s = linear_shapes[i];
        twin x = twin_random(b, WN_ACT, 1, 1, margin, 2, s.n, s.inputs, 0);
        twin dy = twin_random(b, form ? WN_STAT : WN_ACT, 2, 1, margin, 2, s.n, s.outputs, 0);
        twin dw = twin_random(b, WN_WGRAD, 3, 1, margin, 2, s.outputs, s.inputs, 0);
        OK(b->cuda->ops->linear_backward_weight(b->cuda, &dw.cuda, &dy.cuda, &x.cuda));
        OK(b->cpu->ops->linear_backward_weight(b->cpu, &dw.cpu, &dy.cpu, &x.cpu));
        twin_close(b, form ? "linear_backward_weight, FP32 dy" : "linear_backward_weight", &dw, twin_f32);
      }
  twin_end(b);
}

/* What three BF16 terms must get right: values whose low bits count, tiny ones, and infinities that stay infinities. */
static void an_fp32_gradient_keeps_its_bits(void **state) {
  twin_bench *b = twin_begin(state);
  static const double gradient[] = {1.0 + 0x1p-23, -0x1.fffffep+5, 0x1.abcdeep-40, 3.0, -0x1p100, 0,
                                    INFINITY,      -INFINITY};
  enum { N = sizeof gradient / sizeof *gradient };
  twin dy = twin_tensor(b, WN_STAT, 2, 1, N, 0), x = twin_tensor(b, WN_ACT, 2, 1, 1, 0);
  twin dw = twin_tensor(b, WN_WGRAD, 2, N, 1, 0);
  twin_set(b, &dy, gradient);
  twin_constant(b, &x, 1);
  twin_constant(b, &dw, 0);
  OK(b->cuda->ops->linear_backward_weight(b->cuda, &dw.cuda, &dy.cuda, &x.cuda));
  wn_tensor host = twin_download(b, &dw.cuda);
  for (int i = 0; i < N; i++)
    if (wn_test_get(&host, i) != gradient[i])
      fail_msg("element %d is %.9g, not %.9g", i, wn_test_get(&host, i), gradient[i]);
  free(host.data);
  twin_end(b);
}

/* Nothing to do, nothing done: no row, or only adding. */
static void no_rows_are_fine(void **state) {
  twin_bench *b = twin_begin(state);
  for (int form = 0; form < 2; form++) {
    twin x = twin_tensor(b, WN_ACT, 2, 0, 24, 0), dy = twin_tensor(b, form ? WN_STAT : WN_ACT, 2, 0, 16, 0);
    twin w = twin_random(b, WN_ACT, 1, 1, 0, 2, 16, 24, 0), dw = twin_random(b, WN_WGRAD, 2, 1, 0, 2, 16, 24, 0);
    twin y = twin_tensor(b, WN_ACT, 2, 0, 16, 0);
    OK(b->cuda->ops->linear(b->cuda, &y.cuda, &x.cuda, &w.cuda, &(wn_accumulate){0}));
    OK(b->cuda->ops->linear_backward_weight(b->cuda, &dw.cuda, &dy.cuda, &x.cuda));
    twin_close(b, "untouched", &dw, 0);
  }
  twin_end(b);
}

/* The weight is a slice of rows of a larger one, as W_UK and W_UV are; x and y are slices of wider heads. */
static void per_head_matches(void **state) {
  static const struct {
    int64_t n, heads, rows, cols;
  } shapes[] = {{1, 1, 1, 1}, {19, 5, 13, 7}, {37, 3, 24, 40}, {65, 4, 128, 512}, {256, 2, 64, 96}, {2, 9, 8, 130}};
  twin_bench *b = twin_begin(state);
  for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
    for (int form = 0; form < 8; form++) {
      int64_t n = shapes[i].n, heads = shapes[i].heads, rows = shapes[i].rows, cols = shapes[i].cols;
      bool transpose = form & 1;
      int64_t margin = form & 4 ? 11 : 0, inputs = transpose ? cols : rows, outputs = transpose ? rows : cols;
      wn_per_head_params params = {.transpose = transpose, .accumulate = (form & 2) != 0};
      twin both = twin_random(b, WN_ACT, 1, 0.5, 0, 3, heads, rows + 5, cols), w = twin_slice(both, 1, 3, rows);
      twin x = twin_random(b, WN_ACT, 2, 1, margin, 3, n, heads, inputs);
      twin y = twin_strided(b, WN_ACT, margin, 3, n, heads, outputs);
      begin_output(b, &y, params.accumulate, 3);
      OK(b->cuda->ops->per_head_linear(b->cuda, &y.cuda, &x.cuda, &w.cuda, &params));
      OK(b->cpu->ops->per_head_linear(b->cpu, &y.cpu, &x.cpu, &w.cpu, &params));
      twin_close(b, "per_head_linear", &y, twin_bf16);
      twin dy = twin_random(b, WN_ACT, 4, 1, margin, 3, n, heads, outputs);
      twin grad = twin_random(b, WN_WGRAD, 5, 1, 0, 3, heads, rows + 5, cols), dw = twin_slice(grad, 1, 3, rows);
      const twin *left = transpose ? &dy : &x, *right = transpose ? &x : &dy;
      OK(b->cuda->ops->per_head_linear_backward_weight(b->cuda, &dw.cuda, &left->cuda, &right->cuda));
      OK(b->cpu->ops->per_head_linear_backward_weight(b->cpu, &dw.cpu, &left->cpu, &right->cpu));
      twin_close(b, "per_head_linear_backward_weight", &grad, twin_f32);
    }
  twin_end(b);
}

enum { EXPERTS = 6 };

typedef struct expert_weights {
  wn_tensor cpu[EXPERTS], cuda[EXPERTS];
  twin each[EXPERTS];
} expert_weights;

/* Each of another stride: `margin` times its number. */
static void make_experts(twin_bench *b, expert_weights *w, wn_role role, uint64_t seed, int64_t margin, int64_t outputs,
                         int64_t inputs) {
  for (int e = 0; e < EXPERTS; e++) {
    w->each[e] = twin_random(b, role, seed + (uint64_t)e, 1, margin * e, 2, outputs, inputs, 0);
    w->cpu[e] = w->each[e].cpu;
    w->cuda[e] = w->each[e].cuda;
  }
}

/* Empty first, middle and last experts; all rows with one; no rows at all; more than a tile of rows. */
static const int64_t expert_offsets[][EXPERTS + 1] = {{0, 0, 40, 41, 41, 170, 170},
                                                      {0, 7, 15, 64, 65, 100, 131},
                                                      {0, 0, 0, 90, 90, 90, 90},
                                                      {0, 0, 0, 0, 0, 0, 0},
                                                      {0, 300, 428, 428, 431, 700, 829}};

/* Widths and strides that the one-launch form takes, and odd ones. */
static const struct expert_shape {
  int64_t inputs, outputs, margin;
} expert_shapes[] = {{96, 64, 0}, {328, 520, 8}, {8, 264, 16}, {45, 27, 5}, {64, 60, 0}};

static void check_experts(twin_bench *b, const int64_t *offset, struct expert_shape s, wn_accumulate params) {
  const int64_t n = offset[EXPERTS];
  expert_weights w, dw;
  make_experts(b, &w, WN_ACT, 1, s.margin, s.outputs, s.inputs);
  make_experts(b, &dw, WN_WGRAD, 101, s.margin, s.outputs, s.inputs);
  twin x = twin_random(b, WN_ACT, 11, 1, s.margin, 2, n, s.inputs, 0);
  twin dy = twin_random(b, WN_ACT, 12, 1, s.margin, 2, n, s.outputs, 0);
  twin y = twin_strided(b, WN_ACT, s.margin, 2, n, s.outputs, 0);
  twin dx = twin_strided(b, WN_ACT, s.margin, 2, n, s.inputs, 0);
  begin_output(b, &y, params.accumulate, 13);
  begin_output(b, &dx, params.accumulate, 14);
  OK(b->cuda->ops->grouped_linear(b->cuda, &y.cuda, &x.cuda, w.cuda, EXPERTS, offset, &params));
  OK(b->cpu->ops->grouped_linear(b->cpu, &y.cpu, &x.cpu, w.cpu, EXPERTS, offset, &params));
  twin_close(b, "grouped_linear", &y, twin_bf16);
  OK(b->cuda->ops->grouped_linear_backward_input(b->cuda, &dx.cuda, &dy.cuda, w.cuda, EXPERTS, offset, &params));
  OK(b->cpu->ops->grouped_linear_backward_input(b->cpu, &dx.cpu, &dy.cpu, w.cpu, EXPERTS, offset, &params));
  twin_close(b, "grouped_linear_backward_input", &dx, twin_bf16);
  OK(b->cuda->ops->grouped_linear_backward_weight(b->cuda, dw.cuda, &dy.cuda, &x.cuda, EXPERTS, offset));
  OK(b->cpu->ops->grouped_linear_backward_weight(b->cpu, dw.cpu, &dy.cpu, &x.cpu, EXPERTS, offset));
  for (int e = 0; e < EXPERTS; e++) twin_close(b, "grouped_linear_backward_weight", &dw.each[e], twin_f32);
}

static void experts_match(void **state) {
  twin_bench *b = twin_begin(state);
  for (size_t i = 0; i < sizeof expert_offsets / sizeof *expert_offsets; i++)
    for (size_t s = 0; s < sizeof expert_shapes / sizeof *expert_shapes; s++)
      for (int form = 0; form < 2; form++)
        check_experts(b, expert_offsets[i], expert_shapes[s], (wn_accumulate){.accumulate = form});
  twin_end(b);
}

/* What lies around the rows and columns of an output stays as it is. */
static void experts_write_only_their_own(void **state) {
  enum { OUTPUTS = 72, INPUTS = 40, ROWS = 150 };
  static const int64_t offset[] = {3, 60, 140};
  twin_bench *b = twin_begin(state);
  twin w[2], x = twin_random(b, WN_ACT, 1, 1, 0, 2, ROWS, INPUTS, 0);
  twin whole = twin_random(b, WN_ACT, 2, 1, 0, 2, ROWS, OUTPUTS + 16, 0), y = twin_slice(whole, 1, 8, OUTPUTS);
  wn_tensor cpu[2], cuda[2];
  for (int e = 0; e < 2; e++) {
    w[e] = twin_random(b, WN_ACT, 3 + (uint64_t)e, 1, 0, 2, OUTPUTS, INPUTS, 0);
    cpu[e] = w[e].cpu;
    cuda[e] = w[e].cuda;
  }
  OK(b->cuda->ops->grouped_linear(b->cuda, &y.cuda, &x.cuda, cuda, 2, offset, &(wn_accumulate){0}));
  OK(b->cpu->ops->grouped_linear(b->cpu, &y.cpu, &x.cpu, cpu, 2, offset, &(wn_accumulate){0}));
  twin_close(b, "grouped_linear, a slice", &whole, twin_bf16);
  const twin before = twin_slice(whole, 0, 0, 3), after = twin_slice(whole, 0, 140, 10);
  const twin left = twin_slice(whole, 1, 0, 8), right = twin_slice(whole, 1, 8 + OUTPUTS, 8);
  twin_close(b, "rows before", &before, 0);
  twin_close(b, "rows after", &after, 0);
  twin_close(b, "columns before", &left, 0);
  twin_close(b, "columns after", &right, 0);
  twin_end(b);
}

/* More experts than one launch takes; every third has no rows. */
static void hundreds_of_experts_match(void **state) {
  enum { N = 201, INPUTS = 24, OUTPUTS = 16 };
  twin_bench *b = twin_begin(state);
  int64_t offset[N + 1] = {0};
  wn_tensor cpu[N], cuda[N], dcpu[N], dcuda[N];
  for (int e = 0; e < N; e++) offset[e + 1] = offset[e] + (e % 3 ? e % 5 : 0);
  twin w = twin_random(b, WN_ACT, 1, 1, 0, 3, N, OUTPUTS, INPUTS),
       dw = twin_random(b, WN_WGRAD, 2, 1, 0, 3, N, OUTPUTS, INPUTS);
  for (int e = 0; e < N; e++) {
    const twin we = twin_slice(w, 0, e, 1), de = twin_slice(dw, 0, e, 1);
    cpu[e] = wn_tensor_view(we.cpu, 2, OUTPUTS, INPUTS, 0, 0);
    cuda[e] = wn_tensor_view(we.cuda, 2, OUTPUTS, INPUTS, 0, 0);
    dcpu[e] = wn_tensor_view(de.cpu, 2, OUTPUTS, INPUTS, 0, 0);
    dcuda[e] = wn_tensor_view(de.cuda, 2, OUTPUTS, INPUTS, 0, 0);
  }
  twin x = twin_random(b, WN_ACT, 3, 1, 0, 2, offset[N], INPUTS, 0),
       y = twin_tensor(b, WN_ACT, 2, offset[N], OUTPUTS, 0);
  twin_poison(b, &y);
  OK(b->cuda->ops->grouped_linear(b->cuda, &y.cuda, &x.cuda, cuda, N, offset, &(wn_accumulate){0}));
  OK(b->cpu->ops->grouped_linear(b->cpu, &y.cpu, &x.cpu, cpu, N, offset, &(wn_accumulate){0}));
  twin_close(b, "grouped_linear", &y, twin_bf16);
  twin dy = twin_random(b, WN_ACT, 4, 1, 0, 2, offset[N], OUTPUTS, 0);
  OK(b->cuda->ops->grouped_linear_backward_weight(b->cuda, dcuda, &dy.cuda, &x.cuda, N, offset));
  OK(b->cpu->ops->grouped_linear_backward_weight(b->cpu, dcpu, &dy.cpu, &x.cpu, N, offset));
  twin_close(b, "grouped_linear_backward_weight", &dw, twin_f32);
  twin_end(b);
}

/* The last rows of an output that begins 2^32 bytes before them. */
static void more_than_two_to_the_31_elements(void **state) {
  enum { ROWS = 70001, INPUTS = 16, OUTPUTS = 32768, LAST = 3 };
  twin_bench *b = twin_begin(state);
  twin x = twin_random(b, WN_ACT, 1, 1, 0, 2, ROWS, INPUTS, 0), end = twin_slice(x, 0, ROWS - LAST, LAST);
  twin w = twin_random(b, WN_ACT, 2, 1, 0, 2, OUTPUTS, INPUTS, 0);
  twin y = {.role = WN_ACT};
  wn_tensor whole;
  OK(wn_device_tensor(b->cuda, &whole, b->cuda->stash, "test", WN_ACT, 2, ROWS, OUTPUTS, 0, 0));
  OK(wn_device_tensor(b->cpu, &y.cpu, b->cpu->stash, "test", WN_ACT, 2, LAST, OUTPUTS, 0, 0));
  y.cuda = wn_tensor_slice(whole, 0, ROWS - LAST, LAST);
  OK(b->cuda->ops->linear(b->cuda, &whole, &x.cuda, &w.cuda, &(wn_accumulate){0}));
  OK(b->cpu->ops->linear(b->cpu, &y.cpu, &end.cpu, &w.cpu, &(wn_accumulate){0}));
  twin_close(b, "the last rows", &y, twin_bf16);
  twin_end(b);
}

/* ---- twenty times the same bits: many rows and small outputs, where a sum may be cut among blocks ---- */

typedef struct repeated {
  twin x, dy, w, y, dx, dw, dy32, dw32, xh, dyh, wh, yh, dwh;
  int64_t offset[4];
} repeated;

static void run_all(wn_device *device, void *context) {
  repeated *r = context;
  wn_tensor w[3], dw[3], one = wn_tensor_slice(r->dw.cuda, 0, 0, r->w.cuda.dim[0]);
  for (int e = 0; e < 3; e++) {
    w[e] = r->w.cuda;
    dw[e] = wn_tensor_slice(r->dw.cuda, 0, e * one.dim[0], one.dim[0]);
  }
  OK(device->ops->linear(device, &r->y.cuda, &r->x.cuda, &r->w.cuda, &(wn_accumulate){0}));
  OK(device->ops->linear_backward_input(device, &r->dx.cuda, &r->dy.cuda, &r->w.cuda, &(wn_accumulate){0}));
  OK(device->ops->linear_backward_weight(device, &one, &r->dy.cuda, &r->x.cuda));
  OK(device->ops->linear_backward_weight(device, &r->dw32.cuda, &r->dy32.cuda, &r->x.cuda));
  OK(device->ops->per_head_linear(device, &r->yh.cuda, &r->xh.cuda, &r->wh.cuda, &(wn_per_head_params){0}));
  OK(device->ops->per_head_linear_backward_weight(device, &r->dwh.cuda, &r->xh.cuda, &r->dyh.cuda));
  OK(device->ops->grouped_linear(device, &r->y.cuda, &r->x.cuda, w, 3, r->offset, &(wn_accumulate){true}));
  OK(device->ops->grouped_linear_backward_input(device, &r->dx.cuda, &r->dy.cuda, w, 3, r->offset,
                                                &(wn_accumulate){true}));
  OK(device->ops->grouped_linear_backward_weight(device, dw, &r->dy.cuda, &r->x.cuda, 3, r->offset));
}

static void repeats_bit_for_bit(void **state) {
  enum { N = 5000, I = 1024, O = 64 };
  twin_bench *b = twin_begin(state);
  repeated r = {.x = twin_random(b, WN_ACT, 1, 1, 0, 2, N, I, 0),
                .dy = twin_random(b, WN_ACT, 2, 1, 0, 2, N, O, 0),
                .w = twin_random(b, WN_ACT, 3, 1, 0, 2, O, I, 0),
                .y = twin_tensor(b, WN_ACT, 2, N, O, 0),
                .dx = twin_tensor(b, WN_ACT, 2, N, I, 0),
                .dw = twin_tensor(b, WN_WGRAD, 2, 3 * O, I, 0),
                .dy32 = twin_random(b, WN_STAT, 4, 1, 0, 2, N, O, 0),
                .dw32 = twin_tensor(b, WN_WGRAD, 2, O, I, 0),
                .xh = twin_random(b, WN_ACT, 5, 1, 0, 3, N, 4, 32),
                .dyh = twin_random(b, WN_ACT, 6, 1, 0, 3, N, 4, 48),
                .wh = twin_random(b, WN_ACT, 7, 1, 0, 3, 4, 32, 48),
                .yh = twin_tensor(b, WN_ACT, 3, N, 4, 48),
                .dwh = twin_tensor(b, WN_WGRAD, 3, 4, 32, 48),
                .offset = {0, 1700, 1701, N}};
  const twin_out outs[] = {{&r.y, false},   {&r.dx, false}, {&r.dw, true},
                           {&r.dw32, true}, {&r.yh, false}, {&r.dwh, true}};
  twin_repeats(b, run_all, &r, outs, sizeof outs / sizeof *outs);
  twin_end(b);
}

/* ---- the sum of a reduce-scatter ---- */

/* src/dist/collective.c's order, in place. */
static void add_pairwise(float *piece, float *received, int32_t size, int64_t n) {
  for (int32_t step = 1; step < size; step *= 2)
    for (int32_t r = 0; r + step < size; r += 2 * step)
      for (int64_t i = 0; i < n; i++) received[r * n + i] += received[(r + step) * n + i];
  for (int64_t i = 0; i < n; i++) piece[i] += received[i];
}

static void pieces_are_summed_as_on_the_cpu(void **state) {
  static const int32_t sizes[] = {1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 23, 24, 100};
  static const int64_t counts[] = {1, 3, 4, 1000, 4099, 300000};
  twin_bench *b = twin_begin(state);
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++)
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
      const int32_t size = sizes[s];
      const int64_t n = size > 24 && counts[c] > 5000 ? 5000 : counts[c];
      twin received = twin_random(b, WN_WGRAD, 1, 1, 0, 2, size, n, 0);
      twin piece = twin_random(b, WN_WGRAD, 2, 1, 0, 1, n, 0, 0);
      wn_tensor all = twin_download(b, &received.cuda), expected = twin_download(b, &piece.cuda);
      OK(wn_cuda_sum_pieces(b->cuda, wn_cuda_compute_queue(b->cuda), piece.cuda.data, received.cuda.data, size, n));
      add_pairwise(expected.data, all.data, size, n);
      wn_tensor got = twin_download(b, &piece.cuda);
      if (memcmp(got.data, expected.data, (size_t)n * sizeof(float)) != 0)
        fail_msg("%d contributions of %lld elements are not summed in order", size, (long long)n);
      free(all.data);
      free(expected.data);
      free(got.data);
      OK(wn_cuda_synchronize(b->cuda));
      wn_arena_release(b->cuda->stash, 0);
      wn_arena_release(b->cpu->stash, 0);
    }
  twin_end(b);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(linear_matches),
      cmocka_unit_test(weight_gradients_match),
      cmocka_unit_test(an_fp32_gradient_keeps_its_bits),
      cmocka_unit_test(no_rows_are_fine),
      cmocka_unit_test(per_head_matches),
      cmocka_unit_test(experts_match),
      cmocka_unit_test(experts_write_only_their_own),
      cmocka_unit_test(hundreds_of_experts_match),
      cmocka_unit_test(more_than_two_to_the_31_elements),
      cmocka_unit_test(repeats_bit_for_bit),
      cmocka_unit_test(pieces_are_summed_as_on_the_cpu),
  };
  return cmocka_run_group_tests(tests, twin_setup, twin_teardown);
}
