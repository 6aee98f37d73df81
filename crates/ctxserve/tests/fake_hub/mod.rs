//! A Hugging Face hub on loopback with faults to order.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

pub(crate) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// One file and its faults.
#[derive(Clone)]
pub(crate) struct Served {
    name: String,
    bytes: Vec<u8>,
    pub(crate) etag: String,
    /// Connection `k` dies when the file's byte `cut_after[k]` has been sent.
    pub(crate) cut_after: Vec<usize>,
    /// Whether `Range` is understood.
    pub(crate) ranges: bool,
    /// `X-Linked-Size`, if it is to differ from the truth.
    pub(crate) stated_size: Option<usize>,
    /// Where GETs are sent instead.
    pub(crate) redirect: Option<String>,
}

/// A small file, named by something that is no digest.
pub(crate) fn file(name: &str, bytes: &[u8]) -> Served {
    Served {
        name: name.to_owned(),
        bytes: bytes.to_owned(),
        etag: sha256(bytes)[..40].to_owned(),
        cut_after: Vec::new(),
        ranges: true,
        stated_size: None,
        redirect: None,
    }
}

impl Served {
    /// Named by its SHA-256, as LFS files are.
    pub(crate) fn large(mut self) -> Self {
        self.etag = sha256(&self.bytes);
        self
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) from: Option<u64>,
    pub(crate) authorization: Option<String>,
}

#[derive(Default)]
struct Log {
    requests: Vec<Request>,
    sent: Vec<(String, usize)>,
    listing_status: Option<u16>,
}

pub(crate) struct FakeHub {
    address: std::net::SocketAddr,
    log: Arc<Mutex<Log>>,
}

impl FakeHub {
    pub(crate) fn start(files: Vec<Served>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let log = Arc::new(Mutex::new(Log::default()));
        let (shared, files) = (log.clone(), Arc::new(files));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (log, files) = (shared.clone(), files.clone());
                std::thread::spawn(move || answer(stream, &files, &log));
            }
        });
        Self { address, log }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn answer_listing_with(&mut self, status: u16) {
        self.log.lock().unwrap().listing_status = Some(status);
    }

    pub(crate) fn count(&self) -> usize {
        self.log.lock().unwrap().requests.len()
    }

    /// Requests whose path ends in `/NAME`.
    pub(crate) fn requests(&self, name: &str) -> Vec<Request> {
        let end = format!("/{name}");
        self.log.lock().unwrap().requests.iter().filter(|r| r.path.ends_with(&end)).cloned().collect()
    }

    pub(crate) fn bytes_sent(&self, name: &str) -> usize {
        self.log.lock().unwrap().sent.iter().filter(|(n, _)| n == name).map(|(_, bytes)| bytes).sum()
    }
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut request = Request { path, from: None, authorization: None };
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(':') else { break };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "authorization" => request.authorization = Some(value.to_owned()),
            "range" => request.from = value.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok(),
            _ => {}
        }
    }
    Some(request)
}

fn answer(mut stream: TcpStream, files: &[Served], log: &Mutex<Log>) {
    let Some(request) = read(&stream) else { return };
    let (earlier, listing_status) = {
        let mut log = log.lock().unwrap();
        let earlier = log.requests.iter().filter(|r| r.path == request.path).count();
        log.requests.push(request.clone());
        (earlier, log.listing_status)
    };
    if request.path == "/api/models/owner/name/revision/main" {
        let names: Vec<String> = files.iter().map(|f| format!("{{\"rfilename\":{:?}}}", f.name)).collect();
        let body = format!("{{\"sha\":\"{COMMIT}\",\"siblings\":[{}]}}", names.join(","));
        let status = listing_status.unwrap_or(200);
        respond(&mut stream, status, &[], body.as_bytes(), body.len());
        return;
    }
    let name = request
        .path
        .strip_prefix(&format!("/owner/name/resolve/{COMMIT}/"))
        .or_else(|| request.path.strip_prefix("/cdn/"));
    let Some(file) = name.and_then(|name| files.iter().find(|file| file.name == name)) else {
        return respond(&mut stream, 404, &[], b"", 0);
    };
    let mut headers = vec![
        ("X-Linked-Etag", format!("\"{}\"", file.etag)),
        ("X-Linked-Size", file.stated_size.unwrap_or(file.bytes.len()).to_string()),
        ("X-Repo-Commit", COMMIT.to_owned()),
    ];
    if let Some(to) = &file.redirect {
        headers.push(("Location", to.clone()));
        return respond(&mut stream, 302, &headers, b"", 0);
    }
    let start = request.from.filter(|_| file.ranges).map_or(0, |from| from as usize);
    if start >= file.bytes.len() && start > 0 {
        return respond(&mut stream, 416, &[], b"", 0);
    }
    if start > 0 {
        let (last, total) = (file.bytes.len() - 1, file.bytes.len());
        headers.push(("Content-Range", format!("bytes {start}-{last}/{total}")));
    }
    let end = file.cut_after.get(earlier).copied().unwrap_or(file.bytes.len()).max(start);
    log.lock().unwrap().sent.push((file.name.clone(), end - start));
    let status = if start > 0 { 206 } else { 200 };
    respond(&mut stream, status, &headers, &file.bytes[start..end], file.bytes.len() - start);
}

fn respond(stream: &mut TcpStream, status: u16, headers: &[(&str, String)], body: &[u8], length: usize) {
    let mut head = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
}
