//! Attention over a bfloat16 cache as bfloat16, 32 products an instruction (`vdpbf16ps`): queries and softmax weights are rounded to it
//! too, half a unit in their eighth bit; scores, the weights' mass and all sums stay f32.
//!
//! A block of keys is laid out once for all rows: by pairs of dimensions for the scores, by pairs of keys for the values, so that sums are
//! never added up across a vector. Each sum runs from the first pair to the last, whatever rows share a tile.

use super::{
    block::{KEYS, Slopes},
    state::State,
};
use std::arch::x86_64::*;

pub(super) use super::super::bf16::runs_here;

/// Rows of a tile: their sums fill the register file.
const TILE: usize = 6;
/// Vectors of scores of a block.
pub(super) const SCORES: usize = KEYS / 16;

/// One step over up to [`KEYS`] keys.
pub(super) struct Step<'a, 'b> {
    /// `[rows, 2 * pairs]`
    pub(super) queries: *const u16,
    pub(super) rows: usize,
    /// Of dimensions; a multiple of 16.
    pub(super) pairs: usize,
    /// As [`super::pairs::Entries::by_dimension`] lays them out.
    pub(super) keys: *const u32,
    /// As [`super::pairs::Entries::by_entry`] lays them out.
    pub(super) values: *const u32,
    pub(super) count: usize,
    /// Which keys are seen, from the lowest bit on, by each `alike` rows.
    pub(super) visible: &'a [u64],
    pub(super) alike: usize,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    pub(super) slopes: Option<Slopes<'a>>,
    pub(super) state: &'a mut State<'b>,
}

