// A row of logits -> one token, drawn as the sampler of the CPU draws it (sampler.rs): bias and penalties, top-p, min-p, top-k,
// temperature, a number of Philox. One launch of blocks that wait for each other; each has a stretch of the vocabulary.
//
// Every filter keeps the first so many tokens in the order of their logits, so all of them together are one border: it is found digit by
// digit of the logits, with the counts and the masses of each digit's values, and nothing is sorted. Masses are whole numbers, whose sum
// does not depend on the order of its parts: the same seed gives the same tokens each time. Of the CPU's choice they are off by some
// 1e-13 of the whole, so that one token in about as many may be another.
#include <math_constants.h>
#include <stdint.h>

namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32, BINS = 2048, LEVELS = 3, MOST_BLOCKS = 256;
// Bits of a logit that each level looks at, and how far down they lie.
__host__ __device__ constexpr int bits(int level) { return level == 2 ? 10 : 11; }
__host__ __device__ constexpr int down(int level) { return level == 0 ? 21 : level == 1 ? 10 : 0; }
// What the most likely token weighs: 2^19 such fit into 64 bits.
constexpr double ONE = 17592186044416.0;

// As sample.rs has it.
struct Draw {
    double temp, top_p, min_p;
    uint64_t seed, drawn;
    const float *bias;
    // How often each token was seen, for the repetition, presence and frequency penalties; null for one that is off.
    const uint32_t *seen[3];
    float by[3];
    uint32_t top_k;
    // The same counts once each, and how many tokens back they look (0: all).
    uint32_t *tally[3];
    uint32_t window[3];
    uint32_t tallies;
    // The latest tokens, where a window must be left again, and how many tokens the text has.
    uint32_t *latest;
    uint32_t room, length;
};

struct Top {
    float logit;
    uint32_t id, broken;
};

// All zeros before a launch, and after it.
struct Board {
    unsigned long long mass[LEVELS][BINS];
    unsigned long long total;
    uint32_t count[LEVELS][BINS];
    uint32_t arrived, unused;
    // Written before it is read.
    double heavier[MOST_BLOCKS];
    uint32_t equal[MOST_BLOCKS];
    Top tops[MOST_BLOCKS];
};

// e^x for x <= 0, operation by operation as sampler/exponential.rs.
__device__ double exponential(double x) {
    const double round = 6755399441055744.0;
    const double high = __longlong_as_double(__double_as_longlong(0.693147180559945309417232121458) & ~0xffffffffll), low = 4.7493250390316726e-7;
    const double bounded = x < -708.0 ? -708.0 : x;
    const double shifted = __dadd_rn(__dmul_rn(bounded, 1.44269504088896340735992468100), round);
    const double exponent = __dsub_rn(shifted, round);
    const double r = __dsub_rn(__dsub_rn(bounded, __dmul_rn(exponent, high)), __dmul_rn(exponent, low));
    constexpr double series[14] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0, 1.0 / 40320.0, 1.0 / 5040.0,
                                   1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0};
    double sum = series[0];
#pragma unroll
    for (int i = 1; i < 14; i++) sum = __dadd_rn(__dmul_rn(sum, r), series[i]);
    const double power = __longlong_as_double((__double_as_longlong(shifted) + 1023) << 52);
    return x < -708.0 ? 0.0 : __dmul_rn(sum, power);
}

