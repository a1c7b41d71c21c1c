//! The vocabulary of `Lanes` in NEON: eight lanes, two vectors. What is written in plain Rust the compiler makes vectors of where it is
//! arithmetic, but not where lanes are looked up, spread or widened. Every 64-bit ARM has all of this, so nothing need be switched on.

use super::Lanes;
use std::arch::{aarch64::*, asm};

/// Two vectors.
#[derive(Clone, Copy)]
pub struct Neon;

type F = [float32x4_t; 2];
type I = [uint32x4_t; 2];

/// Four f16 to f32.
///
/// # Safety
/// None is asked for: every NEON has the instruction.
#[inline(always)]
pub unsafe fn from_f16(v: uint16x4_t) -> float32x4_t {
    let wide: float32x4_t;
    // SAFETY: as above; Rust has no stable name for it.
    unsafe { asm!("fcvtl {0:v}.4s, {1:v}.4h", out(vreg) wide, in(vreg) v, options(pure, nomem, nostack)) };
    wide
}

/// Writes the methods that do the same to both vectors, those that do it at place `q` of memory, and those that are one expression.
macro_rules! lanes {
    (both { $($name:ident($($arg:ident: $of:ty),*) -> $out:ty = $by:expr;)* }) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $of),*) -> $out {
            // SAFETY: pointers are vouched for by the caller, see `Lanes`.
            unsafe { [{ $(let $arg = $arg[0];)* $by }, { $(let $arg = $arg[1];)* $by }] }
        }
    )*};
    (at($q:ident) { $($name:ident($($arg:ident: $of:ty),*) -> $out:ty = $by:expr;)* }) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $of),*) -> $out {
            // SAFETY: as above.
            unsafe { [{ let $q = 0; $by }, { let $q = 1; $by }] }
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

/// The number of each lane of vector `q`.
#[inline(always)]
unsafe fn numbered(q: usize) -> uint32x4_t {
    const LANES: [u32; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
    // SAFETY: four numbers from 0 or 4 on.
    unsafe { vld1q_u32(LANES.as_ptr().add(4 * q)) }
}

/// Where the bytes of the floats numbered `v` are among all bytes.
#[inline(always)]
unsafe fn places(v: uint32x4_t) -> uint8x16_t {
    // SAFETY: NEON.
    unsafe { vreinterpretq_u8_u32(vaddq_u32(vmulq_n_u32(v, 0x0404_0404), vdupq_n_u32(0x0302_0100))) }
}

impl Lanes for Neon {
    const W: usize = 8;
    const WIDE: bool = false;
    type F = F;
    type I = I;
    type Table = uint8x16x4_t;

    lanes! { both {
        add(a: F, b: F) -> F = vaddq_f32(a, b);
        sub(a: F, b: F) -> F = vsubq_f32(a, b);
        mul(a: F, b: F) -> F = vmulq_f32(a, b);
        div(a: F, b: F) -> F = vdivq_f32(a, b);
        max(a: F, b: F) -> F = vbslq_f32(vcgtq_f32(a, b), a, b);
        min(a: F, b: F) -> F = vbslq_f32(vcltq_f32(a, b), a, b);
        fma(a: F, b: F, c: F) -> F = vfmaq_f32(c, a, b);
        round(v: F) -> F = vrndnq_f32(v);
        exp2_whole(v: F) -> F =
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtnq_s32_f32(v), vdupq_n_s32(127))));
        or(a: I, b: I) -> I = vorrq_u32(a, b);
        to_float(v: I) -> F = vcvtq_f32_s32(vreinterpretq_s32_u32(v));
        as_float(v: I) -> F = vreinterpretq_f32_u32(v);
    } }

    lanes! { at(q) {
        load(p: *const f32) -> F = vld1q_f32(p.add(4 * q));
        load_bf16(p: *const u8) -> F = vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(8 * q).cast())));
        load_f16(p: *const u8) -> F = from_f16(vld1_u16(p.add(8 * q).cast()));
        load_u32(p: *const u8) -> I = vld1q_u32(p.add(16 * q).cast());
        load_u24(p: *const u8) -> I = {
            const APART: [u8; 16] = [0, 1, 2, 255, 3, 4, 5, 255, 6, 7, 8, 255, 9, 10, 11, 255];
            vreinterpretq_u32_u8(vqtbl1q_u8(vld1q_u8(p.add(12 * q)), vld1q_u8(APART.as_ptr())))
        };
        bits(word: u32) -> I = {
            let shifted = vshlq_u32(vdupq_n_u32(word), vnegq_s32(vreinterpretq_s32_u32(numbered(q))));
            vandq_u32(shifted, vdupq_n_u32(1))
        };
        shr(v: I, n: u32) -> I = vshlq_u32(v[q], vdupq_n_s32(-(n as i32)));
        shl(v: I, n: u32) -> I = vshlq_u32(v[q], vdupq_n_s32(n as i32));
        and(v: I, mask: u32) -> I = vandq_u32(v[q], vdupq_n_u32(mask));
        lookup(table: uint8x16x4_t, v: I) -> F = {
            let number = vandq_u32(v[q], vdupq_n_u32(15));
            vreinterpretq_f32_u8(vqtbl4q_u8(table, places(number)))
        };
        spread(p: *const f32, shift: u32) -> F = {
            let all = uint8x16x2_t(vld1q_u8(p.cast()), vld1q_u8(p.add(4).cast()));
            let number = vshlq_u32(numbered(q), vdupq_n_s32(-(shift as i32)));
            vreinterpretq_f32_u8(vqtbl2q_u8(all, places(number)))
        };
    } }

    lanes! { one {
        splat(x: f32) -> F = [vdupq_n_f32(x); 2];
        store(p: *mut f32, v: F) -> () = {
            vst1q_f32(p, v[0]);
            vst1q_f32(p.add(4), v[1]);
        };
        sum(v: F) -> f32 = {
            // As elsewhere: halves, then quarters, then eighths.
            let v = vaddq_f32(v[0], v[1]);
            let v = vadd_f32(vget_low_f32(v), vget_high_f32(v));
            vget_lane_f32::<0>(v) + vget_lane_f32::<1>(v)
        };
        peak(v: F) -> f32 = vmaxnmvq_f32(vmaxnmq_f32(v[0], v[1]));
        half(bits: u16) -> f32 = vgetq_lane_f32::<0>(from_f16(vdup_n_u16(bits)));
        load_u8(p: *const u8) -> I = {
            let v = vmovl_u8(vld1_u8(p));
            [vmovl_u16(vget_low_u16(v)), vmovl_high_u16(v)]
        };
        load_i8(p: *const u8) -> I = {
            let v = vmovl_s8(vld1_s8(p.cast()));
            [vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(v))), vreinterpretq_u32_s32(vmovl_high_s16(v))]
        };
        table(values: &[f32; 16]) -> uint8x16x4_t = {
            let p = values.as_ptr().cast::<u8>();
            uint8x16x4_t(vld1q_u8(p), vld1q_u8(p.add(16)), vld1q_u8(p.add(32)), vld1q_u8(p.add(48)))
        };
    } }
}
