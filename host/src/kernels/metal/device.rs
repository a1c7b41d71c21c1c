//! A launch and its input tensors -> its output tensors, on Apple's GPU through candle's queue. Pipelines are compiled at their first use
//! and kept.
//!
//! Where there is no such GPU the same launches can be played on the CPU, if a test has brought something that plays them.

use super::launch::Launch;
use candle_core::{DType, Device, Result, Tensor, bail};
use std::sync::OnceLock;

/// The bytes of all inputs and the sizes of the outputs -> the bytes of the outputs.
pub type Player = fn(&Launch, &[Vec<u8>], &[usize]) -> std::result::Result<Vec<Vec<u8>>, String>;

/// What plays kernels for tensors on the CPU; tests set it.
#[doc(hidden)]
pub static PLAYER: OnceLock<Player> = OnceLock::new();

/// Whether kernels can run there.
pub fn serves(device: &Device) -> bool {
    match device {
        Device::Metal(_) => cfg!(any(feature = "metal", target_os = "macos")),
        Device::Cpu => PLAYER.get().is_some(),
        Device::Cuda(_) => false,
    }
}

/// Runs a kernel. Inputs are taken as they lie in memory, so views that are not in one piece are copied first.
pub fn run(launch: &Launch, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let inputs = inputs.iter().map(|t| t.contiguous()).collect::<Result<Vec<_>>>()?;
    match inputs.first().map(Tensor::device) {
        Some(Device::Cpu) => play(launch, &inputs),
        #[cfg(any(feature = "metal", target_os = "macos"))]
        Some(Device::Metal(device)) => super::queue::start(launch, &inputs, device),
        _ => bail!("a Metal kernel for tensors that are not on a Metal device"),
    }
}

/// The same for a kernel with one output.
pub fn run_one(launch: &Launch, inputs: &[&Tensor]) -> Result<Tensor> {
    match run(launch, inputs)?.pop() {
        Some(output) => Ok(output),
        None => bail!("a kernel without an output"),
    }
}

fn play(launch: &Launch, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
    let Some(player) = PLAYER.get() else { bail!("nothing plays Metal kernels here") };
    let size = |(dims, dtype): &(Vec<usize>, DType)| dims.iter().product::<usize>() * dtype.size_in_bytes();
    let sizes: Vec<usize> = launch.outputs.iter().map(size).collect();
    let inputs = inputs.iter().map(bytes).collect::<Result<Vec<_>>>()?;
    let outputs = player(launch, &inputs, &sizes).map_err(candle_core::Error::msg)?;
    let tensor = |(bytes, (dims, dtype)): (Vec<u8>, &(Vec<usize>, DType))| {
        Tensor::from_raw_buffer(&bytes, *dtype, dims, &Device::Cpu)
    };
    outputs.into_iter().zip(&launch.outputs).map(tensor).collect()
}

/// The bytes of a tensor on the CPU.
fn bytes(t: &Tensor) -> Result<Vec<u8>> {
    let t = t.flatten_all()?;
    Ok(match t.dtype() {
        DType::U8 => t.to_vec1::<u8>()?,
        DType::U32 => t.to_vec1::<u32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F32 => t.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => t.to_vec1::<half::f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::BF16 => t.to_vec1::<half::bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        other => bail!("{other:?} is no input of a kernel"),
    })
}
