// Recurrences over the new tokens of some sequences, in f32. A sequence's state lies in two places, of which the one at the position's
// lowest bit holds it: steps read one and write the other, so that a step that was started ahead leaves what it began with, and a recorded
// step finds its state wherever it is replayed. Formulas and layouts are those of host/src/kernels/cpu/recurrence.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "tiles.cuh"

namespace {

constexpr int MOST_INPUTS = 6, MOST_SEGMENTS = 16, WARPS = 4;

// As recurrence.rs has it.
struct Input {
    const void *at;
    // 0: f32, 1: bf16, 2: f16. Numbers from a token to the next.
    uint32_t kind, stride;
};
struct Segment {
    float *states;
    uint32_t from, tokens;
};
struct Recurring {
    Input in[MOST_INPUTS];
    void *y;
    const uint32_t *positions;
    // Numbers of a state.
    uint64_t size;
    uint32_t y_kind, n[5];
    Segment of[MOST_SEGMENTS];
};

__device__ __forceinline__ float number(const Input &in, size_t i) {
    if (in.kind == 1) return __bfloat162float(static_cast<const __nv_bfloat16 *>(in.at)[i]);
    if (in.kind == 2) return __half2float(static_cast<const __half *>(in.at)[i]);
    return static_cast<const float *>(in.at)[i];
}

__device__ __forceinline__ void put(const Recurring &r, size_t i, float x) {
    if (r.y_kind == 1) static_cast<__nv_bfloat16 *>(r.y)[i] = __float2bfloat16(x);
    else if (r.y_kind == 2) static_cast<__half *>(r.y)[i] = __float2half(x);
    else static_cast<float *>(r.y)[i] = x;
}

struct States {
    const float *before;
    float *after;
    uint32_t position;
};

__device__ __forceinline__ States states(const Recurring &r, const Segment &s) {
    const uint32_t position = r.positions[s.from];
    return {s.states + (position & 1) * r.size, s.states + ((position + s.tokens) & 1) * r.size, position};
}

enum { LINEAR = 0, DELTA = 1, WKV7 = 2 };

// The sum over the four lanes that share a value.
__device__ __forceinline__ float sum4(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// A state [heads, d, e]. Inputs q, k, v, g, more, last. LINEAR: S = exp(g) S + k vT. DELTA: S = exp(g) S, S += k (more (v - kT S))T.
// WKV7: S = exp(g) S + last (moreT S) + k vT. All give y = qT S. Four lanes of a warp share a value's column and have every fourth key.
// n: heads, k_heads, d, e, whether g is of a head (0), a token's head (1) or its lanes (2).
template <int KIND, int PER> __device__ void recur(const Recurring &r) {
    const Segment s = r.of[blockIdx.z];
    const uint32_t heads = r.n[0], d = r.n[2], e = r.n[3], decay = r.n[4], head = blockIdx.y, k_head = head / (heads / r.n[1]);
    const uint32_t lane = threadIdx.x % 32, first = lane % 4, column = (blockIdx.x * WARPS + threadIdx.x / 32) * 8 + lane / 4;
    const bool there = column < e;
    const Input &q = r.in[0], &k = r.in[1], &v = r.in[2], &g = r.in[3], &more = r.in[4], &last = r.in[5];
    let_next_start();
    wait_for_previous();
    const States of = states(r, s);
    float state[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const uint32_t key = first + 4 * i;
        state[i] = there && key < d ? of.before[(size_t(head) * d + key) * e + column] : 0.0f;
    }
    for (uint32_t token = s.from; token < s.from + s.tokens; token++) {
        const size_t keys = size_t(k_head) * d, q_at = size_t(token) * q.stride + keys, k_at = size_t(token) * k.stride + keys;
        const float value = there ? number(v, size_t(token) * v.stride + head * e + column) : 0.0f;
        float of_head = 1.0f;
        if (decay < 2) of_head = expf(number(g, decay == 0 ? head : size_t(token) * g.stride + head));
        auto faded = [&](uint32_t key) { return decay < 2 ? of_head : expf(number(g, size_t(token) * g.stride + size_t(head) * d + key)); };
        float change = value, read = 0.0f, sum = 0.0f;
        if (KIND == DELTA) {
            float held = 0.0f;
#pragma unroll
            for (int i = 0; i < PER; i++) {
                const uint32_t key = first + 4 * i;
                if (key < d) state[i] *= faded(key), held = fmaf(number(k, k_at + key), state[i], held);
            }
            change = number(more, size_t(token) * more.stride + head) * (value - sum4(held));
        }
        if (KIND == WKV7) {
#pragma unroll
            for (int i = 0; i < PER; i++) {
                const uint32_t key = first + 4 * i;
                if (key < d) read = fmaf(number(more, size_t(token) * more.stride + size_t(head) * d + key), state[i], read);
            }
            read = sum4(read);
        }
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const uint32_t key = first + 4 * i;
            if (key < d) {
                if (KIND != DELTA) state[i] *= faded(key);
                if (KIND == WKV7) state[i] = fmaf(number(last, size_t(token) * last.stride + size_t(head) * d + key), read, state[i]);
                state[i] = fmaf(number(k, k_at + key), change, state[i]);
                sum = fmaf(number(q, q_at + key), state[i], sum);
            }
        }
        sum = sum4(sum);
        if (first == 0 && there) put(r, (size_t(token) * heads + head) * e + column, sum);
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const uint32_t key = first + 4 * i;
        if (there && key < d) of.after[(size_t(head) * d + key) * e + column] = state[i];
    }
}

// Mamba: a state [rows, n]. Inputs x [rows], dt [rows / abreast], b and c [rows / together, n], a. h = exp(dt a) h + dt x b, y = h c. A warp
// has a row. n: rows, rows that share dt (and a, if it is one for them), rows that share b and c, n, whether each number has an a.
template <int PER> __device__ void scan(const Recurring &r) {
    const Segment s = r.of[blockIdx.z];
    const uint32_t rows = r.n[0], abreast = r.n[1], together = r.n[2], n = r.n[3], lane = threadIdx.x % 32;
    const uint32_t row = blockIdx.x * WARPS + threadIdx.x / 32;
    let_next_start();
    if (row >= rows) return;
    const Input &x = r.in[0], &dt = r.in[1], &b = r.in[2], &c = r.in[3], &a = r.in[4];
    wait_for_previous();
    const States of = states(r, s);
    float state[PER], by[PER];
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const uint32_t at = lane + 32 * i;
        state[i] = at < n ? of.before[size_t(row) * n + at] : 0.0f;
        by[i] = at < n ? number(a, r.n[4] ? size_t(row) * n + at : row / abreast) : 0.0f;
    }
    for (uint32_t token = s.from; token < s.from + s.tokens; token++) {
        const float step = number(dt, size_t(token) * dt.stride + row / abreast), input = step * number(x, size_t(token) * x.stride + row);
        const size_t shared = size_t(row / together) * n;
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const uint32_t at = lane + 32 * i;
            if (at < n) {
                state[i] = fmaf(state[i], expf(step * by[i]), input * number(b, size_t(token) * b.stride + shared + at));
                sum = fmaf(state[i], number(c, size_t(token) * c.stride + shared + at), sum);
            }
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane == 0) put(r, size_t(token) * rows + row, sum);
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
        const uint32_t at = lane + 32 * i;
        if (at < n) of.after[size_t(row) * n + at] = state[i];
    }
}

} // namespace

