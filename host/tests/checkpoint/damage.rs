//! Damaged GGUF headers, by design and by a seeded generator: refused with a sentence or read, never a panic.

use crate::{
    gguf_file::{GgufFile, string, tiny},
    says,
    tokenizer::{byte_level, sentencepiece},
    write_safetensors,
};
use dylm::weights::{Checkpoint, gguf::Gguf};
use std::{fs, path::Path};
use tempfile::tempdir;

fn open(path: &Path, bytes: &[u8]) -> dylm::Result<Gguf> {
    fs::write(path, bytes).unwrap();
    Gguf::open(path)
}

#[test]
fn a_file_cut_at_any_twentieth_is_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("cut.gguf");
    let (header, whole) = (byte_level().header().len(), byte_level().bytes());
    assert!(open(&path, &whole).is_ok());
    for part in 0..20 {
        says(open(&path, &whole[..header * part / 20]), &["cut.gguf: "]);
        says(open(&path, &whole[..header + (whole.len() - header) * part / 20]), &["cut.gguf: "]);
    }
    says(open(&path, &whole[..whole.len() - 1]), &["output_norm.weight: ", "download it again"]);
}

#[test]
fn absurd_numbers_are_refused_before_anything_is_allocated() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let patched = |at: usize, value: &[u8]| {
        let mut bytes = tiny("llama").bytes();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    for count in [u64::MAX, 1 << 63, 1 << 40, 1 << 20, 100_000] {
        says(open(&path, &patched(8, &count.to_le_bytes())), &["m.gguf: header of ", "tensors"]);
        says(open(&path, &patched(16, &count.to_le_bytes())), &["m.gguf: header of ", "keys"]);
        says(open(&path, &patched(24, &count.to_le_bytes())), &["m.gguf: "]);
    }
    let array = |kind: u32, count: u64| [kind.to_le_bytes().to_vec(), count.to_le_bytes().to_vec()].concat();
    let value = |kind: u32, bytes: Vec<u8>| GgufFile::new("llama").raw("k", kind, bytes).bytes();
    for count in [u64::MAX, 1 << 61, 1 << 32, 5_000_000] {
        says(open(&path, &value(9, array(4, count))), &["k: an array of"]);
        says(open(&path, &value(9, array(8, count))), &["k: an array of"]);
        says(open(&path, &value(8, count.to_le_bytes().to_vec())), &["k: "]);
    }
    says(open(&path, &value(9, array(9, 1))), &["k: an array of arrays"]);
    says(open(&path, &value(9, array(77, 1))), &["k: unknown value type 77"]);
    says(open(&path, &value(13, vec![0; 8])), &["k: unknown value type 13"]);
}

#[test]
fn versions_and_magic_that_are_not_ours_are_named() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let version = |bytes: [u8; 4]| {
        let mut file = tiny("llama").bytes();
        file[4..8].copy_from_slice(&bytes);
        file
    };
    assert!(open(&path, &version([2, 0, 0, 0])).is_ok());
    says(open(&path, &version([1, 0, 0, 0])), &["GGUF version 1"]);
    says(open(&path, &version([4, 0, 0, 0])), &["GGUF version 4: versions 2 and 3"]);
    says(open(&path, &version([0, 0, 0, 3])), &["big-endian"]);
    says(open(&path, b"not a model, though long enough for one"), &["not a GGUF file"]);
    says(open(&path, b""), &["not a GGUF file"]);
}

