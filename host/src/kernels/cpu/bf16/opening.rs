//! Rows that are coded, opened: in registers where few tokens wait for memory, into cache where more pass.

use super::{
    LANES, LEAST, Line, flat, halves,
    product::{Product, added_up},
};
use crate::kernels::cpu::coded::{CHUNK, Code, LOW};
use std::{arch::x86_64::*, ops::Range};

/// Vectors of a chunk's columns.
const VECTORS: usize = CHUNK / LANES;

/// A product of coded weights.
pub(super) struct Opening<'a> {
    /// Its `weights` mean nothing.
    pub(super) product: Product,
    pub(super) code: &'a Code,
}

impl Opening<'_> {
    /// Up to [`FEW`](super::FEW) tokens.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    pub(super) unsafe fn few(self, range: Range<usize>, room: &mut Vec<Line>) {
        for r in range.clone().step_by(4) {
            let rows = r..range.end.min(r + 4);
            // SAFETY: passed on to the caller.
            unsafe {
                match (self.product.tokens, rows.len()) {
                    (1, 4) => self.four::<1>(r),
                    (2, 4) => self.four::<2>(r),
                    (3, 4) => self.four::<3>(r),
                    (LEAST, 4) => self.four::<LEAST>(r),
                    _ => self.opened(rows.clone(), room).few(rows),
                }
            }
        }
    }

    /// The same product of some rows, which are opened into `room`.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    pub(super) unsafe fn opened(&self, rows: Range<usize>, room: &mut Vec<Line>) -> Product {
        let cols = self.product.cols;
        let lines = (rows.len() * cols).div_ceil(LANES);
        if room.len() < lines {
            room.resize(lines, Line([0; LANES]));
        }
        let to = flat(room);
        for (r, to) in rows.clone().zip(to.chunks_exact_mut(cols)) {
            // SAFETY: passed on to the caller.
            unsafe { self.open(r, to) };
        }
        Product { weights: to.as_ptr().wrapping_sub(rows.start * cols), ..self.product }
    }

    /// A row.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    unsafe fn open(&self, r: usize, to: &mut [u16]) {
        let from = self.row(r);
        let (chunks, left) = to.as_chunks_mut::<CHUNK>();
        // SAFETY: chunks of the row, and behind them the columns that are left over.
        unsafe {
            let uppers = self.uppers();
            for (i, to) in chunks.iter_mut().enumerate() {
                for (v, opened) in open(uppers, from.add(i * (LOW + CHUNK / 2))).into_iter().enumerate() {
                    _mm512_storeu_si512(to.as_mut_ptr().add(v * LANES).cast(), opened);
                }
            }
            let behind = from.add(chunks.len() * (LOW + CHUNK / 2));
            std::ptr::copy_nonoverlapping(behind, left.as_mut_ptr().cast(), 2 * left.len());
        }
        for stray in self.code.strays(r) {
            let word = &mut to[stray.column as usize];
            *word = *word & 0xff | u16::from(stray.upper) << 8;
        }
    }

    /// Four rows with `T` tokens, one row after the other: see [`Product`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn four<const T: usize>(&self, r: usize) {
        let Product { x, stride, cols, out, rows, .. } = self.product;
        let mut sums = [[_mm512_setzero_ps(); 4]; T];
        // SAFETY: rows of the matrix and tokens of `x`; what lies beyond the last column is masked away.
        unsafe {
            let (uppers, chunks) = (self.uppers(), cols / CHUNK);
            let tokens: [*const u16; T] = std::array::from_fn(|k| x.add(k * stride));
            for i in 0..4 {
                let (mut from, mut strays) = (self.row(r + i), self.code.strays(r + i));
                let mut chunk = 0;
                loop {
                    let stop = strays.first().map_or(chunks, |stray| stray.column as usize / CHUNK);
                    while chunk < stop {
                        let w = open(uppers, from);
                        for k in 0..T {
                            sums[k][i] = add_products(sums[k][i], w, tokens[k].add(chunk * CHUNK));
                        }
                        from = from.add(LOW + CHUNK / 2);
                        chunk += 1;
                    }
                    if chunk == chunks {
                        break;
                    }
                    let count = strays.iter().take_while(|stray| stray.column as usize / CHUNK == chunk).count();
                    let (here, others) = strays.split_at(count);
                    strays = others;
                    let mut words = [[0u16; LANES]; VECTORS];
                    for (word, opened) in words.iter_mut().zip(open(uppers, from)) {
                        _mm512_storeu_si512(word.as_mut_ptr().cast(), opened);
                    }
                    for stray in here {
                        let word = &mut words.as_flattened_mut()[stray.column as usize % CHUNK];
                        *word = *word & 0xff | u16::from(stray.upper) << 8;
                    }
                    let w = words.map(|words| _mm512_loadu_si512(words.as_ptr().cast()));
                    for k in 0..T {
                        sums[k][i] = add_products(sums[k][i], w, tokens[k].add(chunk * CHUNK));
                    }
                    from = from.add(LOW + CHUNK / 2);
                    chunk += 1;
                }
                for c in (chunks * CHUNK..cols).step_by(LANES) {
                    let mask = u32::MAX >> (LANES - (cols - c).min(LANES));
                    let w = halves(_mm512_maskz_loadu_epi16(mask, from.cast::<i16>().add(c - chunks * CHUNK)));
                    for k in 0..T {
                        let x = halves(_mm512_maskz_loadu_epi16(mask, tokens[k].add(c).cast()));
                        sums[k][i] = _mm512_dpbf16_ps(sums[k][i], w, x);
                    }
                }
            }
            for k in 0..T {
                _mm_storeu_ps(out.pointer().add(k * rows + r), added_up(sums[k]));
            }
        }
    }

    fn row(&self, r: usize) -> *const u8 {
        self.product.lying.wrapping_add(r * self.product.pitch)
    }

    /// The upper bytes four times: of an index that chooses among 64, the lowest four bits count.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn uppers(&self) -> __m512i {
        // SAFETY: sixteen bytes.
        unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(self.code.uppers.as_ptr().cast())) }
    }
}

/// A chunk's columns, in order.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
unsafe fn open(uppers: __m512i, from: *const u8) -> [__m512i; VECTORS] {
    // SAFETY: the caller vouches for the chunk.
    let [low, more, codes] = unsafe { [0, 1, 2].map(|i| _mm512_loadu_si512(from.add(64 * i).cast())) };
    let upper = _mm512_permutexvar_epi8(codes, uppers);
    let upper_of_more = _mm512_permutexvar_epi8(_mm512_srli_epi16::<4>(codes), uppers);
    [
        _mm512_unpacklo_epi8(low, upper),
        _mm512_unpackhi_epi8(low, upper),
        _mm512_unpacklo_epi8(more, upper_of_more),
        _mm512_unpackhi_epi8(more, upper_of_more),
    ]
}

/// Vectors of weights and as many of a token.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_products(mut sum: __m512, weights: [__m512i; VECTORS], x: *const u16) -> __m512 {
    for (i, w) in weights.into_iter().enumerate() {
        // SAFETY: the caller vouches for the token's columns.
        let x = unsafe { _mm512_loadu_si512(x.add(i * LANES).cast()) };
        sum = _mm512_dpbf16_ps(sum, halves(w), halves(x));
    }
    sum
}
