//! Builds the plugins of `tests/plugins`, as a stranger would: in a workspace of their own, with any toolchain.

use crate::binary::{dylm, trusting};
use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// The workspace of the plugins from outside.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins")
}

/// Whether `cargo +toolchain` works here.
pub fn has(toolchain: &str) -> bool {
    let version = Command::new("cargo").arg(format!("+{toolchain}")).arg("--version").output();
    version.is_ok_and(|output| output.status.success())
}

/// A name for a file that belongs to the library `name`.
pub fn file_name(name: &str) -> String {
    format!("{}{name}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX)
}

/// Builds `package`, whose library is called `library`, and returns the file. The target folder outlives the test, so that
/// dependencies are built once for each toolchain.
///
/// # Panics
/// With cargo's words if it does not build.
pub fn build(workspace: &Path, package: &str, library: &str, toolchain: Option<&str>) -> PathBuf {
    build_as("dev", workspace, package, library, toolchain)
}

/// The same with a profile of the workspace.
///
/// # Panics
/// With cargo's words if it does not build.
pub fn build_as(profile: &str, workspace: &Path, package: &str, library: &str, toolchain: Option<&str>) -> PathBuf {
    let target = crate::binary::target().with_file_name("outside").join(toolchain.unwrap_or("default"));
    let mut cargo = Command::new("cargo");
    cargo.args(toolchain.map(|t| format!("+{t}")));
    cargo.args(["build", "--quiet", "--profile", profile, "--package", package]).current_dir(workspace);
    cargo.env("CARGO_TARGET_DIR", &target);
    // What cargo told this test about itself is not meant for a build of another toolchain.
    for name in ["RUSTC", "RUSTDOC", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
        cargo.env_remove(name);
    }
    let output = cargo.output().unwrap_or_else(|e| panic!("cargo: {e}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    target.join(if profile == "dev" { "debug" } else { profile }).join(file_name(library))
}

/// A folder for `--plugins` that has this library alone.
pub fn install(library: &Path) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("a temporary folder: {e}"));
    let name = library.file_name().unwrap_or_default();
    std::fs::copy(library, folder.path().join(name)).unwrap_or_else(|e| panic!("{}: {e}", library.display()));
    folder
}

/// The tiny llama checkpoint with keys of its config.json changed.
pub fn checkpoint(changes: &[(&str, serde_json::Value)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("a temporary folder: {e}"));
    let write = || -> crate::tiny::Result<()> {
        crate::tiny::write(&crate::tiny::fixtures().join("llama"), folder.path())?;
        let path = folder.path().join("config.json");
        let mut config: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path)?)?;
        for (key, value) in changes {
            config[*key] = value.clone();
        }
        Ok(std::fs::write(path, config.to_string())?)
    };
    write().unwrap_or_else(|e| panic!("the tiny llama: {e}"));
    folder
}

/// `dylm generate` in the folder `from`, by a user who agrees to the plugins of this folder.
///
/// # Panics
/// If dylm cannot be run.
pub fn generate(model: &Path, plugins: &Path, from: &Path) -> Output {
    let mut command = dylm();
    command.args(["generate", "--max-tokens", "4", "--verbose", "false", "--model"]).arg(model);
    trusting(&mut command, plugins).current_dir(from).output().unwrap_or_else(|e| panic!("dylm: {e}"))
}

/// The same, with a model of this type.
///
/// # Panics
/// If dylm cannot be run.
pub fn run_with_plugins(model_type: &str, plugins: &Path) -> Output {
    generate(checkpoint(&[("model_type", model_type.into())]).path(), plugins, Path::new("/"))
}
