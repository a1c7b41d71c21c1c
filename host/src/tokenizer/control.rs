//! Keeps control tokens for the template: text of a conversation that spells one is encoded as the plain characters it is.
//! Such text travels through the template between two marks (noncharacters that the conversation does not contain) and the marks are
//! taken out of the rendered text again. The text is then encoded in one piece by the tokenizer's own stages, in which an added token
//! does not match where its characters are the conversation's. A conversation without such text never comes here.

use std::collections::{BTreeSet, HashSet};

use serde_json::Value as Json;
use tokenizers::normalizer::Range;
use tokenizers::tokenizer::Result as TokenResult;
use tokenizers::{AddedToken, Model, NormalizedString, Normalizer, PreTokenizedString, PreTokenizer, Token};

/// An added token by the text that it matches: its own, or what the normalizer makes of it.
struct Entry {
    text: String,
    id: u32,
    flags: AddedToken,
}

/// Added tokens by their first byte, longest first.
struct Table(Vec<Vec<Entry>>);

impl Table {
    fn new(entries: impl IntoIterator<Item = Entry>) -> Self {
        let mut rows: Vec<Vec<Entry>> = (0..256).map(|_| Vec::new()).collect();
        for entry in entries {
            if let Some(&first) = entry.text.as_bytes().first() {
                rows[usize::from(first)].push(entry);
            }
        }
        rows.iter_mut().for_each(|row| row.sort_by_key(|e| std::cmp::Reverse(e.text.len())));
        Table(rows)
    }

    fn at(&self, text: &str, position: usize) -> Option<&Entry> {
        let rest = &text.as_bytes()[position..];
        self.0[usize::from(*rest.first()?)].iter().find(|e| rest.starts_with(e.text.as_bytes()))
    }

    /// The leftmost longest matches from left to right.
    fn matches<'a>(&'a self, text: &'a str) -> impl Iterator<Item = (usize, &'a Entry)> {
        let mut position = 0;
        std::iter::from_fn(move || {
            while position < text.len() {
                if let Some(entry) = self.at(text, position) {
                    let start = position;
                    position += entry.text.len();
                    return Some((start, entry));
                }
                position += 1;
            }
            None
        })
    }
}

/// The added tokens of one tokenizer.
pub(super) struct Controls {
    verbatim: Table,
    normalized: Table,
    special: Table,
    /// The longer halves of special tokens, from either side, and the length of the longest.
    heads: HashSet<Box<[u8]>>,
    tails: HashSet<Box<[u8]>>,
    longest: usize,
}

/// The two marks around control text.
#[derive(Clone, Copy)]
pub(super) struct Marker {
    open: char,
    close: char,
}

/// Where marks stood in a rendered text, as byte positions of the text without them.
#[derive(Default)]
pub(super) struct Marks {
    open: BTreeSet<usize>,
    close: BTreeSet<usize>,
}

impl Marks {
    /// Whether the bytes `start..end` came, in part or as a whole, from the conversation.
    fn cover(&self, start: usize, end: usize) -> bool {
        let inside = |set: &BTreeSet<usize>| set.range(start + 1..end).next().is_some();
        (self.open.contains(&start) && self.close.contains(&end)) || inside(&self.open) || inside(&self.close)
    }
}

impl Controls {
    pub(super) fn new(tokenizer: &tokenizers::Tokenizer) -> Self {
        let entries = |keep: fn(&AddedToken) -> bool, normalize: bool| {
            let added = tokenizer.get_added_vocabulary().get_added_tokens_decoder();
            Table::new(added.iter().filter(|(_, token)| keep(token)).map(|(&id, token)| {
                let mut text = NormalizedString::from(token.content.as_str());
                if let (true, Some(normalizer)) = (normalize, tokenizer.get_normalizer()) {
                    let _ = normalizer.normalize(&mut text);
                }
                Entry { text: text.get().to_owned(), id, flags: token.clone() }
            }))
        };
        let special = entries(|t| t.special, false);
        let (mut heads, mut tails, mut longest) = (HashSet::new(), HashSet::new(), 0);
        for token in special.0.iter().flatten().map(|e| e.text.as_bytes()) {
            longest = longest.max(token.len());
            for half in token.len().div_ceil(2)..token.len() {
                heads.insert(token[..half].into());
                tails.insert(token[token.len() - half..].into());
            }
        }
        Controls {
            verbatim: entries(|t| !t.normalized, false),
            normalized: entries(|t| t.normalized, true),
            special,
            heads,
            tails,
            longest,
        }
    }

