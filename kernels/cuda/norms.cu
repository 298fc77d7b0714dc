/* RMSNorm and LayerNorm, forward and backward. Sums are in FP32 over a row held in registers.
 *
 * A row belongs to `lanes` neighbouring threads (a power of two), each with up to four packs of eight elements: a row
 * of 128 has 4 threads, one of 7168 the whole block. A block walks over rows with its part of the weights in registers.
 *
 * Forward: each row is read once, the next one while this one is summed.
 * Backward: x and dy are read once, the next row's on its way to shared memory while this row's sums are made, and dx
 * is written in the same pass. A block owns a fixed range of rows and keeps its share of dw (and db) in registers;
 * blocks write theirs to scratch, and a second kernel adds them in order.
 *
 * Ladder, one H200, n = 131072 rows, share of the copy rate of 4.24 TB/s:
 *                                             [n,7168]        [n,1536]        [n,512]
 *   rms_norm                                  0.98 ms  90%    0.218 ms  87%   0.082 ms  77%
 *   more rounds of shorter blocks             0.97 ms  91%    0.214 ms  89%   0.075 ms  84%
 *   rms_norm_backward, rows to registers      1.54 ms  86%    0.372 ms  77%   0.125 ms  76%
 *   the next row on its way to shared memory  1.43 ms  93%    0.324 ms  88%   0.127 ms  75%
 *
 * Widths that are no multiple of 8, too wide (8192; 4096 for LayerNorm), or rows off 16-byte addresses take the plain
 * kernels at the end. */
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/pack.cuh"

enum { THREADS = 256, PACK = 8 };
/* The most packs of a row that a thread has: LayerNorm, which is for narrow rows, keeps two sums a column. */
__host__ __device__ constexpr int packs_of(bool layer) {
  return layer ? 2 : 4;
}
/* Blocks of a backward: two on each of 132 multiprocessors. Sums depend on it, so it does not follow the GPU. */
enum { PARTS = 264, PLAIN_PARTS = 64 };

typedef wn_view<wn_bf16> view;
typedef wn_pack<wn_bf16, PACK> eight;

typedef struct norm_shape {
  int64_t n;
  int32_t width, lanes;
  float eps;
  bool accumulate;
} norm_shape;

/* ---- sums over the threads of a row ---- */

typedef struct row_sums {
  float part[2][THREADS / 32]; /* two, in turn: one barrier a sum is then enough */
} row_sums;

/* The sum over the row's threads, in each of them; where a row is wider than a warp all threads of the block take part.
 * `turn` goes 0, 1, 0 ... from call to call. */
