// Recurrences over one sequence's new tokens, all in f32: from the state before the first of them to the state after the last, which
// goes to a place of its own. Formulas and layouts are those of host/src/kernels/cpu/recurrence.

// A state [heads, d, e] from keys to values. A wave has one value lane of one head; its lanes have the key lanes between them.
struct Recur {
    uint tokens;
    uint heads;
    uint k_heads;
    uint d;
    uint e;
    // Whether g has a number for each head, each token and head, or each token, head and key lane.
    uint decay;
};

enum { LINEAR = 0, DELTA = 1, WKV7 = 2, STATE_WAVES = 4 };

inline float faded(device const float *g, constant Recur &n, uint token, uint head, uint i) {
    if (n.decay == 0) return exp(g[head]);
    const ulong at = ulong(token) * n.heads + head;
    return exp(n.decay == 1 ? g[at] : g[at * n.d + i]);
}

// LINEAR: S = exp(g) S + k vᵀ. DELTA: S = exp(g) S, S += k (more (v - kᵀ S))ᵀ, where more [tokens, heads] is beta.
// WKV7: S = exp(g) S + b (aᵀ S) + k vᵀ, where more is a, last is b, both [tokens, heads, d]. All give y = qᵀ S.
// Grid: e / STATE_WAVES, heads; 32 PER >= d.
template <int KIND, int PER>
inline void recur(device const float *q, device const float *k, device const float *v, device const float *g,
                  device const float *more, device const float *last, device const float *before, device float *y,
                  device float *after, constant Recur &n, uint3 group, uint at) {
    const uint lane = at % 32, head = group.y, j = group.x * STATE_WAVES + at / 32;
    if (j >= n.e) return;
    const uint k_head = head / (n.heads / n.k_heads);
    float state[PER];
    for (uint i = 0; i < PER; i++) {
        const uint d = lane + 32 * i;
        state[i] = d < n.d ? before[(ulong(head) * n.d + d) * n.e + j] : 0.0f;
    }
    for (uint token = 0; token < n.tokens; token++) {
        const ulong of_head = ulong(token) * n.heads + head, keys = (ulong(token) * n.k_heads + k_head) * n.d;
        const float value = v[of_head * n.e + j];
        float change = value, read = 0.0f;
        if (KIND == DELTA) {
            float held = 0.0f;
            for (uint i = 0; i < PER; i++) {
                const uint d = lane + 32 * i;
                if (d < n.d) {
                    state[i] *= faded(g, n, token, head, d);
                    held = fma(k[keys + d], state[i], held);
                }
            }
            change = more[of_head] * (value - simd_sum(held));
        }
        if (KIND == WKV7) {
            for (uint i = 0; i < PER; i++) {
                const uint d = lane + 32 * i;
                if (d < n.d) read = fma(more[of_head * n.d + d], state[i], read);
            }
            read = simd_sum(read);
        }
        float sum = 0.0f;
        for (uint i = 0; i < PER; i++) {
            const uint d = lane + 32 * i;
            if (d < n.d) {
                if (KIND != DELTA) state[i] *= faded(g, n, token, head, d);
                if (KIND == WKV7) state[i] = fma(last[of_head * n.d + d], read, state[i]);
                state[i] = fma(k[keys + d], change, state[i]);
                sum = fma(q[keys + d], state[i], sum);
            }
        }
        sum = simd_sum(sum);
        if (lane == 0) y[of_head * n.e + j] = sum;
    }
    for (uint i = 0; i < PER; i++) {
        const uint d = lane + 32 * i;
        if (d < n.d) after[(ulong(head) * n.d + d) * n.e + j] = state[i];
    }
}

#define RECUR(NAME, KIND, PER) \
    kernel void NAME(device const float *q [[buffer(0)]], device const float *k [[buffer(1)]], device const float *v [[buffer(2)]], \
                     device const float *g [[buffer(3)]], device const float *more [[buffer(4)]], \
                     device const float *last [[buffer(5)]], device const float *before [[buffer(6)]], \
                     device float *y [[buffer(7)]], device float *after [[buffer(8)]], constant Recur &n [[buffer(9)]], \
                     threadgroup float *shared SHARED, uint3 group [[threadgroup_position_in_grid]], \
                     uint at [[thread_index_in_threadgroup]]) { \
        recur<KIND, PER>(q, k, v, g, more, last, before, y, after, n, group, at); \
    }

// Mamba: a state [rows, n], rows are the lanes of all heads. h = exp(dt a) h + dt x b, y = h c.
struct Scan {
    uint tokens;
    uint rows;
    // Rows that share dt (and a, where it is one number for each of them).
    uint abreast;
    // Rows that share b and c.
    uint together;
    uint n;
    // Whether each number of the state has an a of its own.
    uint a_each;
};

