use super::*;

fn serve(line: &str) -> Values {
    let args = std::iter::once("ctxserve").chain(line.split_whitespace()).map(str::to_owned);
    match parse(args).unwrap() {
        Invocation::Serve(values) => values,
        other => panic!("not serve: {other:?}"),
    }
}

fn fails(line: &str) -> String {
    let args = std::iter::once("ctxserve").chain(line.split_whitespace()).map(str::to_owned);
    parse(args).unwrap_err().to_string()
}

#[test]
fn clap_accepts_the_table() {
    command().debug_assert();
}

#[test]
fn serve_is_the_default_and_the_model_may_be_positional() {
    for line in [
        "--model X --port 9",
        "serve X --port 9",
        "X --port=9",
        "serve --port 9 --model=X",
        "serve --port 9 X",
    ] {
        let values = serve(line);
        assert_eq!((values.text("model"), values.text("port")), (Some("X"), Some("9")), "{line}");
    }
    assert!(serve("").text("model").is_none());
}

#[test]
fn the_model_cards_command_lines_pass_the_table() {
    let context_1 = serve(
        "serve evilfreelancer/context-1-mxfp4 --served-model-name evilfreelancer/context-1-mxfp4 --trust-remote-code \
         --dtype auto --gpu-memory-utilization 0.9 --max-model-len 64000 --max-num-batched-tokens 64000 \
         --kv-cache-dtype fp8 --enable-auto-tool-choice --tool-call-parser openai",
    );
    let notes = context_1.check().unwrap();
    assert!(notes.iter().any(|note| note.contains("--trust-remote-code")), "{notes:?}");
    assert_eq!(context_1.text("gpu-memory-utilization"), Some("0.9"));
    assert_eq!(context_1.text("max-model-len"), Some("64000"));
    assert_eq!(context_1.list("served-model-name"), ["evilfreelancer/context-1-mxfp4"]);

    let fast_context = serve(
        "serve r0b0tlab/FastContext-1.0-4B-RL-NVFP4 --quantization modelopt --tensor-parallel-size 1 \
         --trust-remote-code --dtype auto --kv-cache-dtype fp8 --attention-backend flashinfer \
         --gpu-memory-utilization 0.40 --max-model-len 131072 --max-num-seqs 16 --enable-chunked-prefill \
         --enable-auto-tool-choice --tool-call-parser hermes --port 30000",
    );
    assert!(fast_context.check().is_ok());
    assert_eq!(fast_context.text("quantization"), Some("modelopt"));
}

#[test]
fn spellings_of_vllm() {
    assert_eq!(serve("--max_model_len=-1").text("max-model-len"), Some("-1"));
    assert_eq!(serve("--max-model-len -1").text("max-model-len"), Some("-1"));
    assert_eq!(
        serve("--served-model-name a b --served_model_name c").list("served-model-name"),
        ["a", "b", "c"]
    );
    assert_eq!(serve("-tp 1").text("tensor-parallel-size"), Some("1"));
    assert_eq!(serve("--disable-auto-tool-choice").switch("enable-auto-tool-choice").unwrap(), Some(false));
    assert_eq!(serve("--port 1 --port 2").text("port"), Some("2"));
}

#[test]
fn unknown_flags_are_errors_with_a_hint() {
    let error = fails("--max-modle-len 5");
    assert!(error.contains("--max-modle-len") && error.contains("--max-model-len"), "{error}");
    let error = fails("--mem_fraction_static 0.8");
    assert!(error.contains("SGLang") && error.contains("--gpu-memory-utilization"), "{error}");
}

#[test]
fn the_model_is_given_once() {
    assert!(fails("X --model Y").contains("cannot be used with"));
}

#[test]
fn tools_read_a_file_or_standard_input() {
    let tool = |line: &str| {
        let args = std::iter::once("ctxserve").chain(line.split_whitespace()).map(str::to_owned);
        match parse(args).unwrap() {
            Invocation::Render(args) | Invocation::Parse(args) => args,
            other => panic!("{other:?}"),
        }
    };
    let args = tool("parse lines.jsonl --format harmony --model dir");
    assert_eq!((args.input, args.model.as_deref()), (Some("lines.jsonl".into()), Some("dir")));
    assert_eq!(tool("render").format, None);
    let args = tool("render --chat-format hermes --chat-template t.jinja");
    assert_eq!((args.format.as_deref(), args.template.as_deref()), (Some("hermes"), Some("t.jinja")));
    assert_eq!(tool("parse -").input, None);
    assert_eq!(tool("render --input a.json").input, Some("a.json".into()));
}

#[test]
fn bench_takes_the_flags_that_run_a_model_and_its_own() {
    let bench = |line: &str| {
        let args = ["ctxserve", "bench"].into_iter().chain(line.split_whitespace()).map(str::to_owned);
        parse(args).map(|invocation| match invocation {
            Invocation::Bench { running, measured } => (running, measured),
            other => panic!("{other:?}"),
        })
    };
    let (running, measured) =
        bench("X --max_model_len 4k --batch 1,2 --http --seed 7 --trust-remote-code").unwrap();
    assert_eq!((running.text("model"), running.text("max-model-len")), (Some("X"), Some("4k")));
    assert_eq!((measured.text("batch"), measured.text("seed")), (Some("1,2"), Some("7")));
    assert_eq!(measured.switch("http").unwrap(), Some(true));
    assert!(running.get("seed").is_none() && measured.get("model").is_none());
    assert_eq!(running.check().unwrap().len(), 1);
    for line in ["--port 1", "--api-key k", "--served-model-name n"] {
        assert!(bench(line).is_err(), "{line}");
    }
    assert!(bench("--context-length 5").unwrap_err().to_string().contains("SGLang"));
}
