//! Activations times packed weights: out = x Wᵀ. Few tokens unpack weights in registers as they stream from memory; many
//! tokens unpack a block of rows into cache and multiply tile by tile.
//! Both ways add up each output in the same order, one vector of partial sums from the first column to the last, so a token's
//! result is bit for bit the same alone, in a batch, in a chunk of any size and on any number of threads.

#[cfg(target_arch = "x86_64")]
use super::bf16;
use super::{
    ahead,
    format::{Float, Format},
    lanes::{Isa, dispatch},
    matrix::Matrix,
    stream::{ABREAST, Padded, Spill, Stream, Streamed},
    tasks::{Output, in_tasks},
    team::each_chunk,
    tile::{Block, multiply},
    unpack::{
        Bf16, Dense, F16, F32, Fp8, Order, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0, Raw, Unpack,
        Unpacked, Words,
    },
};

/// Up to this many tokens weights are unpacked in registers.
const FEW: usize = 4;
/// Tokens that are worth a task of their own to be laid out.
const TOKENS: usize = 16;
/// Unpacked weights that stay in a core's second-level cache, in f32.
const CACHED: usize = 1 << 17;

impl Matrix {
    /// out = x · Wᵀ: `x` is `[tokens, cols]`, `out` `[tokens, rows]`; products and sums in f32, of activations rounded
    /// to bfloat16 if the matrix is [for halves](Matrix::for_halves).
    ///
    /// # Panics
    /// If the lengths of `x` and `out` do not belong to the same number of tokens.
    pub fn matmul(&self, x: &[f32], out: &mut [f32]) {
        self.matmul_on(Isa::best(), x, out);
    }

    /// Whether activations are rounded to bfloat16 here, as weights are.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn multiplies_in_halves(&self) -> bool {
        self.is_for_halves() && self.format() == Format::Dense(Float::BF16) && bf16::runs_here()
    }

    /// The same with a chosen instruction set, one of [`Isa::available`].
    pub fn matmul_on(&self, isa: Isa, x: &[f32], out: &mut [f32]) {
        if self.cols() == 0 || self.rows() == 0 {
            return out.fill(0.0);
        }
        let tokens = x.len() / self.cols();
        assert!(
            x.len() == tokens * self.cols() && out.len() == tokens * self.rows(),
            "matmul: {} inputs and {} outputs for {self:?}",
            x.len(),
            out.len()
        );
        assert!(isa == Isa::best() || Isa::available().contains(&isa), "this machine has no {isa:?}");
        let raw = Raw::of(self);
        let x = self.stored_order(x);
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::best() && self.multiplies_in_halves() {
            return bf16::multiply(&mut [(bf16::Halves::Rows(self), out)], &x);
        }
        let call = Call {
            isa,
            rows: self.rows(),
            cols: self.cols(),
            tokens,
            x: &x,
            order: Order::Plain,
            weights: &self.parts()[0],
        };
        match self.format() {
            Format::Dense(Float::F32) => call.run(Dense(raw, F32), out),
            Format::Dense(Float::F16) => call.run(Dense(raw, F16), out),
            Format::Dense(Float::BF16) => call.run(Dense(raw, Bf16), out),
            Format::Affine { bits: 2, .. } => call.words::<2, false>(self, out),
            Format::Affine { bits: 3, .. } => call.words::<3, false>(self, out),
            Format::Affine { bits: 4, .. } | Format::Mxfp4 | Format::Nvfp4 | Format::Nvfp4Scaled => {
                call.words::<4, false>(self, out)
            }
            Format::Affine { bits: 6, .. } => call.words::<6, false>(self, out),
            Format::Affine { bits: 8, .. } => call.words::<8, false>(self, out),
            Format::Mxfp8 => call.words::<8, true>(self, out),
            Format::Fp8 { .. } if Fp8::reads(self) => call.run(Fp8::new(self), out),
            Format::Affine { .. } | Format::Fp8 { .. } => call.run(Unpacked(self), out),
            Format::Q4_0 => call.run(Q4_0(raw), out),
            Format::Q4_1 => call.run(Q4_1(raw), out),
            Format::Q8_0 => call.run(Q8_0(raw), out),
            Format::Q5_0 => call.run(Q5_0(raw), out),
            Format::Q5_1 => call.run(Q5_1(raw), out),
            Format::Q2K => call.run(Q2K(raw), out),
            Format::Q3K => call.run(Q3K(raw), out),
            Format::Q4K => call.run(Q4K(raw), out),
            Format::Q5K => call.run(Q5K(raw), out),
            Format::Q6K => call.run(Q6K(raw), out),
        }
    }
}

