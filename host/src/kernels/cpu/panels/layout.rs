//! A packed format as panels hold it: which bits of a number lie together, which columns share a scale, what is done with the sum of a group.
//! Numbers whose bits are no power of two are two planes of bits that are.

use super::LANES;
use crate::kernels::cpu::format::{Float, Format};

/// Which columns the 32 bits of a piece hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Byte i holds neighbouring columns, the first in its lowest bits.
    InTurns,
    /// Of a block of 32 columns, byte i of piece q has column 4 q + i in its low half, column 16 + 4 q + i in its high one.
    Halves,
    /// Byte i holds columns i, 4 + i, 8 + i, .., the first in its lowest bits: four neighbours lie side by side, and nothing need be turned.
    Straight,
}

/// How a scale is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    Float(Float),
    E8m0,
    E4m3,
    /// A byte that counts steps; a step is an f16 that [`SUPER`] columns share.
    Steps(Steps),
}

/// Columns that share a step of scales.
pub(super) const SUPER: usize = 256;

/// A count of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Steps {
    Signed,
    Unsigned,
    /// The scale's in the low half of the byte, the bias's in the high one.
    Halves,
}

impl Scale {
    pub(super) fn size(self) -> usize {
        match self {
            Scale::Float(float) => float.size(),
            Scale::E8m0 | Scale::E4m3 | Scale::Steps(_) => 1,
        }
    }
}

/// Kinds of what a row consists of: the numbers' low bits and their high ones, scales, biases, steps of scales, steps of biases.
pub(super) const STRIPS: usize = 6;
pub(super) const LOW: usize = 0;
pub(super) const HIGH: usize = 1;
pub(super) const SCALES: usize = 2;
pub(super) const BIASES: usize = 3;
pub(super) const STEPS: usize = 4;
pub(super) const BIAS_STEPS: usize = 5;

/// A format as panels see it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Layout {
    pub(super) format: Format,
    pub(super) bits: usize,
    /// How many of the bits lie in a plane of their own.
    pub(super) high: usize,
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
    /// The numbers are E4M3, and not multiplied as whole numbers.
    pub(super) e4m3: bool,
}

impl Layout {
    pub(super) fn of(format: Format, cols: usize) -> Option<Self> {
        let plain = Layout {
            format,
            bits: 4,
            high: 0,
            group: 32,
            order: Order::InTurns,
            scale: Scale::Float(Float::F16),
            biased: false,
            zero: 0,
            unit: 1.0,
            e2m1: false,
            e4m3: false,
        };
        let e2m1 = Layout { zero: 12, unit: 0.5, e2m1: true, ..plain };
        let e4m3 = Layout { bits: 8, e4m3: true, ..plain };
        let five = Layout { bits: 5, high: 1, order: Order::Straight, ..plain };
        let steps = |scale, group| Layout { group, order: Order::Straight, scale: Scale::Steps(scale), ..plain };
        Some(match format {
            Format::Affine { bits: bits @ (2 | 4 | 8), group, scales } => {
                Layout { bits: bits as usize, group, scale: Scale::Float(scales), biased: true, ..plain }
            }
            Format::Affine { bits: bits @ (3 | 5 | 6), group, scales } => {
                let (bits, scale) = (bits as usize, Scale::Float(scales));
                let high = if bits == 6 { 2 } else { 1 };
                Layout { bits, high, group, order: Order::Straight, scale, biased: true, ..plain }
            }
            Format::Mxfp4 => Layout { scale: Scale::E8m0, ..e2m1 },
            Format::Mxfp8 => Layout { scale: Scale::E8m0, ..e4m3 },
            Format::Fp8 { block } => Layout { group: block.min(cols), scale: Scale::Float(Float::F32), ..e4m3 },
            Format::Nvfp4 | Format::Nvfp4Scaled => Layout { group: 16, scale: Scale::E4m3, ..e2m1 },
            Format::Q4_0 => Layout { order: Order::Halves, zero: 8, ..plain },
            Format::Q4_1 => Layout { order: Order::Halves, biased: true, ..plain },
            Format::Q5_0 => Layout { zero: 16, ..five },
            Format::Q5_1 => Layout { biased: true, ..five },
            Format::Q8_0 => Layout { bits: 8, zero: 128, ..plain },
            Format::Q2K => Layout { bits: 2, biased: true, ..steps(Steps::Halves, 16) },
            Format::Q3K => Layout { bits: 3, high: 1, zero: 4, ..steps(Steps::Signed, 16) },
            Format::Q4K => Layout { biased: true, ..steps(Steps::Unsigned, 32) },
            Format::Q5K => Layout { bits: 5, high: 1, biased: true, ..steps(Steps::Unsigned, 32) },
            Format::Q6K => Layout { bits: 6, high: 2, zero: 32, ..steps(Steps::Signed, 16) },
            _ => return None,
        })
    }

