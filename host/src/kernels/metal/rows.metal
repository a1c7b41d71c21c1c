// The small ops of a layer, each in one pass with f32 inside: norms over rows, rotary positions, and what joins gate and up.

struct Norm {
    uint dim;
    uint centred;
    uint has_weight;
    uint has_bias;
    float eps;
};

enum { ROW_THREADS = 256 };

// The sum of x over the group's threads, which all get it. shared: ROW_THREADS / 32.
inline float group_sum(float x, threadgroup float *shared, uint at) {
    x = simd_sum(x);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (at % 32 == 0) shared[at / 32] = x;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float sum = 0.0f;
    for (uint i = 0; i < ROW_THREADS / 32; i++) sum += shared[i];
    return sum;
}

// (x - mean) / sqrt(variance + eps) weight + bias; without `centred` the mean is taken for 0. Grid: rows.
template <typename T>
inline void norm_rows(device const T *x, device const float *weight, device const float *bias, device T *out, constant Norm &n,
                      threadgroup float *shared, uint3 group, uint at) {
    device const T *row = x + ulong(group.x) * n.dim;
    float centre = 0.0f;
    if (n.centred != 0) {
        float sum = 0.0f;
        for (uint i = at; i < n.dim; i += ROW_THREADS) sum += float(row[i]);
        centre = group_sum(sum, shared, at) / float(n.dim);
    }
    float squares = 0.0f;
    for (uint i = at; i < n.dim; i += ROW_THREADS) {
        const float apart = float(row[i]) - centre;
        squares = fma(apart, apart, squares);
    }
    const float share = precise::rsqrt(group_sum(squares, shared, at) / float(n.dim) + n.eps);
    for (uint i = at; i < n.dim; i += ROW_THREADS) {
        float y = (float(row[i]) - centre) * share;
        if (n.has_weight != 0) y *= weight[i];
        if (n.has_bias != 0) y += bias[i];
        out[ulong(group.x) * n.dim + i] = T(y);
    }
}

#define NORM(NAME, T) \
    kernel void NAME(device const T *x [[buffer(0)]], device const float *weight [[buffer(1)]], \
                     device const float *bias [[buffer(2)]], device T *out [[buffer(3)]], constant Norm &n [[buffer(4)]], \
                     threadgroup float *shared SHARED, uint3 group [[threadgroup_position_in_grid]], \
                     uint at [[thread_index_in_threadgroup]]) { \
        norm_rows<T>(x, weight, bias, out, n, shared, group, at); \
    }

struct Turn {
    uint numbers;
    uint heads;
    uint head_dim;
    uint pairs;
    uint neighbours;
    uint last;
    uint back;
};

// x [tokens, heads, head_dim], turns [tokens, 2 pairs]: cosines, then sines. Grid: numbers / ROW_THREADS.
template <typename T>
inline void turn_lanes(device const T *x, device const float *turns, device T *out, constant Turn &n, uint3 group, uint at) {
                       const uint i = group.x * ROW_THREADS + at;
    if (i >= n.numbers) return;
    const uint lane = i % n.head_dim, token = i / n.head_dim / n.heads;
    const uint first = n.last != 0 ? n.head_dim - 2 * n.pairs : 0;
    if (lane < first || lane >= first + 2 * n.pairs) {
        out[i] = x[i];
        return;
    }
    const uint l = lane - first;
    const bool second = n.neighbours != 0 ? l % 2 == 1 : l >= n.pairs;
    const uint pair = n.neighbours != 0 ? l / 2 : l % n.pairs, apart = n.neighbours != 0 ? 1 : n.pairs;
    device const float *turn = turns + ulong(token) * 2 * n.pairs;
    const float c = turn[pair], s = n.back != 0 ? -turn[n.pairs + pair] : turn[n.pairs + pair];
    const float own = float(x[i]), other = float(x[second ? i - apart : i + apart]);
    out[i] = T(second ? own * c + other * s : own * c - other * s);
}

