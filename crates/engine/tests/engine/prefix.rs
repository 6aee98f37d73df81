//! The prefix cache over a real model on the CPU.

use ctxserve_checkpoint::Checkpoint;
use ctxserve_core::{Event, SamplingParams, TokenId, TokenLogprobs, Usage};
use ctxserve_engine::{EngineConfig, EngineHandle, EventStream};
use ctxserve_models::demo::{self, DemoSpec};

use crate::model::{engine, request};

const VOCAB: u32 = 600;

/// Two layers, one of which sees a window.
fn checkpoint() -> Checkpoint {
    demo::checkpoint(&DemoSpec { seed: 11, vocab_size: VOCAB as usize, ..DemoSpec::default() }).unwrap()
}

fn prompt(seed: u32, length: u32) -> Vec<TokenId> {
    (0..length).map(|at| (at * at * 7 + at * seed + 31 * seed + 5) % VOCAB).collect()
}

#[derive(Debug, PartialEq)]
struct Answer {
    tokens: Vec<TokenId>,
    logprobs: Vec<TokenLogprobs>,
}

fn read(mut stream: EventStream) -> (Answer, Usage) {
    let (mut tokens, mut logprobs, mut end) = (Vec::new(), Vec::new(), None);
    while let Some(event) = stream.blocking_next() {
        match event {
            Event::Token(token) => {
                tokens.push(token.id);
                logprobs.extend(token.logprobs.map(|boxed| *boxed));
            }
            Event::Finished { usage, .. } => end = Some(usage),
            Event::Admitted => {}
        }
    }
    (Answer { tokens, logprobs }, end.unwrap())
}

fn ask(engine: &EngineHandle, prompt: &[TokenId], count: usize) -> (Answer, Usage) {
    let sampling = SamplingParams { logprobs: Some(8), ..SamplingParams::greedy() };
    read(engine.submit(request(prompt, count, sampling)).unwrap())
}

fn config(prefix_caching: bool) -> EngineConfig {
    let base = EngineConfig { max_model_len: Some(4096), max_num_seqs: 8, ..EngineConfig::default() };
    EngineConfig { prefix_caching, max_batched_tokens: 200, ..base }
}

/// OPS-11: after a hit, log-probabilities are those of a cold run, to the last bit: a repeated prompt, one that goes on
/// from an answer, one that parts from another anywhere, and one of whole pages.
#[test]
fn logits_after_a_hit_are_those_of_a_cold_run() {
    let checkpoint = checkpoint();
    let (warm, cold) = (engine(&checkpoint, 16, config(true)), engine(&checkpoint, 16, config(false)));
    let base = prompt(3, 700);
    let (answer, usage) = ask(&warm, &base, 40);
    assert_eq!((usage.cached, &answer), (0, &ask(&cold, &base, 40).0));
    assert_eq!(answer.logprobs.len(), 40);

    let turn: Vec<_> = base.iter().chain(&answer.tokens).copied().chain(prompt(9, 50)).collect();
    let parts = |at: usize| base[..at].iter().copied().chain(prompt(17, 90)).collect::<Vec<_>>();
    // Of a prompt the last token is computed always; of a branch the window is kept the second time.
    let cases = [
        (base.clone(), 688),
        (turn, 736),
        (base[..656].to_vec(), 0),
        (base[..656].to_vec(), 640),
        (parts(333), 0),
        (parts(333), 416),
        (parts(336)[..400].to_vec(), 320),
    ];
    for (index, (prompt, cached)) in cases.into_iter().enumerate() {
        let (answer, usage) = ask(&warm, &prompt, 10);
        let (reference, unknown) = ask(&cold, &prompt, 10);
        assert_eq!(answer, reference, "case {index}");
        assert_eq!((usage.cached, unknown.cached), (cached, 0), "case {index}");
    }
}

/// OPS-10: eight sessions that take turns, each with its whole history, in a cache that they fill by half: of what they
/// send again at least 95 % is found, and every answer is that of a cold run.
#[test]
fn sessions_that_take_turns_find_their_history() {
    let (checkpoint, page_size) = (checkpoint(), 16);
    let cold = engine(&checkpoint, page_size, config(false));
    let mut histories: Vec<_> = (0..8).map(|session| prompt(session + 2, 500 + 40 * session)).collect();
    // What they hold at the end fills half of the full-attention pool.
    let (turns, new, answer) = (6, 60, 24);
    let tokens: usize = histories.iter().map(|history| history.len() + turns * (new + answer)).sum();
    let probe = engine(&checkpoint, page_size, config(true));
    let full = probe.info().kv.groups.iter().find(|group| group.window.is_none()).unwrap().clone();
    let windowed = probe.info().kv.groups.iter().find(|group| group.window.is_some()).unwrap().clone();
    let needed = 2 * tokens * full.bytes / (full.pages * page_size);
    // As much as one session has of windows for each, which is what the engine itself sets aside or less.
    let budget = needed + needed / 7 + 9 * 2 * (windowed.bytes / windowed.pages) * 10;
    let warm = engine(&checkpoint, page_size, EngineConfig { kv_bytes: Some(budget), ..config(true) });
    let pool = warm.info().kv.tokens.unwrap();
    println!("{}", warm.info().kv);
    assert!((tokens * 19 / 10..tokens * 5 / 2).contains(&pool), "{tokens} tokens in a pool of {pool}");

    let (mut sent, mut found) = (0, 0);
    for turn in 0..turns {
        let streams: Vec<_> = histories
            .iter()
            .map(|history| warm.submit(request(history, answer, SamplingParams::greedy())).unwrap())
            .collect();
        for (session, stream) in streams.into_iter().enumerate() {
            let (answer, usage) = read(stream);
            let history = &mut histories[session];
            if turn > 0 {
                sent += history.len() - new;
                found += usage.cached;
            }
            if session % 4 == 0 {
                let reference = cold.submit(request(history, 24, SamplingParams::greedy())).unwrap();
                assert_eq!(answer.tokens, read(reference).0.tokens, "session {session}, turn {turn}");
            }
            history.extend(&answer.tokens);
            history.extend(prompt(100 + turn as u32 * 8 + session as u32, new as u32));
        }
    }
    assert!(found * 100 >= sent * 95, "{found} of {sent} tokens that were sent again");
    println!("{found} of {sent} tokens that were sent again were found");
}
