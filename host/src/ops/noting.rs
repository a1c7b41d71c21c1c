//! What a plugin said in a step, op by op, so that the step can be done again without it. Tensors go by their handles, of which no two in
//! a step are the same.

use super::value::Value;
use abi_stable::std_types::{RSlice, RStr};
use plugin_api::abi::{AttendSpec, Handle, Slot, SpecRef};

/// One argument of an op.
#[derive(Clone, Copy, Debug)]
pub enum Word {
    /// A tensor.
    Tensor(Handle),
    /// A count or flags.
    Whole(u64),
    /// A number.
    Number(f64),
    /// How to attend.
    Attend(AttendSpec),
    /// Something that is not noted.
    Unknown,
}

/// One op.
#[derive(Clone, Debug)]
pub struct Noted {
    /// Its name in the table.
    pub op: String,
    /// The layer that it was called on.
    pub slot: Option<Slot>,
    /// Its other arguments, in order.
    pub said: Vec<Word>,
    /// What it gave.
    pub gives: Handle,
    /// The shape of that.
    pub dims: Vec<usize>,
}

/// The ops of a step so far.
#[derive(Debug, Default)]
pub struct Notes {
    /// In the order in which they were called.
    pub ops: Vec<Noted>,
    /// What the op at hand was told.
    pub said: Vec<Word>,
}

impl Notes {
    /// The op at hand is done.
    pub fn note(&mut self, op: &str, slot: Option<Slot>, value: &Value, gives: Handle) {
        let dims = value.dims().map(<[usize]>::to_vec).unwrap_or_default();
        self.ops.push(Noted { op: op.to_owned(), slot, said: std::mem::take(&mut self.said), gives, dims });
    }
}

/// What an op may be told.
pub trait Argument {
    /// Adds the argument's words.
    fn say(&self, to: &mut Vec<Word>);
}

impl Argument for Handle {
    fn say(&self, to: &mut Vec<Word>) {
        to.push(Word::Tensor(*self));
    }
}

impl Argument for u64 {
    fn say(&self, to: &mut Vec<Word>) {
        to.push(Word::Whole(*self));
    }
}

impl Argument for u32 {
    fn say(&self, to: &mut Vec<Word>) {
        to.push(Word::Whole((*self).into()));
    }
}

impl Argument for f64 {
    fn say(&self, to: &mut Vec<Word>) {
        to.push(Word::Number(*self));
    }
}

impl Argument for SpecRef<'_> {
    fn say(&self, to: &mut Vec<Word>) {
        to.push(self.read().map_or(Word::Unknown, Word::Attend));
    }
}

impl Argument for RSlice<'_, Handle> {
    fn say(&self, to: &mut Vec<Word>) {
        to.extend(self.iter().map(|&x| Word::Tensor(x)));
    }
}

impl Argument for RStr<'_> {
    fn say(&self, to: &mut Vec<Word>) {
        to.push(Word::Unknown);
    }
}
