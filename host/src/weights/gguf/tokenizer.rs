//! GGUF's vocabulary -> the tokenizer that the model was converted from. What is short is written as the tokenizer.json would have it and
//! read by `tokenizers`; vocabulary and merges, which are not, are handed over as they are.
//! Two kinds exist: `gpt2`, byte-level BPE with its merges, and `llama`, SentencePiece, whose file has scores instead of merges;
//! those are turned into merges by the rule that transformers uses, best score first.

use super::{Gguf, Value, pre_tokenizer};
use crate::{
    error::{Error, Result},
    tokenizer::pairs,
};
use serde_json::{Map, Value as Json, json};
use std::{borrow::Cow, cmp::Reverse, collections::HashMap};
use tokenizers::{
    AddedToken, Tokenizer,
    models::bpe::{BPE, BpeBuilder, Merges, Vocab},
};

// tokenizer.ggml.token_type
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

pub(super) fn tokenizer(gguf: &Gguf) -> Result<(Tokenizer, Json)> {
    let vocabulary = Vocabulary::of(gguf)?;
    let (model, mut json, add_bos) = match gguf.metadata.get("tokenizer.ggml.model").and_then(Value::as_str) {
        Some("gpt2") => byte_level_bpe(gguf, &vocabulary)?,
        Some("llama") => sentencepiece_bpe(gguf, &vocabulary)?,
        other => {
            let name = other.unwrap_or("not stated");
            return Err(wrong(gguf, format!("tokenizer.ggml.model is {name}: gpt2 and llama are read")));
        }
    };
    let config = tokenizer_config(gguf, &vocabulary, add_bos);
    json["version"] = "1.0".into();
    json["post_processor"] = post_processor(gguf, &vocabulary, &config);
    let tokenizer = pairs::joined(json, model, vocabulary.added_tokens())
        .map_err(|e| wrong(gguf, format!("its tokenizer cannot be built ({e}): take the model's tokenizer.json")))?;
    Ok((tokenizer, config))
}

/// Tokens that end a text: `eos`, and `eot` (the end of a turn), from the metadata or, failing that, by its usual names.
pub(super) fn eos_token_ids(gguf: &Gguf) -> Vec<u64> {
    let mut ids: Vec<u64> = Vec::new();
    let id = |name: &str| gguf.unsigned(&format!("tokenizer.ggml.{name}_token_id"));
    ids.extend(id("eos"));
    match id("eot") {
        Some(eot) => ids.push(eot),
        None => {
            if let Ok(vocabulary) = Vocabulary::of(gguf) {
                let names = ["<|eot_id|>", "<|im_end|>", "<end_of_turn>"];
                let is_eot = |(i, token): (usize, &Cow<str>)| {
                    (vocabulary.kind(i) == CONTROL && names.contains(&&**token)).then_some(i as u64)
                };
                ids.extend(vocabulary.tokens.iter().enumerate().find_map(is_eot));
            }
        }
    }
    let mut seen = Vec::new();
    ids.retain(|id| u32::try_from(*id).is_ok() && !seen.contains(id) && (seen.push(*id), true).1);
    ids
}

struct Vocabulary<'a> {
    tokens: Vec<Cow<'a, str>>,
    kinds: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn of(gguf: &'a Gguf) -> Result<Self> {
        let tokens = gguf.metadata.get("tokenizer.ggml.tokens").and_then(Value::as_strings);
        let tokens = tokens.ok_or_else(|| wrong(gguf, "tokenizer.ggml.tokens is missing from its header"))?;
        let tokens: Vec<_> = tokens.iter().collect();
        let kinds = gguf.metadata.get("tokenizer.ggml.token_type").and_then(Value::as_numbers);
        let kinds: Vec<u64> =
            kinds.map(|list| list.iter().map(|n| n.as_u64().unwrap_or(NORMAL)).collect()).unwrap_or_default();
        if !kinds.is_empty() && kinds.len() != tokens.len() {
            return Err(wrong(
                gguf,
                format!("{} tokens with {} token types: the file is damaged", tokens.len(), kinds.len()),
            ));
        }
        Ok(Self { tokens, kinds })
    }

    fn kind(&self, id: usize) -> u64 {
        self.kinds.get(id).copied().unwrap_or(NORMAL)
    }

    fn token(&self, id: u64) -> Option<&str> {
        self.tokens.get(usize::try_from(id).ok()?).map(|token| &**token)
    }

    // Token -> id; of tokens that come twice the first is meant.
    fn ids(&self) -> Vocab {
        let mut ids = Vocab::with_capacity(self.tokens.len());
        for (id, token) in (0..).zip(&self.tokens) {
            ids.entry(token.to_string()).or_insert(id);
        }
        ids
    }

    fn added_tokens(&self) -> Vec<AddedToken> {
        let added = self.tokens.iter().enumerate().filter_map(|(id, token)| {
            let kind = self.kind(id);
            let added = matches!(kind, UNKNOWN | CONTROL | USER_DEFINED) && !token.is_empty();
            added.then(|| AddedToken::from(&**token, kind != USER_DEFINED).normalized(false))
        });
        added.collect()
    }
}

