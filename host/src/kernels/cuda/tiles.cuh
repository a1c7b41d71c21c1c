// The layout of packed weights on the GPU, and how a warp unpacks them into operands of the tensor cores.
//
// A matrix [rows, cols] is cut into tiles of 16 rows x 128 columns, filled up with zeros at the edges, one row of tiles after another. A
// tile lies as the warp reads it: lane (g, c), g = lane / 4, c = lane % 4, holds rows g and g + 8, and of each 32 columns j the eight
// from 32 j + 8 c on. That is the A operand of mma.m16n8k16 with its k permuted, and the activations' 16 bytes at the same columns are
// the B operand, so neither side is shuffled or goes through shared memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

constexpr int TILE_ROWS = 16, TILE_COLS = 128;

// How weights are packed in a tile. Two, three and four bits are stored as NIBBLE, more as BYTE. PLAIN ones are bf16 and in no tiles, but row
// by row as a checkpoint has them, so that cuBLAS can read them too.
// FP8 is E4M3 in the places of BYTE, with a scale for each group that is the sum of two bf16. SIX, at most 64 in the places of BYTE, and NV4,
// E2M1 in those of MX4, have a bf16 scale for each 16, by which weights are multiplied before they are rounded to bf16: a group is then
// the whole tile.
enum Packing { NIBBLE = 0, BYTE = 1, MX4 = 2, PLAIN = 3, FP8 = 4, SIX = 5, NV4 = 6 };
template <int P> constexpr bool scaled_first = P == SIX || P == NV4;

// 16-byte pieces of a tile that one lane holds of one of its two rows.
template <int P> __device__ __host__ constexpr int pieces() { return P == PLAIN ? 4 : P == BYTE || P == FP8 || P == SIX ? 2 : 1; }

// Bytes of scales of a tile: bf16 or f16 pairs of scale and bias for each row and group, or one E8M0 byte.
template <int P, int GROUP> __device__ __host__ constexpr int scale_bytes() {
    return P == PLAIN ? 0 : scaled_first<P> ? TILE_ROWS * 16 : TILE_ROWS * (TILE_COLS / GROUP) * (P == MX4 ? 1 : 4);
}

