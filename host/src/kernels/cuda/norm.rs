//! `norm.cu` from Rust: norms of rows in one launch, and what stands between the projections of a feed-forward block.

use super::{
    packed::aligned,
    product::Joint,
    program::{Arg, Shape, function},
    step::{address, device_of, unwritten},
};
use crate::layers::experts::Activation;
use candle_core::{D, DType, Device, Result, Tensor};

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    x: u64,
    residual: u64,
    sum: u64,
    y: u64,
    weight: u64,
    bias: u64,
    rows: u32,
    dim: u32,
    centred: u32,
    eps: f32,
}

/// Whether rows of this width can be normalized.
pub fn covers(dim: usize) -> bool {
    dim > 0 && dim.is_multiple_of(8) && dim <= 16384
}

/// RMSNorm of x `[.., dim]`, bf16, into y; weight `[dim]` in f32.
pub fn into(x: &Tensor, weight: Option<&Tensor>, eps: f32, y: &Tensor) -> Result<()> {
    match normed(x, None, [weight, None], eps, false, [None, Some(y)])? {
        Some(_) => Ok(()),
        None => candle_core::bail!("no norm of {:?} of {:?} on the GPU", x.dims(), x.dtype()),
    }
}

/// The same of `terms`' sum, which is written too.
pub fn of_sum_into(terms: [&Tensor; 2], weight: Option<&Tensor>, eps: f32, [sum, y]: [&Tensor; 2]) -> Result<()> {
    match normed(terms[0], Some(terms[1]), [weight, None], eps, false, [Some(sum), Some(y)])? {
        Some(_) => Ok(()),
        None => candle_core::bail!("no norm of a sum of {:?} on the GPU", terms.map(Tensor::dims)),
    }
}

/// RMSNorm, or LayerNorm if `centred`, over the last axis of x, with weight and bias in f32; `None` where the kernel cannot. With `residual`
/// it is added to x first, and the sum comes back beside the norm of it.
pub fn norm(
    x: &Tensor,
    residual: Option<&Tensor>,
    [weight, bias]: [Option<&Tensor>; 2],
    eps: f32,
    centred: bool,
) -> Result<Option<[Tensor; 2]>> {
    normed(x, residual, [weight, bias], eps, centred, [None, None])
}

fn normed(
    x: &Tensor,
    residual: Option<&Tensor>,
    [weight, bias]: [Option<&Tensor>; 2],
    eps: f32,
    centred: bool,
    [sum, y]: [Option<&Tensor>; 2],
) -> Result<Option<[Tensor; 2]>> {
    let dim = x.dim(D::Minus1)?;
    let plain = |t: &Tensor| t.dtype() == DType::F32 && t.elem_count() == dim;
    if !matches!(x.device(), Device::Cuda(_))
        || x.dtype() != DType::BF16
        || !covers(dim)
        || !weight.into_iter().chain(bias).all(plain)
        || residual.is_some_and(|r| r.dims() != x.dims() || r.dtype() != x.dtype())
    {
        return Ok(None);
    }
    let (x, residual, device) = (aligned(x)?, residual.map(aligned).transpose()?, device_of(x)?);
    let optional = |t: Option<&Tensor>| t.map(aligned).transpose();
    let (weight, bias) = (optional(weight)?, optional(bias)?);
    let rows = x.elem_count() / dim;
    let given = |t: Option<&Tensor>| t.map_or_else(|| unwritten(x.dims(), DType::BF16, device), |t| Ok(t.clone()));
    let (y, sum) = (given(y)?, if residual.is_some() { given(sum)? } else { x.clone() });
    let place = |t: &Option<Tensor>| t.as_ref().map_or(Ok(0), address);
    let args = Args {
        x: address(&x)?,
        residual: place(&residual)?,
        sum: address(&sum)?,
        y: address(&y)?,
        weight: place(&weight)?,
        bias: place(&bias)?,
        rows: rows as u32,
        dim: dim as u32,
        centred: centred.into(),
        eps,
    };
    let (name, grid, block) = match dim {
        ..=1024 => ("norm_narrow", rows.div_ceil(8), 256),
        1025..=4096 => ("norm_wide", rows, dim.div_ceil(8).next_multiple_of(32)),
        _ => ("norm_widest", rows, 512),
    };
    let shape = Shape { grid: [grid as u32, 1, 1], block: block as u32, shared: 0, early: true };
    // SAFETY: as norm.cu says; all tensors have x's shape or its last axis, and start at multiples of 16 bytes.
    unsafe { function(device, "norm", name)?.launch(device, shape, &[Arg::of(&args)])? };
    Ok(Some([y, sum]))
}

