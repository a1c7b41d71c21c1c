//! The plugin under test, as one test sees it in its own process: the file, its note, the library once it is open, and the configurations
//! to build models from.

use super::{
    Outcome, Stop,
    synthetic::{Demand, Fill},
};
use crate::{
    adapter::Adapters,
    config::Config,
    device::{DeviceChoice, DtypeChoice, Placement},
    error::{Error, Result},
    model::{Model, Plan},
    plugin::{library::Library, note::Note, registry::Found, trust::Trust},
};
use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    cell::{OnceCell, RefCell},
    fs::File,
    io::Write,
    path::PathBuf,
};

/// What a test is to be run with; travels to its process as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// The test's name.
    pub test: String,
    /// The plugin's file, absolute.
    pub plugin: PathBuf,
    /// Configurations beside those that the plugin carries.
    pub configs: Vec<PathBuf>,
    /// What all that is random comes from.
    pub seed: u64,
    /// Random changes that config-fuzz makes to each configuration.
    pub cases: usize,
    /// Bytes that the test's process may ask for.
    pub memory: u64,
    /// Logits of another program.
    pub reference: Option<PathBuf>,
    /// The model that they are of.
    pub model: Option<String>,
}

/// A configuration to build a model from.
#[derive(Clone, Debug)]
pub struct Example {
    /// What to call it in messages.
    pub name: String,
    /// config.json, as it was written.
    pub json: Value,
}

/// The plugin, in the process of one test.
pub struct Subject {
    /// What is asked.
    pub job: Job,
    library: OnceCell<Library>,
    place: RefCell<File>,
}

impl Subject {
    /// `place` takes down what is being tried, for when the process does not live to tell.
    pub fn new(job: Job, place: File) -> Self {
        Subject { job, library: OnceCell::new(), place: RefCell::new(place) }
    }

    /// Takes down what is tried next.
    pub fn at(&self, what: impl std::fmt::Display) {
        // A full disk costs no more than this line of a message.
        let _ = writeln!(self.place.borrow_mut(), "{what}");
    }

    /// What the file says of itself.
    pub fn note(&self) -> Result<Note> {
        Note::read(&self.job.plugin)
    }

    /// The plugin, opened.
    pub fn library(&self) -> Result<&Library> {
        if let Some(library) = self.library.get() {
            return Ok(library);
        }
        // Whoever named the file wants it run: the command has seen to that.
        let found = Found { path: self.job.plugin.clone(), note: self.note()?, trust: Trust::All };
        let library = Library::open(&found)?;
        Ok(self.library.get_or_init(|| library))
    }

    /// The configurations that the plugin carries, then those of `--config`.
    pub fn examples(&self) -> Outcome<Vec<Example>> {
        let mut examples = Vec::new();
        for (index, text) in self.library()?.examples().into_iter().enumerate() {
            let name = format!("example {}", index + 1);
            let json = serde_json::from_str(&text).map_err(|e| Stop::fail(format!("{name}: no JSON: {e}")))?;
            examples.push(Example { name, json });
        }
        for path in &self.job.configs {
            let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
            let json = serde_json::from_str(&text).map_err(|e| Stop::fail(format!("{}: {e}", path.display())))?;
            examples.push(Example { name: path.display().to_string(), json });
        }
        match examples.is_empty() {
            true => Err(Stop::fail(
                "the plugin carries no example; write export_plugin!(.., examples = [\"config.json\"]), or name one with --config",
            )),
            false => Ok(examples),
        }
    }

    /// Tries `f` with each example; the last one's word is that of all.
    pub fn each<T>(&self, mut f: impl FnMut(&Example) -> Outcome<T>) -> Outcome<T> {
        let mut said = None;
        let examples = self.examples()?;
        for example in &examples {
            self.at(&example.name);
            said = Some(f(example).map_err(|stop| if examples.len() > 1 { stop.of(&example.name) } else { stop })?);
        }
        said.ok_or_else(|| Stop::fail("there is no example"))
    }

    /// The model of an example with numbers for weights, described and not yet read.
    pub fn plan(&self, example: &Example, fill: Fill) -> Outcome<Plan> {
        self.plan_with(example, fill, |_| {})
    }

    /// The same with changes to the configuration that leave the names and shapes of tensors alone.
    pub fn plan_with(&self, example: &Example, fill: Fill, change: impl FnOnce(&mut Value)) -> Outcome<Plan> {
        let library = self.library()?;
        let demand = Demand::learn(library, &example.config()?)?;
        let mut json = example.json.clone();
        change(&mut json);
        let config = Example { name: example.name.clone(), json }.config()?;
        Ok(Plan::by(library, config, demand.checkpoint(fill, self.job.seed)?)?)
    }

    /// The model of an example, ready to run on the CPU in f32.
    pub fn model(&self, example: &Example) -> Outcome<Model> {
        load(self.plan(example, Fill::Numbers)?)
    }
}

/// Reads a plan's weights, on the CPU in f32.
pub fn load(plan: Plan) -> Outcome<Model> {
    load_on(plan, DeviceChoice::Cpu)
}

/// The same on another device.
pub fn load_on(plan: Plan, device: DeviceChoice) -> Outcome<Model> {
    let place = Placement::new(device, DtypeChoice::Float32, DType::F32)?;
    Ok(plan.load(place, &Adapters::default(), &|_, _| {})?)
}

impl Example {
    /// As host and plugin read it.
    pub fn config(&self) -> Result<Config> {
        Config::from_json(self.json.clone(), &[], &self.name)
    }
}
