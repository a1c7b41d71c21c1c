//! A matrix of weights where it will be used: packed for dylm's own CPU kernels, or a tensor for candle on a GPU.
//!
//! On the CPU the kernels read the checkpoint's mapped bytes, or a copy in the order in which they are fastest, never both. On Metal
//! packed weights stay packed, and on NVIDIA's GPUs where there are kernels for their format and activations are bf16; elsewhere they are
//! dequantized when they are loaded.

use super::slices::{filled, with_f32};
#[cfg(feature = "cuda")]
use crate::kernels::cuda::packed::Tiles;
use crate::{
    device::Placement,
    error::Result,
    kernels::{
        cpu::{Coded, Factor, Float, Format, Matrix, Panels},
        metal,
    },
};
use candle_core::{D, DType, Device, Tensor};

/// A matrix `[rows, cols]` = `[outputs, inputs]`.
#[derive(Clone)]
pub enum Weight {
    /// For the CPU kernels.
    Packed(Matrix),
    /// For those of the CPU kernels that want it laid out anew.
    Panels(Panels),
    /// For those of the CPU kernels that read bfloat16 in fewer bits.
    Coded(Coded),
    /// For candle, in the placement's type.
    Dense(Tensor),
    /// For dylm's own kernels on an NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Tiles(Tiles),
    /// For the Metal kernels.
    Metal(metal::Packed),
    /// Any, for inputs that are rounded to eight bits first.
    Rounded(Box<Weight>),
}

impl Weight {
    /// Brings a matrix to where it is used. A dense one that is wider than `dtype` is narrowed; a narrower one stays, exactly.
    pub fn place(matrix: Matrix, place: &Placement) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if !place.native
            && place.dtype == DType::BF16
            && let Some(tiles) = Tiles::place(std::slice::from_ref(&matrix), &place.device)?
        {
            return Ok(Weight::Tiles(tiles));
        }
        if !place.native {
            return Ok(match metal::Packed::place(&matrix, place)? {
                Some(packed) => Weight::Metal(packed),
                None => Weight::Dense(dense(&matrix, place)?),
            });
        }
        let wanted = match place.dtype {
            DType::BF16 => Float::BF16,
            DType::F16 => Float::F16,
            _ => Float::F32,
        };
        let matrix = match matrix.format() {
            Format::Dense(is) if is != wanted && wanted != Float::F32 => {
                let mut numbers = vec![0.0; matrix.rows() * matrix.cols()];
                matrix.dequantize_rows(0..matrix.rows(), &mut numbers);
                Matrix::quantize(&numbers, matrix.rows(), matrix.cols(), Format::Dense(wanted))?
            }
            _ => matrix,
        };
        Ok(Weight::Packed(if place.dtype == DType::F32 { matrix } else { matrix.for_halves() }))
    }

    /// The same weights as products of them are fastest here: rows no longer lie apart, or are coded, and the checkpoint's own bytes are let go,
    /// those of a file once the model is in use. Where rows stay as they are, they may move to memory that is.
    pub fn in_panels(self) -> Self {
        match self {
            Weight::Packed(m) => match m.is_for_halves().then(|| Panels::later(&m)).flatten() {
                Some(panels) => Weight::Panels(panels),
                None => Coded::later(&m).map_or_else(|| Weight::Packed(m.that_moves()), Weight::Coded),
            },
            other => other,
        }
    }

    /// The same weights for inputs that are rounded to eight bits first.
    pub fn for_inputs_of_eight_bits(self) -> Self {
        Weight::Rounded(Box::new(self))
    }

    /// Brings the matrices of many experts to where they are used: Metal's kernels want those of one projection side by side.
    pub fn place_all(matrices: Vec<Matrix>, place: &Placement) -> Result<Vec<Self>> {
        if metal::serves(&place.device) && !place.native && matrices.len() > 1 {
            let rows = matrices.first().map_or(0, Matrix::rows);
            let alike = matrices.iter().all(|m| m.rows() == rows);
            let joined = alike.then(|| Matrix::stack(&matrices).ok()).flatten();
            if let Some(packed) = joined.map(|m| metal::Packed::place(&m, place)).transpose()?.flatten() {
                let cut = |i| packed.slice_rows(i * rows..(i + 1) * rows).map(Weight::Metal);
                return Ok((0..matrices.len()).filter_map(cut).collect());
            }
        }
        matrices.into_iter().map(|matrix| Weight::place(matrix, place)).collect()
    }

    /// For products on the CPU's own kernels, if it is for these.
    pub fn factor(&self) -> Option<Factor<'_>> {
        match self {
            Weight::Packed(m) => Some(Factor::Rows(m)),
            Weight::Panels(m) => Some(Factor::Panels(m)),
            Weight::Coded(m) => Some(Factor::Coded(m)),
            _ => None,
        }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        match self {
            Weight::Packed(m) => m.rows(),
            Weight::Panels(m) => m.rows(),
            Weight::Coded(m) => m.rows(),
            Weight::Dense(t) => t.dims()[0],
            #[cfg(feature = "cuda")]
            Weight::Tiles(t) => t.rows,
            Weight::Metal(p) => p.rows(),
            Weight::Rounded(w) => w.rows(),
        }
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        match self {
            Weight::Packed(m) => m.cols(),
            Weight::Panels(m) => m.cols(),
            Weight::Coded(m) => m.cols(),
            Weight::Dense(t) => t.dims()[1],
            #[cfg(feature = "cuda")]
            Weight::Tiles(t) => t.cols,
            Weight::Metal(p) => p.cols(),
            Weight::Rounded(w) => w.cols(),
        }
    }

    /// x `[.., inputs]` -> `x · Wᵀ` `[.., outputs]`
    pub fn matmul(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.rows();
        }
        match self {
            Weight::Packed(m) => with_f32(x, |x| Tensor::from_vec(Factor::Rows(m).times(x), dims, &Device::Cpu))?,
            Weight::Panels(m) => with_f32(x, |x| Tensor::from_vec(Factor::Panels(m).times(x), dims, &Device::Cpu))?,
            Weight::Coded(m) => with_f32(x, |x| Tensor::from_vec(Factor::Coded(m).times(x), dims, &Device::Cpu))?,
            Weight::Dense(w) => {
                let rows = x.elem_count() / w.dims()[1].max(1);
                let flat = x.reshape((rows, w.dims()[1]))?.to_dtype(w.dtype())?;
                flat.matmul(&w.t()?)?.reshape(dims)?.to_dtype(x.dtype())
            }
            #[cfg(feature = "cuda")]
            Weight::Tiles(t) => t.matmul(x, None)?.to_dtype(x.dtype()),
            Weight::Metal(p) => p.matmul(x),
            Weight::Rounded(w) => w.matmul(&eight_bits(x)?),
        }
    }

    /// Rows by id: `[ids]` -> `[ids, inputs]`.
    pub fn gather(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Weight::Packed(m) => looked_up(ids, (m.rows(), m.cols()), |ids, out| m.gather_rows(ids, out)),
            Weight::Panels(m) => looked_up(ids, (m.rows(), m.cols()), |ids, out| m.gather_rows(ids, out)),
            Weight::Coded(m) => looked_up(ids, (m.rows(), m.cols()), |ids, out| m.gather_rows(ids, out)),
            Weight::Dense(w) => w.index_select(ids, 0),
            #[cfg(feature = "cuda")]
            Weight::Tiles(t) => t.gather(ids),
            Weight::Metal(p) => p.gather(ids),
            Weight::Rounded(w) => w.gather(ids),
        }
    }

    /// All numbers, in f32.
    pub fn numbers(&self) -> candle_core::Result<Tensor> {
        match self {
            Weight::Packed(m) => filled((m.rows(), m.cols()), |out| m.dequantize_rows(0..m.rows(), out)),
            Weight::Panels(m) => filled((m.rows(), m.cols()), |out| m.dequantize(out)),
            Weight::Coded(m) => filled((m.rows(), m.cols()), |out| m.dequantize(out)),
            Weight::Dense(w) => w.to_dtype(DType::F32),
            #[cfg(feature = "cuda")]
            Weight::Tiles(t) => t.dense()?.to_dtype(DType::F32),
            Weight::Metal(p) => p.numbers(),
            Weight::Rounded(w) => w.numbers(),
        }
    }
}

