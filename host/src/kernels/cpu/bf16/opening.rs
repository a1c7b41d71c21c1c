//! Rows that are coded, opened: in registers where few tokens wait for memory, into cache where more pass.

use super::{
    LANES, LEAST, Line, flat, halves,
    product::{Product, added_up},
};
use crate::kernels::cpu::coded::{CHUNK, CODED, Code, Plain};
use std::{arch::x86_64::*, ops::Range};

/// Vectors of a chunk's columns.
const VECTORS: usize = CHUNK / LANES;
/// Rows at a time.
const ROWS: usize = 4;
/// What is no column.
const NONE: usize = usize::MAX;

/// A product of coded weights.
pub(super) struct Opening<'a> {
    /// Its `weights` are codes.
    pub(super) product: Product,
    pub(super) code: &'a Code,
}

impl Opening<'_> {
    /// Up to [`FEW`](super::FEW) tokens.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    pub(super) unsafe fn few(self, range: Range<usize>, room: &mut Vec<Line>) {
        for r in range.clone().step_by(ROWS) {
            let rows = r..range.end.min(r + ROWS);
            // SAFETY: passed on to the caller.
            unsafe {
                match (self.product.tokens, rows.len()) {
                    (1, ROWS) => self.four::<1>(r),
                    (2, ROWS) => self.four::<2>(r),
                    (3, ROWS) => self.four::<3>(r),
                    (LEAST, ROWS) => self.four::<LEAST>(r),
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
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vbmi")]
    unsafe fn open(&self, r: usize, to: &mut [u16]) {
        let mut row = self.row(r);
        let (chunks, left) = to.as_chunks_mut::<CHUNK>();
        // SAFETY: chunks of the row, and behind them the columns that are left over.
        unsafe {
            for (i, to) in chunks.iter_mut().enumerate() {
                let opened = if i * CHUNK == row.next { row.plain_chunk() } else { row.chunk() };
                for (v, opened) in opened.into_iter().enumerate() {
                    _mm512_storeu_si512(to.as_mut_ptr().add(v * LANES).cast(), opened);
                }
            }
            std::ptr::copy_nonoverlapping(row.from, left.as_mut_ptr().cast(), 2 * left.len());
        }
    }

    /// Four rows with `T` tokens, one row after the other: see [`Product`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn four<const T: usize>(&self, r: usize) {
        let Product { x, stride, cols, out, rows, .. } = self.product;
        let (mut sums, whole) = ([[_mm512_setzero_ps(); 4]; T], cols / CHUNK * CHUNK);
        // SAFETY: rows of the matrix and tokens of `x`; what lies beyond the last column is masked away.
        unsafe {
            let tokens: [*const u16; T] = std::array::from_fn(|k| x.add(k * stride));
            for i in 0..4 {
                let (mut row, mut sum, mut c) = (self.row(r + i), [_mm512_setzero_ps(); T], 0);
                while c < whole {
                    // A loop of its own for what nearly all chunks are: it stays in registers.
                    let stop = row.next.min(whole);
                    while c < stop {
                        add_products(&mut sum, row.chunk(), tokens.map(|x| x.add(c)));
                        c += CHUNK;
                    }
                    if c < whole {
                        add_products(&mut sum, row.plain_chunk(), tokens.map(|x| x.add(c)));
                        c += CHUNK;
                    }
                }
                for c in (whole..cols).step_by(LANES) {
                    let mask = u32::MAX >> (LANES - (cols - c).min(LANES));
                    let w = halves(_mm512_maskz_loadu_epi16(mask, row.from.add(2 * (c - whole)).cast()));
                    for k in 0..T {
                        let x = halves(_mm512_maskz_loadu_epi16(mask, tokens[k].add(c).cast()));
                        sum[k] = _mm512_dpbf16_ps(sum[k], w, x);
                    }
                }
                (0..T).for_each(|k| sums[k][i] = sum[k]);
            }
            for k in 0..T {
                _mm_storeu_ps(out.pointer().add(k * rows + r), added_up(sums[k]));
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn row(&self, r: usize) -> Row<'_> {
        // SAFETY: sixteen bytes.
        let uppers = unsafe { _mm512_broadcast_i32x4(_mm_loadu_si128(self.code.uppers.as_ptr().cast())) };
        let from = self.product.weights.cast::<u8>().wrapping_add(r * self.product.pitch);
        let mut row = Row { from, uppers, plain: self.code.plain(r), next: 0 };
        row.look();
        row
    }
}

/// What is still to come of a row.
struct Row<'a> {
    from: *const u8,
    /// Four times: of an index that chooses among 64 bytes, the lowest four bits count.
    uppers: __m512i,
    plain: &'a [Plain],
    /// The column that the first of them begins with.
    next: usize,
}

impl Row<'_> {
    fn look(&mut self) {
        self.next = self.plain.first().map_or(NONE, |plain| plain.column);
    }

    /// The next chunk's columns in order, from their codes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    unsafe fn chunk(&mut self) -> [__m512i; VECTORS] {
        // SAFETY: the caller vouches for the chunk.
        let [low, more, codes] = unsafe { [0, 1, 2].map(|i| _mm512_loadu_si512(self.from.add(64 * i).cast())) };
        self.from = self.from.wrapping_add(CODED);
        let upper = _mm512_permutexvar_epi8(codes, self.uppers);
        let upper_of_more = _mm512_permutexvar_epi8(_mm512_srli_epi16::<4>(codes), self.uppers);
        [
            _mm512_unpacklo_epi8(low, upper),
            _mm512_unpackhi_epi8(low, upper),
            _mm512_unpacklo_epi8(more, upper_of_more),
            _mm512_unpackhi_epi8(more, upper_of_more),
        ]
    }

    /// The next chunk's columns, where it is the `next` plain one.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn plain_chunk(&mut self) -> [__m512i; VECTORS] {
        let Some((plain, others)) = self.plain.split_first() else { return [_mm512_setzero_si512(); VECTORS] };
        self.plain = others;
        self.look();
        self.from = self.from.wrapping_add(CODED);
        // SAFETY: vectors of a chunk.
        std::array::from_fn(|v| unsafe { _mm512_loadu_si512(plain.bytes.as_ptr().add(64 * v).cast()) })
    }
}

/// A chunk's weights times those columns of some tokens.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn add_products<const T: usize>(sums: &mut [__m512; T], weights: [__m512i; VECTORS], x: [*const u16; T]) {
    for k in 0..T {
        for v in 0..VECTORS {
            // SAFETY: the caller vouches for the tokens' columns.
            let x = unsafe { _mm512_loadu_si512(x[k].add(v * LANES).cast()) };
            sums[k] = _mm512_dpbf16_ps(sums[k], halves(weights[v]), halves(x));
        }
    }
}
