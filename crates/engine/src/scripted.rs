//! A runner that speaks from a script: end-to-end tests of odd model behaviour, without a model.

use std::thread;
use std::time::Duration;

use ctxserve_backend::{
    Batch, DeviceError, KvDtype, KvGroup, KvPlan, KvSpec, SampleError, SampleRow, Sampled,
};
use ctxserve_core::{TokenId, TokenLogprob, TokenLogprobs};

use crate::{Runner, RunnerInfo};

/// Answers the k-th submitted sequence with line `k % lines`, whatever was asked, and ends with
/// [`SampleError::ScriptEnded`] where the line does.
#[derive(Clone, Debug)]
pub struct ScriptedRunner {
    info: RunnerInfo,
    lines: Vec<Vec<TokenId>>,
    pace: Duration,
}

impl ScriptedRunner {
    /// A runner with logits of width `vocab_size` and `max_context` positions. Without lines every answer is empty.
    pub fn new(vocab_size: usize, max_context: usize, lines: Vec<Vec<TokenId>>) -> Self {
        let groups = vec![KvGroup { window: None, layers: vec![0] }];
        let kv = KvSpec { page_size: 16, kv_heads: 1, head_dim: 1, groups, dtype: KvDtype::Bf16 };
        let description = format!("script of {} answers", lines.len());
        Self { info: RunnerInfo { vocab_size, max_context, kv, description }, lines, pace: Duration::ZERO }
    }

    /// Makes every step take at least `pace`, so that a test can act while an answer is under way.
    #[must_use]
    pub fn with_pace(mut self, pace: Duration) -> Self {
        self.pace = pace;
        self
    }

    fn answer(&self, key: u64, row: &SampleRow) -> Result<Sampled, SampleError> {
        let lines = self.lines.len().max(1) as u64;
        let line = usize::try_from(key % lines).ok().and_then(|line| self.lines.get(line));
        let at = usize::try_from(row.step).ok();
        let id = at.and_then(|at| line?.get(at).copied()).ok_or(SampleError::ScriptEnded)?;
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

    fn step(&mut self, batch: &Batch) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        if !self.pace.is_zero() {
            thread::sleep(self.pace);
        }
        let answers = batch.sequences.iter().filter_map(|s| Some(self.answer(s.key, s.sample.as_ref()?)));
        Ok(answers.collect())
    }
}
