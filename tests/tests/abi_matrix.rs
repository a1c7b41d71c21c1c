//! Plugins of ABI 1.0, of today and of a later minor, by two compilers, on hosts with the ops of ABI 1.0, of today and of later: each pair works,
//! unless the plugin calls an op that the host lacks, and then one sentence says which. The host here is this very process, which
//! plays the others: see `Tables`.

use dylm::{
    GenerateOptions, LanguageModel, LoadOptions, Trust,
    plugin::{
        library::{Tables, play_host},
        note::Note,
    },
};
use std::{
    path::{Path, PathBuf},
    sync::Mutex,
};
use tempfile::TempDir;
use tests::{
    another_api::{AnotherApi, replaced},
    binary::{self, dylm, one_sentence, trusting},
    outside::{self, checkpoint, install},
    tiny::Expected,
};

/// `play_host` is for all threads of the process.
static HOST: Mutex<()> = Mutex::new(());

/// Loads the plugin on a host of these tables, and generates.
fn tokens(tables: Tables, model: &Path, plugins: &Path) -> Result<Vec<u32>, String> {
    let _one_at_a_time = HOST.lock();
    play_host(tables);
    let outcome = generate(model, plugins);
    play_host(Tables::Today);
    outcome.map_err(|e| e.to_string())
}

fn generate(model: &Path, plugins: &Path) -> dylm::Result<Vec<u32>> {
    let options = LoadOptions { plugins: vec![plugins.to_owned()], trust: Trust::All, ..Default::default() };
    let lm: LanguageModel = dylm::load(model.to_str(), &options)?;
    let options = GenerateOptions { max_tokens: 24, ignore_eos: true, ..Default::default() };
    let prompt = Expected::read(&tests::tiny::fixtures().join("llama")).unwrap().prompt;
    let generation = dylm::Generation::new(&lm, &prompt, &options, None, None)?;
    generation.map(|response| response.map(|r| r.token)).collect()
}

fn expected() -> Vec<u32> {
    tokens(Tables::Today, checkpoint(&[]).path(), &binary::target()).unwrap()
}

/// With a copy of the library that stays: to a loader, a new file in the place of a removed one is the library that it has already opened.
fn with_outsider(tables: Tables, library: &Path) -> Result<Vec<u32>, String> {
    static COPIES: Mutex<Vec<TempDir>> = Mutex::new(Vec::new());
    let (model, copy) = (checkpoint(&[("model_type", "outsider".into())]), install(library));
    let outcome = tokens(tables, model.path(), copy.path());
    COPIES.lock().unwrap().push(copy);
    outcome
}

/// A later plugin-api: two ops more, with words for them.
fn later() -> AnotherApi {
    AnotherApi::new("later", |file, text| {
        let text = replaced(
            file,
            text,
            "src/abi/ops.rs",
            "ops_today! { op_tables }",
            "ops_today! { op_tables
                build { later fn later_has(name: RStr<'_>) -> u8; }
                layers {}
                tensors { later fn later_neg(x: Handle) -> Handle; }
            }",
        );
        // The copy needs no tables of hosts to play.
        let text = replaced(file, text, "src/abi/ops.rs", "pub mod newer {", "#[cfg(any())]\npub mod newer {");
        let text =
            replaced(file, text, "src/tensor.rs", "    /// |x|\n", "    /// -x\n    later_neg();\n    /// |x|\n");
        let word = "    /// Whether the checkpoint has it.
    #[track_caller]
    pub fn later_has(&self, name: &str) -> bool {
        let call = Call::current();
        call.ops.later_has()(call.ctx, RStr::from_str(&self.full(name)), At::caller()) != 0
    }

    /// The stored tensor of this name,";
        replaced(file, text, "src/weights.rs", "    /// The stored tensor of this name,", word)
    })
}

fn unchanged(text: String) -> String {
    text
}

/// Calls both.
fn calls(text: String) -> String {
    let text = text.replacen("self.norm.forward(&h)", "self.norm.forward(&h).later_neg().later_neg()", 1);
    text.replacen("let model = w.at", "assert!(w.later_has(\"lm_head.weight\"));\n        let model = w.at", 1)
}

/// Calls one, where the host has it.
fn asks(text: String) -> String {
    let negated = "let h = self.norm.forward(&h);
        if have::later_neg() { h.later_neg().later_neg() } else { -(-h) }";
    text.replacen("self.norm.forward(&h)", negated, 1)
}

/// Asks for both, and then calls them anyway.
fn careless(text: String) -> String {
    let text = text.replacen(
        "self.norm.forward(&h)",
        "let _ = have::later_neg();\n        self.norm.forward(&h).later_neg().later_neg()",
        1,
    );
    let has = "let _ = have::later_has();\n        let _ = std::env::var_os(\"BUILD_TOO\").map(|_| w.later_has(\"x\"));
        let model = w.at";
    text.replacen("let model = w.at", has, 1)
}

/// The outsider as it was built when ABI 1.0 was new.
fn of_1_0(toolchain: Option<&str>) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/api-1.0");
    outside::build(&folder, "outsider", "outsider_1_0", toolchain)
}

