//! Sixteen rows' strips -> a panel: piece by piece, the first of every row, then the second. Words are turned sixteen by sixteen in
//! registers where they are as long as a vector, which costs less than to read them.

use super::{
    LANES,
    layout::{Blocks, LOW, Layout, SCALES, STRIPS},
    opened::Strips,
};
#[cfg(target_arch = "x86_64")]
use crate::kernels::cpu::turned::turned;
use crate::kernels::cpu::{format::Format, matrix::Matrix};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Bytes of a vector.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Rows 16 p and on of a matrix. Where there are fewer than sixteen, the last one stands for those that are missing.
pub(super) fn pack_panel(
    layout: &Layout,
    blocks: &Blocks,
    matrix: &Matrix,
    p: usize,
    strips: &mut [Strips; LANES],
    panel: &mut [u8],
) {
    #[cfg(target_arch = "x86_64")]
    if layout.format == Format::Q8_0 && is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has the instructions.
        return unsafe { turn_q8_0(blocks, matrix, p, panel) };
    }
    let mut rows = [[&[][..]; LANES]; STRIPS];
    for (lane, strips) in strips.iter_mut().enumerate() {
        let row = matrix.row_parts((p * LANES + lane).min(matrix.rows() - 1));
        for (kind, strip) in strips.of(layout, row).into_iter().enumerate() {
            rows[kind][lane] = strip;
        }
    }
    for (kind, (rows, piece)) in
        rows.iter().zip(layout.pieces()).enumerate().filter(|&(kind, _)| blocks.strips[kind] > 0)
    {
        let to = To { at: blocks.at[kind], size: blocks.strips[kind], of_block: blocks.bytes, panel };
        match piece {
            1 => to.scatter::<1>(rows),
            2 => to.scatter::<2>(rows),
            #[cfg(target_arch = "x86_64")]
            _ if is_x86_feature_detected!("avx512f") => {
                // SAFETY: the processor has the instructions.
                unsafe { to.turn(rows) }
            }
            _ => to.scatter::<4>(rows),
        }
    }
}

/// Where strips of one kind go.
struct To<'a> {
    panel: &'a mut [u8],
    /// Bytes of a block.
    of_block: usize,
    /// Where the strips begin in each block.
    at: usize,
    /// Bytes of a row's strip in each block.
    size: usize,
}

impl To<'_> {
    /// Piece i of each row to that row's lane of piece i.
    fn scatter<const SIZE: usize>(self, rows: &[&[u8]; LANES]) {
        let (pieces, rows) = (self.size / SIZE, rows.map(|row| row.as_chunks::<SIZE>().0));
        for (b, block) in self.panel.chunks_exact_mut(self.of_block).enumerate() {
            let (to, _) = block[self.at..].as_chunks_mut::<SIZE>();
            for (i, lanes) in to.as_chunks_mut::<LANES>().0.iter_mut().take(pieces).enumerate() {
                for lane in 0..LANES {
                    lanes[lane] = rows[lane][b * pieces + i];
                }
            }
        }
    }

    /// The same for words of four bytes.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    fn turn(self, rows: &[&[u8]; LANES]) {
        let words = self.panel.len() / self.of_block * self.size / 4;
        assert!(rows.iter().all(|row| row.len() >= 4 * words), "strips of {words} words");
        let mut blocks = self.panel.chunks_exact_mut(self.of_block);
        let mut lines = [].iter_mut();
        for first in (0..words).step_by(LANES) {
            let count = LANES.min(words - first);
            let mut v = [_mm512_setzero_si512(); LANES];
            for (v, row) in v.iter_mut().zip(rows) {
                // SAFETY: as many words as the row has left, sixteen at most.
                *v = unsafe {
                    _mm512_maskz_loadu_epi32((u32::MAX >> (32 - count)) as u16, row.as_ptr().add(4 * first).cast())
                };
            }
            for column in &turned(v)[..count] {
                let line = lines.next().or_else(|| {
                    let block = blocks.next()?;
                    lines = block[self.at..][..self.size / 4 * LINE].as_chunks_mut::<LINE>().0.iter_mut();
                    lines.next()
                });
                if let Some(line) = line {
                    // SAFETY: a line of 64 bytes.
                    unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), *column) };
                }
            }
        }
    }
}

