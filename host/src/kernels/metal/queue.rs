//! A launch -> a command in candle's Metal queue. Inputs and outputs are told to candle's encoder as such, for it alone knows what must
//! wait for what.

use super::launch::{Kernel, Launch};
use candle_core::{MetalDevice, MetalError, MetalStorage, Result, Storage, Tensor, backend::BackendStorage, bail};
use candle_metal_kernels::metal::{ComputeCommandEncoder, ComputePipeline};
use objc2_metal::MTLSize;
use std::{
    collections::HashMap,
    ffi::c_void,
    sync::{Mutex, PoisonError},
};

/// Pipelines of all kernels that have run so far. candle has one GPU.
static PIPELINES: Mutex<Option<HashMap<Kernel, ComputePipeline>>> = Mutex::new(None);

fn pipeline(kernel: &Kernel, device: &MetalDevice) -> Result<ComputePipeline> {
    let mut pipelines = PIPELINES.lock().unwrap_or_else(PoisonError::into_inner);
    let pipelines = pipelines.get_or_insert_default();
    if let Some(pipeline) = pipelines.get(kernel) {
        return Ok(pipeline.clone());
    }
    let device = device.metal_device();
    let library = device.new_library_with_source(&kernel.program(), None).map_err(MetalError::from)?;
    let function = library.get_function(&kernel.entry(), None).map_err(MetalError::from)?;
    let pipeline = device.new_compute_pipeline_state_with_function(&function).map_err(MetalError::from)?;
    pipelines.insert(kernel.clone(), pipeline.clone());
    Ok(pipeline)
}

/// Runs it on inputs that lie in one piece each, on this device.
pub fn start(launch: &Launch, inputs: &[Tensor], device: &MetalDevice) -> Result<Vec<Tensor>> {
    let pipeline = pipeline(&launch.kernel, device)?;
    let most = pipeline.max_total_threads_per_threadgroup();
    if launch.threads > most {
        bail!("{} wants {} threads in a group; this GPU has {most} for it", launch.kernel.entry(), launch.threads);
    }
    let held: Vec<_> = inputs.iter().map(|t| t.storage_and_layout()).collect();
    let mut outputs = Vec::with_capacity(launch.outputs.len());
    for (dims, dtype) in &launch.outputs {
        let count: usize = dims.iter().product();
        outputs.push((device.new_buffer(count.max(1), *dtype, "")?, count, *dtype, dims));
    }
    if launch.groups.iter().all(|&groups| groups > 0) {
        let guard = device.command_encoder()?;
        let encoder: &ComputeCommandEncoder = guard.as_ref();
        encoder.set_compute_pipeline_state(&pipeline);
        for (index, (storage, layout)) in held.iter().enumerate() {
            let Storage::Metal(storage) = &**storage else { bail!("an input of a kernel is not on the GPU") };
            let offset = layout.start_offset() * storage.dtype().size_in_bytes();
            encoder.set_input_buffer(index, Some(storage.buffer()), offset);
        }
        for (index, (buffer, ..)) in outputs.iter().enumerate() {
            encoder.set_output_buffer(held.len() + index, Some(buffer), 0);
        }
        let (length, numbers) = (size_of_val(launch.numbers.as_slice()), launch.numbers.as_ptr().cast::<c_void>());
        encoder.set_bytes_directly(held.len() + outputs.len(), length, numbers);
        // A length of 0 is refused, and so is one that is no multiple of 16.
        encoder.set_threadgroup_memory_length(0, launch.shared.max(1).next_multiple_of(16));
        let [width, height, depth] = launch.groups;
        let threads = MTLSize { width: launch.threads, height: 1, depth: 1 };
        encoder.dispatch_thread_groups(MTLSize { width, height, depth }, threads);
    }
    let tensor = |(buffer, count, dtype, dims): (_, usize, _, &Vec<usize>)| {
        let storage = MetalStorage::new(buffer, device.clone(), count, dtype);
        Tensor::from((Storage::Metal(storage), dims.as_slice()))
    };
    Ok(outputs.into_iter().map(tensor).collect())
}
