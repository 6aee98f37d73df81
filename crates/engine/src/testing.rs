//! Runners and helpers for this crate's tests.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use ctxserve_backend::{
    Batch, DeviceError, KvDtype, KvGroup, KvPlan, KvSpec, SampleError, Sampled, SequenceSlice,
};
use ctxserve_core::{
    Event, FinishReason, GenerateRequest, RequestId, SamplingParams, StopCause, StopRules, TokenId, Usage,
};

use crate::{EngineHandle, EventStream, Runner, RunnerInfo};

pub(crate) const VOCAB: usize = 61;
pub(crate) const EOS: TokenId = 0;

/// A layout with one full group and, with a window, one windowed group before it.
pub(crate) fn spec(page_size: usize, window: Option<usize>) -> KvSpec {
    let mut groups = vec![KvGroup { window: None, layers: vec![1] }];
    if window.is_some() {
        groups.insert(0, KvGroup { window, layers: vec![0] });
    }
    KvSpec { page_size, kv_heads: 1, head_dim: 1, groups, dtype: KvDtype::F32 }
}

pub(crate) fn request(id: u64, prompt: &[TokenId], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        id: RequestId(id),
        prompt: prompt.into(),
        sampling: SamplingParams::greedy(),
        stop: StopRules { eos: [EOS].into(), ..StopRules::default() },
        max_tokens,
    }
}

/// A token that depends on everything a query sees, in every group.
struct Hash(u64);

impl Hash {
    fn add(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }

    fn token(&self, banned: &[TokenId]) -> TokenId {
        let first = self.0 % VOCAB as u64;
        let candidates = (0..VOCAB as u64).map(|i| ((first + i) % VOCAB as u64) as TokenId);
        candidates.into_iter().find(|id| !banned.contains(id)).unwrap()
    }
}

/// What [`PagedEchoRunner`] answers to a request when nothing goes wrong, worked out from the history itself.
pub(crate) fn expected(spec: &KvSpec, request: &GenerateRequest, max_model_len: usize) -> Answer {
    let mut history = request.prompt.to_vec();
    let mut tokens = Vec::new();
    let limit = request.max_tokens.min(max_model_len - history.len());
    let reason = loop {
        if tokens.len() >= limit {
            break FinishReason::Length;
        }
        let mut hash = Hash(0);
        let last = history.len() - 1;
        for group in 0..spec.groups.len() {
            (spec.first_visible(group, last)..=last).for_each(|at| hash.add(u64::from(history[at])));
        }
        let early = tokens.len() < request.sampling.min_tokens;
        let banned: Vec<_> = if early { request.stop.all().collect() } else { Vec::new() };
        let id = hash.token(&banned);
        tokens.push(id);
        history.push(id);
        if !early && request.stop.stops_on(id) {
            break FinishReason::Stop(StopCause::Eos(id));
        }
    };
    let usage = Usage { prompt: request.prompt.len(), cached: 0, generated: tokens.len() };
    Answer { admitted: 1, tokens, end: Some((reason, usage)) }
}

/// Keeps every token in the page and slot that the page table names, and hashes what it reads back through the table
/// into the next token. A wrong table, an early release or a shared page shows as a foreign or missing entry.
#[derive(Debug)]
pub(crate) struct PagedEchoRunner {
    info: RunnerInfo,
    pages: Vec<usize>,
    /// Per group and slot: the sequence, position and token written last.
    slots: Vec<Vec<Option<(u64, usize, TokenId)>>>,
}

impl PagedEchoRunner {
    pub(crate) fn new(spec: KvSpec, max_context: usize) -> Self {
        let info = RunnerInfo { vocab_size: VOCAB, max_context, kv: spec, description: "echo".to_owned() };
        Self { info, pages: Vec::new(), slots: Vec::new() }
    }

    fn slot(&self, slice: &SequenceSlice, group: usize, position: usize) -> Result<usize, DeviceError> {
        let page_size = self.info.kv.page_size;
        let place = slice.tables[group].locate(position, page_size);
        let (page, slot) = place.ok_or_else(|| DeviceError::new("echo", "no page"))?;
        Ok(page as usize * page_size + slot)
    }

    /// Reads every position that a query at `position` sees.
    fn read(&self, slice: &SequenceSlice, position: usize) -> Result<Hash, DeviceError> {
        let mut hash = Hash(0);
        for group in 0..self.slots.len() {
            for seen in self.info.kv.first_visible(group, position)..=position {
                match self.slots[group][self.slot(slice, group, seen)?] {
                    Some((key, at, token)) if (key, at) == (slice.key, seen) => hash.add(u64::from(token)),
                    found => {
                        let key = slice.key;
                        let what = format!("group {group}: {found:?} in place of {seen} of {key}");
                        return Err(DeviceError::new("echo", what));
                    }
                }
            }
        }
        Ok(hash)
    }
}

impl Runner for PagedEchoRunner {
    fn info(&self) -> &RunnerInfo {
        &self.info
    }

