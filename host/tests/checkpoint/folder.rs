//! Folders of safetensors shards.

use crate::{refusal, says, write_safetensors};
use dylm::weights::{Checkpoint, Dtype};
use std::fs;
use tempfile::tempdir;

const TWO: &str = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]}}"#;

#[test]
fn tensors_come_with_dtype_shape_and_their_own_bytes() {
    let dir = tempdir().unwrap();
    let data: Vec<u8> = (0..14).collect();
    write_safetensors(&dir.path().join("model.safetensors"), TWO, &data);
    write_safetensors(&dir.path().join("adapters.safetensors"), "damaged", &[]);
    let checkpoint = Checkpoint::open_folder(dir.path()).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((checkpoint.len(), checkpoint.total_bytes()), (2, 14));
    let b = checkpoint.get("b").unwrap();
    assert_eq!((b.dtype, b.shape.as_slice(), b.elements()), (Dtype::BF16, &[1, 3][..], 3));
    assert_eq!(&b.bytes()[..], &data[8..]);
}

#[test]
fn tensors_without_values_are_allowed() {
    let dir = tempdir().unwrap();
    let header = r#"{"a":{"dtype":"F32","shape":[0,4],"data_offsets":[0,0]},"b":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#;
    write_safetensors(&dir.path().join("model.safetensors"), header, &[7]);
    let checkpoint = Checkpoint::open_folder(dir.path()).unwrap();
    assert!(checkpoint.get("a").unwrap().is_empty());
    assert_eq!(checkpoint.get("b").unwrap().len(), 1);
}

