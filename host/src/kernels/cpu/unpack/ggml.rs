//! GGUF blocks with kernels of their own: Q4_0, Q4_1, Q8_0, Q4_K, Q6_K. Blocks hold their scales, so a chunk is a block, and
//! vectors come out in the order of the weights. Layouts: see `dequantize/ggml.rs`.

use super::super::{dequantize::scale_and_min, lanes::Lanes};
use super::{Raw, Sink, Unpack};

/// One f16 inside a block.
#[inline(always)]
unsafe fn half_at<L: Lanes>(p: *const u8) -> f32 {
    // SAFETY: the caller vouches for two bytes at `p`.
    unsafe { L::half(u16::from_le_bytes(p.cast::<[u8; 2]>().read_unaligned())) }
}

const WHOLE: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
const CENTRED: [f32; 16] = [-8., -7., -6., -5., -4., -3., -2., -1., 0., 1., 2., 3., 4., 5., 6., 7.];

/// Writes an unpacker whose chunk is a block of `$bytes` bytes with `$weights` weights.
macro_rules! blocks {
    ($($(#[$doc:meta])* $name:ident = $weights:literal weights in $bytes:literal bytes, $chunk:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy)]
        pub(in super::super) struct $name(pub(in super::super) Raw);

        impl Unpack for $name {
            type Row = *const u8;

            fn vectors<L: Lanes>(&self) -> usize {
                $weights / L::W
            }
            fn chunks<L: Lanes>(&self) -> usize {
                self.0.cols / $weights
            }
            #[inline(always)]
            unsafe fn row<L: Lanes>(&self, r: usize, _: *mut f32) -> *const u8 {
                // SAFETY: passed on to the caller.
                unsafe { self.0.row(r) }
            }
            #[inline(always)]
            unsafe fn chunk<L: Lanes, S: Sink<L>>(&self, row: *const u8, c: usize, sink: &mut S) {
                // SAFETY: the row has a block for every chunk.
                unsafe { $chunk::<L, S>(row.add(c * $bytes), sink) }
            }
        }
    )*};
}

blocks! {
    /// w = d (q - 8)
    Q4_0 = 32 weights in 18 bytes, q4_0;
    /// w = d q + m
    Q4_1 = 32 weights in 20 bytes, q4_1;
    /// w = d q
    Q8_0 = 32 weights in 34 bytes, q8_0;
    /// w = d scale q - dmin min
    Q4K = 256 weights in 144 bytes, q4_k;
    /// w = d scale (q - 32)
    Q6K = 256 weights in 210 bytes, q6_k;
}

// SAFETY of the functions below: the caller vouches for one whole block at `p`.

#[inline(always)]
unsafe fn q4_0<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let d = L::splat(half_at::<L>(p));
        let table = L::table(&CENTRED);
        let n = 16 / L::W;
        for v in 0..n {
            let q = L::load_u8(p.add(2 + v * L::W));
            sink.take(v, L::mul(L::lookup(table, q), d));
        }
        for v in 0..n {
            let q = L::load_u8(p.add(2 + v * L::W));
            sink.take(n + v, L::mul(L::lookup(table, L::shr(q, 4)), d));
        }
    }
}

#[inline(always)]
unsafe fn q4_1<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let (d, m) = (L::splat(half_at::<L>(p)), L::splat(half_at::<L>(p.add(2))));
        let table = L::table(&WHOLE);
        let n = 16 / L::W;
        for v in 0..n {
            let q = L::load_u8(p.add(4 + v * L::W));
            sink.take(v, L::fma(L::lookup(table, q), d, m));
        }
        for v in 0..n {
            let q = L::load_u8(p.add(4 + v * L::W));
            sink.take(n + v, L::fma(L::lookup(table, L::shr(q, 4)), d, m));
        }
    }
}

#[inline(always)]
unsafe fn q8_0<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let d = L::splat(half_at::<L>(p));
        for v in 0..32 / L::W {
            sink.take(v, L::mul(L::to_float(L::load_i8(p.add(2 + v * L::W))), d));
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
