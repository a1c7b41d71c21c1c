// Keys and values of a cache in groups of a few bits. A row of one head is `dim` numbers as a little-endian stream of bits, and behind them
// a scale and a bias for each group, f32: number = scale * q + bias. A thread has eight neighbours, which are as many bytes as a number
// has bits.
#include "floats.cuh"
#include <cstdint>

namespace {

// Bytes as Rust writes them (pack.rs).
struct Packing {
    const void *from[2]; // of each blockIdx.y: keys and values
    void *to[2];
    const uint32_t *positions; // of the rows, or none: they follow each other from `first` on
    uint32_t rows, heads, dim, bits, group, words; // words of a packed row of one head
    uint32_t first, origin, capacity, last;        // `last`: which position is the last one
};

// Places of eight numbers: the row, the head in it, and the numbers in that.
struct Place {
    uint32_t row, head, at;
    __device__ Place(const Packing &p) {
        const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
        const uint32_t pieces = p.dim / 8;
        at = uint32_t(i % pieces) * 8, head = uint32_t(i / pieces % p.heads), row = uint32_t(i / pieces / p.heads);
    }
};

// With mlx's formulas: the number that is largest without its sign comes out exactly, unless it is nearer to 0 than a step.
template <typename T> __device__ void pack(const Packing &p) {
    const Place place(p);
    // Threads of a group shuffle, so none leaves before.
    const bool there = place.row < p.rows;
    const uint32_t row = there ? place.row : 0;
    const uint32_t to = p.positions ? p.positions[row] - p.origin : p.first + row;
    const T *from = (const T *)p.from[blockIdx.y] + (size_t(row) * p.heads + place.head) * p.dim + place.at;
    float x[8], low = INFINITY, high = -INFINITY;
    for (int i = 0; i < 8; i++) x[i] = wide(from[i]), low = fminf(low, x[i]), high = fmaxf(high, x[i]);
    for (uint32_t step = p.group / 16; step > 0; step /= 2) {
        low = fminf(low, __shfl_xor_sync(~0u, low, step));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, step));
    }
    const float top = float((1u << p.bits) - 1), step = fmaxf(__fdiv_rn(__fsub_rn(high, low), top), 1e-7f);
    const bool from_low = fabsf(low) > fabsf(high);
    const float edge = from_low ? low : high;
    float scale = from_low ? step : -step, bias = 0.f;
    const float zero = rintf(__fdiv_rn(edge, scale));
    if (zero != 0.f) scale = __fdiv_rn(edge, zero), bias = edge;
    uint64_t bits = 0;
    for (int i = 0; i < 8; i++) {
        const float q = fminf(fmaxf(rintf(__fdiv_rn(__fsub_rn(x[i], bias), scale)), 0.f), top);
        bits |= uint64_t(q) << (i * p.bits);
    }
    if (!there || to >= p.capacity) return;
    uint32_t *packed = (uint32_t *)p.to[blockIdx.y] + (size_t(to) * p.heads + place.head) * p.words;
    uint8_t *bytes = (uint8_t *)packed + place.at / 8 * p.bits;
    for (uint32_t i = 0; i < p.bits; i++) bytes[i] = uint8_t(bits >> (8 * i));
    if (place.at % p.group == 0) {
        float *scales = (float *)(packed + p.dim * p.bits / 32) + place.at / p.group * 2;
        scales[0] = scale, scales[1] = bias;
    }
}

// All rows, or those up to the last position's.
template <typename T> __device__ void unpack(const Packing &p) {
    const Place place(p);
    const uint32_t rows = p.positions ? min(p.rows, p.positions[p.last] - p.origin + 1) : p.rows;
    if (place.row >= rows) return;
    const uint32_t *packed = (const uint32_t *)p.from[blockIdx.y] + (size_t(place.row) * p.heads + place.head) * p.words;
    const float *scales = (const float *)(packed + p.dim * p.bits / 32) + place.at / p.group * 2;
    const float scale = scales[0], bias = scales[1];
    const uint32_t bit = place.at * p.bits, word = bit / 32, shift = bit % 32;
    uint64_t bits = packed[word];
    if (shift + 8 * p.bits > 32) bits |= uint64_t(packed[word + 1]) << 32;
    bits >>= shift;
    if (shift + 8 * p.bits > 64) bits |= uint64_t(packed[word + 2]) << (64 - shift);
    T *to = (T *)p.to[blockIdx.y] + (size_t(place.row) * p.heads + place.head) * p.dim + place.at;
    alignas(16) T y[8];
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = narrow<T>(__fadd_rn(__fmul_rn(float(uint32_t(bits >> (i * p.bits)) & ((1u << p.bits) - 1)), scale), bias));
#pragma unroll
    for (int i = 0; i < int(sizeof(y) / 16); i++) reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(y)[i];
}

} // namespace

extern "C" __global__ void pack_f32(const Packing p) { pack<float>(p); }
extern "C" __global__ void pack_f16(const Packing p) { pack<__half>(p); }
extern "C" __global__ void pack_bf16(const Packing p) { pack<__nv_bfloat16>(p); }
extern "C" __global__ void unpack_f32(const Packing p) { unpack<float>(p); }
extern "C" __global__ void unpack_f16(const Packing p) { unpack<__half>(p); }
extern "C" __global__ void unpack_bf16(const Packing p) { unpack<__nv_bfloat16>(p); }
