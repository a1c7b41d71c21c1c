//! The ABI's promises that no model shows: what a plugin answers to names that it does not know, and to hosts of other times.

use super::{
    Outcome, Stop,
    steps::{BOUND, near, text, whole},
    subject::Subject,
    synthetic::Fill,
};
use crate::{
    ops::{building::Building, lending::Call, table},
    plugin::library::{Tables, play_host},
    weights::{checkpoint::Checkpoint, recipe::Pantry},
};
use abi_stable::StableAbi;
use plugin_api::abi::{
    ops::TensorOpsRef,
    root::{ERROR_ABI, FactoryRef, Host},
};
use std::cell::RefCell;

/// Names that nobody has given to anything.
const UNKNOWN: [&str; 6] = ["", "no.such.extension/1", "examples/4294967295", "examples/", "\0", "…/1"];

/// Null for a name that it does not know.
pub fn unknown_extension(subject: &Subject) -> Outcome {
    let (library, long) = (subject.library()?, "x".repeat(1 << 20));
    match UNKNOWN.iter().chain([&long.as_str()]).find(|id| !library.answer(id).is_null()) {
        Some(id) => Err(Stop::fail(format!("it claims to know the extension {:?}", id.get(..40).unwrap_or(id)))),
        None => Ok(String::new()),
    }
}

/// The same of its models.
pub fn unknown_model_extension(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let plan = subject.plan(example, Fill::Zeros)?;
        match UNKNOWN.iter().find(|id| !plan.object.answer(id).is_null()) {
            Some(id) => Err(Stop::fail(format!("its model claims to know the extension {id:?}"))),
            None => Ok(String::new()),
        }
    })
}

/// A host that lacks ops is refused with a sentence.
pub fn poorer_host(subject: &Subject) -> Outcome {
    let library = subject.library()?;
    if library.is_in_c() {
        return Err(Stop::Skip("a plugin in C asks the table's size at each call".into()));
    }
    let pantry = Pantry { checkpoint: Checkpoint::default(), quantization: None };
    for layout in [<TensorOpsRef as StableAbi>::LAYOUT, <FactoryRef as StableAbi>::LAYOUT] {
        let host = Host { layout, ..table::host() };
        let json = serde_json::json!({});
        let call = Call::Building(RefCell::new(Building::new(&pantry, &json)));
        match library.meet(&host, &call, "{}") {
            Ok(()) => {
                return Err(Stop::fail("it builds a model for a host whose op table is not the one that it knows"));
            }
            Err(e) if e.code != ERROR_ABI => {
                return Err(Stop::fail(format!(
                    "to a host with another op table it says {:?}, with code {} where ERROR_ABI = {ERROR_ABI} belongs",
                    e.message.as_str(),
                    e.code
                )));
            }
            Err(e) => super::config::one_sentence(&e.message)?,
        }
    }
    Ok(String::new())
}

/// A host of ABI 1.0 is enough for whoever says no more.
pub fn oldest_host(subject: &Subject) -> Outcome {
    let needs = subject.note()?.needs;
    if !needs.is_empty() {
        return Err(Stop::Skip(format!("it needs ops that came later: {}", needs.join(", "))));
    }
    with_tables(subject, Tables::Oldest, "with a dylm of ABI 1.0, which its note says is enough")
}

/// A host with more ops than the plugin knows makes no difference.
pub fn newer_host(subject: &Subject) -> Outcome {
    with_tables(subject, Tables::Newer, "with a later dylm, whose op table is longer")
}

/// Whether a host with these tables gives what this one gives.
fn with_tables(subject: &Subject, tables: Tables, what: &str) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let text = text(&model, subject.job.seed, 5);
        let today = whole(&model, &text)?;
        play_host(tables);
        let then = subject.model(example).and_then(|model| whole(&model, &text));
        play_host(Tables::Today);
        near(what, &then.map_err(|stop| stop.of(what))?, &today, BOUND)?;
        Ok(String::new())
    })
}
