//! A plugin's CUDA source on an NVIDIA GPU: NVRTC makes PTX of it, the driver a program of that.

use super::gpu::{Programs, Start};
use candle_core::{
    CudaStorage, Layout, Result, Storage, bail,
    cuda_backend::{
        WrapErr,
        cudarc::{
            driver::{LaunchConfig, PushKernelArg},
            nvrtc::{self, CompileError},
        },
    },
};
use sha2::{Digest, Sha256};

/// PTX, and the name under which candle keeps what the driver makes of it.
static PROGRAMS: Programs<[String; 2]> = Programs::new();

fn compile(start: &Start<'_>) -> Result<[String; 2]> {
    let source = &start.kernel.source;
    if source.contains('\0') {
        bail!("its CUDA source has a zero byte in it");
    }
    let ptx = match nvrtc::compile_ptx(source) {
        Ok(ptx) => ptx.to_src(),
        Err(CompileError::CompileError { log, .. }) => {
            let log = log.to_string_lossy();
            let lines = log.lines().map(str::trim).filter(|line| !line.is_empty());
            bail!("its CUDA source does not compile: {}", lines.take(3).collect::<Vec<_>>().join("; "))
        }
        Err(e) => bail!("its CUDA source does not compile: {e}"),
    };
    let hash: String = Sha256::digest(&ptx).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok([format!("op of a plugin {hash}"), ptx])
}

/// Runs the kernel into `output`, f32 and in one piece.
pub fn start(start: &Start<'_>, output: &mut CudaStorage, layout: &Layout) -> Result<()> {
    let [name, ptx] = PROGRAMS.get(start.kernel, || compile(start))?;
    if start.kernel.entry.contains('\0') {
        bail!("the name of its CUDA kernel has a zero byte in it");
    }
    let device = output.device.clone();
    let function = device.get_or_load_custom_func(&start.kernel.entry, &name, &ptx)?;
    let held: Vec<_> = start.inputs.iter().map(|t| t.storage_and_layout()).collect();
    let mut inputs = Vec::with_capacity(held.len());
    for (storage, layout) in &held {
        let Storage::Cuda(storage) = &**storage else { bail!("an input is not on the GPU") };
        inputs.push(storage.as_cuda_slice::<f32>()?.slice(layout.start_offset()..));
    }
    let mut out = output.as_cuda_slice_mut::<f32>()?.slice_mut(layout.start_offset()..);
    let mut arguments = function.builder();
    for input in &inputs {
        arguments.arg(input);
    }
    arguments.arg(&mut out);
    for number in start.numbers() {
        arguments.arg(number);
    }
    let ([gx, gy, gz], [bx, by, bz]) = (start.launch.grid, start.launch.block);
    let how =
        LaunchConfig { grid_dim: (gx, gy, gz), block_dim: (bx, by, bz), shared_mem_bytes: start.launch.shared_bytes };
    // SAFETY: the arguments are those that `op/1` promises a kernel; what it does with them is the plugin's, as with all of its code.
    unsafe { arguments.launch(how) }.w()?;
    Ok(())
}
