//! Panels of eight-bit floats (E4M3) with few tokens, 32 products an instruction and two a lane (`vdpbf16ps`): bytes become bfloat16 by two
//! tables of 128, which is exact, activations are rounded to it, half a unit in their eighth bit, and 32 columns' sum meets their scale in f32.
//! More tokens have their weights opened (`broadcast`).
//!
//! Four columns of a row are a pair of even ones and one of odd ones, so that shifts of 16 bits part them. A token's bits are the same alone,
//! among few and on any number of threads.

use super::{
    LANES,
    layout::{LOW, SCALES},
    lying::{Source, Turn, View},
    scales::scales,
    sixteen::Avx512,
};
use crate::kernels::cpu::{
    ahead::fetch_near,
    bf16,
    dequantize::e4m3_to_f32,
    tasks::{Output, by_list, in_streams},
    team::each_chunk,
    unwritten::unwritten,
};
use std::{arch::x86_64::*, ops::Range};

/// Tokens that are worth a task of their own to be rounded.
const ROUNDED: usize = 16;
/// Columns whose products are added up before they meet a scale; groups are multiples of it.
const COLUMNS: usize = 32;
/// A cache line of panels: four columns.
const LINE: usize = 64;

/// Whether this machine has the instructions.
pub(super) fn runs_here() -> bool {
    bf16::runs_here() && is_x86_feature_detected!("avx512vbmi")
}

/// out = x · Wᵀ for each of `of`, which come from `sources`, all of the same columns: `x` is `[tokens, cols]`, an `out` `[tokens, rows]`.
pub(super) fn multiply(of: &[View], sources: &[Source], outs: impl Iterator<Item = Output>, x: &[f32]) {
    let Some(first) = of.first() else { return };
    let (cols, tokens) = (first.cols, x.len() / first.cols);
    // SAFETY: `round` writes all columns of all tokens.
    let mut halves = unsafe { unwritten::<u16>(tokens * cols) };
    each_chunk(&mut halves, cols * ROUNDED, |i, halves| {
        for (to, x) in halves.chunks_exact_mut(cols).zip(x.chunks_exact(cols).skip(i * ROUNDED)) {
            // SAFETY: `runs_here`; columns are a multiple of 32.
            unsafe { round(x, to) };
        }
    });
    let products: Vec<Product> =
        of.iter().zip(outs).map(|(panels, out)| Product { panels, x: &halves, tokens, out }).collect();
    let lengths = || products.iter().map(|p| p.panels.rows.div_ceil(LANES));
    let (panels, size) = (lengths().sum(), LANES * cols * tokens);
    in_streams(panels, size, if tokens > 4 { 1 } else { 4 }, |turn: &mut Turn, range| {
        by_list(range, lengths(), |i, range| {
            sources[i].each(products[i].panels, range, 1, turn, |panels, range| {
                // SAFETY: panels that there are; tasks write disjoint rows of the output; `runs_here`.
                unsafe { Product { panels, ..products[i] }.run(range) }
            });
        });
    });
}

/// Numbers rounded to bfloat16: of each four the even ones, then the odd ones.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn round(x: &[f32], to: &mut [u16]) {
    let parted = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15));
    for (x, to) in x.chunks_exact(16).zip(to.chunks_exact_mut(16)) {
        // SAFETY: sixteen numbers and places for them.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(x.as_ptr()));
            let rounded = _mm256_shuffle_epi8(std::mem::transmute::<__m256bh, __m256i>(rounded), parted);
            _mm256_storeu_si256(to.as_mut_ptr().cast(), rounded);
        }
    }
}

/// The higher and the lower byte of each magnitude's bfloat16.
static TABLES: [[u8; 128]; 2] = {
    let mut tables = [[0; 128]; 2];
    let mut magnitude = 0;
    while magnitude < 128 {
        let bits = e4m3_to_f32(magnitude as u8).to_bits() >> 16;
        (tables[0][magnitude], tables[1][magnitude]) = ((bits >> 8) as u8, bits as u8);
        magnitude += 1;
    }
    tables
};

/// [`TABLES`] in registers, two vectors each.
#[derive(Clone, Copy)]
pub(super) struct Table([__m512i; 4]);

