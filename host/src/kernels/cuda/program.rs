//! The compiled kernels, and how one is started: `program::function(device, "norm", "rms_norm")?.launch(..)`.
//!
//! nvcc compiles them when dylm is built, not NVRTC when it runs: whoever builds with `--features cuda` has nvcc anyhow, since candle's own
//! kernels need it, and whoever runs the binary then needs the driver alone, no further library and no headers. A file holds machine
//! code for Hopper and PTX that the driver compiles for any GPU from Ampere on. Nothing here allocates or waits, so that every launch can
//! be recorded into a CUDA graph.

use candle_core::{
    CudaDevice, Result, bail,
    cuda_backend::{
        DeviceId, WrapErr,
        cudarc::driver::{result, sys},
    },
};
use std::{
    collections::HashMap,
    ffi::{CString, c_void},
    marker::PhantomData,
    sync::{LazyLock, Mutex},
};

include!(concat!(env!("OUT_DIR"), "/cuda_programs.rs"));

/// A kernel on one device.
#[derive(Clone, Copy)]
pub struct Kernel {
    function: sys::CUfunction,
    name: &'static str,
    /// Bytes of shared memory that a block of it can have.
    pub most_shared: usize,
    /// What a block takes beside those.
    own_shared: usize,
    room: Room,
}

/// Of a device.
#[derive(Clone, Copy)]
struct Room {
    multiprocessors: usize,
    /// Bytes of shared memory of each, for all its blocks.
    shared: usize,
}

// SAFETY: a handle that the driver takes from any thread.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// One argument of a kernel, in the order of its parameters.
#[derive(Clone, Copy)]
pub enum Arg<'a> {
    /// An address on the device; 0 for none.
    Ptr(u64),
    /// `int` or `unsigned`.
    U32(u32),
    /// `float`
    F32(f32),
    /// A struct by value, as bytes in C's layout.
    Struct(&'a [u8]),
    /// A struct by value.
    Typed(*const c_void, PhantomData<&'a ()>),
}

impl<'a> Arg<'a> {
    /// A struct by value; it is `#[repr(C)]` and declared alike on both sides.
    pub fn of<T: Copy>(value: &'a T) -> Self {
        Arg::Typed(std::ptr::from_ref(value).cast(), PhantomData)
    }
}

/// How many threads.
#[derive(Clone, Copy, Default)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Bytes of shared memory of a block.
    pub shared: u32,
    /// Whether it may start before the kernel ahead of it in the stream has finished. Only for kernels that wait for that one themselves
    /// (`wait_for_previous` in tiles.cuh).
    pub early: bool,
}

type Known = Mutex<(HashMap<(DeviceId, &'static str), usize>, HashMap<(DeviceId, &'static str), Kernel>)>;
static KNOWN: LazyLock<Known> = LazyLock::new(Known::default);

/// The kernel `name` of `file.cu`, loaded at its first use. Must have been called once before a graph that uses it is recorded.
pub fn function(device: &CudaDevice, file: &'static str, name: &'static str) -> Result<Kernel> {
    let mut known = KNOWN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let (modules, kernels) = &mut *known;
    if let Some(kernel) = kernels.get(&(device.id(), name)) {
        return Ok(*kernel);
    }
    device.cuda_stream().context().bind_to_thread().w()?;
    let module = match modules.get(&(device.id(), file)) {
        Some(module) => *module,
        None => {
            let Some((_, image)) = PROGRAMS.iter().find(|(name, _)| *name == file) else {
                bail!("there is no {file}.cu")
            };
            // SAFETY: nvcc wrote the image; it is kept, for modules are never unloaded.
            let module = unsafe { result::module::load_data(image.0.as_ptr().cast()) }.w()? as usize;
            modules.insert((device.id(), file), module);
            module
        }
    };
    let entry = CString::new(name).map_err(candle_core::Error::wrap)?;
    // SAFETY: the module was loaded on this device and is never unloaded.
    let function = unsafe { result::module::get_function(module as sys::CUmodule, entry) }.w()?;
    let [most_shared, own_shared] = more_shared(device, function)?;
    let kernel = Kernel { function, name, most_shared, own_shared, room: room(device)? };
    kernels.insert((device.id(), name), kernel);
    Ok(kernel)
}

