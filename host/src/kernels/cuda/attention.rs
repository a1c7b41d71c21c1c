//! `attend_few.cu`, `attend_many.cu` and (by way of `hopper`) `attend_hopper.cu` from Rust: attention over bf16 caches whose keys and values are
//! equally wide, on tensor cores. How long a cache is the kernels read from the queries' positions; how it is split over blocks depends on
//! its capacity alone, so that a recorded step computes the very same sums.

use super::{
    attend::Seen,
    hopper,
    pack::Form,
    packed::aligned,
    program::{Arg, Shape, function, is_hopper},
    step::{address, device_of, unwritten},
    turn::{Joined, Turned},
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

/// Sequences of one step whose caches a launch can have.
pub const SEQUENCES: usize = 32;

/// attention.cuh's `Cache`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Cache {
    k: u64,
    v: u64,
    first: u32,
    capacity: u32,
}

/// attention.cuh's `Seen`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Args {
    q: u64,
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
    window: u32,
    chunk: u32,
    scale: f32,
    softcap: f32,
    by_softcap: f32,
    words: u32,
    group_log2: u32,
    unused: u32,
    cache: Cache,
}

/// attend_few.cu's `Turned`.
#[repr(C)]
#[derive(Clone, Copy)]
struct TurnedArgs {
    seen: Args,
    k: u64,
    v: u64,
    frequencies: u64,
    q_weight: u64,
    k_weight: u64,
    dims: u32,
    first: u32,
    neighbours: u32,
    every: u32,
    amplitude: f32,
    sign: f32,
    q_eps: f32,
    k_eps: f32,
    q_normed: u32,
    k_normed: u32,
    of: [Cache; SEQUENCES],
}

/// How few queries are spread over the GPU.
struct Few {
    splits: usize,
    clustered: bool,
    shape: Shape,
}

impl Few {
    /// For so many tokens and groups of heads, over caches with room for `capacity` entries.
    fn new(device: &CudaDevice, tokens: usize, parts: usize, d: usize, capacity: usize) -> Result<Self> {
        let splits = (BLOCKS[0] / (parts * tokens)).min(capacity.div_ceil(64)).clamp(1, BLOCKS[1]);
        let clustered = splits > 1 && (splits <= CLUSTER[0] || capacity <= CLUSTER[1]) && is_hopper(device)?;
        let splits = if clustered { splits.min(CLUSTER[0]) } else { splits };
        let grid = [splits, parts, tokens].map(|n| n as u32);
        let shape = Shape { grid, block: 32 * warps(d, clustered), shared: few_shared(d, clustered), early: true };
        Ok(Few { splits, clustered, shape })
    }

    /// Blocks of a cluster.
    fn cluster(&self) -> u32 {
        if self.clustered { self.splits as u32 } else { 1 }
    }

    /// Room for what blocks that are no cluster have to add up; a row has its peak and sum behind its lanes.
    fn partial(&self, device: &CudaDevice, d: usize) -> Result<Option<Tensor>> {
        let rows = self.shape.grid.iter().product::<u32>() as usize * 16;
        let wanted = self.splits > 1 && !self.clustered;
        wanted.then(|| unwritten(&[rows * (d + 4)], DType::F32, device)).transpose()
    }
}

/// What both ways of starting have in common.
fn args(seen: &Seen<'_>, [q, y]: [&Tensor; 2], splits: usize, partial: Option<&Tensor>) -> Result<Args> {
    let ((tokens, heads, _), (capacity, kv_heads, _)) = (q.dims3()?, seen.keys.dims3()?);
    let optional = |t: Option<&Tensor>| t.map_or(Ok(0), address);
    let softcap = seen.softcap.unwrap_or(0.0);
    Ok(Args {
        q: address(q)?,
        y: address(y)?,
        positions: address(seen.positions)?,
        sinks: optional(seen.sinks)?,
        slopes: optional(seen.slopes)?,
        partial: optional(partial)?,
        arrived: if partial.is_some() { address(&counters(device_of(q)?)?)? } else { 0 },
        tokens: tokens as u32,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        splits: splits as u32,
        window: seen.window.unwrap_or(0) as u32,
        chunk: seen.chunk.unwrap_or(0) as u32,
        scale: seen.scale,
        softcap,
        by_softcap: if softcap > 0.0 { 1.0 / (softcap * std::f32::consts::LOG2_E) } else { 0.0 },
        words: seen.packed.map_or(0, |form| form.words()) as u32,
        group_log2: seen.packed.map_or(0, |form| form.group.ilog2()),
        unused: 0,
        cache: Cache {
            k: address(seen.keys)?,
            v: optional(seen.values)?,
            first: seen.origin,
            capacity: capacity as u32,
        },
    })
}

/// Groups of heads that share a key and are sixteen at most.
fn parts(heads: usize, kv_heads: usize) -> usize {
    kv_heads * (heads / kv_heads.max(1)).div_ceil(16)
}

