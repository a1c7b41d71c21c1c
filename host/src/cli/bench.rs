//! `dylm bench`: tokens per second of prompts and of generation, as mlx_lm.benchmark and llama-bench count them: a prompt of random
//! tokens, no end-of-text, one run to warm up, then trials and their medians. `--boundary` measures the plugin boundary instead.

mod boundary;

use super::{
    Done,
    flags::{CacheFlags, ModelFlags},
    interrupt,
    printing::{json, line},
};
use crate::{
    error::{Error, Result},
    generate::{GenerateOptions, Generation},
    load::LanguageModel,
    statistics::Statistics,
};
use clap::Args;
use serde_json::json;
use std::{process::ExitCode, sync::atomic::Ordering};

/// Flags of `dylm bench`.
#[derive(Args)]
pub struct Bench {
    /// The model, as --model takes it
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    spec: Option<String>,
    #[command(flatten)]
    model: ModelFlags,
    /// Tokens of the prompt
    #[arg(long, short, default_value_t = 512)]
    prompt_tokens: usize,
    /// Tokens to generate
    #[arg(long, short, default_value_t = 128)]
    generation_tokens: usize,
    /// Trials, after one run that does not count
    #[arg(long, short, default_value_t = 5)]
    num_trials: usize,
    #[command(flatten)]
    cache: CacheFlags,
    /// Tokens of the prompt that are read at a time
    #[arg(long, default_value_t = 2048)]
    prefill_step_size: usize,
    /// Measure the boundary instead: time to load a plugin, time of one op call. No model is loaded; MODEL is a model_type [default:
    /// llama]
    #[arg(long)]
    boundary: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Bench {
    /// Runs the command.
    pub fn run(&self) -> Done {
        if self.boundary {
            return boundary::measure(self.spec.as_deref().unwrap_or("llama"), &self.model.options()?, self.json);
        }
        if self.prompt_tokens == 0 || self.generation_tokens == 0 || self.num_trials == 0 {
            return Err(Error::Usage("-p, -g and -n must be at least 1".into()));
        }
        let lm = self.model.load(self.spec.as_deref().or(self.model.model.as_deref()))?;
        let prompt = random_tokens(self.prompt_tokens, lm.model.vocab_size().unwrap_or(lm.tokenizer.vocab_size()));
        let options = GenerateOptions {
            max_tokens: self.generation_tokens,
            cache: self.cache.options(),
            ignore_eos: true,
            prefill_step_size: self.prefill_step_size,
            ..Default::default()
        };
        if !self.json {
            let (p, g) = (self.prompt_tokens, self.generation_tokens);
            line(format_args!("{}: {p} tokens of prompt, {g} generated", lm.source.name))?;
        }
        let mut trials = Vec::new();
        for trial in 0..=self.num_trials {
            let Some(figures) = run(&lm, &prompt, &options)? else { return Ok(ExitCode::from(130)) };
            // The first run pages the weights in and settles the clocks.
            if trial == 0 {
                continue;
            }
            if !self.json {
                line(format_args!("Trial {trial}:  {}", row(&figures)))?;
            }
            trials.push(figures);
        }
        let middle = Statistics {
            prompt_tps: median(trials.iter().map(|t| t.prompt_tps).collect()),
            generation_tps: median(trials.iter().map(|t| t.generation_tps).collect()),
            ..trials[trials.len() - 1].clone()
        };
        if self.json {
            json(&json!({ "model": lm.source.name, "median": middle, "trials": trials }))?;
        } else {
            line(format_args!("Median:   {}", row(&middle)))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// One trial; `None` when interrupted.
fn run(lm: &LanguageModel, prompt: &[u32], options: &GenerateOptions) -> Result<Option<Statistics>> {
    let interrupted = interrupt::watch();
    let mut generation = Generation::new(lm, prompt, options, None, None)?.interrupted_by(interrupted);
    for response in &mut generation {
        response?;
    }
    Ok((!interrupted.load(Ordering::Relaxed)).then(|| generation.statistics()))
}

fn row(s: &Statistics) -> String {
    let memory = s.peak_memory_bytes as f64 / 1e9;
    format!("prompt_tps={:.3}, generation_tps={:.3}, peak_memory={memory:.3}", s.prompt_tps, s.generation_tps)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// The same tokens in every run: a linear congruential generator, Knuth's multiplier.
fn random_tokens(count: usize, vocab: usize) -> Vec<u32> {
    let mut state = 0u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) as usize % vocab.max(1)) as u32
    };
    (0..count).map(|_| next()).collect()
}
