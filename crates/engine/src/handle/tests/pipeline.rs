//! A device that takes the next step before the last is collected: nobody can tell by the answers.

use proptest::prelude::*;

use super::*;

/// One request of a workload. Its answer is a line of the script.
#[derive(Clone, Debug)]
struct Job {
    prompt: usize,
    line: Vec<TokenId>,
    max_tokens: usize,
    min_tokens: usize,
    stops: Vec<TokenId>,
    penalised: bool,
    /// Has a constraint that is settled after so many tokens.
    guided: Option<usize>,
    /// Its owner leaves after this many tokens.
    leaves: Option<usize>,
}

#[derive(Clone, Debug)]
struct Workload {
    jobs: Vec<Job>,
    config: EngineConfig,
}

fn workloads() -> impl Strategy<Value = Workload> {
    let line = prop::collection::vec(0_u32..20, 0..60);
    let ends = (1_usize..70, 0_usize..8, prop::collection::vec(1_u32..20, 0..3));
    let job = (1_usize..100, line, ends, prop::bool::weighted(0.1), prop::option::weighted(0.2, 0_usize..20));
    let job = (job, prop::option::weighted(0.3, 0_usize..40));
    let job = job.prop_map(|((prompt, line, (max_tokens, min_tokens, stops), penalised, leaves), guided)| {
        Job { prompt, line, max_tokens, min_tokens, stops, penalised, guided, leaves }
    });
    // Pages of 16 positions and 64 bytes: room for one sequence of 128 tokens and little more.
    let config = (1_usize..6, 1_usize..40, 8_usize..24).prop_map(|(seqs, rows, pages)| EngineConfig {
        max_num_seqs: seqs,
        max_batched_tokens: rows,
        max_model_len: Some(128),
        kv_bytes: Some(64 * pages),
        ..EngineConfig::default()
    });
    (prop::collection::vec(job, 1..10), config).prop_map(|(jobs, config)| Workload { jobs, config })
}

/// What every owner was told, up to where it left.
fn play(workload: &Workload, depth: usize) -> Vec<Answer> {
    let lines = workload.jobs.iter().map(|job| job.line.clone()).collect();
    let script = ScriptedRunner::new(VOCAB, 128, lines).with_steps_in_flight(depth);
    let engine = Engine::start(Box::new(script), workload.config.clone()).unwrap();
    let requests = workload.jobs.iter().zip(0..).map(|(job, id)| {
        let mut request = request(id, &prompt(id as usize, job.prompt), job.max_tokens);
        request.sampling.min_tokens = job.min_tokens;
        request.sampling.presence_penalty = if job.penalised { 1.0 } else { 0.0 };
        request.stop.token_ids.clone_from(&job.stops);
        request.guide = job.guided.map(crate::testing::Moody::guide);
        request
    });
    let streams = engine.submit_all(requests.collect()).unwrap();
    let mut answers = Vec::new();
    for (mut stream, job) in streams.into_iter().zip(&workload.jobs) {
        let mut answer = Answer::default();
        while job.leaves.is_none_or(|most| answer.tokens.len() < most)
            && let Some(event) = stream.blocking_next()
        {
            answer.take(event);
        }
        answers.push(answer);
    }
    assert_idle(&engine);
    let snapshot = engine.snapshot();
    assert_eq!(snapshot.state, EngineState::Running, "a feed that the script refuses is a fault");
    assert_eq!(snapshot.finished + snapshot.aborted, workload.jobs.len() as u64, "{snapshot:?}");
    answers
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Stops, limits, cancellations, penalties, prompt chunks and preemptions: the same tokens, ends and counts
    /// whatever the device has in flight.
    #[test]
    fn answers_do_not_depend_on_the_steps_in_flight(workload in workloads()) {
        let alone = play(&workload, 1);
        for depth in 2..4 {
            prop_assert_eq!(&play(&workload, depth), &alone, "{} steps in flight", depth);
        }
    }
}

