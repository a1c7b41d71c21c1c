//! Processors without instructions for products of bytes: there matrices are never laid out in panels.

use super::Panels;

/// Whether this machine has the instructions.
pub(super) fn runs_here() -> bool {
    false
}

impl Panels {
    /// out = x · Wᵀ: `x` is `[tokens, cols]`, `out` `[tokens, rows]`.
    ///
    /// # Panics
    /// If the lengths of `x` and `out` do not belong to the same number of tokens.
    pub fn matmul(&self, x: &[f32], out: &mut [f32]) {
        let mut weights = vec![0.0; self.rows * self.cols];
        self.dequantize(&mut weights);
        for (x, out) in x.chunks_exact(self.cols).zip(out.chunks_exact_mut(self.rows)) {
            for (out, row) in out.iter_mut().zip(weights.chunks_exact(self.cols)) {
                *out = row.iter().zip(x).map(|(w, x)| w * x).sum();
            }
        }
    }
}
