// Routed experts: which experts a token runs through is read on the device, so that nothing waits for the host. All experts of a layer are
// one packed matrix, one below the other.
//
// Few tokens (decoding): a block has some rows of one chosen expert; in the second product a warp has a choice, and the block adds the
// choices up. Many tokens: the choices are sorted by expert first, and a block multiplies 32 tokens of one expert.
#include "one.cuh"
#include "route.cuh"

// Bytes as Rust writes them (experts.rs).
struct Experts {
    Packed gate, up, down;
    const __nv_bfloat16 *gate_bias, *up_bias, *down_bias; // [experts, rows], or none
    const __nv_bfloat16 *x;                               // [tokens, dim]
    uint32_t *chosen;                                     // [tokens, k]
    float *weights;                                       // [tokens, k]
    __nv_bfloat16 *inner;                                 // [tokens, k, hidden]
    __nv_bfloat16 *outer;                                 // [tokens, k, dim], for many tokens
    __nv_bfloat16 *y;                                     // [tokens, dim]
    uint32_t *sorted;                                     // [tokens * k], choices by expert
    uint32_t *places;                                     // [experts + 1 + blocks], starts of experts, then each block's expert
    int tokens, k, experts, identity, dim, hidden, hidden_tiles, dim_tiles, scaled_input, blocks;
    Joint joint;
    Normed normed;                // of x, for few tokens
    const __nv_bfloat16 *residual; // [tokens, dim], joins what few tokens give; or none
    float *squares;                // [tokens, dim_tiles], of what comes out then; or none
    Route route;                   // has `chosen` and `weights` written, for few tokens
};

constexpr int MOST_WARPS = 4; // of the first product

__device__ __forceinline__ float of_all(const float *partial, int warps, int stride, int i) {
    float sum = 0;
#pragma unroll 4
    for (int w = 0; w < warps; w++) sum += partial[w * stride + i];
    return sum;
}

// Grid: (rows of tiles of `hidden`, tokens * k).
template <int P, int GROUP, bool HALF, bool GATED, int S> __device__ __forceinline__ void up_few(const Experts &a, uint8_t *shared) {
    constexpr int RT = GATED ? 2 : 1;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x, choice = blockIdx.y, token = choice / a.k;
    uint8_t *rings = shared + staged_bytes(a.dim) + summed_bytes(a.dim), *ring = rings + warp * one_ring<P, GROUP, RT, S>;
    __shared__ float scores[MOST_WARPS][MOST_ROUTED];
    let_next_start();
    Arriving<P, GROUP> own(a.x + size_t(token) * a.dim, a.normed.weight, a.dim, threadIdx.x, blockDim.x);
    own.ask_weight();
    wait_for_previous();
    // Before the weights: these would keep them waiting.
    own.ask();
    float squares = 0;
    if (warp == warps - 1 && a.normed.weight)
        for (int i = lane; i < a.normed.parts; i += 32) squares += a.normed.squares[size_t(token) * a.normed.parts + i];
    // Every warp finds its expert by itself: that takes less than another kernel's start, or than waiting for each other. One of them finds
    // all, and writes them down.
    const size_t place = size_t(token) * a.k + lane;
    const bool writes = warp == 0 && a.route.logits && tile == 0 && choice == token * a.k + a.k - 1;
    uint32_t chosen = ~0u;
    float weight = 0;
    if (a.route.logits) {
        chosen = choose(a.route, token, a.scaled_input || writes ? a.k : choice % a.k + 1, scores[warp]);
        if (a.scaled_input) weight = weigh(a.route, chosen, scores[warp]);
    } else if (lane < a.k) {
        chosen = a.chosen[place];
        if (a.scaled_input) weight = a.weights[place];
    }
    const uint32_t expert = __shfl_sync(~0u, chosen, choice % a.k);
    weight = __shfl_sync(~0u, weight, choice % a.k);
    uint4 *x = reinterpret_cast<uint4 *>(shared);
    float *sums = reinterpret_cast<float *>(shared + staged_bytes(a.dim));
    auto ready = [&] {
        own.put(x, sums);
        if (writes) {
            const float weight = weigh(a.route, chosen, scores[warp]);
            if (lane < a.k) a.chosen[place] = chosen, a.weights[place] = weight;
        }
        __syncthreads();
    };
    if (expert >= a.experts) return ready();
    Packed of[RT];
    int rows[RT];
#pragma unroll
    for (int r = 0; r < RT; r++) of[r] = GATED && r == 0 ? a.gate : a.up, rows[r] = expert * a.hidden_tiles + tile;
    float y[RT][2] = {};
    product_of_one<P, GROUP, HALF, RT, S>(of, rows, x, sums, a.dim, warp, warps, ring, y, ready);
    float *partial = reinterpret_cast<float *>(rings);
    __shared__ float normal;
    copies_wait<0>();
    if (warp == warps - 1) {
        squares = warp_sum(squares);
        if (lane == 0) normal = a.normed.weight ? rsqrtf(squares / a.dim + a.normed.eps) : 1.f;
    }
    __syncthreads();
    put_one<RT>(y, partial);
    __syncthreads();
    const int row = tile * 16 + threadIdx.x;
    if (threadIdx.x >= 16 || row >= a.hidden) return;
    const float factor = (tiny<P> ? UNSTAGED : 1.f) * (a.scaled_input ? weight : 1.f) * normal;
    const size_t bias = size_t(expert) * a.hidden + row;
    float up = factor * of_all(partial, warps, RT * 16, (RT - 1) * 16 + threadIdx.x), gate = up;
    if (a.up_bias) up += to_float(a.up_bias[bias]);
    if (GATED) gate = factor * of_all(partial, warps, RT * 16, threadIdx.x);
    if (GATED && a.gate_bias) gate += to_float(a.gate_bias[bias]);
    a.inner[size_t(choice) * a.hidden + row] = __float2bfloat16(joined(a.joint, GATED ? gate : up, up));
}