#define ROTATE(NAME, T) \
    kernel void NAME(device const T *x [[buffer(0)]], device const float *turns [[buffer(1)]], device T *out [[buffer(2)]], \
                     constant Turn &n [[buffer(3)]], threadgroup float *shared SHARED, \
                     uint3 group [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]]) { \
        turn_lanes<T>(x, turns, out, n, group, at); \
    }

// Activations are numbered as in `gate` of rows.rs.
struct Gate {
    uint numbers;
    uint activation;
    float first;
    float second;
};

inline float sigmoid(float x) {
    return 1.0f / (1.0f + precise::exp(-x));
}

inline float gelu(float x) {
    return 0.5f * x * (1.0f + precise::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
}

inline float gated(float g, float u, constant Gate &n) {
    const float a = n.first, b = n.second;
    switch (n.activation) {
        case 0: return g * sigmoid(g) * u;
        case 1: return gelu(g) * u;
        case 2: {
            // Clamped: alpha, limit.
            const float low = min(g, b);
            return low * sigmoid(a * low) * (clamp(u, -b, b) + 1.0f);
        }
        case 3: return min(g * sigmoid(g), a) * clamp(u, -a, a);
        case 4: {
            const float low = min(g, a);
            return low * sigmoid(low) * clamp(u, -a, a);
        }
        case 5: return a * precise::tanh(g / a) * sigmoid(g) * (b > 0.0f ? b * precise::tanh(u / b) : u);
        case 6: return u > 0.0f ? u * u : 0.0f;
        case 7: return gelu(u);
        default: return u * sigmoid(u);
    }
}

// Grid: numbers / ROW_THREADS.
template <typename T>
inline void gate_numbers(device const T *g, device const T *u, device T *out, constant Gate &n, uint3 group, uint at) {
                         const uint i = group.x * ROW_THREADS + at;
    if (i < n.numbers) out[i] = T(gated(float(g[i]), float(u[i]), n));
}

#define GATE(NAME, T) \
    kernel void NAME(device const T *g [[buffer(0)]], device const T *u [[buffer(1)]], device T *out [[buffer(2)]], \
                     constant Gate &n [[buffer(3)]], threadgroup float *shared SHARED, \
                     uint3 group [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]]) { \
        gate_numbers<T>(g, u, out, n, group, at); \
    }

// What chosen experts gave, weighted and added up: y [tokens, each, dim], shares [tokens, each] -> out [tokens, dim]. A choice of an
// expert from `experts` on adds the token itself; y has 0 there.
struct Mix {
    uint numbers;
    uint dim;
    uint each;
    uint experts;
    uint weighted;
};

template <typename T>
inline void mix_experts(device const T *y, device const T *x, device const uint *chosen, device const float *shares, device T *out,
                        constant Mix &n, uint3 group, uint at) {
    const uint i = group.x * ROW_THREADS + at;
    if (i >= n.numbers) return;
    const uint token = i / n.dim, lane = i % n.dim;
    float sum = 0.0f;
    for (uint e = 0; e < n.each; e++) {
        const uint pair = token * n.each + e;
        if (chosen[pair] >= n.experts) sum = fma(shares[pair], float(x[i]), sum);
        else sum = fma(n.weighted != 0 ? shares[pair] : 1.0f, float(y[ulong(pair) * n.dim + lane]), sum);
    }
    out[i] = T(sum);
}

#define MIX(NAME, T) \
    kernel void NAME(device const T *y [[buffer(0)]], device const T *x [[buffer(1)]], device const uint *chosen [[buffer(2)]], \
                     device const float *shares [[buffer(3)]], device T *out [[buffer(4)]], constant Mix &n [[buffer(5)]], \
                     threadgroup float *shared SHARED, uint3 group [[threadgroup_position_in_grid]], \
                     uint at [[thread_index_in_threadgroup]]) { \
        mix_experts<T>(y, x, chosen, shares, out, n, group, at); \
    }
