use std::path::Path;

use ctxserve_checkpoint::Checkpoint;
use ctxserve_core::{Event, GenerateRequest, RequestId, SamplingParams, StopRules, TokenId};
use ctxserve_cpu::{CpuBackend, CpuOptions};
use ctxserve_engine::{Engine, EngineConfig, EngineHandle, EventStream, ModelRunner};
use ctxserve_models::demo::{self, DemoSpec};
use ctxserve_models::{LoadOptions, load};

pub(crate) fn engine(checkpoint: &Checkpoint, page_size: usize, config: EngineConfig) -> EngineHandle {
    let mut backend = CpuBackend::new(CpuOptions::default()).unwrap();
    let options = LoadOptions { page_size, ..LoadOptions::default() };
    let model = load(checkpoint, &mut backend, &options, &mut |_| ()).unwrap();
    Engine::start(Box::new(ModelRunner::new(backend, model)), config).unwrap()
}

pub(crate) fn request(prompt: &[TokenId], max_tokens: usize, sampling: SamplingParams) -> GenerateRequest {
    let stop = StopRules::default();
    GenerateRequest {
        id: RequestId(0),
        prompt: prompt.into(),
        sampling,
        stop,
        max_tokens,
        guide: None,
        salt: None,
    }
}

fn tokens(mut stream: EventStream) -> Vec<TokenId> {
    let mut tokens = Vec::new();
    while let Some(event) = stream.blocking_next() {
        if let Event::Token(token) = event {
            tokens.push(token.id);
        }
    }
    tokens
}

/// Every golden case of a checkpoint, all at once in small chunks and again with pages for little more than one:
/// greedy ids are those of transformers.
fn golden(name: &str) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(name);
    let checkpoint = Checkpoint::open(&directory).unwrap();
    let expected = std::fs::read_to_string(directory.join("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
    let ids = |case: &serde_json::Value, field: &str| -> Vec<TokenId> {
        let list = case[field].as_array().unwrap().iter();
        list.map(|id| id.as_u64().unwrap().try_into().unwrap()).collect()
    };
    let cases = expected["cases"].as_array().unwrap();
    let longest = cases.iter().map(|case| ids(case, "prompt").len()).max().unwrap() + 64;
    for (page_size, chunk, kv_bytes) in [(16, 48, None), (8, 100, Some(()))] {
        let base = EngineConfig { max_batched_tokens: chunk, max_num_seqs: 8, ..EngineConfig::default() };
        let config = EngineConfig { max_model_len: Some(longest), kv_bytes: None, ..base };
        let config = match kv_bytes {
            None => config,
            // As much as one sequence needs: refused with one byte less.
            Some(()) => {
                EngineConfig { kv_bytes: Some(least_bytes(&checkpoint, page_size, &config)), ..config }
            }
        };
        let engine = engine(&checkpoint, page_size, config);
        let greedy = |case| request(&ids(case, "prompt"), 40, SamplingParams::greedy());
        // The second time from what the first has left in the prefix cache.
        for turn in 0..2 {
            let streams = engine.submit_all(cases.iter().map(greedy).collect()).unwrap();
            for (index, (case, stream)) in cases.iter().zip(streams).enumerate() {
                let what = format!("{name}, case {index}, pages of {page_size}, turn {turn}");
                assert_eq!(tokens(stream), ids(case, "greedy"), "{what}");
            }
        }
    }
}

/// The smallest KV budget that holds one sequence, from the engine's own refusal.
fn least_bytes(checkpoint: &Checkpoint, page_size: usize, config: &EngineConfig) -> usize {
    let mut backend = CpuBackend::new(CpuOptions::default()).unwrap();
    let options = LoadOptions { page_size, ..LoadOptions::default() };
    let model = load(checkpoint, &mut backend, &options, &mut |_| ()).unwrap();
    let config = EngineConfig { kv_bytes: Some(1), ..config.clone() };
    match Engine::start(Box::new(ModelRunner::new(backend, model)), config) {
        Err(ctxserve_engine::EngineError::KvTooSmall { needed, .. }) => needed,
        other => panic!("one byte was enough: {other:?}"),
    }
}

#[test]
fn transformers_greedy_ids_mxfp4() {
    golden("mxfp4");
}

#[test]
fn transformers_greedy_ids_sliding_layers_only() {
    golden("unusual");
}

#[test]
fn transformers_greedy_ids_full_layers_only() {
    golden("truncated");
}

/// OPS-27: greedy and seeded answers, alone and among sixteen others, with room and under page pressure.
#[test]
fn answers_do_not_depend_on_neighbours() {
    let spec = DemoSpec { seed: 7, vocab_size: 600, ..DemoSpec::default() };
    let checkpoint = demo::checkpoint(&spec).unwrap();
    let requests: Vec<_> = (0..17)
        .map(|i: u32| {
            let prompt: Vec<_> = (0..1 + 14 * i).map(|at| (at * at + 31 * i + 5) % 600).collect();
            let seeded = SamplingParams {
                seed: Some(u64::from(i)),
                top_p: 0.95,
                presence_penalty: 0.3,
                ..SamplingParams::default()
            };
            request(&prompt, 24, if i % 3 == 2 { seeded } else { SamplingParams::greedy() })
        })
        .collect();
    let roomy = EngineConfig { max_model_len: Some(320), max_num_seqs: 17, ..EngineConfig::default() };
    let alone = engine(&checkpoint, 16, roomy.clone());
    let alone: Vec<_> = requests.iter().map(|r| tokens(alone.submit(r.clone()).unwrap())).collect();
    assert!(alone.iter().all(|tokens| tokens.len() == 24));
    assert!(alone.windows(2).any(|pair| pair[0] != pair[1]), "the model answers everything alike");

    let tight = EngineConfig { max_batched_tokens: 37, ..roomy.clone() };
    let tight = EngineConfig { kv_bytes: Some(2 * least_bytes(&checkpoint, 4, &tight)), ..tight };
    let chunked = EngineConfig { max_batched_tokens: 29, ..roomy.clone() };
    for (page_size, config) in [(16, roomy), (16, chunked), (4, tight)] {
        let engine = engine(&checkpoint, page_size, config);
        let streams = engine.submit_all(requests.clone()).unwrap();
        let together: Vec<_> = streams.into_iter().map(tokens).collect();
        assert_eq!(together, alone, "pages of {page_size}, {:?}", engine.snapshot());
        assert_eq!(engine.snapshot().preemptions > 0, page_size == 4, "only the tight cache preempts");
    }
}