impl Step<'_, '_> {
    /// # Safety
    /// `runs_here`, and all blocks have the sizes that are said above.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn run(mut self) {
        let mut row = 0;
        while row < self.rows {
            // SAFETY: rows of the state and of the queries.
            unsafe {
                row += match self.rows - row {
                    TILE.. => self.tile::<TILE>(row),
                    4.. => self.tile::<4>(row),
                    3 => self.tile::<3>(row),
                    2 => self.tile::<2>(row),
                    _ => self.tile::<1>(row),
                }
            };
        }
    }

    /// All keys for `R` rows; says how many rows.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn tile<const R: usize>(&mut self, row: usize) -> usize {
        // SAFETY: passed on to the caller.
        unsafe {
            let mut scores = self.scores::<R>(row);
            let mut weights = [[0u32; KEYS / 2]; R];
            let fades = self.soften(row, &mut scores, &mut weights);
            let width = self.state.width;
            let mut at = 0;
            while at < width {
                if at + 64 <= width {
                    self.weigh::<R, 4>(row, at, &weights, &fades);
                    at += 64;
                } else {
                    self.weigh::<R, 1>(row, at, &weights, &fades);
                    at += 16;
                }
            }
        }
        R
    }

    /// q · k
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn scores<const R: usize>(&self, row: usize) -> [[__m512; SCORES]; R] {
        let mut sums = [[_mm512_setzero_ps(); SCORES]; R];
        // SAFETY: passed on to the caller.
        unsafe {
            let queries = self.queries.cast::<i32>().add(row * self.pairs);
            for pair in 0..self.pairs {
                let keys = self.keys.add(pair * KEYS);
                let mut k = [halves(_mm512_setzero_si512()); SCORES];
                for v in 0..SCORES {
                    k[v] = halves(_mm512_loadu_si512(keys.add(v * 16).cast()));
                }
                for r in 0..R {
                    let q = halves(_mm512_set1_epi32(queries.add(r * self.pairs + pair).read_unaligned()));
                    for v in 0..SCORES {
                        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], k[v], q);
                    }
                }
            }
        }
        sums
    }

    /// Scores to weights, relative to the new peaks; says by how much what was summed before fades.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) unsafe fn soften<const R: usize>(
        &mut self,
        row: usize,
        scores: &mut [[__m512; SCORES]; R],
        weights: &mut [[u32; KEYS / 2]; R],
    ) -> [f32; 16] {
        let none = _mm512_set1_ps(f32::NEG_INFINITY);
        let (mut before, mut peaks, mut fades) = ([0.0; 16], [0.0; 16], [0.0; 16]);
        // SAFETY: rows of the state; arrays of whole vectors.
        unsafe {
            for r in 0..R {
                let visible = self.visible[(row + r) / self.alike];
                for v in 0..SCORES {
                    scores[r][v] = _mm512_mul_ps(scores[r][v], _mm512_set1_ps(self.scale));
                }
                if self.softcap.is_some() || self.slopes.is_some() {
                    self.bend(row + r, &mut scores[r]);
                }
                if visible != u64::MAX {
                    for v in 0..SCORES {
                        scores[r][v] = _mm512_mask_mov_ps(none, (visible >> (16 * v)) as u16, scores[r][v]);
                    }
                }
                let [a, b, c, d] = scores[r];
                let most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(a, b), _mm512_max_ps(c, d)));
                before[r] = self.state.peak[row + r];
                peaks[r] = if most > before[r] { most } else { before[r] };
                self.state.peak[row + r] = peaks[r];
                // A row that has seen nothing yet: -inf less anything is as good.
                peaks[r] = if peaks[r] == f32::NEG_INFINITY { 0.0 } else { peaks[r] };
            }
            let faded = exp(_mm512_sub_ps(_mm512_loadu_ps(before.as_ptr()), _mm512_loadu_ps(peaks.as_ptr())));
            _mm512_storeu_ps(fades.as_mut_ptr(), faded);
            let ones = halves(_mm512_set1_epi16(0x3f80));
            for r in 0..R {
                let peak = _mm512_set1_ps(peaks[r]);
                let mut mass = _mm512_setzero_ps();
                for v in 0..SCORES / 2 {
                    let low = exp(_mm512_sub_ps(scores[r][2 * v], peak));
                    let high = exp(_mm512_sub_ps(scores[r][2 * v + 1], peak));
                    let rounded = _mm512_cvtne2ps_pbh(high, low);
                    // Of what is multiplied: so the shares still add up to one.
                    mass = _mm512_dpbf16_ps(mass, rounded, ones);
                    let to = weights[r].as_mut_ptr().add(16 * v);
                    _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(rounded));
                }
                let old = &mut self.state.mass[row + r];
                *old = *old * fades[r] + _mm512_reduce_add_ps(mass);
            }
        }
        fades
    }

    /// Caps scores and lets them fall with the distance.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn bend(&self, row: usize, scores: &mut [__m512; SCORES]) {
        let (one, two) = (_mm512_set1_ps(1.0), _mm512_set1_ps(2.0));
        for (v, score) in scores.iter_mut().enumerate() {
            if let Some(cap) = self.softcap {
                // tanh x = 1 - 2 / (e^2x + 1)
                let e = exp(_mm512_mul_ps(*score, _mm512_set1_ps(2.0 / cap)));
                let tanh = _mm512_sub_ps(one, _mm512_div_ps(two, _mm512_add_ps(e, one)));
                *score = _mm512_mul_ps(_mm512_set1_ps(cap), tanh);
            }
            if let Some(Slopes { rows, keys }) = &self.slopes {
                let (slope, query) = rows[row];
                let left = keys.len().saturating_sub(16 * v).min(16);
                let mask = ((1u32 << left) - 1) as u16;
                // SAFETY: masked to what there is.
                let keys = unsafe { _mm512_maskz_loadu_epi32(mask, keys.as_ptr().cast::<i32>().wrapping_add(16 * v)) };
                let far = _mm512_sub_ps(_mm512_cvtepu32_ps(keys), _mm512_set1_ps(query as f32));
                *score = _mm512_fmadd_ps(_mm512_set1_ps(slope), far, *score);
            }
        }
    }

    /// Adds weighted values to `R` rows, `V` vectors of lanes from lane `at` on.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn weigh<const R: usize, const V: usize>(
        &mut self,
        row: usize,
        at: usize,
        weights: &[[u32; KEYS / 2]; R],
        fades: &[f32; 16],
    ) {
        let width = self.state.width;
        // SAFETY: rows and lanes lie inside the state; values have `width` lanes at every pair.
        unsafe {
            let sum = self.state.sum.as_mut_ptr().add(row * width + at);
            let mut sums = [[_mm512_setzero_ps(); V]; R];
            for r in 0..R {
                for v in 0..V {
                    let old = _mm512_loadu_ps(sum.add(r * width + v * 16));
                    sums[r][v] = _mm512_mul_ps(old, _mm512_set1_ps(fades[r]));
                }
            }
            for pair in 0..self.count.div_ceil(2) {
                let from = self.values.add(pair * width + at);
                let mut values = [halves(_mm512_setzero_si512()); V];
                for v in 0..V {
                    values[v] = halves(_mm512_loadu_si512(from.add(v * 16).cast()));
                }
                for r in 0..R {
                    let weight = halves(_mm512_set1_epi32(*weights[r].get_unchecked(pair) as i32));
                    for v in 0..V {
                        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], values[v], weight);
                    }
                }
            }
            for r in 0..R {
                for v in 0..V {
                    _mm512_storeu_ps(sum.add(r * width + v * 16), sums[r][v]);
                }
            }
        }
    }
}

/// e^x to a few millionths; exactly 0 for -inf, inf where it is too large.
#[inline]
#[target_feature(enable = "avx512f")]
fn exp(x: __m512) -> __m512 {
    const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    let x = _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E));
    let x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-200.0)), _mm512_set1_ps(200.0));
    let n = _mm512_roundscale_ps::<NEAREST>(x);
    let r = _mm512_sub_ps(x, n);
    // Powers of ln 2 over factorials.
    let mut p = _mm512_set1_ps(1.333_355_8e-3);
    for c in [9.618_129e-3, 5.550_411e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

#[inline]
#[target_feature(enable = "avx512f")]
fn halves(v: __m512i) -> __m512bh {
    // SAFETY: the same 512 bits.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(v) }
}
