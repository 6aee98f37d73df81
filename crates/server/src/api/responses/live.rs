//! Responses that run in the background: nobody has to listen, and whoever does may come late.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, watch};

use super::answer::Answer;
use super::kept::Keep;
use crate::generate::run::Generation;
use crate::http::sse::{Frame, frame};
use crate::state::ServerState;

/// A background response while it runs, and its events after that.
pub(crate) struct Live {
    /// Gone when it has ended.
    answer: Mutex<Option<Answer>>,
    events: Mutex<Vec<Frame>>,
    progress: watch::Sender<Progress>,
    cancel: Notify,
    /// It keeps its events.
    streams: bool,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    events: usize,
    ended: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Live").field("progress", &*self.progress.borrow()).finish_non_exhaustive()
    }
}

impl Live {
    /// Stores the response as one that runs, and runs it.
    pub(super) fn start(
        state: &ServerState,
        mut answer: Answer,
        keep: Keep,
        generation: Generation,
    ) -> Arc<Self> {
        let id = answer.id().to_owned();
        let streams = answer.log().is_on();
        let live = Arc::new(Self {
            answer: Mutex::new(Some(answer)),
            events: Mutex::default(),
            progress: watch::Sender::default(),
            cancel: Notify::new(),
            streams,
        });
        keep.store_live(state, &id, Arc::clone(&live));
        tokio::spawn(Arc::clone(&live).run(state.clone(), keep, generation));
        live
    }

    async fn run(self: Arc<Self>, state: ServerState, keep: Keep, mut generation: Generation) {
        self.change(Answer::begin);
        loop {
            let next = tokio::select! {
                biased;
                () = self.cancel.notified() => {
                    self.change(|answer| answer.cancel(&generation));
                    break;
                }
                next = generation.next() => next,
            };
            match next {
                Some(Ok((_, step))) => self.change(|answer| answer.step(step, &generation)),
                Some(Err(error)) => {
                    self.change(|answer| answer.fail(&error));
                    break;
                }
                None => {
                    self.change(|answer| answer.finish(&generation));
                    break;
                }
            }
        }
        drop(generation);
        let Some(mut answer) = lock(&self.answer).take() else { return };
        answer.end();
        let last = answer.log().take();
        let kept = lock(&self.events).iter().chain(&last).map(Frame::len).sum();
        // Stored before it is said: who hears of the end can go on from it.
        keep.store_run(&state, &answer, self.streams.then(|| Arc::clone(&self)), kept);
        self.publish(last, true);
    }

    fn change(&self, change: impl FnOnce(&mut Answer)) {
        let mut events = Vec::new();
        if let Some(answer) = &mut *lock(&self.answer) {
            change(answer);
            events = answer.log().take();
        }
        self.publish(events, false);
    }

    fn publish(&self, events: Vec<Frame>, ended: bool) {
        let mut log = lock(&self.events);
        log.extend(events);
        let events = log.len();
        self.progress.send_replace(Progress { events, ended });
    }

    /// The response object as it is now; `None` when it has ended, and then the store has it.
    pub(super) fn snapshot(&self) -> Option<String> {
        lock(&self.answer).as_ref().map(|answer| frame(&answer.response()))
    }

    /// Whether its events can be followed.
    pub(super) fn streams(&self) -> bool {
        self.streams
    }

    /// Ends it, and returns when it has ended.
    pub(super) async fn cancel(&self) {
        self.cancel.notify_one();
        let mut progress = self.progress.subscribe();
        // The sender is `self`: it is there for as long as this waits.
        let _ = progress.wait_for(|progress| progress.ended).await;
    }

    /// The events from `next` on, when there are any; `None` when all have come.
    pub(super) async fn events(&self, next: usize) -> Option<Vec<Frame>> {
        let mut progress = self.progress.subscribe();
        let _ = progress.wait_for(|progress| progress.ended || progress.events > next).await;
        let events = lock(&self.events).get(next..).map(<[Frame]>::to_vec).unwrap_or_default();
        (!events.is_empty()).then_some(events)
    }
}
