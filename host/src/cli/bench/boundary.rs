//! What the plugin boundary costs: opening a plugin, and one call through the op table.
//!
//! What each may cost stands beside it. A library stays open once it was opened, so each load is measured on a copy of its own, and the
//! listing on a folder of copies, as what `dylm plugins` does between start and print. Op calls go through the very function
//! pointers that a plugin is given, on tensors that have a shape and no numbers: what remains is the call itself, the handle's look-up,
//! the shape check and a new handle.

use super::{
    super::{
        Done, plugins,
        printing::{Paint, json, line},
    },
    median,
};
use crate::{
    device::{DeviceChoice, DtypeChoice, Placement},
    error::{Error, Result},
    load::LoadOptions,
    ops::{lending::Call, running::Running, table, value::Value},
    plugin::{
        file::PluginFile,
        library::Library,
        note::Note,
        registry::{Found, Registry},
        trust::Trust,
    },
};
use candle_core::DType;
use plugin_api::abi::{At, Handle};
use serde_json::json;
use std::{
    cell::RefCell,
    collections::BTreeMap,
    hint::black_box,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

const LOADS: usize = 50;
const LISTINGS: usize = 11;
/// Calls of a round: short enough that the system interrupts few rounds, so that the median is of those that it did not.
const CALLS: usize = 2_000;
const ROUNDS: usize = 501;
/// Files of the listing that is measured.
const FILES: usize = 120;

/// Milliseconds from a plugin's path to its checked factory, its note included.
const LOAD_MS: f64 = 1.0;
/// Nanoseconds of an op call.
const OP_NS: f64 = 60.0;
/// Milliseconds to list the files.
const LIST_MS: f64 = 50.0;

/// Loads copies of the plugin that serves `model_type`, lists more of them, calls ops, and prints medians.
pub fn measure(model_type: &str, options: &LoadOptions, as_json: bool) -> Done {
    let found = Registry::new(&options.plugins).trusting(options.trust.clone()).resolve(model_type)?;
    // The copies are opened without a question, so the original must have been agreed to.
    Library::open(&found)?;
    let Loads { note_ms, open_ms, hash_ms } = loads(&found.path)?;
    let (load_ms, list_ms, ops) = (note_ms + open_ms, listing(&found.path)?, calls()?);
    let bytes = std::fs::metadata(&found.path).map_err(Error::io(&found.path))?.len();
    if as_json {
        let ops: BTreeMap<_, _> = ops.into_iter().collect();
        let budget = json!({ "load_ms": LOAD_MS, "op_ns": OP_NS, "list_ms": LIST_MS });
        json(&json!({
            "plugin": found.path, "bytes": bytes, "note_ms": note_ms, "open_ms": open_ms, "load_ms": load_ms, "hash_ms": hash_ms,
            "list_ms": list_ms, "op_ns": ops, "budget": budget,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let row = |what: &str, is: f64, unit: &str, may: Option<f64>| {
        let verdict = match may {
            Some(may) if is > may => format!("  {} of {may:.0} {unit}", Paint::Red.out("over the budget")),
            Some(may) => format!("  of {may:.0} {unit}"),
            None => String::new(),
        };
        let digits = if unit == "ns" { 1 } else { 3 };
        line(format_args!("  {what:<28} {is:>8.digits$} {unit}{verdict}"))
    };
    line(format_args!("{}: {bytes} bytes", found.path.display()))?;
    row("read the note", note_ms, "ms", None)?;
    row("open and check", open_ms, "ms", None)?;
    row("load: both together", load_ms, "ms", Some(LOAD_MS))?;
    row("hash, if not dylm's own", hash_ms, "ms", None)?;
    row(&format!("list {FILES} plugins"), list_ms, "ms", Some(LIST_MS))?;
    for (op, ns) in ops {
        row(op, ns, "ns", Some(OP_NS))?;
    }
    line(format_args!(
        "Medians of {LOADS} loads, each of a fresh copy, of {LISTINGS} listings, and of {ROUNDS} rounds of {CALLS} calls."
    ))?;
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds of a load's parts: to read the note; to open the library and check its layout; to hash its bytes, where that is needed.
struct Loads {
    note_ms: f64,
    open_ms: f64,
    hash_ms: f64,
}

fn loads(plugin: &Path) -> Result<Loads> {
    let folder = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
    let (mut notes, mut opens, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
    for path in copies(plugin, folder.path(), LOADS)? {
        let (note, ms) = timed(|| Note::read(&path));
        notes.push(ms);
        let (hash, ms) = timed(|| PluginFile::open(&path)?.sha256());
        hashes.push(ms);
        black_box(hash?);
        let found = Found { path, note: note?, trust: Trust::All };
        let (library, ms) = timed(|| Library::open(&found));
        opens.push(ms);
        black_box(library?);
    }
    Ok(Loads { note_ms: median(notes), open_ms: median(opens), hash_ms: median(hashes) })
}

/// Milliseconds to judge a folder of plugins, without the user's list of those that are trusted.
fn listing(plugin: &Path) -> Result<f64> {
    let folder = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
    copies(plugin, folder.path(), FILES)?;
    let registry = Registry::of_folder(folder.path());
    Ok(median((0..LISTINGS).map(|_| timed(|| black_box(plugins::list(&registry))).1).collect()))
}

fn copies(plugin: &Path, folder: &Path, count: usize) -> Result<Vec<PathBuf>> {
    let copy = |number: usize| {
        let path = folder.join(format!("{}{number}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX));
        std::fs::copy(plugin, &path).map_err(Error::io(&path)).map(|_| path)
    };
    (0..count).map(copy).collect()
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, f64) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed().as_secs_f64() * 1e3)
}

/// Nanoseconds of single ops.
fn calls() -> Result<Vec<(&'static str, f64)>> {
    let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, DType::F32)?;
    let running = Running::new(&[], &[], &[], &place, Vec::new(), 0);
    let call = Call::Running(RefCell::new(running));
    let Call::Running(cell) = &call else { unreachable!("made as Running above") };
    let x = cell.borrow_mut().arena.put(Value::planned(&[1, 64]));
    let (host, at) = (table::host(), At::caller());
    let ops = black_box(host.ops);
    Ok(call.lend(|ctx| {
        let made = |make: &dyn Fn() -> Handle| time(|| (ops.release())(ctx, make(), at));
        let release = time(|| (ops.release())(ctx, (ops.retain())(ctx, x, at), at)) / 2.0;
        vec![
            ("retain or release", release),
            // Each of these makes a tensor that has to be released again.
            ("narrow", made(&|| (ops.narrow())(ctx, x, 0, 32, at)) - release),
            ("add", made(&|| (ops.add())(ctx, x, x, at)) - release),
            ("split_heads", made(&|| (ops.split_heads())(ctx, x, 16, at)) - release),
        ]
    }))
}

fn time(mut call: impl FnMut()) -> f64 {
    let mut round = || {
        let start = Instant::now();
        (0..CALLS).for_each(|_| call());
        start.elapsed().as_secs_f64() * 1e9 / CALLS as f64
    };
    median((0..ROUNDS).map(|_| round()).collect())
}
