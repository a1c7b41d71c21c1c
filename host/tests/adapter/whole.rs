//! Whole tensors of an adapter in place of the checkpoint's.

use crate::*;
use dylm::weights::{bytes::Bytes, checkpoint::Checkpoint, stored::Dtype as Kind, stored::Stored};

const UP: &str = "model.layers.0.mlp.up_proj.weight";

fn checkpoint(tensors: &[(&str, Kind, &[usize])]) -> Checkpoint {
    let mut checkpoint = Checkpoint::default();
    for (name, kind, shape) in tensors {
        let bytes = Bytes::from(vec![0; kind.size_of_shape(shape).unwrap()]);
        checkpoint.insert(*name, Stored::new(*kind, shape.to_vec(), bytes, Path::new("base").into()).unwrap()).unwrap();
    }
    checkpoint
}

fn first(checkpoint: &Checkpoint, name: &str) -> f32 {
    let bytes = checkpoint.get(name).unwrap().bytes();
    f32::from_le_bytes(bytes[..4].try_into().unwrap())
}

#[test]
fn whole_tensors_replace_those_of_the_same_name() {
    let mut base = checkpoint(&[(UP, Kind::BF16, &[24, 64]), ("model.norm.weight", Kind::BF16, &[64])]);
    let up = named(UP, &[24, 64]);
    let adapters = open_mlx("full", std::slice::from_ref(&up)).unwrap();
    assert!(adapters.refuse_unused().unwrap_err().to_string().contains("were not laid over the checkpoint"));
    adapters.overlay(&mut base).unwrap();
    adapters.refuse_unused().unwrap();
    assert_eq!(first(&base, UP), up.values[0]);
    assert_eq!(base.get("model.norm.weight").unwrap().dtype, Kind::BF16);
    assert_eq!(base.len(), 2);
}

#[test]
fn a_dense_tensor_takes_the_scales_of_a_packed_one_away() {
    let (scales, biases) = ("model.layers.0.mlp.up_proj.scales", "model.layers.0.mlp.up_proj.biases");
    let packed =
        || checkpoint(&[(UP, Kind::U32, &[24, 8]), (scales, Kind::BF16, &[24, 1]), (biases, Kind::BF16, &[24, 1])]);
    let mut base = packed();
    open_mlx("full", &[named(UP, &[24, 64])]).unwrap().overlay(&mut base).unwrap();
    assert_eq!(base.names().collect::<Vec<_>>(), [UP]);
    for wrong in [[16, 64], [24, 8], [24, 1024]] {
        let error = open_mlx("full", &[named(UP, &wrong)]).unwrap().overlay(&mut packed()).unwrap_err().to_string();
        assert_eq!(error, format!("{UP}: adapter has {wrong:?}, the model has [24, 8] (packed)"));
    }
}

#[test]
fn whole_tensors_that_do_not_fit_are_refused() {
    let overlay = |name: &str, shape: &[usize], kind| {
        let mut base = checkpoint(&[(UP, kind, &[24, 64])]);
        open_mlx("full", &[named(name, shape)]).unwrap().overlay(&mut base).unwrap_err().to_string()
    };
    assert_eq!(overlay(UP, &[16, 64], Kind::F16), format!("{UP}: adapter has [16, 64], the model has [24, 64]"));
    assert_eq!(
        overlay("model.foo.weight", &[1], Kind::F16),
        "model.foo.weight: the adapter replaces a tensor that this model does not have"
    );
    assert_eq!(
        overlay(UP, &[24, 64], Kind::F8E4M3),
        format!("{UP}: adapter has F32, which cannot stand where the model has F8_E4M3")
    );
}

#[test]
fn wrapped_and_plain_names_meet() {
    let wrapped = "model.language_model.layers.0.mlp.up_proj.weight";
    for (in_base, in_adapter) in
        [(wrapped, UP), (UP, wrapped), (wrapped, "language_model.model.layers.0.mlp.up_proj.weight")]
    {
        let mut base = checkpoint(&[(in_base, Kind::BF16, &[24, 64])]);
        let new = named(in_adapter, &[24, 64]);
        open_mlx("full", std::slice::from_ref(&new)).unwrap().overlay(&mut base).unwrap();
        assert_eq!(first(&base, in_base), new.values[0]);
    }
}

#[test]
fn peft_s_saved_modules_replace_too_and_a_tied_head_s_copy_is_not_needed() {
    let embed = "model.embed_tokens.weight";
    let tensors = |head: &str| {
        let mut head = named(head, &[40, 16]);
        head.name = "base_model.model.lm_head.weight".into();
        let mut table = named("table", &[40, 16]);
        table.name = "base_model.model.model.embed_tokens.base_layer.weight".into();
        [head, table]
    };
    let mut base = checkpoint(&[(embed, Kind::BF16, &[40, 16])]);
    open_peft(&peft_config(), &tensors("table")).unwrap().overlay(&mut base).unwrap();
    assert_eq!(first(&base, embed), tensors("table")[1].values[0]);
    let untied = open_peft(&peft_config(), &tensors("head")).unwrap();
    assert!(untied.overlay(&mut base).unwrap_err().to_string().starts_with("lm_head.weight: the adapter replaces"));
    let mut base = checkpoint(&[(embed, Kind::BF16, &[40, 16]), ("lm_head.weight", Kind::BF16, &[40, 16])]);
    untied.overlay(&mut base).unwrap();
    assert_eq!(first(&base, "lm_head.weight"), tensors("head")[0].values[0]);
}
