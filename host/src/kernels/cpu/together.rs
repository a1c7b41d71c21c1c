//! Several products of the same activations, as one where the weights are of one kind: activations are rounded once, and threads share the
//! rows of all, so that they meet once. The bits are those of single products.

#[cfg(target_arch = "x86_64")]
use super::bf16::{self, Halves};
use super::{Coded, Matrix, Panels, panels, team::each_chunk, unwritten::unwritten};

/// A matrix of weights.
#[derive(Clone, Copy)]
pub enum Factor<'a> {
    /// Row after row.
    Rows(&'a Matrix),
    /// Sixteen rows after sixteen rows.
    Panels(&'a Panels),
    /// bfloat16 in fewer bits.
    Coded(&'a Coded),
}

impl Factor<'_> {
    /// x · Wᵀ: `x` is `[tokens, cols]`, what comes `[tokens, rows]`.
    ///
    /// # Panics
    /// If `x` is not as long as some tokens.
    pub fn times(self, x: &[f32]) -> Vec<f32> {
        let (rows, cols) = match self {
            Factor::Rows(m) => (m.rows(), m.cols()),
            Factor::Panels(m) => (m.rows(), m.cols()),
            Factor::Coded(m) => (m.rows(), m.cols()),
        };
        // SAFETY: a product writes all its rows for all tokens, and reads none of them.
        let mut out = unsafe { unwritten(x.len() / cols.max(1) * rows) };
        match self {
            Factor::Rows(m) => m.matmul(x, &mut out),
            Factor::Panels(m) => m.matmul(x, &mut out),
            Factor::Coded(m) => m.matmul(x, &mut out),
        }
        out
    }
}

/// out = x · Wᵀ for each of `of`, all of the same columns: `x` is `[tokens, cols]`, an `out` `[tokens, rows]`.
///
/// # Panics
/// If the lengths of `x` and an `out` do not belong to the same number of tokens.
pub fn multiply_all(of: Vec<(Factor<'_>, &mut [f32])>, x: &[f32]) {
    let mut rest = of.into_iter().peekable();
    while let Some((first, out)) = rest.next() {
        #[cfg(target_arch = "x86_64")]
        if let Some(first) = halves(first) {
            let checked = |m: Halves<'_>, out: &[f32]| _ = checked(&m, m.rows(), m.cols(), x, out);
            let fits = |factor| halves(factor).filter(|next| next.cols() == first.cols());
            checked(first, out);
            let mut alike = vec![(first, out)];
            while let Some((next, out)) = rest.next_if(|&(next, _)| fits(next).is_some()) {
                if let Some(next) = fits(next) {
                    checked(next, out);
                    alike.push((next, out));
                }
            }
            bf16::multiply(&mut alike, x);
            continue;
        }
        match first {
            Factor::Panels(first) => {
                let mut alike = vec![(checked(first, first.rows(), first.cols(), x, out), out)];
                while let Some((Factor::Panels(next), out)) =
                    rest.next_if(|(f, _)| matches!(f, Factor::Panels(next) if next.rounds_like(first)))
                {
                    alike.push((checked(next, next.rows(), next.cols(), x, out), out));
                }
                panels::multiply(&mut alike, x);
            }
            Factor::Rows(m) => m.matmul(x, out),
            Factor::Coded(m) => m.multiply_plainly(x, out),
        }
    }
}

/// Weights of bfloat16 that are multiplied as such.
#[cfg(target_arch = "x86_64")]
fn halves(factor: Factor<'_>) -> Option<Halves<'_>> {
    match factor {
        Factor::Rows(m) if m.multiplies_in_halves() && !m.has_column_order() => Some(Halves::Rows(m)),
        Factor::Coded(m) => Some(Halves::Coded(m)),
        _ => None,
    }
}

/// out = x · Wᵀ for each of `of`, matrices of one shape, with activations of its own: `x` is `[matrices, tokens, cols]`, `out`
/// `[matrices, tokens, rows]`. Threads take a matrix each.
///
/// # Panics
/// If the lengths of `x` and `out` do not belong to the same number of tokens.
pub fn multiply_each(of: &[Matrix], x: &[f32], out: &mut [f32]) {
    let (x_size, size) = (x.len() / of.len().max(1), out.len() / of.len().max(1));
    if x_size > 0 && size > 0 {
        each_chunk(out, size, |i, out| of[i].matmul(&x[i * x_size..(i + 1) * x_size], out));
    }
}

/// `of`, once lengths are known to fit.
fn checked<'m, M: std::fmt::Debug>(of: &'m M, rows: usize, cols: usize, x: &[f32], out: &[f32]) -> &'m M {
    let tokens = x.len() / cols.max(1);
    assert!(
        x.len() == tokens * cols && out.len() == tokens * rows,
        "matmul: {} inputs and {} outputs for {of:?}",
        x.len(),
        out.len()
    );
    of
}
