// Attention of one query at a time over a long cache (decoding). The cache is split over blocks, and within a block over warps; the block
// that is last to finish adds the parts up. Sixteen query heads that share keys are the rows of the tensor cores' products, so that a key
// is read once for all of them. Keys and values come through shared memory that each lane fills and reads alone, in its own order.
#pragma once
#include "attention.cuh"

// Blocks of a cluster are 8 at most.
constexpr int AHEAD = 2, MOST_SEQUENCES = 32, MOST_SPLITS = 8;
// Warps of a block. Clusters are for few queries, which leave multiprocessors alone; what they wait for is the longest share of a warp.
template <int D, bool CLUSTERED> constexpr int warps_of = CLUSTERED && D <= 128 ? 8 : 4;

template <int D> constexpr int PIECES = 4 * (D / 32) ;
// Shared memory: queries, then each warp's ring; in its place later what the warps add up.
template <int D, int WARPS> constexpr int few_shared = 16 * (D + 32) * 2 + (WARPS * AHEAD * PIECES<D> * 512 > WARPS * 16 * (D + 4) * 4 ? WARPS * AHEAD * PIECES<D> * 512 : WARPS * 16 * (D + 4) * 4);

// In clusters, behind that: what the other blocks give this one to add up.
template <int D, int WARPS> constexpr int given_shared = (16 * D + 7 * 32 * WARPS) * 4;

// Writes to the shared memory of another block of the cluster, at the same place there as `at` is here.
__device__ __forceinline__ void give(float *at, int block, float x) {
#if __CUDA_ARCH__ >= 900
    uint32_t there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(uint32_t(__cvta_generic_to_shared(at))), "r"(block));
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(x) : "memory");
#endif
}
// All threads of the cluster come here: to say that their block runs, and to know that all do, or to see what the others wrote before.
__device__ __forceinline__ void cluster_runs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
    cluster_wait();
}

// What queries, keys and values go through on their way here, where that has not been done: norms of heads, turns by positions, and the
// joining of caches. Each token is a sequence of its own then. Bytes as Rust writes them (attention.rs).
struct Turned {
    Seen seen;
    const __nv_bfloat16 *k, *v; // [tokens, kv_heads, D]
    const float *frequencies;   // one a pair of lanes
    const float *q_weight, *k_weight; // of the norms
    int dims, first, neighbours;      // as in step.cu's rope; no dims: nothing turns
    uint32_t every;
    float amplitude, sign;
    float q_eps, k_eps;
    int q_normed, k_normed;
    Cache of[MOST_SEQUENCES];
};

// A warp takes a head that it has in `x`, lane by lane; `put` has the number that goes to a lane.
template <int D, class Put> __device__ __forceinline__ void turn_head(const Turned &t, float (&x)[D / 32], bool normed, const float (&weight)[D / 32], float eps, const float2 *angles, float *row, Put put) {
    const int lane = threadIdx.x % 32;
    if (normed) {
        float squares = 0;
#pragma unroll
        for (int i = 0; i < D / 32; i++) squares += x[i] * x[i];
#pragma unroll
        for (int i = 16; i > 0; i /= 2) squares += __shfl_xor_sync(~0u, squares, i);
        const float scale = rsqrtf(squares / D + eps);
        // Rounded as a norm by itself rounds.
#pragma unroll
        for (int i = 0; i < D / 32; i++) x[i] = to_float(__float2bfloat16(x[i] * scale * weight[i]));
    }
#pragma unroll
    for (int i = 0; i < D / 32; i++) row[lane + 32 * i] = x[i];
    __syncwarp();
    const int half = t.dims / 2;
    for (int pair = lane; pair < half; pair += 32) {
        const int i = t.first + (t.neighbours ? 2 * pair : pair), j = t.neighbours ? i + 1 : i + half;
        const float p = row[i], q = row[j], c = angles[pair].x, s = angles[pair].y;
        put(i, __fsub_rn(__fmul_rn(p, c), __fmul_rn(q, s))), put(j, __fadd_rn(__fmul_rn(q, c), __fmul_rn(p, s)));
    }
    for (int i = lane; i < D - t.dims; i += 32) {
        const int at = i < t.first ? i : i + t.dims;
        put(at, row[at]);
    }
    __syncwarp();
}

