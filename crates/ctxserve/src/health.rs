//! `ctxserve health`: the probe of images and units that hold no HTTP client.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use ureq::Agent;
use ureq::http::{StatusCode, Uri};

use crate::cli::health::HealthArgs;

/// What is asked of a server whose URL names no path.
const PATH: &str = "/health";
/// Bytes of a refusal that are shown.
const SHOWN: u64 = 4096;
/// Between two questions.
const PAUSE: Duration = Duration::from_millis(500);

/// Asks the server whether it is ready, once or until it is.
///
/// # Errors
/// The URL is none, nobody answers in time, or the last answer was not 200; the error quotes it.
pub fn check(args: &HealthArgs) -> anyhow::Result<()> {
    let url = probe(&args.url)?;
    let agent = Agent::config_builder()
        .max_redirects(0)
        .http_status_as_error(false)
        // The environment's proxy is for downloads: it may not reach this machine, or answer in the server's place.
        .proxy(None)
        .timeout_global(Some(args.timeout))
        .build()
        .new_agent();
    let start = Instant::now();
    loop {
        match ask(&agent, &url) {
            Err(_) if start.elapsed() + PAUSE < args.wait => sleep(PAUSE),
            answer => return answer,
        }
    }
}

fn ask(agent: &Agent, url: &Uri) -> anyhow::Result<()> {
    let mut response = agent.get(url).call().with_context(|| url.to_string())?;
    let status = response.status();
    if status != StatusCode::OK {
        let text = response.body_mut().with_config().limit(SHOWN).read_to_string().unwrap_or_default();
        bail!("{url}: {status}: {}", text.trim());
    }
    Ok(())
}

/// Where to ask.
fn probe(server: &str) -> anyhow::Result<Uri> {
    let whole = |uri: &Uri| uri.scheme_str() == Some("http") && uri.authority().is_some();
    let uri = server.parse().ok().filter(whole);
    let uri: Uri = uri.with_context(|| format!("{server}: expected http://HOST:PORT"))?;
    if uri.path() != "/" {
        return Ok(uri);
    }
    format!("{}{PATH}", server.trim_end_matches('/')).parse().with_context(|| server.to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// Answers one connection after another with these, and returns what was asked.
    fn scripted(answers: &'static [&'static str]) -> (String, thread::JoinHandle<Vec<String>>) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let serve = move || {
            let answer = |answer: &&str| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let read = stream.read(&mut request).unwrap();
                let length = answer.split("\r\n\r\n").nth(1).unwrap_or_default().len();
                let (head, body) = answer.split_once("\r\n\r\n").unwrap();
                write!(
                    stream,
                    "HTTP/1.1 {head}\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
                )
                .unwrap();
                String::from_utf8_lossy(&request[..read]).lines().next().unwrap_or_default().to_owned()
            };
            answers.iter().map(answer).collect()
        };
        (url, thread::spawn(serve))
    }

    fn args(url: &str, wait: u64) -> HealthArgs {
        HealthArgs { url: url.to_owned(), timeout: Duration::from_secs(60), wait: Duration::from_secs(wait) }
    }

    #[test]
    fn a_ready_server_is_healthy_at_health() {
        let (url, asked) = scripted(&["200 OK\r\n\r\n{}"]);
        check(&args(&url, 0)).unwrap();
        assert_eq!(asked.join().unwrap(), ["GET /health HTTP/1.1"]);
    }

    #[test]
    fn a_path_is_asked_as_given() {
        let (url, asked) = scripted(&["200 OK\r\n\r\n{}"]);
        check(&args(&format!("{url}/version"), 0)).unwrap();
        assert_eq!(asked.join().unwrap(), ["GET /version HTTP/1.1"]);
    }

    /// OPS-21: what drains is not ready.
    #[test]
    fn a_refusal_is_quoted() {
        let (url, asked) = scripted(&["503 Service Unavailable\r\n\r\nshutting down"]);
        let error = check(&args(&url, 0)).unwrap_err().to_string();
        assert!(error.contains("503") && error.contains("shutting down"), "{error}");
        asked.join().unwrap();
    }

    #[test]
    fn a_redirect_is_no_health() {
        let (url, asked) = scripted(&["302 Found\r\nlocation: /elsewhere\r\n\r\n"]);
        assert!(check(&args(&url, 0)).is_err());
        asked.join().unwrap();
    }

    #[test]
    fn waiting_asks_until_it_is_ready() {
        let (url, asked) = scripted(&["503 Service Unavailable\r\n\r\nnot yet", "200 OK\r\n\r\n{}"]);
        check(&args(&url, 600)).unwrap();
        assert_eq!(asked.join().unwrap().len(), 2);
    }

    #[test]
    fn nobody_there_is_an_error() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        let error = check(&args(&url, 0)).unwrap_err().to_string();
        assert!(error.contains(&url), "{error}");
    }

    #[test]
    fn what_is_no_server_is_named() {
        for wrong in ["", "127.0.0.1:8000", "ftp://host", "http://", "unix:/run/x"] {
            assert!(probe(wrong).unwrap_err().to_string().contains("http://HOST:PORT"), "{wrong}");
        }
        assert_eq!(probe("http://h:1/").unwrap(), "http://h:1/health");
        assert_eq!(probe("http://[::1]:8000").unwrap(), "http://[::1]:8000/health");
    }
}
