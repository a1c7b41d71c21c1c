//! Keys or values in groups of a few bits on an NVIDIA GPU: rows of words in a room like any other, which kernels pack and unpack there.

use super::{room::Room, rows::Table};
use crate::kernels::cuda::pack::{Form, Rows};
use candle_core::{DType, Device, Result, Tensor};

/// The rows.
#[derive(Clone)]
pub struct PackedRoom {
    /// `[entries, heads, words]`, u32.
    pub room: Room,
    /// What is in a row.
    pub form: Form,
}

impl PackedRoom {
    /// Rows `[entries, heads, dim]`, packed from now on.
    pub fn of(rows: &Tensor, bits: u32, group: usize) -> Result<Self> {
        let (_, _, dim) = rows.dims3()?;
        let form = Form { dim, bits: bits as usize, group, dtype: rows.dtype() };
        let mut packed = PackedRoom { room: Room::default(), form };
        packed.extend(rows)?;
        Ok(packed)
    }

    /// The same as the CPU has packed it, `[entries, heads, dim]`, to come back as `form` says.
    pub fn placed(table: &Table, [entries, heads]: [usize; 2], form: Form, device: &Device) -> Result<Self> {
        let Table::Packed { data, scales, biases, .. } = table else {
            candle_core::bail!("a table that is not packed")
        };
        let (bytes, groups) = (form.dim * form.bits / 8, form.dim / form.group);
        let mut words = Vec::with_capacity(entries * heads * form.words());
        let scales = scales.chunks_exact(groups).zip(biases.chunks_exact(groups));
        for (bytes, (scales, biases)) in data.chunks_exact(bytes).zip(scales) {
            words.extend(bytes.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)));
            words.extend(scales.iter().zip(biases).flat_map(|(scale, bias)| [scale.to_bits(), bias.to_bits()]));
        }
        let words = Tensor::from_vec(words, (entries, heads, form.words()), device)?;
        Ok(PackedRoom { room: Room::holding(&words)?, form })
    }

    /// As the CPU packs it.
    pub fn here(&self) -> Result<Table> {
        let Form { dim, bits, group, .. } = self.form;
        let words = match self.room.rows()? {
            Some(rows) => rows.flatten_all()?.to_vec1::<u32>()?,
            None => Vec::new(),
        };
        let (mut data, mut scales, mut biases) = (Vec::new(), Vec::new(), Vec::new());
        for row in words.chunks_exact(self.form.words()) {
            let (numbers, rest) = row.split_at(dim * bits / 32);
            data.extend(numbers.iter().flat_map(|word| word.to_le_bytes()));
            for [scale, bias] in rest.as_chunks::<2>().0 {
                scales.push(f32::from_bits(*scale));
                biases.push(f32::from_bits(*bias));
            }
        }
        Ok(Table::Packed { data, scales, biases, bits: bits as u32, group })
    }

    /// Appends `[rows, heads, dim]`.
    pub fn extend(&mut self, rows: &Tensor) -> Result<()> {
        let more = rows.dim(0)?;
        self.reserve(rows, more)?;
        if let Some(whole) = self.room.whole() {
            self.form.pack(&[[rows, whole]], Rows::From(self.room.len()))?;
        }
        self.room.grown(more);
        Ok(())
    }

    /// Makes sure that `more` rows of as many heads as `like` `[_, heads, _]` has fit behind the rows.
    pub fn reserve(&mut self, like: &Tensor, more: usize) -> Result<()> {
        let like = match self.room.whole() {
            Some(whole) => whole.clone(),
            None => Tensor::zeros((1, like.dim(1)?, self.form.words()), DType::U32, like.device())?,
        };
        self.room.reserve(&like, more)
    }

    /// The numbers of all rows, `[entries, heads, dim]`, if there are any.
    pub fn rows(&self) -> Result<Option<Tensor>> {
        let whole = self.room.whole().filter(|_| !self.room.is_empty());
        whole.map(|whole| self.form.unpack(whole, Rows::From(self.room.len()))).transpose()
    }
}
