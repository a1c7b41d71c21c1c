//! The running ops whose state is a map from keys to values (linear attention, the gated delta rule, RWKV 7), and RG-LRU, whose state is
//! a number a channel: shapes are checked here, the rest is `recurring`'s and the kernels'.

use super::{
    recurring::Turn,
    recurring_away::Away,
    running::Running,
    value::{Outcome, Value, fault},
};
use crate::kernels::{
    cpu::recurrence::{self, Decay, GatedDelta, LinearAttention, Shape, Wkv7},
    metal::recurrence::{self as kernels, Rule},
};
use candle_core::DType;
use plugin_api::abi::Handle;

/// The sizes that q, k and v have, if they fit each other: q and k `[tokens, k_heads, d]`, v `[tokens, heads, e]`.
fn shape(q: &Value, k: &Value, v: &Value) -> Outcome<Shape> {
    let (q, k, v) = (q.dims()?, k.dims()?, v.dims()?);
    match (q, v) {
        (&[tokens, k_heads, d], &[v_tokens, heads, e])
            if q == k && tokens == v_tokens && k_heads > 0 && heads.is_multiple_of(k_heads) =>
        {
            Ok(Shape { tokens, heads, k_heads, d, e })
        }
        _ => Err(fault!("q {q:?}, k {k:?} and v {v:?} are not [tokens, k_heads, d] twice and [tokens, heads, e]")),
    }
}

/// A decay that changes from token to token, by the shape it is said to have.
fn decay<'a>(by_lane: bool, g: &'a [f32]) -> Decay<'a> {
    if by_lane { Decay::Lane(g) } else { Decay::Token(g) }
}

