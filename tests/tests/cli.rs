//! The commands as a user or a script runs them: the real binary on tiny checkpoints, its output and its exit codes.

use dylm::{ChatOptions, Message, tokenizer::Tokenizer};
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::Path,
    process::{Child, Command, Output, Stdio},
};
use tempfile::TempDir;
use tests::{
    binary::{dylm, target},
    tiny,
};

fn model(name: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    tiny::write(&tiny::fixtures().join(name), folder.path()).unwrap();
    folder
}

fn path(folder: &TempDir) -> &str {
    folder.path().to_str().unwrap()
}

fn run(args: &[&str], input: &str) -> Output {
    let mut child =
        dylm().args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// The standard output of a run that succeeds.
fn said(args: &[&str], input: &str) -> String {
    let output = run(args, input);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The JSON objects of a run that succeeds, one or many.
fn objects(args: &[&str], input: &str) -> Vec<Value> {
    let text = said(args, input);
    serde_json::Deserializer::from_str(&text)
        .into_iter()
        .collect::<Result<_, _>>()
        .unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// The one sentence of a run that fails.
fn refused(args: &[&str], code: i32) -> String {
    let output = run(args, "");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{text}");
    assert!(text.starts_with("error: ") && !text.contains("panicked"), "{text}");
    text
}

fn generate(model: &TempDir, flags: &[&str]) -> Value {
    let args = [&["generate", "--model", path(model), "--json"], flags].concat();
    objects(&args, "").remove(0)
}

#[test]
fn a_conversation_over_a_pipe_keeps_its_history() {
    let model = model("llama");
    let args = ["chat", "--model", path(&model), "--system-prompt", "be kind", "-m", "12", "--json"];
    let answers = objects(&args, "hello there\nand then\n");
    assert_eq!(answers.len(), 2);

    let tokenizer = Tokenizer::from_folder(model.path()).unwrap();
    let mut turns = vec![Message::new("system", "be kind"), Message::new("user", "hello there")];
    let rendered = |turns: &[Message]| {
        let options = ChatOptions { add_generation_prompt: true, ..Default::default() };
        tokenizer.encode_chat(turns, &options).unwrap().len()
    };
    let first = rendered(&turns);
    assert_eq!(answers[0]["statistics"]["prompt_tokens"], first);
    turns.push(Message::new("assistant", answers[0]["text"].as_str().unwrap()));
    turns.push(Message::new("user", "and then"));
    assert_eq!(answers[1]["statistics"]["prompt_tokens"], rendered(&turns));
    assert_eq!(answers[0]["cached_tokens"], 0);
    assert!(answers[1]["cached_tokens"].as_u64().unwrap() >= first as u64, "{}", answers[1]);
}

#[test]
fn a_reset_conversation_begins_anew() {
    let model = model("llama");
    let answers =
        objects(&["chat", "--model", path(&model), "-m", "8", "--json"], "hello\nr\n\nhello\nq\nnever said\n");
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[0]["text"], answers[1]["text"]);
    assert_eq!(answers[0]["statistics"]["prompt_tokens"], answers[1]["statistics"]["prompt_tokens"]);
}

#[test]
fn a_piped_conversation_writes_answers_and_nothing_else() {
    let model = model("llama");
    let args = ["chat", "--model", path(&model), "-m", "8"];
    let answer = objects(&[&args[..], &["--json"]].concat(), "hello\n")[0]["text"].as_str().unwrap().to_owned();
    assert_eq!(said(&args, "h\nhello\n"), format!("{answer}\n"));
}

#[test]
fn a_chat_needs_a_template() {
    let model = model("llama");
    let config = model.path().join("tokenizer_config.json");
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("chat_template");
    fs::write(config, json.to_string()).unwrap();
    assert!(refused(&["chat", "--model", path(&model)], 2).contains("--use-default-chat-template"));
    objects(&["chat", "--model", path(&model), "--use-default-chat-template", "--json", "-m", "3"], "hello\n");
}

/// Cached and continued against read as a whole.
fn assert_cache_changes_nothing(model: &TempDir, how: &[&str], both: &[&str]) {
    let file = model.path().join("prompt.cache");
    let file = file.to_str().unwrap();
    let (begin, rest) = ("the quick brown fox jumps over the lazy dog and ", "then it sleeps");
    let make = ["cache-prompt", "--model", path(model), "--prompt-cache-file", file, "--prompt", begin];
    said(&[&make, how, both].concat(), "");
    let args = ["generate", "--json", "-m", "24", "--prompt-cache-file", file, "--prompt", rest];
    let continued = objects(&[&args, both].concat(), "").remove(0);
    let whole = generate(model, &[&["-m", "24", "--prompt", &format!("{begin}{rest}")], how, both].concat());
    assert_eq!(continued["tokens"], whole["tokens"], "{how:?} {both:?}");
    assert_eq!(continued["statistics"]["prompt_tokens"], whole["statistics"]["prompt_tokens"]);
    assert!(continued["cached_tokens"].as_u64().unwrap() > 10, "{continued}");
}

#[test]
fn a_cached_prompt_and_its_rest_are_the_whole_prompt() {
    let llama = model("llama");
    assert_cache_changes_nothing(&llama, &[], &[]);
    assert_cache_changes_nothing(&llama, &["--system-prompt", "be kind"], &[]);
    assert_cache_changes_nothing(&llama, &["--ignore-chat-template"], &[]);
    assert_cache_changes_nothing(&llama, &["--max-kv-size", "20"], &[]);
    assert_cache_changes_nothing(&llama, &[], &["--dtype", "bfloat16"]);
    // Sliding windows, some layers without one.
    assert_cache_changes_nothing(&model("gemma3_text"), &[], &[]);
}

#[test]
fn a_prompt_cache_is_refused_for_another_model() {
    let (ours, theirs) = (model("llama"), model("llama-bias"));
    let file = ours.path().join("prompt.cache");
    let file = file.to_str().unwrap();
    said(&["cache-prompt", "--model", path(&ours), "--prompt-cache-file", file, "--prompt", "hello"], "");
    let said = refused(&["generate", "--model", path(&theirs), "--prompt-cache-file", file], 1);
    assert!(said.contains("another model"), "{said}");

    // The same files elsewhere are the same model; the same config with other weights is not.
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(ours.path()).unwrap().flatten() {
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    generate(&copy, &["--prompt-cache-file", file, "-m", "2"]);
    let weights = copy.path().join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&weights, bytes).unwrap();
    let said = refused(&["generate", "--model", path(&copy), "--prompt-cache-file", file], 1);
    assert!(said.contains("other weights"), "{said}");
    let said = refused(&["generate", "--prompt-cache-file", file, "--system-prompt", "be kind"], 2);
    assert!(said.contains("--system-prompt"), "{said}");
}

#[test]
fn a_seed_gives_its_text_again() {
    let model = model("llama");
    let text = |seed: &str| generate(&model, &["--temp", "1", "--seed", seed, "-m", "40"])["tokens"].clone();
    assert_eq!(text("7"), text("7"));
    assert_ne!(text("7"), text("8"));
}

#[test]
fn generate_tells_a_program_what_it_did() {
    let model = model("llama");
    let object = generate(&model, &["--prompt", "hello", "-m", "5", "--logit-bias", "2=-1000"]);
    assert_eq!(object["model"], path(&model));
    assert_eq!(object["tokens"].as_array().unwrap().len(), 5);
    assert_eq!(object["statistics"]["generation_tokens"], 5);
    assert_eq!(object["statistics"]["finish_reason"], "length");
}

#[test]
fn a_prompt_comes_from_standard_input_and_the_text_alone_goes_out() {
    let model = model("llama");
    let args = |prompt| ["generate", "--model", path(&model), "-m", "9", "--verbose", "false", "--prompt", prompt];
    let text = generate(&model, &["--prompt", "hello", "-m", "9"])["text"].as_str().unwrap().to_owned();
    assert_eq!(said(&args("-"), "hello"), format!("{text}\n"));
    assert_eq!(said(&args("hello"), ""), format!("{text}\n"));
    let framed = said(&["generate", "--model", path(&model), "-m", "9", "--prompt", "hello"], "");
    assert!(framed.starts_with(&format!("==========\n{text}\n==========\nPrompt: ")), "{framed}");
}

#[test]
fn wrong_usage_has_an_exit_code_of_its_own() {
    assert!(said(&["--version"], "").starts_with("dylm "));
    assert_eq!(run(&["generate", "--no-such-flag"], "").status.code(), Some(2));
    assert_eq!(run(&["bench", "m", "--model", "n"], "").status.code(), Some(2));
    refused(&["generate", "--model", "/no/such/folder"], 2);
}

/// Starts a generation that will not end by itself, and waits for its first text.
fn start(args: &[&str], input: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let endless = ["-m", "2000000", "--temp", "1", "--seed", "1", "--max-kv-size", "64", "--logit-bias", "2=-1000"];
    let mut command = dylm();
    command.args(args).args(endless).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.as_mut().unwrap().write_all(input.as_bytes()).unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut some = [0; 20];
    out.read_exact(&mut some).unwrap();
    (child, out)
}

#[cfg(unix)]
fn interrupt(child: &Child) {
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

#[cfg(unix)]
#[test]
fn an_interrupted_generation_prints_its_figures() {
    let model = model("llama");
    let (mut child, mut out) = start(&["generate", "--model", path(&model)], "");
    interrupt(&child);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\n==========\nPrompt: ") && rest.contains("Peak memory: "), "{rest}");
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[cfg(unix)]
#[test]
fn an_interrupted_answer_leaves_the_conversation_open() {
    let model = model("llama");
    let (mut child, mut out) = start(&["chat", "--model", path(&model)], "hello\n");
    interrupt(&child);
    // Dropping standard input ends it like Ctrl-D, which is noticed only if the answer ended.
    drop(child.stdin.take());
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with('\n'), "{rest}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_reader_who_has_had_enough_is_no_failure() {
    let model = model("llama");
    let (mut child, mut out) = start(&["generate", "--model", path(&model)], "");
    let mut line = Vec::new();
    out.read_until(b'\n', &mut line).unwrap();
    drop(out);
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert_eq!((child.wait().unwrap().code(), errors.as_str()), (Some(0), ""));
}

fn library(name: &str) -> String {
    format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX)
}

#[test]
fn plugins_are_listed_by_their_notes() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| fs::copy(target().join(library("llama")), folder.path().join(library(name))).unwrap();
    copy("mine");
    fs::write(folder.path().join(library("letter")), "Dear reader").unwrap();
    fs::write(folder.path().join("README"), "not even called a library").unwrap();
    let args = ["plugins", "--json", "--plugins", path(&folder)];
    let list = objects(&args, "").remove(0);
    let plugins = list["plugins"].as_array().unwrap();
    let of = |folder: &Path, name: &str| {
        let path = folder.canonicalize().unwrap().join(library(name));
        plugins.iter().find(|p| p["path"] == path.to_str().unwrap()).unwrap_or_else(|| panic!("{path:?}: {list}"))
    };
    let mine = of(folder.path(), "mine");
    assert_eq!(mine["note"]["name"], "llama");
    assert!(mine["note"]["model_types"].as_array().unwrap().contains(&"llama".into()));
    assert_eq!(mine["refused"], Value::Null);
    let letter = of(folder.path(), "letter");
    assert!(letter["note"].is_null() && letter["refused"].as_str().unwrap().contains("is not a library"), "{letter}");
    let shadowed = of(&target(), "llama");
    assert_eq!(shadowed["shadowed"]["llama"], mine["path"]);
    assert!(!list.to_string().contains("README"));

    copy("second");
    let list = objects(&args, "").remove(0);
    let refused: Vec<_> = list["plugins"].as_array().unwrap().iter().filter(|p| p["refused"].is_string()).collect();
    assert_eq!(refused.len(), 3, "the letter and both that claim llama: {list}");
    assert!(said(&args[..1], "").contains("serves llama"));
}

#[test]
fn inspect_tells_what_a_model_is_and_needs() {
    let model = model("llama");
    let facts = objects(&["inspect", path(&model), "--json", "--context", "100", "--tensors"], "").remove(0);
    // 3 layers, 2 heads of 24 for keys and for values, 4 bytes each.
    assert_eq!(facts["kv_bytes_per_token"], 3 * 2 * 2 * 24 * 4);
    assert_eq!(facts["kv_bytes"], 3 * 2 * 2 * 24 * 4 * 100);
    assert_eq!(facts["weight_bytes"], facts["parameters"].as_u64().unwrap() * 4);
    assert_eq!(facts["bits_per_weight"], 32.0);
    assert_eq!((facts["agrees"].as_bool(), facts["chat_template"].as_bool()), (Some(true), Some(true)));
    assert_eq!(facts["eos"][0]["id"], 2);
    assert_eq!(facts["plugin"]["name"], "llama");
    assert_eq!(facts["tensor_list"].as_array().unwrap().len(), facts["tensors"].as_u64().unwrap() as usize);
    assert!(said(&["inspect", "--model", path(&model)], "").contains("all tensors agree"));
}

#[test]
fn inspect_fails_where_files_and_architecture_disagree() {
    let model = model("llama");
    let output = run(&["inspect", path(&model), "--json", "--config", "intermediate_size=95"], "");
    assert_eq!(output.status.code(), Some(1));
    let facts: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(facts["agrees"], false);
    assert!(facts["misshapen"].as_array().unwrap().iter().any(|m| m.as_str().unwrap().contains("up_proj")), "{facts}");
}

#[test]
fn a_windowed_model_needs_no_more_memory_for_a_longer_text() {
    let model = model("mistral");
    let bytes =
        |context: &str| objects(&["inspect", path(&model), "--json", "--context", context], "")[0]["kv_bytes"].clone();
    assert_ne!(bytes("100"), bytes("200"));
    assert_eq!(bytes("10000"), bytes("20000"));
}

#[test]
fn bench_counts_the_tokens_that_were_asked_for() {
    let model = model("llama");
    let args = ["bench", path(&model), "-p", "24", "-g", "6", "-n", "2", "--json"];
    let figures = objects(&args, "").remove(0);
    let trials = figures["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 2);
    for trial in trials {
        assert_eq!((&trial["prompt_tokens"], &trial["generation_tokens"]), (&24.into(), &6.into()));
    }
    assert!(figures["median"]["generation_tps"].as_f64().unwrap() > 0.0);
}

#[test]
fn bench_measures_the_boundary() {
    let figures = objects(&["bench", "--boundary", "--json"], "").remove(0);
    assert!(figures["open_ms"].as_f64().unwrap() > 0.0);
    assert!(figures["op_ns"]["add"].as_f64().unwrap() > 0.0);
}
