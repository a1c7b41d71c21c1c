//! GGUF metadata -> the `config.json` that the model was converted from, as far as inference reads it.
//! What llama.cpp keeps in its code instead of in the file (gemma's local rope, the scale of its scores) is filled in here.

use super::{Gguf, Value, names::Family};
use crate::{
    error::Result,
    weights::stored::{Dtype, Stored},
};
use serde_json::{Map, Value as Json, json};

pub(super) fn config(gguf: &Gguf) -> Result<Json> {
    let family = Family::of(gguf)?;
    let hidden_size = required(gguf, "embedding_length")?;
    let heads = required(gguf, "attention.head_count")?;
    let Some(embedding) = gguf.tensors.get("token_embd.weight") else {
        return Err(gguf.wrong("token_embd.weight: not in the file: is it only a vocabulary?"));
    };
    let mut config = Map::new();
    let mut set = |key: &str, value: Json| drop(config.insert(key.into(), value));
    set("model_type", family.model_type().into());
    set("hidden_size", hidden_size.into());
    set("num_hidden_layers", required(gguf, "block_count")?.into());
    set("num_attention_heads", heads.into());
    set("num_key_value_heads", key_value_heads(gguf)?.into());
    set("max_position_embeddings", required(gguf, "context_length")?.into());
    set("intermediate_size", required(gguf, "feed_forward_length")?.into());
    set("rms_norm_eps", required_float(gguf, "attention.layer_norm_rms_epsilon")?.into());
    set("vocab_size", embedding.shape.first().copied().unwrap_or(0).into());
    set("tie_word_embeddings", (!gguf.tensors.contains_key("output.weight")).into());
    set("torch_dtype", torch_dtype(gguf, embedding).into());
    let has = |name: &str| gguf.tensors.contains_key(name);
    if matches!(family, Family::Llama | Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3) {
        set("attention_bias", has("blk.0.attn_q.bias").into());
    }
    if family == Family::Llama {
        set("mlp_bias", has("blk.0.ffn_up.bias").into());
    }
    match family {
        Family::Gemma3 => set("hidden_activation", "gelu_pytorch_tanh".into()),
        _ => set("hidden_act", "silu".into()),
    }

    let head_dim = unsigned(gguf, "attention.key_length")?;
    if let Some(head_dim) = head_dim {
        set("head_dim", head_dim.into());
    }
    let head_dim = head_dim.unwrap_or(hidden_size / heads.max(1));
    let theta = float(gguf, "rope.freq_base")?.unwrap_or(if family == Family::Gemma3 { 1e6 } else { 1e4 });
    set("rope_theta", theta.into());
    set("rope_scaling", rope_scaling(gguf)?);
    if let Some(rotated) = unsigned(gguf, "rope.dimension_count")?.filter(|&n| 0 < n && n < head_dim) {
        set("partial_rotary_factor", (rotated as f64 / head_dim as f64).into());
    }

    match family {
        Family::Mixtral => {
            set("num_local_experts", required(gguf, "expert_count")?.into());
            set("num_experts_per_tok", required(gguf, "expert_used_count")?.into());
        }
        Family::Qwen3Moe => {
            set("num_experts", required(gguf, "expert_count")?.into());
            set("num_experts_per_tok", required(gguf, "expert_used_count")?.into());
            set("moe_intermediate_size", required(gguf, "expert_feed_forward_length")?.into());
            set("norm_topk_prob", true.into());
            set("decoder_sparse_step", 1.into());
            set("mlp_only_layers", json!([]));
        }
        Family::Gemma3 => {
            let pattern = unsigned(gguf, "attention.sliding_window_pattern")?.unwrap_or(6);
            set("sliding_window", unsigned(gguf, "attention.sliding_window")?.into());
            set("sliding_window_pattern", pattern.into());
            set("rope_local_base_freq", float(gguf, "rope.freq_base_swa")?.unwrap_or(1e4).into());
            // Only the 27B model (62 layers) departs from the head's size.
            let is_27b = required(gguf, "block_count")? == 62;
            set("query_pre_attn_scalar", (if is_27b { hidden_size / heads.max(1) } else { head_dim }).into());
            set("final_logit_softcapping", float(gguf, "final_logit_softcapping")?.into());
        }
        _ => {}
    }
    // The first Mistral says llama, and has a window all the same.
    if family != Family::Gemma3
        && let Some(window) = unsigned(gguf, "attention.sliding_window")?.filter(|&n| n > 0)
    {
        set("sliding_window", window.into());
    }
    let (eos, bos) = (super::tokenizer::eos_token_ids(gguf), gguf.unsigned("tokenizer.ggml.bos_token_id"));
    match eos.as_slice() {
        [] => {}
        [one] => set("eos_token_id", (*one).into()),
        all => set("eos_token_id", all.into()),
    }
    if let Some(bos) = bos {
        set("bos_token_id", bos.into());
    }
    Ok(Json::Object(config))
}

