// What stands between the projections of queries, keys and values and attention, of one sequence's tokens, in one launch: queries and
// keys are normalized head by head, turned by their positions, and keys and values join the cache.
#include "floats.cuh"
#include "tiles.cuh"

// Bytes as Rust writes them (turn.rs).
struct Turning {
    const __nv_bfloat16 *q, *k, *v; // [tokens, heads, d], [tokens, kv_heads, d], [tokens, kv_heads, e]
    __nv_bfloat16 *y;               // of q
    __nv_bfloat16 *keys, *values;   // [capacity, kv_heads, d], [capacity, kv_heads, e]
    const uint32_t *positions;      // [tokens]
    const float *frequencies;       // one a pair of lanes
    const float *q_weight, *k_weight; // of the norms
    uint32_t heads, kv_heads, d, e;
    uint32_t dims, first, neighbours, every; // as in step.cu's rope; no dims: nothing turns
    float amplitude, sign;
    float q_eps, k_eps;
    uint32_t q_normed, k_normed;
    uint32_t origin, capacity;
};

constexpr int WARPS = 8;

// Four neighbours of a row of a multiple of four.
__device__ __forceinline__ void widen(const __nv_bfloat16 *from, float *to) {
    const uint2 words = *reinterpret_cast<const uint2 *>(from);
    to[0] = __uint_as_float(words.x << 16), to[1] = __uint_as_float(words.x & 0xFFFF0000u);
    to[2] = __uint_as_float(words.y << 16), to[3] = __uint_as_float(words.y & 0xFFFF0000u);
}
__device__ __forceinline__ uint32_t pair(float low, float high) {
    return uint32_t(__bfloat16_as_ushort(narrow<__nv_bfloat16>(low))) | uint32_t(__bfloat16_as_ushort(narrow<__nv_bfloat16>(high))) << 16;
}

// Grid: (tokens, shares of the heads); the heads of a token have their angles in common, and a warp takes one after the other.
extern "C" __global__ void __launch_bounds__(32 * WARPS) turn(const __grid_constant__ Turning a) {
    __shared__ float cosines[256], sines[256];
    __shared__ __align__(16) float rows[WARPS][512];
    const uint32_t token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t position = a.positions[token], place = position - a.origin, half = a.dims / 2;
    let_next_start();
    // Angles need nothing that the kernel before writes.
    for (uint32_t i = threadIdx.x; i < half; i += blockDim.x) {
        double sine, cosine;
        sincos((double)(float)(position / a.every * a.every) * (double)a.frequencies[i], &sine, &cosine);
        cosines[i] = (float)(cosine * (double)a.amplitude), sines[i] = (float)(sine * (double)a.amplitude) * a.sign;
    }
    wait_for_previous();
    __syncthreads();
    float *row = rows[warp];
    for (uint32_t head = blockIdx.y * WARPS + warp; head < a.heads + 2 * a.kv_heads; head += gridDim.y * WARPS) {
        const bool is_query = head < a.heads, is_key = !is_query && head < a.heads + a.kv_heads;
        if (!is_query && place >= a.capacity) continue;
        const uint32_t own = is_query ? head : is_key ? head - a.heads : head - a.heads - a.kv_heads, of = is_query ? a.heads : a.kv_heads;
        const uint32_t width = is_query || is_key ? a.d : a.e;
        const __nv_bfloat16 *from = (is_query ? a.q : is_key ? a.k : a.v) + ((size_t)token * of + own) * width;
        __nv_bfloat16 *to = (is_query ? a.y : is_key ? a.keys : a.values) + ((size_t)(is_query ? token : place) * of + own) * width;
        if (!is_query && !is_key) {
            for (uint32_t i = 4 * lane; i < width; i += 128) *reinterpret_cast<uint2 *>(to + i) = *reinterpret_cast<const uint2 *>(from + i);
            continue;
        }
        float squares = 0;
        for (uint32_t i = 4 * lane; i < width; i += 128) {
            widen(from + i, row + i);
            for (uint32_t j = i; j < i + 4; j++) squares += row[j] * row[j];
        }
        if (is_query ? a.q_normed : a.k_normed) {
            for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
            const float scale = rsqrtf(squares / width + (is_query ? a.q_eps : a.k_eps));
            const float *weight = is_query ? a.q_weight : a.k_weight;
            // Rounded as a norm by itself rounds.
            for (uint32_t i = 4 * lane; i < width; i += 128)
                for (uint32_t j = i; j < i + 4; j++) row[j] = wide(narrow<__nv_bfloat16>(row[j] * scale * (weight ? weight[j] : 1.f)));
        }
        __syncwarp();
        for (uint32_t i = 4 * lane; i < width; i += 128) {
            float y[4];
#pragma unroll
            for (uint32_t k = 0; k < 4; k++) {
                const uint32_t at = i + k, turning = at - a.first;
                y[k] = row[at];
                if (turning >= a.dims) continue;
                const bool is_first = a.neighbours ? turning % 2 == 0 : turning < half;
                const uint32_t angle = a.neighbours ? turning / 2 : is_first ? turning : turning - half, apart = a.neighbours ? 1 : half;
                const float other = __fmul_rn(row[is_first ? at + apart : at - apart], sines[angle]), same = __fmul_rn(y[k], cosines[angle]);
                y[k] = is_first ? __fsub_rn(same, other) : __fadd_rn(same, other);
            }
            *reinterpret_cast<uint2 *>(to + i) = make_uint2(pair(y[0], y[1]), pair(y[2], y[3]));
        }
        __syncwarp();
    }
}
