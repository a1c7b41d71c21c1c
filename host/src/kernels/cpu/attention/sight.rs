//! Which keys a query sees, and how scores become weights. One rule for the kernel and for the masks of other devices; it knows
//! positions only, so a result cannot depend on how a prompt was cut.

/// What a query sees, and how scores become weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attend<'a> {
    /// Multiplies q · k.
    pub scale: f32,
    /// c: scores become c * tanh(score / c).
    pub softcap: Option<f32>,
    /// A key is seen for this many positions, its own included.
    pub window: Option<usize>,
    /// Keys at positions below this are seen beyond the window.
    pub keep: usize,
    /// Keys before the last multiple of this are not seen.
    pub chunk: Option<usize>,
    /// `[q_heads]`: a logit that joins each softmax and is dropped.
    pub sinks: Option<&'a [f32]>,
    /// The only keys that are seen.
    pub selection: Option<Selection<'a>>,
    /// Which blocks of keys are seen.
    pub blocks: Option<Blocks>,
    /// `[q_heads]`: a score falls by so much for each position between query and key.
    pub slopes: Option<&'a [f32]>,
}

/// Keys, or blocks of them, that each query has chosen: its heads together, or in groups that choose apart.
#[derive(Clone, Copy, Debug)]
pub struct Selection<'a> {
    /// Query by query, and group by group within it: block numbers in rising order.
    pub lists: &'a [Vec<u32>],
    /// Lists of one query, which share its heads evenly, in their order.
    pub groups: usize,
    /// Query heads that read one list.
    pub heads: usize,
    /// Positions of a block; 1 where keys are chosen one by one.
    pub block: usize,
}

impl Selection<'_> {
    fn sees(&self, token: usize, head: usize, k: u32) -> bool {
        let list = self.lists.get(token * self.groups + head / self.heads.max(1));
        list.is_some_and(|list| list.binary_search(&(k / self.block.max(1) as u32)).is_ok())
    }
}

/// Block-sparse attention. <https://arxiv.org/abs/2407.19775>
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// Tokens of a block.
    pub size: usize,
    /// Blocks seen, counting the query's own.
    pub local: usize,
    /// Head h also sees block j where `(j + h + 1) mod stride == 0`; 0 for no such blocks.
    pub stride: usize,
}

impl Blocks {
    fn see(&self, head: usize, p: u32, k: u32) -> bool {
        let block = |position: u32| position as usize / self.size.max(1);
        let key = block(k);
        block(p) - key < self.local || (key + head + 1).checked_rem(self.stride) == Some(0)
    }
}

/// Where some queries or keys stand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    first: u32,
    last: u32,
}

impl Span {
    /// Of positions in any order.
    pub(super) fn of(positions: &[u32]) -> Self {
        let (first, last) = positions.iter().fold((u32::MAX, 0), |(first, last), &p| (first.min(p), last.max(p)));
        Self { first, last }
    }
}

/// What some queries see of some keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sees {
    /// Every one sees every key.
    All,
    /// Each its own.
    Some,
    /// Nobody sees any.
    None,
}

impl Attend<'_> {
    /// An answer for many at once; `Some` where it takes a closer look.
    pub(super) fn spans(&self, queries: Span, keys: Span) -> Sees {
        let window = self.window.unwrap_or(usize::MAX);
        let chunk = |p: u32| self.chunk.map_or(0, |chunk| p as usize / chunk.max(1));
        let beyond = keys.first > queries.last;
        let behind = queries.first.saturating_sub(keys.last) as usize >= window && keys.first as usize >= self.keep;
        if beyond || behind || window == 0 && self.keep == 0 || chunk(keys.last) < chunk(queries.first) {
            return Sees::None;
        }
        let near = ((queries.last - keys.first) as usize) < window || (keys.last as usize) < self.keep;
        let chosen = self.blocks.is_some() || self.selection.is_some();
        let whole = keys.last <= queries.first && near && chunk(keys.first) == chunk(queries.last) && !chosen;
        if whole { Sees::All } else { Sees::Some }
    }

    /// Which of up to 64 keys a query sees, from the lowest bit on.
    pub(super) fn mask(&self, token: usize, head: usize, p: u32, keys: &[u32]) -> u64 {
        let mut seen = [0u8; 64];
        if self.chunk.is_some() || self.blocks.is_some() || self.selection.is_some() {
            for (seen, &k) in seen.iter_mut().zip(keys) {
                *seen = u8::from(self.sees(token, head, p, k));
            }
        } else {
            // Without branches, in numbers of one size: vectors.
            let window = self.window.map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX));
            let keep = u32::try_from(self.keep).unwrap_or(u32::MAX);
            for (seen, &k) in seen.iter_mut().zip(keys) {
                *seen = u8::from((k <= p) & ((p.wrapping_sub(k) < window) | (k < keep)));
            }
        }
        // Eight bytes of 0 or 1 to eight bits.
        let (eights, _) = seen.as_chunks::<8>();
        let bits = |eight: &[u8; 8]| u64::from_le_bytes(*eight).wrapping_mul(0x0102_0408_1020_4080) >> 56;
        eights.iter().rev().fold(0, |all, eight| all << 8 | bits(eight))
    }

    /// Whether query head `head` of the call's query `token`, at position `p`, sees a key at position `k`.
    #[inline]
    pub fn sees(&self, token: usize, head: usize, p: u32, k: u32) -> bool {
        k <= p
            && (self.window.is_none_or(|window| ((p - k) as usize) < window) || (k as usize) < self.keep)
            && self.chunk.is_none_or(|chunk| p as usize / chunk == k as usize / chunk)
            && self.blocks.is_none_or(|blocks| blocks.see(head, p, k))
            && self.selection.is_none_or(|chosen| chosen.sees(token, head, k))
    }

    /// Whether query heads see the same keys whenever they are of the same `group` neighbours.
    pub fn alike(&self, group: usize) -> bool {
        self.blocks.is_none() && self.selection.is_none_or(|chosen| chosen.heads.is_multiple_of(group))
    }

    /// What a head's score of a key at `k` gains for a query at `p`, which sees it: nothing or less.
    #[inline]
    pub fn bias(&self, head: usize, p: u32, k: u32) -> f32 {
        self.slopes.and_then(|slopes| slopes.get(head)).map_or(0.0, |slope| slope * (k as f32 - p as f32))
    }
}
