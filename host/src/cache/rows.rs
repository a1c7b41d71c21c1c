//! A growing table of keys or values: one row of `[heads, dim]` for each remembered token, in the cache's own type.

#[cfg(feature = "cuda")]
use super::packed::PackedRoom;
use super::room::Room;
#[cfg(feature = "cuda")]
use crate::kernels::cuda::pack::{Form, Rows as PackedRows};
use crate::{
    device::Placement,
    kernels::cpu::{attention::Rows, quantize_rows},
};
use candle_core::{DType, Result, Tensor};
use half::{bf16, f16};

/// The table.
#[derive(Clone)]
pub enum Table {
    /// On the CPU, exactly.
    F32(Vec<f32>),
    /// On the CPU, halved.
    F16(Vec<f16>),
    /// On the CPU, halved.
    BF16(Vec<bf16>),
    /// On the CPU, packed in groups along `dim`.
    Packed {
        /// Packed values.
        data: Vec<u8>,
        /// One a group.
        scales: Vec<f32>,
        /// One a group.
        biases: Vec<f32>,
        /// Bits a value.
        bits: u32,
        /// Values a group.
        group: usize,
    },
    /// For GPUs, and for candle: `[entries, heads, dim]`, with room for more.
    Tensor(Room),
    /// On an NVIDIA GPU, packed in groups along `dim`.
    #[cfg(feature = "cuda")]
    PackedThere(PackedRoom),
}

impl Table {
    /// An empty table for the placement.
    pub fn new(place: &Placement) -> Self {
        match (place.native, place.dtype) {
            (false, _) => Table::Tensor(Room::default()),
            (true, DType::BF16) => Table::BF16(Vec::new()),
            (true, DType::F16) => Table::F16(Vec::new()),
            (true, _) => Table::F32(Vec::new()),
        }
    }

    /// Appends rows given as f32.
    pub fn extend(&mut self, rows: &[f32]) {
        match self {
            Table::F32(table) => table.extend_from_slice(rows),
            Table::F16(table) => table.extend(rows.iter().map(|&x| f16::from_f32(x))),
            Table::BF16(table) => table.extend(rows.iter().map(|&x| bf16::from_f32(x))),
            Table::Packed { data, scales, biases, bits, group } => {
                quantize_rows(rows, *bits, *group, data, scales, biases)
            }
            Table::Tensor(_) => {}
            #[cfg(feature = "cuda")]
            Table::PackedThere(_) => {}
        }
    }

    /// Appends `[tokens, heads, dim]`.
    pub fn extend_tensor(&mut self, rows: &Tensor) -> Result<()> {
        match self {
            Table::Tensor(room) => room.extend(rows),
            #[cfg(feature = "cuda")]
            Table::PackedThere(packed) => packed.extend(rows),
            _ => Ok(()),
        }
    }

    /// The rows `[entries, heads, dim]` of a tensor's table, if there are any.
    pub fn tensor(&self) -> Result<Option<Tensor>> {
        match self {
            Table::Tensor(room) => room.rows(),
            #[cfg(feature = "cuda")]
            Table::PackedThere(packed) => packed.rows(),
            _ => Ok(None),
        }
    }

    /// All that a tensor's table has room for, if it has any; rows of words where it is packed.
    pub fn whole(&self) -> Option<&Tensor> {
        self.room().and_then(Room::whole)
    }

    fn room(&self) -> Option<&Room> {
        match self {
            Table::Tensor(room) => Some(room),
            #[cfg(feature = "cuda")]
            Table::PackedThere(packed) => Some(&packed.room),
            _ => None,
        }
    }

    /// Whether its numbers are in groups of a few bits.
    pub fn is_packed(&self) -> bool {
        match self {
            Table::Packed { .. } => true,
            #[cfg(feature = "cuda")]
            Table::PackedThere(_) => true,
            _ => false,
        }
    }

    /// Makes room on a GPU for `more` rows shaped like those of `like`.
    #[cfg(feature = "cuda")]
    pub fn reserve(&mut self, like: &Tensor, more: usize) -> Result<()> {
        match self {
            Table::Tensor(room) => room.reserve(like, more),
            Table::PackedThere(packed) => packed.reserve(like, more),
            _ => Ok(()),
        }
    }

    /// Counts rows that a kernel has written behind the others.
    #[cfg(feature = "cuda")]
    pub fn grown(&mut self, more: usize) {
        match self {
            Table::Tensor(room) => room.grown(more),
            Table::PackedThere(packed) => packed.room.grown(more),
            _ => {}
        }
    }

    /// What is in a row, where it is packed on a GPU.
    #[cfg(feature = "cuda")]
    pub fn form(&self) -> Option<Form> {
        if let Table::PackedThere(packed) = self { Some(packed.form) } else { None }
    }

