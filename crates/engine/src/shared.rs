//! What the driver and its handles share.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ctxserve_core::{Event, GenerateRequest};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{oneshot, watch};

use crate::queue::{Occupancy, Ticket};
use crate::{EngineInfo, PrefixCounts};

/// Where the engine is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineState {
    /// Takes requests.
    Running,
    /// Finishes what it has, refuses more.
    Draining,
    /// Drained; the thread is gone.
    Stopped,
    /// The device failed; the thread is gone.
    Faulted(String),
}

/// The engine at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Where it is in its life.
    pub state: EngineState,
    /// Sequences being computed.
    pub running: usize,
    /// Sequences accepted and not running, preempted ones included.
    pub waiting: usize,
    /// Prompt tokens whose prefill has not begun.
    pub waiting_tokens: usize,
    /// Pages in use of each KV group.
    pub used_pages: Vec<usize>,
    /// Pages of each KV group.
    pub total_pages: Vec<usize>,
    /// Prompt tokens of sequences whose prefill has begun, since start.
    pub prompt_tokens: u64,
    /// Tokens sampled since start.
    pub generation_tokens: u64,
    /// Sequences that ended by themselves since start: stop, length or error.
    pub finished: u64,
    /// Sequences that were cancelled since start.
    pub aborted: u64,
    /// Times a sequence gave its pages to an older one, since start.
    pub preemptions: u64,
    /// Steps since start.
    pub steps: u64,
    /// Pages of each KV group that are kept for later prompts and that no sequence uses. They count as free.
    pub kept_pages: Vec<usize>,
    /// What the prefix cache knew of prompts.
    pub prefixes: PrefixCounts,
    /// While there is work, time since the last step ended or the work arrived; zero when idle. A device that hangs
    /// shows here, and neither a long queue nor a long prompt does.
    pub step_age: Duration,
}

/// An accepted request on its way to the driver.
#[derive(Debug)]
pub(crate) struct Submission {
    pub(crate) key: u64,
    pub(crate) request: GenerateRequest,
    /// Most tokens to generate, at least 1: `max_tokens` or what the context leaves.
    pub(crate) limit: usize,
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) ticket: Ticket,
}

/// What the driver takes at the start of a step.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    pub(crate) arrivals: Vec<Submission>,
    /// Finish what there is and take no more.
    pub(crate) draining: bool,
    /// End everything that has been submitted so far.
    pub(crate) abort: bool,
    /// Who waits for the prefix cache to be emptied.
    pub(crate) resets: Vec<oneshot::Sender<()>>,
    /// The driver has ended, with its fault if there was one.
    pub(crate) ended: Option<Result<(), String>>,
    /// The next submission's key.
    pub(crate) next_key: u64,
}

/// What the driver tells at the end of a step.
#[derive(Clone, Debug, Default)]
pub(crate) struct Published {
    pub(crate) running: usize,
    pub(crate) used_pages: Vec<usize>,
    pub(crate) kept_pages: Vec<usize>,
    pub(crate) counters: Counters,
    /// When the last step ended or work arrived; `None` when idle.
    pub(crate) beat: Option<Instant>,
    /// Smoothed seconds from one finished sequence to the next.
    pub(crate) finish_interval: f64,
}

/// Totals since start.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) prompt_tokens: u64,
    pub(crate) generation_tokens: u64,
    pub(crate) finished: u64,
    pub(crate) aborted: u64,
    pub(crate) preemptions: u64,
    pub(crate) steps: u64,
    pub(crate) prefixes: PrefixCounts,
}

/// State of one engine outside its thread.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) info: EngineInfo,
    pub(crate) occupancy: Arc<Occupancy>,
    inbox: Mutex<Inbox>,
    wake: Condvar,
    published: Mutex<Published>,
    ended: watch::Sender<bool>,
}

impl Shared {
    pub(crate) fn new(info: EngineInfo) -> Self {
        let (used_pages, kept_pages) = (vec![0; info.kv.groups.len()], vec![0; info.kv.groups.len()]);
        Self {
            info,
            occupancy: Arc::default(),
            inbox: Mutex::default(),
            wake: Condvar::new(),
            published: Mutex::new(Published { used_pages, kept_pages, ..Published::default() }),
            ended: watch::Sender::new(false),
        }
    }

    /// Both locks guard plain values that are whole after every statement, so a poisoned one is still good.
    pub(crate) fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn published(&self) -> MutexGuard<'_, Published> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the inbox and wakes the driver.
    pub(crate) fn post<T>(&self, change: impl FnOnce(&mut Inbox) -> T) -> T {
        let result = change(&mut self.inbox());
        self.wake.notify_one();
        result
    }

    /// Takes what has arrived. With `block` it sleeps until there is something.
    pub(crate) fn take(&self, block: bool) -> Inbox {
        let mut inbox = self.inbox();
        while block && inbox.arrivals.is_empty() && !inbox.abort && !inbox.draining && inbox.resets.is_empty()
        {
            inbox = self.wake.wait(inbox).unwrap_or_else(PoisonError::into_inner);
        }
        Inbox {
            arrivals: std::mem::take(&mut inbox.arrivals),
            draining: inbox.draining,
            abort: std::mem::take(&mut inbox.abort),
            resets: std::mem::take(&mut inbox.resets),
            ..Inbox::default()
        }
    }

    /// The driver is gone. Returns what arrived after its last look; later submissions are refused.
    pub(crate) fn end(&self, outcome: Result<(), String>) -> Vec<Submission> {
        let mut inbox = self.inbox();
        inbox.ended = Some(outcome);
        inbox.resets.clear();
        std::mem::take(&mut inbox.arrivals)
    }

    /// Lets [`Shared::wait_ended`] return.
    pub(crate) fn announce_end(&self) {
        self.ended.send_replace(true);
    }

    pub(crate) async fn wait_ended(&self) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    pub(crate) fn state(&self) -> EngineState {
        let inbox = self.inbox();
        match &inbox.ended {
            Some(Err(reason)) => EngineState::Faulted(reason.clone()),
            Some(Ok(())) => EngineState::Stopped,
            None if inbox.draining => EngineState::Draining,
            None => EngineState::Running,
        }
    }

    pub(crate) fn snapshot(&self) -> Snapshot {
        let state = self.state();
        let Published { running, used_pages, kept_pages, counters, beat, .. } = self.published().clone();
        Snapshot {
            state,
            running,
            waiting: self.occupancy.sequences().saturating_sub(running),
            waiting_tokens: self.occupancy.queued_tokens(),
            used_pages,
            total_pages: self.info.kv.groups.iter().map(|group| group.pages).collect(),
            prompt_tokens: counters.prompt_tokens,
            generation_tokens: counters.generation_tokens,
            finished: counters.finished,
            aborted: counters.aborted,
            preemptions: counters.preemptions,
            steps: counters.steps,
            kept_pages,
            prefixes: counters.prefixes,
            step_age: beat.map_or(Duration::ZERO, |beat| beat.elapsed()),
        }
    }
}
