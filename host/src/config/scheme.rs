//! `quantization_config` as other tools than MLX write it -> the little that tensor names, types and shapes do not say by themselves.
//! What a scheme does to activations is left out, save for BitNet, whose models were trained with it: the weights are what is read.

use super::bad_key;
use crate::error::{Error, Result};
use serde_json::{Map, Value};

const KEY: &str = "quantization_config";

/// A way of packing that is not MLX's.
#[derive(Debug, Clone, PartialEq)]
pub enum Scheme {
    /// E4M3 with scales for blocks (DeepSeek), rows or whole matrices.
    Fp8 {
        /// Rows and columns of a block.
        block: [usize; 2],
    },
    /// Lin et al. 2023, in AutoAWQ's "gemm" layout.
    Awq,
    /// Frantar et al. 2022, in AutoGPTQ's layout.
    Gptq {
        /// Of the model; single layers may have others.
        bits: u32,
        /// Whether a stored zero point is one less than what it means (`checkpoint_format` "gptq", not "gptq_v2").
        zeros_less_one: bool,
    },
    /// vLLM's llm-compressor, all formats.
    CompressedTensors {
        /// Rows and columns of a block, for FP8 in blocks.
        block: [usize; 2],
        /// Of packed integers; the tensors say it too, but only by their data.
        bits: u64,
    },
    /// Ternary weights.
    Bitnet(Bitnet),
    /// NVIDIA's Model Optimizer: FP8 and NVFP4.
    Modelopt,
}

/// Ternary weights and inputs of eight bits. <https://arxiv.org/abs/2402.17764>
#[derive(Debug, Clone, PartialEq)]
pub struct Bitnet {
    /// Whether `weight_scale` divides (`linear_class` "bitlinear"); with "autobitlinear" it multiplies.
    pub divides: bool,
    /// Whether weights are stored as trained, in full, and become ternary when they are used (`quantization_mode` "online").
    pub online: bool,
    /// Layers that are left as they are: names, or ends or beginnings of names.
    pub not_converted: Vec<String>,
}

impl Bitnet {
    /// Whether the linear layer at `path` is one of BitNet's.
    pub fn converts(&self, path: &str) -> bool {
        let listed = |name: &String| {
            path.ends_with(name.as_str()) || path.strip_prefix(name.as_str()).is_some_and(|rest| rest.starts_with('.'))
        };
        !path.ends_with("lm_head") && !self.not_converted.iter().any(listed)
    }
}

impl Scheme {
    /// Reads the object under `quantization_config`, whose `quant_method` is `method`.
    pub(super) fn from_config(method: &str, map: &Map<String, Value>, source: &str) -> Result<Self> {
        let settings = Settings { map, source };
        Ok(match method {
            "fp8" | "fbgemm_fp8" => {
                Scheme::Fp8 { block: settings.block(map.get("weight_block_size"), "weight_block_size")? }
            }
            "awq" => {
                settings.one_of("version", &["gemm"])?;
                match settings.number("bits")?.or(settings.number("w_bit")?).unwrap_or(4) {
                    4 => Scheme::Awq,
                    bits => return Err(settings.refuse("bits", &bits.into(), "4 for AWQ")),
                }
            }
            "gptq" => {
                settings.one_of("checkpoint_format", &["gptq", "gptq_v2"])?;
                let bits = settings.number("bits")?.unwrap_or(4);
                if ![2, 3, 4, 8].contains(&bits) {
                    return Err(settings.refuse("bits", &bits.into(), "2, 3, 4 or 8 for GPTQ"));
                }
                let zeros_less_one = settings.text("checkpoint_format") != Some("gptq_v2".into());
                Scheme::Gptq { bits: bits as u32, zeros_less_one }
            }
            "compressed-tensors" | "compressed_tensors" => settings.compressed_tensors()?,
            "bitnet" => Scheme::Bitnet(settings.bitnet()?),
            "modelopt" => Scheme::Modelopt,
            other => {
                return Err(Error::Config(format!(
                    "{source}: {KEY}.quant_method is \"{}\", which is not read: fp8, awq, gptq, compressed-tensors, bitnet, modelopt, mxfp4 \
                     and MLX's own are; take the model in one of those, or unquantized",
                    other.chars().take(40).collect::<String>()
                )));
            }
        })
    }
}