impl Table {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) fn new() -> Self {
        let [high, low] = TABLES.each_ref().map(|table| table.as_ptr());
        // SAFETY: two vectors each.
        unsafe {
            Self([
                _mm512_loadu_si512(high.cast()),
                _mm512_loadu_si512(high.add(64).cast()),
                _mm512_loadu_si512(low.cast()),
                _mm512_loadu_si512(low.add(64).cast()),
            ])
        }
    }

    /// Bytes as bfloat16: those of even columns, and those of odd ones.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
    pub(super) fn open(self, bytes: __m512i) -> [__m512i; 2] {
        let Self([a, b, c, d]) = self;
        let sign = _mm512_set1_epi8(-128);
        // a | b & c
        let high = _mm512_ternarylogic_epi32::<0b1111_1000>(_mm512_permutex2var_epi8(a, bytes, b), bytes, sign);
        let low = _mm512_permutex2var_epi8(c, bytes, d);
        let lower = _mm512_set1_epi16(255);
        // a | b & c, and a | b & !c
        let even = _mm512_ternarylogic_epi32::<0b1111_1000>(_mm512_slli_epi16::<8>(high), low, lower);
        let odd = _mm512_ternarylogic_epi32::<0b1111_0100>(_mm512_srli_epi16::<8>(low), high, lower);
        [even, odd]
    }
}

/// One product.
#[derive(Clone, Copy)]
struct Product<'a> {
    panels: &'a View<'a>,
    x: &'a [u16],
    tokens: usize,
    out: Output,
}

impl Product<'_> {
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn run(self, range: Range<usize>) {
        let table = Table::new();
        let steps = self.panels.blocks.groups * self.panels.layout.group / COLUMNS;
        for p in range {
            let mut t = 0;
            while t < self.tokens {
                // SAFETY: passed on to the caller.
                t += unsafe {
                    match (self.tokens - t, steps % 4) {
                        (8.., _) => self.tile::<1, 8>(table, p, t),
                        (1, 0) => self.tile::<4, 1>(table, p, t),
                        (1, _) => self.tile::<1, 1>(table, p, t),
                        (2, 0) => self.tile::<2, 2>(table, p, t),
                        (2, _) => self.tile::<1, 2>(table, p, t),
                        (3, 0) => self.tile::<2, 3>(table, p, t),
                        (3, _) => self.tile::<1, 3>(table, p, t),
                        (_, 0) => self.tile::<2, 4>(table, p, t),
                        (_, _) => self.tile::<1, 4>(table, p, t),
                    }
                };
            }
        }
    }

    /// Panel `p` with `T` tokens from token `t` on; says how many tokens. `ABREAST` times 32 columns are added up side by side, so that they
    /// need not wait for each other. While several tokens pass, the next panel is fetched.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn tile<const ABREAST: usize, const T: usize>(&self, table: Table, p: usize, t: usize) -> usize {
        let View { layout, blocks, rows, cols, .. } = self.panels;
        let beside = layout.scale.size() * LANES;
        let mut x = [self.x.as_ptr(); T];
        for i in 0..T {
            x[i] = self.x[(t + i) * cols..].as_ptr();
        }
        // SAFETY: sizes of panels and of tokens follow from the same layout and columns.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); T];
            let mut column = 0;
            for block in self.panels.panel(p).chunks_exact(blocks.bytes) {
                let base = block.as_ptr();
                for step in (0..blocks.groups * layout.group / COLUMNS).step_by(ABREAST) {
                    let mut of = [[_mm512_setzero_ps(); T]; ABREAST];
                    for four in 0..COLUMNS / 4 {
                        for u in 0..ABREAST {
                            let column = column + u * COLUMNS + 4 * four;
                            let line = base.add(blocks.at[LOW] + ((step + u) * COLUMNS / 4 + four) * LINE);
                            if T > 1 {
                                fetch_near(line.wrapping_add(self.panels.to_next));
                            }
                            let [even, odd] = table.open(_mm512_loadu_si512(line.cast()));
                            for i in 0..T {
                                let two = x[i].add(column).cast::<i32>();
                                let sum = add_products(of[u][i], even, two.read_unaligned());
                                of[u][i] = add_products(sum, odd, two.add(1).read_unaligned());
                            }
                        }
                    }
                    column += ABREAST * COLUMNS;
                    for u in 0..ABREAST {
                        let group = (step + u) * COLUMNS / layout.group;
                        let from = base.add(blocks.at[SCALES] + group * beside);
                        let scale = scales::<Avx512>(layout.scale, false, from, from);
                        for i in 0..T {
                            sums[i] = _mm512_fmadd_ps(of[u][i], scale, sums[i]);
                        }
                    }
                }
            }
            let row = p * LANES;
            let mask = (u32::MAX >> (32 - (rows - row).min(LANES))) as u16;
            for i in 0..T {
                _mm512_mask_storeu_ps(self.out.pointer().add((t + i) * rows + row), mask, sums[i]);
            }
        }
        T
    }
}

/// To each lane two products: of its own weights with the same two activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
pub(super) fn add_products(sum: __m512, weights: __m512i, two: i32) -> __m512 {
    // SAFETY: the same 512 bits.
    let [a, b] = unsafe { std::mem::transmute::<[__m512i; 2], [__m512bh; 2]>([weights, _mm512_set1_epi32(two)]) };
    _mm512_dpbf16_ps(sum, a, b)
}
