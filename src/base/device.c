#include "base/device.h"

wn_status wn_device_tensor(const wn_device *device, wn_tensor *out, wn_arena *arena, const char *name, wn_role role,
                           int32_t rank, int64_t d0, int64_t d1, int64_t d2, int64_t d3) {
  WN_ASSERT((unsigned)role < WN_N_ROLES, "role %d", (int)role);
  return wn_tensor_alloc(out, arena, name, device->dtype_of[role], rank, d0, d1, d2, d3);
}
