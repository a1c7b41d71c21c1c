//! Panels of eight-bit floats (E4M3), 32 products an instruction and two a lane (`vdpbf16ps`): bytes become bfloat16 by two tables of 128, which
//! is exact, activations are rounded to it, half a unit in their eighth bit, and 32 columns' sum meets their scale in f32.
//!
//! Four columns of a row are a pair of even ones and one of odd ones, so that shifts of 16 bits part them. A token's bits are the same alone,
//! in a batch and on any number of threads.

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
    tasks::{Output, by_list, in_streams, in_tasks},
    team::each_chunk,
    unwritten::unwritten,
};
use std::{arch::x86_64::*, ops::Range};

/// Up to this many tokens bytes become bfloat16 in registers, from a panel that stays in the first-level cache while tokens pass.
const FEW: usize = 16;
/// Tokens that are worth a task of their own to be rounded.
const ROUNDED: usize = 16;
/// Columns whose products are added up before they meet a scale; groups are multiples of it.
pub(super) const COLUMNS: usize = 32;
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
    if tokens <= FEW {
        in_streams(panels, size, if tokens > 4 { 1 } else { 4 }, |turn: &mut Turn, range| {
            by_list(range, lengths(), |i, range| {
                sources[i].each(products[i].panels, range, 1, turn, |panels, range| {
                    // SAFETY: panels that there are; tasks write disjoint rows of the output; `runs_here`.
                    unsafe { Product { panels, ..products[i] }.few(range) }
                });
            });
        });
    } else {
        in_tasks(panels, size, 4, usize::MAX, |(scratch, turn): &mut (_, Turn), range| {
            by_list(range, lengths(), |i, range| {
                sources[i].each(products[i].panels, range, 2, turn, |panels, range| {
                    // SAFETY: as above.
                    unsafe { Product { panels, ..products[i] }.many(range, scratch) }
                });
            });
        });
    }
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

