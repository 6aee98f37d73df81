//! Runners and helpers for this crate's tests.

use std::collections::{BTreeMap, VecDeque};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use ctxserve_backend::{
    Batch, DeviceError, KvDtype, KvGroup, KvPlan, KvSpec, SampleError, Sampled, SequenceSlice,
};
use ctxserve_core::{
    Allowed, Constraint, ConstraintError, Event, FinishReason, GenerateRequest, Guide, RequestId,
    SamplingParams, StopCause, StopRules, TokenId, TokenMask, Usage,
};

use crate::{EngineHandle, EventStream, Runner, RunnerInfo};

pub(crate) const VOCAB: usize = 61;
pub(crate) const EOS: TokenId = 0;

/// A layout with one full group and, with a window, one windowed group before it.
pub(crate) fn spec(page_size: usize, window: Option<usize>) -> KvSpec {
    let mut groups = vec![KvGroup { window: None, layers: vec![1], dtype: KvDtype::F32 }];
    if window.is_some() {
        groups.insert(0, KvGroup { window, layers: vec![0], dtype: KvDtype::F32 });
    }
    KvSpec { page_size, kv_heads: 1, head_dim: 1, groups }
}

pub(crate) fn request(id: u64, prompt: &[TokenId], max_tokens: usize) -> GenerateRequest {
    GenerateRequest {
        id: RequestId(id),
        prompt: prompt.into(),
        sampling: SamplingParams::greedy(),
        stop: StopRules { eos: [EOS].into(), ..StopRules::default() },
        max_tokens,
        guide: None,
        salt: None,
    }
}

/// A constraint that makes use of all that constraints may say, and is settled after so many tokens.
#[derive(Clone, Debug)]
pub(crate) struct Moody {
    last: TokenId,
    left: usize,
}

impl Moody {
    pub(crate) fn guide(left: usize) -> Guide {
        Guide::new(Box::new(Self { last: 2, left })).unwrap()
    }
}

impl Constraint for Moody {
    fn allowed(&mut self) -> Result<Allowed, ConstraintError> {
        Ok(match self.last % 4 {
            _ if self.left == 0 => Allowed::Except([EOS, 9, 10].into()),
            0 => Allowed::Any,
            1 => Allowed::Except([self.last, 5].into()),
            _ => {
                let mut mask = TokenMask::none(VOCAB);
                (0..VOCAB as TokenId)
                    .filter(|id| (id + self.last).is_multiple_of(3))
                    .for_each(|id| mask.allow(id));
                Allowed::Only(Arc::new(mask))
            }
        })
    }

    fn accept(&mut self, id: TokenId) -> Result<(), ConstraintError> {
        (self.last, self.left) = (id, self.left.saturating_sub(1));
        Ok(())
    }

    fn is_quick(&self, id: TokenId) -> bool {
        id.is_multiple_of(2)
    }

    fn is_settled(&self) -> bool {
        self.left == 0
    }

    fn fork(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

/// A token that depends on everything a query sees, in every group.
struct Hash(u64);

impl Hash {
    fn add(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 ^= self.0 >> 29;
    }

    fn token(&self, banned: &[TokenId], mask: Option<&TokenMask>) -> TokenId {
        let first = self.0 % VOCAB as u64;
        let candidates = (0..VOCAB as u64).map(|i| ((first + i) % VOCAB as u64) as TokenId);
        candidates.into_iter().find(|id| !banned.contains(id) && mask.is_none_or(|m| m.allows(*id))).unwrap()
    }
}

/// A hash of a token and of those before it, whose hash is `before`.
fn chained(before: Option<u64>, token: TokenId) -> u64 {
    let mut hash = Hash(before.unwrap_or(1));
    hash.add(u64::from(token) + 1);
    hash.0
}

/// What [`PagedEchoRunner`] answers to a request when nothing goes wrong, worked out from the history itself.
pub(crate) fn expected(spec: &KvSpec, request: &GenerateRequest, max_model_len: usize) -> Answer {
    let mut history = request.prompt.to_vec();
    let mut tokens = Vec::new();
    let mut guide = request.guide.clone();
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
        let mut banned: Vec<_> = if early { request.stop.all().collect() } else { Vec::new() };
        let mut mask = None;
        match guide.as_ref().map(|guide| guide.first.clone()) {
            Some(Allowed::Except(ids)) => banned.extend(ids.iter()),
            Some(Allowed::Only(ids)) => mask = Some(ids),
            Some(Allowed::Any) | None => {}
        }
        let id = hash.token(&banned, mask.as_deref());
        if let Some(guide) = guide.as_mut().filter(|guide| !guide.constraint.is_settled()) {
            guide.constraint.accept(id).unwrap();
            guide.first = guide.constraint.allowed().unwrap();
        }
        tokens.push(id);
        history.push(id);
        if !early && request.stop.stops_on(id) {
            let eos = !request.stop.ignore_eos && request.stop.eos.contains(&id);
            break FinishReason::Stop(if eos { StopCause::Eos(id) } else { StopCause::TokenId(id) });
        }
    };
    let usage = Usage { prompt: request.prompt.len(), cached: 0, generated: tokens.len() };
    Answer { admitted: 1, tokens, end: Some((reason, usage)) }
}

/// Keeps every token in the page and slot that the page table names, and hashes what it reads back through the table
/// into the next token. A wrong table, an early release or a shared page shows as a foreign or missing entry.
///
/// It computes a step when it is launched and hands the outcomes over when it is collected: like a device whose steps
/// run one after the other, behind the host's back.
#[derive(Debug)]
pub(crate) struct PagedEchoRunner {
    info: RunnerInfo,
    pages: Vec<usize>,
    /// Per group and slot: a hash of all tokens up to here, and position and token, as written last.
    slots: Vec<Vec<Option<(u64, usize, TokenId)>>>,
    depth: usize,
    /// Outcomes of the steps in flight, oldest first.
    in_flight: VecDeque<Vec<Result<Sampled, SampleError>>>,
    /// What the sampling rows of the step launched last picked, and for whom.
    last: Vec<(u64, TokenId)>,
}

impl PagedEchoRunner {
    /// One that takes `depth` steps before the oldest is collected.
    pub(crate) fn new(spec: KvSpec, max_context: usize, depth: usize) -> Self {
        let info = RunnerInfo { vocab_size: VOCAB, max_context, kv: spec, description: "echo".to_owned() };
        let (in_flight, last) = (VecDeque::new(), Vec::new());
        Self { info, pages: Vec::new(), slots: Vec::new(), depth, in_flight, last }
    }

