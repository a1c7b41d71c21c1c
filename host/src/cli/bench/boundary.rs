//! What the plugin boundary costs: opening a plugin, and one call through the op table.
//!
//! A library stays open once it was opened, so each load is measured on a copy of its own. Op calls go through the very function
//! pointers that a plugin is given, on tensors that have a shape and no numbers: what remains is the call itself, the handle's look-up,
//! the shape check and a new handle.

use super::{
    super::{
        Done,
        printing::{json, line},
    },
    median,
};
use crate::{
    device::{DeviceChoice, DtypeChoice, Placement},
    error::{Error, Result},
    ops::{
        arena::Arena,
        running::Running,
        table::{self, Call},
        value::Value,
    },
    plugin::{
        library::Library,
        note::Note,
        registry::{Found, Registry},
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
const CALLS: usize = 100_000;
const ROUNDS: usize = 11;

/// Loads copies of the plugin that serves `model_type`, calls ops, and prints medians.
pub fn measure(model_type: &str, folders: &[PathBuf], as_json: bool) -> Done {
    let found = Registry::new(folders).resolve(model_type)?;
    let (note_ms, open_ms) = loads(&found.path)?;
    let ops = calls()?;
    let bytes = std::fs::metadata(&found.path).map_err(Error::io(&found.path))?.len();
    if as_json {
        let ops: BTreeMap<_, _> = ops.into_iter().collect();
        json(&json!({ "plugin": found.path, "bytes": bytes, "note_ms": note_ms, "open_ms": open_ms, "op_ns": ops }))?;
        return Ok(ExitCode::SUCCESS);
    }
    line(format_args!("{}: {bytes} bytes", found.path.display()))?;
    line(format_args!("  read the note        {note_ms:.3} ms"))?;
    line(format_args!("  open and check       {open_ms:.3} ms"))?;
    for (op, ns) in ops {
        line(format_args!("  {op:<20} {ns:.1} ns a call"))?;
    }
    line(format_args!("Medians of {LOADS} loads, each of a fresh copy, and of {ROUNDS} rounds of {CALLS} calls."))?;
    Ok(ExitCode::SUCCESS)
}

/// Milliseconds to read the note, and to open the library and check its layout.
fn loads(plugin: &Path) -> Result<(f64, f64)> {
    let folder = tempfile::tempdir().map_err(Error::io("a temporary folder"))?;
    let (mut notes, mut opens) = (Vec::new(), Vec::new());
    for copy in 0..LOADS {
        let path =
            folder.path().join(format!("{}{copy}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX));
        std::fs::copy(plugin, &path).map_err(Error::io(&path))?;
        let start = Instant::now();
        let note = Note::read(&path)?;
        notes.push(start.elapsed().as_secs_f64() * 1e3);
        let start = Instant::now();
        black_box(Library::open(&Found { path, note })?);
        opens.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok((median(notes), median(opens)))
}

/// Nanoseconds of single ops.
fn calls() -> Result<Vec<(&'static str, f64)>> {
    let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, DType::F32)?;
    let running = Running {
        arena: Arena::default(),
        wanted: &[],
        layers: &[],
        place: &place,
        parts: Vec::new(),
        tokens: 0,
        caches: &[],
        fed: Vec::new(),
        misuse: None,
        angles: Default::default(),
        shapes: BTreeMap::new(),
        ops: None,
    };
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
