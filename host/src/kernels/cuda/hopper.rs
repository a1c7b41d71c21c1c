//! `attend_hopper.cu` from Rust: attention of many queries on the one kind of GPU that its instructions exist on. The copy engine finds its
//! way by maps of the tensors, which the driver makes and the kernel is given.

use super::{
    attention::Args,
    program::{Arg, Shape, function, is_hopper},
    step::{address, device_of},
};
use candle_core::{
    CudaDevice, Result, Tensor, bail,
    cuda_backend::cudarc::driver::sys::{
        self, CUtensorMap, CUtensorMapDataType as Type, CUtensorMapFloatOOBfill as Outside,
        CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle as Swizzle,
    },
};

/// Queries of a block, and keys that come at once, as the kernel is compiled.
const ROWS: usize = 128;
/// Lanes of a row that are copied as one.
const LANES: usize = 64;

/// Whether the kernel covers heads of `d` lanes there.
pub fn covers(device: &CudaDevice, d: usize) -> Result<bool> {
    Ok(matches!(d, 64 | 128) && is_hopper(device)?)
}

/// Starts it: q and y `[tokens, heads, d]`, keys and values `[capacity, kv_heads, d]`, all in bf16, in one piece and at multiples of 16
/// bytes, as `args` says, and of as many lanes as it [`covers`].
pub fn attend(args: &Args, q: &Tensor, keys: &Tensor, values: &Tensor) -> Result<()> {
    let ((tokens, heads, d), device) = (q.dims3()?, device_of(q)?);
    let maps = [map(q)?, map(keys)?, map(values)?];
    let name = if d == LANES { "attend_hopper_64" } else { "attend_hopper_128" };
    let kernel = function(device, "attend_hopper", name)?;
    // The queries, two blocks of keys and of values, and behind them the barriers; the first begins at a multiple of 1024.
    let shared = 1024 + 5 * ROWS * d * 2 + 128;
    if shared > kernel.most_shared {
        bail!("{name} needs {shared} bytes of shared memory, a block can have {}", kernel.most_shared)
    }
    let grid = [heads as u32, tokens.div_ceil(ROWS) as u32, 1];
    let shape = Shape { grid, block: 384, shared: shared as u32, early: true };
    let [q, keys, values] = &maps;
    // SAFETY: as attention.cuh says; the maps are of the tensors that the arguments name, and nothing outside them is read.
    unsafe { kernel.launch(device, shape, &[Arg::of(args), Arg::of(q), Arg::of(keys), Arg::of(values)]) }
}

/// Of `[rows, heads, d]`: 128 rows of one head at once, in pieces of 64 lanes; what lies outside comes as zeros.
fn map(t: &Tensor) -> Result<CUtensorMap> {
    let (rows, heads, d) = t.dims3()?;
    let dims = [d as u64, heads as u64, rows as u64];
    let strides = [2 * d as u64, (2 * d * heads) as u64];
    let (piece, every) = ([LANES as u32, 1, ROWS as u32], [1u32; 3]);
    let start = address(t)? as *mut std::ffi::c_void;
    let mut map = std::mem::MaybeUninit::<CUtensorMap>::uninit();
    // SAFETY: three dimensions each, and two strides; the driver writes the map if it gives success, and reads nothing at `start`.
    let status = unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            3,
            start,
            dims.as_ptr(),
            strides.as_ptr(),
            piece.as_ptr(),
            every.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Outside::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    match status {
        // SAFETY: written, as said above.
        sys::CUresult::CUDA_SUCCESS => Ok(unsafe { map.assume_init() }),
        failed => bail!("no map of a tensor {:?} on the GPU: {failed:?}", t.dims()),
    }
}
