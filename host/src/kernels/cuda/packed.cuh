// The product of rows of tiles with up to NT * 8 vectors of activations, by one warp: every kernel with packed weights is made of it.
//
// Tensor cores multiply the packed integers themselves, which are exact in bf16, with the activations; each group's sum is then scaled in
// f32, so that nothing is rounded that the checkpoint holds. The sums of the activations that the groups' biases need are one more
// product, by ones.
#pragma once
#include "tiles.cuh"

// Tiles of a matrix.
struct Packed {
    const uint8_t *data, *scales;
    // Whether scales and biases are f16; bf16 otherwise. Of a PLAIN matrix, how many rows it has.
    long long half;
};

// An RMSNorm of the activations that nobody has computed yet. Its factor is one for all columns, so it is applied to the product; whoever
// wrote the activations left the sums of their squares, one for each 16 columns.
struct Normed {
    const __nv_bfloat16 *weight; // none: no norm
    const float *squares;        // [tokens, parts]
    int parts;
    float eps;
};
// Shared memory for them, behind everything else.
__device__ __forceinline__ void fetch_squares(const Normed &n, uint32_t to, int tokens) {
    for (int i = threadIdx.x * 4; i < tokens * n.parts; i += blockDim.x * 4) copy16(to + i * 4, n.squares + i);
}
// Of a token, by a whole warp; the factor is known to all its lanes.
__device__ __forceinline__ float norm_factor(const Normed &n, const float *squares, int token, int cols) {
    float sum = 0;
    for (int i = threadIdx.x % 32; i < n.parts; i += 32) sum += squares[token * n.parts + i];
#pragma unroll
    for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
    return rsqrtf(sum / cols + n.eps);
}

// Columns come in multiples of eight.
__device__ __forceinline__ uint4 activations(const __nv_bfloat16 *x, int column, int cols) {
    return column < cols ? *reinterpret_cast<const uint4 *>(x + column) : make_uint4(0, 0, 0, 0);
}

// What a lane needs of a tile, as 16-byte pieces: its weights, then its scales.
template <int P, int GROUP> constexpr int scale_words = P == PLAIN ? 0 : P == MX4 ? 2 : scaled_first<P> ? 4 : 2 * (TILE_COLS / GROUP);
template <int P, int GROUP> constexpr int tile_pieces = 2 * pieces<P>() + (scale_words<P, GROUP> + 3) / 4;
// And of a step of RT tiles, with the activations where they are too many for registers.
template <int P, int GROUP, int RT, int NT> constexpr int step_pieces = RT * tile_pieces<P, GROUP> + (NT > 1 ? 4 * NT : 0);

// Shared memory that a warp needs for `product`.
template <int P, int GROUP, int RT, int NT, int S> constexpr int ring_bytes = S * step_pieces<P, GROUP, RT, NT> * 512;

// Bf16 pairs times others.
__device__ __forceinline__ uint4 times(const uint4 &a, const uint4 &b) {
    uint4 r;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r.x) : "r"(a.x), "r"(b.x));
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r.y) : "r"(a.y), "r"(b.y));
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r.z) : "r"(a.z), "r"(b.z));
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r.w) : "r"(a.w), "r"(b.w));
    return r;
}

// Starts copying a lane's pieces of a tile to `to`, 512 bytes apart. A lane reads only what it has copied itself, so that no barrier is
// needed.
template <int P, int GROUP> __device__ __forceinline__ void fetch(uint32_t to, const uint8_t *q, const uint8_t *s) {
#pragma unroll
    for (int i = 0; i < 2 * pieces<P>(); i++) copy16(to + i * 512, q + i * 512);
    to += 2 * pieces<P>() * 512;
    if constexpr (scale_words<P, GROUP> == 2) copy8(to, s);
    else
#pragma unroll
        for (int i = 0; i < scale_words<P, GROUP> / 4; i++) copy16(to + i * 512, s + i * 16);
}

