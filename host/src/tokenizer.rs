//! Text <-> token ids, for one model: its vocabulary, its special tokens, its chat templates.
//! Control tokens come from the template only. What a conversation says is marked before rendering wherever it spells a special token
//! (`<|im_end|>`), and those characters are encoded as plain text; anything else encodes exactly as transformers encodes the whole
//! rendered text. Tokens that are added but not special (`<think>`) stay tokens anywhere, since earlier answers contain them.
//! Roles are the caller's to check: a template may build a token's name around one.

mod control;
mod files;
mod names;
pub(crate) mod pairs;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde_json::Value as Json;

use crate::detokenize::Detokenizer;
use crate::error::{Error, Result};
pub use crate::template::{ChatOptions, Message};
use crate::template::{ChatTemplate, DEFAULT_TEMPLATE};
use control::{Controls, collect_strings};

/// Longest text that is encoded, in bytes.
const MAX_TEXT: usize = 64 << 20;

struct NamedTemplate {
    file: String,
    source: String,
    compiled: OnceLock<ChatTemplate>,
}

impl NamedTemplate {
    /// Compiled when first used: a model with a broken template still generates from plain prompts.
    fn compile(&self) -> Result<&ChatTemplate> {
        if let Some(done) = self.compiled.get() {
            return Ok(done);
        }
        let template = ChatTemplate::compile(&self.file, &self.source)?;
        Ok(self.compiled.get_or_init(|| template))
    }
}

