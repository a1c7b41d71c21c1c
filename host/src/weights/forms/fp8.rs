//! E4M3 weights with scales of any grid: `X.weight_scale_inv` for blocks (DeepSeek: 128 x 128, the last of a row or column shorter),
//! `weight_scale` for a matrix, a row or a block (compressed-tensors, Model Optimizer, FBGEMM), or `X.scale` (DeepSeek's own files).
//! In spite of the name all of them multiply. The bytes stay in the file; scales are repeated for each row of a block.

use super::{Beside, Form, Named, flat};
use crate::{
    config::Scheme,
    error::Result,
    kernels::cpu::{Format, Matrix},
    weights::{Dtype, bytes::Bytes},
};

pub struct Fp8;

const SCALES: [&str; 3] = ["_scale_inv", "_scale", ".scale"];

/// Scales over one matrix of `rows` rows: which scale a row has, and how many columns share one.
struct Grid {
    /// Rows of a block, and rows of scales.
    rows: (usize, usize),
    /// Columns of a block, and columns of scales.
    cols: (usize, usize),
    /// Scales from one matrix of a stack to the next; 0 where they share them.
    stride: usize,
}

impl Fp8 {
    fn scale<'a>(w: &Named<'a>) -> Result<Option<Beside<'a>>> {
        let found = SCALES.iter().find_map(|part| w.get(part));
        match (&found, w.scheme()) {
            // A number of its own worth, where nobody says otherwise.
            (None, None) => Ok(None),
            (None, Some(_)) => Err(w.wrong(format!(
                "F8_E4M3 without its scales: {} is not in the checkpoint: download it again",
                w.name_of("_scale_inv")
            ))),
            _ => Ok(found),
        }
    }

    fn grid(w: &Named, scale: &Beside, shape: &[usize]) -> Result<Grid> {
        let [block_rows, block_cols] = match w.scheme() {
            Some(Scheme::Fp8 { block } | Scheme::CompressedTensors { block, .. }) => *block,
            _ => [128, 128],
        };
        let misfit = || scale.wrong(format!("{:?} does not divide a weight of {shape:?}", scale.stored.shape));
        let (&cols, above) = shape.split_last().ok_or_else(misfit)?;
        let (rows, leading) = above.split_last().map_or((1, above), |(&rows, leading)| (rows, leading));
        let is = scale.stored.shape.as_slice();
        // [.., rows of scales, columns of scales]
        let (across, down, stacked) = match is {
            _ if scale.stored.elements() == 1 => (1, 1, false),
            [before @ .., down, across] if before == leading => (*across, *down, true),
            [down, across] => (*across, *down, false),
            _ if is == above => (1, rows, true),
            _ if is == leading => (1, 1, true),
            _ => return Err(misfit()),
        };
        // config.json's block where it fits, otherwise what the numbers of scales say.
        let side = |length: usize, scales: usize, block: usize| match scales {
            0 => None,
            1 => Some(length.max(1)),
            n if n == length => Some(1),
            n if length.div_ceil(block) == n => Some(block),
            n => length.is_multiple_of(n).then(|| length / n),
        };
        let rows = side(rows, down, block_rows).ok_or_else(misfit)?;
        let cols = side(cols, across, block_cols).ok_or_else(misfit)?;
        Ok(Grid { rows: (rows, down), cols: (cols, across), stride: if stacked { down * across } else { 0 } })
    }
}

impl Form for Fp8 {
    fn tensors(&self) -> &'static [&'static str] {
        &[
            "",
            "_scale_inv",
            "_scale",
            ".scale",
            "_zero_point",
            ".input_scale",
            ".activation_scale",
            ".output_scale",
            ".input_scale_ub",
        ]
    }

    fn shape(&self, w: &Named) -> Result<Vec<usize>> {
        let shape = w.need("")?.stored.shape.clone();
        if let Some(scale) = Self::scale(w)? {
            Self::grid(w, &scale, &shape)?;
        }
        Ok(shape)
    }

    fn matrix(&self, w: &Named) -> Result<Matrix> {
        let stored = w.need("")?.stored;
        let (rows, cols) = flat(&stored.shape).ok_or_else(|| w.wrong("a weight without columns"))?;
        let Some(scale) = Self::scale(w)? else {
            let ones = 1f32.to_le_bytes().repeat(rows);
            return Matrix::new(Format::Fp8 { block: cols }, rows, cols, stored.bytes(), Some(ones.into()), None);
        };
        if w.get("_zero_point").is_some_and(|zero| zero.stored.bytes().iter().any(|&b| b != 0)) {
            return Err(w.wrong("F8_E4M3 with zero points that are not zero is not read"));
        }
        let grid = Self::grid(w, &scale, &stored.shape)?;
        let each = stored.shape.iter().rev().nth(1).copied().unwrap_or(1).max(1);
        let first =
            |row: usize| row / each * grid.stride + (row % each / grid.rows.0).min(grid.rows.1 - 1) * grid.cols.1;
        let spread = |bytes: &[u8], size: usize| {
            let of_row = |row: usize| &bytes[first(row) * size..][..grid.cols.1 * size];
            Bytes::from((0..rows).flat_map(of_row).copied().collect::<Vec<u8>>())
        };
        // Powers of two for 32 are a format of their own, with a quarter of the bytes.
        if matches!(scale.stored.dtype, Dtype::F8E8M0 | Dtype::U8) && grid.cols.0 == 32 && cols.is_multiple_of(32) {
            let scales = spread(&scale.stored.bytes(), 1);
            return Matrix::new(Format::Mxfp8, rows, cols, stored.bytes(), Some(scales), None);
        }
        let scales: Vec<u8> = scale.floats()?.into_iter().flat_map(f32::to_le_bytes).collect();
        let format = Format::Fp8 { block: grid.cols.0 };
        Matrix::new(format, rows, cols, stored.bytes(), Some(spread(&scales, 4)), None)
    }
}