impl Running<'_> {
    /// q and k `[tokens, k_heads, d]`, v `[tokens, heads, e]`, g `[tokens, heads]` or `[tokens, heads, d]`, beta `[tokens, heads]`.
    pub fn gated_delta(&mut self, cache: u32, inputs: [Handle; 5]) -> Outcome {
        let [q, k, v, g, beta] = self.values(inputs)?;
        let s = shape(&q, &k, &v)?;
        let Shape { tokens, heads, d, e, .. } = s;
        let by_lane = g.dims()? == [tokens, heads, d];
        if !by_lane && g.dims()? != [tokens, heads] || beta.dims()? != [tokens, heads] {
            let (g, beta) = (g.dims()?, beta.dims()?);
            return Err(fault!("g {g:?} and beta {beta:?} for {tokens} tokens, {heads} heads and {d} lanes of a key"));
        }
        let rows = [&q, &k, &v, &g, &beta];
        let by = if by_lane { kernels::Decay::Lane } else { kernels::Decay::Token };
        let launch = |tokens, _| kernels::recur(Rule::Delta, by, Shape { tokens, ..s });
        // The last input is of other rules.
        let away = Away { state: &[heads, d, e], rows: &rows, shared: &[], order: &[0, 1, 2, 3, 4, 4], launch };
        if let Some(y) = self.recur_away(cache, away)? {
            return Ok(y);
        }
        self.recur(cache, &[heads, d, e], rows, [], &[tokens, heads, e], |turn: Turn<5, 0>| {
            let [q, k, v, g, beta] = turn.rows;
            let shape = Shape { tokens: turn.tokens, ..s };
            let of = GatedDelta { shape, q, k, v, g: decay(by_lane, g), beta };
            recurrence::recur(&of, turn.state, turn.out)
        })
    }

    /// q and k `[tokens, k_heads, d]`, v `[tokens, heads, e]`, g `[heads]`, `[tokens, heads]` or `[tokens, heads, d]`.
    pub fn linear_attention(&mut self, cache: u32, inputs: [Handle; 4]) -> Outcome {
        let [q, k, v, g] = self.values(inputs)?;
        let s = shape(&q, &k, &v)?;
        let Shape { tokens, heads, d, e, .. } = s;
        let (state, output) = ([heads, d, e], [tokens, heads, e]);
        let launch = |by| move |tokens, _: usize| kernels::recur(Rule::Linear, by, Shape { tokens, ..s });
        if g.dims()? == [heads] {
            if let Value::Real(g) = &g {
                let (rows, g) = (&[&q, &k, &v], &[&g.to_dtype(DType::F32)?]);
                let launch = launch(kernels::Decay::Head);
                let away = Away { state: &state, rows, shared: g, order: &[0, 1, 2, 3, 3, 3], launch };
                if let Some(y) = self.recur_away(cache, away)? {
                    return Ok(y);
                }
            }
            return self.recur(cache, &state, [&q, &k, &v], [&g], &output, |turn: Turn<3, 1>| {
                let ([q, k, v], [g]) = (turn.rows, turn.shared);
                let of = LinearAttention { shape: Shape { tokens: turn.tokens, ..s }, q, k, v, g: Decay::Head(g) };
                recurrence::recur(&of, turn.state, turn.out)
            });
        }
        let by_lane = g.dims()? == [tokens, heads, d];
        if !by_lane && g.dims()? != [tokens, heads] {
            return Err(fault!("g {:?} for {tokens} tokens, {heads} heads and {d} lanes of a key", g.dims()?));
        }
        let launch = launch(if by_lane { kernels::Decay::Lane } else { kernels::Decay::Token });
        let away = Away { state: &state, rows: &[&q, &k, &v, &g], shared: &[], order: &[0, 1, 2, 3, 3, 3], launch };
        if let Some(y) = self.recur_away(cache, away)? {
            return Ok(y);
        }
        self.recur(cache, &state, [&q, &k, &v, &g], [], &output, |turn: Turn<4, 0>| {
            let [q, k, v, g] = turn.rows;
            let of = LinearAttention { shape: Shape { tokens: turn.tokens, ..s }, q, k, v, g: decay(by_lane, g) };
            recurrence::recur(&of, turn.state, turn.out)
        })
    }

    /// RWKV 7, all `[tokens, heads, d]`.
    pub fn wkv7(&mut self, cache: u32, inputs: [Handle; 6]) -> Outcome {
        let inputs = self.values(inputs)?;
        let dims = inputs[0].dims()?.to_vec();
        let &[_, heads, d] = dims.as_slice() else { return Err(fault!("{dims:?} is not [tokens, heads, d]")) };
        for input in &inputs {
            if input.dims()? != dims {
                return Err(fault!("inputs of shapes {dims:?} and {:?}", input.dims()?));
            }
        }
        let shape = |tokens| Shape { tokens, heads, k_heads: heads, d, e: d };
        let launch = |tokens, _| kernels::recur(Rule::Wkv7, kernels::Decay::Lane, shape(tokens));
        // r, k, v, w, a, b
        let (rows, order) = (&inputs.each_ref(), &[0, 2, 3, 1, 4, 5]);
        if let Some(y) = self.recur_away(cache, Away { state: &[heads, d, d], rows, shared: &[], order, launch })? {
            return Ok(y);
        }
        self.recur(cache, &[heads, d, d], inputs.each_ref(), [], &dims, |turn: Turn<6, 0>| {
            let [r, w, k, v, a, b] = turn.rows;
            let of = Wkv7 { tokens: turn.tokens, heads, d, r, w, k, v, a, b };
            recurrence::recur(&of, turn.state, turn.out)
        })
    }

    /// x and log_a `[tokens, dim]`.
    pub fn rg_lru(&mut self, cache: u32, inputs: [Handle; 2]) -> Outcome {
        let [x, log_a] = self.values(inputs)?;
        let dims = x.dims()?.to_vec();
        let &[_, dim] = dims.as_slice() else { return Err(fault!("{dims:?} is not [tokens, dim]")) };
        if log_a.dims()? != dims {
            return Err(fault!("x {dims:?} and log_a {:?}", log_a.dims()?));
        }
        let launch = |tokens, first| Some(kernels::rg_lru(tokens, dim, first == 0));
        let rows = &[&x, &log_a];
        if let Some(y) = self.recur_away(cache, Away { state: &[dim], rows, shared: &[], order: &[0, 1], launch })? {
            return Ok(y);
        }
        self.recur(cache, &[dim], [&x, &log_a], [], &dims, |turn: Turn<2, 0>| {
            let [x, log_a] = turn.rows;
            recurrence::rg_lru(x, log_a, turn.offset == 0, turn.state, turn.out)
        })
    }
}