// x and y [tokens, rows], dt [tokens, rows / abreast], b and c [tokens, rows / together, n]. Grid: rows / STATE_WAVES.
template <int PER>
inline void scan(device const float *x, device const float *dt, device const float *b, device const float *c,
                 device const float *a, device const float *before, device float *y, device float *after, constant Scan &n,
                 uint3 group, uint at) {
    const uint lane = at % 32, row = group.x * STATE_WAVES + at / 32;
    if (row >= n.rows) return;
    float state[PER];
    for (uint i = 0; i < PER; i++) {
        const uint s = lane + 32 * i;
        state[i] = s < n.n ? before[ulong(row) * n.n + s] : 0.0f;
    }
    for (uint token = 0; token < n.tokens; token++) {
        const float step = dt[ulong(token) * (n.rows / n.abreast) + row / n.abreast];
        const float input = step * x[ulong(token) * n.rows + row];
        const ulong shared_by = (ulong(token) * (n.rows / n.together) + row / n.together) * n.n;
        float sum = 0.0f;
        for (uint i = 0; i < PER; i++) {
            const uint s = lane + 32 * i;
            if (s < n.n) {
                const float by = n.a_each != 0 ? a[ulong(row) * n.n + s] : a[row / n.abreast];
                state[i] = fma(state[i], exp(step * by), input * b[shared_by + s]);
                sum = fma(state[i], c[shared_by + s], sum);
            }
        }
        sum = simd_sum(sum);
        if (lane == 0) y[ulong(token) * n.rows + row] = sum;
    }
    for (uint i = 0; i < PER; i++) {
        const uint s = lane + 32 * i;
        if (s < n.n) after[ulong(row) * n.n + s] = state[i];
    }
}

#define SCAN(NAME, PER) \
    kernel void NAME(device const float *x [[buffer(0)]], device const float *dt [[buffer(1)]], device const float *b [[buffer(2)]], \
                     device const float *c [[buffer(3)]], device const float *a [[buffer(4)]], \
                     device const float *before [[buffer(5)]], device float *y [[buffer(6)]], device float *after [[buffer(7)]], \
                     constant Scan &n [[buffer(8)]], threadgroup float *shared SHARED, \
                     uint3 group [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]]) { \
        scan<PER>(x, dt, b, c, a, before, y, after, n, group, at); \
    }

// Depthwise causal convolution: weight [taps, channels], the state holds the taps - 1 last inputs. One thread a number of y
// [tokens, channels], and of the state after.
struct Conv {
    uint tokens;
    uint channels;
    uint taps;
    uint has_bias;
};

inline void conv(device const float *x, device const float *weight, device const float *bias, device const float *before,
                 device float *y, device float *after, constant Conv &n, uint3 group, uint at) {
    const uint i = group.x * 256 + at, carried = n.taps - 1, channel = i % n.channels, line = i / n.channels;
    if (line >= n.tokens + carried) return;
    // Line t of inputs: those carried, then those of x.
    if (line >= n.tokens) {
        const uint from = line;
        after[(line - n.tokens) * n.channels + channel] =
            from < carried ? before[from * n.channels + channel] : x[(from - carried) * n.channels + channel];
        return;
    }
    float sum = n.has_bias != 0 ? bias[channel] : 0.0f;
    for (uint tap = 0; tap < n.taps; tap++) {
        const uint from = line + tap;
        const float input = from < carried ? before[from * n.channels + channel] : x[(from - carried) * n.channels + channel];
        sum = fma(weight[tap * n.channels + channel], input, sum);
    }
    y[i] = sum;
}

#define CONV(NAME) \
    kernel void NAME(device const float *x [[buffer(0)]], device const float *weight [[buffer(1)]], \
                     device const float *bias [[buffer(2)]], device const float *before [[buffer(3)]], \
                     device float *y [[buffer(4)]], device float *after [[buffer(5)]], constant Conv &n [[buffer(6)]], \
                     threadgroup float *shared SHARED, uint3 group [[threadgroup_position_in_grid]], \
                     uint at [[thread_index_in_threadgroup]]) { \
        conv(x, weight, bias, before, y, after, n, group, at); \
    }

// The real-gated linear recurrent unit: h = a h + sqrt(1 - a²) x with a = exp(log_a); the first token of a text enters as it is.
struct RgLru {
    uint tokens;
    uint dim;
    uint begins;
};

// 1 - exp(x) for x <= 0, without losing the small difference of an x near 0.
inline float one_less_exp(float x) {
    return x > -0.1f ? -x * (1.0f + x * (0.5f + x * (0.16666667f + x * (0.041666667f + x * 0.0083333333f)))) : 1.0f - precise::exp(x);
}

inline void rg_lru(device const float *x, device const float *log_a, device const float *before, device float *y,
                   device float *after, constant RgLru &n, uint3 group, uint at) {
    const uint i = group.x * 256 + at;
    if (i >= n.dim) return;
    float h = before[i];
    for (uint token = 0; token < n.tokens; token++) {
        const ulong place = ulong(token) * n.dim + i;
        const float by = log_a[place];
        h = n.begins != 0 && token == 0 ? x[place] : fma(h, precise::exp(by), precise::sqrt(one_less_exp(2.0f * by)) * x[place]);
        y[place] = h;
    }
    after[i] = h;
}

#define RG_LRU(NAME) \
    kernel void NAME(device const float *x [[buffer(0)]], device const float *log_a [[buffer(1)]], \
                     device const float *before [[buffer(2)]], device float *y [[buffer(3)]], device float *after [[buffer(4)]], \
                     constant RgLru &n [[buffer(5)]], threadgroup float *shared SHARED, \
                     uint3 group [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]]) { \
        rg_lru(x, log_a, before, y, after, n, group, at); \
    }
