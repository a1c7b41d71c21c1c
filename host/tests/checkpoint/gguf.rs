//! GGUF files -> names, shapes, values and configuration of the checkpoints they were made from.

use crate::{
    gguf_file::{GgufFile, tiny},
    says,
};
use dylm::{
    config::Config,
    weights::{Dtype, Stored, gguf::Gguf},
};
use serde_json::json;
use std::fs;
use tempfile::tempdir;

fn open(file: &GgufFile) -> dylm::Result<Gguf> {
    let dir = tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    file.write(&path);
    Gguf::open(&path)
}

fn floats(tensor: &Stored) -> Vec<f32> {
    assert_eq!(tensor.dtype, Dtype::F32);
    tensor.bytes().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn llama_gets_its_names_shapes_and_rows_back() {
    let checkpoint = open(&tiny("llama")).unwrap().checkpoint().unwrap();
    let names: Vec<&str> = checkpoint.names().collect();
    let layer = "model.layers.0.";
    let expected = [
        "model.embed_tokens.weight".to_owned(),
        format!("{layer}input_layernorm.weight"),
        format!("{layer}post_attention_layernorm.weight"),
        format!("{layer}self_attn.k_proj.weight"),
        format!("{layer}self_attn.o_proj.weight"),
        format!("{layer}self_attn.q_proj.weight"),
        format!("{layer}self_attn.v_proj.weight"),
        "model.norm.weight".to_owned(),
    ];
    assert_eq!(names, expected);
    assert_eq!(checkpoint.get("model.embed_tokens.weight").unwrap().shape, [3, 8]);
    assert_eq!(checkpoint.get("model.layers.0.self_attn.k_proj.weight").unwrap().shape, [4, 8]);

    // Row r of the file begins with 8r. Heads of 4 rows stand there as 0 2 1 3.
    let rows = |name: &str| -> Vec<f32> {
        floats(checkpoint.get(&format!("{layer}self_attn.{name}.weight")).unwrap())
            .chunks(8)
            .map(|r| r[0] / 8.0)
            .collect()
    };
    assert_eq!(rows("q_proj"), [0., 2., 1., 3., 4., 6., 5., 7.]);
    assert_eq!(rows("k_proj"), [0., 2., 1., 3.]);
    assert_eq!(rows("v_proj"), [0., 1., 2., 3.]);
    let q = checkpoint.get("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!(q.permuted_heads, Some(2));
    assert_eq!(floats(q)[8..16], [16., 17., 18., 19., 20., 21., 22., 23.]);
}

#[test]
fn qwen_keeps_its_rows_and_its_biases() {
    let file = tiny("qwen2").counting("blk.0.attn_q.bias", &[8]).counting("output.weight", &[3, 8]);
    let gguf = open(&file).unwrap();
    let checkpoint = gguf.checkpoint().unwrap();
    let q = checkpoint.get("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!((q.permuted_heads, floats(q)[8]), (None, 8.0));
    assert_eq!(checkpoint.get("model.layers.0.self_attn.q_proj.bias").unwrap().shape, [8]);
    assert_eq!(checkpoint.get("lm_head.weight").unwrap().shape, [3, 8]);
    assert_eq!(gguf.config().unwrap()["tie_word_embeddings"], false);
}

#[test]
fn biases_of_permuted_rows_are_permuted_too() {
    let checkpoint = open(&tiny("llama").counting("blk.0.attn_k.bias", &[4])).unwrap().checkpoint().unwrap();
    assert_eq!(floats(checkpoint.get("model.layers.0.self_attn.k_proj.bias").unwrap()), [0., 2., 1., 3.]);
}

#[test]
fn gemma_norms_lose_the_one_that_the_converter_added() {
    let file = tiny("gemma3")
        .u32("gemma3.attention.sliding_window", 512)
        .u32("gemma3.attention.key_length", 4)
        .counting("blk.0.post_attention_norm.weight", &[8])
        .counting("blk.0.post_ffw_norm.weight", &[8])
        .counting("blk.0.attn_q_norm.weight", &[4]);
    let gguf = open(&file).unwrap();
    let checkpoint = gguf.checkpoint().unwrap();
    let layer = "model.layers.0.";
    for name in
        ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    {
        let norm = checkpoint.get(&format!("{layer}{name}.weight")).unwrap();
        assert_eq!(floats(norm), [-1., 0., 1., 2., 3., 4., 5., 6.], "{name}");
    }
    assert_eq!(floats(checkpoint.get("model.layers.0.self_attn.q_norm.weight").unwrap()), [-1., 0., 1., 2.]);
    assert_eq!(floats(checkpoint.get("model.norm.weight").unwrap())[0], -1.0);
    assert_eq!(floats(checkpoint.get("model.embed_tokens.weight").unwrap())[0], 0.0);
    let config = gguf.config().unwrap();
    for (key, value) in [
        ("model_type", json!("gemma3_text")),
        ("sliding_window", json!(512)),
        ("sliding_window_pattern", json!(6)),
        ("head_dim", json!(4)),
        ("query_pre_attn_scalar", json!(4)),
        ("rope_local_base_freq", json!(1e4)),
        ("rope_theta", json!(5e5)),
        ("hidden_activation", json!("gelu_pytorch_tanh")),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
}

#[test]
fn experts_come_stacked() {
    let file = tiny("qwen3moe")
        .u32("qwen3moe.expert_count", 4)
        .u32("qwen3moe.expert_used_count", 2)
        .u32("qwen3moe.expert_feed_forward_length", 6)
        .counting("blk.0.ffn_gate_inp.weight", &[4, 8])
        .counting("blk.0.ffn_gate_exps.weight", &[4, 6, 8])
        .counting("blk.0.ffn_down_exps.weight", &[4, 8, 6]);
    let gguf = open(&file).unwrap();
    let checkpoint = gguf.checkpoint().unwrap();
    let shape = |name: &str| checkpoint.get(&format!("model.layers.0.mlp.{name}.weight")).unwrap().shape.clone();
    assert_eq!(shape("gate"), [4, 8]);
    assert_eq!(shape("switch_mlp.gate_proj"), [4, 6, 8]);
    assert_eq!(shape("switch_mlp.down_proj"), [4, 8, 6]);
    let config = gguf.config().unwrap();
    assert_eq!((&config["num_experts"], &config["num_experts_per_tok"]), (&json!(4), &json!(2)));
    assert_eq!((&config["moe_intermediate_size"], &config["norm_topk_prob"]), (&json!(6), &json!(true)));

    let mixtral = tiny("llama").u32("llama.expert_count", 4).u32("llama.expert_used_count", 2);
    let mixtral = open(&mixtral.counting("blk.0.ffn_up_exps.weight", &[4, 6, 8])).unwrap();
    assert_eq!(mixtral.config().unwrap()["model_type"], "mixtral");
    assert!(mixtral.checkpoint().unwrap().get("model.layers.0.block_sparse_moe.switch_mlp.up_proj.weight").is_some());
}

#[test]
fn configuration_has_the_numbers_of_the_metadata() {
    let config = open(&tiny("llama")).unwrap().config().unwrap();
    for (key, value) in [
        ("model_type", json!("llama")),
        ("hidden_size", json!(8)),
        ("intermediate_size", json!(16)),
        ("num_attention_heads", json!(2)),
        ("num_key_value_heads", json!(1)),
        ("max_position_embeddings", json!(64)),
        ("rms_norm_eps", json!(1e-5)),
        ("rope_theta", json!(5e5)),
        ("rope_scaling", json!(null)),
        ("tie_word_embeddings", json!(true)),
        ("vocab_size", json!(3)),
        ("torch_dtype", json!("float32")),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    assert_eq!(Config::from_json(config, &[], "tiny.gguf").unwrap().model_type, "llama");
}

#[test]
fn rope_scaling_comes_from_metadata_or_from_factors() {
    let scaling = |file: GgufFile| open(&file).unwrap().config().unwrap()["rope_scaling"].clone();
    let yarn = tiny("qwen3")
        .string("qwen3.rope.scaling.type", "yarn")
        .f32("qwen3.rope.scaling.factor", 4.0)
        .u32("qwen3.rope.scaling.original_context_length", 16);
    assert_eq!(scaling(yarn), json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}));
    let linear = tiny("gemma3").string("gemma3.rope.scaling.type", "linear").f32("gemma3.rope.scaling.factor", 8.0);
    assert_eq!(scaling(linear), json!({"rope_type": "linear", "factor": 8.0}));
    let data = [1f32, 32.].iter().flat_map(|f| f.to_le_bytes()).collect();
    let factors = scaling(tiny("llama").tensor("rope_freqs.weight", &[2], 0, data));
    assert_eq!((&factors["rope_type"], &factors["attention_factor"]), (&json!("longrope"), &json!(1.0)));
    assert_eq!((&factors["short_factor"], &factors["long_factor"]), (&json!([1.0, 32.0]), &json!([1.0, 32.0])));
    let data = tiny("llama").counting("rope_freqs.weight", &[2]);
    says(open(&data).unwrap().config(), &["rope_freqs.weight: a factor that is not positive"]);
}

#[test]
fn a_list_for_each_layer_is_read_where_layers_agree() {
    let file = |heads: &[i32]| {
        let mut file = tiny("llama");
        file.metadata.retain(|(key, _)| !key.ends_with("head_count_kv"));
        open(&file.i32s("llama.attention.head_count_kv", heads)).unwrap()
    };
    assert_eq!(file(&[1, 1]).config().unwrap()["num_key_value_heads"], 1);
    says(file(&[1, 2]).config(), &["llama.attention.head_count_kv differs from layer to layer"]);
    says(file(&[-1]).config(), &["llama.attention.head_count_kv is not a size"]);
    says(file(&[0]).checkpoint(), &["head_count_kv is 0"]);
    says(file(&[3]).checkpoint(), &["4 rows are not 3 heads"]);
}

#[test]
fn blocks_of_every_kind_have_their_sizes() {
    for (code, dtype, elements, bytes) in [
        (2, Dtype::Q4_0, 32, 18),
        (3, Dtype::Q4_1, 32, 20),
        (6, Dtype::Q5_0, 32, 22),
        (7, Dtype::Q5_1, 32, 24),
        (8, Dtype::Q8_0, 32, 34),
        (10, Dtype::Q2K, 256, 84),
        (11, Dtype::Q3K, 256, 110),
        (12, Dtype::Q4K, 256, 144),
        (13, Dtype::Q5K, 256, 176),
        (14, Dtype::Q6K, 256, 210),
        (30, Dtype::BF16, 1, 2),
    ] {
        let file = GgufFile::new("llama").tensor("output.weight", &[elements, 3], code, vec![1; 3 * bytes]);
        let gguf = open(&file).unwrap();
        let tensor = &gguf.tensors["output.weight"];
        assert_eq!(
            (tensor.dtype, tensor.shape.as_slice(), tensor.len()),
            (dtype, &[3, elements as usize][..], 3 * bytes)
        );
        if elements > 1 {
            let half_a_block = GgufFile::new("llama").tensor("output.weight", &[elements / 2, 2], code, vec![1; bytes]);
            says(open(&half_a_block), &["output.weight: ", "is not a possible shape"]);
        }
    }
    let file = GgufFile::new("llama").tensor("output.weight", &[256, 1], 20, vec![0; 144]);
    says(open(&file), &["tiny.gguf: output.weight: type IQ4_NL is not supported"]);
}

#[test]
fn architectures_and_tensors_that_are_unknown_are_named() {
    says(open(&tiny("mamba")).unwrap().checkpoint(), &["architecture mamba is not read from GGUF"]);
    says(open(&tiny("mamba")).unwrap().config(), &["architecture mamba"]);
    let file = tiny("llama").counting("blk.0.ssm_in.weight", &[8]);
    says(open(&file).unwrap().checkpoint(), &["blk.0.ssm_in.weight: architecture llama has no such tensor"]);
    let mut file = tiny("llama");
    file.metadata.retain(|(key, _)| key != "llama.block_count");
    says(open(&file).unwrap().config(), &["llama.block_count is missing"]);
}

#[test]
fn a_split_model_is_opened_as_one() {
    let dir = tempdir().unwrap();
    let whole = tiny("llama");
    let (mut first, mut second) = (whole.clone().u32("split.count", 2), GgufFile::new("llama").u32("split.count", 2));
    let moved = first.tensors.pop().unwrap();
    second = second.tensor(&moved.0, &moved.1, moved.2, moved.4);
    first.write(&dir.path().join("m-00001-of-00002.gguf"));
    says(Gguf::open(&dir.path().join("m-00001-of-00002.gguf")), &["m-00002-of-00002.gguf"]);
    second.write(&dir.path().join("m-00002-of-00002.gguf"));
    let gguf = Gguf::open(&dir.path().join("m-00001-of-00002.gguf")).unwrap();
    assert_eq!(gguf.checkpoint().unwrap().len(), whole.tensors.len());
    says(Gguf::open(&dir.path().join("m-00002-of-00002.gguf")), &["give the first, named NAME-00001-of-00002.gguf"]);
    first.write(&dir.path().join("m-00002-of-00002.gguf"));
    says(Gguf::open(&dir.path().join("m-00001-of-00002.gguf")), &["also in an earlier part"]);
    fs::remove_dir_all(dir.path()).unwrap();
    says(Gguf::open(dir.path()), &["not a file"]);
}
