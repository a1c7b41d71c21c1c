//! Every architecture on tiny seeded checkpoints, held to transformers or mlx-lm in f32, and to the invariances that the host promises
//! for all: a prompt in chunks, many sequences in one step, trimmed and replayed, saved state, candle's ops in place of dylm's own.
//!
//! Entries run side by side, and all that fail are told. `TINY` and `TINY_FIXTURES` restrict and move them: see `tests::tiny`.

mod compiled;
mod forms;
mod ranks;

use dylm::{
    LanguageModel, LoadOptions, Trust,
    cache::{CacheOptions, State},
    device::{DeviceChoice, DtypeChoice},
    model::{Input, Want},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};
use tests::tiny::{self, Expected};

struct Tiny {
    name: String,
    lm: LanguageModel,
    expected: Expected,
}

/// What is wrong with an entry, or nothing.
type Held = tiny::Result<()>;

/// Holds every entry to `check`, several at a time.
///
/// # Panics
/// With what is wrong of every entry that fails.
fn each(check: impl Fn(&Tiny) -> Held + Sync) {
    each_entry(|entry| check(&Tiny::load(entry, DeviceChoice::Cpu)?));
}

fn each_entry(check: impl Fn(&Path) -> Held + Sync) {
    let entries = tiny::entries().unwrap_or_else(|e| panic!("{e}"));
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(entry) = entries.get(next.fetch_add(1, Ordering::Relaxed)) {
            let held = catch_unwind(AssertUnwindSafe(|| check(entry)));
            let wrong = match held {
                Ok(Ok(())) => continue,
                Ok(Err(wrong)) => wrong.to_string(),
                Err(_) => "panicked, see above".to_owned(),
            };
            failed.lock().unwrap().push(format!("{}: {wrong}", tiny::name(entry)));
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get()).min(entries.len());
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let mut failed = failed.into_inner().unwrap();
    failed.sort();
    assert!(failed.is_empty(), "{} of {} entries:\n  {}", failed.len(), entries.len(), failed.join("\n  "));
}

impl Tiny {
    fn options() -> LoadOptions {
        // Plugins of another build are named with DYLM_PLUGINS.
        let (device, dtype) = (DeviceChoice::Cpu, DtypeChoice::Float32);
        LoadOptions { device, dtype, trust: Trust::All, ..Default::default() }
    }

    fn load(entry: &Path, device: DeviceChoice) -> tiny::Result<Self> {
        let folder = tempfile::tempdir()?;
        tiny::write(entry, folder.path())?;
        Self::open(entry, folder.path(), &LoadOptions { device, ..Self::options() })
    }

    /// The entry as it was written into `folder`.
    fn open(entry: &Path, folder: &Path, options: &LoadOptions) -> tiny::Result<Self> {
        let lm = dylm::load(folder.to_str(), options)?;
        Ok(Self { name: tiny::name(entry), lm, expected: Expected::read(entry)? })
    }

    fn state(&self) -> tiny::Result<State> {
        Ok(self.lm.model.state(&CacheOptions::default())?)
    }

    fn read(&self, state: &mut State, tokens: &[u32], want: Want) -> tiny::Result<Vec<Vec<f32>>> {
        Ok(self.lm.model.step(&mut [Input { state, tokens, want }])?.remove(0))
    }

    /// The prompt and every step after it, at once: logits after the prompt's last token and each further one.
    fn straight(&self) -> tiny::Result<Vec<Vec<f32>>> {
        self.chunked(&[self.expected.prompt.len()])
    }