// d[n] += a row pair's packed words of columns 32 j.., times the activations. `scales`: of both rows, where weights are scaled first.
template <int P, int NT> __device__ __forceinline__ void multiply(const uint32_t (&lower)[pieces<P>()], const uint32_t (&upper)[pieces<P>()], const uint4 (&x)[NT], float (&d)[NT][4], uint2 scales = {}) {
    if constexpr (P == PLAIN) {
#pragma unroll
        for (int n = 0; n < NT; n++) {
            mma(d[n], lower[0], upper[0], lower[1], upper[1], x[n].x, x[n].y);
            mma(d[n], lower[2], upper[2], lower[3], upper[3], x[n].z, x[n].w);
        }
    } else if constexpr (P == FP8 || P == SIX) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint32_t lo[2], hi[2];
            if constexpr (P == FP8) e4m3(lower[i], lo), e4m3(upper[i], hi);
            else sixes(lower[i], scales.x, lo), sixes(upper[i], scales.y, hi);
#pragma unroll
            for (int n = 0; n < NT; n++) mma(d[n], lo[0], hi[0], lo[1], hi[1], word_of(x[n], 2 * i), word_of(x[n], 2 * i + 1));
        }
    } else
#pragma unroll
    for (int i = 0; i < pieces<P>(); i++) {
        uint32_t lo[4], hi[4];
        if constexpr (P == BYTE) bytes(lower[i], lo), bytes(upper[i], hi);
        else if constexpr (P == MX4) e2m1(lower[i], lo), e2m1(upper[i], hi);
        else if constexpr (P == NV4) e2m1_scaled(lower[i], scales.x, lo), e2m1_scaled(upper[i], scales.y, hi);
        else nibbles(lower[i], lo), nibbles(upper[i], hi);
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
            for (int n = 0; n < NT; n++) {
                const uint32_t b0 = word_of(x[n], P == BYTE ? 2 * i + s : 2 * s), b1 = word_of(x[n], P == BYTE ? 2 * i + s : 2 * s + 1);
                mma(d[n], lo[2 * s], hi[2 * s], lo[2 * s + 1], hi[2 * s + 1], b0, b1);
            }
    }
}

// y[r] += rows of tiles `rows[r]` of `of[r]`, times the activations at `x[n]` (this lane's row of each eight). A warp takes every
// `warps`th block of columns from `warp` on; S of them are on their way at once, through `ring`, this warp's shared memory. `ready` is
// called when the first weights have been asked for, and before any activation is. Up to eight vectors may be multiplied with a norm's
// `weight` first.
template <int P, int GROUP, int RT, int NT, int S, class Ready>
__device__ __forceinline__ void product(const Packed (&of)[RT], const int (&rows)[RT], const __nv_bfloat16 *const (&x)[NT], int cols, int warp, int warps, uint8_t *ring, float (&y)[RT][NT][4], Ready ready, const __nv_bfloat16 *weight = nullptr) {
    constexpr int GROUPS = TILE_COLS / GROUP, WORDS = 4 / GROUPS, PIECES = tile_pieces<P, GROUP>, Q = pieces<P>(), STEP = step_pieces<P, GROUP, RT, NT>;
    const int lane = threadIdx.x % 32, c = lane % 4, blocks = (cols + TILE_COLS - 1) / TILE_COLS;
    const uint4 *shared = reinterpret_cast<const uint4 *>(ring) + lane;
    const uint32_t to = uint32_t(__cvta_generic_to_shared(ring)) + lane * 16;
    const uint8_t *q_from[RT], *s_from[RT];
#pragma unroll
    for (int r = 0; r < RT; r++) {
        if constexpr (P == PLAIN) {
            // Rows g and g + 8, which may be behind the last.
            const int most = int(of[r].half) - 1, row = rows[r] * TILE_ROWS + lane / 4;
            q_from[r] = of[r].data + size_t(min(row, most)) * cols * 2;
            s_from[r] = of[r].data + size_t(min(row + 8, most)) * cols * 2;
        } else {
            const size_t tile = size_t(rows[r]) * blocks + warp;
            q_from[r] = of[r].data + tile * (1024 * Q) + lane * 16;
            s_from[r] = of[r].scales + tile * scale_bytes<P, GROUP>() + (lane / 4) * (scale_bytes<P, GROUP>() / 8) + (scaled_first<P> ? c / 2 * 16 : 0);
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
                        const uint32_t at = to + (stage * STEP + r * PIECES + j) * 512;
                        copy16_if(at, q_from[r] + (there ? column * 2 : 0), there), copy16_if(at + 4 * 512, s_from[r] + (there ? column * 2 : 0), there);
                    }
                    continue;
                }
                fetch<P, GROUP>(to + (stage * STEP + r * PIECES) * 512, q_from[r], s_from[r]);
                q_from[r] += warps * (1024 * Q), s_from[r] += warps * scale_bytes<P, GROUP>();
            }
        if constexpr (NT == 1) copies_end();
    };
    auto ask_x = [&](int block, int stage) {
        if constexpr (NT > 1) {
            if (block < blocks)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int column = block * TILE_COLS + 8 * c + 32 * j;
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                        const uint32_t at = to + (stage * STEP + RT * PIECES + j * NT + n) * 512;
                        if (column < cols) copy16(at, x[n] + column);
                        else asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
                    }
                }
            copies_end();
        }
    };
