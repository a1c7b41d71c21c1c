//! GGUF super-blocks of 256: Q2_K to Q6_K. A chunk is a super-block; each of its groups of 16 or 32 weights has a scale.
//! Layouts: see `dequantize/ggml.rs`.

use super::super::{
    dequantize::{scale_and_min, six_bit_scale},
    lanes::Lanes,
};
use super::{
    Raw, Sink, Unpack,
    ggml::{WHOLE, blocks, half_at},
};

blocks! {
    /// w = d scale q - dmin min
    Q2K = 256 weights in 84 bytes, q2_k;
    /// w = d scale (q - 4)
    Q3K = 256 weights in 110 bytes, q3_k;
    /// w = d scale q - dmin min
    Q4K = 256 weights in 144 bytes, q4_k;
    /// w = d scale q - dmin min
    Q5K = 256 weights in 176 bytes, q5_k;
    /// w = d scale (q - 32)
    Q6K = 256 weights in 210 bytes, q6_k;
}

// SAFETY of the functions below: the caller vouches for one whole super-block at `p`.

#[inline(always)]
unsafe fn q2_k<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let (d, dmin) = (half_at::<L>(p.add(80)), half_at::<L>(p.add(82)));
        let n = 16 / L::W;
        for sixteenth in 0..16 {
            let (half, part, side) = (sixteenth / 8, sixteenth % 8 / 2, sixteenth % 2);
            let both = *p.add(sixteenth);
            let (scale, min) = (L::splat(d * f32::from(both & 15)), L::splat(-dmin * f32::from(both >> 4)));
            for v in 0..n {
                let q = L::load_u8(p.add(16 + half * 32 + side * 16 + v * L::W));
                let q = L::and(L::shr(q, part as u32 * 2), 3);
                sink.take(sixteenth * n + v, L::fma(L::to_float(q), scale, min));
            }
        }
    }
}

#[inline(always)]
unsafe fn q3_k<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let d = half_at::<L>(p.add(108));
        let packed = std::slice::from_raw_parts(p.add(96), 12);
        let n = 16 / L::W;
        for sixteenth in 0..16 {
            let (half, part, side) = (sixteenth / 8, sixteenth % 8 / 2, sixteenth % 2);
            let scale = d * (f32::from(six_bit_scale(packed, sixteenth)) - 32.0);
            let (scale, centre) = (L::splat(scale), L::splat(-4.0 * scale));
            for v in 0..n {
                let byte = side * 16 + v * L::W;
                let low = L::and(L::shr(L::load_u8(p.add(32 + half * 32 + byte)), part as u32 * 2), 3);
                let third = L::and(L::shr(L::load_u8(p.add(byte)), (half * 4 + part) as u32), 1);
                sink.take(sixteenth * n + v, L::fma(L::to_float(L::or(low, L::shl(third, 2))), scale, centre));
            }
        }
    }
}

#[inline(always)]
unsafe fn q4_k<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let (d, dmin) = (half_at::<L>(p), half_at::<L>(p.add(2)));
        let packed = std::slice::from_raw_parts(p.add(4), 12);
        let table = L::table(&WHOLE);
        let n = 32 / L::W;
        for g in 0..8 {
            let (scale, min) = scale_and_min(packed, g);
            let (scale, min) = (L::splat(d * f32::from(scale)), L::splat(-dmin * f32::from(min)));
            for v in 0..n {
                let q = L::shr(L::load_u8(p.add(16 + g / 2 * 32 + v * L::W)), g as u32 % 2 * 4);
                sink.take(g * n + v, L::fma(L::lookup(table, q), scale, min));
            }
        }
    }
}

#[inline(always)]
unsafe fn q5_k<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let (d, dmin) = (half_at::<L>(p), half_at::<L>(p.add(2)));
        let packed = std::slice::from_raw_parts(p.add(4), 12);
        let n = 32 / L::W;
        for g in 0..8 {
            let (scale, min) = scale_and_min(packed, g);
            let (scale, min) = (L::splat(d * f32::from(scale)), L::splat(-dmin * f32::from(min)));
            for v in 0..n {
                let low = L::shr(L::load_u8(p.add(48 + g / 2 * 32 + v * L::W)), g as u32 % 2 * 4);
                let fifth = L::and(L::shr(L::load_u8(p.add(16 + v * L::W)), g as u32), 1);
                let q = L::or(L::and(low, 15), L::shl(fifth, 4));
                sink.take(g * n + v, L::fma(L::to_float(q), scale, min));
            }
        }
    }
}

#[inline(always)]
unsafe fn q6_k<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let d = half_at::<L>(p.add(208));
        let n = 16 / L::W;
        // Sixteen weights share a scale: two sixteenths of each part of 32, four parts of each half.
        for sixteenth in 0..16 {
            let (half, part, side) = (sixteenth / 8, sixteenth % 8 / 2, sixteenth % 2);
            let scale = d * f32::from(*p.add(192 + sixteenth) as i8);
            let (scale, centre) = (L::splat(scale), L::splat(-32.0 * scale));
            for v in 0..n {
                let byte = side * 16 + v * L::W;
                let low = L::load_u8(p.add(half * 64 + part % 2 * 32 + byte));
                let high = L::load_u8(p.add(128 + half * 32 + byte));
                let low = L::and(L::shr(low, part as u32 / 2 * 4), 15);
                let high = L::shl(L::and(L::shr(high, part as u32 * 2), 3), 4);
                sink.take(sixteenth * n + v, L::fma(L::to_float(L::or(low, high)), scale, centre));
            }
        }
    }
}
