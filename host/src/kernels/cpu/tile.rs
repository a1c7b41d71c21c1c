//! Dot products of all rows of one f32 block with all rows of another, both contiguous along the summed axis: the inner half
//! of prefill. A tile of sums stays in registers while both sides stream by; each sum is one vector that runs from the first
//! element to the last, which is what makes results independent of the tile's shape.

use super::lanes::{Isa, Job, Lanes, dispatch};

/// Rows of f32, `stride` floats apart.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub(super) data: *const f32,
    pub(super) stride: usize,
    pub(super) rows: usize,
}

/// out[b * pitch + a] = a · b, over `len` elements, a multiple of 16.
///
/// # Safety
/// Both blocks have `len` elements in each row, `out` has room, and `isa` is available.
pub(super) unsafe fn multiply(isa: Isa, a: Block, b: Block, len: usize, out: *mut f32, pitch: usize) {
    // SAFETY: passed on to the caller.
    unsafe { dispatch(isa, Multiply { a, b, len, out, pitch }) }
}

pub(super) struct Multiply {
    pub(super) a: Block,
    pub(super) b: Block,
    pub(super) len: usize,
    pub(super) out: *mut f32,
    pub(super) pitch: usize,
}

impl Multiply {
    /// Rows `a .. a + A` with rows `b .. b + B`.
    #[inline(always)]
    unsafe fn tile<L: Lanes, const A: usize, const B: usize>(&self, a: usize, b: usize) {
        // SAFETY: passed on to the caller of `multiply`.
        unsafe {
            let from_a = self.a.data.add(a * self.a.stride);
            let from_b = self.b.data.add(b * self.b.stride);
            let mut sums = [[L::splat(0.0); B]; A];
            let mut k = 0;
            while k < self.len {
                let mut left = [L::splat(0.0); A];
                for i in 0..A {
                    left[i] = L::load(from_a.add(i * self.a.stride + k));
                }
                for j in 0..B {
                    let right = L::load(from_b.add(j * self.b.stride + k));
                    for i in 0..A {
                        sums[i][j] = L::fma(left[i], right, sums[i][j]);
                    }
                }
                k += L::W;
            }
            for (i, sums) in sums.iter().enumerate() {
                for (j, &sum) in sums.iter().enumerate() {
                    *self.out.add((b + j) * self.pitch + a + i) = L::sum(sum);
                }
            }
        }
    }

    /// All rows of `a` with `B` rows of `b`.
    #[inline(always)]
    unsafe fn column<L: Lanes, const A: usize, const B: usize>(&self, b: usize) {
        let mut a = 0;
        // SAFETY: passed on to the caller of `multiply`.
        unsafe {
            while a + A <= self.a.rows {
                self.tile::<L, A, B>(a, b);
                a += A;
            }
            while a < self.a.rows {
                self.tile::<L, 1, B>(a, b);
                a += 1;
            }
        }
    }
}

impl Job for Multiply {
    type Out = ();
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut b = 0;
        // SAFETY: passed on to the caller of `multiply`.
        unsafe {
            while L::WIDE && b + 6 <= self.b.rows {
                self.column::<L, 4, 6>(b);
                b += 6;
            }
            while b + 3 <= self.b.rows {
                self.column::<L, 4, 3>(b);
                b += 3;
            }
            while b < self.b.rows {
                self.column::<L, 4, 1>(b);
                b += 1;
            }
        }
    }
}
