//! `sum.cu` from Rust: a sum over GPUs that see each other's memory, where NCCL would take four times as long for a token's few numbers.

use super::{
    program::{Arg, Shape, function},
    step::address,
};
use candle_core::{
    CudaDevice, DType, Result, Tensor, bail,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{result, sys},
    },
};

const MOST_RANKS: usize = 8;
const MOST_BLOCKS: usize = 256;
const THREADS: usize = 128;
/// Bytes of a block's counts, before two places for each block's numbers of each rank, which take twice their bytes.
const COUNTS: usize = 4096;
const PLACES: usize = 2 * MOST_BLOCKS * THREADS * 32;

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
    y: u64,
    residual: u64,
    squares: u64,
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
        let room = COUNTS + PLACES * devices.len();
        for (context, base) in contexts.iter().zip(&mut bases) {
            context.bind_to_thread().w()?;
            // SAFETY: as much is set to zero as was allocated.
            *base = unsafe {
                let base = result::malloc_sync(room).w()?;
                result::memset_d8_sync(base, 0, room).w()?;
                base
            };
        }
        Ok(Some(Peers { bases, ranks: devices.len() }))
    }

    /// Whether the kernel takes as many numbers as a tensor like this has.
    pub fn covers(x: &Tensor) -> bool {
        let bytes = x.elem_count() * x.dtype().size_in_bytes();
        let known = matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16);
        known && bytes.is_multiple_of(16) && bytes > 0 && bytes <= MOST_BLOCKS * THREADS * 16
    }

    /// Puts the sum of what all ranks bring in x's place, if the kernel [`Self::covers`] it; says whether it does. A residual is added on the
    /// way, and the squares of bfloat16 numbers summed over each 16 of what comes out.
    pub fn sum(&self, rank: usize, device: &CudaDevice, x: &Tensor, end: Option<Onto<'_>>) -> Result<bool> {
        let name = match x.dtype() {
            DType::F32 => "sum_f32",
            DType::F16 => "sum_f16",
            _ => "sum_bf16",
        };
        let (residual, squares) = end.map_or((None, None), |end| (Some(end.residual), end.squares));
        let like = |t: &Tensor| t.dims() == x.dims() && t.dtype() == x.dtype();
        if residual.is_some_and(|residual| !like(residual)) {
            bail!("a residual {residual:?} for a sum of {:?}", x.dims())
        }
        let optional = |t: Option<&Tensor>| t.map_or(Ok(0), address);
        let (at, residual) = (address(x)?, optional(residual)?);
        if !Self::covers(x) || !at.is_multiple_of(16) || !residual.is_multiple_of(16) {
            return Ok(false);
        }
        let vectors = x.elem_count() * x.dtype().size_in_bytes() / 16;
        let args = Args {
            x: at,
            y: at,
            residual,
            squares: optional(squares)?,
            bases: self.bases,
            vectors: vectors as u32,
            ranks: self.ranks as u32,
            rank: rank as u32,
            unused: 0,
        };
        let (grid, block) = ([vectors.div_ceil(THREADS) as u32, 1, 1], THREADS as u32);
        let shape = Shape { grid, block, shared: 0, early: true };
        // SAFETY: as sum.cu says: every rank brings as much, in the same order of sums, and each base has the room that it looks at.
        unsafe { function(device, "sum", name)?.launch(device, shape, &[Arg::of(&args)])? };
        Ok(true)
    }
}

/// What a sum is added to.
#[derive(Clone, Copy)]
pub struct Onto<'a> {
    /// As large as the sum.
    pub residual: &'a Tensor,
    /// `[tokens, width / 16]`, f32, to be written: sums of squares of what comes out, for the norm behind it.
    pub squares: Option<&'a Tensor>,
}