#pragma unroll
    for (int s = 0; s < S; s++) ask(warp + s * warps, s);
    ready();
#pragma unroll
    for (int s = 0; s < S; s++) ask_x(warp + s * warps, s);
    // Where registers are short, a norm's weights are not asked for ahead.
    constexpr bool LATE = P == BYTE || GROUP == 32;
    uint4 next[4], factors[4];
    auto ask_next = [&](int block) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            next[j] = activations(x[0], block * TILE_COLS + 8 * c + 32 * j, cols);
            if (weight && !LATE) factors[j] = activations(weight, block * TILE_COLS + 8 * c + 32 * j, cols);
        }
    };
    if constexpr (NT == 1) ask_next(warp);
    int stage = 0;
    for (int block = warp; block < blocks; block += warps) {
        uint4 b[4][NT];
        if constexpr (NT == 1) {
#pragma unroll
            for (int j = 0; j < 4; j++) b[j][0] = weight ? times(next[j], LATE ? activations(weight, block * TILE_COLS + 8 * c + 32 * j, cols) : factors[j]) : next[j];
            ask_next(block + warps);
        }
        copies_wait<S - 1>();
        uint4 q[RT][PIECES];
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
            for (int i = 0; i < PIECES; i++) q[r][i] = shared[(stage * STEP + r * PIECES + i) * 32];
        auto scale = [&](int r, int i) { return word_of(q[r][2 * Q + i / 4], i % 4); };
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            float d[RT][NT][4] = {}, sums[NT][4] = {};
#pragma unroll
            for (int j = group * WORDS; j < (group + 1) * WORDS; j++) {
                if constexpr (NT > 1)
#pragma unroll
                    for (int n = 0; n < NT; n++) b[j][n] = shared[(stage * STEP + RT * PIECES + j * NT + n) * 32];
                const uint4(&now)[NT] = b[j];
                if constexpr (P == NIBBLE || P == BYTE) {
                    constexpr uint32_t one = 0x3F803F80u;
#pragma unroll
                    for (int n = 0; n < NT; n++) mma(sums[n], one, one, one, one, now[n].x, now[n].y), mma(sums[n], one, one, one, one, now[n].z, now[n].w);
                }
#pragma unroll
                for (int r = 0; r < RT; r++) {
                    uint32_t w[2][Q];
#pragma unroll
                    for (int h = 0; h < 2; h++)
#pragma unroll
                        for (int i = 0; i < Q; i++) w[h][i] = word_of(q[r][h * Q + (Q * j + i) / 4], (Q * j + i) % 4);
                    // A lane's four scales of row g, and those of row g + 8, a word two of them.
                    uint2 scales = {};
                    if constexpr (scaled_first<P>) scales = {twice(scale(r, j / 2), j % 2), twice(scale(r, 2 + j / 2), j % 2)};
                    multiply<P, NT>(w[0], w[1], now, d[r], scales);
                }
            }
#pragma unroll
            for (int r = 0; r < RT; r++) {
                if constexpr (P == PLAIN || scaled_first<P>) {
                    constexpr float more = P == NV4 ? NV4_LESS : 1.f;
#pragma unroll
                    for (int n = 0; n < NT; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) y[r][n][i] = fmaf(more, d[r][n][i], y[r][n][i]);
                } else {
                float2 low, high;
                if constexpr (P == MX4) {
                    low = make_float2(e8m0((scale(r, 0) >> (8 * group)) & 255), 0), high = make_float2(e8m0((scale(r, 1) >> (8 * group)) & 255), 0);
                } else if constexpr (P == FP8) {
                    low = scale_and_bias(scale(r, group), false), high = scale_and_bias(scale(r, GROUPS + group), false);
                    low.x += low.y, high.x += high.y;
                } else {
                    low = scale_and_bias(scale(r, group), of[r].half), high = scale_and_bias(scale(r, GROUPS + group), of[r].half);
                    low.y = fmaf(-surplus<P>(), low.x, low.y), high.y = fmaf(-surplus<P>(), high.x, high.y);
                }
#pragma unroll
                for (int n = 0; n < NT; n++)
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        y[r][n][i] = fmaf(low.x, d[r][n][i], y[r][n][i]), y[r][n][2 + i] = fmaf(high.x, d[r][n][2 + i], y[r][n][2 + i]);
                        if (P == NIBBLE || P == BYTE) y[r][n][i] = fmaf(low.y, sums[n][i], y[r][n][i]), y[r][n][2 + i] = fmaf(high.y, sums[n][i], y[r][n][2 + i]);
                    }
                }
            }
        }
        ask(block + S * warps, stage);
        ask_x(block + S * warps, stage);
        stage = (stage + 1) % S;
    }
}

