//! Shapes of products with packed weights -> which kernel, with which numbers, over which grid. See matmul.metal.

use super::launch::{Kernel, Launch, Source, number, word};
use crate::kernels::cpu::{Float, Format};
use candle_core::DType;

/// Up to this many tokens weights are unpacked as they stream by; beyond, tile by tile.
pub const FEW: usize = 8;

/// A packed matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// How it is packed.
    pub format: Format,
    /// Outputs; of experts, those of one.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
}

/// Experts whose rows lie one after the other in one matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// How many experts there are.
    pub experts: usize,
    /// How many of them each row of x goes through.
    pub each: usize,
}

/// The format in Metal's language; none of what is not packed.
fn unpacks(format: Format) -> Option<String> {
    Some(match format {
        Format::Dense(_) => return None,
        Format::Affine { bits, group, scales } => {
            let scales = match scales {
                Float::F32 => "float",
                Float::F16 => "half",
                Float::BF16 => "bfloat",
            };
            // In parentheses, because a macro's argument ends at a comma.
            format!("AFFINE({bits}, {group}, {scales})")
        }
        Format::Fp8 { block } => format!("Fp8<{}>", block.min(1 << 30)),
        other => format!("{other:?}"),
    })
}

/// Whether there are kernels for matrices of this format.
pub fn reads(format: Format) -> bool {
    unpacks(format).is_some()
}

impl Shape {
    fn kernel(&self, maker: &'static str, dtype: DType, more: &[usize]) -> Option<Kernel> {
        let mut of = vec![unpacks(self.format)?, word(dtype)?.to_owned()];
        of.extend(more.iter().map(usize::to_string));
        Some(Kernel { source: Source::Matmul, maker, of })
    }

    fn numbers(&self, tokens: usize, choice: Choice) -> Vec<u32> {
        let strides = self.format.row_bytes(self.cols);
        let all = [self.rows, self.cols, tokens, choice.experts, choice.each];
        all.into_iter().chain(strides).map(number).collect()
    }

    /// Inputs: weights, scales, biases, x `[tokens, cols]`. Output `[tokens, rows]` in `dtype`, which x has too.
    pub fn matmul(&self, tokens: usize, dtype: DType) -> Option<Launch> {
        let abreast = if tokens == 1 { 1 } else { 4 };
        let (kernel, groups, threads, shared) = match tokens <= FEW {
            true => {
                let kernel = self.kernel("FEW", dtype, &[abreast])?;
                (kernel, [self.rows.div_ceil(8), tokens.div_ceil(abreast), 1], 64, 0)
            }
            false => {
                let kernel = self.kernel("MANY", dtype, &[])?;
                (kernel, [self.rows.div_ceil(32), tokens.div_ceil(32), 1], 128, 2 * 32 * 36 * 4)
            }
        };
        let numbers = self.numbers(tokens, Choice { experts: 1, each: 1 });
        Some(Launch { kernel, numbers, groups, threads, shared, outputs: vec![(vec![tokens, self.rows], dtype)] })
    }

    /// Inputs: weights, scales, biases of all experts, x `[pairs / each, cols]`, experts (u32) `[pairs]`. Output `[pairs, rows]`.
    pub fn chosen(&self, pairs: usize, choice: Choice, dtype: DType) -> Option<Launch> {
        Some(Launch {
            kernel: self.kernel("CHOSEN", dtype, &[])?,
            numbers: self.numbers(pairs, choice),
            groups: [self.rows.div_ceil(8), pairs, 1],
            threads: 64,
            shared: 0,
            outputs: vec![(vec![pairs, self.rows], dtype)],
        })
    }

    /// Inputs: weights, scales, biases, row numbers (u32) `[ids]`. Output `[ids, cols]`.
    pub fn gather(&self, ids: usize, dtype: DType) -> Option<Launch> {
        Some(Launch {
            kernel: self.kernel("GATHER", dtype, &[])?,
            numbers: self.numbers(ids, Choice { experts: 1, each: 1 }),
            groups: [self.cols.div_ceil(2048), ids, 1],
            threads: 256,
            shared: 0,
            outputs: vec![(vec![ids, self.cols], dtype)],
        })
    }
}
