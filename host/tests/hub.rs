//! Fetching from a Hub over real sockets: what arrives, what is kept after a fault, what is refused, and who gets the token.

use std::fs;
use std::path::Path;
use std::process::Command;

use dylm::source::{Fetch, Files, Source, resolve};

#[path = "hub/server.rs"]
#[allow(dead_code)] // what only other tests ask it
mod server;
use server::{Faults, Hub, ID, digest, weights};

fn get(fetch: &Fetch) -> Source {
    resolve(Some(ID), fetch).unwrap_or_else(|error| panic!("{error}"))
}

fn refusal(fetch: &Fetch) -> String {
    resolve(Some(ID), fetch).expect_err("this must be refused").to_string()
}

#[track_caller]
fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
    assert!(!text.contains('\n'), "{text:?} is more than one line");
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).map(|entries| entries.flatten().collect()).unwrap_or_else(|_| Vec::new());
    let mut names: Vec<String> = entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn a_repository_becomes_a_snapshot_folder_in_the_layout_of_huggingface_hub() {
    let hub = Hub::start();
    let source = get(&hub.fetch());
    let commit = digest(b"first", 40);
    assert_eq!(source.name, ID);
    assert_eq!(source.revision.as_deref(), Some(commit.as_str()));
    let folder = hub.repo().join("snapshots").join(&commit);
    assert_eq!(source.files, Files::Folder(folder.clone()));
    assert_eq!(names_in(&folder), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(fs::read(folder.join("model.safetensors")).unwrap(), weights());
    assert_eq!(fs::read_to_string(hub.repo().join("refs/main")).unwrap(), commit);
    let blobs = hub.repo().join("blobs");
    assert_eq!(fs::read(blobs.join(digest(&weights(), 64))).unwrap(), weights());
    assert_eq!(names_in(&blobs).len(), 3, "nothing else stays behind");
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(folder.join("model.safetensors")).unwrap(),
        Path::new("../../blobs").join(digest(&weights(), 64))
    );
}

#[test]
fn a_file_in_a_subfolder_points_up_to_its_blob() {
    let hub = Hub::start();
    hub.put("a/b/more.json", b"[1]", false);
    let source = get(&hub.fetch());
    assert_eq!(fs::read(source.files.path().join("a/b/more.json")).unwrap(), b"[1]");
}

#[test]
fn a_second_fetch_transfers_no_file_again() {
    let hub = Hub::start();
    let first = get(&hub.fetch());
    hub.forget();
    assert_eq!(get(&hub.fetch()), first);
    let lines: Vec<String> = hub.seen().into_iter().map(|seen| seen.line).collect();
    assert_eq!(lines, [format!("GET /api/models/{ID}/revision/main")]);
}

#[test]
fn code_and_foreign_formats_are_not_fetched() {
    let hub = Hub::start();
    for name in ["modeling_tiny.py", "libtiny.so", "pytorch_model.bin", "tiny.gguf", "onnx/model.onnx"] {
        hub.put(name, b"x", false);
    }
    hub.put("merges.txt", b"a b", false);
    let source = get(&hub.fetch());
    assert_eq!(names_in(source.files.path()), ["config.json", "merges.txt", "model.safetensors", "tokenizer.json"]);
    assert!(
        hub.seen()
            .iter()
            .all(|seen| ![".py", ".so", ".bin", ".gguf", ".onnx"].iter().any(|end| seen.line.ends_with(end)))
    );
}