// A lane's eight neighbours of a cache's row, which has D numbers of BITS bits and behind them groups' scales and biases (pack.cu), or is
// bfloat16 if BITS is 16. They take sixteen bytes of shared memory either way: packed ones lie there with their scale and bias.
template <int D, int BITS> struct Eight {
    static __device__ __forceinline__ const uint8_t *row(const Seen &a, const void *table, int entry, int head) {
        const size_t bytes = BITS == 16 ? D * 2 : a.words * 4;
        return static_cast<const uint8_t *>(table) + (size_t(entry) * a.kv_heads + head) * bytes;
    }
    // Those from `at` on, copied while the lane goes on.
    static __device__ __forceinline__ void ask(const Seen &a, uint32_t to, const uint8_t *row, int at) {
        const uint8_t *from = row + at / 8 * BITS;
        if constexpr (BITS == 16) copy16(to, from);
        if constexpr (BITS == 8) copy8(to, from);
        if constexpr (BITS == 4) copy4(to, from);
        if constexpr (BITS != 16) copy8(to + 8, row + D / 8 * BITS + (uint32_t(at) >> a.group_log2) * 8);
    }
    // As bfloat16, rounded as where a cache is unpacked.
    static __device__ __forceinline__ uint4 open(const uint4 &piece) {
        if constexpr (BITS == 16) return piece;
        const float scale = __uint_as_float(piece.z), bias = __uint_as_float(piece.w);
        float y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            // The low byte of 2^23 as a float counts ones.
            constexpr uint32_t ONES = 0x4b000000;
            uint32_t q;
            if constexpr (BITS == 8) q = __byte_perm(i < 4 ? piece.x : piece.y, ONES, 0x7440 + i % 4);
            else q = masked_or(piece.x >> (4 * i), 15, ONES);
            y[i] = __fadd_rn(__fmul_rn(__fsub_rn(__uint_as_float(q), 8388608.f), scale), bias);
        }
        return make_uint4(bf16_pair(y[0], y[1]), bf16_pair(y[2], y[3]), bf16_pair(y[4], y[5]), bf16_pair(y[6], y[7]));
    }
};

// CLUSTERED: the splits of a query are one cluster, whose blocks write into each other's shared memory, and no device memory is needed.
// TURNED: queries are to be turned first, and keys and values to join their cache. BITS: of a number of the cache.
template <int D, bool CLUSTERED, bool TURNED, int BITS = 16> __device__ __forceinline__ void attend_few(const Seen &a, const Turned *t, uint8_t *shared) {
    using Eight = Eight<D, BITS>;
    constexpr int STEPS = D / 32, HALVES = D / 64, QROW = D + 32, ROW = D + 4, WARPS = warps_of<D, CLUSTERED>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
    const int group = a.heads / a.kv_heads, parts = (group + 15) / 16;
    const int kv = blockIdx.y / parts, head = kv * group + blockIdx.y % parts * 16, rows = min(16, group - blockIdx.y % parts * 16);
    const int token = blockIdx.z, split = blockIdx.x;
    // Rows of queries lie half of all banks apart, so that the two that are read at once do not meet.
    __nv_bfloat16 *queries = reinterpret_cast<__nv_bfloat16 *>(shared);
    let_next_start();
    if (CLUSTERED && a.splits > 1) cluster_runs();
    // Positions are older than any kernel that may still run: a step begins when the one before it has ended.
    const uint32_t position = a.positions[token];
    const Cache cache = TURNED ? t->of[token] : a.cache;
    const int old = int(a.positions[TURNED ? token : 0] - cache.first);
    const Span seen = span(a, cache, position);
    const int base = seen.from / 16, blocks = (seen.to + 15) / 16 - base, each = (blocks + a.splits - 1) / a.splits;
    const int last = min(blocks, (split + 1) * each);
    const size_t row = size_t(a.kv_heads) * D;
    const uint4 *ring = reinterpret_cast<const uint4 *>(shared + 16 * QROW * 2 + warp * AHEAD * PIECES<D> * 512) + lane;
    const uint32_t to = uint32_t(__cvta_generic_to_shared(ring));
    auto ask = [&](int block, int stage) {
        if (block < last) {
            const int entry = (base + block) * 16;
            uint32_t at = to + stage * PIECES<D> * 512;
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const uint8_t *from = Eight::row(a, cache.k, min(entry + 8 * n + g, seen.to - 1), kv);
#pragma unroll
                for (int j = 0; j < STEPS; j++, at += 512) Eight::ask(a, at, from, 32 * j + 8 * c);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint8_t *from = Eight::row(a, cache.v, min(entry + 2 * c + i % 2 + i / 2 * 8, seen.to - 1), kv);
#pragma unroll
                for (int h = 0; h < HALVES; h++, at += 512) Eight::ask(a, at, from, 64 * h + 8 * g);
            }
        }
        copies_end();
    };
    const int own = split * each + warp;
    // So are the entries of earlier steps, but not those of this one.
    const bool before = (base + min(own + (AHEAD - 1) * WARPS, last - 1)) * 16 + 16 <= old;
    if (before)