/// Whether one launch turns, joins caches and attends, for so many sequences of one token each.
pub fn covers_turned(q: &Turned, kv_heads: usize, sequences: usize) -> Result<bool> {
    let (tokens, heads, d) = q.x.dims3()?;
    let whole = kv_heads > 0 && heads % kv_heads == 0 && 2 * q.frequencies.elem_count() <= d;
    let device = device_of(&q.x)?;
    let room = function(device, "attend_few", turned_name(true, d))?.most_shared;
    Ok(whole && tokens == sequences && sequences <= SEQUENCES && few_shared(d, is_hopper(device)?) as usize <= room)
}

fn few_name(clustered: bool, d: usize) -> &'static str {
    match (clustered, d) {
        (false, 64) => "attend_few_64",
        (false, 128) => "attend_few_128",
        (false, _) => "attend_few_256",
        (true, 64) => "attend_clustered_64",
        (true, 128) => "attend_clustered_128",
        (true, _) => "attend_clustered_256",
    }
}

fn turned_name(clustered: bool, d: usize) -> &'static str {
    match (clustered, d) {
        (false, 64) => "attend_turned_few_64",
        (false, 128) => "attend_turned_few_128",
        (false, _) => "attend_turned_few_256",
        (true, 64) => "attend_turned_clustered_64",
        (true, 128) => "attend_turned_clustered_128",
        (true, _) => "attend_turned_clustered_256",
    }
}

/// Queries and keys `[sequences, .., d]` that are still to be turned, and values, of one token a sequence: the latter two join their
/// sequence's cache, which the query looks at. `seen` says how, for all of them alike; its tables are the first sequence's.
pub fn attend_turned(seen: &Seen<'_>, q: &Turned, k: &Turned, v: &Tensor, caches: &[Joined<'_>]) -> Result<Tensor> {
    let ((tokens, heads, d), (_, kv_heads, _)) = (q.x.dims3()?, v.dims3()?);
    let device = device_of(&q.x)?;
    let (q_x, k_x, v) = (aligned(&q.x)?, aligned(&k.x)?, aligned(v)?);
    let y = unwritten(&[tokens, heads, d], DType::BF16, device)?;
    let mut of = [Cache::default(); SEQUENCES];
    let mut most = 0;
    for (to, cache) in of.iter_mut().zip(caches) {
        let capacity = cache.keys.dim(0)?;
        most = most.max(capacity);
        let [k, v] = [address(cache.keys)?, address(cache.values)?];
        *to = Cache { k, v, first: cache.origin, capacity: capacity as u32 };
    }
    let few = Few::new(device, tokens, parts(heads, kv_heads), d, most)?;
    let partial = few.partial(device, d)?;
    let weight = |t: &Turned| t.norm.as_ref().and_then(|(weight, _)| weight.as_ref()).map_or(Ok(0), address);
    let eps = |t: &Turned| t.norm.as_ref().map_or(0.0, |(_, eps)| *eps);
    let dims = 2 * q.frequencies.elem_count();
    let work = TurnedArgs {
        seen: args(seen, [&q_x, &y], few.splits, partial.as_ref())?,
        k: address(&k_x)?,
        v: address(&v)?,
        frequencies: address(&q.frequencies)?,
        q_weight: weight(q)?,
        k_weight: weight(k)?,
        dims: dims as u32,
        first: if q.turn.last { (d - dims) as u32 } else { 0 },
        neighbours: q.turn.neighbours.into(),
        every: q.every.max(1) as u32,
        amplitude: q.amplitude,
        sign: if q.turn.back { -1.0 } else { 1.0 },
        q_eps: eps(q),
        k_eps: eps(k),
        q_normed: q.norm.is_some().into(),
        k_normed: k.norm.is_some().into(),
        of,
    };
    let kernel = function(device, "attend_few", turned_name(few.clustered, d))?;
    // SAFETY: as attend_few.cu says; caches have room for the token, which the kernel does not exceed, and counters are 0 between launches.
    unsafe { kernel.launch_clustered(device, few.shape, few.cluster(), &[Arg::of(&work)])? };
    Ok(y)
}

/// Whether keys and values in groups of a few bits can stay as they lie for queries `[tokens, heads, d]` of one sequence.
pub fn covers_packed(form: Form, q: &Tensor) -> Result<bool> {
    let ((tokens, heads, d), device) = (q.dims3()?, device_of(q)?);
    let clustered = is_hopper(device)?;
    let fast = tokens < MANY && tokens * heads <= COUNTERS && covers(form.dtype, d, form.dim, false, false, tokens);
    let Some(name) = packed_name(clustered, form).filter(|_| fast) else { return Ok(false) };
    Ok(few_shared(d, clustered) as usize <= function(device, "attend_packed", name)?.most_shared)
}

