//! A runner that speaks from a script: end-to-end tests of odd model behaviour, without a model.

use std::collections::{HashMap, VecDeque};
use std::thread;
use std::time::Duration;

use ctxserve_backend::{
    Batch, DeviceError, KvDtype, KvGroup, KvPlan, KvSpec, SampleError, SampleRow, Sampled, SequenceSlice,
};
use ctxserve_core::{TokenId, TokenLogprob, TokenLogprobs};

use crate::{Runner, RunnerInfo};

/// Answers the k-th submitted sequence with line `k % lines`, whatever was asked, and ends with
/// [`SampleError::ScriptEnded`] where the line does. Where a mask forbids what the line says next, it says the lowest id
/// that is allowed, and tries again behind that.
#[derive(Clone, Debug)]
pub struct ScriptedRunner {
    info: RunnerInfo,
    lines: Vec<Vec<TokenId>>,
    pace: Duration,
    depth: usize,
    /// Answers of the steps in flight, oldest first.
    in_flight: VecDeque<Vec<Result<Sampled, SampleError>>>,
    /// Sequence and draw of each sampling row of the step launched last.
    last: Vec<(u64, u64)>,
    /// Of each sequence, tokens that it had to say beside its line.
    strayed: HashMap<u64, u64>,
}

impl ScriptedRunner {
    /// A runner with logits of width `vocab_size` and `max_context` positions. Without lines every answer is empty.
    pub fn new(vocab_size: usize, max_context: usize, lines: Vec<Vec<TokenId>>) -> Self {
        let groups = vec![KvGroup { window: None, layers: vec![0], dtype: KvDtype::Bf16 }];
        let kv = KvSpec { page_size: 16, kv_heads: 1, head_dim: 1, groups };
        let description = format!("script of {} answers", lines.len());
        let info = RunnerInfo { vocab_size, max_context, kv, description };
        let (in_flight, last) = (VecDeque::new(), Vec::new());
        let strayed = HashMap::new();
        Self { info, lines, pace: Duration::ZERO, depth: 1, in_flight, last, strayed }
    }

    /// Plays a device that takes `depth` steps, at least 1, before the oldest is collected.
    #[must_use]
    pub fn with_steps_in_flight(mut self, depth: usize) -> Self {
        self.depth = depth.max(1);
        self
    }

    /// Makes every step take at least `pace`, so that a test can act while an answer is under way.
    #[must_use]
    pub fn with_pace(mut self, pace: Duration) -> Self {
        self.pace = pace;
        self
    }

    /// A fed row must continue the very sequence whose next token the row before it draws.
    fn check_feed(&self, slice: &SequenceSlice) -> Result<(), DeviceError> {
        let Some(row) = slice.feed else { return Ok(()) };
        let draws = slice.sample.as_ref().map(|sample| (slice.key, sample.step));
        match self.last.get(row) {
            Some(&(key, step)) if draws == Some((key, step + 1)) && slice.rows.len() == 1 => Ok(()),
            found => Err(DeviceError::new("feed", format!("{draws:?} is fed by {found:?}"))),
        }
    }

    fn answer(&mut self, key: u64, row: &SampleRow) -> Result<Sampled, SampleError> {
        let lines = self.lines.len().max(1) as u64;
        let line = usize::try_from(key % lines).ok().and_then(|line| self.lines.get(line));
        let strayed = self.strayed.get(&key).copied().unwrap_or(0);
        let at = usize::try_from(row.step.saturating_sub(strayed)).ok();
        let mut id = at.and_then(|at| line?.get(at).copied()).ok_or(SampleError::ScriptEnded)?;
        if let Some(mask) = row.mask.as_ref().filter(|mask| !mask.allows(id)) {
            id = mask.ids().next().ok_or(SampleError::NothingLeft)?;
            *self.strayed.entry(key).or_default() += 1;
        }
        // A script is certain of what it says.
        let sampled = TokenLogprob { id, logprob: 0.0 };
        let logprobs = row.params.logprobs.map(|asked| {
            let top = if asked > 0 { vec![sampled] } else { Vec::new() };
            Box::new(TokenLogprobs { sampled, top })
        });
        Ok(Sampled { id, logprobs })
    }
}

impl Runner for ScriptedRunner {
    fn info(&self) -> &RunnerInfo {
        &self.info
    }

    fn allocate(&mut self, _plan: &KvPlan) -> Result<(), DeviceError> {
        Ok(())
    }

    fn steps_in_flight(&self) -> usize {
        self.depth
    }

    fn launch(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        if self.in_flight.len() >= self.depth {
            return Err(DeviceError::new("launch", format!("{} steps are in flight", self.depth)));
        }
        batch.sequences.iter().try_for_each(|slice| self.check_feed(slice))?;
        let sampling = || batch.sequences.iter().filter_map(|s| Some((s.key, s.sample.as_ref()?)));
        let answers = sampling().map(|(key, row)| self.answer(key, row)).collect();
        self.last = sampling().map(|(key, row)| (key, row.step)).collect();
        self.in_flight.push_back(answers);
        Ok(())
    }

    fn collect(&mut self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        if !self.pace.is_zero() {
            thread::sleep(self.pace);
        }
        let oldest = self.in_flight.pop_front();
        oldest.ok_or_else(|| DeviceError::new("collect", "no step is in flight"))
    }
}
