//! A checkpoint and a plugin, made into a model: planned against the files' headers, loaded, and run step by step.

mod draw;
mod engine;
mod shared;

use crate::{
    cache::{CacheOptions, State, kv::pooled_by, memory},
    config::Config,
    device::{DeviceChoice, DtypeChoice, Placement},
    error::{Error, Result},
    layers::Layer,
    ops::{
        building::Building,
        lending::Call,
        running::{CacheShapes, Part},
        value::Value,
        watch::Watch,
    },
    parallel::ranks::{Followers, Seat},
    plugin::{
        library::{Library, Object},
        note::Note,
        registry::Registry,
    },
    weights::{
        checkpoint::Checkpoint,
        moving,
        names::plain_names,
        plan::{Report, Wanted},
        recipe::{Pantry, float},
    },
};
use candle_core::{DType, Tensor};
use engine::Engine;
use plugin_api::abi::{CacheSpec, Slot, extension::Extension};
use std::{
    cell::RefCell,
    collections::HashMap,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

/// A model that an architecture has described and no weights have been read for.
pub struct Plan {
    /// config.json, merged.
    pub config: Config,
    /// The plugin's file.
    pub plugin: PathBuf,
    /// The plugin's note.
    pub note: Note,
    /// How the checkpoint differs from what the architecture asks for.
    pub report: Report,
    /// The plugin's model.
    pub(crate) object: Object,
    /// The slots, in order.
    pub(crate) wanted: Vec<Wanted>,
    /// The files' tensors.
    pub(crate) pantry: Pantry,
    /// What built `object`, to build it once more for each further device.
    library: Library,
    /// Linear layers of one input, which may run as one.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    together: Vec<Vec<Slot>>,
}

/// A model that runs.
pub struct Model {
    /// config.json, merged.
    pub config: Config,
    /// Where and how precisely it runs.
    pub place: Placement,
    /// What the plugin says of itself.
    pub plugin: Note,
    /// The plugin's model.
    pub(crate) object: Object,
    /// Who watches what the plugin does.
    pub(crate) watch: Option<Watch>,
    pub(crate) wanted: Vec<Wanted>,
    pub(crate) layers: Vec<Layer>,
    /// Its steps that were compiled for the CPU.
    pub(crate) compiled: crate::compiled::Steps,
    /// Its steps that were recorded; let go before what their sums over devices need.
    #[cfg(feature = "cuda")]
    pub(crate) replays: crate::replay::Replays,
    /// Which rank it is of a model on several devices.
    pub(crate) seat: Option<Seat>,
    /// The other ranks, where it is the first.
    followers: Option<Followers>,
    /// How its weights are shared out, in a sentence.
    division: Option<String>,
    /// Whether a step was taken.
    begun: AtomicBool,
    /// How many ops of a step look from token to token, by its tokens: see [`last_rows`](crate::ops::last_rows).
    looks: Mutex<HashMap<usize, Option<usize>>>,
}

/// Which rows of a sequence's new tokens the caller wants logits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None: the tokens only join the cache.
    Nothing,
    /// The last token's.
    Last,
    /// All of them.
    All,
}

/// What one layer remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Numbers of a token: its keys and values together, or its share of them where they stand for several tokens.
    pub values: usize,
    /// Tokens that are kept, where it is not all of them.
    pub window: Option<usize>,
    /// Numbers of a recurrence's state, however long the text; always f32.
    pub state: usize,
}

/// One sequence's part of a step.
pub struct Input<'a> {
    /// Its memory.
    pub state: &'a mut State,
    /// Its new tokens.
    pub tokens: &'a [u32],
    /// Which logits.
    pub want: Want,
}

impl Plan {
    /// Finds the plugin, lets it describe the model, and compares that with the checkpoint, reading headers only.
    pub fn new(config: Config, checkpoint: Checkpoint, registry: &Registry) -> Result<Self> {
        let found = registry.resolve_for(&config)?;
        Self::by(&Library::open(&found)?, config, checkpoint)
    }

    /// The same with a plugin that is open.
    pub(crate) fn by(library: &Library, config: Config, checkpoint: Checkpoint) -> Result<Self> {
        let pantry = Pantry { checkpoint: plain_names(checkpoint)?, quantization: config.quantization().cloned() };
        let json = serde_json::Value::Object(config.json().clone());
        let call = Call::Building(RefCell::new(Building::new(&pantry, &json)));
        let object = library.create(&call, &config.text())?;
        let Call::Building(building) = call else { unreachable!("made as Building above") };
        let Building { wanted, ignored, together, complaints, .. } = building.into_inner();
        let report = Report::new(&wanted, &pantry, &ignored, complaints);
        let (plugin, note) = (library.path.clone(), library.note.clone());
        let library = library.clone();
        Ok(Plan { config, plugin, note, report, pantry, object, wanted, library, together })
    }