fn byte_level_bpe(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<(BpeBuilder, Json, bool)> {
    let name = match gguf.metadata.get("tokenizer.ggml.pre").and_then(Value::as_str) {
        Some(name) => name,
        // Files from before 2024-05 do not say.
        None if gguf.architecture()?.starts_with("qwen") => "qwen2",
        None if vocabulary.tokens.len() == 128_256 => "llama-bpe",
        None => "gpt-2",
    };
    let rules = pre_tokenizer::rules(name).ok_or_else(|| {
        wrong(
            gguf,
            format!(
                "tokenizer.ggml.pre is {name}: known are {}: take the model's tokenizer.json",
                pre_tokenizer::KNOWN
            ),
        )
    })?;
    let merges = gguf.metadata.get("tokenizer.ggml.merges").and_then(Value::as_strings);
    let merges = merges.ok_or_else(|| wrong(gguf, "tokenizer.ggml.merges is missing from its header"))?;
    let mut pairs = Merges::new();
    for merge in merges.iter() {
        // The first character is never the separator, even where it is a space.
        let cut = merge.char_indices().skip(1).find(|(_, c)| *c == ' ').map(|(at, _)| at);
        let pair = cut.map(|at| (merge[..at].to_owned(), merge[at + 1..].to_owned()));
        pairs.push(pair.ok_or_else(|| wrong(gguf, format!("tokenizer.ggml.merges: {merge:?} is not a pair")))?);
    }
    let json = json!({
        "normalizer": rules.normalizer,
        "pre_tokenizer": rules.pre_tokenizer,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
    });
    let model = BPE::builder().vocab_and_merges(vocabulary.ids(), pairs).ignore_merges(rules.ignore_merges);
    Ok((model, json, rules.add_bos))
}

fn sentencepiece_bpe(gguf: &Gguf, vocabulary: &Vocabulary) -> Result<(BpeBuilder, Json, bool)> {
    let scores = gguf.metadata.get("tokenizer.ggml.scores").and_then(Value::as_numbers);
    let scores: Vec<f64> =
        scores.map(|list| list.iter().map(|x| x.as_f64().unwrap_or(0.0)).collect()).unwrap_or_default();
    if scores.len() != vocabulary.tokens.len() {
        return Err(wrong(
            gguf,
            format!("{} tokens with {} scores: the file is damaged", vocabulary.tokens.len(), scores.len()),
        ));
    }
    let unknown = (0..vocabulary.tokens.len()).find(|&id| vocabulary.kind(id) == UNKNOWN);
    let unknown = unknown.and_then(|id| vocabulary.token(id as u64));
    let add_prefix = gguf.metadata.get("tokenizer.ggml.add_space_prefix").and_then(Value::as_bool).unwrap_or(true);

    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if add_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let json = json!({
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "decoder": {"type": "Sequence", "decoders": decoders},
    });
    let merges = merges_from_scores(vocabulary, &scores);
    let model = BPE::builder().vocab_and_merges(vocabulary.ids(), merges).fuse_unk(true).byte_fallback(true);
    let model = if let Some(unknown) = unknown { model.unk_token(unknown.to_owned()) } else { model };
    Ok((model, json, true))
}

// Every way to make a token of two others is a merge as good as the token's score.
fn merges_from_scores(vocabulary: &Vocabulary, scores: &[f64]) -> Merges {
    let plain = |id: &usize| matches!(vocabulary.kind(*id), NORMAL | USER_DEFINED);
    let pieces = || vocabulary.tokens.iter().enumerate().filter(|(id, _)| plain(id));
    let ids: HashMap<&str, usize> = pieces().map(|(id, token)| (&**token, id)).collect();
    let mut merges = Vec::new();
    for (id, token) in pieces() {
        let mut ways: Vec<(usize, usize)> = Vec::new();
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&left), Some(&right)) = (ids.get(left), ids.get(right)) {
                ways.push((left, right));
            }
        }
        ways.sort_unstable();
        merges.extend(ways.into_iter().map(|pair| (scores[id], pair)));
    }
    let lengths: Vec<Reverse<usize>> = vocabulary.tokens.iter().map(|token| Reverse(token.chars().count())).collect();
    let by_length = |(left, right): (usize, usize)| (lengths[left], lengths[right]);
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| by_length(a.1).cmp(&by_length(b.1))));
    let text = |id: usize| vocabulary.tokens[id].to_string();
    merges.into_iter().map(|(_, (left, right))| (text(left), text(right))).collect()
}

