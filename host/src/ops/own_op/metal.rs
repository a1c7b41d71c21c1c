//! A plugin's Metal source on Apple's GPU: the system's compiler makes a pipeline of it.

use super::gpu::{Programs, Start};
use candle_core::{Layout, MetalError, MetalStorage, Result, Storage, backend::BackendStorage, bail};
use candle_metal_kernels::metal::{ComputeCommandEncoder, ComputePipeline};
use objc2_metal::MTLSize;

static PROGRAMS: Programs<ComputePipeline> = Programs::new();

fn size([width, height, depth]: [u32; 3]) -> MTLSize {
    MTLSize { width: width as usize, height: height as usize, depth: depth as usize }
}

/// Runs the kernel into `output`, f32 and in one piece.
pub fn start(start: &Start<'_>, output: &mut MetalStorage, layout: &Layout) -> Result<()> {
    let device = output.device().clone();
    let kernel = start.kernel;
    let pipeline = PROGRAMS.get(kernel, || {
        let library = device.metal_device().new_library_with_source(&kernel.source, None).map_err(MetalError::from)?;
        let function = library.get_function(&kernel.entry, None).map_err(MetalError::from)?;
        Ok(device.metal_device().new_compute_pipeline_state_with_function(&function).map_err(MetalError::from)?)
    })?;
    let most = pipeline.max_total_threads_per_threadgroup();
    let threads = start.launch.block.iter().fold(1, |n: usize, &b| n.saturating_mul(b as usize));
    if threads == 0 || threads > most {
        bail!("its Metal kernel wants {threads} threads in a threadgroup; 1 to {most} are possible");
    }
    let held: Vec<_> = start.inputs.iter().map(|t| t.storage_and_layout()).collect();
    let guard = device.command_encoder()?;
    let encoder: &ComputeCommandEncoder = guard.as_ref();
    encoder.set_compute_pipeline_state(&pipeline);
    for (index, (storage, layout)) in held.iter().enumerate() {
        let Storage::Metal(storage) = &**storage else { bail!("an input is not on the GPU") };
        encoder.set_input_buffer(index, Some(storage.buffer()), layout.start_offset() * size_of::<f32>());
    }
    encoder.set_output_buffer(held.len(), Some(output.buffer()), layout.start_offset() * size_of::<f32>());
    for (index, number) in start.numbers().iter().enumerate() {
        encoder.set_bytes(held.len() + 1 + index, number);
    }
    if start.launch.shared_bytes > 0 {
        encoder.set_threadgroup_memory_length(0, start.launch.shared_bytes as usize);
    }
    encoder.dispatch_thread_groups(size(start.launch.grid), size(start.launch.block));
    Ok(())
}
