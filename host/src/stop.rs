//! When to stop: end-of-sequence tokens by id, stop strings by text. Text comes in pieces that split words and stop strings anywhere;
//! what goes out never holds any part of a stop string, so a suffix that could still become one waits. Each string is followed by
//! its own Knuth-Morris-Pratt automaton, byte by byte: the result does not depend on how the text was cut into pieces.

use std::collections::HashSet;

use crate::error::{Error, Result};

/// Watches one sequence for its end.
#[derive(Clone, Debug)]
pub struct Stop {
    eos: HashSet<u32>,
    strings: Vec<Automaton>,
    /// Text seen but not yet let out.
    held: String,
    matched: Option<usize>,
}

/// What may be shown after a piece of text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Emit {
    /// The text that is certain to come before any stop string; often empty.
    pub text: String,
    /// Whether a stop string was completed: nothing comes after `text`.
    pub stopped: bool,
}

impl Stop {
    /// Stops at the tokens `eos` and before the first of `strings` to be completed in the text.
    ///
    /// # Errors
    /// [`Error::Usage`] for an empty string, which would stop before anything was said.
    pub fn new(eos: impl IntoIterator<Item = u32>, strings: impl IntoIterator<Item = String>) -> Result<Self> {
        let strings: Vec<Automaton> = strings.into_iter().map(Automaton::new).collect();
        if strings.iter().any(|a| a.string.is_empty()) {
            return Err(Error::Usage("stop: an empty string would stop before the first word: remove it".into()));
        }
        Ok(Stop { eos: eos.into_iter().collect(), strings, held: String::new(), matched: None })
    }

    /// Whether this token ends the sequence.
    pub fn ends(&self, id: u32) -> bool {
        self.eos.contains(&id)
    }

    /// Takes the next piece of text. The match that is complete first wins; of several complete at the same character, the longest.
    /// After a match everything is swallowed.
    pub fn push(&mut self, text: &str) -> Emit {
        if self.matched.is_some() {
            return Emit { text: String::new(), stopped: true };
        }
        let before = self.held.len();
        self.held.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            let mut longest: Option<(usize, usize)> = None;
            for (index, automaton) in self.strings.iter_mut().enumerate() {
                let length = automaton.string.len();
                if automaton.advance(byte) == length && longest.is_none_or(|(_, most)| length > most) {
                    longest = Some((index, length));
                }
            }
            if let Some((index, length)) = longest {
                self.matched = Some(index);
                // A string starts with the first byte of a character, hence so does any match: the cut is at a boundary.
                self.held.truncate((before + at + 1).saturating_sub(length));
                return Emit { text: std::mem::take(&mut self.held), stopped: true };
            }
        }
        let waiting = self.strings.iter().map(|a| a.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len().saturating_sub(waiting));
        Emit { text: std::mem::replace(&mut self.held, rest), stopped: false }
    }

    /// Lets out what still waits: the text ended, so nothing can become a stop string any more.
    pub fn finish(&mut self) -> String {
        self.strings.iter_mut().for_each(|a| a.matched = 0);
        std::mem::take(&mut self.held)
    }

    /// The stop string that ended the text, if one did.
    pub fn matched(&self) -> Option<&str> {
        self.matched.and_then(|index| self.strings.get(index)).map(|a| a.string.as_str())
    }
}

/// One stop string and how much of it the text ends with.
#[derive(Clone, Debug)]
struct Automaton {
    string: String,
    /// For each length of a matched part, the length of the longest shorter part that the text then ends with as well.
    shorter: Vec<usize>,
    matched: usize,
}

impl Automaton {
    fn new(string: String) -> Self {
        let mut automaton = Automaton { shorter: vec![0; string.len() + 1], string, matched: 0 };
        // The string, from its second byte on, is read by the automaton built so far.
        for at in 1..automaton.string.len() {
            let byte = automaton.string.as_bytes()[at];
            automaton.shorter[at + 1] = automaton.advance(byte);
        }
        automaton.matched = 0;
        automaton
    }

    /// Reads a byte; the length of the longest part of the string that the text now ends with.
    fn advance(&mut self, byte: u8) -> usize {
        let bytes = self.string.as_bytes();
        while self.matched > 0 && bytes.get(self.matched) != Some(&byte) {
            self.matched = self.shorter[self.matched];
        }
        if bytes.get(self.matched) == Some(&byte) {
            self.matched += 1;
        }
        self.matched
    }
}
