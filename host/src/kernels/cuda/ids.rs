//! `ids.cu` from Rust.

use super::{
    program::{Arg, Shape, function},
    step::{address, device_of, unwritten},
};
use candle_core::{DType, Result, Tensor};

/// Each id modulo `by`, which is not 0.
pub fn modulo(ids: &Tensor, by: u32) -> Result<Tensor> {
    let (ids, device, count) = (ids.contiguous()?, device_of(ids)?, ids.elem_count() as u32);
    let out = unwritten(ids.dims(), DType::U32, device)?;
    let args = [Arg::Ptr(address(&ids)?), Arg::Ptr(address(&out)?), Arg::U32(count), Arg::U32(by)];
    let shape = Shape { grid: [count.div_ceil(128), 1, 1], block: 128, shared: 0, early: false };
    // SAFETY: as ids.cu says; as many numbers come out as go in.
    unsafe { function(device, "ids", "modulo")?.launch(device, shape, &args)? };
    Ok(out)
}