/// A number of heads; not zero.
pub(super) fn heads(gguf: &Gguf, key: &str) -> Result<usize> {
    match required(gguf, key)? {
        0 => Err(gguf.wrong(format!("{key} is 0: the file is damaged"))),
        n => usize::try_from(n).map_err(|_| gguf.wrong(format!("{key} is {n}: the file is damaged"))),
    }
}

pub(super) fn key_value_heads(gguf: &Gguf) -> Result<usize> {
    match unsigned(gguf, "attention.head_count_kv")? {
        Some(_) => heads(gguf, "attention.head_count_kv"),
        None => heads(gguf, "attention.head_count"),
    }
}

// The type to compute in. Packed weights do not say; bf16 is what their originals are published in.
fn torch_dtype(gguf: &Gguf, embedding: &Stored) -> &'static str {
    let matrices = || gguf.tensors.values().filter(|t| t.shape.len() > 1).map(|t| t.dtype);
    match embedding.dtype {
        Dtype::F32 if matrices().all(|dtype| dtype == Dtype::F32) => "float32",
        Dtype::F16 if matrices().all(|dtype| matches!(dtype, Dtype::F16 | Dtype::F32)) => "float16",
        _ => "bfloat16",
    }
}

fn rope_scaling(gguf: &Gguf) -> Result<Json> {
    let original = match unsigned(gguf, "rope.scaling.original_context_length")? {
        Some(length) => length,
        None => required(gguf, "context_length")?,
    };
    // Llama 3's scaling, worked out by the converter for each frequency. Longrope with equal short and long factors is the same formula.
    if let Some(factors) = gguf.tensors.get("rope_freqs.weight") {
        if factors.dtype != Dtype::F32 {
            return Err(gguf.wrong(format!("rope_freqs.weight: {} where F32 is expected", factors.dtype)));
        }
        let factors: Vec<f64> =
            factors.bytes().as_chunks::<4>().0.iter().map(|f| f32::from_le_bytes(*f).into()).collect();
        if !factors.iter().all(|f| f.is_finite() && *f > 0.0) {
            return Err(gguf.wrong("rope_freqs.weight: a factor that is not positive: the file is damaged"));
        }
        return Ok(json!({
            "rope_type": "longrope", "short_factor": factors, "long_factor": factors,
            "attention_factor": 1.0, "original_max_position_embeddings": original,
        }));
    }
    let architecture = gguf.architecture()?;
    let kind = match gguf.metadata.get(&format!("{architecture}.rope.scaling.type")).map(Value::as_str) {
        Some(Some(kind)) => kind,
        _ => "linear",
    };
    let factor = match float(gguf, "rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => float(gguf, "rope.scale_linear")?,
    };
    // 0 is llama.cpp's way of saying that there is no factor.
    let Some(factor) = factor.filter(|f| *f != 0.0 && *f != 1.0) else { return Ok(Json::Null) };
    match kind {
        "none" => Ok(Json::Null),
        "linear" => Ok(json!({"rope_type": "linear", "factor": factor})),
        "yarn" => Ok(json!({"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original})),
        other => {
            Err(gguf.wrong(format!("rope.scaling.type {other} is not read from GGUF: take the safetensors model")))
        }
    }
}

// Keys below stand under the architecture: `llama.block_count`.

fn required(gguf: &Gguf, key: &str) -> Result<u64> {
    unsigned(gguf, key)?.ok_or_else(|| missing(gguf, key))
}

fn required_float(gguf: &Gguf, key: &str) -> Result<f64> {
    float(gguf, key)?.ok_or_else(|| missing(gguf, key))
}

fn missing(gguf: &Gguf, key: &str) -> crate::error::Error {
    gguf.wrong(format!("{}.{key} is missing from its header", gguf.architecture().unwrap_or_default()))
}

// A list with one number for each layer is read where all layers agree.
fn unsigned(gguf: &Gguf, key: &str) -> Result<Option<u64>> {
    let key = format!("{}.{key}", gguf.architecture()?);
    let number = match gguf.metadata.get(&key) {
        None => return Ok(None),
        Some(Value::Numbers(list)) => {
            let mut numbers = list.iter().map(|n| n.as_u64());
            let first = numbers.next().flatten();
            if numbers.any(|n| n != first) {
                return Err(gguf.wrong(format!("{key} differs from layer to layer, which is not read from GGUF")));
            }
            first
        }
        Some(value) => value.as_u64(),
    };
    // Larger numbers are no size of anything, and would not survive JSON readers that go through f64.
    let number = number.filter(|&n| n < 1 << 53);
    number.map(Some).ok_or_else(|| gguf.wrong(format!("{key} is not a size: the file is damaged")))
}

fn float(gguf: &Gguf, key: &str) -> Result<Option<f64>> {
    let key = format!("{}.{key}", gguf.architecture()?);
    match gguf.metadata.get(&key) {
        None => Ok(None),
        Some(value) => value
            .as_f64()
            .map(Some)
            .ok_or_else(|| gguf.wrong(format!("{key} is not a finite number: the file is damaged"))),
    }
}
