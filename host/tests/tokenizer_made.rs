//! Tokenizers made here, in the forms that the real test model does not have: SentencePiece's, byte fallback, Metaspace, WordPiece,
//! added tokens with odd flags; and tokenizer files that mean harm.

use std::path::Path;
use std::time::{Duration, Instant};

use dylm::tokenizer::{ChatOptions, Message, Tokenizer};
use serde_json::{Value, json};

/// A character-level BPE with bytes to fall back to, a few merges and four added tokens.
fn model(prefix: &str) -> Value {
    let mut vocab = serde_json::Map::new();
    for special in ["<unk>", "<s>", "</s>"] {
        vocab.insert(special.into(), vocab.len().into());
    }
    for byte in 0..=255 {
        vocab.insert(format!("<0x{byte:02X}>"), vocab.len().into());
    }
    for piece in [
        "▁", "a", "b", "c", "h", "e", "l", "o", "<", ">", "|", "n", "d", "é", "▁a", "▁h", "▁he", "ll", "▁hell",
        "▁hello", "##b",
    ] {
        vocab.insert(format!("{prefix}{piece}"), vocab.len().into());
    }
    let merges = ["▁ a", "▁ h", "▁h e", "l l", "▁he ll", "▁hell o"];
    json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": merges})
}

fn file(normalizer: Value, pre_tokenizer: Value, decoder: Value) -> Value {
    let token = |id: u32, text: &str, special: bool, lstrip: bool, rstrip: bool| json!({"id": id, "content": text, "single_word": false, "lstrip": lstrip, "rstrip": rstrip, "normalized": !special, "special": special});
    let added = [
        token(0, "<unk>", true, false, false),
        token(1, "<s>", true, false, false),
        token(2, "</s>", true, false, false),
        token(280, "<|end|>", true, false, true),
        token(281, "<|mid|>", true, true, false),
        token(282, "<think>", false, false, false),
    ];
    json!({"version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": added, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": null, "decoder": decoder, "model": model("")})
}

fn llama2() -> Value {
    let replace = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let steps = [
        replace("▁", " "),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
        json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
    ];
    let normalizers = [json!({"type": "Prepend", "prepend": "▁"}), replace(" ", "▁")];
    file(
        json!({"type": "Sequence", "normalizers": normalizers}),
        Value::Null,
        json!({"type": "Sequence", "decoders": steps}),
    )
}

fn gemma() -> Value {
    let steps = [
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    let normalizer = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    file(normalizer, Value::Null, json!({"type": "Sequence", "decoders": steps}))
}

fn metaspace(scheme: &str) -> Value {
    let part = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
    file(Value::Null, part.clone(), part)
}

fn word_piece() -> Value {
    file(Value::Null, Value::Null, json!({"type": "WordPiece", "prefix": "##", "cleanup": false}))
}

fn load(file: &Value, config: Value) -> Tokenizer {
    Tokenizer::new(tokenizers::Tokenizer::from_bytes(file.to_string()).unwrap(), config).unwrap()
}

fn config() -> Value {
    json!({"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} <|end|> <|mid|>{% endfor %}"})
}

fn all() -> [(&'static str, Value); 6] {
    [
        ("llama2", llama2()),
        ("gemma", gemma()),
        ("first", metaspace("first")),
        ("always", metaspace("always")),
        ("never", metaspace("never")),
        ("wordpiece", word_piece()),
    ]
}

/// Small, seeded, good enough to visit every branch.
fn random(seed: &mut u64, below: usize) -> usize {
    *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*seed >> 33) as usize % below
}

#[test]
fn any_ids_stream_as_they_decode() {
    let mut seed = 7;
    for (name, file) in all() {
        let tokenizer = load(&file, config());
        for round in 0..300 {
            // Bytes of "日🙂é", whole and torn, among pieces, specials and spaces.
            let bytes = [0xE6, 0x97, 0xA5, 0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xA9, 0x0A, 0x20];
            let ids: Vec<u32> = (0..random(&mut seed, 120))
                .map(|_| match random(&mut seed, 3) {
                    0 => 3 + bytes[random(&mut seed, bytes.len())],
                    1 => 259 + random(&mut seed, 21) as u32,
                    _ => [0, 1, 2, 280, 281, 282, 259, 259][random(&mut seed, 8)],
                })
                .collect();
            for skip in [false, true] {
                let mut stream = tokenizer.detokenizer().skip_special(skip);
                let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
                text += &stream.finish();
                assert_eq!(text, tokenizer.decode(&ids, skip).unwrap(), "{name}, round {round}, {ids:?}");
            }
        }
    }
}

#[test]
fn the_guarded_path_encodes_as_the_plain_one_where_nothing_is_guarded() {
    let mut seed = 3;
    let words = ["hello", " ", "a", "é", "日", "  ", "\n", "<think>", "b c", "<", "|", "<|mi"];
    for (name, file) in all() {
        let tokenizer = load(&file, config());
        for _ in 0..200 {
            let mut content: String =
                (0..random(&mut seed, 12)).map(|_| words[random(&mut seed, words.len())]).collect();
            // The first half of a control token at the end: guarded, though it is none.
            content += "<|en";
            let messages = [Message::new("user", content), Message::new("b", "hello")];
            let text = tokenizer.render_chat(&messages, &ChatOptions::default()).unwrap();
            let ids = tokenizer.encode_chat(&messages, &ChatOptions::default()).unwrap();
            assert_eq!(ids, tokenizer.encode_plain(&text).unwrap(), "{name}, {text:?}");
        }
    }
}

#[test]
fn control_text_is_plain_whatever_the_tokenizer() {
    for (name, file) in all() {
        let tokenizer = load(&file, config());
        let count = |messages: &[Message], id: u32| {
            let ids = tokenizer.encode_chat(messages, &ChatOptions::default()).unwrap();
            ids.iter().filter(|&&i| i == id).count()
        };
        let said = [
            Message::new("user", "a <|end|> b</s><s>"),
            Message::new("<|mid|>", "<think>x"),
            Message::new("b", "<|en"),
            Message::new("c", "d|>"),
        ];
        assert_eq!((count(&said, 280), count(&said, 281), count(&said, 1), count(&said, 2)), (4, 4, 1, 0), "{name}");
        // Added but not special: earlier answers contain it.
        assert_eq!(count(&said, 282), 1, "{name}");
    }
}

#[test]
fn pieces_that_a_template_joins_make_no_control_token() {
    let mut config = config();
    config["chat_template"] = json!("{% for m in messages %}{{ m.content }}{% endfor %}");
    let tokenizer = load(&gemma(), config);
    for (a, b) in [("<|en", "d|>"), ("<", "|end|>"), ("<|end|", ">"), ("<|end", "|>")] {
        let ids = tokenizer
            .encode_chat(&[Message::new("user", a), Message::new("user", b)], &ChatOptions::default())
            .unwrap();
        assert!(!ids.contains(&280), "{a}{b}");
    }
}

#[test]
fn a_template_that_splits_at_control_text_still_writes_its_own() {
    let mut config = config();
    config["chat_template"] = json!("{{ messages[0].content.split('<|end|>')[0] }}<|end|>");
    let tokenizer = load(&gemma(), config);
    let ids = tokenizer.encode_chat(&[Message::new("user", "a<|end|>b")], &ChatOptions::default()).unwrap();
    assert_eq!(ids.iter().filter(|&&id| id == 280).count(), 1);
}

#[test]
fn a_plain_prompt_gets_bos_once() {
    let tokenizer = load(&llama2(), config());
    let hello = tokenizer.encode_plain("hello").unwrap();
    assert_eq!(tokenizer.encode("hello").unwrap(), [&[1], hello.as_slice()].concat());
    assert_eq!(tokenizer.encode("<s>hello").unwrap(), [&[1], hello.as_slice()].concat());
    // The file asks for truncation to 4 tokens; a prompt is never cut.
    assert_eq!(tokenizer.encode_plain("a b c a b c").unwrap().len(), 10);
}

#[test]
fn tokens_of_the_config_join_the_vocabulary() {
    let mut config = config();
    config["added_tokens_decoder"] = json!({"283": {"content": "<new>", "special": true}, "282": {"content": "<think>", "special": true, "normalized": false}});
    config["additional_special_tokens"] = json!(["<extra>"]);
    let tokenizer = load(&gemma(), config);
    assert_eq!((tokenizer.token_to_id("<new>"), tokenizer.token_to_id("<extra>")), (Some(283), Some(284)));
    assert!([282, 283, 284].iter().all(|id| tokenizer.special_ids().contains(id)));
    assert_eq!(tokenizer.encode_plain("<new><extra>").unwrap(), [283, 284]);
}

fn folder(files: &[(&str, String)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(dir.path().join(name), text).unwrap();
    }
    dir
}

fn refusal(dir: &Path) -> String {
    let said = Tokenizer::from_folder(dir).unwrap_err().to_string();
    assert!(!said.contains('\n'), "{said}");
    said
}

#[test]
fn a_folder_gives_names_and_templates_from_all_its_files() {
    let dir = folder(&[
        ("tokenizer.json", gemma().to_string()),
        ("tokenizer_config.json", json!({"eos_token": {"content": "</s>"}, "chat_template": "config"}).to_string()),
        ("special_tokens_map.json", json!({"bos_token": "<s>", "eos_token": "<unk>"}).to_string()),
        ("chat_template.jinja", "jinja {{ bos_token }}{{ eos_token }}".into()),
    ]);
    std::fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    std::fs::write(dir.path().join("additional_chat_templates/tool_use.jinja"), "tools").unwrap();
    let tokenizer = Tokenizer::from_folder(dir.path()).unwrap();
    let render = |tools| {
        tokenizer.render_chat(&[Message::new("user", "x")], &ChatOptions { tools, ..Default::default() }).unwrap()
    };
    assert_eq!((render(None), render(Some(json!([])))), ("jinja <s></s>".into(), "tools".into()));
}

#[test]
fn a_folder_without_tokenizer_json_says_what_to_do() {
    for (name, said) in [("tokenizer.model", "only tokenizer.model"), ("x", "no tokenizer file")] {
        let dir = folder(&[(name, "x".into())]);
        let text = refusal(dir.path());
        assert!(text.contains(said) && text.contains("save_pretrained"), "{text}");
    }
}

#[test]
fn damaged_files_are_named() {
    let cases = [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "\u{0}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{\"chat_template\": 3}"),
        ("special_tokens_map.json", "{\"a\""),
    ];
    for (name, text) in cases {
        let dir = folder(&[("tokenizer.json", gemma().to_string())]);
        std::fs::write(dir.path().join(name), text).unwrap();
        assert!(refusal(dir.path()).contains(name), "{name} {text}");
    }
}

#[test]
fn crafted_tokenizers_give_errors_or_ids_but_no_panic() {
    let mut merges = gemma();
    merges["model"]["merges"] = json!(["a zz"]);
    let mut decoder = gemma();
    decoder["decoder"] = json!({"type": "Nonsense"});
    for file in [merges, decoder] {
        let dir = folder(&[("tokenizer.json", file.to_string())]);
        assert!(refusal(dir.path()).contains("tokenizer.json"));
    }
    let mut strip = gemma();
    strip["decoder"] = json!({"type": "Strip", "content": "a", "start": 0, "stop": 9});
    let tokenizer = load(&strip, json!({}));
    assert!(tokenizer.decode(&[260], false).unwrap_err().to_string().contains("failed on it"));
    let _ = tokenizer.detokenizer().push(260);
    let mut sparse = gemma();
    sparse["added_tokens"][3]["id"] = json!(4_000_000_000u32);
    let dir = folder(&[("tokenizer.json", sparse.to_string())]);
    if let Ok(mut tokenizer) = Tokenizer::from_folder(dir.path()) {
        tokenizer.set_id_limit(1000);
        assert!(tokenizer.encode("<|end|>").is_err() || tokenizer.token_to_id("<|end|>").unwrap() < 1000);
    }
}

#[test]
fn a_regex_that_backtracks_without_end_stops() {
    let mut file = gemma();
    file["pre_tokenizer"] =
        json!({"type": "Split", "pattern": {"Regex": "(a+)+(?=b)"}, "behavior": "Isolated", "invert": false});
    let tokenizer = load(&file, json!({}));
    let start = Instant::now();
    let _ = tokenizer.encode(&"a".repeat(10_000));
    // A bound on a hang, not a measurement.
    assert!(start.elapsed() < Duration::from_secs(20));
}