// The keys of tokenizer_config.json that generation reads.
fn tokenizer_config(gguf: &Gguf, vocabulary: &Vocabulary, add_bos: bool) -> Json {
    let mut config = Map::new();
    for (key, name) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        let id = gguf.unsigned(&format!("tokenizer.ggml.{name}_token_id"));
        if let Some(token) = id.and_then(|id| vocabulary.token(id)) {
            config.insert(key.into(), token.into());
        }
    }
    let flag = |key: &str| gguf.metadata.get(key).and_then(Value::as_bool);
    config.insert("add_bos_token".into(), flag("tokenizer.ggml.add_bos_token").unwrap_or(add_bos).into());
    config.insert("add_eos_token".into(), flag("tokenizer.ggml.add_eos_token").unwrap_or(false).into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    let template = |key: &str| gguf.metadata.get(key).and_then(Value::as_str);
    let named = gguf.metadata.keys().filter_map(|key| key.strip_prefix("tokenizer.chat_template."));
    let named: Vec<Json> = named
        .filter_map(|name| {
            Some(json!({"name": name, "template": template(&format!("tokenizer.chat_template.{name}"))?}))
        })
        .collect();
    if let Some(default) = template("tokenizer.chat_template") {
        let all = [vec![json!({"name": "default", "template": default})], named].concat();
        config.insert("chat_template".into(), if all.len() > 1 { all.into() } else { default.into() });
    }
    Json::Object(config)
}

// Puts bos before and eos behind a text that is encoded with special tokens.
fn post_processor(gguf: &Gguf, vocabulary: &Vocabulary, config: &Json) -> Json {
    let added = |flag: &str, name: &str| {
        let id = gguf.unsigned(&format!("tokenizer.ggml.{name}_token_id")).filter(|_| config[flag] == true)?;
        Some((vocabulary.token(id)?, id))
    };
    let (bos, eos) = (added("add_bos_token", "bos"), added("add_eos_token", "eos"));
    if bos.is_none() && eos.is_none() {
        return Json::Null;
    }
    let special = |token: Option<(&str, u64)>| token.map(|(t, _)| json!({"SpecialToken": {"id": t, "type_id": 0}}));
    let text = |id: &str| Some(json!({"Sequence": {"id": id, "type_id": 0}}));
    let list = |parts: Vec<Option<Json>>| parts.into_iter().flatten().collect::<Vec<_>>();
    let tokens: Map<String, Json> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(t, id)| (t.to_owned(), json!({"id": t, "ids": [id], "tokens": [t]})))
        .collect();
    json!({
        "type": "TemplateProcessing",
        "single": list(vec![special(bos), text("A"), special(eos)]),
        "pair": list(vec![special(bos), text("A"), special(eos), special(bos), text("B"), special(eos)]),
        "special_tokens": tokens,
    })
}

fn wrong(gguf: &Gguf, what: impl std::fmt::Display) -> Error {
    Error::Tokenizer(format!("{}: {what}", gguf.file().display()))
}
