use std::time::Duration;

use ctxserve_core::TokenId;

use super::*;
use crate::ScriptedRunner;
use crate::testing::{
    Answer, EOS, Gate, GatedRunner, PagedEchoRunner, Twist, VOCAB, assert_idle, expected, request, spec,
    until,
};

mod faults;
mod guided;
mod pipeline;

const CONTEXT: usize = 96;

fn config() -> EngineConfig {
    EngineConfig { max_num_seqs: 4, max_batched_tokens: 16, ..EngineConfig::default() }
}

fn echo() -> PagedEchoRunner {
    deep_echo(1)
}

/// One that takes `depth` steps before the oldest is collected.
fn deep_echo(depth: usize) -> PagedEchoRunner {
    PagedEchoRunner::new(spec(4, Some(10)), CONTEXT, depth)
}

fn gated(config: EngineConfig, twist: Option<Twist>) -> (Gate, EngineHandle) {
    gated_at(1, config, twist)
}

fn gated_at(depth: usize, config: EngineConfig, twist: Option<Twist>) -> (Gate, EngineHandle) {
    let (gate, runner) = GatedRunner::gated(deep_echo(depth), twist);
    (gate, Engine::start(runner, config).unwrap())
}

/// A request that never meets its end-of-turn id.
fn long(id: u64, max_tokens: usize) -> GenerateRequest {
    let mut request = request(id, &[1, 2, 3], max_tokens);
    request.stop.ignore_eos = true;
    request
}

fn prompt(seed: usize, len: usize) -> Vec<TokenId> {
    (0..len).map(|at| ((seed * 17 + at * at + 3) % VOCAB) as TokenId).collect()
}

#[test]
fn answers_alone_and_among_sixteen_others_are_equal() {
    let config = EngineConfig { max_num_seqs: 17, max_batched_tokens: 24, ..EngineConfig::default() };
    let engine = Engine::start(Box::new(echo()), config).unwrap();
    let requests: Vec<_> = (0..17).map(|i| request(i as u64, &prompt(i, 1 + 4 * i), 25)).collect();
    let alone: Vec<_> = requests.iter().map(|r| Answer::of(engine.submit(r.clone()).unwrap())).collect();
    let together = engine.submit_all(requests.clone()).unwrap().into_iter().map(Answer::of);
    let together: Vec<_> = together.map(Answer::plain).collect();
    assert_eq!(alone, together);
    for (request, answer) in requests.iter().zip(&alone) {
        assert_eq!(answer, &expected(&spec(4, Some(10)), request, CONTEXT));
    }
    assert_idle(&engine);
}

#[test]
fn a_tight_cache_preempts_and_still_answers_all() {
    let one = spec(4, Some(10)).page_bytes(1) * CONTEXT.div_ceil(4);
    let config = EngineConfig { kv_bytes: Some(one * 2), max_model_len: Some(CONTEXT), ..config() };
    let engine = Engine::start(Box::new(echo()), config).unwrap();
    let mut requests: Vec<_> = (0..12).map(|i| long(i, 80)).collect();
    requests.iter_mut().zip(0..).for_each(|(request, seed)| request.prompt = prompt(seed, 3).into());
    for stream in engine.submit_all(requests.clone()).unwrap() {
        assert_eq!(Answer::of(stream).tokens.len(), 80);
    }
    assert!(engine.snapshot().preemptions > 0, "{:?}", engine.snapshot());
    assert_idle(&engine);
}

/// OPS-13.
#[test]
fn a_dropped_stream_is_gone_from_the_next_step() {
    let (gate, engine) = gated(config(), None);
    let leaving = engine.submit(long(0, 80)).unwrap();
    let mut staying = engine.submit(long(1, 80)).unwrap();
    gate.permit(3);
    gate.wait_for_steps(4);
    drop(leaving);
    gate.permit(1);
    gate.wait_for_steps(5);
    let log = gate.log();
    assert!(log[3].contains_key(&0), "under way when it was dropped");
    assert_eq!(log[4].keys().collect::<Vec<_>>(), [&1]);
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.running, snapshot.aborted), (1, 1));
    let tokens = 3 + log.iter().filter(|rows| rows.contains_key(&1)).count() - 1;
    assert!(snapshot.used_pages[1] <= tokens.div_ceil(4), "its pages are still held: {snapshot:?}");
    assert_eq!(staying.blocking_next(), Some(Event::Admitted));
    drop(gate);
    drop(staying);
    assert_idle(&engine);
}

