//! `dylm bench`: tokens per second of prompts and of generation, as mlx_lm.benchmark and llama-bench count them: prompts of random
//! tokens, no end-of-text, one run to warm up, then trials and their medians. Beside them stands what bounds them, the memory's speed.
//! `--boundary` measures the plugin boundary instead.

mod bandwidth;
mod boundary;
mod trial;

use super::{
    Done,
    flags::{CacheFlags, ModelFlags},
    printing::{json, line},
};
use crate::{
    adapter::Adapters,
    error::{Error, Result},
    generate::GenerateOptions,
    load::{LanguageModel, open},
    statistics::Statistics,
    weights::moving,
};
use bandwidth::Bandwidth;
use clap::Args;
use serde_json::json;
use std::process::ExitCode;
use trial::{Trials, Workload};

/// Flags of `dylm bench`.
#[derive(Args)]
#[command(after_help = "\
A trial is -p tokens of prompt, then -g tokens more, of -b sequences at once, behind -d tokens that their caches hold already. Speeds count
the tokens of all sequences; the first token of each comes with its prompt. With -p 0 or -g 0 only the other one is measured.

\"weights read at\" is how fast the weights went by while tokens were generated, each token of a single sequence reading all that it needs of
them as the files have them: bfloat16 that is kept in twelve bits seems to go by a third faster than memory is read. What the memory can do at
most, --bandwidth measures.

  dylm bench ./model                                  # a prompt of 512 tokens, then 128 more
  dylm bench ./model -p 0 -g 32 -d 8192 --bandwidth   # generation behind 8192 tokens, beside what memory can do
  dylm bench --bandwidth                              # the memory alone")]
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
    /// Tokens that fill the cache before anything is measured
    #[arg(long, short = 'd', visible_alias = "depth", value_name = "TOKENS", default_value_t = 0)]
    n_depth: usize,
    /// Sequences at once
    #[arg(long, short, default_value_t = 1)]
    batch_size: usize,
    /// Trials, after one run that does not count
    #[arg(long, short, default_value_t = 5)]
    num_trials: usize,
    #[command(flatten)]
    cache: CacheFlags,
    /// Tokens of the prompt that are read at a time
    #[arg(long, default_value_t = 2048)]
    prefill_step_size: usize,
    /// Measure first how fast all threads together read the memory. Without a MODEL nothing else is measured
    #[arg(long)]
    bandwidth: bool,
    /// Measure the boundary instead: time to load a plugin, time of one op call. No model is loaded; MODEL is a model_type [default:
    /// llama]
    #[arg(long, conflicts_with = "bandwidth")]
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
        if self.prompt_tokens + self.generation_tokens == 0 {
            return Err(Error::Usage("-p 0 and -g 0 leave nothing to measure: one of them must be at least 1".into()));
        }
        if self.batch_size == 0 || self.num_trials == 0 {
            return Err(Error::Usage("-b and -n must be at least 1".into()));
        }
        let spec = self.spec.as_deref().or(self.model.model.as_deref());
        let bandwidth = if self.bandwidth { Some(bandwidth::measure()?) } else { None };
        if let (None, Some(bandwidth)) = (spec, bandwidth) {
            return told(bandwidth, self.json);
        }
        let lm = self.model.load(spec)?;
        let read = Read { bytes: self.bytes_a_token(&lm)?.filter(|_| self.batch_size == 1), of: bandwidth };
        let work = Workload {
            prompt: self.prompt_tokens,
            generated: self.generation_tokens,
            depth: self.n_depth,
            batch: self.batch_size,
            options: GenerateOptions {
                cache: self.cache.options(),
                ignore_eos: true,
                prefill_step_size: self.prefill_step_size,
                ..Default::default()
            },
        };
        if !self.json {
            line(heading(&lm, &work, &read))?;
        }
        let (mut trials, mut figures) = (Trials::new(&lm, &work), Vec::new());
        for trial in 0..=self.num_trials {
            let Some(statistics) = trials.run()? else { return Ok(ExitCode::from(130)) };
            // The first run pages the weights in and settles the clocks; what steps still do once, and prompts alone would not end, is done.
            if trial == 0 {
                moving::all();
                continue;
            }
            if !self.json {
                line(format_args!("Trial {trial}:  {}", row(&statistics, &read)))?;
            }
            figures.push(statistics);
        }
        let middle = Statistics {
            prompt_tps: median(figures.iter().map(|t| t.prompt_tps).collect()),
            generation_tps: median(figures.iter().map(|t| t.generation_tps).collect()),
            ..figures[figures.len() - 1].clone()
        };
        if !self.json {
            line(format_args!("Median:   {}", row(&middle, &read)))?;
            if let Some(why) = lm.model.not_replayed() {
                line(format_args!("Steps run op by op: {why}"))?;
            }
            return Ok(ExitCode::SUCCESS);
        }
        json(&json!({
            "model": lm.source.name,
            "n_depth": work.depth,
            "batch_size": work.batch,
            "weight_bytes_a_token": read.bytes,
            "weights_gb_per_s": read.gb_per_s(&middle),
            "bandwidth": bandwidth,
            "not_replayed": lm.model.not_replayed(),
            "median": middle,
            "trials": figures,
        }))?;
        Ok(ExitCode::SUCCESS)
    }

    /// From the headers once more: the model that is loaded no longer knows how its weights are stored.
    fn bytes_a_token(&self, lm: &LanguageModel) -> Result<Option<u64>> {
        let mut options = self.model.options()?;
        options.progress = false;
        // A path that is no text could not be asked for by one.
        let Some(files) = std::path::absolute(lm.source.files.path()).ok().and_then(|p| Some(p.to_str()?.to_owned()))
        else {
            return Ok(None);
        };
        Ok(open(Some(&files), &options)?.plan(&options, &Adapters::default())?.bytes_a_token())
    }
}

