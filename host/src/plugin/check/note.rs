//! The note: what the file says of itself before anybody runs it.

use super::{Outcome, Stop, subject::Subject};
use crate::{
    config::is_model_type,
    plugin::{note::Note, registry::file_stem},
};
use plugin_api::abi;
use std::collections::BTreeSet;

/// It is there and can be read.
pub fn present(subject: &Subject) -> Outcome {
    let note = subject.note()?;
    Ok(format!("{} {}", note.name, note.version))
}

/// Names that a model can ask for, each once.
pub fn names(subject: &Subject) -> Outcome {
    let Note { model_types, name, .. } = subject.note()?;
    if model_types.is_empty() {
        return Err(Stop::fail("it serves no model_type"));
    }
    if let Some(bad) = model_types.iter().find(|t| !is_model_type(t)) {
        return Err(Stop::fail(format!(
            "{bad:?} is no model_type: letters, digits, _ - and . may stand in it, 64 of them"
        )));
    }
    let mut seen = BTreeSet::new();
    if let Some(twice) = model_types.iter().find(|t| !seen.insert(t.as_str())) {
        return Err(Stop::fail(format!("it serves {twice:?} twice")));
    }
    if name.trim().is_empty() {
        return Err(Stop::fail("it has no name"));
    }
    Ok(model_types.join(", "))
}

/// What a user needs to know before trusting it: version, licence, compiler, target.
pub fn origin(subject: &Subject) -> Outcome {
    let Note { version, license, rustc, target, .. } = subject.note()?;
    let numbers: Vec<_> = version.split(['-', '+']).next().unwrap_or_default().split('.').collect();
    if numbers.len() != 3 || numbers.iter().any(|n| n.parse::<u64>().is_err()) {
        return Err(Stop::fail(format!("its version {version:?} is not of the form 1.2.3")));
    }
    if license.trim().is_empty() {
        return Err(Stop::fail("it states no licence"));
    }
    Ok([license, rustc, target].join(", "))
}

/// An ABI that this dylm speaks, and ops that it has.
pub fn abi(subject: &Subject) -> Outcome {
    let note = subject.note()?;
    if let Some(op) = note.needs.iter().find(|op| !abi::ops::NAMES.contains(&op.as_str())) {
        return Err(Stop::fail(format!("it needs the op {op}, which this dylm does not have")));
    }
    let numbers: Vec<_> = note.abi.split('.').map(str::parse::<u32>).collect();
    match numbers.as_slice() {
        [Ok(abi::MAJOR), Ok(_)] => Ok(format!("ABI {}", note.abi)),
        _ => Err(Stop::fail(format!("it speaks ABI {:?}, this dylm speaks {}.{}", note.abi, abi::MAJOR, abi::MINOR))),
    }
}

/// Panics must unwind, to be caught.
pub fn panic(subject: &Subject) -> Outcome {
    match subject.note()?.panic.as_str() {
        "unwind" => Ok("unwind".into()),
        "none" if subject.library()?.is_in_c() => Ok("none: plain C".into()),
        other => Err(Stop::fail(format!("it says {other:?}, so its first panic would end dylm"))),
    }
}

/// The file is called after what it serves.
pub fn file_name(subject: &Subject) -> Outcome {
    let note = subject.note()?;
    let stem = subject.job.plugin.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let stem = stem.strip_prefix(std::env::consts::DLL_PREFIX).unwrap_or(stem);
    // Or after the family, whose members' names begin so.
    if !stem.is_empty() && note.model_types.iter().any(|t| file_stem(t).starts_with(stem)) {
        return Ok(stem.to_owned());
    }
    let first = note.model_types.first().map(|t| file_stem(t)).unwrap_or_default();
    Err(Stop::fail(format!(
        "the file is called {stem:?}, but serves no such model_type; {first:?} would tell what it is"
    )))
}
