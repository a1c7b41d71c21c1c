//! Sums over NVIDIA GPUs of one machine, by NCCL: opened when a model is shared out, like every library of NVIDIA's here, through the
//! five functions that it takes. A sum is one kernel in the rank's own stream, so it is recorded and replayed with the step around it.

use crate::{
    device::{Placement, cuda_library},
    error::{Error, Result},
    kernels::cuda::{
        norm,
        step::address,
        sum::{Onto, Peers},
    },
};
use candle_core::{CudaDevice, DType, Device, Tensor, backend::BackendDevice, bail, cuda_backend::WrapErr};
use libloading::Library;
use std::{
    ffi::{CStr, c_char, c_int, c_void},
    sync::atomic::{AtomicBool, Ordering},
};

const NAME: &str = "libnccl.so.2";

/// ncclRedOp_t's first.
const SUM: c_int = 0;

type InitAll = unsafe extern "C" fn(*mut *mut c_void, c_int, *const c_int) -> c_int;
type AllReduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;
type Abort = unsafe extern "C" fn(*mut c_void) -> c_int;
type ErrorString = unsafe extern "C" fn(c_int) -> *const c_char;

/// One communicator a rank.
pub struct Communicators {
    all_reduce: AllReduce,
    abort: Abort,
    error: ErrorString,
    ranks: Vec<(CudaDevice, *mut c_void)>,
    /// For sums of few numbers, unless `DYLM_SUMS=nccl` says otherwise.
    peers: Option<Peers>,
    aborted: AtomicBool,
}

// SAFETY: a communicator is used by its rank's thread alone, but for ncclCommAbort, which NCCL takes from any thread.
unsafe impl Send for Communicators {}
// SAFETY: as above.
unsafe impl Sync for Communicators {}

fn function<T: Copy>(library: &Library, name: &CStr) -> Result<T> {
    // SAFETY: the callers name functions of nccl.h with the types that it gives them, unchanged since NCCL 2.10.
    let found = unsafe { library.get::<T>(name.to_bytes_with_nul()) };
    found
        .map(|f| *f)
        .map_err(|_| Error::Device(format!("--devices: {NAME} has no {}; update NCCL", name.to_string_lossy())))
}

impl Communicators {
    /// Between these devices.
    pub fn on(places: &[Placement]) -> Result<Self> {
        let Some(library) = cuda_library(NAME) else {
            return Err(Error::Device(format!(
                "--devices: NVIDIA's library NCCL ({NAME}) is not found; install it, or the wheel nvidia-nccl-cu13, and name its folder in \
                 LD_LIBRARY_PATH"
            )));
        };
        let init_all: InitAll = function(&library, c"ncclCommInitAll")?;
        let all_reduce = function(&library, c"ncclAllReduce")?;
        let (abort, error) = (function(&library, c"ncclCommAbort")?, function(&library, c"ncclGetErrorString")?);
        // Its threads outlive every model.
        std::mem::forget(library);
        let device = |place: &Placement| match &place.device {
            Device::Cuda(device) => Some(device.clone()),
            _ => None,
        };
        let devices: Vec<CudaDevice> = places.iter().filter_map(device).collect();
        let numbers: Vec<c_int> = devices.iter().map(|d| d.cuda_stream().context().ordinal() as c_int).collect();
        let mut made = vec![std::ptr::null_mut(); numbers.len()];
        // SAFETY: as many places for communicators as devices.
        let status = unsafe { init_all(made.as_mut_ptr(), numbers.len() as c_int, numbers.as_ptr()) };
        let peers = if status == 0 && std::env::var("DYLM_SUMS").is_ok_and(|by| by == "nccl") {
            None
        } else {
            Peers::between(&devices)?
        };
        let ranks = devices.into_iter().zip(made).collect();
        let this = Communicators { all_reduce, abort, error, ranks, peers, aborted: AtomicBool::new(status != 0) };
        match status {
            0 => Ok(this),
            failed => Err(Error::Device(format!(
                "--devices: NCCL cannot connect the GPUs ({}); NCCL_DEBUG=WARN says more",
                this.said(failed)
            ))),
        }
    }

    fn said(&self, status: c_int) -> String {
        // SAFETY: NCCL has a text, which it keeps, for every status.
        unsafe { CStr::from_ptr((self.error)(status)) }.to_string_lossy().into_owned()
    }

    /// The sum of what all ranks bring; in place, since a layer's output belongs to nobody yet.
    pub fn sum(&self, rank: usize, x: &Tensor) -> candle_core::Result<Tensor> {
        let Some((device, communicator)) = self.ranks.get(rank) else { bail!("rank {rank} of {}", self.ranks.len()) };
        if self.aborted.load(Ordering::Acquire) {
            bail!("the devices of this model no longer work together; load it again");
        }
        let kind = match x.dtype() {
            DType::F16 => 6,
            DType::F32 => 7,
            DType::BF16 => 9,
            other => bail!("a sum of {other:?} over devices"),
        };
        let x = x.contiguous()?;
        if let Some(peers) = &self.peers
            && peers.sum(rank, device, &x, None)?
        {
            return Ok(x);
        }
        let (at, stream) = (address(&x)? as *mut c_void, device.cuda_stream());
        stream.context().bind_to_thread().w()?;
        // SAFETY: the tensor has so many numbers of this type, and lies on the device whose stream and communicator these are.
        let status = unsafe {
            (self.all_reduce)(at, at, x.elem_count(), kind, SUM, *communicator, stream.cu_stream().cast::<c_void>())
        };
        match status {
            0 => Ok(x),
            failed => bail!("a sum over devices: {}", self.said(failed)),
        }
    }

    /// Whether [`Self::sum_onto`] writes squares for tensors like this.
    pub fn writes_squares(&self, like: &Tensor) -> bool {
        self.peers.is_some() && Peers::covers(like)
    }

    /// Puts the sum of what all ranks bring, and a residual, in x's place.
    pub fn sum_onto(&self, rank: usize, x: &Tensor, onto: Onto<'_>) -> candle_core::Result<()> {
        if let (Some(peers), Some((device, _)), false) =
            (&self.peers, self.ranks.get(rank), self.aborted.load(Ordering::Acquire))
            && peers.sum(rank, device, x, Some(onto))?
        {
            return Ok(());
        }
        if onto.squares.is_some() {
            bail!("a sum over devices that gives squares too: none of {:?}", x.dims())
        }
        norm::add_into(&self.sum(rank, x)?, onto.residual, x)
    }

    /// Ends every sum that waits for a rank which will not come.
    pub fn abort(&self) {
        if !self.aborted.swap(true, Ordering::AcqRel) {
            for (_, communicator) in &self.ranks {
                // SAFETY: made by ncclCommInitAll, and aborted once.
                unsafe { (self.abort)(*communicator) };
            }
        }
    }
}

impl Drop for Communicators {
    fn drop(&mut self) {
        // What was started ends first, unless it was given up. Recorded steps are gone by now: NCCL would wait for them without end.
        if !self.aborted.load(Ordering::Acquire) {
            self.ranks.iter().for_each(|(device, _)| {
                let _ = device.synchronize();
            });
        }
        self.abort();
    }
}
