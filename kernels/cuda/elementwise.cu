/* Rope, sums and copies over heads, SwiGLU and other elementwise work: one pass over memory each, 16 bytes an access,
 * several accesses of a thread under way at once. FP32 inside, whatever is stored.
 *
 * Ladder, one H200, n = 131072 rows, share of the copy rate of 4.24 TB/s:
 *                                          add [n,7168]   swiglu [8n,2048]   its backward
 *   4, 4 and 2 units a thread              1.74 ms  76%   4.48 ms  68%       6.64 ms   76%
 *   2, 2 and 1: more blocks at once        1.36 ms  98%   3.33 ms  91%       5.00 ms  101%
 *                                          rope on 64 of 192 of 128 heads    halves, 64 of 128 of 64 heads
 *   sincosf, 4 units a thread              1.81 ms  56%                      0.83 ms  61%
 *   quarter turns in FP64, 2 units         1.50 ms  67%                      0.65 ms  78%
 *   units widened after the turns          1.20 ms  84%                      0.58 ms  87%
 *   four accesses of a thread under way    1.18 ms  86%                      the same
 *
 * Tensors whose widths, strides or addresses are no multiples of 16 bytes go element by element through the same
 * kernels (N = 1). Operands of one call have one dtype, BF16 or F32. */
#include "kernels/cuda/operations.cuh"
#include "kernels/cuda/pack.cuh"

enum { THREADS = 256 };
static const int64_t most_y = 65535; /* of a grid */

static unsigned power_of_two_from(int64_t n, unsigned most) {
  unsigned p = 1;
  while (p < most && (int64_t)p < n) p *= 2;
  return p;
}

/* ---- element by element ---- */

typedef enum map_kind { MAP_ADD, MAP_SCALE, MAP_SWIGLU, MAP_SWIGLU_BACKWARD } map_kind;
enum { MAP_INPUTS = 3, MAP_OUTPUTS = 2 };

typedef struct map_stream {
  char *data;
  int64_t row, head; /* strides in elements */
} map_stream;

typedef struct map_operands {
  map_stream in[MAP_INPUTS], out[MAP_OUTPUTS];
  int64_t rows, width; /* rows are (row, head) pairs; dense tensors arrive as one row */
  int32_t heads;
  float factor;
} map_operands;

__host__ __device__ constexpr int map_inputs(map_kind kind) {
  return kind == MAP_SCALE ? 1 : kind == MAP_SWIGLU_BACKWARD ? 3 : 2;
}
__host__ __device__ constexpr int map_outputs(map_kind kind) {
  return kind == MAP_SWIGLU_BACKWARD ? 2 : 1;
}

__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + expf(-x));
}

/* Inputs as in kernels.h: (a, b), (x), (gate, up), (dy, gate, up). */
template <map_kind KIND>
__device__ __forceinline__ void map_one(float out[MAP_OUTPUTS], const float in[MAP_INPUTS], float factor) {
  if (KIND == MAP_ADD) out[0] = in[0] + in[1];
  if (KIND == MAP_SCALE) out[0] = in[0] * factor;
  if (KIND == MAP_SWIGLU) out[0] = in[0] * sigmoid(in[0]) * in[1];
  if (KIND == MAP_SWIGLU_BACKWARD) {
    const float d = in[0], g = in[1], u = in[2], s = sigmoid(g);
    out[0] = d * u * s * (1.0f + g * (1.0f - s));
    out[1] = d * g * s;
  }
}

template <typename T> __device__ __forceinline__ T *map_row(const map_stream &s, int64_t row, int32_t heads) {
  if (heads == 1) return (T *)s.data + row * s.row;
  return (T *)s.data + row / heads * s.row + row % heads * s.head;
}

/* blockDim.x threads along a row of `units` units of N elements, blockDim.y rows; each thread has UNROLL units. An
 * output may be an input: a thread reads its elements before it writes them. */