__device__ __forceinline__ float row_sum(float x, int lanes, row_sums *shared, int *turn) {
  for (int o = (lanes < 32 ? lanes : 32) / 2; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  if (lanes <= 32) return x;
  float *part = shared->part[*turn];
  *turn ^= 1;
  const int warp = (int)threadIdx.x / 32, warps = lanes / 32;
  if (threadIdx.x % 32 == 0) part[warp] = x;
  __syncthreads();
  x = 0;
  for (int i = 0; i < warps; i++) x += part[warp / warps * warps + i];
  return x;
}

/* This thread's packs of a row; zeros where it has none. */
template <int PACKS, typename T>
__device__ __forceinline__ void load_row(wn_pack<T, PACK> p[PACKS], const T *row, bool live, int lane, int lanes,
                                         int packs) {
#pragma unroll
  for (int v = 0; v < PACKS; v++) {
    const int at = lane + v * lanes;
    p[v] = live && at < packs ? wn_pack_load<T, PACK>(row + (int64_t)at * PACK) : wn_pack_zero<T, PACK>();
  }
}

/* ---- forward ---- */

typedef struct norm_stat {
  float mean, r;
} norm_stat;

template <bool LAYER>
__device__ __forceinline__ norm_stat row_stat(const eight *x, const norm_shape &s, int lane, row_sums *shared,
                                              int *turn) {
  constexpr int PACKS = packs_of(LAYER);
  const int packs = s.width / PACK;
  const float by = 1.0f / (float)s.width;
  norm_stat stat = {0, 0};
  float sum = 0, squares = 0, e[PACK];
  if (LAYER) {
#pragma unroll
    for (int v = 0; v < PACKS; v++) {
      wn_unpack<PACK>(e, x[v]);
#pragma unroll
      for (int j = 0; j < PACK; j++) sum += e[j];
    }
    stat.mean = row_sum(sum, s.lanes, shared, turn) * by;
  }
#pragma unroll
  for (int v = 0; v < PACKS; v++) {
    if (LAYER && lane + v * s.lanes >= packs) continue; /* absent elements are no zeros once the mean is taken off */
    wn_unpack<PACK>(e, x[v]);
#pragma unroll
    for (int j = 0; j < PACK; j++) squares += (e[j] - stat.mean) * (e[j] - stat.mean);
  }
  stat.r = rsqrtf(row_sum(squares, s.lanes, shared, turn) * by + s.eps);
  return stat;
}

/* stat: [n] r, or with LAYER [n,2] mean and r, rows stat_row apart. */
template <bool LAYER>
__global__ void __launch_bounds__(THREADS, 3)
    norm_kernel(view y, float *stat, int64_t stat_row, view x, const wn_bf16 *w, const wn_bf16 *b, norm_shape s) {
  constexpr int PACKS = packs_of(LAYER);
  __shared__ row_sums shared;
  const int group = (int)threadIdx.x / s.lanes, lane = (int)threadIdx.x % s.lanes, groups = THREADS / s.lanes;
  const int packs = s.width / PACK;
  const int64_t step = (int64_t)gridDim.x * groups;
  int turn = 0;
  eight now[PACKS], next[PACKS], weight[PACKS], bias[PACKS];
  load_row<PACKS>(weight, w, true, lane, s.lanes, packs);
  if (LAYER) load_row<PACKS>(bias, b, true, lane, s.lanes, packs);
  int64_t row = (int64_t)blockIdx.x * groups + group;
  load_row<PACKS>(now, x.data + row * x.row, row < s.n, lane, s.lanes, packs);
  for (int64_t first = (int64_t)blockIdx.x * groups; first < s.n; first += step, row += step) {
    load_row<PACKS>(next, x.data + (row + step) * x.row, row + step < s.n, lane, s.lanes, packs);
    const norm_stat of = row_stat<LAYER>(now, s, lane, &shared, &turn);
    if (row < s.n) {
      if (lane == 0) {
        if (LAYER) stat[row * stat_row] = of.mean;
        stat[row * stat_row + LAYER] = of.r;
      }
#pragma unroll
      for (int v = 0; v < PACKS; v++) {
        const int at = lane + v * s.lanes;
        if (at >= packs) continue;
        float e[PACK], we[PACK], be[PACK];
        wn_pack_forget(now[v]);
        wn_unpack<PACK>(e, now[v]);
        wn_unpack<PACK>(we, weight[v]);
        if (LAYER) wn_unpack<PACK>(be, bias[v]);
#pragma unroll
        for (int j = 0; j < PACK; j++) e[j] = (e[j] - of.mean) * of.r * we[j] + (LAYER ? be[j] : 0.0f);
        wn_pack_store<PACK>(y.data + row * y.row + (int64_t)at * PACK, e);
      }
    }
#pragma unroll
    for (int v = 0; v < PACKS; v++) now[v] = next[v];
  }
}

/* ---- backward ---- */

/* What a backward kernel reads and writes. dx.data null: not wanted; part_w [parts, width] null: no weight gradient. */
template <typename TDy> struct backward_operands {
  view dx;
  wn_view<TDy> dy;
  view x;
  const float *stat;
  int64_t stat_row;
  const wn_bf16 *w;
  float *part_w, *part_b;
  int64_t rows_per_part;
};

/* Sums one thread's columns over the block's rows: through shared memory, group by group, to row `blockIdx.x` of
 * part. */
template <int PACKS>
__device__ __forceinline__ void write_part(float *part, float sum[PACKS][PACK], float *shared, const norm_shape &s) {
  const int group = (int)threadIdx.x / s.lanes, lane = (int)threadIdx.x % s.lanes, groups = THREADS / s.lanes;
  const int room = s.lanes * PACKS * PACK; /* columns a group has room for */
  __syncthreads();
#pragma unroll
  for (int v = 0; v < PACKS; v++) wn_pack_store<PACK>(shared + group * room + (lane + v * s.lanes) * PACK, sum[v]);
  __syncthreads();
  for (int c = (int)threadIdx.x; c < s.width; c += THREADS) {
    float total = 0;
    for (int g = 0; g < groups; g++) total += shared[g * room + c];
    part[(int64_t)blockIdx.x * s.width + c] = total;
  }
}

/* What a thread of a backward has under way of one row, in shared memory: only the thread itself reads it, so that no
 * barrier is needed. */
template <int PACKS, typename TDy> struct row_stage {
  wn_pack<wn_bf16, PACK> x[PACKS][THREADS], old[PACKS][THREADS];
  wn_pack<TDy, PACK> dy[PACKS][THREADS];
};
template <int PACKS, typename TDy> union backward_shared {
  row_stage<PACKS, TDy> stage[2];
  float fold[THREADS * PACKS * PACK];
};

template <typename T>
__device__ __forceinline__ void fetch_pack(wn_pack<T, PACK> *to, const T *from, bool live, const T *valid) {
  const char *source = (const char *)(live ? from : valid);
#pragma unroll
  for (int i = 0; i < (int)(sizeof *to / 16); i++)
    wn_cp_async_16(wn_shared_address(to) + 16 * i, source + 16 * i, live ? 16 : 0);
}

/* This thread's packs of row `row` of x, dy and, accumulating, dx; zeros where it has none. */
template <int PACKS, typename TDy>
__device__ __forceinline__ void fetch_row(row_stage<PACKS, TDy> *stage, const backward_operands<TDy> &o, int64_t row,
                                          bool live, int lane, const norm_shape &s) {
#pragma unroll
  for (int v = 0; v < PACKS; v++) {
    const int at = lane + v * s.lanes, t = (int)threadIdx.x;
    const bool mine = live && at < s.width / PACK;
    const int64_t column = (int64_t)at * PACK;
    fetch_pack(&stage->x[v][t], o.x.data + row * o.x.row + column, mine, o.x.data);
    fetch_pack(&stage->dy[v][t], o.dy.data + row * o.dy.row + column, mine, o.dy.data);
    if (s.accumulate) fetch_pack(&stage->old[v][t], o.dx.data + row * o.dx.row + column, mine, o.dx.data);
  }
  wn_cp_async_commit();
}

template <bool LAYER, typename TDy>
__device__ __forceinline__ norm_stat fetch_stat(const backward_operands<TDy> &o, int64_t row, bool live) {
  norm_stat of = {0, 0};
  if (live && LAYER) of.mean = o.stat[row * o.stat_row];
  if (live) of.r = o.stat[row * o.stat_row + LAYER];
  return of;
}

/* g = w dy, and its two sums over the row: of g and of g xhat (LAYER), or of g x. */
template <bool LAYER, int PACKS, typename TDy>
__device__ __forceinline__ float2 backward_sums(const row_stage<PACKS, TDy> *stage, const eight w[PACKS],
                                                norm_stat of) {
  float2 sum = {0, 0};
#pragma unroll
  for (int v = 0; v < PACKS; v++) {
    float d[PACK], e[PACK], we[PACK];
    wn_unpack<PACK>(d, stage->dy[v][threadIdx.x]);
    wn_unpack<PACK>(e, stage->x[v][threadIdx.x]);
    wn_unpack<PACK>(we, w[v]);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const float g = we[j] * d[j];
      if (LAYER) sum.x += g;
      sum.y += g * (LAYER ? (e[j] - of.mean) * of.r : e[j]);
    }
  }
  return sum;
}

