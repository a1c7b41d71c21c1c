//! GGUF blocks of 32. Blocks hold their scales, so a chunk is a block, and vectors come out in the order of the weights.
//! Layouts: see `dequantize/ggml.rs`.

use super::super::lanes::Lanes;
use super::{Raw, Sink, Unpack};

/// One f16 inside a block.
#[inline(always)]
pub(super) unsafe fn half_at<L: Lanes>(p: *const u8) -> f32 {
    // SAFETY: the caller vouches for two bytes at `p`.
    unsafe { L::half(u16::from_le_bytes(p.cast::<[u8; 2]>().read_unaligned())) }
}

/// Four bits as they are.
pub(super) const WHOLE: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
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

pub(super) use blocks;

blocks! {
    /// w = d (q - 8)
    Q4_0 = 32 weights in 18 bytes, q4_0;
    /// w = d q + m
    Q4_1 = 32 weights in 20 bytes, q4_1;
    /// w = d q
    Q8_0 = 32 weights in 34 bytes, q8_0;
    /// w = d (q - 16)
    Q5_0 = 32 weights in 22 bytes, q5_0;
    /// w = d q + m
    Q5_1 = 32 weights in 24 bytes, q5_1;
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
unsafe fn q5_0<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let d = half_at::<L>(p);
        five_bits::<L, S>(p.add(2), L::splat(d), L::splat(-16.0 * d), sink);
    }
}

#[inline(always)]
unsafe fn q5_1<L: Lanes, S: Sink<L>>(p: *const u8, sink: &mut S) {
    // SAFETY: see above.
    unsafe { five_bits::<L, S>(p.add(4), L::splat(half_at::<L>(p)), L::splat(half_at::<L>(p.add(2))), sink) }
}

/// A word of fifth bits, then sixteen bytes: w = d q + m
#[inline(always)]
unsafe fn five_bits<L: Lanes, S: Sink<L>>(p: *const u8, d: L::F, m: L::F, sink: &mut S) {
    // SAFETY: see above.
    unsafe {
        let fifth = u32::from_le_bytes(p.cast::<[u8; 4]>().read_unaligned());
        let n = 16 / L::W;
        for side in 0..2 {
            for v in 0..n {
                let low = L::and(L::shr(L::load_u8(p.add(4 + v * L::W)), side * 4), 15);
                let high = L::shl(L::bits(fifth >> (side as usize * 16 + v * L::W)), 4);
                sink.take(side as usize * n + v, L::fma(L::to_float(L::or(low, high)), d, m));
            }
        }
    }
}
