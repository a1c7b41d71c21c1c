// The kernels of attend_few.cuh over caches in groups of a few bits, which are opened on the way to the tensor cores.
#include "attend_few.cuh"

#define ATTEND_PACKED(D, BITS, NAME, CLUSTERED)                                                                                            \
    extern "C" __global__ void __launch_bounds__(warps_of<D, CLUSTERED> * 32) attend_##NAME##_##D##_of_##BITS(const __grid_constant__ Seen a) { \
        extern __shared__ __align__(16) uint8_t shared[];                                                                                  \
        attend_few<D, CLUSTERED, false, BITS>(a, nullptr, shared);                                                                         \
    }
#define ATTEND_PACKED_ALL(D, BITS) ATTEND_PACKED(D, BITS, few, false) ATTEND_PACKED(D, BITS, clustered, true)

ATTEND_PACKED_ALL(64, 4)
ATTEND_PACKED_ALL(128, 4)
ATTEND_PACKED_ALL(256, 4)
ATTEND_PACKED_ALL(64, 8)
ATTEND_PACKED_ALL(128, 8)
ATTEND_PACKED_ALL(256, 8)
