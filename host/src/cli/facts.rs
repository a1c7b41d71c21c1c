//! What `inspect` and `plan` both tell of a model: the architecture's demands against the files, counted.

use crate::{
    device::{DeviceChoice, Placement},
    error::Result,
    fit::cache_bytes,
    load::LoadOptions,
    model::{CacheShape, Plan},
    source::Source,
};
use serde_json::{Value, json};

/// The caches of a model that its files fit; an architecture can only be run on shapes that it was built for.
pub fn shapes(plan: &Plan) -> Result<Vec<CacheShape>> {
    if plan.report.agrees() { plan.dry_run() } else { Ok(Vec::new()) }
}

/// Bytes of a number in the KV cache.
pub fn width(plan: &Plan, options: &LoadOptions) -> usize {
    match Placement::new(DeviceChoice::Cpu, options.dtype, plan.dtype()) {
        Ok(place) => place.dtype.size_in_bytes(),
        Err(_) => 2,
    }
}

/// A JSON object, of which each command prints what it is for.
pub fn facts(source: &Source, plan: &Plan, shapes: &[CacheShape], width: usize, context: usize) -> Value {
    let (parameters, bytes) = (plan.parameters(), plan.weight_bytes());
    let per_token: usize = shapes.iter().map(|shape| shape.values.saturating_mul(width)).sum();
    let (cache, state) = cache_bytes(shapes, context, width);
    let report = &plan.report;
    json!({
        "source": source.name,
        "path": source.files.path(),
        "revision": source.revision,
        "model_type": plan.config.model_type,
        "plugin": { "path": plan.plugin, "name": plan.note.name, "version": plan.note.version },
        "dtype": format!("{:?}", plan.dtype()),
        "parameters": parameters,
        "weight_bytes": bytes,
        "bits_per_weight": if parameters > 0 { 8.0 * bytes as f64 / parameters as f64 } else { 0.0 },
        "tensors": plan.checkpoint().len(),
        "kv_bytes_per_token": per_token,
        "context": context,
        "kv_bytes": cache,
        "state_bytes": state,
        "memory_bytes": bytes.saturating_add(cache).saturating_add(state),
        "agrees": report.agrees(),
        "missing": report.missing,
        "misshapen": report.misshapen,
        "unused": report.unused,
        "complaints": report.complaints,
    })
}

/// Bytes as people read them; a GB is 10^9 bytes, as in the figures of a generation.
pub fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} KB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}