    /// Runs the architecture on shapes alone, which finds most mistakes of a plugin before gigabytes are read, and tells what its caches
    /// will hold.
    pub fn dry_run(&self) -> Result<Vec<CacheShape>> {
        let (_, shapes) = self.dry(Value::planned(&[3]), None)?;
        let specs = (0u32..).zip(&self.object.caches);
        let shape = |(cache, spec): (u32, &CacheSpec)| {
            let values = shapes.get(&cache).map_or(0, |[heads, dim, v_heads, v_dim]| heads * dim + v_heads * v_dim);
            let values = values.div_ceil(pooled_by(spec));
            let state = memory::count(&memory::dims(spec));
            CacheShape { values, window: (spec.window > 0).then_some(spec.window as usize), state }
        };
        Ok(specs.map(shape).collect())
    }

    /// `forward` and `head` without numbers; gives the logits.
    pub(crate) fn dry(&self, tokens: Value, watch: Option<&Watch>) -> Result<(Value, CacheShapes)> {
        let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, DType::F32)?;
        let engine = Engine { watch, ..Engine::new(&self.object, &self.wanted, &[], &place) };
        let (logits, shapes) = engine.run(Vec::new(), tokens, |all| Ok(Some(all.clone())))?;
        Ok((logits.unwrap_or(Value::planned(&[])), shapes))
    }

    /// Parameters, by what the architecture asks for.
    pub fn parameters(&self) -> u64 {
        self.wanted
            .iter()
            .flat_map(Wanted::recipes)
            .map(|(_, dims)| dims.iter().fold(1, |n: u64, &d| n.saturating_mul(d as u64)))
            .fold(0, u64::saturating_add)
    }

    /// Bytes of weights in the files, scales included.
    pub fn weight_bytes(&self) -> u64 {
        self.pantry.checkpoint.total_bytes()
    }

    /// The checkpoint's tensors, by the names that plugins use.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.pantry.checkpoint
    }

    /// The float type that most of the checkpoint's numbers have, or are computed in.
    pub fn dtype(&self) -> DType {
        let stated =
            self.config.get("torch_dtype").or(self.config.get("dtype")).and_then(|v| v.as_str().map(str::to_owned));
        match stated.as_deref().map(|s| s.trim_start_matches("torch.")) {
            Some("bfloat16") => DType::BF16,
            Some("float16") => DType::F16,
            Some("float32") => DType::F32,
            _ => {
                let first =
                    self.pantry.checkpoint.iter().filter(|(_, t)| t.shape.len() > 1).find_map(|(_, t)| float(t.dtype));
                match first {
                    Some(crate::kernels::cpu::Float::F16) => DType::F16,
                    Some(crate::kernels::cpu::Float::F32) => DType::F32,
                    _ => DType::BF16,
                }
            }
        }
    }
}

impl Model {
    /// What the plugin's model offers under this name, if it does: see [`plugin_api::abi::extension`].
    pub fn extension<T: Extension>(&self) -> Option<T> {
        self.object.extension()
    }

    /// An empty memory for one sequence.
    pub fn state(&self, options: &CacheOptions) -> Result<State> {
        let mut state = State::new(&self.object.caches, &self.place, options)?;
        if let Some(followers) = &self.followers {
            state.others = followers.states(&self.object.caches, options)?;
        }
        Ok(state)
    }

    /// The width of a row of logits, as config.json states it; the architecture's head decides.
    pub fn vocab_size(&self) -> Option<usize> {
        self.config.get("vocab_size").and_then(|v| v.as_u64()).map(|v| v as usize)
    }

    /// Makes `state` a memory of as much of `prompt` as it can be, short of the last token, which must run to give logits: what it shares
    /// with the prompt stays, the rest is forgotten. Says how many tokens need not be read again.
    pub fn reuse(&self, state: &mut State, prompt: &[u32]) -> Result<usize> {
        let shared =
            state.tokens.iter().zip(prompt).take_while(|(a, b)| a == b).count().min(prompt.len().saturating_sub(1));
        let forget = state.offset - shared.min(state.offset);
        if state.tokens.len() != state.offset || !state.can_trim(forget) {
            *state = self.state(&state.options)?;
        } else {
            state.trim(forget)?;
        }
        Ok(state.offset)
    }

    /// One step for any number of sequences: their new tokens join their caches, and the wanted rows of logits come back, in f32, one
    /// list a sequence. If it fails, every cache is as it was before.
    pub fn step(&self, inputs: &mut [Input]) -> Result<Vec<Vec<Vec<f32>>>> {
        let mut ids = inputs.iter().flat_map(|i| i.tokens).peekable();
        if ids.peek().is_none() {
            return Ok(vec![Vec::new(); inputs.len()]);
        }
        self.knows(ids)?;
        match &self.followers {
            Some(followers) => followers.step(inputs, false, |inputs| self.step_alone(inputs)),
            None => self.step_alone(inputs),
        }
    }

