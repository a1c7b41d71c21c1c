//! One vocabulary for vector arithmetic, so that every kernel is written once and compiled for AVX-512, AVX2, NEON and plain Rust.
//! A kernel is a `Job`; `dispatch` runs it inside a function that has the instruction set switched on. That only works
//! while everything the job calls is inlined into it: `#[inline(always)]`, and no closures on the hot path.

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub(super) use neon::from_f16;
pub use portable::Portable;
use std::sync::OnceLock;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// The same with a matrix unit for many tokens: AMX, for bfloat16.
    Amx,
    /// AVX-512 with VNNI: packed whole numbers are multiplied as they are.
    Vnni,
    /// 16 lanes: AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2 with AVX-VNNI: packed whole numbers are multiplied as they are, eight lanes of them.
    AvxVnni,
    /// 8 lanes: AVX2, FMA, F16C.
    Avx2,
    /// NEON with the dot product (ARMv8.2): packed whole numbers are multiplied as they are.
    Dot,
    /// NEON, as every 64-bit ARM has it.
    Neon,
    /// 8 lanes of plain Rust, which the compiler turns into SSE2 on old x86.
    Portable,
}

impl Isa {
    /// The best one of this machine. `DYLM_ISA=vnni|avx512|avxvnni|avx2|neon|portable` lowers it, for comparisons; what the
    /// machine has not is not taken.
    pub fn best() -> Isa {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| {
            let wanted = std::env::var("DYLM_ISA").unwrap_or_default();
            let all = Isa::available();
            all.iter()
                .find(|isa| format!("{isa:?}").eq_ignore_ascii_case(&wanted))
                .or(all.first())
                .copied()
                .unwrap_or(Isa::Portable)
        })
    }

    /// Whether it is AVX-512 with VNNI, or more.
    pub fn has_vnni(self) -> bool {
        matches!(self, Isa::Amx | Isa::Vnni)
    }

    /// All that this machine can run, best first.
    pub fn available() -> Vec<Isa> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            if avx2 && avx512 && is_x86_feature_detected!("avx512vnni") {
                if super::amx::available() {
                    all.push(Isa::Amx);
                }
                all.push(Isa::Vnni);
            }
            if avx2 && avx512 {
                all.push(Isa::Avx512);
            }
            if avx2 && is_x86_feature_detected!("avxvnni") {
                all.push(Isa::AvxVnni);
            }
            if avx2 {
                all.push(Isa::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                all.push(Isa::Dot);
            }
            all.push(Isa::Neon);
        }
        all.push(Isa::Portable);
        all
    }
}