#pragma unroll
        for (int s = 0; s < AHEAD; s++) ask(own + s * WARPS, s);
    if constexpr (TURNED) {
        __shared__ float2 angles[D / 2];
        __shared__ float turning[WARPS][D];
        for (int i = threadIdx.x; i < t->dims / 2; i += blockDim.x) {
            // In half turns, which are whole numbers of turns off at most: no code for angles of any size.
            double halves = double(float(position / t->every * t->every)) * double(t->frequencies[i]) * 0.31830988618379067154;
            float sine, cosine;
            sincospif(float(halves - 2 * rint(halves * 0.5)), &sine, &cosine);
            angles[i] = make_float2(cosine * t->amplitude, sine * t->amplitude * t->sign);
        }
        for (int i = threadIdx.x; i < (16 - rows) * (D / 8); i += blockDim.x) *reinterpret_cast<uint4 *>(queries + (rows + i / (D / 8)) * QROW + i % (D / 8) * 8) = make_uint4(0, 0, 0, 0);
        float q_weight[D / 32], k_weight[D / 32];
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            q_weight[i] = t->q_weight ? t->q_weight[lane + 32 * i] : 1.f;
            k_weight[i] = t->k_weight ? t->k_weight[lane + 32 * i] : 1.f;
        }
        __syncthreads();
        wait_for_previous();
        // The block with the last entries takes the new one in; where heads that share keys have several blocks, each writes the same.
        const bool takes = blocks > 0 && split == (blocks - 1) / each && old < cache.capacity;
        const size_t fresh = (size_t(token) * a.kv_heads + kv) * D, entry = size_t(old) * row + kv * D;
        const int count = rows + takes;
        float next[D / 32];
        auto load = [&](int r) {
            const __nv_bfloat16 *from = r < rows ? a.q + (size_t(token) * a.heads + head + r) * D : t->k + fresh;
#pragma unroll
            for (int i = 0; i < D / 32; i++)
                if (r < count) next[i] = to_float(from[lane + 32 * i]);
        };
        load(warp);
        if (takes && warp == WARPS - 1 && lane < D / 8) reinterpret_cast<uint4 *>(cache.v + entry)[lane] = reinterpret_cast<const uint4 *>(t->v + fresh)[lane];
        for (int r = warp; r < count; r += WARPS) {
            float x[D / 32];
#pragma unroll
            for (int i = 0; i < D / 32; i++) x[i] = next[i];
            load(r + WARPS);
            const bool query = r < rows;
            __nv_bfloat16 *to = query ? queries + r * QROW : cache.k + entry;
            float weight[D / 32];
#pragma unroll
            for (int i = 0; i < D / 32; i++) weight[i] = query ? q_weight[i] : k_weight[i];
            turn_head<D>(*t, x, query ? t->q_normed : t->k_normed, weight, query ? t->q_eps : t->k_eps, angles, turning[warp], [&](int at, float v) { to[at] = __float2bfloat16(v); });
        }
        __syncthreads();
        if (!before)
