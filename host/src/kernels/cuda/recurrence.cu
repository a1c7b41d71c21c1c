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
// WKV7: S = exp(g) S + last (moreT S) + k vT. All give y = qT S. Four lanes of a warp share a value's column; each has four of every
// sixteen keys. Tokens go through shared memory, some at a time.
// n: heads, k_heads, d, e, whether g is of a head (0), a token's head (1) or its lanes (2).
template <int KIND, int PER> __device__ void recur(const Recurring &r) {
    constexpr int D = 4 * PER, T = D > 128 ? 8 : 16, COLUMNS = 8 * WARPS;
    __shared__ __align__(16) float qs[T][D], ks[T][D], fades[T][D], mores[KIND == WKV7 ? T : 1][D], lasts[KIND == WKV7 ? T : 1][D];
    __shared__ float vs[T][COLUMNS], ys[T][COLUMNS], of_head[T], betas[T];
    const Segment s = r.of[blockIdx.z];
    const uint32_t heads = r.n[0], d = r.n[2], e = r.n[3], decay = r.n[4], head = blockIdx.y, k_head = head / (heads / r.n[1]);
    const uint32_t lane = threadIdx.x % 32, first = lane % 4 * 4, own = threadIdx.x / 32 * 8 + lane / 4, column = blockIdx.x * COLUMNS + own;
    const uint32_t columns = min(uint32_t(COLUMNS), e - blockIdx.x * COLUMNS);
    const Input &q = r.in[0], &k = r.in[1], &v = r.in[2], &g = r.in[3], &more = r.in[4], &last = r.in[5];
    let_next_start();
    wait_for_previous();
    const States of = states(r, s);
    float state[PER / 4][4];
#pragma unroll
    for (int m = 0; m < PER / 4; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t key = 16 * m + first + i;
            state[m][i] = column < e && key < d ? of.before[(size_t(head) * d + key) * e + column] : 0.0f;
        }
    for (uint32_t done = 0; done < s.tokens; done += T) {
        const uint32_t count = min(uint32_t(T), s.tokens - done), token = s.from + done;
        __syncthreads();
        // All that a thread fetches is on its way before any of it is put down. Keys that are not there are zeros.
        const uint32_t at_v = threadIdx.x / COLUMNS, of_v = threadIdx.x % COLUMNS, own_token = token + threadIdx.x;
        float values[T * COLUMNS / (32 * WARPS)];
#pragma unroll
        for (int i = 0; i < T * COLUMNS / (32 * WARPS); i++) {
            const uint32_t t = at_v + i * (32 * WARPS / COLUMNS);
            values[i] = t < count && of_v < columns ? number(v, size_t(token + t) * v.stride + size_t(head) * e + blockIdx.x * COLUMNS + of_v) : 0.0f;
        }
        float beta = 0.0f, fade = 0.0f;
        if (threadIdx.x < count) {
            if (KIND == DELTA) beta = number(more, size_t(own_token) * more.stride + head);
            if (decay < 2) fade = number(g, decay == 0 ? head : size_t(own_token) * g.stride + head);
        }
        for (uint32_t at = threadIdx.x; at < count * D; at += 32 * WARPS) {
            const uint32_t t = at / D, i = at % D;
            const bool is = i < d;
            const size_t keys = size_t(k_head) * d + i, lanes = size_t(head) * d + i, row = token + t;
            const float own_q = is ? number(q, row * q.stride + keys) : 0.0f, own_k = is ? number(k, row * k.stride + keys) : 0.0f;
            const float own_g = is && decay == 2 ? number(g, row * g.stride + lanes) : 0.0f;
            float own_more = 0.0f, own_last = 0.0f;
            if (KIND == WKV7 && is) own_more = number(more, row * more.stride + lanes), own_last = number(last, row * last.stride + lanes);
            qs[t][i] = own_q, ks[t][i] = own_k;
            if (decay == 2) fades[t][i] = expf(own_g);
            if (KIND == WKV7) mores[t][i] = own_more, lasts[t][i] = own_last;
        }
#pragma unroll
        for (int i = 0; i < T * COLUMNS / (32 * WARPS); i++) vs[at_v + i * (32 * WARPS / COLUMNS)][of_v] = values[i];
        if (threadIdx.x < count) {
            if (KIND == DELTA) betas[threadIdx.x] = beta;
            if (decay < 2) of_head[threadIdx.x] = expf(fade);
        }
        __syncthreads();
        for (uint32_t t = 0; t < count; t++) {
            const float value = vs[t][own], fade = of_head[t];
            auto four = [&](const float *row, int m) { return *reinterpret_cast<const float4 *>(row + 16 * m + first); };
            auto faded = [&](int m) { return decay == 2 ? four(fades[t], m) : make_float4(fade, fade, fade, fade); };
            auto dot = [&](float4 a, const float(&b)[4], float sum) { return fmaf(a.w, b[3], fmaf(a.z, b[2], fmaf(a.y, b[1], fmaf(a.x, b[0], sum)))); };
            auto fades_by = [&](int m) {
                const float4 f = faded(m);
                state[m][0] *= f.x, state[m][1] *= f.y, state[m][2] *= f.z, state[m][3] *= f.w;
            };
            auto add = [&](int m, float4 a, float by) {
                state[m][0] = fmaf(a.x, by, state[m][0]), state[m][1] = fmaf(a.y, by, state[m][1]);
                state[m][2] = fmaf(a.z, by, state[m][2]), state[m][3] = fmaf(a.w, by, state[m][3]);
            };
            float change = value, read = 0.0f, sum = 0.0f;
            if (KIND == DELTA) {
                float held = 0.0f;
#pragma unroll
                for (int m = 0; m < PER / 4; m++) fades_by(m), held = dot(four(ks[t], m), state[m], held);
                change = betas[t] * (value - sum4(held));
            }
            if (KIND == WKV7) {
#pragma unroll
                for (int m = 0; m < PER / 4; m++) read = dot(four(mores[t], m), state[m], read);
                read = sum4(read);
            }
#pragma unroll
            for (int m = 0; m < PER / 4; m++) {
                if (KIND != DELTA) fades_by(m);
                if (KIND == WKV7) add(m, four(lasts[t], m), read);
                add(m, four(ks[t], m), change);
                sum = dot(four(qs[t], m), state[m], sum);
            }
            sum = sum4(sum);
            if (first == 0) ys[t][own] = sum;
        }
        __syncthreads();
        for (uint32_t t = threadIdx.x / 32; t < count; t += WARPS)
            if (lane < columns) put(r, (size_t(token + t) * heads + head) * e + blockIdx.x * COLUMNS + lane, ys[t][lane]);
    }
#pragma unroll
    for (int m = 0; m < PER / 4; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint32_t key = 16 * m + first + i;
            if (column < e && key < d) of.after[(size_t(head) * d + key) * e + column] = state[m][i];
        }
}

