//! Every tiny checkpoint on an NVIDIA GPU: its logits held to the CPU's, its replayed steps held to those op by op, bit for bit, and what
//! cannot be replayed told by name. For a machine with a GPU, where tests do not run; `TINY` and `TINY_FIXTURES` as in `tests::tiny`.
//!
//! `cargo run --release --features dylm/cuda -p tests --example on_gpu [-- f32|bf16 [1/4 [0,1]]]`, the second of which takes every fourth
//! entry from the first on, and the third of which shares each model out over these GPUs; it fails if one entry does.

use dylm::{
    LanguageModel, LoadOptions, Trust,
    cache::{CacheOptions, State},
    device::{DeviceChoice, DtypeChoice},
    model::{Input, Want},
};
use std::{path::Path, process::ExitCode, time::Instant};
use tests::tiny::{self, Expected, Result};

/// Tokens that the GPU generates behind the entry's own steps.
const GENERATED: usize = 24;

struct On {
    lm: LanguageModel,
    state: State,
}

impl On {
    fn new(folder: &Path, device: DeviceChoice, dtype: DtypeChoice, devices: &[usize]) -> Result<Self> {
        let options = LoadOptions { device, dtype, devices: devices.to_vec(), trust: Trust::All, ..Default::default() };
        let lm = dylm::load(folder.to_str(), &options)?;
        let state = lm.model.state(&CacheOptions::default())?;
        Ok(On { lm, state })
    }

    fn read(&mut self, tokens: &[u32], want: Want) -> Result<Vec<f32>> {
        let rows = self.lm.model.step(&mut [Input { state: &mut self.state, tokens, want }])?.remove(0);
        Ok(rows.into_iter().next_back().unwrap_or_default())
    }

    /// The prompt, then these tokens one by one, as `want` has it: the last row of each step.
    fn rows(&mut self, prompt: &[u32], steps: &[u32], want: Want) -> Result<Vec<Vec<f32>>> {
        self.state = self.lm.model.state(&CacheOptions::default())?;
        self.state.horizon = prompt.len();
        let mut rows = vec![self.read(prompt, Want::Last)?];
        for &token in steps {
            rows.push(self.read(&[token], want)?);
        }
        Ok(rows)
    }

    /// As [`Self::rows`], with a packed cache.
    fn packed_rows(&mut self, prompt: &[u32], steps: &[u32], want: Want, bits: u32) -> Result<Vec<Vec<f32>>> {
        self.state = self.lm.model.state(&packed(bits))?;
        let mut rows = vec![self.read(prompt, Want::Last)?];
        for &token in steps {
            rows.push(self.read(&[token], want)?);
        }
        Ok(rows)
    }

    /// The last row of a long prompt.
    fn long(&mut self, prompt: &[u32]) -> Result<Vec<f32>> {
        let tokens: Vec<u32> = prompt.iter().copied().cycle().take(LONG).collect();
        Ok(self.rows(&tokens, &[], Want::Last)?.remove(0))
    }
}

/// So many tokens, of which a prompt is repeated, go other ways on a GPU than few do.
const LONG: usize = 150;

/// A cache in groups of a few bits, from the first step on.
fn packed(bits: u32) -> CacheOptions {
    CacheOptions { kv_bits: Some(bits), kv_group_size: 32, quantized_kv_start: 0, ..Default::default() }
}

/// How far rows are from others, relative to the largest number of each; infinite where one is no number.
fn distance(ours: &[Vec<f32>], theirs: &[Vec<f32>]) -> f32 {
    let row = |(a, b): (&Vec<f32>, &Vec<f32>)| {
        let scale = b.iter().fold(0f32, |m, x| m.max(x.abs()));
        let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / scale;
        if a.len() == b.len() && a.iter().all(|x| x.is_finite()) { worst } else { f32::INFINITY }
    };
    ours.iter().zip(theirs).map(row).fold(0.0, f32::max)
}

/// Which rows are further off than `bound`. Where nearly equal scores choose another expert or key, few are, and the others are close.
fn over(ours: &[Vec<f32>], theirs: &[Vec<f32>], bound: f32) -> String {
    let off = |(a, b): (&Vec<f32>, &Vec<f32>)| distance(std::slice::from_ref(a), std::slice::from_ref(b));
    let (mut far, mut most) = (Vec::new(), 0f32);
    for (i, off) in ours.iter().zip(theirs).map(off).enumerate() {
        if off > bound { far.push(i.to_string()) } else { most = most.max(off) }
    }
    format!(", over in rows {} of {}, {most:.1e} in the others", far.join(" "), ours.len())
}

fn most_likely(row: &[f32]) -> u32 {
    let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    row.iter().position(|&x| x == largest).unwrap_or_default() as u32
}

