// RMSNorm and LayerNorm of rows, in f32, with what is to be added to the rows first; and what joins gate and up.
#include "packed.cuh"

// x [rows, dim] (+ residual, kept in `sum`) -> y. Rows of up to 1024 numbers: a warp each; up to 4096 and 16384: a block each.
struct Norm {
    const __nv_bfloat16 *x, *residual;
    __nv_bfloat16 *sum, *y;
    const float *weight, *bias;
    int rows, dim, centred;
    float eps;
};

template <bool WARP> __device__ __forceinline__ float total(float v, float *shared) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) v += __shfl_xor_sync(~0u, v, i);
    if (WARP) return v;
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
    __syncthreads();
    v = 0;
    for (int i = 0; i < blockDim.x / 32; i++) v += shared[i];
    return v;
}

__device__ __forceinline__ void widen(const uint4 &v, float (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) out[2 * i] = __uint_as_float(word_of(v, i) << 16), out[2 * i + 1] = __uint_as_float(word_of(v, i) & 0xFFFF0000u);
}
__device__ __forceinline__ uint4 narrow(const float (&v)[8]) {
    return make_uint4(bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7]));
}

// A thread has eight neighbours, up to MOST times. The width is a multiple of eight.
template <bool WARP, int MOST> __device__ __forceinline__ void norm(const Norm &a) {
    __shared__ float shared[32];
    const int row = WARP ? blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32 : blockIdx.x;
    const int start = (WARP ? threadIdx.x % 32 : threadIdx.x) * 8, step = (WARP ? 32 : blockDim.x) * 8;
    let_next_start();
    const size_t at = size_t(row) * a.dim;
    float v[MOST][8], w[MOST][8], sum = 0, squares = 0;
#pragma unroll
    for (int k = 0; k < MOST; k++)
#pragma unroll
        for (int l = 0; l < 8; l += 4)
            if (a.weight && start + k * step < a.dim) *reinterpret_cast<float4 *>(&w[k][l]) = *reinterpret_cast<const float4 *>(a.weight + start + k * step + l);
    wait_for_previous();
    if (row >= a.rows) return;
#pragma unroll
    for (int k = 0; k < MOST; k++) {
        const int i = start + k * step;
        if (i < a.dim) {
            widen(*reinterpret_cast<const uint4 *>(a.x + at + i), v[k]);
            if (a.residual) {
                float other[8];
                widen(*reinterpret_cast<const uint4 *>(a.residual + at + i), other);
#pragma unroll
                for (int l = 0; l < 8; l++) v[k][l] += other[l];
                // Rounded as it is kept, so that this norm sees what the next layer adds to.
                const uint4 kept = narrow(v[k]);
                *reinterpret_cast<uint4 *>(a.sum + at + i) = kept;
                widen(kept, v[k]);
            }
#pragma unroll
            for (int l = 0; l < 8; l++) sum += v[k][l];
        }
    }
    const float mean = a.centred ? total<WARP>(sum, shared) / a.dim : 0.f;
#pragma unroll
    for (int k = 0; k < MOST; k++)
        if (start + k * step < a.dim)
#pragma unroll
            for (int l = 0; l < 8; l++) v[k][l] -= mean, squares += v[k][l] * v[k][l];
    const float scale = rsqrtf(total<WARP>(squares, shared) / a.dim + a.eps);
#pragma unroll
    for (int k = 0; k < MOST; k++) {
        const int i = start + k * step;
        if (i >= a.dim) continue;
#pragma unroll
        for (int l = 0; l < 8; l++) {
            v[k][l] *= scale;
            if (a.weight) v[k][l] *= w[k][l];
            if (a.bias) v[k][l] += a.bias[i + l];
        }
        *reinterpret_cast<uint4 *>(a.y + at + i) = narrow(v[k]);
    }
}

extern "C" __global__ void __launch_bounds__(256) norm_narrow(const __grid_constant__ Norm a) { norm<true, 4>(a); }
extern "C" __global__ void __launch_bounds__(512) norm_wide(const __grid_constant__ Norm a) { norm<false, 1>(a); }
extern "C" __global__ void __launch_bounds__(512) norm_widest(const __grid_constant__ Norm a) { norm<false, 4>(a); }

// Eight neighbours of n numbers a thread, which are read and written at once unless they are the last few.
template <typename Of> __device__ __forceinline__ void by_eights(const __nv_bfloat16 *a, const __nv_bfloat16 *b, __nv_bfloat16 *y, uint32_t n, Of of) {
    const uint64_t start = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    let_next_start();
    wait_for_previous();
    if (start + 8 <= n) {
        float p[8], q[8];
        widen(*reinterpret_cast<const uint4 *>(a + start), p);
        widen(*reinterpret_cast<const uint4 *>(b + start), q);
#pragma unroll
        for (int i = 0; i < 8; i++) p[i] = of(p[i], q[i]);
        *reinterpret_cast<uint4 *>(y + start) = narrow(p);
    } else {
        for (uint64_t i = start; i < n; i++) y[i] = __float2bfloat16(of(to_float(a[i]), to_float(b[i])));
    }
}

// What stands between the projections of a feed-forward block.
extern "C" __global__ void __launch_bounds__(256) join(const __nv_bfloat16 *gate, const __nv_bfloat16 *up, __nv_bfloat16 *y, uint32_t n, int kind, float alpha, float limit) {
    const Joint joint{kind, alpha, limit};
    by_eights(gate, up, y, n, [&](float gate, float up) { return joined(joint, gate, up); });
}

extern "C" __global__ void __launch_bounds__(256) add(const __nv_bfloat16 *a, const __nv_bfloat16 *b, __nv_bfloat16 *y, uint32_t n) {
    by_eights(a, b, y, n, [](float a, float b) { return a + b; });
}
