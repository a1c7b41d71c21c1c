//! The model on shapes, and the replay contract: a step's ops follow from its count of tokens alone.

use super::{
    Outcome, Stop,
    steps::{read, state, text},
    subject::Subject,
    synthetic::Fill,
};
use crate::{
    model::Plan,
    ops::{
        value::Value,
        watch::{Op, Trace, Watch},
    },
};

/// Counts of tokens to try.
const COUNTS: [usize; 5] = [1, 2, 3, 7, 32];

fn dry(plan: &Plan, tokens: usize) -> Outcome<Trace> {
    let watch = Watch::default();
    plan.dry(Value::planned(&[tokens]), Some(&watch))?;
    watch.take().pop().ok_or_else(|| Stop::fail("nothing was run"))
}

/// A row of logits for each token, as wide as the vocabulary.
pub fn logits(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let plan = subject.plan(example, Fill::Zeros)?;
        let vocab = plan.config.get("vocab_size").and_then(|v| v.as_u64()).map(|v| v as usize);
        for tokens in COUNTS {
            let (logits, _) = plan.dry(Value::planned(&[tokens]), None)?;
            match logits.dims() {
                // A head may be padded, or cut, where config.json says so; narrower than the vocabulary it never is.
                Ok(&[rows, width]) if rows == tokens && vocab.is_none_or(|vocab| width >= vocab) => {}
                Ok(dims) => {
                    return Err(Stop::fail(format!(
                        "for {tokens} tokens it gives logits {dims:?}, where [{tokens}, {}] belongs",
                        vocab.map_or("..".into(), |v| v.to_string())
                    )));
                }
                Err(_) => return Err(Stop::fail(format!("for {tokens} tokens it gives no logits"))),
            }
        }
        Ok(format!("[tokens, {}]", vocab.unwrap_or_default()))
    })
}

/// What caches() says stays what it is.
pub fn caches_constant(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let plan = subject.plan(example, Fill::Zeros)?;
        let first = plan.object.caches.clone();
        for after in ["asked again", "asked after a step"] {
            let now = plan.object.declared();
            if now != first {
                return Err(Stop::fail(format!(
                    "its caches() gave {} caches, and {after} {} others",
                    first.len(),
                    now.len()
                )));
            }
            dry(&plan, 3)?;
        }
        Ok(format!("{} caches", first.len()))
    })
}

/// Every declared cache is used, and none beside them (which the host refuses).
pub fn caches_used(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let plan = subject.plan(example, Fill::Zeros)?;
        let trace = dry(&plan, 3)?;
        let is_empty =
            |cache: &usize| plan.object.caches.get(*cache).is_some_and(|spec| spec.kind != 0 && spec.dims[0] == 0);
        let idle = trace.fed.iter().enumerate().filter(|(_, fed)| !**fed).map(|(cache, _)| cache);
        match idle.filter(|cache| !is_empty(cache)).collect::<Vec<_>>().as_slice() {
            [] => Ok(String::new()),
            idle => Err(Stop::fail(format!(
                "caches() declares {} caches; a step leaves unused {idle:?} of them",
                trace.fed.len()
            ))),
        }
    })
}

/// The first place in which two lists of ops differ.
fn difference(one: &[Op], two: &[Op], shapes: bool) -> Option<String> {
    let told = |op: Option<&Op>| match op {
        Some(op) => {
            format!("{} at {}{}", op.name, op.at, if shapes { format!(" -> {:?}", op.dims) } else { String::new() })
        }
        None => "nothing more".to_owned(),
    };
    let same = |a: &Op, b: &Op| (&a.name, a.slot, &a.at) == (&b.name, b.slot, &b.at) && (!shapes || a.dims == b.dims);
    let (mut a, mut b) = (one.iter(), two.iter());
    for index in 0.. {
        match (a.next(), b.next()) {
            (None, None) => break,
            (Some(a), Some(b)) if same(a, b) => {}
            (a, b) => return Some(format!("op {index} is {} where it was {}", told(b), told(a))),
        }
    }
    None
}

/// Equal counts give equal ops: whatever the tokens are, wherever they stand, however often it is asked.
pub fn replay_values(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let mut model = subject.model(example)?;
        model.watch = Some(Watch::default());
        let traces = |model: &crate::model::Model| model.watch.as_ref().map(Watch::take).unwrap_or_default();
        let mut first: Option<Vec<Op>> = None;
        // Other tokens at the start, then the same model further on in its text.
        for (seed, steps) in [(1, 1), (2, 4), (3, 2)] {
            let mut state = state(&model, 64)?;
            for step in 0..steps {
                let tokens = text(&model, subject.job.seed ^ (seed * 16 + step), 3);
                read(&model, &mut state, &tokens)?;
                let ops = traces(&model).pop().map(|trace| trace.ops).unwrap_or_default();
                let first = first.get_or_insert_with(|| ops.clone());
                if let Some(difference) = difference(first, &ops, true) {
                    return Err(Stop::fail(format!(
                        "a step of 3 tokens gave other ops than an earlier one (text {seed}, step {step}): {difference}"
                    )));
                }
            }
        }
        Ok(format!("{} ops", first.map_or(0, |ops| ops.len())))
    })
}

/// Other counts give the same ops on other shapes.
pub fn replay_counts(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let plan = subject.plan(example, Fill::Zeros)?;
        let first = dry(&plan, COUNTS[0])?;
        for tokens in COUNTS {
            let trace = dry(&plan, tokens)?;
            if let Some(difference) = difference(&first.ops, &trace.ops, false) {
                return Err(Stop::fail(format!("{tokens} tokens give other ops than {}: {difference}", COUNTS[0])));
            }
        }
        Ok(format!("{} ops", first.ops.len()))
    })
}
