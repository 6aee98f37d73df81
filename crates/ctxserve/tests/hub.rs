//! Downloads from a hub that the test plays on loopback.
#![expect(clippy::unwrap_used, reason = "helpers of tests should stop where they fail")]

mod fake_hub;

use std::fs;
use std::path::Path;
use std::time::Duration;

use ctxserve::hub::{Hub, HubError, Patience, RepoId, Silent, Want};
use fake_hub::{COMMIT, FakeHub, Served, file, sha256};

const TOKEN: &str = "hf_secret";

fn hub(endpoint: &str, home: &Path, more: &[(&str, &str)]) -> Hub {
    let mut vars = vec![
        ("HF_ENDPOINT".to_owned(), endpoint.to_owned()),
        ("HF_HOME".to_owned(), home.to_string_lossy().into_owned()),
    ];
    vars.extend(more.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())));
    let patience =
        Patience { attempts: 3, pause: Duration::from_millis(1), silence: Duration::from_secs(20) };
    Hub::from_env(move |name| vars.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
        .unwrap()
        .with_patience(patience)
}

fn repo() -> RepoId {
    "owner/name".parse().unwrap()
}

fn fetch(hub: &Hub) -> Result<std::path::PathBuf, HubError> {
    hub.snapshot(&repo(), "main", Want::Model, &Silent, |_| Ok(()))
}

fn weights() -> Vec<u8> {
    (0..400_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

fn model() -> Vec<Served> {
    vec![
        file("config.json", b"{}"),
        file("tokenizer.json", b"{\"a\":1}"),
        file("pytorch_model.bin", b"never"),
        file("modeling.py", b"never"),
        file("original/model.safetensors", b"never"),
        file("model.safetensors", &weights()).large(),
    ]
}

fn snapshot(home: &Path) -> std::path::PathBuf {
    home.join("hub/models--owner--name/snapshots").join(COMMIT)
}

#[test]
fn a_repository_lands_in_the_ordinary_cache() {
    let (server, home) = (FakeHub::start(model()), tempfile::tempdir().unwrap());
    let dir = fetch(&hub(&server.url(), home.path(), &[])).unwrap();
    assert_eq!(dir, snapshot(home.path()));
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    let mut names: Vec<_> =
        fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors", "tokenizer.json"]);
    let root = home.path().join("hub/models--owner--name");
    assert_eq!(fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    let blob = root.join("blobs").join(sha256(&weights()));
    assert_eq!(fs::read(blob).unwrap(), weights());
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(dir.join("model.safetensors")).unwrap(),
        Path::new("../../blobs").join(sha256(&weights()))
    );

    let before = server.bytes_sent("model.safetensors");
    fetch(&hub(&server.url(), home.path(), &[])).unwrap();
    assert!(server.requests("pytorch_model.bin").is_empty() && server.requests("modeling.py").is_empty());
    assert_eq!(before, weights().len());
}

#[test]
fn a_cut_connection_is_resumed_within_a_run() {
    let mut files = model();
    files[5].cut_after = vec![100_000, 250_000];
    let (server, home) = (FakeHub::start(files), tempfile::tempdir().unwrap());
    let dir = fetch(&hub(&server.url(), home.path(), &[])).unwrap();
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    let ranges: Vec<_> = server.requests("model.safetensors").into_iter().map(|r| r.from).collect();
    assert_eq!(ranges.len(), 3);
    assert_eq!(ranges[0], None);
    assert!(ranges[1].is_some_and(|at| at > 0) && ranges[2] > ranges[1], "{ranges:?}");
}

#[test]
fn a_cut_download_is_resumed_by_the_next_run() {
    let mut files = model();
    files[5].cut_after = vec![100_000; 50];
    files[5].ranges = true;
    let (server, home) = (FakeHub::start(files), tempfile::tempdir().unwrap());
    // Every connection dies at byte 100,000: nothing new comes, so the run gives up and says so.
    let error = fetch(&hub(&server.url(), home.path(), &[])).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("model.safetensors") && text.contains("400000"), "{text}");
    let partial =
        home.path().join("hub/models--owner--name/blobs").join(format!("{}.incomplete", sha256(&weights())));
    let kept = fs::metadata(&partial).unwrap().len();
    assert!(kept > 0 && kept <= 100_000, "{kept}");

    let healthy = FakeHub::start(model());
    let dir = fetch(&hub(&healthy.url(), home.path(), &[])).unwrap();
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    let last = healthy.requests("model.safetensors").pop().unwrap();
    assert_eq!(last.from, Some(kept));
    assert!(!partial.exists());
}

#[test]
fn a_server_without_ranges_starts_the_file_over() {
    let mut files = model();
    files[5].cut_after = vec![100_000];
    files[5].ranges = false;
    let (server, home) = (FakeHub::start(files), tempfile::tempdir().unwrap());
    let dir = fetch(&hub(&server.url(), home.path(), &[])).unwrap();
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
}

#[test]
fn a_truncated_file_is_an_error_with_both_sizes() {
    let mut files = model();
    files[5].stated_size = Some(500_000);
    let (server, home) = (FakeHub::start(files), tempfile::tempdir().unwrap());
    let error = fetch(&hub(&server.url(), home.path(), &[])).unwrap_err();
    assert!(matches!(&error, HubError::Truncated { expected: 500_000, got: 400_000, .. }), "{error}");
    assert!(!snapshot(home.path()).join("model.safetensors").exists());
}

#[test]
fn other_bytes_than_promised_are_an_error_and_not_kept() {
    let mut files = model();
    files[5].etag = sha256(b"something else");
    let (server, home) = (FakeHub::start(files), tempfile::tempdir().unwrap());
    let error = fetch(&hub(&server.url(), home.path(), &[])).unwrap_err();
    assert!(matches!(&error, HubError::Damaged { file, .. } if file == "model.safetensors"), "{error}");
    let blobs = home.path().join("hub/models--owner--name/blobs");
    assert!(!blobs.join(sha256(b"something else")).exists());
    assert!(!blobs.join(format!("{}.incomplete", sha256(b"something else"))).exists());
}

#[test]
fn refusals_say_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let ask = |status: u16, vars: &[(&str, &str)]| {
        let mut server = FakeHub::start(model());
        server.answer_listing_with(status);
        fetch(&hub(&server.url(), home.path(), vars)).unwrap_err().to_string()
    };
    let error = ask(401, &[]);
    assert!(error.contains("owner/name") && error.contains("HF_TOKEN") && error.contains("401"), "{error}");
    let error = ask(403, &[("HF_TOKEN", TOKEN)]);
    assert!(error.contains("conditions") && !error.contains(TOKEN), "{error}");
    let error = ask(404, &[]);
    assert!(error.contains("owner/name") && error.contains("404"), "{error}");
    assert!(ask(500, &[]).contains("500"));
}

