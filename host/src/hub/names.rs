//! Which names are believed and which files are wanted. A file name from a server becomes a path on this disk, so anything
//! but a plain relative name is refused; which files make a model is mlx-lm's list without `*.py`: code is never fetched.

/// What mlx-lm fetches (Python `fnmatch`: `*` also matches `/`).
const PATTERNS: [&str; 8] =
    ["*.json", "model*.safetensors", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jsonl", "*.jinja"];

/// Whether a file of a repository belongs to the model.
pub fn is_model_file(name: &str) -> bool {
    PATTERNS.iter().any(|pattern| match pattern.split_once('*') {
        Some((start, end)) => name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end),
        None => name == *pattern,
    })
}

/// Whether joining `name` to a folder stays inside that folder on every system.
pub fn is_plain_relative(name: &str) -> bool {
    let is_plain =
        |part: &str| !part.is_empty() && part != "." && part != ".." && !(cfg!(windows) && part.contains(':'));
    name.len() <= 512 && !name.contains('\\') && !name.chars().any(char::is_control) && name.split('/').all(is_plain)
}

/// Whether `text` reads `owner/name` by the Hub's own rules for names.
pub fn is_model_id(text: &str) -> bool {
    let is_name = |part: &str| {
        (1..=96).contains(&part.len())
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
            && !part.contains("--")
            && !part.contains("..")
    };
    text.split_once('/').is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

/// Whether `text` is a full commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    is_hex(text, 40)
}

/// Whether `text` is `digits` hexadecimal digits.
pub(super) fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_stay_inside_the_folder_are_plain() {
        for name in ["config.json", "onnx/config.json", "a..b", "..a", "refs/pr/1"] {
            assert!(is_plain_relative(name), "{name}");
        }
        for name in ["", "..", "../x.json", "a/../../x", "/etc/passwd", "a//b", "a/", "a\\b", "./a", "a\nb", "a\0"] {
            assert!(!is_plain_relative(name), "{name:?}");
        }
    }

    #[test]
    fn the_model_files_are_those_of_mlx_lm_without_code() {
        for name in ["config.json", "model-00001-of-00002.safetensors", "merges.txt", "chat_template.jinja", "a/b.json"]
        {
            assert!(is_model_file(name), "{name}");
        }
        for name in
            ["modeling_x.py", "x.so", "adapter.safetensors", "model.safetensors.bak", "pytorch_model.bin", "a.gguf"]
        {
            assert!(!is_model_file(name), "{name}");
        }
    }

    #[test]
    fn an_id_is_an_owner_and_a_name() {
        assert!(is_model_id("HuggingFaceTB/SmolLM2-135M-Instruct"));
        for text in ["gpt2", "a/b/c", "a/", "/b", "../b", "a/..", "a/-b", "a b/c", "a/b--c", "a/b\n"] {
            assert!(!is_model_id(text), "{text:?}");
        }
    }
}
