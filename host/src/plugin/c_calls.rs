//! What a plugin in C hears from the host beside ops: config.json's keys one by one, and a place to say why a call fails.
//!
//! Its first error stays, as a failed tensor stays failed: readers go on with a harmless value, so that an author need not look after each.

use crate::ops::table;
use abi_stable::std_types::{RStr, RString};
use plugin_api::abi::{
    self, Ctx,
    c::{
        ConfigOps, Host, Text,
        ops::{BuildOps, HasOps, LayerOps, TensorOps},
    },
    ops::OpsRef,
    root::{ERROR_ABI, ERROR_CONFIG, PluginError},
};
use plugin_api::config::{self, Read};
use serde_json::Value;
use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
    sync::OnceLock,
};

/// Why a call failed: an `ERROR_*` and a sentence.
pub struct Reason(u32, String);

impl Reason {
    /// As a plugin in Rust would say it.
    pub fn into_error(self) -> PluginError {
        PluginError { code: self.0, message: RString::from(self.1), detail: RString::new() }
    }
}

/// What is said during one call of a plugin, on its thread.
pub struct Conversation {
    ctx: Ctx,
    config: Option<Value>,
    error: Option<Reason>,
    /// Lent to the plugin until the call ends, each with a zero byte at its end.
    texts: Vec<Box<[u8]>>,
}

thread_local! {
    static NOW: RefCell<Option<Conversation>> = const { RefCell::new(None) };
}

impl Conversation {
    /// For `create`.
    pub fn about(ctx: Ctx, config: &str) -> Result<Self, String> {
        let config = serde_json::from_str(config).map_err(|e| format!("config.json: {e}"))?;
        Ok(Self { config: Some(config), ..Self::without_config(ctx) })
    }

    /// For `forward` and `head`, which read no values.
    pub fn without_config(ctx: Ctx) -> Self {
        Self { ctx, config: None, error: None, texts: Vec::new() }
    }

    /// Runs a call of the plugin; its first error with its result.
    pub fn hold<T>(self, call: impl FnOnce() -> T) -> (T, Option<Reason>) {
        let outer = NOW.replace(Some(self));
        let result = call();
        let held = NOW.replace(outer);
        (result, held.and_then(|conversation| conversation.error))
    }

    fn fail(&mut self, code: u32, message: String) {
        self.error.get_or_insert(Reason(code, message));
    }

    /// The value at a path, unless absent or null.
    fn find(&self, path: &str) -> Result<Option<&Value>, String> {
        let Some(config) = &self.config else { return Err(format!("config.json: {path} is read after create")) };
        let value = path.split('.').try_fold(config, |value, key| match value {
            Value::Array(list) => list.get(key.parse::<usize>().ok()?),
            other => other.get(key),
        });
        Ok(value.filter(|value| !value.is_null()))
    }

    /// The value at a path as a `T`, or `otherwise`; without that the key must be there.
    fn read<T: Read>(&self, path: &str, otherwise: Option<T>) -> Result<T, String> {
        match self.find(path)? {
            Some(value) => config::found(value, path).map_err(|e| e.0),
            None => otherwise.ok_or_else(|| format!("config.json: {path} is missing")),
        }
    }

    fn lend(&mut self, text: &str) -> Text {
        let bytes: Box<[u8]> = text.bytes().chain([0]).collect();
        self.texts.push(bytes);
        let lent = self.texts.last().map_or(&[][..], |bytes| &bytes[..bytes.len() - 1]);
        Text::of(lent)
    }
}

/// Runs `f` with the conversation of this context, if it is the one that this thread holds.
fn speak<T>(ctx: Ctx, nothing: T, f: impl FnOnce(&mut Conversation) -> T) -> T {
    NOW.with(|now| match now.try_borrow_mut().as_deref_mut() {
        Ok(Some(conversation)) if conversation.ctx.0 == ctx.0 && !ctx.0.is_null() => {
            catch_unwind(AssertUnwindSafe(|| f(conversation))).ok()
        }
        _ => None,
    })
    .unwrap_or(nothing)
}

/// Reads a key; what goes wrong becomes the call's error, and the value `otherwise`.
fn key<T>(ctx: Ctx, key: Text, otherwise: T, read: impl FnOnce(&mut Conversation, &str) -> Result<T, String>) -> T
where
    T: Copy,
{
    speak(ctx, otherwise, |conversation| {
        // SAFETY: dylm.h's promise for texts.
        let name = unsafe { key.entries() }.ok().and_then(|bytes| str::from_utf8(bytes).ok());
        let value = match name {
            Some(name) => read(conversation, name),
            None => Err("the plugin reads a key of config.json whose name is not UTF-8".to_owned()),
        };
        value.unwrap_or_else(|message| {
            conversation.fail(ERROR_CONFIG, message);
            otherwise
        })
    })
}

