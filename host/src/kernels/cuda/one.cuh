// The product of rows of tiles with one token's activations: the matmul of a single sequence's decoding, where unpacking weights is what takes
// the time. The activations lie in shared memory, multiplied with a norm's weights already; of the tensor cores' results one column counts.
#pragma once
#include "packed.cuh"

// The matrices of a launch, and their input (packed.rs).
struct Mat {
    Packed w;
    const __nv_bfloat16 *bias, *residual;
    __nv_bfloat16 *y;
    int rows, tiles, y_stride, unused;
};
struct Matmul {
    Mat mats[3];
    const __nv_bfloat16 *x;
    int tokens, cols, x_stride;
    Joint joint;
    Normed normed;  // for up to eight tokens
    float *squares; // of what comes out, summed over each row of tiles [tokens, tiles]; or none
};

// Bytes of shared memory for the activations, filled up with zeros, and for the sums of their groups, behind them: up to four a tile.
__device__ __host__ constexpr int staged_bytes(int cols) { return (cols + TILE_COLS - 1) / TILE_COLS * TILE_COLS * 2; }
__device__ __host__ constexpr int summed_bytes(int cols) { return (cols + TILE_COLS - 1) / TILE_COLS * 16; }
// A tile as it lies in memory, scales behind weights; of PLAIN ones 16 rows.
template <int P, int GROUP> constexpr int one_tile = 1024 * pieces<P>() + scale_bytes<P, GROUP>();
template <int P, int GROUP, int RT, int S> constexpr int one_ring = S * RT * one_tile<P, GROUP>;

// Small integers are bf16 numbers as they lie: masked out of their word they are so many times 2^-133, bf16's smallest, and tensor cores
// multiply such numbers exactly. So that sums of products are no such numbers in f32, the activations are 2^64 times what they are.
template <int P> constexpr bool tiny = P == NIBBLE || P == BYTE;
constexpr uint32_t STAGED = 0x5F805F80u; // 2^64
constexpr float UNSTAGED = 590295810358705651712.f; // 2^69

// d[0] + d[1] / 16 += a row pair's integers of 32 columns times the activations.
template <int P> __device__ __forceinline__ void multiply_tiny(const uint32_t (&lower)[pieces<P>()], const uint32_t (&upper)[pieces<P>()], const uint4 &x, float (&d)[2][4]) {
    if constexpr (P == BYTE) {
        constexpr uint32_t mask = 0x00FF00FFu;
#pragma unroll
        for (int i = 0; i < 2; i++) mma(d[0], lower[i] & mask, upper[i] & mask, (lower[i] >> 8) & mask, (upper[i] >> 8) & mask, word_of(x, 2 * i), word_of(x, 2 * i + 1));
    } else {
        constexpr uint32_t even = 0x000F000Fu, odd = 0x00F000F0u;
        const uint32_t a = lower[0], b = upper[0], a8 = a >> 8, b8 = b >> 8;
        mma(d[0], a & even, b & even, a8 & even, b8 & even, x.x, x.z);
        mma(d[1], a & odd, b & odd, a8 & odd, b8 & odd, x.y, x.w);
    }
}

