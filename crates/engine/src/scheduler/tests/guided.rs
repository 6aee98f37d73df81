use super::*;

/// A row under a constraint is never fed, and the others do not wait for it.
#[test]
fn a_constrained_row_is_left_out_until_its_token_is_known() {
    let mut jobs = vec![job(0, 3, 20), job(0, 5, 20)];
    jobs[1].guided = Some(100);
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
    let first = bench.launch(step);
    assert!(first.sequences[1].sample.as_ref().is_some_and(|row| row.mask.is_some()));
    let keys = |batch: &Batch| batch.sequences.iter().map(|slice| slice.key).collect::<Vec<_>>();
    let step = bench.scheduler.schedule();
    assert_eq!(keys(&bench.launch(step)), [0], "its token is in flight");
    bench.collect();
    bench.questions.extend(bench.scheduler.take_questions());
    if !bench.questions.is_empty() {
        let step = bench.scheduler.schedule();
        assert_eq!(keys(&bench.launch(step)), [0], "its constraint is busy");
        bench.collect();
    }
    bench.advise();
    let step = bench.scheduler.schedule();
    let back = bench.launch(step);
    assert_eq!(keys(&back), [0, 1]);
    assert!(back.sequences[1].feed.is_none());
}
