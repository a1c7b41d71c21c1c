//! A value of the running step: numbers, or only their shape (the dry run), or the first failure on the way to them.
//! Here are the ops that need neither weights nor sequence: shapes are checked first, by one rule for both kinds of run.

use crate::kernels::cpu::largest;
use candle_core::{D, DType, Tensor};
use smallvec::{SmallVec, smallvec};
use std::rc::Rc;

/// A shape. Few tensors have more axes than this, and those that have pay an allocation, as each op once did.
pub type Dims = SmallVec<[usize; 4]>;

/// Why an op gave nothing.
#[derive(Clone, Debug)]
pub enum Fault {
    /// This op failed; its name and place are still to be added.
    New(String),
    /// An input had failed before; the text is whole.
    Passed(Rc<String>),
}

/// What an op gives.
pub type Outcome<T = Value> = Result<T, Fault>;

/// A tensor as the ops see it.
#[derive(Clone, Debug)]
pub enum Value {
    /// Numbers on the model's device.
    Real(Tensor),
    /// A shape alone.
    Planned(Dims),
    /// What went wrong, and where.
    Failed(Rc<String>),
}

/// A fault of the op at hand, formatted.
macro_rules! fault {
    ($($t:tt)*) => { $crate::ops::value::Fault::New(format!($($t)*)) };
}
pub(crate) use fault;

impl From<candle_core::Error> for Fault {
    fn from(e: candle_core::Error) -> Self {
        Fault::New(e.to_string())
    }
}

impl Value {
    /// A shape without numbers.
    pub fn planned(dims: &[usize]) -> Value {
        Value::Planned(Dims::from_slice(dims))
    }

    /// The shape, or why there is none.
    pub fn dims(&self) -> Outcome<&[usize]> {
        match self {
            Value::Real(t) => Ok(t.dims()),
            Value::Planned(dims) => Ok(dims),
            Value::Failed(f) => Err(Fault::Passed(f.clone())),
        }
    }

    /// The last axis' length.
    pub fn last(&self) -> Outcome<usize> {
        self.dims()?.last().copied().ok_or_else(|| fault!("a tensor without axes"))
    }

    /// The shape, to be changed, or why there is none.
    pub fn own_dims(&self) -> Outcome<Dims> {
        self.dims().map(Dims::from_slice)
    }

    /// Either the shape that `dims` states or the numbers that `compute` makes.
    pub fn make(&self, dims: Dims, compute: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) -> Outcome {
        match self {
            Value::Real(t) => compute(t).map(Value::Real).map_err(Fault::from),
            _ => Ok(Value::Planned(dims)),
        }
    }

    fn reshaped(&self, dims: Dims) -> Outcome {
        match self {
            Value::Real(t) => t.reshape(&dims[..]).map(Value::Real).map_err(Fault::from),
            _ => Ok(Value::Planned(dims)),
        }
    }

    /// The same shape, other numbers. Ids and positions count as numbers.
    pub fn map(&self, compute: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) -> Outcome {
        self.make(self.own_dims()?, |t| {
            if t.dtype() == DType::U32 { compute(&t.to_dtype(DType::F32)?) } else { compute(t) }
        })
    }

    /// Two tensors, broadcast against each other.
    pub fn zip(&self, other: &Value, compute: impl FnOnce(&Tensor, &Tensor) -> candle_core::Result<Tensor>) -> Outcome {
        let dims = broadcast(self.dims()?, other.dims()?)?;
        match (self, other) {
            (Value::Real(a), Value::Real(b)) if a.dtype() == b.dtype() && a.dtype() != DType::U32 => {
                compute(a, b).map(Value::Real).map_err(Fault::from)
            }
            // Ids and positions, and what was computed from them, join the other side's type.
            (Value::Real(a), Value::Real(b)) => {
                let dtype = if matches!(a.dtype(), DType::U32 | DType::F32) { b.dtype() } else { a.dtype() };
                let dtype = if dtype == DType::U32 { DType::F32 } else { dtype };
                compute(&a.to_dtype(dtype)?, &b.to_dtype(dtype)?).map(Value::Real).map_err(Fault::from)
            }
            _ => Ok(Value::Planned(dims)),
        }
    }