    /// How a panel of so many columns lies in memory.
    pub(super) fn blocks(&self, cols: usize) -> Blocks {
        let most = if let Scale::Steps(_) = self.scale { SUPER / self.group } else { 4 };
        // As few groups as fill whole cache lines; one that straddles two costs more than it is worth.
        let fits = |&groups: &usize| cols.is_multiple_of(groups * self.group);
        let whole = |&groups: &usize| Blocks::new(self, cols, groups).bytes.is_multiple_of(64);
        let groups = match self.scale {
            Scale::Steps(_) => most,
            _ => (1..=most).filter(fits).find(whole).unwrap_or(1),
        };
        Blocks::new(self, cols, groups)
    }

    /// Bytes of so many columns of one row, a multiple of a block's: of each kind of strip.
    fn row_bytes(&self, cols: usize) -> [usize; STRIPS] {
        let scales = cols / self.group * self.scale.size();
        let steps = if let Scale::Steps(_) = self.scale { cols / SUPER * 2 } else { 0 };
        let biases = if self.biased && self.scale != Scale::Steps(Steps::Halves) { scales } else { 0 };
        let bias_steps = if self.biased { steps } else { 0 };
        [cols * (self.bits - self.high) / 8, cols * self.high / 8, scales, biases, steps, bias_steps]
    }

    /// Bytes of a piece of each kind of strip.
    pub(super) fn pieces(&self) -> [usize; STRIPS] {
        [4, 4, self.scale.size(), self.scale.size(), 2, 2]
    }

    /// Whether a block is read in jumps: from low bits to high ones, or to scales that have steps of their own.
    pub(super) fn jumps(&self) -> bool {
        self.high > 0 || matches!(self.scale, Scale::Steps(_))
    }

    /// Signed bytes for each number of an activation: weights of more than four bits are worth a second one.
    pub(super) fn planes(&self) -> usize {
        if self.bits > 4 { 2 } else { 1 }
    }

    /// Whether the numbers are signed bytes in the checkpoint; panels have them with `zero` added.
    pub(super) fn is_signed(&self) -> bool {
        self.format == Format::Q8_0
    }
}

/// Sixteen rows: blocks of some columns, each with all its strips one after the other. So a panel is one stream of memory, which a processor
/// foresees by itself: numbers and scales in strips of the whole panel are read at two thirds of the speed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    pub(super) count: usize,
    /// Columns that share a scale, so many times.
    pub(super) groups: usize,
    /// Bytes of a row's strips in a block.
    pub(super) strips: [usize; STRIPS],
    /// Where a block's strips begin.
    pub(super) at: [usize; STRIPS],
    /// Bytes of a block.
    pub(super) bytes: usize,
}

impl Blocks {
    fn new(layout: &Layout, cols: usize, groups: usize) -> Self {
        let strips = layout.row_bytes(groups * layout.group);
        let mut bytes = 0;
        let mut at = strips.map(|size| {
            bytes += size * LANES;
            bytes - size * LANES
        });
        if layout.scale == Scale::Steps(Steps::Halves) {
            at[BIASES] = at[SCALES];
        }
        Self { count: cols / (groups * layout.group), groups, strips, at, bytes }
    }
}
