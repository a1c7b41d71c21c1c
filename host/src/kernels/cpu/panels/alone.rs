//! A panel of blocks of several groups against one token: a stream of memory, which the processor foresees while it is read from front to back.
//! So the sums of a block's groups are kept until all its numbers are read, and only then meet the scales, which lie behind them: a tenth of
//! the speed hangs on that. Blocks of one group, or read in jumps, lose by it: they stay with the tile's own loop.

use super::{
    LANES,
    layout::{BIAS_STEPS, BIASES, HIGH, LOW, SCALES, STEPS},
    lying::View,
    numbers::Numbers,
    scales::scales,
    sixteen::{Job, Sixteen},
    tile::{Product, Tile},
};
use crate::kernels::cpu::asked::Asking;
use std::mem::MaybeUninit;

/// Groups of a block that is read from front to back, at most.
const GROUPS: usize = 4;

/// Whether blocks are such.
pub(super) fn is_worth_while(panels: &View<'_>) -> bool {
    !panels.layout.jumps() && (2..=GROUPS).contains(&panels.blocks.groups)
}

/// A tile of one panel and one token.
pub(super) struct Alone<'a, N>(pub(super) Tile<'a, N, 1, 1, false>);

impl<N: Numbers> Job for Alone<'_, N> {
    type Out = usize;
    #[inline(always)]
    unsafe fn run<S: Sixteen>(self) -> usize {
        let Self(tile) = self;
        let Product { panels: of, rounded, out, asks, .. } = tile.product;
        let (token, p) = (rounded.token(tile.t), tile.p);
        let (layout, blocks) = (&of.layout, &of.blocks);
        let (steps, share) = (layout.group / N::COLUMNS, blocks.bytes / blocks.groups);
        let mut kept = [MaybeUninit::<S::I>::uninit(); GROUPS];
        // SAFETY: sizes of panels and of rounded tokens follow from the same layout and columns; there is room for a block's groups.
        unsafe {
            let mut sum = S::splat_f32(0.0);
            for block in 0..blocks.count {
                let base = of.panel(p).as_ptr().add(block * blocks.bytes);
                let first = block * blocks.groups;
                for group in 0..blocks.groups {
                    if asks != Asking::Nothing {
                        asks.behind(base.wrapping_add(group * share), share, N::BYTES == 2);
                    }
                    let [[sums]] = tile.group::<S>([token], first + group, |_, step| {
                        let step = group * steps + step;
                        (base.add(blocks.at[LOW] + step * N::LOW), base.add(blocks.at[HIGH] + N::high(step)), step)
                    });
                    kept[group].write(sums);
                }
                let strip = |kind: usize| base.add(blocks.at[kind]);
                for group in 0..blocks.groups {
                    let beside = group * layout.scale.size() * LANES;
                    let rounded = *token.beside.add(first + group);
                    let scale = scales::<S>(layout.scale, false, strip(SCALES).add(beside), strip(STEPS));
                    let scale = S::mul(scale, S::splat_f32(rounded.step));
                    sum = S::fma(S::to_float(kept[group].assume_init()), scale, sum);
                    if layout.biased {
                        let bias = scales::<S>(layout.scale, true, strip(BIASES).add(beside), strip(BIAS_STEPS));
                        sum = S::fma(bias, S::splat_f32(rounded.sum), sum);
                    }
                }
            }
            let row = p * LANES;
            if let Some(factors) = of.factors.get(row..row + LANES) {
                sum = S::mul(sum, S::load_f32(factors.as_ptr()));
            }
            let to = out.pointer().add(tile.t * of.rows + row);
            S::store_f32(to, sum, (of.rows - row).min(LANES));
        }
        1
    }
}