template <map_kind KIND, typename T, int N, int UNROLL>
__global__ void __launch_bounds__(THREADS) map_kernel(map_operands o) {
  constexpr int inputs = map_inputs(KIND), outputs = map_outputs(KIND);
  const int64_t first = (int64_t)blockIdx.x * blockDim.x * UNROLL + threadIdx.x, units = o.width / N;
  for (int64_t row = (int64_t)blockIdx.y * blockDim.y + threadIdx.y; row < o.rows;
       row += (int64_t)gridDim.y * blockDim.y) {
    float x[UNROLL][MAP_INPUTS][N];
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int64_t at = first + u * (int)blockDim.x;
      if (at >= units) continue;
#pragma unroll
      for (int i = 0; i < inputs; i++) wn_read<T, N>(x[u][i], map_row<T>(o.in[i], row, o.heads) + at * N);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int64_t at = first + u * (int)blockDim.x;
      if (at >= units) continue;
      float y[MAP_OUTPUTS][N];
#pragma unroll
      for (int e = 0; e < N; e++) {
        float in[MAP_INPUTS], out[MAP_OUTPUTS];
#pragma unroll
        for (int i = 0; i < inputs; i++) in[i] = x[u][i][e];
        map_one<KIND>(out, in, o.factor);
#pragma unroll
        for (int i = 0; i < outputs; i++) y[i][e] = out[i];
      }
#pragma unroll
      for (int i = 0; i < outputs; i++) wn_write<T, N>(map_row<T>(o.out[i], row, o.heads) + at * N, y[i]);
    }
  }
}

template <map_kind KIND, typename T, int N> static wn_status map_launch(wn_device *device, const map_operands &o) {
  constexpr int unroll = map_inputs(KIND) < 3 ? 2 : 1; /* more would cost blocks: registers */
  const int64_t units = o.width / N;
  const unsigned along = power_of_two_from(units, THREADS);
  const dim3 block(along, THREADS / along);
  const int64_t down = wn_ceil_div(o.rows, block.y);
  const dim3 grid((unsigned)wn_ceil_div(units, (int64_t)along * unroll), (unsigned)(down < most_y ? down : most_y));
  map_kernel<KIND, T, N, unroll><<<grid, block, 0, wn_cuda_stream(device)>>>(o);
  WN_CUDA_LAUNCHED("elementwise work");
  return NULL;
}

/* What `t` is to a map of the shape of `like`: its strides, or one row where all is `flat`. *packs stays true where
 * 16-byte accesses are fine. */
static map_stream map_stream_of(const wn_tensor *t, const wn_tensor *like, bool flat, bool *packs) {
  WN_ASSERT(wn_tensor_same_shape(t, like), "operands of different shapes");
  WN_ASSERT(t->dtype == like->dtype, "operands of dtypes %s and %s", wn_dtype_name(t->dtype),
            wn_dtype_name(like->dtype));
  const int32_t last = t->rank - 1;
  const int64_t k = 16 / wn_dtype_bytes(t->dtype);
  WN_ASSERT(t->rank >= 1 && t->rank <= 3 && (t->dim[last] <= 1 || t->stride[last] == 1), "rank %d, last stride %lld",
            t->rank, (long long)t->stride[last]);
  map_stream s = {(char *)t->data, 0, 0};
  if (!flat && t->rank > 1) s.row = t->stride[0];
  if (!flat && t->rank > 2) s.head = t->stride[1];
  *packs = *packs && (uintptr_t)t->data % 16 == 0 && s.row % k == 0 && s.head % k == 0;
  return s;
}

template <map_kind KIND>
static wn_status map(wn_device *device, wn_tensor *const *out, const wn_tensor *const *in, double factor) {
  const wn_tensor *y = out[0];
  bool flat = true, packs = true;
  for (int i = 0; i < map_inputs(KIND); i++) flat = flat && wn_tensor_dense(in[i]);
  for (int i = 0; i < map_outputs(KIND); i++) flat = flat && wn_tensor_dense(out[i]);
  map_operands o = {};
  o.factor = (float)factor;
  o.heads = !flat && y->rank == 3 ? (int32_t)y->dim[1] : 1;
  o.rows = 1;
  for (int32_t i = 0; !flat && i < y->rank - 1; i++) o.rows *= y->dim[i];
  o.width = flat ? wn_tensor_count(y) : y->dim[y->rank - 1];
  for (int i = 0; i < map_inputs(KIND); i++) o.in[i] = map_stream_of(in[i], y, flat, &packs);
  for (int i = 0; i < map_outputs(KIND); i++) o.out[i] = map_stream_of(out[i], y, flat, &packs);
  if (o.rows == 0 || o.width == 0) return NULL;
  if (y->dtype == WN_F32) {
    if (packs && o.width % 4 == 0) return map_launch<KIND, float, 4>(device, o);
    return map_launch<KIND, float, 1>(device, o);
  }
  WN_ASSERT(y->dtype == WN_BF16, "elementwise work on %s", wn_dtype_name(y->dtype));
  if (packs && o.width % 8 == 0) return map_launch<KIND, wn_bf16, 8>(device, o);
  return map_launch<KIND, wn_bf16, 1>(device, o);
}

