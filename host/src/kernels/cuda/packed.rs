//! A packed weight matrix on the GPU, in tiles (tiles.cuh): decoding multiplies with it as it is; prefill unpacks it to bf16 for cuBLAS,
//! and lookups unpack rows. All of it takes and gives bf16.

use super::{
    program::{Arg, Shape, function},
    regroup::{Regrouped, regrouped},
    step::{address, device_of, unwritten},
    together::Together,
};
use crate::kernels::cpu::Matrix;
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use std::sync::Arc;

/// Columns and rows of a tile.
const TILE: [usize; 2] = [128, 16];
/// Up to so many tokens the packed weights are read once more for each 32 tokens, beyond they are unpacked.
pub(super) const FEW: usize = 96;
/// Steps of a warp that are on their way at once, as packed.cu compiles them.
pub const AHEAD: usize = 2;

/// How weights are packed in tiles, as tiles.cuh numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Up to four bits, scale and bias a group.
    Nibble = 0,
    /// Up to eight bits, scale and bias a group.
    Byte = 1,
    /// E2M1, an E8M0 scale for 32.
    Mx4 = 2,
}

/// What kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// How weights are packed.
    pub packing: Packing,
    /// Weights that share a scale: 32, 64 or 128.
    pub group: usize,
    /// Whether scales are f16; bf16 otherwise.
    pub half: bool,
}

/// Names of kernels of a family, by layout.
macro_rules! by_layout {
    ($layout:expr, $family:literal) => {
        match ($layout.packing, $layout.group) {
            (Packing::Nibble, 32) => concat!($family, "_nibble_32"),
            (Packing::Nibble, 64) => concat!($family, "_nibble_64"),
            (Packing::Nibble, _) => concat!($family, "_nibble_128"),
            (Packing::Byte, 32) => concat!($family, "_byte_32"),
            (Packing::Byte, 64) => concat!($family, "_byte_64"),
            (Packing::Byte, _) => concat!($family, "_byte_128"),
            (Packing::Mx4, _) => concat!($family, "_mx4_32"),
        }
    };
}
pub(super) use by_layout;

impl Layout {
    fn pieces(self) -> usize {
        if self.packing == Packing::Byte { 2 } else { 1 }
    }

    fn scale_words(self) -> usize {
        if self.packing == Packing::Mx4 { 2 } else { 2 * (TILE[0] / self.group) }
    }

    /// Bytes of shared memory that a warp takes for `rows` of tiles and `eights` of tokens, as packed.cuh counts them.
    pub fn shared(self, rows: usize, eights: usize, ahead: usize) -> usize {
        let activations = if eights > 1 { 4 * eights } else { 0 };
        let step = rows * (2 * self.pieces() + self.scale_words().div_ceil(4)) + activations;
        (ahead * step).max(rows * eights) * 512
    }
}

/// `[rows, cols]` on the GPU.
#[derive(Clone)]
pub struct Tiles {
    /// How it is packed.
    pub layout: Layout,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    data: Tensor,
    scales: Tensor,
    /// The matrices of the same input that it is multiplied with, and its place among them.
    pub(super) together: Option<(Arc<Together>, usize)>,
}

/// packed.cuh's `Packed`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Packed {
    data: u64,
    scales: u64,
    half: u64,
}

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
}

/// How many rows of tiles a block takes, and how many warps: few rows are spread over as many multiprocessors as there are.
fn spread(tiles: usize, eights: usize) -> (usize, usize) {
    match (tiles, eights) {
        (..=160, 1) => (1, 16),
        (..=300, 1) => (2, 16),
        (..=1000, 1) => (2, 8),
        (_, 1) => (2, 4),
        (..=600, _) => (2, 8),
        _ => (2, 4),
    }
}

impl Tiles {
    /// Brings matrices to the GPU as one, one below the other, if there are kernels for their format: an upload for each, and kernels that
    /// rearrange it there.
    pub fn place(matrices: &[Matrix], device: &Device) -> Result<Option<Self>> {
        let (Device::Cuda(cuda), Some(matrix)) = (device, matrices.first()) else { return Ok(None) };
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let alike = |m: &Matrix| m.rows() == rows && m.stacks_on(matrix);
        let Some(layout) = regrouped(matrix).map(|source| source.layout) else { return Ok(None) };
        if !(matrices.len() == 1 || rows.is_multiple_of(TILE[1]) && matrices.iter().all(alike)) {
            return Ok(None);
        }
        let tiles = cols.div_ceil(TILE[0]) * rows.div_ceil(TILE[1]);
        let (words, scale_words) = (256 * layout.pieces(), 8 * layout.scale_words());
        let data = unwritten(&[matrices.len() * tiles * words], DType::U32, cuda)?;
        let scales = unwritten(&[matrices.len() * tiles * scale_words], DType::U32, cuda)?;
        for (i, source) in matrices.iter().filter_map(regrouped).enumerate() {
            let data = address(&data)? + (i * tiles * words * 4) as u64;
            let scales = address(&scales)? + (i * tiles * scale_words * 4) as u64;
            rearrange(&source, [rows, cols], [data, scales], device, cuda)?;
        }
        Ok(Some(Tiles { layout, rows: rows * matrices.len(), cols, data, scales, together: None }))
    }

