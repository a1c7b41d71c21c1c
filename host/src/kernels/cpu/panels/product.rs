//! The sums: some panels against some tokens at a time, all in registers. A few tokens take the numbers out of their panels as these stream
//! from memory; many have them taken out once, into cache.

use super::{
    LANES, Panels,
    alone::{self, Alone},
    layout::{HIGH, LOW, Layout},
    lying::{Source, Turn, View},
    numbers::{E2m1, Eight, Five, Nibbles, Numbers, Quarters, Six, Taken, Three},
    rounded::Rounded,
    sixteen::{Job, Sixteen, dispatch, is_worth_while},
    tile::{Ahead, Opened, Product, Tile},
};
#[cfg(target_arch = "x86_64")]
use super::{amx, broadcast, floats, pairs::E4m3};
use crate::kernels::cpu::{
    ahead,
    asked::Asking,
    lanes::Isa,
    tasks::{Output, by_list, in_streams, in_tasks},
};
use std::ops::Range;

/// Up to this many tokens numbers are taken out in registers, from a panel that comes from memory once: it stays in the first-level cache while
/// tokens pass, and the next one is fetched meanwhile.
pub(super) const FEW: usize = 16;
/// Up to this many the next panels are fetched while tokens pass; more of them give memory time enough.
const SOME: usize = 64;

/// Whether this machine has the instructions.
pub(super) fn runs_here(layout: &Layout) -> bool {
    #[cfg(target_arch = "x86_64")]
    if layout.e4m3 {
        return floats::runs_here();
    }
    !layout.e4m3 && is_worth_while(Isa::best())
}

impl Panels {
    /// out = x · Wᵀ: `x` is `[tokens, cols]`, `out` `[tokens, rows]`.
    ///
    /// # Panics
    /// If the lengths of `x` and `out` do not belong to the same number of tokens.
    pub fn matmul(&self, x: &[f32], out: &mut [f32]) {
        self.matmul_on(Isa::best(), x, out);
    }

    /// The same with a chosen instruction set, one of [`Isa::available`]: the bits are the same with all of them, save among so many tokens that
    /// panels are opened for them. Eight-bit floats have but one and the matrix unit.
    pub fn matmul_on(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        let tokens = x.len() / self.cols;
        assert!(
            x.len() == tokens * self.cols && out.len() == tokens * self.rows,
            "matmul: {} inputs and {} outputs for {self:?}",
            x.len(),
            out.len()
        );
        assert!(isa == Isa::best() || Isa::available().contains(&isa), "this machine has no {isa:?}");
        multiply_on(isa, &mut [(self, out)], x);
    }

    /// Whether activations are rounded for both in the same way.
    pub(in crate::kernels::cpu) fn rounds_like(&self, other: &Panels) -> bool {
        self.store.layout == other.store.layout && self.cols == other.cols
    }
}

/// out = x · Wᵀ for each of `of`, which [round](Panels::rounds_like) alike: `x` is `[tokens, cols]`, an `out` `[tokens, rows]`.
pub(in crate::kernels::cpu) fn multiply(of: &mut [(&Panels, &mut [f32])], x: &[f32]) {
    multiply_on(Isa::best(), of, x);
}

fn multiply_on(isa: Isa, of: &mut [(&Panels, &mut [f32])], x: &[f32]) {
    let Some(&(first, _)) = of.first() else { return };
    let tokens = x.len() / first.cols;
    // Where all of them are now, which a product holds until it is done.
    let sources: Vec<Source> = of.iter().map(|(panels, _)| panels.store.source()).collect();
    let views: Vec<View> = of.iter().zip(&sources).map(|((panels, _), source)| panels.view(source.packed())).collect();
    if tokens <= FEW {
        sources.iter().for_each(|source| ahead::pass(source.bytes()));
    }
    let outs: Vec<Output> = of.iter_mut().map(|(_, out)| Output(out.as_mut_ptr())).collect();
    let call = Call { isa, views: &views, sources: &sources, outs: &outs, x, tokens };
    match (first.store.layout.bits, first.store.layout.e2m1) {
        #[cfg(target_arch = "x86_64")]
        _ if first.store.layout.e4m3 && call.is_for_matrix_unit() => amx::multiply(&views, &sources, &outs, x, E4m3),
        #[cfg(target_arch = "x86_64")]
        _ if first.store.layout.e4m3 && broadcast::is_worth_while(&views[0], tokens) => {
            broadcast::multiply(&views, &sources, &outs, x, E4m3)
        }
        #[cfg(target_arch = "x86_64")]
        _ if first.store.layout.e4m3 => floats::multiply(&views, &sources, outs.into_iter(), x),
        (2, _) => call.run(Quarters),
        (3, _) => call.run(Three),
        (5, _) => call.run(Five),
        (6, _) => call.run(Six),
        (4, false) => call.run(Nibbles),
        (4, true) => call.run(E2m1),
        _ => call.run(Eight),
    }
}

