//! The choice of experts as `route.cuh` does it: a chain of row ops that is one is told in its terms, and done by the kernel that needs it.

use super::{
    rows::{Chain, RowOp},
    step::address,
};
use candle_core::{DType, Result, Tensor};

/// Experts that a token can choose.
pub const MOST_CHOSEN: usize = 32;
/// Experts that there can be.
const MOST_ROUTED: usize = 256;

/// From a router's logits to the experts of each token, and their weights.
#[derive(Clone)]
pub struct Route {
    /// `[tokens, experts]`
    logits: Tensor,
    /// `[experts]`, joins the scores that choose.
    bias: Option<Tensor>,
    k: usize,
    /// Of a logit: itself, softmax or sigmoid.
    score: u32,
    renewed: bool,
    normalized: bool,
    /// Times and plus: the sum that divides, and the weights.
    numbers: [f32; 4],
}

/// route.cuh's `Route`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Args {
    logits: u64,
    bias: u64,
    width: u32,
    k: u32,
    score: u32,
    wide: u32,
    renewed: u32,
    normalized: u32,
    numbers: [f32; 4],
}

impl Route {
    /// What a chain is that ends with these, and does nothing else.
    pub fn of(chain: &Chain, chosen: &Tensor, weights: &Tensor) -> Option<Self> {
        let mut steps = chain.steps().iter().peekable();
        let logits = steps.peek()?.a.clone();
        let (width, dtype) = (logits.dims().last().copied()?, logits.dtype());
        let mut next = |op: RowOp, a: &Tensor| steps.next_if(|s| s.op == op && s.a.id() == a.id());
        let scored =
            next(RowOp::Softmax, &logits).map(|s| (1, s)).or_else(|| Some((2, next(RowOp::Sigmoid, &logits)?)));
        let (score, scores) = scored.map_or((0, &logits), |(score, s)| (score, &s.y));
        let corrected = next(RowOp::Add, scores);
        let bias = corrected.and_then(|s| s.b.clone());
        let top = next(RowOp::TopK, corrected.map_or(scores, |s| &s.y))?;
        let indices = top.indices.as_ref()?;
        let mut last = match next(RowOp::Gather, scores) {
            Some(s) if s.b.as_ref().is_some_and(|b| b.id() == indices.id()) => &s.y,
            Some(_) => return None,
            None if bias.is_none() => &top.y,
            None => return None,
        };
        let renewed = next(RowOp::Softmax, last);
        last = renewed.map_or(last, |s| &s.y);
        let mut numbers = [1.0, 0.0, 1.0, 0.0];
        let sum = next(RowOp::Sum, last);
        if let Some(sum) = sum {
            let affine = next(RowOp::Affine, &sum.y);
            [numbers[0], numbers[1]] = affine.map_or([1.0, 0.0], |s| s.numbers);
            let divided = next(RowOp::Div, last)?;
            if divided.b.as_ref()?.id() != affine.map_or(&sum.y, |s| &s.y).id() {
                return None;
            }
            last = &divided.y;
        }
        if let Some(scaled) = next(RowOp::Affine, last) {
            [numbers[2], numbers[3]] = scaled.numbers;
            last = &scaled.y;
        }
        let k = top.y.dims().last().copied()?;
        let alike = chain.steps().iter().all(|s| s.y.dtype() == dtype) && matches!(dtype, DType::BF16 | DType::F32);
        let one_row = bias.as_ref().is_none_or(|b| b.dims() == [width] && b.dtype() == dtype);
        let fits = width <= MOST_ROUTED && k <= MOST_CHOSEN && logits.rank() == 2 && alike && one_row;
        let is_it = steps.next().is_none() && indices.id() == chosen.id() && last.id() == weights.id();
        (fits && is_it).then(|| Route {
            logits,
            bias,
            k,
            score,
            renewed: renewed.is_some(),
            normalized: sum.is_some(),
            numbers,
        })
    }

    /// For a kernel's arguments.
    pub fn args(&self) -> Result<Args> {
        Ok(Args {
            logits: address(&self.logits)?,
            bias: self.bias.as_ref().map_or(Ok(0), address)?,
            width: self.logits.dim(1)? as u32,
            k: self.k as u32,
            score: self.score,
            wide: (self.logits.dtype() == DType::F32).into(),
            renewed: self.renewed.into(),
            normalized: self.normalized.into(),
            numbers: self.numbers,
        })
    }
}
