//! An op of the plugin's own, for what no other word says: a function from numbers to numbers, and what shape they will have. It runs
//! wherever the model does. On a GPU the host compiles the source that comes along for it ([`OwnOp::kernels`]); where there is none, it
//! takes the numbers to the CPU and back.
//!
//! ```
//! use plugin_api::prelude::*;
//!
//! /// x + sin²(a x) / a. <https://arxiv.org/abs/2006.08195>
//! struct Snake { a: f32 }
//!
//! impl OwnOp for Snake {
//!     fn shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>> {
//!         match inputs {
//!             [x] => Ok(x.to_vec()),
//!             _ => Err(format!("takes one tensor, not {}", inputs.len()).into()),
//!         }
//!     }
//!
//!     fn cpu(&self, inputs: &[View], output: &mut [f32]) -> Result<()> {
//!         for (y, x) in output.iter_mut().zip(inputs[0].numbers) {
//!             *y = x + (self.a * x).sin().powi(2) / self.a;
//!         }
//!         Ok(())
//!     }
//! }
//!
//! // It can be tried without a host.
//! let mut y = [0.0; 2];
//! Snake { a: 2.0 }.cpu(&[View { dims: vec![2], numbers: &[0.0, 1.0] }], &mut y).unwrap();
//! assert_eq!(y, [0.0, 1.0 + 2f32.sin().powi(2) / 2.0]);
//!
//! /// Once, in `new`:
//! fn build(w: &Weights) -> Op {
//!     w.op("snake", Snake { a: 0.5 })
//! }
//!
//! /// And in `forward`:
//! fn run(snake: &Op, x: &Tensor) -> Tensor {
//!     snake.apply(&[x])
//! }
//! ```

use crate::{
    Result, Weights,
    abi::{
        At, Handle, Slot,
        extension::of_host,
        own_op::{
            Complaint, Definition, KERNEL_CUDA, KERNEL_METAL, KernelSource, OwnOps, RawLaunch, RawView, Shape, VIEW_F32,
        },
    },
    export::caught,
    tensor::{Call, Tensor},
};
use abi_stable::std_types::{RSlice, RStr};

/// An op that dylm does not have. It keeps nothing from one call to the next: what a sequence remembers is the host's ([`Cache`](crate::Cache)).
pub trait OwnOp: Send + Sync + 'static {
    /// The shape of the output for inputs of these shapes, at most 8 axes, or what is wrong with them. Runs before the numbers are there.
    fn shape(&self, inputs: &[&[usize]]) -> Result<Vec<usize>>;

    /// The numbers, row after row, f32 whatever the model computes in; `output` is 0 at first. May read values, but calls no words of
    /// [`Tensor`]. On the model's thread: a long loop may use threads of its own, if they end with the call.
    fn cpu(&self, inputs: &[View<'_>], output: &mut [f32]) -> Result<()>;

    /// The same for GPUs, as sources. Only looked at in `new`.
    fn kernels(&self) -> Vec<Kernel> {
        Vec::new()
    }

    /// How to start the kernel for `device`, given the shapes. Without a word of yours: blocks of 256 threads, one thread for each number
    /// of the output, whose count is the kernel's last argument.
    fn launch(&self, _device: Device, _inputs: &[&[usize]], output: &[usize]) -> Launch {
        Launch::of(output.iter().product())
    }
}

/// An input's numbers.
#[derive(Debug)]
pub struct View<'a> {
    /// Its shape.
    pub dims: Vec<usize>,
    /// Row after row.
    pub numbers: &'a [f32],
}

/// What a kernel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Device {
    /// CUDA C++; the entry is `extern "C" __global__ void`.
    Cuda,
    /// Metal Shading Language; the entry is `kernel void`, its arguments lie in `[[buffer(0)]]` and on.
    Metal,
}

