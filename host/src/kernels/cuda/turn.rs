//! `turn.cu` from Rust: what stands between the projections of queries, keys and values and attention, in one launch.

use super::{
    packed::aligned,
    program::{Arg, Shape, function},
    step::{address, device_of},
};
use crate::kernels::cpu::Turn;
use candle_core::{Result, Tensor};

/// Warps of a block, as turn.cu has it, and blocks that keep a GPU busy.
const WARPS: usize = 8;
const BLOCKS: usize = 264;

/// Queries or keys on their way to attention.
#[derive(Clone)]
pub struct Turned {
    /// `[tokens, heads, d]`, bf16, as the projection gives them.
    pub x: Tensor,
    /// Where they go, unless they join a cache.
    pub y: Tensor,
    /// A norm of each head: weight `[d]`, f32, and what is added under the root.
    pub norm: Option<(Option<Tensor>, f32)>,
    /// `[pairs]`, f32
    pub frequencies: Tensor,
    /// Multiplies them after the turn.
    pub amplitude: f32,
    /// Positions are rounded down to a multiple of this.
    pub every: usize,
    /// Which lanes, and which way.
    pub turn: Turn,
}

/// Where keys and values go.
pub struct Joined<'a> {
    /// `[capacity, kv_heads, d]`
    pub keys: &'a Tensor,
    /// `[capacity, kv_heads, e]`
    pub values: &'a Tensor,
    /// Position of the first entry.
    pub origin: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    q: u64,
    k: u64,
    v: u64,
    y: u64,
    keys: u64,
    values: u64,
    positions: u64,
    frequencies: u64,
    q_weight: u64,
    k_weight: u64,
    heads: u32,
    kv_heads: u32,
    d: u32,
    e: u32,
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
    origin: u32,
    capacity: u32,
}

/// Whether one launch does for both, which turn alike.
pub fn covers(q: &Turned, k: &Turned) -> bool {
    let same = |a: &Tensor, b: &Tensor| a.id() == b.id();
    let alike = q.amplitude == k.amplitude && q.every == k.every && q.turn == k.turn;
    let fits = |d: &usize| *d <= 512 && d.is_multiple_of(4);
    let narrow = q.x.dims().last().is_some_and(fits) && q.frequencies.elem_count() <= 256;
    alike && narrow && same(&q.frequencies, &k.frequencies)
}

/// Writes q's `y`, and keys and values `[tokens, kv_heads, e]` behind as many others as their positions `[tokens]` say.
pub fn turn(q: &Turned, k: &Turned, v: &Tensor, to: &Joined<'_>, positions: &Tensor) -> Result<()> {
    let ((tokens, heads, d), (_, kv_heads, e)) = (q.x.dims3()?, v.dims3()?);
    let device = device_of(&q.x)?;
    let (q_x, k_x, v) = (aligned(&q.x)?, aligned(&k.x)?, aligned(v)?);
    let dims = 2 * q.frequencies.elem_count();
    let weight = |t: &Turned| t.norm.as_ref().and_then(|(weight, _)| weight.as_ref()).map_or(Ok(0), address);
    let eps = |t: &Turned| t.norm.as_ref().map_or(0.0, |(_, eps)| *eps);
    let args = Args {
        q: address(&q_x)?,
        k: address(&k_x)?,
        v: address(&v)?,
        y: address(&q.y)?,
        keys: address(to.keys)?,
        values: address(to.values)?,
        positions: address(positions)?,
        frequencies: address(&q.frequencies)?,
        q_weight: weight(q)?,
        k_weight: weight(k)?,
        heads: heads as u32,
        kv_heads: kv_heads as u32,
        d: d as u32,
        e: e as u32,
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
        origin: to.origin,
        capacity: to.keys.dim(0)? as u32,
    };
    // Few tokens' heads are spread over more blocks, a warp each if need be.
    let shares = (BLOCKS / tokens.max(1)).clamp(1, (heads + 2 * kv_heads).div_ceil(WARPS));
    let grid = [tokens as u32, shares as u32, 1];
    let shape = Shape { grid, block: 32 * WARPS as u32, shared: 0, early: true };
    // SAFETY: as turn.cu says; caches have room for the tokens, and the kernel stays within their capacity.
    unsafe { function(device, "turn", "turn")?.launch(device, shape, &[Arg::of(&args)]) }
}
