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
const LOW: usize = CHUNK;
/// Bytes they take.
pub(in crate::kernels::cpu) const CODED: usize = LOW + CHUNK / 2;
/// One chunk in so many may be plain: more of them take what codes save.
const RARE: usize = 8;
/// Rows that tell what upper bytes are frequent.
const SAMPLE: usize = 256;
/// Bytes that are coded before their pages are let go.
const AT_ONCE: usize = 16 << 20;
/// What stands for no code: these have four bits.
const NONE: u8 = 0x80;

/// A matrix in codes.
pub(in crate::kernels::cpu) struct Code {
    cols: usize,
    /// The upper byte that each code stands for.
    pub(in crate::kernels::cpu) uppers: [u8; 16],
    bytes: Room,
    /// Where each row's plain chunks begin, and behind the last.
    starts: Vec<usize>,
    plain: Vec<Plain>,
}

/// A chunk with an upper byte that has no code: what stands at its place in the row means nothing.
#[repr(C, align(64))]
pub(in crate::kernels::cpu) struct Plain {
    pub(in crate::kernels::cpu) bytes: [u8; 2 * CHUNK],
    /// Its first.
    pub(in crate::kernels::cpu) column: usize,
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
    /// A matrix of bfloat16, whose own pages are let go; `None` if that is not worth while. Fails where there is no memory for it.
    pub(super) fn of(matrix: &Matrix) -> std::io::Result<Option<Self>> {
        let (rows, cols, size) = (matrix.rows(), matrix.cols(), row_bytes(matrix.cols()));
        let uppers = frequent(matrix);
        let mut codes = [NONE; 256];
        uppers.iter().enumerate().for_each(|(code, &upper)| codes[usize::from(upper)] = code as u8);
        let (mut bytes, mut plain, mut starts) = (Room::new(rows * size)?, Vec::new(), vec![0]);
        let at_once = (AT_ONCE / (2 * cols)).max(1);
        for (i, some) in bytes.chunks_mut(at_once * size).enumerate() {
            let first = i * at_once;
            let each = some.par_chunks_exact_mut(size).enumerate();
            let found: Vec<Vec<Plain>> =
                each.map(|(r, to)| encode(matrix.row_parts(first + r)[0], &codes, to)).collect();
            for row in found {
                plain.extend(row);
                starts.push(plain.len());
            }
            if plain.len() > rows * (cols / CHUNK) / RARE {
                return Ok(None);
            }
            if let Some(done) = matrix.slice_rows(first..rows.min(first + at_once)) {
                done.parts().iter().for_each(Bytes::let_go);
            }
        }
        Ok(Some(Self { cols, uppers, bytes, starts, plain }))
    }

    /// All rows.
    pub(in crate::kernels::cpu) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes from one row to the next.
    pub(in crate::kernels::cpu) fn pitch(&self) -> usize {
        row_bytes(self.cols)
    }

    /// A row's plain chunks, in order.
    #[inline(always)]
    pub(in crate::kernels::cpu) fn plain(&self, row: usize) -> &[Plain] {
        &self.plain[self.starts[row]..self.starts[row + 1]]
    }

