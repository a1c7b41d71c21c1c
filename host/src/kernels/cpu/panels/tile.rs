//! Some panels against some tokens, all sums in registers: four products an instruction and lane within a group, then one product in floats
//! with the group's scales.

use super::{
    LANES,
    layout::{BIAS_STEPS, BIASES, HIGH, LOW, SCALES, STEPS},
    lying::View,
    numbers::Numbers,
    rounded::{Rounded, Token},
    scales::scales,
    sixteen::{Job, Sixteen},
};
use crate::kernels::cpu::{
    ahead::{fetch, fetch_near},
    asked::Asking,
    tasks::Output,
};

/// One product.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub(super) panels: &'a View<'a>,
    pub(super) rounded: &'a Rounded,
    pub(super) tokens: usize,
    pub(super) out: Output,
    /// What is asked for of weights that stream from memory.
    pub(super) asks: Asking,
}

/// Where numbers lie that have been taken out of their panels, `pitch` bytes a panel.
#[derive(Clone, Copy)]
pub(super) struct Opened {
    pub(super) numbers: *const u8,
    pub(super) pitch: usize,
}

/// What is fetched meanwhile: so many cache lines a group, from there on.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    pub(super) from: *const u8,
    pub(super) lines: usize,
}

impl Ahead {
    pub(super) const NOTHING: Ahead = Ahead { from: std::ptr::null(), lines: 0 };
}

/// `P` panels from panel `p` on with `T` tokens from token `t` on. A single panel is read as the one stream that it is, for one token
/// [asked for](Asking) only where the processor does not foresee that better. Several keep it busy while the next panel comes.
pub(super) struct Tile<'a, N, const P: usize, const T: usize, const AHEAD: bool> {
    pub(super) product: Product<'a>,
    pub(super) numbers: N,
    pub(super) opened: Option<Opened>,
    pub(super) p: usize,
    pub(super) t: usize,
    pub(super) ahead: Ahead,
}

impl<N: Numbers, const P: usize, const T: usize, const AHEAD: bool> Job for Tile<'_, N, P, T, AHEAD> {
    /// How many tokens.
    type Out = usize;
    #[inline(always)]
    unsafe fn run<S: Sixteen>(self) -> usize {
        let Product { panels: of, rounded, out, .. } = self.product;
        let (layout, blocks) = (&of.layout, &of.blocks);
        let mut tokens = [rounded.token(self.t); T];
        for i in 1..T {
            tokens[i] = rounded.token(self.t + i);
        }
        let steps = layout.group / N::COLUMNS;
        let beside = layout.scale.size() * LANES;
        // SAFETY: sizes of panels and of rounded tokens follow from the same layout and columns.
        unsafe {
            // Where the panels begin, and their lowest bits.
            let mut panels = [of.panel(self.p).as_ptr(); P];
            let mut lows = panels;
            for k in 0..P {
                panels[k] = of.panel(self.p + k).as_ptr();
                lows[k] = match self.opened {
                    Some(opened) => opened.numbers.add(k * opened.pitch),
                    None => panels[k].add(blocks.at[LOW]),
                };
            }
            let low_bytes = if self.opened.is_some() { blocks.groups * steps * N::LOW } else { blocks.bytes };
            let mut sums = [[S::splat_f32(0.0); T]; P];
            let mut g = 0;
            let alone = [P, T] == [1, 1] && self.t == 0 && self.opened.is_none();
            let asks = if alone { self.product.asks } else { Asking::Nothing };
            let share = blocks.bytes / blocks.groups;
            for block in 0..blocks.count {
                let mut bases = panels;
                for base in &mut bases {
                    *base = base.add(block * blocks.bytes);
                }
                for group in 0..blocks.groups {
                    if asks != Asking::Nothing {
                        asks.behind(bases[0].wrapping_add(group * share), share, N::BYTES == 2);
                    }
                    if AHEAD {
                        let next = self.ahead.from.wrapping_add(g * self.ahead.lines * 64);
                        (0..self.ahead.lines).for_each(|line| fetch(next.wrapping_add(line * 64)));
                    }
                    let of = self.group::<S>(tokens, g, |k, step| {
                        let low = lows[k].add(block * low_bytes + (group * steps + step) * N::LOW);
                        let high = bases[k].add(blocks.at[HIGH] + N::high(group * steps + step));
                        if P == 1 && T > 1 && self.opened.is_none() {
                            let next = low.wrapping_add(of.to_next);
                            (0..N::LOW).step_by(64).for_each(|line| fetch_near(next.wrapping_add(line)));
                        }
                        (low, high, group * steps + step)
                    });
                    for k in 0..P {
                        let strip = |kind: usize| bases[k].add(blocks.at[kind]);
                        let from = strip(SCALES).add(group * beside);
                        let scale = scales::<S>(layout.scale, false, from, strip(STEPS));
                        for i in 0..T {
                            let scale = S::mul(scale, S::splat_f32((*tokens[i].beside.add(g)).step));
                            sums[k][i] = S::fma(S::to_float(of[k][i]), scale, sums[k][i]);
                        }
                        if layout.biased {
                            let from = strip(BIASES).add(group * beside);
                            let bias = scales::<S>(layout.scale, true, from, strip(BIAS_STEPS));
                            for i in 0..T {
                                let sum = S::splat_f32((*tokens[i].beside.add(g)).sum);
                                sums[k][i] = S::fma(bias, sum, sums[k][i]);
                            }
                        }
                    }
                    g += 1;
                }
            }
            for k in 0..P {
                let row = (self.p + k) * LANES;
                let factors = match of.factors.get(row..row + LANES) {
                    Some(factors) => S::load_f32(factors.as_ptr()),
                    None => S::splat_f32(1.0),
                };
                for i in 0..T {
                    let to = out.pointer().add((self.t + i) * of.rows + row);
                    S::store_f32(to, S::mul(sums[k][i], factors), (of.rows - row).min(LANES));
                }
            }
        }
        T
    }
}