#[test]
fn a_waiting_sequence_can_be_cancelled() {
    let (gate, engine) = gated(EngineConfig { max_num_seqs: 1, ..config() }, None);
    let first = engine.submit(long(0, 5)).unwrap();
    gate.wait_for_steps(1);
    let second = engine.submit(long(1, 5)).unwrap();
    let third = engine.submit(long(2, 5)).unwrap();
    assert_eq!(engine.snapshot().waiting, 2);
    drop(second);
    gate.permit(20);
    assert_eq!(Answer::of(first).tokens.len(), 5);
    assert_eq!(Answer::of(third).tokens.len(), 5);
    assert!(gate.log().iter().all(|rows| !rows.contains_key(&1)));
    assert_idle(&engine);
}

/// OPS-14.
#[test]
fn ten_thousand_aborts_leak_nothing() {
    // Far longer than any of them is let to live.
    let script = ScriptedRunner::new(VOCAB, 1 << 20, vec![vec![1; 1 << 20]]);
    let engine = Engine::start(Box::new(script), EngineConfig::default()).unwrap();
    for round in 0..100 {
        let requests = (0..100).map(|i| request(i, &prompt(round, 1 + (i as usize * round) % 900), 1 << 20));
        let mut streams = loop {
            match engine.submit_all(requests.clone().collect()) {
                Ok(streams) => break streams,
                Err(SubmitError::QueueFull { .. }) => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        };
        // Some are dropped in the queue, some in prefill, some in decode.
        let (stream, tokens) = (&mut streams[round % 5], round % 4);
        assert_eq!(stream.blocking_next(), Some(Event::Admitted));
        (0..tokens).for_each(|_| assert!(matches!(stream.blocking_next(), Some(Event::Token(_)))));
    }
    assert_idle(&engine);
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.finished, snapshot.aborted), (0, 10_000), "{snapshot:?}");
}

/// OPS-16.
#[test]
fn the_queue_is_bounded_by_requests() {
    let (gate, engine) = gated(EngineConfig { max_num_seqs: 2, max_queued_requests: 3, ..config() }, None);
    let mut streams = engine.submit_all((0..3).map(|i| long(i, 2)).collect()).unwrap();
    let full = engine.submit_all((0..3).map(|i| long(i, 2)).collect()).unwrap_err();
    let SubmitError::QueueFull { retry_after, queued: 3, limit: 5, .. } = full else { panic!("{full:?}") };
    assert!(retry_after >= Duration::from_secs(1) && retry_after.subsec_nanos() == 0);
    assert_eq!(engine.snapshot().running + engine.snapshot().waiting, 3, "a refused batch leaves nothing");
    streams.extend(engine.submit_all((0..2).map(|i| long(i, 2)).collect()).unwrap());
    assert!(matches!(engine.submit(long(9, 2)), Err(SubmitError::QueueFull { queued: 5, .. })));
    assert_eq!(
        engine.submit_all((0..6).map(|i| long(i, 2)).collect()).unwrap_err(),
        SubmitError::TooMany { count: 6, limit: 5 }
    );
    drop(gate);
    streams.into_iter().for_each(|stream| assert_eq!(Answer::of(stream).tokens.len(), 2));
    assert_eq!(Answer::of(engine.submit(long(9, 2)).unwrap()).tokens.len(), 2);
    assert_idle(&engine);
}

/// OPS-16.
#[test]
fn the_queue_is_bounded_by_prompt_tokens() {
    let (gate, engine) = gated(EngineConfig { max_num_seqs: 1, max_queued_tokens: 40, ..config() }, None);
    // Longer than the cap, but the queue is empty.
    let first = engine.submit(request(0, &prompt(0, 60), 1)).unwrap();
    gate.wait_for_steps(1);
    let second = engine.submit(request(1, &prompt(1, 30), 1)).unwrap();
    let full = engine.submit(request(2, &prompt(2, 11), 1)).unwrap_err();
    assert!(
        matches!(full, SubmitError::QueueFull { queued: 30, limit: 40, unit: "prompt tokens", .. }),
        "{full:?}"
    );
    assert_eq!(engine.snapshot().waiting_tokens, 30);
    let third = engine.submit(request(2, &prompt(2, 10), 1)).unwrap();
    drop(gate);
    [first, second, third].into_iter().for_each(|stream| assert_eq!(Answer::of(stream).tokens.len(), 1));
    assert_idle(&engine);
}

