//! Configurations, right and wrong: examples build; whatever is changed in one either builds as well or is refused with one sentence,
//! without a panic, in bounded time and memory.

use super::{
    Outcome, Stop,
    steps::Dice,
    subject::{Example, Subject},
    synthetic::{Demand, Fill, MOST_NUMBERS},
};
use crate::{
    error::Error,
    model::Plan,
    ops::{building::Building, lending::Call, table, value::Value as Tensor},
    weights::{checkpoint::Checkpoint, recipe::Pantry},
};
use serde_json::{Map, Value, json};
use std::{
    cell::RefCell,
    time::{Duration, Instant},
};

/// For one configuration, however mad. A model of ten thousand layers is described in a second or two by a build without optimization.
const MOST: Duration = Duration::from_secs(8);

/// Longer is no sentence that a person reads.
const LONGEST: usize = 600;

/// A message for a person: some words on one line.
pub fn one_sentence(text: &str) -> Outcome<()> {
    let what = match text {
        _ if text.trim().is_empty() => "an empty message",
        _ if text.contains('\n') => "a message of several lines",
        _ if text.len() > LONGEST => "a message that nobody will read to its end",
        _ => return Ok(()),
    };
    Err(Stop::fail(format!("it refuses with {what}: {:?}", text.chars().take(120).collect::<String>())))
}

/// Every example builds, and runs on shapes.
pub fn examples(subject: &Subject) -> Outcome {
    let mut sizes = Vec::new();
    subject.each(|example| {
        let config = example.config()?;
        if !subject.note()?.model_types.contains(&config.model_type) {
            return Err(Stop::fail(format!(
                "its model_type is {:?}, which the plugin does not serve",
                config.model_type
            )));
        }
        let plan = subject.plan(example, Fill::Zeros)?;
        plan.report.clone().into_result(&config.model_type)?;
        plan.dry_run()?;
        sizes.push(format!("{} parameters", plan.parameters()));
        Ok(())
    })?;
    Ok(sizes.join(", "))
}

/// Texts that are no configuration are refused with a sentence.
pub fn no_config(subject: &Subject) -> Outcome {
    let library = subject.library()?;
    let deep = "[".repeat(100_000);
    let long = format!("{{\"model_type\": \"{}\"}}", "x".repeat(1 << 20));
    let texts = ["", "{", "[]", "null", "7", "\"text\"", "{\"a\": 1e999}", "\u{0}", &deep, &long];
    let pantry = Pantry { checkpoint: Checkpoint::default(), quantization: None };
    let json = json!({});
    for text in texts {
        let shown: String = text.chars().take(40).collect();
        subject.at(format!("the configuration {shown:?}"));
        let call = Call::Building(RefCell::new(Building::new(&pantry, &json)));
        // An architecture whose keys all have defaults may well build from an empty object, or from a long name.
        if let Err(e) = library.meet(&table::host(), &call, text) {
            refused(&Error::plugin(e.message.into_string())).map_err(|stop| stop.of(format!("{shown:?}")))?;
        }
    }
    Ok(String::new())
}

fn refused(e: &Error) -> Outcome<()> {
    let text = e.to_string();
    if text.contains(" panicked: ") {
        return Err(Stop::fail(text));
    }
    match e {
        // A report on tensors is a list.
        Error::Weights(_) => Ok(()),
        _ => one_sentence(&text),
    }
}

/// For how long this thread has been computing; where the system does not tell, how late it is.
fn busy() -> Duration {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = told.as_ref().and_then(|text| text.split(' ').next()?.parse().ok());
    nanoseconds.map_or_else(|| START.with(Instant::elapsed), Duration::from_nanos)
}

thread_local! {
    static START: Instant = Instant::now();
}

/// Builds a model of a changed configuration as far as it goes: asks for tensors, then runs on shapes. Gives whether it built.
fn attempt(subject: &Subject, base: &Demand, json: Value) -> Outcome<bool> {
    let (library, start) = (subject.library()?, busy());
    let run = || -> Result<bool, Error> {
        let example = Example { name: "config.json".into(), json };
        let config = example.config()?;
        let mut checkpoint = base.checkpoint(Fill::Zeros, 0).unwrap_or_default();
        let mut plan = Plan::by(library, config.clone(), checkpoint)?;
        if !plan.report.agrees() {
            // Whoever changed the configuration may have changed the tensors too.
            let demand = Demand::of(&plan.wanted);
            if demand.numbers() > MOST_NUMBERS || plan.wanted.len() > 10_000 {
                return Ok(false);
            }
            checkpoint = demand.checkpoint(Fill::Zeros, 0).unwrap_or_default();
            plan = Plan::by(library, config, checkpoint)?;
        }
        if !plan.report.agrees() {
            return Ok(false);
        }
        plan.dry(Tensor::planned(&[3]), None)?;
        Ok(true)
    };
    let built = match run() {
        Ok(built) => built,
        Err(e) => refused(&e).map(|()| false)?,
    };
    let took = busy().saturating_sub(start);
    if took > MOST {
        return Err(Stop::fail(format!("it took {:.0} s to say no or yes", took.as_secs_f64())));
    }
    Ok(built)
}

/// The places of all values in an object, as JSON pointers; lists count as one value and by their first few.
fn places(json: &Value, at: String, into: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match json {
        Value::Object(map) => {
            map.iter().map(|(key, value)| (key.replace('~', "~0").replace('/', "~1"), value)).collect()
        }
        Value::Array(list) => list.iter().take(2).enumerate().map(|(i, value)| (i.to_string(), value)).collect(),
        _ => Vec::new(),
    };
    for (key, value) in children {
        let place = format!("{at}/{key}");
        into.push(place.clone());
        places(value, place, into);
    }
}

