//! Many tokens on the matrix unit: a tile of tokens' signed bytes against the unsigned bytes of sixteen rows, as they come out of their panel.
//! Sums of a group are whole numbers and so the same as anywhere; the floats that scales make of them are added up in the order of `tile`, so
//! that a token's bits are the same with the unit and without.
//!
//! While the unit multiplies a group, the vector units scale the sums of an earlier one, which takes them longer.

use super::{
    LANES,
    layout::{BIAS_STEPS, BIASES, SCALES, STEPS},
    numbers::Numbers,
    product::{Line, open},
    rounded::Beside,
    scales::scales,
    sixteen::Avx512,
    tile::Product,
};
use crate::kernels::cpu::{
    amx::{Operands, Shape, TILE, Tiles},
    team::each_chunk_of_two,
    unwritten::{Plain, unwritten},
};
use std::{arch::x86_64::*, ops::Range};

/// Bytes of opened panels that stay in a core's second-level cache while tokens pass.
const CACHED: usize = 1 << 19;

/// Whether there are tokens for more than a tile, and columns for half of one: less is multiplied as fast without.
pub(super) fn is_worth_while(product: &Product) -> bool {
    let layout = &product.panels.layout;
    product.tokens * layout.planes() > TILE && (layout.group.is_multiple_of(64) || layout.group == 32)
}

/// Rounded tokens tile by tile: of each sixteen tokens the first bytes, then the second ones.
pub(super) struct Tiled {
    /// For each group and tile of it: those of each token side by side.
    bytes: Vec<Line>,
    /// For each sixteen tokens and group.
    beside: Vec<Beside16>,
}

/// What a group of sixteen tokens has besides its bytes.
#[derive(Clone, Copy)]
struct Beside16 {
    steps: [f32; TILE],
    sums: [f32; TILE],
    offsets: [i32; TILE],
}

impl Tiled {
    pub(super) fn new(&Product { panels, rounded, tokens, .. }: &Product) -> Self {
        let (layout, cols) = (&panels.layout, panels.cols);
        let (groups, planes, depth) = (cols / layout.group, layout.planes(), layout.group.min(64));
        let (blocks, lines) = (tokens.div_ceil(TILE), (planes * cols * TILE).div_ceil(64));
        // SAFETY: tokens are written below, and of those that are none the unit reads nothing.
        let mut bytes = unsafe { unwritten::<Line>(blocks * lines) };
        let none = Beside16 { steps: [0.0; TILE], sums: [0.0; TILE], offsets: [0; TILE] };
        let mut beside = vec![none; blocks * groups];
        each_chunk_of_two((&mut bytes, lines), (&mut beside, groups), |block, bytes, beside| {
            let to = bytes.as_mut_ptr().cast::<u8>();
            for t in 0..TILE.min(tokens - block * TILE) {
                let token = rounded.token(block * TILE + t);
                // SAFETY: as many bytes and groups as a rounded token has, and as there is room for.
                unsafe {
                    for plane in 0..planes {
                        let from = token.bytes.add(plane * rounded.pitch()).cast::<u8>();
                        for tile in 0..cols / depth {
                            let to = to.add((plane * cols + tile * depth) * TILE + t * depth);
                            to.copy_from_nonoverlapping(from.add(tile * depth), depth);
                        }
                    }
                    for (g, to) in beside.iter_mut().enumerate() {
                        let Beside { offset, step, sum } = *token.beside.add(g);
                        (to.steps[t], to.sums[t], to.offsets[t]) = (step, sum, offset);
                    }
                }
            }
        });
        Self { bytes, beside }
    }
}

/// Panels taken out of their memory: numbers four columns a line, and for each group a line of scales and one of biases.
#[derive(Default)]
pub(super) struct Scratch {
    numbers: Vec<Line>,
    scales: Vec<[Line; 2]>,
}

impl Plain for Line {}

/// The sums of two tiles of tokens' bytes with two panels.
#[repr(C, align(64))]
struct Sums([[u32; TILE]; 4 * TILE]);

