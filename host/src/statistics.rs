//! What a run tells about itself when it is over: tokens, speeds, peak memory, why it ended. Printed as mlx-lm prints it.

use std::fmt;

use serde::Serialize;

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence token or a stop string.
    Stop,
    /// The limit on tokens.
    Length,
    /// The model called a tool and waits for its answer.
    ToolCalls,
}

impl fmt::Display for FinishReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ToolCalls => "tool_calls",
        })
    }
}

/// Counts and speeds of one run. The Display form is three lines without a newline at the end.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Statistics {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the prompt per second of prefill.
    pub prompt_tps: f64,
    /// Tokens generated.
    pub generation_tokens: usize,
    /// Tokens generated per second after prefill.
    pub generation_tps: f64,
    /// The most memory in use at any time, in bytes; 0 where the system does not tell.
    pub peak_memory_bytes: u64,
    /// Why the run ended; `None` while it has not.
    pub finish_reason: Option<FinishReason>,
}

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Prompt: {} tokens, {:.3} tokens-per-sec", self.prompt_tokens, self.prompt_tps)?;
        writeln!(f, "Generation: {} tokens, {:.3} tokens-per-sec", self.generation_tokens, self.generation_tps)?;
        // A GB is 10^9 bytes here, as in mlx-lm.
        write!(f, "Peak memory: {:.3} GB", self.peak_memory_bytes as f64 / 1e9)
    }
}

/// Tokens per second; 0 for a time too short to be measured, so that no report says `inf`.
pub fn tokens_per_second(tokens: usize, time: std::time::Duration) -> f64 {
    match time.as_secs_f64() {
        seconds if seconds > 0.0 => tokens as f64 / seconds,
        _ => 0.0,
    }
}

/// The largest resident memory of this process so far, in bytes; 0 where the system does not tell.
///
/// From `VmHWM` on Linux: `getrusage` there also counts what ran in the process before `exec`, such as a large parent's fork.
#[cfg(target_os = "linux")]
pub fn peak_memory_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes = peak.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kibibytes.unwrap_or(0) * 1024
}

/// The largest resident memory of this process so far, in bytes; 0 where the system does not tell.
#[cfg(target_os = "macos")]
pub fn peak_memory_bytes() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: `usage` is a writable rusage, and all zero bytes are a valid one should the call fail.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    // macOS counts bytes, where other systems count KiB.
    u64::try_from(usage.ru_maxrss).unwrap_or(0)
}

/// The largest resident memory of this process so far, in bytes; 0 where the system does not tell.
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
pub fn peak_memory_bytes() -> u64 {
    0
}