    /// The prompt in chunks of these sizes and one of what is left, then token by token.
    fn chunked(&self, sizes: &[usize]) -> tiny::Result<Vec<Vec<f32>>> {
        let mut state = self.state()?;
        state.horizon = self.expected.prompt.len();
        let (mut rows, mut rest) = (Vec::new(), self.expected.prompt.as_slice());
        for &size in sizes.iter().chain([&usize::MAX]) {
            let (chunk, after) = rest.split_at(size.min(rest.len()));
            rows = self.read(&mut state, chunk, Want::Last)?;
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        for &token in &self.expected.steps {
            rows.extend(self.read(&mut state, &[token], Want::Last)?);
        }
        Ok(rows)
    }
}

/// Holds rows of logits to others within `bound`, relative to the largest of each row.
fn near(what: &str, ours: &[Vec<f32>], theirs: &[Vec<f32>], bound: f32) -> Held {
    if ours.len() != theirs.len() {
        return Err(format!("{what}: {} rows, not {}", ours.len(), theirs.len()).into());
    }
    for (step, (a, b)) in ours.iter().zip(theirs).enumerate() {
        if a.len() != b.len() {
            return Err(format!("{what}: {} logits, not {}", a.len(), b.len()).into());
        }
        let scale = b.iter().fold(0f32, |m, x| m.max(x.abs()));
        let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / scale;
        // Also where it is no number.
        if !(worst <= bound && a.iter().all(|x| x.is_finite())) {
            return Err(format!("{what}: step {step} is off by {worst:.1e}, {bound:.0e} is allowed").into());
        }
    }
    Ok(())
}

#[test]
fn logits_are_those_of_the_reference() {
    each(|tiny| near("against the reference", &tiny.straight()?, &tiny.expected.logits, tiny.expected.bound));
}

#[test]
fn candles_ops_alone_give_the_same_logits() {
    // How GPUs run, save for the device.
    each_entry(|entry| {
        let (native, candle) = (Tiny::load(entry, DeviceChoice::Cpu)?, Tiny::load(entry, DeviceChoice::CpuByCandle)?);
        near("by candle", &candle.straight()?, &native.straight()?, native.expected.bound)
    });
}

#[test]
#[cfg(target_os = "macos")]
fn metal_gives_the_cpu_s_logits() {
    if tests::metal_stage::device().is_none() {
        return;
    }
    each_entry(|entry| {
        let (native, metal) = (Tiny::load(entry, DeviceChoice::Cpu)?, Tiny::load(entry, DeviceChoice::Metal)?);
        // A GPU's exp and division are approximations, and its sums have another order.
        near("by metal", &metal.straight()?, &native.straight()?, 1e-3)
    });
}

#[test]
fn a_prompt_in_chunks_gives_the_logits_of_the_whole() {
    each(|tiny| {
        let whole = tiny.straight()?;
        for sizes in [vec![1; 20], vec![3, 4, 1, 20], vec![7, 20]] {
            near(&format!("chunks {sizes:?}"), &tiny.chunked(&sizes)?, &whole, 1e-5)?;
        }
        Ok(())
    });
}

#[test]
fn the_last_token_s_logits_alone_are_those_among_all() {
    let without = Mutex::new(Vec::new());
    each(|tiny| {
        let prompt = &tiny.expected.prompt;
        let whole = tiny.read(&mut tiny.state()?, prompt, Want::All)?;
        near("alone", &tiny.read(&mut tiny.state()?, prompt, Want::Last)?, &whole[prompt.len() - 1..], 1e-5)?;
        if tiny.lm.model.looks_across(prompt.len()).is_none() {
            without.lock().unwrap().push(tiny.name.clone());
        }
        Ok(())
    });
    let without = without.into_inner().unwrap();
    eprintln!("go on with all rows: {}", without.join(", "));
    assert!(!without.iter().any(|name| name.starts_with("llama")), "llama goes on with all rows");
}

#[test]
fn ragged_sequences_in_one_step_give_what_each_gives_alone() {
    each(|tiny| {
        let prompt = &tiny.expected.prompt;
        let texts = [prompt.as_slice(), &prompt[..5], &prompt[3..11]];
        let mut alone = Vec::new();
        for text in texts {
            let mut state = tiny.state()?;
            tiny.read(&mut state, &text[..text.len() - 2], Want::Nothing)?;
            alone.push(tiny.read(&mut state, &text[text.len() - 2..], Want::All)?);
        }
        let mut states = [tiny.state()?, tiny.state()?, tiny.state()?];
        for part in [0, 1] {
            let mut inputs: Vec<Input> = states
                .iter_mut()
                .zip(texts)
                .map(|(state, text)| {
                    let cut = text.len() - 2;
                    Input { state, tokens: if part == 0 { &text[..cut] } else { &text[cut..] }, want: Want::All }
                })
                .collect();
            let rows = tiny.lm.model.step(&mut inputs)?;
            if part == 1 {
                for (together, alone) in rows.iter().zip(&alone) {
                    near("batched", together, alone, 1e-5)?;
                }
            }
        }
        Ok(())
    });
}

#[test]
fn a_trimmed_cache_replays_to_the_same_logits() {
    each(|tiny| {
        let prompt = &tiny.expected.prompt;
        let mut state = tiny.state()?;
        state.horizon = prompt.len();
        let whole = tiny.read(&mut state, prompt, Want::All)?;
        state.trim(5)?;
        state.horizon = prompt.len();
        let again = tiny.read(&mut state, &prompt[prompt.len() - 5..], Want::All)?;
        near("trimmed", &again, &whole[prompt.len() - 5..], 1e-5)
    });
}

#[test]
fn a_failed_step_leaves_the_cache_as_it_was() {
    each(|tiny| {
        let mut state = tiny.state()?;
        let vocab = tiny.lm.model.vocab_size().unwrap_or(1 << 20) as u32;
        let before = tiny.read(&mut state, &tiny.expected.prompt, Want::Last)?;
        let wrong = tiny.lm.model.step(&mut [Input { state: &mut state, tokens: &[1, vocab + 7], want: Want::Last }]);
        assert!(wrong.is_err(), "{}: took a token outside of the vocabulary", tiny.name);
        assert_eq!(state.offset, tiny.expected.prompt.len(), "{}", tiny.name);
        state.trim(1)?;
        state.horizon = tiny.expected.prompt.len();
        let last = *tiny.expected.prompt.last().unwrap_or(&0);
        near("after a failure", &tiny.read(&mut state, &[last], Want::Last)?, &before, 1e-5)
    });
}
