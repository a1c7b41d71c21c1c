//! The bytes of a GGUF header -> numbers, strings and metadata values, nothing taken on trust: every length is compared with what
//! is left of the file before it is used. Arrays stay where they are in the file and are decoded when asked for.

use crate::weights::bytes::Bytes;
use std::{borrow::Cow, ops::Range};

// Far above any vocabulary (2^18) or merge table (2^19) in use.
const ARRAY_CAP: u64 = 1 << 22;
const STRINGS_CAP: usize = 1 << 24;
const KEY_CAP: u64 = 1 << 16;
const STRING_CAP: u64 = 1 << 26;

/// One metadata value.
#[derive(Debug, Clone)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// f32; kept narrow because its shortest decimal form is what the model's author wrote.
    F32(f32),
    /// f64.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// Text; bytes that are not UTF-8 became U+FFFD.
    String(String),
    /// An array of strings.
    Strings(Strings),
    /// An array of numbers or truth values.
    Numbers(Numbers),
}

/// An array of strings, still in the file's bytes.
#[derive(Debug, Clone)]
pub struct Strings {
    count: usize,
    /// Each with its length before it, which was found to fit.
    bytes: Bytes,
}

impl Strings {
    /// The strings, one by one; bytes that are not UTF-8 become U+FFFD.
    pub fn iter(&self) -> impl Iterator<Item = Cow<'_, str>> {
        let mut rest = &self.bytes[..];
        (0..self.count).map_while(move |_| {
            let (len, strings) = rest.split_first_chunk::<8>()?;
            let (string, others) = strings.split_at_checked(usize::try_from(u64::from_le_bytes(*len)).ok()?)?;
            rest = others;
            Some(text(string))
        })
    }
}

fn text(bytes: &[u8]) -> Cow<'_, str> {
    // Most are, and that is found out faster than what is wrong with others.
    str::from_utf8(bytes).map_or_else(|_| String::from_utf8_lossy(bytes), Cow::Borrowed)
}

/// An array of numbers, still in the file's bytes.
#[derive(Debug, Clone)]
pub struct Numbers {
    kind: Scalar,
    bytes: Bytes,
}

#[derive(Debug, Clone, Copy)]
enum Scalar {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    U64,
    I64,
    F64,
}

impl Scalar {
    fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Scalar::U8,
            1 => Scalar::I8,
            2 => Scalar::U16,
            3 => Scalar::I16,
            4 => Scalar::U32,
            5 => Scalar::I32,
            6 => Scalar::F32,
            7 => Scalar::Bool,
            10 => Scalar::U64,
            11 => Scalar::I64,
            12 => Scalar::F64,
            _ => return None,
        })
    }

    const fn size(self) -> usize {
        match self {
            Scalar::U8 | Scalar::I8 | Scalar::Bool => 1,
            Scalar::U16 | Scalar::I16 => 2,
            Scalar::U32 | Scalar::I32 | Scalar::F32 => 4,
            Scalar::U64 | Scalar::I64 | Scalar::F64 => 8,
        }
    }

    // `bytes` has at least this scalar's size.
    fn decode(self, bytes: &[u8]) -> Value {
        let mut wide = [0u8; 8];
        let size = self.size().min(bytes.len());
        wide[..size].copy_from_slice(&bytes[..size]);
        let unsigned = u64::from_le_bytes(wide);
        match self {
            Scalar::U8 | Scalar::U16 | Scalar::U32 | Scalar::U64 => Value::Unsigned(unsigned),
            Scalar::I8 => Value::Signed((unsigned as u8 as i8).into()),
            Scalar::I16 => Value::Signed((unsigned as u16 as i16).into()),
            Scalar::I32 => Value::Signed((unsigned as u32 as i32).into()),
            Scalar::I64 => Value::Signed(unsigned as i64),
            Scalar::F32 => Value::F32(f32::from_bits(unsigned as u32)),
            Scalar::F64 => Value::F64(f64::from_bits(unsigned)),
            Scalar::Bool => Value::Bool(unsigned != 0),
        }
    }
}

impl Numbers {
    /// The elements, one by one.
    pub fn iter(&self) -> impl Iterator<Item = Value> {
        self.bytes.chunks_exact(self.kind.size()).map(|bytes| self.kind.decode(bytes))
    }

