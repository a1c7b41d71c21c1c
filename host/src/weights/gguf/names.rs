//! llama.cpp's tensor names -> the checkpoint's own, and what llama.cpp's converter changed in the values -> changed back:
//! llama's q and k rows are permuted (left to `Stored::bytes`), gemma's norm weights have 1 added.

use super::Gguf;
use crate::{
    error::Result,
    weights::{
        checkpoint::Checkpoint,
        stored::{Dtype, Stored},
    },
};

/// The architectures whose names and conventions are known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// llama, mistral, SmolLM and all who call themselves llama.
    Llama,
    /// llama with experts.
    Mixtral,
    Qwen2,
    Qwen3,
    Qwen3Moe,
    Gemma3,
}

impl Family {
    pub(super) fn of(gguf: &Gguf) -> Result<Self> {
        Ok(match gguf.architecture()? {
            "llama" if gguf.unsigned("llama.expert_count").is_some_and(|n| n > 0) => Family::Mixtral,
            "llama" => Family::Llama,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            "qwen3moe" => Family::Qwen3Moe,
            "gemma3" => Family::Gemma3,
            other => {
                return Err(gguf.wrong(format!(
                    "architecture {other} is not read from GGUF (llama, qwen2, qwen3, qwen3moe and gemma3 are): take the safetensors model"
                )));
            }
        })
    }

    /// What config.json calls it.
    pub(super) fn model_type(self) -> &'static str {
        match self {
            Family::Llama => "llama",
            Family::Mixtral => "mixtral",
            Family::Qwen2 => "qwen2",
            Family::Qwen3 => "qwen3",
            Family::Qwen3Moe => "qwen3_moe",
            Family::Gemma3 => "gemma3_text",
        }
    }

    // `blk.N.PART.weight` -> `model.layers.N.NAME.weight`
    fn layer_name(self, part: &str) -> Option<&'static str> {
        let gemma = self == Family::Gemma3;
        Some(match part {
            "attn_norm" => "input_layernorm",
            "attn_q" => "self_attn.q_proj",
            "attn_k" => "self_attn.k_proj",
            "attn_v" => "self_attn.v_proj",
            "attn_output" => "self_attn.o_proj",
            "attn_q_norm" => "self_attn.q_norm",
            "attn_k_norm" => "self_attn.k_norm",
            "ffn_norm" if gemma => "pre_feedforward_layernorm",
            "ffn_norm" => "post_attention_layernorm",
            "post_attention_norm" if gemma => "post_attention_layernorm",
            "post_ffw_norm" if gemma => "post_feedforward_layernorm",
            "ffn_gate" => "mlp.gate_proj",
            "ffn_up" => "mlp.up_proj",
            "ffn_down" => "mlp.down_proj",
            _ => match (self, part) {
                (Family::Qwen3Moe, "ffn_gate_inp") => "mlp.gate",
                (Family::Qwen3Moe, "ffn_gate_exps") => "mlp.switch_mlp.gate_proj",
                (Family::Qwen3Moe, "ffn_up_exps") => "mlp.switch_mlp.up_proj",
                (Family::Qwen3Moe, "ffn_down_exps") => "mlp.switch_mlp.down_proj",
                (Family::Mixtral, "ffn_gate_inp") => "block_sparse_moe.gate",
                (Family::Mixtral, "ffn_gate_exps") => "block_sparse_moe.switch_mlp.gate_proj",
                (Family::Mixtral, "ffn_up_exps") => "block_sparse_moe.switch_mlp.up_proj",
                (Family::Mixtral, "ffn_down_exps") => "block_sparse_moe.switch_mlp.down_proj",
                _ => return None,
            },
        })
    }

    fn name(self, name: &str) -> Option<String> {
        match name {
            "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
            "output_norm.weight" => return Some("model.norm.weight".into()),
            "output.weight" => return Some("lm_head.weight".into()),
            _ => {}
        }
        let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
        let (part, kind) = rest.rsplit_once('.')?;
        let layer: u32 = layer.parse().ok()?;
        matches!(kind, "weight" | "bias").then_some(())?;
        Some(format!("model.layers.{layer}.{}.{kind}", self.layer_name(part)?))
    }
}

pub(super) fn checkpoint(gguf: &Gguf) -> Result<Checkpoint> {
    let family = Family::of(gguf)?;
    let permuted = matches!(family, Family::Llama | Family::Mixtral);
    let mut checkpoint = Checkpoint::default();
    for (name, tensor) in &gguf.tensors {
        // The config carries these as factors of the rope.
        if name == "rope_freqs.weight" {
            continue;
        }
        let Some(new_name) = family.name(name) else {
            return Err(gguf.wrong(format!("{name}: architecture {} has no such tensor", gguf.architecture()?)));
        };
        let mut tensor = tensor.clone();
        if permuted && new_name.contains(".q_proj.") {
            tensor = tensor.with_permuted_heads(super::config::heads(gguf, "attention.head_count")?)?;
        } else if permuted && new_name.contains(".k_proj.") {
            tensor = tensor.with_permuted_heads(super::config::key_value_heads(gguf)?)?;
        } else if family == Family::Gemma3 && new_name.ends_with("norm.weight") {
            tensor = minus_one(tensor).map_err(|what| gguf.wrong(format!("{name}: {what}")))?;
        }
        checkpoint.insert(new_name, tensor)?;
    }
    Ok(checkpoint)
}

fn minus_one(tensor: Stored) -> std::result::Result<Stored, String> {
    if tensor.dtype != Dtype::F32 {
        return Err(format!("{} where llama.cpp's converter writes F32", tensor.dtype));
    }
    let mut values = tensor.bytes().to_vec();
    for value in values.as_chunks_mut::<4>().0 {
        *value = (f32::from_le_bytes(*value) - 1.0).to_le_bytes();
    }
    Stored::new(tensor.dtype, tensor.shape, values.into(), tensor.file).map_err(|e| e.to_string())
}
