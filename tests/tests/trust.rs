//! A plugin that is not dylm's own is opened only by consent, and the consent is to its bytes. Who gives none is asked on a terminal
//! (`trust_asked.rs`), and refused elsewhere: that, and what is kept of it, is tried here.

#![cfg(target_os = "linux")]

use dylm::{LoadOptions, Trust};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};
use tempfile::TempDir;
use tests::{
    binary::{dylm, one_sentence, target},
    outside::{checkpoint, file_name},
    trap::{trap, trap_that},
};

/// A folder with the llama plugin, which here is a stranger's, and beside it the file of what is trusted.
struct Stranger {
    folder: TempDir,
    model: TempDir,
}

impl Stranger {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::copy(target().join(file_name("llama")), folder.path().join(file_name("llama"))).unwrap();
        Stranger { folder, model: checkpoint(&[]) }
    }

    /// As `new`, with a plugin that leaves the marker.
    fn trap(marker: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        trap(folder.path(), "llama", Some("llama"), marker);
        Stranger { folder, model: checkpoint(&[]) }
    }

    fn library(&self) -> PathBuf {
        self.folder.path().canonicalize().unwrap().join(file_name("llama"))
    }

    fn trust_file(&self) -> PathBuf {
        self.folder.path().join("trust.toml")
    }

    fn sha256(&self) -> String {
        let output = Command::new("sha256sum").arg(self.library()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()[..64].to_owned()
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = dylm();
        command.args(["generate", "--prompt", "hello", "--max-tokens", "4", "--verbose", "false", "--model"]);
        command.arg(self.model.path()).arg("--plugins").arg(self.folder.path()).args(flags);
        command.env("DYLM_TRUST", self.trust_file());
        command
    }

    fn run(&self, flags: &[&str]) -> Output {
        self.command(flags).output().unwrap()
    }

    /// A run that generates, and says nothing else.
    fn works(&self, flags: &[&str]) {
        let output = self.run(flags);
        let err = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*err), (Some(0), ""), "{flags:?}");
        assert!(!output.stdout.is_empty());
    }

    fn refused(&self, flags: &[&str]) -> String {
        one_sentence(&self.run(flags), &format!("{flags:?}"))
    }

    fn plugins(&self, flags: &[&str]) -> Output {
        let mut command = dylm();
        command.arg("plugins").arg("--plugins").arg(self.folder.path()).args(flags);
        command.env("DYLM_TRUST", self.trust_file()).output().unwrap()
    }

    /// What `dylm plugins` says of the library.
    fn standing(&self) -> Value {
        let list: Value = serde_json::from_slice(&self.plugins(&["--json"]).stdout).unwrap();
        let path = self.library().to_str().unwrap().to_owned();
        list["plugins"].as_array().unwrap().iter().find(|p| p["path"] == path).unwrap()["trust"].clone()
    }

    /// Changes a byte that the loader does not read: the last section's entry size.
    fn change_a_byte(&self) {
        let mut bytes = fs::read(self.library()).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        // A new file, as a compiler makes it.
        fs::remove_file(self.library()).unwrap();
        fs::write(self.library(), bytes).unwrap();
    }
}

#[test]
fn an_unknown_plugin_is_refused_without_a_terminal_and_nothing_of_it_runs() {
    let marker = tempfile::tempdir().unwrap();
    let marker = marker.path().join("sprung");
    let stranger = Stranger::trap(&marker);
    let sentence = stranger.refused(&[]);
    for part in [stranger.library().to_str().unwrap(), "not dylm's own", &stranger.sha256(), "add --trust-plugin"] {
        assert!(sentence.contains(part), "no {part} in: {sentence}");
    }
    assert_eq!(stranger.standing()["state"], "unknown");
    assert!(!marker.exists(), "it was opened");
    assert!(!stranger.trust_file().exists(), "a refusal was written down");
    let sentence = stranger.refused(&["--trust-plugin"]);
    assert!(sentence.contains("has a note, but is no plugin"), "{sentence}");
    assert!(marker.exists(), "the trap does not work");
}

