//! Writes small GGUF files, good or damaged at will.

use std::{fs, path::Path};

pub const F32: u32 = 0;

/// What a file is to hold.
#[derive(Clone, Default)]
pub struct GgufFile {
    pub version: u32,
    pub metadata: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<Tensor>,
}

/// Name, dimensions from the innermost, ggml type, offset and bytes.
pub type Tensor = (String, Vec<u64>, u32, u64, Vec<u8>);

impl GgufFile {
    pub fn new(architecture: &str) -> Self {
        Self { version: 3, ..Self::default() }.string("general.architecture", architecture)
    }

    pub fn raw(mut self, key: &str, kind: u32, value: impl AsRef<[u8]>) -> Self {
        self.metadata.push((key.into(), [&kind.to_le_bytes(), value.as_ref()].concat()));
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.raw(key, 4, value.to_le_bytes())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, value.to_le_bytes())
    }

    pub fn bool(self, key: &str, value: bool) -> Self {
        self.raw(key, 7, [value as u8])
    }

    pub fn string(self, key: &str, value: &str) -> Self {
        self.raw(key, 8, string(value))
    }

    pub fn strings(self, key: &str, values: &[&str]) -> Self {
        let head = [8u32.to_le_bytes().to_vec(), (values.len() as u64).to_le_bytes().to_vec()].concat();
        self.raw(key, 9, [head, values.iter().flat_map(|v| string(v)).collect()].concat())
    }

    pub fn i32s(self, key: &str, values: &[i32]) -> Self {
        let head = [5u32.to_le_bytes().to_vec(), (values.len() as u64).to_le_bytes().to_vec()].concat();
        self.raw(key, 9, [head, values.iter().flat_map(|v| v.to_le_bytes()).collect()].concat())
    }

    pub fn f32s(self, key: &str, values: &[f32]) -> Self {
        let head = [6u32.to_le_bytes().to_vec(), (values.len() as u64).to_le_bytes().to_vec()].concat();
        self.raw(key, 9, [head, values.iter().flat_map(|v| v.to_le_bytes()).collect()].concat())
    }

    pub fn tensor(mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) -> Self {
        let offset =
            self.tensors.last().map_or(0, |(.., offset, data)| (offset + data.len() as u64).next_multiple_of(32));
        self.tensors.push((name.into(), dims.into(), kind, offset, data));
        self
    }

    /// An f32 tensor of this row-major shape, its values 0, 1, 2, ..
    pub fn counting(self, name: &str, shape: &[u64]) -> Self {
        let values = 0..shape.iter().product::<u64>();
        let dims: Vec<u64> = shape.iter().rev().copied().collect();
        self.tensor(name, &dims, F32, values.flat_map(|v| (v as f32).to_le_bytes()).collect())
    }

    pub fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            out.extend(string(key));
            out.extend(value);
        }
        for (name, dims, kind, offset, _) in &self.tensors {
            out.extend(string(name));
            out.extend((dims.len() as u32).to_le_bytes());
            out.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = self.header();
        out.resize(out.len().next_multiple_of(32), 0);
        let start = out.len();
        for (.., offset, data) in &self.tensors {
            let end = start + *offset as usize + data.len();
            out.resize(out.len().max(end), 0);
            out[end - data.len()..end].copy_from_slice(data);
        }
        out
    }

    pub fn write(&self, path: &Path) {
        fs::write(path, self.bytes()).unwrap();
    }
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// One layer of an architecture: 8 wide, 2 heads of 4, 1 key-value head, 3 tokens.
pub fn tiny(architecture: &str) -> GgufFile {
    let key = |name: &str| format!("{architecture}.{name}");
    GgufFile::new(architecture)
        .u32(&key("block_count"), 1)
        .u32(&key("context_length"), 64)
        .u32(&key("embedding_length"), 8)
        .u32(&key("feed_forward_length"), 16)
        .u32(&key("attention.head_count"), 2)
        .u32(&key("attention.head_count_kv"), 1)
        .f32(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .f32(&key("rope.freq_base"), 5e5)
        .counting("token_embd.weight", &[3, 8])
        .counting("blk.0.attn_norm.weight", &[8])
        .counting("blk.0.attn_q.weight", &[8, 8])
        .counting("blk.0.attn_k.weight", &[4, 8])
        .counting("blk.0.attn_v.weight", &[4, 8])
        .counting("blk.0.attn_output.weight", &[8, 8])
        .counting("blk.0.ffn_norm.weight", &[8])
        .counting("output_norm.weight", &[8])
}