extern "C" fn whole(ctx: Ctx, name: Text, least: u64, most: u64, otherwise: u64) -> u64 {
    key(ctx, name, least, |conversation, name| {
        let otherwise = (otherwise != u64::MAX).then_some(otherwise as usize);
        let number = conversation.read(name, otherwise)? as u64;
        match number {
            n if n < least => Err(format!("config.json: {name} is {n}, it should be at least {least}")),
            n if n > most => Err(format!("config.json: {name} is {n}, it should be at most {most}")),
            n => Ok(n),
        }
    })
}

extern "C" fn number(ctx: Ctx, name: Text, otherwise: f64) -> f64 {
    key(ctx, name, 0.0, |conversation, name| conversation.read(name, Some(otherwise).filter(|n| !n.is_nan())))
}

extern "C" fn flag(ctx: Ctx, name: Text, otherwise: u32) -> u32 {
    key(ctx, name, 0, |conversation, name| {
        conversation.read(name, (otherwise <= 1).then_some(otherwise == 1)).map(u32::from)
    })
}

extern "C" fn text(ctx: Ctx, name: Text, otherwise: Text) -> Text {
    key(ctx, name, Text::of(c"".to_bytes()), |conversation, name| {
        if !otherwise.start.is_null() && conversation.find(name)?.is_none() {
            return Ok(otherwise);
        }
        let text: String = conversation.read(name, None)?;
        Ok(conversation.lend(&text))
    })
}

extern "C" fn json(ctx: Ctx, name: Text) -> Text {
    key(ctx, name, Text::of(c"".to_bytes()), |conversation, name| {
        let text = conversation.find(name)?.map(Value::to_string).unwrap_or_default();
        Ok(conversation.lend(&text))
    })
}

extern "C" fn count(ctx: Ctx, name: Text) -> u64 {
    key(ctx, name, 0, |conversation, name| {
        let list: Option<Vec<Anything>> = conversation.read(name, Some(None))?;
        Ok(list.map_or(0, |list| list.len() as u64))
    })
}

/// An entry of a list that is only counted.
struct Anything;

impl Read for Anything {
    const WHAT: &'static str = "anything";
    fn read(_: &Value) -> Option<Self> {
        Some(Anything)
    }
}

extern "C" fn error(ctx: Ctx, code: u32, message: Text) {
    speak(ctx, (), |conversation| {
        // SAFETY: dylm.h's promise for texts.
        let message = unsafe { message.entries() }.map(String::from_utf8_lossy).unwrap_or_default();
        let message = if message.is_empty() { "the plugin failed and did not say why".into() } else { message };
        conversation.fail(if code == 0 { ERROR_ABI } else { code }, message.into_owned());
    })
}

extern "C" fn failed(ctx: Ctx) -> u32 {
    speak(ctx, ERROR_ABI, |conversation| conversation.error.as_ref().map_or(0, |Reason(code, _)| *code))
}

extern "C" fn extension(id: Text) -> *const () {
    // SAFETY: dylm.h's promise for texts.
    let id = unsafe { id.entries() }.ok().and_then(|bytes| str::from_utf8(bytes).ok());
    id.map_or(ptr::null(), |id| (table::host().extension)(RStr::from_str(id)))
}

struct Here;

impl HasOps for Here {
    fn ops() -> OpsRef {
        table::host().ops
    }
}

/// What every call of a plugin in C gets to see of the host.
pub fn host() -> &'static Host {
    static HOST: OnceLock<Host> = OnceLock::new();
    static BUILD: OnceLock<BuildOps> = OnceLock::new();
    static LAYERS: OnceLock<LayerOps> = OnceLock::new();
    static TENSORS: OnceLock<TensorOps> = OnceLock::new();
    static CONFIG: ConfigOps =
        ConfigOps { size: size_of::<ConfigOps>() as u64, whole, number, flag, text, json, count };
    HOST.get_or_init(|| Host {
        size: size_of::<Host>() as u64,
        major: abi::MAJOR,
        minor: abi::MINOR,
        build: BUILD.get_or_init(BuildOps::over::<Here>),
        layers: LAYERS.get_or_init(LayerOps::over::<Here>),
        tensors: TENSORS.get_or_init(TensorOps::over::<Here>),
        config: &CONFIG,
        error,
        failed,
        extension,
    })
}
