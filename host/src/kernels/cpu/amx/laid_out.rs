//! What the unit multiplies, laid out for it: activations once a product, weights as they are needed.

use super::tiles::TILE;
use crate::kernels::cpu::{bf16, turned::turned};
use std::arch::x86_64::*;

/// Columns of a step: a tile's row.
pub(super) const STEP: usize = 32;
/// Rows, or tokens, of two tiles.
pub(in crate::kernels::cpu) const PAIR: usize = 2 * TILE;

/// A step of a row.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Line(pub(super) [u16; STEP]);

/// Up to sixteen tokens' activations as pairs of bfloat16: the first pairs of all tokens, then the second ones.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn lay_out(x: &[f32], cols: usize, to: &mut [u32]) {
    let tokens = x.len() / cols;
    if tokens < TILE {
        let mut token = vec![0u16; 2 * to.len() / tokens];
        for (t, x) in x.chunks_exact(cols).enumerate() {
            // SAFETY: a whole number of steps, which are two of sixteen columns.
            unsafe { bf16::round(x, &mut token) };
            for (pair, to) in token.as_chunks::<2>().0.iter().zip(to[t..].iter_mut().step_by(tokens)) {
                *to = u32::from(pair[1]) << 16 | u32::from(pair[0]);
            }
        }
        return;
    }
    for (step, to) in to.as_chunks_mut::<{ TILE * TILE }>().0.iter_mut().enumerate() {
        let left = cols - step * STEP;
        let (low, high) = (mask(left), mask(left.saturating_sub(TILE)));
        // SAFETY: masked to what there is of each token.
        unsafe {
            let rounded = std::array::from_fn(|t| {
                let at = x.as_ptr().add(t * cols + step * STEP);
                let low = _mm512_maskz_loadu_ps(low, at);
                let high = _mm512_maskz_loadu_ps(high, at.wrapping_add(TILE));
                std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
            });
            for (i, vector) in turned(rounded).into_iter().enumerate() {
                _mm512_storeu_si512(to.as_mut_ptr().add(TILE * i).cast(), vector);
            }
        }
    }
}

/// The lowest bits.
pub(super) fn mask(of: usize) -> u16 {
    ((1u32 << of.min(TILE)) - 1) as u16
}

/// Weights that are brought side by side while those before them are multiplied, evenly, so that memory never rests: rows one after the
/// other, since memory gives one stream half as much again as many side by side.
pub(super) struct Bring {
    pub(super) from: *const u16,
    /// From one row to the next.
    pub(super) pitch: usize,
    /// What there is of a row; zeros fill its last step.
    pub(super) columns: usize,
    pub(super) to: *mut Line,
    pub(super) rows: usize,
    pub(super) steps: usize,
    /// Row and step.
    pub(super) at: (usize, usize),
    /// Lines at a time.
    pub(super) burst: usize,
}

impl Bring {
    /// Some more lines, if there are.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) unsafe fn lines(&mut self, mut most: usize) {
        let (mut row, mut step) = self.at;
        while most > 0 && row < self.rows {
            let now = most.min(self.steps - step);
            // SAFETY: rows of the matrix, masked to what there is of them; the room is that of all lines.
            unsafe {
                let from = self.from.add(row * self.pitch);
                let to = self.to.add(row / PAIR * PAIR * self.steps + row % PAIR);
                for step in step..step + now {
                    let mask = u32::MAX >> (STEP - (self.columns - step * STEP).min(STEP));
                    let line = _mm512_maskz_loadu_epi16(mask, from.add(step * STEP).cast());
                    _mm512_store_si512(to.add(step * PAIR).cast(), line);
                }
            }
            (most, step) = (most - now, step + now);
            if step == self.steps {
                (row, step) = (row + 1, 0);
            }
        }
        self.at = (row, step);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that bfloat16 holds, each once.
    fn numbers(n: usize) -> Vec<f32> {
        (0..n as u32).map(|i| f32::from_bits((0x3f80 + i) << 16)).collect()
    }

    #[test]
    fn activations_lie_by_pairs_of_columns_whatever_there_is_of_the_last_tile() {
        for (tokens, cols) in [(1, 32), (7, 70), (16, 5), (16, 64), (16, 81)] {
            let (x, depth) = (numbers(tokens * cols), usize::next_multiple_of(cols, STEP));
            let mut pairs = vec![u32::MAX; tokens * depth / 2];
            if !bf16::runs_here() {
                return;
            }
            // SAFETY: `runs_here`, and room for whole steps.
            unsafe { lay_out(&x, cols, &mut pairs) };
            for (i, pair) in pairs.into_iter().enumerate() {
                let (column, t) = (i / tokens * 2, i % tokens);
                let bits = |c: usize| if c < cols { x[t * cols + c].to_bits() >> 16 } else { 0 };
                assert_eq!(pair, bits(column + 1) << 16 | bits(column), "[{tokens}, {cols}], pair {i}");
            }
        }
    }

    #[test]
    fn weights_lie_step_by_step_in_however_many_bursts_they_come() {
        let (rows, cols, first) = (37, 90, 32);
        let steps = usize::div_ceil(cols - first, STEP);
        let weights: Vec<u16> = (1..=(rows * cols) as u16).collect();
        for burst in [1, 3, 1000] {
            let mut lines = vec![Line([u16::MAX; STEP]); rows.next_multiple_of(PAIR) * steps];
            let (from, columns, to) = (weights[first..].as_ptr(), cols - first, lines.as_mut_ptr());
            let mut bring = Bring { from, pitch: cols, columns, to, rows, steps, at: (0, 0), burst };
            if !bf16::runs_here() {
                return;
            }
            while bring.at.0 < rows {
                // SAFETY: `runs_here`; rows of the matrix, and room for them.
                unsafe { bring.lines(burst) };
            }
            for (row, step) in (0..rows * steps).map(|i| (i / steps, i % steps)) {
                let line = lines[(row / PAIR * steps + step) * PAIR + row % PAIR].0;
                let want = |c: usize| if c < cols { weights[row * cols + c] } else { 0 };
                assert!((0..STEP).all(|c| line[c] == want(first + step * STEP + c)), "row {row}, step {step}");
            }
        }
    }
}