    /// For a kernel's arguments.
    pub fn packed(&self) -> Result<Packed> {
        Ok(Packed { data: address(&self.data)?, scales: address(&self.scales)?, half: self.layout.half.into() })
    }

    /// x `[.., cols]` -> `x · Wᵀ (+ bias [rows])` `[.., rows]`, in bf16 whatever x is.
    pub fn matmul(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let tokens = x.elem_count() / self.cols.max(1);
        if tokens > FEW {
            let flat = x.to_dtype(DType::BF16)?.reshape((tokens, self.cols))?;
            let y = flat.matmul(&self.dense()?.t()?)?.reshape(dims_with(x, self.rows))?;
            return bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(&bias.to_dtype(DType::BF16)?));
        }
        match &self.together {
            Some((together, place)) => together.output(x, *place),
            None => multiply(&[(self, bias)], x)?.pop().ok_or_else(|| candle_core::Error::msg("no product")),
        }
    }

    /// `[rows, cols]` in bf16.
    pub fn dense(&self) -> Result<Tensor> {
        let device = device_of(&self.data)?;
        let y = unwritten(&[self.rows, self.cols], DType::BF16, device)?;
        let grid = [self.cols.div_ceil(TILE[0]) as u32, self.rows.div_ceil(TILE[1]) as u32, 1];
        let name = match self.layout.packing {
            Packing::Nibble => "unpack_nibble",
            Packing::Byte => "unpack_byte",
            Packing::Mx4 => "unpack_mx4",
        };
        self.unpack(device, name, None, &y, Shape { grid, block: 256, shared: 0, early: false })?;
        Ok(y)
    }

    /// Rows by id: `[ids]`, u32 -> `[ids, cols]` in bf16. An id that is no row gives zeros.
    pub fn gather(&self, ids: &Tensor) -> Result<Tensor> {
        let (ids, device) = (ids.to_dtype(DType::U32)?.contiguous()?, device_of(&self.data)?);
        let count = ids.elem_count();
        if count > 65535 {
            bail!("{count} rows of a packed matrix at once: at most 65535")
        }
        let y = unwritten(&[count, self.cols], DType::BF16, device)?;
        let name = match self.layout.packing {
            Packing::Nibble => "gather_nibble",
            Packing::Byte => "gather_byte",
            Packing::Mx4 => "gather_mx4",
        };
        let grid = [self.cols.div_ceil(TILE[0]) as u32, count as u32, 1];
        self.unpack(device, name, Some(address(&ids)?), &y, Shape { grid, block: 16, shared: 0, early: true })?;
        Ok(y)
    }

    fn unpack(
        &self,
        device: &CudaDevice,
        name: &'static str,
        ids: Option<u64>,
        y: &Tensor,
        shape: Shape,
    ) -> Result<()> {
        let mut args = vec![Arg::Ptr(address(&self.data)?), Arg::Ptr(address(&self.scales)?)];
        args.extend(ids.map(Arg::Ptr));
        args.push(Arg::Ptr(address(y)?));
        args.extend([self.rows, self.cols, self.layout.group, self.layout.half.into()].map(|n| Arg::U32(n as u32)));
        // SAFETY: as repack.cu says; y has a row for each of the matrix's, or for each id.
        unsafe { function(device, "repack", name)?.launch(device, shape, &args) }
    }
}

fn dims_with(x: &Tensor, last: usize) -> Vec<usize> {
    let mut dims = x.dims().to_vec();
    if let Some(width) = dims.last_mut() {
        *width = last;
    }
    dims
}

