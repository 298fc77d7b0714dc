#ifndef WN_BASE_TIME_H
#define WN_BASE_TIME_H

double wn_time_s(void);          /* monotonic seconds, arbitrary origin */
void wn_time_utc(char text[32]); /* 2026-01-31T12:34:56Z */

#endif
