//! Writes a byte-level BPE tokenizer for a vocabulary of any size, so that a tiny checkpoint can be talked to.
//!
//! The ids: five special tokens (bos and eos where config.json puts them), newline and printable ASCII, 59 merges, and tokens that
//! no text has, as far as the vocabulary goes. Other bytes have no token and vanish, which random weights do not mind.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

const SPECIAL: [&str; 5] = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"];
/// Ids of single characters end here.
const CHARACTERS: usize = 101;

/// Most frequent first, in the byte-level alphabet, where `Ġ` is a space; each merge builds on single characters or earlier merges.
const MERGES: [&str; 59] = [
    "h e", "Ġ t", "i n", "e r", "a n", "Ġ a", "r e", "o n", "Ġt he", "o u", "e s", "a t", "Ġ s", "Ġ w", "e n", "o r",
    "Ġ o", "i t", "i s", "in g", "l l", "a r", "Ġ b", "e d", "Ġ c", "Ġ f", "a l", "l e", "Ġ p", "s t", "an d", "Ġ m",
    "Ġ d", "i c", "r o", "Ġ h", "l o", "Ġ i", "v e", "u t", "o t", "Ġ n", "i d", "he l", "hel lo", "Ġ l", "u r", "s e",
    "c h", "e l", "Ġ e", "Ġ g", "o w", "a s", "e t", "a d", "Ġ y", "i o", "l d",
];

const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + \
    '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Writes `tokenizer.json` and `tokenizer_config.json` for a model with this `config.json`.
pub fn write(config: &Value, out: &Path) -> Result<()> {
    let text = config.get("text_config").unwrap_or(config);
    let size = vocab_size(text)
        .or(vocab_size(config))
        .ok_or_else(|| Error::Config("config.json: vocab_size is missing".into()))?;
    // Gemma has eos before bos; a config without the keys has transformers' default, or, as here, the usual order.
    let mut special = SPECIAL;
    let wrapper = config.get("text_config").is_some();
    if text["bos_token_id"] == 2 || wrapper {
        special.swap(1, 2);
    }

    let characters = std::iter::once('Ċ').chain(std::iter::once('Ġ')).chain('!'..='~').map(String::from);
    let merged = MERGES.iter().map(|merge| merge.replace(' ', ""));
    let unused = (CHARACTERS + MERGES.len()..).map(|id| format!("<unused{id}>"));
    let tokens = special.map(String::from).into_iter().chain(characters).chain(merged).chain(unused).take(size);
    let vocab: Map<String, Value> = tokens.enumerate().map(|(id, token)| (token, id.into())).collect();
    let merges = &MERGES[..size.saturating_sub(CHARACTERS).min(MERGES.len())];

    let added = |id: usize| {
        json!({"id": id, "content": special[id], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
               "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": (0..special.len()).map(added).collect::<Vec<_>>(),
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": merges},
    });
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": false, "clean_up_tokenization_spaces": false,
        "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE,
        "model_max_length": text["max_position_embeddings"].as_u64().unwrap_or(2048),
    });
    for (name, json) in [("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)] {
        let path = out.join(name);
        std::fs::write(&path, format!("{json:#}\n")).map_err(Error::io(&path))?;
    }
    Ok(())
}

/// The vocabulary of the language model, however deep it lies.
fn vocab_size(config: &Value) -> Option<usize> {
    match config.get("vocab_size") {
        Some(size) => size.as_u64().map(|size| size as usize),
        None => config.as_object()?.values().find_map(vocab_size),
    }
}
