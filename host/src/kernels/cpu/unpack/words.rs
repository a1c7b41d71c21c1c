//! MLX's word streams: affine 2, 3, 4, 6 and 8 bits, mxfp4, mxfp8 and nvfp4 are one kernel. `W` words are loaded, one to a lane;
//! shifting brings out one number of each word at a time, and a 16-entry table (or a conversion, for bytes) makes it a float.
//! Scales and biases of a row are widened to f32 scratch first, and spread over the lanes whose words they govern.

use super::super::{
    dequantize::{E2M1, e4m3_to_f32, e8m0_to_f32},
    format::{Float, Format},
    lanes::Lanes,
    matrix::Matrix,
};
use super::{Raw, Sink, Unpack};

/// Room behind the scales of a row, so that `spread` may read a whole vector.
const SLACK: usize = 16;

/// What the bytes beside the weights are.
#[derive(Clone, Copy)]
enum Scale {
    /// Scales and biases.
    Affine(Float),
    /// Powers of two (mxfp4, mxfp8).
    E8m0,
    /// Small floats (nvfp4); the row has an f32 factor in place of biases if true.
    E4m3(bool),
}

/// The low eight bits of each lane as E4M3: as in `e4m3_to_f32`, but for NaN, which no checkpoint holds.
#[inline(always)]
pub(super) unsafe fn e4m3<L: Lanes>(v: L::I) -> L::F {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let bits = L::or(L::shl(L::and(v, 0x7f), 20), L::shl(L::and(v, 0x80), 24));
        L::mul(L::as_float(bits), L::splat(f32::from_bits(247 << 23)))
    }
}

/// A matrix of words with `BITS`-bit numbers; `FLOAT8` numbers of eight bits are E4M3, others are unsigned.
#[derive(Clone, Copy)]
pub(in super::super) struct Words<const BITS: u32, const FLOAT8: bool> {
    raw: Raw,
    beside: [*const u8; 2],
    beside_stride: usize,
    scale: Scale,
    group: usize,
    table: [f32; 16],
}

// SAFETY: read-only memory of a matrix that outlives the product.
unsafe impl<const BITS: u32, const FLOAT8: bool> Sync for Words<BITS, FLOAT8> {}
// SAFETY: as above.
unsafe impl<const BITS: u32, const FLOAT8: bool> Send for Words<BITS, FLOAT8> {}

/// Numbers, scales and biases of one row.
#[derive(Clone, Copy)]
pub(in super::super) struct Row {
    words: *const u8,
    scales: *const f32,
    biases: *const f32,
}

impl<const BITS: u32, const FLOAT8: bool> Words<BITS, FLOAT8> {
    /// Bytes of a lane: three- and six-bit numbers fill three bytes without a rest.
    const BYTES: usize = if BITS.is_multiple_of(3) { 3 } else { 4 };
    /// Numbers of a lane.
    pub(in super::super) const PER: usize = Self::BYTES * 8 / BITS as usize;

    /// Valid while `m` is borrowed.
    pub(in super::super) fn new(m: &Matrix) -> Self {
        let [_, scales, biases] = m.parts();
        let whole: [f32; 16] = std::array::from_fn(|i| (i & ((1 << BITS.min(4)) - 1)) as f32);
        let (scale, table) = match m.format() {
            Format::Affine { scales, .. } => (Scale::Affine(scales), whole),
            Format::Nvfp4 => (Scale::E4m3(false), E2M1),
            Format::Nvfp4Scaled => (Scale::E4m3(true), E2M1),
            _ => (Scale::E8m0, E2M1),
        };
        let [_, beside_stride, _] = m.format().row_bytes(m.cols());
        let beside = [scales.as_ptr(), biases.as_ptr()];
        Self { raw: Raw::of(m), beside, beside_stride, scale, group: m.format().block().0, table }
    }

    fn groups(&self) -> usize {
        self.raw.cols / self.group
    }