#pragma unroll
            for (int s = 0; s < AHEAD; s++) ask(own + s * WARPS, s);
    } else {
        wait_for_previous();
        if (!before)
#pragma unroll
            for (int s = 0; s < AHEAD; s++) ask(own + s * WARPS, s);
        for (int i = threadIdx.x; i < 16 * D / 8; i += blockDim.x) {
            int r = i / (D / 8), x = i % (D / 8) * 8;
            uint4 v = r < rows ? *reinterpret_cast<const uint4 *>(a.q + (size_t(token) * a.heads + head + r) * D + x) : make_uint4(0, 0, 0, 0);
            *reinterpret_cast<uint4 *>(queries + r * QROW + x) = v;
        }
        __syncthreads();
    }
    float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, total[2] = {};
    const float slope[2] = {a.slopes && g < rows ? a.slopes[head + g] : 0.f, a.slopes && g + 8 < rows ? a.slopes[head + g + 8] : 0.f};
    const bool plain = a.softcap == 0.f && !a.slopes;
    int stage = 0;
    for (int block = own; block < last; block += WARPS) {
        const int entry = (base + block) * 16;
        const uint4 *k = ring + stage * PIECES<D> * 32, *v = k + 2 * STEPS * 32;
        copies_wait<AHEAD - 1>();
        // Two sums a product, so that fewer of them wait for one another.
        float s[2][4] = {}, t[2][4] = {};
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            uint4 lo = *reinterpret_cast<const uint4 *>(queries + g * QROW + 32 * j + 8 * c);
            uint4 hi = *reinterpret_cast<const uint4 *>(queries + (g + 8) * QROW + 32 * j + 8 * c);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const uint4 key = Eight::open(k[(n * STEPS + j) * 32]);
                mma(s[n], lo.x, hi.x, lo.y, hi.y, key.x, key.y);
                mma(t[n], lo.z, hi.z, lo.w, hi.w, key.z, key.w);
            }
        }
        float peak[2] = {-INFINITY, -INFINITY};
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int at = entry + 8 * n + 2 * c + i % 2;
                bool sees = at >= seen.from && at < seen.to;
                const float score = bent(a, plain, s[n][i] + t[n][i], slope[i / 2], int(position - cache.first) - at);
                s[n][i] = sees ? score : -INFINITY;
                peak[i / 2] = fmaxf(peak[i / 2], s[n][i]);
            }
        float fade[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            peak[h] = fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 1));
            peak[h] = fmaxf(fmaxf(peak[h], __shfl_xor_sync(~0u, peak[h], 2)), top[h]);
            float zero = peak[h] == -INFINITY ? 0.f : peak[h];
            fade[h] = power_of_two(top[h] - zero);
            top[h] = peak[h];
            total[h] *= fade[h];
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
                for (int i = 0; i < 2; i++) total[h] += s[n][2 * h + i] = power_of_two(s[n][2 * h + i] - zero);
        }
        if (__any_sync(~0u, fade[0] != 1.f || fade[1] != 1.f))
#pragma unroll
            for (int n = 0; n < D / 8; n++) o[n][0] *= fade[0], o[n][1] *= fade[0], o[n][2] *= fade[1], o[n][3] *= fade[1];
        const uint32_t p0 = bf16_pair(s[0][0], s[0][1]), p1 = bf16_pair(s[0][2], s[0][3]);
        const uint32_t p2 = bf16_pair(s[1][0], s[1][1]), p3 = bf16_pair(s[1][2], s[1][3]);
        // Product n of a half has lane n of each eight: column g is lane 64 h + 8 g + n.
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
            uint4 value[4];
#pragma unroll
            for (int i = 0; i < 4; i++) value[i] = Eight::open(v[(i * HALVES + h) * 32]);
#pragma unroll
            for (int n = 0; n < 8; n++) {
                uint32_t which = n % 2 ? 0x7632 : 0x5410;
                mma(o[8 * h + n], p0, p1, p2, p3, __byte_perm(word_of(value[0], n / 2), word_of(value[1], n / 2), which),
                    __byte_perm(word_of(value[2], n / 2), word_of(value[3], n / 2), which));
            }
        }
        ask(block + AHEAD * WARPS, stage);
        stage = (stage + 1) % AHEAD;
    }
    __syncthreads();
    float *sums = reinterpret_cast<float *>(shared + 16 * QROW * 2); // [WARPS][16][ROW], the last numbers of a row its peak and sum
#pragma unroll
    for (int h = 0; h < 2; h++) {
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        if (g + 8 * h >= rows) continue;
        float *to = sums + (warp * 16 + g + 8 * h) * ROW;
        if (c == 0) to[D] = top[h], to[D + 1] = total[h];
#pragma unroll
        for (int n = 0; n < D / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) to[64 * (n / 8) + 8 * (2 * c + i) + n % 8] = o[n][2 * h + i];
    }
    __syncthreads();
    auto finish = [&](int r, int x, float peak, float sum, float value) {
        if (a.sinks) {
            // The sink takes a share and gives nothing.
            float sink = a.sinks[head + r] * LOG2E, higher = fmaxf(peak, sink);
            value *= power_of_two(peak - higher), sum = sum * power_of_two(peak - higher) + power_of_two(sink - higher);
        }
        a.y[(size_t(token) * a.heads + head + r) * D + x] = __float2bfloat16(sum > 0 ? value / sum : 0.f);
    };
    auto weight = [](float top, float peak) { return top == -INFINITY ? 0.f : power_of_two(top - peak); };
    // The block's own part, of its warps.
    __shared__ float own_top[16], own_total[16], shares_of[WARPS][16];
    // A block has as many lanes of the result to add up as it has threads, then another block its own, and so on in turns. It is given them
    // [splits][each], and every block's tops and totals.
    __shared__ float tops_given[MOST_SPLITS][16], totals_given[MOST_SPLITS][16];
    float *given = reinterpret_cast<float *>(shared + few_shared<D, WARPS>);
    const int each_given = (rows * D + a.splits * blockDim.x - 1) / (a.splits * blockDim.x) * blockDim.x;
    if (threadIdx.x < rows) {
        const int r = threadIdx.x;
        float peak = -INFINITY, sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, sums[(w * 16 + r) * ROW + D]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float share = weight(sums[(w * 16 + r) * ROW + D], peak);
            shares_of[w][r] = share, sum += share * sums[(w * 16 + r) * ROW + D + 1];
        }
        own_top[r] = peak, own_total[r] = sum;
    }
    if (CLUSTERED && a.splits > 1) cluster_wait();
    __syncthreads();
    const size_t place = size_t(token) * gridDim.y + blockIdx.y;
    float *all = a.partial + place * a.splits * 16 * ROW;
