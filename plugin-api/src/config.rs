//! config.json as a struct: its keys are the fields, with defaults that may use the fields above them.

use crate::{Error, Result};
use serde_json::Value;

/// What `config!` implements: reads a struct from config.json's text.
pub trait FromConfig: Sized {
    /// `at` is the path of the object inside config.json, for error texts: empty at the top, `vision_config.` below.
    fn from_json(json: &Value, at: &str) -> Result<Self>;

    /// From the whole text.
    fn from_text(text: &str) -> Result<Self> {
        let json = serde_json::from_str(text).map_err(|e| Error(format!("config.json: {e}")))?;
        Self::from_json(&json, "")
    }
}

/// A type that a config key may have.
pub trait Read: Sized {
    /// What to call it in "should be ..".
    const WHAT: &'static str;
    /// The value, if `json` is one.
    fn read(json: &Value) -> Option<Self>;
}

/// Sizes beyond this are a broken file, and would overflow products of two.
const LARGEST: u64 = 1 << 31;

impl Read for usize {
    const WHAT: &'static str = "a whole number from 0 to 2^31";
    fn read(json: &Value) -> Option<Self> {
        // Some writers print whole numbers as 4096.0.
        let n = json.as_u64().or_else(|| json.as_f64().filter(|f| f.fract() == 0.0 && *f >= 0.0).map(|f| f as u64))?;
        (n <= LARGEST).then_some(n as usize)
    }
}

impl Read for f32 {
    const WHAT: &'static str = "a number";
    fn read(json: &Value) -> Option<Self> {
        json.as_f64().map(|x| x as f32).filter(|x| x.is_finite())
    }
}

/// For sizes that are products of a fraction, whose rounding the config's own program did in 64 bits.
impl Read for f64 {
    const WHAT: &'static str = "a number";
    fn read(json: &Value) -> Option<Self> {
        json.as_f64().filter(|x| x.is_finite())
    }
}

impl Read for bool {
    const WHAT: &'static str = "true or false";
    fn read(json: &Value) -> Option<Self> {
        json.as_bool()
    }
}

impl Read for String {
    const WHAT: &'static str = "a text";
    fn read(json: &Value) -> Option<Self> {
        json.as_str().map(Into::into)
    }
}

impl<T: Read> Read for Option<T> {
    const WHAT: &'static str = T::WHAT;
    fn read(json: &Value) -> Option<Self> {
        T::read(json).map(Some)
    }
}

impl<T: Read> Read for Vec<T> {
    const WHAT: &'static str = "a list";
    fn read(json: &Value) -> Option<Self> {
        json.as_array()?.iter().map(T::read).collect()
    }
}

/// config.json's `rope_scaling`, handed to the host as it stands.
#[derive(Debug, Clone)]
pub struct RopeScaling(pub(crate) String);

impl RopeScaling {
    /// A number in it, for what an architecture does with it beside turning.
    pub fn number(&self, key: &str) -> Option<f32> {
        serde_json::from_str::<Value>(&self.0).ok()?.get(key).and_then(f32::read)
    }

    /// The same, with a number where it says nothing.
    pub fn or(self, key: &str, number: f32) -> Self {
        match serde_json::from_str(&self.0) {
            Ok(Value::Object(mut all)) => {
                all.entry(key).or_insert(number.into());
                RopeScaling(Value::Object(all).to_string())
            }
            _ => self,
        }
    }

    /// What config.json would say, for architectures that fix it or say it elsewhere: a `rope_type` and its numbers.
    pub fn of(rope_type: &str, numbers: &[(&str, f32)]) -> Self {
        let numbers = numbers.iter().map(|&(key, number)| (key.to_owned(), Value::from(number)));
        let all = std::iter::once(("rope_type".to_owned(), Value::from(rope_type))).chain(numbers);
        RopeScaling(all.collect::<Value>().to_string())
    }
}

impl Read for RopeScaling {
    const WHAT: &'static str = "an object";
    fn read(json: &Value) -> Option<Self> {
        json.is_object().then(|| RopeScaling(json.to_string()))
    }
}

/// Nothing that a model has several of comes in more: what is asked for once for each would take hours, or all memory.
const MOST: f64 = 65_536.0;

/// Whether a key counts layers, heads, experts or groups.
fn is_count(name: &str) -> bool {
    let of = name.strip_prefix("num_").or(name.strip_prefix("n_")).or(name.strip_suffix("_num"));
    of.is_some_and(|of| ["layer", "head", "expert", "group"].iter().any(|things| of.contains(things)))
}

/// Reads one key; `None` where it is absent or null.
pub fn key<T: Read>(json: &Value, at: &str, name: &str) -> Result<Option<T>> {
    match json.get(name).filter(|v| !v.is_null()) {
        None => Ok(None),
        Some(value) => found(value, &format!("{at}{name}")).map(Some),
    }
}

/// Reads a value that was found at this path.
pub fn found<T: Read>(value: &Value, path: &str) -> Result<T> {
    let name = path.rsplit('.').next().unwrap_or(path);
    if is_count(name) && value.as_f64().is_some_and(|count| count > MOST) {
        return Err(Error(format!("config.json: {path} is {}, it should be at most {MOST}", short(value))));
    }
    let wrong = || Error(format!("config.json: {path} is {}, it should be {}", short(value), T::WHAT));
    T::read(value).ok_or_else(wrong)
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 40 { text } else { text.chars().take(40).chain("..".chars()).collect() }
}

/// Declares the keys of config.json that an architecture reads. An absent or null key takes its default, which may use the fields above
/// it; a key without default must be there. `where` bounds a value from below, which divisors need: `num_attention_heads: usize where >= 1`.
/// What it declares may be the type of a key itself.
#[macro_export]
macro_rules! config {
    ($(#[$meta:meta])* struct $name:ident { $($field:ident: $ty:ty $(where >= $least:literal)? $(= $default:expr)?),* $(,)? }) => {
        $(#[$meta])*
        #[allow(dead_code)]
        struct $name { $($field: $ty),* }

        impl $crate::config::FromConfig for $name {
            #[allow(unused_variables)]
            fn from_json(json: &$crate::config::Json, at: &str) -> $crate::Result<Self> {
                $(
                    let $field: $ty = match $crate::config::key(json, at, stringify!($field))? {
                        Some(value) => value,
                        None => $crate::config!(@default at $field $(= $default)?),
                    };
                    $(if $field < $least {
                        return Err($crate::Error(format!("config.json: {at}{} is {:?}, it should be at least {}", stringify!($field), $field, $least)));
                    })?
                )*
                Ok(Self { $($field),* })
            }
        }

        /// As a key of a larger one.
        impl $crate::config::Read for $name {
            const WHAT: &'static str = concat!("an object of " $(, stringify!($field), " ")*);
            fn read(json: &$crate::config::Json) -> Option<Self> {
                <Self as $crate::config::FromConfig>::from_json(json, "").ok()
            }
        }
    };
    (@default $at:ident $field:ident = $default:expr) => { $default };
    (@default $at:ident $field:ident) => {
        return Err($crate::Error(format!("config.json: {}{} is missing", $at, stringify!($field))))
    };
}

pub use serde_json::Value as Json;