    /// Widens the scales (`which` 0) or biases (1) of row `r`; leaves zeros behind them.
    #[inline(always)]
    unsafe fn widen<L: Lanes>(&self, r: usize, which: usize, to: *mut f32) {
        let groups = self.groups();
        // SAFETY: a row has `groups` scales and biases; `to` has room for them and `SLACK` more.
        unsafe {
            let from = self.beside[which].add(r * self.beside_stride);
            let factor = match self.scale {
                Scale::E4m3(true) => self.beside[1].add(r * 4).cast::<f32>().read_unaligned(),
                _ => 1.0,
            };
            let whole = groups - groups % L::W;
            let mut g = 0;
            while g < whole {
                let v = match self.scale {
                    Scale::Affine(Float::F32) => L::load(from.add(g * 4).cast()),
                    Scale::Affine(Float::F16) => L::load_f16(from.add(g * 2)),
                    Scale::Affine(Float::BF16) => L::load_bf16(from.add(g * 2)),
                    // An exponent of 0 stands for 2^-127.
                    Scale::E8m0 => L::max(L::as_float(L::shl(L::load_u8(from.add(g)), 23)), L::splat(e8m0_to_f32(0))),
                    Scale::E4m3(_) => L::mul(e4m3::<L>(L::load_u8(from.add(g))), L::splat(factor)),
                };
                L::store(to.add(g), v);
                g += L::W;
            }
            while g < groups {
                *to.add(g) = match self.scale {
                    Scale::Affine(float) => {
                        float.read(std::slice::from_raw_parts(from.add(g * float.size()), float.size()))
                    }
                    Scale::E8m0 => e8m0_to_f32(*from.add(g)),
                    Scale::E4m3(_) => e4m3_to_f32(*from.add(g)) * factor,
                };
                g += 1;
            }
            for pad in 0..SLACK {
                *to.add(groups + pad) = 0.0;
            }
        }
    }

    /// Number `j` of each word.
    #[inline(always)]
    unsafe fn number<L: Lanes>(&self, words: L::I, j: usize, table: L::Table) -> L::F {
        // SAFETY: the caller vouches for the instruction set.
        unsafe {
            let v = L::shr(words, j as u32 * BITS);
            if FLOAT8 {
                e4m3::<L>(v)
            } else if BITS > 4 {
                L::to_float(L::and(v, (1 << BITS) - 1))
            } else {
                L::lookup(table, v)
            }
        }
    }
}

impl<const BITS: u32, const FLOAT8: bool> Unpack for Words<BITS, FLOAT8> {
    type Row = Row;

    fn vectors<L: Lanes>(&self) -> usize {
        Self::PER
    }
    fn chunks<L: Lanes>(&self) -> usize {
        self.raw.cols.div_ceil(Self::PER * L::W)
    }
    fn scratch(&self) -> usize {
        2 * (self.groups() + SLACK)
    }

    #[inline(always)]
    unsafe fn row<L: Lanes>(&self, r: usize, scratch: *mut f32) -> Row {
        // SAFETY: the caller gives as much scratch as `scratch` asks for.
        unsafe {
            let biases = scratch.add(self.groups() + SLACK);
            self.widen::<L>(r, 0, scratch);
            if matches!(self.scale, Scale::Affine(_)) {
                self.widen::<L>(r, 1, biases);
            }
            Row { words: self.raw.row(r), scales: scratch, biases }
        }
    }

    #[inline(always)]
    unsafe fn chunk<L: Lanes, S: Sink<L>>(&self, row: Row, c: usize, sink: &mut S) {
        let words_left = self.raw.cols / Self::PER - c * L::W;
        // Both are powers of two: words that share a scale, and the shift from a lane to its scale.
        let sharing = self.group / Self::PER;
        let first = c * L::W / sharing;
        let shift = sharing.min(L::W).trailing_zeros();
        // SAFETY: of the last chunk only the words that are there are read; scales have slack behind them.
        unsafe {
            let from = row.words.add(c * L::W * Self::BYTES);
            let mut rest = [0u8; 64];
            let from = if words_left * Self::BYTES >= L::W * 4 {
                from
            } else {
                std::ptr::copy_nonoverlapping(from, rest.as_mut_ptr(), words_left.min(L::W) * Self::BYTES);
                rest.as_ptr()
            };
            let words = if Self::BYTES == 3 { L::load_u24(from) } else { L::load_u32(from) };
            let table = L::table(&self.table);
            let scale = L::spread(row.scales.add(first), shift);
            if matches!(self.scale, Scale::Affine(_)) {
                let bias = L::spread(row.biases.add(first), shift);
                for j in 0..Self::PER {
                    sink.take(j, L::fma(self.number::<L>(words, j, table), scale, bias));
                }
            } else {
                for j in 0..Self::PER {
                    sink.take(j, L::mul(self.number::<L>(words, j, table), scale));
                }
            }
        }
    }
}
