// Packed rows -> floats, eight weights at a time: eight of any format lie in whole bytes and, but for Fp8's, share a scale.
// Layouts are those of host/src/kernels/cpu/format.rs. Small floats are put together from their fields, because the GPU takes
// numbers below 2^-126 for 0, on the way as well.

// Where a row's weights, scales and biases begin.
struct Row {
    device const uchar *data;
    device const uchar *scales;
    device const uchar *biases;
};

// Bytes of a row in each of the three.
struct Strides {
    uint data;
    uint scales;
    uint biases;
};

inline Row row_at(device const uchar *data, device const uchar *scales, device const uchar *biases, Strides by, ulong row) {
    return Row{data + row * by.data, scales + row * by.scales, biases + row * by.biases};
}

inline float half_at(device const uchar *p) {
    return float(*(device const half *)p);
}

// Eight numbers of BITS bits, the first in the lowest ones.
template <int BITS>
inline void eight_numbers(device const uchar *p, thread float *q) {
    if (BITS == 8) {
        for (int i = 0; i < 8; i++) q[i] = float(p[i]);
        return;
    }
    // Sixteen or more bits are read at once where rows lie so that they can be.
    uint low = 0, high = 0;
    if (BITS == 4) {
        low = *(device const uint *)p;
        high = low >> 16;
    } else if (BITS == 2) {
        low = *(device const ushort *)p;
        high = low >> 8;
    } else if (BITS == 3) {
        low = uint(p[0]) | uint(p[1]) << 8 | uint(p[2]) << 16;
        high = low >> 12;
    } else if (BITS == 5) {
        low = uint(p[0]) | uint(p[1]) << 8 | uint(p[2]) << 16;
        high = (uint(p[2]) >> 4) | uint(p[3]) << 4 | uint(p[4]) << 12;
    } else {
        low = uint(p[0]) | uint(p[1]) << 8 | uint(p[2]) << 16;
        high = uint(p[3]) | uint(p[4]) << 8 | uint(p[5]) << 16;
    }
    const uint mask = (1u << (BITS & 7)) - 1;
    for (int i = 0; i < 4; i++) {
        q[i] = float((low >> (i * BITS)) & mask);
        q[i + 4] = float((high >> (i * BITS)) & mask);
    }
}

// MLX: w = q scale + bias.
template <int BITS, int GROUP, typename S>
struct Affine {
    static void eight(Row row, uint column, uint, thread float *w) {
        const float scale = float(((device const S *)row.scales)[column / GROUP]);
        const float bias = float(((device const S *)row.biases)[column / GROUP]);
        eight_numbers<BITS>(row.data + column / 8 * BITS, w);
        for (int i = 0; i < 8; i++) w[i] = fma(w[i], scale, bias);
    }
};

#define AFFINE(BITS, GROUP, S) Affine<BITS, GROUP, S>

constant float E2M1[16] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

inline float e8m0(uchar b) {
    return as_type<float>(uint(b) << 23);
}

inline float e4m3(uchar b) {
    const uint bits = b & 0x7f;
    const float small = float(bits) * 0.001953125f; // whole numbers of 2^-9
    const float magnitude = bits < 8 ? small : as_type<float>((bits << 20) + (120u << 23));
    return b & 0x80 ? -magnitude : magnitude;
}

inline void eight_nibbles(device const uchar *p, float scale, thread float *w) {
    const uint word = *(device const uint *)p;
    for (int i = 0; i < 8; i++) w[i] = E2M1[(word >> (4 * i)) & 15] * scale;
}

struct Mxfp4 {
    static void eight(Row row, uint column, uint, thread float *w) {
        eight_nibbles(row.data + column / 2, e8m0(row.scales[column / 32]), w);
    }
};

struct Nvfp4 {
    static void eight(Row row, uint column, uint, thread float *w) {
        eight_nibbles(row.data + column / 2, e4m3(row.scales[column / 16]), w);
    }
};

struct Nvfp4Scaled {
    static void eight(Row row, uint column, uint, thread float *w) {
        const float factor = *(device const float *)row.biases;
        eight_nibbles(row.data + column / 2, e4m3(row.scales[column / 16]) * factor, w);
    }
};

struct Mxfp8 {
    static void eight(Row row, uint column, uint, thread float *w) {
        const float scale = e8m0(row.scales[column / 32]);
        for (int i = 0; i < 8; i++) w[i] = e4m3(row.data[column + i]) * scale;
    }
};

// Rows may end within eight weights: the missing ones are 0.
template <int BLOCK>
struct Fp8 {
    static void eight(Row row, uint column, uint cols, thread float *w) {
        for (uint i = 0; i < 8; i++) {
            const uint c = column + i;
            w[i] = c < cols ? e4m3(row.data[c]) * ((device const float *)row.scales)[c / BLOCK] : 0.0f;
        }
    }
};
