//! From rows to panels and back: a transposition of the strips of sixteen rows. Nothing of a format is lost, so a row can be had back with the
//! very numbers that the checkpoint's own has.

use super::{
    LANES, Panels,
    interleaved::pack_panel,
    layout::{BIAS_STEPS, BIASES, Blocks, HIGH, LOW, Layout, Order, SCALES, STEPS, SUPER, Scale, Steps},
    lying::{Source, Store, View},
    opened::Strips,
};
use crate::{
    kernels::cpu::{
        ahead::fetch,
        dequantize::{E2M1, e4m3_to_f32, e8m0_to_f32},
        format::{Float, Format},
        matrix::Matrix,
    },
    weights::bytes::{Bytes, Room},
};
use rayon::prelude::*;
use std::sync::Arc;

fn gather(size: usize, panel: &[u8], lane: usize) -> impl Iterator<Item = u8> {
    panel.chunks_exact(size * LANES).flat_map(move |lanes| &lanes[size * lane..size * (lane + 1)]).copied()
}

/// Bytes of rows that are packed before their pages are let go: no large matrix is in memory twice.
const AT_ONCE: usize = 16 << 20;

/// All panels of a matrix, whose own pages are let go; with this thread `alone`, or with all.
pub(super) fn pack(layout: &Layout, blocks: &Blocks, matrix: &Matrix, alone: bool) -> std::io::Result<Room> {
    let size = blocks.count * blocks.bytes;
    let mut room = Room::new(matrix.rows().div_ceil(LANES) * size)?;
    let at_once = (AT_ONCE / size.max(1)).max(1);
    for (i, some) in room.chunks_mut(at_once * size).enumerate() {
        let one = |strips: &mut [Strips; LANES], (p, panel): (usize, &mut [u8])| {
            let p = i * at_once + p;
            // Sixteen short streams at once are more than a processor foresees.
            matrix.rows_from((p + 1) * LANES).chunks(64).take(size / 64).for_each(|line| fetch(line.as_ptr()));
            pack_panel(layout, blocks, matrix, p, strips, panel);
        };
        if alone {
            let mut strips = Default::default();
            some.chunks_exact_mut(size).enumerate().for_each(|panel| one(&mut strips, panel));
        } else {
            some.par_chunks_exact_mut(size).enumerate().for_each_init(Default::default, one);
        }
        let rows = (i * at_once * LANES)..((i + 1) * at_once * LANES).min(matrix.rows());
        if let Some(done) = matrix.slice_rows(rows) {
            done.parts().iter().for_each(Bytes::let_go);
        }
    }
    Ok(room)
}

impl Panels {
    /// `None` where there is no memory for it: then rows may stay as they are.
    pub(super) fn pack(layout: Layout, matrix: &Matrix) -> Option<Self> {
        let blocks = layout.blocks(matrix.cols());
        let packed = pack(&layout, &blocks, matrix, false).ok()?;
        Some(Self::with(matrix, Store::packed(layout, blocks, packed.into())))
    }

    /// Packed later.
    pub(super) fn lying(layout: Layout, matrix: &Matrix) -> Self {
        let blocks = layout.blocks(matrix.cols());
        Self::with(matrix, Store::lying(layout, blocks, matrix.clone()))
    }

    fn with(matrix: &Matrix, store: Arc<Store>) -> Self {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let factors = match matrix.format() {
            Format::Nvfp4Scaled => {
                let factors = matrix.parts()[2].chunks_exact(4).map(|bytes| Float::F32.read(bytes));
                factors.chain([0.0; LANES]).take(rows.next_multiple_of(LANES)).collect()
            }
            _ => Vec::new(),
        };
        Self { rows, cols, store, factors }
    }

    /// As a product reads them from `bytes`; none where they are not packed.
    pub(super) fn view<'a>(&'a self, bytes: &'a [u8]) -> View<'a> {
        let Self { rows, cols, ref store, ref factors } = *self;
        let blocks = store.blocks;
        View {
            layout: store.layout,
            rows,
            cols,
            blocks,
            factors,
            bytes,
            first: 0,
            to_next: blocks.count * blocks.bytes,
        }
    }

    /// Unpacks all rows into `out`, `[rows, cols]`.
    ///
    /// # Panics
    /// If `out` does not fit.
    pub fn dequantize(&self, out: &mut [f32]) {
        assert!(out.len() == self.rows * self.cols, "dequantize: {} numbers of {self:?}", out.len());
        match self.store.source() {
            Source::Packed(bytes) => {
                let view = self.view(bytes);
                out.par_chunks_exact_mut(self.cols).enumerate().for_each(|(r, out)| view.row(r, out));
            }
            Source::Lying(matrix) => matrix.dequantize_rows(0..self.rows, out),
        }
    }