    /// Reduces the last axis to length 1.
    pub fn fold(&self, compute: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>) -> Outcome {
        self.last()?;
        let mut dims = self.own_dims()?;
        *dims.last_mut().ok_or_else(|| fault!("a tensor without axes"))? = 1;
        self.make(dims, compute)
    }

    /// `[tokens, heads * head_dim]` -> `[tokens, heads, head_dim]`
    pub fn split_heads(&self, head_dim: usize) -> Outcome {
        match *self.dims()? {
            [tokens, width] if head_dim > 0 && width.is_multiple_of(head_dim) => {
                self.reshaped(smallvec![tokens, width / head_dim, head_dim])
            }
            ref dims => Err(fault!("{dims:?} is not [tokens, heads * {head_dim}]")),
        }
    }

    /// `[tokens, heads, head_dim]` -> `[tokens, heads * head_dim]`
    pub fn merge_heads(&self) -> Outcome {
        match *self.dims()? {
            [tokens, heads, head_dim] => self.reshaped(smallvec![tokens, heads * head_dim]),
            ref dims => Err(fault!("{dims:?} is not [tokens, heads, head_dim]")),
        }
    }

    /// Entries of the last axis.
    pub fn narrow(&self, start: usize, len: usize) -> Outcome {
        let (mut dims, last) = (self.own_dims()?, self.last()?);
        if start.checked_add(len).is_none_or(|end| end > last) {
            return Err(fault!("entries {start}..{start}+{len} of an axis of {last}"));
        }
        *dims.last_mut().ok_or_else(|| fault!("a tensor without axes"))? = len;
        self.make(dims, |t| t.narrow(D::Minus1, start, len)?.contiguous())
    }

    /// Joins along the last axis.
    pub fn concat(parts: &[Value]) -> Outcome {
        let Some(first) = parts.first() else { return Err(fault!("nothing to join")) };
        let (mut dims, mut width) = (first.own_dims()?, 0);
        for part in parts {
            let (d, lead) = (part.dims()?, dims.len().saturating_sub(1));
            if d.len() != dims.len() || d[..lead] != dims[..lead] {
                return Err(fault!("{dims:?} and {d:?} differ before the last axis"));
            }
            width += part.last()?;
        }
        *dims.last_mut().ok_or_else(|| fault!("a tensor without axes"))? = width;
        let real: Vec<&Tensor> =
            parts.iter().filter_map(|p| if let Value::Real(t) = p { Some(t) } else { None }).collect();
        if real.len() == parts.len() {
            Tensor::cat(&real, D::Minus1).map(Value::Real).map_err(Fault::from)
        } else {
            Ok(Value::Planned(dims))
        }
    }

    /// `[.., n * m]` -> `[.., n, m]`
    pub fn unflatten(&self, n: usize) -> Outcome {
        let (mut dims, last) = (self.own_dims()?, self.last()?);
        if n == 0 || !last.is_multiple_of(n) {
            return Err(fault!("an axis of {last} does not split in {n}"));
        }
        dims.pop();
        dims.extend([n, last / n]);
        self.reshaped(dims)
    }

    /// `[.., n, m]` -> `[.., n * m]`
    pub fn flatten(&self) -> Outcome {
        let mut dims = self.own_dims()?;
        let (Some(m), Some(n)) = (dims.pop(), dims.pop()) else { return Err(fault!("fewer than two axes to join")) };
        dims.push(n * m);
        self.reshaped(dims)
    }