impl Product<'_> {
    /// All tokens, `x` laid out in tiles, with some panels.
    ///
    /// # Safety
    /// As for `many`, and the unit is available.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    pub(super) unsafe fn on_tiles<N: Numbers>(self, numbers: N, x: &Tiled, range: Range<usize>, scratch: &mut Scratch) {
        let layout = &self.panels.layout;
        let (lines, groups) = (self.panels.cols / 4, self.panels.cols / layout.group);
        let at_once = (CACHED / (LANES * self.panels.cols)).next_multiple_of(2).max(2);
        let tile = TILE.min(self.tokens);
        // SAFETY: passed on to the caller; panels and tokens that there are.
        unsafe {
            let mut tiles = Tiles::new(Shape { a: [tile; 2], b: [TILE; 2], depth: layout.group.min(64) });
            for p in range.clone().step_by(at_once) {
                let panels = p..range.end.min(p + at_once);
                scratch.numbers.resize(panels.len() * lines, Line([0; 64]));
                scratch.scales.resize(panels.len() * groups, [Line([0; 64]); 2]);
                let numbers_of = scratch.numbers.chunks_exact_mut(lines);
                for (p, (lines, scales)) in panels.clone().zip(numbers_of.zip(scratch.scales.chunks_exact_mut(groups)))
                {
                    open::<Avx512, N>(self.panels, numbers, p, lines);
                    self.open_scales(p, scales);
                }
                // Two tiles of tokens, or of the two bytes of tokens.
                for token in (0..self.tokens).step_by(2 * TILE / N::BYTES) {
                    for pair in panels.clone().step_by(2) {
                        let of = Pair {
                            product: &self,
                            numbers: scratch.numbers.as_ptr().add((pair - p) * lines).cast(),
                            scales: scratch.scales.as_ptr().add((pair - p) * groups).cast(),
                            bytes: x.bytes.as_ptr().cast::<u8>().add(token / TILE * TILE * N::BYTES * self.panels.cols),
                            beside: x.beside.as_ptr().add(token / TILE * groups),
                            tokens: (self.tokens - token).min(2 * TILE / N::BYTES),
                        };
                        let place = (pair, token);
                        match (pair + 1 < panels.end, layout.biased, layout.zero == 0) {
                            (true, true, true) => of.multiply::<N, 2, true, false>(&mut tiles, place),
                            (true, true, false) => of.multiply::<N, 2, true, true>(&mut tiles, place),
                            (true, false, _) => of.multiply::<N, 2, false, true>(&mut tiles, place),
                            (false, true, true) => of.multiply::<N, 1, true, false>(&mut tiles, place),
                            (false, true, false) => of.multiply::<N, 1, true, true>(&mut tiles, place),
                            (false, false, _) => of.multiply::<N, 1, false, true>(&mut tiles, place),
                        }
                    }
                }
            }
        }
    }

    /// The scales and biases of panel `p`, as floats.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn open_scales(&self, p: usize, to: &mut [[Line; 2]]) {
        let (layout, blocks) = (&self.panels.layout, &self.panels.blocks);
        let of_block = self.panels.panel(p).chunks_exact(blocks.bytes);
        for (to, block) in to.chunks_exact_mut(blocks.groups).zip(of_block) {
            let strip = |kind: usize| block[blocks.at[kind].min(block.len())..].as_ptr();
            for (g, [scale, bias]) in to.iter_mut().enumerate() {
                let at = g * layout.scale.size() * LANES;
                // SAFETY: a group of the block; lines of 64 bytes.
                unsafe {
                    let scales_of = scales::<Avx512>(layout.scale, false, strip(SCALES).wrapping_add(at), strip(STEPS));
                    _mm512_store_ps(scale.0.as_mut_ptr().cast(), scales_of);
                    if layout.biased {
                        let biases =
                            scales::<Avx512>(layout.scale, true, strip(BIASES).wrapping_add(at), strip(BIAS_STEPS));
                        _mm512_store_ps(bias.0.as_mut_ptr().cast(), biases);
                    }
                }
            }
        }
    }
}

/// Up to two panels, and as many tokens as fit two tiles.
struct Pair<'a> {
    product: &'a Product<'a>,
    numbers: *const u8,
    /// Of each group a line of scales and one of biases, one panel after the other.
    scales: *const f32,
    bytes: *const u8,
    beside: *const Beside16,
    tokens: usize,
}

