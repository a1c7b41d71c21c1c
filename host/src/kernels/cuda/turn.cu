// What stands between the projections of queries, keys and values and attention, of one sequence's few tokens, in one launch: queries and
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

// Grid: (heads + 2 kv_heads, tokens); a thread has a pair of lanes.
extern "C" __global__ void __launch_bounds__(256) turn(const __grid_constant__ Turning a) {
    __shared__ float row[512], sums[8];
    const uint32_t head = blockIdx.x, token = blockIdx.y;
    const uint32_t position = a.positions[token], place = position - a.origin;
    const bool is_query = head < a.heads, is_key = !is_query && head < a.heads + a.kv_heads;
    let_next_start();
    // Angles need nothing that the kernel before writes.
    const uint32_t half = a.dims / 2, lane = threadIdx.x;
    float c = 1, s = 0;
    if (lane < half && (is_query || is_key)) {
        double sine, cosine;
        sincos((double)(float)(position / a.every * a.every) * (double)a.frequencies[lane], &sine, &cosine);
        c = (float)(cosine * (double)a.amplitude), s = (float)(sine * (double)a.amplitude) * a.sign;
    }
    wait_for_previous();
    if (!is_query && place >= a.capacity) return;
    if (!is_query && !is_key) {
        const uint32_t kv = head - a.heads - a.kv_heads;
        const __nv_bfloat16 *from = a.v + ((size_t)token * a.kv_heads + kv) * a.e;
        __nv_bfloat16 *to = a.values + ((size_t)place * a.kv_heads + kv) * a.e;
        for (uint32_t i = threadIdx.x; i < a.e; i += blockDim.x) to[i] = from[i];
        return;
    }
    const uint32_t own = is_query ? head : head - a.heads;
    const __nv_bfloat16 *from = is_query ? a.q + ((size_t)token * a.heads + own) * a.d : a.k + ((size_t)token * a.kv_heads + own) * a.d;
    __nv_bfloat16 *to = is_query ? a.y + ((size_t)token * a.heads + own) * a.d : a.keys + ((size_t)place * a.kv_heads + own) * a.d;
    float squares = 0;
    for (uint32_t i = threadIdx.x; i < a.d; i += blockDim.x) {
        const float x = wide(from[i]);
        row[i] = x, squares += x * x;
    }
    if (is_query ? a.q_normed : a.k_normed) {
        for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(~0u, squares, step);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
        __syncthreads();
        float sum = 0;
        for (uint32_t i = 0; i < blockDim.x / 32; i++) sum += sums[i];
        const float scale = rsqrtf(sum / a.d + (is_query ? a.q_eps : a.k_eps));
        const float *weight = is_query ? a.q_weight : a.k_weight;
        // Rounded as a norm by itself rounds.
        for (uint32_t i = threadIdx.x; i < a.d; i += blockDim.x) row[i] = wide(narrow<__nv_bfloat16>(row[i] * scale * (weight ? weight[i] : 1.f)));
    }
    __syncthreads();
    if (lane < half) {
        const uint32_t i = a.first + (a.neighbours ? 2 * lane : lane), j = a.neighbours ? i + 1 : i + half;
        const float p = row[i], q = row[j];
        to[i] = narrow<__nv_bfloat16>(__fsub_rn(__fmul_rn(p, c), __fmul_rn(q, s)));
        to[j] = narrow<__nv_bfloat16>(__fadd_rn(__fmul_rn(q, c), __fmul_rn(p, s)));
    }
    for (uint32_t i = threadIdx.x; i < a.d - a.dims; i += blockDim.x) {
        const uint32_t at = i < a.first ? i : i + a.dims;
        to[at] = narrow<__nv_bfloat16>(row[at]);
    }
}