#[test]
fn with_the_flag_a_plugin_is_opened_and_from_then_on_without_it() {
    let stranger = Stranger::new();
    stranger.works(&["--trust-plugin"]);
    stranger.works(&[]);
    assert_eq!(stranger.standing()["state"], "trusted");
    assert_eq!(stranger.standing()["sha256"], stranger.sha256());
    let written = fs::read_to_string(stranger.trust_file()).unwrap();
    for part in [stranger.library().to_str().unwrap(), &stranger.sha256(), "name = \"llama\"", "trusted = 20"] {
        assert!(written.contains(part), "no {part} in: {written}");
    }
}

#[test]
fn one_changed_byte_takes_the_trust_away_until_it_is_given_again() {
    let stranger = Stranger::new();
    stranger.works(&["--trust-plugin"]);
    let before = stranger.sha256();
    stranger.change_a_byte();
    assert_ne!(stranger.sha256(), before);
    let sentence = stranger.refused(&[]);
    for part in ["has changed since it was trusted on 20", &before, &stranger.sha256(), "--trust-plugin"] {
        assert!(sentence.contains(part), "no {part} in: {sentence}");
    }
    assert_eq!(stranger.standing()["state"], "changed");
    stranger.works(&["--trust-plugin"]);
    stranger.works(&[]);
    let written = fs::read_to_string(stranger.trust_file()).unwrap();
    assert!(!written.contains(&before) && written.matches("[[plugin]]").count() == 1, "{written}");
    // The old bytes are back, and are as unknown as any.
    stranger.change_a_byte();
    assert!(stranger.refused(&[]).contains("has changed"));
}

#[test]
fn the_flag_s_value_says_which_plugin_is_meant() {
    for which in ["llama".to_owned(), Stranger::new().sha256(), format!("sha256:{}", Stranger::new().sha256())] {
        Stranger::new().works(&[&format!("--trust-plugin={which}")]);
    }
    let stranger = Stranger::new();
    stranger.works(&[&format!("--trust-plugin={}", stranger.library().display())]);
    let stranger = Stranger::new();
    let sentence = stranger.refused(&["--trust-plugin=lama"]);
    assert!(sentence.contains("--trust-plugin=lama is neither its name (llama)"), "{sentence}");
    stranger.works(&["--trust-plugin=lama", "--trust-plugin=llama"]);
}

#[test]
fn the_same_bytes_are_trusted_wherever_they_lie() {
    let (here, there) = (Stranger::new(), Stranger::new());
    here.works(&["--trust-plugin"]);
    fs::copy(here.trust_file(), there.trust_file()).unwrap();
    there.works(&[]);
}

#[test]
fn trust_can_be_taken_back_by_file_name_or_hash() {
    let stranger = Stranger::new();
    let (file, hash) = (stranger.library().display().to_string(), stranger.sha256());
    for which in [file.as_str(), "llama", &hash] {
        stranger.works(&["--trust-plugin"]);
        let output = stranger.plugins(&["--forget", which]);
        assert_eq!(output.status.code(), Some(0), "{which}");
        assert!(String::from_utf8_lossy(&output.stdout).contains(&format!("no longer trusted: {file}")));
        assert!(stranger.refused(&[]).contains("was not trusted yet"));
    }
    let sentence = one_sentence(&stranger.plugins(&["--forget", "llama"]), "twice");
    assert!(sentence.contains("no plugin of this file, name or SHA-256 is trusted"), "{sentence}");
    // A file that is gone can be forgotten too.
    stranger.works(&["--trust-plugin"]);
    fs::remove_file(stranger.library()).unwrap();
    assert_eq!(stranger.plugins(&["--forget", &file]).status.code(), Some(0));
}