wn_status wn_cuda_add(wn_device *device, wn_tensor *y, const wn_tensor *a, const wn_tensor *b) {
  wn_tensor *const out[] = {y};
  const wn_tensor *const in[] = {a, b};
  return map<MAP_ADD>(device, out, in, 0);
}

wn_status wn_cuda_scale(wn_device *device, wn_tensor *y, const wn_tensor *x, double factor) {
  wn_tensor *const out[] = {y};
  const wn_tensor *const in[] = {x};
  return map<MAP_SCALE>(device, out, in, factor);
}

wn_status wn_cuda_swiglu(wn_device *device, wn_tensor *y, const wn_tensor *gate, const wn_tensor *up) {
  wn_tensor *const out[] = {y};
  const wn_tensor *const in[] = {gate, up};
  return map<MAP_SWIGLU>(device, out, in, 0);
}

wn_status wn_cuda_swiglu_backward(wn_device *device, wn_tensor *dgate, wn_tensor *dup, const wn_tensor *dy,
                                  const wn_tensor *gate, const wn_tensor *up) {
  wn_tensor *const out[] = {dgate, dup};
  const wn_tensor *const in[] = {dy, gate, up};
  return map<MAP_SWIGLU_BACKWARD>(device, out, in, 0);
}

/* ---- rope ---- */

enum { ROPE_HALF = 256, ROPE_ACCESSES = 4 /* of a thread under way */ };

typedef struct rope_angles {
  float inv_freq[ROPE_HALF];
  const int32_t *position;
  float sign;
  int32_t rows_per_block;
} rope_angles;

/* What one thread rotates: N neighbouring elements, pairs side by side (interleaved), or N of each half (half-split).
 * They stay as they are stored until their turns are there: widened at once they would be waited for. */
template <typename T, int N> struct rope_unit { wn_kept<T, N> low, high; };
template <bool INTERLEAVED> static constexpr int rope_unroll = ROPE_ACCESSES / (INTERLEAVED ? 1 : 2);

/* Cosine and sine of any angle up to 2^31: quarter turns are taken off in FP64, which is exact enough (1e-11 at 131072
 * rad) and has no slow path, unlike sincosf. */
__device__ __forceinline__ float2 turn_of(float angle) {
  const double quarters = (double)angle * 0.63661977236758134308; /* 2 / pi */
  const double whole = rint(quarters);
  float s, c;
  sincospif((float)(quarters - whole) * 0.5f, &s, &c);
  const int quadrant = (int)whole & 3;
  const float x = quadrant & 1 ? s : c, y = quadrant & 1 ? c : s;
  return make_float2(quadrant == 1 || quadrant == 2 ? -x : x, quadrant >= 2 ? -y : y);
}

/* A block has whole rows, makes their sines and cosines once, and uses them for every head. */
template <typename T, int N, bool INTERLEAVED>
__global__ void __launch_bounds__(THREADS) rope_kernel(wn_view<T> x, const __grid_constant__ rope_angles a) {
  extern __shared__ float2 turns[]; /* [rows_per_block, pairs] cosine and sine */
  const int pairs = x.width / 2, units = (INTERLEAVED ? x.width : pairs) / N;
  const int64_t row0 = (int64_t)blockIdx.x * a.rows_per_block;
  const int rows = (int)(x.n - row0 < a.rows_per_block ? x.n - row0 : a.rows_per_block);
  const uint32_t per_row = (uint32_t)x.heads * (uint32_t)units, all = (uint32_t)rows * per_row;
  constexpr int UNROLL = rope_unroll<INTERLEAVED>;
  for (uint32_t first = 0; first < all; first += THREADS * UNROLL) {
    rope_unit<T, N> u[UNROLL];
    T *at[UNROLL];
    int turn[UNROLL]; /* of the unit's first pair */
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      const uint32_t unit = first + i * THREADS + threadIdx.x;
      at[i] = NULL;
      if (unit >= all) continue;
      const uint32_t row = unit / per_row, in_row = unit % per_row, head = in_row / (uint32_t)units,
                     c = in_row % (uint32_t)units;
      at[i] = x.data + (row0 + row) * x.row + (int64_t)head * x.head + c * N;
      turn[i] = (int)(row * (uint32_t)pairs + (INTERLEAVED ? c * (N / 2) : c * N));
      u[i].low = wn_keep<T, N>(at[i]);
      if (!INTERLEAVED) u[i].high = wn_keep<T, N>(at[i] + pairs);
    }
    if (first == 0) { /* after the loads, which take their time anyway */
      for (int t = (int)threadIdx.x; t < rows * pairs; t += THREADS) {
        const float angle = __fmul_rn((float)a.position[row0 + t / pairs], a.inv_freq[t % pairs]);
        const float2 of = turn_of(angle);
        turns[t] = make_float2(of.x, of.y * a.sign);
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < UNROLL; i++) {
      if (!at[i]) continue;
      float low[N], high[N];
      wn_widen<T, N>(low, u[i].low);
      if (INTERLEAVED) {
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
          const float2 t = turns[turn[i] + j];
          const float p = low[2 * j], q = low[2 * j + 1];
          low[2 * j] = fmaf(p, t.x, -(q * t.y));
          low[2 * j + 1] = fmaf(p, t.y, q * t.x);
        }
      } else {
        wn_widen<T, N>(high, u[i].high);
#pragma unroll
        for (int j = 0; j < N; j++) {
          const float2 t = turns[turn[i] + j];
          const float p = low[j], q = high[j];
          low[j] = fmaf(p, t.x, -(q * t.y));
          high[j] = fmaf(p, t.y, q * t.x);
        }
        wn_write<T, N>(at[i] + pairs, high);
      }
      wn_write<T, N>(at[i], low);
    }
  }
}