    /// A step of this rank.
    fn step_alone(&self, inputs: &mut [Input]) -> Result<Vec<Vec<Vec<f32>>>> {
        #[cfg(feature = "cuda")]
        if let Some(crate::replay::Made::Logits(rows)) = self.replayed(inputs, false)? {
            return Ok(rows.into_iter().map(|row| vec![row]).collect());
        }
        let (mut ids, mut rows) = (Vec::new(), Vec::new());
        let (mut counts, mut replayed) = (Vec::with_capacity(inputs.len()), Vec::with_capacity(inputs.len()));
        for input in inputs.iter_mut() {
            let again = if input.tokens.is_empty() { Vec::new() } else { input.state.begin(input.tokens.len()) };
            ids.extend_from_slice(&again);
            ids.extend_from_slice(input.tokens);
            replayed.push(again);
            let wanted = match input.want {
                Want::Nothing => 0,
                Want::Last => input.tokens.len().min(1),
                Want::All => input.tokens.len(),
            };
            rows.extend((ids.len() - wanted..ids.len()).map(|r| r as u32));
            counts.push(wanted);
        }
        // A first step waits for nothing.
        if self.begun.swap(true, Ordering::Relaxed) && self.place.native {
            moving::some();
        }
        crate::kernels::cpu::begin_step();
        let logits = match self.played(inputs, &ids) {
            Ok(Some(logits)) => Ok(logits),
            Ok(None) => self.run(inputs, &replayed, ids, rows),
            Err(e) => Err(e.into()),
        };
        match logits {
            Ok(mut logits) => {
                for (input, again) in inputs.iter_mut().zip(&replayed).filter(|(input, _)| !input.tokens.is_empty()) {
                    input.state.finish(again, input.tokens)?;
                }
                Ok(counts.iter().map(|&n| logits.drain(..n).collect()).collect())
            }
            Err(e) => {
                for (input, again) in inputs.iter_mut().zip(&replayed).filter(|(input, _)| !input.tokens.is_empty()) {
                    input.state.undo(again);
                }
                Err(e)
            }
        }
    }

    /// The most likely next token of each sequence with its log-probability, after a step of one token each, where the device can choose it
    /// by itself; none, and nothing done, where it cannot: then [`Self::step`] gives the logits.
    pub fn choose(&self, inputs: &mut [Input]) -> Result<Option<Vec<(u32, f32)>>> {
        self.knows(inputs.iter().flat_map(|i| i.tokens))?;
        match self.followers.as_ref().filter(|_| !self.place.device.is_cpu()) {
            Some(followers) => followers.step(inputs, true, |inputs| self.choose_alone(inputs)),
            None => self.choose_alone(inputs),
        }
    }

    #[cfg_attr(not(feature = "cuda"), expect(clippy::unnecessary_wraps))]
    fn choose_alone(&self, #[allow(unused)] inputs: &mut [Input]) -> Result<Option<Vec<(u32, f32)>>> {
        #[cfg(feature = "cuda")]
        if let Some(crate::replay::Made::Chosen(chosen)) = self.replayed(inputs, true)? {
            return Ok(Some(chosen));
        }
        Ok(None)
    }

    /// Why this model's steps of one token run op by op, once it was tried to compile them or, on a GPU, to record them.
    pub fn not_replayed(&self) -> Option<String> {
        #[cfg(feature = "cuda")]
        if let Some(why) = self.replays.refused() {
            return Some(why);
        }
        self.compiled.refused()
    }

    fn knows<'i>(&self, mut ids: impl Iterator<Item = &'i u32>) -> Result<()> {
        match self.vocab_size().and_then(|v| Some((ids.find(|&&id| id as usize >= v)?, v))) {
            Some((id, vocab)) => Err(Error::Generate(format!(
                "token {id} is beyond the model's vocabulary of {vocab}: does the tokenizer belong to this model?"
            ))),
            None => Ok(()),
        }
    }

    fn run(&self, inputs: &mut [Input], replayed: &[Vec<u32>], ids: Vec<u32>, rows: Vec<u32>) -> Result<Vec<Vec<f32>>> {
        let mut start = 0;
        let mut parts = Vec::with_capacity(inputs.len());
        for (input, again) in inputs.iter_mut().zip(replayed) {
            let tokens = start..start + again.len() + input.tokens.len();
            start = tokens.end;
            if !tokens.is_empty() {
                parts.push(Part { state: &mut *input.state, tokens, replayed: again.len() });
            }
        }
        let count = ids.len();
        let tokens = Tensor::from_vec(ids, count, &self.place.device)?;
        let (watch, seat, places) = (self.watch.as_ref(), self.seat.as_ref(), self.places(&parts, count)?);
        let last_rows = self.last_rows(count, &rows);
        let engine = Engine { watch, seat, places, last_rows, ..self.engine() };
        let select = |hidden: &Value| match hidden {
            // A GPU does not choose nothing out of something.
            _ if rows.is_empty() => Ok(None),
            Value::Real(hidden) if rows.len() < hidden.dim(0)? => {
                let index = Tensor::from_vec(rows.clone(), rows.len(), &self.place.device)?;
                Ok(Some(Value::Real(hidden.index_select(&index, 0)?)))
            }
            all => Ok(Some(all.clone())),
        };
        match engine.run(parts, Value::Real(tokens), select)?.0 {
            Some(Value::Real(logits)) => Ok(logits.to_dtype(DType::F32)?.to_vec2::<f32>()?),
            _ => Ok(Vec::new()),
        }
    }
}
