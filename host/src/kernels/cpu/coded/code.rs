//! Rows of bfloat16 -> their codes and back. Of each 128 columns come 128 lower bytes, then 64 bytes of two codes each; columns that are left
//! over stay as they are. Bytes lie as `vpunpcklbw` and `vpunpckhbw` of lower and upper ones bring them into order again.

use crate::{
    kernels::cpu::{format::Float, matrix::Matrix},
    weights::bytes::{Bytes, Room},
};
use rayon::prelude::*;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Columns that are coded together.
pub(in crate::kernels::cpu) const CHUNK: usize = 128;
/// Lower bytes of these; codes follow.
pub(in crate::kernels::cpu) const LOW: usize = CHUNK;
/// Bytes they take.
const CODED: usize = LOW + CHUNK / 2;
/// One stray in so many weights is too many.
const RARE: usize = 256;
/// Rows that tell what upper bytes are frequent.
const SAMPLE: usize = 256;
/// Bytes that are coded before their pages are let go.
const AT_ONCE: usize = 16 << 20;
/// What no code stands for, and codes are not.
const NONE: u8 = 0x80;

/// A matrix in codes.
pub(in crate::kernels::cpu) struct Code {
    cols: usize,
    /// The upper byte that each code stands for.
    pub(in crate::kernels::cpu) uppers: [u8; 16],
    bytes: Room,
    /// Where the strays of each row begin, and behind the last.
    starts: Vec<u32>,
    strays: Vec<Stray>,
}

/// A weight whose upper byte has no code.
#[derive(Clone, Copy)]
pub(in crate::kernels::cpu) struct Stray {
    pub(in crate::kernels::cpu) column: u32,
    pub(in crate::kernels::cpu) upper: u8,
}

/// Bytes of a row.
fn row_bytes(cols: usize) -> usize {
    cols / CHUNK * CODED + cols % CHUNK * 2
}

/// Where the lower byte of a column of a chunk is, where its code, and how far that is shifted.
fn place(column: usize) -> (usize, usize, u32) {
    let (half, vector, lane, i) = (column / 64, column / 32 % 2, column / 8 % 4, column % 8);
    let byte = lane * 16 + vector * 8 + i;
    (half * 64 + byte, LOW + byte, 4 * half as u32)
}

impl Code {
    /// A matrix of bfloat16, whose own pages are let go; `None` if it has too many strays. Fails where there is no memory for it.
    pub(super) fn of(matrix: &Matrix) -> std::io::Result<Option<Self>> {
        let (rows, cols, size) = (matrix.rows(), matrix.cols(), row_bytes(matrix.cols()));
        let uppers = frequent(matrix);
        let mut codes = [NONE; 256];
        // Of an upper byte that stands there twice, for want of others, the first code counts.
        uppers.iter().enumerate().rev().for_each(|(code, &upper)| codes[usize::from(upper)] = code as u8);
        let (mut bytes, mut strays, mut counts) = (Room::new(rows * size)?, Vec::new(), vec![0u32; rows]);
        let at_once = (AT_ONCE / (2 * cols)).max(1);
        for (i, (some, counts)) in bytes.chunks_mut(at_once * size).zip(counts.chunks_mut(at_once)).enumerate() {
            let first = i * at_once;
            let each = some.par_chunks_exact_mut(size).zip(counts).enumerate().map(|(r, (to, count))| {
                let mut strays = Vec::new();
                encode(matrix.row_parts(first + r)[0], &codes, to, &mut strays);
                *count = strays.len() as u32;
                strays
            });
            let found: Vec<Vec<Stray>> = each.collect();
            strays.extend(found.into_iter().flatten());
            if strays.len() > rows * cols / RARE {
                return Ok(None);
            }
            if let Some(done) = matrix.slice_rows(first..rows.min(first + at_once)) {
                done.parts().iter().for_each(Bytes::let_go);
            }
        }
        let starts = std::iter::once(0).chain(counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        }));
        Ok(Some(Self { cols, uppers, bytes, starts: starts.collect(), strays }))
    }

    /// All rows.
    pub(in crate::kernels::cpu) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes from one row to the next.
    pub(in crate::kernels::cpu) fn pitch(&self) -> usize {
        row_bytes(self.cols)
    }

    /// A row's strays, by column.
    #[inline(always)]
    pub(in crate::kernels::cpu) fn strays(&self, row: usize) -> &[Stray] {
        &self.strays[self.starts[row] as usize..self.starts[row + 1] as usize]
    }

    /// A row in f32.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let (chunks, left) = self.bytes[row * self.pitch()..][..self.pitch()].split_at(self.cols / CHUNK * CODED);
        let number = |low: u8, upper: u8| Float::BF16.read(&[low, upper]);
        for (chunk, out) in chunks.chunks_exact(CODED).zip(out.chunks_exact_mut(CHUNK)) {
            for (column, out) in out.iter_mut().enumerate() {
                let (low, code, shift) = place(column);
                *out = number(chunk[low], self.uppers[usize::from(chunk[code] >> shift & 15)]);
            }
        }
        let whole = self.cols / CHUNK * CHUNK;
        out[whole..].iter_mut().zip(left.as_chunks::<2>().0).for_each(|(out, &[low, upper])| *out = number(low, upper));
        for stray in self.strays(row) {
            let column = stray.column as usize;
            let low = chunks[column / CHUNK * CODED + place(column % CHUNK).0];
            out[column] = number(low, stray.upper);
        }
    }
}