/* rms: dx (+)= r (g - x r^2 mean(g x)), dw += dy x r; LAYER: dx (+)= r (g - mean(g) - xhat mean(g xhat)),
 * dw += dy xhat, db += dy. */
template <bool LAYER, typename TDy>
__global__ void __launch_bounds__(THREADS, 2) norm_backward_kernel(backward_operands<TDy> o, norm_shape s) {
  constexpr int PACKS = packs_of(LAYER);
  extern __shared__ __align__(16) char dynamic[];
  backward_shared<PACKS, TDy> *shared = (backward_shared<PACKS, TDy> *)dynamic;
  __shared__ row_sums sums;
  const int group = (int)threadIdx.x / s.lanes, lane = (int)threadIdx.x % s.lanes, groups = THREADS / s.lanes;
  const float by = 1.0f / (float)s.width;
  const int64_t from = blockIdx.x * o.rows_per_part, end = from + o.rows_per_part < s.n ? from + o.rows_per_part : s.n;
  int turn = 0, now = 0;
  float dw[PACKS][PACK] = {}, db[PACKS][PACK] = {};
  eight w[PACKS];
  int64_t row = from + group;
  fetch_row<PACKS, TDy>(&shared->stage[0], o, row, row < end, lane, s);
  norm_stat next = fetch_stat<LAYER, TDy>(o, row, row < end);
  load_row<PACKS>(w, o.w, true, lane, s.lanes, s.width / PACK);
  for (int64_t first = from; first < end; first += groups, row += groups, now ^= 1) {
    const norm_stat of = next;
    fetch_row<PACKS, TDy>(&shared->stage[now ^ 1], o, row + groups, row + groups < end, lane, s);
    next = fetch_stat<LAYER, TDy>(o, row + groups, row + groups < end);
    wn_cp_async_wait<1>();
    const row_stage<PACKS, TDy> *stage = &shared->stage[now];
    const float2 sum = backward_sums<LAYER, PACKS, TDy>(stage, w, of);
    const float shift = LAYER ? row_sum(sum.x, s.lanes, &sums, &turn) * by : 0.0f;
    const float pull = row_sum(sum.y, s.lanes, &sums, &turn) * by * (LAYER ? 1.0f : of.r * of.r);
#pragma unroll
    for (int v = 0; v < PACKS; v++) {
      const int at = lane + v * s.lanes;
      float d[PACK], e[PACK], we[PACK], to[PACK] = {};
      wn_pack_forget(w[v]);
      wn_unpack<PACK>(d, stage->dy[v][threadIdx.x]);
      wn_unpack<PACK>(e, stage->x[v][threadIdx.x]);
      wn_unpack<PACK>(we, w[v]);
      if (s.accumulate) wn_unpack<PACK>(to, stage->old[v][threadIdx.x]);
#pragma unroll
      for (int j = 0; j < PACK; j++) {
        if (LAYER) e[j] = (e[j] - of.mean) * of.r;
        to[j] += of.r * (we[j] * d[j] - shift - e[j] * pull);
        dw[v][j] += d[j] * (LAYER ? e[j] : e[j] * of.r);
        if (LAYER) db[v][j] += d[j];
      }
      if (row < end && at < s.width / PACK && o.dx.data)
        wn_pack_store<PACK>(o.dx.data + row * o.dx.row + (int64_t)at * PACK, to);
    }
  }
  wn_cp_async_wait<0>(); /* the memory is about to hold other things */
  if (o.part_w) write_part<PACKS>(o.part_w, dw, shared->fold, s);
  if (LAYER) write_part<PACKS>(o.part_b, db, shared->fold, s);
}

