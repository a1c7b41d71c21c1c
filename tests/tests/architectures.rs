//! Every architecture on tiny seeded checkpoints, held to transformers in f32, and to the invariances that the host promises for all:
//! a prompt in chunks, many sequences in one step, trimmed and replayed, saved state, candle's ops in place of dylm's own.

use dylm::{
    LanguageModel, LoadOptions,
    cache::{CacheOptions, State},
    device::{DeviceChoice, DtypeChoice},
    model::{Input, Want},
};
use tests::tiny::{self, Expected};

struct Tiny {
    name: String,
    lm: LanguageModel,
    expected: Expected,
}

/// Every stored entry, loaded. (One process loads them all: a test apiece would load each several times.)
fn all() -> impl Iterator<Item = Tiny> {
    all_on(DeviceChoice::Cpu)
}

fn all_on(device: DeviceChoice) -> impl Iterator<Item = Tiny> {
    tiny::entries().expect("the fixtures are there").into_iter().map(move |entry| {
        let folder = tempfile::tempdir().unwrap();
        tiny::write(&entry, folder.path()).unwrap();
        let options = LoadOptions { device, dtype: DtypeChoice::Float32, ..Default::default() };
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let lm = dylm::load(folder.path().to_str(), &options).unwrap_or_else(|e| panic!("{name}: {e}"));
        Tiny { name, lm, expected: Expected::read(&entry).unwrap() }
    })
}

impl Tiny {
    fn state(&self) -> State {
        self.lm.model.state(&CacheOptions::default()).unwrap()
    }

    fn read(&self, state: &mut State, tokens: &[u32], want: Want) -> Vec<Vec<f32>> {
        self.lm
            .model
            .step(&mut [Input { state, tokens, want }])
            .unwrap_or_else(|e| panic!("{}: {e}", self.name))
            .remove(0)
    }

    /// The prompt and every step after it, at once: logits after the prompt's last token and each further one.
    fn straight(&self) -> Vec<Vec<f32>> {
        self.chunked(&[self.expected.prompt.len()])
    }

    /// The prompt in chunks of these sizes, then token by token.
    fn chunked(&self, sizes: &[usize]) -> Vec<Vec<f32>> {
        let mut state = self.state();
        state.horizon = self.expected.prompt.len();
        let (mut rows, mut rest) = (Vec::new(), self.expected.prompt.as_slice());
        for &size in sizes {
            let (chunk, after) = rest.split_at(size.min(rest.len()));
            rows = self.read(&mut state, chunk, Want::Last);
            rest = after;
            if rest.is_empty() {
                break;
            }
        }
        for &token in &self.expected.steps {
            rows.extend(self.read(&mut state, &[token], Want::Last));
        }
        rows
    }

    fn assert_near(&self, what: &str, ours: &[Vec<f32>], theirs: &[Vec<f32>], bound: f32) {
        assert_eq!(ours.len(), theirs.len(), "{}: {what}", self.name);
        for (step, (a, b)) in ours.iter().zip(theirs).enumerate() {
            assert_eq!(a.len(), b.len(), "{}: {what}", self.name);
            let scale = b.iter().fold(0f32, |m, x| m.max(x.abs()));
            let worst = a.iter().zip(b).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / scale;
            assert!(worst <= bound, "{}: {what}: step {step} is off by {worst:.1e}, {bound:.0e} is allowed", self.name);
        }
    }
}

#[test]
fn logits_are_those_of_transformers() {
    for tiny in all() {
        tiny.assert_near("against transformers", &tiny.straight(), &tiny.expected.logits, 2e-5);
    }
}

#[test]
fn candles_ops_alone_give_the_same_logits() {
    // How GPUs run, save for the device.
    for (native, tiny) in all().zip(all_on(DeviceChoice::CpuByCandle)) {
        tiny.assert_near("by candle", &tiny.straight(), &native.straight(), 2e-5);
    }
}

#[test]
fn a_prompt_in_chunks_gives_the_logits_of_the_whole() {
    for tiny in all() {
        let whole = tiny.straight();
        for sizes in [vec![1; 20], vec![3, 4, 1, 20], vec![7, 20]] {
            tiny.assert_near(&format!("chunks {sizes:?}"), &tiny.chunked(&sizes), &whole, 1e-5);
        }
    }
}

#[test]
fn ragged_sequences_in_one_step_give_what_each_gives_alone() {
    for tiny in all() {
        let prompt = &tiny.expected.prompt;
        let texts = [prompt.as_slice(), &prompt[..5], &prompt[3..11]];
        let mut alone = Vec::new();
        for text in texts {
            let mut state = tiny.state();
            tiny.read(&mut state, &text[..text.len() - 2], Want::Nothing);
            alone.push(tiny.read(&mut state, &text[text.len() - 2..], Want::All));
        }
        let mut states = texts.map(|_| tiny.state());
        for part in [0, 1] {
            let mut inputs: Vec<Input> = states
                .iter_mut()
                .zip(texts)
                .map(|(state, text)| {
                    let cut = text.len() - 2;
                    Input { state, tokens: if part == 0 { &text[..cut] } else { &text[cut..] }, want: Want::All }
                })
                .collect();
            let rows = tiny.lm.model.step(&mut inputs).unwrap();
            if part == 1 {
                for (together, alone) in rows.iter().zip(&alone) {
                    tiny.assert_near("batched", together, alone, 1e-5);
                }
            }
        }
    }
}

#[test]
fn a_trimmed_cache_replays_to_the_same_logits() {
    for tiny in all() {
        let prompt = &tiny.expected.prompt;
        let mut state = tiny.state();
        state.horizon = prompt.len();
        let whole = tiny.read(&mut state, prompt, Want::All);
        state.trim(5).unwrap();
        state.horizon = prompt.len();
        let again = tiny.read(&mut state, &prompt[prompt.len() - 5..], Want::All);
        tiny.assert_near("trimmed", &again, &whole[prompt.len() - 5..], 1e-5);
    }
}

#[test]
fn a_failed_step_leaves_the_cache_as_it_was() {
    for tiny in all() {
        let mut state = tiny.state();
        let vocab = tiny.lm.model.vocab_size().unwrap_or(1 << 20) as u32;
        let before = tiny.read(&mut state, &tiny.expected.prompt, Want::Last);
        assert!(
            tiny.lm.model.step(&mut [Input { state: &mut state, tokens: &[1, vocab + 7], want: Want::Last }]).is_err()
        );
        assert_eq!(state.offset, tiny.expected.prompt.len());
        state.trim(1).unwrap();
        state.horizon = tiny.expected.prompt.len();
        let last = *tiny.expected.prompt.last().unwrap();
        tiny.assert_near("after a failure", &tiny.read(&mut state, &[last], Want::Last), &before, 1e-5);
    }
}
