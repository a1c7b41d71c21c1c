//! `experts.cu` from Rust: all routed experts of a layer as three packed matrices, and the choice of them read on the device. Few tokens
//! read each chosen expert once a choice; of many, those that chose an expert go through it together.

use super::{
    norm::joint,
    packed::{Layout, Packed, Packing, Tiles, aligned, by_layout},
    product::{Joint, Normed, Norming, by_scales, staged},
    program::{Arg, Shape, function},
    route::{Args as RouteArgs, MOST_CHOSEN, Route},
    step::{address, device_of, unwritten},
};
use crate::{kernels::cpu::Matrix, layers::experts::Kind};
use candle_core::{DType, Device, Result, Tensor, bail};

/// Choices from which on they are sorted by expert.
const MANY: usize = 385;
/// Tokens that a block multiplies then.
const TOGETHER: usize = 32;
/// Steps on their way at once as experts.cu compiles them: for few with a gate, without, and back; and for many.
const AHEAD: [usize; 4] = [2, 4, 3, 2];

/// One projection of all experts.
pub struct Projection {
    tiles: Tiles,
    /// `[experts * rows]`
    bias: Option<Tensor>,
    /// Outputs of one expert.
    rows: usize,
}

impl Projection {
    /// From each expert's matrix, and the biases of all, one behind the other; `None` where there are no kernels for them.
    pub fn place(matrices: &[Matrix], bias: Option<Tensor>, device: &Device) -> Result<Option<Self>> {
        let Some(rows) = matrices.first().map(Matrix::rows) else { return Ok(None) };
        let bias = bias.map(|bias| aligned(&bias)).transpose()?;
        let (whole, right) = (rows.is_multiple_of(16), rows * matrices.len());
        if !whole || bias.as_ref().is_some_and(|bias| bias.dtype() != DType::BF16 || bias.elem_count() != right) {
            return Ok(None);
        }
        Ok(Tiles::place(matrices, device)?.map(|tiles| Projection { tiles, bias, rows }))
    }
}

/// Tokens and their experts.
#[derive(Clone)]
pub struct Routed {
    /// `[tokens, dim]`, bf16
    pub x: Tensor,
    /// Of x, where choices are few and none of them is x itself.
    pub norm: Option<Norming>,
    /// `[tokens, k]`
    pub chosen: Tensor,
    /// `[tokens, k]`
    pub weights: Tensor,
    /// How `chosen` and `weights`, u32 and f32, are found, if that is yet to be done; where choices are few.
    pub route: Option<Route>,
    /// What they do.
    pub kind: Kind,
}

/// The experts of a layer.
pub struct Stacked {
    /// In the kinds that have one.
    pub gate: Option<Projection>,
    /// `[hidden, dim]`
    pub up: Projection,
    /// `[dim, hidden]`
    pub down: Projection,
    /// How many.
    pub experts: usize,
}

/// experts.cu's `Experts`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Args {
    gate: Packed,
    up: Packed,
    down: Packed,
    biases: [u64; 3],
    x: u64,
    chosen: u64,
    weights: u64,
    inner: u64,
    outer: u64,
    y: u64,
    sorted: u64,
    places: u64,
    tokens: u32,
    k: u32,
    experts: u32,
    identity: u32,
    dim: u32,
    hidden: u32,
    hidden_tiles: u32,
    dim_tiles: u32,
    scaled_input: u32,
    blocks: u32,
    joint: Joint,
    unused: u32,
    normed: Normed,
    residual: u64,
    squares: u64,
    route: RouteArgs,
}

impl Stacked {
    /// Whether one set of kernels does all three.
    pub fn fits(&self) -> bool {
        let alike = |p: &Projection| p.tiles.layout == self.up.tiles.layout;
        alike(&self.down) && self.gate.as_ref().is_none_or(alike)
    }

    /// Whether so many choices are few: each is a product by itself then, and a token's are all in one block's shared memory.
    pub fn are_few(&self, tokens: usize, k: usize) -> bool {
        tokens * k < MANY && k <= MOST_CHOSEN && k * staged(self.up.rows) <= 64 << 10
    }

    /// x `[tokens, dim]`, chosen and weights `[tokens, k]` -> the weighted sum `[tokens, dim]`, in bf16.
    pub fn forward(&self, x: &Tensor, chosen: &Tensor, weights: &Tensor, kind: Kind) -> Result<Tensor> {
        let x = aligned(&x.to_dtype(DType::BF16)?)?;
        let y = unwritten(x.dims(), DType::BF16, device_of(&x)?)?;
        let (chosen, weights) = (chosen.clone(), weights.clone());
        let routed = Routed { x, norm: None, chosen, weights, route: None, kind };
        self.run(&routed, &y, None, None)?;
        Ok(y)
    }

