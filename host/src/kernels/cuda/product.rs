//! `one.cu` and `packed.cu` from Rust: products of few tokens with packed matrices, which may begin with a norm of the input, and end with a
//! residual, or with the gate between two of them. How rows are spread over blocks and warps is what an H200 liked best.

use super::{
    packed::{Layout, Packed, Packing, TILE, Tiles, aligned, by_layout, dims_with},
    program::{Arg, Shape, function},
    step::{address, device_of, unwritten},
};
use candle_core::{DType, Result, Tensor, bail};

/// Up to so many tokens a product can begin with a norm, or end with a gate.
pub const MOST_NORMED: usize = 8;
/// Steps of a warp that are on their way at once in the kernels for several tokens, as they are compiled.
const AHEAD: usize = 2;

/// The same of a family that is compiled for each type of scales.
macro_rules! by_scales {
    ($layout:expr, $family:literal) => {
        match ($layout.packing, $layout.half) {
            (Packing::Nibble | Packing::Byte, true) => by_layout!($layout, $family, "_half"),
            _ => by_layout!($layout, $family),
        }
    };
}
pub(super) use by_scales;

/// packed.cuh's `Joint`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Joint {
    /// Which.
    pub kind: u32,
    /// Its first number.
    pub alpha: f32,
    /// Its second.
    pub limit: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Mat {
    w: Packed,
    bias: u64,
    residual: u64,
    y: u64,
    rows: u32,
    tiles: u32,
    y_stride: u32,
    unused: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Matmul {
    mats: [Mat; 3],
    x: u64,
    tokens: u32,
    cols: u32,
    x_stride: u32,
    joint: Joint,
    normed: Normed,
    squares: u64,
}

/// packed.cuh's `Normed`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Normed {
    weight: u64,
    squares: u64,
    parts: u32,
    eps: f32,
}

/// An RMSNorm of activations that is computed with their product.
#[derive(Clone)]
pub struct Norming {
    /// `[cols]`, bf16
    pub weight: Tensor,
    /// `[tokens, parts]`, f32: sums of the activations' squares.
    pub squares: Tensor,
    /// Added under the root.
    pub eps: f32,
}

impl Norming {
    /// For a kernel's arguments.
    pub fn normed(&self) -> Result<Normed> {
        let [weight, squares] = [address(&self.weight)?, address(&self.squares)?];
        Ok(Normed { weight, squares, parts: self.squares.dim(1)? as u32, eps: self.eps })
    }

    /// Bytes of shared memory that a block needs for it.
    pub fn shared(&self) -> usize {
        4 * self.squares.elem_count()
    }
}

/// How many rows of tiles a block takes, and how many warps: few rows are spread over as many multiprocessors as there are.
fn spread(layout: Layout, tiles: usize, eights: usize) -> (usize, usize) {
    if layout.packing == Packing::Plain {
        return if tiles <= 132 { (1, 16) } else { (1, 8) };
    }
    match (tiles, eights) {
        (..=160, 1) => (1, 16),
        (..=300, 1) => (2, 16),
        (..=1000, 1) => (2, 8),
        (_, 1) => (2, 4),
        (..=600, _) => (2, 8),
        _ => (2, 4),
    }
}

/// Bytes of shared memory that a token's activations take in a block, with the sums of their groups.
pub fn staged(cols: usize) -> usize {
    let cols = cols.next_multiple_of(TILE[0]);
    cols * 2 + cols / TILE[0] * 16
}

