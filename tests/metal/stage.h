// Plays a Metal kernel on the CPU: every thread of a threadgroup is a fiber, run until it waits for the others at a barrier or in an op of
// its wave (32 threads). What is not waited for is not there yet: threads run one after the other, forwards or backwards, shared memory
// begins as NaN, and a thread that does not come to a barrier ends the program. The words of the language are macros and types below.
#pragma once
#undef _FORTIFY_SOURCE // its longjmp knows no stacks but one
// Few headers, and none of C++'s large ones: programs of one kernel are compiled by the dozen.
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <utility>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

using uchar = unsigned char;
using uint = unsigned;
using ushort = unsigned short;
using ulong = unsigned long;

template <class T>
inline T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
    return a < b ? b : a;
}
inline float exp(float x) { return __builtin_expf(x); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

struct uint3 {
    unsigned x, y, z;
};
struct ulong2 {
    unsigned long x, y;
    ulong2(unsigned long x, unsigned long y) : x(x), y(y) {}
};

template <class To, class From>
inline To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type changes no size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// The upper half of a float, rounded to even.
struct bfloat {
    uint16_t bits;
    bfloat() = default;
    explicit bfloat(float x) {
        const uint32_t b = as_type<uint32_t>(x);
        bits = x != x ? 0x7fc0 : uint16_t((b + 0x7fff + ((b >> 16) & 1)) >> 16);
    }
    operator float() const { return as_type<float>(uint32_t(bits) << 16); }
};

struct half {
    uint16_t bits;
    half() = default;
    explicit half(float x) {
        const uint32_t b = as_type<uint32_t>(x), sign = (b >> 16) & 0x8000, size = b & 0x7fffffff;
        if (size >= 0x47800000) { // 65536
            bits = uint16_t(sign | (size > 0x7f800000 ? 0x7e00 : 0x7c00));
        } else if (size < 0x38800000) { // below 2^-14: whole numbers of 2^-24
            bits = uint16_t(sign | uint32_t(__builtin_nearbyintf(__builtin_ldexpf(as_type<float>(size), 24))));
        } else {
            bits = uint16_t(sign | ((size + 0xfff + ((size >> 13) & 1)) - 0x38000000) >> 13);
        }
    }
    operator float() const {
        const uint32_t exponent = (bits >> 10) & 31, fraction = bits & 1023;
        const float size = exponent == 0    ? __builtin_ldexpf(float(fraction), -24)
                           : exponent == 31 ? (fraction ? __builtin_nanf("") : __builtin_inff())
                                            : __builtin_ldexpf(float(fraction | 1024), int(exponent) - 25);
        return bits & 0x8000 ? -size : size;
    }
};

namespace precise {
inline float exp(float x) { return __builtin_expf(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
}
inline float clamp(float x, float low, float high) { return min(max(x, low), high); }

namespace stage {

[[noreturn]] inline void fail(const char *why) {
    fprintf(stderr, "%s\n", why);
    _Exit(3);
}

enum { WAVE = 32, MOST_THREADS = 1024, STACK = 1 << 16 };

struct Barrier {
    unsigned arrived, round;
};

struct Fiber {
    ucontext_t begin;
    jmp_buf here;
    char *stack;
    bool started, done;
};

inline Fiber fibers[MOST_THREADS];
inline Barrier waves[MOST_THREADS / WAVE], everybody;
inline char slots[MOST_THREADS][16];
inline unsigned current, threads;
inline unsigned long moves;
inline jmp_buf scheduler;
inline void (*body)();

inline void pause() {
    if (_setjmp(fibers[current].here) == 0) _longjmp(scheduler, 1);
}

inline void arrive(Barrier &barrier, unsigned all) {
    const unsigned round = barrier.round;
    moves++;
    if (++barrier.arrived == all) {
        barrier.arrived = 0;
        barrier.round++;
        return;
    }
    while (barrier.round == round) pause();
}

inline void start() {
    body();
    fibers[current].done = true;
    moves++;
    _longjmp(scheduler, 1);
}

inline void resume(unsigned i) {
    current = i;
    Fiber &fiber = fibers[i];
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.begin);
}

// Runs `work` on so many threads; backwards, the last one comes first.
inline void together(unsigned count, bool backwards, void (*work)()) {
    if (count == 0 || count % WAVE != 0 || count > MOST_THREADS) fail("threads must be whole waves");
    threads = count;
    body = work;
    everybody = {0, 0};
    for (unsigned i = 0; i < count; i++) {
        Fiber &fiber = fibers[i];
        if (!fiber.stack) fiber.stack = static_cast<char *>(malloc(STACK));
        getcontext(&fiber.begin);
        fiber.begin.uc_stack.ss_sp = fiber.stack;
        fiber.begin.uc_stack.ss_size = STACK;
        fiber.begin.uc_link = nullptr;
        makecontext(&fiber.begin, start, 0);
        fiber.started = fiber.done = false;
        waves[i / WAVE] = {0, 0};
    }
    for (bool left = true; left;) {
        left = false;
        const unsigned long before = moves;
        for (unsigned n = 0; n < count; n++) {
            const unsigned i = backwards ? count - 1 - n : n;
            if (fibers[i].done) continue;
            resume(i);
            left = left || !fibers[i].done;
        }
        if (left && moves == before) fail("some threads wait for others that have left or wait elsewhere");
    }
}

// All 32 values of the caller's wave, in the order of its threads.
template <class V>
inline void exchange(const V &own, V *all) {
    static_assert(sizeof(V) <= sizeof slots[0], "a slot is too small");
    Barrier &wave = waves[current / WAVE];
    memcpy(slots[current], &own, sizeof own);
    arrive(wave, WAVE);
    for (unsigned i = 0; i < WAVE; i++) memcpy(&all[i], slots[current / WAVE * WAVE + i], sizeof own);
    arrive(wave, WAVE);
}

}

inline float simd_sum(float x) {
    float all[32], sum = 0.0f;
    stage::exchange(x, all);
    for (float x : all) sum += x;
    return sum;
}

// Of a small matrix each thread has two neighbours in a row.
template <class T, int COLS, int ROWS = COLS>
struct simdgroup_matrix {
    static_assert(COLS == 8 && ROWS == 8, "as the hardware has it");
    T has[2];
};
using simdgroup_float8x8 = simdgroup_matrix<float, 8>;

template <class T, int N>
inline simdgroup_matrix<T, N> make_filled_simdgroup_matrix(T x) {
    return {{x, x}};
}

template <class T>
inline T *place(T *p, unsigned long pitch, ulong2 origin, bool transposed, unsigned i) {
    unsigned long row = stage::current % 32 / 4, col = stage::current % 4 * 2 + i;
    if (transposed) std::swap(row, col);
    return p + (row + origin.y) * pitch + col + origin.x;
}

template <class T>
inline void simdgroup_load(simdgroup_matrix<T, 8> &m, const T *p, unsigned long pitch, ulong2 origin = {0, 0}, bool transposed = false) {
    for (unsigned i = 0; i < 2; i++) m.has[i] = *place(p, pitch, origin, transposed, i);
}

template <class T>
inline void simdgroup_store(const simdgroup_matrix<T, 8> &m, T *p, unsigned long pitch, ulong2 origin = {0, 0}, bool transposed = false) {
    for (unsigned i = 0; i < 2; i++) *place(p, pitch, origin, transposed, i) = m.has[i];
}

// d = a b + c
template <class T>
inline void simdgroup_multiply_accumulate(simdgroup_matrix<T, 8> &d, const simdgroup_matrix<T, 8> &a, const simdgroup_matrix<T, 8> &b, const simdgroup_matrix<T, 8> &c) {
    struct Both {
        T a[2], b[2];
    } all[32];
    stage::exchange(Both{{a.has[0], a.has[1]}, {b.has[0], b.has[1]}}, all);
    const unsigned lane = stage::current % 32, row = lane / 4;
    for (unsigned i = 0; i < 2; i++) {
        const unsigned col = lane % 4 * 2 + i;
        T sum = c.has[i];
        for (unsigned k = 0; k < 8; k++) sum = fma(all[row * 4 + k / 2].a[k % 2], all[k * 4 + col / 2].b[col % 2], sum);
        d.has[i] = sum;
    }
}

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { stage::arrive(stage::everybody, stage::threads); }
inline void simdgroup_barrier(mem_flags) { stage::arrive(stage::waves[stage::current / 32], 32); }

namespace stage {

// A kernel's arguments: places in memory, in the order of its parameters, then where its group stands and where its thread does.
inline void **places;
inline uint3 group;

template <class A>
struct Argument {
    static A from(unsigned i) { return static_cast<A>(places[i]); }
};
template <class A>
struct Argument<const A &> {
    static const A &from(unsigned i) { return *static_cast<const A *>(places[i]); }
};
template <>
struct Argument<uint3> {
    static uint3 from(unsigned) { return group; }
};
template <>
struct Argument<unsigned> {
    static unsigned from(unsigned) { return current; }
};
template <class A>
struct Argument<const A *> {
    static const A *from(unsigned i) { return static_cast<const A *>(places[i]); }
};

template <class... A, size_t... I>
inline void call(void (*kernel)(A...), std::index_sequence<I...>) {
    kernel(Argument<A>::from(I)...);
}
template <auto KERNEL, class... A>
inline void call_all(void (*)(A...)) {
    call(KERNEL, std::index_sequence_for<A...>());
}
template <auto KERNEL>
inline void play() {
    call_all<KERNEL>(KERNEL);
}

struct Role {
    const char *name;
    void (*play)();
};

// Memory that ends where nothing may be touched, but for what makes its begin a multiple of 16.
struct Guarded {
    char *map, *begin;
    size_t size, room, whole;
    void get(size_t bytes) {
        size = bytes;
        room = (size + 15) / 16 * 16;
        const size_t page = size_t(sysconf(_SC_PAGESIZE));
        const size_t used = (room + page - 1) / page * page;
        whole = used + page;
        void *at = mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == MAP_FAILED || mprotect(static_cast<char *>(at) + used, page, PROT_NONE) != 0) fail("no memory");
        map = static_cast<char *>(at);
        begin = map + used - room;
        memset(begin, 0xff, room);
    }
    void check() const {
        for (size_t i = size; i < room; i++)
            if (begin[i] != char(0xff)) fail("a kernel has written behind an output");
    }
    void end() { munmap(map, whole); }
};

// Buffers of a kernel, its numbers and its shared memory.
enum { MOST = 16 };

template <class T>
inline bool take(T *to, size_t count) {
    return fread(to, sizeof(T), count, stdin) == count;
}

// Reads calls until the input ends; all numbers are 64 bits wide. A call: length and bytes of a name; how many buffers, of each the length
// and the bytes; length and bytes of the numbers; bytes of shared memory; groups in x, y and z; threads; whether backwards. The answer:
// the bytes of all buffers.
inline int serve(const Role *roles, size_t count) {
#if defined(__SSE__)
    _mm_setcsr(_mm_getcsr() | 0x8040); // numbers below 2^-126 are 0, as on the GPU
#endif
    for (uint64_t length; take(&length, 1);) {
        char name[512];
        uint64_t buffers, size, grid[6];
        if (length >= sizeof name || !take(name, length) || !take(&buffers, 1) || buffers + 2 > MOST) fail("the call ends early");
        name[length] = 0;
        Guarded memory[MOST];
        void *all[MOST];
        for (uint64_t i = 0; i <= buffers; i++) {
            if (!take(&size, 1)) fail("the call ends early");
            memory[i].get(size);
            if (!take(memory[i].begin, size)) fail("the call ends early");
            all[i] = memory[i].begin;
        }
        if (!take(grid, 6)) fail("the call ends early");
        Guarded &shared = memory[buffers + 1];
        shared.get(grid[0]);
        all[buffers + 1] = shared.begin;
        places = all;
        const Role *role = roles;
        while (role < roles + count && strcmp(role->name, name) != 0) role++;
        if (role == roles + count) fail("there is no such kernel");
        for (unsigned z = 0; z < grid[3]; z++)
            for (unsigned y = 0; y < grid[2]; y++)
                for (unsigned x = 0; x < grid[1]; x++) {
                    group = {x, y, z};
                    memset(shared.begin, 0xff, shared.room);
                    together(unsigned(grid[4]), grid[5] != 0, role->play);
                    shared.check();
                }
        for (uint64_t i = 0; i < buffers; i++) {
            memory[i].check();
            fwrite(memory[i].begin, 1, memory[i].size, stdout);
        }
        fflush(stdout);
        for (uint64_t i = 0; i < buffers + 2; i++) memory[i].end();
    }
    return 0;
}

}

#define kernel static
#define device
#define constant const
#define threadgroup
#define thread
#define SHARED
