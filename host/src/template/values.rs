//! Messages, tools and other JSON as the template sees them, in the order in which they were written.
//! Every string passes through a rewriter on its way in: that is where control text in users' words gets its marks.

use std::collections::HashMap;
use std::sync::Arc;

use minijinja::value::{Enumerator, Object, ObjectRepr, Value};
use serde_json::Value as Json;

/// How strings are rewritten on their way into the template.
pub(crate) type Rewrite<'a> = &'a dyn Fn(&str) -> String;

/// A JSON object: minijinja's own ordered map cannot be built from outside it.
#[derive(Debug)]
struct Mapping {
    keys: Vec<Value>,
    entries: HashMap<String, Value>,
}

impl Object for Mapping {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.entries.get(key.as_str()?).cloned()
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.entries.get(key).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.keys.clone())
    }
}

/// An ordered mapping for the template.
pub(crate) fn mapping(pairs: impl IntoIterator<Item = (String, Value)>) -> Value {
    let mut map = Mapping { keys: Vec::new(), entries: HashMap::new() };
    for (key, value) in pairs {
        if map.entries.insert(key.clone(), value).is_none() {
            map.keys.push(Value::from(key));
        }
    }
    Value::from_object(map)
}

/// `json` for the template. serde_json has already bounded its depth.
pub(crate) fn from_json(json: &Json, rewrite: Rewrite<'_>) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(i), _) => Value::from(i),
            (_, Some(u)) => Value::from(u),
            _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(s) => Value::from(rewrite(s)),
        Json::Array(items) => Value::from(items.iter().map(|v| from_json(v, rewrite)).collect::<Vec<_>>()),
        Json::Object(map) => mapping(map.iter().map(|(k, v)| (rewrite(k), from_json(v, rewrite)))),
    }
}

/// How many values and how many bytes of text `json` holds: what a template's bounds grow with.
pub(crate) fn measure(json: &Json) -> (u64, usize) {
    match json {
        Json::String(s) => (1, s.len()),
        Json::Array(items) => items.iter().map(measure).fold((1, 0), |a, b| (a.0 + b.0, a.1 + b.1)),
        Json::Object(map) => {
            map.iter().map(|(k, v)| (measure(v), k.len())).fold((1, 0), |a, (b, k)| (a.0 + b.0, a.1 + b.1 + k))
        }
        _ => (1, 8),
    }
}
