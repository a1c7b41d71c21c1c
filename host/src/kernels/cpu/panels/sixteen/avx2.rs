//! The vocabulary of `Sixteen` in AVX2: two vectors each. Without AVX-VNNI's `vpdpbusd`, pairs of products of bytes are added in 16 bits,
//! which weights of four bits never fill, and activations of two bytes are multiplied as 16-bit numbers.

use super::{Job, Sixteen};
use std::arch::x86_64::*;

/// Two vectors, with AVX-VNNI or without.
#[derive(Clone, Copy)]
pub(super) struct Avx2<const VNNI: bool>;

/// Whole numbers: the first eight lanes and the last eight.
type I = (__m256i, __m256i);
/// The same of floats.
type F = (__m256, __m256);

/// Writes the methods that do the same to both vectors, and those that are one expression.
macro_rules! lanes {
    (both { $($name:ident $([$n:ident])? ($($arg:ident: $of:ty),*) -> $out:ty = $by:expr;)* }) => {$(
        #[inline(always)]
        unsafe fn $name$(<const $n: i32>)?($($arg: $of),*) -> $out {
            // SAFETY: instruction set and pointers are vouched for by the caller, see `Sixteen`.
            unsafe { ({ $(let $arg = $arg.0;)* $by }, { $(let $arg = $arg.1;)* $by }) }
        }
    )*};
    (one { $($name:ident($($arg:ident: $of:ty),*) -> $out:ty = $body:expr;)* }) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $of),*) -> $out {
            // SAFETY: as above.
            unsafe { $body }
        }
    )*};
}

#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
#[inline]
unsafe fn run_with_vnni<J: Job>(job: J) -> J::Out {
    // SAFETY: passed on to the caller.
    unsafe { job.run::<Avx2<true>>() }
}

#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
unsafe fn run_without<J: Job>(job: J) -> J::Out {
    // SAFETY: passed on to the caller.
    unsafe { job.run::<Avx2<false>>() }
}

/// The same four bytes in all lanes.
#[inline(always)]
unsafe fn four(x: *const i8) -> __m256i {
    // SAFETY: the caller vouches.
    unsafe { _mm256_set1_epi32(x.cast::<i32>().read_unaligned()) }
}

/// Sums of pairs of products of bytes.
#[inline(always)]
unsafe fn pairs(weights: I, x: __m256i) -> I {
    // SAFETY: as above.
    unsafe { (_mm256_maddubs_epi16(weights.0, x), _mm256_maddubs_epi16(weights.1, x)) }
}

/// Sums of pairs of products of 16-bit numbers, added to `sums`.
#[inline(always)]
unsafe fn add_pairs(sums: I, a: I, x: __m256i) -> I {
    // SAFETY: as above.
    unsafe {
        (_mm256_add_epi32(sums.0, _mm256_madd_epi16(a.0, x)), _mm256_add_epi32(sums.1, _mm256_madd_epi16(a.1, x)))
    }
}

impl<const VNNI: bool> Sixteen for Avx2<VNNI> {
    type I = I;
    type F = F;
    const WIDE: bool = false;
    const CHAIN: usize = if VNNI { 1 } else { 4 };
    const SHORTS: bool = !VNNI;
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn run<J: Job>(job: J) -> J::Out {
        // SAFETY: passed on to the caller.
        unsafe { if VNNI { run_with_vnni(job) } else { run_without(job) } }
    }

    #[inline(always)]
    unsafe fn eight(v: I) -> I {
        v
    }

    lanes! { both {
        and(a: I, b: I) -> I = _mm256_and_si256(a, b);
        or_masked(a: I, b: I, mask: I) -> I = _mm256_or_si256(a, _mm256_and_si256(b, mask));
        shl16[N](v: I) -> I = _mm256_slli_epi16::<N>(v);
        shr16[N](v: I) -> I = _mm256_srli_epi16::<N>(v);
        shl[N](v: I) -> I = _mm256_slli_epi32::<N>(v);
        shr[N](v: I) -> I = _mm256_srli_epi32::<N>(v);
        sar[N](v: I) -> I = _mm256_srai_epi32::<N>(v);
        add(a: I, b: I) -> I = _mm256_add_epi32(a, b);
        shuffle(bytes: I, which: I) -> I = _mm256_shuffle_epi8(bytes, which);
        weave(v: I) -> I = _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        where_equal(a: I, b: I, then: I, or: I) -> I = _mm256_blendv_epi8(or, then, _mm256_cmpeq_epi32(a, b));
        to_float(v: I) -> F = _mm256_cvtepi32_ps(v);
        to_whole(v: F) -> I = _mm256_cvtps_epi32(v);
        as_float(v: I) -> F = _mm256_castsi256_ps(v);
        as_whole(v: F) -> I = _mm256_castps_si256(v);
        mul(a: F, b: F) -> F = _mm256_mul_ps(a, b);
        fma(a: F, b: F, c: F) -> F = _mm256_fmadd_ps(a, b, c);
        max(a: F, b: F) -> F = _mm256_max_ps(a, b);
    } }