// A token's activations on their way to shared memory, times a norm's weights if it has some; those are nobody's output. Where groups have
// biases, the sums of the activations that these are multiplied with come along.
template <int P, int GROUP> struct Arriving {
    static constexpr int MOST = 4;
    uint4 v[MOST], factors[MOST];
    const __nv_bfloat16 *x, *weight;
    int cols, thread, threads;
    __device__ __forceinline__ Arriving(const __nv_bfloat16 *x, const __nv_bfloat16 *weight, int cols, int thread, int threads) : x(x), weight(weight), cols(cols), thread(thread), threads(threads) {}
    __device__ __forceinline__ void ask_weight() {
        if (weight)
#pragma unroll
            for (int i = 0; i < MOST; i++) factors[i] = activations(weight, (thread + i * threads) * 8, cols);
    }
    __device__ __forceinline__ void ask() {
#pragma unroll
        for (int i = 0; i < MOST; i++) v[i] = activations(x, (thread + i * threads) * 8, cols);
    }
    // All threads of the block come here.
    __device__ __forceinline__ void put(uint4 *to, float *sums) const {
        const int staged = staged_bytes(cols) / 16;
        auto put_one = [&](int at, uint4 now) {
            if constexpr (tiny<P>) {
                float sum = 0;
#pragma unroll
                for (int i = 0; i < 4; i++) sum += __uint_as_float(word_of(now, i) << 16) + __uint_as_float(word_of(now, i) & 0xFFFF0000u);
#pragma unroll
                for (int i = GROUP / 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
                if (at % (GROUP / 8) == 0 && at < staged) sums[at / (GROUP / 8)] = sum * (1.f / UNSTAGED);
                now = times(now, make_uint4(STAGED, STAGED, STAGED, STAGED));
            }
            if (at < staged) to[at] = now;
        };
#pragma unroll
        for (int i = 0; i < MOST; i++)
            if (i * threads < staged) put_one(thread + i * threads, weight ? times(v[i], factors[i]) : v[i]);
        for (int first = MOST * threads; first < staged; first += threads) {
            const int at = first + thread;
            const uint4 now = activations(x, at * 8, cols);
            put_one(at, weight ? times(now, activations(weight, at * 8, cols)) : now);
        }
    }
};

// What the warps of a block have summed up for a token, to `partial` [warps][RT][16 rows].
template <int RT> __device__ __forceinline__ void put_one(const float (&y)[RT][2], float *partial) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane % 4 == 0)
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int h = 0; h < 2; h++) partial[(warp * RT + r) * 16 + lane / 4 + 8 * h] = y[r][h];
}

// y[r] += rows g and g + 8 of row of tiles `rows[r]` of `of[r]`, times the activations at `x`, whose groups have the `sums`; right in lanes
// with c = 0. `ready` is called when the first weights have been asked for; the activations are there when it returns.
template <int P, int GROUP, bool HALF, int RT, int S, class Ready>
__device__ __forceinline__ void product_of_one(const Packed (&of)[RT], const int (&rows)[RT], const uint4 *x, const float *sums, int cols, int warp, int warps, uint8_t *ring, float (&y)[RT][2], Ready ready) {
    constexpr int GROUPS = TILE_COLS / GROUP, WORDS = 4 / GROUPS, Q = pieces<P>(), SCALES = scale_bytes<P, GROUP>(), TILE = one_tile<P, GROUP>, STEP = RT * TILE;
    constexpr bool BIASED = P == NIBBLE || P == BYTE;
    const int lane = threadIdx.x % 32, c = lane % 4, blocks = (cols + TILE_COLS - 1) / TILE_COLS;
    // Of its rows' scales.
    const uint8_t *shared = ring + lane * 16, *scaled = ring + 1024 * Q + lane / 4 * (SCALES / 8) + (scaled_first<P> ? c / 2 * 16 : 0);
    const uint32_t to = uint32_t(__cvta_generic_to_shared(ring)) + lane * 16;
    const uint8_t *q_from[RT], *s_from[RT];
#pragma unroll
    for (int r = 0; r < RT; r++) {
        if constexpr (P == PLAIN) {
            const int most = int(of[r].half) - 1, row = rows[r] * TILE_ROWS + lane / 4;
            q_from[r] = of[r].data + size_t(min(row, most)) * cols * 2;
            s_from[r] = of[r].data + size_t(min(row + 8, most)) * cols * 2;
        } else {
            const size_t tile = size_t(rows[r]) * blocks + warp;
            q_from[r] = of[r].data + tile * (1024 * Q) + lane * 16;
            s_from[r] = of[r].scales + tile * SCALES + lane * 16;
        }
    }
    auto ask = [&](int block, int stage) {
        if (block < blocks)
#pragma unroll
            for (int r = 0; r < RT; r++) {
                if constexpr (P == PLAIN) {
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int column = block * TILE_COLS + 8 * c + 32 * j;
                        const bool there = column < cols;
                        const uint32_t at = to + stage * STEP + r * TILE + j * 512;
                        copy16_if(at, q_from[r] + (there ? column * 2 : 0), there), copy16_if(at + 4 * 512, s_from[r] + (there ? column * 2 : 0), there);
                    }
                } else {
                    const uint32_t at = to + stage * STEP + r * TILE;
#pragma unroll
                    for (int i = 0; i < 2 * Q; i++) copy16(at + i * 512, q_from[r] + i * 512);
                    if (lane * 16 < SCALES) copy16(at + 1024 * Q, s_from[r]);
                    q_from[r] += warps * (1024 * Q), s_from[r] += warps * SCALES;
                }
            }
        copies_end();
    };
