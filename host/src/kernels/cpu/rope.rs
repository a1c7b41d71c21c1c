//! Rotary positions (Su et al. 2021): pairs of lanes of each head turn by position times frequency. Angles are taken in f64,
//! because f32 loses a thousandth of a turn at positions in the ten thousands. A step's angles serve all its layers.

use super::lanes::{Isa, Job, Lanes, dispatch};
use super::team::each_chunk;

/// Tokens that are worth a task of their own.
const TOKENS: usize = 16;

/// Cosines and sines of some tokens' angles.
#[derive(Clone, Debug)]
pub struct Angles {
    /// Pairs of lanes that turn.
    pairs: usize,
    /// `[tokens, 2 * pairs]`: cosines, then sines.
    turns: Vec<f32>,
}

/// How lanes pair up and turn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// A pair is two neighbours; otherwise lanes i and i + pairs.
    pub neighbours: bool,
    /// The last lanes of a head turn; otherwise the first.
    pub last: bool,
    /// The other way round.
    pub back: bool,
}

impl Angles {
    /// Angles of `positions`, one a token, times `inv_freq`, one a pair; both cosine and sine are multiplied by `amplitude`
    /// (yarn's and longrope's attention factor). A frequency of 0 leaves its pair where it is, but for the amplitude.
    pub fn new(positions: &[f32], inv_freq: &[f32], amplitude: f32) -> Self {
        let pairs = inv_freq.len();
        let mut turns = vec![0.0; positions.len() * 2 * pairs];
        let one = |(turns, &position): (&mut [f32], &f32)| {
            let (cosines, sines) = turns.split_at_mut(pairs);
            for ((cosine, sine), &frequency) in cosines.iter_mut().zip(sines).zip(inv_freq) {
                let (s, c) = (f64::from(position) * f64::from(frequency)).sin_cos();
                (*cosine, *sine) = ((c * f64::from(amplitude)) as f32, (s * f64::from(amplitude)) as f32);
            }
        };
        if pairs > 0 {
            each_chunk(&mut turns, 2 * pairs * TOKENS, |i, turns| {
                turns.chunks_exact_mut(2 * pairs).zip(&positions[i * TOKENS..]).for_each(one);
            });
        }
        Self { pairs, turns }
    }

    /// Cosines and sines `[tokens, 2 * pairs]`.
    pub fn turns(&self) -> &[f32] {
        &self.turns
    }

    /// Turns `2 * pairs` lanes of each head of `x`, `[tokens, heads, head_dim]`, in place; the rest stays.
    ///
    /// # Panics
    /// If `x` is not one row for each token, or heads are too narrow.
    pub fn rotate(&self, x: &mut [f32], heads: usize, head_dim: usize, turn: Turn) {
        let row = heads * head_dim;
        if x.is_empty() || self.pairs == 0 {
            return;
        }
        assert!(2 * self.pairs <= head_dim, "rope: {} pairs in heads of {head_dim}", self.pairs);
        assert!(x.len() * 2 * self.pairs == self.turns.len() * row, "rope: {} numbers in rows of {row}", x.len());
        let isa = Isa::best();
        let one = |(x, turns): (&mut [f32], &[f32])| {
            // SAFETY: `isa` is available; lengths were checked.
            unsafe { dispatch(isa, Rotate { x, head_dim, turns, turn }) }
        };
        each_chunk(x, row * TOKENS, |i, x| {
            let turns = self.turns.chunks_exact(2 * self.pairs).skip(i * TOKENS);
            x.chunks_exact_mut(row).zip(turns).for_each(one);
        });
    }
}

/// [`Angles::new`] and [`Angles::rotate`] in one: for a caller that has one tensor to turn.
#[allow(clippy::too_many_arguments)]
pub fn rope(
    x: &mut [f32],
    positions: &[f32],
    heads: usize,
    head_dim: usize,
    inv_freq: &[f32],
    interleaved: bool,
    amplitude: f32,
) {
    let turn = Turn { neighbours: interleaved, ..Turn::default() };
    Angles::new(positions, inv_freq, amplitude).rotate(x, heads, head_dim, turn);
}

/// All heads of one token.
struct Rotate<'a> {
    x: &'a mut [f32],
    head_dim: usize,
    turns: &'a [f32],
    turn: Turn,
}

impl Job for Rotate<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let pairs = self.turns.len() / 2;
        let (cosines, sines) = self.turns.split_at(pairs);
        let sign = if self.turn.back { -1.0 } else { 1.0 };
        let first = if self.turn.last { self.head_dim - 2 * pairs } else { 0 };
        for head in self.x.chunks_exact_mut(self.head_dim) {
            let head = &mut head[first..];
            if self.turn.neighbours {
                for ((pair, &c), &s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
                    let s = sign * s;
                    *pair = [pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s];
                }
                continue;
            }
            let (left, right) = head.split_at_mut(pairs);
            let whole = pairs - pairs % L::W;
            for i in (0..whole).step_by(L::W) {
                // SAFETY: both halves, cosines and sines are at least `pairs` long.
                unsafe {
                    let c = L::load(cosines.as_ptr().add(i));
                    let s = L::mul(L::splat(sign), L::load(sines.as_ptr().add(i)));
                    let (a, b) = (L::load(left.as_ptr().add(i)), L::load(right.as_ptr().add(i)));
                    L::store(left.as_mut_ptr().add(i), L::sub(L::mul(a, c), L::mul(b, s)));
                    L::store(right.as_mut_ptr().add(i), L::add(L::mul(b, c), L::mul(a, s)));
                }
            }
            for i in whole..pairs {
                let (a, b, s) = (left[i], right[i], sign * sines[i]);
                left[i] = a * cosines[i] - b * s;
                right[i] = b * cosines[i] + a * s;
            }
        }
    }
}