    lanes! { one {
        load(p: *const u8) -> I = (_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast()));
        store(p: *mut u8, v: I) -> () = {
            _mm256_storeu_si256(p.cast(), v.0);
            _mm256_storeu_si256(p.add(32).cast(), v.1);
        };
        splat(x: i32) -> I = (_mm256_set1_epi32(x), _mm256_set1_epi32(x));
        quarters(bytes: &[u8; 16]) -> I = {
            let both = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast()));
            (both, both)
        };
        widen_u8(p: *const u8) -> I =
            (_mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast())));
        widen_i8(p: *const u8) -> I =
            (_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast())), _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8).cast())));
        shr16_by(v: I, n: i32) -> I = {
            let n = _mm_cvtsi32_si128(n);
            (_mm256_srl_epi16(v.0, n), _mm256_srl_epi16(v.1, n))
        };
        total(v: I) -> i32 = {
            let v = _mm256_add_epi32(v.0, v.1);
            let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
            let v = _mm_add_epi32(v, _mm_shuffle_epi32::<0b01_00_11_10>(v));
            _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32::<0b10_11_00_01>(v)))
        };
        dots(sums: I, weights: &[I], x: *const i8) -> I = {
            if VNNI {
                let mut sums = sums;
                for v in 0..weights.len() {
                    let x = four(x.add(4 * v));
                    sums.0 = _mm256_dpbusd_avx_epi32(sums.0, weights[v].0, x);
                    sums.1 = _mm256_dpbusd_avx_epi32(sums.1, weights[v].1, x);
                }
                sums
            } else {
                // Four pairs of 24 times 127 are 24384: they fit 16 bits together.
                let mut all = pairs(weights[0], four(x));
                for v in 1..weights.len() {
                    let more = pairs(weights[v], four(x.add(4 * v)));
                    all = (_mm256_add_epi16(all.0, more.0), _mm256_add_epi16(all.1, more.1));
                }
                add_pairs(sums, all, _mm256_set1_epi16(1))
            }
        };
        dots_of_shorts(sums: I, weights: &[I], x: *const i8) -> I = {
            let (mut sums, low) = (sums, _mm256_set1_epi16(255));
            for v in 0..weights.len() {
                let w = weights[v];
                let even = (_mm256_and_si256(w.0, low), _mm256_and_si256(w.1, low));
                let odd = (_mm256_srli_epi16::<8>(w.0), _mm256_srli_epi16::<8>(w.1));
                sums = add_pairs(sums, even, four(x.add(8 * v)));
                sums = add_pairs(sums, odd, four(x.add(8 * v + 4)));
            }
            sums
        };
        store_bytes(p: *mut i8, v: I) -> () = {
            let low = _mm256_set1_epi32(255);
            // 0-3 8-11 and 4-7 12-15, the latter in the upper half.
            let words = _mm256_packus_epi32(_mm256_and_si256(v.0, low), _mm256_and_si256(v.1, low));
            let bytes = _mm256_packus_epi16(words, words);
            let (a, b) = (_mm256_castsi256_si128(bytes), _mm256_extracti128_si256::<1>(bytes));
            _mm_storeu_si128(p.cast(), _mm_unpacklo_epi32(a, b));
        };
        store_shorts(p: *mut i8, v: I) -> () = {
            let (a, b) = (_mm256_shuffle_epi32::<0b11_01_10_00>(v.0), _mm256_shuffle_epi32::<0b11_01_10_00>(v.1));
            _mm256_storeu_si256(p.cast(), _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b)));
        };
        splat_f32(x: f32) -> F = (_mm256_set1_ps(x), _mm256_set1_ps(x));
        load_f32(p: *const f32) -> F = (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8)));
        store_f32(p: *mut f32, v: F, n: usize) -> () = {
            if n == 16 {
                _mm256_storeu_ps(p, v.0);
                _mm256_storeu_ps(p.add(8), v.1);
            } else {
                let mut all = [0.0; 16];
                _mm256_storeu_ps(all.as_mut_ptr(), v.0);
                _mm256_storeu_ps(all.as_mut_ptr().add(8), v.1);
                p.copy_from_nonoverlapping(all.as_ptr(), n);
            }
        };
        load_bf16(p: *const u8) -> F = {
            let (a, b) = (_mm_loadu_si128(p.cast()), _mm_loadu_si128(p.add(16).cast()));
            let (a, b) = (_mm256_cvtepu16_epi32(a), _mm256_cvtepu16_epi32(b));
            (_mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b)))
        };
        load_f16(p: *const u8) -> F =
            (_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(16).cast())));
        peak(v: F) -> f32 = {
            let v = _mm256_max_ps(v.0, v.1);
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        };
        sum(v: F) -> f32 = {
            let v = _mm256_add_ps(v.0, v.1);
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        };
    } }
}
