//! `sum.cu` from Rust: a sum over GPUs that see each other's memory, where NCCL would take four times as long for a token's few numbers.

use super::{
    program::{Arg, Shape, function},
    step::address,
};
use candle_core::{
    CudaDevice, DType, Result, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{result, sys},
    },
};

const MOST_RANKS: usize = 8;
const MOST_BLOCKS: usize = 64;
/// Bytes that a block sums, 16 a thread.
const STRETCH: usize = 8192;
/// Flags and counts of all blocks, before two places for each block's numbers.
const DATA: usize = 4096;
const ROOM: usize = DATA + 2 * MOST_BLOCKS * STRETCH;

/// What the GPUs of a model share.
pub struct Peers {
    /// By rank, on its GPU, for as long as the program runs: another's kernel may still look there when a model is let go.
    bases: [u64; MOST_RANKS],
    ranks: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    x: u64,
    bases: [u64; MOST_RANKS],
    vectors: u32,
    ranks: u32,
    rank: u32,
    unused: u32,
}

impl Peers {
    /// Between these GPUs; `None` where one cannot see another's memory.
    pub fn between(devices: &[CudaDevice]) -> Result<Option<Self>> {
        if devices.len() > MOST_RANKS {
            return Ok(None);
        }
        let contexts: Vec<_> = devices.iter().map(|device| device.cuda_stream().context().clone()).collect();
        for (i, own) in contexts.iter().enumerate() {
            own.bind_to_thread().w()?;
            for (_, other) in contexts.iter().enumerate().filter(|(j, _)| *j != i) {
                let mut can = 0;
                // SAFETY: devices and contexts that are open.
                let status = unsafe {
                    sys::cuDeviceCanAccessPeer(&mut can, own.cu_device(), other.cu_device()).result().w()?;
                    if can == 0 {
                        return Ok(None);
                    }
                    sys::cuCtxEnablePeerAccess(other.cu_ctx(), 0)
                };
                match status {
                    sys::CUresult::CUDA_SUCCESS | sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => {}
                    _ => return Ok(None),
                }
            }
        }
        let mut bases = [0; MOST_RANKS];
        for (context, base) in contexts.iter().zip(&mut bases) {
            context.bind_to_thread().w()?;
            // SAFETY: as much is set to zero as was allocated.
            *base = unsafe {
                let base = result::malloc_sync(ROOM).w()?;
                result::memset_d8_sync(base, 0, ROOM).w()?;
                base
            };
        }
        Ok(Some(Peers { bases, ranks: devices.len() }))
    }

    /// Puts the sum of what all ranks bring in x's place, if the kernel takes so much of it; says whether it does.
    pub fn sum(&self, rank: usize, device: &CudaDevice, x: &Tensor) -> Result<bool> {
        let (at, bytes) = (address(x)?, x.elem_count() * x.dtype().size_in_bytes());
        let name = match x.dtype() {
            DType::F32 => "sum_f32",
            DType::F16 => "sum_f16",
            DType::BF16 => "sum_bf16",
            _ => return Ok(false),
        };
        if !at.is_multiple_of(16) || !bytes.is_multiple_of(16) || bytes == 0 || bytes > MOST_BLOCKS * STRETCH {
            return Ok(false);
        }
        let (vectors, ranks) = ((bytes / 16) as u32, self.ranks as u32);
        let args = Args { x: at, bases: self.bases, vectors, ranks, rank: rank as u32, unused: 0 };
        let shape = Shape { grid: [bytes.div_ceil(STRETCH) as u32, 1, 1], block: 512, shared: 0, early: true };
        // SAFETY: as sum.cu says: every rank brings as much, in the same order of sums, and each base has the room that it looks at.
        unsafe { function(device, "sum", name)?.launch(device, shape, &[Arg::of(&args)])? };
        Ok(true)
    }
}