/// A kernel's source. Its arguments: a pointer to f32 for each input, one for the output, then [`Launch::numbers`] as unsigned 32 bits.
#[derive(Debug, Clone, Copy)]
pub struct Kernel {
    /// What it is for.
    pub device: Device,
    /// The whole text, `include_str!` of a file beside the plugin's own.
    pub source: &'static str,
    /// The function in it.
    pub entry: &'static str,
}

/// How a kernel is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Blocks (threadgroups) along x, y and z.
    pub grid: [u32; 3],
    /// Threads of each.
    pub block: [u32; 3],
    /// Bytes of shared (threadgroup) memory.
    pub shared_bytes: u32,
    /// Arguments behind the output, 16 at most.
    pub numbers: Vec<u32>,
}

impl Launch {
    /// A thread for each of `n` things, and `n` for the kernel to know where to stop.
    pub fn of(n: usize) -> Self {
        let n = n.min(u32::MAX as usize) as u32;
        Launch { grid: [n.div_ceil(256).max(1), 1, 1], block: [256, 1, 1], shared_bytes: 0, numbers: vec![n] }
    }
}

/// An op that the host has taken over from the plugin, for as long as the model lives.
#[derive(Debug, Clone, Copy)]
pub struct Op(Slot);

const NO_EXTENSION: &str = "this dylm does not take ops of plugins (it has no extension op/1); update dylm";

impl Weights {
    /// Gives the host an op of the plugin's own. `name` is for messages. Thread: new.
    #[track_caller]
    pub fn op<T: OwnOp>(&self, name: &str, op: T) -> Op {
        let (call, at) = (Call::current(), At::caller());
        let Some(ops) = of_host::<OwnOps>() else {
            call.ops.complain()(call.ctx, format!("op {name}: {NO_EXTENSION}").as_str().into(), at);
            return Op(Slot(u32::MAX));
        };
        let source = |k: &Kernel| KernelSource {
            device: match k.device {
                Device::Cuda => KERNEL_CUDA,
                Device::Metal => KERNEL_METAL,
            },
            reserved: 0,
            source: k.source.into(),
            entry: k.entry.into(),
        };
        let kernels: Vec<KernelSource> = op.kernels().iter().map(source).collect();
        let definition = Definition {
            size: size_of::<Definition<'_>>() as u64,
            data: Box::into_raw(Box::new(op)).cast_const().cast(),
            shape: shape::<T>,
            cpu: cpu::<T>,
            launch: launch::<T>,
            kernels: RSlice::from_slice(&kernels),
            drop: end::<T>,
        };
        Op((ops.register)(call.ctx, name.into(), &definition, at))
    }
}

impl Op {
    /// Runs it. Thread: step.
    #[track_caller]
    pub fn apply(&self, inputs: &[&Tensor]) -> Tensor {
        let Some(ops) = of_host::<OwnOps>() else { return Tensor::failed(NO_EXTENSION) };
        let handles: Vec<Handle> = inputs.iter().map(|t| t.handle()).collect();
        Tensor::own((ops.apply)(Call::current().ctx, self.0, RSlice::from_slice(&handles), At::caller()))
    }
}

/// Runs a function of the author: a refusal or a panic goes to the complaint. Words of `Tensor` panic meanwhile, with a text that says so.
fn answer<T>(complaint: &Complaint, f: impl FnOnce() -> Result<T>) -> Option<T> {
    match caught(|| Call::outside(f)) {
        Ok(Ok(value)) => Some(value),
        Ok(Err(e)) => {
            (complaint.say)(complaint.data, e.0.as_str().into());
            None
        }
        Err(panic) => {
            (complaint.say)(complaint.data, RStr::from_str(&format!("the plugin panicked: {panic}")));
            None
        }
    }
}

fn lengths(dims: &[u64]) -> Vec<usize> {
    dims.iter().map(|&d| usize::try_from(d).unwrap_or(usize::MAX)).collect()
}

