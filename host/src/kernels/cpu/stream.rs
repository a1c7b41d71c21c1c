//! Rows of packed weights on their way through the registers: added up against activations at once (`Streamed`), or written
//! to memory for a product tile by tile (`Spill`).

use super::{
    lanes::{Job, Lanes},
    unpack::{Sink, Unpack},
};

/// Rows that are read side by side, to keep as many sums in flight.
pub(super) const ABREAST: usize = 4;

/// Columns of a row once it is padded to whole chunks.
pub(super) struct Padded<U>(pub(super) U);

impl<U: Unpack> Job for Padded<U> {
    type Out = usize;
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) -> usize {
        self.0.chunks::<L>() * self.0.vectors::<L>() * L::W
    }
}

/// Some rows times `N` tokens, unpacked in registers.
pub(super) struct Stream<U> {
    pub(super) unpack: U,
    pub(super) range: std::ops::Range<usize>,
    pub(super) x: *const f32,
    pub(super) stride: usize,
    pub(super) out: *mut f32,
    /// From one token's outputs to the next's.
    pub(super) pitch: usize,
    pub(super) scratch: *mut f32,
}

/// The same for a number of tokens that the compiler knows.
pub(super) struct Streamed<U, const N: usize>(pub(super) Stream<U>);

/// Adds to one row's sums.
struct Dots<'a, L: Lanes, const N: usize> {
    sums: &'a mut [L::F; N],
    x: *const f32,
    stride: usize,
}

impl<L: Lanes, const N: usize> Sink<L> for Dots<'_, L, N> {
    #[inline(always)]
    unsafe fn take(&mut self, at: usize, weights: L::F) {
        for t in 0..N {
            // SAFETY: activations are padded like the weights.
            unsafe { self.sums[t] = L::fma(weights, L::load(self.x.add(t * self.stride + at * L::W)), self.sums[t]) };
        }
    }
}

impl<U: Unpack, const N: usize> Streamed<U, N> {
    #[inline(always)]
    unsafe fn rows<L: Lanes, const R: usize>(&self, first: usize) {
        let s = &self.0;
        // SAFETY: the job's pointers are vouched for by its maker.
        unsafe {
            let mut rows = [s.unpack.row::<L>(first, s.scratch); R];
            for (i, row) in rows.iter_mut().enumerate().skip(1) {
                *row = s.unpack.row::<L>(first + i, s.scratch.add(i * s.unpack.scratch()));
            }
            let mut sums = [[L::splat(0.0); N]; R];
            let vectors = s.unpack.vectors::<L>();
            for c in 0..s.unpack.chunks::<L>() {
                let x = s.x.add(c * vectors * L::W);
                for i in 0..R {
                    s.unpack.chunk::<L, _>(rows[i], c, &mut Dots::<L, N> { sums: &mut sums[i], x, stride: s.stride });
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                for (t, &sum) in sums.iter().enumerate() {
                    *s.out.add(t * s.pitch + first + i) = L::sum(sum);
                }
            }
        }
    }
}

impl<U: Unpack, const N: usize> Job for Streamed<U, N> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut r = self.0.range.start;
        while r < self.0.range.end {
            let abreast = self.0.range.end - r >= ABREAST;
            // SAFETY: rows of the range, pointers of the job's maker.
            unsafe { if abreast { self.rows::<L, ABREAST>(r) } else { self.rows::<L, 1>(r) } };
            r += if abreast { ABREAST } else { 1 };
        }
    }
}

/// Unpacks rows into memory, in the unpacker's order.
pub(super) struct Spill<U> {
    pub(super) unpack: U,
    pub(super) range: std::ops::Range<usize>,
    pub(super) to: *mut f32,
    pub(super) stride: usize,
    pub(super) scratch: *mut f32,
}

struct Store(*mut f32);

impl<L: Lanes> Sink<L> for Store {
    #[inline(always)]
    unsafe fn take(&mut self, at: usize, weights: L::F) {
        // SAFETY: the row has room for all its chunks.
        unsafe { L::store(self.0.add(at * L::W), weights) }
    }
}

impl<U: Unpack> Job for Spill<U> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for (i, r) in self.range.enumerate() {
            // SAFETY: rows of the range, pointers of the job's maker.
            unsafe {
                let row = self.unpack.row::<L>(r, self.scratch);
                for c in 0..self.unpack.chunks::<L>() {
                    let to = self.to.add(i * self.stride + c * self.unpack.vectors::<L>() * L::W);
                    self.unpack.chunk::<L, _>(row, c, &mut Store(to));
                }
            }
        }
    }
}
