//! The flags with types. Small groups, each for the part of the server that reads it.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use super::http::HttpOptions;
use super::numbers::{bytes, count, tokens};
use super::values::{OptionError, Origin, Values};

/// Which model, and what is said about it.
#[derive(Clone, Debug, Default)]
pub struct ModelOptions {
    /// As given; `None` is the demo.
    pub model: Option<String>,
    /// Names for the API; empty is the model's own.
    pub served_names: Vec<String>,
    /// Branch, tag or commit.
    pub revision: String,
    /// Where the tokenizer is, if not with the model.
    pub tokenizer: Option<PathBuf>,
    /// Chat format, if not the family's.
    pub chat_format: Option<String>,
    /// Chat template, if not the model's: a file, or a template itself.
    pub chat_template: Option<String>,
    /// Cache to download into.
    pub download_dir: Option<PathBuf>,
    /// Hugging Face token.
    pub token: Option<String>,
    /// What the user says about how the checkpoint is stored.
    pub quantization: Option<String>,
    /// Where sampling defaults come from.
    pub generation: Generation,
    /// Sampling defaults that win over those.
    pub overrides: Map<String, Value>,
    /// Arguments of the chat template where a request is silent.
    pub template_arguments: Map<String, Value>,
}

/// Where sampling defaults come from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Generation {
    /// The checkpoint's `generation_config.json`.
    #[default]
    Checkpoint,
    /// The API's own defaults.
    Neutral,
    /// `generation_config.json` of another directory.
    Directory(PathBuf),
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The best that this build and machine have.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Where and how to compute.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// Device.
    pub device: Device,
    /// Whether the CPU may quantise activations to int8.
    pub int8: bool,
    /// Whether inputs of NVFP4 products are rounded to NVFP4.
    pub nvfp4_activations: bool,
    /// CPU threads; `None` is all cores.
    pub threads: Option<NonZeroUsize>,
    /// Size of the KV cache, bytes; `None` is chosen from free memory.
    pub kv_bytes: Option<usize>,
    /// As asked for.
    pub kv_dtype: KvChoice,
    /// Positions per KV page; `None` is the device's choice.
    pub page_size: Option<usize>,
    /// Share of the GPU's memory that may be taken, in (0, 1].
    pub gpu_share: f64,
    /// Whether decode steps are recorded as graphs.
    pub graphs: bool,
    /// Whether a GPU's kernels are checked before it serves.
    pub self_test: bool,
}

/// How keys and values are to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvChoice {
    /// What the device does best.
    Auto,
    /// 4 bytes.
    F32,
    /// 2 bytes.
    Bf16,
    /// 1 byte.
    Fp8,
}

/// Limits of the engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Longest prompt plus answer; `None` is what fits.
    pub max_model_len: Option<usize>,
    /// The user insists on `max_model_len`: refuse to start rather than serve less.
    pub strict_len: bool,
    /// Most sequences at once.
    pub max_num_seqs: usize,
    /// Most tokens of a step; `None` is the device's choice.
    pub max_batched_tokens: Option<usize>,
    /// Most waiting requests.
    pub max_queued_requests: usize,
    /// Most waiting prompt tokens.
    pub max_queued_tokens: usize,
    /// Whether prompts reuse what was computed for earlier ones.
    pub prefix_caching: bool,
}

/// How to log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogOptions {
    /// JSON lines instead of text.
    pub json: bool,
    /// Level where `RUST_LOG` is silent.
    pub level: String,
}

/// Everything `serve` reads.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Model.
    pub model: ModelOptions,
    /// Device.
    pub device: DeviceOptions,
    /// Engine.
    pub engine: EngineOptions,
    /// HTTP.
    pub http: HttpOptions,
    /// What to tell the user: flags without effect, and why.
    pub notes: Vec<String>,
}

/// Chat formats by the names vLLM gives their parsers.
const TOOL_PARSERS: &[(&str, &str)] = &[("openai", "harmony"), ("harmony", "harmony"), ("hermes", "hermes")];
const REASONING_PARSERS: &[(&str, &str)] =
    &[("openai_gptoss", "harmony"), ("gpt_oss", "harmony"), ("harmony", "harmony"), ("qwen3", "hermes")];

