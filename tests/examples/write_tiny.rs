//! Writes one tiny checkpoint to a folder, to run the command line on: `cargo run -p tests --example write_tiny llama /tmp/llama`.

use std::path::Path;

use tests::tiny;

fn main() -> tiny::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, out] = arguments.as_slice() else {
        let names: Vec<_> =
            tiny::entries()?.iter().filter_map(|e| Some(e.file_name()?.display().to_string())).collect();
        return Err(format!("usage: write_tiny NAME FOLDER; the names are {}", names.join(" ")).into());
    };
    std::fs::create_dir_all(out)?;
    tiny::write(&tiny::fixtures().join(name), Path::new(out))
}
