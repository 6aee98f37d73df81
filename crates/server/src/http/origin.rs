//! Web pages that talk to the server behind a user's back: which hosts and origins are let in, and CORS.
//!
//! A page of another site can send requests to a server on the user's own machine, and with a name that it points there
//! (DNS rebinding) it can read the answers too. So a server that listens on loopback takes requests for loopback names alone,
//! and from pages only of loopback or of origins that were allowed.

use std::net::IpAddr;
use std::time::Duration;

use axum::http::header::{AUTHORIZATION, CONTENT_TYPE, HOST, ORIGIN, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use thiserror::Error;
use tower_http::cors::{AllowHeaders, AllowMethods, AllowOrigin, CorsLayer};

use super::guard::REQUEST_ID;
use crate::error::ApiError;

const ANY: &str = "*";
/// How long browsers may keep what a preflight said.
const MAX_AGE: Duration = Duration::from_secs(600);

/// Which names the server may be called by and which web pages may call it. Nothing is open by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Browsers {
    /// Host names besides loopback's, without ports; where there are any, others are refused whatever the server listens on.
    pub hosts: Vec<String>,
    /// Name that the server was told to listen on; refused nowhere.
    pub own_name: Option<String>,
    /// Origins whose pages may read answers, such as `https://app.example.com`; `*` is every page.
    pub origins: Vec<String>,
    /// Methods that those pages may use; `None` is what the routes take.
    pub methods: Option<Vec<String>>,
    /// Headers that those pages may send; `None` is whatever they ask for.
    pub headers: Option<Vec<String>>,
    /// Whether those pages may send cookies.
    pub credentials: bool,
}

/// Settings that browsers or common sense refuse.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BrowsersError {
    /// A wildcard beside credentials.
    #[error("'*' cannot be used with credentials: name the origins, methods and headers")]
    AnyWithCredentials,
    /// Something that is no origin.
    #[error("{0:?} is not an origin; one looks like https://app.example.com or http://localhost:3000")]
    Origin(String),
    /// Something that is no method.
    #[error("{0:?} is not an HTTP method")]
    Method(String),
    /// Something that is no header name.
    #[error("{0:?} is not the name of a header")]
    Header(String),
    /// Something that is no host name.
    #[error("{0:?} is not a host name; it has neither scheme nor port")]
    Host(String),
}

impl BrowsersError {
    /// The flag at fault.
    pub fn flag(&self) -> &'static str {
        match self {
            Self::AnyWithCredentials => "allow-credentials",
            Self::Origin(_) => "allowed-origins",
            Self::Method(_) => "allowed-methods",
            Self::Header(_) => "allowed-headers",
            Self::Host(_) => "allowed-hosts",
        }
    }
}

/// In a request's extensions: the server listens on loopback alone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Loopback;

impl Browsers {
    /// Whether the settings make sense.
    ///
    /// # Errors
    /// See [`BrowsersError`].
    pub fn check(&self) -> Result<(), BrowsersError> {
        self.layer().map(drop)
    }

