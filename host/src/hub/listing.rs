//! Turns an id and a revision into a commit hash and the names in it, through `hf-hub`.
//! Everything in the answer is checked before any of it becomes a path; the Hub's refusals become sentences here.

use std::time::Duration;

use hf_hub::{HFClient, HFError};

use super::Failure;
use super::names::{is_commit, is_model_file, is_plain_relative};
use super::transfer::{self, CONNECT_TIMEOUT, IDLE_TIMEOUT};
use crate::error::{Error, Result};
use crate::source::Fetch;

/// Pauses before the second and third try of a server that answers, but with an error of its own.
const PAUSES: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(2)];

/// One commit of a repository.
pub(super) struct Listing {
    /// 40 hexadecimal digits.
    pub commit: String,
    /// Every file, plain relative names only.
    pub files: Vec<String>,
}

impl Listing {
    /// The files that make the model.
    ///
    /// # Errors
    /// If there is no config.json or are no safetensors: then nothing is fetched at all.
    pub(super) fn model_files(&self, id: &str) -> Result<Vec<&str>> {
        let wanted: Vec<&str> = self.files.iter().map(String::as_str).filter(|name| is_model_file(name)).collect();
        let has_weights = wanted.iter().any(|name| name.ends_with(".safetensors"));
        if has_weights && wanted.contains(&"config.json") {
            return Ok(wanted);
        }
        let gguf: Vec<&str> = self.files.iter().map(String::as_str).filter(|name| name.ends_with(".gguf")).collect();
        let cure = match gguf.first() {
            Some(first) => {
                format!("it holds GGUF ({} files, such as {first}); download one and name the file", gguf.len())
            }
            None => "pick a repository in safetensors format, such as one of mlx-community".to_owned(),
        };
        let lack = if has_weights { "config.json" } else { "model*.safetensors" };
        Err(Error::Fetch(format!("{id}: this repository has no {lack}; {cure}")))
    }
}

/// Asks the Hub what `revision` of `id` is.
pub(super) fn list(id: &str, revision: &str, fetch: &Fetch) -> Result<Listing, Failure> {
    let endpoint = transfer::parse_endpoint(fetch)?;
    let mut http = reqwest::Client::builder()
        .user_agent(transfer::USER_AGENT)
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(IDLE_TIMEOUT)
        .https_only(endpoint.scheme() == "https");
    if transfer::is_loopback(&endpoint) {
        http = http.no_proxy();
    }
    let http = http.build().map_err(|e| Error::Fetch(format!("cannot set up HTTPS: {}", transfer::root_cause(&e))))?;
    // Its retries would also repeat a connection that fails; ours, below, do not.
    let mut client =
        HFClient::builder().client(http).endpoint(&fetch.endpoint).cache_dir(&fetch.cache_dir).retry_max_attempts(0);
    if let Some(token) = &fetch.token {
        client = client.token(token);
    }
    let client = client.build_sync().map_err(|e| explain(e, id, revision, fetch))?;
    let (owner, name) = hf_hub::split_id(id);
    let repo = client.model(owner, name);
    let mut pauses = PAUSES.iter();
    let info = loop {
        match repo.info().revision(revision).send() {
            Ok(info) => break info,
            Err(e) if is_passing(&e) => match pauses.next() {
                Some(pause) => std::thread::sleep(*pause),
                None => return Err(explain(e, id, revision, fetch)),
            },
            Err(e) => return Err(explain(e, id, revision, fetch)),
        }
    };
    let commit = info.sha.filter(|sha| is_commit(sha)).ok_or_else(|| {
        Error::Fetch(format!("{id}@{revision}: {} named no commit; is HF_ENDPOINT a Hub?", fetch.endpoint))
    })?;
    let files: Vec<String> = info.siblings.unwrap_or_default().into_iter().map(|file| file.rfilename).collect();
    match files.iter().find(|name| !is_plain_relative(name)) {
        Some(name) => Err(Error::Fetch(format!(
            "{id}@{revision}: the file name {name:?} could lead out of the cache; nothing was fetched from this repository"
        ))
        .into()),
        None => Ok(Listing { commit, files }),
    }
}

/// Errors of the server itself, which another try may not meet.
fn is_passing(error: &HFError) -> bool {
    match error {
        HFError::RateLimited { .. } => true,
        HFError::Http { context } => context.status.is_server_error(),
        _ => false,
    }
}

fn explain(error: HFError, id: &str, revision: &str, fetch: &Fetch) -> Failure {
    let context = match &error {
        HFError::Request { source, .. } if source.is_decode() => {
            return Error::Fetch(format!(
                "{id}: {} sent something that is not a listing; is HF_ENDPOINT a Hub?",
                fetch.endpoint
            ))
            .into();
        }
        HFError::Request { source, .. } => {
            return Failure::Unreachable(format!(
                "{id}: cannot reach {} ({})",
                fetch.endpoint,
                transfer::root_cause(source)
            ));
        }
        HFError::Http { context }
        | HFError::AuthRequired { context }
        | HFError::Forbidden { context }
        | HFError::Conflict { context }
        | HFError::RateLimited { context, .. } => context,
        HFError::RepoNotFound { context: Some(context), .. }
        | HFError::RevisionNotFound { context: Some(context), .. }
        | HFError::EntryNotFound { context: Some(context), .. } => context,
        other => return Error::Fetch(format!("{id}: {other}")).into(),
    };
    let status = context.status.as_u16();
    if context.status.is_server_error() || status == 429 {
        return Failure::Unreachable(format!("{id}: {} is out of order (HTTP {status})", fetch.endpoint));
    }
    let code = context.error_code.as_deref();
    refusal(status, code, id, revision, &fetch.endpoint, fetch.token.is_some()).into()
}

/// What an HTTP refusal of the Hub means for the user. `code` is its `X-Error-Code`.
pub(super) fn refusal(status: u16, code: Option<&str>, id: &str, what: &str, endpoint: &str, has_token: bool) -> Error {
    let gated = code == Some("GatedRepo");
    let set_token = format!("make a token at {endpoint}/settings/tokens and set HF_TOKEN to it");
    Error::Fetch(match (status, code) {
        (401, _) if gated && !has_token => {
            format!("{id}: this model is gated; accept its terms at {endpoint}/{id}, then {set_token}")
        }
        (401, _) if !has_token => format!(
            "{id}: no such repository, or a private or gated one; check the name, or {set_token} if you have access"
        ),
        (401, _) => format!("{id}: the Hub does not accept your token; {set_token}"),
        (403, _) => format!(
            "{id}: gated or private, and {} has no access; ask for it at {endpoint}/{id}, then {set_token}",
            if has_token { "your token" } else { "an anonymous user" }
        ),
        (404, Some("RevisionNotFound")) => {
            format!("{id}: it has no revision {what:?}; check the branch, tag or commit")
        }
        (404, Some("RepoNotFound")) => format!("{id}: no such repository on {endpoint}; check the name"),
        (404, _) => format!("{id}: repository, revision or file not found ({what}); check the name and the revision"),
        _ => format!("{id}: {endpoint} refused ({what}: HTTP {status})"),
    })
}