    /// The input ids of a slice: the batch's own, or what the row that feeds it picked.
    fn inputs(&self, slice: &SequenceSlice, batch: &Batch) -> Result<Vec<TokenId>, DeviceError> {
        let Some(row) = slice.feed else { return Ok(batch.tokens[slice.rows.clone()].to_vec()) };
        match self.last.get(row) {
            Some(&(key, id)) if key == slice.key => Ok(vec![id]),
            found => Err(DeviceError::new("feed", format!("{} is fed by {found:?}", slice.key))),
        }
    }

    fn slot(&self, slice: &SequenceSlice, group: usize, position: usize) -> Result<usize, DeviceError> {
        let page_size = self.info.kv.page_size;
        let place = slice.tables[group].locate(position, page_size);
        let (page, slot) = place.ok_or_else(|| DeviceError::new("echo", "no page"))?;
        Ok(page as usize * page_size + slot)
    }

    /// The hash of all tokens up to a position, as the last group has it, which sees everything.
    fn history(&self, slice: &SequenceSlice, position: usize) -> Result<u64, DeviceError> {
        let last = self.slots.len() - 1;
        match self.slots[last][self.slot(slice, last, position)?] {
            Some((chain, at, _)) if at == position => Ok(chain),
            found => Err(DeviceError::new("echo", format!("{found:?} before {position} of {}", slice.key))),
        }
    }

    /// Reads every position that a query at `position` sees.
    fn read(&self, slice: &SequenceSlice, position: usize) -> Result<Hash, DeviceError> {
        let mut hash = Hash(0);
        for group in 0..self.slots.len() {
            for seen in self.info.kv.first_visible(group, position)..=position {
                // Sequences with the same tokens may share pages, so it is their history that has to be right.
                let before = if seen > 0 { Some(self.history(slice, seen - 1)?) } else { None };
                match self.slots[group][self.slot(slice, group, seen)?] {
                    Some((chain, at, token)) if at == seen && chain == chained(before, token) => {
                        hash.add(u64::from(token));
                    }
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

    fn steps_in_flight(&self) -> usize {
        self.depth
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        if self.in_flight.len() >= self.depth {
            return Err(DeviceError::new("launch", format!("{} steps are in flight", self.depth)));
        }
        batch
            .check(&self.info.kv, &self.pages, VOCAB)
            .map_err(|error| DeviceError::new("check", error.to_string()))?;
        // As on a device: all writes, then all reads.
        for slice in &batch.sequences {
            for (offset, token) in self.inputs(slice, batch)?.into_iter().enumerate() {
                let before = (slice.start + offset).checked_sub(1);
                let before = before.map(|at| self.history(slice, at)).transpose()?;
                let chain = chained(before, token);
                for group in 0..self.slots.len() {
                    let slot = self.slot(slice, group, slice.start + offset)?;
                    self.slots[group][slot] = Some((chain, slice.start + offset, token));
                }
            }
        }
        let mut picked = Vec::new();
        for slice in &batch.sequences {
            self.read(slice, slice.start)?;
            let hash = self.read(slice, slice.start + slice.rows.len() - 1)?;
            if let Some(row) = &slice.sample {
                picked.push((slice.key, hash.token(&row.banned, row.mask.as_deref())));
            }
        }
        let outcomes = picked.iter().map(|&(_, id)| Ok(Sampled { id, logprobs: None })).collect();
        self.in_flight.push_back(outcomes);
        self.last = picked;
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        let oldest = self.in_flight.pop_front();
        oldest.ok_or_else(|| DeviceError::new("collect", "no step is in flight"))
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

/// A runner that ends a step only when the test permits it, records what was asked, and can be made to misbehave.
pub(crate) struct GatedRunner {
    inner: PagedEchoRunner,
    permits: Receiver<()>,
    log: Arc<Mutex<Vec<BTreeMap<u64, usize>>>>,
    twist: Option<Twist>,
    /// Batches of the steps in flight, oldest first.
    batches: VecDeque<Batch>,
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
        (gate, Box::new(Self { inner, permits: receiver, log, twist, batches: VecDeque::new() }))
    }
}

impl Runner for GatedRunner {
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
        let rows = batch.sequences.iter().map(|slice| (slice.key, slice.rows.len())).collect();
        self.log.lock().unwrap().push(rows);
        self.batches.push_back(batch.clone());
        self.inner.launch(batch)
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        let _ = self.permits.recv();
        let answer = self.inner.collect()?;
        let batch = self.batches.pop_front().unwrap_or_default();
        match &mut self.twist {
            Some(twist) => twist(&batch, answer),
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

    /// Without what it found in the prefix cache, which does not change what it says.
    pub(crate) fn plain(mut self) -> Self {
        self.end.iter_mut().for_each(|(_, usage)| usage.cached = 0);
        self
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
