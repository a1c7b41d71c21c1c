//! Token ids -> text as it streams: what comes out, put together, is what decoding all the ids at once gives.
//! Text is held back while it can still change: bytes of an unfinished character, runs of byte tokens (one bad byte turns the whole
//! run into U+FFFD), a leading space that the decoder strips. Each token is looked at once; only tokenizers with an unusual decoder
//! decode a window of recent tokens again.

use std::sync::Arc;

use serde_json::Value as Json;

use crate::tokenizer::shielded;

/// Tokens that the generic rule decodes again at most.
const WINDOW: usize = 48;
/// Tokens of context that it keeps in front, so that joints between words come out as in the whole.
const CONTEXT: usize = 6;

/// A decoder in pieces, each of which works on one token at a time.
#[derive(Debug, Clone, Default, PartialEq)]
struct Plan {
    /// Tokens are spelled in GPT-2's byte alphabet.
    byte_level: bool,
    /// Literal replacements within a token, in order.
    replace: Vec<(String, String)>,
    /// `<0x0A>` is a byte.
    byte_fallback: bool,
    /// Metaspace: the replaced character, and whether the first token loses it.
    metaspace: Option<(char, bool)>,
    /// After everything is joined: up to so many of this character go at the start.
    strip: Option<(char, usize)>,
}

impl Plan {
    /// The plan for a decoder of tokenizer.json, or none if only the decoder itself knows what it does.
    fn of(decoder: &Json) -> Option<Plan> {
        let steps = match decoder["type"].as_str()? {
            "Sequence" => decoder["decoders"].as_array()?.as_slice(),
            _ => std::slice::from_ref(decoder),
        };
        let mut plan = Plan::default();
        let mut fused = false;
        for step in steps {
            let bytes_done = plan.byte_level || plan.byte_fallback || plan.metaspace.is_some();
            match step["type"].as_str()? {
                "ByteLevel" if steps.len() == 1 => plan.byte_level = true,
                "Metaspace" if steps.len() == 1 => {
                    let trims = match step["prepend_scheme"].as_str() {
                        Some(scheme) => scheme != "never",
                        None => step["add_prefix_space"].as_bool().unwrap_or(true),
                    };
                    plan.metaspace = Some((step["replacement"].as_str()?.chars().next()?, trims));
                }
                "Replace" if !bytes_done && !fused => {
                    let from = step["pattern"]["String"].as_str().filter(|p| !p.is_empty())?;
                    plan.replace.push((from.to_owned(), step["content"].as_str()?.to_owned()));
                }
                "ByteFallback" if !bytes_done && !fused => plan.byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" if fused && step["stop"] == 0 && plan.strip.is_none() => {
                    let count = usize::try_from(step["start"].as_u64()?).ok()?;
                    plan.strip = Some((step["content"].as_str()?.chars().next()?, count));
                }
                _ => return None,
            }
        }
        Some(plan)
    }
}

/// One sequence's text as it grows.
#[derive(Clone)]
pub struct Detokenizer {
    tokenizer: Arc<tokenizers::Tokenizer>,
    plan: Option<Arc<Plan>>,
    skip_special: bool,
    /// Tokens seen, skipped ones not counted.
    count: usize,
    /// Bytes not yet text: an unfinished character, or a run of byte tokens.
    bytes: Vec<u8>,
    /// Leading characters still to strip.
    strip: usize,
    /// The generic rule: recent ids, and how many of them are context already written.
    window: Vec<u32>,
    written: usize,
}

impl std::fmt::Debug for Detokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Detokenizer").field("plan", &self.plan).field("count", &self.count).finish_non_exhaustive()
    }
}

impl Detokenizer {
    pub(crate) fn new(tokenizer: Arc<tokenizers::Tokenizer>) -> Self {
        let decoder = tokenizer.get_decoder().and_then(|d| serde_json::to_value(d).ok()).unwrap_or_default();
        let plan = Plan::of(&decoder).map(Arc::new);
        let mut new = Detokenizer {
            tokenizer,
            plan,
            skip_special: false,
            count: 0,
            bytes: Vec::new(),
            strip: 0,
            window: Vec::new(),
            written: 0,
        };
        new.reset();
        new
    }

    /// Whether special tokens leave no trace in the text. By default they show as their own text.
    pub fn skip_special(mut self, yes: bool) -> Self {
        self.skip_special = yes;
        self
    }

    /// Starts a new sequence.
    pub fn reset(&mut self) {
        (self.count, self.written) = (0, 0);
        self.bytes.clear();
        self.window.clear();
        self.strip = self.plan.as_ref().and_then(|p| p.strip).map_or(0, |(_, n)| n);
    }

