//! Holds the generated checkpoints to what make_tiny wrote down: the same bits, the same files, a tokenizer that fits.

use safetensors::{Dtype, SafeTensors};
use tests::tiny::{self, Checkpoint, Expected, Range, TensorSpec, WeightDtype};

#[test]
fn rust_and_python_generate_the_same_bits() {
    let entries = tiny::entries().unwrap();
    assert!(!entries.is_empty(), "no entries in {}", tiny::fixtures().display());
    for entry in entries {
        let checkpoint = Checkpoint::read(&entry).unwrap();
        let samples = Expected::read(&entry).unwrap().samples;
        // Three tensors at least; MLX-like names in few groups have no more.
        assert!(samples.len() >= 9, "{}", entry.display());
        for (name, index, bits) in samples {
            let tensor = checkpoint.tensors.iter().find(|tensor| tensor.name == name).unwrap();
            let value = tensor.values(checkpoint.seed).nth(index).unwrap();
            let ours = if matches!(tensor.range, Range::Bytes(..)) { value as u32 } else { value.to_bits() };
            assert_eq!(ours, bits, "{}: {name}[{index}] is {value}", entry.display());
        }
    }
}

#[test]
fn bytes_are_spread_over_their_whole_range() {
    let spec = TensorSpec { name: "blocks".to_owned(), shape: vec![32, 64], range: Range::Bytes(3, 6) };
    let (dtype, bytes) = spec.stored(7, WeightDtype::Bf16);
    assert_eq!(dtype, safetensors::Dtype::U8);
    for byte in 0..=255 {
        let count = bytes.iter().filter(|b| **b == byte).count();
        assert_eq!((450..575).contains(&count), (3..=6).contains(&byte), "{count} times {byte}");
        assert!(count == 0 || (3..=6).contains(&byte));
    }
}

#[test]
fn a_written_checkpoint_holds_every_tensor_in_the_order_of_the_list() {
    for entry in tiny::entries().unwrap() {
        let out = tempfile::tempdir().unwrap();
        tiny::write(&entry, out.path()).unwrap();
        let bytes = std::fs::read(out.path().join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let checkpoint = Checkpoint::read(&entry).unwrap();
        // The format's writer puts wider types first.
        let mut offsets = [None; 2];
        for tensor in &checkpoint.tensors {
            let view = file.tensor(&tensor.name).unwrap();
            assert_eq!(view.shape(), tensor.shape);
            let (dtype, bytes) = tensor.stored(checkpoint.seed, WeightDtype::F32);
            assert!((view.dtype(), view.data()) == (dtype, &bytes), "{}: {}", entry.display(), tensor.name);
            let at = view.data().as_ptr() as usize;
            let offset = &mut offsets[usize::from(dtype == Dtype::U8)];
            assert!(offset.is_none_or(|last| last < at), "{}: {} is out of order", entry.display(), tensor.name);
            *offset = Some(at);
        }
        assert_eq!(file.len(), checkpoint.tensors.len());
    }
}

#[test]
fn bf16_weights_are_the_f32_ones_rounded_to_nearest() {
    let entry = tiny::fixtures().join("llama");
    let out = tempfile::tempdir().unwrap();
    tiny::write_as(&entry, out.path(), WeightDtype::Bf16).unwrap();
    let bytes = std::fs::read(out.path().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let checkpoint = Checkpoint::read(&entry).unwrap();
    for tensor in &checkpoint.tensors {
        let view = file.tensor(&tensor.name).unwrap();
        for (pair, exact) in view.data().chunks_exact(2).zip(tensor.values(checkpoint.seed)) {
            let rounded = f32::from_bits(u32::from(u16::from_le_bytes(pair.try_into().unwrap())) << 16);
            assert!((rounded - exact).abs() <= exact.abs() / 256.0, "{}: {exact} became {rounded}", tensor.name);
        }
    }
    let config = std::fs::read_to_string(out.path().join("config.json")).unwrap();
    assert!(config.contains(r#""torch_dtype": "bfloat16""#), "{config}");
}

#[test]
fn every_tokenizer_has_exactly_one_token_per_logit() {
    for entry in tiny::entries().unwrap() {
        let out = tempfile::tempdir().unwrap();
        tiny::write(&entry, out.path()).unwrap();
        let tokenizer = std::fs::read_to_string(out.path().join("tokenizer.json")).unwrap();
        let tokenizer: serde_json::Value = serde_json::from_str(&tokenizer).unwrap();
        let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
        let mut ids: Vec<_> = vocab.values().map(|id| id.as_u64().unwrap() as usize).collect();
        ids.sort();
        let logits = Expected::read(&entry).unwrap().logits;
        assert!(ids.into_iter().eq(0..logits[0].len()), "{}", entry.display());
        for merge in tokenizer["model"]["merges"].as_array().unwrap() {
            let merge = merge.as_str().unwrap();
            let (left, right) = merge.split_once(' ').unwrap();
            for token in [left, right, &format!("{left}{right}")] {
                assert!(vocab.contains_key(token), "{}: merge {merge:?} needs {token:?}", entry.display());
            }
        }
    }
}
