//! The vocabulary of `Sixteen` in AVX-512 with VNNI: one vector each, and `vpdpbusd`, which adds four products to each lane.

use super::{Job, Sixteen};
use std::arch::x86_64::*;

/// One vector.
#[derive(Clone, Copy)]
pub(in super::super) struct Avx512;

/// Writes the methods that are one expression of intrinsics.
macro_rules! lanes {
    ($($name:ident $([$n:ident])? ($($arg:ident: $of:ty),*) -> $out:ty = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name$(<const $n: i32>)?($($arg: $of),*) -> $out {
            // SAFETY: instruction set and pointers are vouched for by the caller, see `Sixteen`.
            unsafe { $body }
        }
    )*};
}

/// Intrinsics want their count unsigned, and Rust cannot turn one constant into another: this looks it up once it is compiled.
macro_rules! shift {
    ($($name:ident = $by:ident;)*) => {$(
        #[inline(always)]
        unsafe fn $name<const N: i32>(v: __m512i) -> __m512i {
            // SAFETY: as above.
            unsafe { $by(v, _mm_cvtsi32_si128(N)) }
        }
    )*};
}

impl Sixteen for Avx512 {
    type I = __m512i;
    type F = __m512;
    const WIDE: bool = true;
    const CHAIN: usize = 1;
    const SHORTS: bool = false;
    const SIGNED: bool = false;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn run<J: Job>(job: J) -> J::Out {
        // SAFETY: passed on to the caller.
        unsafe { job.run::<Self>() }
    }

    #[inline(always)]
    unsafe fn eight(v: __m512i) -> __m512i {
        v
    }

    shift! {
        shl16 = _mm512_sll_epi16;
        shr16 = _mm512_srl_epi16;
        shl = _mm512_sll_epi32;
        shr = _mm512_srl_epi32;
        sar = _mm512_sra_epi32;
    }

    lanes! {
        load(p: *const u8) -> __m512i = _mm512_loadu_si512(p.cast());
        store(p: *mut u8, v: __m512i) -> () = _mm512_storeu_si512(p.cast(), v);
        splat(x: i32) -> __m512i = _mm512_set1_epi32(x);
        quarters(bytes: &[u8; 16]) -> __m512i = _mm512_broadcast_i32x4(_mm_loadu_si128(bytes.as_ptr().cast()));
        widen_u8(p: *const u8) -> __m512i = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
        widen_i8(p: *const u8) -> __m512i = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
        and(a: __m512i, b: __m512i) -> __m512i = _mm512_and_si512(a, b);
        or_masked(a: __m512i, b: __m512i, mask: __m512i) -> __m512i =
            _mm512_ternarylogic_epi32::<0b1111_1000>(a, b, mask);
        shr16_by(v: __m512i, n: i32) -> __m512i = _mm512_srl_epi16(v, _mm_cvtsi32_si128(n));
        add(a: __m512i, b: __m512i) -> __m512i = _mm512_add_epi32(a, b);
        total(v: __m512i) -> i32 = _mm512_reduce_add_epi32(v);
        shuffle(bytes: __m512i, which: __m512i) -> __m512i = _mm512_shuffle_epi8(bytes, which);
        weave(v: __m512i) -> __m512i =
            _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15), v);
        where_equal(a: __m512i, b: __m512i, then: __m512i, or: __m512i) -> __m512i =
            _mm512_mask_mov_epi32(or, _mm512_cmpeq_epi32_mask(a, b), then);
        dots(sums: __m512i, weights: &[__m512i], x: *const i8) -> __m512i = {
            let mut sums = sums;
            for v in 0..weights.len() {
                let four = _mm512_set1_epi32(x.add(4 * v).cast::<i32>().read_unaligned());
                sums = _mm512_dpbusd_epi32(sums, weights[v], four);
            }
            sums
        };
        dots_of_shorts(sums: __m512i, weights: &[__m512i], x: *const i8) -> __m512i = {
            let mut sums = sums;
            for v in 0..weights.len() {
                let x = x.add(8 * v).cast::<i32>();
                let even = _mm512_and_si512(weights[v], _mm512_set1_epi16(255));
                sums = _mm512_dpwssd_epi32(sums, even, _mm512_set1_epi32(x.read_unaligned()));
                let odd = _mm512_srli_epi16::<8>(weights[v]);
                sums = _mm512_dpwssd_epi32(sums, odd, _mm512_set1_epi32(x.add(1).read_unaligned()));
            }
            sums
        };
        store_bytes(p: *mut i8, v: __m512i) -> () = _mm_storeu_si128(p.cast(), _mm512_cvtepi32_epi8(v));
        store_shorts(p: *mut i8, v: __m512i) -> () = {
            let turned = _mm512_shuffle_epi32::<0b11_01_10_00>(v);
            _mm256_storeu_si256(p.cast(), _mm512_cvtepi32_epi16(turned));
        };
        to_float(v: __m512i) -> __m512 = _mm512_cvtepi32_ps(v);
        to_whole(v: __m512) -> __m512i = _mm512_cvtps_epi32(v);
        as_float(v: __m512i) -> __m512 = _mm512_castsi512_ps(v);
        as_whole(v: __m512) -> __m512i = _mm512_castps_si512(v);
        splat_f32(x: f32) -> __m512 = _mm512_set1_ps(x);
        load_f32(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        store_f32(p: *mut f32, v: __m512, n: usize) -> () =
            _mm512_mask_storeu_ps(p, (u32::MAX >> (32 - n)) as u16, v);
        load_bf16(p: *const u8) -> __m512 =
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))));
        load_f16(p: *const u8) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        peak(v: __m512) -> f32 = _mm512_reduce_max_ps(v);
        sum(v: __m512) -> f32 = _mm512_reduce_add_ps(v);
    }
}
