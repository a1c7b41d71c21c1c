//! A packed weight matrix on the GPU, in tiles (tiles.cuh): decoding multiplies with it as it is; prefill unpacks it to bf16 for cuBLAS,
//! and lookups unpack rows. All of it takes and gives bf16.

use super::{
    product::{MOST_NORMED, Product, outputs},
    program::{Arg, Shape, function},
    regroup::{Regrouped, regrouped},
    step::{address, device_of, unwritten},
    together::Together,
};
use crate::kernels::cpu::{Float, Format, Matrix};
use candle_core::{CudaDevice, DType, Device, Result, Tensor, bail};
use std::sync::Arc;

/// Columns and rows of a tile.
pub(super) const TILE: [usize; 2] = [128, 16];
/// Up to so many tokens the packed weights are read once more for each 32 tokens, beyond they are unpacked.
const FEW: usize = 96;

/// How weights are packed in tiles, as tiles.cuh numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Up to four bits, scale and bias a group.
    Nibble = 0,
    /// Up to eight bits, scale and bias a group.
    Byte = 1,
    /// E2M1, an E8M0 scale for 32.
    Mx4 = 2,
    /// Not at all: bf16, row by row.
    Plain = 3,
    /// E4M3, a scale a group.
    Fp8 = 4,
    /// Six bits, a scale for 16.
    Six = 5,
    /// E2M1, a scale for 16.
    Nv4 = 6,
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
    ($layout:expr, $($family:literal),+) => {
        match ($layout.packing, $layout.group) {
            (Packing::Nibble, 32) => concat!($($family),+, "_nibble_32"),
            (Packing::Nibble, 64) => concat!($($family),+, "_nibble_64"),
            (Packing::Nibble, _) => concat!($($family),+, "_nibble_128"),
            (Packing::Byte, 32) => concat!($($family),+, "_byte_32"),
            (Packing::Byte, 64) => concat!($($family),+, "_byte_64"),
            (Packing::Byte, _) => concat!($($family),+, "_byte_128"),
            (Packing::Mx4, _) => concat!($($family),+, "_mx4_32"),
            (Packing::Plain, _) => concat!($($family),+, "_plain_128"),
            (Packing::Fp8, 32) => concat!($($family),+, "_fp8_32"),
            (Packing::Fp8, _) => concat!($($family),+, "_fp8_128"),
            (Packing::Six, _) => concat!($($family),+, "_six_128"),
            (Packing::Nv4, _) => concat!($($family),+, "_nv4_128"),
        }
    };
}
pub(super) use by_layout;

impl Layout {
    /// 16-byte pieces of a row that a lane holds of a tile.
    pub fn pieces(self) -> usize {
        match self.packing {
            Packing::Plain => 4,
            Packing::Byte | Packing::Fp8 | Packing::Six => 2,
            Packing::Nibble | Packing::Mx4 | Packing::Nv4 => 1,
        }
    }

    /// Words of scales of two rows of a tile.
    fn scale_words(self) -> usize {
        match self.packing {
            Packing::Plain => 0,
            Packing::Mx4 => 2,
            Packing::Six | Packing::Nv4 => 8,
            Packing::Nibble | Packing::Byte | Packing::Fp8 => 2 * (TILE[0] / self.group),
        }
    }

    /// Up to so many tokens the weights are multiplied as they lie here.
    pub fn few(self) -> usize {
        if self.packing == Packing::Plain { MOST_NORMED } else { FEW }
    }

    /// Bytes of shared memory that a warp takes for `rows` of tiles and `eights` of tokens, as packed.cuh counts them.
    pub fn shared(self, rows: usize, eights: usize, ahead: usize) -> usize {
        let activations = if eights > 1 { 4 * eights } else { 0 };
        // Of those for 16 columns each, a lane takes every other.
        let lanes = if matches!(self.packing, Packing::Six | Packing::Nv4) { 2 } else { 1 };
        let step = rows * (2 * self.pieces() + (self.scale_words() / lanes).div_ceil(4)) + activations;
        (ahead * step).max(rows * eights) * 512
    }

    /// The same for one token, as one.cuh counts them: tiles as they lie in memory.
    pub fn shared_of_one(self, rows: usize, ahead: usize) -> usize {
        ahead * rows * (1024 * self.pieces() + 32 * self.scale_words())
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
    pub together: Option<(Arc<Together>, usize)>,
}

/// packed.cuh's `Packed`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Packed {
    data: u64,
    scales: u64,
    half: u64,
}

impl Tiles {
    /// Brings matrices to the GPU as one, one below the other, if there are kernels for their format: an upload for each, and kernels that
    /// rearrange it there.
    pub fn place(matrices: &[Matrix], device: &Device) -> Result<Option<Self>> {
        let (Device::Cuda(cuda), Some(matrix)) = (device, matrices.first()) else { return Ok(None) };
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let alike = |m: &Matrix| m.rows() == rows && m.stacks_on(matrix);
        if let Format::Dense(_) = matrix.format() {
            return plain(matrices, device);
        }
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
        let half = if self.layout.packing == Packing::Plain { self.rows as u64 } else { self.layout.half.into() };
        Ok(Packed { data: address(&self.data)?, scales: address(&self.scales)?, half })
    }

