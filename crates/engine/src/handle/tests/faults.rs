//! A row, the runner or the device goes wrong.

use ctxserve_backend::{DeviceError, SampleError};

use super::*;

#[test]
fn a_failed_row_ends_its_own_sequence_only() {
    let twist: Twist = Box::new(|batch, mut answer| {
        for (slice, outcome) in batch.sequences.iter().zip(&mut answer) {
            match (slice.key, slice.sample.as_ref().map_or(0, |row| row.step)) {
                (0, 2) => *outcome = Err(SampleError::NonFinite),
                (1, 1) => *outcome = Err(SampleError::NothingLeft),
                (2, 0) => outcome.as_mut().unwrap().id = VOCAB as TokenId,
                _ => {}
            }
        }
        Ok(answer)
    });
    let (gate, engine) = gated(config(), Some(twist));
    let streams = engine.submit_all((0..4).map(|i| long(i, 20)).collect()).unwrap();
    drop(gate);
    let answers: Vec<_> = streams.into_iter().map(Answer::of).collect();
    for (answer, tokens) in answers.iter().zip([2, 1, 0]) {
        assert_eq!(answer.tokens.len(), tokens);
        assert!(matches!(answer.reason(), FinishReason::Error(_)), "{answer:?}");
    }
    assert_eq!(answers[3], expected_long(3));
    assert_eq!(Answer::of(engine.submit(long(4, 20)).unwrap()), expected_long(4));
    assert_idle(&engine);
}

fn expected_long(id: u64) -> Answer {
    expected(&spec(4, Some(10)), &long(id, 20), CONTEXT)
}

/// The third step goes wrong in the given way: running and queued streams get a fault each, after what they were
/// promised, and the engine refuses everything from then on.
fn fault(what: &'static str, twist: Twist) {
    let mut twist = twist;
    let mut steps = 0;
    let third: Twist = Box::new(move |batch, answer| {
        steps += 1;
        if steps == 3 { twist(batch, answer) } else { Ok(answer) }
    });
    let (gate, engine) = gated(EngineConfig { max_num_seqs: 2, ..config() }, Some(third));
    let streams = engine.submit_all((0..5).map(|i| long(i, 20)).collect()).unwrap();
    drop(gate);
    for (index, stream) in streams.into_iter().enumerate() {
        let answer = Answer::of(stream);
        assert_eq!(answer.tokens.len(), if index < 2 { 2 } else { 0 });
        let FinishReason::Fault(reason) = answer.reason() else { panic!("{answer:?}") };
        assert!(reason.contains(what), "{reason}");
    }
    let state = tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(engine.stopped());
    let EngineState::Faulted(reason) = state else { panic!("{state:?}") };
    assert!(reason.contains(what));
    assert_eq!(engine.submit(long(9, 1)).map(|_| ()), Err(SubmitError::Faulted(reason)));
    assert_eq!(engine.snapshot().used_pages, [0, 0]);
}

#[test]
fn a_device_error_is_a_fault() {
    fault("bus on fire", Box::new(|_, _| Err(DeviceError::new("experts", "bus on fire"))));
}

#[test]
fn a_panic_in_the_runner_is_a_fault() {
    fault("index 7", Box::new(|_, _| panic!("index {}", 7)));
}

#[test]
fn missing_outcomes_are_a_fault() {
    fault("answered 1 of 2", Box::new(|_, answer| Ok(answer.into_iter().take(1).collect())));
}
