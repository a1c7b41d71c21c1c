//! A prompt cache file -> a state. Everything in the file is checked against everything else before it is used: a file may be made by
//! anybody, and a wrong length here would be a panic in a kernel later.

use super::{PromptCache, UNKNOWN, swap};
#[cfg(feature = "cuda")]
use crate::{cache::packed::PackedRoom, kernels::cuda::pack::Form};
use crate::{
    cache::{
        CacheOptions, State,
        kv::KvCache,
        memory::{Memory, Recurrent},
        room::Room,
        rows::Table,
    },
    device::Placement,
    error::{Error, Result},
    model::Model,
    weights::stored::{Dtype, Stored},
};
use candle_core::Tensor;
use half::{bf16, f16};

/// The most tokens that positions can count.
const LONGEST: usize = i32::MAX as usize;

impl PromptCache {
    /// The state, for the model that it was made with. `wanted` are the user's own cache options: they may ask for more than the file
    /// has (a quantized cache from now on), not for something else.
    pub fn state(&self, model: &Model, fingerprint: &str, wanted: &CacheOptions) -> Result<State> {
        if self.fingerprint.as_deref().is_some_and(|made_for| made_for != fingerprint) {
            return Err(self.wrong(format!(
                "was made for another model ({}, other weights or config); make it again for this one",
                self.model
            )));
        }
        if model.is_shared() {
            return Err(self.wrong("holds the heads of all devices: leave --devices out, or --prompt-cache-file"));
        }
        let mut state = model.state(&self.options(wanted)?)?;
        self.read_into(&mut state, &model.place)?;
        Ok(state)
    }

    /// Fills an empty state that was made with [`Self::options`].
    pub fn read_into(&self, state: &mut State, place: &Placement) -> Result<()> {
        if state.layers.len() != self.classes.len() {
            return Err(self.wrong(format!(
                "has {} layers, the model has {}: it was made for another one",
                self.classes.len(),
                state.layers.len()
            )));
        }
        for (index, layer) in state.layers.iter_mut().enumerate() {
            match layer {
                Memory::KeyValue(kv) => self.read_layer(index, kv, place)?,
                Memory::State(recurrent) => self.read_state(index, recurrent)?,
            }
        }
        state.offset = self.offset;
        state.tokens = match &self.facts {
            Some(facts) if facts.tokens.len() != self.offset => {
                return Err(self.wrong(format!("has {} token ids for {} tokens", facts.tokens.len(), self.offset)));
            }
            Some(facts) => facts.tokens.clone(),
            None => vec![UNKNOWN; self.offset],
        };
        state.horizon = self.facts.as_ref().map_or(0, |f| f.horizon).clamp(self.offset, LONGEST);
        state.remember();
        Ok(())
    }

    /// How the cache is kept: as the file says, with what `wanted` adds to it.
    pub fn options(&self, wanted: &CacheOptions) -> Result<CacheOptions> {
        let packed = self.classes.iter().position(|class| class.ends_with("QuantizedKVCache"));
        let mut options = match (&self.facts, packed) {
            (Some(facts), _) => facts.options,
            (None, Some(index)) => CacheOptions {
                kv_group_size: self.number(index, 3)?,
                kv_bits: Some(self.number(index, 4)? as u32),
                quantized_kv_start: 0,
                ..Default::default()
            },
            (None, None) => CacheOptions::default(),
        };
        let differs = |flag: &str, has: String| {
            Error::Usage(format!("{flag}: {} was made with {has}; leave the flag out", self.path.display()))
        };
        match (options.max_kv_size, wanted.max_kv_size) {
            (Some(has), Some(asked)) if has != asked => {
                return Err(differs(&format!("--max-kv-size {asked}"), has.to_string()));
            }
            (None, asked) => options.max_kv_size = asked,
            _ => {}
        }
        match (options.kv_bits, wanted.kv_bits) {
            (Some(has), Some(asked)) if has != asked => {
                return Err(differs(&format!("--kv-bits {asked}"), format!("{has} bits")));
            }
            (None, Some(_)) => {
                let CacheOptions { kv_bits, kv_group_size, quantized_kv_start, .. } = *wanted;
                options = CacheOptions { kv_bits, kv_group_size, quantized_kv_start, ..options };
            }
            _ => {}
        }
        options.validate().map_err(|e| self.wrong(e))?;
        Ok(options)
    }

