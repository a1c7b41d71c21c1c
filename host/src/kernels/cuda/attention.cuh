// What the two attention kernels share: their arguments, which keys a query sees, and how scores are bent.
#pragma once
#include "tiles.cuh"

// A sequence's keys and values [capacity, kv_heads, D]; `first` is the position of entry 0.
struct Cache {
    __nv_bfloat16 *k, *v;
    uint32_t first;
    int capacity;
};
// Bytes as Rust writes them (attention.rs).
struct Seen {
    const __nv_bfloat16 *q;
    __nv_bfloat16 *y;
    const uint32_t *positions; // of the queries
    const float *sinks, *slopes;
    float *partial;      // [tokens, parts of heads, splits (64 at most), 16, D + 4]
    uint32_t *arrived;   // [tokens, parts of heads], 0 between launches
    int tokens, heads, kv_heads, splits;
    uint32_t window, chunk; // 0 for none
    float scale, softcap;   // softcap 0 for none
    float by_softcap;       // 1 / (softcap log2 e)
    uint32_t words, group_log2; // of a cache in groups of a few bits: of a row of one head, and of the numbers of a group
    Cache cache;            // unless each token is a sequence with its own
};

constexpr float LOG2E = 1.4426950408889634f;

// Entries [from, to) of the cache that a query at `position` sees.
struct Span {
    int from, to;
};
__device__ __forceinline__ Span span(const Seen &a, const Cache &cache, uint32_t position) {
    uint32_t low = cache.first;
    if (a.window && position + 1 > a.window) low = max(low, position + 1 - a.window);
    if (a.chunk) low = max(low, position / a.chunk * a.chunk);
    return {int(low - cache.first), min(int(position + 1 - cache.first), cache.capacity)};
}

__device__ __forceinline__ float power_of_two(float x) {
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// A score to the base 2, from the product of query and key; `plain` where it is only to be scaled.
__device__ __forceinline__ float bent(const Seen &a, bool plain, float s, float slope, int distance) {
    s *= a.scale * LOG2E;
    if (plain) return s;
    if (a.softcap > 0.f) s = a.softcap * LOG2E * tanhf(s * a.by_softcap);
    return s - slope * LOG2E * distance;
}
