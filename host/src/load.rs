//! What the user named -> a model ready to generate: fetch, configure, find the plugin, plan, read weights, make the tokenizer.

use crate::{
    adapter::Adapters,
    config::Config,
    device::{DeviceChoice, DtypeChoice, Placement},
    error::{Error, Result},
    hub::{Found, Heads},
    model::{Model, Plan},
    plugin::{registry::Registry, trust::Trust},
    source::{self, Fetch, Files, Source},
    tokenizer::Tokenizer,
    weights::{checkpoint::Checkpoint, gguf::Gguf, moving},
};
use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

/// How to load; the default is the way `dylm generate` does it without flags.
#[derive(Clone, Default)]
pub struct LoadOptions {
    /// Where the model runs.
    pub device: DeviceChoice,
    /// The devices that share the model, by their numbers; none means the first.
    pub devices: Vec<usize>,
    /// How precisely.
    pub dtype: DtypeChoice,
    /// Folders with plugins, searched first.
    pub plugins: Vec<PathBuf>,
    /// What becomes of plugins that are not dylm's own.
    pub trust: Trust,
    /// A LoRA, DoRA or full adapter to lay over the model.
    pub adapter_path: Option<PathBuf>,
    /// `key=value` pairs merged over config.json, at any depth.
    pub config: Vec<(String, serde_json::Value)>,
    /// How to fetch; `None` reads the environment (HF_HOME, HF_TOKEN ..).
    pub fetch: Option<Fetch>,
    /// Show progress on a terminal.
    pub progress: bool,
}

/// A model with its tokenizer.
pub struct LanguageModel {
    /// What it was loaded from.
    pub source: Source,
    /// The network.
    pub model: Model,
    /// Text to tokens and back.
    pub tokenizer: Tokenizer,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// The files of a model, opened; no weights are read.
pub struct Opened {
    /// What it was opened from.
    pub source: Source,
    /// config.json, merged.
    pub config: Config,
    /// The tensors' headers.
    pub checkpoint: Checkpoint,
    gguf: Option<Gguf>,
}

/// Fetches `spec` (see [`source::resolve`]) and opens its files.
pub fn open(spec: Option<&str>, options: &LoadOptions) -> Result<Opened> {
    let fetch = options.fetch.clone().unwrap_or_else(Fetch::from_env);
    open_files(source::resolve(spec, &fetch)?, options)
}

/// As [`open`], but of a model on the Hub that is not in the cache only headers are fetched: [`Heads`], beside what they tell.
pub fn peek(spec: Option<&str>, options: &LoadOptions) -> Result<(Opened, Option<Heads>)> {
    let fetch = options.fetch.clone().unwrap_or_else(Fetch::from_env);
    let heads = match source::peek(spec, &fetch)? {
        Found::Here(source) => return Ok((open_files(source, options)?, None)),
        Found::There(heads) => *heads,
    };
    let place = Path::new(&heads.id);
    let config = Config::from_texts(place, &heads.config, heads.generation.as_deref(), &options.config)?;
    let checkpoint = Checkpoint::from_heads(place, &heads.shards, heads.index.as_deref())?;
    let source = Source {
        files: Files::Folder(heads.folder.clone()),
        name: heads.id.clone(),
        revision: Some(heads.commit.clone()),
    };
    Ok((Opened { source, config, checkpoint, gguf: None }, Some(heads)))
}

fn open_files(source: Source, options: &LoadOptions) -> Result<Opened> {
    let (config, checkpoint, gguf) = match &source.files {
        Files::Folder(folder) => {
            (Config::from_folder(folder, &options.config)?, Checkpoint::open_folder(folder)?, None)
        }
        Files::Gguf(file) => {
            let gguf = Gguf::open(file)?;
            let config = Config::from_json(gguf.config()?, &options.config, &file.display().to_string())?;
            (config, gguf.checkpoint()?, Some(gguf))
        }
    };
    Ok(Opened { source, config, checkpoint, gguf })
}

impl Opened {
    /// The tokenizer that comes with the model.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        tokenizer(self.gguf.as_ref(), &self.source)
    }

    /// The architecture's demands against what the files have.
    pub fn plan(self, options: &LoadOptions, adapters: &Adapters) -> Result<Plan> {
        let Opened { config, mut checkpoint, .. } = self;
        adapters.overlay(&mut checkpoint)?;
        Plan::new(config, checkpoint, &Registry::new(&options.plugins).trusting(options.trust.clone()))
    }
}

fn tokenizer(gguf: Option<&Gguf>, source: &Source) -> Result<Tokenizer> {
    match gguf {
        Some(gguf) => {
            let (inner, config) = gguf.tokenizer()?;
            Tokenizer::new(inner, config)
        }
        None => Tokenizer::from_folder(source.files.path()),
    }
}

/// Loads a model: a Hub id, a folder, a `.gguf` file, `pip:PACKAGE`, or by `None` the default one.
///
/// # Errors
/// One sentence for each way this fails: see [`Error`].
pub fn load(spec: Option<&str>, options: &LoadOptions) -> Result<LanguageModel> {
    let mut opened = open(spec, options)?;
    let (source, gguf) = (opened.source.clone(), opened.gguf.take());
    let make_tokenizer = || tokenizer(gguf.as_ref(), &source);
    let (model, tokenizer) = if cfg!(feature = "cuda") {
        // A GPU belongs to the thread that opened it, which is to be the one that uses it.
        let mut made = None;
        let model = rayon::in_place_scope(|scope| {
            scope.spawn(|_| made = Some(make_tokenizer()));
            network(opened, options)
        });
        (model, made.unwrap_or_else(make_tokenizer))
    } else {
        // The tokenizer takes longer than a network whose weights stay where they lie: what is needed next is done meanwhile. It is made
        // here, as the system gives its many small pieces of memory to a process's first thread with far fewer calls than to others.
        let (mut made, done) = (None, AtomicBool::new(false));
        let tokenizer = rayon::in_place_scope(|scope| {
            scope.spawn(|_| {
                made = Some(network(opened, options));
                Tokenizer::warm_up();
                moving::prepare_until(&done);
            });
            let tokenizer = make_tokenizer();
            done.store(true, Ordering::Release);
            tokenizer
        });
        (made.unwrap_or_else(|| Err(Error::Usage("the model was not loaded".into()))), tokenizer)
    };
    let (model, mut tokenizer) = (model?, tokenizer?);
    let mut eos_token_ids = model.config.eos_token_ids.clone();
    if eos_token_ids.is_empty() {
        eos_token_ids.extend(tokenizer.eos_token_id());
    }
    if let Some(rows) = model.vocab_size() {
        tokenizer.set_id_limit(rows);
    }
    Ok(LanguageModel { source, model, tokenizer, eos_token_ids })
}

/// The model without its tokenizer.
fn network(opened: Opened, options: &LoadOptions) -> Result<Model> {
    let adapters = match &options.adapter_path {
        Some(path) => Adapters::open(path)?,
        None => Adapters::default(),
    };
    let plan = opened.plan(options, &adapters)?;
    let places = Placement::each(options.device, &options.devices, options.dtype, plan.dtype())?;
    let bar = crate::progress::bar(options.progress, "Loading");
    let model = plan.load_on(places, &adapters, &|done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    Ok(model)
}
