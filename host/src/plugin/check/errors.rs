//! What goes wrong is told and leaves nothing behind: failures of the host travel through a plugin, panics are none.

use super::{
    Outcome, Stop,
    steps::{BOUND, near, read, state, text, whole},
    subject::Subject,
    synthetic::Fill,
};
use crate::{
    model::{Input, Want},
    ops::value::Value,
};
use std::rc::Rc;

/// A failure that the plugin is handed comes back, as it was.
pub fn passed_on(subject: &Subject) -> Outcome {
    const WHAT: &str = "a failure that dylm check made up";
    subject.each(|example| {
        let plan = subject.plan(example, Fill::Zeros)?;
        match plan.dry(Value::Failed(Rc::new(WHAT.into())), None) {
            Ok(_) => Err(Stop::fail("its tokens had failed, and it gave logits")),
            Err(e) if e.to_string() == WHAT => Ok(String::new()),
            Err(e) => Err(Stop::fail(format!("its tokens had failed ({WHAT:?}), and what came back is {e:?}"))),
        }
    })
}

/// After a step that failed, the next gives what it would have given.
pub fn step_undone(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let text = text(&model, subject.job.seed, 10);
        let expected = whole(&model, &text)?;
        let mut state = state(&model, text.len())?;
        let mut rows = read(&model, &mut state, &text[..6])?;
        let beyond = model.vocab_size().map_or(u32::MAX, |vocab| vocab as u32);
        if model.step(&mut [Input { state: &mut state, tokens: &[text[6], beyond], want: Want::All }]).is_ok() {
            return Err(Stop::fail(format!("it took the token {beyond}, which is beyond its vocabulary")));
        }
        rows.extend(read(&model, &mut state, &text[6..])?);
        near("after a failed step", &rows, &expected, BOUND)?;
        Ok(String::new())
    })
}

/// A model may end whatever it has been through: unused, half built, after a failure.
pub fn dropped(subject: &Subject) -> Outcome {
    subject.each(|example| {
        subject.at(format!("{}: dropping a model that never ran", example.name));
        drop(subject.plan(example, Fill::Zeros)?);
        subject.at(format!("{}: dropping a model after a failed step", example.name));
        let plan = subject.plan(example, Fill::Zeros)?;
        // Whatever comes of it.
        let _ = plan.dry(Value::Failed(Rc::new("a failure".into())), None);
        drop(plan);
        subject.at(format!("{}: dropping a model after some steps", example.name));
        let model = subject.model(example)?;
        whole(&model, &text(&model, subject.job.seed, 4))?;
        drop(model);
        no_panic(subject)
    })
}

/// No panic on any thread while a model lives its life, not even one that the plugin kept to itself.
pub fn no_hidden_panic(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        whole(&model, &text(&model, subject.job.seed, 5))?;
        no_panic(subject)
    })
}

fn no_panic(subject: &Subject) -> Outcome {
    match subject.library()?.take_panic() {
        None => Err(Stop::Skip("the plugin does not tell of panics that it keeps to itself (panics/1)".into())),
        Some(none) if none.is_empty() => Ok(String::new()),
        Some(text) => Err(Stop::fail(format!("it panicked: {text}"))),
    }
}
