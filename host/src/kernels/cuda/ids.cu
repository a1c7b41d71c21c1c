// Ids of tokens into a smaller table.
#include <stdint.h>

extern "C" __global__ void modulo(const uint32_t *ids, uint32_t *out, uint32_t count, uint32_t by) {
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = ids[i] % by;
}