    /// A row in f32.
    pub(super) fn row(&self, row: usize, out: &mut [f32]) {
        let (chunks, left) = self.bytes[row * self.pitch()..][..self.pitch()].split_at(self.cols / CHUNK * CODED);
        let number = |low: u8, upper: u8| Float::BF16.read(&[low, upper]);
        let words = |out: &mut [f32], bytes: &[u8]| {
            out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(out, &[low, upper])| *out = number(low, upper));
        };
        let (wholes, rest) = out.as_chunks_mut::<CHUNK>();
        for (chunk, out) in chunks.as_chunks::<CODED>().0.iter().zip(&mut *wholes) {
            for (column, out) in out.iter_mut().enumerate() {
                let (low, code, shift) = place(column);
                *out = number(chunk[low], self.uppers[usize::from(chunk[code] >> shift & 15)]);
            }
        }
        self.plain(row).iter().for_each(|plain| words(&mut wholes[plain.column / CHUNK], &plain.bytes));
        words(rest, left);
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

/// A row of bfloat16 to `to`; gives back its plain chunks.
fn encode(row: &[u8], codes: &[u8; 256], to: &mut [u8]) -> Vec<Plain> {
    let (chunks, left) = row.as_chunks::<{ 2 * CHUNK }>();
    let (coded, rest) = to.split_at_mut(chunks.len() * CODED);
    rest.copy_from_slice(left);
    let mut plain = Vec::new();
    for (i, (chunk, to)) in chunks.iter().zip(coded.as_chunks_mut::<CODED>().0).enumerate() {
        if !encode_chunk(chunk, codes, to) {
            plain.push(Plain { bytes: *chunk, column: i * CHUNK });
        }
    }
    plain
}

/// Says whether all upper bytes have codes.
fn encode_chunk(chunk: &[u8; 2 * CHUNK], codes: &[u8; 256], to: &mut [u8; CODED]) -> bool {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vbmi") {
        // SAFETY: the processor has the instructions.
        return unsafe { encode_in_vectors(chunk, codes, to) };
    }
    encode_in_bytes(chunk, codes, to)
}

fn encode_in_bytes(chunk: &[u8; 2 * CHUNK], codes: &[u8; 256], to: &mut [u8; CODED]) -> bool {
    to[LOW..].fill(0);
    let mut found = 0;
    for (column, &[low, upper]) in chunk.as_chunks::<2>().0.iter().enumerate() {
        let ((at, code_at, shift), code) = (place(column), codes[usize::from(upper)]);
        to[at] = low;
        to[code_at] |= code << shift;
        found |= code;
    }
    found < NONE
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn encode_in_vectors(chunk: &[u8; 2 * CHUNK], codes: &[u8; 256], to: &mut [u8; CODED]) -> bool {
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
        let both = _mm512_or_si512(found[0], _mm512_slli_epi16::<4>(found[1]));
        _mm512_storeu_si512(to.as_mut_ptr().add(LOW).cast(), both);
        _mm512_movepi8_mask(_mm512_or_si512(found[0], found[1])) == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::cpu::format::Format;

    #[test]
    fn vectors_code_as_single_bytes_do() {
        let uppers: [u8; 16] = std::array::from_fn(|i| (i as u8 / 2 + 0x38) | (i as u8 % 2) << 7);
        let mut codes = [NONE; 256];
        uppers.iter().enumerate().for_each(|(code, &upper)| codes[usize::from(upper)] = code as u8);
        let mut chunk: [u8; 2 * CHUNK] =
            std::array::from_fn(|i| if i % 2 == 0 { (i * 37) as u8 } else { uppers[i * 5 / 2 % 16] });
        for stray in [None, Some(0), Some(77), Some(127)] {
            if let Some(column) = stray {
                chunk[2 * column + 1] = 0x7f;
            }
            let (mut want, mut got) = ([0; CODED], [0; CODED]);
            let clean = encode_in_bytes(&chunk, &codes, &mut want);
            assert_eq!(clean, stray.is_none());
            assert_eq!(encode_chunk(&chunk, &codes, &mut got), clean);
            assert!(!clean || got == want);
        }
    }

    #[test]
    fn rows_come_back_bit_for_bit_on_every_machine() {
        let (rows, cols) = (20, 400);
        // Sixteen upper bytes, and now and then another.
        let number = |i: usize| if i % 2300 == 5 { 0x7f00 } else { 0x3000 + (i * 7 % 0x1000) as u16 };
        let bytes: Vec<u8> = (0..rows * cols).flat_map(|i| number(i).to_le_bytes()).collect();
        let matrix = Matrix::new(Format::Dense(Float::BF16), rows, cols, bytes.into(), None, None).unwrap();
        let code = Code::of(&matrix).unwrap().unwrap();
        assert!(!code.plain.is_empty());
        for r in 0..rows {
            let mut row = vec![0.0; cols];
            code.row(r, &mut row);
            assert!(
                row.iter().enumerate().all(|(c, x)| x.to_bits() == u32::from(number(r * cols + c)) << 16),
                "row {r}"
            );
        }
    }
}
