// Activations times packed weights, out = x Wᵀ, and rows of packed weights by number. A format F gives `eight`; T is the type of
// activations; sums are f32. Every kernel gets the place of its group in the grid and its place `at` in the group; 32 of these are a wave.

struct Matmul {
    uint rows;
    uint cols;
    uint tokens;
    // Of experts: how many there are, and how many of them each row of x goes through.
    uint experts;
    uint each;
    Strides by;
};

// Outputs that a wave makes, and waves of a group.
enum { ROWS = 4, WAVES = 2 };

// Sums over all columns of ROWS rows of weights times TOKENS rows of x; every lane gets them.
template <typename F, typename T, int TOKENS>
inline void wave_sums(device const uchar *data, device const uchar *scales, device const uchar *biases, ulong row, uint rows,
                      device const T *x, uint tokens, constant Matmul &n, uint lane, thread float *sums) {
    for (int i = 0; i < ROWS * TOKENS; i++) sums[i] = 0.0f;
    for (uint column = lane * 8; column < n.cols; column += 256) {
        for (uint r = 0; r < ROWS; r++) {
            float w[8];
            // The last rows are read again in place of those beyond them.
            F::eight(row_at(data, scales, biases, n.by, row + min(r, rows - 1)), column, n.cols, w);
            for (uint t = 0; t < TOKENS; t++) {
                device const T *from = x + ulong(min(t, tokens - 1)) * n.cols;
                float sum = 0.0f;
                for (uint i = 0; i < 8; i++) sum = fma(w[i], float(from[min(column + i, n.cols - 1)]), sum);
                sums[r * TOKENS + t] += sum;
            }
        }
    }
    for (int i = 0; i < ROWS * TOKENS; i++) sums[i] = simd_sum(sums[i]);
}

// Few tokens: weights stream by once for each TOKENS of them. Grid: rows / (ROWS WAVES), tokens / TOKENS.
template <typename F, typename T, int TOKENS>
inline void few(device const uchar *data, device const uchar *scales, device const uchar *biases, device const T *x,
                device T *out, constant Matmul &n, uint3 group, uint at) {
    const uint row = (group.x * WAVES + at / 32) * ROWS, token = group.y * TOKENS, lane = at % 32;
    if (row >= n.rows) return;
    const uint rows = min(uint(ROWS), n.rows - row), tokens = min(uint(TOKENS), n.tokens - token);
    float sums[ROWS * TOKENS];
    wave_sums<F, T, TOKENS>(data, scales, biases, row, rows, x + ulong(token) * n.cols, tokens, n, lane, sums);
    for (uint t = 0; t < TOKENS; t++)
        for (uint r = 0; r < ROWS; r++)
            if (lane == t * ROWS + r && r < rows && t < tokens)
                out[ulong(token + t) * n.rows + row + r] = T(sums[r * TOKENS + t]);
}

#define FEW(NAME, F, T, TOKENS) \
    kernel void NAME(device const uchar *data [[buffer(0)]], device const uchar *scales [[buffer(1)]], \
                     device const uchar *biases [[buffer(2)]], device const T *x [[buffer(3)]], device T *out [[buffer(4)]], \
                     constant Matmul &n [[buffer(5)]], threadgroup float *shared SHARED, \
                     uint3 group [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]]) { \
        few<F, T, TOKENS>(data, scales, biases, x, out, n, group, at); \
    }

// Chosen experts: W holds the rows of all experts one after the other, and row p of out is x's row p / each times expert chosen[p].
// Those behind the last one give 0. Grid: rows / (ROWS WAVES), rows of out.
template <typename F, typename T>
inline void chosen_few(device const uchar *data, device const uchar *scales, device const uchar *biases, device const T *x,
                       device const uint *chosen, device T *out, constant Matmul &n, uint3 group, uint at) {
    const uint row = (group.x * WAVES + at / 32) * ROWS, pair = group.y, lane = at % 32;
    if (row >= n.rows) return;
    const uint rows = min(uint(ROWS), n.rows - row), expert = chosen[pair];
    float sums[ROWS] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (expert < n.experts)
        wave_sums<F, T, 1>(data, scales, biases, ulong(expert) * n.rows + row, rows, x + ulong(pair / n.each) * n.cols, 1, n,
                           lane, sums);
    for (uint r = 0; r < ROWS; r++)
        if (lane == r && r < rows) out[ulong(pair) * n.rows + row + r] = T(sums[r]);
}

