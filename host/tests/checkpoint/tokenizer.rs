//! Tokenizers built from GGUF metadata.

use crate::{
    gguf_file::{GgufFile, tiny},
    says,
};
use dylm::weights::gguf::Gguf;
use serde_json::Value;
use tempfile::tempdir;
use tokenizers::Tokenizer;

fn open(file: GgufFile) -> dylm::Result<(Tokenizer, Value)> {
    let dir = tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    file.write(&path);
    Gguf::open(&path).unwrap().tokenizer()
}

/// `<s>`, letters, a user's token and a few merges.
pub fn byte_level() -> GgufFile {
    tiny("llama")
        .string("tokenizer.ggml.model", "gpt2")
        .string("tokenizer.ggml.pre", "smollm")
        .strings("tokenizer.ggml.tokens", &["<s>", "</s>", "a", "b", "Ġ", "ab", "Ġab", "1", "11", "<tool>"])
        .i32s("tokenizer.ggml.token_type", &[3, 3, 1, 1, 1, 1, 1, 1, 1, 4])
        .strings("tokenizer.ggml.merges", &["a b", "Ġ ab", "1 1"])
        .u32("tokenizer.ggml.bos_token_id", 0)
        .u32("tokenizer.ggml.eos_token_id", 1)
        .string("tokenizer.chat_template", "{{ messages }}")
}

/// Pieces with scores, best first; every byte that is no piece has its own token.
pub fn sentencepiece() -> GgufFile {
    let pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "ab", "bc", "▁ab", "<0x64>"];
    let scores = [0., 0., 0., -3., -4., -5., -6., -2., -1., -2.5, 0.];
    tiny("llama")
        .string("tokenizer.ggml.model", "llama")
        .strings("tokenizer.ggml.tokens", &pieces)
        .f32s("tokenizer.ggml.scores", &scores)
        .i32s("tokenizer.ggml.token_type", &[2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 6])
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
}

fn ids(tokenizer: &Tokenizer, text: &str, special: bool) -> Vec<u32> {
    tokenizer.encode(text, special).unwrap().get_ids().to_vec()
}

#[test]
fn byte_level_bpe_merges_digits_apart_and_keeps_special_tokens_whole() {
    let (tokenizer, config) = open(byte_level()).unwrap();
    assert_eq!(ids(&tokenizer, "ab ab11", true), [5, 6, 7, 7]);
    assert_eq!(ids(&tokenizer, "<s>a<tool>b</s>", true), [0, 2, 9, 3, 1]);
    assert_eq!(tokenizer.decode(&[0, 5, 6, 9, 1], true).unwrap(), "ab ab<tool>");
    assert_eq!((&config["bos_token"], &config["eos_token"]), (&"<s>".into(), &"</s>".into()));
    assert_eq!((&config["chat_template"], &config["add_bos_token"]), (&"{{ messages }}".into(), &false.into()));
}

#[test]
fn bos_is_added_where_the_file_says_so() {
    let (tokenizer, config) = open(byte_level().bool("tokenizer.ggml.add_bos_token", true)).unwrap();
    assert_eq!(config["add_bos_token"], true);
    assert_eq!(ids(&tokenizer, "ab", true), [0, 5]);
    assert_eq!(ids(&tokenizer, "ab", false), [5]);
}

#[test]
fn several_chat_templates_keep_their_names() {
    let (_, config) = open(byte_level().string("tokenizer.chat_template.tool_use", "tools")).unwrap();
    let expected = serde_json::json!([{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "tools"}]);
    assert_eq!(config["chat_template"], expected);
}

#[test]
fn sentencepiece_merges_by_score_and_falls_back_to_bytes() {
    let (tokenizer, _) = open(sentencepiece()).unwrap();
    // "bc" (-1) beats "ab" (-2): ▁ a bc, not ▁ab c.
    assert_eq!(ids(&tokenizer, "abc", false), [3, 4, 8]);
    assert_eq!(ids(&tokenizer, "ab ab", true), [1, 9, 9]);
    assert_eq!(ids(&tokenizer, "d", false), [3, 10]);
    assert_eq!(tokenizer.decode(&[1, 9, 9, 10], true).unwrap(), "ab abd");
    let (tokenizer, _) = open(sentencepiece().bool("tokenizer.ggml.add_space_prefix", false)).unwrap();
    assert_eq!(ids(&tokenizer, "ab ab", false), [7, 9]);
}

