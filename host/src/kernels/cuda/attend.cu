// Attention of a few queries over a cache of any shape: softmax(scale q k) v without the matrix of scores. A block is one query's head; its
// warps take the keys in turn, each with a softmax of its own, and are merged in order. How many keys there are is read from the queries'
// positions on the device.

#include "floats.cuh"
#include <cstdint>

namespace {

constexpr uint32_t WARPS = 8, MOST = 16; // a value has at most 32 * MOST lanes

} // namespace

// As `Seen` in attend.rs has it.
struct Seen {
    uint64_t q, keys, values, positions, sinks, slopes, y;
    uint32_t heads, kv_heads, d, e, stride; // `stride`: lanes of a value's row of one head
    uint32_t origin, capacity, window, chunk, keep;
    float scale, softcap;
};

template <typename T> __device__ void attend(const Seen &s) {
    extern __shared__ float shared[];
    float *query = shared, *sums = shared + s.d; // [WARPS, e]
    __shared__ float tops[WARPS], totals[WARPS];
    const uint32_t head = blockIdx.x, token = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t kv = head / (s.heads / s.kv_heads);
    const uint32_t position = ((const uint32_t *)s.positions)[token];
    const T *q = (const T *)s.q + ((size_t)token * s.heads + head) * s.d;
    const T *keys = (const T *)s.keys, *values = (const T *)s.values;
    for (uint32_t i = threadIdx.x; i < s.d; i += blockDim.x) query[i] = wide(q[i]);
    __syncthreads();
    const uint32_t entries = min(position - s.origin + 1, s.capacity);
    const uint32_t in_window = s.window && position + 1 > s.window ? position + 1 - s.window : 0;
    const uint32_t in_chunk = s.chunk ? position / s.chunk * s.chunk : 0;
    const uint32_t oldest = max(in_chunk, s.keep ? 0 : in_window);
    const float slope = s.slopes ? ((const float *)s.slopes)[head] : 0.0f;
    float top = -INFINITY, total = 0.0f, sum[MOST];
    for (uint32_t j = 0; j < MOST; j++) sum[j] = 0.0f;
    const uint32_t from = oldest > s.origin && !s.keep ? oldest - s.origin : 0;
    for (uint32_t i = from + warp; i < entries; i += WARPS) {
        const uint32_t at = i < s.keep ? i : i + s.origin;
        if (at < in_chunk || (at < in_window && at >= s.keep)) continue;
        const T *k = keys + ((size_t)i * s.kv_heads + kv) * s.d;
        float score = 0.0f;
        for (uint32_t l = lane; l < s.d; l += 32) score += query[l] * wide(k[l]);
        for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(~0u, score, step);
        score *= s.scale;
        if (s.softcap > 0.0f) score = s.softcap * tanhf(score / s.softcap);
        score += slope * ((float)at - (float)position);
        const float now = fmaxf(top, score), fade = expf(top - now), share = expf(score - now);
        const T *v = values + ((size_t)i * s.kv_heads + kv) * s.stride;
#pragma unroll
        for (uint32_t j = 0; j < MOST; j++)
            if (j * 32 + lane < s.e) sum[j] = sum[j] * fade + share * wide(v[j * 32 + lane]);
        total = total * fade + share, top = now;
    }
#pragma unroll
    for (uint32_t j = 0; j < MOST; j++)
        if (j * 32 + lane < s.e) sums[warp * s.e + j * 32 + lane] = sum[j];
    if (lane == 0) tops[warp] = top, totals[warp] = total;
    __syncthreads();
    float most = s.sinks ? ((const float *)s.sinks)[head] : -INFINITY;
    for (uint32_t w = 0; w < WARPS; w++) most = fmaxf(most, tops[w]);
    float all = s.sinks ? expf(((const float *)s.sinks)[head] - most) : 0.0f;
    for (uint32_t w = 0; w < WARPS; w++)
        if (totals[w] > 0.0f) all += totals[w] * expf(tops[w] - most);
    T *y = (T *)s.y + ((size_t)token * s.heads + head) * s.e;
    for (uint32_t i = threadIdx.x; i < s.e; i += blockDim.x) {
        float x = 0.0f;
        for (uint32_t w = 0; w < WARPS; w++)
            if (totals[w] > 0.0f) x += sums[w * s.e + i] * expf(tops[w] - most);
        y[i] = narrow<T>(all > 0.0f ? x / all : 0.0f);
    }
}

extern "C" __global__ void attend_f32(const Seen seen) { attend<float>(seen); }
extern "C" __global__ void attend_f16(const Seen seen) { attend<__half>(seen); }
extern "C" __global__ void attend_bf16(const Seen seen) { attend<__nv_bfloat16>(seen); }
