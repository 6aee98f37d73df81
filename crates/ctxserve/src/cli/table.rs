//! Every flag of `ctxserve serve`, as data: what it takes, and whether it is honoured, accepted without effect
//! (and logged with the reason), or refused (with the reason). Nothing is accepted in silence.
//!
//! Names are vLLM's where the meaning is the same. Keys of `--config` files and of profiles are these names.

/// What follows a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// Nothing, or `=true`/`=false`. `--no-NAME` and, for `enable-X`, `--disable-X` negate it.
    Switch,
    /// One value; the text names it in the help.
    Value(&'static str),
    /// One or more values; the flag may be repeated.
    List(&'static str),
}

/// What the server does about a flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// It does what it says.
    Honoured,
    /// Accepted and logged: it changes nothing here, and this is why.
    NoOp(&'static str),
    /// These values mean what the server does anyway; any other is refused, and this is why.
    Only(&'static [&'static str], &'static str),
    /// Refused, and this is why. A switch may still be given as false.
    Refused(&'static str),
}

/// One flag.
#[derive(Clone, Copy, Debug)]
pub struct Flag {
    /// Without the leading dashes, words joined by `-`.
    pub name: &'static str,
    /// What follows it.
    pub takes: Takes,
    /// What is done about it.
    pub treatment: Treatment,
    /// One line for `--help`; empty for flags that do nothing.
    pub help: &'static str,
}

use super::limits;
use Takes::{List, Switch, Value};
use Treatment::{Honoured, NoOp, Only, Refused};

pub(super) const fn honoured(name: &'static str, takes: Takes, help: &'static str) -> Flag {
    Flag { name, takes, treatment: Honoured, help }
}

const fn no_op(name: &'static str, takes: Takes, why: &'static str) -> Flag {
    Flag { name, takes, treatment: NoOp(why), help: "" }
}

const fn only(
    name: &'static str,
    takes: Takes,
    values: &'static [&'static str],
    otherwise: &'static str,
) -> Flag {
    Flag { name, takes, treatment: Only(values, otherwise), help: "" }
}

const fn refused(name: &'static str, takes: Takes, why: &'static str) -> Flag {
    Flag { name, takes, treatment: Refused(why), help: "" }
}

const ONE_DEVICE: &str = "this build runs a model on one device";
const NO_GPU: &str = "it tunes a GPU, and this build runs on the CPU";
const NO_PYTHON: &str = "it names Python code, and no code but the server's own is ever run";
const NO_LORA: &str = "adapters are not supported";
const NO_TLS: &str = "the server speaks plain HTTP; put a TLS proxy in front of it";
const NO_EVENTS: &str = "only the HTTP port is opened";

/// How a model is loaded and run: flags of every subcommand that does.
pub const RUNNING: &[Flag] = &[
    // Model.
    honoured("model", Value("MODEL"), "Same as the positional MODEL"),
    honoured("revision", Value("REV"), "Branch, tag or commit of the repository [default: main]"),
    honoured(
        "tokenizer",
        Value("PATH"),
        "tokenizer.json, or a directory that has one [default: the model's]",
    ),
    honoured("download-dir", Value("DIR"), "Cache to download into [default: the Hugging Face cache]"),
    honoured("hf-token", Value("TOKEN"), "Hugging Face token [default: HF_TOKEN, then the stored login]"),
    honoured(
        "dtype",
        Value("TYPE"),
        "auto, bfloat16 or float32; the CPU computes in float32 whichever is given",
    ),
    honoured(
        "quantization",
        Value("NAME"),
        "How the checkpoint is stored: mxfp4, nvfp4, mlx or dense, or vLLM's names; mxfp4 quantises experts that are not",
    ),
    honoured(
        "max-model-len",
        Value("TOKENS"),
        "Longest prompt plus answer: a number, 64k (x1000), 64K (x1024), auto or -1",
    ),
    only(
        "load-format",
        Value("FORMAT"),
        &["auto", "safetensors"],
        "weights are read from safetensors files only",
    ),
    only("config-format", Value("FORMAT"), &["auto", "hf"], "only Hugging Face configurations are read"),
    only("tokenizer-mode", Value("MODE"), &["auto", "hf", "slow"], "only tokenizer.json is read"),
    refused(
        "tokenizer-revision",
        Value("REV"),
        "the tokenizer comes with the model; use --tokenizer or --revision",
    ),
    no_op("trust-remote-code", Switch, "nothing remote is ever run"),
    refused("hf-overrides", Value("JSON"), "a checkpoint is run as its config.json says"),
    refused("skip-tokenizer-init", Switch, "every route needs the tokenizer"),
    // Device.
    honoured("device", Value("DEVICE"), "auto, cpu or cuda [default: auto]"),
    honoured(
        "cpu-precision",
        Value("KIND"),
        "Weight products: exact (float32) or int8 (faster) [default: exact]",
    ),
    honoured(
        "activation-quant",
        Value("KIND"),
        "Inputs of NVFP4 products: none, or nvfp4 as the checkpoint was calibrated for [default: none]",
    ),
    honoured("threads", Value("N"), "Compute threads [default: all cores]"),
    no_op("attention-backend", Value("NAME"), "there is one attention implementation per device"),
    no_op("moe-backend", Value("NAME"), "there is one expert implementation per device"),
    no_op("linear-backend", Value("NAME"), "there is one matrix-product implementation per device"),
    no_op("compilation-config", Value("JSON"), "nothing is compiled at start"),
    no_op("optimization-level", Value("N"), "nothing is compiled at start"),
    no_op("cudagraph-capture-sizes", List("N"), NO_GPU),
    no_op("max-cudagraph-capture-size", Value("N"), NO_GPU),
    no_op("max-seq-len-to-capture", Value("N"), NO_GPU),
    honoured(
        "enforce-eager",
        Switch,
        "Launch every kernel by itself instead of recording decode steps as CUDA graphs",
    ),
    honoured(
        "skip-self-test",
        Switch,
        "Start without checking the GPU's kernels against their definitions [default: off]",
    ),
    no_op("async-scheduling", Switch, "scheduling is never the bottleneck here"),
    no_op("disable-custom-all-reduce", Switch, ONE_DEVICE),
    only("tensor-parallel-size", Value("N"), &["1"], ONE_DEVICE),
    only("pipeline-parallel-size", Value("N"), &["1"], ONE_DEVICE),
    only("data-parallel-size", Value("N"), &["1"], ONE_DEVICE),
    only("decode-context-parallel-size", Value("N"), &["1"], ONE_DEVICE),
    only("prefill-context-parallel-size", Value("N"), &["1"], ONE_DEVICE),
    only("distributed-executor-backend", Value("NAME"), &["uni", "mp"], ONE_DEVICE),
    refused("enable-expert-parallel", Switch, ONE_DEVICE),
    only("cpu-offload-gb", Value("GIB"), &["0"], "weights live on the device that computes with them"),
    only("swap-space", Value("GIB"), &["0", "4"], "KV pages are never swapped"),
    // Memory.
    honoured(
        "gpu-memory-utilization",
        Value("FRACTION"),
        "Share of the GPU's memory that weights, KV cache and workspace may take [default: 0.9]; the CPU ignores it",
    ),
    honoured(
        "kv-cache-memory-bytes",
        Value("BYTES"),
        "Size of the KV cache, e.g. 2147483648, 2G (x1000) or 2GiB",
    ),
    honoured(
        "kv-cache-dtype",
        Value("TYPE"),
        "auto, float32, bfloat16 or fp8 [default: auto, float32 on the CPU and bfloat16 on a GPU]",
    ),
    honoured(
        "block-size",
        Value("TOKENS"),
        "Positions per KV page: 8, 16, 32, 64 or 128; GPUs take 16 and more [default: 16, on a GPU 64]",
    ),
    no_op("kv-cache-dtype-skip-layers", List("LAYER"), "all layers are stored alike"),
    no_op("calculate-kv-scales", Switch, "each token and head of an fp8 cache has its own scale"),
    refused("num-gpu-blocks-override", Value("N"), "size the KV cache with --kv-cache-memory-bytes"),
    honoured(
        "enable-prefix-caching",
        Switch,
        "Keep what was computed for prompts and answers, for prompts that begin alike [default: on]",
    ),
    no_op(
        "prefix-caching-hash-algo",
        Value("NAME"),
        "prefixes are found by a keyed hash and compared token by token",
    ),
    refused("enable-sleep-mode", Switch, "weights stay loaded"),
    refused("kv-transfer-config", Value("JSON"), NO_EVENTS),
    refused("kv-events-config", Value("JSON"), NO_EVENTS),
    // Scheduler.
    honoured("max-num-seqs", Value("N"), "Most sequences generating at once [default: 16, on a GPU 256]"),
    honoured("max-num-batched-tokens", Value("N"), "Most tokens of one step [default: 512 on the CPU]"),
    honoured("max-num-queued-reqs", Value("N"), "Most requests waiting before 429 [default: 256]"),
    honoured("max-num-queued-tokens", Value("N"), "Most prompt tokens waiting before 429 [default: 1000000]"),
    only(
        "enable-chunked-prefill",
        Switch,
        &["true"],
        "prefill is always chunked; --max-num-batched-tokens sets the size",
    ),
    only(
        "long-prefill-token-threshold",
        Value("N"),
        &["0"],
        "--max-num-batched-tokens bounds a prefill chunk",
    ),
    only("max-num-partial-prefills", Value("N"), &["1"], "prompts are prefilled in order of arrival"),
    only("max-long-partial-prefills", Value("N"), &["1"], "prompts are prefilled in order of arrival"),
    only("scheduling-policy", Value("POLICY"), &["fcfs"], "requests are served in order of arrival"),
    only("stream-interval", Value("N"), &["1"], "every token is sent as it is sampled"),
    refused("speculative-config", Value("JSON"), "speculation is not supported"),
    // The program.
    honoured("config", Value("FILE"), "TOML file of these flags without dashes; flags win"),
    honoured("log-format", Value("FORMAT"), "text or json, on standard error [default: text]"),
    honoured("log-level", Value("LEVEL"), "error, warn, info, debug or trace; RUST_LOG wins [default: info]"),
];

/// How it is served: flags of `serve` alone.
pub const SERVING: &[Flag] = &[
    // Requests.
    honoured("served-model-name", List("NAME"), "Names the API knows the model by [default: MODEL]"),
    honoured(
        "chat-format",
        Value("NAME"),
        "Chat protocol: harmony or hermes [default: what the model was trained on]",
    ),
    honoured(
        "generation-config",
        Value("SRC"),
        "Sampling defaults: auto (the model's own), vllm (neutral) or a directory",
    ),
    honoured(
        "override-generation-config",
        Value("JSON"),
        "Sampling defaults, e.g. {\"temperature\":1.0,\"top_p\":0.9}",
    ),
    only("task", Value("TASK"), &["auto", "generate"], "the server generates text, nothing else"),
    only("runner", Value("RUNNER"), &["auto", "generate"], "the server generates text, nothing else"),
    only("convert", Value("KIND"), &["auto", "none"], "the server generates text, nothing else"),
    no_op(
        "seed",
        Value("N"),
        "a request without a seed draws a fresh one; send seed in the request for a repeatable answer",
    ),
    // Chat.
    honoured("tool-call-parser", Value("NAME"), "openai (Harmony) or hermes; must fit --chat-format"),
    honoured(
        "reasoning-field",
        Value("NAME"),
        "Name of reasoning in chat answers: reasoning, reasoning_content or both [default: both]",
    ),
    honoured("enable-auto-tool-choice", Switch, "Let the model choose to call tools [default: on]"),
    honoured(
        "reasoning-parser",
        Value("NAME"),
        "openai_gptoss (Harmony) or qwen3 (hermes); must fit --chat-format",
    ),
    only(
        "exclude-tools-when-tool-choice-none",
        Switch,
        &["false"],
        "tools stay in the prompt when tool_choice is none",
    ),
    only(
        "tool-strict-level",
        Value("LEVEL"),
        &["auto"],
        "functions that are declared strict are held to their schema",
    ),
    honoured(
        "chat-template",
        Value("FILE"),
        "Jinja template of prompts, or the template itself; hermes has one, Harmony none [default: the model's]",
    ),
    no_op("chat-template-content-format", Value("KIND"), "templates always see content as text"),
    honoured(
        "default-chat-template-kwargs",
        Value("JSON"),
        "Arguments of the chat template where a request is silent: enable_thinking, reasoning_effort and what the template reads",
    ),
    refused("reasoning-effort-map", Value("JSON"), "every reasoning_effort has one documented meaning"),
    only("response-role", Value("ROLE"), &["assistant"], "answers are written by the assistant"),
    only(
        "logprobs-mode",
        Value("MODE"),
        &["raw_logprobs"],
        "log-probabilities are those before temperature and filters",
    ),
    refused("return-tokens-as-token-ids", Switch, "send return_token_ids in the request"),
    refused(
        "structured-outputs-config",
        Value("JSON"),
        "structured outputs have one implementation, without settings",
    ),
    only("guided-decoding-backend", Value("NAME"), &["auto", "guidance"], "grammars are llguidance's"),
    no_op("enable-prompt-tokens-details", Switch, "usage always has them"),
    only(
        "enable-force-include-usage",
        Switch,
        &["false"],
        "usage in a stream is sent when the request asks for it",
    ),
    // Server.
    honoured("host", Value("HOST"), "Address to listen on [default: 0.0.0.0, all interfaces]"),
    honoured("port", Value("PORT"), "Port to listen on; 0 picks a free one [default: 8000]"),
    honoured(
        "api-key",
        List("KEY"),
        "Keys that clients must present [default: VLLM_API_KEY or CTXSERVE_API_KEY]",
    ),
    honoured(
        "api-key-file",
        Value("FILE"),
        "More of them, one a line; other users cannot see them in the list of processes",
    ),
    honoured("metrics-without-key", Switch, "Leave /metrics open although there are keys [default: off]"),
    honoured(
        "shutdown-timeout",
        Value("SECONDS"),
        "How long a shutdown waits for answers in progress [default: 30]",
    ),
    refused("uds", Value("PATH"), "the server listens on TCP"),
    refused("root-path", Value("PATH"), "strip the prefix in the proxy that adds it"),
    refused("ssl-keyfile", Value("FILE"), NO_TLS),
    refused("ssl-certfile", Value("FILE"), NO_TLS),
    refused("ssl-ca-certs", Value("FILE"), NO_TLS),
    refused("ssl-cert-reqs", Value("N"), NO_TLS),
    refused("enable-ssl-refresh", Switch, NO_TLS),
    honoured(
        "allowed-origins",
        Value("JSON"),
        "Origins whose web pages may read answers, e.g. [\"https://app.example.com\"] or [\"*\"] [default: none]",
    ),
    honoured(
        "allowed-methods",
        Value("JSON"),
        "Methods that those pages may use [default: what the routes take]",
    ),
    honoured(
        "allowed-headers",
        Value("JSON"),
        "Headers that those pages may send [default: what they ask for]",
    ),
    honoured("allow-credentials", Switch, "Let those pages send cookies; not with * [default: off]"),
    honoured(
        "allowed-hosts",
        List("NAME"),
        "Names that the server is called by: others get 403 [default: any, on a loopback address localhost and HOST]",
    ),
    no_op("enable-request-id-headers", Switch, "every response has an X-Request-Id"),
    no_op("disable-log-stats", Switch, "statistics are at /metrics, not in the log"),
    no_op("enable-log-requests", Switch, "every request is one line of the log, without its text"),
    no_op(
        "disable-log-requests",
        Switch,
        "every request is one line of the log, without its text; RUST_LOG filters it",
    ),
    no_op("max-log-len", Value("N"), "prompts are never logged"),
    no_op("uvicorn-log-level", Value("LEVEL"), "use --log-level"),
    no_op("disable-uvicorn-access-log", Switch, "use RUST_LOG to filter the log"),
    no_op("disable-fastapi-docs", Switch, "there are no such pages"),
    refused("otlp-traces-endpoint", Value("URL"), "traces are not exported"),
    refused("enable-server-load-tracking", Switch, "read the load from /metrics"),
    only("sse-keep-alive-interval", Value("SECONDS"), &["10"], "a silent stream gets a comment every 10 s"),
    only("api-server-count", Value("N"), &["1"], "one process serves every request"),
    // Code, tensors and files from elsewhere.
    refused("tool-parser-plugin", Value("FILE"), NO_PYTHON),
    refused("reasoning-parser-plugin", Value("FILE"), NO_PYTHON),
    refused("middleware", List("NAME"), NO_PYTHON),
    refused("logits-processors", List("NAME"), NO_PYTHON),
    refused("worker-cls", Value("NAME"), NO_PYTHON),
    refused("enable-prompt-embeds", Switch, "tensors are never taken from a request"),
    refused("trust-request-chat-template", Switch, "a template is never taken from a request"),
    refused("allowed-local-media-path", Value("DIR"), "the models read text only"),
    no_op("limit-mm-per-prompt", Value("JSON"), "the models read text only"),
    refused("tool-server", Value("HOSTS"), "tools are run by the client"),
    // Adapters.
    refused("enable-lora", Switch, NO_LORA),
    refused("lora-modules", List("NAME=PATH"), NO_LORA),
    no_op("max-loras", Value("N"), NO_LORA),
    no_op("max-lora-rank", Value("N"), NO_LORA),
    no_op("max-cpu-loras", Value("N"), NO_LORA),
    no_op("lora-dtype", Value("TYPE"), NO_LORA),
];

/// Other spellings, dashes included on both sides.
pub const ALIASES: &[(&str, &str)] = &[
    ("-tp", "--tensor-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-dp", "--data-parallel-size"),
    ("-q", "--quantization"),
    ("-sc", "--speculative-config"),
    ("-cc", "--compilation-config"),
    ("-asc", "--api-server-count"),
    ("--device-memory-utilization", "--gpu-memory-utilization"),
    ("--scheduler-policy", "--scheduling-policy"),
    ("--h11-max-header-count", "--max-headers"),
    ("--h11-max-incomplete-event-size", "--max-header-bytes"),
];

/// Flags of other servers, and what they are called here.
pub const FOREIGN: &[(&str, &str, &str)] = &[
    ("mem-fraction-static", "SGLang", "gpu-memory-utilization"),
    ("context-length", "SGLang", "max-model-len"),
    ("max-running-requests", "SGLang", "max-num-seqs"),
    ("chunked-prefill-size", "SGLang", "max-num-batched-tokens"),
    ("max-queued-requests", "SGLang", "max-num-queued-reqs"),
    ("model-path", "SGLang", "model"),
    ("tp", "SGLang", "tensor-parallel-size"),
    ("max-batch-size", "TensorRT-LLM", "max-num-seqs"),
    ("max-num-tokens", "TensorRT-LLM", "max-num-batched-tokens"),
    ("max-seq-len", "TensorRT-LLM", "max-model-len"),
    ("tp-size", "TensorRT-LLM or SGLang", "tensor-parallel-size"),
    ("ctx-size", "llama-server", "max-model-len"),
    ("n-gpu-layers", "llama-server", "device"),
    ("parallel", "llama-server", "max-num-seqs"),
    ("alias", "llama-server", "served-model-name"),
    ("cache-type-k", "llama-server", "kv-cache-dtype"),
];

/// Every flag of `serve`.
pub fn flags() -> impl Iterator<Item = &'static Flag> {
    RUNNING.iter().chain(SERVING).chain(&limits::FLAGS)
}

/// The row of `name`, which is without dashes in front and joined by `-`.
pub fn find(name: &str) -> Option<&'static Flag> {
    flags().find(|flag| flag.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_well_spelled() {
        let mut names: Vec<_> = flags().map(|flag| flag.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        for name in names {
            assert!(
                name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
                "{name}"
            );
        }
    }

    #[test]
    fn every_reason_and_help_is_a_sentence_without_a_stop() {
        for flag in flags() {
            let text = match flag.treatment {
                Treatment::Honoured => flag.help,
                Treatment::NoOp(why) | Treatment::Only(_, why) | Treatment::Refused(why) => why,
            };
            assert!(!text.is_empty() && !text.ends_with('.'), "{}: {text}", flag.name);
        }
    }

    #[test]
    fn aliases_and_hints_lead_to_flags() {
        for (_, to) in ALIASES {
            assert!(find(to.trim_start_matches('-')).is_some(), "{to}");
        }
        for (from, _, to) in FOREIGN {
            assert!(find(to).is_some(), "{to}");
            assert!(find(from).is_none(), "{from} is ours too");
        }
    }
}
