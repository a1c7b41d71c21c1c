//! Where a model computes and in which precision.
//!
//! On the CPU activations are always f32, whatever the dtype: no CPU here adds bf16 numbers, and rounding after each op would only lose
//! time and digits. There `dtype` says how wide the KV cache is, how wide weights may be, and whether products may round what they
//! multiply. On GPUs it is the type of everything.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(crate) use cuda::library as cuda_library;

use crate::error::{Error, Result};
use candle_core::{DType, Device};

/// `--device`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The GPU that this build supports and this machine has, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The first NVIDIA GPU; needs a build with `--features cuda`.
    Cuda,
    /// Apple's GPU; builds on macOS have it.
    Metal,
    /// The CPU by candle's ops alone: how the path of a GPU is tested where there is none.
    #[doc(hidden)]
    CpuByCandle,
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DtypeChoice {
    /// The checkpoint's.
    #[default]
    Auto,
    /// IEEE single.
    Float32,
    /// The upper half of a single.
    Bfloat16,
    /// IEEE half.
    Float16,
}

impl DtypeChoice {
    /// The type that was chosen; `checkpoint` is what `auto` means.
    fn or(self, checkpoint: DType) -> DType {
        match self {
            DtypeChoice::Auto => checkpoint,
            DtypeChoice::Float32 => DType::F32,
            DtypeChoice::Bfloat16 => DType::BF16,
            DtypeChoice::Float16 => DType::F16,
        }
    }
}

/// A device with the precision that a model has there.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Where tensors lie.
    pub device: Device,
    /// The type of KV caches, and on GPUs of activations and dense weights. On the CPU products round their inputs unless it is f32.
    pub dtype: DType,
    /// Whether dylm's own CPU kernels do the heavy ops; candle does them otherwise.
    pub native: bool,
}

impl Placement {
    /// Opens the device. `checkpoint` is the type that `auto` means.
    pub fn new(device: DeviceChoice, dtype: DtypeChoice, checkpoint: DType) -> Result<Self> {
        let native = device != DeviceChoice::CpuByCandle;
        let device = open(device, 0)?;
        Ok(Placement { native: native && device.is_cpu(), device, dtype: dtype.or(checkpoint) })
    }

    /// The same on several devices of one kind, by their numbers; on the CPU these are only names, for as many ranks. No number means the
    /// first device.
    pub fn each(device: DeviceChoice, numbers: &[usize], dtype: DtypeChoice, checkpoint: DType) -> Result<Vec<Self>> {
        match numbers {
            [] | [0] => Ok(vec![Placement::new(device, dtype, checkpoint)?]),
            several => on_each(device, several, dtype, checkpoint),
        }
    }

    /// The type of activations.
    pub fn activations(&self) -> DType {
        if self.device.is_cpu() { DType::F32 } else { self.dtype }
    }
}

fn on_each(choice: DeviceChoice, numbers: &[usize], dtype: DtypeChoice, checkpoint: DType) -> Result<Vec<Placement>> {
    let list = numbers.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let refuse = |why: &str| Err(Error::Usage(format!("--devices {list}: {why}")));
    if (1..numbers.len()).any(|i| numbers[..i].contains(&numbers[i])) {
        return refuse("each device can be named once");
    }
    let choice = match choice {
        DeviceChoice::Metal => return refuse("Metal has one GPU; leave it out"),
        DeviceChoice::Auto if cfg!(feature = "cuda") => DeviceChoice::Cuda,
        DeviceChoice::Auto => {
            return refuse(
                "takes a dylm built for NVIDIA's GPUs (.ci/cuda builds one); leave it out, or share the CPU with --device cpu",
            );
        }
        other => other,
    };
    let place = |&number: &usize| {
        let native = choice != DeviceChoice::CpuByCandle;
        let device = open(choice, number)?;
        Ok(Placement { native: native && device.is_cpu(), device, dtype: dtype.or(checkpoint) })
    };
    numbers.iter().map(place).collect()
}

fn open(choice: DeviceChoice, number: usize) -> Result<Device> {
    let missing = |name: &str, why: String| {
        Error::Device(format!("--device {name}: {}; use --device cpu", why.lines().next().unwrap_or_default()))
    };
    match choice {
        DeviceChoice::Cpu | DeviceChoice::CpuByCandle => Ok(Device::Cpu),
        DeviceChoice::Cuda => open_cuda(number).map_err(|e| missing("cuda", e)),
        DeviceChoice::Metal => Device::new_metal(0).map_err(|e| missing("metal", e.to_string())),
        DeviceChoice::Auto if cfg!(feature = "cuda") => Ok(open_cuda(number).unwrap_or(Device::Cpu)),
        DeviceChoice::Auto if cfg!(target_os = "macos") => Ok(Device::new_metal(0).unwrap_or(Device::Cpu)),
        DeviceChoice::Auto => Ok(Device::Cpu),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(number: usize) -> std::result::Result<Device, String> {
    cuda::open(number)
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize) -> std::result::Result<Device, String> {
    Err("this dylm was built without it (.ci/cuda builds one with it)".into())
}