#[test]
fn a_cut_connection_is_continued_where_it_broke() {
    let hub = Hub::start();
    hub.spoil("model.safetensors", Faults { cuts: 3, ..Faults::default() });
    let source = get(&hub.fetch());
    assert_eq!(fs::read(source.files.path().join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<String> =
        hub.seen().into_iter().filter(|seen| seen.by_storage).filter_map(|seen| seen.range).collect();
    assert_eq!(ranges, ["bytes=300000-", "bytes=450000-", "bytes=525000-"]);
}

#[test]
fn a_connection_that_always_breaks_gives_up_and_leaves_only_an_incomplete_file() {
    let hub = Hub::start();
    hub.put("config.json", &[b' '; 2], false);
    hub.put("model.safetensors", b"z", true);
    hub.spoil("model.safetensors", Faults { cuts: usize::MAX, ..Faults::default() });
    assert_says(&refusal(&hub.fetch()), &[ID, "model.safetensors", "run again"]);
    assert!(!hub.repo().join("blobs").join(digest(b"z", 64)).exists());
    assert!(!hub.repo().join("refs/main").exists());
    let offline = Fetch { offline: true, ..hub.fetch() };
    assert_says(&refusal(&offline), &["HF_HUB_OFFLINE"]);
}

#[test]
fn what_an_earlier_run_left_is_continued() {
    let hub = Hub::start();
    let blobs = hub.repo().join("blobs");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(format!("{}.incomplete", digest(&weights(), 64))), &weights()[..1234]).unwrap();
    let source = get(&hub.fetch());
    assert_eq!(fs::read(source.files.path().join("model.safetensors")).unwrap(), weights());
    assert!(hub.seen().iter().any(|seen| seen.range.as_deref() == Some("bytes=1234-")));
}

#[test]
fn a_spoiled_or_overlong_leftover_is_replaced() {
    for leftover in [vec![7; 1234], vec![7; 600_000], vec![7; 700_000]] {
        let hub = Hub::start();
        let blobs = hub.repo().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(format!("{}.incomplete", digest(&weights(), 64))), leftover).unwrap();
        let source = get(&hub.fetch());
        assert_eq!(fs::read(source.files.path().join("model.safetensors")).unwrap(), weights());
    }
}

#[test]
fn a_server_without_ranges_sends_the_file_from_the_start() {
    let hub = Hub::start();
    hub.spoil("model.safetensors", Faults { cuts: 1, no_ranges: true, ..Faults::default() });
    let source = get(&hub.fetch());
    assert_eq!(fs::read(source.files.path().join("model.safetensors")).unwrap(), weights());
}

#[test]
fn a_size_that_does_not_hold_is_refused() {
    for announced in [599_999, 600_001] {
        let hub = Hub::start();
        hub.spoil("model.safetensors", Faults { linked_size: Some(announced), ..Faults::default() });
        assert_says(&refusal(&hub.fetch()), &["model.safetensors", &announced.to_string(), "600000"]);
        assert!(!hub.repo().join("blobs").join(digest(&weights(), 64)).exists());
        assert!(!hub.repo().join("refs/main").exists());
    }
}

#[test]
fn a_file_with_another_hash_is_thrown_away() {
    let hub = Hub::start();
    let wrong = digest(b"something else", 64);
    hub.spoil("model.safetensors", Faults { linked_etag: Some(wrong.clone()), ..Faults::default() });
    assert_says(&refusal(&hub.fetch()), &["model.safetensors", "SHA-256"]);
    assert!(names_in(&hub.repo().join("blobs")).iter().all(|name| !name.starts_with(&wrong)));
}

#[test]
fn names_that_lead_out_of_the_cache_are_refused_by_name() {
    for name in ["../x.json", "../../x", "/etc/x.json", "a\\x.json", "a//x.json"] {
        let hub = Hub::start();
        hub.put(name, b"x", false);
        assert_says(&refusal(&hub.fetch()), &[ID, &format!("{name:?}")]);
        assert_eq!(hub.seen().len(), 1, "nothing after the listing");
        assert!(!hub.repo().exists());
    }
}

#[test]
fn an_etag_that_leads_out_of_the_cache_is_refused() {
    for etag in ["../../evil", "..", "", "a/b"] {
        let hub = Hub::start();
        hub.spoil("config.json", Faults { linked_etag: Some(etag.to_owned()), ..Faults::default() });
        assert_says(&refusal(&hub.fetch()), &["config.json", "ETag"]);
    }
}

#[test]
fn refusals_of_the_hub_say_what_to_do() {
    let hub = Hub::start();
    let with_token = Fetch { token: Some("hf_secret".to_owned()), ..hub.fetch() };
    hub.refuse(401, "");
    assert_says(&refusal(&hub.fetch()), &[ID, "private", "gated", "HF_TOKEN"]);
    hub.refuse(401, "GatedRepo");
    assert_says(&refusal(&hub.fetch()), &[ID, "gated", "accept", "HF_TOKEN"]);
    hub.refuse(401, "");
    assert_says(&refusal(&with_token), &["does not accept your token"]);
    hub.refuse(403, "GatedRepo");
    assert_says(&refusal(&with_token), &[ID, "gated", "your token has no access"]);
    assert!(!refusal(&with_token).contains("hf_secret"));
    hub.refuse(404, "RepoNotFound");
    assert_says(&refusal(&hub.fetch()), &[ID, "no such repository"]);
    hub.refuse(404, "RevisionNotFound");
    assert_says(&refusal(&Fetch { revision: Some("v9".to_owned()), ..hub.fetch() }), &[ID, "no revision", "v9"]);
}