/* dw[c] += sum over parts of part[p][c], and below it in the grid the same of db: eight threads a column, each with
 * every eighth part. */
__global__ static void fold_kernel(float *dw, float *db, const float *part, int parts, int width) {
  __shared__ double sums[8][32];
  const int x = (int)threadIdx.x, y = (int)threadIdx.y, c = (int)blockIdx.x * 32 + x;
  const float *from = part + (int64_t)blockIdx.y * parts * width;
  double sum = 0;
  for (int p = y; c < width && p < parts; p += 8) sum += (double)from[(int64_t)p * width + c];
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || c >= width) return;
  for (int i = 1; i < 8; i++) sum += sums[i][x];
  (blockIdx.y == 0 ? dw : db)[c] += (float)sum;
}

/* ---- any width, any alignment: a block a row, the row read again for each step ---- */

__device__ __forceinline__ float block_sum(float x, row_sums *shared, int *turn) {
  return row_sum(x, THREADS, shared, turn);
}

template <bool LAYER>
__global__ void plain_kernel(view y, float *stat, int64_t stat_row, view x, const wn_bf16 *w, const wn_bf16 *b,
                             norm_shape s) {
  __shared__ row_sums shared;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < s.n; row += gridDim.x) {
    const wn_bf16 *from = x.data + row * x.row;
    float sum = 0, squares = 0, mean = 0;
    if (LAYER) {
      for (int j = (int)threadIdx.x; j < s.width; j += THREADS) sum += wn_wide(from[j]);
      mean = block_sum(sum, &shared, &turn) / (float)s.width;
    }
    for (int j = (int)threadIdx.x; j < s.width; j += THREADS)
      squares += (wn_wide(from[j]) - mean) * (wn_wide(from[j]) - mean);
    const float r = rsqrtf(block_sum(squares, &shared, &turn) / (float)s.width + s.eps);
    if (threadIdx.x == 0) {
      if (LAYER) stat[row * stat_row] = mean;
      stat[row * stat_row + LAYER] = r;
    }
    for (int j = (int)threadIdx.x; j < s.width; j += THREADS) {
      const float e = (wn_wide(from[j]) - mean) * r * wn_wide(w[j]);
      y.data[row * y.row + j] = wn_narrow<wn_bf16>(LAYER ? e + wn_wide(b[j]) : e);
    }
  }
}

