//! What a plugin asks for: the same each time, and every difference to what is there told by the tensor's name.

use super::{
    Outcome, Stop,
    subject::{Example, Subject},
    synthetic::{Demand, Fill},
};
use crate::{
    model::Plan,
    weights::{Dtype, Stored, checkpoint::Checkpoint},
};
use std::{path::Path, sync::Arc};

/// Two models of one configuration ask for the same.
pub fn same_twice(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let (first, second) = (subject.plan(example, Fill::Zeros)?, subject.plan(example, Fill::Zeros)?);
        let told = |plan: &Plan| plan.wanted.iter().map(|slot| format!("{slot:?}")).collect::<Vec<_>>();
        let (one, two) = (told(&first), told(&second));
        match one.iter().zip(&two).find(|(a, b)| a != b) {
            Some((a, b)) => Err(Stop::fail(format!("the second model asks for {b} where the first asked for {a}"))),
            None if one.len() != two.len() => {
                Err(Stop::fail(format!("the first model has {} layers, the second {}", one.len(), two.len())))
            }
            None => Ok(format!("{} layers", one.len())),
        }
    })
}

/// Tensors to try: the first, the last, and some between.
fn some(names: &[String]) -> Vec<&String> {
    let step = (names.len() / 8).max(1);
    names.iter().step_by(step).chain(names.last()).collect()
}

fn report(subject: &Subject, example: &Example, checkpoint: Checkpoint) -> Outcome<crate::weights::plan::Report> {
    Ok(Plan::by(subject.library()?, example.config()?, checkpoint)?.report)
}

fn zeros(shape: Vec<usize>) -> Outcome<Stored> {
    let file: Arc<Path> = Path::new("synthetic").into();
    let count = shape.iter().product::<usize>();
    Ok(Stored::new(Dtype::F32, shape, vec![0; 4 * count].into(), file)?)
}

/// A tensor that is not there is missed by its name; or the plugin does without it and says nothing.
pub fn missing(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let demand = Demand::learn(subject.library()?, &example.config()?)?;
        let names: Vec<String> = demand.names().map(str::to_owned).collect();
        let mut missed = 0;
        for name in some(&names) {
            subject.at(format!("{}: without {name}", example.name));
            let mut checkpoint = demand.checkpoint(Fill::Zeros, 0)?;
            checkpoint.remove(name);
            let report = report(subject, example, checkpoint).map_err(|stop| stop.of(format!("without {name}")))?;
            // Another layout may do without it, and then misses other tensors, or finds these unused.
            match report.agrees() || report.missing.contains(name) || !report.unused.is_empty() {
                true => missed += usize::from(!report.agrees()),
                false => return Err(Stop::fail(format!("without {name}: it is not what is reported, but: {report}"))),
            }
        }
        match missed {
            0 => Err(Stop::fail("no tensor is missed, whichever is taken away")),
            n => Ok(format!("{n} of {} missed", some(&names).len())),
        }
    })
}

/// A tensor of another shape is reported by its name.
pub fn misshapen(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let demand = Demand::learn(subject.library()?, &example.config()?)?;
        let names: Vec<String> = demand.names().map(str::to_owned).collect();
        for name in some(&names) {
            subject.at(format!("{}: {name} of another shape", example.name));
            let mut checkpoint = demand.checkpoint(Fill::Zeros, 0)?;
            // All experts of a layer are one stack: there it is the neighbours that are named.
            let mut shape = checkpoint.remove(name).map(|stored| stored.shape).unwrap_or_default();
            // Of more rows, a plugin may well take those that it knows; fewer are too few for anybody.
            shape.iter_mut().for_each(|dim| *dim = if *dim > 1 { *dim - 1 } else { 2 });
            checkpoint.insert(name.clone(), zeros(shape.clone())?)?;
            let what = format!("{name} has another shape");
            let report = report(subject, example, checkpoint).map_err(|stop| stop.of(&what))?;
            let text = format!("{report}");
            let told = text.contains(name.as_str()) || text.contains(&format!("{shape:?}"));
            if report.agrees() || !told && report.unused.is_empty() && report.missing.is_empty() {
                return Err(Stop::fail(format!("{what}, and {report}")));
            }
        }
        Ok(String::new())
    })
}

/// What the plugin asks for is all that there is; what is there beside it is reported.
pub fn nothing_unused(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let demand = Demand::learn(subject.library()?, &example.config()?)?;
        let mut checkpoint = demand.checkpoint(Fill::Zeros, 0)?;
        let stranger = "a.tensor.that.no.architecture.has";
        checkpoint.insert(stranger, zeros(vec![3])?)?;
        match report(subject, example, checkpoint)?.unused.as_slice() {
            [only] if only == stranger => Ok(format!("{} tensors", demand.names().count())),
            [] => Err(Stop::fail(
                "a tensor that the architecture cannot know counts as used: what it ignores is too much",
            )),
            others => {
                Err(Stop::fail(format!("of the tensors that it asks for, it leaves unused {}", others.join(", "))))
            }
        }
    })
}