#[test]
fn a_gated_file_in_a_listed_repository_says_how_to_get_access() {
    let hub = Hub::start();
    hub.refuse_files(401, "GatedRepo");
    assert_says(&refusal(&hub.fetch()), &[ID, "gated", "accept", "HF_TOKEN"]);
    assert!(!hub.repo().join("refs/main").exists());
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_the_storage_host() {
    let hub = Hub::start();
    get(&Fetch { token: Some("hf_secret".to_owned()), ..hub.fetch() });
    let (storage, own): (Vec<_>, Vec<_>) = hub.seen().into_iter().partition(|seen| seen.by_storage);
    assert!(!storage.is_empty() && !own.is_empty());
    for seen in own {
        assert_eq!(seen.authorization.as_deref(), Some("Bearer hf_secret"), "{}", seen.line);
    }
    for seen in storage {
        assert_eq!(seen.authorization, None, "{}", seen.line);
    }
}

#[test]
fn a_redirect_to_something_else_than_http_is_refused() {
    let hub = Hub::start();
    hub.spoil("model.safetensors", Faults { location: Some("file:///etc/passwd".to_owned()), ..Faults::default() });
    assert_says(&refusal(&hub.fetch()), &["not https"]);
}

#[test]
fn the_hash_is_checked_too_where_the_hub_redirects_to_itself() {
    let hub = Hub::start();
    let location = Some("/direct/model.safetensors".to_owned());
    hub.spoil("model.safetensors", Faults { location: location.clone(), ..Faults::default() });
    get(&hub.fetch());
    assert!(hub.repo().join("blobs").join(digest(&weights(), 64)).exists());
    let hub = Hub::start();
    let linked_etag = Some(digest(b"something else", 64));
    hub.spoil("model.safetensors", Faults { location, linked_etag, ..Faults::default() });
    assert_says(&refusal(&hub.fetch()), &["model.safetensors", "SHA-256"]);
}

#[test]
fn a_renamed_repository_is_followed() {
    let hub = Hub::start();
    hub.rename_from("someone/old-name");
    let source = resolve(Some("someone/old-name"), &hub.fetch()).unwrap();
    assert_eq!(fs::read(source.files.path().join("model.safetensors")).unwrap(), weights());
}

#[test]
fn a_moved_branch_is_fetched_anew_and_shares_what_did_not_change() {
    let hub = Hub::start();
    let old = get(&hub.fetch());
    hub.put("config.json", br#"{"model_type": "newer"}"#, false);
    let commit = hub.commit("second");
    hub.forget();
    let new = get(&hub.fetch());
    assert_eq!(new.revision, Some(commit.clone()));
    assert_eq!(fs::read(new.files.path().join("config.json")).unwrap(), br#"{"model_type": "newer"}"#);
    assert_eq!(fs::read(old.files.path().join("config.json")).unwrap(), br#"{"model_type": "tiny"}"#);
    assert_eq!(fs::read_to_string(hub.repo().join("refs/main")).unwrap(), commit);
    assert!(hub.seen().iter().all(|seen| !seen.by_storage), "the weights are the same");
}

#[test]
fn offline_uses_a_whole_copy_and_asks_nobody() {
    let hub = Hub::start();
    let online = get(&hub.fetch());
    hub.forget();
    let offline = Fetch { offline: true, ..hub.fetch() };
    assert_eq!(get(&offline), online);
    assert_eq!(get(&Fetch { revision: online.revision.clone(), ..offline }), online);
    assert!(hub.seen().is_empty());
}

#[test]
fn offline_does_not_take_a_partial_copy_for_a_whole_one() {
    let hub = Hub::start();
    let offline = Fetch { offline: true, ..hub.fetch() };
    assert_says(&refusal(&offline), &[ID, "no copy", "HF_HUB_OFFLINE"]);
    let folder = get(&hub.fetch()).files.path().to_owned();
    let index = r#"{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}"#;
    fs::write(folder.join("model.safetensors.index.json"), index).unwrap();
    assert_says(&refusal(&offline), &["lacks model-2.safetensors"]);
    fs::remove_file(folder.join("model.safetensors.index.json")).unwrap();
    fs::remove_file(hub.repo().join("blobs").join(digest(&weights(), 64))).unwrap();
    assert_says(&refusal(&offline), &["lacks model.safetensors"]);
    assert_eq!(fs::read(get(&hub.fetch()).files.path().join("model.safetensors")).unwrap(), weights());
}

/// As `huggingface_hub.snapshot_download` leaves it.
#[cfg(unix)]
#[test]
fn a_cache_that_python_made_is_used() {
    let hub = Hub::start();
    let commit = digest(b"by python", 40);
    let snapshot = hub.repo().join("snapshots").join(&commit);
    for folder in [hub.repo().join("blobs"), hub.repo().join("refs"), snapshot.clone()] {
        fs::create_dir_all(folder).unwrap();
    }
    for (name, body, etag) in
        [("config.json", &b"{}"[..], digest(b"{}", 40)), ("model.safetensors", b"weights", digest(b"weights", 64))]
    {
        fs::write(hub.repo().join("blobs").join(&etag), body).unwrap();
        std::os::unix::fs::symlink(format!("../../blobs/{etag}"), snapshot.join(name)).unwrap();
    }
    fs::write(hub.repo().join("refs/main"), &commit).unwrap();
    let source = get(&Fetch { offline: true, ..hub.fetch() });
    assert_eq!(source, Source { files: Files::Folder(snapshot), name: ID.to_owned(), revision: Some(commit) });
    assert!(hub.seen().is_empty());
}

#[test]
fn a_hub_out_of_reach_or_out_of_order_leaves_the_cached_copy_usable() {
    let hub = Hub::start();
    let nowhere = Fetch { endpoint: "http://127.0.0.1:9".to_owned(), ..hub.fetch() };
    assert_says(&refusal(&nowhere), &[ID, "cannot reach http://127.0.0.1:9", "no copy"]);
    let online = get(&hub.fetch());
    assert_eq!(get(&nowhere), online);
    hub.refuse(503, "");
    assert_eq!(get(&hub.fetch()), online);
}

#[test]
fn a_repository_without_safetensors_is_refused_before_anything_is_fetched() {
    let hub = Hub::start();
    hub.put("other.gguf", b"GGUF", true);
    let listed = hub.seen().len();
    hub.remove("model.safetensors");
    assert_says(&refusal(&hub.fetch()), &[ID, "model*.safetensors", "other.gguf"]);
    assert_eq!(hub.seen().len(), listed + 1);
}

#[test]
fn two_runs_at_once_do_not_spoil_each_other() {
    let hub = Hub::start();
    hub.spoil("model.safetensors", Faults { cuts: 2, ..Faults::default() });
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let source = get(&hub.fetch());
                assert_eq!(fs::read(source.files.path().join("model.safetensors")).unwrap(), weights());
            });
        }
    });
    assert!(names_in(&hub.repo().join("blobs")).iter().all(|name| !name.ends_with(".incomplete")));
}

/// Needs the right to mount; says so where it has not.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_one_sentence_and_the_next_run_goes_on() {
    let hub = Hub::start();
    let full = tempfile::tempdir().unwrap();
    let mount =
        |options: &str| Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(full.path()).output();
    if !mount("size=300k").is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: a full disk: this user may not mount a tmpfs");
        return;
    }
    let fetch = Fetch { cache_dir: full.path().join("hub"), ..hub.fetch() };
    let said = resolve(Some(ID), &fetch).map(|source| source.name);
    let blob = full.path().join("hub/models--someone--tiny/blobs").join(digest(&weights(), 64));
    let was_whole = blob.exists();
    let grown = mount("remount,size=8m").is_ok_and(|output| output.status.success());
    let then = resolve(Some(ID), &fetch).map(|source| fs::read(source.files.path().join("model.safetensors")).ok());
    let unmounted = Command::new("umount").arg(full.path()).status();
    assert_says(&said.unwrap_err().to_string(), &[ID, "disk is full", "run again"]);
    assert!(!was_whole);
    assert!(grown && unmounted.is_ok_and(|status| status.success()));
    assert_eq!(then.unwrap(), Some(weights()));
    assert!(hub.seen().iter().any(|seen| seen.range.is_some()), "the second run must continue");
}