impl<N: Numbers, const P: usize, const T: usize, const AHEAD: bool> Tile<'_, N, P, T, AHEAD> {
    /// The products of group `g`, added up. `at` says where a panel's step of the group begins, and which of its block it is.
    #[inline(always)]
    pub(super) unsafe fn group<S: Sixteen>(
        &self,
        tokens: [Token; T],
        g: usize,
        at: impl Fn(usize, usize) -> (*const u8, *const u8, usize),
    ) -> [[S::I; T]; P] {
        let Product { panels, rounded, .. } = self.product;
        let (group, pitch) = (panels.layout.group, rounded.pitch());
        let shorts = S::SHORTS && N::BYTES == 2;
        let chain = S::CHAIN.min(N::VECTORS);
        // SAFETY: passed on to the caller.
        unsafe {
            // The first byte's sums, and the second's; or two halves of the only byte's, which need not wait for each other.
            let mut of = [[[S::splat(0); 2]; T]; P];
            for i in 0..T {
                let offset = S::splat((*tokens[i].beside.add(g)).offset);
                for k in 0..P {
                    of[k][i][N::BYTES - 1] = offset;
                }
            }
            let mut column = g * group;
            for step in 0..group / N::COLUMNS {
                let mut weights = [[S::splat(0); 8]; P];
                for k in 0..P {
                    let (low, high, step) = at(k, step);
                    weights[k] = self.numbers.vectors::<S>(low, high, step);
                }
                for v in (0..N::VECTORS).step_by(chain) {
                    for i in 0..T {
                        if shorts {
                            let x = tokens[i].bytes.add(2 * column);
                            for k in 0..P {
                                of[k][i][1] = S::dots_of_shorts(of[k][i][1], &weights[k][v..v + chain], x);
                            }
                            continue;
                        }
                        for byte in 0..N::BYTES {
                            let x = tokens[i].bytes.add(byte * pitch + column);
                            let half = if N::BYTES == 1 && P * T == 1 { v / chain % 2 } else { byte };
                            for k in 0..P {
                                of[k][i][half] = S::dots(of[k][i][half], &weights[k][v..v + chain], x);
                            }
                        }
                    }
                    column += 4 * chain;
                }
            }
            let mut sums = [[S::splat(0); T]; P];
            for k in 0..P {
                for i in 0..T {
                    let [first, second] = of[k][i];
                    sums[k][i] = match N::BYTES {
                        1 if P * T > 1 => first,
                        1 => S::add(first, second),
                        _ if shorts => second,
                        _ => S::add(S::shl::<8>(first), second),
                    };
                }
            }
            sums
        }
    }
}
