//! Activations times bfloat16 weights, as the checkpoint has them or [coded](super::coded), 32 products an instruction (`vdpbf16ps`): activations
//! are rounded to bfloat16 too, half a unit in their eighth bit, as everybody does who computes in that type; sums stay f32.
//!
//! Each sum is one vector that runs from the first column to the last, added up in one order at the end: a token's bits are the same
//! alone, in a batch, on any number of threads, and before and after weights are coded.

mod opening;
mod product;

use super::{
    ahead, amx,
    coded::{Code, Coded, Source},
    lanes::Isa,
    matrix::Matrix,
    tasks::{Output, by_list, in_streams, in_tasks},
    team::each_chunk,
    unwritten::{Plain, unwritten},
};
use opening::Opening;
use product::Product;
use std::{arch::x86_64::*, sync::OnceLock};

/// Columns of a vector.
const LANES: usize = 32;
/// Up to this many tokens weights are streamed from memory once, rows before tokens.
const FEW: usize = 16;
/// Up to this many one row after the other: memory is what they wait for.
const LEAST: usize = 4;
/// Up to this many the next rows are fetched.
const SOME: usize = 64;
/// Rows between the next ones and those that are fetched while few tokens pass.
const AHEAD: usize = 4;
/// Tokens that are worth a task of their own to be rounded.
const ROUNDED: usize = 16;
/// Bytes of weights that stay in a core's second-level cache while tokens pass.
const CACHED: usize = 1 << 19;

/// A cache line: a vector that straddles two takes twice as long to load.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Line([u16; LANES]);

impl Plain for Line {}

fn flat(lines: &mut [Line]) -> &mut [u16] {
    // SAFETY: a line is its numbers and nothing else.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LANES) }
}

/// Whether this machine has the instruction.
pub(super) fn runs_here() -> bool {
    static RUNS: OnceLock<bool> = OnceLock::new();
    *RUNS.get_or_init(|| Isa::best().has_vnni() && is_x86_feature_detected!("avx512bf16"))
}

/// And those that open codes.
pub(super) fn opens_codes() -> bool {
    runs_here() && is_x86_feature_detected!("avx512vbmi") && Isa::best() != Isa::Amx
}

/// Weights of bfloat16.
#[derive(Clone, Copy, Debug)]
pub(super) enum Halves<'a> {
    Rows(&'a Matrix),
    Coded(&'a Coded),
}

impl Halves<'_> {
    pub(super) fn rows(self) -> usize {
        match self {
            Halves::Rows(m) => m.rows(),
            Halves::Coded(m) => m.rows(),
        }
    }

    pub(super) fn cols(self) -> usize {
        match self {
            Halves::Rows(m) => m.cols(),
            Halves::Coded(m) => m.cols(),
        }
    }
}

/// What lies where now, which a product holds until it is done.
enum Held<'a> {
    Rows(&'a Matrix),
    Coded(Source<'a>),
}

impl<'a> Held<'a> {
    fn of(halves: Halves<'a>) -> Self {
        match halves {
            Halves::Rows(m) => Held::Rows(m),
            Halves::Coded(m) => Held::Coded(m.source()),
        }
    }

    fn code(&self) -> Option<&Code> {
        match self {
            Held::Coded(Source::Coded(code)) => Some(code),
            _ => None,
        }
    }

    /// What is read of memory.
    fn bytes(&self) -> &[u8] {
        match self {
            Held::Rows(matrix) => &matrix.parts()[0],
            Held::Coded(Source::Lying(matrix)) => &matrix.parts()[0],
            Held::Coded(Source::Coded(code)) => code.bytes(),
        }
    }
}

/// Rows of one matrix and where their sums go.
pub(super) struct Given<'a> {
    pub(super) rows: usize,
    /// As they lie, or their code.
    pub(super) bytes: &'a [u8],
    pub(super) code: Option<&'a Code>,
    pub(super) out: Output,
}

