//! A model folder's tokenizer files -> the pieces that `Tokenizer` is made of.
//! tokenizer.json is the truth; the other files add names (bos, eos), flags and chat templates, later files winning as in transformers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::{Value as Json, json};

use crate::error::{Error, Result};

/// Largest tokenizer.json (the largest known ones have 40 MB), and largest of every other file.
const MAX_TOKENIZER: u64 = 256 << 20;
const MAX_OTHER: u64 = 16 << 20;

/// What a folder holds.
pub(super) struct Files {
    pub tokenizer: tokenizers::Tokenizer,
    pub config: Json,
    /// Template name (`default`, `tool_use`, ..) -> the file that it is from and its text.
    pub templates: BTreeMap<String, (String, String)>,
}

/// Reads `dir`.
pub(super) fn read_folder(dir: &Path) -> Result<Files> {
    let mut config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or_else(|| json!({}));
    if !config.is_object() {
        return Err(Error::Tokenizer("tokenizer_config.json: not a JSON object".into()));
    }
    if let Some(Json::Object(names)) = read_json(&dir.join("special_tokens_map.json"))? {
        for (name, token) in names {
            if config.get(&name).is_none_or(Json::is_null) {
                config[&name] = token;
            }
        }
    }
    let tokenizer = match read_capped(&dir.join("tokenizer.json"), MAX_TOKENIZER)? {
        Some(bytes) => parse("tokenizer.json", &bytes)?,
        None => build_from_merges(dir, &config)?,
    };
    let mut templates = templates_in(&config, "tokenizer_config.json")?;
    if let Some(legacy) = read_json(&dir.join("chat_template.json"))? {
        templates.extend(templates_in(&legacy, "chat_template.json")?);
    }
    if let Some(text) = read_text(&dir.join("chat_template.jinja"))? {
        templates.insert("default".into(), ("chat_template.jinja".into(), text));
    }
    if let Ok(entries) = fs::read_dir(dir.join("additional_chat_templates")) {
        for path in entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "jinja")).take(64)
        {
            let Some(name) = path.file_stem().and_then(|n| n.to_str()) else { continue };
            if let Some(text) = read_text(&path)? {
                templates.insert(name.to_owned(), (format!("additional_chat_templates/{name}.jinja"), text));
            }
        }
    }
    Ok(Files { tokenizer, config, templates })
}

/// The `chat_template` of a config: one text, or a list of `{name, template}`.
pub(super) fn templates_in(config: &Json, file: &str) -> Result<BTreeMap<String, (String, String)>> {
    let mut found = BTreeMap::new();
    let mut add =
        |name: &str, text: &str| found.insert(name.to_owned(), (format!("chat_template of {file}"), text.to_owned()));
    let wrong =
        || Error::Tokenizer(format!("{file}: chat_template is neither a text nor a list of {{name, template}}"));
    match config.get("chat_template") {
        None | Some(Json::Null) => {}
        Some(Json::String(text)) => _ = add("default", text),
        Some(Json::Array(list)) => {
            for item in list {
                match (item["name"].as_str(), item["template"].as_str()) {
                    (Some(name), Some(text)) => add(name, text),
                    _ => return Err(wrong()),
                };
            }
        }
        Some(Json::Object(map)) => {
            for (name, text) in map {
                add(name, text.as_str().ok_or_else(wrong)?);
            }
        }
        Some(_) => return Err(wrong()),
    }
    Ok(found)
}

fn parse(name: &str, bytes: &[u8]) -> Result<tokenizers::Tokenizer> {
    let of_any_kind = || tokenizers::Tokenizer::from_bytes(bytes);
    super::shielded(name, || super::pairs::read(bytes).map_or_else(of_any_kind, Ok))
        .map_err(|e| Error::Tokenizer(format!("{e}; fetch the file again or update the model")))
}