// The n-th number in [0, 1) of a seed, as sampler/random.rs.
__device__ double uniform(uint64_t seed, uint64_t n) {
    uint32_t c[4] = {uint32_t(n), uint32_t(n >> 32), 0, 0}, key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    for (int i = 0; i < 10; i++) {
        const uint64_t a = uint64_t(0xD2511F53u) * c[0], b = uint64_t(0xCD9E8D57u) * c[2];
        const uint32_t next[4] = {uint32_t(b >> 32) ^ c[1] ^ key[0], uint32_t(b), uint32_t(a >> 32) ^ c[3] ^ key[1], uint32_t(a)};
        for (int j = 0; j < 4; j++) c[j] = next[j];
        key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
    return double((uint64_t(c[0]) << 32 | c[1]) >> 11) * 0x1p-53;
}

// Ordered as the logits are; the two zeros are one.
__device__ uint32_t key_of(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

// A logit after bias and penalties.
__device__ float processed(const Draw &d, float x, uint32_t id) {
    if (d.bias) x = __fadd_rn(x, d.bias[id]);
    if (d.seen[0] && d.seen[0][id]) x = x < 0.0f ? __fmul_rn(x, d.by[0]) : __fdiv_rn(x, d.by[0]);
    if (d.seen[1] && d.seen[1][id]) x = __fsub_rn(x, d.by[1]);
    if (d.seen[2])
        if (const uint32_t count = d.seen[2][id]) x = __fsub_rn(x, __fmul_rn(d.by[2], float(count)));
    return x;
}

__device__ Top join(Top a, Top b) {
    const bool first = a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    return {first ? a.logit : b.logit, first ? a.id : b.id, a.broken | b.broken};
}

__device__ Top join_block(Top top) {
    __shared__ Top warps[WARPS];
    for (int step = 16; step > 0; step /= 2)
        top = join(top, {__shfl_xor_sync(~0u, top.logit, step), __shfl_xor_sync(~0u, top.id, step), __shfl_xor_sync(~0u, top.broken, step)});
    __syncthreads();
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = top;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) top = join(top, warps[i]);
    return top;
}

// The sum of what this thread and those before it have.
template <class T> __device__ T sum_until(T x, T *all = nullptr) {
    __shared__ T warps[WARPS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int step = 1; step < 32; step *= 2) {
        const T other = __shfl_up_sync(~0u, x, step);
        if (lane >= step) x += other;
    }
    __syncthreads();
    if (lane == 31) warps[warp] = x;
    __syncthreads();
    T before = 0, sum = 0;
    for (int i = 0; i < WARPS; i++) {
        if (i == warp) before = sum;
        sum += warps[i];
    }
    if (all) *all = sum;
    return before + x;
}

struct Border {
    // Tokens whose key begins with `key`, of which `above` ones and their mass `heavier` lie above.
    uint32_t key, above, found;
    unsigned long long heavier;
};

// The highest bin with which the tokens are `most`, or their mass is `need`.
__device__ void narrow(Border &border, const Board &board, int level, uint32_t most, unsigned long long need) {
    constexpr int EACH = BINS / THREADS;
    unsigned long long mass[EACH], own = 0;
    uint32_t count[EACH], owned = 0;
    for (int i = 0; i < EACH; i++) {
        const int bin = BINS - 1 - (threadIdx.x * EACH + i);
        own += mass[i] = __ldcg(&board.mass[level][bin]), owned += count[i] = __ldcg(&board.count[level][bin]);
    }
    unsigned long long heavier = border.heavier + sum_until(own) - own;
    uint32_t above = border.above + sum_until(owned) - owned;
    __shared__ Border found;
    if (threadIdx.x == 0) found = border, found.found = 0;
    __syncthreads();
    const bool before = above >= most || heavier >= need;
    for (int i = 0; i < EACH && !before; i++) {
        if (count[i] && (above + count[i] >= most || heavier + mass[i] >= need)) {
            const uint32_t bin = BINS - 1 - (threadIdx.x * EACH + i);
            found = {border.key << bits(level) | bin, above, 1, heavier};
            break;
        }
        above += count[i], heavier += mass[i];
    }
    __syncthreads();
    border = found;
    __syncthreads();
}

// Until all blocks are here for the n-th time.
__device__ void meet(Board &board, uint32_t n) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(&board.arrived, 1);
        while (*reinterpret_cast<volatile uint32_t *>(&board.arrived) < n * gridDim.x) {
        }
        __threadfence();
    }
    __syncthreads();
}

} // namespace

