//! Constraints on the engine: their failures and their time are their own sequence's.

use std::sync::{Arc, Condvar, Mutex};

use ctxserve_core::{Allowed, Constraint, ConstraintError, Guide, TokenMask};

use super::*;
use crate::testing::Moody;

/// Allows id 7 alone, and does at the `turn`-th token what `deed` says.
#[derive(Clone, Debug)]
struct Odd {
    turn: usize,
    deed: Deed,
}

#[derive(Clone, Debug)]
enum Deed {
    Refuse,
    Panic,
    AllowNothing,
    /// Does not come back before the gate opens.
    Wait(Arc<(Mutex<bool>, Condvar)>),
}

impl Constraint for Odd {
    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        let mut mask = TokenMask::none(VOCAB);
        if self.turn > 0 || !matches!(self.deed, Deed::AllowNothing) {
            mask.allow(7);
        }
        Ok(Allowed::Only(Arc::new(mask)))
    }

    fn accept(&mut self, id: TokenId) -> Result<(), ConstraintError> {
        assert_eq!(id, 7);
        self.turn = self.turn.saturating_sub(1);
        match &self.deed {
            _ if self.turn > 0 => {}
            Deed::AllowNothing => {}
            Deed::Refuse => return Err(ConstraintError::new("no more")),
            Deed::Panic => panic!("a bug in a grammar library"),
            Deed::Wait(gate) => {
                let open = gate.0.lock().unwrap();
                drop(gate.1.wait_while(open, |open| !*open).unwrap());
            }
        }
        Ok(())
    }

    fn is_quick(&self, _id: TokenId) -> bool {
        false
    }

    fn is_settled(&self) -> bool {
        false
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

fn odd(id: u64, turn: usize, deed: Deed) -> GenerateRequest {
    GenerateRequest { guide: Some(Guide::new(Box::new(Odd { turn, deed })).unwrap()), ..long(id, 40) }
}

/// OPS-17: a grammar that fails ends its own request, with an error, and no other.
#[test]
fn a_failing_constraint_ends_only_its_own_sequence() {
    for depth in [1, 2] {
        let engine = Engine::start(Box::new(deep_echo(depth)), config()).unwrap();
        let deeds = [Deed::Refuse, Deed::Panic, Deed::AllowNothing];
        let bad: Vec<_> =
            deeds.into_iter().zip(0..).map(|(deed, id)| engine.submit(odd(id, 3, deed)).unwrap()).collect();
        let other = Answer::of(engine.submit(long(9, 60)).unwrap());
        assert_eq!(other, expected(&spec(4, Some(10)), &long(9, 60), CONTEXT));
        for stream in bad {
            let answer = Answer::of(stream);
            assert_eq!(answer.tokens, [7, 7, 7]);
            assert!(matches!(answer.reason(), FinishReason::Error(_)), "{answer:?}");
        }
        assert_idle(&engine);
        assert_eq!(engine.snapshot().state, EngineState::Running);
    }
}

/// A constraint that takes for ever holds up nobody: others finish, another constrained sequence among them.
#[test]
fn a_slow_constraint_stalls_nobody_else() {
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let engine = Engine::start(Box::new(deep_echo(2)), config()).unwrap();
    let slow = engine.submit(odd(0, 2, Deed::Wait(Arc::clone(&gate)))).unwrap();
    let free = Answer::of(engine.submit(long(1, 60)).unwrap());
    assert_eq!(free, expected(&spec(4, Some(10)), &long(1, 60), CONTEXT));
    let moody = GenerateRequest { guide: Some(Moody::guide(30)), ..long(2, 60) };
    let guided = Answer::of(engine.submit(moody.clone()).unwrap());
    assert_eq!(guided, expected(&spec(4, Some(10)), &moody, CONTEXT));
    assert_eq!(engine.snapshot().running, 1);
    // Its owner may leave, too, and a new one may come.
    let leaving = engine.submit(odd(3, 1, Deed::Wait(Arc::clone(&gate)))).unwrap();
    until(|| engine.snapshot().running == 2);
    drop(leaving);
    until(|| engine.snapshot().running == 1);
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(Answer::of(slow).tokens, [7; 40]);
    assert_idle(&engine);
}

/// Constrained sequences under page pressure, preempted and resumed, say what they say alone.
#[test]
fn constrained_sequences_survive_preemption() {
    let one = spec(4, Some(10)).page_bytes(1) * CONTEXT.div_ceil(4);
    let config = EngineConfig { kv_bytes: Some(one * 2), max_model_len: Some(CONTEXT), ..config() };
    let make = |i: usize| GenerateRequest {
        guide: Some(Moody::guide(10 * i)),
        ..request(i as u64, &prompt(i, 1 + 5 * i), 80)
    };
    for depth in 1..4 {
        let engine = Engine::start(Box::new(deep_echo(depth)), config.clone()).unwrap();
        let streams = engine.submit_all((0..10).map(make).collect()).unwrap();
        for (i, stream) in streams.into_iter().enumerate() {
            assert_eq!(Answer::of(stream), expected(&spec(4, Some(10)), &make(i), CONTEXT), "depth {depth}");
        }
        assert_idle(&engine);
    }
}
