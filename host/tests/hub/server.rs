//! A Hub on loopback, spoken to over real sockets: one port is the Hub, a second one the storage host it redirects to.
//! Every request is recorded, and each file may misbehave in one chosen way.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use dylm::source::Fetch;
use sha2::{Digest, Sha256};

/// The only repository.
pub const ID: &str = "someone/tiny";

/// What is wrong with a file.
#[derive(Clone, Default)]
pub struct Faults {
    /// This many transfers end after half of the bytes they owe.
    pub cuts: usize,
    /// The size in `X-Linked-Size`.
    pub linked_size: Option<usize>,
    /// The hash in `X-Linked-Etag`.
    pub linked_etag: Option<String>,
    /// The storage host does not know Range.
    pub no_ranges: bool,
    /// What the storage host says in place of the right Content-Range.
    pub content_range: Option<String>,
    /// Where the Hub redirects to.
    pub location: Option<String>,
}

/// One file of the repository.
#[derive(Clone)]
pub struct Stored {
    /// Its bytes.
    pub body: Vec<u8>,
    /// Whether the storage host serves it.
    pub is_lfs: bool,
    /// What is wrong with it.
    pub faults: Faults,
}

/// One request as it came in.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Whether the storage host got it.
    pub by_storage: bool,
    /// `GET /path`
    pub line: String,
    /// The header.
    pub authorization: Option<String>,
    /// The header.
    pub range: Option<String>,
}

struct State {
    commit: String,
    files: BTreeMap<String, Stored>,
    refusal: Option<(u16, &'static str, &'static str)>,
    moved_from: Option<String>,
    seen: Vec<Seen>,
    served: usize,
}

/// The running server and an empty cache.
pub struct Hub {
    state: Arc<Mutex<State>>,
    /// Deleted with the hub.
    pub dir: tempfile::TempDir,
    endpoint: String,
}

/// 40 or 64 hexadecimal digits of a SHA-256: the shorter stands for the git hash, which nobody checks.
pub fn digest(bytes: &[u8], digits: usize) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    hex[..digits].to_owned()
}

impl Hub {
    /// A hub with a repository of one config.json, one tokenizer.json and a model.safetensors in LFS.
    pub fn start() -> Self {
        let state = State {
            commit: digest(b"first", 40),
            files: BTreeMap::new(),
            refusal: None,
            moved_from: None,
            seen: Vec::new(),
            served: 0,
        };
        let state = Arc::new(Mutex::new(state));
        let storage = listen(&state, None);
        let endpoint = listen(&state, Some(storage));
        let hub = Hub { state, dir: tempfile::tempdir().unwrap(), endpoint };
        hub.put("config.json", br#"{"model_type": "tiny"}"#, false);
        hub.put("tokenizer.json", b"{}", false);
        hub.put("model.safetensors", &weights(), true);
        hub
    }

    /// Adds or replaces a file.
    pub fn put(&self, name: &str, body: &[u8], is_lfs: bool) {
        let stored = Stored { body: body.to_vec(), is_lfs, faults: Faults::default() };
        self.state.lock().unwrap().files.insert(name.to_owned(), stored);
    }

    /// Spoils a file.
    pub fn spoil(&self, name: &str, faults: Faults) {
        self.state.lock().unwrap().files.get_mut(name).unwrap().faults = faults;
    }

    /// Deletes a file.
    pub fn remove(&self, name: &str) {
        self.state.lock().unwrap().files.remove(name);
    }

    /// Moves main.
    pub fn commit(&self, seed: &str) -> String {
        let commit = digest(seed.as_bytes(), 40);
        self.state.lock().unwrap().commit.clone_from(&commit);
        commit
    }

    /// Answers everything with this status and `X-Error-Code`.
    pub fn refuse(&self, status: u16, code: &'static str) {
        self.state.lock().unwrap().refusal = Some((status, code, ""));
    }

    /// The same for files only; the listing works.
    pub fn refuse_files(&self, status: u16, code: &'static str) {
        self.state.lock().unwrap().refusal = Some((status, code, "/resolve/"));
    }

    /// Redirects requests for this id to the real one, as for a renamed repository.
    pub fn rename_from(&self, id: &str) {
        self.state.lock().unwrap().moved_from = Some(id.to_owned());
    }

    /// Everything that came in so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.state.lock().unwrap().seen.clone()
    }

    /// Bytes of bodies that were sent so far.
    pub fn served(&self) -> usize {
        self.state.lock().unwrap().served
    }

    /// Where it listens.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Forgets it.
    pub fn forget(&self) {
        self.state.lock().unwrap().seen.clear();
    }

    /// A client of this hub without a token.
    pub fn fetch(&self) -> Fetch {
        Fetch {
            revision: None,
            offline: false,
            cache_dir: self.dir.path().join("hub"),
            pip_dir: self.dir.path().join("pip"),
            endpoint: self.endpoint.clone(),
            token: None,
            progress: false,
        }
    }

    /// `models--someone--tiny`
    pub fn repo(&self) -> PathBuf {
        self.dir.path().join("hub").join("models--someone--tiny")
    }
}