fn packed_name(clustered: bool, form: Form) -> Option<&'static str> {
    Some(match (clustered, form.dim, form.bits) {
        (false, 64, 4) => "attend_few_64_of_4",
        (false, 64, 8) => "attend_few_64_of_8",
        (false, 128, 4) => "attend_few_128_of_4",
        (false, 128, 8) => "attend_few_128_of_8",
        (false, 256, 4) => "attend_few_256_of_4",
        (false, 256, 8) => "attend_few_256_of_8",
        (true, 64, 4) => "attend_clustered_64_of_4",
        (true, 64, 8) => "attend_clustered_64_of_8",
        (true, 128, 4) => "attend_clustered_128_of_4",
        (true, 128, 8) => "attend_clustered_128_of_8",
        (true, 256, 4) => "attend_clustered_256_of_4",
        (true, 256, 8) => "attend_clustered_256_of_8",
        _ => return None,
    })
}

/// Whether these kernels can do it: for prompts of any length.
pub fn covers(dtype: DType, d: usize, e: usize, lanes: bool, kept: bool, tokens: usize) -> bool {
    let wide = if tokens < MANY { matches!(d, 64 | 128 | 256) } else { matches!(d, 64 | 128) };
    dtype == DType::BF16 && d == e && wide && !lanes && !kept
}

/// q `[tokens, heads, d]` -> `[tokens, heads, d]`; `None` for what the kernels do not cover.
pub fn attend(seen: &Seen<'_>) -> Result<Option<Tensor>> {
    attend_by(seen, hopper::covers(device_of(seen.q)?, seen.q.dim(2)?)?)
}

/// The same, many queries by `attend_hopper.cu` where that is so, which the GPU and the lanes must allow, and else by `attend_many.cu`.
pub fn attend_by(seen: &Seen<'_>, on_hopper: bool) -> Result<Option<Tensor>> {
    let ((tokens, heads, d), (capacity, kv_heads, _)) = (seen.q.dims3()?, seen.keys.dims3()?);
    let Some(values) = seen.values else { return Ok(None) };
    let kept = seen.keep > 0;
    let (dtype, e) = match seen.packed {
        Some(form) => (form.dtype, form.dim),
        None => (seen.keys.dtype(), values.dim(2)?),
    };
    if !covers(dtype, d, e, false, kept, tokens) || kv_heads == 0 || heads % kv_heads != 0 {
        return Ok(None);
    }
    let parts = parts(heads, kv_heads);
    if parts > 65535 || heads > 65535 || (tokens < MANY && tokens * parts > COUNTERS) {
        return Ok(None);
    }
    let device = device_of(seen.q)?;
    let q = aligned(&seen.q.to_dtype(DType::BF16)?)?;
    let y = unwritten(&[tokens, heads, d], DType::BF16, device)?;
    let few = if tokens < MANY { Some(Few::new(device, tokens, parts, d, capacity)?) } else { None };
    let partial = few.as_ref().map_or(Ok(None), |few| few.partial(device, d))?;
    let args = args(seen, [&q, &y], few.as_ref().map_or(1, |few| few.splits), partial.as_ref())?;
    if few.is_none() && on_hopper {
        hopper::attend(&args, &q, seen.keys, values)?;
        return y.to_dtype(seen.q.dtype()).map(Some);
    }
    let (file, name) = match (few.as_ref().map(|few| few.clustered), seen.packed) {
        (Some(clustered), Some(form)) => ("attend_packed", packed_name(clustered, form).unwrap_or_default()),
        (Some(clustered), None) => ("attend_few", few_name(clustered, d)),
        (None, None) => ("attend_many", if d == 64 { "attend_many_64" } else { "attend_many_128" }),
        (None, Some(_)) => return Ok(None),
    };
    let grid = [tokens.div_ceil(64) as u32, heads as u32, 1];
    let many = Shape { grid, block: 128, shared: (2 * 2 * 64 * d * 2) as u32, early: true };
    let shape = few.as_ref().map_or(many, |few| Shape { early: !seen.fresh, ..few.shape });
    let kernel = function(device, file, name)?;
    if shape.shared as usize > kernel.most_shared {
        return Ok(None);
    }
    let cluster = few.as_ref().map_or(1, Few::cluster);
    // SAFETY: as attention.cuh says; the cache holds keys up to the last query's position, and counters are 0 between launches.
    unsafe { kernel.launch_clustered(device, shape, cluster, &[Arg::of(&args)])? };
    y.to_dtype(seen.q.dtype()).map(Some)
}

/// As attend_few.cu has it.
fn warps(d: usize, clustered: bool) -> u32 {
    if clustered && d <= 128 { 8 } else { 4 }
}

/// As attend_few.cu counts it: queries, each warp's ring or what it adds up, and what the blocks of a cluster give one of them.
fn few_shared(d: usize, clustered: bool) -> u32 {
    let (warps, d) = (warps(d, clustered), d as u32);
    let (ring, sums) = (warps * 2 * 4 * (d / 32) * 512, warps * 16 * (d + 4) * 4);
    let given = if clustered { (16 * d + 7 * 32 * warps) * 4 } else { 0 };
    16 * (d + 32) * 2 + ring.max(sums) + given
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
