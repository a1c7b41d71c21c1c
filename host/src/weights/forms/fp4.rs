//! E2M1 nibbles, two a byte, the earlier in the low half, as several tools name them:
//!
//! ```text
//! compressed-tensors  X.weight_packed, weight_scale       scale E4M3 for 16, weight_global_scale divides it (NVFP4), or E8M0 for 32 (MXFP4)
//! Model Optimizer     X.weight, weight_scale              E4M3 for 16, weight_scale_2 multiplies it
//! DeepSeek            X.weight, X.scale                   E8M0 for 32
//! gpt-oss             X_blocks [.., groups, 16], X_scales E8M0 for 32
//! ```
//!
//! All lie as our kernels read them; a factor of the matrix becomes one of each row.

use super::{Form, Named, flat};
use crate::{
    error::Result,
    kernels::cpu::{Format, Matrix},
    weights::{Dtype, bytes::Bytes},
};

pub struct Fp4 {
    tensors: &'static [&'static str],
    scale: &'static str,
    /// The factor's name, and whether it divides.
    factor: Option<(&'static str, bool)>,
}

pub static PACKED: Fp4 = Fp4 {
    tensors: &["_packed", "_scale", "_global_scale", "_shape", ".input_global_scale", ".input_scale"],
    scale: "_scale",
    factor: Some(("_global_scale", true)),
};
pub static MODELOPT: Fp4 =
    Fp4 { tensors: &["", "_scale", "_scale_2", ".input_scale"], scale: "_scale", factor: Some(("_scale_2", false)) };
pub static DEEPSEEK: Fp4 = Fp4 { tensors: &["", ".scale"], scale: ".scale", factor: None };
pub static BLOCKS: Fp4 = Fp4 { tensors: &["_blocks", "_scales"], scale: "_scales", factor: None };

impl Fp4 {
    /// The weight's shape, and whether its scales are E4M3.
    fn layout(&self, w: &Named) -> Result<(Vec<usize>, bool)> {
        let (data, scale) = (w.need(self.tensors[0])?, w.need(self.scale)?);
        data.is(&[Dtype::U8, Dtype::I8])?;
        let misfit = || data.wrong(format!("{:?} with scales {:?} is no FP4", data.stored.shape, scale.stored.shape));
        let mut shape = data.stored.shape.clone();
        // gpt-oss keeps the bytes of a group on an axis of their own.
        if self.tensors[0] == "_blocks" {
            let group = shape.pop().filter(|&bytes| bytes == 16).ok_or_else(misfit)?;
            let last = shape.last_mut().ok_or_else(misfit)?;
            *last = last.checked_mul(group).ok_or_else(misfit)?;
        }
        let last = shape.last_mut().ok_or_else(misfit)?;
        *last = last.checked_mul(2).filter(|&cols| cols > 0).ok_or_else(misfit)?;
        let small_floats = scale.stored.dtype == Dtype::F8E4M3;
        scale.is(&[Dtype::F8E4M3, Dtype::U8, Dtype::F8E8M0])?;
        let (group, mut scales) = (if small_floats { 16 } else { 32 }, shape.clone());
        let groups = scales.last_mut().ok_or_else(misfit)?;
        if !groups.is_multiple_of(group) {
            return Err(misfit());
        }
        *groups /= group;
        scale.has_shape(&scales)?;
        if let (true, Some((factor, _))) = (small_floats, self.factor) {
            let factor = w.need(factor)?;
            let leading: usize = shape.iter().rev().skip(2).product();
            if factor.stored.elements() != 1 && factor.stored.elements() != leading {
                return Err(factor.wrong(format!("{:?} where one factor belongs", factor.stored.shape)));
            }
        }
        Ok((shape, small_floats))
    }
}

impl Form for Fp4 {
    fn tensors(&self) -> &'static [&'static str] {
        self.tensors
    }

    fn shape(&self, w: &Named) -> Result<Vec<usize>> {
        self.layout(w).map(|(shape, _)| shape)
    }

    fn matrix(&self, w: &Named) -> Result<Matrix> {
        let (shape, small_floats) = self.layout(w)?;
        let (rows, cols) = flat(&shape).ok_or_else(|| w.wrong(format!("a weight of shape {shape:?}")))?;
        let (data, scale) = (w.need(self.tensors[0])?.stored.bytes(), w.need(self.scale)?.stored.bytes());
        let Some((factor, divides)) = self.factor.filter(|_| small_floats) else {
            let format = if small_floats { Format::Nvfp4 } else { Format::Mxfp4 };
            return Matrix::new(format, rows, cols, data, Some(scale), None);
        };
        let factors = w.need(factor)?.floats()?;
        let each = rows / factors.len().max(1);
        let value = |&f: &f32| if divides { 1.0 / f } else { f };
        let factors: Vec<u8> = factors.iter().map(value).flat_map(|f| f.to_le_bytes().repeat(each)).collect();
        Matrix::new(Format::Nvfp4Scaled, rows, cols, data, Some(scale), Some(Bytes::from(factors)))
    }
}