#pragma unroll 4
    for (int i = threadIdx.x, block = 0, at = split * each_given + threadIdx.x; i < rows * D; i += blockDim.x) {
        const int r = i / D, x = i % D;
        float value = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) value += shares_of[w][r] * sums[(w * 16 + r) * ROW + x];
        if (a.splits == 1) {
            finish(r, x, own_top[r], own_total[r], value);
        } else if constexpr (CLUSTERED) {
            give(given + at, block, value);
            if (++block == a.splits) block = 0, at += blockDim.x;
        } else {
            float *to = all + (split * 16 + r) * ROW;
            to[x] = value;
            if (x == 0) to[D] = own_top[r], to[D + 1] = own_total[r];
        }
    }
    if (a.splits == 1) return;
    if constexpr (CLUSTERED) {
        for (int i = threadIdx.x; i < 16 * a.splits; i += blockDim.x) {
            const int r = i % 16, block = i / 16;
            if (r >= rows) break;
            give(&tops_given[split][r], block, own_top[r]), give(&totals_given[split][r], block, own_total[r]);
        }
        cluster_sync();
        for (int i = split * blockDim.x + threadIdx.x, n = threadIdx.x; i < rows * D; i += a.splits * blockDim.x, n += blockDim.x) {
            const int r = i / D, x = i % D;
            float tops[MOST_SPLITS], peak = -INFINITY, sum = 0, value = 0;
#pragma unroll
            for (int s = 0; s < MOST_SPLITS; s++) tops[s] = s < a.splits ? tops_given[s][r] : -INFINITY, peak = fmaxf(peak, tops[s]);
#pragma unroll
            for (int s = 0; s < MOST_SPLITS; s++)
                if (s < a.splits) {
                    const float share = weight(tops[s], peak);
                    sum += share * totals_given[s][r], value += share * given[s * each_given + n];
                }
            finish(r, x, peak, sum, value);
        }
        return;
    }
    // The block that comes last adds up all splits.
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        // Counts to `splits` and starts over, so that it is 0 again when the kernel ends.
        uint32_t before;
        asm volatile("fence.acq_rel.gpu;\n\tatom.relaxed.gpu.global.inc.u32 %0, [%1], %2;\n\tfence.acq_rel.gpu;" : "=r"(before) : "l"(a.arrived + place), "r"(a.splits - 1) : "memory");
        is_last = before == a.splits - 1;
    }
    __syncthreads();
    if (!is_last) return;
    float *shares = reinterpret_cast<float *>(shared); // [16][64], then sums and peaks
    float *totals = shares + 16 * 64, *peaks = totals + 16;
    for (int r = warp; r < rows; r += WARPS) {
        float tops[2], sums[2], peak = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float *part = all + ((lane + 32 * i) * 16 + r) * ROW;
            bool there = lane + 32 * i < a.splits;
            tops[i] = there ? __ldcg(part + D) : -INFINITY, sums[i] = there ? __ldcg(part + D + 1) : 0.f;
            peak = fmaxf(peak, tops[i]);
        }
#pragma unroll
        for (int i = 16; i > 0; i /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, i));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float share = weight(tops[i], peak);
            shares[r * 64 + lane + 32 * i] = share, sum += share * sums[i];
        }
#pragma unroll
        for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
        if (lane == 0) totals[r] = sum, peaks[r] = peak;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows * D; i += blockDim.x) {
        const int r = i / D, x = i % D;
        float value = 0;
#pragma unroll 16
        for (int s = 0; s < a.splits; s++) value += shares[r * 64 + s] * __ldcg(all + (s * 16 + r) * ROW + x);
        finish(r, x, peaks[r], totals[r], value);
    }
}
