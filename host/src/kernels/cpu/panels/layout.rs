//! From rows to panels and back: a transposition of 32-bit pieces of rows, so nothing of a format is lost, and a row can be had back as the
//! checkpoint had it. Where blocks hold their scale (GGUF), it is taken out of them.

use super::{LANES, Panels};
use crate::{
    kernels::cpu::{
        dequantize::dequantize_row,
        format::{Float, Format},
        matrix::Matrix,
    },
    weights::bytes::{Bytes, Room},
};
use rayon::prelude::*;

/// Which columns the 32 bits of a piece hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Byte i holds neighbouring columns, the first in its lowest bits.
    InTurns,
    /// Of a block of 32 columns, byte i of piece q has column 4 q + i in its low half, column 16 + 4 q + i in its high one.
    Halves,
}

/// How a scale is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Float(Float),
    E8m0,
    E4m3,
}

impl Scale {
    pub(super) fn size(self) -> usize {
        match self {
            Scale::Float(float) => float.size(),
            Scale::E8m0 | Scale::E4m3 => 1,
        }
    }
}

/// A format as panels see it.
// Other processors have no panels, and need not know what is in them.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Layout {
    pub(super) format: Format,
    pub(super) bits: usize,
    /// Columns that share a scale.
    pub(super) group: usize,
    pub(super) order: Order,
    pub(super) scale: Scale,
    /// Whether a group has a bias, of the scale's type.
    pub(super) biased: bool,
    /// The number that stands for nothing, before any bias.
    pub(super) zero: i32,
    /// What one step of the numbers is worth, besides their scale.
    pub(super) unit: f32,
    /// The numbers are E2M1, read as twice their value plus `zero`.
    pub(super) e2m1: bool,
}

impl Layout {
    pub(super) fn of(format: Format) -> Option<Self> {
        let plain = Layout {
            format,
            bits: 4,
            group: 32,
            order: Order::InTurns,
            scale: Scale::Float(Float::F16),
            biased: false,
            zero: 0,
            unit: 1.0,
            e2m1: false,
        };
        let e2m1 = Layout { zero: 12, unit: 0.5, e2m1: true, ..plain };
        Some(match format {
            Format::Affine { bits: bits @ (2 | 4 | 8), group, scales } => {
                Layout { bits: bits as usize, group, scale: Scale::Float(scales), biased: true, ..plain }
            }
            Format::Mxfp4 => Layout { scale: Scale::E8m0, ..e2m1 },
            Format::Nvfp4 | Format::Nvfp4Scaled => Layout { group: 16, scale: Scale::E4m3, ..e2m1 },
            Format::Q4_0 => Layout { order: Order::Halves, zero: 8, ..plain },
            Format::Q4_1 => Layout { order: Order::Halves, biased: true, ..plain },
            Format::Q8_0 => Layout { bits: 8, zero: 128, ..plain },
            _ => return None,
        })
    }

    /// Bytes of one row: of its numbers, of its scales, of its biases.
    pub(super) fn row_bytes(&self, cols: usize) -> [usize; 3] {
        let scales = cols / self.group * self.scale.size();
        [cols * self.bits / 8, scales, if self.biased { scales } else { 0 }]
    }

    /// What is added to each byte of the numbers, so that they have no sign.
    fn shift(&self) -> u32 {
        if self.format == Format::Q8_0 { 0x8080_8080 } else { 0 }
    }

    /// Where numbers, scales and biases of a GGUF block begin, and its size.
    fn block(&self) -> Option<([usize; 3], usize)> {
        match self.format {
            Format::Q4_0 => Some(([2, 0, 0], 18)),
            Format::Q4_1 => Some(([4, 0, 2], 20)),
            Format::Q8_0 => Some(([2, 0, 0], 34)),
            _ => None,
        }
    }

    /// A row of the checkpoint as numbers, scales and biases, each together.
    fn taken_apart<'a>(&self, row: [&'a [u8]; 3], kept: &'a mut Vec<u8>) -> [&'a [u8]; 3] {
        let Some((at, size)) = self.block() else { return row };
        let blocks = row[0].len() / size;
        let [numbers, scales, biases] = self.row_bytes(blocks * self.group).map(|bytes| bytes / blocks.max(1));
        kept.clear();
        for (at, len) in at.into_iter().zip([numbers, scales, biases]) {
            kept.extend(row[0].chunks_exact(size).flat_map(|block| &block[at..at + len]));
        }
        let (numbers, beside) = kept.split_at(blocks * numbers);
        let (scales, biases) = beside.split_at(blocks * scales);
        [numbers, scales, biases]
    }

    /// The other way round.
    fn put_together(&self, [numbers, scales, biases]: [&[u8]; 3]) -> Option<Vec<u8>> {
        let (at, size) = self.block()?;
        let blocks = scales.len() / self.scale.size();
        let mut row = vec![0; blocks * size];
        for (at, part) in at.into_iter().zip([numbers, scales, biases]) {
            let len = part.len() / blocks.max(1);
            for (block, part) in row.chunks_exact_mut(size).zip(part.chunks_exact(len.max(1))) {
                block[at..at + len].copy_from_slice(part);
            }
        }
        Some(row)
    }
}

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
        let sizes = layout.row_bytes(cols);
        let panel = sizes.iter().sum::<usize>() * LANES;
        let mut room = Room::new(rows.div_ceil(LANES) * panel).ok()?;
        room.par_chunks_exact_mut(panel).enumerate().for_each_init(Vec::new, |kept, (p, panel)| {
            let (numbers, beside) = panel.split_at_mut(sizes[0] * LANES);
            let (scales, biases) = beside.split_at_mut(sizes[1] * LANES);
            for lane in 0..LANES.min(rows - p * LANES) {
                let row = layout.taken_apart(matrix.row_parts(p * LANES + lane), kept);
                scatter::<4>(row[0], numbers, lane);
                let scatter = match layout.scale.size() {
                    1 => scatter::<1>,
                    2 => scatter::<2>,
                    _ => scatter::<4>,
                };
                scatter(row[1], scales, lane);
                if layout.biased {
                    scatter(row[2], biases, lane);
                }
            }
            if layout.shift() != 0 {
                numbers.iter_mut().for_each(|byte| *byte ^= 0x80);
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

    /// Where the numbers, the scales and the biases of a panel begin.
    pub(super) fn panel(&self, p: usize) -> [&[u8]; 3] {
        let sizes = self.layout.row_bytes(self.cols).map(|size| size * LANES);
        let all = &self.bytes[p * self.panel_bytes()..];
        let (numbers, beside) = all.split_at(sizes[0]);
        let (scales, biases) = beside.split_at(sizes[1]);
        [numbers, scales, &biases[..sizes[2]]]
    }

    fn row(&self, row: usize, out: &mut [f32]) {
        let [numbers, scales, biases] = self.panel(row / LANES);
        let lane = row % LANES;
        let mut numbers = gather(4, numbers, lane);
        if self.layout.shift() != 0 {
            numbers.iter_mut().for_each(|byte| *byte ^= 0x80);
        }
        let size = self.layout.scale.size();
        let (scales, biases) = (gather(size, scales, lane), gather(size, biases, lane));
        let factor = self.factors.get(row).map(|factor| factor.to_le_bytes());
        let beside = factor.as_ref().map_or(&biases[..], |factor| &factor[..]);
        match self.layout.put_together([&numbers, &scales, &biases]) {
            Some(row) => dequantize_row(self.layout.format, &row, &[], &[], out),
            None => dequantize_row(self.layout.format, &numbers, &scales, beside, out),
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
