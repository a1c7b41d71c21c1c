//! Sixteen rows' numbers out of a step of their strips, as unsigned bytes: four columns a vector. Planes of bits are joined by shifts that are
//! the same for all bytes, so bits that cross into a neighbour are masked away.

use super::sixteen::Sixteen;

/// Times a byte: that byte four times.
const EACH: i32 = 0x0101_0101;

/// Takes numbers out of their strips, some columns of sixteen rows at a step.
///
/// # Safety
/// Asks for what [`Sixteen`] asks for, and for strips that have the step.
pub(super) trait Numbers: Copy + Sync {
    /// Columns of a step, at most 32.
    const COLUMNS: usize;
    /// Vectors of a step: four columns each.
    const VECTORS: usize = Self::COLUMNS / 4;
    /// Bytes of an activation that they meet.
    const BYTES: usize;
    /// Bytes of a step in the strip of low bits.
    const LOW: usize;
    /// Whether they are bytes as they lie there, so that nothing is gained by taking them out beforehand.
    const WHOLE: bool = false;
    /// Where a step begins in the strip of high bits.
    #[inline(always)]
    fn high(_step: usize) -> usize {
        0
    }
    /// Of the returned vectors the first `VECTORS` count. `low` and `high` are where the step begins.
    unsafe fn vectors<S: Sixteen>(self, low: *const u8, high: *const u8, step: usize) -> [S::I; 8];
}

/// Eight bits each.
#[derive(Clone, Copy)]
pub(super) struct Eight;

impl Numbers for Eight {
    const COLUMNS: usize = 16;
    const BYTES: usize = 2;
    const LOW: usize = 256;
    const WHOLE: bool = true;
    #[inline(always)]
    unsafe fn vectors<S: Sixteen>(self, low: *const u8, _: *const u8, _: usize) -> [S::I; 8] {
        // SAFETY: the caller vouches, here and below.
        unsafe {
            let [a, b, c, d] = four::<S>(low);
            let d = S::eight(d);
            [S::eight(a), S::eight(b), S::eight(c), d, d, d, d, d]
        }
    }
}

#[inline(always)]
unsafe fn four<S: Sixteen>(low: *const u8) -> [S::I; 4] {
    // SAFETY: as above.
    unsafe { [S::load(low), S::load(low.add(64)), S::load(low.add(128)), S::load(low.add(192))] }
}

/// Numbers that have been taken out before.
#[derive(Clone, Copy)]
pub(super) struct Taken<const BYTES: usize>;

impl<const BYTES: usize> Numbers for Taken<BYTES> {
    const COLUMNS: usize = 16;
    const BYTES: usize = BYTES;
    const LOW: usize = 256;
    #[inline(always)]
    unsafe fn vectors<S: Sixteen>(self, low: *const u8, _: *const u8, _: usize) -> [S::I; 8] {
        // SAFETY: as above.
        unsafe {
            let [a, b, c, d] = four::<S>(low);
            [a, b, c, d, d, d, d, d]
        }
    }
}

/// Two bits each.
#[derive(Clone, Copy)]
pub(super) struct Quarters;

/// The four pairs of bits of each byte.
#[inline(always)]
unsafe fn quarters<S: Sixteen>(low: *const u8) -> [S::I; 4] {
    // SAFETY: as above.
    unsafe {
        let (piece, mask) = (S::load(low), S::splat(EACH * 3));
        [
            S::and(piece, mask),
            S::and(S::shr16::<2>(piece), mask),
            S::and(S::shr16::<4>(piece), mask),
            S::and(S::shr16::<6>(piece), mask),
        ]
    }
}

impl Numbers for Quarters {
    const COLUMNS: usize = 16;
    const BYTES: usize = 1;
    const LOW: usize = 64;
    #[inline(always)]
    unsafe fn vectors<S: Sixteen>(self, low: *const u8, _: *const u8, _: usize) -> [S::I; 8] {
        // SAFETY: as above.
        unsafe {
            let [a, b, c, d] = quarters::<S>(low);
            [a, b, c, d, d, d, d, d]
        }
    }
}

/// Three bits each, the third in a plane of its own.
#[derive(Clone, Copy)]
pub(super) struct Three;

