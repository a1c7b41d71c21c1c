//! candle tensors on the CPU <-> plain slices, for dylm's own kernels. Nothing is copied for a tensor that lies in one piece.

use crate::kernels::cpu::zeros;
use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};

/// Lends the numbers of an f32 tensor on the CPU.
pub fn with_f32<R>(t: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(numbers)), Some((start, end))) => Ok(f(&numbers[start..end])),
        _ => bail!("expected f32 on the cpu, got {:?}", t.dtype()),
    }
}

/// Lends the ids of a u32 tensor on the CPU.
pub fn with_u32<R>(t: &Tensor, f: impl FnOnce(&[u32]) -> R) -> Result<R> {
    let t = t.contiguous()?;
    let (storage, layout) = t.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::U32(numbers)), Some((start, end))) => Ok(f(&numbers[start..end])),
        _ => bail!("expected u32 on the cpu, got {:?}", t.dtype()),
    }
}

/// A tensor of `dims` whose numbers `fill` writes.
pub fn filled(dims: impl Into<candle_core::Shape>, fill: impl FnOnce(&mut [f32])) -> Result<Tensor> {
    let shape = dims.into();
    let mut numbers = zeros(shape.elem_count());
    fill(&mut numbers);
    Tensor::from_vec(numbers, shape, &Device::Cpu)
}

/// The same for several tensors at once.
pub fn with_each_f32<R>(tensors: &[Tensor], f: impl FnOnce(&[&[f32]]) -> R) -> Result<R> {
    let whole = tensors.iter().map(Tensor::contiguous).collect::<Result<Vec<_>>>()?;
    let held: Vec<_> = whole.iter().map(|t| t.storage_and_layout()).collect();
    let mut slices: Vec<&[f32]> = Vec::with_capacity(held.len());
    for (storage, layout) in &held {
        slices.push(match (&**storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(numbers)), Some((start, end))) => &numbers[start..end],
            _ => bail!("expected f32 on the cpu"),
        });
    }
    Ok(f(&slices))
}

/// The same for a number of tensors that is known while compiling.
pub fn with_all_f32<const N: usize, R>(tensors: &[Tensor], f: impl FnOnce([&[f32]; N]) -> R) -> Result<R> {
    let lent = with_each_f32(tensors, |slices| <[&[f32]; N]>::try_from(slices).ok().map(f));
    lent?.map_or_else(|| bail!("{} tensors for {N}", tensors.len()), Ok)
}
