//! Writes the models table of README.md: `cargo run -p tests --bin model-table`. A test holds the README to what this writes.

use tests::{models, tiny::Result};

fn main() -> Result<()> {
    let readme = models::readme();
    let text = std::fs::read_to_string(&readme)?;
    Ok(std::fs::write(readme, models::with_table(&text)?)?)
}
