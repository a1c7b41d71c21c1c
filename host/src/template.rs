//! Chat templates: messages and tools -> the text that the model was trained on, as Hugging Face's Jinja renders it.
//! Templates come with the model and are not trusted: they see plain data only, and run within fuel, memory, time, stack and output
//! bounds on a thread of their own (see `bounded`).

pub mod bounded;
mod python;
pub(crate) mod values;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, ErrorKind};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Map;

use crate::error::{Error, Result};
use bounded::{Bounds, Overrun};
use values::{Rewrite, from_json, mapping, measure};

/// Longest template, in bytes. The longest known ones have 30 KB.
const MAX_SOURCE: usize = 1 << 20;
/// Steps of the engine that every render may take, and steps on top for each value in its input.
const FUEL: u64 = 500_000;
const FUEL_PER_VALUE: u64 = 5_000;
const MAX_FUEL: u64 = 10_000_000;
/// Bytes that every render may hold; on top, so many times its input.
const MEMORY: usize = 64 << 20;
const MEMORY_PER_BYTE: usize = 16;
/// Bytes that every render may write; on top, so many times its input.
const OUTPUT: usize = 4 << 20;
const OUTPUT_PER_BYTE: usize = 4;
const TIME: Duration = Duration::from_secs(2);
/// Renders that may overrun memory or time, each leaving a thread behind, before the template is refused outright.
const STRIKES: u32 = 3;

/// What ChatML models expect; used on request, and by models without a template of their own.
pub const DEFAULT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + \
     '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// One turn of a conversation.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, or whatever the template knows.
    pub role: String,
    /// The text. JSON may also give null (empty) or a list of text parts (joined).
    #[serde(default, deserialize_with = "text_of_content")]
    pub content: String,
    /// Everything else that the template may look at: `tool_calls`, `name`, `reasoning_content`...
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

impl Message {
    /// A message with nothing but a role and a text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into(), extra: Map::new() }
    }
}

/// A text, null, or a list of text parts, which are joined.
fn text_of_content<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<String, D::Error> {
    let wrong = || {
        serde::de::Error::custom(
            "a message's content must be a text, null, or a list of {\"type\": \"text\", \"text\": ..}",
        )
    };
    match serde_json::Value::deserialize(deserializer)? {
        serde_json::Value::Null => Ok(String::new()),
        serde_json::Value::String(text) => Ok(text),
        serde_json::Value::Array(parts) => parts
            .iter()
            .map(|part| part["text"].as_str().filter(|_| part["type"] == "text").ok_or_else(wrong))
            .collect(),
        _ => Err(wrong()),
    }
}

/// How a conversation is rendered.
#[derive(Debug, Clone, Default)]
pub struct ChatOptions {
    /// Ends the text where the assistant's answer starts.
    pub add_generation_prompt: bool,
    /// Leaves the last message open, so that the model continues it. Excludes `add_generation_prompt`.
    pub continue_final_message: bool,
    /// Further variables of the template, such as `enable_thinking`.
    pub extra: Map<String, serde_json::Value>,
    /// Tool definitions (a list of JSON schemas).
    pub tools: Option<serde_json::Value>,
}

