//! `attend_few.cu` and `attend_many.cu` from Rust: attention over bf16 caches whose keys and values are equally wide, on tensor cores. How
//! long a cache is the kernels read from the queries' positions; how it is split over blocks depends on its capacity alone, so that a
//! recorded step computes the very same sums.

use super::{
    attend::Seen,
    packed::aligned,
    program::{Arg, Shape, function, has_clusters},
    step::{address, device_of, unwritten},
};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, cuda_backend::DeviceId};
use std::{
    collections::HashMap,
    sync::{LazyLock, Mutex, PoisonError},
};

/// Queries from which on a block takes many at once.
const MANY: usize = 17;
/// Blocks that a step's attention is spread over, and the most that can share a query.
const BLOCKS: [usize; 2] = [128, 64];
/// Blocks that can be a cluster, and up to which capacity of a cache they do.
const CLUSTER: [usize; 2] = [8, 8192];
/// Queries times groups of heads that `attend_few` can count.
const COUNTERS: usize = 1 << 16;

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    q: u64,
    k: u64,
    v: u64,
    y: u64,
    positions: u64,
    sinks: u64,
    slopes: u64,
    partial: u64,
    arrived: u64,
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    splits: u32,
    first: u32,
    window: u32,
    chunk: u32,
    scale: f32,
    softcap: f32,
    by_softcap: f32,
    capacity: u32,
    unused: u32,
}

/// Whether these kernels can do it: for prompts of any length.
pub fn covers(dtype: DType, d: usize, e: usize, lanes: bool, kept: bool, tokens: usize) -> bool {
    let wide = if tokens < MANY { matches!(d, 64 | 128 | 256) } else { matches!(d, 64 | 128) };
    dtype == DType::BF16 && d == e && wide && !lanes && !kept
}

/// q `[tokens, heads, d]` -> `[tokens, heads, d]`; `None` for what the kernels do not cover.
pub fn attend(seen: &Seen<'_>) -> Result<Option<Tensor>> {
    let ((tokens, heads, d), (capacity, kv_heads, _)) = (seen.q.dims3()?, seen.keys.dims3()?);
    let Some(values) = seen.values else { return Ok(None) };
    let kept = seen.keep > 0;
    if !covers(seen.keys.dtype(), d, values.dim(2)?, false, kept, tokens) || kv_heads == 0 || heads % kv_heads != 0 {
        return Ok(None);
    }
    let parts = kv_heads * (heads / kv_heads).div_ceil(16);
    if parts > 65535 || heads > 65535 || (tokens < MANY && tokens * parts > COUNTERS) {
        return Ok(None);
    }
    let device = device_of(seen.q)?;
    let q = aligned(&seen.q.to_dtype(DType::BF16)?)?;
    let y = unwritten(&[tokens, heads, d], DType::BF16, device)?;
    let optional = |t: Option<&Tensor>| t.map_or(Ok(0), address);
    let few = tokens < MANY;
    let splits = (BLOCKS[0] / (parts * tokens)).min(capacity.div_ceil(64)).clamp(1, BLOCKS[1]);
    let clustered = few && (splits <= CLUSTER[0] || capacity <= CLUSTER[1]) && has_clusters(device)?;
    let splits = if clustered { splits.min(CLUSTER[0]) } else { splits };
    // A row has its peak and sum behind its lanes.
    let partial = match few && splits > 1 && !clustered {
        true => Some(unwritten(&[tokens * parts * splits * 16 * (d + 4)], DType::F32, device)?),
        false => None,
    };
    let softcap = seen.softcap.unwrap_or(0.0);
    let args = Args {
        q: address(&q)?,
        k: address(seen.keys)?,
        v: address(values)?,
        y: address(&y)?,
        positions: address(seen.positions)?,
        sinks: optional(seen.sinks)?,
        slopes: optional(seen.slopes)?,
        partial: partial.as_ref().map_or(Ok(0), address)?,
        arrived: if partial.is_some() { address(&counters(device)?)? } else { 0 },
        tokens: tokens as u32,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        splits: splits as u32,
        first: seen.origin,
        window: seen.window.unwrap_or(0) as u32,
        chunk: seen.chunk.unwrap_or(0) as u32,
        scale: seen.scale,
        softcap,
        by_softcap: if softcap > 0.0 { 1.0 / (softcap * std::f32::consts::LOG2_E) } else { 0.0 },
        capacity: capacity as u32,
        unused: 0,
    };
    let (file, name) = match (few, clustered, d) {
        (true, false, 64) => ("attend_few", "attend_few_64"),
        (true, false, 128) => ("attend_few", "attend_few_128"),
        (true, false, _) => ("attend_few", "attend_few_256"),
        (true, true, 64) => ("attend_few", "attend_clustered_64"),
        (true, true, 128) => ("attend_few", "attend_clustered_128"),
        (true, true, _) => ("attend_few", "attend_clustered_256"),
        (false, _, 64) => ("attend_many", "attend_many_64"),
        (false, ..) => ("attend_many", "attend_many_128"),
    };
    let shape = match few {
        true => {
            Shape { grid: [splits, parts, tokens].map(|n| n as u32), block: 128, shared: few_shared(d), early: true }
        }
        false => {
            let grid = [tokens.div_ceil(64) as u32, heads as u32, 1];
            Shape { grid, block: 128, shared: (2 * 2 * 64 * d * 2) as u32, early: true }
        }
    };
    let kernel = function(device, file, name)?;
    if shape.shared as usize > kernel.most_shared {
        return Ok(None);
    }
    // SAFETY: as attention.cuh says; the cache holds keys up to the last query's position, and counters are 0 between launches.
    unsafe { kernel.launch_clustered(device, shape, if clustered { splits as u32 } else { 1 }, &[Arg::of(&args)])? };
    y.to_dtype(seen.q.dtype()).map(Some)
}

/// As attend_few.cu counts it: queries, and each warp's ring or what it adds up.
fn few_shared(d: usize) -> u32 {
    let (ring, sums) = (4 * 2 * 4 * (d / 32) * 512, 4 * 16 * (d + 4) * 4);
    (16 * (d + 32) * 2 + ring.max(sums)) as u32
}

/// Zeros, which every launch leaves as it finds them.
fn counters(device: &CudaDevice) -> Result<Tensor> {
    static KNOWN: LazyLock<Mutex<HashMap<DeviceId, Tensor>>> = LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(zeros) = known.get(&device.id()) {
        return Ok(zeros.clone());
    }
    let zeros = Tensor::zeros(COUNTERS, DType::U32, &Device::Cuda(device.clone()))?;
    known.insert(device.id(), zeros.clone());
    Ok(zeros)
}
