//! Recurrences whose heads do not see each other: outer products that fade (linear attention, the gated delta rule, RWKV 7). States lie
//! keys first, `[heads, d, e]`: every inner loop runs along the value lanes, which do not depend on each other, so that a chunked run gives
//! the very bits of a whole one.

use super::super::{
    lanes::{Isa, Job, Lanes, dispatch},
    team::each_chunk_of_two,
};

/// Numbers of state times tokens below which one thread is faster.
pub(super) const TASK: usize = 1 << 15;

/// The sizes of a recurrence over heads.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// New tokens.
    pub tokens: usize,
    /// Heads of values, and of the state.
    pub heads: usize,
    /// Heads of queries and keys; they divide `heads`, and head h reads number `h / (heads / k_heads)`.
    pub k_heads: usize,
    /// Lanes of a key.
    pub d: usize,
    /// Lanes of a value.
    pub e: usize,
}

impl Shape {
    pub(super) fn keys(&self) -> usize {
        self.tokens * self.k_heads * self.d
    }

    pub(super) fn values(&self) -> usize {
        self.tokens * self.heads * self.e
    }

    /// The head of queries and keys that a head of values reads.
    #[inline(always)]
    pub(super) fn k_head(&self, head: usize) -> usize {
        head / (self.heads / self.k_heads)
    }
}

/// Logarithms of the factors by which a state fades before each token.
#[derive(Clone, Copy, Debug)]
pub enum Decay<'a> {
    /// `[heads]`, the same for all tokens.
    Head(&'a [f32]),
    /// `[tokens, heads]`
    Token(&'a [f32]),
    /// `[tokens, heads, d]`, one for each key lane.
    Lane(&'a [f32]),
}

impl Decay<'_> {
    pub(super) fn fits(&self, s: &Shape) -> bool {
        match self {
            Decay::Head(g) => g.len() == s.heads,
            Decay::Token(g) => g.len() == s.tokens * s.heads,
            Decay::Lane(g) => g.len() == s.tokens * s.heads * s.d,
        }
    }

    /// The factors of one token and head, one for each key lane.
    #[inline(always)]
    pub(super) fn write(&self, s: &Shape, token: usize, head: usize, factors: &mut [f32]) {
        match self {
            Decay::Head(g) => factors.fill(g[head].exp()),
            Decay::Token(g) => factors.fill(g[token * s.heads + head].exp()),
            Decay::Lane(g) => {
                for (factor, g) in factors.iter_mut().zip(row(g, s.heads, s.d, token, head)) {
                    *factor = g.exp();
                }
            }
        }
    }
}

/// The lanes of one token and head of x `[tokens, heads, width]`.
#[inline(always)]
pub(super) fn row(x: &[f32], heads: usize, width: usize, token: usize, head: usize) -> &[f32] {
    &x[(token * heads + head) * width..][..width]
}

/// A recurrence whose heads do not see each other.
pub trait Recurrence: Sync {
    /// The sizes, where all inputs fit them.
    fn checked(&self) -> Option<Shape>;

    /// Walks one head through the tokens: state `[d, e]`, out `[tokens, e]`, zeros at first. Must be `#[inline(always)]`.
    fn walk(&self, shape: &Shape, head: usize, state: &mut [f32], out: &mut [f32]);
}

/// Runs a recurrence from `state` `[heads, d, e]`, which is left after the last token, into `out` `[tokens, heads, e]`.
///
/// # Panics
/// If the inputs, the state and `out` are not of the sizes that their shape says.
pub fn recur<R: Recurrence>(recurrence: &R, state: &mut [f32], out: &mut [f32]) {
    let checked = recurrence.checked();
    assert!(checked.is_some(), "recurrence: the inputs do not fit each other");
    let Some(shape) = checked else { return };
    let Shape { tokens, heads, d, e, .. } = shape;
    assert!(state.len() == heads * d * e, "recurrence: a state of {} numbers for {shape:?}", state.len());
    assert!(out.len() == shape.values(), "recurrence: outputs of {} numbers for {shape:?}", out.len());
    if out.is_empty() || d == 0 {
        return out.fill(0.0);
    }
    let isa = Isa::best();
    let walk = |(head, (state, out)): (usize, (&mut [f32], &mut [f32]))| {
        // SAFETY: `isa` is available; the job holds no pointers.
        unsafe { dispatch(isa, Walk { recurrence, shape: &shape, head, state, out }) }
    };
    // Heads first, so that each has its outputs in one piece.
    let mut by_head = vec![0.0; out.len()];
    if state.len() * tokens < TASK {
        state.chunks_exact_mut(d * e).zip(by_head.chunks_exact_mut(tokens * e)).enumerate().for_each(walk);
    } else {
        each_chunk_of_two((state, d * e), (&mut by_head, tokens * e), |head, state, out| walk((head, (state, out))));
    }
    for (head, rows) in by_head.chunks_exact(tokens * e).enumerate() {
        for (token, lanes) in rows.chunks_exact(e).enumerate() {
            out[(token * heads + head) * e..][..e].copy_from_slice(lanes);
        }
    }
}

/// One head, compiled for an instruction set.
struct Walk<'a, R> {
    recurrence: &'a R,
    shape: &'a Shape,
    head: usize,
    state: &'a mut [f32],
    out: &'a mut [f32],
}

impl<R: Recurrence> Job for Walk<'_, R> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        self.recurrence.walk(self.shape, self.head, self.state, self.out);
    }
}
