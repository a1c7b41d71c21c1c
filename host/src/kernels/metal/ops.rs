//! Tensors -> tensors by one kernel each, where there is a kernel for them: none means that the caller does it by candle's ops.

use super::{
    attention::Attention,
    device::{run_one, serves},
    launch::{Launch, word},
    rows::{self, Mix, Norm, Turn},
};
use crate::{cache::kv::KvCache, kernels::cpu::Attend, layers::experts::Activation};
use candle_core::{DType, Result, Tensor};

/// Whether kernels can take a tensor, and there is something to do.
fn takes(t: &Tensor) -> bool {
    serves(t.device()) && word(t.dtype()).is_some() && t.elem_count() > 0
}

fn ran(launch: Option<Launch>, inputs: &[&Tensor]) -> Result<Option<Tensor>> {
    launch.map(|launch| run_one(&launch, inputs)).transpose()
}

/// x `[.., dim]`, weight and bias `[dim]` in f32.
pub fn norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    centred: bool,
    eps: f32,
) -> Result<Option<Tensor>> {
    if !takes(x) || x.rank() == 0 {
        return Ok(None);
    }
    let how = Norm { centred, weight: weight.is_some(), bias: bias.is_some(), eps };
    ran(how.launch(x.dims(), x.dtype()), &[x, weight.unwrap_or(x), bias.unwrap_or(x)])
}

/// What stands between an expert's projections; both of one shape.
pub fn gate(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    if !takes(gate) || gate.dims() != up.dims() || gate.dtype() != up.dtype() {
        return Ok(None);
    }
    ran(rows::gate(activation, gate.dims(), gate.dtype()), &[gate, up])
}

/// x `[tokens, heads, head_dim]`; cosines and sines `[tokens, 2 * pairs]` in f32.
pub fn rotate(x: &Tensor, turns: &Tensor, turn: crate::kernels::cpu::Turn) -> Result<Option<Tensor>> {
    if !takes(x) {
        return Ok(None);
    }
    let crate::kernels::cpu::Turn { neighbours, last, back } = turn;
    let how = Turn { pairs: turns.dim(1)? / 2, neighbours, last, back };
    ran(how.launch(x.dims3()?.into(), x.dtype()), &[x, turns])
}

/// What chosen experts gave, `[tokens * each, dim]`, for x `[tokens, dim]`, as one sum a token; chosen (u32) and shares (f32)
/// `[tokens, each]`.
pub fn mix(how: Mix, y: &Tensor, x: &Tensor, chosen: &Tensor, shares: &Tensor) -> Result<Option<Tensor>> {
    ran(how.launch(x.dtype()), &[y, x, chosen, shares])
}

/// Whether there is a kernel for few queries like these.
pub fn attends(q: &Tensor) -> bool {
    takes(q)
}

/// q `[tokens, heads, d]` of tokens from position `first` on -> `[tokens, heads, e]`; slopes and sinks `[heads]`. Of `how` selections and
/// blocks are not looked at.
pub fn few_attend(
    q: &Tensor,
    first: usize,
    kv: &KvCache,
    how: &Attend,
    lanes: Option<usize>,
    [slopes, sinks]: [Option<&Tensor>; 2],
) -> Result<Option<Tensor>> {
    let (tokens, heads, d) = q.dims3()?;
    let (Some(keys), true) = (&kv.keys.tensor()?, takes(q)) else { return Ok(None) };
    let (entries, kv_heads, _) = keys.dims3()?;
    let stored = kv.values.tensor()?;
    let (values, e) = match (&stored, lanes) {
        (_, Some(lanes)) => (keys, lanes),
        (Some(values), None) => (values, values.dim(2)?),
        _ => return Ok(None),
    };
    let follows = |&first: &u32| kv.positions.last().is_some_and(|&last| (last - first) as usize + 1 == entries);
    let first_key = kv.positions.first().filter(|first| follows(first)).map(|&first| first as usize);
    let positions = match first_key {
        Some(_) => None,
        None => Some(Tensor::new(kv.positions.as_slice(), q.device())?),
    };
    let of = Attention {
        tokens,
        heads,
        kv_heads,
        entries,
        d,
        e,
        values_in_keys: lanes.is_some(),
        scale: how.scale,
        softcap: how.softcap,
        window: how.window,
        keep: how.keep,
        chunk: how.chunk,
        first_query: first,
        first_key,
        slopes: slopes.is_some(),
        sinks: sinks.is_some(),
    };
    let own = q.to_dtype(keys.dtype())?;
    let exact = |t: Option<&Tensor>| t.map(|t| t.to_dtype(DType::F32)).transpose();
    let (slopes, sinks) = (exact(slopes)?, exact(sinks)?);
    let other = |t: &'_ Option<Tensor>| t.clone().unwrap_or_else(|| own.clone());
    let inputs = [&own, keys, values, &other(&positions), &other(&slopes)];
    let Some(sums) = ran(of.stretched(keys.dtype()), &inputs)? else { return Ok(None) };
    ran(of.joined(q.dtype()), &[&sums, &other(&sinks)])
}
