use ctxserve_core::FinishReason;

use super::*;
use crate::MissCause;

fn scenario(jobs: Vec<Job>) -> Scenario {
    Scenario {
        page_size: 4,
        window: Some(6),
        max_num_seqs: 8,
        max_batched_tokens: 64,
        max_model_len: 200,
        spare: 400,
        depth: 2,
        caching: true,
        reset: None,
        jobs,
    }
}

/// One that asks what job 0 asked.
fn again(arrives: usize, prompt: usize) -> Job {
    Job { follows: Some((1, prompt)), ..job(arrives, 0, 4) }
}

fn cached(bench: &Bench) -> Vec<usize> {
    bench.answers.iter().map(|answer| answer.end.as_ref().unwrap().1.cached).collect()
}

fn answers(bench: &Bench) {
    for (key, answer) in bench.answers.iter().enumerate() {
        let whole = expected(bench.scheduler.pools.spec(), &bench.request(key), bench.scenario.max_model_len);
        assert_eq!(answer.clone().plain(), whole, "sequence {key}");
    }
}

/// OPS-10: choices of one prompt, and prompts that arrive together, are computed once: the others wait for the step
/// that computes what they begin with.
#[test]
fn prompts_that_arrive_together_are_computed_once() {
    for (prompt, whole) in [(41, 40), (44, 40), (42, 40), (3, 0)] {
        let mut jobs = vec![job(0, prompt, 4)];
        jobs.extend((1..5).map(|n| Job { follows: Some((n, prompt)), ..job(0, 0, 4) }));
        let mut bench = Bench::new(&scenario(jobs));
        bench.play();
        answers(&bench);
        assert_eq!(cached(&bench), [0, whole, whole, whole, whole], "{prompt} tokens");
    }
}

/// The same where the prompts part within their first chunk: what the others need of the window is kept there.
#[test]
fn prompts_that_part_share_their_beginning() {
    let mut jobs = vec![job(0, 61, 4)];
    jobs.extend((1..4).map(|n| Job { follows: Some((n, 30)), ..job(0, 20, 4) }));
    let mut bench = Bench::new(&scenario(jobs));
    bench.play();
    answers(&bench);
    assert_eq!(cached(&bench), [0, 28, 28, 28]);
}

/// OPS-13: whoever leaves stops at once, and leaves behind what was computed for others.
#[test]
fn what_a_cancelled_sequence_computed_is_kept() {
    let mut jobs = vec![Job { cancelled: Some(2), ..job(0, 150, 30) }, again(20, 150)];
    for cancelled in [1, 2, 6] {
        jobs[0].cancelled = Some(cancelled);
        let mut bench = Bench::new(&scenario(jobs.clone()));
        bench.play();
        let steps = cancelled;
        let computed = (64 * steps).min(148);
        assert!(bench.answers[0].end.is_none());
        assert_eq!(bench.answers[1].end.as_ref().unwrap().1.cached, computed, "cancelled at {cancelled}");
        assert_eq!(bench.scheduler.counters().aborted, 1);
    }
}

/// A preempted sequence goes on from where it was, as far as its pages were not needed.
#[test]
fn a_preempted_sequence_finds_its_own_pages() {
    let mut bench = Bench::new(&scenario(vec![job(0, 50, 30), job(0, 40, 30)]));
    (0..2).for_each(|key| bench.submit(key));
    let step = bench.scheduler.schedule();
    bench.launch(step);
    let step = bench.scheduler.schedule();
    bench.launch(step);
    bench.collect();
    bench.collect();
    bench.scheduler.preempt_youngest();
    bench.check();
    let step = bench.scheduler.schedule();
    let batch = bench.launch(step);
    let rows: Vec<_> = batch.sequences.iter().map(|s| (s.key, s.start, s.rows.len())).collect();
    assert_eq!(rows, [(0, 51, 1), (1, 40, 1)]);
}

/// OPS-12: every prompt token that is computed has a cause.
#[test]
fn every_miss_has_a_cause() {
    // All of 61 tokens; a continuation of 20 more; a branch at 30, whose window is gone; the same again.
    let mut jobs = vec![job(0, 61, 4), Job { follows: Some((1, 61)), ..job(20, 20, 4) }];
    jobs.push(Job { follows: Some((2, 30)), ..job(40, 7, 4) });
    jobs.push(Job { follows: Some((3, 30)), ..job(60, 9, 4) });
    jobs.push(Job { salted: true, ..again(80, 61) });
    jobs[4].follows = Some((4, 61));
    jobs.push(Job { follows: Some((5, 61)), ..job(100, 0, 4) });
    let mut scenario = Scenario { reset: Some(99), ..scenario(jobs) };
    let mut bench = Bench::new(&scenario);
    bench.play();
    answers(&bench);
    assert_eq!(cached(&bench), [0, 60, 0, 28, 0, 0]);
    let counts = bench.scheduler.counters().prefixes;
    assert_eq!((counts.queries, counts.hits), (61 + 81 + 37 + 39 + 61 + 61, 60 + 28));
    let missed = |cause| counts.missed(cause);
    assert_eq!(missed(MissCause::New), 60 + 20 + 8 + 8);
    assert_eq!(missed(MissCause::Window), 28);
    assert_eq!(missed(MissCause::Salt), 60);
    assert_eq!(missed(MissCause::Reset), 60);
    assert_eq!(missed(MissCause::Tail), 1 + 1 + 1 + 3 + 1 + 1);
    assert_eq!(missed(MissCause::Evicted) + missed(MissCause::Disabled), 0);
    assert_eq!(counts.queries - counts.hits, counts.misses.iter().sum::<u64>());

    // Room for little more than one: the second takes the pages of the first, which asks again.
    scenario.jobs = vec![job(0, 150, 4), job(20, 160, 4), Job { follows: Some((2, 150)), ..job(40, 0, 4) }];
    (scenario.spare, scenario.reset) = (0, None);
    let mut bench = Bench::new(&scenario);
    bench.play();
    answers(&bench);
    let counts = bench.scheduler.counters().prefixes;
    let [.., last] = cached(&bench)[..] else { panic!("no answer") };
    assert_eq!(counts.missed(MissCause::Evicted) + counts.missed(MissCause::Window) + last as u64, 148);
    assert!(counts.missed(MissCause::Evicted) > 100, "{counts:?}");

    scenario.caching = false;
    let mut bench = Bench::new(&scenario);
    bench.play();
    let counts = bench.scheduler.counters().prefixes;
    assert_eq!((counts.queries, counts.missed(MissCause::Disabled)), (0, 460));
}

/// What a model computed to nonsense is not taken up by those who ask again.
#[test]
fn nothing_is_taken_over_from_nonsense() {
    let mut bench = Bench::new(&scenario(vec![job(0, 50, 30), again(0, 50)]));
    bench.submit(0);
    let step = bench.scheduler.schedule();
    bench.launch(step);
    let step = bench.in_flight.pop_front().unwrap();
    bench.runner.collect().unwrap();
    let endings = bench.scheduler.commit(step, vec![Err(SampleError::NonFinite)]);
    endings.into_iter().for_each(Ending::send);
    bench.read();
    assert!(matches!(bench.answers[0].end, Some((FinishReason::Error(_), _))));
    bench.check();
    bench.submit(1);
    while !(bench.scheduler.is_idle() && bench.in_flight.is_empty()) {
        bench.step();
    }
    bench.read();
    assert_eq!(bench.answers[1].end.as_ref().unwrap().1.cached, 0);
}
