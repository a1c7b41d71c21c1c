//! One tensor as its file holds it: type, shape and bytes, none of them converted.
//! The bytes are little-endian and need not be aligned to the element: safetensors headers may have any length.

use crate::{
    error::{Error, Result},
    weights::bytes::{Bytes, Room},
};
use std::{fmt, path::Path, sync::Arc};

/// Element or block type as the file states it. Block types store rows of `elements_per_block` values each (ggml's layouts).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3,
    F8E5M2,
    F8E8M0,
    U64,
    I64,
    U32,
    I32,
    U16,
    I16,
    U8,
    I8,
    Bool,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

impl Dtype {
    /// Values in one block and bytes of one block; `(1, size)` for plain elements.
    pub const fn block(self) -> (usize, usize) {
        use Dtype::*;
        match self {
            F64 | U64 | I64 => (1, 8),
            F32 | U32 | I32 => (1, 4),
            F16 | BF16 | U16 | I16 => (1, 2),
            F8E4M3 | F8E5M2 | F8E8M0 | U8 | I8 | Bool => (1, 1),
            Q4_0 => (32, 18),
            Q4_1 => (32, 20),
            Q5_0 => (32, 22),
            Q5_1 => (32, 24),
            Q8_0 => (32, 34),
            Q2K => (256, 84),
            Q3K => (256, 110),
            Q4K => (256, 144),
            Q5K => (256, 176),
            Q6K => (256, 210),
        }
    }

    /// Whether values come in blocks that share a scale.
    pub const fn is_blocks(self) -> bool {
        self.block().0 > 1
    }

    /// Bytes of `elements` values; `None` where they do not fill whole blocks or the size overflows.
    pub const fn size_in_bytes(self, elements: usize) -> Option<usize> {
        let (per_block, bytes) = self.block();
        if !elements.is_multiple_of(per_block) { None } else { (elements / per_block).checked_mul(bytes) }
    }

    /// Bytes of a tensor of this shape; `None` where a row is not whole blocks or a product overflows.
    pub fn size_of_shape(self, shape: &[usize]) -> Option<usize> {
        if !shape.last().copied().unwrap_or(self.block().0).is_multiple_of(self.block().0) {
            return None;
        }
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        self.size_in_bytes(elements)
    }

    /// The type's usual name: `F32`, `BF16`, `Q4_K`.
    pub const fn name(self) -> &'static str {
        use Dtype::*;
        match self {
            F64 => "F64",
            F32 => "F32",
            F16 => "F16",
            BF16 => "BF16",
            F8E4M3 => "F8_E4M3",
            F8E5M2 => "F8_E5M2",
            F8E8M0 => "F8_E8M0",
            U64 => "U64",
            I64 => "I64",
            U32 => "U32",
            I32 => "I32",
            U16 => "U16",
            I16 => "I16",
            U8 => "U8",
            I8 => "I8",
            Bool => "BOOL",
            Q4_0 => "Q4_0",
            Q4_1 => "Q4_1",
            Q5_0 => "Q5_0",
            Q5_1 => "Q5_1",
            Q8_0 => "Q8_0",
            Q2K => "Q2_K",
            Q3K => "Q3_K",
            Q4K => "Q4_K",
            Q5K => "Q5_K",
            Q6K => "Q6_K",
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor in its file. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub struct Stored {
    /// What the bytes are.
    pub dtype: Dtype,
    /// Row-major: `[out, in]` for a linear layer's weight.
    pub shape: Vec<usize>,
    /// The file, for messages.
    pub file: Arc<Path>,
    /// llama.cpp stores the rows of q and k as (head, pair, 2) where checkpoints have (head, 2, pair); this is the number of heads.
    pub permuted_heads: Option<usize>,
    /// `None` where only the file's header is here.
    bytes: Option<Bytes>,
}

impl Stored {
    /// A tensor of a file whose header alone is here. It has no bytes to be read.
    pub fn elsewhere(dtype: Dtype, shape: Vec<usize>, file: Arc<Path>) -> Self {
        Self { dtype, shape, file, permuted_heads: None, bytes: None }
    }

    /// Whether its bytes can be read here.
    pub fn is_here(&self) -> bool {
        self.bytes.is_some()
    }

    /// Checks that `bytes` is as long as dtype and shape ask for.
    pub fn new(dtype: Dtype, shape: Vec<usize>, bytes: Bytes, file: Arc<Path>) -> Result<Self> {
        match dtype.size_of_shape(&shape) {
            Some(size) if size == bytes.len() => {
                Ok(Self { dtype, shape, file, permuted_heads: None, bytes: Some(bytes) })
            }
            _ => Err(Error::Weights(format!(
                "{}: {dtype} {shape:?} does not take {} bytes: the file is damaged",
                file.display(),
                bytes.len()
            ))),
        }
    }

    /// The same tensor, its rows marked as permuted by llama.cpp's converter for `heads` heads.
    pub fn with_permuted_heads(mut self, heads: usize) -> Result<Self> {
        let rows = self.shape.first().copied().unwrap_or(0);
        if heads == 0 || !rows.is_multiple_of(heads) || !(rows / heads).is_multiple_of(2) {
            return Err(Error::Weights(format!(
                "{}: {rows} rows are not {heads} heads of an even size: the file is damaged",
                self.file.display()
            )));
        }
        self.permuted_heads = Some(heads);
        Ok(self)
    }

    /// The values in the order of the shape. Shared with the file, or copied where rows had to be put right; none of a tensor that is
    /// not here.
    pub fn bytes(&self) -> Bytes {
        match (self.permuted_heads, &self.bytes) {
            (_, None) => Vec::new().into(),
            (Some(heads), Some(bytes)) => self.rows_put_right(bytes, heads),
            (None, Some(bytes)) => bytes.clone(),
        }
    }

    /// Bytes in the file.
    pub fn len(&self) -> usize {
        self.dtype.size_of_shape(&self.shape).unwrap_or(0)
    }

    /// Whether a dimension is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many values the tensor has.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    // Blocks never cross rows, so whole rows move in every format. What they are copied from is not read again.
    fn rows_put_right(&self, bytes: &Bytes, heads: usize) -> Bytes {
        let rows = self.shape.first().copied().unwrap_or(0);
        let (head_dim, row_bytes) = (rows / heads, bytes.len().checked_div(rows).unwrap_or(0));
        let put_right = |out: &mut [u8]| {
            for (row, out) in out.chunks_exact_mut(row_bytes.max(1)).enumerate() {
                let (head, within) = (row / head_dim, row % head_dim);
                let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
                let from = (head * head_dim + pair * 2 + half) * row_bytes;
                out.copy_from_slice(&bytes[from..from + row_bytes]);
            }
            bytes.let_go();
        };
        match Room::new(bytes.len()) {
            Ok(mut room) => {
                put_right(&mut room);
                room.into()
            }
            Err(_) => {
                let mut out = vec![0; bytes.len()];
                put_right(&mut out);
                out.into()
            }
        }
    }
}
