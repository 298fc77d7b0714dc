/* Reals as text that reads back to the same bits: the shortest such digits, in the form of Python's repr (1e-06, 0.001,
 * 1000.0), because that is how released configuration files are written. */
#ifndef WN_CONFIG_REAL_TEXT_H
#define WN_CONFIG_REAL_TEXT_H

enum { WN_REAL_TEXT_BYTES = 40 };

void wn_real_text(char out[WN_REAL_TEXT_BYTES], double value);

#endif
