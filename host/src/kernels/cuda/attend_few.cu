// The kernels of attend_few.cuh over caches of bfloat16.
#include "attend_few.cuh"

#define ATTEND_FEW(D, NAME, CLUSTERED)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(warps_of<D, CLUSTERED> * 32) attend_##NAME##_##D(const __grid_constant__ Seen a) {                        \
        extern __shared__ __align__(16) uint8_t shared[];                                                                                  \
        attend_few<D, CLUSTERED, false>(a, nullptr, shared);                                                                               \
    }                                                                                                                                      \
    extern "C" __global__ void __launch_bounds__(warps_of<D, CLUSTERED> * 32) attend_turned_##NAME##_##D(const __grid_constant__ Turned t) {               \
        extern __shared__ __align__(16) uint8_t shared[];                                                                                  \
        attend_few<D, CLUSTERED, true>(t.seen, &t, shared);                                                                                \
    }

ATTEND_FEW(64, few, false)
ATTEND_FEW(128, few, false)
ATTEND_FEW(256, few, false)
ATTEND_FEW(64, clustered, true)
ATTEND_FEW(128, clustered, true)
ATTEND_FEW(256, clustered, true)