/// Products of the same activations.
struct Call<'a> {
    isa: Isa,
    views: &'a [View<'a>],
    sources: &'a [Source<'a>],
    outs: &'a [Output],
    x: &'a [f32],
    tokens: usize,
}

impl Call<'_> {
    #[cfg(target_arch = "x86_64")]
    fn is_for_matrix_unit(&self) -> bool {
        self.isa == Isa::Amx && amx::is_worth_while(&self.views[0], self.tokens)
    }

    fn run<N: Numbers>(self, numbers: N) {
        #[cfg(target_arch = "x86_64")]
        if self.is_for_matrix_unit() {
            return amx::multiply(self.views, self.sources, self.outs, self.x, numbers);
        }
        #[cfg(target_arch = "x86_64")]
        if N::BYTES == 2 && self.isa.has_vnni() && broadcast::is_worth_while(&self.views[0], self.tokens) {
            return broadcast::multiply(self.views, self.sources, self.outs, self.x, numbers);
        }
        let Self { isa, views, sources, outs, x, tokens } = self;
        let (rounded, asks) = (Rounded::new(isa, &views[0], x), Asking::of(views[0].layout.jumps()));
        let product = |(panels, &out)| Product { panels, rounded: &rounded, tokens, out, asks };
        let products: Vec<Product> = views.iter().zip(outs).map(product).collect();
        let lengths = || views.iter().map(|view| view.rows.div_ceil(LANES));
        let (panels, size) = (lengths().sum(), LANES * views[0].cols * tokens);
        if tokens <= FEW {
            in_streams(panels, size, if tokens > 4 { 1 } else { 4 }, |turn: &mut Turn, range| {
                by_list(range, lengths(), |i, range| {
                    sources[i].each(&views[i], range, 1, turn, |panels, range| {
                        let product = Product { panels, ..products[i] };
                        // SAFETY: panels that there are; tasks write disjoint rows of the output; panels exist only where the machine has
                        // the instructions.
                        unsafe { dispatch(isa, Few { product, numbers, range }) }
                    });
                });
            });
            return;
        }
        in_tasks(panels, size, 4, usize::MAX, |(scratch, turn): &mut (Vec<Line>, Turn), range| {
            by_list(range, lengths(), |i, range| {
                sources[i].each(&views[i], range, 2, turn, |panels, range| {
                    let product = Product { panels, ..products[i] };
                    // SAFETY: as above.
                    unsafe { dispatch(isa, Many { product, numbers, range, scratch }) }
                });
            });
        });
    }
}

/// A cache line.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
pub(super) struct Line(pub(super) [u8; 64]);

/// Some panels with few tokens.
struct Few<'a, N> {
    product: Product<'a>,
    numbers: N,
    range: Range<usize>,
}

impl<N: Numbers> Job for Few<'_, N> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Sixteen>(self) {
        let Self { product, numbers, range } = self;
        let in_groups = product.tokens == 1 && alone::is_worth_while(product.panels);
        for p in range {
            let (mut t, ahead) = (0, Ahead::NOTHING);
            while t < product.tokens {
                // SAFETY: passed on to the caller.
                t += unsafe {
                    match product.tokens - t {
                        8.. if S::WIDE => {
                            S::run(Tile::<N, 1, 8, false> { product, numbers, opened: None, p, t, ahead })
                        }
                        1 if in_groups => S::run(Alone(Tile { product, numbers, opened: None, p, t, ahead })),
                        1 => S::run(Tile::<N, 1, 1, false> { product, numbers, opened: None, p, t, ahead }),
                        2 => S::run(Tile::<N, 1, 2, false> { product, numbers, opened: None, p, t, ahead }),
                        3 => S::run(Tile::<N, 1, 3, false> { product, numbers, opened: None, p, t, ahead }),
                        _ => S::run(Tile::<N, 1, 4, false> { product, numbers, opened: None, p, t, ahead }),
                    }
                };
            }
        }
    }
}

/// Some panels with many tokens.
struct Many<'a, N> {
    product: Product<'a>,
    numbers: N,
    range: Range<usize>,
    scratch: &'a mut Vec<Line>,
}

impl<N: Numbers> Job for Many<'_, N> {
    type Out = ();
    #[inline(always)]
    unsafe fn run<S: Sixteen>(mut self) {
        while !self.range.is_empty() {
            // SAFETY: passed on to the caller.
            self.range.start += unsafe {
                match (S::WIDE && self.range.len() >= 2, N::BYTES) {
                    (true, 1) => self.column::<S, 1, 2>(),
                    (true, _) => self.column::<S, 2, 2>(),
                    (false, 1) => self.column::<S, 1, 1>(),
                    (false, _) => self.column::<S, 2, 1>(),
                }
            };
        }
    }
}