/// What a token reads of the weights, and what memory can do.
struct Read {
    bytes: Option<u64>,
    of: Option<Bandwidth>,
}

impl Read {
    fn gb_per_s(&self, s: &Statistics) -> Option<f64> {
        let bytes = self.bytes.filter(|_| s.generation_tokens > 1)?;
        Some(bytes as f64 * s.generation_tps / 1e9)
    }
}

fn told(bandwidth: Bandwidth, as_json: bool) -> Done {
    if as_json {
        json(&json!({ "bandwidth": bandwidth }))?;
    } else {
        line(ceiling(&bandwidth))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn ceiling(bandwidth: &Bandwidth) -> String {
    let Bandwidth { threads, gb_per_s, best_gb_per_s, .. } = bandwidth;
    let threads = if *threads == 1 { "1 thread reads".into() } else { format!("{threads} threads read") };
    format!("{threads} {gb_per_s:.1} GB/s of memory (median; {best_gb_per_s:.1} at best)")
}

fn heading(lm: &LanguageModel, work: &Workload, read: &Read) -> String {
    let mut heading = format!("{}: {} tokens of prompt, {} generated", lm.source.name, work.prompt, work.generated);
    if work.batch > 1 {
        heading += &format!(", {} sequences", work.batch);
    }
    if work.depth > 0 {
        heading += &format!(", behind {} tokens", work.depth);
    }
    if let Some(bytes) = read.bytes {
        heading += &format!("; a token reads {:.3} GB of weights", bytes as f64 / 1e9);
    }
    if let Some(division) = lm.model.division() {
        heading += &format!("\n{division}");
    }
    if let Some(bandwidth) = &read.of {
        heading += &format!("\n{}", ceiling(bandwidth));
    }
    heading
}

fn row(s: &Statistics, read: &Read) -> String {
    let memory = s.peak_memory_bytes as f64 / 1e9;
    let weights = read.gb_per_s(s).map(|speed| match read.of {
        Some(of) => format!(", weights read at {speed:.1} GB/s ({:.0} %)", 100.0 * speed / of.gb_per_s),
        None => format!(", weights read at {speed:.1} GB/s"),
    });
    let (prompt, generation, weights) = (s.prompt_tps, s.generation_tps, weights.unwrap_or_default());
    format!("prompt_tps={prompt:.3}, generation_tps={generation:.3}, peak_memory={memory:.3}{weights}")
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}
