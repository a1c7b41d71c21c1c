//! Packed weights with something wrong, and settings that nobody reads: one sentence each that names what is wrong, and no panic.

use dylm::{
    config::Config,
    weights::{
        Checkpoint,
        recipe::{Pantry, Recipe},
    },
};
use safetensors::tensor::Dtype;
use serde_json::{Value, json};
use tests::packing::{self, Packing, Tensor};

type Change = fn(&mut Vec<Tensor>);

fn matrix(tensors: &[Tensor], quantization_config: &Value) -> dylm::Result<()> {
    let file = tempfile::NamedTempFile::new().unwrap();
    packing::write(tensors, file.path()).unwrap();
    let config = json!({"model_type": "m", "quantization_config": quantization_config});
    let quantization = Config::from_json(config, &[], "config.json")?.quantization().cloned();
    let pantry = Pantry { checkpoint: Checkpoint::open_file(file.path())?, quantization };
    let weight = Recipe::Stored("x.weight".into());
    pantry.shape(&weight)?;
    pantry.matrix(&weight).map(drop)
}

fn tensors(packing: Packing) -> Vec<Tensor> {
    let w: Vec<f32> = (0..16 * 96).map(|i| (i * 37 % 101) as f32 / 101.0 - 0.5).collect();
    let named = |t: Tensor| Tensor { name: format!("x{}", t.name), ..t };
    packing.pack(&w, 96).tensors.into_iter().map(named).collect()
}

fn at<'a>(tensors: &'a mut [Tensor], name: &str) -> &'a mut Tensor {
    tensors.iter_mut().find(|t| t.name == name).unwrap()
}

fn remove(tensors: &mut Vec<Tensor>, name: &str) {
    let before = tensors.len();
    tensors.retain(|t| t.name != name);
    assert_eq!(tensors.len() + 1, before, "{name} was not there");
}

/// Another first axis, the values cut or repeated.
fn rows(tensor: &mut Tensor, rows: usize) {
    let size = tensor.bytes.len() / tensor.shape[0];
    tensor.bytes = tensor.bytes.iter().copied().cycle().take(rows * size).collect();
    tensor.shape[0] = rows;
}

fn refuses(packing: Packing, change: Change, words: &[&str]) {
    let mut tensors = tensors(packing);
    matrix(&tensors, &packing.config()).unwrap();
    change(&mut tensors);
    let text =
        matrix(&tensors, &packing.config()).expect_err(&format!("{packing:?} should lack {words:?}")).to_string();
    for word in words {
        assert!(text.contains(word), "{packing:?}: {word:?} is not in: {text}");
    }
    assert!(text.starts_with("x.") && text.lines().count() == 1, "{text}");
}

const GPTQ: Packing = Packing::Gptq { bits: 4, group: 32, act_order: true, less_one: true };
const AWQ: Packing = Packing::Awq { group: 32 };
const INTS: Packing = Packing::Ints { bits: 4, group: 32 };
const FP8: Packing = Packing::Fp8 { block: [16, 32] };
const TERNARY: Packing = Packing::Ternary { divides: true };

#[test]
fn tensors_that_are_missing_are_named() {
    let missing = |packing, change: Change, name| refuses(packing, change, &[name, "not in the checkpoint"]);
    missing(GPTQ, |t| remove(t, "x.scales"), "x.scales");
    missing(GPTQ, |t| remove(t, "x.qzeros"), "x.qzeros");
    missing(AWQ, |t| remove(t, "x.scales"), "x.scales");
    missing(INTS, |t| remove(t, "x.weight_scale"), "x.weight_scale");
    missing(INTS, |t| remove(t, "x.weight_shape"), "x.weight_shape");
    missing(FP8, |t| remove(t, "x.weight_scale_inv"), "x.weight_scale_inv");
    missing(Packing::Nvfp4, |t| remove(t, "x.weight_scale"), "x.weight_scale");
    missing(Packing::Nvfp4, |t| remove(t, "x.weight_global_scale"), "x.weight_global_scale");
    missing(AWQ, |t| remove(t, "x.qweight"), "x.weight");
}

#[test]
fn tensors_that_do_not_fit_each_other_are_named_with_their_shapes() {
    refuses(GPTQ, |t| rows(at(t, "x.scales"), 7), &["x.qweight", "7 groups", "96 inputs"]);
    refuses(GPTQ, |t| rows(at(t, "x.qzeros"), 2), &["x.qzeros", "[2, 2]", "[3, 2]"]);
    refuses(GPTQ, |t| rows(at(t, "x.g_idx"), 95), &["x.qweight", "95 inputs"]);
    refuses(GPTQ, |t| at(t, "x.qweight").shape = vec![192], &["x.qweight", "two axes"]);
    refuses(GPTQ, |t| at(t, "x.qweight").dtype = Dtype::F32, &["x.qweight: F32 where I32 belongs"]);
    refuses(AWQ, |t| rows(at(t, "x.scales"), 5), &["x.qweight", "[5, 16]", "gemm"]);
    refuses(AWQ, |t| rows(at(t, "x.qweight"), 97), &["x.qweight", "[97, 2]"]);
    refuses(AWQ, |t| rows(at(t, "x.qzeros"), 1), &["x.qzeros", "[1, 2]", "[3, 2]"]);
    refuses(AWQ, |t| at(t, "x.scales").dtype = Dtype::I16, &["x.scales: I16 is not a type for scales"]);
    refuses(INTS, |t| rows(at(t, "x.weight_packed"), 15), &["x.weight_packed", "[15, 12]", "[16, 96]"]);
    refuses(INTS, |t| rows(at(t, "x.weight_scale"), 13), &["x.weight_scale", "[13, 3]", "[16, 96]"]);
    refuses(INTS, |t| at(t, "x.weight_shape").bytes = [0xff; 16].into(), &["x.weight_shape", "-1"]);
    refuses(INTS, |t| at(t, "x.weight_shape").bytes[8..].fill(0), &["x.weight_packed", "[16, 0]"]);
    refuses(INTS, |t| at(t, "x.weight_shape").bytes[8..15].fill(0xfe), &["x.weight_packed"]);
    refuses(Packing::Int8, |t| rows(at(t, "x.weight_scale"), 3), &["x.weight_scale", "[3, 1]"]);
    refuses(FP8, |t| rows(at(t, "x.weight_scale_inv"), 5), &["x.weight_scale_inv", "[5, 3]", "[16, 96]"]);
    refuses(FP8, |t| at(t, "x.weight_scale_inv").dtype = Dtype::I32, &["x.weight_scale_inv", "I32"]);
    refuses(Packing::Nvfp4, |t| rows(at(t, "x.weight_scale"), 4), &["x.weight_scale", "[4, 6]", "[16, 6]"]);
    refuses(Packing::Nvfp4, |t| rows(at(t, "x.weight_global_scale"), 2), &["x.weight_global_scale", "[2]"]);
    refuses(TERNARY, |t| rows(at(t, "x.weight_scale"), 2), &["x.weight_scale", "one scale"]);
    refuses(TERNARY, |t| at(t, "x.weight_scale").bytes.fill(0), &["x.weight_scale", "0 cannot divide"]);
}

