// Attention of many queries at once on Hopper, as attend_many.cu does it elsewhere: a block has 128 queries of one head, 64 for each of two
// warpgroups that multiply with wgmma, while one thread of a third has the copy engine bring keys and values, two blocks of 128 ahead.
// Scores of a block of keys are multiplied while the values of the one before are (arXiv 2407.08608).
#include "attention.cuh"
#include <cuda.h>

constexpr int QUERIES = 128, KEYS = 128, STAGES = 2;
// Of the second and third warpgroup.
constexpr int WORKERS = 256;

#define REGISTERS_32                                                                                                                       \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGISTERS_64                                                                                                                       \
    REGISTERS_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"  \
                 "%61,%62,%63"
#define FLOATS_8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FLOATS_32(d, i) FLOATS_8(d, i), FLOATS_8(d, i + 8), FLOATS_8(d, i + 16), FLOATS_8(d, i + 24)

// Where a matrix that the copy engine has laid down begins, in rows of 64 numbers whose 16-byte pieces are swizzled eight rows at a time.
// `apart`: bytes between pieces of 64 columns, where those are the product's columns.
__device__ __forceinline__ uint64_t matrix(uint32_t at, uint32_t apart) {
    return uint64_t(at >> 4 & 0x3FFF) | uint64_t(apart >> 4) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// All but so many groups of products are done, and d with them, which the compiler is not to read before.
template <int LEFT, int N> __device__ __forceinline__ void products_wait(float (&d)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d (+)= a bᵀ, 64 x 128 of 16: both lie in shared memory.
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, bool adds) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64
                 "}, %64, %65, p, 1, 1, 0, 0;}"
                 : FLOATS_32(d, 0), FLOATS_32(d, 32)
                 : "l"(a), "l"(b), "r"(int(adds)));
}
// d += a b, 64 x 128 of 16: a lies in registers.
__device__ __forceinline__ void multiply(float (&d)[64], const uint32_t *a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" REGISTERS_64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : FLOATS_32(d, 0), FLOATS_32(d, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
// The same, 64 x 64.
__device__ __forceinline__ void multiply(float (&d)[32], const uint32_t *a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : FLOATS_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

__device__ __forceinline__ void expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t turn) {
    asm volatile("{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again;}" ::"r"(barrier), "r"(turn & 1) : "memory");
}

// Rows from `row` on of one head to shared memory, in pieces of 64 columns.
template <int D> __device__ __forceinline__ void bring(uint32_t to, const CUtensorMap &from, int head, int row, int rows, uint32_t barrier) {
    expect(barrier, rows * D * 2);
#pragma unroll
    for (int piece = 0; piece < D / 64; piece++)
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to + piece * rows * 128),
                     "l"(&from), "r"(piece * 64), "r"(head), "r"(row), "r"(barrier)
                     : "memory");
}

