//! transformers 5's `rope_parameters` -> the older `rope_theta`, `rope_scaling` and `rope_local_base_freq`, where those are absent.
//! It holds either one set of parameters or one set per kind of layer (`full_attention`, `sliding_attention`, as gemma 3 writes them).

use serde_json::{Map, Value};

pub(super) fn add_old_names(map: &mut Map<String, Value>) {
    match map.get("rope_parameters") {
        Some(Value::Object(parameters)) => {
            let parameters = parameters.clone();
            let of_layers = |kind: &str| parameters.get(kind).and_then(Value::as_object);
            if let Some(full) = of_layers("full_attention") {
                add(map, full);
                if let Some(theta) = of_layers("sliding_attention").and_then(|p| p.get("rope_theta")) {
                    insert_if_absent(map, "rope_local_base_freq", theta.clone());
                }
            } else if parameters.values().all(|v| !v.is_object()) {
                add(map, &parameters);
            }
        }
        // Files written while the name changed keep theta inside rope_scaling.
        _ => {
            if let Some(theta) = map.get("rope_scaling").and_then(|s| s.get("rope_theta")).cloned() {
                insert_if_absent(map, "rope_theta", theta);
            }
        }
    }
    if let Some(Value::Object(scaling)) = map.get_mut("rope_scaling")
        && let Some(kind) = scaling.get("type").cloned()
    {
        insert_if_absent(scaling, "rope_type", kind);
    }
}

fn add(map: &mut Map<String, Value>, parameters: &Map<String, Value>) {
    let mut scaling = parameters.clone();
    for key in ["rope_theta", "partial_rotary_factor"] {
        if let Some(value) = scaling.remove(key) {
            insert_if_absent(map, key, value);
        }
    }
    // {"rope_type": "default"} alone says that nothing is scaled.
    let plain = scaling.get("rope_type").is_none_or(|kind| kind == "default") && scaling.len() <= 1;
    if !plain {
        insert_if_absent(map, "rope_scaling", Value::Object(scaling));
    }
}

fn insert_if_absent(map: &mut Map<String, Value>, key: &str, value: Value) {
    if map.get(key).is_none_or(Value::is_null) && !value.is_null() {
        map.insert(key.into(), value);
    }
}