#define CHOSEN(NAME, F, T) \
    kernel void NAME(device const uchar *data [[buffer(0)]], device const uchar *scales [[buffer(1)]], \
                     device const uchar *biases [[buffer(2)]], device const T *x [[buffer(3)]], \
                     device const uint *chosen [[buffer(4)]], device T *out [[buffer(5)]], constant Matmul &n [[buffer(6)]], \
                     threadgroup float *shared SHARED, uint3 group [[threadgroup_position_in_grid]], \
                     uint at [[thread_index_in_threadgroup]]) { \
        chosen_few<F, T>(data, scales, biases, x, chosen, out, n, group, at); \
    }

// A tile of TILE tokens by TILE rows, STEP columns at a time; rows in threadgroup memory are PITCH apart, so that the eight rows of a
// small matrix fall into different banks. Four waves make a quarter each.
enum { TILE = 32, STEP = 32, PITCH = STEP + 4 };

// Many tokens: weights are unpacked tile by tile into threadgroup memory. Grid: rows / TILE, tokens / TILE; 128 threads.
template <typename F, typename T>
inline void many(device const uchar *data, device const uchar *scales, device const uchar *biases, device const T *x,
                 device T *out, constant Matmul &n, threadgroup float *shared, uint3 group, uint at) {
    threadgroup float *xs = shared;
    threadgroup float *ws = shared + TILE * PITCH;
    const uint row = group.x * TILE, token = group.y * TILE;
    const uint down = at / 32 / 2 * 16, along = at / 32 % 2 * 16;
    simdgroup_float8x8 sums[2][2];
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 2; j++) sums[i][j] = make_filled_simdgroup_matrix<float, 8>(0.0f);
    // Each thread brings eight numbers of x and of W.
    const uint line = at / 4, piece = at % 4 * 8;
    const Row weights = row_at(data, scales, biases, n.by, min(row + line, n.rows - 1));
    device const T *from = x + ulong(min(token + line, n.tokens - 1)) * n.cols;
    for (uint step = 0; step < n.cols; step += STEP) {
        const uint column = step + piece;
        float w[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        if (column < n.cols) F::eight(weights, column, n.cols, w);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = 0; i < 8; i++) {
            ws[line * PITCH + piece + i] = w[i];
            xs[line * PITCH + piece + i] = column + i < n.cols ? float(from[column + i]) : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint k = 0; k < STEP; k += 8) {
            simdgroup_float8x8 a[2], b[2];
            for (uint i = 0; i < 2; i++) {
                simdgroup_load(a[i], xs + (down + i * 8) * PITCH + k, PITCH);
                simdgroup_load(b[i], ws + (along + i * 8) * PITCH + k, PITCH, ulong2(0, 0), true);
            }
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 2; j++) simdgroup_multiply_accumulate(sums[i][j], a[i], b[j], sums[i][j]);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0; i < 2; i++)
        for (uint j = 0; j < 2; j++)
            simdgroup_store(sums[i][j], shared + (down + i * 8) * PITCH + along + j * 8, PITCH);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0; i < 8; i++)
        if (token + line < n.tokens && row + piece + i < n.rows)
            out[ulong(token + line) * n.rows + row + piece + i] = T(shared[line * PITCH + piece + i]);
}

#define MANY(NAME, F, T) \
    kernel void NAME(device const uchar *data [[buffer(0)]], device const uchar *scales [[buffer(1)]], \
                     device const uchar *biases [[buffer(2)]], device const T *x [[buffer(3)]], device T *out [[buffer(4)]], \
                     constant Matmul &n [[buffer(5)]], threadgroup float *shared SHARED, \
                     uint3 group [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]]) { \
        many<F, T>(data, scales, biases, x, out, n, shared, group, at); \
    }

// Rows by number, unpacked: out [tokens, cols]. Grid: cols / 2048, tokens; 256 threads.
template <typename F, typename T>
inline void gather_rows(device const uchar *data, device const uchar *scales, device const uchar *biases, device const uint *ids,
                        device T *out, constant Matmul &n, uint3 group, uint at) {
    const uint column = (group.x * 256 + at) * 8;
    if (column >= n.cols) return;
    float w[8];
    F::eight(row_at(data, scales, biases, n.by, min(ids[group.y], n.rows - 1)), column, n.cols, w);
    for (uint i = 0; i < 8; i++)
        if (column + i < n.cols) out[ulong(group.y) * n.cols + column + i] = T(w[i]);
}

#define GATHER(NAME, F, T) \
    kernel void NAME(device const uchar *data [[buffer(0)]], device const uchar *scales [[buffer(1)]], \
                     device const uchar *biases [[buffer(2)]], device const uint *ids [[buffer(3)]], device T *out [[buffer(4)]], \
                     constant Matmul &n [[buffer(5)]], threadgroup float *shared SHARED, \
                     uint3 group [[threadgroup_position_in_grid]], uint at [[thread_index_in_threadgroup]]) { \
        gather_rows<F, T>(data, scales, biases, ids, out, n, group, at); \
    }
