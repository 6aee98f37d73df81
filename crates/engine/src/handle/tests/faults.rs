//! A row, the runner or the device goes wrong.

use ctxserve_backend::{Batch, DeviceError, KvPlan, SampleError, Sampled};

use super::*;
use crate::RunnerInfo;

#[test]
fn a_failed_row_ends_its_own_sequence_only() {
    (1..4).for_each(failed_row);
}

fn failed_row(depth: usize) {
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
    let (gate, engine) = gated_at(depth, config(), Some(twist));
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
fn fault(what: &'static str, twist: impl Fn() -> Twist) {
    (1..4).for_each(|depth| fault_at(depth, what, twist()));
}

fn fault_at(depth: usize, what: &'static str, mut twist: Twist) {
    let mut steps = 0;
    let third: Twist = Box::new(move |batch, answer| {
        steps += 1;
        if steps == 3 { twist(batch, answer) } else { Ok(answer) }
    });
    let (gate, engine) = gated_at(depth, EngineConfig { max_num_seqs: 2, ..config() }, Some(third));
    let streams = engine.submit_all((0..5).map(|i| long(i, 20)).collect()).unwrap();
    drop(gate);
    all_fault(&engine, streams, what, 2);
}

/// The two sequences that ran got `tokens` each, the others none; then all got the fault.
fn all_fault(engine: &EngineHandle, streams: Vec<EventStream>, what: &str, tokens: usize) {
    for (index, stream) in streams.into_iter().enumerate() {
        let answer = Answer::of(stream);
        assert_eq!(answer.tokens.len(), if index < 2 { tokens } else { 0 });
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
    fault("bus on fire", || Box::new(|_, _| Err(DeviceError::new("experts", "bus on fire"))));
}

#[test]
fn a_panic_in_the_runner_is_a_fault() {
    fault("index 7", || Box::new(|_, _| panic!("index {}", 7)));
}

#[test]
fn missing_outcomes_are_a_fault() {
    fault("answered 1 of 2", || Box::new(|_, answer| Ok(answer.into_iter().take(1).collect())));
}

/// A device that refuses its third launch, however many steps it has under way.
struct Refusing {
    inner: PagedEchoRunner,
    launches: usize,
}

impl Runner for Refusing {
    fn info(&self) -> &RunnerInfo {
        self.inner.info()
    }

    fn allocate(&mut self, plan: &KvPlan) -> Result<(), DeviceError> {
        self.inner.allocate(plan)
    }

    fn steps_in_flight(&self) -> usize {
        self.inner.steps_in_flight()
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        self.launches += 1;
        if self.launches == 3 {
            return Err(DeviceError::new("embed", "no such address"));
        }
        self.inner.launch(batch)
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        self.inner.collect()
    }
}

#[test]
fn a_refused_launch_is_a_fault() {
    for depth in 1..4 {
        let runner = Refusing { inner: deep_echo(depth), launches: 0 };
        let engine = Engine::start(Box::new(runner), EngineConfig { max_num_seqs: 2, ..config() }).unwrap();
        let streams = engine.submit_all((0..5).map(|i| long(i, 20)).collect()).unwrap();
        // Steps still under way when the device fails are not waited for.
        all_fault(&engine, streams, "no such address", 3 - depth);
    }
}
