//! Packed whole numbers as the processor wants them: sixteen rows side by side, so that a vector holds four columns of each and one
//! instruction (VNNI's `vpdpbusd`, NEON's `sdot`) adds four products to the sum of each row. Activations are rounded to whole steps of the largest in
//! their group; sums within a group are exact, and scales meet them once a group.
//!
//! The error is that of the rounding: of each activation up to 1/254 of its group's largest where weights have at most four bits (their own
//! error is ten times that), 1/65000 where they have more. A token's bits are the same alone, in a batch and on any number of threads, but among
//! so many tokens that panels are opened for them and both factors multiplied as bfloat16: more than 32 on a matrix unit, elsewhere more
//! than 64 if weights have more than four bits, and more than 16 if they are floats of eight.

mod alone;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod broadcast;
#[cfg(target_arch = "x86_64")]
mod floats;
mod interleaved;
mod layout;
mod lying;
mod numbers;
mod opened;
mod packing;
#[cfg(target_arch = "x86_64")]
mod pairs;
mod product;
mod rounded;
mod scales;
mod sixteen;
mod tile;

use super::{format::Format, matrix::Matrix};
use layout::Layout;
use lying::Store;
pub(super) use product::multiply;
use std::sync::Arc;

/// Rows that lie side by side: the 32-bit lanes of a vector.
const LANES: usize = 16;

/// `[rows, cols]` = `[out, in]`, sixteen rows after sixteen rows. Cloning shares the bytes.
#[derive(Clone)]
pub struct Panels {
    rows: usize,
    cols: usize,
    /// For each panel, block and kind of strip: for each piece of a row's strip, those of all lanes.
    store: Arc<Store>,
    /// A factor for each row of all panels, empty in most formats.
    factors: Vec<f32>,
}

impl std::fmt::Debug for Panels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} [{}, {}] in panels", self.format(), self.rows, self.cols)
    }
}

impl Panels {
    /// The same matrix in panels, and its own pages let go, if this machine multiplies its format that way.
    pub fn new(matrix: &Matrix) -> Option<Self> {
        let layout = Self::layout_of(matrix)?;
        Self::pack(layout, matrix)
    }

    /// The same, but packed only [once the model is in use](crate::weights::moving): until then products do it each time.
    pub fn later(matrix: &Matrix) -> Option<Self> {
        Some(Self::lying(Self::layout_of(matrix)?, matrix))
    }

    fn layout_of(matrix: &Matrix) -> Option<Layout> {
        let cols = matrix.cols();
        let layout = Layout::of(matrix.format(), cols).filter(product::runs_here)?;
        // Only FP8 has groups of any size.
        let whole = cols > 0 && cols.is_multiple_of(layout.group) && (!layout.e4m3 || layout.group.is_multiple_of(32));
        let fits = matrix.rows() >= LANES && whole && matrix.column_order().is_none();
        fits.then_some(layout)
    }

    /// Whether its rows lie side by side by now.
    pub fn is_packed(&self) -> bool {
        self.store.is_packed()
    }

    /// How the weights were packed.
    pub fn format(&self) -> Format {
        self.store.layout.format
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Memory held, scales included.
    pub fn bytes(&self) -> usize {
        let blocks = &self.store.blocks;
        self.rows.div_ceil(LANES) * blocks.count * blocks.bytes + 4 * self.factors.len()
    }
}
