//! `step.cu` from Rust: rotary angles at positions that lie on the device, rows that join a cache, the largest of a row. Tensors here are
//! on the GPU and in one piece.

use super::program::{Arg, Shape, function};
use crate::kernels::cpu::Turn;
use candle_core::{
    CudaDevice, CudaStorage, D, DType, Device, Result, Storage, Tensor, bail,
    cuda_backend::{CudaStorageSlice, cudarc::driver::DevicePtr},
};

/// Scores of a row that are looked at in shared memory, which every block may have without asking.
const MOST_SCORES: usize = 8192;

/// The GPU that a tensor lies on.
pub fn device_of(t: &Tensor) -> Result<&CudaDevice> {
    match t.device() {
        Device::Cuda(device) => Ok(device),
        _ => bail!("a tensor that is not on the GPU"),
    }
}

/// Where a tensor's numbers begin on the GPU.
pub fn address(t: &Tensor) -> Result<u64> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cuda(CudaStorage { slice, device }) = &*storage else { bail!("a tensor that is not on the GPU") };
    if !layout.is_contiguous() {
        bail!("a tensor on the GPU that is not in one piece: {:?}", layout.shape())
    }
    let stream = device.cuda_stream();
    let start = match slice {
        CudaStorageSlice::U8(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::I64(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::BF16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F32(s) => s.device_ptr(&stream).0,
        _ => bail!("a tensor of {:?} on the GPU", t.dtype()),
    };
    Ok(start + (layout.start_offset() * t.dtype().size_in_bytes()) as u64)
}

/// A tensor whose numbers a kernel is to write, all of them.
pub fn unwritten(dims: &[usize], dtype: DType, device: &CudaDevice) -> Result<Tensor> {
    match super::scratch::next(dims, dtype, device, allocated)? {
        Some(kept) => Ok(kept),
        None => allocated(dims, dtype, device),
    }
}

/// The same, and none of what a recorded step keeps between its runs.
pub fn allocated(dims: &[usize], dtype: DType, device: &CudaDevice) -> Result<Tensor> {
    let count = dims.iter().product();
    // SAFETY: the caller's kernel writes all of it before anything reads it.
    let slice = unsafe {
        match dtype {
            DType::U32 => CudaStorageSlice::U32(device.alloc(count)?),
            DType::BF16 => CudaStorageSlice::BF16(device.alloc(count)?),
            DType::F16 => CudaStorageSlice::F16(device.alloc(count)?),
            DType::F32 => CudaStorageSlice::F32(device.alloc(count)?),
            other => bail!("a tensor of {other:?} on the GPU"),
        }
    };
    let storage = Storage::Cuda(CudaStorage { slice, device: device.clone() });
    Ok(Tensor::from((storage, dims)))
}

fn named(names: [&'static str; 3], dtype: DType) -> Result<&'static str> {
    Ok(match dtype {
        DType::F32 => names[0],
        DType::F16 => names[1],
        DType::BF16 => names[2],
        other => bail!("no kernel for {other:?}"),
    })
}

fn flat(grid: u32, block: u32) -> Shape {
    Shape { grid: [grid, 1, 1], block, shared: 0, early: false }
}

/// Turns x `[tokens, heads, head_dim]`, each token by its position, in blocks of `every` by its block's first, times the frequencies, one a
/// pair of lanes.
pub fn rope(
    x: &Tensor,
    positions: &Tensor,
    (frequencies, amplitude): (&Tensor, f32),
    every: usize,
    turn: Turn,
) -> Result<Tensor> {
    let y = unwritten(x.dims(), x.dtype(), device_of(x)?)?;
    rope_into(x, positions, (frequencies, amplitude), every, turn, &y)?;
    Ok(y)
}

/// The same to y.
pub fn rope_into(
    x: &Tensor,
    positions: &Tensor,
    (frequencies, amplitude): (&Tensor, f32),
    every: usize,
    turn: Turn,
    y: &Tensor,
) -> Result<()> {
    let (_, heads, head_dim) = x.dims3()?;
    let (x, device) = (x.contiguous()?, device_of(x)?);
    let kernel = function(device, "step", named(["rope_f32", "rope_f16", "rope_bf16"], x.dtype())?)?;
    let dims = 2 * frequencies.elem_count();
    let first = if turn.last { head_dim - dims } else { 0 };
    let numbers = [heads, head_dim, dims, first, usize::from(turn.neighbours), every.max(1)];
    let mut args = vec![Arg::Ptr(address(&x)?), Arg::Ptr(address(positions)?)];
    args.extend([Arg::Ptr(address(frequencies)?), Arg::Ptr(address(y)?)]);
    args.extend(numbers.map(|n| Arg::U32(n as u32)));
    args.extend([Arg::F32(amplitude), Arg::F32(if turn.back { -1.0 } else { 1.0 })]);
    let threads = (head_dim / 2).next_multiple_of(32).clamp(32, 256);
    // SAFETY: as step.cu says; one position a token.
    unsafe { kernel.launch(device, flat((x.elem_count() / head_dim.max(1)) as u32, threads as u32), &args) }
}

/// Writes rows `[tokens, heads, dim]` into `cache` `[capacity, heads, dim]`, each behind as many others as its position says, where
/// `origin` is the position of the first entry.
pub fn append(rows: &Tensor, positions: &Tensor, cache: &Tensor, origin: u32) -> Result<()> {
    let (rows, device) = (rows.contiguous()?, device_of(cache)?);
    let (tokens, width, capacity) = (rows.dim(0)?, rows.dims()[1..].iter().product::<usize>(), cache.dim(0)?);
    if rows.dtype() != cache.dtype() || rows.dims()[1..] != cache.dims()[1..] {
        bail!("rows {:?} of {:?} for a cache {:?} of {:?}", rows.dims(), rows.dtype(), cache.dims(), cache.dtype())
    }
    let kernel = function(device, "step", named(["append_f32", "append_f16", "append_bf16"], rows.dtype())?)?;
    let args = [
        Arg::Ptr(address(&rows)?),
        Arg::Ptr(address(positions)?),
        Arg::Ptr(address(cache)?),
        Arg::U32(width as u32),
        Arg::U32(origin),
        Arg::U32(capacity as u32),
    ];
    // A grid's second axis ends at 65535.
    for from in (0..tokens).step_by(65535) {
        let count = (tokens - from).min(65535);
        let mut args = args;
        args[0] = Arg::Ptr(address(&rows.narrow(0, from, count)?)?);
        args[1] = Arg::Ptr(address(&positions.narrow(0, from, count)?)?);
        let shape = Shape { grid: [width.div_ceil(128) as u32, count as u32, 1], block: 128, shared: 0, early: false };
        // SAFETY: as step.cu says; the room behind the entries is the caller's alone, and the kernel stays within the capacity.
        unsafe { kernel.launch(device, shape, &args)? };
    }
    Ok(())
}

/// The k largest of the last axis and their indices, where the kernel can: rows of few scores, of which not many are wanted.
pub fn topk(scores: &Tensor, k: usize) -> Result<Option<(Tensor, Tensor)>> {
    let (width, mut dims) = (scores.dim(D::Minus1)?, scores.dims().to_vec());
    if width > MOST_SCORES || k > 64 {
        return Ok(None);
    }
    if let Some(last) = dims.last_mut() {
        *last = k;
    }
    let device = device_of(scores)?;
    let wide = scores.to_dtype(DType::F32)?.contiguous()?;
    let (values, indices) = (unwritten(&dims, DType::F32, device)?, unwritten(&dims, DType::U32, device)?);
    let args = [
        Arg::Ptr(address(&wide)?),
        Arg::Ptr(address(&values)?),
        Arg::Ptr(address(&indices)?),
        Arg::U32(width as u32),
        Arg::U32(k as u32),
    ];
    let threads = width.next_multiple_of(32).clamp(32, 256) as u32;
    let shape = Shape { shared: 4 * width as u32, ..flat((wide.elem_count() / width.max(1)) as u32, threads) };
    // SAFETY: as step.cu says.
    unsafe { function(device, "step", "topk")?.launch(device, shape, &args)? };
    Ok(Some((values.to_dtype(scores.dtype())?, indices)))
}

/// Blocks that look at a row of logits.
const LOOKING: usize = 128;

/// Chooses the largest of each row of `logits` `[rows, vocab]`, which go to `kept` in f32: its id goes to `ids` `[rows]`, where `positions`
/// moves on by one, and with its log-probability and whether the row was sound to `told` `[rows, 3]`, and to `heard` on the host
/// `[2, rows, 3]`, by whether the position was odd.
pub fn choose(logits: &Tensor, kept: &Tensor, [ids, positions, told]: [&Tensor; 3], heard: u64) -> Result<()> {
    let (rows, width) = logits.dims2()?;
    let (logits, device) = (logits.contiguous()?, device_of(logits)?);
    let parts = unwritten(&[rows, LOOKING, 4], DType::F32, device)?;
    let look = Shape { grid: [LOOKING as u32, rows as u32, 1], block: 256, shared: 0, early: true };
    let [from, kept, to] = [address(&logits)?, address(kept)?, address(&parts)?].map(Arg::Ptr);
    let name = named(["look_f32", "look_f16", "look_bf16"], logits.dtype())?;
    // SAFETY: as step.cu says; `kept` is as large as the logits.
    unsafe { function(device, "step", name)?.launch(device, look, &[from, kept, to, Arg::U32(width as u32)])? };
    let [ids, positions, told] = [address(ids)?, address(positions)?, address(told)?];
    let [parts, ids, positions, told, heard] = [address(&parts)?, ids, positions, told, heard].map(Arg::Ptr);
    let args = [parts, ids, positions, told, heard, Arg::U32(LOOKING as u32)];
    // SAFETY: as step.cu says.
    unsafe {
        let shape = Shape { early: true, ..flat(rows as u32, 128) };
        function(device, "step", "choose_top")?.launch(device, shape, &args)
    }
}