struct Settings<'a> {
    map: &'a Map<String, Value>,
    source: &'a str,
}

impl Settings<'_> {
    fn refuse(&self, key: &str, value: &Value, expected: &str) -> Error {
        bad_key(self.source, &format!("{KEY}.{key}"), value, expected)
    }

    fn text(&self, key: &str) -> Option<String> {
        self.map.get(key).and_then(Value::as_str).map(str::to_lowercase)
    }

    fn number(&self, key: &str) -> Result<Option<u64>> {
        match self.map.get(key).filter(|v| !v.is_null()) {
            Some(value) => value.as_u64().map(Some).ok_or_else(|| self.refuse(key, value, "a whole number")),
            None => Ok(None),
        }
    }

    /// Checks a name where it is stated.
    fn one_of(&self, key: &str, known: &[&str]) -> Result<()> {
        match self.map.get(key).filter(|v| !v.is_null()) {
            Some(value) if !self.text(key).is_some_and(|text| known.contains(&text.as_str())) => {
                Err(self.refuse(key, value, &known.join(" or ")))
            }
            _ => Ok(()),
        }
    }

    fn block(&self, value: Option<&Value>, key: &str) -> Result<[usize; 2]> {
        let Some(value) = value.filter(|v| !v.is_null()) else { return Ok([128, 128]) };
        let side = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        match value.as_array().map(Vec::as_slice) {
            Some([rows, cols]) => side(rows).zip(side(cols)).map(|(rows, cols)| [rows, cols]),
            _ => None,
        }
        .ok_or_else(|| self.refuse(key, value, "rows and columns of a block, as in [128, 128]"))
    }

    fn compressed_tensors(&self) -> Result<Scheme> {
        const FORMATS: [&str; 9] = [
            "dense",
            "pack-quantized",
            "int-quantized",
            "float-quantized",
            "naive-quantized",
            "nvfp4-pack-quantized",
            "mxfp4-pack-quantized",
            "mxfp8-quantized",
            "mixed-precision",
        ];
        self.one_of("format", &FORMATS)?;
        let inner = |key: &str, part: &str| {
            self.map
                .get(key)
                .and_then(|v| v.get(part))
                .filter(|v| !v.is_null() && v.as_object().is_none_or(|m| !m.is_empty()))
        };
        if let Some(format) = inner("sparsity_config", "format").filter(|f| f.as_str() != Some("dense")) {
            return Err(self.refuse("sparsity_config.format", format, "dense"));
        }
        if let Some(groups) = inner("transform_config", "config_groups") {
            return Err(self.refuse("transform_config.config_groups", groups, "empty: rotated weights are not read"));
        }
        let groups = self.map.get("config_groups").and_then(Value::as_object);
        let weights = || groups.into_iter().flat_map(|g| g.values()).filter_map(|group| group.get("weights"));
        let block = weights().find_map(|weights| weights.get("block_structure").filter(|v| v.is_array()));
        let bits = weights().find_map(|weights| weights.get("num_bits")?.as_u64()).unwrap_or(4);
        Ok(Scheme::CompressedTensors { block: self.block(block, "config_groups.weights.block_structure")?, bits })
    }

    fn bitnet(&self) -> Result<Bitnet> {
        self.one_of("linear_class", &["bitlinear", "autobitlinear"])?;
        self.one_of("quantization_mode", &["offline", "online"])?;
        if let Some(value) = self.map.get("use_rms_norm").filter(|v| v.as_bool() == Some(true)) {
            return Err(self.refuse("use_rms_norm", value, "false: norms inside linear layers are not read"));
        }
        let auto = self.text("linear_class").as_deref() == Some("autobitlinear");
        let names = self.map.get("modules_to_not_convert").and_then(Value::as_array);
        let names = names.into_iter().flatten().filter_map(Value::as_str).filter(|name| !name.is_empty());
        Ok(Bitnet {
            divides: !auto,
            online: auto && self.text("quantization_mode").as_deref() == Some("online"),
            not_converted: names.map(str::to_owned).collect(),
        })
    }
}
