//! Cached keys or values of any type, widened to f32 a block at a time.

use super::super::lanes::{Job, Lanes};

/// Keys or values, `[entries, kv_heads, dim]`.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// f32.
    F32(&'a [f32]),
    /// f16.
    F16(&'a [half::f16]),
    /// bf16; where the machine multiplies such numbers as they are, queries and weights are rounded to that type too.
    BF16(&'a [half::bf16]),
    /// MLX affine along `dim`, as [`super::super::quantize_rows`] makes it.
    Affine {
        /// Little-endian bit stream, `dim * bits / 8` bytes a head.
        data: &'a [u8],
        /// `[entries, kv_heads, dim / group]`
        scales: &'a [f32],
        /// As `scales`.
        biases: &'a [f32],
        /// 2, 3, 4, 5, 6 or 8.
        bits: u32,
        /// Numbers that share a scale; a multiple of 8 that divides `dim`.
        group: usize,
    },
}

impl Rows<'_> {
    /// Numbers held.
    pub(super) fn len(&self) -> usize {
        match self {
            Rows::F32(x) => x.len(),
            Rows::F16(x) => x.len(),
            Rows::BF16(x) => x.len(),
            Rows::Affine { data, bits, .. } => data.len() * 8 / *bits as usize,
        }
    }

    /// Whether `rows` rows of `dim` numbers can be read.
    pub(super) fn holds(&self, rows: usize, dim: usize) -> bool {
        let beside = match self {
            Rows::Affine { scales, biases, bits, group, .. } => {
                let sound =
                    matches!(bits, 2..=8) && *group > 0 && group.is_multiple_of(8) && dim.is_multiple_of(*group);
                sound && scales.len() >= rows * (dim / group) && biases.len() >= rows * (dim / group)
            }
            _ => true,
        };
        beside && self.len() >= rows * dim
    }
}

/// Widens one head of some entries into `to`, `stride` floats an entry, zeros behind the numbers.
pub(super) struct Widen<'a> {
    pub(super) rows: Rows<'a>,
    pub(super) dim: usize,
    pub(super) heads: usize,
    pub(super) head: usize,
    /// First entry, and how many.
    pub(super) entries: (usize, usize),
    pub(super) to: *mut f32,
    pub(super) stride: usize,
}

impl Job for Widen<'_> {
    type Out = ();

    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let (first, count) = self.entries;
        for i in 0..count {
            let row = (first + i) * self.heads + self.head;
            // SAFETY: `holds` was checked, and `to` has room for `count` entries.
            unsafe {
                let to = std::slice::from_raw_parts_mut(self.to.add(i * self.stride), self.stride);
                let (to, pad) = to.split_at_mut(self.dim);
                pad.fill(0.0);
                let whole = self.dim - self.dim % L::W;
                let at = row * self.dim;
                match self.rows {
                    Rows::F32(x) => to.copy_from_slice(&x[at..at + self.dim]),
                    Rows::F16(x) => {
                        let x = &x[at..at + self.dim];
                        for i in (0..whole).step_by(L::W) {
                            L::store(to.as_mut_ptr().add(i), L::load_f16(x.as_ptr().add(i).cast()));
                        }
                        for i in whole..self.dim {
                            to[i] = L::half(x[i].to_bits());
                        }
                    }
                    Rows::BF16(x) => {
                        let x = &x[at..at + self.dim];
                        for i in (0..whole).step_by(L::W) {
                            L::store(to.as_mut_ptr().add(i), L::load_bf16(x.as_ptr().add(i).cast()));
                        }
                        for i in whole..self.dim {
                            to[i] = x[i].to_f32();
                        }
                    }
                    Rows::Affine { data, scales, biases, bits, group } => {
                        let groups = self.dim / group;
                        let size = group * bits as usize / 8;
                        for g in 0..groups {
                            let at = row * groups + g;
                            let data = &data[at * size..(at + 1) * size];
                            affine(data, scales[at], biases[at], bits, &mut to[g * group..(g + 1) * group]);
                        }
                    }
                }
            }
        }
    }
}

/// One group; eight and four bits in loops that the compiler turns into vectors.
#[inline(always)]
fn affine(data: &[u8], scale: f32, bias: f32, bits: u32, to: &mut [f32]) {
    match bits {
        8 => {
            for (to, &q) in to.iter_mut().zip(data) {
                *to = f32::from(q) * scale + bias;
            }
        }
        4 => {
            for (to, &q) in to.as_chunks_mut::<2>().0.iter_mut().zip(data) {
                *to = [f32::from(q & 15) * scale + bias, f32::from(q >> 4) * scale + bias];
            }
        }
        _ => {
            for (to, bytes) in to.chunks_exact_mut(8).zip(data.chunks_exact(bits as usize)) {
                let word = bytes.iter().rev().fold(0u64, |word, &b| word << 8 | u64::from(b));
                for (i, to) in to.iter_mut().enumerate() {
                    *to = (word >> (i as u32 * bits) & ((1 << bits) - 1)) as f32 * scale + bias;
                }
            }
        }
    }
}