template <typename T, int N, bool INTERLEAVED>
static wn_status rope_launch(wn_device *device, const wn_view<T> &x, rope_angles *a) {
  const int64_t pairs = x.width / 2, per_row = x.heads * ((INTERLEAVED ? x.width : pairs) / N);
  WN_ASSERT(per_row < INT32_MAX / THREADS, "rope over %d heads of %d", x.heads, x.width);
  /* what a block's threads take at once, but of few heads less than that: four blocks for every multiprocessor */
  const int64_t least = 4 * wn_cuda_of(device)->n_sms;
  int64_t rows = THREADS * rope_unroll<INTERLEAVED> / per_row;
  if (rows < 1) rows = 1;
  while (rows > 1 && (rows * pairs * (int64_t)sizeof(float2) > 32768 || wn_ceil_div(x.n, rows) < least)) rows /= 2;
  a->rows_per_block = (int32_t)rows;
  rope_kernel<T, N, INTERLEAVED>
      <<<(unsigned)wn_ceil_div(x.n, rows), THREADS, (size_t)(rows * pairs) * sizeof(float2), wn_cuda_stream(device)>>>(
          x, *a);
  WN_CUDA_LAUNCHED("rope");
  return NULL;
}

template <typename T>
static wn_status rope(wn_device *device, wn_tensor *t, const int32_t *position, const wn_rope_params *params) {
  wn_view<T> x = wn_view_of<T>(t);
  WN_ASSERT(t->rank == 3 && x.width % 2 == 0 && x.width / 2 <= ROPE_HALF, "rope over rank %d, width %d", t->rank,
            x.width);
  if (x.n == 0 || x.heads == 0 || x.width == 0) return NULL;
  constexpr int k = 16 / (int)sizeof(T);
  rope_angles a = {};
  for (int j = 0; j < x.width / 2; j++) a.inv_freq[j] = params->inv_freq[j];
  a.position = position;
  a.sign = params->inverse ? -1.0f : 1.0f;
  const bool packs = wn_view_vectors(x);
  if (params->interleaved)
    return packs ? rope_launch<T, k, true>(device, x, &a) : rope_launch<T, 2, true>(device, x, &a);
  return packs && x.width / 2 % k == 0 ? rope_launch<T, k, false>(device, x, &a)
                                       : rope_launch<T, 1, false>(device, x, &a);
}

wn_status wn_cuda_rope(wn_device *device, wn_tensor *x, const int32_t *position, const wn_rope_params *params) {
  if (x->dtype == WN_F32) return rope<float>(device, x, position, params);
  return rope<wn_bf16>(device, x, position, params);
}

/* ---- over heads ---- */

/* A block has `rows` rows; of each, a tile of `units` units of N columns, shared out to `groups` threads a unit, which
 * take every groups-th head. */
typedef struct head_shape {
  int32_t units, groups, rows, all_units;
  bool accumulate;
} head_shape;

typedef struct head_place {
  int64_t row;
  int32_t unit, group, slot; /* slot: row within the block */
  bool live;
} head_place;

__device__ __forceinline__ head_place head_place_of(const head_shape &s, int64_t n) {
  const int t = (int)threadIdx.x;
  head_place p;
  p.unit = (int)blockIdx.y * s.units + t % s.units;
  p.group = t / s.units % s.groups;
  p.slot = t / (s.units * s.groups);
  p.row = (int64_t)blockIdx.x * s.rows + p.slot;
  p.live = p.slot < s.rows && p.row < n && p.unit < s.all_units;
  return p;
}