#[test]
fn the_token_goes_to_the_endpoint_and_not_where_it_redirects() {
    let cdn = FakeHub::start(model());
    let mut files = model();
    files[5].redirect = Some(format!("{}/cdn/model.safetensors", cdn.url()));
    let (server, home) = (FakeHub::start(files), tempfile::tempdir().unwrap());
    let dir = fetch(&hub(&server.url(), home.path(), &[("HF_TOKEN", TOKEN)])).unwrap();
    assert_eq!(fs::read(dir.join("model.safetensors")).unwrap(), weights());
    let asked = server.requests("model.safetensors");
    assert!(asked.iter().all(|r| r.authorization.as_deref() == Some("Bearer hf_secret")), "{asked:?}");
    let cdn_asked = cdn.requests("model.safetensors");
    assert!(!cdn_asked.is_empty() && cdn_asked.iter().all(|r| r.authorization.is_none()), "{cdn_asked:?}");
}

/// OPS-01.
#[test]
fn offline_serves_what_is_cached_and_names_what_is_not() {
    let (server, home) = (FakeHub::start(model()), tempfile::tempdir().unwrap());
    let offline = hub(&server.url(), home.path(), &[("HF_HUB_OFFLINE", "1")]);
    let error = fetch(&offline).unwrap_err();
    assert!(matches!(error, HubError::Offline { .. }), "{error}");
    assert!(error.to_string().contains("HF_HUB_OFFLINE"));
    let dir = fetch(&hub(&server.url(), home.path(), &[])).unwrap();
    let count = server.count();
    assert_eq!(fetch(&offline).unwrap(), dir);
    assert_eq!(server.count(), count, "offline means no request at all");
}

#[test]
fn an_unreachable_hub_falls_back_to_the_cache() {
    let (server, home) = (FakeHub::start(model()), tempfile::tempdir().unwrap());
    let dir = fetch(&hub(&server.url(), home.path(), &[])).unwrap();
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    assert_eq!(fetch(&hub(&nobody, home.path(), &[])).unwrap(), dir);
    let empty = tempfile::tempdir().unwrap();
    let error = fetch(&hub(&nobody, empty.path(), &[])).unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
}

#[test]
fn the_check_runs_before_any_weights() {
    #[derive(Debug)]
    enum Refused {
        Hub(HubError),
        Check,
    }
    impl From<HubError> for Refused {
        fn from(error: HubError) -> Self {
            Self::Hub(error)
        }
    }
    let (server, home) = (FakeHub::start(model()), tempfile::tempdir().unwrap());
    let outcome =
        hub(&server.url(), home.path(), &[]).snapshot(&repo(), "main", Want::Model, &Silent, |dir| {
            assert!(dir.join("config.json").is_file());
            Err(Refused::Check)
        });
    match outcome {
        Err(Refused::Check) => {}
        Err(Refused::Hub(error)) => panic!("{error}"),
        Ok(_) => panic!("the check was ignored"),
    }
    assert!(server.requests("model.safetensors").is_empty());
}

#[test]
fn repositories_without_safetensors_and_with_unsafe_names_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let server = FakeHub::start(vec![file("config.json", b"{}"), file("pytorch_model.bin", b"x")]);
    let error = fetch(&hub(&server.url(), home.path(), &[])).unwrap_err().to_string();
    assert!(error.contains("pytorch_model.bin"), "{error}");
    let server = FakeHub::start(vec![file("..\\x.json", b"{}"), file("model.safetensors", b"x")]);
    let error = fetch(&hub(&server.url(), home.path(), &[])).unwrap_err();
    assert!(matches!(error, HubError::UnsafeName { .. }), "{error}");
}

#[test]
fn a_tokenizer_alone_leaves_the_weights_on_the_hub() {
    let (server, home) = (FakeHub::start(model()), tempfile::tempdir().unwrap());
    let hub = hub(&server.url(), home.path(), &[]);
    let dir = hub.snapshot(&repo(), "main", Want::Tokenizer, &Silent, |_| Ok::<(), HubError>(())).unwrap();
    assert!(dir.join("tokenizer.json").is_file());
    assert!(server.requests("model.safetensors").is_empty());
}
