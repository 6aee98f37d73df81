use super::*;

/// Three sequences, a device that takes two steps: what the second step is fed with, and what becomes of it.
#[test]
fn the_next_step_is_launched_before_the_last_is_known() {
    let scenario = Scenario {
        page_size: 4,
        window: Some(8),
        max_num_seqs: 4,
        max_batched_tokens: 16,
        max_model_len: 40,
        spare: 20,
        depth: 2,
        caching: false,
        reset: None,
        jobs: vec![job(0, 3, 20), job(0, 5, 20), job(0, 4, 1)],
    };
    let mut bench = Bench::new(&scenario);
    (0..3).for_each(|key| bench.submit(key));
    let step = bench.scheduler.schedule();
    let first = bench.launch(step);
    assert!(first.sequences.iter().all(|slice| slice.feed.is_none() && slice.sample.is_some()));
    // The third needs one token only, and that is in flight: no row, no pages.
    let step = bench.scheduler.schedule();
    let second = bench.launch(step);
    let rows: Vec<_> = second.sequences.iter().map(|s| (s.key, s.rows.clone(), s.start, s.feed)).collect();
    assert_eq!(rows, [(0, 0..1, 3, Some(0)), (1, 1..2, 5, Some(1))]);
    assert_eq!(second.tokens, [0, 0], "placeholders");
    let draws: Vec<_> = second.sample_rows().map(|row| (row.step, row.banned.to_vec())).collect();
    assert_eq!(draws, [(1, vec![0]), (1, vec![0])], "bans and draws count the token in flight");
    assert_eq!((bench.scheduler.running.len(), bench.scheduler.ending.len()), (2, 1));
    assert_eq!(bench.scheduler.ending[0].kv().held(0), 0);
    bench.check();

    // The first leaves while both steps are under way: its outcomes are dropped, the others' are not.
    bench.streams[0] = None;
    bench.scheduler.drop_cancelled();
    bench.check();
    bench.collect();
    bench.collect();
    bench.read();
    let tokens: Vec<_> = bench.answers.iter().map(|answer| answer.tokens.len()).collect();
    assert_eq!(tokens, [0, 2, 1]);
    let counters = bench.scheduler.counters();
    assert_eq!((counters.generation_tokens, counters.finished, counters.aborted), (3, 1, 1));
}

/// A token that arrives for a preempted sequence is kept, and may end it where it waits.
#[test]
fn a_preempted_sequence_keeps_the_token_in_flight() {
    for stops in [false, true] {
        let scenario = Scenario {
            page_size: 4,
            window: None,
            max_num_seqs: 4,
            max_batched_tokens: 16,
            max_model_len: 40,
            spare: 20,
            depth: 2,
            caching: false,
            reset: None,
            jobs: vec![job(0, 3, 20), job(0, 5, 20)],
        };
        let mut bench = Bench::new(&scenario);
        bench.scenario.jobs[1].min_tokens = 0;
        // Every id but those below ends it.
        bench.scenario.jobs[1].stops = if stops { VOCAB as u32 - 1 } else { 0 };
        (0..2).for_each(|key| bench.submit(key));
        let step = bench.scheduler.schedule();
        bench.launch(step);
        bench.scheduler.preempt_youngest();
        assert_eq!((bench.scheduler.waiting.len(), bench.scheduler.waiting[0].in_flight()), (1, 1));
        let step = bench.scheduler.schedule();
        let second = bench.launch(step);
        assert_eq!(second.sequences.iter().map(|s| s.key).collect::<Vec<_>>(), [0], "it waits for its token");
        bench.check();
        bench.collect();
        bench.read();
        assert_eq!(bench.answers[1].tokens.len(), 1);
        assert_eq!(bench.answers[1].end.is_some(), stops);
        let step = bench.scheduler.schedule();
        let third = bench.launch(step);
        let again = third.sequences.iter().find(|s| s.key == 1).map(|s| (s.start, s.rows.len()));
        assert_eq!(again, if stops { None } else { Some((0, 6)) }, "prompt and token, computed again");
        bench.check();
    }
}

/// Penalties read every token generated so far: their sequence is never fed, and the others wait with it.
#[test]
fn penalties_wait_for_the_commit() {
    let mut jobs = vec![job(0, 3, 20), job(0, 5, 20)];
    jobs[1].penalised = true;
    let scenario = Scenario {
        page_size: 4,
        window: None,
        max_num_seqs: 4,
        max_batched_tokens: 16,
        max_model_len: 40,
        spare: 20,
        depth: 2,
        caching: false,
        reset: None,
        jobs,
    };
    let mut bench = Bench::new(&scenario);
    (0..2).for_each(|key| bench.submit(key));
    let step = bench.scheduler.schedule();
    bench.launch(step);
    assert!(bench.scheduler.schedule().is_empty());
    bench.collect();
    let step = bench.scheduler.schedule();
    let next = bench.launch(step);
    assert!(next.sequences.len() == 2 && next.sequences.iter().all(|slice| slice.feed.is_none()));
}
