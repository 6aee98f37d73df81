//! The engine thread: receive, schedule, launch, collect, commit.

use std::any::Any;
use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ctxserve_backend::{Batch, SampleError, Sampled};
use ctxserve_core::FinishReason;

use crate::Runner;
use crate::guides::Guides;
use crate::scheduler::{Launched, Scheduler, Step};
use crate::sequence::{Ending, Sequence};
use crate::shared::{Inbox, Published, Shared, Submission};

/// How long a step may wait for constraints that are about to answer: a mask takes less as a rule, and a row that misses
/// the step is a whole step late. With two steps in flight the device is busy meanwhile.
const PATIENCE: Duration = Duration::from_micros(200);

/// How long the thread sleeps for constraints at most, with nothing else to do, before it looks for arrivals.
const NAP: Duration = Duration::from_millis(5);

/// Everything that lives on the engine thread.
pub(crate) struct Driver {
    runner: Box<dyn Runner>,
    /// Most steps in flight: with 2 the device has the next step at hand when it ends one, and the host schedules and
    /// commits meanwhile.
    depth: usize,
    scheduler: Scheduler,
    /// Steps in flight, oldest first.
    in_flight: VecDeque<Launched>,
    /// The step being launched; empty in between, its memory is kept.
    batch: Batch,
    /// Where constraints are asked.
    guides: Guides,
    shared: Arc<Shared>,
    seeds: Seeds,
    pace: Pace,
    /// When the last step ended or work arrived; `None` when idle.
    beat: Option<Instant>,
}

impl Driver {
    /// A driver whose runner has its KV pools.
    pub(crate) fn new(runner: Box<dyn Runner>, scheduler: Scheduler, shared: Arc<Shared>) -> Self {
        Self {
            depth: runner.steps_in_flight().max(1),
            runner,
            scheduler,
            in_flight: VecDeque::new(),
            batch: Batch::default(),
            guides: Guides::new(),
            shared,
            seeds: Seeds::new(),
            pace: Pace::default(),
            beat: None,
        }
    }