/// Rows of a table in f32, as `gather` puts them.
fn looked_up(
    ids: &Tensor,
    (rows, cols): (usize, usize),
    gather: impl Fn(&[u32], &mut [f32]),
) -> candle_core::Result<Tensor> {
    super::slices::with_u32(ids, |ids| {
        known(ids, rows)?;
        filled((ids.len(), cols), |out| gather(ids, out))
    })?
}

/// Refuses ids that a table of so many rows does not have.
fn known(ids: &[u32], rows: usize) -> candle_core::Result<()> {
    match ids.iter().find(|&&id| id as usize >= rows) {
        Some(id) => candle_core::bail!(
            "row {id} of a table of {rows}: the text is longer than the model has positions, or names a token that it does not have; \
             shorten the prompt"
        ),
        None => Ok(()),
    }
}

/// Each token's inputs to the nearest 127th of its largest, as BitNet's layers were trained to see them (eq. 4 of arXiv 2402.17764, with
/// ties to even as in transformers).
fn eight_bits(x: &Tensor) -> candle_core::Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let peak = wide.abs()?.max_keepdim(D::Minus1)?.maximum(1e-5f32)?;
    let scale = ((peak.ones_like()? * 127.0)? / peak)?;
    let steps = wide.broadcast_mul(&scale)?;
    // candle rounds ties away from zero; two additions at 1.5 * 2^23 round them to even.
    let whole = ((steps + 12_582_912.0)? - 12_582_912.0)?;
    whole.clamp(-128f32, 127f32)?.broadcast_div(&scale)?.to_dtype(x.dtype())
}

fn dense(matrix: &Matrix, place: &Placement) -> Result<Tensor> {
    let numbers = filled((matrix.rows(), matrix.cols()), |out| matrix.dequantize_rows(0..matrix.rows(), out))?;
    Ok(numbers.to_dtype(place.activations())?.to_device(&place.device)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_row_that_a_table_does_not_have_is_told_and_no_panic() {
        let numbers: Vec<f32> = (0..128).map(|n| n as f32).collect();
        let matrix = Matrix::quantize(&numbers, 2, 64, Format::Dense(Float::BF16)).unwrap();
        let packed = Format::Affine { bits: 4, group: 64, scales: Float::BF16 };
        let panels = Matrix::quantize(&[0.5; 64 * 64], 64, 64, packed).unwrap().for_halves();
        for weight in [Weight::Packed(matrix), Weight::Packed(panels).in_panels()] {
            let rows = weight.rows() as u32;
            let gather = |ids: &[u32]| weight.gather(&Tensor::new(ids, &Device::Cpu).unwrap());
            assert_eq!(gather(&[rows - 1, 0]).unwrap().dims(), [2, 64]);
            let error = gather(&[0, rows]).unwrap_err().to_string();
            assert!(error.contains(&format!("row {rows} of a table of {rows}")), "{error}");
        }
    }
}