impl Numbers for Three {
    const COLUMNS: usize = 16;
    const BYTES: usize = 1;
    const LOW: usize = 64;
    #[inline(always)]
    fn high(step: usize) -> usize {
        step / 2 * 64
    }
    #[inline(always)]
    unsafe fn vectors<S: Sixteen>(self, low: *const u8, high: *const u8, step: usize) -> [S::I; 8] {
        // SAFETY: as above.
        unsafe {
            let [a, b, c, d] = quarters::<S>(low);
            // The lower or the upper four bits of each byte.
            let high = S::load(high);
            let thirds = S::shr16_by(high, (step % 2 * 4) as i32);
            let third = S::splat(EACH * 4);
            let a = S::or_masked(a, S::shl16::<2>(thirds), third);
            let b = S::or_masked(b, S::shl16::<1>(thirds), third);
            let c = S::or_masked(c, thirds, third);
            let d = S::or_masked(d, S::shr16::<1>(thirds), third);
            [a, b, c, d, d, d, d, d]
        }
    }
}

/// Four bits each.
#[derive(Clone, Copy)]
pub(super) struct Nibbles;

/// The two halves of each byte.
#[inline(always)]
unsafe fn nibbles<S: Sixteen>(low: *const u8) -> [S::I; 2] {
    // SAFETY: as above.
    unsafe {
        let (piece, mask) = (S::load(low), S::splat(EACH * 15));
        [S::and(piece, mask), S::and(S::shr16::<4>(piece), mask)]
    }
}

impl Numbers for Nibbles {
    const COLUMNS: usize = 8;
    const BYTES: usize = 1;
    const LOW: usize = 64;
    #[inline(always)]
    unsafe fn vectors<S: Sixteen>(self, low: *const u8, _: *const u8, _: usize) -> [S::I; 8] {
        // SAFETY: as above.
        unsafe {
            let [a, b] = nibbles::<S>(low);
            [a, b, b, b, b, b, b, b]
        }
    }
}

/// Four bits each, of E2M1: twice the value plus 12.
#[derive(Clone, Copy)]
pub(super) struct E2m1;

impl Numbers for E2m1 {
    const COLUMNS: usize = 8;
    const BYTES: usize = 1;
    const LOW: usize = 64;
    #[inline(always)]
    unsafe fn vectors<S: Sixteen>(self, low: *const u8, _: *const u8, _: usize) -> [S::I; 8] {
        // SAFETY: as above.
        unsafe {
            let values = S::quarters(&[12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0]);
            let [a, b] = nibbles::<S>(low);
            let (a, b) = (S::shuffle(values, a), S::shuffle(values, b));
            [a, b, b, b, b, b, b, b]
        }
    }
}

/// Five bits each, the fifth in a plane of its own.
#[derive(Clone, Copy)]
pub(super) struct Five;

impl Numbers for Five {
    const COLUMNS: usize = 32;
    const BYTES: usize = 2;
    const LOW: usize = 256;
    #[inline(always)]
    fn high(step: usize) -> usize {
        step * 64
    }
    #[inline(always)]
    unsafe fn vectors<S: Sixteen>(self, low: *const u8, high: *const u8, _: usize) -> [S::I; 8] {
        // SAFETY: as above.
        unsafe {
            let h = S::load(high);
            let fifth = S::splat(EACH * 16);
            let ([a, b], [c, d]) = (nibbles::<S>(low), nibbles::<S>(low.add(64)));
            let ([e, f], [g, i]) = (nibbles::<S>(low.add(128)), nibbles::<S>(low.add(192)));
            [
                S::or_masked(a, S::shl16::<4>(h), fifth),
                S::or_masked(b, S::shl16::<3>(h), fifth),
                S::or_masked(c, S::shl16::<2>(h), fifth),
                S::or_masked(d, S::shl16::<1>(h), fifth),
                S::or_masked(e, h, fifth),
                S::or_masked(f, S::shr16::<1>(h), fifth),
                S::or_masked(g, S::shr16::<2>(h), fifth),
                S::or_masked(i, S::shr16::<3>(h), fifth),
            ]
        }
    }
}

/// Six bits each, the upper two in a plane of their own.
#[derive(Clone, Copy)]
pub(super) struct Six;

impl Numbers for Six {
    const COLUMNS: usize = 16;
    const BYTES: usize = 2;
    const LOW: usize = 128;
    #[inline(always)]
    fn high(step: usize) -> usize {
        step * 64
    }
    #[inline(always)]
    unsafe fn vectors<S: Sixteen>(self, low: *const u8, high: *const u8, _: usize) -> [S::I; 8] {
        // SAFETY: as above.
        unsafe {
            let h = S::load(high);
            let upper = S::splat(EACH * 48);
            let ([a, b], [c, d]) = (nibbles::<S>(low), nibbles::<S>(low.add(64)));
            let a = S::or_masked(a, S::shl16::<4>(h), upper);
            let b = S::or_masked(b, S::shl16::<2>(h), upper);
            let c = S::or_masked(c, h, upper);
            let d = S::or_masked(d, S::shr16::<2>(h), upper);
            [a, b, c, d, d, d, d, d]
        }
    }
}
