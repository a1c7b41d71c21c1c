//! The three lines at the end of a run, and their JSON.

use dylm::statistics::{FinishReason, Statistics, peak_memory_bytes, tokens_per_second};
use std::time::Duration;

fn example() -> Statistics {
    Statistics {
        prompt_tokens: 38,
        prompt_tps: 123.4561,
        generation_tokens: 100,
        generation_tps: 45.678,
        peak_memory_bytes: 312_000_000,
        finish_reason: Some(FinishReason::Length),
    }
}

#[test]
fn statistics_print_as_mlx_lm_prints_them() {
    let expected = "Prompt: 38 tokens, 123.456 tokens-per-sec\nGeneration: 100 tokens, 45.678 tokens-per-sec\nPeak memory: 0.312 GB";
    assert_eq!(example().to_string(), expected);
}

#[test]
fn statistics_serialize_with_the_reason_in_lower_case() {
    let json = serde_json::to_value(example()).unwrap();
    assert_eq!((&json["prompt_tokens"], &json["finish_reason"]), (&38.into(), &"length".into()));
    assert_eq!(serde_json::to_value(FinishReason::ToolCalls).unwrap(), FinishReason::ToolCalls.to_string());
}

#[test]
fn speeds_are_finite_even_for_no_time() {
    assert_eq!(tokens_per_second(10, Duration::from_millis(500)), 20.0);
    assert_eq!(tokens_per_second(10, Duration::ZERO), 0.0);
}

#[test]
#[cfg(any(target_os = "linux", target_os = "macos"))]
fn peak_memory_counts_what_was_touched_even_after_it_is_gone() {
    let before = peak_memory_bytes();
    drop(std::hint::black_box(vec![1u8; 64 << 20]));
    let after = peak_memory_bytes();
    // The kernel sums its counters only roughly.
    assert!(before > 100_000 && after >= 60 << 20, "{before} bytes before, {after} after");
}
