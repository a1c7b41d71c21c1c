//! What a plugin takes it gives back: handles at the end of each call, memory with the model; and it takes nothing that is not its own.

use super::{
    Outcome, Stop,
    steps::{read, state, text},
    subject::Subject,
    synthetic::{Demand, Fill},
};
use crate::{
    model::Plan,
    ops::{value::Value, watch::Watch},
};

/// At the end of a call every tensor is released, once.
pub fn handles(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let mut model = subject.model(example)?;
        model.watch = Some(Watch::default());
        let mut state = state(&model, 16)?;
        for step in 0..4 {
            let tokens = text(&model, subject.job.seed ^ step, 3);
            read(&model, &mut state, &tokens)?;
            for trace in model.watch.as_ref().map(Watch::take).unwrap_or_default() {
                if trace.stale > 0 {
                    return Err(Stop::fail(format!(
                        "in a step of {} ops it released {} tensors that were not its own any more: dropped twice, or kept from an earlier step",
                        trace.ops.len(),
                        trace.stale
                    )));
                }
                if trace.left > 0 {
                    return Err(Stop::fail(format!(
                        "after a step of {} ops it still owns {} tensors: it forgot to release them",
                        trace.ops.len(),
                        trace.left
                    )));
                }
            }
        }
        Ok(String::new())
    })
}

/// Bytes that this process has from its allocator; `None` where nobody counts them.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn allocated() -> Option<usize> {
    // SAFETY: reads counters of the allocator.
    let info = unsafe { libc::mallinfo2() };
    Some(info.uordblks + info.hblkhd)
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn allocated() -> Option<usize> {
    None
}

/// Times that something is done between two looks at the memory, and such looks.
const TIMES: usize = 30;
const LOOKS: usize = 6;

/// No allocator gives less.
const LEAST: usize = 16;

/// How much each time leaves behind at least, when it has been done a few times. The allocator's own lists grow now and then; what is
/// really lost is lost each time.
fn growth(mut f: impl FnMut() -> Outcome<()>) -> Outcome<Option<usize>> {
    // The first times fill tables that stay.
    (0..8).try_for_each(|_| f())?;
    let mut least = usize::MAX;
    for _ in 0..LOOKS {
        let Some(before) = allocated() else { return Ok(None) };
        (0..TIMES).try_for_each(|_| f())?;
        least = least.min(allocated().unwrap_or(before).saturating_sub(before) / TIMES);
    }
    Ok(Some(if least < LEAST { 0 } else { least }))
}

fn judge(grown: Option<usize>, what: &str) -> Outcome {
    match grown {
        None => Err(Stop::Skip("this system's allocator does not tell how much is in use".into())),
        Some(0) => Ok(String::new()),
        Some(bytes) => Err(Stop::fail(format!("each {what} leaves {bytes} bytes behind"))),
    }
}

/// A model that is dropped leaves nothing.
pub fn memory_of_models(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let (library, config) = (subject.library()?, example.config()?);
        let checkpoint = Demand::learn(library, &config)?.checkpoint(Fill::Zeros, 0)?;
        let model = || -> Outcome<()> {
            drop(Plan::by(library, config.clone(), checkpoint.clone())?);
            Ok(())
        };
        judge(growth(model)?, "model, built and dropped,")
    })
}

/// A step leaves nothing.
pub fn memory_of_steps(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let plan = subject.plan(example, Fill::Zeros)?;
        let step = || -> Outcome<()> {
            plan.dry(Value::planned(&[3]), None)?;
            Ok(())
        };
        judge(growth(step)?, "step")
    })
}

/// Entries of a folder of this process' facts, where the system has such; links by what they lead to.
fn facts(folder: &str) -> Option<Vec<String>> {
    let entries = std::fs::read_dir(format!("/proc/self/{folder}")).ok()?;
    let told = |path: std::path::PathBuf| {
        let number = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match (std::fs::read_link(&path), std::fs::read_to_string(path.join("comm"))) {
            // This folder itself is open while it is read.
            (Ok(to), _) => (!to.starts_with("/proc")).then(|| format!("{} ({number})", to.display())),
            (_, Ok(name)) => Some(format!("{} ({number})", name.trim())),
            _ => Some(number),
        }
    };
    Some(entries.flatten().filter_map(|entry| told(entry.path())).collect())
}

fn unchanged(subject: &Subject, folder: &str, what: &str) -> Outcome {
    if facts(folder).is_none() {
        return Err(Stop::Skip("this system has no /proc to tell".into()));
    }
    subject.library()?;
    // The host's own threads come with its first step.
    rayon::scope(|_| {});
    crate::kernels::cpu::start_threads();
    subject.each(|example| {
        let before = facts(folder).unwrap_or_default();
        let model = subject.model(example)?;
        let mut state = state(&model, 8)?;
        for step in 0..3 {
            let tokens = text(&model, subject.job.seed ^ step, 2);
            read(&model, &mut state, &tokens)?;
        }
        let now = facts(folder).unwrap_or_default();
        match now.iter().filter(|one| !before.contains(one)).collect::<Vec<_>>().as_slice() {
            [] => Ok(String::new()),
            new => Err(Stop::fail(format!("a model and three steps left {} {what}: {}", new.len(), new[0]))),
        }
    })
}

/// No file is left open.
pub fn files(subject: &Subject) -> Outcome {
    unchanged(subject, "fd", "open files")
}

/// No thread is left running.
pub fn no_threads(subject: &Subject) -> Outcome {
    unchanged(subject, "task", "threads")
}

/// Nothing is written to the terminal; who started this process looks at what came.
pub fn silent(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let mut state = state(&model, 8)?;
        read(&model, &mut state, &text(&model, subject.job.seed, 3))?;
        Ok(String::new())
    })
}
