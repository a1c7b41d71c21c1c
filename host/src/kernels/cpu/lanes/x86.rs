//! The vocabulary of `Lanes` in AVX-512 (16 lanes) and AVX2 (8 lanes).
//! The 16-entry lookup is the heart of all 4-bit kernels: one `vpermps` in AVX-512, two and a blend in AVX2.

use super::{Job, Lanes};
use std::arch::x86_64::*;

/// # Safety
/// As for [`super::dispatch`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub unsafe fn run_avx512<J: Job>(job: J) -> J::Out {
    // SAFETY: passed on to the caller.
    unsafe { job.run::<Avx512>() }
}

/// # Safety
/// As for [`super::dispatch`].
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run_avx2<J: Job>(job: J) -> J::Out {
    // SAFETY: passed on to the caller.
    unsafe { job.run::<Avx2>() }
}

#[derive(Clone, Copy)]
pub struct Avx512;

#[derive(Clone, Copy)]
pub struct Avx2;

/// Writes the methods that are one expression of intrinsics.
macro_rules! lanes {
    ($($name:ident($($arg:ident: $of:ty),*) -> $out:ty = $body:expr;)*) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $of),*) -> $out {
            // SAFETY: instruction set and pointers are vouched for by the caller, see `Lanes`.
            unsafe { $body }
        }
    )*};
}

/// Byte order that turns four three-byte numbers into four words.
#[inline(always)]
unsafe fn spread_u24() -> __m128i {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1) }
}

impl Lanes for Avx512 {
    const W: usize = 16;
    const WIDE: bool = true;
    type F = __m512;
    type I = __m512i;
    type Table = __m512;

    lanes! {
        splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        load(p: *const f32) -> __m512 = _mm512_loadu_ps(p);
        store(p: *mut f32, v: __m512) -> () = _mm512_storeu_ps(p, v);
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        fma(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        round(v: __m512) -> __m512 = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
        exp2_whole(v: __m512) -> __m512 =
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(_mm512_cvtps_epi32(v), _mm512_set1_epi32(127))));
        sum(v: __m512) -> f32 = Avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)));
        peak(v: __m512) -> f32 = Avx2::peak(_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)));
        load_bf16(p: *const u8) -> __m512 =
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()))));
        load_f16(p: *const u8) -> __m512 = _mm512_cvtph_ps(_mm256_loadu_si256(p.cast()));
        half(bits: u16) -> f32 = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))));
        load_u8(p: *const u8) -> __m512i = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
        load_i8(p: *const u8) -> __m512i = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()));
        load_u32(p: *const u8) -> __m512i = _mm512_loadu_si512(p.cast());
        load_u24(p: *const u8) -> __m512i = {
            // Each quarter gets the four words that hold its twelve bytes, then spreads them.
            let from = _mm512_setr_epi32(0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9, 10, 11, 12);
            let quarters = _mm512_permutexvar_epi32(from, _mm512_loadu_si512(p.cast()));
            _mm512_shuffle_epi8(quarters, _mm512_broadcast_i32x4(spread_u24()))
        };
        bits(word: u32) -> __m512i = {
            let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            Self::and(_mm512_srlv_epi32(_mm512_set1_epi32(word as i32), lane), 1)
        };
        shr(v: __m512i, n: u32) -> __m512i = _mm512_srlv_epi32(v, _mm512_set1_epi32(n as i32));
        shl(v: __m512i, n: u32) -> __m512i = _mm512_sllv_epi32(v, _mm512_set1_epi32(n as i32));
        and(v: __m512i, mask: u32) -> __m512i = _mm512_and_si512(v, _mm512_set1_epi32(mask as i32));
        or(a: __m512i, b: __m512i) -> __m512i = _mm512_or_si512(a, b);
        to_float(v: __m512i) -> __m512 = _mm512_cvtepi32_ps(v);
        as_float(v: __m512i) -> __m512 = _mm512_castsi512_ps(v);
        table(values: &[f32; 16]) -> __m512 = _mm512_loadu_ps(values.as_ptr());
        lookup(table: __m512, v: __m512i) -> __m512 = _mm512_permutexvar_ps(v, table);
        spread(p: *const f32, shift: u32) -> __m512 = {
            let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            _mm512_permutexvar_ps(Self::shr(lane, shift), _mm512_loadu_ps(p))
        };
    }
}

impl Lanes for Avx2 {
    const W: usize = 8;
    const WIDE: bool = false;
    type F = __m256;
    type I = __m256i;
    type Table = (__m256, __m256);

    lanes! {
        splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        load(p: *const f32) -> __m256 = _mm256_loadu_ps(p);
        store(p: *mut f32, v: __m256) -> () = _mm256_storeu_ps(p, v);
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        max(a: __m256, b: __m256) -> __m256 = _mm256_max_ps(a, b);
        min(a: __m256, b: __m256) -> __m256 = _mm256_min_ps(a, b);
        fma(a: __m256, b: __m256, c: __m256) -> __m256 = _mm256_fmadd_ps(a, b, c);
        round(v: __m256) -> __m256 = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
        exp2_whole(v: __m256) -> __m256 =
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_cvtps_epi32(v), _mm256_set1_epi32(127))));
        sum(v: __m256) -> f32 = {
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        };
        peak(v: __m256) -> f32 = {
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        };
        load_bf16(p: *const u8) -> __m256 =
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()))));
        load_f16(p: *const u8) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
        half(bits: u16) -> f32 = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(bits))));
        load_u8(p: *const u8) -> __m256i = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
        load_i8(p: *const u8) -> __m256i = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()));
        load_u32(p: *const u8) -> __m256i = _mm256_loadu_si256(p.cast());
        load_u24(p: *const u8) -> __m256i = {
            let halves = _mm256_set_m128i(_mm_loadu_si128(p.add(12).cast()), _mm_loadu_si128(p.cast()));
            _mm256_shuffle_epi8(halves, _mm256_broadcastsi128_si256(spread_u24()))
        };
        bits(word: u32) -> __m256i = {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            Self::and(_mm256_srlv_epi32(_mm256_set1_epi32(word as i32), lane), 1)
        };
        shr(v: __m256i, n: u32) -> __m256i = _mm256_srlv_epi32(v, _mm256_set1_epi32(n as i32));
        shl(v: __m256i, n: u32) -> __m256i = _mm256_sllv_epi32(v, _mm256_set1_epi32(n as i32));
        and(v: __m256i, mask: u32) -> __m256i = _mm256_and_si256(v, _mm256_set1_epi32(mask as i32));
        or(a: __m256i, b: __m256i) -> __m256i = _mm256_or_si256(a, b);
        to_float(v: __m256i) -> __m256 = _mm256_cvtepi32_ps(v);
        as_float(v: __m256i) -> __m256 = _mm256_castsi256_ps(v);
        table(values: &[f32; 16]) -> (__m256, __m256) =
            (_mm256_loadu_ps(values.as_ptr()), _mm256_loadu_ps(values.as_ptr().add(8)));
        lookup(table: (__m256, __m256), v: __m256i) -> __m256 = {
            // Bit 3 chooses the half: moved to the sign bit, which is the one that a blend looks at.
            let high = _mm256_castsi256_ps(_mm256_slli_epi32::<28>(v));
            _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.0, v), _mm256_permutevar8x32_ps(table.1, v), high)
        };
        spread(p: *const f32, shift: u32) -> __m256 = {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), Self::shr(lane, shift))
        };
    }
}
