// Weights as checkpoints hold them -> tiles (tiles.cuh), once, when a model is loaded; and tiles -> bf16, for prefill and for lookups.
#include "tiles.cuh"

// Value k of a row that is a little-endian bit stream.
__device__ __forceinline__ uint32_t stream_bits(const uint8_t *row, int k, int bits) {
    size_t at = size_t(k) * bits;
    uint32_t v = row[at / 8] >> (at % 8);
    if (at % 8 + bits > 8) v |= uint32_t(row[at / 8 + 1]) << (8 - at % 8);
    return v & ((1u << bits) - 1);
}

// Where lane (g, c)'s words of row r of a tile are, in words from the tile's start: word j (NIBBLE, MX4, NV4) or words 2 j, 2 j + 1 (BYTE, FP8, SIX).
__device__ __forceinline__ int word_at(int r, int c, int word, int pieces) {
    return ((r / 8 * pieces + word / 4) * 32 + (r % 8) * 4 + c) * 4 + word % 4;
}

// A thread makes the words of eight columns. Grid: (blocks of columns, rows of tiles), 256 threads = 16 rows x 16 eights.
extern "C" __global__ void tile_words(const uint8_t *data, uint32_t *tiles, int rows, int cols, int bits, int row_bytes, int packing) {
    const int r = threadIdx.x / 16, eight = threadIdx.x % 16, j = eight / 4, c = eight % 4;
    const int row = blockIdx.y * TILE_ROWS + r, column = blockIdx.x * TILE_COLS + eight * 8, pieces = packing == BYTE || packing == FP8 || packing == SIX ? 2 : 1;
    uint32_t *tile = tiles + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * 256 * pieces;
    uint32_t q[8] = {};
    if (row < rows && column < cols)
        for (int i = 0; i < 8; i++) q[i] = stream_bits(data + size_t(row) * row_bytes, column + i, bits);
    uint32_t a = 0, b = 0;
    if (packing == NIBBLE) {
        for (int i = 0; i < 8; i++) a |= q[i] << (4 * (i / 2) + 16 * (i % 2));
        tile[word_at(r, c, j, 1)] = a;
    } else if (packing == MX4 || packing == NV4) {
        for (int i = 0; i < 8; i++) a |= e2m1_bits(q[i], i / 2) << (16 * (i % 2));
        tile[word_at(r, c, j, 1)] = a;
    } else {
        a = q[0] | q[2] << 8 | q[1] << 16 | q[3] << 24;
        b = q[4] | q[6] << 8 | q[5] << 16 | q[7] << 24;
        tile[word_at(r, c, 2 * j, 2)] = a;
        tile[word_at(r, c, 2 * j + 1, 2)] = b;
    }
}

// Scales and biases (two-byte floats, as they are) of all groups: pairs [row g, row g + 8] by g. Grid as above, 16 * groups threads.
extern "C" __global__ void tile_scales(const uint16_t *scales, const uint16_t *biases, uint32_t *tiles, int rows, int cols, int group) {
    const int groups = TILE_COLS / group, r = threadIdx.x / groups, i = threadIdx.x % groups;
    const int row = blockIdx.y * TILE_ROWS + r, column = blockIdx.x * TILE_COLS + i * group;
    uint32_t *tile = tiles + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * 16 * groups;
    size_t at = size_t(row) * (cols / group) + column / group;
    bool there = row < rows && column < cols;
    tile[((r % 8) * 2 + r / 8) * groups + i] = there ? uint32_t(scales[at]) | uint32_t(biases[at]) << 16 : 0;
}

// Where the bf16 scale of a row's i-th 16 columns is in a tile's, in numbers: for the lanes that have them, four of row g and of row g + 8.
__device__ __forceinline__ int sixteenth_at(int r, int i) { return ((r % 8) * 2 + i % 2) * 8 + r / 8 * 4 + i / 2; }

