//! Compiles the plugins of `tests/plugins/c`, as somebody without Rust would: a C compiler, `dylm.h`, nothing else.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// What can compile a plugin in C here, and how it is asked to find fault with the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// The oldest C that the header allows.
    C99,
    /// C with `_Static_assert`.
    C17,
    /// The oldest C++ that the header allows.
    Cpp11,
}

impl Language {
    fn compiler(self) -> String {
        let (name, otherwise) = if self == Language::Cpp11 { ("CXX", "c++") } else { ("CC", "cc") };
        env::var(name).unwrap_or_else(|_| otherwise.into())
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Language::C99 => &["-std=c99"],
            Language::C17 => &["-std=c17"],
            Language::Cpp11 => &["-x", "c++", "-std=c++11"],
        }
    }
}

/// The folder of the sources.
pub fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins/c")
}

/// Whether there is a compiler; where there is none it says that a test is skipped.
pub fn can(language: Language) -> bool {
    let compiler = language.compiler();
    let can = Command::new(&compiler).arg("--version").output().is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("SKIPPED: there is no compiler for {language:?} called {compiler}");
    }
    can
}

/// Compiles without a warning, or panics with the compiler's words.
fn compile(language: Language, flags: &[&str], source: &Path, file: &Path) {
    let mut compiler = Command::new(language.compiler());
    compiler.args(language.flags()).args(["-O1", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]);
    compiler.args(flags).arg("-I").arg(crate::c_header::path().with_file_name("")).arg("-I").arg(sources());
    compiler.arg("-o").arg(file).arg(source).arg("-lm");
    let output = compiler.output().unwrap_or_else(|e| panic!("{compiler:?}: {e}"));
    assert!(output.status.success(), "{compiler:?}\n{}", String::from_utf8_lossy(&output.stderr));
}

/// A folder for `--plugins` with the library of this source alone; `flags` come before the header's own folder.
pub fn plugin(language: Language, flags: &[&str], source: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("a temporary folder: {e}"));
    let source = sources().join(source);
    let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let flags = [flags, &["-shared"]].concat();
    compile(language, &flags, &source, &folder.path().join(crate::outside::file_name(&name)));
    folder
}

/// What a program of this text prints.
pub fn printed(language: Language, text: &str) -> Output {
    let folder = tempfile::tempdir().unwrap_or_else(|e| panic!("a temporary folder: {e}"));
    let (source, program) = (folder.path().join("program.c"), folder.path().join("program"));
    std::fs::write(&source, text).unwrap_or_else(|e| panic!("{}: {e}", source.display()));
    compile(language, &[], &source, &program);
    Command::new(program).output().unwrap_or_else(|e| panic!("the program: {e}"))
}