    /// How many elements there are.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.kind.size()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

impl Value {
    /// The value as an unsigned integer, if it is one and not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// The value as a finite number. An f32 gives the f64 nearest to its shortest decimal form: 1e-5, not 9.99999974e-6.
    pub fn as_f64(&self) -> Option<f64> {
        let number = match self {
            Value::F32(x) => x.to_string().parse().ok()?,
            Value::F64(x) => *x,
            Value::Unsigned(n) => *n as f64,
            Value::Signed(n) => *n as f64,
            _ => return None,
        };
        number.is_finite().then_some(number)
    }

    /// The value as a truth value.
    pub fn as_bool(&self) -> Option<bool> {
        if let Value::Bool(b) = self { Some(*b) } else { None }
    }

    /// The value as text.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::String(s) = self { Some(s) } else { None }
    }

    /// The value as an array of strings.
    pub fn as_strings(&self) -> Option<&Strings> {
        if let Value::Strings(s) = self { Some(s) } else { None }
    }

    /// The value as an array of numbers.
    pub fn as_numbers(&self) -> Option<&Numbers> {
        if let Value::Numbers(n) = self { Some(n) } else { None }
    }
}

/// Reads a mapped file from its start. Errors are the second half of a sentence.
pub(super) struct Reader<'a> {
    file: &'a Bytes,
    /// The same, found once: a vocabulary is a hundred thousand strings.
    bytes: &'a [u8],
    at: usize,
    strings: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a Bytes) -> Self {
        Self { file, bytes: file, at: 0, strings: 0 }
    }

    /// How far the header was read.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// Bytes that follow.
    pub(super) fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    fn take(&mut self, len: u64) -> Result<Range<usize>, String> {
        if len > self.left() {
            return Err(format!("cut short within its header ({} bytes): download it again", self.bytes.len()));
        }
        let start = self.at;
        self.at += len as usize;
        Ok(start..self.at)
    }

    fn read(&mut self, len: u64) -> Result<&'a [u8], String> {
        let range = self.take(len)?;
        self.bytes.get(range).ok_or_else(|| "cut short: download it again".to_owned())
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        let bytes = self.read(4)?;
        Ok(bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b)))
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        let bytes = self.read(8)?;
        Ok(bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b)))
    }

    fn string(&mut self, cap: u64) -> Result<&'a [u8], String> {
        let len = self.u64()?;
        if len > cap {
            return Err(format!("a string of {len} bytes in its header: the file is damaged"));
        }
        self.read(len)
    }

    /// A key or a tensor's name.
    pub(super) fn name(&mut self) -> Result<String, String> {
        Ok(text(self.string(KEY_CAP)?).into_owned())
    }

    pub(super) fn value(&mut self) -> Result<Value, String> {
        const STRING: u32 = 8;
        const ARRAY: u32 = 9;
        match self.u32()? {
            STRING => Ok(Value::String(text(self.string(STRING_CAP)?).into_owned())),
            ARRAY => match self.u32()? {
                ARRAY => Err("an array of arrays, which GGUF files for text models do not have".into()),
                STRING => self.strings(),
                code => {
                    let kind = Scalar::from_code(code).ok_or_else(|| format!("unknown value type {code}"))?;
                    let count = self.count(kind.size() as u64)?;
                    let range = self.take(count * kind.size() as u64)?;
                    let bytes = self.file.slice(range).ok_or("cut short: download it again")?;
                    Ok(Value::Numbers(Numbers { kind, bytes }))
                }
            },
            code => {
                let kind = Scalar::from_code(code).ok_or_else(|| format!("unknown value type {code}"))?;
                Ok(kind.decode(self.read(kind.size() as u64)?))
            }
        }
    }

    fn strings(&mut self) -> Result<Value, String> {
        let count = self.count(8)? as usize;
        self.strings += count;
        if self.strings > STRINGS_CAP {
            return Err("more strings in its header than any vocabulary has: the file is damaged".into());
        }
        let start = self.at;
        for _ in 0..count {
            self.string(STRING_CAP)?;
        }
        let bytes = self.file.slice(start..self.at).ok_or("cut short: download it again")?;
        Ok(Value::Strings(Strings { count, bytes }))
    }

    // An array's length, checked against what is left before anything is allocated for it.
    fn count(&mut self, least_bytes_each: u64) -> Result<u64, String> {
        let count = self.u64()?;
        if count > ARRAY_CAP || count.saturating_mul(least_bytes_each) > self.left() {
            return Err(format!("an array of {count} elements in its header: the file is damaged or cut short"));
        }
        Ok(count)
    }
}
