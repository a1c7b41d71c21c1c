//! `tokenizer.ggml.pre` -> how text is cut into words before byte-level BPE merges within each: the rules of the model's own
//! tokenizer.json, which llama.cpp keeps under a name. A wrong rule gives wrong ids silently, so unknown names are refused.

use serde_json::{Value, json};

/// A name's rules.
pub(super) struct Rules {
    /// `pre_tokenizer` of tokenizer.json.
    pub pre_tokenizer: Value,
    /// `normalizer` of tokenizer.json.
    pub normalizer: Value,
    /// A word that is in the vocabulary whole is not built by merges.
    pub ignore_merges: bool,
    /// Whether texts begin with the bos token where the file does not say.
    pub add_bos: bool,
}

// What llama.cpp calls them. Contractions, words, numbers, punctuation, line ends, white space: these differ in how far each reaches.
const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|",
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const GPT_4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// The names that `rules` knows, for messages.
pub(super) const KNOWN: &str = "gpt-2, smollm, starcoder, llama-bpe, qwen2, tekken, gpt-4o";

pub(super) fn rules(name: &str) -> Option<Rules> {
    let plain =
        |pre_tokenizer: Value| Rules { pre_tokenizer, normalizer: Value::Null, ignore_merges: false, add_bos: false };
    Some(match name {
        "gpt-2" | "phi-2" | "mpt" | "olmo" | "jais" | "roberta-bpe" => plain(byte_level(true)),
        "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" | "exaone" | "minerva-7b" => {
            plain(sequence(vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)]))
        }
        "llama3" | "llama-v3" | "llama-bpe" | "falcon3" | "falcon-h1" | "pixtral" | "lfm2" => {
            Rules { ignore_merges: true, add_bos: true, ..plain(split_by(LLAMA_3)) }
        }
        "dbrx" | "smaug-bpe" => plain(split_by(LLAMA_3)),
        "qwen2" | "deepseek-r1-qwen" | "megrez" => {
            Rules { normalizer: json!({"type": "NFC"}), ..plain(split_by(QWEN_2)) }
        }
        "stablelm2" => plain(split_by(QWEN_2)),
        "tekken" => Rules { ignore_merges: true, add_bos: true, ..plain(split_by(TEKKEN)) },
        "gpt-4o" | "llama4" => plain(split_by(GPT_4O)),
        _ => return None,
    })
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn split_by(regex: &str) -> Value {
    let split = json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    sequence(vec![split, byte_level(false)])
}

fn sequence(steps: Vec<Value>) -> Value {
    json!({"type": "Sequence", "pretokenizers": steps})
}
