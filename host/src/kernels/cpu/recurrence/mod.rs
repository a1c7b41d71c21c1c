//! Recurrences over one sequence's new tokens: outer products that fade (linear attention, the gated delta rule, RWKV 7), the
//! real-gated linear recurrent unit, Mamba's scans, convolutions and pooling. Each takes the state before the first of them and leaves the state
//! after the last, so that a text may come in pieces of any length.

mod by_head;
mod conv1d;
mod gated_delta;
mod linear_attention;
mod pieces;
mod pool;
mod rg_lru;
mod selective_scan;
mod ssd;
mod wkv7;

pub use by_head::{Decay, Recurrence, Shape, recur};
pub use conv1d::{conv1d, shift};
pub use gated_delta::GatedDelta;
pub use linear_attention::LinearAttention;
pub use pool::{Pool, pool};
pub use rg_lru::rg_lru;
pub use selective_scan::selective_scan;
pub use ssd::{Ssd, ssd};
pub use wkv7::Wkv7;

#[cfg(test)]
mod tests {
    /// Numbers between -1 and 1 that differ from each other.
    pub fn numbers(seed: u32, len: usize) -> Vec<f32> {
        let bits = |i: u32| {
            (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b).rotate_left(13).wrapping_mul(0xc2b2_ae35)
        };
        (0..len as u32).map(|i| (bits(i) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    /// Whether both agree to f32's accuracy over some hundred additions.
    pub fn assert_close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        let largest = expected.iter().fold(0.0f64, |l, x| l.max(x.abs()));
        assert!(largest > 0.1, "the naive version gives nothing");
        for (i, (&f, &x)) in found.iter().zip(expected).enumerate() {
            assert!((f64::from(f) - x).abs() < 1e-5 * largest, "number {i} is {f}, not {x}");
        }
    }

    /// Whether both agree, number by number, to f32's accuracy.
    pub fn near(ours: &[f32], theirs: &[f32]) {
        assert_eq!(ours.len(), theirs.len());
        for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
            assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{i}: {a} is not {b}");
        }
    }
}