// Grid: (rows of tiles of `dim`, tokens); as many warps as choices, or a multiple.
template <int P, int GROUP, bool HALF, int S> __device__ __forceinline__ void down_few(const Experts &a, uint8_t *shared) {
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x, token = blockIdx.y, staged = staged_bytes(a.hidden);
    uint8_t *rings = shared + a.k * (staged + summed_bytes(a.hidden));
    float *sums = reinterpret_cast<float *>(shared + a.k * staged);
    let_next_start();
    wait_for_previous();
    uint32_t expert = ~0u;
    float weight = 0;
    if (lane < a.k) expert = a.chosen[size_t(token) * a.k + lane], weight = a.weights[size_t(token) * a.k + lane];
    const __nv_bfloat16 *inner = a.inner + size_t(token) * a.k * a.hidden;
    // Choices lie one behind the other, unless rows are to be filled up.
    const bool whole = staged == a.hidden * 2;
    Arriving<P, GROUP> own(inner, nullptr, whole ? a.k * a.hidden : 0, threadIdx.x, blockDim.x);
    own.ask();
    const int row = tile * 16 + lane, each = staged / (2 * GROUP);
    float more = 0;
    if (warp == 0 && lane < 16 && a.residual) more = to_float(a.residual[size_t(token) * a.dim + row]);
    bool is_staged = false;
    auto ready = [&] {
        if (is_staged) return;
        is_staged = true;
        if (whole) own.put(reinterpret_cast<uint4 *>(shared), sums);
        else
            for (int j = 0; j < a.k; j++) {
                Arriving<P, GROUP> one(inner + size_t(j) * a.hidden, nullptr, a.hidden, threadIdx.x, blockDim.x);
                one.ask(), one.put(reinterpret_cast<uint4 *>(shared + j * staged), sums + j * each);
            }
        __syncthreads();
    };
    float sum[1][2] = {};
    // Several warps share a choice's columns.
    const int share = max(1, warps / a.k);
    for (int j = warp / share; j < a.k; j += warps / share) {
        const uint32_t chosen = __shfl_sync(~0u, expert, j);
        const float factor = (tiny<P> ? UNSTAGED : 1.f) * (a.scaled_input ? 1.f : __shfl_sync(~0u, weight, j));
        if (chosen >= a.experts) continue;
        const Packed of[1] = {a.down};
        const int rows[1] = {int(chosen) * a.dim_tiles + tile};
        float y[1][2] = {};
        product_of_one<P, GROUP, HALF, 1, S>(of, rows, reinterpret_cast<const uint4 *>(shared + j * staged), sums + j * each, a.hidden, warp % share, share, rings + warp * one_ring<P, GROUP, 1, S>, y, ready);
        sum[0][0] += factor * y[0][0], sum[0][1] += factor * y[0][1];
    }
    ready();
    copies_wait<0>();
    __syncthreads();
    float *partial = reinterpret_cast<float *>(rings);
    put_one<1>(sum, partial);
    __syncthreads();
    if (warp > 0) return;
    float y = lane < 16 ? of_all(partial, warps, 16, lane) + more : 0.f;
    if (a.down_bias || a.identity)
        for (int j = 0; j < a.k; j++) {
            const uint32_t chosen = __shfl_sync(~0u, expert, j);
            const float share = __shfl_sync(~0u, weight, j);
            if (lane >= 16) continue;
            if (chosen < a.experts) {
                if (a.down_bias) y += (a.scaled_input ? 1.f : share) * to_float(a.down_bias[size_t(chosen) * a.dim + row]);
            } else if (chosen < a.experts + a.identity) {
                y += share * to_float(a.x[size_t(token) * a.dim + row]);
            }
        }
    const __nv_bfloat16 kept = __float2bfloat16(y);
    if (lane < 16) a.y[size_t(token) * a.dim + row] = kept;
    if (a.squares) {
        float square = to_float(kept) * to_float(kept);
#pragma unroll
        for (int step = 8; step > 0; step /= 2) square += __shfl_xor_sync(~0u, square, step);
        if (lane == 0) a.squares[size_t(token) * a.dim_tiles + tile] = square;
    }
}