    /// Unpacks the rows named by `ids` into `out`, `[ids.len(), cols]`: an embedding lookup.
    ///
    /// # Panics
    /// If an id is out of range or `out` does not fit.
    pub fn gather_rows(&self, ids: &[u32], out: &mut [f32]) {
        assert!(out.len() == ids.len() * self.cols, "gather_rows: {} ids of {self:?}", ids.len());
        let beyond = ids.iter().find(|&&id| id as usize >= self.rows);
        assert!(beyond.is_none(), "gather_rows: row {beyond:?} of {self:?}");
        match self.store.source() {
            Source::Packed(bytes) => {
                let view = self.view(bytes);
                ids.iter().zip(out.chunks_exact_mut(self.cols)).for_each(|(&id, out)| view.row(id as usize, out));
            }
            Source::Lying(matrix) => matrix.gather_rows(ids, out),
        }
    }
}

impl View<'_> {
    fn row(&self, row: usize, out: &mut [f32]) {
        let (layout, lane, pieces) = (&self.layout, row % LANES, self.layout.pieces());
        let low_bits = layout.bits - layout.high;
        let [low, high, scales, biases, steps, bias_steps] =
            [LOW, HIGH, SCALES, BIASES, STEPS, BIAS_STEPS].map(|kind| {
                let (at, size) = (self.blocks.at[kind], self.blocks.strips[kind] * LANES);
                let blocks = self.panel(row / LANES).chunks_exact(self.blocks.bytes);
                blocks.flat_map(|block| gather(pieces[kind], &block[at..at + size], lane)).collect::<Vec<u8>>()
            });
        let size = layout.scale.size();
        let biases = if biases.is_empty() { &scales } else { &biases };
        let mut all = numbers(&low, layout.order, low_bits);
        for (low, high) in all.iter_mut().zip(numbers(&high, layout.order, layout.high)) {
            *low |= high << low_bits;
        }
        let factor = self.factors.get(row).copied().unwrap_or(1.0);
        let groups = out.chunks_exact_mut(layout.group).zip(all.chunks_exact(layout.group));
        for (g, (out, numbers)) in groups.enumerate() {
            let step = g * layout.group / SUPER * 2;
            let scale = layout.scale.read(&scales[g * size..], &steps[step.min(steps.len())..], false) * factor;
            let bias = layout
                .biased
                .then(|| layout.scale.read(&biases[g * size..], &bias_steps[step.min(bias_steps.len())..], true));
            for (out, &number) in out.iter_mut().zip(numbers) {
                let number = match (layout.e2m1, layout.e4m3) {
                    (true, _) => E2M1[usize::from(number)],
                    (_, true) => e4m3_to_f32(number),
                    _ => (i32::from(number) - layout.zero) as f32,
                };
                *out = bias.map_or(number * scale, |bias| number * scale + bias);
            }
        }
    }
}

/// A row's numbers, or a plane of their bits, column by column.
fn numbers(strip: &[u8], order: Order, bits: usize) -> Vec<u8> {
    let mask = (1u16 << bits).wrapping_sub(1) as u8;
    let per = 8 / bits.max(1);
    match order {
        Order::InTurns => strip.iter().flat_map(|byte| (0..per).map(move |j| byte >> (bits * j) & mask)).collect(),
        // One after the other: what a block or a word has lowest, then what is next.
        Order::Halves | Order::Straight => {
            let block = if order == Order::Halves { 16 } else { 4 };
            let fields = |bytes| (0..per).flat_map(move |j| shifted(bytes, bits * j, mask));
            strip.chunks_exact(block).flat_map(fields).collect()
        }
    }
}

fn shifted(bytes: &[u8], shift: usize, mask: u8) -> impl Iterator<Item = u8> {
    bytes.iter().map(move |byte| byte >> shift & mask)
}

impl Scale {
    /// A group's scale, or its bias: of the bytes that begin `from`, in steps of the number that begins `steps`.
    fn read(self, from: &[u8], steps: &[u8], bias: bool) -> f32 {
        let byte = from.first().copied().unwrap_or(0);
        match self {
            Scale::Float(float) => float.read(from),
            Scale::E8m0 => e8m0_to_f32(byte),
            Scale::E4m3 => e4m3_to_f32(byte),
            Scale::Steps(kind) => {
                let count = match kind {
                    Steps::Signed => f32::from(byte as i8),
                    Steps::Unsigned => f32::from(byte),
                    Steps::Halves => f32::from(if bias { byte >> 4 } else { byte & 15 }),
                };
                Float::F16.read(steps) * count
            }
        }
    }
}
