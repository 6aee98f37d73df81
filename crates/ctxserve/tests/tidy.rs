//! What the workspace promises about itself: who depends on whom, where `unsafe` lives, how long files are.
#![expect(clippy::unwrap_used, reason = "helpers of tests should stop where they fail")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The crate graph of ARCHITECTURE.md: a crate, and the crates of the workspace it may depend on.
const GRAPH: &[(&str, &[&str])] = &[
    ("core", &[]),
    ("backend", &["core"]),
    ("chat", &["core"]),
    ("checkpoint", &["core"]),
    ("cpu", &["backend", "core"]),
    ("cuda", &["backend", "core"]),
    ("models", &["backend", "checkpoint", "core"]),
    ("engine", &["backend", "core", "models"]),
    ("server", &["chat", "core", "engine"]),
    ("ctxserve", &["backend", "chat", "checkpoint", "core", "cpu", "cuda", "engine", "models", "server"]),
];

/// Libraries that only these crates may use.
const HOMES: &[(&str, &[&str])] = &[
    ("axum", &["server"]),
    ("clap", &["ctxserve"]),
    ("cudarc", &["cuda"]),
    ("llguidance", &["chat"]),
    ("minijinja", &["chat"]),
    ("schemars", &["server"]),
    ("tokenizers", &["chat"]),
    ("toktrie", &["chat"]),
    ("ureq", &["ctxserve"]),
    ("anyhow", &["ctxserve"]),
    ("rayon", &["cpu"]),
];

/// Reference implementations: tests may use them, the program may not.
const ORACLES: &[&str] = &["candle-core", "candle-nn", "openai-harmony"];

/// Where `unsafe` may be written.
const UNSAFE_HOMES: &[&str] = &["crates/cpu/src/kernels/", "crates/cuda/src/"];

/// Longest source file, lines.
const MAX_LINES: usize = 500;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn manifest(name: &str) -> toml::Table {
    let path = root().join("crates").join(name).join("Cargo.toml");
    toml::from_str(&fs::read_to_string(&path).unwrap()).unwrap()
}

/// Names of a crate's dependencies, optional ones left out: they are for tests.
fn dependencies(name: &str) -> BTreeSet<String> {
    let manifest = manifest(name);
    let mut found = BTreeSet::new();
    let mut add = |table: Option<&toml::Value>| {
        for (dependency, value) in table.and_then(toml::Value::as_table).into_iter().flatten() {
            if value.get("optional").and_then(toml::Value::as_bool) != Some(true) {
                found.insert(dependency.clone());
            }
        }
    };
    add(manifest.get("dependencies"));
    for target in manifest.get("target").and_then(toml::Value::as_table).into_iter().flatten() {
        add(target.1.get("dependencies"));
    }
    found
}

fn crates() -> BTreeSet<String> {
    let entries = fs::read_dir(root().join("crates")).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn sources() -> Vec<(String, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let (root, mut paths) = (root(), Vec::new());
    walk(&root.join("crates"), &mut paths);
    let name = |path: &Path| path.strip_prefix(&root).unwrap().to_string_lossy().replace('\\', "/");
    paths.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

#[test]
fn the_crate_graph_is_as_drawn() {
    let drawn: BTreeSet<String> = GRAPH.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(crates(), drawn);
    for (name, allowed) in GRAPH {
        for dependency in dependencies(name) {
            if let Some(ours) = dependency.strip_prefix("ctxserve-") {
                assert!(allowed.contains(&ours), "{name} must not depend on {ours}");
            }
        }
    }
}

#[test]
fn libraries_stay_where_they_belong() {
    for name in crates() {
        let found = dependencies(&name);
        for (library, homes) in HOMES {
            assert!(homes.contains(&name.as_str()) || !found.contains(*library), "{name} uses {library}");
        }
        for oracle in ORACLES {
            assert!(!found.contains(*oracle), "{name} depends on the oracle {oracle}");
        }
    }
}

#[test]
fn every_crate_has_the_workspace_s_lints() {
    for name in crates() {
        let lints = manifest(&name).get("lints").and_then(|lints| lints.get("workspace")?.as_bool());
        assert_eq!(lints, Some(true), "{name}");
    }
}

#[test]
fn unsafe_lives_in_its_homes() {
    for (path, text) in sources() {
        if UNSAFE_HOMES.iter().any(|home| path.starts_with(home)) {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let word = ["unsafe {", "unsafe fn", "unsafe impl", "unsafe trait", "unsafe extern"];
            // The list above is code too.
            let found = word.iter().any(|word| code.contains(word)) && !path.ends_with("tests/tidy.rs");
            assert!(!found, "{path}:{}: unsafe outside its homes", number + 1);
        }
    }
}

#[test]
fn files_are_short() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(lines <= MAX_LINES, "{path} has {lines} lines, at most {MAX_LINES} are read with pleasure");
    }
}

#[test]
fn the_architecture_page_names_what_exists() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let mut paths = 0;
    for name in text.split('`').skip(1).step_by(2).filter(|name| name.contains('/') && !name.contains(' ')) {
        let found = root().join(name).exists() || root().join("crates").join(name).exists();
        assert!(found, "ARCHITECTURE.md names {name}, which does not exist");
        paths += 1;
    }
    assert!(paths > 20, "only {paths} paths were found in ARCHITECTURE.md");
}

#[test]
fn the_architecture_page_draws_the_same_graph() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    for (name, allowed) in GRAPH {
        let row = text.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let Some(row) = row else { panic!("ARCHITECTURE.md has no row for {name}") };
        let cell = row.split('|').nth(2).unwrap_or_default();
        let drawn: BTreeSet<&str> = cell.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
        assert_eq!(drawn, allowed.iter().copied().collect(), "{name}");
    }
}

/// security: `bytes` overflow, RUSTSEC-2026-0007 = CVE-2026-25541. No version that has it, and overflows stop a release build too.
#[test]
fn overflows_are_caught() {
    let toml = |name: &str| fs::read_to_string(root().join(name)).unwrap().parse::<toml::Table>().unwrap();
    let lock = toml("Cargo.lock");
    let packages = lock["package"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|package| package["name"].as_str() == Some("bytes"));
    let versions: Vec<Vec<u32>> = packages
        .map(|package| {
            package["version"].as_str().unwrap().split('.').map(|part| part.parse().unwrap()).collect()
        })
        .collect();
    assert!(
        !versions.is_empty() && versions.iter().all(|version| *version >= vec![1, 11, 1]),
        "{versions:?}"
    );
    let release = toml("Cargo.toml")["profile"]["release"].clone();
    assert_eq!(release["overflow-checks"].as_bool(), Some(true));
    assert_eq!(toml("Cargo.toml")["profile"]["dist"]["inherits"].as_str(), Some("release"));
}
