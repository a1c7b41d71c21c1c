// silu(gate) * up, a thread for each number.
extern "C" __global__ void gate_f32(const float *gate, const float *up, float *y, unsigned int n) {
    unsigned int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        y[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
    }
}
