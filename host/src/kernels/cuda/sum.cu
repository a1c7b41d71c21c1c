// A sum over GPUs that see each other's memory, for the few numbers of a token: each writes its own into the others' memory, every four
// bytes with the number of the sum beside them, and so whoever waits for numbers sees from themselves that they have come. Nothing else is
// said. A block counts its sums in device memory, so that a recorded step can be replayed; what comes for the next sum has a place of its
// own, and nobody is further ahead. Every GPU adds in the order of the ranks: all have the same bits.
#include "floats.cuh"
#include "tiles.cuh"

namespace {

constexpr uint32_t MOST_RANKS = 8, MOST_BLOCKS = 256, THREADS = 128;
constexpr uint32_t DATA = 4096; // behind the blocks' counts

// Bytes as Rust writes them (sum.rs).
struct Args {
    const uint4 *x;
    uint4 *y;              // may be x
    const uint4 *residual; // is added too; or none
    float *squares;        // of what comes out, summed over each 16 numbers; or none
    uint64_t bases[MOST_RANKS];
    uint32_t vectors, ranks, rank, unused;
};

__device__ void say(uint4 *to, uint32_t a, uint32_t b, uint32_t epoch) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(epoch), "r"(b), "r"(epoch) : "memory");
}

__device__ uint64_t now() {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
}

__device__ uint2 heard(const uint4 *from, uint32_t epoch) {
    const uint64_t since = now();
    while (true) {
        uint4 said;
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(said.x), "=r"(said.y), "=r"(said.z), "=r"(said.w) : "l"(from) : "memory");
        if (said.y == epoch && said.w == epoch) return make_uint2(said.x, said.z);
        // A rank may be loading its kernels; one that has died never comes.
        if (now() - since > 60000000000ull) __trap();
    }
}

template <typename T> __device__ void sum(const Args &args) {
    let_next_start();
    wait_for_previous();
    constexpr int EACH = 16 / sizeof(T);
    uint32_t *epochs = (uint32_t *)args.bases[args.rank];
    const uint32_t epoch = epochs[blockIdx.x] + 1, at = blockIdx.x * THREADS + threadIdx.x;
    // Of a rank's numbers in another's memory.
    auto place = [&](uint32_t whose, uint32_t whom) {
        const size_t stretch = (size_t((epoch & 1) * MOST_BLOCKS + blockIdx.x) * args.ranks + whom) * THREADS + threadIdx.x;
        return (uint4 *)(args.bases[whose] + DATA) + 2 * stretch;
    };
    const bool mine = at < args.vectors;
    float square = 0;
    if (mine) {
        const uint4 own = args.x[at];
        for (uint32_t rank = 0; rank < args.ranks; rank++) {
            if (rank == args.rank) continue;
            uint4 *to = place(rank, args.rank);
            say(to, own.x, own.y, epoch), say(to + 1, own.z, own.w, epoch);
        }
        const uint4 residual = args.residual ? args.residual[at] : make_uint4(0, 0, 0, 0);
        float total[EACH];
        for (uint32_t rank = 0; rank < args.ranks; rank++) {
            uint4 part = own;
            if (rank != args.rank) {
                const uint4 *from = place(args.rank, rank);
                const uint2 low = heard(from, epoch), high = heard(from + 1, epoch);
                part = make_uint4(low.x, low.y, high.x, high.y);
            }
            const T *numbers = (const T *)&part;
#pragma unroll
            for (int i = 0; i < EACH; i++) total[i] = rank == 0 ? wide(numbers[i]) : total[i] + wide(numbers[i]);
        }
        uint4 result;
        T *numbers = (T *)&result;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            if (args.residual) total[i] += wide(((const T *)&residual)[i]);
            numbers[i] = narrow<T>(total[i]);
            square += wide(numbers[i]) * wide(numbers[i]);
        }
        args.y[at] = result;
    }
    if (args.squares && EACH == 8) {
        square += __shfl_xor_sync(~0u, square, 1);
        if (mine && at % 2 == 0) args.squares[at / 2] = square;
    }
    __syncthreads();
    if (threadIdx.x == 0) epochs[blockIdx.x] = epoch;
}

}  // namespace

#define SUM(name, T) \
    extern "C" __global__ void __launch_bounds__(THREADS) sum_##name(const __grid_constant__ Args args) { sum<T>(args); }
SUM(f32, float)
SUM(f16, __half)
SUM(bf16, __nv_bfloat16)
