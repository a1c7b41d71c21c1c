//! A panel's numbers for products of pairs of bfloat16, on the matrix unit or without: 32 columns of sixteen rows become a tile of sixteen
//! lines, pairs of columns, each number with its scale and bias. Rounded once, to the nearest: by up to 2^-9 of a weight, in steps of the format's
//! own 0.09 (8 bits) or 0.006 (4 bits) on average, where the format is off by 0.29 of a step itself.
//!
//! Columns come as they lie in their pieces; `column_order` says which, and tokens are laid out likewise.

use super::{
    LANES,
    floats::Table,
    layout::{BIAS_STEPS, BIASES, HIGH, LOW, Layout, Order, SCALES, STEPS},
    lying::View,
    numbers::Numbers,
    product::Line,
    scales::scales,
    sixteen::Avx512,
};
use crate::kernels::cpu::{asked::behind, unwritten::Plain};
use std::{arch::x86_64::*, ops::Range};

/// Columns of a tile.
pub(super) const COLUMNS: usize = 32;
/// A tile: sixteen pairs of columns.
pub(super) type Tile = [Line; COLUMNS / 2];

impl Plain for Line {}
impl Plain for Tile {}

/// What takes numbers out of a panel.
pub(super) trait Open: Copy + Sync {
    /// Columns `step * 32` and on of a panel of these, of which `from` is the first byte.
    ///
    /// # Safety
    /// The panel has them, in this kind of numbers; the processor has the instructions of its implementations.
    unsafe fn open(self, panels: &View<'_>, from: *const u8, step: usize, to: &mut Tile);
}

/// Which column of a tile comes at each place.
pub(super) fn column_order(layout: &Layout) -> [u16; COLUMNS] {
    let per = if layout.order == Order::Straight { 1 } else { 8 / layout.bits };
    std::array::from_fn(|at| {
        let (vector, i) = (at / 4, at % 4);
        let column = match layout.order {
            Order::Halves => vector % 2 * 16 + vector / 2 * 4 + i,
            _ => vector / per * 4 * per + i * per + vector % per,
        };
        column as u16
    })
}

/// A token rounded to bfloat16, a line for each tile's columns, in the order in which these come.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn lay_out<'a>(x: &[f32], order: &[u16; COLUMNS], to: impl Iterator<Item = &'a mut Line>) {
    for (x, to) in x.as_chunks::<COLUMNS>().0.iter().zip(to) {
        // SAFETY: 32 numbers, places and words of a line.
        unsafe {
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(LANES)));
            let rounded = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_store_si512(to.0.as_mut_ptr().cast(), _mm512_permutexvar_epi16(order, rounded));
        }
    }
}

impl<N: Numbers> Open for N {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    unsafe fn open(self, panels: &View<'_>, from: *const u8, step: usize, to: &mut Tile) {
        let View { layout, blocks, .. } = panels;
        let part = layout.group.min(COLUMNS);
        for (i, to) in to.chunks_exact_mut(part / 2).enumerate() {
            let column = step * COLUMNS + i * part;
            let (group, within) = (column / layout.group, column % layout.group);
            let (block, group) = (group / blocks.groups, group % blocks.groups);
            let first = (group * layout.group + within) / N::COLUMNS;
            // SAFETY: a group of the block and steps of it; lanes of a table.
            unsafe {
                let block = from.add(block * blocks.bytes);
                let scale = scale(panels, block, group);
                let bias = if layout.biased {
                    let from = block.add(blocks.at[BIASES] + group * layout.scale.size() * LANES);
                    quiet(scales::<Avx512>(layout.scale, true, from, block.wrapping_add(blocks.at[BIAS_STEPS])))
                } else {
                    _mm512_mul_ps(scale, _mm512_set1_ps(-layout.zero as f32))
                };
                for (step, to) in (first..).zip(to.chunks_exact_mut(2 * N::VECTORS)) {
                    let low = block.add(blocks.at[LOW] + step * N::LOW);
                    let high = block.add(blocks.at[HIGH] + N::high(step));
                    behind(low, N::LOW, true);
                    let vectors = self.vectors::<Avx512>(low, high, step);
                    for v in 0..N::VECTORS {
                        let lowest = _mm512_set1_epi32(255);
                        let mut of = [
                            _mm512_and_si512(vectors[v], lowest),
                            _mm512_and_si512(_mm512_srli_epi32::<8>(vectors[v]), lowest),
                            _mm512_and_si512(_mm512_srli_epi32::<16>(vectors[v]), lowest),
                            _mm512_srli_epi32::<24>(vectors[v]),
                        ];
                        for of in &mut of {
                            *of = _mm512_castps_si512(_mm512_fmadd_ps(_mm512_cvtepi32_ps(*of), scale, bias));
                        }
                        put(&mut to[2 * v], of[0], of[1]);
                        put(&mut to[2 * v + 1], of[2], of[3]);
                    }
                }
            }
        }
    }
}