#[test]
fn a_group_index_out_of_range_is_refused() {
    refuses(GPTQ, |t| at(t, "x.g_idx").bytes[0] = 3, &["x.weight", "g_idx", "3 groups"]);
    refuses(GPTQ, |t| at(t, "x.g_idx").bytes[..4].fill(0xff), &["x.g_idx", "-1"]);
    // A group of other columns than the rest is sound, if strange.
    let mut uneven = tensors(GPTQ);
    at(&mut uneven, "x.g_idx").bytes.fill(0);
    matrix(&uneven, &GPTQ.config()).unwrap();
}

#[test]
fn packed_weights_that_config_json_does_not_explain_are_refused() {
    for (packing, words) in
        [(GPTQ, "quant_method \\\"awq\\\" or"), (AWQ, "quant_method \\\"awq\\\" or"), (TERNARY, "BitNet models only")]
    {
        let text = matrix(&tensors(packing), &Value::Null).unwrap_err().to_string();
        assert!(text.contains(&words.replace('\\', "")), "{packing:?}: {text}");
    }
    // Everything else says itself what it is.
    for packing in [INTS, FP8, Packing::Int8, Packing::Nvfp4] {
        matrix(&tensors(packing), &Value::Null).unwrap();
    }
}

#[test]
fn blocks_of_another_size_than_16_bytes_are_refused() {
    let tensor = |name: &str, shape: &[usize]| {
        let (shape, count) = (shape.to_vec(), shape.iter().product());
        Tensor { name: name.into(), dtype: Dtype::U8, shape, bytes: vec![120; count] }
    };
    let blocks = |shape: &[usize], scales: &[usize]| {
        matrix(&[tensor("x.weight_blocks", shape), tensor("x.weight_scales", scales)], &Value::Null)
    };
    blocks(&[2, 6, 3, 16], &[2, 6, 3]).unwrap();
    for (shape, scales) in [(&[2, 6, 3, 15], &[2, 6, 3]), (&[2, 6, 3, 16], &[2, 3, 6]), (&[2, 6, 0, 16], &[2, 6, 0])] {
        let text = blocks(shape, scales).unwrap_err().to_string();
        assert!(text.starts_with("x.weight_") && text.lines().count() == 1, "{text}");
    }
    let text = blocks(&[16], &[]).unwrap_err().to_string();
    assert!(text.contains("x.weight_blocks"), "{text}");
}

#[test]
fn settings_that_nobody_reads_are_refused_with_what_is_read() {
    for (config, words) in [
        (
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
            "\"bitsandbytes\", which is not read: fp8, awq",
        ),
        (json!({"quant_method": "hqq"}), "\"hqq\", which is not read"),
        (json!({"quant_method": 4}), "quant_method is 4"),
        (json!({"quant_method": "awq", "version": "gemv"}), "version is \"gemv\": it must be gemm"),
        (json!({"quant_method": "awq", "bits": 3}), "bits is 3: it must be 4"),
        (json!({"quant_method": "gptq", "bits": 5}), "bits is 5: it must be 2, 3, 4 or 8"),
        (json!({"quant_method": "gptq", "bits": "4"}), "bits is \"4\""),
        (json!({"quant_method": "gptq", "checkpoint_format": "marlin"}), "checkpoint_format is \"marlin\""),
        (json!({"quant_method": "fp8", "weight_block_size": [128]}), "weight_block_size is [128]"),
        (json!({"quant_method": "fp8", "weight_block_size": [0, 128]}), "weight_block_size is [0,128]"),
        (json!({"quant_method": "compressed-tensors", "format": "marlin-24"}), "format is \"marlin-24\""),
        (
            json!({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}),
            "sparsity_config.format",
        ),
        (
            json!({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}}),
            "transform_config",
        ),
        (json!({"quant_method": "bitnet", "linear_class": "other"}), "linear_class is \"other\""),
        (json!({"quant_method": "bitnet", "use_rms_norm": true}), "use_rms_norm is true"),
    ] {
        let text = matrix(&[], &config).unwrap_err().to_string();
        assert!(text.starts_with("config.json: quantization_config.") && text.contains(words), "{config}: {text}");
        assert!(text.lines().count() == 1 && text.len() < 250, "{text}");
    }
}
