//! `pack.cu` from Rust: rows of keys and values in groups of a few bits, as `--kv-bits` wants them, and back. A row of one head is a row of
//! words, numbers first and then scale and bias of each group, so that a cache grows and shrinks by rows whatever is in them.

use super::{
    packed::aligned,
    program::{Arg, Shape, function},
    step::{address, allocated, device_of},
};
use candle_core::{DType, Result, Tensor, bail};

/// What is in a row of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Numbers of one head, a multiple of `group`.
    pub dim: usize,
    /// Of a number: 2, 3, 4, 5, 6 or 8.
    pub bits: usize,
    /// Numbers that share scale and bias: 32, 64 or 128.
    pub group: usize,
    /// What the numbers were, and come back as.
    pub dtype: DType,
}

/// Which rows of a table.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// From this one on.
    From(usize),
    /// By the positions `[rows]` of the tokens, on the device, where the first row's is this.
    At(&'a Tensor, u32),
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Packing {
    from: [u64; 2],
    to: [u64; 2],
    positions: u64,
    rows: u32,
    heads: u32,
    dim: u32,
    bits: u32,
    group: u32,
    words: u32,
    first: u32,
    origin: u32,
    capacity: u32,
    last: u32,
}

impl Form {
    /// Words of a row of one head.
    pub fn words(&self) -> usize {
        self.dim * self.bits / 32 + 2 * self.dim / self.group
    }

    fn known(&self) -> Result<()> {
        let is = matches!(self.bits, 2 | 3 | 4 | 5 | 6 | 8) && matches!(self.group, 32 | 64 | 128);
        if !is || self.dim == 0 || !self.dim.is_multiple_of(self.group) {
            bail!("no packed rows of {} numbers, {} bits in groups of {}", self.dim, self.bits, self.group)
        }
        Ok(())
    }

    fn name(&self, names: [&'static str; 3]) -> Result<&'static str> {
        Ok(match self.dtype {
            DType::F32 => names[0],
            DType::F16 => names[1],
            DType::BF16 => names[2],
            other => bail!("no packed rows of {other:?}"),
        })
    }

    fn packing(&self, of: &[[&Tensor; 2]], at: Rows<'_>, [rows, heads, capacity]: [usize; 3]) -> Result<Packing> {
        let (first, positions, origin) = match at {
            Rows::From(first) => (first, None, 0),
            Rows::At(positions, origin) => (0, Some(positions), origin),
        };
        let (mut from, mut to) = ([0; 2], [0; 2]);
        for (of, (from, to)) in of.iter().zip(from.iter_mut().zip(&mut to)) {
            (*from, *to) = (address(of[0])?, address(of[1])?);
        }
        Ok(Packing {
            from,
            to,
            positions: positions.map_or(Ok(0), address)?,
            rows: rows as u32,
            heads: heads as u32,
            dim: self.dim as u32,
            bits: self.bits as u32,
            group: self.group as u32,
            words: self.words() as u32,
            first: first as u32,
            origin,
            capacity: capacity as u32,
            last: positions.map_or(0, |positions| positions.elem_count().saturating_sub(1)) as u32,
        })
    }

    fn shape(&self, rows: usize, heads: usize, tables: usize) -> Shape {
        let blocks = (rows * heads * self.dim / 8).div_ceil(256);
        Shape { grid: [blocks as u32, tables as u32, 1], block: 256, shared: 0, early: false }
    }

    /// Writes rows `[rows, heads, dim]` into tables `[capacity, heads, words]`, u32: those of keys, and those of values if they are alike.
    pub fn pack(&self, of: &[[&Tensor; 2]], at: Rows<'_>) -> Result<()> {
        self.known()?;
        let rows = of.iter().map(|[rows, _]| aligned(&rows.to_dtype(self.dtype)?)).collect::<Result<Vec<_>>>()?;
        let pairs: Vec<_> = rows.iter().zip(of).map(|(rows, [_, table])| [rows, *table]).collect();
        let (Some([rows, table]), 1..=2) = (pairs.first(), pairs.len()) else {
            bail!("{} tables to be packed at once", pairs.len())
        };
        let (capacity, heads, _) = table.dims3()?;
        let count = rows.dim(0)?;
        let alike = |[rows, table]: &[&Tensor; 2]| {
            let whole = rows.dims() == [count, heads, self.dim] && table.dims() == [capacity, heads, self.words()];
            whole && table.dtype() == DType::U32
        };
        if !pairs.iter().all(alike) {
            bail!("rows {:?} for a packed cache {:?}", rows.dims(), table.dims())
        }
        if let Rows::At(positions, _) = at
            && positions.elem_count() != count
        {
            bail!("{} positions for {count} rows", positions.elem_count())
        }
        let device = device_of(table)?;
        let args = self.packing(&pairs, at, [count, heads, capacity])?;
        let kernel = function(device, "pack", self.name(["pack_f32", "pack_f16", "pack_bf16"])?)?;
        // SAFETY: as pack.cu says; all have as many rows and heads as the arguments say, and no row beyond a table's is written.
        unsafe { kernel.launch(device, self.shape(count, heads, pairs.len()), &[Arg::of(&args)]) }
    }

    /// The rows of `table` `[capacity, heads, words]` as numbers `[capacity, heads, dim]`: so many of them, or those up to the last position.
    /// What comes behind them is not to be read.
    pub fn unpack(&self, table: &Tensor, rows: Rows<'_>) -> Result<Tensor> {
        self.known()?;
        let (capacity, heads, words) = table.dims3()?;
        let count = match rows {
            Rows::From(count) => count.min(capacity),
            Rows::At(..) => capacity,
        };
        if words != self.words() || table.dtype() != DType::U32 {
            bail!("a packed cache {:?} of {:?}", table.dims(), table.dtype())
        }
        // Not one of what a recorded step keeps between its runs: there would be one for each layer, and all would be there at once.
        let (device, dims) = (device_of(table)?, [count, heads, self.dim]);
        let y = allocated(&dims, self.dtype, device)?;
        let args = self.packing(&[[table, &y]], rows, [count, heads, capacity])?;
        let kernel = function(device, "pack", self.name(["unpack_f32", "unpack_f16", "unpack_bf16"])?)?;
        // SAFETY: as above.
        unsafe { kernel.launch(device, self.shape(count, heads, 1), &[Arg::of(&args)])? };
        Ok(y)
    }
}
