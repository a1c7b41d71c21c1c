//! One HTTP request at a time to the Hub and to the hosts it redirects to.
//! Redirects are followed by hand: the token goes to the Hub's own origin only, and nothing falls back from https to http.

use std::error::Error as StdError;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::blocking::{Client, Response};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderMap, LOCATION, RANGE};
use reqwest::{Method, Url, redirect};

use super::listing::refusal;
use crate::error::{Error, Result};
use crate::source::Fetch;

pub(super) const USER_AGENT: &str = concat!("dylm/", env!("CARGO_PKG_VERSION"));

/// A machine without a network must learn that quickly: there may be another source.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection may stay silent.
pub(super) const IDLE_TIMEOUT: Duration = Duration::from_secs(30);

const MOST_REDIRECTS: usize = 10;

/// Why a request brought nothing.
pub(super) enum Trouble {
    /// Another try may help: a cut connection, a server in trouble, a signed address that expired.
    Passing(String),
    /// It will not.
    Final(Error),
}

/// A part of a file, or the whole.
pub(super) struct Part {
    /// The place of its first byte; 0 of the whole.
    pub start: u64,
    /// The file's length, where the server says it.
    pub total: Option<u64>,
    /// Who sent it, after all redirects.
    pub url: Url,
    /// The bytes.
    pub body: Body,
}

/// An answer's bytes.
pub(super) struct Body {
    response: Response,
    /// Whether the server heeded the range.
    pub is_partial: bool,
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.response.read(buffer)
    }
}

/// Requests to one Hub on behalf of one user.
pub(super) struct Transfer {
    client: Client,
    endpoint: Url,
    token: Option<String>,
    /// Set when one file failed: the others need not arrive any more.
    pub(super) stop: AtomicBool,
}

impl Transfer {
    pub(super) fn new(fetch: &Fetch) -> Result<Self> {
        let endpoint = parse_endpoint(fetch)?;
        let mut client = Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(IDLE_TIMEOUT)
            .redirect(redirect::Policy::none());
        if is_loopback(&endpoint) {
            client = client.no_proxy();
        }
        let client = client.build().map_err(|e| Error::Fetch(format!("cannot set up HTTPS: {}", root_cause(&e))))?;
        Ok(Transfer { client, endpoint, token: fetch.token.clone(), stop: AtomicBool::new(false) })
    }

    /// Where `name` of a commit is served.
    pub(super) fn file_url(&self, id: &str, commit: &str, name: &str) -> Result<Url> {
        let mut url = self.endpoint.clone();
        url.path_segments_mut()
            .map_err(|()| Error::Usage(format!("{}: HF_ENDPOINT is not an address of a server", self.endpoint)))?
            .pop_if_empty()
            .extend(id.split('/'))
            .extend(["resolve", commit])
            .extend(name.split('/'));
        Ok(url)
    }

    /// The headers that describe a file. The Hub puts them on its redirect; the host behind it has an ETag of its own.
    pub(super) fn head(&self, url: &Url, id: &str, name: &str) -> Result<HeaderMap, Trouble> {
        let mut here = url.clone();
        for _ in 0..=MOST_REDIRECTS {
            let response = self.send(Method::HEAD, &here, None)?;
            let is_described =
                ["x-linked-etag", "x-linked-size"].iter().all(|name| response.headers().contains_key(*name));
            match self.redirect_of(&response, &here)? {
                Some(_) if is_described => return Ok(response.headers().clone()),
                Some(next) => here = next,
                None => return Ok(self.accept(response, id, name)?.headers().clone()),
            }
        }
        Err(too_many_redirects(url))
    }

    /// The file's bytes from `start` on, if the server can do that; its status tells (206 or 200).
    pub(super) fn get(&self, url: &Url, id: &str, name: &str, start: u64) -> Result<Response, Trouble> {
        let mut here = url.clone();
        for _ in 0..=MOST_REDIRECTS {
            let response = self.send(Method::GET, &here, (start > 0).then(|| format!("bytes={start}-")))?;
            match self.redirect_of(&response, &here)? {
                Some(next) => here = next,
                None => return self.accept(response, id, name),
            }
        }
        Err(too_many_redirects(url))
    }

    /// The bytes `range` of a file, or the whole where the server knows no ranges; whoever has read enough drops the answer.
    pub(super) fn part(&self, url: &Url, id: &str, name: &str, range: Range<u64>) -> Result<Part, Trouble> {
        let mut here = url.clone();
        for _ in 0..=MOST_REDIRECTS {
            let asked = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
            let response = self.send(Method::GET, &here, Some(asked))?;
            if let Some(next) = self.redirect_of(&response, &here)? {
                here = next;
                continue;
            }
            let body = self.accept(response, id, name)?;
            let header = |name| body.headers().get(name).and_then(|value| value.to_str().ok());
            let is_partial = body.status().as_u16() == 206;
            let (start, total) = match is_partial {
                true => header(CONTENT_RANGE).and_then(range_and_total).unwrap_or((u64::MAX, None)),
                false => (0, header(CONTENT_LENGTH).and_then(|text| text.parse().ok())),
            };
            return Ok(Part { start, total, url: here, body: Body { response: body, is_partial } });
        }
        Err(too_many_redirects(url))
    }

