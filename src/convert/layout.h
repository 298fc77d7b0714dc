/* What the output directory's weight files hold: a pure function of the source's headers and the job. */
#ifndef WN_CONVERT_LAYOUT_H
#define WN_CONVERT_LAYOUT_H

#include "convert/convert.h"
#include "convert/source.h"

enum { WN_OUTPUT_NAME_BYTES = WN_NAME_BYTES + 16, WN_OUTPUT_FILE_BYTES = 64 };

typedef enum wn_making {
  WN_MAKE_COPY,     /* the stored bytes */
  WN_MAKE_NUMBERS,  /* the values, in F32 or BF16 */
  WN_MAKE_BLOCKS,   /* FP8, with the scales that are the output after this one */
  WN_MAKE_SCALES,   /* what BLOCKS writes: nothing to do */
  WN_COPY_SCALES,   /* the stored bytes of the weight's scales */
  WN_CONVERT_SCALES /* their values, in F32 */
} wn_making;

/* A tensor of a file, and the window of the source's tensor that it is. */
typedef struct wn_output {
  const wn_convert_weight *weight;
  wn_making making;
  wn_dtype dtype;
  int32_t rank;
  int64_t dim[2], first[2]; /* a vector of n is [n], first[0] */
  int64_t place;            /* in the file */
} wn_output;

typedef struct wn_output_file {
  char name[WN_OUTPUT_FILE_BYTES];
  int64_t from, to; /* outputs */
  int64_t bytes;    /* of its tensors */
} wn_output_file;

typedef struct wn_output_list {
  wn_output *outputs;
  wn_output_file *files;
  int64_t n, n_files;
  bool demo;
} wn_output_list;

WN_MUST_USE wn_status wn_output_list_create(wn_output_list *out, const wn_convert_source *source,
                                            const wn_convert_job *job);
void wn_output_list_free(wn_output_list *list);

bool wn_output_is_scale(const wn_output *output);
int64_t wn_output_bytes(const wn_output *output);
void wn_output_name(char out[WN_OUTPUT_NAME_BYTES], const wn_output_list *list, const wn_output *output);
/* Of one file; the caller frees it. Tensors stand widest dtype first. */
WN_MUST_USE wn_status wn_output_layout(wn_st_layout **out, const wn_output_list *list, int64_t file);

#endif
