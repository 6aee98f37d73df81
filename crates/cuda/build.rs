//! Compiles every kernel to a fatbin with nvcc and embeds it. Without nvcc the crate builds without kernels and says so.

use std::fmt::Write as _;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, io, thread};

/// Machine code for each supported generation, and PTX that newer ones translate.
const TARGETS: [&str; 4] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_90,code=compute_90",
];
const FLAGS: &[&str] = &["-fatbin", "-O3", "-std=c++17", "-lineinfo", "--diag-suppress=177"];
/// First release of the toolkit whose code the supported drivers take.
const OLDEST: (u32, u32) = (13, 0);

fn main() {
    println!("cargo::rustc-check-cfg=cfg(kernels)");
    for name in ["CUDA_HOME", "CTXSERVE_REQUIRE_CUDA", "CTXSERVE_CUDA_TARGETS", "PATH"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join("../../kernels");
    println!("cargo::rerun-if-changed={}", root.display());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let made = find_nvcc().and_then(|nvcc| compile_all(&nvcc, &root, &out));
    let table = match made {
        Ok(table) => {
            println!("cargo::rustc-cfg=kernels");
            table
        }
        Err(what) if required() => {
            println!("cargo::error={what}");
            std::process::exit(1);
        }
        Err(what) => {
            println!("cargo::warning=built without CUDA kernels: {what}");
            println!("cargo::rustc-env=CTXSERVE_NO_KERNELS={}", what.lines().next().unwrap_or_default());
            "&[]".to_owned()
        }
    };
    if let Err(error) = fs::write(out.join("fatbins.rs"), table) {
        println!("cargo::error=fatbins.rs: {error}");
    }
}

fn required() -> bool {
    env::var("CTXSERVE_REQUIRE_CUDA").is_ok_and(|value| value != "0")
}

/// `CUDA_HOME`, then `PATH`, then the usual place.
fn find_nvcc() -> Result<PathBuf, String> {
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let path = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&path).map(|dir| dir.join("nvcc"));
    let usual = PathBuf::from("/usr/local/cuda/bin/nvcc");
    let mut reason = "nvcc was not found in CUDA_HOME, PATH or /usr/local/cuda".to_owned();
    for nvcc in home.into_iter().chain(on_path).chain([usual]).filter(|nvcc| nvcc.is_file()) {
        match version(&nvcc) {
            Ok(found) if found >= OLDEST => return Ok(nvcc),
            Ok((major, minor)) => {
                reason = format!("{} is release {major}.{minor}, 13.0 is needed", nvcc.display());
            }
            Err(what) => reason = what,
        }
    }
    Err(reason)
}

fn version(nvcc: &Path) -> Result<(u32, u32), String> {
    let said = run(Command::new(nvcc).arg("--version"))?;
    let number = said.split("release ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or_default();
    let mut parts = number.split('.').map(str::parse);
    match (parts.next(), parts.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => Err(format!("{} does not name its release", nvcc.display())),
    }
}

/// Compiles the files that changed, a few at a time. Returns the table of names and contents.
fn compile_all(nvcc: &Path, root: &Path, out: &Path) -> Result<String, String> {
    let text = |error: io::Error| format!("{}: {error}", root.display());
    let mut sources = files(root, "cu").map_err(text)?;
    let faulty = env::var_os("CARGO_FEATURE_FAULT_INJECTION").is_some();
    sources.retain(|path| faulty || path.file_stem().is_none_or(|name| name != "fault"));
    sources.sort();
    let mut headers = files(&root.join("common"), "cuh").map_err(text)?;
    headers.sort();
    let mut shared = Vec::new();
    for header in &headers {
        shared.extend(fs::read(header).map_err(text)?);
    }
    let wanted = env::var("CTXSERVE_CUDA_TARGETS").ok();
    let targets = wanted
        .map_or(TARGETS.map(str::to_owned).to_vec(), |list| list.split(';').map(str::to_owned).collect());
    // OUT_DIR is TARGET/PROFILE/build/PACKAGE/out.
    let kept = out.ancestors().nth(4).unwrap_or(out).join("cuda-kernels");
    fs::create_dir_all(&kept).map_err(text)?;
    let recipe = Recipe { nvcc, root, targets, shared, kept };
    let queue = Mutex::new(sources.clone());
    let failed = Mutex::new(Vec::new());
    let worker = || {
        while let Some(source) = queue.lock().ok().and_then(|mut queue| queue.pop()) {
            if let Err(what) = recipe.compile(&source, &target(out, &source)) {
                failed.lock().map(|mut failed| failed.push(what)).ok();
            }
        }
    };
    let workers = thread::available_parallelism().map_or(1, |count| count.get().min(8));
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(worker);
        }
    });
    let failed = failed.into_inner().unwrap_or_default();
    if !failed.is_empty() {
        // A broken kernel is a broken build, nvcc or not.
        println!("cargo::error={}", failed.join("\n").replace('\n', "\ncargo::error="));
        std::process::exit(1);
    }
    let mut table = "&[".to_owned();
    for source in &sources {
        let name = source.file_stem().unwrap_or_default().to_string_lossy();
        let path = target(out, source);
        let _ = write!(table, "({name:?}, include_bytes!({:?})),", path.display().to_string());
    }
    Ok(table + "]")
}

fn target(out: &Path, source: &Path) -> PathBuf {
    out.join(source.file_stem().unwrap_or_default()).with_extension("fatbin")
}

/// What a kernel's machine code depends on, beside its own text.
struct Recipe<'a> {
    nvcc: &'a Path,
    root: &'a Path,
    targets: Vec<String>,
    /// Text of the headers.
    shared: Vec<u8>,
    /// Where code is kept by what it was made from, so that profiles share it.
    kept: PathBuf,
}

impl Recipe<'_> {
    fn key(&self, text: &[u8]) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.nvcc, &self.targets, FLAGS, &self.shared, text).hash(&mut hasher);
        hasher.finish()
    }

    fn compile(&self, source: &Path, target: &Path) -> Result<(), String> {
        let failed = |error: io::Error| format!("{}: {error}", source.display());
        let name = source.file_stem().unwrap_or_default().to_string_lossy();
        let key = self.key(&fs::read(source).map_err(failed)?);
        let kept = self.kept.join(format!("{name}-{key:016x}.fatbin"));
        if !kept.is_file() {
            // Made aside and moved into place whole: a cut compilation leaves nothing that looks complete.
            let fresh = self.kept.join(format!("{name}-{}.tmp", std::process::id()));
            let mut command = Command::new(self.nvcc);
            command.args(FLAGS).arg("-I").arg(self.root);
            for target in &self.targets {
                command.args(["-gencode", target]);
            }
            run(command.arg("-o").arg(&fresh).arg(source))?;
            fs::rename(&fresh, &kept).map_err(failed)?;
        }
        fs::copy(&kept, target).map(drop).map_err(failed)
    }
}

fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{name}: {error}"))?;
    let both =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    if output.status.success() { Ok(both) } else { Err(format!("{name}: {}\n{both}", output.status)) }
}

fn files(dir: &Path, extension: &str) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|found| found == extension) {
            found.push(path);
        }
    }
    Ok(found)
}
