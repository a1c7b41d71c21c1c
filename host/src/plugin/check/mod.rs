//! `dylm check`: what a plugin promises, tried out. `catalog` names the tests and says what to mend; `subject` is the plugin under test,
//! with the models that `synthetic` makes for it; the rest are the tests, a file a group. Each test runs in a process of its own
//! ([`super::sandbox`]), so that whatever a plugin does to itself becomes a verdict.

mod abi;
mod build;
mod caches;
pub mod catalog;
mod config;
mod errors;
mod file;
mod note;
mod numerics;
mod resources;
mod shapes;
mod steps;
pub mod subject;
mod synthetic;
mod threads;

/// Why a test gave no pass.
#[derive(Debug)]
pub enum Stop {
    /// The plugin does not keep the promise: one sentence.
    Fail(String),
    /// There is nothing to try here: why.
    Skip(String),
}

/// What a test says: by a pass, what it saw, or nothing.
pub type Outcome<T = String> = std::result::Result<T, Stop>;

/// The weights that a plugin asks for where there are none, made up from `seed`, in f32.
pub(crate) fn made_up_weights(
    library: &crate::plugin::library::Library,
    config: &crate::config::Config,
    seed: u64,
) -> crate::Result<crate::weights::checkpoint::Checkpoint> {
    let made = synthetic::Demand::learn(library, config);
    let made = made.and_then(|demand| demand.checkpoint(synthetic::Fill::Numbers, seed));
    made.map_err(|(Stop::Fail(why) | Stop::Skip(why))| crate::Error::plugin(why))
}

impl From<crate::Error> for Stop {
    fn from(e: crate::Error) -> Self {
        Stop::Fail(e.to_string())
    }
}

impl Stop {
    fn fail(text: impl Into<String>) -> Self {
        Stop::Fail(text.into())
    }

    /// The same, said of something: of an example, of a change to it.
    fn of(self, what: impl std::fmt::Display) -> Self {
        match self {
            Stop::Fail(why) => Stop::Fail(format!("{what}: {why}")),
            skip => skip,
        }
    }
}