// What the warps of a block have summed up, to `partial` [warps][RT][NT][8 vectors][16 rows].
template <int RT, int NT> __device__ __forceinline__ void put(const float (&y)[RT][NT][4], float *partial) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
        for (int n = 0; n < NT; n++) {
            float *to = partial + ((warp * RT + r) * NT + n) * 128;
            to[2 * c * 16 + g] = y[r][n][0], to[(2 * c + 1) * 16 + g] = y[r][n][1];
            to[2 * c * 16 + g + 8] = y[r][n][2], to[(2 * c + 1) * 16 + g + 8] = y[r][n][3];
        }
}

// Between the projections of a feed-forward block, numbered as in packed.rs.
struct Joint {
    int kind;
    float alpha, limit;
};
__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }
__device__ __forceinline__ float gelu(float x) { return 0.5f * x * (1.f + tanhf(0.7978846f * (x + 0.044715f * x * x * x))); }
__device__ __forceinline__ float joined(const Joint &j, float g, float u) {
    const float bounded = fminf(fmaxf(u, -j.limit), j.limit);
    switch (j.kind) {
    case 0: return silu(g) * u;
    case 1: return gelu(g) * u;
    case 2: g = fminf(g, j.limit); return g / (1.f + __expf(-j.alpha * g)) * (bounded + 1.f);
    case 3: return fminf(silu(g), j.limit) * bounded;
    case 4: return silu(fminf(g, j.limit)) * bounded;
    // alpha bounds the gate here.
    case 5: return j.alpha * tanhf(g / j.alpha) / (1.f + __expf(-g)) * (j.limit > 0.f ? j.limit * tanhf(u / j.limit) : u);
    case 6: return fmaxf(u, 0.f) * fmaxf(u, 0.f);
    case 7: return gelu(u);
    default: return silu(u);
    }
}
