//! One block of queries against one block of keys: the online softmax of FlashAttention (Dao et al. 2022, Milakov and
//! Gimelshein 2018). Sums over keys run from the first key to the last, whatever block of queries they are part of.

use super::{
    super::{
        lanes::{Job, Lanes, exp},
        tile::{Block, Multiply},
    },
    state::State,
};

/// Keys of a block: as many as a mask has bits.
pub(super) const KEYS: usize = 64;

/// Scores that fall with the distance of the key.
pub(super) struct Slopes<'a> {
    /// Of each row: by how much a position, and where its query stands.
    pub(super) rows: &'a [(f32, u32)],
    /// Where the keys stand.
    pub(super) keys: &'a [u32],
}

/// One step over up to [`KEYS`] keys.
pub(super) struct Step<'a, 'b> {
    /// Queries, scaled; rows padded with zeros to `len`.
    pub(super) queries: Block,
    /// Keys, widened; rows padded with zeros to `len`.
    pub(super) keys: Block,
    pub(super) len: usize,
    /// Values, `state.width` lanes a key, from every `pitch`-th number on.
    pub(super) values: *const f32,
    pub(super) pitch: usize,
    /// Which keys are seen, from the lowest bit on, by each `alike` rows.
    pub(super) visible: &'a [u64],
    /// Rows that see the same keys: heads of a token.
    pub(super) alike: usize,
    pub(super) softcap: Option<f32>,
    pub(super) slopes: Option<Slopes<'a>>,
    /// Room for `[rows, KEYS]` scores.
    pub(super) scores: &'a mut [f32],
    pub(super) state: &'a mut State<'b>,
}

impl Job for Step<'_, '_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(mut self) {
        let scores = self.scores.as_mut_ptr();
        // SAFETY: the caller sized all blocks for `queries.rows` rows and at most `KEYS` keys.
        unsafe {
            Multiply { a: self.keys, b: self.queries, len: self.len, out: scores, pitch: KEYS }.run::<L>();
            for row in 0..self.queries.rows {
                self.soften::<L>(row);
            }
            let width = self.state.width;
            let mut at = 0;
            while at < width {
                let wide = at + 4 * L::W <= width;
                let mut row = 0;
                while row < self.queries.rows {
                    let left = self.queries.rows - row;
                    match (wide, left >= 4) {
                        (true, true) if L::WIDE => self.weigh::<L, 4, 4>(row, at),
                        (true, _) if left >= 2 => self.weigh::<L, 2, 4>(row, at),
                        (true, _) => self.weigh::<L, 1, 4>(row, at),
                        (false, true) => self.weigh::<L, 4, 1>(row, at),
                        (false, false) => self.weigh::<L, 1, 1>(row, at),
                    }
                    row += match (wide, left >= 4) {
                        (true, true) if L::WIDE => 4,
                        (true, _) if left >= 2 => 2,
                        (false, true) => 4,
                        _ => 1,
                    };
                }
                at += if wide { 4 * L::W } else { L::W };
            }
        }
    }
}

impl Step<'_, '_> {
    /// Scores of a row to weights, relative to the new peak; what was summed before is scaled to it.
    #[inline(always)]
    unsafe fn soften<L: Lanes>(&mut self, row: usize) {
        let visible = self.visible[row / self.alike];
        let scores = &mut self.scores[row * KEYS..(row + 1) * KEYS];
        if visible == 0 {
            return scores.fill(0.0);
        }
        // SAFETY: vectors stay inside the row's `KEYS` scores and the row's sums.
        unsafe {
            let p = scores.as_mut_ptr();
            if let Some(cap) = self.softcap {
                // tanh x = 1 - 2 / (e^2x + 1)
                for i in (0..KEYS).step_by(L::W) {
                    let e = exp::<L>(L::mul(L::load(p.add(i)), L::splat(2.0 / cap)));
                    let ratio = L::div(L::splat(2.0), L::add(e, L::splat(1.0)));
                    L::store(p.add(i), L::mul(L::splat(cap), L::sub(L::splat(1.0), ratio)));
                }
            }
            if let Some(Slopes { rows, keys }) = &self.slopes {
                let (slope, query) = rows[row];
                for (score, &key) in scores.iter_mut().zip(*keys) {
                    *score += slope * (key as f32 - query as f32);
                }
            }
            if visible != u64::MAX {
                for (i, score) in scores.iter_mut().enumerate() {
                    if visible >> i & 1 == 0 {
                        *score = f32::NEG_INFINITY;
                    }
                }
            }
            let mut most = L::splat(f32::NEG_INFINITY);
            for i in (0..KEYS).step_by(L::W) {
                most = L::max(most, L::load(p.add(i)));
            }
            let before = self.state.peak[row];
            let peak = L::peak(most).max(before);
            let mut mass = L::splat(0.0);
            for i in (0..KEYS).step_by(L::W) {
                let weight = exp::<L>(L::sub(L::load(p.add(i)), L::splat(peak)));
                L::store(p.add(i), weight);
                mass = L::add(mass, weight);
            }
            let fade = if before == f32::NEG_INFINITY { 0.0 } else { (before - peak).exp() };
            self.state.peak[row] = peak;
            self.state.mass[row] = self.state.mass[row] * fade + L::sum(mass);
            if fade != 1.0 {
                let sum = self.state.sum.as_mut_ptr().add(row * self.state.width);
                for i in (0..self.state.width).step_by(L::W) {
                    L::store(sum.add(i), L::mul(L::load(sum.add(i)), L::splat(fade)));
                }
            }
        }
    }

    /// Adds weighted values to `R` rows, `V` vectors of lanes from lane `at` on.
    #[inline(always)]
    unsafe fn weigh<L: Lanes, const R: usize, const V: usize>(&mut self, row: usize, at: usize) {
        let width = self.state.width;
        // SAFETY: rows and lanes lie inside the state; values have `width` lanes at every key's place.
        unsafe {
            let sum = self.state.sum.as_mut_ptr().add(row * width + at);
            let weights = self.scores.as_ptr().add(row * KEYS);
            let mut sums = [[L::splat(0.0); V]; R];
            for r in 0..R {
                for v in 0..V {
                    sums[r][v] = L::load(sum.add(r * width + v * L::W));
                }
            }
            for key in 0..self.keys.rows {
                let mut values = [L::splat(0.0); V];
                for v in 0..V {
                    values[v] = L::load(self.values.add(key * self.pitch + at + v * L::W));
                }
                for r in 0..R {
                    let weight = L::splat(*weights.add(r * KEYS + key));
                    for v in 0..V {
                        sums[r][v] = L::fma(weight, values[v], sums[r][v]);
                    }
                }
            }
            for r in 0..R {
                for v in 0..V {
                    L::store(sum.add(r * width + v * L::W), sums[r][v]);
                }
            }
        }
    }
}
