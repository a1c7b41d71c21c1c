// A chain of small ops on rows, such as a router's between its logits and the experts' weights, in one launch: a warp takes one row through
// all of them, in shared memory. What each op gives is rounded as the op by itself would round it, and written out as well.
#include "floats.cuh"
#include "tiles.cuh"

enum Op { SOFTMAX = 0, SIGMOID = 1, TOPK = 2, GATHER = 3, SUM = 4, AFFINE = 5, ADD = 6, SUB = 7, MUL = 8, DIV = 9 };

// Bytes as Rust writes them (rows.rs).
struct Slot {
    void *at;       // [rows, width], or [width] if `shared`
    uint32_t width, type; // 0: f32, 1: bf16, 2: u32
    uint32_t start; // in shared memory
    uint32_t given, shared, unused;
};
struct Step {
    uint32_t op, a, b, y, indices, k;
    float scale, offset;
};
struct Rows {
    Slot slots[16];
    Step steps[12];
    uint32_t slot_count, step_count;
};

__device__ float rounded(const Slot &s, float x) { return s.type == 1 ? wide(narrow<__nv_bfloat16>(x)) : x; }

__device__ float over_warp(float v, bool most) {
#pragma unroll
    for (int i = 16; i > 0; i /= 2) {
        const float other = __shfl_xor_sync(~0u, v, i);
        v = most ? fmaxf(v, other) : v + other;
    }
    return v;
}

extern "C" __global__ void __launch_bounds__(32) rows(const __grid_constant__ Rows a) {
    extern __shared__ float numbers[];
    const uint32_t row = blockIdx.x, lane = threadIdx.x;
    let_next_start();
    wait_for_previous();
    for (uint32_t i = 0; i < a.slot_count; i++) {
        const Slot &s = a.slots[i];
        if (!s.given) continue;
        const size_t from = s.shared ? 0 : size_t(row) * s.width;
        for (uint32_t j = lane; j < s.width; j += 32)
            numbers[s.start + j] = s.type == 0 ? static_cast<const float *>(s.at)[from + j] : s.type == 1 ? wide(static_cast<const __nv_bfloat16 *>(s.at)[from + j]) : float(static_cast<const uint32_t *>(s.at)[from + j]);
    }
    __syncwarp();
    for (uint32_t n = 0; n < a.step_count; n++) {
        const Step &step = a.steps[n];
        const Slot &of = a.slots[step.a], &to = a.slots[step.y], &with = a.slots[step.b];
        const float *x = numbers + of.start, *z = numbers + with.start;
        float *y = numbers + to.start;
        if (step.op == SOFTMAX) {
            float most = -INFINITY, sum = 0;
            for (uint32_t j = lane; j < of.width; j += 32) most = fmaxf(most, x[j]);
            most = over_warp(most, true);
            for (uint32_t j = lane; j < of.width; j += 32) sum += expf(x[j] - most);
            sum = over_warp(sum, false);
            for (uint32_t j = lane; j < of.width; j += 32) y[j] = rounded(to, expf(x[j] - most) / sum);
        } else if (step.op == TOPK) {
            float *places = numbers + a.slots[step.indices].start;
            float last = INFINITY;
            int last_at = -1;
            for (uint32_t rank = 0; rank < step.k; rank++) {
                float best = -INFINITY;
                int at = 0x7fffffff;
                for (uint32_t j = lane; j < of.width; j += 32) {
                    const float v = x[j];
                    // Behind the last one: smaller, or as large and further on.
                    const bool open = rank == 0 || v < last || (v == last && int(j) > last_at);
                    if (open && (v > best || at == 0x7fffffff)) best = v, at = j;
                }
#pragma unroll
                for (int i = 16; i > 0; i /= 2) {
                    const float v = __shfl_xor_sync(~0u, best, i);
                    const int j = __shfl_xor_sync(~0u, at, i);
                    if (j != 0x7fffffff && (at == 0x7fffffff || v > best || (v == best && j < at))) best = v, at = j;
                }
                last = best, last_at = at;
                if (lane == 0) y[rank] = best, places[rank] = float(min(at, int(of.width) - 1));
            }
            __syncwarp();
            const Slot &indices = a.slots[step.indices];
            for (uint32_t j = lane; j < step.k; j += 32) static_cast<uint32_t *>(indices.at)[size_t(row) * step.k + j] = uint32_t(places[j]);
        } else if (step.op == SUM) {
            float sum = 0;
            for (uint32_t j = lane; j < of.width; j += 32) sum += x[j];
            sum = over_warp(sum, false);
            if (lane == 0) y[0] = rounded(to, sum);
        } else {
            for (uint32_t j = lane; j < to.width; j += 32) {
                const float v = x[of.width == 1 ? 0 : j];
                const uint32_t other = with.width == 1 ? 0 : j;
                float out = 0;
                switch (step.op) {
                case SIGMOID: out = 1.f / (1.f + expf(-v)); break;
                case GATHER: out = x[min(uint32_t(z[j]), of.width - 1)]; break;
                case AFFINE: out = v * step.scale + step.offset; break;
                case ADD: out = v + z[other]; break;
                case SUB: out = v - z[other]; break;
                case MUL: out = v * z[other]; break;
                case DIV: out = v / z[other]; break;
                }
                y[j] = rounded(to, out);
            }
        }
        __syncwarp();
        for (uint32_t j = lane; j < to.width; j += 32) {
            const size_t at = size_t(row) * to.width + j;
            if (to.type == 0) static_cast<float *>(to.at)[at] = y[j];
            else static_cast<__nv_bfloat16 *>(to.at)[at] = narrow<__nv_bfloat16>(y[j]);
        }
    }
}