/// x, few tokens, times up to three matrices in one launch for each 32 tokens; they are of one layout and width.
pub(super) fn multiply(matrices: &[(&Tiles, Option<&Tensor>)], x: &Tensor) -> Result<Vec<Tensor>> {
    let Some(&(Tiles { layout, cols, .. }, _)) = matrices.first() else { return Ok(Vec::new()) };
    let (tokens, device) = (x.elem_count() / (*cols).max(1), device_of(x)?);
    let x = aligned(&x.to_dtype(DType::BF16)?)?;
    let (mut mats, mut outputs, mut held) = ([Mat::default(); 3], Vec::new(), Vec::new());
    for ((tiles, bias), mat) in matrices.iter().zip(&mut mats) {
        let bias = bias.map(|bias| aligned(&bias.to_dtype(DType::BF16)?)).transpose()?;
        let y = unwritten(&dims_with(&x, tiles.rows), DType::BF16, device)?;
        let rows = tiles.rows as u32;
        *mat = Mat {
            w: tiles.packed()?,
            bias: bias.as_ref().map_or(Ok(0), address)?,
            y: address(&y)?,
            rows,
            tiles: rows.div_ceil(TILE[1] as u32),
            y_stride: rows,
            ..Mat::default()
        };
        outputs.push(y);
        held.push(bias);
    }
    let all: usize = mats.iter().map(|mat| mat.tiles as usize).sum();
    for first in (0..tokens).step_by(32) {
        let count = (tokens - first).min(32);
        let eights = count.div_ceil(8).next_power_of_two();
        let (rows, warps) = spread(all, eights);
        let name = match (rows, eights) {
            (1, _) => by_layout!(layout, "matmul_1x8"),
            (_, 1) => by_layout!(layout, "matmul_2x8"),
            (_, 2) => by_layout!(layout, "matmul_2x16"),
            _ => by_layout!(layout, "matmul_2x32"),
        };
        let kernel = function(device, "packed", name)?;
        let own = layout.shared(rows, eights, AHEAD);
        let warps = warps.min(kernel.most_shared / own).max(1);
        let work = Matmul {
            mats: mats.map(|mat| Mat { y: mat.y + (first as u64) * u64::from(mat.rows) * 2, ..mat }),
            x: address(&x)? + (first * cols * 2) as u64,
            tokens: count as u32,
            cols: *cols as u32,
            x_stride: *cols as u32,
            joint: Joint::default(),
        };
        let grid = [mats.iter().map(|mat| mat.tiles.div_ceil(rows as u32)).sum(), 1, 1];
        let shape = Shape { grid, block: 32 * warps as u32, shared: (warps * own) as u32, early: true };
        // SAFETY: as packed.cu says; x and y hold the tokens' rows, and start at multiples of 16 bytes.
        unsafe { kernel.launch(device, shape, &[Arg::of(&work)])? };
    }
    Ok(outputs)
}

/// Writes a matrix's tiles and their scales to where `to` says.
fn rearrange(
    source: &Regrouped<'_>,
    [rows, cols]: [usize; 2],
    to: [u64; 2],
    device: &Device,
    cuda: &CudaDevice,
) -> Result<()> {
    let upload = |bytes: &[u8]| Tensor::from_slice(bytes, bytes.len(), device);
    let [to, scales_to] = to.map(Arg::Ptr);
    let [rows32, cols32] = [rows, cols].map(|n| Arg::U32(n as u32));
    let grid = [cols.div_ceil(TILE[0]) as u32, rows.div_ceil(TILE[1]) as u32, 1];
    let shape = |block: usize| Shape { grid, block: block as u32, shared: 0, early: false };
    let (layout, bits) = (source.layout, source.bits);
    let numbers = [bits, cols * bits / 8, layout.packing as usize].map(|n| Arg::U32(n as u32));
    let from = upload(&source.data)?;
    let args = [Arg::Ptr(address(&from)?), to, rows32, cols32, numbers[0], numbers[1], numbers[2]];
    // SAFETY: as repack.cu says; `regrouped` gives rows of so many bytes, and there is room for all tiles.
    unsafe { function(cuda, "repack", "tile_words")?.launch(cuda, shape(256), &args)? };
    let from = upload(&source.scales)?;
    if layout.packing == Packing::Mx4 {
        let args = [Arg::Ptr(address(&from)?), scales_to, rows32, cols32];
        // SAFETY: as above.
        return unsafe { function(cuda, "repack", "tile_exponents")?.launch(cuda, shape(64), &args) };
    }
    let biases = upload(&source.biases)?;
    let (from, biases, group) = (Arg::Ptr(address(&from)?), Arg::Ptr(address(&biases)?), layout.group);
    let args = [from, biases, scales_to, rows32, cols32, Arg::U32(group as u32)];
    // SAFETY: as above.
    unsafe { function(cuda, "repack", "tile_scales")?.launch(cuda, shape(16 * TILE[0] / group), &args) }
}

/// In one piece that starts at a multiple of 16 bytes, as kernels read it.
pub fn aligned(t: &Tensor) -> Result<Tensor> {
    let t = t.contiguous()?;
    // `copy` would keep the offset.
    if address(&t)?.is_multiple_of(16) { Ok(t) } else { t.force_contiguous() }
}
