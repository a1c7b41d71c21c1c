//! Adapters that do not fit or make no sense: each is one sentence that names what is wrong.

use crate::*;

const A: &str = "model.layers.2.mlp.up_proj.lora_a";
const B: &str = "model.layers.2.mlp.up_proj.lora_b";
const PATH: &str = "model.layers.2.mlp.up_proj";

fn parts() -> Vec<Named> {
    vec![named(A, &[64, RANK]), named(B, &[RANK, 24])]
}

#[track_caller]
fn assert_refused<T>(result: dylm::Result<T>, sentence: &str) {
    let text = match result {
        Ok(_) => panic!("not refused: {sentence}"),
        Err(e) => e.to_string(),
    };
    assert!(text.contains(sentence), "{text}");
    assert!(!text.contains('\n'), "more than a sentence: {text}");
}

fn with_config(change: impl FnOnce(&mut Value)) -> dylm::Result<Adapters> {
    let mut config = mlx_config("lora");
    change(&mut config);
    Adapters::open(folder(&config, "adapters.safetensors", &parts()).path())
}

#[test]
fn a_folder_without_a_configuration_or_without_tensors_is_refused() {
    let empty = tempfile::tempdir().unwrap();
    assert_refused(Adapters::open(empty.path()), "no adapter_config.json: --adapter-path takes a folder");
    assert!(Adapters::open(&empty.path().join("nowhere")).is_err());
    std::fs::write(empty.path().join("adapter_config.json"), mlx_config("lora").to_string()).unwrap();
    assert_refused(Adapters::open(empty.path()), "no adapters.safetensors beside adapter_config.json");
    std::fs::write(empty.path().join("adapter_model.bin"), "").unwrap();
    assert_refused(Adapters::open(empty.path()), "only adapter_model.bin, which is not read");
    for kind in ["lora", "full"] {
        assert_refused(open_mlx(kind, &[]), "adapters.safetensors: has no tensors");
    }
    assert_refused(open_peft(&peft_config(), &[]), "adapter_model.safetensors: has no tensors");
}

#[test]
fn a_configuration_that_makes_no_sense_is_refused() {
    let parameter = |key: &'static str, value: Value| with_config(|c| c["lora_parameters"][key] = value);
    for rank in [json!(0), json!(65537), json!(-1), json!(1e300), json!("8"), json!(4.5)] {
        assert_refused(parameter("rank", rank.clone()), &format!("rank: {rank} is not a rank"));
    }
    assert_refused(parameter("rank", json!(8)), "lora_a: adapter has [64, 4], which is not of rank 8");
    assert_refused(parameter("scale", json!(1e300)), "scale: 1e+300 is not a finite number");
    assert_refused(parameter("scale", json!("20")), "scale: \"20\" is not a finite number");
    assert_refused(
        with_config(|c| c["lora_parameters"] = json!({"rank": 4, "alpha": 8})),
        "scale: is missing: it multiplies the low-rank product; \"alpha\" is PEFT's",
    );
    assert_refused(with_config(|c| c["lora_parameters"] = json!(null)), "lora_parameters: is missing");
    assert_refused(with_config(|c| c["lora_parameters"] = json!(3)), "lora_parameters: 3 is not an object");
    assert_refused(with_config(|c| c["fine_tune_type"] = json!("qlora")), "\"qlora\" is not lora, dora or full");
    assert_refused(with_config(|c| *c = json!([])), "not an adapter's configuration");
    // json.dump writes these for floats that are not finite.
    for scale in ["NaN", "Infinity", "1e999"] {
        let dir = folder(&mlx_config("lora"), "adapters.safetensors", &parts());
        let text = mlx_config("lora").to_string().replace("2.5", scale);
        assert!(text.contains(scale));
        std::fs::write(dir.path().join("adapter_config.json"), text).unwrap();
        assert_refused(Adapters::open(dir.path()), "not an adapter's configuration");
    }
}

#[test]
fn a_file_that_the_configuration_names_is_not_opened() {
    let other = folder(&mlx_config("lora"), "adapters.safetensors", &[named("elsewhere.lora_a", &[64, RANK])]);
    let path = other.path().to_str().unwrap();
    let adapters = with_config(|c| {
        for key in ["adapter_path", "adapter_file", "resume_adapter_file", "model", "base_model_name_or_path"] {
            c[key] = json!(path);
        }
    });
    assert_eq!(adapters.unwrap().names().collect::<Vec<_>>(), [PATH]);
}

#[cfg(unix)]
#[test]
fn a_link_out_of_the_folder_is_not_followed() {
    let other = folder(&mlx_config("lora"), "adapters.safetensors", &parts());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), mlx_config("lora").to_string()).unwrap();
    let target = other.path().join("adapters.safetensors");
    std::os::unix::fs::symlink(target, dir.path().join("adapters.safetensors")).unwrap();
    assert_refused(Adapters::open(dir.path()), "a link that leaves the model's folder");
}

