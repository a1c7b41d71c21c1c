//! dylm (dynamic-library language models): loads a Hugging Face or MLX checkpoint and generates text; the architecture is a plugin.
//!
//! ```
//! # let (model_folder, plugins) = tests::binary::tiny_model_and_plugins("llama");
//! # let (model_folder, options) = (model_folder.path(), dylm::LoadOptions { plugins: vec![plugins], trust: dylm::Trust::All, ..Default::default() });
//! // A folder, a .gguf file, a Hub id such as "HuggingFaceTB/SmolLM2-135M-Instruct", or None for the default model.
//! let model = dylm::load(model_folder.to_str(), &options)?;
//! let text = dylm::generate(&model, "The capital of France is", &dylm::GenerateOptions::default())?;
//!
//! // The same, token by token, sampled; seeds make it reproducible.
//! let sampling = dylm::Sampling { temp: 0.7, seed: Some(1), ..Default::default() };
//! let options = dylm::GenerateOptions { max_tokens: 20, sampling, ..Default::default() };
//! for response in dylm::stream_generate(&model, "Once upon a time", &options)? {
//!     print!("{}", response?.text);
//! }
//!
//! // A conversation goes through the model's chat template.
//! let ask = dylm::ChatOptions { add_generation_prompt: true, ..Default::default() };
//! let prompt = model.tokenizer.encode_chat(&[dylm::Message::new("user", "Hello")], &ask)?;
//! let mut answer = dylm::Generation::new(&model, &prompt, &options, None, None)?;
//! let text = answer.by_ref().map(|response| Ok(response?.text)).collect::<dylm::Result<String>>()?;
//! println!("{text}\n{}", answer.statistics());
//! # Ok::<(), dylm::Error>(())
//! ```
//!
//! The journey of one request, which is also the order in which to read: `load` ([`source`], [`config`], [`plugin::registry`],
//! [`plugin::library`]) -> [`model`] (the plugin describes itself against [`weights::plan`]; [`weights::load`] makes [`layers`]) ->
//! [`tokenizer`] -> [`generate()`] ([`decode`], [`cache`], [`sampler`], [`detokenize`], [`stop`]). The op table between host and plugin is in
//! `ops`, its other side in the crate `plugin-api`; what a step of one token asks for is taken down in `compiled` (CPU) or `replay` (CUDA),
//! and shared out over devices in `parallel`.

pub mod adapter;
pub mod cache;
pub mod cli;
mod compiled;
pub mod config;
pub mod decode;
pub mod detokenize;
pub mod device;
pub mod error;
pub mod fit;
pub mod generate;
pub mod hub;
pub mod kernels;
pub mod layers;
pub mod load;
pub mod machine;
pub mod model;
mod ops;
pub mod parallel;
pub mod pip;
pub mod plugin;
pub mod processors;
mod progress;
#[cfg(feature = "cuda")]
mod replay;
pub mod repo;
pub mod sampler;
pub mod scaffold;
pub mod source;
pub mod speculate;
pub mod statistics;
pub mod stop;
pub mod template;
pub mod tiny;
pub mod tokenizer;
pub mod weights;

pub use error::{Error, Result};
pub use generate::{GenerateOptions, Generation, Response};
pub use load::{LanguageModel, LoadOptions, load};
pub use plugin::trust::Trust;
pub use sampler::Sampling;
pub use template::{ChatOptions, Message};

/// Continues a text and returns the continuation. For a conversation, encode it first: [`tokenizer::Tokenizer::encode_chat`].
pub fn generate(model: &LanguageModel, prompt: &str, options: &GenerateOptions) -> Result<String> {
    stream_generate(model, prompt, options)?.map(|r| r.map(|r| r.text)).collect()
}

/// Continues a text, token by token.
pub fn stream_generate<'a>(
    model: &'a LanguageModel,
    prompt: &str,
    options: &GenerateOptions,
) -> Result<Generation<'a>> {
    Generation::new(model, &model.tokenizer.encode(prompt)?, options, None, None)
}
