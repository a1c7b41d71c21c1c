// Attention of many queries at once (prefill): a block has 64 queries of one head, a warp sixteen of them; keys and values come by in
// blocks of 64 through shared memory, the next ones while these are used, with the softmax kept running (arXiv 2307.08691).
#include "attention.cuh"

constexpr int QUERIES = 64, KEYS = 64;

template <bool TRANSPOSED> __device__ __forceinline__ void matrices(uint32_t (&r)[4], uint32_t at) {
    if (TRANSPOSED) asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
    else asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}

// Byte of 16-byte piece `piece` of row `row`; pieces of eight rows at one column lie in different banks.
template <int D> __device__ __forceinline__ uint32_t place(int row, int piece) { return (row * (D / 8) + (piece ^ (row & 7))) * 16; }

template <int D> __device__ __forceinline__ void attend_many(const Seen &a, uint8_t *shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const int head = blockIdx.y, kv = head / (a.heads / a.kv_heads);
    // The last queries see most: they start first.
    const int first_query = (gridDim.x - 1 - blockIdx.x) * QUERIES;
    const uint32_t memory = uint32_t(__cvta_generic_to_shared(shared));
    constexpr uint32_t TABLE = KEYS * D * 2;
    wait_for_previous();
    const Span low = span(a, a.cache, a.positions[first_query]), high = span(a, a.cache, a.positions[min(first_query + QUERIES, a.tokens) - 1]);
    const int from = low.from / KEYS, to = (high.to + KEYS - 1) / KEYS;
    auto fetch = [&](int block) {
        const uint32_t k = memory + (block & 1) * 2 * TABLE, v = k + TABLE;
        for (int i = threadIdx.x; i < KEYS * D / 8; i += blockDim.x) {
            int r = i / (D / 8), piece = i % (D / 8);
            size_t at = (size_t(min(block * KEYS + r, high.to - 1)) * a.kv_heads + kv) * D + piece * 8;
            copy16(k + place<D>(r, piece), a.cache.k + at);
            copy16(v + place<D>(r, piece), a.cache.v + at);
        }
        copies_end();
    };
    fetch(from);
    uint32_t position[2];
    float slope = a.slopes ? a.slopes[head] : 0.f;
    const bool unbent = a.softcap == 0.f && !a.slopes;
    uint32_t q[D / 16][4];
    int query[2] = {first_query + warp * 16 + g, first_query + warp * 16 + g + 8};
    Span seen[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        int t = min(query[h], a.tokens - 1);
        position[h] = a.positions[t], seen[h] = span(a, a.cache, position[h]);
        const __nv_bfloat16 *row = a.q + (size_t(t) * a.heads + head) * D + 2 * c;
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            q[j][h] = *reinterpret_cast<const uint32_t *>(row + 16 * j);
            q[j][2 + h] = *reinterpret_cast<const uint32_t *>(row + 16 * j + 8);
        }
    }
    float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
    for (int block = from; block < to; block++) {
        copies_wait<0>();
        __syncthreads();
        if (block + 1 < to) fetch(block + 1);
        const uint32_t k = memory + (block & 1) * 2 * TABLE, v = k + TABLE;
        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int j = 0; j < D / 16; j++)
#pragma unroll
            for (int n = 0; n < KEYS / 16; n++) {
                // Matrices: keys 0-7 and 8-15 of sixteen, each with the lower and upper eight lanes.
                uint32_t b[4];
                matrices<false>(b, k + place<D>(n * 16 + lane % 8 + lane / 16 * 8, 2 * j + lane / 8 % 2));
                mma(s[2 * n], q[j][0], q[j][1], q[j][2], q[j][3], b[0], b[1]);
                mma(s[2 * n + 1], q[j][0], q[j][1], q[j][2], q[j][3], b[2], b[3]);
            }
        float peak[2] = {-INFINITY, -INFINITY};
        const bool plain = unbent && block * KEYS >= max(seen[0].from, seen[1].from) && (block + 1) * KEYS <= min(seen[0].to, seen[1].to);
        if (plain) {
            const float scale = a.scale * LOG2E;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) s[n][i] *= scale, peak[i / 2] = fmaxf(peak[i / 2], s[n][i]);
        } else {
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int at = block * KEYS + 8 * n + 2 * c + i % 2;
                    bool sees = at >= seen[i / 2].from && at < seen[i / 2].to;
                    const float score = bent(a, unbent, s[n][i], slope, int(position[i / 2] - a.cache.first) - at);
                    s[n][i] = sees ? score : -INFINITY;
                    peak[i / 2] = fmaxf(peak[i / 2], s[n][i]);
                }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 1));
            peak[h] = fmaxf(fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 2)), top[h]);
            float zero = peak[h] == -INFINITY ? 0.f : peak[h], fade = power_of_two(top[h] - zero);
            top[h] = peak[h], total[h] *= fade;
#pragma unroll
            for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) total[h] += s[n][2 * h + i] = power_of_two(s[n][2 * h + i] - zero);
#pragma unroll
            for (int n = 0; n < D / 8; n++) o[n][2 * h] *= fade, o[n][2 * h + 1] *= fade;
        }
#pragma unroll
        for (int j = 0; j < KEYS / 16; j++) {
            const uint32_t p0 = bf16_pair(s[2 * j][0], s[2 * j][1]), p1 = bf16_pair(s[2 * j][2], s[2 * j][3]);
            const uint32_t p2 = bf16_pair(s[2 * j + 1][0], s[2 * j + 1][1]), p3 = bf16_pair(s[2 * j + 1][2], s[2 * j + 1][3]);
#pragma unroll
            for (int n = 0; n < D / 16; n++) {
                uint32_t b[4];
                matrices<true>(b, v + place<D>(j * 16 + lane % 16, 2 * n + lane / 16));
                mma(o[2 * n], p0, p1, p2, p3, b[0], b[1]);
                mma(o[2 * n + 1], p0, p1, p2, p3, b[2], b[3]);
            }
        }
    }
    let_next_start();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        if (query[h] >= a.tokens) continue;
        float share = 1.f;
        if (a.sinks) {
            float sink = a.sinks[head] * LOG2E, higher = fmaxf(top[h], sink);
            share = power_of_two(top[h] - higher), total[h] = total[h] * share + power_of_two(sink - higher);
        }
        share = total[h] > 0 ? share / total[h] : 0.f;
        __nv_bfloat16 *row = a.y + (size_t(query[h]) * a.heads + head) * D + 2 * c;
#pragma unroll
        for (int n = 0; n < D / 8; n++) *reinterpret_cast<uint32_t *>(row + 8 * n) = bf16_pair(o[n][2 * h] * share, o[n][2 * h + 1] * share);
    }
}

#define ATTEND_MANY(D)                                                                                                                     \
    extern "C" __global__ void __launch_bounds__(128) attend_many_##D(const __grid_constant__ Seen a) {                                   \
        extern __shared__ __align__(16) uint8_t shared[];                                                                                 \
        attend_many<D>(a, shared);                                                                                                         \
    }

ATTEND_MANY(64)
ATTEND_MANY(128)