#pragma unroll
    for (int s = 0; s < S; s++) ask(warp + s * warps, s);
    ready();
    int stage = 0;
    for (int block = warp; block < blocks; block += warps) {
        uint4 b[4];
#pragma unroll
        for (int j = 0; j < 4; j++) b[j] = x[block * (TILE_COLS / 8) + 4 * j + c];
        float sum[GROUPS];
        if constexpr (BIASED)
#pragma unroll
            for (int group = 0; group < GROUPS; group++) sum[group] = sums[block * GROUPS + group];
        copies_wait<S - 1>();
        if constexpr (SCALES > 0) __syncwarp(); // other lanes have asked for its scales
#pragma unroll
        for (int r = 0; r < RT; r++) {
            uint4 q[2 * Q];
#pragma unroll
            for (int i = 0; i < 2 * Q; i++) q[i] = *reinterpret_cast<const uint4 *>(shared + stage * STEP + r * TILE + i * 512);
            uint4 words[2];
            const uint8_t *own = scaled + stage * STEP + r * TILE;
            if constexpr (scale_words<P, GROUP> == 2) {
                const uint2 two = *reinterpret_cast<const uint2 *>(own);
                words[0].x = two.x, words[0].y = two.y;
            } else
#pragma unroll
                for (int i = 0; i < scale_words<P, GROUP> / 4; i++) words[i] = reinterpret_cast<const uint4 *>(own)[i];
            auto scale = [&](int i) { return word_of(words[i / 4], i % 4); };
#pragma unroll
            for (int group = 0; group < GROUPS; group++) {
                float d[1][4] = {}, e[2][4] = {};
#pragma unroll
                for (int j = group * WORDS; j < (group + 1) * WORDS; j++) {
                    uint32_t w[2][Q];
#pragma unroll
                    for (int h = 0; h < 2; h++)
#pragma unroll
                        for (int i = 0; i < Q; i++) w[h][i] = word_of(q[h * Q + (Q * j + i) / 4], (Q * j + i) % 4);
                    const uint4 now[1] = {b[j]};
                    if constexpr (tiny<P>) multiply_tiny<P>(w[0], w[1], b[j], e);
                    else if constexpr (scaled_first<P>) multiply<P, 1>(w[0], w[1], now, d, {twice(scale(j / 2), j % 2), twice(scale(2 + j / 2), j % 2)});
                    else multiply<P, 1>(w[0], w[1], now, d);
                }
                if constexpr (P == PLAIN || P == SIX) {
                    y[r][0] += d[0][0], y[r][1] += d[0][2];
                } else if constexpr (P == NV4) {
                    y[r][0] = fmaf(NV4_LESS, d[0][0], y[r][0]), y[r][1] = fmaf(NV4_LESS, d[0][2], y[r][1]);
                } else if constexpr (P == MX4) {
                    y[r][0] = fmaf(e8m0((scale(0) >> (8 * group)) & 255), d[0][0], y[r][0]);
                    y[r][1] = fmaf(e8m0((scale(1) >> (8 * group)) & 255), d[0][2], y[r][1]);
                } else if constexpr (P == FP8) {
                    const float2 low = scale_and_bias(scale(group), false), high = scale_and_bias(scale(GROUPS + group), false);
                    y[r][0] = fmaf(low.x + low.y, d[0][0], y[r][0]), y[r][1] = fmaf(high.x + high.y, d[0][2], y[r][1]);
                } else {
                    const float2 low = scale_and_bias(scale(group), HALF), high = scale_and_bias(scale(GROUPS + group), HALF);
                    const float first = P == NIBBLE ? fmaf(e[1][0], 0.0625f, e[0][0]) : e[0][0], second = P == NIBBLE ? fmaf(e[1][2], 0.0625f, e[0][2]) : e[0][2];
                    y[r][0] = fmaf(low.x, first, fmaf(low.y, sum[group], y[r][0]));
                    y[r][1] = fmaf(high.x, second, fmaf(high.y, sum[group], y[r][1]));
                }
            }
        }
        if constexpr (SCALES > 0) __syncwarp();
        ask(block + S * warps, stage);
        stage = (stage + 1) % S;
    }
}