/// out = x · Wᵀ for each of `of`, matrices of the same columns: `x` is `[tokens, cols]`, an `out` `[tokens, rows]`.
pub(super) fn multiply(of: &mut [(Halves<'_>, &mut [f32])], x: &[f32]) {
    let Some(cols) = of.first().map(|(halves, _)| halves.cols()) else { return };
    let held: Vec<Held> = of.iter().map(|(halves, _)| Held::of(*halves)).collect();
    let rows_of = of.iter_mut().zip(&held).map(|((halves, out), held)| Given {
        rows: halves.rows(),
        bytes: held.bytes(),
        code: held.code(),
        out: Output(out.as_mut_ptr()),
    });
    let given: Vec<Given> = rows_of.collect();
    match Isa::best() {
        Isa::Amx => amx::multiply(&given, cols, x),
        _ => multiply_given(&given, cols, x),
    }
}

fn multiply_given(given: &[Given], cols: usize, x: &[f32]) {
    let tokens = x.len() / cols;
    // Rows whose starts are a power of two apart would all fall into the same few lines of the first-level cache.
    let stride = cols.next_multiple_of(LANES) + LANES;
    // SAFETY: `round` writes a token's whole stride.
    let mut lines = unsafe { unwritten::<Line>(tokens * stride / LANES) };
    let rounded_x = flat(&mut lines);
    let rounded = |(to, x): (&mut [u16], &[f32])| {
        // SAFETY: `runs_here`; a token's room is whole vectors longer than its columns.
        unsafe { round(x, to) }
    };
    each_chunk(rounded_x, stride * ROUNDED, |i, halves| {
        halves.chunks_exact_mut(stride).zip(x.chunks_exact(cols).skip(i * ROUNDED)).for_each(rounded);
    });
    let product = |&Given { rows, bytes, code, out }: &Given| {
        if tokens <= FEW {
            ahead::pass(bytes);
        }
        let (weights, pitch) = (bytes.as_ptr(), code.map_or(2 * cols, Code::pitch));
        // Where few tokens pass, what is fetched is wanted soon: some rows farther than the next.
        let lying = weights.wrapping_add(if tokens <= FEW { AHEAD * pitch } else { 0 });
        Product { weights: weights.cast(), lying, pitch, x: rounded_x.as_ptr(), out, rows, cols, stride, tokens }
    };
    let products: Vec<Product> = given.iter().map(product).collect();
    let rows = products.iter().map(|p| p.rows).sum();
    let lengths = || products.iter().map(|p| p.rows);
    let opening = |i: usize| given[i].code.map(|code| Opening { product: products[i], code });
    if tokens <= FEW {
        in_streams(rows, cols * tokens, if tokens > LEAST { 4 } else { 8 }, |room: &mut Vec<Line>, range| {
            // SAFETY: rows of the matrix; tasks write disjoint rows of `out`; `runs_here`, and codes are there only where they are opened.
            by_list(range, lengths(), |i, range| unsafe {
                match opening(i) {
                    Some(coded) => coded.few(range, room),
                    None => products[i].few(range),
                }
            });
        });
    } else {
        let most = (CACHED / (2 * cols)).max(8);
        // While some tokens pass, what is read next comes; while many do, it has time enough.
        let (most, block) = if tokens <= SOME { (4 * most, (most / 2).max(8)) } else { (most, most) };
        in_tasks(rows, cols * tokens, 8, most, |room: &mut Vec<Line>, range| {
            by_list(range, lengths(), |i, range| {
                for start in range.clone().step_by(block) {
                    let block = start..range.end.min(start + block);
                    // SAFETY: as above.
                    unsafe {
                        let product = opening(i).map_or(products[i], |coded| coded.opened(block.clone(), room));
                        product.many(block, tokens <= SOME);
                    }
                }
            });
        });
    }
}

/// Numbers rounded to bfloat16, and zeros behind them; `to` has at least as many places, a multiple of sixteen.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn round(x: &[f32], to: &mut [u16]) {
    to[x.len()..].fill(0);
    for (x, to) in x.chunks(16).zip(to.chunks_exact_mut(16)) {
        let mask = (u32::MAX >> (32 - x.len())) as u16;
        // SAFETY: masked to what there is of `x`; sixteen places in `to`.
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, x.as_ptr()));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), std::mem::transmute::<__m256bh, __m256i>(rounded));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn halves(v: __m512i) -> __m512bh {
    // SAFETY: the same 512 bits.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(v) }
}
