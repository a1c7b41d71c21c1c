//! The vocabulary of `Lanes` in plain Rust: arrays of eight, which LLVM turns into SSE2 as far as it can. It is also what the tests
//! hold the other instruction sets against.

use super::Lanes;
use std::array::from_fn;

/// Eight lanes of plain Rust.
#[derive(Clone, Copy)]
pub struct Portable;

/// Fused only where the machine surely has it: elsewhere `mul_add` is a slow library call.
#[inline(always)]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) { a.mul_add(b, c) } else { a * b + c }
}

#[inline(always)]
unsafe fn bytes<const N: usize>(p: *const u8, lane: usize) -> [u8; N] {
    // SAFETY: the caller of the `Lanes` method vouches for `W` elements of `N` bytes at `p`; no alignment is needed.
    unsafe { p.add(lane * N).cast::<[u8; N]>().read_unaligned() }
}

// SAFETY of the blocks below: pointers are vouched for by the caller, see `Lanes`.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Portable {
    const W: usize = 8;
    const WIDE: bool = false;
    type F = [f32; 8];
    type I = [u32; 8];
    type Table = [f32; 16];

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 8] {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 8] {
        unsafe { p.cast::<[f32; 8]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 8]) {
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], c: [f32; 8]) -> [f32; 8] {
        from_fn(|i| fused(a[i], b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn round(v: [f32; 8]) -> [f32; 8] {
        // Adding and taking away 1.5 * 2^23 rounds to even without a library call; callers stay below 2^22.
        from_fn(|i| (v[i] + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    unsafe fn exp2_whole(v: [f32; 8]) -> [f32; 8] {
        from_fn(|i| f32::from_bits(((v[i] as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn sum(v: [f32; 8]) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
    #[inline(always)]
    unsafe fn peak(v: [f32; 8]) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> [f32; 8] {
        from_fn(|i| f32::from_bits(u32::from(u16::from_le_bytes(unsafe { bytes(p, i) })) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> [f32; 8] {
        from_fn(|i| half::f16::from_le_bytes(unsafe { bytes(p, i) }).to_f32())
    }
    #[inline(always)]
    unsafe fn half(bits: u16) -> f32 {
        half::f16::from_bits(bits).to_f32()
    }
    #[inline(always)]
    unsafe fn load_u8(p: *const u8) -> [u32; 8] {
        from_fn(|i| u32::from(unsafe { *p.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const u8) -> [u32; 8] {
        from_fn(|i| i32::from(unsafe { *p.add(i) } as i8) as u32)
    }
    #[inline(always)]
    unsafe fn load_u32(p: *const u8) -> [u32; 8] {
        from_fn(|i| u32::from_le_bytes(unsafe { bytes(p, i) }))
    }
    #[inline(always)]
    unsafe fn load_u24(p: *const u8) -> [u32; 8] {
        from_fn(|i| {
            let [a, b, c] = unsafe { bytes(p, i) };
            u32::from_le_bytes([a, b, c, 0])
        })
    }
    #[inline(always)]
    unsafe fn bits(word: u32) -> [u32; 8] {
        from_fn(|i| word >> i & 1)
    }
    #[inline(always)]
    unsafe fn shr(v: [u32; 8], n: u32) -> [u32; 8] {
        from_fn(|i| v[i] >> n)
    }
    #[inline(always)]
    unsafe fn shl(v: [u32; 8], n: u32) -> [u32; 8] {
        from_fn(|i| v[i] << n)
    }
    #[inline(always)]
    unsafe fn and(v: [u32; 8], mask: u32) -> [u32; 8] {
        from_fn(|i| v[i] & mask)
    }
    #[inline(always)]
    unsafe fn or(a: [u32; 8], b: [u32; 8]) -> [u32; 8] {
        from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn to_float(v: [u32; 8]) -> [f32; 8] {
        from_fn(|i| v[i] as i32 as f32)
    }
    #[inline(always)]
    unsafe fn as_float(v: [u32; 8]) -> [f32; 8] {
        from_fn(|i| f32::from_bits(v[i]))
    }
    #[inline(always)]
    unsafe fn table(values: &[f32; 16]) -> [f32; 16] {
        *values
    }
    #[inline(always)]
    unsafe fn lookup(table: [f32; 16], v: [u32; 8]) -> [f32; 8] {
        from_fn(|i| table[(v[i] & 15) as usize])
    }
    #[inline(always)]
    unsafe fn spread(p: *const f32, shift: u32) -> [f32; 8] {
        from_fn(|i| unsafe { *p.add(i >> shift) })
    }
}
