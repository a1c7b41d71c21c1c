//! One vocabulary for sixteen rows side by side, so that products in panels are written once: sixteen 32-bit numbers are one vector of
//! AVX-512, two of AVX2, four of NEON. Sums of whole numbers are exact and floats are added in one order with fused products, so that the
//! bits are the same on every processor; `Plain` is what the tests hold the others against.
//!
//! As with `lanes`, that only is fast while everything between two jobs is inlined: `#[inline(always)]`, and no closures on the hot path.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plain;

use crate::kernels::cpu::lanes::Isa;
#[cfg(target_arch = "x86_64")]
pub(super) use avx512::Avx512;

/// Sixteen lanes.
///
/// # Safety
/// All methods: the instruction set is available, and pointers are valid for as many elements as the method says. Pointers need no
/// alignment.
#[allow(clippy::missing_safety_doc)] // said once, above, for all methods
pub(super) trait Sixteen: Copy + Send + Sync + 'static {
    /// Sixteen whole numbers of 32 bits, or 64 bytes: four quarters of sixteen.
    type I: Copy;
    /// Sixteen f32.
    type F: Copy;
    /// Whether a dozen vectors of sums stay in registers, or only some four.
    const WIDE: bool;
    /// How many vectors of weights [`Sixteen::dots`] likes to have at once.
    const CHAIN: usize;
    /// Whether activations of two bytes are multiplied as 16-bit numbers, by [`Sixteen::dots_of_shorts`], not byte by byte.
    const SHORTS: bool;
    /// Whether bytes of weights are signed, so that those of eight bits must be brought down by 128.
    const SIGNED: bool;

    /// Runs a job with the instructions switched on.
    unsafe fn run<J: Job>(job: J) -> J::Out;

    /// 64 bytes.
    unsafe fn load(p: *const u8) -> Self::I;
    /// 64 bytes.
    unsafe fn store(p: *mut u8, v: Self::I);
    /// The same number in all lanes.
    unsafe fn splat(x: i32) -> Self::I;
    /// The same sixteen bytes in all quarters.
    unsafe fn quarters(bytes: &[u8; 16]) -> Self::I;
    /// Sixteen unsigned bytes, a lane each.
    unsafe fn widen_u8(p: *const u8) -> Self::I;
    /// Sixteen signed bytes, a lane each.
    unsafe fn widen_i8(p: *const u8) -> Self::I;
    /// a & b
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    /// a | b & mask
    unsafe fn or_masked(a: Self::I, b: Self::I, mask: Self::I) -> Self::I;
    /// Shifts 16-bit halves of lanes left.
    unsafe fn shl16<const N: i32>(v: Self::I) -> Self::I;
    /// Shifts 16-bit halves of lanes right, N > 0.
    unsafe fn shr16<const N: i32>(v: Self::I) -> Self::I;
    /// The same by a number that is not known beforehand, below 16.
    unsafe fn shr16_by(v: Self::I, n: i32) -> Self::I;
    /// Shifts lanes left.
    unsafe fn shl<const N: i32>(v: Self::I) -> Self::I;
    /// Shifts lanes right, N > 0.
    unsafe fn shr<const N: i32>(v: Self::I) -> Self::I;
    /// Shifts lanes right and keeps their sign, N > 0.
    unsafe fn sar<const N: i32>(v: Self::I) -> Self::I;
    /// a + b, which wraps around.
    unsafe fn add(a: Self::I, b: Self::I) -> Self::I;
    /// All lanes' sum, which wraps around.
    unsafe fn total(v: Self::I) -> i32;
    /// Of each quarter of `bytes` those that the quarter of `which` names, all below 16.
    unsafe fn shuffle(bytes: Self::I, which: Self::I) -> Self::I;
    /// Of each half, 0 1 2 3 4 5 6 7, the lanes as 0 4 1 5 2 6 3 7.
    unsafe fn weave(v: Self::I) -> Self::I;
    /// `then` where a = b, else `or`.
    unsafe fn where_equal(a: Self::I, b: Self::I, then: Self::I, or: Self::I) -> Self::I;
    /// To each lane of `sums`, of each vector of `weights` the products of its four bytes with the next four of `x`. Weights are below 128
    /// (below 25 without [`Sixteen::SHORTS`]) or have been through [`Sixteen::eight`]; there are at most four vectors.
    unsafe fn dots(sums: Self::I, weights: &[Self::I], x: *const i8) -> Self::I;
    /// The same with activations as [`Sixteen::store_shorts`] leaves them, and any weights.
    unsafe fn dots_of_shorts(sums: Self::I, weights: &[Self::I], x: *const i8) -> Self::I;
    /// Weights of eight bits as they are multiplied.
    unsafe fn eight(v: Self::I) -> Self::I;
    /// The lowest byte of each lane.
    unsafe fn store_bytes(p: *mut i8, v: Self::I);
    /// Each lane as two bytes, which hold it; four neighbours lie in the order 0 2 1 3.
    unsafe fn store_shorts(p: *mut i8, v: Self::I);

    /// To f32, rounded.
    unsafe fn to_float(v: Self::I) -> Self::F;
    /// To the nearest whole number, ties to even; what is no number becomes any.
    unsafe fn to_whole(v: Self::F) -> Self::I;
    /// The same bits read as f32.
    unsafe fn as_float(v: Self::I) -> Self::F;
    /// The same bits read as whole numbers.
    unsafe fn as_whole(v: Self::F) -> Self::I;
    /// The same value in all lanes.
    unsafe fn splat_f32(x: f32) -> Self::F;
    /// Sixteen values.
    unsafe fn load_f32(p: *const f32) -> Self::F;
    /// The first `n` lanes, at most sixteen.
    unsafe fn store_f32(p: *mut f32, v: Self::F, n: usize);
    /// Sixteen bf16 values, two bytes each.
    unsafe fn load_bf16(p: *const u8) -> Self::F;
    /// Sixteen f16 values, two bytes each.
    unsafe fn load_f16(p: *const u8) -> Self::F;
    /// a * b
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// a * b + c, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger one, lane by lane; b if either is no number.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The largest lane.
    unsafe fn peak(v: Self::F) -> f32;
    /// All lanes' sum, in any order.
    unsafe fn sum(v: Self::F) -> f32;
}

/// What is done in sixteen lanes.
pub(super) trait Job {
    /// What it gives back.
    type Out;
    /// Must be `#[inline(always)]`.
    ///
    /// # Safety
    /// `S`'s instruction set is available, and the job's pointers are valid.
    unsafe fn run<S: Sixteen>(self) -> Self::Out;
}

/// Whether panels are faster here than rows that are unpacked to f32.
pub(super) fn is_worth_while(isa: Isa) -> bool {
    isa != Isa::Portable
}

/// Runs a job with an instruction set.
///
/// # Safety
/// The job's pointers are valid, and `isa` is one of [`Isa::available`].
pub(super) unsafe fn dispatch<J: Job>(isa: Isa, job: J) -> J::Out {
    // SAFETY: passed on to the caller; who has AVX-512 has AVX2.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx | Isa::Vnni => Avx512::run(job),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avx2::Avx2::<true>::run(job),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx2 => avx2::Avx2::<false>::run(job),
            #[cfg(target_arch = "aarch64")]
            Isa::Dot => neon::Neon::<true>::run(job),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::Neon::<false>::run(job),
            _ => plain::Plain::run(job),
        }
    }
}
