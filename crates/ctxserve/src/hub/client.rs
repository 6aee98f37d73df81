//! HTTP to the hub: one agent, redirects followed by hand so that the token stays with the endpoint.

use std::time::Duration;

use serde::Deserialize;
use ureq::http::{HeaderMap, Response, Uri, header};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::{HubError, RepoId};

const MAX_REDIRECTS: usize = 10;
/// Largest answer of the listing route.
const MAX_LISTING_BYTES: u64 = 32 << 20;

/// What a repository holds.
#[derive(Debug)]
pub(super) struct Listing {
    /// Commit that the revision means.
    pub(super) commit: String,
    /// Paths in the repository.
    pub(super) files: Vec<String>,
}

/// What the hub says about a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileMeta {
    /// Names the content; SHA-256 in hex for large files.
    pub(super) etag: Option<String>,
    /// Bytes.
    pub(super) size: Option<u64>,
}

/// A file's bytes from some offset on.
pub(super) struct Download {
    /// About the whole file.
    pub(super) meta: FileMeta,
    /// Offset of the first byte of `body`.
    pub(super) start: u64,
    /// The bytes.
    pub(super) body: Body,
}

/// A connection pool to one endpoint.
pub(super) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

impl Client {
    pub(super) fn new(endpoint: &str, token: Option<String>, silence: Duration) -> Result<Self, HubError> {
        let bad = |what: &str| HubError::Unreachable { url: endpoint.to_owned(), what: what.to_owned() };
        let uri: Uri = endpoint.parse().map_err(|_| bad("HF_ENDPOINT is not a URL"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.authority().is_none() {
            return Err(bad("HF_ENDPOINT must be http:// or https:// and a host"));
        }
        let agent = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .user_agent(concat!("ctxserve/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_connect(Some(silence))
            .timeout_recv_response(Some(silence))
            .timeout_per_read(Some(silence))
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .build()
            .new_agent();
        Ok(Self { agent, endpoint: endpoint.to_owned(), token })
    }

    /// Where a file of a commit is.
    pub(super) fn file_url(&self, repo: &RepoId, commit: &str, file: &str) -> String {
        format!("{}/{repo}/resolve/{}/{}", self.endpoint, escape(commit), escape(file))
    }

    /// Commit and files of a revision.
    pub(super) fn list(&self, repo: &RepoId, revision: &str) -> Result<Listing, HubError> {
        #[derive(Deserialize)]
        struct Info {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let url = format!("{}/api/models/{repo}/revision/{}", self.endpoint, escape(revision));
        let (mut response, _) = self.get(&url, None)?;
        match response.status().as_u16() {
            200 => {}
            401 => return Err(self.denied(repo, 401)),
            403 => return Err(self.denied(repo, 403)),
            404 => {
                return Err(HubError::NotFound {
                    endpoint: self.endpoint.clone(),
                    repo: repo.to_string(),
                    revision: revision.to_owned(),
                });
            }
            status => return Err(HubError::Status { url, status }),
        }
        let info: Info = response
            .body_mut()
            .with_config()
            .limit(MAX_LISTING_BYTES)
            .read_json()
            .map_err(|error| HubError::Protocol { url, what: error.to_string() })?;
        Ok(Listing { commit: info.sha, files: info.siblings.into_iter().map(|s| s.rfilename).collect() })
    }

    /// Opens a file from byte `start` on, or from 0 when the server ignores ranges.
    pub(super) fn open(&self, url: &str, start: u64) -> Result<Download, HubError> {
        let (response, meta) = self.get(url, (start > 0).then_some(start))?;
        let begin = match response.status().as_u16() {
            200 => 0,
            206 => match content_range_start(response.headers()) {
                Some(begin) if begin == start => begin,
                _ => {
                    let what = "the range it sent is not the one asked for".to_owned();
                    return Err(HubError::Protocol { url: url.to_owned(), what });
                }
            },
            status @ (401 | 403) => {
                return Err(HubError::Denied { repo: url.to_owned(), status, advice: self.advice(status) });
            }
            status => return Err(HubError::Status { url: url.to_owned(), status }),
        };
        Ok(Download { meta, start: begin, body: response.into_body() })
    }

    /// A GET that follows redirects; what the hub says about a file stands in the first answer.
    fn get(&self, url: &str, from: Option<u64>) -> Result<(Response<Body>, FileMeta), HubError> {
        let mut target = url.to_owned();
        let mut meta = FileMeta { etag: None, size: None };
        for _ in 0..MAX_REDIRECTS {
            let mut request = self.agent.get(&target);
            if let Some(token) = self.token.as_ref().filter(|_| same_origin(&self.endpoint, &target)) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.header(header::RANGE, format!("bytes={from}-"));
            }
            let response = request
                .call()
                .map_err(|error| HubError::Unreachable { url: url.to_owned(), what: error.to_string() })?;
            let headers = response.headers();
            let redirect = response.status().is_redirection();
            meta.etag = meta.etag.or_else(|| etag(headers, redirect));
            meta.size = meta.size.or_else(|| size(headers, redirect));
            if !redirect {
                return Ok((response, meta));
            }
            let next = text(headers, "location").and_then(|to| join(&target, to));
            target = next.ok_or_else(|| HubError::Protocol {
                url: url.to_owned(),
                what: "a redirect without a usable location".to_owned(),
            })?;
        }
        Err(HubError::Protocol { url: url.to_owned(), what: "too many redirects".to_owned() })
    }

    fn denied(&self, repo: &RepoId, status: u16) -> HubError {
        HubError::Denied { repo: repo.to_string(), status, advice: self.advice(status) }
    }

    fn advice(&self, status: u16) -> &'static str {
        match (&self.token, status) {
            (None, _) => {
                "it does not exist, or is private or gated; set HF_TOKEN to a token that may read it"
            }
            (Some(_), 401) => "the token in HF_TOKEN is not valid",
            (Some(_), _) => "the token in HF_TOKEN may not read it; accept the conditions on its page first",
        }
    }
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// The content's name: of the linked large file, else of the file itself. A redirect's own etag is not the file's.
fn etag(headers: &HeaderMap, redirect: bool) -> Option<String> {
    let raw = text(headers, "x-linked-etag").or_else(|| text(headers, "etag").filter(|_| !redirect))?;
    let clean = raw.trim_start_matches("W/").trim_matches('"');
    let plain = clean.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    (!clean.is_empty() && clean.len() <= 128 && plain).then(|| clean.to_owned())
}

/// The whole file's size.
fn size(headers: &HeaderMap, redirect: bool) -> Option<u64> {
    if let Some(linked) = text(headers, "x-linked-size") {
        return linked.parse().ok();
    }
    if redirect {
        return None;
    }
    match text(headers, "content-range") {
        Some(range) => range.rsplit_once('/')?.1.parse().ok(),
        None => text(headers, "content-length")?.parse().ok(),
    }
}

fn content_range_start(headers: &HeaderMap) -> Option<u64> {
    text(headers, "content-range")?.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

fn same_origin(a: &str, b: &str) -> bool {
    let origin = |url: &str| {
        let uri: Uri = url.parse().ok()?;
        let scheme = uri.scheme_str()?.to_owned();
        let port = uri.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        Some((scheme, uri.host()?.to_ascii_lowercase(), port))
    };
    origin(a).is_some() && origin(a) == origin(b)
}

/// Where a `Location` header leads: absolute, or a path on the same host. Never from https to http.
fn join(base: &str, location: &str) -> Option<String> {
    if location.starts_with("https://") || (location.starts_with("http://") && !base.starts_with("https://"))
    {
        return Some(location.to_owned());
    }
    let uri: Uri = base.parse().ok()?;
    (location.starts_with('/') && !location.starts_with("//"))
        .then(|| Some(format!("{}://{}{location}", uri.scheme_str()?, uri.authority()?)))?
}

/// Percent-encodes what is not plain in a URL path segment; slashes in revisions too.
fn escape(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_differ_by_scheme_host_or_port() {
        assert!(same_origin("http://h:80", "http://H/x"));
        assert!(!same_origin("http://h", "https://h"));
        assert!(!same_origin("http://h:1", "http://h:2"));
        assert!(!same_origin("http://h", "http://h.evil"));
    }

    #[test]
    fn locations_are_joined_and_never_downgraded() {
        assert_eq!(join("http://h:1/a/b", "/c?d"), Some("http://h:1/c?d".to_owned()));
        assert_eq!(join("https://h/a", "https://cdn/x"), Some("https://cdn/x".to_owned()));
        assert_eq!(join("https://h/a", "http://cdn/x"), None);
        assert_eq!(join("http://h/a", "//cdn/x"), None);
    }

    #[test]
    fn headers_name_the_linked_file_first() {
        let mut headers = HeaderMap::new();
        headers.insert("etag", "\"abc\"".parse().unwrap());
        headers.insert("content-length", "5".parse().unwrap());
        assert_eq!((etag(&headers, true), size(&headers, true)), (None, None));
        assert_eq!((etag(&headers, false).as_deref(), size(&headers, false)), (Some("abc"), Some(5)));
        headers.insert("x-linked-etag", "\"def\"".parse().unwrap());
        headers.insert("x-linked-size", "77".parse().unwrap());
        assert_eq!((etag(&headers, true).as_deref(), size(&headers, true)), (Some("def"), Some(77)));
        headers.insert("x-linked-etag", "\"../up\"".parse().unwrap());
        assert_eq!(etag(&headers, true), None);
    }
}
