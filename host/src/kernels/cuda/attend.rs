//! `attend.cu` from Rust: attention over a cache on the GPU, for what the faster kernels do not cover. How long the cache is, the kernel
//! reads from the queries' positions.

use super::{
    pack::Form,
    program::{Arg, Shape, function},
    step::{address, device_of, unwritten},
};
use candle_core::{DType, Result, Tensor, bail};

/// Lanes of a value that the kernel has registers for.
const MOST_LANES: usize = 512;

/// Queries and what they look at. Position p's key is entry p - `origin`; what lies behind the last query's is not read.
pub struct Seen<'a> {
    /// `[tokens, heads, d]`
    pub q: &'a Tensor,
    /// `[capacity, kv_heads, d]`
    pub keys: &'a Tensor,
    /// `[capacity, kv_heads, e]`; without, a key's first `lanes` lanes are its value.
    pub values: Option<&'a Tensor>,
    /// See `values`.
    pub lanes: usize,
    /// `[tokens]`, u32
    pub positions: &'a Tensor,
    /// The first entry's position; with `keep`, that of the entry behind the kept ones, less their number.
    pub origin: u32,
    /// Keys seen, counting the query's own.
    pub window: Option<usize>,
    /// Keys are seen from the last multiple of this on.
    pub chunk: Option<usize>,
    /// Keys at positions below this are seen beyond the window.
    pub keep: usize,
    /// Multiplies q·k.
    pub scale: f32,
    /// `softcap * tanh(score / softcap)`
    pub softcap: Option<f32>,
    /// `[heads]`, f32: joins each softmax and is dropped.
    pub sinks: Option<&'a Tensor>,
    /// `[heads]`, f32: a score falls by so much for each position.
    pub slopes: Option<&'a Tensor>,
    /// What is in a row, where keys and values are `[capacity, kv_heads, words]` of numbers in groups of a few bits, as
    /// [`super::attention::covers_packed`] says that they may be.
    pub packed: Option<Form>,
    /// Whether the launch before this one writes all keys or values, and not just those of the step: then none may be read before it ends.
    pub fresh: bool,
}

/// Whether keys of `d` lanes and values of `e` are not too wide for the kernel's registers and shared memory.
pub fn fits(d: usize, e: usize) -> bool {
    e > 0 && e <= MOST_LANES && shared_bytes(d, e) <= 48 << 10
}

/// The query, and a sum for each of eight warps.
fn shared_bytes(d: usize, e: usize) -> usize {
    4 * (d + 8 * e)
}

/// q `[tokens, heads, d]` -> `[tokens, heads, e]`, of lanes that [`fits`] takes.
pub fn attend(seen: &Seen<'_>) -> Result<Tensor> {
    if let Some(y) = super::attention::attend(seen)? {
        return Ok(y);
    }
    if seen.packed.is_some() {
        bail!("attention over a packed cache that is to be unpacked first")
    }
    let ((tokens, heads, d), (capacity, kv_heads, _)) = (seen.q.dims3()?, seen.keys.dims3()?);
    let e = seen.values.map_or(Ok(seen.lanes), |v| v.dim(2))?;
    if !fits(d, e) || tokens > 65535 {
        bail!("attention of {tokens} tokens with keys of {d} lanes and values of {e}: too much for this kernel")
    }
    let device = device_of(seen.q)?;
    let q = seen.q.to_dtype(seen.keys.dtype())?.contiguous()?;
    let y = unwritten(&[tokens, heads, e], q.dtype(), device)?;
    let optional = |t: Option<&Tensor>| t.map_or(Ok(0), address);
    let addresses = [
        address(&q)?,
        address(seen.keys)?,
        address(seen.values.unwrap_or(seen.keys))?,
        address(seen.positions)?,
        optional(seen.sinks)?,
        optional(seen.slopes)?,
        address(&y)?,
    ];
    let stride = if seen.values.is_some() { e } else { d };
    let numbers = [heads, kv_heads, d, e, stride, seen.origin as usize, capacity].into_iter().chain([
        seen.window.unwrap_or(0),
        seen.chunk.unwrap_or(0),
        seen.keep,
    ]);
    let mut bytes: Vec<u8> = addresses.iter().flat_map(|a| a.to_ne_bytes()).collect();
    bytes.extend(numbers.flat_map(|n| (n as u32).to_ne_bytes()));
    bytes.extend([seen.scale, seen.softcap.unwrap_or(0.0)].iter().flat_map(|x| x.to_ne_bytes()));
    let name = match q.dtype() {
        DType::F32 => "attend_f32",
        DType::F16 => "attend_f16",
        DType::BF16 => "attend_bf16",
        other => bail!("no attention over {other:?}"),
    };
    let shape =
        Shape { grid: [heads as u32, tokens as u32, 1], block: 256, shared: shared_bytes(d, e) as u32, early: false };
    // SAFETY: the struct is attend.cu's `Seen`, its tensors are as large as it says.
    unsafe { function(device, "attend", name)?.launch(device, shape, &[Arg::Struct(&bytes)])? };
    y.to_dtype(seen.q.dtype())
}
