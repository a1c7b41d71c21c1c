// GGUF's blocks -> floats, eight weights at a time (ggml-common.h; the same formulas as host/src/kernels/cpu/dequantize/ggml.rs).
// Blocks of 32 keep element i in the low half of byte i and element i + 16 in the high half; blocks of 256 keep small scales.

// Halves of eight bytes: the low ones, or from `shift` 4 on the high ones.
inline void eight_halves(device const uchar *p, uint shift, thread float *q) {
    for (int i = 0; i < 8; i++) q[i] = float((uint(p[i]) >> shift) & 15);
}

// Adds `worth` where a number's bit among 32 is set.
inline void eight_bits(device const uchar *high, uint first, float worth, thread float *q) {
    const uint byte = high[first / 8];
    for (int i = 0; i < 8; i++) q[i] += (byte >> i) & 1 ? worth : 0.0f;
}

inline void scaled(float scale, float shift, thread float *w) {
    for (int i = 0; i < 8; i++) w[i] = fma(w[i], scale, shift);
}

struct Q4_0 {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 32 * 18;
        const uint i = column % 32;
        eight_halves(p + 2 + i % 16, i / 16 * 4, w);
        const float d = half_at(p);
        scaled(d, -8.0f * d, w);
    }
};

struct Q4_1 {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 32 * 20;
        const uint i = column % 32;
        eight_halves(p + 4 + i % 16, i / 16 * 4, w);
        scaled(half_at(p), half_at(p + 2), w);
    }
};

struct Q5_0 {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 32 * 22;
        const uint i = column % 32;
        eight_halves(p + 6 + i % 16, i / 16 * 4, w);
        eight_bits(p + 2, i, 16.0f, w);
        const float d = half_at(p);
        scaled(d, -16.0f * d, w);
    }
};

struct Q5_1 {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 32 * 24;
        const uint i = column % 32;
        eight_halves(p + 8 + i % 16, i / 16 * 4, w);
        eight_bits(p + 4, i, 16.0f, w);
        scaled(half_at(p), half_at(p + 2), w);
    }
};

struct Q8_0 {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 32 * 34;
        const float d = half_at(p);
        device const char *q = (device const char *)(p + 2 + column % 32);
        for (int i = 0; i < 8; i++) w[i] = d * float(q[i]);
    }
};

struct Q2K {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 256 * 84;
        const uint i = column % 256, shift = i % 128 / 32 * 2, scale = p[i / 16];
        device const uchar *q = p + 16 + i / 128 * 32 + i % 32;
        for (int j = 0; j < 8; j++) w[j] = float((uint(q[j]) >> shift) & 3);
        scaled(half_at(p + 80) * float(scale & 15), -half_at(p + 82) * float(scale >> 4), w);
    }
};

struct Q3K {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 256 * 110;
        const uint i = column % 256, part = i % 128 / 32, byte = i % 32, s = i / 16;
        device const uchar *q = p + 32 + i / 128 * 32 + byte;
        for (int j = 0; j < 8; j++) {
            const uint third = (uint(p[byte + j]) >> (i / 128 * 4 + part)) & 1;
            w[j] = float(((uint(q[j]) >> (2 * part)) & 3) | third << 2);
        }
        // Sixteen scales of six bits in twelve bytes.
        const uint low = (uint(p[96 + s % 8]) >> (s / 8 * 4)) & 15, high = (uint(p[104 + s % 4]) >> (s / 4 * 2)) & 3;
        const float scale = half_at(p + 108) * (float(low | high << 4) - 32.0f);
        scaled(scale, -4.0f * scale, w);
    }
};

// Scale and minimum number s of eight, six bits each, which Q4_K and Q5_K share: w = d scale q - dmin min.
inline void scaled_by_six_bits(device const uchar *p, uint s, thread float *w) {
    device const uchar *packed = p + 4;
    uint scale, least;
    if (s < 4) {
        scale = packed[s] & 63;
        least = packed[s + 4] & 63;
    } else {
        scale = (packed[s + 4] & 15) | (packed[s - 4] >> 6) << 4;
        least = (packed[s + 4] >> 4) | (packed[s] >> 6) << 4;
    }
    scaled(half_at(p) * float(scale), -half_at(p + 2) * float(least), w);
}

struct Q4K {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 256 * 144;
        const uint i = column % 256;
        eight_halves(p + 16 + i / 64 * 32 + i % 32, i / 32 % 2 * 4, w);
        scaled_by_six_bits(p, i / 32, w);
    }
};

struct Q5K {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 256 * 176;
        const uint i = column % 256;
        eight_halves(p + 48 + i / 64 * 32 + i % 32, i / 32 % 2 * 4, w);
        for (int j = 0; j < 8; j++) w[j] += (uint(p[16 + i % 32 + j]) >> (i / 32)) & 1 ? 16.0f : 0.0f;
        scaled_by_six_bits(p, i / 32, w);
    }
};

struct Q6K {
    static void eight(Row row, uint column, uint, thread float *w) {
        device const uchar *p = row.data + column / 256 * 210;
        const uint i = column % 256, half_of = i / 128, part = i % 128 / 32, byte = i % 32;
        eight_halves(p + half_of * 64 + part % 2 * 32 + byte, part / 2 * 4, w);
        device const uchar *high = p + 128 + half_of * 32 + byte;
        for (int j = 0; j < 8; j++) w[j] += float(((uint(high[j]) >> (2 * part)) & 3) << 4);
        const float scale = half_at(p + 208) * float(((device const char *)p)[192 + i / 16]);
        scaled(scale, -32.0f * scale, w);
    }
};
