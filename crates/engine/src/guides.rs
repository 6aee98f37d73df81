//! Constraints at work: what a sequence's next token may be is worked out beside the engine thread, while the device
//! computes for others.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use ctxserve_core::{Allowed, Constraint, ConstraintError, Guide, TokenId};

/// Most threads that compute masks.
const MOST_THREADS: usize = 8;

/// Stack of such a thread, of which only what is used is taken: grammar libraries descend recursively.
const STACK: usize = 64 << 20;

/// A sequence's constraint, as the engine knows it.
#[derive(Debug, Default)]
pub(crate) enum Guided {
    /// There is none.
    #[default]
    Not,
    /// What is allowed now is allowed for ever.
    Settled(Allowed),
    /// What the next token may be is known.
    Ready(Box<dyn Constraint>, Allowed),
    /// It is being worked out.
    Busy,
}

/// The token that a sequence picked, and its constraint, which has yet to hear of it.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) key: u64,
    pub(crate) id: TokenId,
    pub(crate) constraint: Box<dyn Constraint>,
}

/// What a constraint says next.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) key: u64,
    pub(crate) guided: Result<Guided, ConstraintError>,
}

impl Guided {
    /// At the start of an answer.
    pub(crate) fn new(guide: Option<Guide>) -> Self {
        match guide {
            Some(Guide { constraint, first }) => Self::of(constraint, first),
            None => Self::Not,
        }
    }

    fn of(constraint: Box<dyn Constraint>, allowed: Allowed) -> Self {
        if constraint.is_settled() { Self::Settled(allowed) } else { Self::Ready(constraint, allowed) }
    }

    /// Whether each token has to be known before the next one can be picked.
    pub(crate) fn is_bound(&self) -> bool {
        matches!(self, Self::Ready(..) | Self::Busy)
    }

    /// Whether it is not known yet what the next token may be.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self, Self::Busy)
    }

    /// What the next token may be.
    pub(crate) fn allowed(&self) -> &Allowed {
        match self {
            Self::Settled(allowed) | Self::Ready(_, allowed) => allowed,
            Self::Not | Self::Busy => &Allowed::Any,
        }
    }

    /// Takes the token that was picked. What follows is known at once where that is quick; else it is asked for.
    ///
    /// # Errors
    /// The constraint cannot go on.
    pub(crate) fn accept(&mut self, key: u64, id: TokenId) -> Result<Option<Question>, ConstraintError> {
        match std::mem::take(self) {
            Self::Ready(constraint, _) if constraint.is_quick(id) => {
                *self = advance(constraint, id)?;
                Ok(None)
            }
            Self::Ready(constraint, _) => {
                *self = Self::Busy;
                Ok(Some(Question { key, id, constraint }))
            }
            other => {
                *self = other;
                Ok(None)
            }
        }
    }
}

/// A constraint's next word, whatever its code does: other sequences go on.
fn advance(mut constraint: Box<dyn Constraint>, id: TokenId) -> Result<Guided, ConstraintError> {
    let work = AssertUnwindSafe(move || {
        constraint.accept(id)?;
        let allowed = constraint.allowed()?;
        if matches!(&allowed, Allowed::Only(mask) if mask.is_empty()) {
            return Err(ConstraintError::new("nothing may follow"));
        }
        Ok(Guided::of(constraint, allowed))
    });
    catch_unwind(work).unwrap_or_else(|_| Err(ConstraintError::new("the grammar failed")))
}

impl Question {
    /// Asks.
    pub(crate) fn answer(self) -> Answer {
        let Self { key, id, constraint } = self;
        Answer { key, guided: advance(constraint, id) }
    }
}

/// The threads that work out what comes next. There are none before the first constrained sequence.
#[derive(Debug)]
pub(crate) struct Guides {
    questions: Option<Sender<Question>>,
    answers: (Sender<Answer>, Receiver<Answer>),
    /// Questions without an answer yet.
    pending: usize,
}

impl Guides {
    pub(crate) fn new() -> Self {
        Self { questions: None, answers: channel(), pending: 0 }
    }

    /// Whether an answer is to come.
    pub(crate) fn is_pending(&self) -> bool {
        self.pending > 0
    }

    /// Hands a question to the threads.
    pub(crate) fn ask(&mut self, question: Question) {
        let answers = self.answers.0.clone();
        let questions = self.questions.get_or_insert_with(|| start(&answers));
        let key = question.key;
        self.pending += 1;
        if questions.send(question).is_err() {
            // No thread could be started.
            let guided = Err(ConstraintError::new("no thread to compute it on"));
            let _ = self.answers.0.send(Answer { key, guided });
        }
    }

    /// The next answer, if it comes in time.
    pub(crate) fn next(&mut self, wait: Duration) -> Option<Answer> {
        if self.pending == 0 {
            return None;
        }
        match self.answers.1.recv_timeout(wait) {
            Ok(answer) => {
                self.pending -= 1;
                Some(answer)
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => None,
        }
    }
}

/// Starts the threads. They end when the questions do.
fn start(answers: &Sender<Answer>) -> Sender<Question> {
    let (sender, questions) = channel::<Question>();
    let questions = Arc::new(Mutex::new(questions));
    let cores = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // At least two, so that one slow grammar does not stop the others.
    for _ in 0..(cores / 2).clamp(2, MOST_THREADS) {
        let (questions, answers) = (Arc::clone(&questions), answers.clone());
        let work = move || {
            loop {
                let next = questions.lock().unwrap_or_else(PoisonError::into_inner).recv();
                let Ok(question) = next else { return };
                if answers.send(question.answer()).is_err() {
                    return;
                }
            }
        };
        if let Err(error) = thread::Builder::new().name("masks".to_owned()).stack_size(STACK).spawn(work) {
            tracing::error!(%error, "no thread for constrained decoding");
        }
    }
    sender
}
