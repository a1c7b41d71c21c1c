// silu(gate) * up, a thread for each number.
#include <metal_stdlib>
using namespace metal;

kernel void gate_f32(device const float *gate [[buffer(0)]], device const float *up [[buffer(1)]], device float *y [[buffer(2)]],
                     constant uint &n [[buffer(3)]], uint i [[thread_position_in_grid]]) {
    if (i < n) {
        y[i] = gate[i] / (1.0f + exp(-gate[i])) * up[i];
    }
}