#[test]
fn each_crafted_header_is_refused_with_file_and_tensor() {
    let one =
        |shape: &str, offsets: &str| format!(r#"{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"s":{{"dtype":"F32","shape":[2],"data_offsets":{a}}},"t":{{"dtype":"F32","shape":[2],"data_offsets":{b}}}}}"#
        )
    };
    let near = u64::MAX - 7;
    let cases: Vec<(&str, String, usize, &str)> = vec![
        ("overlap", two("[0,8]", "[4,12]"), 12, "t: data_offsets [4, 12]: overlaps"),
        ("aliasing", two("[0,8]", "[0,8]"), 8, "overlaps"),
        ("hole", two("[0,8]", "[16,24]"), 24, "t: data_offsets [16, 24]: leaves a hole"),
        ("past the end", one("[4]", "[0,16]"), 8, "t: data ends at 16, the file has 8"),
        ("trailing bytes", one("[2]", "[0,8]"), 12, "4 bytes after the last tensor"),
        ("reversed", one("[2]", "[8,0]"), 8, "t: data_offsets [8, 0] run backwards"),
        ("shape against bytes", one("[3]", "[0,8]"), 8, "t: F32 [3] does not take the 8 bytes"),
        ("product overflow", one("[4294967296,4294967296,4294967296]", "[0,8]"), 8, "t: F32 [4294967296"),
        (
            "offset sum near 2^64",
            two("[0,8]", &format!("[{near},{}]", u64::MAX)),
            8,
            "t: data ends at 18446744073709551615",
        ),
        ("both offsets near 2^64", one("[2]", &format!("[{near},{}]", u64::MAX)), 8, "t: data ends at"),
        ("offset above 2^64", one("[2]", "[0,36893488147419103232]"), 8, "t: "),
        ("negative offset", one("[2]", "[-8,0]"), 8, "t: "),
        ("negative dimension", one("[-2]", "[0,8]"), 8, "t: "),
        ("unknown dtype", one("[2]", "[0,8]").replace("F32", "F33"), 8, "t: dtype F33 is not supported"),
        ("dtype that no layer takes", one("[1]", "[0,8]").replace("F32", "C64"), 8, "t: dtype C64 is not supported"),
        ("missing key", r#"{"t":{"dtype":"F32","shape":[2]}}"#.into(), 8, "t: "),
        ("not an object", "[1,2,3]".into(), 0, "header is not as it should be"),
        ("not JSON", "{\"t\":".into(), 0, "header is not as it should be"),
        ("deep JSON", format!(r#"{{"t":{}}}"#, "[".repeat(100_000)), 0, "header is not as it should be"),
    ];
    for (what, header, data, expected) in cases {
        let dir = tempdir().unwrap();
        write_safetensors(&dir.path().join("model.safetensors"), &header, &vec![0; data]);
        let text = refusal(Checkpoint::open_folder(dir.path()));
        assert!(text.contains("model.safetensors: "), "{what}: {text}");
        assert!(text.contains(expected), "{what}: {text}");
        assert!(text.len() < 400, "{what}: {text}");
    }
}

#[test]
fn a_name_that_comes_twice_is_refused_within_a_file_and_over_shards() {
    let dir = tempdir().unwrap();
    let twice =
        r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
    write_safetensors(&dir.path().join("model.safetensors"), twice, &[0; 2]);
    refusal(Checkpoint::open_folder(dir.path()));
    let once = r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
    write_safetensors(&dir.path().join("model.safetensors"), once, &[0]);
    write_safetensors(&dir.path().join("model-2.safetensors"), once, &[0]);
    says(Checkpoint::open_folder(dir.path()), &["t: in ", "model-2.safetensors", "model.safetensors: keep one"]);
}

#[test]
fn lying_lengths_and_cut_files_are_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    let good = [&(TWO.len() as u64).to_le_bytes(), TWO.as_bytes(), &[0; 14][..]].concat();
    for cut in 0..good.len() {
        fs::write(&path, &good[..cut]).unwrap();
        says(Checkpoint::open_folder(dir.path()), &["model.safetensors: "]);
    }
    for length in [u64::MAX, u64::MAX - 8, 100_000_001, good.len() as u64] {
        fs::write(&path, [&length.to_le_bytes(), &good[8..]].concat()).unwrap();
        says(Checkpoint::open_folder(dir.path()), &["model.safetensors: ", "header"]);
    }
}

#[test]
fn the_index_must_say_what_the_headers_say() {
    let shard = |name: &str| format!(r#"{{"{name}":{{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}}}"#);
    let open = |index: &str| {
        let dir = tempdir().unwrap();
        write_safetensors(&dir.path().join("model-00001-of-00002.safetensors"), &shard("a"), &[1]);
        write_safetensors(&dir.path().join("model-00002-of-00002.safetensors"), &shard("b"), &[2]);
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        Checkpoint::open_folder(dir.path())
    };
    let map = |a: &str, b: &str| format!(r#"{{"metadata":{{}},"weight_map":{{"a":"{a}","b":"{b}"}}}}"#);
    let (one, two) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    assert_eq!(open(&map(one, two)).unwrap().len(), 2);

    for name in
        ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\\\x.safetensors", "x.bin", "", ".."]
    {
        says(open(&map(one, name)), &["model.safetensors.index.json: b is said to be in", "plain file name"]);
    }
    says(
        open(&map(one, "model-00003-of-00003.safetensors")),
        &["b is in model-00003-of-00003.safetensors, which is not in"],
    );
    says(open(&map(two, two)), &["a should be in model-00002-of-00002.safetensors and is in model-00001"]);
    says(
        open(&format!(r#"{{"weight_map":{{"a":"{one}"}}}}"#)),
        &["b of model-00002-of-00002.safetensors is not listed"],
    );
    says(
        open(&format!(r#"{{"weight_map":{{"a":"{one}","b":"{two}","c":"{two}"}}}}"#)),
        &["c should be in model-00002-of-00002.safetensors and is in no shard"],
    );
    says(open("{}"), &["not an index of shards"]);
    says(open("{\"weight_map\":[]}"), &["not an index of shards"]);
}

#[test]
fn a_folder_without_shards_is_refused_with_what_lies_there() {
    let with = |name: &str| {
        let dir = tempdir().unwrap();
        fs::write(dir.path().join(name), "x").unwrap();
        refusal(Checkpoint::open_folder(dir.path()))
    };
    assert!(with("pytorch_model.bin").contains("only pytorch_model.bin"));
    assert!(with("tiny.Q4_0.gguf").contains("tiny.Q4_0.gguf: give that file's path"));
    assert!(with("consolidated.safetensors").contains("only consolidated.safetensors"));
    assert!(with("config.json").contains("no model*.safetensors"));
}

#[test]
fn renaming_drops_and_never_merges() {
    let dir = tempdir().unwrap();
    write_safetensors(&dir.path().join("model.safetensors"), TWO, &[0; 14]);
    let checkpoint = Checkpoint::open_folder(dir.path()).unwrap();
    let only_a = checkpoint.clone().rename(|name| (name == "a").then(|| "x.a".into())).unwrap();
    assert_eq!(only_a.names().collect::<Vec<_>>(), ["x.a"]);
    says(checkpoint.rename(|_| Some("same".into())), &["same: in "]);
}