#[test]
fn impossible_requests_are_refused_or_clamped() {
    let engine = Engine::start(Box::new(echo()), config()).unwrap();
    let max = engine.info().max_model_len;
    assert_eq!(max, CONTEXT);
    assert_eq!(engine.submit(request(0, &[], 1)).unwrap_err(), SubmitError::Empty);
    for prompt_len in [max, max + 1] {
        let refused = engine.submit(request(0, &prompt(0, prompt_len), 1)).unwrap_err();
        assert_eq!(refused, SubmitError::TooLong { prompt: prompt_len, max });
    }
    let (id, vocab) = (VOCAB as TokenId, VOCAB);
    let outside = Err(SubmitError::TokenOutOfRange { id, vocab });
    assert_eq!(engine.submit(request(0, &[1, id], 1)).map(|_| ()), outside);
    let mut biased = request(0, &[1], 1);
    biased.sampling.logit_bias = vec![(id, 1.0)];
    assert_eq!(engine.submit(biased).map(|_| ()), outside);

    for limit in [0, 1, 2, max, usize::MAX] {
        for least in [0, 1, max, usize::MAX] {
            for prompt_len in [1, max - 1] {
                let mut odd = request(0, &prompt(3, prompt_len), limit);
                odd.sampling.min_tokens = least;
                // Stop ids outside the vocabulary can never be sampled and harm nothing.
                odd.stop.token_ids = vec![TokenId::MAX, id];
                let answer = Answer::of(engine.submit(odd.clone()).unwrap()).plain();
                let mut known = odd;
                known.stop.token_ids.clear();
                let want = expected(&spec(4, Some(10)), &known, max);
                assert_eq!((&answer.tokens, &answer.end), (&want.tokens, &want.end));
            }
        }
    }
    assert_eq!(engine.submit_all(Vec::new()).unwrap().len(), 0);
    assert_idle(&engine);
}

#[test]
fn stop_rules_and_min_tokens() {
    let lines = vec![vec![5, EOS, 7, 9, 11]];
    let script = ScriptedRunner::new(VOCAB, 64, lines);
    let engine = Engine::start(Box::new(script), config()).unwrap();
    let run = |edit: &dyn Fn(&mut GenerateRequest)| {
        let mut request = request(0, &[1], 50);
        edit(&mut request);
        let answer = Answer::of(engine.submit(request).unwrap());
        (answer.tokens.clone(), answer.reason().clone())
    };
    let stop = |cause| FinishReason::Stop(cause);
    use ctxserve_core::StopCause::{Eos, TokenId as Listed};
    assert_eq!(run(&|_| {}), (vec![5, EOS], stop(Eos(EOS))));
    assert_eq!(run(&|r| r.stop.token_ids = vec![5]), (vec![5], stop(Listed(5))));
    assert_eq!(run(&|r| r.stop.token_ids = vec![EOS]), (vec![5, EOS], stop(Eos(EOS))));
    assert_eq!(run(&|r| r.stop.ignore_eos = true), (vec![5, EOS, 7, 9, 11], FinishReason::Length));
    let both = run(&|r| (r.stop.ignore_eos, r.stop.token_ids) = (true, vec![9]));
    assert_eq!(both, (vec![5, EOS, 7, 9], stop(Listed(9))));
    let early = run(&|r| (r.sampling.min_tokens, r.stop.token_ids) = (3, vec![9]));
    assert_eq!(early, (vec![5, EOS, 7, 9], stop(Listed(9))));
    assert_eq!(run(&|r| r.max_tokens = 1), (vec![5], FinishReason::Length));
}

#[test]
fn a_script_answers_by_line_and_reports_logprobs() {
    let script = ScriptedRunner::new(VOCAB, 64, vec![vec![1], vec![2, 3], vec![]]);
    let engine = Engine::start(Box::new(script), config()).unwrap();
    let streams = engine.submit_all((0..4).map(|i| request(i, &[9], 10)).collect()).unwrap();
    let said: Vec<_> = streams.into_iter().map(|stream| Answer::of(stream).tokens).collect();
    assert_eq!(said, [vec![1], vec![2, 3], vec![], vec![1]]);
    let mut asked = request(0, &[9], 1);
    asked.sampling.logprobs = Some(3);
    let mut stream = engine.submit(asked).unwrap();
    assert_eq!(stream.blocking_next(), Some(Event::Admitted));
    let Some(Event::Token(token)) = stream.blocking_next() else { panic!("no token") };
    let logprobs = token.logprobs.unwrap();
    assert_eq!((logprobs.sampled.id, logprobs.sampled.logprob, logprobs.top.len()), (2, 0.0, 1));
}

#[tokio::test]
async fn draining_finishes_what_runs_and_refuses_the_rest() {
    let (gate, engine) = gated(EngineConfig { max_num_seqs: 1, ..config() }, None);
    let streams = engine.submit_all(vec![long(0, 4), long(1, 4)]).unwrap();
    gate.wait_for_steps(1);
    engine.drain();
    assert_eq!(engine.snapshot().state, EngineState::Draining);
    assert_eq!(engine.submit(long(2, 4)).map(|_| ()), Err(SubmitError::Draining));
    drop(gate);
    assert_eq!(engine.stopped().await, EngineState::Stopped);
    for mut stream in streams {
        let mut answer = Answer::default();
        while let Some(event) = futures_util::StreamExt::next(&mut stream).await {
            answer.take(event);
        }
        assert_eq!((answer.tokens.len(), answer.reason()), (4, &FinishReason::Length));
    }
    assert_eq!(engine.submit(long(3, 4)).map(|_| ()), Err(SubmitError::Draining));
}