/// Two cache lines: four columns once they are bfloat16.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Opened([u8; 2 * LINE]);

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
    unsafe fn few(self, range: Range<usize>) {
        let (table, none) = (Table::new(), [std::ptr::null()]);
        let steps = self.panels.blocks.groups * self.panels.layout.group / COLUMNS;
        for p in range {
            let mut t = 0;
            while t < self.tokens {
                // SAFETY: passed on to the caller.
                t += unsafe {
                    match (self.tokens - t, steps % 4) {
                        (8.., _) => self.tile::<1, 1, 8>(table, none, p, t),
                        (1, 0) => self.tile::<4, 1, 1>(table, none, p, t),
                        (1, _) => self.tile::<1, 1, 1>(table, none, p, t),
                        (2, 0) => self.tile::<2, 1, 2>(table, none, p, t),
                        (2, _) => self.tile::<1, 1, 2>(table, none, p, t),
                        (3, 0) => self.tile::<2, 1, 3>(table, none, p, t),
                        (3, _) => self.tile::<1, 1, 3>(table, none, p, t),
                        (_, 0) => self.tile::<2, 1, 4>(table, none, p, t),
                        (_, _) => self.tile::<1, 1, 4>(table, none, p, t),
                    }
                };
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn many(self, range: Range<usize>, scratch: &mut Vec<Opened>) {
        let mut p = range.start;
        while p < range.end {
            // SAFETY: passed on to the caller.
            p +=
                unsafe { if range.end - p >= 2 { self.column::<2>(p, scratch) } else { self.column::<1>(p, scratch) } };
        }
    }

    /// Some panels with all tokens; says how many panels.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn column<const P: usize>(&self, p: usize, scratch: &mut Vec<Opened>) -> usize {
        let (table, blocks, lines) = (Table::new(), &self.panels.blocks, self.panels.cols / 4);
        scratch.resize(P * lines, Opened([0; 2 * LINE]));
        let mut opened = [std::ptr::null(); P];
        for (k, lines) in scratch.chunks_exact_mut(lines).enumerate() {
            opened[k] = lines.as_ptr().cast();
            let of_block = self.panels.panel(p + k).chunks_exact(blocks.bytes);
            for (lines, block) in lines.chunks_exact_mut(lines.len() / blocks.count).zip(of_block) {
                for (line, bytes) in lines.iter_mut().zip(block[blocks.at[LOW]..].as_chunks::<LINE>().0) {
                    // SAFETY: a line of 64 bytes, and room for two.
                    unsafe {
                        let [even, odd] = table.open(_mm512_loadu_si512(bytes.as_ptr().cast()));
                        _mm512_store_si512(line.0.as_mut_ptr().cast(), even);
                        _mm512_store_si512(line.0.as_mut_ptr().add(LINE).cast(), odd);
                    }
                }
            }
        }
        let mut t = 0;
        // SAFETY: tokens that there are, panels as above.
        unsafe {
            while t < self.tokens {
                t += match self.tokens - t {
                    6.. => self.tile::<0, P, 6>(table, opened, p, t),
                    3.. => self.tile::<0, P, 3>(table, opened, p, t),
                    _ => self.tile::<0, P, 1>(table, opened, p, t),
                };
            }
        }
        P
    }

    /// `P` panels from panel `p` on with `T` tokens from token `t` on; says how many tokens. Numbers have been opened, or lie in their panels
    /// where some times 32 columns are added up side by side, `ABREAST`, so that they need not wait for each other. While several tokens
    /// pass, the next panel is fetched.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
    unsafe fn tile<const ABREAST: usize, const P: usize, const T: usize>(
        &self,
        table: Table,
        opened: [*const u8; P],
        p: usize,
        t: usize,
    ) -> usize {
        let View { layout, blocks, rows, cols, .. } = self.panels;
        let (beside, abreast) = (layout.scale.size() * LANES, ABREAST.max(1));
        let mut x = [self.x.as_ptr(); T];
        for i in 0..T {
            x[i] = self.x[(t + i) * cols..].as_ptr();
        }
        // SAFETY: sizes of panels and of tokens follow from the same layout and columns.
        unsafe {
            let mut panels = [std::ptr::null(); P];
            for k in 0..P {
                panels[k] = self.panels.panel(p + k).as_ptr();
            }
            let mut sums = [[_mm512_setzero_ps(); T]; P];
            let mut column = 0;
            for block in 0..blocks.count {
                let mut bases = panels;
                for base in &mut bases {
                    *base = base.add(block * blocks.bytes);
                }
                for step in (0..blocks.groups * layout.group / COLUMNS).step_by(abreast) {
                    let mut of = [[[_mm512_setzero_ps(); T]; P]; 4];
                    for four in 0..COLUMNS / 4 {
                        for u in 0..abreast {
                            let column = column + u * COLUMNS + 4 * four;
                            for k in 0..P {
                                let [even, odd] = if ABREAST == 0 {
                                    let line = opened[k].add(column / 4 * 2 * LINE);
                                    [_mm512_loadu_si512(line.cast()), _mm512_loadu_si512(line.add(LINE).cast())]
                                } else {
                                    let line = bases[k].add(blocks.at[LOW] + ((step + u) * COLUMNS / 4 + four) * LINE);
                                    if P == 1 && T > 1 {
                                        fetch_near(line.wrapping_add(self.panels.to_next));
                                    }
                                    table.open(_mm512_loadu_si512(line.cast()))
                                };
                                for i in 0..T {
                                    let two = x[i].add(column).cast::<i32>();
                                    let sum = add_products(of[u][k][i], even, two.read_unaligned());
                                    of[u][k][i] = add_products(sum, odd, two.add(1).read_unaligned());
                                }
                            }
                        }
                    }
                    column += abreast * COLUMNS;
                    for u in 0..abreast {
                        for k in 0..P {
                            let group = (step + u) * COLUMNS / layout.group;
                            let from = bases[k].add(blocks.at[SCALES] + group * beside);
                            let scale = scales::<Avx512>(layout.scale, false, from, from);
                            for i in 0..T {
                                sums[k][i] = _mm512_fmadd_ps(of[u][k][i], scale, sums[k][i]);
                            }
                        }
                    }
                }
            }
            for k in 0..P {
                let row = (p + k) * LANES;
                let mask = (u32::MAX >> (32 - (rows - row).min(LANES))) as u16;
                for i in 0..T {
                    _mm512_mask_storeu_ps(self.out.pointer().add((t + i) * rows + row), mask, sums[k][i]);
                }
            }
        }
        T
    }
}

/// To each lane two products: of its own weights with the same two activations.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_products(sum: __m512, weights: __m512i, two: i32) -> __m512 {
    // SAFETY: the same 512 bits.
    let [a, b] = unsafe { std::mem::transmute::<[__m512i; 2], [__m512bh; 2]>([weights, _mm512_set1_epi32(two)]) };
    _mm512_dpbf16_ps(sum, a, b)
}
