// What a step needs beside its heavy ops: rotary angles, rows joining a cache, the largest of a row. Everything that changes from step to
// step (positions, ids) is read from device memory, so that a recorded step can be replayed with other values there.

#include "floats.cuh"
#include "tiles.cuh"
#include <cstdint>

namespace {

// x and y [tokens, heads, head_dim]: `dims` lanes from `first` on turn, pair by pair; the others are copied. A block is one token's head.
template <typename T>
__device__ void rope(const T *x, const uint32_t *positions, const float *frequencies, T *y, uint32_t heads, uint32_t head_dim,
                     uint32_t dims, uint32_t first, uint32_t neighbours, uint32_t every, float amplitude, float sign) {
    const uint32_t token = blockIdx.x / heads;
    const uint32_t position = positions[token] / every * every;
    const size_t row = (size_t)blockIdx.x * head_dim;
    const uint32_t half = dims / 2;
    for (uint32_t i = threadIdx.x; i < half; i += blockDim.x) {
        double sine, cosine;
        sincos((double)(float)position * (double)frequencies[i], &sine, &cosine);
        const float c = (float)(cosine * (double)amplitude), s = (float)(sine * (double)amplitude) * sign;
        const size_t a = row + first + (neighbours ? 2 * i : i), b = neighbours ? a + 1 : a + half;
        const float p = wide(x[a]), q = wide(x[b]);
        // Rounded product by product, as the same formula is on the CPU.
        y[a] = narrow<T>(__fsub_rn(__fmul_rn(p, c), __fmul_rn(q, s)));
        y[b] = narrow<T>(__fadd_rn(__fmul_rn(q, c), __fmul_rn(p, s)));
    }
    for (uint32_t i = threadIdx.x; i < head_dim - dims; i += blockDim.x) {
        const size_t at = row + (i < first ? i : i + dims);
        y[at] = x[at];
    }
}

// Rows [tokens, width] go to the places of their positions in a cache [capacity, width] whose first entry has the position `origin`.
template <typename T>
__device__ void append(const T *rows, const uint32_t *positions, T *cache, uint32_t width, uint32_t origin, uint32_t capacity) {
    const uint32_t place = positions[blockIdx.y] - origin;
    const uint32_t lane = blockIdx.x * blockDim.x + threadIdx.x;
    if (lane < width && place < capacity) cache[(size_t)place * width + lane] = rows[(size_t)blockIdx.y * width + lane];
}

// The greater score first, the lower index among equals.
__device__ bool before(float a, uint32_t i, float b, uint32_t j) { return a > b || (a == b && i < j); }

// A row of scores, looked at in part: its largest, where that lies, the sum of e^(x - largest), and whether anything is no score.
struct Top {
    float largest, sum;
    uint32_t index, broken;
};

__device__ Top join(Top a, Top b) {
    const bool first = before(a.largest, a.index, b.largest, b.index);
    const float largest = first ? a.largest : b.largest;
    const float sum = (a.sum > 0.0f ? a.sum * expf(a.largest - largest) : 0.0f) + (b.sum > 0.0f ? b.sum * expf(b.largest - largest) : 0.0f);
    return {largest, sum, first ? a.index : b.index, a.broken | b.broken};
}

__device__ Top join_block(Top top) {
    __shared__ Top warps[32];
    for (int step = 16; step > 0; step /= 2) {
        Top other = {__shfl_xor_sync(~0u, top.largest, step), __shfl_xor_sync(~0u, top.sum, step),
                     __shfl_xor_sync(~0u, top.index, step), __shfl_xor_sync(~0u, top.broken, step)};
        top = join(top, other);
    }
    const uint32_t warp = threadIdx.x / 32, count = blockDim.x / 32;
    if (threadIdx.x % 32 == 0) warps[warp] = top;
    __syncthreads();
    if (threadIdx.x == 0)
        for (uint32_t i = 1; i < count; i++) top = join(top, warps[i]);
    return top;
}

__device__ Top nothing() { return {-INFINITY, 0.0f, UINT32_MAX, 0}; }

} // namespace

#define ROPE(name, T)                                                                                                                    \
    extern "C" __global__ void rope_##name(const T *x, const uint32_t *positions, const float *frequencies, T *y, uint32_t heads,       \
                                           uint32_t head_dim, uint32_t dims, uint32_t first, uint32_t neighbours, uint32_t every,       \
                                           float amplitude, float sign) {                                                               \
        rope<T>(x, positions, frequencies, y, heads, head_dim, dims, first, neighbours, every, amplitude, sign);                        \
    }                                                                                                                                    \
    extern "C" __global__ void append_##name(const T *rows, const uint32_t *positions, T *cache, uint32_t width, uint32_t origin,       \
                                             uint32_t capacity) {                                                                       \
        append<T>(rows, positions, cache, width, origin, capacity);                                                                     \
    }