    /// The last two axes exchanged.
    pub fn transpose(&self) -> Outcome {
        let mut dims = self.own_dims()?;
        let n = dims.len();
        if n < 2 {
            return Err(fault!("fewer than two axes to exchange"));
        }
        dims.swap(n - 1, n - 2);
        self.make(dims, |t| t.transpose(D::Minus1, D::Minus2)?.contiguous())
    }

    /// `[.., n, k] · [.., k, m]`
    pub fn matmul(&self, other: &Value) -> Outcome {
        let (a, b) = (self.dims()?, other.dims()?);
        if a.len() < 2 || b.len() < 2 || a[a.len() - 1] != b[b.len() - 2] {
            return Err(fault!("{a:?} times {b:?}"));
        }
        let mut dims = broadcast(&a[..a.len() - 2], &b[..b.len() - 2])?;
        dims.extend([a[a.len() - 2], b[b.len() - 1]]);
        match (self, other) {
            (Value::Real(a), Value::Real(b)) => a.broadcast_matmul(b).map(Value::Real).map_err(Fault::from),
            _ => Ok(Value::Planned(dims)),
        }
    }

    /// The k largest of the last axis and their indices (u32). By a full sort on devices, which candle limits: see `sort` there.
    pub fn topk(&self, k: usize) -> Outcome<(Value, Value)> {
        let (mut dims, last) = (self.own_dims()?, self.last()?);
        if k == 0 || k > last {
            return Err(fault!("the {k} largest of {last}"));
        }
        *dims.last_mut().ok_or_else(|| fault!("a tensor without axes"))? = k;
        let Value::Real(t) = self else { return Ok((Value::Planned(dims.clone()), Value::Planned(dims))) };
        #[cfg(feature = "cuda")]
        if t.device().is_cuda()
            && let Some((values, indices)) = crate::kernels::cuda::step::topk(t, k)?
        {
            return Ok((Value::Real(values), Value::Real(indices)));
        }
        let rows = t.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1::<f32>()).map_err(Fault::from)?;
        let mut chosen = Vec::with_capacity(rows.len() / last * k);
        rows.chunks(last).for_each(|row| chosen.extend(largest(row, k)));
        let indices = Tensor::from_vec(chosen, &dims[..], t.device()).map_err(Fault::from)?;
        let values = t.gather(&indices, D::Minus1).map_err(Fault::from)?;
        Ok((Value::Real(values), Value::Real(indices)))
    }

    /// Entries of the last axis by index.
    pub fn gather(&self, indices: &Value) -> Outcome {
        let (a, b) = (self.dims()?, indices.dims()?);
        if a.len() != b.len() || a.is_empty() || a[..a.len() - 1] != b[..b.len() - 1] {
            return Err(fault!("indices {b:?} into {a:?}"));
        }
        let dims = Dims::from_slice(b);
        match (self, indices) {
            // A table of ids may have been saved as floats.
            (Value::Real(t), Value::Real(i)) if i.dtype().is_float() => {
                t.gather(&i.to_dtype(DType::U32)?, D::Minus1).map(Value::Real).map_err(Fault::from)
            }
            (Value::Real(t), Value::Real(i)) => t.gather(i, D::Minus1).map(Value::Real).map_err(Fault::from),
            _ => Ok(Value::Planned(dims)),
        }
    }

    /// 1 for the k largest of the last axis, else 0.
    pub fn top_mask(&self, k: usize) -> Outcome {
        let Value::Real(t) = self else { return self.topk(k).and_then(|_| Ok(Value::planned(self.dims()?))) };
        match self.topk(k)?.1 {
            Value::Real(chosen) => {
                let ones = chosen.ones_like()?.to_dtype(t.dtype())?;
                Ok(Value::Real(t.zeros_like()?.scatter_add(&chosen, &ones, D::Minus1)?))
            }
            other => Ok(other),
        }
    }

    /// The nearest whole number, halves to the even one.
    pub fn round(&self) -> Outcome {
        // candle rounds halves away from zero: there the floor of x + 1/2 is odd exactly when it should not be taken.
        self.map(|t| {
            let up = (t + 0.5)?.floor()?;
            let is_half = up.broadcast_sub(t)?.eq(0.5)?.to_dtype(t.dtype())?;
            let odd = (&up - ((&up / 2.0)?.floor()? * 2.0)?)?;
            &up - (is_half * odd)?
        })
    }

    /// Softmax over the last axis, in f32.
    pub fn softmax(&self) -> Outcome {
        self.last()?;
        self.map(|t| candle_nn::ops::softmax_last_dim(&t.to_dtype(DType::F32)?.contiguous()?)?.to_dtype(t.dtype()))
    }

    /// log(1 + eˣ), without overflow for large x.
    pub fn softplus(&self) -> Outcome {
        self.map(|t| t.relu()? + (t.abs()?.neg()?.exp()? + 1.0)?.log()?)
    }

    /// 1 where a > b, else 0, in the numbers' own type.
    pub fn greater(&self, other: &Value) -> Outcome {
        self.zip(other, |a, b| a.broadcast_gt(b)?.to_dtype(a.dtype()))
    }
}