/// The sixteen most frequent upper bytes of some rows.
fn frequent(matrix: &Matrix) -> [u8; 16] {
    let mut counts = [0usize; 256];
    for row in (0..matrix.rows()).step_by(matrix.rows().div_ceil(SAMPLE).max(1)) {
        matrix.row_parts(row)[0].as_chunks::<2>().0.iter().for_each(|&[_, upper]| counts[usize::from(upper)] += 1);
    }
    let mut uppers: [u8; 256] = std::array::from_fn(|upper| upper as u8);
    uppers.sort_by_key(|&upper| std::cmp::Reverse(counts[usize::from(upper)]));
    std::array::from_fn(|code| uppers[code])
}

/// A row of bfloat16 to `to`.
fn encode(row: &[u8], codes: &[u8; 256], to: &mut [u8], strays: &mut Vec<Stray>) {
    let (chunks, left) = row.as_chunks::<{ 2 * CHUNK }>();
    let (coded, rest) = to.split_at_mut(chunks.len() * CODED);
    rest.copy_from_slice(left);
    #[cfg(target_arch = "x86_64")]
    let fast = is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vbmi");
    for (i, (chunk, to)) in chunks.iter().zip(coded.as_chunks_mut::<CODED>().0).enumerate() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has the instructions.
        if fast && unsafe { encode_chunk(chunk, codes, to) } {
            continue;
        }
        to[LOW..].fill(0);
        for (column, &[low, upper]) in chunk.as_chunks::<2>().0.iter().enumerate() {
            let (at, code_at, shift) = place(column);
            to[at] = low;
            match codes[usize::from(upper)] {
                NONE => strays.push(Stray { column: (i * CHUNK + column) as u32, upper }),
                code => to[code_at] |= code << shift,
            }
        }
    }
}

/// A chunk without strays; says whether it is one.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn encode_chunk(chunk: &[u8; 2 * CHUNK], codes: &[u8; 256], to: &mut [u8; CODED]) -> bool {
    // SAFETY: vectors of these very arrays.
    unsafe {
        let table: [__m512i; 4] = std::array::from_fn(|i| _mm512_loadu_si512(codes.as_ptr().add(64 * i).cast()));
        let words: [__m512i; 4] = std::array::from_fn(|i| _mm512_loadu_si512(chunk.as_ptr().add(64 * i).cast()));
        let lowest = _mm512_set1_epi16(255);
        let mut found = [_mm512_setzero_si512(); 2];
        for (half, pair) in words.as_chunks::<2>().0.iter().enumerate() {
            let low = pair.map(|words| _mm512_and_si512(words, lowest));
            let upper = pair.map(|words| _mm512_srli_epi16::<8>(words));
            _mm512_storeu_si512(to.as_mut_ptr().add(64 * half).cast(), _mm512_packus_epi16(low[0], low[1]));
            let upper = _mm512_packus_epi16(upper[0], upper[1]);
            let positive = _mm512_permutex2var_epi8(table[0], upper, table[1]);
            let negative = _mm512_permutex2var_epi8(table[2], upper, table[3]);
            found[half] = _mm512_mask_blend_epi8(_mm512_movepi8_mask(upper), positive, negative);
        }
        let strays = _mm512_movepi8_mask(_mm512_or_si512(found[0], found[1]));
        let both = _mm512_or_si512(found[0], _mm512_slli_epi16::<4>(found[1]));
        _mm512_storeu_si512(to.as_mut_ptr().add(LOW).cast(), both);
        strays == 0
    }
}