    /// Takes the next token and returns the text that became certain, often empty. An id without a token adds nothing.
    pub fn push(&mut self, id: u32) -> String {
        let added = self.tokenizer.get_added_vocabulary();
        let Some(token) = added.simple_id_to_token(id).or_else(|| self.tokenizer.id_to_token(id)) else {
            return String::new();
        };
        if self.skip_special && added.is_special_token(&token) {
            return String::new();
        }
        self.count += 1;
        let Some(plan) = self.plan.clone() else { return self.push_generic(id) };
        let mut out = String::new();
        if plan.byte_level {
            match token.chars().map(byte_of).collect::<Option<Vec<u8>>>() {
                Some(bytes) => self.bytes.extend(bytes),
                None => self.bytes.extend(token.as_bytes()),
            }
            let certain = complete_length(&self.bytes);
            out.push_str(&String::from_utf8_lossy(&self.bytes[..certain]));
            self.bytes.drain(..certain);
            return out;
        }
        let mut text = token;
        for (from, to) in &plan.replace {
            text = text.replace(from, to);
        }
        if let Some((mark, trims)) = plan.metaspace {
            let drop_mark = trims && self.count == 1;
            text =
                text.chars().filter(|&c| !(drop_mark && c == mark)).map(|c| if c == mark { ' ' } else { c }).collect();
        }
        match byte_token(&text).filter(|_| plan.byte_fallback) {
            Some(byte) => self.bytes.push(byte),
            None => {
                out.push_str(&self.end_run());
                out.push_str(&text);
            }
        }
        self.strip_start(out)
    }

    /// Ends the sequence: returns what was held back, with U+FFFD for an unfinished character, and starts anew.
    pub fn finish(&mut self) -> String {
        let out = match self.plan.as_deref() {
            Some(plan) if plan.byte_level => String::from_utf8_lossy(&self.bytes).into_owned(),
            Some(_) => {
                let run = self.end_run();
                self.strip_start(run)
            }
            None => self.unwritten(),
        };
        self.reset();
        out
    }

    /// The text of a run of byte tokens: one bad byte spoils them all, as in the library's ByteFallback.
    fn end_run(&mut self) -> String {
        let bytes = std::mem::take(&mut self.bytes);
        let count = bytes.len();
        String::from_utf8(bytes).unwrap_or_else(|_| "\u{FFFD}".repeat(count))
    }

    fn strip_start(&mut self, mut text: String) -> String {
        let Some((mark, _)) = self.plan.as_ref().and_then(|p| p.strip) else { return text };
        while self.strip > 0 && !text.is_empty() {
            if text.starts_with(mark) {
                text.remove(0);
                self.strip -= 1;
            } else {
                self.strip = 0;
            }
        }
        text
    }

    fn push_generic(&mut self, id: u32) -> String {
        self.window.push(id);
        let text = self.unwritten();
        let full = self.window.len() >= WINDOW;
        if text.is_empty() || (text.ends_with('\u{FFFD}') && !full) {
            return String::new();
        }
        self.window.drain(..self.window.len().saturating_sub(CONTEXT));
        self.written = self.window.len();
        text
    }

    /// What the ids of the window add to its context.
    fn unwritten(&self) -> String {
        let decode = |ids: &[u32]| {
            let shown = || self.tokenizer.decode(ids, self.skip_special);
            if ids.is_empty() { String::new() } else { shielded("the ids", shown).unwrap_or_default() }
        };
        let (context, whole) = (decode(&self.window[..self.written]), decode(&self.window));
        let same = context.chars().zip(whole.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum();
        let text: &str = &whole;
        text.get(same..).unwrap_or_default().to_owned()
    }
}

/// How many leading bytes no later byte can change: all but an unfinished character at the end.
fn complete_length(bytes: &[u8]) -> usize {
    let from = bytes.len().saturating_sub(3);
    for start in (from..bytes.len()).rev() {
        let expected = match bytes[start] {
            0x00..=0x7F => 1,
            0x80..=0xBF => continue,
            0xC2..=0xDF => 2,
            0xE0..=0xEF => 3,
            0xF0..=0xF4 => 4,
            _ => 1,
        };
        let open = &bytes[start..];
        // `error_len` is none exactly if more bytes could still make a character of it.
        let unfinished = open.len() < expected && std::str::from_utf8(open).is_err_and(|e| e.error_len().is_none());
        return if unfinished { start } else { bytes.len() };
    }
    bytes.len()
}

/// `<0x0A>` -> 10.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

/// GPT-2's alphabet: printable bytes are themselves, the others are 256 and on, in order. Source: openai/gpt-2, `bytes_to_unicode`.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7F).ok(),
        0x143 => Some(0xAD),
        _ => None,
    }
}