    /// # Errors
    /// If another file failed meanwhile.
    pub(super) fn check_stop(&self) -> Result<(), Trouble> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Trouble::Final(Error::Fetch("stopped, because another file failed".to_owned()))),
            false => Ok(()),
        }
    }

    fn send(&self, method: Method, url: &Url, range: Option<String>) -> Result<Response, Trouble> {
        // Compressed answers have no length that could be checked.
        let mut request = self.client.request(method, url.clone()).header(ACCEPT_ENCODING, "identity");
        if let Some(range) = range {
            request = request.header(RANGE, range);
        }
        if let Some(token) = self.token.as_ref().filter(|_| url.origin() == self.endpoint.origin()) {
            request = request.bearer_auth(token);
        }
        request.send().map_err(|e| Trouble::Passing(format!("{}: {}", host(url), root_cause(&e))))
    }

    fn redirect_of(&self, response: &Response, here: &Url) -> Result<Option<Url>, Trouble> {
        let Some(location) = response.headers().get(LOCATION).filter(|_| response.status().is_redirection()) else {
            return Ok(None);
        };
        let next = location.to_str().ok().and_then(|text| here.join(text).ok());
        let next = next.ok_or_else(|| {
            Trouble::Final(Error::Fetch(format!("{}: its redirect has no valid address", host(here))))
        })?;
        match may_follow(&self.endpoint, &next) {
            true => Ok(Some(next)),
            false => Err(Trouble::Final(Error::Fetch(format!(
                "{}: it redirects to {}://{}, which is not https; nothing was fetched from there",
                host(here),
                next.scheme(),
                host(&next)
            )))),
        }
    }

    fn accept(&self, response: Response, id: &str, name: &str) -> Result<Response, Trouble> {
        let status = response.status();
        // 416 is the caller's business: its partial file does not fit the one on the server.
        if status.is_success() || status.as_u16() == 416 {
            return Ok(response);
        }
        // Storage hosts answer 403 when a signed address is too old; the Hub gives a new one.
        let is_elsewhere = response.url().origin() != self.endpoint.origin();
        if is_elsewhere || status.is_server_error() || matches!(status.as_u16(), 408 | 429) {
            return Err(Trouble::Passing(format!("{}: HTTP {}", host(response.url()), status.as_u16())));
        }
        let code = response.headers().get("x-error-code").and_then(|code| code.to_str().ok());
        let endpoint = self.endpoint.as_str().trim_end_matches('/');
        Err(Trouble::Final(refusal(status.as_u16(), code, id, name, endpoint, self.token.is_some())))
    }
}

/// The Hub's address: https, or http where the user says so.
pub(super) fn parse_endpoint(fetch: &Fetch) -> Result<Url> {
    let bad = || {
        Error::Usage(format!(
            "HF_ENDPOINT is {:?}; it must be an address such as https://huggingface.co",
            fetch.endpoint
        ))
    };
    let url = Url::parse(&fetch.endpoint).map_err(|_| bad())?;
    match matches!(url.scheme(), "https" | "http") && url.has_host() {
        true => Ok(url),
        false => Err(bad()),
    }
}

/// Only who reaches the Hub by http is sent on by http; nothing else than these two is ever opened.
fn may_follow(endpoint: &Url, next: &Url) -> bool {
    next.scheme() == "https" || (next.scheme() == "http" && endpoint.scheme() == "http")
}

/// Whether this machine itself is asked: then no proxy belongs in between.
pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host_str() {
        Some("localhost") => true,
        Some(host) => host.trim_matches(['[', ']']).parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback()),
        None => false,
    }
}

/// The innermost reason: "connection refused" rather than "error sending request".
pub(super) fn root_cause(error: &dyn StdError) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// `bytes 100-199/2000` -> 100 and 2000.
fn range_and_total(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    Some((range.split('-').next()?.trim().parse().ok()?, total.trim().parse().ok()))
}

fn host(url: &Url) -> &str {
    url.host_str().unwrap_or("the server")
}

fn too_many_redirects(url: &Url) -> Trouble {
    Trouble::Final(Error::Fetch(format!("{}: more than {MOST_REDIRECTS} redirects in a row", host(url))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_never_leaves_https_unless_the_hub_itself_is_on_http() {
        let url = |text: &str| Url::parse(text).unwrap();
        let (hub, mirror) = (url("https://huggingface.co"), url("http://localhost:1"));
        assert!(may_follow(&hub, &url("https://cdn.example/x")) && may_follow(&mirror, &url("http://localhost:2/x")));
        for next in ["http://huggingface.co/x", "file:///etc/passwd", "ftp://x/y"] {
            assert!(!may_follow(&hub, &url(next)), "{next}");
        }
        assert!(!may_follow(&mirror, &url("file:///etc/passwd")));
    }
}