impl LogOptions {
    /// Reads what the first log line needs.
    ///
    /// # Errors
    /// A format or level that does not exist.
    pub fn new(values: &Values) -> Result<Self, OptionError> {
        let json = values.read("log-format", |text| one_of(text, &[("text", false), ("json", true)]))?;
        let levels = ["off", "error", "warn", "info", "debug", "trace"].map(|level| (level, level));
        let level = values.read("log-level", |text| one_of(&text.to_ascii_lowercase(), &levels))?;
        Ok(Self { json: json.unwrap_or(false), level: level.unwrap_or("info").to_owned() })
    }
}

impl ServeOptions {
    /// Gives every flag its type. `env` reads environment variables.
    ///
    /// # Errors
    /// The first flag that is refused or cannot be read.
    pub fn new(values: &Values, env: impl Fn(&str) -> Option<String>) -> Result<Self, OptionError> {
        let mut notes = values.check()?;
        let dtype = values.read("dtype", |text| {
            let known = ["auto", "bfloat16", "float32"].map(|name| (name, name));
            one_of(text, &known).map_err(|what| format!("{what}; the models were not trained for float16"))
        })?;
        if let Some("bfloat16") = dtype {
            notes
                .push("--dtype bfloat16: the CPU computes in float32, which is at least as exact".to_owned());
        }
        let max_model_len = values.read("max-model-len", |text| match text {
            "auto" | "-1" => Ok(None),
            _ => tokens(text).map(Some),
        })?;
        let profile = |name| values.get(name).is_some_and(|g| matches!(g.origin, Origin::Profile(_)));
        Ok(Self {
            model: model(values)?,
            device: device(values)?,
            engine: EngineOptions {
                strict_len: max_model_len.flatten().is_some() && !profile("max-model-len"),
                max_model_len: max_model_len.flatten(),
                max_num_seqs: values.read("max-num-seqs", count)?.unwrap_or(16),
                max_batched_tokens: values.read("max-num-batched-tokens", tokens)?,
                max_queued_requests: values.read("max-num-queued-reqs", count)?.unwrap_or(256),
                max_queued_tokens: values.read("max-num-queued-tokens", tokens)?.unwrap_or(1_000_000),
                prefix_caching: values.switch("enable-prefix-caching")?.unwrap_or(true),
            },
            http: HttpOptions::new(values, env)?,
            notes,
        })
    }

    /// Checks that the parsers named on the command line are those of the chat format.
    ///
    /// # Errors
    /// A parser of another format.
    pub fn check_parsers(values: &Values, format: &str) -> Result<(), OptionError> {
        for (flag, table) in [("tool-call-parser", TOOL_PARSERS), ("reasoning-parser", REASONING_PARSERS)] {
            values.read(flag, |name| match one_of(name, table)? {
                known if known == format => Ok(()),
                known => Err(format!("{name} reads the {known} format, but this model speaks {format}")),
            })?;
        }
        Ok(())
    }
}

fn model(values: &Values) -> Result<ModelOptions, OptionError> {
    let path = |name| values.text(name).map(PathBuf::from);
    let generation = values.text("generation-config").map_or(Generation::Checkpoint, |text| match text {
        "auto" => Generation::Checkpoint,
        "vllm" => Generation::Neutral,
        dir => Generation::Directory(dir.into()),
    });
    let object = |name| {
        let read = |text: &str| {
            serde_json::from_str(text).map_err(|error| format!("expected a JSON object: {error}"))
        };
        values.read(name, read).map(Option::unwrap_or_default)
    };
    Ok(ModelOptions {
        model: values.text("model").map(str::to_owned),
        served_names: values.list("served-model-name"),
        revision: values.text("revision").unwrap_or("main").to_owned(),
        tokenizer: path("tokenizer"),
        chat_format: values.text("chat-format").map(str::to_owned),
        chat_template: values.text("chat-template").map(str::to_owned),
        download_dir: path("download-dir"),
        token: values.text("hf-token").map(str::to_owned),
        quantization: values.text("quantization").map(str::to_ascii_lowercase),
        generation,
        overrides: object("override-generation-config")?,
        template_arguments: object("default-chat-template-kwargs")?,
    })
}