/// As packed.cuh numbers them.
pub fn joint(activation: Activation) -> Joint {
    let (kind, alpha, limit) = match activation {
        Activation::Swiglu => (0, 0.0, 0.0),
        Activation::Geglu => (1, 0.0, 0.0),
        Activation::ClampedSwiglu { alpha, limit } => (2, alpha, limit),
        Activation::LimitedSwiglu { limit } => (3, 0.0, limit),
        Activation::BoundedSwiglu { limit } => (4, 0.0, limit),
        Activation::Situ { beta, linear_beta } => (5, beta, linear_beta),
        Activation::Relu2 => (6, 0.0, 0.0),
        Activation::GeluTanh => (7, 0.0, 0.0),
        Activation::Silu => (8, 0.0, 0.0),
    };
    Joint { kind, alpha, limit }
}

/// `activation` of a gate and what it lets through, of one shape; `None` where the kernel cannot.
pub fn join(activation: Activation, gate: &Tensor, up: &Tensor) -> Result<Option<Tensor>> {
    let on_gpu = matches!(gate.device(), Device::Cuda(_)) && matches!(up.device(), Device::Cuda(_));
    if !on_gpu || gate.dims() != up.dims() || [gate.dtype(), up.dtype()] != [DType::BF16; 2] {
        return Ok(None);
    }
    let (gate, up, device) = (aligned(gate)?, aligned(up)?, device_of(gate)?);
    let Ok(count) = u32::try_from(gate.elem_count()) else { return Ok(None) };
    let (y, joint) = (unwritten(gate.dims(), DType::BF16, device)?, joint(activation));
    let args = [
        Arg::Ptr(address(&gate)?),
        Arg::Ptr(address(&up)?),
        Arg::Ptr(address(&y)?),
        Arg::U32(count),
        Arg::U32(joint.kind),
        Arg::F32(joint.alpha),
        Arg::F32(joint.limit),
    ];
    // SAFETY: as norm.cu says; three tensors of `count` numbers that start at multiples of 16 bytes.
    unsafe { function(device, "norm", "join")?.launch(device, by_eights(count), &args)? };
    Ok(Some(y))
}

/// a + b into y, all of one shape, in bf16.
pub fn add_into(a: &Tensor, b: &Tensor, y: &Tensor) -> Result<()> {
    let (a, b, device) = (aligned(a)?, aligned(b)?, device_of(a)?);
    let alike = |t: &Tensor| t.dims() == y.dims() && t.dtype() == DType::BF16;
    let Some(count) = u32::try_from(y.elem_count()).ok().filter(|_| [&a, &b, y].into_iter().all(alike)) else {
        candle_core::bail!("no sum of {:?} and {:?} on the GPU", a.dims(), b.dims())
    };
    let args = [Arg::Ptr(address(&a)?), Arg::Ptr(address(&b)?), Arg::Ptr(address(y)?), Arg::U32(count)];
    // SAFETY: as above.
    unsafe { function(device, "norm", "add")?.launch(device, by_eights(count), &args) }
}

/// A thread for eight of so many numbers.
fn by_eights(count: u32) -> Shape {
    Shape { grid: [count.div_ceil(8 * 256).max(1), 1, 1], block: 256, shared: 0, early: true }
}