fn room(device: &CudaDevice) -> Result<Room> {
    use sys::CUdevice_attribute as Of;
    let of = |what| Ok::<_, candle_core::Error>(device.cuda_stream().context().attribute(what).w()?.max(1) as usize);
    Ok(Room {
        multiprocessors: of(Of::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        shared: of(Of::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
    })
}

/// Lets a kernel's blocks have all the shared memory that there is, which must be asked for; how much that is, and what they take beside it.
fn more_shared(device: &CudaDevice, function: sys::CUfunction) -> Result<[usize; 2]> {
    use sys::{CUdevice_attribute as Of, CUfunction_attribute as Has};
    let of = |what| device.cuda_stream().context().attribute(what).w();
    let most = of(Of::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    let reserved = of(Of::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK)?;
    // SAFETY: a known function and attributes.
    let (bytes, own) = unsafe {
        let own = result::function::get_function_attribute(function, Has::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES).w()?;
        let bytes = most - own;
        let what = Has::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        result::function::set_function_attribute(function, what, bytes).w()?;
        (bytes, own + reserved)
    };
    Ok([bytes, own].map(|bytes| bytes.max(0) as usize))
}

/// Whether code for Hopper alone runs there: `*_hopper.cu`, and what other files have behind `__CUDA_ARCH__ >= 900`, which PTX for Ampere lacks.
pub fn is_hopper(device: &CudaDevice) -> Result<bool> {
    use sys::CUdevice_attribute as Of;
    let of = |what| device.cuda_stream().context().attribute(what).w();
    let major = of(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    Ok((major, of(Of::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?) == (9, 0))
}

impl Kernel {
    /// How much shared memory a block shall ask for that needs `least`: so much that a multiprocessor has no room for more than its share of
    /// so many blocks. A launch begins while those before it still fill some multiprocessors; its blocks would crowd into the others, and
    /// their weights come through few of the ways to memory. No more than that: what is left is room for the next launch.
    pub fn evenly(&self, blocks: usize, least: usize) -> usize {
        let share = blocks.div_ceil(self.room.multiprocessors);
        let one_more = (self.room.shared / (share + 1)).saturating_sub(self.own_shared) / 128 * 128;
        least.max((one_more + 256).min(self.most_shared))
    }

    /// Puts the kernel into the device's stream.
    ///
    /// # Safety
    /// The arguments must be what the kernel takes, and every address must hold as much as the kernel reads or writes there.
    pub unsafe fn launch(&self, device: &CudaDevice, shape: Shape, args: &[Arg<'_>]) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.launch_clustered(device, shape, 1, args) }
    }

    /// The same in clusters of so many blocks, neighbours along the grid's first axis, on a GPU that [`is_hopper`].
    ///
    /// # Safety
    /// As above.
    pub unsafe fn launch_clustered(
        &self,
        device: &CudaDevice,
        shape: Shape,
        cluster: u32,
        args: &[Arg<'_>],
    ) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.start(device, shape, (cluster, false), args) }
    }

    /// The same of blocks that wait for each other: all run at once, or the launch fails.
    ///
    /// # Safety
    /// As above.
    pub unsafe fn launch_together(&self, device: &CudaDevice, shape: Shape, args: &[Arg<'_>]) -> Result<()> {
        // SAFETY: as above.
        unsafe { self.start(device, shape, (1, true), args) }
    }

    unsafe fn start(
        &self,
        device: &CudaDevice,
        shape: Shape,
        (cluster, together): (u32, bool),
        args: &[Arg<'_>],
    ) -> Result<()> {
        let mut params: smallvec::SmallVec<[*mut c_void; 24]> = smallvec::SmallVec::new();
        for arg in args {
            params.push(match arg {
                Arg::Ptr(p) => std::ptr::from_ref(p).cast_mut().cast(),
                Arg::U32(n) => std::ptr::from_ref(n).cast_mut().cast(),
                Arg::F32(x) => std::ptr::from_ref(x).cast_mut().cast(),
                Arg::Struct(bytes) => bytes.as_ptr().cast_mut().cast(),
                Arg::Typed(value, _) => value.cast_mut(),
            });
        }
        if shape.grid.contains(&0) || shape.block == 0 {
            return Ok(());
        }
        // SAFETY: all zeros is a valid attribute.
        let mut attributes: [sys::CUlaunchAttribute; 3] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        if shape.early {
            attributes[0].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[0].value.programmaticStreamSerializationAllowed = 1;
            count = 1;
        }
        if cluster > 1 {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            attributes[count].value.clusterDim.x = cluster;
            attributes[count].value.clusterDim.y = 1;
            attributes[count].value.clusterDim.z = 1;
            count += 1;
        }
        if together {
            attributes[count].id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
            attributes[count].value.cooperative = 1;
            count += 1;
        }
        let stream = device.cuda_stream();
        let [x, y, z] = shape.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: shape.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        stream.context().bind_to_thread().w()?;
        // SAFETY: the parameters outlive the call, which copies them; what they mean is the caller's promise.
        let status =
            unsafe { sys::cuLaunchKernelEx(&config, self.function, params.as_mut_ptr(), std::ptr::null_mut()) };
        match status {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            failed => bail!("kernel {} does not start: {failed:?}", self.name),
        }
    }
}