    /// Checks the settings, and makes the CORS layer that they ask for.
    ///
    /// # Errors
    /// See [`BrowsersError`].
    pub(crate) fn layer(&self) -> Result<Option<CorsLayer>, BrowsersError> {
        let any = |list: &[String]| list.iter().any(|item| item == ANY);
        let methods = self.methods.as_deref().unwrap_or_default();
        let headers = self.headers.as_deref().unwrap_or_default();
        if self.credentials && [&self.origins, methods, headers].iter().any(|list| any(list)) {
            return Err(BrowsersError::AnyWithCredentials);
        }
        if let Some(host) = self.hosts.iter().find(|host| !is_host(host)) {
            return Err(BrowsersError::Host(host.clone()));
        }
        let known_methods = all(methods, BrowsersError::Method, |text| text.parse::<Method>().ok())?;
        let known_headers = all(headers, BrowsersError::Header, |text| text.parse::<HeaderName>().ok())?;
        let origins = all(&self.origins, BrowsersError::Origin, origin)?;
        if self.origins.is_empty() {
            return Ok(None);
        }
        let methods = match &self.methods {
            None => AllowMethods::list([Method::GET, Method::HEAD, Method::POST, Method::DELETE]),
            Some(list) if any(list) => AllowMethods::any(),
            Some(_) => AllowMethods::list(known_methods),
        };
        let headers = match &self.headers {
            None => AllowHeaders::mirror_request(),
            // A wildcard never covers it in browsers.
            Some(list) if any(list) => AllowHeaders::mirror_request(),
            Some(_) => AllowHeaders::list(known_headers.into_iter().chain([AUTHORIZATION, CONTENT_TYPE])),
        };
        let origins = if any(&self.origins) { AllowOrigin::any() } else { AllowOrigin::list(origins) };
        let layer = CorsLayer::new().allow_origin(origins).allow_methods(methods).allow_headers(headers);
        let layer = layer.allow_credentials(self.credentials).max_age(MAX_AGE);
        Ok(Some(layer.expose_headers([REQUEST_ID, RETRY_AFTER])))
    }

    /// Whether a request may come in.
    ///
    /// # Errors
    /// 403 naming the header.
    pub(crate) fn admit(&self, headers: &HeaderMap, loopback: bool) -> Result<(), ApiError> {
        if loopback || !self.hosts.is_empty() {
            for host in headers.get_all(HOST) {
                let name = host.to_str().map(host_name).unwrap_or_default();
                if !self.is_ours(&name) {
                    let hint = "This server is not called by the name in 'Host'. Names can be added with --allowed-hosts.";
                    return Err(ApiError::forbidden("forbidden_host", hint));
                }
            }
        }
        if loopback {
            for origin in headers.get_all(ORIGIN) {
                let origin = origin.to_str().unwrap_or_default();
                let allowed = self.origins.iter().any(|known| known == ANY || known == origin);
                let local = origin.split_once("://").is_some_and(|(_, host)| self.is_ours(&host_name(host)));
                if !allowed && !local {
                    let hint = "Pages of this origin may not call this server. Origins can be allowed with --allowed-origins.";
                    return Err(ApiError::forbidden("forbidden_origin", hint));
                }
            }
        }
        Ok(())
    }

    fn is_ours(&self, name: &str) -> bool {
        is_loopback(name)
            || self.own_name.as_deref().is_some_and(|own| own.eq_ignore_ascii_case(name))
            || self.hosts.iter().any(|host| host == ANY || host.eq_ignore_ascii_case(name))
    }
}

/// Reads every item of a list that is not the wildcard.
fn all<T>(
    list: &[String],
    wrong: impl Fn(String) -> BrowsersError,
    read: impl Fn(&str) -> Option<T>,
) -> Result<Vec<T>, BrowsersError> {
    let named = list.iter().filter(|item| *item != ANY);
    named.map(|item| read(item).ok_or_else(|| wrong(item.clone()))).collect()
}

/// `scheme://host` or `scheme://host:port` and nothing after it, which is how browsers write it.
fn origin(text: &str) -> Option<HeaderValue> {
    let (scheme, host) = text.split_once("://")?;
    let plain = |text: &str| {
        !text.is_empty() && text.bytes().all(|b| b.is_ascii_graphic() && !b"/?#@*,\"\\".contains(&b))
    };
    (plain(scheme) && plain(host)).then(|| HeaderValue::from_str(text).ok()).flatten()
}

fn is_host(text: &str) -> bool {
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b));
    text == ANY || (plain && !text.is_empty() && host_name(text) == text.to_ascii_lowercase())
}

