//! Messages -> token ids, for every command that talks: which template renders them, what it is told, and what a prompt cache already
//! holds of the conversation. A cached prompt is the beginning of the first user message, so the whole conversation is rendered anew
//! and the cache keeps whatever of it has the same tokens.

use crate::{
    cache::prompt::{CachedText, PromptCache, UNKNOWN},
    error::{Error, Result},
    repo::TEMPLATE_CAP,
    template::{ChatOptions, Message},
    tokenizer::Tokenizer,
};
use clap::Args;
use std::{io::Read, path::Path};

/// How a conversation becomes text.
#[derive(Args)]
pub struct ConversationFlags {
    /// Instructions that come before the conversation
    #[arg(long)]
    pub system_prompt: Option<String>,
    /// Use this chat template in place of the model's: a file, or the Jinja text itself
    #[arg(long, value_name = "FILE")]
    chat_template: Option<String>,
    /// Give a model that has no chat template a plain one (ChatML)
    #[arg(long)]
    use_default_chat_template: bool,
    /// Values for the chat template, as JSON: {"enable_thinking": false}
    #[arg(long, value_name = "JSON")]
    chat_template_config: Option<String>,
}

impl ConversationFlags {
    /// Gives the tokenizer the template that the flags ask for.
    pub fn set_template(&self, tokenizer: &mut Tokenizer) -> Result<()> {
        if let Some(given) = &self.chat_template {
            tokenizer.set_chat_template(&template_text(given)?)?;
        }
        if self.use_default_chat_template { tokenizer.use_default_chat_template() } else { Ok(()) }
    }

    /// Values for the template; the rest is as for a plain question.
    pub fn options(&self) -> Result<ChatOptions> {
        let extra = match &self.chat_template_config {
            Some(json) => serde_json::from_str(json)
                .map_err(|e| Error::Usage(format!("--chat-template-config: not a JSON object: {e}")))?,
            None => Default::default(),
        };
        Ok(ChatOptions { add_generation_prompt: true, extra, ..Default::default() })
    }
}

/// A name that is a file means its content; anything with a brace is the template itself.
fn template_text(given: &str) -> Result<String> {
    if given.contains('{') {
        return Ok(given.to_owned());
    }
    let file = std::fs::File::open(given).map_err(Error::io(given))?;
    let mut text = String::new();
    file.take(TEMPLATE_CAP).read_to_string(&mut text).map_err(Error::io(given))?;
    Ok(text)
}

/// What was said before the first user message, and its beginning, when both are in a prompt cache.
#[derive(Default)]
pub struct Opening {
    /// Before everything.
    pub system_prompt: Option<String>,
    /// What the first user message begins with.
    pub text: String,
    /// Whether a chat template was used for it; `None` leaves that to the flags.
    pub chat: Option<bool>,
    /// Tokens of a cache that does not tell its text (mlx-lm's files do not).
    unknown: usize,
}

impl Opening {
    /// The opening that flags and file agree on.
    pub fn new(flags: &ConversationFlags, saved: Option<&PromptCache>) -> Result<Self> {
        let system_prompt = flags.system_prompt.clone();
        let Some(saved) = saved else { return Ok(Opening { system_prompt, ..Default::default() }) };
        let Some(CachedText { system_prompt: cached, text, chat }) = saved.text.clone() else {
            return Ok(Opening { system_prompt, unknown: saved.tokens(), ..Default::default() });
        };
        if system_prompt.is_some() && system_prompt != cached {
            return Err(Error::Usage(format!(
                "--system-prompt: {} was made with another one, which is a part of it; leave the flag out",
                saved.path.display()
            )));
        }
        Ok(Opening { system_prompt: cached, text, chat: Some(chat), unknown: 0 })
    }

    /// The ids of a plain text that begins with the opening.
    pub fn encode_plain(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
        let parts = [self.system_prompt.as_deref().unwrap_or_default(), &self.text, text];
        Ok(self.after_unknown(tokenizer.encode(&parts.concat())?))
    }

    /// The ids of a conversation that begins with the opening.
    pub fn encode(&self, tokenizer: &Tokenizer, turns: &[Message], options: &ChatOptions) -> Result<Vec<u32>> {
        let ids = tokenizer.encode_chat(&self.messages(turns), options)?;
        if self.unknown == 0 {
            return Ok(ids);
        }
        // As in mlx-lm: of the rendered text only what follows the start of the first user message is new.
        let options = ChatOptions { add_generation_prompt: false, continue_final_message: true, ..options.clone() };
        let before = tokenizer.encode_chat(&self.messages(&[Message::new("user", "")]), &options)?;
        let shared = before.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        Ok(self.after_unknown(ids[shared..].to_vec()))
    }

    fn messages(&self, turns: &[Message]) -> Vec<Message> {
        let mut messages: Vec<Message> = self.system_prompt.iter().map(|text| Message::new("system", text)).collect();
        let first_user = messages.len();
        messages.extend_from_slice(turns);
        if let Some(message) = messages.get_mut(first_user) {
            message.content.insert_str(0, &self.text);
        }
        messages
    }

    fn after_unknown(&self, ids: Vec<u32>) -> Vec<u32> {
        std::iter::repeat_n(UNKNOWN, self.unknown).chain(ids).collect()
    }
}

/// The model to load: the one named, or the one that the prompt cache was made with.
pub fn model_of<'a>(named: Option<&'a str>, saved: Option<&'a PromptCache>) -> Result<Option<&'a str>> {
    let Some(saved) = saved else { return Ok(named) };
    match named {
        // A file of mlx-lm has nothing but the name to tell its model by.
        Some(named) if saved.fingerprint.is_none() && saved.model != named => Err(Error::Usage(format!(
            "{}: was made with the model {}, not with {named}; leave --model out",
            saved.path.display(),
            saved.model
        ))),
        Some(named) => Ok(Some(named)),
        None => Ok(Some(&saved.model)),
    }
}

/// The prompt cache of a flag, if given.
pub fn open_cache(path: Option<&Path>) -> Result<Option<PromptCache>> {
    path.map(PromptCache::open).transpose()
}
