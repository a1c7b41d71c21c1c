// Attention of a few queries over a long cache: each group takes a stretch of the cache for one head of one query, and a second
// kernel joins the stretches. One softmax goes on from key to key (Milakov and Gimelshein 2018). Infinities are not used: fast
// arithmetic may take them for anything.

struct Attend {
    uint heads;
    uint kv_heads;
    uint entries;
    // Entries of a stretch, and how many stretches there are.
    uint stretch;
    uint stretches;
    // Numbers of a value's row: its lanes, or those of a key whose first lanes it is.
    uint value_width;
    // 0 for none; see host/src/kernels/cpu/attention/sight.rs.
    uint window;
    uint keep;
    uint chunk;
    float scale;
    float softcap;
    uint has_slopes;
    uint has_sinks;
    // Where the first query stands; and the first entry, unless positions lists where each one does.
    uint first_query;
    uint first_key;
    uint has_positions;
};

constant float LOWEST = -3.0e38f;
enum { KEY_WAVES = 8 };

inline bool sees(constant Attend &n, uint p, uint k) {
    return k <= p && (n.window == 0 || p - k < n.window || k < n.keep) && (n.chunk == 0 || p / n.chunk == k / n.chunk);
}

// partial [tokens, heads, stretches, 2 + E]: largest score, sum of exp(score - largest), and of that times values.
// Grid: heads, tokens, stretches; 256 threads; shared: KEY_WAVES (2 + E).
template <typename T, int D, int E>
inline void attend(device const T *q, device const T *keys, device const T *values, device const uint *positions,
                   device const float *slopes, device float *partial, constant Attend &n, threadgroup float *shared,
                   uint3 group, uint at) {
    enum { KEY_LANES = (D + 31) / 32, VALUE_LANES = (E + 31) / 32 };
    const uint wave = at / 32, lane = at % 32, head = group.x, token = group.y;
    const uint kv_head = head / (n.heads / n.kv_heads);
    float query[KEY_LANES], sum[VALUE_LANES];
    for (uint i = 0; i < KEY_LANES; i++) {
        const uint d = lane + 32 * i;
        query[i] = d < D ? float(q[(ulong(token) * n.heads + head) * D + d]) * n.scale : 0.0f;
    }
    for (int i = 0; i < VALUE_LANES; i++) sum[i] = 0.0f;
    float peak = LOWEST, mass = 0.0f;
    const uint p = n.first_query + token, first = group.z * n.stretch, end = min(n.entries, first + n.stretch);
    for (uint entry = first + wave; entry < end; entry += KEY_WAVES) {
        const uint k = n.has_positions != 0 ? positions[entry] : n.first_key + entry;
        if (!sees(n, p, k)) continue;
        device const T *key = keys + (ulong(entry) * n.kv_heads + kv_head) * D;
        float score = 0.0f;
        for (uint i = 0; i < KEY_LANES; i++) {
            const uint d = lane + 32 * i;
            if (d < D) score = fma(query[i], float(key[d]), score);
        }
        score = simd_sum(score);
        if (n.softcap > 0.0f) score = n.softcap * precise::tanh(score / n.softcap);
        if (n.has_slopes != 0) score += slopes[head] * (float(k) - float(p));
        const float higher = max(peak, score), fade = exp(peak - higher), weight = exp(score - higher);
        peak = higher;
        mass = mass * fade + weight;
        device const T *value = values + (ulong(entry) * n.kv_heads + kv_head) * n.value_width;
        for (uint i = 0; i < VALUE_LANES; i++) {
            const uint e = lane + 32 * i;
            sum[i] = sum[i] * fade + (e < E ? weight * float(value[e]) : 0.0f);
        }
    }
    threadgroup float *own = shared + wave * (2 + E);
    if (lane == 0) {
        own[0] = peak;
        own[1] = mass;
    }
    for (uint i = 0; i < VALUE_LANES; i++)
        if (lane + 32 * i < E) own[2 + lane + 32 * i] = sum[i];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float highest = LOWEST;
    for (uint w = 0; w < KEY_WAVES; w++) highest = max(highest, shared[w * (2 + E)]);
    device float *to = partial + ((ulong(token) * n.heads + head) * n.stretches + group.z) * (2 + E);
    for (uint i = at; i < E + 1; i += 32 * KEY_WAVES) {
        float all = 0.0f;
        for (uint w = 0; w < KEY_WAVES; w++) all += shared[w * (2 + E) + 1 + i] * exp(shared[w * (2 + E)] - highest);
        to[1 + i] = all;
    }
    if (at == 0) to[0] = highest;
}

#define ATTEND(NAME, T, D, E) \
    kernel void NAME(device const T *q [[buffer(0)]], device const T *keys [[buffer(1)]], device const T *values [[buffer(2)]], \
                     device const uint *positions [[buffer(3)]], device const float *slopes [[buffer(4)]], \
                     device float *partial [[buffer(5)]], constant Attend &n [[buffer(6)]], threadgroup float *shared SHARED, \
                     uint3 group [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]]) { \
        attend<T, D, E>(q, keys, values, positions, slopes, partial, n, shared, group, at); \
    }

// The stretches' sums as one softmax, which a sink may join: out [tokens, heads, width]. A query that sees nothing gives 0.
// Grid: heads, tokens; 256 threads.
template <typename T>
inline void join_stretches(device const float *partial, device const float *sinks, device T *out, constant Attend &n, uint width,
                           uint3 group, uint at) {
    const ulong row = ulong(group.y) * n.heads + group.x;
    device const float *from = partial + row * n.stretches * (2 + width);
    float highest = n.has_sinks != 0 ? sinks[group.x] : LOWEST;
    for (uint s = 0; s < n.stretches; s++) highest = max(highest, from[s * (2 + width)]);
    float mass = n.has_sinks != 0 ? exp(sinks[group.x] - highest) : 0.0f;
    for (uint s = 0; s < n.stretches; s++) mass += from[s * (2 + width) + 1] * exp(from[s * (2 + width)] - highest);
    const float share = mass > 0.0f ? 1.0f / mass : 0.0f;
    for (uint e = at; e < width; e += 256) {
        float sum = 0.0f;
        for (uint s = 0; s < n.stretches; s++) sum += from[s * (2 + width) + 2 + e] * exp(from[s * (2 + width)] - highest);
        out[row * width + e] = T(sum * share);
    }
}

#define JOIN(NAME, T, E) \
    kernel void NAME(device const float *partial [[buffer(0)]], device const float *sinks [[buffer(1)]], \
                     device T *out [[buffer(2)]], constant Attend &n [[buffer(3)]], \
                     threadgroup float *shared SHARED, uint3 group [[threadgroup_position_in_grid]], \
                     uint at [[thread_index_in_threadgroup]]) { \
        join_stretches<T>(partial, sinks, out, n, E, group, at); \
    }