// logits [width] in f32 (`coarse`: of bf16; `known`: `told` has the largest of them), and as many numbers of room for what bias and penalties make of them. The token goes to `id`, where the next step
// reads it, and with its log-probability and soundness to `told`.
extern "C" __global__ void __launch_bounds__(THREADS) draw(const float *logits, float *changed, Draw *drawing, Board *to, uint32_t *id, uint32_t *told, uint32_t width, uint32_t coarse, uint32_t known) {
    Board &board = *to;
    const Draw d = *drawing;
    const uint32_t stretch = (width + gridDim.x - 1) / gridDim.x, begin = min(width, blockIdx.x * stretch), end = min(width, begin + stretch);
    const bool changes = d.bias || d.seen[0] || d.seen[1] || d.seen[2];
    const float *values = changes ? changed : logits;
    Top top = {-CUDART_INF_F, ~0u, 0};
    uint32_t met = 0;
    if (known && !changes) {
        // Nobody writes there before all blocks are through.
        const uint32_t id = min(told[0], width - 1);
        top = {logits[id], id, !told[2]};
    } else {
        for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS) {
            float x = logits[i];
            if (changes) changed[i] = x = processed(d, x, i);
            top = join(top, {x, i, !(x < CUDART_INF_F)});
        }
        top = join_block(top);
        if (threadIdx.x == 0) board.tops[blockIdx.x] = top;
        meet(board, ++met);
        top = {-CUDART_INF_F, ~0u, 0};
        for (uint32_t i = threadIdx.x; i < gridDim.x; i += THREADS) {
            const volatile Top &other = board.tops[i];
            top = join(top, {other.logit, other.id, other.broken});
        }
        top = join_block(top);
    }
    const bool sound = !top.broken && top.logit > -CUDART_INF_F, greedy = d.temp == 0.0;
    const double best = top.logit;
    const bool counts = d.top_k > 0 && d.top_k < width, weighs = d.top_p < 1.0, filters = sound && !greedy && (counts || weighs);

    // The mass of everything, and by the first digit.
    extern __shared__ unsigned long long masses[];
    uint32_t *numbers = reinterpret_cast<uint32_t *>(masses + BINS);
    auto weight = [&](float x) { return exponential(double(x) - best); };
    auto clear = [&] {
        for (int i = threadIdx.x; i < BINS; i += THREADS) masses[i] = 0, numbers[i] = 0;
        __syncthreads();
    };
    auto put = [&](uint32_t bin, unsigned long long mass) {
        if (mass) atomicAdd(&masses[bin], mass);
        atomicAdd(&numbers[bin], 1);
    };
    auto publish = [&](int level) {
        __syncthreads();
        for (int i = threadIdx.x; i < BINS; i += THREADS)
            if (numbers[i]) {
                atomicAdd(&board.count[level][i], numbers[i]);
                if (masses[i]) atomicAdd(&board.mass[level][i], masses[i]);
            }
    };
    if (filters) clear();
    unsigned long long mass = 0;
    if (sound)
        for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS) {
            const float x = values[i];
            if (!(x > -CUDART_INF_F)) continue;
            const unsigned long long own = __double2ull_rn(weight(x) * ONE);
            mass += own;
            if (filters) put(key_of(x) >> down(0), own);
        }
    if (filters) publish(0);
    unsigned long long all;
    sum_until(mass, &all);
    if (threadIdx.x == 0) atomicAdd(&board.total, all);

    // The border: `key` is its logit, and `above` tokens lie above.
    Border border = {0, 0, 1, 0};
    if (filters) {
        unsigned long long need = 0;
        const uint32_t most = counts ? d.top_k : ~0u;
        // What the last level would look at is the same in all numbers of bf16.
        const int levels = coarse && !changes ? LEVELS - 1 : LEVELS;
        for (int level = 0; level < levels; level++) {
            meet(board, ++met);
            if (level == 0) need = weighs ? max(1ull, __double2ull_ru(d.top_p * double(__ldcg(&board.total)))) : ~0ull;
            if (border.found) narrow(border, board, level, most, need);
            if (level + 1 == levels) break;
            if (border.found) {
                clear();
                for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS) {
                    const float x = values[i];
                    const uint32_t key = key_of(x);
                    if (x > -CUDART_INF_F && key >> down(level) == border.key)
                        put(key >> down(level + 1) & ((1u << bits(level + 1)) - 1), __double2ull_rn(weight(x) * ONE));
                }
                publish(level + 1);
            }
        }
        if (levels < LEVELS) border.key = border.key << bits(LEVELS - 1) | (border.key >> 21 ? 0 : (1u << bits(LEVELS - 1)) - 1);
    }
    // Equals of the border stay, but for those that are more than the count.
    const bool bordered = filters && border.found;
    const uint32_t equals = bordered && counts ? d.top_k - border.above : ~0u;
    auto share = [&](float x) { return exponential(__ddiv_rn(double(x) - best, d.temp)); };
    // 2: above the border; 1: on it; 0: not to be drawn.
    auto place = [&](float x) {
        if (!(x > -CUDART_INF_F)) return 0;
        const uint32_t key = key_of(x);
        if (bordered && key < border.key) return 0;
        if (d.min_p > 0.0 && weight(x) < d.min_p) return 0;
        return bordered && key == border.key ? 1 : 2;
    };
    double heavier = 0;
    uint32_t equal = 0;
    if (sound && !greedy)
        for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS) {
            const float x = values[i];
            const int at = place(x);
            if (at == 2) heavier += share(x);
            equal += at == 1;
        }
    double sum;
    uint32_t found;
    sum_until(heavier, &sum), sum_until(equal, &found);
    if (threadIdx.x == 0) board.heavier[blockIdx.x] = sum, board.equal[blockIdx.x] = found;

    // Whoever comes last draws.
    __shared__ bool is_last;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        is_last = atomicAdd(&board.arrived, 1) == (met + 1) * gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!is_last) return;

    __shared__ uint32_t chosen;
    __shared__ double target, before_stretch;
    __shared__ uint32_t stretch_at, equal_before;
    const double on_border = bordered ? share(__uint_as_float(border.key & 0x80000000u ? border.key ^ 0x80000000u : ~border.key)) : 0.0;
    if (threadIdx.x == 0) chosen = top.id, stretch_at = gridDim.x;
    if (sound && !greedy) {
        // One thread a block's stretch; where rounding leaves the sum short, the last that has something to draw.
        const bool mine = threadIdx.x < gridDim.x;
        const uint32_t here = mine ? __ldcg(&board.equal[threadIdx.x]) : 0, passed = sum_until(here) - here;
        const double own = mine ? __ldcg(&board.heavier[threadIdx.x]) + on_border * min(here, equals - min(equals, passed)) : 0.0;
        double total;
        const double until = sum_until(own, &total), goal = uniform(d.seed, d.drawn) * total;
        __shared__ uint32_t last, first;
        if (threadIdx.x == 0) last = 0, first = ~0u;
        __syncthreads();
        if (own > 0.0) {
            atomicMax(&last, threadIdx.x);
            if (goal < until) atomicMin(&first, threadIdx.x);
        }
        __syncthreads();
        if (threadIdx.x == min(first, last)) stretch_at = threadIdx.x, target = goal, before_stretch = until - own, equal_before = passed;
    }
    __syncthreads();
    if (stretch_at < gridDim.x) {
        // Each thread has some neighbours of the stretch.
        const uint32_t first = stretch_at * stretch, last = min(width, first + stretch), each = (last - first + THREADS - 1) / THREADS;
        const uint32_t from = min(last, first + threadIdx.x * each), to = min(last, from + each);
        uint32_t equal = 0;
        for (uint32_t i = from; i < to; i++) equal += place(values[i]) == 1;
        uint32_t passed = equal_before + sum_until(equal) - equal;
        auto walk = [&](auto each) {
            uint32_t rank = passed;
            for (uint32_t i = from; i < to; i++) {
                const int at = place(values[i]);
                if (at == 2 || (at == 1 && rank++ < equals))
                    if (each(i, share(values[i]))) return;
            }
        };
        double own = 0;
        uint32_t latest = 0;
        walk([&](uint32_t i, double share) { own += share, latest = i + 1; return false; });
        const double until = sum_until(own), goal = target - before_stretch;
        // The last that can be drawn, if rounding leaves the sum short.
        __shared__ uint32_t winner;
        if (threadIdx.x == 0) winner = ~0u, chosen = 0;
        __syncthreads();
        if (latest) atomicMax(&chosen, latest - 1);
        if (own > 0.0 && goal < until) atomicMin(&winner, threadIdx.x);
        __syncthreads();
        if (threadIdx.x == winner) {
            double sum = until - own;
            walk([&](uint32_t i, double share) { sum += share, chosen = i; return goal < sum; });
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        const uint32_t token = sound ? chosen : 0;
        *id = token;
        told[0] = token;
        told[1] = __float_as_uint(sound ? float(double(values[token]) - best - log(double(__ldcg(&board.total)) / ONE)) : 0.0f);
        told[2] = sound;
        for (uint32_t i = 0; i < d.tallies; i++) {
            d.tally[i][token] += 1;
            if (const uint32_t window = d.window[i]; window && d.length >= window) {
                const uint32_t old = d.latest[(d.length - window) % d.room];
                if (old < width) d.tally[i][old] -= 1;
            }
        }
        if (d.room) d.latest[d.length % d.room] = token;
        drawing->length = d.length + 1;
        drawing->drawn = d.drawn + (greedy ? 0 : 1);
        board.arrived = 0, board.total = 0;
    }
    if (filters)
        for (int i = threadIdx.x; i < LEVELS * BINS; i += THREADS) board.mass[0][i] = 0, board.count[0][i] = 0;
}