/// Calls `f` with the shapes as an author sees them.
fn with_shapes<R>(inputs: RSlice<'_, RSlice<'_, u64>>, f: impl FnOnce(&[&[usize]]) -> R) -> R {
    let shapes: Vec<Vec<usize>> = inputs.iter().map(|dims| lengths(dims.as_slice())).collect();
    f(&shapes.iter().map(Vec::as_slice).collect::<Vec<_>>())
}

extern "C" fn shape<T: OwnOp>(
    data: *const (),
    inputs: RSlice<'_, RSlice<'_, u64>>,
    output: &mut Shape,
    complaint: &Complaint,
) -> u32 {
    // SAFETY: the host passes `Definition::data`, which `Weights::op` made of a `T`, and calls `drop` last.
    let op = unsafe { &*data.cast::<T>() };
    let dims = answer(complaint, || {
        let dims = with_shapes(inputs, |shapes| op.shape(shapes))?;
        if dims.len() > output.dims.len() {
            return Err(format!("an output of {} axes; {} are possible", dims.len(), output.dims.len()).into());
        }
        Ok(dims)
    });
    let Some(dims) = dims else { return 0 };
    output.rank = dims.len() as u64;
    output.dims.iter_mut().zip(dims).for_each(|(to, from)| *to = from as u64);
    1
}

extern "C" fn cpu<T: OwnOp>(
    data: *const (),
    inputs: RSlice<'_, RawView>,
    output: &RawView,
    complaint: &Complaint,
) -> u32 {
    // SAFETY: as in `shape`.
    let op = unsafe { &*data.cast::<T>() };
    let done = answer(complaint, || {
        if inputs.iter().chain([output]).any(|view| view.dtype != VIEW_F32) {
            return Err("the host gave numbers that are not f32; update the plugin".into());
        }
        let view = |raw: &RawView| {
            // SAFETY: the host's promise: so many axes and so many f32 lie there, aligned, for the length of this call.
            let (dims, numbers) = unsafe {
                let dims = std::slice::from_raw_parts(raw.dims, raw.rank as usize);
                (dims, std::slice::from_raw_parts(raw.start.cast_const().cast::<f32>(), raw.len as usize))
            };
            View { dims: lengths(dims), numbers }
        };
        let views: Vec<View> = inputs.iter().map(view).collect();
        // SAFETY: as above; nobody else sees the output meanwhile.
        let numbers = unsafe { std::slice::from_raw_parts_mut(output.start.cast::<f32>(), output.len as usize) };
        op.cpu(&views, numbers)
    });
    done.is_some().into()
}

extern "C" fn launch<T: OwnOp>(
    data: *const (),
    device: u32,
    inputs: RSlice<'_, RSlice<'_, u64>>,
    output: RSlice<'_, u64>,
    raw: &mut RawLaunch,
    complaint: &Complaint,
) -> u32 {
    // SAFETY: as in `shape`.
    let op = unsafe { &*data.cast::<T>() };
    let launch = answer(complaint, || {
        let device = if device == KERNEL_METAL { Device::Metal } else { Device::Cuda };
        let launch = with_shapes(inputs, |shapes| op.launch(device, shapes, &lengths(output.as_slice())));
        if launch.numbers.len() > raw.numbers.len() {
            return Err(format!("{} numbers for a kernel; 16 are possible", launch.numbers.len()).into());
        }
        Ok(launch)
    });
    let Some(Launch { grid, block, shared_bytes, numbers }) = launch else { return 0 };
    (raw.grid, raw.block, raw.shared_bytes, raw.count) = (grid, block, shared_bytes, numbers.len() as u32);
    raw.numbers.iter_mut().zip(numbers).for_each(|(to, from)| *to = from);
    1
}

extern "C" fn end<T: OwnOp>(data: *const ()) {
    // SAFETY: the host calls this once, last; `Weights::op` boxed exactly a `T`.
    let _ = caught(|| drop(unsafe { Box::from_raw(data.cast_mut().cast::<T>()) }));
}
