//! Experts of one projection side by side on a GPU: kernels read there which ones a token has chosen, so that nothing waits for the
//! router. Worth it for few tokens; many share experts, and are gathered by them first.

use super::{Expert, Kind};
use crate::{
    kernels::metal::{self, Packed, matmul::Choice, rows::Mix},
    layers::{linear::Linear, weight::Weight},
};
use candle_core::{DType, Result, Tensor, bail};

/// Up to so many choices (tokens times experts of a token) are run one by one.
pub const FEW: usize = 64;

/// One projection of all experts.
struct Projection {
    weight: Packed,
    /// `[experts, outputs]`
    bias: Option<Tensor>,
}

/// All experts of one layer.
pub struct Joined {
    gate: Option<Projection>,
    up: Projection,
    down: Projection,
    experts: usize,
}

impl Projection {
    /// None unless all are packed side by side and none has an adapter. A choice that is no expert has no bias.
    fn new<'a>(linears: impl Iterator<Item = &'a Linear> + Clone, identity: usize) -> Result<Option<Self>> {
        let packed = linears.clone().map(|l| match &l.weight {
            Weight::Metal(packed) if l.adapter.is_none() => Some(packed),
            _ => None,
        });
        let Some(weight) = packed.collect::<Option<Vec<_>>>().and_then(Packed::joined) else { return Ok(None) };
        let biases: Vec<&Tensor> = linears.clone().filter_map(|l| l.bias.as_ref()).collect();
        let bias = match biases.len() {
            0 => None,
            n if n == linears.count() && identity == 0 => Some(Tensor::stack(&biases, 0)?),
            _ => return Ok(None),
        };
        Ok(Some(Projection { weight, bias }))
    }

    /// Row `p / each` of x times expert `chosen[p]`, for all p.
    fn forward(&self, x: &Tensor, chosen: &Tensor, choice: Choice) -> Result<Tensor> {
        let y = self.weight.chosen(x, chosen, choice)?;
        match &self.bias {
            Some(bias) => y + bias.index_select(chosen, 0)?.to_dtype(x.dtype())?,
            None => Ok(y),
        }
    }
}

impl Joined {
    /// None where kernels cannot run them so.
    pub fn new(experts: &[Expert], kind: Kind) -> Result<Option<Self>> {
        let gates: Vec<&Linear> = experts.iter().filter_map(|e| e.gate.as_ref()).collect();
        let gate = match gates.len() {
            0 => None,
            n if n == experts.len() => match Projection::new(gates.into_iter(), kind.identity)? {
                Some(gate) => Some(gate),
                None => return Ok(None),
            },
            _ => return Ok(None),
        };
        let (up, down) = (
            Projection::new(experts.iter().map(|e| &e.up), kind.identity)?,
            Projection::new(experts.iter().map(|e| &e.down), kind.identity)?,
        );
        Ok(up.zip(down).map(|(up, down)| Joined { gate, up, down, experts: experts.len() }))
    }

    /// As [`super::Experts::forward`].
    pub fn forward(&self, kind: Kind, x: &Tensor, chosen: &Tensor, weights: &Tensor) -> Result<Tensor> {
        let ((tokens, each), dim) = (chosen.dims2()?, x.dim(1)?);
        let (experts, pairs) = (self.experts, tokens * each);
        let chosen = chosen.to_dtype(DType::U32)?.flatten_all()?.contiguous()?;
        let shares = weights.to_dtype(DType::F32)?.contiguous()?;
        let (input, abreast) = match kind.scaled_input {
            true => {
                let scaled = x.unsqueeze(1)?.broadcast_mul(&shares.to_dtype(x.dtype())?.unsqueeze(2)?)?;
                (scaled.reshape((pairs, dim))?, 1)
            }
            false => (x.contiguous()?, each),
        };
        let choice = Choice { experts, each: abreast };
        let up = self.up.forward(&input, &chosen, choice)?;
        let inner = match &self.gate {
            Some(gate) => kind.activation.elsewhere(&gate.forward(&input, &chosen, choice)?, &up)?,
            None => kind.activation.elsewhere(&up, &up)?,
        };
        let y = self.down.forward(&inner, &chosen, Choice { experts, each: 1 })?;
        let mix = Mix { tokens, dim, each, experts, weighted: !kind.scaled_input };
        match metal::ops::mix(mix, &y, &x.contiguous()?, &chosen, &shares)? {
            Some(sum) => Ok(sum),
            None => bail!("there is no Metal kernel for experts of {:?}", x.dtype()),
        }
    }
}