    fn allocate(&mut self, plan: &KvPlan) -> Result<(), DeviceError> {
        self.pages.clone_from(&plan.pages);
        self.slots = plan.pages.iter().map(|pages| vec![None; pages * plan.spec.page_size]).collect();
        Ok(())
    }

    fn step(&mut self, batch: &Batch) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        batch
            .check(&self.info.kv, &self.pages, VOCAB)
            .map_err(|error| DeviceError::new("check", error.to_string()))?;
        // As on a device: all writes, then all reads.
        for slice in &batch.sequences {
            for (offset, &token) in batch.tokens[slice.rows.clone()].iter().enumerate() {
                for group in 0..self.slots.len() {
                    let slot = self.slot(slice, group, slice.start + offset)?;
                    self.slots[group][slot] = Some((slice.key, slice.start + offset, token));
                }
            }
        }
        let mut sampled = Vec::new();
        for slice in &batch.sequences {
            self.read(slice, slice.start)?;
            let hash = self.read(slice, slice.start + slice.rows.len() - 1)?;
            if let Some(row) = &slice.sample {
                sampled.push(Ok(Sampled { id: hash.token(&row.banned), logprobs: None }));
            }
        }
        Ok(sampled)
    }
}

/// What happens in a step instead of the inner runner's answer.
pub(crate) type Twist = Box<
    dyn FnMut(
            &Batch,
            Vec<Result<Sampled, SampleError>>,
        ) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError>
        + Send,
>;

/// A runner that takes a step only when the test permits it, records what was asked, and can be made to misbehave.
pub(crate) struct GatedRunner {
    inner: PagedEchoRunner,
    permits: Receiver<()>,
    log: Arc<Mutex<Vec<BTreeMap<u64, usize>>>>,
    twist: Option<Twist>,
}

/// The test's side of a [`GatedRunner`]. Dropping it opens the gate for good.
pub(crate) struct Gate {
    permits: Sender<()>,
    log: Arc<Mutex<Vec<BTreeMap<u64, usize>>>>,
}

impl Gate {
    /// Lets `count` steps through.
    pub(crate) fn permit(&self, count: usize) {
        (0..count).for_each(|_| self.permits.send(()).unwrap());
    }

    /// Rows per sequence of every step begun so far.
    pub(crate) fn log(&self) -> Vec<BTreeMap<u64, usize>> {
        self.log.lock().unwrap().clone()
    }

    /// Waits until `count` steps have begun.
    pub(crate) fn wait_for_steps(&self, count: usize) {
        until(|| self.log.lock().unwrap().len() >= count);
    }
}

impl GatedRunner {
    pub(crate) fn gated(inner: PagedEchoRunner, twist: Option<Twist>) -> (Gate, Box<dyn Runner>) {
        let (permits, receiver) = channel();
        let log = Arc::<Mutex<Vec<_>>>::default();
        let gate = Gate { permits, log: Arc::clone(&log) };
        (gate, Box::new(Self { inner, permits: receiver, log, twist }))
    }
}

impl Runner for GatedRunner {
    fn info(&self) -> &RunnerInfo {
        self.inner.info()
    }

    fn allocate(&mut self, plan: &KvPlan) -> Result<(), DeviceError> {
        self.inner.allocate(plan)
    }

    fn step(&mut self, batch: &Batch) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        let rows = batch.sequences.iter().map(|slice| (slice.key, slice.rows.len())).collect();
        self.log.lock().unwrap().push(rows);
        let _ = self.permits.recv();
        let answer = self.inner.step(batch)?;
        match &mut self.twist {
            Some(twist) => twist(batch, answer),
            None => Ok(answer),
        }
    }
}

/// All that one stream said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) admitted: usize,
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) end: Option<(FinishReason, Usage)>,
}

impl Answer {
    pub(crate) fn take(&mut self, event: Event) {
        assert_eq!(self.end, None, "an event after the end: {event:?}");
        match event {
            Event::Admitted => {
                assert!(self.tokens.is_empty(), "admitted after a token");
                self.admitted += 1;
            }
            Event::Token(token) => self.tokens.push(token.id),
            Event::Finished { reason, usage } => self.end = Some((reason, usage)),
        }
    }

    /// Reads a stream to its end.
    pub(crate) fn of(mut stream: EventStream) -> Self {
        let mut answer = Self::default();
        while let Some(event) = stream.blocking_next() {
            answer.take(event);
        }
        answer
    }

    pub(crate) fn reason(&self) -> &FinishReason {
        &self.end.as_ref().unwrap().0
    }
}

/// Waits for a condition that another thread brings about.
pub(crate) fn until(mut condition: impl FnMut() -> bool) {
    while !condition() {
        std::thread::yield_now();
    }
}

/// Waits until nothing is in flight and checks that no page is held.
pub(crate) fn assert_idle(engine: &EngineHandle) {
    until(|| {
        let snapshot = engine.snapshot();
        snapshot.running + snapshot.waiting == 0 && snapshot.step_age.is_zero()
    });
    let snapshot = engine.snapshot();
    assert!(snapshot.used_pages.iter().all(|&used| used == 0), "{snapshot:?}");
    assert_eq!(snapshot.waiting_tokens, 0);
}