ROPE(f32, float)
ROPE(f16, __half)
ROPE(bf16, __nv_bfloat16)

// logits [rows, width] -> parts [rows, gridDim.x]: what each block saw of its row; and the logits to `kept`, in f32.
template <typename T> __device__ void look(const T *logits, float *kept, Top *parts, uint32_t width) {
    const T *row = logits + (size_t)blockIdx.y * width;
    Top top = nothing();
    let_next_start();
    wait_for_previous();
#pragma unroll 4
    for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < width; i += gridDim.x * blockDim.x) {
        const float x = wide(row[i]);
        kept[(size_t)blockIdx.y * width + i] = x;
        if (!(x < INFINITY)) top.broken = 1;
        else if (x > -INFINITY) top = join(top, {x, 1.0f, i, 0});
    }
    top = join_block(top);
    if (threadIdx.x == 0) parts[blockIdx.y * gridDim.x + blockIdx.x] = top;
}
extern "C" __global__ void look_f32(const float *logits, float *kept, Top *parts, uint32_t width) { look(logits, kept, parts, width); }
extern "C" __global__ void look_f16(const __half *logits, float *kept, Top *parts, uint32_t width) { look(logits, kept, parts, width); }
extern "C" __global__ void look_bf16(const __nv_bfloat16 *logits, float *kept, Top *parts, uint32_t width) { look(logits, kept, parts, width); }

// parts [rows, count] -> the chosen ids [rows], where the next step reads them, and id, log-probability and soundness, to `told` [rows, 3] and
// in the host's memory to `heard` [2, rows, 3], by whether the position is odd; positions move on by one.
extern "C" __global__ void choose_top(const Top *parts, uint32_t *ids, uint32_t *positions, uint32_t *told, uint32_t *heard, uint32_t count) {
    Top top = nothing();
    wait_for_previous();
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) top = join(top, parts[blockIdx.x * count + i]);
    top = join_block(top);
    if (threadIdx.x == 0) {
        const bool sound = !top.broken && top.sum > 0.0f;
        ids[blockIdx.x] = sound ? top.index : 0;
        const uint32_t position = positions[blockIdx.x]++;
        uint32_t *const both[2] = {told + 3 * blockIdx.x, heard + 3 * (position % 2 * gridDim.x + blockIdx.x)};
        for (uint32_t *out : both) out[0] = top.index, out[1] = __float_as_uint(-logf(top.sum)), out[2] = sound;
    }
}

// scores [rows, width] -> the k largest of each row, the largest first, and their indices. A block is a row, which lies in shared memory.
extern "C" __global__ void topk(const float *scores, float *values, uint32_t *indices, uint32_t width, uint32_t k) {
    extern __shared__ float row[];
    __shared__ float best[32];
    __shared__ uint32_t at[32];
    for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) row[i] = scores[(size_t)blockIdx.x * width + i];
    __syncthreads();
    float last = INFINITY;
    uint32_t last_at = 0;
    for (uint32_t rank = 0; rank < k; rank++) {
        float most = -INFINITY;
        uint32_t index = UINT32_MAX;
        for (uint32_t i = threadIdx.x; i < width; i += blockDim.x) {
            const bool open = rank == 0 || before(last, last_at, row[i], i);
            if (open && (index == UINT32_MAX || before(row[i], i, most, index))) most = row[i], index = i;
        }
        for (int step = 16; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(~0u, most, step);
            const uint32_t place = __shfl_xor_sync(~0u, index, step);
            if (place != UINT32_MAX && (index == UINT32_MAX || before(other, place, most, index))) most = other, index = place;
        }
        if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = most, at[threadIdx.x / 32] = index;
        __syncthreads();
        last = best[0], last_at = at[0];
        for (uint32_t i = 1; i < blockDim.x / 32; i++)
            if (at[i] != UINT32_MAX && (last_at == UINT32_MAX || before(best[i], at[i], last, last_at))) last = best[i], last_at = at[i];
        if (threadIdx.x == 0) values[(size_t)blockIdx.x * k + rank] = last, indices[(size_t)blockIdx.x * k + rank] = min(last_at, width - 1);
        __syncthreads();
    }
}