// The same for scales of 16 columns each, bf16 as they are. 128 threads.
extern "C" __global__ void tile_sixteenths(const uint16_t *scales, uint16_t *tiles, int rows, int cols) {
    const int r = threadIdx.x / 8, i = threadIdx.x % 8;
    const int row = blockIdx.y * TILE_ROWS + r, column = blockIdx.x * TILE_COLS + i * 16;
    uint16_t *tile = tiles + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * 128;
    const bool there = row < rows && column < cols;
    tile[sixteenth_at(r, i)] = there ? scales[size_t(row) * (cols / 16) + column / 16] : 0;
}

// The same for E8M0 bytes, a group 32 columns. 64 threads.
extern "C" __global__ void tile_exponents(const uint8_t *scales, uint8_t *tiles, int rows, int cols) {
    const int r = threadIdx.x / 4, i = threadIdx.x % 4;
    const int row = blockIdx.y * TILE_ROWS + r, column = blockIdx.x * TILE_COLS + i * 32;
    uint8_t *tile = tiles + (size_t(blockIdx.y) * gridDim.x + blockIdx.x) * 64;
    bool there = row < rows && column < cols;
    tile[((r % 8) * 2 + r / 8) * 4 + i] = there ? scales[size_t(row) * (cols / 32) + column / 32] : 0;
}