/// The shape of two tensors computed with each other: axes from the right, 1 stretches.
pub(super) fn broadcast(a: &[usize], b: &[usize]) -> Outcome<Dims> {
    if a == b {
        return Ok(Dims::from_slice(a));
    }
    let n = a.len().max(b.len());
    let axis = |d: &[usize], i: usize| (i + d.len()).checked_sub(n).map_or(1, |i| d[i]);
    (0..n)
        .map(|i| match (axis(a, i), axis(b, i)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            _ => Err(fault!("{a:?} against {b:?}")),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(x: &[f32]) -> Value {
        Value::Real(Tensor::new(x, &candle_core::Device::Cpu).unwrap())
    }

    fn ids(x: &[u32]) -> Value {
        Value::Real(Tensor::new(x, &candle_core::Device::Cpu).unwrap())
    }

    fn read(outcome: Outcome) -> Vec<f32> {
        match outcome.unwrap() {
            Value::Real(t) => t.flatten_all().unwrap().to_vec1().unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn halves_are_rounded_to_the_even_neighbour_and_floors_go_down() {
        let x = [-2.5f32, -1.5, -1.2, -0.5, 0.0, 0.4, 0.5, 0.6, 1.5, 2.5, 3.7];
        assert_eq!(read(numbers(&x).round()), x.map(f32::round_ties_even));
        assert_eq!(read(numbers(&x).map(|t| t.floor())), x.map(f32::floor));
    }

    #[test]
    fn the_mask_of_the_largest_takes_the_first_of_equals() {
        assert_eq!(read(numbers(&[1.0, 3.0, 2.0, 3.0, 3.0]).top_mask(2)), [0.0, 1.0, 0.0, 1.0, 0.0]);
        assert!(matches!(Value::planned(&[2, 5]).top_mask(2).unwrap(), Value::Planned(dims) if dims[..] == [2, 5]));
        assert!(numbers(&[1.0]).top_mask(2).is_err());
    }

    #[test]
    fn ids_count_as_numbers_in_arithmetic() {
        let (a, b) = (ids(&[1, 5, 9]), ids(&[2, 2, 2]));
        assert_eq!(read(a.zip(&b, |a, b| a.broadcast_sub(b))), [-1.0, 3.0, 7.0]);
        assert_eq!(read(a.zip(&numbers(&[0.5, 0.5, 0.5]), |a, b| a.broadcast_mul(b))), [0.5, 2.5, 4.5]);
        assert_eq!(read(numbers(&[0.5, 0.5, 0.5]).zip(&b, |a, b| a.broadcast_add(b))), [2.5, 2.5, 2.5]);
        assert_eq!(read(a.map(|t| t * 0.5)), [0.5, 2.5, 4.5]);
        assert_eq!(read(a.greater(&b)), [0.0, 1.0, 1.0]);
    }
}