/// One product.
#[derive(Clone, Copy)]
struct Call<'a> {
    isa: Isa,
    rows: usize,
    cols: usize,
    tokens: usize,
    x: &'a [f32],
    order: Order,
    /// What is read of memory, besides scales.
    weights: &'a [u8],
}

impl Call<'_> {
    fn words<const BITS: u32, const FLOAT8: bool>(self, m: &Matrix, out: &mut [f32]) {
        let order = Order::Words { per: Words::<BITS, FLOAT8>::PER };
        Call { order, ..self }.run(Words::<BITS, FLOAT8>::new(m), out);
    }

    fn run<U: Unpack>(self, unpack: U, out: &mut [f32]) {
        // SAFETY: no pointers are involved.
        let padded = unsafe { dispatch(self.isa, Padded(unpack)) };
        let few = self.tokens <= FEW;
        if few {
            ahead::pass(self.weights);
        }
        // Rows whose starts are a power of two apart would all fall into the same few lines of the first-level cache.
        let stride = if few { padded } else { padded + 16 };
        let mut laid_out = Vec::new();
        let x = if few && self.order == Order::Plain && padded == self.cols {
            self.x
        } else {
            laid_out.resize(self.tokens * stride, 0.0);
            self.lay_out(stride, &mut laid_out);
            &laid_out[..]
        };
        let out = Output(out.as_mut_ptr());
        let most = if few { usize::MAX } else { (CACHED / padded).max(ABREAST) };
        in_tasks(self.rows, self.cols * self.tokens, ABREAST, most, |scratch: &mut Vec<f32>, range| {
            // SAFETY: rows lie inside the matrix, which the caller borrows; `x` has `stride` floats for each token, and
            // tasks write disjoint rows of `out`.
            unsafe {
                if few {
                    scratch.resize(ABREAST * unpack.scratch(), 0.0);
                    let (x, out) = (x.as_ptr(), out.pointer());
                    let stream =
                        Stream { unpack, range, x, stride, out, pitch: self.rows, scratch: scratch.as_mut_ptr() };
                    match self.tokens {
                        1 => dispatch(self.isa, Streamed::<U, 1>(stream)),
                        2 => dispatch(self.isa, Streamed::<U, 2>(stream)),
                        3 => dispatch(self.isa, Streamed::<U, 3>(stream)),
                        _ => dispatch(self.isa, Streamed::<U, FEW>(stream)),
                    }
                } else {
                    scratch.resize(unpack.scratch() + range.len() * stride, 0.0);
                    let to = scratch.as_mut_ptr().add(unpack.scratch());
                    dispatch(
                        self.isa,
                        Spill { unpack, range: range.clone(), to, stride, scratch: scratch.as_mut_ptr() },
                    );
                    let out = out.pointer().add(range.start);
                    let weights = Block { data: to, stride, rows: range.len() };
                    let x = Block { data: x.as_ptr(), stride, rows: self.tokens };
                    multiply(self.isa, weights, x, padded, out, self.rows);
                }
            }
        });
    }

    /// Copies activations into the order of the weights, each token `stride` floats after the one before.
    fn lay_out(&self, stride: usize, to: &mut [f32]) {
        let lanes = if matches!(self.isa, Isa::Amx | Isa::Vnni | Isa::Avx512) { 16 } else { 8 };
        let one = |(to, x): (&mut [f32], &[f32])| match self.order {
            Order::Plain => to[..x.len()].copy_from_slice(x),
            Order::Words { per } => {
                for (to, x) in to.chunks_mut(per * lanes).zip(x.chunks(per * lanes)) {
                    for (l, word) in x.chunks_exact(per).enumerate() {
                        for (j, &x) in word.iter().enumerate() {
                            to[j * lanes + l] = x;
                        }
                    }
                }
            }
        };
        each_chunk(to, stride * TOKENS, |i, to| {
            to.chunks_mut(stride).zip(self.x.chunks(self.cols).skip(i * TOKENS)).for_each(one);
        });
    }
}