/// A kernel for one token: its name, rows of tiles a block, and steps of a warp that are on their way at once, as one.cu compiles it.
type One = (&'static str, usize, usize);

/// Which one for so many tiles of so many columns, and how many warps, as an H200 likes it: many blocks of few warps for many rows, so that
/// a multiprocessor always has some that wait for memory and some that multiply.
fn one(layout: Layout, tiles: usize, cols: usize) -> (One, usize) {
    let single = (by_scales!(layout, "one_1"), 1, if layout.pieces() == 1 { 3 } else { 2 });
    let ahead = (by_scales!(layout, "one_1_ahead"), 1, 3);
    let double = (by_scales!(layout, "one_2"), 2, 2);
    match (layout.packing, tiles) {
        (Packing::Plain, _) if cols > 4096 => (ahead, 16),
        (Packing::Plain, ..=132) => (single, 12),
        (_, 133..=264) if cols <= 8192 => (double, (cols / 256).clamp(8, 12)),
        (Packing::Plain, ..=4000) => (ahead, 8),
        (Packing::Plain, _) if cols >= 4096 => (ahead, 16),
        (Packing::Plain, _) => (double, 8),
        (_, ..=300) if cols > 8192 => (single, 16),
        (_, ..=300) => (ahead, (cols / 256).clamp(8, 12)),
        (_, ..=1000) => (double, 8),
        _ => (double, 4),
    }
}

/// The same for a gate and what it lets through, rows of tiles of both.
fn one_gated(layout: Layout, tiles: usize, cols: usize) -> (One, usize) {
    let name = by_scales!(layout, "one_gated");
    match (layout.packing, tiles) {
        (Packing::Nibble, 1321..) => ((by_scales!(layout, "one_gated_many"), 2, 3), 4),
        (Packing::Plain, _) => ((name, 2, 3), if cols < 4096 { 2 } else { 8 }),
        (_, ..=300) => ((name, 2, 2), 16),
        (_, ..=1000) => ((name, 2, 2), 8),
        _ => ((name, 2, 2), 4),
    }
}

/// What a product of x with each of these writes, `[.., rows]`.
pub fn outputs(matrices: &[&Tiles], x: &Tensor) -> Result<Vec<Tensor>> {
    let device = device_of(x)?;
    matrices.iter().map(|tiles| unwritten(&dims_with(x, tiles.rows), DType::BF16, device)).collect()
}

/// Few tokens times up to three matrices of one layout and width, in one launch for each 32 tokens.
pub struct Product<'a> {
    /// With their biases.
    pub matrices: &'a [(&'a Tiles, Option<&'a Tensor>)],
    /// `[.., cols]`
    pub x: &'a Tensor,
    /// What is written, `[.., rows]` each.
    pub y: &'a [Tensor],
    /// Of x, for up to [`MOST_NORMED`] tokens.
    pub norm: Option<&'a Norming>,
    /// Joins what comes out.
    pub residual: Option<&'a Tensor>,
    /// `[tokens, rows / 16]` of a single matrix: sums of the squares of what comes out.
    pub squares: Option<&'a Tensor>,
}

