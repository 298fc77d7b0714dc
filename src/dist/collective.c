/* Collectives, made of direct exchanges between ranks: the library's own algorithms, whose order of additions may
 * change with its version and the message size, are never asked for a sum. */
#include <stdlib.h>
#include <string.h>

#include "dist/internal.h"

/* Sums stay in the first-level cache while the ranks' contributions are added up. */
enum { SUM_BLOCK = 2048 };

static wn_status gather_begin(wn_group *group, wn_request **out, const char *operation, void *all, const void *piece,
                              size_t bytes) {
  char *own = bytes == 0 ? all : (char *)all + (size_t)group->rank * bytes;
  *out = NULL;
  if (bytes > 0 && own != piece) memcpy(own, piece, bytes);
  if (group->world->dry)
    for (int32_t r = 1; bytes > 0 && r < group->size; r++) memcpy((char *)all + (size_t)r * bytes, all, bytes);
  if (group->size == 1 || group->world->dry) return NULL;
  wn_request *request;
  WN_TRY(wn_exchange_begin(&request, group, operation, 2 * (size_t)(group->size - 1), bytes));
  for (int32_t k = 1; k < group->size;
       k++) { /* each rank starts with its neighbour, so that no rank is everyone's first */
    int32_t to = (group->rank + k) % group->size, from = (group->rank + group->size - k) % group->size;
    WN_TRY(wn_exchange_receive(request, from, bytes == 0 ? NULL : (char *)all + (size_t)from * bytes, bytes));
    WN_TRY(wn_exchange_send(request, to, piece, bytes));
  }
  *out = request;
  return NULL;
}

wn_status wn_group_gather_begin(wn_group *group, wn_request **out_request, void *out, const void *piece, size_t bytes) {
  return gather_begin(group, out_request, "gather", out, piece, bytes);
}

wn_status wn_group_gather(wn_group *group, void *out, const void *piece, size_t bytes) {
  wn_request *request;
  WN_TRY(gather_begin(group, &request, "gather", out, piece, bytes));
  return wn_request_wait(request);
}

wn_status wn_world_barrier(wn_world *world) {
  wn_request *request;
  WN_TRY(gather_begin(wn_world_all(world), &request, "barrier", NULL, NULL, 0));
  return wn_request_wait(request);
}

wn_status wn_group_broadcast(wn_group *group, void *data, size_t bytes, int32_t root) {
  WN_ASSERT(root >= 0 && root < group->size, "broadcast from rank %d of %d", root, group->size);
  if (group->size == 1 || group->world->dry) return NULL;
  wn_request *request;
  WN_TRY(wn_exchange_begin(&request, group, "broadcast", (size_t)group->size, bytes));
  if (group->rank != root) {
    WN_TRY(wn_exchange_receive(request, root, data, bytes));
    return wn_request_wait(request);
  }
  for (int32_t r = 0; r < group->size; r++)
    if (r != root) WN_TRY(wn_exchange_send(request, r, data, bytes));
  return wn_request_wait(request);
}

static wn_status gather_copies(wn_group *group, void **all, const char *operation, const void *x, size_t bytes) {
  wn_request *request;
  *all = malloc((size_t)group->size * bytes);
  if (!*all) return WN_FAIL(WN_E_MEMORY, "out of memory for %s over %d ranks", operation, group->size);
  wn_status status = gather_begin(group, &request, operation, *all, x, bytes);
  if (!status) status = wn_request_wait(request);
  return status; /* on an error MPI may still write into *all: it is not freed */
}

wn_status wn_group_sum_f64(wn_group *group, double *x, size_t n) {
  if (group->world->dry)
    for (size_t i = 0; i < n; i++) x[i] *= group->size;
  if (group->size == 1 || n == 0 || group->world->dry) return NULL;
  void *copies;
  WN_TRY(gather_copies(group, &copies, "sum", x, n * sizeof *x));
  const double *all = copies;
  memcpy(x, all, n * sizeof *x);
  for (int32_t r = 1; r < group->size; r++)
    for (size_t i = 0; i < n; i++) x[i] += all[(size_t)r * n + i];
  free(copies);
  return NULL;
}

wn_status wn_group_sum_i64(wn_group *group, int64_t *x, size_t n) {
  if (group->world->dry)
    for (size_t i = 0; i < n; i++) x[i] *= group->size;
  if (group->size == 1 || n == 0 || group->world->dry) return NULL;
  void *copies;
  WN_TRY(gather_copies(group, &copies, "sum", x, n * sizeof *x));
  const int64_t *all = copies;
  memcpy(x, all, n * sizeof *x);
  for (int32_t r = 1; r < group->size; r++)
    for (size_t i = 0; i < n; i++) x[i] += all[(size_t)r * n + i];
  free(copies);
  return NULL;
}

static void add(void *to, const void *from, size_t at, size_t n, int32_t element_bytes) {
  if (element_bytes == 4) {
    float *y = (float *)to + at;
    const float *x = (const float *)from + at;
    for (size_t i = 0; i < n; i++) y[i] += x[i];
  } else {
    double *y = (double *)to + at;
    const double *x = (const double *)from + at;
    for (size_t i = 0; i < n; i++) y[i] += x[i];
  }
}

/* Pairs of neighbours, then pairs of pairs: ((0+1)+(2+3))+((4+5)+6). Overwrites the contributions. */
static void add_pairwise(void *piece, char *contributions, int32_t size, size_t n, int32_t element_bytes) {
  size_t stride = n * (size_t)element_bytes;
  for (size_t at = 0; at < n; at += SUM_BLOCK) {
    size_t count = n - at < SUM_BLOCK ? n - at : SUM_BLOCK;
    for (int32_t step = 1; step < size; step *= 2)
      for (int32_t r = 0; r + step < size; r += 2 * step)
        add(contributions + (size_t)r * stride, contributions + (size_t)(r + step) * stride, at, count, element_bytes);
    add(piece, contributions, at, count, element_bytes);
  }
}

wn_status wn_group_reduce_scatter(wn_group *group, void *piece, const void *full, size_t n, int32_t element_bytes,
                                  void *scratch) {
  WN_ASSERT(element_bytes == 4 || element_bytes == 8, "reduce-scatter of %d-byte elements", element_bytes);
  WN_ASSERT(!group->world->dry, "sums of ranks that do not exist");
  if (group->size == 1) {
    add(piece, full, 0, n, element_bytes);
    return NULL;
  }
  size_t bytes = n * (size_t)element_bytes;
  wn_request *request;
  WN_TRY(wn_exchange_begin(&request, group, "reduce-scatter", 2 * (size_t)(group->size - 1), bytes));
  for (int32_t k = 1; k < group->size; k++) {
    int32_t to = (group->rank + k) % group->size, from = (group->rank + group->size - k) % group->size;
    WN_TRY(wn_exchange_receive(request, from, (char *)scratch + (size_t)from * bytes, bytes));
    WN_TRY(wn_exchange_send(request, to, (const char *)full + (size_t)to * bytes, bytes));
  }
  memcpy((char *)scratch + (size_t)group->rank * bytes, (const char *)full + (size_t)group->rank * bytes, bytes);
  WN_TRY(wn_request_wait(request));
  add_pairwise(piece, scratch, group->size, n, element_bytes);
  return NULL;
}