// Mamba: a state [rows, n]. Inputs x [rows], dt [rows / abreast], b and c [rows / together, n], a. h = exp(dt a) h + dt x b, y = h c. A warp
// has two rows; those of a block share b and c, which go through shared memory.
// n: rows, rows that share dt (and a, if it is one for them), rows that share b and c, n, whether each number has an a.
constexpr int SCAN_WARPS = 8, SCAN_ROWS = 2 * SCAN_WARPS;
template <int PER> __device__ void scan(const Recurring &r) {
    constexpr int N = 32 * PER, T = 16;
    __shared__ float bs[T][N], cs[T][N], xs[T][SCAN_ROWS], steps[T][SCAN_ROWS], ys[T][SCAN_ROWS];
    const Segment s = r.of[blockIdx.z];
    const uint32_t rows = r.n[0], abreast = r.n[1], together = r.n[2], n = r.n[3], lane = threadIdx.x % 32;
    // Blocks of each group of rows that share b and c.
    const uint32_t each = (together + SCAN_ROWS - 1) / SCAN_ROWS, group = blockIdx.x / each;
    const uint32_t begin = group * together + blockIdx.x % each * SCAN_ROWS, here = min(uint32_t(SCAN_ROWS), (group + 1) * together - begin);
    const Input &x = r.in[0], &dt = r.in[1], &b = r.in[2], &c = r.in[3], &a = r.in[4];
    let_next_start();
    wait_for_previous();
    const States of = states(r, s);
    float state[2][PER], by[2][PER];
    const uint32_t own = threadIdx.x / 32 * 2;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const uint32_t row = min(begin + own + h, rows - 1);
#pragma unroll
        for (int i = 0; i < PER; i++) {
            const uint32_t at = lane + 32 * i;
            state[h][i] = at < n ? of.before[size_t(row) * n + at] : 0.0f;
            by[h][i] = at < n ? number(a, r.n[4] ? size_t(row) * n + at : row / abreast) : 0.0f;
        }
    }
    for (uint32_t done = 0; done < s.tokens; done += T) {
        const uint32_t count = min(uint32_t(T), s.tokens - done), token = s.from + done;
        __syncthreads();
        // All that a thread fetches is on its way before any of it is put down. What is not there is zeros.
        const uint32_t t = threadIdx.x / SCAN_ROWS, i = threadIdx.x % SCAN_ROWS;
        const bool is = t < count && i < here;
        const float own_x = is ? number(x, size_t(token + t) * x.stride + begin + i) : 0.0f;
        const float own_dt = is ? number(dt, size_t(token + t) * dt.stride + (begin + i) / abreast) : 0.0f;
        for (uint32_t at = threadIdx.x; at < count * N; at += 32 * SCAN_WARPS) {
            const size_t row = token + at / N, lane = size_t(group) * n + at % N;
            const bool is = at % N < n;
            const float own_b = is ? number(b, row * b.stride + lane) : 0.0f, own_c = is ? number(c, row * c.stride + lane) : 0.0f;
            bs[0][at] = own_b, cs[0][at] = own_c;
        }
        xs[t][i] = own_x, steps[t][i] = own_dt;
        __syncthreads();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sums[T];
#pragma unroll
            for (int t = 0; t < T; t++) {
                float sum = 0.0f;
                if (t < count) {
                    const float step = steps[t][own + h], input = step * xs[t][own + h];
                    float fade = 0.0f;
                    if (!r.n[4]) fade = expf(step * by[h][0]);
#pragma unroll
                    for (int i = 0; i < PER; i++) {
                        if (r.n[4]) fade = expf(step * by[h][i]);
                        state[h][i] = fmaf(state[h][i], fade, input * bs[t][lane + 32 * i]);
                        sum = fmaf(state[h][i], cs[t][lane + 32 * i], sum);
                    }
                }
                sums[t] = sum;
            }
            // Sixteen sums over the lanes at once: half of them move to the other half of the lanes each time. Lane 2 t is left with token t's.
#pragma unroll
            for (int p = 0; p < 4; p++) {
                const int k = 8 >> p, step = 16 >> p;
                const bool upper = lane & step;
#pragma unroll
                for (int j = 0; j < 8; j++)
                    if (j < k) {
                        const float kept = upper ? sums[j + k] : sums[j], sent = upper ? sums[j] : sums[j + k];
                        sums[j] = kept + __shfl_xor_sync(~0u, sent, step);
                    }
            }
            const float sum = sums[0] + __shfl_xor_sync(~0u, sums[0], 1);
            if (lane % 2 == 0) ys[lane / 2][own + h] = sum;
        }
        __syncthreads();
        if (t < count && i < here) put(r, size_t(token + t) * rows + begin + i, ys[t][i]);
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
        if (own + h < here)