impl Product<'_> {
    /// Starts it.
    pub fn run(&self) -> Result<()> {
        let mats = self.mats()?;
        let all: usize = mats.0.iter().map(|mat| mat.tiles as usize).sum();
        if self.tokens() == 1 {
            // Behind several matrices comes attention, whose clusters want room beside them.
            return self.start_one(&mats.0, None, self.matrices.len() == 1, |layout, cols| {
                let (one, warps) = one(layout, all, cols);
                (one, warps, mats.0.iter().map(|mat| mat.tiles.div_ceil(one.1 as u32)).sum())
            });
        }
        self.start(&mats.0, None, |layout, eights| {
            let (rows, warps) = spread(layout, all, eights);
            let name = match (rows, eights) {
                (1, _) => by_layout!(layout, "matmul_1x8"),
                (_, 1) => by_layout!(layout, "matmul_2x8"),
                (_, 2) => by_layout!(layout, "matmul_2x16"),
                _ => by_layout!(layout, "matmul_2x32"),
            };
            let blocks = mats.0.iter().map(|mat| mat.tiles.div_ceil(rows as u32)).sum();
            (name, rows, warps, blocks)
        })
    }

    /// The same with a gate and what it lets through, for up to [`MOST_NORMED`] tokens: `y` has one tensor alone.
    pub fn run_gated(&self, joint: Joint) -> Result<()> {
        let mats = self.mats()?;
        let tiles = mats.0[0].tiles;
        if self.tokens() == 1 {
            return self.start_one(&mats.0, Some(joint), true, |layout, cols| {
                let (one, warps) = one_gated(layout, 2 * tiles as usize, cols);
                (one, warps, tiles)
            });
        }
        self.start(&mats.0, Some(joint), |layout, _| {
            let (_, warps) = spread(layout, 2 * tiles as usize, 1);
            (by_layout!(layout, "gated_2x8"), 2, warps, tiles)
        })
    }

    fn mats(&self) -> Result<([Mat; 3], Vec<Option<Tensor>>)> {
        let (mut mats, mut held) = ([Mat::default(); 3], Vec::new());
        for (at, ((tiles, bias), mat)) in self.matrices.iter().zip(&mut mats).enumerate() {
            let bias = bias.map(|bias| aligned(&bias.to_dtype(DType::BF16)?)).transpose()?;
            let rows = tiles.rows as u32;
            *mat = Mat {
                w: tiles.packed()?,
                bias: bias.as_ref().map_or(Ok(0), address)?,
                residual: self.residual.map_or(Ok(0), address)?,
                y: self.y.get(at).map_or(Ok(0), address)?,
                rows,
                tiles: rows.div_ceil(TILE[1] as u32),
                y_stride: rows,
                ..Mat::default()
            };
            held.push(bias);
        }
        Ok((mats, held))
    }

    fn tokens(&self) -> usize {
        self.matrices.first().map_or(0, |(tiles, _)| self.x.elem_count() / tiles.cols.max(1))
    }

    /// For a single token, with blocks spread evenly or as they come.
    fn start_one(
        &self,
        mats: &[Mat; 3],
        joint: Option<Joint>,
        even: bool,
        kernel: impl Fn(Layout, usize) -> (One, usize, u32),
    ) -> Result<()> {
        let Some(&(Tiles { layout, cols, .. }, _)) = self.matrices.first() else { return Ok(()) };
        let device = device_of(self.x)?;
        let x = aligned(&self.x.to_dtype(DType::BF16)?)?;
        let ((name, rows, ahead), warps, blocks) = kernel(*layout, *cols);
        let kernel = function(device, "one", name)?;
        let (staged, own) = (staged(*cols), layout.shared_of_one(rows, ahead));
        let warps = warps.min(kernel.most_shared.saturating_sub(staged) / own).max(1);
        let work = Matmul {
            mats: *mats,
            x: address(&x)?,
            tokens: 1,
            cols: *cols as u32,
            x_stride: *cols as u32,
            joint: joint.unwrap_or_default(),
            normed: self.norm.map_or(Ok(Normed::default()), Norming::normed)?,
            squares: self.squares.map_or(Ok(0), address)?,
        };
        let least = staged + warps * own;
        // Rows that are not packed give every multiprocessor enough to do.
        let even = even && layout.packing != Packing::Plain;
        let shared = if even { kernel.evenly(blocks as usize, least) } else { least } as u32;
        let shape = Shape { grid: [blocks, 1, 1], block: 32 * warps as u32, shared, early: true };
        // SAFETY: as one.cuh says; x and y hold the token's rows, and start at multiples of 16 bytes.
        unsafe { kernel.launch(device, shape, &[Arg::of(&work)]) }
    }

    fn start(
        &self,
        mats: &[Mat; 3],
        joint: Option<Joint>,
        kernel: impl Fn(Layout, usize) -> (&'static str, usize, usize, u32),
    ) -> Result<()> {
        let Some(&(Tiles { layout, cols, .. }, _)) = self.matrices.first() else { return Ok(()) };
        let (tokens, device) = (self.x.elem_count() / (*cols).max(1), device_of(self.x)?);
        if tokens > MOST_NORMED && (self.norm.is_some() || joint.is_some() || self.squares.is_some()) {
            bail!("a product of {tokens} tokens with a norm or a gate")
        }
        let x = aligned(&self.x.to_dtype(DType::BF16)?)?;
        for first in (0..tokens).step_by(32) {
            let count = (tokens - first).min(32);
            let (name, rows, warps, blocks) = kernel(*layout, count.div_ceil(8).next_power_of_two());
            let kernel = function(device, "packed", name)?;
            let own = layout.shared(rows, count.div_ceil(8).next_power_of_two(), AHEAD);
            let behind = self.norm.map_or(0, Norming::shared);
            let warps = warps.min(kernel.most_shared.saturating_sub(behind) / own).max(1);
            let from = |start: u64, rows: u32| {
                if start == 0 { 0 } else { start + (first as u64) * u64::from(rows) * 2 }
            };
            let mats = mats.map(|m| Mat { y: from(m.y, m.rows), residual: from(m.residual, m.rows), ..m });
            let work = Matmul {
                mats,
                x: address(&x)? + (first * cols * 2) as u64,
                tokens: count as u32,
                cols: *cols as u32,
                x_stride: *cols as u32,
                joint: joint.unwrap_or_default(),
                normed: self.norm.map_or(Ok(Normed::default()), Norming::normed)?,
                squares: self.squares.map_or(Ok(0), address)?,
            };
            let shared = (warps * own + behind) as u32;
            let shape = Shape { grid: [blocks, 1, 1], block: 32 * warps as u32, shared, early: true };
            // SAFETY: as packed.cu says; x and y hold the tokens' rows, and start at multiples of 16 bytes.
            unsafe { kernel.launch(device, shape, &[Arg::of(&work)])? };
        }
        Ok(())
    }
}