    /// The thread's body. Whatever happens in it, every stream gets its end and the state tells why.
    pub(crate) fn main(mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.run()))
            .unwrap_or_else(|payload| Err(format!("panic: {}", panic_text(payload.as_ref()))));
        let reason = match &outcome {
            Ok(()) => FinishReason::Abort,
            Err(fault) => {
                tracing::error!(fault, "the engine failed");
                FinishReason::Fault(fault.clone())
            }
        };
        let late = self.shared.end(outcome);
        late.into_iter().for_each(|submission| self.enqueue(submission));
        let endings = self.scheduler.end_all(&reason);
        self.tell(endings);
        let Self { runner, shared, .. } = self;
        if reason == FinishReason::Abort {
            // Whoever awaits an orderly stop finds the device free.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(runner)));
        } else {
            // A failed device may never let go: it is dropped by the process's end.
            std::mem::forget(runner);
        }
        shared.announce_end();
    }

    /// Steps until drained.
    fn run(&mut self) -> Result<(), String> {
        while self.receive() {
            self.advise(PATIENCE);
            let step = self.scheduler.schedule();
            let wait = step.is_empty();
            if !wait {
                self.launch(step)?;
            }
            if wait && self.in_flight.is_empty() && self.guides.is_pending() {
                self.advise(NAP);
            } else if wait || self.in_flight.len() >= self.depth {
                let (step, outcomes) = self.collect()?;
                self.commit(step, outcomes);
            }
        }
        Ok(())
    }

    /// Asks constraints what comes next and takes what they answer within `wait`.
    fn advise(&mut self, wait: Duration) {
        self.scheduler.take_questions().into_iter().for_each(|question| self.guides.ask(question));
        let until = Instant::now() + if self.scheduler.has_held() { wait } else { Duration::ZERO };
        let mut endings = Vec::new();
        while let Some(answer) = self.guides.next(until.saturating_duration_since(Instant::now())) {
            endings.extend(self.scheduler.guide(answer));
        }
        if !endings.is_empty() {
            self.tell(endings);
        }
    }

    /// Hands a step to the runner, which may still be busy with the one before.
    fn launch(&mut self, step: Step) -> Result<(), String> {
        self.tell(Vec::new());
        self.scheduler.describe(&step, &mut self.batch);
        self.runner.launch(&self.batch).map_err(|error| error.to_string())?;
        self.batch.clear();
        self.in_flight.push_back(self.scheduler.launched(step));
        Ok(())
    }

    /// Waits for the oldest step in flight.
    fn collect(&mut self) -> Result<(Launched, Vec<Result<Sampled, SampleError>>), String> {
        let step = self.in_flight.pop_front().ok_or("the scheduler found no work in its queue")?;
        let outcomes = self.runner.collect().map_err(|error| error.to_string())?;
        if outcomes.len() != step.rows() {
            return Err(format!("the model answered {} of {} rows", outcomes.len(), step.rows()));
        }
        Ok((step, outcomes))
    }

    /// Delivers what a step sampled, and the ends.
    fn commit(&mut self, step: Launched, outcomes: Vec<Result<Sampled, SampleError>>) {
        let endings = self.scheduler.commit(step, outcomes);
        let now = Instant::now();
        self.beat = Some(now);
        self.pace.finished(endings.len(), now);
        self.tell(endings);
    }

    /// Whether there is no sequence, and no step in flight that was launched for one.
    fn is_idle(&self) -> bool {
        self.scheduler.is_idle() && self.in_flight.is_empty()
    }

    /// Takes arrivals and cancellations. Sleeps while there is no work; false when drained.
    fn receive(&mut self) -> bool {
        loop {
            let idle = self.is_idle();
            if idle {
                self.rest();
            }
            let Inbox { arrivals, abort, draining, resets, .. } = self.shared.take(idle);
            arrivals.into_iter().for_each(|submission| self.enqueue(submission));
            let endings = if abort { self.scheduler.end_all(&FinishReason::Abort) } else { Vec::new() };
            self.scheduler.drop_cancelled();
            if !resets.is_empty() {
                self.scheduler.pools().reset();
                self.tell(Vec::new());
                resets.into_iter().for_each(|done| _ = done.send(()));
            }
            let busy = !self.is_idle();
            if busy {
                self.beat.get_or_insert_with(Instant::now);
            }
            self.tell(endings);
            if busy || draining {
                return busy;
            }
        }
    }

    /// Idle: nothing may hold a page.
    fn rest(&mut self) {
        self.beat = None;
        self.pace.pause();
        let used = self.scheduler.pools().used();
        if used.iter().any(|&used| used > 0) {
            tracing::error!(?used, "the KV cache lost count of its pages");
        }
        // It walks the whole prefix tree, which takes milliseconds.
        if cfg!(debug_assertions)
            && let Err(error) = self.scheduler.check()
        {
            tracing::error!(%error, "the KV cache lost count of its pages");
        }
        self.tell(Vec::new());
    }

    fn enqueue(&mut self, submission: Submission) {
        let lease = self.scheduler.pools().lease();
        let sequence = Sequence::new(submission, lease, self.seeds.draw(), self.shared.info.vocab_size);
        self.scheduler.push(sequence);
    }

    /// Publishes, then delivers the ends: who has seen an end finds its pages free.
    fn tell(&self, endings: Vec<Ending>) {
        *self.shared.published() = Published {
            running: self.scheduler.running(),
            used_pages: self.scheduler.pools().used(),
            kept_pages: self.scheduler.pools().kept(),
            counters: self.scheduler.counters(),
            beat: self.beat,
            finish_interval: self.pace.interval,
        };
        endings.into_iter().for_each(Ending::send);
    }
}

/// How fast sequences finish while there is work.
#[derive(Debug, Default)]
struct Pace {
    /// Smoothed seconds from one finished sequence to the next; 0 before the first.
    interval: f64,
    last: Option<Instant>,
}

impl Pace {
    fn finished(&mut self, count: usize, now: Instant) {
        let last = *self.last.get_or_insert(now);
        if count > 0 {
            let each = now.duration_since(last).as_secs_f64() / count as f64;
            self.interval = if self.interval == 0.0 { each } else { 0.8 * self.interval + 0.2 * each };
            self.last = Some(now);
        }
    }

    /// Idle time is not work time.
    fn pause(&mut self) {
        self.last = None;
    }
}

/// Seeds for requests that name none: SplitMix64 (Steele, Lea, Flood 2014) from a random start.
#[derive(Debug)]
struct Seeds(u64);

impl Seeds {
    fn new() -> Self {
        // The standard library seeds its hashers from the operating system.
        Self(RandomState::new().build_hasher().finish())
    }

    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_pace_is_that_of_busy_times() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut pace = Pace::default();
        pace.finished(0, at(0));
        pace.finished(1, at(2));
        assert_eq!(pace.interval, 2.0);
        pace.finished(4, at(6));
        assert!((pace.interval - 1.8).abs() < 1e-9, "{}", pace.interval);
        pace.pause();
        pace.finished(0, at(1000));
        pace.finished(1, at(1001));
        assert!((pace.interval - 1.64).abs() < 1e-9, "{}", pace.interval);
    }

    #[test]
    fn drawn_seeds_differ() {
        let (mut one, mut other) = (Seeds::new(), Seeds::new());
        let mut drawn: Vec<_> = (0..100).flat_map(|_| [one.draw(), other.draw()]).collect();
        drawn.sort_unstable();
        drawn.dedup();
        assert_eq!(drawn.len(), 200);
    }
}