#[test]
fn a_damaged_list_trusts_nothing_and_hides_nothing_else() {
    let marker = tempfile::tempdir().unwrap();
    let marker = marker.path().join("sprung");
    let stranger = Stranger::trap(&marker);
    let hash = stranger.sha256();
    let good = format!("[[plugin]]\nsha256 = \"{hash}\"\n");
    let cases = [
        (format!("{good}\n[[plugin"), "line 4"),
        (format!("{good}\n[[plugin]]\npath = \"/x\"\n"), "[[plugin]] number 2: it has no sha256"),
        (format!("{good}\n[[plugin]]\nsha256 = \"{}\"\n", &hash[1..]), "is not 64 hexadecimal digits"),
        (format!("plugin = \"{hash}\"\n"), "is not a list of [[plugin]] tables"),
        (format!("{good}{good}sha256 = 1\n"), "line"),
    ];
    for (text, expected) in cases {
        fs::write(stranger.trust_file(), &text).unwrap();
        for flags in [&[][..], &["--trust-plugin"]] {
            let sentence = stranger.refused(flags);
            assert!(sentence.contains("trust.toml") && sentence.contains(expected), "{text}: {sentence}");
            assert!(sentence.contains("nothing in it is believed"), "{sentence}");
        }
        assert_eq!(fs::read_to_string(stranger.trust_file()).unwrap(), text, "it was written over");
        let listed = stranger.plugins(&["--json"]);
        assert_eq!(listed.status.code(), Some(1));
        let list: Value = serde_json::from_slice(&listed.stdout).unwrap();
        assert!(list["plugins"].as_array().unwrap().iter().any(|p| p["note"]["name"] == "trap"), "{list}");
    }
    fs::write(stranger.trust_file(), [0xff, 0xfe]).unwrap();
    assert!(stranger.refused(&[]).contains("not UTF-8"));
    assert!(!marker.exists(), "it was opened");
}

#[test]
fn a_list_that_others_may_write_to_is_not_believed() {
    use std::os::unix::fs::PermissionsExt;
    let stranger = Stranger::new();
    stranger.works(&["--trust-plugin"]);
    fs::set_permissions(stranger.trust_file(), fs::Permissions::from_mode(0o666)).unwrap();
    let sentence = stranger.refused(&[]);
    assert!(
        sentence.contains("trust.toml: everybody may write to this file, so nothing in it is believed"),
        "{sentence}"
    );
}

#[test]
fn what_a_person_wrote_into_the_list_stays() {
    let stranger = Stranger::new();
    let text = format!(
        "# mine\nkeep = \"this\" # too\n\n[other]\nx = 1\n\n[[plugin]] # a friend's\npath = \"{}\"\nsha256 = \"{}\"\nwhy = \"asked\"\n",
        stranger.library().display(),
        "0".repeat(64)
    );
    fs::write(stranger.trust_file(), text).unwrap();
    assert!(stranger.refused(&[]).contains("has changed since it was trusted (its SHA-256 was 000"));
    stranger.works(&["--trust-plugin"]);
    let written = fs::read_to_string(stranger.trust_file()).unwrap();
    for part in
        ["# mine\nkeep = \"this\" # too\n", "[other]\nx = 1\n", "# a friend's", "why = \"asked\"", &stranger.sha256()]
    {
        assert!(written.contains(part), "no {part} in: {written}");
    }
    assert!(!written.contains("0000000000"), "{written}");
}

#[test]
fn a_plugin_that_ends_the_process_that_opens_it_costs_one_sentence_and_is_not_trusted() {
    let stranger = Stranger::new();
    let cases = [
        ("*(volatile int *)0 = 1;", "it died of SIGSEGV"),
        ("__builtin_trap();", "it died of SIGILL"),
        ("abort();", "it died of SIGABRT"),
        ("_Exit(0);", "it ended the whole process with exit code 0"),
    ];
    for (code, expected) in cases {
        trap_that(stranger.folder.path(), "llama", "llama", code);
        let sentence = stranger.refused(&["--trust-plugin"]);
        assert!(sentence.contains(expected) && sentence.contains("libllama.so"), "{code}: {sentence}");
        assert!(!stranger.trust_file().exists(), "{code}: it is trusted");
    }
}

