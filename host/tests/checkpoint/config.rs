//! config.json and what is laid over it.

use crate::{refusal, says};
use dylm::config::{Config, Kind, Mode, Quantization, Scheme, parse_override};
use serde_json::{Value, json};
use std::{fs, path::Path};
use tempfile::tempdir;

fn config(json: Value) -> dylm::Result<Config> {
    Config::from_json(json, &[], "config.json")
}

fn write(dir: &Path, config: impl AsRef<[u8]>, generation: Option<&str>) {
    fs::write(dir.join("config.json"), config).unwrap();
    if let Some(text) = generation {
        fs::write(dir.join("generation_config.json"), text).unwrap();
    }
}

#[test]
fn a_model_type_that_is_no_plain_name_is_refused_by_key_and_file() {
    let long = "a".repeat(65);
    let huge = "a".repeat(10_000_000);
    for bad in
        ["../../tmp/x", "/abs", "a/b", "a\\b", "a\0b", "", ".", "..", ".hidden", "ll ama", "llаma", "x\n", &long, &huge]
    {
        let text = refusal(config(json!({"model_type": bad})));
        assert!(text.starts_with("config.json: model_type is "), "{text}");
        assert!(text.len() < 300, "{}", text.len());
    }
    for bad in [json!(7), json!(null), json!(["llama"]), json!({"a": 1}), json!(true)] {
        says(config(json!({"model_type": bad})), &["config.json: model_type is"]);
    }
    says(config(json!({})), &["config.json: model_type is missing"]);
    says(config(json!([1])), &["not a JSON object"]);
    assert_eq!(config(json!({"model_type": "phi-3.5_MoE"})).unwrap().model_type, "phi-3.5_MoE");
}

#[test]
fn files_that_are_no_configuration_are_refused() {
    let dir = tempdir().unwrap();
    says(Config::from_folder(dir.path(), &[]), &["config.json: not there"]);
    for (bytes, expected) in [
        (b"{\"model_type\": \"\xff\"}".to_vec(), "not UTF-8 at byte 16"),
        (b"{".to_vec(), "not valid JSON"),
        (vec![b'['; 100_000], "not valid JSON"),
        (format!("{{\"a\":{}1{}}}", "[".repeat(1000), "]".repeat(1000)).into_bytes(), "not valid JSON"),
        (vec![b' '; (8 << 20) + 1], "larger than 8 MB"),
    ] {
        write(dir.path(), bytes, None);
        says(Config::from_folder(dir.path(), &[]), &["config.json: ", expected]);
    }
}

#[test]
fn infinity_and_nan_as_python_writes_them_are_read() {
    let dir = tempdir().unwrap();
    let text = r#"{"model_type":"mamba2","time_step_limit":[0.0,Infinity],"low":-Infinity,"none":NaN,"text":"Infinity \" NaN"}"#;
    write(dir.path(), text, None);
    let config = Config::from_folder(dir.path(), &[]).unwrap();
    assert_eq!(config.get("time_step_limit").unwrap(), &json!([0.0, f64::MAX]));
    assert_eq!(config.get("low").unwrap(), &json!(f64::MIN));
    assert_eq!(config.get("none"), None);
    assert_eq!(config.get("text").unwrap(), &json!("Infinity \" NaN"));
}