// Eight weights of a row, from column 32 j + 8 c of a tile.
template <int P>
__device__ __forceinline__ uint4 eight_weights(const uint8_t *tile, const uint8_t *scales, int group, bool half, int r, int j, int c) {
    const int groups = TILE_COLS / group, i = 32 * j / group, at = ((r % 8) * 2 + r / 8) * groups + i;
    const uint32_t *words = reinterpret_cast<const uint32_t *>(tile);
    float v[8];
    float2 s;
    if constexpr (scaled_first<P>) {
        const uint32_t scale = twice(reinterpret_cast<const uint16_t *>(scales)[sixteenth_at(r, 2 * j + c / 2)], 0);
        s = make_float2(P == NV4 ? NV4_LESS : 1.f, 0);
        uint32_t p[4];
        if constexpr (P == NV4) e2m1_scaled(words[word_at(r, c, j, 1)], scale, p);
        else
            for (int i = 0; i < 2; i++) {
                uint32_t two[2];
                sixes(words[word_at(r, c, 2 * j + i, 2)], scale, two);
                p[2 * i] = two[0], p[2 * i + 1] = two[1];
            }
        for (int k = 0; k < 8; k++) v[k] = __uint_as_float(k % 2 ? p[k / 2] & 0xFFFF0000u : p[k / 2] << 16);
    } else if constexpr (P == MX4) {
        s = make_float2(e8m0(scales[at]), 0);
        uint32_t p[4];
        e2m1(words[word_at(r, c, j, 1)], p);
        for (int k = 0; k < 8; k++) v[k] = __uint_as_float(k % 2 ? p[k / 2] & 0xFFFF0000u : p[k / 2] << 16);
    } else {
        s = scale_and_bias(reinterpret_cast<const uint32_t *>(scales)[at], half);
        if constexpr (P == NIBBLE) {
            uint32_t w = words[word_at(r, c, j, 1)];
            for (int k = 0; k < 8; k++) v[k] = float((w >> (4 * (k / 2) + 16 * (k % 2))) & 15);
        } else {
            uint32_t w[2] = {words[word_at(r, c, 2 * j, 2)], words[word_at(r, c, 2 * j + 1, 2)]};
            if constexpr (P == FP8) {
                s = make_float2(s.x + s.y, 0);
                for (int k = 0; k < 8; k++) {
                    uint32_t p[2];
                    e4m3(w[k / 4], p);
                    v[k] = __uint_as_float(k % 2 ? p[k / 2 % 2] & 0xFFFF0000u : p[k / 2 % 2] << 16);
                }
            } else
                for (int k = 0; k < 8; k++) v[k] = float((w[k / 4] >> (8 * (k / 2 % 2) + 16 * (k % 2))) & 255);
        }
    }
    uint32_t out[4];
    for (int k = 0; k < 4; k++) {
        __nv_bfloat162 pair = __floats2bfloat162_rn(fmaf(v[2 * k], s.x, s.y), fmaf(v[2 * k + 1], s.x, s.y));
        out[k] = *reinterpret_cast<uint32_t *>(&pair);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
}

template <int P>
__device__ __forceinline__ void row_of_tiles(const uint8_t *tiles, const uint8_t *scales, int blocks, int group, bool half, int row, int block, int eight, __nv_bfloat16 *y) {
    constexpr int size = 1024 * pieces<P>();
    const size_t tile = size_t(row / TILE_ROWS) * blocks + block;
    const int scale_size = scaled_first<P> ? TILE_ROWS * 16 : TILE_ROWS * (TILE_COLS / group) * (P == MX4 ? 1 : 4);
    *reinterpret_cast<uint4 *>(y) = eight_weights<P>(tiles + tile * size, scales + tile * scale_size, group, half, row % TILE_ROWS, eight / 4, eight % 4);
}

// All weights, [rows, cols]. Grid: (blocks of columns, rows of tiles), 256 threads.
template <int P> __device__ void unpack(const uint8_t *tiles, const uint8_t *scales, __nv_bfloat16 *y, int rows, int cols, int group, bool half) {
    // Lanes as in the tile, so that its words are read in one piece: warps 0 to 3 rows 0 to 7 of one 32 columns each, 4 to 7 the others.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4 + 8 * (warp / 4), eight = warp % 4 * 4 + lane % 4;
    const int row = blockIdx.y * TILE_ROWS + r, column = blockIdx.x * TILE_COLS + eight * 8;
    if (row < rows && column < cols) row_of_tiles<P>(tiles, scales, gridDim.x, group, half, row, blockIdx.x, eight, y + size_t(row) * cols + column);
}

// Rows by id, [ids, cols]. Grid: (blocks of columns, ids), 16 threads. An id that is no row gives zeros.
template <int P>
__device__ void gather(const uint8_t *tiles, const uint8_t *scales, const uint32_t *ids, __nv_bfloat16 *y, int rows, int cols, int group, bool half) {
    const int column = blockIdx.x * TILE_COLS + threadIdx.x * 8;
    let_next_start();
    wait_for_previous();
    const uint32_t row = ids[blockIdx.y];
    __nv_bfloat16 *to = y + size_t(blockIdx.y) * cols + column;
    if (column >= cols) return;
    if (row < rows) row_of_tiles<P>(tiles, scales, gridDim.x, group, half, row, blockIdx.x, threadIdx.x, to);
    else *reinterpret_cast<uint4 *>(to) = make_uint4(0, 0, 0, 0);
}

#define FOR_PACKING(NAME, P)                                                                                                               \
    extern "C" __global__ void unpack_##NAME(const uint8_t *tiles, const uint8_t *scales, __nv_bfloat16 *y, int rows, int cols, int group, \
                                             int half) {                                                                                   \
        unpack<P>(tiles, scales, y, rows, cols, group, half);                                                                              \
    }                                                                                                                                      \
    extern "C" __global__ void gather_##NAME(const uint8_t *tiles, const uint8_t *scales, const uint32_t *ids, __nv_bfloat16 *y, int rows, \
                                             int cols, int group, int half) {                                                              \
        gather<P>(tiles, scales, ids, y, rows, cols, group, half);                                                                         \
    }

FOR_PACKING(nibble, NIBBLE)
FOR_PACKING(byte, BYTE)
FOR_PACKING(mx4, MX4)
FOR_PACKING(fp8, FP8)
FOR_PACKING(six, SIX)
FOR_PACKING(nv4, NV4)
