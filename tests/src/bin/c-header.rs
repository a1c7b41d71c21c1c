//! Writes plugin-api/dylm.h: `cargo run -p tests --bin c-header`. A test holds the header to what this writes.

use tests::{c_header, tiny::Result};

fn main() -> Result<()> {
    Ok(std::fs::write(c_header::path(), c_header::text()?)?)
}
