//! Panels that are not packed yet. Their matrix stays where it lies in its file, and a product packs sixteen rows at a time into a room
//! that stays in cache, multiplies them there and goes on: a first token waits for no memory to be cleared and written. The bits are
//! those of packed panels, and [`moving`] packs them for good once the model is in use.

use super::{
    LANES,
    interleaved::pack_panel,
    layout::{Blocks, Layout},
    opened::Strips,
    packing::pack,
    product::Line,
};
use crate::{
    kernels::cpu::matrix::Matrix,
    weights::{
        bytes::Bytes,
        moving::{self, Later},
    },
};
use std::{
    ops::Range,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

/// Bytes of panels that are packed at a time where many tokens pass: they stay in a core's second-level cache.
const CACHED: usize = 1 << 18;

/// Where the bytes of panels are: in a matrix, and from some time on packed.
pub(super) struct Store {
    pub(super) layout: Layout,
    pub(super) blocks: Blocks,
    /// Until they are packed.
    matrix: Mutex<Option<Arc<Matrix>>>,
    packed: OnceLock<Bytes>,
}

/// The same at one time; what is read of it stays while it is held.
pub(super) enum Source<'a> {
    Packed(&'a [u8]),
    Lying(Arc<Matrix>),
}

impl Store {
    /// Panels that are packed.
    pub(super) fn packed(layout: Layout, blocks: Blocks, packed: Bytes) -> Arc<Self> {
        Arc::new(Self { layout, blocks, matrix: Mutex::new(None), packed: packed.into() })
    }

    /// Panels that are to be packed later.
    pub(super) fn lying(layout: Layout, blocks: Blocks, matrix: Matrix) -> Arc<Self> {
        let matrix = Mutex::new(Some(Arc::new(matrix)));
        let store = Arc::new(Self { layout, blocks, matrix, packed: OnceLock::new() });
        moving::enqueue(&(store.clone() as Arc<dyn Later>));
        store
    }

    pub(super) fn is_packed(&self) -> bool {
        self.packed.get().is_some()
    }

    pub(super) fn source(&self) -> Source<'_> {
        if let Some(packed) = self.packed.get() {
            return Source::Packed(packed);
        }
        match &*self.matrix.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(matrix) => Source::Lying(matrix.clone()),
            // It goes only when they are packed.
            None => Source::Packed(self.packed.get().map_or(&[], |packed| packed)),
        }
    }
}

impl Later for Store {
    fn bytes(&self) -> usize {
        match self.source() {
            Source::Packed(_) => 0,
            Source::Lying(matrix) => matrix.bytes(),
        }
    }

    fn may_stay(&self) -> bool {
        false
    }

    fn lying(&self) -> Vec<Bytes> {
        match self.source() {
            Source::Packed(_) => Vec::new(),
            Source::Lying(matrix) => matrix.parts().to_vec(),
        }
    }

    fn go(&self, alone: bool) -> std::io::Result<()> {
        if let Source::Lying(matrix) = self.source() {
            let room = pack(&self.layout, &self.blocks, &matrix, alone)?;
            let _ = self.packed.set(room.into());
            *self.matrix.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(())
    }
}

/// Panels as products read them: all of them, or some that have just been packed.
pub(super) struct View<'a> {
    pub(super) layout: Layout,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) blocks: Blocks,
    pub(super) factors: &'a [f32],
    /// From panel `first` on.
    pub(super) bytes: &'a [u8],
    pub(super) first: usize,
    /// From a panel's bytes to those that are wanted next.
    pub(super) to_next: usize,
}

impl View<'_> {
    /// Sixteen rows.
    pub(super) fn panel(&self, p: usize) -> &[u8] {
        let size = self.blocks.count * self.blocks.bytes;
        &self.bytes[(p - self.first) * size..][..size]
    }

    /// Where begins what is read when `count` panels from `p` on are done.
    pub(super) fn behind(&self, p: usize, count: usize) -> *const u8 {
        let panel = self.panel(p);
        let steps = if self.to_next == panel.len() { count } else { 1 };
        panel.as_ptr().wrapping_add(steps.wrapping_mul(self.to_next))
    }
}

impl Source<'_> {
    /// The panels; none that are not packed.
    pub(super) fn packed(&self) -> &[u8] {
        match self {
            Source::Packed(bytes) => bytes,
            Source::Lying(_) => &[],
        }
    }

    /// What a product reads of memory, besides scales.
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Source::Packed(bytes) => bytes,
            Source::Lying(matrix) => &matrix.parts()[0],
        }
    }

    /// Calls `f` with the panels of `range` in a view of them: at once if they are packed, otherwise part by part, packed into `turn` before;
    /// one panel at a time, or as many as stay in cache, `least` anyhow, if that is more: many tokens read them again and again.
    pub(super) fn each(
        &self,
        all: &View<'_>,
        range: Range<usize>,
        least: usize,
        turn: &mut Turn,
        mut f: impl FnMut(&View<'_>, Range<usize>),
    ) {
        let Source::Lying(matrix) = self else { return f(all, range) };
        let size = all.blocks.count * all.blocks.bytes;
        let at_once = if least > 1 { (CACHED / size.max(1)).next_multiple_of(least).max(least) } else { 1 };
        let Turn { strips, lines } = turn;
        let strips = strips.get_or_insert_default();
        for first in range.clone().step_by(at_once) {
            let part = first..range.end.min(first + at_once);
            let next = matrix.rows_from(part.end * LANES).as_ptr().addr();
            let bytes = room(lines, part.len() * size);
            for (p, panel) in part.clone().zip(bytes.chunks_exact_mut(size)) {
                pack_panel(&all.layout, &all.blocks, matrix, p, strips, panel);
            }
            let to_next = next.wrapping_sub(bytes.as_ptr().addr());
            f(&View { bytes, first, to_next, ..*all }, part);
        }
    }
}

/// What a thread packs panels into.
#[derive(Default)]
pub(super) struct Turn {
    strips: Option<Box<[Strips; LANES]>>,
    lines: Vec<Line>,
}

/// So many bytes, on cache lines.
fn room(lines: &mut Vec<Line>, len: usize) -> &mut [u8] {
    let wanted = len.div_ceil(size_of::<Line>());
    if lines.len() < wanted {
        lines.resize(wanted, Line([0; 64]));
    }
    // SAFETY: lines are their bytes and nothing else, and there are enough.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), len) }
}