fn toolchains() -> impl Iterator<Item = Option<&'static str>> {
    let nightly = outside::has("nightly");
    if !nightly {
        eprintln!("HALF SKIPPED: there is no nightly toolchain; `rustup toolchain install nightly` brings one");
    }
    [None, Some("nightly")].into_iter().filter(move |toolchain| toolchain.is_none() || nightly)
}

#[test]
fn every_plugin_works_on_every_host_that_has_the_ops_it_calls_whatever_compiled_it() {
    let expected = expected();
    for toolchain in toolchains() {
        let later = later();
        let plugins = [
            ("of 1.0", of_1_0(toolchain), Tables::Oldest),
            ("of today", outside::build(&outside::workspace(), "outsider", "outsider", toolchain), Tables::Today),
            ("of later, as of old", later.plugin("unchanged", toolchain, unchanged), Tables::Oldest),
            ("of later, with new ops", later.plugin("calls", toolchain, calls), Tables::Newer),
            ("of later, asking first", later.plugin("asks", toolchain, asks), Tables::Oldest),
        ];
        for (what, library, needs) in &plugins {
            let compiler = Note::read(library).unwrap().rustc;
            assert_eq!(compiler.contains("nightly"), toolchain.is_some(), "{compiler}");
            for host in [Tables::Oldest, Tables::Today, Tables::Newer] {
                let outcome = with_outsider(host, library);
                if *needs == Tables::Newer && host != Tables::Newer {
                    let sentence = outcome.unwrap_err();
                    assert!(sentence.contains("needs the op later_"), "{what} on {host:?}: {sentence}");
                } else {
                    assert_eq!(outcome.as_ref(), Ok(&expected), "a plugin {what} ({compiler}) on {host:?}");
                }
            }
        }
    }
}

#[test]
fn a_file_names_the_later_ops_that_its_code_calls_and_no_others() {
    let later = later();
    let ops = |library: PathBuf| Note::read(&library).map(|note| (note.needs, note.asks)).unwrap();
    let both = || vec!["later_has".to_owned(), "later_neg".to_owned()];
    // With LTO too, since that leaves nothing as the compiler of one crate saw it.
    for profile in ["dev", "release"] {
        let build = |name, change: fn(String) -> String| ops(later.plugin_as(profile, name, None, change));
        assert_eq!(build("unchanged", unchanged), (vec![], vec![]), "{profile}");
        assert_eq!(build("calls", calls), (both(), vec![]), "{profile}");
        assert_eq!(build("asks", asks), (vec![], vec!["later_neg".to_owned()]), "{profile}");
        assert_eq!(build("careless", careless), (vec![], both()), "{profile}");
    }
}

#[test]
fn a_plugin_that_needs_a_later_op_is_refused_in_one_sentence_with_the_cure() {
    let plugins = install(&later().plugin("calls", None, calls));
    let model = checkpoint(&[("model_type", "outsider".into())]);
    let mut dylm = dylm();
    let output = trusting(dylm.arg("generate").arg("--model").arg(model.path()), plugins.path()).output();
    let sentence = one_sentence(&output.unwrap(), "a plugin with a later op");
    assert!(sentence.contains("needs the op later_has, which this dylm does not have; update dylm"), "{sentence}");
}

#[test]
fn calling_a_missing_op_fails_the_step_in_one_sentence_with_the_cure() {
    let plugins = install(&later().plugin("careless", None, careless));
    let model = checkpoint(&[("model_type", "outsider".into())]);
    let said = |build_too: bool| {
        let mut dylm = dylm();
        if build_too {
            dylm.env("BUILD_TOO", "1");
        }
        let output = trusting(dylm.arg("generate").arg("--model").arg(model.path()), plugins.path()).output().unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{}", output.status);
        String::from_utf8(output.stderr).unwrap()
    };
    let running = said(false);
    assert!(
        running.contains("later_neg: the plugin calls this op, which this dylm does not have; update"),
        "{running}"
    );
    assert!(running.contains("careless/src/lib.rs:"), "no place: {running}");
    assert_eq!(running.lines().count(), 1, "{running}");
    // A line of the report on the checkpoint.
    let building = said(true);
    assert!(building.contains("later_has: the plugin calls this op, which this dylm does not have"), "{building}");
    assert!(building.contains("careless/src/lib.rs:"), "no place: {building}");
}
