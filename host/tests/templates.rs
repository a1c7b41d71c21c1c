//! Chat templates against what transformers renders (tests/fixtures/templates, each a template in the manner of a model family), and
//! the template engine against templates that mean harm.

/// What the binary installs: without it the probes that take memory would take all of it.
#[global_allocator]
static METERED: dylm::template::bounded::Metered = dylm::template::bounded::Metered;

use std::time::{Duration, Instant};

use dylm::tokenizer::{ChatOptions, Message, Tokenizer};
use serde_json::{Value, json};
use tokenizers::models::bpe::BPE;

fn tokenizer_with(template: &str) -> Tokenizer {
    let config = json!({"chat_template": template, "bos_token": "<s>", "eos_token": "</s>"});
    Tokenizer::new(tokenizers::Tokenizer::new(BPE::default()), config).unwrap()
}

fn render(template: &str) -> Result<String, String> {
    tokenizer_with(template)
        .render_chat(&[Message::new("user", "hello")], &ChatOptions::default())
        .map_err(|e| e.to_string())
}

/// Strings of expected texts in which today's date stood.
fn today() -> String {
    chrono::Local::now().format("%d %b %Y").to_string()
}

fn check_family(file: &str) {
    let faults = check_file(&format!("{}/../tests/fixtures/templates/{file}.json", env!("CARGO_MANIFEST_DIR")));
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// What in a fixture comes out other than expected.
fn check_file(path: &str) -> Vec<String> {
    let family: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let tokenizer = tokenizer_with(family["template"].as_str().unwrap());
    let mut faults = Vec::new();
    for (i, case) in family["cases"].as_array().unwrap().iter().enumerate() {
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let options = ChatOptions {
            add_generation_prompt: case["add_generation_prompt"] == true,
            continue_final_message: case["continue_final_message"] == true,
            extra: case["extra"].as_object().unwrap().clone(),
            tools: Some(case["tools"].clone()).filter(|t| !t.is_null()),
        };
        let rendered = tokenizer.render_chat(&messages, &options).map_err(|e| e.to_string());
        // Python's own errors (None iterated, ..) may be errors here or not; what the template raises is raised.
        let same = match (&rendered, case["text"].as_str(), case["error"].as_str()) {
            (Ok(text), Some(expected), _) => *text == expected.replace("@TODAY@", &today()),
            (_, None, Some(_)) if case["kind"] != "TemplateError" => true,
            (Err(said), None, Some(expected)) => said.contains(expected) && said.contains("line"),
            _ => false,
        };
        if !same {
            faults.push(format!("{path}, case {i}:\n got {rendered:?}\nwant {} {}", case["text"], case["error"]));
        }
    }
    faults
}

/// Templates that are not ours to store: a folder of fixtures of the same form.
#[test]
fn further_templates_render_as_in_transformers() {
    let Some(folder) = std::env::var_os("DYLM_TEST_TEMPLATES") else {
        return eprintln!("SKIPPED: set DYLM_TEST_TEMPLATES to a folder of template fixtures");
    };
    let files = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let faults: Vec<String> = files.flat_map(|f| check_file(f.to_str().unwrap())).collect();
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
}

macro_rules! families {
    ($($test:ident: $file:literal),* $(,)?) => { $(#[test] fn $test() { check_family($file); })* };
}

families! {
    a_template_in_the_manner_of_llama3_renders_as_in_transformers: "llama3",
    a_template_in_the_manner_of_qwen3_renders_as_in_transformers: "qwen3",
    a_template_in_the_manner_of_mistral_renders_as_in_transformers: "mistral",
    a_template_in_the_manner_of_gemma_renders_as_in_transformers: "gemma",
    a_template_in_the_manner_of_deepseek_renders_as_in_transformers: "deepseek",
    the_idioms_of_templates_render_as_in_transformers: "idioms",
}

/// Renders `template`, which must fail with a sentence that contains `expected`, soon, and leave the process alive.
fn refused(template: &str, expected: &str) {
    let start = Instant::now();
    let said = render(template).unwrap_err();
    assert!(said.contains(expected), "{said}");
    assert!(said.contains("chat_template of the model") && !said.contains('\n'), "{said}");
    // A bound on a hang, not a measurement: the bounds promise two seconds.
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn an_endless_template_is_refused() {
    let loops = "{% for a in range(10000) %}".repeat(4) + "x" + &"{% endfor %}".repeat(4);
    refused(&loops, "number of steps");
}

#[test]
fn a_huge_range_is_refused() {
    refused("{% for a in range(1000000000) %}x{% endfor %}", "range");
}

#[test]
fn a_recursive_macro_is_refused() {
    refused("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "recursion");
    refused("{% include 'chat_template of the model' %}", "recursion");
}

#[test]
fn a_string_that_doubles_is_refused() {
    refused(
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "memory",
    );
    refused(
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "memory",
    );
    refused(
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s.replace('x', 'xx') %}{% endfor %}",
        "memory",
    );
    refused(
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set s %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = s %}{% endfor %}",
        "memory",
    );
}

#[test]
fn a_list_that_doubles_is_refused() {
    // Lazy lists are slow to walk: time or memory runs out first.
    refused(
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = (ns.l + ns.l) | list %}{% endfor %}",
        "give another",
    );
    refused(
        "{% set ns = namespace(l=[1]) %}{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l | list | length }}",
        "give another",
    );
}

#[test]
fn a_repeated_string_is_refused() {
    refused("{{ 'x' * 99999999 }}", "memory");
    refused("{{ 'x' * 10000000000 }}", "too large");
    refused("{{ ('x' * 9999) | center(1000000000) }}", "filter");
}

#[test]
fn a_huge_output_is_refused() {
    refused("{% set s = 'x' * 100000 %}{% for i in range(1000) %}{{ s }}{% endfor %}", "output exceeds");
}

#[test]
fn a_template_that_raises_is_quoted_with_its_line() {
    refused(
        "\n\n{{ raise_exception('no such role') }}",
        "line 3: the chat template refuses this conversation: no such role",
    );
}

#[test]
fn a_template_that_reads_files_or_pythons_insides_finds_none() {
    refused("{% include '/etc/passwd' %}", "passwd");
    refused("{{ ''.__class__.__mro__[1].__subclasses__() }}", "undefined");
}

#[test]
fn a_value_nested_without_end_is_refused_or_dropped_without_overflowing_the_stack() {
    // Many levels a step, so that memory, not fuel, is what ends it.
    let list = format!("{}ns.l{}", "[".repeat(40), "]".repeat(40));
    let nest = |rounds: usize| {
        format!(
            "{{% set ns = namespace(l=[]) %}}{{% for i in range({rounds}) %}}{{% set ns.l = {list} %}}{{% endfor %}}"
        )
    };
    refused(&nest(100_000), "memory");
    let uses = [
        "",
        "{{ ns.l }}",
        "{{ ns.l == [ns.l] }}",
        "{{ ns.l | string }}",
        "{{ {ns.l: 1} }}",
        "{{ [ns.l, ns.l] | sort }}",
        "{{ ns.l.foo.bar }}",
        "{{ ns.l + 1 }}",
    ];
    let long = vec![Message::new("user", "x".repeat(1000)); 3000];
    for messages in [&long[..1], &long] {
        for rounds in [1000, 2500, 4500] {
            for after in uses {
                let rendered = tokenizer_with(&(nest(rounds) + after)).render_chat(messages, &ChatOptions::default());
                // The depths are really reached.
                assert!(rendered.is_ok() || !after.is_empty() || rounds > 2500, "{rendered:?}");
            }
        }
    }
    refused(&(nest(10) + "{{ ns.l | tojson }}"), "nested too deep");
}

#[test]
fn a_broken_template_is_named_with_its_line() {
    refused("{% if x %}\n{{ y }", "line 2");
    refused("a\n{{ 'x' | nofilter }}", "line 2");
    refused("a\n{{ messages.foo.bar }}", "line 2");
}

#[test]
fn a_template_that_overruns_again_and_again_is_not_run_any_more() {
    let tokenizer = tokenizer_with(
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    );
    let said =
        |_| tokenizer.render_chat(&[Message::new("user", "hello")], &ChatOptions::default()).unwrap_err().to_string();
    let all: Vec<String> = (0..5).map(said).collect();
    assert!(all[2].contains("memory") && all[4].contains("not run again"), "{all:?}");
}

#[test]
fn a_conversation_of_five_megabytes_renders() {
    let tokenizer = tokenizer_with("{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}");
    let messages = vec![Message::new("user", "word ".repeat(1_000_000)), Message::new("user", "x")];
    let text = tokenizer.render_chat(&messages, &ChatOptions::default()).unwrap();
    assert_eq!(text.len(), 4_999_999 + 6 + 7);
}

#[test]
fn tools_and_messages_keep_the_order_of_their_keys() {
    let tokenizer = tokenizer_with("{{ tools | tojson }}{{ messages[0].tool_calls | tojson }}");
    let messages: Vec<Message> =
        serde_json::from_str(r#"[{"role":"user","content":null,"tool_calls":[{"z":1,"a":2}]}]"#).unwrap();
    let tools: Value = serde_json::from_str(r#"[{"type":"function","name":"x","b":{"y":1,"c":2}}]"#).unwrap();
    let options = ChatOptions { tools: Some(tools), ..Default::default() };
    assert_eq!(
        tokenizer.render_chat(&messages, &options).unwrap(),
        r#"[{"type": "function", "name": "x", "b": {"y": 1, "c": 2}}][{"z": 1, "a": 2}]"#
    );
}

#[test]
fn content_may_be_a_list_of_text_parts() {
    let read = |json: Value| serde_json::from_value::<Message>(json).map(|m| m.content).map_err(|e| e.to_string());
    let parts = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]});
    assert_eq!(read(parts), Ok("ab".into()));
    assert!(
        read(json!({"role": "user", "content": [{"type": "image"}]})).unwrap_err().contains("content must be a text")
    );
}

#[test]
fn a_named_template_serves_tools_and_the_default_one_the_rest() {
    let config =
        json!({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]});
    let tokenizer = Tokenizer::new(tokenizers::Tokenizer::new(BPE::default()), config).unwrap();
    let render = |tools| {
        tokenizer.render_chat(&[Message::new("user", "x")], &ChatOptions { tools, ..Default::default() }).unwrap()
    };
    assert_eq!((render(None), render(Some(json!([])))), ("D".into(), "T".into()));
}
