//! A packed matrix on the GPU, as it lay in the checkpoint, or some rows of one: products with it, rows by number.

use super::{
    device::{run_one, serves},
    launch::word,
    matmul::{Choice, Shape, reads},
};
use crate::{device::Placement, kernels::cpu::Matrix};
use candle_core::{DType, Result, Tensor};
use std::{ops::Range, sync::Arc};

/// `[rows, cols]` = `[outputs, inputs]`. Cloning shares the memory.
#[derive(Clone, Debug)]
pub struct Packed {
    whole: Arc<Whole>,
    rows: Range<usize>,
}

#[derive(Debug)]
struct Whole {
    shape: Shape,
    /// The type of rows by number.
    dtype: DType,
    /// Weights, scales and biases, as bytes.
    parts: [Tensor; 3],
    /// Which column is stored at each place, and where each column is stored; where these differ.
    order: Option<[Tensor; 2]>,
}

impl Packed {
    /// Brings a matrix to a device that has kernels for it; none elsewhere, and none of what is not packed.
    pub fn place(matrix: &Matrix, place: &Placement) -> Result<Option<Self>> {
        let (device, dtype) = (&place.device, place.activations());
        let shape = Shape { format: matrix.format(), rows: matrix.rows(), cols: matrix.cols() };
        if !serves(device) || !reads(shape.format) || shape.rows * shape.cols == 0 {
            return Ok(None);
        }
        // A device has no buffers without bytes; a part that is not there is never read.
        let bytes = |part: &[u8]| match part {
            [] => Tensor::new(&[0u8; 16], device),
            part => Tensor::from_slice(part, part.len(), device),
        };
        let [data, scales, biases] = matrix.parts();
        let parts = [bytes(data)?, bytes(scales)?, bytes(biases)?];
        let order = matrix.column_order().map(|order| {
            let mut places = vec![0u32; order.len()];
            for (place, &column) in (0..).zip(order) {
                if let Some(at) = places.get_mut(column as usize) {
                    *at = place;
                }
            }
            Ok::<_, candle_core::Error>([Tensor::new(order, device)?, Tensor::new(places, device)?])
        });
        let whole = Whole { shape, dtype, parts, order: order.transpose()? };
        Ok(Some(Packed { rows: 0..shape.rows, whole: Arc::new(whole) }))
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.whole.shape.cols
    }

    /// Some of the rows; none where the range does not fit.
    pub fn slice_rows(&self, rows: Range<usize>) -> Option<Self> {
        let rows = self.rows.start + rows.start..self.rows.start + rows.end;
        let fits = rows.start <= rows.end && rows.end <= self.rows.end;
        fits.then(|| Packed { whole: self.whole.clone(), rows })
    }

    /// Matrices of as many rows each that lie one after the other in one, as that one.
    pub fn joined<'a>(parts: impl IntoIterator<Item = &'a Packed>) -> Option<Self> {
        let mut parts = parts.into_iter();
        let mut joined = parts.next()?.clone();
        let rows = joined.rows();
        for part in parts {
            if !Arc::ptr_eq(&part.whole, &joined.whole) || part.rows.start != joined.rows.end || part.rows() != rows {
                return None;
            }
            joined.rows.end = part.rows.end;
        }
        Some(joined)
    }

    fn shape(&self) -> Shape {
        Shape { rows: self.rows.len(), ..self.whole.shape }
    }

    fn parts(&self) -> Result<[Tensor; 3]> {
        let bytes = self.whole.shape.format.row_bytes(self.whole.shape.cols);
        let cut = |p: usize| match bytes[p] {
            0 => Ok(self.whole.parts[p].clone()),
            bytes => self.whole.parts[p].narrow(0, self.rows.start * bytes, self.rows.len() * bytes),
        };
        Ok([cut(0)?, cut(1)?, cut(2)?])
    }

    /// x `[.., inputs]` as rows in a type that there are kernels for, columns as they are stored.
    fn rows_of(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.reshape(((), self.cols()))?;
        let x = if word(x.dtype()).is_some() { x } else { x.to_dtype(DType::F32)? };
        match &self.whole.order {
            Some([order, _]) => x.contiguous()?.index_select(order, 1),
            None => x.contiguous(),
        }
    }

    /// x `[.., inputs]` -> `x · Wᵀ` `[.., outputs]`, in x's type.
    pub fn matmul(&self, x: &Tensor) -> Result<Tensor> {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.rows();
        }
        let rows = self.rows_of(x)?;
        let (shape, [data, scales, biases]) = (self.shape(), self.parts()?);
        let launch = known(shape.matmul(rows.dim(0)?, rows.dtype()))?;
        run_one(&launch, &[&data, &scales, &biases, &rows])?.reshape(dims)?.to_dtype(x.dtype())
    }

    /// Products with chosen ones of `experts` matrices that lie one after the other here: row p of the result `[pairs, outputs]` is row
    /// `p / each` of x `[pairs / each, inputs]` times expert `chosen[p]` (u32); 0 of those that are not here.
    pub fn chosen(&self, x: &Tensor, chosen: &Tensor, Choice { experts, each }: Choice) -> Result<Tensor> {
        let rows = self.rows_of(x)?;
        let (shape, [data, scales, biases]) = (self.shape(), self.parts()?);
        let shape = Shape { rows: shape.rows / experts.max(1), ..shape };
        let chosen = chosen.flatten_all()?;
        let launch = known(shape.chosen(chosen.elem_count(), Choice { experts, each }, rows.dtype()))?;
        run_one(&launch, &[&data, &scales, &biases, &rows, &chosen])?.to_dtype(x.dtype())
    }

    /// Rows by id (u32): `[ids]` -> `[ids, inputs]` in the type of activations.
    pub fn gather(&self, ids: &Tensor) -> Result<Tensor> {
        self.gather_in(ids, self.whole.dtype)
    }

    fn gather_in(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        let ([data, scales, biases], to) = (self.parts()?, if word(dtype).is_some() { dtype } else { DType::F32 });
        let launch = known(self.shape().gather(ids.elem_count(), to))?;
        let rows = run_one(&launch, &[&data, &scales, &biases, &ids.flatten_all()?])?;
        let rows = match &self.whole.order {
            Some([_, places]) => rows.index_select(places, 1)?,
            None => rows,
        };
        rows.to_dtype(dtype)
    }

    /// All numbers, in f32.
    pub fn numbers(&self) -> Result<Tensor> {
        let all = Tensor::arange(0, self.rows() as u32, self.whole.parts[0].device())?;
        self.gather_in(&all, DType::F32)
    }
}

/// A kernel that was there when the matrix was placed.
fn known<T>(launch: Option<T>) -> Result<T> {
    launch.ok_or_else(|| candle_core::Error::msg("there is no Metal kernel for this product"))
}
