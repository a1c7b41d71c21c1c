//! Sixteen rows' scales or biases as floats, from whatever the format keeps them in.

use super::{
    layout::{Scale, Steps},
    sixteen::Sixteen,
};
use crate::kernels::cpu::{dequantize::e8m0_to_f32, format::Float};

/// Sixteen scales, or the biases of their kind; for scales that are counts, `steps` are what they count.
///
/// # Safety
/// `from` has as many, `steps` too if they are read; asks for what [`Sixteen`] asks for.
#[inline(always)]
pub(super) unsafe fn scales<S: Sixteen>(kind: Scale, bias: bool, from: *const u8, steps: *const u8) -> S::F {
    // SAFETY: the caller vouches.
    unsafe {
        match kind {
            Scale::Float(Float::BF16) => S::load_bf16(from),
            Scale::Float(Float::F16) => S::load_f16(from),
            Scale::Float(Float::F32) => S::load_f32(from.cast()),
            Scale::E8m0 => {
                // 2^-127 has no exponent of its own in f32.
                let value = S::as_float(S::shl::<23>(S::widen_u8(from)));
                S::max(value, S::splat_f32(e8m0_to_f32(0)))
            }
            Scale::E4m3 => {
                let bytes = S::widen_u8(from);
                let magnitude = S::and(bytes, S::splat(0x7f));
                // The bits one exponent field further left are the value times 2^-120, subnormals included.
                let small = S::as_float(S::shl::<20>(magnitude));
                let value = S::as_whole(S::mul(small, S::splat_f32(f32::from_bits(247 << 23))));
                let value = S::where_equal(magnitude, S::splat(0x7f), S::splat(0x7fc0_0000), value);
                S::as_float(S::or_masked(value, S::shl::<24>(bytes), S::splat(i32::MIN)))
            }
            Scale::Steps(kind) => {
                let counts = match kind {
                    Steps::Signed => S::widen_i8(from),
                    Steps::Unsigned => S::widen_u8(from),
                    Steps::Halves if bias => S::shr::<4>(S::widen_u8(from)),
                    Steps::Halves => S::and(S::widen_u8(from), S::splat(15)),
                };
                S::mul(S::to_float(counts), S::load_f16(steps))
            }
        }
    }
}