    /// x `[.., cols]` -> `x · Wᵀ (+ bias [rows])` `[.., rows]`, in bf16 whatever x is.
    pub fn matmul(&self, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let tokens = x.elem_count() / self.cols.max(1);
        if tokens > self.layout.few() {
            let flat = x.to_dtype(DType::BF16)?.reshape((tokens, self.cols))?;
            let y = flat.matmul(&self.dense()?.t()?)?.reshape(dims_with(x, self.rows))?;
            return bias.map_or(Ok(y.clone()), |bias| y.broadcast_add(&bias.to_dtype(DType::BF16)?));
        }
        match &self.together {
            Some((together, place)) => together.output(x, *place),
            None => {
                let y = outputs(&[self], x)?;
                Product { matrices: &[(self, bias)], x, y: &y, norm: None, residual: None, squares: None }.run()?;
                y.into_iter().next().ok_or_else(|| candle_core::Error::msg("no product"))
            }
        }
    }

    /// `[rows, cols]` in bf16.
    pub fn dense(&self) -> Result<Tensor> {
        if self.layout.packing == Packing::Plain {
            return Ok(self.data.clone());
        }
        let device = device_of(&self.data)?;
        let y = unwritten(&[self.rows, self.cols], DType::BF16, device)?;
        let grid = [self.cols.div_ceil(TILE[0]) as u32, self.rows.div_ceil(TILE[1]) as u32, 1];
        let name = match self.layout.packing {
            Packing::Nibble => "unpack_nibble",
            Packing::Byte => "unpack_byte",
            Packing::Fp8 => "unpack_fp8",
            Packing::Six => "unpack_six",
            Packing::Nv4 => "unpack_nv4",
            Packing::Mx4 | Packing::Plain => "unpack_mx4",
        };
        self.unpack(device, name, None, &y, Shape { grid, block: 256, shared: 0, early: false })?;
        Ok(y)
    }

    /// Rows by id: `[ids]`, u32 -> `[ids, cols]` in bf16. An id that is no row gives zeros.
    pub fn gather(&self, ids: &Tensor) -> Result<Tensor> {
        if self.layout.packing == Packing::Plain {
            return self.data.index_select(ids, 0);
        }
        let (ids, device) = (ids.to_dtype(DType::U32)?.contiguous()?, device_of(&self.data)?);
        let count = ids.elem_count();
        if count > 65535 {
            bail!("{count} rows of a packed matrix at once: at most 65535")
        }
        let y = unwritten(&[count, self.cols], DType::BF16, device)?;
        let name = match self.layout.packing {
            Packing::Nibble => "gather_nibble",
            Packing::Byte => "gather_byte",
            Packing::Fp8 => "gather_fp8",
            Packing::Six => "gather_six",
            Packing::Nv4 => "gather_nv4",
            Packing::Mx4 | Packing::Plain => "gather_mx4",
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

pub(super) fn dims_with(x: &Tensor, last: usize) -> Vec<usize> {
    let mut dims = x.dims().to_vec();
    if let Some(width) = dims.last_mut() {
        *width = last;
    }
    dims
}

/// bf16 matrices as one; rows are read 16 bytes at a time.
fn plain(matrices: &[Matrix], device: &Device) -> Result<Option<Tiles>> {
    let Some(first) = matrices.first() else { return Ok(None) };
    let (rows, cols) = (first.rows(), first.cols());
    let alike = |m: &Matrix| m.rows() == rows && m.cols() == cols && matches!(m.format(), Format::Dense(_));
    let whole = matrices.len() == 1 || rows.is_multiple_of(TILE[1]);
    if rows == 0 || !cols.is_multiple_of(8) || !whole || !matrices.iter().all(alike) {
        return Ok(None);
    }
    let mut parts = Vec::with_capacity(matrices.len());
    for matrix in matrices {
        let bytes = &*matrix.parts()[0];
        parts.push(match matrix.format() {
            Format::Dense(Float::BF16) if !matrix.has_column_order() && bytes.len() == 2 * rows * cols => {
                Tensor::from_raw_buffer(bytes, DType::BF16, &[rows, cols], device)?
            }
            _ => {
                let mut numbers = vec![0.0; rows * cols];
                matrix.dequantize_rows(0..rows, &mut numbers);
                Tensor::from_vec(numbers, (rows, cols), &Device::Cpu)?.to_dtype(DType::BF16)?.to_device(device)?
            }
        });
    }
    let data = if parts.len() == 1 { parts.remove(0) } else { Tensor::cat(&parts, 0)? };
    let layout = Layout { packing: Packing::Plain, group: TILE[0], half: false };
    Ok(Some(Tiles { layout, rows: rows * matrices.len(), cols, scales: data.clone(), data, together: None }))
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
    if matches!(layout.packing, Packing::Six | Packing::Nv4) {
        let args = [Arg::Ptr(address(&from)?), scales_to, rows32, cols32];
        // SAFETY: as above.
        return unsafe { function(cuda, "repack", "tile_sixteenths")?.launch(cuda, shape(128), &args) };
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