    /// The same to y `[tokens, dim]`. For less than [`MANY`] choices a residual of y's shape can join it, and the sums of the squares of
    /// what comes out be written, `[tokens, dim / 16]`.
    pub fn run(&self, routed: &Routed, y: &Tensor, residual: Option<&Tensor>, squares: Option<&Tensor>) -> Result<()> {
        let Routed { x, norm, chosen, weights, route, kind } = routed;
        let ((tokens, dim), k) = (x.dims2()?, chosen.dim(1)?);
        let (device, hidden, choices) = (device_of(x)?, self.up.rows, tokens * k);
        if tokens > 65535 || choices > 1 << 21 || k == 0 {
            bail!("{tokens} tokens through {k} experts each: too many for a step; lower --prefill-step-size")
        }
        let x = aligned(x)?;
        let chosen = chosen.to_dtype(DType::U32)?.contiguous()?;
        let weights = weights.to_dtype(DType::F32)?.contiguous()?;
        let many = !self.are_few(tokens, k);
        if many && (norm.is_some() || residual.is_some() || squares.is_some() || route.is_some()) {
            bail!("{choices} choices of experts with a norm or a residual")
        }
        let blocks = if many { choices / TOGETHER + self.experts } else { 0 };
        let room = |dims: &[usize], dtype, wanted: bool| wanted.then(|| unwritten(dims, dtype, device)).transpose();
        let inner = unwritten(&[choices, hidden], DType::BF16, device)?;
        let outer = room(&[choices, dim], DType::BF16, many)?;
        let sorted = room(&[choices], DType::U32, many)?;
        let places = room(&[self.experts + 1 + blocks], DType::U32, many)?;
        let at = |t: &Option<Tensor>| t.as_ref().map_or(Ok(0), address);
        let (up, down) = (&self.up, &self.down);
        let args = Args {
            gate: self.gate.as_ref().map_or(Ok(Packed::default()), |p| p.tiles.packed())?,
            up: up.tiles.packed()?,
            down: down.tiles.packed()?,
            biases: [self.gate.as_ref().map_or(Ok(0), |p| at(&p.bias))?, at(&up.bias)?, at(&down.bias)?],
            x: address(&x)?,
            chosen: address(&chosen)?,
            weights: address(&weights)?,
            inner: address(&inner)?,
            outer: at(&outer)?,
            y: address(y)?,
            sorted: at(&sorted)?,
            places: at(&places)?,
            tokens: tokens as u32,
            k: k as u32,
            experts: self.experts as u32,
            identity: kind.identity as u32,
            dim: dim as u32,
            hidden: hidden as u32,
            hidden_tiles: (hidden / 16) as u32,
            dim_tiles: (dim / 16) as u32,
            scaled_input: kind.scaled_input.into(),
            blocks: blocks as u32,
            joint: joint(kind.activation),
            unused: 0,
            normed: norm.as_ref().map_or(Ok(Normed::default()), Norming::normed)?,
            residual: residual.map_or(Ok(0), address)?,
            squares: squares.map_or(Ok(0), address)?,
            route: route.as_ref().map_or(Ok(RouteArgs::default()), Route::args)?,
        };
        let layout = up.tiles.layout;
        // A block has `staged` bytes of shared memory, and `own` for each warp.
        let start = |name, grid: [usize; 2], warps: usize, [staged, own]: [usize; 2]| {
            let kernel = function(device, "experts", name)?;
            let most = kernel.most_shared.saturating_sub(staged);
            let warps = most.checked_div(own).map_or(warps, |most| warps.min(most).max(1));
            let grid = [grid[0] as u32, grid[1] as u32, 1];
            let least = warps * own + staged;
            let shared = if many { least } else { kernel.evenly((grid[0] * grid[1]) as usize, least) } as u32;
            let shape = Shape { grid, block: 32 * warps as u32, shared, early: true };
            // SAFETY: as experts.cu says; every tensor above has the shape that is written there.
            unsafe { kernel.launch(device, shape, &[Arg::of(&args)]) }
        };
        if many { self.run_many(start, layout, &args) } else { self.run_few(start, layout, &args) }
    }

    fn run_few(
        &self,
        start: impl Fn(&'static str, [usize; 2], usize, [usize; 2]) -> Result<()>,
        layout: Layout,
        a: &Args,
    ) -> Result<()> {
        let [tokens, k, dim, hidden] = [a.tokens, a.k, a.dim, a.hidden].map(|n| n as usize);
        let (first, own) = match self.gate {
            Some(_) => (by_scales!(layout, "gated_few"), layout.shared_of_one(2, AHEAD[0])),
            None => (by_scales!(layout, "up_few"), layout.shared_of_one(1, AHEAD[1])),
        };
        start(first, [a.hidden_tiles as usize, tokens * k], 4, [staged(dim), own])?;
        // A warp a choice, or several where choices are few.
        let share = (8 / k).clamp(1, hidden.div_ceil(256));
        let warps = (k * share).min(16);
        start(
            by_scales!(layout, "down_few"),
            [a.dim_tiles as usize, tokens],
            warps,
            [k * staged(hidden), layout.shared_of_one(1, AHEAD[2])],
        )
    }

    fn run_many(
        &self,
        start: impl Fn(&'static str, [usize; 2], usize, [usize; 2]) -> Result<()>,
        layout: Layout,
        a: &Args,
    ) -> Result<()> {
        let (blocks, tiles) = (a.blocks as usize, a.hidden_tiles as usize);
        let (first, columns) = match self.gate {
            Some(_) => (by_layout!(layout, "gated_many"), tiles),
            None => (by_layout!(layout, "up_many"), tiles.div_ceil(2)),
        };
        let own = [0, layout.shared(2, TOGETHER / 8, AHEAD[3])];
        start("sort_choices", [1, 1], 32, [0, (self.experts * 4).div_ceil(32)])?;
        start(first, [columns, blocks], 1, own)?;
        start(by_layout!(layout, "down_many"), [(a.dim_tiles as usize).div_ceil(2), blocks], 1, own)?;
        start("sum_choices", [(a.dim as usize).div_ceil(512), a.tokens as usize], 8, [0, 0])
    }
}