/// A compiled template. Cheap to clone.
#[derive(Clone)]
pub struct ChatTemplate {
    name: Arc<str>,
    source: Arc<str>,
    program: Arc<Environment<'static>>,
    strikes: Arc<AtomicU32>,
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("name", &self.name).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles `source`; `name` (a file's name) is what errors call it.
    pub fn compile(name: &str, source: &str) -> Result<Self> {
        if source.len() > MAX_SOURCE {
            return Err(Error::Tokenizer(format!(
                "{name}: the template has {} bytes, {MAX_SOURCE} is the limit",
                source.len()
            )));
        }
        let (called, label, text) = (name.to_owned(), name.to_owned(), python::open_generation_blocks(source));
        // Constant expressions are evaluated while compiling: that, too, needs bounds.
        let compiled = bounded::run(Bounds { memory: MEMORY, time: TIME }, move || {
            let mut env = Environment::new();
            let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
            env.set_auto_escape_callback(|_| AutoEscape::None);
            env.set_debug(false);
            python::install(&mut env);
            let added = syntax.map(|s| env.set_syntax(s)).and_then(|()| env.add_template_owned(called, text));
            added.map(|()| env).map_err(|e| explain(&label, &e))
        });
        match compiled {
            Ok(Ok(program)) => Ok(ChatTemplate {
                name: name.into(),
                source: source.into(),
                program: Arc::new(program),
                strikes: Arc::default(),
            }),
            Ok(Err(e)) => Err(e),
            Err(overrun) => Err(explain_overrun(name, overrun)),
        }
    }

    /// The template's text, as the model brought it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Renders `messages`. `variables` are the tokenizer's (`bos_token`, ..); `rewrite` sees every string of the conversation.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        options: &ChatOptions,
        variables: &[(String, String)],
        rewrite: Rewrite<'_>,
    ) -> Result<String> {
        let name = &*self.name;
        if self.strikes.load(Ordering::Relaxed) >= STRIKES {
            return Err(Error::Tokenizer(format!(
                "{name}: the template overran its bounds {STRIKES} times and is not run again; give another with --chat-template"
            )));
        }
        let tail = Tail::new(self, messages, options)?;
        let (mut values, mut bytes) = (0, self.source.len());
        let mut count = |json: &serde_json::Value| {
            let (v, b) = measure(json);
            (values, bytes) = (values + v, bytes + b);
        };
        options.tools.iter().chain(options.extra.values()).for_each(&mut count);
        let mut turns = Vec::with_capacity(messages.len());
        for (i, message) in messages.iter().enumerate() {
            let last = i + 1 == messages.len();
            let turn = plain(message, if last { tail.tag() } else { "" });
            count(&turn);
            turns.push(from_json(&turn, rewrite));
        }
        let pairs = [
            ("messages", Value::from(turns)),
            ("tools", options.tools.as_ref().map_or(Value::from(()), |t| from_json(t, rewrite))),
            ("documents", Value::from(())),
            ("add_generation_prompt", Value::from(options.add_generation_prompt)),
        ];
        let context = mapping(
            variables
                .iter()
                .map(|(k, v)| (k.clone(), Value::from(v.as_str())))
                .chain(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)))
                .chain(options.extra.iter().map(|(k, v)| (k.clone(), from_json(v, rewrite)))),
        );
        let bounds = Bounds {
            memory: MEMORY.saturating_add(bytes.saturating_mul(MEMORY_PER_BYTE)),
            time: TIME + Duration::from_micros(bytes as u64),
        };
        let output = OUTPUT.saturating_add(bytes.saturating_mul(OUTPUT_PER_BYTE));
        let fuel = MAX_FUEL.min(FUEL + values.saturating_mul(FUEL_PER_VALUE));
        let (program, called) = (self.program.clone(), self.name.clone());
        let rendered = bounded::run(bounds, move || {
            let mut env = (*program).clone();
            env.set_fuel(Some(fuel));
            let mut page = Page { text: Vec::new(), limit: output };
            let run = env.get_template(&called).and_then(|t| t.render_captured_to(context, &mut page).map(drop));
            // Errors may hold the template's values, which only this thread's stack is large enough to drop.
            run.map(|()| page.text).map_err(|e| explain(&called, &e))
        });
        match rendered {
            Ok(Ok(text)) => tail.cut(name, String::from_utf8_lossy(&text).into_owned()),
            Ok(Err(e)) => Err(e),
            Err(overrun) => {
                self.strikes.fetch_add(1, Ordering::Relaxed);
                Err(explain_overrun(name, overrun))
            }
        }
    }
}

