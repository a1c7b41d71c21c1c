//! Activations in whole steps: x = step * y, y in one or two signed bytes, the step chosen for each group of columns; the bytes in the order
//! in which the weights come out of their panels.

use super::{
    layout::{Layout, Order},
    lying::View,
    sixteen::{Job, Sixteen, dispatch},
};
use crate::kernels::cpu::{lanes::Isa, team::each_chunk_of_two, unwritten::unwritten};

/// Tokens that are worth a task of their own.
const MANY: usize = 16;

/// Some tokens.
pub(super) struct Rounded {
    /// For each token: the first bytes of all columns, then the second ones; or both at once, where the processor wants 16-bit numbers.
    bytes: Vec<i8>,
    /// For each token and group.
    beside: Vec<Beside>,
    /// Bytes of a plane of one token.
    pitch: usize,
    planes: usize,
    groups: usize,
}

/// What a group of one token has besides its bytes.
#[derive(Clone, Copy)]
pub(super) struct Beside {
    /// What a sum is begun with, so that the weights' zero counts as nothing.
    pub(super) offset: i32,
    /// What a step is worth.
    pub(super) step: f32,
    /// The sum of the activations, rounded, which meets the bias.
    pub(super) sum: f32,
}

/// One token's.
#[derive(Clone, Copy)]
pub(super) struct Token {
    pub(super) bytes: *const i8,
    pub(super) beside: *const Beside,
}

impl Rounded {
    /// `x` is `[tokens, cols]`; only products with the same instruction set can read what comes of it.
    pub(super) fn new(isa: Isa, panels: &View<'_>, x: &[f32]) -> Self {
        let (layout, cols) = (panels.layout, panels.cols);
        let (tokens, groups, planes) = (x.len() / cols, cols / layout.group, layout.planes());
        let pitch = cols.next_multiple_of(64);
        let mut all = Self {
            // SAFETY: written token by token below, and read after that.
            bytes: unsafe { unwritten(tokens * planes * pitch) },
            beside: vec![Beside { offset: 0, step: 0.0, sum: 0.0 }; tokens * groups],
            pitch,
            planes,
            groups,
        };
        let (most, beside) = (MANY * planes * pitch, MANY * groups);
        each_chunk_of_two((&mut all.bytes, most), (&mut all.beside, beside), |i, bytes, beside| {
            let tokens = bytes.chunks_exact_mut(planes * pitch).zip(beside.chunks_exact_mut(groups));
            for ((bytes, beside), x) in tokens.zip(x.chunks_exact(cols).skip(i * MANY)) {
                if pitch > cols {
                    bytes.fill(0);
                }
                // SAFETY: a token's room is as its layout wants it; who names an instruction set has it.
                unsafe { dispatch(isa, Line { layout, x, beside, bytes, pitch }) };
            }
        });
        all
    }

    /// Token `t`; pointers are good while `self` is.
    pub(super) fn token(&self, t: usize) -> Token {
        Token {
            bytes: self.bytes[t * self.planes * self.pitch..].as_ptr(),
            beside: self.beside[t * self.groups..].as_ptr(),
        }
    }

    /// From a token's first bytes to its second ones.
    pub(super) fn pitch(&self) -> usize {
        self.pitch
    }
}

/// One token on its way.
struct Line<'a> {
    layout: Layout,
    x: &'a [f32],
    beside: &'a mut [Beside],
    bytes: &'a mut [i8],
    pitch: usize,
}

impl Job for Line<'_> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Sixteen>(self) {
        // SAFETY: passed on to the caller.
        unsafe {
            match self.layout.planes() {
                1 => self.round::<S, 1>(),
                _ => self.round::<S, 2>(),
            }
        }
    }
}

impl Line<'_> {
    #[inline(always)]
    unsafe fn round<S: Sixteen, const BYTES: usize>(self) {
        // The first byte never overflows.
        let most = if BYTES == 1 { 127.0 } else { 127.0 * 256.0 };
        let layout = self.layout;
        let vectors = layout.group / 16;
        // Where bytes of weights are signed, those of eight bits are 128 less.
        let zero = if S::SIGNED && layout.bits == 8 { layout.zero - 128 } else { layout.zero };
        for (g, (x, beside)) in self.x.chunks_exact(layout.group).zip(self.beside).enumerate() {
            // SAFETY: a group is whole vectors of `x`, and there are as many bytes.
            unsafe {
                let (mut peaks, mut strays) = (S::splat_f32(0.0), S::splat_f32(0.0));
                for v in 0..vectors {
                    let x = S::load_f32(x.as_ptr().add(16 * v));
                    let magnitude = S::as_float(S::and(S::as_whole(x), S::splat(i32::MAX)));
                    peaks = S::max(magnitude, peaks);
                    strays = S::fma(x, S::splat_f32(0.0), strays);
                }
                let peak = S::peak(peaks);
                let per_step = S::splat_f32(if peak > 0.0 { most / peak } else { 0.0 });
                // What is infinite or no number at all must not come out as a number: 0 times it is none.
                let worth = peak / most + S::sum(strays);
                let mut total = S::splat(0);
                for v in 0..vectors {
                    let whole = S::to_whole(S::mul(S::load_f32(x.as_ptr().add(16 * v)), per_step));
                    total = S::add(total, whole);
                    let column = g * layout.group + 16 * v;
                    let to = self.bytes.as_mut_ptr().add(column);
                    if BYTES == 1 {
                        S::store_bytes(to, whole);
                    } else if S::SHORTS {
                        S::store_shorts(to.add(column), whole);
                    } else {
                        S::store_bytes(to, S::sar::<8>(S::add(whole, S::splat(128))));
                        // What the first byte leaves over are the last eight bits.
                        S::store_bytes(to.add(self.pitch), whole);
                    }
                }
                let total = S::total(total);
                *beside = Beside {
                    offset: total.wrapping_mul(-zero),
                    step: worth * layout.unit,
                    // Of what is multiplied, not of what was meant: then a rounding counts by the weight, not by its two parts, which are
                    // larger.
                    sum: total as f32 * worth,
                };
            }
        }
        // SAFETY: planes are whole vectors.
        unsafe { turn::<S>(layout, self.bytes) };
    }
}

/// Brings columns from their own order into that of the pieces.
#[inline(always)]
unsafe fn turn<S: Sixteen>(layout: Layout, bytes: &mut [i8]) {
    let turned = match (layout.order, layout.bits) {
        (_, 8) | (Order::Straight, _) => return,
        (Order::Halves, _) => [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        (Order::InTurns, 4) => [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15],
        (Order::InTurns, _) => [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15],
    };
    // SAFETY: chunks of 64 bytes, and bytes of sixteen.
    unsafe {
        let turned = S::quarters(&turned);
        for line in bytes.as_chunks_mut::<64>().0 {
            let line = line.as_mut_ptr().cast();
            let v = S::load(line);
            S::store(line, if layout.order == Order::Halves { S::weave(v) } else { S::shuffle(v, turned) });
        }
    }
}
