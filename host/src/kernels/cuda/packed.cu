// y = x W^T for a few tokens, W packed: the matmul of decoding, which must run as fast as the weights arrive. A block has some rows of
// tiles; its warps share the columns and add up at the end.
#include "packed.cuh"

// One of up to three matrices that share their input.
struct Mat {
    Packed w;
    const __nv_bfloat16 *bias, *residual;
    __nv_bfloat16 *y;
    int rows, tiles, y_stride, unused;
};

// Bytes as Rust writes them (packed.rs).
struct Matmul {
    Mat mats[3];
    const __nv_bfloat16 *x;
    int tokens, cols, x_stride;
    Joint joint;
};

// RT rows of tiles a block, NT * 8 tokens at most, S tiles of each row on their way at once. GATED: row of tiles i of the
// first two matrices, the gate and what it lets through. Otherwise the rows of tiles of all matrices follow one another.
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
    product<P, GROUP, RT, NT, S>(of, rows, x, a.cols, warp, warps, shared + warp * ring_bytes<P, GROUP, RT, NT, S>, y, wait_for_previous);
    __syncthreads();
    float *partial = reinterpret_cast<float *>(shared);
    put<RT, NT>(y, partial);
    __syncthreads();
    const Mat &m = a.mats[which];
    for (int i = threadIdx.x; i < OWN * NT * 128; i += blockDim.x) {
        int r = i / (NT * 128), token = i / 16 % (NT * 8), row = (first + r) * 16 + i % 16;
        if (token >= a.tokens || row >= m.rows) continue;
        auto total = [&](int r) {
            float sum = 0;
            for (int w = 0; w < warps; w++) sum += partial[(w * RT + r) * NT * 128 + i % (NT * 128)];
            return sum;
        };
        float out = 0;
        if constexpr (GATED) {
            float gate = total(2 * r), up = total(2 * r + 1);
            if (a.mats[0].bias) gate += to_float(a.mats[0].bias[row]);
            if (a.mats[1].bias) up += to_float(a.mats[1].bias[row]);
            out = joined(a.joint, gate, up);
        } else {
            out = total(r);
            if (m.bias) out += to_float(m.bias[row]);
            if (m.residual) out += to_float(m.residual[size_t(token) * m.y_stride + row]);
        }
        m.y[size_t(token) * m.y_stride + row] = __float2bfloat16(out);
    }
}

// A block's shared memory: rings, and later, in their place, what its warps add up.
template <int P, int GROUP, int RT, int NT, int S> constexpr int shared_of_warp = ring_bytes<P, GROUP, RT, NT, S> > RT * NT * 512 ? ring_bytes<P, GROUP, RT, NT, S> : RT * NT * 512;

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
