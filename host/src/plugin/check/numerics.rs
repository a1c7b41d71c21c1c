//! The model's numbers: that they are some, that they follow from the text, and that they are right where somebody knows what is.

use super::{
    Outcome, Stop,
    steps::{BOUND, finite, near, text, whole},
    subject::{Subject, load, load_on},
    synthetic::{Fill, GROUP},
};
use crate::{
    adapter::Adapters,
    device::{DeviceChoice, DtypeChoice, Placement},
    load::{LoadOptions, open},
    model::{Model, Plan},
    weights::{checkpoint::Checkpoint, forms::float},
};
use candle_core::DType;
use serde_json::json;

const TOKENS: usize = 12;

/// Every logit is a number, for weights of ordinary size.
pub fn is_finite(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let rows = whole(&model, &text(&model, subject.job.seed, TOKENS))?;
        finite(&rows)?;
        let largest = rows.iter().flatten().fold(0f32, |m, x| m.max(x.abs()));
        Ok(format!("largest logit {largest:.1}"))
    })
}

/// The same text gives the same bits.
pub fn repeatable(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let text = text(&model, subject.job.seed, TOKENS);
        let first = whole(&model, &text)?;
        match (0..3).try_fold(true, |same, _| Ok::<_, Stop>(same && whole(&model, &text)? == first))? {
            true => Ok(String::new()),
            false => {
                Err(Stop::fail("the same text gave other logits the second time: something is kept between calls"))
            }
        }
    })
}

/// Logits follow from the tokens so far, and from no later one.
pub fn causal(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let mut tokens = text(&model, subject.job.seed, TOKENS);
        let first = whole(&model, &tokens)?;
        let vocab = model.vocab_size().unwrap_or(2).max(2) as u32;
        let at = TOKENS / 2;
        tokens[at] = (tokens[at] + 1) % vocab;
        let second = whole(&model, &tokens)?;
        near("a later token was changed", &second[..at], &first[..at], BOUND)?;
        match second[at] == first[at] {
            false => Ok(String::new()),
            true => Err(Stop::fail(format!("token {at} was changed, and its logits stayed the same"))),
        }
    })
}

/// Weights in 4 bits give what the numbers that they stand for give: each transform of a weight takes packed ones too.
pub fn quantized(subject: &Subject) -> Outcome {
    // Packed rows are multiplied in another order of sums.
    const LEAST: f32 = 1e-4;
    subject.each(|example| {
        let packed = subject.plan_with(example, Fill::Packed, |json| {
            json["quantization"] = json!({ "group_size": GROUP, "bits": 4 });
        })?;
        if !packed.checkpoint().names().any(|name| name.ends_with(".scales")) {
            return Err(Stop::Skip(format!("no weight of the example has rows of a multiple of {GROUP}")));
        }
        packed.report.clone().into_result("in 4 bits")?;
        let (packed, plain) = (load(packed)?, load(subject.plan(example, Fill::Unpacked)?)?);
        let text = text(&plain, subject.job.seed, TOKENS);
        let off = near("in 4 bits", &whole(&packed, &text)?, &whole(&plain, &text)?, LEAST)?;
        Ok(format!("off by {off:.0e}"))
    })
}

/// The plain ops, which GPUs run, give what the CPU's own kernels give.
pub fn by_plain_ops(subject: &Subject) -> Outcome {
    subject.each(|example| {
        let model = subject.model(example)?;
        let plain = load_on(subject.plan(example, Fill::Numbers)?, DeviceChoice::CpuByCandle)?;
        let text = text(&model, subject.job.seed, TOKENS);
        let off = near("by plain ops, as on a GPU", &whole(&plain, &text)?, &whole(&model, &text)?, 2.0 * BOUND)?;
        Ok(format!("off by {off:.0e}"))
    })
}

/// A real model's logits are those that another program gave: `input_ids` `[n]` and `logits` `[n or fewer, vocab]`, the last ones.
pub fn reference(subject: &Subject) -> Outcome {
    // Two programs in f32 differ by the order of their sums, layer by layer.
    const LEAST: f32 = 1e-3;
    let (Some(file), Some(model)) = (&subject.job.reference, &subject.job.model) else {
        return Err(Stop::Skip("no --reference FILE with --model MODEL".into()));
    };
    let stored = Checkpoint::open_file(file)?;
    let wrong = |what: &str| Stop::fail(format!("{}: {what}", file.display()));
    let get = |name: &str| stored.get(name).ok_or_else(|| wrong(&format!("has no tensor {name}")));
    let (ids, logits) = (get("input_ids")?, get("logits")?);
    let size = ids.dtype.block().1;
    let id = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |id, &byte| id << 8 | u64::from(byte));
    let text: Vec<u32> = ids.bytes().chunks_exact(size).map(|bytes| id(bytes) as u32).collect();
    let float = float(logits.dtype).ok_or_else(|| wrong("logits are no floats"))?;
    let bytes = logits.bytes();
    let numbers: Vec<f32> = bytes.chunks_exact(float.size()).map(|bytes| float.read(bytes)).collect();
    let width = logits.shape.last().copied().unwrap_or(0);
    let theirs: Vec<Vec<f32>> = numbers.chunks_exact(width.max(1)).map(<[f32]>::to_vec).collect();
    if theirs.is_empty() || theirs.len() > text.len() {
        return Err(wrong(&format!("{} rows of logits for {} tokens", theirs.len(), text.len())));
    }
    let opened = open(Some(model), &LoadOptions::default())?;
    let plan = Plan::by(subject.library()?, opened.config, opened.checkpoint)?;
    let place = Placement::new(DeviceChoice::Cpu, DtypeChoice::Float32, DType::F32)?;
    let model: Model = plan.load(place, &Adapters::default(), &|_, _| {})?;
    subject.at(model.config.model_type.clone());
    let ours = whole(&model, &text)?;
    let off = near("against the reference", &ours[text.len() - theirs.len()..], &theirs, LEAST)?;
    Ok(format!("{} tokens, off by {off:.0e}", theirs.len()))
}
