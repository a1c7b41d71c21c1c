//! The vocabulary of `Sixteen` in plain Rust, word for word: what the other instruction sets are held against. Slow, and right.

use super::{Job, Sixteen};
use std::array::from_fn;

/// Sixteen lanes of plain Rust.
#[derive(Clone, Copy)]
pub(super) struct Plain;

type I = [i32; 16];
type F = [f32; 16];

/// Both 16-bit halves of each lane.
fn halves(v: I, f: impl Fn(u16) -> u16) -> I {
    v.map(|v| (u32::from(f(v as u16)) | u32::from(f((v as u32 >> 16) as u16)) << 16) as i32)
}

/// Each quarter's bytes.
fn bytes(v: I) -> [[u8; 16]; 4] {
    from_fn(|q| from_fn(|i| v[4 * q + i / 4].to_le_bytes()[i % 4]))
}

fn of_bytes(bytes: [[u8; 16]; 4]) -> I {
    from_fn(|l| i32::from_le_bytes(from_fn(|i| bytes[l / 4][l % 4 * 4 + i])))
}

// SAFETY of the blocks below: pointers are vouched for by the caller, see `Sixteen`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Sixteen for Plain {
    type I = I;
    type F = F;
    const WIDE: bool = false;
    const CHAIN: usize = 1;
    const SHORTS: bool = false;
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn run<J: Job>(job: J) -> J::Out {
        unsafe { job.run::<Self>() }
    }
    unsafe fn load(p: *const u8) -> I {
        of_bytes(unsafe { p.cast::<[[u8; 16]; 4]>().read_unaligned() })
    }
    unsafe fn store(p: *mut u8, v: I) {
        unsafe { p.cast::<[[u8; 16]; 4]>().write_unaligned(bytes(v)) }
    }
    unsafe fn splat(x: i32) -> I {
        [x; 16]
    }
    unsafe fn quarters(bytes: &[u8; 16]) -> I {
        of_bytes([*bytes; 4])
    }
    unsafe fn widen_u8(p: *const u8) -> I {
        from_fn(|l| i32::from(unsafe { *p.add(l) }))
    }
    unsafe fn widen_i8(p: *const u8) -> I {
        from_fn(|l| i32::from(unsafe { *p.add(l) } as i8))
    }
    unsafe fn and(a: I, b: I) -> I {
        from_fn(|l| a[l] & b[l])
    }
    unsafe fn or_masked(a: I, b: I, mask: I) -> I {
        from_fn(|l| a[l] | b[l] & mask[l])
    }
    unsafe fn shl16<const N: i32>(v: I) -> I {
        halves(v, |half| half << N)
    }
    unsafe fn shr16<const N: i32>(v: I) -> I {
        halves(v, |half| half >> N)
    }
    unsafe fn shr16_by(v: I, n: i32) -> I {
        halves(v, |half| half >> n)
    }
    unsafe fn shl<const N: i32>(v: I) -> I {
        v.map(|v| v << N)
    }
    unsafe fn shr<const N: i32>(v: I) -> I {
        v.map(|v| (v as u32 >> N) as i32)
    }
    unsafe fn sar<const N: i32>(v: I) -> I {
        v.map(|v| v >> N)
    }
    unsafe fn add(a: I, b: I) -> I {
        from_fn(|l| a[l].wrapping_add(b[l]))
    }
    unsafe fn total(v: I) -> i32 {
        v.into_iter().fold(0, i32::wrapping_add)
    }
    unsafe fn shuffle(from: I, which: I) -> I {
        let (from, which) = (bytes(from), bytes(which));
        of_bytes(from_fn(|q| which[q].map(|i| from[q][usize::from(i)])))
    }
    unsafe fn weave(v: I) -> I {
        [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15].map(|l| v[l])
    }
    unsafe fn where_equal(a: I, b: I, then: I, or: I) -> I {
        from_fn(|l| if a[l] == b[l] { then[l] } else { or[l] })
    }
    unsafe fn dots(sums: I, weights: &[I], x: *const i8) -> I {
        let mut sums = sums;
        for (v, weights) in weights.iter().enumerate() {
            for l in 0..16 {
                for (i, weight) in weights[l].to_le_bytes().into_iter().enumerate() {
                    sums[l] += i32::from(weight) * i32::from(unsafe { *x.add(4 * v + i) });
                }
            }
        }
        sums
    }
    unsafe fn dots_of_shorts(sums: I, weights: &[I], x: *const i8) -> I {
        let mut sums = sums;
        for (v, weights) in weights.iter().enumerate() {
            let x = unsafe { x.add(8 * v).cast::<[i16; 4]>().read_unaligned() };
            for l in 0..16 {
                let [a, b, c, d] = weights[l].to_le_bytes().map(i32::from);
                let [p, q, r, s] = x.map(i32::from);
                sums[l] += a * p + c * q + b * r + d * s;
            }
        }
        sums
    }
    unsafe fn eight(v: I) -> I {
        v
    }
    unsafe fn store_bytes(p: *mut i8, v: I) {
        unsafe { p.cast::<[i8; 16]>().write_unaligned(v.map(|v| v as i8)) }
    }
    unsafe fn store_shorts(p: *mut i8, v: I) {
        let shorts: [i16; 16] = from_fn(|i| v[i / 4 * 4 + [0, 2, 1, 3][i % 4]] as i16);
        unsafe { p.cast::<[i16; 16]>().write_unaligned(shorts) }
    }
    unsafe fn to_float(v: I) -> F {
        v.map(|v| v as f32)
    }
    unsafe fn to_whole(v: F) -> I {
        v.map(|v| v.round_ties_even() as i32)
    }
    unsafe fn as_float(v: I) -> F {
        v.map(|v| f32::from_bits(v as u32))
    }
    unsafe fn as_whole(v: F) -> I {
        v.map(|v| v.to_bits() as i32)
    }
    unsafe fn splat_f32(x: f32) -> F {
        [x; 16]
    }
    unsafe fn load_f32(p: *const f32) -> F {
        unsafe { p.cast::<F>().read_unaligned() }
    }
    unsafe fn store_f32(p: *mut f32, v: F, n: usize) {
        unsafe { p.copy_from_nonoverlapping(v.as_ptr(), n) }
    }
    unsafe fn load_bf16(p: *const u8) -> F {
        unsafe { p.cast::<[u16; 16]>().read_unaligned() }.map(|v| f32::from_bits(u32::from(v) << 16))
    }
    unsafe fn load_f16(p: *const u8) -> F {
        unsafe { p.cast::<[u16; 16]>().read_unaligned() }.map(|v| half::f16::from_bits(v).to_f32())
    }
    unsafe fn mul(a: F, b: F) -> F {
        from_fn(|l| a[l] * b[l])
    }
    unsafe fn fma(a: F, b: F, c: F) -> F {
        from_fn(|l| a[l].mul_add(b[l], c[l]))
    }
    unsafe fn max(a: F, b: F) -> F {
        from_fn(|l| if a[l] > b[l] { a[l] } else { b[l] })
    }
    unsafe fn peak(v: F) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    unsafe fn sum(v: F) -> f32 {
        v.into_iter().sum()
    }
}
