//! Shapes of recurrences -> their kernels, which give the outputs and the state after the last token. See recurrence.metal.

use super::launch::{Kernel, Launch, Source, number};
use crate::kernels::cpu::recurrence::{Shape, Ssd};
use candle_core::DType;

/// Waves of a group, see `STATE_WAVES`.
const WAVES: usize = 4;

/// Numbers of state that a thread can hold without running out of registers.
const MOST: usize = 8;

/// What a state from keys to values does with a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// `S = exp(g) S + k vᵀ`
    Linear,
    /// The gated delta rule.
    Delta,
    /// RWKV 7.
    Wkv7,
}

/// What a state fades by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// A number for each head.
    Head,
    /// For each token and head.
    Token,
    /// For each token, head and key lane.
    Lane,
}

fn kernel(maker: &'static str, of: &[String]) -> Kernel {
    Kernel { source: Source::Recurrence, maker, of: of.to_vec() }
}

/// Lanes between the 32 threads of a wave.
fn per_thread(lanes: usize) -> Option<usize> {
    Some(lanes.div_ceil(32)).filter(|per| (1..=MOST).contains(per))
}

fn outputs(y: &[usize], state: &[usize]) -> Vec<(Vec<usize>, DType)> {
    vec![(y.to_vec(), DType::F32), (state.to_vec(), DType::F32)]
}

/// Inputs, all f32: q, k, v, g, then beta and anything (delta), a and b (RWKV 7) or anything twice (linear), the state `[heads, d, e]`.
/// Outputs: y `[tokens, heads, e]` and the state. None where keys are too wide.
pub fn recur(rule: Rule, decay: Decay, shape: Shape) -> Option<Launch> {
    let Shape { tokens, heads, k_heads, d, e } = shape;
    let rule = match rule {
        Rule::Linear => "LINEAR",
        Rule::Delta => "DELTA",
        Rule::Wkv7 => "WKV7",
    };
    let mut numbers: Vec<u32> = [tokens, heads, k_heads, d, e].into_iter().map(number).collect();
    numbers.push(decay as u32);
    Some(Launch {
        kernel: kernel("RECUR", &[rule.to_owned(), per_thread(d)?.to_string()]),
        numbers,
        groups: [e.div_ceil(WAVES), heads, 1],
        threads: 32 * WAVES,
        shared: 0,
        outputs: outputs(&[tokens, heads, e], &[heads, d, e]),
    })
}

fn scan(tokens: usize, sizes: [usize; 4], a_each: bool, y: &[usize], state: &[usize]) -> Option<Launch> {
    let [rows, abreast, together, n] = sizes;
    let mut numbers: Vec<u32> = [tokens, rows, abreast, together, n].into_iter().map(number).collect();
    numbers.push(u32::from(a_each));
    Some(Launch {
        kernel: kernel("SCAN", &[per_thread(n)?.to_string()]),
        numbers,
        groups: [rows.div_ceil(WAVES), 1, 1],
        threads: 32 * WAVES,
        shared: 0,
        outputs: outputs(y, state),
    })
}

/// Inputs, all f32: x `[tokens, heads, d]`, dt `[tokens, heads]`, b and c `[tokens, groups, n]`, a `[heads]`, the state `[heads, d, n]`.
/// Outputs: y as x and the state. None where the state is too wide.
pub fn ssd(tokens: usize, Ssd { heads, d, groups, n }: Ssd) -> Option<Launch> {
    let together = heads.checked_div(groups)? * d;
    scan(tokens, [heads * d, d, together, n], false, &[tokens, heads, d], &[heads, d, n])
}

/// Inputs, all f32: x and dt `[tokens, d]`, b and c `[tokens, n]`, a `[d, n]`, the state `[d, n]`. Outputs: y as x and the state.
pub fn selective_scan(tokens: usize, [d, n]: [usize; 2]) -> Option<Launch> {
    scan(tokens, [d, 1, d, n], true, &[tokens, d], &[d, n])
}

/// Inputs, all f32: x `[tokens, channels]`, weight `[taps, channels]`, bias `[channels]` or anything, the state `[taps - 1, channels]`.
/// Outputs: y as x and the state.
pub fn conv1d(tokens: usize, channels: usize, taps: usize, bias: bool) -> Option<Launch> {
    let carried = taps.checked_sub(1)?;
    Some(Launch {
        kernel: kernel("CONV", &[]),
        numbers: vec![number(tokens), number(channels), number(taps), u32::from(bias)],
        groups: [((tokens + carried) * channels).div_ceil(256), 1, 1],
        threads: 256,
        shared: 0,
        outputs: outputs(&[tokens, channels], &[carried, channels]),
    })
}

/// Inputs, all f32: x and log_a `[tokens, dim]`, the state `[dim]`. Outputs: y as x and the state. `begins`: no token was before.
pub fn rg_lru(tokens: usize, dim: usize, begins: bool) -> Launch {
    Launch {
        kernel: kernel("RG_LRU", &[]),
        numbers: vec![number(tokens), number(dim), u32::from(begins)],
        groups: [dim.div_ceil(256), 1, 1],
        threads: 256,
        shared: 0,
        outputs: outputs(&[tokens, dim], &[dim]),
    }
}