fn device(values: &Values) -> Result<DeviceOptions, OptionError> {
    let devices =
        [("auto", Device::Auto), ("cpu", Device::Cpu), ("cuda", Device::Cuda), ("gpu", Device::Cuda)];
    let kinds = [
        ("auto", KvChoice::Auto),
        ("float32", KvChoice::F32),
        ("bfloat16", KvChoice::Bf16),
        ("bf16", KvChoice::Bf16),
        ("fp8", KvChoice::Fp8),
        ("fp8_e4m3", KvChoice::Fp8),
    ];
    let pages = ["8", "16", "32", "64", "128"].map(|size| (size, size));
    let page = values.read("block-size", |text| count(one_of(text, &pages)?))?;
    let precision = values.read("cpu-precision", |text| one_of(text, &[("exact", false), ("int8", true)]))?;
    let activations =
        values.read("activation-quant", |text| one_of(text, &[("none", false), ("nvfp4", true)]))?;
    Ok(DeviceOptions {
        device: values.read("device", |text| one_of(text, &devices))?.unwrap_or(Device::Auto),
        int8: precision.unwrap_or(false),
        nvfp4_activations: activations.unwrap_or(false),
        threads: values.read("threads", count)?.and_then(NonZeroUsize::new),
        kv_bytes: values.read("kv-cache-memory-bytes", bytes)?,
        kv_dtype: values.read("kv-cache-dtype", |text| one_of(text, &kinds))?.unwrap_or(KvChoice::Auto),
        page_size: page,
        graphs: !values.switch("enforce-eager")?.unwrap_or(false),
        self_test: !values.switch("skip-self-test")?.unwrap_or(false),
        gpu_share: values.read("gpu-memory-utilization", share)?.unwrap_or(0.9),
    })
}

pub(super) fn one_of<T: Copy>(text: &str, table: &[(&str, T)]) -> Result<T, String> {
    table.iter().find(|(name, _)| *name == text).map(|&(_, value)| value).ok_or_else(|| {
        let names: Vec<_> = table.iter().map(|&(name, _)| name).collect();
        format!("expected one of {}, got {text:?}", names.join(", "))
    })
}

/// A fraction in (0, 1].
fn share(text: &str) -> Result<f64, String> {
    let number: f64 = text.parse().map_err(|_| format!("expected a fraction, got {text:?}"))?;
    Some(number)
        .filter(|n| *n > 0.0 && *n <= 1.0)
        .ok_or_else(|| format!("expected more than 0 and at most 1, got {text}"))
}

pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("expected seconds, got {text:?}"))?;
    Duration::try_from_secs_f64(number)
        .ok()
        .filter(|time| time.as_secs() <= 604_800)
        .ok_or_else(|| format!("expected 0 to 604800 seconds, got {text}"))
}

#[cfg(test)]
mod tests {
    use super::super::{Invocation, parse};
    use super::*;

    fn values(line: &str) -> Values {
        let args = ["ctxserve", "serve"].into_iter().chain(line.split_whitespace()).map(str::to_owned);
        match parse(args).unwrap() {
            Invocation::Serve(values) => values,
            other => panic!("{other:?}"),
        }
    }

