// The choice of a token's experts from its router's logits, by one warp in registers: what rows.cu does op by op, for the chains that routers
// are made of. What each op gives is rounded as the op by itself would round it.
#pragma once
#include "tiles.cuh"

// Bytes as Rust writes them (experts.rs).
struct Route {
    const void *logits; // [tokens, width]; none where the experts have been chosen
    const void *bias;   // [width], joins the scores that choose, not those that weigh; or none
    int width, k;
    int score;      // of a logit: 0 itself, 1 softmax, 2 sigmoid
    int wide;       // logits and all that comes of them are f32; bf16 otherwise
    int renewed;    // softmax over the chosen
    int normalized; // divided by their sum, times and plus what follows
    float sum_scale, sum_offset, scale, offset;
};

constexpr int MOST_ROUTED = 256, MOST_CHOSEN = 32;

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    return v;
}
__device__ __forceinline__ float warp_most(float v) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, i));
    return v;
}

// Lane n gets the expert chosen in place n, for the first `places` of them. `scores`: shared memory for MOST_ROUTED numbers, this warp's own.
// Little code, for it is run once and must come from far away.
template <int EACH> __device__ __noinline__ uint32_t choose_of(const Route &a, int token, int places, float *scores) {
    const int lane = threadIdx.x % 32;
    auto number = [&](const void *of, size_t at) { return a.wide ? static_cast<const float *>(of)[at] : to_float(static_cast<const __nv_bfloat16 *>(of)[at]); };
    auto rounded = [&](float x) { return a.wide ? x : to_float(__float2bfloat16(x)); };
    float x[EACH];
    uint32_t key[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) x[i] = lane + i * 32 < a.width ? number(a.logits, size_t(token) * a.width + lane + i * 32) : -INFINITY;
    if (a.score == 1) {
        float most = x[0], sum = 0;
#pragma unroll
        for (int i = 1; i < EACH; i++) most = fmaxf(most, x[i]);
        most = warp_most(most);
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = expf(x[i] - most), sum += x[i];
        sum = warp_sum(sum);
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = rounded(__fdividef(x[i], sum));
    } else if (a.score == 2) {
#pragma unroll
        for (int i = 0; i < EACH; i++) x[i] = rounded(__fdividef(1.f, 1.f + expf(-x[i])));
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int at = lane + i * 32;
        key[i] = 0;
        if (at >= a.width) continue;
        scores[at] = x[i];
        // In the order of the numbers, and above 0; -0 is 0.
        const uint32_t bits = __float_as_uint((a.bias ? rounded(x[i] + number(a.bias, at)) : x[i]) + 0.f);
        key[i] = bits >> 31 ? ~bits : bits | 0x80000000u;
        // Numbers of 16 bits leave room for where they stand, the first of equals the largest.
        if (!a.wide) key[i] = (key[i] & 0xFFFF0000u) | (0xFFFFu - at);
    }
    uint32_t expert = 0;
#pragma unroll 1
    for (int rank = 0; rank < places; rank++) {
        uint32_t best = key[0], at = ~0u;
#pragma unroll
        for (int i = 1; i < EACH; i++) best = max(best, key[i]);
        best = __reduce_max_sync(~0u, best);
        if (a.wide) {
#pragma unroll
            for (int i = EACH - 1; i >= 0; i--)
                if (key[i] == best) at = lane + i * 32;
            at = __reduce_min_sync(~0u, at);
        } else {
            at = 0xFFFFu - (best & 0xFFFFu);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (at == lane + i * 32) key[i] = 0;
        if (lane == rank) expert = min(at, uint32_t(a.width) - 1);
    }
    return expert;
}
__device__ __forceinline__ uint32_t choose(const Route &a, int token, int places, float *scores) {
    return a.width <= MOST_ROUTED / 2 ? choose_of<MOST_ROUTED / 64>(a, token, places, scores) : choose_of<MOST_ROUTED / 32>(a, token, places, scores);
}

// Lane n gets the weight of the expert chosen in place n, once all are chosen.
__device__ __noinline__ float weigh(const Route &a, uint32_t expert, const float *scores) {
    const bool there = threadIdx.x % 32 < a.k;
    auto rounded = [&](float x) { return a.wide ? x : to_float(__float2bfloat16(x)); };
    __syncwarp();
    float weight = there ? scores[expert] : 0.f;
    if (a.renewed) {
        const float most = warp_most(there ? weight : -INFINITY), share = there ? expf(weight - most) : 0.f;
        weight = rounded(share / warp_sum(share));
    }
    if (a.normalized) weight = rounded(weight / rounded(rounded(warp_sum(there ? weight : 0.f)) * a.sum_scale + a.sum_offset));
    return rounded(weight * a.scale + a.offset);
}