template <bool LAYER, typename TDy> __global__ void plain_input_kernel(backward_operands<TDy> o, norm_shape s) {
  __shared__ row_sums sums;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < s.n; row += gridDim.x) {
    const TDy *dy = o.dy.data + row * o.dy.row;
    const wn_bf16 *x = o.x.data + row * o.x.row;
    wn_bf16 *dx = o.dx.data + row * o.dx.row;
    const float mean = LAYER ? o.stat[row * o.stat_row] : 0.0f, r = o.stat[row * o.stat_row + LAYER];
    float of_g = 0, of_gx = 0;
    for (int j = (int)threadIdx.x; j < s.width; j += THREADS) {
      const float g = wn_wide(o.w[j]) * wn_wide(dy[j]);
      of_g += g;
      of_gx += g * (wn_wide(x[j]) - mean) * r;
    }
    const float shift = LAYER ? block_sum(of_g, &sums, &turn) / (float)s.width : 0.0f;
    const float pull = block_sum(of_gx, &sums, &turn) / (float)s.width;
    for (int j = (int)threadIdx.x; j < s.width; j += THREADS) {
      const float hat = (wn_wide(x[j]) - mean) * r;
      const float d = r * (wn_wide(o.w[j]) * wn_wide(dy[j]) - shift - hat * pull);
      dx[j] = wn_narrow<wn_bf16>(s.accumulate ? wn_wide(dx[j]) + d : d);
    }
  }
}

/* A thread a column, a block of them and a range of rows. */
template <bool LAYER, typename TDy> __global__ void plain_weight_kernel(backward_operands<TDy> o, norm_shape s) {
  const int c = (int)(blockIdx.x * THREADS + threadIdx.x);
  if (c >= s.width) return;
  const int64_t from = blockIdx.y * o.rows_per_part, end = from + o.rows_per_part < s.n ? from + o.rows_per_part : s.n;
  float dw = 0, db = 0;
  for (int64_t row = from; row < end; row++) {
    const float d = wn_wide(o.dy.data[row * o.dy.row + c]), r = o.stat[row * o.stat_row + LAYER];
    const float mean = LAYER ? o.stat[row * o.stat_row] : 0.0f;
    dw += d * ((wn_wide(o.x.data[row * o.x.row + c]) - mean) * r);
    db += d;
  }
  o.part_w[(int64_t)blockIdx.y * s.width + c] = dw;
  if (LAYER) o.part_b[(int64_t)blockIdx.y * s.width + c] = db;
}

/* ---- launching ---- */

/* [n, width], rows free, columns dense. */
template <typename T> static wn_view<T> matrix_of(const wn_tensor *t, int64_t n, int64_t width) {
  WN_ASSERT(t->rank == 2 && t->dim[0] == n && t->dim[1] == width, "rank %d [%lld,%lld], expected [%lld,%lld]", t->rank,
            (long long)t->dim[0], (long long)t->dim[1], (long long)n, (long long)width);
  return wn_view_of<T>(t);
}

/* [width], dense. */
template <typename T> static T *vector_of(const wn_tensor *t, int64_t width) {
  WN_ASSERT(t->rank == 1 && t->dim[0] == width && (width <= 1 || t->stride[0] == 1), "rank %d [%lld] stride %lld",
            t->rank, (long long)t->dim[0], (long long)t->stride[0]);
  return wn_view_of<T>(t).data;
}