template <int D> __device__ __forceinline__ void attend(const Seen &a, const CUtensorMap &queries, const CUtensorMap &keys, const CUtensorMap &values, uint8_t *shared) {
    constexpr uint32_t TABLE = KEYS * D * 2;
    const int head = blockIdx.x, kv = head / (a.heads / a.kv_heads);
    // The last queries see most: they start first.
    const int first_query = (gridDim.y - 1 - blockIdx.y) * QUERIES;
    const uint32_t q_at = (uint32_t(__cvta_generic_to_shared(shared)) + 1023) / 1024 * 1024;
    const uint32_t k_at = q_at + QUERIES * D * 2, v_at = k_at + STAGES * TABLE, barriers = v_at + STAGES * TABLE;
    const uint32_t q_there = barriers, k_there = barriers + 8, v_there = k_there + 8 * STAGES, k_free = v_there + 8 * STAGES, v_free = k_free + 8 * STAGES;
    if (threadIdx.x == 0) {
        auto begin = [](uint32_t barrier, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"); };
        begin(q_there, 1);
        for (int s = 0; s < STAGES; s++) begin(k_there + 8 * s, 1), begin(v_there + 8 * s, 1), begin(k_free + 8 * s, WORKERS / 32), begin(v_free + 8 * s, WORKERS / 32);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    wait_for_previous();
    const Span low = span(a, a.cache, a.positions[first_query]), high = span(a, a.cache, a.positions[min(first_query + QUERIES, a.tokens) - 1]);
    const int from = low.from / KEYS, to = (high.to + KEYS - 1) / KEYS;
    // The last block of keys comes first: it is the one that most queries see in part.
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            bring<D>(q_at, queries, head, first_query, QUERIES, q_there);
            for (int i = 0; i < to - from; i++) {
                const uint32_t s = i % STAGES, turn = i / STAGES;
                if (i >= STAGES) wait(k_free + 8 * s, turn - 1);
                bring<D>(k_at + s * TABLE, keys, kv, (to - 1 - i) * KEYS, KEYS, k_there + 8 * s);
                if (i >= STAGES) wait(v_free + 8 * s, turn - 1);
                bring<D>(v_at + s * TABLE, values, kv, (to - 1 - i) * KEYS, KEYS, v_there + 8 * s);
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int worker = threadIdx.x - 128, group = worker / 128, warp = worker / 32 % 4, lane = worker % 32, g = lane / 4, c = lane % 4;
        const float slope = a.slopes ? a.slopes[head] : 0.f;
        const bool unbent = a.softcap == 0.f && !a.slopes && a.scale > 0.f;
        const int query[2] = {first_query + group * 64 + warp * 16 + g, first_query + group * 64 + warp * 16 + g + 8};
        uint32_t position[2];
        Span seen[2];
#pragma unroll
        for (int h = 0; h < 2; h++) position[h] = a.positions[min(query[h], a.tokens - 1)], seen[h] = span(a, a.cache, position[h]);
        const int all_from = max(seen[0].from, seen[1].from), all_to = min(seen[0].to, seen[1].to);
        float o[D / 2], s[64], top[2] = {-INFINITY, -INFINITY}, total[2] = {}, fade[2];
        uint32_t p[32];
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] = 0.f;

        // s = scores of the i-th block of keys.
        auto score = [&](int i) {
            const uint32_t stage = i % STAGES, k = k_at + stage * TABLE, q = q_at + group * 64 * 128;
            wait(k_there + 8 * stage, i / STAGES);
            products_begin();
#pragma unroll
            for (int j = 0; j < D / 16; j++)
                multiply(s, matrix(q + j / 4 * QUERIES * 128 + j % 4 * 32, 0), matrix(k + j / 4 * KEYS * 128 + j % 4 * 32, 0), j > 0);
            products_end();
        };
        // o += shares times the i-th block of values.
        auto gather = [&](int i) {
            const uint32_t stage = i % STAGES, v = v_at + stage * TABLE;
            wait(v_there + 8 * stage, i / STAGES);
            const int end = high.to - (to - 1 - i) * KEYS;
            if (end < KEYS) {
                // What nobody has written yet may be no number, and is not to meet a share of 0.
                for (int at = end * 128 + worker * 16; at < KEYS * 128; at += WORKERS * 16)
#pragma unroll
                    for (int piece = 0; piece < D / 64; piece++)
                        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(v + piece * KEYS * 128 + at), "r"(0) : "memory");
                asm volatile("fence.proxy.async.shared::cta; bar.sync 1, %0;" ::"n"(WORKERS) : "memory");
            }
            products_begin();
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) multiply(o, p + 4 * j, matrix(v + j * 16 * 128, KEYS * 128));
            products_end();
        };
        auto let_go = [&](uint32_t barrier) {
            if (lane == 0) arrive(barrier);
        };
        // Scores to shares of what the largest so far weighs, and by how much that has made the earlier ones smaller.
        auto soften = [&](int i) {
            const int first = (to - 1 - i) * KEYS;
            float factor = a.scale * LOG2E;
            if (!(unbent && first >= all_from && first + KEYS <= all_to)) {
#pragma unroll
                for (int n = 0; n < 64; n++) {
                    const int h = n / 2 % 2, at = first + n / 4 * 8 + 2 * c + n % 2;
                    const float bent_score = bent(a, unbent, s[n], slope, int(position[h] - a.cache.first) - at);
                    s[n] = at >= seen[h].from && at < seen[h].to ? bent_score : -INFINITY;
                }
                factor = 1.f;
            }
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float peak = s[2 * h];
#pragma unroll
                for (int n = 0; n < 32; n++) peak = fmaxf(peak, s[n / 2 * 4 + 2 * h + n % 2]);
                peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
                peak = fmaxf(fmaxf(peak, __shfl_xor_sync(~0u, peak, 2)) * factor, top[h]);
                const float zero = peak == -INFINITY ? 0.f : peak;
                fade[h] = power_of_two(top[h] - zero);
                top[h] = peak;
                float sum = 0.f;
#pragma unroll
                for (int n = 0; n < 32; n++) {
                    float &share = s[n / 2 * 4 + 2 * h + n % 2];
                    sum += share = power_of_two(fmaf(share, factor, -zero));
                }
                total[h] = total[h] * fade[h] + sum;
            }
        };
        auto round = [&] {
#pragma unroll
            for (int n = 0; n < 32; n++) p[n] = bf16_pair(s[2 * n], s[2 * n + 1]);
        };

        const int blocks = to - from;
        if (blocks > 0) {
            wait(q_there, 0);
            score(0);
            products_wait<0>(s);
            let_go(k_free);
            soften(0);
            round();
        }
        for (int i = 1; i < blocks; i++) {
            score(i);
            gather(i - 1);
            products_wait<1>(s);
            let_go(k_free + 8 * (i % STAGES));
            soften(i);
            products_wait<0>(o);
            let_go(v_free + 8 * ((i - 1) % STAGES));
#pragma unroll
            for (int n = 0; n < D / 2; n++) o[n] *= fade[n / 2 % 2];
            round();
        }
        if (blocks > 0) {
            gather(blocks - 1);
            products_wait<0>(o);
        }
        let_next_start();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            total[h] += __shfl_xor_sync(~0u, total[h], 1);
            total[h] += __shfl_xor_sync(~0u, total[h], 2);
            if (query[h] >= a.tokens) continue;
            float share = 1.f;
            if (a.sinks) {
                const float sink = a.sinks[head] * LOG2E, higher = fmaxf(top[h], sink);
                share = power_of_two(top[h] - higher), total[h] = total[h] * share + power_of_two(sink - higher);
            }
            share = total[h] > 0 ? share / total[h] : 0.f;
            __nv_bfloat16 *row = a.y + (size_t(query[h]) * a.heads + head) * D + 2 * c;
#pragma unroll
            for (int n = 0; n < D / 8; n++) *reinterpret_cast<uint32_t *>(row + 8 * n) = bf16_pair(o[4 * n + 2 * h] * share, o[4 * n + 2 * h + 1] * share);
        }
    }
}

#define ATTEND_HOPPER(D)                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(128 + WORKERS, 1)                                                                        \
        attend_hopper_##D(const __grid_constant__ Seen a, const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,   \
                          const __grid_constant__ CUtensorMap v) {                                                                        \
        extern __shared__ __align__(1024) uint8_t shared[];                                                                               \
        attend<D>(a, q, k, v, shared);                                                                                                    \
    }

ATTEND_HOPPER(64)
ATTEND_HOPPER(128)
