//! Rows of plain floats, and rows that scalar code unpacked into scratch first.

use super::{super::lanes::Lanes, super::matrix::Matrix, Raw, Sink, Unpack};

/// Four vectors a chunk: enough to hide the loop around them.
const VECTORS: usize = 4;

/// How one dense type is read.
pub(in super::super) trait Kind: Copy + Sync {
    /// Bytes of a value.
    const SIZE: usize;
    /// `W` values at `p`.
    unsafe fn load<L: Lanes>(p: *const u8) -> L::F;
}

/// bf16 weights.
#[derive(Clone, Copy)]
pub(in super::super) struct Bf16;
/// f16 weights.
#[derive(Clone, Copy)]
pub(in super::super) struct F16;
/// f32 weights.
#[derive(Clone, Copy)]
pub(in super::super) struct F32;

// SAFETY of the three blocks: `W` values are vouched for by the caller.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Kind for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const u8) -> L::F {
        unsafe { L::load_bf16(p) }
    }
}
#[allow(clippy::undocumented_unsafe_blocks)]
impl Kind for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const u8) -> L::F {
        unsafe { L::load_f16(p) }
    }
}
#[allow(clippy::undocumented_unsafe_blocks)]
impl Kind for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<L: Lanes>(p: *const u8) -> L::F {
        unsafe { L::load(p.cast()) }
    }
}

/// A dense matrix of one type.
#[derive(Clone, Copy)]
pub(in super::super) struct Dense<K>(pub(in super::super) Raw, pub(in super::super) K);

impl<K: Kind> Unpack for Dense<K> {
    type Row = *const u8;

    fn vectors<L: Lanes>(&self) -> usize {
        VECTORS
    }
    fn chunks<L: Lanes>(&self) -> usize {
        self.0.cols.div_ceil(VECTORS * L::W)
    }
    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, r: usize, _: *mut f32) -> *const u8 {
        // SAFETY: passed on to the caller.
        unsafe { self.0.row(r) }
    }
    #[inline(always)]
    unsafe fn chunk<L: Lanes, S: Sink<L>>(&self, row: *const u8, c: usize, sink: &mut S) {
        let first = c * VECTORS * L::W;
        // SAFETY: whole chunks lie inside the row; of the last one, only what is left is copied.
        unsafe {
            if first + VECTORS * L::W <= self.0.cols {
                let p = row.add(first * K::SIZE);
                for v in 0..VECTORS {
                    sink.take(v, K::load::<L>(p.add(v * L::W * K::SIZE)));
                }
            } else {
                let mut rest = [0u8; VECTORS * 16 * 4];
                let left = (self.0.cols - first) * K::SIZE;
                std::ptr::copy_nonoverlapping(row.add(first * K::SIZE), rest.as_mut_ptr(), left);
                for v in 0..VECTORS {
                    sink.take(v, K::load::<L>(rest.as_ptr().add(v * L::W * K::SIZE)));
                }
            }
        }
    }
}

/// Any format, through a row of f32 scratch: the formats without a kernel of their own.
#[derive(Clone, Copy)]
pub(in super::super) struct Unpacked<'a>(pub(in super::super) &'a Matrix);

impl Unpacked<'_> {
    fn dense(&self) -> Dense<F32> {
        Dense(Raw { data: std::ptr::null(), stride: 0, cols: self.0.cols() }, F32)
    }
}

impl Unpack for Unpacked<'_> {
    type Row = *const u8;

    fn vectors<L: Lanes>(&self) -> usize {
        VECTORS
    }
    fn chunks<L: Lanes>(&self) -> usize {
        self.dense().chunks::<L>()
    }
    fn scratch(&self) -> usize {
        self.0.cols()
    }
    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, r: usize, scratch: *mut f32) -> *const u8 {
        // SAFETY: the caller gives as much scratch as `scratch` asks for.
        self.0.stored_row(r, unsafe { std::slice::from_raw_parts_mut(scratch, self.0.cols()) });
        scratch as *const u8
    }
    #[inline(always)]
    unsafe fn chunk<L: Lanes, S: Sink<L>>(&self, row: *const u8, c: usize, sink: &mut S) {
        // SAFETY: as for a dense row.
        unsafe { self.dense().chunk::<L, S>(row, c, sink) }
    }
}
