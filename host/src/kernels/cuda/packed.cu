// y = x W^T for a few tokens, W packed: the matmul of decoding, which must run as fast as the weights arrive. A block has some rows of
// tiles; its warps share the columns and add up at the end.
#include "one.cuh"

// A block's shared memory: rings, and later, in their place, what its warps add up; behind them the squares of a norm.
//
// RT rows of tiles a block, NT * 8 tokens at most, S tiles of each row on their way at once. GATED: row of tiles i of the
// first two matrices, the gate and what it lets through. Otherwise the rows of tiles of all matrices follow one another.
template <int P, int GROUP, int RT, int NT, int S> constexpr int shared_of_warp = ring_bytes<P, GROUP, RT, NT, S> > RT * NT * 512 ? ring_bytes<P, GROUP, RT, NT, S> : RT * NT * 512;
template <int P, int GROUP, int RT, int NT, int S, bool GATED>
__device__ __forceinline__ void packed_matmul(const Matmul &a, uint8_t *shared) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, g = threadIdx.x % 32 / 4;
    constexpr int OWN = GATED ? RT / 2 : RT;
    int which = 0, first = blockIdx.x * OWN;
    if (!GATED)
        while (which < 2 && first >= a.mats[which].tiles) first -= (a.mats[which++].tiles + RT - 1) / RT * RT;
    Packed of[RT];
    int rows[RT];
#pragma unroll
    for (int r = 0; r < RT; r++) {
        const Mat &m = a.mats[GATED ? r % 2 : which];
        of[r] = m.w, rows[r] = min(first + (GATED ? r / 2 : r), m.tiles - 1);
    }
    const __nv_bfloat16 *x[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) x[n] = a.x + size_t(min(n * 8 + g, a.tokens - 1)) * a.x_stride;
    let_next_start();
    float y[RT][NT][4] = {};
    __shared__ float factors[8];
    const bool normed = NT == 1 && a.normed.weight;
    uint8_t *behind = shared + warps * shared_of_warp<P, GROUP, RT, NT, S>;
    auto ready = [&] {
        wait_for_previous();
        if (normed) fetch_squares(a.normed, uint32_t(__cvta_generic_to_shared(behind)), a.tokens);
    };
    product<P, GROUP, RT, NT, S>(of, rows, x, a.cols, warp, warps, shared + warp * ring_bytes<P, GROUP, RT, NT, S>, y, ready, a.normed.weight);
    if (normed) copies_end(), copies_wait<0>();
    __syncthreads();
    if (normed)
        for (int t = warp; t < a.tokens; t += warps) factors[t] = norm_factor(a.normed, reinterpret_cast<const float *>(behind), t, a.cols);
    float *partial = reinterpret_cast<float *>(shared);
    put<RT, NT>(y, partial);
    __syncthreads();
    const Mat &m = a.mats[which];
    for (int i = threadIdx.x; i < OWN * NT * 128; i += blockDim.x) {
        int r = i / (NT * 128), token = i / 16 % (NT * 8), row = (first + r) * 16 + i % 16;
        const bool there = token < a.tokens && row < m.rows;
        if (!a.squares && !there) continue;
        auto total = [&](int r) {
            float sum = 0;
            for (int w = 0; w < warps; w++) sum += partial[(w * RT + r) * NT * 128 + i % (NT * 128)];
            return normed ? sum * factors[token & 7] : sum;
        };
        float out = 0;
        if (!there) {
        } else if constexpr (GATED) {
            float gate = total(2 * r), up = total(2 * r + 1);
            if (a.mats[0].bias) gate += to_float(a.mats[0].bias[row]);
            if (a.mats[1].bias) up += to_float(a.mats[1].bias[row]);
            out = joined(a.joint, gate, up);
        } else {
            out = total(r);
            if (m.bias) out += to_float(m.bias[row]);
            if (m.residual) out += to_float(m.residual[size_t(token) * m.y_stride + row]);
        }
        const __nv_bfloat16 kept = __float2bfloat16(out);
        if (there) m.y[size_t(token) * m.y_stride + row] = kept;
        if (a.squares) {
            // Threads of a warp come here together: 16 of them have a row of tiles.
            float square = to_float(kept) * to_float(kept);
#pragma unroll
            for (int step = 8; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
            if (i % 16 == 0 && there) a.squares[size_t(token) * m.tiles + first + r] = square;
        }
    }
}

#define PACKED(NAME, P, GROUP, RT, NT, S, GATED)                                                                                     \
    extern "C" __global__ void __launch_bounds__(NT > 1 ? 256 : 512) NAME(const __grid_constant__ Matmul a) {                                            \
        extern __shared__ __align__(16) uint8_t shared[];                                                                                  \
        packed_matmul<P, GROUP, RT, NT, S, GATED>(a, shared);                                                                        \
    }

// Rows of tiles a block, and tokens: 1 and 8, 2 and 8, 2 and 16, 2 and 32, and gate with up for 8.
#define FOR_FORMAT(NAME, P, GROUP)                                                                                                         \
    PACKED(matmul_1x8_##NAME, P, GROUP, 1, 1, 2, false)                                                                                    \
    PACKED(matmul_2x8_##NAME, P, GROUP, 2, 1, 2, false)                                                                                    \
    PACKED(matmul_2x16_##NAME, P, GROUP, 2, 2, 2, false)                                                                                   \
    PACKED(matmul_2x32_##NAME, P, GROUP, 2, 4, 2, false)                                                                                   \
    PACKED(gated_2x8_##NAME, P, GROUP, 2, 1, 2, true)

FOR_FORMAT(nibble_32, NIBBLE, 32)
FOR_FORMAT(nibble_64, NIBBLE, 64)
FOR_FORMAT(nibble_128, NIBBLE, 128)
FOR_FORMAT(byte_32, BYTE, 32)
FOR_FORMAT(byte_64, BYTE, 64)
FOR_FORMAT(byte_128, BYTE, 128)
FOR_FORMAT(mx4_32, MX4, 32)
FOR_FORMAT(plain_128, PLAIN, 128)
FOR_FORMAT(fp8_32, FP8, 32)
FOR_FORMAT(fp8_128, FP8, 128)
FOR_FORMAT(six_128, SIX, 128)
FOR_FORMAT(nv4_128, NV4, 128)