static norm_shape shape_of(const wn_tensor *x, const wn_norm_params *params, bool layer) {
  WN_ASSERT(x->rank == 2 && x->dim[1] >= 1 && x->dim[1] < INT32_MAX, "a norm over rank %d", x->rank);
  norm_shape s = {x->dim[0], (int32_t)x->dim[1], 1, (float)params->eps, params->accumulate};
  while (s.lanes < THREADS && (int64_t)s.lanes * packs_of(layer) * PACK < s.width) s.lanes *= 2;
  return s;
}

/* [n] or [n,2], as the backward and the forward index it. */
static float *stat_of(const wn_tensor *t, int64_t n, bool layer, int64_t *row) {
  wn_view<float> v = wn_view_of<float>(t);
  WN_ASSERT(t->rank == (layer ? 2 : 1) && v.n == n && v.width == (layer ? 2 : 1), "norm statistics of rank %d [%lld]",
            t->rank, (long long)v.n);
  *row = v.row;
  return v.data;
}

static int32_t most_width(bool layer) {
  return THREADS * packs_of(layer) * PACK;
}

static bool packs(const void *p) {
  return (uintptr_t)p % 16 == 0;
}

template <bool LAYER>
static wn_status forward(wn_device *device, wn_tensor *y, wn_tensor *stat, const wn_tensor *x, const wn_tensor *w,
                         const wn_tensor *b, const wn_norm_params *params) {
  const norm_shape s = shape_of(x, params, LAYER);
  const view from = matrix_of<wn_bf16>(x, s.n, s.width), to = matrix_of<wn_bf16>(y, s.n, s.width);
  const wn_bf16 *weight = vector_of<wn_bf16>(w, s.width), *bias = b ? vector_of<wn_bf16>(b, s.width) : NULL;
  int64_t stat_row;
  float *stats = stat_of(stat, s.n, LAYER, &stat_row);
  if (s.n == 0) return NULL;
  const int64_t sms = wn_cuda_of(device)->n_sms;
  cudaStream_t stream = wn_cuda_stream(device);
  if (s.width <= most_width(LAYER) && wn_view_vectors(from) && wn_view_vectors(to) && packs(weight) && packs(bias)) {
    /* three at once on a multiprocessor; several rounds of them end closer together (LayerNorm, narrow, lost by it) */
    const int64_t blocks = wn_ceil_div(s.n, THREADS / s.lanes), most = sms * 3 * (LAYER ? 1 : 8);
    norm_kernel<LAYER>
        <<<(unsigned)(blocks < most ? blocks : most), THREADS, 0, stream>>>(to, stats, stat_row, from, weight, bias, s);
  } else {
    const int64_t most = sms * 8;
    plain_kernel<LAYER>
        <<<(unsigned)(s.n < most ? s.n : most), THREADS, 0, stream>>>(to, stats, stat_row, from, weight, bias, s);
  }
  WN_CUDA_LAUNCHED("norm");
  return NULL;
}

/* db may be null. */
static wn_status fold(wn_device *device, float *dw, float *db, const float *part, int64_t parts, int32_t width) {
  const dim3 grid((unsigned)wn_ceil_div(width, 32), db ? 2 : 1);
  fold_kernel<<<grid, dim3(32, 8), 0, wn_cuda_stream(device)>>>(dw, db, part, (int)parts, width);
  WN_CUDA_LAUNCHED("norm weight gradient");
  return NULL;
}

template <bool LAYER, typename TDy>
static wn_status launch_backward(wn_device *device, backward_operands<TDy> *o, norm_shape s, int64_t parts,
                                 bool packed) {
  cudaStream_t stream = wn_cuda_stream(device);
  if (packed) {
    const size_t bytes = sizeof(backward_shared<packs_of(LAYER), TDy>);
    WN_CUDA_TRY(cudaFuncSetAttribute(norm_backward_kernel<LAYER, TDy>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)bytes));
    norm_backward_kernel<LAYER, TDy><<<(unsigned)parts, THREADS, bytes, stream>>>(*o, s);
    WN_CUDA_LAUNCHED("norm backward");
    return NULL;
  }
  if (o->dx.data) {
    const int64_t most = (int64_t)wn_cuda_of(device)->n_sms * 8;
    plain_input_kernel<LAYER, TDy><<<(unsigned)(s.n < most ? s.n : most), THREADS, 0, stream>>>(*o, s);
    WN_CUDA_LAUNCHED("norm backward");
  }
  if (o->part_w) {
    const dim3 grid((unsigned)wn_ceil_div(s.width, THREADS), (unsigned)parts);
    plain_weight_kernel<LAYER, TDy><<<grid, THREADS, 0, stream>>>(*o, s);
    WN_CUDA_LAUNCHED("norm backward");
  }
  return NULL;
}