// Lets the next kernel of the stream start loading its weights; its `wait` below holds it until this one has finished.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Nothing that another kernel wrote may be read before this.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// d += a b, a 16 x 16, b 16 x 8, both bf16.
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Copies to shared memory that go on while the thread does something else; they are waited for in the order of `copies_end`.
__device__ __forceinline__ void copy16(uint32_t to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// Zeros unless `there`.
__device__ __forceinline__ void copy16_if(uint32_t to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void copy4(uint32_t to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy8(uint32_t to, const void *from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the last N.
template <int N> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ __forceinline__ uint32_t word_of(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// (w & mask) | bits in one instruction.
__device__ __forceinline__ uint32_t masked_or(uint32_t w, uint32_t mask, uint32_t bits) {
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(w), "r"(mask), "r"(bits));
    return r;
}

// Four pairs of bf16 out of eight nibbles, each 128 above its value; pair p is columns 2 p and 2 p + 1.
__device__ __forceinline__ void nibbles(uint32_t w, uint32_t (&out)[4]) {
#pragma unroll
    for (int p = 0; p < 4; p++) out[p] = masked_or(w >> (4 * p), 0x000F000Fu, 0x43004300u);
}

// Four bytes: low halves 128 above their value, high halves 2048 above 16 times theirs; [low 01, high 01, low 23, high 23].
__device__ __forceinline__ void bytes(uint32_t w, uint32_t (&out)[4]) {
    out[0] = masked_or(w, 0x000F000Fu, 0x43004300u);
    out[1] = masked_or(w >> 4, 0x000F000Fu, 0x45004500u);
    out[2] = masked_or(w >> 8, 0x000F000Fu, 0x43004300u);
    out[3] = masked_or(w >> 12, 0x000F000Fu, 0x45004500u);
}

// What `nibbles` and `bytes` add to every weight.
template <int P> __device__ constexpr float surplus() { return P == NIBBLE ? 128.f : P == BYTE ? 2176.f : 0.f; }

// Four pairs of bf16 out of eight E2M1 numbers. Sign and magnitude of a number lie such that one shift puts them at a bf16's sign and at
// the two lowest exponent bits and the highest mantissa bit; the exponent is then off by 126, which a multiplication repairs exactly.
__device__ __forceinline__ void e2m1(uint32_t w, uint32_t (&out)[4]) {
    out[0] = w & 0x81C081C0u;
    out[1] = (w << 3) & 0x81C081C0u;
    out[2] = (w << 6) & 0x81C081C0u;
    out[3] = ((w << 1) & 0x80008000u) | ((w >> 5) & 0x01400140u) | ((w >> 3) & 0x00800080u);
#pragma unroll
    for (int p = 0; p < 4; p++) asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(out[p]) : "r"(0x7E807E80u));
}

// Two pairs of bf16 out of four E4M3 numbers, in columns 0 2 1 3 of their word. As above, the exponent is off by 120.
__device__ __forceinline__ void e4m3(uint32_t w, uint32_t (&out)[2]) {
#pragma unroll
    for (int p = 0; p < 2; p++) {
        const uint32_t t = w >> (8 * p);
        out[p] = masked_or(t << 8, 0x80008000u, (t << 4) & 0x07F007F0u);
        asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(out[p]) : "r"(0x7B807B80u));
    }
}

// Two pairs of bf16 out of four bytes as above, less 32 and times a pair of scales.
__device__ __forceinline__ void sixes(uint32_t w, uint32_t scale, uint32_t (&out)[2]) {
#pragma unroll
    for (int p = 0; p < 2; p++) {
        out[p] = masked_or(w >> (8 * p), 0x007F007Fu, 0x43004300u);
        asm("add.rn.bf16x2 %0, %0, %1;" : "+r"(out[p]) : "r"(0xC320C320u)); // -160
        asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(out[p]) : "r"(scale));
    }
}

// Four pairs of bf16 out of eight E2M1 numbers, times a pair of scales that are 2^110 times what they are; what comes out is 2^16 too small.
constexpr float NV4_LESS = 65536.f;
__device__ __forceinline__ void e2m1_scaled(uint32_t w, uint32_t scale, uint32_t (&out)[4]) {
    out[0] = w & 0x81C081C0u;
    out[1] = (w << 3) & 0x81C081C0u;
    out[2] = (w << 6) & 0x81C081C0u;
    out[3] = ((w << 1) & 0x80008000u) | ((w >> 5) & 0x01400140u) | ((w >> 3) & 0x00800080u);
#pragma unroll
    for (int p = 0; p < 4; p++) asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(out[p]) : "r"(scale));
}

// A bf16 twice, from the low or high half of a word.
__device__ __forceinline__ uint32_t twice(uint32_t w, int high) { return __byte_perm(w, w, high ? 0x3232 : 0x1010); }

// A nibble of E2M1 at its place in half a word, as `e2m1` finds it: pair p of four.
__device__ __forceinline__ uint32_t e2m1_bits(uint32_t n, int p) {
    uint32_t s = n >> 3, m = n & 7;
    if (p < 3) return (s << (15 - 3 * p)) | (m << (6 - 3 * p));
    return (s << 14) | ((m >> 2) << 13) | ((m & 1) << 11) | (((m >> 1) & 1) << 10);
}

__device__ __forceinline__ float e8m0(uint32_t e) { return __uint_as_float(e == 0 ? 0x00400000u : e << 23); }

__device__ __forceinline__ float2 scale_and_bias(uint32_t w, bool half) {
    if (half) return __half22float2(*reinterpret_cast<__half2 *>(&w));
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xFFFF0000u));
}

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ uint32_t bf16_pair(float a, float b) {
    __nv_bfloat162 p = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t *>(&p);
}