fn remove(json: &mut Value, place: &str) {
    let Some((parent, key)) = place.rsplit_once('/') else { return };
    let key = key.replace("~1", "/").replace("~0", "~");
    match json.pointer_mut(parent) {
        Some(Value::Object(map)) => drop(map.shift_remove(&key)),
        Some(Value::Array(list)) => drop(key.parse::<usize>().ok().filter(|&i| i < list.len()).map(|i| list.remove(i))),
        _ => {}
    }
}

/// `None` removes the key.
fn change(json: &Value, place: &str, to: Option<&Value>) -> Value {
    let mut json = json.clone();
    match (to, json.pointer_mut(place)) {
        (Some(value), Some(slot)) => *slot = value.clone(),
        (None, _) => remove(&mut json, place),
        _ => {}
    }
    json
}

fn told(place: &str, to: Option<&Value>) -> String {
    let key = place.trim_start_matches('/').replace('/', ".");
    match to {
        None => format!("without {key}"),
        Some(value) => format!("with {key} = {}", value.to_string().chars().take(40).collect::<String>()),
    }
}

/// Tries each of the values at each place.
fn everywhere(subject: &Subject, values: &dyn Fn(&Value) -> Vec<Option<Value>>) -> Outcome {
    let (mut tried, mut built) = (0, 0);
    subject.each(|example| {
        let base = Demand::learn(subject.library()?, &example.config()?)?;
        let mut all = Vec::new();
        places(&example.json, String::new(), &mut all);
        for place in &all {
            for to in values(example.json.pointer(place).unwrap_or(&Value::Null)) {
                let what = told(place, to.as_ref());
                subject.at(&what);
                tried += 1;
                let json = change(&example.json, place, to.as_ref());
                built += usize::from(attempt(subject, &base, json).map_err(|stop| stop.of(what))?);
            }
        }
        Ok(())
    })?;
    Ok(format!("{tried} tried, {built} build"))
}

/// Each key left out.
pub fn missing_keys(subject: &Subject) -> Outcome {
    everywhere(subject, &|_| vec![None])
}

/// Each key null.
pub fn null_keys(subject: &Subject) -> Outcome {
    everywhere(subject, &|_| vec![Some(Value::Null)])
}

/// Each value of other types.
pub fn wrong_types(subject: &Subject) -> Outcome {
    let others = [json!(true), json!("text"), json!([]), json!({}), json!([1, "two", null]), json!(3)];
    everywhere(subject, &|is| {
        let unlike = |other: &&Value| std::mem::discriminant(*other) != std::mem::discriminant(is) || other.is_array();
        others.iter().filter(unlike).cloned().map(Some).collect()
    })
}

/// Each number zero, negative, huge, a fraction.
pub fn extreme_numbers(subject: &Subject) -> Outcome {
    everywhere(subject, &|is| match is.is_number() {
        true => extremes().map(Some).to_vec(),
        false => Vec::new(),
    })
}

fn extremes() -> [Value; 12] {
    [
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!(0.5),
        json!(1e-320),
        json!(4_099),
        json!(1_000_000_000),
        json!(u32::MAX),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(1.7e308),
    ]
}

/// Random changes, one to four at once, the same for the same seed.
pub fn fuzz(subject: &Subject) -> Outcome {
    let (cases, seed) = (subject.job.cases, subject.job.seed);
    let mut built = 0;
    subject.each(|example| {
        let base = Demand::learn(subject.library()?, &example.config()?)?;
        let mut all = Vec::new();
        places(&example.json, String::new(), &mut all);
        let all: Vec<String> = all.into_iter().filter(|place| place != "/model_type").collect();
        for case in 0..if all.is_empty() { 0 } else { cases } {
            let mut dice = Dice::new(seed ^ (case as u64) << 20);
            let (mut json, mut what) = (example.json.clone(), Vec::new());
            for _ in 0..1 + dice.below(4) {
                let place = &all[dice.below(all.len())];
                let to = other(&mut dice, example.json.pointer(place).unwrap_or(&Value::Null), &example.json);
                what.push(told(place, to.as_ref()));
                json = change(&json, place, to.as_ref());
            }
            let what = format!("case {case} of seed {seed}, {}", what.join(", "));
            subject.at(&what);
            built += usize::from(attempt(subject, &base, json).map_err(|stop| stop.of(what))?);
        }
        Ok(())
    })?;
    Ok(format!("{cases} tried, {built} build"))
}

/// A value that might stand in another's place.
fn other(dice: &mut Dice, is: &Value, all: &Value) -> Option<Value> {
    let whole = is.as_u64();
    Some(match dice.below(10) {
        0 => return None,
        1 => extremes()[dice.below(12)].clone(),
        2..=5 if whole.is_some() => json!(dice.below(2 * whole.unwrap_or(1).min(1 << 20) as usize + 3)),
        2..=5 if is.is_number() => json!(is.as_f64().unwrap_or(1.0) * dice.below(4) as f64),
        2..=5 if is.is_boolean() => json!(is != &json!(true)),
        2..=4 if is.is_array() => {
            let mut list = is.as_array().cloned().unwrap_or_default();
            match list.pop() {
                Some(last) if dice.below(2) == 0 => list.extend([last.clone(), last]),
                _ => {}
            }
            Value::Array(list)
        }
        6 => Value::Null,
        7 => json!("gelu"),
        8 => json!([dice.below(5), dice.below(5)]),
        // What stands at some other key.
        _ => {
            let values: Vec<&Value> = all.as_object().map(Map::values).into_iter().flatten().collect();
            values.get(dice.below(values.len())).map_or(Value::Null, |&v| v.clone())
        }
    })
}
