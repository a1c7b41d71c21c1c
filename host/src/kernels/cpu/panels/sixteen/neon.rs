//! The vocabulary of `Sixteen` in NEON: four vectors each, a quarter of the lanes in every one. With the dot product (`sdot`) bytes of
//! weights are signed; without it, pairs of products of bytes are added in 16 bits, as in AVX2.

use super::{Job, Sixteen};
use crate::kernels::cpu::lanes::from_f16;
use std::arch::{aarch64::*, asm};

/// Four vectors, with the dot product or without.
#[derive(Clone, Copy)]
pub(super) struct Neon<const DOT: bool>;

type I = [int32x4_t; 4];
type F = [float32x4_t; 4];

/// Writes the methods that do the same to each vector, and those that are one expression.
macro_rules! lanes {
    (each { $($name:ident $([$n:ident])? ($($arg:ident: $of:ty),*) -> $out:ty = $by:expr;)* }) => {$(
        #[inline(always)]
        unsafe fn $name$(<const $n: i32>)?($($arg: $of),*) -> $out {
            // SAFETY: instruction set and pointers are vouched for by the caller, see `Sixteen`.
            unsafe { [
                { $(let $arg = $arg[0];)* $by },
                { $(let $arg = $arg[1];)* $by },
                { $(let $arg = $arg[2];)* $by },
                { $(let $arg = $arg[3];)* $by },
            ] }
        }
    )*};
    (at($q:ident) { $($name:ident($($arg:ident: $of:ty),*) -> $out:ty = $by:expr;)* }) => {$(
        #[inline(always)]
        unsafe fn $name($($arg: $of),*) -> $out {
            // SAFETY: as above.
            unsafe { [{ let $q = 0; $by }, { let $q = 1; $by }, { let $q = 2; $by }, { let $q = 3; $by }] }
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

#[target_feature(enable = "neon,dotprod")]
#[inline]
unsafe fn run_with_dot<J: Job>(job: J) -> J::Out {
    // SAFETY: passed on to the caller.
    unsafe { job.run::<Neon<true>>() }
}

#[target_feature(enable = "neon")]
#[inline]
unsafe fn run_without<J: Job>(job: J) -> J::Out {
    // SAFETY: passed on to the caller.
    unsafe { job.run::<Neon<false>>() }
}

/// To each lane of `sum` four products of signed bytes.
#[inline(always)]
unsafe fn sdot(sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    let mut sum = sum;
    // SAFETY: the caller vouches for the instruction, for which Rust has no stable name.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b, options(pure, nomem, nostack));
    }
    sum
}

/// The same four bytes in all lanes.
#[inline(always)]
unsafe fn four(x: *const i8) -> int32x4_t {
    // SAFETY: the caller vouches.
    unsafe { vdupq_n_s32(x.cast::<i32>().read_unaligned()) }
}

/// The lower halves of all lanes.
#[inline(always)]
unsafe fn narrowed(v: I) -> [int16x8_t; 2] {
    // SAFETY: as above.
    unsafe { [vmovn_high_s32(vmovn_s32(v[0]), v[1]), vmovn_high_s32(vmovn_s32(v[2]), v[3])] }
}

/// Of each four lanes the even ones, then the odd ones.
#[inline(always)]
unsafe fn turned(v: I) -> I {
    let mut v = v;
    // SAFETY: as above.
    unsafe {
        for v in &mut v {
            *v = vcombine_s32(vget_low_s32(vuzp1q_s32(*v, *v)), vget_low_s32(vuzp2q_s32(*v, *v)));
        }
    }
    v
}

impl<const DOT: bool> Sixteen for Neon<DOT> {
    type I = I;
    type F = F;
    const WIDE: bool = false;
    const CHAIN: usize = if DOT { 1 } else { 4 };
    const SHORTS: bool = !DOT;
    const SIGNED: bool = DOT;

    #[inline(always)]
    unsafe fn run<J: Job>(job: J) -> J::Out {
        // SAFETY: passed on to the caller.
        unsafe { if DOT { run_with_dot(job) } else { run_without(job) } }
    }

    lanes! { each {
        and(a: I, b: I) -> I = vandq_s32(a, b);
        or_masked(a: I, b: I, mask: I) -> I = vorrq_s32(a, vandq_s32(b, mask));
        shl16[N](v: I) -> I = vreinterpretq_s32_s16(vshlq_n_s16::<N>(vreinterpretq_s16_s32(v)));
        shr16[N](v: I) -> I = vreinterpretq_s32_u16(vshrq_n_u16::<N>(vreinterpretq_u16_s32(v)));
        shl[N](v: I) -> I = vshlq_n_s32::<N>(v);
        shr[N](v: I) -> I = vreinterpretq_s32_u32(vshrq_n_u32::<N>(vreinterpretq_u32_s32(v)));
        sar[N](v: I) -> I = vshrq_n_s32::<N>(v);
        add(a: I, b: I) -> I = vaddq_s32(a, b);
        shuffle(bytes: I, which: I) -> I =
            vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(bytes), vreinterpretq_u8_s32(which)));
        where_equal(a: I, b: I, then: I, or: I) -> I = vbslq_s32(vceqq_s32(a, b), then, or);
        eight(v: I) -> I = if DOT { veorq_s32(v, vdupq_n_s32(0x8080_8080u32 as i32)) } else { v };
        to_float(v: I) -> F = vcvtq_f32_s32(v);
        to_whole(v: F) -> I = vcvtnq_s32_f32(v);
        as_float(v: I) -> F = vreinterpretq_f32_s32(v);
        as_whole(v: F) -> I = vreinterpretq_s32_f32(v);
        mul(a: F, b: F) -> F = vmulq_f32(a, b);
        fma(a: F, b: F, c: F) -> F = vfmaq_f32(c, a, b);
        max(a: F, b: F) -> F = vbslq_f32(vcgtq_f32(a, b), a, b);
    } }

    lanes! { at(q) {
        load(p: *const u8) -> I = vreinterpretq_s32_u8(vld1q_u8(p.add(16 * q)));
        load_f32(p: *const f32) -> F = vld1q_f32(p.add(4 * q));
        load_bf16(p: *const u8) -> F = vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(p.add(8 * q).cast())));
        load_f16(p: *const u8) -> F = from_f16(vld1_u16(p.add(8 * q).cast()));
        shr16_by(v: I, n: i32) -> I =
            vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(v[q]), vdupq_n_s16(-(n as i16))));
    } }

    lanes! { one {
        store(p: *mut u8, v: I) -> () = for q in 0..4 {
            vst1q_u8(p.add(16 * q), vreinterpretq_u8_s32(v[q]));
        };
        splat(x: i32) -> I = [vdupq_n_s32(x); 4];
        quarters(bytes: &[u8; 16]) -> I = [vreinterpretq_s32_u8(vld1q_u8(bytes.as_ptr())); 4];
        widen_u8(p: *const u8) -> I = {
            let bytes = vld1q_u8(p);
            let (a, b) = (vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(bytes))), vreinterpretq_s16_u16(vmovl_high_u8(bytes)));
            [vmovl_s16(vget_low_s16(a)), vmovl_high_s16(a), vmovl_s16(vget_low_s16(b)), vmovl_high_s16(b)]
        };
        widen_i8(p: *const u8) -> I = {
            let bytes = vld1q_s8(p.cast());
            let (a, b) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [vmovl_s16(vget_low_s16(a)), vmovl_high_s16(a), vmovl_s16(vget_low_s16(b)), vmovl_high_s16(b)]
        };
        total(v: I) -> i32 = vaddvq_s32(vaddq_s32(vaddq_s32(v[0], v[1]), vaddq_s32(v[2], v[3])));
        weave(v: I) -> I =
            [vzip1q_s32(v[0], v[1]), vzip2q_s32(v[0], v[1]), vzip1q_s32(v[2], v[3]), vzip2q_s32(v[2], v[3])];
        dots(sums: I, weights: &[I], x: *const i8) -> I = {
            let mut sums = sums;
            if DOT {
                for v in 0..weights.len() {
                    let x = vreinterpretq_s8_s32(four(x.add(4 * v)));
                    for q in 0..4 {
                        sums[q] = sdot(sums[q], vreinterpretq_s8_s32(weights[v][q]), x);
                    }
                }
            } else {
                for q in 0..4 {
                    // Four pairs of 24 times 127 are 24384: they fit 16 bits together.
                    let mut pairs = vdupq_n_s16(0);
                    for v in 0..weights.len() {
                        let x = vreinterpretq_s8_s32(four(x.add(4 * v)));
                        let w = vreinterpretq_s8_s32(weights[v][q]);
                        let more = vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)), vmull_high_s8(w, x));
                        pairs = vaddq_s16(pairs, more);
                    }
                    sums[q] = vpadalq_s16(sums[q], pairs);
                }
            }
            sums
        };
        dots_of_shorts(sums: I, weights: &[I], x: *const i8) -> I = {
            let mut sums = sums;
            for v in 0..weights.len() {
                let (x, y) = (vreinterpretq_s16_s32(four(x.add(8 * v))), vreinterpretq_s16_s32(four(x.add(8 * v + 4))));
                for q in 0..4 {
                    let w = vreinterpretq_u16_s32(weights[v][q]);
                    let even = vreinterpretq_s16_u16(vandq_u16(w, vdupq_n_u16(255)));
                    let odd = vreinterpretq_s16_u16(vshrq_n_u16::<8>(w));
                    let low = vmull_s16(vget_low_s16(even), vget_low_s16(x));
                    let low = vmlal_s16(low, vget_low_s16(odd), vget_low_s16(y));
                    let high = vmlal_high_s16(vmull_high_s16(even, x), odd, y);
                    sums[q] = vaddq_s32(sums[q], vpaddq_s32(low, high));
                }
            }
            sums
        };
        store_bytes(p: *mut i8, v: I) -> () = {
            let [a, b] = narrowed(v);
            vst1q_s8(p, vmovn_high_s16(vmovn_s16(a), b));
        };
        store_shorts(p: *mut i8, v: I) -> () = {
            let [a, b] = narrowed(turned(v));
            vst1q_s16(p.cast(), a);
            vst1q_s16(p.add(16).cast(), b);
        };
        splat_f32(x: f32) -> F = [vdupq_n_f32(x); 4];
        store_f32(p: *mut f32, v: F, n: usize) -> () = {
            if n == 16 {
                for q in 0..4 {
                    vst1q_f32(p.add(4 * q), v[q]);
                }
            } else {
                let all: [f32; 16] = std::mem::transmute(v);
                p.copy_from_nonoverlapping(all.as_ptr(), n);
            }
        };
        peak(v: F) -> f32 = vmaxvq_f32(vmaxq_f32(vmaxq_f32(v[0], v[1]), vmaxq_f32(v[2], v[3])));
        sum(v: F) -> f32 = vaddvq_f32(vaddq_f32(vaddq_f32(v[0], v[1]), vaddq_f32(v[2], v[3])));
    } }
}