#[test]
fn tensors_that_cannot_be_where_they_say_are_named() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let at = |offset: u64, dims: &[u64]| {
        let mut file = GgufFile::new("llama").counting("a", &[16]).counting("b", &[16]);
        let data = vec![0; 128];
        file.tensors.truncate(2);
        let mut bytes = file.clone();
        bytes.tensors[1] = ("b".into(), dims.into(), 0, offset, data);
        // Only the header lies: the bytes stay those of the good file.
        [&bytes.header()[..], &vec![0; bytes.header().len().next_multiple_of(32) - bytes.header().len()], &[0; 128]]
            .concat()
    };
    assert!(open(&path, &at(64, &[16])).is_ok());
    says(open(&path, &at(0, &[16])), &["overlaps another tensor"]);
    says(open(&path, &at(32, &[8])), &["b: overlaps another tensor"]);
    says(open(&path, &at(65, &[8])), &["b: offset 65 is not a multiple of 32"]);
    says(open(&path, &at(64, &[17])), &["b: 68 bytes at 64, the file has 128"]);
    says(open(&path, &at(u64::MAX - 31, &[16])), &["b: 64 bytes at 18446744073709551584"]);
    says(open(&path, &at(64, &[1 << 62, 1 << 62])), &["b: ", "not a possible shape"]);
    says(open(&path, &at(64, &[1, 1, 1, 1, 16])), &["b: 5 dimensions"]);
    let twice = GgufFile::new("llama").counting("a", &[8]).counting("a", &[8]);
    says(open(&path, &twice.bytes()), &["a: twice in its header"]);
    let twice = GgufFile::new("llama").u32("k", 1).u32("k", 2);
    says(open(&path, &twice.bytes()), &["k: twice in its header"]);
    for alignment in [0, 3, 1 << 30] {
        says(open(&path, &tiny("llama").u32("general.alignment", alignment).bytes()), &["general.alignment"]);
    }
    says(open(&path, &[&GgufFile::new("x").header()[..16], &1u64.to_le_bytes(), &string("k")].concat()), &["m.gguf: "]);
}

/// xorshift64*: the same damage on every machine.
struct Damage(u64);

impl Damage {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % n
    }

    fn spoil(&mut self, bytes: &mut Vec<u8>, header: usize) {
        for _ in 0..=self.below(3) {
            let at = self.below(header.min(bytes.len()));
            match self.below(6) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                2 => {
                    let value = [u64::MAX, 1 << 63, 1 << 32, 0, bytes.len() as u64][self.below(5)];
                    let end = bytes.len().min(at + 8);
                    bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
                }
                3 => drop(bytes.remove(at)),
                4 => bytes.insert(at, self.below(256) as u8),
                _ => bytes.truncate(at.max(1)),
            }
        }
    }
}

#[test]
fn three_thousand_damaged_gguf_files_are_read_or_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let files = [byte_level(), sentencepiece(), tiny("gemma3"), tiny("qwen3")];
    let good: Vec<(Vec<u8>, usize)> = files.iter().map(|f| (f.bytes(), f.header().len())).collect();
    let mut damage = Damage(0x5eed);
    let (mut opened, mut refused) = (0, 0);
    for round in 0..3000 {
        let (mut bytes, header) = good[round % good.len()].clone();
        damage.spoil(&mut bytes, header);
        match open(&path, &bytes) {
            Ok(gguf) => {
                opened += 1;
                if let Ok(checkpoint) = gguf.checkpoint() {
                    checkpoint.iter().for_each(|(_, tensor)| assert_eq!(tensor.bytes().len(), tensor.len()));
                }
                let _ = (gguf.config(), gguf.tokenizer());
            }
            Err(_) => refused += 1,
        }
    }
    assert!(opened > 100 && refused > 100, "{opened} opened, {refused} refused");
}

#[test]
fn three_thousand_damaged_safetensors_files_are_read_or_refused() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    // Long names and comments, so that much of the damage is survivable.
    let (name, comment) = ("model.layers.0.".repeat(8), "no one reads this ".repeat(40));
    let header = format!(
        r#"{{"__metadata__":{{"format":"{comment}"}},"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"b":{{"dtype":"BF16","shape":[1,3],"data_offsets":[8,14]}}}}"#
    );
    write_safetensors(&path, &header, &[0; 14]);
    let good = fs::read(&path).unwrap();
    let mut damage = Damage(0xdead);
    let (mut opened, mut refused) = (0, 0);
    for _ in 0..3000 {
        let mut bytes = good.clone();
        damage.spoil(&mut bytes, 8 + header.len());
        fs::write(&path, &bytes).unwrap();
        match Checkpoint::open_folder(dir.path()) {
            Ok(checkpoint) => {
                opened += 1;
                checkpoint.iter().for_each(|(_, tensor)| assert_eq!(tensor.bytes().len(), tensor.len()));
            }
            Err(_) => refused += 1,
        }
    }
    assert!(opened > 50 && refused > 100, "{opened} opened, {refused} refused");
}
