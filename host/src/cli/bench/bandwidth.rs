//! How fast this machine's memory is read by all of dylm's threads together, which is what bounds decoding: each token reads the weights.
//!
//! Half a GiB, beyond what caches hold, in huge pages where the system gives them, is added up again and again for a second.

use super::median;
use crate::error::{Error, Result};
use memmap2::MmapMut;
use serde::Serialize;
use std::{
    hint::black_box,
    time::{Duration, Instant},
};

const BYTES: usize = 512 << 20;
const LEAST_PASSES: usize = 3;
const LONG_ENOUGH: Duration = Duration::from_secs(1);

/// What was read, and how fast. A GB is 10^9 bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Bandwidth {
    /// Threads that read at once.
    pub threads: usize,
    /// Bytes that a pass reads.
    pub bytes: usize,
    /// Of the middle pass.
    pub gb_per_s: f64,
    /// Of the best pass.
    pub best_gb_per_s: f64,
}

/// Measures it. The memory is given back, and is not part of the process's peak afterwards where the system lets it be forgotten.
pub fn measure() -> Result<Bandwidth> {
    let threads = rayon::current_num_threads();
    let mut memory = MmapMut::map_anon(BYTES).map_err(Error::io("memory to read"))?;
    #[cfg(target_os = "linux")]
    // A system without huge pages is measured without them.
    let _ = memory.advise(memmap2::Advice::HugePage);
    // Pages that were never written are all the same one.
    memory.fill(1);
    let (mut speeds, started) = (Vec::new(), Instant::now());
    while speeds.len() < LEAST_PASSES || started.elapsed() < LONG_ENOUGH {
        let pass = Instant::now();
        std::thread::scope(|scope| {
            for part in memory.chunks(BYTES.div_ceil(threads)) {
                scope.spawn(move || black_box(sum(part)));
            }
        });
        speeds.push(BYTES as f64 / pass.elapsed().as_secs_f64() / 1e9);
    }
    drop(memory);
    // "5" makes Linux count the peak anew.
    #[cfg(target_os = "linux")]
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let best_gb_per_s = speeds.iter().copied().fold(0.0, f64::max);
    Ok(Bandwidth { threads, bytes: BYTES, gb_per_s: median(speeds), best_gb_per_s })
}

/// Eight sums side by side, which compilers turn into vectors: more than memory keeps up with.
fn sum(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; 8];
    for line in bytes.as_chunks::<64>().0 {
        for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_line_of_memory_is_added_up() {
        let numbers: Vec<u64> = (0..64).collect();
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_ne_bytes()).collect();
        assert_eq!(super::sum(&bytes), 63 * 64 / 2);
    }
}