constexpr int TOKENS = 32;

// Sorts choices by expert. One block; shared memory for a counter an expert.
extern "C" __global__ void __launch_bounds__(1024) sort_choices(const __grid_constant__ Experts a) {
    extern __shared__ __align__(16) uint8_t shared[];
    uint32_t *count = reinterpret_cast<uint32_t *>(shared);
    let_next_start();
    wait_for_previous();
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) count[e] = 0;
    __syncthreads();
    const int choices = a.tokens * a.k;
    for (int i = threadIdx.x; i < choices; i += blockDim.x)
        if (a.chosen[i] < a.experts) atomicAdd(count + a.chosen[i], 1);
    __syncthreads();
    if (threadIdx.x == 0) {
        uint32_t start = 0, block = 0;
        for (int e = 0; e < a.experts; e++) {
            uint32_t n = count[e];
            a.places[e] = count[e] = start, start += n;
            for (uint32_t i = 0; i < n; i += TOKENS) a.places[a.experts + 1 + block++] = e | i / TOKENS << 16;
        }
        a.places[a.experts] = start;
        for (; block < a.blocks; block++) a.places[a.experts + 1 + block] = ~0u;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < choices; i += blockDim.x)
        if (a.chosen[i] < a.experts) a.sorted[atomicAdd(count + a.chosen[i], 1)] = i;
}

// Grid: (rows of tiles / OWN, blocks). FIRST: gate and up, to `inner`; otherwise down, to `outer`.
template <int P, int GROUP, bool FIRST, bool GATED, int S> __device__ __forceinline__ void many(const Experts &a, uint8_t *shared) {
    constexpr int RT = 2, NT = TOKENS / 8, OWN = FIRST && GATED ? 1 : 2;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, g = threadIdx.x % 32 / 4;
    let_next_start();
    wait_for_previous();
    const uint32_t block = a.places[a.experts + 1 + blockIdx.y];
    if (block == ~0u) return;
    const int expert = block & 0xFFFF, start = a.places[expert] + (block >> 16) * TOKENS, count = min(TOKENS, int(a.places[expert + 1]) - start);
    const int tiles = FIRST ? a.hidden_tiles : a.dim_tiles, cols = FIRST ? a.dim : a.hidden, out = FIRST ? a.hidden : a.dim;
    Packed of[RT];
    int rows[RT];
#pragma unroll
    for (int r = 0; r < RT; r++) {
        of[r] = !FIRST ? a.down : GATED && r == 0 ? a.gate : a.up;
        rows[r] = expert * tiles + min(int(blockIdx.x) * OWN + (OWN == 2 ? r : 0), tiles - 1);
    }
    const __nv_bfloat16 *x[NT];
#pragma unroll
    for (int n = 0; n < NT; n++) {
        const uint32_t choice = a.sorted[start + min(n * 8 + g, count - 1)];
        x[n] = FIRST ? a.x + size_t(choice / a.k) * a.dim : a.inner + size_t(choice) * a.hidden;
    }
    float y[RT][NT][4] = {};
    product<P, GROUP, RT, NT, S>(of, rows, x, cols, warp, warps, shared + warp * ring_bytes<P, GROUP, RT, NT, S>, y, [] {});
    __syncthreads();
    float *partial = reinterpret_cast<float *>(shared);
    put<RT, NT>(y, partial);
    __syncthreads();
    for (int i = threadIdx.x; i < OWN * NT * 128; i += blockDim.x) {
        const int r = i / (NT * 128), token = i / 16 % TOKENS, row = (blockIdx.x * OWN + r) * 16 + i % 16;
        if (token >= count || row >= out) continue;
        const uint32_t choice = a.sorted[start + token];
        const size_t bias = size_t(expert) * out + row;
        float v = of_all(partial, warps, RT * NT * 128, i);
        if constexpr (FIRST) {
            const float factor = a.scaled_input ? a.weights[choice] : 1.f;
            float up = v *= factor;
            if constexpr (GATED) {
                up = factor * of_all(partial, warps, RT * NT * 128, NT * 128 + i);
                if (a.gate_bias) v += to_float(a.gate_bias[bias]);
            }
            if (a.up_bias) up += to_float(a.up_bias[bias]);
            a.inner[size_t(choice) * a.hidden + row] = __float2bfloat16(joined(a.joint, v, up));
        } else {
            if (a.down_bias) v += to_float(a.down_bias[bias]);
            a.outer[size_t(choice) * a.dim + row] = __float2bfloat16(v);
        }
    }
}

