//! A kernel that a plugin brings as text -> the numbers of an output on the GPU. The device's own compiler makes a program of it at its
//! first use, which is kept for all models; what that compiler says of a mistake becomes the op's error.

use super::{Kernel, OwnOp};
use crate::{device::Placement, ops::value::Outcome};
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, bail};
use plugin_api::abi::own_op::{KERNEL_CUDA, KERNEL_METAL, RawLaunch};
use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

/// A kernel on its way to an output.
pub struct Start<'a> {
    /// What to run.
    pub kernel: &'a Kernel,
    /// How.
    pub launch: RawLaunch,
    /// f32, in one piece each, on the output's device.
    pub inputs: &'a [Tensor],
}

impl Start<'_> {
    /// The arguments behind the output.
    pub fn numbers(&self) -> &[u32] {
        self.launch.numbers.get(..self.launch.count as usize).unwrap_or_default()
    }
}

impl InplaceOp1 for Start<'_> {
    fn name(&self) -> &'static str {
        "op of a plugin"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        bail!("a kernel of a GPU on the cpu")
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, output: &mut candle_core::CudaStorage, layout: &Layout) -> Result<()> {
        super::cuda::start(self, output, layout)
    }

    #[cfg(any(feature = "metal", target_os = "macos"))]
    fn metal_fwd(&self, output: &mut candle_core::MetalStorage, layout: &Layout) -> Result<()> {
        super::metal::start(self, output, layout)
    }
}

/// Programs by source and entry.
pub struct Programs<P>(Mutex<Option<HashMap<[String; 2], P>>>);

impl<P: Clone> Programs<P> {
    pub const fn new() -> Self {
        Programs(Mutex::new(None))
    }

    /// The kernel's program, compiled unless it was before.
    pub fn get(&self, kernel: &Kernel, compile: impl FnOnce() -> Result<P>) -> Result<P> {
        let mut programs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let programs = programs.get_or_insert_default();
        let key = [kernel.source.clone(), kernel.entry.clone()];
        if let Some(program) = programs.get(&key) {
            return Ok(program.clone());
        }
        let program = compile()?;
        programs.insert(key, program.clone());
        Ok(program)
    }
}

impl OwnOp {
    /// The output, by a kernel for the device of the model; none if there is none.
    pub fn on_gpu(
        &self,
        inputs: &[&Tensor],
        shapes: &[Vec<u64>],
        output: &[usize],
        place: &Placement,
    ) -> Outcome<Option<Tensor>> {
        let kind = match place.device {
            Device::Cuda(_) => KERNEL_CUDA,
            Device::Metal(_) => KERNEL_METAL,
            Device::Cpu => return Ok(None),
        };
        let Some(kernel) = self.kernels.iter().find(|kernel| kernel.device == kind) else { return Ok(None) };
        let dims: Vec<u64> = output.iter().map(|&d| d as u64).collect();
        let launch = self.launch(kind, shapes, &dims)?;
        let exact = |t: &&Tensor| t.to_device(&place.device)?.to_dtype(DType::F32)?.contiguous();
        let inputs = inputs.iter().map(exact).collect::<Result<Vec<_>>>()?;
        let numbers = Tensor::zeros(output, DType::F32, &place.device)?;
        if numbers.elem_count() > 0 {
            numbers.inplace_op1(&Start { kernel, launch, inputs: &inputs })?;
        }
        Ok(Some(numbers.to_dtype(place.activations())?))
    }
}
