/* The output directory: empty, or the beginning of this very conversion, and of nobody else meanwhile. */
#ifndef WN_CONVERT_PLACE_H
#define WN_CONVERT_PLACE_H

#include <stdbool.h>

#include "convert/convert.h"
#include "io/hf_dir.h"

#define WN_OUTPUT_RECORD ".convert.json" /* there while the conversion is not done */
#define WN_OUTPUT_TEMPORARY ".tmp-"      /* a file under way: garbage once its process has died */

typedef struct wn_output_place wn_output_place;

/* Makes the directory, locks it, writes the record or compares it, and removes what a killed process left half
 * written. WN_E_USAGE: the directory holds something else, or the beginning of a conversion with other settings, of
 * another source or of one that has changed (shards' names, lengths and times, and config.json), or another process is
 * at work in it. */
WN_MUST_USE wn_status wn_output_place_open(wn_output_place **out, const wn_convert_job *job, const wn_hf_dir *source,
                                           wn_log *log);
/* *stands: a file of the layout's length and header is at `path`. Only whole ones get their names, so WN_E_INPUT when
 * there is another. */
WN_MUST_USE wn_status wn_output_place_has(const char *path, const wn_st_layout *layout, bool *stands);
/* Takes the record away: the directory is whole. */
WN_MUST_USE wn_status wn_output_place_finish(wn_output_place *place);
void wn_output_place_close(wn_output_place *place); /* unlocks */

#endif