/// Enough bytes that a cut in the middle lies between two reads.
pub fn weights() -> Vec<u8> {
    (0..600_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Serves on a port of its own; `storage` is where the hub redirects to, and none makes this the storage host.
fn listen(state: &Arc<Mutex<State>>, storage: Option<String>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let state = state.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let (state, storage) = (state.clone(), storage.clone());
            std::thread::spawn(move || serve(stream, &state, storage.as_deref()));
        }
    });
    address
}

fn serve(mut stream: TcpStream, state: &Mutex<State>, storage: Option<&str>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let (mut line, mut authorization, mut range) = (String::new(), None, None);
    reader.read_line(&mut line).ok()?;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim_end().split_once(": ") else { break };
        match name.to_ascii_lowercase().as_str() {
            "authorization" => authorization = Some(value.to_owned()),
            "range" => range = Some(value.to_owned()),
            _ => {}
        }
    }
    let (method, rest) = line.split_once(' ')?;
    let path = rest.split(' ').next()?;
    let answer = {
        let mut state = state.lock().unwrap();
        let line = format!("{method} {path}");
        state.seen.push(Seen { by_storage: storage.is_none(), line, authorization, range: range.clone() });
        match storage {
            Some(storage) => match path.strip_prefix("/direct") {
                Some(path) => state.answer_as_storage(path, range.as_deref()),
                None => state.answer_as_hub(path, storage),
            },
            None => state.answer_as_storage(path, range.as_deref()),
        }
    };
    write!(stream, "HTTP/1.1 {} x\r\nconnection: close\r\n{}\r\n", answer.status, answer.headers).ok()?;
    if method == "GET" {
        for piece in answer.body.chunks(16 << 10) {
            stream.write_all(piece).ok()?;
            state.lock().unwrap().served += piece.len();
        }
    }
    stream.flush().ok()
}

struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
}

fn answer(status: u16, headers: String, body: &[u8]) -> Answer {
    Answer { status, headers: format!("{headers}content-length: {}\r\n", body.len()), body: body.to_vec() }
}

impl State {
    fn answer_as_hub(&self, path: &str, storage: &str) -> Answer {
        if let Some((status, code, _)) = self.refusal.filter(|(_, _, part)| path.contains(part)) {
            return answer(status, format!("x-error-code: {code}\r\n"), b"no");
        }
        if let Some(old) = self.moved_from.as_ref().filter(|old| path.contains(*old)) {
            return answer(307, format!("location: {}\r\n", path.replacen(old, ID, 1)), b"moved");
        }
        if path.starts_with(&format!("/api/models/{ID}/revision/")) {
            let files: Vec<String> = self.files.keys().map(|name| format!(r#"{{"rfilename": {name:?}}}"#)).collect();
            let body = format!(r#"{{"id": "{ID}", "sha": "{}", "siblings": [{}]}}"#, self.commit, files.join(","));
            return answer(200, "content-type: application/json\r\n".to_owned(), body.as_bytes());
        }
        let found = path
            .strip_prefix(&format!("/{ID}/resolve/{}/", self.commit))
            .and_then(|name| self.files.get_key_value(name));
        let Some((name, file)) = found else {
            return answer(404, "x-error-code: EntryNotFound\r\n".to_owned(), b"");
        };
        let faults = &file.faults;
        let commit = format!("x-repo-commit: {}\r\n", self.commit);
        if !file.is_lfs {
            let etag = faults.linked_etag.clone().unwrap_or_else(|| digest(&file.body, 40));
            return answer(200, format!("{commit}etag: \"{etag}\"\r\n"), &file.body);
        }
        let etag = faults.linked_etag.clone().unwrap_or_else(|| digest(&file.body, 64));
        let size = faults.linked_size.unwrap_or(file.body.len());
        let location = faults.location.clone().unwrap_or_else(|| format!("{storage}/{name}?signature=1"));
        let headers = format!(
            "{commit}location: {location}\r\nx-linked-etag: \"{etag}\"\r\nx-linked-size: {size}\r\netag: \"other\"\r\n"
        );
        answer(302, headers, b"Found")
    }

    fn answer_as_storage(&mut self, path: &str, range: Option<&str>) -> Answer {
        let name = path.trim_start_matches('/').split('?').next().unwrap_or_default();
        let Some(file) = self.files.get_mut(name) else { return answer(404, String::new(), b"") };
        let range =
            range.filter(|_| !file.faults.no_ranges).and_then(|range| range.strip_prefix("bytes=")?.split_once('-'));
        let start: usize = range.and_then(|(start, _)| start.parse().ok()).unwrap_or(0);
        let total = file.body.len();
        let end = range.and_then(|(_, last)| Some(last.parse::<usize>().ok()? + 1)).unwrap_or(total).min(total);
        if start >= total {
            return answer(416, format!("content-range: bytes */{total}\r\n"), b"");
        }
        let mut answer = match range {
            None => answer(200, String::new(), &file.body),
            Some(_) => {
                let right = format!("bytes {start}-{}/{total}", end - 1);
                let said = file.faults.content_range.as_ref().unwrap_or(&right);
                answer(206, format!("content-range: {said}\r\n"), &file.body[start..end])
            }
        };
        if file.faults.cuts > 0 {
            file.faults.cuts -= 1;
            answer.body.truncate(answer.body.len() / 2);
        }
        answer
    }
}