    /// Tokens seen, which all layers that tell must agree on; states do not, but dylm's own facts do.
    pub(super) fn find_offset(&self) -> Result<usize> {
        let mut offset = None;
        let tells = |index: &usize| self.classes[*index] != "ArraysCache";
        for index in (0..self.classes.len()).filter(tells) {
            let this = match self.tensors.get(&format!("{index}.2")) {
                // In older files of mlx-lm a plain cache is as long as its tensor.
                None if self.classes[index] == "KVCache" => {
                    self.tensor(&format!("{index}.0"))?.shape.get(2).copied().unwrap_or(0)
                }
                _ => self.number(index, 2)?,
            };
            if offset.is_some_and(|offset| offset != this) {
                return Err(
                    self.wrong(format!("layer {index} has seen {this} tokens, the one before it another number"))
                );
            }
            offset = Some(this);
        }
        match offset.or(self.facts.as_ref().map(|f| f.tokens.len())) {
            Some(offset) if (1..=LONGEST).contains(&offset) => Ok(offset),
            _ => Err(self.wrong("holds no tokens; make it again")),
        }
    }

    fn read_state(&self, index: usize, state: &mut Recurrent) -> Result<()> {
        if self.classes[index] != "ArraysCache" || self.facts.is_none() {
            return Err(self.untaken(index));
        }
        let name = format!("{index}.0.0");
        let stored = self.tensor(&name)?;
        let fits = match stored.shape.as_slice() {
            [1, 0] => state.dims.is_empty(),
            [1, dims @ ..] => dims == state.dims,
            _ => false,
        };
        if !fits || stored.dtype != Dtype::F32 {
            let (dtype, has, needs) = (stored.dtype, &stored.shape, &state.dims);
            return Err(self.wrong(format!("{name}: {dtype} {has:?}, the model's state is F32 [1, ..] of {needs:?}")));
        }
        let numbers = stored.bytes().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect::<Vec<_>>();
        state.numbers = numbers.into();
        Ok(())
    }

    fn untaken(&self, index: usize) -> Error {
        self.wrong(format!(
            "layer {index} is a {} of mlx-lm, which cannot be taken over; make it with `dylm cache-prompt`",
            self.classes[index]
        ))
    }

    fn read_layer(&self, index: usize, layer: &mut KvCache, place: &Placement) -> Result<()> {
        let class = self.classes[index].as_str();
        match (class, &self.facts) {
            ("KVCache" | "QuantizedKVCache", _) if layer.every == 1 => {}
            ("RotatingKVCache" | "ChunkedKVCache" | "WindowedQuantizedKVCache", Some(_)) if layer.every == 1 => {}
            ("PooledKVCache" | "PooledQuantizedKVCache", Some(_)) if layer.every > 1 => {}
            _ => {
                return Err(self.untaken(index));
            }
        }
        let (runs, entries) = match &self.facts {
            None => (vec![(0, self.offset as u32)], self.offset),
            Some(facts) => {
                let runs = facts.positions.get(index).cloned().unwrap_or_default();
                let ordered = runs.is_sorted_by(|a, b| a.1 < b.0) && runs.iter().all(|(from, to)| from < to);
                // Pooled keys count by their number, and there may be none yet.
                if !ordered || runs.last().map_or(0, |(_, to)| *to as usize) != self.offset / layer.every {
                    return Err(self.wrong(format!("layer {index}: its positions make no sense; make it again")));
                }
                let entries = runs.iter().map(|(from, to)| (to - from) as usize).sum();
                (runs, entries)
            }
        };
        if class.ends_with("QuantizedKVCache") {
            let (keys, [heads, dim]) = self.read_packed(index, 0, entries)?;
            let (values, [v_heads, v_dim]) = match self.tensors.get(&format!("{index}.1.0")) {
                Some(_) => self.read_packed(index, 1, entries)?,
                None => (keys.emptied(), [heads, 0]),
            };
            #[cfg(feature = "cuda")]
            let [keys, values] = match place.device.is_cuda() {
                true => there([keys, values], entries, [[heads, dim], [v_heads, v_dim]], place)?,
                false => [keys, values],
            };
            if !place.native && !place.device.is_cuda() {
                return Err(Error::Usage(format!(
                    "{}: a quantized cache, which works on the cpu and on cuda; use --device cpu",
                    self.path.display()
                )));
            }
            (layer.keys, layer.values) = (keys, values);
            layer.shape = Some([heads, dim, v_heads, v_dim]);
        } else {
            let (heads, dim) = self.read_dense(&format!("{index}.0"), entries, &mut layer.keys, place)?;
            // Values may be lanes of the keys.
            let (v_heads, v_dim) = match self.tensors.get(&format!("{index}.1")) {
                Some(_) => self.read_dense(&format!("{index}.1"), entries, &mut layer.values, place)?,
                None => (heads, 0),
            };
            layer.shape = Some([heads, dim, v_heads, v_dim]);
        }
        let every = layer.every as u32;
        layer.positions = runs.into_iter().flat_map(|(from, to)| from..to).map(|n| n * every + every - 1).collect();
        Ok(())
    }

    fn tensor(&self, name: &str) -> Result<&Stored> {
        self.tensors.get(name).ok_or_else(|| self.wrong(format!("{name}: not in the file; make it again")))
    }