/// Eight-bit floats.
#[derive(Clone, Copy)]
pub(super) struct E4m3;

impl Open for E4m3 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi")]
    unsafe fn open(self, panels: &View<'_>, from: *const u8, step: usize, to: &mut Tile) {
        let View { layout, blocks, .. } = panels;
        let (table, group) = (Table::new(), step * COLUMNS / layout.group);
        let (block, column) = (group / blocks.groups, step * COLUMNS % (blocks.groups * layout.group));
        // SAFETY: groups are whole tiles, of which this is one of the block's.
        unsafe {
            let block = from.add(block * blocks.bytes);
            let scale = scale(panels, block, group % blocks.groups);
            let low = block.add(blocks.at[LOW] + column * LANES);
            behind(low, COLUMNS * LANES, true);
            for (i, lines) in to.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                // Columns 0 and 2, and 1 and 3.
                let [even, odd] = table.open(_mm512_loadu_si512(low.add(64 * i).cast()));
                let upper = _mm512_set1_epi32(i32::MIN >> 15);
                let first = [_mm512_slli_epi32::<16>(even), _mm512_and_si512(even, upper)];
                let second = [_mm512_slli_epi32::<16>(odd), _mm512_and_si512(odd, upper)];
                for k in 0..2 {
                    let first = _mm512_mul_ps(_mm512_castsi512_ps(first[k]), scale);
                    let second = _mm512_mul_ps(_mm512_castsi512_ps(second[k]), scale);
                    put(&mut lines[k], _mm512_castps_si512(first), _mm512_castps_si512(second));
                }
            }
        }
    }
}

/// What a step of a group's numbers is worth.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn scale(View { layout, blocks, .. }: &View<'_>, block: *const u8, group: usize) -> __m512 {
    // SAFETY: the caller vouches for the group.
    unsafe {
        let from = block.add(blocks.at[SCALES] + group * layout.scale.size() * LANES);
        let scale = quiet(scales::<Avx512>(layout.scale, false, from, block.wrapping_add(blocks.at[STEPS])));
        _mm512_mul_ps(scale, _mm512_set1_ps(layout.unit))
    }
}

/// What is no number as one that `put` cannot round to another.
#[inline]
#[target_feature(enable = "avx512f")]
fn quiet(v: __m512) -> __m512 {
    _mm512_mask_mov_ps(v, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(v, v), _mm512_set1_ps(f32::NAN))
}

/// Two columns of sixteen rows, rounded to bfloat16, as pairs: by hand, which takes half as long as the instruction that rounds and the one
/// that would have to pair.
#[inline]
#[target_feature(enable = "avx512f")]
fn put(line: &mut Line, first: __m512i, second: __m512i) {
    let (half, upper) = (_mm512_set1_epi32(0x8000), _mm512_set1_epi32(i32::MIN >> 15));
    let first = _mm512_srli_epi32::<16>(_mm512_add_epi32(first, half));
    // a | b & c
    let pairs = _mm512_ternarylogic_epi32::<0b1111_1000>(first, _mm512_add_epi32(second, half), upper);
    // SAFETY: a line of 64 bytes.
    unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), pairs) };
}

/// Some panels and tiles of their columns.
pub(super) struct Part {
    pub(super) panels: Range<usize>,
    pub(super) steps: Range<usize>,
}

/// A part that is opened bit by bit.
pub(super) struct Opening<'a> {
    panels: &'a View<'a>,
    part: Part,
    /// Its first panel.
    from: *const u8,
    to: &'a mut [Tile],
    /// Panel and step that come next.
    at: (usize, usize),
    /// In how many bursts all are to be, and what of a tile is due.
    bursts: usize,
    due: usize,
}

impl<'a> Opening<'a> {
    /// All of a part, tile after tile, in so many bursts.
    pub(super) fn new(panels: &'a View<'a>, part: Part, to: &'a mut [Tile], bursts: usize) -> Self {
        let from = panels.panel(part.panels.start).as_ptr();
        Self { panels, part, from, to, at: (0, 0), bursts, due: 0 }
    }

    /// As many tiles as fall on a burst.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx512vbmi")]
    pub(super) unsafe fn burst(&mut self, open: impl Open) {
        let Self { panels, part: Part { panels: of, steps }, .. } = self;
        self.due += of.len() * steps.len();
        while self.due >= self.bursts {
            self.due -= self.bursts;
            let (panel, step) = self.at;
            // SAFETY: passed on to the caller; bursts are as many as were announced, and so no tile comes after the last.
            unsafe {
                let from = self.from.add(panel * panels.blocks.count * panels.blocks.bytes);
                open.open(panels, from, steps.start + step, &mut self.to[panel * steps.len() + step]);
            }
            self.at = if step + 1 < steps.len() { (panel, step + 1) } else { (panel + 1, 0) };
        }
    }
}