/// A model's tokenizer.
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    config: Json,
    templates: BTreeMap<String, NamedTemplate>,
    /// `bos_token` and the like, as templates see them.
    variables: Vec<(String, String)>,
    special: BTreeSet<u32>,
    controls: Controls,
    thinking: bool,
    id_limit: Option<usize>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a model folder: tokenizer.json (or vocab.json and merges.txt), tokenizer_config.json, special_tokens_map.json and the
    /// chat templates.
    pub fn from_folder(dir: &Path) -> Result<Self> {
        let files = files::read_folder(dir)?;
        Self::assemble(files.tokenizer, files.config, files.templates)
    }

    /// Has what many tokenizers share made before one is used: the pattern by which GPT-2's and its like part words takes milliseconds.
    pub fn warm_up() {
        let mut word = tokenizers::PreTokenizedString::from("a");
        let _ = tokenizers::PreTokenizer::pre_tokenize(
            &tokenizers::pre_tokenizers::byte_level::ByteLevel::default(),
            &mut word,
        );
    }

    /// A tokenizer from its parts, as a GGUF file holds them. `tokenizer_config` has the keys of tokenizer_config.json.
    pub fn new(inner: tokenizers::Tokenizer, tokenizer_config: Json) -> Result<Self> {
        let templates = files::templates_in(&tokenizer_config, "the model")?;
        Self::assemble(inner, tokenizer_config, templates)
    }

    fn assemble(
        mut inner: tokenizers::Tokenizer,
        config: Json,
        templates: BTreeMap<String, (String, String)>,
    ) -> Result<Self> {
        names::apply_config(&mut inner, &config)?;
        let added = inner.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, t)| t.special).map(|(&id, _)| id).collect();
        let has = |name: &str| inner.token_to_id(name).is_some();
        let thinking = names::THINKING.iter().any(|(start, end)| has(start) && has(end));
        let templates = templates
            .into_iter()
            .map(|(name, (file, source))| (name, NamedTemplate { file, source, compiled: OnceLock::new() }))
            .collect();
        Ok(Tokenizer {
            variables: names::variables(&config),
            controls: Controls::new(&inner),
            inner: Arc::new(inner),
            config,
            templates,
            special,
            thinking,
            id_limit: None,
        })
    }

    /// Refuses to encode ids that a model with `rows` embedding rows has no row for.
    pub fn set_id_limit(&mut self, rows: usize) {
        self.id_limit = Some(rows);
    }

    /// Encodes a plain prompt: with the special tokens that the model wants around it, unless it already starts with the text of bos.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let add = self.bos_token().is_none_or(|bos| !text.starts_with(bos));
        self.run(text, add)
    }

    /// Encodes `text` and nothing else. Special tokens that it spells are tokens.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.run(text, false)
    }

    fn run(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        self.check_length(text)?;
        let encoding = shielded("the prompt", || self.inner.encode_fast(text, add_special))?;
        self.check_ids(encoding.get_ids().to_vec())
    }

    fn check_length(&self, text: &str) -> Result<()> {
        if text.len() > MAX_TEXT {
            return Err(Error::Usage(format!(
                "the prompt has {} bytes, {MAX_TEXT} is the limit; shorten it",
                text.len()
            )));
        }
        Ok(())
    }

    fn check_ids(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        let beyond = |id: &&u32| self.id_limit.is_some_and(|rows| **id as usize >= rows);
        if let Some(&id) = ids.iter().find(beyond) {
            let token = self.id_to_token(id).unwrap_or_default();
            let rows = self.id_limit.unwrap_or_default();
            return Err(Error::Tokenizer(format!(
                "tokenizer.json: token {token:?} has id {id}, the model has {rows} embeddings; tokenizer and weights are of different models"
            )));
        }
        Ok(ids)
    }

    /// Renders a conversation and encodes it; control tokens come from the template only.
    pub fn encode_chat(&self, messages: &[Message], options: &ChatOptions) -> Result<Vec<u32>> {
        let (template, options) = self.prepare(options)?;
        let mut strings = Vec::new();
        for message in messages {
            strings.extend([message.role.as_str(), message.content.as_str()]);
            message.extra.values().for_each(|v| collect_strings(v, &mut strings));
        }
        options.tools.iter().chain(options.extra.values()).for_each(|v| collect_strings(v, &mut strings));
        let Some(marker) = self.controls.marker_for(strings.iter().copied()) else {
            let text = template.render(messages, &options, &self.variables, &str::to_owned)?;
            return self.run(&text, false);
        };
        let rendered = template.render(messages, &options, &self.variables, &|s| self.controls.mark(s, marker))?;
        self.check_length(&rendered)?;
        let (text, marks) = Controls::unmark(&rendered, marker);
        self.check_ids(shielded("the conversation", || self.controls.encode(&self.inner, &text, &marks))?)
    }

    /// Renders a conversation to text.
    pub fn render_chat(&self, messages: &[Message], options: &ChatOptions) -> Result<String> {
        let (template, options) = self.prepare(options)?;
        template.render(messages, &options, &self.variables, &str::to_owned)
    }

    fn prepare(&self, options: &ChatOptions) -> Result<(&ChatTemplate, ChatOptions)> {
        let named = |name: &str| self.templates.get(name);
        let template = options.tools.as_ref().and_then(|_| named("tool_use")).or_else(|| named("default"));
        let template = template.or_else(|| self.templates.values().next()).ok_or_else(|| {
            Error::Tokenizer(
                "the model has no chat template; give a plain prompt, or a template with --chat-template".into(),
            )
        })?;
        let mut options = options.clone();
        // As in mlx-lm: a model that can think does, unless told otherwise.
        options.extra.entry("enable_thinking").or_insert(Json::Bool(self.thinking));
        Ok((template.compile()?, options))
    }

    /// Whether the model brought a chat template or was given one.
    pub fn has_chat_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// The text of the template that conversations without tools use.
    pub fn chat_template(&self) -> Option<&str> {
        self.templates.get("default").or_else(|| self.templates.values().next()).map(|t| t.source.as_str())
    }

    /// Replaces the model's templates by `source`.
    pub fn set_chat_template(&mut self, source: &str) -> Result<()> {
        let file = "the given chat template".to_owned();
        let template = NamedTemplate { file, source: source.to_owned(), compiled: OnceLock::new() };
        template.compile()?;
        self.templates = BTreeMap::from([("default".to_owned(), template)]);
        Ok(())
    }

    /// Gives a model without a chat template the ChatML one. A model's own template stays.
    pub fn use_default_chat_template(&mut self) -> Result<()> {
        if self.has_chat_template() { Ok(()) } else { self.set_chat_template(DEFAULT_TEMPLATE) }
    }

    /// The text of `ids`. An id without a token is an error.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if ids.is_empty() {
            return Ok(String::new());
        }
        if let Some(id) = ids.iter().find(|&&id| self.inner.id_to_token(id).is_none()) {
            return Err(Error::Tokenizer(format!(
                "token id {id}: the tokenizer has no such token ({} are known)",
                self.vocab_size()
            )));
        }
        shielded("the ids", || self.inner.decode(ids, skip_special))
    }

    /// Turns ids into text as they come. Special tokens show as their own text; see [`Detokenizer::skip_special`].
    pub fn detokenizer(&self) -> Detokenizer {
        Detokenizer::new(self.inner.clone())
    }

    /// The id of a token by its spelling in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Tokens known, added ones included. A model may have more embeddings than that.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.variables.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str())
    }

    /// The text of the token that starts every sequence.
    pub fn bos_token(&self) -> Option<&str> {
        self.variable("bos_token")
    }

    /// The id of [`Self::bos_token`].
    pub fn bos_token_id(&self) -> Option<u32> {
        self.token_to_id(self.bos_token()?)
    }

    /// The text of the token that ends a text or a turn. The model's config may name more; those are the caller's to add.
    pub fn eos_token(&self) -> Option<&str> {
        self.variable("eos_token")
    }

    /// The id of [`Self::eos_token`].
    pub fn eos_token_id(&self) -> Option<u32> {
        self.token_to_id(self.eos_token()?)
    }

    /// Ids of all special tokens, ascending.
    pub fn special_ids(&self) -> &BTreeSet<u32> {
        &self.special
    }

    /// Whether the vocabulary has tokens around a thought (`<think>`).
    pub fn has_thinking(&self) -> bool {
        self.thinking
    }

    /// tokenizer_config.json, with what special_tokens_map.json adds.
    pub fn config(&self) -> &Json {
        &self.config
    }

    /// The library's tokenizer, for what this type has no word for.
    pub fn inner(&self) -> &tokenizers::Tokenizer {
        &self.inner
    }
}

/// Runs a call of the tokenizers library, whose faults (some are panics, on crafted files) become errors about `subject`.
pub(crate) fn shielded<T>(subject: &str, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(e)) => Err(Error::Tokenizer(format!("{subject}: the tokenizer says: {e}"))),
        Err(_) => Err(Error::Tokenizer(format!(
            "{subject}: the tokenizer failed on it; its tokenizer.json is damaged or not supported"
        ))),
    }
}