/// The name in `name`, `name:port` or `[address]:port`, in lower case.
fn host_name(host: &str) -> String {
    let host = host.trim();
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => match host.rsplit_once(':') {
            Some((name, port)) if !name.contains(':') && port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => host,
        },
    };
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn is_loopback(name: &str) -> bool {
    let address = name.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback());
    address || name == "localhost" || name.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn browsers(origins: &[&str]) -> Browsers {
        Browsers { origins: origins.iter().map(|&o| o.to_owned()).collect(), ..Browsers::default() }
    }

    fn headers(host: &'static str, origin: Option<&'static str>) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(HOST, HeaderValue::from_static(host));
        if let Some(origin) = origin {
            headers.insert(ORIGIN, HeaderValue::from_static(origin));
        }
        headers
    }

    /// security: CORS and browsers. DNS rebinding: a name that is not ours, whoever it points to.
    #[test]
    fn on_loopback_hosts_and_origins_are_checked() {
        let mut rules = browsers(&["https://app.example.com"]);
        rules.own_name = Some("box.local".to_owned());
        let code = |host, origin| rules.admit(&headers(host, origin), true).err().and_then(|e| e.code);
        for host in [
            "localhost:8000",
            "LOCALHOST",
            "127.0.0.1:1",
            "127.9.9.9",
            "[::1]:8000",
            "a.localhost",
            "Box.local:80",
        ] {
            assert_eq!(code(host, None), None, "{host}");
        }
        for host in
            ["evil.example", "evil.example:8000", "localhost.evil.example", "192.168.0.1", "0.0.0.0", ""]
        {
            assert_eq!(code(host, None), Some("forbidden_host"), "{host}");
        }
        for origin in ["http://localhost:3000", "https://app.example.com", "http://127.0.0.1"] {
            assert_eq!(code("localhost", Some(origin)), None, "{origin}");
        }
        for origin in
            ["https://evil.example", "null", "", "https://app.example.com.evil", "http://app.example.com"]
        {
            assert_eq!(code("localhost", Some(origin)), Some("forbidden_origin"), "{origin}");
        }
        assert_eq!(rules.admit(&headers("evil.example", Some("https://evil.example")), false), Ok(()));
    }

    #[test]
    fn names_that_are_given_are_checked_everywhere() {
        let rules = Browsers { hosts: vec!["api.example.com".to_owned()], ..Browsers::default() };
        assert_eq!(rules.admit(&headers("api.example.com:443", None), false), Ok(()));
        assert!(rules.admit(&headers("other.example.com", None), false).is_err());
        let any = Browsers { hosts: vec!["*".to_owned()], ..Browsers::default() };
        assert_eq!(any.admit(&headers("other.example.com", None), true), Ok(()));
    }

    #[test]
    fn wildcards_and_credentials_do_not_mix() {
        let star = Some(vec!["*".to_owned()]);
        for rules in [
            browsers(&["*"]),
            Browsers { methods: star.clone(), ..browsers(&["https://a.example"]) },
            Browsers { headers: star, ..browsers(&["https://a.example"]) },
        ] {
            assert!(rules.layer().unwrap().is_some());
            let rules = Browsers { credentials: true, ..rules };
            assert_eq!(rules.layer().err(), Some(BrowsersError::AnyWithCredentials));
        }
        assert!(
            Browsers { credentials: true, ..browsers(&["https://a.example"]) }.layer().unwrap().is_some()
        );
        assert!(Browsers::default().layer().unwrap().is_none());
    }

    #[test]
    fn what_is_no_origin_is_named() {
        for text in [
            "a.example",
            "https://a.example/",
            "https://a.example/x",
            "https://*.a.example",
            "null",
            "https://",
        ] {
            assert_eq!(
                browsers(&[text]).layer().err(),
                Some(BrowsersError::Origin(text.to_owned())),
                "{text}"
            );
        }
        for host in ["http://a", "a:80", ""] {
            let rules = Browsers { hosts: vec![host.to_owned()], ..Browsers::default() };
            assert_eq!(rules.layer().err(), Some(BrowsersError::Host(host.to_owned())));
        }
    }
}
