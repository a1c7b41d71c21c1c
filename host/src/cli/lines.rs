//! What the user says, line by line: edited on a terminal, plain from a pipe. Standard output stays free of prompts unless it is a
//! terminal, so that `dylm chat < questions > answers` writes answers only.

use super::printing::Paint;
use crate::error::{Error, Result};
use rustyline::{DefaultEditor, error::ReadlineError};
use std::io::{IsTerminal, stdin, stdout};

/// Where lines come from.
pub enum Lines {
    /// A person at a terminal.
    Typed(Box<DefaultEditor>),
    /// Anything else.
    Piped,
}

impl Lines {
    /// Standard input.
    pub fn open() -> Self {
        match DefaultEditor::new() {
            Ok(editor) if stdin().is_terminal() && stdout().is_terminal() => Lines::Typed(Box::new(editor)),
            _ => Lines::Piped,
        }
    }

    /// Whether a person types them.
    pub fn is_typed(&self) -> bool {
        matches!(self, Lines::Typed(_))
    }

    /// Says something beside the conversation, to a person.
    pub fn remark(&self, text: &str) {
        if self.is_typed() {
            eprintln!("{}", Paint::Dim.err(text));
        }
    }

    /// The next line; `None` at the end of input.
    pub fn read(&mut self) -> Result<Option<String>> {
        let Lines::Typed(editor) = self else {
            let mut line = String::new();
            let read = stdin().read_line(&mut line).map_err(Error::io("standard input"))?;
            return Ok((read > 0).then(|| line.trim_end_matches(['\n', '\r']).to_owned()));
        };
        loop {
            match editor.readline(">> ") {
                Ok(line) => {
                    // A line that is not remembered is no loss.
                    let _ = editor.add_history_entry(&line);
                    return Ok(Some(line));
                }
                Err(ReadlineError::Interrupted) => eprintln!("{}", Paint::Dim.err("q or Ctrl-D quits")),
                Err(ReadlineError::Eof) => return Ok(None),
                Err(e) => return Err(Error::Usage(format!("the terminal cannot be read: {e}"))),
            }
        }
    }
}