    /// All that there is room for as numbers `[capacity, heads, dim]`, of which those behind the last of these positions, which lie on the
    /// device, are not to be read.
    #[cfg(feature = "cuda")]
    pub fn whole_at(&self, positions: &Tensor, origin: u32) -> Result<Option<Tensor>> {
        match (self.whole(), self.form()) {
            (Some(whole), Some(form)) => form.unpack(whole, PackedRows::At(positions, origin)).map(Some),
            (whole, _) => Ok(whole.cloned()),
        }
    }

    /// Drops entries `from..to`; a row has `width` values.
    pub fn remove(&mut self, from: usize, to: usize, width: usize) -> Result<()> {
        let range = from * width..to * width;
        match self {
            Table::F32(table) => drop(table.drain(range)),
            Table::F16(table) => drop(table.drain(range)),
            Table::BF16(table) => drop(table.drain(range)),
            Table::Packed { data, scales, biases, bits, group } => {
                data.drain(range.start * *bits as usize / 8..range.end * *bits as usize / 8);
                scales.drain(range.start / *group..range.end / *group);
                biases.drain(range.start / *group..range.end / *group);
            }
            Table::Tensor(room) => room.remove(from, to)?,
            #[cfg(feature = "cuda")]
            Table::PackedThere(packed) => packed.room.remove(from, to)?,
        }
        Ok(())
    }

    /// The rows for the CPU's attention kernel; none for a candle tensor.
    pub fn rows(&self) -> Option<Rows<'_>> {
        Some(match self {
            Table::F32(table) => Rows::F32(table),
            Table::F16(table) => Rows::F16(table),
            Table::BF16(table) => Rows::BF16(table),
            Table::Packed { data, scales, biases, bits, group } => {
                Rows::Affine { data, scales, biases, bits: *bits, group: *group }
            }
            Table::Tensor(_) => return None,
            #[cfg(feature = "cuda")]
            Table::PackedThere(_) => return None,
        })
    }

    /// All numbers, in f32, row after row.
    pub fn numbers(&self) -> Result<Vec<f32>> {
        Ok(match self {
            Table::F32(table) => table.clone(),
            Table::F16(table) => table.iter().map(|x| x.to_f32()).collect(),
            Table::BF16(table) => table.iter().map(|x| x.to_f32()).collect(),
            Table::Packed { data, scales, biases, bits, group } => unpack(data, scales, biases, *bits, *group),
            Table::Tensor(room) => match room.rows()? {
                Some(rows) => rows.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?,
                None => Vec::new(),
            },
            #[cfg(feature = "cuda")]
            Table::PackedThere(packed) => packed.here()?.numbers()?,
        })
    }

    /// The same rows, packed from now on.
    pub fn packed(&self, bits: u32, group: usize) -> Result<Table> {
        #[cfg(feature = "cuda")]
        if let Table::Tensor(room) = self {
            let rows = room.rows()?;
            return Ok(match rows.map(|rows| PackedRoom::of(&rows, bits, group)).transpose()? {
                Some(packed) => Table::PackedThere(packed),
                None => self.clone(),
            });
        }
        let mut table = Table::Packed { data: Vec::new(), scales: Vec::new(), biases: Vec::new(), bits, group };
        table.extend(&self.numbers()?);
        Ok(table)
    }

    /// A table like this one, without rows.
    pub fn emptied(&self) -> Table {
        match self {
            Table::F32(_) => Table::F32(Vec::new()),
            Table::F16(_) => Table::F16(Vec::new()),
            Table::BF16(_) => Table::BF16(Vec::new()),
            Table::Packed { bits, group, .. } => {
                Table::Packed { data: Vec::new(), scales: Vec::new(), biases: Vec::new(), bits: *bits, group: *group }
            }
            Table::Tensor(_) => Table::Tensor(Room::default()),
            #[cfg(feature = "cuda")]
            Table::PackedThere(packed) => Table::PackedThere(PackedRoom { room: Room::default(), form: packed.form }),
        }
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        match self {
            Table::F32(table) => table.len() * 4,
            Table::F16(table) => table.len() * 2,
            Table::BF16(table) => table.len() * 2,
            Table::Packed { data, scales, biases, .. } => data.len() + 4 * (scales.len() + biases.len()),
            table => table.whole().map_or(0, |t| t.elem_count() * t.dtype().size_in_bytes()),
        }
    }
}

/// Undoes the packing: a little-endian bit stream within each group.
fn unpack(data: &[u8], scales: &[f32], biases: &[f32], bits: u32, group: usize) -> Vec<f32> {
    let bytes = group * bits as usize / 8;
    let value = |bytes: &[u8], i: usize| {
        let (bit, mask) = (i * bits as usize, (1u16 << bits) - 1);
        let word = bytes[bit / 8] as u16 | (bytes.get(bit / 8 + 1).copied().unwrap_or(0) as u16) << 8;
        (word >> (bit % 8) & mask) as f32
    };
    let groups = data.chunks_exact(bytes).zip(scales.iter().zip(biases));
    groups.flat_map(|(bytes, (scale, bias))| (0..group).map(move |i| value(bytes, i) * scale + bias)).collect()
}
