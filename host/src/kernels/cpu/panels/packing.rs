//! From rows to panels and back: a transposition of the strips of sixteen rows. Nothing of a format is lost, so a row can be had back with the
//! very numbers that the checkpoint's own has.

use super::{
    LANES, Panels,
    layout::{Layout, Order, Panel, SUPER, Scale, Steps},
    opened::Strips,
};
use crate::{
    kernels::cpu::{
        dequantize::{E2M1, e4m3_to_f32, e8m0_to_f32},
        format::{Float, Format},
        matrix::Matrix,
    },
    weights::bytes::{Bytes, Room},
};
use rayon::prelude::*;

/// Piece i of a row to lane `lane` of piece i of a panel, or back.
fn scatter<const SIZE: usize>(row: &[u8], panel: &mut [u8], lane: usize) {
    for (piece, lanes) in row.as_chunks::<SIZE>().0.iter().zip(panel.chunks_exact_mut(SIZE * LANES)) {
        lanes[SIZE * lane..SIZE * (lane + 1)].copy_from_slice(piece);
    }
}

fn gather(size: usize, panel: &[u8], lane: usize) -> Vec<u8> {
    panel.chunks_exact(size * LANES).flat_map(|lanes| &lanes[size * lane..size * (lane + 1)]).copied().collect()
}

impl Panels {
    /// `None` where there is no memory for it: then rows may stay as they are.
    pub(super) fn pack(layout: Layout, matrix: &Matrix) -> Option<Self> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let (sizes, pieces) = (layout.row_bytes(cols), layout.pieces());
        let panel = sizes.iter().sum::<usize>() * LANES;
        let mut room = Room::new(rows.div_ceil(LANES) * panel).ok()?;
        room.par_chunks_exact_mut(panel).enumerate().for_each_init(Strips::default, |strips, (p, panel)| {
            for lane in 0..LANES.min(rows - p * LANES) {
                let mut panel = &mut *panel;
                let row = strips.of(&layout, matrix.row_parts(p * LANES + lane));
                for ((strip, size), piece) in row.into_iter().zip(sizes).zip(pieces) {
                    let (lanes, rest) = panel.split_at_mut(size * LANES);
                    match piece {
                        1 => scatter::<1>(strip, lanes, lane),
                        2 => scatter::<2>(strip, lanes, lane),
                        _ => scatter::<4>(strip, lanes, lane),
                    }
                    panel = rest;
                }
            }
        });
        let factors = match layout.format {
            Format::Nvfp4Scaled => {
                let factors = matrix.parts()[2].chunks_exact(4).map(|bytes| Float::F32.read(bytes));
                factors.chain([0.0; LANES]).take(rows.next_multiple_of(LANES)).collect()
            }
            _ => Vec::new(),
        };
        matrix.parts().iter().for_each(Bytes::let_go);
        Some(Self { layout, rows, cols, bytes: room.into(), factors })
    }

    /// From one panel to the next.
    pub(super) fn panel_bytes(&self) -> usize {
        self.layout.row_bytes(self.cols).iter().sum::<usize>() * LANES
    }

    /// Sixteen rows.
    pub(super) fn panel(&self, p: usize) -> Panel<'_> {
        Panel::new(&self.layout, self.cols, &self.bytes[p * self.panel_bytes()..])
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        let (layout, lane) = (&self.layout, row % LANES);
        let panel = self.panel(row / LANES);
        let low_bits = layout.bits - layout.high;
        let mut all = numbers(&gather(4, panel.low, lane), layout.order, low_bits);
        for (low, high) in all.iter_mut().zip(numbers(&gather(4, panel.high, lane), layout.order, layout.high)) {
            *low |= high << low_bits;
        }
        let [_, _, size, ..] = layout.pieces();
        let (scales, biases) = (gather(size, panel.scales, lane), gather(size, panel.biases, lane));
        let (steps, bias_steps) = (gather(2, panel.steps, lane), gather(2, panel.bias_steps, lane));
        let factor = self.factors.get(row).copied().unwrap_or(1.0);
        let groups = out.chunks_exact_mut(layout.group).zip(all.chunks_exact(layout.group));
        for (g, (out, numbers)) in groups.enumerate() {
            let step = g * layout.group / SUPER * 2;
            let scale = layout.scale.read(&scales[g * size..], &steps[step.min(steps.len())..], false) * factor;
            let bias = layout
                .biased
                .then(|| layout.scale.read(&biases[g * size..], &bias_steps[step.min(bias_steps.len())..], true));
            for (out, &number) in out.iter_mut().zip(numbers) {
                let number = match layout.e2m1 {
                    true => E2M1[usize::from(number)],
                    false => (i32::from(number) - layout.zero) as f32,
                };
                *out = bias.map_or(number * scale, |bias| number * scale + bias);
            }
        }
    }

    /// Unpacks all rows into `out`, `[rows, cols]`.
    ///
    /// # Panics
    /// If `out` does not fit.
    pub fn dequantize(&self, out: &mut [f32]) {
        assert!(out.len() == self.rows * self.cols, "dequantize: {} numbers of {self:?}", out.len());
        out.par_chunks_exact_mut(self.cols).enumerate().for_each(|(r, out)| self.row(r, out));
    }

    /// Unpacks the rows named by `ids` into `out`, `[ids.len(), cols]`: an embedding lookup.
    ///
    /// # Panics
    /// If an id is out of range or `out` does not fit.
    pub fn gather_rows(&self, ids: &[u32], out: &mut [f32]) {
        assert!(out.len() == ids.len() * self.cols, "gather_rows: {} ids of {self:?}", ids.len());
        for (&id, out) in ids.iter().zip(out.chunks_exact_mut(self.cols)) {
            assert!((id as usize) < self.rows, "gather_rows: row {id} of {self:?}");
            self.row(id as usize, out);
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
