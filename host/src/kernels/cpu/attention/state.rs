//! What has been summed up of a softmax so far, and how two such sums become one. Rows are queries: tokens x heads of a group.

use super::super::lanes::{Job, Lanes, exp};

/// Sums of some rows, in memory of the caller's.
pub(super) struct State<'a> {
    /// Largest score of each row; -inf until a key is seen.
    pub(super) peak: &'a mut [f32],
    /// Sum of exp(score - peak).
    pub(super) mass: &'a mut [f32],
    /// Sum of exp(score - peak) * value, `[rows, width]`.
    pub(super) sum: &'a mut [f32],
    /// Value lanes, padded to whole vectors.
    pub(super) width: usize,
}

impl<'a> State<'a> {
    /// Floats that `rows` take.
    pub(super) fn room(rows: usize, width: usize) -> usize {
        rows * (width + 2)
    }

    /// Rows in `room` as it is: cleared, or what was summed there.
    pub(super) fn of(room: &'a mut [f32], rows: usize, width: usize) -> Self {
        let (peak, rest) = room.split_at_mut(rows);
        let (mass, sum) = rest.split_at_mut(rows);
        Self { peak, mass, sum, width }
    }

    /// Nothing has been seen.
    pub(super) fn clear(&mut self) {
        self.peak.fill(f32::NEG_INFINITY);
        self.mass.fill(0.0);
        self.sum.fill(0.0);
    }
}

/// Adds to `into` what another stretch of keys, later in order, gave for the same queries.
pub(super) struct Merge<'a, 'b> {
    pub(super) into: &'a mut State<'b>,
    pub(super) from: &'a State<'b>,
}

impl Job for Merge<'_, '_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let (into, from) = (self.into, self.from);
        let width = into.width;
        for r in 0..into.peak.len() {
            let (a, b) = (into.peak[r], from.peak[r]);
            if b == f32::NEG_INFINITY {
                continue;
            }
            // One of the two stays as it is; the other one fades.
            let later = b > a;
            // SAFETY: a row has `width` sums, whole vectors.
            unsafe {
                let fade = exp::<L>(L::splat(if later { a - b } else { b - a }));
                let one = L::splat(1.0);
                let (old, new) = if later { (fade, one) } else { (one, fade) };
                let (to, by) = (into.sum.as_mut_ptr().add(r * width), from.sum.as_ptr().add(r * width));
                for i in (0..width).step_by(L::W) {
                    L::store(to.add(i), L::fma(L::load(to.add(i)), old, L::mul(L::load(by.add(i)), new)));
                }
                into.mass[r] = into.mass[r] * L::peak(old) + from.mass[r] * L::peak(new);
            }
            into.peak[r] = a.max(b);
        }
    }
}