    fn options(line: &str) -> Result<ServeOptions, String> {
        ServeOptions::new(&values(line), |_| None).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults() {
        let options = options("").unwrap();
        assert_eq!((options.http.host.as_str(), options.http.port), ("0.0.0.0", 8000));
        assert_eq!((options.engine.max_model_len, options.engine.strict_len), (None, false));
        assert!(options.http.auto_tools && options.http.api_keys.is_empty() && options.notes.is_empty());
        assert_eq!(options.model.revision, "main");
        assert!(!options.device.int8 && !options.device.nvfp4_activations);
    }

    #[test]
    fn activations_are_quantised_on_request() {
        let quantised = |line| options(line).unwrap().device.nvfp4_activations;
        assert!(quantised("--activation-quant nvfp4") && !quantised("--activation-quant none"));
        assert!(options("--activation-quant fp8").unwrap_err().contains("--activation-quant"));
    }

    #[test]
    fn lengths_as_vllm_spells_them() {
        for (text, length) in
            [("64k", Some(64_000)), ("64K", Some(65_536)), ("100", Some(100)), ("auto", None), ("-1", None)]
        {
            let engine = options(&format!("--max-model-len {text}")).unwrap().engine;
            assert_eq!((engine.max_model_len, engine.strict_len), (length, length.is_some()), "{text}");
        }
        assert!(options("--max-model-len 0").unwrap_err().contains("--max-model-len"));
        assert!(options("--max-model-len many").is_err());
    }

    /// OPS-09.
    #[test]
    fn wrong_values_name_flag_and_choices() {
        let error = options("--device tpu").unwrap_err();
        assert!(error.contains("--device") && error.contains("cuda") && error.contains("tpu"), "{error}");
        for line in
            ["--port 70000", "--dtype float16", "--kv-cache-dtype nvfp4", "--block-size 7", "--threads 0"]
        {
            let flag = line.split(' ').next().unwrap();
            let error = options(line).unwrap_err();
            assert!(error.contains(flag), "{error}");
        }
    }

    /// The command lines of the model cards, with `serve` after another program's name.
    #[test]
    fn command_lines_of_model_cards_are_taken() {
        let fastcontext = options(
            "r0b0tlab/FastContext-1.0-4B-RL-NVFP4 --quantization modelopt --tensor-parallel-size 1 \
             --trust-remote-code --dtype auto --kv-cache-dtype fp8 --attention-backend flashinfer \
             --gpu-memory-utilization 0.40 --max-model-len 131072 --max-num-seqs 16 --enable-chunked-prefill \
             --enable-auto-tool-choice --tool-call-parser hermes --port 30000",
        )
        .unwrap();
        assert_eq!(fastcontext.model.model.as_deref(), Some("r0b0tlab/FastContext-1.0-4B-RL-NVFP4"));
        assert_eq!(fastcontext.model.quantization.as_deref(), Some("modelopt"));
        assert_eq!(fastcontext.engine.max_model_len, Some(131_072));
        assert_eq!((fastcontext.http.port, fastcontext.http.auto_tools), (30_000, true));
        assert_eq!((fastcontext.device.kv_dtype, fastcontext.device.gpu_share), (KvChoice::Fp8, 0.4));
        let noted = fastcontext.notes.join("\n");
        assert_eq!(fastcontext.notes.len(), 2, "{noted}");
        assert!(noted.contains("--trust-remote-code") && noted.contains("--attention-backend"), "{noted}");
        let context = options(
            "evilfreelancer/context-1-mxfp4 --served-model-name evilfreelancer/context-1-mxfp4 --trust-remote-code \
             --dtype auto --gpu-memory-utilization 0.9 --max-model-len 64000 --max-num-batched-tokens 64000 \
             --kv-cache-dtype fp8 --enable-auto-tool-choice --tool-call-parser openai",
        )
        .unwrap();
        assert_eq!(context.engine.max_model_len, Some(64_000));
        let line = values("--tool-call-parser hermes --reasoning-parser qwen3");
        assert!(ServeOptions::check_parsers(&line, "hermes").is_ok());
    }

    #[test]
    fn templates_are_files_or_text() {
        let template = |line: &str| options(line).unwrap().model.chat_template;
        assert_eq!(template("--chat-template a/b.jinja").as_deref(), Some("a/b.jinja"));
        assert_eq!(template("--chat-template={{messages}}").as_deref(), Some("{{messages}}"));
        assert_eq!(template(""), None);
    }

    /// OPS-09.
    #[test]
    fn parsers_must_fit_the_format() {
        let check = |line| ServeOptions::check_parsers(&values(line), "harmony").map_err(|e| e.to_string());
        assert!(check("--tool-call-parser openai --reasoning-parser openai_gptoss").is_ok());
        let error = check("--tool-call-parser hermes").unwrap_err();
        assert!(error.contains("hermes") && error.contains("harmony"), "{error}");
        assert!(check("--reasoning-parser qwen3").is_err());
        assert!(check("--tool-call-parser nonsense").is_err());
    }

    #[test]
    fn log_options() {
        let log = |line| LogOptions::new(&values(line)).map_err(|error| error.to_string());
        assert_eq!(log("").unwrap(), LogOptions { json: false, level: "info".to_owned() });
        assert_eq!(log("--log-format json --log-level WARN").unwrap().level, "warn");
        assert!(log("--log-format xml").unwrap_err().contains("--log-format"));
    }
}