static head_shape head_shape_of(int32_t heads, int32_t all_units) {
  head_shape s = {all_units < THREADS ? all_units : THREADS, 1, 1, all_units, false};
  while (s.groups * 2 <= heads && s.groups * 2 * s.units <= THREADS) s.groups *= 2;
  s.rows = THREADS / (s.units * s.groups);
  return s;
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) sum_heads_kernel(wn_view<T> y, wn_view<T> x, head_shape s) {
  __shared__ float parts[THREADS * N];
  const head_place p = head_place_of(s, x.n);
  float sum[N] = {};
  if (p.live) {
    const T *from = x.data + p.row * x.row + (int64_t)p.unit * N;
#pragma unroll 4
    for (int h = p.group; h < x.heads; h += s.groups) {
      float e[N];
      wn_read<T, N>(e, from + h * x.head);
#pragma unroll
      for (int j = 0; j < N; j++) sum[j] += e[j];
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++) parts[threadIdx.x * N + j] = sum[j];
  __syncthreads();
  const int columns = s.units * N; /* of one row of the block; a thread each */
  for (int t = (int)threadIdx.x; t < s.rows * columns; t += THREADS) {
    const int slot = t / columns, c = t % columns;
    const int64_t row = (int64_t)blockIdx.x * s.rows + slot, column = (int64_t)blockIdx.y * columns + c;
    if (row >= y.n || column >= y.width) continue;
    float total = 0;
    for (int g = 0; g < s.groups; g++) total += parts[(slot * s.groups + g) * columns + c];
    T *to = y.data + row * y.row + column;
    *to = wn_narrow<T>(s.accumulate ? wn_wide(*to) + total : total);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(THREADS) broadcast_heads_kernel(wn_view<T> y, wn_view<T> x, head_shape s) {
  const head_place p = head_place_of(s, y.n);
  if (!p.live) return;
  float e[N];
  wn_read<T, N>(e, x.data + p.row * x.row + (int64_t)p.unit * N);
  T *to = y.data + p.row * y.row + (int64_t)p.unit * N;
  for (int h = p.group; h < y.heads; h += s.groups) wn_write<T, N>(to + h * y.head, e);
}

template <typename T, int N>
static wn_status heads_launch(wn_device *device, const wn_view<T> &wide, const wn_view<T> &narrow, bool sum,
                              bool accumulate) {
  head_shape s = head_shape_of(wide.heads, wide.width / N);
  s.accumulate = accumulate;
  const dim3 grid((unsigned)wn_ceil_div(wide.n, s.rows), (unsigned)wn_ceil_div(s.all_units, s.units));
  if (sum)
    sum_heads_kernel<T, N><<<grid, THREADS, 0, wn_cuda_stream(device)>>>(narrow, wide, s);
  else
    broadcast_heads_kernel<T, N><<<grid, THREADS, 0, wn_cuda_stream(device)>>>(wide, narrow, s);
  WN_CUDA_LAUNCHED("work over heads");
  return NULL;
}

/* wide[n,h,D], narrow[n,D] */
template <typename T>
static wn_status over_heads(wn_device *device, const wn_tensor *wide, const wn_tensor *narrow, bool sum,
                            bool accumulate) {
  const wn_view<T> w = wn_view_of<T>(wide), t = wn_view_of<T>(narrow);
  WN_ASSERT(wide->rank == 3 && narrow->rank == 2 && w.n == t.n && w.width == t.width,
            "ranks %d and %d, rows %lld and %lld, widths %d and %d", wide->rank, narrow->rank, (long long)w.n,
            (long long)t.n, w.width, t.width);
  constexpr int k = 16 / (int)sizeof(T);
  if (w.n == 0 || w.width == 0) return NULL;
  if (wn_view_vectors(w) && wn_view_vectors(t)) return heads_launch<T, k>(device, w, t, sum, accumulate);
  return heads_launch<T, 1>(device, w, t, sum, accumulate);
}

wn_status wn_cuda_sum_heads(wn_device *device, wn_tensor *y, const wn_tensor *x, const wn_accumulate *params) {
  if (x->dtype == WN_F32) return over_heads<float>(device, x, y, true, params->accumulate);
  return over_heads<wn_bf16>(device, x, y, true, params->accumulate);
}

wn_status wn_cuda_broadcast_heads(wn_device *device, wn_tensor *y, const wn_tensor *x) {
  if (y->dtype == WN_F32) return over_heads<float>(device, y, x, false, false);
  return over_heads<wn_bf16>(device, y, x, false, false);
}