#[test]
fn echoes_are_the_same_under_page_pressure() {
    let one = spec(4, Some(10)).page_bytes(1) * CONTEXT.div_ceil(4);
    let config = EngineConfig { kv_bytes: Some(one * 2), max_model_len: Some(CONTEXT), ..config() };
    let requests: Vec<_> = (0..12_usize).map(|i| request(i as u64, &prompt(i, 1 + 5 * i), 80)).collect();
    for depth in 1..4 {
        let engine = Engine::start(Box::new(deep_echo(depth)), config.clone()).unwrap();
        let streams = engine.submit_all(requests.clone()).unwrap();
        for (request, stream) in requests.iter().zip(streams) {
            assert_eq!(Answer::of(stream), expected(&spec(4, Some(10)), request, CONTEXT), "depth {depth}");
        }
        assert_idle(&engine);
    }
}

#[test]
fn a_second_step_is_under_way_while_the_first_is_awaited() {
    let (gate, engine) = gated_at(2, config(), None);
    let stream = engine.submit(long(0, 6)).unwrap();
    // Nothing is permitted to end, and still there are two.
    gate.wait_for_steps(2);
    assert_eq!(engine.snapshot().generation_tokens, 0);
    gate.permit(1);
    gate.wait_for_steps(3);
    until(|| engine.snapshot().generation_tokens == 1);
    drop(gate);
    assert_eq!(Answer::of(stream).tokens.len(), 6);
    assert_idle(&engine);
    assert_eq!(engine.snapshot().steps, 6, "the limit is known: no row was computed in vain");
}

#[test]
fn a_stop_costs_one_row_in_vain_and_nothing_else() {
    let script = ScriptedRunner::new(VOCAB, 64, vec![vec![5, 6, EOS, 7, 8]]).with_steps_in_flight(2);
    let engine = Engine::start(Box::new(script), config()).unwrap();
    let answer = Answer::of(engine.submit(request(0, &[1, 2], 50)).unwrap());
    assert_eq!(answer.tokens, [5, 6, EOS]);
    assert_eq!(answer.end.as_ref().map(|(_, usage)| usage.generated), Some(3));
    assert_idle(&engine);
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.steps, snapshot.generation_tokens, snapshot.finished), (4, 3, 1));
}

/// OPS-13.
#[test]
fn a_dropped_stream_frees_its_pages_with_steps_in_flight() {
    let (gate, engine) = gated_at(2, config(), None);
    let leaving = engine.submit(long(0, 80)).unwrap();
    let staying = engine.submit(long(1, 80)).unwrap();
    gate.permit(3);
    gate.wait_for_steps(5);
    drop(leaving);
    gate.permit(1);
    gate.wait_for_steps(6);
    assert!(gate.log()[4].contains_key(&0), "under way when it was dropped");
    assert_eq!(gate.log()[5].keys().collect::<Vec<_>>(), [&1]);
    let snapshot = engine.snapshot();
    assert_eq!((snapshot.running, snapshot.aborted), (1, 1));
    drop(gate);
    assert_eq!(Answer::of(staying), expected(&spec(4, Some(10)), &long(1, 80), CONTEXT));
    assert_idle(&engine);
}

#[tokio::test]
async fn an_abort_does_not_wait_for_the_tokens_in_flight_and_a_drain_does() {
    let (gate, engine) = gated_at(2, config(), None);
    let aborted = engine.submit(long(0, 80)).unwrap();
    gate.permit(2);
    gate.wait_for_steps(4);
    engine.abort_all();
    gate.permit(1);
    let answer = tokio::task::spawn_blocking(|| Answer::of(aborted)).await.unwrap();
    assert_eq!((answer.tokens.len(), answer.reason()), (3, &FinishReason::Abort));
    let drained = engine.submit(long(1, 5)).unwrap();
    engine.drain();
    drop(gate);
    assert_eq!(engine.stopped().await, EngineState::Stopped);
    let answer = tokio::task::spawn_blocking(|| Answer::of(drained)).await.unwrap();
    assert_eq!((answer.tokens.len(), answer.reason()), (5, &FinishReason::Length));
    assert_eq!(engine.snapshot().used_pages, [0, 0]);
}
