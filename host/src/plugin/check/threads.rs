//! Threads: models are built on any, run on one at a time, dropped on any; ops belong to the thread of the call.

use super::{
    Outcome, Stop,
    steps::{BOUND, near, text, whole},
    subject::{Example, Subject},
    synthetic::Fill,
};
use crate::{model::Model, ops::lending::stray_calls, plugin::check::subject::load};
use std::thread;

const TOKENS: usize = 9;

/// Joins a thread whose panics are the host's.
fn joined<T>(handle: thread::ScopedJoinHandle<'_, Outcome<T>>) -> Outcome<T> {
    handle.join().unwrap_or_else(|_| Err(Stop::fail("the thread of the host panicked")))
}

fn expected(subject: &Subject, example: &Example) -> Outcome<(Model, Vec<u32>, Vec<Vec<f32>>)> {
    let model = subject.model(example)?;
    let text = text(&model, subject.job.seed, TOKENS);
    let rows = whole(&model, &text)?;
    Ok((model, text, rows))
}

/// Several models at once, each on its own thread.
pub fn at_once(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let (_, text, expected) = expected(subject, example)?;
        let mut plans = Vec::new();
        for _ in 0..4 {
            plans.push(subject.plan(example, Fill::Numbers)?);
        }
        let rows = thread::scope(|scope| {
            let run = |plan| {
                let text = &text;
                scope.spawn(move || {
                    let model = load(plan)?;
                    (0..3).map(|_| whole(&model, text)).collect::<Outcome<Vec<_>>>()
                })
            };
            let handles: Vec<_> = plans.into_iter().map(run).collect();
            handles.into_iter().map(joined).collect::<Outcome<Vec<_>>>()
        })?;
        for rows in rows.iter().flatten() {
            near("with other models running beside it", rows, &expected, BOUND)?;
        }
        Ok(String::new())
    })
}

/// Built while other models are being built.
pub fn built_at_once(subject: &Subject) -> Outcome {
    let library = subject.library()?;
    subject.each(|example| {
        let demand = super::synthetic::Demand::learn(library, &example.config()?)?;
        let reports = thread::scope(|scope| {
            let build = |_| {
                let demand = &demand;
                scope.spawn(move || {
                    let mut agree = true;
                    for _ in 0..5 {
                        let checkpoint = demand.checkpoint(Fill::Zeros, 0)?;
                        agree &= crate::model::Plan::by(library, example.config()?, checkpoint)?.report.agrees();
                    }
                    Ok(agree)
                })
            };
            let handles: Vec<_> = (0..4).map(build).collect();
            handles.into_iter().map(joined).collect::<Outcome<Vec<bool>>>()
        })?;
        match reports.iter().all(|agrees| *agrees) {
            true => Ok(String::new()),
            false => Err(Stop::fail("built on several threads at once, it asks for other tensors than alone")),
        }
    })
}

/// Built on one thread, run on others in turn, dropped on another.
pub fn handed_over(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let (model, text, expected) = expected(subject, example)?;
        let mut model = Some(model);
        for _ in 0..3 {
            let here = model.take();
            let text = &text;
            let (back, rows) = thread::scope(|scope| {
                joined(scope.spawn(move || {
                    let model = here.ok_or_else(|| Stop::fail("no model"))?;
                    let rows = whole(&model, text)?;
                    Ok((model, rows))
                }))
            })?;
            near("on another thread", &rows, &expected, BOUND)?;
            model = Some(back);
        }
        thread::scope(|scope| {
            joined(scope.spawn(move || {
                drop(model);
                Ok(())
            }))
        })?;
        Ok(String::new())
    })
}

/// No op is called from a thread that the call does not run on, nor after the call.
pub fn ops_stay(subject: &Subject) -> Outcome {
    let before = stray_calls();
    let run = subject.each(|example| expected(subject, example).map(|_| ()));
    let stray = stray_calls() - before;
    let panic = subject.library()?.take_panic().unwrap_or_default();
    if stray > 0 {
        return Err(Stop::fail(format!(
            "{stray} ops were called on another thread than that of the call, or after it"
        )));
    }
    if panic.contains("on another thread") {
        return Err(Stop::fail(panic));
    }
    run.map(|()| String::new())
}