/// A message as transformers hands it to templates: no null fields, reasoning under the names that templates look for.
fn plain(message: &Message, tag: &str) -> serde_json::Value {
    let mut turn = Map::new();
    turn.insert("role".into(), message.role.clone().into());
    turn.insert("content".into(), format!("{}{tag}", message.content).into());
    turn.extend(message.extra.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())));
    let reasoning = ["reasoning_content", "thinking", "reasoning"].iter().find_map(|k| turn.get(*k)).cloned();
    if let Some(reasoning) = reasoning {
        turn.entry("thinking").or_insert_with(|| reasoning.clone());
        turn.insert("reasoning_content".into(), reasoning);
    }
    turn.into()
}

/// The open end of a conversation whose last message the model continues: a tag is rendered there, then cut off with what follows.
struct Tail(Option<String>);

impl Tail {
    const TAG: &str = "CONTINUE_HERE_7f3a ";

    fn new(template: &ChatTemplate, messages: &[Message], options: &ChatOptions) -> Result<Self> {
        let wrong = |what: &str| Err(Error::Usage(format!("{}: {what}", template.name)));
        if messages.is_empty() {
            return wrong("the conversation is empty; give at least one message");
        }
        if options.continue_final_message && options.add_generation_prompt {
            return wrong("continue_final_message and add_generation_prompt exclude each other; give one");
        }
        Ok(Tail(options.continue_final_message.then(|| messages[messages.len() - 1].content.trim().to_owned())))
    }

    fn tag(&self) -> &'static str {
        if self.0.is_some() { Self::TAG } else { "" }
    }

    fn cut(&self, name: &str, mut text: String) -> Result<String> {
        let Some(content) = &self.0 else { return Ok(text) };
        let Some(at) = text.rfind(Self::TAG.trim_end()) else {
            return Err(Error::Tokenizer(format!(
                "{name}: the template does not write the end of the last message ({} bytes), so it cannot be continued; answer it with add_generation_prompt instead",
                content.len()
            )));
        };
        // Where the template trims the message, the message's own trailing space goes too.
        let trimmed = !text[at..].starts_with(Self::TAG);
        text.truncate(at);
        if trimmed {
            text.truncate(text.trim_end().len());
        }
        Ok(text)
    }
}

/// Collects the output up to its limit.
struct Page {
    text: Vec<u8>,
    limit: usize,
}

impl io::Write for &mut Page {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > self.limit {
            return Err(io::Error::other(format!("the output exceeds {} bytes", self.limit)));
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn explain(name: &str, error: &minijinja::Error) -> Error {
    // The innermost cause is the fault; the outer ones say through which macro or loop it was reached.
    let (mut inner, mut source) = (error, std::error::Error::source(error));
    let mut written = None;
    while let Some(cause) = source {
        match cause.downcast_ref::<minijinja::Error>() {
            Some(e) => inner = e,
            None => written = Some(cause.to_string()),
        }
        source = cause.source();
    }
    let at = inner.line().or(error.line()).map_or(String::new(), |line| format!(", line {line}"));
    let detail = inner.detail().unwrap_or_default();
    if let Some(message) = detail.strip_prefix(python::RAISED) {
        return Error::Tokenizer(format!("{name}{at}: the chat template refuses this conversation: {message}"));
    }
    Error::Tokenizer(match (inner.kind(), written) {
        (ErrorKind::OutOfFuel, _) => format!(
            "{name}{at}: the template does not end within its number of steps; give another with --chat-template"
        ),
        (_, Some(text)) => format!("{name}{at}: {text}; give another template with --chat-template"),
        (kind, None) if detail.is_empty() => format!("{name}{at}: {kind}"),
        (kind, None) => format!("{name}{at}: {kind}: {detail}"),
    })
}

fn explain_overrun(name: &str, overrun: Overrun) -> Error {
    let what = match overrun {
        Overrun::Memory => "the template asks for more memory than any conversation needs",
        Overrun::Time => "the template does not end in time",
        Overrun::Panic => "the template engine failed on it",
        Overrun::Thread => {
            return Error::Tokenizer(format!("{name}: the system gave no thread to render it on; free some memory"));
        }
    };
    Error::Tokenizer(format!("{name}: {what}; give another with --chat-template"))
}
