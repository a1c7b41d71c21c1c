//! `recurrence.cu` from Rust: what the kernels of Metal are started with (kernels/metal/recurrence.rs), for this one's kernels. States are
//! written in place, see cache/numbers.rs.

use super::{
    program::{Arg, Shape, function},
    step::{address, device_of},
};
use crate::kernels::metal::launch::Launch;
use candle_core::{CudaDevice, DType, Result, Tensor, bail};

/// Sequences of a launch, as recurrence.cu has it.
pub const MOST_SEGMENTS: usize = 16;
const WARPS: u32 = 4;
/// Rows of a scan that a block has, and its threads, likewise.
const SCAN_ROWS: u32 = 16;
const SCAN_THREADS: u32 = 256;
/// Neighbouring tokens that one thread folds.
const FOLDED: u32 = 32;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct InputArgs {
    at: u64,
    kind: u32,
    stride: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct SegmentArgs {
    states: u64,
    from: u32,
    tokens: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Args {
    inputs: [InputArgs; 6],
    y: u64,
    positions: u64,
    size: u64,
    y_kind: u32,
    numbers: [u32; 5],
    of: [SegmentArgs; MOST_SEGMENTS],
}

/// An input of a recurrence.
pub enum Input<'a> {
    /// `[tokens, ..]`
    Rows(&'a Tensor),
    /// The same for all tokens, in one piece.
    Shared(&'a Tensor),
    /// Left out.
    None,
}

/// Some tokens of one sequence: both places of its state `[2, ..]`, the first token among the step's, and how many.
pub struct Segment {
    /// `[2, ..]`
    pub states: Tensor,
    /// The first.
    pub from: usize,
    /// How many.
    pub tokens: usize,
}

fn kind(t: &Tensor) -> Result<u32> {
    match t.dtype() {
        DType::F32 => Ok(0),
        DType::BF16 => Ok(1),
        DType::F16 => Ok(2),
        other => bail!("a recurrence over {other:?}"),
    }
}

/// Its address, kind and stride; a copy where its rows are not in one piece each, which goes to `kept`.
fn input(of: &Input<'_>, kept: &mut Vec<Tensor>) -> Result<InputArgs> {
    match of {
        Input::None => Ok(InputArgs::default()),
        Input::Shared(t) => {
            let t = t.contiguous()?;
            kept.push(t.clone());
            Ok(InputArgs { at: address(&t)?, kind: kind(&t)?, stride: 0 })
        }
        Input::Rows(t) => {
            let row = |t: &Tensor| t.narrow(0, 0, 1);
            let t = if row(t)?.is_contiguous() { (*t).clone() } else { t.contiguous()? };
            let stride = t.stride().first().copied().unwrap_or_default();
            let at = address(&row(&t)?)?;
            kept.push(t.clone());
            Ok(InputArgs { at, kind: kind(&t)?, stride: stride as u32 })
        }
    }
}

/// The kernel, its grid's first two axes, and its numbers.
fn kernel(launch: &Launch, tokens: usize) -> Option<(&'static str, [u32; 2], [u32; 5])> {
    let n = launch.numbers.as_slice();
    let of = |names: [&'static str; 4], limits: [u32; 4], lanes: u32| {
        names.into_iter().zip(limits).find(|(_, limit)| lanes <= *limit).map(|(name, _)| name)
    };
    match (launch.kernel.maker, n) {
        ("RECUR", &[_, heads, k_heads, d, e, decay]) => {
            let names = match launch.kernel.of.first()?.as_str() {
                "LINEAR" => ["linear_4", "linear_16", "linear_32", "linear_64"],
                "DELTA" => ["delta_4", "delta_16", "delta_32", "delta_64"],
                _ => ["wkv7_4", "wkv7_16", "wkv7_32", "wkv7_64"],
            };
            let name = of(names, [16, 64, 128, 256], d)?;
            Some((name, [e.div_ceil(8 * WARPS), heads], [heads, k_heads, d, e, decay]))
        }
        ("SCAN", &[_, rows, abreast, together, n, each]) => {
            let name = of(["scan_1", "scan_2", "scan_4", "scan_8"], [32, 64, 128, 256], n)?;
            // Rows of a block share b and c.
            let blocks = rows.checked_div(together)? * together.div_ceil(SCAN_ROWS);
            Some((name, [blocks, 1], [rows, abreast, together, n, each]))
        }
        ("CONV", &[_, channels, taps, _]) => {
            let each = if taps > FOLDED { tokens as u32 } else { FOLDED };
            let grid = [channels.div_ceil(32 * WARPS), (tokens as u32).div_ceil(each.max(1))];
            Some(("conv", grid, [channels, taps, each, 0, 0]))
        }
        ("RG_LRU", &[_, dim, _]) => Some(("rg_lru", [dim.div_ceil(32 * WARPS), 1], [dim, 0, 0, 0, 0])),
        _ => None,
    }
}

/// Whether there is a kernel for what Metal would launch so.
pub fn serves(launch: &Launch) -> bool {
    kernel(launch, 1).is_some()
}

/// Runs the recurrence over some sequences' tokens: `inputs` in the order in which Metal's kernels take them, the positions `[tokens]` of the
/// whole step, and `y`, all of whose rows in the segments are written.
pub fn run(launch: &Launch, inputs: &[Input<'_>], positions: &Tensor, segments: &[Segment], y: &Tensor) -> Result<()> {
    let (device, mut kept): (&CudaDevice, _) = (device_of(y)?, Vec::new());
    for some in segments.chunks(MOST_SEGMENTS) {
        let tokens = some.iter().map(|s| s.tokens).max().unwrap_or_default();
        let Some((name, [across, down], numbers)) = kernel(launch, tokens) else {
            bail!("no kernel for {}", launch.kernel.entry())
        };
        let size = some.first().map_or(0, |s| s.states.elem_count() / 2);
        let mut args =
            Args { y: address(y)?, positions: address(positions)?, y_kind: kind(y)?, numbers, ..Args::default() };
        args.size = size as u64;
        for (input_args, of) in args.inputs.iter_mut().zip(inputs) {
            *input_args = input(of, &mut kept)?;
        }
        for (to, of) in args.of.iter_mut().zip(some) {
            let (from, tokens) = (of.from as u32, of.tokens as u32);
            *to = SegmentArgs { states: address(&of.states)?, from, tokens };
        }
        let block = if launch.kernel.maker == "SCAN" { SCAN_THREADS } else { 32 * WARPS };
        let shape = Shape { grid: [across, down, some.len() as u32], block, shared: 0, early: true };
        // SAFETY: as recurrence.cu says; the states are the caller's alone.
        unsafe { function(device, "recurrence", name)?.launch(device, shape, &[Arg::of(&args)])? };
    }
    Ok(())
}