#pragma unroll
            for (int i = 0; i < PER; i++) {
                const uint32_t at = lane + 32 * i;
                if (at < n) of.after[size_t(begin + own + h) * n + at] = state[h][i];
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
    extern "C" __global__ void __launch_bounds__(32 * SCAN_WARPS) scan_##PER(const __grid_constant__ Recurring r) { scan<PER>(r); }
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
    const float first = bias.at ? number(bias, channel) : 0.0f;
    constexpr uint32_t FEW = 4;
    if (weight.at && taps == FEW) {
        // As most have: inputs and weights are on their way together, and an input is read once.
        float by[FEW], window[FEW];
#pragma unroll
        for (uint32_t tap = 0; tap < FEW; tap++) by[tap] = number(weight, size_t(tap) * channels + channel), window[tap] = tap + 1 < FEW ? input(begin + tap) : 0.0f;
        for (uint32_t token = begin; token < end; token++) {
            window[FEW - 1] = input(token + FEW - 1);
            float sum = first;
#pragma unroll
            for (uint32_t tap = 0; tap < FEW; tap++) sum = fmaf(by[tap], window[tap], sum);
            put(r, size_t(s.from + token) * channels + channel, sum);
#pragma unroll
            for (uint32_t tap = 0; tap + 1 < FEW; tap++) window[tap] = window[tap + 1];
        }
    } else {
        for (uint32_t token = begin; token < end; token++) {
            float sum = first;
            if (weight.at)
                for (uint32_t tap = 0; tap < taps; tap++) sum = fmaf(number(weight, size_t(tap) * channels + channel), input(token + tap), sum);
            else sum = input(token);
            put(r, size_t(s.from + token) * channels + channel, sum);
        }
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