/// A vector of `W` f32 lanes and of `W` u32 lanes.
///
/// # Safety
/// All methods: the instruction set is available, and pointers are valid for as many elements as the method says.
/// Pointers need no alignment.
#[allow(clippy::missing_safety_doc)] // said once, above, for all methods
pub trait Lanes: Copy + 'static {
    /// Lanes of a vector; a power of two, at most 16.
    const W: usize;
    /// Vectors that fit the register file: a 4 x 6 tile of sums if true, else 3 x 4.
    const WIDE: bool;
    /// f32 lanes.
    type F: Copy;
    /// u32 lanes.
    type I: Copy;
    /// Sixteen f32 values to look up by four bits.
    type Table: Copy;

    /// The same value in all lanes.
    unsafe fn splat(x: f32) -> Self::F;
    /// `W` values.
    unsafe fn load(p: *const f32) -> Self::F;
    /// `W` values.
    unsafe fn store(p: *mut f32, v: Self::F);
    /// a + b
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// a - b
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    /// a * b
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// a / b
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// The larger one, lane by lane.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// The smaller one, lane by lane.
    unsafe fn min(a: Self::F, b: Self::F) -> Self::F;
    /// a * b + c, rounded once where the machine can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest whole number.
    unsafe fn round(v: Self::F) -> Self::F;
    /// 2^v for whole v in [-126, 127].
    unsafe fn exp2_whole(v: Self::F) -> Self::F;
    /// Sum of all lanes, in a fixed order.
    unsafe fn sum(v: Self::F) -> f32;
    /// Largest lane.
    unsafe fn peak(v: Self::F) -> f32;
    /// `W` bf16 values, two bytes each.
    unsafe fn load_bf16(p: *const u8) -> Self::F;
    /// `W` f16 values, two bytes each.
    unsafe fn load_f16(p: *const u8) -> Self::F;
    /// One f16 from its bits.
    unsafe fn half(bits: u16) -> f32;
    /// `W` bytes, zero extended.
    unsafe fn load_u8(p: *const u8) -> Self::I;
    /// `W` bytes, sign extended.
    unsafe fn load_i8(p: *const u8) -> Self::I;
    /// `W` little-endian u32.
    unsafe fn load_u32(p: *const u8) -> Self::I;
    /// `W` little-endian numbers of three bytes; reads four bytes a lane at most.
    unsafe fn load_u24(p: *const u8) -> Self::I;
    /// Bit number l of `word` in lane l.
    unsafe fn bits(word: u32) -> Self::I;
    /// Logical shift right; n < 32.
    unsafe fn shr(v: Self::I, n: u32) -> Self::I;
    /// Shift left; n < 32.
    unsafe fn shl(v: Self::I, n: u32) -> Self::I;
    /// v & mask
    unsafe fn and(v: Self::I, mask: u32) -> Self::I;
    /// a | b
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Signed whole numbers to f32.
    unsafe fn to_float(v: Self::I) -> Self::F;
    /// The same bits read as f32.
    unsafe fn as_float(v: Self::I) -> Self::F;
    /// Prepares a table.
    unsafe fn table(values: &[f32; 16]) -> Self::Table;
    /// `values[lane & 15]`
    unsafe fn lookup(table: Self::Table, v: Self::I) -> Self::F;
    /// Lane l takes `p[l >> shift]`; reads `W` values from `p`.
    unsafe fn spread(p: *const f32, shift: u32) -> Self::F;
}

/// e^x, within 2 units in the last place; exactly 0 below -104, so that a masked score (-inf) weighs nothing.
///
/// # Safety
/// As for [`Lanes`].
#[inline(always)]
pub unsafe fn exp<L: Lanes>(x: L::F) -> L::F {
    // SAFETY: the caller vouches for the instruction set.
    unsafe {
        let x = L::min(L::max(x, L::splat(-104.0)), L::splat(88.722));
        let n = L::round(L::mul(x, L::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts (Cody and Waite): the first has trailing zeros, so that n times it is exact.
        let r = L::fma(n, L::splat(-0.693_359_4), x);
        let r = L::fma(n, L::splat(2.121_944_4e-4), r);
        let mut p = L::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = L::fma(p, r, L::splat(c));
        }
        // 2^n in two factors: n reaches from -150 to 128, an exponent only from -126 to 127.
        let half = L::round(L::mul(n, L::splat(0.5)));
        L::mul(L::mul(p, L::exp2_whole(half)), L::exp2_whole(L::sub(n, half)))
    }
}

/// A kernel, ready to run on any instruction set.
pub trait Job {
    /// What it gives back.
    type Out;
    /// Runs with `L`'s instructions; must be `#[inline(always)]`.
    ///
    /// # Safety
    /// `L`'s instruction set is available, and the job's pointers are valid.
    unsafe fn run<L: Lanes>(self) -> Self::Out;
}

/// Runs a job with an instruction set.
///
/// # Safety
/// The job's pointers are valid, and `isa` is one of [`Isa::available`].
pub unsafe fn dispatch<J: Job>(isa: Isa, job: J) -> J::Out {
    // SAFETY: passed on to the caller.
    unsafe {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx | Isa::Vnni | Isa::Avx512 => x86::run_avx512(job),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni | Isa::Avx2 => x86::run_avx2(job),
            #[cfg(target_arch = "aarch64")]
            Isa::Dot | Isa::Neon => job.run::<neon::Neon>(),
            _ => job.run::<Portable>(),
        }
    }
}
