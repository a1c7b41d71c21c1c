// A sum over GPUs that see each other's memory, for the few numbers of a token: each lays its own out, says so to the others, and reads
// theirs. A block minds its own stretch alone, in places of its own, so that blocks need not wait for each other; it counts its sums in
// device memory, so that a recorded step can be replayed. Every GPU adds in the order of the ranks: all have the same bits.

#include "floats.cuh"
#include <cstdint>

namespace {

constexpr uint32_t MOST_RANKS = 8, MOST_BLOCKS = 64, STRETCH = 8192;
constexpr uint32_t EPOCHS = MOST_BLOCKS * MOST_RANKS * 4, DATA = 4096;

struct Args {
    uint64_t x;
    uint64_t bases[MOST_RANKS];
    uint32_t vectors, ranks, rank, unused;
};

__device__ void say(uint32_t *flag, uint32_t epoch) { asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory"); }

__device__ uint32_t heard(const uint32_t *flag) {
    uint32_t epoch;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(epoch) : "l"(flag) : "memory");
    return epoch;
}

__device__ uint64_t now() {
    uint64_t nanoseconds;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(nanoseconds));
    return nanoseconds;
}

template <typename T> __device__ void sum(const Args &args) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    constexpr int EACH = 16 / sizeof(T);
    char *own = (char *)args.bases[args.rank];
    uint32_t *epochs = (uint32_t *)(own + EPOCHS);
    const uint32_t epoch = epochs[blockIdx.x] + 1;
    const size_t place = DATA + (size_t)((epoch & 1) * MOST_BLOCKS + blockIdx.x) * STRETCH + (size_t)threadIdx.x * 16;
    const uint32_t at = blockIdx.x * blockDim.x + threadIdx.x;
    uint4 *x = (uint4 *)args.x + at;
    const bool mine = at < args.vectors;
    if (mine) *(uint4 *)(own + place) = *x;
    __syncthreads();
    const uint32_t other = threadIdx.x;
    if (other < args.ranks && other != args.rank) {
        __threadfence_system();
        say((uint32_t *)args.bases[other] + blockIdx.x * MOST_RANKS + args.rank, epoch);
        const uint32_t *flag = (const uint32_t *)own + blockIdx.x * MOST_RANKS + other;
        const uint64_t since = now();
        // A rank may be loading its kernels; one that has died never comes.
        while ((int32_t)(heard(flag) - epoch) < 0) {
            if (now() - since > 60000000000ull) __trap();
        }
    }
    __syncthreads();
    if (mine) {
        float total[EACH];
#pragma unroll
        for (int i = 0; i < EACH; i++) total[i] = 0.0f;
        for (uint32_t rank = 0; rank < args.ranks; rank++) {
            const volatile uint32_t *words = (const volatile uint32_t *)((const char *)args.bases[rank] + place);
            uint4 part = {0, 0, 0, 0};
            asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(part.x), "=r"(part.y), "=r"(part.z), "=r"(part.w)
                         : "l"(words)
                         : "memory");
            const T *numbers = (const T *)&part;
#pragma unroll
            for (int i = 0; i < EACH; i++) total[i] = rank == 0 ? wide(numbers[i]) : total[i] + wide(numbers[i]);
        }
        uint4 result;
        T *numbers = (T *)&result;
#pragma unroll
        for (int i = 0; i < EACH; i++) numbers[i] = narrow<T>(total[i]);
        *x = result;
    }
    if (threadIdx.x == 0) epochs[blockIdx.x] = epoch;
}

}  // namespace

#define SUM(name, T) \
    extern "C" __global__ void __launch_bounds__(512) sum_##name(const Args args) { sum<T>(args); }
SUM(f32, float)
SUM(f16, __half)
SUM(bf16, __nv_bfloat16)
