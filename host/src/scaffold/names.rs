//! A model_type -> the names that Rust and cargo ask for, or why it has none.

use crate::{
    config::is_model_type,
    error::{Error, Result},
    plugin::registry::file_stem,
};

/// What neither cargo nor rustc takes as a crate's name, and the names that a plugin's own dependencies have.
const TAKEN: [&str; 52] = [
    "abstract",
    "as",
    "async",
    "await",
    "become",
    "box",
    "break",
    "const",
    "continue",
    "crate",
    "do",
    "dyn",
    "else",
    "enum",
    "extern",
    "false",
    "final",
    "fn",
    "for",
    "gen",
    "if",
    "impl",
    "in",
    "let",
    "loop",
    "macro",
    "match",
    "mod",
    "move",
    "mut",
    "override",
    "priv",
    "pub",
    "ref",
    "return",
    "self",
    "static",
    "struct",
    "super",
    "trait",
    "true",
    "try",
    "type",
    "typeof",
    "unsafe",
    "use",
    "while",
    "core",
    "std",
    "test",
    "plugin_api",
    "abi_stable",
];

/// Refuses what cannot be a model_type, a crate and a library at once.
pub fn check(name: &str) -> Result<()> {
    let refuse = |why: &str| Err(Error::Usage(format!("{name:?} cannot be the name of a plugin: {why}")));
    if !is_model_type(name) {
        return refuse("it is a model_type of config.json, at most 64 letters, digits, _ - and .");
    }
    let of_crate = of_crate(name);
    if !of_crate.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return refuse("a crate's name begins with a letter");
    }
    if TAKEN.contains(&&*of_crate) {
        return refuse("Rust uses this word itself");
    }
    Ok(())
}

/// The crate's name, which is the library's too.
pub fn of_crate(name: &str) -> String {
    file_stem(name)
}

/// The architecture's type: `my_llama` -> `MyLlama`.
pub fn of_type(name: &str) -> String {
    let parts = name.split(|c: char| !c.is_ascii_alphanumeric());
    let capital = |part: &str| part[..1].to_ascii_uppercase() + &part[1..];
    let name: String = parts.filter(|part| !part.is_empty()).map(capital).collect();
    // The words of the prelude are taken.
    name + "Lm"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_serves_config_json_cargo_and_rust() {
        for (name, of_a_crate, of_a_type) in
            [("my_llama", "my_llama", "MyLlamaLm"), ("Phi-3.5", "phi_3_5", "Phi35Lm"), ("x", "x", "XLm")]
        {
            check(name).unwrap();
            assert_eq!((of_crate(name).as_str(), of_type(name).as_str()), (of_a_crate, of_a_type));
        }
        for name in ["", "../x", "a/b", ".x", "3llama", "_x", "fn", "plugin-api", "é", "a b", "a\n"] {
            assert!(matches!(check(name), Err(Error::Usage(_))), "{name:?}");
        }
    }
}