/// The same for Q8_0, the most common of those whose scales lie among their numbers, without a strip of either: blocks of an f16 and 32
/// signed bytes, which come out with 128 added, two at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn turn_q8_0(blocks: &Blocks, matrix: &Matrix, p: usize, panel: &mut [u8]) {
    const BLOCK: usize = 34;
    const LINES: usize = 8;
    let row = |lane: usize| matrix.row_parts((p * LANES + lane).min(matrix.rows() - 1))[0].as_chunks::<BLOCK>().0;
    let rows: [&[[u8; BLOCK]]; LANES] = std::array::from_fn(row);
    let count = rows[0].len();
    let place = |i: usize| (i / blocks.groups * blocks.bytes, i % blocks.groups);
    for first in (0..count).step_by(2) {
        let mut v = [_mm512_setzero_si512(); LANES];
        for (v, row) in v.iter_mut().zip(rows) {
            let half = |i: usize| {
                let numbers: &[u8; 32] = row[i][2..].first_chunk().unwrap_or(&[0; 32]);
                // SAFETY: 32 bytes.
                unsafe { _mm256_loadu_si256(numbers.as_ptr().cast()) }
            };
            // The last one may be alone.
            let both = _mm512_castsi256_si512(half(first));
            *v = _mm512_inserti64x4::<1>(both, half((first + 1).min(count - 1)));
            *v = _mm512_xor_si512(*v, _mm512_set1_epi32(i32::from_le_bytes([0x80; 4])));
        }
        let v = turned(v);
        for i in first..count.min(first + 2) {
            let (block, group) = place(i);
            let to = &mut panel[block + blocks.at[LOW] + group * LINES * LINE..][..LINES * LINE];
            for (line, v) in to.as_chunks_mut::<LINE>().0.iter_mut().zip(&v[(i - first) * LINES..]) {
                // SAFETY: a line of 64 bytes.
                unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), *v) };
            }
            let to = &mut panel[block + blocks.at[SCALES] + group * 2 * LANES..][..2 * LANES];
            for (to, row) in to.as_chunks_mut::<2>().0.iter_mut().zip(rows) {
                *to = [row[i][0], row[i][1]];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_that_are_turned_lie_where_words_lie_that_are_scattered() {
        for (size, count) in [(4, 1), (8, 3), (16, 5), (32, 2), (64, 9), (96, 1), (128, 4)] {
            let strip =
                |lane: usize| (0..size * count).map(|i| (i * 31 + lane * 7 + i / 256) as u8).collect::<Vec<u8>>();
            let strips: Vec<_> = (0..LANES).map(strip).collect();
            let rows: [&[u8]; LANES] = std::array::from_fn(|lane| &strips[lane][..]);
            let made = |turned: bool| {
                let (at, of_block) = (32, size * LANES + 64);
                let mut panel = vec![0; count * of_block];
                let to = To { panel: &mut panel, of_block, at, size };
                match turned {
                    #[cfg(target_arch = "x86_64")]
                    // SAFETY: the processor has the instructions.
                    true if is_x86_feature_detected!("avx512f") => unsafe { to.turn(&rows) },
                    _ => to.scatter::<4>(&rows),
                }
                panel
            };
            let panel = made(true);
            assert!(panel == made(false), "{count} blocks of {size} bytes a row");
            assert_eq!(panel[32..36], strips[0][..4], "the first word of the first row");
            assert_eq!(panel[36..40], strips[1][..4], "and of the second");
        }
    }
}