#[test]
fn ends_of_text_are_eos_and_eot() {
    let eos = |file: GgufFile| {
        let dir = tempdir().unwrap();
        file.write(&dir.path().join("tiny.gguf"));
        Gguf::open(&dir.path().join("tiny.gguf")).unwrap().config().unwrap()["eos_token_id"].clone()
    };
    assert_eq!(eos(byte_level()), 1);
    assert_eq!(eos(byte_level().u32("tokenizer.ggml.eot_token_id", 9)), serde_json::json!([1, 9]));
    assert_eq!(eos(byte_level().u32("tokenizer.ggml.eot_token_id", 1)), 1);
    let named = tiny("gemma3")
        .strings("tokenizer.ggml.tokens", &["<eos>", "<end_of_turn>"])
        .i32s("tokenizer.ggml.token_type", &[3, 3])
        .u32("tokenizer.ggml.eos_token_id", 0);
    assert_eq!(eos(named), serde_json::json!([0, 1]));
}

#[test]
fn tokenizers_that_cannot_be_built_are_refused() {
    let without = |key: &str| {
        let mut file = byte_level();
        file.metadata.retain(|(k, _)| k != key);
        file
    };
    let renamed = |key: &str, value: &str| without(key).string(key, value);
    says(open(tiny("llama")), &["tokenizer.ggml.tokens is missing"]);
    says(open(renamed("tokenizer.ggml.pre", "viking")), &["tokenizer.ggml.pre is viking: known are gpt-2, smollm"]);
    says(open(renamed("tokenizer.ggml.model", "rwkv")), &["tokenizer.ggml.model is rwkv"]);
    says(open(without("tokenizer.ggml.merges")), &["tokenizer.ggml.merges is missing"]);
    let key = "tokenizer.ggml.merges";
    says(open(without(key).strings(key, &["ab"])), &["\"ab\" is not a pair"]);
    says(open(without(key).strings(key, &["a x"])), &["cannot be built"]);
    let key = "tokenizer.ggml.token_type";
    says(open(without(key).i32s(key, &[1])), &["10 tokens with 1 token types"]);
}

#[test]
fn each_pre_tokenizer_cuts_numbers_as_its_models_do() {
    // Merges would make any run of 1s one token; how far they get shows where the rule cuts.
    let tokens = ["<s>", "1", "11", "111", "1111", "11111", "a", "Ġ", "'", "s", "'s", "A", "aA"];
    let ids_of = |pre: &str, text: &str| {
        let file = tiny("llama")
            .string("tokenizer.ggml.model", "gpt2")
            .string("tokenizer.ggml.pre", pre)
            .strings("tokenizer.ggml.tokens", &tokens)
            .strings("tokenizer.ggml.merges", &["1 1", "11 1", "111 1", "1111 1", "' s", "a A"]);
        let (tokenizer, _) = open(file).unwrap();
        tokenizer.encode(text, false).unwrap().get_tokens().join("|")
    };
    for (pre, numbers, words) in [
        ("gpt-2", "11|111", "a|'s|aA"),
        ("smollm", "1|1|1|1|1", "a|'s|aA"),
        ("starcoder", "1|1|1|1|1", "a|'s|aA"),
        ("llama-bpe", "111|11", "a|'s|aA"),
        ("dbrx", "111|11", "a|'s|aA"),
        ("qwen2", "1|1|1|1|1", "a|'s|aA"),
        ("stablelm2", "1|1|1|1|1", "a|'s|aA"),
        ("tekken", "1|1|1|1|1", "a|'s|a|A"),
        ("gpt-4o", "111|11", "a|'s|a|A"),
    ] {
        assert_eq!(ids_of(pre, "11111"), numbers, "{pre}");
        assert_eq!(ids_of(pre, "a'saA"), words, "{pre}");
    }
}