// RT rows of tiles a block. GATED: rows of tiles of the first two matrices by turns. Otherwise those of all matrices follow one another.
template <int P, int GROUP, bool HALF, int RT, int S, bool GATED>
__device__ __forceinline__ void matmul_of_one(const Matmul &a, uint8_t *shared) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
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
    uint4 *x = reinterpret_cast<uint4 *>(shared);
    const int staged = staged_bytes(a.cols);
    float *sums = reinterpret_cast<float *>(shared + staged);
    float squares = 0, more = 0;
    let_next_start();
    auto ready = [&] {
        Arriving<P, GROUP> own(a.x, a.normed.weight, a.cols, threadIdx.x, blockDim.x);
        own.ask_weight();
        wait_for_previous();
        own.ask();
        if (warp == 0) {
            if (a.normed.weight)
                for (int i = lane; i < a.normed.parts; i += 32) squares += a.normed.squares[i];
            // Of the row that this lane will have.
            const Mat &m = a.mats[which];
            const int row = first * 16 + lane;
            if (!GATED && lane < OWN * 16 && row < m.rows) {
                if (m.bias) more = to_float(m.bias[row]);
                if (m.residual) more += to_float(m.residual[row]);
            }
        }
        own.put(x, sums);
        __syncthreads();
    };
    float y[RT][2] = {};
    uint8_t *rings = shared + staged + summed_bytes(a.cols);
    product_of_one<P, GROUP, HALF, RT, S>(of, rows, x, sums, a.cols, warp, warps, rings + warp * one_ring<P, GROUP, RT, S>, y, ready);
    // Into the place of the warp's own ring.
    float *partial = reinterpret_cast<float *>(rings);
    copies_wait<0>();
    __syncthreads();
    put_one<RT>(y, partial);
    __syncthreads();
    if (warp > 0) return;
    float factor = tiny<P> ? UNSTAGED : 1.f;
    if (a.normed.weight) {
#pragma unroll
        for (int i = 16; i > 0; i /= 2) squares += __shfl_xor_sync(~0u, squares, i);
        factor *= rsqrtf(squares / a.cols + a.normed.eps);
    }
    const Mat &m = a.mats[which];
#pragma unroll
    for (int i = lane; i < (OWN * 16 + 31) / 32 * 32; i += 32) {
        const int r = i / 16, row = (first + r) * 16 + i % 16;
        const bool there = r < OWN && row < m.rows;
        auto total = [&](int r) {
            float sum = 0;
#pragma unroll 4
            for (int w = 0; w < warps; w++) sum += partial[(w * RT + r) * 16 + i % 16];
            return sum * factor;
        };
        float out = 0;
        if (!there) {
        } else if constexpr (GATED) {
            float gate = total(2 * r), up = total(2 * r + 1);
            if (a.mats[0].bias) gate += to_float(a.mats[0].bias[row]);
            if (a.mats[1].bias) up += to_float(a.mats[1].bias[row]);
            out = joined(a.joint, gate, up);
        } else {
            out = total(r) + more;
        }
        const __nv_bfloat16 kept = __float2bfloat16(out);
        if (there) m.y[row] = kept;
        if (a.squares) {
            float square = to_float(kept) * to_float(kept);
#pragma unroll
            for (int step = 8; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
            if (i % 16 == 0 && there) a.squares[first + r] = square;
        }
    }
}
