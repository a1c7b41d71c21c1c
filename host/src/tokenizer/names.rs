//! tokenizer_config.json -> the tokenizer's special tokens and what it puts around a prompt, as transformers applies them.

use serde_json::{Value as Json, json};
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

use crate::error::{Error, Result};

/// Tokens around a thought, in the spellings of the model families.
pub(super) const THINKING: [(&str, &str); 4] = [
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"),
];

const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// A token in a config: its text, or an object with `content` and flags.
fn added(json: &Json, special: bool) -> Option<AddedToken> {
    let text = json.as_str().or_else(|| json["content"].as_str()).filter(|t| !t.is_empty())?;
    let flag = |name: &str, default: bool| json[name].as_bool().unwrap_or(default);
    let special = flag("special", special) || special;
    Some(
        AddedToken::from(text, special)
            .lstrip(flag("lstrip", false))
            .rstrip(flag("rstrip", false))
            .single_word(flag("single_word", false))
            .normalized(flag("normalized", !special)),
    )
}

fn text_of(json: &Json) -> Option<&str> {
    json.as_str().or_else(|| json["content"].as_str())
}

/// Named tokens as the template's variables.
pub(super) fn variables(config: &Json) -> Vec<(String, String)> {
    let named = NAMED.iter().filter_map(|n| Some((n.to_string(), text_of(&config[*n])?.to_owned())));
    let extra = ["additional_special_tokens", "extra_special_tokens"].into_iter().filter_map(|n| config[n].as_object());
    let extra = extra.flatten().filter_map(|(n, t)| Some((n.clone(), text_of(t)?.to_owned())));
    named.chain(extra).collect()
}

/// Adds the config's tokens to `tokenizer` and sets what goes around a prompt. Padding and truncation are switched off: a prompt is
/// never cut silently.
pub(super) fn apply_config(tokenizer: &mut Tokenizer, config: &Json) -> Result<()> {
    let failed = |e: tokenizers::Error| {
        Error::Tokenizer(format!("tokenizer_config.json: its tokens do not fit tokenizer.json: {e}"))
    };
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(failed)?;
    let mut tokens: Vec<AddedToken> = Vec::new();
    if let Some(decoder) = config["added_tokens_decoder"].as_object() {
        let mut listed: Vec<(u32, AddedToken)> =
            decoder.iter().filter_map(|(id, t)| Some((id.parse().ok()?, added(t, false)?))).collect();
        listed.sort_by_key(|(id, _)| *id);
        let known = tokenizer.get_added_tokens_decoder();
        tokens.extend(listed.into_iter().filter(|(id, t)| known.get(id) != Some(t)).map(|(_, t)| t));
    }
    let extra = ["additional_special_tokens", "extra_special_tokens"].map(|n| &config[n]);
    let lists = extra.iter().filter_map(|j| j.as_array()).flatten();
    let maps = extra.iter().filter_map(|j| j.as_object()).flatten().map(|(_, t)| t);
    let known = tokenizer.get_added_vocabulary().get_vocab();
    for json in NAMED.iter().map(|n| &config[*n]).chain(lists).chain(maps) {
        if let Some(token) = added(json, true)
            && !known.contains_key(&token.content)
            && !tokens.iter().any(|t| t.content == token.content)
        {
            tokens.push(token);
        }
    }
    if !tokens.is_empty() {
        tokenizer.add_tokens(tokens).map_err(failed)?;
    }
    if config["add_bos_token"].is_boolean() || config["add_eos_token"].is_boolean() {
        let around = frame(tokenizer, config)?;
        tokenizer.with_post_processor(Some(around));
    }
    Ok(())
}

/// `bos text eos`, with those of the two that the config asks for.
fn frame(tokenizer: &Tokenizer, config: &Json) -> Result<PostProcessorWrapper> {
    let mut known = json!({});
    let mut piece = |flag: &str, name: &str| -> Vec<Json> {
        let token = text_of(&config[name]).filter(|_| config[flag] == true);
        let Some((token, id)) = token.and_then(|t| Some((t, tokenizer.token_to_id(t)?))) else { return vec![] };
        known[token] = json!({"id": token, "ids": [id], "tokens": [token]});
        vec![json!({"SpecialToken": {"id": token, "type_id": 0}})]
    };
    let (bos, eos) = (piece("add_bos_token", "bos_token"), piece("add_eos_token", "eos_token"));
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let single: Vec<Json> = [bos, vec![sequence("A")], eos].concat();
    let pair: Vec<Json> = [single.clone(), vec![sequence("B")]].concat();
    let whole = json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known});
    serde_json::from_value(whole)
        .map_err(|e| Error::Tokenizer(format!("tokenizer_config.json: bos and eos cannot be added: {e}")))
}
