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

impl Attend<'_> {
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