impl<N: Numbers> Many<'_, N> {
    /// The next `P` panels with all tokens; says how many panels.
    #[inline(always)]
    unsafe fn column<S: Sixteen, const BYTES: usize, const P: usize>(&mut self) -> usize {
        // SAFETY: passed on to the caller.
        unsafe {
            if N::WHOLE {
                self.tokens::<S, N, P>(self.numbers, None);
            } else {
                let opened = self.opened::<S, P>();
                self.tokens::<S, _, P>(Taken::<BYTES>, Some(opened));
            }
        }
        P
    }

    /// Takes the numbers out of the next `P` panels.
    #[inline(always)]
    unsafe fn opened<S: Sixteen, const P: usize>(&mut self) -> Opened {
        let panels = self.product.panels;
        let lines = panels.cols / 4;
        self.scratch.resize(P * lines, Line([0; 64]));
        for (k, lines) in self.scratch.chunks_exact_mut(lines).enumerate() {
            // SAFETY: passed on to the caller.
            unsafe { open::<S, N>(panels, self.numbers, self.range.start + k, lines) };
        }
        Opened { numbers: self.scratch.as_ptr().cast(), pitch: 64 * lines }
    }

    /// What is to be fetched while the first tokens pass, four times, of what is read behind the next `count` panels.
    fn quarters_behind(&self, count: usize) -> impl Iterator<Item = Ahead> + use<N> {
        let panels = self.product.panels;
        let (size, groups) = (count * panels.blocks.count * panels.blocks.bytes, panels.cols / panels.layout.group);
        let lines = size.div_ceil(4 * 64 * groups);
        let from = panels.behind(self.range.start, count);
        (0..4).map(move |i| Ahead { from: from.wrapping_add(i * lines * groups * 64), lines })
    }

    #[inline(always)]
    unsafe fn tokens<S: Sixteen, M: Numbers, const P: usize>(&self, numbers: M, opened: Option<Opened>) {
        let (all, mut t) = (self.product.tokens, 0);
        let mut quarters = self.quarters_behind(P);
        // SAFETY: passed on to the caller.
        unsafe {
            while t < all
                && all <= SOME
                && let Some(ahead) = quarters.next()
            {
                t += self.some::<S, M, P, true>(numbers, opened, t, ahead);
            }
            while t < all {
                t += self.some::<S, M, P, false>(numbers, opened, t, Ahead::NOTHING);
            }
        }
    }

    /// Some tokens from token `t` on; says how many.
    #[inline(always)]
    unsafe fn some<S: Sixteen, M: Numbers, const P: usize, const AHEAD: bool>(
        &self,
        numbers: M,
        opened: Option<Opened>,
        t: usize,
        ahead: Ahead,
    ) -> usize {
        let (product, p) = (self.product, self.range.start);
        // SAFETY: tokens that there are, and panels.
        unsafe {
            match (product.tokens - t, M::BYTES) {
                (6.., 1) if S::WIDE => S::run(Tile::<M, P, 6, AHEAD> { product, numbers, opened, p, t, ahead }),
                (4.., _) => S::run(Tile::<M, P, 4, AHEAD> { product, numbers, opened, p, t, ahead }),
                (2.., _) => S::run(Tile::<M, P, 2, AHEAD> { product, numbers, opened, p, t, ahead }),
                (_, _) => S::run(Tile::<M, P, 1, AHEAD> { product, numbers, opened, p, t, ahead }),
            }
        }
    }
}

/// Takes the numbers of panel `p` out of it, four columns a line.
///
/// # Safety
/// As for [`Sixteen`].
#[inline(always)]
unsafe fn open<S: Sixteen, N: Numbers>(panels: &View<'_>, numbers: N, p: usize, lines: &mut [Line]) {
    let blocks = &panels.blocks;
    let of_block = panels.panel(p).chunks_exact(blocks.bytes);
    for (lines, block) in lines.chunks_exact_mut(lines.len() / blocks.count).zip(of_block) {
        for (step, lines) in lines.chunks_exact_mut(N::VECTORS).enumerate() {
            // SAFETY: steps of the block's columns; lines of 64 bytes.
            unsafe {
                let low = block.as_ptr().add(blocks.at[LOW] + step * N::LOW);
                let high = block.as_ptr().add(blocks.at[HIGH] + N::high(step));
                for (line, vector) in lines.iter_mut().zip(numbers.vectors::<S>(low, high, step)) {
                    S::store(line.0.as_mut_ptr(), vector);
                }
            }
        }
    }
}
