/* One tensor from the source's bytes to the output's, a tile of at most 128 x 8192 elements at a time. */
#ifndef WN_CONVERT_WRITE_H
#define WN_CONVERT_WRITE_H

#include "convert/layout.h"

/* Room for one tile a thread. */
typedef struct wn_tile_rooms wn_tile_rooms;
WN_MUST_USE wn_status wn_tile_rooms_create(wn_tile_rooms **out, int32_t threads);
void wn_tile_rooms_free(wn_tile_rooms *rooms);

/* Writes `output` at its offset in an open file; scale_offset is that of the scales that MAKE_BLOCKS writes too.
 * WN_E_INPUT, naming the tensor and the place, for what is not finite or would not be as BF16; WN_E_IO. */
WN_MUST_USE wn_status wn_output_write(const wn_output *output, int fd, const char *path, uint64_t offset,
                                      uint64_t scale_offset, wn_tile_rooms *rooms);

#endif
