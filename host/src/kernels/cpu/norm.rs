//! Normalisation of rows: RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016), sums in f32 and vector lanes.

use super::lanes::{Isa, Job, Lanes, dispatch};
use super::team::each_chunk;

/// Numbers worth a task of their own.
const TASK: usize = 1 << 14;

/// out = x / sqrt(mean(x²) + eps) * weight, over each row of `dim`; without `weight`, 1.
///
/// # Panics
/// If `x`, `out` and `weight` are not of matching lengths.
pub fn rms_norm(x: &[f32], weight: Option<&[f32]>, eps: f32, dim: usize, out: &mut [f32]) {
    normalize(Norm { weight, bias: None, eps, centred: false }, x, dim, out);
}

/// out = (x - mean) / sqrt(variance + eps) * weight + bias, over each row of `dim`.
///
/// # Panics
/// As [`rms_norm`].
pub fn layer_norm(x: &[f32], weight: Option<&[f32]>, bias: Option<&[f32]>, eps: f32, dim: usize, out: &mut [f32]) {
    normalize(Norm { weight, bias, eps, centred: true }, x, dim, out);
}

#[derive(Clone, Copy)]
struct Norm<'a> {
    weight: Option<&'a [f32]>,
    bias: Option<&'a [f32]>,
    eps: f32,
    centred: bool,
}

fn normalize(norm: Norm<'_>, x: &[f32], dim: usize, out: &mut [f32]) {
    let fits = |w: Option<&[f32]>| w.is_none_or(|w| w.len() == dim);
    assert!(
        dim > 0 && x.len() == out.len() && x.len().is_multiple_of(dim),
        "norm: {} numbers in rows of {dim}",
        x.len()
    );
    assert!(fits(norm.weight) && fits(norm.bias), "norm: weights are not {dim} numbers");
    let isa = Isa::best();
    let task = |(x, out): (&[f32], &mut [f32])| {
        // SAFETY: `isa` is available; lengths were checked.
        unsafe { dispatch(isa, Normalize { norm, x, dim, out }) }
    };
    let chunk = (TASK / dim).max(1) * dim;
    if x.len() <= chunk {
        task((x, out));
    } else {
        each_chunk(out, chunk, |i, out| task((&x[i * chunk..][..out.len()], out)));
    }
}

struct Normalize<'a> {
    norm: Norm<'a>,
    x: &'a [f32],
    dim: usize,
    out: &'a mut [f32],
}

/// Sum of (x - centre), squared or not.
#[inline(always)]
unsafe fn sum<L: Lanes, const SQUARED: bool>(x: &[f32], centre: f32) -> f32 {
    let whole = x.len() - x.len() % L::W;
    // SAFETY: vectors stay inside the slice.
    unsafe {
        let mut sums = L::splat(0.0);
        for i in (0..whole).step_by(L::W) {
            let v = L::sub(L::load(x.as_ptr().add(i)), L::splat(centre));
            sums = if SQUARED { L::fma(v, v, sums) } else { L::add(sums, v) };
        }
        let mut sum = L::sum(sums);
        for &x in &x[whole..] {
            sum += if SQUARED { (x - centre) * (x - centre) } else { x - centre };
        }
        sum
    }
}

impl Job for Normalize<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let whole = self.dim - self.dim % L::W;
        for (x, out) in self.x.chunks_exact(self.dim).zip(self.out.chunks_exact_mut(self.dim)) {
            // SAFETY: vectors stay inside rows of `dim`, which weight and bias are as long as.
            unsafe {
                let centre = if self.norm.centred { sum::<L, false>(x, 0.0) / self.dim as f32 } else { 0.0 };
                let share = 1.0 / (sum::<L, true>(x, centre) / self.dim as f32 + self.norm.eps).sqrt();
                for i in (0..whole).step_by(L::W) {
                    let mut v = L::mul(L::sub(L::load(x.as_ptr().add(i)), L::splat(centre)), L::splat(share));
                    if let Some(weight) = self.norm.weight {
                        v = L::mul(v, L::load(weight.as_ptr().add(i)));
                    }
                    if let Some(bias) = self.norm.bias {
                        v = L::add(v, L::load(bias.as_ptr().add(i)));
                    }
                    L::store(out.as_mut_ptr().add(i), v);
                }
                for i in whole..self.dim {
                    let v = (x[i] - centre) * share * self.norm.weight.map_or(1.0, |w| w[i]);
                    out[i] = v + self.norm.bias.map_or(0.0, |b| b[i]);
                }
            }
        }
    }
}
