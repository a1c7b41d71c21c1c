//! Steps of one token a sequence, which the host compiles: bit for bit what they are op by op.

use super::{Held, Tiny, each, each_entry};
use dylm::{
    cache::memory::Memory,
    device::DeviceChoice,
    model::{Input, Want},
};
use std::sync::Mutex;
use tests::tiny::name;

/// Architectures whose steps have no op without a kernel.
const COMPILED: [&str; 24] = [
    "cohere",
    "deepseek_v3",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "granite",
    "llama",
    "mamba2",
    "minimax",
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv7",
    "smollm3",
    "starcoder2",
];

/// A step of these tokens, one for each state. All rows are wanted of a single one only where the step is to run op by op.
fn step(
    tiny: &Tiny,
    states: &mut [dylm::cache::State],
    tokens: &[u32],
    want: Want,
) -> super::tiny::Result<Vec<Vec<f32>>> {
    let parts = states.iter_mut().zip(tokens.chunks(1));
    let mut inputs: Vec<Input> = parts.map(|(state, tokens)| Input { state, tokens, want }).collect();
    Ok(tiny.lm.model.step(&mut inputs)?.into_iter().flatten().collect())
}

#[test]
fn a_compiled_step_gives_the_bits_of_the_step_op_by_op() {
    let refused = Mutex::new(Vec::new());
    let check = |tiny: &Tiny| -> Held {
        let texts = [&tiny.expected.prompt[..], &tiny.expected.prompt[1..], &tiny.expected.steps[..2]];
        for count in [1, 3] {
            let mut played = Vec::new();
            for text in &texts[..count] {
                let mut state = tiny.state()?;
                tiny.read(&mut state, text, Want::Last)?;
                played.push(state);
            }
            let mut plain = played.clone();
            for &token in &tiny.expected.steps {
                let tokens = vec![token; count];
                let (a, b) =
                    (step(tiny, &mut played, &tokens, Want::Last)?, step(tiny, &mut plain, &tokens, Want::All)?);
                let bits = |rows: &[Vec<f32>]| rows.iter().flatten().map(|x| x.to_bits()).collect::<Vec<_>>();
                if bits(&a) != bits(&b) {
                    return super::near("compiled", &a, &b, 0.0);
                }
            }
        }
        if let Some(why) = tiny.lm.model.not_replayed() {
            refused.lock().unwrap().push(format!("{}: {why}", tiny.name));
        }
        Ok(())
    };
    each(check);
    let mut refused = refused.into_inner().unwrap();
    refused.sort();
    println!("{} run op by op:\n  {}", refused.len(), refused.join("\n  "));
    let stopped = |name: &str| refused.iter().any(|line| line.split(':').next() == Some(name));
    assert_eq!(COMPILED.into_iter().filter(|name| stopped(name)).collect::<Vec<_>>(), [""; 0], "are compiled");
}

#[test]
fn a_sequence_that_fails_in_a_compiled_step_leaves_the_others_as_they_were() {
    let check = |tiny: &Tiny| -> Held {
        let texts = [&tiny.expected.prompt[..], &tiny.expected.prompt[1..], &tiny.expected.prompt[..4]];
        let (first, second) = (tiny.expected.steps[0], tiny.expected.steps[1]);
        let mut states = Vec::new();
        for text in texts {
            let mut state = tiny.state()?;
            tiny.read(&mut state, text, Want::Last)?;
            states.push(state);
        }
        step(tiny, &mut states, &[first; 3], Want::Last)?;
        let mut never_failed = states.clone();
        // A recurrence without a state would begin a new one.
        if !matches!(states[1].layers.pop(), Some(Memory::KeyValue(_))) {
            return Ok(());
        }
        // The layers before it have taken the tokens of all three by then.
        if step(tiny, &mut states, &[second; 3], Want::Last).is_ok() {
            return Err("a sequence without its last keys went through".into());
        }
        let offsets = states.iter().map(|state| state.offset).collect::<Vec<_>>();
        if offsets != texts.map(|text| text.len() + 1) {
            return Err(format!("after a failure the sequences end at {offsets:?}").into());
        }
        states.remove(1);
        never_failed.remove(1);
        let after = step(tiny, &mut states, &[second; 2], Want::Last)?;
        super::near("after another's failure", &after, &step(tiny, &mut never_failed, &[second; 2], Want::Last)?, 1e-5)
    };
    each_entry(|entry| match COMPILED.contains(&name(entry).as_str()) {
        true => check(&Tiny::load(entry, DeviceChoice::Cpu)?),
        false => Ok(()),
    });
}