#[test]
fn tensors_that_are_no_pair_are_refused() {
    assert_refused(open_mlx("lora", &parts()[..1]), &format!("{PATH}: the adapter has no B"));
    assert_refused(open_mlx("lora", &parts()[1..]), &format!("{PATH}: the adapter has no A"));
    assert_refused(open_mlx("dora", &parts()), &format!("{PATH}: the adapter is DoRA and has no magnitudes"));
    let m = named(&format!("{PATH}.m"), &[24]);
    let with_m = [parts(), vec![m.clone()]].concat();
    assert_refused(open_mlx("lora", &with_m), "adapter_config.json does not say DoRA");
    let weight = named(&format!("{PATH}.weight"), &[24, 64]);
    assert_refused(open_mlx("lora", &[parts(), vec![weight]].concat()), "up_proj.weight: not a part of an adapter");
    let experts = [named(A, &[3, RANK, 64]), named(B, &[3, 24, RANK]), m];
    assert_refused(open_mlx("dora", &experts), &format!("{PATH}: experts do not take DoRA"));
    assert_refused(open_mlx("lora", &[named(A, &[RANK]), named(B, &[RANK, 24])]), "lora_a: adapter has [4]");
    let halves = [named(A, &[64, RANK]), named(B, &[RANK + 1, 24])];
    assert_refused(open_mlx("lora", &halves), "lora_b: adapter has [5, 24], which is not of rank 4");
}

#[test]
fn an_adapter_of_another_shape_than_the_layer_is_refused() {
    let place = &places()[0];
    let layer = |rows, cols| weight(&numbers("w", rows * cols), rows, cols, formats()[0], place);
    let adapters = open_mlx("lora", &parts()).unwrap();
    assert_refused(
        adapters.linear(PATH, &layer(24, 32), place),
        "model.layers.2.mlp.up_proj.lora_a: adapter has [64, 4], the layer takes [32, 4]",
    );
    assert_refused(
        adapters.linear(PATH, &layer(16, 64), place),
        "lora_b: adapter has [4, 24], the layer takes [4, 16]",
    );
    assert_refused(
        adapters.embedding(PATH, &layer(24, 64), place),
        "lora_a: adapter has [64, 4], the layer takes [24, 4]",
    );
    let stack = open_mlx("lora", &[named(A, &[3, RANK, 64]), named(B, &[3, 24, RANK])]).unwrap();
    assert_refused(
        stack.expert([PATH], (1, 4), &layer(24, 64), place),
        "lora_a: adapter has [3, 4, 64], the layer takes [4, 4, 64]",
    );
    assert_refused(
        stack.linear(PATH, &layer(24, 64), place),
        "lora_a: adapter has [3, 4, 64], the layer takes [4, 64]",
    );
    let m = named(&format!("{PATH}.m"), &[64]);
    let dora = open_mlx("dora", &[parts(), vec![m]].concat()).unwrap();
    assert_refused(dora.linear(PATH, &layer(24, 64), place), "up_proj.m: adapter has [64], the layer takes [24]");
}

#[test]
fn layers_that_nobody_asked_for_are_named() {
    let pair =
        |path: &str| [named(&format!("{path}.lora_a"), &[64, RANK]), named(&format!("{path}.lora_b"), &[RANK, 24])];
    let place = &places()[0];
    let w = weight(&numbers("w", 24 * 64), 24, 64, formats()[0], place);
    let adapters = open_mlx("lora", &[pair("model.layers.0.foo"), pair("q")].concat()).unwrap();
    assert!(adapters.linear("q", &w, place).unwrap().is_some());
    assert!(adapters.linear("other", &w, place).unwrap().is_none());
    assert_refused(
        adapters.refuse_unused(),
        "model.layers.0.foo: the adapter changes a layer that this model does not have",
    );
    let many: Vec<Named> = (0..6).flat_map(|i| pair(&format!("model.layers.{i}.foo"))).collect();
    assert_refused(
        open_mlx("lora", &many).unwrap().refuse_unused(),
        "model.layers.3.foo and 2 more: the adapter changes layers",
    );
}

#[test]
fn a_layer_that_the_architecture_uses_in_another_form_is_refused() {
    let adapters = open_mlx("lora", &parts()).unwrap();
    let refused = adapters.refuse(&format!("{PATH}.weight"));
    assert_refused(refused, "the adapter changes this layer, which the architecture uses in another form");
    adapters.refuse("model.layers.0.mlp.gate_proj.weight").unwrap();
}

#[test]
fn peft_variants_that_compute_something_else_are_refused() {
    let parts = [
        named("base_model.model.q.lora_A.weight", &[RANK, 64]),
        named("base_model.model.q.lora_B.weight", &[24, RANK]),
    ];
    let with = |key: &str, value: Value| {
        let mut config = peft_config();
        config[key] = value;
        open_peft(&config, &parts)
    };
    assert_refused(with("peft_type", json!("IA3")), "peft_type: is IA3: only LORA is supported");
    assert_refused(with("fan_in_fan_out", json!(true)), "fan_in_fan_out: true is not supported");
    assert_refused(with("layer_replication", json!([[0, 4]])), "layer_replication: [[0,4]] is not supported");
    assert_refused(with("init_lora_weights", json!("pissa_niter_4")), "changes the base model's weights");
    assert_refused(with("alpha_pattern", json!({"[qk]": 3})), "[qk]: is a regular expression");
    assert_refused(with("rank_pattern", json!({"q": 3})), "which is not of rank 3");
    assert_refused(with("use_dora", json!(true)), "q: the adapter is DoRA and has no magnitudes");
    for (key, value) in [("init_lora_weights", json!(true)), ("target_parameters", json!([])), ("bias", json!("none"))]
    {
        with(key, value).unwrap();
    }
    let bias = named("base_model.model.q.lora_B.bias", &[24]);
    assert_refused(open_peft(&peft_config(), &[bias]), "lora_B.bias: not a part of a LoRA adapter as PEFT saves it");
}