#[tokio::test]
async fn an_impatient_drain_aborts_what_is_left() {
    let (gate, engine) = gated(EngineConfig { max_num_seqs: 1, ..config() }, None);
    let streams = engine.submit_all(vec![long(0, 80), long(1, 80)]).unwrap();
    gate.permit(2);
    gate.wait_for_steps(3);
    engine.drain();
    engine.abort_all();
    gate.permit(1);
    assert_eq!(engine.stopped().await, EngineState::Stopped);
    let read = tokio::task::spawn_blocking(|| streams.into_iter().map(Answer::of).collect::<Vec<_>>());
    let answers = read.await.unwrap();
    assert_eq!(answers[0].tokens.len(), 3, "the step under way counts");
    assert!(answers.iter().all(|answer| *answer.reason() == FinishReason::Abort), "{answers:?}");
    assert_eq!(engine.snapshot().used_pages, [0, 0]);
}

#[test]
fn an_aborted_engine_serves_on() {
    let (gate, engine) = gated(config(), None);
    let stream = engine.submit(long(0, 80)).unwrap();
    gate.wait_for_steps(1);
    engine.abort_all();
    drop(gate);
    assert_eq!(Answer::of(stream).reason(), &FinishReason::Abort);
    assert_eq!(Answer::of(engine.submit(long(1, 3)).unwrap()).tokens.len(), 3);
    assert_eq!(engine.snapshot().state, EngineState::Running);
}

#[test]
fn the_last_handle_stops_the_engine() {
    let (gate, engine) = gated(config(), None);
    let stream = engine.submit(long(0, 3)).unwrap();
    let shared = Arc::clone(&engine.owner.shared);
    drop(engine.clone());
    assert_eq!(shared.state(), EngineState::Running);
    drop(engine);
    drop(gate);
    assert_eq!(Answer::of(stream).tokens.len(), 3, "what was accepted is finished");
    until(|| shared.state() == EngineState::Stopped);
}

#[test]
fn seeds_are_kept_or_drawn() {
    let seeds = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&seeds);
    let twist: Twist = Box::new(move |batch, answer| {
        let rows = batch.sequences.iter().filter_map(|s| Some((s.key, s.sample.as_ref()?.seed)));
        seen.lock().unwrap().extend(rows);
        Ok(answer)
    });
    let (gate, engine) = gated(config(), Some(twist));
    drop(gate);
    let mut requests: Vec<_> = (0..3).map(|i| long(i, 3)).collect();
    requests[1].sampling.seed = Some(77);
    let streams = engine.submit_all(requests).unwrap();
    streams.into_iter().for_each(|stream| assert_eq!(Answer::of(stream).tokens.len(), 3));
    let of = |key| {
        let seeds = seeds.lock().unwrap();
        seeds.iter().filter(|(k, _)| *k == key).map(|(_, seed)| *seed).collect::<Vec<_>>()
    };
    assert_eq!(of(1), [77; 3]);
    assert_eq!(of(0), [of(0)[0]; 3]);
    assert_ne!(of(0)[0], of(2)[0]);
}

#[test]
fn penalties_get_the_history_and_others_do_not() {
    let twist: Twist = Box::new(|batch, answer| {
        for slice in &batch.sequences {
            let Some(row) = &slice.sample else { continue };
            let lengths = (row.prompt.len(), row.generated.len());
            let want = if slice.key == 0 { (3, row.step as usize) } else { (0, 0) };
            assert_eq!(lengths, want, "sequence {}", slice.key);
        }
        Ok(answer)
    });
    let (gate, engine) = gated(config(), Some(twist));
    drop(gate);
    let mut requests = vec![long(0, 5), long(1, 5)];
    requests[0].sampling.presence_penalty = 0.5;
    let streams = engine.submit_all(requests).unwrap();
    streams.into_iter().for_each(|stream| assert_eq!(Answer::of(stream).tokens.len(), 5));
}

/// OPS-05.
#[test]
fn an_infeasible_cache_is_refused_with_the_numbers() {
    let config = EngineConfig { kv_bytes: Some(900), max_model_len: Some(CONTEXT), ..config() };
    let error = Engine::start(Box::new(echo()), config).unwrap_err();
    let EngineError::KvTooSmall { budget: 900, needed, max_model_len: CONTEXT, fits } = error else {
        panic!("{error}")
    };
    assert!(needed > 900 && fits < CONTEXT);
}
