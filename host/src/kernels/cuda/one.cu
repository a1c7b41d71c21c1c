// y = x W^T for one token (one.cuh). A block has some rows of tiles; its warps share the columns and add up at the end.
#include "one.cuh"

// The last are the most threads of a block, and how many blocks shall fit a multiprocessor: one_1 is for as many rows as take two of 512;
// alone, a block does better with half as many registers again. Where that is not said, nvcc leaves room for one or two.
#define ONE(NAME, P, GROUP, HALF, RT, S, GATED, ...)                                                                                       \
    extern "C" __global__ void __launch_bounds__(__VA_ARGS__) NAME(const __grid_constant__ Matmul a) {                                    \
        extern __shared__ __align__(16) uint8_t shared[];                                                                                  \
        matmul_of_one<P, GROUP, HALF, RT, S, GATED>(a, shared);                                                                            \
    }

// One or two rows of tiles a block, or a gate's and those that it lets through; steps on their way as product.rs counts them.
#define FOR_FORMAT(NAME, P, GROUP, HALF)                                                                                                   \
    ONE(one_1_##NAME, P, GROUP, HALF, 1, (pieces<P>() == 1 ? 3 : 2), false, 512, 2)                                                        \
    ONE(one_1_ahead_##NAME, P, GROUP, HALF, 1, 3, false, 512, 1)                                                                           \
    ONE(one_2_##NAME, P, GROUP, HALF, 2, 2, false, 512)                                                                                    \
    ONE(one_gated_##NAME, P, GROUP, HALF, 2, (P == PLAIN ? 3 : 2), true, 512)

// Six blocks of four warps to a multiprocessor, for so many rows that the last blocks would begin when most have ended.
#define MANY_GATED(NAME, P, GROUP, HALF) ONE(one_gated_many_##NAME, P, GROUP, HALF, 2, 3, true, 128, 6)

MANY_GATED(nibble_32, NIBBLE, 32, false)
MANY_GATED(nibble_64, NIBBLE, 64, false)
MANY_GATED(nibble_128, NIBBLE, 128, false)
MANY_GATED(half_nibble_32, NIBBLE, 32, true)
MANY_GATED(half_nibble_64, NIBBLE, 64, true)
MANY_GATED(half_nibble_128, NIBBLE, 128, true)

FOR_FORMAT(nibble_32, NIBBLE, 32, false)
FOR_FORMAT(nibble_64, NIBBLE, 64, false)
FOR_FORMAT(nibble_128, NIBBLE, 128, false)
FOR_FORMAT(byte_32, BYTE, 32, false)
FOR_FORMAT(byte_64, BYTE, 64, false)
FOR_FORMAT(byte_128, BYTE, 128, false)
FOR_FORMAT(half_nibble_32, NIBBLE, 32, true)
FOR_FORMAT(half_nibble_64, NIBBLE, 64, true)
FOR_FORMAT(half_nibble_128, NIBBLE, 128, true)
FOR_FORMAT(half_byte_32, BYTE, 32, true)
FOR_FORMAT(half_byte_64, BYTE, 64, true)
FOR_FORMAT(half_byte_128, BYTE, 128, true)
FOR_FORMAT(mx4_32, MX4, 32, false)
FOR_FORMAT(plain_128, PLAIN, 128, false)
FOR_FORMAT(fp8_32, FP8, 32, false)
FOR_FORMAT(fp8_128, FP8, 128, false)
FOR_FORMAT(six_128, SIX, 128, false)
FOR_FORMAT(nv4_128, NV4, 128, false)