#[test]
fn generation_config_says_which_tokens_end_a_text() {
    let dir = tempdir().unwrap();
    let eos = |generation: Option<&str>, overrides: &[(String, Value)]| {
        write(dir.path(), r#"{"model_type":"llama","eos_token_id":1}"#, generation);
        Config::from_folder(dir.path(), overrides).map(|c| c.eos_token_ids)
    };
    assert_eq!(eos(None, &[]).unwrap(), [1]);
    assert_eq!(eos(Some(r#"{"eos_token_id":[7,8]}"#), &[]).unwrap(), [7, 8]);
    assert_eq!(eos(Some(r#"{"eos_token_id":null}"#), &[]).unwrap(), [1]);
    assert_eq!(eos(Some("{}"), &[("eos_token_id".into(), json!(3))]).unwrap(), [3]);
    says(eos(Some(r#"{"eos_token_id":-1}"#), &[]), &["generation_config.json: eos_token_id is -1"]);
    says(eos(Some(r#"{"eos_token_id":["x"]}"#), &[]), &["generation_config.json: eos_token_id is"]);
    says(eos(Some("{"), &[]), &["generation_config.json: not valid JSON"]);
    assert_eq!(config(json!({"model_type": "m"})).unwrap().eos_token_ids, [0u32; 0]);
}

#[test]
fn overrides_reach_any_depth_and_merge_objects() {
    let base = json!({"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2}, "a": 1});
    let with = |texts: &[&str]| {
        let overrides: Vec<_> = texts.iter().map(|t| parse_override(t).unwrap()).collect();
        Config::from_json(base.clone(), &overrides, "config.json")
    };
    let config = with(&["rope_scaling.factor=8", "new.deep=[1]", "a=text", "b=\"2\""]).unwrap();
    assert_eq!(config.get("rope_scaling").unwrap(), &json!({"rope_type": "linear", "factor": 8}));
    assert_eq!(config.get("new").unwrap(), &json!({"deep": [1]}));
    assert_eq!((config.get("a").unwrap(), config.get("b").unwrap()), (&json!("text"), &json!("2")));
    let config = with(&[r#"rope_scaling={"factor":4}"#]).unwrap();
    assert_eq!(config.get("rope_scaling").unwrap(), &json!({"rope_type": "linear", "factor": 4}));
    assert_eq!(with(&["model_type=qwen3"]).unwrap().model_type, "qwen3");
    says(with(&["a.b=1"]), &["--config a.b: b has no place"]);
    says(with(&["model_type=../x"]), &["model_type is"]);
    says(parse_override("nothing"), &["--config nothing: write key=value"]);
    says(parse_override("=1"), &["write key=value"]);
    let text: Value = serde_json::from_str(&with(&[]).unwrap().text()).unwrap();
    assert_eq!(text, base);
}

#[test]
fn a_wrapper_gives_up_its_text_config() {
    let json = json!({
        "model_type": "gemma3", "tie_word_embeddings": true, "eos_token_id": [1, 106], "hidden_size": 5,
        "quantization": {"group_size": 64, "bits": 4},
        "vision_config": {"hidden_size": 9},
        "text_config": {"model_type": "gemma3_text", "hidden_size": 7, "tie_word_embeddings": false, "eos_token_id": 1,
                        "pad_token_id": 3, "quantization_config": {"quant_method": "fp8"}},
    });
    let wrapper = config(json).unwrap();
    assert_eq!(wrapper.model_type, "gemma3");
    assert_eq!(wrapper.eos_token_ids, [1, 106]);
    assert_eq!(wrapper.get("text_model_type").unwrap(), "gemma3_text");
    assert_eq!(wrapper.get("hidden_size").unwrap(), 7);
    assert_eq!(wrapper.get("tie_word_embeddings").unwrap(), true);
    assert_eq!(wrapper.get("pad_token_id").unwrap(), 3);
    assert_eq!(wrapper.get("quantization_config").unwrap(), &json!({"quant_method": "fp8"}));
    assert!(wrapper.get("text_config").is_none());

    let lifted =
        json!({"model_type": "m", "text_config": {"quantization_config": {"quant_method": "fp8"}, "rope_theta": 5.0}});
    assert_eq!(config(lifted.clone()).unwrap().quantization(), Some(&fp8()));
    for key in ["rope_theta", "text_config.rope_theta"] {
        let config = Config::from_json(lifted.clone(), &[(key.into(), json!(9.0))], "config.json").unwrap();
        assert_eq!(config.get("rope_theta").unwrap(), 9.0, "{key}");
    }
}

#[test]
fn new_names_of_rope_and_dtype_are_there_under_the_old_ones() {
    let get = |json: Value, key: &str| config(json).unwrap().get(key).cloned().unwrap_or(Value::Null);
    let plain =
        json!({"model_type": "m", "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"});
    assert_eq!(get(plain.clone(), "rope_theta"), 5e5);
    assert_eq!(get(plain.clone(), "rope_scaling"), Value::Null);
    assert_eq!(get(plain, "torch_dtype"), "bfloat16");

    let scaled = json!({"model_type": "m", "rope_scaling": null, "rope_parameters":
        {"rope_type": "llama3", "factor": 32.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}});
    assert_eq!(get(scaled.clone(), "rope_scaling"), json!({"rope_type": "llama3", "factor": 32.0}));
    assert_eq!(get(scaled.clone(), "partial_rotary_factor"), 0.5);
    assert_eq!(get(scaled, "rope_theta"), 1e4);

    let layered = json!({"model_type": "gemma3", "text_config": {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}});
    assert_eq!(get(layered.clone(), "rope_theta"), 1e6);
    assert_eq!(get(layered.clone(), "rope_local_base_freq"), 1e4);
    assert_eq!(get(layered, "rope_scaling"), json!({"rope_type": "linear", "factor": 8.0}));

    let old = json!({"model_type": "m", "rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 4},
                     "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}});
    assert_eq!(get(old.clone(), "rope_theta"), 1.0);
    assert_eq!(get(old, "rope_scaling"), json!({"type": "yarn", "rope_type": "yarn", "factor": 4}));
}

#[test]
fn quantization_gives_each_path_its_mode() {
    let config = config(json!({"model_type": "m", "quantization": {
        "group_size": 64, "bits": 4, "mode": "affine",
        "model.layers.0.mlp.gate": {"group_size": 32, "bits": 8},
        "lm_head": false,
        "model.embed_tokens": {"mode": "mxfp8"},
    }}))
    .unwrap();
    let q = config.quantization().unwrap();
    let mode = |bits, group, kind| Mode { bits, group, kind };
    assert_eq!(q.default_mode(), Some(mode(4, 64, Kind::Affine)));
    assert_eq!(q.for_path("model.layers.0.mlp.gate"), Some(Some(mode(8, 32, Kind::Affine))));
    assert_eq!(q.for_path("model.embed_tokens"), Some(Some(mode(8, 32, Kind::Mxfp8))));
    assert_eq!(q.for_path("lm_head"), Some(None));
    assert_eq!(q.for_path("model.layers.1.mlp.gate"), Some(Some(mode(4, 64, Kind::Affine))));
    assert_eq!(fp8().for_path("lm_head"), None);
}

#[test]
fn quantization_that_cannot_be_is_refused_with_what_can() {
    let refused = |q: Value| refusal(config(json!({"model_type": "m", "quantization": q})));
    for (q, expected) in [
        (json!({"group_size": 3, "bits": 4}), "quantization.group_size is 3: affine takes 32, 64 or 128"),
        (json!({"group_size": 0, "bits": 4}), "quantization.group_size is 0"),
        (json!({"group_size": 18446744073709551615u64, "bits": 4}), "quantization.group_size is 18446744073709551615"),
        (json!({"group_size": 64, "bits": 7}), "quantization.bits is 7: affine takes 2, 3, 4, 5, 6 or 8"),
        (json!({"group_size": 64, "bits": 0}), "quantization.bits is 0"),
        (json!({"group_size": 64, "bits": "4"}), "quantization.bits is \"4\""),
        (json!({"group_size": 64, "bits": 4, "mode": "mxfp4"}), "quantization.group_size is 64: mxfp4 takes 32"),
        (json!({"group_size": 16, "bits": 8, "mode": "nvfp4"}), "quantization.bits is 8: nvfp4 takes 4"),
        (json!({"group_size": 64, "bits": 4, "mode": "int4"}), "quantization.mode is \"int4\""),
        (json!({"group_size": 64, "bits": 4, "a.b": {"bits": 1}}), "quantization.a.b.bits is 1"),
        (json!("4bit"), "quantization is \"4bit\""),
    ] {
        let text = refused(q);
        assert!(text.contains(expected), "{text}");
    }
}

fn fp8() -> Quantization {
    Quantization::Other(Scheme::Fp8 { block: [128, 128] })
}

#[test]
fn other_schemes_are_told_apart() {
    let q = |json: Value| config(json).unwrap().quantization().cloned();
    let scheme = |json: Value| match q(json!({"model_type": "m", "quantization_config": json})) {
        Some(Quantization::Other(scheme)) => scheme,
        other => panic!("{other:?}"),
    };
    let gptq = |zeros_less_one| Scheme::Gptq { bits: 4, zeros_less_one };
    assert_eq!(scheme(json!({"quant_method": "gptq", "bits": 4, "group_size": 3})), gptq(true));
    assert_eq!(scheme(json!({"quant_method": "gptq", "checkpoint_format": "gptq_v2"})), gptq(false));
    assert_eq!(scheme(json!({"quant_method": "awq", "bits": 4, "version": "GEMM"})), Scheme::Awq);
    let block = scheme(json!({"quant_method": "fp8", "weight_block_size": [64, 32]}));
    assert_eq!(block, Scheme::Fp8 { block: [64, 32] });
    let block = json!({"quant_method": "compressed-tensors", "format": "float-quantized", "transform_config": {},
                       "config_groups": {"group_0": {"weights": {"num_bits": 8, "block_structure": [128, 64]}}}});
    assert_eq!(scheme(block), Scheme::CompressedTensors { block: [128, 64], bits: 8 });
    let bitnet = scheme(json!({"quant_method": "bitnet", "modules_to_not_convert": ["mlp.gate"]}));
    let Scheme::Bitnet(bitnet) = bitnet else { panic!("{bitnet:?}") };
    assert!(bitnet.divides && !bitnet.online && !bitnet.converts("lm_head"));
    assert!(!bitnet.converts("model.layers.0.mlp.gate") && bitnet.converts("model.layers.0.mlp.gate_proj"));
    let mxfp4 = q(json!({"model_type": "m", "quantization_config": {"quant_method": "mxfp4"}})).unwrap();
    assert_eq!(mxfp4.default_mode().unwrap().kind, Kind::Mxfp4);
    let both = json!({"model_type": "m", "quantization": {"group_size": 32, "bits": 8}, "quantization_config": {"quant_method": "x"}});
    assert_eq!(q(both).unwrap().default_mode().unwrap().bits, 8);
    let mlx = json!({"model_type": "m", "quantization_config": {"group_size": 32, "bits": 8}});
    assert_eq!(q(mlx).unwrap().default_mode().unwrap().group, 32);
    assert_eq!(q(json!({"model_type": "m", "quantization": null})), None);
}