// Grid: (pairs of numbers of a token / 256, tokens).
extern "C" __global__ void __launch_bounds__(256) sum_choices(const __grid_constant__ Experts a) {
    let_next_start();
    wait_for_previous();
    const int token = blockIdx.y, i = (blockIdx.x * blockDim.x + threadIdx.x) * 2;
    if (i >= a.dim) return;
    float x = 0, y = 0;
    for (int j = 0; j < a.k; j++) {
        const int choice = token * a.k + j;
        const uint32_t expert = a.chosen[choice];
        const bool own = expert < a.experts;
        if (!own && expert >= a.experts + a.identity) continue;
        const float weight = own && a.scaled_input ? 1.f : a.weights[choice];
        const __nv_bfloat16 *from = own ? a.outer + size_t(choice) * a.dim : a.x + size_t(token) * a.dim;
        const __nv_bfloat162 v = *reinterpret_cast<const __nv_bfloat162 *>(from + i);
        x += weight * __low2float(v), y += weight * __high2float(v);
    }
    *reinterpret_cast<uint32_t *>(a.y + size_t(token) * a.dim + i) = bf16_pair(x, y);
}

#define KERNEL(NAME, THREADS, CALL)                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ Experts a) {                                       \
        extern __shared__ __align__(16) uint8_t shared[];                                                                                  \
        CALL(a, shared);                                                                                                                   \
    }
#define FEW(NAME, P, GROUP, HALF)                                                                                                          \
    KERNEL(up_few_##NAME, 128, (up_few<P, GROUP, HALF, false, 4>))                                                                         \
    KERNEL(gated_few_##NAME, 128, (up_few<P, GROUP, HALF, true, 2>))                                                                       \
    KERNEL(down_few_##NAME, 512, (down_few<P, GROUP, HALF, 3>))
#define MANY(NAME, P, GROUP)                                                                                                               \
    KERNEL(up_many_##NAME, 128, (many<P, GROUP, true, false, 2>))                                                                          \
    KERNEL(gated_many_##NAME, 128, (many<P, GROUP, true, true, 2>))                                                                        \
    KERNEL(down_many_##NAME, 128, (many<P, GROUP, false, false, 2>))
#define EXPERTS(NAME, P, GROUP) MANY(NAME, P, GROUP) FEW(NAME, P, GROUP, false)
#define SCALED(NAME, P, GROUP) EXPERTS(NAME, P, GROUP) FEW(half_##NAME, P, GROUP, true)

SCALED(nibble_32, NIBBLE, 32)
SCALED(nibble_64, NIBBLE, 64)
SCALED(nibble_128, NIBBLE, 128)
SCALED(byte_32, BYTE, 32)
SCALED(byte_64, BYTE, 64)
SCALED(byte_128, BYTE, 128)
EXPERTS(mx4_32, MX4, 32)
EXPERTS(plain_128, PLAIN, 128)
EXPERTS(fp8_32, FP8, 32)
EXPERTS(fp8_128, FP8, 128)
EXPERTS(six_128, SIX, 128)
EXPERTS(nv4_128, NV4, 128)