/// What there is to say of an entry, and whether it is as it should be.
fn check(entry: &Path, dtype: DtypeChoice, devices: &[usize]) -> Result<(String, bool)> {
    let folder = tempfile::tempdir()?;
    tiny::write(entry, folder.path())?;
    let expected = Expected::read(entry)?;
    let mut cpu = On::new(folder.path(), DeviceChoice::Cpu, dtype, &[])?;
    let mut gpu = match On::new(folder.path(), DeviceChoice::Cuda, dtype, devices) {
        Err(e) if e.to_string().contains("name fewer devices") => return Ok(("cannot be shared".into(), true)),
        other => other?,
    };
    // The text that the GPU writes by itself, op by op, is the one that all ways of running it are held to.
    let mut steps = expected.steps.clone();
    let mut last = gpu.rows(&expected.prompt, &steps, Want::All)?.pop().unwrap_or_default();
    let start = Instant::now();
    for _ in 0..GENERATED {
        steps.push(most_likely(&last));
        last = gpu.read(&steps[steps.len() - 1..], Want::All)?;
    }
    let by_op = start.elapsed().as_secs_f64() * 1e3 / GENERATED as f64;
    let eager = gpu.rows(&expected.prompt, &steps, Want::All)?;
    let mut theirs = cpu.rows(&expected.prompt, &steps, Want::All)?;
    let replayed = gpu.rows(&expected.prompt, &steps, Want::Last)?;
    let same = replayed == eager;
    let mut ours = eager;
    // Not all have room for it.
    let long = cpu.long(&expected.prompt).is_ok_and(|row| {
        theirs.push(row);
        true
    });
    if long {
        ours.push(gpu.long(&expected.prompt)?);
    }
    let far = distance(&ours, &theirs);
    // And chosen on the device, a step ahead.
    let known = steps.len() - GENERATED;
    gpu.rows(&expected.prompt, &steps[..known - 1], Want::Last)?;
    let (mut chosen, mut next, start) = (Vec::new(), steps[known - 1], Instant::now());
    for _ in 0..GENERATED {
        let input = Input { state: &mut gpu.state, tokens: &[next], want: Want::Last };
        let Some(best) = gpu.lm.model.choose(&mut [input])? else { break };
        next = best[0].0;
        chosen.push(next);
    }
    let by_graph = start.elapsed().as_secs_f64() * 1e3 / GENERATED as f64;
    // In bf16 both round, at different places: of numbers that sum to little much of that is left, and where experts or keys are chosen by
    // scores that are nearly equal, another one is. So the GPU may be as far from the CPU's f32 as the CPU's own bf16 is, within twice.
    let (bound, far) = match dtype {
        DtypeChoice::Float32 => (expected.bound.max(1e-4), far),
        _ => {
            let mut wide = On::new(folder.path(), DeviceChoice::Cpu, DtypeChoice::Float32, &[])?;
            let mut exact = wide.rows(&expected.prompt, &steps, Want::All)?;
            if long {
                exact.push(wide.long(&expected.prompt)?);
            }
            let own = distance(&theirs, &exact);
            (0.1f32.max(2.0 * own), far.min(distance(&ours, &exact)))
        }
    };
    // Heads that split into groups, with a packed cache: by op, and replayed. A number that is nearly between two steps of its group may be
    // packed as either, by another order of summing alone, and be a step off: a 255th of its group's range, a 15th. In bf16 such a step may
    // choose another expert besides, so there the replay alone is judged.
    let mut told = String::new();
    let mut packs = true;
    for (bits, coarse) in [(8, 0.02f32), (4, 0.2)] {
        let Ok(theirs) = cpu.packed_rows(&expected.prompt, &steps, Want::All, bits) else { continue };
        let ours = gpu.packed_rows(&expected.prompt, &steps, Want::All, bits)?;
        let alike = gpu.packed_rows(&expected.prompt, &steps, Want::Last, bits)? == ours;
        let (far, most) = (distance(&ours, &theirs), coarse.max(bound));
        packs &= alike && (far <= most || !matches!(dtype, DtypeChoice::Float32));
        told += &format!(", cache of {bits} bits {far:.1e} of {most:.0e}{}", if alike { "" } else { ", rows DIFFER" });
    }
    let why = gpu.lm.model.not_replayed();
    let where_off = if far > bound { over(&ours, &theirs, bound) } else { String::new() };
    let sound = far <= bound && same && packs && (why.is_some() || chosen == steps[known..]);
    let how = match &why {
        Some(why) => format!("not replayed: {why}"),
        None => {
            format!("replayed {}, {by_graph:.2} ms", if chosen == steps[known..] { "alike" } else { "OTHER TOKENS" })
        }
    };
    Ok((
        format!(
            "{far:.1e} of {bound:.0e}{where_off}{told}, rows {}, op by op {by_op:.2} ms, {how}",
            if same { "equal" } else { "DIFFER" }
        ),
        sound,
    ))
}

fn main() -> ExitCode {
    let dtype = match std::env::args().nth(1).as_deref() {
        Some("bf16") => DtypeChoice::Bfloat16,
        _ => DtypeChoice::Float32,
    };
    let share = std::env::args().nth(2);
    let share = share.as_deref().and_then(|share| share.split_once('/'));
    let (first, every) = share.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?))).unwrap_or((1usize, 1usize));
    let entries: Vec<_> = match tiny::entries() {
        Ok(entries) => entries.into_iter().skip(first.max(1) - 1).step_by(every.max(1)).collect(),
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::FAILURE;
        }
    };
    let devices = std::env::args().nth(3).unwrap_or_default();
    let devices: Vec<usize> = devices.split(',').filter_map(|number| number.parse().ok()).collect();
    let (mut wrong, count) = (0, entries.len());
    for entry in entries {
        let (said, sound) = check(&entry, dtype, &devices).unwrap_or_else(|e| (e.to_string(), false));
        wrong += usize::from(!sound);
        println!("{} {}: {said}", if sound { "ok   " } else { "WRONG" }, tiny::name(&entry));
    }
    println!("{wrong} of {count} are wrong");
    ExitCode::from(u8::from(wrong > 0))
}