/// GPT-2's and Qwen2's tokenizers from vocab.json and merges.txt; any other layout is refused with the cure.
fn build_from_merges(dir: &Path, config: &Json) -> Result<tokenizers::Tokenizer> {
    let class = config["tokenizer_class"].as_str().unwrap_or("GPT2Tokenizer").trim_end_matches("Fast").to_owned();
    let (vocab, merges) = (read_json(&dir.join("vocab.json"))?, read_text(&dir.join("merges.txt"))?);
    let has = |name: &str| dir.join(name).exists();
    let (Some(vocab), Some(merges), "GPT2Tokenizer" | "Qwen2Tokenizer") = (vocab, merges, class.as_str()) else {
        let found = ["tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json"].into_iter().find(|n| has(n));
        let found = found.map_or("no tokenizer file".to_owned(), |n| format!("only {n} ({class})"));
        return Err(Error::Tokenizer(format!(
            "{}: there is {found}, dylm reads tokenizer.json; write one with Python: transformers.AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            dir.display()
        )));
    };
    let merges: Vec<&str> = merges.lines().filter(|l| !l.starts_with("#version") && !l.trim().is_empty()).collect();
    let spaced = config["add_prefix_space"].as_bool().unwrap_or(false);
    let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": spaced, "trim_offsets": true, "use_regex": regex});
    // The pattern is part of Qwen2's published tokenizer.json.
    let qwen = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let (normalizer, pre_tokenizer) = match class.as_str() {
        "Qwen2Tokenizer" => {
            let split = json!({"type": "Split", "pattern": {"Regex": qwen}, "behavior": "Isolated", "invert": false});
            (json!({"type": "NFC"}), json!({"type": "Sequence", "pretokenizers": [split, bytes(false)]}))
        }
        _ => (Json::Null, bytes(true)),
    };
    let whole = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null, "decoder": bytes(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "",
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": merges,
        },
    });
    parse("vocab.json and merges.txt", whole.to_string().as_bytes())
}

fn read_capped(path: &Path, cap: u64) -> Result<Option<Vec<u8>>> {
    match fs::metadata(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path)(e)),
        Ok(m) if !m.is_file() => return Err(Error::Tokenizer(format!("{}: not a file", path.display()))),
        Ok(m) if m.len() > cap => {
            return Err(Error::Tokenizer(format!(
                "{}: {} bytes, {cap} is the limit; is this the right file?",
                path.display(),
                m.len()
            )));
        }
        Ok(_) => {}
    }
    fs::read(path).map(Some).map_err(Error::io(path))
}

fn read_text(path: &Path) -> Result<Option<String>> {
    let Some(bytes) = read_capped(path, MAX_OTHER)? else { return Ok(None) };
    String::from_utf8(bytes).map(Some).map_err(|_| Error::Tokenizer(format!("{}: not UTF-8 text", path.display())))
}

fn read_json(path: &Path) -> Result<Option<Json>> {
    let Some(bytes) = read_capped(path, MAX_OTHER)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::Tokenizer(format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tokenizer_read_as_one_of_pairs_is_what_it_is_as_one_of_any_kind() {
        let token = |id: u32, content: &str, special: bool| json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false, "rstrip": true, "normalized": false});
        let whole = |model: Json| {
            json!({
                "version": "1.0", "truncation": null, "padding": null, "normalizer": {"type": "NFC"},
                "added_tokens": [token(2, "ab", true), token(9, "<new>", false), token(10, "<|x|>", true)],
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
                "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
                "model": model,
            })
        };
        let pairs = |merges: Json| {
            json!({
                "type": "BPE", "dropout": null, "unk_token": "a", "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": true, "byte_fallback": false, "ignore_merges": true, "vocab": {"a": 0, "b": 1, "ab": 2, "abb": 3}, "merges": merges,
            })
        };
        for model in [
            pairs(json!(["a b", "ab b"])),
            pairs(json!([["a", "b"], ["ab", "b"]])),
            json!({"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}),
        ] {
            let bytes = whole(model).to_string().into_bytes();
            let text = |t: &tokenizers::Tokenizer| t.to_string(false).unwrap();
            let any = tokenizers::Tokenizer::from_bytes(&bytes).unwrap();
            let ours = parse("tokenizer.json", &bytes).unwrap();
            assert_eq!(text(&ours), text(&any));
            assert_eq!(
                ours.encode("abb<new> b<|x|>", true).unwrap().get_ids(),
                any.encode("abb<new> b<|x|>", true).unwrap().get_ids()
            );
        }
        assert!(parse("tokenizer.json", b"{\"version\": \"1.0\"}").is_err());
    }
}
