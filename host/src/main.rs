//! The binary: see `dylm::cli`.

/// Bounds the memory that a chat template may take.
#[global_allocator]
static METERED: dylm::template::bounded::Metered = dylm::template::bounded::Metered;

fn main() -> std::process::ExitCode {
    dylm::cli::main()
}
