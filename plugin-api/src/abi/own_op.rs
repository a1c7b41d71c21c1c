//! `op/1`, an extension of the host: a plugin gives the host an op that dylm does not have. The one place where the ABI shows numbers in
//! memory, since an op that must not see them could compute nothing. Plain C throughout: no allocation crosses, and errors are said
//! through a function of the host.
//!
//! Promises of the host: inputs and output are f32, in one piece, row after row, on the CPU, and live for the call; the output is 0 at
//! first. Promises of the plugin: it writes to the output alone, keeps no pointer, calls no op meanwhile and lets no panic out.

use super::{At, Ctx, Handle, Slot, extension::Extension};
use abi_stable::std_types::{RSlice, RStr};

/// What the host answers to `op/1`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct OwnOps {
    /// Gives an op to the model that is being built. The host owns it from then on, also where it refuses it, and calls its `drop` once.
    /// The slot lives as long as the model. Thread: new.
    pub register: extern "C" fn(Ctx, name: RStr<'_>, op: &Definition<'_>, At) -> Slot,
    /// Runs the op on these tensors. Thread: step.
    pub apply: extern "C" fn(Ctx, Slot, inputs: RSlice<'_, Handle>, At) -> Handle,
}

// SAFETY: `repr(C)`, two pointers to functions, which were both there from the first version on.
unsafe impl Extension for OwnOps {
    const ID: &'static str = "op/1";
}

/// An op of a plugin. Frozen: a later kind of device is one more [`KernelSource`], a later kind of op another function of `OwnOps`.
///
/// Functions answer 1 when it went well; else 0, after telling the complaint why. Threads: any, several at once.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Definition<'a> {
    /// Its own size in bytes.
    pub size: u64,
    /// The plugin's own.
    pub data: *const (),
    /// The shape of the output for inputs of these shapes: all that a dry run calls. Thread: any.
    pub shape: extern "C" fn(*const (), inputs: RSlice<'_, RSlice<'_, u64>>, output: &mut Shape, &Complaint) -> u32,
    /// The numbers. Thread: any, several at once.
    pub cpu: extern "C" fn(*const (), inputs: RSlice<'_, RawView>, output: &RawView, &Complaint) -> u32,
    /// How to start a kernel for `device` (a `KERNEL_*`), for inputs and an output of these shapes. Thread: any.
    pub launch: extern "C" fn(
        *const (),
        device: u32,
        inputs: RSlice<'_, RSlice<'_, u64>>,
        output: RSlice<'_, u64>,
        launch: &mut RawLaunch,
        &Complaint,
    ) -> u32,
    /// Sources for devices other than the CPU, or none; borrowed for the call of `register`.
    pub kernels: RSlice<'a, KernelSource<'a>>,
    /// Ends the op. Thread: any, once, last.
    pub drop: extern "C" fn(*const ()),
}

/// More axes than a tensor has.
pub const MOST_AXES: usize = 8;

/// A shape to be filled in.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Shape {
    /// How many axes, at most [`MOST_AXES`].
    pub rank: u64,
    /// Their lengths.
    pub dims: [u64; MOST_AXES],
}

/// The numbers of a tensor.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct RawView {
    /// [`VIEW_F32`].
    pub dtype: u32,
    /// How many axes.
    pub rank: u32,
    /// Their lengths.
    pub dims: *const u64,
    /// Elements from one entry of an axis to its next; of a tensor in one piece, so these follow from `dims`.
    pub strides: *const u64,
    /// The first element; of an input, not to be written to.
    pub start: *mut u8,
    /// How many elements.
    pub len: u64,
}

/// IEEE single, in the machine's byte order.
pub const VIEW_F32: u32 = 0;

/// Where a plugin's function says what went wrong, before it answers 0.
#[repr(C)]
#[derive(Debug)]
pub struct Complaint {
    /// The host's own.
    pub data: *mut (),
    /// One sentence, borrowed for the call. Thread: any, while the function runs that got it.
    pub say: extern "C" fn(*mut (), RStr<'_>),
}

/// A kernel as text, which the host compiles for the device that it has.
///
/// Its arguments: a pointer to f32 for each input, one for the output, then each of [`RawLaunch::numbers`] as unsigned 32 bits.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct KernelSource<'a> {
    /// One of the `KERNEL_*` constants; a host passes over those that it does not know.
    pub device: u32,
    /// 0.
    pub reserved: u32,
    /// The whole source.
    pub source: RStr<'a>,
    /// The function in it.
    pub entry: RStr<'a>,
}

/// CUDA C++ for NVRTC; the entry is `extern "C" __global__`.
pub const KERNEL_CUDA: u32 = 0;
/// Metal Shading Language; the entry is `kernel`, its arguments lie in `[[buffer(0)]]` and on.
pub const KERNEL_METAL: u32 = 1;

/// How a kernel is started.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct RawLaunch {
    /// Blocks (CUDA) or threadgroups (Metal) along x, y and z.
    pub grid: [u32; 3],
    /// Threads of each of these.
    pub block: [u32; 3],
    /// Bytes of shared (threadgroup) memory.
    pub shared_bytes: u32,
    /// How many of `numbers` the kernel takes.
    pub count: u32,
    /// Arguments behind the output.
    pub numbers: [u32; 16],
}
