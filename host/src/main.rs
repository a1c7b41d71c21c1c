//! The binary: see `dylm::cli`.

fn main() -> std::process::ExitCode {
    dylm::cli::main()
}