    /// A number that mlx-lm stores as a tensor without a shape, or before that in the layer's text.
    fn number(&self, layer: usize, place: usize) -> Result<usize> {
        let name = format!("{layer}.{place}");
        let bad = || self.wrong(format!("{name}: not a whole number; make it again"));
        match self.tensors.get(&name) {
            Some(t) if t.dtype == Dtype::I32 && t.elements() == 1 => {
                let bytes: [u8; 4] = t.bytes()[..].try_into().map_err(|_| bad())?;
                usize::try_from(i32::from_le_bytes(bytes)).map_err(|_| bad())
            }
            Some(_) => Err(bad()),
            None => {
                let text = self.metadata.get(&format!("0.{layer}.{}", place - 2));
                text.and_then(|text| text.parse().ok()).ok_or_else(bad)
            }
        }
    }

    /// `[1, heads, at least entries, width]` of one of `dtypes` -> its first entries as `[entries, heads, width]`, in bytes.
    fn rows(&self, name: &str, entries: usize, dtypes: &[Dtype]) -> Result<(Vec<u8>, Dtype, usize, usize)> {
        let stored = self.tensor(name)?;
        let (&[1, heads, room, width], true) = (stored.shape.as_slice(), dtypes.contains(&stored.dtype)) else {
            return Err(self.wrong(format!(
                "{name}: {} {:?} is not [1, kv_heads, tokens, head_dim] of keys or values",
                stored.dtype, stored.shape
            )));
        };
        if heads == 0 || width == 0 || room < entries {
            return Err(self.wrong(format!("{name}: {:?} does not hold {entries} tokens; make it again", stored.shape)));
        }
        let (bytes, chunk) = (stored.bytes(), width * stored.dtype.block().1);
        let used: Vec<u8> = match room == entries {
            true => bytes.to_vec(),
            false => bytes.chunks_exact(room * chunk).flat_map(|head| &head[..entries * chunk]).copied().collect(),
        };
        Ok((swap(&used, heads, entries, chunk), stored.dtype, heads, width))
    }

    fn floats(&self, name: &str, entries: usize) -> Result<(Vec<f32>, usize, usize)> {
        let (bytes, dtype, heads, width) = self.rows(name, entries, &[Dtype::F32, Dtype::F16, Dtype::BF16])?;
        let halves = || bytes.as_chunks::<2>().0.iter();
        let numbers = match dtype {
            Dtype::F16 => halves().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => halves().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
            _ => bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        };
        Ok((numbers, heads, width))
    }

    /// Into a table of the cache's own type, which need not be the file's.
    fn read_dense(&self, name: &str, entries: usize, table: &mut Table, place: &Placement) -> Result<(usize, usize)> {
        let (numbers, heads, width) = self.floats(name, entries)?;
        match table {
            Table::Tensor(_) if entries == 0 => {}
            Table::Tensor(t) => {
                let rows = Tensor::from_vec(numbers, (entries, heads, width), &place.device)?;
                *t = Room::holding(&rows.to_dtype(place.dtype)?)?;
            }
            table => table.extend(&numbers),
        }
        Ok((heads, width))
    }

    fn read_packed(&self, index: usize, part: usize, entries: usize) -> Result<(Table, [usize; 2])> {
        let (group, bits) = (self.number(index, 3)?, self.number(index, 4)?);
        let known = matches!(bits, 2 | 3 | 4 | 5 | 6 | 8) && matches!(group, 32 | 64 | 128);
        let (data, _, heads, words) = self.rows(&format!("{index}.{part}.0"), entries, &[Dtype::U32])?;
        let (scales, s_heads, groups) = self.floats(&format!("{index}.{part}.1"), entries)?;
        let (biases, b_heads, b_groups) = self.floats(&format!("{index}.{part}.2"), entries)?;
        let dim = groups.saturating_mul(group);
        let fits =
            (s_heads, b_heads, b_groups) == (heads, heads, groups) && words.checked_mul(32) == dim.checked_mul(bits);
        if !known || !fits {
            return Err(self.wrong(format!("layer {index}: {bits} bits in groups of {group} do not fit its shapes")));
        }
        Ok((Table::Packed { data, scales, biases, bits: bits as u32, group }, [heads, dim]))
    }
}

/// Packed keys and values, `[heads, dim]` of a row each, brought to an NVIDIA GPU; a dim of 0 says that there are none.
#[cfg(feature = "cuda")]
fn there(tables: [Table; 2], entries: usize, shapes: [[usize; 2]; 2], place: &Placement) -> Result<[Table; 2]> {
    let mut placed = [Table::new(place), Table::new(place)];
    for ((table, [heads, dim]), to) in tables.iter().zip(shapes).zip(&mut placed) {
        if let (Table::Packed { bits, group, .. }, true) = (table, dim > 0) {
            let form = Form { dim, bits: *bits as usize, group: *group, dtype: place.dtype };
            *to = Table::PackedThere(PackedRoom::placed(table, [entries, heads], form, &place.device)?);
        }
    }
    Ok(placed)
}