#define RECUR(NAME, KIND, PER)                                                                                                           \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) NAME##_##PER(const __grid_constant__ Recurring r) { recur<KIND, PER>(r); }
#define FOR_KEYS(NAME, KIND) RECUR(NAME, KIND, 4) RECUR(NAME, KIND, 16) RECUR(NAME, KIND, 32) RECUR(NAME, KIND, 64)
FOR_KEYS(linear, LINEAR)
FOR_KEYS(delta, DELTA)
FOR_KEYS(wkv7, WKV7)

#define SCAN(PER)                                                                                                                        \
    extern "C" __global__ void __launch_bounds__(32 * WARPS) scan_##PER(const __grid_constant__ Recurring r) { scan<PER>(r); }
SCAN(1)
SCAN(2)
SCAN(4)
SCAN(8)

// A causal convolution: the state holds the taps - 1 last inputs. Inputs x [channels], weight [taps, channels] (or none: the last tap but
// one alone, which gives the token before), bias [channels] or none. A thread has some neighbouring tokens of a channel.
// n: channels, taps, tokens of a thread.
extern "C" __global__ void __launch_bounds__(32 * WARPS) conv(const __grid_constant__ Recurring r) {
    const Segment s = r.of[blockIdx.z];
    const uint32_t channels = r.n[0], taps = r.n[1], carried = taps - 1, channel = blockIdx.x * 32 * WARPS + threadIdx.x;
    const uint32_t begin = blockIdx.y * r.n[2], end = min(s.tokens, begin + r.n[2]);
    let_next_start();
    if (channel >= channels || begin >= s.tokens) return;
    const Input &x = r.in[0], &weight = r.in[1], &bias = r.in[2];
    wait_for_previous();
    const States of = states(r, s);
    // Line t of inputs: those carried, then the new ones.
    auto input = [&](uint32_t line) {
        return line < carried ? of.before[size_t(line) * channels + channel] : number(x, size_t(s.from + line - carried) * x.stride + channel);
    };
    for (uint32_t token = begin; token < end; token++) {
        float sum = bias.at ? number(bias, channel) : 0.0f;
        if (weight.at)
            for (uint32_t tap = 0; tap < taps; tap++) sum = fmaf(number(weight, size_t(tap) * channels + channel), input(token + tap), sum);
        else sum = input(token);
        put(r, size_t(s.from + token) * channels + channel, sum);
    }
    // Nobody else reads what was carried: lines of later threads begin behind it.
    if (begin == 0)
        for (uint32_t line = 0; line < carried; line++) of.after[size_t(line) * channels + channel] = input(s.tokens + line);
}

// The real-gated linear recurrent unit: h = a h + sqrt(1 - a^2) x with a = exp(log_a); the first token of a text enters as it is. Inputs x
// and log_a [dim]. n: dim.
extern "C" __global__ void __launch_bounds__(32 * WARPS) rg_lru(const __grid_constant__ Recurring r) {
    const Segment s = r.of[blockIdx.z];
    const uint32_t dim = r.n[0], i = blockIdx.x * 32 * WARPS + threadIdx.x;
    let_next_start();
    if (i >= dim) return;
    wait_for_previous();
    const States of = states(r, s);
    float h = of.before[i];
    for (uint32_t token = s.from; token < s.from + s.tokens; token++) {
        const float x = number(r.in[0], size_t(token) * r.in[0].stride + i), by = number(r.in[1], size_t(token) * r.in[1].stride + i);
        h = of.position == 0 && token == s.from ? x : fmaf(h, expf(by), sqrtf(-expm1f(2.0f * by)) * x);
        put(r, size_t(token) * dim + i, h);
    }
    of.after[i] = h;
}