impl Pair<'_> {
    /// The panels' products with the tokens: `P` panels; `BIASED`, `OFFSET`: whether a group may have what is called so. `place` is the first
    /// panel and token.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn multiply<N: Numbers, const P: usize, const BIASED: bool, const OFFSET: bool>(
        &self,
        tiles: &mut Tiles,
        (panel, token): (usize, usize),
    ) {
        let panels = self.product.panels;
        let (group, groups) = (panels.layout.group, panels.cols / panels.layout.group);
        let depth = group.min(64);
        // What there is once is multiplied twice, and counts once.
        let (second, a) = match (N::BYTES, self.tokens) {
            (1, ..=TILE) => (0, [self.tokens; 2]),
            (1, _) => (TILE * panels.cols, [TILE, self.tokens - TILE]),
            (_, _) => (TILE * panels.cols, [self.tokens; 2]),
        };
        tiles.reshape(Shape { a, b: [TILE; 2], depth });
        let mut of = [const { Sums([[0; TILE]; 4 * TILE]) }; 2];
        let mut sums = [[[_mm512_setzero_ps(); P]; TILE]; 2];
        // SAFETY: sizes of panels and of rounded tokens follow from the same layout and columns.
        unsafe {
            for g in 0..groups + 2 {
                let from = (g < groups).then(|| {
                    let (a, b) = (self.bytes.add(g * group * TILE), self.numbers.add(g * group * LANES));
                    Operands {
                        a: [a, a.add(second)],
                        a_pitch: depth,
                        a_step: TILE * 64,
                        b: [b, b.add((P - 1) * panels.cols * LANES)],
                        b_pitch: [64; 2],
                    }
                });
                let last = from.map(|from| {
                    tiles.zero();
                    tiles.bytes(from, group / depth - 1);
                    from.further(group / depth - 1)
                });
                // The sums of two groups ago are sure to have reached the cache. The unit's queue is short: it gets its work in between.
                let scaled = g.checked_sub(2).map(|g| (g, &of[g % 2].0));
                self.quarter::<N, P, BIASED, OFFSET, 0>(tiles, last, scaled, &mut sums);
                self.quarter::<N, P, BIASED, OFFSET, 1>(tiles, last, scaled, &mut sums);
                self.quarter::<N, P, BIASED, OFFSET, 2>(tiles, last, scaled, &mut sums);
                self.quarter::<N, P, BIASED, OFFSET, 3>(tiles, last, scaled, &mut sums);
                if g < groups {
                    tiles.store(&raw mut of[g % 2].0);
                }
            }
            for k in 0..P {
                let row = (panel + k) * LANES;
                let mask = (u32::MAX >> (32 - (panels.rows - row).min(LANES))) as u16;
                let factors = match panels.factors.get(row..row + LANES) {
                    Some(factors) => _mm512_loadu_ps(factors.as_ptr()),
                    None => _mm512_set1_ps(1.0),
                };
                for (t, sums) in sums.as_flattened().iter().enumerate().take(self.tokens) {
                    let to = self.product.out.pointer().add((token + t) * panels.rows + row);
                    _mm512_mask_storeu_ps(to, mask, _mm512_mul_ps(sums[k], factors));
                }
            }
        }
    }

    /// A quarter of a step of the unit, and then of the whole sums of a group, `of`, which are scaled and added to their tokens' floats.
    #[inline(always)]
    unsafe fn quarter<N: Numbers, const P: usize, const BIASED: bool, const OFFSET: bool, const QUARTER: usize>(
        &self,
        tiles: &Tiles,
        step: Option<Operands>,
        of: Option<(usize, &[[u32; TILE]; 4 * TILE])>,
        sums: &mut [[[__m512; P]; TILE]; 2],
    ) {
        // SAFETY: passed on to the caller.
        unsafe {
            if let Some(step) = step {
                tiles.quarter_of_bytes::<QUARTER>(step);
            }
            let Some((g, of)) = of else { return };
            // Of two tiles of tokens halves, of a tile of two bytes a token quarters.
            let size = TILE / 2 / N::BYTES;
            let first = QUARTER * size;
            let (tile, first) = (first / TILE, first % TILE);
            if let Some(left) = self.tokens.checked_sub(tile * TILE + first).filter(|&left| left > 0) {
                let beside =
                    &*self.beside.add(tile * (self.product.panels.cols / self.product.panels.layout.group) + g);
                let sums = &mut sums[tile][first..first + left.min(size)];
                self.scale::<N, P, BIASED, OFFSET>(g, of.as_ptr().add(2 * tile * TILE), beside, first, sums);
            }
        }
    }

    /// A tile's whole sums of group `g`, of its tokens from `first` on, scaled and added to their floats.
    #[inline(always)]
    unsafe fn scale<N: Numbers, const P: usize, const BIASED: bool, const OFFSET: bool>(
        &self,
        g: usize,
        of: *const [u32; TILE],
        beside: &Beside16,
        first: usize,
        sums: &mut [[__m512; P]],
    ) {
        let panels = self.product.panels;
        let groups = panels.cols / panels.layout.group;
        // SAFETY: passed on to the caller.
        unsafe {
            let line = |k: usize, i: usize| _mm512_load_ps(self.scales.add(((k * groups + g) * 2 + i) * LANES));
            let scale: [__m512; P] = std::array::from_fn(|k| line(k, 0));
            let bias: [__m512; P] = std::array::from_fn(|k| line(k, 1));
            let Beside16 { steps, sums: totals, offsets } = beside;
            for (t, sums) in (first..).zip(sums) {
                let (step, total, offset) = (steps[t], totals[t], offsets[t]);
                for k in 0..P {
                    let row = |tile: usize| _mm512_load_si512(of.add((tile + k) * TILE + t).cast());
                    let mut whole = row(0);
                    if N::BYTES == 2 {
                        whole = _mm512_add_epi32(_mm512_slli_epi32::<8>(whole), row(2));
                    }
                    if OFFSET {
                        whole = _mm512_add_epi32(whole, _mm512_set1_epi32(offset));
                    }
                    let scale = _mm512_mul_ps(scale[k], _mm512_set1_ps(step));
                    sums[k] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, sums[k]);
                    if BIASED {
                        sums[k] = _mm512_fmadd_ps(bias[k], _mm512_set1_ps(total), sums[k]);
                    }
                }
            }
        }
    }
}