/* dx, dw, db may be null, db always where LAYER is false. */
template <bool LAYER, typename TDy>
static wn_status backward(wn_device *device, wn_tensor *dx, wn_tensor *dw, wn_tensor *db, const wn_tensor *dy,
                          const wn_tensor *x, const wn_tensor *stat, const wn_tensor *w, const wn_norm_params *params) {
  norm_shape s = shape_of(x, params, LAYER);
  backward_operands<TDy> o = {};
  if (dx)
    o.dx = matrix_of<wn_bf16>(dx, s.n, s.width);
  else
    s.accumulate = false;
  o.dy = matrix_of<TDy>(dy, s.n, s.width);
  o.x = matrix_of<wn_bf16>(x, s.n, s.width);
  o.stat = stat_of(stat, s.n, LAYER, &o.stat_row);
  o.w = vector_of<wn_bf16>(w, s.width);
  float *to_w = dw ? vector_of<float>(dw, s.width) : NULL, *to_b = db ? vector_of<float>(db, s.width) : NULL;
  if (s.n == 0) return NULL;
  const bool packed = s.width <= most_width(LAYER) && wn_view_vectors(o.x) && wn_view_vectors(o.dy) &&
                      (!dx || wn_view_vectors(o.dx)) && packs(o.w);
  /* a part takes whole rounds of the block's groups */
  const int64_t groups = packed ? THREADS / s.lanes : 1, rounds = wn_ceil_div(s.n, groups);
  o.rows_per_part = wn_ceil_div(rounds, packed ? PARTS : PLAIN_PARTS) * groups;
  const int64_t parts = wn_ceil_div(s.n, o.rows_per_part);
  size_t mark = wn_arena_mark(device->scratch);
  if (dw) {
    void *memory;
    const int64_t bytes = parts * s.width * (int64_t)sizeof(float);
    WN_TRY(wn_cuda_scratch(device, &memory, "norm weight gradient", bytes * (LAYER ? 2 : 1)));
    o.part_w = (float *)memory;
    o.part_b = LAYER ? o.part_w + parts * s.width : NULL;
  }
  WN_TRY((launch_backward<LAYER, TDy>(device, &o, s, parts, packed)));
  if (dw) WN_TRY(fold(device, to_w, to_b, o.part_w, parts, s.width));
  wn_arena_release(device->scratch, mark);
  return NULL;
}

wn_status wn_cuda_rms_norm(wn_device *device, wn_tensor *y, wn_tensor *r, const wn_tensor *x, const wn_tensor *w,
                           const wn_norm_params *params) {
  return forward<false>(device, y, r, x, w, NULL, params);
}

wn_status wn_cuda_rms_norm_backward(wn_device *device, wn_tensor *dx, wn_tensor *dw, const wn_tensor *dy,
                                    const wn_tensor *x, const wn_tensor *r, const wn_tensor *w,
                                    const wn_norm_params *params) {
  WN_ASSERT(dx, "rms_norm_backward without dx");
  return backward<false, wn_bf16>(device, dx, dw, NULL, dy, x, r, w, params);
}

wn_status wn_cuda_layer_norm(wn_device *device, wn_tensor *y, wn_tensor *stat, const wn_tensor *x, const wn_tensor *w,
                             const wn_tensor *b, const wn_norm_params *params) {
  return forward<true>(device, y, stat, x, w, b, params);
}

/* dy is ACT, or WGRAD: the gradient of the indexer's keys is summed in FP32. */
wn_status wn_cuda_layer_norm_backward(wn_device *device, wn_tensor *dx, wn_tensor *dw, wn_tensor *db,
                                      const wn_tensor *dy, const wn_tensor *x, const wn_tensor *stat,
                                      const wn_tensor *w, const wn_norm_params *params) {
  WN_ASSERT(dw && db, "layer_norm_backward without dw or db");
  if (dy->dtype == WN_F32) return backward<true, float>(device, dx, dw, db, dy, x, stat, w, params);
  return backward<true, wn_bf16>(device, dx, dw, db, dy, x, stat, w, params);
}