#[test]
fn a_consent_that_cannot_be_kept_is_none() {
    let stranger = Stranger::new();
    // No folder can be made in either, not even by root.
    for file in ["/proc/trust.toml", "/dev/null/dylm/trust.toml"] {
        let output = stranger.command(&["--trust-plugin"]).env("DYLM_TRUST", file).output().unwrap();
        let sentence = one_sentence(&output, file);
        assert!(sentence.contains(file) && sentence.contains("would be forgotten"), "{sentence}");
    }
    let output = stranger.command(&["--trust-plugin"]).env("DYLM_TRUST", "trust.toml").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("must be an absolute path"));
}

#[test]
fn consents_of_one_moment_are_all_kept() {
    let (markers, list) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let list = list.path().join("new/trust.toml");
    let strangers: Vec<Stranger> = (0..8).map(|n| Stranger::trap(&markers.path().join(n.to_string()))).collect();
    let mut running = Vec::new();
    for stranger in &strangers {
        running.push(stranger.command(&["--trust-plugin"]).env("DYLM_TRUST", &list).spawn().unwrap());
    }
    for mut child in running {
        assert_eq!(child.wait().unwrap().code(), Some(1), "a trap is no plugin");
    }
    let written = fs::read_to_string(&list).unwrap();
    assert_eq!(written.matches("[[plugin]]").count(), strangers.len(), "{written}");
    assert!(strangers.iter().all(|stranger| written.contains(&stranger.sha256())), "{written}");
    let beside = fs::read_dir(list.parent().unwrap()).unwrap().count();
    assert_eq!(beside, 1, "besides the list, something was left");
}

#[test]
fn what_lies_beside_the_executable_is_dylm_s_own_even_behind_a_link() {
    let prefix = tempfile::tempdir().unwrap();
    let own = prefix.path().join("lib/dylm");
    fs::create_dir_all(own.join("plugins")).unwrap();
    fs::create_dir_all(prefix.path().join("bin")).unwrap();
    let (dylm_file, plugin) = (own.join("dylm"), own.join("plugins").join(file_name("llama")));
    fs::copy(target().join("dylm"), &dylm_file).unwrap();
    fs::copy(target().join(file_name("llama")), &plugin).unwrap();
    std::os::unix::fs::symlink("../lib/dylm/dylm", prefix.path().join("bin/dylm")).unwrap();
    let (model, list) = (checkpoint(&[]), prefix.path().join("trust.toml"));
    // What is not needed is not read.
    fs::write(&list, "[[[").unwrap();
    let mut command = Command::new(prefix.path().join("bin/dylm"));
    command.args(["generate", "--prompt", "hello", "--max-tokens", "4", "--model"]).arg(model.path());
    let output =
        command.env("DYLM_TRUST", &list).env_remove("DYLM_PLUGINS").env("HOME", "/nonexistent").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_program_that_embeds_dylm_opens_strangers_only_if_it_says_so() {
    let stranger = Stranger::new();
    let load = |trust: Trust| {
        let plugins = vec![stranger.folder.path().to_owned()];
        dylm::load(stranger.model.path().to_str(), &LoadOptions { plugins, trust, ..Default::default() })
    };
    let sentence = load(Trust::default()).err().expect("a default that opens strangers").to_string();
    assert!(sentence.contains("not dylm's own") && sentence.contains(&stranger.sha256()), "{sentence}");
    let asked = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = asked.clone();
    let no = Trust::Ask(std::sync::Arc::new(move |unknown| {
        seen.lock().unwrap().push(unknown.clone());
        Ok(false)
    }));
    assert!(load(no).is_err());
    let asked = asked.lock().unwrap();
    assert_eq!((asked.len(), &asked[0].sha256, asked[0].note.name.as_str()), (1, &stranger.sha256(), "llama"));
    assert!(load(Trust::Hashes(["0".repeat(64)].into())).is_err());
    assert!(load(Trust::Hashes([stranger.sha256()].into())).is_ok());
    assert!(load(Trust::All).is_ok());
    assert_eq!(json!(format!("{:?}", Trust::default())), json!("Pinned"));
}
