#ifndef WN_BASE_VERSION_H
#define WN_BASE_VERSION_H

#define WN_VERSION "0.1.0"

#endif