    /// Marks that none of `strings` contains, or none if no string spells (or could be joined to spell) a control token.
    pub(super) fn marker_for<'a>(&self, strings: impl Iterator<Item = &'a str> + Clone) -> Option<Marker> {
        let suspect = |s: &str| self.special.matches(s).next().is_some() || self.edges(s) != (None, None);
        if !strings.clone().any(suspect) {
            return None;
        }
        let mut free = ('\u{FDD0}'..='\u{FDEF}').filter(|&mark| !strings.clone().any(|s| s.contains(mark)));
        // A conversation with all 32 noncharacters loses two of them (`mark` drops them).
        Some(Marker { open: free.next().unwrap_or('\u{FDD0}'), close: free.next().unwrap_or('\u{FDEF}') })
    }

    /// Byte positions where `text` begins after, or ends before, the missing half of a control token. A template that joins
    /// several texts could otherwise complete it.
    fn edges(&self, text: &str) -> (Option<usize>, Option<usize>) {
        let (start, end) = (text.len() - text.trim_start().len(), text.trim_end().len());
        let body = text.as_bytes().get(start..end).unwrap_or_default();
        let reach = self.longest.min(body.len());
        let first = (1..=reach).any(|n| self.tails.contains(&body[..n]));
        let last = (1..=reach).any(|n| self.heads.contains(&body[body.len() - n..]));
        (first.then_some(start), last.then_some(end))
    }

    /// `text` with marks around every control token that it spells.
    pub(super) fn mark(&self, text: &str, marker: Marker) -> String {
        let clean = text.replace([marker.open, marker.close], "");
        let (first, last) = self.edges(&clean);
        let mut inserts: Vec<(usize, u8, char)> = Vec::new();
        inserts.extend(first.map(|at| (at, 1, marker.open)));
        inserts.extend(last.map(|at| (at, 0, marker.close)));
        for (start, entry) in self.special.matches(&clean) {
            inserts.push((start, 1, marker.open));
            inserts.push((start + entry.text.len(), 0, marker.close));
        }
        inserts.sort_unstable();
        let mut out = String::with_capacity(clean.len() + 3 * inserts.len());
        let mut from = 0;
        for (at, _, mark) in inserts {
            out.push_str(&clean[from..at]);
            out.push(mark);
            from = at;
        }
        out.push_str(&clean[from..]);
        out
    }

    /// Takes the marks out of a rendered text.
    pub(super) fn unmark(rendered: &str, marker: Marker) -> (String, Marks) {
        let mut marks = Marks::default();
        let mut text = String::with_capacity(rendered.len());
        for c in rendered.chars() {
            if c == marker.open {
                marks.open.insert(text.len());
            } else if c == marker.close {
                marks.close.insert(text.len());
            } else {
                text.push(c);
            }
        }
        (text, marks)
    }

    /// Encodes `text` as `tokenizer` does, except that no added token matches what `marks` cover.
    pub(super) fn encode(&self, tokenizer: &tokenizers::Tokenizer, text: &str, marks: &Marks) -> TokenResult<Vec<u32>> {
        let mut pieces = PreTokenizedString::from(text);
        pieces.split(|_, piece| Ok(split(piece, &self.verbatim, marks)))?;
        pieces.split(|_, mut piece| {
            if let Some(normalizer) = tokenizer.get_normalizer() {
                normalizer.normalize(&mut piece)?;
            }
            Ok(split(piece, &self.normalized, marks))
        })?;
        if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        tokenizer.get_model().tokenize_in_pretokenized(&mut pieces, None)?;
        let encoding = pieces.into_encoding(None, 0, tokenizers::OffsetType::None)?;
        Ok(encoding.get_ids().to_vec())
    }
}

/// `piece` cut at the added tokens of `table`, which become tokens unless the marks cover them.
fn split(piece: NormalizedString, table: &Table, marks: &Marks) -> Vec<(NormalizedString, Option<Vec<Token>>)> {
    let text = piece.get();
    let base = piece.offsets_original().0;
    let mut cuts: Vec<(Option<&Entry>, usize, usize)> = Vec::new();
    let mut done = 0;
    for (start, entry) in table.matches(text) {
        let end = start + entry.text.len();
        let original = piece.convert_offsets(Range::Normalized(start..end)).unwrap_or(start..end);
        let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        let in_word = word(text[..start].chars().next_back()) || word(text[end..].chars().next());
        if marks.cover(base + original.start, base + original.end)
            || (entry.flags.single_word && in_word)
            || start < done
        {
            continue;
        }
        let from = if entry.flags.lstrip { text[..start].trim_end().len().max(done) } else { start };
        let to = if entry.flags.rstrip { text.len() - text[end..].trim_start().len() } else { end };
        if done < from {
            cuts.push((None, done, from));
        }
        cuts.push((Some(entry), from, to));
        done = to;
    }
    if done < text.len() {
        cuts.push((None, done, text.len()));
    }
    let slice = |from, to| piece.slice(Range::Normalized(from..to));
    cuts.iter()
        .filter_map(|&(entry, from, to)| {
            let part = slice(from, to)?;
            let token = entry.map(|e| vec![Token::new(e.id, part.get().to_owned(), (0, part.len()))]);
            Some((part, token))
        })
        .collect()
}

/// Every string in `json`, keys included.
pub(super) fn collect_strings<'a>(json: &'a Json, into: &mut Vec<&'a str>) {
    match json {
        Json::String(s) => into.push(s),
        Json::Array(items) => items.iter().for_each(|v| collect_strings(v, into)),
        Json::Object(map) => map.iter().for_each(|(k, v)| {
            into.push(k);
            collect_strings(v, into);
        }),
        _ => {}
    }
}
