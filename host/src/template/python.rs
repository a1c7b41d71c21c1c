//! What Python's Jinja gives chat templates and minijinja does not: `tojson` as `json.dumps` prints it, `strftime_now`,
//! `raise_exception`, a few more string methods, `{% generation %}` blocks.
//! The one thing that is not obvious: `raise_exception` marks its text, so that the caller can tell a refusal from a fault.

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State};
use minijinja_contrib::pycompat::unknown_method_callback;

/// Opens the detail of an error that the template itself raised.
pub(super) const RAISED: &str = "\u{1}raised: ";

/// Deepest nesting that `tojson` prints; Python's own limit is of this order.
const JSON_DEPTH: usize = 200;

/// Adds the functions, filters and methods to `env`.
pub(super) fn install(env: &mut Environment<'static>) {
    env.set_unknown_method_callback(call_method);
    env.add_filter("tojson", tojson);
    // Python's None is neither, its strings and mappings are both; a slice is an iterator here and a list there.
    env.add_test("iterable", is_container);
    env.add_test("sequence", is_container);
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, format!("{RAISED}{message}")))
    });
    env.add_function("strftime_now", strftime_now);
}

fn wrong(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, text.into())
}

fn is_container(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), Undefined | String | Seq | Iterable | Map)
}

fn strftime_now(format: &str) -> Result<String, Error> {
    let mut out = String::new();
    write!(out, "{}", chrono::Local::now().format(format))
        .map_err(|_| wrong(format!("strftime_now does not know the format {format:?}")))?;
    Ok(out)
}

fn call_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(s) = value.as_str() else {
        // A slice of a list is an iterator here and a list in Python.
        if value.kind() == ValueKind::Iterable && method == "count" {
            let list: Value = value.try_iter()?.collect();
            return unknown_method_callback(state, &list, method, args);
        }
        return unknown_method_callback(state, value, method, args);
    };
    Ok(match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(s.strip_prefix(prefix).unwrap_or(s))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(s.strip_suffix(suffix).unwrap_or(s))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let first = method == "partition";
            match if first { s.split_once(separator) } else { s.rsplit_once(separator) } {
                Some((before, after)) => Value::from((before, separator, after)),
                None if first => Value::from((s, "", "")),
                None => Value::from(("", "", s)),
            }
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.filter(|&n| n >= 0).map_or(usize::MAX, |n| (n as usize).saturating_add(1));
            let mut parts: Vec<Value> = match separator {
                Some("") => return Err(wrong("empty separator")),
                Some(separator) => s.rsplitn(most, separator).map(Value::from).collect(),
                None if most == usize::MAX => s.split_whitespace().rev().map(Value::from).collect(),
                None => return Err(wrong("rsplit with a limit needs a separator")),
            };
            parts.reverse();
            Value::from(parts)
        }
        "index" => {
            let (what,): (&str,) = from_args(args)?;
            let at = s.find(what).ok_or_else(|| wrong("substring not found"))?;
            Value::from(s[..at].chars().count())
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing(s, width)?)))
        }
        "ljust" | "rjust" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            let padding = fill.unwrap_or(" ").repeat(missing(s, width)?);
            Value::from(if method == "ljust" { format!("{s}{padding}") } else { format!("{padding}{s}") })
        }
        "casefold" => Value::from(s.to_lowercase()),
        _ => return unknown_method_callback(state, value, method, args),
    })
}

fn missing(s: &str, width: usize) -> Result<usize, Error> {
    if width > 10_000 {
        return Err(wrong("padding is limited to 10000 characters"));
    }
    Ok(width.saturating_sub(s.chars().count()))
}

struct Json<'a> {
    indent: Option<String>,
    item: &'a str,
    key: &'a str,
    ascii: bool,
    sorted: bool,
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, which is what transformers installs.
fn tojson(value: &Value, positional: Rest<Value>, options: Kwargs) -> Result<Value, Error> {
    let ascii: Option<bool> = match positional.first() {
        Some(v) => Some(v.is_true()),
        None => options.get("ensure_ascii")?,
    };
    let indent: Option<Value> = options.get::<Option<Value>>("indent")?.filter(|v| !v.is_none());
    let separators: Option<Value> = options.get::<Option<Value>>("separators")?.filter(|v| !v.is_none());
    let sorted: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let indent = match &indent {
        None => None,
        Some(v) => Some(match v.as_str() {
            Some(s) => s.to_owned(),
            None => " ".repeat(v.as_usize().filter(|&n| n <= 64).ok_or_else(|| wrong("indent must be 0 to 64"))?),
        }),
    };
    let pair = match &separators {
        Some(v) => Some((v.get_item_by_index(0)?, v.get_item_by_index(1)?)),
        None => None,
    };
    let given = |v: &Value| v.as_str().map(str::to_owned).ok_or_else(|| wrong("separators must be two strings"));
    let (item, key) = match &pair {
        Some((item, key)) => (given(item)?, given(key)?),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let style = Json { indent, item: &item, key: &key, ascii: ascii.unwrap_or(false), sorted: sorted.unwrap_or(false) };
    let mut out = String::new();
    style.write(value, 0, &mut out)?;
    Ok(Value::from(out))
}

impl Json<'_> {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > JSON_DEPTH {
            return Err(wrong("tojson: the value is nested too deep"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match value.to_string().as_str() {
                "inf" => out.push_str("Infinity"),
                "-inf" => out.push_str("-Infinity"),
                number => out.push_str(number),
            },
            ValueKind::String => self.write_string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.map(|v| (None, v)).collect();
                self.write_all("[", items, "]", depth, out)?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for key in value.try_iter()? {
                    let item = value.get_item(&key)?;
                    items.push((Some(key.to_string()), item));
                }
                if self.sorted {
                    items.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.write_all("{", items, "}", depth, out)?;
            }
            kind => return Err(wrong(format!("tojson cannot print a value of type {kind}"))),
        }
        Ok(())
    }

    fn write_all(
        &self,
        open: &str,
        items: Vec<(Option<String>, Value)>,
        close: &str,
        depth: usize,
        out: &mut String,
    ) -> Result<(), Error> {
        out.push_str(open);
        let empty = items.is_empty();
        for (i, (key, item)) in items.into_iter().enumerate() {
            if i > 0 {
                out.push_str(self.item);
            }
            self.break_line(depth + 1, out);
            if let Some(key) = key {
                self.write_string(&key, out);
                out.push_str(self.key);
            }
            self.write(&item, depth + 1, out)?;
        }
        if !empty {
            self.break_line(depth, out);
        }
        out.push_str(close);
        Ok(())
    }

    fn break_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    }

    fn write_string(&self, s: &str, out: &mut String) {
        out.push('"');
        for c in s.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// Turns `{% generation %}` blocks, which only mark the assistant's text for training, into plain scopes.
pub(super) fn open_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        out.push_str(&rest[..at + 2]);
        rest = &rest[at + 2..];
        let Some(end) = rest.find("%}") else { break };
        let tag = rest[..end].trim_matches(['-', '+']);
        if let name @ ("generation" | "endgeneration") = tag.trim() {
            let plain = if name == "generation" { "with" } else { "endwith" };
            out.push_str(&rest[..end].replacen(name, plain, 1));
            rest = &rest[end..];
        }
    }
    out.push_str(rest);
    out
}
